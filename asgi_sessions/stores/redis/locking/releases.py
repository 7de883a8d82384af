"""Lets locks go, and repeats a release until Redis takes it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Hashable
from functools import partial

from redis.exceptions import ResponseError

from ....errors import SessionStoreError
from ..commands.keys import Keys
from ..commands.scripts import RELEASE
from ..commands.timing import LockTiming
from ..connection.call import CLOSED, forget
from ..connection.replies import Reply
from ..connection.routing import Router

FIRST_PAUSE, LONGEST_PAUSE = 0.05, 0.2  # seconds between two questions; it doubles
MOST = 4096  # releases of one node that are kept, about 2 MB; the oldest ones end with their leases then

_logger = logging.getLogger("asgi_sessions.redis")


class _Release:
    __slots__ = ("key", "packed", "under_way", "until")

    def __init__(self, key: bytes, packed: bytes, until: float) -> None:
        self.key = key
        self.packed = packed
        self.until = until  # by then the lease is over, if Redis answers at all
        self.under_way = False


class Releases:
    """The releases of one event loop. Those that failed are kept by node and token. One timer at the most.

    While a node is in trouble, one release at a time asks whether it is well. When that one is taken, all
    others follow. So a release is taken at most `LONGEST_PAUSE` after the node is well, and an outage costs
    some calls per second, however many sessions it met.

    A release that a node refuses is given up when the lease is over. One that it does not answer is kept: a
    frozen node may carry out the acquire late, and the lease begins then.
    """

    def __init__(self, router: Router) -> None:
        self._router = router
        self._loop = asyncio.get_running_loop()
        self._failed: dict[Hashable, dict[bytes, _Release]] = {}  # oldest first
        self._timer: asyncio.TimerHandle | None = None
        self._pause = FIRST_PAUSE
        self._closed = self._ended = False

    def __len__(self) -> int:
        return sum(map(len, self._failed.values()))

    def let_go(self, keys: Keys, token: bytes, timing: LockTiming) -> asyncio.Future[Reply]:
        """Release the lock or the place in the queue that has this token; need not be awaited.

        Where that fails it is tried again until the lease is over. The reply is the first try's: 1 where the
        lock was ours, 0 where it was not.
        """
        if self._ended:
            refused: asyncio.Future[Reply] = self._loop.create_future()
            refused.set_exception(SessionStoreError(CLOSED))
            forget(refused)
            return refused
        packed = b"%b%b$%d\r\n%b\r\n%b" % (
            RELEASE.by_sha, keys.packed, len(token), token, timing.release,
        )  # fmt: skip
        reply = self._run(keys.record, packed)
        reply.add_done_callback(partial(self._posted, keys.record, token, packed, timing.lease))
        return reply

    def close(self) -> None:
        """Try what has failed once more, now. From here on a release that fails is not tried again."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        for node in list(self._failed):
            self._send_all(node)

    def end(self) -> None:
        """Release nothing from now on."""
        self._ended = True

    def _run(self, key: bytes, packed: bytes) -> asyncio.Future[Reply]:
        return self._router.pipeline(key).run(RELEASE, packed)

    def _posted(
        self, key: bytes, token: bytes, packed: bytes, lease: float, reply: asyncio.Future[Reply]
    ) -> None:
        error = None if reply.cancelled() else reply.exception()
        if self._closed or (error is None and not reply.cancelled()):
            return
        if not self._failed:
            _logger.warning("a session's lock could not be let go, it is tried again: %s", error)
        failed = self._failed.setdefault(self._router.pipeline(key), {})
        failed[token] = _Release(key, packed, self._loop.time() + lease)
        if len(failed) > MOST:
            del failed[next(iter(failed))]
        self._arm()

    def _arm(self) -> None:
        if self._failed and self._timer is None and not self._closed:
            self._timer = self._loop.call_later(self._pause, self._fire)

    def _fire(self) -> None:
        self._timer = None
        self._pause = min(2 * self._pause, LONGEST_PAUSE)
        for node, failed in list(self._failed.items()):
            token, oldest = next(iter(failed.items()))
            if not oldest.under_way:
                self._send(node, token, oldest)

    def _send(self, node: Hashable, token: bytes, release: _Release) -> None:
        release.under_way = True
        self._run(release.key, release.packed).add_done_callback(
            partial(self._answered, node, token, release)
        )

    def _send_all(self, node: Hashable) -> None:
        for token, release in list(self._failed.get(node, {}).items()):
            if not release.under_way:
                self._send(node, token, release)

    def _answered(
        self, node: Hashable, token: bytes, release: _Release, reply: asyncio.Future[Reply]
    ) -> None:
        release.under_way = False
        error = None if reply.cancelled() else reply.exception()
        taken = error is None and not reply.cancelled()
        failed = self._failed.get(node, {})
        if failed.get(token) is release:
            del failed[token]
            refused = error is not None and isinstance(error.__cause__, ResponseError)
            if not taken and not (refused and self._loop.time() >= release.until):
                failed[token] = release  # behind the others: one that is refused for good holds up nobody
        if not failed:
            self._failed.pop(node, None)
        if taken:
            self._pause = FIRST_PAUSE
            self._send_all(node)
        self._arm()
