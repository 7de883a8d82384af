"""Clients that come back: until then a new record lives for a short time only."""

from __future__ import annotations

from ..stores.checkout import Checkout

_MOST = 4096  # ids that are known; about 400 kB
_TOLERANCE = 1.0  # seconds


class Arrivals:
    """Tells whose client may have sent its cookie back for the first time.

    `first_ttl` (seconds) is how long a new record lives where its client does not come back. An older one has
    its full life, else it would not be there. A younger one is given it once by each process, more often only
    where that has forgotten that it did so.
    """

    def __init__(self, first_ttl: float) -> None:
        self.first_ttl = first_ttl
        self._known: dict[str, None] = {}

    def __len__(self) -> int:
        return len(self._known)

    def may_be_first(self, taken: Checkout) -> bool:
        """Whether this record may have no full life yet."""
        if taken.age is not None and taken.age > self.first_ttl + _TOLERANCE:
            return False
        return taken.session_id not in self._known

    def note(self, session_id: str) -> None:
        """Take note that the record of this id has its full life."""
        if len(self._known) >= _MOST:
            self._known.clear()
        self._known[session_id] = None
