"""Transactions: the tasks of one request enter their blocks one after the other."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from contextvars import ContextVar
from typing import Protocol

import anyio

from ..errors import LockTimeoutError, SessionClosedError
from ..record.model import SessionData
from ..session.changes import Change
from ..session.handle import Session
from ..stores.checkout import Outcome, raise_for
from .state import IS_OVER, OPTIMISTIC, REFUSED, RELEASED, State


class Block:
    """The block of a transaction, in which others may be nested.

    The outermost is no transaction. It belongs to the unit of work, and all others are nested in it.
    """

    __slots__ = ("has_ended", "is_void", "lock", "outer", "owner", "pending", "wait")

    def __init__(self, owner: object, wait: float, outer: Block | None = None) -> None:
        self.owner = owner  # the unit of work
        self.wait = wait  # seconds, for one's turn
        self.outer = outer
        self.lock: anyio.Lock | None = None  # for those that are nested directly in this one
        self.has_ended = False
        self.pending = False  # the handle held changes of the request when the block began
        self.is_void = False  # the request was rolled back, and these changes with it

    def is_over(self) -> bool:
        """Whether the block has ended, or one around it."""
        return self.has_ended or (self.outer is not None and self.outer.is_over())

    def chain(self) -> Iterator[Block]:
        """This block and those around it, without the outermost."""
        block = self
        while block.outer is not None:
            yield block
            block = block.outer

    def under_way(self) -> Block | None:
        """The innermost of these that is not over: a task may outlive the block that it began in."""
        return next((block for block in self.chain() if not block.is_over()), None)

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Let one nested transaction run at a time."""
        lock = self.lock = self.lock or anyio.Lock()
        try:
            lock.acquire_nowait()
        except anyio.WouldBlock:
            with anyio.move_on_after(self.wait) as waiting:
                await lock.acquire()
            if waiting.cancelled_caught:
                raise LockTimeoutError(self.wait) from None
        try:
            yield
        finally:
            lock.release()

    async def nested_are_over(self) -> None:
        """Wait for those that tasks of the block have begun in it: what they do is a part of it."""
        if self.lock is not None:
            async with self.turn():
                pass


inside: ContextVar[Block | None] = ContextVar("asgi_sessions_transaction", default=None)
"""The block that this code runs in: as its task, as a child of that task, or in a thread."""


class Work(Protocol):
    """The unit of work, as a transaction sees it."""

    session: Session
    state: State
    below: State | None
    block: Block | None
    outermost: Block | None

    async def commit(self, *, release: bool) -> None: ...

    async def store_changes(self, *, release: bool) -> Outcome: ...

    async def commit_is_over(self) -> None: ...

    async def load_anew(self) -> None: ...

    async def lock_as_loaded(self) -> None: ...

    def resume(self) -> None: ...

    def undo(self) -> None: ...

    async def abandon(self) -> None: ...


@asynccontextmanager
async def transacting(work: Work, session: Session, outer: Block, store: bool) -> AsyncIterator[SessionData]:
    """A transaction nested in `outer`. Without `store` its changes are left to the request."""
    code = inside.get()
    async with outer.turn():
        await work.commit_is_over()  # which may change the state, or the id
        work.session = session
        block = work.block = Block(work, outer.wait, outer)
        inside.set(block)
        try:
            async with _kind_of(work, block, store) as data:
                yield data
        finally:
            inside.set(code)
            block.has_ended = True
            if work.block is not None and work.block.is_over():
                work.block = outer.under_way()
                if work.block is None and work.below is not None:
                    work.resume()
                    if work.state is RELEASED:
                        await work.abandon()


def _kind_of(work: Work, block: Block, store: bool) -> AbstractAsyncContextManager[SessionData]:
    if block.outer is not work.outermost:
        return _within_another(work, block)
    if work.state is OPTIMISTIC and work.session.change() is not Change.NOTHING:
        return _with_lock_as_loaded(work, block)
    if work.state is OPTIMISTIC or work.state in IS_OVER:
        return _with_own_lock(work, block)
    return _with_request(work, block, store)


@asynccontextmanager
async def _within_another(work: Work, block: Block) -> AsyncIterator[SessionData]:
    """A part of another transaction, whose end stores it too, or rolls it back."""
    async with _savepoint(work, block.is_over) as data:
        yield data
        await block.nested_are_over()
        if block.is_over():
            raise SessionClosedError("the transaction that this one is a part of was rolled back")


@asynccontextmanager
async def _with_request(work: Work, block: Block, store: bool) -> AsyncIterator[SessionData]:
    """Commit what is there when the block ends; the request keeps its lock, if it is still under way.

    A fault of the store undoes the block, so that it may be tried again. A refused change stays, and the
    answer is refused for it.
    """
    block.pending = work.session.change() is not Change.NOTHING
    before = work.state
    async with _savepoint(work, lambda: work.state is REFUSED and before is not REFUSED) as data:
        yield data
        await block.nested_are_over()
        if block.is_void:
            raise SessionClosedError("the request that this transaction is a part of was rolled back")
        if store or work.below is not None:
            await work.commit(release=work.below is not None)


@asynccontextmanager
async def _with_own_lock(work: Work, block: Block) -> AsyncIterator[SessionData]:
    """Lock and load anew for one block, commit and release after it."""
    modified = work.session.modified
    await work.load_anew()
    try:
        yield work.session.data
        await block.nested_are_over()
        raise_for(await work.store_changes(release=True))
    except BaseException:
        with anyio.CancelScope(shield=True):
            await work.commit_is_over()
        work.undo()
        work.session.modified = modified
        raise
    finally:
        await work.abandon()


@asynccontextmanager
async def _with_lock_as_loaded(work: Work, block: Block) -> AsyncIterator[SessionData]:
    """Lock for one block what the request changed without the lock; store all of it after the block."""
    block.pending = True
    await work.lock_as_loaded()
    try:
        async with _savepoint(work, lambda: work.state is REFUSED) as data:
            yield data
            await block.nested_are_over()
            if block.is_void:
                raise SessionClosedError("the request that this transaction is a part of was rolled back")
            raise_for(await work.store_changes(release=True))
    finally:
        await work.abandon()


@asynccontextmanager
async def _savepoint(work: Work, is_void: Callable[[], bool]) -> AsyncIterator[SessionData]:
    """See `Session.savepoint`; no commit of another task is under way when it is used."""
    with work.session.savepoint(is_void) as data:
        try:
            yield data
        except BaseException:
            with anyio.CancelScope(shield=True):
                await work.commit_is_over()
            raise
