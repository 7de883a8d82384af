"""Many clients and processes, one session, and faults: what was acknowledged stays, and nobody is let in.

`pytest tests/faults --long` injects ten times as many faults. Either way a table says what came of them.
"""

from __future__ import annotations

import random
import sqlite3
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, closing
from pathlib import Path

import anyio
import pytest

from . import figures
from .blows import CAMPAIGNS, FILE_CAMPAIGNS, TEN_MINUTES, Campaign, S
from .checkers import mistaken, revived
from .clients import OBJECTS, SharedSession, crowd, shared_session
from .load import Load
from .processes import FileSite, Site, Workers, running_on_a_file, running_site, until

SESSIONS = 2
MORE = 10  # times as many blows with --long

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Workers that all campaigns share, whatever befell them in the one before."""
    with running_site(tmp_path_factory.mktemp("site") / "output") as site:
        yield site


async def strike(site: S, campaign: Campaign[S], more: int) -> int:
    """All blows of a campaign, with a pause before each; how many there were."""
    dice = random.Random(campaign.times)
    for _ in range(campaign.times * more):
        await anyio.sleep(campaign.pause)
        await campaign.blow(site, dice)
    await site.up()
    return campaign.times * more


async def assert_left_clean(site: Workers, sessions: list[SharedSession]) -> None:
    """Each way of using a session works at each worker, and no lock or queue is left."""
    for session in sessions:
        for url in session.urls:
            assert [await session.do(url, path) for path in OBJECTS] == [200] * len(OBJECTS)
    await until(lambda: not site.leftovers())


async def delete_everything(site: Site) -> None:
    """FLUSHALL."""
    site.redis.flushall()


async def delete_records(site: Site) -> None:
    """As an eviction or an operator does it: the locks stay."""
    site.redis.delete(*[str(key) for key in site.redis.scan_iter("session:{*}")])


@pytest.mark.parametrize("wipe", [delete_everything, delete_records])
async def test_what_was_deleted_is_seen_by_nobody(
    site: Site, wipe: Callable[[Site], Awaitable[None]]
) -> None:
    """In the middle of many requests: whoever asks after it finds no session, and none is written again."""
    site.redis.flushall()
    await site.up()
    over, ended = anyio.Event(), {}
    async with shared_session(site.urls) as session, anyio.create_task_group() as group:
        group.start_soon(crowd, session, 8, lambda: iter(over.is_set, True))
        await until(lambda: len(session.seen.acknowledged) > 20)
        await wipe(site)
        ended[session.canary] = time.monotonic()
        await until(lambda: session.seen.answers[404] > 20)
        over.set()
    assert [*revived(session.seen.sightings, ended), *mistaken(session.seen.sightings)] == []
    await until(lambda: site.redis.keys() == [])


@pytest.mark.parametrize("campaign", CAMPAIGNS, ids=lambda campaign: campaign.name)
async def test_the_promise_outlives(
    site: Site, campaign: Campaign[Site], request: pytest.FixtureRequest
) -> None:
    """Whatever befalls workers, network and Redis: nothing acknowledged is lost, nothing ended comes back."""
    site.redis.flushall()
    await keeps_its_promise(site, campaign, MORE if request.config.getoption("--long") else 1)


@pytest.mark.parametrize("campaign", FILE_CAMPAIGNS, ids=lambda campaign: campaign.name)
async def test_the_promise_outlives_on_a_file(
    tmp_path: Path, campaign: Campaign[FileSite], request: pytest.FixtureRequest
) -> None:
    """The same for workers that share a SQLite file."""
    with running_on_a_file(tmp_path) as site:
        await keeps_its_promise(site, campaign, MORE if request.config.getoption("--long") else 1)


async def test_a_file_outlives_ten_minutes_of_kills(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Of any process, every half second: nothing acknowledged is lost, and the file is whole."""
    if not request.config.getoption("--long"):
        pytest.skip("it takes ten minutes, and --long")
    with running_on_a_file(tmp_path) as site:
        await keeps_its_promise(site, TEN_MINUTES, 1)
    with closing(sqlite3.connect(site.path)) as db:
        assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


async def keeps_its_promise(site: S, campaign: Campaign[S], more: int) -> None:
    """Go through a campaign, and judge what was seen."""
    await site.up()
    async with AsyncExitStack() as stack:
        sessions = [await stack.enter_async_context(shared_session(site.urls)) for _ in range(SESSIONS)]
        load = Load(site, sessions)
        times = await load.go_on(lambda: strike(site, campaign, more))
        await assert_left_clean(site, sessions)
        flaws = await load.flaws()
        figures.gathered.append(load.figures(campaign.name, times, flaws))
        assert flaws == [], [session.seen.answers for session in sessions]
