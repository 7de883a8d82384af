"""Both stores against one model with a clock: every operation, in any order, at any time.

Times are chosen so that nothing ends within seconds of a step of the clock: what really passes
does not count. In Redis time passes by moving every end that is written there.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import math
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar

import pytest
from asgi import Clock
from hypothesis import assume
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from moves import retire
from redis import Redis
from redis_server import RedisServer

from asgi_sessions import InMemorySessionStore, SessionData, SessionFilter, SessionStore
from asgi_sessions.errors import LockTimeoutError, SessionConflictError, SessionDataError, SessionLockError
from asgi_sessions.record import decode, encode_checked
from asgi_sessions.stores.checkout import Checkout, Lifetime, Missing, Outcome
from asgi_sessions.stores.local import LockPolicy
from asgi_sessions.stores.redis import RedisSessionStore
from fuzz import effort, explore

T = TypeVar("T")

DEFAULT_TTL = 3500.0
LEASE = 300.0
RETIRED_FOR = 60.0
POLICY = LockPolicy(timeout=LEASE, wait=0.001, max_hold=LEASE)
IDS = ["a", "ünï.2", "0" * 32]
USERS = ["ada", "bob"]

# --- the model ------------------------------------------------------------------------------------


@dataclass
class Entry:
    """A record and its ends: the absolute one, and the idle one that restarts."""

    data: SessionData
    expires: float
    idle: float
    ends: float
    version: int


@dataclass
class Lease:
    """Who holds a lock, and until when."""

    owner: Out
    ends: float


@dataclass(eq=False)
class Out:
    """A checkout: what was loaded, which version, under which lock."""

    real: Checkout
    session_id: str
    version: int
    locked: bool
    data: SessionData


@dataclass
class Model:
    """What any store holds. Where the two differ, they are told by the three flags."""

    in_redis: bool
    room: float
    now: float = 0.0
    versions: int = 0
    entries: dict[str, Entry] = field(default_factory=dict)  # least recently active first
    leases: dict[str, Lease] = field(default_factory=dict)
    retired: dict[str, float] = field(default_factory=dict)

    def find(self, session_id: str) -> Entry | None:
        entry = self.entries.get(session_id)
        return entry if entry is not None and entry.ends > self.now else None

    def alive(self) -> dict[str, Entry]:
        return {name: entry for name, entry in self.entries.items() if entry.ends > self.now}

    def lease(self, session_id: str) -> Lease | None:
        found = self.leases.get(session_id)
        return found if found is not None and found.ends > self.now else None

    def put(self, data: SessionData, absolute: float, idle: float) -> None:
        """A record with a new life."""
        self.entries.pop(data.session_id, None)
        self.make_room()
        self.versions += 1
        ends = self.now + min(absolute, idle)
        stored = data.model_copy(deep=True)
        self.entries[data.session_id] = Entry(stored, self.now + absolute, idle, ends, self.versions)

    def make_room(self) -> None:
        """The expired go first, then the least recently active; who is checked out counts as active."""
        if len(self.entries) < self.room:
            return
        self.entries = self.alive()
        for session_id in list(self.entries):
            if len(self.entries) < self.room:
                return
            if session_id in self.leases:
                self.entries[session_id] = self.entries.pop(session_id)
            else:
                del self.entries[session_id]

    def store(self, data: SessionData, ttl: float | None) -> None:
        entry = self.find(data.session_id)
        if entry is None or ttl is not None:
            idle = math.inf if entry is None else entry.idle
            self.put(data, DEFAULT_TTL if ttl is None else ttl, idle)
        else:
            self.rewrite(entry, data)
            self.active(data.session_id)

    def rewrite(self, entry: Entry, data: SessionData) -> None:
        self.versions += 1
        entry.data, entry.version = data.model_copy(deep=True), self.versions

    def active(self, session_id: str) -> None:
        self.entries[session_id] = self.entries.pop(session_id)

    def request(self, session_id: str) -> Entry | None:
        """A request came: the idle timeout restarts."""
        entry = self.find(session_id)
        if entry is not None:
            entry.ends = min(entry.expires, self.now + entry.idle)
            self.active(session_id)
        return entry

    def delete(self, session_id: str) -> bool:
        there = self.find(session_id) is not None
        self.entries.pop(session_id, None)
        if self.in_redis:
            self.leases.pop(session_id, None)  # there is nothing to lock any more
        return there

    def judge(self, out: Out) -> set[Outcome]:
        """What a commit or discard of this checkout may come to."""
        entry, lease = self.find(out.session_id), self.lease(out.session_id)
        lost = out.locked and (lease is None or lease.owner is not out)
        if lost and lease is None and self.in_redis:
            lost = False  # nobody took the lock: the version decides
        if lost:
            return {Outcome.LOST, Outcome.GONE} if entry is None else {Outcome.LOST}
        if entry is None:
            return {Outcome.GONE}
        return {Outcome.STORED if entry.version == out.version else Outcome.CONFLICT}

    def let_go(self, out: Out) -> None:
        lease = self.leases.get(out.session_id)
        if lease is not None and lease.owner is out:
            del self.leases[out.session_id]
        out.locked = False

    def is_busy(self, session_id: str) -> bool:
        return self.lease(session_id) is not None


# --- values ---------------------------------------------------------------------------------------

ids = st.sampled_from(IDS)
names = st.sampled_from(["n", "m", "tags", "to_json"])
jsons = st.sampled_from([None, True, 1, 2.5, "x", [], [1, {"deep": []}], {"k": [1]}])
ttls = st.sampled_from([None, None, 500.5, 2500.5, 9500.5])
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
    {"user_id": "no name; --"},
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

    in_redis = False
    room = math.inf

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.model = Model(self.in_redis, self.room)
        self.outs: list[Out] = []
        self.store = self.make_store()
        self.store.lock_policy = POLICY

    def make_store(self) -> SessionStore:
        raise NotImplementedError

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.loop.run_until_complete(work)

    @initialize(idle=st.sampled_from([None, 1500.5]), lock=st.booleans())
    def begin(self, idle: float | None, lock: bool) -> None:
        """There is a session, perhaps with an idle timeout, perhaps under a request."""
        self.create("a", {"user_id": "ada"}, 2500.5, idle, lock)

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

    def turn(
        self, session_id: str, work: Coroutine[Any, Any, object], expected: object = True
    ) -> Entry | None:
        """An operation that takes its turn: refused while another holds the lock."""
        if self.model.is_busy(session_id) and self.counts_as_request(session_id):
            with pytest.raises(LockTimeoutError):
                self.run(work)
            return None
        entry = self.model.request(session_id)
        assert self.run(work) is (entry is not None)
        self.give_up_lease(session_id)
        return entry

    def counts_as_request(self, session_id: str) -> bool:
        """Whether there is something to wait for; Redis notes a request even if it has to wait."""
        if self.in_redis:
            return self.model.request(session_id) is not None
        return session_id in self.model.entries

    def give_up_lease(self, session_id: str) -> None:
        """Who comes after a lease has ended takes it away."""
        if self.model.lease(session_id) is None:
            self.model.leases.pop(session_id, None)

    @rule(session_id=ids, changes=st.sampled_from(BAD_UPDATES))
    def update_wrongly(self, session_id: str, changes: dict[str, Any]) -> None:
        """All updates are stored or none."""
        if self.model.is_busy(session_id) or self.model.request(session_id) is None:
            return
        with pytest.raises((ValueError, SessionDataError)):
            self.run(self.store.update(session_id, changes))
        self.give_up_lease(session_id)

    @rule(session_id=ids, name=st.sampled_from(["n", "m", "message_count"]), delta=st.integers(-1, 3))
    def increment(self, session_id: str, name: str, delta: int) -> None:
        """A number in a field or in the metadata; anything else is an error and stays."""
        if self.model.is_busy(session_id):
            return
        work = self.store.increment_counter(session_id, name, delta)
        entry = self.model.request(session_id)
        self.give_up_lease(session_id)
        if entry is None:
            with pytest.raises(KeyError):
                self.run(work)
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
            total = self.run(work)
            assert total == value + delta
            if name == "message_count":
                data.increment_message_count(delta)
            else:
                data.metadata[name] = value + delta
            if told(data) != told(entry.data) or name == "message_count":
                self.rewritten_if_changed(entry, data)

    def rewritten_if_changed(self, entry: Entry, data: SessionData) -> None:
        if told(data) != told(entry.data):
            self.model.rewrite(entry, data)

    @rule(session_id=ids)
    def touch(self, session_id: str) -> None:
        """Notes activity, which is a new version."""
        before = self.run(self.store.get(session_id))
        entry = self.turn(session_id, self.store.touch(session_id))
        if entry is not None and before is not None:
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
        factory = (lambda: fresh) if fresh is not None else None
        data = self.run(self.store.get_or_create(session_id, factory, ttl))
        entry = self.model.find(session_id)
        if entry is None:
            created = SessionData(session_id=session_id, **copy.deepcopy(content if by_factory else {}))
            created.created_at = data.created_at
            self.model.put(created, DEFAULT_TTL if ttl is None else ttl, math.inf)
            entry = self.model.entries[session_id]
        assert told(data) == told(entry.data)
        spoil(data)
        spoil(fresh)

    @rule(session_id=ids, fails=st.booleans(), rival=st.sampled_from(["", "", "set", "delete"]))
    def transact(self, session_id: str, fails: bool, rival: str) -> None:
        """A block is stored or rolled back, and refused where a writer that did not wait came first."""
        if self.model.is_busy(session_id):
            return
        entry = self.model.request(session_id)
        self.give_up_lease(session_id)
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
        mine = [
            name for name, each in self.model.alive().items() if each.data.user_id == user and name != keep
        ]
        assert self.run(self.store.delete_for_user(user, keep)) == len(mine)
        for name in mine:
            self.model.delete(name)

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

    @rule(
        session_id=ids,
        content=contents,
        absolute=st.sampled_from([None, 2500.5, 5500.5]),
        idle=st.sampled_from([None, 1500.5]),
        lock=st.booleans(),
    )
    def create(
        self, session_id: str, content: dict[str, Any], absolute: float | None, idle: float | None, lock: bool
    ) -> None:
        """Never over another."""
        if (absolute, idle) == (None, None) or (lock and session_id in self.model.leases):
            return
        data = SessionData(session_id=session_id, **copy.deepcopy(content))
        lifetime = Lifetime(absolute, idle)
        created = self.run(self._create(data, lifetime, POLICY if lock else None))
        assert (created is None) is (self.model.find(session_id) is not None)
        if created is not None:
            self.model.put(data, absolute or math.inf, idle or math.inf)
            self.took(created, lock)

    async def _create(
        self, data: SessionData, lifetime: Lifetime, lock: LockPolicy | None
    ) -> Checkout | None:
        created = await self.store.create(data.session_id, encode_checked(data), lifetime, lock)
        if created is not None and data.user_id is not None:
            await self.store.link_user(data.user_id, data.session_id, lifetime)
        return created

    def took(self, real: Checkout, lock: bool) -> None:
        entry = self.model.entries[real.session_id]
        assert (real.token is not None) is lock
        data = decode(SessionData, real.record)
        assert told(data) == told(entry.data)
        left = entry.expires - self.model.now
        assert real.expires_in == (None if left == math.inf else pytest.approx(left, abs=30))
        out = Out(real, real.session_id, entry.version, lock, data)
        if lock:
            self.model.leases[real.session_id] = Lease(out, self.model.now + LEASE)
        self.outs.append(out)

    @rule(session_id=ids, lock=st.booleans())
    def checkout(self, session_id: str, lock: bool) -> None:
        """Locks and loads; why not, where there is nothing to load."""
        work = self.store.checkout(session_id, POLICY if lock else None, None)
        if lock and self.model.is_busy(session_id) and self.counts_as_request(session_id):
            with pytest.raises(LockTimeoutError):
                self.run(work)
            return
        taken, entry = self.run(work), self.model.request(session_id)
        if lock:
            self.give_up_lease(session_id)
        if entry is not None:
            assert isinstance(taken, Checkout)
            self.run(self.store.keep_alive(taken))
            self.took(taken, lock)
            return
        retired = self.model.retired.get(session_id, 0) > self.model.now
        assert taken is (Missing.RETIRED if retired else Missing.ABSENT)

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
        assert outcome in self.model.judge(out)
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

    def after(self, out: Out, release: bool) -> None:
        """A checkout that has lost its token was let go by the store."""
        if release or (out.locked and out.real.token is None):
            assert out.real.token is None
            self.model.let_go(out)
            self.outs.remove(out)

    @rule(number=st.integers(0, 5), retire=st.booleans())
    def discard(self, number: int, retire: bool) -> None:
        """Deletes what was checked out, under the same conditions."""
        out = self.out(number)
        if out is None:
            return
        expected = self.model.judge(out)
        there = self.model.find(out.session_id) is not None
        outcome = self.run(self.store.discard(out.real, retire=retire))
        taken_for_a_retry = self.in_redis and not there and out.session_id in self.model.retired
        assert outcome in expected or taken_for_a_retry  # see the last test of this module
        if outcome is Outcome.STORED and there:
            self.model.delete(out.session_id)
            if retire:
                self.model.retired[out.session_id] = self.model.now + RETIRED_FOR
        self.after(out, True)

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
        if owned and lease is not None and self.in_redis:
            lease.ends = self.model.now + LEASE

    # -- time --------------------------------------------------------------------------------------

    @rule(seconds=st.sampled_from([27.0, 1000.0]))
    def pass_time(self, seconds: float) -> None:
        """By the store's clock."""
        self.move_clock(seconds)
        self.model.now += seconds
        if self.in_redis:
            self.model.leases = {
                name: lease for name, lease in self.model.leases.items() if lease.ends > self.model.now
            }

    def move_clock(self, seconds: float) -> None:
        raise NotImplementedError

    # -- what holds at every moment ----------------------------------------------------------------

    @invariant()
    def the_store_holds_what_the_model_says(self) -> None:
        """All that is alive, nothing else, each under its own user."""
        alive = self.model.alive()
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

    room = 2

    def make_store(self) -> SessionStore:
        self.clock = Clock()
        return InMemorySessionStore(2, DEFAULT_TTL, clock=self.clock)

    def move_clock(self, seconds: float) -> None:
        self.clock.now += seconds

    @invariant()
    def the_order_is_that_of_activity(self) -> None:
        """What goes first when room is needed is the same, and the heap of ends does not grow."""
        assert isinstance(self.store, InMemorySessionStore)
        alive = self.model.alive()
        assert [name for name in self.store._entries if name in alive] == list(alive)
        assert len(self.store._ends) <= 2 * len(self.store._entries) + 65

    def leaves_nothing(self) -> None:
        assert len(self.store._locks) == 0
        self.clock.now += 1e9
        assert self.run(self.store.count_active()) == 0
        assert isinstance(self.store, InMemorySessionStore)
        assert not self.store._entries
        assert not self.store._users


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
  elseif kind == 'zset' then
    for _, member in ipairs(redis.call('ZRANGE', key, 0, -1)) do
      redis.call('ZINCRBY', key, -by, member)
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

    in_redis = True
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
