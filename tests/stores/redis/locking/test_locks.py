"""The queue within one process: one request speaks with Redis, the others wait, and nothing is stale."""

from __future__ import annotations

import asyncio
import random
from functools import partial

import pytest
from redis.asyncio import Redis
from redis_server import Proxy, RedisServer

from asgi_sessions.errors import LockTimeoutError, SessionStoreError, TooManyWaitersError
from asgi_sessions.record.codec import decode, encode_checked
from asgi_sessions.record.model import SessionData
from asgi_sessions.stores.checkout import Checkout, Lifetime, LockPolicy, Missing, Outcome
from asgi_sessions.stores.redis.commands.keys import KeySpace
from asgi_sessions.stores.redis.commands.timing import NO_CHANNEL
from asgi_sessions.stores.redis.connection.call import CLOSED
from asgi_sessions.stores.redis.locking.leases import Lease
from asgi_sessions.stores.redis.locking.queue import TURNS
from asgi_sessions.stores.redis.locking.waiter import Acquired
from asgi_sessions.stores.redis.store import RedisSessionStore

pytestmark = pytest.mark.anyio

_HOUR = Lifetime(absolute=3600)
_LOCK = LockPolicy()
_RECORD, _HOLDER, _QUEUE = "session:{s}", "session:{s}:lock", "session:{s}:wait"


def _record(**metadata: object) -> bytes:
    return encode_checked(SessionData(session_id="s", metadata=metadata))


def _values(taken: Checkout) -> dict[str, object]:
    return decode(SessionData, taken.record).metadata


async def _stored(store: RedisSessionStore, lifetime: Lifetime = _HOUR) -> None:
    assert await store.create("s", _record(n=0), lifetime, None) is not None


async def _taken(store: RedisSessionStore, lock: LockPolicy = _LOCK) -> Checkout:
    taken = await store.checkout("s", lock, _HOUR)
    assert isinstance(taken, Checkout)
    return taken


async def _behind(
    store: RedisSessionStore, number: int = 1, lock: LockPolicy = _LOCK
) -> list[asyncio.Task[Checkout]]:
    """Requests that wait behind a holder of the same process."""
    tasks = [asyncio.create_task(_taken(store, lock)) for _ in range(number)]
    await asyncio.sleep(0)
    return tasks


async def _count(store: RedisSessionStore, order: list[int], number: int) -> None:
    taken = await _taken(store)
    order.append(number)
    n = _values(taken)["n"]
    assert isinstance(n, int)
    await asyncio.sleep(0)
    assert await store.commit(taken, _record(n=n + 1), release=True) is Outcome.STORED


async def _in_queue(raw: Redis, number: int) -> None:
    while await raw.llen(_QUEUE) != number:  # noqa: ASYNC110  # Redis sets no Event
        await asyncio.sleep(0.005)


async def _scripts(raw: Redis) -> int:
    stats = await raw.info("commandstats")
    return int(stats.get("cmdstat_evalsha", {"calls": 0})["calls"])


async def _nothing_left(raw: Redis, *stores: RedisSessionStore) -> None:
    """The record alone is left in Redis, and no queue in the processes."""
    for store in stores:
        await store.exists("s")  # what was posted before has arrived then
        state = await store._states.get()
        assert len(state.locks) == 0
        assert len(state.leases) == 0
        assert state.subscription._expected == {}
    assert set(await raw.keys()) <= {_RECORD}


async def test_only_one_of_a_process_waits_in_redis(
    store: RedisSessionStore, other: RedisSessionStore, raw: Redis
) -> None:
    """The rest wait behind it, and each has its turn."""
    await _stored(store)
    holder = await _taken(other)
    order: list[int] = []
    tasks = [asyncio.create_task(_count(store, order, number)) for number in range(6)]
    await _in_queue(raw, 1)
    await other.release(holder)
    await asyncio.gather(*tasks)
    assert order == list(range(6))
    await _nothing_left(raw, store, other)


async def test_a_commit_is_all_that_a_pass_costs(store: RedisSessionStore, raw: Redis) -> None:
    """The next request of the process goes on with what was stored: one round trip for each write."""
    await _stored(store)
    order: list[int] = []
    await store.release(await _taken(store))
    await raw.config_resetstat()
    await asyncio.gather(*[_count(store, order, number) for number in range(TURNS + 1)])
    assert await _scripts(raw) == 1 + TURNS + 1
    found = await store.get("s")
    assert found is not None
    assert found.metadata == {"n": TURNS + 1}
    await _nothing_left(raw, store)


async def test_a_pass_without_a_change_costs_one_question(store: RedisSessionStore, raw: Redis) -> None:
    """It loads the record and takes the lock over; nobody lets it go in between."""
    await _stored(store)
    holder = await _taken(store)
    (waiter,) = await _behind(store)
    await raw.config_resetstat()
    await store.release(holder)
    taken = await waiter
    assert await _scripts(raw) == 1
    assert taken.token != holder.token
    assert await raw.getrange(_HOLDER, 0, 31) == taken.token
    await store.release(taken)
    await _nothing_left(raw, store)


async def test_after_some_passes_another_process_has_its_turn(
    store: RedisSessionStore, other: RedisSessionStore, raw: Redis
) -> None:
    """A crowd in one process does not keep the others out."""
    await _stored(store)
    holder = await _taken(store)
    order: list[int] = []
    tasks = [asyncio.create_task(_count(other, order, 100))]
    await _in_queue(raw, 1)
    tasks += [asyncio.create_task(_count(store, order, number)) for number in range(TURNS + 4)]
    await asyncio.sleep(0)
    assert await store.commit(holder, _record(n=0), release=True) is Outcome.STORED
    await asyncio.gather(*tasks)
    assert order == [*range(TURNS), 100, *range(TURNS, TURNS + 4)]
    await _nothing_left(raw, store, other)


async def test_passes_without_a_change_count_too(
    store: RedisSessionStore, other: RedisSessionStore, raw: Redis
) -> None:
    """Readers keep nobody out either."""
    await _stored(store)
    order: list[int] = []

    async def read(number: int) -> None:
        taken = await _taken(store)
        order.append(number)
        await store.release(taken)

    holder = await _taken(store)
    tasks = [asyncio.create_task(_count(other, order, 100))]
    await _in_queue(raw, 1)
    tasks += [asyncio.create_task(read(number)) for number in range(TURNS + 2)]
    await asyncio.sleep(0)
    await store.release(holder)
    await asyncio.gather(*tasks)
    assert order == [*range(TURNS), 100, *range(TURNS, TURNS + 2)]


async def test_a_waiter_never_sees_what_was_overwritten_before_its_turn(
    store: RedisSessionStore, other: RedisSessionStore
) -> None:
    """A write that waits for nobody is seen by the next, whatever the holder had loaded."""
    await _stored(store)
    holder = await _taken(store)
    (waiter,) = await _behind(store)
    await other.set("s", SessionData(session_id="s", metadata={"by": "other"}))
    await store.release(holder)
    taken = await waiter
    assert _values(taken) == {"by": "other"}
    assert await store.commit(taken, _record(n=1), release=True) is Outcome.STORED


@pytest.mark.parametrize("ended_by", ["commit", "release", "discard"])
async def test_a_deleted_record_is_gone_for_all_who_wait(
    store: RedisSessionStore, other: RedisSessionStore, raw: Redis, ended_by: str
) -> None:
    """Deleted by another while it was held: the holder is refused, and nobody gets it back."""
    await _stored(store)
    holder = await _taken(store)
    waiters = [asyncio.create_task(store.checkout("s", _LOCK, _HOUR)) for _ in range(3)]
    await asyncio.sleep(0)
    await other.delete("s")
    if ended_by == "commit":
        assert await store.commit(holder, _record(n=1), release=True) is Outcome.GONE
    elif ended_by == "release":
        await store.release(holder)
    else:
        assert await store.discard(holder) is Outcome.GONE
    assert await asyncio.gather(*waiters) == [Missing.ABSENT] * 3
    await _nothing_left(raw, store)


async def test_a_delete_ends_the_waiting_behind_its_holder(store: RedisSessionStore, raw: Redis) -> None:
    """Those who wait in the same process learn at once, and who comes later does not wait at all."""
    await _stored(store)
    holder = await _taken(store)
    waiters = [asyncio.create_task(store.checkout("s", _LOCK, _HOUR)) for _ in range(2)]
    await asyncio.sleep(0)
    assert await store.delete("s") is True
    assert await asyncio.gather(*waiters) == [Missing.ABSENT] * 2
    assert await store.checkout("s", _LOCK, _HOUR) is Missing.ABSENT
    assert await store.commit(holder, _record(n=1), release=True) is Outcome.GONE
    await _nothing_left(raw, store)


async def test_a_delete_elsewhere_ends_the_waiting_with_the_next_renewal(
    store: RedisSessionStore, other: RedisSessionStore, raw: Redis
) -> None:
    """The lease is gone with the record; the heartbeat of the holder's process finds out."""
    await _stored(store)
    holder = await _taken(store, LockPolicy(timeout=0.15))
    waiter = asyncio.create_task(store.checkout("s", _LOCK, _HOUR))
    await asyncio.sleep(0)
    assert await other.delete("s") is True
    assert await asyncio.wait_for(waiter, 5) is Missing.ABSENT
    assert await store.commit(holder, _record(n=1), release=True) is Outcome.GONE
    await _nothing_left(raw, store, other)


async def test_a_record_that_expired_under_its_lock_leaves_no_lock(
    store: RedisSessionStore, other: RedisSessionStore, raw: Redis
) -> None:
    """The next one here takes it over and finds no record: who waits elsewhere learns that at once."""
    await _stored(store)
    holder = await _taken(store)
    here = asyncio.create_task(store.checkout("s", _LOCK, _HOUR))
    elsewhere = asyncio.create_task(other.checkout("s", _LOCK, _HOUR))
    await _in_queue(raw, 1)
    await raw.delete(_RECORD)
    await store.release(holder)
    assert await here is Missing.ABSENT
    assert await asyncio.wait_for(elsewhere, 0.5) is Missing.ABSENT
    assert await raw.keys() == []
    await _nothing_left(raw, store, other)


async def test_a_refused_commit_passes_the_lock_on(
    store: RedisSessionStore, other: RedisSessionStore, raw: Redis
) -> None:
    """After a conflict the next one loads what is there."""
    await _stored(store)
    holder = await _taken(store)
    (waiter,) = await _behind(store)
    await other.set("s", SessionData(session_id="s", metadata={"by": "other"}))
    assert await store.commit(holder, _record(n=1), release=True) is Outcome.CONFLICT
    taken = await waiter
    assert _values(taken) == {"by": "other"}
    await store.release(taken)
    await _nothing_left(raw, store)


async def test_a_lock_that_was_lost_is_not_passed_on(
    store: RedisSessionStore, other: RedisSessionStore, raw: Redis
) -> None:
    """Who waits behind a holder that lost its lease queues behind who has it now."""
    await _stored(store)
    holder = await _taken(store)
    (waiter,) = await _behind(store)
    await raw.delete(_HOLDER)
    thief = await _taken(other)
    assert await store.commit(holder, _record(n=1), release=True) is Outcome.LOST
    await _in_queue(raw, 1)
    assert not waiter.done()
    assert await other.commit(thief, _record(n=2), release=True) is Outcome.STORED
    taken = await waiter
    assert _values(taken) == {"n": 2}
    await store.release(taken)
    await _nothing_left(raw, store, other)


@pytest.mark.parametrize("policy", [LockPolicy(timeout=0.1, max_hold=0.1), LockPolicy(timeout=0.1)])
async def test_nobody_waits_for_a_holder_that_has_lost_its_lease(
    store: RedisSessionStore, raw: Redis, policy: LockPolicy
) -> None:
    """The heartbeat finds out; those behind it ask Redis without waiting for its end."""
    await _stored(store)
    holder = await _taken(store, policy)
    (waiter,) = await _behind(store)
    if policy.max_hold > 1:
        await raw.delete(_HOLDER)
    taken = await asyncio.wait_for(waiter, 5)
    assert await store.commit(holder, _record(n=1), release=True) is Outcome.LOST
    assert await store.commit(taken, _record(n=2), release=True) is Outcome.STORED
    await _nothing_left(raw, store)


async def test_a_passed_on_lock_is_renewed(store: RedisSessionStore, raw: Redis) -> None:
    """The heartbeat goes on for the next holder, with a `max_hold` of its own."""
    policy = LockPolicy(timeout=0.15)
    await _stored(store)
    holder = await _taken(store, policy)
    (waiter,) = await _behind(store, lock=policy)
    assert await store.commit(holder, _record(n=1), release=True) is Outcome.STORED
    taken = await waiter
    await asyncio.sleep(0.4)
    assert await store.commit(taken, _record(n=2), release=True) is Outcome.STORED
    await _nothing_left(raw, store)


@pytest.mark.parametrize("passive", [False, True])
async def test_a_request_that_waits_here_has_arrived(
    store: RedisSessionStore, raw: Redis, passive: bool
) -> None:
    """It counts as activity from then, as one that waits in another process does; a poll does not."""
    rule = Lifetime(absolute=3600, idle=60)
    await _stored(store, rule)
    holder = await _taken(store)
    await raw.pexpire(_RECORD, 5_000)
    waiter = asyncio.create_task(store.checkout("s", _LOCK, rule, passive=passive))
    await asyncio.sleep(0)
    await store.exists("s")
    assert (await raw.pttl(_RECORD) > 59_000) is not passive
    assert await store.commit(holder, _record(n=1), release=True) is Outcome.STORED
    taken = await waiter
    assert isinstance(taken, Checkout)
    assert _values(taken) == {"n": 1}
    await store.release(taken)


@pytest.mark.parametrize("passive", [False, True])
async def test_a_request_that_waits_in_redis_has_arrived(
    store: RedisSessionStore, other: RedisSessionStore, raw: Redis, passive: bool
) -> None:
    """The same for who is the only one of its process."""
    rule = Lifetime(absolute=3600, idle=60)
    await _stored(store, rule)
    holder = await _taken(other)
    await raw.pexpire(_RECORD, 5_000)
    waiter = asyncio.create_task(store.checkout("s", _LOCK, rule, passive=passive))
    await _in_queue(raw, 1)
    assert (await raw.pttl(_RECORD) > 59_000) is not passive
    await other.release(holder)
    taken = await waiter
    assert isinstance(taken, Checkout)
    await store.release(taken)


async def test_a_hand_over_is_no_activity(
    store: RedisSessionStore, other: RedisSessionStore, raw: Redis
) -> None:
    """Who gets the lock is not known to be the right client yet, here or in another process."""
    rule = Lifetime(absolute=3600, idle=60)
    await _stored(store, rule)
    holder = await _taken(store)
    waiters = [asyncio.create_task(each.checkout("s", _LOCK, rule, passive=True)) for each in (store, other)]
    await _in_queue(raw, 1)
    await raw.pexpire(_RECORD, 5_000)
    assert await store.commit(holder, _record(n=1), release=True) is Outcome.STORED
    for waiter, each in zip(waiters, (store, other), strict=True):
        taken = await waiter
        assert isinstance(taken, Checkout)
        await each.release(taken)
    assert await raw.pttl(_RECORD) <= 5_000


async def test_a_pass_with_an_idle_timeout_needs_no_question(store: RedisSessionStore, raw: Redis) -> None:
    """The next one of the process goes on with what was stored, whatever ends the session."""
    rule = Lifetime(idle=60)
    await _stored(store, rule)
    holder = await _taken(store)
    waiter = asyncio.create_task(store.checkout("s", _LOCK, rule, passive=True))
    await asyncio.sleep(0)
    await raw.config_resetstat()
    assert await store.commit(holder, _record(n=1), release=True) is Outcome.STORED
    taken = await waiter
    assert isinstance(taken, Checkout)
    assert await _scripts(raw) == 1
    assert (_values(taken), taken.idle, taken.version) == ({"n": 1}, 60, holder.version)
    await store.release(taken)


async def test_a_full_queue_refuses_at_once(store: RedisSessionStore, raw: Redis) -> None:
    """At most `max_waiters` wait, here or with one of them in Redis; nobody else is disturbed."""
    policy = LockPolicy(max_waiters=2)
    await _stored(store)
    holder = await _taken(store)
    waiters = await _behind(store, 2)
    with pytest.raises(TooManyWaitersError) as caught:
        await store.checkout("s", policy, _HOUR)
    assert caught.value.limit == 2
    await store.release(holder)
    for waiter in waiters:
        await store.release(await waiter)
    await _nothing_left(raw, store)


async def test_the_one_who_waits_in_redis_counts_as_well(
    store: RedisSessionStore, other: RedisSessionStore, raw: Redis
) -> None:
    """The limit is the same whether the holder is here or elsewhere."""
    await _stored(store)
    holder = await _taken(other)
    waiters = await _behind(store, 2)
    await _in_queue(raw, 1)
    with pytest.raises(TooManyWaitersError):
        await store.checkout("s", LockPolicy(max_waiters=2), _HOUR)
    await other.release(holder)
    for waiter in waiters:
        await store.release(await waiter)
    await _nothing_left(raw, store, other)


async def test_a_wait_that_is_over_leaves_the_others_in_order(store: RedisSessionStore, raw: Redis) -> None:
    """`LockTimeoutError` for the one, the lock for the next."""
    await _stored(store)
    holder = await _taken(store)
    impatient = asyncio.create_task(store.checkout("s", LockPolicy(wait=0.02), _HOUR))
    (waiter,) = await _behind(store)
    with pytest.raises(LockTimeoutError) as caught:
        await impatient
    assert caught.value.waited >= 0.02
    await store.release(holder)
    await store.release(await waiter)
    await _nothing_left(raw, store)


@pytest.mark.parametrize("behind", range(4))
@pytest.mark.parametrize("ended_by", ["delete", "lost lease"])
async def test_a_successor_that_is_cancelled_when_all_is_over_disturbs_nobody(
    store: RedisSessionStore, raw: Redis, ended_by: str, behind: int
) -> None:
    """It is given the lock, the session ends or its lease is lost, and it is cancelled before it runs."""
    await _stored(store)
    holder = await _taken(store)
    successor, *others = [asyncio.create_task(store.checkout("s", _LOCK, _HOUR)) for _ in range(1 + behind)]
    await asyncio.sleep(0)
    lease = holder.seal
    assert isinstance(lease, Lease)
    assert await store.commit(holder, _record(n=1), release=True) is Outcome.STORED
    ending = asyncio.create_task(store.delete("s")) if ended_by == "delete" else None
    if ending is None:
        (await store._states.get()).leases._give_up(lease.token, lease)
    successor.cancel()
    (result,) = await asyncio.gather(successor, return_exceptions=True)
    assert isinstance(result, asyncio.CancelledError)
    if ending is not None:
        assert await ending is True
    for other in others:
        taken = await asyncio.wait_for(other, 5)
        assert isinstance(taken, Missing if ending else Checkout)
        if isinstance(taken, Checkout):
            await store.release(taken)
    await _nothing_left(raw, store)


@pytest.mark.parametrize("change", [True, False])
@pytest.mark.parametrize("ticks", range(8))
async def test_a_waiter_cancelled_at_any_moment_of_a_pass_leaves_nothing(
    store: RedisSessionStore, raw: Redis, ticks: int, change: bool
) -> None:
    """Before, while and after the lock is passed to it, the one behind it gets the lock."""
    await _stored(store)
    holder = await _taken(store)
    first, second = await _behind(store, 2)

    async def end() -> None:
        if change:
            assert await store.commit(holder, _record(n=1), release=True) is Outcome.STORED
        else:
            await store.release(holder)

    ending = asyncio.create_task(end())
    for _ in range(ticks):
        await asyncio.sleep(0)
    first.cancel()
    (result,) = await asyncio.gather(first, return_exceptions=True)
    if isinstance(result, Checkout):
        await store.release(result)
    await ending
    taken = await asyncio.wait_for(second, 5)
    assert _values(taken) == {"n": int(change)}
    await store.release(taken)
    await _nothing_left(raw, store)


@pytest.mark.parametrize("ticks", range(6))
async def test_a_holder_cancelled_in_its_commit_passes_the_lock_on(
    store: RedisSessionStore, raw: Redis, ticks: int
) -> None:
    """Whatever became of the commit, the next one sees it, and the version agrees."""
    await _stored(store)
    holder = await _taken(store)
    (waiter,) = await _behind(store)
    committing = asyncio.create_task(store.commit(holder, _record(n=1), release=True))
    for _ in range(ticks):
        await asyncio.sleep(0)
    committing.cancel()
    await asyncio.gather(committing, return_exceptions=True)
    await store.release(holder)  # as the middleware does, whatever happened
    taken = await asyncio.wait_for(waiter, 5)
    found = await store.get("s")
    assert found is not None
    assert found.metadata == _values(taken)
    assert await store.commit(taken, _record(n=2), release=True) is Outcome.STORED
    await _nothing_left(raw, store)


@pytest.mark.parametrize("cancelled", [False, True])
@pytest.mark.parametrize("ticks", range(4))
async def test_a_release_during_the_commit_of_another_task_passes_the_lock_once(
    store: RedisSessionStore, raw: Redis, ticks: int, cancelled: bool
) -> None:
    """A request that ends while a task of its own still commits: one heir gets the lock, and nobody twice."""
    await _stored(store)
    holder = await _taken(store)
    first, second = await _behind(store, 2)
    committing = asyncio.create_task(store.commit(holder, _record(n=1), release=True))
    for _ in range(ticks):
        await asyncio.sleep(0)
    await store.release(holder)
    if cancelled:
        committing.cancel()
    await asyncio.gather(committing, return_exceptions=True)
    taken = await asyncio.wait_for(first, 5)
    await asyncio.sleep(0.02)
    assert not second.done()
    assert await store.commit(taken, _record(n=2), release=True) is Outcome.STORED
    await store.release(await asyncio.wait_for(second, 5))
    await _nothing_left(raw, store)


async def test_two_commits_of_one_request_hand_the_lock_over_once(
    store: RedisSessionStore, raw: Redis
) -> None:
    """Both are to give it up; the next one has it when both are through, and goes on with what is stored."""
    await _stored(store)
    holder = await _taken(store)
    first, second = await _behind(store, 2)
    commits = [store.commit(holder, _record(n=n), release=True) for n in (1, 2)]
    assert Outcome.STORED in await asyncio.gather(*commits)
    taken = await asyncio.wait_for(first, 5)
    assert taken.token == await raw.getrange(_HOLDER, 0, 31)
    await asyncio.sleep(0.02)
    assert not second.done()
    assert await store.commit(taken, _record(n=3), release=True) is Outcome.STORED
    await store.release(await asyncio.wait_for(second, 5))
    await _nothing_left(raw, store)


async def test_a_store_that_is_closed_is_waited_for_by_nobody(store: RedisSessionStore) -> None:
    """Those who wait behind a holder of the same process learn at once that it ends."""
    await _stored(store)
    holder = await _taken(store)
    waiters = [asyncio.create_task(store.checkout("s", _LOCK, _HOUR)) for _ in range(3)]
    await asyncio.sleep(0)
    await store.aclose()
    done, _ = await asyncio.wait(waiters, timeout=5)
    assert [str(task.exception()) for task in done] == [CLOSED] * 3
    await store.release(holder)


async def test_a_request_that_has_to_wait_here_says_so(store: RedisSessionStore) -> None:
    """Once, when it begins to wait behind another one of its process, and not where it need not wait."""
    told: list[int] = []
    await _stored(store)
    state, keys = await store._states.get(), KeySpace(store.prefix).of("s")
    terms = state.commands.timing(_LOCK)
    taken = await state.locks.acquire(keys, terms, lambda: told.append(0))
    waiting = [
        asyncio.create_task(state.locks.acquire(keys, terms, partial(told.append, number)))
        for number in (1, 2)
    ]
    await asyncio.sleep(0)
    assert told == [1, 2]
    for following in [*waiting, None]:
        assert isinstance(taken, Acquired)
        state.locks.release(keys, taken.token, terms)
        taken = await following if following else taken
    assert told == [1, 2]


async def test_a_fault_of_redis_is_everybodys(own_redis: RedisServer) -> None:
    """Who waits behind a failed question fails with it, each with an error of its own."""
    mine, elsewhere = (RedisSessionStore(own_redis.url, socket_timeout=1) for _ in range(2))
    await _stored(mine)
    await _taken(elsewhere)
    waiters = [asyncio.create_task(mine.checkout("s", _LOCK, _HOUR)) for _ in range(4)]
    async with Redis.from_url(own_redis.url) as raw:
        await _in_queue(raw, 1)
    own_redis.kill()
    results = await asyncio.wait_for(asyncio.gather(*waiters, return_exceptions=True), 10)
    assert all(isinstance(result, SessionStoreError) for result in results)
    assert len({id(result) for result in results}) == 4
    assert len((await mine._states.get()).locks) == 0
    await asyncio.gather(mine.aclose(), elsewhere.aclose())


async def test_a_commit_whose_reply_was_lost_is_counted_once(own_redis: RedisServer) -> None:
    """It is sent again and recognises itself; who waits gets the record as it is."""
    async with Proxy(own_redis.port) as proxy:
        mine = RedisSessionStore(proxy.url)
        await _stored(mine)
        order: list[int] = []
        holder = await _taken(mine)
        tasks = [asyncio.create_task(_count(mine, order, number)) for number in range(3)]
        await asyncio.sleep(0)
        proxy.lose_replies(holder.version.encode())
        assert await mine.commit(holder, _record(n=1), release=True) is Outcome.STORED
        await asyncio.gather(*tasks)
        found = await mine.get("s")
        assert found is not None
        assert found.metadata == {"n": 4}
        await mine.aclose()


async def test_a_release_is_on_its_way_when_it_returns(store: RedisSessionStore) -> None:
    """With the others of its tick, and before an answer can be sent: nobody meets a lock of their own."""
    names = [f"s{n}" for n in range(5)]
    await asyncio.gather(*[store.set(name, SessionData(session_id=name)) for name in names])
    state = await store._states.get()
    taken = await asyncio.gather(*[store.checkout(name, _LOCK, _HOUR) for name in names])

    async def release(each: Checkout | Missing) -> None:
        assert isinstance(each, Checkout)
        await store.release(each)
        pipeline = state.router.pipeline(b"")
        assert not pipeline._outgoing
        assert len(pipeline.sent) == len(names)

    await asyncio.gather(*[release(each) for each in taken])


async def test_a_crowd_with_cancellations_loses_no_change(
    store: RedisSessionStore, other: RedisSessionStore, raw: Redis
) -> None:
    """Readers, writers and those who give up, in two processes: every acknowledged increment is there."""
    await _stored(store)
    choose = random.Random(7)
    stored = 0

    async def one(mine: RedisSessionStore, kind: str) -> None:
        nonlocal stored
        taken = await _taken(mine)
        try:
            await asyncio.sleep(choose.random() / 500)
            n = _values(taken)["n"]
            assert isinstance(n, int)
            if kind == "write":
                assert (
                    await asyncio.shield(mine.commit(taken, _record(n=n + 1), release=True)) is Outcome.STORED
                )
                stored += 1
        finally:
            await mine.release(taken)

    tasks = []
    for _ in range(120):
        kind = choose.choice(["write", "write", "read"])
        tasks.append(asyncio.create_task(one(choose.choice([store, other]), kind)))
        if kind == "read":
            asyncio.get_running_loop().call_later(choose.random() / 10, tasks[-1].cancel)
        if choose.random() < 0.3:
            await asyncio.sleep(0.001)
    results = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 20)
    faults = [r for r in results if isinstance(r, Exception) and not isinstance(r, TooManyWaitersError)]
    assert faults == []
    found = await store.get("s")
    assert found is not None
    assert found.metadata == {"n": stored}
    await _nothing_left(raw, store, other)


@pytest.mark.parametrize("ticks", range(4))
async def test_a_subscription_may_be_ended_before_it_has_begun(store: RedisSessionStore, ticks: int) -> None:
    """Who waits for it is told so, however early the store is closed."""
    channel = (await store._states.get()).subscription
    opening = asyncio.create_task(channel.open())
    for _ in range(ticks):
        await asyncio.sleep(0)
    await channel.aclose()
    assert await asyncio.wait_for(opening, 2) in (NO_CHANNEL, channel.name)
