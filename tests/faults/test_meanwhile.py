"""What befalls Redis, or the record in it, while a request holds the session; the client hears the truth."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

import anyio
import pytest
from asgi import Act, page, run, stream
from redis.asyncio import Redis
from redis_server import RedisServer

from asgi_sessions import Session
from asgi_sessions.asgi import ASGIApp

from .inprocess import Browser, process_at

pytestmark = pytest.mark.anyio

Meanwhile = Callable[[Browser], Awaitable[object]]


@pytest.fixture
async def raw(redis_url: str) -> AsyncIterator[Redis]:
    async with Redis.from_url(redis_url) as client:
        yield client


@pytest.fixture
async def browser(redis_url: str, raw: Redis) -> AsyncIterator[Browser]:
    """A client whose session has begun."""
    async with process_at(redis_url) as process:
        browser = Browser(process, raw)
        await browser.open(page(lambda session: session.update(n=0)))
        yield browser


def write(session: Session) -> None:
    session["n"] = 1


def login(session: Session) -> None:
    session.login("ada")


def during(browser: Browser, meanwhile: Meanwhile, act: Act) -> Act:
    """An act during which something happens."""

    async def both(session: Session) -> None:
        await meanwhile(browser)
        await run(act, session)

    return both


async def found(browser: Browser) -> object:
    """What the record says of n; None where there is none."""
    data = await browser.stored()
    return None if data is None else data.metadata["n"]


# -- the keys ------------------------------------------------------------------------------------------------


async def expire(browser: Browser, key: str) -> None:
    await browser.raw.pexpire(key, 1)
    while await browser.raw.exists(key):  # noqa: ASYNC110  # Redis sets no event
        await anyio.sleep(0.001)


async def overwrite(browser: Browser) -> None:
    data = await browser.stored()
    assert data is not None
    data.metadata["n"] = 5
    await browser.process.store.set(browser.session_id, data)


ENDS: dict[str, Meanwhile] = {
    "all data deleted": lambda browser: browser.raw.flushall(),
    "record evicted": lambda browser: browser.raw.delete(browser.key),
    "record expired": lambda browser: expire(browser, browser.key),
    "deleted by an operator": lambda browser: browser.process.store.delete(browser.session_id),
    "all its keys deleted": lambda browser: browser.raw.delete(browser.key, browser.key + ":lock"),
}
STOLEN: dict[str, Meanwhile] = {
    "lock taken": lambda browser: browser.raw.set(browser.key + ":lock", "another", px=100),
    "overwritten": overwrite,
}
HARMLESS: dict[str, Meanwhile] = {
    "lock evicted": lambda browser: browser.raw.delete(browser.key + ":lock"),
    "lock expired": lambda browser: expire(browser, browser.key + ":lock"),
    "scripts forgotten": lambda browser: browser.raw.script_flush(),
    "connections closed": lambda browser: browser.raw.client_kill_filter(_type="normal", skipme=True),
}


@pytest.mark.parametrize("form", [page, lambda act: stream(act, None)], ids=["page", "stream"])
@pytest.mark.parametrize("act", [write, login, Session.logout])
@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
async def test_a_session_that_is_gone_stays_gone(
    browser: Browser, end: Meanwhile, act: Act, form: Callable[[Act], ASGIApp]
) -> None:
    """A change is answered 409, an end is done; nothing is written under the old id or a new one.

    The cookie is left alone: by now it may be that of another sign-in.
    """
    key = browser.key
    answer = await browser.open(form(during(browser, end, act)))
    assert (answer.status, answer.cookies) == (200 if act is Session.logout else 409, [])
    assert await browser.raw.keys("*{*}") == []
    assert not await browser.raw.exists(key)
    await browser.assert_free()


@pytest.mark.parametrize("act", [write, login, Session.regenerate_id])
@pytest.mark.parametrize("name", STOLEN)
async def test_a_stolen_turn_is_answered_409(browser: Browser, name: str, act: Act) -> None:
    """Nothing of the request is stored, the cookie stays, and the session goes on."""
    answer = await browser.open(page(during(browser, STOLEN[name], act)))
    assert (answer.status, answer.cookies) == (409, [])
    assert await found(browser) == (5 if name == "overwritten" else 0)
    assert len(await browser.raw.keys("*{*}")) <= 2
    await browser.assert_free()
    assert (await browser.open(page(write))).status == 200
    assert await found(browser) == 1


@pytest.mark.parametrize("name", STOLEN)
async def test_an_end_wins_over_whoever_stole_the_turn(browser: Browser, name: str) -> None:
    """Logout ends the session all the same."""
    key = browser.key
    answer = await browser.open(page(during(browser, STOLEN[name], Session.logout)))
    assert (answer.status, browser.cookie) == (200, None)
    assert not await browser.raw.exists(key)
    await browser.assert_free()


@pytest.mark.parametrize("act", [write, login])
@pytest.mark.parametrize("harm", HARMLESS.values(), ids=HARMLESS)
async def test_what_can_be_mended_is_not_noticed(browser: Browser, harm: Meanwhile, act: Act) -> None:
    """The change is stored, once, and the client hears nothing of it."""
    answer = await browser.open(page(during(browser, harm, act)))
    assert answer.status == 200
    data = await browser.stored()
    assert data is not None
    assert (data.metadata["n"], data.user_id) == ((1, None) if act is write else (0, "ada"))
    await browser.assert_free()


@pytest.mark.parametrize("value", [b"foreign", b"asgi2:cut"])
async def test_foreign_bytes_that_came_meanwhile_stay(browser: Browser, value: bytes) -> None:
    """A record that somebody else's bytes took the place of is neither overwritten nor deleted."""
    key = browser.key
    answer = await browser.open(page(during(browser, lambda each: each.raw.set(each.key, value), write)))
    assert answer.status == 409
    assert await browser.raw.get(key) == value
    await browser.assert_free()


@pytest.mark.parametrize("fails", [False, True])
async def test_a_save_that_was_cut_off_is_no_conflict(browser: Browser, fails: bool) -> None:
    """Stored or not: the good answer after it is 200, and its change is there; an error page stays one."""

    async def save(session: Session) -> None:
        session["n"] = 1
        saving = asyncio.create_task(session.save())
        await asyncio.sleep(0)
        saving.cancel()
        await asyncio.wait((saving,))
        session["n"] = 2

    answer = await browser.open(page(save, status=500 if fails else 200))
    assert answer.status == (500 if fails else 200)
    assert await found(browser) in ((0, 1) if fails else (2,))
    await browser.assert_free()
    assert (await browser.open(page(write))).status == 200


# -- the server ----------------------------------------------------------------------------------------------


async def refuse_memory(raw: Redis, server: RedisServer) -> None:
    await raw.config_set("maxmemory", 1)


async def refuse_writes(raw: Redis, server: RedisServer) -> None:
    await raw.replicaof("127.0.0.1", 1)


async def die(raw: Redis, server: RedisServer) -> None:
    await anyio.to_thread.run_sync(server.kill)


async def stand_still(raw: Redis, server: RedisServer) -> None:
    server.pause()


Trouble = Callable[[Redis, RedisServer], Awaitable[None]]


async def mend(raw: Redis, server: RedisServer, trouble: Trouble) -> None:
    """All is well again; a server that was killed comes back with its data."""
    if trouble is refuse_memory:
        await raw.config_set("maxmemory", 0)
    elif trouble is refuse_writes:
        await raw.replicaof("NO", "ONE")
    elif trouble is die:
        await anyio.to_thread.run_sync(server.start)
    else:
        server.resume()


@pytest.mark.parametrize("act", [write, login, Session.logout])
@pytest.mark.parametrize("trouble", [refuse_memory, refuse_writes, die, stand_still])
async def test_a_server_that_fails_meanwhile_is_answered_503(trouble: Trouble, act: Act) -> None:
    """Nothing of the app's answer leaves; when all is well again the session is whole and can be used."""
    with RedisServer("--appendonly", "yes", "--appendfsync", "no") as server:
        async with (
            Redis.from_url(server.url) as raw,
            process_at(f"{server.url}?socket_timeout=0.2", lock_timeout=0.4) as process,
        ):
            browser = Browser(process, raw)
            await browser.open(page(lambda session: session.update(n=0)))
            cookie = browser.cookie
            answer = await browser.open(page(during(browser, lambda _: trouble(raw, server), act)))
            if act is Session.logout and trouble is refuse_memory:
                assert answer.status == 200  # to delete takes no memory
            else:
                assert (answer.status, answer.cookies, browser.cookie) == (503, [], cookie)
            await mend(raw, server, trouble)
            await browser.assert_free()
            assert (await browser.open(page(write))).status in (200, 409)  # 409: its id was replaced just now


@pytest.mark.parametrize("everything", [True, False], ids=["ALL", "WRITE"])
@pytest.mark.parametrize("seconds", [0.1, 0.6])
async def test_a_pause_that_outlasts_the_lease_costs_no_change(
    redis_url: str, raw: Redis, everything: bool, seconds: float
) -> None:
    """CLIENT PAUSE: no renewal comes through; where nobody took the lock after the lease, it is stored."""
    async with process_at(f"{redis_url}?socket_timeout=2", lock_timeout=0.3) as process:
        browser = Browser(process, raw)
        await browser.open(page(lambda session: session.update(n=0)))

        async def pause(browser: Browser) -> None:
            await raw.client_pause(round(seconds * 1000), all=everything)
            await anyio.sleep(seconds + 0.05)

        answer = await browser.open(page(during(browser, pause, write)))
        assert (answer.status, await found(browser)) == (200, 1)
        assert "lock_lost" not in process.events
        await browser.assert_free()


@pytest.mark.parametrize("form", [page, lambda act: stream(act, None)], ids=["page", "stream"])
async def test_a_restart_with_its_data_is_not_noticed(form: Callable[[Act], ASGIApp]) -> None:
    """The lock is in the file as the record is: the request that held it commits."""
    with RedisServer("--appendonly", "yes", "--appendfsync", "no") as server:
        async with Redis.from_url(server.url) as raw, process_at(server.url) as process:
            browser = Browser(process, raw)
            await browser.open(page(lambda session: session.update(n=0)))
            restart = lambda _: anyio.to_thread.run_sync(server.restart)  # noqa: E731
            assert (await browser.open(form(during(browser, restart, write)))).status == 200
            assert await found(browser) == 1
            await browser.assert_free()


async def test_a_restart_without_data_ends_the_session(own_redis: RedisServer) -> None:
    """The holder's change is answered 409; nothing of the session comes back."""
    async with Redis.from_url(own_redis.url) as raw, process_at(own_redis.url) as process:
        browser = Browser(process, raw)
        await browser.open(page(lambda session: session.update(n=0)))
        restart = lambda _: anyio.to_thread.run_sync(own_redis.restart)  # noqa: E731
        answer = await browser.open(page(during(browser, restart, write)))
        assert (answer.status, answer.cookies) == (409, [])
        assert await raw.keys() == []
