"""The app that the processes of the concurrency test serve: the ways in which an app may count in a session.

Each way reads the count, pauses, and writes the count plus one, which loses updates wherever nobody locks.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator

import anyio
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from asgi_sessions import SessionMiddleware, SessionStore, get_session

SECRET = "a-secret-of-the-tests-and-of-nothing-else"
PAUSE = 0.01  # seconds between reading and writing, in which others run

WAYS = {"nested": "clicks", "streamed": "clicks", "transacted": "clicks", "typed": "messages"}
"""Each way of counting is a path; the value is the count that it adds to."""


async def begin(request: Request) -> Response:
    """Start a session, both of whose counts are 0."""
    get_session(request)["page"] = {"clicks": 0}
    return PlainTextResponse("begun")


async def nested(request: Request) -> Response:
    """Count in a dict within the session's dict."""
    session = get_session(request)
    clicks = session["page"]["clicks"]
    await anyio.sleep(PAUSE)
    session["page"]["clicks"] = clicks + 1
    return PlainTextResponse(str(clicks + 1))


async def typed(request: Request) -> Response:
    """Count in a field of the record."""
    session = get_session(request)
    messages = session.data.message_count
    await anyio.sleep(PAUSE)
    session.data.message_count = messages + 1
    return PlainTextResponse(str(messages + 1))


async def streamed(request: Request) -> Response:
    """Count while the answer is on its way, of which the client hears the end only when it is stored."""
    session = get_session(request)
    clicks = session["page"]["clicks"]

    async def body() -> AsyncIterator[str]:
        await anyio.sleep(PAUSE)
        session["page"]["clicks"] = clicks + 1
        yield str(clicks + 1)

    return StreamingResponse(body(), media_type="text/plain")


async def transacted(request: Request) -> Response:
    """Count in a transaction on a route that takes no lock of its own."""
    async with get_session(request).transaction() as data:
        clicks: int = data.metadata["page"]["clicks"]
        await anyio.sleep(PAUSE)
        data.metadata["page"]["clicks"] = clicks + 1
    return PlainTextResponse(str(clicks + 1))


async def counts(request: Request) -> Response:
    """Both counts, read under the lock."""
    session = get_session(request)
    return JSONResponse({"clicks": session["page"]["clicks"], "messages": session.data.message_count})


def build(store: SessionStore | str, lock_timeout: float = 10.0) -> Starlette:
    """The app over this store, with a lease of `lock_timeout` seconds."""
    endpoints = (begin, nested, typed, streamed, transacted, counts)
    sessions = Middleware(
        SessionMiddleware,
        SECRET,
        store=store,
        lock_timeout=lock_timeout,
        read_only=["/transacted"],
    )
    routes = [Route(f"/{endpoint.__name__}", endpoint) for endpoint in endpoints]
    return Starlette(routes=routes, middleware=[sessions])


def from_environment() -> Starlette:
    """The app as a process serves it: `uvicorn --factory concurrency_app:from_environment`."""
    return build(os.environ["REDIS_URL"], float(os.environ["LOCK_TIMEOUT"]))
