"""The order in which the records in memory end."""

from __future__ import annotations

import heapq

_TIDIED = 4  # old ends that go over to the new heap with each end that is noted


class Ends:
    """Which record ends next. Each call does a small, bounded amount of work.

    A heap of ends. An end stays in it when its record is deleted or gets a later end. When most ends are out
    of date, a new heap is begun, and the ends that still count go over to it, a few with each call.
    """

    def __init__(self) -> None:
        self._noted: dict[str, float] = {}  # the end of each record that counts
        self._heap: list[tuple[float, str]] = []
        self._old: list[tuple[float, str]] = []

    def __len__(self) -> int:
        return len(self._heap) + len(self._old)

    def note(self, session_id: str, end: float) -> None:
        """Note a record's end, in place of an earlier one."""
        self._noted[session_id] = end
        heapq.heappush(self._heap, (end, session_id))
        if self._old:
            self._tidy()
        elif len(self._heap) > 2 * len(self._noted) + 64:
            self._old, self._heap = self._heap, []

    def forget(self, session_id: str) -> None:
        """Note that the record is gone."""
        del self._noted[session_id]

    def is_due(self, now: float) -> bool:
        """Whether an end has come, which may be out of date."""
        heap, old = self._heap, self._old
        return (bool(heap) and heap[0][0] <= now) or (bool(old) and old[0][0] <= now)

    def take(self, now: float) -> str | None:
        """Remove the first end that has come and return its id; None where none has come."""
        heap = self._old if self._old and (not self._heap or self._old < self._heap) else self._heap
        if not heap or heap[0][0] > now:
            return None
        return heapq.heappop(heap)[1]

    def _tidy(self) -> None:
        for end, session_id in self._old[-_TIDIED:]:
            if self._noted.get(session_id) == end:
                heapq.heappush(self._heap, (end, session_id))
        del self._old[-_TIDIED:]  # a heap without its last items is still a heap
