"""A test can begin, see and end the sessions of an app, with each client and wherever the middleware lies."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
import litestar.testing
import pytest
import quart
import starlette.testclient
from asgi import PrimitiveStore
from starlette.applications import Starlette

from asgi_sessions import (
    InMemorySessionStore,
    RedisSessionStore,
    SessionData,
    SessionDataError,
    SessionMiddleware,
    SessionStore,
    SQLiteSessionStore,
    get_session,
    testing,
)
from asgi_sessions.testing import ManualClock, end_session, session_cookie, session_of, sessions, signed_in

from .apps import APPS, SECRET, ShopSession, bare
from .apps import starlette as starlette_app

pytestmark = pytest.mark.anyio

CLIENTS: dict[str, Callable[[Any], AbstractContextManager[Any]]] = {
    "starlette": starlette.testclient.TestClient,
    "litestar": litestar.testing.TestClient,
}
WITH_WHO = [name for name in APPS if name != "quart"]


def http_client(app: Any, **options: Any) -> httpx.AsyncClient:
    """An httpx client that speaks with the app."""
    return httpx.AsyncClient(
        transport=httpx.ASGITransport(app=app), **{"base_url": "http://testserver", **options}
    )


@pytest.fixture
async def client() -> AsyncIterator[httpx.AsyncClient]:
    """An httpx client of a Starlette app with the shop's model and a store of its own."""
    async with http_client(starlette_app(store=InMemorySessionStore(), model=ShopSession)) as client:
        yield client


@pytest.mark.parametrize("kind", WITH_WHO)
@pytest.mark.parametrize("name", CLIENTS)
def test_a_cookie_signs_any_client_in(name: str, kind: str) -> None:
    """The middleware is found in the stack of each framework, and the fingerprint lets any client in."""
    app = APPS[kind](store=InMemorySessionStore())
    with CLIENTS[name](app) as client:
        client.cookies.update(session_cookie(app, "eve", theme="dark"))
        assert client.get("/who").json() == {"user": "eve", "values": {"theme": "dark"}}


@pytest.mark.parametrize("kind", WITH_WHO)
async def test_a_cookie_can_be_had_in_a_running_loop(kind: str) -> None:
    """The function is a plain one in async tests too."""
    app = APPS[kind](store=InMemorySessionStore())
    async with http_client(app, cookies=session_cookie(app, user_id="eve")) as client:
        assert (await client.get("/who")).json()["user"] == "eve"


async def test_with_encryption() -> None:
    """A session of the kit is encrypted as any other, and is looked at like any other."""
    store = InMemorySessionStore(encryption_keys=[b"k" * 32])
    app = starlette_app(store=store)
    async with http_client(app, cookies=session_cookie(app, "eve", theme="dark")) as client:
        data = session_of(client)
        assert data is not None
        assert (data.user_id, data.metadata) == ("eve", {"theme": "dark"})
    assert [data.user_id for data in await store.list_for_user("eve")] == ["eve"]
    assert not any(b"dark" in entry.record for entry in store._entries.values())


async def test_a_cookie_works_for_a_client_of_another_framework() -> None:
    """Quart's test client takes name and value."""
    app = APPS["quart"](store=InMemorySessionStore())

    @app.route("/who")  # type: ignore[untyped-decorator]  # the app is Any
    async def who() -> str:
        return str(get_session(quart.request).data.user_id)

    client = app.test_client()
    for name, value in session_cookie(app).items():
        client.set_cookie("localhost", name, value)
    assert await (await client.get("/who")).get_data(as_text=True) == "ada"
    with pytest.raises(TypeError, match=r"session_cookie\(app\)"):
        signed_in(client)


@pytest.mark.parametrize("anyio_backend", ["trio"])
async def test_the_kit_works_on_trio(client: httpx.AsyncClient, anyio_backend: str) -> None:
    """The store in memory is asked from a loop of its own."""
    with signed_in(client):
        assert (await client.get("/who")).json()["user"] == "ada"


@pytest.mark.parametrize("name", CLIENTS)
def test_a_client_is_signed_in_for_a_block(name: str) -> None:
    """Afterwards it is as before, and the session has ended."""
    app = bare(store=InMemorySessionStore())
    with CLIENTS[name](app) as client:
        client.get("/visit")
        with signed_in(client, "eve") as same:
            assert same is client
            assert client.get("/who").json()["user"] == "eve"
            cookies = dict(client.cookies)
        assert session_of(cookies, app=app) is None
        assert client.get("/visit").json() == 2


async def test_an_async_client_is_signed_in_for_a_block(client: httpx.AsyncClient) -> None:
    """With a plain `with`; without one it stays signed in."""
    with signed_in(client, user_id="eve"):
        assert (await client.get("/who")).json()["user"] == "eve"
    assert (await client.get("/who")).json()["user"] is None
    signed_in(client)
    assert (await client.get("/who")).json()["user"] == "ada"


async def test_the_app_goes_on_with_the_cookie(client: httpx.AsyncClient) -> None:
    """A new id and a log-out replace the cookie, as in a browser: there is never a second one."""
    with signed_in(client):
        assert (await client.get("/login")).is_success
        assert client.cookies["session"]
        assert (await client.get("/who")).json()["user"] == "eve"
        await client.get("/logout")
        assert "session" not in client.cookies
        assert session_of(client) is None


async def test_a_look_at_the_session(client: httpx.AsyncClient) -> None:
    """Typed fields and values, of the client or as an answer left them."""
    app = client._transport.app  # type: ignore[attr-defined]  # of an ASGITransport
    signed_in(client, cart=["pen"], theme="dark")
    answer = await client.get("/visit")
    for seen in (
        session_of(client, ShopSession),
        session_of(answer, ShopSession, app=app),
        session_of(dict(client.cookies), ShopSession, app=app),
    ):
        assert seen is not None
        assert (seen.user_id, seen.cart, seen.metadata) == ("ada", ["pen"], {"theme": "dark", "visits": 1})
    moved = await client.get("/login")
    assert getattr(session_of(moved, app=app), "user_id", None) == "eve"
    assert session_of(answer, app=app) is None  # its id was replaced
    assert session_of(await client.get("/logout"), app=app) is None


async def test_two_cookies_count_as_they_do_in_the_app(client: httpx.AsyncClient) -> None:
    """Two live sessions: neither. One of them has ended: the other."""
    app = client._transport.app  # type: ignore[attr-defined]  # of an ASGITransport
    one, other = session_cookie(app, "one"), session_cookie(app, "other")
    client.cookies.set("session", one["session"], path="/who")
    client.cookies.set("session", other["session"])
    assert session_of(client) is None
    assert (await client.get("/who")).json()["user"] is None
    assert end_session(one, app=app)
    assert getattr(session_of(client), "user_id", None) == "other"
    assert (await client.get("/who")).json()["user"] == "other"


async def test_there_is_nothing_to_see(client: httpx.AsyncClient) -> None:
    """No cookie, a forged one, a session that has ended: absence is a value."""
    app = client._transport.app  # type: ignore[attr-defined]  # of an ASGITransport
    assert session_of(client) is None
    assert end_session(client) is False
    assert session_of({"session": "forged"}, app=app) is None
    assert session_of({}, app=app) is None
    signed_in(client)
    assert end_session(client) is True
    assert session_of(client) is None
    assert (await client.get("/who")).json()["user"] is None


def test_time_passes_by_hand() -> None:
    """`max_age` and `idle_timeout` go by the clock of the store."""
    clock = ManualClock()
    app = bare(store=InMemorySessionStore(clock=clock), max_age=100, idle_timeout=10)
    with starlette.testclient.TestClient(app) as client:
        signed_in(client)
        for _ in range(9):
            clock.advance(9.9)
            assert client.get("/who").json()["user"] == "ada"
        assert session_of(client) is not None
        clock.advance(10)
        assert session_of(client) is None
        assert client.get("/who").json()["user"] is None
    with pytest.raises(ValueError, match="from 0 upwards"):
        clock.advance(-1)


@pytest.mark.parametrize("kind", ["sqlite", "redis"])
async def test_every_store(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """A store that is shared by processes too, from within a running loop."""
    store: SessionStore
    if kind == "sqlite":
        store = SQLiteSessionStore(tmp_path / "sessions.db")
    else:
        store = RedisSessionStore(request.getfixturevalue("redis_url"))
    async with http_client(bare(store=store)) as client:
        with signed_in(client):
            assert (await client.get("/visit")).json() == 1
            seen = session_of(client)
            assert seen is not None
            assert seen.metadata == {"visits": 1}
            assert await store.list_for_user("ada")
        assert await store.list_for_user("ada") == []
    await store.aclose()


async def test_a_store_that_waits_for_the_test_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request of the test's loop is within an operation: it could not go on, and waiting would not end."""
    monkeypatch.setattr(sessions, "_PATIENCE", 0.05)
    store = PrimitiveStore(clock=time.time)
    app = bare(store=store)
    cookie = session_cookie(app)
    (session_id,) = await store.list_active()
    async with store._primitives.hold(session_id):
        with pytest.raises(TimeoutError, match="let that request go on first"):
            end_session(cookie, app=app)
    assert end_session(cookie, app=app)


@pytest.mark.parametrize("name", testing.__all__)
def test_what_is_public_is_described(name: str) -> None:
    """Each name has a docstring."""
    assert (getattr(testing, name).__doc__ or "").strip()
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = testing.nothing


# --- what is refused -------------------------------------------------------------------------------


def test_an_app_without_the_middleware() -> None:
    """The error says what to do."""
    with pytest.raises(ValueError, match=r"no asgi_sessions\.SessionMiddleware in this Starlette: add it"):
        session_cookie(Starlette())


def test_an_app_with_two_middlewares() -> None:
    """Which one is meant is for the test to say."""
    from starlette.routing import Mount

    one, other = (bare(session_cookie=name, store=InMemorySessionStore()) for name in ("one", "other"))
    with pytest.raises(ValueError, match="'one', 'other': pass the one that is meant"):
        session_cookie(Starlette(routes=[Mount("/one", one), Mount("/other", other)]))
    assert list(session_cookie(other)) == ["other"]


def test_a_client_that_does_not_tell_its_app() -> None:
    """`app=` says it."""
    with httpx.Client(base_url="http://testserver") as client:
        with pytest.raises(TypeError, match="pass app="):
            signed_in(client)
        with signed_in(client, app=bare(store=InMemorySessionStore())):
            assert "session" in client.cookies
        assert "session" not in client.cookies


@pytest.mark.parametrize(
    ("options", "base_url", "remedy"),
    [
        ({"https_only": True}, "http://testserver", "needs base_url='https://"),
        ({"domain": "example.com"}, "http://testserver", "a host in it"),
        ({}, "", "give the client a base_url"),
    ],
)
def test_a_client_that_would_not_send_the_cookie(options: dict[str, Any], base_url: str, remedy: str) -> None:
    """Its base URL does not fit; the error says which one does, and the client is as before."""
    app = bare(store=InMemorySessionStore(), **options)
    client = http_client(app, base_url=base_url)
    with pytest.raises(ValueError, match=remedy):
        signed_in(client)
    assert not client.cookies


@pytest.mark.parametrize(
    ("options", "base_url"),
    [
        ({"https_only": True, "session_cookie": "__Host-session"}, "https://testserver"),
        ({"domain": "example.com"}, "http://shop.example.com"),
        ({"path": "/who"}, "http://testserver:8000"),
    ],
)
async def test_a_client_whose_url_fits_the_cookie(options: dict[str, Any], base_url: str) -> None:
    """Secure cookies, cookies of a domain and of a path come where a browser would send them."""
    app = bare(store=InMemorySessionStore(), **options)
    async with http_client(app, base_url=base_url) as client:
        with signed_in(client):
            assert (await client.get("/who")).json()["user"] == "ada"
        assert not client.cookies


def test_a_session_that_no_app_could_begin() -> None:
    """Empty, of nobody's, with a wrong field, with what JSON cannot hold, with no time to live."""
    app = bare(store=InMemorySessionStore(), model=ShopSession)
    with pytest.raises(ValueError, match="an empty session is never stored"):
        session_cookie(app, None)
    with pytest.raises(ValueError, match="needs the id of a user"):
        session_cookie(app, "")
    with pytest.raises(ValueError, match="cart"):
        session_cookie(app, cart=7)
    with pytest.raises(SessionDataError, match=r"metadata\.f "):
        session_cookie(app, f=object())
    with pytest.raises(ValueError, match="max_age"):
        session_cookie(bare(max_age=-1, store=InMemorySessionStore()))


def test_a_source_of_another_kind() -> None:
    """What is no client, no answer and no dict is refused, and so is a model that the app does not have."""
    app = bare(store=InMemorySessionStore())
    with pytest.raises(TypeError, match="no client and no answer"):
        session_of("session=…", app=app)
    with pytest.raises(TypeError, match="pass it model=ShopSession"):
        session_of(session_cookie(app), ShopSession, app=app)


def test_the_session_belongs_to_no_client_and_lives_as_others_do() -> None:
    """No fingerprint; the life is the middleware's; an anonymous session has no user."""
    clock = ManualClock()
    app = SessionMiddleware(None, SECRET, max_age=60, store=InMemorySessionStore(clock=clock))  # type: ignore[arg-type]
    cookie = session_cookie(app, None, step=2)
    seen = session_of(cookie, app=app)
    assert isinstance(seen, SessionData)
    assert (seen.fingerprint, seen.user_id, seen.metadata) == (None, None, {"step": 2})
    clock.advance(60)
    assert session_of(cookie, app=app) is None


def test_no_client_and_no_pytest_is_needed() -> None:
    """The kit is imported, and makes a cookie, without pytest, httpx or a framework."""
    code = (
        "import sys\n"
        "for name in ('pytest', 'httpx', 'starlette', 'redis'): sys.modules[name] = None\n"
        "from asgi_sessions import SessionMiddleware\n"
        "from asgi_sessions.testing import session_cookie, session_of\n"
        "app = SessionMiddleware(None, 'k' * 32)\n"
        "print(session_of(session_cookie(app), app=app).user_id)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "ada"
