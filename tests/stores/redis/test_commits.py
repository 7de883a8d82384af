"""Commits to Redis whose lease ran out, whose answer never came, whose record is gone."""

from __future__ import annotations

import asyncio

import pytest
from moves import retire
from redis.asyncio import Redis
from redis_server import Proxy, RedisServer

from asgi_sessions.errors import SessionStoreError
from asgi_sessions.record.codec import decode, encode_checked
from asgi_sessions.record.model import SessionData
from asgi_sessions.stores.checkout import Checkout, Lifetime, LockPolicy, Missing, Outcome, raise_for
from asgi_sessions.stores.redis.commands import commits
from asgi_sessions.stores.redis.commands.scripts import COMMIT
from asgi_sessions.stores.redis.store import RedisSessionStore

pytestmark = pytest.mark.anyio

_LOCK = LockPolicy()
_HOUR = Lifetime(absolute=3600)
_KEYS = (b"session:{s}", b"session:{s}:lock", b"session:{s}:wait", b"session:{s}:retired")
_RECORD, _HOLDER, _QUEUE, _RETIRED = (key.decode() for key in _KEYS)


def _record(**metadata: object) -> bytes:
    return encode_checked(SessionData(session_id="s", metadata=metadata))


async def _stored(store: RedisSessionStore, lifetime: Lifetime = _HOUR) -> None:
    assert await store.create("s", _record(n=0), lifetime, None) is not None


async def _taken(store: RedisSessionStore, lock: LockPolicy | None = _LOCK) -> Checkout:
    taken = await store.checkout("s", lock, None)
    assert isinstance(taken, Checkout)
    return taken


async def _found(store: RedisSessionStore) -> dict[str, object]:
    data = await store.get("s")
    assert data is not None
    return data.metadata


# -- the lease ran out --------------------------------------------------------------------------------------


@pytest.mark.parametrize("release", [True, False])
async def test_a_lease_that_ran_out_costs_no_change(
    store: RedisSessionStore, raw: Redis, release: bool
) -> None:
    """Nobody took the lock, and the version is the one loaded: it is stored. So is what follows."""
    await _stored(store)
    taken = await _taken(store)
    await raw.delete(_HOLDER)
    assert await store.commit(taken, _record(n=1), release=release) is Outcome.STORED
    assert (taken.token is None) is release
    if not release:
        assert await store.commit(taken, _record(n=2), release=True) is Outcome.STORED
    assert await _found(store) == {"n": 1 if release else 2}
    await store.release(taken)
    await store.exists("s")
    assert await raw.keys() == [_RECORD]
    state = await store._states.get()
    assert (len(state.locks), len(state.leases)) == (0, 0)


async def test_a_lease_that_the_heartbeat_gave_up_costs_no_change_either(
    store: RedisSessionStore, raw: Redis
) -> None:
    """Beyond `max_hold` the lock is free for others; where none came, the commit is still sent and stored."""
    await _stored(store)
    taken = await _taken(store, LockPolicy(timeout=0.1, max_hold=0.1))
    state = await store._states.get()
    while len(state.leases) or await raw.exists(_HOLDER):  # noqa: ASYNC110  # neither sets an Event
        await asyncio.sleep(0.01)
    assert await store.commit(taken, _record(n=1), release=True) is Outcome.STORED
    assert await _found(store) == {"n": 1}


async def test_who_only_read_meanwhile_is_no_hindrance(
    store: RedisSessionStore, other: RedisSessionStore, raw: Redis
) -> None:
    """The lock was another's for a while, who changed nothing."""
    await _stored(store)
    taken = await _taken(store)
    await raw.delete(_HOLDER)
    await other.release(await _taken(other))
    await other.exists("s")
    assert await store.commit(taken, _record(n=1), release=True) is Outcome.STORED


@pytest.mark.parametrize(
    ("writes", "keeps", "outcome"),
    [
        (False, True, Outcome.LOST),
        (True, True, Outcome.LOST),
        (True, False, Outcome.CONFLICT),
    ],
)
async def test_who_took_the_lock_meanwhile_is_never_overwritten(
    store: RedisSessionStore,
    other: RedisSessionStore,
    raw: Redis,
    writes: bool,
    keeps: bool,
    outcome: Outcome,
) -> None:
    """A holder is not disturbed, and what was written since stays."""
    await _stored(store)
    taken = await _taken(store)
    await raw.delete(_HOLDER)
    thief = await _taken(other)
    if writes:
        assert await other.commit(thief, _record(n=5), release=not keeps) is Outcome.STORED
    assert await store.commit(taken, _record(n=1), release=True) is outcome
    assert await _found(store) == {"n": 5 if writes else 0}
    if keeps:
        assert await other.commit(thief, _record(n=6), release=True) is Outcome.STORED


async def test_a_waiter_is_woken_though_the_lease_ran_out(store: RedisSessionStore, raw: Redis) -> None:
    """The first in the queue has the lock then, as after any other commit that lets go."""
    await _stored(store)
    taken = await _taken(store)
    await raw.delete(_HOLDER)
    await raw.rpush(_QUEUE, f"{(await raw.time())[0] * 1000 + 60_000} - {'d' * 32}")
    assert await store.commit(taken, _record(n=1), release=True) is Outcome.STORED
    assert await raw.getrange(_HOLDER, 0, 31) == "d" * 32
    assert not await raw.exists(_QUEUE)


async def test_an_heir_of_a_lock_that_is_gone_takes_one_of_its_own(
    store: RedisSessionStore, raw: Redis
) -> None:
    """The commit is stored; the next one here asks Redis, and holds what Redis gave."""
    await _stored(store)
    taken = await _taken(store)
    waiter = asyncio.create_task(_taken(store))
    await asyncio.sleep(0)
    await raw.delete(_HOLDER)
    assert await store.commit(taken, _record(n=1), release=True) is Outcome.STORED
    heir = await waiter
    assert decode(SessionData, heir.record).metadata == {"n": 1}
    assert await raw.getrange(_HOLDER, 0, 31) == heir.token
    assert await store.commit(heir, _record(n=2), release=True) is Outcome.STORED


async def test_a_removal_whose_lease_ran_out_is_carried_out(store: RedisSessionStore, raw: Redis) -> None:
    """The version fences it too."""
    await _stored(store)
    taken = await _taken(store)
    await raw.delete(_HOLDER)
    assert await retire(store, taken) is Outcome.STORED
    assert await raw.keys() == [_RETIRED]


async def test_a_commit_without_its_lock_is_its_own_retry(store: RedisSessionStore, raw: Redis) -> None:
    """Sent again it says the same, and writes nothing more."""
    await _stored(store)
    taken = await _taken(store, None)
    state = await store._states.get()
    value = f"asgi2:{'b' * 16}{taken.version[16:]}\n{{}}".encode()
    args = (*_KEYS, b"t" * 32, f"asgi2:{taken.version[:44]}".encode(), value, b"", b"0")
    assert await state.commands.run(COMMIT, *args) == b"UNHELD" + b"b" * 16
    assert await state.commands.run(COMMIT, *args) == b"UNHELD" + b"b" * 16
    assert str(await raw.get(_RECORD)).encode() == value
    assert await raw.keys() == [_RECORD]


# -- the answer never came ----------------------------------------------------------------------------------


async def _cut_off(
    store: RedisSessionStore, taken: Checkout, *, release: bool = False, **values: int
) -> None:
    """A commit that reaches Redis and whose caller does not wait for the answer."""
    task = asyncio.create_task(store.commit(taken, _record(**values), release=release))
    await asyncio.sleep(0)
    state = await store._states.get()
    await state.commands.written(_KEYS[0])
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.mark.parametrize("lock", [_LOCK, None])
@pytest.mark.parametrize("release", [True, False])
async def test_a_commit_of_ones_own_is_no_conflict(
    store: RedisSessionStore, raw: Redis, lock: LockPolicy | None, release: bool
) -> None:
    """Cut off twice, then answered: either version may lie there, and neither is another's."""
    await _stored(store)
    taken = await _taken(store, lock)
    await _cut_off(store, taken, n=1)
    await _cut_off(store, taken, n=2)
    assert await _found(store) == {"n": 2}
    assert taken.unsure is not None
    assert len(taken.unsure.split()) == 2
    assert await store.commit(taken, _record(n=3), release=release) is Outcome.STORED
    assert taken.unsure is None
    assert await _found(store) == {"n": 3}
    await store.release(taken)
    await store.exists("s")
    assert await raw.keys() == [_RECORD]


async def test_a_commit_whose_answers_were_lost_is_no_conflict(
    redis_server: RedisServer, redis_url: str, raw: Redis
) -> None:
    """The connection broke after each of its two tries: stored or not, the next commit goes through."""
    async with Proxy(redis_server.port) as proxy:
        store = RedisSessionStore(proxy.url)
        await _stored(store)
        taken = await _taken(store)
        proxy.lose_replies(to=COMMIT.by_sha, times=2)
        with pytest.raises(SessionStoreError, match="not known"):
            await store.commit(taken, _record(n=1), release=False)
        assert await _found(store) == {"n": 1}
        assert await store.commit(taken, _record(n=2), release=True) is Outcome.STORED
        assert await _found(store) == {"n": 2}
        assert await raw.keys() == [_RECORD]
        await store.aclose()


async def test_a_commit_that_never_left_is_no_conflict(store: RedisSessionStore) -> None:
    """What was loaded lies there still; the versions that were tried do no harm."""
    await _stored(store)
    taken = await _taken(store)
    task = asyncio.create_task(store.commit(taken, _record(n=1), release=False))
    await asyncio.sleep(0)
    taken.unsure = "f" * 58  # as after one that was lost before it arrived
    assert await task is Outcome.STORED
    taken.unsure = "f" * 58
    assert await store.commit(taken, _record(n=2), release=True) is Outcome.STORED
    assert await _found(store) == {"n": 2}


async def test_a_commit_that_was_to_let_go_is_made_again(store: RedisSessionStore, raw: Redis) -> None:
    """It did let go: nobody has the lock, and the version that lies there is one's own."""
    await _stored(store)
    taken = await _taken(store)
    await _cut_off(store, taken, release=True, n=1)
    assert await raw.keys() == [_RECORD]
    assert await store.commit(taken, _record(n=2), release=True) is Outcome.STORED
    assert await _found(store) == {"n": 2}
    assert await raw.keys() == [_RECORD]


async def test_a_refusal_after_an_unknown_outcome_says_so(store: RedisSessionStore) -> None:
    """Another has written since: whether the first attempt was stored in between, nobody can tell."""
    await _stored(store)
    taken = await _taken(store)
    await _cut_off(store, taken, n=1)
    tried = taken.unsure
    await store.set("s", SessionData(session_id="s", metadata={"n": 5}))
    outcome = await store.commit(taken, _record(n=2), release=True)
    assert outcome is Outcome.UNSURE
    assert taken.unsure == tried
    with pytest.raises(SessionStoreError, match="not known"):
        raise_for(outcome)
    assert await _found(store) == {"n": 5}


async def test_a_lock_that_another_took_after_an_unknown_outcome(
    store: RedisSessionStore, other: RedisSessionStore, raw: Redis
) -> None:
    """The same: it is not overwritten, and not called refused."""
    await _stored(store)
    taken = await _taken(store)
    await _cut_off(store, taken, release=True, n=1)
    holder = await _taken(other)
    assert await store.commit(taken, _record(n=2), release=True) is Outcome.UNSURE
    assert await other.commit(holder, _record(n=7), release=True) is Outcome.STORED
    assert await _found(store) == {"n": 7}


@pytest.mark.parametrize("how", ["discard", "move"])
async def test_an_end_or_a_move_after_an_unknown_outcome(store: RedisSessionStore, how: str) -> None:
    """Refused because another has written since: the earlier attempt may have been stored all the same."""
    await _stored(store)
    taken = await _taken(store)
    await _cut_off(store, taken, n=1)
    await store.set("s", SessionData(session_id="s", metadata={"n": 5}))
    if how == "discard":
        outcome = await store.discard(taken)
    else:
        record = encode_checked(SessionData(session_id="new"))
        outcome = await store.move(taken, "new", record, lifetime=None, lock=None, was=None, user=None)
    assert outcome is Outcome.UNSURE
    assert await _found(store) == {"n": 5}


async def test_an_end_after_an_unknown_outcome_is_an_end(store: RedisSessionStore, raw: Redis) -> None:
    """A record that is gone is gone, whatever was tried before; and one's own version can be removed."""
    await _stored(store)
    taken = await _taken(store)
    await _cut_off(store, taken, n=1)
    await raw.delete(_RECORD)
    assert await store.commit(taken, _record(n=2), release=True) is Outcome.GONE
    await _stored(store)
    taken = await _taken(store)
    await _cut_off(store, taken, n=1)
    assert await store.discard(taken) is Outcome.STORED
    assert await raw.keys() == []


def test_a_checkout_remembers_a_bounded_number_of_attempts() -> None:
    """Somebody who tries again and again while Redis is down; the latest count."""
    unsure: str | None = None
    for number in range(100):
        unsure = commits.one_more(unsure, b"%058d" % number)
    assert unsure is not None
    assert [int(version) for version in unsure.split()] == list(range(68, 100))


# -- the record is gone -------------------------------------------------------------------------------------

LIVES = [_HOUR, Lifetime(absolute=3600, idle=600), Lifetime(idle=600)]


@pytest.mark.parametrize("lock", [_LOCK, None])
@pytest.mark.parametrize("lifetime", LIVES, ids=["absolute", "both", "rolling"])
@pytest.mark.parametrize("end", ["expired", "evicted", "deleted"])
@pytest.mark.parametrize("release", [True, False])
async def test_a_commit_brings_nothing_back(
    store: RedisSessionStore, raw: Redis, lock: LockPolicy | None, lifetime: Lifetime, end: str, release: bool
) -> None:
    """GONE, whatever ended the record, and no key without an end is left."""
    await _stored(store, lifetime)
    taken = await _taken(store, lock)
    if end == "expired":
        await raw.pexpire(_RECORD, 1)
        await asyncio.sleep(0.005)
    elif end == "evicted":
        await raw.delete(_RECORD)
    else:
        await store.delete("s")
    assert await store.commit(taken, _record(n=1), release=release) is Outcome.GONE
    assert await raw.keys() == []
    assert await store.checkout("s", None, None) is Missing.ABSENT


@pytest.mark.parametrize("lifetime", LIVES, ids=["absolute", "both", "rolling"])
@pytest.mark.parametrize("unheld", [False, True])
@pytest.mark.parametrize("again", [False, True])
async def test_every_way_to_commit_keeps_the_end(
    store: RedisSessionStore, raw: Redis, lifetime: Lifetime, unheld: bool, again: bool
) -> None:
    """A write never prolongs a life: with and without the lock, after an unknown outcome too."""
    await _stored(store, lifetime)
    taken = await _taken(store)
    await raw.pexpire(_RECORD, 5_000)
    if again:
        await _cut_off(store, taken, n=1)
    if unheld:
        await raw.delete(_HOLDER)
    assert await store.commit(taken, _record(n=2), release=True) is Outcome.STORED
    assert 0 < await raw.pttl(_RECORD) <= 5_000
