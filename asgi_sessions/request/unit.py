"""One request's unit of work: what the handle asks of the store, alone and from several tasks."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from contextvars import ContextVar

import anyio

from ..errors import LockTimeoutError, SessionClosedError, SessionConflictError, SessionError
from ..record.model import SessionData
from ..session.changes import Change
from ..session.handle import Mode, Session
from ..stores.checkout import Missing, Outcome, raise_for
from .holding import Holding

_NOBODY = Session()


class _Turn:
    """The right to transact, which the tasks of one request take one after the other.

    The outermost belongs to the unit; each transaction has one for those that begin inside its block.
    """

    __slots__ = ("has_ended", "lock", "outer", "pending", "unit")

    def __init__(self, unit: Unit, outer: _Turn | None = None) -> None:
        self.unit = unit
        self.outer = outer
        self.lock: anyio.Lock | None = None
        self.has_ended = False
        self.pending = False  # the handle held changes that were not stored when the block began

    def is_over(self) -> bool:
        """Whether the block has ended, or one that it stands in: it is void then."""
        return self.has_ended or (self.outer is not None and self.outer.is_over())


_inside: ContextVar[_Turn | None] = ContextVar("asgi_sessions_transaction", default=None)
# the block that this code runs in, as its task, a child of it or a thread


def _under_way(turn: _Turn) -> _Turn | None:
    """This block, or the first around it that is not over; None outside of all.

    A task may outlive the block that it began in.
    """
    while turn.outer is not None and turn.is_over():
        turn = turn.outer
    return None if turn.outer is None else turn


class Unit(Holding):
    """What a session's handle calls: `save`, `release`, `transaction`.

    The tasks of a request share its handle. One of them at a time transacts, whether the request holds the
    lock or not; what the others change meanwhile is refused, so that a roll-back takes back the block's own
    changes and nothing else. `refused` says that the app's last `save` or `release` failed; `refusal` is what
    the last of them or of its transactions raised.
    """

    refused = False
    refusal: SessionError | None = None
    _turns: _Turn | None = None  # the outermost, of transactions that stand in no other
    _block: _Turn | None = None  # the innermost transaction under way
    _below = Mode.OPEN  # what the request may do when no transaction is under way

    def holds(self, store: object, session_id: str) -> bool:
        """Whether this session of this store is the unit's record, and this code may change it there."""
        taken = self._checkout
        if taken is None or store is not self.rules.store or taken.session_id != session_id:
            return False
        return self.is_open or self._block_here() is not None

    async def keep_alive(self) -> None:
        """Restart the record's idle timeout, also where the request itself does not count as activity."""
        if self._checkout is not None and self._checkout.idle is not None:
            await self.rules.store.keep_alive(self._checkout)

    def is_inside(self) -> bool:
        """Whether this code runs in the block of the innermost transaction under way."""
        return self._block is not None and _inside.get() is self._block

    @property
    def is_open(self) -> bool:
        """Whether the request can change the session: at once, or when a transaction of its own is over."""
        return (self.session.mode if self._block is None else self._below) is Mode.OPEN

    def end(self) -> None:
        """The request changes nothing more; a transaction under way goes on and stores its own."""
        if self._block is None:
            self.session.mode = Mode.CLOSED
        else:
            self._below = Mode.CLOSED

    async def commit(self, *, release: bool) -> None:
        """Store what changed now, or raise why it is not stored."""
        self.refused = True
        with self._noted():
            raise_for(await self.store_changes(release=release))
        self.refused = False
        if release:
            self.end()
            if self.is_inside():
                self.session.mode = Mode.CLOSED

    async def store_changes(self, *, release: bool) -> Outcome:
        """As `Holding` has it. What a transaction of another task changes is that transaction's to store.

        What the handle held before that began has to wait for its end.
        """
        if self._block is None or self.is_inside():
            return await super().store_changes(release=release)
        if not self._has_pending():
            return Outcome.STORED
        async with self._one_at_a_time(self._turn_here()):
            return await super().store_changes(release=release)

    async def roll_back(self) -> None:
        """As `Holding` has it. A transaction of another task goes on unless it stands on what is undone."""
        if self._block is None or self.is_inside():
            await super().roll_back()
        else:
            self._is_over = True
            self.end()

    # -- transactions ---------------------------------------------------------------------------------------

    @asynccontextmanager
    async def transaction(self, session: Session, *, store: bool = True) -> AsyncIterator[SessionData]:
        """See `Session.transaction`; `session` is the handle, which may outlive its request.

        Without `store` the changes are left to the request, which holds the lock.
        """
        with self._noted():
            async with self._transacting(session, store) as data:
                yield data

    @contextmanager
    def _noted(self) -> Iterator[None]:
        """Remember why the app was refused: a framework may make an answer of its own of the error."""
        try:
            yield
        except SessionError as error:
            self.refusal = error
            raise
        self.refusal = None

    @asynccontextmanager
    async def _transacting(self, session: Session, store: bool) -> AsyncIterator[SessionData]:
        self.session = session
        around, outer = _inside.get(), self._turn_here()
        async with self._one_at_a_time(outer):
            await self._commit_is_over()  # which may change what the request may do, or its id
            self.session = session
            block = _Turn(self, outer)
            if self._block is None:
                self._below = session.mode
            self._block = block
            _inside.set(block)
            try:
                async with self._kind_of(block, store) as data:
                    yield data
            finally:
                _inside.set(around)
                block.has_ended = True
                if self._block is not None and self._block.is_over():
                    self._block = _under_way(outer)
                    if self._block is None:
                        await self._after_blocks()

    def _kind_of(self, block: _Turn, store: bool) -> AbstractAsyncContextManager[SessionData]:
        if block.outer is not self._turns:
            return self._within_another(block)
        if self._below is Mode.OPEN:
            return self._under_the_requests_lock(block, store)
        return self._under_its_own_lock(block)

    @asynccontextmanager
    async def _within_another(self, block: _Turn) -> AsyncIterator[SessionData]:
        """A part of another transaction, whose end stores it too, or rolls it back."""
        async with self._savepoint(block.is_over) as data:
            yield data
            await self._nested_are_over(block)
            if block.is_over():
                raise SessionClosedError("the transaction that this one is a part of was rolled back")

    @asynccontextmanager
    async def _under_the_requests_lock(self, block: _Turn, store: bool) -> AsyncIterator[SessionData]:
        """Commit what is there when the block ends; the request keeps its lock, if it is still under way.

        A fault of the store undoes the block, so that it may be tried again. A refused change stays, and the
        answer is refused for it.
        """
        block.pending = self.session.change() is not Change.NOTHING
        refusal = self._refusal
        self.session.mode = Mode.TRANSACTION
        async with self._savepoint(lambda: self._refusal is not refusal) as data:
            yield data
            await self._nested_are_over(block)
            if self._is_over and block.pending:
                raise SessionClosedError("the request that this transaction is a part of was rolled back")
            if store or self._below is not Mode.OPEN:
                await self.commit(release=self._below is not Mode.OPEN)

    @asynccontextmanager
    async def _under_its_own_lock(self, block: _Turn) -> AsyncIterator[SessionData]:
        """Lock and load anew for one block, commit and release after it."""
        self.refuse_unseen_change()
        await self._retake()
        self.session.mode = Mode.TRANSACTION
        try:
            yield self.session.data
            await self._nested_are_over(block)
            raise_for(await self.store_changes(release=True))
        except BaseException:
            with anyio.CancelScope(shield=True):
                await self._commit_is_over()
            if self._checkout is None or self._refusal is Outcome.GONE:
                self._forget_record()  # what begins now is another session
                self._refusal = None
            else:
                self.session.load(self._checkout.record)
            raise
        finally:
            await self.abandon()

    @asynccontextmanager
    async def _savepoint(self, is_void: Callable[[], bool]) -> AsyncIterator[SessionData]:
        """See `Session.savepoint`; no commit of another task is under way when it is used."""
        with self.session.savepoint(is_void) as data:
            try:
                yield data
            except BaseException:
                with anyio.CancelScope(shield=True):
                    await self._commit_is_over()
                raise

    async def _nested_are_over(self, block: _Turn) -> None:
        """Wait for those that tasks of the block have begun in it: what they do is a part of it."""
        if block.lock is not None:
            async with self._one_at_a_time(block):
                pass

    async def _after_blocks(self) -> None:
        """The request goes on as before its transactions, or has ended meanwhile."""
        self.session.mode = self._below
        if self._below is Mode.CLOSED:
            await self.abandon()

    def _turn_here(self) -> _Turn:
        """Whose turn a transaction that begins here has to wait for: the block around it, or the unit."""
        turn = self._block_here()
        if turn is None:
            turn = self._turns = self._turns or _Turn(self)
        return turn

    def _block_here(self) -> _Turn | None:
        """The transaction that this code runs in, None outside of all of this unit."""
        around = _inside.get()
        return _under_way(around) if around is not None and around.unit is self else None

    def refuse_unseen_change(self) -> None:
        """Raise where a read-only session was changed within a value: it would be lost without a word."""
        if self.session.mode is Mode.READ_ONLY and self.session.change() is not Change.NOTHING:
            self.session.require_open()

    @asynccontextmanager
    async def _one_at_a_time(self, turn: _Turn) -> AsyncIterator[None]:
        """Let the tasks of this request transact in turn: they share the handle."""
        lock = turn.lock = turn.lock or anyio.Lock()
        try:
            lock.acquire_nowait()
        except anyio.WouldBlock:
            wait = self.rules.lock_to_transact.wait
            with anyio.move_on_after(wait) as waiting:
                await lock.acquire()
            if waiting.cancelled_caught:
                raise LockTimeoutError(wait) from None
        try:
            yield
        finally:
            lock.release()

    async def _retake(self) -> None:
        """Check the record out again, under the lock; nothing where this session never had a record."""
        if self._checkout is None:
            if not self.deliverable:
                raise SessionClosedError(
                    "this client has no session, and its cookie can no longer be sent:"
                    " begin the session before the response starts or the WebSocket is accepted"
                )
            return
        store, rules, session_id = self.rules.store, self.rules, self._checkout.session_id
        taken = await store.checkout(session_id, rules.lock_to_transact, rules.lifetime, passive=self.passive)
        if isinstance(taken, Missing):
            self._retired = taken is Missing.RETIRED
            self._forget_record()
        else:
            refusal = self._show(taken)
            if refusal is not None:
                await self._refuse(refusal, taken)
            elif taken.idle is not None and not self.passive:
                await store.keep_alive(taken)
        if self._checkout is None:
            raise SessionConflictError("the session has ended since it was loaded")

    @property
    def is_settled(self) -> bool:
        """Whether nothing is held and nobody transacts."""
        return self._block is None and (self._checkout is None or self._checkout.token is None)

    def detach(self) -> None:
        """The request is over: without this reference its objects go at once, not with the next collection.

        A handle that is used later comes back by itself (`Session.transaction` in a task that lives on).
        """
        if self._block is None and not self._storing:
            self.session = _NOBODY

    def _has_pending(self) -> bool:
        """Whether the transaction under way began with changes that the request has not stored."""
        block = self._block
        while block is not None:
            if block.pending:
                return True
            block = block.outer
        return False
