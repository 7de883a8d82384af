"""How near a locked read and write comes to the least that a Python client of Redis can do.

    python tests/benchmarks/floor.py [--rounds 15] [--json FILE] [--plot FILE]

A cycle locks a session, loads its record of 320 bytes, writes it back and lets the lock go. At 1, 8, 64 and
256 sessions at once, each a task of its own, in one process with one thread, by

- the floor: the very commands that our store sends, recorded from its connection once and sent again with
  nothing but other tokens and versions, by an `asyncio.Protocol` that pipelines what one tick of the loop
  brings and lets hiredis parse;
- our store: `checkout` and `commit`; our middleware: a request, in process, that changes one number;
- what one writes with redis-py: its `Lock`, GET, SET, release; and two plain calls, GET and SET, unlocked.

redis-py has hiredis and as many connections as it asks for. The server's own time for each script is told by
its `INFO commandstats`, what it could do at most by redis-benchmark, if that is found.
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import itertools
import pstats
import re
import shutil
import subprocess
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Protocol, TypeAlias, cast

import hiredis
from measure import (
    Cell,
    CommandCounts,
    Figures,
    Panel,
    Report,
    Samples,
    Table,
    Target,
    alternate,
    command_line,
    drive,
    machine,
    parse,
    percentile,
    server_of,
)
from overhead_apps import CONNECTIONS, SECRET, Client, start
from redis.asyncio import Redis
from redis.asyncio.lock import Lock
from redis_server import RedisServer, find_binary

from asgi_sessions import RedisSessionStore, SessionData, SessionMiddleware
from asgi_sessions.asgi import Receive, Scope, Send
from asgi_sessions.record.codec import encode
from asgi_sessions.stores.checkout import Checkout, Lifetime, LockPolicy, Outcome
from asgi_sessions.stores.redis.connection.resp import pack

AT_ONCE = (1, 8, 64, 256)
RECORD_BYTES = 320
LIFETIME = Lifetime(absolute=3600)
POLICY = LockPolicy()

FLOOR = "floor: raw protocol"
STORE = "ours: store"
MIDDLEWARE = "ours: middleware"
NAIVE = "redis-py: Lock GET SET"
PLAIN = "redis-py: GET SET, no lock"

Command: TypeAlias = list[bytes]


def session_id(number: int) -> str:
    """An id as long as those that the package makes."""
    return f"{number:032d}"


@cache
def record_of(name: str) -> bytes:
    """A record of `RECORD_BYTES`, the same each time."""
    record = encode(SessionData(session_id=name))
    if len(record) > RECORD_BYTES:
        raise RuntimeError(f"an empty record has {len(record)} bytes, more than {RECORD_BYTES}")
    return record[:-1] + b" " * (RECORD_BYTES - len(record)) + b"}"


def done_or_raise(outcome: Outcome) -> None:
    if outcome is not Outcome.STORED:
        raise RuntimeError(f"nobody else writes, yet the commit was answered {outcome}")


async def cycle(store: RedisSessionStore, name: str, record: bytes, *, release: bool = True) -> Checkout:
    """One by our store."""
    taken = await store.checkout(name, POLICY, LIFETIME)
    if not isinstance(taken, Checkout):
        raise RuntimeError(f"the session is not there: {taken}")
    done_or_raise(await store.commit(taken, record, release=release))
    return taken


# -- what our store says to Redis ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Spoken:
    """The commands of one cycle, and what in them is this cycle's own."""

    acquire: Command
    commit: Command
    token: bytes
    version: bytes  # that was loaded, as far as a commit compares it
    following: bytes  # that was written; its first 16 bytes are random


class Recorder:
    """Stands between a client and a server and keeps each command that the client sends."""

    def __init__(self, port: int) -> None:
        self.commands: list[Command] = []
        self._target = port

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[str]:
        """The URL under which the server is reached through this."""
        server = await asyncio.start_server(self._link, "127.0.0.1", 0)
        async with server:
            yield f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}/0"

    async def _link(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._target)
        back = asyncio.ensure_future(self._carry(far_reader, writer, None))
        await self._carry(reader, far_writer, hiredis.Reader(notEnoughData=None))
        await back

    async def _carry(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, parser: hiredis.Reader | None
    ) -> None:
        while chunk := await reader.read(1 << 16):
            writer.write(chunk)
            if parser is not None:
                parser.feed(chunk)
                while (command := parser.gets()) is not None:
                    self.commands.append(cast(Command, command))
        writer.close()


async def record_cycle(port: int, *, release: bool = True) -> Spoken:
    """What the store says in one cycle, to a server that knows the scripts."""
    recorder = Recorder(port)
    async with recorder.listening() as url:
        store = RedisSessionStore(url)
        name = session_id(0)
        await store.set(name, SessionData(session_id=name))
        await cycle(store, name, record_of(name))
        recorder.commands.clear()
        taken = await store.checkout(name, POLICY, LIFETIME)
        assert isinstance(taken, Checkout)
        token, version = str(taken.token).encode(), taken.version[:44].encode()
        done_or_raise(await store.commit(taken, record_of(name), release=release))
        calls = [command for command in recorder.commands if command[0] == b"EVALSHA"]
        await store.release(taken)
        await store.aclose()
    if len(calls) != 2:
        raise RuntimeError(f"a cycle is two calls of scripts, not {len(calls)}")
    return Spoken(calls[0], calls[1], token, version, taken.version.encode())


def pieces(command: Command, name: str, *holes: bytes) -> tuple[bytes, ...]:
    """The packed command for another session, cut where the holes are, which come in this order."""
    packed = pack(*[arg.replace(session_id(0).encode(), name.encode()) for arg in command])
    found = []
    for hole in holes:
        head, there, packed = packed.partition(hole)
        if not there:
            raise RuntimeError(f"the command has no {hole!r} where it was expected")
        found.append(head)
    return (*found, packed)


# -- the subjects --------------------------------------------------------------------------------------------


class Subject(Protocol):
    """Knows how to go through one cycle of session `number`."""

    async def cycle(self, number: int) -> object: ...


_MORE = object()


class RawProtocol(asyncio.BufferedProtocol):
    """Writes calls and reads their replies, nothing else. Its buffer is made once, as our store's is.

    While replies come alone, a call leaves at once; when several came together, what they wake is going to
    call in one tick of the loop, and all of that leaves in one write at the end of it.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._reader = hiredis.Reader(notEnoughData=_MORE)
        self._buffer = bytearray(65_536)
        self._outgoing: list[bytes] = []
        self._waiting: deque[asyncio.Future[Any]] = deque()
        self._alone = True

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def get_buffer(self, sizehint: int) -> bytearray:
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        self._reader.feed(self._buffer, 0, nbytes)  # type: ignore[arg-type]  # takes any buffer
        before = len(self._waiting)
        while (reply := self._reader.gets()) is not _MORE:
            self._waiting.popleft().set_result(reply)
        self._alone = before - len(self._waiting) < 2

    def call(self, packed: bytes) -> asyncio.Future[Any]:
        future: asyncio.Future[Any] = self._loop.create_future()
        self._outgoing.append(packed)
        if self._alone and not self._waiting:
            self._flush()
        elif len(self._outgoing) == 1:
            self._loop.call_soon(self._flush)
        self._waiting.append(future)
        return future

    def _flush(self) -> None:
        self._transport.write(b"".join(self._outgoing))
        self._outgoing.clear()

    def close(self) -> None:
        self._transport.close()


class Floor:
    """The same two commands as our store's, with nothing around them."""

    def __init__(self, protocol: RawProtocol, spoken: Spoken, sessions: int) -> None:
        names = [session_id(number) for number in range(sessions)]
        nonce = spoken.following[:16]
        self._call = protocol.call
        self._acquire = [pieces(spoken.acquire, name, spoken.token) for name in names]
        self._commit = [pieces(spoken.commit, name, spoken.token, spoken.version, nonce) for name in names]
        self._count = itertools.count()

    async def cycle(self, number: int) -> None:
        token, version = await self.acquire(number)
        await self.commit(number, token, version)

    async def acquire(self, number: int) -> tuple[bytes, bytes]:
        head, tail = self._acquire[number]
        token = b"%032x" % next(self._count)
        reply = await self._call(head + token + tail)
        if type(reply) is not bytes or not reply.startswith(b"asgi2:"):
            raise RuntimeError(f"the session cannot be had: {reply}")
        return token, reply[6:50]

    async def commit(self, number: int, token: bytes, version: bytes) -> None:
        one, two, three, four = self._commit[number]
        nonce = b"%016x" % next(self._count)
        reply = await self._call(one + token + two + version + three + nonce + four)
        if reply != b"STORED" + nonce:
            raise RuntimeError(f"the commit was refused: {reply}")


class OurStore:
    def __init__(self, store: RedisSessionStore, sessions: int) -> None:
        self._store = store
        self._sessions = [(name, record_of(name)) for name in map(session_id, range(sessions))]

    async def cycle(self, number: int) -> None:
        await cycle(self._store, *self._sessions[number])


class OurMiddleware:
    def __init__(self, store: RedisSessionStore) -> None:
        self._app = SessionMiddleware(self._count, SECRET, store=store)
        self._clients: list[Client] = []

    async def begin(self, sessions: int) -> None:
        """Have a session for each client."""
        self._clients = [Client() for _ in range(sessions)]
        for client in self._clients:
            await client.request(self._app)

    async def cycle(self, number: int) -> None:
        await self._clients[number].request(self._app)

    @staticmethod
    async def _count(scope: Scope, receive: Receive, send: Send) -> None:
        scope["session"]["n"] = scope["session"].get("n", 0) + 1
        await send(start())
        await send({"type": "http.response.body", "body": b"ok"})


class RedisPy:
    """Records as plain values, by a client of redis-py that the subjects share."""

    def __init__(self, client: Redis, sessions: int) -> None:
        self._client = client
        self._keys = [f"plain:{number:032d}" for number in range(sessions)]
        self._record = record_of(session_id(0))

    async def begin(self) -> None:
        await self._client.mset(dict.fromkeys(self._keys, self._record))

    async def exchange(self, key: str) -> None:
        if await self._client.get(key) != self._record:
            raise RuntimeError("the record is lost")
        await self._client.set(key, self._record, keepttl=True)


class Naive(RedisPy):
    """Four round trips, as one writes it with redis-py."""

    async def cycle(self, number: int) -> None:
        key = self._keys[number]
        async with Lock(self._client, f"{key}:lock", timeout=10):
            await self.exchange(key)


class Plain(RedisPy):
    """Two round trips and no lock: the last writer wins."""

    async def cycle(self, number: int) -> None:
        await self.exchange(self._keys[number])


@asynccontextmanager
async def subjects(server: RedisServer, sessions: int) -> AsyncIterator[dict[str, Subject]]:
    """Every subject, with so many sessions of its own."""
    spoken = await record_cycle(server.port)
    store, client = RedisSessionStore(server.url), Redis.from_url(server.url, max_connections=CONNECTIONS)
    _, protocol = await asyncio.get_running_loop().create_connection(RawProtocol, "127.0.0.1", server.port)
    middleware, naive = OurMiddleware(store), Naive(client, sessions)
    names = [session_id(number) for number in range(sessions)]
    try:
        await store.set_batch({name: SessionData(session_id=name) for name in names})
        await middleware.begin(sessions)
        await naive.begin()
        yield {
            FLOOR: Floor(protocol, spoken, sessions),
            STORE: OurStore(store, sessions),
            MIDDLEWARE: middleware,
            NAIVE: naive,
            PLAIN: Plain(client, sessions),
        }
    finally:
        protocol.close()
        await client.aclose()
        await store.aclose()


# -- measuring -----------------------------------------------------------------------------------------------


async def turn(subject: Subject, sessions: int, seconds: float) -> Figures:
    """Cycles of all sessions at once for so long; of one alone, how long each takes."""
    if sessions > 1:
        return await drive(subject.cycle, sessions, seconds)
    latencies: list[float] = []

    async def timed(number: int) -> None:
        began = time.perf_counter()
        await subject.cycle(number)
        latencies.append((time.perf_counter() - began) * 1e6)

    figures = await drive(timed, 1, seconds)
    return {**figures, "p50": percentile(latencies, 0.5), "p99": percentile(latencies, 0.99)}


async def measure(server: RedisServer, options: argparse.Namespace) -> dict[int, Samples]:
    measured = {}
    for sessions in options.sessions:
        async with subjects(server, sessions) as each:
            turns = {
                name: partial(turn, subject, sessions, options.seconds) for name, subject in each.items()
            }
            measured[sessions] = await alternate(turns, options.rounds)
    return measured


# -- the server's side ---------------------------------------------------------------------------------------


async def server_time(server: RedisServer, calls: int) -> tuple[float, float]:
    """Microseconds that the server itself spends on an acquire and on a commit, by its own count."""
    counts = CommandCounts(server.url)
    spent: dict[str, list[float]] = {"acquire": [], "commit": []}
    async with subjects(server, 64) as each:
        floor = cast(Floor, each[FLOOR])
        for number in range(-(-calls // 64) + 1):
            counts.reset()
            taken = await asyncio.gather(*[floor.acquire(session) for session in range(64)])
            acquiring = counts.microseconds_per_call("evalsha")
            counts.reset()
            commits = [floor.commit(session, *had) for session, had in enumerate(taken)]
            await asyncio.gather(*commits)
            if number:  # the first batch warms up
                spent["acquire"].append(acquiring)
                spent["commit"].append(counts.microseconds_per_call("evalsha"))
    counts.close()
    acquire, commit = (sum(values) / len(values) for values in spent.values())
    return acquire, commit


def find_redis_benchmark() -> str | None:
    """On the PATH, or beside the server."""
    beside = Path(find_binary()).with_name("redis-benchmark")
    found = shutil.which("redis-benchmark") or shutil.which("valkey-benchmark")
    return found or (str(beside) if beside.exists() else None)


@dataclass(frozen=True)
class RedisBenchmark:
    """Says how often the server can carry out one command, over 64 connections."""

    binary: str
    port: int
    calls: int
    keyspace: int = 20_000

    def per_second(self, pipelined: int, *command: str) -> float:
        options = ["-p", str(self.port), "-c", "64", "-n", str(self.calls), "-P", str(pipelined), "--csv"]
        options += ["-r", str(self.keyspace)]
        run = subprocess.run([self.binary, *options, *command], capture_output=True, text=True, check=True)
        figures = re.findall(r'"([0-9.]+)"', run.stdout.splitlines()[-1])  # after the command, as it is
        return float(figures[-FIGURES])

    async def prepare(self, spoken: Spoken) -> None:
        """Lay down records that every commit finds as it expects them, and their locks."""
        value = next(arg for arg in spoken.commit if arg.startswith(b"asgi2:" + spoken.following))
        record, lock = spoken.commit[3:5]
        async with Redis(port=self.port) as client:
            for first in range(0, self.keyspace, 1000):
                pipeline = client.pipeline(transaction=False)
                for number in range(first, first + 1000):
                    mine = b"%012d" % number
                    pipeline.set(_random(record).replace(RANDOM, mine), value, ex=3600)
                    pipeline.set(b"held:" + _random(lock).replace(RANDOM, mine), spoken.token, ex=3600)
                await pipeline.execute()


FIGURES = 7  # of redis-benchmark: calls per second, six latencies
RANDOM = b"__rand_int__"  # redis-benchmark puts twelve digits in its place, other ones at each


def _random(key: bytes) -> bytes:
    return key.replace(session_id(0)[-12:].encode() + b"}", RANDOM + b"}")


def acquire_again(spoken: Spoken) -> list[str]:
    """The acquire for random sessions; its lease ends after a millisecond, for nobody lets it go."""
    lease = b"%d" % (POLICY.timeout * 1000)
    return [(b"1" if arg == lease else _random(arg)).decode() for arg in spoken.acquire]


def commit_again(spoken: Spoken) -> list[str]:
    """The commit for random sessions; it keeps lock and version, so that the next one finds them."""
    record, lock = spoken.commit[3:5]
    again = []
    for arg in spoken.commit:
        if arg == lock:
            again.append(b"held:" + _random(lock))
        elif arg == b"asgi2:" + spoken.version:
            again.append(b"asgi2:" + spoken.following[:44])
        else:
            again.append(_random(arg) if arg.startswith(record) else arg)
    return [arg.decode() for arg in again]


async def expect(url: str, command: Sequence[str], answer: bytes) -> None:
    """What redis-benchmark is going to repeat has to be answered as in a cycle."""
    filled = [arg.replace(RANDOM.decode(), "0" * 12) for arg in command]
    async with Redis.from_url(url) as client:
        reply = await client.execute_command(*filled)  # type: ignore[no-untyped-call]  # redis-py left it so
    if not isinstance(reply, bytes) or not reply.startswith(answer):
        raise RuntimeError(f"{command[0]} was answered {reply!r} instead of {answer!r}")


async def server_table(server: RedisServer, calls: int) -> Table:
    """What each script costs the server, beside plain commands."""
    acquiring, committing = await server_time(server, calls)
    times: dict[str, float] = {"acquire": acquiring, "commit": committing}
    columns = ["the server's side", "µs of its time", "calls/s", "calls/s, 16 in a pipeline"]
    binary = find_redis_benchmark()
    if binary is None:
        rows: list[Sequence[Cell]] = [[name, spent, None, None] for name, spent in times.items()]
        return Table("scripts on the server", columns, rows, "redis-benchmark was not found on the PATH")
    spoken = await record_cycle(server.port, release=False)
    benchmark = RedisBenchmark(binary, server.port, calls)
    await benchmark.prepare(spoken)
    await expect(server.url, acquire_again(spoken), b"asgi2:")
    await expect(server.url, commit_again(spoken), b"STORED")
    commands = {
        "acquire": acquire_again(spoken),
        "commit": commit_again(spoken),
        "GET": ["get", "session:{__rand_int__}"],
        "SET 320 bytes": ["set", "plain:{__rand_int__}", "x" * RECORD_BYTES],
    }
    rows = []
    for name, command in commands.items():
        rates = [benchmark.per_second(pipelined, *command) for pipelined in (1, 16)]
        rows.append([name, times.get(name), *rates])
    note = "calls/s by redis-benchmark, 64 connections; there a commit keeps the lock"
    return Table("scripts on the server", columns, rows, note)


# -- telling -------------------------------------------------------------------------------------------------


def tables(measured: dict[int, Samples]) -> list[Table]:
    names = (FLOOR, STORE, MIDDLEWARE, NAIVE, PLAIN)
    at = [f"{sessions} at once" for sessions in measured]

    def figures(figure: str) -> list[Sequence[Cell]]:
        return [[name, *[samples.median(name, figure) for samples in measured.values()]] for name in names]

    def ratio(of: str, to: str, figure: str = "per_s") -> list[Cell]:
        return [f"{of} / {to}", *[samples.ratio(of, to, figure) for samples in measured.values()]]

    found = [
        Table("cycles per second", ["", *at], figures("per_s")),
        Table("µs per cycle", ["", *at], figures("us")),
        Table("µs of the client's processor per cycle", ["", *at], figures("cpu_us")),
        Table(
            "ratio of cycles per second (more is better)",
            ["", *at],
            [ratio(STORE, NAIVE), ratio(STORE, PLAIN), ratio(STORE, FLOOR), ratio(MIDDLEWARE, PLAIN)],
        ),
    ]
    if 1 in measured:
        rows: list[Sequence[Cell]] = [
            [name, measured[1].median(name, "p50"), measured[1].median(name, "p99")] for name in names
        ]
        found.append(Table("latency of one cycle, one session, µs", ["", "p50", "p99"], rows))
    return found


def targets(measured: dict[int, Samples]) -> list[Target]:
    found = []
    if 64 in measured:
        many = measured[64]
        found += [
            Target(
                "64 sessions, our store / redis-py's Lock", many.ratio(STORE, NAIVE, "per_s"), ">=", 12, "x"
            ),
            Target("64 sessions, our store / floor", many.ratio(STORE, FLOOR, "per_s"), ">=", 0.85, "x"),
            Target("64 sessions, client's processor", many.median(STORE, "cpu_us"), "<=", 25, "µs per cycle"),
        ]
    if 1 in measured:
        one = measured[1]
        found += [
            Target("1 session, latency p50 / floor", one.ratio(STORE, FLOOR, "p50"), "<=", 1.2, "x"),
            Target("1 session, latency p50 / two plain calls", one.ratio(STORE, PLAIN, "p50"), "<=", 1, "x"),
        ]
    return found


def panels(measured: dict[int, Samples]) -> list[Panel]:
    names = (STORE, NAIVE, PLAIN, FLOOR, MIDDLEWARE)

    def lines(figure: str) -> dict[str, list[tuple[float, float]]]:
        return {
            name: [(n, samples.median(name, figure)) for n, samples in measured.items()] for name in names
        }

    several = "sessions at once"
    found = [
        Panel("Throughput", "cycles per second", lines("per_s"), several, log_x=True, log_y=True),
        Panel(
            "Work of the client",
            "µs of processor per cycle",
            lines("cpu_us"),
            several,
            log_x=True,
            log_y=True,
        ),
    ]
    if 1 in measured:
        bars = {figure: [measured[1].median(name, figure) for name in names] for figure in ("p50", "p99")}
        wrapped = [name.replace(": ", ":\n").replace(", ", ",\n") for name in names]
        found.append(Panel("Latency, one session", "µs per cycle", bars, categories=wrapped))
    return found


async def profile(server: RedisServer, seconds: float) -> None:
    """Print where our store spends the client's time at 64 sessions."""
    async with subjects(server, 64) as each:
        await turn(each[STORE], 64, seconds / 4)
        profiler = cProfile.Profile()
        profiler.enable()
        await turn(each[STORE], 64, seconds)
        profiler.disable()
    pstats.Stats(profiler).sort_stats("tottime").print_stats(25)


def options_of(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = command_line(__doc__, rounds=15)
    parser.add_argument("--seconds", type=float, default=0.4, help="of each turn (default: %(default)s)")
    parser.add_argument("--profile", action="store_true", help="only a profile of our store at 64 sessions")
    options = parse(parser, arguments)
    options.sessions, options.calls = AT_ONCE, 100_000
    if options.quick:
        options.seconds, options.sessions, options.calls = min(options.seconds, 0.05), (1, 64), 2000
    return options


async def run(server: RedisServer, options: argparse.Namespace) -> Report:
    facts = machine("redis", "hiredis", server=server_of(server.url))
    measured = await measure(server, options)
    found = [*tables(measured), await server_table(server, options.calls)]
    return Report("A locked read and write on Redis", facts, found, targets(measured), panels(measured))


def main() -> None:
    options = options_of()
    with RedisServer() as server:
        if options.profile:
            asyncio.run(profile(server, 2.0))
            return
        report = asyncio.run(run(server, options))
    report.finish(options)


if __name__ == "__main__":
    main()
