"""What a request is told that has waited long: who holds the lock, and how many wait."""

from __future__ import annotations

import asyncio
from collections.abc import Hashable
from functools import partial
from typing import TypeVar

from ....record.codec import id_of
from ...running import RunningRequest, running
from ..commands.commands import Commands
from ..commands.keys import Keys
from ..commands.who import read
from ..connection.replies import Reply, is_list, is_text
from .queue import LockQueue

M = TypeVar("M", bound=Hashable)


def ask_who_holds(commands: Commands, keys: Keys, queue: LockQueue[M]) -> None:
    """Have the request that runs here, if one does, tell who holds the lock that it waits for.

    Redis is asked, whose answer nobody waits for; a fault does not matter. All of this process who wait are
    counted, and one for each other process.
    """
    requests = running.get()
    if requests:
        holder = commands.command(b"GET", keys.lock, fits=is_text)
        queued = commands.command(b"LRANGE", keys.queue, b"0", b"-1", fits=is_list)
        answered = asyncio.gather(holder, queued)
        answered.add_done_callback(partial(_tell, requests[-1], commands, keys, queue))


def _tell(
    request: RunningRequest,
    commands: Commands,
    keys: Keys,
    queue: LockQueue[M],
    answered: asyncio.Future[tuple[Reply, Reply]],
) -> None:
    if answered.cancelled() or answered.exception() is not None:
        return
    value, queued = answered.result()
    holder = read(value, commands.clock.at(commands.loop.time())) if isinstance(value, bytes) else None
    if holder is not None and isinstance(queued, list):
        others = len(queued) - queue.asks
        request.has_waited(id_of(keys.mark + b"}") or "", holder, queue.waiters + others)
