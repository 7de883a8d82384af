"""The channel on which all processes of a store tell which sessions have ended."""

from __future__ import annotations

import asyncio
import contextlib
import logging

from redis.exceptions import NoPermissionError, RedisError

from ....errors import SessionStoreError
from ...endings import Endings
from ..commands.keys import KeySpace
from ..connection.faults import explain
from ..connection.pipeline import Pipeline
from ..connection.pools import Connection
from ..connection.replies import Reply, is_number

_logger = logging.getLogger("asgi_sessions.redis")


class EndedChannel:
    """Heard on a connection that others have made, while somebody here waits for the end of a session.

    A process in which nobody does leaves the channel with the first message that comes. Where Redis refuses
    to subscribe or to publish (ACL), those who wait look again and again.
    """

    def __init__(self, keys: KeySpace, endings: Endings) -> None:
        self._keys = keys
        self._endings = endings
        self._refused = False
        self._joining: asyncio.Task[bool] | None = None  # its result: whether this connection hears it
        self._confirmed: asyncio.Future[bool] | None = None  # by Redis
        self._leaving: asyncio.Task[None] | None = None
        self._may_leave = True

    async def join(self, connection: Connection, pipeline: Pipeline) -> bool:
        """Whether what is published from here on is heard. The connection's reader gives its messages."""
        if self._refused:
            return False
        if self._joining is None:
            loop = asyncio.get_running_loop()
            self._confirmed = loop.create_future()
            self._joining = loop.create_task(self._join(connection, pipeline, self._confirmed))
        joining = self._joining
        await asyncio.wait((joining,))
        if self._joining is not joining:  # the connection was lost meanwhile
            return False
        if not joining.result():
            self._joining = None  # the next one tries again
        return joining.result()

    async def _join(
        self, connection: Connection, pipeline: Pipeline, confirmed: asyncio.Future[bool]
    ) -> bool:
        """Subscribe, and see whether this process may publish, as others do who have the same rights."""
        await self._say(connection, "SUBSCRIBE")
        if not await confirmed:
            return False
        try:
            await pipeline.command(b"PUBLISH", self._keys.ended, b"", fits=is_number)
        except SessionStoreError as error:
            if isinstance(error.__cause__, NoPermissionError):
                self._refuse(error.__cause__)
            return False
        return True

    def take(self, message: Reply, connection: Connection) -> bool:
        """Take what the connection has read; False where it is not about this channel."""
        match message:
            case [b"message", self._keys.ended, bytes(key)]:
                self._endings.tell([self._keys.session_id(key)])
                if not self._endings:
                    self._leave(connection)
            case [b"subscribe", self._keys.ended, int()]:
                self._settle(True)
            case [b"unsubscribe", self._keys.ended, int()]:
                self._leaving = None
            case _:
                return False
        return True

    def refused(self, error: NoPermissionError) -> bool:
        """Take an error that the connection has read; False where it is not about this channel."""
        if self._leaving is not None:  # asked first
            self._leaving, self._may_leave = None, False
            return True
        if self._confirmed is None or self._confirmed.done():
            return False
        self._refuse(error)
        return True

    def lost(self) -> None:
        """The connection is gone, and with it perhaps a message."""
        if self._leaving is not None:
            self._leaving.cancel()
            self._leaving = None
        if self._joining is not None:
            self._settle(False)
            self._joining = None
            self._endings.doubt()

    def _leave(self, connection: Connection) -> None:
        if self._may_leave and self._joining is not None and self._joining.done():
            self._joining = None
            leave = self._say(connection, "UNSUBSCRIBE")
            self._leaving = asyncio.get_running_loop().create_task(leave)

    def _refuse(self, error: NoPermissionError) -> None:
        if not self._refused:
            why = explain(error)
            _logger.warning(
                "Redis refuses to tell that a session has ended; whoever waits for that looks again and"
                " again: allow the channel %s: %s", self._keys.ended.decode(), why,
            )  # fmt: skip
        self._refused = True
        self._settle(False)

    def _settle(self, is_confirmed: bool) -> None:
        if self._confirmed is not None and not self._confirmed.done():
            self._confirmed.set_result(is_confirmed)

    async def _say(self, connection: Connection, command: str) -> None:
        if connection.is_connected:  # else redis-py would connect anew
            with contextlib.suppress(RedisError, OSError):  # the reader sees it, too
                await connection.send_command(command, self._keys.ended)
