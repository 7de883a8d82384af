"""The default store: records in this process's memory, nothing to install."""

from __future__ import annotations

import heapq
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import Any

import anyio.lowlevel

from ..record.codec import user_of
from ..record.model import M, SessionData
from ..record.values import check_id
from .checkout import Checkout, Lifetime, LockPolicy, Missing, Outcome, shorter
from .contract import SessionStore
from .endings import Life
from .local import LocalLocks, RetiredIds
from .surplus import idleness, surplus
from .table import Table
from .value import Value
from .workers import warn_if_one_of_several

_STORED = Outcome.STORED  # bound once: looking up an Enum's member is slow on Python 3.11
_CHUNK = 100  # records that are looked at before other tasks run


class InMemorySessionStore(SessionStore[M]):
    """Sessions in memory, for one process: gone when it ends, not shared with other workers (which warn).

    Holds at most `max_sessions` records. One more evicts an expired one, else the least recently active
    anonymous one, else the least recently active one; never one that is checked out. `clock` gives seconds
    and never goes back.
    """

    def __init__(
        self,
        max_sessions: int = 10000,
        default_ttl: float = 3600,
        *,
        model: type[M] = SessionData,  # type: ignore[assignment]  # the default of M
        clock: Callable[[], float] = time.monotonic,
        encryption_keys: Sequence[str | bytes] = (),
    ) -> None:
        super().__init__()
        self.encrypt(encryption_keys)
        if max_sessions < 1:
            raise ValueError("max_sessions is at least 1")
        if not default_ttl > 0:
            raise ValueError("default_ttl is a number of seconds above 0")
        self.max_sessions = max_sessions
        self.default_ttl = default_ttl
        self.model = model
        self._clock = clock
        self._locks = LocalLocks(clock)
        self._table = Table(self._locks, clock, self._endings.tell)
        self._entries = self._table.entries
        self._retired = RetiredIds(clock)
        self._versions = 0
        self._stats = {"hits": 0, "misses": 0, "writes": 0, "deletes": 0}

    async def open(self) -> None:
        """Get ready. One warning in each of several workers, for they do not share these sessions."""
        warn_if_one_of_several()

    # -- record operations ------------------------------------------------------------------------------

    async def get(self, session_id: str) -> M | None:
        check_id(session_id)
        entry = self._table.find(session_id)
        self._stats["misses" if entry is None else "hits"] += 1
        return None if entry is None else self.read(entry.record)

    async def set(
        self, session_id: str, data: SessionData, ttl: float | None = None, *, create: bool = True
    ) -> bool:
        self.check(session_id, data, ttl)
        record = self.encode(data)
        entry = self._table.find(session_id)
        now = self._clock()
        if entry is None:
            if not create:
                return False
            self._put(session_id, Value.new(record, Lifetime(ttl or self.default_ttl), now))
        else:
            self._rewrite(entry, record)
            if ttl is not None:
                entry.expires = now + ttl
                entry.touch(now)
                self._table.ends.note(session_id, entry.ends)
        self._table.set_user(self._name_in(data), session_id)
        self._table.used(session_id)
        return True

    async def delete(self, session_id: str) -> bool:
        check_id(session_id)
        if self._table.find(session_id) is None:
            return False
        self._table.drop(session_id)
        self._stats["deletes"] += 1
        return True

    async def exists(self, session_id: str) -> bool:
        check_id(session_id)
        return self._table.find(session_id) is not None

    async def list_active(self, limit: int | None = None, offset: int = 0) -> list[str]:
        await self.cleanup_expired()
        if limit is not None and (offset + limit) * 100 < len(self._entries):
            return heapq.nsmallest(offset + limit, self._entries)[offset:]
        return sorted(self._entries)[offset : None if limit is None else offset + limit]

    async def iter_active(self) -> AsyncGenerator[str, None]:
        """The ids in any order. Sessions that begin meanwhile may be missing."""
        for shard in self._table.shards:
            for count, session_id in enumerate(list(shard), 1):
                if count % _CHUNK == 0:
                    await anyio.lowlevel.checkpoint()
                if self._table.find(session_id) is not None:
                    yield session_id
            await anyio.lowlevel.checkpoint()

    async def count_active(self) -> int:
        await self.cleanup_expired()
        return len(self._entries)

    async def cleanup_expired(self) -> int:
        dropped = 0
        while self._table.ends.is_due(self._clock()):
            dropped += self._table.sweep(_CHUNK)
            await anyio.lowlevel.checkpoint()
        return dropped

    async def _records_of(self, user: str) -> AsyncGenerator[bytes, None]:
        names = self.names_of(user) if user else []
        known: set[str] = set().union(*(self._table.users.get(name, ()) for name in names))
        for count, session_id in enumerate(known, 1):
            if count % _CHUNK == 0:
                await anyio.lowlevel.checkpoint()
            entry = self._table.find(session_id)
            if entry is not None:
                yield entry.record

    async def _end_all_of(self, user: str, keep: str | None) -> int:
        ending = sorted(self._table.users.get(user, set()) - {keep}, reverse=True)
        for session_id in ending:
            self._table.unlink(user, session_id)  # all at once, so that none of them gets a new id
        ended = 0
        try:
            while ending:
                if len(ending) % _CHUNK == 0:
                    await anyio.lowlevel.checkpoint()
                session_id = ending.pop()
                entry = self._table.find(session_id)
                if entry is not None and user_of(entry.record) == user:
                    ended += await self.delete(session_id)
        finally:
            # of a call that was cut off: the next one ends them
            for session_id in self._entries.keys() & ending:
                self._table.link(user, session_id)
        return ended

    async def end_surplus(self, user: str, most: int, keep: str) -> list[str]:
        """In one step. Looks at a user's sessions only where there are too many."""
        known = self._table.users.get(user, set())
        if len(known) <= most:
            return []
        now, today, idle = self._clock(), time.time(), {}
        for session_id in list(known):
            entry = self._table.find(session_id)
            if entry is not None and user_of(entry.record) == user:
                idle[session_id] = idleness(entry, now, today)
        ended = surplus(idle, most, keep)
        for session_id in ended:
            self._table.drop(session_id)
            self._stats["deletes"] += 1
        return ended

    async def get_stats(self) -> dict[str, Any]:
        expired = await self.cleanup_expired()
        active = len(self._entries)
        return {
            **self._facts(),
            "total_sessions": active + expired,
            "active_sessions": active,
            "expired_sessions": expired,
            **self._locks.counts(),
            "max_sessions": self.max_sessions,
            "utilization": active / self.max_sessions,
            **self._stats,
            "evictions": self._table.evictions,
            "expirations": self._table.expirations,
        }

    # -- request operations -----------------------------------------------------------------------------

    async def checkout(
        self,
        session_id: str,
        lock: LockPolicy | None,
        lifetime: Lifetime | None,
        *,
        passive: bool = False,
    ) -> Checkout | Missing:
        token, waited, now = None, 0.0, self._clock()
        entry = self._entries.get(session_id)
        if lock is not None and entry is not None:
            token = self._locks.try_acquire(session_id, lock, now)
            if token is None:
                if not passive:
                    entry.arrive(lifetime, now)
                token, waited = await self._locks.acquire(session_id, lock)
                entry, now = self._entries.get(session_id), self._clock()
        if entry is None or entry.ends <= now:
            return self._missing(session_id, token)
        taken = entry.checkout(session_id, now, token, waited)
        if lifetime is not None:
            bounds = shorter(lifetime, taken)
            if bounds is not None and not self._bounded(taken, entry, bounds, now):
                return self._missing(session_id, token)
        self._stats["hits"] += 1
        self._table.used(session_id)
        return taken

    async def keep_alive(self, checkout: Checkout) -> None:
        entry = self._table.find(checkout.session_id)
        if entry is not None:
            entry.touch(self._clock())

    async def arrived(self, checkout: Checkout) -> None:
        await self.keep_alive(checkout)

    async def create(
        self,
        session_id: str,
        record: bytes,
        lifetime: Lifetime,
        lock: LockPolicy | None,
        user: str | None = None,
    ) -> Checkout | None:
        warn_if_one_of_several()
        if self._table.find(session_id) is not None:
            return None
        now = self._clock()
        entry = Value.new(record, lifetime, now)
        self._put(session_id, entry)
        self._table.link(user, session_id)
        token = self._locks.try_acquire(session_id, lock) if lock is not None else None
        return entry.checkout(session_id, now, token)

    async def commit(self, checkout: Checkout, record: bytes, *, release: bool) -> Outcome:
        outcome, entry = self._judge(checkout)
        if outcome is _STORED and entry is not None:
            self._rewrite(entry, record)
            checkout.record, checkout.version = record, entry.version
        if release:
            self._locks.release(checkout.session_id, checkout.token)
            checkout.token = None
        return outcome

    async def commit_unlocked(self, checkout: Checkout, record: bytes) -> Outcome:
        if self._locks.is_held(checkout.session_id):
            return Outcome.BUSY
        return await self.commit(checkout, record, release=False)

    async def bound(self, checkout: Checkout, lifetime: Lifetime) -> Outcome:
        outcome, entry = self._judge(checkout)
        if outcome is _STORED and entry is not None:
            now = self._clock()
            entry.bound(lifetime, now)
            self._rewrite(entry, entry.record)
            self._table.ends.note(checkout.session_id, entry.ends)
            checkout.is_now(entry.checkout(checkout.session_id, now, None))
        return outcome

    async def move(
        self,
        checkout: Checkout,
        session_id: str,
        record: bytes,
        *,
        lifetime: Lifetime | None,
        lock: LockPolicy | None,
        was: str | None,
        user: str | None,
        leads: bool = False,
    ) -> Outcome:
        outcome, old = self._judge(checkout)
        known = was is None or checkout.session_id in self._table.users.get(was, ())
        if outcome is _STORED and not known:
            outcome = Outcome.GONE  # a sign-out of this user is under way
        if outcome is _STORED and old is not None:
            now = self._clock()
            new = old.renewed(record, now) if lifetime is None else Value.new(record, lifetime, now)
            self._table.drop(checkout.session_id)
            self._retired.add(checkout.session_id, session_id if leads else None)
            self._put(session_id, new)
            self._table.link(user, session_id)
            token = self._locks.try_acquire(session_id, lock) if lock is not None else None
            checkout.successor = new.checkout(session_id, now, token)
        await self.release(checkout)
        return outcome

    async def discard(self, checkout: Checkout) -> Outcome:
        outcome, entry = self._judge(checkout)
        if outcome is _STORED and entry is not None:
            self._table.drop(checkout.session_id)
            self._stats["deletes"] += 1
        await self.release(checkout)
        return outcome

    async def link_user(self, user_id: str, session_id: str, lifetime: Lifetime) -> None:
        if session_id in self._entries:
            self._table.link(user_id, session_id)

    # -- inside -------------------------------------------------------------------------------------------

    async def _life_of(self, session_id: str) -> Life | None:
        entry = self._table.find(session_id)
        return None if entry is None else Life(entry.ends - self._clock(), True)

    def _facts(self) -> dict[str, Any]:
        return {"store_type": "memory", "default_ttl": self.default_ttl}

    async def _iter_stored(self) -> AsyncGenerator[bytes, None]:
        async with aclosing(self.iter_active()) as active:
            async for session_id in active:
                yield self._entries[session_id].record

    def _missing(self, session_id: str, token: str | None) -> Missing:
        self._table.find(session_id)  # drops it if it has expired
        self._locks.release(session_id, token)
        self._stats["misses"] += 1
        return Missing.RETIRED if session_id in self._retired else Missing.ABSENT

    def _bounded(self, taken: Checkout, entry: Value, bounds: Lifetime, now: float) -> bool:
        """Shorten the bounds of a record; False where it has ended by that."""
        entry.bound(bounds, now)
        self._table.ends.note(taken.session_id, entry.ends)
        taken.expires_in, taken.idle = bounds.absolute, bounds.idle
        return entry.ends > now

    def _judge(self, checkout: Checkout) -> tuple[Outcome, Value | None]:
        session_id = checkout.session_id
        if checkout.token is not None and self._locks.is_taken_over(session_id, checkout.token):
            return Outcome.LOST, None
        entry = self._entries.get(session_id)
        if entry is None or entry.ends <= self._clock():
            return Outcome.GONE, None
        return (_STORED if entry.version == checkout.version else Outcome.CONFLICT), entry

    def _put(self, session_id: str, entry: Value) -> None:
        self._table.put(session_id, entry, self.max_sessions)
        self._stats["writes"] += 1

    def _rewrite(self, entry: Value, record: bytes) -> None:
        self._versions += 1  # cheaper than a random version, and as good in one process
        entry.rewrite(record, str(self._versions))
        self._stats["writes"] += 1
