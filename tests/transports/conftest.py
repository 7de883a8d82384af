"""A test that asks for a `row` runs once for every way of connecting."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest

from asgi_sessions import RedisSessionStore
from asgi_sessions.stores.redis.connection import seam

from .rows import ROWS, Row, Servers


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Time passes alike on every transport, so that one row waits for it."""
    if "row" in metafunc.fixturenames:
        rows = [row for row in ROWS if row.whole or metafunc.cls is None]
        if "let_time_pass" in metafunc.fixturenames:
            rows = ROWS[:1]
        metafunc.parametrize("row", rows, ids=str, scope="package")


@pytest.fixture(scope="package")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    with Servers(tmp_path_factory.mktemp("servers")) as servers:
        yield servers


@pytest.fixture
def anyio_backend(row: Row) -> tuple[str, dict[str, object]]:
    return row.backend


@pytest.fixture
async def store(
    row: Row, servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[RedisSessionStore]:
    """On empty servers."""
    if not row.hiredis:
        monkeypatch.setattr(seam, "hiredis", None)
    store = row.store(servers)
    servers.empty()
    yield store
    await store.aclose()
