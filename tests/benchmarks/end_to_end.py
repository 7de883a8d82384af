"""What clients see of a session middleware: requests per second and latency, through a real server.

    python tests/benchmarks/end_to_end.py [--rounds 5] [--seconds 2] [--connections 1,64] [--loop auto]
                                          [--http auto] [--json FILE] [--plot FILE] [--quick]

Each subject is the same small app behind another session middleware, served by a uvicorn of its own with one
process, the same event loop and HTTP implementation for all. wrk (`apt-get install wrk`) loads one at a time,
in alternating rounds; there are as many sessions, of 300 bytes each, as connections, and no session has two
requests under way. A request reads a number in its session or adds to it. Where wrk is missing, httpx makes
the load, and slower.

Afterwards each session's number is compared with what was acknowledged to its client. And one client asks one
thing after the other on one connection: how often does it meet its own lock?
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import httpx
from end_to_end_apps import SUBJECTS
from measure import (
    TESTS,
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
    percentile,
)
from redis import Redis
from redis_server import RedisServer, free_port

USER_AGENT = "Mozilla/5.0 (X11; Linux x86_64; rv:140.0) Gecko/20100101 Firefox/140.0"
PATIENCE = 30.0  # seconds for a server to start, and for wrk to end
KINDS = ("read", "write")
NEEDS = {"starsessions": "starsessions", "Litestar": "litestar"}  # what a subject's name begins with
QUICK = (
    "bare app",
    "ours, memory",
    "Starlette, cookie",
    "ours, SQLite",
    "ours, Redis",
)  # that tests always have
QUICK_SECONDS = 0.2


# -- a subject's server --------------------------------------------------------------------------------------


@dataclass
class Served:
    """A subject while it is served, its sessions' cookies, and what was acknowledged to each of them."""

    name: str
    port: int
    process: subprocess.Popen[bytes]
    cookies: list[str] = field(default_factory=list)
    written: list[int] = field(default_factory=list)
    interrupted: list[int] = field(default_factory=list)  # a load's end cuts one request off, stored or not
    refused: int = 0  # answers other than 200

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def begin(self, sessions: int) -> None:
        """Start so many sessions."""
        with self.client() as client:
            for _ in range(sessions):
                answer = client.get("/begin").raise_for_status()
                self.cookies.append(answer.headers.get("set-cookie", "").partition(";")[0])
                client.cookies.clear()
        self.written, self.interrupted = [0] * sessions, [0] * sessions

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, headers={"user-agent": USER_AGENT}, timeout=PATIENCE)

    def seconds(self) -> float:
        """The processor time that the server has used, by Linux; NaN elsewhere."""
        try:
            fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return float("nan")
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def note(self, load: Load, kind: str) -> None:
        """What was acknowledged, to compare it later."""
        self.refused += load.refused
        if kind == "write":
            for number, count in enumerate(load.acknowledged):
                self.written[number] += count
                self.interrupted[number] += 1

    def counts(self) -> list[int]:
        """The number in each session."""
        with self.client() as client:
            answers = [client.get("/count", headers={"cookie": cookie}) for cookie in self.cookies]
        return [int(answer.raise_for_status().text) for answer in answers]

    def disagreements(self) -> tuple[int, int]:
        """What is wrong with the numbers in its sessions."""
        return disagreements(self.counts(), self.written, self.interrupted)

    @property
    def keeps_count(self) -> bool:
        """False without a session, and where it is in the cookie, which the load does not follow."""
        return self.name not in ("bare app", "Starlette, cookie")


def disagreements(
    counts: Sequence[int], written: Sequence[int], interrupted: Sequence[int]
) -> tuple[int, int]:
    """Acknowledged writes that are lost, and writes that nobody asked for, over all sessions."""
    lost = invented = 0
    for count, acknowledged, cut in zip(counts, written, interrupted, strict=True):
        lost += max(acknowledged - count, 0)
        invented += max(count - acknowledged - cut, 0)
    return lost, invented


@contextmanager
def served(
    name: str, redis_url: str, loop: str, protocol: str, apps: str = "end_to_end_apps"
) -> Iterator[Served]:
    """A uvicorn for this subject of a module, which may not listen yet. It ends with the block."""
    port = free_port()
    command = [sys.executable, "-m", "uvicorn", "--factory", f"{apps}:from_environment"]
    command += ["--app-dir", str(Path(__file__).parent), "--port", str(port), "--no-access-log"]
    command += ["--log-level", "warning", "--loop", loop, "--http", protocol]
    variables = {"PYTHONPATH": str(TESTS.parent), "SUBJECT": name, "REDIS_URL": redis_url}
    process = subprocess.Popen(command, env={**os.environ, **variables})
    try:
        yield Served(name, port, process)
    finally:
        process.kill()
        process.wait()


def wait_for(server: Served) -> None:
    """Return when it listens. `RuntimeError` where it does not."""
    deadline = time.monotonic() + PATIENCE
    while server.process.poll() is None and time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", server.port)) == 0:
                return
        time.sleep(0.02)
    raise RuntimeError(f"the server of {server.name!r} did not start")


# -- the load ------------------------------------------------------------------------------------------------


@dataclass
class Load:
    """What the clients saw. `acknowledged` has the answers 200 of each connection; latency in ms."""

    seconds: float
    acknowledged: list[int]
    refused: int
    p50: float
    p99: float


WRK_THREADS = 2  # one for each connection would do for the cookies, but not for the latencies
WRK_SCRIPT = """
-- A session has at most one request under way: it is taken for the request and put back by its answer.
local cookies = {%(cookies)s}
local threads = {}

function setup(thread)
  table.insert(threads, thread)
  thread:set("this", #threads)
end

function init(args)
  verified, refused, requests, free, key = this > 1, 0, {}, {}, {}
  for number = this, #cookies, %(threads)d do
    local headers = {["User-Agent"] = "%(user_agent)s", ["X-Whose"] = tostring(number)}
    if cookies[number] ~= "" then
      headers["Cookie"] = cookies[number]
    end
    requests[number] = wrk.format("GET", nil, headers)
    key[number] = "acknowledged" .. number
    _G[key[number]] = 0
    table.insert(free, number)
  end
end

function request()
  if not verified then  -- wrk looks at a request of its first thread before it begins
    verified = true
    return requests[this]
  end
  return requests[table.remove(free) or this]
end

function response(status, headers, body)
  local number = tonumber(headers["x-whose"]) or this
  table.insert(free, number)
  if status == 200 then
    _G[key[number]] = _G[key[number]] + 1
  else
    refused = refused + 1
  end
end

function done(summary, latency, requests)
  local counts, others, errors = {}, 0, summary.errors
  for number = 1, #cookies do
    counts[number] = threads[(number - 1) %% %(threads)d + 1]:get("acknowledged" .. number)
  end
  for _, thread in ipairs(threads) do
    others = others + thread:get("refused")
  end
  io.stderr:write(string.format(
    '{"seconds": %%f, "acknowledged": [%%s], "refused": %%d, "failed": %%d, "p50": %%f, "p99": %%f}\\n',
    summary.duration / 1e6, table.concat(counts, ","), others,
    errors.connect + errors.read + errors.write + errors.timeout,
    latency:percentile(50) / 1e3, latency:percentile(99) / 1e3))
end
"""


async def load_by_wrk(url: str, cookies: Sequence[str], seconds: float) -> Load:
    """wrk runs until it is told to stop, which it can be after a fraction of a second."""
    threads = 1 if len(cookies) % WRK_THREADS else WRK_THREADS
    with wrk_script(cookies, threads) as script:
        wrk = await asyncio.create_subprocess_exec(
            *("wrk", "-t", str(threads), "-c", str(len(cookies)), "-d", "1h", "-s", script, url),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            await asyncio.sleep(seconds)
            wrk.send_signal(signal.SIGINT)
            printed, told = await asyncio.wait_for(wrk.communicate(), PATIENCE)
        finally:
            if wrk.returncode is None:
                wrk.kill()
    try:
        found: dict[str, Any] = json.loads(told.splitlines()[-1])
    except (IndexError, ValueError):
        raise RuntimeError(f"wrk failed:\n{printed.decode()}{told.decode()}") from None
    refused = found["refused"] + found["failed"]
    return Load(found["seconds"], found["acknowledged"], refused, found["p50"], found["p99"])


@contextmanager
def wrk_script(cookies: Sequence[str], threads: int) -> Iterator[str]:
    """A file that tells wrk which cookies to send, each of them by one of the threads."""
    quoted = ", ".join(json.dumps(cookie) for cookie in cookies)
    values = {"cookies": quoted, "threads": threads, "user_agent": USER_AGENT}
    with tempfile.NamedTemporaryFile("w", suffix=".lua") as script:
        script.write(WRK_SCRIPT % values)
        script.flush()
        yield script.name


async def load_by_httpx(url: str, cookies: Sequence[str], seconds: float) -> Load:
    """The same from this process, for machines without wrk."""
    latencies: list[float] = []
    load = Load(0.0, [0] * len(cookies), 0, 0.0, 0.0)
    started = time.perf_counter()

    async def visit(number: int) -> None:
        headers = {"user-agent": USER_AGENT, "cookie": cookies[number]}
        async with httpx.AsyncClient(timeout=PATIENCE, verify=False) as client:
            while not load.acknowledged[number] or time.perf_counter() - started < seconds:
                asked = time.perf_counter()
                answer = await client.get(url, headers=headers)
                client.cookies.clear()
                latencies.append((time.perf_counter() - asked) * 1e3)
                if answer.status_code != 200:
                    load.refused += 1
                    break
                load.acknowledged[number] += 1

    await asyncio.gather(*map(visit, range(len(cookies))))
    load.seconds = time.perf_counter() - started
    load.p50, load.p99 = percentile(latencies, 0.5), percentile(latencies, 0.99)
    return load


async def turn(server: Served, kind: str, connections: int, seconds: float) -> Figures:
    """Load one page of one subject and note what was acknowledged."""
    load_by = load_by_httpx if shutil.which("wrk") is None else load_by_wrk
    for longer in (1, 10, 100):  # a very busy machine may not come to the first answer in a short time
        used = server.seconds()
        load = await load_by(f"{server.url}/{kind}", server.cookies[:connections], seconds * longer)
        used = server.seconds() - used
        server.note(load, kind)
        done = sum(load.acknowledged)
        if done:
            return {
                "per_s": done / load.seconds,
                "p50": load.p50,
                "p99": load.p99,
                "cpu_us": used / done * 1e6,
            }
    raise RuntimeError(f"nothing that {server.name!r} was asked was answered with 200")


# -- one after the other -------------------------------------------------------------------------------------


def meet_oneself(server: Served, redis_url: str, requests: int) -> Figures:
    """How often a client that asks one thing after the other, on one connection, finds its session held.

    Counted by the store (a checkout while the last one's lease is still held in this process) and by Redis
    (places in a queue, and subscriptions, which are made when somebody waits for the first time).
    """
    server.begin(1)
    headers = {"user-agent": USER_AGENT, "cookie": server.cookies[0]}
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE)
    with Redis.from_url(redis_url) as redis:
        redis.config_resetstat()
        for number in range(requests):
            connection.request("GET", f"/{KINDS[number % 2]}", headers=headers)
            answer = connection.getresponse()
            answer.read()
            server.refused += answer.status != 200
        waited = waits(redis)
    connection.request("GET", "/met")
    met = int(connection.getresponse().read())
    connection.close()
    server.written[0] = requests // 2
    return {"requests": requests, "met": met + waited, "lost": sum(server.disagreements())}


def waits(redis: Redis) -> int:
    """How often somebody has queued or subscribed since the server's statistics were reset."""
    commands = redis.info("commandstats")
    return sum(int(commands.get(f"cmdstat_{name}", {"calls": 0})["calls"]) for name in ("rpush", "subscribe"))


# -- the benchmark -------------------------------------------------------------------------------------------


@dataclass
class Measured:
    """What was found out; a cell is a subject, a page and a number of connections."""

    subjects: Sequence[str]
    connections: Sequence[int]
    samples: Samples = field(default_factory=Samples)
    refused: dict[str, int] = field(default_factory=dict)
    written: dict[str, int] = field(default_factory=dict)
    disagreements: dict[str, tuple[int, int]] = field(default_factory=dict)
    meetings: dict[str, Figures] = field(default_factory=dict)

    def median(self, subject: str, kind: str, connections: int, figure: str) -> float:
        return self.samples.median(cell(subject, kind, connections), figure)

    def ours_to(self, subject: str, kind: str, connections: int, figure: str) -> float | None:
        """A figure of ours, in the same place, in terms of this subject's; None for ours."""
        if subject.startswith("ours"):
            return None
        ours = "ours, Redis" if subject.endswith("Redis") else "ours, memory"
        return self.samples.ratio(cell(ours, kind, connections), cell(subject, kind, connections), figure)


def cell(subject: str, kind: str, connections: int) -> str:
    return f"{subject} | {kind} | {connections}"


async def measure(subjects: Sequence[str], options: Any) -> Measured:
    """Serve all subjects, let them take turns, and compare what was acknowledged with what is stored."""
    measured = Measured(subjects, options.connections)
    with ExitStack() as stack:
        redis_url = stack.enter_context(RedisServer()).url
        start = partial(served, redis_url=redis_url, loop=options.loop, protocol=options.http)
        servers = {name: stack.enter_context(start(name)) for name in subjects}
        for server in servers.values():
            wait_for(server)
            server.begin(max(options.connections))
        turns = {
            cell(name, kind, count): partial(turn, server, kind, count, options.seconds)
            for count in options.connections
            for kind in KINDS
            for name, server in servers.items()
        }
        await alternate(turns, options.rounds, measured.samples)
        for name, server in servers.items():
            measured.refused[name] = server.refused
            if server.keeps_count:
                measured.written[name] = sum(server.written)
                measured.disagreements[name] = server.disagreements()
    return measured


def meet(options: Any) -> dict[str, Figures]:
    """The client that asks one thing after the other, of ours in memory and on Redis."""
    found: dict[str, Figures] = {}
    with RedisServer() as redis:
        for place in ("memory", "Redis"):
            with served(f"watched, {place}", redis.url, options.loop, options.http) as server:
                wait_for(server)
                found[place] = meet_oneself(server, redis.url, options.requests)
                found[place] = {**found[place], "refused": server.refused}
    return found


# -- telling -------------------------------------------------------------------------------------------------


def load_table(measured: Measured, connections: int) -> Table:
    rows: list[list[Cell]] = []
    for kind in KINDS:
        for name in measured.subjects:
            figures = [
                measured.median(name, kind, connections, each) for each in ("per_s", "p50", "p99", "cpu_us")
            ]
            ratios = [measured.ours_to(name, kind, connections, each) for each in ("per_s", "cpu_us")]
            rows.append([f"{kind}, {name}", *figures, *ratios])
    titles = ["", "requests/s", "p50 ms", "p99 ms", "CPU µs", "requests/s: ours / this", "CPU: ours / this"]
    title = f"{connections} connection{'s' if connections > 1 else ''} and as many sessions"
    note = (
        "CPU: of the app's process, for each request. Ours is that in the same place, Redis or else memory."
    )
    return Table(title, titles, rows, note)


def promise_table(measured: Measured) -> Table:
    rows: list[list[Cell]] = []
    for name in measured.subjects:
        lost, invented = measured.disagreements.get(name, (None, None))
        rows.append([name, measured.written.get(name), lost, invented, measured.refused[name]])
    titles = ["", "acknowledged writes", "lost", "nobody asked for", "answers but 200"]
    note = "A dash: nothing to compare, without a session or where the load does not follow its cookie."
    return Table("what became of the writes", titles, rows, note)


def meeting_table(measured: Measured) -> Table:
    rows: list[list[Cell]] = [
        [f"ours, {place}", each["requests"], each["met"], each["lost"]]
        for place, each in measured.meetings.items()
    ]
    return Table(
        "one client, one thing after the other", ["", "requests", "met its own lock", "writes lost"], rows
    )


def targets(measured: Measured) -> list[Target]:
    ours = [name for name in measured.subjects if name.startswith("ours")]
    wrong = sum(sum(measured.disagreements[name]) for name in ours)
    found = [
        Target("writes of ours that were lost or that nobody asked for", wrong, "==", 0),
        Target("answers of ours that were not 200", sum(measured.refused[name] for name in ours), "==", 0),
    ]
    for place, each in measured.meetings.items():
        found.append(Target(f"a client alone met its own lock, {place}", each["met"], "==", 0))
        found.append(
            Target(f"of its writes and answers went wrong, {place}", each["lost"] + each["refused"], "==", 0)
        )
    return found


def panels(measured: Measured) -> list[Panel]:
    """A row for each place, with the bare app in both."""

    def bars(figure: str, connections: int, names: Sequence[str]) -> dict[str, list[float]]:
        return {kind: [measured.median(name, kind, connections, figure) for name in names] for kind in KINDS}

    found = []
    most = measured.connections[-1]
    for place, shown in (("memory", ("memory", "app", "cookie")), ("Redis", ("Redis", "app"))):
        names = [name for name in measured.subjects if name.endswith(shown)]
        labels = [name.removesuffix(f", {place}").replace(", ", ",\n") for name in names]
        for count in measured.connections:
            title = f"{place}, {count} connection{'s' if count > 1 else ''}"
            found.append(Panel(title, "requests/s", bars("per_s", count, names), "", labels))
        found.append(Panel(f"{place}, {most} connections: p99", "ms", bars("p99", most, names), "", labels))
    return found


def report(measured: Measured, options: Any) -> Report:
    wrk = shutil.which("wrk") is not None
    without = "httpx in one process, for there is no wrk on the PATH (apt-get install wrk)"
    facts = {
        **machine("uvicorn", "starlette", "starsessions", "litestar", "redis"),
        "served by": f"uvicorn, one process, loop {options.loop}, http {options.http}",
        "load by": f"wrk, {WRK_THREADS} threads" if wrk else without,
        "rounds": f"{options.rounds} of {options.seconds:g} seconds for each subject and page",
    }
    tables = [load_table(measured, count) for count in measured.connections]
    tables += [promise_table(measured), meeting_table(measured)]
    return Report("Sessions end to end", facts, tables, targets(measured), panels(measured))


# -- the command line ----------------------------------------------------------------------------------------


def installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def available(names: Mapping[str, object]) -> list[str]:
    """The subjects that can be served here."""
    missing = tuple(name for name, module in NEEDS.items() if not installed(module))
    return [name for name in names if not name.startswith(("watched", *missing))]


def server_command_line(description: str | None, rounds: int) -> argparse.ArgumentParser:
    """What every benchmark with a uvicorn understands; `parse_server` reads it."""
    parser = command_line(description, rounds)
    parser.add_argument("--loop", choices=("auto", "asyncio", "uvloop"), default="auto")
    parser.add_argument("--http", choices=("auto", "h11", "httptools"), default="auto")
    return parser


def parse_server(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None = None
) -> argparse.Namespace:
    """The options; the event loop and the HTTP implementation are the fastest that are installed."""
    options = parse(parser, arguments)
    if options.loop == "auto":
        options.loop = "uvloop" if installed("uvloop") else "asyncio"
    if options.http == "auto":
        options.http = "httptools" if installed("httptools") else "h11"
    return options


def numbers(text: str) -> list[int]:
    return sorted({int(part) for part in text.split(",")})


def main() -> None:
    parser = server_command_line(__doc__, rounds=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each subject, page and round")
    parser.add_argument("--connections", type=numbers, default=[1, 64], metavar="N,N,…")
    parser.add_argument("--requests", type=int, default=2000, help="of the client that is alone")
    options = parse_server(parser)
    subjects = available(SUBJECTS)
    if options.quick:
        subjects, options.seconds, options.connections, options.requests = [*QUICK], QUICK_SECONDS, [4], 200
        options.rounds = 1
    measured = asyncio.run(measure(subjects, options))
    measured.meetings = meet(options)
    report(measured, options).finish(options)


if __name__ == "__main__":
    main()
