"""What a thread brings to a task: one value, on asyncio or on trio."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any, Protocol

import anyio

PENDING = object()
_LONGEST = 1e8  # seconds; event loops refuse to wait for ever by a timer


class Answer(Protocol):
    """A value that comes once. Made by the task that waits, and used by nobody else but through `deliver`."""

    home: Any  # the event loop, as what can be called from other threads
    value: Any

    def settle(self, value: object) -> None:
        """Take the value, in the task's own event loop. Only the first one counts."""
        ...

    def post(self, settled: list[tuple[Answer, object]]) -> None:
        """Settle answers of this home, from any thread. `RuntimeError` where the event loop has ended."""
        ...

    async def wait(self, seconds: float) -> bool:
        """Wait so long for the value; whether it has come."""
        ...

    async def wait_out(self, seconds: float) -> BaseException | None:
        """Wait so long for the value, also when cancelled; gives that cancellation, to be raised then."""
        ...


class AsyncioAnswer:
    """On asyncio: a future that is made only where there is something to wait for."""

    __slots__ = ("_future", "home", "value")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.home = loop
        self.value: Any = PENDING
        self._future: asyncio.Future[None] | None = None

    def settle(self, value: object) -> None:
        if self.value is PENDING:
            self.value = value
            if self._future is not None:
                _wake(self._future)

    def post(self, settled: list[tuple[Answer, object]]) -> None:
        self.home.call_soon_threadsafe(_settle, settled)

    async def wait(self, seconds: float) -> bool:
        if self.value is PENDING and seconds > 0:
            self._future = self.home.create_future()
            timer = self.home.call_later(min(seconds, _LONGEST), _wake, self._future)
            try:
                await self._future
            finally:
                timer.cancel()
        return self.value is not PENDING

    async def wait_out(self, seconds: float) -> BaseException | None:
        ends, cancelled = self.home.time() + seconds, None
        while self.value is PENDING and (left := ends - self.home.time()) > 0:
            try:
                await self.wait(left)
            except asyncio.CancelledError as error:
                cancelled = error
        return cancelled


class TrioAnswer:
    """On trio."""

    __slots__ = ("_event", "home", "value")

    def __init__(self) -> None:
        import trio.lowlevel  # an optional dependency, and it runs at this moment

        self.home = trio.lowlevel.current_trio_token()
        self.value: Any = PENDING
        self._event = anyio.Event()

    def settle(self, value: object) -> None:
        if self.value is PENDING:
            self.value = value
            self._event.set()

    def post(self, settled: list[tuple[Answer, object]]) -> None:
        self.home.run_sync_soon(_settle, settled)

    async def wait(self, seconds: float) -> bool:
        with anyio.move_on_after(min(seconds, _LONGEST)):
            await self._event.wait()
        return self.value is not PENDING

    async def wait_out(self, seconds: float) -> BaseException | None:
        with anyio.CancelScope(shield=True):
            await self.wait(seconds)
        return None  # trio raises it at the next checkpoint


def new_answer() -> Answer:
    """An answer for the running task."""
    try:
        return AsyncioAnswer(asyncio.get_running_loop())
    except RuntimeError:
        return TrioAnswer()


def deliver(settled: Iterable[tuple[Answer, object]]) -> list[object]:
    """Settle answers from any thread, each event loop woken once. The values of loops that have ended."""
    by_home: dict[Any, list[tuple[Answer, object]]] = {}
    for each in settled:
        by_home.setdefault(each[0].home, []).append(each)
    lost: list[object] = []
    for group in by_home.values():
        try:
            group[0][0].post(group)
        except RuntimeError:
            lost += [value for _, value in group]
    return lost


def _settle(settled: list[tuple[Answer, object]]) -> None:
    for answer, value in settled:
        answer.settle(value)


def _wake(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
