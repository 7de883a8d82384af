"""Real ASGI servers in processes of their own: started on the loopback, stopped by their own process id."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from redis_server import free_port

TESTS = Path(__file__).parent
EXAMPLES = TESTS.parent / "examples"
SECRET = "a-secret-of-the-tests-and-of-nothing-else"
PATIENCE = 30.0  # seconds for a server to start, and to end, on however slow a machine

UVICORN = ("-m", "uvicorn", "{app}", "--port", "{port}", "--log-level", "warning")


@contextmanager
def serving(
    app: str, output: Path, variables: Mapping[str, str] | None = None, *, command: Sequence[str] = UVICORN
) -> Iterator[str]:
    """The URL of `app` ("module:name") while a server runs it, in Python with these arguments.

    What the server prints is appended to `output`. Modules of `tests/` and `examples/` can be imported.
    """
    port = free_port()
    places = [TESTS.parent, TESTS, EXAMPLES, EXAMPLES / "frameworks"]
    path = os.pathsep.join(map(str, places))
    environment = {**os.environ, "SECRET_KEY": SECRET, **(variables or {}), "PYTHONPATH": path}
    arguments = [sys.executable, *(word.format(app=app, port=port) for word in command)]
    with output.open("ab") as printed:
        process = subprocess.Popen(arguments, env=environment, stdout=printed, stderr=printed)
    try:
        _await(process, port, output)
        yield f"http://127.0.0.1:{port}"
    finally:
        _end(process)


def _await(process: subprocess.Popen[bytes], port: int, output: Path) -> None:
    """Wait until it accepts connections."""
    end = time.monotonic() + PATIENCE
    while True:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        assert process.poll() is None, f"the server ended by itself:\n{output.read_text()}"
        assert time.monotonic() < end, f"the server did not start:\n{output.read_text()}"
        time.sleep(0.05)


def _end(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM, which must suffice."""
    process.terminate()
    try:
        process.wait(PATIENCE)
    finally:
        process.kill()
        process.wait()
