"""A lock whose release Redis did not take is let go as soon as Redis is well, not at the end of the lease."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import anyio
import pytest
from asgi import Act, page
from deployments import command
from redis import Redis as BlockingRedis
from redis.asyncio import Redis
from redis.exceptions import RedisError, ResponseError
from redis_server import Proxy, RedisServer, free_port

from asgi_sessions import RedisSessionStore, Session, SessionData, SessionStoreError
from asgi_sessions.stores.checkout import Checkout, LockPolicy
from asgi_sessions.stores.redis.commands.keys import KeySpace
from asgi_sessions.stores.redis.commands.timing import LockTiming
from asgi_sessions.stores.redis.connection.deployment import deployment
from asgi_sessions.stores.redis.connection.replies import Reply
from asgi_sessions.stores.redis.event_loop import LoopState, LoopStates
from asgi_sessions.stores.redis.locking import releases

from .chaos import ChaosProxy, cut
from .inprocess import Browser, Process, process_at
from .processes import until

pytestmark = pytest.mark.anyio

SESSIONS = 12
LEASE = 10.0  # seconds, which an unlucky session would be blocked for
SOON = 2.0  # seconds: the last back-off of 0.2, and a busy machine


def write(session: Session) -> None:
    session["n"] = 1


def read(session: Session) -> None:
    session.get("n")


CASES: dict[str, tuple[Act, bool]] = {
    "write": (write, False),
    "read": (read, False),
    "logout": (Session.logout, False),
    "read, then elsewhere": (read, True),
}


class Place:
    """A server, the way to it, and a hand on it."""

    def __init__(self, server: RedisServer, proxy: ChaosProxy, raw: Redis) -> None:
        self.server = server
        self.proxy = proxy
        self.raw = raw


@pytest.fixture
async def place() -> AsyncIterator[Place]:
    with (
        RedisServer("--appendonly", "yes", "--appendfsync", "always") as server,
        ChaosProxy(server.port) as proxy,
    ):
        async with Redis.from_url(server.url) as raw:
            yield Place(server, proxy, raw)


# -- troubles: Redis is well again when the block has ended --------------------------------------------------


@asynccontextmanager
async def busy(place: Place) -> AsyncIterator[None]:
    """Somebody's endless script."""
    await place.raw.config_set("lua-time-limit", 1)

    async def run_for_ever() -> None:
        async with Redis.from_url(place.server.url) as other:
            with contextlib.suppress(ResponseError):
                await other.eval("while true do end", 0)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(run_for_ever)
        await until(lambda: is_busy(place.server))
        yield
        command(place.server, "SCRIPT", "KILL")


def is_busy(server: RedisServer) -> bool:
    try:
        command(server, "PING")
    except ResponseError:
        return True
    return False


@asynccontextmanager
async def read_only(place: Place) -> AsyncIterator[None]:
    """A replica of nobody that is there."""
    await place.raw.replicaof("127.0.0.1", "1")
    yield
    await place.raw.replicaof("NO", "ONE")


@asynccontextmanager
async def frozen(place: Place) -> AsyncIterator[None]:
    """SIGSTOP for longer than a call may take."""
    place.server.pause()
    yield
    place.server.resume()


@asynccontextmanager
async def restarted(place: Place) -> AsyncIterator[None]:
    """Killed, and a second later back with what it had written down."""
    place.server.kill()
    yield
    await anyio.to_thread.run_sync(place.server.start)
    with contextlib.suppress(RedisError):
        await place.raw.ping()


@asynccontextmanager
async def out_of_reach(place: Place) -> AsyncIterator[None]:
    """Every connection breaks, and so does each new one."""
    with place.proxy.injecting(cut):
        place.proxy.cut_all()
        yield


Trouble = Callable[[Place], AbstractAsyncContextManager[None]]
TROUBLES: list[Trouble] = [busy, read_only, frozen, restarted, out_of_reach]


async def waits(browser: Browser) -> float:
    """How long a request of this client takes."""
    began = time.monotonic()
    answer = await browser.open(page(read))
    assert answer.status in (200, 409)
    return time.monotonic() - began


async def hold_through(browsers: list[Browser], act: Act, trouble: AbstractAsyncContextManager[None]) -> None:
    """Requests that hold their sessions when the trouble begins, and end in it."""
    holding, go_on = 0, anyio.Event()
    statuses: list[int] = []

    async def hold(session: Session) -> None:
        nonlocal holding
        holding += 1
        await go_on.wait()
        act(session)

    async def visit(browser: Browser) -> None:
        statuses.append((await browser.open(page(hold))).status)

    async with anyio.create_task_group() as tasks:
        for browser in browsers:
            tasks.start_soon(visit, browser)
        await until(lambda: holding == len(browsers))
        async with trouble:
            go_on.set()
            await until(lambda: len(statuses) == len(browsers))
            await anyio.sleep(0.6)  # in which a release is tried again, in vain


@pytest.mark.parametrize(("act", "elsewhere"), CASES.values(), ids=CASES)
@pytest.mark.parametrize("trouble", TROUBLES)
async def test_nobody_is_blocked_when_redis_is_well(
    place: Place, trouble: Trouble, act: Act, elsewhere: bool
) -> None:
    """The next request of each session has its turn within 200 ms, in this process and in another."""
    async with (
        process_at(f"{place.proxy.url}?socket_timeout=0.3", lock_timeout=LEASE) as process,
        process_at(place.server.url, lock_timeout=LEASE) as other,
    ):
        browsers = [Browser(process, place.raw) for _ in range(SESSIONS)]
        for browser in browsers:
            await browser.open(page(lambda session: session.update(n=0)))
        await Browser(other, place.raw).open(page(lambda session: session.update(n=0)))
        cookies = [browser.cookie for browser in browsers]
        await hold_through(browsers, act, trouble(place))
        for browser, cookie in zip(browsers, cookies, strict=True):
            browser.cookie = cookie
        waited: list[float] = []

        async def next_one(browser: Browser) -> None:
            waited.append(await waits(browser.at(at)))

        at: Process = other if elsewhere else process
        async with anyio.create_task_group() as tasks:
            for browser in browsers:
                tasks.start_soon(next_one, browser)
        assert max(waited) < SOON
        await browsers[0].assert_free()
        state = await process.store._states.get()
        await until(lambda: len(state.releases) == 0)


# -- what it costs ------------------------------------------------------------------------------------------


@asynccontextmanager
async def state_at(url: str) -> AsyncIterator[LoopState]:
    states = LoopStates(deployment(url, 0.3), KeySpace("test:"))
    yield await states.get()
    await states.aclose()


def release(state: LoopState, name: str, lease: float = LEASE) -> asyncio.Future[Reply]:
    """Of this session's lock, whose token is the session's name."""
    return state.releases.let_go(KeySpace("session:").of(name), name.encode(), LockTiming(lease))


async def scripts(raw: Redis) -> int:
    stats = await raw.info("commandstats")
    return sum(stats.get(f"cmdstat_{name}", {"calls": 0})["calls"] for name in ("eval", "evalsha"))


async def test_an_outage_costs_some_calls_a_second(place: Place) -> None:
    """One release of hundreds asks whether Redis is well; when it is taken, all others follow."""
    for number in range(300):
        await place.raw.set(f"session:{{s{number}}}:lock", f"s{number}")
    async with state_at(place.server.url) as state:
        async with read_only(place):
            await asyncio.wait([release(state, f"s{number}") for number in range(300)])
            await place.raw.config_resetstat()
            await anyio.sleep(1)
            assert 3 <= await scripts(place.raw) <= 40  # what a replica refuses is sent again in 50 ms
            assert len(state.releases) == 300
        with anyio.fail_after(SOON):
            while len(state.releases):  # noqa: ASYNC110  # Redis sets no event
                await anyio.sleep(0.005)


async def test_what_is_refused_for_good_is_given_up(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    """When the lease is over, and it holds up nobody until then. One warning says why."""
    await place.raw.lpush("session:{s}:lock", "not a lock")
    await place.raw.set("session:{other}:lock", "other")
    async with state_at(place.server.url) as state:
        await asyncio.wait([release(state, "s", 1.5)])
        over = asyncio.get_running_loop().time() + 1.5
        async with read_only(place):
            await asyncio.wait([release(state, "other")])
            assert len(state.releases) == 2
        await until(lambda: len(state.releases) == 1)
        assert asyncio.get_running_loop().time() < over
        await until(lambda: len(state.releases) == 0)
        assert over < asyncio.get_running_loop().time() < over + 1
        assert state.releases._timer is None
    assert len(caplog.messages) == 1
    assert "is tried again" in caplog.text


async def test_what_was_never_sent_need_not_be_undone() -> None:
    """A server that is down has no locks of those who come meanwhile; what is kept is bounded."""
    store = RedisSessionStore(f"redis://127.0.0.1:{free_port()}/0")
    for _ in range(5):
        with pytest.raises(SessionStoreError):
            await store.checkout("s", LockPolicy(), None)
    state = await store._states.get()
    assert len(state.releases) == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(releases, "MOST", 10)
        for number in range(20):
            await asyncio.wait([release(state, f"s{number}")])
        assert len(state.releases) == 10
    await store.aclose()


# -- the end of a process ------------------------------------------------------------------------------------


async def hold_all(store: RedisSessionStore) -> None:
    for number in range(SESSIONS):
        await store.set(f"s{number}", SessionData(session_id=f"s{number}"))
        assert isinstance(await store.checkout(f"s{number}", LockPolicy(), None), Checkout)


async def test_a_store_that_closes_lets_go_of_what_is_held(redis_url: str, redis_server: RedisServer) -> None:
    """All leases in one or two writes, though their requests have not ended."""
    async with Proxy(redis_server.port) as proxy, Redis.from_url(redis_url) as raw:
        store = RedisSessionStore(proxy.url)
        await hold_all(store)
        before = proxy.writes
        await store.aclose()
        assert await raw.keys("*:lock") == []
        assert proxy.writes <= before + 2


@pytest.mark.parametrize("elsewhere", [False, True], ids=["in the process", "in Redis"])
async def test_whoever_waits_leaves_when_the_store_closes(redis_url: str, elsewhere: bool) -> None:
    """At once, and nothing is left of them."""
    store, other = RedisSessionStore(redis_url), RedisSessionStore(redis_url)
    async with Redis.from_url(redis_url) as raw:
        await hold_all(other if elsewhere else store)
        waiting = [asyncio.create_task(store.checkout("s0", LockPolicy(), None)) for _ in range(3)]
        await asyncio.sleep(0)
        while await raw.llen("session:{s0}:wait") != elsewhere:  # noqa: ASYNC110  # Redis sets no event
            await anyio.sleep(0.005)
        await store.aclose()
        done, _ = await asyncio.wait(waiting, timeout=0.1)
        assert [type(task.exception()) for task in done] == [SessionStoreError] * 3
        assert await raw.keys("*:wait") == []
        await other.aclose()


def test_a_loop_that_ends_lets_go_of_what_is_held(redis_url: str) -> None:
    """Though nobody closes the store."""
    store = RedisSessionStore(redis_url)

    asyncio.run(hold_all(store))
    with BlockingRedis.from_url(redis_url) as raw:
        assert raw.keys("*:lock") == []


@pytest.mark.parametrize("trouble", [frozen, out_of_reach])
async def test_a_store_closes_in_time_where_redis_does_not_answer(place: Place, trouble: Trouble) -> None:
    """The last releases are waited for, but no longer than any call."""
    store = RedisSessionStore(f"{place.proxy.url}?socket_timeout=0.3")
    await hold_all(store)
    async with trouble(place):
        with anyio.fail_after(2):
            await store.aclose()
