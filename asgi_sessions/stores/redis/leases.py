"""The heartbeat: every lease that is held is renewed each third of it, all that are due in one batch."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from functools import partial

from ...errors import SessionStoreError
from .scripts import RENEW, Script
from .transport import Reply

_logger = logging.getLogger("asgi_sessions.redis")


class Lease:
    """A lock that is held until further notice; times in seconds of the event loop's clock."""

    __slots__ = ("due", "length", "lock", "until")

    def __init__(self, lock: bytes, length: float, due: float, until: float) -> None:
        self.lock = lock
        self.length = length
        self.due = due
        self.until = until  # not renewed after this


class Leases:
    """All leases held on one event loop, by token. One timer; none when nothing was held for a while."""

    def __init__(self, run: Callable[..., asyncio.Future[Reply]]) -> None:
        self._run: Callable[[Script, bytes, bytes, bytes], asyncio.Future[Reply]] = run
        self._loop = asyncio.get_running_loop()
        self._held: dict[bytes, Lease] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._fires_at = 0.0

    def __len__(self) -> int:
        return len(self._held)

    def hold(self, token: bytes, lock: bytes, length: float, max_hold: float, first: float) -> None:
        """Renew this lease of `length` seconds until it is dropped or `max_hold` is over.

        `first` is how much of it is left now: less than `length` for a lock that was handed over.
        """
        now = self._loop.time()
        lease = Lease(lock, length, now + first / 3, now + max_hold)
        self._held[token] = lease
        if self._timer is None or lease.due < self._fires_at:
            self._arm(lease.due)

    def drop(self, token: bytes) -> None:
        """Renew it no more; nothing where it was not held or its `max_hold` is over."""
        self._held.pop(token, None)

    def close(self) -> None:
        """Renew nothing any more."""
        self._held.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

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
                del self._held[token]
                _logger.warning("a session's lock is held beyond lock_max_hold and is not renewed any more")
            elif lease.due <= now + lease.length / 30:  # those that are nearly due go along
                self._renew(token, lease, now)
        if self._held:
            self._arm(min(lease.due for lease in self._held.values()))

    def _renew(self, token: bytes, lease: Lease, now: float) -> None:
        lease.due = min(now + lease.length / 3, lease.until)
        reply = self._run(RENEW, lease.lock, token, b"%d" % round(lease.length * 1000))
        reply.add_done_callback(partial(self._renewed, token, lease))

    def _renewed(self, token: bytes, lease: Lease, reply: asyncio.Future[Reply]) -> None:
        if reply.cancelled() or self._held.get(token) is not lease:
            if not reply.cancelled():
                reply.exception()
            return
        error = reply.exception()
        if isinstance(error, SessionStoreError):
            _logger.warning("a session's lock could not be renewed, the next try follows: %s", error)
        elif reply.result() == 0:
            del self._held[token]
            _logger.warning("a session's lock was lost while its request ran; its commit will be refused")
