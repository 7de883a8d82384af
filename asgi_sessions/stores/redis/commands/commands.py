"""What is asked of several records at once, as they lie in Redis."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import cast

from ..connection.replies import Reply, are_records, mark_of
from ..event_loop import Engine
from .keys import KeySpace
from .scripts import REMOVE, pack_args

CHUNK = 500  # records asked for in one command, keys looked at in one step of a scan


async def values(engine: Engine, keys: KeySpace, session_ids: Sequence[str]) -> list[bytes | None]:
    """What lies under each id, None where that is nothing or no text. One round trip."""
    names = [keys.record(session_id) for session_id in session_ids]
    marks = tuple(map(mark_of, session_ids))
    size = 1 if engine.router.clustered else CHUNK
    parts = [slice(start, start + size) for start in range(0, len(names), size)]
    replies = await asyncio.gather(
        *[engine.command(b"MGET", *names[part], about=marks[part], fits=are_records) for part in parts]
    )
    return [value for reply in replies for value in cast("list[bytes | None]", reply)]


async def remove(engine: Engine, keys: KeySpace, session_ids: Sequence[str]) -> list[Reply]:
    """Delete records whoever holds them, and have nobody wait for them; what the script says of each."""
    each_keys = [keys.of(session_id) for session_id in session_ids]
    args = pack_args(b"", b"", b"0", engine.unlocked.claim_ms, engine.clustered, b"")
    calls = [engine.call(REMOVE, each.record, REMOVE.by_sha + each.packed + args) for each in each_keys]
    for each in each_keys:
        engine.queues.dismiss(each)
    return await asyncio.gather(*calls)
