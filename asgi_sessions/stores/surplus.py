"""Which sessions of a user are ended when there are too many. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping

from ..record.codec import used_at
from .value import Value


def idleness(value: Value, now: float, today: float) -> float:
    """For how many seconds at most nobody has used this record, at one moment for all that are compared.

    `now` is that moment by the store's clock and `today` by `time.time()`. The idle timeout tells when the
    last request came, the record itself when it was last changed.
    """
    waited = now - value.last(now) if value.idle < math.inf else math.inf
    return least(waited, value.record, today)


def least(waited: float, record: bytes, today: float) -> float:
    """The same, where the idle timeout says so many seconds, `inf` for nothing."""
    return max(min(waited, today - used_at(record)), 0.0)


def by_idleness(others: Mapping[str, float]) -> list[str]:
    """The ids of sessions, the longest idle first, by the seconds for which they are idle."""
    return sorted(others, key=lambda session_id: (-others[session_id], session_id))


def surplus(idle: dict[str, float], most: int, keep: str) -> list[str]:
    """Which of the sessions that are idle for so many seconds are ended, so that `most` are left.

    `keep` is not, and does not count where it is not among them: another sign-in has ended it.
    """
    too_many = len(idle) - most
    idle.pop(keep, None)
    return by_idleness(idle)[: max(too_many, 0)]
