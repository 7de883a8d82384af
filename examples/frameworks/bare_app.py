"""Sessions in an ASGI app without any framework: `uvicorn --app-dir examples/frameworks bare_app:app`.

curl -c jar -b jar -d ada localhost:8000/sign-in && curl -c jar -b jar localhost:8000/account
"""

from __future__ import annotations

import json
import os
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from asgi_sessions import SessionMiddleware, get_session

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


async def shop(scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
    """The app: answers each path with a status and a JSON value."""
    if scope["type"] != "http":
        raise NotImplementedError(f"this app does not serve {scope['type']}")
    session = get_session(scope)
    status, answer = 200, None
    match scope["method"], scope["path"]:
        case "POST", "/sign-in":
            session.login(await read_body(receive))  # check a password first; the id changes here
            answer = {"user": session.data.user_id}
        case "POST", "/count":
            session["visits"] = session.get("visits", 0) + 1
            answer = {"visits": session["visits"]}
        case "GET", "/account":
            if session.data.user_id is None:  # the guard
                status, answer = 401, {"detail": "sign in first"}
            else:
                answer = {"user": session.data.user_id, "visits": session.get("visits", 0)}
        case "POST", "/sign-out":
            session.logout()
            answer = {"user": None}
        case _:
            status = 404
    headers = [(b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps(answer).encode()})


async def read_body(receive: Receive) -> str:
    """The whole body, as a text."""
    body = bytearray()
    while True:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body"):
            return body.decode()


app = SessionMiddleware(shop, secret_key=os.environ["SECRET_KEY"])
