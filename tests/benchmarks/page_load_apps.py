"""The apps that `page_load` and `one_session` serve: one small site, behind each of the session middlewares.

SUBJECT="ours, auto, Redis" REDIS_URL=redis://… uvicorn --factory page_load_apps:from_environment
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

from end_to_end_apps import CONTENT, SECRET, answer, starlette, starsessions_memory, starsessions_redis

from asgi_sessions import InMemorySessionStore, RedisSessionStore, SessionMiddleware, SessionStore
from asgi_sessions.asgi import ASGIApp, Receive, Scope, Send

Lock: TypeAlias = bool | Literal["auto"]

API = 0.05  # seconds that a call of the API takes
SHORT = 0.005  # seconds of a short one
DOCUMENT, ASSET = b"d" * 20_000, b"a" * 8_000
FIRST_EVENT = b"data: hello\n\n"
RECIPE: dict[str, Any] = {
    "exclude": ("/asset/*",),
    "read_only": ("/document", "/events", "/api/read", "/short/read"),
}
"""What README recommends with `lock=True`: routes without the session, and routes that only look at it."""


# -- the site ------------------------------------------------------------------------------------------------


async def site(scope: Scope, receive: Receive, send: Send) -> None:
    """A page with its assets, an API that takes its time, and a stream of events.

    Reads look at the session and writes add one to its number, at the end of their work. The assets leave it
    alone. The stream looks at it and ends when the client goes. /begin fills the session, /count tells the
    number, /add adds to it without any work, by GET.
    """
    path = scope["path"]
    if path == "/events":
        await stream(scope["session"]["user"], receive, send)
    else:
        await answer(send, ASSET if path.startswith("/asset/") else await body_of(path, scope["session"]))


async def body_of(path: str, session: dict[str, Any]) -> bytes:
    """What a path that looks at the session, or changes it, is answered."""
    if path == "/begin":
        session.update(CONTENT)
    elif path == "/document":
        return DOCUMENT if session["user"] else b""
    elif path == "/add":
        session["n"] += 1
    elif path != "/count":
        number = session["n"]
        await asyncio.sleep(API if path.startswith("/api/") else SHORT)
        if path.endswith("/write"):
            session["n"] = number + 1
    return b"%d" % session["n"]


async def stream(user: str, receive: Receive, send: Send) -> None:
    headers = [(b"content-type", b"text/event-stream"), (b"x-user", user.encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": FIRST_EVENT, "more_body": True})
    while (await receive())["type"] != "http.disconnect":
        pass


# -- the subjects --------------------------------------------------------------------------------------------


def ours(make: Callable[[str], SessionStore], lock: Lock, **more: Any) -> Callable[[str], ASGIApp]:
    return lambda url: SessionMiddleware(site, SECRET, store=make(url), lock=lock, **more)


def modes(place: str, make: Callable[[str], SessionStore]) -> dict[str, Callable[[str], ASGIApp]]:
    return {
        f"ours, auto, {place}": ours(make, "auto"),
        f"ours, True with recipe, {place}": ours(make, True, **RECIPE),
        f"ours, True, {place}": ours(make, True),
        f"ours, False, {place}": ours(make, False),
    }


SUBJECTS: dict[str, Callable[[str], ASGIApp]] = {
    **modes("memory", lambda url: InMemorySessionStore()),
    "starsessions, memory": lambda url: starsessions_memory(url, site),
    "Starlette, cookie": lambda url: starlette(url, site),
    **modes("Redis", RedisSessionStore),
    "starsessions, Redis": lambda url: starsessions_redis(url, site),
}


def from_environment() -> ASGIApp:
    """The app of the subject that the environment names. Refusals are for the clients to count."""
    logging.getLogger("asgi_sessions").setLevel(logging.ERROR)
    return SUBJECTS[os.environ["SUBJECT"]](os.environ["REDIS_URL"])
