"""A connection's bytes, taken over from redis-py once it has opened the connection.

redis-py reads through a stream: bytes wake the task that reads, which wakes the caller, a turn of the event
loop each. Here a reply becomes its caller's result as its bytes arrive.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from redis.exceptions import ConnectionError as RedisConnectionError

if TYPE_CHECKING:
    import hiredis
else:
    try:
        import hiredis
    except ImportError:  # redis-py parses by itself then, and its stream is read
        hiredis = None

_MORE = object()  # the parser's word for a reply that is not whole yet


class Parser(Protocol):
    """What is used of redis-py's parser: how an error reply becomes an exception."""

    def parse_error(self, response: str) -> Exception: ...


class Wire(asyncio.Protocol):
    """Parses what arrives, hands each reply on, and says when the connection has ended.

    `on_reply` gets errors as exceptions and does not raise. `lost` gets the reason as an exception.
    """

    def __init__(
        self, transport: asyncio.WriteTransport, parser: Parser, on_reply: Callable[[Any], None]
    ) -> None:
        self.lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._reader = hiredis.Reader(
            protocolError=RedisConnectionError, replyError=parser.parse_error, notEnoughData=_MORE
        )
        self._on_reply = on_reply
        self._stream = transport.get_protocol()  # redis-py's, which has to learn of the end too
        transport.set_protocol(self)

    def data_received(self, data: bytes) -> None:
        """Hand on every reply that is whole now."""
        try:
            self._reader.feed(data)
            while (reply := self._reader.gets(False)) is not _MORE:
                self._on_reply(reply)
        except RedisConnectionError as error:
            self.end(error)

    def connection_lost(self, exc: Exception | None) -> None:
        """The peer hung up, or we did."""
        self._stream.connection_lost(exc)
        self.end(exc or RedisConnectionError("the connection was closed by Redis"))

    def end(self, error: Exception) -> None:
        """Use this connection no more."""
        if not self.lost.done():
            self.lost.set_exception(error)

    def pause_writing(self) -> None:
        """The peer does not read: the deadline of the calls bounds what piles up."""

    def resume_writing(self) -> None:
        """The peer reads again."""


def can_take_over() -> bool:
    """Whether the parser is there that this needs; it comes with the `redis` extra."""
    return hiredis is not None
