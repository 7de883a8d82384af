"""`lock="auto"` under attack: a discarded run leaves no trace, and nothing is stored twice or lost."""

from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from asgi import FIREFOX, Answer, Browser, Clock, RecordingStore, Site, chunk, page, run, start, stream

from asgi_sessions import Session, SessionData, SessionMiddleware, SessionStoreError
from asgi_sessions.asgi import Message, Receive, Scope, Send
from asgi_sessions.request import rerun
from asgi_sessions.request.http import HTTPRequest
from asgi_sessions.request.incoming import Incoming

pytestmark = pytest.mark.anyio


class PausedStore(RecordingStore):
    """Does something once, before or after the next call of a name; what it raises then is the call's."""

    def __init__(self, log: list[str], clock: Clock) -> None:
        super().__init__(log, clock)
        self.before_next: dict[str, Callable[[], Awaitable[object]]] = {}
        self.after_next: dict[str, Callable[[], Awaitable[object]]] = {}

    async def before(self, call: str) -> None:
        await super().before(call)
        if act := self.before_next.pop(call, None):
            await act()

    async def after(self, call: str) -> None:
        if act := self.after_next.pop(call, None):
            await act()


@pytest.fixture
def anyio_backend(way: str) -> str:
    """Each kind of store that needs no server."""
    return way


@pytest.fixture
def site(model: type[SessionData]) -> Site:
    return Site({"lock": "auto", "model": model}, PausedStore)


@pytest.fixture
def browser(site: Site) -> Browser:
    return site.browser()


@pytest.fixture
def store(site: Site) -> PausedStore:
    assert isinstance(site.store, PausedStore)
    return site.store


def count(session: Session) -> None:
    session["n"] = session.get("n", 0) + 1


def count_both(session: Session, other: Session) -> None:
    count(session)
    count(other)


async def post(browser: Browser, act: Callable[[Session], object] = count) -> Answer:
    """Another request of this session, which takes the lock."""
    return await browser.twin().open(page(act), method="POST")


def cookie_of(browser: Browser) -> list[tuple[bytes, bytes]]:
    return [(b"user-agent", FIREFOX.encode()), (b"cookie", f"session={browser.cookie}".encode())]


# -- a discarded run leaves no trace ---------------------------------------------------------------------


async def test_no_task_of_a_discarded_run_starts_an_answer(browser: Browser, store: PausedStore) -> None:
    """Not one that waited for the `save` that discarded the run, and has nothing to store any more."""
    await browser.begin(n=0)
    runs: list[int] = []
    made: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        session = scope["session"]
        runs.append(1)
        count(session)
        if len(runs) == 1:
            await post(browser)
            async with anyio.create_task_group() as group:
                asked, go_on = anyio.Event(), anyio.Event()
                store.before_next["commit unlocked"] = lambda: wait_here(asked, go_on)
                group.start_soon(session.save)
                await asked.wait()
                session["n"] = 0
                group.start_soon(answer, send, made)
                await anyio.wait_all_tasks_blocked()
                go_on.set()
        await send(start(201))
        await send(chunk(b"second"))

    seen = await browser.open(app)
    assert (seen.status, seen.body, made) == (201, b"second", ["Discarded"])
    assert await browser.stored() == {"n": 2}


async def wait_here(asked: anyio.Event, go_on: anyio.Event) -> None:
    asked.set()
    await go_on.wait()


async def answer(send: Send, made: list[str]) -> None:
    try:
        await send(start(200))
        await send(chunk(b"first"))
    except BaseException as error:
        made.append(type(error).__name__)
        raise


variable: ContextVar[str] = ContextVar("variable")


async def test_context_variables_of_a_discarded_run_do_not_stay(browser: Browser) -> None:
    """Those around the middleware see what they had before where the second run set none."""
    await browser.begin(n=0)
    runs: list[int] = []

    async def use(session: Session) -> None:
        runs.append(1)
        if len(runs) == 1:
            variable.set("of the first run")
            await post(browser)
        count(session)

    variable.set("before")
    assert (await browser.open(page(use))).status == 200
    assert (len(runs), variable.get()) == (2, "before")


async def test_a_request_that_is_run_twice_counts_once(browser: Browser, site: Site) -> None:
    """In the store's metrics."""
    await browser.begin(n=0)
    before = site.store._responses
    await browser.open(page(once(lambda: post(browser), count)))
    assert site.store._responses == before + 2  # the other one, and this one


def once(act: Callable[[], Awaitable[object]], then: Callable[[Session], object] = count) -> Any:
    """What an app does: `act` in its first run, and `then` in each."""
    runs: list[None] = []

    async def use(session: Session) -> None:
        runs.append(None)
        if len(runs) == 1:
            await act()
        await run(then, session)

    return use


async def test_what_requests_share_in_their_scopes_is_left_alone(browser: Browser) -> None:
    """A dict that others change meanwhile is not set back; what belongs to the request is."""
    await browser.begin(n=0)
    shared: dict[str, int] = {}
    seen: list[tuple[int, int]] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append((len(scope["state"]), len(scope["extensions"])))
        scope["state"]["mine"] = scope["extensions"]["mine"] = {}
        if len(seen) == 1:
            await browser.twin().open(page(lambda _: shared.update(theirs=1)), method="POST", shared=shared)
            await post(browser)
        await page(count)(scope, receive, send)

    await browser.open(app, shared=shared, state={}, extensions={})
    assert shared == {"theirs": 1}
    assert seen == [(0, 0)] * 2


# -- nothing is stored twice -----------------------------------------------------------------------------


@pytest.mark.parametrize("then", ["write", "transaction", "login"])
async def test_what_may_be_stored_is_not_done_again(browser: Browser, store: PausedStore, then: str) -> None:
    """The reply to a `save` was lost, the app went on, and another request came next: it counts once."""
    await browser.begin(n=0)
    runs: list[int] = []

    async def use(session: Session) -> None:
        runs.append(1)
        count(session)
        store.after_next["commit unlocked"] = fail
        with pytest.raises(SessionStoreError):
            await session.save()
        await post(browser)
        if then == "write":
            session["m"] = 1
        elif then == "login":
            session.login("ada")
        else:
            session["m"] = 1
            async with session.transaction():
                session["m"] = 2

    assert (await browser.open(page(use))).status in (409, 503)
    assert runs == [1]
    assert await browser.stored() == {"n": 2}
    assert browser.site.locks == 0


@pytest.mark.parametrize("nested", [False, True])
async def test_a_sign_in_while_a_change_waits_for_the_lock_gets_a_new_id(
    site: Site, browser: Browser, store: PausedStore, nested: bool
) -> None:
    """Another task signs somebody in by a value while a `save` waits for a holder: fixation."""
    old = await browser.begin(n=0, user={})
    held, go_on = anyio.Event(), anyio.Event()

    async def use(session: Session) -> None:
        count(session)
        await session.save()  # from here on the app cannot be run again
        group.start_soon(lambda: browser.twin().open(page(lambda _: wait_here(held, go_on)), method="POST"))
        await held.wait()
        count(session)

        async def sign_in() -> None:
            if nested:
                session["user"]["id"] = "ada"
            else:
                session["user"] = {"id": "ada"}
            go_on.set()

        store.before_next["checkout+lock"] = sign_in
        await session.save()

    async with anyio.create_task_group() as group:
        assert (await browser.open(page(use))).status == 200
    assert browser.session_id != old
    assert await site.store.get(old) is None
    assert await browser.stored() == {"n": 2, "user": {"id": "ada"}}
    assert site.locks == 0


async def fail() -> None:
    raise SessionStoreError("the reply was lost")


async def test_an_end_wins_where_the_app_cannot_run_again(browser: Browser, site: Site) -> None:
    """A logout after a `save`, and after a change by another request: the session has ended, as it says."""
    session_id = await browser.begin(n=0)

    async def use(session: Session) -> None:
        count(session)
        await session.save()
        await post(browser)
        session.logout()

    assert (await browser.open(page(use))).status == 200
    assert browser.cookie is None
    assert await site.store.get(session_id) is None
    assert site.locks == 0


async def test_a_cancelled_look_under_the_lock_leaves_none(
    browser: Browser, site: Site, store: PausedStore
) -> None:
    """A transaction over changes finds another version, and is cancelled while it lets the lock go."""
    await browser.begin(n=0)
    with anyio.CancelScope() as around:

        async def cancel() -> None:
            around.cancel()
            await anyio.lowlevel.checkpoint()

        async def use(session: Session) -> None:
            count(session)
            await post(browser)
            store.before_next["release"] = cancel
            async with session.transaction():
                count(session)

        await browser.open(page(use))
    assert around.cancelled_caught
    assert site.locks == 0
    assert (await post(browser)).status == 200
    assert await browser.stored() == {"n": 2}


# -- bad input ---------------------------------------------------------------------------------------------


async def test_a_body_that_comes_slowly_keeps_nobody_waiting(site: Site, browser: Browser) -> None:
    """A GET whose body takes its time, while others change the session. It is run again with its body."""
    await browser.begin(n=0)
    send_in, messages_in = anyio.create_memory_object_stream[Message](1)
    bodies: list[bytes] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        count(scope["session"])
        body, more = b"", True
        while more:
            message = await receive()
            body += message["body"]
            more = message["more_body"]
        bodies.append(body)
        await page()(scope, receive, send)

    async def slowly() -> None:
        for number in range(60):
            await send_in.send({"type": "http.request", "body": b"%02d" % number, "more_body": number < 59})
            if number % 10 == 0:
                assert (await post(browser)).status == 200

    async with anyio.create_task_group() as group:
        group.start_soon(slowly)
        answer = await site.request(app, headers=cookie_of(browser), receive=messages_in.receive)
        assert answer.status == 200
    assert bodies == [b"".join([b"%02d" % number for number in range(60)])] * 2
    assert await browser.stored() == {"n": 7}
    send_in.close()
    messages_in.close()


@pytest.mark.parametrize("size", [0, 1], ids=["empty", "one byte"])
async def test_a_body_of_endless_little_parts_is_not_kept(size: int) -> None:
    """HTTP/2 knows parts without a byte. What is kept is bounded by their number too."""
    count_of = 0

    async def receive() -> Message:
        nonlocal count_of
        count_of += 1
        return {"type": "http.request", "body": b"x" * size, "more_body": True}

    incoming = Incoming(receive)
    read = incoming.reader()
    for _ in range(20_000):
        await read()
    assert count_of == 20_000
    assert not incoming.is_whole
    assert len(incoming._kept) < 2000


@pytest.mark.parametrize("kind", ["awaits it", "waits for it to be sent", "forgets it"])
async def test_an_app_that_sends_from_a_task_of_its_own(
    browser: Browser, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Its first run ends whether it notices or not; the client gets one whole answer."""
    monkeypatch.setattr(rerun, "GRACE", 0.1)
    await browser.begin(n=0)
    use = once(lambda: post(browser))

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await run(use, scope["session"])
        sent = anyio.Event()

        async def answer() -> None:
            await send(start())
            await send(chunk(b"ok"))
            sent.set()

        async with anyio.create_task_group() as group:
            if kind == "awaits it":
                group.start_soon(answer)
            else:
                group.start_soon(swallowing, answer)
                await (sent.wait() if kind == "waits for it to be sent" else anyio.lowlevel.checkpoint())

    with anyio.fail_after(10):
        got = await browser.open(app)
    assert (got.status, got.body) == (200, b"ok")
    assert [message["type"] for message in got.messages] == ["http.response.start", "http.response.body"]
    assert await browser.stored() == {"n": 2}


async def swallowing(act: Callable[[], Awaitable[None]]) -> None:
    try:
        await act()
    except anyio.get_cancelled_exc_class():
        raise
    except BaseException:
        return


async def test_a_task_that_outlives_its_discarded_run(browser: Browser) -> None:
    """What it sends and reads is nobody's: the answer of the second run is whole, and its body complete."""
    await browser.begin(n=0)
    use = once(lambda: post(browser))
    go_on, over = anyio.Event(), anyio.Event()
    outcomes: list[str] = []

    async def straggle(receive: Receive, send: Send) -> None:
        await go_on.wait()
        for call in (lambda: send(start(500)), lambda: send(chunk(b"stray")), receive):
            try:
                await call()
                outcomes.append("nothing")
            except BaseException as error:
                outcomes.append(type(error).__name__)
        over.set()

    async with anyio.create_task_group() as group:

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            session = scope["session"]
            if session["n"] == 0:
                group.start_soon(straggle, receive, send)
            await run(use, session)
            await send(start())
            go_on.set()
            await over.wait()
            assert (await receive())["type"] == "http.request"
            await send(chunk(b"ok"))

        answer = await browser.open(app)
        assert (answer.status, answer.body) == (200, b"ok")
        assert len(answer.messages) == 2
    assert outcomes[2] == "Discarded"


async def test_a_client_that_leaves_between_the_runs(site: Site, browser: Browser) -> None:
    """The second run waits for a holder no longer than its client; nothing of it is stored."""
    await browser.begin(n=0)
    held, go_on, gone, answered = anyio.Event(), anyio.Event(), anyio.Event(), anyio.Event()

    async def hold(session: Session) -> None:
        count(session)
        held.set()
        await go_on.wait()

    async def receive() -> Message:
        if not gone.is_set():
            await gone.wait()
        return {"type": "http.disconnect"}

    async with anyio.create_task_group() as group:
        group.start_soon(lambda: browser.twin().open(page(hold), method="POST"))
        await held.wait()
        site.log.clear()
        answers: list[Answer] = []

        async def get() -> None:
            answers.append(await site.request(page(count), headers=cookie_of(browser), receive=receive))
            answered.set()

        group.start_soon(get)
        while "checkout+lock" not in site.log:
            await anyio.lowlevel.checkpoint()
        gone.set()
        with anyio.fail_after(5):
            await answered.wait()
        assert answers[0].status == 503
        assert site.log.count("app") == 1
        go_on.set()
    assert await browser.stored() == {"n": 1}
    assert site.locks == 0


async def test_a_conflict_in_each_of_twenty_requests_in_a_row(browser: Browser) -> None:
    """Each is run twice, never more, and each change is there."""
    await browser.begin(n=0)
    runs: list[int] = []
    for number in range(20):

        async def use(session: Session) -> None:
            runs.append(number)  # noqa: B023  # called in this turn
            if runs.count(number) == 1:  # noqa: B023
                await post(browser)
            count(session)

        assert (await browser.open(page(use))).status == 200
    assert runs == [number for number in range(20) for _ in range(2)]
    assert await browser.stored() == {"n": 40}
    assert browser.site.locks == 0


@pytest.mark.parametrize("form", [page, stream])
async def test_a_first_run_that_fails_by_itself_is_not_run_again(browser: Browser, form: Any) -> None:
    """Its error is its own, whatever happened to the session meanwhile."""
    await browser.begin(n=0)
    runs: list[int] = []

    async def use(session: Session) -> None:
        runs.append(1)
        count(session)
        await post(browser)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await browser.open(form(use))
    assert (runs, await browser.stored()) == ([1], {"n": 1})


async def test_an_error_page_of_the_first_run_is_sent(browser: Browser) -> None:
    """It stores nothing, so nothing can be refused."""
    await browser.begin(n=0)
    assert (await browser.open(page(once(lambda: post(browser)), status=500))).status == 500
    assert await browser.stored() == {"n": 1}


@pytest.mark.parametrize("status", [404, 500])
async def test_a_second_run_may_answer_otherwise(browser: Browser, status: int) -> None:
    """The client gets the second run's page: a 404 stores its change, a 500 does not."""
    await browser.begin(n=0)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        first = scope["session"]["n"] == 0
        await run(use, scope["session"])
        await send(start(200 if first else status))
        await send(chunk(b"page"))

    use = once(lambda: post(browser))
    assert (await browser.open(app)).status == status
    assert await browser.stored() == {"n": 2 if status == 404 else 1}


async def test_an_app_that_catches_the_end_at_save_and_writes_on(browser: Browser) -> None:
    """Everything that it tries in its discarded run is refused."""
    await browser.begin(n=0)
    tried: list[str] = []

    async def use(session: Session) -> None:
        count(session)
        if session["n"] == 1:
            await post(browser)
            for act in (Session.save, count, Session.save, Session.release):
                try:
                    await run(act, session)
                except BaseException as error:
                    tried.append(type(error).__name__)

    assert (await browser.open(page(use))).status == 200
    assert tried == ["Discarded", "SessionClosedError", "Discarded", "Discarded"]
    assert await browser.stored() == {"n": 2}


# -- nothing is left ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["it waits for the lock", "its app runs"])
async def test_a_second_run_that_is_cancelled_leaves_no_lock(
    site: Site, browser: Browser, store: PausedStore, when: str
) -> None:
    """As a time limit around the middleware does it; nothing of it is stored."""
    await browser.begin(n=0)
    runs: list[int] = []
    with anyio.CancelScope() as around:

        async def stop() -> None:
            around.cancel()
            await anyio.lowlevel.checkpoint()

        async def use(session: Session) -> None:
            runs.append(1)
            count(session)
            if len(runs) == 1:
                await post(browser)
                if when == "it waits for the lock":
                    store.before_next["checkout+lock"] = stop
            else:
                await stop()

        await browser.open(page(use))
    assert around.cancelled_caught
    assert len(runs) == (1 if when == "it waits for the lock" else 2)
    assert site.locks == 0
    assert (await post(browser)).status == 200
    assert await browser.stored() == {"n": 2}


async def test_nothing_of_many_reruns_stays(browser: Browser, way: str) -> None:
    """Neither a task nor an object of a request, without a garbage collection."""
    await browser.begin(n=0)
    await browser.open(page(once(lambda: post(browser))))
    gc.collect()
    kinds = HTTPRequest | rerun.Rerun | Incoming
    before = {id(each) for each in gc.get_objects() if isinstance(each, kinds)}  # of other tests
    gc.disable()
    try:
        for _ in range(20):
            await browser.open(page(once(lambda: post(browser))))
        await anyio.lowlevel.checkpoint()
        left = [each for each in gc.get_objects() if isinstance(each, kinds) and id(each) not in before]
        assert left == []
    finally:
        gc.enable()
    if way == "asyncio":
        assert len(asyncio.all_tasks()) <= 2  # of the test, and of its fixtures


async def test_no_log_tells_a_secret(
    browser: Browser, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """At any level: of a discarded run that hangs, and of a route that is often run twice."""
    monkeypatch.setattr(rerun, "GRACE", 0.01)
    caplog.set_level(logging.DEBUG)
    session_id = await browser.begin(n=0, card="4000-1234")
    use = once(lambda: post(browser))

    async def hang(scope: Scope, receive: Receive, send: Send) -> None:
        await run(use, scope["session"])
        try:
            await send(start())
        except rerun.Discarded:
            await anyio.sleep(10)
        await send(chunk(b"ok"))

    assert (await browser.open(hang)).status == 200
    for _ in range(12):
        await browser.open(page(once(lambda: post(browser))))
    assert browser.site.events.count("run_twice") == 1
    assert "did not end" in caplog.text
    assert browser.cookie is not None
    for secret in (session_id, browser.cookie, "4000-1234", FIREFOX):
        assert secret not in caplog.text


# -- two middlewares ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("conflict", ["outer", "inner", "both"])
async def test_two_middlewares_never_take_one_anothers_end(
    site: Site, browser: Browser, store: PausedStore, conflict: str
) -> None:
    """Each runs again what is inside it; the answer is whole, and both cookies lead to their sessions."""
    key = "k" * 40
    inner_site = Site({"lock": "auto", "session_cookie": "inner", "secret_key": key})
    inner_cookie = ""
    handles: dict[str, Session] = {}

    async def innermost(scope: Scope, receive: Receive, send: Send) -> None:
        handles["inner"] = scope["session"]
        await run(use, handles["outer"])
        await page()(scope, receive, send)

    async def between(scope: Scope, receive: Receive, send: Send) -> None:
        handles["outer"] = scope["session"]
        await inner(scope, receive, send)

    inner = SessionMiddleware(innermost, key, session_cookie="inner", store=inner_site.store, lock="auto")
    use: Any = lambda outer: count_both(outer, handles["inner"])  # noqa: E731

    async def open_both(method: str) -> Answer:
        headers = [(b"cookie", inner_cookie.encode())] if inner_cookie else []
        return await browser.open(between, headers=headers, method=method)

    first = await open_both("GET")
    inner_cookie = next(line.partition(";")[0] for line in first.cookies if line.startswith("inner="))
    inner_id = inner_cookie.partition("=")[2].partition(".")[0]
    runs: list[int] = []

    async def interrupted(outer: Session) -> None:
        runs.append(1)
        if len(runs) == 1:
            if conflict != "inner":
                await post(browser)
            if conflict != "outer":
                headers = [(b"user-agent", FIREFOX.encode()), (b"cookie", inner_cookie.encode())]
                await inner_site.request(page(count), headers=headers, method="POST")
        count_both(outer, handles["inner"])

    use = interrupted
    got = await open_both("GET")
    assert (got.status, got.body) == (200, b"ok")
    outer_data, inner_data = await store.get(browser.session_id), await inner_site.store.get(inner_id)
    assert outer_data is not None
    assert inner_data is not None
    assert outer_data.metadata["n"] == {"outer": 3, "inner": 3, "both": 3}[conflict]
    assert inner_data.metadata["n"] == {"outer": 3, "inner": 3, "both": 4}[conflict]
    assert (site.locks, inner_site.locks) == (0, 0)
