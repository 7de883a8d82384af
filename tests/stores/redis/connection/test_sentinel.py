"""The Redis store on a primary with two replicas and three Sentinels: the primary dies, hangs, comes back."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import Awaitable, Callable, Iterator

import anyio
import pytest
from anyio.to_thread import run_sync
from deployments import DOWN_AFTER, Bed, Sentinel, SentinelSet, command, is_stopped, scripts
from ends import all_processes_are_told
from faults.checkers import Fate, of_fate
from redis.asyncio.sentinel import MasterNotFoundError
from redis.exceptions import RedisError
from redis_server import RedisServer
from visitors import PATIENCE, counting, crowd, failover_flaws, note_copies, served, until

from asgi_sessions import RedisSessionStore, SessionData, SessionStoreError
from asgi_sessions.record.codec import encode_checked
from asgi_sessions.stores.checkout import Checkout, LockPolicy, Outcome
from asgi_sessions.stores.redis.connection.deployment import deployment
from asgi_sessions.stores.redis.connection.sentinels import AGAIN

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def bed() -> Iterator[Bed[SentinelSet]]:
    with Bed(SentinelSet) as bed:
        yield bed


@pytest.fixture
def nodes(bed: Bed[SentinelSet]) -> SentinelSet:
    """Whole and empty, whatever the test before did to it."""
    return bed.whole()


@pytest.mark.parametrize("how", ["kill", "freeze"])
async def test_a_primary_dies_under_load(nodes: SentinelSet, how: str) -> None:
    """All get 503 until a replica takes over; what was copied is there, and nothing is told twice."""
    strike: Callable[[RedisServer], None] = getattr(nodes, how)
    victim = nodes.primary()
    async with counting(nodes.url) as site:
        sessions = [await site.begin() for _ in range(3)]
        async with crowd(site, sessions):
            await served(sessions)
            await note_copies(nodes, victim, sessions)
            strike(victim)
            died = time.monotonic()
            await until(lambda: all(each.answers[503] for each in sessions), "who has no primary is told")
            await served(sessions)
        for counted in sessions:
            assert set(counted.answers) == {200, 503}
            final = await site.final(counted)
            assert failover_flaws(counted.attempts, final, counted.copied, died + DOWN_AFTER / 2) == []
    left = sorted(each.key for each in sessions)
    await until(lambda: nodes.all_keys() == left, "no lock or queue is left")


async def test_a_primary_that_was_demoted_is_left(nodes: SentinelSet) -> None:
    """It answers, but stores nothing: a request under way is stored by the new one, where its lock is."""
    store = RedisSessionStore(nodes.url)
    await store.set("s", SessionData(session_id="s"))
    holder = await store.checkout("s", LockPolicy(), None)
    assert isinstance(holder, Checkout)
    old = nodes.primary()
    await run_sync(nodes.copy, old)
    await run_sync(nodes.switch)
    await run_sync(nodes.settle)
    record = encode_checked(SessionData(session_id="s", metadata={"n": 1}))
    with contextlib.suppress(SessionStoreError):
        await store.get("s")
        await store.commit(holder, record, release=False)
    assert await store.commit(holder, record, release=True) is Outcome.STORED
    assert await store.increment_counter("s", "n") == 2
    assert nodes.all_keys() == ["session:{s}"]
    await store.aclose()


@pytest.mark.parametrize("known", [3, 1])
async def test_a_planned_switch_loses_nothing(nodes: SentinelSet, known: int) -> None:
    """Sentinel leaves the old primary in the belief that it is one for ten seconds: nobody writes there.

    It is enough to know the one that does it, though it names the new primary to the others first. Sentinel
    does not wait for the copy: what each process was writing at that moment may be lost, as replication is
    asynchronous, and nothing that came later.
    """
    addresses = [f"127.0.0.1:{sentinel.port}" for sentinel in nodes.sentinels[:known]]
    url = f"redis+sentinel://{','.join(addresses)}/{nodes.name}"
    old = nodes.primary()
    async with counting(url) as site, counting(url) as other_process:
        sessions = [await site.begin() for _ in range(8)]
        async with crowd(site, sessions, 1), crowd(other_process, sessions, 1):
            await served(sessions)
            await run_sync(nodes.switch)
            await served(sessions, 20)
        assert command(old, "ROLE")[0] == "master", "it has not been told"
    async with counting(nodes.url) as later:
        for counted in sessions:
            assert set(counted.answers) <= {200, 409}
            assert counted.answers[409] <= 1, "a lock that was handed over just before lasts one second"
            acknowledged = len(of_fate(counted.attempts, Fate.ACKNOWLEDGED))
            assert acknowledged - await later.final(counted) <= 2, "one for each process"


async def test_a_switch_is_heard_of_from_any_sentinel(nodes: SentinelSet) -> None:
    """Those that are listened to may die and come back; a call goes to the new primary without an error."""
    store = RedisSessionStore(nodes.url)
    await store.set("s", SessionData(session_id="s"))
    await _listened_to(nodes.sentinels)
    nodes.kill(nodes.sentinels[0])
    nodes.kill(nodes.sentinels[2])
    old, new = await _switched(nodes, nodes.sentinels[1])
    assert await store.increment_counter("s", "n") == 1
    assert [_count(node) for node in (old, new)] == [0, 1]
    await run_sync(nodes.settle)
    await _listened_to(nodes.sentinels)
    nodes.kill(nodes.sentinels[1])
    old, new = await _switched(nodes, nodes.sentinels[0])
    assert await store.increment_counter("s", "n") == 2
    assert [_count(node) for node in (old, new)] == [1, 2]
    await store.aclose()


async def _listened_to(sentinels: list[Sentinel]) -> None:
    def listeners(sentinel: Sentinel) -> int:
        return len(command(sentinel, "CLIENT", "LIST", "TYPE", "pubsub").splitlines())

    await until(lambda: all(listeners(each) == 1 for each in sentinels), "the store listens")


async def _switched(nodes: SentinelSet, by: Sentinel) -> tuple[RedisServer, RedisServer]:
    """The old and the new primary, when this Sentinel has changed them over and said so."""
    old = by.primary_port()
    await run_sync(command, by, "SENTINEL", "FAILOVER", nodes.name)
    await until(lambda: by.primary_port() != old, "there is a new primary")
    new = by.primary_port()
    first, *_ = [node for node in nodes.nodes if node.port == old]
    await asyncio.sleep(0.3)  # until the news is everywhere; the old one is told in ten seconds
    return first, next(node for node in nodes.nodes if node.port == new)


def _count(node: RedisServer) -> int:
    """What is counted at this node."""
    value = str(command(node, "GET", "session:{s}"))
    return int(json.loads(value[value.index("{") :])["metadata"].get("n", 0))


@pytest.mark.parametrize("forbidden", ["-subscribe", "resetchannels"])
async def test_sentinels_that_do_not_tell_are_asked(
    nodes: SentinelSet, forbidden: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Again and again, each second; one warning says so."""
    for sentinel in nodes.sentinels:
        command(sentinel, "ACL", "SETUSER", "store", "on", "nopass", "allchannels", "+@all", forbidden)
    store = RedisSessionStore(f"{nodes.url}&sentinel_username=store&sentinel_password=any")
    await store.set("s", SessionData(session_id="s"))
    old = nodes.primary()
    await run_sync(nodes.copy, old)
    await run_sync(nodes.switch)
    await asyncio.sleep(AGAIN + 0.3)
    assert await store.increment_counter("s", "n") == 1
    assert _count(old) == 0
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    await store.aclose()


async def test_sentinels_may_have_a_password(nodes: SentinelSet) -> None:
    """It stands in the URL, and is none of Redis itself; a wrong one is a fault that says so."""
    for sentinel in nodes.sentinels:
        command(sentinel, "ACL", "SETUSER", "store", "on", ">se/cret", "allchannels", "+@all")
    url = f"{nodes.url}&sentinel_username=store&sentinel_password="
    stores = [RedisSessionStore(url + password) for password in ("se%2Fcret", "wrong")]
    assert await stores[0].set("s", SessionData(session_id="s"))
    with pytest.raises(SessionStoreError) as caught:
        await stores[1].get("s")
    assert isinstance(caught.value.__cause__, RedisError)
    await asyncio.gather(*[store.aclose() for store in stores])


async def test_whoever_waits_is_told_by_the_new_primary(nodes: SentinelSet) -> None:
    """Nobody has to ask again and again: a subscription at a node that hangs is noticed and made anew."""
    stores = [RedisSessionStore(nodes.url) for _ in range(2)]
    await stores[0].set("s", SessionData(session_id="s"))
    await _hand_over(nodes, *stores)
    old = nodes.primary()
    await run_sync(nodes.copy, old)
    nodes.freeze(old)
    await until(lambda: nodes.primary() is not old, "there is a new primary")
    for store in stores:
        await _until_works(lambda: store.increment_counter("s", "n"))  # noqa: B023
    questions = [await _hand_over(nodes, *stores) for _ in range(3)]
    assert questions[-1] == 0, questions
    await asyncio.gather(*[store.aclose() for store in stores])


async def _hand_over(nodes: SentinelSet, holds: RedisSessionStore, waits: RedisSessionStore) -> int:
    """How often the one who waits asks again until it has the lock that the other lets go."""
    primary = nodes.primary()
    await holds.release(await _taken(holds))
    holder = await _taken(holds)
    waiter = asyncio.create_task(_taken(waits))
    await until(lambda: "session:{s}:wait" in nodes.all_keys(), "somebody waits")
    before = scripts(primary)
    await holds.release(holder)
    await waits.release(await waiter)
    await until(lambda: nodes.all_keys() == ["session:{s}"], "it is over")
    return scripts(primary) - before - 2


async def _taken(store: RedisSessionStore) -> Checkout:
    taken = await store.checkout("s", LockPolicy(), None)
    assert isinstance(taken, Checkout)
    return taken


async def _until_works(write: Callable[[], Awaitable[object]]) -> None:
    """Try again until there is a primary."""
    with anyio.fail_after(PATIENCE):
        while True:
            with contextlib.suppress(SessionStoreError):
                await write()
                return
            await asyncio.sleep(0.02)


async def test_sentinels_that_hang_are_passed_over(nodes: SentinelSet) -> None:
    """The last of three may be the only one that answers: all are asked within the time that a call has."""
    store = RedisSessionStore(nodes.url)
    for hung in nodes.sentinels[:2]:
        nodes.freeze(hung)
        await until(lambda: is_stopped(hung), "it hangs")  # noqa: B023
    assert await store.set("s", SessionData(session_id="s"))
    await store.aclose()


async def test_without_sentinels_the_known_primary_is_used(nodes: SentinelSet) -> None:
    """They are asked for the way only: who has a connection keeps it, who needs one gets an error."""
    stores = [RedisSessionStore(nodes.url) for _ in range(2)]
    assert await stores[0].set("s", SessionData(session_id="s"))
    for sentinel in nodes.sentinels:
        nodes.kill(sentinel)
    assert await stores[0].increment_counter("s", "n") == 1
    with pytest.raises(SessionStoreError) as caught:
        await stores[1].get("s")
    assert isinstance(caught.value.__cause__, MasterNotFoundError)
    await run_sync(nodes.settle)
    assert await stores[1].increment_counter("s", "n") == 2
    await asyncio.gather(*[store.aclose() for store in stores])


def test_a_sentinels_port_may_be_left_out() -> None:
    """It is 26379 then, as in Redis' own tools; an IPv6 address stands in brackets."""
    template = deployment("redis+sentinel://a,[::1]/main").template
    manager = template.sentinel_manager  # type: ignore[attr-defined]  # a SentinelConnectionPool
    settings = [client.connection_pool.connection_kwargs for client in manager.sentinels]
    assert [(each["host"], each["port"]) for each in settings] == [("a", 26379), ("::1", 26379)]


async def test_all_processes_are_told_that_a_session_has_ended(
    nodes: SentinelSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever the session lives, and whichever node a process listens at."""
    await all_processes_are_told(nodes.url, monkeypatch)
