"""Redis did it, and its answer was lost: nothing is done twice, and the client is not told what is not so."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Iterator

import anyio
import pytest
from asgi import Act, page, stream
from redis.asyncio import Redis
from redis_server import RedisServer

from asgi_sessions import Session, SessionData, SessionStoreError
from asgi_sessions.asgi import ASGIApp
from asgi_sessions.stores.redis.commands.scripts import (
    ACQUIRE,
    COMMIT,
    COMMIT_UNLOCKED,
    CREATE,
    RELEASE,
    REMOVE,
    SET,
    TAKE,
)
from asgi_sessions.stores.redis.connection.script import Script

from .chaos import ChaosProxy, Direction, Fault, Link, Send, calls, cut, half, reset, swallow, unasked
from .inprocess import Browser, Process, process_at

pytestmark = pytest.mark.anyio

LOSSES: list[tuple[Fault, Direction]] = [
    (reset, "request"),
    (reset, "answer"),
    (cut, "answer"),
    (half, "answer"),
]
LOSS_NAMES = ["before", "after, reset", "after, closed", "after, in the middle of the answer"]


@pytest.fixture
def proxy(redis_url: str, redis_server: RedisServer) -> Iterator[ChaosProxy]:
    with ChaosProxy(redis_server.port) as proxy:
        yield proxy


@pytest.fixture
async def raw(redis_url: str) -> AsyncIterator[Redis]:
    async with Redis.from_url(redis_url) as client:
        yield client


@pytest.fixture
async def process(proxy: ChaosProxy, raw: Redis) -> AsyncIterator[Process]:
    """One that reaches Redis through the proxy."""
    async with process_at(proxy.url) as process:
        yield process


@pytest.fixture
async def elsewhere(redis_url: str) -> AsyncIterator[Process]:
    """One that reaches Redis directly."""
    async with process_at(redis_url) as process:
        yield process


def count(session: Session) -> None:
    session["n"] = session.get("n", 0) + 1


def login(session: Session) -> None:
    session.login("ada")


WALKS: dict[str, tuple[Act, list[Script]]] = {
    "count": (count, [ACQUIRE, COMMIT]),
    "read": (lambda session: session.get("n"), [ACQUIRE, RELEASE]),
    "login": (login, [ACQUIRE, CREATE, REMOVE]),
    "logout": (Session.logout, [ACQUIRE, REMOVE]),
}


@pytest.mark.parametrize(("fault", "on"), LOSSES, ids=LOSS_NAMES)
@pytest.mark.parametrize("form", [page, lambda act: stream(act, None)], ids=["page", "stream"])
@pytest.mark.parametrize(
    ("name", "script"), [(name, script) for name, (_, scripts) in WALKS.items() for script in scripts],
    ids=lambda value: value.name if isinstance(value, Script) else value,
)  # fmt: skip
async def test_a_lost_connection_is_not_noticed(
    process: Process, raw: Redis, proxy: ChaosProxy, name: str, script: Script, fault: Fault, on: Direction,
    form: Callable[[Act], ASGIApp],
) -> None:  # fmt: skip
    """Whichever call it befalls, the call is sent again, what it does is done once, and no lock stays."""
    browser = Browser(process, raw)
    await browser.open(page(count))
    await browser.open(page(count))  # the scripts are known now
    old = browser.key
    plan = proxy.inject(fault, calls(script), on=on)
    answer = await browser.open(form(WALKS[name][0]))
    assert answer.status == 200
    assert await anyio.to_thread.run_sync(plan.hit.wait, 5)
    data = None if browser.cookie is None else await browser.stored()
    expected = {"count": (3, None), "read": (2, None), "login": (2, "ada"), "logout": None}[name]
    assert (data and (data.metadata["n"], data.user_id)) == expected
    assert await raw.exists(old) == (name in ("count", "read"))
    await browser.assert_free()


@pytest.mark.parametrize(("fault", "on"), LOSSES, ids=LOSS_NAMES)
@pytest.mark.parametrize("form", [page, lambda act: stream(act, None)], ids=["page", "stream"])
@pytest.mark.parametrize("script", [TAKE, COMMIT_UNLOCKED], ids=lambda script: script.name)
async def test_a_connection_lost_without_the_lock_is_not_noticed(
    raw: Redis, proxy: ChaosProxy, script: Script, fault: Fault, on: Direction,
    form: Callable[[Act], ASGIApp],
) -> None:  # fmt: skip
    """The same for `lock="auto"`: the count is stored once, and the app is not run again for it."""
    async with process_at(proxy.url, lock="auto") as process:
        browser = Browser(process, raw)
        for _ in range(2):
            await browser.open(page(count))  # the scripts are known then
        runs: list[int] = []

        def act(session: Session) -> None:
            runs.append(1)
            count(session)

        plan = proxy.inject(fault, calls(script), on=on)
        assert (await browser.open(form(act))).status == 200
        assert await anyio.to_thread.run_sync(plan.hit.wait, 5)
        data = await browser.stored()
        assert data is not None
        assert (data.metadata["n"], runs) == (3, [1])
        await browser.assert_free()


@pytest.mark.parametrize(("fault", "on"), LOSSES, ids=LOSS_NAMES)
async def test_a_beginning_is_not_doubled(
    process: Process, raw: Redis, proxy: ChaosProxy, fault: Fault, on: Direction
) -> None:
    """One session begins though its creation is sent twice."""
    browser = Browser(process, raw)
    await browser.open(page(count))
    await raw.flushdb()
    proxy.inject(fault, calls(CREATE), on=on)
    browser.cookie = None
    assert (await browser.open(page(count))).status == 200
    assert await raw.keys() == [browser.key.encode()]


async def test_a_connection_that_breaks_twice_is_answered_503(
    process: Process, raw: Redis, proxy: ChaosProxy
) -> None:
    """The change was stored, or not: 503 does not say; a second request finds out."""
    browser = Browser(process, raw)
    await browser.open(page(count))
    await browser.open(page(count))
    proxy.inject(reset, calls(COMMIT), on="answer", times=2)
    assert (await browser.open(page(count))).status == 503
    await browser.assert_free()
    assert (await browser.open(page(count))).status == 200
    data = await browser.stored()
    assert data is not None
    assert data.metadata["n"] == 4


class Door:
    """A fault that lets a message through when it is opened."""

    def __init__(self) -> None:
        self._opened = threading.Event()
        self.reached = threading.Event()

    def __call__(self, link: Link, message: bytes, send: Send) -> None:
        self.reached.set()
        self._opened.wait(10)
        send(message)

    def open(self) -> None:
        self._opened.set()


@pytest.mark.parametrize("lock", [True, False, "auto"])
@pytest.mark.parametrize("others", [1, 3])
async def test_a_stored_change_is_never_called_refused(
    elsewhere: Process, raw: Redis, proxy: ChaosProxy, others: int, lock: bool | str
) -> None:
    """Stored, the answer lost, and changed by others before it was asked again: not "nothing was stored".

    A client that is told so asks again, and counts twice.
    """
    async with process_at(proxy.url, lock=lock) as process:
        browser = Browser(process, raw)
        await browser.open(page(count))
        await browser.open(page(count))
        status = await lose_answer(browser, elsewhere, proxy, others)
    data = await elsewhere.store.get(browser.session_id)
    assert data is not None
    assert data.metadata["n"] == 3 + others
    assert status in (200, 503)


@pytest.mark.parametrize("on", ["request", "answer"])
async def test_the_app_is_not_run_again_where_a_commit_may_still_arrive(
    elsewhere: Process, raw: Redis, proxy: ChaosProxy, on: Direction
) -> None:
    """A first try was lost on its way, and the second finds a holder: it could count twice."""
    async with process_at(proxy.url, lock="auto", lock_wait=0.5) as process:
        browser = Browser(process, raw)
        for _ in range(2):
            await browser.open(page(count))
        runs: list[int] = []
        held, over = anyio.Event(), anyio.Event()

        async def hold(session: Session) -> None:
            held.set()
            await over.wait()

        async def act(session: Session) -> None:
            runs.append(1)
            group.start_soon(lambda: browser.at(elsewhere).open(page(hold)))
            await held.wait()
            count(session)

        proxy.inject(reset, calls(COMMIT_UNLOCKED), on=on)
        async with anyio.create_task_group() as group:
            assert (await browser.open(page(act))).status == 503
            over.set()
        assert runs == [1]
        assert "lock_timeout" not in process.events, "it waited for its turn to run again"
        await browser.assert_free()


async def lose_answer(browser: Browser, elsewhere: Process, proxy: ChaosProxy, others: int) -> int:
    """Have a count stored, its answer lost, and others count before it is sent again; its status."""
    door = Door()
    commits = calls(COMMIT, COMMIT_UNLOCKED)
    proxy.inject(reset, commits, on="answer")
    proxy.inject(door, commits, skip=1)  # the second try waits there
    statuses: list[int] = []

    async def first() -> None:
        statuses.append((await browser.open(page(count))).status)

    async with anyio.create_task_group() as group:
        group.start_soon(first)
        await anyio.to_thread.run_sync(door.reached.wait, 10)
        for _ in range(others):
            assert (await browser.at(elsewhere).open(page(count))).status == 200
        door.open()
    return statuses[0]


async def test_a_deaf_subscription_delays_but_loses_nothing(
    process: Process, elsewhere: Process, raw: Redis, proxy: ChaosProxy
) -> None:
    """Nobody tells the waiting that it is their turn, and no connection breaks: they find out by asking."""
    browser = Browser(process, raw)
    await browser.open(page(count))
    statuses: list[int] = []

    async def visit(process: Process, act: Act) -> None:
        statuses.append((await browser.at(process).open(page(act))).status)

    async def hold(session: Session) -> None:
        group.start_soon(visit, process, count)
        with anyio.fail_after(10):
            while not await raw.exists(browser.key + ":wait"):  # noqa: ASYNC110  # Redis sets no event
                await anyio.sleep(0.005)
        count(session)

    for _ in range(2):
        with proxy.injecting(swallow, unasked, "answer"):
            async with anyio.create_task_group() as group:
                group.start_soon(visit, elsewhere, hold)
    assert statuses == [200] * 4
    data = await browser.stored()
    assert data is not None
    assert data.metadata["n"] == 5
    await browser.assert_free()


async def test_a_set_that_is_sent_again_takes_nothing_back(
    process: Process, elsewhere: Process, proxy: ChaosProxy
) -> None:
    """Stored, the answer lost, and changed by others since: their acknowledged change is not overwritten."""
    await process.store.set("s", SessionData(session_id="s"))
    door = Door()
    proxy.inject(reset, calls(SET), on="answer")
    proxy.inject(door, calls(SET), skip=1)

    async def first() -> None:
        with contextlib.suppress(SessionStoreError):
            await process.store.set("s", SessionData(session_id="s", metadata={"n": 1}))

    async with anyio.create_task_group() as group:
        group.start_soon(first)
        await anyio.to_thread.run_sync(door.reached.wait, 0.5)  # if there is one, it comes at once
        assert await elsewhere.store.increment_counter("s", "n") == 2
        door.open()
    assert await elsewhere.store.increment_counter("s", "n") == 3
