"""One commit: it creates a record, writes it, moves it to a new id, or ends it."""

from __future__ import annotations

import time
from collections.abc import Awaitable
from logging import WARNING

import anyio

from ..errors import SessionClosedError, SessionConflictError, SessionStoreError
from ..observation.events import SESSION_CREATED, SESSION_ENDED, SESSION_REGENERATED, STORE_ERROR
from ..record.values import new_session_id
from ..session.changes import KEEP_ID, Change, Fate, too_late
from ..session.expiry import Expiry
from ..session.handle import Session
from ..stores.checkout import Checkout, Lifetime, Missing, Outcome
from .lifetimes import of_new, of_stored
from .settings import Settings

# bound once: looking up an Enum's member costs ten times a global on Python 3.11, and each request does it
_NOTHING, _WRITE, _DELETE = Change.NOTHING, Change.WRITE, Change.DELETE
_STORED, _GONE = Outcome.STORED, Outcome.GONE
_KEEP, _ROTATE, _END = Fate.KEEP, Fate.ROTATE, Fate.END


class Commit:
    """A commit that is under way, and what has come of it, whether it succeeds or raises."""

    encoded: bytes
    sealed: bytes  # the same as it is stored
    user_id: str | None
    user: str | None  # as the store knows them
    record: Checkout | Missing | None = None  # what the request holds from now on; None: what it held
    new_id: str | None = None  # of that record
    has_ended = False  # the record that the request held
    has_begun = False  # a session that has nothing to do with that one
    locked: Checkout | None = None  # the record that the request held without the lock, now with it
    is_linked = False  # the session, to a user who signs in without a new id
    is_bound = False  # the record has another end, from now on
    is_over: anyio.Event | None = None  # made by a task that waits for it

    def __init__(
        self,
        settings: Settings,
        session: Session,
        releases: bool,
        is_late: bool,
        tried: str | None,
        optimistic: bool,
        may_run_again: bool,
        is_last: bool,
    ) -> None:
        self.settings = settings
        self.session = session
        self.intent, session.fate = session.fate, _KEEP  # what is still to be done to the id
        self.releases = releases  # the lock goes with the commit
        self.is_late = is_late  # no cookie can be sent any more
        self.tried = tried  # a new id; whether a record was stored under it is not known
        self.optimistic = optimistic  # the record was loaded without the lock
        self.may_run_again = may_run_again  # the app, where this commit is refused
        self.is_last = is_last  # the request is answered then, and has nothing more to do with the session

    def carry_out(self, change: Change, taken: Checkout | Missing, since: float) -> Awaitable[Outcome]:
        """Do to the store what the handle asks for, in as few trips as there are.

        `taken` was checked out at `since`, by `time.monotonic()`.
        """
        if not isinstance(taken, Checkout):
            return self._create(taken)
        if self.optimistic:
            return self._carry_out_unlocked(change, taken, since)
        return self._carry_out_locked(change, taken, since)

    async def _carry_out_unlocked(self, change: Change, taken: Checkout, since: float) -> Outcome:
        """Write in one step if nobody holds the lock. For anything else take it, if nothing has changed.

        Where the app cannot run again, an end wins over what has changed, as it does with the lock.
        """
        if change is _WRITE:
            outcome = await self._write(taken, since, unlocked=True)
            if outcome is not Outcome.BUSY or self.may_run_again:
                return outcome
        if change is Change.MOVE:
            self._require_cookie()  # before anybody has to wait for the lock
        locked = self.locked = await lock_as_loaded(self.settings, taken)
        if locked is None:
            if self.may_run_again or self.intent is not _END:
                return Outcome.CONFLICT
            locked = taken
        again = self._decide_again()
        if again is not _NOTHING:
            return await self._carry_out_locked(again, locked, time.monotonic())
        if self.releases:
            await let_go(self.settings, locked)
        return _STORED

    def _decide_again(self) -> Change:
        """What the handle asks for now: the app's tasks may have changed it while this one waited."""
        session = self.session
        session.want(self.intent)
        change = session.change()
        self.intent, session.fate = session.fate, _KEEP
        return change

    def _carry_out_locked(self, change: Change, taken: Checkout, since: float) -> Awaitable[Outcome]:
        if change is _WRITE:
            return self._write(taken, since)
        if change is _DELETE:
            return self._delete(taken)
        if change is Change.BOUND:
            return self._bound(taken, since)
        if change is Change.ROTATE:
            return self._rotate(taken, since)
        if self.intent is _ROTATE and self.is_late:
            self.intent = _KEEP
            return self._write(taken, since)
        return self._move(taken, since)

    async def _create(self, why: Missing = Missing.ABSENT) -> Outcome:
        if why is Missing.RETIRED and self.intent in KEEP_ID:
            raise SessionConflictError("the session got a new id while this request was under way")
        self._require_cookie()
        session_id, settings, expiry = await self._encode_new(), self.settings, self.session.expiry
        created = None
        if settings.lifetime.ttl() > 0:  # not with max_age=-1: such a session has expired when it begins
            lock = None if self.releases else settings.lock
            life = of_new(settings.lifetime, expiry, self._first_ttl())
            created = await settings.store.create(session_id, self.sealed, life, lock, self.user)
            if created is None:
                self.tried = None
                raise SessionConflictError("the new session id is taken")
        self.has_begun = True
        self._adopt(created, session_id)
        self.session.expiry_stored(expiry)
        settings.events.emit(SESSION_CREATED, session_id)
        await self._end_surplus(session_id)
        return _STORED

    def _first_ttl(self) -> float | None:
        """How long a new record lives if its client does not come back; None for its full life at once.

        That is for whoever signs in as the session begins, and where the request goes on with it: a stream,
        a WebSocket, after `save()`.
        """
        arrivals, signs_in = self.settings.arrivals, self.intent is Fate.SIGN_IN or self.user_id is not None
        return None if arrivals is None or signs_in or not self.is_last else arrivals.first_ttl

    async def _bound(self, taken: Checkout, since: float) -> Outcome:
        """Give the record another end, then write it.

        A process that dies in between leaves the new end, of which no client was told.
        """
        store, expiry = self.settings.store, self.session.expiry
        was = store.user_in(taken, self.session.stored_user)
        self._encode()
        outcome = await self._set_end(taken, expiry, since)
        if outcome is _STORED:
            outcome = await store.commit(taken, self.sealed, release=self.releases)
        if outcome is _STORED:
            self._is_stored()
            self.session.expiry_stored(expiry)
            if self.user != was:
                await self._end_surplus(taken.session_id)
        return outcome

    async def _set_end(self, taken: Checkout, expiry: Expiry | None, since: float) -> Outcome:
        store = self.settings.store
        life = of_stored(self.settings.lifetime, expiry, taken, since)
        for user in dict.fromkeys((store.user_in(taken, self.session.stored_user), self.user)):
            if user is not None:
                await store.link_user(user, taken.session_id, life)  # a link has to outlive its record
        outcome = await store.bound(taken, life)
        if outcome is _STORED:
            self.record, self.is_bound = taken, True
        return outcome

    async def _write(self, taken: Checkout, since: float, *, unlocked: bool = False) -> Outcome:
        self._encode(as_decided=True)
        store, user = self.settings.store, self.user
        if user is not None and user != store.user_in(taken, self.session.stored_user) and not self.is_linked:
            await store.link_user(user, taken.session_id, remaining(self.settings, taken, since))
            self.is_linked = True
            outcome = await self._write(taken, since, unlocked=unlocked)
            if outcome is _STORED:
                await self._end_surplus(taken.session_id)
            return outcome
        if unlocked:
            outcome = await store.commit_unlocked(taken, self.sealed)
        else:
            outcome = await store.commit(taken, self.sealed, release=self.releases)
        if outcome is _STORED:
            self._is_stored()
        return outcome

    async def _rotate(self, taken: Checkout, since: float) -> Outcome:
        """Give the session a new id because its own is old; a later request does it where this one cannot."""
        outcome = Outcome.CONFLICT if self.is_late else await self._move(taken, since)
        if outcome is not _STORED:
            self.intent = _KEEP
            if self.releases:
                await let_go(self.settings, taken)
        return _STORED

    async def _move(self, taken: Checkout, since: float) -> Outcome:
        """Give the session a new id, or end it and begin another under one.

        On a fault the client is to learn the new id if the old record may be gone.
        """
        self._require_cookie()
        session, settings, begins_anew = self.session, self.settings, self.intent is _END
        expiry = session.expiry
        lifetime = None if self.intent in (Fate.MOVE, _ROTATE) else of_new(settings.lifetime, expiry)
        if lifetime is not None and not lifetime.ttl() > 0:  # max_age=-1
            return await self._end_as_it_begins(taken)
        session_id = await self._encode_new(renamed=not begins_anew)
        lock, was = (
            None if self.releases else settings.lock,
            settings.store.user_in(taken, session.stored_user),
        )
        try:
            outcome = _STORED
            if lifetime is None and expiry is not None:
                outcome = await self._set_end(taken, expiry, since)
            if outcome is _STORED:
                outcome = await settings.store.move(
                    taken, session_id, self.sealed,
                    lifetime=lifetime, lock=lock, was=was, user=self.user,
                    leads=self.intent is _ROTATE and session.stored_user == self.user_id,
                )  # fmt: skip
        finally:
            if taken.successor is not None:
                self._adopt(taken.successor, session_id)
                session.expiry_stored(expiry)
                with anyio.CancelScope(shield=True):
                    await let_go(settings, taken)
            elif not begins_anew and session.identity().session_id == session_id:
                session.rename(taken.session_id)
        if outcome is _STORED and lifetime is not None:
            await self._end_surplus(session_id)
        return await self._is_moved(taken, outcome, begins_anew)

    async def _end_surplus(self, session_id: str) -> None:
        """Somebody has signed in: end the sessions that are too many for one user.

        The sign-in is stored. A fault of the store is told, and the next sign-in ends them.
        """
        settings, most = self.settings, self.settings.max_sessions_per_user
        if most is None or self.user is None or settings.lifetime.ttl() <= 0:
            return
        try:
            ended = await settings.store.end_surplus(self.user, most, session_id)
        except SessionStoreError as error:
            settings.events.emit(STORE_ERROR, session_id, level=WARNING, error=str(error))
            return
        for each in ended:
            settings.events.emit(SESSION_ENDED, each, reason="max_sessions_per_user")

    async def _end_as_it_begins(self, taken: Checkout) -> Outcome:
        session_id = self._encode()
        await self._end(taken)
        self._adopt(None, session_id)
        return _STORED

    async def _is_moved(self, taken: Checkout, outcome: Outcome, begins_anew: bool) -> Outcome:
        self.tried = None
        if outcome is _STORED and begins_anew:
            self._note_end(taken)
        elif outcome is _STORED:
            self.settings.events.emit(SESSION_REGENERATED, taken.session_id)
        elif begins_anew:  # an end wins over every other writer, and what begins has nothing to do with it
            if await self._end(taken) is _GONE and await was_replaced(self.settings, taken):
                return Outcome.CONFLICT
            return await self._create()
        return outcome

    async def _delete(self, taken: Checkout) -> Outcome:
        """The app ended the session, or emptied it."""
        outcome = await (self._end if self.intent is _END else self._discard)(taken)
        if outcome is _GONE and await was_replaced(self.settings, taken):
            return Outcome.CONFLICT
        if outcome not in (_STORED, _GONE):
            return outcome
        self.intent = _KEEP
        self.session.note_end()
        self.record = Missing.ABSENT
        return _STORED

    async def _end(self, taken: Checkout) -> Outcome:
        """Delete the record whoever holds it; GONE where it was gone before."""
        outcome = await self._discard(taken)
        if outcome in (_STORED, _GONE):
            return outcome
        if not (await self.settings.store.delete(taken.session_id) or await self._end_following(taken)):
            return _GONE
        self._note_end(taken)
        return _STORED

    async def _discard(self, taken: Checkout) -> Outcome:
        outcome = await self.settings.store.discard(taken)
        if outcome is _GONE and await self._end_following(taken):
            outcome = _STORED
        if outcome is _STORED:
            self._note_end(taken)
        return outcome

    async def _end_following(self, taken: Checkout) -> bool:
        """Delete the record that got a new id meanwhile only because the old one was old."""
        store, following = self.settings.store, taken.session_id
        while self.settings.rotate_every is not None:
            successor = await store.successor_of(following)
            if successor is None:
                break
            if await store.delete(successor):
                return True
            following = successor
        return False

    def _note_end(self, taken: Checkout) -> None:
        self.settings.events.emit(SESSION_ENDED, taken.session_id)
        self.has_ended = True

    def _require_cookie(self) -> None:
        if self.is_late:
            raise SessionClosedError(too_late(self.intent))

    async def _encode_new(self, *, renamed: bool = False) -> str:
        """Encode what is to be stored under a new id, made now if `renamed`.

        What an earlier try may have stored is deleted first: it would be a session that nobody can end.
        """
        if self.tried is not None:
            await self.settings.store.delete(self.tried)
            self.tried, renamed = None, True
        if renamed:
            self.session.rename(new_session_id())
        self.tried = self._encode()
        return self.tried

    def _encode(self, *, as_decided: bool = False) -> str:
        """Encode the record as it is now, which the handle may change while it is stored; returns its id."""
        self.encoded, identity = self.session.seal(as_decided=as_decided), self.session.identity()
        user_id, session_id, store = identity.user_id, identity.session_id, self.settings.store
        self.user_id, self.user = user_id, None if user_id is None else store.name_of(user_id)
        self.sealed = store.sealed(session_id, self.encoded)
        return session_id

    def _adopt(self, created: Checkout | None, session_id: str) -> None:
        """The session has another record now."""
        self._is_stored()
        self.record, self.new_id, self.tried = created or Missing.ABSENT, session_id, None

    def _is_stored(self) -> None:
        self.intent = _KEEP
        self.session.committed(self.encoded, self.user_id)


def remaining(settings: Settings, taken: Checkout, since: float) -> Lifetime:
    """What is left of the life of a record that was taken `since` then: a write never prolongs it."""
    if taken.expires_in is None:
        return settings.lifetime
    left = taken.expires_in - (time.monotonic() - since)
    return Lifetime(absolute=max(left, 0.001), idle=settings.lifetime.idle)


async def lock_as_loaded(settings: Settings, loaded: Checkout) -> Checkout | None:
    """Take the lock of a record that was loaded without it; None where the record is not what was loaded."""
    policy = settings.lock_to_transact
    taken = await settings.store.checkout(loaded.session_id, policy, None, passive=True)
    if not isinstance(taken, Checkout):
        return None
    if taken.version == loaded.version or taken.version in (loaded.unsure or "").split():
        return taken
    with anyio.CancelScope(shield=True):
        await let_go(settings, taken)
    return None


async def was_replaced(settings: Settings, taken: Checkout) -> bool:
    """Whether a record that is gone got a new id: it was not ended."""
    return await settings.store.checkout(taken.session_id, None, None, passive=True) is Missing.RETIRED


async def let_go(settings: Settings, taken: Checkout) -> None:
    """Release the lock; where that fails it ends with its lease, and the answer need not suffer."""
    if taken.token is not None:
        try:
            await settings.store.release(taken)
        except SessionStoreError as error:
            taken.token = None
            settings.events.emit(STORE_ERROR, taken.session_id, level=WARNING, error=str(error))
