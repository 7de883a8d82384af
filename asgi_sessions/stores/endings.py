"""Who of this process waits for the end of a session, and how the end is noticed."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import NamedTuple

from ..errors import SessionStoreError
from .answers import Answer, deliver

MARGIN = 0.005  # seconds after which a record that was to end has surely ended
LOOK_EVERY = 30.0  # seconds, where an end is told: an operator, or an older release, ends without a word
_FIRST_PAUSE, _LONGEST_PAUSE = 0.25, 5.0  # seconds between two looks where nobody tells; it doubles


class Life(NamedTuple):
    """How a session lives.

    `left`: for so many seconds, if no request prolongs it. `is_told`: an earlier end comes to `Endings.tell`.
    """

    left: float
    is_told: bool


class _Watched:
    """A session that somebody waits for. One of those who wait looks for all."""

    __slots__ = ("due", "fault", "has_ended", "pause", "sleepers", "waiters")

    def __init__(self) -> None:
        self.waiters = 0
        self.sleepers: set[Answer] = set()
        self.due = -math.inf  # when to look next, by the monotonic clock; inf: somebody looks now
        self.pause = _FIRST_PAUSE
        self.has_ended = False
        self.fault: SessionStoreError | None = None  # why nobody waits any more

    @property
    def is_over(self) -> bool:
        return self.has_ended or self.fault is not None

    async def sleep(self) -> None:
        """Until the next look is due, or until something is known."""
        answer = Answer()
        self.sleepers.add(answer)
        try:
            if not self.is_over:
                due = time.monotonic() + self.pause if self.due == math.inf else self.due
                await answer.wait(due - time.monotonic())
        finally:
            self.sleepers.discard(answer)


class Endings:
    """The sessions whose end somebody of this process waits for. Used from any event loop and thread.

    `look` says how a session lives, None where it has ended. It is asked when somebody begins to wait, when
    the life that it told of is over, and now and then where nobody tells. A fault of the store is no end: the
    session is looked at again. `on_idle` is called when nobody waits any more.
    """

    def __init__(
        self, look: Callable[[str], Awaitable[Life | None]], on_idle: Callable[[], object] = bool
    ) -> None:
        self._look = look
        self._on_idle = on_idle
        self._watched: dict[str, _Watched] = {}

    def __len__(self) -> int:
        return len(self._watched)

    async def wait(self, session_id: str) -> None:
        """Return when the session has ended; at once where it is absent.

        `SessionStoreError` where the store is closed meanwhile. Cancelled, nothing is left behind.
        """
        watched = self._watched.setdefault(session_id, _Watched())
        watched.waiters += 1
        try:
            while not watched.is_over:
                if watched.due <= time.monotonic():
                    await self._see(session_id, watched)
                else:
                    await watched.sleep()
        finally:
            watched.waiters -= 1
            if not watched.waiters and self._watched.get(session_id) is watched:
                del self._watched[session_id]
            if not self._watched:
                self._on_idle()
        if watched.fault is not None:
            raise SessionStoreError(*watched.fault.args)

    def tell(self, session_ids: Iterable[str]) -> None:
        """These sessions have ended; nothing for those that nobody waits for."""
        woken: list[Answer] = []
        for session_id in session_ids:
            watched = self._watched.pop(session_id, None)
            if watched is not None:
                watched.has_ended = True
                woken += list(watched.sleepers)
        _wake(woken)

    def doubt(self) -> None:
        """The end of any of them may have been missed: each is looked at again."""
        woken: list[Answer] = []
        for watched in list(self._watched.values()):
            watched.due = -math.inf
            woken += list(watched.sleepers)
        _wake(woken)

    def close(self, fault: SessionStoreError) -> None:
        """Send away who waits, with this."""
        woken: list[Answer] = []
        for watched in list(self._watched.values()):
            watched.fault = fault
            woken += list(watched.sleepers)
        self._watched.clear()
        _wake(woken)

    async def _see(self, session_id: str, watched: _Watched) -> None:
        """Look for all who wait for this session. Where this task is cancelled, another one looks."""
        life: Life | None = Life(math.inf, False)
        asked, watched.due = time.monotonic(), math.inf
        try:
            with contextlib.suppress(SessionStoreError):
                life = await self._look(session_id)
        except BaseException:
            watched.due = -math.inf
            raise
        if life is None:
            self.tell([session_id])
            watched.has_ended = True
            return
        left = min(life.left + MARGIN, LOOK_EVERY)
        if not life.is_told:
            left = min(left, watched.pause)
            watched.pause = min(2 * watched.pause, _LONGEST_PAUSE)
        if watched.due == math.inf:  # else there is a doubt since
            watched.due = asked + left


def _wake(sleepers: list[Answer]) -> None:
    if sleepers:
        deliver([(answer, None) for answer in sleepers])
