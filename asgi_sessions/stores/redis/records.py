"""The record operations on Redis: what users call, without a lock."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

from ...data import SessionData, SessionFilter
from ...errors import SessionStoreError
from ...fields import check_id, is_identifier
from ...record import encode_checked
from ..base import SessionStore
from ..checkout import Lifetime
from .connections import Client, deployment
from .engine import Engine, Engines
from .layout import KeySpace, milliseconds, unpack
from .names import new_nonce
from .replies import Reply, are_records, is_list, is_number, is_record, mark_of
from .scripts import LINK, REMOVE, SET, UNLINK, pack_args
from .transport import Lane

LINKED_FOR = 400 * 86400.0  # seconds; no browser keeps a cookie for longer (RFC 6265bis §5.6.2)
LINK_SETTLES = 60.0  # seconds in which the record of a new link must come
TIDY_EVERY = 32  # links of one user; somebody who signs in for years leaves no endless list
CHUNK = 500  # records asked for in one command, keys looked at in one step of a scan
FOREIGN = "what lies under this id is not a session record; it is left alone"


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
        self._engines = Engines(deployment(client_or_url, socket_timeout), self._keys.prefix)

    # -- single records and batches: a batch is one round trip ---------------------------------------------

    async def get(self, session_id: str) -> SessionData | None:
        """The record, None where it is absent; `SessionStoreError` where something else lies there."""
        record = self._record_key(session_id)
        engine = await self._engines.get()
        reply = engine.command(b"GET", record, about=mark_of(session_id), fits=is_record)
        value = cast("bytes | None", await reply)
        return None if value is None else self._own(session_id, value)

    async def get_batch(self, session_ids: Iterable[str]) -> dict[str, SessionData]:
        wanted = list(session_ids)
        values = await self._values(wanted)
        found = {name: value for name, value in zip(wanted, values, strict=True) if value is not None}
        return {name: self._own(name, value) for name, value in found.items()}

    async def exists(self, session_id: str) -> bool:
        """Whether anything lies under this id."""
        record = self._record_key(session_id)
        engine = await self._engines.get()
        return await engine.command(b"EXISTS", record, fits=is_number) == 1

    async def set(self, session_id: str, data: SessionData, ttl: float | None = None) -> bool:
        return await self.set_batch({session_id: data}, ttl) == 1

    async def set_batch(self, records: Mapping[str, SessionData], ttl: float | None = None) -> int:
        for session_id, data in records.items():
            self.check(session_id, data, ttl)
        encoded = {session_id: encode_checked(data) for session_id, data in records.items()}
        engine = await self._engines.get()
        users = [(data.user_id, name) for name, data in records.items() if data.user_id is not None]
        links = [self._link(engine, user_id, name, ttl) for user_id, name in users]
        times = milliseconds(ttl), milliseconds(self.default_ttl)
        writes = [
            engine.run(SET, self._keys.record(name), new_nonce(), record, *times)
            for name, record in encoded.items()
        ]
        replies = await asyncio.gather(*writes, *links)
        if 0 in replies[: len(writes)]:
            raise SessionStoreError(FOREIGN)
        return len(writes)

    async def delete(self, session_id: str) -> bool:
        return await self.delete_batch([session_id]) == 1

    async def delete_batch(self, session_ids: Iterable[str]) -> int:
        keys = [self._keys.of(session_id) for session_id in session_ids]
        engine = await self._engines.get()
        args = pack_args(b"", b"", b"0", engine.unlocked.claim_ms, engine.clustered, b"")
        calls = [engine.call(REMOVE, each.record, REMOVE.by_sha + each.packed + args) for each in keys]
        for each in keys:
            engine.queues.dismiss(each)
        replies = await asyncio.gather(*calls)
        if b"X" in replies:
            raise SessionStoreError(FOREIGN)
        return replies.count(b"STORED")

    # -- many records ---------------------------------------------------------------------------------------

    async def list_active(self, limit: int | None = None, offset: int = 0) -> list[str]:
        found = sorted(await self._scan())
        return found[offset : None if limit is None else offset + limit]

    async def count_active(self) -> int:
        return len(await self._scan())

    async def find(self, criteria: SessionFilter, limit: int | None = None) -> list[SessionData]:
        """The records that match, at most `limit`; what cannot be read is left out."""
        found: list[SessionData] = []
        ids = await self.list_active()
        for start in range(0, len(ids), CHUNK):
            if limit is not None and len(found) >= limit:
                break
            found += [
                data for data in await self._readable(ids[start : start + CHUNK]) if criteria.matches(data)
            ]
        return found[:limit]

    async def list_for_user(self, user_id: str) -> list[SessionData]:
        if not user_id:
            return []
        engine = await self._engines.get()
        reply = await engine.command(b"ZRANGE", self._keys.user(user_id), b"0", b"-1", fits=is_list)
        linked = sorted(member.decode() for member in cast("list[bytes]", reply))
        found = [data for data in await self._readable(linked) if data.user_id == user_id]
        stale = set(linked) - {data.session_id for data in found}
        age = milliseconds(LINK_SETTLES)
        key = self._keys.user(user_id)
        await asyncio.gather(*[engine.run(UNLINK, key, name.encode(), age) for name in stale])
        return found

    async def link_user(self, user_id: str, session_id: str, lifetime: Lifetime) -> None:
        engine = await self._engines.get()
        linked = await self._link(engine, user_id, session_id, lifetime.absolute)
        if cast(int, linked) % TIDY_EVERY == 0:
            await self.list_for_user(user_id)

    async def get_stats(self) -> dict[str, Any]:
        engine = await self._engines.get()
        return {
            "active_sessions": await self.count_active(),
            "locked_sessions": len(engine.leases),  # by this event loop
            "default_ttl": self.default_ttl,
            "prefix": self.prefix,
        }

    # -- life of the store itself ---------------------------------------------------------------------------

    async def open(self) -> None:
        await self._engines.get()

    async def aclose(self) -> None:
        await self._engines.aclose()

    # -- inside ---------------------------------------------------------------------------------------------

    def _record_key(self, session_id: str) -> bytes:
        check_id(session_id)
        return self._keys.record(session_id)

    def _link(
        self, engine: Engine, user_id: str, session_id: str, absolute: float | None
    ) -> asyncio.Future[Reply]:
        """Without an absolute bound nobody knows how long the session lives on: the link must outlive it."""
        ttl = milliseconds(LINKED_FOR if absolute is None else absolute + LINK_SETTLES)
        return engine.run(LINK, self._keys.user(user_id), session_id.encode(), ttl)

    async def _values(self, session_ids: Sequence[str]) -> list[bytes | None]:
        """What lies under each id, None where that is nothing or no text. One round trip."""
        keys = [self._record_key(session_id) for session_id in session_ids]
        marks = tuple(map(mark_of, session_ids))
        engine = await self._engines.get()
        size = 1 if engine.router.clustered else CHUNK
        parts = [slice(start, start + size) for start in range(0, len(keys), size)]
        replies = await asyncio.gather(
            *[engine.command(b"MGET", *keys[part], about=marks[part], fits=are_records) for part in parts]
        )
        return [value for reply in replies for value in cast("list[bytes | None]", reply)]

    async def _readable(self, session_ids: Sequence[str]) -> list[SessionData]:
        found: list[SessionData] = []
        for session_id, value in zip(session_ids, await self._values(session_ids), strict=True):
            if value is not None:
                with contextlib.suppress(
                    SessionStoreError
                ):  # not ours, or of another model: not for this list
                    found.append(self._own(session_id, value))
        return found

    def _own(self, session_id: str, value: bytes) -> SessionData:
        """What a value says of this session; `SessionStoreError` where it is no record, or of another one."""
        data = self.read(unpack(value).record)
        if data.session_id != session_id:
            raise SessionStoreError(FOREIGN)
        return data

    async def _scan(self) -> list[str]:
        """The ids of all records, each once: SCAN may give a key twice."""
        engine = await self._engines.get()
        lanes = await engine.router.primaries()
        found = await asyncio.gather(*[self._scan_node(lane) for lane in lanes])
        return list(dict.fromkeys(name for names in found for name in names if is_identifier(name)))

    async def _scan_node(self, lane: Lane) -> list[str]:
        cursor = b"0"
        names: list[str] = []
        options = (b"MATCH", self._keys.pattern, b"COUNT", b"%d" % CHUNK, b"TYPE", b"string")
        while True:
            reply = await lane.command(b"SCAN", cursor, *options, fits=is_list)
            cursor, keys = cast("tuple[bytes, list[bytes]]", reply)
            names += [self._keys.session_id(key) for key in keys]
            if cursor == b"0":
                return names
