"""What every store promises, as tests."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing, suppress
from datetime import timedelta
from functools import partial
from uuid import uuid4

import anyio
import pytest

from ..errors import (
    LockTimeoutError,
    SessionConflictError,
    SessionDataError,
    SessionError,
    SessionStoreError,
    TooManyWaitersError,
)
from ..record.codec import decode, encode_checked
from ..record.model import SessionData
from ..record.queries import SessionFilter
from ..record.values import new_session_id
from ..stores.checkout import Checkout, Lifetime, LockPolicy, Missing, Outcome
from ..stores.contract import SessionStore
from .rivals import (
    HOUR,
    IDLE,
    LOCK,
    Pause,
    check_out,
    commit,
    commit_unlocked,
    count,
    create,
    end,
    interleave,
    keep_moving,
    look,
    move,
    new,
    set_anew,
    set_if_there,
    try_to_move,
    update,
)

_HOLD = "hold the session while you read, compare and write it"
_SIGN_OUT = "a move of a signed-in session waits until a sign-out of its user is over"
_ROUNDS = 20  # of tasks at once, each round in another order
_ODD_IDS = (
    "a/b", "../up", "..", ".", "A", "a", "a.json", "a:b", "a{b}", "*", "[a]", "%2e", "ünï☃", "x" * 255,
    "☃" * 255,
)  # fmt: skip
_ODD_VALUES = (b"", b"\x00\xff", b"a\nb\r\n", b"x" * 1_000_000)

_PassTime = Callable[[float], Awaitable[None]]


class StoreContract:
    """What every store promises, as tests."""

    pytestmark = pytest.mark.anyio

    @pytest.fixture
    def anyio_backend(self) -> str:
        """The event loop; a store that runs on trio too may parametrise this."""
        return "asyncio"

    @pytest.fixture
    def store(self) -> SessionStore:
        """The store under test: override this one."""
        pytest.fail("override the fixture `store` with one that gives your store")

    @pytest.fixture
    def let_time_pass(self) -> _PassTime:
        """Let seconds of the store's clock pass; override it where the clock can be moved."""
        return anyio.sleep

    # -- the four primitives, where the store has them ------------------------------------------------------

    async def test_the_base_class_is_made_ready(self, store: SessionStore) -> None:
        """`__init__` calls `super().__init__()`."""
        assert hasattr(store, "_locks"), f"{type(store).__name__}.__init__ has to call super().__init__()"

    async def test_values_come_back_as_they_were_written(self, store: SessionStore) -> None:
        """Bytes of any kind, each under its own id, whatever characters that has; the latest write counts."""
        if not _has_primitives(store):
            return
        values = {name: f"value of {name}".encode() for name in _ODD_IDS}
        for name in values:
            await _delete_value(store, name)
            assert await store.read_value(name) is None, "read_value gives None where nothing is"
        for name, value in values.items():
            await store.write_value(name, b"an older value", 3600)
            await store.write_value(name, value, 3600.5)
        for name, value in values.items():
            found = await store.read_value(name)
            assert found == value, f"another id's value lies under {name!r}: encode ids, or quote them"
            assert type(found) is bytes, "read_value gives bytes"
        for value in _ODD_VALUES:
            await store.write_value("a/b", value, 3600)
            assert await store.read_value("a/b") == value, "values are bytes of any kind and of up to 2 MB"
        listed = [name async for name in store.iter_ids()]
        for name in values:
            assert listed.count(name) == 1, f"iter_ids names each id once and as it was given: {name!r}"
        await store.delete_value("a")
        assert await store.read_value("a") is None, "delete_value left the value"
        assert await store.read_value("A") == values["A"], "delete_value took another id's value"
        for name in values:
            await _delete_value(store, name)
        assert not set(values) & {name async for name in store.iter_ids()}

    async def test_a_value_lives_as_long_as_its_latest_ttl(
        self, store: SessionStore, let_time_pass: _PassTime
    ) -> None:
        """A ttl is a number of seconds, a fraction or a year; what a later write says counts."""
        if not _has_primitives(store):
            return
        name = new_session_id()
        for ttl in (0.2, 0.001, 400 * 86400.0, 3600.0):
            await store.write_value(name, b"value", ttl)
        await let_time_pass(0.4)
        assert await store.read_value(name) == b"value", "the ttl of an earlier write ended the value"
        await store.delete_value(name)

    async def test_ids_are_listed_while_sessions_come_and_go(self, store: SessionStore) -> None:
        """`iter_ids` is an async generator that bears changes; what stays is listed once."""
        if not _has_primitives(store):
            return
        stays, goes, comes = [[new_session_id() for _ in range(5)] for _ in range(3)]
        for name in [*stays, *goes]:
            await store.write_value(name, b"value", 3600)
        listed: list[str] = []
        async for name in _listed(store):
            listed.append(name)
            if goes:
                await store.delete_value(goes.pop())
            elif comes:
                await store.write_value(comes.pop(), b"value", 3600)
        assert [listed.count(name) for name in stays] == [1] * 5, "iter_ids left an id out, or gave one twice"
        for name in listed:
            if await store.read_value(name) == b"value":
                await store.delete_value(name)

    async def test_what_is_not_ours_is_left_alone(self, store: SessionStore) -> None:
        """A value that the package has not written is neither served nor overwritten nor deleted."""
        if not _has_primitives(store):
            return
        data = new()
        await store.write_value(data.session_id, b"something else", 3600)
        for call in (store.get, store.delete):
            with pytest.raises(SessionStoreError, match="not a session record"):
                await call(data.session_id)
        with pytest.raises(SessionStoreError, match="not a session record"):
            await store.set(data.session_id, data)
        for lock in (LOCK, None):
            assert await store.checkout(data.session_id, lock, HOUR) is Missing.UNREADABLE
        assert data.session_id not in await store.list_active()
        assert await store.read_value(data.session_id) == b"something else"
        await store.delete_value(data.session_id)

    # -- records ----------------------------------------------------------------------------------------

    async def test_a_record_comes_back_equal(self, store: SessionStore) -> None:
        """What was set is what `get` gives."""
        data = new(user_id="ada", metadata={"cart": [1, {"two": None}], "ünï": "☃"}, message_count=3)
        assert await store.set(data.session_id, data) is True
        assert await store.get(data.session_id) == data
        assert await store.exists(data.session_id) is True

    async def test_absence_is_a_value(self, store: SessionStore) -> None:
        """An id that was never stored is None, False or an empty answer, not an exception."""
        absent = new_session_id()
        assert await store.get(absent) is None
        assert await store.exists(absent) is False
        assert await store.delete(absent) is False
        assert await store.update(absent, {"a": 1}) is False
        assert await store.touch(absent) is False
        assert await store.set(absent, SessionData(session_id=absent), create=False) is False
        assert await store.get_batch([absent]) == {absent: None}
        assert await store.delete_batch([absent]) == {absent: False}
        async with store.transaction(absent) as data:
            assert data is None
        assert await store.increment_counter(absent, "message_count") == 0
        assert await store.exists(absent) is False

    async def test_nothing_is_shared_with_the_store(self, store: SessionStore) -> None:
        """Changing what was set or what was got changes nothing in the store."""
        data = new(metadata={"list": [1]})
        await store.set(data.session_id, data)
        data.metadata["list"].append(2)
        first = await store.get(data.session_id)
        assert first is not None
        first.metadata["list"].append(3)
        again = await store.get(data.session_id)
        assert again is not None
        assert again.metadata == {"list": [1]}

    async def test_set_refuses_what_is_wrong_and_keeps_the_record(self, store: SessionStore) -> None:
        """Another session's data, a ttl of 0 and an unstorable value are errors; the old record stays."""
        data = new(metadata={"a": 1})
        await store.set(data.session_id, data)
        with pytest.raises(ValueError, match="another session"):
            await store.set(data.session_id, new())
        for ttl in (0, -1):
            with pytest.raises(ValueError, match="ttl"):
                await store.set(data.session_id, data, ttl)
        broken = data.model_copy(deep=True)
        broken.metadata["bad"] = {1, 2}
        with pytest.raises(SessionDataError) as caught:
            await store.set(data.session_id, broken)
        assert caught.value.path == "metadata.bad"
        assert await store.get(data.session_id) == data

    async def test_a_record_expires(self, store: SessionStore, let_time_pass: _PassTime) -> None:
        """After its ttl a record is absent; `set` without ttl and other writes do not prolong it."""
        data = new()
        await store.set(data.session_id, data, 0.4)
        await let_time_pass(0.2)
        await store.set(data.session_id, data)
        await store.update(data.session_id, {"a": 1})
        await store.increment_counter(data.session_id, "message_count")
        await store.touch(data.session_id)
        taken = await check_out(store, data.session_id)
        await commit(store, taken, changed=True)
        assert await store.exists(data.session_id)
        await let_time_pass(0.3)
        assert await store.get(data.session_id) is None
        assert data.session_id not in await store.list_active()
        assert await store.checkout(data.session_id, LOCK, HOUR) is Missing.ABSENT

    async def test_a_new_ttl_counts_from_now(self, store: SessionStore, let_time_pass: _PassTime) -> None:
        """`set` with ttl on an existing record replaces its remaining time; an idle timeout restarts."""
        data, idle = new(), new()
        await store.set(data.session_id, data, 0.2)
        await store.set(data.session_id, data, 60)
        await create(store, idle, Lifetime(absolute=3600, idle=0.4))
        await let_time_pass(0.25)
        await store.set(idle.session_id, idle, 60)
        await let_time_pass(0.25)
        assert await store.exists(data.session_id), "the earlier ttl ended the record"
        assert await store.exists(idle.session_id), "`set` with a ttl begins the record's life anew"

    async def test_listing(self, store: SessionStore) -> None:
        """Ids come sorted, in pages; `limit=0` gives none; the count agrees."""
        before = set(await store.list_active())
        records = {data.session_id: data for data in (new() for _ in range(5))}
        assert await store.set_batch(records) == dict.fromkeys(records, True)
        listed = await store.list_active()
        assert listed == sorted(before | set(records))
        assert await store.count_active() == len(listed)
        assert await store.list_active(limit=0) == []
        assert await store.list_active(limit=2, offset=1) == listed[1:3]
        assert await store.list_active(offset=len(listed)) == []

    async def test_batches(self, store: SessionStore) -> None:
        """Batches do what the single calls do; an unstorable record stops the batch before it writes."""
        records = {data.session_id: data for data in (new(metadata={"n": n}) for n in range(3))}
        await store.set_batch(records, 60)
        absent = new_session_id()
        assert await store.get_batch([*records, absent]) == {**records, absent: None}
        gone = await store.delete_batch([*records, absent])
        assert gone == {**dict.fromkeys(records, True), absent: False}
        good, bad = new(), new()
        bad.metadata["x"] = object()
        with pytest.raises(SessionDataError):
            await store.set_batch({good.session_id: good, bad.session_id: bad})
        assert not await store.exists(good.session_id)

    async def test_update(self, store: SessionStore) -> None:
        """Field names set fields, all others the metadata, also where a method has that name."""
        data = new(metadata={"kept": 1})
        await store.set(data.session_id, data)
        assert await store.update(
            data.session_id, {"escalated": True, "to_json": "mine", "n": 2}, atomic=True
        )
        after = await store.get(data.session_id)
        assert after is not None
        assert after.escalated is True
        assert after.metadata == {"kept": 1, "to_json": "mine", "n": 2}
        assert after.updated_at >= data.updated_at

    async def test_an_invalid_update_changes_nothing(self, store: SessionStore) -> None:
        """All updates are stored or none."""
        data = new(metadata={"kept": 1})
        await store.set(data.session_id, data)
        for wrong in ({"n": 1, "message_count": -1}, {"n": 1, "session_id": "x" * 32}, {"n": object()}):
            with pytest.raises((ValueError, SessionError)):
                await store.update(data.session_id, wrong)
        assert await store.get(data.session_id) == data

    async def test_counters_lose_nothing(self, store: SessionStore) -> None:
        """Increments at once, in a field and in the metadata, all count and all return another number."""
        data = new(metadata={"name": "x", "flag": True})
        await store.set(data.session_id, data)
        seen: dict[str, list[int]] = {"message_count": [], "visits": []}

        async def count(field: str) -> None:
            seen[field].append(await store.increment_counter(data.session_id, field, 2))

        async with anyio.create_task_group() as tasks:
            for _ in range(10):
                tasks.start_soon(count, "message_count")
                tasks.start_soon(count, "visits")
        assert {field: sorted(numbers) for field, numbers in seen.items()} == {
            "message_count": list(range(2, 21, 2)),
            "visits": list(range(2, 21, 2)),
        }
        for field in ("name", "flag", "escalated", "created_at"):
            with pytest.raises(SessionDataError, match="not a number"):
                await store.increment_counter(data.session_id, field)

    async def test_touch_notes_activity(self, store: SessionStore) -> None:
        """`last_activity` moves, the rest does not."""
        data = new()
        data.last_activity -= timedelta(hours=1)
        await store.set(data.session_id, data)
        assert await store.touch(data.session_id) is True
        after = await store.get(data.session_id)
        assert after is not None
        assert after.last_activity > data.last_activity

    async def test_get_or_create_gives_everybody_one_record(self, store: SessionStore) -> None:
        """Concurrent callers get the same record; only one factory's record counts."""
        for seed in range(_ROUNDS):
            pause = interleave(store, seed)
            session_id = new_session_id()
            got: list[SessionData] = []

            async def ask(n: int, session_id: str, got: list[SessionData], pause: Pause) -> None:
                def factory(session_id: str) -> SessionData:
                    return SessionData(session_id=session_id, metadata={"by": n})

                await pause()
                got.append(await store.get_or_create(session_id, factory, ttl=60))

            async with anyio.create_task_group() as tasks:
                for n in range(4):
                    tasks.start_soon(ask, n, session_id, got, pause)
            made_by = {data.metadata["by"] for data in got}
            assert len(made_by) == 1, f"`create` wrote over what another had created: {_HOLD}"
            assert (await store.get_or_create(session_id)).metadata == got[0].metadata
        fresh = await store.get_or_create(new_session_id())
        assert await store.get(fresh.session_id) == fresh

    async def test_finding(self, store: SessionStore) -> None:
        """`find` gives what the filter matches, bounded by `limit`."""
        user = f"user-{new_session_id()}"
        records = [new(user_id=user, message_count=n) for n in range(4)]
        await store.set_batch({data.session_id: data for data in records})
        found = await store.find(SessionFilter(user_id=user, min_messages=2))
        assert sorted(data.message_count for data in found) == [2, 3]
        assert len(await store.find(SessionFilter(user_id=user), limit=3)) == 3
        assert await store.find(SessionFilter(user_id=user), limit=0) == []

    async def test_sessions_of_a_user(self, store: SessionStore) -> None:
        """A user's sessions are listed, also after the user changed, and all but one can be ended."""
        user, other = f"user-{new_session_id()}", f"user-{new_session_id()}"
        records = [new(user_id=user) for _ in range(3)]
        for data in records:
            await store.set(data.session_id, data)
        await store.update(records[0].session_id, {"user_id": other})
        listed = {data.session_id for data in await store.list_for_user(user)}
        assert listed == {data.session_id for data in records[1:]}
        assert [data.session_id for data in await store.list_for_user(other)] == [records[0].session_id]
        assert await store.delete_for_user(user, keep=records[1].session_id) == 1
        number = uuid4().int
        counted = new(user_id=str(number))
        await store.set(counted.session_id, counted)
        assert len(await store.list_for_user(number)) == await store.delete_for_user(number) == 1
        assert [data.session_id for data in await store.list_for_user(user)] == [records[1].session_id]

    async def test_figures_and_health(self, store: SessionStore) -> None:
        """Metrics count the active sessions; a health check leaves nothing behind."""
        before = await store.get_metrics()
        data = new(message_count=7, escalated=True)
        await store.set(data.session_id, data)
        after = await store.get_metrics()
        assert after.active_sessions == before.active_sessions + 1
        assert after.total_messages == before.total_messages + 7
        assert 0 < after.escalation_rate <= 1
        listed = await store.list_active()
        health = await store.health_check()
        assert health["healthy"] is True
        assert set(health["operations"].values()) == {True}
        assert "error" not in health
        assert await store.list_active() == listed
        assert await store.get_stats()
        assert await store.cleanup_expired() >= 0

    async def test_ids_obey_the_identifier_rule(self, store: SessionStore) -> None:
        """An id with forbidden characters never reaches the backend."""
        for bad in ("", "a b", "a;b", "x" * 256, "a\n"):
            with pytest.raises(ValueError, match="session id"):
                await store.set(bad, SessionData.model_construct(session_id=bad))

    # -- transactions -------------------------------------------------------------------------------------

    async def test_a_transaction_stores_or_rolls_back(self, store: SessionStore) -> None:
        """The block's changes are stored together; an exception leaves the record as it was."""
        data = new()
        await store.set(data.session_id, data)
        async with store.transaction(data.session_id) as record:
            assert record is not None
            record.metadata["a"] = 1
        with pytest.raises(RuntimeError):
            async with store.transaction(data.session_id) as record:
                assert record is not None
                record.metadata["a"] = 2
                raise RuntimeError
        after = await store.get(data.session_id)
        assert after is not None
        assert after.metadata == {"a": 1}

    async def test_a_writer_that_does_not_wait_wins_over_a_transaction(self, store: SessionStore) -> None:
        """`set` and `delete` during a transaction refuse its commit: nothing of it is stored."""
        data = new()
        await store.set(data.session_id, data)
        with pytest.raises(SessionConflictError):
            async with store.transaction(data.session_id) as record:
                assert record is not None
                record.metadata["a"] = 1
                await store.set(data.session_id, SessionData(session_id=data.session_id, escalated=True))
        with pytest.raises(SessionConflictError):
            async with store.transaction(data.session_id) as record:
                assert record is not None
                record.metadata["a"] = 1
                await store.delete(data.session_id)
        assert await store.get(data.session_id) is None

    # -- requests -----------------------------------------------------------------------------------------

    async def test_create_never_overwrites(self, store: SessionStore) -> None:
        """A second `create` of an id gets None, and the first record stays."""
        data = new(metadata={"first": True})
        created = await store.create(data.session_id, encode_checked(data), HOUR, None)
        assert isinstance(created, Checkout)
        assert created.token is None, "`create` without a lock took one"
        other = encode_checked(SessionData(session_id=data.session_id))
        assert await store.create(data.session_id, other, HOUR, None) is None
        held = await check_out(store, data.session_id)
        for lock in (None, LOCK):
            with anyio.fail_after(3):
                assert await store.create(data.session_id, other, HOUR, lock) is None
        assert await commit(store, held) is Outcome.STORED
        assert await store.get(data.session_id) == data, "`create` wrote over a record"

    async def test_create_can_lock(self, store: SessionStore) -> None:
        """Only the creator can commit to a record that was created under a lock."""
        data = new()
        created = await store.create(data.session_id, encode_checked(data), HOUR, LOCK)
        assert created is not None
        with pytest.raises(LockTimeoutError):
            await store.checkout(data.session_id, LockPolicy(wait=0.05), HOUR)
        assert await commit(store, created, n=1) is Outcome.STORED
        assert (await check_out(store, data.session_id)).token is not None

    async def test_commit_writes_what_was_checked_out(self, store: SessionStore) -> None:
        """A commit keeps or releases the lock, and the checkout has the new version."""
        data = new()
        await store.set(data.session_id, data)
        taken = await check_out(store, data.session_id)
        assert await commit(store, taken, release=False, a=1) is Outcome.STORED
        assert await commit(store, taken, release=True, b=2) is Outcome.STORED
        after = await store.get(data.session_id)
        assert after is not None
        assert after.metadata == {"a": 1, "b": 2}
        await store.release(await check_out(store, data.session_id))

    async def test_commit_never_creates(self, store: SessionStore) -> None:
        """A record that was deleted after the checkout stays deleted, and its lock is free."""
        data = new()
        await store.set(data.session_id, data)
        taken = await check_out(store, data.session_id)
        await store.delete(data.session_id)
        assert await commit(store, taken) is Outcome.GONE
        assert await store.get(data.session_id) is None
        await store.set(data.session_id, data)
        await store.release(await check_out(store, data.session_id))

    async def test_a_moved_version_is_a_conflict(self, store: SessionStore) -> None:
        """Without a lock too, a commit replaces only the version that was loaded."""
        data = new()
        await store.set(data.session_id, data)
        for lock in (LOCK, None):
            taken = await check_out(store, data.session_id, lock)
            newer = SessionData(session_id=data.session_id, metadata={"newer": lock is None})
            await store.set(data.session_id, newer)
            assert await commit(store, taken, stale=True) is Outcome.CONFLICT
            assert await store.get(data.session_id) == newer

    async def test_a_commit_without_the_lock_disturbs_no_holder(
        self, store: SessionStore, let_time_pass: _PassTime
    ) -> None:
        """It is stored while nobody holds the lock, and only over the version that was loaded."""
        data = new()
        await store.set(data.session_id, data)
        reader = await check_out(store, data.session_id, None)
        holder = await check_out(store, data.session_id)
        assert await commit_unlocked(store, reader, n=1) is Outcome.BUSY
        assert await commit(store, holder, n=2) is Outcome.STORED
        assert await commit_unlocked(store, reader, n=1) is Outcome.CONFLICT
        reader = await check_out(store, data.session_id, None)
        assert await commit_unlocked(store, reader, n=3) is Outcome.STORED
        assert await commit_unlocked(store, reader, n=4) is Outcome.STORED
        await store.release(await check_out(store, data.session_id))
        after = await store.get(data.session_id)
        assert after is not None
        assert after.metadata == {"n": 4}
        await check_out(store, data.session_id, LockPolicy(timeout=0.1, max_hold=0.1))
        await let_time_pass(0.3)
        assert await commit_unlocked(store, reader, n=5) is Outcome.STORED
        await store.delete(data.session_id)
        assert await commit_unlocked(store, reader, n=6) is Outcome.GONE
        assert await store.get(data.session_id) is None

    async def test_one_at_a_time_in_order_of_arrival(self, store: SessionStore) -> None:
        """Checkouts of one session wait for each other, and each sees the commit before it."""
        data = new(metadata={"order": []})
        await store.set(data.session_id, data)
        first = await check_out(store, data.session_id)
        order: list[int] = []

        async def append(n: int) -> None:
            taken = await check_out(store, data.session_id)
            order.append(n)
            seen = decode(SessionData, taken.record).metadata["order"]
            assert await commit(store, taken, order=[*seen, n]) is Outcome.STORED

        async with anyio.create_task_group() as tasks:
            for n in range(6):
                tasks.start_soon(append, n)
                await anyio.sleep(0.01)
            await store.release(first)
        after = await store.get(data.session_id)
        assert after is not None
        assert after.metadata["order"] == order == list(range(6))

    async def test_waiting_has_bounds(self, store: SessionStore) -> None:
        """After `wait` seconds, or behind `max_waiters` others, a checkout is refused and leaves nothing."""
        data = new()
        await store.set(data.session_id, data)
        taken = await check_out(store, data.session_id)
        with pytest.raises(TooManyWaitersError) as full:
            await store.checkout(data.session_id, LockPolicy(max_waiters=0), HOUR)
        assert full.value.limit == 0
        with pytest.raises(LockTimeoutError) as late:
            await store.checkout(data.session_id, LockPolicy(wait=0.05), HOUR)
        assert late.value.waited >= 0.04
        await store.release(taken)
        await store.release(await check_out(store, data.session_id, LockPolicy(wait=0.5)))

    async def test_a_cancelled_checkout_leaves_nothing(self, store: SessionStore) -> None:
        """Waiters behind one that was cancelled get the lock, and it is free at the end."""
        data = new()
        await store.set(data.session_id, data)
        taken = await check_out(store, data.session_id)
        served: list[bool] = []

        async def wait() -> None:
            await store.release(await check_out(store, data.session_id))
            served.append(True)

        async with anyio.create_task_group() as tasks:
            with anyio.move_on_after(0.05):
                await store.checkout(data.session_id, LOCK, HOUR)
            tasks.start_soon(wait)
            await anyio.sleep(0.02)
            await store.release(taken)
        assert served == [True]
        await store.release(await check_out(store, data.session_id, LockPolicy(wait=0.5)))

    async def test_release_is_idempotent(self, store: SessionStore) -> None:
        """A second release, or one after a commit with `release`, does not release another holder's lock."""
        data = new()
        await store.set(data.session_id, data)
        taken = await check_out(store, data.session_id)
        await store.release(taken)
        other = await check_out(store, data.session_id)
        await store.release(taken)
        with pytest.raises(LockTimeoutError):
            await store.checkout(data.session_id, LockPolicy(wait=0.05), HOUR)
        assert await store.renew([other, taken]) == [True, False]
        await store.release(other)

    async def test_a_lost_lease_commits_nothing(self, store: SessionStore, let_time_pass: _PassTime) -> None:
        """Past `max_hold` the lock goes to the next, and the late holder's commit is refused."""
        data = new()
        await store.set(data.session_id, data)
        short = LockPolicy(timeout=0.1, max_hold=0.1)
        late = await check_out(store, data.session_id, short)
        await let_time_pass(0.3)
        taken = await check_out(store, data.session_id)
        assert await commit(store, late, late=True) is Outcome.LOST
        assert await store.renew([late]) == [False]
        assert await commit(store, taken, n=1) is Outcome.STORED
        after = await store.get(data.session_id)
        assert after is not None
        assert after.metadata == {"n": 1}

    async def test_discard(self, store: SessionStore) -> None:
        """A discarded record is absent, and its waiters learn that at once."""
        data = new()
        await store.set(data.session_id, data)
        taken = await check_out(store, data.session_id)
        answers: list[object] = []

        async def ask() -> None:
            answers.append(await store.checkout(data.session_id, LOCK, HOUR))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(ask)
            tasks.start_soon(ask)
            await anyio.sleep(0.05)
            assert await store.discard(taken) is Outcome.STORED
        assert answers == [Missing.ABSENT, Missing.ABSENT]
        assert await store.exists(data.session_id) is False

    async def test_move(self, store: SessionStore) -> None:
        """The record is under the new id only, and the old id is known as replaced at once."""
        user = f"user-{new_session_id()}"
        data = new(user_id=user, metadata={"n": 1})
        await create(store, data)
        taken = await check_out(store, data.session_id)
        answers: list[object] = []

        async def ask() -> None:
            answers.append(await store.checkout(data.session_id, LOCK, HOUR))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(ask)
            await anyio.sleep(0.05)
            await move(store, taken, user)
        moved = taken.successor
        assert moved is not None
        assert answers == [Missing.RETIRED], "who waited for the old id is told at once that it was replaced"
        assert await store.checkout(data.session_id, None, HOUR) is Missing.RETIRED
        assert [each.session_id for each in await store.list_for_user(user)] == [moved.session_id]
        assert (await store.get(moved.session_id)) == decode(SessionData, moved.record)
        assert await commit(store, moved, n=2) is Outcome.STORED
        assert await store.delete_for_user(user) == 1

    async def test_a_move_keeps_the_life_or_begins_it_anew(
        self, store: SessionStore, let_time_pass: _PassTime
    ) -> None:
        """Without a lifetime the bounds stay; with one they are new. The new id can be locked."""
        data = new()
        await create(store, data, IDLE)
        await let_time_pass(0.3)
        taken = await check_out(store, data.session_id)
        assert await try_to_move(store, taken, None, None, lock=LOCK) is Outcome.STORED
        kept = taken.successor
        assert kept is not None
        assert kept.token is not None, "the new record is not locked for the caller"
        assert kept.idle == pytest.approx(IDLE.idle)
        assert kept.age is None or kept.age > 0.2, "without a lifetime the life goes on"
        assert kept.expires_in is not None
        assert kept.expires_in < 3599.8, "a new id prolonged the life"
        with pytest.raises(LockTimeoutError):
            await store.checkout(kept.session_id, LockPolicy(wait=0.05), HOUR)
        assert await try_to_move(store, kept, None, None, Lifetime(absolute=60, idle=30)) is Outcome.STORED
        fresh = kept.successor
        assert fresh is not None
        assert fresh.token is None
        assert fresh.expires_in == pytest.approx(60, abs=0.2)
        assert fresh.idle == pytest.approx(30)
        assert fresh.age == pytest.approx(0, abs=0.2), "a new life begins with the move"

    async def test_a_move_of_what_is_gone_leaves_nothing(self, store: SessionStore) -> None:
        """A session that has ended, or that others have changed, gets no new id."""
        for change, expected in (("delete", Outcome.GONE), ("set", Outcome.CONFLICT)):
            data = new()
            await store.set(data.session_id, data)
            taken = await check_out(store, data.session_id)
            if change == "delete":
                await store.delete(data.session_id)
            else:
                await store.set(data.session_id, SessionData(session_id=data.session_id, escalated=True))
            new_id = new_session_id()
            record = encode_checked(SessionData(session_id=new_id))
            outcome = await store.move(taken, new_id, record, lifetime=None, lock=None, was=None, user=None)
            assert outcome is expected
            assert taken.successor is None
            assert await store.exists(new_id) is False
            assert await store.exists(data.session_id) is (change == "set")

    # -- at once: every primitive lets other tasks run before and after it --------------------------------

    async def test_no_acknowledged_change_is_lost(self, store: SessionStore) -> None:
        """What was acknowledged is in the record: with and without the lock, beside all other writers."""
        for seed in range(_ROUNDS):
            pause = interleave(store, seed)
            data = new(metadata={"n": 0})
            await create(store, data, IDLE)
            stored: list[int] = []
            async with anyio.create_task_group() as tasks:
                for lock in (LOCK, LOCK, None, None):
                    tasks.start_soon(count, store, data.session_id, lock, stored, pause)
                tasks.start_soon(update, store, data.session_id, seed)
                tasks.start_soon(look, store, data.session_id)
            after = await store.get(data.session_id)
            assert after is not None, "a session that nobody ended is gone"
            expected = {"n": len(stored), "updated": seed}
            assert after.metadata == expected, f"a change that was acknowledged is lost: {_HOLD}"
            assert sorted(stored) == list(range(1, len(stored) + 1)), f"two changes of one version: {_HOLD}"

    async def test_what_has_ended_does_not_come_back(self, store: SessionStore) -> None:
        """A session that is written, extended or moved while it is deleted is gone."""
        for seed in range(2 * _ROUNDS):
            pause = interleave(store, seed)
            data = new(metadata={"n": 0})
            before = set(await store.list_active())
            await create(store, data, IDLE)
            ended: list[bool] = []
            rivals = [
                partial(count, store, data.session_id, LOCK, [], pause),
                partial(count, store, data.session_id, None, [], pause),
                partial(look, store, data.session_id),
                partial(set_if_there, store, data),
                partial(update, store, data.session_id, seed),
                partial(look, store, data.session_id),
            ]
            async with anyio.create_task_group() as tasks:
                for rival in rivals[seed % 6 :][:1] if seed < 30 else rivals:  # each alone, then all
                    tasks.start_soon(rival)
                tasks.start_soon(end, store, data.session_id, ended, pause, seed * 7 % 20)
            assert ended == [True]
            assert await store.get(data.session_id) is None, f"a session that was ended came back: {_HOLD}"
            assert set(await store.list_active()) == before

    async def test_a_move_leaves_no_acknowledged_change_behind(self, store: SessionStore) -> None:
        """A move takes along what was stored under the old id, or is refused."""
        for seed in range(_ROUNDS):
            pause = interleave(store, seed)
            data = new(metadata={"n": 0})
            await create(store, data, IDLE)
            taken = await check_out(store, data.session_id, None)
            stored: list[int] = []
            outcomes: list[Outcome] = []

            async def give_new_id(taken: Checkout, outcomes: list[Outcome]) -> None:
                outcomes.append(await try_to_move(store, taken, None, None))

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(give_new_id, taken, outcomes)
                for lock in (LOCK, None):
                    tasks.start_soon(count, store, data.session_id, lock, stored, pause)
            moved = outcomes == [Outcome.STORED]
            session_id = taken.successor.session_id if moved and taken.successor else data.session_id
            after = await store.get(session_id)
            assert after is not None, f"the session is under neither id: {_HOLD}"
            assert after.metadata == {"n": len(stored)}, f"a change that was acknowledged is lost: {_HOLD}"
            assert await store.exists(data.session_id) is not moved, f"the session lives twice: {_HOLD}"

    async def test_a_move_does_not_bring_back_what_has_ended(self, store: SessionStore) -> None:
        """A session that is deleted while it gets new ids is gone under each of them."""
        for seed in range(_ROUNDS):
            pause = interleave(store, seed)
            data = new()
            before = set(await store.list_active())
            await create(store, data, IDLE)
            taken, ended = await check_out(store, data.session_id), [False]
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(end, store, data.session_id, ended, pause, seed % 6)
                tasks.start_soon(try_to_move, store, taken, None, None)
            left = set(await store.list_active()) - before
            successor = taken.successor.session_id if taken.successor else None
            expected = set() if ended[-1] else {successor}
            assert left == expected, f"a session was ended and got a new id: {_HOLD}"
            await store.delete_batch(left)

    async def test_a_sign_out_ends_what_moves_meanwhile(self, store: SessionStore) -> None:
        """A sign-out ends all sessions of a user, also those that get new ids meanwhile."""
        for seed in range(_ROUNDS):
            pause = interleave(store, seed)
            user = f"user-{new_session_id()}"
            sessions = [new(user_id=user) for _ in range(4)]
            for data in sessions:
                await create(store, data)
            async with anyio.create_task_group() as tasks:
                for data in sessions:
                    tasks.start_soon(keep_moving, store, data.session_id, user, 50)
                for _ in range(3):
                    await pause()
                await store.delete_for_user(user)
            found = await store.list_for_user(user)
            assert found == [], f"a session that got a new id survived the sign-out: {_SIGN_OUT}"
            assert await store.find(SessionFilter(user_id=user)) == []

    async def test_set_is_not_undone_by_who_loaded_before(self, store: SessionStore) -> None:
        """`set` does not wait; the commit of an earlier checkout is refused."""
        for seed in range(_ROUNDS):
            pause = interleave(store, seed)
            data = new(metadata={"n": 0})
            await create(store, data, IDLE)
            newer = SessionData(session_id=data.session_id, metadata={"n": 0, "set": True})
            async with anyio.create_task_group() as tasks:
                for lock in (LOCK, None) if seed % 2 else (None,):
                    tasks.start_soon(count, store, data.session_id, lock, [], pause)
                tasks.start_soon(look, store, data.session_id)
                tasks.start_soon(set_anew, store, newer, pause, seed * 7 % 20)
            after = await store.get(data.session_id)
            assert after is not None, "a session that nobody ended is gone"
            assert after.metadata.get("set") is True, f"an older record over a newer one: {_HOLD}"

    # -- time -----------------------------------------------------------------------------------------------

    async def test_an_idle_timeout_restarts_with_each_request(
        self, store: SessionStore, let_time_pass: _PassTime
    ) -> None:
        """Requests keep a session alive up to its absolute bound; `get` does not."""
        data = new()
        rule = Lifetime(absolute=1.0, idle=0.4)
        await create(store, data, rule)
        for _ in range(3):
            await let_time_pass(0.25)
            taken = await check_out(store, data.session_id)
            assert taken.expires_in is not None
            assert taken.expires_in < 0.8, "the absolute bound moved"
            assert taken.idle == pytest.approx(0.4)
            await store.keep_alive(taken)
            await store.release(taken)
        await let_time_pass(0.3)
        assert await store.checkout(data.session_id, LOCK, rule) is Missing.ABSENT
        idle, over = new(), new()
        for each in (idle, over):
            await create(store, each, Lifetime(idle=0.3))
        await let_time_pass(0.15)
        await store.get(idle.session_id)
        await store.release(await check_out(store, idle.session_id))  # by a client that was refused
        late = await check_out(store, over.session_id, None)
        await let_time_pass(0.2)
        assert await store.get(idle.session_id) is None, "a checkout restarted the idle timeout"
        await store.keep_alive(late)
        assert await store.get(over.session_id) is None, "keep_alive brought an ended session back"

    async def test_waiting_for_the_lock_counts_as_activity(
        self, store: SessionStore, let_time_pass: _PassTime
    ) -> None:
        """A waiting request counts as activity unless it is passive; a session that ended stays so."""
        data, over = new(), new()
        rule, brief = Lifetime(absolute=3600, idle=0.5), LockPolicy(wait=0.01)
        for each in (data, over):
            await create(store, each, rule)
            await check_out(store, each.session_id)
        for passive, seconds in ((False, 0.35), (True, 0.35)):
            await let_time_pass(seconds)
            with pytest.raises(LockTimeoutError):
                await store.checkout(data.session_id, brief, rule, passive=passive)
        assert await store.exists(data.session_id), "a request that has to wait counts as activity"
        await let_time_pass(0.25)
        assert not await store.exists(data.session_id), "a passive request restarted the idle timeout"
        with suppress(LockTimeoutError):
            await store.checkout(over.session_id, brief, rule)
        assert not await store.exists(over.session_id), "a request that waits brought an ended session back"

    async def test_a_shorter_rule_binds_what_is_there(
        self, store: SessionStore, let_time_pass: _PassTime
    ) -> None:
        """A shorter `max_age` or `idle_timeout` binds older sessions too."""
        absolute, idle = new(), new()
        for data in (absolute, idle):
            await create(store, data)
        await let_time_pass(0.2)
        taken = await store.checkout(absolute.session_id, LOCK, Lifetime(absolute=0.4))
        assert isinstance(taken, Checkout)
        assert taken.expires_in == pytest.approx(0.2, abs=0.15)
        assert await commit(store, taken, n=1) is Outcome.STORED
        taken = await store.checkout(idle.session_id, LOCK, Lifetime(absolute=3600, idle=0.2))
        assert isinstance(taken, Checkout)
        assert taken.idle == pytest.approx(0.2)
        await store.release(taken)
        await let_time_pass(0.3)
        assert await store.exists(absolute.session_id) is False, "a shorter absolute bound was not kept"
        assert await store.exists(idle.session_id) is False, "a shorter idle timeout was not kept"
        old = new()
        await create(store, old)
        await let_time_pass(0.3)
        assert await store.checkout(old.session_id, LOCK, Lifetime(absolute=0.2)) is Missing.ABSENT

    async def test_the_longest_idle_sessions_are_ended_first(
        self, store: SessionStore, let_time_pass: _PassTime
    ) -> None:
        """Of one user, never the one that is kept, and as few as there are too many."""
        user, rule = f"user-{uuid4()}", Lifetime(absolute=3600, idle=1800)
        mine = [new(user_id=user) for _ in range(4)]
        others = new(user_id=f"user-{uuid4()}")
        for data in (*mine, others):
            await create(store, data, rule)
            await let_time_pass(0.05)
        taken = await check_out(store, mine[0].session_id)
        await store.keep_alive(taken)
        assert await commit(store, taken, n=1) is Outcome.STORED  # and so it is not the longest idle one
        kept = mine[3].session_id
        assert await store.end_surplus(user, 4, kept) == []
        assert await store.end_surplus(user, 2, kept) == [mine[1].session_id, mine[2].session_id]
        left = {data.session_id for data in await store.list_for_user(user)}
        assert left == {mine[0].session_id, kept}
        assert await store.end_surplus(user, 1, mine[0].session_id) == [kept]
        assert await store.exists(others.session_id)

    async def test_sign_ins_at_once_end_no_more_than_are_too_many(self, store: SessionStore) -> None:
        """Each of them is there afterwards where there is room for all, and the bound holds."""
        for seed in range(_ROUNDS):
            pause = interleave(store, seed)
            user = f"user-{uuid4()}"
            for _ in range(3):
                await create(store, new(user_id=user))
            fresh = [new(user_id=user) for _ in range(3)]
            ended: list[str] = []

            async def sign_in(data: SessionData, pause: Pause, user: str, ended: list[str]) -> None:
                await create(store, data)
                await pause()
                ended += await store.end_surplus(user, 4, data.session_id)

            async with anyio.create_task_group() as tasks:
                for data in fresh:
                    tasks.start_soon(sign_in, data, pause, user, ended)
            left = {data.session_id for data in await store.list_for_user(user)}
            assert len(left) == 4, f"{len(left)} sessions are left of 4"
            assert {data.session_id for data in fresh} <= left, "a session that has just signed in was ended"
            assert len(ended) == len(set(ended)) == 2

    async def test_an_id_that_was_only_old_leads_to_the_new_one(self, store: SessionStore) -> None:
        """Where a move says so, and to nothing else; a record that has ended does not come back by it."""
        data, other = new(user_id=f"user-{uuid4()}"), new()
        await create(store, data)
        await create(store, other)
        for each, leads in ((data, True), (other, False)):
            taken, new_id = await check_out(store, each.session_id), new_session_id()
            record = encode_checked(each.model_copy(update={"session_id": new_id}))
            outcome = await store.move(
                taken, new_id, record,
                lifetime=None, lock=None, was=each.user_id, user=each.user_id, leads=leads,
            )  # fmt: skip
            assert outcome is Outcome.STORED
            assert await store.checkout(each.session_id, LOCK, HOUR) is Missing.RETIRED
            assert await store.successor_of(each.session_id) == (new_id if leads else None)
            assert await store.successor_of(new_id) is None
            assert await store.delete(new_id)
            assert await store.exists(each.session_id) is False
        assert await store.successor_of(new_session_id()) is None

    async def test_a_first_visit_is_kept_for_a_while(
        self, store: SessionStore, let_time_pass: _PassTime
    ) -> None:
        """A record of `Lifetime.first` ends with that, unless its client comes back; no write prolongs it."""
        gone, kept, idle, late = new(), new(), new(), new()
        for data in (gone, kept, idle, late):
            absolute, seconds = 3600, 1800 if data is idle else None
            await create(store, data, Lifetime(absolute, seconds, first=0.4))
        for data in (kept, idle):
            taken = await store.checkout(data.session_id, LOCK, None)
            assert isinstance(taken, Checkout)
            assert taken.expires_in == pytest.approx(3600, abs=0.2), "a checkout tells of the full life"
            await store.arrived(taken)
            assert await commit(store, taken, n=1) is Outcome.STORED, "arrived changed the version"
        taken, waits = await check_out(store, gone.session_id), await check_out(store, late.session_id, None)
        assert await commit(store, taken, n=1) is Outcome.STORED
        await let_time_pass(0.6)
        assert await store.exists(gone.session_id) is False, "nobody came back, and the record lives on"
        await store.arrived(waits)
        assert await store.exists(late.session_id) is False, "arrived brought an ended session back"
        for data in (kept, idle):
            assert await store.exists(data.session_id), "the record has its full life once its client came"
        again = await store.checkout(idle.session_id, None, None)
        assert isinstance(again, Checkout)
        assert again.idle == pytest.approx(1800)

    async def test_bounds_can_be_set_longer_and_shorter(
        self, store: SessionStore, let_time_pass: _PassTime
    ) -> None:
        """`bound` sets the end from now on; lock, record, idle timeout and the begin of its life stay."""
        data = new(metadata={"n": 0})
        await create(store, data, Lifetime(absolute=0.5, idle=1800))
        await let_time_pass(0.3)
        taken = await store.checkout(data.session_id, LOCK, None)
        assert isinstance(taken, Checkout)
        version = taken.version
        assert await store.bound(taken, Lifetime(absolute=7200, idle=1800)) is Outcome.STORED
        assert taken.token is not None, "bound let the lock go"
        assert taken.version != version, "who loaded the record before has to find another version"
        assert taken.expires_in == pytest.approx(7200, abs=0.2)
        assert taken.age is None or taken.age > 0.2, "the life began anew"
        assert await commit(store, taken, n=1) is Outcome.STORED
        await let_time_pass(0.4)
        again = await store.checkout(data.session_id, LOCK, None)
        assert isinstance(again, Checkout), "the record ended by its old bounds"
        assert decode(SessionData, again.record).metadata == {"n": 1}
        assert again.expires_in == pytest.approx(7199.6, abs=0.3)
        assert again.idle == pytest.approx(1800)
        assert await store.bound(again, Lifetime(absolute=0.3, idle=1800)) is Outcome.STORED
        assert await commit(store, again, n=2) is Outcome.STORED
        await let_time_pass(0.5)
        assert await store.checkout(data.session_id, LOCK, None) is Missing.ABSENT
        endless = new()
        await create(store, endless, IDLE)
        taken = await check_out(store, endless.session_id)
        assert await store.bound(taken, Lifetime(idle=1800)) is Outcome.STORED
        assert taken.expires_in is None
        await store.release(taken)

    async def test_bounds_are_refused_like_a_commit(self, store: SessionStore) -> None:
        """Where the record has ended, was changed, or is another's by now, nothing is written."""
        for change, expected in (("delete", Outcome.GONE), ("set", Outcome.CONFLICT)):
            data = new()
            await create(store, data)
            taken = await check_out(store, data.session_id)
            await (store.delete(data.session_id) if change == "delete" else store.set(data.session_id, data))
            assert await store.bound(taken, Lifetime(absolute=60)) is expected
            await store.release(taken)
            assert await store.exists(data.session_id) is (change == "set")
            if change == "set":
                left = (await check_out(store, data.session_id, None)).expires_in
                assert left is not None
                assert left > 3000, "a refused call set the bounds"

    async def test_a_late_commit_harms_nobody(self, store: SessionStore, let_time_pass: _PassTime) -> None:
        """A lease that ran out does no harm where nobody took the lock and the version is the same."""
        data = new()
        await store.set(data.session_id, data)
        late = await check_out(store, data.session_id, LockPolicy(timeout=0.1, max_hold=0.1))
        await let_time_pass(0.3)
        assert await commit(store, late, n=1) is Outcome.STORED
        after = await store.get(data.session_id)
        assert after is not None
        assert after.metadata == {"n": 1}


async def _delete_value(store: SessionStore, session_id: str) -> None:
    try:
        await store.delete_value(session_id)
    except Exception as error:
        raise AssertionError(f"delete_value does nothing where nothing is, and raised {error!r}") from error


async def _listed(store: SessionStore) -> AsyncGenerator[str, None]:
    ids = store.iter_ids()
    assert isinstance(ids, AsyncGenerator), "iter_ids is an async function with `yield`"
    async with aclosing(ids):
        while True:
            try:
                name = await anext(ids)
            except StopAsyncIteration:
                return
            except Exception as error:
                raise AssertionError(f"iter_ids bears changes while it runs, and raised {error!r}") from error
            yield name


def _has_primitives(store: SessionStore) -> bool:
    """Stores with request operations of their own need none."""
    return type(store).write_value is not SessionStore.write_value
