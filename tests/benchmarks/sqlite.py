"""Sessions in a file, beside memory and Redis: cycles a second, syncs, and hand-over between processes.

    python tests/benchmarks/sqlite.py [--rounds 5] [--stalls 60] [--json FILE] [--plot FILE]

A cycle is `checkout` (lock and load) and `commit` (write and let go) of a session of about 300 bytes, by the
store alone. 1, 8 and 64 tasks of one process have a session each; then two processes have 64 each.

The longest stall is how much later than asked for a timer of the event loop came while 64 tasks worked for a
minute, sessions expired and the log was folded in. Time in which the processor was given to other programs is
left out, as far as the system tells it (Linux). The garbage collector's full runs last as long as the app's
heap is large, whatever the store: what was there at the start is frozen.

Then two or four processes want one session. A hand-over lasts from the moment at which one begins to commit
to the moment at which the other has lock and record; fairness is how often the least served process had it,
by how often the most served one did, while all wanted it. And a process is killed that holds the session, or
waits for it. Each count is compared with what was acknowledged. Stamps are CLOCK_MONOTONIC's, which processes
share.
"""

from __future__ import annotations

import asyncio
import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import partial
from itertools import count, pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from measure import (
    Figures,
    Panel,
    Report,
    Samples,
    Table,
    Target,
    alternate,
    command_line,
    drive,
    machine,
    parse,
    percentile,
    server_of,
)
from redis_server import RedisServer

from asgi_sessions import (
    InMemorySessionStore,
    RedisSessionStore,
    SessionData,
    SessionStore,
    SQLiteSessionStore,
)
from asgi_sessions.record.codec import decode, encode
from asgi_sessions.stores.checkout import Checkout, Lifetime, LockPolicy, Outcome

TASKS = (1, 8, 64)
FILLING = "x" * 60  # makes a record of about 300 bytes
HOUR = Lifetime(absolute=3600)
LOCK = LockPolicy(timeout=30, wait=60)
NORMAL, FULL = "SQLite, normal", "SQLite, full"
EVERYSEC, ALWAYS = "Redis, everysec", "Redis, always"
PLACES = ("memory", NORMAL, FULL, EVERYSEC, ALWAYS)
LOCAL = ("memory", NORMAL, FULL)
SHARED = (NORMAL, FULL, EVERYSEC)
ONE = "shared"  # the session that two processes want


def store_of(place: str, where: str) -> SessionStore:
    """The store of this kind."""
    if place == "memory":
        return InMemorySessionStore()
    if place.startswith("Redis"):
        return RedisSessionStore(where)
    return SQLiteSessionStore(where, synchronous="full" if place == FULL else "normal")


def names(tasks: int, process: int = 0) -> list[str]:
    return [f"p{process}s{number}" for number in range(tasks)]


async def lay(store: SessionStore, session_ids: Sequence[str]) -> None:
    """Begin anew: sessions that count from 0."""
    for name in session_ids:
        await store.set(name, SessionData(session_id=name, metadata={"filling": FILLING}))


async def cycle(store: SessionStore, session_ids: Sequence[str], number: int) -> tuple[float, float]:
    """Count in a session; when lock and record were had, and when the commit began."""
    taken = await store.checkout(session_ids[number], LOCK, HOUR)
    assert isinstance(taken, Checkout)
    had = time.monotonic()
    data = decode(SessionData, taken.record)
    data.message_count += 1
    record, done = encode(data), time.monotonic()
    outcome = await store.commit(taken, record, release=True)
    assert outcome is Outcome.STORED
    return had, done


async def counted(store: SessionStore, session_ids: Sequence[str]) -> int:
    found = await store.get_batch(session_ids)
    return sum(data.message_count for data in found.values() if data is not None)


@contextmanager
def counting_syncs(store: SessionStore) -> Iterator[list[int]]:
    """How many transactions were synced, noted in a list of one number."""
    syncs, engine = [0], store._engine if isinstance(store, SQLiteSessionStore) else None
    if engine is None:
        yield syncs
        return
    transact = engine.writer._transact

    def noting(calls: Any, *, full: bool) -> None:
        syncs[0] += bool(calls and full)
        transact(calls, full=full)

    engine.writer._transact = noting  # type: ignore[method-assign]  # counts, and does the same
    try:
        yield syncs
    finally:
        engine.writer._transact = transact  # type: ignore[method-assign]


async def turn(place: str, where: str, tasks: int, seconds: float) -> Figures:
    """One process: cycles, syncs for each, and how many of those acknowledged are lost."""
    store, session_ids = store_of(place, where), names(tasks)
    await lay(store, session_ids)
    done = [0]

    async def act(number: int) -> None:
        await cycle(store, session_ids, number)
        done[0] += 1

    with counting_syncs(store) as syncs:
        figures = await drive(act, tasks, seconds, polite=True)
    lost = done[0] - await counted(store, session_ids)
    await store.aclose()
    return {**figures, "syncs": syncs[0] / done[0], "lost": lost, "done": done[0]}


# -- the event loop ------------------------------------------------------------------------------------------


def waited_for_a_processor() -> float:
    """For how many seconds the threads of this process were ready to run and did not, as far as is known."""
    nanoseconds = 0
    for file in Path("/proc/self/task").glob("*/schedstat"):
        with suppress(OSError):
            nanoseconds += int(file.read_text().split()[1])
    return nanoseconds / 1e9


async def stall(place: str, where: str, seconds: float) -> Figures:
    """How late the event loop comes, at most and at the 99.9th percentile, while everything goes on."""
    store, session_ids, late = store_of(place, where), names(64), list[float]()
    await lay(store, session_ids)

    async def be_timely() -> None:
        while True:
            known, began = waited_for_a_processor(), time.monotonic()
            await asyncio.sleep(0.001)
            over = time.monotonic() - began - 0.001
            late.append(max(over - (waited_for_a_processor() - known), 0.0))

    async def make_short_lived() -> None:
        for number in count():
            await store.set(f"x{number}", SessionData(session_id=f"x{number}"), ttl=1)
            await asyncio.sleep(0.005)

    gc.freeze()
    beside = [asyncio.create_task(work()) for work in (be_timely, make_short_lived)]
    await drive(partial(cycle, store, session_ids), 64, seconds, polite=True)
    for task in beside:
        task.cancel()
    await asyncio.gather(*beside, return_exceptions=True)
    gc.unfreeze()
    await store.aclose()
    return {"longest_ms": max(late) * 1e3, "p999_ms": percentile(late, 0.999) * 1e3}


# -- two processes -------------------------------------------------------------------------------------------


class Child:
    """This program in a process of its own, doing one thing."""

    def __init__(self, *arguments: object) -> None:
        command = [sys.executable, __file__, "child", json.dumps(arguments)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n"

    def go(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()

    async def hears(self) -> Any:
        assert self._process.stdout is not None
        line = await asyncio.to_thread(self._process.stdout.readline)
        return json.loads(line)

    def kill(self) -> None:
        self._process.kill()
        self._process.communicate()


@asynccontextmanager
async def children(*arguments: tuple[object, ...]) -> AsyncIterator[list[Child]]:
    """Processes that begin at one moment."""
    made = [Child(*each) for each in arguments]
    try:
        for child in made:
            child.go()
        yield made
    finally:
        for child in made:
            child.kill()


async def be_child(work: str, place: str, where: str, *rest: Any) -> object:
    store = store_of(place, where)
    await store.open()
    print("ready", flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    if work == "drive":
        process, tasks, seconds = rest
        return await drive(partial(cycle, store, names(tasks, process)), tasks, seconds, polite=True)
    stamps: list[tuple[float, float]] = []
    if work == "hold":
        await store.checkout(ONE, LOCK, HOUR)
    ends = time.monotonic() + rest[0]
    while work == "share" and time.monotonic() < ends:
        stamps.append(await cycle(store, [ONE], 0))
        await asyncio.sleep(0)
    return stamps


async def crowd(place: str, where: str, seconds: float) -> Figures:
    """Two processes with 64 sessions each."""
    store = store_of(place, where)
    all_names = [*names(64, 0), *names(64, 1)]
    await lay(store, all_names)
    async with children(*[("drive", place, where, process, 64, seconds) for process in (0, 1)]) as both:
        told = [await child.hears() for child in both]
    await store.aclose()
    return {"per_s": sum(each["per_s"] for each in told)}


async def share(place: str, where: str, seconds: float, processes: int) -> Figures:
    """So many processes want one session."""
    store = store_of(place, where)
    await lay(store, [ONE])
    async with children(*[("share", place, where, seconds)] * processes) as all_of_them:
        told = [await child.hears() for child in all_of_them]
    stamps = sorted((had, done, process) for process, each in enumerate(told) for had, done in each)
    waits = [after[0] - before[1] for before, after in pairwise(stamps) if before[2] != after[2]]
    lost = len(stamps) - await counted(store, [ONE])
    await store.aclose()
    begun, ended = max(each[0][0] for each in told), min(each[-1][0] for each in told)
    served = sorted(sum(begun <= had <= ended for had, _ in each) for each in told)
    return {
        "median_ms": statistics.median(waits) * 1e3,
        "p99_ms": percentile(waits, 0.99) * 1e3,
        "fairness": served[0] / max(served[-1], 1),
        "lost": lost,
        "done": len(stamps),
    }


async def killed(place: str, where: str) -> Figures:
    """From the death of who holds the session, or is the next in its queue, until another has it; ms."""
    store = store_of(place, where)
    await lay(store, [ONE])
    async with children(("hold", place, where, 0)) as (holder,):
        await holder.hears()
        next_one = asyncio.create_task(store.checkout(ONE, LOCK, HOUR))
        await asyncio.sleep(0.2)
        began = time.monotonic()
        holder.kill()
        taken = await next_one
        dead_holder = time.monotonic() - began
    assert isinstance(taken, Checkout)
    async with children(("hold", place, where, 0)) as (waiter,):
        await asyncio.sleep(0.3)
        waiter.kill()
        next_one = asyncio.create_task(store.checkout(ONE, LOCK, HOUR))
        await asyncio.sleep(0.1)
        began = time.monotonic()
        await store.release(taken)
        taken = await next_one
        dead_waiter = time.monotonic() - began
    assert isinstance(taken, Checkout)
    await store.release(taken)
    await store.aclose()
    return {"holder_ms": dead_holder * 1e3, "waiter_ms": dead_waiter * 1e3}


# -- measuring and telling -----------------------------------------------------------------------------------


async def measure(rounds: int, seconds: float, stalls: float) -> dict[str, Samples]:
    """Everything, by what it is about."""
    found: dict[str, Samples] = {}
    with (
        TemporaryDirectory() as folder,
        RedisServer("--appendonly", "yes", "--appendfsync", "everysec") as everysec,
        RedisServer("--appendonly", "yes", "--appendfsync", "always") as always,
    ):
        places = {
            "memory": "",
            NORMAL: str(Path(folder) / "normal.db"),
            FULL: str(Path(folder) / "full.db"),
            EVERYSEC: everysec.url,
            ALWAYS: always.url,
        }

        async def each(
            about: str, work: Callable[..., Any], chosen: Sequence[str], *arguments: object
        ) -> None:
            turns = {place: partial(work, place, places[place], *arguments) for place in chosen}
            found[about] = await alternate(turns, rounds)

        for tasks in TASKS:
            await each(str(tasks), turn, PLACES, tasks, seconds)
        found["stall"] = Samples()
        for place in LOCAL:
            found["stall"].add(place, await stall(place, places[place], stalls))
        await each("crowd", crowd, SHARED, seconds)
        await each("share", share, SHARED, seconds, 2)
        await each("four", share, SHARED, seconds, 4)
        await each("killed", killed, (NORMAL, FULL))
        found["server"] = Samples()
        found["server"].add(server_of(everysec.url), {"rounds": rounds})
    return found


def tables(found: dict[str, Samples]) -> list[Table]:
    def row(name: str, about: str, figure: str, places: Sequence[str] = SHARED) -> list[str | float | None]:
        samples = found[about]
        return [name, *[samples.median(each, figure) if samples.has(each) else None for each in places]]

    rates = [row(f"{tasks} at once", str(tasks), "per_s", PLACES) for tasks in TASKS]
    rates.append(row("two processes, 64 each", "crowd", "per_s", PLACES))
    syncs = [row(f"{tasks} at once", str(tasks), "syncs", (FULL,)) for tasks in TASKS]
    stalls = [
        row("longest stall, ms", "stall", "longest_ms", LOCAL),
        row("99.9th percentile, ms", "stall", "p999_ms", LOCAL),
    ]
    hands = [
        row("hand-over, median ms", "share", "median_ms"),
        row("hand-over, p99 ms", "share", "p99_ms"),
        row("fairness", "share", "fairness"),
        row("fairness of four processes", "four", "fairness"),
        row("killed holder, ms", "killed", "holder_ms"),
        row("killed waiter, ms", "killed", "waiter_ms"),
    ]
    return [
        Table("cycles a second", ("", *PLACES), rates),
        Table("synced transactions per cycle", ("", FULL), syncs),
        Table("event loop at 64 at once", ("", *LOCAL), stalls),
        Table("two processes and one session", ("", *SHARED), hands),
    ]


def targets(found: dict[str, Samples]) -> list[Target]:
    def ratio(about: str, one: str, other: str) -> float:
        return found[about].ratio(one, other, "per_s")

    share, dead = found["share"], found["killed"]
    alone = found["1"].above(NORMAL, "memory", "us")
    acknowledged = lost = 0.0
    for about in (*map(str, TASKS), "share", "four"):
        for figures in found[about].raw().values():
            acknowledged, lost = acknowledged + sum(figures["done"]), lost + sum(figures["lost"])
    return [
        Target("a cycle alone, normal, above memory", alone, "<=", 60, "µs"),
        Target("64 at once, full, by one at a time", _many(found), ">=", 6, "times"),
        Target("64 at once, full: syncs per cycle", found["64"].median(FULL, "syncs"), "<=", 0.1),
        Target("64 at once, full, by Redis everysec", ratio("64", FULL, EVERYSEC), ">=", 0.5, "times"),
        Target("64 at once, full, by Redis always", ratio("64", FULL, ALWAYS), ">=", 1, "times"),
        Target("two processes, full, by Redis everysec", ratio("crowd", FULL, EVERYSEC), ">=", 0.9, "times"),
        Target(
            "longest stall, normal, above memory",
            found["stall"].above(NORMAL, "memory", "longest_ms"),
            "<=",
            5,
            "ms",
        ),
        Target(
            "longest stall, full, above memory",
            found["stall"].above(FULL, "memory", "longest_ms"),
            "<=",
            5,
            "ms",
        ),
        Target("fairness of four processes, normal", found["four"].median(NORMAL, "fairness"), ">=", 0.8),
        Target("fairness of four processes, full", found["four"].median(FULL, "fairness"), ">=", 0.8),
        Target("hand-over, normal, median", share.median(NORMAL, "median_ms"), "<=", 0.6, "ms"),
        Target("hand-over, full, median", share.median(FULL, "median_ms"), "<=", 1.5, "ms"),
        Target("killed holder", dead.median(FULL, "holder_ms"), "<=", 100, "ms"),
        Target("killed waiter", dead.median(FULL, "waiter_ms"), "<=", 10, "ms"),
        Target(f"of {acknowledged:,.0f} acknowledged changes were lost", lost, "==", 0),
    ]


def _many(found: dict[str, Samples]) -> float:
    """64 at once by one alone, whose every commit is synced."""
    pairs = zip(found["64"].rounds(FULL, "per_s"), found["1"].rounds(FULL, "per_s"), strict=True)
    return statistics.median(many / one for many, one in pairs)


def report(found: dict[str, Samples], options: Any) -> Report:
    (server,) = found.pop("server").raw()
    record = encode(SessionData(session_id="s" * 32, metadata={"filling": FILLING}))
    facts = {
        **machine("redis", "hiredis"),
        "server": server,
        "record": f"{len(record)} bytes of JSON",
        "rounds": f"{options.rounds} of {options.seconds} s",
    }
    rates = {place: [found[str(tasks)].median(place, "per_s") for tasks in TASKS] for place in PLACES[1:]}
    panel = Panel(
        "Cycles", "per second", rates, x_label="tasks at once", categories=[str(tasks) for tasks in TASKS]
    )
    raw = {about: samples.raw() for about, samples in found.items()}
    return Report("Sessions in a file", facts, tables(found), targets(found), [panel], raw)


def main() -> None:
    parser = command_line(__doc__, rounds=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each turn (default: %(default)s)")
    parser.add_argument(
        "--stalls", type=float, default=60, help="seconds of each look for stalls (default: 60)"
    )
    options = parse(parser)
    if options.quick:
        options.seconds = options.stalls = 0.1
    report(asyncio.run(measure(options.rounds, options.seconds, options.stalls)), options).finish(options)


if __name__ == "__main__":
    if sys.argv[1:2] == ["child"]:
        print(json.dumps(asyncio.run(be_child(*json.loads(sys.argv[2])))), flush=True)
        sys.stdin.read()
    else:
        main()
