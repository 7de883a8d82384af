"""What one request holds of the store: a checkout, the handle in front of it, the commit that joins them."""

from __future__ import annotations

import hmac
import math
import time
from dataclasses import dataclass
from logging import INFO, WARNING
from typing import NamedTuple

import anyio

from ..errors import SessionClosedError, SessionConflictError, SessionStoreError
from ..observation.events import (
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
from ..record.codec import Misfit, misfit
from ..record.model import SessionData
from ..record.values import new_session_id
from ..session.changes import Change, Fate, too_late
from ..session.handle import Mode, Session
from ..stores.checkout import Checkout, Lifetime, LockPolicy, Missing, Outcome
from ..stores.contract import SessionStore

_WHY_MISSING = {
    Missing.ABSENT: UNKNOWN_SESSION,
    Missing.RETIRED: RETIRED_SESSION,
    Missing.UNREADABLE: UNREADABLE_RECORD,
}

# bound once: looking up an Enum's member costs ten times a global on Python 3.11, and each request does it
_NOTHING, _WRITE, _DELETE = Change.NOTHING, Change.WRITE, Change.DELETE
_STORED, _GONE = Outcome.STORED, Outcome.GONE
_OPEN, _CLOSED = Mode.OPEN, Mode.CLOSED
_KEEP, _END = Fate.KEEP, Fate.END


class _Sealed(NamedTuple):
    """A record that is being stored, its id and its user: the handle may say something else by then."""

    record: bytes
    session_id: str
    user_id: str | None

    def __repr__(self) -> str:
        return "_Sealed()"


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
    reports_mismatch: bool = False  # another client's session is served and said to be so, not refused


class Holding:
    """Loads a session for one request, stores what the app made of it, and lets go whatever happens.

    `new_cookie` is the id that the client must be told; where it is None, `cookie_gone` says that the cookie
    is to be removed.
    Once the answer's headers are out (`deliverable` False) no session can begin or change its id.
    """

    new_cookie: str | None = None
    cookie_gone = False
    deliverable = True
    passive = False  # this request does not count as activity
    shares_name = False  # a middleware inside has a store of its own and a cookie of the same name
    _checkout: Checkout | None = None
    _began = 0.0  # of the checkout
    _known_user: str | None = None
    _refusal: Outcome | None = None  # of a commit: what this request changes is not stored any more
    _misfit: Misfit | None = None  # why the record that was loaded last could not be read
    _retired = False  # the id was replaced: the client has, or will have, another cookie
    _is_over = False  # the request has ended, or was rolled back
    _wish = _KEEP  # what the commit that is under way has still to do to the id
    _tried: str | None = None  # a new id; whether a record was stored under it is not known
    _began_here = False  # in this request: the client's cookie did not lead to the record
    _storing = False  # a commit is under way
    _stored: anyio.Event | None = None  # set when it is over; made by who waits for that

    def __init__(self, rules: Rules, session: Session, fingerprint: str | None) -> None:
        self.session = session
        self.rules = rules
        self._fingerprint = fingerprint

    # -- opening ------------------------------------------------------------------------------------------

    async def open(self, session_id: str, *, read_only: bool) -> None:
        """Check the session out; what is absent, unreadable or somebody else's leaves a fresh session."""
        lock = None if read_only else self.rules.lock
        store, lifetime = self.rules.store, self.rules.lifetime
        taken = await store.checkout(session_id, lock, lifetime, passive=self.passive)
        if isinstance(taken, Missing):
            self._retired = taken is Missing.RETIRED
            self.rules.events.emit(_WHY_MISSING[taken], session_id)
            return
        refusal = self._show(taken)
        if refusal is not None:
            await self._refuse(refusal, taken)
        elif taken.idle is not None and not self.passive:
            await store.keep_alive(taken)

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
        self._checkout, self._began = taken, time.monotonic()
        self._refusal = self._misfit = None
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
            if not self.rules.reports_mismatch:
                return FINGERPRINT_MISMATCH
            if self.session.note_client_change():
                self.rules.events.emit(FINGERPRINT_MISMATCH, session_id)
        self._known_user = user_id
        return None

    # -- storing ------------------------------------------------------------------------------------------

    async def store_changes(self, *, release: bool) -> Outcome:
        """Bring the store up to date in as few trips as there are; STORED also when there was nothing to do.

        What was refused once stays refused; only an end of the session is tried again. With `release` nobody
        can change the session any more from when the commit begins: it would be lost. Without, what the app
        changes or wants while the commit is under way is left for the next one.
        """
        await self._commit_is_over()
        session = self.session
        change = session.change()
        if change is _NOTHING:
            if release:
                self._close()
                await self._let_go(self._checkout)
            return _STORED
        session.require_open()
        if self._refusal is not None and session.fate is not _END:
            return self._refusal
        closed, stored = release and self._close(), False
        self._wish, session.fate = session.fate, _KEEP
        self._storing = True
        try:
            outcome = await self._carry_out(change, release)
            stored = outcome is _STORED
        finally:
            self._storing = False
            if self._wish is not _KEEP:
                session.want(self._wish)
            if closed and not stored and not self._is_over:
                session.mode = _OPEN
            if self._stored is not None:
                self._stored.set()
                self._stored = None
            if session.mode is _CLOSED:  # where the request ended meanwhile, nobody else lets go
                await self.abandon()
        if not stored:
            outcome = self._refusal = await self._settle() if outcome is _GONE else outcome
        return outcome

    async def _commit_is_over(self) -> None:
        """Wait for the commit of another task of the request."""
        while self._storing:
            self._stored = self._stored or anyio.Event()
            await self._stored.wait()

    def _close(self) -> bool:
        """From now on changes of this request are refused; whether they were not before."""
        if self.session.mode is not _OPEN:
            return False
        self.session.mode = _CLOSED
        return True

    async def _carry_out(self, change: Change, release: bool) -> Outcome:
        taken = self._checkout
        if taken is None:
            return await self._create(release)
        if change is _WRITE:
            return await self._write(taken, release)
        if change is _DELETE:
            return await self._delete(taken)
        return await self._move(taken, release)

    async def _settle(self) -> Outcome:
        """The record is gone: it has ended, or has moved to a new id, whose cookie the client gets."""
        await self._let_go(self._checkout)
        if self._checkout is not None:
            found = await self.rules.store.checkout(self._checkout.session_id, None, None, passive=True)
            self._retired = found is Missing.RETIRED
        return Outcome.CONFLICT if self._retired else _GONE

    async def _create(self, release: bool) -> Outcome:
        if self._retired and self._wish is _KEEP:
            raise SessionConflictError("the session got a new id while this request was under way")
        self._require_deliverable()
        sealed, rules = await self._seal_new(), self.rules
        created = None
        if rules.lifetime.ttl() > 0:  # not with max_age=-1: a session that has expired when it begins
            lock = None if release else rules.lock
            created = await rules.store.create(
                sealed.session_id, sealed.record, rules.lifetime, lock, sealed.user_id
            )
            if created is None:
                self._tried = None
                raise SessionConflictError("the new session id is taken")
        self._began_here = True
        self._adopt(created, sealed)
        rules.events.emit(SESSION_CREATED, self.new_cookie)
        return _STORED

    def _seal(self) -> _Sealed:
        record, identity = self.session.seal(), self.session.identity()
        return _Sealed(record, identity.session_id, identity.user_id)

    async def _seal_new(self, *, renamed: bool = False) -> _Sealed:
        """Seal what is to be stored under an id that is new, where `renamed` under one made now.

        What an earlier try may have stored is deleted first: it would be a session that nobody can end.
        """
        if self._tried is not None:
            await self.rules.store.delete(self._tried)
            self._tried, renamed = None, True
        if renamed:
            self.session.rename(new_session_id())
        sealed = self._seal()
        self._tried = sealed.session_id
        return sealed

    def _require_deliverable(self) -> None:
        if not self.deliverable:
            raise SessionClosedError(too_late(self._wish))

    def _adopt(self, created: Checkout | None, sealed: _Sealed) -> None:
        """From now on this request's session is the new record, and the client is to be told its id."""
        self._checkout, self._began = created, time.monotonic()
        self._committed(sealed)
        self.new_cookie, self._retired, self._tried = sealed.session_id, False, None

    def _committed(self, sealed: _Sealed) -> None:
        self._known_user, self._wish = sealed.user_id, _KEEP
        self.session.committed(sealed.record, sealed.user_id)

    async def _write(self, taken: Checkout, release: bool) -> Outcome:
        sealed = self._seal()
        user_id = sealed.user_id
        if user_id is not None and user_id != self._known_user:
            await self.rules.store.link_user(user_id, taken.session_id, self._remaining(taken))
        outcome = await self.rules.store.commit(taken, sealed.record, release=release)
        if outcome is _STORED:
            self._committed(sealed)
        return outcome

    async def _move(self, taken: Checkout, release: bool) -> Outcome:
        """Give the session a new id, or end it and begin another under one.

        On a fault the client is to learn the new id if the old record may be gone.
        """
        self._require_deliverable()
        session, rules, begins_anew = self.session, self.rules, self._wish is _END
        lifetime = None if self._wish is Fate.MOVE else rules.lifetime
        if lifetime is not None and not lifetime.ttl() > 0:  # max_age=-1: it ends as it begins
            sealed = self._seal()
            await self._end(taken)
            self._adopt(None, sealed)
            return _STORED
        sealed = await self._seal_new(renamed=not begins_anew)
        lock = None if release else rules.lock
        try:
            outcome = await rules.store.move(
                taken, sealed.session_id, sealed.record,
                lifetime=lifetime, lock=lock, was=self._known_user, user=sealed.user_id,
            )  # fmt: skip
        finally:
            if taken.successor is not None:
                self._adopt(taken.successor, sealed)
                with anyio.CancelScope(shield=True):
                    await self._let_go(taken)
            elif not begins_anew and session.identity().session_id == sealed.session_id:
                session.rename(taken.session_id)
        self._tried = None
        if outcome is _STORED and begins_anew:
            self._note_end(taken)
        elif outcome is _STORED:
            rules.events.emit(SESSION_REGENERATED, taken.session_id)
        elif begins_anew:  # an end wins over every other writer, and what begins has nothing to do with it
            await self._end(taken)
            return await self._create(release)
        return outcome

    async def _delete(self, taken: Checkout) -> Outcome:
        """The app ended the session, or emptied it: an end wins over every other writer."""
        outcome = await self._end(taken) if self._wish is _END else await self._discard(taken)
        if outcome in (_STORED, _GONE):
            self._wish = _KEEP
            self.session.ended()
            self._checkout = self.new_cookie = self._known_user = None
            return _STORED
        return outcome

    async def _end(self, taken: Checkout) -> Outcome:
        """Delete the record whoever holds it; GONE where it was gone before: not by this request."""
        outcome = await self._discard(taken)
        if outcome in (_STORED, _GONE):
            return outcome
        if not await self.rules.store.delete(taken.session_id):
            return _GONE
        self._note_end(taken)
        return _STORED

    async def _discard(self, taken: Checkout) -> Outcome:
        outcome = await self.rules.store.discard(taken)
        if outcome is _STORED:
            self._note_end(taken)
        return outcome

    def _note_end(self, taken: Checkout) -> None:
        """This request ended the session; the client's cookie goes with it if it led there."""
        self.rules.events.emit(SESSION_ENDED, taken.session_id)
        if not self._began_here and not self._retired:
            self.cookie_gone = True

    def _forget_record(self) -> None:
        self.session.forget()
        self._checkout = self.new_cookie = self._known_user = None

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

    async def prolong(self) -> bool:
        """Whether the store still has the record under its id, so that its cookie may be sent again.

        False too where it cannot tell. The link to its user is renewed with the cookie.
        """
        assert self._checkout is not None  # noqa: S101  # asked of what is loaded
        store, session_id = self.rules.store, self._checkout.session_id
        try:
            found = await store.checkout(session_id, None, None, passive=True)
            if isinstance(found, Checkout) and self._known_user is not None:
                await store.link_user(self._known_user, session_id, self._remaining(self._checkout))
        except SessionStoreError:
            return False
        return isinstance(found, Checkout)

    async def roll_back(self) -> None:
        """Let go without storing what is not stored yet."""
        self._is_over = True
        self.session.mode = _CLOSED
        await self.abandon()

    async def abandon(self) -> None:
        """Let the lock go if it is still held, even while the request is being cancelled."""
        if self._checkout is not None and self._checkout.token is not None:
            with anyio.CancelScope(shield=True):
                await self._let_go(self._checkout)

    async def _let_go(self, taken: Checkout | None) -> None:
        """Release; where that fails the lock ends with its lease, and the answer need not suffer."""
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
