"""Values of a store behind its primitives, each read, compared and written in one step."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, Coroutine
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol

import anyio

from ..record.codec import id_of
from .checkout import Lifetime, Missing, shorter
from .local import Latches
from .value import Value

_NO_BOUND = 400 * 86400.0  # seconds a backend keeps what never ends; no browser keeps a cookie for longer


class Primitives(Protocol):
    """What a store of somebody else's implements."""

    def now(self) -> float:
        """The store's clock: seconds since the epoch."""
        ...

    async def read_value(self, session_id: str) -> bytes | None: ...
    async def write_value(self, session_id: str, value: bytes, ttl: float) -> None: ...
    async def delete_value(self, session_id: str) -> None: ...
    def iter_ids(self) -> AsyncGenerator[str, None]: ...


class Values:
    """What lies in a store, by session id. Whoever writes after reading holds the session meanwhile."""

    def __init__(self, store: Primitives) -> None:
        self._store = store
        self._latches = Latches()

    def hold(self, session_id: str) -> AbstractAsyncContextManager[None]:
        """Hold a session for as long as it takes to read, compare and write."""
        return self._latches.hold(session_id)

    async def find(self, session_id: str) -> Value | Missing:
        """A live record of this id, or that there is nothing, or something that is not ours."""
        raw = await self._store.read_value(session_id)
        if raw is None:
            return Missing.ABSENT
        value = Value.unpack(raw)
        if value is None or id_of(value.record) not in (session_id, None):
            return Missing.UNREADABLE
        return value if value.left(self._store.now()) > 0 else Missing.ABSENT

    async def bounded(self, session_id: str, rule: Lifetime | None) -> Value | Missing:
        """The same, its bounds shortened to the caller's rule; ABSENT where it has ended by that.

        The session is held by the caller.
        """
        found = await self.find(session_id)
        if rule is None or not isinstance(found, Value):
            return found
        now = self._store.now()
        bounds = shorter(rule, found.checkout(session_id, now, None))
        if bounds is None:
            return found
        found.bound(bounds, now)
        if found.left(now) > 0:
            await self.write(session_id, found)
            return found
        await self.erase(session_id)
        return Missing.ABSENT

    async def touch(self, session_id: str, rule: Lifetime | None = None) -> None:
        """Restart the idle timeout of a live record, if it has one and is not over by the caller's rule."""
        async with self.hold(session_id):
            found = await self.find(session_id)
            if isinstance(found, Value) and found.idle < math.inf:
                now = self._store.now()
                if rule is None or rule.idle is None or found.last(now) + rule.idle > now:
                    found.touch(now)
                    await self.write(session_id, found)

    async def drop_expired(self, session_id: str) -> bool:
        """Delete what has expired under this id; whether there was such."""
        async with self.hold(session_id):
            raw = await self._store.read_value(session_id)
            value = None if raw is None else Value.unpack(raw)
            if value is None or value.left(self._store.now()) > 0:
                return False
            await self.erase(session_id)
            return True

    async def write(self, session_id: str, value: Value) -> None:
        """Write a value; the session is held by the caller."""
        ttl = max(min(value.left(self._store.now()), _NO_BOUND), 0.001)
        await _to_the_end(self._store.write_value(session_id, value.pack(), ttl))

    async def erase(self, session_id: str) -> None:
        """Delete a value; the session is held by the caller."""
        await _to_the_end(self._store.delete_value(session_id))


async def _to_the_end(write: Coroutine[Any, Any, None]) -> None:
    """Wait for a write until it has ended, also where the request is cancelled meanwhile.

    One that went on behind the latch's back could come after one that was acknowledged since.
    """
    with anyio.CancelScope(shield=True):
        if not _is_asyncio():  # there tasks are cancelled by scopes only
            return await write
        task, cancelled = asyncio.ensure_future(write), None
        while not task.done():
            try:
                await asyncio.wait((task,))
            except asyncio.CancelledError as error:
                cancelled = error
        if cancelled is None:
            return task.result()
        if not task.cancelled():
            task.exception()  # a fault that nobody is left to hear of
        raise cancelled


def _is_asyncio() -> bool:
    """Whether the task that runs is one of asyncio's."""
    try:
        return asyncio.current_task() is not None
    except RuntimeError:
        return False
