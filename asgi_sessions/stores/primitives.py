"""The values of a store that has four primitives: found, bounded, written, erased."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol

import anyio

from ..backend import asyncio_task
from ..record.codec import id_of
from .checkout import Lifetime, Missing, shorter
from .local import Latches
from .value import Value

_NO_BOUND = 400 * 86400.0  # seconds for what never ends; no browser keeps a cookie for longer


class Primitives(Protocol):
    """What somebody else's store implements."""

    def now(self) -> float:
        """The store's clock: seconds since the epoch."""
        ...

    async def read_value(self, session_id: str) -> bytes | None: ...
    async def write_value(self, session_id: str, value: bytes, ttl: float) -> None: ...
    async def delete_value(self, session_id: str) -> None: ...
    def iter_ids(self) -> AsyncGenerator[str, None]: ...


class Values:
    """A store's values by session id. Hold the session from before you read until you have written.

    `on_erased` is told of each that is deleted.
    """

    def __init__(self, store: Primitives, on_erased: Callable[[Sequence[str]], None]) -> None:
        self._store = store
        self._on_erased = on_erased
        self._latches = Latches()

    def hold(self, session_id: str) -> AbstractAsyncContextManager[None]:
        """Keep other tasks from this session's value for a block."""
        return self._latches.hold(session_id)

    async def find(self, session_id: str) -> Value | Missing:
        """The live record of this id; ABSENT where there is none, UNREADABLE where it is not ours."""
        raw = await self._store.read_value(session_id)
        if raw is None:
            return Missing.ABSENT
        value = Value.unpack(raw)
        if value is None or id_of(value.record) not in (session_id, None):
            return Missing.UNREADABLE
        return value if value.ends > self._store.now() else Missing.ABSENT

    async def bounded(self, session_id: str, rule: Lifetime | None) -> Value | Missing:
        """As `find`, with the bounds shortened to the rule; ABSENT where the record has ended by that.

        The caller holds the session, for this as for `write` and `erase`.
        """
        found = await self.find(session_id)
        if rule is None or not isinstance(found, Value):
            return found
        now = self._store.now()
        bounds = shorter(rule, found.checkout(session_id, now, None))
        if bounds is None:
            return found
        found.bound(bounds, now)
        if found.ends > now:
            await self.write(session_id, found)
            return found
        await self.erase(session_id)
        return Missing.ABSENT

    async def touch(self, session_id: str, rule: Lifetime | None = None) -> None:
        """Restart the idle timeout of a record that has not ended, by `rule` too; its client has come."""
        async with self.hold(session_id):
            found = await self.find(session_id)
            if isinstance(found, Value) and found.until < math.inf and found.arrive(rule, self._store.now()):
                await self.write(session_id, found)

    async def drop_expired(self, session_id: str) -> bool:
        """Delete the record of this id if it has expired; whether it had."""
        async with self.hold(session_id):
            raw = await self._store.read_value(session_id)
            value = None if raw is None else Value.unpack(raw)
            if value is None or value.ends > self._store.now():
                return False
            await self.erase(session_id)
            return True

    async def write(self, session_id: str, value: Value) -> None:
        """Write a value."""
        ttl = max(min(value.ends - self._store.now(), _NO_BOUND), 0.001)
        await _to_the_end(self._store.write_value(session_id, value.pack(), ttl))

    async def erase(self, session_id: str) -> None:
        """Delete a value, and tell who waits for that."""
        await _to_the_end(self._store.delete_value(session_id))
        self._on_erased([session_id])


async def _to_the_end(write: Coroutine[Any, Any, None]) -> None:
    """Wait for a write until it has ended, even if the request is cancelled meanwhile.

    A write that went on without its latch could overwrite one that was acknowledged later.
    """
    with anyio.CancelScope(shield=True):
        if asyncio_task() is None:  # on trio the scope is enough
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
            task.exception()  # fetch the error, or asyncio logs that nobody did
        raise cancelled
