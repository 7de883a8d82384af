"""A request that has waited a second for the lock says who holds it, in whatever process, dead or alive."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest
from asgi import KEY, PrimitiveStore, empty_body, http_scope, page
from redis.asyncio import Redis

from asgi_sessions import (
    InMemorySessionStore,
    RedisSessionStore,
    Session,
    SessionData,
    SessionEvent,
    SessionMiddleware,
    SessionStore,
    SQLiteSessionStore,
)
from asgi_sessions.asgi import ASGIApp, Message
from asgi_sessions.observation.events import LOCK_HELD, RUN_TWICE, EventSink
from asgi_sessions.stores.checkout import Checkout
from asgi_sessions.stores.redis.commands.who import read

pytestmark = pytest.mark.anyio

PATIENCE = 20  # seconds for what comes after one
ID = "0123456789abcdef" * 2
RECORD = f"session:{{{ID}}}"
LOCK = f"{RECORD}:lock"

MAKE: dict[str, Callable[[str], SessionStore]] = {
    "memory": lambda url: InMemorySessionStore(),
    "four primitives": lambda url: PrimitiveStore(clock=time.monotonic),
    "SQLite": SQLiteSessionStore,
    "Redis": RedisSessionStore,
}


class Served:
    """A middleware over a store, and what it told."""

    def __init__(self, store: SessionStore) -> None:
        self.store = store
        self.told: list[SessionEvent] = []
        self.is_told = anyio.Event()
        self.middleware = SessionMiddleware(
            self._app, KEY, store=store, fingerprint=None, lock_wait=60, on_event=self._note
        )
        cookie = self.middleware._settings.cookie
        self._cookie = cookie.render(ID, max_age=None, secure=False).partition(b";")[0]

    async def ask(self, path: str, app: ASGIApp | None = None, method: str = "GET") -> int:
        """The status of the answer."""
        sent: list[Message] = []

        async def send(message: Message) -> None:
            sent.append(message)

        headers = [(b"cookie", self._cookie)]
        scope = http_scope(path=path, method=method, headers=headers, **{"tests.app": app or page()})
        await self.middleware(scope, empty_body, send)
        return int(sent[0]["status"])

    async def _app(self, scope: Any, receive: Any, send: Any) -> None:
        await scope["tests.app"](scope, receive, send)

    def _note(self, event: SessionEvent) -> None:
        if event.name == LOCK_HELD:
            self.told.append(event)
            self.is_told.set()


class Hold:
    """What an app does that holds its session until it may go on."""

    def __init__(self, *, writes: bool = False) -> None:
        self.began, self.may_end = anyio.Event(), anyio.Event()
        self._writes = writes

    async def __call__(self, session: Session) -> None:
        if self._writes:
            session["n"] = session.get("n", 0) + 1
        self.began.set()
        await self.may_end.wait()


@asynccontextmanager
async def served(store: SessionStore) -> AsyncIterator[Served]:
    await store.set(ID, SessionData(session_id=ID))
    try:
        with anyio.fail_after(PATIENCE):
            yield Served(store)
    finally:
        await store.aclose()


@pytest.fixture(params=MAKE)
async def site(
    request: pytest.FixtureRequest, redis_url: str, tmp_path: Path
) -> AsyncGenerator[Served, None]:
    where = str(tmp_path / "sessions.db") if request.param == "SQLite" else redis_url
    async with served(MAKE[request.param](where)) as site:
        yield site


@pytest.fixture
async def raw(redis_url: str) -> AsyncGenerator[Any, None]:
    async with Redis.from_url(redis_url, decode_responses=True) as client:
        yield client


async def until(is_so: Callable[[], Awaitable[object]]) -> None:
    """Return when it is so."""
    while not await is_so():  # noqa: ASYNC110  # Redis sets no event
        await anyio.sleep(0.01)


async def is_free(raw: Any) -> bool:
    """Whether nobody holds the lock or waits for it."""
    return not await raw.exists(LOCK, f"{RECORD}:wait")


# --- within a process -----------------------------------------------------------------------------


async def test_the_holder_is_named(site: Served, caplog: pytest.LogCaptureFixture) -> None:
    """By its method, route, host, process and the time that it holds the lock, with the number who wait."""
    hold = Hold()
    async with anyio.create_task_group() as group:
        group.start_soon(site.ask, "/report", page(hold), "POST")
        await hold.began.wait()
        group.start_soon(site.ask, "/click")
        await site.is_told.wait()
        hold.may_end.set()
    (event,) = site.told
    held = event.details["held"]
    assert isinstance(held, float)
    assert held >= 0.9  # rounded
    assert {**event.details, "held": 0} == {
        "route": "GET /click",
        "holder": "POST /report",
        "host": socket.gethostname(),
        "process": os.getpid(),
        "held": 0,
        "waiting": 1,
    }
    (record,) = [each for each in caplog.records if LOCK_HELD in each.getMessage()]
    assert record.levelno == logging.WARNING
    assert "holder='POST /report'" in record.getMessage()
    assert ID not in record.getMessage()


@pytest.mark.parametrize("anyio_backend", ["trio"])
async def test_the_holder_is_named_on_trio(anyio_backend: str) -> None:
    """The same."""
    hold = Hold()
    async with served(InMemorySessionStore()) as site, anyio.create_task_group() as group:
        group.start_soon(site.ask, "/report", page(hold), "POST")
        await hold.began.wait()
        group.start_soon(site.ask, "/click")
        await site.is_told.wait()
        hold.may_end.set()
    assert [event.details["holder"] for event in site.told] == ["POST /report"]


async def test_all_who_wait_are_counted_and_one_tells(site: Served) -> None:
    """The first of them to have waited for a second; of the same holder's route nobody for a minute then."""
    hold = Hold()
    answered = []
    async with anyio.create_task_group() as group:

        async def click(number: int) -> None:
            answered.append(await site.ask(f"/click/{number}"))

        group.start_soon(site.ask, "/report", page(hold))
        await hold.began.wait()
        for number in range(5):
            group.start_soon(click, number)
        await site.is_told.wait()
        await anyio.sleep(0.1)  # in which the others would tell
        hold.may_end.set()
    assert [event.details["waiting"] for event in site.told] == [5]
    assert answered == [200] * 5


async def test_after_a_hand_over_the_next_holder_is_named(site: Served) -> None:
    """With the time that it holds the lock itself."""
    first, second = Hold(), Hold()
    async with anyio.create_task_group() as group:
        group.start_soon(site.ask, "/first", page(first))
        await first.began.wait()
        group.start_soon(site.ask, "/second", page(second), "POST")
        await anyio.sleep(0.7)
        first.may_end.set()
        await second.began.wait()
        began = time.monotonic()
        group.start_soon(site.ask, "/click")
        await site.is_told.wait()
        took = time.monotonic() - began
        (event,) = site.told
        assert event.details["holder"] == "POST /second"
        assert float(event.details["held"]) < took + 0.5  # it waited for longer than that before
        second.may_end.set()


async def test_who_waits_less_tells_nothing(site: Served) -> None:
    """Most waits are short."""
    hold = Hold()
    async with anyio.create_task_group() as group:
        group.start_soon(site.ask, "/report", page(hold))
        await hold.began.wait()
        group.start_soon(site.ask, "/click")
        await anyio.sleep(0.05)
        hold.may_end.set()
    assert site.told == []


async def test_a_holder_outside_any_request(site: Served) -> None:
    """A job that transacts by the store has no route."""
    async with anyio.create_task_group() as group, site.store.transaction(ID):
        group.start_soon(site.ask, "/click")
        await site.is_told.wait()
    assert [event.details["holder"] for event in site.told] == ["outside any request"]


async def test_a_job_that_waits_tells_nobody(site: Served) -> None:
    """It has no middleware, and so no log; it gets its turn."""
    hold = Hold()
    async with anyio.create_task_group() as group:
        group.start_soon(site.ask, "/report", page(hold))
        await hold.began.wait()
        group.start_soon(site.store.update, ID, {"n": 7})
        await anyio.sleep(1.1)
        hold.may_end.set()
    data = await site.store.get(ID)
    assert data is not None
    assert data.metadata["n"] == 7
    assert site.told == []


def test_once_a_minute_for_each_route() -> None:
    """A minute after it was told, and not earlier; of a thousand routes at the most."""
    now = [0.0]
    sink = EventSink(clock=lambda: now[0])
    due = []
    for now[0] in (5.0, 30.0, 64.9, 65.0, 66.0):
        due.append(sink.is_due(LOCK_HELD, "POST /report"))
    assert due == [True, False, False, True, False]
    assert sink.is_due(LOCK_HELD, "POST /other")
    assert sum(sink.is_due(LOCK_HELD, f"GET /{number}") for number in range(2000)) == 998


def test_what_happens_often_is_due_once_a_minute() -> None:
    """At the third time within a minute of the first, and of nothing else."""
    now = [0.0]
    sink = EventSink(clock=lambda: now[0])
    due = []
    for now[0] in (5.0, 30.0, 65.0, 66.0, 124.9, 124.9, 125.0, 126.0, 184.0):
        due.append(sink.is_due(RUN_TWICE, "GET /report", times=3))
        assert not sink.is_due(RUN_TWICE, f"GET /{now[0]}", times=3)
    assert due == [False, False, False, False, True, False, False, False, True]


async def test_an_id_in_a_path_is_not_told(redis_url: str, caplog: pytest.LogCaptureFixture) -> None:
    """Not whole, and not the half of it to which a long path is cut."""
    for path in (f"/of/{ID}", f"/{'x' * 70}/{ID}"):
        hold = Hold()
        async with served(RedisSessionStore(redis_url)) as site, anyio.create_task_group() as group:
            group.start_soon(site.ask, path, page(hold))
            await hold.began.wait()
            group.start_soon(site.ask, f"/click/{ID}")
            await site.is_told.wait()
            hold.may_end.set()
        assert ID[:8] not in str(site.told)
    assert LOCK_HELD in caplog.text
    assert ID[:8] not in caplog.text


# --- across processes -----------------------------------------------------------------------------

HOLDER = """
import asyncio, sys
sys.path[:0] = [{tests!r}]
from asgi import page
from request.test_who_holds import Hold, Served
from asgi_sessions import RedisSessionStore

async def main():
    hold = Hold()
    site = Served(RedisSessionStore(sys.argv[1]))
    asked = asyncio.ensure_future(site.ask("/report/2024 Q1", page(hold), "POST"))
    await hold.began.wait()
    print("holds", flush=True)
    await asked

asyncio.run(main())
"""


def started(code: str, *arguments: str) -> subprocess.Popen[bytes]:
    """A process that has said that it holds the lock."""
    child = subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE)
    assert child.stdout is not None
    assert child.stdout.readline() == b"holds\n"
    return child


@pytest.mark.parametrize("then", ["works on", "is killed"])
async def test_the_holder_in_another_process_is_named(redis_url: str, then: str) -> None:
    """Also one that is dead, whose lease still runs."""
    async with served(RedisSessionStore(redis_url)) as site:
        code = HOLDER.format(tests=str(Path(__file__).parents[1]))
        child = await asyncio.to_thread(started, code, redis_url)
        try:
            if then == "is killed":
                child.kill()
            async with anyio.create_task_group() as group:
                group.start_soon(site.ask, "/click")
                group.start_soon(site.ask, "/click")
                await site.is_told.wait()
                group.cancel_scope.cancel()
        finally:
            child.kill()
            child.communicate()
    (event,) = site.told
    facts = [event.details[name] for name in ("holder", "host", "process", "waiting")]
    assert facts == ["POST /report/2024 Q1", socket.gethostname(), child.pid, 2]


@pytest.mark.parametrize("writes", [True, False])
async def test_a_hand_over_within_a_process_is_seen_in_others(redis_url: str, raw: Any, writes: bool) -> None:
    """The lock stays with the process, with or without a commit; behind its token stands who has it now."""
    first, second, elsewhere = Hold(writes=writes), Hold(), RedisSessionStore(redis_url)
    async with served(RedisSessionStore(redis_url)) as site, anyio.create_task_group() as group:
        group.start_soon(site.ask, "/first", page(first))
        await first.began.wait()
        taken = await raw.get(LOCK)
        group.start_soon(site.ask, "/second", page(second), "POST")
        await anyio.sleep(0.05)
        first.may_end.set()
        await second.began.wait()
        other = Served(elsewhere)
        group.start_soon(other.ask, "/click")
        await other.is_told.wait()
        assert taken.endswith(",GET+/first")
        assert (await raw.get(LOCK)).endswith(",POST+/second")
        assert [event.details["holder"] for event in other.told] == ["POST /second"]
        second.may_end.set()
    await elsewhere.aclose()


async def test_a_hand_over_by_redis_begins_a_new_time(redis_url: str, raw: Any) -> None:
    """Whoever waited in the queue holds the lock since it was handed over, not since it came."""
    first, second, elsewhere = Hold(), Hold(), RedisSessionStore(redis_url)
    async with served(RedisSessionStore(redis_url)) as site, anyio.create_task_group() as group:
        other = Served(elsewhere)
        group.start_soon(site.ask, "/first", page(first))
        await first.began.wait()
        group.start_soon(other.ask, "/second", page(second))
        await other.is_told.wait()  # it has waited for a second
        first.may_end.set()
        await second.began.wait()
        seconds, micros = await raw.time()
        holder = read((await raw.get(LOCK)).encode(), seconds * 1000 + micros / 1000)
        assert holder is not None
        assert holder.route == "GET /second"
        assert holder.seconds < float(other.told[0].details["held"])
        second.may_end.set()
    await elsewhere.aclose()


async def test_a_holder_of_an_earlier_release_is_nobody(redis_url: str, raw: Any) -> None:
    """Its lock is a bare token: nothing is told, and whoever waits gets the lock when it is free."""
    async with served(RedisSessionStore(redis_url)) as site, anyio.create_task_group() as group:
        await raw.set(LOCK, "e" * 32, px=60_000)
        group.start_soon(site.ask, "/click")
        await anyio.sleep(1.2)
        await raw.delete(LOCK)
    assert site.told == []


async def test_an_earlier_release_hands_the_lock_over(redis_url: str, raw: Any) -> None:
    """It takes what stands behind the token for a part of it; the waiter takes them apart."""
    hold = Hold()
    async with served(RedisSessionStore(redis_url)) as site, anyio.create_task_group() as group:
        await raw.set(LOCK, "e" * 32, px=60_000)
        group.start_soon(site.ask, "/click", page(hold))
        await until(lambda: raw.exists(f"{RECORD}:wait"))
        _, channel, token = (await raw.lpop(f"{RECORD}:wait")).split(" ")
        await raw.set(LOCK, token, px=1000)
        seconds, micros = await raw.time()
        now = int(seconds * 1000 + micros / 1000)
        await raw.publish(channel, f"{token}:{now}:" + await raw.get(RECORD))
        await hold.began.wait()
        assert (await raw.get(LOCK)) == token
        hold.may_end.set()
    with anyio.fail_after(PATIENCE):
        await until(lambda: is_free(raw))


async def test_a_new_session_says_who_began_it(redis_url: str, raw: Any) -> None:
    """A record that is made under the lock names its request there, too."""
    store = RedisSessionStore(redis_url)
    site = Served(store)

    async def begin(session: Session) -> None:
        session["n"] = 1
        await session.save()
        (name,) = await raw.keys("session:*:lock")
        assert (await raw.get(name)).endswith(",POST+/begin")

    assert await site.ask("/begin", page(begin), "POST") == 200
    await store.aclose()


async def test_what_stands_at_a_lock_is_plain_and_short(redis_url: str, raw: Any) -> None:
    """Printable ASCII without spaces or colons, whatever the client asked for."""
    async with served(RedisSessionStore(redis_url)) as site:
        for path in ("/a b\tc\nd", "/ünï/☃", "/a:b,c;d.e%20{f}", "/" + "long/" * 5000, "*"):
            told: list[str] = []

            async def look(session: Session, told: list[str] = told) -> None:
                told.append(await raw.get(LOCK))

            assert await site.ask(path, page(look), "PROP\x00FIND") == 200
            (value,) = told
            assert value.isascii()
            assert value.isprintable()
            assert not set(" :") & set(value)
            assert len(value) < 1000
            holder = read(value.encode(), 0)
            assert holder is not None
            assert holder.route == f"PROP\x00FIND {path}" or (
                len(path) > 100 and holder.route.endswith("/...")
            )


async def test_a_checkout_outside_any_request_says_process_and_host(redis_url: str, raw: Any) -> None:
    """A token of 32 digits, the time, and who that is; no other key."""
    async with served(RedisSessionStore(redis_url)) as site:
        policy = site.middleware._settings.lock_to_transact
        taken = await site.store.checkout(ID, policy, None)
        assert isinstance(taken, Checkout)
        value = await raw.get(LOCK)
        assert value[:32] == taken.token
        assert value[46:] == f",{os.getpid()},{socket.gethostname()},"
        await site.store.release(taken)
        assert await raw.keys("*") in ([RECORD], [RECORD, LOCK])
