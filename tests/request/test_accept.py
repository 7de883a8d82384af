"""What is known of servers that do not send the headers of a WebSocket's accept.

`tests/frameworks/test_servers.py` asks the servers themselves.
"""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from asgi import empty_body

from asgi_sessions.request.accept import server_without_accept_headers


@pytest.mark.parametrize(
    ("scope", "argument", "server"),
    [
        ({}, "pytest", None),
        ({"asgi": {"version": "3.0", "spec_version": "2.1"}}, "/bin/uvicorn", None),
        ({"asgi": {"version": "3.0", "spec_version": "2.4"}}, "/bin/uvicorn", None),
        ({"asgi": {"version": "3.0", "spec_version": "2.0"}}, "/bin/a-server", "a-server"),
        ({"asgi": {"version": "3.0"}}, "/bin/daphne", "daphne"),
        ({"asgi": {"version": "3.0"}}, "/lib/daphne/__main__.py", "daphne"),
    ],
)
def test_the_version_tells(
    scope: dict[str, Any], argument: str, server: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Version 2.0, told or not, has no such headers; a test client that tells nothing is no server."""
    monkeypatch.setattr("sys.argv", [argument])
    for receive in (empty_body, asyncio.Queue[Any]().get):
        assert server_without_accept_headers(scope, receive) == server
