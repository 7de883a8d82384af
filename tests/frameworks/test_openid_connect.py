"""The recipe `examples/openid_connect.py`: Authlib's client over our session, against a real provider."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import httpx
import pytest
from serving import serving

from .openid_provider import CLIENT, EMAIL, SECRET, SUBJECT

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def provider(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    output = tmp_path_factory.mktemp("provider") / "output"
    with serving("frameworks.openid_provider:app", output) as url:
        yield url


@pytest.fixture(scope="module")
def url(provider: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    variables = {"OPENID_ISSUER": provider, "OPENID_CLIENT": CLIENT, "OPENID_SECRET": SECRET}
    output = tmp_path_factory.mktemp("recipe") / "output"
    with serving("openid_connect:app", output, variables) as url:
        yield url


@pytest.fixture
async def browser(url: str) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=url, timeout=30, verify=False) as client:
        yield client


async def way_back(browser: httpx.AsyncClient) -> str:
    """Start a sign-in, and go as far as the provider's redirect to us."""
    there = await browser.get("/sign-in")
    assert there.status_code == 302
    back = await browser.get(there.headers["location"])
    return str(back.headers["location"])


async def test_the_whole_way(browser: httpx.AsyncClient, provider: str) -> None:
    """To the provider and back: another id, the user's name and nothing of Authlib's left."""
    assert (await browser.get("/account")).status_code == 401
    back = await way_back(browser)
    before = browser.cookies["session"]
    answer = await browser.get(back, follow_redirects=True)
    assert answer.json() == {"user": f"{provider}|{SUBJECT}", "email": EMAIL}
    assert browser.cookies["session"] != before
    await browser.post("/sign-out")
    assert (await browser.get("/account")).status_code == 401


async def test_a_state_is_good_once(browser: httpx.AsyncClient) -> None:
    """Who comes back twice is signed in once, and stays so."""
    back = await way_back(browser)
    assert (await browser.get(back)).status_code == 303
    again = await browser.get(back)
    assert (again.status_code, again.text) == (401, "the sign-in failed: mismatching_state")
    assert (await browser.get("/account")).status_code == 200


async def test_a_state_is_good_in_its_own_session(browser: httpx.AsyncClient, url: str) -> None:
    """A way back that somebody else began signs nobody in."""
    back = await way_back(browser)
    async with httpx.AsyncClient(base_url=url, verify=False) as victim:
        await victim.get("/sign-in")
        assert (await victim.get(back)).status_code == 401
        assert (await victim.get("/account")).status_code == 401
    assert (await browser.get(back)).status_code == 303
