"""Workers that differ: an older and a newer release side by side, and clocks that are wrong."""

from __future__ import annotations

import random
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import anyio
import pytest
from asgi import page
from pydantic import BaseModel
from redis.asyncio import Redis

from asgi_sessions import Session, SessionData

from .app import MAX_AGE
from .checkers import prolonged
from .clients import Client, Seen, browser_like, crowd, shared_session
from .inprocess import Browser, process_at
from .processes import Site, running_site, until

pytestmark = pytest.mark.anyio


class OldShop(SessionData):
    """The record as the old release knows it."""

    cart: list[str] = []  # noqa: RUF012  # pydantic copies defaults


class Coupon(BaseModel):
    code: str
    used: int = 0


class NewShop(OldShop):
    """The new release's: a field more, one of them with a model of its own."""

    coupon: Coupon | None = None
    visits: int = 0


@pytest.fixture
async def raw(redis_url: str) -> AsyncIterator[Redis]:
    async with Redis.from_url(redis_url) as client:
        yield client


def buy(session: Session) -> None:
    """What both releases do."""
    assert isinstance(session.data, OldShop)
    session.data.cart.append(f"item {len(session.data.cart)}")
    session["bought"] = session.get("bought", 0) + 1


def redeem(session: Session) -> None:
    """What the new release alone does."""
    assert isinstance(session.data, NewShop)
    coupon = session.data.coupon or Coupon(code="WINTER")
    session.data.coupon = Coupon(code=coupon.code, used=coupon.used + 1)
    session.data.visits += 1


async def test_two_releases_write_one_session(redis_url: str, raw: Redis) -> None:
    """Side by side neither loses what the other wrote, fields that it does not know included."""
    dice = random.Random(4)
    async with process_at(redis_url, model=OldShop) as old, process_at(redis_url, model=NewShop) as new:
        browser = Browser(old, raw)
        assert (await browser.open(page(buy))).status == 200
        bought, redeemed = 1, 0
        for _ in range(30):
            process, act = dice.choice([(old, buy), (new, buy), (new, redeem)])
            assert (await browser.at(process).open(page(act))).status == 200
            bought, redeemed = bought + (act is buy), redeemed + (act is redeem)
        data = await new.store.get(browser.session_id)
        assert isinstance(data, NewShop)
        assert data.cart == [f"item {number}" for number in range(bought)]
        assert data.metadata == {"bought": bought}
        assert data.coupon == Coupon(code="WINTER", used=redeemed)
        assert data.visits == redeemed


async def test_two_releases_at_once(redis_url: str, raw: Redis) -> None:
    """Many requests to both at the same time: each waits for its turn, and all are there."""
    async with process_at(redis_url, model=OldShop) as old, process_at(redis_url, model=NewShop) as new:
        browser = Browser(old, raw)
        await browser.open(page(buy))
        statuses: list[int] = []

        async def visit(number: int) -> None:
            process, act = [(old, buy), (new, buy), (new, redeem)][number % 3]
            statuses.append((await browser.at(process).open(page(act))).status)

        async with anyio.create_task_group() as group:
            for number in range(30):
                group.start_soon(visit, number)
        assert statuses == [200] * 30
        data = await new.store.get(browser.session_id)
        assert isinstance(data, NewShop)
        assert (len(data.cart), data.visits) == (21, 10)


def read(session: Session) -> None:
    """Look, and change nothing."""
    assert session.get("n") in (None, 0)


async def lie_idle(browser: Browser, seconds: float) -> None:
    """So many seconds of the idle timeout are left, of a session that began some minutes ago."""
    began = int(await browser.raw.getrange(browser.key, 51, 63)) - 600_000
    await browser.raw.setrange(browser.key, 51, b"%013d" % began)
    await browser.raw.pexpire(browser.key, round(seconds * 1000))


@pytest.mark.parametrize("read_only", [False, True])
@pytest.mark.parametrize("left", [80, 20])
async def test_a_shorter_idle_timeout_binds_older_sessions(
    redis_url: str, raw: Redis, read_only: bool, left: int
) -> None:
    """A release with half of the time ends what has been idle for longer than that, and nothing else."""
    shorter = {"idle_timeout": 50, "read_only": ["/*"] if read_only else []}
    async with process_at(redis_url, idle_timeout=100) as old, process_at(redis_url, **shorter) as new:
        browser = Browser(old, raw)
        await browser.open(page(lambda session: session.update(n=0)))
        await lie_idle(browser, left)
        seen: list[object] = []
        await browser.at(new).open(page(lambda session: seen.append(session.get("n"))))
        assert seen == [0 if left == 80 else None]
        assert bool(await raw.exists(browser.key)) is (left == 80 or read_only)


async def test_another_client_is_no_activity(redis_url: str, raw: Redis) -> None:
    """Whose fingerprint does not fit gets a fresh session, and the idle timeout of the other goes on."""
    async with process_at(redis_url, idle_timeout=100) as process:
        browser = Browser(process, raw)
        await browser.open(page(lambda session: session.update(n=0)))
        await lie_idle(browser, 20)
        await browser.open(page(read), client=("198.51.100.9", 1))
        assert process.events[-1] == "fingerprint_mismatch"
        assert await raw.pttl(browser.key) <= 20_000
        await browser.open(page(read))
        assert await raw.pttl(browser.key) > 95_000


async def test_records_of_the_release_before_go_on(redis_url: str, raw: Redis) -> None:
    """What was written in the old format is read, changed and moved; each change is in the new one."""
    async with process_at(redis_url, idle_timeout=100) as process:
        browser = Browser(process, raw)

        async def value_of(browser: Browser) -> bytes:
            value = await raw.get(browser.key)
            assert isinstance(value, bytes)
            return value

        async def make_old() -> None:
            value = await value_of(browser)
            await raw.set(browser.key, b"asgi1" + value[5:51] + value[65:], keepttl=True)

        await browser.open(page(lambda session: session.update(n=0)))
        for act in (
            lambda session: session.update(m=1),
            Session.regenerate_id,
            lambda session: session.login("ada"),
        ):
            await make_old()
            assert (await browser.open(page(read))).status == 200
            assert (await value_of(browser))[:6] == b"asgi1:"
            assert (await browser.open(page(act))).status == 200
            assert (await value_of(browser))[:6] == b"asgi2:"
        data = await browser.stored()
        assert data is not None
        assert (data.metadata, data.user_id) == ({"n": 0, "m": 1}, "ada")


async def assert_ends_for_all(site: Site) -> None:
    """A session whose time is up by Redis' clock is gone, whatever a worker's clock says."""
    async with browser_like() as http:
        client = Client(http, "canary", Seen())
        site.redis.flushall()
        for url in site.urls:
            await client.begin(url)
            (key,) = [str(key) for key in site.redis.scan_iter("session:{*}")]
            site.redis.pexpire(key, 1)
            await until(lambda key=key: not site.redis.exists(key))  # type: ignore[misc]  # bound now
            assert [(await client.ask(other, "read"))[0] for other in site.urls] == [404] * len(site.urls)


SKEWED = {"APP": "faults.skewed:from_environment"}
CLOCKS = [
    {"TZ": "Asia/Kolkata"},
    {**SKEWED, "CLOCK_OFFSET": "3600", "TZ": "America/New_York"},
    # years behind, and the hour that comes twice begins while it serves
    {**SKEWED, "CLOCK_AT": "2024-10-27T00:59:57+00:00", "TZ": "Europe/Berlin"},
]


async def test_clocks_that_are_wrong(tmp_path: Path) -> None:
    """A session begun at any worker lives as long as Redis' clock says, and each worker can use it."""
    with running_site(tmp_path / "output", workers=CLOCKS) as site:
        await site.up()
        lives = site.lives(time.monotonic)
        async with AsyncExitStack() as stack:
            for url in site.urls:
                session = await stack.enter_async_context(shared_session([url]))
                session.urls = site.urls
                for _ in range(2):
                    for other in site.urls:
                        assert await session.do(other, "typed") == 200
                        assert await session.do(other, "transacted") == 200
                    lives += site.lives(time.monotonic)
                await crowd(session, 4, lambda: range(4))
                lives += site.lives(time.monotonic)
                assert await session.flaws() == []
        records = [life for life in lives if life.key.endswith("}")]
        assert prolonged(records, MAX_AGE) == []
        assert min(life.left for life in records) > MAX_AGE - 60
        await assert_ends_for_all(site)
        assert site.output.read_text() == ""
