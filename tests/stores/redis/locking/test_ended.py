"""The channel on which ended sessions are told: heard while somebody waits, missed by nobody."""

from __future__ import annotations

import asyncio
import logging
from functools import partial

import pytest
from deployments import command
from redis.asyncio import Redis
from redis_server import RedisServer
from visitors import until

from asgi_sessions import RedisSessionStore, SessionData, SessionStoreError
from asgi_sessions.stores import endings
from asgi_sessions.stores.checkout import Checkout, LockPolicy

pytestmark = pytest.mark.anyio

CHANNEL = "session:wake:ended"


@pytest.fixture
def never_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever waits looks once, and then has to be told."""
    monkeypatch.setattr(endings, "LOOK_EVERY", 3600.0)
    monkeypatch.setattr(endings, "_FIRST_PAUSE", 3600.0)


async def _put(store: RedisSessionStore, session_id: str = "s") -> None:
    await store.set(session_id, SessionData(session_id=session_id))


async def _waiting(store: RedisSessionStore, session_id: str = "s") -> asyncio.Task[None]:
    """A task that waits for the end, and has looked."""
    known = (await store._states.get()).endings
    task = asyncio.create_task(store.until_ended(session_id))
    await until(
        lambda: session_id in known._watched and bool(known._watched[session_id].sleepers), "it waits"
    )
    await until(lambda: known._watched[session_id].due < 1e9, "it has looked")
    return task


async def _listeners(raw: Redis) -> int:
    """How many processes hear which sessions have ended."""
    ((_, count),) = await raw.pubsub_numsub(CHANNEL)
    return int(count)


@pytest.mark.usefixtures("never_looks")
async def test_a_message_that_was_missed(store: RedisSessionStore, raw: Redis) -> None:
    """While the connection was lost: each session that somebody waits for is looked at again."""
    await _put(store)
    await _put(store, "bystander")
    task, other = await _waiting(store), await _waiting(store, "bystander")
    await raw.delete("session:{s}")
    await raw.client_kill_filter(_type="pubsub")
    await asyncio.wait_for(task, 20)
    await until(lambda: _due(store, "bystander") > 1e3, "the other one was looked at, and is told again")
    await store.delete("bystander")
    await asyncio.wait_for(other, 20)


def _due(store: RedisSessionStore, session_id: str) -> float:
    state = store._states.here()
    assert state is not None
    return state.endings._watched[session_id].due


async def test_one_connection_and_one_channel_for_all(store: RedisSessionStore, raw: Redis) -> None:
    """Whoever waits for a lock and whoever waits for an end share it; a process without them has none."""
    assert await _listeners(raw) == 0
    names = [f"s{number}" for number in range(50)]
    for name in names:
        await _put(store, name)
    tasks = [await _waiting(store, name) for name in names]
    holder = await store.checkout("s0", LockPolicy(), None)
    waiter = asyncio.create_task(store.checkout("s0", LockPolicy(), None))
    await until(lambda: not waiter.done(), "it waits")
    assert await _listeners(raw) == 1
    assert len(await raw.client_list(_type="pubsub")) == 1
    assert isinstance(holder, Checkout)
    await store.release(holder)
    assert isinstance(await waiter, Checkout)
    assert await store.delete_batch(names) == dict.fromkeys(names, True)
    await asyncio.wait_for(asyncio.gather(*tasks), 20)


async def test_nobody_waits_any_more(store: RedisSessionStore, other: RedisSessionStore, raw: Redis) -> None:
    """The process leaves the channel with the first message that it gets for nothing, and joins it again."""
    for _ in range(2):
        await _put(other)
        await _put(other, "another")
        task = await _waiting(store)
        assert await _listeners(raw) == 1
        await other.delete("s")
        await asyncio.wait_for(task, 20)
        await other.delete("another")
        while await _listeners(raw):  # noqa: ASYNC110  # another process sets no event
            await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    ("rules", "poll"),
    [
        (["resetchannels"], True),
        (["-publish"], True),
        (["-subscribe"], True),
        (["resetchannels", "&session:wake:" + "?" * 16], False),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
async def test_a_user_without_a_right_to_the_channel(
    own_redis: RedisServer, caplog: pytest.LogCaptureFixture, rules: list[str], poll: bool
) -> None:
    """Whoever waits looks again and again, less and less often; waiters for locks have what they had."""
    command(own_redis, "ACL", "SETUSER", "app", "on", ">secret", "~*", "&*", "+@all", *rules)
    url = f"redis://app:secret@127.0.0.1:{own_redis.port}/0"
    store, other = RedisSessionStore(url), RedisSessionStore(url)
    for name in ("s", "t"):
        await _put(other, name)
    tasks = [await _waiting(store, name) for name in ("s", "t")]
    await other.delete_batch(["s", "t"])
    await asyncio.wait_for(asyncio.gather(*tasks), 20)
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert [("they poll" in each, "has ended" in each) for each in warnings] == [(poll, not poll)]
    assert poll or CHANNEL in warnings[0]
    await asyncio.gather(store.aclose(), other.aclose())


async def test_looking_gets_rarer(own_redis: RedisServer) -> None:
    """Where nobody may tell: not ten times a second for each of ten thousand sockets."""
    command(own_redis, "ACL", "SETUSER", "app", "on", ">secret", "~*", "+@all", "resetchannels")
    store = RedisSessionStore(f"redis://app:secret@127.0.0.1:{own_redis.port}/0")
    await _put(store)
    task = await _waiting(store)
    watched = (await store._states.get()).endings._watched["s"]
    for pause in (0.5, 1.0, 2.0):  # it doubles with each look
        await until(partial(lambda pause: watched.pause == pause, pause), "it looks")
    await store.delete("s")
    await asyncio.wait_for(task, 20)
    await store.aclose()


async def test_redis_goes_away(own_redis: RedisServer) -> None:
    """That is no end. What it knows when it is back decides."""
    store = RedisSessionStore(own_redis.url, socket_timeout=0.5)
    await _put(store)
    await _put(store, "t")
    gone, back = await _waiting(store), await _waiting(store, "t")
    own_redis.kill()
    await asyncio.sleep(1)
    assert not gone.done()
    assert not back.done()
    own_redis.start()  # empty
    while True:
        try:
            await _put(store, "t")
            break
        except SessionStoreError:
            await asyncio.sleep(0.02)
    await asyncio.wait_for(gone, 20)
    if not back.done():  # it may have looked before the session was there again
        await store.delete("t")
    await asyncio.wait_for(back, 20)
    await store.aclose()


async def test_a_user_that_may_not_leave_the_channel(own_redis: RedisServer) -> None:
    """As the rights of an earlier release have it: the process stays, and its waiters are told as before."""
    command(own_redis, "ACL", "SETUSER", "app", "on", ">secret", "~*", "&*", "+@all", "-unsubscribe")
    store = RedisSessionStore(f"redis://app:secret@127.0.0.1:{own_redis.port}/0")
    for _ in range(3):
        await _put(store)
        await _put(store, "another")
        task = await _waiting(store)
        await store.delete("s")
        await asyncio.wait_for(task, 20)
        await store.delete("another")
    state = store._states.here()
    assert state is not None
    assert state.subscription.live
    assert state.subscription._subscriptions == 1
    await store.aclose()
