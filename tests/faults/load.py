"""What goes on at a site while faults are injected, what was seen of it, and the verdict."""

from __future__ import annotations

import random
import time
from collections.abc import Awaitable, Callable, Iterator

import anyio

from . import figures
from .app import MAX_AGE
from .checkers import Fate, Life, of_fate, prolonged, unanswered
from .clients import OBJECTS, SharedSession, Visitors, crowd, silence
from .processes import PATIENCE, Workers, until

CLIENTS = 4  # of each session


class Load:
    """What goes on at a site while faults are injected, and what was seen of it."""

    def __init__(self, site: Workers, sessions: list[SharedSession]) -> None:
        self.site = site
        self.sessions = sessions
        self.visitors = Visitors(site.urls)
        self.lives: list[Life] = []
        self.clients = CLIENTS
        self.impatient = False  # clients that hang up come, too
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
                group.start_soon(crowd, session, self.clients, self._turns)
            group.start_soon(self.visitors.visit, self._turns(), random.Random(1))
            for session in self.sessions if self.impatient else []:
                group.start_soon(self._leave_early, session)
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

    async def _leave_early(self, session: SharedSession) -> None:
        """One client after the other that does not wait for its answer."""
        dice = random.Random(0)
        while not self.over.is_set():
            with anyio.move_on_after(dice.uniform(0, 0.05)):
                await session.do(dice.choice(session.urls), dice.choice([*OBJECTS]))

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
