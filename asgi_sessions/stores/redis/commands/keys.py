"""The names of the keys."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache

from ....record.values import check_id
from ..connection.replies import mark_of

KNOWN = 1024  # sessions whose keys are not made anew for each request, about 1 MB
_GLOB = re.compile(rb"([*?\[\]\\])")

_PACKED_KEYS = b"$%d\r\n%b\r\n$%d\r\n%b\r\n$%d\r\n%b:wait\r\n$%d\r\n%b:retired\r\n"


class Keys:
    """The keys of a session's record, lock, queue and retired id, in one hash slot; packed once.

    Its record begins with the `mark`; empty for a lock without a record.
    """

    __slots__ = ("lock", "mark", "packed", "record")

    def __init__(self, record: bytes, lock: bytes, packed: bytes, mark: bytes = b"") -> None:
        self.record = record
        self.lock = lock
        self.packed = packed
        self.mark = mark

    @property
    def retired(self) -> bytes:
        """What is remembered of a replaced id."""
        return self.record + b":retired"

    @property
    def queue(self) -> bytes:
        """Of a session's lock: who waits for it, one of each process."""
        return self.record + b":wait"


class KeySpace:
    """The keys of one store. The braces are a hash tag: all keys of a session live on one cluster node.

    (An id that begins with a closing brace has none, and works on a single node only.)
    """

    def __init__(self, prefix: str) -> None:
        if not prefix.isprintable() or any(character.isspace() for character in prefix):
            raise ValueError(f"prefix={prefix!r} has white-space or control characters; try 'app:session:'")
        self.prefix = prefix.encode()
        self.all_keys = _GLOB.sub(rb"\\\1", self.prefix) + b"{*"  # of sessions, with locks and queues
        self.pattern = self.all_keys + b"}"
        self.ended = self.prefix + b"wake:ended"  # the channel that tells which sessions have ended
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
