"""What many tasks that wait take in memory."""

from __future__ import annotations

import asyncio
import gc
import sys
import tracemalloc
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

MANY = 500


def most() -> int:
    """Bytes of one that waits, beyond its task. Python 3.10 and tracers make an object of each frame."""
    return 2048 if sys.version_info >= (3, 11) and sys.gettrace() is None else 3584


@contextmanager
def tracing() -> Iterator[None]:
    was_tracing = tracemalloc.is_tracing()
    tracemalloc.start()
    try:
        yield
    finally:
        if not was_tracing:
            tracemalloc.stop()


async def bytes_of_each(step: Callable[[], Awaitable[object]]) -> float:
    """What one task takes that waits in this step. The first time only makes what is kept for later."""
    found = 0.0
    for _ in range(2):
        await settled()
        before = tracemalloc.get_traced_memory()[0]
        tasks = [asyncio.ensure_future(waiting(step)) for _ in range(MANY)]
        await settled()
        found = (tracemalloc.get_traced_memory()[0] - before) / MANY
        assert not any(task.done() for task in tasks), "a task did not wait"
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        del tasks
    return found


async def waiting(step: Callable[[], Awaitable[object]]) -> None:
    await step()


async def settled() -> None:
    """All that has begun waits or has ended, and what has ended is forgotten."""
    for _ in range(10):
        await asyncio.sleep(0)
    await asyncio.sleep(0.05)
    gc.collect()


async def forever() -> None:
    await asyncio.get_running_loop().create_future()


async def beyond(step: Callable[[], Awaitable[object]], other: Callable[[], Awaitable[object]]) -> float:
    """How many bytes more one takes that waits in this step than in the other."""
    with tracing():
        return await bytes_of_each(step) - await bytes_of_each(other)
