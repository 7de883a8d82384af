"""What of a record lies in columns beside it, so that it can be found by it."""

from __future__ import annotations

from datetime import datetime
from functools import lru_cache
from typing import NamedTuple

from ...record.codec import counts_of, user_of
from ...record.lines import items_of, parsed, split
from .queries import MOST


class Columns(NamedTuple):
    """Who is signed in, when the record was created (seconds since the epoch), and its counts.

    None where nobody is signed in, or where the record does not say.
    """

    user_id: str | None
    created: float | None
    messages: int
    escalated: bool

    def __repr__(self) -> str:
        return "Columns()"


def columns_of(record: bytes) -> Columns:
    """The columns of a record, whatever its model."""
    parts = split(record)
    if parts is None:
        found = parsed(record)
        messages, escalated = counts_of(record)
        messages = max(min(messages, MOST), -MOST)
        return Columns(user_of(record), _seconds(found.get("created_at")), messages, escalated)
    return Columns(*_of_first_line(parts.who), *_of_third_line(parts.fields))


def have_same_columns(record: bytes, other: bytes) -> bool:
    """Whether two records surely have the same columns: nearly always, and it is cheap to see."""
    one, two = record.split(b"\n"), other.split(b"\n")
    return len(one) == len(two) == 4 and one[0] == two[0] and one[2] == two[2]


@lru_cache(maxsize=1024)
def _of_first_line(line: bytes) -> tuple[str | None, float | None]:
    return user_of(line + b"\n"), _seconds(items_of(line).get("created_at"))


@lru_cache(maxsize=1024)
def _of_third_line(line: bytes) -> tuple[int, bool]:
    messages, escalated = counts_of(b'{"session_id":"",\n"updated_at":"",\n%b\n"metadata":{}}' % line)
    return max(min(messages, MOST), -MOST), escalated


def _seconds(text: object) -> float | None:
    try:
        return datetime.fromisoformat(str(text).replace("Z", "+00:00")).timestamp()
    except ValueError:
        return None
