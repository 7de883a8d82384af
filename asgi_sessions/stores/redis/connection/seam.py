"""The one module that touches private parts of redis-py.

redis-py opens a connection. Then its bytes are taken over: redis-py reads through a stream, where bytes wake
the task that reads, which wakes the caller, one turn of the event loop each. Here a reply becomes its
caller's result as soon as its bytes arrive.

`PRIVATE` names every private attribute that this relies on. Where one is missing, `stream_of` falls back on
`PublicStream`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, cast

from redis.exceptions import ConnectionError as RedisConnectionError

from .pools import Connection
from .stream import HUNG_UP, PublicStream, Receiver, Stream

if TYPE_CHECKING:
    import hiredis
else:
    try:
        import hiredis
    except ImportError:  # redis-py parses by itself then
        hiredis = None

PRIVATE: tuple[str, ...] = ("_writer.transport", "_reader._buffer", "_parser.parse_error")
"""Of a connection: the transport, what was read of it and not yet asked for, how an error reply becomes an
exception."""

_MORE = object()  # the parser's word for a reply that is not whole yet
_BUFFER_BYTES = 65_536


class OpenConnection(Connection, Protocol):
    """A connection of redis-py that is open, with its private parts."""

    _writer: asyncio.StreamWriter
    _reader: asyncio.StreamReader
    _parser: Any


def stream_of(connection: Connection, receiver: Receiver, *, take_over: bool = True) -> Stream:
    """How to read and write on a connection that has just been opened."""
    if take_over and hiredis is not None and not missing(connection):
        return TakenOverStream(cast(OpenConnection, connection), receiver)
    return PublicStream(connection, receiver)


def missing(connection: object) -> list[str]:
    """Which of the private parts this connection does not have."""
    return [path for path in PRIVATE if not _has(connection, path)]


def _has(thing: object, path: str) -> bool:
    for name in path.split("."):
        thing = getattr(thing, name, None)
        if thing is None:
            return False
    return True


class TakenOverStream(asyncio.BufferedProtocol):
    """Parses what arrives and gives each reply to the oldest call.

    It reads into a buffer of its own: asyncio makes a new one of 256 KiB, each time, for a protocol that has
    none, and to get that from the system takes as long as a script.
    """

    def __init__(self, connection: OpenConnection, receiver: Receiver) -> None:
        transport = connection._writer.transport
        self.write: Callable[[bytes], None] = transport.write
        self.is_closing: Callable[[], bool] = transport.is_closing
        self._lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._parser = hiredis.Reader(
            protocolError=RedisConnectionError,
            replyError=connection._parser.parse_error,
            notEnoughData=_MORE,
        )
        self._calls = receiver.sent
        self._refused = receiver.refused
        self._misfit = receiver.misfit
        self._buffer = bytearray(_BUFFER_BYTES)
        self._view = memoryview(self._buffer)
        self._theirs = transport.get_protocol()  # redis-py's, which has to learn of the end too
        transport.set_protocol(self)
        stream = connection._reader
        if transport.is_closing() or stream.at_eof():  # nobody will tell that again
            self._end(RedisConnectionError(HUNG_UP))
        if stream._buffer:  # type: ignore[attr-defined]  # came unasked, before the connection was taken over
            self._end(self._misfit(None))

    async def read(self) -> None:
        await self._lost

    def get_buffer(self, sizehint: int) -> memoryview:
        """Where the next bytes go. A view: asyncio's TLS writes into slices, which of bytes are copies."""
        return self._view

    def buffer_updated(self, nbytes: int) -> None:
        """Hand on every reply that is whole now."""
        if self._lost.done():
            return  # given up: the calls of now belong to another connection
        calls = self._calls
        try:
            self._parser.feed(self._buffer, 0, nbytes)  # type: ignore[arg-type]  # takes any buffer
            while (reply := self._parser.gets(False)) is not _MORE:
                if isinstance(reply, Exception):
                    error = self._refused(reply)
                elif calls and (reply == (call := calls[0]).about != b"" or call.fits(reply, call.about)):
                    future = calls.popleft().future
                    if not future.done():
                        future.set_result(reply)
                    continue
                else:
                    error = self._misfit(reply)
                if error is not None:
                    self._end(error)
                    return
        except RedisConnectionError as error:
            self._end(error)

    def connection_lost(self, exc: Exception | None) -> None:
        """The peer hung up, or we did."""
        self._theirs.connection_lost(exc)
        self._end(exc or RedisConnectionError(HUNG_UP))

    def pause_writing(self) -> None:
        """The peer does not read: the deadline of the calls bounds what piles up."""

    def resume_writing(self) -> None:
        """The peer reads again."""

    def _end(self, error: Exception | None) -> None:
        """Use this connection no more; nothing where there is no reason to."""
        if error is not None and not self._lost.done():
            self._lost.set_exception(error)
