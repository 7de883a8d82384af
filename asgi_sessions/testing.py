"""For the tests of your own store: inherit `StoreContract`, override its fixture `store`, run pytest.

    class TestMyStore(StoreContract):
        @pytest.fixture
        async def store(self):
            store = MyStore()
            yield store
            await store.aclose()

Each test uses ids of its own, so a shared backend does no harm.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any, TypeAlias
from uuid import uuid4

import anyio
import anyio.lowlevel
import pytest

from .data import SessionData, SessionFilter
from .errors import (
    LockTimeoutError,
    SessionConflictError,
    SessionDataError,
    SessionError,
    TooManyWaitersError,
)
from .fields import new_session_id
from .record import decode, encode_checked
from .stores.base import SessionStore
from .stores.checkout import Checkout, Lifetime, Missing, Outcome
from .stores.local import LockPolicy

_HOUR = Lifetime(absolute=3600)
_LOCK = LockPolicy(timeout=5, wait=5)


def _new(**fields: Any) -> SessionData:
    return SessionData(session_id=new_session_id(), **fields)


async def _checked_out(store: SessionStore, session_id: str, lock: LockPolicy | None = _LOCK) -> Checkout:
    taken = await store.checkout(session_id, lock, _HOUR)
    assert isinstance(taken, Checkout)
    return taken


async def _commit(store: SessionStore, taken: Checkout, release: bool = True, **metadata: Any) -> Outcome:
    data = decode(SessionData, taken.record)
    data.metadata.update(metadata)
    return await store.commit(taken, encode_checked(data), release=release)


async def _move(store: SessionStore, taken: Checkout, was: str | None, user: str | None) -> Checkout:
    data = decode(SessionData, taken.record).model_copy(update={"session_id": new_session_id()})
    data.user_id = user
    record = encode_checked(data)
    outcome = await store.move(taken, data.session_id, record, lifetime=None, lock=None, was=was, user=user)
    assert outcome is Outcome.STORED
    assert taken.successor is not None
    return taken.successor


_ROUNDS = 12  # of tasks at once, each round in another order
_IDLE = Lifetime(absolute=3600, idle=1800)

_Pause: TypeAlias = Callable[[], Awaitable[None]]


def _interleave(store: SessionStore, seed: int) -> _Pause:
    """Let other tasks run before and after each primitive of this store, in an order of this seed's own."""
    chance = random.Random(seed)  # noqa: S311  # nothing secret

    async def pause() -> None:
        for _ in range(chance.randrange(4)):
            await anyio.lowlevel.checkpoint()

    for name in ("read_value", "write_value", "delete_value"):
        primitive = getattr(type(store), name)
        if primitive is not getattr(SessionStore, name):
            setattr(store, name, _pausing(primitive.__get__(store), pause))
    return pause


def _pausing(primitive: Callable[..., Awaitable[Any]], pause: _Pause) -> Callable[..., Awaitable[Any]]:
    async def paused(*args: Any) -> Any:
        await pause()
        result = await primitive(*args)
        await pause()
        return result

    return paused


async def _count(
    store: SessionStore, session_id: str, lock: LockPolicy | None, stored: list[int], pause: _Pause
) -> None:
    """Count a few times, as requests do; note the numbers that were acknowledged."""
    for _ in range(3):
        taken = await store.checkout(session_id, lock, _IDLE)
        if not isinstance(taken, Checkout):
            return
        await pause()
        number = decode(SessionData, taken.record).metadata["n"] + 1
        if await _commit(store, taken, n=number) is Outcome.STORED:
            stored.append(number)


async def _look(store: SessionStore, session_id: str) -> None:
    """Requests that change nothing; each restarts the idle timeout."""
    for _ in range(3):
        taken = await store.checkout(session_id, None, _IDLE)
        if isinstance(taken, Checkout):
            await store.keep_alive(taken)


async def _update(store: SessionStore, session_id: str, seed: int) -> None:
    """An update until it is stored, then a touch; writers that do not wait may come first."""
    for _ in range(20):
        with suppress(SessionConflictError):
            if not await store.update(session_id, {"updated": seed}) or await store.touch(session_id):
                return


async def _set_if_there(store: SessionStore, data: SessionData) -> None:
    for _ in range(3):
        await store.set(data.session_id, data, create=False)


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
    def let_time_pass(self) -> Callable[[float], Awaitable[None]]:
        """Let seconds of the store's clock pass; override it where the clock can be moved."""
        return anyio.sleep

    # -- records ----------------------------------------------------------------------------------------

    async def test_a_record_comes_back_equal(self, store: SessionStore) -> None:
        """What was set is what `get` gives."""
        data = _new(user_id="ada", metadata={"cart": [1, {"two": None}], "ünï": "☃"}, message_count=3)
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
        data = _new(metadata={"list": [1]})
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
        data = _new(metadata={"a": 1})
        await store.set(data.session_id, data)
        with pytest.raises(ValueError, match="another session"):
            await store.set(data.session_id, _new())
        for ttl in (0, -1):
            with pytest.raises(ValueError, match="ttl"):
                await store.set(data.session_id, data, ttl)
        broken = data.model_copy(deep=True)
        broken.metadata["bad"] = {1, 2}
        with pytest.raises(SessionDataError) as caught:
            await store.set(data.session_id, broken)
        assert caught.value.path == "metadata.bad"
        assert await store.get(data.session_id) == data

    async def test_a_record_expires(
        self, store: SessionStore, let_time_pass: Callable[[float], Awaitable[None]]
    ) -> None:
        """After its ttl a record is absent; `set` without ttl and other writes do not prolong it."""
        data = _new()
        await store.set(data.session_id, data, 0.4)
        await let_time_pass(0.2)
        await store.set(data.session_id, data)
        await store.update(data.session_id, {"a": 1})
        await store.increment_counter(data.session_id, "message_count")
        await store.touch(data.session_id)
        taken = await _checked_out(store, data.session_id)
        await _commit(store, taken, changed=True)
        assert await store.exists(data.session_id)
        await let_time_pass(0.3)
        assert await store.get(data.session_id) is None
        assert data.session_id not in await store.list_active()
        assert await store.checkout(data.session_id, _LOCK, _HOUR) is Missing.ABSENT

    async def test_a_new_ttl_counts_from_now(
        self, store: SessionStore, let_time_pass: Callable[[float], Awaitable[None]]
    ) -> None:
        """`set` with ttl on an existing record replaces its remaining time."""
        data = _new()
        await store.set(data.session_id, data, 0.2)
        await store.set(data.session_id, data, 60)
        await let_time_pass(0.3)
        assert await store.exists(data.session_id)

    async def test_listing(self, store: SessionStore) -> None:
        """Ids come sorted, in pages; `limit=0` gives none; the count agrees."""
        before = set(await store.list_active())
        records = {data.session_id: data for data in (_new() for _ in range(5))}
        assert await store.set_batch(records) == dict.fromkeys(records, True)
        listed = await store.list_active()
        assert listed == sorted(before | set(records))
        assert await store.count_active() == len(listed)
        assert await store.list_active(limit=0) == []
        assert await store.list_active(limit=2, offset=1) == listed[1:3]
        assert await store.list_active(offset=len(listed)) == []

    async def test_batches(self, store: SessionStore) -> None:
        """Batches do what the single calls do; an unstorable record stops the batch before it writes."""
        records = {data.session_id: data for data in (_new(metadata={"n": n}) for n in range(3))}
        await store.set_batch(records, 60)
        absent = new_session_id()
        assert await store.get_batch([*records, absent]) == {**records, absent: None}
        gone = await store.delete_batch([*records, absent])
        assert gone == {**dict.fromkeys(records, True), absent: False}
        good, bad = _new(), _new()
        bad.metadata["x"] = object()
        with pytest.raises(SessionDataError):
            await store.set_batch({good.session_id: good, bad.session_id: bad})
        assert not await store.exists(good.session_id)

    async def test_update(self, store: SessionStore) -> None:
        """Field names set fields, all others the metadata, also where a method has that name."""
        data = _new(metadata={"kept": 1})
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
        data = _new(metadata={"kept": 1})
        await store.set(data.session_id, data)
        for wrong in ({"n": 1, "message_count": -1}, {"n": 1, "session_id": "x" * 32}, {"n": object()}):
            with pytest.raises((ValueError, SessionError)):
                await store.update(data.session_id, wrong)
        assert await store.get(data.session_id) == data

    async def test_counters_lose_nothing(self, store: SessionStore) -> None:
        """Increments at once, in a field and in the metadata, all count and all return another number."""
        data = _new(metadata={"name": "x", "flag": True})
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
        data = _new()
        data.last_activity -= timedelta(hours=1)
        await store.set(data.session_id, data)
        assert await store.touch(data.session_id) is True
        after = await store.get(data.session_id)
        assert after is not None
        assert after.last_activity > data.last_activity

    async def test_get_or_create_gives_everybody_one_record(self, store: SessionStore) -> None:
        """Callers at once get the same record; the factory of those who came late counts for nothing."""
        session_id = new_session_id()
        got: list[SessionData] = []

        async def ask(n: int) -> None:
            def factory(session_id: str) -> SessionData:
                return SessionData(session_id=session_id, metadata={"by": n})

            got.append(await store.get_or_create(session_id, factory, ttl=60))

        async with anyio.create_task_group() as tasks:
            for n in range(8):
                tasks.start_soon(ask, n)
        assert len({data.metadata["by"] for data in got}) == 1
        assert (await store.get_or_create(session_id)).metadata == got[0].metadata
        fresh = await store.get_or_create(new_session_id())
        assert await store.get(fresh.session_id) == fresh

    async def test_finding(self, store: SessionStore) -> None:
        """`find` gives what the filter matches, bounded by `limit`."""
        user = f"user-{new_session_id()}"
        records = [_new(user_id=user, message_count=n) for n in range(4)]
        await store.set_batch({data.session_id: data for data in records})
        found = await store.find(SessionFilter(user_id=user, min_messages=2))
        assert sorted(data.message_count for data in found) == [2, 3]
        assert len(await store.find(SessionFilter(user_id=user), limit=3)) == 3
        assert await store.find(SessionFilter(user_id=user), limit=0) == []

    async def test_sessions_of_a_user(self, store: SessionStore) -> None:
        """A user's sessions are listed, also after the user changed, and all but one can be ended."""
        user, other = f"user-{new_session_id()}", f"user-{new_session_id()}"
        records = [_new(user_id=user) for _ in range(3)]
        for data in records:
            await store.set(data.session_id, data)
        await store.update(records[0].session_id, {"user_id": other})
        listed = {data.session_id for data in await store.list_for_user(user)}
        assert listed == {data.session_id for data in records[1:]}
        assert [data.session_id for data in await store.list_for_user(other)] == [records[0].session_id]
        assert await store.delete_for_user(user, keep=records[1].session_id) == 1
        number = uuid4().int
        counted = _new(user_id=str(number))
        await store.set(counted.session_id, counted)
        assert len(await store.list_for_user(number)) == await store.delete_for_user(number) == 1
        assert [data.session_id for data in await store.list_for_user(user)] == [records[1].session_id]

    async def test_figures_and_health(self, store: SessionStore) -> None:
        """Metrics count the active sessions; a health check leaves nothing behind."""
        before = await store.get_metrics()
        data = _new(message_count=7, escalated=True)
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
        data = _new()
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
        data = _new()
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
        """The second `create` of an id gets None and the record stays the first one's."""
        data = _new(metadata={"first": True})
        created = await store.create(data.session_id, encode_checked(data), _HOUR, None)
        assert isinstance(created, Checkout)
        assert created.token is None
        other = SessionData(session_id=data.session_id)
        assert await store.create(data.session_id, encode_checked(other), _HOUR, None) is None
        assert await store.get(data.session_id) == data

    async def test_create_can_lock(self, store: SessionStore) -> None:
        """A created and locked record can be committed to by its creator alone."""
        data = _new()
        created = await store.create(data.session_id, encode_checked(data), _HOUR, _LOCK)
        assert created is not None
        with pytest.raises(LockTimeoutError):
            await store.checkout(data.session_id, LockPolicy(wait=0.05), _HOUR)
        assert await _commit(store, created, n=1) is Outcome.STORED
        assert (await _checked_out(store, data.session_id)).token is not None

    async def test_commit_writes_what_was_checked_out(self, store: SessionStore) -> None:
        """A commit keeps the lock or lets it go, and the checkout follows the version."""
        data = _new()
        await store.set(data.session_id, data)
        taken = await _checked_out(store, data.session_id)
        assert await _commit(store, taken, release=False, a=1) is Outcome.STORED
        assert await _commit(store, taken, release=True, b=2) is Outcome.STORED
        after = await store.get(data.session_id)
        assert after is not None
        assert after.metadata == {"a": 1, "b": 2}
        await store.release(await _checked_out(store, data.session_id))

    async def test_commit_never_creates(self, store: SessionStore) -> None:
        """A record that was deleted after the checkout stays deleted, and its lock is free."""
        data = _new()
        await store.set(data.session_id, data)
        taken = await _checked_out(store, data.session_id)
        await store.delete(data.session_id)
        assert await _commit(store, taken) is Outcome.GONE
        assert await store.get(data.session_id) is None
        await store.set(data.session_id, data)
        await store.release(await _checked_out(store, data.session_id))

    async def test_a_moved_version_is_a_conflict(self, store: SessionStore) -> None:
        """Without a lock too, only the version that was loaded is written over."""
        data = _new()
        await store.set(data.session_id, data)
        for lock in (_LOCK, None):
            taken = await _checked_out(store, data.session_id, lock)
            newer = SessionData(session_id=data.session_id, metadata={"newer": lock is None})
            await store.set(data.session_id, newer)
            assert await _commit(store, taken, stale=True) is Outcome.CONFLICT
            assert await store.get(data.session_id) == newer

    async def test_one_at_a_time_in_order_of_arrival(self, store: SessionStore) -> None:
        """Checkouts of one session wait for each other, and each sees what the one before committed."""
        data = _new(metadata={"order": []})
        await store.set(data.session_id, data)
        first = await _checked_out(store, data.session_id)
        order: list[int] = []

        async def append(n: int) -> None:
            taken = await _checked_out(store, data.session_id)
            order.append(n)
            seen = decode(SessionData, taken.record).metadata["order"]
            assert await _commit(store, taken, order=[*seen, n]) is Outcome.STORED

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
        data = _new()
        await store.set(data.session_id, data)
        taken = await _checked_out(store, data.session_id)
        with pytest.raises(TooManyWaitersError) as full:
            await store.checkout(data.session_id, LockPolicy(max_waiters=0), _HOUR)
        assert full.value.limit == 0
        with pytest.raises(LockTimeoutError) as late:
            await store.checkout(data.session_id, LockPolicy(wait=0.05), _HOUR)
        assert late.value.waited >= 0.04
        await store.release(taken)
        await store.release(await _checked_out(store, data.session_id, LockPolicy(wait=0.5)))

    async def test_a_cancelled_checkout_leaves_nothing(self, store: SessionStore) -> None:
        """Those behind a waiter that went away are served, and the lock is free at the end."""
        data = _new()
        await store.set(data.session_id, data)
        taken = await _checked_out(store, data.session_id)
        served: list[bool] = []

        async def wait() -> None:
            await store.release(await _checked_out(store, data.session_id))
            served.append(True)

        async with anyio.create_task_group() as tasks:
            with anyio.move_on_after(0.05):
                await store.checkout(data.session_id, _LOCK, _HOUR)
            tasks.start_soon(wait)
            await anyio.sleep(0.02)
            await store.release(taken)
        assert served == [True]
        await store.release(await _checked_out(store, data.session_id, LockPolicy(wait=0.5)))

    async def test_release_is_idempotent(self, store: SessionStore) -> None:
        """A second release, or one after the commit's, does not let another holder's lock go."""
        data = _new()
        await store.set(data.session_id, data)
        taken = await _checked_out(store, data.session_id)
        await store.release(taken)
        other = await _checked_out(store, data.session_id)
        await store.release(taken)
        with pytest.raises(LockTimeoutError):
            await store.checkout(data.session_id, LockPolicy(wait=0.05), _HOUR)
        assert await store.renew([other, taken]) == [True, False]
        await store.release(other)

    async def test_a_lost_lease_commits_nothing(
        self, store: SessionStore, let_time_pass: Callable[[float], Awaitable[None]]
    ) -> None:
        """Past `max_hold` the lock goes to the next, and the late holder's commit is refused."""
        data = _new()
        await store.set(data.session_id, data)
        short = LockPolicy(timeout=0.1, max_hold=0.1)
        late = await _checked_out(store, data.session_id, short)
        await let_time_pass(0.3)
        taken = await _checked_out(store, data.session_id)
        assert await _commit(store, late, late=True) is Outcome.LOST
        assert await store.renew([late]) == [False]
        assert await _commit(store, taken, n=1) is Outcome.STORED
        after = await store.get(data.session_id)
        assert after is not None
        assert after.metadata == {"n": 1}

    async def test_discard(self, store: SessionStore) -> None:
        """A discarded record is absent, and who waited is told at once."""
        data = _new()
        await store.set(data.session_id, data)
        taken = await _checked_out(store, data.session_id)
        answers: list[object] = []

        async def ask() -> None:
            answers.append(await store.checkout(data.session_id, _LOCK, _HOUR))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(ask)
            tasks.start_soon(ask)
            await anyio.sleep(0.05)
            assert await store.discard(taken) is Outcome.STORED
        assert answers == [Missing.ABSENT, Missing.ABSENT]
        assert await store.exists(data.session_id) is False

    async def test_move(self, store: SessionStore) -> None:
        """The record goes on under the new id alone; the old one is known as replaced, at once."""
        data = _new(user_id="ada", metadata={"n": 1})
        await store.create(data.session_id, encode_checked(data), _HOUR, None, "ada")
        taken = await _checked_out(store, data.session_id)
        answers: list[object] = []
        successors: list[Checkout] = []

        async def ask() -> None:
            answers.append(await store.checkout(data.session_id, _LOCK, _HOUR))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(ask)
            await anyio.sleep(0.05)
            successors.append(await _move(store, taken, "ada", "ada"))
        (moved,) = successors
        assert answers == [Missing.RETIRED]
        assert await store.checkout(data.session_id, None, _HOUR) is Missing.RETIRED
        assert [each.session_id for each in await store.list_for_user("ada")] == [moved.session_id]
        assert (await store.get(moved.session_id)) == decode(SessionData, moved.record)
        assert await _commit(store, moved, n=2) is Outcome.STORED
        assert await store.delete_for_user("ada") == 1

    async def test_a_move_of_what_is_gone_leaves_nothing(self, store: SessionStore) -> None:
        """Neither an ended session nor one that others have changed goes on under a new id."""
        for change, expected in (("delete", Outcome.GONE), ("set", Outcome.CONFLICT)):
            data = _new()
            await store.set(data.session_id, data)
            taken = await _checked_out(store, data.session_id)
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

    async def test_a_sign_out_ends_what_moves_meanwhile(self, store: SessionStore) -> None:
        """Whatever new ids a user's sessions take while all are ended: none is left, none comes back."""
        user = f"user-{new_session_id()}"
        sessions = [_new(user_id=user) for _ in range(4)]
        for data in sessions:
            await store.create(data.session_id, encode_checked(data), _HOUR, None, user)

        async def keep_moving(session_id: str) -> None:
            while True:
                taken = await store.checkout(session_id, _LOCK, _HOUR)
                if not isinstance(taken, Checkout):
                    return
                try:
                    session_id = (await _move(store, taken, user, user)).session_id
                except AssertionError:
                    return
                await anyio.lowlevel.checkpoint()

        async with anyio.create_task_group() as tasks:
            for data in sessions:
                tasks.start_soon(keep_moving, data.session_id)
            await anyio.sleep(0.02)
            await store.delete_for_user(user)  # some end by themselves, when they find that they may not move
        assert await store.list_for_user(user) == []
        assert await store.find(SessionFilter(user_id=user)) == []

    # -- at once: every primitive lets other tasks run before and after it --------------------------------

    async def test_no_acknowledged_change_is_lost(self, store: SessionStore) -> None:
        """Whoever was told STORED is in the record: with the lock, without it, beside every other writer."""
        for seed in range(_ROUNDS):
            pause = _interleave(store, seed)
            data = _new(metadata={"n": 0})
            await store.create(data.session_id, encode_checked(data), _IDLE, None)
            stored: list[int] = []
            async with anyio.create_task_group() as tasks:
                for lock in (_LOCK, _LOCK, None, None):
                    tasks.start_soon(_count, store, data.session_id, lock, stored, pause)
                tasks.start_soon(_update, store, data.session_id, seed)
                tasks.start_soon(_look, store, data.session_id)
            after = await store.get(data.session_id)
            assert after is not None
            assert after.metadata == {"n": len(stored), "updated": seed}, "acknowledged, but not there"
            assert sorted(stored) == list(range(1, len(stored) + 1)), "acknowledged twice"

    async def test_what_has_ended_does_not_come_back(self, store: SessionStore) -> None:
        """Whoever writes, extends or moves a session while it is deleted finds it gone."""
        for seed in range(_ROUNDS):
            pause = _interleave(store, seed)
            data = _new(metadata={"n": 0})
            await store.create(data.session_id, encode_checked(data), _IDLE, None)
            before = set(await store.list_active())
            ended: list[bool] = []

            async def end(session_id: str, ended: list[bool], pause: _Pause) -> None:
                await pause()
                ended.append(await store.delete(session_id))

            async with anyio.create_task_group() as tasks:
                for lock in (_LOCK, None):
                    tasks.start_soon(_count, store, data.session_id, lock, [], pause)
                tasks.start_soon(_update, store, data.session_id, seed)
                tasks.start_soon(_look, store, data.session_id)
                tasks.start_soon(_set_if_there, store, data)
                tasks.start_soon(end, data.session_id, ended, pause)
            assert ended == [True]
            assert await store.get(data.session_id) is None, "a session that was ended came back"
            assert set(await store.list_active()) == before - {data.session_id}

    async def test_set_is_not_undone_by_who_loaded_before(self, store: SessionStore) -> None:
        """`set` does not wait; whoever loaded the record before it is refused."""
        for seed in range(_ROUNDS):
            pause = _interleave(store, seed)
            data = _new(metadata={"n": 0})
            await store.create(data.session_id, encode_checked(data), _IDLE, None)
            newer = SessionData(session_id=data.session_id, metadata={"n": 0, "set": True})
            async with anyio.create_task_group() as tasks:
                for lock in (_LOCK, _LOCK, None):
                    tasks.start_soon(_count, store, data.session_id, lock, [], pause)
                tasks.start_soon(_look, store, data.session_id)
                tasks.start_soon(store.set, data.session_id, newer)
            after = await store.get(data.session_id)
            assert after is not None
            assert after.metadata.get("set") is True, "an older record was written over a newer one"

    # -- time -----------------------------------------------------------------------------------------------

    async def test_an_idle_timeout_restarts_with_each_request(
        self, store: SessionStore, let_time_pass: Callable[[float], Awaitable[None]]
    ) -> None:
        """Requests keep an idle session alive, up to its absolute bound; a look at the record does not."""
        data = _new()
        rule = Lifetime(absolute=1.0, idle=0.4)
        await store.create(data.session_id, encode_checked(data), rule, None)
        for _ in range(3):
            await let_time_pass(0.25)
            taken = await _checked_out(store, data.session_id)
            assert taken.expires_in is not None
            assert taken.expires_in < 0.8
            assert taken.idle == pytest.approx(0.4)
            await store.keep_alive(taken)
            await store.release(taken)
        await let_time_pass(0.3)
        assert await store.checkout(data.session_id, _LOCK, rule) is Missing.ABSENT
        idle = _new()
        await store.create(idle.session_id, encode_checked(idle), Lifetime(idle=0.3), None)
        await let_time_pass(0.15)
        await store.get(idle.session_id)
        await store.release(await _checked_out(store, idle.session_id))  # a client that was refused
        await let_time_pass(0.2)
        assert await store.get(idle.session_id) is None

    async def test_a_shorter_rule_binds_what_is_there(
        self, store: SessionStore, let_time_pass: Callable[[float], Awaitable[None]]
    ) -> None:
        """Who shortens `max_age` or `idle_timeout` means the sessions that are there too."""
        absolute, idle = _new(), _new()
        for data in (absolute, idle):
            await store.create(data.session_id, encode_checked(data), _HOUR, None)
        await let_time_pass(0.2)
        taken = await store.checkout(absolute.session_id, _LOCK, Lifetime(absolute=0.4))
        assert isinstance(taken, Checkout)
        assert taken.expires_in == pytest.approx(0.2, abs=0.15)
        assert await _commit(store, taken, n=1) is Outcome.STORED
        taken = await store.checkout(idle.session_id, _LOCK, Lifetime(absolute=3600, idle=0.2))
        assert isinstance(taken, Checkout)
        assert taken.idle == pytest.approx(0.2)
        await store.release(taken)
        await let_time_pass(0.3)
        assert await store.exists(absolute.session_id) is False
        assert await store.exists(idle.session_id) is False
        old = _new()
        await store.create(old.session_id, encode_checked(old), _HOUR, None)
        await let_time_pass(0.3)
        assert await store.checkout(old.session_id, _LOCK, Lifetime(absolute=0.2)) is Missing.ABSENT

    async def test_a_late_commit_harms_nobody(
        self, store: SessionStore, let_time_pass: Callable[[float], Awaitable[None]]
    ) -> None:
        """A lease that ran out does not matter where nobody took the lock and the version is the same."""
        data = _new()
        await store.set(data.session_id, data)
        late = await _checked_out(store, data.session_id, LockPolicy(timeout=0.1, max_hold=0.1))
        await let_time_pass(0.3)
        assert await _commit(store, late, n=1) is Outcome.STORED
        after = await store.get(data.session_id)
        assert after is not None
        assert after.metadata == {"n": 1}
