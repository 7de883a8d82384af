"""Many clients and processes, one session, and faults: what was acknowledged stays, and nobody is let in.

`pytest tests/faults --long` injects ten times as many faults. Either way a table says what came of them.
"""

from __future__ import annotations

import random
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack

import anyio
import pytest

from . import figures
from .app import MAX_AGE
from .blows import CAMPAIGNS, Campaign
from .checkers import Fate, Life, of_fate, prolonged, unanswered
from .clients import OBJECTS, SharedSession, Visitors, crowd, shared_session, silence
from .processes import PATIENCE, Site, running_site, until

SESSIONS = 2
CLIENTS = 4  # of each session
MORE = 10  # times as many blows with --long

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Workers that all campaigns share, whatever befell them in the one before."""
    with running_site(tmp_path_factory.mktemp("site") / "output") as site:
        yield site


class Load:
    """What goes on at a site while faults are injected, and what was seen of it."""

    def __init__(self, site: Site, sessions: list[SharedSession]) -> None:
        self.site = site
        self.sessions = sessions
        self.visitors = Visitors(site.urls)
        self.lives: list[Life] = []
        self.over = anyio.Event()
        self.began = time.monotonic()
        self.healed = self.ended = 0.0

    def _turns(self) -> Iterator[object]:
        return iter(self.over.is_set, True)

    async def go_on(self, strike: Callable[[], Awaitable[int]]) -> int:
        """All clients, from before the first blow to after the last; how many blows there were."""
        times = 0
        async with anyio.create_task_group() as group:
            for session in self.sessions:
                group.start_soon(crowd, session, CLIENTS, self._turns)
            group.start_soon(self.visitors.visit, self._turns(), random.Random(1))
            group.start_soon(self._watch)
            times = await strike()
            self.healed = time.monotonic()
            with anyio.move_on_after(PATIENCE):
                await until(lambda: all(self._recovered(session) for session in self.sessions))
            await anyio.sleep(0.2)
            self.over.set()
        self.ended = time.monotonic()
        return times

    def _recovered(self, session: SharedSession) -> bool:
        return max(session.seen.acknowledged, default=0.0) > self.healed

    async def _watch(self) -> None:
        """Look at the keys' time to live again and again."""
        while not self.over.is_set():
            self.lives += await anyio.to_thread.run_sync(self.site.lives, time.monotonic)
            await anyio.sleep(0.1)

    async def flaws(self) -> list[str]:
        """Everything that is wrong with what was seen."""
        bound = self.site.lease + self.site.wait
        flaws = [flaw for session in self.sessions for flaw in await session.flaws()]
        for session in self.sessions:
            flaws += unanswered(session.seen.acknowledged, self.healed, bound)
        records = [life for life in self.lives if life.key.endswith("}")]
        locks = [life for life in self.lives if life.key.endswith(":lock")]
        flaws += prolonged(records, MAX_AGE) + prolonged(locks, self.site.lease, renewable=True)
        return [*flaws, *self.visitors.flaws()]

    def figures(self, name: str, times: int, flaws: list[str]) -> figures.Figures:
        """The campaign's line of the table."""
        histories = [history for session in self.sessions for history in session.histories.values()]
        fates = {fate: sum(len(of_fate(history, fate)) for history in histories) for fate in Fate}
        answers = sum((session.seen.answers for session in self.sessions), self.visitors.seen.answers)
        lost = [flaw for flaw in flaws if " not " in flaw and "acknowledged" in flaw]
        return figures.Figures(
            name,
            times,
            fates[Fate.ACKNOWLEDGED],
            len(lost),
            answers[409] + answers[503],
            answers[0],
            len(flaws) - len(lost),
            silence(self.sessions, self.began, self.ended),
        )


async def strike(site: Site, campaign: Campaign, more: int) -> int:
    """All blows of a campaign, with a pause before each; how many there were."""
    dice = random.Random(campaign.times)
    for _ in range(campaign.times * more):
        await anyio.sleep(campaign.pause)
        await campaign.blow(site, dice)
    await site.up()
    return campaign.times * more


async def assert_left_clean(site: Site, sessions: list[SharedSession]) -> None:
    """Each way of using a session works at each worker, and no lock or queue is left."""
    for session in sessions:
        for url in session.urls:
            assert [await session.do(url, path) for path in OBJECTS] == [200] * len(OBJECTS)
    await until(lambda: not site.leftovers())


@pytest.mark.parametrize("campaign", CAMPAIGNS, ids=lambda campaign: campaign.name)
async def test_the_promise_outlives(site: Site, campaign: Campaign, request: pytest.FixtureRequest) -> None:
    """Whatever befalls workers, network and Redis: nothing acknowledged is lost, nothing ended comes back."""
    more = MORE if request.config.getoption("--long") else 1
    site.redis.flushall()
    await site.up()
    async with AsyncExitStack() as stack:
        sessions = [await stack.enter_async_context(shared_session(site.urls)) for _ in range(SESSIONS)]
        load = Load(site, sessions)
        times = await load.go_on(lambda: strike(site, campaign, more))
        await assert_left_clean(site, sessions)
        flaws = await load.flaws()
        figures.gathered.append(load.figures(campaign.name, times, flaws))
        assert flaws == [], [session.seen.answers for session in sessions]
