"""The small apps of `examples/frameworks`, each behind a real uvicorn: the same walk works in each."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import anyio
import httpx
import pytest
from serving import serving

pytestmark = pytest.mark.anyio

MODULES = ["bare_app", "starlette_app", "fastapi_app", "litestar_app", "quart_app", "django_app"]


@pytest.fixture(scope="module", params=MODULES)
def module(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def url(module: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The app's server, which all tests of a module share."""
    with serving(f"{module}:app", tmp_path_factory.mktemp(module) / "output") as url:
        yield url


@pytest.fixture
async def browser(url: str) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=url, timeout=30, verify=False) as client:
        yield client


async def sign_in(browser: httpx.AsyncClient, user: str = "ada") -> None:
    headers = {"content-type": "text/plain"}
    answer = await browser.post("/sign-in", content=user, headers=headers)
    assert answer.is_success, answer.text
    assert answer.json() == {"user": user}


async def test_sign_in_guard_and_sign_out(browser: httpx.AsyncClient) -> None:
    """A sign-in changes the id and keeps the values; after the sign-out the old cookie is worth nothing."""
    assert (await browser.get("/account")).status_code == 401
    assert "session" not in browser.cookies
    assert (await browser.post("/count")).json() == {"visits": 1}
    before = browser.cookies["session"]
    await sign_in(browser, "o'brien@example.com")
    after = browser.cookies["session"]
    assert after != before
    assert (await browser.get("/account")).json() == {"user": "o'brien@example.com", "visits": 1}
    assert (await browser.post("/sign-out")).is_success
    assert "session" not in browser.cookies
    for dead in (before, after):
        browser.cookies["session"] = dead
        assert (await browser.get("/account")).status_code == 401


async def test_parallel_requests_are_all_counted(browser: httpx.AsyncClient) -> None:
    """Ten at once: each has a number of its own."""
    await sign_in(browser)
    numbers: list[int] = []

    async def count() -> None:
        numbers.append((await browser.post("/count")).json()["visits"])

    async with anyio.create_task_group() as tasks:
        for _ in range(10):
            tasks.start_soon(count)
    assert sorted(numbers) == list(range(1, 11))


@pytest.mark.parametrize("module", ["fastapi_app"], indirect=True)
async def test_fastapi_documents_the_cookie(browser: httpx.AsyncClient) -> None:
    """The guarded path, and no other, asks for it."""
    document = (await browser.get("/openapi.json")).json()
    scheme = document["components"]["securitySchemes"]["APIKeyCookie"]
    assert (scheme["in"], scheme["name"]) == ("cookie", "session")
    guarded = [
        path for path, methods in document["paths"].items() for each in methods.values() if "security" in each
    ]
    assert guarded == ["/account"]


@pytest.mark.parametrize("module", ["fastapi_app"], indirect=True)
async def test_a_yield_dependency_of_fastapi_may_change_the_session(browser: httpx.AsyncClient) -> None:
    """What it changes after the endpoint, before the answer, is stored."""
    await browser.post("/count")
    await browser.post("/count")
    assert (await browser.get("/seen")).json() == ["/count", "/count"]


@pytest.mark.parametrize("module", ["django_app"], indirect=True)
async def test_the_sessions_of_django_live_beside_ours(browser: httpx.AsyncClient) -> None:
    """Each has its cookie; ending ours leaves Django's alone."""
    await browser.post("/count")
    assert set(browser.cookies) == {"session", "django_session"}
    await browser.post("/sign-out")
    await browser.post("/count")
    assert (await browser.get("/django")).json() == {"visits": 2}
    await sign_in(browser)
    assert (await browser.get("/account")).json() == {"user": "ada", "visits": 1}
