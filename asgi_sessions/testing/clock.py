"""A clock that is moved by hand."""

from __future__ import annotations

import math


class ManualClock:
    """A clock that stands still until the test moves it: `InMemorySessionStore(clock=ManualClock())`.

    Everything that the store times goes by it: `max_age`, `idle_timeout` and leases. Times in a record
    (`created_at` and the like) are the system's.
    """

    def __init__(self, start: float = 0.0) -> None:
        self._now = start

    def __call__(self) -> float:
        """The time, in seconds since the clock's own beginning."""
        return self._now

    def advance(self, seconds: float) -> None:
        """Let so many seconds pass. `ValueError` for less than none: a clock of a store never goes back."""
        if not 0 <= seconds < math.inf:
            raise ValueError(f"advance() takes a number of seconds from 0 upwards, not {seconds!r}")
        self._now += seconds
