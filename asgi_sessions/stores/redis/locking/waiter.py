"""Waiting for a lock in Redis: one caller's way to it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import NamedTuple, cast

from ....errors import LockTimeoutError, TooManyWaitersError
from ...holders import NOTICE_AFTER
from ...tokens import new_token
from ..commands.commands import Commands
from ..commands.keys import Keys
from ..commands.scripts import ACQUIRE
from ..commands.timing import NO_CHANNEL, LockTiming
from ..connection.call import NotSentError
from ..connection.replies import words_of
from ..connection.resp import pack_args
from .releases import Releases
from .subscription import Subscription

POLL_UNTOLD = 0.1  # seconds between two questions of a waiter that is not told
MARGIN = 0.002  # seconds after the end of another's lease: Redis counts in whole milliseconds


class Acquired(NamedTuple):
    """The lock and the record.

    `ahead` is by how much Redis' clock is ahead of the loop's, in ms; `left` of the lease is in seconds.
    """

    token: bytes
    value: bytes
    ahead: float
    left: float
    waited: float

    def __repr__(self) -> str:
        return f"Acquired(left={self.left}, waited={self.waited})"


class Wanted(NamedTuple):
    """A lock that a caller wants to have."""

    keys: Keys
    timing: LockTiming
    started: float  # when the wait began, by the loop's time
    who: bytes = b""  # is written beside the token: see `commands.who`
    token: bytes = b""  # of the lock, where another holder of this process leaves it to the caller

    def __repr__(self) -> str:
        return f"Wanted(started={self.started})"


class Place:
    """The tokens of one caller that Redis may know. Each question has a fresh one.

    A message is believed only for the token that Redis' last answer spoke of: a process that was frozen may
    find one for a lock that was given to others since.

    answer   the token is now  given up
    -------  ----------------  --------------------------------------------------------------------------
    L, W     the fresh one     the earlier one: the lock or the place is under the fresh one
    K        the earlier one   the fresh one, which counts for nothing
    B        the earlier one   the fresh one, which Redis did not keep
    A, R, X  none              both: the queue is gone
    none     the earlier one   nothing: Redis may know both, and both have to be let go in the end
    """

    __slots__ = ("fresh", "token")

    def __init__(self, token: bytes = b"") -> None:
        self.token = token  # of a lock or a place in the queue; empty: none
        self.fresh = b""  # asked under, and not yet answered

    def ask(self) -> bytes:
        """The token of the next question."""
        self.fresh = new_token()
        return self.fresh

    def answered(self, kind: bytes) -> tuple[bytes, ...]:
        """The tokens that are given up."""
        earlier, fresh = self.token, self.fresh
        self.fresh = b""
        if kind in (b"L", b"W"):
            self.token = fresh
            return (earlier,)
        if kind in (b"K", b"B"):
            return (fresh,)
        return earlier, fresh, *self.gone()

    def gone(self) -> tuple[bytes, ...]:
        """The queue is gone, and this place with it; the token that is given up."""
        token, self.token = self.token, b""
        return (token,)

    def left(self) -> list[bytes]:
        """The tokens to let go if the caller gives up now."""
        return [token for token in (self.fresh, self.token) if token]


def question(
    keys: Keys, timing: LockTiming, place: Place, value: bytes, address: bytes | None, wait: float
) -> bytes:
    """A call of `ACQUIRE`, packed; it queues where there are seconds to wait. `value` is to be the lock's."""
    wait_ms = b"%d" % max(round(wait * 1000), 1) if wait else b"0"
    bare, address = b"1" if timing.bare else b"0", address or NO_CHANNEL
    args = pack_args(value, timing.lease_ms, wait_ms, address, place.token, bare, timing.activity)
    return ACQUIRE.by_sha + keys.packed + args


class Waiter:
    """One caller's way to a lock. Whatever ends it but success, it leaves no lock and no place in the queue.

    A message is believed only while it is young. `on_long_wait` is called once, after `NOTICE_AFTER` seconds.
    """

    __slots__ = (
        "_address",
        "_ahead",
        "_commands",
        "_is_told",
        "_keys",
        "_loop",
        "_message",
        "_on_long_wait",
        "_place",
        "_releases",
        "_started",
        "_subscription",
        "_timing",
        "_who",
    )

    def __init__(
        self,
        commands: Commands,
        subscription: Subscription,
        releases: Releases,
        wanted: Wanted,
        on_long_wait: Callable[[], None] | None = None,
    ) -> None:
        self._keys, self._timing, self._started, self._who, token = wanted
        self._on_long_wait = on_long_wait
        self._commands = commands
        self._subscription = subscription
        self._releases = releases
        self._loop = commands.loop
        self._address: bytes | None = subscription.name if subscription.live else None
        self._place = Place(token)
        self._is_told = False  # queued with our channel
        self._message: asyncio.Future[bytes | None] | None = None
        self._ahead = 0.0  # ms by which Redis' clock is ahead of the loop's; rather too much than too little

    async def take(self) -> Acquired | bytes:
        """The lock, or why there is nothing to lock: b"A" absent, b"R" retired, b"X" not a record.

        `LockTimeoutError` when the wait is over, `TooManyWaitersError` at once where nobody may wait. (How
        many do is for each process to count: one of it waits in Redis, the others behind that one.)
        """
        try:
            return await self._take()
        except BaseException:
            for token in self._place.left():  # posted: it must leave even while this task is being cancelled
                self._releases.let_go(self._keys, token, self._timing)
            raise
        finally:
            self._forget(self._place.fresh, self._place.token)

    async def _take(self) -> Acquired | bytes:
        while True:
            last = self._left() <= 0
            kind, *rest = await self._ask(last)
            if kind == b"L":
                return self._acquired(cast(bytes, rest[0]), self._timing.lease)
            if kind not in (b"B", b"W", b"K"):
                return cast(bytes, kind)
            if last:
                raise LockTimeoutError(self._waited())
            if not self._timing.max_waiters:
                raise TooManyWaitersError(0)
            if self._on_long_wait is not None and self._waited() >= NOTICE_AFTER:
                self._on_long_wait()
                self._on_long_wait = None
            if self._message is not None:
                news = await self._woken(self._message, cast(int, rest[0]))
                told = None if news is None else self._told(news)
                if told is not None:
                    return told
            if not self._subscription.live or self._address != self._subscription.name:
                self._address = await self._subscription.open()

    async def _ask(self, last: bool) -> list[bytes | int]:
        """One question; afterwards `_place` and `_message` are those that the answer speaks of."""
        channel, timing, place = self._subscription, self._timing, self._place
        queue = self._address is not None and not last and timing.max_waiters > 0
        fresh = place.ask()
        message = channel.expect(fresh) if queue else None
        asked = self._loop.time()
        value = fresh + self._commands.clock.text(asked) + self._who if self._who else fresh
        packed = question(self._keys, timing, place, value, self._address, self._left() if queue else 0.0)
        try:
            reply = await self._commands.call(ACQUIRE, self._keys.record, packed, self._keys.mark)
            answer = words_of(reply)
        except NotSentError:
            self._forget(*place.answered(b"B"))
            raise
        kind = cast(bytes, answer[0])
        if kind == b"L" and self._is_told and self._message is not None and not self._message.done():
            channel.doubt()
        self._forget(*place.answered(kind))
        if kind in (b"L", b"W"):
            self._message, self._is_told = message, self._address == channel.name
        if kind in (b"L", b"W", b"K"):
            self._ahead = cast(int, answer[2]) - asked * 1000
        return answer

    async def _woken(self, message: asyncio.Future[bytes | None], ttl: int) -> bytes | None:
        """The message for our place; None when it is time to ask again."""
        told = self._is_told and self._subscription.live
        poll = self._timing.poll if told else min(POLL_UNTOLD, self._timing.poll)
        lock_ends = ttl / 1000 + MARGIN if ttl >= 0 else poll
        notice = NOTICE_AFTER - self._waited() if self._on_long_wait is not None else poll
        await asyncio.wait((message,), timeout=max(min(lock_ends, poll, self._left(), notice), 0))
        if not message.done():
            return None
        news = message.result()
        if news is None:
            self._message = self._subscription.expect(self._place.token)
        return news

    def _told(self, news: bytes) -> Acquired | bytes | None:
        """What the message says; None where it is so old that the claim may have ended, or another's."""
        now, _, value = news.partition(b":")
        if value in (b"A", b"R", b"X"):
            self._forget(*self._place.gone())
            return value
        claim = self._timing.claim
        age = max(self._loop.time() * 1000 + self._ahead - int(now), 0.0) / 1000
        record = self._subscription.vetted(value, self._keys.mark)
        return None if record is None or age > claim / 2 else self._acquired(record, claim - age)

    def _acquired(self, value: bytes, left: float) -> Acquired:
        """What Redis gave, in an answer or by a message; the one place through which a record comes here."""
        return Acquired(self._place.token, value, self._ahead, left, self._waited())

    def _forget(self, *tokens: bytes) -> None:
        """Believe no message for these any more."""
        for token in tokens:
            self._subscription.forget(token)

    def _waited(self) -> float:
        return self._loop.time() - self._started

    def _left(self) -> float:
        return self._timing.wait - self._waited()
