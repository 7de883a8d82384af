"""The common record, a `SessionData` without fields of its own, read and written without its model.

A handle that is used as a dict needs the metadata only. What stands before and behind them in the record is
checked against its exact shape and taken over byte by byte; anything unusual is left to the model.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime, timezone
from functools import lru_cache
from typing import Any, TypeAlias

from pydantic_core import from_json, to_json

from .codec import MAX_DEPTH, MAX_METADATA_BYTES

MAX_KEPT = 512  # records that are kept parsed
MAX_KEPT_BYTES = 4096  # the longest one, which takes some ten times as much when parsed
_ID = slice(15, 47)  # of a record of the common shape

Frame: TypeAlias = tuple[str, str | None, str | None, bytes, bytes, bytes]
"""Session id, user id, fingerprint; what stands before the metadata, time of creation, what stands last."""
# Only what the model accepts for certain and writes back as it is: everything else is left to it. (Of the
# times the shape alone: whether there is such a day costs more than it is worth.)
_NAME = rb'(?:null|"(?!(?i:drop|delete)(?![A-Za-z0-9_]))(?![^"]*--)[A-Za-z0-9_.@:+=~|-]{1,255}")'
_USER = rb'(?:null|"(?!--)[A-Za-z0-9_.@:+=~|-]{1,255}")'
_TIME = rb"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(?:\.\d{6})?Z"
_HEAD = re.compile(
    rb'\{"session_id":"([0-9a-f]{32})","user_id":(' + _USER + rb'),"thread_id":' + _NAME + rb',"request_id":'
    + _NAME + rb',"message_count":(?:0|[1-9]\d{0,4}|100000),"escalated":(?:true|false),"metadata":'
)  # fmt: skip
_TAIL = re.compile(
    rb',"created_at":"(' + _TIME + rb')","updated_at":"(' + _TIME + rb')","last_activity":"' + _TIME
    + rb'","fingerprint":(null|"(?:[0-9a-f]{64}|[0-9a-f]{40}|[0-9a-f]{32})")\}'
)  # fmt: skip


class PlainRecord:
    """A parsed record: the metadata as it was stored, and what surrounds it.

    `user_id` is who is signed in, `fingerprint` the client that the record was made for.
    """

    __slots__ = (
        "_compared", "_frame", "_json", "_sealed", "fingerprint", "metadata", "session_id", "user_id",
    )  # fmt: skip

    def __init__(self, frame: Frame, json: bytes, metadata: dict[str, Any]) -> None:
        self.session_id, self.user_id, self.fingerprint, _, _, _ = self._frame = frame
        self.metadata = metadata
        self._json = json
        self._compared: tuple[bytes, dict[str, Any]] | None = None
        self._sealed: tuple[bytes, bytes, dict[str, Any], dict[str, Any]] | None = None

    @property
    def sealed(self) -> bytes | None:
        """The record that was sealed last, for as long as it is not known whether the store has it."""
        return None if self._sealed is None else self._sealed[0]

    def stored_values(self) -> dict[str, Any]:
        """The metadata as they are stored; `metadata` may share nested values with what an app changes."""
        values: dict[str, Any] = from_json(self._json)
        return values

    def differs(self, values: dict[str, Any]) -> bool:
        """Whether these values are not the stored ones. `ValueError` if JSON has none such.

        Whoever asks goes on to `seal` them, if at all, before the app runs again.
        """
        self._compared = None
        json = to_json(values)  # nested values may be the same objects, True equals 1, a tuple is a list
        if json == self._json:
            return False
        self._compared = json, values
        return self.metadata != values or json != to_json(from_json(self._json))  # others write otherwise

    def seal(self, values: Callable[[], dict[str, Any]]) -> bytes | None:
        """The record with these values and the time of the change, proven to read back as it is.

        None where it is not beyond doubt: the model has to decide, and to say what is wrong.
        """
        _, _, _, head, created, last = self._frame
        now = _utc_now_text()
        digits = 27 if len(created) == 27 else 19  # a whole second is spelled without its fraction
        if now[:digits] <= created[:digits]:  # a clock that went back
            return None
        if self._compared is not None:
            json, current = self._compared
            self._compared = None
        else:
            current = values()
            json = to_json(current)
        if len(json) > MAX_METADATA_BYTES or json.count(b"[") + json.count(b"{") > MAX_DEPTH:
            return None
        again = from_json(json)
        if again != current or b"Infinity" in json:  # an infinity would read back, yet JSON has none
            return None
        record = b"".join((
            head, json, b',"created_at":"', created, b'","updated_at":"', now,
            b'","last_activity":"', now, b'","fingerprint":', last,
        ))  # fmt: skip
        self._sealed = record, json, current, again
        return record

    def committed(self, record: bytes) -> None:
        """`record`, which was sealed last, is what the store holds now."""
        if self._sealed is not None:
            _, self._json, self.metadata, again = self._sealed
            self._sealed = None  # nobody else may get what was read back
            if len(record) <= MAX_KEPT_BYTES:
                _keep(record, self._frame, self._json, again)


_read_back: dict[bytes, tuple[bytes, Frame, bytes, dict[str, Any]]] = {}
"""Records that were committed lately, parsed, by their session ids; oldest first.

What was read back to prove a change is what the next request has to parse. It is given away once: an app may
change what it gets.
"""


def _keep(record: bytes, frame: Frame, json: bytes, metadata: dict[str, Any]) -> None:
    if len(_read_back) >= MAX_KEPT:
        with suppress(StopIteration, KeyError, RuntimeError):  # of another thread's hand
            del _read_back[next(iter(_read_back))]
    _read_back[record[_ID]] = record, frame, json, metadata


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
    kept = _read_back.pop(record[_ID], None)
    if kept is not None and kept[0] == record:
        return PlainRecord(*kept[1:])
    head = _HEAD.match(record)
    tail = _TAIL.fullmatch(record, record.rfind(b',"created_at":"'))
    if head is None or tail is None or tail[2][:-1] < tail[1][:-1]:  # updated before it was created
        return None
    json = record[head.end() : tail.start()]
    try:
        metadata = from_json(json)
    except ValueError:
        return None
    if type(metadata) is not dict:
        return None
    session_id, user, client = head[1].decode(), head[2], tail[3]
    user_id = None if user == b"null" else user[1:-1].decode()
    fingerprint = None if client == b"null" else client[1:-1].decode()
    return PlainRecord((session_id, user_id, fingerprint, head[0], tail[1], client + b"}"), json, metadata)
