"""The Redis store: what lies in Redis after each path, the queue of waiters, leases and retries."""

from __future__ import annotations

import asyncio
import logging
import re
import threading
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import cast

import anyio
import pytest
from moves import retire
from redis.asyncio import Redis
from redis_server import RedisServer

from asgi_sessions.errors import LockTimeoutError, SessionStoreError, TooManyWaitersError
from asgi_sessions.record.codec import decode, encode_checked
from asgi_sessions.record.model import SessionData
from asgi_sessions.record.queries import SessionFilter
from asgi_sessions.stores.checkout import Checkout, Lifetime, LockPolicy, Missing, Outcome
from asgi_sessions.stores.redis.commands.header import milliseconds
from asgi_sessions.stores.redis.commands.scripts import (
    ACQUIRE,
    BOUND,
    COMMIT,
    CREATE,
    RELEASE,
    REMOVE,
    SET,
    TAKE,
    TAKE_AND_TELL,
)
from asgi_sessions.stores.redis.commands.timing import LockTiming
from asgi_sessions.stores.redis.connection.replies import Reply
from asgi_sessions.stores.redis.connection.script import Script
from asgi_sessions.stores.redis.store import RedisSessionStore

pytestmark = pytest.mark.anyio

_HOUR = Lifetime(absolute=3600)
_LOCK = LockPolicy()
_KEYS = (b"session:{s}", b"session:{s}:lock", b"session:{s}:wait", b"session:{s}:retired")
_RECORD, _HOLDER, _QUEUE, _RETIRED = (key.decode() for key in _KEYS)


async def _keys(raw: Redis) -> list[str]:
    return sorted(str(key) for key in await raw.keys())


async def _text(raw: Redis, key: str) -> str:
    value = await raw.get(key)
    assert isinstance(value, str)
    return value


def _record(session_id: str = "s", **metadata: object) -> bytes:
    return encode_checked(SessionData(session_id=session_id, metadata=metadata))


async def _stored(store: RedisSessionStore, lifetime: Lifetime = _HOUR, **metadata: list[int]) -> None:
    assert await store.create("s", _record("s", **metadata), lifetime, None) is not None


async def _taken(store: RedisSessionStore, lock: LockPolicy | None = _LOCK) -> Checkout:
    taken = await store.checkout("s", lock, _HOUR)
    assert isinstance(taken, Checkout)
    return taken


async def _until(condition: Callable[[], Awaitable[bool]]) -> None:
    """Let the other tasks run until Redis says so."""
    with anyio.fail_after(10):
        while not await condition():  # noqa: ASYNC110  # Redis sets no Event
            await asyncio.sleep(0.005)


async def _queued(raw: Redis, number: int) -> None:
    async def there() -> bool:
        return await raw.llen(_QUEUE) == number

    await _until(there)


async def _calls(raw: Redis) -> int:
    """How many scripts were called since the statistics were reset."""
    stats = await raw.info("commandstats")
    return sum(stats.get(f"cmdstat_{name}", {"calls": 0})["calls"] for name in ("eval", "evalsha"))


async def _pause(seconds: float) -> None:
    """Let Redis' time pass; it has no clock that a test could move."""
    await asyncio.sleep(seconds)


async def _held_and_waited_for(
    store: RedisSessionStore, other: RedisSessionStore, raw: Redis
) -> tuple[Checkout, asyncio.Task[Checkout]]:
    """Another process holds the session, and a request of this one is in the queue."""
    await _stored(store)
    holder = await _taken(other)
    waiter = asyncio.create_task(_taken(store))
    await _queued(raw, 1)
    return holder, waiter


# -- records --------------------------------------------------------------------------------------------


async def test_a_record_is_a_header_and_the_json(store: RedisSessionStore, raw: Redis) -> None:
    """Format, a random nonce, the end and begin by Redis' clock, the idle timeout, then the bytes given."""
    record = _record(a=1)
    await store.create("s", record, Lifetime(absolute=60, idle=30), None)
    value = await _text(raw, _RECORD)
    match = re.fullmatch(r"asgi2:([0-9a-f]{16}):([0-9]{13}):([0-9]{13}):([0-9]{13})\n(.*)", value, re.DOTALL)
    assert match is not None
    now = (await raw.time())[0] * 1000
    assert 58_000 < int(match[2]) - now < 61_000
    assert int(match[3]) == 30_000
    assert int(match[2]) - int(match[4]) == 60_000
    assert match[5].encode() == record
    assert 29_000 < await raw.pttl(_RECORD) <= 30_000


async def test_each_write_has_a_version_of_its_own(store: RedisSessionStore, raw: Redis) -> None:
    """Writing the same bytes again is another version, and the timeouts stay in the header."""
    await _stored(store, Lifetime(absolute=60, idle=30))
    taken = await _taken(store)
    first = taken.version
    await store.commit(taken, taken.record, release=True)
    second = (await _taken(store, None)).version
    assert first[:16] != second[:16]
    assert first[16:] == second[16:]


async def test_a_locked_write_is_two_calls_and_a_read_one_and_a_release(
    store: RedisSessionStore, raw: Redis
) -> None:
    """Nothing but these scripts is sent, and nothing but the record is left."""
    await _stored(store)
    await store.commit(await _taken(store), _record(), release=True)  # teaches the scripts
    await store.release(await _taken(store))
    await _taken(store, None)
    await raw.config_resetstat()
    await store.commit(await _taken(store), _record(), release=True)
    assert await _calls(raw) == 2
    await store.release(await _taken(store))
    await _taken(store, None)
    assert await _calls(raw) == 5
    assert await _keys(raw) == [_RECORD]


async def test_batches_are_one_write_each(store: RedisSessionStore, raw: Redis) -> None:
    """All records of a batch are asked for in one command, set and deleted in one script call each."""
    records = {f"s{n}": SessionData(session_id=f"s{n}") for n in range(20)}
    await store.set_batch(records)
    assert len(await _keys(raw)) == 20
    await raw.config_resetstat()
    assert await store.get_batch([*records, "absent"]) == {**records, "absent": None}
    assert (await raw.info("commandstats"))["cmdstat_mget"]["calls"] == 1
    assert await store.delete_batch(records) == dict.fromkeys(records, True)
    assert await _keys(raw) == []


@pytest.mark.parametrize("lock", [_LOCK, None])
async def test_an_absent_record_locks_nothing(
    store: RedisSessionStore, raw: Redis, lock: LockPolicy | None
) -> None:
    """A checkout of an unknown id leaves no key."""
    assert await store.checkout("s", lock, _HOUR) is Missing.ABSENT
    assert await _keys(raw) == []


async def test_a_replaced_id_is_remembered_for_a_minute(store: RedisSessionStore, raw: Redis) -> None:
    """After a move a checkout is told so, and nothing but the mark is left."""
    await _stored(store)
    assert await retire(store, await _taken(store)) is Outcome.STORED
    assert await store.checkout("s", _LOCK, _HOUR) is Missing.RETIRED
    assert await store.checkout("s", None, _HOUR) is Missing.RETIRED
    assert await _keys(raw) == [_RETIRED]
    assert 58_000 < await raw.pttl(_RETIRED) <= 60_000


@pytest.mark.parametrize(
    "value",
    [
        "",
        "{}",
        "asgi1:",
        "asgi1:0123456789abcdef:0000000000000:000000000000",
        "asgi2:0123456789abcdef:0000000000000:0000000000000:{}",
        "asgi2:0123456789abcdef:0000000000000:0000000000000:0000000000000:{}",
        "asgi2:0123456789abcdeF:0000000000000:0000000000000:000000000000x\n{}",
        "asgi3:0123456789abcdef:0000000000000:0000000000000:0000000000000\n{}",
        "asgi1:0123456789abcde:00000000000000:0000000000000:{}",
        "asgi1:0123456789abcdeg:0000000000000:0000000000000:{}",
        None,
    ],
)
async def test_what_is_no_record_is_left_alone(
    store: RedisSessionStore, raw: Redis, value: str | None
) -> None:
    """Foreign text, truncated headers and other types are unreadable: not locked, overwritten or deleted."""
    await (raw.rpush(_RECORD, "x") if value is None else raw.set(_RECORD, value))
    before = await raw.dump(_RECORD) if value is None else value
    assert await store.checkout("s", _LOCK, _HOUR) is Missing.UNREADABLE
    assert await store.checkout("s", None, _HOUR) is Missing.UNREADABLE
    assert await store.create("s", _record(), _HOUR, _LOCK) is None
    for refused in (store.get("s"), store.set("s", SessionData(session_id="s")), store.delete("s")):
        with pytest.raises(SessionStoreError):
            await refused
    assert await store.exists("s")
    assert await store.find(SessionFilter()) == []
    assert await _keys(raw) == [_RECORD]
    assert (await raw.dump(_RECORD) if value is None else await raw.get(_RECORD)) == before


async def test_a_record_of_another_model_is_an_error_and_stays(store: RedisSessionStore, raw: Redis) -> None:
    """What does not parse is not absent: `get` says so, lists leave it out, the bytes stay."""
    await store.create("s", b'{"session_id": 5}', _HOUR, None)
    with pytest.raises(SessionStoreError, match="cannot be read"):
        await store.get("s")
    assert await store.find(SessionFilter()) == []
    assert (await _text(raw, _RECORD)).endswith('{"session_id": 5}')


# -- time -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lock", [_LOCK, None])
async def test_an_idle_timeout_restarts_when_the_client_is_the_right_one(
    store: RedisSessionStore, raw: Redis, lock: LockPolicy | None
) -> None:
    """Locked or not, a checkout alone does not count: who presents the id may be somebody else."""
    await _stored(store, Lifetime(absolute=3600, idle=100))
    await raw.pexpire(_RECORD, 5_000)
    await store.get("s")
    taken = await _taken(store, lock)
    assert await raw.pttl(_RECORD) <= 5_000
    await store.keep_alive(taken)
    await store.exists("s")
    assert 99_000 < await raw.pttl(_RECORD) <= 100_000


async def test_without_an_idle_timeout_nothing_is_sent(store: RedisSessionStore, raw: Redis) -> None:
    """Keeping alive what ends at a fixed time costs nothing."""
    await _stored(store)
    taken = await _taken(store)
    await store.exists("s")
    await raw.config_resetstat()
    await store.keep_alive(taken)
    await store.exists("s")
    assert await _calls(raw) == 0


async def test_an_idle_timeout_never_outlives_the_absolute_end(store: RedisSessionStore, raw: Redis) -> None:
    """Near the end of its life a request adds nothing."""
    await _stored(store, Lifetime(absolute=5, idle=100))
    assert await raw.pttl(_RECORD) <= 5_000
    taken = await _taken(store)
    await store.keep_alive(taken)
    await store.exists("s")
    assert await raw.pttl(_RECORD) <= 5_000
    assert taken.expires_in is not None
    assert 4 < taken.expires_in <= 5


async def test_an_idle_timeout_may_be_the_only_one(store: RedisSessionStore, raw: Redis) -> None:
    """Rolling sessions have no absolute end, and one of half a year fits into the header."""
    half_a_year = 180 * 86400
    await _stored(store, Lifetime(idle=half_a_year))
    taken = await store.checkout("s", _LOCK, Lifetime(idle=half_a_year))
    assert isinstance(taken, Checkout)
    assert taken.expires_in is None
    assert await raw.ttl(_RECORD) > half_a_year - 10


async def test_no_write_changes_the_end_of_a_life(store: RedisSessionStore, raw: Redis) -> None:
    """Commit, update, touch, counter and `set` without ttl keep the TTL; none makes the record immortal."""
    await _stored(store, Lifetime(absolute=50))
    await raw.pexpire(_RECORD, 20_000)
    await store.commit(await _taken(store), _record(a=1), release=True)
    await store.update("s", {"b": 2})
    await store.touch("s")
    await store.increment_counter("s", "n")
    await store.set("s", SessionData(session_id="s"))
    assert 15_000 < await raw.pttl(_RECORD) <= 20_000


async def test_an_explicit_ttl_is_a_new_absolute_end(store: RedisSessionStore, raw: Redis) -> None:
    """`set` with ttl moves the end and keeps the idle rule, and the begin."""
    await _stored(store, Lifetime(absolute=3600, idle=100))
    await store.set("s", SessionData(session_id="s"), ttl=7200)
    taken = await store.checkout("s", None, None)
    assert isinstance(taken, Checkout)
    assert taken.expires_in is not None
    assert 7100 < taken.expires_in <= 7200
    assert await raw.pttl(_RECORD) <= 100_000
    await store.set("s", SessionData(session_id="s"), ttl=5)
    assert await raw.pttl(_RECORD) <= 5_000


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(None, b"0"), (1, b"1000"), (0.0001, b"1"), (1.0001, b"1001"), (float("inf"), b"3155760000000")],
)
def test_seconds_become_whole_milliseconds(seconds: float | None, expected: bytes) -> None:
    """Never 0, which means none, and never more than fits into the header."""
    assert milliseconds(seconds) == expected


# -- commits --------------------------------------------------------------------------------------------


async def _delete(raw: Redis) -> None:
    await raw.delete(_RECORD)


async def _let_lease_end(raw: Redis) -> None:
    await raw.pexpire(_HOLDER, 1)
    await _pause(0.01)


async def _lock_by_another(raw: Redis) -> None:
    await raw.set(_HOLDER, "another", px=10_000)


async def _rewrite(raw: Redis) -> None:
    value = await _text(raw, _RECORD)
    await raw.set(_RECORD, value[:6] + "f" * 16 + value[22:], keepttl=True)


async def _replace_by_foreign(raw: Redis) -> None:
    await raw.set(_RECORD, "foreign")


async def _delete_and_lock(raw: Redis) -> None:
    await _delete(raw)
    await _lock_by_another(raw)


_MEANWHILE: list[tuple[Callable[[Redis], Awaitable[None]], Outcome, list[str]]] = [
    (_delete, Outcome.GONE, []),
    (_delete_and_lock, Outcome.GONE, [_HOLDER]),
    (_lock_by_another, Outcome.LOST, [_RECORD, _HOLDER]),
    (_rewrite, Outcome.CONFLICT, [_RECORD]),
    (_replace_by_foreign, Outcome.CONFLICT, [_RECORD]),
]


@pytest.mark.parametrize("discarding", [False, True])
@pytest.mark.parametrize(("meanwhile", "outcome", "left"), _MEANWHILE)
async def test_only_what_was_checked_out_is_written(
    store: RedisSessionStore,
    raw: Redis,
    meanwhile: Callable[[Redis], Awaitable[None]],
    outcome: Outcome,
    left: list[str],
    discarding: bool,
) -> None:
    """Deleted, lock taken, version moved: nothing is written, and a lock of ours is let go."""
    await _stored(store)
    taken = await _taken(store)
    await meanwhile(raw)
    before = await raw.get(_RECORD)
    if discarding:
        assert await retire(store, taken) is outcome
    else:
        assert await store.commit(taken, _record(mine=True), release=True) is outcome
    assert await raw.get(_RECORD) == before
    assert await _keys(raw) == ([] if discarding and outcome is Outcome.GONE else left)
    assert taken.token is None


async def test_a_conflict_without_release_keeps_the_lock(store: RedisSessionStore, raw: Redis) -> None:
    """The caller lets it go when it has dealt with the refusal."""
    await _stored(store)
    taken = await _taken(store)
    await store.set("s", SessionData(session_id="s"))
    assert await store.commit(taken, _record(mine=True), release=False) is Outcome.CONFLICT
    assert await raw.getrange(_HOLDER, 0, 31) == taken.token
    await store.release(taken)
    await store.release(taken)
    await store.open()
    assert await store.exists("s")
    assert await _keys(raw) == [_RECORD]


async def test_a_stale_holder_is_refused_while_another_works(
    store: RedisSessionStore, other: RedisSessionStore
) -> None:
    """A holder frozen past its lease neither overwrites its successor nor takes the successor's lock away."""
    await _stored(store)
    stale = await _taken(store, LockPolicy(timeout=0.05, max_hold=0.01))
    fresh = await _taken(other)
    assert await store.commit(stale, _record(stale=True), release=True) is Outcome.LOST
    await store.release(stale)
    assert await other.commit(fresh, _record(fresh=True), release=True) is Outcome.STORED
    found = await store.get("s")
    assert found is not None
    assert found.metadata == {"fresh": True}


async def test_unlocked_writers_compare_versions(store: RedisSessionStore, other: RedisSessionStore) -> None:
    """Of two that loaded the same version without a lock, the second is refused."""
    await _stored(store)
    first, second = await _taken(store, None), await _taken(other, None)
    assert await store.commit(first, _record(by=1), release=True) is Outcome.STORED
    assert await other.commit(second, _record(by=2), release=True) is Outcome.CONFLICT


async def test_an_unlocked_writer_wins_over_a_holder(store: RedisSessionStore, raw: Redis) -> None:
    """Who does not wait may come first; the holder's commit is refused then."""
    await _stored(store)
    holder, hasty = await _taken(store), await _taken(store, None)
    assert await store.commit(hasty, _record(hasty=True), release=True) is Outcome.STORED
    assert await raw.getrange(_HOLDER, 0, 31) == holder.token
    assert await store.commit(holder, _record(), release=True) is Outcome.CONFLICT


async def test_create_locks_and_never_overwrites(store: RedisSessionStore, raw: Redis) -> None:
    """The creator holds the lock; a second `create` changes neither record nor lock."""
    created = await store.create("s", _record(first=True), _HOUR, _LOCK)
    assert created is not None
    assert created.token is not None
    before = await raw.get(_RECORD)
    assert await store.create("s", _record(), _HOUR, _LOCK) is None
    assert await raw.get(_RECORD) == before
    assert await raw.getrange(_HOLDER, 0, 31) == created.token
    assert await store.commit(created, _record(second=True), release=True) is Outcome.STORED
    assert await _keys(raw) == [_RECORD]


async def test_redis_is_asked_for_the_time_now_and_then(store: RedisSessionStore, raw: Redis) -> None:
    """Once a second; what is left of a life is right all the same, and never overrated."""
    await _stored(store, Lifetime(absolute=60))
    await raw.config_resetstat()
    began = time.monotonic()
    for lock in (_LOCK, None) * 10:
        left = await raw.pttl(_RECORD) / 1000
        taken = await store.checkout("s", lock, _HOUR)
        assert isinstance(taken, Checkout)
        assert taken.expires_in is not None
        assert left - 5 < taken.expires_in <= left + 0.001
        await store.release(taken)
    asked = (await raw.info("commandstats"))["cmdstat_time"]["calls"]
    assert asked <= 2 + time.monotonic() - began


async def test_what_is_longer_than_a_buffer_arrives_whole(store: RedisSessionStore) -> None:
    """Several of them at once too."""
    texts = {f"s{n}": str(n) * 300_000 for n in range(3)}
    for session_id, text in texts.items():
        assert await store.create(session_id, _record(session_id, text=text), _HOUR, None) is not None
    found = await asyncio.gather(*[store.get(session_id) for session_id in texts])
    assert [data.metadata["text"] for data in found if data is not None] == list(texts.values())


@pytest.mark.parametrize(
    ("lease", "claim"), [(10.0, b"990"), (1.0, b"990"), (0.6, b"590"), (0.015, b"8"), (0.001, b"1")]
)
def test_a_claim_ends_before_anybody_counts_on_it(lease: float, claim: bytes) -> None:
    """A lock that a dead waiter was given is the next one's within a second, or within the lease."""
    assert LockTiming(lease).claim_ms == claim


_VALUE = b"asgi2:00000000000000%02d:0000000000000:0000000000000:0000000000000\n{}"
_HEAD = (_VALUE % 1)[:50]
_VERSION = (_VALUE % 1)[6:64]
_TOKEN = b"t" * 32
_ENQUEUE = (_TOKEN, b"5000", b"5000", b"-", b"", b"0", b"0")
_RETRIES: list[tuple[str, Script, tuple[bytes, ...], list[tuple[bytes, ...]]]] = [
    ("take", TAKE, (*_KEYS, _TOKEN, b"5000"), []),
    ("take and tell", TAKE_AND_TELL, (*_KEYS, _TOKEN, b"5000", b"0"), []),
    ("acquire", ACQUIRE, (*_KEYS, *_ENQUEUE), []),
    ("queue", ACQUIRE, (*_KEYS, *_ENQUEUE), [(b"SET", _KEYS[1], b"another", b"PX", b"5000")]),
    (
        "commit",
        COMMIT,
        (*_KEYS, _TOKEN, _HEAD, _VALUE % 2, b"", b"0"),
        [(b"SET", _KEYS[1], _TOKEN)],
    ),
    (
        "release",
        COMMIT,
        (*_KEYS, _TOKEN, _HEAD, _VALUE % 2, b"1000", b"0"),
        [(b"SET", _KEYS[1], _TOKEN)],
    ),
    ("unlocked", COMMIT, (*_KEYS, b"", _HEAD, _VALUE % 2, b"1000", b"0"), []),
    ("set", SET, (_KEYS[0], b"b" * 16, b"{}", b"0", b"9000", b"1"), []),
    ("retire", REMOVE, (*_KEYS, b"", _VERSION, b"60000", b"1000", b"0", b"call", b"", b"ended"), []),
    ("bound", BOUND, (*_KEYS, b"", _VERSION, b"9000", b"0", b"c" * 16), []),
]


@pytest.mark.parametrize(
    ("script", "args", "before"), [r[1:] for r in _RETRIES], ids=[r[0] for r in _RETRIES]
)
async def test_a_script_recognises_its_own_retry(
    store: RedisSessionStore,
    raw: Redis,
    script: Script,
    args: tuple[bytes, ...],
    before: list[tuple[bytes, ...]],
) -> None:
    """The second run of the same call answers as the first and changes nothing more."""
    state = await store._states.get()
    await raw.set(_RECORD, _VALUE % 1, px=9000)
    for command in before:
        await raw.execute_command(*command)  # type: ignore[no-untyped-call]  # in redis-py
    first = await state.commands.run(script, *args)
    after = {key: await raw.dump(key) for key in await _keys(raw)}
    second = await state.commands.run(script, *args)
    assert {key: await raw.dump(key) for key in await _keys(raw)} == after
    assert _kind(first) == _kind(second)
    assert _kind(first) in (b"L", b"W", b"C", b"STORED", 1)


def _kind(reply: Reply) -> Reply:
    """What it says, its details aside; a record alone is the short form of `L`."""
    if isinstance(reply, list):
        return reply[0]
    if isinstance(reply, bytes):
        return b"L" if reply.startswith(b"asgi2:") else reply[: len(b"STORED")]
    return reply


async def test_a_create_recognises_its_own_retry(store: RedisSessionStore, raw: Redis) -> None:
    """The same nonce is the same creation; another one is refused."""
    state = await store._states.get()
    args = (b"{}", b"5000", b"0", _TOKEN, b"5000", b"", b"0")
    first = cast("list[Reply]", await state.commands.run(CREATE, *_KEYS[:2], b"a" * 16, *args))
    before = await raw.get(_RECORD)
    again = cast("list[Reply]", await state.commands.run(CREATE, *_KEYS[:2], b"a" * 16, *args))
    assert again[:2] == first[:2], "the version; the time goes on"
    assert await state.commands.run(CREATE, *_KEYS[:2], b"b" * 16, *args) == [b"E"]
    assert await raw.get(_RECORD) == before


# -- the queue ------------------------------------------------------------------------------------------


async def _turn(store: RedisSessionStore, order: list[int], number: int) -> float:
    taken = await _taken(store)
    order.append(number)
    seen = decode(SessionData, taken.record).metadata["seen"]
    outcome = await store.commit(taken, _record(seen=[*seen, number]), release=True)
    assert outcome is Outcome.STORED
    return taken.waited


async def test_waiters_of_two_processes_come_in_order_of_arrival(
    store: RedisSessionStore, other: RedisSessionStore, third: RedisSessionStore, raw: Redis
) -> None:
    """Each process in its turn, and within it each request; each sees what the one before committed."""
    await _stored(third, seen=[])
    holder = await _taken(third)
    order: list[int] = []
    tasks = [asyncio.create_task(_turn(store, order, 0))]
    await _queued(raw, 1)
    tasks.append(asyncio.create_task(_turn(other, order, 1)))
    await _queued(raw, 2)
    tasks += [asyncio.create_task(_turn((store, other)[number % 2], order, number)) for number in range(2, 6)]
    await asyncio.sleep(0)
    await third.release(holder)
    waited = await asyncio.gather(*tasks)
    assert order == [0, 2, 4, 1, 3, 5]
    assert min(waited) > 0
    found = await store.get("s")
    assert found is not None
    assert found.metadata["seen"] == order
    assert await _keys(raw) == [_RECORD]


async def test_a_woken_waiter_needs_no_further_call(
    store: RedisSessionStore, other: RedisSessionStore, raw: Redis
) -> None:
    """The record comes with the message: a hand-over is the holder's commit alone."""
    holder, waiter = await _held_and_waited_for(store, other, raw)
    await raw.config_resetstat()
    assert await other.commit(holder, _record(by="holder"), release=True) is Outcome.STORED
    taken = await waiter
    assert await _calls(raw) == 1
    assert decode(SessionData, taken.record).metadata == {"by": "holder"}
    assert taken.version == holder.version
    assert 0 < await raw.pttl(_HOLDER) <= 1000
    await store.release(taken)


async def test_a_woken_waiter_renews_its_short_claim(
    store: RedisSessionStore, other: RedisSessionStore, raw: Redis
) -> None:
    """The claim becomes the full lease well before it ends."""
    holder, waiter = await _held_and_waited_for(store, other, raw)
    await other.release(holder)
    taken = await waiter

    async def prolonged() -> bool:
        return await raw.pttl(_HOLDER) > 1000

    await _until(prolonged)
    assert await raw.getrange(_HOLDER, 0, 31) == taken.token
    await store.release(taken)


async def test_a_waiter_survives_the_loss_of_its_subscription(
    store: RedisSessionStore, own_redis: RedisServer
) -> None:
    """It subscribes again, asks at once, and gets the lock when it is free."""
    mine, other = RedisSessionStore(own_redis.url), RedisSessionStore(own_redis.url)
    async with Redis.from_url(own_redis.url) as raw:
        await _stored(mine)
        for _ in range(3):
            holder = await _taken(other)
            waiter = asyncio.create_task(_taken(mine))
            await _queued(raw, 1)
            await raw.client_kill_filter(_type="pubsub")
            await other.release(holder)
            await mine.release(await waiter)
        await other.aclose()
        await mine.set("t", SessionData(session_id="t"))
        assert sorted(await raw.keys()) == [b"session:{s}", b"session:{t}"]
        await mine.aclose()


async def test_a_lost_message_costs_a_second_at_most(
    store: RedisSessionStore, other: RedisSessionStore, raw: Redis
) -> None:
    """A lock that was handed over without the waiter hearing of it is taken by its next question."""
    holder, waiter = await _held_and_waited_for(store, other, raw)
    entry = str(await raw.lpop(_QUEUE))
    told = entry.split()[2]
    await raw.set(_HOLDER, told, px=60_000)
    taken = await waiter
    assert taken.token not in (told, holder.token)
    assert await raw.getrange(_HOLDER, 0, 31) == taken.token
    await store.release(taken)


async def test_a_stale_message_is_not_believed(
    store: RedisSessionStore, other: RedisSessionStore, raw: Redis
) -> None:
    """A message for a token that was given up since wakes nobody."""
    holder, waiter = await _held_and_waited_for(store, other, raw)
    _, channel, token = str(await raw.lpop(_QUEUE)).split()  # a place that was lost: the waiter queues anew

    async def queued_anew() -> bool:
        entries = await raw.lrange(_QUEUE, 0, -1)
        return bool(entries) and token not in str(entries[0])

    await _until(queued_anew)
    await raw.publish(channel, f"{token}:1700000000000:{(_VALUE % 7).decode()}")
    await _pause(0.02)
    assert not waiter.done()
    await other.release(holder)
    assert (await waiter).version == holder.version


async def test_an_old_message_is_checked_before_it_is_believed(
    store: RedisSessionStore, other: RedisSessionStore, raw: Redis
) -> None:
    """A waiter that was frozen with the message asks again; what it then holds is the newest record."""
    holder, waiter = await _held_and_waited_for(store, other, raw)
    _, channel, token = str(await raw.lpop(_QUEUE)).split()
    seconds, _ = await raw.time()
    await raw.publish(channel, f"{token}:{(seconds - 5) * 1000}:{(_VALUE % 7).decode()}")
    await _queued(raw, 1)
    assert token not in str(await raw.lrange(_QUEUE, 0, -1))
    assert await other.commit(holder, _record(a=1), release=True) is Outcome.STORED
    taken = await waiter
    assert taken.version == holder.version
    assert await store.commit(taken, _record(a=2), release=True) is Outcome.STORED


async def test_dead_waiters_are_passed_over(
    store: RedisSessionStore, other: RedisSessionStore, raw: Redis
) -> None:
    """A place whose channel nobody hears, and one whose deadline has passed, do not stop the queue."""
    await _stored(store)
    holder = await _taken(other)
    now = (await raw.time())[0] * 1000
    await raw.rpush(_QUEUE, f"{now + 60_000} session:wake:dead {'d' * 32}")
    waiter = asyncio.create_task(_taken(store))
    await _queued(raw, 2)
    await raw.lpush(_QUEUE, f"{now - 1} - {'e' * 32}")
    await other.release(holder)
    await store.release(await waiter)
    await store.open()
    assert await store.exists("s")
    assert await _keys(raw) == [_RECORD]


async def test_a_frozen_waiter_costs_its_claim(
    store: RedisSessionStore, other: RedisSessionStore, raw: Redis
) -> None:
    """A lock handed to somebody who never takes it up is free for the next after the claim."""
    await _stored(store)
    holder = await _taken(other, LockPolicy(timeout=0.1))
    now = (await raw.time())[0] * 1000
    await raw.rpush(_QUEUE, f"{now + 60_000} - {'d' * 32}")
    waiter = asyncio.create_task(_taken(store))
    await _queued(raw, 2)
    await other.release(holder)
    taken = await waiter
    assert await raw.getrange(_HOLDER, 0, 31) == taken.token
    await store.release(taken)


async def test_the_queue_in_redis_has_room_for_every_process(
    store: RedisSessionStore, other: RedisSessionStore, third: RedisSessionStore, raw: Redis
) -> None:
    """`max_waiters` is each process's own bound. Entries whose deadline has passed are dropped."""
    await _stored(store)
    holder = await _taken(other)
    now = (await raw.time())[0] * 1000
    await raw.rpush(_QUEUE, *(f"{now - 1} - {n:032x}" for n in range(3)))
    policy = LockPolicy(wait=5, max_waiters=1)
    waiters = []
    for number, process in enumerate((store, third)):
        waiters.append((process, asyncio.create_task(_taken(process, policy))))
        await _queued(raw, number + 1)
    for process in (store, third):
        with pytest.raises(TooManyWaitersError) as caught:
            await process.checkout("s", policy, _HOUR)
        assert caught.value.limit == 1
    await other.release(holder)
    for process, waiter in waiters:
        await process.release(await waiter)


async def test_nobody_may_wait_where_max_waiters_is_none(
    store: RedisSessionStore, other: RedisSessionStore, raw: Redis
) -> None:
    """`max_waiters=0` refuses every second request, here and in another process."""
    await _stored(store)
    holder = await _taken(store)
    for process in (store, other):
        with pytest.raises(TooManyWaitersError):
            await process.checkout("s", LockPolicy(max_waiters=0), _HOUR)
    assert await raw.exists(_QUEUE) == 0
    await store.release(holder)


@pytest.mark.parametrize("wait", [0, 0.05])
async def test_a_wait_that_is_over_leaves_nothing(store: RedisSessionStore, raw: Redis, wait: float) -> None:
    """`LockTimeoutError` says how long; the place in the queue is given up."""
    await _stored(store)
    holder = await _taken(store)
    with pytest.raises(LockTimeoutError) as caught:
        await store.checkout("s", LockPolicy(wait=wait), _HOUR)
    assert caught.value.waited >= wait
    assert await store.exists("s")
    assert await _keys(raw) == [_RECORD, _HOLDER]
    await store.release(holder)


@pytest.mark.parametrize("ticks", range(9))
async def test_a_checkout_cancelled_at_any_moment_leaves_nothing(
    store: RedisSessionStore, raw: Redis, ticks: int
) -> None:
    """Before or after the lock was taken, no lock and no waiter stay behind."""
    await _stored(store)
    await store.release(await _taken(store))
    task = asyncio.create_task(store.checkout("s", _LOCK, _HOUR))
    for _ in range(ticks):
        await asyncio.sleep(0)
    task.cancel()
    (result,) = await asyncio.gather(task, return_exceptions=True)
    if isinstance(result, Checkout):
        await store.release(result)
    assert await store.exists("s")
    assert await _keys(raw) == [_RECORD]


async def test_a_cancelled_waiter_leaves_the_queue(
    store: RedisSessionStore, other: RedisSessionStore, third: RedisSessionStore, raw: Redis
) -> None:
    """Its place is gone, and those behind it are not delayed."""
    await _stored(store)
    holder = await _taken(other)
    first, second = (asyncio.create_task(_taken(each)) for each in (store, third))
    await _queued(raw, 2)
    first.cancel()
    await _queued(raw, 1)
    await other.release(holder)
    await third.release(await second)


async def test_a_waiter_that_leaves_with_the_lock_hands_it_on(
    store: RedisSessionStore, other: RedisSessionStore, raw: Redis
) -> None:
    """Cancelled in the tick in which it was granted the lock, it gives it to the next."""
    await _stored(store)
    holder = await _taken(other)
    first, second = (asyncio.create_task(_taken(store)) for _ in range(2))  # the second behind it
    await _queued(raw, 1)
    state = await store._states.get()
    await other.release(holder)

    async def told() -> bool:
        await asyncio.sleep(0)
        return any(message.done() for message in state.subscription._expected.values())

    while not await told():
        pass
    first.cancel()
    taken = await second
    assert await raw.getrange(_HOLDER, 0, 31) == taken.token
    await store.release(taken)


@pytest.mark.parametrize(("moved", "news"), [(True, Missing.RETIRED), (False, Missing.ABSENT)])
async def test_waiters_learn_at_once_that_the_record_is_gone(
    store: RedisSessionStore,
    other: RedisSessionStore,
    third: RedisSessionStore,
    raw: Redis,
    moved: bool,
    news: Missing,
) -> None:
    """All of them, not one after the other, and the queue is gone."""
    await _stored(store)
    holder = await _taken(third)
    waiters = [asyncio.create_task(each.checkout("s", _LOCK, _HOUR)) for each in (store, other)]
    await _queued(raw, 2)
    await (retire(third, holder) if moved else third.discard(holder))
    assert await asyncio.gather(*waiters) == [news] * 2
    assert await _keys(raw) == ([_RETIRED] if moved else [])


async def test_a_release_finds_the_record_expired(
    store: RedisSessionStore, other: RedisSessionStore, raw: Redis
) -> None:
    """Waiters for a record that expired under its holder are told when the lock is let go."""
    await _stored(store)
    holder = await _taken(other)
    waiter = asyncio.create_task(store.checkout("s", _LOCK, _HOUR))
    await _queued(raw, 1)
    await raw.pexpire(_RECORD, 1)
    await _pause(0.01)
    await other.release(holder)
    assert await waiter is Missing.ABSENT
    assert await _keys(raw) == []


async def test_a_delete_wakes_who_waits(
    store: RedisSessionStore, other: RedisSessionStore, raw: Redis
) -> None:
    """`delete` never waits, and ends the waiting of others."""
    await _stored(store)
    holder = await _taken(other)
    waiter = asyncio.create_task(store.checkout("s", _LOCK, _HOUR))
    await _queued(raw, 1)
    assert await store.delete("s") is True
    assert await waiter is Missing.ABSENT
    assert await other.commit(holder, _record(), release=True) is Outcome.GONE
    assert await _keys(raw) == []


async def test_a_killed_holder_costs_the_rest_of_its_lease(
    store: RedisSessionStore, other: RedisSessionStore
) -> None:
    """Nobody lets the lock go; the waiter takes it when the lease has ended."""
    await _stored(store)
    await _taken(other, LockPolicy(timeout=0.1, max_hold=0.01))
    await store.release(await _taken(store))


async def test_the_queue_goes_with_its_last_waiter(
    store: RedisSessionStore, other: RedisSessionStore, third: RedisSessionStore, raw: Redis
) -> None:
    """The list's own TTL covers the longest wait and is never shortened by a shorter one."""
    await _stored(store)
    holder = await _taken(other)
    long = asyncio.create_task(store.checkout("s", LockPolicy(wait=30), _HOUR))
    await _queued(raw, 1)
    short = asyncio.create_task(third.checkout("s", LockPolicy(wait=5), _HOUR))
    await _queued(raw, 2)
    assert 29_000 < await raw.pttl(_QUEUE) <= 31_000
    for task in (long, short):
        task.cancel()
    await other.release(holder)


async def test_where_subscribing_is_forbidden_waiters_poll(
    own_redis: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    """One warning in each process, and the lock still goes from one to the next."""
    async with Redis.from_url(own_redis.url) as raw:
        await raw.execute_command("ACL", "SETUSER", "default", "-subscribe")  # type: ignore[no-untyped-call]  # in redis-py
        mine = [RedisSessionStore(own_redis.url) for _ in range(4)]
        await _stored(mine[3], seen=[])
        holder = await _taken(mine[3])
        order: list[int] = []
        tasks = [asyncio.create_task(_turn(mine[number], order, number)) for number in range(3)]
        await _queued(raw, 3)
        await mine[3].release(holder)
        await asyncio.gather(*tasks)
        assert sorted(order) == [0, 1, 2]
        assert [record.levelno for record in caplog.records] == [logging.WARNING] * 3
        assert "poll" in caplog.text
        await asyncio.gather(*[store.aclose() for store in mine])


async def test_a_release_by_a_stranger_changes_nothing(store: RedisSessionStore, raw: Redis) -> None:
    """A token that neither holds nor waits is no token."""
    await _stored(store)
    holder = await _taken(store)
    state = await store._states.get()
    assert await state.commands.run(RELEASE, *_KEYS, _TOKEN, b"1000", b"0", b"0") == 0
    assert await raw.getrange(_HOLDER, 0, 31) == holder.token
    await store.release(holder)


# -- leases ---------------------------------------------------------------------------------------------


async def test_a_lease_is_renewed_while_it_is_held(store: RedisSessionStore, raw: Redis) -> None:
    """Long after its length the lock is still ours, and after the release nothing is renewed."""
    await _stored(store)
    taken = await _taken(store, LockPolicy(timeout=0.15))
    await _pause(0.4)
    assert await raw.getrange(_HOLDER, 0, 31) == taken.token
    assert await store.commit(taken, _record(), release=True) is Outcome.STORED
    state = await store._states.get()
    assert len(state.leases) == 0


async def test_a_lease_is_not_renewed_beyond_max_hold(
    store: RedisSessionStore, raw: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    """A request that hangs loses the lock; its commit is refused where another has it then."""
    await _stored(store)
    taken = await _taken(store, LockPolicy(timeout=0.1, max_hold=0.1))
    await _pause(0.35)
    assert await raw.exists(_HOLDER) == 0
    assert "lock_max_hold" in caplog.text
    await _lock_by_another(raw)
    assert await store.commit(taken, _record(), release=True) is Outcome.LOST


async def test_a_lost_lease_is_noticed_and_logged(
    store: RedisSessionStore, raw: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    """The heartbeat finds out, says so once, names no session, and renews no more."""
    await _stored(store)
    taken = await _taken(store, LockPolicy(timeout=0.1))
    await _lock_by_another(raw)
    await _pause(0.15)
    state = await store._states.get()
    assert len(state.leases) == 0
    assert [record.getMessage() for record in caplog.records] == [
        "a session's lock was lost while its request ran; its commit is refused if another took it"
    ]
    assert await store.commit(taken, _record(), release=True) is Outcome.LOST


async def test_renewals_that_are_due_leave_together(store: RedisSessionStore, raw: Redis) -> None:
    """Many leases, one timer: each is renewed once in its period."""
    names = [f"s{n}" for n in range(20)]
    for name in names:
        await store.create(name, _record(name), _HOUR, None)
    policy = LockPolicy(timeout=0.3)
    taken = await asyncio.gather(*[store.checkout(name, policy, _HOUR) for name in names])
    assert await store.renew([cast(Checkout, each) for each in taken]) == [True] * 20
    await raw.config_resetstat()
    await _pause(0.15)
    assert await _calls(raw) == 20
    for each in taken:
        assert isinstance(each, Checkout)
        await store.release(each)


async def test_renew_tells_which_leases_are_lost(store: RedisSessionStore, raw: Redis) -> None:
    """One answer for each checkout, True only where the lock is still ours."""
    await _stored(store)
    taken = await _taken(store)
    assert await store.renew([taken, await _taken(store, None)]) == [True, False]
    await _lock_by_another(raw)
    assert await store.renew([taken]) == [False]


# -- lists and users ------------------------------------------------------------------------------------


async def test_only_record_keys_of_this_prefix_are_listed(redis_url: str, raw: Redis) -> None:
    """Locks, queues, users, foreign keys and other prefixes are no sessions, whatever the prefix."""
    store, alike = RedisSessionStore(redis_url, "a*[b]?:"), RedisSessionStore(redis_url, "aXb:")
    for each in (store, alike):
        await each.create("s}:lock", _record("s}:lock"), _HOUR, _LOCK)
        await each.set("t", SessionData(session_id="t", user_id="ada"))
    await raw.set("a*[b]?:{bad id}", "x")
    await raw.rpush("a*[b]?:{list}", "x")
    assert await store.list_active() == ["s}:lock", "t"]
    assert await store.count_active() == 2
    await asyncio.gather(store.aclose(), alike.aclose())


async def test_a_long_list_is_complete_sorted_and_without_doubles(store: RedisSessionStore) -> None:
    """Pages of it are stable."""
    records = {f"s{n:04}": SessionData(session_id=f"s{n:04}") for n in range(1200)}
    assert await store.set_batch(records) == dict.fromkeys(records, True)
    listed = await store.list_active()
    assert listed == sorted(records)
    pages = [await store.list_active(500, start) for start in (0, 500, 1000)]
    assert [*pages[0], *pages[1], *pages[2]] == listed
    assert len(await store.find(SessionFilter(), limit=700)) == 700


async def test_a_users_list_outlives_each_of_its_sessions(store: RedisSessionStore, raw: Redis) -> None:
    """Its TTL follows the longest; a rolling session, whose end nobody knows, makes it 400 days."""
    await store.link_user("ada", "s", Lifetime(absolute=100))
    await store.link_user("ada", "t", Lifetime(absolute=50))
    assert 155 < await raw.ttl("session:user:ada") <= 160
    await store.link_user("ada", "u", Lifetime(idle=50))
    assert await raw.ttl("session:user:ada") > 399 * 86400


# -- together -------------------------------------------------------------------------------------------


def _numbered(n: int, session_id: str) -> SessionData:
    return SessionData(session_id=session_id, message_count=n)


async def test_get_or_create_in_two_processes_gives_one_record(
    store: RedisSessionStore, other: RedisSessionStore
) -> None:
    """All callers at once get the record of one of them."""
    calls = [each.get_or_create("s", partial(_numbered, n)) for n, each in enumerate([store, other] * 10)]
    assert len({data.message_count for data in await asyncio.gather(*calls)}) == 1


def test_one_store_serves_threads_with_loops_of_their_own(redis_url: str) -> None:
    """Increments from several event loops at once are all counted."""
    store = RedisSessionStore(redis_url)

    async def count() -> None:
        await asyncio.gather(*[store.increment_counter("s", "n") for _ in range(20)])

    asyncio.run(store.set("s", SessionData(session_id="s")))
    threads = [threading.Thread(target=asyncio.run, args=(count(),)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = asyncio.run(store.get("s"))
    assert found is not None
    assert found.metadata == {"n": 60}


async def test_flushed_scripts_and_killed_connections_lose_no_increment(own_redis: RedisServer) -> None:
    """While Redis forgets scripts and closes connections, every acknowledged change is there, once."""
    stores = [RedisSessionStore(own_redis.url) for _ in range(2)]
    await stores[0].set("s", SessionData(session_id="s"))

    async def disturb(raw: Redis) -> None:
        for _ in range(10):
            await raw.script_flush()
            await raw.client_kill_filter(_type="pubsub")
            await _pause(0.02)
            await raw.client_kill_filter(_type="normal", skipme=True)

    async with Redis.from_url(own_redis.url) as raw:
        disturbing = asyncio.create_task(disturb(raw))
        increments = [store.increment_counter("s", "n") for store in stores for _ in range(30)]
        results = await asyncio.gather(*increments, return_exceptions=True)
        await disturbing
    counted = [result for result in results if isinstance(result, int)]
    unknown = [result for result in results if isinstance(result, SessionStoreError)]
    found = await stores[0].get("s")
    assert found is not None
    assert len(set(counted)) == len(counted)
    assert len(counted) <= found.metadata["n"] <= len(counted) + len(unknown)
    assert len(counted) + len(unknown) == 60
    await asyncio.gather(*[store.aclose() for store in stores])
