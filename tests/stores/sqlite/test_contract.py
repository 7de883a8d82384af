"""The SQLite store keeps the contract, on both event loops and with both kinds of commit."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
from asgi import Clock

from asgi_sessions import SQLiteSessionStore
from asgi_sessions.testing.contract import StoreContract


class TestContract(StoreContract):
    """One process that is alone with its database, with a clock that is moved instead of waited for."""

    synchronous: Literal["full", "normal"] = "full"

    @pytest.fixture(params=["asyncio", "trio"])
    def anyio_backend(self, request: pytest.FixtureRequest) -> str:
        return str(request.param)

    @pytest.fixture
    def clock(self) -> Clock:
        return Clock()

    @pytest.fixture
    async def store(self, path: Path, clock: Clock) -> AsyncIterator[SQLiteSessionStore]:
        store = SQLiteSessionStore(path, synchronous=self.synchronous, clock=clock)
        store._settings = replace(store._settings, moments=clock)
        yield store
        await store.aclose()

    @pytest.fixture
    def let_time_pass(self, clock: Clock) -> Callable[[float], Awaitable[None]]:
        async def pass_(seconds: float) -> None:
            clock.now += seconds

        return pass_


class TestContractUnsynced(TestContract):
    """What is not synced is written by the task itself where it is alone."""

    synchronous = "normal"

    @pytest.fixture
    def anyio_backend(self) -> str:
        return "asyncio"
