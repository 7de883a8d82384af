"""Which library runs the current task, and what is done otherwise on each."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable
from contextvars import Context
from typing import Any

import anyio


def asyncio_task() -> asyncio.Task[Any] | None:
    """The current task; None where trio runs it."""
    try:
        return asyncio.current_task()
    except RuntimeError:
        return None


class Cancellation:
    """Cancels a task once. What others cancel meanwhile is told from it."""

    __slots__ = ("_before", "is_done", "task")

    def __init__(self, task: asyncio.Task[Any]) -> None:
        self.task = task
        self.is_done = False
        self._before = _cancellations(task)

    def cancel(self) -> None:
        """Cancel the task."""
        self.is_done = True
        self.task.cancel()

    def is_by_others(self, error: BaseException) -> bool:
        """Whether others are cancelling the task, which this error has reached. Ask before `is_over`."""
        now = _cancellations(self.task)
        if now is None or self._before is None:
            return isinstance(error, asyncio.CancelledError) and not self.is_done
        return now - self.is_done > self._before

    def is_over(self) -> None:
        """It has done its work: the task is not being cancelled by it any more."""
        if self.is_done and sys.version_info >= (3, 11):
            self.task.uncancel()


def _cancellations(task: asyncio.Task[Any]) -> int | None:
    """How often the task was asked to end and has not taken it back; None before Python 3.11."""
    return task.cancelling() if sys.version_info >= (3, 11) else None


_LONGEST = 1e8  # seconds; event loops refuse to wait for ever by a timer
_EMPTY = Context()  # for timers: a loop keeps a cancelled one for a while, and with it what its context holds


class Wake:
    """Wakes the one task that waits for it. It is small, because a thousand may wait."""

    __slots__ = ("_timer", "_waiting", "is_set")

    def __init__(self) -> None:
        self.is_set = False
        self._waiting: asyncio.Future[None] | anyio.Event | None = None
        self._timer: asyncio.TimerHandle | None = None

    def set(self) -> None:
        """Wake the task, or keep it from waiting."""
        self.is_set = True
        if isinstance(self._waiting, asyncio.Future):
            _end(self._waiting)
        elif self._waiting is not None:
            self._waiting.set()

    async def wait(self, seconds: float) -> None:
        """Return when it is set, or after so many seconds; at once where there are none."""
        if self.is_set or seconds <= 0:
            return
        try:
            await self.begin(min(seconds, _LONGEST))
        finally:
            self.end()

    def begin(self, seconds: float) -> Awaitable[None]:
        """The same without a coroutine of its own: await what this gives, and call `end` whatever comes."""
        if asyncio_task() is None:
            return self._wait_on_trio(seconds)
        loop = asyncio.get_running_loop()
        future = self._waiting = loop.create_future()
        if self.is_set:
            future.set_result(None)
        else:
            self._timer = loop.call_later(seconds, _end, future, context=_EMPTY)
        return future

    def end(self) -> None:
        """Nobody waits any more."""
        if self._timer is not None:
            self._timer.cancel()
        self._waiting = self._timer = None

    async def _wait_on_trio(self, seconds: float) -> None:
        if not self.is_set:
            event = self._waiting = anyio.Event()
            with anyio.move_on_after(seconds):
                await event.wait()


def _end(future: asyncio.Future[None]) -> None:
    """Its task goes on; nothing where that was cancelled."""
    if not future.done():
        future.set_result(None)
