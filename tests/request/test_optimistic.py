"""`lock="auto"`: safe requests run without the lock, and once more under it where a change came first."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from typing import Any

import anyio
import pytest
from asgi import Browser, Site, chunk, messages, page, run, start, stream

from asgi_sessions import ReadOnlySessionError, Session, SessionClosedError, SessionData
from asgi_sessions.asgi import Message, Receive, Scope, Send
from asgi_sessions.request import rerun

pytestmark = pytest.mark.anyio

TAKE, LOCK, COMMIT = "checkout", "checkout+lock", "commit unlocked"
AGAIN = [LOCK, "app", "commit+release", "start 200", "body"]
RUNS_AGAIN = [TAKE, "app", COMMIT, *AGAIN]


@pytest.fixture
def anyio_backend(way: str) -> str:
    """Each kind of store that needs no server."""
    return way


@pytest.fixture
def site(model: type[SessionData]) -> Site:
    return Site({"lock": "auto", "model": model})


@pytest.fixture
def browser(site: Site) -> Browser:
    return site.browser()


def count(session: Session) -> None:
    session["n"] = session.get("n", 0) + 1


def first_time(act: Callable[[], Awaitable[object]], then: Callable[[Session], object]) -> Any:
    """What an app does: `act` in its first run, then `then`, in the second run `then` alone."""
    runs: list[None] = []

    async def use(session: Session) -> None:
        runs.append(None)
        if len(runs) == 1:
            await act()
        await run(then, session)

    return use


def interrupted(browser: Browser, then: Callable[[Session], object] = count, **options: Any) -> Any:
    """An app during whose first run another request counts to 10 more."""

    async def other() -> None:
        await browser.twin().open(page(lambda session: session.update(n=session["n"] + 10)), method="POST")
        browser.site.log.clear()
        browser.site.log += [TAKE, "app"]

    return first_time(other, then)


# -- what is asked of the store --------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS", "TRACE", "QUERY"])
async def test_a_safe_request_takes_no_lock(browser: Browser, method: str) -> None:
    """One call for a read, two for a write that nobody comes before."""
    await browser.begin(n=0)
    assert (await browser.open(page(lambda session: session.get("n")), method=method)).status == 200
    assert browser.site.log == [TAKE, "app", "start 200", "body"]
    browser.site.log.clear()
    await browser.open(page(count), method=method)
    assert browser.site.log == [TAKE, "app", COMMIT, "start 200", "body"]
    assert await browser.stored() == {"n": 1}


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "FROB"])
async def test_any_other_method_takes_the_lock(browser: Browser, method: str) -> None:
    await browser.begin(n=0)
    await browser.open(page(count), method=method)
    assert browser.site.log == [LOCK, "app", "commit+release", "start 200", "body"]


async def test_a_request_with_much_of_a_body_takes_the_lock(browser: Browser) -> None:
    """It could not be run again."""
    await browser.begin(n=0)
    for length, calls in ((b"65536", TAKE), (b"65537", LOCK), (b"9999999", LOCK), (b"x", LOCK)):
        browser.site.log.clear()
        await browser.open(page(), headers=[(b"content-length", length)])
        assert browser.site.log[0] == calls


async def test_a_request_without_a_session_is_as_ever(browser: Browser) -> None:
    await browser.open(page(count))
    assert browser.site.log == ["app", "create", "start 200", "body"]
    assert await browser.stored() == {"n": 1}


async def test_the_app_is_run_again_where_a_change_came_first(browser: Browser) -> None:
    """With the other's change in its session; the client sees one answer."""
    await browser.begin(n=0)
    answer = await browser.open(page(interrupted(browser)))
    assert (answer.status, answer.body) == (200, b"ok")
    assert browser.site.log == RUNS_AGAIN
    assert await browser.stored() == {"n": 11}
    assert browser.site.locks == 0


async def test_no_commit_disturbs_a_holder(site: Site, browser: Browser) -> None:
    """A safe request that changed something waits for a holder and runs again after it."""
    await browser.begin(n=0)
    held, go_on = anyio.Event(), anyio.Event()

    async def hold(session: Session) -> None:
        held.set()
        await go_on.wait()
        session["n"] += 10

    async with anyio.create_task_group() as group:
        group.start_soon(lambda: browser.twin().open(page(hold), method="POST"))
        await held.wait()
        assert (await browser.open(page(lambda session: session["n"]))).status == 200  # waits for nobody
        site.log.clear()
        group.start_soon(lambda: browser.twin().open(page(count)))
        await anyio.wait_all_tasks_blocked()
        assert site.log == [TAKE, "app", COMMIT, LOCK]
        go_on.set()
    assert await browser.stored() == {"n": 11}


async def test_two_hundred_changes_by_mixed_methods(browser: Browser) -> None:
    """Each of them counts once."""
    await browser.begin(n=0)
    seen: list[int] = []

    async def slowly(session: Session) -> None:
        before = session["n"]
        await anyio.lowlevel.checkpoint()
        session["n"] = before + 1

    async def visit(method: str) -> None:
        for _ in range(25):
            twin = browser.twin()

            async def app(scope: Scope, receive: Receive, send: Send) -> None:
                await slowly(scope["session"])
                number = str(scope["session"]["n"]).encode()
                await messages(start(), chunk(number))(scope, receive, send)

            answer = await twin.open(app, method=method)
            assert answer.status == 200
            seen.append(int(answer.body))

    async with anyio.create_task_group() as group:
        for method in ("GET", "POST") * 4:
            group.start_soon(visit, method)
    assert sorted(seen) == list(range(1, 201))
    assert await browser.stored() == {"n": 200}


async def test_a_route_that_often_runs_twice_is_named(
    site: Site, browser: Browser, caplog: pytest.LogCaptureFixture
) -> None:
    """One line a minute in the log, with the remedy."""
    await browser.begin(n=0)
    for _ in range(25):
        await browser.open(page(interrupted(browser)), path="/busy")
    assert site.events == ["run_twice"]
    [line] = [line for line in caplog.messages if line.startswith("run_twice")]
    assert "route='GET /busy' times=10" in line
    assert "session.transaction()" in line


# -- a new id, an end -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("act", "calls"),
    [
        (lambda session: session.login("ada"), "move"),
        (lambda session: session.logout(), "discard"),
        (lambda session: session.clear(), "discard"),
    ],
    ids=["login", "logout", "clear"],
)
async def test_a_new_id_or_an_end_takes_the_lock_first(browser: Browser, act: Any, calls: str) -> None:
    """The app is not run again where nothing has changed: a callback of OpenID Connect works once only."""
    await browser.begin(n=0)
    assert (await browser.open(page(act))).status == 200
    assert browser.site.log == [TAKE, "app", LOCK, calls, "start 200", "body"]
    assert browser.site.locks == 0


@pytest.mark.parametrize("act", [lambda s: s.login("ada"), Session.logout], ids=["login", "logout"])
async def test_a_new_id_or_an_end_after_a_change_runs_the_app_again(browser: Browser, act: Any) -> None:
    old = await browser.begin(n=0)
    assert (await browser.open(page(interrupted(browser, act)))).status == 200
    assert browser.site.log[:5] == [TAKE, "app", LOCK, "release", LOCK]
    assert await browser.site.store.get(old) is None


async def test_a_session_that_ended_meanwhile_begins_anew(browser: Browser) -> None:
    """As for a request that waited for the lock of the one that ended it."""
    old = await browser.begin(n=5)

    async def end() -> None:
        await browser.twin().open(page(Session.logout), method="POST")

    assert (await browser.open(page(first_time(end, count)))).status == 200
    assert browser.session_id != old
    assert await browser.stored() == {"n": 1}


async def test_a_change_of_a_session_that_got_a_new_id_is_refused(browser: Browser) -> None:
    """As with a lock: the client has, or will get, the cookie of the new one."""
    await browser.begin(n=5)

    async def renew() -> None:
        await browser.twin().open(page(Session.regenerate_id), method="POST")

    assert (await browser.open(page(first_time(renew, count)))).status == 409


# -- save, release, transaction -----------------------------------------------------------------------------


async def test_a_save_that_comes_second_runs_the_app_again(browser: Browser) -> None:
    await browser.begin(n=0)

    async def save(session: Session) -> None:
        count(session)
        await session.save()

    await browser.open(page(interrupted(browser, save)))
    assert await browser.stored() == {"n": 11}


async def test_what_was_saved_is_not_done_again(site: Site, browser: Browser) -> None:
    """After a `save` that was stored a conflict is answered 409."""
    await browser.begin(n=0)
    runs: list[int] = []

    async def use(session: Session) -> None:
        runs.append(1)
        count(session)
        await session.save()
        await browser.twin().open(page(count), method="POST")
        session["m"] = 1

    assert (await browser.open(page(use))).status == 409
    assert runs == [1]
    assert await browser.stored() == {"n": 2}


async def test_a_transaction_takes_the_lock(browser: Browser) -> None:
    """And sees what others stored since; nothing runs twice."""
    await browser.begin(n=0)
    ran: list[int] = []

    async def transact(session: Session) -> None:
        ran.append(1)
        async with session.transaction() as data:
            data.metadata["n"] += 1
        session["after"] = 1

    await browser.open(page(interrupted(browser, transact)))
    assert browser.site.log == [TAKE, "app", LOCK, "commit+release", COMMIT, "start 200", "body"]
    assert ran == [1]
    assert await browser.stored() == {"n": 11, "after": 1}
    assert browser.site.locks == 0


@pytest.mark.parametrize("interrupt", [False, True], ids=["alone", "interrupted"])
async def test_a_transaction_over_changes(browser: Browser, interrupt: bool) -> None:
    """They are stored with it if the session is as it was loaded; else the app is run again."""
    await browser.begin(n=0)

    async def transact(session: Session) -> None:
        session["before"] = session["n"]
        async with session.transaction() as data:
            data.metadata["n"] += 1

    await browser.open(page(interrupted(browser, transact) if interrupt else transact))
    assert await browser.stored() == ({"n": 11, "before": 10} if interrupt else {"n": 1, "before": 0})
    assert browser.site.locks == 0


async def test_a_transaction_that_fails_leaves_the_request_its_changes(browser: Browser) -> None:
    await browser.begin(n=0)

    async def transact(session: Session) -> None:
        session["before"] = 1
        with pytest.raises(ZeroDivisionError):
            async with session.transaction() as data:
                data.metadata["n"] = 1 / 0
        assert session == {"n": 0, "before": 1}

    assert (await browser.open(page(transact))).status == 200
    assert await browser.stored() == {"n": 0, "before": 1}


async def test_a_logout_within_a_transaction(browser: Browser) -> None:
    """What is put in afterwards begins a new session."""
    old = await browser.begin(n=0)

    async def transact(session: Session) -> None:
        async with session.transaction():
            session.logout()
        session["new"] = 1

    assert (await browser.open(page(transact))).status == 200
    assert await browser.site.store.get(old) is None
    assert await browser.stored() == {"new": 1}


async def test_a_transaction_of_a_session_that_has_ended_runs_the_app_again(browser: Browser) -> None:
    await browser.begin(n=0)

    async def end() -> None:
        await browser.site.store.delete(browser.session_id)

    async def transact(session: Session) -> None:
        async with session.transaction() as data:
            data.metadata["n"] = 1

    assert (await browser.open(page(first_time(end, transact)))).status == 200
    assert await browser.stored() == {"n": 1}


async def test_the_store_within_a_request(browser: Browser) -> None:
    """`store.update` of the own session takes its turn too."""
    session_id = await browser.begin(n=0)

    async def use(session: Session) -> None:
        assert await browser.site.store.increment_counter(session_id, "n") == 11
        assert session["n"] == 11

    await browser.open(page(interrupted(browser, use)))
    assert await browser.stored() == {"n": 11}


# -- streams --------------------------------------------------------------------------------------------


async def test_a_stream_commits_at_its_start(browser: Browser) -> None:
    """And is run again where it came second; later changes are refused."""
    await browser.begin(n=0)
    await browser.open(stream(interrupted(browser), None))
    assert browser.site.log == [
        TAKE,
        "app",
        COMMIT,
        LOCK,
        "app",
        "commit+release",
        "start 200",
        "more",
        "body",
    ]
    assert await browser.stored() == {"n": 11}
    with pytest.raises(SessionClosedError, match="transaction"):
        await browser.open(stream(count, count))
    assert await browser.stored() == {"n": 12}


@pytest.mark.parametrize("lock", [True, "auto"])
async def test_a_stream_that_only_reads_keeps_nobody_waiting(site: Site, browser: Browser, lock: Any) -> None:
    await browser.begin(n=0)
    twin = site.option(lock=lock).browser()
    twin.cookie = browser.cookie

    async def meanwhile(session: Session) -> None:
        with anyio.fail_after(2):
            assert (await browser.twin().open(page(count), method="POST")).status == 200

    await twin.open(stream(lambda session: session["n"], meanwhile))
    assert await browser.stored() == {"n": 1}


@pytest.mark.parametrize(
    "options", [{"lock": True}, {"lock": "auto"}, {"lock": False}, {"read_only": "*"}], ids=repr
)
@pytest.mark.parametrize("form", ["stream", "page"])
async def test_a_late_change_within_a_value_is_never_lost_in_silence(
    site: Site, browser: Browser, options: dict[str, Any], form: str
) -> None:
    """It cannot raise where it is made, so the answer's last message does; or it is stored."""
    await browser.begin(n=0, page={"clicks": 0})
    twin = site.option(**options).browser()
    twin.cookie = browser.cookie
    sent: list[Message] = []

    async def note(message: Message) -> None:
        sent.append(message)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        session = scope["session"]
        assert session["page"]["clicks"] == 0
        await send(start(headers=[(b"content-length", b"4")] if form == "page" else []))
        if form == "stream":
            await send(chunk(b"part", more=True))
        session["page"]["clicks"] = 1
        await send(chunk(b"last"))

    twin.site.deliver = note
    with contextlib.suppress(SessionClosedError, ReadOnlySessionError):
        await twin.open(app)
    stored = await browser.stored()
    assert stored is not None
    assert (chunk(b"last") in sent) is (stored["page"]["clicks"] == 1)
    assert site.locks == 0


async def test_a_page_after_a_roll_back_has_no_late_change(browser: Browser) -> None:
    """What a failed request changed is given up with intent: its page goes out whole."""
    await browser.begin(page={"clicks": 0})
    answer = await browser.open(stream(lambda session: session["page"].update(clicks=1), None, status=500))
    assert (answer.status, answer.messages[-1]) == (500, chunk())
    assert await browser.stored() == {"page": {"clicks": 0}}


# -- how the first run ends ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["Exception", "BaseException", "from a group", "returns"])
async def test_how_the_app_takes_the_end_of_its_first_run(browser: Browser, kind: str) -> None:
    """It does not matter whether it swallows it, or turns it into another error."""
    await browser.begin(n=0)
    use = interrupted(browser)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await run(use, scope["session"])
        if kind == "from a group":
            async with anyio.create_task_group() as group:
                group.start_soon(send_one, send, start())
            await send(chunk(b"ok"))
            return
        try:
            await send(start())
        except BaseException:
            if kind == "returns":
                return
            raise ValueError("what the app makes of it") if kind == "Exception" else KeyError from None
        await send(chunk(b"ok"))

    answer = await browser.open(app)
    assert (answer.status, answer.body) == (200, b"ok")
    assert await browser.stored() == {"n": 11}


async def test_an_app_that_goes_on_sending_is_not_heard(browser: Browser) -> None:
    await browser.begin(n=0)
    use = interrupted(browser)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await run(use, scope["session"])
        for message in (start(), chunk(b"a", more=True), chunk(b"b")):
            try:
                await send(message)
            except BaseException:
                continue

    answer = await browser.open(app)
    assert [message["type"] for message in answer.messages] == ["http.response.start"] + [
        "http.response.body"
    ] * 2
    assert answer.body == b"ab"


async def test_an_app_that_hangs_in_its_first_run_is_cancelled(
    browser: Browser, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It has a while to end by itself; a line in the log names the route."""
    monkeypatch.setattr(rerun, "GRACE", 0.05)
    await browser.begin(n=0)
    use = interrupted(browser)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await run(use, scope["session"])
        try:
            await send(start())
        except BaseException:
            await anyio.sleep(60)
        await send(chunk(b"ok"))

    with anyio.fail_after(5):
        answer = await browser.open(app, path="/slow")
    assert answer.status == 200
    assert await browser.stored() == {"n": 11}
    assert "GET /slow: the app did not end" in caplog.text


async def test_a_request_that_is_cancelled_is_not_run_again(browser: Browser) -> None:
    await browser.begin(n=0)
    use = interrupted(browser)
    ran: list[int] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        ran.append(1)
        await run(use, scope["session"])
        try:
            await send(start())
        except BaseException:
            scope["tests.cancel"].cancel()
            await anyio.sleep(60)

    with anyio.CancelScope() as around:
        await browser.open(app, **{"tests.cancel": around})
    assert around.cancelled_caught
    assert ran == [1]
    assert browser.site.locks == 0


async def test_an_error_of_the_second_run_rises(browser: Browser) -> None:
    await browser.begin(n=0)
    runs: list[int] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        runs.append(1)
        if len(runs) == 2:
            raise ZeroDivisionError
        await run(interrupted(browser), scope["session"])
        await send(start())

    with pytest.raises(ZeroDivisionError):
        await browser.open(app)
    assert await browser.stored() == {"n": 10}
    assert browser.site.locks == 0


async def test_what_a_task_of_the_first_run_wants_later_is_refused(browser: Browser) -> None:
    await browser.begin(n=0)
    handles: list[Session] = []

    def keep(session: Session) -> None:
        handles.append(session)
        count(session)

    await browser.open(page(interrupted(browser, keep)))
    first, second = handles
    with pytest.raises(SessionClosedError, match="run again"):
        async with first.transaction() as data:
            data.metadata["n"] = 99
    with pytest.raises(SessionClosedError, match="run again"):
        first["n"] = 99
    async with second.transaction() as data:
        data.metadata["n"] += 1
    assert await browser.stored() == {"n": 12}


async def test_a_conflict_in_the_second_run_is_answered_409(browser: Browser) -> None:
    """Only `set` and `delete`, which never wait, can bring one about. The app is not run a third time."""
    await browser.begin(n=0)
    runs: list[int] = []

    async def use(session: Session) -> None:
        runs.append(1)
        count(session)
        session_id = browser.session_id
        await browser.site.store.set(session_id, SessionData(session_id=session_id, metadata={"n": 50}))

    assert (await browser.open(page(use))).status == 409
    assert len(runs) == 2


# -- what both runs see ----------------------------------------------------------------------------------


variable: ContextVar[str] = ContextVar("variable", default="unset")


async def test_both_runs_see_the_request_as_it_came(browser: Browser) -> None:
    """The scope, what lies in it, and context variables; those around us see what the second run left."""
    await browser.begin(n=0)
    use = interrupted(browser)
    seen: list[Any] = []
    state: dict[str, Any] = {"deep": 1}

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append((variable.get(), dict(scope["state"]), scope["path"], dict(scope["extensions"])))
        variable.set(f"run {len(seen)}")
        scope["state"]["run"] = len(seen)
        scope["path"] = "/changed"
        scope["extensions"]["run"] = len(seen)
        scope["new"] = len(seen)
        await page(use)(scope, receive, send)

    variable.set("before")
    await browser.open(app, state=state, extensions={})
    assert seen == [("before", {"deep": 1}, "/", {})] * 2
    assert state == {"deep": 1, "run": 2}
    assert variable.get() == "run 2"


def body_of(*messages: dict[str, Any]) -> Receive:
    """A client's messages, then nothing until it goes."""
    left: list[Message] = list(messages)

    async def receive() -> Message:
        if left:
            return left.pop(0)
        await anyio.sleep_forever()
        raise AssertionError

    return receive


def part(body: bytes, more: bool = False) -> dict[str, Any]:
    return {"type": "http.request", "body": body, "more_body": more}


async def send_one(send: Send, message: Message) -> None:
    await send(message)


async def read_body(receive: Receive) -> bytes:
    body, more = b"", True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    return body


@pytest.mark.parametrize("read_first", [0, 1, 2], ids=["nothing", "half", "all"])
async def test_the_body_is_played_again(site: Site, browser: Browser, read_first: int) -> None:
    """However much of it the first run has read."""
    await browser.begin(n=0)
    use = interrupted(browser)
    bodies: list[bytes] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        for _ in range(read_first if not bodies and scope["session"]["n"] == 0 else 0):
            await receive()
        if scope["session"]["n"] == 10:
            bodies.append(await read_body(receive))
        await page(use)(scope, receive, send)

    receive = body_of(part(b"a" * 10, more=True), part(b"b"))
    answer = await site.request(app, headers=cookie_of(browser), receive=receive)
    assert answer.status == 200
    assert bodies == [b"a" * 10 + b"b"]


def cookie_of(browser: Browser) -> list[tuple[bytes, bytes]]:
    agent = (browser.user_agent or "").encode()
    return [(b"user-agent", agent), (b"cookie", f"session={browser.cookie}".encode())]


async def test_a_body_too_large_to_keep_is_answered_409(site: Site, browser: Browser) -> None:
    """Without a content-length that told so. All of it reaches the app once."""
    await browser.begin(n=0)
    got: list[bytes] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        got.append(await read_body(receive))
        await page(interrupted(browser))(scope, receive, send)

    large = part(b"x" * 30_000, more=True)
    receive = body_of(large, large, large, part(b"end"))
    answer = await site.request(app, headers=cookie_of(browser), receive=receive)
    assert answer.status == 409
    assert [len(body) for body in got] == [90_003]
    assert await browser.stored() == {"n": 10}


async def test_a_body_too_large_to_keep_waits_for_a_holder(site: Site, browser: Browser) -> None:
    """And is stored where that one changed nothing."""
    await browser.begin(n=0)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await read_body(receive)
        taken = await site.store.checkout(browser.session_id, site.store.lock_policy, None)
        count(scope["session"])
        async with anyio.create_task_group() as group:
            group.start_soon(send_one, send, start())
            await anyio.wait_all_tasks_blocked()
            await site.store.release(taken)  # type: ignore[arg-type]
        await send(chunk(b"ok"))

    large = part(b"x" * 30_000, more=True)
    receive = body_of(large, large, large, part(b""))
    answer = await site.request(app, headers=cookie_of(browser), receive=receive)
    assert answer.status == 200
    assert await browser.stored() == {"n": 1}


async def test_a_reader_of_the_first_run_steals_nothing(site: Site, browser: Browser) -> None:
    """A task that still waits for a message when the second run asks for it."""
    await browser.begin(n=0)
    use = interrupted(browser)
    send_in, messages_in = anyio.create_memory_object_stream[Message](10)
    bodies: list[bytes] = []

    async with anyio.create_task_group() as group:

        async def steal(receive: Receive) -> None:
            with pytest.raises(rerun.Discarded):
                await receive()

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["session"]["n"] == 0:
                group.start_soon(steal, receive)
                await anyio.wait_all_tasks_blocked()
            else:
                send_in.send_nowait({"type": "http.request", "body": b"all"})
                bodies.append(await read_body(receive))
            await page(use)(scope, receive, send)

        assert (
            await site.request(app, headers=cookie_of(browser), receive=messages_in.receive)
        ).status == 200
    assert bodies == [b"all"]
    send_in.close()
    messages_in.close()


async def test_whether_the_client_has_gone_may_be_asked_without_waiting(site: Site, browser: Browser) -> None:
    """As Starlette asks: in a scope that is cancelled already."""
    await browser.begin(n=0)
    answers: list[Any] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        for _ in range(2):
            message: Message = {}
            with anyio.CancelScope() as cancelled:
                cancelled.cancel()
                message = await receive()
            answers.append(message.get("type"))
        await page()(scope, receive, send)

    receive = body_of({"type": "http.request", "body": b""})
    await site.request(app, headers=cookie_of(browser), receive=receive)
    assert answers == ["http.request", None]


class Value(dict[str, int]):
    """To which a weak reference may lead."""


async def test_what_a_request_leaves_is_freed_at_once(browser: Browser) -> None:
    """Both runs, without a garbage collection."""
    await browser.begin(n=0)
    values: list[weakref.ref[Value]] = []

    def keep(session: Session) -> None:
        value = Value()
        session["value"] = value
        values.append(weakref.ref(value))

    app = page(interrupted(browser, keep))
    gc.collect()
    gc.disable()
    try:
        await browser.open(app)
        await anyio.lowlevel.checkpoint()
        assert [value() for value in values] == [None, None]
    finally:
        gc.enable()


@pytest.mark.parametrize("lock", ["AUTO", 1, None, "false"])
def test_other_values_of_lock_are_refused(lock: Any) -> None:
    with pytest.raises(TypeError, match='True, False or "auto"'):
        Site({"lock": lock})
