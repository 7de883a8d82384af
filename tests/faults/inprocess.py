"""Requests in this process, through the middleware, to a real Redis; each brings its app along."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import anyio
from asgi import CLIENT, KEY, Answer, empty_body, http_scope
from redis.asyncio import Redis

from asgi_sessions import SessionData, SessionMiddleware
from asgi_sessions.asgi import ASGIApp, Message, Receive, Scope, Send
from asgi_sessions.stores.redis.store import RedisSessionStore

PATIENCE = 10.0  # seconds for what must come

Deliver = Callable[[Message], Awaitable[None]]


class Process:
    """A middleware with a store of its own, as one of several processes has it."""

    def __init__(self, url: str, **options: Any) -> None:
        self.store = RedisSessionStore(url)
        self.events: list[str] = []
        self._middleware = SessionMiddleware(
            self._app, KEY, store=self.store, on_event=lambda event: self.events.append(event.name), **options
        )

    async def serve(
        self,
        app: ASGIApp,
        cookie: str | None,
        *,
        receive: Receive = empty_body,
        deliver: Deliver | None = None,
        **scope: Any,
    ) -> Answer:
        """One request with this cookie; its messages go to `deliver` too, which may fail or wait."""
        answer = Answer()

        async def send(message: Message) -> None:
            if deliver is not None:
                await deliver(message)
            answer.messages.append(message)

        headers = [] if cookie is None else [(b"cookie", f"session={cookie}".encode())]
        full = http_scope(headers=headers, **{"client": CLIENT, **scope})
        full["tests.app"] = app
        await self._middleware(full, receive, send)
        return answer

    async def _app(self, scope: Scope, receive: Receive, send: Send) -> None:
        await scope["tests.app"](scope, receive, send)


class Browser:
    """One client of a process, with its cookie; what Redis holds for it."""

    def __init__(self, process: Process, raw: Redis, cookie: str | None = None) -> None:
        self.process = process
        self.raw = raw
        self.cookie = cookie

    async def open(self, app: ASGIApp, **more: Any) -> Answer:
        """One request; a cookie that it is answered with is kept."""
        answer = await self.process.serve(app, self.cookie, **more)
        for line in answer.cookies:
            if (value := re.match(r"session=([^;]*)", line)) is not None:
                self.cookie = None if value[1] == "null" else value[1]
        return answer

    def at(self, process: Process) -> Browser:
        """The same client at another process."""
        return Browser(process, self.raw, self.cookie)

    @property
    def session_id(self) -> str:
        assert self.cookie is not None
        return self.cookie.partition(".")[0]

    @property
    def key(self) -> str:
        """The record's key."""
        return f"session:{{{self.session_id}}}"

    async def stored(self) -> SessionData | None:
        """What lies under this client's id."""
        return await self.process.store.get(self.session_id)

    async def leftovers(self) -> list[str]:
        """Locks and queues that are there."""
        keys = await self.raw.keys("*}:lock") + await self.raw.keys("*}:wait")
        return sorted(str(key) for key in keys)

    async def assert_free(self) -> None:
        """Soon no lock and no queue is left."""
        with anyio.fail_after(PATIENCE):
            while await self.leftovers():  # noqa: ASYNC110  # Redis sets no event
                await anyio.sleep(0.005)


@asynccontextmanager
async def process_at(url: str, **options: Any) -> AsyncIterator[Process]:
    """A process that closes its connections in the end."""
    process = Process(url, **options)
    try:
        yield process
    finally:
        await process.store.aclose()
