"""Tasks of the Redis store that are to end do, even those that miss that they were cancelled."""

from __future__ import annotations

import asyncio

import anyio
import pytest

from asgi_sessions.stores.redis.connection.tasks import end

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def miss(times: int) -> None:
    """As `asyncio.wait_for` up to Python 3.11, when its result comes together with a cancellation."""
    missed = 0
    while True:
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            missed += 1
            if missed > times:
                raise


@pytest.mark.parametrize("times", [0, 1, 3])
async def test_whoever_misses_that_it_was_cancelled_ends(times: int) -> None:
    """However often: closing a store hung for ever on the listeners of Sentinels that had missed it once."""
    tasks = [asyncio.ensure_future(miss(times)) for _ in range(3)]
    await asyncio.sleep(0)
    with anyio.fail_after(10):
        await end(tasks)
    assert all(task.cancelled() for task in tasks)


async def test_what_has_ended_is_not_waited_for() -> None:
    """Nor is nothing at all."""
    await end(())
    done = asyncio.ensure_future(asyncio.sleep(0))
    await done
    await end((done,))
    assert not done.cancelled()
