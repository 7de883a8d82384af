"""The embedded default: records in this process's memory, nothing to install."""

from __future__ import annotations

import heapq
import math
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from ..data import SessionData
from ..record import encode_checked
from .base import SessionStore
from .checkout import Checkout, Lifetime, Missing, Outcome
from .local import LocalLocks, LockPolicy, RetiredIds

_STORED = Outcome.STORED  # bound once: looking up an Enum's member is slow on Python 3.11
_SWEEP = 2  # expired records dropped with each one created, so that memory follows the live ones


class _Entry:
    __slots__ = ("ends", "expires", "idle", "record", "users", "version")

    def __init__(self, expires: float, idle: float) -> None:
        self.record = b""
        self.version = ""
        self.expires = expires  # the absolute bound by the store's clock, inf for none
        self.idle = idle  # seconds, inf for none
        self.ends = expires  # when it is absent: the earlier of both bounds
        self.users: tuple[str, ...] = ()  # whose list names it; one too many is harmless

    def touch(self, now: float) -> None:
        self.ends = min(self.expires, now + self.idle)


class InMemorySessionStore(SessionStore):
    """Sessions in memory, for one process: gone when it ends, not shared with other workers.

    Holds at most `max_sessions` records; one more evicts an expired one or else the least recently active
    one, never one that is checked out. `clock` gives seconds and never goes back.
    """

    def __init__(
        self,
        max_sessions: int = 10000,
        default_ttl: float = 3600,
        *,
        model: type[SessionData] = SessionData,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__()
        if max_sessions < 1:
            raise ValueError("max_sessions is at least 1")
        if not default_ttl > 0:
            raise ValueError("default_ttl is a number of seconds above 0")
        self.max_sessions = max_sessions
        self.default_ttl = default_ttl
        self.model = model
        self._clock = clock
        self._locks = LocalLocks(clock)
        self._entries: OrderedDict[str, _Entry] = OrderedDict()  # least recently active first
        self._ends: list[
            tuple[float, str]
        ] = []  # a heap; an entry that lived on is put back when it surfaces
        self._retired = RetiredIds(clock)
        self._users: dict[str, set[str]] = {}
        self._versions = 0
        self._stats = {"hits": 0, "misses": 0, "writes": 0, "deletes": 0, "evictions": 0, "expirations": 0}

    # -- record operations ------------------------------------------------------------------------------

    async def get(self, session_id: str) -> SessionData | None:
        entry = self._find(session_id)
        self._stats["misses" if entry is None else "hits"] += 1
        return None if entry is None else self.read(entry.record)

    async def set(self, session_id: str, data: SessionData, ttl: float | None = None) -> bool:
        self.check(session_id, data, ttl)
        record = encode_checked(data)
        entry = self._find(session_id)
        if entry is None or ttl is not None:
            idle = math.inf if entry is None else entry.idle
            self._put(session_id, record, self.default_ttl if ttl is None else ttl, idle)
        else:
            self._rewrite(entry, record)
            self._entries.move_to_end(session_id)
        self._link(data.user_id, session_id)
        return True

    async def delete(self, session_id: str) -> bool:
        if self._find(session_id) is None:
            return False
        self._drop(session_id)
        self._stats["deletes"] += 1
        return True

    async def exists(self, session_id: str) -> bool:
        return self._find(session_id) is not None

    async def list_active(self, limit: int | None = None, offset: int = 0) -> list[str]:
        await self.cleanup_expired()
        if limit is not None and (offset + limit) * 100 < len(self._entries):
            return heapq.nsmallest(offset + limit, self._entries)[offset:]
        return sorted(self._entries)[offset : None if limit is None else offset + limit]

    async def count_active(self) -> int:
        await self.cleanup_expired()
        return len(self._entries)

    async def cleanup_expired(self) -> int:
        return self._sweep(len(self._ends))

    async def list_for_user(self, user_id: str) -> list[SessionData]:
        known = await self.get_batch(sorted(self._users.get(user_id, ())))
        return [data for data in known.values() if data is not None and data.user_id == user_id]

    async def get_stats(self) -> dict[str, Any]:
        active = await self.count_active()
        return {
            "active_sessions": active,
            "max_sessions": self.max_sessions,
            "utilization": active / self.max_sessions,
            "locked_sessions": len(self._locks),
            "default_ttl": self.default_ttl,
            **self._stats,
        }

    # -- request operations -----------------------------------------------------------------------------

    async def checkout(
        self, session_id: str, lock: LockPolicy | None, lifetime: Lifetime | None
    ) -> Checkout | Missing:
        token, waited = None, 0.0
        if lock is not None and session_id in self._entries:
            token = self._locks.try_acquire(session_id, lock)
            if token is None:
                token, waited = await self._locks.acquire(session_id, lock)
        now = self._clock()
        entry = self._entries.get(session_id)
        if entry is None or entry.ends <= now:
            self._find(session_id)  # drops it if it has expired
            self._locks.release(session_id, token)
            self._stats["misses"] += 1
            return Missing.RETIRED if session_id in self._retired else Missing.ABSENT
        self._stats["hits"] += 1
        entry.ends = min(entry.expires, now + entry.idle)
        self._entries.move_to_end(session_id)
        expires_in = None if entry.expires == math.inf else entry.expires - now
        return Checkout(session_id, entry.record, entry.version, token, expires_in, waited)

    async def create(
        self, session_id: str, record: bytes, lifetime: Lifetime, lock: LockPolicy | None
    ) -> Checkout | None:
        if self._find(session_id) is not None:
            return None
        absolute = math.inf if lifetime.absolute is None else lifetime.absolute
        self._put(session_id, record, absolute, math.inf if lifetime.idle is None else lifetime.idle)
        token = self._locks.try_acquire(session_id, lock) if lock is not None else None
        return Checkout(session_id, record, self._entries[session_id].version, token, lifetime.absolute)

    async def commit(self, checkout: Checkout, record: bytes, *, release: bool) -> Outcome:
        outcome, entry = self._judge(checkout)
        if outcome is _STORED and entry is not None:
            self._rewrite(entry, record)
            checkout.record, checkout.version = record, entry.version
        if release:
            self._locks.release(checkout.session_id, checkout.token)
            checkout.token = None
        return outcome

    async def discard(self, checkout: Checkout, *, retire: bool) -> Outcome:
        outcome, entry = self._judge(checkout)
        if outcome is _STORED and entry is not None:
            self._drop(checkout.session_id)
            self._stats["deletes"] += 1
            if retire:
                self._retired.add(checkout.session_id)
        await self.release(checkout)
        return outcome

    async def link_user(self, user_id: str, session_id: str, lifetime: Lifetime) -> None:
        if session_id in self._entries:
            self._link(user_id, session_id)

    # -- inside -------------------------------------------------------------------------------------------

    def _judge(self, checkout: Checkout) -> tuple[Outcome, _Entry | None]:
        session_id = checkout.session_id
        if checkout.token is not None and not self._locks.owns(session_id, checkout.token):
            return Outcome.LOST, None
        entry = self._entries.get(session_id)
        if entry is None or entry.ends <= self._clock():
            return Outcome.GONE, None
        return (_STORED if entry.version == checkout.version else Outcome.CONFLICT), entry

    def _find(self, session_id: str) -> _Entry | None:
        entry = self._entries.get(session_id)
        if entry is not None and entry.ends <= self._clock():
            self._drop(session_id)
            self._stats["expirations"] += 1
            return None
        return entry

    def _put(self, session_id: str, record: bytes, absolute: float, idle: float) -> None:
        if session_id in self._entries:
            self._drop(session_id)
        self._sweep(_SWEEP)
        while len(self._entries) >= self.max_sessions and self._evict():
            pass
        now = self._clock()
        entry = self._entries[session_id] = _Entry(now + absolute, idle)
        self._rewrite(entry, record)
        entry.touch(now)
        heapq.heappush(self._ends, (entry.ends, session_id))

    def _rewrite(self, entry: _Entry, record: bytes) -> None:
        self._versions += 1  # in one process a counter never repeats
        entry.record, entry.version = record, str(self._versions)
        self._stats["writes"] += 1

    def _drop(self, session_id: str) -> None:
        entry = self._entries.pop(session_id)
        self._unlink(entry, session_id)
        if len(self._ends) > 2 * len(self._entries) + 64:  # mostly of records that are gone: build it anew
            self._ends = [(entry.ends, known) for known, entry in self._entries.items()]
            heapq.heapify(self._ends)

    def _sweep(self, most: int) -> int:
        """Drop expired records, looking at no more than `most` of those whose end may have come."""
        dropped, now = 0, self._clock()
        for _ in range(most):
            if not self._ends or self._ends[0][0] > now:
                break
            _, session_id = heapq.heappop(self._ends)
            entry = self._entries.get(session_id)
            if entry is not None and entry.ends > now:
                heapq.heappush(self._ends, (entry.ends, session_id))
            elif entry is not None:
                self._drop(session_id)
                self._stats["expirations"] += 1
                dropped += 1
        return dropped

    def _evict(self) -> bool:
        """Make room: an expired record, else the least recently active one that nobody has checked out."""
        while self._ends and self._ends[0][0] <= self._clock():
            if self._sweep(1):  # one is enough: the others go with those that are created after this one
                return True
        for _ in range(len(self._entries)):
            session_id = next(iter(self._entries))
            if session_id not in self._locks:
                self._drop(session_id)
                self._stats["evictions"] += 1
                return True
            self._entries.move_to_end(session_id)
        return False

    def _link(self, user_id: str | None, session_id: str) -> None:
        if user_id is not None:
            entry = self._entries[session_id]
            if user_id not in entry.users:
                entry.users += (user_id,)
            self._users.setdefault(user_id, set()).add(session_id)

    def _unlink(self, entry: _Entry, session_id: str) -> None:
        for user_id in entry.users:
            sessions = self._users[user_id]
            sessions.discard(session_id)
            if not sessions:
                del self._users[user_id]
