"""The Lua scripts, and how a call of one is written to the wire.

Their headers say keys, arguments and replies. Each recognises its own retry, so that a call whose connection
was lost may be sent again.
"""

from __future__ import annotations

import hashlib
import re
from importlib.resources import files

from ..connection.replies import (
    Fits,
    anything,
    is_created,
    is_list,
    is_number,
    is_removed,
    is_stored,
    is_taken,
    is_text,
)

_LUA = files("asgi_sessions.stores.redis") / "lua"
_INCLUDE = re.compile(rb"^ *-- include (\w+)$", re.MULTILINE)


def pack(*args: bytes) -> bytes:
    """One command in RESP, the protocol of Redis."""
    return (b"*%d\r\n" % len(args)) + pack_args(*args)


def pack_args(*args: bytes) -> bytes:
    """Some of a command's arguments; packed parts can be joined."""
    return b"".join([b"$%d\r\n%b\r\n" % (len(arg), arg) for arg in args])


class Script:
    """A script with a fixed number of keys and arguments; a call is a head and they, packed.

    It takes shared chunks in where it says ``-- include``: functions cost time to define, and most calls are
    through before they need them. `doubtful` are the replies that, when a call was sent again, may mean that
    the first one had been carried out. With `once` a call that may have been carried out is not sent again.
    No request waits for the reply to one that is not `urgent`; one that is not `prompt` leaves with what is
    called next. `fits` tells its replies from others.
    """

    __slots__ = ("body", "by_body", "by_sha", "doubtful", "fits", "name", "once", "prompt", "urgent")

    def __init__(
        self,
        name: str,
        keys: int,
        args: int,
        *,
        doubtful: tuple[bytes, ...] = (),
        once: bool = False,
        urgent: bool = True,
        prompt: bool = True,
        fits: Fits = anything,
    ) -> None:
        body = _INCLUDE.sub(lambda line: _source(line[1].decode()), _source(name))
        sha = hashlib.sha1(body, usedforsecurity=False).hexdigest().encode()
        size = b"*%d\r\n" % (3 + keys + args)
        number = b"%d" % keys
        self.name = name
        self.body = body
        self.doubtful = doubtful
        self.once = once
        self.urgent = urgent
        self.prompt = prompt
        self.fits = fits
        self.by_sha = size + pack_args(b"EVALSHA", sha, number)  # for a server that knows the script
        self.by_body = size + pack_args(b"EVAL", body, number)  # teaches it


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


def _source(chunk: str) -> bytes:
    return _LUA.joinpath(f"{chunk}.lua").read_bytes()


# With `Keys`:
ACQUIRE = Script("acquire", 4, 7, fits=is_taken)
TAKE = Script("acquire", 4, 2, fits=is_taken)  # a single try
TAKE_AND_TELL = Script("acquire", 4, 3, fits=is_taken)  # the time too
_OVERWRITTEN = (b"LOST", b"CONFLICT")  # or stored, and written over since
COMMIT = Script("commit", 4, 5, doubtful=_OVERWRITTEN, fits=is_stored)
COMMIT_AGAIN = Script("commit", 4, 6, doubtful=_OVERWRITTEN, fits=is_stored)  # after one of unknown outcome
REBOUND = Script("rebound", 4, 3, fits=is_taken)
REMOVE = Script("remove", 4, 6, fits=is_removed)
RELEASE = Script("release", 4, 4, urgent=False, fits=is_number)
# With keys of their own:
CREATE = Script("create", 2, 7, fits=is_created)
RENEW = Script("renew", 1, 2, urgent=False, fits=is_number)
SET = Script(  # once: again, it would take back what others have written since
    "set", 1, 5, once=True, fits=is_number
)
TOUCH = Script("touch", 1, 1, urgent=False, prompt=False, fits=is_number)
# With a user's index:
LINK = Script("link", 1, 4, fits=is_list)
SUCCEED = Script("succeed", 1, 3, fits=is_text)
MARK = Script("mark", 1, 1, fits=is_list)
SETTLE = Script("settle", 1, 2, urgent=False, fits=is_number)
