"""What goes over all sessions on Redis: complete, in steps, and without keeping the others waiting."""

from __future__ import annotations

import asyncio
import tracemalloc
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from deployments import command
from redis.asyncio import Redis
from redis_server import RedisServer

from asgi_sessions import RedisSessionStore, SessionData, SessionFilter
from asgi_sessions.record.codec import encode_checked
from asgi_sessions.stores.checkout import Checkout, Lifetime, LockPolicy
from asgi_sessions.stores.redis.commands.commands import CHUNK
from asgi_sessions.stores.redis.records.operations import AT_ONCE

pytestmark = pytest.mark.anyio

MANY = 4 * CHUNK


async def fill(store: RedisSessionStore, count: int = MANY) -> dict[str, SessionData]:
    records = {f"s{n:05}": SessionData(session_id=f"s{n:05}", message_count=2) for n in range(count)}
    await store.set_batch(records)
    return records


async def test_ids_come_one_by_one(store: RedisSessionStore) -> None:
    """All of them, also those that another store object made, and nothing else."""
    records = await fill(store)
    await store.create("held", encode_checked(SessionData(session_id="held")), Lifetime(60), LockPolicy())
    assert sorted([session_id async for session_id in store.iter_active()]) == sorted([*records, "held"])
    async for session_id in store.iter_active():
        assert await store.exists(session_id), "the store may be used meanwhile"
        break


@pytest.mark.parametrize(
    "overview",
    [
        RedisSessionStore.count_active,
        RedisSessionStore.get_metrics,
        RedisSessionStore.get_stats,
        lambda store: store.find(SessionFilter(min_messages=3)),
        lambda store: store.list_active(20),
    ],
    ids=["count_active", "get_metrics", "get_stats", "find", "a page"],
)
async def test_an_overview_keeps_nothing_and_nobody_waiting(
    store: RedisSessionStore, overview: Callable[[RedisSessionStore], Awaitable[Any]]
) -> None:
    """It takes no more memory for eight times as many sessions, and others come to work after each step."""
    taken = []
    for count in (CHUNK, 8 * CHUNK):
        await fill(store, count)
        turns = 0

        async def count_turns() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        counting = asyncio.ensure_future(count_turns())
        tracemalloc.start()
        await overview(store)
        taken.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        counting.cancel()
        assert turns >= count / CHUNK, "each page, or each hundred of records, is a step of its own"
    assert taken[1] < taken[0] + 500_000, "eight times as many records would be 10 MB more"


@pytest.mark.parametrize("limit", [0, 1, AT_ONCE + 1, None])
async def test_finding_ends_when_it_has_enough(
    redis_server: RedisServer, store: RedisSessionStore, limit: int | None
) -> None:
    """Of more than `limit` nobody says which; they come sorted."""
    records = await fill(store)
    command(redis_server, "CONFIG", "RESETSTAT")
    found = [data.session_id for data in await store.find(SessionFilter(min_messages=2), limit)]
    assert found == sorted(set(found))
    assert len(found) == (len(records) if limit is None else limit)
    asked = command(redis_server, "INFO", "commandstats").get("cmdstat_mget", {"calls": 0})["calls"]
    assert asked <= (len(records) / AT_ONCE + CHUNK / AT_ONCE if limit is None else 3)


async def test_stats_tell_of_all_processes(redis_url: str, store: RedisSessionStore) -> None:
    """Which locks are held, and for which of them somebody waits, wherever that is."""
    elsewhere = RedisSessionStore(redis_url)
    await fill(store, 3)
    held = [await elsewhere.checkout(name, LockPolicy(), None) for name in ("s00000", "s00001")]
    waiting = asyncio.ensure_future(store.checkout("s00001", LockPolicy(), None))
    async with Redis.from_url(redis_url) as raw:
        while not await raw.exists("session:{s00001}:wait"):  # noqa: ASYNC110  # Redis sets no events
            await asyncio.sleep(0.005)
    stats = await store.get_stats()
    assert {name: stats[name] for name in ("total_sessions", "active_sessions", "expired_sessions")} == {
        "total_sessions": 3, "active_sessions": 3, "expired_sessions": 0
    }  # fmt: skip
    assert (stats["store_type"], stats["default_ttl"]) == ("redis", 3600)
    assert (stats["locks_held"], stats["locks_waited_for"]) == (2, 1)
    for taken in held:
        assert isinstance(taken, Checkout)
        await elsewhere.release(taken)
    taken = await waiting
    assert isinstance(taken, Checkout)
    await store.release(taken)
    stats = await store.get_stats()
    assert (stats["locks_held"], stats["locks_waited_for"]) == (0, 0)
    await elsewhere.aclose()


async def test_a_health_check_costs_the_same_for_one_and_for_many(
    redis_server: RedisServer, store: RedisSessionStore
) -> None:
    """Three calls, whatever lies there; nothing is left of them."""
    costs = []
    for count in (1, MANY):
        records = await fill(store, count)
        command(redis_server, "CONFIG", "RESETSTAT")
        health = await store.health_check()
        stats = command(redis_server, "INFO", "commandstats")
        costs.append({name: each["calls"] for name, each in stats.items() if "config" not in name})
        assert health["healthy"], health
        assert health["stats"]["store_type"] == "redis"
        assert await store.count_active() == len(records)
    assert costs[0] == costs[1]
    assert not {"cmdstat_scan", "cmdstat_keys"} & set(costs[0])


async def test_a_record_that_has_ended_is_not_brought_back(store: RedisSessionStore) -> None:
    """`create=False` writes over what is there, and nothing else; its user's link does no harm."""
    data = SessionData(session_id="s", user_id="ada")
    assert await store.set("s", data, create=False) is False
    assert await store.get("s") is None
    assert await store.set("s", data) is True
    data.message_count = 5
    assert await store.set("s", data, create=False) is True
    assert await store.get("s") == data
    assert await store.delete_for_user("ada") == 1
    assert await store.set("s", data, create=False) is False
    assert await store.delete_for_user("ada") == 0
