"""What one process keeps for itself: locks with their queues, latches, and ids that were replaced."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, TypeAlias

import anyio

from ..backend import Wake
from ..errors import LockTimeoutError, TooManyWaitersError
from .checkout import LEADS_FOR, RETIRED_FOR, LockPolicy
from .holders import NOTICE_AFTER, Holder
from .running import RunningRequest, running, while_client_stays


class RetiredIds:
    """Ids that were replaced in the last `RETIRED_FOR` seconds of the clock."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._until: dict[str, float] = {}  # oldest first
        self._successors: dict[str, str] = {}  # of those that lead to another one

    def __len__(self) -> int:
        return len(self._until)

    def __contains__(self, session_id: str) -> bool:
        self._forget()
        return session_id in self._until

    def add(self, session_id: str, successor: str | None = None) -> None:
        """Remember this id from now on, and for `LEADS_FOR` seconds the one to which it leads, if any."""
        self._forget()
        self._until.pop(session_id, None)
        self._until[session_id] = self._clock() + RETIRED_FOR
        self._successors.pop(session_id, None)
        if successor is not None:
            self._successors[session_id] = successor

    def successor(self, session_id: str) -> str | None:
        """The id to which this one still leads."""
        left = self._until.get(session_id, 0.0) - self._clock()
        return self._successors.get(session_id) if left > RETIRED_FOR - LEADS_FOR else None

    def _forget(self) -> None:
        now = self._clock()
        while self._until and self._until[oldest := next(iter(self._until))] <= now:
            del self._until[oldest]
            self._successors.pop(oldest, None)


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
    """Gets the lock with its token when it is woken."""

    __slots__ = ("max_hold", "requests", "token", "woken")

    def __init__(self, token: str, max_hold: float) -> None:
        self.token = token
        self.max_hold = max_hold
        self.requests = running.get()
        self.woken = Wake()


_Lease: TypeAlias = tuple[str, float, float, tuple[RunningRequest, ...]]
"""Token; when it ends, and when it began, by the clock; the requests that took it, the innermost last."""


class LocalLocks:
    """One lock per session id, first come, first served. A lease lasts `max_hold` and needs no renewal.

    `clock` gives seconds and never goes back. Use it from one event loop at a time, not from several threads.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._holders: dict[str, _Lease] = {}
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
        if now is None:
            now = self._clock()
        lease = str(self._tokens), now + policy.max_hold, now, running.get()
        if self._holders.setdefault(session_id, lease) is not lease:
            if not self._relieve(session_id):
                return None
            self._holders[session_id] = lease
        return lease[0]

    def acquire(self, session_id: str, policy: LockPolicy) -> Coroutine[Any, Any, tuple[str, float]]:
        """The lock's token and the seconds waited for it.

        `TooManyWaitersError` at once where `max_waiters` others wait; `LockTimeoutError` after `wait`.
        """
        return while_client_stays(self._acquire(session_id, policy))

    async def _acquire(self, session_id: str, policy: LockPolicy) -> tuple[str, float]:
        """One coroutine, because a thousand may wait. Each takes the lock from a holder past its lease."""
        token = self.try_acquire(session_id, policy)
        if token is not None:
            return token, 0.0
        if len(self._queues.get(session_id, ())) >= policy.max_waiters:
            raise TooManyWaitersError(policy.max_waiters)
        waiter = self._enqueue(session_id, policy)
        started, waited, notice = anyio.current_time(), 0.0, NOTICE_AFTER
        try:
            while not waiter.woken.is_set:
                if waited >= policy.wait:
                    raise LockTimeoutError(waited)
                if waited >= notice:
                    notice = math.inf
                    self._tell(session_id, waiter)
                lease = max(self._holders[session_id][1] - self._clock(), 0.0) + 0.001
                try:
                    await waiter.woken.begin(min(lease, policy.wait - waited, notice - waited))
                finally:
                    waiter.woken.end()
                waited = anyio.current_time() - started
                if not waiter.woken.is_set:
                    self._relieve(session_id)
        except BaseException:
            self._leave(session_id, waiter)
            raise
        return waiter.token, waited

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

    def _tell(self, session_id: str, waiter: _Waiter) -> None:
        """Have the request that waits say who holds the lock."""
        if waiter.requests:
            _, _, since, requests = self._holders[session_id]
            holder = Holder.here(requests[-1].route if requests else "", self._clock() - since)
            waiter.requests[-1].has_waited(session_id, holder, len(self._queues[session_id]))

    def _pass_on(self, session_id: str) -> None:
        queue = self._queues[session_id]
        successor = queue.popleft()
        if not queue:
            del self._queues[session_id]
        now = self._clock()
        self._holders[session_id] = successor.token, now + successor.max_hold, now, successor.requests
        successor.woken.set()

    def _leave(self, session_id: str, waiter: _Waiter) -> None:
        if waiter.woken.is_set:
            self.release(session_id, waiter.token)
            return
        queue = self._queues[session_id]
        queue.remove(waiter)
        if not queue:
            del self._queues[session_id]
