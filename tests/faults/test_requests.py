"""Requests over a real Redis that ask themselves, never answer, raise, or lose their client."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable

import anyio
import pytest
from asgi import KEY, Act, http_scope, page, run, stream
from redis.asyncio import Redis

from asgi_sessions import Session, SessionClosedError, SessionMiddleware
from asgi_sessions.asgi import ASGIApp, Message, Receive, Scope, Send
from asgi_sessions.stores.redis.store import RedisSessionStore

from .inprocess import Browser, process_at

pytestmark = pytest.mark.anyio

SHORT = 0.3  # seconds


@pytest.fixture
async def raw(redis_url: str) -> AsyncIterator[Redis]:
    async with Redis.from_url(redis_url) as client:
        yield client


@pytest.fixture
async def browser(redis_url: str, raw: Redis) -> AsyncIterator[Browser]:
    """A client whose session has begun, at a process where nobody waits long."""
    options = {"lock_timeout": SHORT, "lock_wait": SHORT, "lock_max_hold": 2 * SHORT, "read_only": ["/ro"]}
    async with process_at(redis_url, **options) as process:
        browser = Browser(process, raw)
        await browser.open(page(lambda session: session.update(n=0)))
        yield browser


def write(session: Session) -> None:
    session["n"] = 1


def read(session: Session) -> None:
    session.get("n")


async def number(browser: Browser) -> object:
    data = await browser.stored()
    return None if data is None else data.metadata["n"]


# -- requests to oneself -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("path", "status"), [("/", 503), ("/ro", 200)])
async def test_a_request_to_oneself(browser: Browser, path: str, status: int) -> None:
    """It would wait for its own end: 503 after `lock_wait`, no dead-lock; a read-only route is answered."""
    inner: list[int] = []

    async def ask(session: Session) -> None:
        session["n"] = 1
        inner.append((await browser.open(page(lambda session: session.get("n")), path=path)).status)

    answer = await browser.open(page(ask))
    assert (inner, answer.status) == ([status], 200)
    assert await number(browser) == 1
    await browser.assert_free()


async def test_a_safe_request_to_oneself_without_the_lock(redis_url: str, raw: Redis) -> None:
    """The inner one is served, and comes first; the second run holds the lock, and it is refused then."""
    async with process_at(redis_url, lock="auto", lock_wait=SHORT) as process:
        browser = Browser(process, raw)
        await browser.open(page(lambda session: session.update(n=0)))
        inner: list[int] = []

        async def ask(session: Session) -> None:
            session["n"] += 1
            add = page(lambda session: session.update(n=session["n"] + 10))
            inner.append((await browser.open(add, method="POST")).status)

        assert (await browser.open(page(ask))).status == 200
        assert inner == [200, 503]
        assert await number(browser) == 11
        await browser.assert_free()


async def test_a_request_to_oneself_after_the_release(browser: Browser) -> None:
    """Who lets the lock go first may ask."""

    async def ask(session: Session) -> None:
        session["n"] = 1
        await session.release()
        assert (await browser.open(page(lambda session: session.update(n=session["n"] + 1)))).status == 200

    assert (await browser.open(page(ask))).status == 200
    assert await number(browser) == 2


# -- two middlewares -----------------------------------------------------------------------------------------


class Pair:
    """Two sessions per request, one within the other, in one store or in two."""

    def __init__(self, outer: RedisSessionStore, inner: RedisSessionStore, *, crossed: bool = False) -> None:
        names = ("b", "a") if crossed else ("a", "b")
        stores = (inner, outer) if crossed else (outer, inner)
        self.meeting = anyio.Event()
        self.meet = False
        self._inner = SessionMiddleware(
            self._count, KEY, names[1], store=stores[1], lock_wait=SHORT, fingerprint=None
        )
        self._outer = SessionMiddleware(
            self._count_and_go_on, KEY, names[0], store=stores[0], lock_wait=SHORT, fingerprint=None
        )

    async def visit(self, cookies: dict[str, str]) -> int:
        """One request; the status. Cookies that come are put to the others."""
        sent: list[Message] = []

        async def send(message: Message) -> None:
            sent.append(message)

        async def receive() -> Message:
            return {"type": "http.request", "body": b""}

        header = "; ".join(f"{name}={value}" for name, value in cookies.items()).encode()
        scope = http_scope(headers=[(b"cookie", header)])
        await self._outer(scope, receive, send)
        for name, value in sent[0]["headers"]:
            if name == b"set-cookie":
                key, _, rest = value.decode().partition("=")
                cookies[key] = rest.partition(";")[0]
        return int(sent[0]["status"])

    async def _count_and_go_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["session"]["n"] = scope["session"].get("n", 0) + 1
        if self.meet:
            self.meeting.set()
            await anyio.sleep(SHORT / 3)
        await self._inner(dict(scope), receive, send)

    async def _count(self, scope: Scope, receive: Receive, send: Send) -> None:
        await page(lambda session: session.update(n=session.get("n", 0) + 1))(scope, receive, send)


@pytest.fixture
async def stores(redis_url: str) -> AsyncIterator[list[RedisSessionStore]]:
    """Two stores that share a Redis, with different prefixes."""
    stores = [RedisSessionStore(redis_url, prefix=prefix) for prefix in ("a:", "b:")]
    yield stores
    for store in stores:
        await store.aclose()


async def counted(store: RedisSessionStore, cookie: str) -> object:
    data = await store.get(cookie.partition(".")[0])
    return data and data.metadata["n"]


@pytest.mark.parametrize("second", [0, 1], ids=["one store", "two stores"])
async def test_two_middlewares_count_alike(stores: list[RedisSessionStore], raw: Redis, second: int) -> None:
    """Many requests at once, each with both locks: both sessions count every one."""
    pair = Pair(stores[0], stores[second])
    cookies: dict[str, str] = {}
    assert await pair.visit(cookies) == 200
    assert sorted(cookies) == ["a", "b"]
    async with anyio.create_task_group() as group:
        for _ in range(10):
            group.start_soon(pair.visit, cookies)
    assert await counted(stores[0], cookies["a"]) == 11
    assert await counted(stores[second], cookies["b"]) == 11
    assert await raw.keys("*:lock") == []


async def test_two_middlewares_in_opposite_order(stores: list[RedisSessionStore], raw: Redis) -> None:
    """Each of two requests holds what the other waits for: one at least gives up in time, and says so."""
    pair, crossed = Pair(*stores), Pair(*stores, crossed=True)
    cookies: dict[str, str] = {}
    assert await pair.visit(cookies) == 200
    statuses: list[int] = []

    async def visit(pair: Pair) -> None:
        pair.meet = True
        statuses.append(await pair.visit(cookies))

    with anyio.fail_after(10):
        async with anyio.create_task_group() as group:
            for each in (pair, crossed):
                group.start_soon(visit, each)
    assert 503 in statuses
    assert set(statuses) <= {200, 503}
    done = 1 + statuses.count(200)
    assert [await counted(stores[0], cookies["a"]), await counted(stores[1], cookies["b"])] == [done, done]
    with anyio.fail_after(10):
        while await raw.keys("*:lock"):  # noqa: ASYNC110  # Redis sets no event
            await anyio.sleep(0.01)


# -- sessions that end while others wait for them ------------------------------------------------------------


@pytest.mark.parametrize("end", [Session.logout, Session.regenerate_id])
async def test_who_waited_for_an_end_leaves_nothing(browser: Browser, redis_url: str, end: Act) -> None:
    """Told that there is nothing to wait for, a request expects no message; its process can close at once."""
    async with process_at(redis_url) as elsewhere:
        statuses: list[int] = []

        async def wait() -> None:
            statuses.append((await browser.at(elsewhere).open(page(read))).status)

        async def hold(session: Session) -> None:
            group.start_soon(wait)
            with anyio.fail_after(10):
                while not await browser.raw.exists(browser.key + ":wait"):  # noqa: ASYNC110  # no event
                    await anyio.sleep(0.005)
            await run(end, session)

        async with anyio.create_task_group() as group:
            await browser.open(page(hold))
        assert statuses == [200]
        state = elsewhere.store._states.here()
        assert state is not None
        assert state.subscription._expected == {}


# -- apps that hang, and apps that raise ---------------------------------------------------------------------


async def test_an_app_that_never_answers(browser: Browser) -> None:
    """After `lock_max_hold` the others go on; what it stores when it wakes up at last is refused."""
    wake = anyio.Event()
    statuses: list[int] = []

    async def hang(session: Session) -> None:
        group.start_soon(others)
        await wake.wait()
        session["n"] = 99

    async def others() -> None:
        with anyio.fail_after(10):
            while (await browser.open(page(write))).status != 200:
                pass
        wake.set()

    async def hung() -> None:
        statuses.append((await browser.open(page(hang))).status)

    async with anyio.create_task_group() as group:
        group.start_soon(hung)
    assert statuses == [409]
    assert await number(browser) == 1
    await browser.assert_free()


class AppError(Exception):
    """The app's own error."""


def boom(session: Session) -> None:
    with contextlib.suppress(SessionClosedError):  # after the answer
        session["n"] = 9
    raise AppError


@pytest.mark.parametrize(
    ("app", "left"),
    [
        (page(boom), 0),
        (stream(write, boom), 1),
        (stream(write, write, boom), 1),
        (page(write, then=boom), 1),
    ],
    ids=["before the answer", "in its body", "later in its body", "after it"],
)
async def test_an_app_that_raises(browser: Browser, app: ASGIApp, left: int) -> None:
    """What was said stays stored, what was not is not; the error rises, the lock is free at once."""
    with pytest.raises(AppError):
        await browser.open(app)
    assert await number(browser) == left
    await browser.assert_free()
    assert (await browser.open(page(write))).status == 200


# -- clients that go away ------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [page, lambda act: stream(act, None, None)], ids=["page", "stream"])
@pytest.mark.parametrize("act", [write, Session.regenerate_id, Session.logout])
@pytest.mark.parametrize("error", [OSError, RuntimeError])
async def test_a_client_that_goes_away(
    browser: Browser, form: Callable[[Act], ASGIApp], act: Act, error: type[Exception]
) -> None:
    """`send` fails at each message in turn: the error rises, the lock is free, the record is whole."""
    for place in range(1, 6):
        failed = await _loses_client(browser, form(act), place, error)
        await browser.assert_free()
        assert (await browser.open(page(lambda session: session.update(n=0)))).status in (200, 409)
        if not failed:
            assert place > 2
            return
        browser.cookie = None
        assert (await browser.open(page(lambda session: session.update(n=0)))).status == 200
    pytest.fail("the request never completed")


async def _loses_client(browser: Browser, app: ASGIApp, place: int, error: type[Exception]) -> bool:
    """Whether the n-th message was there to fail."""
    sent: list[Message] = []

    async def deliver(message: Message) -> None:
        sent.append(message)
        if len(sent) == place:
            raise error("the client is gone")

    try:
        await browser.open(app, deliver=deliver)
    except error:
        return True
    return False


async def test_an_app_that_returns_when_its_client_is_gone(browser: Browser) -> None:
    """It stores nothing, for nobody was told anything."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await run(write, scope["session"])
        assert (await receive())["type"] == "http.disconnect"

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    await browser.open(app, receive=receive)
    assert await number(browser) == 0
    await browser.assert_free()
