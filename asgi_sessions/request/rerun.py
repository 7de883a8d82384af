"""A safe request that runs without the lock, and is run again under it where its change was refused."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, MutableMapping
from contextvars import Context, copy_context
from typing import Any

import anyio

from ..asgi import Message, Receive, Scope
from ..backend import Cancellation, asyncio_task
from .answers import route_of
from .incoming import Incoming

GRACE = 5.0
"""Seconds that a discarded run of the app has to end by itself."""

_OF_THE_REQUEST = ("headers", "state", "extensions", "path_params")
"""What apps change in place in a scope. Anything else in it may be shared with other requests."""

_CHANGEABLE = frozenset({dict, list})
_logger = logging.getLogger("asgi_sessions")
_ENDS_ALL = (KeyboardInterrupt, SystemExit, GeneratorExit)


class Discarded(BaseException):
    """Ends a run of the app. It is no `Exception`, so that no handler of the app makes an answer of it."""


class Rerun:
    """A request as it came: its scope, its messages and its context variables.

    The first run ends by a `Discarded`, which `send` raises. How the app takes it does not matter: that the
    run was discarded is what counts. A run that does not end within `GRACE` seconds is cancelled.
    """

    def __init__(self, scope: Scope, receive: Receive) -> None:
        self._scope = scope
        self._saved = dict(scope)
        value: Any
        self._saved_within = [
            (value, value.copy()) for name in _OF_THE_REQUEST if type(value := scope.get(name)) in _CHANGEABLE
        ]
        self._context = copy_context()
        self._receive = receive
        self._incoming: Incoming | None = None  # where the app has asked for a message
        self._reader: Receive | None = None
        self.is_discarded = False
        task = asyncio_task()
        self._end = None if task is None else Cancellation(task)
        self._timer: asyncio.TimerHandle | None = None
        self._is_cut_off = False
        self._trio_scope: anyio.CancelScope | None = None

    def refuse(self) -> None:
        """Raise `Discarded` where this run of the app is."""
        if self.is_discarded:
            raise Discarded

    @property
    def has_all_messages(self) -> bool:
        """Whether the second run can read everything that the first one has read."""
        return self._incoming is None or self._incoming.is_whole

    async def receive(self) -> Message:
        """What the first run calls `receive`."""
        if self._reader is None:
            self._incoming = Incoming(self._receive)
            self._reader = self._incoming.reader(self.refuse)
        return await self._reader()

    def discard(self) -> None:
        """The first run counts for nothing any more."""
        self.is_discarded = True
        if self._end is not None:
            self._timer = self._end.task.get_loop().call_later(GRACE, self._end.cancel)
        elif self._trio_scope is not None:
            self._trio_scope.deadline = anyio.current_time() + GRACE

    # -- the first run ----------------------------------------------------------------------------------

    async def first(self, run: Awaitable[None]) -> None:
        """Run the app for the first time. What a discarded run raises is of no interest."""
        try:
            if self._end is None:
                with anyio.CancelScope() as self._trio_scope:
                    await run
                self._is_cut_off = self._trio_scope.cancelled_caught
            else:
                await run
        except BaseException as error:
            if not self.is_discarded or isinstance(error, _ENDS_ALL) or self._is_cancelled(error):
                raise
            _logger.debug("a discarded run of the app ended with %s", type(error).__name__)
        finally:
            self.is_over()
        if self._is_cut_off:
            _logger.warning(
                "%s: the app did not end within %d s after its run was discarded, and was cancelled",
                route_of(self._scope), GRACE,
            )  # fmt: skip

    def is_over(self) -> None:
        """The first run has ended: nothing is left to cancel."""
        if self._timer is not None:
            self._timer.cancel()
        if self._end is not None and self._end.is_done:
            self._is_cut_off = True
            self._end.is_over()

    def _is_cancelled(self, error: BaseException) -> bool:
        """Whether the request itself is being cancelled, not the discarded run alone."""
        if self._end is None:
            return isinstance(error, anyio.get_cancelled_exc_class())
        return self._end.is_by_others(error)

    # -- the second run ---------------------------------------------------------------------------------

    async def again(self, run: Callable[[Scope, Receive], Awaitable[None]]) -> None:
        """Run the app once more with the scope, the messages and the context variables of the first time."""
        self._restore()
        failure: BaseException | None = None
        after: Context | None = None
        receive = self._receive if self._incoming is None else self._incoming.reader()

        async def second() -> None:
            nonlocal failure, after
            try:
                await run(self._scope, receive)
            except anyio.get_cancelled_exc_class():
                raise
            except BaseException as error:
                failure = error
            after = copy_context()

        async with anyio.create_task_group() as group:
            self._context.run(group.start_soon, second)
        if after is not None:
            _take_over(after)
        try:
            if failure is not None:
                raise failure
        finally:
            failure = None  # its traceback holds this frame

    def _restore(self) -> None:
        """Bring the scope and what was in it back, in place: those around us hold the same objects."""
        self._scope.clear()
        self._scope.update(self._saved)
        for value, copy in self._saved_within:
            value.clear()
            (value.update if isinstance(value, dict) else value.extend)(copy)


def _take_over(context: Context) -> None:
    """Set the variables here as they were there."""
    here: MutableMapping[Any, Any] = dict(copy_context())
    for variable, value in context.items():
        if here.get(variable, context) is not value:
            variable.set(value)
