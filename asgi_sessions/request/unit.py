"""One request's unit of work: it loads the session, stores what the app made of it, and lets it go."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from typing import Any, NoReturn, TypeVar

import anyio

from ..asgi import Message, Receive, Scope, Send
from ..client.cookie import Presented
from ..client.headers import ByName
from ..errors import (
    ReadOnlySessionError,
    SessionClosedError,
    SessionConflictError,
    SessionDataError,
    SessionError,
)
from ..observation.events import (
    AMBIGUOUS_COOKIE,
    BAD_SIGNATURE,
    LOCK_HELD,
    RETIRED_SESSION,
    UNKNOWN_SESSION,
    UNREADABLE_RECORD,
)
from ..record.model import SessionData
from ..session.changes import Change, Fate
from ..session.handle import Session
from ..stores.checkout import Checkout, LockPolicy, Missing, Outcome, raise_for
from ..stores.holders import Holder
from .admission import admits
from .answers import route_of
from .commit import Commit, let_go, lock_as_loaded
from .duplicates import settle
from .rerun import Discarded, Rerun
from .settings import Settings
from .state import (
    DISCARDED,
    FOLLOWS_RECORD,
    FRESH,
    IS_OVER,
    OPEN,
    OPTIMISTIC,
    READ_ONLY,
    REFUSED,
    RELEASED,
    News,
    State,
    state_of,
)
from .transaction import Block, inside, transacting

_EVENTS = {
    "bad_signature": BAD_SIGNATURE,  # what is absurd was not let in
    "ambiguous": AMBIGUOUS_COOKIE,
    Missing.ABSENT: UNKNOWN_SESSION,
    Missing.RETIRED: RETIRED_SESSION,
    Missing.UNREADABLE: UNREADABLE_RECORD,
}
_NOBODY = Session()
# bound once: looking up an Enum's member costs ten times a global on Python 3.11, and each request does it
_NOTHING = Change.NOTHING
_KEEP, _END = Fate.KEEP, Fate.END
_STORED, _GONE = Outcome.STORED, Outcome.GONE
_TOLD = News.TOLD
_RUNS_AGAIN = (Outcome.CONFLICT, Outcome.BUSY, Outcome.GONE)  # a change that was refused for others' sake

T = TypeVar("T")


class UnitOfWork:
    """What one request does with its session. `state` says what it may do, `news` what its client must learn.

    The tasks of a request share its handle. One of them at a time commits or transacts. What the others
    change during a transaction is refused, so that a roll-back takes back the block's own changes and nothing
    else. A cancelled request lets its lock go too.
    """

    state: State = FRESH
    below: State | None = None  # the request's own state, if it is not the one of the transaction under way
    record: Checkout | Missing = Missing.ABSENT  # what the store gave, or why it gave nothing
    news: News | str = News.NOTHING
    refusal = _GONE  # of the commit that made the state REFUSED
    committing: Commit | None = None  # the commit under way
    block: Block | None = None  # the innermost transaction under way
    outermost: Block | None = None  # around all transactions; made with the first of them
    is_clients = True  # the client's cookie leads, or led, to the record
    client_ended = False  # this request ended the session to which it led
    tried: str | None = None  # a new id; whether a record was stored under it is not known
    passive = False  # this request does not count as activity
    is_opened = False  # the session is loaded, or known to be absent
    rerun: Rerun | None = None  # where the app may be run again: the request runs without the lock
    has_stored = False  # something, or perhaps so, that a second run of the app would do again
    shares_name = False  # a middleware inside has a store of its own and a cookie of the same name
    save_failed = False  # the app's last `save` or `release` was not stored
    error: SessionError | None = None  # what the last of these or of the transactions raised

    def __init__(
        self,
        settings: Settings,
        scope: Scope,
        headers: ByName,
        receive: Receive,
        send: Send,
        presented: Presented,
    ) -> None:
        self.began = self.held_since = time.monotonic()
        self.settings = settings
        self.scope = scope
        self.receive = receive
        self.to_client = send
        self.presented = presented
        reader = settings.client
        self.client = None if reader is None else reader.of(scope, headers)  # a fingerprint
        self.session = Session((), settings.model, self.client, settings.rotate_on)
        self.session.unit = self

    # -- opening ------------------------------------------------------------------------------------------

    async def open(self, *, read_only: bool, passive: bool = False) -> None:
        """Load the session that the cookie names; a request without one gets a fresh session, for free."""
        assert self.state is FRESH  # noqa: S101  # a unit of work serves one request
        settings, presented = self.settings, self.presented
        self.passive = passive
        if presented.rivals:
            presented = self.presented = await settle(presented, settings.store, settings.lifetime)
        if presented.reason is not None:
            settings.events.emit(_EVENTS[presented.reason])
        if presented.session_id is not None:
            lock = None if read_only or self.rerun is not None else settings.lock
            missing = await self._load(presented.session_id, lock)
            if missing is not None:
                settings.events.emit(_EVENTS[missing], presented.session_id)
            elif settings.refreshes(presented) and isinstance(self.record, Checkout):
                self.news = News.REFRESH
        if read_only:
            self.state = READ_ONLY
        self.is_opened = True

    async def _load(self, session_id: str, lock: LockPolicy | None) -> Missing | None:
        """Check the session out. What is absent, or not for this client, leaves a fresh session."""
        settings = self.settings
        taken = await settings.store.checkout(session_id, lock, settings.lifetime, passive=self.passive)
        if not isinstance(taken, Checkout):
            self._forget(taken)
            return taken
        self.hold(taken)
        if not admits(settings, self.session, self.client, taken):
            self._forget(Missing.ABSENT)
            with anyio.CancelScope(shield=True):
                await let_go(settings, taken)
        elif taken.idle is not None and not self.passive:
            await settings.store.keep_alive(taken)
        return None

    def _forget(self, why: Missing) -> None:
        """There is no record any more: what begins now is another session."""
        self.session.forget()
        self.hold(why)
        self.tell(None)

    def wait_with_client(self, turn: Coroutine[Any, Any, T]) -> Coroutine[Any, Any, T]:
        """Wait for a turn; see `while_client_stays`."""
        return turn

    @property
    def route(self) -> str:
        """Method and path; empty when the request is over."""
        return route_of(self.scope) if self.scope else ""

    def has_waited(self, session_id: str, holder: Holder, waiting: int) -> None:
        """Tell the log who holds the lock that this request has waited for a second."""
        events, route = self.settings.events, holder.route or "outside any request"
        if events.is_due(LOCK_HELD, route):
            events.emit(
                LOCK_HELD, session_id, level=logging.WARNING, route=self.route, holder=route,
                host=holder.host, process=holder.process, held=round(holder.seconds, 1), waiting=waiting,
            )  # fmt: skip

    # -- what may be changed ------------------------------------------------------------------------------

    def require_writable(self) -> None:
        """Raise the error that says why a change made here could not be stored; nothing where it can."""
        if self.state is DISCARDED:
            raise SessionClosedError("the app is run again: nothing that this run of it changes is stored")
        elsewhere = self.block is not None and not self.is_inside()
        if self.state is READ_ONLY or elsewhere:
            raise ReadOnlySessionError(
                "this session was loaded without its lock; change it in `async with session.transaction()`"
            )
        if self.state is RELEASED or (self.committing is not None and self.committing.releases):
            raise SessionClosedError(
                "the session is committed and its lock released, so this change would be lost;"
                " make it in `async with session.transaction()`"
            )

    def refuse_unseen_change(self) -> None:
        """Raise where a read-only session was changed within a value: it would be lost without a word."""
        if self.state is READ_ONLY and self.session.change() is not _NOTHING:
            self.require_writable()

    @property
    def is_open(self) -> bool:
        """Whether the request can change the session: at once, or when a transaction of its own is over."""
        return (self.below or self.state) not in IS_OVER

    @property
    def is_versioned(self) -> bool:
        """Whether no request takes the lock, and versions alone decide (`lock=False`)."""
        return self.settings.lock is None

    @property
    def keeps_record(self) -> bool:
        """Whether later changes of this request can still be stored: there is a record to commit to."""
        taken = self.record
        return isinstance(taken, Checkout) and (taken.token is not None or self.is_versioned)

    def holds(self, store: object, session_id: str) -> bool:
        """Whether this session of this store is the unit's record, and this code may change it there."""
        taken = self.record
        if (
            not isinstance(taken, Checkout)
            or store is not self.settings.store
            or taken.session_id != session_id
        ):
            return False
        return self.is_open or self._block_here() is not None

    def is_still(self, store: object, session_id: str) -> bool:
        """Whether it still is when a turn has come: its app has not ended it, nor has it a new id."""
        return self.session.fate is not _END and self.holds(store, session_id)

    def part(self) -> AbstractAsyncContextManager[SessionData]:
        """A transaction whose changes are stored with the request, which holds the session."""
        return self.transaction(self.session, store=False)

    async def keep_alive(self) -> None:
        """Restart the record's idle timeout, also where the request itself does not count as activity."""
        if isinstance(self.record, Checkout) and self.record.idle is not None:
            await self.settings.store.keep_alive(self.record)

    def hold(self, record: Checkout | Missing) -> None:
        """From now on this is the record of the session, or why there is none."""
        self.record, self.held_since = record, time.monotonic()
        if self.state in FOLLOWS_RECORD:
            self.state = state_of(record, optimistic=self.rerun is not None)

    def tell(self, new_id: str | None) -> None:
        """Have the client learn this id, or that its session has ended; if the headers have not left."""
        if self.news is not _TOLD:
            self.news = new_id or (News.REMOVE if self.client_ended else News.NOTHING)

    # -- storing ------------------------------------------------------------------------------------------

    async def commit(self, *, release: bool) -> None:
        """Store what changed now, or raise why it is not stored."""
        self.save_failed = True
        with self._noted():
            raise_for(await self.store_changes(release=release))
        self.save_failed = False
        if release:
            self.end()
            if self.is_inside():
                self._is_over()

    async def store_changes(self, *, release: bool, release_unchanged: bool = False) -> Outcome:
        """Bring the store up to date in as few trips as there are; STORED also when there was nothing to do.

        With `release` nobody can change the session any more from when the commit begins: it would be lost.
        Without, what the app changes meanwhile is left for the next commit. What a transaction of another
        task changes is that transaction's to store; what the handle held before it began waits for its end.
        With `release_unchanged` the lock goes too where there was nothing to do. `Discarded` where the app is
        to be run again.
        """
        if self.block is not None and not self.is_inside():
            return await self._store_after(self.block, release)
        if self.committing is not None:
            await self.commit_is_over()
        if self.state is DISCARDED:
            raise Discarded
        session = self.session
        change = session.change()
        if change is _NOTHING:
            if release or release_unchanged:
                self._is_released()
                if isinstance(self.record, Checkout):
                    await let_go(self.settings, self.record)
            return _STORED
        self.require_writable()
        if self.state is REFUSED and session.fate is not _END:
            return self.refusal
        outcome = await self._carry_out(change, release)
        if outcome is _STORED:
            self.has_stored = True
        else:
            if outcome in _RUNS_AGAIN and self.state is OPTIMISTIC and self.may_run_again():
                self.discard()
            outcome = self.refusal = await self._why_gone() if outcome is _GONE else outcome
            if self.state is not RELEASED:
                self.state = REFUSED
        return outcome

    async def _store_after(self, block: Block, release: bool) -> Outcome:
        if not any(block.pending for block in block.chain()):
            return _STORED
        async with self._around().turn():
            return await self.store_changes(release=release)

    async def _carry_out(self, change: Change, release: bool) -> Outcome:
        commit = self.committing = Commit(
            self.settings,
            self.session,
            release,
            self.news is _TOLD,
            self.tried,
            self.state is OPTIMISTIC,
            self.may_run_again(),
        )
        try:
            outcome = await commit.carry_out(change, self.record, self.held_since)
        except BaseException as error:
            self.has_stored = self.has_stored or not isinstance(error, SessionDataError)
            raise
        finally:
            self.committing = None
            self._learn(commit)
            if self.state is RELEASED:  # the request has ended meanwhile: nobody else lets go
                await self.abandon()
        if release and outcome is _STORED:
            self._is_released()
        return outcome

    def _learn(self, commit: Commit) -> None:
        """Take over what has come of a commit."""
        self.tried = commit.tried
        if commit.has_ended and self.is_clients:
            self.client_ended = True
        if commit.has_begun:
            self.is_clients = False
        if commit.locked is not None:
            self.hold(commit.locked)
        if commit.record is not None:
            self.hold(commit.record)
            self.tell(commit.new_id)
        elif commit.has_ended and not isinstance(self.news, str):
            self.tell(None)
        if commit.intent is not _KEEP:
            self.session.want(commit.intent)
        if commit.is_over is not None:
            commit.is_over.set()

    async def commit_is_over(self) -> None:
        """Wait for the commit of another task of the request."""
        while (commit := self.committing) is not None:
            commit.is_over = commit.is_over or anyio.Event()
            await commit.is_over.wait()

    async def _why_gone(self) -> Outcome:
        """The record has ended, or has moved to a new id, whose cookie the client gets."""
        if not isinstance(self.record, Checkout):
            return _GONE
        await let_go(self.settings, self.record)
        found = await self.settings.store.checkout(self.record.session_id, None, None, passive=True)
        if found is not Missing.RETIRED:
            return _GONE
        self.is_clients = False
        return Outcome.CONFLICT

    def _is_released(self) -> None:
        if self.block is None and self.state is not READ_ONLY and self.state is not DISCARDED:
            self.state = RELEASED

    @contextmanager
    def _noted(self) -> Iterator[None]:
        """Remember why the app was refused: a framework may make an answer of its own of the error."""
        try:
            yield
        except SessionError as error:
            self.error = error
            raise
        self.error = None

    # -- transactions -------------------------------------------------------------------------------------

    @asynccontextmanager
    async def transaction(self, session: Session, *, store: bool = True) -> AsyncIterator[SessionData]:
        """See `Session.transaction`; `session` is the handle, which may outlive its request.

        Without `store` the changes are left to the request, which holds the lock.
        """
        if self.state is DISCARDED:
            self.require_writable()
        with self._noted():
            async with transacting(self, session, self._around(), store) as data:
                yield data

    def is_inside(self) -> bool:
        """Whether this code runs in the block of the innermost transaction under way."""
        return self.block is not None and inside.get() is self.block

    def _block_here(self) -> Block | None:
        """The transaction of this unit that this code runs in."""
        block = inside.get()
        return block.under_way() if block is not None and block.owner is self else None

    def _around(self) -> Block:
        """The block in which a transaction that begins here is nested."""
        block = self._block_here()
        if block is None:
            block = self.outermost = self.outermost or Block(self, self.settings.lock_to_transact.wait)
        return block

    async def load_anew(self) -> None:
        """Let a transaction have a record and a state of its own: it checks out again, under the lock."""
        self.refuse_unseen_change()
        self.below, self.state = self.state, state_of(self.record)
        if isinstance(self.record, Checkout):
            await self._load(self.record.session_id, self.settings.lock_to_transact)
            if not isinstance(self.record, Checkout):
                if self.below is OPTIMISTIC and self.may_run_again():
                    self.below = None
                    self.discard()
                raise SessionConflictError("the session has ended since it was loaded")
        elif self.news is _TOLD:
            raise SessionClosedError(
                "this client has no session, and its cookie can no longer be sent:"
                " begin the session before the response starts or the WebSocket is accepted"
            )

    async def lock_as_loaded(self) -> None:
        """Take the lock for a transaction over changes that stand on what was loaded without it."""
        assert isinstance(self.record, Checkout)  # noqa: S101  # the state says so
        locked = await lock_as_loaded(self.settings, self.record)
        if locked is None:
            if self.may_run_again():
                self.discard()
            raise_for(Outcome.CONFLICT)
            return
        self.below, self.state = self.state, OPEN
        self.hold(locked)

    def resume(self) -> None:
        """A transaction with a lock of its own is over: the request's own state comes back."""
        assert self.below is not None  # noqa: S101  # the transaction has put it there
        self.state, self.below = self.below, None
        if self.state in FOLLOWS_RECORD:
            self.hold(self.record)

    def undo(self) -> None:
        """Bring back what such a transaction has loaded; nothing where that has ended."""
        if not isinstance(self.record, Checkout):
            self._forget(self.record)
        elif self.state is REFUSED and self.refusal is _GONE:
            self._forget(Missing.ABSENT)
        else:
            self.session.load(self.record.record)

    # -- running the app again ----------------------------------------------------------------------------

    def may_run_again(self) -> bool:
        """Whether the app can be run once more, with nothing done twice that a client or the store saw."""
        return False

    def discard(self) -> NoReturn:
        """Give this run of the app up: it is run once more, under the lock."""
        self.state = DISCARDED
        if self.rerun is not None:
            self.rerun.discard()
        raise Discarded

    # -- letting go ---------------------------------------------------------------------------------------

    def end(self) -> None:
        """The request changes nothing more; a transaction under way goes on and stores its own."""
        if self.state is DISCARDED:
            return
        if self.block is None:
            self.state = RELEASED
        else:
            self.below = RELEASED

    async def roll_back(self) -> None:
        """Let go without storing what is not stored yet.

        A transaction of another task goes on, unless it stands on what is undone.
        """
        self.end()
        if self.block is None or self.is_inside():
            self._is_over()
            await self.abandon()
            return
        for block in self.block.chain():
            block.is_void = block.pending

    async def close(self) -> None:
        """Let go of what is still held, whatever happened, and of all that belongs to the request.

        Its objects are freed at once then, without a garbage collection. The handle may live on and transact.
        """
        if self.block is not None or self._keeps_token():
            await self.roll_back()
        else:
            self._is_over()
        if self.state is not DISCARDED:
            self.settings.store.note_response(time.monotonic() - self.began)
        self.scope, self.to_client, self.receive, self.rerun = {}, _nowhere, _nothing, None
        if self.block is None and self.committing is None:
            self.session.let_go()
            self.session = _NOBODY

    def _is_over(self) -> None:
        if self.state is not DISCARDED:
            self.state = RELEASED

    async def abandon(self) -> None:
        """Let the lock go if it is still held, even while the request is being cancelled."""
        if isinstance(self.record, Checkout) and self._keeps_token():
            with anyio.CancelScope(shield=True):
                await let_go(self.settings, self.record)

    def _keeps_token(self) -> bool:
        return isinstance(self.record, Checkout) and self.record.token is not None


async def _nowhere(message: Message) -> None:
    """The request is over: its client hears nothing more."""


async def _nothing() -> Message:
    """The request is over: its client says nothing more."""
    return {"type": "http.disconnect"}
