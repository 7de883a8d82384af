"""One address in front of two nodes: a planned switch, and connections that are forgotten on the way."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator

import pytest
from anyio.to_thread import run_sync
from deployments import Address, Bed, command
from faults.chaos import ChaosProxy, containing, swallow
from faults.checkers import Fate, count_flaws, of_fate
from redis.asyncio import Redis
from redis_server import RedisServer
from visitors import counting, crowd, served, until

from asgi_sessions import RedisSessionStore, SessionData, SessionStoreError
from asgi_sessions.stores.checkout import Checkout, LockPolicy
from asgi_sessions.stores.redis.connection.pipeline import ANSWER_WITHIN
from asgi_sessions.stores.redis.locking.subscription import Subscription

pytestmark = pytest.mark.anyio

IDLE = 0.05  # seconds; shorter than anybody's patience, longer than between two calls in a row


@pytest.fixture(scope="module")
def bed() -> Iterator[Bed[Address]]:
    with Bed(Address) as bed:
        yield bed


@pytest.fixture
def nodes(bed: Bed[Address]) -> Address:
    """Whole and empty, whatever the test before did to it."""
    return bed.whole()


async def _taken(store: RedisSessionStore) -> Checkout:
    taken = await store.checkout("s", LockPolicy(), None)
    assert isinstance(taken, Checkout)
    return taken


async def _channel(store: RedisSessionStore) -> Subscription:
    return (await store._states.get()).subscription


def _questions(node: RedisServer) -> int:
    """PINGs that came since the statistics were reset."""
    return int(command(node, "INFO", "commandstats").get("cmdstat_ping", {"calls": 0})["calls"])


def _listeners(node: RedisServer, channel: Subscription) -> int:
    """Of this channel at this node."""
    return int(command(node, "PUBSUB", "NUMSUB", channel.name.decode())[1])


# -- a planned switch -------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", [0.0, 0.4])
async def test_a_planned_switch_under_load(nodes: Address, after: float) -> None:
    """Nothing is lost, and nobody is turned away who comes when it is made."""
    url = nodes.url.replace("socket_timeout=1", "socket_timeout=5")
    async with counting(url) as site, counting(url) as other_process:
        sessions = [await site.begin() for _ in range(8)]
        async with crowd(site, sessions, 2), crowd(other_process, sessions, 2):
            await served(sessions)
            await run_sync(nodes.switch, after)
            switched = time.monotonic()
            await served(sessions, 20)
        for counted in sessions:
            assert set(counted.answers) <= {200, 409}
            refused = of_fate(counted.attempts, Fate.REFUSED)
            assert [each for each in refused if each.began > switched] == []
            assert len(refused) <= 1, "a lock that was handed over just before lasts one second"
            assert count_flaws(counted.attempts, await site.final(counted)) == []
    left = sorted(each.key for each in sessions)
    await until(lambda: nodes.all_keys() == left, "no lock or queue is left")


async def test_the_subscription_moves_with_the_calls(nodes: Address) -> None:
    """The old node, a replica now, passes on what the new one says to others: it is not listened to."""
    store, other_process = (RedisSessionStore(nodes.url) for _ in range(2))
    await store.set("s", SessionData(session_id="s"))
    channel = await _channel(store)
    assert await channel.open() == channel.name
    old = nodes.primary()
    await run_sync(nodes.switch)
    holder = await _taken(other_process)
    waiter = asyncio.create_task(_taken(store))
    await until(lambda: _listeners(nodes.primary(), channel) == 1, "it listens at the new primary")
    assert _listeners(old, channel) == 0
    await other_process.release(holder)
    await store.release(await waiter)
    await asyncio.gather(store.aclose(), other_process.aclose())


async def test_a_subscription_elsewhere_is_not_believed(nodes: Address) -> None:
    """One address may lead calls and subscription to different nodes: then who waits asks by itself."""
    store, other_process = (RedisSessionStore(nodes.url) for _ in range(2))
    await store.set("s", SessionData(session_id="s"))
    channel = await _channel(store)
    primary = nodes.proxy.target
    holder = await _taken(other_process)
    nodes.proxy.target = next(node.port for node in nodes.nodes if node.port != primary)
    waiter = asyncio.create_task(_taken(store))
    await asyncio.sleep(0.3)
    assert not channel.live
    began = time.monotonic()
    await other_process.release(holder)
    holder = await waiter
    assert time.monotonic() - began < 0.3
    nodes.proxy.target = primary
    waiter = asyncio.create_task(_taken(other_process))
    assert await channel.open() == channel.name
    await store.release(holder)
    await other_process.release(await waiter)
    await asyncio.gather(store.aclose(), other_process.aclose())


async def test_a_sign_out_is_never_told_by_a_replica(nodes: Address) -> None:
    """The old node, a replica now that lags, knows of no session of ada's: that is not believed."""
    store, other_process = (RedisSessionStore(nodes.url) for _ in range(2))
    assert not await store.exists("s")  # connected to it
    await run_sync(nodes.switch)
    await run_sync(nodes.stop_copying, nodes.primary())
    await other_process.set("s", SessionData(session_id="s", user_id="ada"))
    assert await store.delete_for_user("ada") == 1
    assert not await other_process.exists("s")
    await asyncio.gather(store.aclose(), other_process.aclose())


# -- a connection that is forgotten -----------------------------------------------------------------------


@pytest.fixture
def way(own_redis: RedisServer) -> Iterator[ChaosProxy]:
    """The way to Redis, on which connections may be forgotten."""
    with ChaosProxy(own_redis.port) as proxy:
        yield proxy


@pytest.fixture
async def store(way: ChaosProxy) -> AsyncIterator[RedisSessionStore]:
    """Its connections are asked when they were idle for a moment, and its calls may take five seconds."""
    client = Redis.from_url(way.url, health_check_interval=IDLE)
    store = RedisSessionStore(client, socket_timeout=5)
    yield store
    await store.aclose()
    await client.aclose()


async def test_a_forgotten_connection_costs_less_than_a_second(
    store: RedisSessionStore, way: ChaosProxy
) -> None:
    """The first call after it was forgotten is answered on another one."""
    await store.set("s", SessionData(session_id="s"))
    for number in range(3):
        await asyncio.sleep(2 * IDLE)
        way.deafen_all()
        began = time.monotonic()
        await store.increment_counter("s", "n")
        assert time.monotonic() - began < 1, number
    found = await store.get("s")
    assert found is not None
    assert found.metadata == {"n": 3}


async def test_nothing_is_sent_on_a_connection_in_doubt(store: RedisSessionStore, way: ChaosProxy) -> None:
    """What it sends may arrive, though no answer comes back: so nothing is sent before an answer is there."""
    state = await store._states.get()
    await state.commands.command(b"SET", b"n", b"0")
    await asyncio.sleep(2 * IDLE)
    plan = way.inject(swallow, containing(b"PING"), on="answer")
    calls = [state.commands.command(b"INCR", b"n") for _ in range(3)]
    assert await asyncio.gather(*calls) == [1, 2, 3]
    assert plan.hits == 1
    await asyncio.sleep(2 * IDLE)
    way.inject(swallow, containing(b"PING"), on="answer")
    assert await store.set("s", SessionData(session_id="s")), "though it may not be sent twice"


async def test_only_idle_connections_are_asked(store: RedisSessionStore, own_redis: RedisServer) -> None:
    """Calls in a row go without a question, one after a pause goes with one, whatever the answer is."""
    state = await store._states.get()
    await state.commands.command(b"CONFIG", b"RESETSTAT")
    pauses, last = 0, time.monotonic()
    for _ in range(50):
        await state.commands.command(b"ECHO", b"x")
        pauses += time.monotonic() - last > IDLE / 2  # a busy machine makes some
        last = time.monotonic()
    asked = _questions(own_redis)
    assert asked <= pauses
    await asyncio.sleep(2 * IDLE)
    assert await state.commands.command(b"ECHO", b"y") == b"y"
    assert _questions(own_redis) == asked + 1
    command(own_redis, "ACL", "SETUSER", "default", "-ping")
    await asyncio.sleep(2 * IDLE)
    before = command(own_redis, "INFO", "stats")["total_connections_received"]
    assert await state.commands.command(b"ECHO", b"z") == b"z"
    assert command(own_redis, "INFO", "stats")["total_connections_received"] == before + 1  # our own


async def test_a_server_that_is_frozen_is_no_forgotten_connection(
    store: RedisSessionStore, own_redis: RedisServer
) -> None:
    """Nobody answers on another connection either: a call fails when its time is over, and not earlier."""
    hasty = RedisSessionStore(Redis.from_url(own_redis.url, health_check_interval=IDLE), socket_timeout=0.8)
    await hasty.exists("s")
    await asyncio.sleep(2 * IDLE)
    own_redis.pause()
    began = time.monotonic()
    with pytest.raises(SessionStoreError, match=r"did not answer within 0\.8 seconds"):
        await hasty.exists("s")
    assert ANSWER_WITHIN < time.monotonic() - began < 2
    own_redis.resume()
    assert not await hasty.exists("s")
    await hasty.aclose()


async def test_a_store_may_be_closed_while_its_connection_is_in_doubt(
    store: RedisSessionStore, way: ChaosProxy
) -> None:
    """Who waits is answered before."""
    state = await store._states.get()
    await state.commands.command(b"ECHO", b"x")
    await asyncio.sleep(2 * IDLE)
    way.deafen_all()
    call = state.commands.command(b"ECHO", b"y")
    await store.aclose()
    assert await call == b"y"


async def test_a_forgotten_subscription_is_made_anew(store: RedisSessionStore, way: ChaosProxy) -> None:
    """Whoever begins to wait has it asked; then it is told at once that the lock is its own."""
    other_process = RedisSessionStore(f"redis://127.0.0.1:{way.target}")
    await store.set("s", SessionData(session_id="s"))
    channel = await _channel(store)
    await channel.open()
    await until(lambda: channel._heard_at > 0, "it has heard that it is heard")
    forgotten = channel._task
    channel._heard_at = float("-inf")  # silent for long
    way.inject(swallow, containing(b"SUBSCRIBE"))
    holder = await _taken(other_process)
    began = time.monotonic()
    waiter = asyncio.create_task(_taken(store))
    await until(lambda: channel.live and channel._task is not forgotten, "it is made anew")
    assert time.monotonic() - began < 0.9
    await other_process.release(holder)
    await store.release(await waiter)
    await other_process.aclose()
