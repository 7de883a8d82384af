"""What a thread brings to a task: one value, on asyncio or on trio."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from typing import Any

import anyio

from ..backend import Wake

PENDING = object()


class Answer(Wake):
    """A value that comes once. Made by the task that waits; others bring the value by `deliver`."""

    __slots__ = ("home", "value")

    def __init__(self) -> None:
        super().__init__()
        self.home = _home()
        self.value: Any = PENDING

    def settle(self, value: object) -> None:
        """Take the value, in the task's own event loop. Only the first one counts."""
        if self.value is PENDING:
            self.value = value
            self.set()

    async def wait_out(self, seconds: float) -> BaseException | None:
        """Wait so long for the value, also when cancelled; gives that cancellation, to be raised then."""
        if not isinstance(self.home, asyncio.AbstractEventLoop):
            with anyio.CancelScope(shield=True):  # trio raises it at the next checkpoint
                await self.wait(seconds)
            return None
        cancelled, ends = None, time.monotonic() + seconds
        while self.value is PENDING and seconds > 0:
            try:
                await self.wait(seconds)
            except asyncio.CancelledError as error:
                cancelled = error
            seconds = ends - time.monotonic()
        return cancelled


def deliver(settled: Iterable[tuple[Answer, object]]) -> list[object]:
    """Settle answers from any thread, each event loop woken once. The values of loops that have ended."""
    by_home: dict[Any, list[tuple[Answer, object]]] = {}
    for each in settled:
        by_home.setdefault(each[0].home, []).append(each)
    lost: list[object] = []
    for home, group in by_home.items():
        call = home.call_soon_threadsafe if hasattr(home, "call_soon_threadsafe") else home.run_sync_soon
        try:
            call(_settle, group)
        except RuntimeError:
            lost += [value for _, value in group]
    return lost


def _settle(settled: list[tuple[Answer, object]]) -> None:
    for answer, value in settled:
        answer.settle(value)


def _home() -> Any:
    """The running event loop, as other threads call it."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        import trio.lowlevel  # an optional dependency, and it runs at this moment

        return trio.lowlevel.current_trio_token()
