"""A Lua script, and how a call of it is written."""

from __future__ import annotations

import hashlib
import re
from importlib.resources import files

from .replies import Fits, anything
from .resp import pack_args

_LUA = files("asgi_sessions.stores.redis") / "lua"
_INCLUDE = re.compile(rb"^ *-- include (\w+)$", re.MULTILINE)


class Script:
    """A script with a fixed number of keys and arguments. A call is a packed head, then both of them, packed.

    Where the source says ``-- include``, a shared chunk is put in. Chunks come late in a script, because each
    function costs time to define and most calls return before they need one.

    doubtful: replies that, when a call was sent twice, may mean that the first one had been carried out.
    once: a call that may have been carried out is not sent again.
    prompt: the call leaves at once; else it leaves with the next call.
    fits: whether a reply can be one of this script.
    """

    __slots__ = ("body", "by_body", "by_sha", "doubtful", "fits", "name", "once", "prompt")

    def __init__(
        self,
        name: str,
        keys: int,
        args: int,
        *,
        doubtful: tuple[bytes, ...] = (),
        once: bool = False,
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
        self.prompt = prompt
        self.fits = fits
        self.by_sha = size + pack_args(b"EVALSHA", sha, number)  # for a server that knows the script
        self.by_body = size + pack_args(b"EVAL", body, number)  # teaches it


def _source(chunk: str) -> bytes:
    return (_LUA / f"{chunk}.lua").read_bytes()
