"""Load with mild faults for a while: memory, descriptors and keys are flat at the end, the promise is kept.

`pytest tests/faults/test_soak.py --soak 10` takes ten minutes; without the option it takes some seconds.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import pytest

from . import figures
from .blows import forget_scripts, kill_connections, losing, suffering
from .chaos import delay, half
from .clients import shared_session
from .load import Load
from .processes import Site, running_site, until

ROUNDS = 3  # at least; each has sessions of its own, which it ends
SECONDS = 3.0  # in all, unless told otherwise
LONGEST_ROUND = 15.0  # seconds
BLOWS = [kill_connections, forget_scripts, losing(half, answer=True), suffering(delay(0.001, 0.01), 0.2)]
MEMORY = 4 << 20  # bytes in which caches with bounds fill up: verified cookies, pydantic's strings
MORE = 0.03  # parts of what it had by which it may seem to grow: an allocator keeps what it once had
DESCRIPTORS = 6  # connections that a client or Redis has just closed

pytestmark = pytest.mark.anyio


@dataclass(frozen=True)
class Vitals:
    """What there was when a round was over."""

    memory: list[int]  # of each worker, bytes
    descriptors: list[int]  # of each worker
    keys: int


@pytest.fixture
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Workers of its own."""
    with running_site(tmp_path_factory.mktemp("soak") / "output") as site:
        yield site


class Soak:
    """Rounds of load, and the vitals after each."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.dice = random.Random(1)
        self.vitals: list[Vitals] = []
        self.rows: list[figures.Figures] = []

    async def round(self, seconds: float) -> None:
        """Crowds, visitors and impatient clients for so long; all of it is judged, all sessions are ended."""
        async with AsyncExitStack() as stack:
            urls = self.site.urls
            sessions = [await stack.enter_async_context(shared_session(urls)) for _ in range(2)]
            load = Load(self.site, sessions)
            load.impatient = True
            times = await load.go_on(lambda: self._strike(seconds))
            await until(lambda: not self.site.leftovers())
            flaws = await load.flaws()
            self.rows.append(load.figures("soak, mild faults", times, flaws))
            assert flaws == []
            for session in sessions:
                assert (await session.ask(urls[0], "logout"))[0] == 200
        records = list(self.site.redis.scan_iter("session:{*}"))
        assert len(records) <= load.visitors.abandoned, "sessions that were ended are there"
        self.site.redis.flushall()
        self.vitals.append(await anyio.to_thread.run_sync(self._look))

    async def _strike(self, seconds: float) -> int:
        times, end = 0, time.monotonic() + seconds
        while time.monotonic() < end:
            await anyio.sleep(0.2)
            await self.dice.choice(BLOWS)(self.site, self.dice)
            times += 1
        return times

    def _look(self) -> Vitals:
        workers = self.site.workers
        return Vitals(
            [worker.resident() for worker in workers],
            [worker.descriptors() for worker in workers],
            len(self.site.redis.keys()),
        )

    def growth(self) -> list[str]:
        """What grew from the first half of the rounds, but for the very first, to the second half."""
        begun = self.vitals[1:]
        early, late = begun[: len(begun) // 2], begun[len(begun) // 2 :]
        flaws: list[str] = []
        for at in range(len(self.site.workers)):
            before, after = (_median([each.memory[at] for each in half]) for half in (early, late))
            if after - before > MEMORY + MORE * before:
                flaws.append(f"worker {at} grew from {before >> 10} KiB to {after >> 10} KiB")
            first, last = (
                _median([v.descriptors[at] for v in early]),
                _median([v.descriptors[at] for v in late]),
            )
            if last - first > DESCRIPTORS:
                flaws.append(f"worker {at} had {first} descriptors open, then {last}")
        return flaws

    def total(self) -> figures.Figures:
        """One line for all rounds."""
        total = self.rows[0]
        for row in self.rows[1:]:
            total = total.plus(row)
        return total


def _median(values: list[int]) -> int:
    return round(statistics.median(values))


async def test_a_long_life(site: Site, request: pytest.FixtureRequest) -> None:
    """However long it goes on, nothing piles up in the workers or in Redis, and nothing is lost."""
    minutes = request.config.getoption("--soak")
    seconds = SECONDS if minutes is None else 60 * float(minutes)
    length = min(seconds / ROUNDS, LONGEST_ROUND)
    soak = Soak(site)
    await site.up()
    end = time.monotonic() + seconds
    while len(soak.vitals) < ROUNDS or time.monotonic() < end:
        await soak.round(length)
    figures.gathered.append(soak.total())
    print(*soak.vitals, sep="\n")
    assert soak.growth() == []


def test_a_leak_is_found() -> None:
    """Memory and descriptors that grow from round to round are said to."""
    nothing: Any = None
    two = Site(
        workers=[nothing] * 2, server=nothing, proxy=nothing, redis=nothing, output=Path(), lease=1, wait=1
    )
    soak = Soak(two)  # their number alone counts
    mb = 1 << 20
    soak.vitals = [Vitals([(50 + 9 * n) * mb, 50 * mb], [20, 20 + 5 * n], 0) for n in range(5)]
    assert soak.growth() == [
        f"worker 0 grew from {(50 + 13 * mb // mb) * 1024 + 512} KiB to {(50 + 31) * 1024 + 512} KiB",
        "worker 1 had 28 descriptors open, then 38",
    ]
