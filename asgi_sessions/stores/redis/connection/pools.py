"""What is used of redis-py's connections and pools in public."""

from __future__ import annotations

import contextlib
from typing import Protocol

from redis.asyncio.connection import AbstractConnection
from redis.exceptions import RedisError

from .replies import Reply


class Connection(Protocol):
    """A connection of redis-py."""

    @property
    def is_connected(self) -> bool: ...
    async def read_response(self, disable_decoding: bool = False) -> Reply: ...
    async def send_command(self, *args: str | bytes) -> None: ...
    async def send_packed_command(self, command: bytes, check_health: bool = True) -> None: ...
    async def disconnect(self, nowait: bool = False) -> None: ...


class Pool(Protocol):
    """A connection pool of redis-py."""

    connection_class: type[AbstractConnection]

    async def get_connection(self) -> Connection: ...
    async def release(self, connection: Connection) -> None: ...
    async def aclose(self) -> None: ...


async def give_back(pool: Pool, connection: Connection) -> None:
    """Close without waiting: a peer that is gone never answers a goodbye."""
    with contextlib.suppress(RedisError, OSError):
        await connection.disconnect(nowait=True)
    await pool.release(connection)
