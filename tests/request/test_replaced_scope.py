"""What an app puts into `scope["session"]` in place of the session: nothing is dropped silently."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from asgi import Answer, Site, chunk, http_scope, messages, page, start
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.middleware.sessions import Session as StarletteSession
from starlette.middleware.sessions import SessionMiddleware as StarletteMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.testclient import TestClient

from asgi_sessions import (
    InMemorySessionStore,
    ReadOnlySessionError,
    SessionClosedError,
    SessionData,
    SessionMiddleware,
)
from asgi_sessions.asgi import ASGIApp, Message, Receive, Scope, Send

pytestmark = pytest.mark.anyio

KEY = "k" * 32
Put = Callable[[Scope], object]


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class OldEmpty:
    """As older Litestars have it: the class itself is put there."""


OldEmpty.__module__ = "litestar.types.empty"


def putting(*values: Any, then: ASGIApp | None = None) -> ASGIApp:
    """An app that replaces the session by each value in turn, and answers."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        for value in values:
            scope["session"] = value
        await (then or page())(scope, receive, send)

    return app


async def deleting(scope: Scope, receive: Receive, send: Send) -> None:
    del scope["session"]
    await send(start())
    await send(chunk(b"ok"))


ENDS = {
    "{}": putting({}),
    "None": putting(None),
    "Litestar's class": putting(OldEmpty),
    "an instance of it": putting(OldEmpty()),
    "deleted": deleting,
    "a stream": putting({}, then=messages(start(), chunk(b"a", more=True), chunk())),
    "no body": putting({}, then=messages(start(204), chunk())),
    "a start alone": putting({}, then=messages(start())),
    "twice": putting({"n": 1}, {}),
}


@pytest.mark.parametrize("name", ENDS)
async def test_what_is_empty_ends_the_session(name: str) -> None:
    """The record is deleted and the cookie removed, as by `clear()`: who signed out is signed out."""
    site = Site()
    browser = site.browser()
    await browser.open(page(lambda session: session.login("ada")))
    site.events.clear()
    answer = await browser.open(ENDS[name])
    assert answer.status in (200, 204)
    assert browser.cookie is None
    assert site.records() == []
    assert site.events == ["session_ended"]
    assert site.locks == 0


async def test_a_dict_takes_the_place_of_the_values() -> None:
    """The record's fields stay; the id too, unless somebody else signs in by it."""
    site = Site()
    browser = site.browser()
    before = await browser.begin(old=1, kept=1)
    await browser.open(page(lambda session: setattr(session.data, "escalated", True)))
    await browser.open(putting({"kept": 1, "new": [2]}))
    assert await browser.stored() == {"kept": 1, "new": [2]}
    assert browser.session_id == before
    assert site.records()[0].escalated
    await browser.open(putting({"user": "ada"}))
    assert await browser.stored() == {"user": "ada"}
    assert browser.session_id != before


async def test_a_session_can_begin_by_it() -> None:
    """Where there was none."""
    site = Site()
    browser = site.browser()
    await browser.open(putting({"n": 1}))
    assert await browser.stored() == {"n": 1}


@pytest.mark.parametrize("value", [{}, None, {"n": 0}], ids=["{}", "None", "a copy"])
@pytest.mark.parametrize("known", [True, False])
async def test_what_says_nothing_new_changes_nothing(value: Any, known: bool) -> None:
    """Nothing in place of nothing, or a copy of the values: on a read-only route too."""
    site = Site({"read_only": "/"})
    browser = site.browser()
    if known:
        await browser.open(page(lambda session: session.update(n=0)), path="/write")
    elif value:
        value = {}
    if known and not value:
        value = {"n": 0}
    site.log.clear()
    answer = await browser.open(putting(value))
    assert (answer.status, answer.cookies) == (200, [])
    assert [call for call in site.log if call in ("commit+release", "create", "discard")] == []


@pytest.mark.parametrize(
    ("value", "found"),
    [(SessionData(session_id="s"), "SessionData"), (["n"], "list"), ("x", "str"), (0, "int")],
)
async def test_anything_else_is_an_error_that_says_what_to_do(value: object, found: str) -> None:
    """Answered 500; the old session lives on."""
    told: list[Any] = []
    site = Site({"on_event": told.append})
    browser = site.browser()
    await browser.begin(n=1)
    told.clear()
    answer = await browser.open(putting(value), path="/logout", method="POST")
    assert (answer.status, answer.body) == (500, b"The session could not be stored.")
    (event,) = told
    assert event.name == "unstorable_value"
    assert event.details["path"] == "scope['session']"
    assert event.details["route"] == "POST /logout"
    for part in (found, "put a dict there", "None to end"):
        assert part in event.details["reason"]
    assert await browser.stored() == {"n": 1}
    assert site.locks == 0


async def test_an_unstorable_dict_is_an_error_as_ever() -> None:
    """The value is named."""
    site = Site()
    browser = site.browser()
    await browser.begin(n=1)
    assert (await browser.open(putting({"n": {1}}))).status == 500
    assert await browser.stored() == {"n": 1}


async def test_a_failed_request_changes_nothing() -> None:
    """Whatever it put there."""
    site = Site()
    browser = site.browser()
    await browser.begin(n=1)
    for value in (dict[str, int](), ["n"]):
        answer = await browser.open(putting(value, then=page(status=500)))
        assert (answer.status, answer.cookies) == (500, [])
    assert await browser.stored() == {"n": 1}


@pytest.mark.parametrize("value", [{}, {"n": 2}, None])
async def test_a_read_only_session_is_not_replaced(value: Any) -> None:
    """It raises as any change does there."""
    site = Site({"read_only": "/look"})
    browser = site.browser()
    await browser.begin(n=1)
    with pytest.raises(ReadOnlySessionError, match=r"transaction\(\)"):
        await browser.open(putting(value), path="/look")
    assert await browser.stored() == {"n": 1}


def late(moment: str) -> ASGIApp:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if moment == "changed":
            scope["session"]["m"] = 1
        await send(start())
        await send(chunk(b"a", more=True))
        if moment != "after":
            scope["session"] = {}
        await send(chunk())
        if moment == "after":
            scope["session"] = {}

    return app


@pytest.mark.parametrize("moment", ["within", "after"])
async def test_too_late_is_an_error(moment: str) -> None:
    """A stream that let its session go, an answer that has left: the server hears of it."""
    site = Site()
    browser = site.browser()
    await browser.begin(n=1)
    with pytest.raises(SessionClosedError):
        await browser.open(late(moment))
    assert await browser.stored() == {"n": 1}


async def test_a_stream_that_holds_its_session_may_still_replace_it() -> None:
    """The last chunk stores it."""
    site = Site()
    browser = site.browser()
    await browser.begin(n=1)
    await browser.open(late("changed"))
    assert site.records() == []


@pytest.mark.parametrize("moment", ["before accept", "accepted", "closed"])
async def test_websockets(moment: str) -> None:
    """The session has no lock there: the error rises before the accept, and closes it after."""
    site = Site()
    browser = site.browser()
    await browser.begin(n=1)
    sent: list[Message] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if moment == "before accept":
            scope["session"] = {}
        await send({"type": "websocket.accept"})
        scope["session"] = {}
        if moment == "closed":
            await send({"type": "websocket.close", "code": 1000})

    async def send(message: Message) -> None:
        sent.append(message)

    cookie = f"session={browser.cookie}".encode()
    scope = http_scope(
        type="websocket",
        scheme="ws",
        headers=[(b"cookie", cookie), (b"user-agent", (browser.user_agent or "").encode())],
        **{"tests.app": app},
    )
    if moment == "before accept":
        with pytest.raises(ReadOnlySessionError):
            await site.middleware(scope, no_message, send)
        assert sent == []
    else:
        await site.middleware(scope, no_message, send)
        assert [message.get("code") for message in sent] == [None, 1008]
    assert await browser.stored() == {"n": 1}


async def no_message() -> Message:
    return {"type": "websocket.connect"}


async def test_the_handle_of_another_middleware_is_its_own() -> None:
    """One further inside has put it there: it means nothing to us."""
    site = Site()
    browser = site.browser()
    await browser.begin(n=1)
    admin = StarletteMiddleware(page(lambda session: session.update(admin=True)), KEY, session_cookie="admin")
    answer: Answer = await browser.open(admin)
    assert [line.partition("=")[0] for line in answer.cookies] == ["admin"]
    await browser.open(putting(StarletteSession()))
    assert await browser.stored() == {"n": 1}


# --- frameworks -------------------------------------------------------------------------------------


async def sign_in(request: Request) -> Response:
    request.session["user"] = "ada"
    return Response()


async def sign_out(request: Request) -> Response:
    request.scope["session"] = {}
    return Response(status_code=201)


async def swap(request: Request) -> Response:
    request.scope["session"] = {"n": 2}
    return JSONResponse(dict(request.session))


async def show(request: Request) -> Response:
    return JSONResponse(dict(request.session))


async def passing(request: Request, call_next: Any) -> Any:
    return await call_next(request)


ROUTES = [
    Route("/in", sign_in, methods=["POST"]),
    Route("/out", sign_out, methods=["POST"]),
    Route("/swap", swap, methods=["POST"]),
    Route("/", show),
]


@pytest.mark.parametrize("prefix", ["", "/mounted", "/deep/er"])
@pytest.mark.parametrize("around", [[], [Middleware(BaseHTTPMiddleware, dispatch=passing)]], ids=["", "base"])
def test_starlette(prefix: str, around: list[Middleware]) -> None:
    """In mounts and behind its middleware classes the scope is the one that we were called with."""
    store = InMemorySessionStore()
    app = Starlette(
        routes=[
            *ROUTES,
            Mount("/mounted", routes=ROUTES),
            Mount("/deep", routes=[Mount("/er", routes=ROUTES)]),
        ]
    )
    for each in around:
        app.add_middleware(each.cls, *each.args, **each.kwargs)
    app.add_middleware(SessionMiddleware, secret_key=KEY, store=store)
    client = TestClient(app)
    client.post(f"{prefix}/in")
    assert client.get(f"{prefix}/").json() == {"user": "ada"}
    assert client.post(f"{prefix}/swap").json() == {"n": 2}
    assert client.get(f"{prefix}/").json() == {"n": 2}
    assert client.post(f"{prefix}/out").status_code == 201
    assert "session" not in client.cookies
    assert len(store._entries) == 0
