"""A small tea shop to watch `asgi_sessions` at work: sign-in, cart, chat, WebSocket, and a race.

    python examples/demo.py                  sessions in memory
    python examples/demo.py --sqlite [PATH]  sessions in a file, demo.db if none is given; a restart ends none
    python examples/demo.py --redis [URL]    sessions on Redis, redis://127.0.0.1:6379/0 if no URL is given

Ctrl-C ends it. This file is what an app of yours would contain; `demo.html` has the markup and
`demo_race.py` the race.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import secrets
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from functools import partial
from typing import NamedTuple
from urllib.parse import urlsplit

import uvicorn
from demo_pages import clock, device_of, euro, fill, join
from demo_race import RACERS, WORK, WRITERS, Counter, LastWriterWins, race
from pydantic import BaseModel, Field
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import HTTPConnection, Request
from starlette.responses import (
    HTMLResponse,
    JSONResponse,
    RedirectResponse,
    Response,
    StreamingResponse,
)
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket

from asgi_sessions import (
    InMemorySessionStore,
    Session,
    SessionConflictError,
    SessionData,
    SessionError,
    SessionMiddleware,
    SessionStore,
    SQLiteSessionStore,
    get_session,
    get_session_data,
    session_hash,
)


class Item(BaseModel):
    """One line of a cart."""

    sku: str
    quantity: int = 1


class ShopSession(SessionData):
    """What this shop keeps of a visitor. Every field has a default, because a session begins empty."""

    cart: list[Item] = Field(default_factory=list)
    clicks: int = 0
    sockets: int = 0
    device: str = ""
    previous_id: str = ""


class Product(NamedTuple):
    """A product."""

    name: str
    note: str
    cents: int


PRODUCTS = {
    "sencha": Product("Sencha", "Green, steamed, from Uji", 890),
    "assam": Product("Assam", "Black, malty, second flush", 640),
    "rooibos": Product("Rooibos", "Red, mild, no caffeine", 520),
    "pot": Product("Teapot", "Stoneware, 0.8 litres", 3400),
}


# -- signing in and out -------------------------------------------------------------------------------------


async def home(request: Request) -> Response:
    """Who the visitor is, and where else that user is signed in."""
    data = get_session_data(request, ShopSession)
    if data.user_id is None:
        return page(request, "sign-in", "Welcome", error="")
    sessions = await store_of(request).list_for_user(data.user_id)
    devices = [session for session in sessions if isinstance(session, ShopSession)]
    rows = [
        fill(
            "device",
            id=short(request, device.session_id),
            name=device.device,
            since=clock(device),
            here="this one" if device.session_id == data.session_id else "",
        )
        for device in sorted(devices, key=lambda device: device.created_at)
    ]
    before = data.previous_id or "none stored"
    now = short(request, data.session_id)
    return page(request, "signed-in", "Welcome", name=data.user_id, before=before, now=now, rows=join(rows))


async def sign_in(request: Request) -> Response:
    """Sign in by name alone (it is a demo). The id changes, so an id that was planted before is useless."""
    session = get_session(request)
    data = get_session_data(request, ShopSession)
    before = "" if session.is_new else short(request, session.session_id)
    try:
        session.login((await field(request, "name")).strip() or "guest")
    except ValueError:
        error = "That name cannot be used: a plain one of at most 255 characters, please."
        return page(request, "sign-in", "Welcome", 422, error=error)
    data.previous_id, data.device = before, device_of(request.headers.get("user-agent", ""))
    return RedirectResponse("/", 303)


async def sign_out(request: Request) -> Response:
    """End this session: the record is deleted and the cookie removed."""
    get_session(request).logout()
    return RedirectResponse("/", 303)


async def sign_out_everywhere(request: Request) -> Response:
    """End every session of this user, on whatever device."""
    session = get_session(request)
    if session.data.user_id is not None:
        await store_of(request).delete_for_user(session.data.user_id)
    session.logout()
    return RedirectResponse("/", 303)


# -- the cart -----------------------------------------------------------------------------------------------


async def cart(request: Request) -> Response:
    """The shelf and the cart."""
    lines = [(item, PRODUCTS[item.sku]) for item in get_session_data(request, ShopSession).cart]
    shelf = [
        fill("product", sku=sku, name=product.name, note=product.note, price=euro(product.cents))
        for sku, product in PRODUCTS.items()
    ]
    rows = [
        fill("line", sku=item.sku, name=p.name, quantity=item.quantity, price=euro(item.quantity * p.cents))
        for item, p in lines
    ]
    total = euro(sum(item.quantity * product.cents for item, product in lines))
    rows = rows or [fill("empty-cart")]
    return page(request, "cart", "Shop", shelf=join(shelf), rows=join(rows), total=total)


async def add_to_cart(request: Request) -> Response:
    """Add a product to the cart. Nested changes are noticed; no flag is needed."""
    data = get_session_data(request, ShopSession)
    sku = await field(request, "sku")
    if sku not in PRODUCTS:
        raise HTTPException(404)
    for item in data.cart:
        if item.sku == sku:
            item.quantity = min(item.quantity + 1, 99)
            break
    else:
        data.cart.append(Item(sku=sku))
    return RedirectResponse("/cart", 303)


async def remove_from_cart(request: Request) -> Response:
    """Take a product out of the cart."""
    data = get_session_data(request, ShopSession)
    sku = await field(request, "sku")
    data.cart = [item for item in data.cart if item.sku != sku]
    return RedirectResponse("/cart", 303)


# -- a streamed answer --------------------------------------------------------------------------------------


async def chat(request: Request) -> Response:
    """The answer as server-sent events, word by word."""
    session = get_session(request)
    question = (await field(request, "question"))[:200]
    session["question"] = question
    await session.release()  # stored, so a new visitor gets a cookie; nobody waits for a slow answer
    words = answer_to(question, session.data.message_count).split()
    return StreamingResponse(stream(session, words, request.app.state.pause), media_type="text/event-stream")


async def stream(session: Session, words: Sequence[str], pause: float) -> AsyncIterator[str]:
    """The words, then the new count, which is stored before it is sent."""
    for word in words:
        yield f"event: word\ndata: {word}\n\n"
        await asyncio.sleep(pause)
    async with session.transaction() as data:
        count = data.increment_message_count()
    yield f"event: done\ndata: {count}\n\n"


def answer_to(question: str, earlier: int) -> str:
    """A reply that needs no language model."""
    return (
        f'You said "{question.strip()}". I take my time over this, one word after the other, and your other'
        f" tabs need not wait for me. Your message will be number {earlier + 1}, but not before I am done."
    )


# -- a WebSocket --------------------------------------------------------------------------------------------


async def socket(websocket: WebSocket) -> None:
    """Count the visitor's clicks. A connection may last for hours, so each change takes the lock anew."""
    session = get_session(websocket)
    async with session.transaction():  # before the accept, on which a new visitor's cookie rides
        get_session_data(websocket, ShopSession).sockets += 1
    await websocket.accept()
    async for _ in websocket.iter_text():
        try:
            async with session.transaction():
                data = get_session_data(websocket, ShopSession)
                data.clicks += 1
                clicks = data.clicks
        except SessionConflictError:
            return await websocket.close(4001, "the session has ended")
        await websocket.send_json({"clicks": clicks})  # told once it is stored
    return None


# -- the race -----------------------------------------------------------------------------------------------


async def run_race(request: Request) -> Response:
    """Many requests at once to one session: the same counter in each mode of the lock, and without any."""
    store, secret = store_of(request), request.app.state.secret
    wrapped = partial(SessionMiddleware, Counter, secret, store=store, model=ShopSession)
    return JSONResponse(
        {
            "writers": WRITERS,
            "locked": await race(wrapped(lock=True)),
            "auto": await race(request.app),
            "versions": await race(wrapped(lock=False)),
            "naive": await race(LastWriterWins(Counter, store)),
        }
    )


# -- pages --------------------------------------------------------------------------------------------------


def page(request: Request, part: str, title: str, status: int = 200, **values: object) -> Response:
    """A whole page, with the session's facts at the top."""
    body = fill(part, **values)
    markup = fill("layout", title=title, body=body, store=request.app.state.store_name, **facts(request))
    return HTMLResponse(markup, status, {"cache-control": "no-store"})  # Back shows no signed-out page


def short(connection: HTTPConnection, session_id: str) -> str:
    """The session's name in the log. The id itself is a secret."""
    return session_hash(session_id, connection.app.state.secret)


def facts(connection: HTTPConnection) -> dict[str, str]:
    """The session in short, for the strip at the top of each page."""
    session, data = get_session(connection), get_session_data(connection, ShopSession)
    return {
        "id": "none" if session.is_new else short(connection, session.session_id),
        "since": "not yet" if session.is_new else f"{data.created_at:%H:%M:%S}",
        "user": data.user_id or "anonymous",
        "cart": str(sum(item.quantity for item in data.cart)),
        "messages": str(data.message_count),
        "clicks": str(data.clicks),
    }


async def session_facts(request: Request) -> Response:
    """The facts for the strip, which the pages' scripts fetch again and again."""
    return JSONResponse(facts(request))


async def chat_page(request: Request) -> Response:
    """The chat."""
    return page(request, "chat", "Chat")


async def socket_page(request: Request) -> Response:
    """The page with the WebSocket button."""
    return page(request, "socket", "Socket", clicks=get_session_data(request, ShopSession).clicks)


async def race_page(request: Request) -> Response:
    """The race; `?run=1` starts it at once."""
    return page(
        request, "race", "Race", racers=RACERS, writers=WRITERS, work=round(1000 * WORK),
        floor=round(1000 * WORK * RACERS), writing=round(1000 * WORK * WRITERS),
    )  # fmt: skip


async def field(request: Request, name: str) -> str:
    """A form field's text, empty where it was not sent."""
    return str((await request.form()).get(name, ""))


def store_of(request: Request) -> SessionStore:
    """The store of this app's sessions."""
    store: SessionStore = request.app.state.store
    return store


# -- putting it together ------------------------------------------------------------------------------------

ROUTES = [
    Route("/", home),
    Route("/sign-in", sign_in, methods=["POST"]),
    Route("/sign-out", sign_out, methods=["POST"]),
    Route("/sign-out-everywhere", sign_out_everywhere, methods=["POST"]),
    Route("/cart", cart),
    Route("/cart/add", add_to_cart, methods=["POST"]),
    Route("/cart/remove", remove_from_cart, methods=["POST"]),
    Route("/chat", chat_page),
    Route("/chat", chat, methods=["POST"]),
    Route("/socket", socket_page),
    WebSocketRoute("/socket/clicks", socket),
    Route("/race", race_page),
    Route("/race/run", run_race, methods=["POST"]),
    Route("/race/count", Counter),
    Route("/session", session_facts),
]


def build(store: SessionStore, secret: str, store_name: str = "memory", pause: float = 0.07) -> Starlette:
    """The app; `pause` is the chat's, in seconds from word to word."""
    sessions = Middleware(
        SessionMiddleware,
        secret,
        store=store,
        model=ShopSession,
        idle_timeout=3600,
        lock="auto",  # no page waits while an answer streams in another tab
        exclude="/race/run",
    )
    app = Starlette(routes=ROUTES, middleware=[sessions])
    app.state.store, app.state.secret = store, secret
    app.state.store_name, app.state.pause = store_name, pause
    return app


def sqlite_store(path: str) -> SessionStore:
    """The store in this file. Where that cannot be used, the program ends with the reason."""

    async def attempt() -> None:
        try:
            await store.open()
        finally:
            await store.aclose()

    try:
        store = SQLiteSessionStore(path)
        asyncio.run(attempt())
    except (ValueError, SessionError) as error:
        raise SystemExit(f"--sqlite: {error}") from None
    return store


def kept_secret(file: str) -> str:
    """A secret that outlives the program: sessions are worth nothing where cookies are not believed."""
    try:
        with open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as new:
            new.write(secrets.token_hex(32))
    except FileExistsError:
        pass
    with open(file) as kept:
        return kept.read()


def redis_store(url: str) -> SessionStore:
    """The store at this URL, once it has answered. Where it does not, the program ends with the reason."""

    async def health() -> dict[str, object]:
        try:
            return await store.health_check()
        finally:
            await store.aclose()

    from asgi_sessions import RedisSessionStore  # here, for without --redis nobody needs redis-py

    try:
        store = RedisSessionStore(url)
    except ValueError as error:
        raise SystemExit(f"--redis: {error}") from None
    report = asyncio.run(health())
    if not report["healthy"]:
        raise SystemExit(f"No Redis there ({report.get('error')}). Start one, or leave --redis out.")
    return store


BANNER = """
  asgi-server-sessions demo, sessions kept in {store}

    http://{host}:{port}/          sign in: the id changes, the cart stays
    http://{host}:{port}/cart      a typed cart, changed in place
    http://{host}:{port}/chat      a streamed answer, counted when it has ended
    http://{host}:{port}/socket    a WebSocket that changes the session
    http://{host}:{port}/race      50 requests at once, in each mode of the lock

  What happens to sessions is logged below. Ctrl-C ends it.
"""


def kept_in(path: str | None, url: str | None) -> tuple[SessionStore, str, str]:
    """Where sessions are kept, what that is called, and the secret that goes with it."""
    if path:
        return sqlite_store(path), f"the file {path}", kept_secret(f"{path}.key")
    if url:
        return redis_store(url), f"Redis at {urlsplit(url).hostname or 'a socket'}", secrets.token_hex(32)
    return InMemorySessionStore(), "memory", secrets.token_hex(32)


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve until Ctrl-C."""
    parser = argparse.ArgumentParser(description="A small shop to watch asgi_sessions at work.")
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument(
        "--sqlite", nargs="?", const="demo.db", metavar="PATH",
        help="keep sessions in this file, demo.db without a PATH (default: in memory)",
    )  # fmt: skip
    kinds.add_argument(
        "--redis", nargs="?", const="redis://127.0.0.1:6379/0", metavar="URL",
        help="keep them in this Redis, the one of this machine without a URL",
    )  # fmt: skip
    parser.add_argument("--host", default="127.0.0.1", help="where to listen (default: %(default)s)")
    parser.add_argument("--port", default=8000, type=int, help="0 takes a free one (default: %(default)s)")
    options = parser.parse_args(arguments)
    store, name, secret = kept_in(options.sqlite, options.redis)
    logging.basicConfig(level=logging.INFO, format="  %(asctime)s  %(message)s", datefmt="%H:%M:%S")
    app = build(store, os.environ.get("SESSION_SECRET") or secret, name)
    config = uvicorn.Config(app, options.host, options.port, log_level="warning", timeout_graceful_shutdown=3)
    listener = config.bind_socket()
    listener.listen(config.backlog)  # so that the address that is told answers from now on
    host, port = listener.getsockname()[:2]
    print(BANNER.format(store=name, host=f"[{host}]" if ":" in host else host, port=port), flush=True)
    with suppress(KeyboardInterrupt):
        uvicorn.Server(config).run(sockets=[listener])


if __name__ == "__main__":
    main()
