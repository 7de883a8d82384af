"""A request that is cancelled at any await, once or twice, over a real Redis: nothing is left or torn.

The request's coroutine is stepped by hand, so that every place where it waits is found, whoever wrote it.
"""

from __future__ import annotations

import asyncio
import types
from collections.abc import AsyncIterator, Callable, Coroutine, Generator
from dataclasses import dataclass
from typing import Any, TypeVar

import anyio
import pytest
from asgi import Answer, page, stream
from redis.asyncio import Redis

from asgi_sessions import Session
from asgi_sessions.asgi import ASGIApp

from .inprocess import Browser, Process, process_at

pytestmark = pytest.mark.anyio

T = TypeVar("T")
Suspended = Callable[[Any], None]
"""Told of each suspension, with what is waited for: a future, or None for one turn of the loop."""


@types.coroutine
def stepped(coroutine: Coroutine[Any, Any, T], suspended: Suspended) -> Generator[Any, Any, T]:
    """The coroutine's result; `suspended` is called each time it waits."""
    step: Callable[[Any], Any] = coroutine.send
    value: Any = None
    while True:
        try:
            waited_for = step(value)
        except StopIteration as end:
            result: T = end.value
            return result
        suspended(waited_for)
        try:
            value = yield waited_for
            step = coroutine.send
        except BaseException as error:  # this is what a coroutine is stepped by, CancelledError included
            step, value = coroutine.throw, error


class Interruption:
    """Cancels the task at its n-th suspension, or `late`: in the moment in which it would have gone on.

    With `again` it is cancelled a second time, so many suspensions later.
    """

    def __init__(self, place: int, *, late: bool, again: int = 0) -> None:
        self.reached = False
        self._left = place
        self._late = late
        self._again = again

    def __call__(self, waited_for: Any) -> None:
        """To be told of each suspension."""
        self._left -= 1
        if self._left != 0:
            return
        self.reached = True
        self._left, self._again = self._again, 0
        task = asyncio.current_task()
        assert task is not None
        if self._late and asyncio.isfuture(waited_for):
            waited_for.add_done_callback(lambda _: task.cancel())  # comes before the task's own callback
        else:
            task.cancel()


# -- what a request may do -----------------------------------------------------------------------------------


def write(session: Session) -> None:
    session["n"] = 1


def login(session: Session) -> None:
    session.login("ada")


async def save(session: Session) -> None:
    session["n"] = 1
    await session.save()


async def save_a_login(session: Session) -> None:
    session.login("ada")
    await session.save()


async def release(session: Session) -> None:
    session["n"] = 1
    await session.release()


async def transact(session: Session) -> None:
    async with session.transaction() as data:
        data.metadata["n"] = 1


def start_over(session: Session) -> None:
    session.logout()
    session["n"] = 1


OLD = (0, None)


@dataclass(frozen=True)
class Scenario:
    """A request, and what the session is once its success was told: n and user, none where it is gone."""

    app: ASGIApp
    after: tuple[object, ...]
    begun: bool = True
    path: str = "/"


SCENARIOS = {
    "read": Scenario(page(lambda session: session.get("n")), OLD),
    "write": Scenario(page(write), (1, None)),
    "begin": Scenario(page(write), (1, None), begun=False),
    "begin in a stream": Scenario(stream(write, None), (1, None), begun=False),
    "stream": Scenario(stream(lambda session: session.update(m=1), write, None), (1, None)),
    "save": Scenario(page(save), (1, None)),
    "release": Scenario(page(release), (1, None)),
    "login": Scenario(page(login), (0, "ada")),
    "save a login": Scenario(page(save_a_login), (0, "ada")),
    "logout": Scenario(page(Session.logout), ()),
    "logout and go on": Scenario(page(start_over), (1, None)),
    "failure": Scenario(page(write, status=500), OLD),
    "transaction": Scenario(page(transact), (1, None)),
    "transaction on a read-only route": Scenario(page(transact), (1, None), path="/ro"),
    "background": Scenario(page(then=transact), (1, None)),
}


@pytest.fixture
async def raw(redis_url: str) -> AsyncIterator[Redis]:
    async with Redis.from_url(redis_url) as client:
        yield client


@pytest.fixture
async def process(redis_url: str) -> AsyncIterator[Process]:
    async with process_at(redis_url, read_only=["/ro"]) as process:
        yield process


@pytest.fixture
async def elsewhere(redis_url: str) -> AsyncIterator[Process]:
    async with process_at(redis_url) as process:
        yield process


class Attempt:
    """One run of a scenario that is interrupted somewhere."""

    def __init__(self, scenario: Scenario, browser: Browser) -> None:
        self.scenario = scenario
        self.browser = browser
        self.finished = False

    async def prepare(self) -> None:
        """A session, where the request is to have one; nothing else in Redis."""
        await self.browser.raw.flushdb()
        if self.scenario.begun:
            await self.browser.open(page(lambda session: session.update(n=0)))

    async def run(self, interruption: Interruption) -> None:
        """The request, in a task of its own."""

        async def visit() -> Answer:
            request = self.browser.open(self.scenario.app, path=self.scenario.path, deliver=deliver)
            return await stepped(request, interruption)

        async def deliver(message: object) -> None:
            await asyncio.sleep(0)

        outcome = await asyncio.gather(asyncio.ensure_future(visit()), return_exceptions=True)
        self.finished = isinstance(outcome[0], Answer)
        assert self.finished or isinstance(outcome[0], asyncio.CancelledError), outcome[0]

    async def check(self) -> None:
        """No lock; the record is the old one or the new one; what was told is stored; the session goes on."""
        await self.browser.assert_free()
        store = self.browser.process.store
        records = await store.get_batch(await store.list_active())
        states = [(data.metadata.get("n"), data.user_id) for data in records.values() if data is not None]
        after = self.scenario.after
        assert set(states) <= {OLD, after}
        if self.finished:
            assert states == ([after] if after else [])
        answer = await self.browser.open(page(lambda session: session.get("n")))
        assert answer.status == 200


async def places(attempt: Attempt, *, late: bool, again: int = 0) -> int:
    """Interrupt at the first suspension, at the second, and so on; how many there are."""
    for place in range(1, 100):
        interruption = Interruption(place, late=late, again=again)
        await attempt.prepare()
        await attempt.run(interruption)
        await attempt.check()
        if not interruption.reached:
            assert attempt.finished
            return place - 1
    raise AssertionError("the request never came to its end")


@pytest.mark.parametrize("late", [False, True], ids=["as it begins to wait", "as it would go on"])
@pytest.mark.parametrize("name", SCENARIOS)
async def test_cancelled_anywhere(process: Process, raw: Redis, name: str, late: bool) -> None:
    """Wherever it happens the session is whole, free and usable at once."""
    assert await places(Attempt(SCENARIOS[name], Browser(process, raw)), late=late) >= 2


@pytest.mark.parametrize("late", [False, True], ids=["as it begins to wait", "as it would go on"])
@pytest.mark.parametrize("name", ["read", "write", "save", "login", "logout", "transaction", "background"])
async def test_cancelled_anywhere_without_the_lock(redis_url: str, raw: Redis, name: str, late: bool) -> None:
    """The same where the request loads and commits without the lock, or takes it last (`lock="auto"`)."""
    async with process_at(redis_url, lock="auto") as process:
        assert await places(Attempt(SCENARIOS[name], Browser(process, raw)), late=late) >= 1


async def test_cancelled_in_either_run(redis_url: str, raw: Redis, elsewhere: Process) -> None:
    """At any time while the app is run twice: no lock stays, and what was told is stored."""
    async with process_at(redis_url, lock="auto") as process:
        browser = Browser(process, raw)

        async def use(session: Session) -> None:
            if "m" not in session:
                await browser.at(elsewhere).open(page(lambda session: session.update(m=1)))
            session["n"] = 1

        attempt = Attempt(Scenario(page(use), (1, None)), browser)
        for tenths in range(80):
            await attempt.prepare()
            with anyio.move_on_after(tenths / 10_000):
                await browser.open(attempt.scenario.app)
                attempt.finished = True
            await attempt.check()
            attempt.finished = False
        with anyio.fail_after(10):
            await attempt.prepare()
            await browser.open(attempt.scenario.app)
        attempt.finished = True
        await attempt.check()


@pytest.mark.parametrize("again", [1, 2])
@pytest.mark.parametrize(
    "name", ["write", "begin", "login", "save a login", "logout and go on", "transaction"]
)
async def test_cancelled_while_it_cleans_up(process: Process, raw: Redis, name: str, again: int) -> None:
    """A second cancellation, in the clean-up after the first, leaves nothing either."""
    assert await places(Attempt(SCENARIOS[name], Browser(process, raw)), late=False, again=again) >= 2


ROLES: tuple[str, ...] = ("holder", "first waiter", "second waiter", "waiter elsewhere")


class Queue:
    """A request that holds the session, and three that wait for it; one of the four is interrupted."""

    def __init__(self, holding: Process, process: Process, elsewhere: Process, raw: Redis) -> None:
        self.browser = Browser(process, raw)
        self._processes = dict(zip(ROLES, (holding, process, process, elsewhere), strict=True))
        self.statuses: dict[str, int] = {}

    async def run(self, role: str, interruption: Interruption) -> None:
        """The holder lets go when the others wait; they get their turns whatever becomes of the one."""
        await self.browser.raw.flushdb()
        await self.browser.open(page(lambda session: session.update(n=0)))
        self.statuses.clear()
        inside, ready = anyio.Event(), anyio.Event()

        async def hold(session: Session) -> None:
            inside.set()
            await ready.wait()
            add(session)

        async def visit(each: str) -> None:
            app = page(hold if each == "holder" else add)
            request = self.browser.at(self._processes[each]).open(app)
            task = asyncio.ensure_future(_stepped(request, interruption) if each == role else request)
            outcome = await asyncio.gather(task, return_exceptions=True)
            if isinstance(outcome[0], Answer):
                self.statuses[each] = outcome[0].status
            inside.set()

        async with anyio.create_task_group() as group:
            for each in ROLES:
                group.start_soon(visit, each)
                await inside.wait()
                await self._settle()
            ready.set()

    async def _settle(self) -> None:
        """Let all come as far as they get: who waits within a process cannot be seen in Redis."""
        for _ in range(10):
            await self.browser.raw.ping()
            await asyncio.sleep(0.0005)

    async def check(self, role: str) -> None:
        """All others were served, each once; the interrupted one may have been."""
        others = {each: 200 for each in ROLES if each != role}
        assert {each: status for each, status in self.statuses.items() if each != role} == others
        await self.browser.assert_free()
        data = await self.browser.stored()
        assert data is not None
        assert data.metadata["n"] in ((4,) if self.statuses.get(role) == 200 else (3, 4))


async def _stepped(coroutine: Coroutine[Any, Any, T], suspended: Suspended) -> T:
    return await stepped(coroutine, suspended)


def add(session: Session) -> None:
    session["n"] += 1


@pytest.mark.parametrize("late", [False, True], ids=["as it begins to wait", "as it would go on"])
@pytest.mark.parametrize("near", [True, False], ids=["behind one of their own", "behind another process"])
@pytest.mark.parametrize("role", ROLES)
async def test_cancelled_in_the_queue(
    process: Process, elsewhere: Process, raw: Redis, role: str, late: bool, near: bool
) -> None:
    """Those before and behind it, here and in another process, have their turns as if it had never come."""
    queue = Queue(process if near else elsewhere, process, elsewhere, raw)
    for place in range(1, 60):
        interruption = Interruption(place, late=late)
        with anyio.fail_after(8):  # less than a lease
            await queue.run(role, interruption)
        await queue.check(role)
        if not interruption.reached:
            assert queue.statuses[role] == 200
            assert place > 2
            return
    raise AssertionError("the request never came to its end")
