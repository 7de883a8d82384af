"""A lock over any number of processes, in Redis; usable without the middleware."""

from __future__ import annotations

import asyncio
import logging
import time
from types import TracebackType
from typing import cast

from ...errors import LockAcquisitionError, LockReleaseError, LockTimeoutError, SessionStoreError
from .commands.header import milliseconds
from .commands.keys import Keys
from .commands.scripts import RENEW
from .commands.timing import LockTiming
from .connection.deployment import Client
from .connection.resp import pack_args
from .event_loop import LoopState, states_for
from .locking.waiter import Acquired

_FEW = 64  # locks that are held; beyond twice as many as at the last look it is looked who still is

_logger = logging.getLogger("asgi_sessions.stores.redis.lock")


class DistributedLock:
    """One holder at a time, a task, among all who name the same lock. One object for each holder.

    The lease of `timeout` seconds is not renewed by itself: call `renew` in time, or it ends and another may
    hold the lock. `acquire` tries `retry_attempts` times; between two tries it is queued, first come, first
    served, and waits at most `retry_delay` seconds to be woken. For event loops of asyncio.
    """

    def __init__(
        self,
        redis_client: Client,
        lock_name: str,
        timeout: float = 30,
        retry_attempts: int = 3,
        retry_delay: float = 0.1,
    ) -> None:
        if not lock_name:
            raise ValueError("a lock has a name")
        if not timeout > 0:
            raise ValueError("timeout is the lease in seconds and above 0")
        if retry_attempts < 1 or not retry_delay >= 0:
            raise ValueError("retry_attempts is at least 1 and retry_delay a number of seconds")
        self.lock_name = lock_name
        self.timeout = timeout
        self.retry_attempts = retry_attempts
        self.retry_delay = retry_delay
        self._states = states_for(redis_client)
        self._keys = _keys(lock_name)
        self._token: bytes | None = None
        self._ends = 0.0
        self._holder: asyncio.Task[object] | None = None  # that has acquired it
        self._warned = False  # that it was acquired again
        self._acquiring = False
        self._entries: list[
            tuple[asyncio.Task[object] | None, bytes | None]
        ] = []  # by whom, and what they took
        self._held: set[DistributedLock] = set()

    @property
    def lock_id(self) -> str | None:
        """The unguessable name of this acquisition, None where nothing is held."""
        return None if self._token is None else self._token.decode()

    @property
    def acquired(self) -> bool:
        """Whether it was acquired, not released, and the lease has not ended by this process's clock."""
        return self._token is not None and time.monotonic() < self._ends

    async def acquire(self, blocking: bool = True) -> bool:
        """True with the lock; `blocking=False`: one try, False where another holds it.

        The task that holds it through this object already gets True, and a warning in the log: one release
        lets it go. `LockAcquisitionError` when the last try failed, and for any other task while this object
        is in use; `SessionStoreError` on a fault of Redis. Whatever ends it but success, a cancellation
        included, leaves no lock and no place in the queue.
        """
        if self._acquiring or self.acquired:
            return self._acquired_again()
        self._acquiring = True
        try:
            await self._acquire(self.retry_attempts if blocking else 1)
        except LockTimeoutError as error:
            if not blocking:
                return False
            raise LockAcquisitionError(
                f"others held the lock at each of {self.retry_attempts} tries:"
                " a larger retry_attempts or retry_delay waits for longer"
            ) from error
        finally:
            self._acquiring = False
        return True

    async def release(self) -> bool:
        """Let the lock go, to the next in the queue; False where it was not held any more.

        `LockReleaseError` on a fault of Redis: it is tried again until the lease is over. Cancelled, it is
        let go all the same.
        """
        return False if self._token is None else await self._let_go(self._token)

    async def renew(self, additional_time: float | None = None) -> bool:
        """Prolong the lease to `additional_time` seconds from now, or to `timeout`; False where it was lost.

        `SessionStoreError` on a fault of Redis.
        """
        if additional_time is not None and not additional_time > 0:
            raise ValueError("additional_time is a number of seconds above 0")
        token = self._token
        if token is None:
            return False
        state = await self._states.get()
        if await self._prolong(state, token, additional_time or self.timeout):
            return True
        self._forget(token)
        return False

    async def __aenter__(self) -> DistributedLock:
        """A block within a block of the same task keeps the lock until the outer one is left."""
        held = self._token if self.acquired else None
        await self.acquire()
        self._entries.append((asyncio.current_task(), None if self._token == held else self._token))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Release what this entry has acquired, which may not be what the object holds by now."""
        token = self._left()
        if token is None:
            return
        try:
            kept = await self._let_go(token)
        except LockReleaseError:
            if error is None:
                raise
            _logger.warning("a lock could not be released yet", exc_info=True)
            return
        if not kept:
            _logger.warning("a lock was lost before its block ended: renew() it, or take a longer timeout")

    def _left(self) -> bytes | None:
        """The token that the block which is being left has acquired, None where that was one around it."""
        task = asyncio.current_task()
        mine = [index for index, (entered, _) in enumerate(self._entries) if entered is task]
        return self._entries.pop(mine[-1] if mine else -1)[1]  # by another task: the last that was entered

    def _acquired_again(self) -> bool:
        if self._acquiring or asyncio.current_task() is not self._holder:
            raise LockAcquisitionError(
                "another task holds the lock, or waits for it, by this object:"
                " take a DistributedLock for each holder"
            )
        if not self._warned:
            self._warned = True
            _logger.warning("a lock was acquired again by the task that holds it; one release lets it go")
        return True

    async def _let_go(self, token: bytes) -> bool:
        lease = max(self.timeout, self._ends - time.monotonic())
        self._forget(token)
        try:
            state = await self._states.get()
            return (
                await asyncio.shield(state.releases.let_go(self._keys, token, self._timing(state, lease)))
                == 1
            )
        except SessionStoreError as error:
            raise LockReleaseError(f"the lock is not released yet, which is tried again: {error}") from error

    def _forget(self, token: bytes) -> None:
        """This lock is not held any more."""
        if self._token == token:
            self._token = self._holder = None
            self._held.discard(self)

    async def _acquire(self, tries: int) -> None:
        state = await self._states.get()
        timing = self._timing(state, self.timeout, (tries - 1) * self.retry_delay)
        taken = cast(
            Acquired, await state.locks.waiter(self._keys, timing).take()
        )  # without a record never bytes
        self._token, self._ends = taken.token, time.monotonic() + taken.left
        if taken.left < self.timeout:
            await self._take_up(state, taken.token)
        self._holder, self._warned = asyncio.current_task(), False
        self._held.add(self)

    async def _take_up(self, state: LoopState, token: bytes) -> None:
        """A lock that was handed over comes with a short claim: make it the full lease."""
        try:
            taken = await self._prolong(state, token, self.timeout)
        except BaseException:
            self._token = None
            state.releases.let_go(self._keys, token, self._timing(state, self.timeout))
            raise
        if not taken:
            self._token = None
            raise LockAcquisitionError("the lock was handed over, but not taken up in time")

    async def _prolong(self, state: LoopState, token: bytes, lease: float) -> bool:
        began = time.monotonic()
        prolonged = await state.commands.run(RENEW, self._keys.lock, token, milliseconds(lease)) == 1
        if prolonged and self._token is token:
            self._ends = began + lease
        return prolonged

    def _timing(self, state: LoopState, lease: float, wait: float = 0.0) -> LockTiming:
        clustered = state.router.clustered
        return LockTiming(lease, wait, poll=self.retry_delay, bare=True, clustered=clustered)


class DistributedLockManager:
    """Makes locks on one client and knows those that are held."""

    def __init__(self, redis_client: Client) -> None:
        self._client = redis_client
        self._held: set[DistributedLock] = set()
        self._look_at = _FEW  # so many: among them may be some whose lease ran out without a release

    def __len__(self) -> int:
        self._held -= {lock for lock in self._held if not lock.acquired}  # locks share this set with us
        return len(self._held)

    def get_lock(
        self, lock_name: str, timeout: float = 30, retry_attempts: int = 3, retry_delay: float = 0.1
    ) -> DistributedLock:
        """A lock of its own for each call; it is kept here only while it is held."""
        if len(self._held) >= self._look_at:
            self._look_at = max(2 * len(self), _FEW)
        lock = DistributedLock(self._client, lock_name, timeout, retry_attempts, retry_delay)
        lock._held = self._held
        return lock

    async def cleanup(self) -> int:
        """Release what is held, for a shut-down; how many locks were. `LockReleaseError` after trying all."""
        released, failure = 0, None
        for lock in list(self._held):
            try:
                released += await lock.release()
            except LockReleaseError as error:
                failure = error
        if failure is not None:
            raise failure
        return released


def _keys(name: str) -> Keys:
    """The lock `lock:NAME` and its queue, in one hash slot; a lock has no record and no retired id.

    A name with a hash tag of its own keeps it; a name that holds `}` before `{` works on one node only.
    """
    lock = f"lock:{name}".encode()
    start = lock.find(b"{")
    tagged = start >= 0 and lock.find(b"}", start) > start + 1
    queue = b"wait:" + lock if tagged else b"{%b}:wait" % lock
    return Keys(lock, lock, pack_args(lock, lock, queue, lock))
