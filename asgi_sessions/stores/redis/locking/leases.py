"""The heartbeat: each lease is renewed every third of its length, all that are due in one batch."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from functools import partial

from ....errors import SessionStoreError
from ..commands.keys import Keys
from ..commands.scripts import RENEW
from ..commands.timing import LockTiming
from ..connection.replies import Reply
from ..connection.script import Script

_logger = logging.getLogger("asgi_sessions.redis")


class Lease:
    """A lock that is held until further notice; times in seconds of the event loop's clock."""

    __slots__ = ("ahead", "due", "ends", "keys", "timing", "token", "until")

    def __init__(
        self,
        keys: Keys,
        token: bytes,
        timing: LockTiming,
        due: float,
        ends: float,
        until: float,
        ahead: float = 0.0,
    ) -> None:
        self.keys = keys
        self.token = token
        self.timing = timing
        self.ahead = ahead  # ms by which Redis' clock was ahead of the loop's when the lock was taken
        self.due = due
        self.ends = ends  # unless it is renewed
        self.until = until  # not renewed after this


class Leases:
    """All leases held on one event loop, by token. One timer, and none when nothing was held for a while.

    `on_lost` is told of a lease that is lost or will not be renewed any more.
    """

    def __init__(
        self, run: Callable[..., asyncio.Future[Reply]], on_lost: Callable[[Keys, bytes], None]
    ) -> None:
        self._run: Callable[[Script, bytes, bytes, bytes], asyncio.Future[Reply]] = run
        self._on_lost = on_lost
        self._loop = asyncio.get_running_loop()
        self._held: dict[bytes, Lease] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._fires_at = 0.0

    def __len__(self) -> int:
        return len(self._held)

    def hold(
        self, keys: Keys, token: bytes, timing: LockTiming, now: float, left: float, ahead: float = 0.0
    ) -> Lease:
        """Renew this lease until it is dropped or its `max_hold` is over.

        `left` is how much of it is left `now`, in seconds: little where the lock was handed over.
        """
        due = now + left / 3
        lease = self._held[token] = Lease(keys, token, timing, due, now + left, now + timing.max_hold, ahead)
        if self._timer is None or due < self._fires_at:
            self._arm(due)
        return lease

    def get(self, token: bytes) -> Lease | None:
        """None where it is not held, or not any more."""
        return self._held.get(token)

    def drop(self, token: bytes) -> None:
        """Renew it no more; nothing where it was not held or its `max_hold` is over."""
        self._held.pop(token, None)

    def close(self) -> list[Lease]:
        """Renew nothing any more; what was held."""
        held, self._held = list(self._held.values()), {}
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        return held

    def _arm(self, due: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._fires_at = due
        self._timer = self._loop.call_at(due, self._fire)

    def _fire(self) -> None:
        self._timer = None
        now = self._loop.time()
        for token, lease in list(self._held.items()):
            if now >= lease.until:
                self._give_up(token, lease)
                _logger.warning("a session's lock is held beyond lock_max_hold and is not renewed any more")
            elif lease.due <= now + lease.timing.lease / 30:  # those that are nearly due go along
                self._renew(token, lease, now)
        if self._held:
            self._arm(min(lease.due for lease in self._held.values()))

    def _renew(self, token: bytes, lease: Lease, now: float) -> None:
        lease.due = min(now + lease.timing.lease / 3, lease.until)
        reply = self._run(RENEW, lease.keys.lock, token, lease.timing.lease_ms)
        reply.add_done_callback(partial(self._renewed, token, lease, now + lease.timing.lease))

    def _renewed(self, token: bytes, lease: Lease, ends: float, reply: asyncio.Future[Reply]) -> None:
        if reply.cancelled() or self._held.get(token) is not lease:
            if not reply.cancelled():
                reply.exception()
            return
        error = reply.exception()
        if isinstance(error, SessionStoreError):
            _logger.warning("a session's lock could not be renewed, the next try follows: %s", error)
        elif reply.result() == 0:
            self._give_up(token, lease)
            _logger.warning(
                "a session's lock was lost while its request ran; its commit is refused if another took it"
            )
        else:
            lease.ends = ends

    def _give_up(self, token: bytes, lease: Lease) -> None:
        del self._held[token]
        self._on_lost(lease.keys, token)
