"""The request operations of a store, on four primitives: what the middleware calls."""

from __future__ import annotations

import math
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import AbstractAsyncContextManager, aclosing, nullcontext
from typing import Generic

from ..errors import LockAcquisitionError, SessionStoreError
from ..record.codec import decode, encode_checked, id_of, misfit, user_of
from ..record.model import M, SessionData
from ..record.values import check_id
from ..record.vault import NoKeyError, Vault
from .checkout import Checkout, Lifetime, LockPolicy, Missing, Outcome
from .endings import Endings, Life
from .local import Latches, LocalLocks, RetiredIds
from .primitives import Values
from .surplus import idleness, surplus
from .value import Value

_AT_ONCE = LockPolicy(wait=0, max_waiters=0)
_STORED = Outcome.STORED  # bound once: looking up an Enum's member is slow on Python 3.11


class RequestOperations(Generic[M]):
    """Check out, create, commit, move, discard, release: locked and compared within the process.

    Stands on four primitives, all that a store has to implement: `read_value`, `write_value`, `delete_value`
    and `iter_ids`. Each operation holds its session while it reads, compares and writes, so that no other
    task of this process comes between. Stores for several processes override the operations with atomic ones.

    A base class, not an object of its own: a store may override any single operation, and the others call it.
    """

    model: type[SessionData] = SessionData  # M's class; a middleware gives its own where there is none
    default_ttl: float = 3600
    lock_policy: LockPolicy | None = None
    shared = False  # by all middlewares of this process that were given the same URL, or none
    vault: Vault | None = None  # encrypts; see `encrypt`
    openers = 0  # middlewares whose apps are between start-up and shut-down

    # -- life of the store itself -----------------------------------------------------------------------

    def __init__(self) -> None:
        self._check_primitives()
        self._locks = LocalLocks()
        self._retired = RetiredIds()
        self._endings = Endings(self._life_of)
        self._primitives = Values(self, self._endings.tell)
        self._users = Latches()  # of users who sign out, or whose session gets a new id
        self._responses = 0
        self._response_seconds = 0.0

    def now(self) -> float:
        """The store's clock, in seconds since the epoch. It alone decides what has expired."""
        return time.time()

    # -- what a store implements ------------------------------------------------------------------------

    async def read_value(self, session_id: str) -> bytes | None:
        """What is stored under this id, None for nothing. Raises `SessionStoreError` on a fault."""
        raise AssertionError("checked in the constructor")

    async def write_value(self, session_id: str, value: bytes, ttl: float) -> None:
        """Write the value under this id, over any other; it may be forgotten after `ttl` seconds.

        Is never cancelled once it has begun, so it needs a time limit of its own.
        """
        raise AssertionError("checked in the constructor")

    async def delete_value(self, session_id: str) -> None:
        """Delete what is stored under this id, if anything. Is never cancelled once it has begun."""
        raise AssertionError("checked in the constructor")

    def iter_ids(self) -> AsyncGenerator[str, None]:
        """Every id that has a value, in any order. One that comes or goes meanwhile may be missing."""
        raise AssertionError("checked in the constructor")

    def _check_primitives(self) -> None:
        """`TypeError` for a store that has neither the primitives nor operations of its own."""
        kind = type(self)
        names = ("read_value", "write_value", "delete_value", "iter_ids")
        missing = [name for name in names if getattr(kind, name) is getattr(RequestOperations, name)]
        if missing and kind.checkout is RequestOperations.checkout:
            raise TypeError(f"{kind.__name__} has to implement {', '.join(missing)}: see SessionStore")

    # -- record operations ------------------------------------------------------------------------------

    async def get(self, session_id: str) -> M | None:
        """The record, None where it is absent. Takes no lock and does not count as activity.

        `SessionStoreError` where something else is stored there.
        """
        check_id(session_id)
        found = await self._primitives.find(session_id)
        if isinstance(found, Value):
            return self.read(found.record)
        if found is Missing.UNREADABLE:
            raise SessionStoreError(FOREIGN)
        return None

    async def set(
        self, session_id: str, data: SessionData, ttl: float | None = None, *, create: bool = True
    ) -> bool:
        """Store the record, also while a request holds the session; True when stored.

        Without `ttl` (seconds) an existing record keeps its remaining time, and a new one gets `default_ttl`.
        Never waits: the commit of a request that holds the session is then refused. With `create=False` a
        record that has ended stays so: False. `ValueError` for ttl ≤ 0 or another session's data,
        `SessionDataError` for what cannot be stored.
        """
        self.check(session_id, data, ttl)
        record = self.encode(data)
        async with self._primitives.hold(session_id):
            found = await self._primitives.find(session_id)
            if found is Missing.UNREADABLE:
                raise SessionStoreError(FOREIGN)
            if isinstance(found, Value):
                found.rewrite(record)
                if ttl is not None:
                    found.expires = self.now() + ttl
                    found.touch(self.now())
            elif not create:
                return False
            else:
                found = Value.new(record, Lifetime(self.default_ttl if ttl is None else ttl), self.now())
            await self._primitives.write(session_id, found)
        return True

    async def delete(self, session_id: str) -> bool:
        """Delete the record; False where it was absent. Never waits: a holder's commit is then refused."""
        check_id(session_id)
        async with self._primitives.hold(session_id):
            found = await self._primitives.find(session_id)
            if found is Missing.UNREADABLE:
                raise SessionStoreError(FOREIGN)
            if isinstance(found, Missing):
                return False
            await self._primitives.erase(session_id)
        return True

    async def exists(self, session_id: str) -> bool:
        """Whether the record is there."""
        check_id(session_id)
        return isinstance(await self._primitives.find(session_id), Value)

    async def iter_active(self) -> AsyncGenerator[str, None]:
        """The ids of the records that are not absent, in any order.

        Use it within `contextlib.aclosing` where you may stop before the end.
        """
        async with aclosing(self.iter_ids()) as known:
            async for session_id in known:
                if await self.exists(session_id):
                    yield session_id

    async def cleanup_expired(self) -> int:
        """Drop expired records now and return how many; 0 where the backend does so by itself."""
        known = [session_id async for session_id in self.iter_ids()]
        return sum([await self._primitives.drop_expired(session_id) for session_id in known])

    async def _end_all_of(self, user: str, keep: str | None) -> int:
        """See `SessionStore.delete_for_user`. Meanwhile no session of this user gets a new id."""
        async with self._users.hold(user):
            known = [session_id async for session_id in self.iter_ids() if session_id != keep]
            return sum([await self._end_if_of(user, session_id) for session_id in known])

    async def end_surplus(self, user: str, most: int, keep: str) -> list[str]:
        """End the longest idle sessions of a user, so that `most` are left with `keep`; the ids of the ended.

        Called when the sign-in of `keep` is stored. Each of several sign-ins at once sees those before it,
        and no more sessions end than are too many. A process that dies in between leaves too many, which the
        next sign-in ends. This one looks at every session; a store that knows those of a user overrides it.
        """
        ended = []
        async with self._users.hold(user):
            idle: dict[str, float] = {}
            now, today = self.now(), time.time()
            async for session_id in self.iter_ids():
                found = await self._primitives.find(session_id)
                if isinstance(found, Value) and user_of(found.record) == user:
                    idle[session_id] = idleness(found, now, today)
            for session_id in surplus(idle, most, keep):
                if await self._end_if_of(user, session_id):
                    ended.append(session_id)
        return ended

    async def _end_if_of(self, user_id: str, session_id: str) -> bool:
        async with self._primitives.hold(session_id):
            found = await self._primitives.find(session_id)
            if not isinstance(found, Value) or user_of(found.record) != user_id:
                return False
            await self._primitives.erase(session_id)
            return True

    # -- request operations: what the middleware calls ------------------------------------------------

    async def checkout(
        self,
        session_id: str,
        lock: LockPolicy | None,
        lifetime: Lifetime | None,
        *,
        passive: bool = False,
    ) -> Checkout | Missing:
        """Lock the session, unless `lock` is None, and load its record.

        `lifetime` is the caller's rule: a record with longer bounds gets these, and one that has ended by
        them is absent; None leaves the bounds as they are. `LockTimeoutError` after `lock.wait` seconds,
        `TooManyWaitersError` at once behind `lock.max_waiters` others. The idle timeout does not restart here
        (see `keep_alive`), except for a request that has to wait and is not `passive`. A cancelled checkout
        leaves nothing behind.
        """
        token, waited = None, 0.0
        if lock is not None:
            token = self._locks.try_acquire(session_id, lock)
            if token is None:
                if not passive:
                    await self._primitives.touch(session_id, lifetime)
                token, waited = await self._locks.acquire(session_id, lock)
        try:
            async with self._primitives.hold(session_id):
                found = await self._primitives.bounded(session_id, lifetime)
        except BaseException:
            self._locks.release(session_id, token)
            raise
        if isinstance(found, Value):
            return found.checkout(session_id, self.now(), token, waited)
        self._locks.release(session_id, token)
        return Missing.RETIRED if found is Missing.ABSENT and session_id in self._retired else found

    async def keep_alive(self, checkout: Checkout) -> None:
        """Restart the idle timeout: the client that the record is for sent a request."""
        await self._primitives.touch(checkout.session_id)

    async def arrived(self, checkout: Checkout) -> None:
        """Give a record that was created with `Lifetime.first` its full life: its client has come back.

        The idle timeout restarts. Nothing changes where the record has its full life already, or has ended.
        """
        await self._primitives.touch(checkout.session_id)

    async def create(
        self,
        session_id: str,
        record: bytes,
        lifetime: Lifetime,
        lock: LockPolicy | None,
        user: str | None = None,
    ) -> Checkout | None:
        """Store a new record, and lock it for the caller unless `lock` is None; None where the id exists.

        `user` is who is signed in, for a store with an index of users.
        """
        async with self._primitives.hold(session_id):
            if await self._primitives.find(session_id) is not Missing.ABSENT:
                return None
            created = Value.new(record, lifetime, self.now())
            await self._primitives.write(session_id, created)
            token = self._locks.try_acquire(session_id, lock) if lock is not None else None
            return created.checkout(session_id, created.began, token)

    async def commit(self, checkout: Checkout, record: bytes, *, release: bool) -> Outcome:
        """Write the record if nobody else has taken the lock, changed the record or ended it.

        The bounds stay. A lease that has run out does no harm where nobody took the lock since. `release`
        releases the lock in the same call, whatever the outcome. When stored, `checkout` describes the new
        version. After a fault it is not known whether the record is stored, and the caller may commit again:
        a version that an earlier try wrote counts as the one that was loaded.
        """
        try:
            async with self._primitives.hold(checkout.session_id):
                found = await self._changeable(checkout)
                if not isinstance(found, Value):
                    return found
                found.rewrite(record)
                checkout.unsure = f"{checkout.unsure or ''} {found.version}".lstrip()
                await self._primitives.write(checkout.session_id, found)
            checkout.record, checkout.version, checkout.unsure = record, found.version, None
            return _STORED
        finally:
            if release:
                await self.release(checkout)

    async def commit_unlocked(self, checkout: Checkout, record: bytes) -> Outcome:
        """Write the record of a checkout without a lock, if nobody holds the lock or has changed the record.

        BUSY where somebody holds it: a holder is never disturbed. Otherwise as `commit`. This one stands on
        the other operations; a store that can do it in one step overrides it.
        """
        try:
            taken = await self.checkout(checkout.session_id, _AT_ONCE, None, passive=True)
        except LockAcquisitionError:
            return Outcome.BUSY
        if not isinstance(taken, Checkout):
            return Outcome.GONE
        taken.version, taken.unsure = checkout.version, checkout.unsure
        try:
            outcome = await self.commit(taken, record, release=True)
        finally:
            checkout.record, checkout.version, checkout.unsure = taken.record, taken.version, taken.unsure
            await self.release(taken)
        return outcome

    async def bound(self, checkout: Checkout, lifetime: Lifetime) -> Outcome:
        """Give the record these bounds, longer or shorter ones, where `commit` could write it.

        `absolute` counts from now; the idle timeout still counts from the last request. The record, the lock
        and the begin of its life stay. When stored, `checkout` describes the record as it is now. After a
        fault it is not known which bounds it has, and the caller may try again, as with `commit`.
        """
        async with self._primitives.hold(checkout.session_id):
            found = await self._changeable(checkout)
            if not isinstance(found, Value):
                return found
            now = self.now()
            found.bound(lifetime, now)
            found.rewrite(found.record)
            checkout.unsure = f"{checkout.unsure or ''} {found.version}".lstrip()
            await self._primitives.write(checkout.session_id, found)
            checkout.is_now(found.checkout(checkout.session_id, now, None))
            checkout.unsure = None
            return _STORED

    async def move(
        self,
        checkout: Checkout,
        session_id: str,
        record: bytes,
        *,
        lifetime: Lifetime | None,
        lock: LockPolicy | None,
        was: str | None,
        user: str | None,
        leads: bool = False,
    ) -> Outcome:
        """Store `record` under a new id that nobody knows, then retire the checked-out one.

        `was` is the user of the old record, `user` that of the new one. GONE where a sign-out of `was` is
        under way. With `lifetime` None the old record's bounds stay. When stored, the new record is
        `checkout.successor`, and the old id is remembered for `RETIRED_FOR` seconds. Any other outcome leaves
        nothing of the new record. After a fault the session is at `successor`, where that is set. A process
        that dies on the way leaves the old session whole, or a record whose id nobody knows.

        `leads`: the id is replaced only because it is old, and `successor_of` gives the new one for
        `LEADS_FOR` seconds. Never where somebody signs in: the old id may be known to others (fixation).
        """
        try:
            async with self._unless_ending(was), self._primitives.hold(checkout.session_id):
                found = await self._changeable(checkout)
                if not isinstance(found, Value):
                    return found
                await self._succeed(checkout, found, session_id, record, lifetime, lock, leads)
                return _STORED
        finally:
            await self.release(checkout)

    def _unless_ending(self, user: str | None) -> AbstractAsyncContextManager[None]:
        """Hold the user for a move, if there is one: their sessions are not being ended meanwhile."""
        return nullcontext() if user is None else self._users.hold(user)

    async def _succeed(
        self,
        checkout: Checkout,
        old: Value,
        session_id: str,
        record: bytes,
        lifetime: Lifetime | None,
        lock: LockPolicy | None,
        leads: bool,
    ) -> None:
        now = self.now()
        new = old.renewed(record, now) if lifetime is None else Value.new(record, lifetime, now)
        await self._primitives.write(session_id, new)
        token = self._locks.try_acquire(session_id, lock) if lock is not None else None
        checkout.successor = new.checkout(session_id, now, token)
        self._retired.add(checkout.session_id, session_id if leads else None)
        await self._primitives.erase(checkout.session_id)

    async def successor_of(self, session_id: str) -> str | None:
        """The id to which a replaced one still leads; whether a record lies there is another question."""
        return self._retired.successor(session_id)

    async def discard(self, checkout: Checkout) -> Outcome:
        """Delete the checked-out record if lease and version still hold, and release the lock.

        STORED where this call deleted the record, GONE where it was absent already.
        """
        try:
            async with self._primitives.hold(checkout.session_id):
                found = await self._changeable(checkout)
                if not isinstance(found, Value):
                    return found
                await self._primitives.erase(checkout.session_id)
                return _STORED
        finally:
            await self.release(checkout)

    async def release(self, checkout: Checkout) -> None:
        """Release the lock, to the next in the queue; nothing where it is not held any more.

        Does not wait for the backend's answer. A release that fails ends with the lease.
        """
        self._locks.release(checkout.session_id, checkout.token)
        checkout.token = None

    async def renew(self, checkouts: Sequence[Checkout]) -> list[bool]:
        """Renew the leases; False for each that was lost."""
        return [self._locks.owns(checkout.session_id, checkout.token) for checkout in checkouts]

    async def link_user(self, user_id: str, session_id: str, lifetime: Lifetime) -> None:
        """Note that the session belongs to this user, for a store with an index of users.

        Called before a commit that changes the user without a new id, and when a rolling session is renewed.
        A link may outlive its session and never undoes a sign-out: the record decides.
        """

    async def until_ended(self, session_id: str) -> None:
        """Return when this session is not there any more: ended, replaced by another id, or expired.

        At once where it is absent. An end in another process is noticed by looking, each 5 seconds at last;
        stores for several processes tell one another. A fault of the backend is no end.
        """
        await self._endings.wait(session_id)

    async def _life_of(self, session_id: str) -> Life | None:
        """How a session lives that somebody waits for; None where it is absent."""
        found = await self._primitives.find(session_id)
        if isinstance(found, Missing):
            return None if found is Missing.ABSENT else Life(math.inf, False)
        return Life(found.ends - self.now(), False)

    # -- life of the store itself -----------------------------------------------------------------------

    def bind(self, model: type[SessionData], lock_policy: LockPolicy) -> None:
        """Take the middleware's model and lock settings where the store has none of its own.

        A shared store takes those of the latest middleware, but keeps its model where that is a subclass.
        """
        if not hasattr(self, "_locks"):
            raise TypeError(f"{type(self).__name__}.__init__ has to call super().__init__()")
        if self.model is SessionData or (self.shared and not issubclass(self.model, model)):
            self.model = model
        if self.lock_policy is None or self.shared:
            self.lock_policy = lock_policy

    async def open(self) -> None:
        """Get ready for the first request. A backend that is down is no error yet."""

    async def aclose(self) -> None:
        """Close the connections. A later call opens them again."""

    def read(self, record: bytes) -> M:
        """The record as this store's model; `SessionStoreError` where it does not parse, or has no key."""
        try:
            return decode(self.model, self._plain(record))  # type: ignore[return-value]  # the model is M's class
        except NoKeyError as error:
            raise SessionStoreError(str(error)) from error
        except ValueError as error:
            raise SessionStoreError(str(misfit(self.model, error))) from error

    # -- encryption -------------------------------------------------------------------------------------

    def encrypt(self, keys: Sequence[str | bytes]) -> None:
        """Encrypt records with the first of these keys from now on; read those of all. () changes nothing.

        `ValueError` for a key of another length, or where the store has other keys; `ImportError` without the
        extra `encryption`.
        """
        if isinstance(keys, str | bytes):
            raise TypeError("encryption_keys is a collection of keys: [key]")
        if keys:
            vault = Vault(keys)
            if self.vault is not None and self.vault != vault:
                raise ValueError("middlewares that share a store have the same encryption_keys")
            self.vault = vault

    def encode(self, data: SessionData) -> bytes:
        """The record as it is to be stored; `SessionDataError` where it cannot be."""
        return self.sealed(data.session_id, encode_checked(data))

    def sealed(self, session_id: str, record: bytes) -> bytes:
        """What is stored of a record: encrypted, if there are keys."""
        return record if self.vault is None else self.vault.seal(session_id, record)

    def opened(self, taken: Checkout) -> bytes:
        """The record of a checkout without its encryption; `NoKeyError` where no key here opens it."""
        return taken.record if self.vault is None else self.vault.open(taken.session_id, taken.record)

    async def encrypt_anew(self, taken: Checkout) -> None:
        """Encrypt a record that is not, or by an older key; nothing where somebody changes it meanwhile.

        Links come first. A sign-out ends what is linked by the oldest name first, and so finds the session by
        one name or the other.
        """
        vault = self.vault
        if vault is None or vault.is_current(taken.record):
            return
        record = vault.open(taken.session_id, taken.record)
        user_id = user_of(record)
        if user_id is not None:
            lifetime = Lifetime(taken.expires_in, taken.idle)
            await self.link_user(vault.name_of(user_id), taken.session_id, lifetime)
        sealed = vault.seal(taken.session_id, record)
        if taken.token is not None:
            await self.commit(taken, sealed, release=False)
        else:
            await self.commit_unlocked(taken, sealed)

    def _plain(self, record: bytes) -> bytes:
        return record if self.vault is None else self.vault.open(id_of(record) or "", record)

    def name_of(self, user_id: str) -> str:
        """How this store knows a user: by a keyed hash, if there are keys."""
        return user_id if self.vault is None else self.vault.name_of(user_id)

    def user_in(self, taken: Checkout, user_id: str | None) -> str | None:
        """How this store knows the user of a record that lies there, whose user is this one."""
        return user_id if self.vault is None else user_of(taken.record)

    def names_of(self, user_id: str) -> list[str]:
        """How this store may know a user, the oldest name first."""
        return [user_id] if self.vault is None else self.vault.names_of(user_id)[::-1]

    def note_response(self, seconds: float) -> None:
        """Count a request's duration for `get_metrics`."""
        self._responses += 1
        self._response_seconds += seconds

    def check(self, session_id: str, data: SessionData, ttl: float | None) -> None:
        """`ValueError` for what `set` refuses: a bad id, another session's data, a ttl ≤ 0."""
        check_id(session_id)
        if data.session_id != session_id:
            raise ValueError("the data belong to another session: data.session_id differs from the id")
        if ttl is not None and not ttl > 0:
            raise ValueError("ttl is a number of seconds above 0; use delete() to end a session")

    async def _changeable(self, checkout: Checkout) -> Value | Outcome:
        """The record that the checkout may change, or why it may not."""
        if checkout.token is not None and self._locks.is_taken_over(checkout.session_id, checkout.token):
            return Outcome.LOST if checkout.unsure is None else Outcome.UNSURE
        found = await self._primitives.find(checkout.session_id)
        if found is Missing.ABSENT:
            return Outcome.GONE
        if isinstance(found, Value):
            known = checkout.unsure.split() if checkout.unsure else ()
            if found.version == checkout.version or found.version in known:
                return found
        return Outcome.CONFLICT if checkout.unsure is None else Outcome.UNSURE


FOREIGN = "what lies under this id is not a session record; it is left alone"
