"""One transaction: it shares its request's lock or takes one, and is stored or rolled back at its end."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import anyio

from ..errors import SessionClosedError, SessionConflictError
from ..record.model import SessionData
from ..session.changes import Change
from ..stores.checkout import Checkout, Missing, Outcome, raise_for
from .block import Block
from .commit import lock_as_loaded
from .commits import commit_is_over
from .opening import forget, load
from .state import FOLLOWS_RECORD, IS_OVER, OPEN, OPTIMISTIC, REFUSED, News, state_of
from .work import Work


def kind_of(work: Work, block: Block, store: bool) -> AbstractAsyncContextManager[SessionData]:
    """What this block is. Without `store` its changes are left to the request, where that holds the lock."""
    if block.is_part():
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
    await _load_anew(work)
    try:
        yield work.session.data
        await block.nested_are_over()
        raise_for(await work.store_changes(release=True))
    except BaseException:
        with anyio.CancelScope(shield=True):
            await commit_is_over(work)
        _undo(work)
        work.session.modified = modified
        raise
    finally:
        await work.abandon()


@asynccontextmanager
async def _with_lock_as_loaded(work: Work, block: Block) -> AsyncIterator[SessionData]:
    """Lock for one block what the request changed without the lock; store all of it after the block."""
    block.pending = True
    await _lock_as_loaded(work)
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
                await commit_is_over(work)
            raise


# -- a state of its own, over that of the request ------------------------------------------------------------


async def _load_anew(work: Work) -> None:
    """Check out again, under the lock."""
    work.refuse_unseen_change()
    work.below, work.state = work.state, state_of(work.record)
    if isinstance(work.record, Checkout):
        await load(work, work.record.session_id, work.settings.lock_to_transact)
        if not isinstance(work.record, Checkout):
            if work.below is OPTIMISTIC and work.may_run_again():
                work.below = None
                work.discard()
            raise SessionConflictError("the session has ended since it was loaded")
    elif work.news is News.TOLD:
        raise SessionClosedError(
            "this client has no session, and its cookie can no longer be sent:"
            " begin the session before the response starts or the WebSocket is accepted"
        )


async def _lock_as_loaded(work: Work) -> None:
    """Take the lock over changes that stand on what was loaded without it."""
    assert isinstance(work.record, Checkout)  # noqa: S101  # the state says so
    locked = await lock_as_loaded(work.settings, work.record)
    if locked is None:
        if work.may_run_again():
            work.discard()
        raise_for(Outcome.CONFLICT)
        return
    work.below, work.state = work.state, OPEN
    work.hold(locked)


def _undo(work: Work) -> None:
    """Bring back what the transaction has loaded; nothing where that has ended."""
    if not isinstance(work.record, Checkout):
        forget(work, work.record)
    elif work.state is REFUSED and work.refusal is Outcome.GONE:
        forget(work, Missing.ABSENT)
    else:
        work.session.load(work.settings.store.opened(work.record))


def resume(work: Work) -> None:
    """The transaction is over: the request's own state comes back."""
    assert work.below is not None  # noqa: S101  # the transaction has put it there
    work.state, work.below = work.below, None
    if work.state in FOLLOWS_RECORD:
        work.hold(work.record)
