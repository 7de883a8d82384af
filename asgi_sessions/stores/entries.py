"""Records in this process's memory, and when they end."""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping

from .checkout import Checkout, Lifetime

_TIDIED = 4  # ends that are looked at with each one noted: twice as many as can be out of date


class Entry:
    """A record with its bounds; all times by the store's clock."""

    __slots__ = ("began", "ends", "expires", "idle", "noted", "record", "users", "version")

    def __init__(self, began: float, expires: float, idle: float) -> None:
        self.record = b""
        self.version = ""
        self.began = began  # when the life that `expires` bounds began
        self.expires = expires  # the absolute bound, inf for none
        self.idle = idle  # seconds, inf for none
        self.ends = min(expires, began + idle)  # when it is absent: the earlier of both bounds
        self.noted = self.ends  # the end that stands in the books
        self.users: tuple[str, ...] = ()  # whose index names it; one too many is harmless

    @classmethod
    def new(cls, lifetime: Lifetime, now: float) -> Entry:
        """A record whose life begins now."""
        absolute = math.inf if lifetime.absolute is None else lifetime.absolute
        return cls(now, now + absolute, math.inf if lifetime.idle is None else lifetime.idle)

    def renewed(self, now: float) -> Entry:
        """Another record with the same bounds, whose idle timeout starts now."""
        entry = Entry(self.began, self.expires, self.idle)
        entry.touch(now)
        return entry

    def touch(self, now: float) -> None:
        """A request came: the idle timeout restarts."""
        self.ends = min(self.expires, now + self.idle)

    def arrive(self, rule: Lifetime | None, now: float) -> None:
        """A request came and has to wait: it counts, unless the session is over, by the caller's rule too."""
        if self.ends > now and (rule is None or rule.idle is None or self.last(now) + rule.idle > now):
            self.touch(now)

    def last(self, now: float) -> float:
        """When the last request came; where the end does not tell, it is now."""
        clipped = self.idle == math.inf or self.ends == self.expires
        return now if clipped else self.ends - self.idle

    def bound(self, lifetime: Lifetime, now: float) -> None:
        """Shorten the bounds; the idle timeout counts from the last request, so that it may be over."""
        last = self.last(now)
        self.expires = math.inf if lifetime.absolute is None else now + lifetime.absolute
        self.idle = math.inf if lifetime.idle is None else lifetime.idle
        self.ends = min(self.expires, last + self.idle)

    def checkout(self, session_id: str, now: float, token: str | None, waited: float = 0.0) -> Checkout:
        """The record, taken out for a request under the lease with this token."""
        return Checkout(
            session_id,
            self.record,
            self.version,
            token,
            None if self.expires == math.inf else self.expires - now,
            waited,
            None if self.idle == math.inf else self.idle,
            now - self.began,
        )


class Ends:
    """Which record ends next. Nobody waits for more than a few of them.

    A heap, in which the end of a record that is gone stays until it comes, as does that of one that lives on.
    When most of them are such, another heap takes its place, to which a few at a time go over.
    """

    def __init__(self, entries: Mapping[str, Entry]) -> None:
        self._entries = entries
        self._heap: list[tuple[float, str]] = []
        self._old: list[tuple[float, str]] = []

    def __len__(self) -> int:
        return len(self._heap) + len(self._old)

    def note(self, session_id: str, entry: Entry) -> None:
        """Enter a record's end, in place of one that was noted before."""
        entry.noted = entry.ends
        heapq.heappush(self._heap, (entry.ends, session_id))
        if self._old:
            self._tidy()
        elif len(self._heap) > 2 * len(self._entries) + 64:
            self._old, self._heap = self._heap, []

    def is_due(self, now: float) -> bool:
        """Whether some end has come, though perhaps of a record that is gone or lives on."""
        heap, old = self._heap, self._old
        return (bool(heap) and heap[0][0] <= now) or (bool(old) and old[0][0] <= now)

    def take(self, now: float) -> str | None:
        """The id whose end came first, which is noted no more; None where none has come."""
        heap = self._old if self._old and (not self._heap or self._old < self._heap) else self._heap
        if not heap or heap[0][0] > now:
            return None
        return heapq.heappop(heap)[1]

    def _tidy(self) -> None:
        for end, known in self._old[-_TIDIED:]:
            each = self._entries.get(known)
            if each is not None and each.noted == end:
                heapq.heappush(self._heap, (end, known))
        del self._old[-_TIDIED:]  # the last of a heap: what remains is one
