"""`rotate_every`: an id that is old is replaced, and leads to the new one for a while."""

from __future__ import annotations

import time
from typing import Any

import anyio
import pytest
from asgi import FIREFOX, KEY, Act, Answer, Browser, Site, page, stream

from asgi_sessions import Session, SessionData, SessionMiddleware, SessionStore
from asgi_sessions.client.signer import CookieSigner
from asgi_sessions.stores.checkout import LEADS_FOR

pytestmark = pytest.mark.anyio

EVERY = 600.0
_SIGNER = CookieSigner(KEY)


@pytest.fixture
def anyio_backend(way: str) -> str:
    """On both event loops, over each kind of store that needs no server."""
    return way


@pytest.fixture
def site(way: str) -> Site:
    return Site({"rotate_every": EVERY})


def read(session: Session) -> None:
    session.get("n")


def write(session: Session) -> None:
    session["n"] = session.get("n", 0) + 1


def login(session: Session) -> None:
    session.login("ada")


def age(browser: Browser, seconds: float = EVERY + 1) -> str:
    """Let the browser's id be so old; the id."""
    browser.cookie = _SIGNER.sign(browser.session_id, int(time.time() - seconds))
    return browser.session_id


async def old_session(site: Site, **values: Any) -> Browser:
    browser = site.browser()
    await browser.begin(**values)
    age(browser)
    return browser


def issued_at(browser: Browser) -> int:
    assert browser.cookie is not None
    verified = _SIGNER.verify(browser.cookie.encode())
    assert verified is not None
    return verified.issued_at


@pytest.mark.parametrize("act", [None, read, write])
@pytest.mark.parametrize("lock", [True, False, "auto"])
async def test_an_old_id_is_replaced(site: Site, act: Act | None, lock: Any) -> None:
    """At a request that may do so; the session and what is left of its life stay, the cookie is new."""
    browser = await old_session(site.option(lock=lock), n=1)
    old = browser.session_id
    answer = await browser.open(page(act))
    assert len(answer.cookies) == 1
    assert browser.session_id != old
    assert issued_at(browser) >= time.time() - 5
    assert await browser.stored() == {"n": 2 if act is write else 1}
    assert not await site.store.exists(old)
    assert site.events == ["session_regenerated"]
    site.log.clear()
    assert (await browser.open(page(act))).cookies == []
    assert "move" not in str(site.log)
    assert site.locks == 0


async def test_a_young_id_stays_and_costs_nothing(site: Site) -> None:
    """As without the option."""
    browser = site.browser()
    await browser.begin(n=1)
    age(browser, EVERY - 5)
    assert (await browser.open(page(read))).cookies == []
    assert site.log == ["checkout+lock", "app", "release", "start 200", "body"]


async def test_it_costs_one_move(site: Site) -> None:
    """In the place of the release, or of the commit."""
    for act in (read, write):
        browser = await old_session(site, n=1)
        await browser.open(page(act))
        assert site.log == ["checkout+lock", "app", "move", "start 200", "body"]


@pytest.mark.parametrize("options", [{}, {"lock": "auto"}, {"lock": False}, {"read_only": ["/"]}], ids=str)
async def test_requests_with_the_old_cookie_reach_the_session(site: Site, options: dict[str, Any]) -> None:
    """For a while; each of their answers brings the new cookie, for the other may be lost."""
    browser = await old_session(site, n=1)
    late, later = browser.twin(), browser.twin()
    await browser.open(page(read))
    site = late.site = site.option(**options)
    assert "read_only" in options or (await late.open(page(write))).status == 200
    answer = await later.twin(site=site).open(page(read))
    later.take(answer)
    assert later.session_id == browser.session_id
    assert issued_at(later) >= time.time() - 5, "the new id would be replaced at once"
    assert await later.stored() == {"n": 1 if "read_only" in options else 2}
    assert site.locks == 0


async def test_after_a_while_the_old_cookie_leads_nowhere(site: Site) -> None:
    """Its request is anonymous, and does not take the new cookie away."""
    browser = await old_session(site, n=1)
    late = browser.twin()
    await browser.open(page(read))
    site.clock.now += LEADS_FOR - 1
    assert (await late.twin().open(page(read))).cookies != []
    site.clock.now += 2
    site.events.clear()
    assert (await late.open(page(read))).cookies == []
    assert site.events == ["retired_session"]
    assert await browser.stored() == {"n": 1}


async def test_it_never_leads_across_a_sign_in(site: Site) -> None:
    """Whoever knows an id from before does not come in: neither the first one nor the one between."""
    browser = await old_session(site, n=1)
    first = browser.twin()
    await browser.open(page(read))
    between = browser.twin()
    users: list[str | None] = []

    def note_user(session: Session) -> None:
        users.append(session.data.user_id)

    await browser.open(page(login))
    for thief in (first, between):
        answer = await thief.open(page(note_user))
        assert (users.pop(), answer.cookies) == (None, [])
    assert len(site.records()) == 1


async def test_a_sign_in_with_an_old_id_is_a_sign_in(site: Site) -> None:
    """In the request that would have replaced the id: nothing leads to the new one."""
    browser = await old_session(site, n=1)
    thief = browser.twin()
    await browser.open(page(login))
    assert (await thief.open(page(read))).cookies == []
    assert await site.store.successor_of(thief.session_id) is None
    browser = await old_session(site, n=1)
    thief = browser.twin()
    await browser.open(page(Session.regenerate_id))
    assert await site.store.successor_of(thief.session_id) is None


async def test_it_brings_nothing_back_that_has_ended(site: Site) -> None:
    """The old id of a session that was signed out leads to none."""
    browser = await old_session(site, n=1)
    late = browser.twin()
    await browser.open(page(read))
    await browser.open(page(Session.logout))
    seen: list[Any] = []
    await late.open(page(lambda session: seen.append(dict(session))))
    assert seen == [{}]
    assert site.records() == []


async def test_a_thief_of_another_client_is_not_led(site: Site) -> None:
    """The fingerprint counts there as everywhere."""
    browser = await old_session(site, n=1)
    thief = browser.twin(user_agent="curl/8")
    await browser.open(page(read))
    assert (await thief.open(page(read))).cookies == []
    assert "fingerprint_mismatch" in site.events


async def test_ids_may_be_replaced_one_after_the_other(site: Site) -> None:
    """The oldest leads to the newest."""
    browser = await old_session(site, n=1)
    late = browser.twin()
    for _ in range(2):
        await browser.open(page(read))
        age(browser)
    await late.open(page(write))
    assert late.session_id == browser.session_id


@pytest.mark.parametrize("lock", [True, "auto"])
async def test_those_who_wait_follow(site: Site, lock: Any) -> None:
    """Parallel requests with the old cookie: one replaces the id, all are counted."""
    site = site.option(lock=lock)
    browser = await old_session(site, n=0)
    twins = [browser.twin() for _ in range(8)]

    async def slowly(session: Session) -> None:
        write(session)
        await anyio.sleep(0.01)

    async with anyio.create_task_group() as tasks:
        for twin in twins:
            tasks.start_soon(twin.open, page(slowly))
    assert len({twin.session_id for twin in twins}) == 1
    assert await twins[0].stored() == {"n": 8}
    assert site.events.count("session_regenerated") == 1
    assert site.locks == 0


async def test_who_cannot_replace_it_leaves_it(site: Site) -> None:
    """Read-only requests; the next one that can does it."""
    browser = await old_session(site, n=1)
    old = browser.session_id
    site_read_only = site.option(read_only=["/"])
    answer = await browser.twin(site=site_read_only).open(page(read))
    assert answer.cookies == []
    await browser.open(page(status=500))
    assert browser.session_id == old, "a failed request changes nothing"
    await browser.open(stream(read, None))
    assert browser.session_id != old


async def test_where_others_were_first_a_read_is_answered(site: Site) -> None:
    """Without the lock somebody may have written meanwhile; the id is replaced later."""
    site = site.option(lock=False)
    browser = await old_session(site, n=1)

    async def slow(session: Session) -> None:
        session.get("n")
        await site.store.set(
            browser.session_id, SessionData(session_id=browser.session_id, metadata={"n": 5})
        )

    answer = await browser.open(page(slow))
    assert (answer.status, answer.cookies) == (200, [])
    assert await browser.stored() == {"n": 5}
    await browser.open(page(read))
    assert await browser.stored() == {"n": 5}
    assert site.events.count("session_regenerated") == 1


async def test_a_handle_from_before_follows(site: Site) -> None:
    """A transaction of a request that loaded the session by its old id."""
    browser = await old_session(site, n=1)
    late = browser.twin(site=site.option(read_only=["/"]))

    async def act(session: Session) -> None:
        await browser.open(page(read))
        async with session.transaction() as data:
            data.metadata["n"] = 7

    answer = await late.open(page(act))
    assert answer.status == 200
    assert late.session_id == browser.session_id
    assert await browser.stored() == {"n": 7}


async def test_a_websocket_is_led_too(site: Site) -> None:
    """Its handshake comes with the old cookie; the new one rides on the accept."""
    browser = await old_session(site, n=1)
    late = browser.twin()
    await browser.open(page(read))
    sent: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        async with scope["session"].transaction():
            write(scope["session"])
        await send({"type": "websocket.accept"})

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"cookie", f"session={late.cookie}".encode()), (b"user-agent", FIREFOX.encode())]
    scope = {"type": "websocket", "path": "/", "headers": headers, "client": ("203.0.113.7", 1)}
    receive: Any = anyio.sleep_forever
    await SessionMiddleware(app, KEY, store=site.store, rotate_every=EVERY)(scope, receive, send)
    late.take(Answer([{**sent[0], "type": "http.response.start"}]))
    assert late.session_id == browser.session_id
    assert await browser.stored() == {"n": 2}


async def test_rolling_and_a_new_key_replace_it_where_they_would_renew_it(site: Site) -> None:
    """A cookie that is sent again without that keeps its date: it is the id's."""
    rolling = site.option(rolling=True, max_age=1000)
    browser = rolling.browser()
    old = await browser.begin(n=1)
    age(browser, 150)
    date = issued_at(browser)
    read_only = site.option(rolling=True, max_age=1000, read_only=["/"])
    await browser.twin(site=read_only).open(page(read))
    answer = await browser.twin(site=read_only).open(page(read))
    browser.take(answer)
    assert (browser.session_id, issued_at(browser)) == (old, date)
    await browser.twin(site=rolling).open(page(read))
    browser.site = rolling
    await browser.open(page(read))
    assert browser.session_id != old
    new_key = site.option(secret_key="n" * 32, secret_key_fallbacks=[KEY])
    old = browser.session_id
    browser.site = new_key
    await browser.open(page(read))
    assert browser.session_id != old


async def test_off_it_does_nothing(site: Site) -> None:
    """Nothing is replaced, and no replaced id leads anywhere."""
    browser = await old_session(site.option(rotate_every=None), n=1)
    late = browser.twin()
    assert (await browser.open(page(read))).cookies == []
    await browser.twin(site=site).open(page(read))
    assert (await late.open(page(read))).cookies == []
    assert "follow" not in site.log


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_over_each_store(store: SessionStore) -> None:
    """A signed-in session: led for a while, found by a sign-out, dead across the next sign-in."""
    site = Site({"store": store, "rotate_every": EVERY})
    browser = site.browser()
    await browser.open(page(login))
    old = age(browser)
    late = browser.twin()
    await browser.open(page(write))
    assert browser.session_id != old
    await late.open(page(write))
    assert late.session_id == browser.session_id
    data = await store.get(browser.session_id)
    assert data is not None
    assert (data.metadata, data.user_id) == ({"n": 2}, "ada")
    late.cookie = _SIGNER.sign(old)
    await browser.open(page(lambda session: session.login("bob")))
    assert (await late.open(page(read))).cookies == []
    assert await store.delete_for_user("bob") == 1
    assert await store.delete_for_user("ada") == 0


@pytest.mark.parametrize("wrong", [0, -1, 30, "60", True, float("nan")])
def test_a_wrong_value_fails_at_the_start(wrong: Any) -> None:
    """With the name of the option."""
    with pytest.raises((TypeError, ValueError), match="rotate_every"):
        SessionMiddleware(lambda *_: None, "k" * 32, rotate_every=wrong)  # type: ignore[arg-type]


async def test_a_stream_that_waits_for_the_end_waits_on(site: Site) -> None:
    """An old id that is replaced is no end; a sign-out is one, and so is a sign-in elsewhere."""
    for end in (lambda session: session.logout(), login):
        browser = await old_session(site, n=1)
        twin, ended, began = browser.twin(), anyio.Event(), anyio.Event()
        fresh = site.browser()
        fresh.cookie = _SIGNER.sign(browser.session_id)  # young enough to be left as it is

        async def wait(session: Session, began: anyio.Event = began, ended: anyio.Event = ended) -> None:
            began.set()
            await session.ended()
            ended.set()

        with anyio.fail_after(20):
            async with anyio.create_task_group() as group:
                group.start_soon(fresh.open, stream(None, wait))
                await began.wait()
                before = twin.session_id
                await twin.open(page(read))
                assert twin.session_id != before
                await anyio.sleep(0.05)
                assert not ended.is_set()
                await twin.open(page(end))
                await ended.wait()


def clear_and_go_on(session: Session) -> None:
    session.logout()
    session["lang"] = "en"


@pytest.mark.parametrize("end", [lambda session: session.logout(), clear_and_go_on], ids=["logout", "anew"])
async def test_an_end_follows_an_id_that_was_replaced_meanwhile(site: Site, end: Act) -> None:
    """Without a lock a parallel request may give the session a new id first: that one is ended, too."""
    browser = await old_session(site.option(lock=False), n=1)
    twin, old = browser.twin(), browser.session_id

    async def be_overtaken(session: Session) -> None:
        await twin.open(page(read))
        end(session)

    assert (await browser.open(page(be_overtaken))).status == 200
    assert twin.session_id != old
    assert not await site.store.exists(twin.session_id)
    assert browser.cookie is None or await browser.stored() == {"lang": "en"}


@pytest.mark.parametrize("end", [lambda session: session.logout(), clear_and_go_on], ids=["logout", "anew"])
async def test_an_end_of_what_got_another_id_is_refused(site: Site, end: Act) -> None:
    """Nothing tells which one: the answer is 409, not a sign-out that was none."""
    browser = await old_session(site.option(lock=False, rotate_every=None), n=1)
    twin = browser.twin()

    async def be_overtaken(session: Session) -> None:
        await twin.open(page(lambda session: session.regenerate_id()))
        end(session)

    assert (await browser.twin().open(page(be_overtaken))).status == 409
    assert await twin.stored() == {"n": 1}


async def test_a_passive_request_replaces_no_id(site: Site) -> None:
    """A new id restarts the idle timeout, and polls are no activity."""
    browser = await old_session(site.option(passive="*"), n=1)
    before = browser.session_id
    await browser.open(page(read))
    assert browser.session_id == before
