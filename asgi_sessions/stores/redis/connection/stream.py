"""A connection's bytes, through redis-py's public coroutines: nothing of it is taken over.

This is slower than `seam`, by two task switches for each batch. It is used where a part of redis-py that
`seam` needs is missing, where hiredis is not installed, and where the user asks for it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from typing import Protocol

from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError, ResponseError

from .call import Call
from .pools import Connection
from .replies import Reply
from .tasks import end

HUNG_UP = "the connection was closed by Redis"


class Receiver(Protocol):
    """Who gets what a stream reads; see `Pipeline`."""

    sent: deque[Call]  # that a reply is due to, oldest first

    def refused(self, error: Exception) -> Exception | None:
        """Take an error reply; the return value says why the connection has to end, if it has to."""
        ...

    def misfit(self, reply: Reply) -> Exception | None:
        """Take a reply that does not fit the oldest call, or for which there is no call; returns likewise."""
        ...


class Stream(Protocol):
    """How a pipeline reads and writes."""

    def write(self, data: bytes, /) -> None:
        """Send these bytes soon; does not wait."""
        ...

    def is_closing(self) -> bool:
        """Whether the connection has ended, or is about to."""
        ...

    async def read(self) -> None:
        """Give each reply to the oldest call that was sent, until the connection ends; raises the reason."""
        ...


class PublicStream:
    """Reads and writes by redis-py's own coroutines."""

    def __init__(self, connection: Connection, receiver: Receiver) -> None:
        self._connection = connection
        self._receiver = receiver
        self._unwritten: list[bytes] = []
        self._writer: asyncio.Task[None] | None = None

    def write(self, data: bytes, /) -> None:
        self._unwritten.append(data)
        if self._writer is None:
            self._writer = asyncio.get_running_loop().create_task(self._write())

    def is_closing(self) -> bool:
        return not self._connection.is_connected

    async def read(self) -> None:
        try:
            while True:
                error = self._take(await self._next())
                if error is not None:
                    raise error
        finally:
            if self._writer is not None:
                await end((self._writer,))

    async def _next(self) -> Reply | ResponseError:
        if self.is_closing():
            raise RedisConnectionError(HUNG_UP)
        try:
            return await self._connection.read_response(disable_decoding=True)
        except ResponseError as error:
            return error

    def _take(self, reply: Reply | ResponseError) -> Exception | None:
        sent = self._receiver.sent
        if isinstance(reply, ResponseError):
            return self._receiver.refused(reply)
        if sent and sent[0].fits(reply, sent[0].about):
            sent.popleft().answer(reply)
            return None
        return self._receiver.misfit(reply)

    async def _write(self) -> None:
        """Write what waits.

        Where the connection has ended, redis-py would connect anew, so that is asked first. When a write
        fails, redis-py closes the connection, and `read` raises why.
        """
        try:
            with contextlib.suppress(RedisError, OSError):
                while self._unwritten and self._connection.is_connected:
                    data, self._unwritten = b"".join(self._unwritten), []
                    await self._connection.send_packed_command(data, check_health=False)
        finally:
            self._writer = None
