"""What was read back to prove a change: the next request of the session has to read the same."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Generic, TypeVar

MAX_KEPT = 512
MAX_BYTES = 4096  # of a record that is kept, which takes some ten times as much when parsed

Value = TypeVar("Value")


class ReadBack(Generic[Value]):
    """Parsed records by their bytes. Each is given away once: an app may change what it gets."""

    def __init__(self) -> None:
        self._kept: dict[Hashable, Value] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def keep(self, key: Hashable, record: bytes, value: Value) -> None:
        """Keep what was read from `record`, which `key` names; all others go where there are too many."""
        if len(record) <= MAX_BYTES:
            if len(self._kept) >= MAX_KEPT:
                self._kept.clear()
            self._kept[key] = value

    def take(self, key: Hashable) -> Value | None:
        """What is kept under this key, and is no more."""
        return self._kept.pop(key, None)
