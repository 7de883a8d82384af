"""The app that the processes of the fault tests serve: the ways in which an app may use a session.

Each change reads, pauses, and writes, which loses updates wherever nobody locks. Each answer shows whose
session it was (the canary) and when the change was under way, by the machine's one monotonic clock.
"""

from __future__ import annotations

import asyncio
import gc
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeAlias

import anyio
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from asgi_sessions import Session, SessionMiddleware, SessionStore, get_session

SECRET = "a-secret-of-the-tests-and-of-nothing-else"
PAUSE = float(os.environ.get("PAUSE", "0.005"))  # seconds between reading and writing, in which others run
MAX_AGE = 3600

AUTO: dict[str, Any] = {"lock": "auto", "read_only": ()}
"""Options by which each way of counting, asked for by GET, runs without the lock."""

COUNTING = {"nested": "clicks", "streamed": "clicks", "transacted": "clicks", "typed": "messages"}
"""Each way of counting is a path; the value is the count that it adds to."""

Change: TypeAlias = Callable[[Session, str], Awaitable[object]]
"""What a request does to a session that has begun, given its argument; the answer."""


def told(canary: object, entered: float, answer: object) -> JSONResponse:
    """What was done, to whose session, and in which time."""
    left = time.monotonic()
    return JSONResponse({"answer": answer, "canary": canary, "entered": entered, "left": left})


def gone() -> JSONResponse:
    """There is no session, or none that has begun."""
    return JSONResponse({"gone": True}, 404)


async def begin(request: Request) -> Response:
    """Start a session with a canary; its counts are 0."""
    canary = request.query_params["argument"]
    get_session(request).update(canary=canary, page={"clicks": 0}, items=[], register=None)
    return told(canary, time.monotonic(), None)


async def nested(session: Session, argument: str) -> object:
    """Count in a dict within the session's dict."""
    clicks: int = session["page"]["clicks"]
    await anyio.sleep(PAUSE)
    session["page"]["clicks"] = clicks + 1
    return clicks + 1


async def typed(session: Session, argument: str) -> object:
    """Count in a field of the record."""
    messages = session.data.message_count
    await anyio.sleep(PAUSE)
    session.data.message_count = messages + 1
    return messages + 1


async def streamed(request: Request) -> Response:
    """Count while the answer is on its way, of which the client hears the end only when it is stored."""
    session, entered = get_session(request), time.monotonic()
    if "canary" not in session:
        return gone()
    clicks = session["page"]["clicks"]
    session["streams"] = session.get("streams", 0) + 1  # else the stream would not keep the lock

    async def body() -> AsyncIterator[bytes]:
        await anyio.sleep(PAUSE)
        session["page"]["clicks"] = clicks + 1
        yield bytes(told(session["canary"], entered, clicks + 1).body)

    return StreamingResponse(body(), media_type="application/json")


async def transacted(request: Request) -> Response:
    """Count in a transaction on a route that takes no lock of its own."""
    session = get_session(request)
    if "canary" not in session:
        return gone()
    async with session.transaction() as data:
        entered = time.monotonic()
        clicks: int = data.metadata["page"]["clicks"]
        await anyio.sleep(PAUSE)
        data.metadata["page"]["clicks"] = clicks + 1
        return told(data.metadata["canary"], entered, clicks + 1)


async def add(session: Session, argument: str) -> object:
    """Put an element at the end of a list."""
    items = [*session["items"]]
    await anyio.sleep(PAUSE)
    session["items"] = [*items, argument]
    return None


async def write(session: Session, argument: str) -> object:
    """Replace a value without a look at the old one."""
    session["register"] = argument
    return None


async def read(session: Session, argument: str) -> object:
    """Tell a value, under the lock but without a change."""
    return session["register"]


async def login(session: Session, argument: str) -> object:
    """Give the session a new id."""
    session.login("ada")
    return None


async def logout(session: Session, argument: str) -> object:
    """End the session."""
    session.logout()
    return None


async def everything(session: Session, argument: str) -> object:
    """All that the session holds, read under the lock."""
    held = {name: session[name] for name in ("items", "register")}
    return {**held, "clicks": session["page"]["clicks"], "messages": session.data.message_count}


async def hold(session: Session, argument: str) -> object:
    """Count, `argument` seconds after the session was loaded."""
    clicks: int = session["page"]["clicks"]
    await anyio.sleep(float(argument))
    session["page"]["clicks"] = clicks + 1
    return clicks + 1


async def upload(request: Request) -> Response:
    """Take a body in as it comes, and keep its length."""
    session, entered = get_session(request), time.monotonic()
    if "canary" not in session:
        return gone()
    session["register"] = 0
    async for chunk in request.stream():
        session["register"] += len(chunk)
    return told(session["canary"], entered, session["register"])


async def endless(request: Request) -> Response:
    """Stream to a client until it is gone, with the session's lock held."""
    session = get_session(request)
    if "canary" not in session:
        return gone()
    session["register"] = "streaming"

    async def body() -> AsyncIterator[bytes]:
        while True:
            yield b"tick"
            await anyio.sleep(PAUSE)

    return StreamingResponse(body(), media_type="application/json")


async def vitals(request: Request) -> Response:
    """How many descriptors and tasks the process has just now."""
    gc.collect()
    return JSONResponse({"descriptors": len(os.listdir("/dev/fd")), "tasks": len(asyncio.all_tasks())})


Endpoint: TypeAlias = Callable[[Request], Awaitable[Response]]
CHANGES: list[Change] = [nested, typed, add, write, read, login, logout, everything, hold]
ENDPOINTS: list[Endpoint] = [begin, streamed, transacted, upload, endless, vitals]


def endpoint(change: Change) -> Endpoint:
    """Let the request's session, if it has begun, have this change."""

    async def serve(request: Request) -> Response:
        session, entered = get_session(request), time.monotonic()
        if "canary" not in session:
            return gone()
        canary = session["canary"]
        return told(canary, entered, await change(session, request.query_params.get("argument", "")))

    return serve


def build(store: SessionStore | str, **options: Any) -> Starlette:
    """The app over this store, with these options of the middleware."""
    settings = {"max_age": MAX_AGE, "read_only": ["/transacted"], "exclude": ["/vitals"], **options}
    sessions = Middleware(SessionMiddleware, SECRET, store=store, **settings)
    endpoints = {each.__name__: each for each in ENDPOINTS}
    endpoints |= {change.__name__: endpoint(change) for change in CHANGES}
    routes = [Route(f"/{name}", each, methods=["GET", "POST"]) for name, each in endpoints.items()]
    return Starlette(routes=routes, middleware=[sessions])


def from_environment() -> Starlette:
    """The app as a process serves it: `uvicorn --factory faults.app:from_environment`."""
    lease, wait = float(os.environ["LOCK_TIMEOUT"]), float(os.environ["LOCK_WAIT"])
    options = AUTO if os.environ.get("LOCK") == "auto" else {}
    return build(os.environ["STORE_URL"], lock_timeout=lease, lock_wait=wait, **options)
