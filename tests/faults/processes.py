"""Real processes around a real Redis: started on the loopback, frozen, killed, stopped by their own ids."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import anyio
from redis import Redis
from redis.exceptions import RedisError
from redis_server import RedisServer, free_port

from .chaos import ChaosProxy
from .checkers import Life

TESTS = Path(__file__).parent.parent
PATIENCE = 30.0  # seconds for what must come, on however slow a machine


async def until(condition: Callable[[], bool]) -> None:
    """Wait for what must come at last; `TimeoutError` where it does not."""
    with anyio.fail_after(PATIENCE):
        while not condition():  # noqa: ASYNC110  # other processes set no events
            await anyio.sleep(0.02)


class Worker:
    """A process of its own that serves an app; what it prints is added to `output`.

    UVICORN among the variables holds further options of the server.
    """

    def __init__(self, variables: Mapping[str, str], output: Path) -> None:
        self._port = free_port()
        self.url = f"http://127.0.0.1:{self._port}"
        self._app = variables.get("APP", "faults.app:from_environment")
        self._options = variables.get("UVICORN", "").split()
        self._output = output
        path = os.pathsep.join([str(TESTS.parent), str(TESTS)])
        self._environment = {**os.environ, "PYTHONPATH": path, **variables}
        self.start()

    def start(self) -> None:
        """Start; it takes a moment until it serves."""
        command = [sys.executable, "-m", "uvicorn", "--factory", self._app]
        command += ["--port", str(self._port), "--log-level", "warning", *self._options]
        with self._output.open("ab") as output:
            self._process = subprocess.Popen(command, env=self._environment, stdout=output, stderr=output)

    def serves(self) -> bool:
        """Whether it accepts connections; an error where it has ended by itself."""
        if self._process.poll() is not None:
            raise RuntimeError(f"a worker ended by itself with code {self._process.returncode}")
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self._port)) == 0

    def descriptors(self) -> int:
        """How many files and connections it has open, the asking's one among them."""
        with urllib.request.urlopen(f"{self.url}/vitals", timeout=PATIENCE) as answer:
            return int(json.load(answer)["descriptors"])

    def resident(self) -> int:
        """Bytes of memory that it has in use."""
        statm = Path(f"/proc/{self._process.pid}/statm")
        if statm.exists():
            return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        listed = subprocess.run(
            ["ps", "-o", "rss=", "-p", str(self._process.pid)], capture_output=True, check=True
        )
        return int(listed.stdout) * 1024

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

    def terminate(self) -> None:
        """SIGTERM, as a deployment sends it."""
        self._process.terminate()

    def stop(self) -> None:
        """SIGTERM, which must suffice; also for one that is frozen."""
        self.terminate()
        self.thaw()
        try:
            self._process.wait(PATIENCE)
        finally:
            self.kill()


@dataclass(kw_only=True)
class Workers:
    """Several workers over one store; leases of locks are `lease` seconds long."""

    workers: list[Worker] = field(default_factory=list)
    output: Path
    lease: float
    wait: float

    @property
    def urls(self) -> list[str]:
        """Where the workers are."""
        return [worker.url for worker in self.workers]

    async def up(self) -> None:
        """Wait until all workers serve."""
        await until(lambda: all(worker.serves() for worker in self.workers))

    def lives(self, now: Callable[[], float]) -> list[Life]:
        """What each key has left to live, where the store has keys."""
        return []

    def leftovers(self) -> list[str]:
        """Locks and queues that are there."""
        raise NotImplementedError


@dataclass(kw_only=True)
class FileSite(Workers):
    """Workers over one SQLite file."""

    path: Path

    def leftovers(self) -> list[str]:
        """Locks that are held or waited for."""
        with contextlib.closing(sqlite3.connect(self.path)) as db:
            return [str(name) for (name,) in db.execute("SELECT id FROM lock")]


@dataclass(kw_only=True)
class Site(Workers):
    """Workers over one Redis, which they reach through a proxy; `redis` goes there directly."""

    server: RedisServer
    proxy: ChaosProxy
    redis: Redis

    def leftovers(self) -> list[str]:
        """Locks and queues that are there."""
        return [str(key) for key in self.redis.scan_iter(count=1000) if str(key).endswith((":lock", ":wait"))]

    def lives(self, now: Callable[[], float]) -> list[Life]:
        """What each key has left to live; nothing where Redis does not answer."""
        lives: list[Life] = []
        with contextlib.suppress(RedisError):
            for key in self.redis.scan_iter(count=1000):
                asked = now()
                ttl = self.redis.pttl(key)
                lives.append(Life(asked, str(key), ttl / 1000 if ttl > 0 else ttl, now() - asked))
        return lives


@contextmanager
def running_site(
    output: Path,
    *,
    workers: Sequence[Mapping[str, str]] = ({}, {}),
    lease: float = 1.0,
    wait: float = 5.0,
    timeout: float = 1.0,
) -> Iterator[Site]:
    """Workers whose leases are `lease` seconds long and whose calls of Redis take `timeout` at most.

    `workers` are further environment variables of each; APP names another app than the usual one. They end
    with the block. What they said is shown.
    """
    with ExitStack() as stack:
        output.touch()
        stack.callback(lambda: print(output.read_text(errors="replace")))
        server = stack.enter_context(RedisServer("--appendonly", "yes", "--appendfsync", "no"))
        proxy = stack.enter_context(ChaosProxy(server.port))
        redis = Redis.from_url(server.url, decode_responses=True, socket_timeout=timeout, protocol=2)
        site = Site(
            server=server,
            proxy=proxy,
            redis=stack.enter_context(redis),
            output=output,
            lease=lease,
            wait=wait,
        )
        variables = {
            "STORE_URL": f"{proxy.url}?socket_timeout={timeout}",
            "LOCK_TIMEOUT": str(lease),
            "LOCK_WAIT": str(wait),
        }
        for more in workers:
            site.workers.append(Worker({**variables, **more}, output))
            stack.callback(site.workers[-1].stop)
        yield site


@contextmanager
def running_on_a_file(folder: Path, *, lease: float = 1.0, wait: float = 5.0) -> Iterator[FileSite]:
    """Two workers on one file, as `running_site` has them on Redis."""
    site = FileSite(path=folder / "sessions.db", output=folder / "output", lease=lease, wait=wait)
    with ExitStack() as stack:
        site.output.touch()
        stack.callback(lambda: print(site.output.read_text(errors="replace")))
        variables = {
            "STORE_URL": f"sqlite:///{site.path}",
            "LOCK_TIMEOUT": str(lease),
            "LOCK_WAIT": str(wait),
        }
        for _ in range(2):
            site.workers.append(Worker(variables, site.output))
            stack.callback(site.workers[-1].stop)
        yield site
