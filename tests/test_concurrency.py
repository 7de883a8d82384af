"""Many clients and processes, one session: what was acknowledged stays, whatever becomes of a process."""

from __future__ import annotations

import os
import random
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import anyio
import httpx
import pytest
from concurrency_app import WAYS, build
from histories import Attempt, disordered, flaws, miscounted, outrun, repeated
from hypothesis import given
from hypothesis import strategies as st
from redis import Redis

from asgi_sessions import InMemorySessionStore

TESTS = Path(__file__).parent
PROCESSES = 3
SESSIONS = 3
CLIENTS = 8  # of each session
LEASE = 1.0  # seconds; what a killed holder may cost
PATIENCE = 30.0  # seconds for what must come, on however slow a machine
UNANSWERED = 0  # in place of a status


# -- the laws themselves -----------------------------------------------------------------------------------


def told(began: float, ended: float, number: int) -> Attempt:
    return Attempt(began, ended, number)


ONE_AFTER_THE_OTHER = [told(0, 1, 1), told(2, 3, 2), told(4, 5, 3)]
IN_DOUBT = Attempt(0, 9)
REFUSED = Attempt(0, 9, refused=True)


@pytest.mark.parametrize(
    ("attempts", "final"),
    [
        ([], 0),
        (ONE_AFTER_THE_OTHER, 3),
        ([*ONE_AFTER_THE_OTHER, IN_DOUBT], 3),
        ([*ONE_AFTER_THE_OTHER, IN_DOUBT], 4),
        ([*ONE_AFTER_THE_OTHER, REFUSED], 3),
        ([told(0, 5, 2), told(1, 4, 1)], 2),
        ([told(0, 1, 2), told(1, 2, 1)], 2),
    ],
    ids=["none", "in turn", "doubt, not stored", "doubt, stored", "refused", "overlapping", "touching"],
)
def test_lawful_history(attempts: list[Attempt], final: int) -> None:
    """Nothing is wrong with what a correct counter may show."""
    assert flaws(attempts, final) == []


@pytest.mark.parametrize(
    ("flaw", "sentence"),
    [
        (
            miscounted(ONE_AFTER_THE_OTHER, 2),
            "1 of 3 acknowledged increments are not in the final count 2",
        ),
        (
            miscounted([*ONE_AFTER_THE_OTHER, REFUSED], 4),
            "the final count 4 is more than the 3 acknowledged and 0 in doubt",
        ),
        (
            miscounted([*ONE_AFTER_THE_OTHER, IN_DOUBT], 5),
            "the final count 5 is more than the 3 acknowledged and 1 in doubt",
        ),
        (repeated([*ONE_AFTER_THE_OTHER, told(0, 9, 2)]), "2 was acknowledged 2 times"),
        (
            disordered([told(0, 1, 2), told(2, 3, 1)]),
            "1 was acknowledged to who began when 2 had been acknowledged",
        ),
        (
            disordered([told(0, 1, 3), told(0, 2, 1), told(2.5, 3, 2), told(2.6, 3, 4)]),
            "2 was acknowledged to who began when 3 had been acknowledged",
        ),
        (outrun([*ONE_AFTER_THE_OTHER, IN_DOUBT], 2), "3 is above the final 2"),
    ],
    ids=["lost", "refused, yet stored", "stored twice", "repeated", "late", "late among others", "above"],
)
def test_planted_flaw_is_found(flaw: list[str], sentence: str) -> None:
    """Each law finds what breaks it, and says so."""
    assert flaw == [sentence]


Stored: TypeAlias = tuple[float, float, bool]
STORED = st.lists(st.tuples(st.floats(0, 5), st.floats(0, 5), st.booleans()), min_size=1, max_size=12)


def numbered(stored: Sequence[Stored]) -> list[Attempt]:
    """A history in which the n-th attempt was stored at second n; it may have begun and ended at any time."""
    return [
        Attempt(at - before, at + after, at if heard else None)
        for at, (before, after, heard) in enumerate(stored, start=1)
    ]


@given(STORED)
def test_histories_of_one_order_are_lawful(stored: list[Stored]) -> None:
    """Attempts that took effect one after the other break no law, however they overlapped."""
    assert flaws(numbered(stored), len(stored)) == []


@given(STORED, st.data())
def test_any_lost_update_is_found(stored: list[Stored], data: st.DataObject) -> None:
    """Where two read the same count and both were told the next, a law is broken."""
    history = [
        Attempt(item.began, item.ended, item.number or n) for n, item in enumerate(numbered(stored), 1)
    ]
    again = data.draw(st.sampled_from(history))
    assert flaws([*history, again], len(stored)) != []


# -- the servers -------------------------------------------------------------------------------------------


def quiet_port() -> int:
    """A free port below those of outgoing connections, none of which can take it while its server is down."""
    while True:
        port = 20_000 + secrets.randbelow(12_000)
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


class Server:
    """A process of its own that serves the app over this Redis; what it prints is added to `output`."""

    def __init__(self, redis_url: str, lease: float, output: Path) -> None:
        self._port = quiet_port()
        self.url = f"http://127.0.0.1:{self._port}"
        self._output = output
        variables = {"PYTHONPATH": str(TESTS.parent), "REDIS_URL": redis_url, "LOCK_TIMEOUT": str(lease)}
        self._environment = {**os.environ, **variables}
        self.start()

    def start(self) -> None:
        """Start; it takes a moment until it serves."""
        command = [sys.executable, "-m", "uvicorn", "--factory", "concurrency_app:from_environment"]
        command += ["--app-dir", str(TESTS), "--port", str(self._port), "--log-level", "warning"]
        with self._output.open("ab") as output:
            self._process = subprocess.Popen(command, env=self._environment, stdout=output, stderr=output)

    def serves(self) -> bool:
        """Whether it accepts connections; an error where it has ended by itself."""
        if self._process.poll() is not None:
            raise RuntimeError(f"a server ended by itself with code {self._process.returncode}")
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self._port)) == 0

    def freeze(self) -> None:
        """SIGSTOP: it stands still until `thaw`, with its connections open."""
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """SIGCONT: it goes on as if nothing had happened."""
        self._process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """SIGKILL: it cleans nothing up, and its locks stay behind."""
        self._process.kill()
        self._process.wait()

    def stop(self) -> None:
        """SIGTERM, as a deployment sends it, which must suffice; also for one that is frozen."""
        self._process.terminate()
        self.thaw()
        try:
            self._process.wait(PATIENCE)
        finally:
            self.kill()


@dataclass
class Site:
    """Several servers over one Redis."""

    servers: list[Server]
    redis: Redis
    output: Path

    async def up(self) -> None:
        """Wait until all servers serve."""
        await until(lambda: all(server.serves() for server in self.servers))

    def keys(self) -> dict[str, int]:
        """All keys that there are in Redis, and their time to live in milliseconds (-1: for ever)."""
        keys = self.redis.keys()
        ttls = {str(key): self.redis.pttl(key) for key in keys}
        return {key: ttl for key, ttl in ttls.items() if ttl != -2}  # -2: it has just gone


@contextmanager
def running_site(redis_url: str, output: Path, lease: float) -> Iterator[Site]:
    """Servers whose leases are `lease` seconds long. They end with the block. What they said is shown."""
    with ExitStack() as stack:
        output.touch()
        stack.callback(lambda: print(output.read_text(errors="replace")))
        site = Site([], stack.enter_context(Redis.from_url(redis_url, decode_responses=True)), output)
        for _ in range(PROCESSES):
            site.servers.append(Server(redis_url, lease, output))
            stack.callback(site.servers[-1].stop)
        yield site


async def until(condition: Callable[[], bool]) -> None:
    """Wait for what must come at last; `TimeoutError` where it does not."""
    with anyio.fail_after(PATIENCE):
        while not condition():  # noqa: ASYNC110  # other processes set no events
            await anyio.sleep(0.02)


# -- the clients -------------------------------------------------------------------------------------------


@dataclass
class SharedSession:
    """One session, used by many clients at once, and what they saw of it."""

    http: httpx.AsyncClient
    urls: Sequence[str]
    histories: dict[str, list[Attempt]] = field(default_factory=lambda: defaultdict(list))
    answers: Counter[int] = field(default_factory=Counter)

    async def begin(self) -> None:
        """Get the session's cookie."""
        answer = await self.http.get(f"{self.urls[0]}/begin")
        assert answer.status_code == 200, answer.text

    async def visit(self, turns: Iterable[object], dice: random.Random) -> None:
        """Be one client: count once in each turn, in a way and at a server that chance chooses."""
        for _ in turns:
            if await self.increment(dice.choice(self.urls), dice.choice([*WAYS])) == UNANSWERED:
                await anyio.sleep(0.01)

    async def increment(self, url: str, way: str) -> int:
        """Count once and note what was seen; the answer's status."""
        began = time.monotonic()
        status, number, refused = UNANSWERED, None, False
        try:
            answer = await self.http.get(f"{url}/{way}")
            status = answer.status_code
            number = int(answer.text) if status == 200 else None
            refused = status == 409
        except httpx.ConnectError:
            refused = True  # nobody was asked
        except httpx.TransportError:
            pass  # whether it was stored is not known
        finally:
            self.histories[WAYS[way]].append(Attempt(began, time.monotonic(), number, refused))
        self.answers[status] += 1
        return status

    async def flaws(self) -> list[str]:
        """What is wrong with what the clients saw, now that the counts are final."""
        answer = await self.http.get(f"{self.urls[0]}/counts")
        assert answer.status_code == 200, answer.text
        return [
            f"{name}: {flaw}"
            for name, final in answer.json().items()
            for flaw in flaws(self.histories[name], final)
        ]


@asynccontextmanager
async def shared_session(
    urls: Sequence[str], transport: httpx.AsyncBaseTransport | None = None
) -> AsyncIterator[SharedSession]:
    """A session that has begun."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(limits=limits, timeout=PATIENCE, transport=transport) as http:
        session = SharedSession(http, urls)
        await session.begin()
        yield session


@asynccontextmanager
async def shared_sessions(site: Site) -> AsyncIterator[list[SharedSession]]:
    """Several sessions at a site, once it is up."""
    await site.up()
    urls = [server.url for server in site.servers]
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(shared_session(urls)) for _ in range(SESSIONS)]


async def crowd(session: SharedSession, clients: int, turns: Callable[[], Iterable[object]]) -> None:
    """So many clients of one session at once, each of which counts once in each of its turns."""
    async with anyio.create_task_group() as group:
        for client in range(clients):
            group.start_soon(session.visit, turns(), random.Random(client))


async def crowds(sessions: list[SharedSession], turns: Callable[[], Iterable[object]]) -> None:
    """The clients of all sessions at once."""
    async with anyio.create_task_group() as group:
        for session in sessions:
            group.start_soon(crowd, session, CLIENTS, turns)


# -- what may happen to a site -----------------------------------------------------------------------------

Blow: TypeAlias = Callable[[Site, random.Random], Awaitable[None]]


async def kill_a_process(site: Site, dice: random.Random) -> None:
    """SIGKILL, and a new process in its place."""
    victim = dice.choice(site.servers)
    victim.kill()
    victim.start()


async def freeze_a_process(site: Site, dice: random.Random) -> None:
    """A pause of one process that outlasts its leases, while the others go on."""
    victim = dice.choice(site.servers)
    victim.freeze()
    await anyio.sleep(1.5 * LEASE)
    victim.thaw()


async def cut_connections(site: Site, dice: random.Random) -> None:
    """The connections to Redis break: those of the calls, or those that wake the waiting."""
    site.redis.client_kill_filter(_type=dice.choice(["normal", "pubsub"]), skipme=True)


async def strike(site: Site, blow: Blow, times: int, pause: float) -> None:
    """So many blows, with so many seconds before each."""
    dice = random.Random(times)
    for _ in range(times):
        await anyio.sleep(pause)
        await blow(site, dice)
    await site.up()


# -- the promise -------------------------------------------------------------------------------------------


async def assert_kept(site: Site, sessions: list[SharedSession]) -> None:
    """Nothing acknowledged is lost, each way works at each server, and only the sessions are left."""
    for session in sessions:
        for url in session.urls:
            assert [await session.increment(url, way) for way in WAYS] == [200] * len(WAYS)
        assert await session.flaws() == [], session.answers
    assert [key for key, ttl in site.keys().items() if ttl == -1] == []
    await until(lambda: len(site.keys()) == SESSIONS)


@pytest.mark.anyio
async def test_processes_share_sessions(redis_url: str, tmp_path: Path) -> None:
    """Each request to each of several processes is answered 200, and each of them counts."""
    with running_site(redis_url, tmp_path / "output", lease=10.0) as site:
        async with shared_sessions(site) as sessions:
            await crowds(sessions, lambda: range(15))
            assert [session.answers for session in sessions] == [{200: 15 * CLIENTS}] * SESSIONS
            await assert_kept(site, sessions)
        assert site.output.read_text() == ""


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("blow", "times", "pause"),
    [(kill_a_process, 9, 0.7), (freeze_a_process, 3, 0.3), (cut_connections, 30, 0.1)],
    ids=["killed", "frozen", "cut off"],
)
async def test_promise_outlives(redis_url: str, tmp_path: Path, blow: Blow, times: int, pause: float) -> None:
    """Processes die, hang or lose Redis: what they acknowledged stays, and sessions go on without them."""
    with running_site(redis_url, tmp_path / "output", LEASE) as site:
        over = anyio.Event()
        async with shared_sessions(site) as sessions:
            async with anyio.create_task_group() as group:
                group.start_soon(crowds, sessions, lambda: iter(over.is_set, True))
                await strike(site, blow, times, pause)
                over.set()
            answers = {status for session in sessions for status in session.answers}
            assert answers <= {200, 409, 503, UNANSWERED}
            await assert_kept(site, sessions)


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio", "trio"])
async def test_tasks_share_a_session_in_memory(anyio_backend: str) -> None:
    """Fifty tasks of one process, on either event loop: each increment is acknowledged and counts."""
    store = InMemorySessionStore()
    async with shared_session(["http://memory"], httpx.ASGITransport(build(store))) as session:
        await crowd(session, 50, lambda: range(2))
        assert session.answers == {200: 100}
        assert await session.flaws() == []
    assert len(store._locks) == 0


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio", "trio"])
async def test_impatient_tasks_leave_nothing(anyio_backend: str) -> None:
    """Tasks that are cancelled while they wait, count or store neither hold up others nor falsify a count."""
    store = InMemorySessionStore()
    dice = random.Random(50)
    async with shared_session(["http://memory"], httpx.ASGITransport(build(store))) as session:

        async def leave_early(turn: int) -> None:
            with anyio.move_on_after(dice.uniform(0, 0.5)):
                await session.increment("http://memory", [*WAYS][turn % len(WAYS)])

        async with anyio.create_task_group() as group:
            for turn in range(50):
                group.start_soon(leave_early, turn)
        assert session.answers[200] < 50, "nobody left early"
        assert await session.increment("http://memory", "nested") == 200
        assert await session.flaws() == []
    assert len(store._locks) == 0
