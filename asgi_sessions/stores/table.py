"""The records in memory, with what finds them: ids, ends, users, and the order of eviction."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

from .ends import Ends
from .local import LocalLocks
from .value import Value

_SWEEP = 2  # expired records that are dropped with each new one, so that memory follows the live ones
_LOOKS = 64  # records that are looked at to make room; then the table grows by one, and nobody waits
_SHARDS = 64  # parts in which ids are listed: copying a million at once takes 20 ms


class Table:
    """Records by id. All that is kept about a record changes here, in one step.

    A record under a lock of `locks` is never evicted. `clock` gives seconds and never goes back. `on_dropped`
    is told of each record that goes.
    """

    def __init__(
        self, locks: LocalLocks, clock: Callable[[], float], on_dropped: Callable[[Sequence[str]], None]
    ) -> None:
        self.entries: dict[str, Value] = {}
        self.shards: list[set[str]] = [set() for _ in range(_SHARDS)]  # the same ids, for listing
        self.ends = Ends()
        self.users: dict[str, set[str]] = {}  # the ids of each user's sessions
        self.evictions = self.expirations = 0
        self.locks = locks
        self._clock = clock
        self._on_dropped = on_dropped
        self._anonymous: OrderedDict[str, None] = OrderedDict()  # least recently active first
        self._signed_in: OrderedDict[str, tuple[str, ...]] = OrderedDict()  # the same, and who is signed in

    def find(self, session_id: str) -> Value | None:
        """The live record of this id. Drops one that has expired."""
        entry = self.entries.get(session_id)
        if entry is not None and entry.ends <= self._clock():
            self._expire(session_id)
            return None
        return entry

    def put(self, session_id: str, entry: Value, most: int) -> None:
        """Add a record under an id that has none. Where there are `most` already, one is evicted."""
        self.sweep(_SWEEP)
        while len(self.entries) >= most and self._evict():
            pass
        self.entries[session_id] = entry
        self.shards[hash(session_id) % _SHARDS].add(session_id)
        self._anonymous[session_id] = None
        self.ends.note(session_id, entry.ends)

    def drop(self, session_id: str) -> None:
        """Remove a record."""
        del self.entries[session_id]
        self.shards[hash(session_id) % _SHARDS].discard(session_id)
        self.ends.forget(session_id)
        self._anonymous.pop(session_id, None)
        for user_id in self._signed_in.pop(session_id, ()):
            self._forget(user_id, session_id)
        self._on_dropped((session_id,))

    def used(self, session_id: str) -> None:
        """Note that the session was active: others are evicted before it."""
        if session_id in self._anonymous:
            self._anonymous.move_to_end(session_id)
        else:
            self._signed_in.move_to_end(session_id)

    # -- users ------------------------------------------------------------------------------------------

    def link(self, user_id: str | None, session_id: str) -> None:
        """Note that this user is signed in in the session; None is nobody."""
        if user_id is not None:
            self._anonymous.pop(session_id, None)
            known = self._signed_in.get(session_id, ())
            if user_id not in known:
                self._signed_in[session_id] = (*known, user_id)
            self.users.setdefault(user_id, set()).add(session_id)

    def unlink(self, user_id: str, session_id: str) -> None:
        """Note that this user is not signed in in the session any more."""
        self._forget(user_id, session_id)
        left = tuple(other for other in self._signed_in.get(session_id, ()) if other != user_id)
        if left:
            self._signed_in[session_id] = left
        elif self._signed_in.pop(session_id, None):
            self._anonymous[session_id] = None

    def set_user(self, user_id: str | None, session_id: str) -> None:
        """Note that this user, and nobody else, is signed in in the session."""
        for other in self._signed_in.get(session_id, ()):
            if other != user_id:
                self.unlink(other, session_id)
        self.link(user_id, session_id)

    def _forget(self, user_id: str, session_id: str) -> None:
        sessions = self.users.get(user_id, set())
        sessions.discard(session_id)
        if not sessions:
            self.users.pop(user_id, None)

    # -- making room ------------------------------------------------------------------------------------

    def sweep(self, most: int) -> int:
        """Drop expired records, at most `most`, and return how many."""
        dropped, now = 0, self._clock()
        for _ in range(most):
            session_id = self.ends.take(now)
            if session_id is None:
                break
            entry = self.entries.get(session_id)
            if entry is not None and entry.ends > now:
                self.ends.note(session_id, entry.ends)
            elif entry is not None:
                self._expire(session_id)
                dropped += 1
        return dropped

    def _expire(self, session_id: str) -> None:
        self.drop(session_id)
        self.expirations += 1

    def _evict(self) -> bool:
        """Drop an expired record, else evict one. False where `_LOOKS` found none: the next `put` goes on."""
        for _ in range(_LOOKS):
            if not self.ends.is_due(self._clock()):
                return self._evict_from(self._anonymous, self._signed_in)
            if self.sweep(1):  # one is enough: later calls drop the others
                return True
        return False

    def _evict_from(self, *orders: OrderedDict[str, Any]) -> bool:
        looks = _LOOKS
        for order in orders:
            for _ in range(min(looks, len(order))):
                session_id = next(iter(order))
                if session_id not in self.locks:
                    self.drop(session_id)
                    self.evictions += 1
                    return True
                order.move_to_end(session_id)
            looks -= len(order)
            if looks <= 0:
                break
        return False
