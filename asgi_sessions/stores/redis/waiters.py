"""Waiting for a lock: one caller's turn."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, NamedTuple, cast

from ...errors import LockTimeoutError, SessionStoreError, TooManyWaitersError
from .calls import NOT_OURS
from .names import new_token
from .replies import Reply
from .scripts import ACQUIRE, Keys, pack_args
from .terms import NO_CHANNEL, Terms

if TYPE_CHECKING:
    from .engine import Engine

POLL_UNTOLD = 0.1  # seconds between two questions of a waiter that is not told
MARGIN = 0.002  # seconds after the end of another's lease: Redis counts in whole milliseconds


_ANSWERS = {b"L": 3, b"A": 1, b"R": 1, b"X": 1, b"B": 2, b"F": 1, b"W": 3, b"K": 3}


def understood(reply: Reply) -> list[bytes | int]:
    """What `ACQUIRE` answered; `SessionStoreError` for what it cannot have: there is no Redis behind it."""
    if (
        isinstance(reply, list)
        and reply
        and isinstance(reply[0], bytes)
        and _ANSWERS.get(reply[0]) == len(reply)
    ):
        return cast("list[bytes | int]", reply)
    raise SessionStoreError(NOT_OURS)


class Grant(NamedTuple):
    """The lock and the record.

    `ahead` is by how much Redis' clock is ahead of the loop's, in ms; `left` of the lease is in seconds.
    """

    token: bytes
    value: bytes
    ahead: float
    left: float
    waited: float


class Turn:
    """One caller's way to a lock. Whatever ends it but a grant, it leaves no lock and no place in the queue.

    Each question to Redis goes under a token of its own. A message is believed only for the token that
    Redis' last answer spoke of, and only while it is young: a process that was frozen may find one for a
    lock that was given to others since. `place` is the token of a lock that another holder of this process
    leaves to this caller; `started` (the loop's time) is when the wait began, None: now.
    """

    __slots__ = (
        "_address",
        "_ahead",
        "_engine",
        "_fresh",
        "_keys",
        "_message",
        "_place",
        "_place_told",
        "_started",
        "_terms",
    )

    def __init__(
        self, engine: Engine, keys: Keys, terms: Terms, started: float | None = None, place: bytes = b""
    ) -> None:
        self._engine = engine
        self._keys = keys
        self._terms = terms
        self._started = engine.loop.time() if started is None else started
        self._address: bytes | None = engine.channel.name if engine.channel.live else None
        self._fresh = b""  # asked under, and not yet answered
        self._place = place  # queued under
        self._place_told = False  # queued with our channel: will be told
        self._message: asyncio.Future[bytes | None] | None = None
        self._ahead = 0.0  # ms by which Redis' clock is ahead of the loop's; rather too much than too little

    async def take(self) -> Grant | bytes:
        """The lock, or why there is nothing to lock: b"A" absent, b"R" retired, b"X" not a record.

        `LockTimeoutError` when the wait is over, `TooManyWaitersError` at once when the queue is full.
        """
        try:
            return await self._take()
        except BaseException:
            self._undo()
            raise
        finally:
            self._engine.channel.forget(self._fresh)
            self._engine.channel.forget(self._place)

    async def _take(self) -> Grant | bytes:
        while True:
            last = self._left() <= 0
            kind, *rest = await self._ask(last)
            if kind == b"L":
                return self._granted(cast(bytes, rest[0]), self._terms.lease)
            if kind == b"F":
                raise TooManyWaitersError(self._terms.max_waiters)
            if kind not in (b"B", b"W", b"K"):
                self._forget_place()
                return cast(bytes, kind)
            if last:
                raise LockTimeoutError(self._waited())
            if self._message is not None:
                news = await self._woken(self._message, cast(int, rest[0]))
                told = None if news is None else self._told(news)
                if told is not None:
                    return told
            if not self._engine.channel.live or self._address != self._engine.channel.name:
                self._address = await self._engine.channel.open()

    async def _ask(self, last: bool) -> list[bytes | int]:
        """One question; afterwards `_place` and `_message` are those that the answer speaks of."""
        channel, terms = self._engine.channel, self._terms
        queue = self._address is not None and not last
        fresh = self._fresh = new_token()
        message = channel.expect(fresh) if queue else None
        asked = self._engine.loop.time()
        wait = b"%d" % max(round(self._left() * 1000), 1) if queue else b"0"
        args = pack_args(
            fresh,
            terms.lease_ms,
            wait,
            self._address or NO_CHANNEL,
            b"%d" % terms.max_waiters,
            self._place,
            b"1" if terms.bare else b"0",
        )
        packed = ACQUIRE.by_sha + self._keys.packed + args
        reply = await self._engine.call(ACQUIRE, self._keys.record, packed, self._keys.mark)
        answer = understood(reply)
        if answer[0] == b"L" and self._place_told and self._message is not None and not self._message.done():
            channel.doubt()
        if answer[0] in (b"L", b"W"):
            channel.forget(self._place)
            self._place, self._message = fresh, message
            self._place_told = self._address == channel.name
        else:
            channel.forget(fresh)
        if answer[0] in (b"L", b"W", b"K"):
            self._ahead = cast(int, answer[2]) - asked * 1000
        self._fresh = b""
        return answer

    async def _woken(self, message: asyncio.Future[bytes | None], ttl: int) -> bytes | None:
        """The message for our place; None when it is time to ask again."""
        told = self._place_told and self._engine.channel.live
        poll = self._terms.poll if told else min(POLL_UNTOLD, self._terms.poll)
        lock_ends = ttl / 1000 + MARGIN if ttl >= 0 else poll
        await asyncio.wait((message,), timeout=max(min(lock_ends, poll, self._left()), 0))
        if not message.done():
            return None
        news = message.result()
        if news is None:
            self._message = self._engine.channel.expect(self._place)
        return news

    def _told(self, news: bytes) -> Grant | bytes | None:
        """What the message says; None where it is so old that the claim may have ended, or another's."""
        now, _, value = news.partition(b":")
        if value in (b"A", b"R", b"X"):
            self._forget_place()
            return value
        claim = self._terms.claim
        age = max(self._engine.loop.time() * 1000 + self._ahead - int(now), 0.0) / 1000
        record = self._engine.channel.vetted(value, self._keys.mark)
        return None if record is None or age > claim / 2 else self._granted(record, claim - age)

    def _forget_place(self) -> None:
        """The queue is gone, and with it our place."""
        self._engine.channel.forget(self._place)
        self._place = b""

    def _granted(self, value: bytes, left: float) -> Grant:
        return Grant(self._place, value, self._ahead, left, self._waited())

    def _undo(self) -> None:
        """Posted, not awaited: it must leave even while this task is being cancelled."""
        for token in (self._fresh, self._place):
            if token:
                self._engine.let_go(self._keys, token, self._terms)

    def _waited(self) -> float:
        return self._engine.loop.time() - self._started

    def _left(self) -> float:
        return self._terms.wait - self._waited()
