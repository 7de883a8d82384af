"""The request operations, as any store has them by its record operations: what the middleware calls."""

from __future__ import annotations

import abc
import hashlib
import time
from collections.abc import Sequence

from ..data import SessionData
from ..errors import SessionStoreError
from ..fields import check_id
from ..record import decode, encode, misfit
from .checkout import Checkout, Lifetime, Missing, Outcome
from .local import LocalLocks, LockPolicy, RetiredIds


class RequestOperations(abc.ABC):
    """Check out, create, commit, discard, release, renew: locked within the process, compared before written.

    Built on the four record operations that every store implements. Stores for more than one process override
    all of this with atomic operations.
    """

    model: type[SessionData] = SessionData
    default_ttl: float = 3600
    lock_policy: LockPolicy | None = None

    # -- life of the store itself -----------------------------------------------------------------------

    def __init__(self) -> None:
        self._locks = LocalLocks()
        self._retired = RetiredIds()
        self._responses = 0
        self._response_seconds = 0.0

    # -- what a store implements ------------------------------------------------------------------------

    @abc.abstractmethod
    async def get(self, session_id: str) -> SessionData | None:
        """The record, None where it is absent. Takes no lock and does not count as activity."""

    @abc.abstractmethod
    async def set(self, session_id: str, data: SessionData, ttl: float | None = None) -> bool:
        """Store the record whoever holds it; True when stored.

        Without `ttl` (seconds) an existing record keeps its remaining time and a new one gets
        `default_ttl`. Never waits: a request that holds the session then finds its commit refused.
        `ValueError` for ttl ≤ 0 or another session's data, `SessionDataError` for what cannot be stored.
        """

    @abc.abstractmethod
    async def delete(self, session_id: str) -> bool:
        """Delete the record; False where it was absent. Never waits; a holder's commit is then refused."""

    @abc.abstractmethod
    async def list_active(self, limit: int | None = None, offset: int = 0) -> list[str]:
        """The ids of the records that are not absent, in sorted order; `limit=0` gives none."""

    async def exists(self, session_id: str) -> bool:
        """Whether the record is there."""
        return await self.get(session_id) is not None

    # -- request operations: what the middleware calls ------------------------------------------------

    async def checkout(
        self, session_id: str, lock: LockPolicy | None, lifetime: Lifetime | None
    ) -> Checkout | Missing:
        """Lock (unless `lock` is None) and load; an idle timeout restarts.

        `lifetime` is the rule of the caller for stores that do not keep one with the record; None leaves the
        TTL alone there. Waits for others at most `lock.wait` seconds, then `LockTimeoutError`; behind
        `lock.max_waiters` others `TooManyWaitersError` at once. A cancelled checkout leaves nothing behind.
        """
        token, waited = None, 0.0
        if lock is not None:
            token, waited = await self._locks.acquire(session_id, lock)
        try:
            data = await self.get(session_id)
            if data is None:
                self._locks.release(session_id, token)
                return Missing.RETIRED if session_id in self._retired else Missing.ABSENT
            expires_in = await self._extend(data, lifetime)
        except BaseException:
            self._locks.release(session_id, token)
            raise
        record = encode(data)
        return Checkout(session_id, record, _digest(record), token, expires_in, waited)

    async def create(
        self, session_id: str, record: bytes, lifetime: Lifetime, lock: LockPolicy | None
    ) -> Checkout | None:
        """Store a new record, and lock it for the caller unless `lock` is None; None where the id exists."""
        token, _ = await self._locks.acquire(session_id, lock or LockPolicy())
        created = False
        try:
            if not await self.exists(session_id):
                created = await self.set(session_id, self.read(record), lifetime.ttl())
        finally:
            if lock is None or not created:
                self._locks.release(session_id, token)
        if not created:
            return None
        return Checkout(
            session_id, record, _digest(record), token if lock is not None else None, lifetime.absolute
        )

    async def commit(self, checkout: Checkout, record: bytes, *, release: bool) -> Outcome:
        """Write the record if the lease, the version and the record are still what was checked out.

        The TTL is kept. With `release` the lock is let go in the same trip, whatever the outcome. When
        stored, `checkout` describes the new version.
        """
        try:
            outcome = await self._refusal(checkout)
            if outcome is Outcome.STORED:
                await self.set(checkout.session_id, self.read(record))
                checkout.record, checkout.version = record, _digest(record)
            return outcome
        finally:
            if release:
                await self.release(checkout)

    async def discard(self, checkout: Checkout, *, retire: bool) -> Outcome:
        """Delete the checked-out record if lease and version still hold, and let the lock go.

        With `retire` the id is remembered for `RETIRED_FOR` seconds: it was replaced by another. STORED
        when the record is gone by this call, GONE where it was absent already.
        """
        try:
            outcome = await self._refusal(checkout)
            if outcome is Outcome.STORED:
                await self.delete(checkout.session_id)
                if retire:
                    self._retired.add(checkout.session_id)
            return outcome
        finally:
            await self.release(checkout)

    async def release(self, checkout: Checkout) -> None:
        """Let the lock go, to the next in the queue; nothing where it is not held any more.

        Returns when the release is on its way: it is not waited for, and its failure ends with the lease.
        """
        self._locks.release(checkout.session_id, checkout.token)
        checkout.token = None

    async def renew(self, checkouts: Sequence[Checkout]) -> list[bool]:
        """Prolong the leases; False for each that was lost."""
        return [self._locks.owns(checkout.session_id, checkout.token) for checkout in checkouts]

    async def link_user(  # noqa: B027  # a hook: without an index the records are searched
        self, user_id: str, session_id: str, lifetime: Lifetime
    ) -> None:
        """Note that the session belongs to this user, for `list_for_user`: before the commit of a change of
        user, after the creation of a session (whose cookie nobody has yet).

        A link may outlive its session: `list_for_user` believes the record only.
        """

    # -- life of the store itself -----------------------------------------------------------------------

    def bind(self, model: type[SessionData], lock_policy: LockPolicy) -> None:
        """Take model and lock settings from the middleware, where the store was given none of its own."""
        if not hasattr(self, "_locks"):
            raise TypeError(f"{type(self).__name__}.__init__ has to call super().__init__()")
        if self.model is SessionData:
            self.model = model
        if self.lock_policy is None:
            self.lock_policy = lock_policy

    async def open(self) -> None:  # noqa: B027  # a hook
        """Make ready for the first request; a backend that is down is no error yet."""

    async def aclose(self) -> None:  # noqa: B027  # a hook
        """Let go of connections; a later call opens them again."""

    def read(self, record: bytes) -> SessionData:
        """The record as this store's model; `SessionStoreError` where it does not parse."""
        try:
            return decode(self.model, record)
        except ValueError as error:
            raise SessionStoreError(str(misfit(self.model, error))) from error

    def note_response(self, seconds: float) -> None:
        """Count a request's duration for `get_metrics`."""
        self._responses += 1
        self._response_seconds += seconds

    def check(self, session_id: str, data: SessionData, ttl: float | None) -> None:
        """What `set` has to refuse first: `ValueError` for a bad id, another session's data, a ttl ≤ 0."""
        check_id(session_id)
        if data.session_id != session_id:
            raise ValueError("the data belong to another session: data.session_id differs from the id")
        if ttl is not None and not ttl > 0:
            raise ValueError("ttl is a number of seconds above 0; use delete() to end a session")

    async def _refusal(self, checkout: Checkout) -> Outcome:
        if checkout.token is not None and not self._locks.owns(checkout.session_id, checkout.token):
            return Outcome.LOST
        data = await self.get(checkout.session_id)
        if data is None:
            return Outcome.GONE
        return Outcome.STORED if _digest(encode(data)) == checkout.version else Outcome.CONFLICT

    async def _extend(self, data: SessionData, lifetime: Lifetime | None) -> float | None:
        if lifetime is None or lifetime.absolute is None:
            left = None
        else:
            left = lifetime.absolute - (time.time() - data.created_at.timestamp())
        if lifetime is not None and lifetime.idle is not None:
            ttl = lifetime.idle if left is None else min(lifetime.idle, left)
            await self.set(data.session_id, data, max(ttl, 0.001))
        return left


def _digest(record: bytes) -> str:
    return hashlib.sha256(record).hexdigest()
