"""Sessions in Redis or Valkey, shared by any number of processes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from contextlib import aclosing
from typing import Any

from ...errors import SessionStoreError
from ...record.model import M, SessionData
from ...record.values import check_id
from ..checkout import Checkout, Lifetime, LockPolicy, Missing, Outcome
from ..contract import SessionStore
from .commands.commands import CHUNK
from .commands.header import FOREIGN, unpack
from .commands.keys import KeySpace
from .connection.call import forget
from .connection.deployment import Client, deployment
from .connection.replies import Reply
from .event_loop import LoopState, LoopStates
from .records.index import Link

LEFT_ABSENT, CREATED = 2, 3  # replies of set.lua
_STORED = Outcome.STORED  # bound once: looking up an Enum's member is slow on Python 3.11


class RedisSessionStore(SessionStore[M]):
    """Sessions in Redis >= 6.2 or Valkey: one node, Sentinel or a cluster, through redis-py.

    `client_or_url` is a `redis.asyncio` client, which serves as a description (its connections are not
    used), or a URL: redis:// or valkey://, with TLS rediss:// or valkeys://; unix://;
    redis+sentinel://host:port,host:port/service; redis+cluster://host:port,host:port; the last two with TLS
    as rediss+…. `prefix` begins every key. `default_ttl` (seconds) is for records that are
    stored without a ttl. `socket_timeout` (seconds) is the longest that any call takes; None: what the
    client or the URL says, else 5.

    For speed the store takes over the bytes of redis-py's connections, by private parts of redis-py. Where a
    release of redis-py has other parts, it uses redis-py's public coroutines by itself;
    `take_over_connections=False` makes it do so always.

    One object serves any number of event loops, one after the other or in several threads, on asyncio. The
    leases of what is checked out are renewed by themselves.
    """

    def __init__(
        self,
        client_or_url: Client | str,
        prefix: str = "session:",
        default_ttl: float = 3600,
        *,
        model: type[M] = SessionData,  # type: ignore[assignment]  # the default of M
        socket_timeout: float | None = None,
        take_over_connections: bool = True,
        encryption_keys: Sequence[str | bytes] = (),
    ) -> None:
        super().__init__()
        self.encrypt(encryption_keys)
        if not default_ttl > 0:
            raise ValueError("default_ttl is a number of seconds above 0")
        self.prefix = prefix
        self.default_ttl = default_ttl
        self.model = model
        keys = KeySpace(prefix)
        described = deployment(client_or_url, socket_timeout, take_over=take_over_connections)
        self._states = LoopStates(described, keys)

    # -- request operations: see RequestOperations ----------------------------------------------------------

    async def checkout(
        self, session_id: str, lock: LockPolicy | None, lifetime: Lifetime | None, *, passive: bool = False
    ) -> Checkout | Missing:
        state = self._states.here() or await self._states.get()
        return await state.checkouts.take(session_id, lock, lifetime, passive)

    async def keep_alive(self, checkout: Checkout) -> None:
        state = self._states.here() or await self._states.get()
        state.checkouts.keep_alive(checkout)

    async def arrived(self, checkout: Checkout) -> None:
        await (await self._states.get()).checkouts.arrived(checkout)

    async def create(
        self,
        session_id: str,
        record: bytes,
        lifetime: Lifetime,
        lock: LockPolicy | None,
        user: str | None = None,
    ) -> Checkout | None:
        """See `RequestOperations.create`; the link to `user` comes second, as nobody knows the id yet."""
        state = self._states.here() or await self._states.get()
        created = await state.checkouts.create(session_id, record, lifetime, lock)
        if created is not None and user is not None:
            try:
                await state.index.link(user, session_id, lifetime.absolute)
            except BaseException:
                _take_back(state, created, user)
                raise
        return created

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
        """Store the record under a new id and retire the one that was checked out.

        First the new record, then its link, then the old one's removal. A process that dies in between leaves
        the old session whole and linked, and beside it at most a record whose id nobody was told; a sign-out
        takes both. GONE, too, where a sign-out has begun: then the old session ends. A fault during the
        removal leaves `checkout.successor`, without a lock, and nobody knows whether the old record is there.
        """
        state = await self._states.get()
        absolute = checkout.expires_in if lifetime is None else lifetime.absolute
        created = await state.checkouts.create(session_id, record, lifetime, lock, checkout)
        if created is None:
            return Outcome.CONFLICT
        try:
            since = await state.index.succeed(checkout.session_id, session_id, was, user, absolute)
        except BaseException:
            _take_back(state, created, user)
            raise
        if since is None:  # being ended, or the link was lost: the session must not move
            await asyncio.wait(_take_back(state, created, user))
            outcome = await state.checkouts.discard(checkout)
            return Outcome.GONE if outcome is _STORED else outcome
        outcome = await state.checkouts.retire(checkout, created, leads)
        if outcome is not _STORED:
            await asyncio.wait(_take_back(state, created, user))
        elif was is not None:
            state.index.unlink(was, Link(checkout.session_id, since))
        return outcome

    async def commit(self, checkout: Checkout, record: bytes, *, release: bool) -> Outcome:
        state = self._states.here() or await self._states.get()
        return await state.checkouts.commit(checkout, record, release)

    async def commit_unlocked(self, checkout: Checkout, record: bytes) -> Outcome:
        state = self._states.here() or await self._states.get()
        return await state.checkouts.commit_unlocked(checkout, record)

    async def bound(self, checkout: Checkout, lifetime: Lifetime) -> Outcome:
        return await (await self._states.get()).checkouts.bound(checkout, lifetime)

    async def successor_of(self, session_id: str) -> str | None:
        return await (await self._states.get()).checkouts.successor_of(session_id)

    async def discard(self, checkout: Checkout) -> Outcome:
        return await (await self._states.get()).checkouts.discard(checkout)

    async def release(self, checkout: Checkout) -> None:
        if checkout.token is not None:
            state = self._states.here() or await self._states.get()
            await state.checkouts.release(checkout)

    async def renew(self, checkouts: Sequence[Checkout]) -> list[bool]:
        """Prolong the leases now; False for each that was lost. The heartbeat does so by itself."""
        return await (await self._states.get()).checkouts.renew(checkouts)

    async def until_ended(self, session_id: str) -> None:
        """See `SessionStore.until_ended`; all processes are told at once, where Redis allows to publish."""
        check_id(session_id)
        await (await self._states.get()).endings.wait(session_id)

    async def link_user(self, user_id: str, session_id: str, lifetime: Lifetime) -> None:
        await (await self._states.get()).index.link(user_id, session_id, lifetime.absolute)

    # -- single records and batches: one round trip, some more to write where users are to be linked --------

    async def get(self, session_id: str) -> M | None:
        """The record, None where it is absent; `SessionStoreError` where something else lies there."""
        check_id(session_id)
        value = await (await self._states.get()).records.value(session_id)
        return None if value is None else self._own(session_id, value)

    async def get_batch(self, session_ids: Iterable[str]) -> dict[str, M | None]:
        wanted = list(session_ids)
        for session_id in wanted:
            check_id(session_id)
        found = await (await self._states.get()).records.values(wanted)
        return {
            name: None if value is None else self._own(name, value)
            for name, value in zip(wanted, found, strict=True)
        }

    async def exists(self, session_id: str) -> bool:
        """Whether anything lies under this id."""
        check_id(session_id)
        return await (await self._states.get()).records.exists(session_id)

    async def set(
        self, session_id: str, data: SessionData, ttl: float | None = None, *, create: bool = True
    ) -> bool:
        return (await self._set({session_id: data}, ttl, create))[session_id]

    async def set_batch(
        self, records: Mapping[str, SessionData], ttl: float | None = None
    ) -> dict[str, bool]:
        return await self._set(records, ttl, True)

    async def _set(
        self, records: Mapping[str, SessionData], ttl: float | None, create: bool
    ) -> dict[str, bool]:
        """Links come first: a process that dies in between leaves one that leads to nothing of the user's.

        The link of a record that was not there comes once more: a sign-out may have seen that it was not.
        """
        for session_id, data in records.items():
            self.check(session_id, data, ttl)
        encoded = {session_id: self.encode(data) for session_id, data in records.items()}
        state = await self._states.get()
        users = {
            name: self.name_of(data.user_id) for name, data in records.items() if data.user_id is not None
        }
        await state.index.link_all(users, ttl)
        replies = await state.records.write(encoded, ttl, self.default_ttl, create)
        created = {name: user_id for name, user_id in users.items() if replies[name] == CREATED}
        await state.index.link_all(created, ttl, tidy=False)
        if 0 in replies.values():
            raise SessionStoreError(FOREIGN)
        return {name: reply != LEFT_ABSENT for name, reply in replies.items()}

    async def delete(self, session_id: str) -> bool:
        return (await self.delete_batch([session_id]))[session_id]

    async def delete_batch(self, session_ids: Iterable[str]) -> dict[str, bool]:
        ids = list(dict.fromkeys(session_ids))
        replies = await (await self._states.get()).records.delete(ids)
        if b"X" in replies:
            raise SessionStoreError(FOREIGN)
        return {name: reply == b"STORED" for name, reply in zip(ids, replies, strict=True)}

    # -- all records: others have their turn after each step ------------------------------------------------

    async def iter_active(self) -> AsyncGenerator[str, None]:
        """The ids of the records that are not absent; see `Records.ids`."""
        async with aclosing((await self._states.get()).records.ids()) as pages:
            async for ids in pages:
                for session_id in ids:
                    yield session_id

    async def list_active(self, limit: int | None = None, offset: int = 0) -> list[str]:
        end = None if limit is None else offset + limit
        found: set[str] = set()
        async for ids in (await self._states.get()).records.ids():
            found.update(ids)
            if end is not None and len(found) > 2 * end + CHUNK:
                found = set(sorted(found)[:end])
        return sorted(found)[offset:end]

    async def count_active(self) -> int:
        """How many records are not absent; one that `iter_active` gives twice counts twice."""
        return sum([len(ids) async for ids in (await self._states.get()).records.ids()])

    async def get_stats(self) -> dict[str, Any]:
        """What lies in Redis. Expired records are none: Redis drops them by itself.

        `locks_waited_for` counts those that another process waits for than the one that holds them.
        """
        sessions, held, waited_for = await (await self._states.get()).records.counts()
        return {
            **self._facts(),
            "total_sessions": sessions,
            "active_sessions": sessions,
            "expired_sessions": 0,
            "locks_held": held,
            "locks_waited_for": waited_for,
        }

    async def cleanup_expired(self) -> int:
        """0: Redis drops what has expired by itself."""
        return 0

    async def _iter_stored(self) -> AsyncGenerator[bytes, None]:
        """Every record as it is stored; see `iter_active`."""
        records = (await self._states.get()).records
        async with aclosing(records.ids()) as pages:
            async for ids in pages:
                async for record in records.stored(ids):
                    yield record

    # -- the sessions of a user -----------------------------------------------------------------------------

    async def _records_of(self, user: str) -> AsyncGenerator[bytes, None]:
        state = await self._states.get()
        members = [await state.index.members(name) for name in (self.names_of(user) if user else [])]
        async with aclosing(state.records.stored(sorted(set().union(*members)))) as records:
            async for record in records:
                yield record

    async def _end_all_named(self, names: Sequence[str], keep: str | None) -> int:
        """See `SessionStore.delete_for_user`.

        `keep` is ended too where an earlier call that did not keep it was cut off. `SessionStoreError` where
        something cannot be told to be a session or not: all others have ended then, and that one can no
        longer get a new id.
        """
        return await (await self._states.get()).index.end(names, keep)

    async def end_surplus(self, user: str, most: int, keep: str) -> list[str]:
        return await (await self._states.get()).index.end_surplus(user, most, keep)

    # -- life of the store itself ---------------------------------------------------------------------------

    async def open(self) -> None:
        await self._states.get()

    async def aclose(self) -> None:
        await self._states.aclose()

    def _facts(self) -> dict[str, Any]:
        return {"store_type": "redis", "default_ttl": self.default_ttl, "prefix": self.prefix}

    def _own(self, session_id: str, value: bytes) -> M:
        """What a value says of this session; `SessionStoreError` where it is no record, or of another one."""
        data = self.read(unpack(value).record)
        if data.session_id != session_id:
            raise SessionStoreError(FOREIGN)
        return data


def _take_back(state: LoopState, created: Checkout, user: str | None) -> list[asyncio.Future[Reply]]:
    """Remove a record whose id nobody was told, and its link; on its way, whether it is waited for or not."""
    calls = [state.checkouts.remove(created)]
    if user is not None:
        calls.append(state.index.withdraw(user, created.session_id))
    for call in calls:
        call.add_done_callback(forget)
    return calls
