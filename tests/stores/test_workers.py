"""Sessions in memory behind real servers: one of several workers says that it shares nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import httpx
import pytest
from redis_server import free_port

import asgi_sessions

APP = """
from asgi_sessions import SessionMiddleware

async def app(scope, receive, send):
    if scope["type"] == "http":
        scope["session"]["visits"] = scope["session"].get("visits", 0) + 1
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"ok"})
    while scope["type"] == "lifespan":
        kind = (await receive())["type"]
        await send({"type": f"{kind}.complete"})
        if kind == "lifespan.shutdown":
            break

app = SessionMiddleware(app, secret_key="k" * 32, store=STORE)
"""
UVICORN = ("uvicorn", "app:app", "--port", "{port}", "--log-level", "warning")
HYPERCORN = ("hypercorn", "app:app", "--bind", "127.0.0.1:{port}")
GUNICORN = (
    "gunicorn",
    "app:app",
    "--bind",
    "127.0.0.1:{port}",
    "--worker-class",
    "asgi",
    "--graceful-timeout",
    "1",
)
WARNING = "sessions in memory are not shared"


def said_by(folder: Path, command: Sequence[str], store: str = "None") -> str:
    """Everything that a server writes until it has answered and was ended."""
    (folder / "app.py").write_text(f"STORE = {store}\n{APP}")
    port, log = free_port(), folder / "log"
    path = os.pathsep.join([str(Path(asgi_sessions.__file__).parents[1]), *filter(None, sys.path)])
    with log.open("w") as output:
        server = subprocess.Popen(
            [sys.executable, "-m", *[word.format(port=port) for word in command]],
            cwd=folder, env={**os.environ, "PYTHONPATH": path}, stdout=output, stderr=output,
            start_new_session=True,
        )  # fmt: skip
        try:
            _visit(f"http://127.0.0.1:{port}/", server)
            server.send_signal(signal.SIGTERM)
            server.wait(30)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGKILL)  # the server and its workers, a session of their own
            server.wait(30)
    return log.read_text()


def _visit(url: str, server: subprocess.Popen[bytes]) -> None:
    """Ask until the server answers, which takes a moment."""
    ends = time.monotonic() + 60
    while True:
        with suppress(httpx.TransportError):
            assert httpx.get(url, timeout=30).text == "ok"
            return
        assert server.poll() is None, "the server has ended"
        assert time.monotonic() < ends, "the server does not answer"
        time.sleep(0.05)


def need(command: Sequence[str]) -> None:
    pytest.importorskip(command[0])


@pytest.mark.parametrize(
    "command",
    [
        pytest.param((*UVICORN, "--workers", "2"), id="uvicorn"),
        pytest.param((*UVICORN, "--workers", "2", "--lifespan", "off"), id="uvicorn without lifespan"),
        pytest.param((*HYPERCORN, "--workers", "2"), id="hypercorn"),
        pytest.param((*HYPERCORN, "--workers", "2", "--worker-class", "trio"), id="hypercorn on trio"),
        pytest.param((*GUNICORN, "--workers", "2"), id="gunicorn"),
        pytest.param((*GUNICORN, "--workers", "2", "--preload"), id="gunicorn with the app in its parent"),
    ],
)
def test_one_of_several_workers_warns_once(tmp_path: Path, command: Sequence[str]) -> None:
    """It names what to use instead."""
    need(command)
    said = said_by(tmp_path, command)
    told = [line for line in said.splitlines() if WARNING in line]
    assert 1 <= len(told) <= 2, said  # one of the two may have served nobody
    assert all("sqlite://" in line and "redis://" in line for line in told)


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(UVICORN, id="uvicorn"),
        pytest.param((*UVICORN, "--workers", "1"), id="uvicorn with one"),
        pytest.param((*UVICORN, "--reload"), id="uvicorn that reloads"),
        pytest.param((*UVICORN, "--reload", "--workers", "2"), id="uvicorn that reloads, and starts one"),
        pytest.param(HYPERCORN, id="hypercorn"),
        pytest.param((*HYPERCORN, "--reload"), id="hypercorn that reloads"),
        pytest.param(GUNICORN, id="gunicorn"),
    ],
)
def test_one_worker_says_nothing(tmp_path: Path, command: Sequence[str]) -> None:
    """Whatever starts it, and however often it is started anew."""
    need(command)
    assert WARNING not in said_by(tmp_path, command)


def test_several_workers_that_share_a_file_say_nothing(tmp_path: Path) -> None:
    """The store is not in memory."""
    said = said_by(tmp_path, (*UVICORN, "--workers", "2"), '"sqlite:///sessions.db"')
    assert WARNING not in said
