"""Waiting for a lock: the channel on which a handed-over lock is announced, and one caller's turn."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, cast

from redis.exceptions import RedisError, ResponseError

from ...errors import LockTimeoutError, SessionStoreError, TooManyWaitersError
from .scripts import ACQUIRE, Keys, pack_args
from .transport import NOT_OURS, Connection, Pool, Reply, give_back

if TYPE_CHECKING:
    from .engine import Engine

NO_CHANNEL = b"-"  # queued without an announcement: such a waiter asks again and again
POLL = 1.0  # seconds between two questions of a waiter that is told, in case the message was lost
POLL_UNTOLD = 0.1  # the same for one that is not told
CLAIM = 1.0  # seconds in which a waiter must take up a lock that was handed to it
MARGIN = 0.002  # seconds after the end of another's lease: Redis counts in whole milliseconds
_BREATHER = 0.05  # seconds before a subscription that was just lost is made again

_logger = logging.getLogger("asgi_sessions.redis")


def new_token() -> bytes:
    """The unguessable name of a lease or of a place in a queue, never used twice."""
    return os.urandom(16).hex().encode()


class WakeChannel:
    """One subscription per event loop, made when somebody waits for the first time.

    When it is lost, all who wait here ask Redis again at once. When Redis refuses it (ACL), waiters poll.
    """

    def __init__(self, pool: Callable[[], Pool], name: bytes, timeout: float) -> None:
        self.name = name
        self.live = False
        self._pool = pool
        self._timeout = timeout
        self._refused = False
        self._lost_at = float("-inf")
        self._expected: dict[bytes, asyncio.Future[bytes | None]] = {}
        self._task: asyncio.Task[None] | None = None
        self._opened: asyncio.Future[bytes] | None = None
        self._drained: asyncio.Future[None] | None = None  # set once it is closed

    def expect(self, token: bytes) -> asyncio.Future[bytes | None]:
        """The future of this token's message; None as result: the channel broke, ask again."""
        future: asyncio.Future[bytes | None] = asyncio.get_running_loop().create_future()
        self._expected[token] = future
        return future

    def forget(self, token: bytes) -> None:
        """Believe no message for this token any more."""
        self._expected.pop(token, None)
        if self._drained is not None and not self._expected and not self._drained.done():
            self._drained.set_result(None)

    async def open(self) -> bytes:
        """The channel's name once Redis has confirmed the subscription, or `NO_CHANNEL`."""
        if self._refused or self._drained is not None:
            return NO_CHANNEL
        if self._task is None or self._opened is None:
            loop = asyncio.get_running_loop()
            self._opened = loop.create_future()
            self._task = loop.create_task(self._listen(self._opened))
        opened = self._opened
        await asyncio.wait((opened,))
        return opened.result()

    def doubt(self) -> None:
        """A lock came and its message did not: subscribe anew, for a node that hangs tells nothing."""
        age = asyncio.get_running_loop().time() - self._lost_at
        if self.live and self._task is not None and age > POLL:
            self.live = False
            self._task.cancel()

    async def aclose(self) -> None:
        """Unsubscribe for good; who waits here asks again, is refused, and has left by the end."""
        self._drained = asyncio.get_running_loop().create_future()
        task = self._task
        if task is not None:
            task.cancel()
            await asyncio.wait((task,))
        self._wake_all()
        if self._expected:
            await asyncio.wait((self._drained,), timeout=self._timeout)

    async def _listen(self, opened: asyncio.Future[bytes]) -> None:
        pool = self._pool()
        try:
            connection = await asyncio.wait_for(self._subscribe(pool), self._timeout)
            try:
                self.live = True
                opened.set_result(self.name)
                while True:
                    message = await connection.read_response(disable_decoding=True)
                    self._deliver(cast("list[bytes]", message))
            finally:
                await give_back(pool, connection)
        except ResponseError as error:
            self._refused = True
            _logger.warning(
                "Redis refuses the subscription that wakes waiting requests; they poll: %s", error
            )
        except (RedisError, OSError, asyncio.TimeoutError) as error:
            _logger.debug("the subscription that wakes waiting requests was lost: %s", error)
        finally:
            self._closed(opened)

    async def _subscribe(self, pool: Pool) -> Connection:
        loop = asyncio.get_running_loop()
        if loop.time() - self._lost_at < 1.0:
            await asyncio.sleep(_BREATHER)
        connection = await pool.get_connection()
        try:
            await connection.send_command("SUBSCRIBE", self.name)
            await connection.read_response(disable_decoding=True)
        except BaseException:
            await give_back(pool, connection)
            raise
        return connection

    def _deliver(self, message: list[bytes]) -> None:
        token, _, news = message[2].partition(b":")
        future = self._expected.get(token)
        if future is not None and not future.done():
            future.set_result(news)

    def _closed(self, opened: asyncio.Future[bytes]) -> None:
        self.live = False
        self._task = None
        with contextlib.suppress(RuntimeError):  # no loop any more
            self._lost_at = asyncio.get_running_loop().time()
        if not opened.done():
            opened.set_result(NO_CHANNEL)
        self._wake_all()

    def _wake_all(self) -> None:
        for future in self._expected.values():
            if not future.done():
                future.set_result(None)


@dataclass(frozen=True, slots=True)
class Terms:
    """On which terms a lock is taken, and what is packed of them for the scripts; times in seconds."""

    lease: float
    wait: float = 0.0
    max_waiters: int = 64
    poll: float = POLL
    bare: bool = False  # a lock without a record
    clustered: bool = False
    max_hold: float = math.inf
    lease_ms: bytes = field(init=False)
    claim_ms: bytes = field(init=False)  # in which the next holder must take up what is handed over
    try_once: bytes = field(init=False)  # ARGV 2 to 7 of `ACQUIRE`, which does not queue then
    commit: bytes = field(init=False)  # ARGV 4 to 6 of `COMMIT`; the lock stays
    commit_and_release: bytes = field(init=False)
    release: bytes = field(init=False)  # ARGV 2 to 4 of `RELEASE`

    def __post_init__(self) -> None:
        lease = b"%d" % max(round(self.lease * 1000), 1)
        claim = b"%d" % max(round(min(CLAIM, self.lease) * 1000), 1)
        bare, clustered = (b"1" if flag else b"0" for flag in (self.bare, self.clustered))
        object.__setattr__(self, "lease_ms", lease)
        object.__setattr__(self, "claim_ms", claim)
        object.__setattr__(self, "try_once", pack_args(lease, b"0", NO_CHANNEL, b"0", b"", bare))
        object.__setattr__(self, "commit", pack_args(b"0", claim, clustered))
        object.__setattr__(self, "commit_and_release", pack_args(b"1", claim, clustered))
        object.__setattr__(self, "release", pack_args(claim, clustered, bare))


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
    """The lock, and the record as it was at `now` (ms of Redis' clock). `left` of the lease in seconds."""

    token: bytes
    value: bytes
    now: int
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
        self._ahead = 0.0  # Redis' clock minus ours, seconds; rather too much than too little

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
                return self._granted(cast(bytes, rest[0]), cast(int, rest[1]), self._terms.lease)
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
        reply = await self._engine.call(ACQUIRE, self._keys.record, self._keys.packed + args)
        answer = understood(reply)
        if answer[0] == b"L" and self._place_told and self._message is not None and not self._message.done():
            channel.doubt()
        if answer[0] in (b"L", b"W"):
            channel.forget(self._place)
            self._place, self._message = fresh, message
            self._place_told = self._address == channel.name
        else:
            channel.forget(fresh)
        if answer[0] in (b"W", b"K"):
            self._ahead = cast(int, answer[2]) / 1000 - asked
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
        """What the message says; None where it is so old that the claim may have ended."""
        now, _, value = news.partition(b":")
        if len(value) == 1:
            self._forget_place()
            return value
        claim = min(CLAIM, self._terms.lease)
        age = max(self._engine.loop.time() + self._ahead - int(now) / 1000, 0.0)
        return None if age > claim / 2 else self._granted(value, int(now), claim - age)

    def _forget_place(self) -> None:
        """The queue is gone, and with it our place."""
        self._engine.channel.forget(self._place)
        self._place = b""

    def _granted(self, value: bytes, now: int, left: float) -> Grant:
        return Grant(self._place, value, now, left, self._waited())

    def _undo(self) -> None:
        """Posted, not awaited: it must leave even while this task is being cancelled."""
        for token in (self._fresh, self._place):
            if token:
                self._engine.let_go(self._keys, token, self._terms)

    def _waited(self) -> float:
        return self._engine.loop.time() - self._started

    def _left(self) -> float:
        return self._terms.wait - self._waited()
