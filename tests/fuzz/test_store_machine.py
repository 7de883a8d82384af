"""Every kind of store against one model with a clock: every operation, in any order, at any time.

Times are chosen so that nothing ends within seconds of a step of the clock: what really passes
does not count. In Redis time passes by moving every end that is written there.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import math
import sqlite3
from collections.abc import AsyncGenerator, Coroutine
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import pytest
from asgi import Clock
from hypothesis import assume
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from moves import retire
from redis import Redis
from redis_server import RedisServer

from asgi_sessions import InMemorySessionStore, SessionData, SessionFilter, SessionStore, SQLiteSessionStore
from asgi_sessions.errors import LockTimeoutError, SessionConflictError, SessionDataError, SessionLockError
from asgi_sessions.record.codec import decode, encode_checked
from asgi_sessions.stores.checkout import Checkout, Lifetime, LockPolicy, Missing, Outcome
from asgi_sessions.stores.local import LocalLocks, RetiredIds
from asgi_sessions.stores.redis.store import RedisSessionStore
from fuzz import effort, explore
from fuzz.store_model import DEFAULT_TTL, LEASE, Entry, Kind, Lease, Model, Out

T = TypeVar("T")

POLICY = LockPolicy(timeout=LEASE, wait=0.001, max_hold=LEASE)
IDS = ["a", "ünï.2", "0" * 32]
USERS = ["ada", "bob"]

# --- values ---------------------------------------------------------------------------------------

ids = st.sampled_from(IDS)
names = st.sampled_from(["n", "m", "tags", "to_json"])
jsons = st.sampled_from([None, True, 1, 2.5, "x", [], [1, {"deep": []}], {"k": [1]}])
ttls = st.sampled_from([None, None, 500.5, 2500.5, 9500.5])
locks = st.sampled_from([None, POLICY])
lives = st.builds(Lifetime, st.sampled_from([2500.5, 5500.5]), st.sampled_from([None, 1500.5]))
lives |= st.just(Lifetime(None, 1500.5))
firsts = st.builds(replace, lives, first=st.sampled_from([None, 700.5]))
rules = st.none() | st.builds(
    Lifetime, st.sampled_from([None, 1500.5, 9500.5]), st.sampled_from([None, 500.5])
)
contents = st.fixed_dictionaries(
    {},
    optional={
        "user_id": st.sampled_from([None, *USERS]),
        "message_count": st.integers(0, 3),
        "escalated": st.booleans(),
        "metadata": st.dictionaries(names, jsons, max_size=2),
    },
)
updates = st.dictionaries(names, jsons, max_size=2).flatmap(
    lambda free: st.fixed_dictionaries(
        {},
        optional={
            "user_id": st.sampled_from([None, *USERS]),
            "message_count": st.integers(0, 3),
            "escalated": st.booleans(),
        },
    ).map(lambda typed: {**free, **typed})
)
BAD_UPDATES: list[dict[str, Any]] = [
    {"n": 1, "message_count": -1},
    {"n": 1, "session_id": "another"},
    {"n": {1, 2}},
    {"user_id": "no\nname"},
]
filters: st.SearchStrategy[dict[str, Any]] = st.fixed_dictionaries(
    {},
    optional={
        "user_id": st.sampled_from(USERS),
        "escalated": st.booleans(),
        "min_messages": st.integers(0, 2),
        "max_messages": st.integers(2, 4),
    },
)


def told(data: SessionData) -> dict[str, Any]:
    """What a record says, but for the times that every write sets."""
    return data.model_dump(exclude={"updated_at", "last_activity"})


def spoil(data: SessionData | None) -> None:
    """Change what came from the store, or was given to it: nothing in the store may change with it."""
    if data is not None:
        data.metadata["spoilt"] = True
        for value in data.metadata.values():
            if isinstance(value, list):
                value.append("spoilt")
            elif isinstance(value, dict):
                value["spoilt"] = []
        vars(data)["user_id"] = "spoilt"


class StoreMachine(RuleBasedStateMachine):
    """Every operation of the contract."""

    kind: Kind
    room = math.inf

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.model = Model(self.kind, self.room)
        self.outs: list[Out] = []
        self.store = self.make_store()
        self.store.lock_policy = POLICY

    def make_store(self) -> SessionStore:
        raise NotImplementedError

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.loop.run_until_complete(work)

    @initialize(idle=st.sampled_from([None, 1500.5]), lock=locks)
    def begin(self, idle: float | None, lock: LockPolicy | None) -> None:
        """There is a session, perhaps with an idle timeout, perhaps under a request."""
        self.create("a", {"user_id": "ada"}, Lifetime(2500.5, idle), lock)

    # -- single records ----------------------------------------------------------------------------

    @rule(session_id=ids, content=contents, ttl=ttls)
    def store_it(self, session_id: str, content: dict[str, Any], ttl: float | None) -> None:
        """Stores whoever holds it; without ttl an existing record keeps its life."""
        data = SessionData(session_id=session_id, **copy.deepcopy(content))
        assert self.run(self.store.set(session_id, data, ttl)) is True
        self.model.store(data, ttl)
        spoil(data)

    @rule(session_id=ids)
    def get(self, session_id: str) -> None:
        """The record, which is not shared."""
        data, entry = self.run(self.store.get(session_id)), self.model.find(session_id)
        assert (data is None) is (entry is None) is not self.run(self.store.exists(session_id))
        if data is not None and entry is not None:
            assert told(data) == told(entry.data)
        spoil(data)

    @rule(session_id=ids, batch=st.booleans())
    def delete(self, session_id: str, batch: bool) -> None:
        """Waits for nobody."""
        if batch:
            found = self.run(self.store.delete_batch([session_id]))[session_id]
        else:
            found = self.run(self.store.delete(session_id))
        assert found is self.model.delete(session_id)

    @rule(session_id=ids, changes=updates, atomic=st.booleans())
    def update(self, session_id: str, changes: dict[str, Any], atomic: bool) -> None:
        """Fields by name, everything else to the metadata; the life stays."""
        entry = self.turn(session_id, self.store.update(session_id, copy.deepcopy(changes), atomic))
        if entry is not None:
            data = entry.data.model_copy(deep=True)
            for name, value in changes.items():
                if name in ("user_id", "message_count", "escalated"):
                    setattr(data, name, value)
                else:
                    data.metadata[name] = copy.deepcopy(value)
            if told(data) != told(entry.data):
                self.model.rewrite(entry, data)

    def turn(self, session_id: str, work: Coroutine[Any, Any, object]) -> Entry | None:
        """An operation that takes its turn: refused while another holds the lock."""
        if self.model.waits(session_id):
            with pytest.raises(LockTimeoutError):
                self.run(work)
            return None
        entry = self.take_turn(session_id)
        assert self.run(work) is (entry is not None)
        return entry

    def take_turn(self, session_id: str) -> Entry | None:
        """The lock is taken and let go, and nobody's idle timeout restarts."""
        self.model.relieve(session_id)
        entry = self.model.find(session_id)
        if entry is not None:
            self.model.active(session_id)
        return entry

    @rule(session_id=ids, changes=st.sampled_from(BAD_UPDATES))
    def update_wrongly(self, session_id: str, changes: dict[str, Any]) -> None:
        """All updates are stored or none."""
        if self.model.waits(session_id) or self.take_turn(session_id) is None:
            return
        with pytest.raises((ValueError, SessionDataError)):
            self.run(self.store.update(session_id, changes))

    @rule(session_id=ids, name=st.sampled_from(["n", "m", "message_count"]), delta=st.integers(-1, 3))
    def increment(self, session_id: str, name: str, delta: int) -> None:
        """A number in a field or in the metadata; anything else is an error and stays."""
        if self.model.waits(session_id):
            return
        work = self.store.increment_counter(session_id, name, delta)
        entry = self.take_turn(session_id)
        if entry is None:
            assert self.run(work) == 0
            return
        data = entry.data.model_copy(deep=True)
        value = data.message_count if name == "message_count" else data.metadata.get(name, 0)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            with pytest.raises(SessionDataError, match="not a number"):
                self.run(work)
        elif name == "message_count" and value + delta < 0:
            with pytest.raises(ValueError, match="validation error"):
                self.run(work)
        else:
            assert self.run(work) == value + delta
            if name == "message_count":
                data.increment_message_count(delta)
            else:
                data.metadata[name] = value + delta
            self.rewritten_if_changed(entry, data)

    def rewritten_if_changed(self, entry: Entry, data: SessionData) -> None:
        if told(data) != told(entry.data):
            self.model.rewrite(entry, data)

    @rule(session_id=ids)
    def touch(self, session_id: str) -> None:
        """Notes activity, which is a new version; the idle timeout restarts."""
        before = self.run(self.store.get(session_id))
        entry = self.turn(session_id, self.store.touch(session_id))
        if entry is not None and before is not None:
            if entry.idle < math.inf:
                self.model.keep_alive(session_id)
            self.model.rewrite(entry, entry.data)
            after = self.run(self.store.get(session_id))
            assert after is not None
            assert after.last_activity > before.last_activity

    @rule(session_id=ids, ttl=ttls, content=contents, by_factory=st.booleans())
    def get_or_create(
        self, session_id: str, ttl: float | None, content: dict[str, Any], by_factory: bool
    ) -> None:
        """The record that is there, else a new one; `create` never overwrites."""
        fresh = SessionData(session_id=session_id, **copy.deepcopy(content)) if by_factory else None
        data = self.run(self.store.get_or_create(session_id, None if fresh is None else lambda _: fresh, ttl))
        entry = self.model.find(session_id)
        if entry is None:
            created = SessionData(session_id=session_id, **copy.deepcopy(content if by_factory else {}))
            created.created_at = data.created_at
            entry = self.model.put(created, Lifetime(DEFAULT_TTL if ttl is None else ttl))
        assert told(data) == told(entry.data)
        spoil(data)
        spoil(fresh)

    @rule(session_id=ids, fails=st.booleans(), rival=st.sampled_from(["", "", "set", "delete"]))
    def transact(self, session_id: str, fails: bool, rival: str) -> None:
        """A block is stored or rolled back, and refused where a writer that did not wait came first."""
        if self.model.waits(session_id):
            return
        entry = self.take_turn(session_id)
        expected: tuple[type[BaseException], ...] = (RuntimeError,) if fails else ()
        if rival and entry is not None and not fails:
            expected = (SessionConflictError, SessionLockError)
        with pytest.raises(expected) if expected and entry is not None else contextlib.nullcontext():
            self.run(self._block(session_id, fails, rival if entry is not None else ""))
        if entry is not None and not fails and not rival:
            data = entry.data.model_copy(deep=True)
            data.metadata["m"] = data.metadata["deep"] = [1]
            self.rewritten_if_changed(entry, data)

    async def _block(self, session_id: str, fails: bool, rival: str) -> None:
        async with self.store.transaction(session_id) as data:
            if data is None:
                return
            data.metadata["m"] = data.metadata["deep"] = [1]
            data.update_activity()
            if rival == "set":
                newer = SessionData(session_id=session_id, escalated=True)
                await self.store.set(session_id, newer)
                self.model.store(newer, None)
            elif rival == "delete":
                await self.store.delete(session_id)
                self.model.delete(session_id)
            if fails:
                raise RuntimeError

    @rule(session_id=ids, what=st.sampled_from(["another", "ttl", "value", "id"]))
    def set_wrongly(self, session_id: str, what: str) -> None:
        """What cannot be stored is refused, and the record stays."""
        data = SessionData(session_id="other" if what == "another" else session_id)
        if what == "value":
            data.metadata["bad"] = {1}
        bad_id = "a b" if what == "id" else session_id
        with pytest.raises((ValueError, SessionDataError)):
            self.run(self.store.set(bad_id, data, 0 if what == "ttl" else None))

    # -- many records ------------------------------------------------------------------------------

    @rule(chosen=st.lists(ids, unique=True, max_size=3), content=contents, ttl=ttls, bad=st.booleans())
    def set_batch(self, chosen: list[str], content: dict[str, Any], ttl: float | None, bad: bool) -> None:
        """All or none."""
        records = {name: SessionData(session_id=name, **copy.deepcopy(content)) for name in chosen}
        if bad and chosen:
            records[chosen[-1]].metadata["bad"] = object()
            with pytest.raises(SessionDataError):
                self.run(self.store.set_batch(records, ttl))
            return
        assert self.run(self.store.set_batch(records, ttl)) == dict.fromkeys(chosen, True)
        for data in records.values():
            self.model.store(data, ttl)
            spoil(data)

    @rule(chosen=st.lists(ids, unique=True, max_size=4))
    def delete_batch(self, chosen: list[str]) -> None:
        """Which of them were there."""
        expected = {name: self.model.delete(name) for name in chosen}
        assert self.run(self.store.delete_batch(chosen)) == expected

    @rule(limit=st.none() | st.integers(0, 3), offset=st.integers(0, 3))
    def list_active(self, limit: int | None, offset: int) -> None:
        """In pages, sorted."""
        everything = sorted(self.model.alive())
        end = None if limit is None else offset + limit
        assert self.run(self.store.list_active(limit, offset)) == everything[offset:end]

    @rule(criteria=filters, limit=st.none() | st.integers(0, 3))
    def find(self, criteria: dict[str, Any], limit: int | None) -> None:
        """What the filter matches, in the order of ids; of more than `limit` nobody says which."""
        wanted = SessionFilter(**criteria)
        alive = self.model.alive()
        expected = {name for name in alive if wanted.matches(alive[name].data)}
        found = [data.session_id for data in self.run(self.store.find(wanted, limit))]
        assert found == sorted(found)
        assert expected.issuperset(found)
        assert len(found) == min(len(expected), len(expected) if limit is None else limit)

    @rule(user=st.sampled_from(USERS), keep=st.none() | ids)
    def delete_for_user(self, user: str, keep: str | None) -> None:
        """Everywhere but in one session."""
        assert self.run(self.store.delete_for_user(user, keep)) == self.model.sign_out(user, keep)

    @rule()
    def clean_up(self) -> None:
        """Nothing that is alive goes; figures and health agree with the records, and leave nothing."""
        assert self.run(self.store.cleanup_expired()) >= 0
        alive = self.model.alive()
        metrics = self.run(self.store.get_metrics())
        assert metrics.active_sessions == self.run(self.store.count_active()) == len(alive)
        assert metrics.total_messages == sum(entry.data.message_count for entry in alive.values())
        stats = self.run(self.store.get_stats())
        assert stats["active_sessions"] == len(alive)

    # -- requests ----------------------------------------------------------------------------------

    @rule(session_id=ids, content=contents, lifetime=firsts, lock=locks)
    def create(
        self, session_id: str, content: dict[str, Any], lifetime: Lifetime, lock: LockPolicy | None
    ) -> None:
        """Never over another."""
        if lock and session_id in self.model.leases:
            return  # an id that nobody knows is not locked
        data = SessionData(session_id=session_id, **copy.deepcopy(content))
        record = encode_checked(data)
        created = self.run(self.store.create(session_id, record, lifetime, lock, data.user_id))
        assert (created is None) is (self.model.find(session_id) is not None)
        if created is not None:
            self.took(created, self.model.put(data, lifetime), lock)

    def took(self, real: Checkout, entry: Entry, lock: LockPolicy | None) -> None:
        assert (real.token is None) is (lock is None)
        data = decode(SessionData, real.record)
        assert told(data) == told(entry.data)
        assert real.age == pytest.approx(self.model.now - entry.began, abs=30)
        left = entry.expires - self.model.now
        assert real.expires_in == (None if left == math.inf else pytest.approx(left, abs=30))
        assert real.idle == (None if entry.idle == math.inf else pytest.approx(entry.idle))
        out = Out(real, real.session_id, entry.version, lock is not None, data)
        if lock:
            self.model.leases[real.session_id] = Lease(out, self.model.now + LEASE)
        self.outs.append(out)

    @rule(session_id=ids, lock=locks, lifetime=rules, passive=st.booleans())
    def checkout(
        self, session_id: str, lock: LockPolicy | None, lifetime: Lifetime | None, passive: bool
    ) -> None:
        """Locks and loads, under bounds that are no longer than its rule; why not, where there is nothing."""
        work = self.store.checkout(session_id, lock, lifetime, passive=passive)
        if lock and self.model.waits(session_id):
            with pytest.raises(LockTimeoutError):
                self.run(work)
            if not passive:
                self.model.arrives(session_id, lifetime)
            return
        if lock:
            self.model.relieve(session_id)
        was_there = self.model.find(session_id) is not None
        taken, entry = self.run(work), self.model.bounded(session_id, lifetime, lock is not None)
        if entry is not None:
            assert isinstance(taken, Checkout)
            self.model.active(session_id)
            self.took(taken, entry, lock)
            return
        retired = self.model.retired.get(session_id, 0) > self.model.now
        assert taken is (Missing.RETIRED if retired else Missing.ABSENT) or (
            was_there and taken is Missing.ABSENT
        )

    def out(self, number: int) -> Out | None:
        return self.outs[number % len(self.outs)] if self.outs else None

    @rule(number=st.integers(0, 5), content=contents, release=st.booleans())
    def commit(self, number: int, content: dict[str, Any], release: bool) -> None:
        """Stored exactly if lock, version and record are what they were."""
        out = self.out(number)
        if out is None:
            return
        data = SessionData(
            session_id=out.session_id, created_at=out.data.created_at, **copy.deepcopy(content)
        )
        outcome = self.run(self._commit(out, data, release))
        assert outcome is self.model.judge(out)
        self.model.link(data)  # whatever became of it
        entry = self.model.find(out.session_id)
        if outcome is Outcome.STORED and entry is not None:
            self.model.rewrite(entry, data)
            out.version, out.data = entry.version, data
            assert decode(SessionData, out.real.record) == data
        self.after(out, release)

    async def _commit(self, out: Out, data: SessionData, release: bool) -> Outcome:
        if data.user_id is not None:
            await self.store.link_user(data.user_id, out.session_id, Lifetime(out.real.expires_in))
        return await self.store.commit(out.real, encode_checked(data), release=release)

    @rule(number=st.integers(0, 5), lifetime=lives)
    def bound(self, number: int, lifetime: Lifetime) -> None:
        """Longer or shorter, under the same conditions; the lock stays, and so does what is stored."""
        out = self.out(number)
        if out is None:
            return
        entry, expected = self.model.find(out.session_id), self.model.judge(out)
        idle = math.inf if lifetime.idle is None else lifetime.idle
        if entry is not None and self.model.came(entry) + idle <= self.model.now:
            return  # a middleware leaves the idle timeout as it is
        token = out.real.token
        assert self.run(self.store.bound(out.real, lifetime)) is expected
        assert out.real.token == token
        if expected is Outcome.STORED and entry is not None:
            self.model.rebound(entry, lifetime)
            out.version = entry.version
            assert out.real.idle == lifetime.idle
            assert out.real.expires_in == pytest.approx(lifetime.absolute)
            assert out.real.age == pytest.approx(self.model.now - entry.began, abs=30)

    def after(self, out: Out, release: bool) -> None:
        """A checkout that has lost its token was let go by the store."""
        if release or (out.locked and out.real.token is None):
            assert out.real.token is None
            self.model.let_go(out)
            self.outs.remove(out)

    @rule(number=st.integers(0, 5))
    def discard(self, number: int) -> None:
        """Deletes what was checked out, under the same conditions."""
        out = self.out(number)
        if out is None:
            return
        expected = self.model.judge(out)
        assert self.run(self.store.discard(out.real)) is expected
        if expected is Outcome.STORED:
            self.model.delete(out.session_id)
        self.after(out, True)

    @rule(
        number=st.integers(0, 5),
        new_id=ids,
        content=contents,
        lifetime=st.none() | lives,
        lock=locks,
        leads=st.booleans(),
    )
    def move(
        self,
        number: int,
        new_id: str,
        content: dict[str, Any],
        lifetime: Lifetime | None,
        lock: LockPolicy | None,
        leads: bool,
    ) -> None:
        """The session goes on under an id that nobody knows, or nothing is left of it there."""
        out = self.out(number)
        if out is None or new_id == out.session_id or self.model.find(new_id) or new_id in self.model.leases:
            return
        data = SessionData(session_id=new_id, **copy.deepcopy(content))
        expected = self.model.judge(out)
        outcome = self.run(self._move(out, data, lifetime, lock, leads))
        assert outcome is expected
        if expected is not Outcome.STORED:
            assert out.real.successor is None
        else:
            assert out.real.successor is not None
            self.model.move(out, data, lifetime, leads)
            self.took(out.real.successor, self.model.entries[new_id], lock)
        self.after(out, True)

    async def _move(
        self,
        out: Out,
        data: SessionData,
        lifetime: Lifetime | None,
        lock: LockPolicy | None,
        leads: bool,
    ) -> Outcome:
        was, user = out.data.user_id, data.user_id
        return await self.store.move(
            out.real, data.session_id, encode_checked(data),
            lifetime=lifetime, lock=lock, was=was, user=user, leads=leads,
        )  # fmt: skip

    @rule(session_id=ids)
    def follow(self, session_id: str) -> None:
        """An id that was replaced because it was old leads to the new one for a while."""
        if session_id in self.model.retired:
            assert self.run(self.store.successor_of(session_id)) == self.model.leads_to(session_id)

    @rule(number=st.integers(0, 5))
    def keep_alive(self, number: int) -> None:
        """The idle timeout restarts, whoever has the lock; what has ended stays so."""
        out = self.out(number)
        if out is not None:
            self.run(self.store.keep_alive(out.real))
            if out.real.idle is not None or self.kind in (Kind.MEMORY, Kind.THIRD_PARTY):
                self.model.keep_alive(out.session_id)

    @rule(number=st.integers(0, 5))
    def arrive(self, number: int) -> None:
        """A record that was to end early where its client does not come back has its full life."""
        out = self.out(number)
        if out is not None:
            self.run(self.store.arrived(out.real))
            self.model.keep_alive(out.session_id)

    @rule(number=st.integers(0, 5))
    def release(self, number: int) -> None:
        """Lets the lock go, once."""
        out = self.out(number)
        if out is not None:
            self.run(self.store.release(out.real))
            self.after(out, True)

    @rule(number=st.integers(0, 5))
    def renew(self, number: int) -> None:
        """False for a lease that was lost."""
        out = self.out(number)
        if out is None:
            return
        lease = self.model.lease(out.session_id)
        owned = out.locked and lease is not None and lease.owner is out
        assert self.run(self.store.renew([out.real])) == [owned]
        if owned and lease is not None and self.kind is Kind.REDIS:
            lease.ends = self.model.now + LEASE

    # -- time --------------------------------------------------------------------------------------

    @rule(seconds=st.sampled_from([13.0, 27.0, 1000.0]))
    def pass_time(self, seconds: float) -> None:
        """By the store's clock."""
        self.move_clock(seconds)
        self.model.pass_time(seconds)

    def move_clock(self, seconds: float) -> None:
        raise NotImplementedError

    # -- what holds at every moment ----------------------------------------------------------------

    @invariant()
    def the_store_holds_what_the_model_says(self) -> None:
        """All that is alive, nothing else, each under its own user."""
        self.model.entries = alive = self.model.alive()
        found = self.run(self.store.get_batch(IDS))
        assert list(found) == list(IDS)
        assert {name: told(data) for name, data in found.items() if data is not None} == {
            name: told(entry.data) for name, entry in alive.items()
        }
        for user in USERS:
            mine = {name for name, entry in alive.items() if entry.data.user_id == user}
            assert {data.session_id for data in self.run(self.store.list_for_user(user))} == mine
        for data in found.values():
            if data is not None:
                spoil(data)

    def teardown(self) -> None:
        """When all is let go, no lock is left."""
        try:
            for out in self.outs:
                self.run(self.store.release(out.real))
            self.leaves_nothing()
        finally:
            self.run(self.store.aclose())
            self.run(self.loop.shutdown_asyncgens())
            self.loop.close()

    def leaves_nothing(self) -> None:
        raise NotImplementedError


class MemoryMachine(StoreMachine):
    """The store in memory, with a clock that is moved, and room for two."""

    kind = Kind.MEMORY
    room = 2

    def make_store(self) -> SessionStore:
        self.clock = Clock()
        return InMemorySessionStore(2, DEFAULT_TTL, clock=self.clock)

    def move_clock(self, seconds: float) -> None:
        self.clock.now += seconds

    @invariant()
    def the_books_agree(self) -> None:
        """Who goes first when room is needed, and whose sessions they are; the heap of ends does not grow."""
        assert isinstance(self.store, InMemorySessionStore)
        entries = self.model.entries
        assert list(self.store._table._anonymous) == [
            name for name, each in entries.items() if not each.users
        ]
        assert list(self.store._table._signed_in) == [name for name, each in entries.items() if each.users]
        index = {user: {name for name, each in entries.items() if user in each.users} for user in USERS}
        assert self.store._table.users == {user: sessions for user, sessions in index.items() if sessions}
        assert set().union(*self.store._table.shards) == set(entries)
        assert len(self.store._table.ends) <= 2 * len(self.store._entries) + 65

    def leaves_nothing(self) -> None:
        assert len(self.store._locks) == 0
        self.clock.now += 1e9
        assert self.run(self.store.count_active()) == 0
        assert isinstance(self.store, InMemorySessionStore)
        assert not self.store._entries
        assert not self.store._table.users
        assert len(self.store._users) == 0


class DictStore(SessionStore):
    """A store of somebody else's: four primitives on a dict, which forgets by itself when it likes to."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.default_ttl = DEFAULT_TTL
        self.clock = clock
        self.values: dict[str, tuple[bytes, float]] = {}
        self._locks, self._retired = LocalLocks(clock), RetiredIds(clock)

    def now(self) -> float:
        return self.clock.now

    async def read_value(self, session_id: str) -> bytes | None:
        value, _ = self.values.get(session_id, (None, 0.0))
        return value

    async def write_value(self, session_id: str, value: bytes, ttl: float) -> None:
        self.values[session_id] = value, self.clock.now + ttl

    async def delete_value(self, session_id: str) -> None:
        self.values.pop(session_id, None)

    async def iter_ids(self) -> AsyncGenerator[str, None]:
        for session_id in list(self.values):
            yield session_id

    def forget(self) -> None:
        """Drop what need not be kept any more."""
        self.values = {name: each for name, each in self.values.items() if each[1] > self.clock.now}


class ThirdPartyMachine(StoreMachine):
    """A store of four primitives; the rest is the base class's."""

    kind = Kind.THIRD_PARTY

    def make_store(self) -> SessionStore:
        self.clock = Clock()
        return DictStore(self.clock)

    def move_clock(self, seconds: float) -> None:
        self.clock.now += seconds

    @rule()
    def forget(self) -> None:
        """The backend drops what it was told may be forgotten, whenever it likes to."""
        assert isinstance(self.store, DictStore)
        self.store.forget()

    def leaves_nothing(self) -> None:
        assert isinstance(self.store, DictStore)
        assert len(self.store._locks) == 0
        assert (len(self.store._users), len(self.store._primitives._latches)) == (0, 0)
        self.clock.now += 1e9
        assert self.run(self.store.count_active()) == 0
        self.run(self.store.cleanup_expired())
        assert self.store.values == {}


class SQLiteMachine(StoreMachine):
    """The store in a file, with a clock that is moved."""

    kind = Kind.SQLITE

    def make_store(self) -> SessionStore:
        self.clock = Clock()
        self.folder = TemporaryDirectory()
        self.path = Path(self.folder.name) / "sessions.db"
        store = SQLiteSessionStore(self.path, DEFAULT_TTL, synchronous="normal", clock=self.clock)
        store._settings = replace(store._settings, moments=self.clock)
        return store

    def move_clock(self, seconds: float) -> None:
        self.clock.now += seconds

    def teardown(self) -> None:
        with self.folder:
            super().teardown()

    def leaves_nothing(self) -> None:
        self.run(self.store.renew([]))  # what was sent has arrived then
        with closing(sqlite3.connect(self.path)) as db:
            assert db.execute("SELECT count(*) FROM lock WHERE until > ?", (self.clock.now,)).fetchone() == (
                0,
            )
            assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
            self.clock.now += 1e9
            assert self.run(self.store.count_active()) == 0
            self.run(self.store.cleanup_expired())
            for table in ("session", "retired", "successor"):
                assert db.execute(f"SELECT count(*) FROM {table}").fetchone() == (0,)


# Time passes: every end that is written in Redis comes nearer, those within the records too.
_MOVE_CLOCK = """
local by = tonumber(ARGV[1])
for _, key in ipairs(redis.call('KEYS', '*')) do
  local kind, left = redis.call('TYPE', key).ok, redis.call('PTTL', key)
  if kind == 'string' then
    local value = redis.call('GET', key)
    if string.sub(value, 1, 6) == 'asgi2:' then
      for _, place in ipairs({23, 51}) do -- the absolute end and the begin
        local moment = tonumber(string.sub(value, place + 1, place + 13))
        if moment > 0 then
          redis.call('SETRANGE', key, place, string.format('%013.0f', math.max(moment - by, 1)))
        end
      end
    end
  elseif kind == 'zset' then -- a negative time: the session is being ended
    for _, member in ipairs(redis.call('ZRANGE', key, 0, -1)) do
      local since = tonumber(redis.call('ZSCORE', key, member))
      redis.call('ZINCRBY', key, since < 0 and by or -by, member)
    end
  end
  if left > by then
    redis.call('PEXPIRE', key, left - by)
  elseif left >= 0 then
    redis.call('DEL', key)
  end
end
"""


def _around(place: int) -> tuple[slice, slice, slice]:
    """Before thirteen digits, they themselves, and after them."""
    return slice(place), slice(place, place + 13), slice(place + 13, None)


class RedisMachine(StoreMachine):
    """The store in a real Redis."""

    kind = Kind.REDIS
    url = ""

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Not pursued: waiting behind a holder of this process that has not heard yet that its time is over.

        Its heartbeat would tell it; here time passes without one.
        """
        try:
            return super().run(work)
        except LockTimeoutError:
            alive, leases = self.model.alive(), self.model.leases
            for out in self.outs:
                lease = leases.get(out.session_id)
                assume(out.real.token is None or (out.session_id in alive and lease and lease.owner is out))
            raise

    def make_store(self) -> SessionStore:
        self.raw = Redis.from_url(self.url, decode_responses=True)
        self.raw.flushall()
        return RedisSessionStore(self.url, default_ttl=DEFAULT_TTL)

    def move_clock(self, seconds: float) -> None:
        self.raw.eval(_MOVE_CLOCK, 0, str(round(seconds * 1000)))
        for out in self.outs:  # the version that was checked out has both within it
            for place in (17, 45):
                head, moment, rest = (out.real.version[part] for part in _around(place))
                if int(moment):
                    moment = f"{max(int(moment) - round(seconds * 1000), 1):013d}"
                out.real.version = head + moment + rest

    def keys(self) -> list[str]:
        """All that lies in Redis."""
        return [str(key) for key in self.raw.scan_iter()]

    @invariant()
    def no_key_is_for_ever(self) -> None:
        """Whatever is written ends by itself."""
        for key in self.keys():
            assert self.raw.pttl(key) > 0, f"{key} never ends"

    @invariant()
    def records_end_when_they_should(self) -> None:
        """The time to live is what the model says."""
        self.run(self.store.exists("fence"))  # what was posted has arrived then
        for name, entry in self.model.alive().items():
            left = self.raw.pttl(f"session:{{{name}}}") / 1000
            assert left == pytest.approx(entry.ends - self.model.now, abs=60)

    def leaves_nothing(self) -> None:
        self.run(self.store.exists("fence"))
        assert [key for key in self.keys() if key.endswith((":lock", ":wait"))] == []
        self.raw.close()


def test_the_store_in_memory() -> None:
    """Against the model."""
    explore(MemoryMachine, effort(60, steps=40))


def test_the_store_in_a_file() -> None:
    """Against the same model."""
    explore(SQLiteMachine, effort(60, steps=40))


def test_a_third_partys_store() -> None:
    """Against the same model."""
    explore(ThirdPartyMachine, effort(60, steps=40))


def test_the_store_in_redis(redis_server: RedisServer) -> None:
    """Against the same model."""
    explore(RedisMachine, effort(25, steps=40), url=redis_server.url)


@pytest.mark.anyio
@pytest.mark.parametrize("lock", [POLICY, None], ids=["lease lost", "unlocked"])
async def test_a_session_is_replaced_once(redis_url: str, lock: LockPolicy | None) -> None:
    """Of two who loaded the same version one may give it a new id, else the session would fork."""
    store, other = RedisSessionStore(redis_url), RedisSessionStore(redis_url)
    try:
        await store.set("s", SessionData(session_id="s"))
        late = await other.checkout("s", lock, None)
        with Redis.from_url(redis_url) as raw:
            raw.delete("session:{s}:lock")
        quick = await store.checkout("s", lock, None)
        assert isinstance(late, Checkout)
        assert isinstance(quick, Checkout)
        assert await retire(store, quick) is Outcome.STORED
        assert await retire(other, late) is not Outcome.STORED
    finally:
        await store.aclose()
        await other.aclose()
