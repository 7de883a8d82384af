"""The header that stands before each record in Redis, which Lua reads by position; see `record.lua`."""

from __future__ import annotations

import math
import re
from typing import NamedTuple

from ....errors import SessionStoreError
from ...checkout import LEADS_FOR, RETIRED_FOR
from ...tokens import new_nonce

FOREIGN = "what lies under this id is not a session record; it is left alone"

_CENTURY = 3_155_760_000  # seconds; more is not told from less, and fits into the header
_HEADER = re.compile(rb"asgi(?:2:([0-9a-f]{16}(?::[0-9]{13}){3})\n|1:([0-9a-f]{16}(?::[0-9]{13}){2}):)")
HEADER_SIZE = len(b"asgi2:0123456789abcdef:0000000000000:0000000000000:0000000000000\n")
NONCE = 16  # digits, with which a version begins
_ENDS, _IDLE, _BEGAN = slice(17, 30), slice(31, 44), slice(45, 58)  # in a version
_FORMATS = {58: b"2", 44: b"1"}  # by the length of a version
_UNKNOWN_BEGIN = b":0000000000000"


class Stored(NamedTuple):
    """A record in Redis. `version` is what its header says, and changes with every write.

    Times are in ms, 0 for none, `ends` and `began` by Redis' clock. A record of an earlier release does not
    say when it began.
    """

    record: bytes
    version: bytes
    ends: int
    idle: int
    began: int

    def __repr__(self) -> str:
        return f"Stored({len(self.record)} bytes, ends={self.ends})"


def parse(value: bytes) -> Stored | None:
    """The parts of a value; None where it is not a record of ours."""
    header = _HEADER.match(value)
    if header is None:
        return None
    version = header[1] or header[2]
    ends, idle, began = int(version[_ENDS]), int(version[_IDLE]), int(version[_BEGAN] or 0)
    return Stored(value[header.end() :], version, ends, idle, began)


def unpack(value: bytes) -> Stored:
    """The parts of a value. `SessionStoreError` where it is not a record of ours."""
    stored = parse(value)
    if stored is None:
        raise SessionStoreError(FOREIGN)
    return stored


def pack_value(version: bytes, record: bytes) -> bytes:
    """What lies at a record's key."""
    return b"asgi2:%b\n%b" % (version, record)


def header_of(version: bytes) -> bytes:
    """What stands before a record of this version, in the format that it has."""
    return b"asgi2:%b\n" % version if len(version) == 58 else b"asgi1:%b:" % version


def head_of(version: bytes) -> bytes:
    """The 50 bytes by which a commit recognises what was loaded: format and version, but for the begin."""
    return b"asgi%b:%b" % (_FORMATS[len(version)], version[:44])


def next_version(version: bytes) -> bytes:
    """A new version that keeps the timeouts of the old one, and the begin as far as it is known."""
    return new_nonce() + version[NONCE:] + (_UNKNOWN_BEGIN if len(version) == 44 else b"")


def milliseconds(seconds: float | None) -> bytes:
    """Whole milliseconds, at least 1; 0 for None."""
    return b"0" if seconds is None else b"%d" % max(math.ceil(min(seconds, _CENTURY) * 1000), 1)


RETIRED_MS = milliseconds(RETIRED_FOR)
LEADS_NO_MORE_MS = milliseconds(RETIRED_FOR - LEADS_FOR)
