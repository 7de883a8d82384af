"""Answers that no Redis gives: whatever comes, the client is told, and the session goes on."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import anyio
import pytest
from asgi import Act, page
from redis.asyncio import Redis
from redis_server import RedisServer

from asgi_sessions import Session
from asgi_sessions.stores.redis.commands.scripts import ACQUIRE, COMMIT, CREATE, RELEASE
from asgi_sessions.stores.redis.connection.script import Script

from .chaos import ChaosProxy, Fault, Link, Send, calls
from .inprocess import Browser, process_at

pytestmark = pytest.mark.anyio


def becoming(answer: bytes) -> Fault:
    """Something else arrives than what was sent."""

    def replace(link: Link, message: bytes, send: Send) -> None:
        send(answer)

    return replace


def count(session: Session) -> None:
    session["n"] = session.get("n", 0) + 1


def read(session: Session) -> None:
    session.get("n")


@pytest.fixture
def proxy(redis_url: str, redis_server: RedisServer) -> Iterator[ChaosProxy]:
    with ChaosProxy(redis_server.port) as proxy:
        yield proxy


@pytest.fixture
async def browser(redis_url: str, proxy: ChaosProxy) -> AsyncIterator[Browser]:
    """A client whose session counts two visits, at a process that waits no longer than a second."""
    async with (
        Redis.from_url(redis_url) as raw,
        process_at(f"{proxy.url}?socket_timeout=0.3", lock_timeout=0.5, lock_wait=1.0) as process,
    ):
        browser = Browser(process, raw)
        for _ in range(2):
            await browser.open(page(count))
        yield browser


NO_PROTOCOL = {
    "no type": b"!garbage\r\n",
    "another protocol": b"HTTP/1.1 400 Bad Request\r\n\r\n",
    "no text": b"\xff\xfe\xfd",
    "too short": b"$5\r\nab\r\n",
    "a server that is not ready": b"-LOADING wait\r\n",
}
REFUSALS = {
    "an unknown error": b"-ERR odd\r\n",
    "an error of a cluster": b"-MOVED 1 127.0.0.1:1\r\n",
}
NOT_OURS = {
    "a status": b"+OK\r\n",
    "a number": b":5\r\n",
    "nothing": b"$-1\r\n",
    "no list": b"*-1\r\n",
    "an empty list": b"*0\r\n",
    "half a list": b"*2\r\n$1\r\nL\r\n:1\r\n",
}
SCRIPTS: dict[Script, Act] = {ACQUIRE: count, COMMIT: count, RELEASE: read, CREATE: count}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
@pytest.mark.parametrize(
    "garbage", [*NO_PROTOCOL.values(), *REFUSALS.values()], ids=[*NO_PROTOCOL, *REFUSALS]
)
async def test_an_answer_that_cannot_be_understood(
    browser: Browser, proxy: ChaosProxy, garbage: bytes, script: Script
) -> None:
    """The request is answered, 503 at worst, nothing is stored twice, and the next one is served."""
    await assert_survived(browser, proxy, garbage, script)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
@pytest.mark.parametrize("garbage", NOT_OURS.values(), ids=NOT_OURS)
async def test_an_answer_that_is_none_of_ours(
    browser: Browser, proxy: ChaosProxy, garbage: bytes, script: Script
) -> None:
    """Well-formed, but not what a script of ours gives: a fault of the store, not a session that hangs."""
    await assert_survived(browser, proxy, garbage, script)


async def assert_survived(browser: Browser, proxy: ChaosProxy, garbage: bytes, script: Script) -> None:
    """One request meets this answer; then the session is as before or as told, and free."""
    if script is CREATE:
        browser.cookie = None
    plan = proxy.inject(becoming(garbage), calls(script), on="answer")
    before = 0 if script is CREATE else 2
    answer = await browser.open(page(SCRIPTS[script]))
    assert answer.status in (200, 503)
    assert await anyio.to_thread.run_sync(plan.hit.wait, 5)
    await browser.assert_free()
    if script is RELEASE:  # nobody waits for its answer: what is wrong with it may show with the next call's
        await browser.open(page(read))
    assert (await browser.open(page(count))).status == 200
    data = await browser.stored()
    assert data is not None
    stored = data.metadata["n"] - before
    assert stored == 1 if script is RELEASE else stored in ((2,) if answer.status == 200 else (1, 2))
