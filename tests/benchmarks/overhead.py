"""What a session middleware costs per request, called in process, side by side with its peers.

    python tests/benchmarks/overhead.py [--rounds 15] [--requests 128] [--peers starlette,starsessions]
                                        [--json FILE] [--plot FILE] [--quick]

The request reads or increments a number in a session of about 300 bytes; headers and cookies are a browser's.
The answer has a content-length, or has none and is a stream to a middleware. In memory one client asks, on
Redis 1 and 64 at once, each a task with a session of its own. No HTTP server; Redis is a real one, started on
loopback.

µs are for each request of all clients together, less the bare app's in the same round: on Redis by the wall,
in memory of the process's own time, for nothing waits there. Instructions are counted by callgrind in a
process of its own, less the bare app's too; "-" where there is no valgrind (`apt-get install valgrind`). With
64 clients they vary by some percent: how many calls leave together is a matter of time.

Ours is as it comes, its lock included; auto is `lock="auto"`, which takes none for these requests; typed is
a model with a list of five models, one of which is read or changed. The floor is the least that keeps the
promises in memory. The peers have no lock and are set up as their documentation says: starsessions autoloads
and has a lifetime, Litestar's server-side session does not renew on access and is called without Litestar's
routing. On Redis theirs have a redis-py client with hiredis and as many connections as they ask for.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import TypeAlias

from measure import (
    TESTS,
    Cell,
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
    server_of,
)
from overhead_apps import (
    AT_ONCE,
    AUTO,
    BARE,
    KINDS,
    MEMORY,
    PEERS,
    READ_ONLY,
    REDIS,
    Case,
    Subject,
    in_memory,
    on_redis,
)
from overhead_instructions import per_request
from redis_server import RedisServer

YARDSTICK = {MEMORY: "Starlette", REDIS: "starsessions"}  # whose cost is 1
TIME = {MEMORY: "cpu_us", REDIS: "us"}  # which of the figures that `drive` gives
WANTED = {
    (MEMORY, "ours, dict", "read", 1): 0.95,
    (MEMORY, "ours, dict", "write", 1): 0.55,
    (MEMORY, "ours, typed", "read", 1): 1.6,
    (MEMORY, "ours, typed", "write", 1): 1.25,
    (REDIS, "ours", "write", 64): 0.25,
}
"""What a cost is to be at most, in terms of the yardstick's for the same requests."""

Counted: TypeAlias = Mapping[str, float]


# -- measuring -----------------------------------------------------------------------------------------------


def turn(subject: Subject, case: Case, seconds: float) -> Callable[[], Awaitable[Mapping[str, float]]]:
    """What `alternate` calls: requests of all clients at once for so long."""
    app, clients = subject.app(case), subject.clients
    return lambda: drive(
        lambda number: clients[number].request(app), case.clients, seconds, polite=case.clients > 1
    )


async def measure(url: str, options: argparse.Namespace) -> tuple[list[Case], Samples]:
    """Every case; those of one place and number of clients take turns."""
    cases: list[Case] = []
    samples = Samples()
    async with AsyncExitStack() as stack:
        remote = await stack.enter_async_context(on_redis(url, options.peers))
        for subjects in (in_memory(options.peers), remote):
            for clients in AT_ONCE[subjects[0].place]:
                turns = {}
                for subject in subjects:
                    await subject.begin(clients)
                    for case in subject.cases(clients):
                        turns[str(case)] = turn(subject, case, options.seconds)
                        cases.append(case)
                await alternate(turns, options.rounds, samples)
    return cases, samples


# -- telling -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Figures:
    """Everything that was measured, by case."""

    samples: Samples
    counted: Counted

    def cost(self, case: Case) -> float:
        """µs over the bare app, whose own cost is told as it is."""
        if case.subject == BARE:
            return self.samples.median(str(case), TIME[case.place])
        return self.samples.above(str(case), case.of(BARE), TIME[case.place])

    def ratio(self, case: Case) -> float | None:
        """In terms of the yardstick; None for the bare app, and where the yardstick was not measured."""
        peer = case.of(YARDSTICK[case.place])
        if case.subject == BARE or not self.samples.has(peer):
            return None
        return self.samples.ratio(str(case), peer, TIME[case.place], case.of(BARE))

    def instructions(self, case: Case) -> float | None:
        """Over the bare app, as `cost`; None where they were not counted."""
        mine, least = self.counted.get(str(case)), self.counted.get(case.of(BARE))
        if mine is None or least is None:
            return None
        return mine if case.subject == BARE else mine - least

    def instructions_ratio(self, case: Case) -> float | None:
        mine = self.instructions(case)
        peer = self.instructions(case._replace(subject=YARDSTICK[case.place]))
        return None if mine is None or not peer or case.subject == BARE else mine / peer

    def row(self, case: Case) -> list[Cell]:
        bound = wanted(case)
        return [
            f"{case.subject}, {case.kind}",
            self.cost(case),
            self.ratio(case),
            None if bound is None else f"<= {bound}",
            self.instructions(case),
            self.instructions_ratio(case),
        ]


def wanted(case: Case) -> float | None:
    return WANTED.get((case.place, case.subject, case.kind, case.clients))


def groups(cases: Sequence[Case]) -> dict[str, list[Case]]:
    """The cases of each table, by its title; the bare app's are the last."""
    found: dict[str, list[Case]] = {}
    for case in sorted(cases, key=lambda case: case.subject == BARE):
        title = f"{case.place}, clients: {case.clients}, {case.length}"
        found.setdefault(title, []).append(case)
    return found


def tables(cases: Sequence[Case], figures: Figures) -> list[Table]:
    found = []
    for title, those in groups(cases).items():
        peer = YARDSTICK[those[0].place]
        columns = ["over the bare app", "µs", f"µs / {peer}", "wanted"]
        columns += ["instructions", f"instructions / {peer}"]
        found.append(Table(title, columns, [figures.row(case) for case in those]))
    return found


def targets(cases: Sequence[Case], figures: Figures) -> list[Target]:
    found = []
    for case in cases:
        bound, ratio = wanted(case), figures.ratio(case)
        if bound is not None and ratio is not None:
            name = f"{case}, µs / {YARDSTICK[case.place]}"
            found.append(Target(name, ratio, "<=", bound, "x"))
        if case.subject == AUTO and case.kind == "read":
            ratio = figures.samples.ratio(str(case), case.of(READ_ONLY), TIME[case.place], case.of(BARE))
            found.append(Target(f"{case}, µs / read_only", ratio, "<=", 1.2, "x"))
    return found


def panels(cases: Sequence[Case], figures: Figures) -> list[Panel]:
    """What a read and a write cost in each table's case."""
    found = []
    for title, those in groups(cases).items():
        bars: dict[str, list[float]] = {}
        for case in those:
            if case.subject not in (BARE, READ_ONLY):
                bars.setdefault(case.subject, []).append(figures.cost(case))
        found.append(Panel(title, "µs per request over the bare app", bars, categories=KINDS))
    return found


# -- the command line ----------------------------------------------------------------------------------------


def options_of(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = command_line(__doc__, rounds=15)
    parser.add_argument("--seconds", type=float, default=0.1, help="of each turn (default: %(default)s)")
    parser.add_argument(
        "--requests",
        type=int,
        default=128,
        help="whose instructions are counted; 0 counts none (default: %(default)s)",
    )
    parser.add_argument(
        "--peers",
        default="starlette,starsessions",
        help=f"to compare with, of {', '.join(PEERS)} (default: %(default)s)",
    )
    options = parse(parser, arguments)
    options.peers = [peer for peer in options.peers.split(",") if peer]
    unknown = [peer for peer in options.peers if peer not in PEERS]
    if unknown:
        parser.error(f"--peers knows {', '.join(PEERS)}; not {', '.join(unknown)}")
    missing = [peer for peer in options.peers if importlib.util.find_spec(peer) is None]
    if missing:
        parser.error(
            f"not installed: {', '.join(missing)}. pip install 'asgi-server-sessions[bench]' brings every"
            " peer; --peers names those to compare with"
        )
    if options.quick:
        options.seconds, options.requests = min(options.seconds, 0.005), min(options.requests, 8)
    return options


def main() -> None:
    options = options_of()
    with RedisServer() as server:
        facts = machine("redis", "hiredis", *options.peers, server=server_of(server.url))
        cases, samples = asyncio.run(measure(server.url, options))
        url = None if options.quick else server.url  # valgrind takes its time
        counted = per_request(TESTS.parent, url, options.peers, options.requests)
    figures = Figures(samples, counted)
    Report(
        "What a session costs a request",
        facts,
        tables(cases, figures),
        targets(cases, figures),
        panels(cases, figures),
        raw={"rounds": samples.raw(), "instructions": dict(counted)},
    ).finish(options)


if __name__ == "__main__":
    main()
