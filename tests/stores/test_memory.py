"""The in-memory store keeps the contract on both event loops, evicts and expires, and leaves nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from asgi_sessions import (
    InMemorySessionStore,
    LockAcquisitionError,
    LockTimeoutError,
    SessionData,
    SessionStore,
)
from asgi_sessions.record.codec import encode_checked
from asgi_sessions.record.values import new_session_id
from asgi_sessions.stores.checkout import Checkout, Lifetime, LockPolicy, Missing, Outcome
from asgi_sessions.stores.ends import Ends
from asgi_sessions.stores.local import LocalLocks
from asgi_sessions.testing.contract import StoreContract
from asgi_sessions.testing.rivals import keep_moving

pytestmark = pytest.mark.anyio

LOCK = LockPolicy(wait=1)


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


class TestContract(StoreContract):
    """The contract, with a clock that is moved instead of waited for."""

    @pytest.fixture(params=["asyncio", "trio"])
    def anyio_backend(self, request: pytest.FixtureRequest) -> str:
        return str(request.param)

    @pytest.fixture
    def store(self, clock: Clock) -> InMemorySessionStore:
        return InMemorySessionStore(clock=clock)

    @pytest.fixture
    def let_time_pass(self, clock: Clock) -> Callable[[float], Awaitable[None]]:
        async def pass_(seconds: float) -> None:
            clock.now += seconds

        return pass_


def new(**fields: Any) -> SessionData:
    return SessionData(session_id=new_session_id(), **fields)


async def fill(store: SessionStore, *names: str, ttl: float | None = None) -> None:
    for name in names:
        await store.set(name, SessionData(session_id=name), ttl)


async def take(store: SessionStore, session_id: str, policy: LockPolicy | None = LOCK) -> Checkout:
    taken = await store.checkout(session_id, policy, None)
    assert isinstance(taken, Checkout)
    return taken


# --- room -----------------------------------------------------------------------------------------


async def test_the_least_recently_active_session_makes_room(clock: Clock) -> None:
    """Writes and requests count as activity; reading a record from outside does not."""
    store = InMemorySessionStore(4, clock=clock)
    await fill(store, "a", "b", "c", "d")
    await store.release(await take(store, "a"))
    await store.set("b", SessionData(session_id="b"))
    assert await store.get("c") is not None
    await fill(store, "e")
    assert await store.list_active() == ["a", "b", "d", "e"]
    await fill(store, "f")
    assert await store.list_active() == ["a", "b", "e", "f"]
    assert (await store.get_stats())["evictions"] == 2


async def test_anonymous_traffic_evicts_nobody_who_is_signed_in(clock: Clock) -> None:
    """Expired sessions go first, then anonymous ones, and signed-in ones only where no other is left."""
    store = InMemorySessionStore(4, clock=clock)
    for name in ("ada", "bob"):
        data = SessionData(session_id=name, user_id=name)
        await store.create(name, encode_checked(data), Lifetime(absolute=3600), None, name)
    await fill(store, *[f"bot{n}" for n in range(100)])
    assert await store.list_active() == ["ada", "bob", "bot98", "bot99"]
    for name in ("cyd", "dan", "eve"):
        await store.set(name, SessionData(session_id=name, user_id=name))
    assert await store.list_active() == ["bob", "cyd", "dan", "eve"], "the least recently active one"
    await store.set("bob", SessionData(session_id="bob"))  # signs out
    await fill(store, "bot")
    assert await store.list_active() == ["bot", "cyd", "dan", "eve"]


async def test_expired_sessions_make_room_first(clock: Clock) -> None:
    """A live session stays while there is an expired one, however recently that was used."""
    store = InMemorySessionStore(3, clock=clock)
    await fill(store, "old")
    await fill(store, "a", "b", ttl=10)
    clock.now += 10
    await fill(store, "c")
    assert await store.list_active() == ["c", "old"]
    stats = await store.get_stats()
    assert (stats["evictions"], stats["expirations"]) == (0, 2)


async def test_making_room_does_not_wait_for_all_that_expired(clock: Clock) -> None:
    """A night's expired sessions go a few at a time: the first request of the morning pays for its own."""
    store = InMemorySessionStore(100, clock=clock)
    await fill(store, *[f"night-{n:03}" for n in range(100)], ttl=10)
    await fill(store, "then-1", "then-2", "then-3", ttl=10)  # three are evicted, whose ends stay in the books
    clock.now += 10
    await fill(store, "morning")
    assert len(store._entries) > 95, "one request dropped nearly all of them"
    assert await store.list_active() == ["morning"]
    assert (await store.get_stats())["evictions"] == 3


async def test_pages_of_any_size_are_in_order(clock: Clock) -> None:
    """A short page of a long list is the same as a part of the whole list."""
    store = InMemorySessionStore(clock=clock)
    names = [f"s{n * 7919 % 1000:03}" for n in range(1000)]
    await fill(store, *names)
    whole = await store.list_active()
    assert whole == sorted(names)
    for limit, offset in ((0, 0), (3, 0), (3, 4), (9, 0), (11, 0), (3, 500), (5, 998), (3, 2000)):
        assert await store.list_active(limit, offset) == whole[offset : offset + limit]


async def test_a_checked_out_session_is_never_evicted(clock: Clock) -> None:
    """The next one that nobody holds goes instead."""
    store = InMemorySessionStore(3, clock=clock)
    await fill(store, "a", "b", "c")
    held = await take(store, "a")
    await fill(store, "d", "e")
    assert await store.list_active() == ["a", "d", "e"]
    assert await store.commit(held, held.record, release=True) is Outcome.STORED
    await fill(store, "f", "g", "h")
    assert "a" not in await store.list_active()


async def test_where_all_are_checked_out_the_store_grows(clock: Clock) -> None:
    """No request loses its session; the room is won back by those that come after."""
    store = InMemorySessionStore(2, clock=clock)
    await fill(store, "a", "b")
    held = [await take(store, "a"), await take(store, "b")]
    await fill(store, "c")
    assert await store.list_active() == ["a", "b", "c"]
    assert (await store.get_stats())["utilization"] == 1.5
    for taken in held:
        assert await store.commit(taken, taken.record, release=True) is Outcome.STORED
    await fill(store, "d")
    assert await store.count_active() == 2


class CountedLocks(LocalLocks):
    """Counts how often it is asked whether a session is checked out."""

    asked = 0

    def __contains__(self, session_id: str) -> bool:
        self.asked += 1
        return super().__contains__(session_id)


class CountedEnds(Ends):
    """Counts how many ends were looked at."""

    taken = 0

    def take(self, now: float) -> str | None:
        self.taken += 1
        return super().take(now)


WAYS = ("anonymous", "signed in", "half checked out", "all checked out", "ended since they were evicted")


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize("way", WAYS)
async def test_making_room_costs_the_same_however_many_there_are(clock: Clock, way: str) -> None:
    """Whoever creates a session waits while a bounded number of others is looked at; then the store grows."""
    most = {}
    for size in (200, 5000):
        store = InMemorySessionStore(size, clock=clock)
        locks = store._locks = store._table.locks = CountedLocks(clock)
        ends = store._table.ends = CountedEnds()
        user = "ada" if way == "signed in" else None
        for n in range(2 * size if way == WAYS[-1] else size):
            name = f"{way} {n}".replace(" ", "-")
            record = encode_checked(SessionData(session_id=name, user_id=user))
            await store.create(name, record, Lifetime(absolute=60 if n < size else 90), None, user)
            if way == "all checked out" or (way == "half checked out" and n < size // 2):
                await take(store, name)
        clock.now += 60 if way == WAYS[-1] else 0
        most[size] = 0
        for n in range(size // 2):
            locks.asked = ends.taken = 0
            await fill(store, f"new-{n}")
            most[size] = max(most[size], locks.asked + ends.taken)
        assert await store.count_active() <= size * (2 if way == "all checked out" else 1.1)
    assert most[5000] <= 300, "one creation waited for many"
    assert most[200] > 0


@pytest.mark.parametrize(
    ("max_sessions", "default_ttl"), [(0, 1), (-1, 1), (1, 0), (1, -1), (1, float("nan"))]
)
async def test_impossible_sizes_and_times_are_refused(max_sessions: int, default_ttl: float) -> None:
    """In the constructor, by the name of the argument."""
    with pytest.raises(ValueError, match="max_sessions" if max_sessions < 1 else "default_ttl"):
        InMemorySessionStore(max_sessions, default_ttl)


# --- time -----------------------------------------------------------------------------------------


async def test_the_default_ttl_is_an_hour(clock: Clock) -> None:
    """A new record without a ttl of its own lives `default_ttl` seconds by the store's clock."""
    store = InMemorySessionStore(clock=clock)
    await fill(store, "a")
    clock.now += 3599.9
    assert await store.exists("a")
    clock.now += 0.1
    assert not await store.exists("a")
    short = InMemorySessionStore(default_ttl=5, clock=clock)
    await fill(short, "a")
    await short.get_or_create("b")
    clock.now += 5
    assert await short.list_active() == []


async def test_memory_follows_the_live_sessions(clock: Clock) -> None:
    """Ten thousand short sessions in a row, none of which is looked at again, leave next to nothing."""
    store = InMemorySessionStore(clock=clock)
    most = 0
    for n in range(10_000):
        session_id = f"s{n}"
        await store.set(session_id, SessionData(session_id=session_id, user_id=f"u{n % 7}"), 100)
        clock.now += 1
        most = max(most, len(store._entries), len(store._table.ends))
    assert most <= 102
    assert sum(len(sessions) for sessions in store._table.users.values()) == len(store._entries)
    clock.now += 100
    assert await store.cleanup_expired() == 100
    assert (store._entries, store._table.users, len(store._locks)) == ({}, {}, 0)


async def test_the_order_of_expiry_does_not_grow_with_deletions(clock: Clock) -> None:
    """What was deleted or replaced long before its end does not stay in the books till then."""
    store = InMemorySessionStore(clock=clock)
    await fill(store, "kept", ttl=1e9)
    most = 0
    for n in range(2_000):
        await fill(store, f"s{n}", ttl=1e9)
        await store.set("kept", SessionData(session_id="kept"), 1e9 + n)
        await store.delete(f"s{n}")
        most = max(most, len(store._table.ends))
    assert most < 100
    assert await store.list_active() == ["kept"]


async def test_sessions_kept_alive_by_requests_stay(clock: Clock) -> None:
    """The books are put right when an end comes that was moved: an idle timeout restarts."""
    store = InMemorySessionStore(clock=clock)
    data = new()
    await store.create(data.session_id, encode_checked(data), Lifetime(idle=10), None)
    for n in range(50):
        clock.now += 9
        await store.keep_alive(await take(store, data.session_id, None))
        await fill(store, f"s{n}", ttl=5)
        assert len(store._table.ends) < 5
    assert await store.exists(data.session_id)
    clock.now += 10
    assert not await store.exists(data.session_id)


async def test_cleaning_up_tells_how_many(clock: Clock) -> None:
    """All that has expired goes at once, and is counted once."""
    store = InMemorySessionStore(clock=clock)
    await fill(store, "a", "b", "c", ttl=1)
    await fill(store, "d")
    clock.now += 1
    assert not await store.exists("a")
    assert await store.cleanup_expired() == 2
    assert await store.cleanup_expired() == 0
    assert (await store.get_stats())["expirations"] == 3


async def test_retired_ids_are_forgotten_after_a_minute(clock: Clock) -> None:
    """Until then a late request is told that its id was replaced; afterwards it is unknown like any other."""
    store = InMemorySessionStore(clock=clock)
    for n in range(100):
        await fill(store, f"s{n}")
        taken, new_id = await take(store, f"s{n}"), new_session_id()
        record = encode_checked(SessionData(session_id=new_id))
        outcome = await store.move(taken, new_id, record, lifetime=None, lock=None, was=None, user=None)
        assert outcome is Outcome.STORED
        clock.now += 10
        assert len(store._retired) <= 6
    assert await store.checkout("s99", None, None) is Missing.RETIRED
    assert await store.checkout("s90", None, None) is Missing.ABSENT
    clock.now += 50
    assert await store.checkout("s99", None, None) is Missing.ABSENT
    assert len(store._retired) == 0


# --- users and figures ----------------------------------------------------------------------------


async def test_the_index_of_users_holds_live_sessions_only(clock: Clock) -> None:
    """Deleted, expired, evicted and replaced sessions leave it."""
    store = InMemorySessionStore(3, clock=clock)
    await store.set("deleted", SessionData(session_id="deleted", user_id="ada"))
    await store.delete("deleted")
    assert store._table.users == {}
    await store.set("expired", SessionData(session_id="expired", user_id="ada"), 1)
    clock.now += 1
    assert await store.list_for_user("ada") == []
    assert store._table.users == {}
    await store.set("evicted", SessionData(session_id="evicted", user_id="ada"))
    for name in ("a", "b", "c"):
        await store.set(name, SessionData(session_id=name, user_id="bob"))
    assert set(store._table.users) == {"bob"}
    await store.delete_batch(["a", "b", "c"])
    assert store._table.users == {}
    await store.set("a", SessionData(session_id="a", user_id="bob"), 60)
    await store.set("a", SessionData(session_id="a", user_id="eve"), 60)
    assert set(store._table.users) == {"eve"}


async def test_a_sign_out_that_is_cut_off_can_be_made_again(clock: Clock) -> None:
    """The sessions that it had not come to are still their user's, and may move."""
    store = InMemorySessionStore(clock=clock)
    names = [f"s{n:03}" for n in range(250)]
    for name in names:
        await store.set(name, SessionData(session_id=name, user_id="ada"))
    with anyio.CancelScope() as scope:
        scope.cancel()
        await store.delete_for_user("ada")
    assert scope.cancelled_caught
    left = await store.list_active()
    assert len(left) == 200
    assert [data.session_id for data in await store.list_for_user("ada")] == left
    assert await store.delete_for_user("ada") == len(left)
    assert (store._entries, store._table.users, list(store._table._signed_in)) == ({}, {}, [])


async def test_a_link_that_leads_nowhere_makes_nobody_signed_in(clock: Clock) -> None:
    """A session in which somebody else, or nobody, is signed in by now makes room like any other."""
    store = InMemorySessionStore(2, clock=clock)
    for name in ("a", "b"):
        await store.set(name, SessionData(session_id=name, user_id="ada"))
    await store.update("a", {"user_id": None})
    assert await store.delete_for_user("ada") == 1
    await store.set("c", SessionData(session_id="c", user_id="cyd"))
    await store.release(await take(store, "a"))
    await fill(store, "d")
    assert await store.list_active() == ["c", "d"]


async def test_the_figures(clock: Clock) -> None:
    """What a dashboard shows."""
    store = InMemorySessionStore(10, clock=clock)
    await fill(store, "a", "b")
    await store.get("a")
    await store.get("missing")
    await store.delete("b")
    held = await take(store, "a")
    assert await store.get_stats() == {
        "store_type": "memory",
        "total_sessions": 1,
        "active_sessions": 1,
        "expired_sessions": 0,
        "max_sessions": 10,
        "utilization": 0.1,
        "locks_held": 1,
        "locks_waited_for": 0,
        "default_ttl": 3600,
        "hits": 2,
        "misses": 1,
        "writes": 2,
        "deletes": 1,
        "evictions": 0,
        "expirations": 0,
    }
    await store.release(held)


# --- locks ----------------------------------------------------------------------------------------


async def test_locks_leave_nothing_behind() -> None:
    """After any crowd of holders, waiters, cancelled and refused ones the books are empty."""
    store = InMemorySessionStore()
    await fill(store, "a", "b")

    async def hold(session_id: str, policy: LockPolicy) -> None:
        with contextlib.suppress(LockAcquisitionError):
            taken = await take(store, session_id, policy)
            await anyio.lowlevel.checkpoint()
            await store.release(taken)

    async with anyio.create_task_group() as tasks:
        for n in range(40):
            tasks.start_soon(hold, "ab"[n % 2], LockPolicy(wait=n % 3, max_waiters=10))
    held = await take(store, "a")
    async with anyio.create_task_group() as tasks:
        for _ in range(5):
            tasks.start_soon(hold, "a", LOCK)
        await anyio.wait_all_tasks_blocked()
        tasks.cancel_scope.cancel()
    assert len(store._locks) == 1
    await store.release(held)
    assert len(store._locks) == 0
    assert await store.checkout("missing", LOCK, None) is Missing.ABSENT
    assert len(store._locks) == 0


async def test_who_came_first_is_served_first() -> None:
    """Also when one of those who wait goes away, and nobody new overtakes them."""
    locks = LocalLocks()
    token, _ = await locks.acquire("s", LOCK)
    order: list[int] = []
    scopes: list[anyio.CancelScope] = []

    async def wait(n: int) -> None:
        with anyio.CancelScope() as scope:
            scopes.append(scope)
            mine, waited = await locks.acquire("s", LOCK)
            order.append(n)
            assert waited >= 0
            assert locks.release("s", mine)

    async with anyio.create_task_group() as tasks:
        for n in range(6):
            tasks.start_soon(wait, n)
            await anyio.wait_all_tasks_blocked()
        scopes[2].cancel()
        await anyio.wait_all_tasks_blocked()
        assert locks.release("s", token)
        assert locks.try_acquire("s", LOCK) is None
    assert order == [0, 1, 3, 4, 5]
    assert len(locks) == 0


async def test_a_hung_holder_is_relieved_by_who_comes(clock: Clock) -> None:
    """Past `max_hold` the lock is free for the next, and the late holder's commit is refused."""
    store = InMemorySessionStore(clock=clock)
    await fill(store, "a")
    policy = LockPolicy(wait=0, max_hold=30)
    late = await take(store, "a", policy)
    clock.now += 29.9
    with pytest.raises(LockTimeoutError):
        await take(store, "a", policy)
    clock.now += 0.1
    assert await store.renew([late]) == [False]
    taken = await take(store, "a", policy)
    assert await store.commit(late, late.record, release=False) is Outcome.LOST
    assert await store.discard(late) is Outcome.LOST
    assert await store.commit(taken, taken.record, release=True) is Outcome.STORED
    assert len(store._locks) == 0


async def test_a_hung_holder_is_relieved_by_who_waits(clock: Clock) -> None:
    """A waiter is not left behind a holder that never lets go."""
    locks = LocalLocks(clock)
    late, _ = await locks.acquire("s", LockPolicy(max_hold=0.01))
    got: list[str] = []

    async def wait() -> None:
        token, _ = await locks.acquire("s", LockPolicy(wait=5))
        got.append(token)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(wait)
        await anyio.wait_all_tasks_blocked()
        clock.now += 0.01
    assert not locks.owns("s", late)
    assert not locks.release("s", late)
    assert locks.owns("s", got[0])
    assert locks.release("s", got[0])
    assert len(locks) == 0


async def test_a_waiter_that_is_cancelled_as_its_turn_comes_passes_it_on() -> None:
    """Whether it takes the lock that was just handed to it or not, the one behind it gets it next."""
    locks = LocalLocks()
    token, _ = await locks.acquire("s", LOCK)
    served: list[str] = []

    async def wait(name: str, scope: anyio.CancelScope) -> None:
        with scope:
            mine, _ = await locks.acquire("s", LOCK)
            try:
                await anyio.lowlevel.checkpoint()
                served.append(name)
            finally:
                locks.release("s", mine)

    first, second = anyio.CancelScope(), anyio.CancelScope()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(wait, "first", first)
        await anyio.wait_all_tasks_blocked()
        tasks.start_soon(wait, "second", second)
        await anyio.wait_all_tasks_blocked()
        locks.release("s", token)
        first.cancel()
    assert served == ["second"]
    assert len(locks) == 0


# --- transactions -----------------------------------------------------------------------------------


async def test_a_record_in_a_transaction_keeps_its_id() -> None:
    """Stored under one id and saying another, it could not be read any more."""
    store = InMemorySessionStore()
    await store.set("a", SessionData(session_id="a", metadata={"n": 1}))

    async def rename() -> None:
        async with store.transaction("a") as data:
            assert data is not None
            data.session_id = "b"

    with pytest.raises(ValueError, match="another session"):
        await rename()
    assert (await store.get("a") or SessionData(session_id="none")).metadata == {"n": 1}
    assert len(store._locks) == 0


@pytest.mark.parametrize("busy", [1, 8, 64])
async def test_none_of_a_thousand_survives_a_sign_out(busy: int) -> None:
    """However many of them get new ids all the time, and however often the user signs in meanwhile."""
    store = InMemorySessionStore(max_sessions=100_000)
    ids = [new_session_id() for _ in range(1000)]
    for session_id in ids:
        data = SessionData(session_id=session_id, user_id="ada")
        await store.create(session_id, encode_checked(data), Lifetime(3600), None, "ada")
    is_over, late = False, set[str]()

    async def sign_in() -> None:
        while not is_over:
            data = SessionData(session_id=new_session_id(), user_id="ada")
            begun_late = is_ended
            await store.create(data.session_id, encode_checked(data), Lifetime(3600), None, "ada")
            if begun_late:
                late.add(data.session_id)
            await anyio.lowlevel.checkpoint()

    is_ended, ended = False, 0
    async with anyio.create_task_group() as tasks:
        for session_id in ids[:busy]:
            tasks.start_soon(keep_moving, store, session_id, "ada", 10_000)
            tasks.start_soon(sign_in)
        for _ in range(20):
            await anyio.lowlevel.checkpoint()
        is_ended = True
        ended = await store.delete_for_user("ada")
        is_over = True
    left = {each.session_id for each in await store.list_for_user("ada")}
    assert left <= late
    assert ended >= 1000 - busy
    assert not {session_id for session_id in ids if await store.exists(session_id)}
