"""The demo's app: a tea shop whose pages each show one thing that sessions have to get right.

An app of yours would contain what this file does. `demo.py` starts it, `demo_frame.py` has
what all pages share, `demo_pages.py` fills in the markup.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from demo_frame import Item, ShopSession, facts, field, page, pause, short, store_of
from demo_pages import WEB, clock, device_of, euro, fill, join
from demo_race import RACERS, WORK, WRITERS, Counter, LastWriterWins, race
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import (
    FileResponse,
    JSONResponse,
    RedirectResponse,
    Response,
    StreamingResponse,
)
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.staticfiles import StaticFiles
from starlette.websockets import WebSocket

from asgi_sessions import (
    Session,
    SessionConflictError,
    SessionMiddleware,
    SessionStore,
    get_session,
    get_session_data,
)


class Product(NamedTuple):
    """A product."""

    name: str
    note: str
    cents: int


HERE = Path(__file__).parent

PRODUCTS = {
    "sencha": Product("Sencha", "Green, steamed, from Uji", 890),
    "assam": Product("Assam", "Black, malty, second flush", 640),
    "rooibos": Product("Rooibos", "Red, mild, no caffeine", 520),
    "pot": Product("Teapot", "Stoneware, 0.8 litres", 3400),
}


# -- signing in and out -------------------------------------------------------------------------------------


async def account(request: Request) -> Response:
    """Who the visitor is, and where else that user is signed in."""
    data = get_session_data(request, ShopSession)
    if data.user_id is None:
        return page(request, "sign-in", "Sign in", error="", invalid="false")
    sessions = await store_of(request).list_for_user(data.user_id)
    devices = [session for session in sessions if isinstance(session, ShopSession)]
    rows = [
        fill(
            "device",
            id=short(request, device.session_id),
            name=device.device,
            since=clock(device),
            here="this browser" if device.session_id == data.session_id else "",
        )
        for device in sorted(devices, key=lambda device: device.created_at)
    ]
    before = data.previous_id or "none stored"
    now = short(request, data.session_id)
    return page(request, "signed-in", "Account", name=data.user_id, before=before, now=now, rows=join(rows))


async def sign_in(request: Request) -> Response:
    """Sign in by name alone (it is a demo). The id changes, so an id that was planted before is useless."""
    session = get_session(request)
    data = get_session_data(request, ShopSession)
    before = "" if session.is_new else short(request, session.session_id)
    try:
        session.login((await field(request, "name")).strip() or "guest")
    except ValueError:
        error = "That name cannot be used: a plain one of at most 255 characters, please."
        return page(request, "sign-in", "Sign in", 422, error=error, invalid="true")
    data.previous_id, data.device = before, device_of(request.headers.get("user-agent", ""))
    return RedirectResponse("/account", 303)


async def sign_out(request: Request) -> Response:
    """End this session: the record is deleted and the cookie removed."""
    get_session(request).logout()
    return RedirectResponse("/account", 303)


async def sign_out_everywhere(request: Request) -> Response:
    """End every session of this user, on whatever device."""
    session = get_session(request)
    if session.data.user_id is not None:
        await store_of(request).delete_for_user(session.data.user_id)
    session.logout()
    return RedirectResponse("/account", 303)


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
    slow = round(request.app.state.slow)
    filled = fill("filled-cart", rows=join(rows), total=total, slow=slow) if rows else fill("empty-cart")
    return page(request, "cart", "Shop", shelf=join(shelf), cart=filled, slow=slow)


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


async def pay(request: Request) -> Response:
    """Pay what is in the cart. It is slow, and holds the lock like each POST: other changes wait."""
    data = get_session_data(request, ShopSession)
    if not data.cart:
        return RedirectResponse("/cart", 303)
    at_the_till: set[str] = request.app.state.at_the_till
    at_the_till.add(data.session_id)
    try:
        if not await pause(request, request.app.state.slow):
            raise HTTPException(503, "The server is being stopped. Nothing was paid.")
    finally:
        at_the_till.discard(data.session_id)
    data.cart = []
    return RedirectResponse("/cart", 303)


# -- a streamed answer --------------------------------------------------------------------------------------


async def chat(request: Request) -> Response:
    """The answer as server-sent events, word by word."""
    session = get_session(request)
    question = (await field(request, "question"))[:200]
    session["question"] = question
    await session.release()  # stored, so a new visitor gets a cookie; nobody waits for a slow answer
    words = answer_to(question, session.data.message_count).split()
    return StreamingResponse(stream(request, session, words), media_type="text/event-stream")


async def stream(request: Request, session: Session, words: Sequence[str]) -> AsyncIterator[str]:
    """The words, then the new count, which is stored before it is sent."""
    for word in words:
        yield f"event: word\ndata: {word}\n\n"
        if not await pause(request, request.app.state.pause):
            return  # the server is being stopped
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
                get_session_data(websocket, ShopSession).clicks += 1
        except SessionConflictError:
            return await websocket.close(4001, "the session has ended")
        await websocket.send_text("stored")  # how many there are, the page asks /session, as for all it shows
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


async def session_facts(request: Request) -> Response:
    """The facts, which each open page asks for twice a second: a poll, so it does not count as activity."""
    return JSONResponse(facts(request), headers={"cache-control": "no-store"})


async def chat_page(request: Request) -> Response:
    """The chat."""
    return page(request, "chat", "Chat")


async def socket_page(request: Request) -> Response:
    """The page with the WebSocket button."""
    return page(request, "socket", "Socket", clicks=get_session_data(request, ShopSession).clicks)


async def home(request: Request) -> Response:
    """What this is, and the race; `?run=1` starts it at once."""
    return page(
        request, "race", "Race", racers=RACERS, writers=WRITERS, work=round(1000 * WORK),
        floor=round(1000 * WORK * RACERS), writing=round(1000 * WORK * WRITERS),
    )  # fmt: skip


async def readme(request: Request) -> Response:
    """The README, as text."""
    return FileResponse(HERE.parent / "README.md", media_type="text/plain; charset=utf-8")


async def code(request: Request) -> Response:
    """This file."""
    return FileResponse(HERE / "demo_shop.py", media_type="text/plain; charset=utf-8")


# -- putting it together ------------------------------------------------------------------------------------

ROUTES = [
    Route("/", home),
    Route("/race/run", run_race, methods=["POST"]),
    Route("/race/count", Counter),
    Route("/cart", cart),
    Route("/cart/add", add_to_cart, methods=["POST"]),
    Route("/cart/remove", remove_from_cart, methods=["POST"]),
    Route("/cart/pay", pay, methods=["POST"]),
    Route("/chat", chat_page),
    Route("/chat", chat, methods=["POST"]),
    Route("/socket", socket_page),
    WebSocketRoute("/socket/clicks", socket),
    Route("/account", account),
    Route("/sign-in", sign_in, methods=["POST"]),
    Route("/sign-out", sign_out, methods=["POST"]),
    Route("/sign-out-everywhere", sign_out_everywhere, methods=["POST"]),
    Route("/session", session_facts),
    Route("/readme", readme),
    Route("/code", code),
    Mount("/web", StaticFiles(directory=WEB)),
]


def build(
    store: SessionStore, secret: str, store_name: str = "memory", pause: float = 0.07, slow: float = 5.0
) -> Starlette:
    """The app; `pause` between the words of the chat and a `slow` payment are in seconds."""
    sessions = Middleware(
        SessionMiddleware,
        secret,
        store=store,
        model=ShopSession,
        idle_timeout=3600,
        lock="auto",  # no page waits while another tab's request is slow
        passive="/session",
        exclude=("/race/run", "/readme", "/code", "/web/*"),
    )
    app = Starlette(routes=ROUTES, middleware=[sessions])
    app.state.store, app.state.secret = store, secret
    app.state.store_name, app.state.pause, app.state.slow = store_name, pause, slow
    app.state.at_the_till = set()
    app.state.leaving = asyncio.Event()
    return app
