"""The record operations on Redis: what users call, without a lock."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from contextlib import aclosing, suppress
from typing import Any, cast

from ...errors import SessionStoreError
from ...record.codec import encode_checked
from ...record.model import SessionData
from ...record.values import check_id, is_identifier
from ..checkout import Lifetime
from ..contract import SessionStore
from .commands import CHUNK, remove, values
from .connections import Client, deployment
from .engine import Engine, Engines
from .index import UserIndex
from .layout import KeySpace, milliseconds, parse, unpack
from .names import new_nonce
from .replies import is_list, is_number, is_record, mark_of
from .scripts import SET

AT_ONCE = 100  # records that are read and parsed before others have their turn
FOREIGN = "what lies under this id is not a session record; it is left alone"
LEFT_ABSENT, CREATED = 2, 3  # replies of set.lua


class RedisRecords(SessionStore):
    """See `RedisSessionStore`."""

    def __init__(
        self,
        client_or_url: Client | str,
        prefix: str,
        default_ttl: float,
        model: type[SessionData],
        socket_timeout: float | None,
    ) -> None:
        super().__init__()
        if not default_ttl > 0:
            raise ValueError("default_ttl is a number of seconds above 0")
        self.prefix = prefix
        self.default_ttl = default_ttl
        self.model = model
        self._keys = KeySpace(prefix)
        self._index = UserIndex(self._keys)
        self._engines = Engines(deployment(client_or_url, socket_timeout), self._keys.prefix)

    # -- single records and batches: one round trip, some more to write where users are to be linked --------

    async def get(self, session_id: str) -> SessionData | None:
        """The record, None where it is absent; `SessionStoreError` where something else lies there."""
        check_id(session_id)
        engine = await self._engines.get()
        key = self._keys.record(session_id)
        reply = await engine.command(b"GET", key, about=mark_of(session_id), fits=is_record)
        return None if reply is None else self._own(session_id, cast(bytes, reply))

    async def get_batch(self, session_ids: Iterable[str]) -> dict[str, SessionData | None]:
        wanted = list(session_ids)
        for session_id in wanted:
            check_id(session_id)
        found = await values(await self._engines.get(), self._keys, wanted)
        return {
            name: None if value is None else self._own(name, value)
            for name, value in zip(wanted, found, strict=True)
        }

    async def exists(self, session_id: str) -> bool:
        """Whether anything lies under this id."""
        check_id(session_id)
        engine = await self._engines.get()
        return await engine.command(b"EXISTS", self._keys.record(session_id), fits=is_number) == 1

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
        """Links come first: who dies in between leaves one that leads to nothing of the user's.

        The link of a record that was not there comes once more: a sign-out may have seen that it was not.
        """
        for session_id, data in records.items():
            self.check(session_id, data, ttl)
        encoded = {session_id: encode_checked(data) for session_id, data in records.items()}
        engine = await self._engines.get()
        users = {name: data.user_id for name, data in records.items() if data.user_id is not None}
        await self._index.link_all(engine, users, ttl)
        rest = milliseconds(ttl), milliseconds(self.default_ttl), b"1" if create else b"0"
        writes = [
            engine.run(SET, self._keys.record(name), new_nonce(), record, *rest)
            for name, record in encoded.items()
        ]
        replies = dict(zip(encoded, await asyncio.gather(*writes), strict=True))
        created = {name: user_id for name, user_id in users.items() if replies[name] == CREATED}
        await self._index.link_all(engine, created, ttl, tidy=False)
        if 0 in replies.values():
            raise SessionStoreError(FOREIGN)
        return {name: reply != LEFT_ABSENT for name, reply in replies.items()}

    async def delete(self, session_id: str) -> bool:
        return (await self.delete_batch([session_id]))[session_id]

    async def delete_batch(self, session_ids: Iterable[str]) -> dict[str, bool]:
        ids = list(dict.fromkeys(session_ids))
        replies = await remove(await self._engines.get(), self._keys, ids)
        if b"X" in replies:
            raise SessionStoreError(FOREIGN)
        return {name: reply == b"STORED" for name, reply in zip(ids, replies, strict=True)}

    # -- all records: others have their turn after each step ------------------------------------------------

    async def iter_active(self) -> AsyncGenerator[str, None]:
        """The ids of the records that are not absent, in no order and in constant memory.

        What is there all the time comes at least once; twice where Redis resizes its table meanwhile (SCAN).
        """
        async with aclosing(self._pages(self._keys.pattern)) as pages:
            async for names in pages:
                for session_id in self._ids(names):
                    yield session_id

    async def list_active(self, limit: int | None = None, offset: int = 0) -> list[str]:
        end = None if limit is None else offset + limit
        found: set[str] = set()
        async for names in self._pages(self._keys.pattern):
            found.update(self._ids(names))
            if end is not None and len(found) > 2 * end + CHUNK:
                found = set(sorted(found)[:end])
        return sorted(found)[offset:end]

    async def count_active(self) -> int:
        """How many records are not absent; one that `iter_active` gives twice counts twice."""
        count = 0
        async for names in self._pages(self._keys.pattern):
            count += len(self._ids(names))
        return count

    async def get_stats(self) -> dict[str, Any]:
        """What lies in Redis. Expired records are none: Redis drops them by itself.

        `locks_waited_for` counts those that another process waits for than the one that holds them.
        """
        engine = await self._engines.get()
        sessions = held = waited_for = 0
        async for names in self._pages(self._keys.all_keys):
            sessions += len(self._ids(names))
            locks = [name for name in names if name.endswith(b"}:lock")]
            queues = [engine.command(b"EXISTS", name[: -len(b"lock")] + b"wait") for name in locks]
            held += len(locks)
            waited_for += (await asyncio.gather(*queues)).count(1)
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

    # -- the sessions of a user -----------------------------------------------------------------------------

    async def _sessions_of(self, user: str) -> list[SessionData]:
        engine = await self._engines.get()
        linked = await self._index.members(engine, user)
        found: list[SessionData] = []
        for start in range(0, len(linked), AT_ONCE):
            found += await self._readable(engine, linked[start : start + AT_ONCE])
        return [data for data in found if data.user_id == user]

    async def _end_all_of(self, user: str, keep: str | None) -> int:
        """See `SessionStore.delete_for_user`.

        `keep` is ended too where an earlier call that did not keep it was cut off. `SessionStoreError` where
        something cannot be told to be a session or not: all others have ended then, and that one can no
        longer get a new id.
        """
        return await self._index.end(await self._engines.get(), user, keep)

    async def link_user(self, user_id: str, session_id: str, lifetime: Lifetime) -> None:
        await self._index.link(await self._engines.get(), user_id, session_id, lifetime.absolute)

    # -- life of the store itself ---------------------------------------------------------------------------

    async def open(self) -> None:
        await self._engines.get()

    async def aclose(self) -> None:
        await self._engines.aclose()

    # -- inside ---------------------------------------------------------------------------------------------

    def _facts(self) -> dict[str, Any]:
        return {"store_type": "redis", "default_ttl": self.default_ttl, "prefix": self.prefix}

    def _ids(self, names: Iterable[bytes]) -> list[str]:
        """Of the records among these keys."""
        ids = [self._keys.session_id(name) for name in names if name.endswith(b"}")]
        return [session_id for session_id in ids if is_identifier(session_id)]

    async def _iter_stored(self) -> AsyncGenerator[bytes, None]:
        """Every record as it is stored; see `iter_active`."""
        engine = await self._engines.get()
        async with aclosing(self._pages(self._keys.pattern)) as pages:
            async for names in pages:
                ids = self._ids(names)
                for start in range(0, len(ids), AT_ONCE):
                    for record in await self._stored(engine, ids[start : start + AT_ONCE]):
                        yield record

    async def _stored(self, engine: Engine, session_ids: Sequence[str]) -> list[bytes]:
        """The records of these ids; what is none of ours is left out."""
        found = [parse(value) for value in await values(engine, self._keys, session_ids) if value is not None]
        return [stored.record for stored in found if stored is not None]

    async def _readable(self, engine: Engine, session_ids: Sequence[str]) -> list[SessionData]:
        found: list[SessionData] = []
        for record in await self._stored(engine, session_ids):
            with suppress(SessionStoreError):  # of another model: not for a list
                found.append(self.read(record))
        return found

    def _own(self, session_id: str, value: bytes) -> SessionData:
        """What a value says of this session; `SessionStoreError` where it is no record, or of another one."""
        data = self.read(unpack(value).record)
        if data.session_id != session_id:
            raise SessionStoreError(FOREIGN)
        return data

    async def _pages(self, pattern: bytes) -> AsyncGenerator[list[bytes], None]:
        """The keys, of texts only, as SCAN gives them: step by step, and some maybe twice."""
        engine = await self._engines.get()
        options = (b"MATCH", pattern, b"COUNT", b"%d" % CHUNK, b"TYPE", b"string")
        for lane in await engine.router.primaries():
            cursor = b""
            while cursor != b"0":
                reply = await lane.command(b"SCAN", cursor or b"0", *options, fits=is_list)
                cursor, names = cast("tuple[bytes, list[bytes]]", reply)
                yield names
