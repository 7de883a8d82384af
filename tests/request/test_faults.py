"""What goes wrong in a request: nothing unsaid is stored, nothing said is lost, no lock is left behind."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import anyio
import pytest
from anyio.lowlevel import checkpoint
from asgi import (
    KEY,
    Act,
    Browser,
    Clock,
    Deliver,
    RecordingStore,
    Site,
    chunk,
    messages,
    page,
    run,
    start,
    stream,
)

from asgi_sessions import (
    LockLostError,
    Session,
    SessionConflictError,
    SessionData,
    SessionDataError,
    SessionError,
    SessionStoreError,
)
from asgi_sessions.asgi import ASGIApp, Message, Receive, Scope, Send
from asgi_sessions.client.cookie import SessionCookie
from asgi_sessions.stores.checkout import Checkout, Lifetime, LockPolicy, Outcome

pytestmark = pytest.mark.anyio

OUT = "checkout+lock"
REMOVAL = "session=null; path=/; expires=Thu, 01 Jan 1970 00:00:00 GMT; httponly; samesite=lax"
TEXTS = {
    409: b"The session was changed or ended by another request. Its last changes are not stored; try again.",
    500: b"The session could not be stored.",
    503: b"The session is not available right now. Please try again.",
}


class TroubledStore(RecordingStore):
    """The real store, whose next calls fail as told: `failing` before they do anything, `lost` after it."""

    def __init__(self, log: list[str], clock: Clock) -> None:
        super().__init__(log, clock)
        self.failing: list[str] = []
        self.lost: list[str] = []

    async def before(self, call: str) -> None:
        await super().before(call)
        _fail(call, self.failing)

    async def after(self, call: str) -> None:
        _fail(call, self.lost)


def _fail(call: str, pending: list[str]) -> None:
    for name in pending:
        if call.startswith(name):
            pending.remove(name)
            raise SessionStoreError("the backend is down")


@pytest.fixture
def anyio_backend(way: str) -> str:
    """On both event loops in memory, and over a store of four primitives."""
    return way


@pytest.fixture
def site(model: type[SessionData]) -> Site:
    return Site({"model": model}, TroubledStore)


@pytest.fixture
def browser(site: Site) -> Browser:
    return site.browser()


@pytest.fixture
def store(site: Site) -> TroubledStore:
    assert isinstance(site.store, TroubledStore)
    return site.store


def read(session: Session) -> None:
    session.get("n")


def write(session: Session) -> None:
    session["n"] = 1


def write_again(session: Session) -> None:
    session["n"] = 2


def login(session: Session) -> None:
    session.login("ada")


def own_answer(status: int) -> list[Message]:
    """The messages by which the middleware answers for the app."""
    headers = [
        (b"content-type", b"text/plain; charset=utf-8"),
        (b"content-length", str(len(TEXTS[status])).encode()),
        (b"cache-control", b"no-store"),
    ]
    if status == 503:
        headers.append((b"retry-after", b"1"))
    return [start(status, headers), chunk(TEXTS[status])]


# -- 3. the app fails ----------------------------------------------------------------------------------


@pytest.mark.parametrize("app", [page(write, status=500), stream(write, None, status=503)])
@pytest.mark.parametrize("begun", [True, False])
async def test_a_failed_request_changes_nothing(
    site: Site, browser: Browser, app: ASGIApp, begun: bool
) -> None:
    """A 5xx of the app goes out, its changes do not; the lock goes first."""
    if begun:
        await browser.begin(n=0)
    answer = await browser.open(app)
    assert answer.status >= 500
    assert answer.cookies == []
    begins = [OUT, "app", "release"] if begun else ["app"]
    assert site.log[: len(begins) + 1] == [*begins, f"start {answer.status}"]
    assert [data.metadata for data in site.records()] == ([{"n": 0}] if begun else [])


class AppError(Exception):
    """The app's own error."""


def raising(*before: Message, act: Act = write) -> ASGIApp:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await messages(*before, act=act)(scope, receive, send)
        raise AppError

    return app


@pytest.mark.parametrize(
    "app", [raising(), raising(start(200, [(b"content-length", b"2")])), raising(act=login)]
)
@pytest.mark.parametrize("begun", [True, False])
async def test_an_exception_before_the_start_leaves(
    site: Site, browser: Browser, app: ASGIApp, begun: bool
) -> None:
    """It rises to the server with nothing sent and nothing stored, and the lock is free."""
    if begun:
        await browser.begin(n=0)
    with pytest.raises(AppError):
        await browser.open(app)
    assert site.log == ([OUT, "app", "release"] if begun else ["app"])
    assert [data.metadata for data in site.records()] == ([{"n": 0}] if begun else [])


async def test_an_exception_in_mid_stream_keeps_what_was_said(site: Site, browser: Browser) -> None:
    """What was stored before the start stays, what came after it is not stored, the exception rises."""
    await browser.begin(n=0)

    def late(session: Session) -> None:
        session["n"] = 2
        raise AppError

    with pytest.raises(AppError):
        await browser.open(stream(write, None, late))
    assert site.log == [OUT, "app", "commit", "start 200", "more", "release"]
    assert await browser.stored() == {"n": 1}


async def test_an_app_that_sends_nothing_stores_nothing(site: Site, browser: Browser) -> None:
    """No answer means nobody was told that a change was taken."""
    await browser.begin(n=0)
    await browser.open(messages(act=write))
    assert site.log == [OUT, "app", "release"]
    assert await browser.stored() == {"n": 0}


async def test_a_stream_that_is_not_ended_keeps_its_first_commit(site: Site, browser: Browser) -> None:
    """A start alone was said, so what was stored before it stays; the lock goes when the app returns."""
    await browser.begin(n=0)
    await browser.open(messages(start(200), act=write))
    assert site.log == [OUT, "app", "commit", "start 200", "release"]
    assert await browser.stored() == {"n": 1}


# -- 4. the commit is refused --------------------------------------------------------------------------


async def overwrite(browser: Browser) -> None:
    """Somebody who does not wait for the lock."""
    data = await browser.site.store.get(browser.session_id)
    assert data is not None
    data.metadata["n"] = 5
    await browser.site.store.set(browser.session_id, data)


async def outlast(browser: Browser) -> None:
    """The lease ends while the app runs, and another takes the lock."""
    browser.site.clock.now += 301
    site = browser.site
    await site.backing.checkout(site.store, browser.session_id, LockPolicy(max_hold=0), None)


async def remove(browser: Browser) -> None:
    """The record is deleted while the app runs."""
    await browser.site.store.delete(browser.session_id)


Meanwhile = Callable[[Browser], Any]
CHANGES: dict[str, Act] = {
    "write": write,
    "login": login,
    "regenerate": Session.regenerate_id,
    "clear": Session.clear,
}


def during(browser: Browser, meanwhile: Meanwhile, act: Act) -> Act:
    """An act during which something happens to the session."""

    async def both(session: Session) -> None:
        await meanwhile(browser)
        await run(act, session)

    return both


@pytest.mark.parametrize("form", [page, stream, lambda act: stream(act, None)])
@pytest.mark.parametrize("act", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize(
    ("meanwhile", "event", "left"), [(overwrite, "conflict", {"n": 5}), (outlast, "lock_lost", {"n": 0})]
)
async def test_a_refused_commit_is_answered_409(
    site: Site, browser: Browser, form: Callable[[Act], ASGIApp], act: Act, meanwhile: Meanwhile, event: str,
    left: dict[str, int],
) -> None:  # fmt: skip
    """The app's answer is replaced, the record stays as the others left it, the cookie as it is."""
    await browser.begin(n=0)
    answer = await browser.open(form(during(browser, meanwhile, act)))
    assert answer.messages == own_answer(409)
    assert await browser.stored() == left
    assert len(site.records()) == 1
    assert site.locks == 0
    assert site.events == [event]


async def test_a_lease_that_passed_to_another_is_lost(site: Site, browser: Browser) -> None:
    """Who held the lock too long is refused, and the one who has it now is not disturbed."""
    await browser.begin(n=0)
    statuses: dict[str, int] = {}

    async def next_one(session: Session) -> None:
        group.start_soon(second)
        site.clock.now += 301
        await anyio.wait_all_tasks_blocked()
        session["n"] = 7
        first_done.set()

    async def slow(session: Session) -> None:
        await first_done.wait()
        await anyio.wait_all_tasks_blocked()
        session["n"] += 1

    async def second() -> None:
        statuses["the next"] = (await browser.twin().open(page(slow))).status

    first_done = anyio.Event()
    async with anyio.create_task_group() as group:
        statuses["too long"] = (await browser.open(page(next_one))).status
    assert statuses == {"too long": 409, "the next": 200}
    assert await browser.stored() == {"n": 1}
    assert site.locks == 0


async def test_a_lease_that_nobody_took_over_does_no_harm(site: Site, browser: Browser) -> None:
    """The version tells that nothing has happened since: the late commit is stored."""
    await browser.begin(n=0)

    def late(session: Session) -> None:
        site.clock.now += 301
        session["n"] = 1

    assert (await browser.open(page(late))).status == 200
    assert await browser.stored() == {"n": 1}
    assert site.locks == 0


FORMS = [page, lambda act: stream(act, None)]


@pytest.mark.parametrize("act", [write, login, Session.regenerate_id])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("options", [{}, {"lock": False}, {"rolling": True}], ids=repr)
@pytest.mark.parametrize("end", ["delete", "expire"])
async def test_a_change_of_a_session_that_has_ended_is_answered_409(
    act: Act, form: Callable[[Act], ASGIApp], options: dict[str, Any], end: str
) -> None:
    """No 2xx for a change that is gone; the cookie is left alone, for it may be another's by now."""
    site = Site(options)
    browser = site.browser()
    await browser.begin(n=0)

    async def meanwhile(browser: Browser) -> None:
        if end == "delete":
            await remove(browser)
        else:
            site.clock.now += 1209601

    answer = await browser.open(form(during(browser, meanwhile, act)))
    assert answer.messages == own_answer(409)
    assert site.records() == []
    assert site.locks == 0
    assert site.events == ["conflict"]


@pytest.mark.parametrize("act", [Session.clear, Session.logout])
@pytest.mark.parametrize("form", FORMS)
async def test_ending_what_has_ended_is_no_conflict(
    site: Site, browser: Browser, act: Act, form: Callable[[Act], ASGIApp]
) -> None:
    """What was wanted is so. The cookie stays: another sign-in may have replaced it since."""
    await browser.begin(n=0)
    answer = await browser.open(form(during(browser, remove, act)))
    assert (answer.status, answer.cookies) == (200, [])
    assert site.records() == []
    assert site.locks == 0


@pytest.mark.parametrize("meanwhile", [overwrite, outlast])
async def test_an_end_wins_over_every_other_writer(
    site: Site, browser: Browser, meanwhile: Meanwhile
) -> None:
    """Logout ends the session though it was changed meanwhile."""
    await browser.begin(n=0)
    answer = await browser.open(page(during(browser, meanwhile, Session.logout)))
    assert (answer.status, answer.cookies) == (200, [REMOVAL])
    assert site.records() == []
    assert site.events == ["session_ended"]


async def test_a_lost_session_can_still_be_ended(site: Site, browser: Browser) -> None:
    """Logout works for an app that has heard, and ignored, that its change is not stored."""
    await browser.begin(n=0)

    async def act(session: Session) -> None:
        await outlast(browser)
        session["n"] = 1
        with pytest.raises(LockLostError):
            await session.release()
        session.logout()

    answer = await browser.open(page(act))
    assert (answer.status, answer.cookies) == (200, [REMOVAL])
    assert site.records() == []


@pytest.mark.parametrize("meanwhile", [overwrite, outlast, remove])
async def test_an_unchanged_session_is_nobodys_conflict(
    site: Site, browser: Browser, meanwhile: Meanwhile
) -> None:
    """Who only read gets the app's answer."""
    await browser.begin(n=0)
    assert (await browser.open(page(during(browser, meanwhile, read)))).body == b"ok"
    assert site.locks == 0


async def test_nothing_runs_on_after_a_refused_send(browser: Browser) -> None:
    """The app's `send` raises, so a background task behind it does not run as if all were well."""
    await browser.begin(n=0)
    ran: list[bool] = []
    answer = await browser.open(page(during(browser, overwrite, write), then=lambda _: ran.append(True)))
    assert (answer.status, ran) == (409, [])


def swallowing(act: Act, then: list[Message], *, first: list[Message] | None = None) -> ASGIApp:
    """An app that takes the commit's error for something else and goes on with other messages."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await run(act, scope["session"])
        with contextlib.suppress(SessionError):
            for message in first or [start(200, [(b"content-length", b"2")]), chunk(b"ok")]:
                await send(message)
        for message in then:
            await send(message)

    return app


@pytest.mark.parametrize(
    "then",
    [
        [],
        [start(200), chunk()],
        [start(302, [(b"location", b"/")]), chunk()],
        [chunk(b"ok")],
        [chunk(b"o", more=True), chunk(b"k")],
    ],
    ids=["nothing", "another 200", "a redirect", "the body again", "the body in parts"],
)
@pytest.mark.parametrize("trouble", ["conflict", "fault"])
async def test_a_swallowed_refusal_does_not_get_through(
    browser: Browser, store: TroubledStore, then: list[Message], trouble: str
) -> None:
    """Whatever the app makes of the error, the client never hears of success."""
    await browser.begin(n=0)
    store.failing += ["commit"] if trouble == "fault" else []
    act = write if trouble == "fault" else during(browser, overwrite, write)
    answer = await browser.open(swallowing(act, then))
    assert answer.messages == own_answer(503 if trouble == "fault" else 409)
    assert (await browser.stored()) == {"n": 0 if trouble == "fault" else 5}


async def test_a_refusal_counts_whatever_the_app_makes_of_it(browser: Browser) -> None:
    """An error of the app's own, raised in answer to the commit's, does not hide what happened."""
    await browser.begin(n=0)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await page(during(browser, overwrite, write))(scope, receive, send)
        except SessionError as error:
            raise AppError from error

    answer = await browser.open(app)
    assert answer.messages == own_answer(409)


async def test_an_error_page_for_a_late_request_brings_no_cookie() -> None:
    """Nor the old id's, though it would be time to send that again."""
    site = Site({"lock": False, "secret_key": KEY[::-1], "secret_key_fallbacks": [KEY]})
    browser = site.browser()
    session_id = await browser.begin(n=0)
    browser.cookie = SessionCookie(KEY).signer.sign(session_id)

    async def overtaken(session: Session) -> None:
        await browser.open(page(login))
        session["n"] = 1

    answer = await browser.twin().open(swallowing(overtaken, [start(404), chunk()]))
    assert (answer.status, answer.cookies) == (404, [])


async def test_a_500_is_not_the_apps_own(site: Site, browser: Browser) -> None:
    """Frameworks make one of any error that rises: the client hears that it may try again."""
    await browser.begin(n=0)
    page_of_framework = [
        start(500, [(b"x-app", b"1")]),
        chunk(b"Internal ", more=True),
        chunk(b"Server Error"),
    ]
    answer = await browser.open(swallowing(during(browser, overwrite, write), page_of_framework))
    assert answer.messages == own_answer(409)
    assert site.locks == 0


@pytest.mark.parametrize("status", [404, 409, 501, 503])
async def test_the_apps_own_error_page_goes_through(site: Site, browser: Browser, status: int) -> None:
    """An app may answer a refused commit itself, as long as it does not call it a success."""
    await browser.begin(n=0)
    page_of_app = [start(status, [(b"x-app", b"1")]), chunk(b"mine")]
    answer = await browser.open(swallowing(during(browser, overwrite, write), page_of_app))
    assert answer.messages == [
        start(status, [(b"x-app", b"1"), (b"vary", b"Cookie")]),
        chunk(b"mine"),
    ]
    assert site.locks == 0


def saving(name: str, caught: list[type[Exception]], act: Act) -> Act:
    """An act that calls save() or release() and swallows what that raises."""

    async def save(session: Session) -> None:
        await run(act, session)
        try:
            await getattr(session, name)()
        except SessionError as error:
            caught.append(type(error))

    return save


@pytest.mark.parametrize("act", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("name", ["save", "release"])
@pytest.mark.parametrize(
    ("meanwhile", "error", "left"),
    [(overwrite, SessionConflictError, {"n": 5}), (outlast, LockLostError, {"n": 0})],
)
async def test_a_swallowed_error_of_save_is_found_again(
    site: Site, browser: Browser, act: Act, name: str, meanwhile: Meanwhile, error: type[Exception],
    left: dict[str, int],
) -> None:  # fmt: skip
    """save() and release() say why nothing is stored; who ignores that is answered 409 all the same."""
    await browser.begin(n=0)
    caught: list[type[Exception]] = []
    answer = await browser.open(page(saving(name, caught, during(browser, meanwhile, act))))
    assert caught == [error]
    assert answer.messages == own_answer(409)
    assert await browser.stored() == left
    assert len(site.records()) == 1
    assert site.locks == 0


@pytest.mark.parametrize("act", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("call", ["commit", "discard", "move"])
@pytest.mark.parametrize("name", ["save", "release"])
async def test_a_fault_that_was_swallowed_is_tried_again(
    site: Site, browser: Browser, store: TroubledStore, act: Act, call: str, name: str
) -> None:
    """A call that failed once and works the second time stores everything; the client has the right id."""
    await browser.begin(n=0)
    store.failing.append(call)
    caught: list[type[Exception]] = []
    answer = await browser.open(page(saving(name, caught, act)))
    assert answer.status == 200
    if act is Session.clear:
        assert site.records() == []
    else:
        expected = {"n": 1 if act is write else 0}
        data = await site.store.get(browser.session_id)
        assert data is not None
        assert (data.metadata, data.user_id) == (expected, "ada" if act is login else None)
    assert site.locks == 0


@pytest.mark.parametrize("act", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("call", ["commit", "discard", "move"])
@pytest.mark.parametrize("form", [page, lambda act: stream(act, None)])
@pytest.mark.parametrize("when", ["failing", "lost"])
async def test_a_fault_of_the_store_is_answered_503(
    site: Site, browser: Browser, store: TroubledStore, act: Act, call: str,
    form: Callable[[Act], ASGIApp], when: str,
) -> None:  # fmt: skip
    """Nothing of the app's answer leaves, no lock stays; a call that did nothing changed nothing."""
    await browser.begin(n=0)
    cookie = browser.cookie
    getattr(store, when).append(call)
    answer = await browser.open(form(act))
    if getattr(store, when):  # this change does not make that call
        assert answer.status == 200
        return
    assert answer.messages[0]["status"] == 503
    assert (site.locks, site.events) == (0, ["store_error"])
    if (call, when) != ("move", "lost"):
        assert browser.cookie == cookie
    if when == "failing" or call == "move":
        assert await browser.stored() == {"n": 0}, "the client no longer knows where its session is"


async def test_a_store_that_is_down_at_the_checkout(
    site: Site, browser: Browser, store: TroubledStore
) -> None:
    """The app does not run."""
    await browser.begin(n=0)
    store.failing.append("checkout")
    answer = await browser.open(page(write))
    assert answer.messages == own_answer(503)
    assert site.log == [OUT, "start 503", "body"]
    assert site.events == ["store_error"]


@pytest.mark.parametrize(
    ("app", "expected"), [(page(), b"ok"), (page(read), b"ok"), (page(write), TEXTS[503])]
)
async def test_a_store_that_is_down_and_no_cookie(
    browser: Browser, store: TroubledStore, app: ASGIApp, expected: bytes
) -> None:
    """Pages that store nothing survive; what would begin a session is answered 503."""
    store.failing += ["checkout", "create", "commit"]
    answer = await browser.open(app)
    assert (answer.body, answer.cookies) == (expected, [])


def loop(session: Session) -> None:
    session["self"] = session


UNSTORABLE: dict[str, Act] = {
    "a set": lambda session: session.update(bad={1}),
    "an object": lambda session: session.update(bad=object()),
    "NaN": lambda session: session.update(bad=float("nan")),
    "a lone surrogate": lambda session: session.update(bad="\ud800"),
    "a key that is no text": lambda session: session.update({1: 1}),
    "too deep": lambda session: session.update(bad=deep(300)),
    "too large": lambda session: session.update(bad="x" * 1_000_001),
    "itself": loop,
}


def deep(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = {"a": value}
    return value


@pytest.mark.parametrize("name", UNSTORABLE)
@pytest.mark.parametrize("begun", [True, False])
async def test_what_cannot_be_stored_is_answered_500(
    site: Site, browser: Browser, name: str, begun: bool
) -> None:
    """The answer says nothing of the cause, the event names the value, the old record is kept."""
    if begun:
        await browser.begin(n=0)
    answer = await browser.open(page(UNSTORABLE[name]))
    assert answer.messages == own_answer(500)
    assert site.events == ["unstorable_value"]
    assert [data.metadata for data in site.records()] == ([{"n": 0}] if begun else [])
    assert site.locks == 0


async def test_what_cannot_be_stored_is_told_by_save(browser: Browser) -> None:
    """save() names the value; an app that takes it out again stores the rest."""
    await browser.begin(n=0)

    async def act(session: Session) -> None:
        session["n"] = 1
        session["bad"] = {1}
        with pytest.raises(SessionDataError, match=r"metadata\.bad"):
            await session.save()
        del session["bad"]

    answer = await browser.open(page(act))
    assert answer.status == 200
    assert await browser.stored() == {"n": 1}


@pytest.mark.parametrize(
    ("options", "event"), [({"lock_wait": 0}, "lock_timeout"), ({"max_waiters": 0}, "too_many_waiters")]
)
async def test_waiting_has_an_end(options: dict[str, Any], event: str) -> None:
    """Who may not wait (any longer) is answered 503; the holder goes on."""
    site = Site(options)
    browser = site.browser()
    await browser.begin(n=0)
    inner: list[list[Message]] = []

    async def act(session: Session) -> None:
        inner.append((await browser.twin().open(page(write))).messages)
        session["n"] = 2

    answer = await browser.open(page(act))
    assert inner == [own_answer(503)]
    assert (answer.status, site.locks, site.events) == (200, 0, [event])
    assert await browser.stored() == {"n": 2}


async def test_the_error_page_can_be_the_apps() -> None:
    """An ASGI app given as `error_response` answers, and finds the error in the scope."""
    seen: list[object] = []

    async def apology(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope["session_error"])
        await send(start(418))
        await send(chunk(b"sorry"))

    site = Site({"error_response": apology})
    browser = site.browser()
    await browser.begin(n=0)
    answer = await browser.open(page(during(browser, overwrite, write)))
    assert answer.messages == [start(418), chunk(b"sorry")]
    assert isinstance(seen[0], SessionConflictError)


async def test_a_conflict_in_the_last_chunk_rises(browser: Browser) -> None:
    """A stream whose second change cannot be stored is not ended as if it were."""
    await browser.begin(n=0)
    with pytest.raises(SessionConflictError):
        await browser.open(stream(write, during(browser, overwrite, write_again)))
    assert browser.site.log == [OUT, "app", "commit", "start 200", "more", "commit+release"]
    assert await browser.stored() == {"n": 5}


async def test_a_session_that_dies_in_mid_stream(site: Site, browser: Browser) -> None:
    """The cookie can no longer be removed, so a change that is lost is an error."""
    await browser.begin(n=0)
    with pytest.raises(SessionConflictError):
        await browser.open(stream(write, during(browser, remove, write_again)))
    assert site.records() == []
    assert site.locks == 0


async def test_save_tells_of_a_dead_session(site: Site, browser: Browser) -> None:
    """An app that goes on after that is answered 409: nothing of the old session comes back."""
    await browser.begin(n=0)

    async def act(session: Session) -> None:
        await remove(browser)
        session["n"] = 1
        with pytest.raises(SessionConflictError):
            await session.save()
        session["m"] = 1

    assert (await browser.open(page(act))).messages == own_answer(409)
    assert site.records() == []


async def test_background_work_after_a_failed_answer(browser: Browser) -> None:
    """It sees the stored record, without what the failed request had in mind."""
    await browser.begin(n=0)

    async def later(session: Session) -> None:
        async with session.transaction() as data:
            assert data.metadata == {"n": 0}
            data.metadata["later"] = True

    await browser.open(page(write, status=500, then=later))
    assert await browser.stored() == {"n": 0, "later": True}


async def test_a_transaction_that_meets_garbage_lets_go(site: Site, browser: Browser) -> None:
    """A record that turned unreadable since the request began raises and leaves no lock behind."""
    session_id = await browser.begin(n=0)

    async def later(session: Session) -> None:
        site.spoil(session_id, b"garbage")
        with pytest.raises(SessionConflictError):
            async with session.transaction():
                pytest.fail("there is nothing to show")
        assert site.locks == 0

    await browser.open(page(read, then=later))
    assert site.events == ["unreadable_record"]


async def test_a_transaction_after_the_end_says_so_every_time(site: Site, browser: Browser) -> None:
    """A session that was deleted in the middle of a transaction does not come back in the next."""
    await browser.begin(n=0)

    async def block(session: Session) -> None:
        async with session.transaction() as data:
            await remove(browser)
            data.metadata["n"] = 1

    async def later(session: Session) -> None:
        with pytest.raises(SessionConflictError):
            await block(session)
        with pytest.raises(SessionError):
            await block(session)

    await browser.open(page(read, then=later))
    assert site.records() == []
    assert site.locks == 0


# -- 9. cancellation, at every place where a request can wait ------------------------------------------


class SlowStore(RecordingStore):
    """Suspends before and after each call; the request is interrupted at one of these places."""

    def __init__(self, log: list[str], clock: Clock) -> None:
        super().__init__(log, clock)
        self.interrupt: Callable[[], None] | None = None
        self.countdown = 0

    async def before(self, call: str) -> None:
        await super().before(call)
        await self.pause()

    async def after(self, call: str) -> None:
        await self.pause()

    async def pause(self) -> None:
        """One place where the request waits."""
        if self.interrupt is not None:
            self.countdown -= 1
            if self.countdown == 0:
                self.interrupt()
        await checkpoint()

    async def deliver(self, message: Message) -> None:
        await self.pause()


@dataclass
class Scenario:
    """A request: what it does, and what the session is once its success was told."""

    app: ASGIApp
    after: tuple[Any, ...]  # n and user; none where the session is gone
    begun: bool = True
    path: str = "/"


OLD = (0, None)


async def transact(session: Session) -> None:
    async with session.transaction() as data:
        data.metadata["n"] = 1


async def save_a_login(session: Session) -> None:
    session.login("ada")
    await session.save()
    session["n"] = 1


async def release_early(session: Session) -> None:
    session["n"] = 1
    await session.release()


def start_over(session: Session) -> None:
    session.logout()
    session["n"] = 1


SCENARIOS = {
    "read": Scenario(page(read), OLD),
    "write": Scenario(page(write), (1, None)),
    "begin": Scenario(page(write), (1, None), begun=False),
    "begin a stream": Scenario(stream(write, None), (1, None), begun=False),
    "login": Scenario(page(login), (0, "ada")),
    "login and save": Scenario(page(save_a_login), (1, "ada")),
    "login in a stream": Scenario(stream(login, None), (0, "ada")),
    "logout": Scenario(page(Session.logout), ()),
    "logout and go on": Scenario(page(start_over), (1, None)),
    "clear in a stream": Scenario(stream(Session.clear, None), ()),
    "a stream": Scenario(stream(write, None, None), (1, None)),
    "release": Scenario(page(release_early), (1, None)),
    "a failure": Scenario(page(write, status=500), OLD),
    "transaction": Scenario(page(transact), (1, None)),
    "transaction on a read-only route": Scenario(page(transact), (1, None), path="/ro"),
    "background": Scenario(page(write, then=transact), (1, None)),
}


class Interrupted:
    """One run of a scenario that was interrupted at its n-th suspension."""

    def __init__(self, scenario: Scenario, model: type[SessionData]) -> None:
        self.scenario = scenario
        self.site = Site({"model": model, "read_only": ["/ro"]}, SlowStore)
        assert isinstance(self.site.store, SlowStore)
        self.store = self.site.store
        self.browser = self.site.browser()
        self.finished = False

    async def prepare(self) -> None:
        if self.scenario.begun:
            await self.browser.begin(n=0)

    async def visit(self, deliver: Deliver | None = None) -> None:
        self.site.deliver = deliver or self.store.deliver
        await self.browser.open(self.scenario.app, path=self.scenario.path)
        self.finished = True

    async def check(self) -> None:
        """No lock; every record whole; what was told is stored; the next requests work."""
        self.store.interrupt = self.site.deliver = None
        assert self.site.locks == 0, self.site.log
        after = self.scenario.after
        allowed = {OLD, after, after[:1] + OLD[1:], OLD[:1] + after[1:]}
        states = [(data.metadata.get("n"), data.user_id) for data in self.site.records()]
        assert set(states) <= allowed, self.site.log
        if self.finished:
            assert states == ([after] if after else []), self.site.log
        await self._go_on()

    async def _go_on(self) -> None:
        """The client may ask again: a session of its own or a fresh one, at worst a refusal for an old id."""
        known = {data.session_id for data in self.site.records()}
        retired = self.browser.cookie is not None and self.browser.session_id not in known
        assert (await self.browser.open(page(read))).status == 200
        status = (await self.browser.open(page(lambda session: session.update(again=1)))).status
        assert status == 200 or (retired and status == 409)
        assert self.site.locks == 0


@pytest.mark.parametrize("name", SCENARIOS)
async def test_cancelled_anywhere_nothing_is_left(name: str, model: type[SessionData]) -> None:
    """Cancelled at each place where a request waits, it leaves no lock and a whole record."""
    for place in range(1, 100):
        run_ = Interrupted(SCENARIOS[name], model)
        await run_.prepare()
        with anyio.CancelScope() as scope:
            run_.store.interrupt, run_.store.countdown = scope.cancel, place
            await run_.visit()
        completed = run_.store.countdown > 0
        await run_.check()
        if completed:
            break
    else:
        pytest.fail("the request never completed")
    assert place > 3


@pytest.mark.parametrize("way", ["asyncio", "four primitives"], indirect=True)
@pytest.mark.parametrize("name", SCENARIOS)
def test_a_cancelled_task_leaves_nothing(way: str, name: str) -> None:
    """The same for asyncio's own way to cancel, which no shield holds up."""

    async def attempt(place: int) -> bool:
        run_ = Interrupted(SCENARIOS[name], SessionData)
        await run_.prepare()
        task = asyncio.ensure_future(run_.visit())
        run_.store.interrupt, run_.store.countdown = _cancels(task, run_.site), place
        with contextlib.suppress(asyncio.CancelledError):
            await task
        completed = run_.store.countdown > 0
        await run_.check()
        return completed

    assert any(asyncio.run(attempt(place)) for place in range(1, 100))


def _cancels(task: asyncio.Task[None], site: Site) -> Callable[[], None]:
    """Cancel the task, but not while it lets the lock go: a release does not wait, that is its promise."""

    def interrupt() -> None:
        if site.log[-1] != "release":
            task.cancel()

    return interrupt


@pytest.mark.parametrize("name", SCENARIOS)
async def test_a_client_that_goes_away_leaves_nothing(name: str, model: type[SessionData]) -> None:
    """A `send` that fails at any message: the error rises, no lock stays, what was stored stays whole."""
    for place in range(1, 10):
        if await _is_told_everything(Interrupted(SCENARIOS[name], model), place):
            assert place > 2
            return
    pytest.fail("the request never completed")


async def _is_told_everything(run_: Interrupted, place: int) -> bool:
    """One visit of a client that goes away at its n-th message; whether it stayed to the end."""
    sent: list[Message] = []

    async def deliver(message: Message) -> None:
        sent.append(message)
        if len(sent) == place:
            raise OSError("the client is gone")

    await run_.prepare()
    with contextlib.suppress(OSError):
        await run_.visit(deliver)
    await run_.check()
    return run_.finished


@pytest.mark.parametrize("act", [write, login, Session.logout, start_over])
@pytest.mark.parametrize("begun", [True, False])
async def test_an_app_that_gives_its_answer_a_time_limit(act: Act, begun: bool) -> None:
    """Cancelled in `send` by the app itself, which then tries again: 200 still means stored."""
    statuses: set[int] = set()
    for place in range(1, 20):
        run_ = Interrupted(Scenario(page(), OLD, begun), SessionData)
        await run_.prepare()

        async def app(scope: Scope, receive: Receive, send: Send, run_: Interrupted = run_) -> None:
            await run(act, scope["session"])
            with anyio.CancelScope() as limit:
                run_.store.interrupt = limit.cancel
                await page()(scope, receive, send)
            if limit.cancelled_caught and "start 200" not in run_.site.log:
                await page()(scope, receive, send)

        run_.store.countdown = place
        answer = await run_.browser.open(app)
        statuses.add(answer.status)
        assert run_.site.locks == 0
        if answer.status == 200 and act is not Session.logout:
            stored = await run_.store.get(run_.browser.session_id)
            assert stored is not None
            assert stored.user_id == ("ada" if act is login else None)
            assert stored.metadata.get("n") == (1 if act in (write, start_over) else 0 if begun else None)
        if run_.store.countdown > 0:
            break
    assert 200 in statuses
    assert statuses <= {200, 409}


async def test_a_cancelled_waiter_leaves_the_queue(site: Site, browser: Browser) -> None:
    """Who gives up waiting is forgotten, and the next in line has its turn."""
    await browser.begin(n=0)
    statuses: list[int] = []

    async def patient() -> None:
        statuses.append((await browser.twin().open(page(write))).status)

    async def impatient(scope: anyio.CancelScope) -> None:
        with scope:
            await browser.twin().open(page(write))

    async def act(session: Session) -> None:
        scope = anyio.CancelScope()
        group.start_soon(impatient, scope)
        await anyio.wait_all_tasks_blocked()
        group.start_soon(patient)
        await anyio.wait_all_tasks_blocked()
        scope.cancel()
        await anyio.wait_all_tasks_blocked()

    async with anyio.create_task_group() as group:
        await browser.open(page(act))
    assert statuses == [200]
    assert site.locks == 0


@pytest.mark.parametrize("cancelled_first", [True, False])
async def test_a_waiter_that_is_cancelled_as_its_turn_comes(
    site: Site, browser: Browser, cancelled_first: bool
) -> None:
    """A lock that was granted to a request that is cancelled in the same moment is passed on."""
    await browser.begin(n=0)
    statuses: list[int] = []
    scope = anyio.CancelScope()

    async def unlucky() -> None:
        with scope:
            await browser.twin().open(page(write))

    async def next_one() -> None:
        statuses.append((await browser.twin().open(page(write))).status)

    async def act(session: Session) -> None:
        group.start_soon(unlucky)
        await anyio.wait_all_tasks_blocked()
        group.start_soon(next_one)
        await anyio.wait_all_tasks_blocked()
        if cancelled_first:
            scope.cancel()
        await session.release()
        scope.cancel()

    async with anyio.create_task_group() as group:
        await browser.open(page(act))
    assert statuses == [200]
    assert site.locks == 0


@pytest.mark.parametrize("begun", [True, False])
async def test_a_disconnect_in_mid_stream(site: Site, browser: Browser, begun: bool) -> None:
    """An app that stops its stream when the client is gone keeps its first commit and leaves no lock."""
    if begun:
        await browser.begin(n=0)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        async def produce() -> None:
            await send(start(200))
            scope["session"]["n"] = 2
            while True:
                await send(chunk(b"tick", more=True))
                ticked.set()
                await checkpoint()

        scope["session"]["n"] = 1
        async with anyio.create_task_group() as group:
            group.start_soon(produce)
            assert (await receive())["type"] == "http.disconnect"
            group.cancel_scope.cancel()

    async def receive() -> Message:
        await ticked.wait()
        return {"type": "http.disconnect"}

    ticked = anyio.Event()
    await browser.open(app, receive=receive)
    assert await browser.stored() == {"n": 1}
    assert site.locks == 0


async def test_a_disconnect_before_the_answer(site: Site, browser: Browser) -> None:
    """An app that hears of it and returns stores nothing."""
    await browser.begin(n=0)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        scope["session"]["n"] = 1
        assert (await receive())["type"] == "http.disconnect"

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    await browser.open(app, receive=receive)
    assert site.log == [OUT, "app", "release"]
    assert await browser.stored() == {"n": 0}


@pytest.mark.parametrize("pending", ["failing", "lost"])
async def test_a_beginning_of_which_nobody_knows_is_tried_again(
    site: Site, browser: Browser, store: TroubledStore, pending: str
) -> None:
    """Stored by the first try or not: the second is no conflict with it, and one session is there."""

    async def act(session: Session) -> None:
        getattr(store, pending).append("create")
        session.login("ada")
        with pytest.raises(SessionStoreError):
            await session.save()

    assert (await browser.open(page(act))).status == 200
    assert [record.session_id for record in site.records()] == [browser.session_id]
    assert site.locks == 0


def begin_anew(session: Session) -> None:
    session.logout()
    write(session)


@pytest.mark.parametrize("act", [login, Session.regenerate_id, begin_anew])
async def test_a_new_id_of_which_nobody_knows_is_given_up(
    site: Site, browser: Browser, store: TroubledStore, monkeypatch: pytest.MonkeyPatch, act: Act
) -> None:
    """The record was stored under it and the reply lost: the next try deletes it and takes another id."""
    tried: list[str] = []

    async def store_half(checkout: Checkout, session_id: str, record: bytes, **_: Any) -> Outcome:
        monkeypatch.undo()
        tried.append(session_id)
        await store.create(session_id, record, Lifetime(60), None)
        raise SessionStoreError("a reply was lost")

    async def act_and_save(session: Session) -> None:
        monkeypatch.setattr(store, "move", store_half)
        act(session)
        with pytest.raises(SessionStoreError):
            await session.save()

    await browser.begin(n=0)
    assert (await browser.open(page(act_and_save))).status == 200
    assert [record.session_id for record in site.records()] == [browser.session_id]
    assert browser.session_id not in tried
    assert site.locks == 0


async def test_no_answer_names_a_session(browser: Browser, store: TroubledStore) -> None:
    """The middleware's own answers carry neither the id nor the cause."""
    session_id = await browser.begin(n=0)
    store.failing.append("commit")
    answer = await browser.open(page(write))
    told = repr(answer.messages)
    assert session_id not in told
    assert not re.search("backend|Error|Traceback", told)
