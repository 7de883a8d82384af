"""The messages of a request: read ahead while it waits for the lock, played once more to the second run."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

import anyio

from ..asgi import Message, Receive
from ..backend import asyncio_task
from ..errors import ClientGoneError

MAX_BODY = 64 * 1024
"""Bytes of a body that are kept."""

_MOST = 64  # messages that are read ahead: there are servers whose `receive` never waits
_MOST_KEPT = 1024  # messages: they may be empty
_LOOK_AFTER = 0.25  # seconds that a request waits before its client is watched: most waits are shorter

T = TypeVar("T")


def _never() -> None:
    """For a run of the app that counts."""


class Incoming:
    """What the client sends. Messages are kept while they are few and their bodies within `MAX_BODY` bytes.

    Each run of the app reads them from the first one on. One reader at a time asks the server. A question
    that is under way is never cancelled, for its message would be lost: the next reader waits for it.
    """

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._kept: list[Message] = []
        self._size = 0
        self._ahead: asyncio.Task[None] | None = None  # reads while the request waits
        self._is_watching = False
        self._turn: anyio.Lock | None = None
        self.is_whole = True  # everything that came was kept

    def reader(self, refuse: Callable[[], None] = _never) -> Receive:
        """What a run of the app calls `receive`, from the first message on; `refuse` may end it."""
        played = 0

        async def receive() -> Message:
            nonlocal played
            refuse()
            turn = self._turn = self._turn or anyio.Lock()
            try:
                turn.acquire_nowait()  # no checkpoint: an app may ask in a cancelled scope what has come
            except anyio.WouldBlock:
                await turn.acquire()
            try:
                await self._end_of_reading_ahead(played)
                is_next = played == len(self._kept)
                if is_next:
                    await self._read()
                refuse()  # the message is left to the next run
                message = self._kept[played]
                if is_next and not self.is_whole:
                    self._kept.pop()
                else:
                    played += 1
                return message
            finally:
                turn.release()

        return receive

    async def _read(self) -> Message:
        message = await self._receive()
        self._kept.append(message)
        self._size += len(message.get("body", b""))
        self.is_whole = self.is_whole and self._size <= MAX_BODY and len(self._kept) <= _MOST_KEPT
        return message

    # -- while the request waits ------------------------------------------------------------------------

    async def wait(self, turn: Callable[[], Awaitable[T]]) -> T:
        """Wait for a turn, but no longer than the client stays: `ClientGoneError` once it has gone.

        Whoever has no client any more would make those behind it wait for nothing.
        """
        if asyncio_task() is None:
            return await self._wait_on_trio(turn)
        with anyio.CancelScope() as waiting:
            stop = self._watch(waiting.cancel)
            try:
                return await turn()
            finally:
                stop()
        raise ClientGoneError

    async def _wait_on_trio(self, turn: Callable[[], Awaitable[T]]) -> T:
        """There no message is lost where `receive` is cancelled."""
        taken: list[T] = []
        failure: Exception | None = None
        async with anyio.create_task_group() as group:
            self._is_watching = True
            group.start_soon(self._read_ahead, group.cancel_scope.cancel)
            try:
                taken.append(await turn())
            except Exception as error:
                failure = error
            group.cancel_scope.cancel()
        if taken:
            return taken[0]
        raise failure or ClientGoneError

    def _watch(self, gone: Callable[[], None]) -> Callable[[], None]:
        """Call `gone` when the client has gone. Returns what ends the watch."""
        loop = asyncio.get_running_loop()
        timer = loop.call_later(_LOOK_AFTER, self._look, gone)

        def stop() -> None:
            timer.cancel()
            self._is_watching = False

        return stop

    def _look(self, gone: Callable[[], None]) -> None:
        self._is_watching = True
        if self._ahead is None or self._ahead.done():
            self._ahead = asyncio.ensure_future(self._read_ahead(gone))

    async def _read_ahead(self, gone: Callable[[], None]) -> None:
        while self._is_watching and self._size < MAX_BODY and len(self._kept) < _MOST:
            message = await self._read()
            if message["type"] == "http.disconnect":
                if self._is_watching:
                    gone()
                return

    async def _end_of_reading_ahead(self, played: int) -> None:
        """Wait for a message that was asked for while the request waited, if all others were played."""
        if self._ahead is not None and played >= len(self._kept):
            if not self._ahead.done():
                await asyncio.wait((self._ahead,))
            self._ahead.result()  # raises what the server raised

    def close(self) -> None:
        """The request is over: nobody reads any more."""
        if self._ahead is not None:
            self._ahead.cancel()
