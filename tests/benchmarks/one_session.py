"""What the requests of one session do to each other, by lock.

    python tests/benchmarks/one_session.py [--rounds 7] [--seconds 1] [--loop auto] [--http auto]
                                           [--json FILE] [--plot FILE] [--quick]

Each subject is served by a uvicorn of its own; all its clients have the cookie of one session.

- crowd: 64 clients, each of which asks one thing after the other. Nine of ten requests read, one writes; each
  works for 5 ms.
- slow reads: 20 clients ask at once for what takes 50 ms and looks at the session.
- writing reads: 8 clients, whose GET adds to the session and does no work. With `lock="auto"` most of these
  meet another one's change and are run again under the lock: here waiting from the start is faster.

Each write adds one to a number in the session, which is asked for in the end: that tells how many
acknowledged writes were lost.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from browsing import Browser, Connection, Request
from end_to_end import Served, available, parse_server, served, server_command_line, wait_for
from measure import Cell, Figures, Panel, Report, Samples, Table, Target, alternate, drive, machine
from page_load import PLACES, STATUSES, by_status, label
from page_load_apps import SUBJECTS
from redis_server import RedisServer

CROWD, SLOW, WRITING = "crowd", "slow reads", "writing reads"
CLIENTS = {CROWD: 64, SLOW: 20, WRITING: 8}
FIGURE = {CROWD: "per_s", SLOW: "ms", WRITING: "per_s"}
SLOW_READ, ADD = Request("GET", "/api/read"), Request("GET", "/add")
SHORT_READ, SHORT_WRITE = Request("GET", "/short/read"), Request("POST", "/short/write")
TIMES = 8  # the throughput of the crowd with "auto", in terms of that with True
QUICK = ("ours, auto, memory", "ours, True, memory", "ours, auto, Redis", "ours, True, Redis")


# -- the load ------------------------------------------------------------------------------------------------


class Crowd:
    """Clients with the session of one browser, and what they were answered in each scene."""

    _connections: Sequence[Connection]

    def __init__(self, browser: Browser) -> None:
        self.browser = browser
        self.answers: dict[str, Counter[int]] = {scene: Counter() for scene in CLIENTS}
        self._asked = [0] * max(CLIENTS.values())
        self._scenes = {CROWD: self._crowd, SLOW: self._slow, WRITING: self._writing}

    async def turn(self, scene: str, seconds: float) -> Figures:
        """Connect everybody, and let them ask: servers hang up on those who ask nothing for some seconds."""
        async with AsyncExitStack() as stack:
            each = [Connection(self.browser) for _ in range(CLIENTS[scene])]
            self._connections = [await stack.enter_async_context(connection) for connection in each]
            return await self._scenes[scene](seconds)

    async def _crowd(self, seconds: float) -> Figures:
        return await self._acknowledged(CROWD, self._short, seconds)

    async def _slow(self, seconds: float) -> Figures:
        """Once, however long it takes."""
        started = time.perf_counter()
        await asyncio.gather(*[self._ask(SLOW, number, SLOW_READ) for number in range(CLIENTS[SLOW])])
        return {"ms": (time.perf_counter() - started) * 1000}

    async def _writing(self, seconds: float) -> Figures:
        return await self._acknowledged(WRITING, lambda number: self._ask(WRITING, number, ADD), seconds)

    async def _acknowledged(
        self, scene: str, ask: Callable[[int], Awaitable[None]], seconds: float
    ) -> Figures:
        """Answers 200 for each second."""
        before = self.answers[scene].copy()
        driven = await drive(ask, CLIENTS[scene], seconds)
        answers = self.answers[scene] - before
        return {"per_s": driven["per_s"] * answers[200] / answers.total()}

    async def _short(self, number: int) -> None:
        """The tenth request of a client writes; not that of all clients at the same time."""
        self._asked[number] += 1
        writes = (self._asked[number] + number) % 10 == 0
        await self._ask(CROWD, number, SHORT_WRITE if writes else SHORT_READ)

    async def _ask(self, scene: str, number: int, request: Request) -> None:
        status = (await self._connections[number].ask(request)).status
        self.answers[scene][status] += 1
        self.browser.note(request, status)

    async def lost(self) -> int:
        """Acknowledged writes that are not stored."""
        return self.browser.acknowledged - int((await self.browser.get("/count")).body)


async def gather_crowd(server: Served) -> Crowd:
    """Begin a session."""
    wait_for(server)
    browser = Browser(server.port)
    await browser.get("/begin")
    return Crowd(browser)


# -- measuring -----------------------------------------------------------------------------------------------


@dataclass
class Measured:
    """What was found out, by subject."""

    samples: Samples = field(default_factory=Samples)
    crowds: dict[str, Crowd] = field(default_factory=dict)
    lost: dict[str, int] = field(default_factory=dict)

    def median(self, scene: str, subject: str) -> float:
        return self.samples.median(case(scene, subject), FIGURE[scene])

    def to_true(self, scene: str, subject: str) -> float | None:
        """A figure in terms of that with `lock=True` in the same place; None where it was not measured."""
        yardstick = f"ours, True, {place_of(subject)}"
        if yardstick not in self.crowds:
            return None
        return self.samples.ratio(case(scene, subject), case(scene, yardstick), FIGURE[scene])

    def answers(self, subject: str) -> Counter[int]:
        return sum(self.crowds[subject].answers.values(), Counter())


def case(scene: str, subject: str) -> str:
    return f"{scene} | {subject}"


def place_of(subject: str) -> str:
    return "Redis" if subject.endswith("Redis") else "memory"


async def measure(subjects: Sequence[str], options: Any) -> Measured:
    """Serve all subjects, let them take turns in each scene, and look for what is lost."""
    measured = Measured()
    with ExitStack() as stack:
        url = stack.enter_context(RedisServer()).url
        start = partial(
            served, redis_url=url, loop=options.loop, protocol=options.http, apps="page_load_apps"
        )
        servers = {name: stack.enter_context(start(name)) for name in subjects}
        measured.crowds = {name: await gather_crowd(server) for name, server in servers.items()}
        for scene in CLIENTS:
            turns = {
                case(scene, name): partial(crowd.turn, scene, options.seconds)
                for name, crowd in measured.crowds.items()
            }
            await alternate(turns, options.rounds, measured.samples)
        for name, crowd in measured.crowds.items():
            measured.lost[name] = await crowd.lost()
    return measured


# -- telling -------------------------------------------------------------------------------------------------


def table(measured: Measured) -> Table:
    rows: list[list[Cell]] = []
    for name in measured.crowds:
        figures = [each(scene, name) for scene in CLIENTS for each in (measured.median, measured.to_true)]
        answers: list[Cell] = [*by_status(measured.answers(name)), measured.crowds[name].browser.acknowledged]
        rows.append([name, *figures, *answers, measured.lost[name]])
    columns = [
        "", "crowd /s", "/ True", "20 slow reads ms", "/ True", "writing reads /s", "/ True",
        *STATUSES, "writes", "lost",
    ]  # fmt: skip
    note = "Only answers 200 count as so many a second, and as writes. True is ours in the same place."
    return Table("one session: a crowd, slow reads at once, reads that write", columns, rows, note)


def targets(measured: Measured) -> list[Target]:
    found = []
    for place in PLACES:
        auto = f"ours, auto, {place}"
        times = measured.to_true(CROWD, auto) if auto in measured.crowds else None
        if times is not None:
            found.append(Target(f"crowd on {auto} / True", times, ">=", TIMES, "x"))
    ours = [name for name in measured.crowds if name.startswith("ours")]
    lost = sum(measured.lost[name] for name in ours)
    found.append(Target("acknowledged writes of ours that were lost", lost, "==", 0))
    locked = [name for name in ours if "False" not in name]
    refused = sum(
        count for name in locked for status, count in measured.answers(name).items() if status != 200
    )
    found.append(Target("answers of ours that were not 200, but with False", refused, "==", 0))
    return found


def panels(measured: Measured) -> list[Panel]:
    """A row for each place, a diagram for each scene."""
    found = []
    for place in PLACES:
        names = [name for name in measured.crowds if name.endswith(place)]
        for scene, figure in FIGURE.items():
            bars = {figure: [measured.median(scene, name) for name in names]}
            unit = "ms" if figure == "ms" else "answers 200 per second"
            found.append(Panel(f"{place}: {scene}", unit, bars, "", [label(name, place) for name in names]))
    return found


def report(measured: Measured, options: Any) -> Report:
    facts = {
        **machine("uvicorn", "starsessions", "redis"),
        "served by": f"uvicorn, one process, loop {options.loop}, http {options.http}",
        "load by": ", ".join(f"{scene}: {count} clients" for scene, count in CLIENTS.items()),
        "rounds": f"{options.rounds} of {options.seconds:g} seconds for each subject and scene",
    }
    return Report(
        "The requests of one session", facts, [table(measured)], targets(measured), panels(measured),
        raw={"rounds": measured.samples.raw()},
    )  # fmt: skip


def main() -> None:
    parser = server_command_line(__doc__, rounds=7)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each turn (default: %(default)s)")
    options = parse_server(parser)
    subjects = [name for name in available(SUBJECTS) if "cookie" not in name]  # no session that clients share
    if options.quick:
        subjects, options.seconds, options.rounds = [*QUICK], 0.2, 1
    report(asyncio.run(measure(subjects, options)), options).finish(options)


if __name__ == "__main__":
    main()
