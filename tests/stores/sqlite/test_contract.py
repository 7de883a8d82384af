"""The SQLite store keeps the contract, on both event loops and with both kinds of commit."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Literal

import pytest

from asgi_sessions import SQLiteSessionStore
from asgi_sessions.testing.contract import StoreContract


class TestContract(StoreContract):
    """One process that is alone with its database."""

    @pytest.fixture(params=["asyncio", "trio"])
    def anyio_backend(self, request: pytest.FixtureRequest) -> str:
        return str(request.param)

    @pytest.fixture(params=["full", "normal"])
    def synchronous(self, request: pytest.FixtureRequest) -> str:
        return str(request.param)

    @pytest.fixture
    async def store(
        self, tmp_path: Path, synchronous: Literal["full", "normal"]
    ) -> AsyncIterator[SQLiteSessionStore]:
        store = SQLiteSessionStore(tmp_path / "sessions.db", synchronous=synchronous)
        yield store
        await store.aclose()
