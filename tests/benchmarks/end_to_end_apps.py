"""The apps that `end_to_end` serves: one small app, bare and behind each of the session middlewares.

    SUBJECT="ours, Redis" REDIS_URL=redis://… uvicorn --factory end_to_end_apps:from_environment

Litestar's middleware works within Litestar only. Here it gets from Litestar what it asks for and nothing
else, so that it is not charged with a framework around it.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measure  # noqa: F401  # puts this tree on the path
from redis.asyncio import Redis
from starlette.middleware.sessions import SessionMiddleware as StarletteSessions

from asgi_sessions import (
    InMemorySessionStore,
    RedisSessionStore,
    SessionMiddleware,
    SessionStore,
    SQLiteSessionStore,
)
from asgi_sessions.asgi import ASGIApp, Receive, Scope, Send
from asgi_sessions.stores.checkout import Checkout, Lifetime, LockPolicy, Missing

SECRET = "a secret of the benchmarks and of nothing else"
LIFE = 3600  # seconds
CONTENT = {
    "user": "ada",
    "n": 0,
    "cart": [{"sku": f"A{n}", "quantity": n, "title": "thing"} for n in range(6)],
}


# -- what is served ------------------------------------------------------------------------------------------


async def pages(scope: Scope, receive: Receive, send: Send) -> None:
    """/begin fills the session, /read looks at a number in it, /write adds to it, /count tells it.

    Every answer says whose it is, as the request does, so that a client which has many requests under way
    can keep count for each session.
    """
    session, path, body = scope.get("session"), scope["path"], b"ok"
    if session is None:
        pass
    elif path == "/begin":
        session.update(CONTENT)
    elif path == "/write":
        session["n"] += 1
    elif session["n"] is None:
        raise RuntimeError("the session is lost")
    elif path == "/count":
        body = b"%d" % session["n"]
    await answer(send, body, *[line for line in scope["headers"] if line[0] == b"x-whose"])


async def answer(send: Send, body: bytes, *more: tuple[bytes, bytes]) -> None:
    headers = [(b"content-type", b"text/plain"), (b"content-length", b"%d" % len(body)), *more]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


class Watched(SessionStore):
    """Counts in `met` how often a request found its session still held in this process.

    Whoever asks one thing after the other on one connection must never meet his own lock.
    """

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.met = 0
        self._latest: dict[str, Checkout] = {}

    async def checkout(
        self,
        session_id: str,
        lock: LockPolicy | None,
        lifetime: Lifetime | None,
        *,
        passive: bool = False,
    ) -> Checkout | Missing:
        latest = self._latest.get(session_id)
        if latest is not None and latest.token is not None:
            self.met += 1
        taken = await super().checkout(session_id, lock, lifetime, passive=passive)
        if isinstance(taken, Checkout):
            self._latest[session_id] = taken
        return taken


class WatchedMemory(Watched, InMemorySessionStore):
    """The store in memory, watched."""


class WatchedRedis(Watched, RedisSessionStore):
    """The store on Redis, watched."""


# -- the subjects --------------------------------------------------------------------------------------------


def bare(redis_url: str) -> ASGIApp:
    return pages


def starlette(redis_url: str, app: ASGIApp = pages) -> ASGIApp:
    return StarletteSessions(app, SECRET)


def ours(store: SessionStore) -> ASGIApp:
    return SessionMiddleware(pages, SECRET, store=store)


def watched(store: Watched) -> ASGIApp:
    """Ours, which tells under /met what its store counted."""
    app = ours(store)

    async def with_count(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] == "/met":
            await answer(send, b"%d" % store.met)
        else:
            await app(scope, receive, send)

    return with_count


def starsessions(store: Any, app: ASGIApp) -> ASGIApp:
    from starsessions import SessionAutoloadMiddleware
    from starsessions import SessionMiddleware as Starsessions

    return Starsessions(SessionAutoloadMiddleware(app), store=store, lifetime=LIFE, cookie_https_only=False)


def starsessions_memory(redis_url: str, app: ASGIApp = pages) -> ASGIApp:
    from starsessions import InMemoryStore

    return starsessions(InMemoryStore(), app)


def starsessions_redis(redis_url: str, app: ASGIApp = pages) -> ASGIApp:
    from starsessions.stores.redis import RedisStore

    return starsessions(RedisStore(connection=Redis.from_url(redis_url)), app)


def sqlite(redis_url: str) -> ASGIApp:
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return ours(SQLiteSessionStore(Path(folder) / "sessions.db"))


def litestar(store: Any) -> ASGIApp:
    from litestar import Litestar
    from litestar.handlers import asgi
    from litestar.middleware.session.server_side import ServerSideSessionConfig

    handler = asgi("/")(pages)
    home: Any = Litestar([handler], stores={"sessions": store})
    app: Any = pages  # Litestar has types of its own for what ASGI is made of
    sessions: Any = ServerSideSessionConfig(max_age=LIFE).middleware(app=app)

    async def within_litestar(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await home(scope, receive, send)
        else:
            scope["app"] = scope["litestar_app"] = home
            scope["route_handler"] = handler
            await sessions(scope, receive, send)

    return within_litestar


def litestar_memory(redis_url: str) -> ASGIApp:
    from litestar.stores.memory import MemoryStore

    return litestar(MemoryStore())


def litestar_redis(redis_url: str) -> ASGIApp:
    from litestar.stores.redis import RedisStore

    return litestar(RedisStore(Redis.from_url(redis_url)))


SUBJECTS: dict[str, Callable[[str], ASGIApp]] = {
    "bare app": bare,
    "ours, memory": lambda url: ours(InMemorySessionStore()),
    "starsessions, memory": starsessions_memory,
    "Litestar, memory": litestar_memory,
    "Starlette, cookie": starlette,
    "ours, SQLite": sqlite,
    "ours, Redis": lambda url: ours(RedisSessionStore(url)),
    "starsessions, Redis": starsessions_redis,
    "Litestar, Redis": litestar_redis,
    "watched, memory": lambda url: watched(WatchedMemory()),
    "watched, Redis": lambda url: watched(WatchedRedis(url)),
}


def from_environment() -> ASGIApp:
    """The app of the subject that the environment names."""
    return SUBJECTS[os.environ["SUBJECT"]](os.environ["REDIS_URL"])
