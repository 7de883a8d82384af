"""Many requests at once to one session, and what each session middleware makes of them."""

from __future__ import annotations

import asyncio
import secrets
import time
from typing import NamedTuple

from starlette.endpoints import HTTPEndpoint
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from asgi_sessions import SessionData, SessionStore

READERS, WRITERS = 40, 10
RACERS = READERS + WRITERS
WORK = 0.01  # seconds that each of them works with what it has read


class Counter(HTTPEndpoint):
    """A count in the session: PUT begins it, GET reads it, POST adds one; DELETE ends it."""

    async def put(self, request: Request) -> Response:
        request.session["count"] = 0
        return Response(status_code=204)

    async def post(self, request: Request) -> Response:
        count = request.session.get("count", 0)
        await asyncio.sleep(WORK)
        request.session["count"] = count + 1
        return Response(status_code=204)

    async def get(self, request: Request) -> Response:
        count = request.session.get("count", 0)
        await asyncio.sleep(WORK)
        return PlainTextResponse(str(count))

    async def delete(self, request: Request) -> Response:
        request.session.clear()
        return Response(status_code=204)


class LastWriterWins:
    """A session middleware without a lock: load, run the app, store. It is here to lose the race."""

    def __init__(self, app: ASGIApp, store: SessionStore) -> None:
        self.app = app
        self.store = store
        self.session_id = secrets.token_hex(16)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        data = await self.store.get(self.session_id) or SessionData(session_id=self.session_id)
        scope["session"] = data.metadata

        async def store_then_send(message: Message) -> None:
            if message["type"] == "http.response.start" and data.metadata:
                await self.store.set(self.session_id, data)
            elif message["type"] == "http.response.start":
                await self.store.delete(self.session_id)
            await send(message)

        await self.app(scope, receive, store_then_send)


async def race(app: ASGIApp) -> dict[str, int]:
    """The result of simultaneous reads and increments; `lost` ones were acknowledged and are not there."""
    cookie = (await call(app, "PUT")).cookie
    started = time.perf_counter()
    calls = [call(app, method, cookie) for method in ("GET", "GET", "POST", "GET", "GET") * WRITERS]
    answers = await asyncio.gather(*calls)
    elapsed = time.perf_counter() - started
    stored = int((await call(app, "GET", cookie)).body)
    await call(app, "DELETE", cookie)
    acknowledged = sum(answer.status == 204 for answer in answers)
    return {
        "acknowledged": acknowledged,
        "refused": sum(answer.status >= 300 for answer in answers),
        "stored": stored,
        "lost": acknowledged - stored,
        "ms": round(elapsed * 1000),
    }


class Answer(NamedTuple):
    """The answer to an in-process request."""

    status: int
    cookie: bytes
    body: bytes


async def call(app: ASGIApp, method: str, cookie: bytes = b"") -> Answer:
    """One request of the counter without a network: a browser would send only six at a time."""
    headers = [(b"host", b"race"), (b"user-agent", b"race"), *([(b"cookie", cookie)] if cookie else [])]
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method,
        "scheme": "http", "path": "/race/count", "raw_path": b"/race/count", "query_string": b"",
        "root_path": "", "headers": headers, "client": ("127.0.0.1", 0), "server": ("127.0.0.1", 80),
    }  # fmt: skip
    messages: list[Message] = []

    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Message) -> None:
        messages.append(message)

    await app(scope, receive, send)
    set_cookie = dict(messages[0]["headers"]).get(b"set-cookie", b"")
    body = b"".join(message.get("body", b"") for message in messages[1:])
    return Answer(messages[0]["status"], set_cookie.partition(b";")[0], body)
