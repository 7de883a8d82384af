"""Who holds a lock, as it is written behind the lock's token: '.since,process,host,route'.

`since` is in ms of Redis' clock, 13 digits. Nothing in it is a space, a colon or outside of ASCII: places in
a queue are split at spaces, messages at colons.
"""

from __future__ import annotations

import re
from functools import lru_cache
from urllib.parse import quote_plus, unquote_plus

from ...holders import Holder, forget_when_forked, host_name, process_number
from ...running import running

_MOST = 100  # characters of a route or a host name
_KNOWN = 1024  # routes that are not written anew for each request, about 300 kB
_WRITTEN = re.compile(rb"[^.]+\.([0-9]{13}),([0-9]+),([^,]*),([^,]*)")


def taken_here(token: bytes, since: bytes) -> bytes:
    """The value of a lock that the request which runs here takes, if one does."""
    requests = running.get()
    if not requests:
        return token + since + _who("", "")
    scope = requests[-1].scope
    try:
        method, path = scope["method"], scope["path"]
    except KeyError:  # a WebSocket, or the request is over
        method, path = "WEBSOCKET", scope.get("path", "")
    if len(method) + len(path) > _MOST:
        method, path = method[:_MOST], _shortened(path)
    return b"".join((token, since, _who(method, path)))


def who_is_here() -> bytes:
    """The part of it that says who that is."""
    return taken_here(b"", b"")


def read(value: bytes, now: float) -> Holder | None:
    """Who holds a lock that has this value; None where it does not say so. `now` is in ms by Redis."""
    written = _WRITTEN.fullmatch(value)
    if written is None:
        return None
    since, process, host, route = written.groups()
    seconds = max(now - int(since), 0.0) / 1000
    return Holder(unquote_plus(route.decode()), unquote_plus(host.decode()), int(process), seconds)


@lru_cache(_KNOWN)
def _who(method: str, path: str) -> bytes:
    host, route = host_name()[:_MOST], f"{method} {path}" if path else ""
    return f",{process_number()},{quote_plus(host)},{quote_plus(route, '/', errors='replace')}".encode()


def _shortened(path: str) -> str:
    """Its beginning, up to a slash: half of an id must not stand there, since logs would not know it."""
    return path[:_MOST].rpartition("/")[0] + "/..."


forget_when_forked(_who.cache_clear)
