"""One request's unit of work: it loads the session, stores what the app made of it, and lets it go."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import NoReturn

import anyio

from ..asgi import Receive, Scope, Send
from ..client.cookie import Presented
from ..client.headers import ByName
from ..errors import ReadOnlySessionError, SessionClosedError, SessionError
from ..record.model import SessionData
from ..session.changes import Change, Fate
from ..session.device import Device
from ..session.handle import Session
from ..stores.checkout import Checkout, Missing, Outcome, raise_for
from .answers import hear_nothing, say_nothing
from .block import Block, inside
from .commit import Commit, let_go
from .commits import carry_out, commit_is_over, why_gone
from .devices import devices, end_device
from .duplicates import settle
from .ending import until_ended
from .imports import take_over
from .incoming import Incoming
from .lifetimes import of_new, of_stored
from .opening import load, note_missing
from .rerun import Discarded, Rerun
from .settings import Settings
from .state import (
    DISCARDED,
    FOLLOWS_RECORD,
    FRESH,
    IS_OVER,
    OPTIMISTIC,
    READ_ONLY,
    REFUSED,
    RELEASED,
    News,
    State,
    state_of,
)
from .transactions import Transactions

_NOBODY = Session()
# bound once: looking up an Enum's member costs ten times a global on Python 3.11, and each request does it
_NOTHING, _END, _TOLD = Change.NOTHING, Fate.END, News.TOLD
_STORED, _GONE = Outcome.STORED, Outcome.GONE
_RUNS_AGAIN = (Outcome.CONFLICT, Outcome.BUSY, Outcome.GONE)  # a change that was refused for others' sake


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
    transactions: Transactions | None = None  # made with the first of them
    is_clients = True  # the client's cookie leads, or led, to the record
    client_ended = False  # this request ended the session to which it led
    tried: str | None = None  # a new id; whether a record was stored under it is not known
    incoming: Incoming | None = None  # where the request had to wait for the lock
    passive = False  # this request does not count as activity
    is_opened = False  # the session is loaded, or known to be absent
    rerun: Rerun | None = None  # where the app may be run again: the request runs without the lock
    has_stored = False  # something, or perhaps so, that a second run of the app would do again
    may_rotate = False  # it can still send a cookie, and takes its turn
    is_last = False  # what is stored now is stored with the end of the answer
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
            presented = self.presented = await settle(
                presented, settings.store, settings.lifetime, follows=settings.rotate_every is not None
            )
        if presented.reason is not None:
            note_missing(settings, presented.reason)
        if presented.old is not None:
            presented = self.presented = await take_over(settings, presented, self.client)
        missing = None
        if presented.session_id is not None:
            lock = None if read_only or self.rerun is not None else settings.lock
            missing = await load(self, presented.session_id, lock)
            if missing is not None:
                note_missing(settings, missing, presented.session_id)
            elif isinstance(self.record, Checkout):
                if presented.old is not None:
                    self.news = self.record.session_id
                elif settings.renews(self.presented):
                    self._renew()
        if presented.old is not None and (presented.session_id is None or missing is not None):
            self.news = News.DROP
        if read_only:
            self.state = READ_ONLY
        self.is_opened = True

    def _renew(self) -> None:
        """The cookie is old: its id is replaced, or it is sent again where this request cannot do that."""
        taken = self.record
        holds = isinstance(taken, Checkout) and (taken.token is not None or self.settings.lock is None)
        may_rotate = self.may_rotate and not self.passive  # a new id restarts the idle timeout
        if may_rotate and holds and self.settings.rotates(self.presented):
            self.session.want(Fate.ROTATE)
        elif self.settings.refreshes(self.presented):
            self.news = News.REFRESH

    # -- what may be changed ------------------------------------------------------------------------------

    def require_writable(self) -> None:
        """Raise the error that says why a change made here could not be stored; nothing where it can."""
        if self.state is DISCARDED:
            raise SessionClosedError("the app is run again: nothing that this run of it changes is stored")
        if self.state is READ_ONLY or self.is_elsewhere():
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
    def max_age(self) -> float | None:
        """Seconds that a session may live, however active it is; None: there is no such bound."""
        return self.settings.max_age

    def expires_in(self) -> float | None:
        """See `Session.expires_in`; what the app has asked for counts before it is stored."""
        rule, session, taken = self.settings.lifetime, self.session, self.record
        if isinstance(taken, Checkout) and session.fate not in (Fate.SIGN_IN, _END):
            return of_stored(rule, session.expiry, taken, self.held_since).absolute
        return of_new(rule, session.expiry).absolute

    def is_elsewhere(self) -> bool:
        """Whether a transaction is under way, and this code does not run in its block."""
        return self.block is not None and inside.get() is not self.block

    def hold(self, record: Checkout | Missing) -> None:
        """From now on this is the record of the session, or why there is none."""
        self.record, self.held_since = record, time.monotonic()
        if self.state in FOLLOWS_RECORD:
            self.state = state_of(record, optimistic=self.rerun is not None)

    def tell(self, new_id: str | None) -> None:
        """Have the client learn this id, or that its session has ended; if the headers have not left."""
        if self.news is not _TOLD:
            self.news = new_id or (News.REMOVE if self.client_ended else News.NOTHING)

    def leads_to(self, session_id: str) -> None:
        """The client's cookie bears an older id of the session; it gets the one with the newer id."""
        self.presented = Presented(session_id, int(time.time()))
        if self.news is not _TOLD:
            self.news = News.REFRESH

    # -- storing ------------------------------------------------------------------------------------------

    async def commit(self, *, release: bool) -> None:
        """Store what changed now, or raise why it is not stored."""
        self.save_failed = True
        with self._noted():
            raise_for(await self.store_changes(release=release))
        self.save_failed = False
        if release:
            self.end()
            if not self.is_elsewhere():
                self._is_over()

    async def store_changes(self, *, release: bool, release_unchanged: bool = False) -> Outcome:
        """Bring the store up to date in as few trips as there are; STORED also when there was nothing to do.

        With `release` nobody can change the session any more from when the commit begins: it would be lost.
        Without, what the app changes meanwhile is left for the next commit. What a transaction of another
        task changes is that transaction's to store; what the handle held before it began waits for its end.
        With `release_unchanged` the lock goes too where there was nothing to do. `Discarded` where the app is
        to be run again.
        """
        if self.transactions is not None and self.is_elsewhere():
            return await self.transactions.store_after(release=release)
        if self.committing is not None:
            await commit_is_over(self)
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
        outcome = await carry_out(self, change, release=release)
        if outcome is not _STORED:
            return await self._is_refused(outcome)
        self.has_stored = True
        if release:
            self._is_released()
        return outcome

    async def _is_refused(self, outcome: Outcome) -> Outcome:
        """Nothing is stored any more; returns why."""
        if outcome in _RUNS_AGAIN and self.state is OPTIMISTIC and self.may_run_again():
            self.discard()
        self.refusal = await why_gone(self) if outcome is _GONE else outcome
        if self.state is not RELEASED:
            self.state = REFUSED
        return self.refusal

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

    async def until_ended(self) -> None:
        """See `Session.ended`."""
        if self.block is None and self._keeps_token():
            await self.commit(release=True)
        await until_ended(self)

    async def devices(self) -> list[Device]:
        """See `Session.devices`."""
        return await devices(self)

    async def end_device(self, handle: object) -> bool:
        """See `Session.end_device`."""
        return await end_device(self, handle)

    # -- transactions -------------------------------------------------------------------------------------

    @asynccontextmanager
    async def transaction(self, session: Session, *, store: bool = True) -> AsyncIterator[SessionData]:
        """See `Session.transaction`; `session` is the handle, which may outlive its request.

        Without `store` the changes are left to the request, which holds the lock.
        """
        if self.state is DISCARDED:
            self.require_writable()
        if self.transactions is None:
            self.transactions = Transactions(self, self.settings.lock_to_transact.wait)
        with self._noted():
            async with self.transactions.begin(session, store=store) as data:
                yield data

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
        if self.transactions is not None and self.is_elsewhere():
            self.transactions.outlive_roll_back()
            return
        self._is_over()
        await self.abandon()

    async def close(self) -> None:
        """Let go of what is still held, whatever happened, and of all that belongs to the request.

        Its objects are freed at once then, without a garbage collection. The handle may live on and transact.
        """
        if self.incoming is not None:
            self.incoming.close()
        if self.block is not None or self._keeps_token():
            await self.roll_back()
        else:
            self._is_over()
        if self.state is not DISCARDED:
            self.settings.store.note_response(time.monotonic() - self.began)
        self.scope, self.to_client, self.receive, self.rerun = {}, hear_nothing, say_nothing, None
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
