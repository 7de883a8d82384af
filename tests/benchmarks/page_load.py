"""How long a browser takes for one page of one signed-in user, by session middleware and lock.

    python tests/benchmarks/page_load.py [--rounds 15] [--pages 2] [--loop auto] [--http auto]
                                         [--json FILE] [--plot FILE] [--quick]

A page is a document, a stream of events that stays open, 30 assets, 6 reads of an API and a write to it, each
of which takes 50 ms. A browser loads it over six kept connections (HTTP/1.1), of which the stream takes one.
Each subject is served by a uvicorn of its own. Told are the time until all but the stream are there, the
answers by status, and how many acknowledged writes were lost: each adds one to a number in the session, which
is asked for in the end.

Ours runs with each `lock`, and with `lock=True` and the recipe of README: assets are excluded from sessions,
and what only looks at the session is read-only. Starlette's middleware keeps the session in its cookie.
starsessions autoloads and has a lifetime, as its documentation says. Neither has a lock.

Over five connections seven calls of 50 ms take 100 ms at least.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from browsing import Browser, Request, load
from end_to_end import available, parse_server, served, server_command_line, wait_for
from measure import Cell, Figures, Panel, Report, Samples, Table, Target, alternate, machine
from page_load_apps import SUBJECTS
from redis_server import RedisServer

DOCUMENT = Request("GET", "/document")
ASSETS = [Request("GET", f"/asset/{number}") for number in range(30)]
READ, WRITE = Request("GET", "/api/read"), Request("POST", "/api/write")
PAGE = [Request("GET", "/events"), *ASSETS, READ, READ, READ, WRITE, READ, READ, READ]
PLACES = ("memory", "Redis")
AUTO, PEER = "ours, auto", "starsessions"
STATUSES = ("200", "409", "503", "other")
QUICK = ("ours, auto, memory", "ours, True, memory", "Starlette, cookie", "ours, auto, Redis")
MOST = 1.1  # times what starsessions takes for the page, that `lock="auto"` may take


# -- measuring -----------------------------------------------------------------------------------------------


@dataclass
class Measured:
    """What was found out, by subject."""

    samples: Samples = field(default_factory=Samples)
    answers: dict[str, Counter[int]] = field(default_factory=dict)
    acknowledged: dict[str, int] = field(default_factory=dict)
    lost: dict[str, int] = field(default_factory=dict)

    @property
    def subjects(self) -> list[str]:
        return list(self.answers)

    def refused(self, subject: str) -> int:
        return sum(count for status, count in self.answers[subject].items() if status != 200)


def turn(browser: Browser, pages: int) -> Callable[[], Awaitable[Figures]]:
    """Load so many pages, one after the other; the figures are of the mean one, in ms."""

    async def turn() -> Figures:
        loaded = [await load(browser, DOCUMENT, PAGE) for _ in range(pages)]
        there = [each.all_but_stream for each in loaded]
        events = [float("nan") if each.first_event is None else each.first_event for each in loaded]
        return {"there": sum(there) / pages, "first event": sum(events) / pages}

    return turn


async def begin(port: int) -> Browser:
    """A browser with a session."""
    browser = Browser(port)
    await browser.get("/begin")
    return browser


async def measure(subjects: Sequence[str], options: Any) -> Measured:
    """Serve all subjects, let them take turns, and compare what was acknowledged with what is stored."""
    measured = Measured()
    with ExitStack() as stack:
        url = stack.enter_context(RedisServer()).url
        start = partial(
            served, redis_url=url, loop=options.loop, protocol=options.http, apps="page_load_apps"
        )
        servers = {name: stack.enter_context(start(name)) for name in subjects}
        for server in servers.values():
            wait_for(server)
        browsers = {name: await begin(server.port) for name, server in servers.items()}
        turns = {name: turn(browser, options.pages) for name, browser in browsers.items()}
        await alternate(turns, options.rounds, measured.samples)
        for name, browser in browsers.items():
            stored = int((await browser.get("/count")).body)
            measured.answers[name] = browser.answers
            measured.acknowledged[name] = browser.acknowledged
            measured.lost[name] = browser.acknowledged - stored
    return measured


# -- telling -------------------------------------------------------------------------------------------------


def peer_of(subject: str, subjects: Sequence[str]) -> str | None:
    """starsessions in the same place; None where it was not measured."""
    peer = f"{PEER}, {'Redis' if subject.endswith('Redis') else 'memory'}"
    return peer if peer in subjects else None


def ratio(measured: Measured, subject: str) -> float | None:
    peer = peer_of(subject, measured.subjects)
    return None if peer is None else measured.samples.ratio(subject, peer, "there")


def by_status(answers: Counter[int]) -> list[Cell]:
    """How many answers there were with each of `STATUSES`."""
    known = [answers[int(status)] for status in STATUSES[:-1]]
    return [*known, answers.total() - sum(known)]


def label(subject: str, place: str) -> str:
    """A subject's name under a bar."""
    return subject.removesuffix(f", {place}").replace(", ", ",\n").replace(" with", "\nwith")


def table(measured: Measured) -> Table:
    rows: list[list[Cell]] = []
    for name in measured.subjects:
        times = [measured.samples.median(name, figure) for figure in ("there", "first event")]
        writes: list[Cell] = [measured.acknowledged[name], measured.lost[name]]
        rows.append(
            [name, times[0], ratio(measured, name), times[1], *by_status(measured.answers[name]), *writes]
        )
    columns = [
        "", "page ms", "/ starsessions", "stream begins ms", *STATUSES, "writes", "lost",
    ]  # fmt: skip
    note = "Writes: acknowledged ones. starsessions is that in the same place, Redis or else memory."
    return Table("a page: document, 30 assets, 6 reads and a write of 50 ms, a stream", columns, rows, note)


def targets(measured: Measured) -> list[Target]:
    found = []
    for name in measured.subjects:
        bound = ratio(measured, name)
        if name.startswith(AUTO) and bound is not None:
            found.append(Target(f"page of {name} / starsessions", bound, "<=", MOST, "x"))
    ours = [name for name in measured.subjects if name.startswith("ours")]
    refused = sum(measured.refused(name) for name in ours)
    found.append(Target("answers of ours that were not 200", refused, "==", 0))
    lost = sum(measured.lost[name] for name in ours)
    found.append(Target("acknowledged writes of ours that were lost", lost, "==", 0))
    return found


def panels(measured: Measured) -> list[Panel]:
    """A row for each place: the time, and what became of the writes."""
    found = []
    for place in PLACES:
        names = [name for name in measured.subjects if name.endswith((place, "cookie"))]
        labels = [label(name, place) for name in names]
        times = {"ms": [measured.samples.median(name, "there") for name in names]}
        lost = {"%": [100 * measured.lost[name] / max(measured.acknowledged[name], 1) for name in names]}
        found.append(Panel(f"{place}: until the page is there", "ms", times, "", labels))
        found.append(Panel(f"{place}: acknowledged writes lost", "%", lost, "", labels))
    return found


def report(measured: Measured, options: Any) -> Report:
    facts = {
        **machine("uvicorn", "starlette", "starsessions", "redis"),
        "served by": f"uvicorn, one process, loop {options.loop}, http {options.http}",
        "load by": "one browser, 6 connections",
        "rounds": f"{options.rounds} of {options.pages} pages for each subject",
    }
    return Report(
        "A page with parallel requests", facts, [table(measured)], targets(measured), panels(measured),
        raw={"rounds": measured.samples.raw()},
    )  # fmt: skip


def main() -> None:
    parser = server_command_line(__doc__, rounds=15)
    parser.add_argument(
        "--pages", type=int, default=2, help="of each subject and round (default: %(default)s)"
    )
    options = parse_server(parser)
    subjects = available(SUBJECTS)
    if options.quick:
        subjects, options.pages, options.rounds = [*QUICK], 1, 1
    report(asyncio.run(measure(subjects, options)), options).finish(options)


if __name__ == "__main__":
    main()
