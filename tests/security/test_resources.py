"""What clients can make the service do, and keep: nothing for who has no session, a turn for who has one."""

from __future__ import annotations

from typing import Any, cast

import anyio
import pytest
from asgi import Clock, Site, page, stream
from redis import Redis

from asgi_sessions import InMemorySessionStore, RedisSessionStore, Session, SessionStore
from security import flooding
from security.requirements import requirement
from security.service import CHROME, Service, Visitor, login, logout, read, write

pytestmark = pytest.mark.anyio

GARBAGE = [None, "null", "x" * 88, "0" * 32 + ".aaaaaa." + "A" * 43, "a=b", '"', "\x00"]
OWN = {"cmdstat_config", "cmdstat_info", "cmdstat_config|resetstat"}  # what this test asks the server itself


@requirement("DOS-1")
@pytest.mark.parametrize("act", [None, read, lambda session: session.clear(), logout])
async def test_without_a_session_the_store_is_not_asked(act: Any) -> None:
    """Anonymous requests, forged cookies too, whether or not the app looks at the session."""
    site = Site()
    for token in GARBAGE:
        headers = [] if token is None else [(b"cookie", f"session={token}".encode())]
        for app in (page(act), stream(act)):
            assert (await site.request(app, headers=headers)).cookies == []
    assert not set(site.log) - {"app", "start 200", "body"}, "a call of the store"
    assert site.records() == []


@requirement("DOS-1")
async def test_without_a_session_redis_is_not_asked(redis_url: str, redis: Redis) -> None:
    """By the server's own count, and nothing is in it afterwards."""
    service = Service.on(redis_url)
    redis.config_resetstat()
    for token in GARBAGE * 10:
        await service.visitor(token=token).open(read)
        await service.visitor(token=token).connect(stream_of_nothing)
    assert set(redis.info("commandstats")) <= OWN
    assert redis.dbsize() == 0
    await service.store.aclose()


async def stream_of_nothing(scope: Any, receive: Any, send: Any) -> None:
    scope["session"].get("n")
    await send({"type": "websocket.accept"})


async def keys_left(store: SessionStore, redis: Redis | None, visitors: list[Visitor]) -> None:
    """Assert that the store holds the records of these visitors and nothing else."""
    assert await store.list_active() == sorted(visitor.session_id for visitor in visitors)
    if isinstance(store, InMemorySessionStore):
        assert len(store._locks) == 0
        assert len(store._locks._queues) == 0
    else:
        assert redis is not None
        with anyio.fail_after(5):
            while redis.keys("*:lock") or redis.keys("*:wait"):  # releases are on their way, not waited for
                await anyio.lowlevel.checkpoint()


@requirement("DOS-2")
async def test_flooding_one_session_leaves_the_others_working(
    store: SessionStore, request: pytest.FixtureRequest
) -> None:
    """40 requests on a session whose lock is held: those over the limit get 503, everybody else 200."""
    service = Service(store, {"max_waiters": 4, "lock_wait": 30})
    flooded, others = service.visitor(), [service.visitor() for _ in range(10)]
    for visitor in (flooded, *others):
        await visitor.begin()
    holding, go_on = anyio.Event(), anyio.Event()
    statuses: list[int] = []

    async def hold(session: Session) -> None:
        holding.set()
        await go_on.wait()

    async def send(act: Any) -> None:
        answer = await flooded.copy().open(act)
        statuses.append(answer.status)
        if answer.status == 503:
            assert answer.header("retry-after") == ["1"]
            assert answer.cookies == [], "who was turned away loses the session"

    async with anyio.create_task_group() as group:
        group.start_soon(send, hold)
        await holding.wait()
        for _ in range(40):
            group.start_soon(send, write)
        for _ in range(3):
            for visitor in others:
                assert (await visitor.open(write)).status == 200, "another session was not served"
        go_on.set()

    assert sorted(statuses) == [200] * 5 + [503] * 36
    assert [(await visitor.sees())["n"] for visitor in others] == [4] * 10
    assert (await flooded.sees())["n"] == 5, "an acknowledged change is missing"
    shared = request.getfixturevalue("redis") if not isinstance(store, InMemorySessionStore) else None
    await keys_left(store, shared, [flooded, *others])
    assert service.told.count("too_many_waiters") == 36


@requirement("DOS-2")
@pytest.mark.parametrize("thief", [{"user_agent": CHROME}, {"address": "198.51.100.1"}])
async def test_a_stolen_cookie_does_not_hold_the_lock(service: Service, thief: dict[str, str]) -> None:
    """Somebody else's slow requests with the cookie let it go before the app runs."""
    visitor = service.visitor()
    await visitor.begin()

    async def act(session: Session) -> None:
        assert (await visitor.open(write)).status == 200

    with anyio.fail_after(10):
        assert (await visitor.copy(**thief).open(act)).status == 200
    assert (await visitor.sees())["n"] == 2


@requirement("DOS-3")
async def test_dead_ids_leave_nothing(store: SessionStore, request: pytest.FixtureRequest) -> None:
    """Neither locks nor queues nor records, whatever is tried with cookies of sessions that have ended."""
    service = Service(store)
    replays = []
    for _ in range(20):
        visitor = service.visitor()
        await visitor.begin()
        replays.append(visitor.copy())
        await visitor.open(logout)
    async with anyio.create_task_group() as group:
        for replay in replays * 5:
            for act in (None, read, logout):
                group.start_soon(replay.copy().open, act)
    shared = request.getfixturevalue("redis") if not isinstance(store, InMemorySessionStore) else None
    await keys_left(store, shared, [])
    if shared is not None:
        assert shared.dbsize() == 0


@requirement("DOS-3")
async def test_replaced_ids_are_forgotten(redis_url: str, redis: Redis) -> None:
    """What remembers them ends by itself, within a minute."""
    service = Service.on(redis_url)
    visitor = service.visitor()
    for _ in range(5):
        await visitor.open(login)
    for key in cast("list[bytes]", redis.keys("*")):
        left = redis.pttl(key)
        assert isinstance(left, int)
        assert left > 0, f"{key!r} would stay for ever"
        assert left <= 60_000 or b":retired" not in key
    await service.store.aclose()


@requirement("DOS-3")
async def test_memory_is_bounded(clock: Clock) -> None:
    """New sessions push out the least recently active ones, and expired ones go first."""
    store = InMemorySessionStore(max_sessions=50, clock=clock)
    service = Service(store, {"max_age": 100})
    for _ in range(60):
        await service.visitor().open(write)
    assert await store.count_active() == 50
    clock.now += 99
    kept = service.visitor()
    await kept.begin()
    clock.now += 1
    for _ in range(40):
        await service.visitor().open(write)
    assert await store.count_active() == 41
    assert await kept.sees() == {"n": 1}


@requirement("DOS-2")
async def test_the_flood_that_is_measured(redis_url: str) -> None:
    """The measurement of `flooding.py`, in short: visitors are all served, only the flooded turned away."""
    plan = flooding.Plan(seconds=0.3, rounds=1, visitors=5, rate=400, work=0.01)
    played = await flooding.measure(lambda: RedisSessionStore(redis_url), plan)
    for load in flooding.LOADS:
        (seen,) = played[load]
        assert set(seen.answers) == {200}, f"a visitor was not served under the load {load!r}"
    assert set(played["spread"][0].strangers) == {200}
    assert set(played["flood"][0].strangers) == {200, 503}
