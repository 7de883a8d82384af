"""A call of Redis under way, and what is used of redis-py's connections for it."""

from __future__ import annotations

import asyncio
import contextlib
from functools import partial
from typing import Protocol

from redis.asyncio.connection import AbstractConnection
from redis.exceptions import RedisError

from ....errors import SessionStoreError
from ..commands.scripts import Script
from .replies import About, Fits, Reply, anything

NOT_OURS = "Redis gave an answer that no script of ours gives"
CLOSED = "the connection to Redis was closed"
OUT_OF_STEP = "the connection to Redis gave a reply that is none to its call, and was dropped"
LOST = "the connection to Redis was lost; whether the call was carried out is not known"


class NotSentError(SessionStoreError):
    """The call never left, so it has done nothing."""


class Parser(Protocol):
    """What is used of redis-py's parser: how an error reply becomes an exception."""

    def parse_error(self, response: str) -> Exception: ...


class Connection(Protocol):
    """What is used of a connection of redis-py."""

    # Written to directly: the public coroutine costs two task switches per batch, and there is nothing to
    # wait for, since the lane's deadline bounds what can pile up.
    _writer: asyncio.StreamWriter | None
    _parser: Parser
    _reader: asyncio.StreamReader | None

    async def read_response(self, disable_decoding: bool = False) -> Reply: ...
    async def send_command(self, *args: str | bytes) -> None: ...
    async def disconnect(self, nowait: bool = False) -> None: ...


class Pool(Protocol):
    """What is used of a connection pool of redis-py."""

    connection_class: type[AbstractConnection]

    async def get_connection(self) -> Connection: ...
    async def release(self, connection: Connection) -> None: ...
    async def aclose(self) -> None: ...


class Call:
    """A command under way and the future of its reply, which `fits` what the command is `about`."""

    __slots__ = ("about", "fits", "future", "hops", "packed", "script", "sent_twice", "since")

    def __init__(
        self,
        script: Script | None,
        packed: bytes,
        future: asyncio.Future[Reply],
        since: float,
        about: About = b"",
        fits: Fits = anything,
    ) -> None:
        self.script = script  # None: a plain command
        self.packed = packed
        self.future = future
        self.since = since
        self.about: About = about
        self.fits: Fits = fits
        self.sent_twice = False
        self.hops = 0  # how often a cluster has sent it elsewhere

    @property
    def is_waited_for(self) -> bool:
        """Whether a request goes on with the reply."""
        return self.script is None or self.script.urgent

    @property
    def is_prompt(self) -> bool:
        """Whether it is to leave before the caller's next call."""
        return self.script is None or self.script.prompt

    def teach(self) -> bool:
        """Make ready to be sent with the script's body; False where that is not what is missing."""
        if self.script is None or not self.packed.startswith(self.script.by_sha):
            return False
        self.packed = self.script.by_body + self.packed[len(self.script.by_sha) :]
        return True

    def again(self) -> bool:
        """Make ready to be sent once more, though it may have been carried out; False where it may not be."""
        if self.sent_twice or (self.script is not None and self.script.once):
            return False
        self.sent_twice = True
        if self.script is not None and self.script.doubtful:
            caller = self.future
            self.future = caller.get_loop().create_future()
            self.future.add_done_callback(partial(_answer_again, caller, self.script.doubtful))
        return True

    def answer(self, reply: Reply) -> None:
        """Give the caller its reply, if there still is one."""
        if not self.future.done():
            self.future.set_result(reply)

    def fail(self, message: str, cause: BaseException | None = None, *, sent: bool = True) -> None:
        """Give the caller a `SessionStoreError` of its own; `sent`: Redis may have got the call."""
        if not self.future.done():
            error = SessionStoreError(message) if sent else NotSentError(message)
            error.__cause__ = cause
            self.future.set_exception(error)


def forget(future: asyncio.Future[Reply]) -> None:
    """Nobody waits for this reply; an error in it has been dealt with."""
    if not future.cancelled():
        future.exception()


def _answer_again(
    caller: asyncio.Future[Reply], doubtful: tuple[bytes, ...], again: asyncio.Future[Reply]
) -> None:
    """The reply to a call that was sent again: a refusal may be of the second one alone."""
    error = again.exception()
    if caller.done():
        return
    reply = None if error is not None else again.result()
    if error is not None:
        caller.set_exception(error)
    elif isinstance(reply, bytes) and reply in doubtful:
        caller.set_exception(SessionStoreError(LOST))
    else:
        caller.set_result(reply)


async def give_back(pool: Pool, connection: Connection) -> None:
    """Close without waiting: a peer that is gone never answers a goodbye."""
    with contextlib.suppress(RedisError, OSError):
        await connection.disconnect(nowait=True)
    await pool.release(connection)
