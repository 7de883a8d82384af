"""Which library runs the current task, and what is done otherwise on each."""

from __future__ import annotations

import asyncio
import sys
from contextvars import Context
from typing import Any

import anyio


def asyncio_task() -> asyncio.Task[Any] | None:
    """The current task; None where trio runs it."""
    try:
        return asyncio.current_task()
    except RuntimeError:
        return None


if sys.version_info >= (3, 11):

    def cancellations(task: asyncio.Task[Any]) -> int | None:
        """How often the task was asked to end and has not taken it back; None before Python 3.11."""
        return task.cancelling()

else:

    def cancellations(task: asyncio.Task[Any]) -> int | None:
        """None: this is not counted."""
        return None


def take_back_cancellation(task: asyncio.Task[Any]) -> None:
    """Undo the count of one `cancel` that has done its work."""
    if sys.version_info >= (3, 11):
        task.uncancel()


_EMPTY = Context()  # for timers: a loop keeps a cancelled one for a while, and with it what its context holds


class Wake:
    """Wakes the one task that waits for it. It is small, because a thousand may wait."""

    __slots__ = ("_waiting", "is_set")

    def __init__(self) -> None:
        self.is_set = False
        self._waiting: asyncio.Future[None] | anyio.Event | None = None

    def set(self) -> None:
        """Wake the task, or keep it from waiting."""
        self.is_set = True
        if isinstance(self._waiting, asyncio.Future):
            _end(self._waiting)
        elif self._waiting is not None:
            self._waiting.set()

    async def wait(self, seconds: float) -> None:
        """Return when it is set, or after so many seconds."""
        if self.is_set:
            return
        if asyncio_task() is None:
            await self._wait_on_trio(seconds)
            return
        loop = asyncio.get_running_loop()
        future = self._waiting = loop.create_future()
        timer = loop.call_later(seconds, _end, future, context=_EMPTY)
        try:
            await future
        finally:
            timer.cancel()
            self._waiting = None

    async def _wait_on_trio(self, seconds: float) -> None:
        event = self._waiting = anyio.Event()
        with anyio.move_on_after(seconds):
            await event.wait()
        self._waiting = None


def _end(future: asyncio.Future[None]) -> None:
    """Its task goes on; nothing where that was cancelled."""
    if not future.done():
        future.set_result(None)
