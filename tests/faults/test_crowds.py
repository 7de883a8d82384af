"""Many tasks of one process on one session in memory, on either event loop."""

from __future__ import annotations

import random

import anyio
import httpx
import pytest

from asgi_sessions import InMemorySessionStore

from .app import build
from .clients import OBJECTS, crowd, shared_session

pytestmark = pytest.mark.anyio

URL = "http://memory"


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


async def test_tasks_share_a_session() -> None:
    """Fifty tasks: each operation is acknowledged, and the history is that of one after the other."""
    store = InMemorySessionStore()
    async with shared_session([URL], httpx.ASGITransport(build(store))) as session:
        await crowd(session, 50, lambda: range(2))
        assert session.seen.answers == {200: 101}
        assert await session.flaws() == []
    assert len(store._locks) == 0


async def test_impatient_tasks_leave_nothing() -> None:
    """Tasks that are cancelled while they wait, count or store neither hold up others nor falsify a count."""
    store = InMemorySessionStore()
    dice = random.Random(50)
    async with shared_session([URL], httpx.ASGITransport(build(store))) as session:

        async def leave_early(turn: int) -> None:
            with anyio.move_on_after(dice.uniform(0, 0.2)):
                await session.do(URL, [*OBJECTS][turn % len(OBJECTS)])

        async with anyio.create_task_group() as group:
            for turn in range(50):
                group.start_soon(leave_early, turn)
        assert session.seen.answers[200] < 51, "nobody left early"
        assert await session.do(URL, "nested") == 200
        assert await session.flaws() == []
    assert len(store._locks) == 0
