"""The lock between processes, in any order of events: taken, lost, handed over, abandoned, killed.

A process here is a store with an event loop of its own, which runs only when a rule lets it: in between it is
frozen, with all that Redis sent it unread. Redis itself is asked who holds the lock, so the model needs no
clock: a lease ends when a rule deletes its key, and never by itself.
"""

from __future__ import annotations

import abc
import asyncio
import contextlib
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import pytest
from hypothesis import note
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from redis import Redis
from redis.asyncio import Redis as AsyncRedis
from redis_server import RedisServer

from asgi_sessions import SessionData
from asgi_sessions.errors import LockAcquisitionError, LockReleaseError, SessionStoreError
from asgi_sessions.record.codec import decode, encode_checked
from asgi_sessions.stores.checkout import Checkout, LockPolicy, Missing, Outcome
from asgi_sessions.stores.redis.event_loop import states_for
from asgi_sessions.stores.redis.lock import DistributedLock
from asgi_sessions.stores.redis.store import RedisSessionStore
from fuzz import effort, explore

POLICY = LockPolicy(timeout=30, wait=60)
LEASE_MS = 30_000
ROUNDS = 5  # of question and answer in which a process has taken in what was sent to it
IN_DOUBT = "in doubt"
G = TypeVar("G")
T = TypeVar("T")

# --- processes ------------------------------------------------------------------------------------------


def token_of(value: str) -> str:
    """The token of a lock or a place in the queue; behind it stands who that is."""
    return value.partition(".")[0]


@dataclass(eq=False)
class Contender(Generic[G]):
    """One task that wants the lock; `number` in the order of their beginnings."""

    process: Process[G]
    number: int
    task: asyncio.Task[G | None]
    grip: G | None = None
    over: bool = False
    leaving: bool = False  # cancelled, and perhaps not gone yet

    @property
    def waits(self) -> bool:
        return not self.over and self.grip is None and not self.task.done()

    @property
    def holds(self) -> bool:
        return not self.over and self.grip is not None


class Process(abc.ABC, Generic[G]):
    """A client of its own on an event loop of its own."""

    def __init__(self, url: str, name: str) -> None:
        self.loop = asyncio.new_event_loop()
        self.name = name
        self.url = f"{url}?client_name={name}"
        self.alive = True
        self.tasks: list[asyncio.Task[Any]] = []
        self.disturbed = False  # its connections were closed since it last ran

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self.loop.run_until_complete(work)

    def spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Let it run whenever the process does."""
        task = self.loop.create_task(work)
        self.tasks.append(task)
        return task

    async def _settled(self) -> None:
        if self.disturbed:
            await asyncio.sleep(0.07)  # a subscription that was lost twice within a second is in no hurry
            self.disturbed = False
        for _ in range(ROUNDS):
            with contextlib.suppress(SessionStoreError):  # the connection was closed while it was made
                await self.ask()
            for _ in range(5):
                await asyncio.sleep(0)

    def settle(self) -> None:
        """Run until everything that was sent is read and answered."""
        self.run(self._settled())

    def tick(self, ticks: int) -> None:
        """Run a little, perhaps to the middle of something."""

        async def pass_ticks() -> None:
            for _ in range(ticks):
                await asyncio.sleep(0)

        self.run(pass_ticks())

    def end(self) -> None:
        """Close everything, whatever is under way."""

        async def finish() -> None:
            for task in self.tasks:
                task.cancel()
            await asyncio.gather(*self.tasks, return_exceptions=True)
            await self.aclose()

        self.run(finish())
        self.run(self.loop.shutdown_asyncgens())
        self.loop.close()

    @abc.abstractmethod
    async def take(self) -> G | None:
        """The lock, None where there is nothing to lock."""

    @abc.abstractmethod
    def token(self, grip: G) -> str | None: ...

    @abc.abstractmethod
    async def let_go(self, grip: G) -> bool | None:
        """Release; whether it was held, None where nobody says."""

    @abc.abstractmethod
    async def renew(self, grip: G) -> bool: ...

    @abc.abstractmethod
    async def ask(self) -> None:
        """One question to Redis and its answer."""

    @abc.abstractmethod
    async def aclose(self) -> None: ...


class SessionProcess(Process[Checkout]):
    """Checks the session `s` out."""

    def __init__(self, url: str, name: str) -> None:
        super().__init__(url, name)
        self.store = RedisSessionStore(self.url)

    async def take(self) -> Checkout | None:
        taken = await self.store.checkout("s", POLICY, None)
        return None if isinstance(taken, Missing) else taken

    def token(self, grip: Checkout) -> str | None:
        return grip.token

    async def let_go(self, grip: Checkout) -> bool | None:
        await self.store.release(grip)
        return None

    async def renew(self, grip: Checkout) -> bool:
        return (await self.store.renew([grip]))[0]

    async def ask(self) -> None:
        await self.store.exists("fence")

    async def aclose(self) -> None:
        await self.store.aclose()


class LockProcess(Process[DistributedLock]):
    """Acquires the lock `s`."""

    def __init__(self, url: str, name: str) -> None:
        super().__init__(url, name)
        self.client = AsyncRedis.from_url(self.url)
        self.states = states_for(self.client)

    async def take(self) -> DistributedLock | None:
        lock = DistributedLock(self.client, "s", POLICY.timeout, retry_attempts=2, retry_delay=60)
        assert await lock.acquire()
        return lock

    def token(self, grip: DistributedLock) -> str | None:
        return grip.lock_id

    async def let_go(self, grip: DistributedLock) -> bool | None:
        return await grip.release()

    async def renew(self, grip: DistributedLock) -> bool:
        return await grip.renew()

    async def ask(self) -> None:
        state = await self.states.get()
        await state.commands.command(b"EXISTS", b"fence")

    async def aclose(self) -> None:
        await self.states.aclose()
        await self.client.aclose()


# --- what both locks promise -------------------------------------------------------------------------------

which = st.integers(0, 7)


@dataclass
class Seen:
    """Every token that ever held the lock, in order."""

    tokens: list[str] = field(default_factory=list)

    def note(self, token: str | None) -> None:
        if token is None or (self.tokens and self.tokens[-1] == token):
            return
        assert token not in self.tokens, "a token that had lost the lock holds it again"
        self.tokens.append(token)


class LockMachine(RuleBasedStateMachine, Generic[G]):
    """Two to four processes and whoever among them wants the lock."""

    one_queue = True  # for all processes; False: the lock passes within a process first

    url = ""
    process_class: type[Process[G]]
    lock_key = queue_key = ""

    def __init__(self) -> None:
        super().__init__()
        self.raw: Redis = Redis.from_url(self.url, decode_responses=True)
        self.raw.flushall()
        self.processes: list[Process[G]] = []
        self.contenders: list[Contender[G]] = []
        self.seen = Seen()
        self.served: list[int] = []
        self.orderly = self.broken = False

    @initialize(number=st.integers(2, 4), orderly=st.booleans())
    def begin(self, number: int, orderly: bool) -> None:
        """The processes start; one holds and one waits. In an orderly world nothing breaks."""
        self.orderly = orderly
        self.processes = [self.process_class(self.url, f"process-{n}") for n in range(number)]
        for each in (0, 1):
            self.want(each, None)

    # -- what Redis says ---------------------------------------------------------------------------

    def holder(self) -> str | None:
        found = self.raw.get(self.lock_key)
        return None if found is None else token_of(str(found))

    def queue(self) -> list[tuple[str, str]]:
        """Channel and token of each who is queued."""
        entries = [str(entry).split(" ") for entry in self.raw.lrange(self.queue_key, 0, -1)]
        return [(channel, token_of(token)) for _, channel, token in entries]

    def successor(self) -> str | None:
        """The first in the queue whom a message reaches: the next holder if the lock is let go now."""
        heard = dict(self.raw.pubsub_numsub(*[channel for channel, _ in self.queue()] or ["none"]))
        untold = "-"  # asks by itself
        return next((token for channel, token in self.queue() if channel == untold or heard[channel]), None)

    def listens(self, process: Process[G]) -> bool:
        """Whether a process has a subscription."""
        return process.name in [client["name"] for client in self.raw.client_list(_type="pubsub")]

    def kill(self, process: Process[G], only: str = "") -> None:
        """Close a process's connections, seen from Redis."""
        for client in self.raw.client_list(_type=only or None):
            if client["name"] == process.name:
                self.raw.client_kill_filter(_id=client["id"])
        process.disturbed = self.broken = True

    # -- choosing ----------------------------------------------------------------------------------

    def live(self, number: int) -> Process[G] | None:
        alive = [process for process in self.processes if process.alive]
        return alive[number % len(alive)] if alive else None

    def one(self, number: int, *, waits: bool = False, holds: bool = False) -> Contender[G] | None:
        fits = [
            each
            for each in self.contenders
            if each.process.alive and ((waits and each.waits) or (holds and each.holds))
        ]
        return fits[number % len(fits)] if fits else None

    def look(self) -> None:
        """Take note of who has got the lock meanwhile."""
        for each in self.contenders:
            if not each.over and each.grip is None and each.task.done():
                each.grip = _taken(each.task)
                each.over = each.grip is None
                assert each.grip is not None or each.leaving or not self.orderly, "it was never served"
                if each.grip is not None:
                    self.served.append(each.number)

    # -- rules -------------------------------------------------------------------------------------

    @rule(number=which, ticks=st.none() | st.integers(0, 6))
    def want(self, number: int, ticks: int | None) -> None:
        """Somebody wants the lock: gets it if it is free, else a place in the queue."""
        process = self.live(number)
        if process is None or len(self.contenders) > 12:
            return
        free = self.holder() is None and not any(
            each.waits or (each.holds and each.process is process and not self.one_queue)
            for each in self.contenders
        )  # who waits behind a holder of its own process learns with that one that its lease has ended
        task = process.spawn(process.take())
        contender = Contender(process, len(self.contenders), task)
        self.contenders.append(contender)
        if ticks is not None and not self.orderly:
            process.tick(ticks)
            return
        process.settle()
        for _ in range(100 if self.orderly and self.one_queue else 0):
            if task.done() or self.listens(process):  # nobody is queued before the subscription is there
                process.settle()
                break
            process.settle()
        self.look()
        assert not (free and contender.waits), "the lock was free, and nobody else wanted it"

    @rule(number=which)
    def thaw(self, number: int) -> None:
        """A process that was frozen runs on."""
        process = self.live(number)
        if process is not None:
            process.settle()

    @rule(number=which, ticks=st.integers(1, 4))
    def stir(self, number: int, ticks: int) -> None:
        """A process runs for a moment."""
        process = self.live(number)
        if process is not None:
            process.tick(ticks)

    @rule(number=which)
    def let_go(self, number: int) -> None:
        """A holder releases: the lock goes to the first live waiter, unless it was lost before."""
        contender = self.one(number, holds=True)
        if contender is None or contender.grip is None:
            return
        self.hand_over(contender, contender.process.let_go(contender.grip))

    def attempt(self, process: Process[G], work: Coroutine[Any, Any, Any]) -> Any:
        """What it answers; `IN_DOUBT` where the connection was lost once too often."""
        try:
            return process.run(work)
        except (SessionStoreError, LockReleaseError):
            assert self.broken
            return IN_DOUBT

    def hand_over(
        self, contender: Contender[G], work: Coroutine[Any, Any, Any], by_commit: bool = False
    ) -> Any:
        """Run what lets the lock go, and see that it went where it should.

        A commit that finds the lock free, as its lease has run out, passes it on like one that held it.
        """
        assert contender.grip is not None
        owned = self.holder() == contender.process.token(contender.grip)
        passes_on = owned or (by_commit and self.holder() is None)
        expected = self.successor() if passes_on else self.holder()
        shifting = any(each.leaving and not each.task.done() for each in self.contenders)
        contender.over = True
        found = self.attempt(contender.process, work)
        contender.process.settle()
        assert found in (None, owned, IN_DOUBT) or isinstance(found, Outcome)
        if (
            self.holder() != expected and not shifting and found != IN_DOUBT
        ):  # one of this process may have asked again just now
            assert self.holds_now(contender.process), "the lock did not go to the first live waiter"
        return found

    def holds_now(self, process: Process[G]) -> bool:
        """Whether a contender of this process is the holder."""
        self.look()
        grips = [each.grip for each in self.contenders if each.process is process and each.holds]
        return self.holder() in [process.token(grip) for grip in grips if grip is not None]

    @rule(number=which)
    def prolong(self, number: int) -> None:
        """A renewal says whether the lock is still held."""
        contender = self.one(number, holds=True)
        if contender is None or contender.grip is None:
            return
        owned = self.holder() == contender.process.token(contender.grip)
        renewed = self.attempt(contender.process, contender.process.renew(contender.grip))
        assert renewed in (owned, IN_DOUBT)
        if not owned and contender.process.token(contender.grip) is None:
            contender.over = True

    @precondition(lambda self: not self.orderly)
    @rule()
    def lease_ends(self) -> None:
        """The holder, or who should have taken the lock up, was too slow."""
        self.raw.delete(self.lock_key)

    @rule(number=which, settle=st.booleans())
    def give_up(self, number: int, settle: bool) -> None:
        """Who waits is cancelled, at whatever moment."""
        contender = self.one(number, waits=True)
        if contender is None:
            return
        contender.task.cancel()
        contender.leaving = True
        if settle:
            contender.process.settle()
            self.look()
            assert contender.task.done()

    @precondition(lambda self: not self.orderly)
    @rule(number=which, only=st.sampled_from(["", "pubsub", "normal"]))
    def lose_connections(self, number: int, only: str) -> None:
        """The network fails; the process is to find out."""
        process = self.live(number)
        if process is not None:
            self.kill(process, only)

    @precondition(lambda self: not self.orderly and len([p for p in self.processes if p.alive]) > 1)
    @rule(number=which)
    def die(self, number: int) -> None:
        """Killed, and never heard of again."""
        process = self.live(number)
        if process is not None:
            self.kill(process)
            process.alive = False

    # -- what holds at every moment ----------------------------------------------------------------

    @invariant()
    def no_key_is_for_ever(self) -> None:
        """Lock and queue end by themselves if everybody is killed."""
        for key in (self.lock_key, self.queue_key):
            assert self.raw.pttl(key) != -1

    @invariant()
    def tokens_are_unique(self) -> None:
        """One token holds at a time, each of them once; no two contenders have the same."""
        self.seen.note(self.holder())
        self.look()
        grips = [(each.process, each.grip) for each in self.contenders if each.holds]
        tokens = [token for process, grip in grips if grip and (token := process.token(grip))]
        assert len(set(tokens)) == len(tokens)
        places = [token for _, token in self.queue()]
        assert len(set(places)) == len(places)
        assert not set(places) & set(self.seen.tokens)

    @invariant()
    def first_come_first_served(self) -> None:
        """Where nothing breaks, in the order of arrival: all together, or each process in itself."""
        self.look()
        for group in [self.processes] if self.one_queue else [[each] for each in self.processes]:
            served = [number for number in self.served if self.contenders[number].process in group]
            assert not self.orderly or served == sorted(served)

    @invariant()
    def time_stands_still(self) -> None:
        """No lease ends but by a rule."""
        self.raw.pexpire(self.lock_key, LEASE_MS)

    # -- the end -----------------------------------------------------------------------------------

    def teardown(self) -> None:
        """Everybody who waits is served in the end, and nothing is left."""
        try:
            if self.processes:
                self.serve_all()
                self.leaves_nothing()
        finally:
            for process in self.processes:
                process.end()
            self.raw.close()

    def serve_all(self) -> None:
        for attempt in range(60):
            for process in self.processes:
                if process.alive:
                    process.settle()
            self.look()
            self.tokens_are_unique()
            self.first_come_first_served()
            holder = self.one(0, holds=True)
            if holder is not None and holder.grip is not None:
                self.hand_over(holder, holder.process.let_go(holder.grip))
                continue
            if not any(each.waits and each.process.alive for each in self.contenders):
                return
            if attempt % 2:  # held by somebody dead, or by a claim that nobody took up
                self.lease_ends()
                for process in self.processes:
                    if process.alive:
                        self.kill(process, "pubsub")  # whoever waits asks again
        waiting = [each.number for each in self.contenders if each.waits and each.process.alive]
        pytest.fail(f"the contenders {waiting} were never served")

    def leaves_nothing(self) -> None:
        if self.broken:
            self.lease_ends()  # who could not say that it let go holds it until then; the next one clears up
            process = self.live(0)
            assert process is not None
            grip = process.run(process.take())
            if grip is not None:
                process.run(process.let_go(grip))
                process.settle()
        note(f"left: {self.raw.keys()}")
        assert self.holder() is None
        assert self.queue() == []


class DistributedLockMachine(LockMachine[DistributedLock]):
    """`DistributedLock`."""

    process_class = LockProcess
    lock_key, queue_key = "lock:s", "{lock:s}:wait"


class SessionLockMachine(LockMachine[Checkout]):
    """Sessions: what was acknowledged is in the record, in order, and nothing else is."""

    one_queue = False

    process_class = SessionProcess
    lock_key, queue_key = "session:{s}:lock", "session:{s}:wait"

    def __init__(self) -> None:
        super().__init__()
        self.acknowledged: list[int] = []
        self.numbers = 0
        self.writer = SessionProcess(self.url, "writer")
        self.put()

    def put(self) -> None:
        data = SessionData(session_id="s", metadata={"log": self.acknowledged})
        self.writer.run(self.writer.store.set("s", data, 600))

    def next(self) -> int:
        self.numbers += 1
        return self.numbers

    def logged(self) -> list[int] | None:
        data: SessionData | None = self.writer.run(self.writer.store.get("s"))
        return None if data is None else list(data.metadata["log"])

    def changed(self, grip: Checkout, number: int) -> bytes:
        data = decode(SessionData, grip.record)
        data.metadata["log"].append(number)
        return encode_checked(data)

    def accepts(self, grip: Checkout) -> bool:
        """Whether a commit has to be stored: nobody else has the lock, and the version is what it was."""
        value = str(self.raw.get("session:{s}") or "")
        return self.holder() in (None, grip.token) and value[6:64] == grip.version

    @rule(number=which, release=st.booleans())
    def commit(self, number: int, release: bool) -> None:
        """A holder writes: stored exactly if nobody else holds the lock and nobody wrote since."""
        contender = self.one(number, holds=True)
        if contender is None or contender.grip is None:
            return
        grip, entry, store = contender.grip, self.next(), self._store_of(contender)
        accepted = self.accepts(grip)
        work = store.commit(grip, self.changed(grip, entry), release=release)
        outcome = self.hand_over(contender, work, True) if release else self.attempt(contender.process, work)
        self.judge(entry, outcome, accepted)
        contender.over = release or grip.token is None or outcome == IN_DOUBT
        if outcome == IN_DOUBT and not release:  # the request is answered 503, and lets go
            contender.process.run(store.release(grip))
            contender.process.settle()

    @precondition(lambda self: not self.orderly)
    @rule(number=which, release=st.booleans(), serve=st.booleans())
    def commit_late(self, number: int, release: bool, serve: bool) -> None:
        """The lease has ended before the commit, and perhaps another has the lock."""
        if self.one(number, holds=True) is not None:
            self.lease_ends()
            if serve:
                self.want(number, None)
            self.commit(number, release)

    def judge(self, entry: int, outcome: Outcome | str, accepted: bool) -> None:
        """STORED and in the record, refused and not in it, or nobody can tell."""
        now = self.logged()
        assert now in (self.acknowledged, [*self.acknowledged, entry])
        stored = now != self.acknowledged
        assert accepted or not stored, "a commit wrote that had to be refused"
        assert outcome in (IN_DOUBT, Outcome.LOST) or stored is (outcome is Outcome.STORED), f"{outcome}"
        assert self.broken or stored is accepted, f"{outcome} where {accepted=}"
        self.acknowledged = now or []

    @precondition(lambda self: not self.orderly)
    @rule(number=which, ticks=st.integers(1, 5), only=st.sampled_from(["", "normal"]))
    def commit_torn(self, number: int, ticks: int, only: str) -> None:
        """The connection is lost while the commit is under way: told STORED, it is; else it may be."""
        contender = self.one(number, holds=True)
        if contender is None or contender.grip is None:
            return
        grip, entry, process = contender.grip, self.next(), contender.process
        accepted = self.accepts(grip)
        work = self._store_of(contender).commit(grip, self.changed(grip, entry), release=True)
        task = process.spawn(work)
        process.tick(ticks)
        self.kill(process, only)
        contender.over = True
        process.settle()
        self.judge(entry, self.attempt(process, _result(task)), accepted)

    @rule(gone=st.booleans())
    def write_without_waiting(self, gone: bool) -> None:
        """`set` and `delete` wait for nobody; who waits for a session that is gone is told so."""
        if gone and not self.orderly:
            self.writer.run(self.writer.store.delete("s"))
            assert (self.holder(), self.queue()) == (None, [])
            self.acknowledged = []
        else:
            self.acknowledged = [*self.acknowledged, self.next()]
        self.put()

    @invariant()
    def the_record_is_what_was_acknowledged(self) -> None:
        """No acknowledged change is lost, none that was refused is there."""
        assert self.logged() == self.acknowledged

    def teardown(self) -> None:
        """As for all, and the writer ends too."""
        try:
            super().teardown()
        finally:
            self.writer.end()

    def leaves_nothing(self) -> None:
        super().leaves_nothing()
        assert self.raw.keys() == ["session:{s}"]

    def _store_of(self, contender: Contender[Checkout]) -> RedisSessionStore:
        assert isinstance(contender.process, SessionProcess)
        return contender.process.store


def _taken(task: asyncio.Task[G | None]) -> G | None:
    """What a task that is over has got: nothing if it took up too late what was handed to it."""
    if task.cancelled() or isinstance(task.exception(), (SessionStoreError, LockAcquisitionError)):
        return None
    return task.result()


async def _result(task: asyncio.Task[Any]) -> Any:
    return await task


@pytest.mark.parametrize("machine", [SessionLockMachine, DistributedLockMachine], ids=["session", "lock"])
def test_the_lock_keeps_its_promises(machine: type[LockMachine[Any]], redis_server: RedisServer) -> None:
    """One holder, first come first served, nothing lost and nothing left, whatever happens."""
    explore(machine, effort(12, steps=25), url=redis_server.url)


@pytest.mark.anyio
async def test_a_store_that_is_closed_while_somebody_waits_leaves_nothing(redis_url: str) -> None:
    """No task, no subscription and no place in the queue: the next hand-over would go to nobody."""
    holding, waiting = RedisSessionStore(redis_url), RedisSessionStore(redis_url)
    await holding.set("s", SessionData(session_id="s"))
    held = await holding.checkout("s", POLICY, None)
    assert isinstance(held, Checkout)
    with Redis.from_url(redis_url, decode_responses=True) as raw:
        task = asyncio.create_task(waiting.checkout("s", POLICY, None))
        while not raw.llen("session:{s}:wait"):  # noqa: ASYNC110  # Redis sets no Event
            await asyncio.sleep(0.001)
        before = asyncio.all_tasks() - {task}
        await waiting.aclose()
        await asyncio.wait((task,))
        assert task.exception() is not None
        left = asyncio.all_tasks() - before
        for each in left:
            each.cancel()
        await asyncio.gather(*left, return_exceptions=True)
        queue = raw.lrange("session:{s}:wait", 0, -1)
        await holding.release(held)
        await holding.aclose()
    assert (left, queue) == (set(), [])
