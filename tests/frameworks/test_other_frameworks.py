"""What frameworks make of the session and of its errors, each where it is installed."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import anyio
import pytest
from asgi import CLIENT, FIREFOX, KEY, empty_body, http_scope
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from asgi_sessions import (
    InMemorySessionStore,
    SessionConflictError,
    SessionData,
    SessionMiddleware,
    SessionStoreError,
    get_session,
)
from asgi_sessions.asgi import ASGIApp, Message
from asgi_sessions.stores.checkout import Checkout, Outcome

pytestmark = pytest.mark.anyio

# Any: their types know no session but their own
litestar: Any = import_module("litestar")
quart: Any = import_module("quart")

Make = Callable[[Any], ASGIApp]


class Refusing(InMemorySessionStore):
    """A store whose commits are refused, or fail, when told to."""

    fails: Outcome | Exception | None = None

    async def commit(self, checkout: Checkout, record: bytes, *, release: bool) -> Outcome:
        if isinstance(self.fails, Exception):
            raise self.fails
        return self.fails or await super().commit(checkout, record, release=release)


def litestar_routes() -> list[Any]:
    """Routes that change the session, store it early, replace it and end it in the framework's ways."""

    async def change(request: Any) -> str:
        request.session["n"] = request.session.get("n", 0) + 1
        return "fine"

    async def save(request: Any) -> str:
        request.session["n"] = 7
        await request.session.save()
        return "fine"

    async def transact(request: Any) -> str:
        async with request.session.transaction():
            request.session["n"] = 7
        return "fine"

    async def replace(request: Any) -> str:
        request.set_session({"n": 5})
        return str(request.session["n"])

    async def wrong(request: Any) -> str:
        request.set_session(SessionData(session_id="s"))
        return "fine"

    async def clear(request: Any) -> str:
        request.clear_session()
        return "out"

    async def show(request: Any) -> dict[str, Any]:
        return dict(request.session)

    for each in (change, save, transact, replace, wrong, clear, show):
        each.__annotations__["request"] = litestar.Request
    posted = {
        "change": change,
        "save": save,
        "transact": transact,
        "set": replace,
        "wrong": wrong,
        "clear": clear,
    }
    return [
        *(litestar.post(f"/{name}")(endpoint) for name, endpoint in posted.items()),
        litestar.get("/")(show),
    ]


def litestar_app(session_middleware: Any) -> ASGIApp:
    """The middleware around the finished app."""
    routes = litestar_routes()
    app: ASGIApp = session_middleware(litestar.Litestar(routes))
    return app


def litestar_inside(session_middleware: Any) -> ASGIApp:
    """The middleware among the framework's own."""
    routes = litestar_routes()
    app: ASGIApp = litestar.Litestar(routes, middleware=[session_middleware])
    return app


def quart_app(session_middleware: Any) -> ASGIApp:
    """The same routes, with the scope's way of replacing."""

    def session() -> Any:
        return quart.request.scope["session"]

    async def change() -> str:
        session()["n"] = session().get("n", 0) + 1
        return "fine"

    async def save() -> str:
        session()["n"] = 7
        await session().save()
        return "fine"

    async def transact() -> str:
        async with session().transaction():
            session()["n"] = 7
        return "fine"

    async def replace() -> str:
        quart.request.scope["session"] = {"n": 5}
        return "5"

    async def wrong() -> str:
        quart.request.scope["session"] = SessionData(session_id="s")
        return "fine"

    async def clear() -> str:
        quart.request.scope["session"] = {}
        return "out"

    async def show() -> dict[str, Any]:
        return dict(session())

    app = quart.Quart(__name__)
    posted = {
        "change": change,
        "save": save,
        "transact": transact,
        "set": replace,
        "wrong": wrong,
        "clear": clear,
    }
    for name, endpoint in posted.items():
        app.post(f"/{name}")(endpoint)
    app.get("/")(show)
    app.asgi_app = session_middleware(app.asgi_app)
    made: ASGIApp = app
    return made


def starlette_app(session_middleware: Any) -> ASGIApp:
    """The middleware around the finished app, whose own error handler comes first then."""

    async def change(request: Request) -> Response:
        request.session["n"] = request.session.get("n", 0) + 1
        return Response("fine")

    async def save(request: Request) -> Response:
        request.session["n"] = 7
        await get_session(request).save()
        return Response("fine")

    async def transact(request: Request) -> Response:
        async with get_session(request).transaction():
            request.session["n"] = 7
        return Response("fine")

    async def replace(request: Request) -> Response:
        request.scope["session"] = {"n": 5}
        return Response("5")

    async def wrong(request: Request) -> Response:
        request.scope["session"] = SessionData(session_id="s")
        return Response()

    async def clear(request: Request) -> Response:
        request.scope["session"] = {}
        return Response()

    async def show(request: Request) -> Response:
        return JSONResponse(dict(request.session))

    paths = {
        "change": change,
        "save": save,
        "transact": transact,
        "set": replace,
        "wrong": wrong,
        "clear": clear,
    }
    routes = [Route(f"/{name}", endpoint, methods=["POST"]) for name, endpoint in paths.items()]
    app: ASGIApp = session_middleware(Starlette(routes=[*routes, Route("/", show)]))
    return app


MAKERS = [starlette_app, litestar_app, litestar_inside, quart_app]


async def ask(
    app: ASGIApp, method: str, path: str, cookie: str | None = None
) -> tuple[int, bytes, dict[bytes, bytes]]:
    """Status, body and headers; the server takes it as an error if the answer is not one whole answer."""
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    body_read = False

    async def receive() -> Message:
        nonlocal body_read
        if body_read:
            await anyio.sleep_forever()  # the client stays; whoever waits for it to leave is cancelled
        body_read = True
        return await empty_body()

    headers = [(b"user-agent", FIREFOX.encode()), (b"host", b"shop.example")]
    if cookie is not None:
        headers.append((b"cookie", f"session={cookie}".encode()))
    scope = http_scope(method=method, path=path, raw_path=path.encode(), headers=headers, client=CLIENT)
    with anyio.fail_after(20):
        await app(scope, receive, send)
    starts = [message for message in sent if message["type"] == "http.response.start"]
    assert len(starts) == 1
    assert not sent[-1].get("more_body")
    body = b"".join(message.get("body", b"") for message in sent)
    return starts[0]["status"], body, dict(starts[0]["headers"])


def cookie_of(headers: dict[bytes, bytes]) -> str | None:
    line = headers.get(b"set-cookie", b"session=").decode()
    return line.partition("=")[2].partition(";")[0] or None


@pytest.mark.parametrize("make", MAKERS)
async def test_sessions_work_and_may_be_replaced(make: Make) -> None:
    """What the framework's own ways of replacing and clearing mean is done."""
    store = InMemorySessionStore()
    app = make(lambda app: SessionMiddleware(app, KEY, store=store))
    _, _, headers = await ask(app, "POST", "/change")
    cookie = cookie_of(headers)
    assert (await ask(app, "GET", "/", cookie))[1] in (b'{"n":1}', b'{"n":1}\n')
    assert (await ask(app, "POST", "/set", cookie))[:2] in ((201, b"5"), (200, b"5"))
    assert b'{"n":5}' in (await ask(app, "GET", "/", cookie))[1]
    status, body, headers = await ask(app, "POST", "/wrong", cookie)
    assert (status, body) == (500, b"The session could not be stored.")
    assert b'{"n":5}' in (await ask(app, "GET", "/", cookie))[1]
    status, _, headers = await ask(app, "POST", "/clear", cookie)
    assert status in (200, 201)
    assert cookie_of(headers) == "null"
    assert await store.list_active() == []


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("path", ["/change", "/save", "/transact", "/transact on a read-only route"])
@pytest.mark.parametrize(
    ("fails", "status"),
    [
        (Outcome.CONFLICT, 409),
        (Outcome.LOST, 409),
        (Outcome.GONE, 409),
        (SessionConflictError("raised by hand"), 409),
        (SessionStoreError("the backend is down"), 503),
    ],
    ids=["conflict", "lost", "gone", "raised", "down"],
)
async def test_a_refused_commit_is_answered_by_us(
    make: Make, path: str, fails: Outcome | Exception, status: int
) -> None:
    """Whatever the framework makes of the error that rises: its own 500 does not tell to try again."""
    store = Refusing()
    path, _, read_only = path.partition(" ")
    app = make(lambda app: SessionMiddleware(app, KEY, store=store, read_only=path if read_only else ()))
    cookie = cookie_of((await ask(app, "POST", "/change"))[2])
    store.fails = fails
    answered, body, headers = await ask(app, "POST", path, cookie)
    assert (answered, headers[b"cache-control"]) == (status, b"no-store")
    assert body.startswith(b"The session ")
    assert headers[b"content-type"].startswith(b"text/plain")
    assert len(store._locks) == 0
