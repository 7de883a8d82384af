"""`import_cookies`: sessions in cookies that Starlette's own middleware made are taken over."""

from __future__ import annotations

import json
import time
from base64 import b64encode
from typing import Any

import anyio
import pytest
from asgi import FIREFOX, KEY, Answer, Site, page, stream
from itsdangerous import TimestampSigner
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.sessions import SessionMiddleware as StarletteMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from asgi_sessions import Session, SessionMiddleware, SessionStore, StarletteCookies
from asgi_sessions.asgi import Message, Receive, Scope, Send

pytestmark = pytest.mark.anyio

OLD_KEY = "the key of the old middleware, which was a secret"
USER = {"user": {"name": "Ada"}, "cart": [1, 2.5, None, "ü"], "n": 0}
LOCKS = (True, "auto", False)


@pytest.fixture
def anyio_backend(way: str) -> str:
    """Each event loop, each store that needs no server."""
    return way


async def echo(request: Request) -> JSONResponse:
    """Replaces the session by the body of a POST; answers what is in it."""
    if request.method == "POST":
        request.session.clear()
        request.session.update(await request.json())
    return JSONResponse(dict(request.session))


def starlette(key: str = OLD_KEY, name: str = "session", **options: Any) -> TestClient:
    """An app with Starlette's own middleware, and a browser at it."""
    old = Middleware(StarletteMiddleware, secret_key=key, session_cookie=name, **options)
    return TestClient(Starlette(routes=[Route("/", echo, methods=["GET", "POST"])], middleware=[old]))


def old_cookie(values: Any = None, **options: Any) -> str:
    """What Starlette's middleware gives a browser for these values."""
    client = starlette(**options)
    client.post("/", json=USER if values is None else values)
    return str(client.cookies[options.get("name", "session")])


def signed(text: str) -> str:
    """A cookie that no session of Starlette's gives, under its key."""
    return TimestampSigner(OLD_KEY).sign(b64encode(text.encode())).decode()


def moved(name: str = "session", **options: Any) -> Site:
    """The app after the move."""
    return Site({"import_cookies": StarletteCookies(OLD_KEY, name), **options})


async def visit(site: Site, *cookies: str, app: Any = None, **scope: Any) -> Answer:
    """One request with these cookies."""
    headers = [
        (b"user-agent", scope.pop("agent", FIREFOX).encode()),
        (b"cookie", "; ".join(cookies).encode()),
    ]
    return await site.request(app or page(), headers=headers, **scope)


def sessions(site: Site) -> list[dict[str, Any]]:
    """The values of all live sessions, without the notes about cookies."""
    return [dict(data.metadata) for data in site.records() if "leads_to" not in data.metadata]


class Seen(list[Any]):
    """What a session held at each visit: to be given to `page`."""

    def __call__(self, session: Session) -> None:
        self.append(dict(session))


# --- what is taken over -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["session", "sid"])
@pytest.mark.parametrize("lock", LOCKS)
async def test_nobody_is_signed_out(lock: Any, name: str) -> None:
    """A GET that writes nothing has the old values, and its answer brings our cookie; without any warning."""
    site, found = moved(name, lock=lock), Seen()
    browser, old = site.browser(), f"{name}={old_cookie(name=name)}"
    answer = await visit(site, old, app=page(found))
    assert answer.status == 200
    assert found == [USER]
    assert sessions(site) == [USER]
    browser.take(answer)
    await browser.open(page(lambda session: session.update(n=1)), headers=[])
    await browser.open(page(found))
    assert found[1:] == [{**USER, "n": 1}]
    assert site.events == ["imported"]
    assert site.locks == 0


async def test_signing_in_before_the_move_gives_no_other_id() -> None:
    """`rotate_on` looks at changes: who was signed in is no news. A sign-in after the move is."""
    site = moved()
    browser = site.browser()
    browser.take(await visit(site, f"session={old_cookie()}"))
    first = browser.session_id
    await browser.open(page(lambda session: session.update(n=1)))
    assert browser.session_id == first
    await browser.open(page(lambda session: session.update(user={"name": "Eve"})))
    assert browser.session_id != first


async def test_the_session_lives_on_like_any_other() -> None:
    """A full life begins, bound to the client that brought the cookie."""
    site = moved(max_age=100)
    browser = site.browser()
    browser.take(await visit(site, f"session={old_cookie()}"))
    thief = browser.twin(user_agent="curl/8")
    await thief.open(page())
    assert site.events[-1] == "fingerprint_mismatch"
    site.clock.now += 99
    assert await browser.stored() == USER
    site.clock.now += 1
    assert await browser.stored() is None


@pytest.mark.parametrize("lock", LOCKS)
@pytest.mark.parametrize("name", ["session", "sid"])
async def test_a_page_with_six_requests_is_one_session(lock: Any, name: str) -> None:
    """Each request comes with the old cookie, and each one's change is there: one way or the other."""
    site = moved(name, lock=lock)
    old = f"{name}={old_cookie(name=name)}"
    answers: list[Answer] = []

    async def load(number: int) -> None:
        method, write = (
            "POST" if number % 2 else "GET",
            page(lambda session: session.update({str(number): 1})),
        )
        answer = await visit(site, old, app=write, method=method)
        while answer.status == 409:  # lock=False: the client tries again
            answer = await visit(site, old, app=write, method=method)
        answers.append(answer)

    async with anyio.create_task_group() as tasks:
        for number in range(6):
            tasks.start_soon(load, number)
    assert [answer.status for answer in answers] == [200] * 6
    ids = {answer.cookies[-1].partition("=")[2].partition(".")[0] for answer in answers}
    assert len(ids) == 1
    assert sessions(site) == [{**USER, **{str(number): 1 for number in range(6)}}]
    assert site.events.count("imported") == 1
    assert site.locks == 0


async def test_routes_that_only_read() -> None:
    """They take over too: the record is there before the app runs, and a change is refused as ever."""
    site, found = moved(read_only="/read"), Seen()
    browser = site.browser()
    browser.take(await visit(site, f"session={old_cookie()}", app=page(found), path="/read"))
    assert found == [USER]
    assert await browser.stored() == USER


async def test_excluded_routes_take_over_nothing() -> None:
    """They have no session at all."""
    site = moved(exclude="/static/*")

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        assert "session" not in scope
        await page()({**scope, "session": Session()}, receive, send)

    answer = await visit(site, f"session={old_cookie()}", app=app, path="/static/a")
    assert answer.cookies == []
    assert site.records() == []


async def test_a_websocket_takes_over() -> None:
    """The cookie rides on the accept, and transactions change the session."""
    site = moved()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        assert dict(scope["session"]) == USER
        await send({"type": "websocket.accept", "headers": []})
        async with scope["session"].transaction():
            scope["session"]["n"] = 5
        await send({"type": "websocket.close"})

    answer = await visit(site, f"session={old_cookie()}", app=app, type="websocket", scheme="ws")
    accept: Message = answer.messages[0]
    assert [name for name, _ in accept["headers"]].count(b"set-cookie") == 1
    assert sessions(site) == [{**USER, "n": 5}]


async def test_a_failed_request_loses_nothing() -> None:
    """A 500 rolls back what the app did. The session is there, for the same cookie or the new one."""
    site, found = moved(), Seen()
    old = f"session={old_cookie()}"
    await visit(site, old, app=page(lambda session: session.update(n=9), status=500))
    await visit(site, old, app=page(found))
    assert found == [USER]
    assert site.events == ["imported"]


async def test_a_stream_that_begins_with_the_old_cookie() -> None:
    """Its start brings our cookie."""
    site = moved()
    answer = await visit(site, f"session={old_cookie()}", app=stream(None, None))
    assert len(answer.cookies) == 1


@pytest.mark.parametrize("act", [lambda session: session.logout(), lambda session: session.clear()])
async def test_a_logout_in_the_very_first_request(act: Any) -> None:
    """Both cookies go, and nothing brings the session back."""
    site = moved("sid")
    old = f"sid={old_cookie(name='sid')}"
    answer = await visit(site, old, app=page(act))
    assert [line.partition(";")[0] for line in answer.cookies] == ["sid=null", "session=null"]
    assert sessions(site) == []


# --- an old cookie after its session ----------------------------------------------------------------


@pytest.mark.parametrize("name", ["session", "sid"])
async def test_a_copy_does_not_bring_back_who_has_signed_out(name: str) -> None:
    """Not at once, not days later; not with another text of the same signature."""
    site, found = moved(name), Seen()
    value = old_cookie(name=name)
    browser = site.browser()
    browser.take(await visit(site, f"{name}={value}"))
    await browser.open(page(lambda session: session.logout()))
    site.events.clear()
    last = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    alike = value[:-1] + last[last.index(value[-1]) ^ 1]  # base64: the last bits of a SHA-1 do not count
    for days in (0, 1, 13):
        site.clock.now += days * 86400
        for copy in (value, alike):
            await visit(site, f"{name}={copy}", app=page(found))
    assert found == [{}] * 6
    assert set(site.events) == {"unknown_session"}


async def test_a_copy_does_not_follow_to_a_new_id() -> None:
    """A sign-in after the move: who has a copy of the old cookie stays outside."""
    site, found = moved(), Seen()
    old = f"session={old_cookie()}"
    browser = site.browser()
    browser.take(await visit(site, old))
    await browser.open(page(lambda session: session.login("ada")))
    await visit(site, old, app=page(found))
    assert found == [{}]
    assert site.events[-1] == "retired_session"


async def test_signed_out_by_the_server() -> None:
    """`delete` from outside counts as well."""
    site, found = moved(), Seen()
    old = f"session={old_cookie()}"
    browser = site.browser()
    browser.take(await visit(site, old))
    await site.store.delete(browser.session_id)
    await visit(site, old, app=page(found))
    assert found == [{}]


async def test_an_old_cookie_that_leads_nowhere_is_removed() -> None:
    """One of another name: the browser forgets it, and the log is told once for each."""
    site = moved("sid")
    old = f"sid={old_cookie(name='sid')}"
    browser = site.browser()
    browser.take(await visit(site, old))
    await site.store.delete(browser.session_id)
    answer = await visit(site, old)
    (line,) = answer.cookies
    assert line.startswith("sid=null; path=/; expires=Thu, 01 Jan 1970")


async def test_one_of_the_same_name_is_never_removed_late() -> None:
    """By then the browser may have a cookie of ours under that name."""
    site = moved()
    old = f"session={old_cookie()}"
    browser = site.browser()
    browser.take(await visit(site, old))
    await site.store.delete(browser.session_id)
    assert (await visit(site, old)).cookies == []


async def test_an_answer_that_was_lost() -> None:
    """Days later the same client still gets its session; another one does not."""
    site, found = moved(), Seen()
    old = f"session={old_cookie()}"
    await visit(site, old)
    site.clock.now += 86400
    await visit(site, old, app=page(found))
    await visit(site, old, app=page(found), agent="curl/8")
    assert found == [USER, {}]


async def test_without_fingerprints_a_minute_is_all() -> None:
    """Two visitors may have the very same cookie, so it does not lead to a session for ever."""
    site, found = moved(fingerprint=None), Seen()
    old = f"session={old_cookie()}"
    await visit(site, old)
    for seconds in (60, 1):
        site.clock.now += seconds
        await visit(site, old, app=page(found))
    assert found == [USER, {}]


async def test_what_is_remembered_ends_with_the_old_cookie() -> None:
    """The note lives as long as Starlette would have taken the cookie, a minute for clocks added."""
    site = Site({"import_cookies": StarletteCookies(OLD_KEY, max_age=1000), "max_age": 10})
    await visit(site, f"session={old_cookie(max_age=1000)}")
    assert len(site.records()) == 2
    site.clock.now += 1000
    (note,) = site.records()
    assert "leads_to" in note.metadata
    site.clock.now += 61
    assert site.records() == []


# --- what is not taken over -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["session", "sid"])
@pytest.mark.parametrize(
    "value",
    [
        "another key",
        "garbage",
        signed("[1]"),
        signed('"text"'),
        signed("{"),
        signed("[" * 20_000),
        "x" * 60_000,
        f"{b64encode(b'{}').decode()}.x.y",
    ],
    ids=["another key", "garbage", "a list", "a text", "no JSON", "too deep", "huge", "no time"],
)
async def test_what_is_no_cookie_of_that_middleware(value: str, name: str) -> None:
    """A fresh session and one `bad_signature`, as without the option."""
    value = old_cookie(key="k" * 32) if value == "another key" else value
    site, found = moved(name), Seen()
    answer = await visit(site, f"{name}={value}", app=page(found))
    assert (answer.status, found, answer.cookies) == (200, [{}], [])
    assert site.events == ["bad_signature"]
    assert site.records() == []


async def test_an_expired_one_begins_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Starlette would not have taken it either: a fresh session, and no event."""
    old = old_cookie()
    site, found = moved(), Seen()
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 15 * 86400)
    await visit(site, f"session={old}", app=page(found))
    assert (found, site.events, site.records()) == ([{}], [], [])


async def test_a_large_one_is_taken_over_whole() -> None:
    """As large as a header may be."""
    site, found = moved(), Seen()
    values = {"cart": "x" * 30_000}
    await visit(site, f"session={signed(json.dumps(values))}", app=page(found))
    assert found == [values]


async def test_values_that_a_record_cannot_hold() -> None:
    """Only these are left out, and the log has their names."""
    events: list[Any] = []
    site, found = moved(on_event=events.append), Seen()
    cookie = signed('{"user": "ada", "rate": NaN, "deep": [{"x": Infinity}]}')
    await visit(site, f"session={cookie}", app=page(found))
    assert found == [{"user": "ada"}]
    assert [event.name for event in events] == ["unstorable_value", "imported"]
    assert events[0].details["values"] == "deep, rate"


async def test_two_old_cookies_are_one_too_many() -> None:
    """One of them was planted: neither counts. The same one twice is no question."""
    site, found = moved(), Seen()
    one, two = f"session={old_cookie()}", f"session={old_cookie({'user': 'eve'})}"
    await visit(site, one, two, app=page(found))
    assert (found, site.events) == ([{}], ["ambiguous_cookie"])
    await visit(site, one, one, app=page(found))
    assert found[1:] == [USER]


async def test_ours_counts_beside_an_old_one() -> None:
    """Whatever has become of it: the old one was taken over already, or belongs to another life."""
    site, found = moved("sid"), Seen()
    browser = site.browser()
    await browser.begin(n=1)
    ours, old = f"session={browser.cookie}", f"sid={old_cookie(name='sid')}"
    await visit(site, ours, old, app=page(found))
    await site.store.delete(browser.session_id)
    await visit(site, ours, old, app=page(found))
    assert found == [{"n": 1}, {}]
    assert site.events == ["unknown_session"]


async def test_sessions_that_are_not_kept() -> None:
    """With `max_age=-1` a session ends as it begins."""
    site, found = moved(max_age=-1), Seen()
    await visit(site, f"session={old_cookie()}", app=page(found))
    assert (found, site.records()) == ([{}], [])


@pytest.mark.parametrize(
    ("make", "remedy"),
    [
        (lambda: StarletteCookies(""), "StarletteCookies\\(secret_key\\) is empty"),
        (lambda: StarletteCookies(OLD_KEY, "a b"), "is not a cookie name"),
        (lambda: StarletteCookies(OLD_KEY, max_age=0), "seconds above 0"),
        (lambda: StarletteCookies(OLD_KEY, path="x"), "must begin with '/'"),
        (lambda: moved(import_cookies=OLD_KEY), "import_cookies is a StarletteCookies"),
    ],
)
async def test_wrong_values_fail_at_once(make: Any, remedy: str) -> None:
    """With the remedy."""
    with pytest.raises((ValueError, TypeError), match=remedy):
        make()


async def test_no_key_is_shown() -> None:
    """Crash reporters print locals."""
    assert OLD_KEY not in repr(StarletteCookies(OLD_KEY))


# --- rolling back -----------------------------------------------------------------------------------


async def test_rolling_back_with_another_name() -> None:
    """The old middleware finds its own cookie, with the values as they were at the move."""
    site, client = moved("sid", session_cookie="session"), starlette(name="sid")
    client.post("/", json=USER)
    browser = site.browser()
    browser.take(await visit(site, f"sid={client.cookies['sid']}"))
    await browser.open(page(lambda session: session.update(n=1)))
    assert (
        client.get("/", headers={"cookie": f"session={browser.cookie}; sid={client.cookies['sid']}"}).json()
        == USER
    )


async def test_rolling_back_with_the_same_name() -> None:
    """The old middleware finds an empty session: everybody has to sign in again."""
    site = moved()
    browser = site.browser()
    browser.take(await visit(site, f"session={old_cookie()}"))
    client = starlette()
    assert client.get("/", headers={"cookie": f"session={browser.cookie}"}).json() == {}


# --- every store of ours, real servers among them ----------------------------------------------------


@pytest.mark.parametrize("way", ["asyncio"], indirect=True)
async def test_each_store_takes_over_once(store: SessionStore) -> None:
    """One session for six requests at once; after its end the cookie leads nowhere."""
    cookies = StarletteCookies(OLD_KEY)
    site = Site()
    site.store = store  # type: ignore[assignment]  # a real one, not recorded
    site.middleware = SessionMiddleware(site._app, KEY, store=store, import_cookies=cookies)
    old, found = f"session={old_cookie()}", Seen()
    browser = site.browser()

    async def add(number: int) -> None:
        browser.take(await visit(site, old, app=page(lambda session: session.update({str(number): 1}))))

    async with anyio.create_task_group() as tasks:
        for number in range(6):
            tasks.start_soon(add, number)
    assert await browser.stored() == {**USER, **{str(number): 1 for number in range(6)}}
    await browser.open(page(lambda session: session.logout()))
    await visit(site, old, app=page(found))
    assert found == [{}]


@pytest.mark.parametrize("way", ["asyncio"], indirect=True)
async def test_a_session_of_starsessions_is_not_taken_over() -> None:
    """A fresh session, and `bad_signature` where the name is the same."""
    for name, events in (("session", ["bad_signature"]), ("sid", [])):
        site, found = Site({"session_cookie": name}), Seen()
        await visit(site, "session=0123456789abcdef0123456789abcdef", app=page(found))
        assert (found, site.events) == ([{}], events)
