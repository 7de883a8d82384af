"""The plugin for pytest is found by itself, and is in nobody's way."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from .projects import ROOT, run_pytest

USES_ALL = """
import httpx, pytest
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from asgi_sessions import SessionMiddleware, get_session
from asgi_sessions.testing import session_of

async def who(request):
    return PlainTextResponse(str(get_session(request).data.user_id))

@pytest.fixture
def app(asgi_sessions_store):
    app = Starlette()
    app.add_route("/", who)
    app.add_middleware(SessionMiddleware, secret_key="k" * 32, store=asgi_sessions_store, max_age=60)
    return app

def client_of(app):
    return httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://testserver")

def test_sync(app, asgi_sessions_sign_in):
    client = asgi_sessions_sign_in(client_of(app), "eve", theme="dark")
    assert session_of(client).metadata == {"theme": "dark"}
"""
ASYNC = """

@pytest.mark.anyio
async def test_async(app, anyio_backend_name, asgi_sessions_clock, asgi_sessions_sign_in):
    async with client_of(app) as client:
        asgi_sessions_sign_in(client)
        assert (await client.get("/")).text == "ada"
        asgi_sessions_clock.advance(60)
        assert (await client.get("/")).text == "None"
"""


def test_its_fixtures_are_there(tmp_path: Path) -> None:
    """In plain tests, and in those of anyio's plugin on both event loops; pytest-asyncio is not needed."""
    options = ("-p", "no:asyncio")
    assert "3 passed" in run_pytest(tmp_path, {"test_app.py": USES_ALL + ASYNC}, *options)


def test_it_needs_no_other_plugin(tmp_path: Path) -> None:
    """Without anyio's."""
    options = ("-p", "no:anyio", "-p", "no:asyncio")
    assert "1 passed" in run_pytest(tmp_path, {"test_app.py": USES_ALL}, *options)


def test_it_may_be_named_again(tmp_path: Path) -> None:
    """By `-p` and by `pytest_plugins`, beside the entry point."""
    files = {"test_app.py": USES_ALL, "conftest.py": 'pytest_plugins = ["pytest_asgi_sessions"]\n'}
    assert "1 passed" in run_pytest(tmp_path, files, "-p", "pytest_asgi_sessions")


def test_it_may_be_turned_off(tmp_path: Path) -> None:
    """The kit's functions need no plugin."""
    files = {"test_app.py": "from asgi_sessions.testing import session_cookie\n\ndef test(): pass\n"}
    assert "1 passed" in run_pytest(tmp_path, files, "-p", "no:pytest_asgi_sessions")


@pytest.mark.parametrize("file", ["conftest.py", "other_plugin.py"])
def test_another_plugin_has_a_fixture_of_the_same_name(tmp_path: Path, file: str) -> None:
    """That one is used, and the others go on with it."""
    clock = (
        "import pytest\nfrom asgi_sessions.testing import ManualClock\n\n"
        "class Own(ManualClock): pass\n\n"
        "@pytest.fixture\ndef asgi_sessions_clock(): return Own(7.0)\n"
    )
    test = (
        "def test(asgi_sessions_store, asgi_sessions_clock):\n"
        "    assert asgi_sessions_store._clock is asgi_sessions_clock\n"
        "    assert asgi_sessions_clock() in (0.0, 7.0)\n"
    )
    files = {file: clock, "test_both.py": test}
    options = ("-p", "other_plugin") if file == "other_plugin.py" else ()
    assert "1 passed" in run_pytest(tmp_path, files, *options)


def test_it_imports_nothing_until_it_is_used(tmp_path: Path) -> None:
    """A run without sessions does not load the package."""
    test = "import sys\n\ndef test():\n    assert 'asgi_sessions' not in sys.modules\n"
    assert "1 passed" in run_pytest(tmp_path, {"test_none.py": test})
    code = "import sys, pytest_asgi_sessions; print({'asgi_sessions', 'pydantic'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "set()"
