"""Other ways to write an app: the bare protocol, and FastAPI with typed records as dependencies."""

from __future__ import annotations

from datetime import datetime, timezone
from enum import Enum
from importlib import import_module
from typing import Annotated, Any

import pytest
from fastapi import BackgroundTasks, Depends, FastAPI, HTTPException, Request, WebSocket
from fastapi.encoders import jsonable_encoder
from fastapi.responses import JSONResponse
from fastapi.testclient import TestClient
from pydantic import BaseModel, Field
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.sessions import SessionMiddleware as StarletteSessions
from starlette.requests import HTTPConnection
from starlette.requests import Request as StarletteRequest
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route

from asgi_sessions import (
    InMemorySessionStore,
    Session,
    SessionConflictError,
    SessionData,
    SessionEvent,
    SessionMiddleware,
    get_session,
    session_dependency,
)
from asgi_sessions.asgi import Message, Receive, Scope, Send

KEY = "k" * 32


class Plan(Enum):
    """A choice."""

    FREE = "free"
    PAID = "paid"


class Item(BaseModel):
    """A nested model."""

    name: str
    pieces: int = 1


class Shop(SessionData):
    """A user's own model: nested models, an enum, defaults."""

    cart: list[Item] = Field(default_factory=list)
    plan: Plan = Plan.FREE


# --- the bare protocol ----------------------------------------------------------------------------


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio", "trio"])
async def test_a_bare_app_needs_no_framework() -> None:
    """The session is in the scope, and the exact messages are those of the app with the session's headers."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        session = get_session(scope)
        session["n"] = session.get("n", 0) + 1
        body = str(session["n"]).encode()
        headers = [(b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    middleware = SessionMiddleware(app, KEY)

    async def get(cookie: bytes | None) -> list[Message]:
        sent: list[Message] = []

        async def receive() -> Message:
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message: Message) -> None:
            sent.append(message)

        headers = [(b"cookie", cookie)] if cookie else []
        await middleware({"type": "http", "method": "GET", "path": "/", "headers": headers}, receive, send)
        return sent

    start, body = await get(None)
    assert body == {"type": "http.response.body", "body": b"1"}
    assert [name for name, _ in start["headers"]] == [
        b"content-length",
        b"vary",
        b"set-cookie",
        b"cache-control",
    ]
    cookie = start["headers"][2][1].split(b";")[0]
    assert await get(cookie) == [
        {
            "type": "http.response.start",
            "status": 200,
            "headers": [(b"content-length", b"1"), (b"vary", b"Cookie")],
        },
        {"type": "http.response.body", "body": b"2"},
    ]


# --- FastAPI --------------------------------------------------------------------------------------


def session_of(connection: HTTPConnection) -> Session:
    """The dependency that an app writes once; it serves requests and WebSockets."""
    return get_session(connection)


CurrentShop = Annotated[Shop, Depends(session_dependency(Shop))]
CurrentSession = Annotated[Session, Depends(session_of)]


def current_user(shop: CurrentShop) -> str:
    if shop.user_id is None:
        raise HTTPException(401)
    return shop.user_id


app = FastAPI()


@app.post("/cart")
def add(shop: CurrentShop, item: Item) -> list[Item]:
    """A plain function: a change within a list is found."""
    shop.cart.append(item)
    return shop.cart


@app.post("/cart/{index}")
async def more(shop: CurrentShop, index: int) -> Item:
    """A change within a nested model is found."""
    shop.cart[index].pieces += 1
    return shop.cart[index]


@app.get("/cart")
async def cart(shop: CurrentShop) -> list[Item]:
    return shop.cart


@app.post("/upgrade")
async def upgrade(shop: CurrentShop, user: Annotated[str, Depends(current_user)]) -> str:
    shop.plan = Plan.PAID
    return f"{user}: {shop.plan.value}"


@app.post("/plan/{plan}")
async def choose(shop: CurrentShop, plan: str) -> None:
    shop.plan = plan  # type: ignore[assignment]  # the point: assignment is validated


@app.post("/login/{user}")
async def login(session: CurrentSession, user: str) -> None:
    session.login(user)


@app.post("/logout")
def logout(session: CurrentSession) -> None:
    session.logout()


@app.post("/save-early")
async def save_early(session: CurrentSession) -> str:
    session["early"] = True
    await session.save()
    return "stored"


@app.post("/later")
async def later(session: CurrentSession, tasks: BackgroundTasks) -> None:
    async def count() -> None:
        async with session.transaction():
            session["later"] = session.get("later", 0) + 1

    tasks.add_task(count)


@app.get("/values")
async def values(request: Request) -> dict[str, Any]:
    return dict(request.session)


@app.websocket("/feed")
async def feed(websocket: WebSocket, shop: CurrentShop) -> None:
    await websocket.accept()
    async with get_session(websocket).transaction():
        shop.cart.append(Item(name="from the socket"))
        shop.increment_message_count()
    await websocket.send_json([item.name for item in shop.cart])
    await websocket.close()


@pytest.fixture(params=["asyncio", "trio"])
def client(request: pytest.FixtureRequest) -> TestClient:
    store = InMemorySessionStore()
    return TestClient(SessionMiddleware(app, KEY, store=store, model=Shop), backend=request.param)


def test_the_typed_record_is_a_dependency(client: TestClient) -> None:
    """Fields, lists and nested models change in place and are stored."""
    assert client.post("/cart", json={"name": "tea"}).json() == [{"name": "tea", "pieces": 1}]
    assert client.post("/cart", json={"name": "cup", "pieces": 4}).status_code == 200
    assert client.post("/cart/1").json() == {"name": "cup", "pieces": 5}
    assert client.get("/cart").json() == [{"name": "tea", "pieces": 1}, {"name": "cup", "pieces": 5}]


def test_signing_in_and_out(client: TestClient) -> None:
    """A dependency on the signed-in user works, the id changes at login and is gone at logout."""
    client.post("/cart", json={"name": "tea"})
    anonymous = client.cookies["session"]
    assert client.post("/upgrade").status_code == 401
    client.post("/login/ada")
    assert client.cookies["session"] != anonymous
    assert client.post("/upgrade").json() == "ada: paid"
    assert len(client.get("/cart").json()) == 1
    signed_in = client.cookies["session"]
    client.post("/logout")
    assert "session" not in client.cookies
    for old in (anonymous, signed_in):
        client.cookies.set("session", old)
        assert client.post("/upgrade").status_code == 401


def test_an_invalid_assignment_fails_and_changes_nothing(client: TestClient) -> None:
    """The model guards the record."""
    client.post("/login/ada")
    with pytest.raises(ValueError, match="plan"):
        client.post("/plan/gold")
    assert client.post("/plan/paid").status_code == 200


def test_saving_early_and_late(client: TestClient) -> None:
    """`save()` within a request, a transaction in a background task after it."""
    assert client.post("/save-early").json() == "stored"
    client.post("/later")
    client.post("/later")
    assert client.get("/values").json() == {"early": True, "later": 2}


def test_a_websocket_has_the_same_dependency(client: TestClient) -> None:
    """The record that was injected at the start is the one that the transaction changes."""
    client.post("/cart", json={"name": "tea"})
    for expected in (["tea", "from the socket"], ["tea", "from the socket", "from the socket"]):
        with client.websocket_connect("/feed") as socket:
            assert socket.receive_json() == expected
    assert len(client.get("/cart").json()) == 3


def test_the_wrong_model_is_named() -> None:
    """Forgetting `model=` is an error with the remedy, at the first request."""
    with pytest.raises(TypeError, match="pass it model=Shop"):
        TestClient(SessionMiddleware(app, KEY)).get("/cart")


def test_a_missing_middleware_is_named() -> None:
    """So is forgetting the middleware."""
    with pytest.raises(RuntimeError, match=r"add asgi_sessions\.SessionMiddleware"):
        TestClient(app).get("/cart")


def test_it_is_added_like_any_middleware() -> None:
    """`add_middleware` with the arguments by name; the session's errors that rise get its own answer."""
    own = FastAPI()
    own.add_middleware(SessionMiddleware, secret_key=KEY, model=Shop)

    @own.get("/")
    async def count(shop: CurrentShop) -> int:
        return shop.increment_message_count()

    @own.get("/taken")
    async def taken() -> None:
        raise SessionConflictError("raised by hand")

    client = TestClient(own)
    refused = client.get("/taken")
    assert (refused.status_code, refused.headers["cache-control"]) == (409, "no-store")
    assert [client.get("/").json() for _ in range(3)] == [1, 2, 3]


# --- several middlewares in one process -------------------------------------------------------------


async def count_visits(request: StarletteRequest) -> PlainTextResponse:
    request.session["n"] = request.session.get("n", 0) + 1
    return PlainTextResponse(str(request.session["n"]))


def test_a_middleware_for_each_route_is_one_for_all() -> None:
    """Each route's has the default store, which they share: a session goes on from route to route."""
    each = [Middleware(SessionMiddleware, secret_key=KEY)]
    routes = [Route("/a", count_visits, middleware=each), Route("/b", count_visits, middleware=each)]
    client = TestClient(Starlette(routes=routes))
    assert [client.get(path).text for path in ("/a", "/b", "/a", "/b")] == ["1", "2", "3", "4"]


def test_litestar_builds_one_for_each_route_and_they_are_one() -> None:
    """Where the app lists the middleware once, Litestar makes one of each handler."""
    litestar: Any = import_module("litestar")
    middleware = import_module("litestar.middleware").DefineMiddleware(SessionMiddleware, secret_key=KEY)

    async def count(request: Any) -> int:
        request.session["n"] = request.session.get("n", 0) + 1
        return int(request.session["n"])

    count.__annotations__["request"] = litestar.Request
    handlers = [litestar.get(path)(count) for path in ("/a", "/b")]
    client = TestClient(litestar.Litestar(route_handlers=handlers, middleware=[middleware]))
    assert [client.get(path).json() for path in ("/a", "/b", "/a", "/b")] == [1, 2, 3, 4]


@pytest.mark.parametrize("name", ["session", "admin_session"])
def test_a_panel_with_its_own_sessions_is_told_of(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """Starlette's middleware around a mounted panel takes our cookie's name: one warning with the remedy."""
    panel = Starlette(
        routes=[Route("/", count_visits)],
        middleware=[Middleware(StarletteSessions, secret_key=KEY, session_cookie=name)],
    )
    site = Starlette(
        routes=[Route("/", count_visits), Mount("/panel", panel)],
        middleware=[Middleware(SessionMiddleware, secret_key=KEY)],
    )
    client = TestClient(site)
    for _ in range(2):
        client.get("/")
        client.get("/panel/")
    warned = [record.message for record in caplog.records if "cookie_clash" in record.message]
    assert len(warned) == (1 if name == "session" else 0)
    assert all("another session_cookie" in line for line in warned)
    assert client.get("/").text == ("1" if name == "session" else "3")


def test_patterns_are_the_apps_own_under_a_mount() -> None:
    """An app that is mounted, or served with --root-path, excludes the same paths as alone."""
    inner = Starlette(
        routes=[Route("/health", show_session), Route("/page", show_session)],
        middleware=[Middleware(SessionMiddleware, secret_key=KEY, exclude=["/health"])],
    )
    alone, mounted = TestClient(inner), TestClient(Starlette(routes=[Mount("/shop", inner)]))
    behind = TestClient(inner, root_path="/shop")
    assert [alone.get(path).text for path in ("/health", "/page")] == ["none", "a session"]
    assert [mounted.get(path).text for path in ("/shop/health", "/shop/page")] == ["none", "a session"]
    assert [behind.get(path).text for path in ("/health", "/page")] == ["none", "a session"]


async def show_session(request: StarletteRequest) -> PlainTextResponse:
    return PlainTextResponse("a session" if "session" in request.scope else "none")


def test_a_value_that_cannot_be_stored_is_told_with_its_route() -> None:
    """The event names the route as the app declared it (a path may hold what is private), and the remedy."""
    told: list[SessionEvent] = []
    own = FastAPI()

    @own.post("/orders/{order}")
    async def order(request: Request, order: str) -> None:
        request.session["when"] = {"ordered": datetime.now(timezone.utc), "order": order}

    @own.post("/nan/{order}")
    async def nan(request: Request, order: str) -> None:
        request.session["n"] = float("nan")

    client = TestClient(SessionMiddleware(own, KEY, on_event=told.append))
    assert client.post("/orders/4711").status_code == 500
    assert client.post("/nan/4711").status_code == 500
    first, second = [dict(event.details) for event in told if event.name == "unstorable_value"]
    assert (first["path"], first["route"]) == ("metadata.when.ordered", "POST /orders/{order}")
    assert "of type datetime" in str(first["reason"])
    assert "a field of your own model" in str(first["remedy"])
    assert (second["path"], second["route"]) == ("metadata.n", "POST /nan/{order}")
    assert "remedy" not in second


# --- what a handler returns -------------------------------------------------------------------------


class Basket(BaseModel):
    """A response model with the record in it."""

    shop: Shop
    all_of_them: list[Shop]


returning = FastAPI()


@returning.post("/begin")
async def begin(shop: CurrentShop) -> None:
    shop.cart.append(Item(name="tea"))
    shop.user_id = "ada"


@returning.get("/annotated")
async def annotated(shop: CurrentShop) -> Shop:
    return shop


@returning.get("/without", response_model=None)
async def without(shop: CurrentShop) -> Any:
    return shop


@returning.get("/model", response_model=Shop)
async def with_model(shop: CurrentShop) -> Any:
    return shop


@returning.get("/base", response_model=SessionData)
async def with_base(shop: CurrentShop) -> Any:
    return shop


@returning.get("/nested")
async def nested(shop: CurrentShop) -> Basket:
    return Basket(shop=shop, all_of_them=[shop])


@returning.get("/list")
async def listed(shop: CurrentShop) -> list[Shop]:
    return [shop]


@returning.get("/union")
async def optional(shop: CurrentShop) -> Shop | None:
    return shop


@returning.get("/dict", response_model=None)
def in_a_dict(shop: CurrentShop) -> Any:
    return {"shop": shop, "more": [shop]}


@returning.get("/json", response_class=JSONResponse)
def by_hand(shop: CurrentShop) -> Any:
    return JSONResponse(jsonable_encoder(shop))


@pytest.mark.parametrize(
    "path", ["annotated", "without", "model", "base", "nested", "list", "union", "dict", "json"]
)
def test_a_returned_record_tells_neither_id_nor_fingerprint(path: str) -> None:
    """Whoever reads an answer (a script of the page, a log) must not be able to take the session over."""
    store = InMemorySessionStore()
    client = TestClient(SessionMiddleware(returning, KEY, store=store, model=Shop))

    client.post("/begin")
    session_id = client.cookies["session"].partition(".")[0]
    text = client.get(f"/{path}").text
    assert "ada" in text
    for secret in (session_id, "session_id", "fingerprint"):
        assert secret not in text
    assert "session_id" not in str(client.get("/openapi.json").json()["components"]["schemas"]["Shop"])
