"""The walk of a request over HTTP: which store calls and which messages, in which order."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import anyio
import pytest
from anyio.lowlevel import checkpoint
from asgi import (
    FIREFOX,
    KEY,
    Act,
    Browser,
    Shop,
    Site,
    chunk,
    empty_body,
    http_scope,
    messages,
    page,
    start,
    stream,
)
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from asgi_sessions import (
    Fingerprint,
    ReadOnlySessionError,
    Session,
    SessionClosedError,
    SessionConflictError,
    SessionData,
    SessionEvent,
    SessionMiddleware,
    SessionStoreError,
    get_session,
    get_session_data,
)
from asgi_sessions.asgi import ASGIApp, Headers, Message, Receive, Scope, Send
from asgi_sessions.client.cookie import SessionCookie
from asgi_sessions.stores.running import running

pytestmark = pytest.mark.anyio

COOKIE = re.compile(
    rb"session=[0-9a-f]{32}\.[\w-]+\.[\w-]{43}; path=/; Max-Age=1209600; httponly; samesite=lax"
)
REMOVAL = "session=null; path=/; expires=Thu, 01 Jan 1970 00:00:00 GMT; httponly; samesite=lax"
CHROME = "Mozilla/5.0 (Windows NT 10.0) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/140.0 Safari/537.36"


@pytest.fixture
def anyio_backend(way: str) -> str:
    """On both event loops in memory, and over a store of four primitives."""
    return way


@pytest.fixture(params=[SessionData, Shop], ids=["plain", "typed"])
def site(request: pytest.FixtureRequest) -> Site:
    return Site({"model": request.param})


@pytest.fixture
def browser(site: Site) -> Browser:
    return site.browser()


def read(session: Session) -> None:
    session.get("n")


def write(session: Session) -> None:
    session["n"] = 1


def login(session: Session) -> None:
    session.login("ada")


def add_and_log_out(session: Session) -> None:
    session["secret"] = 1
    session.logout()
    session["flash"] = "bye"


# -- 1. no cookie --------------------------------------------------------------------------------------


async def test_an_untouched_request_costs_nothing(site: Site) -> None:
    """Without a cookie and without a look at the session the messages pass as they are, no store is asked."""
    sent = [start(200, [(b"x-app", b"1")]), chunk(b"a", more=True), chunk(b"b")]
    answer = await site.request(messages(*sent))
    assert answer.messages == sent
    assert site.log == ["app", "start 200", "more", "body"]


async def test_a_read_only_adds_vary(site: Site) -> None:
    """An answer that depends on there being no session says `Vary: Cookie`, no more."""
    answer = await site.request(messages(start(200, [(b"x-app", b"1")]), chunk(b"a"), act=read))
    assert answer.messages == [start(200, [(b"x-app", b"1"), (b"vary", b"Cookie")]), chunk(b"a")]
    assert site.log == ["app", "start 200", "body"]


async def test_a_write_is_stored_before_the_start_leaves(site: Site) -> None:
    """A new session is created first, then the start goes out with Vary, cookie and no-store."""
    answer = await site.request(messages(start(201, [(b"content-length", b"1")]), chunk(b"a"), act=write))
    assert site.log == ["app", "create", "start 201", "body"]
    names = [name for name, _ in answer.headers]
    assert names == [b"content-length", b"vary", b"set-cookie", b"cache-control"]
    assert COOKIE.fullmatch(answer.headers[2][1])
    assert answer.headers[3][1] == b"no-store"
    assert answer.messages[1] == chunk(b"a")


@pytest.mark.parametrize("name", [b"cache-control", b"Cache-Control"])
async def test_the_apps_cache_control_stays(site: Site, name: bytes) -> None:
    """`no-store` is added only where the app said nothing about caching."""
    answer = await site.request(page(write, headers=[(name, b"private")]))
    assert [value for key, value in answer.headers if key.lower() == b"cache-control"] == [b"private"]


async def test_other_cookies_are_kept(site: Site) -> None:
    """The app's own Set-Cookie headers stay, each a line of its own, before ours."""
    answer = await site.request(
        page(write, headers=[(b"set-cookie", b"a=1; path=/"), (b"set-cookie", b"session_id=x")])
    )
    assert answer.cookies[:2] == ["a=1; path=/", "session_id=x"]
    assert COOKIE.fullmatch(answer.cookies[2].encode())


@pytest.mark.parametrize(
    ("of_app", "expected"),
    [
        ([b"Accept-Encoding"], ["Accept-Encoding, Cookie"]),
        ([b"accept-encoding, cookie"], ["accept-encoding, cookie"]),
        ([b"*"], ["*"]),
    ],
)
async def test_vary_is_merged(site: Site, of_app: list[bytes], expected: list[str]) -> None:
    """`Cookie` joins the app's Vary and is never there twice."""
    answer = await site.request(page(read, headers=[(b"vary", value) for value in of_app]))
    assert answer.header("vary") == expected


async def test_headers_may_come_as_a_generator(site: Site) -> None:
    """ASGI allows any iterable of headers, so one that can be read once loses nothing."""
    given: Headers = [(b"x-app", b"1"), (b"content-length", b"0")]
    message = {"type": "http.response.start", "status": 200, "headers": (pair for pair in given)}
    answer = await site.request(messages(message, chunk()))
    assert answer.headers == given


async def test_a_start_without_headers_is_enough(site: Site) -> None:
    """The headers of a start are optional in ASGI."""
    answer = await site.request(messages({"type": "http.response.start", "status": 200}, chunk(), act=read))
    assert answer.headers == [(b"vary", b"Cookie")]


def put_and_take_back(session: Session) -> None:
    session["a"] = 1
    del session["a"]


def drop_everything(session: Session) -> None:
    session.clear()


def end_at_once(session: Session) -> None:
    session["a"] = 1
    session.invalidate()


@pytest.mark.parametrize("act", [put_and_take_back, drop_everything, end_at_once])
async def test_what_is_left_empty_is_not_stored(site: Site, act: Act) -> None:
    """A session that never was and holds nothing at the end stays without record and cookie."""
    answer = await site.request(page(act))
    assert site.log == ["app", "start 200", "body"]
    assert answer.cookies == []


async def test_any_method_of_the_model_begins_a_session(site: Site, browser: Browser) -> None:
    """A typed field that was set is content too."""
    await browser.open(page(lambda session: session.data.increment_message_count()))
    assert site.log == ["app", "create", "start 200", "body"]
    data = await site.store.get(browser.session_id)
    assert data is not None
    assert data.message_count == 1


# -- 2. with a cookie: the order of calls and messages -------------------------------------------------

OUT = "checkout+lock"


def nested(session: Session) -> None:
    session["nested"]["list"].append(1)


def typed(session: Session) -> None:
    session.data.thread_id = "t1"


def newer(session: Session) -> None:
    session["nested"] = {"list": [{"deep": True}]}


def method(session: Session) -> None:
    session.data.increment_message_count()


def there_and_back(session: Session) -> None:
    session["n"] = 1
    session["n"] = 0


LENGTH = (b"content-length", b"2")
NO_BODY = messages(start(200, [LENGTH]), act=write)
CHUNKS = (start(200, [LENGTH]), chunk(b"o", more=True), chunk(b"k"))
HINT: Message = {"type": "http.response.early_hint", "links": []}
FILE: Message = {"type": "http.response.pathsend", "path": "/srv/a"}

ORDERS: dict[str, tuple[ASGIApp, list[str]]] = {
    "untouched": (page(), [OUT, "app", "release", "start 200", "body"]),
    "read": (page(read), [OUT, "app", "release", "start 200", "body"]),
    "changed and changed back": (page(there_and_back), [OUT, "app", "release", "start 200", "body"]),
    "top-level change": (page(write), [OUT, "app", "commit+release", "start 200", "body"]),
    "nested change": (page(nested), [OUT, "app", "commit+release", "start 200", "body"]),
    "typed field": (page(typed), [OUT, "app", "commit+release", "start 200", "body"]),
    "a value for another": (page(newer), [OUT, "app", "commit+release", "start 200", "body"]),
    "a method of the model": (page(method), [OUT, "app", "commit+release", "start 200", "body"]),
    "a refusal by the app": (
        page(write, status=422),
        [OUT, "app", "commit+release", "start 422", "body"],
    ),
    "204": (
        messages(start(204), chunk(), act=write),
        [OUT, "app", "commit+release", "start 204", "body"],
    ),
    "304": (
        messages(start(304), chunk(), act=write),
        [OUT, "app", "commit+release", "start 304", "body"],
    ),
    "a start alone": (NO_BODY, [OUT, "app", "commit+release", "start 200"]),
    "a known length in chunks": (
        messages(*CHUNKS, act=write),
        [OUT, "app", "commit", "start 200", "more", "release", "body"],
    ),
    "a known length in chunks, untouched": (
        messages(*CHUNKS),
        [OUT, "app", "release", "start 200", "more", "body"],
    ),
    "a file the server sends": (
        messages(start(200, [LENGTH]), FILE, act=write),
        [OUT, "app", "commit+release", "start 200", "http.response.pathsend"],
    ),
    "an early hint": (
        messages(HINT, start(200, [LENGTH]), chunk(b"ok"), act=write),
        [OUT, "app", "http.response.early_hint", "commit+release", "start 200", "body"],
    ),
    "a stream, untouched": (stream(None, None), [OUT, "app", "release", "start 200", "more", "body"]),
    "a stream, read before": (
        stream(read, None, None),
        [OUT, "app", "release", "start 200", "more", "more", "body"],
    ),
    "a stream, changed before": (
        stream(write, None),
        [OUT, "app", "commit", "start 200", "more", "release", "body"],
    ),
    "a stream, changed before and during": (
        stream(write, typed, None),
        [OUT, "app", "commit", "start 200", "more", "more", "commit+release", "body"],
    ),
    "login": (
        page(login),
        [OUT, "app", "move", "start 200", "body"],
    ),
    "logout": (page(Session.logout), [OUT, "app", "discard", "start 200", "body"]),
    "cleared": (page(Session.clear), [OUT, "app", "discard", "start 200", "body"]),
    "logout with a last word": (
        page(add_and_log_out),
        [OUT, "app", "move", "start 200", "body"],
    ),
}


@pytest.mark.parametrize("name", ORDERS)
async def test_the_order_of_calls_and_messages(site: Site, browser: Browser, name: str) -> None:
    """Locked and loaded before the app, stored before the start, free before the last chunk."""
    app, expected = ORDERS[name]
    await browser.begin(n=0, nested={"list": []})
    await browser.open(app)
    assert site.log == expected
    assert site.locks == 0


@pytest.mark.parametrize(
    ("app", "expected"),
    [
        (messages(start(200), act=write), [OUT, "app", "commit+release", "start 200"]),
        (messages(start(200), chunk(), act=write), [OUT, "app", "commit+release", "start 200", "body"]),
        (messages(start(200), chunk()), [OUT, "app", "release", "start 200", "body"]),
    ],
)
async def test_head_has_a_known_length(
    site: Site, browser: Browser, app: ASGIApp, expected: list[str]
) -> None:
    """An answer to HEAD has no body to wait for: commit and release are one call."""
    await browser.begin()
    await browser.open(app, method="HEAD")
    assert site.log == expected


@pytest.mark.parametrize(
    ("app", "expected"),
    [
        (stream(write, None), [OUT, "app", "commit+release", "start 200", "more", "body"]),
        (stream(read, None), [OUT, "app", "release", "start 200", "more", "body"]),
        (messages(*CHUNKS, act=write), [OUT, "app", "commit+release", "start 200", "more", "body"]),
    ],
)
async def test_the_lock_can_go_when_the_response_starts(app: ASGIApp, expected: list[str]) -> None:
    """With `release_lock="response_start"` a long stream never keeps others waiting."""
    site = Site({"release_lock": "response_start"})
    browser = site.browser()
    await browser.begin()
    await browser.open(app)
    assert site.log == expected


LATE = {
    "an untouched stream": ({}, stream(None, write)),
    "an early release": ({"release_lock": "response_start"}, stream(read, write)),
    "a background task": ({}, page(then=write)),
    "a background task, typed": ({}, page(then=typed)),
    "after release()": ({}, page(Session.release, then=write)),
}


@pytest.mark.parametrize("name", LATE)
async def test_a_change_that_comes_too_late_is_an_error(name: str) -> None:
    """After the last chance to store it a change raises, and the error names the way out."""
    options, app = LATE[name]
    site = Site(options)
    browser = site.browser()
    await browser.begin(n=0)
    with pytest.raises(SessionClosedError, match=r"session\.transaction\(\)"):
        await browser.open(app)
    assert await browser.stored() == {"n": 0}
    assert site.locks == 0


async def test_a_stream_cannot_begin_a_session_after_its_start(site: Site) -> None:
    """The cookie could no longer be sent, so putting something in raises."""
    with pytest.raises(SessionClosedError):
        await site.request(stream(read, write))
    assert site.records() == []


async def test_a_changed_stream_shows_its_second_commit(browser: Browser) -> None:
    """What was changed between start and last chunk is stored as well."""
    await browser.begin(n=0)
    await browser.open(stream(write, lambda session: session.update(late=True)))
    assert await browser.stored() == {"n": 1, "late": True}


async def test_a_stream_that_begins_a_session_keeps_its_lock(site: Site, browser: Browser) -> None:
    """A new session is locked from its creation to the last chunk, and changes on the way are stored."""
    await browser.open(stream(write, lambda session: session.update(late=True)))
    assert site.log == ["app", "create+lock", "start 200", "more", "commit+release", "body"]
    assert await browser.stored() == {"n": 1, "late": True}


async def test_written_sessions_send_no_new_cookie(browser: Browser) -> None:
    """A write under the same id tells the client nothing."""
    await browser.begin()
    answer = await browser.open(page(write))
    assert answer.cookies == []
    assert answer.header("cache-control") == []
    assert answer.header("vary") == ["Cookie"]


# -- 5. ids --------------------------------------------------------------------------------------------


def regenerate(session: Session) -> None:
    session.regenerate_id()


@pytest.mark.parametrize(("act", "user"), [(login, "ada"), (regenerate, None)])
async def test_a_new_id_keeps_the_data_and_kills_the_old(
    site: Site, browser: Browser, act: Act, user: str | None
) -> None:
    """After login or regenerate the record is under an id never seen, and nothing is under the old one."""
    old = await browser.begin(cart="full")
    answer = await browser.open(page(act))
    assert len(answer.cookies) == 1
    assert COOKIE.fullmatch(answer.cookies[0].encode())
    assert browser.session_id != old
    assert await site.store.get(old) is None
    data = await site.store.get(browser.session_id)
    assert data is not None
    assert (data.metadata, data.user_id, data.session_id) == ({"cart": "full"}, user, browser.session_id)


def ended(session: Session) -> None:
    session.invalidate()
    assert session == {}
    assert session.data.user_id is None


def emptied(session: Session) -> None:
    session.clear()


async def test_what_begins_after_an_end_has_nothing_that_was_looked_at_before_it(
    site: Site, browser: Browser
) -> None:
    """A transaction looks for changes when it begins; what it saw then is not what is stored."""
    await browser.begin(old=1)

    async def begin_anew(session: Session) -> None:
        assert session.data.message_count == 0
        async with session.transaction() as data:
            session.invalidate()
            data.message_count = 1
            session["new"] = 2

    assert (await browser.open(page(begin_anew))).status == 200
    (record,) = site.records()
    assert (record.metadata, record.message_count) == ({"new": 2}, 1)


async def test_the_store_knows_nothing_more_of_a_session_that_its_app_has_ended(
    site: Site, browser: Browser
) -> None:
    """What is put into it by its old id does not begin the next one."""
    old = await browser.begin()

    async def end_and_update(session: Session) -> None:
        session.logout()
        assert not await site.store.update(old, {"n": 1})
        assert await site.store.increment_counter(old, "n") == 0

    answer = await browser.open(page(end_and_update))
    assert answer.cookies == [REMOVAL]
    assert site.records() == []


async def test_a_cookie_that_led_nowhere_is_not_removed(site: Site, browser: Browser) -> None:
    """A request begins a session and ends it: the client's cookie may be that of a sign-in meanwhile."""
    old = await browser.begin()
    await site.store.delete(old)

    async def begin_and_end(session: Session) -> None:
        session["n"] = 1
        await session.save()
        session.logout()

    answer = await browser.open(page(begin_and_end))
    assert (answer.status, answer.cookies) == (200, [])
    assert site.records() == []


async def test_who_ended_the_clients_session_removes_its_cookie_whatever_began_since(
    site: Site, browser: Browser
) -> None:
    """A request ends the session, begins another and ends that too: the client's cookie leads nowhere."""
    await browser.begin()

    async def end_begin_and_end(session: Session) -> None:
        session.logout()
        await session.save()
        session["n"] = 1
        await session.save()
        session.logout()

    answer = await browser.open(page(end_begin_and_end))
    assert (answer.status, answer.cookies) == (200, [REMOVAL])
    assert site.records() == []


async def test_the_store_waits_for_the_task_that_ends_the_session(site: Site, browser: Browser) -> None:
    """Whoever waited for a transaction in which the app ended the session finds it absent."""
    old = await browser.begin()

    async def end_while_another_waits(session: Session) -> None:
        ending = anyio.Event()

        async def update() -> None:
            await ending.wait()
            assert not await site.store.update(old, {"n": 1})

        async with anyio.create_task_group() as group:
            group.start_soon(update)
            async with session.transaction():
                ending.set()
                await anyio.wait_all_tasks_blocked()
                session.logout()

    answer = await browser.open(page(end_while_another_waits))
    assert answer.cookies == [REMOVAL]
    assert site.records() == []


@pytest.mark.parametrize("act", [ended, Session.logout, emptied])
async def test_an_ended_session_is_gone(site: Site, browser: Browser, act: Act) -> None:
    """The record is deleted and the client told to forget its cookie."""
    await browser.begin()
    await browser.open(page(login))
    answer = await browser.open(page(act))
    assert answer.cookies == [REMOVAL]
    assert answer.header("cache-control") == ["no-store"]
    assert site.records() == []


async def test_what_comes_after_the_end_is_a_new_session(site: Site, browser: Browser) -> None:
    """Values put in after logout start a session under a new id that inherits nothing."""
    old = await browser.begin(n=0)
    await browser.open(page(login))
    await browser.open(page(add_and_log_out))
    assert browser.session_id != old
    [data] = site.records()
    assert (data.metadata, data.user_id) == ({"flash": "bye"}, None)


def look(seen: list[Any]) -> Act:
    """An act that notes what the app sees."""

    def act(session: Session) -> None:
        seen.append((session.is_new, dict(session), session.data.user_id))

    return act


async def test_a_late_request_with_the_old_id_runs_anonymous(site: Site, browser: Browser) -> None:
    """It neither inherits the login nor logs the browser out: no data, no Set-Cookie."""
    seen: list[Any] = []
    await browser.begin(cart="full")
    late = browser.twin()
    await browser.open(page(login))
    answer = await late.open(page(look(seen)))
    assert seen == [(True, {}, None)]
    assert (answer.status, answer.cookies) == (200, [])
    assert site.events[-1] == "retired_session"


@pytest.mark.parametrize("app", [page(write), stream(write), stream(write, None), page(typed)])
async def test_a_late_change_under_the_old_id_is_refused(site: Site, browser: Browser, app: ASGIApp) -> None:
    """What cannot be stored is answered 409 without a cookie, never with a 2xx."""
    await browser.begin(cart="full")
    late = browser.twin()
    await browser.open(page(login))
    answer = await late.open(app)
    assert (answer.status, answer.cookies) == (409, [])
    assert len(site.records()) == 1


async def test_a_late_login_under_the_old_id_is_its_own_session(site: Site, browser: Browser) -> None:
    """Two logins from one page, as by a double click, both get a session."""
    await browser.begin(cart="full")
    late = browser.twin()
    await browser.open(page(login))
    answer = await late.open(page(lambda session: session.login("bob")))
    assert len(answer.cookies) == 1
    assert late.session_id != browser.session_id
    assert sorted((data.user_id, data.metadata.get("cart")) for data in site.records() if data.user_id) == [
        ("ada", "full"),
        ("bob", None),
    ]


async def test_a_replaced_id_is_remembered_for_a_minute(site: Site, browser: Browser) -> None:
    """Later it is an unknown id like any other, with which a new session can begin."""
    await browser.begin()
    late = browser.twin()
    await browser.open(page(login))
    site.clock.now += 59
    assert (await late.open(page(write))).status == 409
    site.clock.now += 2
    assert (await late.open(page(write))).status == 200
    assert site.events[-2:] == ["unknown_session", "session_created"]


@pytest.mark.parametrize(("act", "status"), [(read, 200), (write, 409)])
async def test_who_waited_for_a_replaced_id_is_late_too(
    site: Site, browser: Browser, act: Act, status: int
) -> None:
    """A request that waited for the lock while the holder logged in finds the id retired."""
    await browser.begin()
    late = browser.twin()
    answers: list[tuple[int, list[str]]] = []

    async def wait_in_line() -> None:
        answer = await late.open(page(act))
        answers.append((answer.status, answer.cookies))

    async def log_in_while_another_waits(session: Session) -> None:
        group.start_soon(wait_in_line)
        await anyio.wait_all_tasks_blocked()
        session.login("ada")

    async with anyio.create_task_group() as group:
        await browser.open(page(log_in_while_another_waits))
    assert answers == [(status, [])]
    assert site.locks == 0


async def test_unknown_ids_are_not_adopted(site: Site, browser: Browser) -> None:
    """A signed id without a record is never the id of a new session (fixation)."""
    old = await browser.begin()
    await site.store.delete(old)
    answer = await browser.open(page(write))
    assert answer.status == 200
    assert browser.session_id != old
    assert await site.store.get(old) is None
    assert site.events[0] == "unknown_session"


async def test_an_unknown_id_alone_changes_nothing(site: Site, browser: Browser) -> None:
    """An expired session that is only looked at answers like no session: no lock, no cookie."""
    await browser.begin()
    site.clock.now += 1209600
    answer = await browser.open(page(read))
    assert site.log == [OUT, "app", "start 200", "body"]
    assert answer.cookies == []


@pytest.mark.parametrize("act", [write, regenerate])
async def test_nothing_prolongs_the_absolute_time(site: Site, browser: Browser, act: Act) -> None:
    """`max_age` counts from the session's beginning, whatever is written and whichever id it has."""
    await browser.begin()
    site.clock.now += 1209000
    await browser.open(page(act))
    site.clock.now += 599
    assert await browser.stored() is not None
    site.clock.now += 1
    assert await browser.stored() is None


async def test_the_cookie_of_a_new_id_lives_as_long_as_the_session(site: Site, browser: Browser) -> None:
    """Max-Age shrinks by what has passed since the session began."""
    await browser.begin()
    site.clock.now += 1209000
    answer = await browser.open(page(regenerate))
    assert "; Max-Age=600;" in answer.cookies[0]


async def test_a_sign_in_starts_a_full_life(site: Site, browser: Browser) -> None:
    """What is left of the visitor's time is not the user's: `max_age` counts from the sign-in."""
    await browser.begin()
    site.clock.now += 1209000
    answer = await browser.open(page(login))
    assert "; Max-Age=1209600;" in answer.cookies[0]
    site.clock.now += 1209599
    assert await browser.stored() is not None
    site.clock.now += 1
    assert await browser.stored() is None


async def test_an_idle_timeout_restarts_with_each_request() -> None:
    """Any request keeps an idle session alive, up to its absolute end."""
    site = Site({"max_age": 100, "idle_timeout": 30})
    browser = site.browser()
    await browser.begin()
    for _ in range(4):
        site.clock.now += 20
        await browser.open(page())
    assert await browser.stored() is not None
    site.clock.now += 20
    assert await browser.stored() is None


async def test_an_idle_session_ends() -> None:
    """No request for `idle_timeout` seconds ends the session."""
    site = Site({"idle_timeout": 30})
    browser = site.browser()
    await browser.begin()
    site.clock.now += 30
    await browser.open(page())
    assert site.events == ["unknown_session"]


@pytest.mark.parametrize(
    "options", [{}, {"passive": "*"}, {"lock": False}], ids=["held", "passive", "no lock"]
)
async def test_touch_keeps_the_session_of_its_own_request_alive(options: dict[str, Any]) -> None:
    """A stream that goes on for longer than the idle timeout says that its user is there."""
    site = Site({"idle_timeout": 30, **options})
    browser = site.browser()
    await browser.begin(n=0)

    async def later(session: Session) -> None:
        site.clock.now += 25
        assert await site.store.touch(session.session_id)

    answer = await browser.open(stream(write, later, later, later))
    assert answer.status == 200
    assert await browser.stored() == {"n": 1}


async def test_the_new_id_keeps_the_idle_timeout() -> None:
    """A record that was moved by login still ends when nobody asks for it."""
    site = Site({"idle_timeout": 30})
    browser = site.browser()
    await browser.begin()
    await browser.open(page(login))
    site.clock.now += 30
    assert await browser.stored() is None


def cookie_of_age(seconds: float, session_id: str, key: str = KEY) -> str:
    """The cookie as the middleware signed it so long ago."""
    cookie = SessionCookie(key, clock=lambda: time.time() - seconds)
    return cookie.signer.sign(session_id)


@pytest.mark.parametrize(
    ("max_age", "age", "sent"),
    [(1000, 90, False), (1000, 110, True), (1209600, 3500, False), (1209600, 3700, True)],
)
async def test_a_rolling_cookie_is_sent_again_past_a_threshold(max_age: int, age: float, sent: bool) -> None:
    """Not with every answer: after a tenth of its time, at most an hour."""
    site = Site({"rolling": True, "max_age": max_age})
    browser = site.browser()
    session_id = await browser.begin()
    browser.cookie = cookie_of_age(age, session_id)
    answer = await browser.open(page())
    assert [f"Max-Age={max_age};" in line for line in answer.cookies] == ([True] if sent else [])
    assert browser.session_id == session_id


async def test_rolling_restarts_max_age() -> None:
    """Each request starts the time anew in the store."""
    site = Site({"rolling": True, "max_age": 100})
    browser = site.browser()
    await browser.begin()
    for _ in range(5):
        site.clock.now += 90
        await browser.open(page())
    assert await browser.stored() is not None
    site.clock.now += 100
    assert await browser.stored() is None


async def test_a_cookie_of_an_old_key_is_signed_anew(browser: Browser, site: Site) -> None:
    """During a rotation the answer carries the same id under the new key, for what is left of its time."""
    session_id = await browser.begin()
    site.clock.now += 600
    rotated = site.option(secret_key=KEY[::-1], secret_key_fallbacks=[KEY])
    answer = await browser.twin(site=rotated).open(page())
    [line] = answer.cookies
    assert line.startswith(f"session={session_id}.")
    assert "; Max-Age=1209000;" in line
    browser.take(answer)
    assert (await browser.twin(site=rotated).open(page())).cookies == []


async def test_a_removed_key_is_dead(browser: Browser, site: Site) -> None:
    """A cookie signed by a key that is no longer listed is no cookie of ours: no store call, one event."""
    await browser.begin()
    rotated = site.option(secret_key=KEY[::-1])
    answer = await browser.twin(site=rotated).open(page(read))
    assert site.log == ["app", "start 200", "body"]
    assert rotated.events == ["bad_signature"]
    assert answer.cookies == []


async def test_two_valid_ids_mean_anonymous(browser: Browser, site: Site) -> None:
    """Who sends two live sessions gets neither; each is looked at once, without its lock."""
    await browser.begin(who="victim")
    other = site.browser()
    await other.begin(who="attacker")
    seen: list[Any] = []
    await browser.open(page(look(seen)), headers=[(b"cookie", f"session={other.cookie}".encode())])
    assert seen == [(True, {}, None)]
    assert site.events == ["ambiguous_cookie"]
    assert site.log == ["checkout", "checkout", "app", "start 200", "body"]
    assert site.locks == 0


async def test_an_absurd_cookie_header_is_answered_400(site: Site) -> None:
    """More cookie bytes than any browser sends do not reach the app."""
    answer = await site.request(page(), headers=[(b"cookie", b"a=" + b"x" * 70_000)])
    assert (answer.status, answer.header("cache-control")) == (400, ["no-store"])
    assert site.log == ["start 400", "body"]


# -- 6. fingerprint ------------------------------------------------------------------------------------

STRANGERS: dict[str, dict[str, Any]] = {
    "another browser": {"user_agent": CHROME},
    "no user agent": {"user_agent": None},
    "another address": {"scope": {"client": ("203.0.113.8", 50000)}},
    "no address": {"scope": {"client": None}},
}


@pytest.mark.parametrize("name", STRANGERS)
async def test_a_stranger_gets_a_fresh_session(site: Site, browser: Browser, name: str) -> None:
    """The record is neither shown nor touched nor left locked, and an event tells of it."""
    session_id = await browser.begin(secret=1)
    before = site.raw(session_id)
    stranger = browser.twin(**STRANGERS[name])
    seen: list[Any] = []
    answer = await stranger.open(page(look(seen)))
    assert seen == [(True, {}, None)]
    assert site.log == [OUT, "release", "app", "start 200", "body"]
    assert site.events == ["fingerprint_mismatch"]
    assert answer.cookies == []
    assert site.raw(session_id) == before
    assert site.locks == 0


async def test_what_a_stranger_writes_is_a_session_of_its_own(site: Site, browser: Browser) -> None:
    """It gets a new id, and the record it came with stays as it was."""
    session_id = await browser.begin(secret=1)
    stranger = browser.twin(user_agent=CHROME)
    await stranger.open(page(write))
    assert stranger.session_id != session_id
    assert await browser.stored() == {"secret": 1}
    assert await stranger.stored() == {"n": 1}


async def test_a_stranger_cannot_end_the_session(browser: Browser) -> None:
    """Logout, clear and login from another client leave the record alone."""
    await browser.begin(secret=1)
    for act in (Session.logout, Session.clear, login):
        await browser.twin(user_agent=CHROME).open(page(act))
    assert await browser.stored() == {"secret": 1}


@pytest.mark.parametrize("name", STRANGERS)
async def test_a_stranger_may_be_reported_instead(name: str) -> None:
    """`on_mismatch="report"`: it is served and may write; app and log are told, once a request."""
    site = Site({"fingerprint": Fingerprint(on_mismatch="report")})
    browser = site.browser()
    await browser.begin(n=0)
    told: list[bool] = []

    async def act(session: Session) -> None:
        told.append(session.client_changed)
        async with session.transaction() as data:
            data.metadata["n"] += 1

    await browser.open(page(act))
    assert (told, site.events) == ([False], [])
    answer = await browser.twin(**STRANGERS[name]).open(page(act))
    assert (told, site.events) == ([False, True], ["fingerprint_mismatch"])
    assert answer.cookies == []
    assert await browser.stored() == {"n": 2}
    assert site.locks == 0


async def test_a_new_session_has_no_other_client() -> None:
    """The flag is of the record that is shown: after an end it is gone."""
    site = Site({"fingerprint": Fingerprint(on_mismatch="report")})
    browser = site.browser()
    await browser.begin(n=0)
    told: list[bool] = []

    async def act(session: Session) -> None:
        session.logout()
        await session.save()
        told.append(session.client_changed)

    await browser.twin(user_agent=CHROME).open(page(act))
    assert told == [False]


PROXY_HEADERS: list[tuple[dict[str, Any], list[tuple[bytes, bytes]], list[str]]] = [
    ({}, [(b"x-forwarded-for", b"203.0.113.9")], ["untrusted_proxy"]),
    ({}, [(b"forwarded", b"for=203.0.113.9")], ["untrusted_proxy"]),
    ({}, [(b"x-forwarded-for", b"203.0.113.7, 10.0.0.1")], []),  # the server has put the client in its place
    ({}, [(b"forwarded", b'for="203.0.113.7:80"')], []),
    ({}, [(b"x-forwarded-proto", b"https")], []),
    ({"trusted_proxies": ["10.0.0.0/8"]}, [(b"x-forwarded-for", b"203.0.113.9")], []),
    ({"fingerprint": None}, [(b"x-forwarded-for", b"203.0.113.9")], []),
    ({"fingerprint": Fingerprint(ip=False)}, [(b"x-forwarded-for", b"203.0.113.9")], []),
]


@pytest.mark.parametrize(("options", "headers", "told"), PROXY_HEADERS)
async def test_proxy_headers_that_nobody_believes_are_told_of(
    options: dict[str, Any], headers: Headers, told: list[str]
) -> None:
    """Once, with the remedy: else all clients of a proxy share one address, and nobody notices."""
    site = Site({**options})
    for _ in range(3):
        await site.request(page(), headers=headers, client=("203.0.113.7", 1))
    assert site.events == told


async def test_a_browser_update_keeps_the_session(browser: Browser) -> None:
    """Version numbers in the user agent do not count."""
    await browser.begin(n=0)
    seen: list[Any] = []
    await browser.twin(user_agent=FIREFOX.replace("140", "141")).open(page(look(seen)))
    assert seen == [(False, {"n": 0}, None)]


@pytest.mark.parametrize(
    ("option", "twin"),
    [
        (None, {"user_agent": CHROME, "scope": {"client": ("198.51.100.1", 1)}}),
        (Fingerprint(ip=False), {"scope": {"client": ("198.51.100.1", 1)}}),
        (Fingerprint(user_agent=False), {"user_agent": CHROME}),
    ],
)
async def test_what_is_not_asked_for_is_not_compared(
    option: Fingerprint | None, twin: dict[str, Any]
) -> None:
    """A fingerprint that is off, or leaves something out, lets that change."""
    site = Site({"fingerprint": option})
    browser = site.browser()
    await browser.begin(n=0)
    await browser.twin(**twin).open(page(write))
    assert await browser.stored() == {"n": 1}


@pytest.mark.parametrize(("peer", "same"), [("10.0.0.1", True), ("198.51.100.1", False)])
async def test_only_trusted_proxies_say_who_the_client_is(peer: str, same: bool) -> None:
    """Behind a trusted proxy the address it names counts; anybody else's word is no evidence."""
    site = Site({"trusted_proxies": ["10.0.0.0/8"]})
    browser = site.browser(client=("10.9.9.9", 1), headers=[(b"x-forwarded-for", b"203.0.113.7")])
    await browser.begin(n=0)
    seen: list[Any] = []
    await browser.twin(scope={**browser.scope, "client": (peer, 1)}).open(page(look(seen)))
    assert seen == [(False, {"n": 0}, None) if same else (True, {}, None)]


@pytest.mark.parametrize("act", [login, regenerate, add_and_log_out])
async def test_a_new_id_is_bound_to_the_same_client(site: Site, browser: Browser, act: Act) -> None:
    """Whatever a record's way into the store, it carries its client's fingerprint."""
    await browser.begin(n=0)
    await browser.open(page(act))
    seen: list[Any] = []
    await browser.twin(user_agent=CHROME).open(page(look(seen)))
    assert seen == [(True, {}, None)]


# -- 7. what is not ours -------------------------------------------------------------------------------

OTHER = Shop(session_id="0" * 32, metadata={"secret": 1}).to_json().encode()
FOREIGN = {
    "truncated": b'{"session_id": "x", "meta',
    "not JSON": b"\x80\x04pickled",
    "empty": b"",
    "null": b"null",
    "another session's": OTHER,
    "another model's": b'{"session_id": "ID", "message_count": "many"}',
}


@pytest.mark.parametrize("name", FOREIGN)
async def test_a_record_that_is_not_ours_is_left_alone(site: Site, browser: Browser, name: str) -> None:
    """The request runs with a fresh session; the record stays, unlocked, for whoever can explain it."""
    session_id = await browser.begin()
    raw = FOREIGN[name].replace(b"ID", session_id.encode())
    site.spoil(session_id, raw)
    seen: list[Any] = []
    answer = await browser.open(page(look(seen)))
    assert seen == [(True, {}, None)]
    taken = [OUT, "release"] if "release" in site.log else [OUT]  # a store may see for itself whose it is
    assert site.log == [*taken, "app", "start 200", "body"]
    assert site.events == ["unreadable_record"]
    assert (answer.status, answer.cookies, site.locks) == (200, [], 0)
    await browser.open(page(write))
    assert browser.session_id != session_id
    assert site.raw(session_id) == raw


@pytest.mark.parametrize(
    ("field", "value"),
    [("created_at", "yesterday"), ("user_id", "a b;--"), ("fingerprint", "zz"), ("message_count", -1)],
)
async def test_a_record_with_one_impossible_value_is_not_ours(
    site: Site, browser: Browser, field: str, value: object
) -> None:
    """What looks like a record in all but one field is not shown either, however the app looks at it."""
    session_id = await browser.begin(secret=1)
    site.spoil(session_id, json.dumps({**json.loads(site.raw(session_id)), field: value}).encode())
    seen: list[Any] = []
    await browser.open(page(lambda session: seen.append(session.get("secret"))))
    assert seen == [None]
    assert site.events == ["unreadable_record"]
    assert site.locks == 0


# -- 8. save, release, transaction, routes -------------------------------------------------------------


class Before(SessionData):
    """A release's model."""

    cart: list[int] = []  # noqa: RUF012  # pydantic copies defaults
    plan: str = ""


class After(SessionData):
    """The next one's, which cannot read that."""

    cart: dict[str, int] = {}  # noqa: RUF012  # pydantic copies defaults
    plan: str = ""


async def test_a_model_that_cannot_read_old_records_is_told_of(caplog: pytest.LogCaptureFixture) -> None:
    """Everybody is signed out: a warning with model and field, once, and an event each time; no value."""
    told: list[SessionEvent] = []
    old = Site({"model": Before})
    browsers = [old.browser() for _ in range(3)]
    for browser in browsers:
        await browser.open(page(lambda session: setattr(session.data, "cart", [4711])))
    new = old.option(model=After, on_event=told.append)
    caplog.set_level("INFO", "asgi_sessions")
    for browser in browsers:
        await replace(browser, site=new).open(page(lambda session: session.get("n")))
    details = {"model": "After", "field": "cart", "problem": "dict_type"}
    assert [event.name for event in told] == ["unreadable_record"] * 3
    assert [details.items() <= event.details.items() for event in told] == [True] * 3
    lines = [record for record in caplog.records if "unreadable_record" in record.message]
    assert [record.levelname for record in lines] == ["WARNING", "INFO", "INFO"]
    assert "model='After' field='cart'" in lines[0].message
    assert "4711" not in caplog.text
    new.store.model = After
    with pytest.raises(SessionStoreError, match=r"cannot be read as After: cart \(dict_type\)"):
        await new.store.get(browsers[0].session_id)


async def test_save_stores_now_and_keeps_the_lock(site: Site, browser: Browser) -> None:
    """A change after save() is stored with the response."""
    await browser.begin(n=0)

    async def act(session: Session) -> None:
        session["n"] = 1
        await session.save()
        assert await browser.stored() == {"n": 1}
        session["n"] = 2

    await browser.open(page(act))
    assert site.log == [OUT, "app", "commit", "commit+release", "start 200", "body"]
    assert await browser.stored() == {"n": 2}


async def test_save_can_begin_a_session(site: Site, browser: Browser) -> None:
    """A session that was saved before the response still sends its cookie with it."""

    async def act(session: Session) -> None:
        session["n"] = 1
        await session.save()

    await browser.open(page(act))
    assert site.log == ["app", "create+lock", "release", "start 200", "body"]
    assert await browser.stored() == {"n": 1}


async def test_release_lets_the_next_request_in(site: Site, browser: Browser) -> None:
    """After release() another request has its turn while this one goes on."""
    await browser.begin(n=0)

    async def act(session: Session) -> None:
        session["n"] = 1
        await session.release()
        await browser.twin().open(page(lambda session: session.update(m=2)))

    await browser.open(page(act))
    assert await browser.stored() == {"n": 1, "m": 2}


async def test_a_transaction_in_the_request_keeps_its_lock(site: Site, browser: Browser) -> None:
    """In the request that holds the session the block is stored at once, under the lock it has."""
    await browser.begin(n=0)

    async def act(session: Session) -> None:
        async with session.transaction() as data:
            data.metadata["n"] = 1

    await browser.open(page(act))
    assert site.log == [OUT, "app", "commit", "release", "start 200", "body"]


@pytest.mark.parametrize("through", ["session", "store"])
async def test_a_list_in_a_typed_field_changed_in_a_transaction(through: str) -> None:
    """Also what no assignment announces is stored, where nothing else looked at the session."""
    site = Site({"model": Shop})
    browser = site.browser()
    session_id = await browser.begin()

    async def act(session: Session) -> None:
        block = session.transaction() if through == "session" else site.store.transaction(session_id)
        async with block as data:
            assert isinstance(data, Shop)
            data.cart.append("apple")

    await browser.open(page(act))
    data = await site.store.get(session_id)
    assert isinstance(data, Shop)
    assert data.cart == ["apple"]


async def test_a_failed_transaction_rolls_back_its_block_only(browser: Browser) -> None:
    """What was changed before the block is stored with the response, what the block did is not."""
    await browser.begin(n=0)

    async def act(session: Session) -> None:
        session["before"] = 1
        with pytest.raises(ZeroDivisionError):
            await broken(session)

    async def broken(session: Session) -> None:
        async with session.transaction() as data:
            data.metadata["n"] = 1
            session["n"] /= 0

    await browser.open(page(act))
    assert await browser.stored() == {"n": 0, "before": 1}


async def test_a_background_task_transacts(site: Site, browser: Browser) -> None:
    """After the response a transaction takes the lock anew and sees the newest record."""
    await browser.begin(n=0)

    async def later(session: Session) -> None:
        await browser.twin().open(page(write))
        async with session.transaction() as data:
            assert data.metadata == {"n": 1}
            data.metadata["n"] = 2

    await browser.open(page(read, then=later))
    assert site.log[-2:] == [OUT, "commit+release"]
    assert await browser.stored() == {"n": 2}


async def test_the_background_sees_what_its_transaction_stored(browser: Browser) -> None:
    """After the block the handle shows the record as committed, and is closed again."""
    await browser.begin(n=0)

    async def later(session: Session) -> None:
        async with session.transaction():
            session["n"] = 1
        assert session["n"] == 1
        with pytest.raises(SessionClosedError):
            session["n"] = 2

    await browser.open(page(then=later))
    assert await browser.stored() == {"n": 1}


async def test_a_failed_background_transaction_shows_what_is_stored(browser: Browser) -> None:
    """After a block that raised, the handle is back at the record as it was loaded under the lock."""
    await browser.begin(n=0)

    async def block(session: Session) -> None:
        async with session.transaction() as data:
            data.metadata["n"] = 2
            raise ZeroDivisionError

    async def later(session: Session) -> None:
        await browser.twin().open(page(write))
        with pytest.raises(ZeroDivisionError):
            await block(session)
        assert session == {"n": 1}

    await browser.open(page(read, then=later))
    assert await browser.stored() == {"n": 1}


async def test_a_background_task_cannot_begin_a_session(site: Site) -> None:
    """No cookie can be sent any more, so there is no session to transact on."""

    async def later(session: Session) -> None:
        async with session.transaction():
            pass

    with pytest.raises(SessionClosedError, match="cookie"):
        await site.request(page(then=later))
    assert site.records() == []


@pytest.fixture
def reading() -> Site:
    return Site({"read_only": ["/ro"]})


async def test_a_read_only_route_takes_no_lock(reading: Site) -> None:
    """It loads the record, waits for nobody and lets nothing go."""
    browser = reading.browser()
    await browser.begin(n=0)
    seen: list[Any] = []
    await browser.open(page(look(seen)), path="/ro")
    assert seen == [(False, {"n": 0}, None)]
    assert reading.log == ["checkout", "app", "start 200", "body"]


async def test_a_read_only_route_does_not_wait_for_a_holder(reading: Site) -> None:
    """It is answered while another request holds the lock."""
    browser = reading.browser()
    await browser.begin(n=0)
    statuses: list[int] = []

    async def act(session: Session) -> None:
        statuses.append((await browser.twin().open(page(read), path="/ro")).status)

    await browser.open(page(act))
    assert statuses == [200]


@pytest.mark.parametrize("begun", [True, False])
@pytest.mark.parametrize("app", [page(write), page(login), page(Session.logout), page(typed), stream(write)])
async def test_a_change_on_a_read_only_route_is_an_error(reading: Site, app: ASGIApp, begun: bool) -> None:
    """It raises where it is made, with and without a session, and nothing is sent."""
    browser = reading.browser()
    if begun:
        await browser.begin(n=0)
    with pytest.raises(ReadOnlySessionError, match=r"session\.transaction\(\)"):
        await browser.open(app, path="/ro")
    assert "start 200" not in reading.log


async def test_a_nested_change_on_a_read_only_route_is_loud(reading: Site) -> None:
    """What cannot be noticed when it is made raises before the answer leaves."""
    browser = reading.browser()
    await browser.begin(nested={"list": []})
    with pytest.raises(ReadOnlySessionError):
        await browser.open(page(nested), path="/ro")
    assert await browser.stored() == {"nested": {"list": []}}


@pytest.mark.parametrize("begun", [True, False])
async def test_a_transaction_on_a_read_only_route(reading: Site, begun: bool) -> None:
    """It takes the lock for the block; a session that begins in it sends its cookie."""
    browser = reading.browser()
    if begun:
        await browser.begin(n=0)

    async def act(session: Session) -> None:
        async with session.transaction() as data:
            data.metadata["n"] = 1
        with pytest.raises(ReadOnlySessionError):
            session["n"] = 2

    answer = await browser.open(page(act), path="/ro")
    assert len(answer.cookies) == (not begun)
    assert await browser.stored() == {"n": 1}
    assert reading.locks == 0


@pytest.mark.parametrize(("exclude", "excluded"), [(["/static/*"], True), (["/other"], False)])
async def test_excluded_paths_have_no_session(exclude: list[str], excluded: bool) -> None:
    """The middleware passes them through; asking for the session there says so."""
    site = Site({"exclude": exclude, "model": Shop})

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        assert ("session" not in scope) is excluded
        if excluded:
            with pytest.raises(RuntimeError, match="exclude"):
                get_session(scope)
        else:
            assert get_session_data(Request(scope), Shop).cart == []
        await send(start(204))
        await send(chunk())

    await site.request(app, path="/static/app.js")


INSIDE: dict[str, Callable[[Site, str], Any]] = {
    "update": lambda site, session_id: site.store.update(session_id, {"n": 1}),
    "increment": lambda site, session_id: site.store.increment_counter(session_id, "n"),
}


@pytest.mark.parametrize("name", INSIDE)
async def test_the_store_acts_on_the_record_that_the_request_holds(
    site: Site, browser: Browser, name: str
) -> None:
    """No dead-lock with ourselves: the handle shows the change and the response stores it with its own."""
    session_id = await browser.begin(n=0)

    async def act(session: Session) -> None:
        session["mine"] = True
        await INSIDE[name](site, session_id)
        assert session["n"] == 1

    await browser.open(page(act))
    assert site.log == [OUT, "app", "commit+release", "start 200", "body"]
    assert await browser.stored() == {"n": 1, "mine": True}


async def test_after_the_response_the_store_takes_its_turn(site: Site, browser: Browser) -> None:
    """What a background task does through the store is a transaction of its own."""
    session_id = await browser.begin(n=0)

    async def later(session: Session) -> None:
        assert await site.store.increment_counter(session_id, "n") == 2

    await browser.open(page(write, then=later))
    assert site.log[-2:] == [OUT, "commit+release"]
    assert await browser.stored() == {"n": 2}


async def test_a_transaction_of_the_store_in_the_request_can_fail(site: Site, browser: Browser) -> None:
    """An exception in the block takes back what the block did to the record that the request holds."""
    session_id = await browser.begin(n=0)

    async def act(session: Session) -> None:
        session["mine"] = True
        with pytest.raises(ZeroDivisionError):
            await broken()

    async def broken() -> None:
        async with site.store.transaction(session_id) as data:
            assert data is not None
            data.metadata["n"] = 1
            data.message_count = 1 // 0

    await browser.open(page(act))
    assert await browser.stored() == {"n": 0, "mine": True}


async def test_a_request_leaves_nothing_in_the_context_of_its_task(browser: Browser) -> None:
    """A server may serve many requests from one task."""
    await browser.open(page(write))
    assert running.get() == ()


async def test_touching_the_held_session_is_stored_with_it(site: Site, browser: Browser) -> None:
    """`touch` on the session that the request holds notes activity in its record."""
    session_id = await browser.begin(n=0)
    before = await site.store.get(session_id)

    async def act(session: Session) -> None:
        assert await site.store.touch(session_id) is True

    await browser.open(page(act))
    after = await site.store.get(session_id)
    assert before is not None
    assert after is not None
    assert after.last_activity > before.last_activity


async def test_counting_from_many_requests_loses_nothing(site: Site, browser: Browser) -> None:
    """Increments by the store and by requests that hold the session add up."""
    session_id = await browser.begin(n=0)

    async def through_store(session: Session) -> None:
        await site.store.increment_counter(session_id, "n")

    async def through_handle(session: Session) -> None:
        value = session["n"]
        await checkpoint()
        session["n"] = value + 1

    async with anyio.create_task_group() as group:
        for act in (through_store, through_handle) * 10:
            group.start_soon(browser.twin().open, page(act))
        for _ in range(10):
            group.start_soon(site.store.increment_counter, session_id, "n")
    assert await browser.stored() == {"n": 30}
    assert site.locks == 0


async def test_nested_middleware_with_one_cookie_and_store_is_one(site: Site) -> None:
    """The inner one lets the outer one's session through."""
    inner_app = page(write)
    inner = SessionMiddleware(inner_app, KEY, store=site.store)
    answer = await site.request(inner)
    assert site.log == ["app", "create", "start 200", "body"]
    assert len(answer.cookies) == 1


async def test_two_cookies_are_two_sessions(site: Site) -> None:
    """Middlewares with different cookies each keep their own, also in one store."""
    sessions: list[Session] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        sessions.append(scope["session"])
        scope["session"]["n"] = 2
        await page()(scope, receive, send)

    inner = SessionMiddleware(app, KEY, session_cookie="admin", store=site.store)

    async def outer(scope: Scope, receive: Receive, send: Send) -> None:
        sessions.append(scope["session"])
        scope["session"]["n"] = 1
        await inner(scope, receive, send)

    answer = await site.request(outer)
    assert [line.partition("=")[0] for line in answer.cookies] == ["admin", "session"]
    assert sessions[0] is not sessions[1]
    assert sorted(data.metadata["n"] for data in site.records()) == [1, 2]
    again = await site.request(
        outer,
        headers=[(b"cookie", line.partition(";")[0].encode()) for line in answer.cookies],
    )
    assert again.cookies == []
    assert len(site.records()) == 2


async def test_the_store_knows_every_session_that_the_request_holds(site: Site) -> None:
    """Behind two middlewares the outer one's session is held too: no dead-lock from within."""
    ids: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await site.store.update(ids[-1], {"n": 2})
        scope["session"]["inner"] = True
        await page()(scope, receive, send)

    inner = SessionMiddleware(app, KEY, session_cookie="admin", store=site.store)

    async def outer(scope: Scope, receive: Receive, send: Send) -> None:
        ids.append(scope["session"].session_id)
        await inner(scope, receive, send)

    browser = site.browser()
    session_id = await browser.begin(n=0)
    await browser.open(outer)
    assert ids == [session_id]
    assert await browser.stored() == {"n": 2}


async def test_without_locks_nobody_waits(browser: Browser) -> None:
    """With `lock=False` two requests run at once; the later commit of the two is refused."""
    site = Site({"lock": False})
    browser = site.browser()
    await browser.begin(n=0)
    inner: list[int] = []

    async def act(session: Session) -> None:
        session["n"] = 2
        inner.append((await browser.twin().open(page(write))).status)

    answer = await browser.open(page(act))
    assert (inner, answer.status) == ([200], 409)
    assert await browser.stored() == {"n": 1}
    assert "checkout+lock" not in site.log


@pytest.mark.parametrize(("path", "status"), [("/", 409), ("/ro", 200)])
async def test_a_session_that_moves_away_under_an_unlocked_request(path: str, status: int) -> None:
    """A transaction that comes after another request's login is refused; the browser stays logged in.

    On the read-only route the refused block was all, elsewhere its change still waits for the response.
    """
    site = Site({"lock": False, "read_only": ["/ro"]})
    browser = site.browser()
    await browser.begin(n=0)
    late = browser.twin()

    async def act(session: Session) -> None:
        await browser.open(page(login))
        with pytest.raises(SessionConflictError):
            async with session.transaction() as data:
                data.metadata["n"] = 1

    answer = await late.open(page(act), path=path)
    assert (answer.status, answer.cookies) == (status, [])


@pytest.mark.parametrize("app", [page(write), stream(write, None), page(login)])
async def test_an_unlocked_request_that_ends_after_a_login_is_late(app: ASGIApp) -> None:
    """Its change is answered 409, and its answer does not take the new session's cookie away."""
    site = Site({"lock": False})
    browser = site.browser()
    await browser.begin(n=0)
    late = browser.twin()

    async def overtaken(scope: Scope, receive: Receive, send: Send) -> None:
        await browser.open(page(login))
        await app(scope, receive, send)

    answer = await late.open(overtaken)
    assert (answer.status, answer.cookies) == (409, [])
    assert len(site.records()) == 1


# -- 10. event loops and lifespan ----------------------------------------------------------------------


async def count(request: Request) -> JSONResponse:
    request.session["n"] = request.session.get("n", 0) + 1
    return JSONResponse(request.session)


def count_in_a_thread(request: Request) -> JSONResponse:
    request.session["n"] = request.session.get("n", 0) + 1
    data = get_session_data(request, Shop)
    data.cart.append("apple")
    return JSONResponse({"n": request.session["n"], "cart": data.cart})


def starlette_app() -> SessionMiddleware:
    app = Starlette(routes=[Route("/", count), Route("/thread", count_in_a_thread)])
    return SessionMiddleware(app, KEY, model=Shop)


def test_one_middleware_serves_several_loops() -> None:
    """Loops opened one after the other share the sessions, contention in each of them included."""
    site = Site()
    browser = site.browser()

    async def visit(times: int) -> None:
        async def act(session: Session) -> None:
            value = session.get("n", 0)
            await asyncio.sleep(0)
            session["n"] = value + 1

        if browser.cookie is None:
            await browser.begin(n=0)
        await asyncio.gather(*(browser.twin().open(page(act)) for _ in range(times)))

    asyncio.run(visit(3))
    asyncio.run(visit(4))
    assert site.records()[0].metadata == {"n": 7}
    assert site.locks == 0


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_a_test_client_opens_a_loop_per_call(backend: Any) -> None:
    """Without its context manager each call runs in a loop of its own."""
    client = TestClient(starlette_app(), backend=backend)
    assert [client.get("/").json()["n"] for _ in range(3)] == [1, 2, 3]


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_a_test_client_in_its_context(backend: Any) -> None:
    """With lifespan, twice, the sessions live as long as the middleware."""
    app = starlette_app()
    with TestClient(app, backend=backend) as client:
        assert client.get("/").json() == {"n": 1}
        cookies = client.cookies
    with TestClient(app, backend=backend, cookies=cookies) as client:
        assert client.get("/").json() == {"n": 2}


def test_plain_functions_run_in_threads() -> None:
    """Everything synchronous about the handle can be used from the thread pool."""
    client = TestClient(starlette_app())
    client.get("/thread")
    assert client.get("/thread").json() == {"n": 2, "cart": ["apple", "apple"]}


LIFESPANS = {
    "all is well": ["lifespan.startup.complete", "lifespan.shutdown.complete"],
    "start-up fails": ["lifespan.startup.failed"],
    "shut-down fails": ["lifespan.startup.complete", "lifespan.shutdown.failed"],
}


@pytest.mark.parametrize("name", LIFESPANS)
async def test_lifespan_messages_pass_exactly(site: Site, name: str) -> None:
    """What the app says at start-up and shut-down, failures included, reaches the server as it is.

    The store is open before the app hears of the start-up, and closed before the server hears of the end.
    """
    said: list[Message] = [{"type": kind, "message": "of the app"} for kind in LIFESPANS[name]]
    asked = iter([{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}])
    heard: list[Message] = []
    sent: list[Message] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        assert "session" not in scope
        for message in said:
            heard.append(await receive())
            await send(message)

    async def receive() -> Message:
        return next(asked)

    async def send(message: Message) -> None:
        sent.append(message)
        site.log.append(message["type"])

    await SessionMiddleware(app, KEY, store=site.store)({"type": "lifespan"}, receive, send)
    assert sent == said
    told = [kind for kind in LIFESPANS[name] if "shutdown" not in kind]
    assert site.log == ["open", *told, "close", *LIFESPANS[name][len(told) :]]
    assert [message["type"] for message in heard] == ["lifespan.startup", "lifespan.shutdown"][: len(said)]


async def test_a_shared_store_is_closed_with_its_last_app(site: Site) -> None:
    """An app that ends does not take the store from under another one that goes on."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await send({"type": "lifespan.shutdown.complete"})

    ends = [anyio.Event(), anyio.Event()]

    async def reached(entry: str) -> None:
        with anyio.fail_after(5):
            while entry not in site.log:  # noqa: ASYNC110  # the log sets no events
                await anyio.sleep(0.001)

    async def live(number: int) -> None:
        async def receive() -> Message:
            await ends[number].wait()
            return {"type": "lifespan.shutdown"}

        async def send(message: Message) -> None:
            site.log.append(f"{number} {message['type']}")

        await SessionMiddleware(app, KEY, store=site.store)({"type": "lifespan"}, receive, send)

    async with anyio.create_task_group() as group:
        for number in range(len(ends)):
            group.start_soon(live, number)
            await reached(f"{number} lifespan.startup.complete")
        for number, end in enumerate(ends):
            end.set()
            await reached(f"{number} lifespan.shutdown.complete")
    assert [entry.replace("lifespan.", "") for entry in site.log] == [
        "open",
        "0 startup.complete",
        "open",
        "1 startup.complete",
        "0 shutdown.complete",
        "close",
        "1 shutdown.complete",
    ]


async def test_an_app_without_lifespan_says_so(site: Site) -> None:
    """Its exception reaches the server, which takes it as the answer it is."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        raise AssertionError("http only")

    async def send(message: Message) -> None:
        pytest.fail("nothing to send")

    with pytest.raises(AssertionError, match="http only"):
        await SessionMiddleware(app, KEY, store=site.store)({"type": "lifespan"}, empty_body, send)
    assert site.log == ["open", "close"]


async def test_unknown_scope_types_pass_through(site: Site) -> None:
    """What is neither http nor websocket is the app's own matter."""
    seen: list[Scope] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope)

    async def send(message: Message) -> None:
        pytest.fail("nothing to send")

    scope = http_scope(type="tests.other")
    await SessionMiddleware(app, KEY, store=site.store)(scope, empty_body, send)
    assert seen == [scope]
    assert "session" not in scope
    assert site.log == []
