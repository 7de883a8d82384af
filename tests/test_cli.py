"""The command line does what it says, and says so when it cannot."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import pytest
from anyio import to_thread
from redis_server import free_port

from asgi_sessions import SessionData, SQLiteSessionStore, session_hash
from asgi_sessions.cli import main
from asgi_sessions.record.values import new_session_id
from asgi_sessions.stores.urls import resolve_store


@pytest.fixture(params=["sqlite", "redis"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A store of each kind that several processes use."""
    if request.param == "sqlite":
        store = SQLiteSessionStore(tmp_path / "sessions.db")
        asyncio.run(store.open())  # as an app does at its start
        asyncio.run(store.aclose())
        return f"sqlite:///{store.path}"
    return str(request.getfixturevalue("redis_url"))


@pytest.fixture
async def ada(url: str) -> SessionData:
    """A session of ada's."""
    store = resolve_store(url)
    data = SessionData(session_id=new_session_id(), user_id="ada", message_count=3)
    await store.set(data.session_id, data)
    await store.aclose()
    return data


def test_key_prints_a_new_secret_each_time() -> None:
    """64 hexadecimal digits, by the installed module."""
    command = [sys.executable, "-m", "asgi_sessions", "key"]
    keys = {
        subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() for _ in range(2)
    }
    assert len(keys) == 2
    assert all(len(key) == 64 and int(key, 16) for key in keys)


def test_health_of_a_store(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The probe's answer as JSON, exit status 0."""
    assert main(["health", url]) == 0
    assert json.loads(capsys.readouterr().out)["healthy"] is True


def test_health_of_a_store_that_is_down(capsys: pytest.CaptureFixture[str]) -> None:
    """Exit status 1, and why."""
    assert main(["health", f"redis://127.0.0.1:{free_port()}/0"]) == 1
    assert json.loads(capsys.readouterr().out)["error"]


@pytest.mark.anyio
async def test_sessions_are_listed_and_ended(
    ada: SessionData, url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`stats` counts them, `sessions` shortens their ids, `logout` ends them.

    Whoever gives it the app's key gets the log's names too.
    """
    monkeypatch.delenv("ASGI_SESSIONS_SECRET_KEY", raising=False)

    async def run(*arguments: str) -> str:
        assert await to_thread.run_sync(main, arguments) == 0
        return capsys.readouterr().out

    stats = json.loads(await run("stats", url))
    assert (stats["active_sessions"], stats["total_messages"]) == (1, 3)
    listed = await run("sessions", url, "ada")
    assert ada.session_id[:6] in listed
    assert "session=" not in listed
    monkeypatch.setenv("ASGI_SESSIONS_SECRET_KEY", "k" * 32)
    listed = await run("sessions", url, "ada")
    assert f"session={session_hash(ada.session_id, 'k' * 32)}  since" in listed
    assert ada.session_id not in listed
    assert await run("logout", url, "ada") == "1 sessions ended\n"
    assert await run("sessions", url, "ada") == ""


@pytest.mark.parametrize("url", ["ftp://x", "redis://127.0.0.1:1/0", "sqlite:////nowhere/s.db"])
def test_a_store_that_cannot_be_used(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit status 1 and one line on standard error."""
    assert main(["stats", url]) == 1
    assert capsys.readouterr().err.startswith("asgi-sessions: ")


@pytest.mark.parametrize("command", [["stats"], ["health"], ["logout"], ["sessions"]])
def test_a_file_that_is_not_there(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A misspelt path is no healthy store in which nobody is signed in, and no file is made."""
    user = ["ada"] if command[0] in ("logout", "sessions") else []
    assert main([*command, f"sqlite:///{tmp_path}/misspelt.db", *user]) == 1
    assert "there is no file" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    """Exit status 2, as argparse has it."""
    with pytest.raises(SystemExit) as ended:
        main(["nonsense"])
    assert ended.value.code == 2
    assert "usage" in capsys.readouterr().err
