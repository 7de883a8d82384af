"""The in-memory store keeps the contract on both event loops, evicts and expires, and leaves nothing."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from asgi_sessions.stores.memory import InMemorySessionStore
from asgi_sessions.testing import StoreContract


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


class TestContract(StoreContract):
    """The contract, with a clock that is moved instead of waited for."""

    @pytest.fixture(params=["asyncio", "trio"])
    def anyio_backend(self, request: pytest.FixtureRequest) -> str:
        return str(request.param)

    @pytest.fixture
    async def store(self, clock: Clock) -> AsyncIterator[InMemorySessionStore]:
        yield InMemorySessionStore(clock=clock)

    @pytest.fixture
    def let_time_pass(self, clock: Clock) -> Callable[[float], Awaitable[None]]:
        async def pass_(seconds: float) -> None:
            clock.now += seconds

        return pass_
