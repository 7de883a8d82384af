"""What a session middleware costs per request, called in process, side by side with its peers.

    python tests/benchmarks/overhead.py [--rounds 15] [--json FILE] [--plot FILE]

The request reads or increments a number in a session of about 300 bytes; headers and cookies are a browser's.
1, 8, 64 and 256 clients at once: each is a task with a session and a cookie of its own. No HTTP server; Redis
is a real one, started on loopback. What is told is wall time for each request of all clients together, less
the bare app's in the same round.

Ours is as it comes, its lock included. The peers have no lock and are set up as their documentation says,
without what they offer at a price: starsessions autoloads and has a lifetime, Litestar's server-side session
does not renew on access. On Redis theirs have a redis-py client with hiredis and as many connections as they
ask for. Litestar's middleware is called without Litestar's routing, as it is within a request.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias, cast

from measure import (
    Cell,
    Panel,
    Report,
    Samples,
    Table,
    alternate,
    command_line,
    drive,
    machine,
    parse,
    server_of,
)
from redis.asyncio import Redis
from redis_server import RedisServer

from asgi_sessions import InMemorySessionStore, RedisSessionStore, SessionMiddleware
from asgi_sessions.asgi import ASGIApp, Message, Receive, Scope, Send

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
BODY = {"type": "http.response.body", "body": b"ok"}
KINDS = ("read", "write")
PEERS = {"starsessions": "starsessions", "litestar": "litestar", "starlette": "starlette"}
CONNECTIONS = 1024  # for each peer's client: redis-py's 100 are not enough for 256 requests at once

Wrap: TypeAlias = Callable[[ASGIApp], ASGIApp]


# -- the app and its clients ---------------------------------------------------------------------------------


def start() -> Message:
    """A message of its own for each answer: there are middlewares that add to its headers in place."""
    headers = [(b"content-type", b"text/plain"), (b"content-length", b"2")]
    return {"type": "http.response.start", "status": 200, "headers": headers}


async def fill(scope: Scope, receive: Receive, send: Send) -> None:
    scope["session"].update(CONTENT)
    await send(start())
    await send(BODY)


async def read(scope: Scope, receive: Receive, send: Send) -> None:
    if "session" in scope and scope["session"].get("n") is None:
        raise RuntimeError("the session is lost")
    await send(start())
    await send(BODY)


async def write(scope: Scope, receive: Receive, send: Send) -> None:
    if "session" in scope:
        scope["session"]["n"] += 1
    await send(start())
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


class Client:
    """Sends requests one after the other and keeps the cookie; an answer other than 200 is an error."""

    def __init__(self) -> None:
        self.cookie: bytes | None = None

    async def request(self, app: ASGIApp) -> None:
        await app(scope_of(self.cookie), receive, self._send)

    async def _send(self, message: Message) -> None:
        if message["type"] != "http.response.start":
            return
        if message["status"] != 200:
            raise RuntimeError(f"the middleware answered {message['status']}")
        for name, value in message["headers"]:
            if name.lower() == b"set-cookie":
                self.cookie = value.split(b";")[0]


@dataclass
class Subject:
    """A middleware around the apps, and clients that have a session there."""

    name: str
    wrap: Wrap
    where: str = ""  # memory, cookie or Redis
    clients: list[Client] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.apps = {"read": self.wrap(read), "write": self.wrap(write), "fill": self.wrap(fill)}

    async def begin(self, clients: int) -> None:
        """Have so many clients with a session of their own."""
        while len(self.clients) < clients:
            client = Client()
            if self.where:
                await client.request(self.apps["fill"])
            self.clients.append(client)

    def turn(self, kind: str, clients: int, seconds: float) -> Callable[[], Awaitable[Mapping[str, float]]]:
        """What `alternate` calls: requests of all clients at once for so long."""
        app = self.apps[kind]
        return lambda: drive(
            lambda number: self.clients[number].request(app), clients, seconds, polite=clients > 1
        )


# -- the middlewares -----------------------------------------------------------------------------------------


def starlette_peers(client: Redis) -> list[Subject]:
    from starlette.middleware.sessions import SessionMiddleware as StarletteSessions

    return [Subject("Starlette, cookie", lambda app: StarletteSessions(app, SECRET), "cookie")]


def starsessions_peers(client: Redis) -> list[Subject]:
    from starsessions import InMemoryStore, SessionAutoloadMiddleware
    from starsessions import SessionMiddleware as Starsessions
    from starsessions.stores.redis import RedisStore

    def around(store: Any) -> Wrap:
        return lambda app: Starsessions(
            SessionAutoloadMiddleware(app), store=store, lifetime=3600, cookie_https_only=False
        )

    return [
        Subject("starsessions, memory", around(InMemoryStore()), "memory"),
        Subject("starsessions, Redis", around(RedisStore(connection=client)), "Redis"),
    ]


def litestar_peers(client: Redis) -> list[Subject]:
    from litestar import Litestar
    from litestar import get as route
    from litestar.middleware.session.base import SessionMiddleware as LitestarSessions
    from litestar.middleware.session.server_side import ServerSideSessionBackend, ServerSideSessionConfig
    from litestar.routes import HTTPRoute
    from litestar.stores.base import Store
    from litestar.stores.memory import MemoryStore
    from litestar.stores.redis import RedisStore

    @route("/", sync_to_thread=False)
    def page() -> str:
        return "ok"

    def around(store: Store) -> Wrap:
        site = Litestar([page], stores={"sessions": store}, logging_config=None)
        backend = ServerSideSessionBackend(ServerSideSessionConfig())
        known = {
            "app": site,
            "litestar_app": site,
            "route_handler": cast(HTTPRoute, site.routes[0]).route_handlers[0],
        }

        def wrap(app: ASGIApp) -> ASGIApp:
            sessions = LitestarSessions(cast(Any, app), backend)

            async def within_a_request(scope: Scope, receive: Receive, send: Send) -> None:
                await sessions(
                    cast(Any, {**scope, "state": {}, **known}), cast(Any, receive), cast(Any, send)
                )

            return within_a_request

        return wrap

    return [
        Subject("Litestar, memory", around(MemoryStore()), "memory"),
        Subject("Litestar, Redis", around(RedisStore(client)), "Redis"),
    ]


@asynccontextmanager
async def subjects(url: str, peers: Sequence[str]) -> AsyncIterator[list[Subject]]:
    """The bare app, ours in memory and on Redis, and the peers."""
    memory, redis = InMemorySessionStore(), RedisSessionStore(url)
    client = Redis.from_url(url, max_connections=CONNECTIONS)
    makers = {"starsessions": starsessions_peers, "starlette": starlette_peers, "litestar": litestar_peers}
    try:
        yield [
            Subject("bare app", lambda app: app),
            Subject("ours, memory", lambda app: SessionMiddleware(app, SECRET, store=memory), "memory"),
            Subject("ours, Redis", lambda app: SessionMiddleware(app, SECRET, store=redis), "Redis"),
            *[subject for peer in peers for subject in makers[peer](client)],
        ]
    finally:
        await client.aclose()
        await redis.aclose()


# -- measuring and telling -----------------------------------------------------------------------------------

Measured: TypeAlias = dict[tuple[str, int], Samples]


async def measure(url: str, options: argparse.Namespace) -> tuple[list[Subject], Measured]:
    measured: Measured = {}
    async with subjects(url, options.peers) as all_of_them:
        for clients in options.clients:
            for subject in all_of_them:
                await subject.begin(clients)
            for kind in KINDS:
                turns = {each.name: each.turn(kind, clients, options.seconds) for each in all_of_them}
                measured[kind, clients] = await alternate(turns, options.rounds)
    return all_of_them, measured


def cost_table(title: str, unit: str, figure: str, names: Sequence[str], measured: Measured) -> Table:
    columns = [f"{unit} per request over the bare app", *[f"{kind} {clients}" for kind, clients in measured]]
    rows: list[Sequence[Cell]] = [
        [name, *[samples.above(name, "bare app", figure) for samples in measured.values()]]
        for name in names
        if name != "bare app"
    ]
    bare: list[Cell] = ["(bare app)", *[samples.median("bare app", figure) for samples in measured.values()]]
    return Table(title, columns, [*rows, bare])


def opponents(all_of_them: Sequence[Subject]) -> list[tuple[str, str]]:
    """Ours and each peer that keeps sessions where ours does; a cookie is compared with memory."""
    return [
        (ours.name, peer.name)
        for ours in all_of_them[1:3]
        for peer in all_of_them[3:]
        if peer.where == ours.where or (peer.where == "cookie" and ours.where == "memory")
    ]


def ratio_tables(pairs: Sequence[tuple[str, str]], measured: Measured) -> list[Table]:
    heads = [f"{kind} {clients}" for kind, clients in measured]
    throughput: list[Sequence[Cell]] = [
        [f"{ours} / {peer}", *[samples.ratio(ours, peer, "per_s") for samples in measured.values()]]
        for ours, peer in pairs
    ]
    cost: list[Sequence[Cell]] = [
        [f"{ours} / {peer}", *[samples.ratio(ours, peer, "us", "bare app") for samples in measured.values()]]
        for ours, peer in pairs
    ]
    return [
        Table("requests per second in terms of the peer's (more is better)", ["", *heads], throughput),
        Table("cost over the bare app in terms of the peer's (less is better)", ["", *heads], cost),
    ]


def panels(all_of_them: Sequence[Subject], measured: Measured) -> list[Panel]:
    """For memory and Redis, what a read and a write cost at each number of clients."""
    shown = []
    for where in ("memory", "Redis"):
        here = [
            each for each in all_of_them if each.where in (where, "cookie" if where == "memory" else where)
        ]
        for kind in KINDS:
            at = {clients: samples for (of, clients), samples in measured.items() if of == kind}
            lines = {
                each.name: [
                    (float(n), samples.above(each.name, "bare app", "us")) for n, samples in at.items()
                ]
                for each in here
            }
            label = "µs per request over the bare app"
            title = f"{kind}, {'in memory' if where == 'memory' else 'on Redis'}"
            shown.append(Panel(title, label, lines, "clients at once", log_x=True))
    return shown


def options_of(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = command_line(__doc__, rounds=15)
    parser.add_argument("--seconds", type=float, default=0.2, help="of each turn (default: %(default)s)")
    parser.add_argument("--clients", default="1,8,64,256", help="at once (default: %(default)s)")
    parser.add_argument("--peers", default=",".join(PEERS), help="to compare with (default: %(default)s)")
    options = parse(parser, arguments)
    options.peers = [peer for peer in options.peers.split(",") if peer]
    options.clients = [int(clients) for clients in options.clients.split(",")]
    unknown = [peer for peer in options.peers if peer not in PEERS]
    if unknown:
        parser.error(f"--peers knows {', '.join(PEERS)}; not {', '.join(unknown)}")
    missing = [peer for peer in options.peers if importlib.util.find_spec(PEERS[peer]) is None]
    if missing:
        parser.error(
            f"not installed: {', '.join(missing)}. pip install 'asgi-server-sessions[bench]' brings every"
            " peer; --peers names those to compare with"
        )
    if options.quick:
        options.seconds, options.clients = min(options.seconds, 0.02), [1, 8]
    return options


def main() -> None:
    options = options_of()
    with RedisServer() as server:
        facts = machine("redis", "hiredis", *options.peers, server=server_of(server.url))
        all_of_them, measured = asyncio.run(measure(server.url, options))
    names = [subject.name for subject in all_of_them]
    Report(
        "What a session costs a request",
        facts,
        [
            cost_table("what the middleware adds", "µs", "us", names, measured),
            cost_table("of this process's processor", "µs", "cpu_us", names, measured),
            *ratio_tables(opponents(all_of_them), measured),
        ],
        panels=panels(all_of_them, measured),
    ).finish(options)


if __name__ == "__main__":
    main()
