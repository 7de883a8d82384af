"""`first_ttl`: a record whose client does not send its cookie back lives for a short time only."""

from __future__ import annotations

from typing import Any

import pytest
from asgi import Act, Browser, Site, page, stream

from asgi_sessions import Session, SessionMiddleware, SessionStore
from asgi_sessions.request.arrivals import _MOST, Arrivals
from asgi_sessions.stores.checkout import Checkout

pytestmark = pytest.mark.anyio

FIRST, MAX_AGE = 60.0, 1209600


@pytest.fixture
def anyio_backend(way: str) -> str:
    """On both event loops, over each kind of store that needs no server."""
    return way


@pytest.fixture
def site(way: str) -> Site:
    return Site({"first_ttl": FIRST})


def read(session: Session) -> None:
    session.get("n")


def write(session: Session) -> None:
    session["n"] = 2


async def lives(site: Site, browser: Browser) -> bool:
    return await site.store.exists(browser.session_id)


async def test_a_bot_leaves_nothing_behind(site: Site) -> None:
    """Nobody comes back: the record ends with `first_ttl`. Its cookie would have lived for `max_age`."""
    browser = site.browser()
    answer = await browser.open(page(write))
    assert f"Max-Age={MAX_AGE};" in answer.cookies[0]
    site.clock.now += FIRST - 1
    assert await lives(site, browser)
    site.clock.now += 2
    assert not await lives(site, browser)


@pytest.mark.parametrize("act", [read, write])
@pytest.mark.parametrize(
    "options",
    [
        {}, {"lock": False}, {"lock": "auto"}, {"read_only": ["/"]}, {"idle_timeout": 900.0},
        {"passive": ["/"], "idle_timeout": 900.0}, {"rolling": True}, {"max_age": None},
    ],
    ids=str,
)  # fmt: skip
async def test_who_comes_back_has_a_full_life(site: Site, act: Act, options: dict[str, Any]) -> None:
    """Whatever the request does, and counted from creation."""
    browser = site.browser()
    await browser.open(page(write))
    site.clock.now += FIRST - 1
    site = site.option(**options)
    assert (await browser.open(page(read if "read_only" in options else act))).status == 200
    site.clock.now += 500
    assert await lives(site, browser)
    found = await site.store.checkout(browser.session_id, None, None)
    assert isinstance(found, Checkout)
    if not options:
        assert found.expires_in == pytest.approx(MAX_AGE - FIRST - 499, abs=1)
    assert site.locks == 0


async def test_it_costs_one_call_of_the_store_once(site: Site) -> None:
    """At the first request that brings the cookie; nothing later, and nothing where the option is off."""
    browser = site.browser()
    await browser.open(page(write))
    site.log.clear()
    await browser.open(page(read))
    assert site.log == ["checkout+lock", "arrived", "app", "release", "start 200", "body"]
    plain = ["checkout+lock", "app", "release", "start 200", "body"]
    site.log.clear()
    await browser.open(page(read))
    assert site.log == plain
    site.clock.now += FIRST + 5
    site.log.clear()
    other = site.option()  # a process that has not seen it knows by its age
    await other.browser(cookie=None).open(page())
    site.log.clear()
    await Browser(other, {}, browser.cookie).open(page(read))
    assert site.log == plain
    off = site.option(first_ttl=None)
    browser = off.browser()
    await browser.open(page(write))
    site.log.clear()
    await browser.open(page(read))
    assert site.log == plain


async def test_another_client_is_none_that_came_back(site: Site) -> None:
    """A thief's request leaves the record as it is."""
    browser = site.browser()
    await browser.open(page(write))
    thief = browser.twin(user_agent="curl/8")
    await thief.open(page(read))
    assert "arrived" not in site.log
    site.clock.now += FIRST + 1
    assert not await lives(site, browser)


def login(session: Session) -> None:
    session.login("ada")


def login_by_value(session: Session) -> None:
    session["user"] = "ada"


async def save(session: Session) -> None:
    session["n"] = 1
    await session.save()


async def transact(session: Session) -> None:
    async with session.transaction():
        session["n"] = 1


@pytest.mark.parametrize(
    "app",
    [page(login), page(login_by_value), page(save), page(transact), stream(write, None)],
    ids=["login", "login by value", "save", "transaction", "stream"],
)
@pytest.mark.parametrize("options", [{}, {"release_lock": "response_start"}], ids=str)
async def test_a_sign_in_and_what_goes_on_have_a_full_life(
    site: Site, app: Any, options: dict[str, Any]
) -> None:
    """Nobody is signed out in seconds, and no request loses the session that it began and still has."""
    browser = site.browser()
    site = site.option(**options)
    await browser.twin(site=site).open(app)
    (data,) = site.records()
    site.clock.now += FIRST + 1
    assert await site.store.exists(data.session_id)


async def test_a_websocket_has_a_full_life(site: Site) -> None:
    """It stays connected, and sends its cookie once."""
    sent = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        async with scope["session"].transaction():
            scope["session"]["n"] = 1
        await send({"type": "websocket.accept"})

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "websocket", "path": "/", "headers": [], "client": ("203.0.113.7", 1), "scheme": "ws"}
    await SessionMiddleware(app, "k" * 32, store=site.store, first_ttl=FIRST)(scope, None, send)  # type: ignore[arg-type]
    (data,) = site.records()
    site.clock.now += FIRST + 1
    assert await site.store.exists(data.session_id)


async def test_a_life_of_its_own_counts_when_the_client_is_back(site: Site) -> None:
    """`set_expiry` at the creation of an anonymous session."""

    def act(session: Session) -> None:
        session["n"] = 1
        session.set_expiry(600)

    browser = site.browser()
    await browser.open(page(act))
    await browser.open(page(read))
    site.clock.now += 599
    assert await lives(site, browser)
    site.clock.now += 2
    assert not await lives(site, browser)


async def test_an_idle_timeout_that_became_shorter_ends_no_first_visit(site: Site) -> None:
    """Nobody was idle for longer than since creation."""
    site = site.option(idle_timeout=900.0)
    browser = site.browser()
    await browser.open(page(write))
    site.clock.now += 30
    shorter = site.option(idle_timeout=100.0)
    await browser.twin(site=shorter).open(page(read))
    assert await lives(site, browser)


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize("idle_timeout", [None, 900.0])
async def test_over_each_store(store: SessionStore, idle_timeout: float | None) -> None:
    """Found by the time to live that is left."""
    site = Site({"store": store, "first_ttl": 3600.0, "idle_timeout": idle_timeout})
    browser = site.browser()
    await browser.open(page(write))
    await browser.open(page(read))
    found = await store.checkout(browser.session_id, None, None)
    assert isinstance(found, Checkout)
    assert found.expires_in == pytest.approx(MAX_AGE, abs=2)
    assert found.idle == idle_timeout


async def test_what_is_remembered_has_a_bound() -> None:
    """Of the sessions whose client came back."""
    arrivals = Arrivals(60)
    for number in range(3 * _MOST):
        arrivals.note(str(number))
    assert len(arrivals) <= _MOST


@pytest.mark.parametrize("wrong", [0, -1, "60", True, float("nan")])
def test_a_wrong_value_fails_at_the_start(wrong: Any) -> None:
    """With the name of the option."""
    with pytest.raises((TypeError, ValueError), match="first_ttl"):
        SessionMiddleware(lambda *_: None, "k" * 32, first_ttl=wrong)  # type: ignore[arg-type]
