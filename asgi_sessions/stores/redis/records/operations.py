"""The record operations of one event loop: reads, writes, deletes and scans, without a lock."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from contextlib import aclosing
from typing import cast

from ....record.values import is_identifier
from ...surplus import least
from ...tokens import new_nonce
from ..commands.commands import CHUNK, Commands
from ..commands.header import milliseconds, parse
from ..commands.keys import Keys, KeySpace
from ..commands.scripts import SET
from ..connection.replies import Reply, is_list, is_number, is_record, mark_of

_ABSENT = -2  # what PTTL says
AT_ONCE = 100  # records that are read and parsed before others have their turn


class Records:
    """The records of one store, as bytes. `on_deleted` is told of each that is being deleted."""

    def __init__(self, commands: Commands, keys: KeySpace, on_deleted: Callable[[Keys], None]) -> None:
        self._commands = commands
        self._keys = keys
        self._on_deleted = on_deleted

    async def value(self, session_id: str) -> bytes | None:
        """What lies under this id."""
        key, mark = self._keys.record(session_id), mark_of(session_id)
        return cast("bytes | None", await self._commands.command(b"GET", key, about=mark, fits=is_record))

    async def values(self, session_ids: Sequence[str]) -> list[bytes | None]:
        """What lies under each id, None where that is nothing or no text. One round trip."""
        return await self._commands.values(self._keys, session_ids)

    async def idleness(self, session_id: str, value: bytes, today: float) -> float:
        """For how many seconds at most nobody has used a record; 0 where nobody here can tell.

        `today` is now, by `time.time()`, the same for all that are compared.
        """
        found = parse(value)
        if found is None:
            return 0.0
        waited = math.inf
        if found.idle:
            left = await self._commands.command(b"PTTL", self._keys.record(session_id), fits=is_number)
            waited = (found.idle - cast(int, left)) / 1000
        return least(waited, found.record, today)

    async def stored(self, session_ids: Sequence[str]) -> AsyncGenerator[bytes, None]:
        """The records of these ids, some at a time; what is none of ours is left out."""
        for start in range(0, len(session_ids), AT_ONCE):
            for value in await self.values(session_ids[start : start + AT_ONCE]):
                found = None if value is None else parse(value)
                if found is not None:
                    yield found.record

    async def exists(self, session_id: str) -> bool:
        """Whether anything lies under this id."""
        return await self._commands.command(b"EXISTS", self._keys.record(session_id), fits=is_number) == 1

    async def left(self, session_id: str) -> float | None:
        """For how many seconds a record lives, inf without a bound; None where it is absent.

        A script is asked for an absence: a replica, which may lag, is believed no more than a lost reply.
        """
        keys, commands = self._keys.of(session_id), self._commands
        left = cast(int, await commands.command(b"PTTL", keys.record, fits=is_number))
        if left != _ABSENT:
            return left / 1000 if left >= 0 else math.inf
        asked = commands.loop.time()
        found = commands.found(await commands.take(keys, b"", commands.unlocked, asked), asked)
        return None if found in (b"A", b"R") else 0.0

    async def write(
        self, records: Mapping[str, bytes], ttl: float | None, default_ttl: float, create: bool
    ) -> dict[str, Reply]:
        """Store each record whoever holds it; what `set.lua` says of each. One round trip."""
        rest = milliseconds(ttl), milliseconds(default_ttl), b"1" if create else b"0"
        writes = [
            self._commands.run(SET, self._keys.record(name), new_nonce(), record, *rest)
            for name, record in records.items()
        ]
        return dict(zip(records, await asyncio.gather(*writes), strict=True))

    async def delete(self, session_ids: Iterable[str]) -> list[Reply]:
        """Delete each record whoever holds it; what `remove.lua` says of each."""
        all_keys = [self._keys.of(session_id) for session_id in session_ids]
        replies = self._commands.remove(all_keys)
        for keys in all_keys:
            self._on_deleted(keys)
        return await asyncio.gather(*replies)

    # -- all records: others have their turn after each step ------------------------------------------------

    async def ids(self) -> AsyncGenerator[list[str], None]:
        """The ids of all records, page by page, in no order and in constant memory.

        What is there all the time comes at least once; twice where Redis resizes its table meanwhile (SCAN).
        """
        async with aclosing(self._pages(self._keys.pattern)) as pages:
            async for names in pages:
                yield self._ids(names)

    async def counts(self) -> tuple[int, int, int]:
        """How many records there are, how many locks are held, and how many of those are waited for.

        A lock counts as waited for where another process waits for it than the one that holds it.
        """
        sessions = held = waited_for = 0
        async for names in self._pages(self._keys.all_keys):
            sessions += len(self._ids(names))
            locks = [name for name in names if name.endswith(b"}:lock")]
            queues = [self._commands.command(b"EXISTS", name[: -len(b"lock")] + b"wait") for name in locks]
            held += len(locks)
            waited_for += (await asyncio.gather(*queues)).count(1)
        return sessions, held, waited_for

    def _ids(self, names: Iterable[bytes]) -> list[str]:
        """Of the records among these keys."""
        ids = [self._keys.session_id(name) for name in names if name.endswith(b"}")]
        return [session_id for session_id in ids if is_identifier(session_id)]

    async def _pages(self, pattern: bytes) -> AsyncGenerator[list[bytes], None]:
        """The keys, of texts only, as SCAN gives them: step by step, and some maybe twice."""
        options = (b"MATCH", pattern, b"COUNT", b"%d" % CHUNK, b"TYPE", b"string")
        for pipeline in await self._commands.router.primaries():
            cursor = b""
            while cursor != b"0":
                reply = await pipeline.command(b"SCAN", cursor or b"0", *options, fits=is_list)
                cursor, names = cast("tuple[bytes, list[bytes]]", reply)
                yield names
