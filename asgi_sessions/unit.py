"""One request's unit of work: the handle, the checkout behind it, and the commit that joins them."""

from __future__ import annotations

import math
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from logging import WARNING

import anyio

from .data import SessionData
from .errors import SessionClosedError, SessionConflictError, SessionStoreError
from .events import (
    FINGERPRINT_MISMATCH,
    RETIRED_SESSION,
    SESSION_CREATED,
    SESSION_ENDED,
    SESSION_REGENERATED,
    STORE_ERROR,
    UNKNOWN_SESSION,
    UNREADABLE_RECORD,
    EventSink,
)
from .fields import new_session_id
from .session import Change, Fate, Mode, Session
from .stores.base import Checkout, Lifetime, Missing, Outcome, SessionStore, raise_for
from .stores.local import LockPolicy

_WHY_MISSING = {
    Missing.ABSENT: UNKNOWN_SESSION,
    Missing.RETIRED: RETIRED_SESSION,
    Missing.UNREADABLE: UNREADABLE_RECORD,
}


@dataclass(frozen=True, slots=True)
class Rules:
    """What is the same for every unit of one middleware."""

    store: SessionStore
    model: type[SessionData]
    lifetime: Lifetime
    lock: LockPolicy | None  # None: no lock, commits compare versions
    lock_to_transact: LockPolicy
    cookie_name: str
    events: EventSink


class Unit:
    """Loads a session for one request, stores what the app made of it, and lets go whatever happens.

    `new_cookie` is the id that the client must be told, `cookie_gone` says that its cookie is to be removed.
    Once the answer's headers are out (`deliverable` False) no session can begin or change its id.
    """

    __slots__ = (
        "_began",
        "_checkout",
        "_fingerprint",
        "_known_user",
        "_retired",
        "_transacting",
        "_turn",
        "cookie_gone",
        "deliverable",
        "new_cookie",
        "rules",
        "session",
    )

    def __init__(self, rules: Rules, fingerprint: str | None) -> None:
        self.session = Session(model=rules.model, unit=self)
        self.session.content.prepared_by(self._put_fingerprint)
        self.new_cookie: str | None = None
        self.cookie_gone = False
        self.deliverable = True
        self.rules = rules
        self._fingerprint = fingerprint
        self._checkout: Checkout | None = None
        self._began = 0.0  # of the checkout
        self._known_user: str | None = None
        self._retired = False
        self._turn: anyio.Lock | None = None
        self._transacting: int | None = None

    # -- opening ------------------------------------------------------------------------------------------

    async def open(self, session_id: str, *, read_only: bool) -> None:
        """Check the session out; what is absent, unreadable or somebody else's leaves a fresh session."""
        lock = None if read_only else self.rules.lock
        taken = await self.rules.store.checkout(session_id, lock, self.rules.lifetime)
        if isinstance(taken, Missing):
            self._retired = taken is Missing.RETIRED
            self.rules.events.emit(_WHY_MISSING[taken], session_id)
            return
        self._checkout, self._began = taken, time.monotonic()
        refusal = self._show(taken)
        if refusal is not None:
            self.session.forget()
            self.rules.events.emit(refusal, session_id)
            await self._let_go()
            self._checkout = None

    def _show(self, taken: Checkout) -> str | None:
        """Load the handle; the name of an event where the record must not be shown to this client."""
        try:
            self.session.load(taken.record)
        except ValueError:
            return UNREADABLE_RECORD
        content = self.session.content
        if content.peek("session_id") != taken.session_id:
            return UNREADABLE_RECORD
        if self._fingerprint is not None and content.peek("fingerprint") not in (None, self._fingerprint):
            return FINGERPRINT_MISMATCH
        self._known_user = content.peek("user_id")
        return None

    def _put_fingerprint(self, fresh: SessionData) -> None:
        if self._fingerprint is not None:
            fresh.__dict__["fingerprint"] = self._fingerprint

    # -- what the handle asks for -------------------------------------------------------------------------

    def holds(self, store: object, session_id: str) -> bool:
        """Whether a change to this session of this store belongs into this unit's record."""
        taken = self._checkout
        if taken is None or store is not self.rules.store or taken.session_id != session_id:
            return False
        return self.session.mode is Mode.OPEN and self._transacting in (None, _task())

    async def commit(self, *, release: bool) -> None:
        """Store what changed now, or raise why it is not stored."""
        raise_for(await self.store_changes(release=release))
        if release:
            self.session.set_mode(Mode.CLOSED)

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[SessionData]:
        """See `Session.transaction`."""
        if self.session.mode is Mode.OPEN and self._transacting in (None, _task()):
            with self.session.savepoint() as data:
                yield data
            await self.commit(release=False)
            return
        if self._turn is None:
            self._turn = anyio.Lock()
        async with self._turn:
            mode = self.session.mode
            self._transacting = _task()
            try:
                async with self._own_turn() as data:
                    yield data
            finally:
                self._transacting = None
                self.session.set_mode(mode)

    @asynccontextmanager
    async def _own_turn(self) -> AsyncIterator[SessionData]:
        """Lock and load anew for one block, commit and release after it."""
        before = await self._retake()
        self.session.set_mode(Mode.OPEN)
        try:
            yield self.session.data
            raise_for(await self.store_changes(release=True))
        except BaseException:
            if before is None:
                self.session.forget()
            else:
                self.session.load(before)
            raise
        finally:
            await self.abandon()

    async def _retake(self) -> bytes | None:
        """Check the record out again, under the lock; None where this session never had a record."""
        if self._checkout is None:
            if not self.deliverable:
                raise SessionClosedError(
                    "this client has no session, and its cookie can no longer be sent:"
                    " begin the session before the response starts or the WebSocket is accepted"
                )
            return None
        session_id = self._checkout.session_id
        taken = await self.rules.store.checkout(session_id, self.rules.lock_to_transact, self.rules.lifetime)
        if isinstance(taken, Missing):
            self._forget_record()
            raise SessionConflictError("the session has ended since it was loaded")
        self._checkout, self._began = taken, time.monotonic()
        self.session.load(taken.record)
        return taken.record

    # -- storing ------------------------------------------------------------------------------------------

    async def store_changes(self, *, release: bool) -> Outcome:
        """Bring the store up to date in as few trips as there are; STORED also when there was nothing to do.

        GONE: the record was deleted meanwhile; the handle is a fresh session then and the cookie is to go.
        """
        change = self.session.change()
        if change is Change.NOTHING:
            if release:
                await self._let_go()
            return Outcome.STORED
        self.session.require_open()
        taken = self._checkout
        if taken is None:
            outcome = await self._create(release)
        elif change is Change.WRITE:
            outcome = await self._write(taken, release)
        elif change is Change.MOVE:
            outcome = await self._move(taken, release)
        else:
            outcome = await self._delete(taken)
        if outcome is Outcome.GONE:
            await self._let_go()
            self._forget_record()
        return outcome

    async def _create(self, release: bool) -> Outcome:
        if self._retired and self.session.fate is Fate.KEEP:
            raise SessionConflictError("the session got a new id while this request was under way")
        await self._store_new(self.rules.lifetime, release)
        self.rules.events.emit(SESSION_CREATED, self.new_cookie)
        return Outcome.STORED

    async def _store_new(self, lifetime: Lifetime, release: bool) -> None:
        """Store the handle's record under an id that nobody has, for the client to be told of."""
        if not self.deliverable:
            raise SessionClosedError("the cookie of a new session can no longer be sent")
        record = self.session.content.seal()
        data = self.session.data
        if lifetime.ttl() > 0:  # max_age=-1: a session that has expired when it begins
            lock = None if release else self.rules.lock
            created = await self.rules.store.create(data.session_id, record, lifetime, lock)
            if created is None:
                raise SessionConflictError("the new session id is taken")
            self._checkout, self._began = created, time.monotonic()
            if data.user_id is not None:
                await self.rules.store.link_user(data.user_id, data.session_id, lifetime)
        self._known_user = data.user_id
        self.session.committed(record)
        self.new_cookie, self.cookie_gone = data.session_id, False

    async def _write(self, taken: Checkout, release: bool) -> Outcome:
        content = self.session.content
        record = content.seal()
        user_id = content.peek("user_id")
        if user_id is not None and user_id != self._known_user:
            await self.rules.store.link_user(user_id, taken.session_id, self._remaining(taken))
        outcome = await self.rules.store.commit(taken, record, release=release)
        if outcome is Outcome.STORED:
            self._known_user = user_id
            self.session.committed(record)
        return outcome

    async def _move(self, taken: Checkout, release: bool) -> Outcome:
        """Create under the new id first: if we die in between, the old session is still whole."""
        kept = self.session.fate is Fate.MOVE
        if kept:
            self.session.content.rename(new_session_id())
        new_cookie = self.new_cookie
        try:
            await self._store_new(self._remaining(taken) if kept else self.rules.lifetime, release)
            outcome = await self.rules.store.discard(taken, retire=True)
        except BaseException:
            self._checkout = taken
            raise
        if outcome is not Outcome.STORED and (kept or outcome is not Outcome.GONE):
            await self._undo_new(taken, new_cookie)
            return outcome
        self.rules.events.emit(SESSION_REGENERATED if kept else SESSION_ENDED, taken.session_id)
        return Outcome.STORED

    async def _undo_new(self, taken: Checkout, new_cookie: str | None) -> None:
        if self._checkout is not None and self._checkout is not taken:
            await self.rules.store.discard(self._checkout, retire=False)
        self._checkout, self.new_cookie = taken, new_cookie

    async def _delete(self, taken: Checkout) -> Outcome:
        outcome = await self.rules.store.discard(taken, retire=False)
        if outcome in (Outcome.LOST, Outcome.CONFLICT):
            if self.session.fate is not Fate.END:
                return outcome
            await self.rules.store.delete(taken.session_id)  # an end wins over every other writer
        self.rules.events.emit(SESSION_ENDED, taken.session_id)
        self._forget_record()
        return Outcome.STORED

    def _forget_record(self) -> None:
        self.session.forget()
        self._checkout = self.new_cookie = self._known_user = None
        self.cookie_gone = True

    def _remaining(self, taken: Checkout) -> Lifetime:
        """What is left of a checked-out record's life: a new id or a write never prolongs it."""
        if taken.expires_in is None:
            return self.rules.lifetime
        left = taken.expires_in - (time.monotonic() - self._began)
        return Lifetime(absolute=max(left, 0.001), idle=self.rules.lifetime.idle)

    # -- letting go -----------------------------------------------------------------------------------------

    def max_age(self) -> int | None:
        """Whole seconds that the client may keep the cookie; None where there is no absolute bound."""
        if self._checkout is None or self._checkout.expires_in is None:
            return None
        return math.ceil(self._checkout.expires_in - (time.monotonic() - self._began))

    @property
    def is_loaded(self) -> bool:
        """Whether there is a record behind the handle."""
        return self._checkout is not None

    @property
    def keeps_record(self) -> bool:
        """Whether later changes of this request can still be stored: there is a record to commit to."""
        return self._checkout is not None and (self._checkout.token is not None or self.rules.lock is None)

    async def roll_back(self) -> None:
        """Let go without storing what is not stored yet."""
        self.session.set_mode(Mode.CLOSED)
        await self.abandon()

    async def abandon(self) -> None:
        """Let the lock go if it is still held, even while the request is being cancelled."""
        if self._checkout is not None and self._checkout.token is not None:
            with anyio.CancelScope(shield=True):
                await self._let_go()

    async def _let_go(self) -> None:
        """Release; where that fails the lock ends with its lease, and the answer need not suffer."""
        taken = self._checkout
        if taken is not None and taken.token is not None:
            try:
                await self.rules.store.release(taken)
            except SessionStoreError as error:
                taken.token = None
                self.rules.events.emit(STORE_ERROR, taken.session_id, level=WARNING, error=str(error))


def _task() -> int:
    return anyio.get_current_task().id
