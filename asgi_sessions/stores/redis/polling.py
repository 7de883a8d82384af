"""Waiting for a reply awake.

An event loop with nothing to do falls asleep, and its processor with it. To come back takes longer than Redis
takes to reply, and the caches are cold then: where replies come at once, a request that is alone is served in
two thirds of the time, for the same work, if the loop keeps looking instead.
"""

from __future__ import annotations

import asyncio
from typing import Any

WINDOW = 0.0001  # seconds; a loop does not look for longer
MOST_SKIPPED = 1024  # calls: where replies do not come within the window, one in so many is tried


class BusyPoll:
    """Keeps the loop turning until a reply is there; other work goes on meanwhile.

    It learns, as locks that spin do: after each reply that did not come within the window twice as many calls
    go by untried, and one that did ends that.
    """

    __slots__ = ("_loop", "_reply", "_skip", "_skipped", "_until")

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._reply: asyncio.Future[Any] | None = None  # that is looked for
        self._skip = 0  # so many calls before the next try
        self._skipped = 0
        self._until = 0.0

    def begin(self, reply: asyncio.Future[Any]) -> None:
        """Look for this one, unless another is looked for or experience is against it."""
        if self._reply is not None:
            return
        if self._skipped < self._skip:
            self._skipped += 1
            return
        self._reply, self._skipped = reply, 0
        self._until = self._loop.time() + WINDOW
        self._loop.call_soon(self._look, reply)

    def _look(self, reply: asyncio.Future[Any]) -> None:
        if reply.done():
            self._reply, self._skip = None, 0
        elif self._loop.time() < self._until:
            self._loop.call_soon(self._look, reply)
        else:
            self._reply, self._skip = None, min(2 * self._skip + 1, MOST_SKIPPED)
