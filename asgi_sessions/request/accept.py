"""Servers that do not send the headers of a WebSocket's accept: the session's cookie is lost there."""

from __future__ import annotations

import sys
from pathlib import Path

from ..asgi import Receive, Scope

_CLAIM_MORE = {"granian"}  # packages whose servers tell a version that has these headers, and drop them


def server_without_accept_headers(scope: Scope, receive: Receive) -> str | None:
    """The server's name, where it is known to drop them; else None.

    The headers came with ASGI 2.1, and a server that tells no version has 2.0 (ASGI specification). A server
    that tells more than it does is known by whose `receive` it is. A scope that says nothing about ASGI is a
    test client's.
    """
    package = type(getattr(receive, "__self__", None)).__module__.partition(".")[0]
    if package in _CLAIM_MORE:
        return package
    asgi = scope.get("asgi")
    if asgi is None or asgi.get("spec_version", "2.0") != "2.0":
        return None
    return _program()


def _program() -> str:
    """What this process was started as, such as "daphne"."""
    path = Path(sys.argv[0])
    return path.parent.name if path.name == "__main__.py" else path.name
