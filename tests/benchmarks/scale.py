"""What a request costs when there are many sessions, what a session takes, and what making room costs;
what a sign-in costs when the user has many, and how long an overview of all keeps the event loop.

    python tests/benchmarks/scale.py [--sizes 1000,10000,100000,1000000] [--rounds 7] [--requests 1000]
                                     [--json FILE] [--plot FILE] [--quick]

Each population lives in a process of its own (and, on Redis, in a server of its own; in SQLite, in a file of
its own), so that neither memory nor garbage collection of one counts for another; the processes take turns.
Requests go through the whole middleware, called in process, one at a time, each of a session chosen at
random. A record has about 300 bytes.

A million sessions in memory take about 1 GB, in Redis about half of that, and some minutes to make.
"""

from __future__ import annotations

import asyncio
import gc
import hashlib
import random
import resource
import statistics
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any, TypeAlias, TypeVar, cast

from measure import (
    Cell,
    Figures,
    Panel,
    Report,
    Samples,
    Table,
    Target,
    alternate,
    command_line,
    machine,
    parse,
)
from redis import Redis
from redis_server import RedisServer

from asgi_sessions import (
    InMemorySessionStore,
    RedisSessionStore,
    SessionData,
    SessionMiddleware,
    SessionStore,
    SQLiteSessionStore,
)
from asgi_sessions.asgi import Message, Receive, Scope, Send
from asgi_sessions.client.signer import CookieSigner
from asgi_sessions.record.codec import encode
from asgi_sessions.stores.checkout import Checkout, Lifetime, LockPolicy

SECRET = "a secret of the benchmarks and of nothing else"
CONTENT = {"user": "ada", "n": 0}  # with its fields a record of 300 bytes
LIFE = 3600.0  # seconds
CHUNK = 1000  # records of one batch while Redis is filled
SAMPLE = 200  # records whose size Redis is asked for
PAGE = 20
PARTS = 20  # of the requests of one turn
ROOM_ROUNDS = 3  # each of them replaces every session twice
USERS = {1: "one", 100: "hundred", 10_000: "ten-thousand"}  # sessions that they have
SIGN_INS = 40  # of each user and round: few, for each leaves a session more until the round is over
AN_HOUR_AGO = 3_600_000  # ms
PAGE_BYTES = resource.getpagesize()

Item = TypeVar("Item")
Command: TypeAlias = Callable[..., Awaitable[Figures]]


# -- a population, in its own process ------------------------------------------------------------------------


def name(number: int) -> str:
    """The id of the session with this number: as random as a real one, and nobody has to keep it."""
    return hashlib.blake2b(number.to_bytes(8, "big"), digest_size=16).hexdigest()


def data(number: int) -> SessionData:
    return SessionData(session_id=name(number), metadata=CONTENT)


async def read(scope: Scope, receive: Receive, send: Send) -> None:
    if "n" not in scope["session"]:
        raise RuntimeError("the session is lost")
    await answer(send)


async def write(scope: Scope, receive: Receive, send: Send) -> None:
    scope["session"]["n"] += 1
    await answer(send)


async def answer(send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


async def receive() -> Message:
    return {"type": "http.request", "body": b"", "more_body": False}


async def microseconds(call: Callable[[Item], Awaitable[None]], items: Sequence[Item]) -> float:
    """Of one call, one after the other: the median of their parts, so that a pause counts in one of them."""
    size = max(len(items) // PARTS, 1)
    took = []
    for first in range(0, len(items), size):
        part = items[first : first + size]
        started = time.perf_counter()
        for item in part:
            await call(item)
        took.append((time.perf_counter() - started) / len(part))
    return statistics.median(took) * 1e6


class Population:
    """So many sessions in a store, and requests of random ones; counts what was written to whom."""

    def __init__(self, store: SessionStore, size: int) -> None:
        self.store = store
        self.size = size
        self._signer = CookieSigner(SECRET)
        self._apps = {app.__name__: SessionMiddleware(app, SECRET, store=store) for app in (read, write)}
        self._dice = random.Random(size)
        self._written: Counter[int] = Counter()

    async def requests(self, number: int) -> Figures:
        """Microseconds per request of each kind, and milliseconds of the calls that go over all sessions."""
        figures = {f"{kind}_us": await self._timed(kind, number) for kind in self._apps}
        figures["checkout_us"] = await self._checkouts(number)
        for figure, call in (
            ("count_ms", self.store.count_active),
            ("page_ms", partial(self.store.list_active, PAGE)),
        ):
            started = time.perf_counter()
            found = await cast("Awaitable[int | list[str]]", call())
            figures[figure] = (time.perf_counter() - started) * 1e3
            if found != self.size and (isinstance(found, int) or len(found) != min(PAGE, self.size)):
                raise RuntimeError(f"{call} found {found!r} among {self.size} sessions")
        return figures

    async def lost(self) -> Figures:
        """How many acknowledged writes the records do not show, and how many there were."""
        lost = 0
        for number, times in self._written.items():
            found = await self.store.get(name(number))
            lost += times - (0 if found is None else int(found.metadata["n"]))
        return {"lost": lost, "written": self._written.total()}

    async def _timed(self, kind: str, requests: int) -> float:
        chosen = self._dice.choices(range(self.size), k=requests)
        if kind == "write":
            self._written.update(chosen)
        scopes = [self._scope(number) for number in chosen]
        app, answers = self._apps[kind], Counter[int]()

        async def send(message: Message) -> None:
            if message["type"] == "http.response.start":
                answers[message["status"]] += 1

        took = await microseconds(lambda scope: app(scope, receive, send), scopes)
        if answers != {200: requests}:
            raise RuntimeError(f"{requests} requests were answered with {dict(answers)}")
        return took

    async def _checkouts(self, requests: int) -> float:
        """The store's own part: lock, load and let go."""
        policy, lifetime = LockPolicy(), Lifetime(LIFE)
        ids = [name(number) for number in self._dice.choices(range(self.size), k=requests)]

        async def take(session_id: str) -> None:
            taken = await self.store.checkout(session_id, policy, lifetime)
            await self.store.release(cast(Checkout, taken))

        return await microseconds(take, ids)

    def _scope(self, number: int) -> Scope:
        cookie = f"theme=dark; session={self._signer.sign(name(number))}".encode()
        return {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "GET",
            "scheme": "http", "path": "/", "raw_path": b"/", "query_string": b"", "root_path": "",
            "headers": [(b"host", b"localhost"), (b"user-agent", b"Firefox/140.0"), (b"cookie", cookie)],
            "client": ("127.0.0.1", 50000), "server": ("127.0.0.1", 80),
        }  # fmt: skip


class InMemory(Population):
    """A full store, on a clock that the benchmark moves."""

    def __init__(self, size: int) -> None:
        self._now = 0.0
        self._store = InMemorySessionStore(size, clock=lambda: self._now)
        self._next = 0
        super().__init__(self._store, size)

    async def fill(self) -> Figures:
        """Make the sessions; the bytes that each of them takes, NaN where the system does not tell."""
        before, started = resident(), time.perf_counter()
        await self._create(self.size)
        took = time.perf_counter() - started
        return {"us": took / self.size * 1e6, "bytes": (resident() - before) / self.size}

    async def make_room(self, creates: int) -> Figures:
        """Replace all sessions in a full store: first while all live, then after all of them have ended.

        Microseconds per session created, milliseconds of the longest creation. It is processor time, so that
        what others make this process wait is not taken for a stall of the store's.
        """
        creates = max(creates, self.size)
        with Collections() as collections:
            live = await self._create(creates)
            self._now += LIFE
            ended = await self._create(creates)
        return {
            "live_us": statistics.fmean(live) * 1e6,
            "live_longest_ms": max(live) * 1e3,
            "ended_us": statistics.fmean(ended) * 1e6,
            "ended_first_ms": ended[0] * 1e3,
            "ended_longest_ms": max(ended) * 1e3,
            "collection_ms": collections.longest * 1e3,
        }

    async def unaccounted(self) -> Figures:
        """Sessions that were made and, by the store's own books, neither live nor were evicted nor ended."""
        stats = await self.store.get_stats()
        known = stats["active_sessions"] + stats["evictions"] + stats["expirations"]
        return {"made": self._next, "unaccounted": abs(self._next - known)}

    async def _create(self, number: int) -> list[float]:
        """The processor seconds that each creation takes; only the store's part is timed."""
        template, lifetime, seconds = encode(data(0)), Lifetime(LIFE), []
        placeholder = name(0).encode()
        for count in range(self._next, self._next + number):
            session_id = name(count)
            record = template.replace(placeholder, session_id.encode())
            started = time.thread_time()
            created = await self.store.create(session_id, record, lifetime, None)
            seconds.append(time.thread_time() - started)
            if created is None:
                raise RuntimeError("a new id was taken")
        self._next += number
        return seconds


class OnRedis(Population):
    """Sessions on a server that has nothing else to keep."""

    def __init__(self, size: int, url: str) -> None:
        self._url = url
        super().__init__(RedisSessionStore(url), size)

    async def fill(self) -> Figures:
        """Make the sessions; what each takes: of the server's memory, and by `MEMORY USAGE`."""
        with Redis.from_url(self._url) as client:
            await self.store.open()
            before, started = client.info("memory")["used_memory"], time.perf_counter()
            for first in range(0, self.size, CHUNK):
                chunk = map(data, range(first, min(first + CHUNK, self.size)))
                await self.store.set_batch({each.session_id: each for each in chunk}, LIFE)
            took = time.perf_counter() - started
            used = client.info("memory")["used_memory"] - before
            keys = [f"session:{{{name(number)}}}" for number in range(min(SAMPLE, self.size))]
            sizes = [cast(int, client.memory_usage(key)) for key in keys]
        return {
            "us": took / self.size * 1e6,
            "bytes": used / self.size,
            "key_bytes": statistics.median(sizes),
        }

    async def overviews(self) -> Figures:
        """Milliseconds of the calls that go over all sessions, and for how long they keep the event loop.

        That is processor time between two turns of another task, so that what others make this process wait
        is not taken for a stall.
        """
        figures: dict[str, float] = {}
        for call in (
            self.store.count_active, self.store.get_stats, self.store.get_metrics, self.store.health_check
        ):  # fmt: skip
            with Turns() as turns:
                started = time.perf_counter()
                await cast("Awaitable[object]", call())
                figures[f"{call.__name__}_ms"] = (time.perf_counter() - started) * 1e3
            figures[f"{call.__name__}_stall_ms"] = turns.longest * 1e3
        return figures


class InFile(Population):
    """Sessions in a SQLite file, which are read from it one by one."""

    def __init__(self, size: int, path: str) -> None:
        self._path = Path(path)
        super().__init__(SQLiteSessionStore(path), size)

    async def fill(self) -> Figures:
        """Make the sessions; what each takes of the file."""
        await self.store.open()
        started = time.perf_counter()
        for first in range(0, self.size, CHUNK):
            chunk = map(data, range(first, min(first + CHUNK, self.size)))
            await self.store.set_batch({each.session_id: each for each in chunk}, LIFE)
        took = time.perf_counter() - started
        await self.store.aclose()  # the log is folded in
        return {"us": took / self.size * 1e6, "bytes": self._path.stat().st_size / self.size}


class OneUser:
    """A user with so many sessions, none of which is new, who signs in again."""

    def __init__(self, store: RedisSessionStore, client: Redis, sessions: int) -> None:
        self._store = store
        self._client = client
        self._user = USERS[sessions]
        self._sessions = sessions
        self._key = f"session:user:{self._user}"

    async def fill(self) -> None:
        """Make the sessions, and their links as old as if nobody had signed in for an hour."""
        for first in range(0, self._sessions, CHUNK):
            numbers = range(first, min(first + CHUNK, self._sessions))
            await self._store.set_batch({each.session_id: each for each in map(self._data, numbers)}, LIFE)
        for number in range(self._sessions):
            self._client.zincrby(self._key, -AN_HOUR_AGO, self._data(number).session_id)

    async def sign_in(self) -> Figures:
        """Microseconds of each: until it is done, and with what nobody waits for.

        Afterwards the user has as many sessions as before.
        """
        new = [self._data(self._sessions + number) for number in range(SIGN_INS)]
        lifetime = Lifetime(LIFE)
        state = await self._store._states.get()
        answered, settled = [], []
        for each in new:
            record = encode(each)
            started = time.perf_counter()
            await self._store.create(each.session_id, record, lifetime, None, self._user)
            answered.append(time.perf_counter() - started)
            await asyncio.gather(*state.index._tidying.values())
            settled.append(time.perf_counter() - started)
        figures = {
            "sign_in_us": statistics.median(answered) * 1e6, "settled_us": statistics.fmean(settled) * 1e6
        }  # fmt: skip
        await self._store.delete_batch([each.session_id for each in new])
        self._client.zrem(self._key, *[each.session_id for each in new])
        return figures

    def _data(self, number: int) -> SessionData:
        session_id = name(number + 10**6 * self._sessions)
        return SessionData(session_id=session_id, user_id=self._user, metadata=CONTENT)


class Turns:
    """How long another task waits for its turn within the block, at most, in processor seconds."""

    longest = 0.0

    def __enter__(self) -> Turns:
        self._task = asyncio.ensure_future(self._take())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._task.cancel()

    async def _take(self) -> None:
        last = time.thread_time()
        while True:
            await asyncio.sleep(0)
            now = time.thread_time()
            self.longest, last = max(self.longest, now - last), now


class Collections:
    """How long the longest garbage collection within the block took, in processor seconds."""

    longest = 0.0

    def __enter__(self) -> Collections:
        gc.callbacks.append(self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        gc.callbacks.remove(self._note)

    def _note(self, phase: str, info: Mapping[str, int]) -> None:
        if phase == "start":
            self._began = time.thread_time()
        else:
            self.longest = max(self.longest, time.thread_time() - self._began)


def resident() -> float:
    """Bytes of memory that this process has, by Linux; NaN elsewhere."""
    try:
        statm = Path("/proc/self/statm").read_text().split()
    except OSError:
        return float("nan")
    return float(int(statm[1]) * PAGE_BYTES)


def serve(commands: Connection, place: str, size: int, where: str) -> None:
    """The life of a population's process: carry out commands until there are no more."""
    asyncio.run(_serve(commands, population_of(place, size, where)))


def population_of(place: str, size: int, where: str) -> Population:
    if place == "memory":
        return InMemory(size)
    return OnRedis(size, where) if place == "redis" else InFile(size, where)


async def _serve(commands: Connection, population: Population) -> None:
    while True:
        command = commands.recv()
        if command is None:
            break
        method, *arguments = command
        call: Command = getattr(population, method)
        commands.send(await call(*arguments))
    await population.store.aclose()


class Process:
    """A population elsewhere: a call of its methods is a message to it."""

    def __init__(self, place: str, size: int, where: str) -> None:
        context = get_context("spawn")
        self._commands, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, place, size, where), daemon=True)
        self._process.start()
        theirs.close()

    def __enter__(self) -> Process:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._commands.send(None)
            self._process.join()
        self._process.kill()

    async def call(self, method: str, *arguments: int) -> Figures:
        """What the population's method gives. `EOFError` when it failed; its process has said why."""
        self._commands.send((method, *arguments))
        figures: Figures = self._commands.recv()
        return figures


# -- the benchmark -------------------------------------------------------------------------------------------

PLACES = {"memory": "in memory", "sqlite": "in a file", "redis": "on Redis"}


class Measured:
    """Everything that was found out. Subjects are (place, size), written as one string."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self.sizes = sizes
        self.samples = Samples()
        self.fills: dict[str, Figures] = {}
        self.users = Samples()
        self.lost: dict[str, Figures] = {}
        self.books: dict[str, Figures] = {}

    def row(self, place: str, figure: str) -> list[float]:
        """The medians of a figure over the sizes."""
        return [self.samples.median(subject(place, size), figure) for size in self.sizes]

    def growth(self, place: str, figure: str) -> float:
        """What it costs with most sessions in terms of what it costs with fewest, round by round."""
        return self.samples.ratio(subject(place, self.sizes[-1]), subject(place, self.sizes[0]), figure)


def subject(place: str, size: int) -> str:
    return f"{place} {size}"


async def measure(sizes: Sequence[int], rounds: int, requests: int) -> Measured:
    """Make all populations, then let them take turns; at last ask each what became of its writes."""
    measured = Measured(sizes)
    with ExitStack() as stack:
        processes: dict[str, Process] = {}
        folder = stack.enter_context(TemporaryDirectory())
        for size in sizes:
            server = stack.enter_context(RedisServer())
            file = str(Path(folder) / f"{size}.db")
            for place, where in (("memory", ""), ("sqlite", file), ("redis", server.url)):
                processes[subject(place, size)] = stack.enter_context(Process(place, size, where))
        for each, process in processes.items():
            print(f"making {each} …", file=sys.stderr)
            measured.fills[each] = await process.call("fill")
        turns = {each: partial(process.call, "requests", requests) for each, process in processes.items()}
        await alternate(turns, rounds, measured.samples)
        for each, process in processes.items():
            measured.lost[each] = await process.call("lost")
        shared = {each: process for each, process in processes.items() if each.startswith("redis")}
        overviews = {each: partial(process.call, "overviews") for each, process in shared.items()}
        await alternate(overviews, min(rounds, ROOM_ROUNDS), measured.samples)
        await sign_ins(stack.enter_context(RedisServer()).url, rounds, measured.users)
        full = {each: process for each, process in processes.items() if each.startswith("memory")}
        rooms = {each: partial(process.call, "make_room", requests) for each, process in full.items()}
        await alternate(rooms, min(rounds, ROOM_ROUNDS), measured.samples)
        for each, process in full.items():
            measured.books[each] = await process.call("unaccounted")
    return measured


async def sign_ins(url: str, rounds: int, samples: Samples) -> None:
    """Let users with few and with many sessions sign in, by turns."""
    store = RedisSessionStore(url)
    with Redis.from_url(url) as client:
        users = {USERS[sessions]: OneUser(store, client, sessions) for sessions in USERS}
        for user in users.values():
            await user.fill()
        await alternate({who: user.sign_in for who, user in users.items()}, rounds, samples)
    await store.aclose()


# -- telling -------------------------------------------------------------------------------------------------

COSTS = {
    "read_us": "read",
    "write_us": "write",
    "checkout_us": "of it the store: check out, let go",
}
ROOM = {
    "live_us": "evicting a live one, µs",
    "live_longest_ms": "  longest of all, ms",
    "ended_us": "after all have ended, µs",
    "ended_first_ms": "  the first of them, ms",
    "ended_longest_ms": "  longest of all, ms",
    "collection_ms": "the longest garbage collection meanwhile, ms",
}
OVERVIEWS = ("count_active", "get_stats", "get_metrics", "health_check")
COUNT = 50  # ms
STALL = 5.0  # ms for which an overview may keep the event loop
FLAT = {"memory": 1.5, "sqlite": 1.3, "redis": 1.5}
"""Times what it costs with fewest sessions; caches of the processor give out on the way."""


def columns(sizes: Sequence[int]) -> list[str]:
    return ["", *[f"{size:,}" for size in sizes], "last / first"]


def cost_table(measured: Measured) -> Table:
    rows: list[list[Cell]] = [
        [f"{label}, {where}", *measured.row(place, figure), measured.growth(place, figure)]
        for place, where in PLACES.items()
        for figure, label in COSTS.items()
    ]
    note = "4,096 verified cookies are remembered; with more sessions a request hashes its cookie anew."
    return Table("µs per request of a random session", columns(measured.sizes), rows, note)


def overview_table(measured: Measured) -> Table:
    labels = {"count_ms": "count_active()", "page_ms": f"list_active(limit={PAGE})"}
    rows: list[list[Cell]] = [
        [f"{label}, {where}", *measured.row(place, figure), measured.growth(place, figure)]
        for place, where in PLACES.items()
        for figure, label in labels.items()
    ]
    return Table("ms per call that looks at all sessions", columns(measured.sizes), rows)


def sign_in_table(measured: Measured) -> Table:
    rows: list[list[Cell]] = [
        [
            label,
            *[measured.users.median(who, figure) for who in USERS.values()],
            measured.users.ratio(USERS[max(USERS)], USERS[min(USERS)], figure),
        ]
        for figure, label in (
            ("sign_in_us", "on Redis"),
            ("settled_us", "and the looking after old links (mean)"),
        )
    ]
    note = "Each fourth sign-in has eight old links looked at, if there are any; nobody waits for that."
    names = ["", *[f"{sessions:,}" for sessions in USERS], "last / first"]
    return Table("µs per sign-in, by the sessions that the user has", names, rows, note)


def stall_table(measured: Measured) -> Table:
    rows: list[list[Cell]] = [
        [f"{label}, {what}", *measured.row("redis", figure), measured.growth("redis", figure)]
        for name in OVERVIEWS
        for label, what, figure in (
            (f"{name}()", "ms", f"{name}_ms"),
            (f"{name}()", "ms that it keeps others waiting", f"{name}_stall_ms"),
        )
    ]
    return Table("overviews on Redis", columns(measured.sizes), rows)


def room_table(measured: Measured) -> Table:
    rows: list[list[Cell]] = [
        [label, *measured.row("memory", figure), measured.growth("memory", figure)]
        for figure, label in ROOM.items()
    ]
    note = "Processor time. The longest of all is Python's garbage collection, or a dict that is made anew."
    return Table("creating a session in a full store in memory", columns(measured.sizes), rows, note)


def memory_table(measured: Measured) -> Table:
    def row(label: str, place: str, figure: str) -> list[Cell]:
        values = [measured.fills[subject(place, size)][figure] for size in measured.sizes]
        return [label, *values, values[-1] / values[0]]

    rows = [
        row("in memory, of the process", "memory", "bytes"),
        row("in a file, of the database", "sqlite", "bytes"),
        row("on Redis, of used_memory", "redis", "bytes"),
        row("on Redis, MEMORY USAGE", "redis", "key_bytes"),
        row("in memory, µs to make it", "memory", "us"),
        row("in a file, µs to make it, in batches", "sqlite", "us"),
        row("on Redis, µs to make it, in batches", "redis", "us"),
    ]
    note = f"In memory a page of {PAGE_BYTES} bytes is the least that is seen: the first figures are rough."
    return Table("bytes per session", columns(measured.sizes), rows, note)


def targets(measured: Measured) -> list[Target]:
    found = [
        Target(
            f"{label}, {where}, most to fewest", measured.growth(place, figure), "<=", FLAT[place], "times"
        )
        for place, where in PLACES.items()
        for figure, label in list(COSTS.items())[:2]  # whole requests
    ]
    stall = max(max(measured.row("redis", f"{name}_stall_ms")) for name in OVERVIEWS)
    sign_in = measured.users.ratio(USERS[max(USERS)], USERS[min(USERS)], "sign_in_us")
    found += [
        Target(
            "sign-in of a user with most sessions to one with fewest", sign_in, "<=", FLAT["redis"], "times"
        ),
        Target(
            "count_active() of most sessions in a file",
            measured.row("sqlite", "count_ms")[-1],
            "<=",
            COUNT,
            "ms",
        ),
        Target("longest that an overview keeps others waiting", stall, "<=", STALL, "ms"),
    ]
    lost = sum(figures["lost"] for figures in measured.lost.values())
    written = sum(figures["written"] for figures in measured.lost.values())
    made = sum(figures["made"] for figures in measured.books.values())
    unaccounted = sum(figures["unaccounted"] for figures in measured.books.values())
    return [
        *found,
        Target(f"of {written:,.0f} acknowledged writes were lost", lost, "==", 0),
        Target(f"of {made:,.0f} sessions in full stores were lost track of", unaccounted, "==", 0),
    ]


def panels(measured: Measured) -> list[Panel]:
    def lines(rows: Mapping[str, Sequence[float]]) -> dict[str, list[tuple[float, float]]]:
        return {label: list(zip(measured.sizes, row, strict=True)) for label, row in rows.items()}

    costs = {
        f"{COSTS[figure]}, {where}": measured.row(place, figure)
        for place, where in PLACES.items()
        for figure in ("read_us", "write_us")
    }
    room = {
        "one that lives makes room": measured.row("memory", "live_us"),
        "all have ended": measured.row("memory", "ended_us"),
    }
    fills = measured.fills
    sizes = {
        where: [fills[subject(place, size)]["bytes"] for size in measured.sizes]
        for place, where in PLACES.items()
    }
    across = partial(Panel, x_label="sessions", log_x=True)
    return [
        across("A request", "µs", lines(costs), log_y=True),
        across("A new session in a full store", "µs", lines(room)),
        across("Memory", "bytes per session", lines(sizes)),
    ]


def report(measured: Measured, options: Any) -> Report:
    facts = {
        **machine("redis", "hiredis", "pydantic"),
        "record": f"{len(encode(data(0)))} bytes of JSON",
        "rounds": f"{options.rounds} of {options.requests} requests of each kind",
    }
    builders = (cost_table, memory_table, room_table, overview_table, sign_in_table, stall_table)
    tables = [build(measured) for build in builders]
    return Report("Cost by number of sessions", facts, tables, targets(measured), panels(measured))


def numbers(text: str) -> list[int]:
    """Sizes from the command line, in order."""
    return sorted({int(part.replace("_", "")) for part in text.split(",")})


def main() -> None:
    parser = command_line(__doc__, rounds=7)
    parser.add_argument("--sizes", type=numbers, default=[1_000, 10_000, 100_000], metavar="N,N,…")
    parser.add_argument("--requests", type=int, default=1000, help="of each kind, population and round")
    options = parse(parser)
    if options.quick:
        options.sizes, options.requests = [100, 1_000], 50
    report(asyncio.run(measure(options.sizes, options.rounds, options.requests)), options).finish(options)


if __name__ == "__main__":
    main()
