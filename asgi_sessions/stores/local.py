"""Locks within one process: first come, first served, and nothing left behind."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import anyio

from ..errors import LockTimeoutError, TooManyWaitersError


@dataclass(frozen=True, slots=True)
class LockPolicy:
    """How a request takes and keeps the lock of a session; all times in seconds."""

    timeout: float = 10.0  # the lease, renewed while the request runs
    wait: float = 15.0  # longest wait for others, then LockTimeoutError
    max_waiters: int = 64  # waiting requests of one session, then TooManyWaitersError
    max_hold: float = 300.0  # after this the lease is not renewed any more


class _Waiter:
    __slots__ = ("granted", "max_hold", "token", "woken")

    def __init__(self, token: str, max_hold: float) -> None:
        self.token = token
        self.max_hold = max_hold
        self.granted = False
        self.woken = anyio.Event()


class _Lock:
    __slots__ = ("ends", "token", "waiters")

    def __init__(self, token: str, ends: float) -> None:
        self.token = token
        self.ends = ends  # by the clock: a holder that hangs longer than max_hold has lost the lock
        self.waiters: deque[_Waiter] | None = None  # made by the first who waits


class LocalLocks:
    """One lock per session id. Needs no renewal: in its own process a holder is alive until `max_hold`.

    `clock` gives seconds and never goes back. Not for several threads: use it from one event loop at a time.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._locks: dict[str, _Lock] = {}
        self._tokens = 0

    def __len__(self) -> int:
        return len(self._locks)

    def __contains__(self, session_id: str) -> bool:
        return session_id in self._locks

    def owns(self, session_id: str, token: str | None) -> bool:
        """Whether the lease with this token still holds the lock."""
        lock = self._locks.get(session_id)
        return lock is not None and lock.token == token and lock.ends > self._clock()

    def try_acquire(self, session_id: str, policy: LockPolicy) -> str | None:
        """The lock's token if the lock is free, else None. Nobody who waits is overtaken."""
        lock = self._locks.get(session_id)
        if lock is not None:
            if lock.ends > self._clock():
                return None
            self._pass_on(session_id, lock)
            if session_id in self._locks:
                return None
        token = self._new_token()
        self._locks[session_id] = _Lock(token, self._clock() + policy.max_hold)
        return token

    async def acquire(self, session_id: str, policy: LockPolicy) -> tuple[str, float]:
        """The lock's token and the seconds waited for it.

        `TooManyWaitersError` at once when `max_waiters` others wait, `LockTimeoutError` after `wait` seconds.
        """
        token = self.try_acquire(session_id, policy)
        if token is not None:
            return token, 0.0
        lock = self._locks[session_id]
        waiters = lock.waiters = deque() if lock.waiters is None else lock.waiters
        if len(waiters) >= policy.max_waiters:
            raise TooManyWaitersError(policy.max_waiters)
        waiter = _Waiter(self._new_token(), policy.max_hold)
        waiters.append(waiter)
        started = anyio.current_time()
        try:
            with anyio.move_on_after(policy.wait):
                await self._turn_of(session_id, waiter)
        except BaseException:
            self._leave(session_id, waiter)
            raise
        if not waiter.granted:
            self._leave(session_id, waiter)
            raise LockTimeoutError(anyio.current_time() - started)
        return waiter.token, anyio.current_time() - started

    def release(self, session_id: str, token: str | None) -> bool:
        """Let the lock go to the next in the queue; False where this token does not hold it."""
        lock = self._locks.get(session_id)
        if token is None or lock is None or lock.token != token:
            return False
        self._pass_on(session_id, lock)
        return True

    async def _turn_of(self, session_id: str, waiter: _Waiter) -> None:
        """Wait until the lock is ours; a holder that hangs past its end is relieved by who waits."""
        while not waiter.granted:
            lock = self._locks[session_id]
            with anyio.move_on_after(max(lock.ends - self._clock(), 0.0) + 0.001):
                await waiter.woken.wait()
            if not waiter.granted and lock.ends <= self._clock():
                self._pass_on(session_id, lock)

    def _new_token(self) -> str:
        self._tokens += 1  # need not be unguessable: it never leaves the process
        return str(self._tokens)

    def _pass_on(self, session_id: str, lock: _Lock) -> None:
        if not lock.waiters:
            del self._locks[session_id]
            return
        successor = lock.waiters.popleft()
        successor.granted = True
        lock.token = successor.token
        lock.ends = self._clock() + successor.max_hold
        successor.woken.set()

    def _leave(self, session_id: str, waiter: _Waiter) -> None:
        if waiter.granted:
            self.release(session_id, waiter.token)
        else:
            waiters = self._locks[session_id].waiters
            assert waiters is not None  # noqa: S101  # who waits is in it
            waiters.remove(waiter)
