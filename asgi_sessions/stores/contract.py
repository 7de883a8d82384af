"""What a store promises: `SessionStore`, with the operations on records that users call.

A record is stored under a session id. It is *absent* where it was never stored, was deleted or has expired;
the store's clock alone decides that. `create` never overwrites, and `commit` never creates. Absence is a
value; a fault of the backend is a `SessionStoreError`. To change what a store returns changes nothing in it.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager, suppress
from operator import attrgetter
from typing import Any
from uuid import UUID

from ..errors import SessionStoreError
from ..record.codec import counts_of, encode, user_of
from ..record.model import M, SessionData, stamp
from ..record.queries import SessionFilter, SessionMetrics
from ..record.sighting import Sighting, sighting_of
from ..record.values import check_id, new_session_id, user_text
from ..record.vault import NoKeyError
from .checkout import Checkout, Lifetime, LockPolicy, raise_for
from .checkouts import RequestOperations
from .running import holder_of
from .updates import add_to_field, apply_updates
from .value import Value

_logger = logging.getLogger("asgi_sessions")


class SessionStore(RequestOperations[M]):
    """Keeps session records. A store of your own implements four primitives and calls `super().__init__()`.

    `read_value`, `write_value` and `delete_value` move bytes that only this package reads; `iter_ids` lists
    the ids. This class does the rest: sessions are locked within the process, no acknowledged change of this
    process is lost, and what has ended does not come back. Stores for several processes override the request
    operations with atomic ones.
    """

    async def list_active(self, limit: int | None = None, offset: int = 0) -> list[str]:
        """The ids of the records that are not absent, sorted; `limit=0` gives none."""
        found = sorted([session_id async for session_id in self.iter_active()])
        return found[offset : None if limit is None else offset + limit]

    async def count_active(self) -> int:
        """How many records are not absent."""
        count = 0
        async for _ in self.iter_active():
            count += 1
        return count

    async def update(self, session_id: str, updates: Mapping[str, Any], atomic: bool = False) -> bool:
        """Change some values and keep the TTL; False where the record is absent.

        The name of a model field sets that field, which is validated; any other goes to the metadata. All
        updates are stored or none. Takes the lock as a request does: atomic, whatever `atomic` says.
        """
        async with self.transaction(session_id) as data:
            if data is not None:
                apply_updates(data, updates)
        return data is not None

    async def increment_counter(self, session_id: str, field: str, delta: int = 1) -> int:
        """Add to a number, atomically against every other writer, and return the sum.

        A name that is no model field counts in the metadata, from 0. `SessionDataError` where the field is no
        number. Where the record is absent: 0, and a warning in the log.
        """
        async with self.transaction(session_id) as data:
            if data is not None:
                return add_to_field(data, field, delta)
        _logger.warning("increment_counter(%r): the session does not exist, so nothing was counted", field)
        return 0

    async def touch(self, session_id: str) -> bool:
        """Set `last_activity` to now and restart the idle timeout; False where absent."""
        async with self._turn(session_id, active=True) as data:
            if data is not None:
                data.update_activity()
        return data is not None

    async def get_or_create(
        self,
        session_id: str,
        factory: Callable[[str], M] | None = None,
        ttl: float | None = None,
    ) -> M:
        """The record, made by `factory(session_id)` where absent. Concurrent callers get the same one."""
        while True:
            existing = await self.get(session_id)
            if existing is not None:
                return existing
            fresh: M = factory(session_id) if factory else self.model(session_id=session_id)  # type: ignore[assignment]  # M's class
            self.check(session_id, fresh, ttl)
            lifetime = Lifetime(absolute=self.default_ttl if ttl is None else ttl)
            if await self.create(session_id, self.encode(fresh), lifetime, None, self._name_in(fresh)):
                return fresh

    async def get_batch(self, session_ids: Iterable[str]) -> dict[str, M | None]:
        """The record of each id, None where it is absent."""
        return {session_id: await self.get(session_id) for session_id in session_ids}

    async def set_batch(
        self, records: Mapping[str, SessionData], ttl: float | None = None
    ) -> dict[str, bool]:
        """`set` for many: whether each was stored. Where one of them cannot be, none is."""
        for session_id, data in records.items():
            self.check(session_id, data, ttl)
            self.encode(data)
        return {session_id: await self.set(session_id, data, ttl) for session_id, data in records.items()}

    async def delete_batch(self, session_ids: Iterable[str]) -> dict[str, bool]:
        """`delete` for many: whether each was there."""
        return {session_id: await self.delete(session_id) for session_id in session_ids}

    async def find(self, criteria: SessionFilter, limit: int | None = None) -> list[M]:
        """The records that match, at most any `limit` of them, sorted by session id.

        Records that the model cannot read are left out.
        """
        found: dict[str, M] = {}
        if limit == 0:
            return []
        async with aclosing(self._iter_stored()) as records:
            async for record in records:
                with suppress(SessionStoreError):  # of another model: not for a list
                    data = self.read(record)
                    if criteria.matches(data):
                        found[data.session_id] = data
                if len(found) == limit:
                    break
        return [found[session_id] for session_id in sorted(found)]

    async def list_for_user(self, user_id: str | int | UUID) -> list[M]:
        """Every session in which `user_id` is signed in, as for a list of devices; [] for None and "".

        A number or a UUID counts as its text, as in `login()`. Records that the model cannot read are left
        out.
        """
        user = user_text(user_id) if user_id is not None else ""
        found: list[M] = []
        async with aclosing(self._records_of(user)) as records:
            async for record in records:
                with suppress(SessionStoreError):  # of another model: not for a list
                    found.append(self.read(record))
        return sorted((data for data in found if data.user_id == user), key=attrgetter("session_id"))

    async def iter_for_user(self, user_id: str | int | UUID) -> AsyncGenerator[Sighting, None]:
        """What is known of each session of a user, without its values, in any order and in constant memory.

        Use it within `contextlib.aclosing`. Records that no key here opens are left out.
        """
        user = user_text(user_id) if user_id is not None else ""
        async with aclosing(self._records_of(user)) as records:
            async for record in records:
                with suppress(NoKeyError):
                    found = sighting_of(self._plain(record))
                    if found is not None and found.user_id == user:
                        yield found

    async def delete_for_user(self, user_id: str | int | UUID, keep: str | None = None) -> int:
        """Sign a user out everywhere but in the session `keep`; how many sessions this call ended.

        Ends every session of this user at the time of the call, also one that is about to get a new id and
        one that the model cannot read. 0 for None and "".
        """
        user = user_text(user_id) if user_id is not None else ""
        names = self.names_of(user) if user else ()
        return await self._end_all_named(names, keep) if user else 0

    async def _end_all_named(self, names: Sequence[str], keep: str | None) -> int:
        """End all sessions of a user who is known by these names. Another process may give the session of
        one the other meanwhile, each in its turn: stores for several processes end all in one step.
        """
        return sum([await self._end_all_of(name, keep) for name in names])

    def _name_in(self, data: SessionData) -> str | None:
        return None if data.user_id is None else self.name_of(data.user_id)

    async def _records_of(self, user: str) -> AsyncGenerator[bytes, None]:
        """The records in which this user may be signed in, as they are stored; none for ""."""
        names = self.names_of(user)
        if not user:
            return
        async with aclosing(self._iter_stored()) as records:
            async for record in records:
                if user_of(record) in names:
                    yield record

    async def get_metrics(self) -> SessionMetrics:
        """Figures about the active sessions. Response times are those of this process."""
        sessions = messages = escalated = 0
        async for record in self._iter_stored():
            counted, is_escalated = counts_of(record)
            sessions += 1
            messages += counted
            escalated += is_escalated
        return SessionMetrics(
            total_messages=messages,
            avg_response_time=self._response_seconds / self._responses if self._responses else 0.0,
            escalation_rate=escalated / sessions if sessions else 0.0,
            active_sessions=sessions,
        )

    async def get_stats(self) -> dict[str, Any]:
        """Figures for a dashboard: sessions, and locks that are held and waited for."""
        active = await self.count_active()
        return {
            **self._facts(),
            "total_sessions": active,
            "active_sessions": active,
            "expired_sessions": 0,
            **self._locks.counts(),
        }

    async def health_check(self) -> dict[str, Any]:
        """Write, read and delete a probe: `healthy`, `operations`, and `stats` or `error`.

        Leaves nothing behind, and makes the same few calls however many sessions there are.
        """
        probe = SessionData(session_id=f"health-{new_session_id()}")
        operations = {"set": False, "get": False, "delete": False}
        try:
            operations["set"] = await self.set(probe.session_id, probe, 60)
            operations["get"] = await self.exists(probe.session_id)
            operations["delete"] = await self.delete(probe.session_id)
        except SessionStoreError as error:
            return {"healthy": False, "operations": operations, "error": str(error)}
        return {"healthy": all(operations.values()), "operations": operations, "stats": self._facts()}

    def _facts(self) -> dict[str, Any]:
        """What is known without asking the backend."""
        return {"store_type": type(self).__name__, "default_ttl": self.default_ttl}

    async def _iter_stored(self) -> AsyncGenerator[bytes, None]:
        """Every record as it is stored, one at a time."""
        async with aclosing(self.iter_ids()) as known:
            async for session_id in known:
                found = await self._primitives.find(session_id)
                if isinstance(found, Value):
                    yield found.record

    def transaction(self, session_id: str) -> AbstractAsyncContextManager[M | None]:
        """Lock, load, yield the record (None where absent), commit what changed, release.

        An exception in the block undoes its changes. In a request that holds the same session the block
        changes the request's own record, which is stored with the request; the record is absent once the app
        has ended the session. `LockTimeoutError` after `lock_wait` seconds. `SessionConflictError` or
        `LockLostError` where a writer that did not wait came first: nothing is stored then.
        """
        return self._turn(session_id)

    @asynccontextmanager
    async def _turn(self, session_id: str, active: bool = False) -> AsyncIterator[M | None]:
        """A transaction; one that is `active` restarts the idle timeout."""
        held = holder_of(self, session_id)
        if held is not None:
            async with held.part() as data:
                if not held.is_still(self, session_id):
                    yield None
                    return
                if active:
                    await held.keep_alive()
                yield data  # type: ignore[misc]  # of the middleware's model, which is the store's
            return
        check_id(session_id)
        policy = self.lock_policy or LockPolicy()
        taken = await self.checkout(session_id, policy, None, passive=True)
        if not isinstance(taken, Checkout):
            yield None
            return
        try:
            if active and taken.idle is not None:
                await self.keep_alive(taken)
            data = self.read(taken.record)
            was, before = user_of(taken.record), encode(data)
            yield data
            if encode(data) != before:
                self.check(session_id, data, None)  # under another session's id nobody could read it
                stamp(data)
                record = self.encode(data)
                user = self._name_in(data)
                if user is not None and user != was:  # somebody else, or known by another key from now on
                    await self.link_user(user, session_id, Lifetime(absolute=taken.expires_in))
                raise_for(await self.commit(taken, record, release=True))
        finally:
            if taken.token is not None:
                await self.release(taken)
