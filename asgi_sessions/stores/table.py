"""The records of the store in memory, and the books about them: ids, ends, users, who makes room."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from .entries import Ends, Entry
from .local import LocalLocks

_SWEEP = 2  # expired records dropped with each one created, so that memory follows the live ones
_LOOKS = 64  # records looked at before the table grows by one rather than let its caller wait
_SHARDS = 64  # parts in which the ids are listed: to copy all of a million at once takes 20 ms


class Table:
    """Records by id. Every change goes through a method, so that the books agree.

    `locks` has the ids that are checked out. `clock` gives seconds and never goes back.
    """

    def __init__(self, locks: LocalLocks, clock: Callable[[], float]) -> None:
        self.entries: dict[str, Entry] = {}
        self.shards: list[set[str]] = [set() for _ in range(_SHARDS)]  # the same ids, for who lists them
        self.ends = Ends(self.entries)
        self.users: dict[str, set[str]] = {}  # the ids of each user's sessions
        self.evictions = self.expirations = 0
        self.locks = locks
        self._clock = clock
        self._anonymous: OrderedDict[str, None] = OrderedDict()  # least recently active first
        self._signed_in: OrderedDict[str, None] = OrderedDict()  # the same

    def find(self, session_id: str) -> Entry | None:
        """The live record of this id; one that has expired is dropped."""
        entry = self.entries.get(session_id)
        if entry is not None and entry.ends <= self._clock():
            self._expire(session_id)
            return None
        return entry

    def put(self, session_id: str, entry: Entry, most: int) -> None:
        """Add a record under an id that has none. Others make room where there are `most` already."""
        self.sweep(_SWEEP)
        while len(self.entries) >= most and self._evict():
            pass
        self.entries[session_id] = entry
        self.shards[hash(session_id) % _SHARDS].add(session_id)
        self._anonymous[session_id] = None
        self.ends.note(session_id, entry)

    def drop(self, session_id: str) -> None:
        """Remove a record."""
        entry = self.entries.pop(session_id)
        self.shards[hash(session_id) % _SHARDS].discard(session_id)
        self._anonymous.pop(session_id, None)
        self._signed_in.pop(session_id, None)
        for user_id in entry.users:
            self._forget(user_id, session_id)

    def used(self, session_id: str) -> None:
        """Note that the session was active: others make room before it."""
        order = self._anonymous if session_id in self._anonymous else self._signed_in
        order.move_to_end(session_id)

    # -- users ------------------------------------------------------------------------------------------

    def link(self, user_id: str | None, session_id: str) -> None:
        """Enter the session for this user; None is nobody."""
        if user_id is not None:
            entry = self.entries[session_id]
            if user_id not in entry.users:
                entry.users += (user_id,)
            self.users.setdefault(user_id, set()).add(session_id)
            if self._anonymous.pop(session_id, session_id) is None:
                self._signed_in[session_id] = None

    def unlink(self, user_id: str, session_id: str) -> None:
        """Take the session from this user. It is anonymous where nobody else is signed in in it."""
        self._forget(user_id, session_id)
        entry = self.entries[session_id]
        entry.users = tuple(other for other in entry.users if other != user_id)
        if not entry.users and self._signed_in.pop(session_id, session_id) is None:
            self._anonymous[session_id] = None

    def set_user(self, user_id: str | None, session_id: str) -> None:
        """Enter the session for this user and for nobody else."""
        for other in self.entries[session_id].users:
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
        """Drop expired records, looking at no more than `most` of those whose end may have come."""
        dropped, now = 0, self._clock()
        for _ in range(most):
            session_id = self.ends.take(now)
            if session_id is None:
                break
            entry = self.entries.get(session_id)
            if entry is not None and entry.ends > now:
                self.ends.note(session_id, entry)
            elif entry is not None:
                self._expire(session_id)
                dropped += 1
        return dropped

    def _expire(self, session_id: str) -> None:
        self.drop(session_id)
        self.expirations += 1

    def _evict(self) -> bool:
        """Drop an expired record or else evict one. False after many looks: the next `put` goes on."""
        for _ in range(_LOOKS):
            if not self.ends.is_due(self._clock()):
                return self._evict_from(self._anonymous, self._signed_in)
            if self.sweep(1):  # one is enough: the others go with those that are created after this one
                return True
        return False

    def _evict_from(self, *orders: OrderedDict[str, None]) -> bool:
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
