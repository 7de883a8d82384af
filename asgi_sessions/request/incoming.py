"""The messages of a request: read ahead while it waits for the lock, played once more to the second run."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import anyio

from ..asgi import Message, Receive
from ..backend import Cancellation, asyncio_task
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

    __slots__ = ("_ahead", "_first", "_kept", "_leaving", "_receive", "_size", "_timer", "_turn", "is_whole")

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._first: Receive | None = None  # made when the app asks
        self._kept: list[Message] = []
        self._size = 0
        self._ahead: asyncio.Task[Message] | None = None  # a question that is asked while the request waits
        self._timer: asyncio.TimerHandle | None = None
        self._leaving: Cancellation | anyio.CancelScope | None = None  # ends the wait when the client goes
        self._turn: anyio.Lock | None = None
        self.is_whole = True  # everything that came was kept

    async def receive(self) -> Message:
        """What a request that had to wait calls `receive`."""
        if self._first is None:
            self._first = self.reader()
        return await self._first()

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
                    self._keep(await self._receive())
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

    def _keep(self, message: Message) -> Message:
        self._kept.append(message)
        self._size += len(message.get("body", b""))
        self.is_whole = self.is_whole and self._size <= MAX_BODY and len(self._kept) <= _MOST_KEPT
        return message

    # -- while the request waits ------------------------------------------------------------------------

    async def wait(self, turn: Coroutine[Any, Any, T]) -> T:
        """Wait for a turn, but no longer than the client stays: `ClientGoneError` once it has gone.

        Whoever has no client any more would make those behind it wait for nothing.
        """
        task = asyncio_task()
        if task is None:
            return await self._wait_on_trio(turn)
        leaving = Cancellation(task)
        self._timer = task.get_loop().call_later(_LOOK_AFTER, self._look, leaving)
        try:
            return await turn
        except asyncio.CancelledError as error:
            if not leaving.is_done or leaving.is_by_others(error):
                raise
        finally:
            if self._timer is not None:
                self._timer.cancel()
            self._leaving = None
            leaving.is_over()
        raise ClientGoneError

    async def _wait_on_trio(self, turn: Coroutine[Any, Any, T]) -> T:
        """There no message is lost where `receive` is cancelled."""
        taken: list[T] = []
        failure: Exception | None = None
        try:
            async with anyio.create_task_group() as group:
                self._leaving = group.cancel_scope
                group.start_soon(self._ask_on_trio)
                try:
                    taken.append(await turn)
                except Exception as error:
                    failure = error
                group.cancel_scope.cancel()
        except anyio.get_cancelled_exc_class():
            if not taken:
                raise
            # what was taken is the caller's to let go: the cancellation comes again where it waits next
        if taken:
            return taken[0]
        raise failure or ClientGoneError

    async def _ask_on_trio(self) -> None:
        while self._leaving is not None and self._has_room():
            self._take(await self._receive())

    def _look(self, leaving: Cancellation) -> None:
        """Watch the client. The question that is under way when the turn comes is left to the app."""
        self._timer, self._leaving = None, leaving
        self._ask()

    def _ask(self) -> None:
        """Read on. No coroutine of ours is around it: a thousand may wait."""
        if self._leaving is not None and self._has_room():
            self._ahead = asyncio.ensure_future(self._receive())
            self._ahead.add_done_callback(self._came)

    def _came(self, asked: asyncio.Task[Message]) -> None:
        """An answer to the question: of the event loop, or of a reader that was faster."""
        if asked is self._ahead and not asked.cancelled() and asked.exception() is None:
            self._ahead = None
            self._take(asked.result())
            self._ask()

    def _take(self, message: Message) -> None:
        """A message has come while the request waits."""
        self._keep(message)
        if message["type"] == "http.disconnect" and self._leaving is not None:
            self._leaving.cancel()
            self._leaving = None

    def _has_room(self) -> bool:
        return self._size < MAX_BODY and len(self._kept) < _MOST

    async def _end_of_reading_ahead(self, played: int) -> None:
        """Wait for a message that was asked for while the request waited, if all others were played."""
        asked = self._ahead
        if asked is not None and played >= len(self._kept):
            if not asked.done():
                await asyncio.wait((asked,))
            asked.result()  # raises what the server raised
            self._came(asked)

    def close(self) -> None:
        """The request is over: nobody reads any more."""
        if self._ahead is not None:
            self._ahead.cancel()
