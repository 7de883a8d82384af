"""How long a record in Redis lives: its begin, rules that came later, values of the release before."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable

import pytest
from moves import retire
from redis.asyncio import Redis

from asgi_sessions.errors import SessionStoreError
from asgi_sessions.record.codec import decode, encode_checked
from asgi_sessions.record.model import SessionData
from asgi_sessions.record.queries import SessionFilter
from asgi_sessions.stores.checkout import Checkout, Lifetime, LockPolicy, Missing, Outcome
from asgi_sessions.stores.redis.commands.keys import KeySpace
from asgi_sessions.stores.redis.commands.scripts import SET, SHORTEN, TOUCH
from asgi_sessions.stores.redis.store import RedisSessionStore

pytestmark = pytest.mark.anyio

_LOCK = LockPolicy()
_KEYS = (b"session:{s}", b"session:{s}:lock", b"session:{s}:wait", b"session:{s}:retired")
_RECORD, _HOLDER, _QUEUE, _RETIRED = (key.decode() for key in _KEYS)


def _record(**metadata: object) -> bytes:
    return encode_checked(SessionData(session_id="s", metadata=metadata))


def _values(taken: Checkout) -> dict[str, object]:
    return decode(SessionData, taken.record).metadata


async def _stored(store: RedisSessionStore, lifetime: Lifetime) -> None:
    assert await store.create("s", _record(n=0), lifetime, None) is not None


async def _taken(
    store: RedisSessionStore, rule: Lifetime | None = None, lock: LockPolicy | None = _LOCK
) -> Checkout:
    taken = await store.checkout("s", lock, rule)
    assert isinstance(taken, Checkout)
    return taken


async def _header(raw: Redis) -> tuple[str, int, int, int]:
    """Nonce, absolute end, idle timeout and begin, in ms."""
    found = re.match(
        r"asgi2:([0-9a-f]{16}):([0-9]{13}):([0-9]{13}):([0-9]{13})\n", str(await raw.get(_RECORD))
    )
    assert found is not None
    return found[1], int(found[2]), int(found[3]), int(found[4])


async def _make_older(raw: Redis, seconds: int) -> None:
    """The life of the record began so many seconds earlier; its bounds stay."""
    began = (await _header(raw))[3] - seconds * 1000
    await raw.setrange(_RECORD, 51, f"{began:013}")


async def _in_queue(raw: Redis, number: int) -> None:
    while await raw.llen(_QUEUE) != number:  # noqa: ASYNC110  # Redis sets no Event
        await asyncio.sleep(0.005)


async def _scripts(raw: Redis) -> int:
    stats = await raw.info("commandstats")
    return int(stats.get("cmdstat_evalsha", {"calls": 0})["calls"])


# -- the begin ----------------------------------------------------------------------------------------------


async def test_a_checkout_says_how_old_the_life_is(store: RedisSessionStore, raw: Redis) -> None:
    """By Redis' clock, since it was created; what the bounds are, too."""
    created = await store.create("s", _record(), Lifetime(absolute=3600, idle=60), None, user="ada")
    assert created is not None
    assert (created.age, created.idle, created.expires_in) == (0, 60, 3600)
    await _make_older(raw, 100)
    for lock in (_LOCK, None):
        taken = await _taken(store, None, lock)
        assert taken.age is not None
        assert 100 <= taken.age < 105
        assert taken.idle == 60
        await store.release(taken)
    await store.delete("s")
    await _stored(store, Lifetime(absolute=3600))
    assert (await _taken(store)).idle is None


async def test_no_write_begins_a_life_anew(store: RedisSessionStore, raw: Redis) -> None:
    """A commit keeps the begin, `set` with and without ttl too; a record that `set` makes begins now."""
    await _stored(store, Lifetime(absolute=3600, idle=60))
    await _make_older(raw, 100)
    began = (await _header(raw))[3]
    await store.commit(await _taken(store), _record(n=1), release=True)
    assert (await _header(raw))[3] == began
    for ttl in (None, 7200):
        await store.set("s", SessionData(session_id="s"), ttl)
        assert (await _header(raw))[3] == began
    await store.delete("s")
    await store.set("s", SessionData(session_id="s"))
    assert (await _header(raw))[3] > began + 99_000


async def test_a_set_that_is_to_bring_nothing_back(store: RedisSessionStore, raw: Redis) -> None:
    """An absent record stays absent; one that is there is written; what is not ours stays."""
    state = await store._states.get()
    args = (b"{}", b"0", b"9000", b"0")
    assert await state.commands.run(SET, _KEYS[0], b"a" * 16, *args) == 2
    assert await raw.keys() == []
    await _stored(store, Lifetime(absolute=3600))
    assert await state.commands.run(SET, _KEYS[0], b"a" * 16, *args) == 1
    assert await state.commands.run(SET, _KEYS[0], b"a" * 16, *args) == 1
    assert (await _header(raw))[0] == "a" * 16
    await raw.set(_RECORD, "foreign")
    assert await state.commands.run(SET, _KEYS[0], b"b" * 16, *args) == 0


@pytest.mark.parametrize(("value", "answer"), [(None, 0), ("foreign", 0)])
async def test_what_is_no_record_is_not_kept_alive(
    store: RedisSessionStore, raw: Redis, value: str | None, answer: int
) -> None:
    """Nothing comes to life, and nobody else's key gets another end."""
    state = await store._states.get()
    if value is not None:
        await raw.set(_RECORD, value)
    assert await state.commands.run(TOUCH, _KEYS[0], b"0") == answer
    assert await raw.keys() == ([] if value is None else [_RECORD])
    assert await raw.pttl(_RECORD) == (-2 if value is None else -1)


# -- a rule that came later ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rule", [None, Lifetime(absolute=3600, idle=60), Lifetime(7200, 120), Lifetime(7200)]
)
async def test_a_rule_that_is_no_shorter_changes_nothing(
    store: RedisSessionStore, raw: Redis, rule: Lifetime | None
) -> None:
    """It costs no call, and the record keeps its bounds."""
    await _stored(store, Lifetime(absolute=3600, idle=60))
    before = await raw.get(_RECORD)
    await store.release(await _taken(store, rule))  # teaches the scripts
    await store.exists("s")
    await raw.config_resetstat()
    taken = await _taken(store, rule)
    await _taken(store, rule, None)
    assert await _scripts(raw) == 2
    assert await raw.get(_RECORD) == before
    assert taken.idle == 60
    await store.release(taken)


async def test_a_shorter_max_age_binds_older_sessions(store: RedisSessionStore, raw: Redis) -> None:
    """It counts from the begin of their life; the request goes on, and so does what it commits."""
    await _stored(store, Lifetime(absolute=3600))
    await _make_older(raw, 100)
    taken = await _taken(store, Lifetime(absolute=150))
    nonce, ends, idle, began = await _header(raw)
    assert (ends - began, idle, nonce) == (150_000, 0, taken.version[:16])
    assert 45_000 < await raw.pttl(_RECORD) <= 50_000
    assert taken.expires_in is not None
    assert 45 < taken.expires_in <= 50
    assert await store.commit(taken, _record(n=1), release=True) is Outcome.STORED
    assert (await _header(raw))[1] == ends
    assert 45_000 < await raw.pttl(_RECORD) <= 50_000
    await raw.config_resetstat()
    await store.release(await _taken(store, Lifetime(absolute=150)))
    await store.exists("s")
    assert await _scripts(raw) == 2  # once is enough


async def test_a_shorter_idle_timeout_counts_from_the_last_request(
    store: RedisSessionStore, raw: Redis
) -> None:
    """The last one was thirty seconds ago; twenty are left of fifty, and this request restarts them."""
    await _stored(store, Lifetime(absolute=3600, idle=100))
    await _make_older(raw, 30)
    await raw.pexpire(_RECORD, 70_000)
    taken = await _taken(store, Lifetime(absolute=3600, idle=50))
    assert (await _header(raw))[2] == 50_000
    assert 15_000 < await raw.pttl(_RECORD) <= 20_000
    assert taken.idle == 50
    await store.keep_alive(taken)
    assert await store.commit(taken, _record(n=1), release=True) is Outcome.STORED
    assert 45_000 < await raw.pttl(_RECORD) <= 50_000


async def test_an_idle_timeout_may_be_new(store: RedisSessionStore, raw: Redis) -> None:
    """Of a record that had none nobody knows when the last request came: it counts from now."""
    await _stored(store, Lifetime(absolute=3600))
    taken = await _taken(store, Lifetime(absolute=3600, idle=50))
    assert 45_000 < await raw.pttl(_RECORD) <= 50_000
    await store.release(taken)


async def test_near_its_absolute_end_a_session_is_taken_for_active(
    store: RedisSessionStore, raw: Redis
) -> None:
    """There the end of the key does not tell when the last request came."""
    await _stored(store, Lifetime(absolute=30, idle=100))
    taken = await _taken(store, Lifetime(absolute=30, idle=50))
    assert (await _header(raw))[2] == 50_000
    assert 25_000 < await raw.pttl(_RECORD) <= 30_000
    await store.release(taken)


async def _age(raw: Redis) -> None:
    await _make_older(raw, 100)


async def _lie_idle(raw: Redis) -> None:
    await _make_older(raw, 89)
    await raw.pexpire(_RECORD, 10_000)


Meanwhile = Callable[[Redis], Awaitable[None]]
_ENDED: list[tuple[Meanwhile, Lifetime]] = [
    (_age, Lifetime(absolute=99)),
    (_lie_idle, Lifetime(idle=50)),
    (_lie_idle, Lifetime(90, 89)),
]


@pytest.mark.parametrize(("meanwhile", "rule"), _ENDED)
async def test_what_has_ended_by_the_rule_is_gone(
    store: RedisSessionStore, other: RedisSessionStore, raw: Redis, meanwhile: Meanwhile, rule: Lifetime
) -> None:
    """Deleted, with its lock; who waits for it, here or in another process, learns so at once."""
    await _stored(store, Lifetime(absolute=3600, idle=100))
    await meanwhile(raw)
    tasks = [asyncio.create_task(each.checkout("s", _LOCK, rule)) for each in (store, store, other)]
    assert await asyncio.gather(*tasks) == [Missing.ABSENT] * 3
    assert await raw.keys() == []
    for each in (store, other):
        state = await each._states.get()
        assert (len(state.locks), len(state.leases)) == (0, 0)


async def test_who_waits_for_what_has_ended_is_told(
    store: RedisSessionStore, other: RedisSessionStore, redis_url: str, raw: Redis
) -> None:
    """A rule that another process does not have yet ends the session for that one too."""
    third = RedisSessionStore(redis_url)
    await _stored(store, Lifetime(absolute=3600))
    holder = await _taken(other)
    ending = asyncio.create_task(store.checkout("s", _LOCK, Lifetime(absolute=50)))
    await _in_queue(raw, 1)
    waiting = asyncio.create_task(third.checkout("s", _LOCK, None))
    await _in_queue(raw, 2)
    await _make_older(raw, 100)
    await other.release(holder)
    assert [await ending, await waiting] == [Missing.ABSENT] * 2
    assert await raw.keys() == []
    await third.aclose()


@pytest.mark.parametrize(("meanwhile", "rule"), _ENDED)
async def test_without_a_lock_what_has_ended_is_absent_and_stays(
    store: RedisSessionStore, raw: Redis, meanwhile: Meanwhile, rule: Lifetime
) -> None:
    """A load that waits for nobody disturbs nobody either."""
    await _stored(store, Lifetime(absolute=3600, idle=100))
    await meanwhile(raw)
    before = await raw.get(_RECORD)
    assert await store.checkout("s", None, rule) is Missing.ABSENT
    assert await raw.get(_RECORD) == before


async def test_without_a_lock_bounds_are_shortened_for_this_request_only(
    store: RedisSessionStore, raw: Redis
) -> None:
    """A holder whose rule is longer finds the version that it loaded."""
    await _stored(store, Lifetime(absolute=3600))
    holder = await _taken(store)
    taken = await _taken(store, Lifetime(absolute=50, idle=20), None)
    assert taken.expires_in is not None
    assert (45 < taken.expires_in <= 50, taken.idle, taken.token) == (True, 20, None)
    assert taken.version == holder.version
    assert await store.commit(holder, _record(n=1), release=True) is Outcome.STORED
    assert await raw.pttl(_RECORD) > 3_500_000


async def test_a_rule_keeps_its_place_in_the_queue(
    store: RedisSessionStore, other: RedisSessionStore, raw: Redis
) -> None:
    """Shortened by who waited: what was committed before is there, and how long it waited too."""
    await _stored(store, Lifetime(absolute=3600))
    holder = await _taken(other)
    waiter = asyncio.create_task(_taken(store, Lifetime(absolute=50)))
    await _in_queue(raw, 1)
    assert await other.commit(holder, _record(n=1), release=True) is Outcome.STORED
    taken = await waiter
    assert _values(taken) == {"n": 1}
    assert taken.waited > 0
    assert await store.commit(taken, _record(n=2), release=True) is Outcome.STORED
    assert await raw.pttl(_RECORD) <= 50_000
    assert await raw.keys() == [_RECORD]


async def test_a_shortening_is_its_own_retry(store: RedisSessionStore, raw: Redis) -> None:
    """Sent again it changes nothing more, and after an end it is answered as before."""
    await _stored(store, Lifetime(absolute=3600, idle=100))
    state = await store._states.get()
    taken = await _taken(store)
    assert taken.token is not None
    args = (*_KEYS, taken.token.encode(), b"50000", b"0", b"ended")
    first = await state.commands.run(SHORTEN, *args)
    before = await raw.get(_RECORD)
    second = await state.commands.run(SHORTEN, *args)
    assert isinstance(first, list)
    assert isinstance(second, list)
    assert first[:2] == second[:2]
    assert await raw.get(_RECORD) == before
    await _make_older(raw, 100)
    assert await state.commands.run(SHORTEN, *args) == await state.commands.run(SHORTEN, *args) == [b"A"]


async def test_a_lock_that_was_lost_meanwhile_shortens_nothing(store: RedisSessionStore, raw: Redis) -> None:
    """Another may hold it: the checkout begins anew."""
    await _stored(store, Lifetime(absolute=3600))
    taken = await _taken(store)
    await raw.set(_HOLDER, "another", px=300)
    before = await raw.get(_RECORD)
    state = await store._states.get()
    keys = KeySpace(store.prefix).of("s")
    assert await state.checkouts._shorten(keys, taken, Lifetime(absolute=50)) is None
    assert await raw.get(_RECORD) == before
    assert (len(state.locks), len(state.leases)) == (0, 0)


@pytest.mark.parametrize(
    ("change", "why"),
    [("set foreign", Missing.UNREADABLE), ("retire", Missing.RETIRED), ("delete", Missing.ABSENT)],
)
@pytest.mark.parametrize("lock", [_LOCK, None])
async def test_what_is_gone_before_it_is_shortened(
    store: RedisSessionStore, raw: Redis, change: str, why: Missing, lock: LockPolicy | None
) -> None:
    """The checkout says why, and holds nothing."""
    await _stored(store, Lifetime(absolute=3600))
    taken = await _taken(store, None, lock)
    if change == "set foreign":
        await raw.set(_RECORD, "foreign")
    else:
        await raw.delete(_RECORD)
    if change == "retire":
        await raw.set(_RETIRED, "x", px=60_000)
    state = await store._states.get()
    keys = KeySpace(store.prefix).of("s")
    assert await state.checkouts._shorten(keys, taken, Lifetime(absolute=50)) is why
    assert await raw.exists(_HOLDER, _QUEUE) == 0
    assert (len(state.locks), len(state.leases)) == (0, 0)


@pytest.mark.parametrize("ticks", range(12))
async def test_a_shortening_cancelled_at_any_moment_leaves_nothing(
    store: RedisSessionStore, raw: Redis, ticks: int
) -> None:
    """Neither a lock nor somebody who waits."""
    await _stored(store, Lifetime(absolute=3600))
    task = asyncio.create_task(store.checkout("s", _LOCK, Lifetime(absolute=50)))
    for _ in range(ticks):
        await asyncio.sleep(0.0005 if ticks % 2 else 0)
    task.cancel()
    (result,) = await asyncio.gather(task, return_exceptions=True)
    if isinstance(result, Checkout):
        await store.release(result)
    await store.exists("s")
    assert await raw.keys() == [_RECORD]
    state = await store._states.get()
    assert (len(state.locks), len(state.leases)) == (0, 0)


# -- values of the release before ---------------------------------------------------------------------------


async def _old(raw: Redis, *, ends_in: int = 3600, idle: int = 100) -> str:
    """A record as the release before wrote it; when its life began is not said."""
    ends = (await raw.time())[0] * 1000 + ends_in * 1000 if ends_in else 0
    value = f"asgi1:{'0123456789abcdef'}:{ends:013}:{idle * 1000:013}:" + _record(n=0).decode()
    await raw.set(_RECORD, value, px=min(ends_in or idle, idle or ends_in) * 1000)
    return value


@pytest.mark.parametrize("lock", [_LOCK, None])
async def test_an_old_record_is_read_and_the_next_change_is_written_anew(
    store: RedisSessionStore, raw: Redis, lock: LockPolicy | None
) -> None:
    """Bounds and what is left of its life stay; its age is unknown."""
    value = await _old(raw)
    taken = await _taken(store, Lifetime(absolute=3600, idle=100), lock)
    assert _values(taken) == {"n": 0}
    assert (taken.idle, taken.age) == (100, None)
    assert taken.expires_in is not None
    assert 3590 < taken.expires_in <= 3600
    assert await raw.get(_RECORD) == value
    assert await store.commit(taken, _record(n=1), release=False) is Outcome.STORED
    assert await store.commit(taken, _record(n=2), release=True) is Outcome.STORED
    _, ends, idle, began = await _header(raw)
    assert (f"{ends:013}", idle, began) == (value[23:36], 100_000, 0)
    assert 95_000 < await raw.pttl(_RECORD) <= 100_000
    assert _values(await _taken(store)) == {"n": 2}


async def test_old_records_are_found_set_updated_and_deleted(store: RedisSessionStore, raw: Redis) -> None:
    """All record operations know them."""
    await _old(raw)
    assert [data.metadata for data in await store.find(SessionFilter())] == [{"n": 0}]
    assert await store.update("s", {"n": 5})
    assert (await _header(raw))[3] == 0
    await _old(raw)
    await store.set("s", SessionData(session_id="s"))
    assert (await _header(raw))[2:] == (100_000, 0)
    await _old(raw)
    assert await store.delete("s")
    assert await raw.keys() == []


async def test_an_old_record_is_kept_alive_and_never_created_over(
    store: RedisSessionStore, raw: Redis
) -> None:
    """Activity counts, and it is a record of ours."""
    await _old(raw)
    await raw.pexpire(_RECORD, 5_000)
    taken = await _taken(store)
    await store.keep_alive(taken)
    await store.release(taken)
    await store.exists("s")
    assert 95_000 < await raw.pttl(_RECORD) <= 100_000
    assert await store.create("s", _record(), Lifetime(absolute=60), None) is None


async def test_an_old_record_is_moved(store: RedisSessionStore, raw: Redis) -> None:
    """The new one is written in the new format, the old id is remembered."""
    await _old(raw)
    taken = await _taken(store)
    record = encode_checked(SessionData(session_id="t"))
    assert await store.create("t", record, Lifetime(absolute=60), None) is not None
    assert await retire(store, taken) is Outcome.STORED
    assert sorted(await raw.keys()) == [_RETIRED, "session:{t}"]
    assert str(await raw.get("session:{t}")).startswith("asgi2:")


async def test_an_old_record_is_handed_over(
    store: RedisSessionStore, other: RedisSessionStore, raw: Redis
) -> None:
    """As it is, and what the next one makes of it is in the new format."""
    await _old(raw)
    holder = await _taken(other)
    waiter = asyncio.create_task(_taken(store))
    await _in_queue(raw, 1)
    await other.release(holder)
    taken = await waiter
    assert await store.commit(taken, _record(n=1), release=True) is Outcome.STORED
    assert (await _header(raw))[3] == 0


async def test_a_rule_binds_old_records_as_far_as_they_tell(store: RedisSessionStore, raw: Redis) -> None:
    """The idle timeout is shortened in place; a `max_age` counts from a begin that nobody knows."""
    value = await _old(raw, idle=100)
    await raw.pexpire(_RECORD, 70_000)
    taken = await _taken(store, Lifetime(absolute=50, idle=50))
    assert await raw.get(_RECORD) == value[:37] + "0000000050000" + value[50:]
    assert 15_000 < await raw.pttl(_RECORD) <= 20_000
    assert await store.commit(taken, _record(n=1), release=True) is Outcome.STORED


_NEW = "asgi2:0123456789abcdef:0000000000000:0000000000000:0000000000000\n"
_OLD = "asgi1:0123456789abcdef:0000000000000:0000000000000:"


@pytest.mark.parametrize("header", [_NEW, _OLD], ids=["new", "old"])
async def test_a_header_that_is_cut_anywhere_is_not_ours(
    store: RedisSessionStore, raw: Redis, header: str
) -> None:
    """Unreadable, not locked, and left alone; a whole header with nothing behind it is a record."""
    for size in range(len(header)):
        await raw.set(_RECORD, header[:size])
        assert await store.checkout("s", _LOCK, None) is Missing.UNREADABLE, size
        assert await store.checkout("s", None, Lifetime(idle=1)) is Missing.UNREADABLE, size
        assert await store.create("s", _record(), Lifetime(absolute=60), None) is None, size
        with pytest.raises(SessionStoreError):
            await store.set("s", SessionData(session_id="s"))
        with pytest.raises(SessionStoreError):
            await store.delete("s")
        await store.exists("s")
        assert await raw.get(_RECORD) == header[:size]
        assert await raw.exists(_HOLDER) == 0
    await raw.set(_RECORD, header)
    taken = await _taken(store, None, None)
    assert taken.record == b""


@pytest.mark.parametrize("end", ["release", "commit"])
async def test_to_keep_alive_costs_no_write_of_its_own(
    store: RedisSessionStore, raw: Redis, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    """It leaves with what the request calls next: two writes of a connection, the first for the lock."""
    writes: list[bytes] = []
    record = encode_checked(SessionData(session_id="s"))
    await store.create("s", record, Lifetime(3600, 600), None)
    stream = (await store._states.get()).router.pipeline(b"")._stream
    assert stream is not None
    write = stream.write

    def counted(data: bytes) -> None:
        writes.append(data)
        write(data)

    monkeypatch.setattr(stream, "write", counted)
    taken = await store.checkout("s", LockPolicy(), Lifetime(3600, 600))
    assert isinstance(taken, Checkout)
    await store.keep_alive(taken)
    if end == "commit":
        await store.commit(taken, record, release=True)
    else:
        await store.release(taken)
    assert len(writes) == 2
    assert TOUCH.by_sha in writes[1]
