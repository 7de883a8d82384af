"""The private parts of redis-py that are used, and its public way where one of them is missing."""

from __future__ import annotations

from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any, cast

import anyio
import pytest
from redis.asyncio.connection import Connection, ConnectionPool
from redis.exceptions import ResponseError

from asgi_sessions import RedisSessionStore, SessionData
from asgi_sessions.stores.redis.connection import seam
from asgi_sessions.stores.redis.connection.seam import OpenConnection, TakenOverStream
from asgi_sessions.stores.redis.connection.stream import PublicStream

pytestmark = pytest.mark.anyio

PARTS = ("_writer.transport", "_reader._buffer", "_parser.parse_error")


@pytest.fixture(autouse=True)
def these_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the suite runs without taking over."""
    monkeypatch.setattr(seam, "PRIVATE", PARTS)


@pytest.fixture
async def connection(redis_url: str) -> AsyncIterator[Connection]:
    pool = ConnectionPool.from_url(redis_url)
    connection = cast(Connection, await pool.get_connection())  # type: ignore[no-untyped-call]  # in redis-py
    yield connection
    await connection.disconnect()
    await pool.aclose()


async def kind_of(store: RedisSessionStore) -> type[object]:
    """How the store reads and writes."""
    await store.set("s", SessionData(session_id="s"))
    assert await store.exists("s")
    stream = (await store._states.get()).router.pipeline(b"")._stream
    await store.aclose()
    return type(stream)


async def test_the_private_parts_of_redis_py_are_there(connection: Connection) -> None:
    """A release of redis-py that has them no more is met here first."""
    assert seam.missing(connection) == []
    opened = cast(OpenConnection, connection)
    assert isinstance(opened._parser.parse_error("ERR no"), ResponseError)
    await connection.send_command("PING")
    with anyio.fail_after(5):
        while not cast(Any, opened._reader)._buffer:  # noqa: ASYNC110  # a stream sets no event
            await anyio.sleep(0.001)
    assert bytes(cast(Any, opened._reader)._buffer) == b"+PONG\r\n"


@pytest.mark.parametrize("part", ["_writer", "_reader", "_parser"])
async def test_what_is_missing_is_seen(connection: Connection, part: str) -> None:
    """By each part, and by a connection that has been closed."""
    parts = {name: getattr(connection, name) for name in ("_writer", "_reader", "_parser")}
    assert seam.missing(SimpleNamespace(**parts)) == []
    (lost,) = seam.missing(SimpleNamespace(**{**parts, part: object()}))
    assert lost.startswith(part)


async def test_redis_py_is_taken_over(redis_url: str) -> None:
    """Where nothing stands against it."""
    assert await kind_of(RedisSessionStore(redis_url)) is TakenOverStream


async def test_the_public_way_is_taken_by_itself(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where redis-py has other parts, and where hiredis is not installed."""
    monkeypatch.setattr(seam, "PRIVATE", (*PARTS, "_of_another_release"))
    assert await kind_of(RedisSessionStore(redis_url)) is PublicStream
    monkeypatch.setattr(seam, "PRIVATE", PARTS)
    monkeypatch.setattr(seam, "hiredis", None)
    assert await kind_of(RedisSessionStore(redis_url)) is PublicStream


async def test_the_public_way_may_be_chosen(redis_url: str) -> None:
    """By a keyword of the store."""
    assert await kind_of(RedisSessionStore(redis_url, take_over_connections=False)) is PublicStream
