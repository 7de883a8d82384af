"""`lock="auto"` with three writers by POST and three by GET on each session: nothing acknowledged is lost.

`pytest tests/faults/test_mixed_methods.py --long` has 100,000 changes acknowledged.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack, ExitStack
from functools import reduce
from pathlib import Path

import anyio
import httpx
import pytest
from asgi import PrimitiveStore
from redis_server import RedisServer
from relays import Authority, Relay, in_pieces

from asgi_sessions import InMemorySessionStore, SessionStore

from . import figures
from .app import AUTO, build
from .blows import CAMPAIGNS, Campaign, freeze_a_worker, kill_a_worker
from .clients import OBJECTS, crowd, shared_session
from .load import Load
from .processes import PATIENCE, Site, Worker, running_site, until

METHODS = ("POST", "GET") * 3
SESSIONS = 2
ROUND, MANY_ROUNDS = 1_000, 100  # acknowledged changes in a round, with sessions of its own; rounds
BLOWS = {
    "none", "worker killed", "worker frozen past its leases", "connections closed by Redis",
    "connection reset before a commit", "connection reset after a commit", "wake-ups swallowed",
    "Redis paused (WRITE)", "Redis killed, restarted with its data", "locks deleted",
}  # fmt: skip

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Workers that all tests here share, whatever befell them in the one before."""
    output = tmp_path_factory.mktemp("site") / "output"
    with running_site(output, workers=[{"LOCK": "auto", "PAUSE": "0.001"}] * 2) as site:
        yield site


async def begin(stack: AsyncExitStack, site: Site) -> Load:
    """A load of mixed methods on sessions that have begun."""
    site.redis.flushall()
    await site.up()
    made = [shared_session(site.urls, methods=METHODS) for _ in range(SESSIONS)]
    load = Load(site, [await stack.enter_async_context(each) for each in made])
    load.clients = len(METHODS)
    return load


async def sound(load: Load, name: str, times: int) -> figures.Figures:
    """Assert that all works by each method, that no lock is left and no law was broken; the table's line."""
    for session in load.sessions:
        for method in ("GET", "POST"):
            answers = [await session.do(session.urls[0], path, method) for path in OBJECTS]
            assert answers == [200] * len(OBJECTS)
    await until(lambda: not load.site.leftovers())
    flaws = await load.flaws()
    assert flaws == [], [session.seen.answers for session in load.sessions]
    return load.figures(f"mixed methods: {name}", times, flaws)


@pytest.mark.parametrize(
    "campaign", [each for each in CAMPAIGNS if each.name in BLOWS], ids=lambda campaign: campaign.name
)
async def test_mixed_methods_outlive(site: Site, campaign: Campaign[Site]) -> None:
    """Whatever befalls workers, network and Redis."""
    dice = random.Random(campaign.times)
    async with AsyncExitStack() as stack:
        load = await begin(stack, site)

        async def strike() -> int:
            for _ in range(campaign.times):
                await anyio.sleep(campaign.pause)
                await campaign.blow(site, dice)
            await site.up()
            return campaign.times

        times = await load.go_on(strike)
        figures.gathered.append(await sound(load, campaign.name, times))


async def test_many_changes_while_processes_are_killed_and_frozen(
    site: Site, request: pytest.FixtureRequest
) -> None:
    """All that were acknowledged are there, each number once, in an order that explains the answers."""
    dice = random.Random(10)
    changes, lines = 0, []
    for _ in range(MANY_ROUNDS if request.config.getoption("--long") else 1):
        async with AsyncExitStack() as stack:
            load = await begin(stack, site)
            blows = await load.go_on(lambda load=load: kill_and_freeze(load, dice))  # type: ignore[misc]
            lines.append(await sound(load, "killed and frozen", blows))
            changes += acknowledged(load)
    figures.gathered.append(reduce(figures.Figures.plus, lines))
    print(f"{changes} changes acknowledged, none lost")


async def kill_and_freeze(load: Load, dice: random.Random) -> int:
    """A blow of each kind, at a third and at two thirds of a round's changes; how many blows there were."""
    for part, blow in enumerate(dice.sample([kill_a_worker, freeze_a_worker], 2), 1):
        await enough(load, ROUND * part // 3)
        await blow(load.site, dice)
        await load.site.up()
    await enough(load, ROUND)
    return 2


async def enough(load: Load, changes: int) -> None:
    with anyio.fail_after(10 * PATIENCE):
        while acknowledged(load) < changes:  # noqa: ASYNC110  # clients set no event
            await anyio.sleep(0.05)


def acknowledged(load: Load) -> int:
    """Changes so far; reads do not count."""
    return sum([len(session.stays) for session in load.sessions])


@pytest.mark.parametrize("kind", ["memory", "four primitives"])
async def test_mixed_methods_in_one_process(kind: str, request: pytest.FixtureRequest) -> None:
    """Many tasks over a store that needs no server: every operation is acknowledged."""
    store: SessionStore = InMemorySessionStore() if kind == "memory" else PrimitiveStore(clock=time.time)
    clients, turns = (6, 200) if request.config.getoption("--long") else (60, 3)
    transport = httpx.ASGITransport(build(store, **AUTO))
    async with shared_session(["http://process"], transport, METHODS) as session:
        await crowd(session, clients, lambda: range(turns))
        assert session.seen.answers == {200: clients * turns + 1}
        assert await session.flaws() == []
    assert len(store._locks) == 0


async def test_mixed_methods_over_tls(redis_server: RedisServer, tmp_path: Path) -> None:
    """Two processes, whose streams from Redis are cut anywhere, within records of TLS too."""
    authority = Authority(tmp_path)
    tls = authority.context("localhost")
    with ExitStack() as stack:
        relay = stack.enter_context(Relay(redis_server.port, tls=tls, carry=in_pieces(seed=12)))
        variables = {
            "STORE_URL": authority.url("localhost", relay.port),
            "LOCK": "auto", "LOCK_TIMEOUT": "5", "LOCK_WAIT": "15", "PAUSE": "0.001",
        }  # fmt: skip
        workers = [Worker(variables, tmp_path / "output") for _ in range(2)]
        for worker in workers:
            stack.callback(worker.stop)
        await until(lambda: all(worker.serves() for worker in workers))
        async with shared_session([worker.url for worker in workers], methods=METHODS) as session:
            await crowd(session, 12, lambda: range(10))
            assert session.seen.answers == {200: 12 * 10 + 1}
            assert await session.flaws() == []


async def test_impatient_clients_of_mixed_methods_leave_nothing() -> None:
    """Those that are cancelled in a first run, in a second one or between neither hold up nor falsify."""
    store = InMemorySessionStore()
    dice = random.Random(11)
    transport = httpx.ASGITransport(build(store, **AUTO))
    async with shared_session(["http://process"], transport, METHODS) as session:

        async def leave_early(turn: int) -> None:
            with anyio.move_on_after(dice.uniform(0, 0.3)):
                await session.do("http://process", [*OBJECTS][turn % len(OBJECTS)], dice.choice(METHODS))

        async with anyio.create_task_group() as group:
            for turn in range(80):
                group.start_soon(leave_early, turn)
        assert session.seen.answers[200] < 81, "nobody left early"
        assert await session.do("http://process", "nested") == 200
        assert await session.flaws() == []
    assert len(store._locks) == 0
