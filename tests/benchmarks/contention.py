"""Many who want the same session: how fast it goes from hand to hand, and what the dead and the frozen cost.

    python tests/benchmarks/contention.py [--rounds 9] [--json FILE] [--plot FILE]

50 tasks in 4 processes (13, 13, 12, 12) begin at one moment. Each locks the one session, reads a counter in
its record, holds it for 0 or 5 ms, writes the counter back increased by one, and is done. By

- ours: `checkout` and `commit` of our store;
- redis-py's `Lock` as it comes, which sleeps 0.1 s between two tries, around GET and SET;
- a lock that is tried three times, 0.1 s apart, and then given up, around the same.

A hand-off lasts from the moment at which one is done with its work (its write still to come) to the moment at
which the next has lock and record. Stamps are CLOCK_MONOTONIC's, which processes share. Commands are counted
by the server; those that write the record and let the lock go are left out. The counter tells lost updates:
it is to equal the number of those who were told that theirs was stored.

Then processes are killed and frozen while they hold the session or wait for it.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import itertools
import json
import multiprocessing
import os
import signal
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, NamedTuple, Protocol

from measure import (
    Cell,
    CommandCounts,
    Figures,
    Panel,
    Report,
    Samples,
    Table,
    Target,
    alternate,
    command_line,
    machine,
    parse,
    percentile,
    server_of,
)
from redis import Redis as Blocking
from redis.asyncio import Redis
from redis.asyncio.lock import Lock
from redis_server import RedisServer

from asgi_sessions import RedisSessionStore, SessionData
from asgi_sessions.errors import SessionLockError
from asgi_sessions.record.codec import encode
from asgi_sessions.stores.checkout import Checkout, Lifetime, LockPolicy, Outcome

SESSION = "contended"
OURS, LOCK, TRIES = "ours", "redis-py's Lock", "three tries"
HOLDS = (0.0, 0.005)  # seconds
CLAIM = 1.0  # seconds in which a waiter has to take up the lock, or the next one has it; at most the lease
LEASE = 10.0  # seconds; while nobody dies
HEAD_START = 0.1  # seconds from the command to the common start
PATIENCE = 60.0  # seconds for what must come, on however slow a machine


class Stamps(NamedTuple):
    """When a task had lock and record, was done with its work, and was told that it is stored; seconds."""

    had: float
    done: float
    told: float


# -- ways to lock a session ----------------------------------------------------------------------------------


class Way(Protocol):
    """One way to lock the session around a change of it; `calls_to_end` are those after the work is done."""

    calls_to_end: int

    async def lay(self) -> None:
        """Begin anew, with a counter of 0."""
        ...

    async def count(self) -> int:
        """What the counter says."""
        ...

    async def cycle(self, hold: float) -> Stamps | None:
        """Count one; None where that was refused."""
        ...


class Ours:
    calls_to_end = 1  # the commit lets go

    def __init__(self, store: RedisSessionStore) -> None:
        self._store = store

    async def lay(self) -> None:
        await self._store.set(SESSION, SessionData(session_id=SESSION))

    async def count(self) -> int:
        data = await self._store.get(SESSION)
        return -1 if data is None else data.message_count

    async def cycle(self, hold: float) -> Stamps | None:
        try:
            taken = await self._store.checkout(SESSION, LockPolicy(timeout=LEASE, wait=PATIENCE), LIFETIME)
        except SessionLockError:
            return None
        assert isinstance(taken, Checkout)
        data = self._store.read(taken.record)
        had = time.monotonic()
        if hold:
            await asyncio.sleep(hold)
        data.message_count += 1
        done = time.monotonic()
        outcome = await self._store.commit(taken, encode(data), release=True)
        return Stamps(had, done, time.monotonic()) if outcome is Outcome.STORED else None


class RedisPyLock:
    calls_to_end = 2  # SET, and the script that lets go

    def __init__(self, client: Redis) -> None:
        self._client = client

    async def lay(self) -> None:
        await self._client.set(f"plain:{SESSION}", json.dumps({"n": 0, "filling": "x" * 280}))

    async def count(self) -> int:
        return int((await self._load())["n"])

    async def _load(self) -> dict[str, Any]:
        value = await self._client.get(f"plain:{SESSION}")
        assert value is not None
        record: dict[str, Any] = json.loads(value)
        return record

    async def acquire(self, lock: Lock) -> bool:
        return bool(await lock.acquire())

    async def cycle(self, hold: float) -> Stamps | None:
        lock = Lock(self._client, f"plain:{SESSION}:lock", timeout=LEASE)
        if not await self.acquire(lock):
            return None
        record = await self._load()
        had = time.monotonic()
        if hold:
            await asyncio.sleep(hold)
        record["n"] += 1
        done = time.monotonic()
        await self._client.set(f"plain:{SESSION}", json.dumps(record), keepttl=True)
        await lock.release()
        return Stamps(had, done, time.monotonic())


class ThreeTries(RedisPyLock):
    async def acquire(self, lock: Lock) -> bool:
        for _ in range(2):
            if await lock.acquire(blocking=False):
                return True
            await asyncio.sleep(0.1)
        return bool(await lock.acquire(blocking=False))


LIFETIME = Lifetime(absolute=3600)


# -- a process -----------------------------------------------------------------------------------------------


class Worker:
    """What a process does on the word of the one that started it: a command is a method and its arguments."""

    def __init__(self, url: str, lease: float) -> None:
        self._store = RedisSessionStore(url)
        self._client = Redis.from_url(url)
        self._policy = LockPolicy(timeout=lease, wait=PATIENCE)
        self._taken: Checkout | None = None
        lock, tries = RedisPyLock(self._client), ThreeTries(self._client)
        self._ways: dict[str, Way] = {OURS: Ours(self._store), LOCK: lock, TRIES: tries}

    async def storm(self, way: str, hold: float, tasks: int, begin: float) -> list[Stamps | None]:
        """So many cycles, all from the moment `begin` on."""
        each = self._ways[way]
        gc.collect()

        async def one() -> Stamps | None:
            await asyncio.sleep(begin - time.monotonic())
            return await each.cycle(hold)

        return await asyncio.gather(*[one() for _ in range(tasks)])

    async def lay(self, way: str) -> None:
        await self._ways[way].lay()

    async def count(self, way: str) -> int:
        return await self._ways[way].count()

    async def take(self) -> float:
        """Have lock and record; when."""
        taken = await self._store.checkout(SESSION, self._policy, LIFETIME)
        had = time.monotonic()
        assert isinstance(taken, Checkout)
        self._taken = taken
        return had

    async def give(self) -> tuple[float, bool]:
        """Count one and let go; when that began, and whether it was stored."""
        assert self._taken is not None
        data = self._store.read(self._taken.record)
        data.message_count += 1
        began = time.monotonic()
        outcome = await self._store.commit(self._taken, encode(data), release=True)
        return began, outcome is Outcome.STORED

    async def close(self) -> None:
        await self._store.aclose()
        await self._client.aclose()


def work(line: Connection, url: str, lease: float) -> None:
    """A process's whole life: it ends with None, or when the one that started it has gone."""

    async def serve() -> None:
        worker, loop = Worker(url, lease), asyncio.get_running_loop()
        try:
            while (command := await loop.run_in_executor(None, line.recv)) is not None:
                name, *arguments = command
                line.send(await getattr(worker, name)(*arguments))
        except EOFError:
            pass
        finally:
            await worker.close()

    asyncio.run(serve())


class Remote:
    """A worker in a process of its own."""

    def __init__(self, url: str, lease: float = LEASE) -> None:
        spawning = multiprocessing.get_context("spawn")
        self._line, theirs = spawning.Pipe()
        self._process = spawning.Process(target=work, args=(theirs, url, lease), daemon=True)
        self._process.start()
        theirs.close()

    def tell(self, command: str, *arguments: object) -> None:
        """Have it begin; `answer` tells what came of it."""
        self._line.send((command, *arguments))

    def answer(self) -> Any:
        """What the command gave, of which the worker knows the type."""
        if not self._line.poll(PATIENCE):
            raise RuntimeError(f"a process did not answer within {PATIENCE:g} seconds")
        try:
            return self._line.recv()
        except EOFError:
            raise RuntimeError("a process ended before it answered; it has printed why") from None

    def ask(self, command: str, *arguments: object) -> Any:
        self.tell(command, *arguments)
        return self.answer()

    @property
    def alive(self) -> bool:
        return self._process.is_alive()

    def signal(self, number: int) -> None:
        assert self._process.pid is not None
        os.kill(self._process.pid, number)

    def kill(self) -> None:
        """End it at once, and wait until it is gone, its connections too."""
        self._process.kill()
        self._process.join()

    def close(self) -> None:
        if self.alive:
            self.signal(signal.SIGCONT)
            self._line.send(None)
            self._process.join(5)
            self._process.kill()
            self._process.join()
        self._line.close()


class Company:
    """As many processes as are asked for, each with the same lease; who is dead is replaced."""

    def __init__(self, url: str, lease: float = LEASE) -> None:
        self._url = url
        self._lease = lease
        self._members: list[Remote] = []

    def __enter__(self) -> Company:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for member in self._members:
            member.close()

    def call(self, number: int) -> list[Remote]:
        """So many, all up and connected; the session begins anew."""
        self._members = [member for member in self._members if member.alive]
        while len(self._members) < number:
            self._members.append(Remote(self._url, self._lease))
        for member in self._members[:number]:
            member.tell("lay", OURS)
        for member in self._members[:number]:
            member.answer()
        return self._members[:number]


# -- the storm -----------------------------------------------------------------------------------------------


class Storms:
    """What was measured, one storm after the other."""

    def __init__(self, workers: Sequence[Remote], tasks: Sequence[int], counts: CommandCounts) -> None:
        self.hand_offs: dict[tuple[str, float], list[float]] = defaultdict(list)  # seconds
        self.turns: dict[
            tuple[str, float], list[float]
        ] = {}  # ms from the start to each turn, of the last one
        self._workers = workers
        self._tasks = tasks
        self._counts = counts

    async def one(self, way: str, hold: float) -> Figures:
        self._workers[0].ask("lay", way)
        self._counts.reset()
        begin = time.monotonic() + HEAD_START
        for worker, tasks in zip(self._workers, self._tasks, strict=True):
            worker.tell("storm", way, hold, tasks, begin)
        all_of_them = list(itertools.chain.from_iterable(worker.answer() for worker in self._workers))
        calls = self._counts.calls()
        counted = self._workers[0].ask("count", way)
        return self._figures(way, hold, begin, all_of_them, calls, counted)

    def _figures(
        self,
        way: str,
        hold: float,
        begin: float,
        all_of_them: Sequence[Stamps | None],
        calls: Mapping[str, int],
        counted: int,
    ) -> Figures:
        stored = sorted((each for each in all_of_them if each is not None), key=lambda each: each.had)
        waits = [each.had - begin for each in stored]
        hand_offs = [after.had - before.done for before, after in itertools.pairwise(stored)]
        self.hand_offs[way, hold] += hand_offs
        self.turns[way, hold] = [wait * 1000 for wait in waits]
        return {
            "total": (max(each.told for each in stored) - begin) * 1000,
            "failures": len(all_of_them) - len(stored),
            "lost": len(stored) - counted,
            "overlaps": sum(hand_off < 0 for hand_off in hand_offs),
            "hold": statistics.median(each.done - each.had for each in stored) * 1000,
            "calls": calls_to_acquire(way, calls, len(stored)) / len(stored),
            "unfair": max(waits) / statistics.median(waits),
        }


def calls_to_acquire(way: str, calls: Mapping[str, int], stored: int) -> int:
    """Commands that clients sent, without those that ended a cycle and those that scripts called."""
    sent = {name: calls.get(name, 0) for name in ("evalsha", "eval", "subscribe", "set", "get")}
    if way == OURS:
        return sent["evalsha"] + sent["eval"] + sent["subscribe"] - stored
    return sent["set"] - stored + sent["get"] - (sent["evalsha"] + sent["eval"])


def shares(tasks: int, processes: int) -> list[int]:
    """13, 13, 12, 12."""
    return [tasks // processes + (number < tasks % processes) for number in range(processes)]


async def storm(url: str, options: argparse.Namespace) -> tuple[Storms, dict[float, Samples]]:
    counts = CommandCounts(url)
    measured = {}
    with Company(url) as company:
        workers = company.call(options.processes)
        storms = Storms(workers, shares(options.tasks, options.processes), counts)
        for hold in HOLDS:
            turns = {way: partial(storms.one, way, hold) for way in (OURS, LOCK, TRIES)}
            measured[hold] = await alternate(turns, options.rounds)
    counts.close()
    return storms, measured


# -- the dead and the frozen ---------------------------------------------------------------------------------


class Scenes:
    """One session; a holder, sometimes a victim that waits first, and the next who waits behind.

    `lost` counts changes that were told to be stored and are not there, `stale` those that were stored though
    another had the lock since. A scene gives what the next one waited, in seconds.
    """

    def __init__(self, url: str, company: Company) -> None:
        self.lost = 0
        self.stale = 0
        self._company = company
        self._client = Blocking.from_url(url)

    def hand_off(self) -> float:
        """Nothing happens to anybody: the yardstick."""
        with self._cast(2) as (holder, following):
            self._queue(holder, following)
            return self._pass_on(holder, following)

    def killed_waiter(self) -> float:
        with self._cast(3) as (holder, victim, following):
            self._queue(holder, victim, following)
            victim.kill()
            return self._pass_on(holder, following)

    def frozen_waiter(self) -> float:
        """Thawed, it has to wait for its turn like anybody else."""
        with self._cast(3) as (holder, victim, following):
            self._queue(holder, victim, following)
            victim.signal(signal.SIGSTOP)
            took = self._pass_on(holder, following)
            victim.signal(signal.SIGCONT)
            victim.answer()
            self._give(victim)
            return took

    def killed_holder(self) -> float:
        with self._cast(2) as (holder, following):
            self._queue(holder, following)
            began = time.monotonic()
            holder.kill()
            had: float = following.answer()
            self._give(following)
            return had - began

    def frozen_holder(self) -> float:
        """Thawed when another has written, it must not write over that."""
        with self._cast(2) as (holder, following):
            self._queue(holder, following)
            began = time.monotonic()
            holder.signal(signal.SIGSTOP)
            had: float = following.answer()
            self._give(following)
            holder.signal(signal.SIGCONT)
            stored = self._stored
            self._give(holder)
            self.stale += self._stored - stored
            return had - began

    @contextmanager
    def _cast(self, number: int) -> Iterator[list[Remote]]:
        self._client.flushdb()
        self._stored = 0
        actors = self._company.call(number)
        yield actors
        self.lost += self._stored - actors[-1].ask("count", OURS)

    def _queue(self, holder: Remote, *waiting: Remote) -> None:
        """Each waits before the next comes."""
        holder.ask("take")
        for place, waiter in enumerate(waiting, start=1):
            waiter.tell("take")
            until = time.monotonic() + PATIENCE
            while self._client.llen(f"session:{{{SESSION}}}:wait") < place:
                if time.monotonic() > until:
                    raise RuntimeError("a process does not queue for the session")
                time.sleep(0.002)

    def _pass_on(self, holder: Remote, following: Remote) -> float:
        began = self._give(holder)
        had: float = following.answer()
        self._give(following)
        return had - began

    def _give(self, actor: Remote) -> float:
        began, stored = actor.ask("give")
        self._stored += stored
        return float(began)


class Costs(NamedTuple):
    """What each scene cost, each time that it was played, in ms; and what must be 0."""

    scenes: dict[str, list[float]]
    lost: int
    stale: int


def crash(url: str, options: argparse.Namespace) -> Costs:
    with Company(url, options.lease) as company:
        scenes = Scenes(url, company)
        each: dict[str, Callable[[], float]] = {
            "hand-off": scenes.hand_off,
            "killed waiter": scenes.killed_waiter,
            "frozen waiter": scenes.frozen_waiter,
            "killed holder": scenes.killed_holder,
            "frozen holder": scenes.frozen_holder,
        }
        took = {name: [scene() * 1000 for _ in range(options.scenes)] for name, scene in each.items()}
        return Costs(took, scenes.lost, scenes.stale)


# -- telling -------------------------------------------------------------------------------------------------


def named(hold: float) -> str:
    return f"{hold * 1000:g} ms"


def storm_table(storms: Storms, hold: float, samples: Samples) -> Table:
    columns = [
        f"held {named(hold)}", "total ms", "failures", "lost updates", "hand-off p50 ms", "p99 ms",
        "calls to acquire", "longest / median wait", "really held ms",
    ]  # fmt: skip
    rows: list[Sequence[Cell]] = []
    for way in (OURS, LOCK, TRIES):
        hand_offs = [seconds * 1000 for seconds in storms.hand_offs[way, hold]]
        rows.append(
            [
                way,
                samples.median(way, "total"),
                samples.median(way, "failures"),
                int(sum(samples.rounds(way, "lost"))),
                percentile(hand_offs, 0.5) if hand_offs else None,
                percentile(hand_offs, 0.99) if hand_offs else None,
                *[samples.median(way, figure) for figure in ("calls", "unfair", "hold")],
            ]
        )
    return Table(f"everybody wants one session and holds it for {named(hold)}", columns, rows)


def crash_table(costs: Costs, lease: float) -> Table:
    bound = {
        "hand-off": "nothing happened",
        "killed waiter": "it is passed over",
        "frozen waiter": f"its claim, {min(CLAIM, lease):g} s",
        "killed holder": f"what is left of its lease, at most {lease:g} s",
        "frozen holder": f"the same; its late commit {'is stored' if costs.stale else 'is refused'}",
    }
    rows: list[Sequence[Cell]] = [
        [name, statistics.median(took), max(took), bound[name]] for name, took in costs.scenes.items()
    ]
    rows += [["lost updates", costs.lost, None, ""], ["stale commits stored", costs.stale, None, ""]]
    columns = ["what happened before", "median ms", "worst ms", "what it costs"]
    return Table("how long the next one waits for lock and record", columns, rows)


def storm_targets(storms: Storms, measured: Mapping[float, Samples]) -> list[Target]:
    found = []
    for hold, samples in measured.items():
        at = f"held {named(hold)}, "
        hand_offs = [seconds * 1000 for seconds in storms.hand_offs[OURS, hold]]
        found += [
            Target(at + "failures", sum(samples.rounds(OURS, "failures")), "==", 0),
            Target(at + "lost updates", sum(samples.rounds(OURS, "lost")), "==", 0),
            Target(at + "two at once", sum(samples.rounds(OURS, "overlaps")), "==", 0),
            Target(at + "calls to acquire", samples.median(OURS, "calls"), "<=", 1.3, "per acquisition"),
            Target(at + "hand-off p50", percentile(hand_offs, 0.5), "<=", 0.4, "ms"),
            Target(at + "longest wait / median", samples.median(OURS, "unfair"), "<=", 2, "x"),
        ]
    return found


def crash_targets(costs: Costs, lease: float) -> list[Target]:
    claim = min(CLAIM, lease)
    took = {name: statistics.median(each) for name, each in costs.scenes.items()}
    return [
        Target("killed waiter, beyond a hand-off", took["killed waiter"] - took["hand-off"], "<=", 5, "ms"),
        Target("frozen waiter: its claim", took["frozen waiter"], "<=", claim * 1000, "ms"),
        Target("killed holder: its lease and 10 ms", took["killed holder"], "<=", lease * 1000 + 10, "ms"),
        Target("stale commits stored", costs.stale, "==", 0),
        Target("lost updates among the dead", costs.lost, "==", 0),
    ]


def panels(storms: Storms, measured: Mapping[float, Samples], tasks: int) -> list[Panel]:
    hold = HOLDS[-1]
    ways = (OURS, LOCK, TRIES)
    turns: dict[str, list[tuple[float, float]]] = {
        way: [(float(number), ms) for number, ms in enumerate(storms.turns[way, hold], start=1)]
        for way in ways
    }
    hand_offs = {
        f"p{share * 100:g}": [percentile(storms.hand_offs[way, hold] or [0], share) * 1000 for way in ways]
        for share in (0.5, 0.99)
    }
    total = {
        named(hold): [samples.median(way, "total") for way in ways] for hold, samples in measured.items()
    }
    gave_up = {way: measured[hold].median(way, "failures") for way in ways}
    called = [f"{way}\n({gave_up[way]:.0f} of {tasks} gave up)" if gave_up[way] else way for way in ways]
    ideal = (f"ideal for {named(hold)}", tasks * hold * 1000)
    return [
        Panel(f"The n-th turn, held {named(hold)}", "ms since the start", turns, "turn"),
        Panel("Until all are done or gave up", "ms", total, categories=called, log_y=True, reference=ideal),
        Panel(f"Hand-off, held {named(hold)}", "ms", hand_offs, categories=ways, log_y=True),
    ]


def options_of(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = command_line(__doc__, rounds=9)
    options = parse(parser, arguments)
    options.tasks, options.processes, options.lease, options.scenes = 50, 4, 2.0, 3
    if options.quick:
        options.rounds = options.scenes = 1
        options.tasks, options.processes, options.lease = 8, 2, 0.6
    return options


def main() -> None:
    options = options_of()
    with RedisServer() as server:
        facts = machine("redis", "hiredis", server=server_of(server.url))
        storms, measured = asyncio.run(storm(server.url, options))
        costs = crash(server.url, options)
    tables = [storm_table(storms, hold, samples) for hold, samples in measured.items()]
    targets = storm_targets(storms, measured)
    total = measured[HOLDS[-1]].median(OURS, "total")
    ideal = options.tasks * HOLDS[-1] * 1000
    targets.insert(
        0, Target(f"all {options.tasks} done, held {named(HOLDS[-1])}", total, "<=", ideal * 1.24, "ms")
    )
    Report(
        f"{options.tasks} tasks in {options.processes} processes, one session",
        facts,
        [*tables, crash_table(costs, options.lease)],
        [*targets, *crash_targets(costs, options.lease)],
        panels(storms, measured, options.tasks),
    ).finish(options)


if __name__ == "__main__":
    main()
