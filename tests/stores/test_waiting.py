"""What a waiting request costs in memory: a thousand may wait for one session."""

from __future__ import annotations

import anyio
import pytest
from memory import MANY, beyond, forever, most

from asgi_sessions import InMemorySessionStore, RedisSessionStore, SessionData, SessionStore
from asgi_sessions.backend import Wake
from asgi_sessions.stores.checkout import Checkout, LockPolicy
from asgi_sessions.stores.local import LocalLocks

pytestmark = pytest.mark.anyio

POLICY = LockPolicy(wait=60, max_waiters=MANY)


async def test_a_waiter_for_a_local_lock_is_small() -> None:
    """At most 2 KiB, so that 1,024 of them take 2 MB."""
    locks = LocalLocks()
    assert locks.try_acquire("s", POLICY) is not None
    assert await beyond(lambda: locks.acquire("s", POLICY), forever) <= most()


@pytest.mark.parametrize("kind", ["memory", "Redis"])
async def test_a_waiting_checkout_is_small(kind: str, redis_url: str) -> None:
    """The same with all that the store does around it."""
    store: SessionStore = InMemorySessionStore() if kind == "memory" else RedisSessionStore(redis_url)
    await store.set("s", SessionData(session_id="s"))
    held = await store.checkout("s", POLICY, None)
    assert isinstance(held, Checkout)
    assert await beyond(lambda: store.checkout("s", POLICY, None), forever) <= most()
    await store.release(held)
    await store.aclose()


# --- how one waits --------------------------------------------------------------------------------


@pytest.mark.parametrize("anyio_backend", ["asyncio", "trio"])
class TestWake:
    """On both libraries."""

    async def test_a_set_one_waits_for_nothing(self, anyio_backend: str) -> None:
        """It was set before anybody waited."""
        wake = Wake()
        wake.set()
        with anyio.fail_after(20):
            await wake.wait(60)
        assert wake.is_set

    async def test_it_wakes(self, anyio_backend: str) -> None:
        """Long before the time is over."""
        wake = Wake()
        with anyio.fail_after(20):
            async with anyio.create_task_group() as group:
                group.start_soon(wake.wait, 60)
                await anyio.sleep(0.01)
                wake.set()
        assert wake.is_set

    async def test_the_time_is_over(self, anyio_backend: str) -> None:
        """Then it is not set, and may be waited for again."""
        wake = Wake()
        with anyio.fail_after(20):
            await wake.wait(0)
            await wake.wait(0.01)
        assert not wake.is_set

    async def test_it_is_set_while_its_task_is_cancelled(self, anyio_backend: str) -> None:
        """The task ends as cancelled, and can see that it was set."""
        wake = Wake()
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as group:
                group.start_soon(wake.wait, 60)
                await anyio.sleep(0.01)
                scope.cancel()
                wake.set()
        assert scope.cancelled_caught
        assert wake.is_set
