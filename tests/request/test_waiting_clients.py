"""A request that waits for the lock leaves the queue when its client has gone; its messages are kept."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio
import pytest
from asgi import KEY, Answer, Browser, Site, chunk, page, start
from faults.inprocess import Process
from memory import most

from asgi_sessions import Session, SessionData
from asgi_sessions.asgi import ASGIApp, Message, Receive, Scope, Send
from asgi_sessions.client.signer import CookieSigner
from asgi_sessions.request import incoming
from asgi_sessions.stores.checkout import Checkout, LockPolicy
from asgi_sessions.stores.contract import SessionStore

pytestmark = pytest.mark.anyio

GONE: dict[str, Any] = {"type": "http.disconnect"}


@pytest.fixture
def anyio_backend(way: str) -> str:
    """Each kind of store that needs no server."""
    return way


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client is watched from the beginning of the wait."""
    monkeypatch.setattr(incoming, "_LOOK_AFTER", 0)


@pytest.fixture
def site(model: type[SessionData]) -> Site:
    return Site({"model": model})


@pytest.fixture
async def browser(site: Site) -> Browser:
    browser = site.browser()
    await browser.begin(n=0)
    return browser


class Client:
    """What a client says; the server is answered when there is something."""

    def __init__(self, *messages: Message) -> None:
        self.left = list(messages)
        self.cancelled = 0
        self._news = anyio.Event()
        self._is_asked = anyio.Event()

    def say(self, message: Message) -> None:
        self.left.append(message)
        self._news.set()
        self._news = anyio.Event()

    async def is_waited_for(self) -> None:
        """All was read, and the server has asked for more."""
        with anyio.fail_after(5):
            await self._is_asked.wait()

    async def receive(self) -> Message:
        try:
            await anyio.lowlevel.checkpoint()
            while not self.left:
                self._is_asked.set()
                await self._news.wait()
        except anyio.get_cancelled_exc_class():
            self.cancelled += 1
            raise
        return self.left.pop(0)


@dataclass
class Asking:
    """A request that is under way, and its answer."""

    client: Client
    answer: Answer | None = None
    is_answered: anyio.Event = field(default_factory=anyio.Event)

    async def run(self, ask: Callable[[Receive], Awaitable[Answer]]) -> None:
        self.answer = await ask(self.client.receive)
        self.is_answered.set()

    async def goes(self) -> Answer:
        """The client goes; what it is answered, which comes soon."""
        await self.client.is_waited_for()
        self.client.say(GONE)
        with anyio.fail_after(1):
            await self.is_answered.wait()
        assert self.answer is not None
        return self.answer


def post(browser: Browser, app: ASGIApp) -> Callable[[Receive], Awaitable[Answer]]:
    """A request of this browser, with a body of its own."""
    agent = (browser.user_agent or "").encode()
    headers = [(b"user-agent", agent), (b"cookie", f"session={browser.cookie}".encode())]
    return lambda receive: browser.site.request(app, headers=headers, receive=receive, method="POST")


def part(body: bytes, more: bool = True) -> dict[str, Any]:
    return {"type": "http.request", "body": body, "more_body": more}


@asynccontextmanager
async def held(store: SessionStore, session_id: str) -> AsyncIterator[None]:
    """Somebody else holds the session's lock."""
    taken = await store.checkout(session_id, LockPolicy(), None)
    assert isinstance(taken, Checkout)
    try:
        yield
    finally:
        await store.release(taken)


def count(session: Session) -> None:
    session["n"] += 1


async def read_body(receive: Receive) -> bytes:
    body, more = b"", True
    while more:
        message = await receive()
        assert message["type"] == "http.request"
        body += message.get("body", b"")
        more = message.get("more_body", False)
    return body


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    """Count, and answer with the body's size."""
    count(scope["session"])
    size = str(len(await read_body(receive))).encode()
    await send(start())
    await send(chunk(size))


@pytest.mark.parametrize("body", [(), (part(b"all", more=False),), (part(b"half"),)], ids=len)
async def test_a_client_that_has_gone_holds_nobody_up(
    site: Site, browser: Browser, body: tuple[Message, ...]
) -> None:
    """The request leaves the queue, is answered all the same, and the app is not called."""
    asking = Asking(Client(*body))
    async with held(site.store, browser.session_id), anyio.create_task_group() as group:
        site.log.clear()
        group.start_soon(asking.run, post(browser, page(count)))
        assert (await asking.goes()).status == 503
    assert site.events == ["client_gone"]
    assert "app" not in site.log
    assert (await browser.open(page(count))).status == 200
    assert await browser.stored() == {"n": 1}


@pytest.mark.parametrize("goes", [False, True])
async def test_a_cancelled_request_is_cancelled(site: Site, browser: Browser, goes: bool) -> None:
    """Also when its client goes at the same moment; nothing of that is left in the task around it."""
    asking = Asking(Client())
    async with held(site.store, browser.session_id), anyio.create_task_group() as group:
        with anyio.fail_after(5), anyio.CancelScope() as scope:
            group.start_soon(asking.client.is_waited_for)

            async def end() -> None:
                await asking.client.is_waited_for()
                if goes:
                    asking.client.say(GONE)
                    await anyio.lowlevel.checkpoint()
                scope.cancel()

            group.start_soon(end)
            await asking.run(post(browser, page(count)))
        await anyio.lowlevel.checkpoint()  # a cancellation left behind would come here
        assert scope.cancelled_caught or goes
    assert await browser.stored() == {"n": 0}
    assert (await browser.open(page(count))).status == 200


async def test_a_request_that_is_cancelled_with_its_turn(site: Site, browser: Browser) -> None:
    """It lets the lock go, whichever comes first: others would wait for the rest of the lease."""
    for _ in range(5):
        asking, scope = Asking(Client()), anyio.CancelScope()
        with anyio.fail_after(5):
            async with anyio.create_task_group() as group:

                async def ask(scope: anyio.CancelScope = scope, asking: Asking = asking) -> None:
                    with scope:
                        await asking.run(post(browser, page(count)))

                async with held(site.store, browser.session_id):
                    group.start_soon(ask)
                    await asking.client.is_waited_for()
                scope.cancel()
        await anyio.wait_all_tasks_blocked()
        assert site.locks == 0
    assert (await browser.open(page(count))).status == 200


@pytest.mark.parametrize("sizes", [[0], [10, 20], [30_000] * 6, [200_000], [1] * 300], ids=lambda s: len(s))
async def test_all_of_the_body_reaches_the_app(
    way: str, site: Site, browser: Browser, sizes: list[int]
) -> None:
    """What was read ahead, up to a bound, and what comes later. Nothing that would be lost is cancelled."""
    parts = [part(b"x" * size, more=number < len(sizes)) for number, size in enumerate(sizes, 1)]
    asking = Asking(Client(*parts))
    async with anyio.create_task_group() as group:
        async with held(site.store, browser.session_id):
            group.start_soon(asking.run, post(browser, echo))
            with anyio.move_on_after(0.05):  # where the bound is met, nothing more is asked for
                await asking.client.is_waited_for()
        ahead = len(sizes) - len(asking.client.left)
        assert 0 < ahead <= 64
        assert sum(sizes[: ahead - 1]) < incoming.MAX_BODY
    assert asking.answer is not None
    assert asking.answer.body == str(sum(sizes)).encode()
    assert way == "trio" or asking.client.cancelled == 0 or sum(sizes) < incoming.MAX_BODY
    assert await browser.stored() == {"n": 1}


async def test_a_question_that_is_under_way_is_left_to_the_app(site: Site, browser: Browser) -> None:
    """Its message is not lost: the app's own question joins it."""
    asking = Asking(Client())
    async with anyio.create_task_group() as group:
        async with held(site.store, browser.session_id):
            group.start_soon(asking.run, post(browser, echo))
            await asking.client.is_waited_for()
        await anyio.wait_all_tasks_blocked()
        asking.client.say(part(b"late", more=False))
    assert asking.answer is not None
    assert asking.answer.body == b"4"


@pytest.mark.parametrize("where", ["here", "elsewhere"])
@pytest.mark.parametrize("way", ["asyncio"], indirect=True)
async def test_with_redis(redis_url: str, where: str) -> None:
    """The holder is a request of this process, or of another one."""
    process = Process(redis_url, fingerprint=None)
    other = process if where == "here" else Process(redis_url, fingerprint=None)
    data = SessionData(session_id="a" * 32, metadata={"n": 0})
    await process.store.set(data.session_id, data)
    cookie = CookieSigner(KEY).sign(data.session_id)
    asking = Asking(Client())

    async def ask(receive: Receive) -> Answer:
        return await process.serve(page(count), cookie, receive=receive, method="POST")

    async with held(other.store, data.session_id), anyio.create_task_group() as group:
        group.start_soon(asking.run, ask)
        assert (await asking.goes()).status == 503
    assert process.events == ["client_gone"]
    assert (await process.serve(page(count), cookie, method="POST")).status == 200
    for each in {process, other}:
        await each.store.aclose()


@pytest.mark.parametrize("kind", ["memory", "SQLite", "Redis"])
def test_a_waiting_request_is_small(kind: str, redis_url: str, tmp_path: Path) -> None:
    """At most 2 KiB more than one that has its lock and waits for its body, though its client is watched.

    In a process of its own: what an object takes depends on what was made before.
    """
    urls = {"memory": "memory://", "SQLite": f"sqlite:///{tmp_path}/sessions.db", "Redis": redis_url}
    child = [sys.executable, str(Path(__file__).parent / "many_waiters.py"), urls[kind]]
    done = subprocess.run(child, capture_output=True, text=True, timeout=60, check=True)
    assert float(done.stdout) <= most()
