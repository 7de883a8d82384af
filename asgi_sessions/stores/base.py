"""What a store promises: the record operations that users call and the request operations of the walk.

A record lives under a session id. It is *absent* when it was never stored, was deleted or has expired; the
store's clock alone decides expiry. `create` never overwrites and `commit` never creates. Absence is a value,
a fault of the backend is a `SessionStoreError`. What a store returns is never shared with it: changing it
changes nothing.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from typing import Any

from ..data import SessionData, SessionFilter, SessionMetrics, stamp
from ..errors import SessionDataError, SessionStoreError
from ..fields import check_id, new_session_id
from ..record import encode, encode_checked
from ..session import held_session
from .checkout import Checkout, Lifetime, raise_for
from .local import LockPolicy
from .requests import RequestOperations

_PASSES = 10  # over a user's sessions, when signing out everywhere


class SessionStore(RequestOperations):
    """Keeps session records. A store of your own implements `get`, `set`, `delete` and `list_active`.

    The rest is derived from those four: sessions are then locked within the process, a commit compares the
    record before it writes, and each request of a session with an idle timeout writes its new TTL. Stores
    for more than one process override the request operations with atomic ones.
    """

    # -- record operations: derived -------------------------------------------------------------------

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
            self.check(session_id, fresh, ttl)
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
            self.check(session_id, data, ttl)
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
        """Every session in which `user_id` is signed in: a device list. Nobody (None, "") has none."""
        return await self.find(SessionFilter(user_id=user_id)) if user_id else []

    async def delete_for_user(self, user_id: str, keep: str | None = None) -> int:
        """Sign a user out everywhere but in the session `keep`; how many sessions ended.

        Looks again until there is none: a request under way may have given its session a new id meanwhile.
        """
        ended = 0
        for _ in range(_PASSES):
            known = [data.session_id for data in await self.list_for_user(user_id)]
            others = [session_id for session_id in known if session_id != keep]
            if not others:
                break
            ended += await self.delete_batch(others)
        return ended

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
        check_id(session_id)
        taken = await self.checkout(session_id, self.lock_policy or LockPolicy(), None)
        if not isinstance(taken, Checkout):
            yield None
            return
        try:
            data = self.read(taken.record)
            user_id = data.user_id
            yield data
            if encode(data) != taken.record:
                self.check(session_id, data, None)  # under another's id it could not be read any more
                stamp(data)
                record = encode_checked(data)
                if data.user_id is not None and data.user_id != user_id:
                    await self.link_user(data.user_id, session_id, Lifetime(absolute=taken.expires_in))
                raise_for(await self.commit(taken, record, release=True))
        finally:
            if taken.token is not None:
                await self.release(taken)


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
