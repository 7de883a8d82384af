"""The layout of a record: one JSON document in four lines, so that one split gives each reader its part.

    {"session_id":…,"user_id":…,"created_at":…,"fingerprint":…,
    "updated_at":…,"last_activity":…,
    "thread_id":…,"request_id":…,"message_count":…,"escalated":…,and the model's own fields,
    "metadata":{…}}

JSON escapes line feeds within texts, so that no other line feed is there. Records of earlier releases, of
other programs and of models with serialisers of their own have no such lines and are read as a whole.
"""

from __future__ import annotations

from datetime import datetime, timezone
from functools import lru_cache
from typing import NamedTuple

from pydantic_core import from_json

WHO = ("session_id", "user_id", "created_at", "fingerprint")  # the first line
WHEN = ("updated_at", "last_activity")  # the second


class Parts(NamedTuple):
    """A record and its lines; `metadata` is the JSON of the metadata alone.

    Where the record has no lines, `who` and `when` are empty and `fields` is the whole record.
    """

    record: bytes
    who: bytes
    when: bytes
    fields: bytes
    metadata: bytes

    def __repr__(self) -> str:
        return "Parts()"


def join(who: bytes, when: bytes, fields: bytes, metadata: bytes) -> Parts:
    """The record that has these parts."""
    return Parts(b'%b\n%b\n%b\n"metadata":%b}' % (who, when, fields, metadata), who, when, fields, metadata)


def split(record: bytes) -> Parts | None:
    """The parts of a record in four lines, unchecked; None for any other layout."""
    lines = record.split(b"\n")
    if len(lines) != 4:
        return None
    who, when, fields, last = lines
    if who[:1] != b"{" or last[:12] != b'"metadata":{' or last[-2:] != b"}}":
        return None
    return Parts(record, who, when, fields, last[11:-1])


def when_line(now: int) -> bytes:
    """The second line of a record that is changed now, in nanoseconds since the epoch."""
    second, rest = divmod(now, 1_000_000_000)
    moment = (_spelled(second), rest // 1000) * 2
    return b'"updated_at":"%b.%06dZ","last_activity":"%b.%06dZ",' % moment


@lru_cache(maxsize=1)
def _spelled(second: int) -> bytes:
    return datetime.fromtimestamp(second, timezone.utc).strftime("%Y-%m-%dT%H:%M:%S").encode()


def items_of(line: bytes) -> dict[str, object]:
    """The names and values on one of the first three lines; empty where it is no such line."""
    opening = b"" if line[:1] == b"{" else b"{"
    return parsed(b"%b%b}" % (opening, line[:-1])) if line[-1:] == b"," else {}


def parsed(text: bytes) -> dict[str, object]:
    """The names and values of a JSON object; empty where it is none."""
    try:
        found = from_json(text, cache_strings="keys")  # no id stays behind in pydantic's cache
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
