"""How records lie in Redis: the names of the keys and the header before the JSON."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

from ...errors import SessionStoreError
from ...fields import check_id
from ..checkout import RETIRED_FOR
from .names import new_nonce
from .replies import mark_of
from .scripts import Keys

KNOWN = 1024  # sessions whose keys are not made anew for each request, about 1 MB
_CENTURY = 3_155_760_000  # seconds; more is not told from less, and fits into the header
HEADER = re.compile(rb"asgi1:([0-9a-f]{16}:([0-9]{13}):[0-9]{13}):")
NONCE = 16  # digits, with which a version begins
HEADER_SIZE = len("asgi1:") + NONCE + 2 * len(":0000000000000") + len(":")
_GLOB = re.compile(rb"([*?\[\]\\])")

NO_IDLE = b":0000000000000"  # what the version of a record without an idle timeout ends with
_PACKED_KEYS = b"$%d\r\n%b\r\n$%d\r\n%b\r\n$%d\r\n%b:wait\r\n$%d\r\n%b:retired\r\n"
RETIRED_MS = b"%d" % round(RETIRED_FOR * 1000)


class Stored(NamedTuple):
    """A record in Redis. `version` changes with every write; `ends` is in ms of Redis' clock, 0 for never."""

    record: bytes
    version: str
    ends: int


def unpack(value: bytes) -> Stored:
    """The parts of a value. `SessionStoreError` where it is not a record of ours."""
    header = HEADER.match(value)
    if header is None:
        raise SessionStoreError("what lies under this id is not a session record; it is left alone")
    return Stored(value[header.end() :], header[1].decode(), int(header[2]))


def pack_value(version: bytes, record: bytes) -> bytes:
    """What lies at a record's key."""
    return b"asgi1:%b:%b" % (version, record)


def next_version(version: bytes) -> bytes:
    """A new version that keeps the timeouts of the old one."""
    return new_nonce() + version[NONCE:]


def milliseconds(seconds: float | None) -> bytes:
    """Whole milliseconds, at least 1; 0 for None."""
    return b"0" if seconds is None else b"%d" % max(math.ceil(min(seconds, _CENTURY) * 1000), 1)


class KeySpace:
    """The keys of one store. The braces are a hash tag: all keys of a session live on one cluster node.

    (An id that begins with a closing brace has none, and works on a single node only.)
    """

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix.encode()
        self.pattern = _GLOB.sub(rb"\\\1", self.prefix) + b"{*}"
        self.of: Callable[[str], Keys] = lru_cache(KNOWN)(self._of)

    def record(self, session_id: str) -> bytes:
        """The record's key."""
        return b"%b{%b}" % (self.prefix, session_id.encode())

    def _of(self, session_id: str) -> Keys:
        """The keys of this session; `ValueError` for what is no id. Those that were used lately are known."""
        check_id(session_id)
        record = self.record(session_id)
        lock, size = record + b":lock", len(record)
        packed = _PACKED_KEYS % (size, record, size + 5, lock, size + 5, record, size + 8, record)
        return Keys(record, lock, packed, mark_of(session_id))

    def user(self, user_id: str) -> bytes:
        """The sorted set of a user's session ids."""
        return b"%buser:%b" % (self.prefix, user_id.encode())

    def session_id(self, record_key: bytes) -> str:
        """The id in a record's key; what is no text comes out as one that no record has."""
        return record_key[len(self.prefix) + 1 : -1].decode(errors="replace")
