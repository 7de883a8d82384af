"""A connection's bytes, taken over from redis-py once it has opened the connection.

redis-py reads through a stream: bytes wake the task that reads, which wakes the caller, a turn of the event
loop each. Here a reply becomes its caller's result as its bytes arrive.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from redis.exceptions import ConnectionError as RedisConnectionError

from .call import Call, Parser
from .replies import Reply

if TYPE_CHECKING:
    import hiredis
else:
    try:
        import hiredis
    except ImportError:  # redis-py parses by itself then, and its stream is read
        hiredis = None

_MORE = object()  # the parser's word for a reply that is not whole yet
_BUFFER_BYTES = 65_536
_HUNG_UP = "the connection was closed by Redis"


class Wire(asyncio.BufferedProtocol):
    """Parses what arrives, gives each reply to the oldest of the `calls`, and says when the connection ends.

    It reads into a buffer of its own: asyncio makes a new one of 256 KiB for whoever has none, each time, and
    to get that from the system takes as long as a script.

    `on_error` gets error replies as exceptions and does not raise. `on_misfit` gets a reply that does not fit
    the oldest call, or for which there is none, and returns why the connection has to end, if it has to.
    `lost` gets the reason of the end as an exception.
    """

    def __init__(
        self,
        transport: asyncio.WriteTransport,
        stream: asyncio.StreamReader | None,
        parser: Parser,
        calls: deque[Call],
        on_error: Callable[[Exception], None],
        on_misfit: Callable[[Reply], Exception | None],
    ) -> None:
        self.lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._reader = hiredis.Reader(
            protocolError=RedisConnectionError, replyError=parser.parse_error, notEnoughData=_MORE
        )
        self._calls = calls
        self._on_error = on_error
        self._on_misfit = on_misfit
        self._buffer = bytearray(_BUFFER_BYTES)
        self._view = memoryview(self._buffer)
        self._stream = transport.get_protocol()  # redis-py's, which has to learn of the end too
        transport.set_protocol(self)
        if transport.is_closing() or (stream is not None and stream.at_eof()):  # told once only
            self.end(RedisConnectionError(_HUNG_UP))

    def get_buffer(self, sizehint: int) -> memoryview:
        """Where the next bytes go. A view: asyncio's TLS writes into slices, which of bytes are copies."""
        return self._view

    def buffer_updated(self, nbytes: int) -> None:
        """Hand on every reply that is whole now."""
        if self.lost.done():
            return  # given up: the calls of now belong to another connection
        calls = self._calls
        try:
            self._reader.feed(self._buffer, 0, nbytes)  # type: ignore[arg-type]  # takes any buffer
            while (reply := self._reader.gets(False)) is not _MORE:
                if isinstance(reply, Exception):
                    self._on_error(reply)
                elif calls and (reply == (call := calls[0]).about != b"" or call.fits(reply, call.about)):
                    future = calls.popleft().future
                    if not future.done():
                        future.set_result(reply)
                elif (error := self._on_misfit(reply)) is not None:
                    self.end(error)
                    return
        except RedisConnectionError as error:
            self.end(error)

    def connection_lost(self, exc: Exception | None) -> None:
        """The peer hung up, or we did."""
        self._stream.connection_lost(exc)
        self.end(exc or RedisConnectionError(_HUNG_UP))

    def end(self, error: Exception) -> None:
        """Use this connection no more."""
        if not self.lost.done():
            self.lost.set_exception(error)

    def pause_writing(self) -> None:
        """The peer does not read: the deadline of the calls bounds what piles up."""

    def resume_writing(self) -> None:
        """The peer reads again."""


def has_unread(stream: asyncio.StreamReader | None) -> bool:
    """Whether bytes have come that redis-py did not ask for, before the connection was taken over."""
    return stream is not None and bool(stream._buffer)  # type: ignore[attr-defined]  # as redis-py looks at it


def can_take_over() -> bool:
    """Whether the parser is there that this needs; it comes with the `redis` extra."""
    return hiredis is not None
