"""Primaries that are replaced, killed, frozen, cut off and restarted: one address, Sentinel and Cluster.

Visitors count in sessions all the while, at two stores that know nothing of each other, like two processes.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AsyncExitStack
from functools import partial

import pytest
from deployments import DOWN_AFTER, Bed
from visitors import Counted, counting, crowd, failover_flaws, note_copies, served, until

from . import figures
from .checkers import count_flaws, longest_silence, numbers
from .failovers import DATA, FAULTS, KINDS, Deployment, Fault, Ways, row, ways_to
from .figures import Figures

SESSIONS = 6
MORE = 10  # times as many with --long

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module", params=KINDS)
def bed(request: pytest.FixtureRequest) -> Iterator[tuple[str, Bed[Deployment]]]:
    """One deployment for all faults."""
    kind: str = request.param
    with Bed(partial(KINDS[kind], *DATA)) as bed:
        yield kind, bed


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
async def test_sessions_outlive(
    bed: tuple[str, Bed[Deployment]], fault: Fault, request: pytest.FixtureRequest
) -> None:
    """They are served again, and nothing that was acknowledged is lost but what cannot have been copied."""
    kind, servers = bed
    rows = []
    for _ in range(MORE if request.config.getoption("--long") else 1):
        with ways_to(servers.whole()) as ways:
            figure, flaws = await outlive(row(kind, fault), ways, fault)
        rows.append(figure)
        assert flaws == []
    total = rows[0]
    for each in rows[1:]:
        total = total.plus(each)
    figures.gathered.append(total)


async def outlive(name: str, ways: Ways, fault: Fault) -> tuple[Figures, list[str]]:
    """The figures of one round, and what was wrong."""
    async with AsyncExitStack() as stack:
        sites = [await stack.enter_async_context(counting(ways.client())) for _ in range(2)]
        sessions = [await sites[0].begin() for _ in range(SESSIONS)]
        primary = ways.deployment.primary_of(sessions[0].key)
        began = time.monotonic()
        async with crowd(sites[0], sessions, 1), crowd(sites[1], sessions, 1):
            await served(sessions)
            await note_copies(ways.deployment, primary, sessions)
            struck = time.monotonic()
            await fault.strike(ways, primary)
            await served(sessions)
        ended = time.monotonic()
        finals = [await sites[0].final(counted) for counted in sessions]
    flaws = []
    for counted, final in zip(sessions, finals, strict=True):
        if fault.keeps_all:
            flaws += count_flaws(counted.attempts, final)
        else:
            flaws += failover_flaws(counted.attempts, final, counted.copied, struck + DOWN_AFTER / 2)
    left = sorted(counted.key for counted in sessions)
    await until(lambda: ways.deployment.all_keys() == left, "no lock or queue is left")
    return told(name, sessions, flaws, began, ended), flaws


def told(name: str, sessions: list[Counted], flaws: list[str], began: float, ended: float) -> Figures:
    """A line of the table."""
    acknowledged = [[each.ended for _, each in numbers(counted.attempts)] for counted in sessions]
    return Figures(
        name,
        injected=1,
        acknowledged=sum(map(len, acknowledged)),
        lost=len(flaws),
        refused=sum(counted.answers[409] + counted.answers[503] for counted in sessions),
        in_doubt=0,
        stale_accepted=0,
        unavailable=max(longest_silence(times, began, ended) for times in acknowledged),
    )
