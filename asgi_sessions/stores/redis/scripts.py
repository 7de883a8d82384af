"""The Lua scripts, and how a call of one is written to the wire.

Their headers say keys, arguments and replies. Each recognises its own retry, so that a call whose connection
was lost may be sent again.
"""

from __future__ import annotations

import hashlib
import re
from importlib.resources import files

_LUA = files("asgi_sessions.stores.redis")
_INCLUDE = re.compile(rb"^ *-- include (\w+)$", re.MULTILINE)


def pack(*args: bytes) -> bytes:
    """One command in RESP, the protocol of Redis."""
    return (b"*%d\r\n" % len(args)) + b"".join([b"$%d\r\n%b\r\n" % (len(arg), arg) for arg in args])


class Script:
    """A script with a fixed number of keys and arguments; everything but their values is packed once.

    It takes shared chunks in where it says ``-- include``: functions cost time to define, and most calls are
    through before they need them.
    """

    __slots__ = ("_by_body", "_by_sha", "name")

    def __init__(self, name: str, keys: int, args: int) -> None:
        body = _INCLUDE.sub(lambda line: _source(line[1].decode()), _source(name))
        sha = hashlib.sha1(body, usedforsecurity=False).hexdigest().encode()
        self.name = name
        self._by_sha = _template(b"EVALSHA", sha, keys, args)
        self._by_body = _template(b"EVAL", body, keys, args)

    def pack(self, args: tuple[bytes, ...]) -> bytes:
        """The call for a server that knows the script, keys first."""
        return self._by_sha % _with_lengths(args)

    def pack_with_body(self, args: tuple[bytes, ...]) -> bytes:
        """The call that teaches the script to a server."""
        return self._by_body % _with_lengths(args)


def _source(chunk: str) -> bytes:
    return _LUA.joinpath(f"{chunk}.lua").read_bytes()


def _template(command: bytes, script: bytes, keys: int, args: int) -> bytes:
    parts = (command, script, b"%d" % keys)
    head = b"".join([b"$%d\r\n%b\r\n" % (len(part), part) for part in parts])
    return (b"*%d\r\n" % (3 + keys + args)) + head.replace(b"%", b"%%") + b"$%d\r\n%b\r\n" * (keys + args)


def _with_lengths(args: tuple[bytes, ...]) -> tuple[int | bytes, ...]:
    return tuple([item for arg in args for item in (len(arg), arg)])


ACQUIRE = Script("acquire", 4, 7)
COMMIT = Script("commit", 4, 6)
CREATE = Script("create", 2, 6)
REMOVE = Script("remove", 4, 5)
RELEASE = Script("release", 4, 4)
RENEW = Script("renew", 1, 2)
SET = Script("set", 1, 4)
LINK = Script("link", 1, 2)
UNLINK = Script("unlink", 1, 2)
