"""What one process keeps for itself: locks with their queues, latches, and ids that were replaced."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import anyio

from ..errors import LockTimeoutError, TooManyWaitersError
from .checkout import RETIRED_FOR, LockPolicy
from .running import while_client_stays


class RetiredIds:
    """Ids that were replaced in the last `RETIRED_FOR` seconds of the clock."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._until: dict[str, float] = {}  # oldest first

    def __len__(self) -> int:
        return len(self._until)

    def __contains__(self, session_id: str) -> bool:
        self._forget()
        return session_id in self._until

    def add(self, session_id: str) -> None:
        """Remember this id from now on."""
        self._forget()
        self._until.pop(session_id, None)
        self._until[session_id] = self._clock() + RETIRED_FOR

    def _forget(self) -> None:
        now = self._clock()
        while self._until and self._until[oldest := next(iter(self._until))] <= now:
            del self._until[oldest]


class Latches:
    """One task at a time reads, compares and writes the value of a key; the others wait in order.

    A latch is held for that step only. What takes longer, as a request does, takes the session's lock.
    """

    def __init__(self) -> None:
        self._held: dict[str, tuple[anyio.Lock, int]] = {}  # the latch, and how many hold it or wait

    def __len__(self) -> int:
        return len(self._held)

    @asynccontextmanager
    async def hold(self, key: str) -> AsyncIterator[None]:
        """Hold the key's latch for a block. Not reentrant."""
        latch, users = self._held.get(key) or (anyio.Lock(), 0)
        self._held[key] = latch, users + 1
        try:
            async with latch:
                yield
        finally:
            latch, users = self._held[key]
            if users > 1:
                self._held[key] = latch, users - 1
            else:
                del self._held[key]


class _Waiter:
    __slots__ = ("granted", "max_hold", "token", "woken")

    def __init__(self, token: str, max_hold: float) -> None:
        self.token = token
        self.max_hold = max_hold
        self.granted = False
        self.woken = anyio.Event()


class LocalLocks:
    """One lock per session id, first come, first served. A lease lasts `max_hold` and needs no renewal.

    `clock` gives seconds and never goes back. Use it from one event loop at a time, not from several threads.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._holders: dict[str, tuple[str, float]] = {}  # token, and when the lease ends by the clock
        self._queues: dict[str, deque[_Waiter]] = {}  # for held locks that somebody waits for
        self._tokens = 0

    def __len__(self) -> int:
        return len(self._holders)

    def __contains__(self, session_id: str) -> bool:
        return session_id in self._holders

    def owns(self, session_id: str, token: str | None) -> bool:
        """Whether the lease with this token still holds the lock."""
        holder = self._holders.get(session_id)
        return holder is not None and holder[0] == token and holder[1] > self._clock()

    def is_taken_over(self, session_id: str, token: str | None) -> bool:
        """Whether another lease holds the lock. A lease that has only run out does no harm."""
        holder = self._holders.get(session_id)
        return holder is not None and holder[0] != token

    def is_held(self, session_id: str) -> bool:
        """Whether somebody holds the lock. A lease that has run out goes to the next waiter, or is free."""
        return session_id in self._holders and not self._relieve(session_id)

    def counts(self) -> dict[str, int]:
        """How many locks are held, and for how many of them somebody waits."""
        return {"locks_held": len(self._holders), "locks_waited_for": len(self._queues)}

    def try_acquire(self, session_id: str, policy: LockPolicy, now: float | None = None) -> str | None:
        """The token where the lock is free, else None. Never overtakes a waiter.

        `now` is the clock's time, if the caller has just read it.
        """
        self._tokens += 1  # a counter will do: tokens never leave the process
        lease = str(self._tokens), (self._clock() if now is None else now) + policy.max_hold
        if self._holders.setdefault(session_id, lease) is not lease:
            if not self._relieve(session_id):
                return None
            self._holders[session_id] = lease
        return lease[0]

    async def acquire(self, session_id: str, policy: LockPolicy) -> tuple[str, float]:
        """The lock's token and the seconds waited for it.

        `TooManyWaitersError` at once where `max_waiters` others wait; `LockTimeoutError` after `wait`.
        """
        token = self.try_acquire(session_id, policy)
        if token is not None:
            return token, 0.0
        if len(self._queues.get(session_id, ())) >= policy.max_waiters:
            raise TooManyWaitersError(policy.max_waiters)
        waiter = self._enqueue(session_id, policy)
        started = anyio.current_time()
        try:
            with anyio.move_on_after(policy.wait):
                await while_client_stays(lambda: self._turn_of(session_id, waiter))
        except BaseException:
            self._leave(session_id, waiter)
            raise
        if not waiter.granted:
            self._leave(session_id, waiter)
            raise LockTimeoutError(anyio.current_time() - started)
        return waiter.token, anyio.current_time() - started

    def release(self, session_id: str, token: str | None) -> bool:
        """Hand the lock to the next in the queue; False where this token does not hold it."""
        holder = self._holders.get(session_id)
        if token is None or holder is None or holder[0] != token:
            return False
        if session_id in self._queues:
            self._pass_on(session_id)
        else:
            del self._holders[session_id]
        return True

    def _relieve(self, session_id: str) -> bool:
        """Take the lock from a holder whose lease has ended; True where it is free then."""
        if self._holders[session_id][1] > self._clock():
            return False
        if session_id in self._queues:
            self._pass_on(session_id)
            return False
        del self._holders[session_id]
        return True

    def _enqueue(self, session_id: str, policy: LockPolicy) -> _Waiter:
        self._tokens += 1
        waiter = _Waiter(str(self._tokens), policy.max_hold)
        self._queues.setdefault(session_id, deque()).append(waiter)
        return waiter

    async def _turn_of(self, session_id: str, waiter: _Waiter) -> None:
        """Wait for the lock, and take it from a holder that hangs past the end of its lease."""
        while not waiter.granted:
            left = self._holders[session_id][1] - self._clock()
            with anyio.move_on_after(max(left, 0.0) + 0.001):
                await waiter.woken.wait()
            if not waiter.granted:
                self._relieve(session_id)

    def _pass_on(self, session_id: str) -> None:
        queue = self._queues[session_id]
        successor = queue.popleft()
        if not queue:
            del self._queues[session_id]
        successor.granted = True
        self._holders[session_id] = successor.token, self._clock() + successor.max_hold
        successor.woken.set()

    def _leave(self, session_id: str, waiter: _Waiter) -> None:
        if waiter.granted:
            self.release(session_id, waiter.token)
            return
        queue = self._queues[session_id]
        queue.remove(waiter)
        if not queue:
            del self._queues[session_id]
