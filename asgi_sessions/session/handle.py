"""The handle that an app sees as `request.session`: a dict, and behind it the typed record."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Generator, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager
from typing import Any, Generic, Protocol
from uuid import UUID

from ..errors import SessionClosedError
from ..record.codec import Who
from ..record.model import M, SessionData
from ..record.values import new_session_id, user_text
from .changes import Change, Fate, fate_of
from .device import Device
from .draft import Draft
from .expiry import Expiry
from .tracking import TrackedDict

# bound once: looking up an Enum's member costs ten times a global on Python 3.11, and each request does it
_KEEP, _BOUND, _SIGN_IN, _END = Fate.KEEP, Fate.BOUND, Fate.SIGN_IN, Fate.END
_NOTHING, _WRITE = Change.NOTHING, Change.WRITE
_BY_STRENGTH = tuple(Fate).index


class UnitOfWork(Protocol):
    """What carries the handle's wishes out: the middleware's side of one request."""

    session: Session

    @property
    def max_age(self) -> float | None: ...

    def expires_in(self) -> float | None: ...

    def require_writable(self) -> None: ...

    async def commit(self, *, release: bool) -> None: ...

    def transaction(self, session: Session) -> AbstractAsyncContextManager[SessionData]: ...

    async def until_ended(self) -> None: ...

    async def devices(self) -> list[Device]: ...

    async def end_device(self, handle: object) -> bool: ...


class _Done:
    """May be awaited, and costs nothing where it is not."""

    __slots__ = ()

    def __await__(self) -> Generator[None, None, None]:
        yield from ()


_DONE = _Done()


class Session(TrackedDict, Generic[M]):
    """One session as a dict of free-form values; `data` is its typed record, whose metadata is this dict.

    Nested changes count: the encoded record is compared, no flag is needed. `accessed` and `modified` are
    Starlette's. A change after the last chance to store it raises `SessionClosedError`, one without a lock
    `ReadOnlySessionError`.

    For type checkers it is generic in the model: `Session` alone is `Session[SessionData]`.
    """

    __slots__ = ("_client_changed", "_draft", "_is_new", "fate", "rotate_on", "unit")

    def __init__(
        self,
        values: Any = (),
        /,
        model: type[SessionData] = SessionData,
        client: str | None = None,
        rotate_on: frozenset[str] = frozenset(),
    ) -> None:
        if values:
            dict.update(self, values)
        self._draft = Draft(model, client)
        self.accessed = self.modified = False
        self._is_new = True
        self._client_changed = False
        self.unit: UnitOfWork | None = None  # what stores it; None for a handle that belongs to no request
        self.fate = _KEEP  # what the app wants to become of the id
        self.rotate_on = rotate_on  # the values that say who is signed in

    # -- the typed record -------------------------------------------------------------------------------

    @property
    def data(self) -> M:
        """The typed record (the middleware's `model`). `data.metadata` and this dict are one thing."""
        self.accessed = True
        return self._draft.typed(self)  # type: ignore[return-value]  # the draft has M's class

    @property
    def session_id(self) -> str:
        """The id under which the record is stored, or will be; changes when a new id is committed."""
        self.accessed = True
        return self.identity().session_id

    @property
    def is_new(self) -> bool:
        """Whether no record was there when the request began."""
        self.accessed = True
        return self._is_new

    @property
    def client_changed(self) -> bool:
        """Whether the fingerprint differs from the record's and `on_mismatch="report"` serves it anyway."""
        self.accessed = True
        return self._client_changed

    @property
    def expires_in(self) -> float | None:
        """Seconds until the session ends, however active it is; None where there is no such bound.

        That is what `set_expiry` set, else what is left of the middleware's `max_age`. There is none with
        `rolling` or `max_age=None`. An idle timeout may end the session earlier.
        """
        self.accessed = True
        return self._work().expires_in()

    def clear(self) -> None:
        """Empty the session: the values, and the record's fields go back to their defaults.

        A session that is left empty ends, as in Starlette: record deleted, cookie removed.
        """
        self.mark_modified()
        self._draft.empty(self, None)

    def mark_modified(self) -> None:
        """Note a change. Not needed for one to be stored; raises where it could not be."""
        if self.unit is not None:
            self.unit.require_writable()
        self.accessed = True
        self.modified = True

    def before_change(self) -> None:
        """Called by the record when one of its fields is assigned; raises where it could not be stored."""
        self.mark_modified()
        self._draft.is_assigned = True

    # -- identity -----------------------------------------------------------------------------------------

    def regenerate_id(self) -> Awaitable[None]:
        """Give the session a new id when it is committed, data kept; the old id is dead from then on.

        May be awaited, as some libraries do. To be called whenever privileges change (OWASP Session
        Management: Renew the Session ID After Any Privilege Level Change). A new session has a fresh id.
        """
        self.mark_modified()
        self.want(Fate.MOVE)  # a sign-in or an end gives a new id anyway
        return _DONE

    def login(self, user_id: str | int | UUID) -> None:
        """Sign `user_id` in: sets `data.user_id`, and the session gets a new id and a full life (fixation).

        A number or a UUID counts as its text. `ValueError` for "" and for what is no id of a user.
        """
        text = user_text(user_id)
        if not text:
            raise ValueError("login() needs the id of a user; logout() signs out")
        self.mark_modified()
        self._draft.typed(self).user_id = text
        self._sign_in()

    def logout(self) -> None:
        """Sign out: the same as `invalidate()`."""
        self.invalidate()

    def invalidate(self) -> None:
        """End the session: the record is deleted, the cookie removed, the dict emptied.

        What is put in afterwards starts a new session under a new id.
        """
        self.mark_modified()
        self._draft.empty(self, new_session_id())
        self._draft.expiry = None
        self.fate = Fate.END

    def set_expiry(self, seconds: float | None) -> None:
        """Give this session a life of its own, in seconds from now; None goes back to the middleware's.

        For "remember me" and "this device only". It is an absolute bound: no write and no request prolongs
        it, `rolling` and a new id keep it, and it never reaches beyond `max_age` from creation or sign-in.
        Idle timeouts go on. The cookie's `Max-Age` follows, where its headers have not left. A `login()`
        begins a full life; this call counts before it and after it, in the same request. It is stored with
        the session: one that stays empty has no life. `ValueError` for 0, for less, for what is no number and
        for more than `max_age`.
        """
        expiry = Expiry.after(seconds, None if self.unit is None else self.unit.max_age)
        self.mark_modified()
        self._draft.expiry = expiry
        self.want(_BOUND)

    # -- storing before the response ----------------------------------------------------------------------

    async def save(self) -> None:
        """Store what changed now and keep the lock. Raises what the commit raises."""
        await self._work().commit(release=False)

    async def release(self) -> None:
        """Store what changed now and let the lock go; a later change raises `SessionClosedError`."""
        await self._work().commit(release=True)

    def transaction(self) -> AbstractAsyncContextManager[M]:
        """`async with session.transaction() as data:` lock, load the newest record, commit, release.

        For WebSockets, background tasks, long streams and read-only routes. In the request that holds the
        lock it commits what is there and keeps the lock. An exception in the block rolls back to what was
        there before it. `LockTimeoutError` where the lock was not to be had, `SessionConflictError` where
        the session has ended meanwhile.
        """
        return self._work().transaction(self)  # type: ignore[return-value]  # it yields this handle's `data`

    async def ended(self) -> None:
        """Return when somebody has ended the session, or given it a new id, in whatever process.

        For WebSockets, streams and long polls, which are to end then; what expires has ended too. A new id
        that this request itself gives the session is no end: its successor is waited for. Where there is no
        stored session there is nothing to wait for, and it returns at once. A request that holds the lock
        stores what changed and lets it go first, as `release` does: whoever ends the session may need it.
        """
        await self._unit().until_ended()

    async def devices(self) -> list[Device]:
        """All sessions of the user who is signed in by `login()`, the current one first, then the latest.

        [] where nobody is. What the clients are is kept with `record_client=True` only. It costs what the
        number of the user's sessions costs, and some hundred bytes for each.
        """
        self.accessed = True
        return await self._unit().devices()

    async def end_device(self, handle: str) -> bool:
        """End the session of this user that `handle` names; its own is `invalidate()`d.

        False for the handle of another user, for what is no handle, and where that session has ended.
        """
        self.accessed = True
        return await self._unit().end_device(handle)

    # -- for the middleware -----------------------------------------------------------------------------

    @property
    def model(self) -> type[SessionData]:
        """The class of `data`, which is not read for it."""
        return self._draft.model

    def note_client_change(self) -> bool:
        """Take note that another client than the record's sends this request; False where that was known."""
        known, self._client_changed = self._client_changed, True
        return not known

    @property
    def loaded(self) -> bytes | None:
        """The stored record, as it was loaded or last committed; None where there is none."""
        stored = self._draft.stored
        return None if stored is None else stored.record

    @property
    def stored_user(self) -> str | None:
        """Who is signed in in the stored record."""
        return self._draft.stored_user

    @property
    def expiry(self) -> Expiry | None:
        """The life that the app has asked for and that is not stored yet."""
        return self._draft.expiry

    def expiry_stored(self, expiry: Expiry | None) -> None:
        """Take note that the store holds this life; one that was asked for since is still to be stored."""
        if self._draft.expiry is expiry:
            self._draft.expiry = None

    def load(self, record: bytes) -> None:
        """Become the stored record; `ValueError` where it does not parse, the handle is as before then."""
        self._draft.load(record, self)
        if not self._is_new:  # it had another record, or another version of this one
            self._draft.expiry = None
        self.fate = _KEEP
        self._is_new = False

    def committed(self, record: bytes, user_id: str | None) -> None:
        """Take note that the store holds `record`, which was sealed last, with this user in it."""
        self._draft.committed(record, user_id)

    def forget(self) -> None:
        """Become a fresh session without a record: the loaded one is gone, or was never ours to show."""
        self._draft.forget(self)
        self.fate = _KEEP
        self._is_new = True
        self._client_changed = False

    def note_end(self) -> None:
        """Take note that the record has ended. What was put in since the app asked for that begins anew."""
        if self.is_blank():
            self.forget()
            return
        self.rename(new_session_id())
        self._draft.detach()
        self._is_new = True

    def identity(self) -> Who | SessionData:
        """What has `session_id`, `user_id` and `fingerprint` as they are now."""
        return self._draft.identity(self)

    def rename(self, session_id: str) -> None:
        """Put the record under another id."""
        self._draft.rename(self, session_id)

    def note_client(self, user_agent: str, address: str) -> None:
        """Keep in the record who signed in."""
        self._draft.note_client(self, user_agent, address)

    def is_blank(self) -> bool:
        """Whether nothing but the defaults is in it."""
        return self._draft.is_blank(self)

    def seal(self, *, as_decided: bool = False) -> bytes:
        """The record as it is to be stored, proven to read back; `SessionDataError` where it cannot be.

        `as_decided`: `change` has just said WRITE, and nothing has run since.
        """
        return self._draft.seal(self, as_decided=as_decided)

    def let_go(self) -> None:
        """The request is over: what it left is freed at once. A later use takes back what an app holds."""
        self._draft.let_go()

    def want(self, fate: Fate) -> None:
        """Want again what a commit did not do; the stronger wish counts if there has been one since."""
        self.fate = max(self.fate, fate, key=_BY_STRENGTH)

    def change(self) -> Change:
        """What a commit has to do: the table of the whole product's writing.

        A sign-in that is found among the values is noted in `fate`; nothing else changes.
        """
        if self._draft.stored is None:
            if self.is_blank():
                return _NOTHING
            self._notice_sign_in()
            return Change.CREATE
        if self.fate is _END:
            return Change.DELETE if self.is_blank() else Change.MOVE
        if not self.accessed or not self._draft.is_changed(self):
            return _NOTHING if self.fate is _KEEP else self._change_by_fate(Change.ROTATE)
        if self.modified and self.is_blank():
            return Change.DELETE  # cleared, as Starlette means it
        self._notice_sign_in()
        return _WRITE if self.fate is _KEEP else self._change_by_fate(Change.MOVE)

    def _change_by_fate(self, rotation: Change) -> Change:
        if self.fate is Fate.ROTATE:
            return rotation
        return Change.BOUND if self.fate is _BOUND else Change.MOVE

    @contextmanager
    def savepoint(self, is_void: Callable[[], bool] | None = None) -> Iterator[SessionData]:
        """Yield the record; an exception brings back what it was, or what was stored since (`save`).

        Nothing is brought back where `is_void` says so.
        """
        draft = self._draft
        before, stored = draft.snapshot(self), draft.stored
        fate, modified, expiry = self.fate, self.modified, draft.expiry
        try:
            yield self.data  # which counts as accessed: what is done to it is found by comparing
        except BaseException:
            if is_void is not None and is_void():
                raise
            if draft.stored is stored:
                draft.restore(before, self)
                self.fate, draft.expiry = fate, expiry
            else:  # stored under another id perhaps, or ended: the old record must not come back
                self._return_to_stored()
            self.modified = modified
            raise

    # -- inside -------------------------------------------------------------------------------------------

    def _sign_in(self) -> None:
        if self.fate is not _END:  # what begins after an end has a new id anyway, and a life of its own
            self.fate = _SIGN_IN

    def _notice_sign_in(self) -> None:
        """Set `fate` where the values say that somebody signed in, or somebody else than before."""
        names = self.rotate_on
        if self.fate is _SIGN_IN or self.fate is _END or not names:
            return
        there = self._draft.unlike_stored(self, names)
        if there:
            stored = self._draft.stored_values()
            fate = fate_of(stored, self, there)
            if fate is not _KEEP:  # a tuple is the list as which it was stored
                fate = fate_of(stored, self._draft.read_back(self, there), there)
            if fate is not _KEEP:
                self.fate = fate
        user_id = self.identity().user_id
        if user_id is not None and user_id != self._draft.stored_user and "user_id" in names:
            self.fate = _SIGN_IN

    def _return_to_stored(self) -> None:
        is_new, record = self._is_new, self.loaded
        if record is None:
            self.forget()
        else:
            self.load(record)
            self._is_new = is_new

    def _work(self) -> UnitOfWork:
        unit = self._unit()
        self._draft.take_back()
        unit.session = self
        return unit

    def _unit(self) -> UnitOfWork:
        if self.unit is None:
            raise SessionClosedError("this session belongs to no request")
        return self.unit
