"""What one request holds of the store: a checkout, the handle in front of it, the commit that joins them."""

from __future__ import annotations

import hmac
import math
import time
from dataclasses import dataclass
from logging import INFO, WARNING

import anyio

from .changes import Change, Fate, too_late
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
from .record import Misfit, misfit
from .session import Mode, Session
from .stores.base import SessionStore
from .stores.checkout import Checkout, Lifetime, Missing, Outcome
from .stores.local import LockPolicy

_WHY_MISSING = {
    Missing.ABSENT: UNKNOWN_SESSION,
    Missing.RETIRED: RETIRED_SESSION,
    Missing.UNREADABLE: UNREADABLE_RECORD,
}

# bound once: looking up an Enum's member costs ten times a global on Python 3.11, and each request does it
_NOTHING, _WRITE = Change.NOTHING, Change.WRITE
_STORED, _GONE, _LOST = Outcome.STORED, Outcome.GONE, Outcome.LOST
_CLOSED = Mode.CLOSED


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


class Holding:
    """Loads a session for one request, stores what the app made of it, and lets go whatever happens.

    `new_cookie` is the id that the client must be told, `cookie_gone` says that its cookie is to be removed.
    Once the answer's headers are out (`deliverable` False) no session can begin or change its id.
    """

    new_cookie: str | None = None
    cookie_gone = False
    deliverable = True
    _checkout: Checkout | None = None
    _began = 0.0  # of the checkout
    _known_user: str | None = None
    _lost = False  # the lease ended under us
    _misfit: Misfit | None = None  # why the record that was loaded last could not be read
    _retired = False  # the id was replaced: the client has, or will have, another cookie

    def __init__(self, rules: Rules, session: Session, fingerprint: str | None) -> None:
        self.session = session
        self.rules = rules
        self._fingerprint = fingerprint

    # -- opening ------------------------------------------------------------------------------------------

    async def open(self, session_id: str, *, read_only: bool) -> None:
        """Check the session out; what is absent, unreadable or somebody else's leaves a fresh session."""
        lock = None if read_only else self.rules.lock
        taken = await self.rules.store.checkout(session_id, lock, self.rules.lifetime)
        if isinstance(taken, Missing):
            self._retired = taken is Missing.RETIRED
            self.rules.events.emit(_WHY_MISSING[taken], session_id)
            return
        refusal = self._show(taken)
        if refusal is not None:
            await self._refuse(refusal, taken)

    async def _refuse(self, refusal: str, taken: Checkout) -> None:
        """Hold nothing: this client must not see the record."""
        self.session.forget()
        if self._misfit is None:
            self.rules.events.emit(refusal, taken.session_id)
        else:
            tell_misfit(self.rules.events, taken.session_id, self._misfit)
        await self.abandon()
        self._checkout = None

    def _show(self, taken: Checkout) -> str | None:
        """Load the handle; the name of an event where the record must not be shown to this client."""
        self._checkout, self._began, self._lost, self._misfit = taken, time.monotonic(), False, None
        try:
            self.session.load(taken.record)
            identity = self.session.identity()
            session_id, bound_to, user_id = identity.session_id, identity.fingerprint, identity.user_id
        except ValueError as error:
            self._misfit = misfit(self.rules.model, error)
            return UNREADABLE_RECORD
        if session_id != taken.session_id:
            return UNREADABLE_RECORD
        if self._fingerprint is not None and bound_to is not None and not _same(bound_to, self._fingerprint):
            return FINGERPRINT_MISMATCH
        self._known_user = user_id
        return None

    # -- storing ------------------------------------------------------------------------------------------

    async def store_changes(self, *, release: bool) -> Outcome:
        """Bring the store up to date in as few trips as there are; STORED also when there was nothing to do.

        GONE: the record was deleted meanwhile; the handle is a fresh session then and the cookie is to go.
        Once LOST, only an end of the session is tried again.
        """
        if self._is_busy_elsewhere():
            return _STORED  # what is in the handle now is that transaction's to store
        change = self.session.change()
        if change is _NOTHING:
            if release:
                await self._let_go()
            return _STORED
        self.session.require_open()
        if self._lost and self.session.fate is not Fate.END:
            return Outcome.LOST
        taken = self._checkout
        if taken is None:
            outcome = await self._create(release)
        elif change is _WRITE:
            outcome = await self._write(taken, release)
        elif change is Change.MOVE:
            outcome = await self._move(taken, release)
        else:
            outcome = await self._delete(taken)
        self._lost = outcome is _LOST
        if outcome is _GONE:
            outcome = await self._settle()
        return outcome

    async def _settle(self) -> Outcome:
        """The record is gone: deleted, or moved to a new id, whose cookie is then not ours to remove."""
        await self._let_go()
        if self._checkout is not None:
            found = await self.rules.store.checkout(self._checkout.session_id, None, None)
            self._retired = found is Missing.RETIRED
        if self._retired:
            return Outcome.CONFLICT
        self._forget_record()
        return Outcome.GONE

    async def _create(self, release: bool) -> Outcome:
        if self._retired and self.session.fate is Fate.KEEP:
            raise SessionConflictError("the session got a new id while this request was under way")
        self._adopt(*await self._store_new(self.rules.lifetime, release))
        self.rules.events.emit(SESSION_CREATED, self.new_cookie)
        return _STORED

    async def _store_new(self, lifetime: Lifetime, release: bool) -> tuple[Checkout | None, bytes]:
        """Store the handle's record under its id, which nobody has yet."""
        if not self.deliverable:
            raise SessionClosedError(too_late(self.session.fate))
        record = self.session.seal()
        if not lifetime.ttl() > 0:  # max_age=-1: a session that has expired when it begins
            return None, record
        data = self.session.data
        lock = None if release else self.rules.lock
        created = await self.rules.store.create(data.session_id, record, lifetime, lock)
        if created is None:
            raise SessionConflictError("the new session id is taken")
        try:
            if data.user_id is not None:
                await self.rules.store.link_user(data.user_id, data.session_id, lifetime)
        except BaseException:
            await self._take_back(created)
            raise
        return created, record

    async def _take_back(self, created: Checkout) -> None:
        """Delete a record that was created for a change which then was not to be."""
        with anyio.CancelScope(shield=True):
            try:
                await self.rules.store.discard(created, retire=False)
            finally:
                await self.rules.store.release(created)

    def _adopt(self, created: Checkout | None, record: bytes) -> None:
        """From now on this request's session is the new record, and the client is to be told its id."""
        data = self.session.data
        self._checkout, self._began, self._known_user = created, time.monotonic(), data.user_id
        self.session.committed(record)
        self.new_cookie, self.cookie_gone, self._retired = data.session_id, False, False

    async def _write(self, taken: Checkout, release: bool) -> Outcome:
        session = self.session
        record = session.seal()
        user_id = session.identity().user_id
        if user_id is not None and user_id != self._known_user:
            await self.rules.store.link_user(user_id, taken.session_id, self._remaining(taken))
        outcome = await self.rules.store.commit(taken, record, release=release)
        if outcome is _STORED:
            self._known_user = user_id
            session.committed(record)
        return outcome

    async def _move(self, taken: Checkout, release: bool) -> Outcome:
        """Create under the new id first: if we die in between, the old session is still whole."""
        kept = self.session.fate is not Fate.END
        if kept:
            self.session.rename(new_session_id())
        created, record = await self._store_new(
            self._remaining(taken) if kept else self.rules.lifetime, release
        )
        outcome = await self._retire(taken, created)
        if outcome is not Outcome.STORED and kept:
            if created is not None:
                await self._take_back(created)
            return outcome
        if outcome in (Outcome.LOST, Outcome.CONFLICT):
            await self.rules.store.delete(taken.session_id)  # an end wins over every other writer
        self._adopt(created, record)
        self.rules.events.emit(SESSION_REGENERATED if kept else SESSION_ENDED, taken.session_id)
        return _STORED

    async def _retire(self, taken: Checkout, created: Checkout | None) -> Outcome:
        """Delete the old record. A failure leaves the new one: the old may be there still, or not."""
        try:
            return await self.rules.store.discard(taken, retire=True)
        except BaseException:
            if created is not None:
                with anyio.CancelScope(shield=True):
                    await self.rules.store.release(created)
            raise

    async def _delete(self, taken: Checkout) -> Outcome:
        outcome = await self.rules.store.discard(taken, retire=False)
        if outcome in (Outcome.LOST, Outcome.CONFLICT):
            if self.session.fate is not Fate.END:
                return outcome
            await self.rules.store.delete(taken.session_id)  # an end wins over every other writer
        self.rules.events.emit(SESSION_ENDED, taken.session_id)
        self._forget_record()
        return _STORED

    def _forget_record(self) -> None:
        self.session.forget()
        self._checkout = self.new_cookie = self._known_user = None
        self.cookie_gone = not self._retired

    def _remaining(self, taken: Checkout) -> Lifetime:
        """What is left of a checked-out record's life: a new id or a write never prolongs it."""
        left = self._seconds_left(taken)
        if left is None:
            return self.rules.lifetime
        return Lifetime(absolute=max(left, 0.001), idle=self.rules.lifetime.idle)

    def _seconds_left(self, taken: Checkout) -> float | None:
        """Until the absolute bound; None where there is none."""
        return None if taken.expires_in is None else taken.expires_in - (time.monotonic() - self._began)

    # -- letting go -----------------------------------------------------------------------------------------

    def max_age(self) -> int | None:
        """Whole seconds that the client may keep the cookie; None where there is no absolute bound."""
        left = None if self._checkout is None else self._seconds_left(self._checkout)
        return None if left is None else math.ceil(left)

    @property
    def is_loaded(self) -> bool:
        """Whether there is a record behind the handle, under the client's id."""
        return self._checkout is not None and not self._retired

    @property
    def keeps_record(self) -> bool:
        """Whether later changes of this request can still be stored: there is a record to commit to."""
        return self._checkout is not None and (self._checkout.token is not None or self.rules.lock is None)

    async def is_current(self) -> bool:
        """Whether the store still has the record under its id; False too where it cannot tell."""
        assert self._checkout is not None  # noqa: S101  # asked of what is loaded
        try:
            found = await self.rules.store.checkout(self._checkout.session_id, None, None)
        except SessionStoreError:
            return False
        return isinstance(found, Checkout)

    async def roll_back(self) -> None:
        """Let go without storing what is not stored yet. A transaction of another task goes on."""
        if self._is_busy_elsewhere():
            return
        self.session.mode = _CLOSED
        await self.abandon()

    def _is_busy_elsewhere(self) -> bool:
        """Whether the handle belongs to a task that is not this one just now."""
        return False

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


def tell_misfit(events: EventSink, session_id: str, why: Misfit) -> None:
    """Raise the event: a warning once for each model and field, for every such user is signed out."""
    level = WARNING if events.is_first(UNREADABLE_RECORD, why.model, why.field) else INFO
    events.emit(UNREADABLE_RECORD, session_id, level=level, **why._asdict(), remedy=_OLD_RECORDS)


_OLD_RECORDS = "let the model read old records: a validator (mode='before') or another name for what changed"


def _same(bound_to: str, client: str) -> bool:
    """Compare in constant time: a fingerprint is a hash of what another client sends."""
    try:
        return hmac.compare_digest(bound_to, client)
    except TypeError:  # not ASCII, so not one of ours
        return False
