"""What a store promises: the record operations that users call and the request operations of the walk.

A record lives under a session id. It is *absent* when it was never stored, was deleted or has expired; the
store's clock alone decides expiry. `create` never overwrites and `commit` never creates. Absence is a value,
a fault of the backend is a `SessionStoreError`. What a store returns is never shared with it: changing it
changes nothing.
"""

from __future__ import annotations

import abc
import enum
import hashlib
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from ..data import SessionData, SessionFilter, SessionMetrics, stamp
from ..errors import LockLostError, SessionConflictError, SessionDataError, SessionStoreError
from ..fields import is_identifier, new_session_id
from ..record import decode, encode, encode_checked
from ..session import held_session
from .local import LocalLocks, LockPolicy


@dataclass(frozen=True, slots=True)
class Lifetime:
    """How long a record lives, in seconds of the store's clock.

    `absolute` counts from creation and never moves (OWASP: absolute timeout); `idle` restarts at each
    request (OWASP: idle timeout). The earlier end counts; None is no such bound. At least one is set.
    """

    absolute: float | None = None
    idle: float | None = None

    def ttl(self) -> float:
        """Seconds that a record created now lives if no request touches it."""
        return min(bound for bound in (self.absolute, self.idle) if bound is not None)


class Missing(enum.Enum):
    """Why a checkout gave no record. Nothing is locked then."""

    ABSENT = "absent"  # never stored, deleted or expired
    RETIRED = "retired"  # its id was replaced (login, regenerate) within the last minute
    UNREADABLE = "unreadable"  # what lies at the key is not a record of ours; it is left alone


class Outcome(enum.Enum):
    """What became of a commit. Only STORED wrote anything."""

    STORED = "stored"
    GONE = "gone"  # the record was deleted or expired since it was checked out
    CONFLICT = "conflict"  # the record was changed by somebody who did not wait
    LOST = "lost"  # the lease ended, another may hold the lock


@dataclass(slots=True)
class Checkout:
    """A record taken out for a request: what it said, which version, and the lease on its lock.

    `token` is the lease's unguessable name, None where no lock was taken or it was let go. `expires_in` is
    what is left of the absolute bound in seconds at the time of the checkout, None where there is none.
    `waited` is how long the lock was waited for, in seconds. `seal` belongs to the store.
    """

    session_id: str
    record: bytes
    version: str
    token: str | None
    expires_in: float | None = None
    waited: float = 0.0
    seal: str = ""


RETIRED_FOR = 60.0
"""Seconds for which a replaced id is remembered: longer than any request that was under way then."""


_STORED = Outcome.STORED  # bound once: looking up an Enum's member is slow on Python 3.11


def raise_for(outcome: Outcome) -> None:
    """Raise the error that tells an app that its change was not stored; nothing for STORED."""
    if outcome is _STORED:
        return
    if outcome is Outcome.LOST:
        raise LockLostError("the lease on the session ended before its change was stored")
    if outcome is Outcome.CONFLICT:
        raise SessionConflictError("the session was changed by another writer since it was loaded")
    if outcome is Outcome.GONE:
        raise SessionConflictError("the session was deleted or has expired since it was loaded")


class SessionStore(abc.ABC):
    """Keeps session records. A store of your own implements `get`, `set`, `delete` and `list_active`.

    The rest is derived from those four: sessions are then locked within the process, a commit compares the
    record before it writes, and each request of a session with an idle timeout writes its new TTL. Stores
    for more than one process override the request operations with atomic ones.
    """

    model: type[SessionData] = SessionData
    default_ttl: float = 3600
    lock_policy: LockPolicy | None = None

    # -- record operations: to be implemented ---------------------------------------------------------

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

    # -- record operations: derived -------------------------------------------------------------------

    async def exists(self, session_id: str) -> bool:
        """Whether the record is there."""
        return await self.get(session_id) is not None

    async def count_active(self) -> int:
        """How many records are not absent."""
        return len(await self.list_active())

    async def cleanup_expired(self) -> int:
        """Drop expired records now and say how many; 0 where the backend does so by itself."""
        return 0

    async def update(self, session_id: str, updates: Mapping[str, Any], atomic: bool = False) -> bool:
        """Change some values and keep the TTL; False where the record is absent.

        Names of model fields set fields (validated), all others go to the metadata. Takes its turn like a
        request, so it is atomic whatever `atomic` says; all updates are stored or none.
        """
        async with self.transaction(session_id) as data:
            if data is not None:
                apply_updates(data, updates)
        return data is not None

    async def increment_counter(self, session_id: str, field: str, delta: int = 1) -> int:
        """Add to a number and return it, atomically against every other writer.

        A name that is no model field counts in the metadata, from 0. `KeyError` where the record is absent,
        `SessionDataError` where the field is not a number.
        """
        async with self.transaction(session_id) as data:
            if data is None:
                raise KeyError("no such session")
            return add_to_field(data, field, delta)

    async def touch(self, session_id: str) -> bool:
        """Note activity now: `last_activity` is set, an idle timeout restarts. False where absent."""
        async with self.transaction(session_id) as data:
            if data is not None:
                data.update_activity()
        return data is not None

    async def get_or_create(
        self, session_id: str, factory: Callable[[], SessionData] | None = None, ttl: float | None = None
    ) -> SessionData:
        """The record, created by `factory` where it is absent; two callers at once get one record."""
        while True:
            existing = await self.get(session_id)
            if existing is not None:
                return existing
            fresh = factory() if factory else self.model(session_id=session_id)
            self._check(session_id, fresh, ttl)
            lifetime = Lifetime(absolute=self.default_ttl if ttl is None else ttl)
            if await self.create(session_id, encode_checked(fresh), lifetime, None) is not None:
                if fresh.user_id:
                    await self.link_user(fresh.user_id, session_id, lifetime)
                return fresh

    async def get_batch(self, session_ids: Iterable[str]) -> dict[str, SessionData]:
        """The records that are there, by id."""
        found = {session_id: await self.get(session_id) for session_id in session_ids}
        return {session_id: data for session_id, data in found.items() if data is not None}

    async def set_batch(self, records: Mapping[str, SessionData], ttl: float | None = None) -> int:
        """`set` for many; how many were stored. Nothing is stored where one of them cannot be."""
        for session_id, data in records.items():
            self._check(session_id, data, ttl)
            encode_checked(data)
        return sum([await self.set(session_id, data, ttl) for session_id, data in records.items()])

    async def delete_batch(self, session_ids: Iterable[str]) -> int:
        """`delete` for many; how many were there."""
        return sum([await self.delete(session_id) for session_id in session_ids])

    async def find(self, criteria: SessionFilter, limit: int | None = None) -> list[SessionData]:
        """The records that match, at most `limit`."""
        found: list[SessionData] = []
        for session_id in await self.list_active():
            if limit is not None and len(found) >= limit:
                break
            data = await self.get(session_id)
            if data is not None and criteria.matches(data):
                found.append(data)
        return found

    async def list_for_user(self, user_id: str) -> list[SessionData]:
        """Every session in which `user_id` is signed in: a device list."""
        return await self.find(SessionFilter(user_id=user_id))

    async def delete_for_user(self, user_id: str, keep: str | None = None) -> int:
        """Sign a user out everywhere but in the session `keep`; how many sessions ended."""
        sessions = await self.list_for_user(user_id)
        return await self.delete_batch([data.session_id for data in sessions if data.session_id != keep])

    async def get_metrics(self) -> SessionMetrics:
        """Figures over the active sessions; response times are those of this process's middleware."""
        sessions = await self.find(SessionFilter())
        return SessionMetrics(
            total_messages=sum(data.message_count for data in sessions),
            avg_response_time=self._response_seconds / self._responses if self._responses else 0.0,
            escalation_rate=sum(data.escalated for data in sessions) / len(sessions) if sessions else 0.0,
            active_sessions=len(sessions),
        )

    async def get_stats(self) -> dict[str, Any]:
        """Counters of this store object, for a dashboard."""
        return {"active_sessions": await self.count_active()}

    async def health_check(self) -> dict[str, Any]:
        """Write, read and delete a probe: `healthy`, `operations`, and `stats` or `error`; leaves nothing."""
        probe = self.model.model_construct(session_id=f"health-{new_session_id()}")
        operations = {"set": False, "get": False, "delete": False}
        try:
            operations["set"] = await self.set(probe.session_id, SessionData(session_id=probe.session_id), 60)
            operations["get"] = await self.exists(probe.session_id)
            operations["delete"] = await self.delete(probe.session_id)
            stats = await self.get_stats()
        except SessionStoreError as error:
            return {"healthy": False, "operations": operations, "error": str(error)}
        return {"healthy": all(operations.values()), "operations": operations, "stats": stats}

    @asynccontextmanager
    async def transaction(self, session_id: str) -> AsyncIterator[SessionData | None]:
        """Take a turn: lock, load, yield the record (None where absent), commit what changed, release.

        An exception in the block rolls everything back. In the request that holds the same session the
        block acts on the record it holds, which is stored with the request. `LockTimeoutError` when the
        turn does not come within `lock_wait`; `SessionConflictError` or `LockLostError` when a writer that
        did not wait came first: nothing is stored then.
        """
        held = held_session(self, session_id)
        if held is not None:
            with held.savepoint() as data:
                yield data
            return
        self._check_id(session_id)
        taken = await self.checkout(session_id, self.lock_policy or LockPolicy(), None)
        if not isinstance(taken, Checkout):
            yield None
            return
        try:
            data = self.read(taken.record)
            user_id = data.user_id
            yield data
            if encode(data) != taken.record:
                stamp(data)
                record = encode_checked(data)
                if data.user_id is not None and data.user_id != user_id:
                    await self.link_user(data.user_id, session_id, Lifetime(absolute=taken.expires_in))
                raise_for(await self.commit(taken, record, release=True))
        finally:
            if taken.token is not None:
                await self.release(taken)

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
                return Missing.RETIRED if self._is_retired(session_id) else Missing.ABSENT
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
                    self._retired[checkout.session_id] = time.monotonic() + RETIRED_FOR
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

    def __init__(self) -> None:
        self._locks = LocalLocks()
        self._retired: dict[str, float] = {}
        self._responses = 0
        self._response_seconds = 0.0

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
            name = self.model.__name__
            raise SessionStoreError(f"the record cannot be read as {name}; it is left as it is") from error

    def note_response(self, seconds: float) -> None:
        """Count a request's duration for `get_metrics`."""
        self._responses += 1
        self._response_seconds += seconds

    def _check_id(self, session_id: str) -> None:
        if not is_identifier(session_id):
            raise ValueError("a session id has 1 to 255 printable characters, no quotes and no spaces")

    def _check(self, session_id: str, data: SessionData, ttl: float | None) -> None:
        self._check_id(session_id)
        if data.session_id != session_id:
            raise ValueError("the data belong to another session: data.session_id differs from the id")
        if ttl is not None and not ttl > 0:
            raise ValueError("ttl is a number of seconds above 0; use delete() to end a session")

    def _is_retired(self, session_id: str) -> bool:
        now = time.monotonic()
        for known, until in list(self._retired.items()):
            if until > now:
                break
            del self._retired[known]
        return session_id in self._retired

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


def apply_updates(data: SessionData, updates: Mapping[str, Any]) -> None:
    """Set model fields by assignment (validated) and put everything else into the metadata."""
    fields = type(data).model_fields
    if updates.get("session_id", data.session_id) != data.session_id:
        raise ValueError("a record keeps its session_id; Session.regenerate_id() gives a new one")
    for name, value in updates.items():
        if name in fields:
            setattr(data, name, value)
        else:
            data.metadata[name] = value


def add_to_field(data: SessionData, field: str, delta: int) -> int:
    """Add `delta` to a number in a model field or else in the metadata and return the sum."""
    in_model = field in type(data).model_fields
    value = getattr(data, field) if in_model else data.metadata.get(field, 0)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise SessionDataError(field if in_model else f"metadata.{field}", "is not a number")
    total: int = value + delta  # type: ignore[assignment]  # a float stays one, as in Redis' own counters
    if in_model:
        setattr(data, field, total)
    else:
        data.metadata[field] = total
    return total


def _digest(record: bytes) -> str:
    return hashlib.sha256(record).hexdigest()
