"""`await session.ended()`: what a WebSocket or a stream learns of its session, and what is no end of it."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

import anyio
import pytest
from asgi import CLIENT, FIREFOX, Browser, Site, page, stream

from asgi_sessions import Session, SessionClosedError
from asgi_sessions.asgi import Message, Receive, Scope, Send

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend(way: str) -> str:
    return way


async def _signed_in(site: Site) -> Browser:
    browser = site.browser()
    await browser.open(page(lambda session: session.login("ada")))
    return browser


Act = Callable[[], Coroutine[Any, Any, object]]


class Watch:
    """An action that waits for the end, as a stream or a WebSocket would; `began` and `ended` are set."""

    def __init__(self, before: Callable[[Session], object] = bool) -> None:
        self.began, self.ended = anyio.Event(), anyio.Event()
        self.before = before

    async def __call__(self, session: Session) -> None:
        self.before(session)
        self.began.set()
        await session.ended()
        self.ended.set()


async def _ends(site: Site, request: Act, watch: Watch, *ends: Act) -> None:
    """While `request` waits, each of `ends` happens; it has to learn of the last one and of no other."""
    with anyio.fail_after(20):
        async with anyio.create_task_group() as group:
            group.start_soon(request)
            await watch.began.wait()
            for end in ends:
                await anyio.wait_all_tasks_blocked()
                assert not watch.ended.is_set()
                await end()
            await watch.ended.wait()


async def test_a_stream_learns_of_a_sign_out_elsewhere() -> None:
    """All sessions of the user are ended by somebody else; what it was told then is its own affair."""
    site, watch = Site(), Watch()
    browser = await _signed_in(site)
    await _ends(
        site,
        lambda: browser.open(stream(None, watch)),
        watch,
        lambda: site.store.delete_for_user("ada"),
    )


async def test_another_request_signs_in() -> None:
    """The id that the stream came with is dead from then on: it was replaced by somebody else."""
    site, watch = Site(), Watch()
    browser = await _signed_in(site)
    twin = browser.twin()
    await _ends(
        site,
        lambda: browser.open(stream(None, watch)),
        watch,
        lambda: twin.open(page(lambda session: session.update(n=1))),
        lambda: twin.open(page(lambda session: session.login("ada"))),
    )


async def test_a_long_poll_lets_the_lock_go() -> None:
    """Else the sign-out, which needs it, would wait for the poll. What the poll changed is stored first."""
    site, watch = Site(), Watch(lambda session: session.update(polls=1))
    browser = await _signed_in(site)
    seen = []
    twin = browser.twin()

    async def sign_out() -> None:
        while not await browser.stored():  # noqa: ASYNC110  # a thread stores it, which sets no event
            await anyio.sleep(0.01)
        seen.append(await browser.stored())
        await twin.open(page(lambda session: session.logout()))

    answers = []

    async def poll() -> None:
        answers.append(await browser.open(page(watch)))

    await _ends(site, poll, watch, sign_out)
    assert seen == [{"polls": 1}]
    assert [answer.status for answer in answers] == [200]


async def test_its_own_change_is_no_end() -> None:
    """A transaction of the WebSocket itself changes the session, and the task beside it waits on."""
    site, watch = Site(), Watch()
    browser = await _signed_in(site)
    ids = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        session: Session = scope["session"]
        async with anyio.create_task_group() as group:
            group.start_soon(_wait, session, watch)
            await watch.began.wait()
            await anyio.sleep(0.02)
            async with session.transaction():
                session["n"] = 1
            await anyio.sleep(0.02)
            assert not watch.ended.is_set()
            ids.append(session.session_id)
            await site.store.delete(session.session_id)

    await _socket(site, browser, app)
    assert ids


async def _wait(session: Session, watch: Watch) -> None:
    await watch(session)


async def _socket(site: Site, browser: Browser, app: object) -> None:
    """A WebSocket with the cookie of this browser."""
    headers = [(b"cookie", f"session={browser.cookie}".encode()), (b"user-agent", FIREFOX.encode())]
    scope: Scope = {"type": "websocket", "path": "/", "scheme": "ws", "headers": headers, "client": CLIENT}
    scope.update({"tests.app": app, "asgi": {"version": "3.0"}, "root_path": "", "query_string": b""})

    async def receive() -> Message:
        await anyio.sleep_forever()
        raise AssertionError

    async def send(message: Message) -> None:
        """Nobody reads it."""

    with anyio.fail_after(20):
        await site.middleware(scope, receive, send)


async def test_a_new_id_of_its_own_in_the_same_request() -> None:
    """A request that waits in one task and gives the session a new id in another goes on with that id."""
    site, watch = Site(options={"lock": False}), Watch()
    browser = await _signed_in(site)
    before = browser.session_id

    async def act(session: Session) -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(_wait, session, watch)
            await watch.began.wait()
            await anyio.sleep(0.02)
            session.regenerate_id()
            await session.save()
            await anyio.sleep(0.02)
            assert session.session_id != before
            assert not watch.ended.is_set()
            await site.store.delete(session.session_id)

    with anyio.fail_after(20):
        await browser.open(page(act))
    assert watch.ended.is_set()


@pytest.mark.parametrize("why", ["no cookie", "another client", "ended by itself"])
async def test_nothing_to_wait_for(why: str) -> None:
    """Where there is no stored session it returns at once: what is not there is not to be waited for."""
    site, watch = Site(), Watch()
    browser = await _signed_in(site)
    if why == "no cookie":
        browser.cookie = None
    elif why == "another client":
        browser.user_agent = "another"
    else:
        watch.before = lambda session: session.logout()

    async def act(session: Session) -> None:
        watch.before(session)
        watch.before = bool
        await session.save()
        await watch(session)

    with anyio.fail_after(20):
        await browser.open(page(act))
    assert watch.ended.is_set()


async def test_after_the_request() -> None:
    """A background task that keeps the handle learns of the end, too."""
    site = Site()
    kept: list[Session] = []
    browser = await _signed_in(site)
    await browser.open(page(kept.append))
    watch = Watch()
    await _ends(site, lambda: watch(kept[0]), watch, lambda: site.store.delete_for_user("ada"))


async def test_a_handle_of_no_request() -> None:
    """There is no store to ask."""
    with pytest.raises(SessionClosedError, match="belongs to no request"):
        await Session().ended()


async def test_the_client_hangs_up() -> None:
    """A cancelled stream leaves nobody behind who waits."""
    site, watch = Site(), Watch()
    browser = await _signed_in(site)
    with anyio.fail_after(20):
        async with anyio.create_task_group() as group:
            group.start_soon(browser.open, stream(None, watch))
            await watch.began.wait()
            await anyio.wait_all_tasks_blocked()
            group.cancel_scope.cancel()
    engine = getattr(site.store, "_engine", None)
    assert len(site.store._endings if engine is None else engine.endings) == 0
    assert site.locks == 0
