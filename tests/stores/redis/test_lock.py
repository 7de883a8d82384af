"""The distributed lock: one holder, first come first served, nothing left behind."""

from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import AsyncIterator, Awaitable, Callable

import anyio
import pytest
from redis.asyncio import Redis
from redis_server import RedisServer, free_port

from asgi_sessions.errors import LockAcquisitionError, LockReleaseError, SessionStoreError
from asgi_sessions.stores.redis.lock import DistributedLock, DistributedLockManager

pytestmark = pytest.mark.anyio

_LOCK, _QUEUE = "lock:door", "{lock:door}:wait"


@pytest.fixture
async def client(redis_url: str) -> AsyncIterator[Redis]:
    async with Redis.from_url(redis_url, decode_responses=True) as client:
        yield client


@pytest.fixture
async def elsewhere(redis_url: str) -> AsyncIterator[Redis]:
    """The client of another process, as far as Redis can tell."""
    async with Redis.from_url(redis_url) as client:
        yield client


def _patient(client: Redis, timeout: float = 30) -> DistributedLock:
    """One that asks rarely: it gets the lock because it is woken."""
    return DistributedLock(client, "door", timeout, retry_attempts=2, retry_delay=20)


async def _until(condition: Callable[[], Awaitable[bool]]) -> None:
    with anyio.fail_after(10):
        while not await condition():  # noqa: ASYNC110  # Redis sets no Event
            await asyncio.sleep(0.005)


async def _queued(client: Redis, number: int) -> None:
    async def there() -> bool:
        return await client.llen(_QUEUE) == number

    await _until(there)


async def test_a_lock_is_a_key_with_a_token_and_a_lease(client: Redis) -> None:
    """`lock:NAME` holds the token for `timeout` seconds, and is gone after the release."""
    lock = DistributedLock(client, "door", timeout=20)
    assert (lock.acquired, lock.lock_id) == (False, None)
    assert await lock.acquire() is True
    assert lock.acquired
    assert await client.get(_LOCK) == lock.lock_id
    assert 19_000 < await client.pttl(_LOCK) <= 20_000
    assert await lock.release() is True
    assert (lock.acquired, lock.lock_id) == (False, None)
    assert await client.keys() == []


async def test_each_acquisition_has_a_token_of_its_own(client: Redis) -> None:
    """128 random bits, never used twice."""
    lock, tokens = DistributedLock(client, "door"), set()
    for _ in range(3):
        async with lock as held:
            assert held is lock
            tokens.add(lock.lock_id)
    assert len(tokens) == 3
    assert all(token is not None and len(token) == 32 for token in tokens)


async def test_without_blocking_there_is_one_try(client: Redis, elsewhere: Redis) -> None:
    """False where another holds it, and no place in the queue."""
    async with DistributedLock(client, "door"):
        assert await DistributedLock(elsewhere, "door").acquire(blocking=False) is False
        assert await client.keys() == [_LOCK]
    assert await DistributedLock(elsewhere, "door").acquire(blocking=False) is True


@pytest.mark.parametrize(("attempts", "delay"), [(1, 5), (3, 0.02), (2, 0)])
async def test_the_last_failed_try_is_an_error_that_leaves_nothing(
    client: Redis, elsewhere: Redis, attempts: int, delay: float
) -> None:
    """`retry_attempts` bounds the tries; nobody waits in the queue afterwards."""
    async with DistributedLock(client, "door"):
        late = DistributedLock(elsewhere, "door", retry_attempts=attempts, retry_delay=delay)
        with pytest.raises(LockAcquisitionError, match=f"at each of {attempts} tries"):
            await late.acquire()
        assert not late.acquired
        assert await client.exists(_QUEUE) == 0
    assert await client.keys() == []


async def test_waiters_are_woken_in_order_and_get_the_full_lease(client: Redis, elsewhere: Redis) -> None:
    """Far sooner than their next try, from two processes in turn."""
    order: list[int] = []

    async def pass_through(number: int) -> None:
        async with _patient((client, elsewhere)[number % 2]):
            order.append(number)
            assert await client.pttl(_LOCK) > 29_000

    first = DistributedLock(client, "door")
    await first.acquire()
    tasks = []
    for number in range(4):
        tasks.append(asyncio.create_task(pass_through(number)))
        await _queued(client, number + 1)
    await first.release()
    await asyncio.gather(*tasks)
    assert order == [0, 1, 2, 3]
    assert await client.keys() == []


@pytest.mark.parametrize("ticks", range(8))
async def test_an_acquire_cancelled_at_any_moment_leaves_nothing(client: Redis, ticks: int) -> None:
    """No lock and no waiter stay behind."""
    await DistributedLock(client, "other").acquire()
    lock = DistributedLock(client, "door")
    task = asyncio.create_task(lock.acquire())
    for _ in range(ticks):
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    if lock.acquired:
        await lock.release()
    again = DistributedLock(client, "door", retry_attempts=2, retry_delay=5)
    assert await again.acquire()
    await again.release()
    assert await client.keys() == ["lock:other"]


async def test_a_cancelled_waiter_leaves_the_queue(client: Redis, elsewhere: Redis) -> None:
    """Its place is gone at once, and the lock is usable."""
    async with DistributedLock(client, "door"):
        waiter = asyncio.create_task(_patient(elsewhere).acquire())
        await _queued(client, 1)
        waiter.cancel()
        await _queued(client, 0)
    assert await client.keys() == []


async def test_a_lost_lock_is_not_released_for_its_new_holder(client: Redis, elsewhere: Redis) -> None:
    """Compare and delete: False, and the other's lock stays."""
    lock = DistributedLock(client, "door", timeout=0.05)
    await lock.acquire()
    new = _patient(elsewhere)
    await new.acquire()
    assert await lock.release() is False
    assert await client.get(_LOCK) == new.lock_id
    assert await lock.release() is False


async def test_the_lease_ends_by_itself(client: Redis) -> None:
    """Nothing renews it: `acquired` says so, and the same object may acquire again."""
    lock = DistributedLock(client, "door", timeout=0.05)
    await lock.acquire()
    await asyncio.sleep(0.08)
    assert not lock.acquired
    assert await client.exists(_LOCK) == 0
    assert await lock.acquire()
    assert lock.acquired


@pytest.mark.parametrize(("additional", "least"), [(None, 29_000), (100, 99_000), (5, 4_000)])
async def test_renewing_sets_the_lease_from_now(client: Redis, additional: float | None, least: int) -> None:
    """To the timeout again, or to the given seconds, longer or shorter."""
    lock = DistributedLock(client, "door")
    await lock.acquire()
    await client.pexpire(_LOCK, 2_000)
    assert await lock.renew(additional) is True
    assert least < await client.pttl(_LOCK) <= least + 1000


async def test_a_lost_lock_cannot_be_renewed(client: Redis) -> None:
    """False, and the object says that it holds nothing."""
    lock = DistributedLock(client, "door")
    assert await lock.renew() is False
    await lock.acquire()
    await client.set(_LOCK, "another")
    assert await lock.renew() is False
    assert not lock.acquired
    assert await client.get(_LOCK) == "another"


async def test_one_object_serves_one_holder(client: Redis) -> None:
    """While a task holds the lock or waits for it, others hear by the same object what to do instead."""

    async def refused(lock: DistributedLock, *, blocking: bool) -> None:
        with pytest.raises(LockAcquisitionError, match="for each holder"):
            await lock.acquire(blocking)

    lock, waiting = DistributedLock(client, "door"), _patient(client)
    async with lock:
        waiter = asyncio.create_task(waiting.acquire())
        await _queued(client, 1)
        for blocking in (True, False):
            await asyncio.create_task(refused(lock, blocking=blocking))
            await refused(waiting, blocking=blocking)
        assert await client.get(_LOCK) == lock.lock_id
    assert await waiter is True
    await refused(waiting, blocking=True)  # the task that waited is over, but it is not this one
    await waiting.release()


async def test_acquiring_again_is_no_second_lock(client: Redis, caplog: pytest.LogCaptureFixture) -> None:
    """The task that holds it gets True, with one warning; one release lets it go."""
    lock = DistributedLock(client, "door")
    for _ in range(2):
        caplog.clear()
        await lock.acquire()
        token = lock.lock_id
        assert await lock.acquire() is True
        assert await lock.acquire(blocking=False) is True
        assert lock.lock_id == token
        assert [record.levelno for record in caplog.records] == [logging.WARNING]
        assert "acquired again" in caplog.text
        assert await lock.release() is True
        assert await client.keys() == []


async def test_a_block_within_a_block_keeps_the_lock(client: Redis) -> None:
    """Until the outer one is left; what was acquired before both of them stays."""
    lock = DistributedLock(client, "door")
    async with lock:
        token = lock.lock_id
        async with lock, lock:
            assert lock.lock_id == token
        assert lock.acquired
        assert await client.get(_LOCK) == token
    assert await client.keys() == []
    await lock.acquire()
    async with lock:
        pass
    assert lock.acquired
    await lock.release()


async def test_a_block_releases_what_it_has_acquired_itself(
    client: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    """Whose lease has ended does not take the lock from the task that has acquired it since."""
    lock = DistributedLock(client, "door", timeout=0.1)
    entered, left = asyncio.Event(), asyncio.Event()

    async def other() -> None:
        lock.timeout = 30
        async with lock:
            entered.set()
            await left.wait()
            assert lock.acquired
            assert await client.get(_LOCK) == lock.lock_id

    async with lock:
        await asyncio.sleep(0.15)
        task = asyncio.create_task(other())
        await entered.wait()
    left.set()
    await task
    assert await client.keys() == []
    assert "lost before its block ended" in caplog.text


async def test_a_block_may_be_left_by_another_task(client: Redis) -> None:
    """As frameworks leave what they entered for a test or an app."""
    lock = DistributedLock(client, "door")
    await asyncio.create_task(lock.__aenter__())
    assert lock.acquired
    await lock.__aexit__(None, None, None)
    assert await client.keys() == []


@pytest.mark.parametrize("ticks", range(4))
async def test_a_release_that_is_cancelled_is_a_release(client: Redis, elsewhere: Redis, ticks: int) -> None:
    """At whatever moment, though much else is on its way to Redis."""
    lock = DistributedLock(client, "door")
    await lock.acquire()
    others = [asyncio.create_task(DistributedLock(client, f"d{n}").acquire()) for n in range(3)]
    task = asyncio.create_task(lock.release())
    for _ in range(ticks):
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, *others, return_exceptions=True)
    if not lock.acquired:  # else it was cancelled before it began
        await _until(lambda: DistributedLock(elsewhere, "door").acquire(blocking=False))


async def test_a_block_releases_also_after_an_exception(client: Redis) -> None:
    """The exception rises, the lock is free."""
    with pytest.raises(RuntimeError, match="mine"):
        async with DistributedLock(client, "door"):
            raise RuntimeError("mine")
    assert await client.keys() == []


async def test_a_block_that_outlived_its_lease_warns(client: Redis, caplog: pytest.LogCaptureFixture) -> None:
    """Whoever relied on the lock must be able to find out."""
    async with DistributedLock(client, "door"):
        await client.delete(_LOCK)
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "lost before its block ended" in caplog.text


async def test_many_tasks_hold_the_lock_one_at_a_time(client: Redis, elsewhere: Redis) -> None:
    """A counter that is read, held and written under the lock loses nothing."""

    async def count(via: Redis) -> None:
        async with DistributedLock(via, "door", retry_attempts=100, retry_delay=0.2):
            value = int(await client.get("counter") or 0)
            await asyncio.sleep(0)
            await client.set("counter", value + 1)

    await asyncio.gather(*[count((client, elsewhere)[n % 2]) for n in range(30)])
    assert await client.get("counter") == "30"
    assert await client.keys() == ["counter"]


@pytest.mark.parametrize("name", ["a{b}c", "{}", "a{b", "a b", "ünï:wait"])
async def test_any_name_will_do(client: Redis, name: str) -> None:
    """Braces, blanks and other alphabets name a lock, with a queue of its own."""
    async with DistributedLock(client, name):
        assert await client.exists(f"lock:{name}") == 1
        with pytest.raises(LockAcquisitionError):
            await DistributedLock(client, name, retry_attempts=2, retry_delay=0.01).acquire()
    assert await client.keys() == []


@pytest.mark.parametrize(
    "wrong",
    [
        {"lock_name": ""},
        {"timeout": 0},
        {"timeout": float("nan")},
        {"retry_attempts": 0},
        {"retry_delay": -1},
    ],
)
def test_wrong_values_are_refused_at_once(wrong: dict[str, float]) -> None:
    """An empty name and times that are none fail in the constructor."""
    values = {"lock_name": "door", **wrong}
    with pytest.raises(ValueError, match=r"lock has a name|timeout|retry"):
        DistributedLock(Redis(), **values)  # type: ignore[arg-type]  # a table of mixed values


async def test_a_wrong_renewal_time_is_refused(client: Redis) -> None:
    """Seconds above 0."""
    with pytest.raises(ValueError, match="above 0"):
        await DistributedLock(client, "door").renew(0)


# -- faults ---------------------------------------------------------------------------------------------


async def test_a_server_that_is_not_there_is_a_store_error() -> None:
    """Not a lock that is busy."""
    async with Redis(port=free_port()) as client:
        with pytest.raises(SessionStoreError, match="cannot be reached"):
            await DistributedLock(client, "door").acquire()


async def _fail_in_a_block(client: Redis, server: RedisServer) -> None:
    async with DistributedLock(client, "window"):
        server.kill()
        raise ZeroDivisionError


async def test_a_fault_of_redis_at_the_release_is_a_release_error(own_redis: RedisServer) -> None:
    """The cause is chained; in a block that failed by itself, the block's own exception rises."""
    async with Redis.from_url(own_redis.url) as client:
        lock = DistributedLock(client, "door")
        await lock.acquire()
        with pytest.raises(ZeroDivisionError):
            await _fail_in_a_block(client, own_redis)
        with pytest.raises(LockReleaseError) as caught:
            await lock.release()
        assert isinstance(caught.value.__cause__, SessionStoreError)
        own_redis.start()
        with pytest.raises(LockReleaseError):
            async with DistributedLock(client, "window"):
                own_redis.kill()


async def test_a_release_that_failed_is_tried_again(own_redis: RedisServer) -> None:
    """The error says so, and the lock is free as soon as Redis is well."""
    async with Redis.from_url(own_redis.url) as client:
        lock = DistributedLock(client, "door")
        await lock.acquire()
        await client.replicaof("127.0.0.1", str(free_port()))
        with pytest.raises(LockReleaseError, match=r"tried again: .*read-only replica"):
            await lock.release()
        assert not lock.acquired
        await client.replicaof("NO", "ONE")
        async with DistributedLock(client, "door", retry_attempts=2, retry_delay=0.5):
            pass


async def test_a_lock_handed_over_but_gone_is_not_acquired(client: Redis) -> None:
    """A waiter that was frozen until its claim had ended does not believe that it holds the lock."""
    holder = DistributedLock(client, "door")
    await holder.acquire()
    late = _patient(client)
    waiter = asyncio.create_task(late.acquire())
    await _queued(client, 1)
    _, channel, token = str(await client.lpop(_QUEUE)).split()
    seconds, micros = await client.time()
    await client.publish(channel, f"{token}:{seconds * 1000 + micros // 1000}:")
    with pytest.raises(LockAcquisitionError, match="not taken up in time"):
        await waiter
    assert not late.acquired
    assert await client.get(_LOCK) == holder.lock_id


# -- event loops and the manager ------------------------------------------------------------------------


def test_locks_work_in_one_loop_after_the_other(redis_url: str) -> None:
    """Whatever loop the client was made in; nothing is left open."""
    client = Redis.from_url(redis_url)

    async def visit() -> None:
        async with DistributedLock(client, "door"):
            pass

    for _ in range(2):
        asyncio.run(visit())
    asyncio.run(client.aclose())
    gc.collect()


async def test_the_connections_end_with_the_client(redis_url: str) -> None:
    """Clients that come and go in one loop leave no connection behind."""
    async with Redis.from_url(redis_url) as observer:

        async def connections() -> int:
            return int((await observer.info("clients"))["connected_clients"])

        before = await connections()
        for _ in range(3):
            async with Redis.from_url(redis_url) as client, DistributedLock(client, "door"):
                pass
            del client
        gc.collect()

        async def closed() -> bool:
            return await connections() <= before

        await _until(closed)


async def test_a_manager_knows_what_is_held(client: Redis) -> None:
    """Locks that nobody holds are not kept; `cleanup` releases the others."""
    manager = DistributedLockManager(client)
    locks = [manager.get_lock(f"door{n}", timeout=20) for n in range(3)]
    assert len(manager) == 0
    for lock in locks:
        await lock.acquire()
    await locks[0].release()
    await client.delete("lock:door1")
    assert await locks[1].renew() is False
    assert len(manager) == 1
    assert await client.keys() == ["lock:door2"]
    assert await manager.cleanup() == 1
    assert len(manager) == 0
    assert await client.keys() == []


async def test_a_managers_locks_are_objects_of_their_own(client: Redis) -> None:
    """Two locks of one name exclude each other, and each has the settings that it was asked for."""
    manager = DistributedLockManager(client)
    one, two = manager.get_lock("door", timeout=5), manager.get_lock("door", 6, 7, 0.5)
    assert (one.timeout, one.retry_attempts, one.retry_delay) == (5, 3, 0.1)
    assert (two.timeout, two.retry_attempts, two.retry_delay) == (6, 7, 0.5)
    async with one:
        assert await two.acquire(blocking=False) is False


async def test_an_expired_lock_is_not_kept(client: Redis) -> None:
    """A lock that ran out without a release is forgotten."""
    manager = DistributedLockManager(client)
    await manager.get_lock("door", timeout=0.05).acquire()
    await asyncio.sleep(0.08)
    assert len(manager) == 0


async def test_what_ran_out_is_not_piled_up(client: Redis) -> None:
    """Also where nobody asks how many locks there are."""
    manager = DistributedLockManager(client)
    for n in range(300):
        await manager.get_lock(f"door{n}", timeout=0.01).acquire()
    await asyncio.sleep(0.02)
    for n in range(300, 600):
        await manager.get_lock(f"door{n}", timeout=0.01).acquire()
    assert len(manager._held) <= 300


async def test_a_cleanup_tries_all_before_it_complains(own_redis: RedisServer) -> None:
    """A fault of Redis is reported once, and nothing counts as held any more."""
    async with Redis.from_url(own_redis.url) as client:
        manager = DistributedLockManager(client)
        for name in ("door", "window"):
            await manager.get_lock(name).acquire()
        own_redis.kill()
        with pytest.raises(LockReleaseError):
            await manager.cleanup()
        assert len(manager) == 0
