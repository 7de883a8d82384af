"""Libraries that use the session, unchanged on top of ours, in a real server."""

from __future__ import annotations

import re
import sys
from collections.abc import AsyncIterator, Iterator

import httpx
import pytest
from serving import serving

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.skipif(sys.version_info < (3, 11), reason="starlette-admin needs Python 3.11"),
]

RIGHT = {"username": "ada", "password": "the-password"}
WRONG = {"username": "ada", "password": "another"}


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    output = tmp_path_factory.mktemp("libraries") / "output"
    with serving("frameworks.library_apps:app", output) as url:
        yield url
    assert "Traceback" not in output.read_text()
    assert "cookie_clash" not in output.read_text()


@pytest.fixture
async def browser(url: str) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=url, timeout=30, verify=False) as client:
        yield client


async def values(browser: httpx.AsyncClient) -> dict[str, object]:
    found: dict[str, object] = (await browser.get("/values")).json()
    return found


async def leads_to(browser: httpx.AsyncClient, path: str) -> str:
    """Where the page redirects to; empty where it is shown."""
    return str((await browser.get(path)).headers.get("location", ""))


async def test_sqladmin_over_our_session(browser: httpx.AsyncClient) -> None:
    """Its sign-in gets a new id by `rotate_on`; its sign-out ends the session."""
    await browser.post("/count")
    before = browser.cookies["session"]
    assert (await leads_to(browser, "/ours/admin/")).endswith("/login")
    assert (await browser.post("/ours/admin/login", data=WRONG)).status_code == 400
    assert (await browser.post("/ours/admin/login", data=RIGHT)).status_code == 302
    assert set(browser.cookies) == {"session"}
    assert browser.cookies["session"] != before
    assert (await browser.get("/ours/admin/")).status_code == 200
    assert await values(browser) == {"n": 1, "token": "a-token"}
    await browser.get("/ours/admin/logout")
    assert set(browser.cookies) == set()
    assert (await leads_to(browser, "/ours/admin/")).endswith("/login")


async def test_sqladmin_with_a_cookie_of_its_own(browser: httpx.AsyncClient) -> None:
    """The middleware that it brings stays beside ours."""
    await browser.post("/count")
    assert (await browser.post("/own-cookie/admin/login", data=RIGHT)).status_code == 302
    assert set(browser.cookies) == {"session", "admin_session"}
    assert (await browser.get("/own-cookie/admin/")).status_code == 200
    assert await values(browser) == {"n": 1}
    await browser.get("/own-cookie/admin/logout")
    assert (await leads_to(browser, "/own-cookie/admin/")).endswith("/login")
    assert await values(browser) == {"n": 1}


async def test_starlette_admin(browser: httpx.AsyncClient) -> None:
    """Signs in and out in our session."""
    assert "/login" in await leads_to(browser, "/panel/admin/")
    browser.headers["x-csrftoken"] = browser.cookies["starlette_admin_csrftoken"]
    assert (await browser.post("/panel/admin/login", data=WRONG)).status_code == 400
    assert (await browser.post("/panel/admin/login", data=RIGHT)).status_code == 303
    assert await values(browser) == {"username": "ada"}
    assert (await browser.get("/panel/admin/")).status_code == 200
    await browser.post("/panel/admin/logout")
    assert await values(browser) == {}
    assert "/login" in await leads_to(browser, "/panel/admin/")


async def test_starlette_wtf(browser: httpx.AsyncClient, url: str) -> None:
    """The token of a form is good in the session that it was made in, and in no other."""
    page = (await browser.get("/wtf/")).text
    token = re.findall(r'value="([^"]+)"', page)[0]
    sent = {"name": "Ada", "csrf_token": token}
    async with httpx.AsyncClient(base_url=url, verify=False) as stranger:
        await stranger.get("/wtf/")
        assert (await stranger.post("/wtf/", data=sent)).status_code == 422
    assert (await browser.post("/wtf/", data={"name": "Ada"})).status_code == 422
    assert (await browser.post("/wtf/", data=sent)).json() == {"name": "Ada"}
    assert (await values(browser))["name"] == "Ada"


async def test_starlette_csrf(browser: httpx.AsyncClient) -> None:
    """Its cookie stays beside ours, and whoever has a session needs its token."""
    await browser.get("/csrf/")
    assert set(browser.cookies) == {"session", "csrftoken"}
    assert (await browser.post("/csrf/")).status_code == 403
    headers = {"x-csrftoken": browser.cookies["csrftoken"]}
    assert (await browser.post("/csrf/", headers=headers)).json() == {"n": 2}


async def test_imia(browser: httpx.AsyncClient) -> None:
    """It awaits our `regenerate_id()`; where another user was signed in, `rotate_on` gives the new id."""
    await browser.post("/count")
    before = browser.cookies["session"]
    assert (await browser.post("/imia/login", data=WRONG)).json() == {"signed in": False}
    assert (await browser.post("/imia/login", data=RIGHT)).json() == {"signed in": True}
    assert browser.cookies["session"] != before
    assert (await browser.get("/imia/")).json() == {"user": "ada"}
    assert (await values(browser))["n"] == 1
    before = browser.cookies["session"]
    assert (await browser.post("/imia/login", data={**RIGHT, "username": "bob"})).is_success
    assert browser.cookies["session"] != before, "who planted a session of his own shares bob's"
    assert "n" not in await values(browser)
    await browser.post("/imia/logout")
    assert (await browser.get("/imia/")).json() == {"user": None}
    assert await values(browser) == {}


async def test_sse_starlette(browser: httpx.AsyncClient) -> None:
    """A stream of events changes the session while another request does."""
    await browser.post("/sse/count")
    found = []
    async with browser.stream("GET", "/sse/") as stream:
        async for line in stream.aiter_lines():
            if line.startswith("data: "):
                found.append(line)
                await browser.post("/sse/count")
    assert len(found) == 3
    assert await values(browser) == {"n": 7}


async def test_a_second_session_middleware_inside(browser: httpx.AsyncClient) -> None:
    """Starlette's own, with another cookie: each counts for itself."""
    assert (await browser.post("/count")).json() == {"n": 1}
    for turn in (1, 2):
        assert (await browser.post("/second/")).json() == {"n": turn}
    assert set(browser.cookies) == {"session", "second"}
    assert await values(browser) == {"n": 1}


async def test_nicegui(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Its pages have a cookie of their own; a sign-in of ours leaves what they know alone."""
    folder = tmp_path_factory.mktemp("nicegui")
    variables = {"NICEGUI_STORAGE_PATH": str(folder / "storage")}
    with serving("frameworks.nicegui_app:app", folder / "output", variables) as url:
        async with httpx.AsyncClient(base_url=url, timeout=30, verify=False) as browser:
            assert "visit 1" in (await browser.get("/pages/count")).text
            await browser.post("/sign-in")
            assert set(browser.cookies) == {"session", "nicegui"}
            assert "visit 2" in (await browser.get("/pages/count")).text
            assert (await browser.get("/user")).json() == "ada"
    assert "cookie_clash" not in (folder / "output").read_text()
