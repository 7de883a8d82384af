"""What a session middleware costs per request, called in process, side by side with its peers.

    python tests/benchmarks/overhead.py [--rounds 15] [--requests 500] [--json FILE]

Each round calls every middleware in turn, so that all of them meet the same moods of the machine; a figure is
the median over the rounds, less the bare app's in the same round. The request reads or increments a number in
a session of about 300 bytes; headers and cookies are a browser's. One request at a time. Redis is a real one,
started on loopback.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from redis.asyncio import Redis
from starlette.middleware.sessions import SessionMiddleware as StarletteSessions
from starsessions import InMemoryStore, SessionAutoloadMiddleware
from starsessions import SessionMiddleware as Starsessions
from starsessions.stores.redis import RedisStore

from asgi_sessions import InMemorySessionStore, RedisSessionStore, SessionMiddleware
from asgi_sessions.types import ASGIApp, Message, Receive, Scope, Send

sys.path.insert(0, str(Path(__file__).parents[1]))
from redis_server import RedisServer

SECRET = "benchmark " * 4
CONTENT = {
    "user": "ada",
    "n": 0,
    "cart": [{"sku": f"A{n}", "quantity": n, "title": "thing"} for n in range(6)],
}
BROWSER = [
    (b"host", b"localhost"),
    (b"connection", b"keep-alive"),
    (b"accept", b"text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,image/webp,*/*;q=0.8"),
    (
        b"user-agent",
        b"Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko) "
        b"Chrome/126.0.0.0 Safari/537.36",
    ),
    (b"accept-encoding", b"gzip, deflate, br"),
    (b"accept-language", b"en-GB,en;q=0.9"),
]
OTHER_COOKIES = b"theme=dark; _ga=GA1.1.1234567890.1700000000; "  # few sites have one cookie only
START = {
    "type": "http.response.start",
    "status": 200,
    "headers": [(b"content-type", b"text/plain"), (b"content-length", b"2")],
}
BODY = {"type": "http.response.body", "body": b"ok"}


async def fill(scope: Scope, receive: Receive, send: Send) -> None:
    scope["session"].update(CONTENT)
    await send(dict(START))
    await send(BODY)


async def read(scope: Scope, receive: Receive, send: Send) -> None:
    if "session" in scope and scope["session"].get("n") is None:
        raise RuntimeError("the session is lost")
    await send(dict(START))
    await send(BODY)


async def write(scope: Scope, receive: Receive, send: Send) -> None:
    if "session" in scope:
        scope["session"]["n"] += 1
    await send(dict(START))
    await send(BODY)


def scope_of(cookie: bytes | None) -> Scope:
    headers = [*BROWSER]
    if cookie is not None:
        headers.append((b"cookie", OTHER_COOKIES + cookie))
    return {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "GET", "scheme": "http",
        "path": "/", "raw_path": b"/", "query_string": b"", "root_path": "", "headers": headers,
        "client": ("127.0.0.1", 50000), "server": ("127.0.0.1", 80),
    }  # fmt: skip


async def receive() -> Message:
    return {"type": "http.request", "body": b"", "more_body": False}


class Subject:
    """A middleware around the two apps, with the cookie of a session that it made."""

    def __init__(self, name: str, wrap: Callable[[ASGIApp], ASGIApp]) -> None:
        self.name = name
        self.apps = {"read": wrap(read), "write": wrap(write)}
        self.filling = wrap(fill)
        self.cookie: bytes | None = None
        self.figures: dict[str, list[float]] = {"read": [], "write": []}

    async def begin(self) -> None:
        if self.name == "bare app":
            return
        sent: list[Message] = []

        async def send(message: Message) -> None:
            sent.append(message)

        await self.filling(scope_of(None), receive, send)
        self.take_cookie(sent)

    def take_cookie(self, sent: list[Message]) -> None:
        for name, value in sent[0]["headers"]:
            if name.lower() == b"set-cookie":
                self.cookie = value.split(b";")[0]

    async def round(self, kind: str, requests: int) -> float:
        """Microseconds per request. The cookie is followed, for one middleware keeps the session in it."""
        app, sent = self.apps[kind], []

        async def send(message: Message) -> None:
            sent.append(message)

        started = time.perf_counter()
        for _ in range(requests):
            sent.clear()
            await app(scope_of(self.cookie), receive, send)
        took = time.perf_counter() - started
        if self.cookie is not None:
            self.take_cookie(sent)
        return took / requests * 1e6


def subjects(url: str, client: Redis) -> list[Subject]:
    memory, redis = InMemorySessionStore(), RedisSessionStore(url)
    peer_memory, peer_redis = InMemoryStore(), RedisStore(connection=client)

    def starsessions(store: Any) -> Callable[[ASGIApp], ASGIApp]:
        return lambda app: Starsessions(
            SessionAutoloadMiddleware(app), store=store, lifetime=3600, cookie_https_only=False
        )

    return [
        Subject("bare app", lambda app: app),
        Subject("ours, memory", lambda app: SessionMiddleware(app, SECRET, store=memory)),
        Subject("starsessions, memory", starsessions(peer_memory)),
        Subject("Starlette, cookie", lambda app: StarletteSessions(app, SECRET)),
        Subject("ours, Redis", lambda app: SessionMiddleware(app, SECRET, store=redis)),
        Subject("starsessions, Redis", starsessions(peer_redis)),
    ]


async def measure(url: str, rounds: int, requests: int) -> list[Subject]:
    client = Redis.from_url(url)
    try:
        measured = subjects(url, client)
        for subject in measured:
            await subject.begin()
        for number in range(rounds + 1):
            for kind in ("read", "write"):
                turn = number % len(measured)
                for subject in measured[turn:] + measured[:turn]:
                    figure = await subject.round(kind, requests)
                    if number:  # the first round warms up
                        subject.figures[kind].append(figure)
        return measured
    finally:
        await client.aclose()


def over_bare(measured: list[Subject]) -> dict[str, dict[str, float]]:
    bare = measured[0].figures
    return {
        subject.name: {
            kind: statistics.median(a - b for a, b in zip(subject.figures[kind], bare[kind], strict=True))
            for kind in ("read", "write")
        }
        for subject in measured[1:]
    }


def ratio(measured: list[Subject], name: str, peer: str, kind: str) -> float:
    """The median over the rounds of what `name` costs over the bare app, in terms of what `peer` does."""
    by_name = {subject.name: subject.figures[kind] for subject in measured}
    rounds = zip(by_name[name], by_name[peer], by_name["bare app"], strict=True)
    return statistics.median((a - bare) / (b - bare) for a, b, bare in rounds)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--requests", type=int, default=500, help="of each kind, subject and round")
    parser.add_argument("--json", type=Path, help="save the figures here too")
    options = parser.parse_args()
    with RedisServer() as server:
        measured = asyncio.run(measure(server.url, options.rounds, options.requests))
    costs = over_bare(measured)
    print(f"µs per request over the bare app, medians of {options.rounds} alternating rounds\n")
    print(f"{'':24}{'read':>8}{'write':>8}")
    for name, cost in costs.items():
        print(f"{name:24}{cost['read']:8.1f}{cost['write']:8.1f}")
    print("\nours (locked) in terms of the unlocked peer, round by round")
    ratios = {
        f"{where}, {kind}": ratio(measured, f"ours, {where}", f"starsessions, {where}", kind)
        for where in ("memory", "Redis")
        for kind in ("read", "write")
    }
    for name, value in ratios.items():
        print(f"{name:24}{value:8.2f}x")
    if options.json:
        options.json.write_text(
            json.dumps({"over_bare_us": costs, "ratio_to_starsessions": ratios}, indent=2)
        )


if __name__ == "__main__":
    main()
