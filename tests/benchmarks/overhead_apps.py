"""What `overhead` measures: one small app behind each session middleware, and clients that ask it.

The app reads a number in a session of about 300 bytes or adds to it. Headers and cookies are a browser's. A
middleware is imported when its subject is made, so that nothing has to be installed that is not measured.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, cast

from overhead_floor import floor
from pydantic import BaseModel, Field

from asgi_sessions import InMemorySessionStore, SessionData, SessionMiddleware, SessionStore

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Scope, Send

SECRET = "benchmark " * 4
CART = [{"sku": f"A{n}", "quantity": n, "title": "thing"} for n in range(6)]
CONTENT = {"user": "ada", "n": 0, "cart": CART}
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
LENGTHS = {"content-length": True, "no content-length": False}
BARE = "bare app"
AUTO, READ_ONLY = "ours, auto", "ours, read_only"
MEMORY, REDIS = "in memory", "on Redis"
AT_ONCE = {MEMORY: (1,), REDIS: (1, 64)}  # clients
PEERS = ("starlette", "starsessions", "litestar")  # their packages have these names
CONNECTIONS = 1024  # for each peer's client: redis-py's 100 are not enough for 256 requests at once

PATIENCE = 120.0  # seconds for Redis: 64 connections begin at once, on a busy machine and under valgrind

Wrap: TypeAlias = "Callable[[ASGIApp], ASGIApp]"


# -- the app -------------------------------------------------------------------------------------------------


class Uses(NamedTuple):
    """What the three requests do with the session."""

    fill: Callable[[Scope], None]
    read: Callable[[Scope], None]
    write: Callable[[Scope], None]


def fill_dict(scope: Scope) -> None:
    scope["session"].update(CONTENT)


def read_dict(scope: Scope) -> None:
    if scope["session"].get("n") is None:
        raise RuntimeError("the session is lost")


def write_dict(scope: Scope) -> None:
    scope["session"]["n"] += 1


class Item(BaseModel):
    sku: str
    quantity: int
    title: str


class Shop(SessionData):
    """Five items, and the fields that every record has."""

    cart: list[Item] = Field(default_factory=list)


def fill_shop(scope: Scope) -> None:
    shop = scope["session"].data
    shop.user_id = "ada"
    shop.cart = [Item.model_validate(item) for item in CART[:5]]


def read_shop(scope: Scope) -> None:
    if scope["session"].data.cart[0].sku != "A0":
        raise RuntimeError("the session is lost")


def write_shop(scope: Scope) -> None:
    scope["session"].data.cart[0].quantity += 1


DICT = Uses(fill_dict, read_dict, write_dict)
TYPED = Uses(fill_shop, read_shop, write_shop)
NOTHING = Uses(*[lambda scope: None] * 3)


def start(sized: bool = True) -> Message:
    """A message of its own for each answer: there are middlewares that add to its headers in place."""
    headers = [(b"content-type", b"text/plain")]
    if sized:
        headers.append((b"content-length", b"2"))
    return {"type": "http.response.start", "status": 200, "headers": headers}


def page(use: Callable[[Scope], None], sized: bool) -> ASGIApp:
    async def app(scope: Scope, receive: object, send: Send) -> None:
        use(scope)
        await send(start(sized))
        await send(BODY)

    return app


# -- its clients ---------------------------------------------------------------------------------------------


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


class Case(NamedTuple):
    """One figure: these requests of one subject, from so many clients at once."""

    subject: str
    place: str
    kind: str
    length: str
    clients: int

    def of(self, subject: str) -> str:
        """The name of the same requests of another subject."""
        return str(self._replace(subject=subject))

    def __str__(self) -> str:
        return f"{self.subject}, {self.kind}, {self.place}, {self.length}, clients: {self.clients}"


@dataclass
class Subject:
    """A middleware around the app, and clients that have a session there."""

    name: str
    wrap: Wrap
    uses: Uses = DICT
    place: str = MEMORY
    filling: Wrap | None = None  # for a middleware behind which a session cannot begin
    kinds: Sequence[str] = KINDS
    clients: list[Client] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._filling = (self.filling or self.wrap)(page(self.uses.fill, sized=True))
        self._apps = {
            (kind, length): self.wrap(page(getattr(self.uses, kind), sized))
            for kind in self.kinds
            for length, sized in LENGTHS.items()
        }

    async def begin(self, clients: int) -> None:
        """Have so many clients with a session of their own."""
        while len(self.clients) < clients:
            self.clients.append(Client())
            await self.clients[-1].request(self._filling)

    def app(self, case: Case) -> ASGIApp:
        return self._apps[case.kind, case.length]

    def cases(self, clients: int) -> Iterator[Case]:
        return (Case(self.name, self.place, kind, length, clients) for kind, length in self._apps)


# -- the middlewares -----------------------------------------------------------------------------------------


def ours(store: SessionStore, model: type[SessionData] = SessionData, **options: Any) -> Wrap:
    return lambda app: SessionMiddleware(app, SECRET, store=store, model=model, **options)


def in_other_modes(store: SessionStore, place: str) -> list[Subject]:
    """Ours without a lock: `lock="auto"`, and `read_only`, behind which nothing is written."""
    return [
        Subject(AUTO, ours(store, lock="auto"), place=place),
        Subject(READ_ONLY, ours(store, read_only="*"), DICT, place, ours(store), kinds=["read"]),
    ]


def starlette() -> Wrap:
    from starlette.middleware.sessions import SessionMiddleware as StarletteSessions

    return lambda app: StarletteSessions(app, SECRET)


def starsessions(store: Any) -> Wrap:
    from starsessions import SessionAutoloadMiddleware
    from starsessions import SessionMiddleware as Starsessions

    return lambda app: Starsessions(
        SessionAutoloadMiddleware(app), store=store, lifetime=3600, cookie_https_only=False
    )


def litestar(store: Any) -> Wrap:
    """Without Litestar's routing: the middleware gets what it finds within a request, and nothing else."""
    from litestar import Litestar
    from litestar import get as route
    from litestar.middleware.session.base import SessionMiddleware as LitestarSessions
    from litestar.middleware.session.server_side import ServerSideSessionBackend, ServerSideSessionConfig

    @route("/", sync_to_thread=False)
    def home() -> str:
        return "ok"

    site: Any = Litestar([home], stores={"sessions": store}, logging_config=None)
    backend = ServerSideSessionBackend(ServerSideSessionConfig())
    known = {"app": site, "litestar_app": site, "route_handler": site.routes[0].route_handlers[0]}

    def wrap(app: ASGIApp) -> ASGIApp:
        sessions: Any = LitestarSessions(cast(Any, app), backend)
        return lambda scope, receive, send: sessions({**scope, "state": {}, **known}, receive, send)

    return wrap


def in_memory(peers: Sequence[str]) -> list[Subject]:
    """The bare app, ours with both models, the floor, and the peers; a cookie counts as memory."""
    found = [
        Subject(BARE, lambda app: app, NOTHING),
        Subject("ours, dict", ours(InMemorySessionStore())),
        Subject("ours, typed", ours(InMemorySessionStore(model=Shop), Shop), TYPED),
        Subject("ours, encrypted", ours(InMemorySessionStore(), encryption_keys=[b"k" * 32])),
        *in_other_modes(InMemorySessionStore(), MEMORY),
        Subject("floor", floor(SECRET.encode())),
    ]
    if "starlette" in peers:
        found.append(Subject("Starlette", starlette()))
    if "starsessions" in peers:
        from starsessions import InMemoryStore

        found.append(Subject("starsessions", starsessions(InMemoryStore())))
    if "litestar" in peers:
        from litestar.stores.memory import MemoryStore

        found.append(Subject("Litestar", litestar(MemoryStore())))
    return found


@asynccontextmanager
async def on_redis(url: str, peers: Sequence[str]) -> AsyncIterator[list[Subject]]:
    """The bare app, ours, and the peers, which have no lock there."""
    from redis.asyncio import Redis

    from asgi_sessions import RedisSessionStore

    async with AsyncExitStack() as stack:
        store = RedisSessionStore(url)
        stack.push_async_callback(store.aclose)
        client = await stack.enter_async_context(
            Redis.from_url(
                url,
                max_connections=CONNECTIONS,
                socket_connect_timeout=PATIENCE,
                socket_timeout=PATIENCE,
            )
        )
        found = [Subject(BARE, lambda app: app, NOTHING, REDIS), Subject("ours", ours(store), place=REDIS)]
        found += in_other_modes(store, REDIS)
        if "starsessions" in peers:
            from starsessions.stores.redis import RedisStore

            found.append(Subject("starsessions", starsessions(RedisStore(connection=client)), place=REDIS))
        if "litestar" in peers:
            from litestar.stores.redis import RedisStore as LitestarStore

            found.append(Subject("Litestar", litestar(LitestarStore(client)), place=REDIS))
        yield found
