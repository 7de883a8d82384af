"""The common record, a `SessionData` without fields of its own, read and written without its model.

A handle that is used as a dict needs the metadata only. What stands before and behind them in the record is
checked against its exact shape and taken over byte by byte; anything unusual is left to the model.
"""

from __future__ import annotations

import re
import time
from datetime import datetime, timezone
from functools import lru_cache
from typing import Any

from pydantic_core import from_json, to_json

from .record import MAX_DEPTH, MAX_METADATA_BYTES

# Only what the model accepts for certain and writes back as it is: everything else is left to it. (Of the
# times the shape alone: whether there is such a day costs more than it is worth.)
_NAME = rb'(?:null|"(?!(?i:drop|delete)(?![A-Za-z0-9_]))(?![^"]*--)[A-Za-z0-9_.@:+=~|-]{1,255}")'
_TIME = rb"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(?:\.\d{6})?Z"
_HEAD = re.compile(
    rb'\{"session_id":"([0-9a-f]{32})","user_id":(' + _NAME + rb'),"thread_id":' + _NAME + rb',"request_id":'
    + _NAME + rb',"message_count":(?:0|[1-9]\d{0,4}|100000),"escalated":(?:true|false),"metadata":'
)  # fmt: skip
_TAIL = re.compile(
    rb',"created_at":"(' + _TIME + rb')","updated_at":"(' + _TIME + rb')","last_activity":"' + _TIME
    + rb'","fingerprint":(null|"(?:[0-9a-f]{64}|[0-9a-f]{40}|[0-9a-f]{32})")\}'
)  # fmt: skip


class PlainRecord:
    """A parsed record: the metadata as it was stored, and what surrounds it."""

    __slots__ = (
        "_created",
        "_encoded",
        "_fingerprint",
        "_head",
        "_json",
        "_sealed",
        "_user_id",
        "metadata",
        "session_id",
    )

    def __init__(self, head: re.Match[bytes], json: bytes, tail: re.Match[bytes]) -> None:
        self.session_id = head[1].decode()
        self.metadata: dict[str, Any] = from_json(json)
        self._user_id = head[2]
        self._head = head[0]
        self._json = json
        self._created, _, self._fingerprint = tail.groups()
        self._encoded: bytes | None = None
        self._sealed = json, self.metadata

    @property
    def user_id(self) -> str | None:
        """Who is signed in."""
        return None if self._user_id == b"null" else self._user_id[1:-1].decode()

    @property
    def fingerprint(self) -> str | None:
        """The client that the record was made for."""
        return None if self._fingerprint == b"null" else self._fingerprint[1:-1].decode()

    def differs(self, values: dict[str, Any]) -> bool:
        """Whether these values are not the stored ones. `ValueError` if JSON has none such."""
        self._encoded = None
        json = to_json(values)  # nested values may be the same objects, True equals 1, a tuple is a list
        if json == self._json:
            return False
        self._encoded = json  # whoever asks goes on to seal, if at all, before the app runs again
        return self.metadata != values or json != to_json(from_json(self._json))  # others write otherwise

    def seal(self, values: dict[str, Any]) -> bytes | None:
        """The record with these values and the time of the change, proven to read back as it is.

        None where it is not beyond doubt: the model has to decide, and to say what is wrong.
        """
        now = _utc_now_text()
        digits = 27 if len(self._created) == 27 else 19  # a whole second is spelled without its fraction
        if now[:digits] <= self._created[:digits]:  # a clock that went back
            return None
        json = to_json(values) if self._encoded is None else self._encoded
        self._encoded = None
        if len(json) > MAX_METADATA_BYTES or json.count(b"[") + json.count(b"{") > MAX_DEPTH:
            return None
        if b"Infinity" in json or from_json(json) != values:  # an infinity would read back, yet JSON has none
            return None
        self._sealed = json, values
        return b"".join((
            self._head, json, b',"created_at":"', self._created, b'","updated_at":"', now,
            b'","last_activity":"', now, b'","fingerprint":', self._fingerprint, b"}",
        ))  # fmt: skip

    def committed(self) -> None:
        """What was sealed last is what the store holds now."""
        self._json, self.metadata = self._sealed


def _utc_now_text() -> bytes:
    """The moment in UTC as records spell it, to the microsecond."""
    second, rest = divmod(time.time_ns(), 1_000_000_000)
    return b"%b.%06dZ" % (_spelled(second), rest // 1000)


@lru_cache(maxsize=1)
def _spelled(second: int) -> bytes:
    return datetime.fromtimestamp(second, timezone.utc).strftime("%Y-%m-%dT%H:%M:%S").encode()


def parse_plain(record: bytes) -> PlainRecord | None:
    """The parsed record; None where it has another shape, which the model may know.

    The metadata's end is found from behind: fields that another release added stand after the fingerprint,
    so that such a record has another shape.
    """
    head = _HEAD.match(record)
    tail = _TAIL.fullmatch(record, record.rfind(b',"created_at":"'))
    if head is None or tail is None or tail[2][:-1] < tail[1][:-1]:  # updated before it was created
        return None
    try:
        plain = PlainRecord(head, record[head.end() : tail.start()], tail)
    except ValueError:
        return None
    return plain if type(plain.metadata) is dict else None
