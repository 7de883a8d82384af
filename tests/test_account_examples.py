"""The examples of signing in, changing a password and a page of devices, each served over a real socket."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest
from redis_server import free_port

EXAMPLES = Path(__file__).parent.parent / "examples"
FIREFOX = "Mozilla/5.0 (Windows NT 10.0; Win64; x64; rv:140.0) Gecko/20100101 Firefox/140.0"
PASSWORD = "correct horse"


@pytest.fixture(params=["password_change", "devices"])
def example(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class Site:
    """An example that is served, and the browsers in front of it."""

    def __init__(self, url: str, stack: ExitStack) -> None:
        self.url = url
        self._stack = stack

    def browser(self, agent: str = FIREFOX, password: str | None = PASSWORD) -> httpx.Client:
        """One that follows redirects, and is signed in unless there is no password."""
        headers = {"user-agent": agent}
        client = httpx.Client(base_url=self.url, headers=headers, follow_redirects=True, timeout=30)
        self._stack.enter_context(client)
        if password is not None:
            answer = client.post("/sign-in", data={"name": "ada", "password": password})
            assert answer.json() == {"hello": "ada"}
        return client


@pytest.fixture
def site(example: str, tmp_path: Path) -> Iterator[Site]:
    port = free_port()
    command = ["-m", "uvicorn", "--app-dir", str(EXAMPLES), f"{example}:app", "--port", str(port)]
    server = subprocess.Popen([sys.executable, *command, "--log-level", "warning"], cwd=tmp_path)
    deadline = time.monotonic() + 60
    try:
        with ExitStack() as stack:
            with socket.socket() as probe:
                while probe.connect_ex(("127.0.0.1", port)):
                    assert server.poll() is None
                    assert time.monotonic() < deadline
                    time.sleep(0.05)
            yield Site(f"http://127.0.0.1:{port}", stack)
    finally:
        server.terminate()
        server.wait(20)


def is_signed_in(client: httpx.Client) -> bool:
    return client.get("/").status_code == 200


def test_a_password_is_changed(site: Site) -> None:
    """All other sessions end; this one goes on under a new id, and the old password opens nothing."""
    thief, ada, visitor = site.browser("curl/8"), site.browser(), site.browser(password=None)
    for name, password in (("ada", "wrong"), ("eve", PASSWORD)):
        assert visitor.post("/sign-in", data={"name": name, "password": password}).status_code == 403
    assert not is_signed_in(visitor)
    assert visitor.post("/password", data={"old": PASSWORD, "new": "x"}).status_code == 401
    assert thief.post("/password", data={"old": "guess", "new": "x"}).status_code == 403
    before = ada.cookies["session"]
    assert ada.post("/password", data={"old": PASSWORD, "new": "battery staple"}).json() == {"hello": "ada"}
    assert ada.cookies["session"] != before
    assert is_signed_in(ada)
    assert not is_signed_in(thief)
    assert visitor.post("/sign-in", data={"name": "ada", "password": PASSWORD}).status_code == 403
    assert is_signed_in(site.browser(password="battery staple"))
    ada.post("/sign-out")
    assert not is_signed_in(ada)


@pytest.mark.parametrize("example", ["devices"])
def test_the_page_of_devices(site: Site) -> None:
    """It lists them by their names, ends the one that is asked for, and then all others."""
    ada, phone, tablet = site.browser(), site.browser("Phone/1.0"), site.browser('Evil/1.0 <script>"')
    page = ada.get("/devices").text
    assert "Firefox on Windows, 127.0.0.1" in page
    assert page.count("this one") == 1
    assert "<script>" not in page
    handles = re.findall(r'name="handle" value="(\w+)"', page)
    assert len(handles) == 2
    before = sum(map(is_signed_in, (phone, tablet)))
    page = ada.post("/devices/end", data={"handle": handles[0]}).text
    assert handles[0] not in page
    assert (before, sum(map(is_signed_in, (phone, tablet)))) == (2, 1)
    assert ada.post("/devices/end", data={"handle": "nobody's"}).status_code == 200
    page = ada.post("/devices/end-others").text
    assert "value=" not in page
    assert [*map(is_signed_in, (ada, phone, tablet))] == [True, False, False]


@pytest.mark.parametrize("example", ["sign_in"])
def test_signing_in(site: Site) -> None:
    """A guard, "remember me", a fresh password for what matters, and out here or everywhere."""
    visitor, ada, phone = (site.browser(password=None) for _ in range(3))
    assert visitor.get("/account").status_code == 401
    assert visitor.post("/payout").status_code == 401
    assert visitor.post("/sign-in", data={"name": "ada", "password": "guess"}).status_code == 403
    ages = []
    for client, remember in ((ada, "true"), (phone, "false")):
        form = {"name": "ada", "password": PASSWORD, "remember": remember}
        answer = client.post("/sign-in", data=form)
        assert answer.json() == "ada"
        ages.append(int(answer.headers["set-cookie"].partition("Max-Age=")[2].partition(";")[0]))
    assert ages == [30 * 24 * 3600, 12 * 3600]
    assert ada.get("/account").json() == "ada"
    assert ada.post("/payout").json() == "paid to ada"
    ada.post("/sign-out")
    assert ada.get("/account").status_code == 401
    ada.post("/sign-in", data={"name": "ada", "password": PASSWORD})
    assert phone.post("/sign-out-everywhere").json() == 1
    assert [client.get("/account").status_code for client in (ada, phone)] == [401, 401]
    assert "session" not in phone.cookies


def test_readme_has_the_example_of_signing_in() -> None:
    """Word by word, so that what a reader types is what is tested."""
    code = (EXAMPLES / "sign_in.py").read_text("utf-8").partition('"""\n\n')[2]
    assert f"```python\n{code}```" in (EXAMPLES.parent / "README.md").read_text("utf-8")
