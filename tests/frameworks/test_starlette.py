"""In a Starlette app: the drop-in for its own middleware, and everything that apps do around it."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.datastructures import Secret
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.middleware.gzip import GZipMiddleware
from starlette.middleware.sessions import SessionMiddleware as StarletteSessions
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.testclient import TestClient
from starlette.websockets import WebSocket

from asgi_sessions import (
    InMemorySessionStore,
    LockTimeoutError,
    Session,
    SessionClosedError,
    SessionConflictError,
    SessionData,
    SessionDataError,
    SessionError,
    SessionMiddleware,
    get_session,
    get_session_data,
)

KEY = "k" * 32
TOKEN = re.compile(r"^(?P<name>[^=]+)=(?P<value>[^;]*)")


# --- the same app under both middlewares ----------------------------------------------------------


def flags(request: Request) -> dict[str, bool]:
    return {"accessed": request.scope["session"].accessed, "modified": request.scope["session"].modified}


async def untouched(request: Request) -> Response:
    return JSONResponse(flags(request))


async def show(request: Request) -> Response:
    content = dict(request.session)
    return JSONResponse({"content": content, **flags(request)})


async def put(request: Request) -> Response:
    request.session.update(await request.json())
    return JSONResponse({"content": dict(request.session), **flags(request)})


async def put_default(request: Request) -> Response:
    answer = request.session.setdefault("a", 1)
    return JSONResponse({"answer": answer, "content": dict(request.session), **flags(request)})


async def put_directly(request: Request) -> Response:
    request.scope["session"]["direct"] = [1, {"two": None}]
    return JSONResponse(flags(request))


async def remove(request: Request) -> Response:
    answer = request.session.pop(request.query_params["key"], "none")
    return JSONResponse({"answer": answer, "content": dict(request.session), **flags(request)})


async def clear(request: Request) -> Response:
    request.session.clear()
    return JSONResponse({"content": dict(request.session), **flags(request)})


async def put_and_clear(request: Request) -> Response:
    request.session["a"] = 1
    request.session.clear()
    return JSONResponse(flags(request))


async def mark(request: Request) -> Response:
    request.scope["session"].mark_accessed()
    return JSONResponse(flags(request))


async def missing(request: Request) -> Response:
    request.session["seen"] = True
    raise HTTPException(404, "no such page", headers={"vary": "Accept"})


def plain(request: Request) -> Response:
    request.session["plain"] = request.session.get("plain", 0) + 1
    return JSONResponse({"content": dict(request.session)})


async def own_headers(request: Request) -> Response:
    request.session["own"] = 1
    response = JSONResponse({}, headers={"vary": "Accept-Encoding", "cache-control": "private"})
    response.set_cookie("theme", "dark")
    return response


ROUTES = [
    Route("/untouched", untouched),
    Route("/show", show),
    Route("/put", put, methods=["POST"]),
    Route("/put-default", put_default),
    Route("/put-directly", put_directly),
    Route("/remove", remove),
    Route("/clear", clear),
    Route("/put-and-clear", put_and_clear),
    Route("/mark", mark),
    Route("/missing", missing),
    Route("/plain", plain),
    Route("/own-headers", own_headers),
]


class Seen(NamedTuple):
    """What a client sees of one answer."""

    status: int
    body: Any
    vary: str | None
    set_cookie: str | None


def attributes(set_cookie: str | None) -> str | None:
    """A Set-Cookie header with the value of ours taken out, unless it is the removal's."""
    if set_cookie is None:
        return None
    return TOKEN.sub(lambda m: f"{m['name']}={'null' if m['value'] == 'null' else '...'}", set_cookie)


def session_cookie(response: httpx.Response, name: str = "session") -> str | None:
    found = [line for line in response.headers.get_list("set-cookie") if line.startswith(f"{name}=")]
    assert len(found) <= 1
    return found[0] if found else None


def client_of(middleware: Any, base_url: str = "http://testserver", **options: Any) -> TestClient:
    app = Starlette(routes=ROUTES, middleware=[Middleware(middleware, **{"secret_key": KEY, **options})])
    return TestClient(app, base_url=base_url)


def play(client: TestClient, script: list[tuple[str, Any]], name: str = "session") -> Iterator[Seen]:
    for path, content in script:
        response = client.get(path) if content is None else client.post(path, json=content)
        body = response.json() if "json" in response.headers["content-type"] else response.text
        cookie = session_cookie(response, name)
        yield Seen(response.status_code, body, response.headers.get("vary"), attributes(cookie))


SCRIPTS: dict[str, list[tuple[str, Any]]] = {
    "nothing": [("/untouched", None), ("/untouched", None)],
    "looking at nothing": [("/show", None), ("/mark", None)],
    "first store": [("/put", {"a": 1}), ("/show", None), ("/untouched", None)],
    "values": [("/put", {"ü": ["x", 1.5, None, True, {"deep": {"er": []}}], "": ""}), ("/show", None)],
    "a default": [("/put-default", None), ("/put-default", None), ("/show", None)],
    "without request.session": [("/put-directly", None), ("/show", None)],
    "clear": [("/put", {"a": 1}), ("/clear", None), ("/show", None), ("/untouched", None)],
    "clear without a session": [("/clear", None), ("/show", None)],
    "clear at once": [("/put-and-clear", None), ("/show", None)],
    "clear and begin anew": [("/put", {"a": 1}), ("/clear", None), ("/put", {"b": 2}), ("/show", None)],
    "the last value": [("/put", {"a": 1}), ("/remove?key=a", None), ("/show", None)],
    "a value that is not there": [("/remove?key=a", None), ("/put", {"b": 1}), ("/remove?key=a", None)],
    "an exception that is an answer": [("/missing", None), ("/show", None)],
    "a plain function": [("/plain", None), ("/show", None)],
    "headers of its own": [("/own-headers", None), ("/show", None)],
}


@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
def test_clients_see_the_same(script: list[tuple[str, Any]]) -> None:
    """Bodies, flags, `Vary`, and `Set-Cookie` to the byte but for the value, as under Starlette's own."""
    theirs = list(play(client_of(StarletteSessions), script))
    assert list(play(client_of(SessionMiddleware), script)) == theirs


SETTINGS: list[tuple[str, dict[str, Any]]] = [
    ("http://testserver", {}),
    ("http://testserver", {"session_cookie": "sid"}),
    ("http://testserver", {"max_age": 60}),
    ("http://testserver", {"max_age": None}),
    ("http://testserver", {"max_age": -1}),
    ("http://testserver", {"path": "/put"}),
    ("http://testserver", {"same_site": "strict"}),
    ("http://app.example.com", {"domain": "example.com"}),
    ("http://testserver", {"https_only": False}),
    ("https://testserver", {"https_only": False}),
    ("https://testserver", {"https_only": True}),
    ("http://testserver", {"https_only": True}),
    ("https://testserver", {"https_only": True, "same_site": "none"}),
    ("https://testserver", {"https_only": True, "partitioned": True}),
    (
        "https://app.example.com",
        {"https_only": True, "same_site": "none", "domain": "example.com", "partitioned": True, "path": "/"},
    ),
]


@pytest.mark.parametrize(("base_url", "options"), SETTINGS)
def test_every_argument_means_the_same(base_url: str, options: dict[str, Any]) -> None:
    """The cookie's attributes and their order, and what the client then sends back, are Starlette's."""
    script: list[tuple[str, Any]] = [("/put", {"a": 1}), ("/show", None), ("/clear", None), ("/show", None)]
    name = options.get("session_cookie", "session")
    theirs = list(play(client_of(StarletteSessions, base_url, **options), script, name))
    ours = list(play(client_of(SessionMiddleware, base_url, **options), script, name))
    assert ours == theirs
    assert theirs[0].set_cookie is not None


@pytest.mark.parametrize("cookie", ["null", "", "x", "a.b.c", "%00", '"quoted"', "=" * 50])
def test_a_cookie_that_nobody_signed_is_nothing(cookie: str) -> None:
    """The app finds an empty session and the client is told nothing."""
    seen = []
    for middleware in (StarletteSessions, SessionMiddleware):
        client = client_of(middleware)
        client.headers["cookie"] = f"session={cookie}"
        seen.append(list(play(client, [("/show", None), ("/clear", None)])))
    assert seen[0] == seen[1]


# --- where it differs on purpose ------------------------------------------------------------------


def test_the_cookie_is_sent_once() -> None:
    """The data are on the server and the id stays, so later writes need no Set-Cookie; caches stay useful."""
    script: list[tuple[str, Any]] = [("/put", {"a": 1}), ("/put", {"a": 2}), ("/put", {"b": 3})]
    theirs = [seen.set_cookie is not None for seen in play(client_of(StarletteSessions), script)]
    client = client_of(SessionMiddleware)
    ours = [seen.set_cookie is not None for seen in play(client, script)]
    assert (theirs, ours) == ([True, True, True], [True, False, False])
    assert client.get("/show").json()["content"] == {"a": 2, "b": 3}


def test_an_answer_with_a_cookie_is_not_cached() -> None:
    """A cache that keeps it would hand one visitor's session to all; the app's own header stands."""
    client = client_of(SessionMiddleware)
    first = client.post("/put", json={"a": 1})
    assert first.headers.get_list("cache-control") == ["no-store"]
    assert "cache-control" not in client.post("/put", json={"a": 2}).headers
    assert client.get("/clear").headers.get_list("cache-control") == ["no-store"]
    own = client.get("/own-headers")
    assert own.headers.get_list("cache-control") == ["private"]
    assert len(own.headers.get_list("set-cookie")) == 2


def test_secure_follows_the_request_by_default() -> None:
    """Starlette's default never sets it; ours does where the request came over TLS."""
    script: list[tuple[str, Any]] = [("/put", {"a": 1}), ("/clear", None)]
    over_tls = list(play(client_of(SessionMiddleware, "https://testserver"), script))
    in_clear = list(play(client_of(SessionMiddleware, "http://testserver"), script))
    assert [seen.set_cookie for seen in in_clear] == [
        seen.set_cookie for seen in play(client_of(StarletteSessions), script)
    ]
    assert [seen.set_cookie for seen in over_tls] == [f"{seen.set_cookie}; secure" for seen in in_clear]


def test_reading_the_scope_directly_varies_too() -> None:
    """An app that reads `scope["session"]` answers by the cookie as well, which Starlette's does not say."""

    async def look(request: Request) -> Response:
        return JSONResponse(request.scope["session"].get("a"))

    app = Starlette(routes=[Route("/", look)], middleware=[Middleware(SessionMiddleware, secret_key=KEY)])
    assert TestClient(app).get("/").headers["vary"] == "Cookie"


def test_a_nested_change_is_stored() -> None:
    """Starlette's loses it unless the app calls `mark_modified`."""

    async def add(request: Request) -> Response:
        request.session.setdefault("cart", []).append(1)
        return JSONResponse(request.session["cart"])

    app = Starlette(routes=[Route("/", add)], middleware=[Middleware(SessionMiddleware, secret_key=KEY)])
    client = TestClient(app)
    assert [client.get("/").json() for _ in range(3)] == [[1], [1, 1], [1, 1, 1]]


# --- clients, loops and keys ----------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
@pytest.mark.parametrize("lifespan", [True, False], ids=["with lifespan", "without"])
def test_the_test_client_works_as_ever(backend: Any, lifespan: bool) -> None:
    """On both event loops; without its context manager each request runs in a loop of its own."""
    app = Starlette(routes=ROUTES, middleware=[Middleware(SessionMiddleware, secret_key=KEY)])
    client = TestClient(app, backend=backend)

    def count() -> list[int]:
        return [client.get("/plain").json()["content"]["plain"] for _ in range(3)]

    if lifespan:
        with client:
            assert count() == [1, 2, 3]
    else:
        assert count() == [1, 2, 3]


def test_a_store_that_was_closed_opens_again() -> None:
    """Two lifespans one after the other share one middleware object."""
    store = InMemorySessionStore()
    app = Starlette(routes=ROUTES, middleware=[Middleware(SessionMiddleware, secret_key=KEY, store=store)])
    with TestClient(app) as client:
        client.get("/plain")
        cookies = client.cookies
    with TestClient(app, cookies=cookies) as client:
        assert client.get("/plain").json()["content"] == {"plain": 2}


def test_starlettes_secret_is_a_key() -> None:
    """The cookie that was signed with the text is the one that the `Secret` of that text verifies."""
    store = InMemorySessionStore()
    first = client_of(SessionMiddleware, secret_key=KEY, store=store)
    first.get("/plain")
    second = client_of(SessionMiddleware, secret_key=Secret(KEY), store=store)
    second.cookies = first.cookies
    assert second.get("/plain").json()["content"] == {"plain": 2}


# --- around and inside ----------------------------------------------------------------------------


class Count(BaseHTTPMiddleware):
    """Uses the session in a middleware of the common kind."""

    async def dispatch(self, request: Request, call_next: RequestResponseEndpoint) -> Response:
        request.session["before"] = request.session.get("before", 0) + 1
        response = await call_next(request)
        response.headers["x-before"] = str(request.session["before"])
        return response


class Pass(BaseHTTPMiddleware):
    """Does nothing, in another task."""

    async def dispatch(self, request: Request, call_next: RequestResponseEndpoint) -> Response:
        return await call_next(request)


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_base_http_middleware_around_and_inside(backend: Any) -> None:
    """What runs in other tasks uses the same session, and every change is stored before the answer."""
    app = Starlette(
        routes=ROUTES,
        middleware=[
            Middleware(Pass),
            Middleware(GZipMiddleware, minimum_size=1),
            Middleware(SessionMiddleware, secret_key=KEY),
            Middleware(Count),
            Middleware(Pass),
        ],
    )
    client = TestClient(app, backend=backend)
    for n in (1, 2, 3):
        response = client.get("/plain")
        assert response.json() == {"content": {"before": n, "plain": n}}
        assert response.headers["x-before"] == str(n)


def test_the_middleware_inside_of_a_mount() -> None:
    """Its cookie may have a path of its own, and the outer app has no session."""

    async def outside(request: Request) -> Response:
        return JSONResponse("session" in request.scope)

    inner = Starlette(routes=ROUTES, middleware=[Middleware(SessionMiddleware, secret_key=KEY, path="/shop")])
    client = TestClient(Starlette(routes=[Mount("/shop", inner), Route("/", outside)]))
    assert attributes(client.get("/shop/plain").headers["set-cookie"]) == (
        "session=...; path=/shop; Max-Age=1209600; httponly; samesite=lax"
    )
    assert client.get("/shop/plain").json() == {"content": {"plain": 2}}
    assert client.get("/").json() is False


def test_mounted_routes_share_the_session() -> None:
    """The middleware around the outer app serves all that is mounted in it."""
    routes = [Mount("/a", routes=ROUTES), Mount("/b", app=Starlette(routes=ROUTES))]
    client = TestClient(Starlette(routes=routes, middleware=[Middleware(SessionMiddleware, secret_key=KEY)]))
    assert client.get("/a/plain").json() == {"content": {"plain": 1}}
    assert client.get("/b/plain").json() == {"content": {"plain": 2}}


# --- answers of every kind ------------------------------------------------------------------------


class Shop(SessionData):
    """A model of a user's own."""

    visits: int = 0


def site(*routes: Any, handlers: Any = None, **options: Any) -> tuple[TestClient, InMemorySessionStore]:
    """A client of an app with these routes, a page `/n` that shows `n`, and the store."""
    store = InMemorySessionStore()

    async def n(request: Request) -> Response:
        return JSONResponse(request.session.get("n", 0))

    def start(request: Request) -> Response:
        request.session["n"] = 1
        return Response()

    app = Starlette(
        routes=[Route("/n", n), Route("/start", start), *routes],
        middleware=[Middleware(SessionMiddleware, secret_key=KEY, store=store, **options)],
        exception_handlers=handlers,
    )
    client = TestClient(app, raise_server_exceptions=False)
    client.get("/start")
    return client, store


def test_a_plain_endpoint_uses_all_that_is_synchronous() -> None:
    """In a worker thread: typed record, login, logout."""

    def visit(request: Request) -> Response:
        shop = get_session_data(request, Shop)
        shop.visits += 1
        get_session(request).login("ada")
        return JSONResponse([shop.visits, shop.user_id])

    def leave(request: Request) -> Response:
        get_session(request).logout()
        return Response()

    client, store = site(Route("/visit", visit), Route("/leave", leave), model=Shop)
    before = client.cookies["session"]
    assert client.get("/visit").json() == [1, "ada"]
    assert client.cookies["session"] != before
    assert client.get("/visit").json() == [2, "ada"]
    client.get("/leave")
    assert "session" not in client.cookies
    assert client.get("/n").json() == 0
    assert len(store._entries) == 0


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_stream_may_change_the_session_to_its_end(asynchronous: bool) -> None:
    """A touched session keeps its lock while the body goes out, and what changed is stored with the end."""

    async def stream(request: Request) -> Response:
        session = request.session
        session["n"] = 2

        async def chunks() -> AsyncIterator[str]:
            for _ in range(3):
                session["n"] += 1
                yield "x"

        def plain_chunks() -> Iterator[str]:
            for _ in range(3):
                session["n"] += 1
                yield "x"

        return StreamingResponse(chunks() if asynchronous else plain_chunks())

    client, store = site(Route("/stream", stream))
    assert client.get("/stream").text == "xxx"
    assert client.get("/n").json() == 5
    assert len(store._locks) == 0


def test_a_session_cannot_begin_in_a_stream() -> None:
    """Its cookie can no longer be sent; the app is told at once and the stream breaks off."""

    async def stream(request: Request) -> Response:
        session = request.session

        async def chunks() -> AsyncIterator[str]:
            yield "x"
            session["late"] = 1

        return StreamingResponse(chunks())

    app = Starlette(routes=[Route("/", stream)], middleware=[Middleware(SessionMiddleware, secret_key=KEY)])
    with pytest.raises(SessionClosedError, match=r"session\.transaction\(\)"):
        TestClient(app).get("/")


def test_a_file_is_sent_with_the_session(tmp_path: Path) -> None:
    """A download commits before its first byte, and a range of it does."""
    (tmp_path / "book.txt").write_text("0123456789")

    async def download(request: Request) -> Response:
        request.session["n"] += 1
        return FileResponse(tmp_path / "book.txt")

    client, store = site(Route("/book", download))
    assert client.get("/book").text == "0123456789"
    assert client.get("/book", headers={"range": "bytes=2-4"}).text == "234"
    assert client.head("/book").text == ""
    assert client.get("/n").json() == 4
    assert len(store._locks) == 0


def test_background_tasks_use_a_transaction() -> None:
    """After the answer the session is closed; a transaction takes a turn of its own."""
    errors: list[Exception] = []

    async def later(session: Session) -> None:
        try:
            session["n"] = 100
        except SessionClosedError as error:
            errors.append(error)
        async with session.transaction():
            session["n"] += 1

    async def start(request: Request) -> Response:
        request.session["n"] += 1
        return Response(background=BackgroundTask(later, get_session(request)))

    client, _ = site(Route("/later", start))
    client.get("/later")
    assert client.get("/n").json() == 3
    assert len(errors) == 1
    assert "session.transaction()" in str(errors[0])


@pytest.mark.parametrize(("status", "stored"), [(200, 2), (303, 2), (404, 2), (422, 2), (500, 1), (503, 1)])
def test_a_failed_request_changes_nothing(status: int, stored: int) -> None:
    """Whether the app answers with the error or raises it; a 4xx is an answer like any other."""

    async def answer(request: Request) -> Response:
        request.session["n"] = 2
        return Response(status_code=status)

    async def rise(request: Request) -> Response:
        request.session["n"] = 2
        raise HTTPException(status)

    for endpoint in (answer, rise):
        client, store = site(Route("/fail", endpoint))
        assert client.get("/fail", follow_redirects=False).status_code == status
        assert client.get("/n").json() == stored
        assert len(store._locks) == 0


def test_an_exception_of_the_app_is_answered_by_the_app() -> None:
    """Starlette's own 500 page, or a handler's; nothing is stored."""

    async def fail(request: Request) -> Response:
        request.session["n"] = 2
        raise ZeroDivisionError

    async def explain(request: Request, error: Exception) -> Response:
        return PlainTextResponse("ours", 500)

    for handlers, text in ((None, "Internal Server Error"), ({Exception: explain}, "ours")):
        client, store = site(Route("/fail", fail), handlers=handlers)
        response = client.get("/fail")
        assert (response.status_code, response.text) == (500, text)
        assert client.get("/n").json() == 1
        assert len(store._locks) == 0


# --- errors of the session ------------------------------------------------------------------------


def handler(status: int) -> Callable[[Request, Exception], Response]:
    def answer(request: Request, error: Exception) -> Response:
        return PlainTextResponse(f"page for {type(error).__name__}", status)

    return answer


async def conflict_on_save(request: Request) -> Response:
    session, store = get_session(request), request.app.state.store
    session["n"] = 2
    await store.set(session.session_id, SessionData(session_id=session.session_id, metadata={"n": 10}))
    await session.save()
    return Response()


async def conflict_at_the_end(request: Request) -> Response:
    session, store = get_session(request), request.app.state.store
    session["n"] = 2
    await store.set(session.session_id, SessionData(session_id=session.session_id, metadata={"n": 10}))
    return Response("fine")


async def object_on_save(request: Request) -> Response:
    session = get_session(request)
    session["n"] = object()
    await session.save()
    return Response()


async def raise_timeout(request: Request) -> Response:
    raise LockTimeoutError(1.5)


@pytest.mark.parametrize(
    ("endpoint", "error", "status", "text"),
    [
        (conflict_on_save, None, 409, "The session was changed or ended by another request."),
        (conflict_on_save, SessionConflictError, 409, "page for SessionConflictError"),
        (conflict_on_save, SessionError, 418, "page for SessionConflictError"),
        (object_on_save, None, 500, "The session could not be stored."),
        (object_on_save, SessionDataError, 422, "page for SessionDataError"),
        (object_on_save, SessionDataError, 500, "page for SessionDataError"),
        (raise_timeout, None, 503, "The session is not available right now."),
        (raise_timeout, SessionError, 429, "page for LockTimeoutError"),
        (conflict_at_the_end, None, 409, "The session was changed or ended by another request."),
        (
            conflict_at_the_end,
            SessionConflictError,
            409,
            "The session was changed or ended by another request.",
        ),
        (conflict_on_save, (SessionConflictError, 200), 409, "The session was changed or ended"),
    ],
)
def test_an_app_may_answer_the_sessions_errors(endpoint: Any, error: Any, status: int, text: str) -> None:
    """A handler's own error page gets through; a success, or no handler, gives the middleware's answer."""
    error, answer = error if isinstance(error, tuple) else (error, status)
    client, store = site(Route("/go", endpoint), handlers={error: handler(answer)} if error else None)
    client.app.state.store = store  # type: ignore[attr-defined]  # the app is a Starlette
    response = client.get("/go")
    assert response.status_code == status
    assert response.text.startswith(text)
    assert client.get("/n").json() == (10 if "conflict" in endpoint.__name__ else 1)
    assert len(store._locks) == 0


def test_an_error_page_of_the_users_own() -> None:
    """`error_response` is an app: it finds the error in its scope and gives the whole answer."""

    async def page(scope: Any, receive: Any, send: Any) -> None:
        error = scope["session_error"]
        await PlainTextResponse(f"sorry: {type(error).__name__}", 409)(scope, receive, send)

    client, store = site(Route("/go", conflict_at_the_end), error_response=page)
    client.app.state.store = store  # type: ignore[attr-defined]  # the app is a Starlette
    response = client.get("/go")
    assert (response.status_code, response.text) == (409, "sorry: SessionConflictError")


# --- WebSockets -----------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_a_websocket_shares_the_session(backend: Any) -> None:
    """It sees what requests stored, and requests see its transactions."""

    async def echo(websocket: WebSocket) -> None:
        await websocket.accept()
        session = get_session(websocket)
        await websocket.send_json(session["n"])
        async with session.transaction():
            websocket.session["n"] += 1
        await websocket.send_json(session["n"])
        await websocket.close()

    client, _ = site(WebSocketRoute("/echo", echo))
    with TestClient(client.app, backend=backend, cookies=client.cookies) as other:
        with other.websocket_connect("/echo") as socket:
            assert [socket.receive_json(), socket.receive_json()] == [1, 2]
        assert other.get("/n").json() == 2
