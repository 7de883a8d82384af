"""The private parts of redis-py that are used, and its public way where one of them is missing."""

from __future__ import annotations

import asyncio
import socket
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from types import SimpleNamespace
from typing import Any, cast

import anyio
import pytest
from redis.asyncio import Redis
from redis.asyncio.connection import Connection, ConnectionPool
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ResponseError

from asgi_sessions import RedisSessionStore, SessionData, SessionStoreError
from asgi_sessions.stores.redis.connection import seam
from asgi_sessions.stores.redis.connection.call import OUT_OF_STEP, Call
from asgi_sessions.stores.redis.connection.pipeline import Pipeline
from asgi_sessions.stores.redis.connection.replies import Reply
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


async def _until(condition: Callable[[], bool]) -> None:
    """Wait for what a stream reads; it sets no event."""
    with anyio.fail_after(5):
        while not condition():  # noqa: ASYNC110
            await anyio.sleep(0.001)


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
    await _until(lambda: bool(cast(Any, opened._reader)._buffer))
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


# -- the moment of taking over ----------------------------------------------------------------------------


class Eager:
    """A pool whose connections have read, or lost, something before they are taken over."""

    def __init__(self, pool: ConnectionPool, spoil: Callable[[Connection], Awaitable[None]]) -> None:
        self._pool = pool
        self._spoil: Callable[[Connection], Awaitable[None]] | None = spoil

    async def get_connection(self) -> Any:
        connection = await self._pool.get_connection()  # type: ignore[no-untyped-call]  # in redis-py
        spoil, self._spoil = self._spoil, None
        if spoil is not None:
            await spoil(cast(Connection, connection))
        return connection

    async def release(self, connection: Any) -> None:
        await self._pool.release(connection)

    async def aclose(self) -> None:
        await self._pool.aclose()


async def _unread(connection: Connection) -> None:
    """A reply has come that redis-py did not ask for."""
    await connection.send_command("PING")
    await _until(lambda: bool(cast(Any, connection._reader)._buffer))


async def _over(connection: Connection) -> None:
    """The server has hung up, and the stream has been told."""
    async with Redis(port=connection.port) as other:
        await other.client_kill_filter(_type="normal", skipme=True)
    stream = connection._reader
    assert stream is not None
    await _until(stream.at_eof)


async def test_what_came_before_the_take_over(redis_url: str, caplog: pytest.LogCaptureFixture) -> None:
    """Bytes that redis-py's stream holds already would be missing: such a connection is not used."""
    pool = Eager(ConnectionPool.from_url(redis_url), _unread)
    pipeline = Pipeline(cast(Any, pool), 5.0)
    with pytest.raises(SessionStoreError, match="none to its call"):
        await pipeline.command(b"ECHO", b"x")
    assert [each.getMessage() for each in caplog.records if each.levelname == "ERROR"] == [OUT_OF_STEP]
    assert await pipeline.command(b"ECHO", b"x") == b"x"
    await pipeline.aclose()
    await pool.aclose()


async def test_a_connection_that_ended_before_the_take_over(redis_url: str) -> None:
    """Its end is noticed at once, not when the calls have run out of time."""
    pool = Eager(ConnectionPool.from_url(redis_url), _over)
    pipeline = Pipeline(cast(Any, pool), 5.0)
    with anyio.fail_after(2):
        assert await pipeline.command(b"ECHO", b"x") == b"x"
    await pipeline.aclose()
    await pool.aclose()


ARRIVING: list[tuple[bytes, Reply | type[Exception]]] = [
    (b"$5\r\nhello\r\n", b"hello"),
    (b"*3\r\n$1\r\nL\r\n$4\r\n\r\n\r\n\r\n:12\r\n", [b"L", b"\r\n\r\n", 12]),
    (b"-ERR no\r\n", ResponseError),
    (b":7\r\n", 7),
    (b"$-1\r\n", None),
]


async def test_a_stream_may_be_cut_at_every_byte() -> None:
    """Whatever arrives together, each call gets its own reply; asyncio's view of the buffer is a view."""
    near, far = socket.socketpair()
    far.setblocking(False)
    loop = asyncio.get_running_loop()
    _, writer = await asyncio.open_connection(sock=near)
    told: list[Reply | type[Exception]] = []

    class Caller:
        sent: deque[Call] = deque()  # noqa: RUF012  # there is one

        def refused(self, error: Exception) -> None:
            self.sent.popleft()
            told.append(type(error))

        def misfit(self, reply: Reply) -> Exception:
            return RuntimeError()

    parser, stands = Connection()._parser, asyncio.StreamReader()
    opened = SimpleNamespace(_writer=writer, _reader=stands, _parser=parser)
    own = TakenOverStream(cast(OpenConnection, opened), Caller())
    assert own.get_buffer(-1)[1:].obj is own.get_buffer(-1).obj  # a slice of it is no copy
    stream = b"".join(message for message, _ in ARRIVING)
    cuts = [(0, at) for at in range(len(stream) + 1)] + [(0, *range(1, len(stream)))]
    for cut in cuts:
        told.clear()
        for _ in ARRIVING:
            reply: asyncio.Future[Reply] = loop.create_future()
            reply.add_done_callback(lambda reply: told.append(reply.result()))
            Caller.sent.append(Call(None, b"", reply, 0.0))
        for begin, end in zip(cut, (*cut[1:], len(stream)), strict=True):
            await loop.sock_sendall(far, stream[begin:end])
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        await _until(lambda: len(told) == len(ARRIVING))
        assert sorted(map(repr, told)) == sorted(repr(expected) for _, expected in ARRIVING)
    far.close()
    with pytest.raises(RedisConnectionError):
        await own.read()
    writer.close()
