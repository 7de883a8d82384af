"""What a thread brings to a task: one value, on asyncio or on trio."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

import anyio

from ...backend import Wake, asyncio_task

PENDING = object()
_LONGEST = 1e8  # seconds; event loops refuse to wait for ever by a timer


class Answer:
    """A value that comes once. Made by the task that waits; others bring the value by `deliver`."""

    __slots__ = ("_wake", "home", "value")

    def __init__(self) -> None:
        self.home = _home()
        self.value: Any = PENDING
        self._wake = Wake()

    def settle(self, value: object) -> None:
        """Take the value, in the task's own event loop. Only the first one counts."""
        if self.value is PENDING:
            self.value = value
            self._wake.set()

    async def wait(self, seconds: float) -> bool:
        """Wait so long for the value; whether it has come."""
        if self.value is PENDING and seconds > 0:
            await self._wake.wait(min(seconds, _LONGEST))
        return self.value is not PENDING

    async def wait_out(self, seconds: float) -> BaseException | None:
        """Wait so long for the value, also when cancelled; gives that cancellation, to be raised then."""
        if asyncio_task() is None:
            with anyio.CancelScope(shield=True):  # trio raises it at the next checkpoint
                await self.wait(seconds)
            return None
        loop, cancelled = asyncio.get_running_loop(), None
        ends = loop.time() + seconds
        while self.value is PENDING and (left := ends - loop.time()) > 0:
            try:
                await self.wait(left)
            except asyncio.CancelledError as error:
                cancelled = error
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
