"""How long one session lives: by the middleware's rule, and by what the app asked for."""

from __future__ import annotations

import math
import re
from contextlib import suppress
from typing import Any

import pytest
from asgi import Act, Answer, Browser, RecordingStore, Site, page, stream

from asgi_sessions import Session, SessionStore, SessionStoreError
from asgi_sessions.stores.checkout import Checkout

pytestmark = pytest.mark.anyio

MAX_AGE = 1209600


@pytest.fixture
def anyio_backend(way: str) -> str:
    """On both event loops, over each kind of store that needs no server."""
    return way


@pytest.fixture
def site(way: str) -> Site:
    return Site()


def expire_in(seconds: float | None) -> Act:
    return lambda session: session.set_expiry(seconds)


def max_age_of(answer: Answer) -> int | None:
    """The cookie's; None for one that ends with the browser session."""
    (line,) = answer.cookies
    found = re.search(r"Max-Age=(\d+)", line)
    return None if found is None else int(found[1])


async def life(site: Site, browser: Browser) -> tuple[float | None, float | None]:
    """The seconds until the record ends, and its idle timeout."""
    found = await site.store.checkout(browser.session_id, None, None, passive=True)
    assert isinstance(found, Checkout)
    site.log.clear()
    return found.expires_in, found.idle


async def test_a_life_of_its_own_works_when_nothing_else_was_changed(site: Site) -> None:
    """The record gets its end before the answer, which brings the cookie with that age."""
    browser = site.browser()
    session_id = await browser.begin(n=1)
    answer = await browser.open(page(expire_in(600)))
    assert site.log == [
        "checkout+lock", "app", "bound", "commit+release", "checkout", "start 200", "body",
    ]  # fmt: skip
    assert browser.session_id == session_id
    assert max_age_of(answer) == 600
    assert (await life(site, browser))[0] == pytest.approx(600, abs=1)
    assert await browser.stored() == {"n": 1}
    site.clock.now += 599
    assert (await browser.open(page())).status == 200
    assert await browser.stored() == {"n": 1}
    site.clock.now += 2
    assert await browser.stored() is None


@pytest.mark.parametrize("lock", [True, False, "auto"])
async def test_it_survives_what_comes_after_it(site: Site, lock: Any) -> None:
    """Writes, requests that only look, and a new id leave the end where it is."""
    site = site.option(lock=lock)
    browser = site.browser()
    await browser.begin(n=1)
    await browser.open(page(expire_in(600)))
    site.clock.now += 100
    await browser.open(page(lambda session: session.update(n=2)))
    answer = await browser.open(page(Session.regenerate_id))
    assert 499 <= (max_age_of(answer) or 0) <= 500
    await browser.open(page(lambda session: session.get("n")))
    assert (await life(site, browser))[0] == pytest.approx(500, abs=1)
    assert site.locks == 0


async def test_rolling_does_not_prolong_it(site: Site) -> None:
    """There it is the only absolute bound; the cookie is renewed with what is left of it."""
    site = site.option(rolling=True, max_age=1000)
    browser = site.browser()
    await browser.begin(n=1)
    await browser.open(page(expire_in(900)))
    for _ in range(3):
        site.clock.now += 290
        await browser.open(page(lambda session: session.get("n")))
    assert list(await life(site, browser)) == [pytest.approx(30, abs=1), 1000]
    site.clock.now += 31
    assert await browser.stored() is None


async def test_none_goes_back_to_the_middlewares(site: Site) -> None:
    """What is left of `max_age` counts, from creation; without one the cookie ends with the browser."""
    browser = site.browser()
    await browser.begin(n=1)
    await browser.open(page(expire_in(600)))
    site.clock.now += 100
    answer = await browser.open(page(expire_in(None)))
    assert max_age_of(answer) == MAX_AGE - 100
    assert list(await life(site, browser)) == [pytest.approx(MAX_AGE - 100, abs=1), None]
    endless = site.option(max_age=None)
    browser = endless.browser()
    await browser.begin(n=1)
    assert max_age_of(await browser.open(page(expire_in(10**7)))) == 10**7
    assert list(await life(endless, browser)) == [pytest.approx(10**7, abs=1), 3600]
    assert max_age_of(await browser.open(page(expire_in(None)))) is None
    assert await life(endless, browser) == (None, 3600)


async def test_it_never_reaches_beyond_max_age(site: Site) -> None:
    """That counts from creation or sign-in, whenever the app asks."""
    browser = site.browser()
    await browser.begin(n=1)
    site.clock.now += MAX_AGE - 50
    answer = await browser.open(page(expire_in(MAX_AGE)))
    assert max_age_of(answer) == 50
    assert (await life(site, browser))[0] == pytest.approx(50, abs=1)


def login(session: Session) -> None:
    session.login("ada")


def login_remembered(session: Session) -> None:
    session.login("ada")
    session.set_expiry(600)


def remembered_login(session: Session) -> None:
    session.set_expiry(600)
    session.login("ada")


@pytest.mark.parametrize("act", [login_remembered, remembered_login])
@pytest.mark.parametrize("is_new", [True, False], ids=["new", "there"])
async def test_a_sign_in_counts_with_it(site: Site, act: Act, is_new: bool) -> None:
    """Before or after `login()` in the same request; a later sign-in starts a full life again."""
    browser = site.browser()
    if not is_new:
        await browser.begin(n=1)
        site.clock.now += 1000
    answer = await browser.open(page(act))
    assert max_age_of(answer) == 600
    assert (await life(site, browser))[0] == pytest.approx(600, abs=1)
    site.clock.now += 500
    assert max_age_of(await browser.open(page(login))) == MAX_AGE
    assert (await life(site, browser))[0] == pytest.approx(MAX_AGE, abs=1)


def move_shorter(session: Session) -> None:
    session.set_expiry(600)
    session.regenerate_id()


async def test_a_new_id_takes_it_along(site: Site) -> None:
    """Both in one request: the life does not begin anew."""
    browser = site.browser()
    await browser.begin(n=1)
    site.clock.now += 1000
    assert max_age_of(await browser.open(page(move_shorter))) == 600
    site.clock.now += 100
    await browser.open(page(expire_in(None)))
    assert (await life(site, browser))[0] == pytest.approx(MAX_AGE - 1100, abs=1)


def end_and_begin(session: Session) -> None:
    session.set_expiry(60)
    session.logout()
    session["flash"] = "bye"


def end_and_begin_shorter(session: Session) -> None:
    session.logout()
    session["flash"] = "bye"
    session.set_expiry(60)


@pytest.mark.parametrize(("act", "expected"), [(end_and_begin, MAX_AGE), (end_and_begin_shorter, 60)])
async def test_an_end_takes_it_away(site: Site, act: Act, expected: int) -> None:
    """What begins after it has the life that was asked for since."""
    browser = site.browser()
    await browser.begin(n=1)
    assert max_age_of(await browser.open(page(act))) == expected
    assert (await life(site, browser))[0] == pytest.approx(expected, abs=1)


async def test_an_empty_session_has_no_life(site: Site) -> None:
    """Nothing is stored for it alone."""
    answer = await site.request(page(expire_in(60)))
    assert site.log == ["app", "start 200", "body"]
    assert answer.cookies == []


@pytest.mark.parametrize("wrong", [0, -1, math.nan, "60", True, [], MAX_AGE + 1, math.inf])
async def test_what_is_no_life_is_refused(site: Site, wrong: Any) -> None:
    """With the remedy, and nothing is changed."""
    browser = site.browser()
    await browser.begin(n=1)

    def act(session: Session) -> None:
        with pytest.raises(ValueError, match=r"logout\(\)|raise max_age|number of seconds or None"):
            session.set_expiry(wrong)

    await browser.open(page(act))
    assert site.log == ["checkout+lock", "app", "release", "start 200", "body"]


async def test_the_seconds_that_are_left(site: Site) -> None:
    """As stored, or as the app has just asked; None where there is no absolute bound."""
    browser, seen = site.browser(), []

    def look(session: Session) -> None:
        seen.append(session.expires_in)
        session["n"] = 1
        session.set_expiry(600)
        seen.append(session.expires_in)

    def look_again(session: Session) -> None:
        seen.append(session.expires_in)
        session.set_expiry(None)
        seen.append(session.expires_in)
        session.login("ada")
        seen.append(session.expires_in)

    await browser.open(page(look))
    site.clock.now += 100
    await browser.open(page(look_again))
    expected = [MAX_AGE, 600, 500, MAX_AGE - 100, MAX_AGE]
    assert seen == [pytest.approx(each, abs=1) for each in expected]
    seen.clear()
    await site.option(rolling=True).request(page(lambda session: seen.append(session.expires_in)))
    assert seen == [None]


async def test_a_roll_back_takes_it_back(site: Site) -> None:
    """Neither a failed request nor a failed transaction leaves another end."""
    browser = site.browser()
    await browser.begin(n=1)
    await browser.open(page(expire_in(60), status=500))
    assert (await life(site, browser))[0] == pytest.approx(MAX_AGE, abs=1)

    async def fails(session: Session) -> None:
        with suppress(RuntimeError):
            async with session.transaction():
                session.set_expiry(60)
                raise RuntimeError
        session["n"] = 2

    assert (await browser.open(page(fails))).cookies == []
    assert (await life(site, browser))[0] == pytest.approx(MAX_AGE, abs=1)


async def test_it_may_be_set_in_a_transaction(site: Site) -> None:
    """Also where the answer has begun; then the cookie keeps the age that it has."""
    browser = site.browser()
    await browser.begin(n=1)

    async def act(session: Session) -> None:
        async with session.transaction():
            session.set_expiry(60)

    answer = await browser.open(stream(None, act))
    assert answer.cookies == []
    assert (await life(site, browser))[0] == pytest.approx(60, abs=1)
    await browser.begin(n=1)
    answer = await site.option(read_only=["/"]).request(
        page(act), headers=[(b"cookie", f"session={browser.cookie}".encode())]
    )
    assert answer.status == 200


async def test_with_other_changes_and_save(site: Site) -> None:
    """What else was changed is stored with it; what is asked for later counts later."""
    browser = site.browser()
    await browser.begin(n=1)

    async def act(session: Session) -> None:
        session["n"] = 2
        session.set_expiry(600)
        await session.save()
        session.set_expiry(300)

    assert max_age_of(await browser.open(page(act))) == 300
    assert (await life(site, browser))[0] == pytest.approx(300, abs=1)
    assert await browser.stored() == {"n": 2}


class FailsBetween(RecordingStore):
    """The reply to `bound` or to the commit behind it is lost once."""

    lost = ""

    async def after(self, call: str) -> None:
        if call == self.lost:
            self.lost = ""
            raise SessionStoreError("the reply was lost")


@pytest.mark.parametrize("call", ["bound", "commit"])
async def test_a_lost_reply_may_be_tried_again(way: str, call: str) -> None:
    """The app saves once more: stored or told, never half."""
    site = Site(store_class=FailsBetween)
    browser = site.browser()
    await browser.begin(n=1)
    site.store.lost = call  # type: ignore[attr-defined]

    async def act(session: Session) -> None:
        session["n"] = 2
        session.set_expiry(600)
        with pytest.raises(SessionStoreError):
            await session.save()
        await session.save()

    assert max_age_of(await browser.open(page(act))) == 600
    assert (await life(site, browser))[0] == pytest.approx(600, abs=1)
    assert await browser.stored() == {"n": 2}


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_it_ends_what_is_signed_in_too(store: SessionStore) -> None:
    """Over each store of ours: a user's session is found by a sign-out, however long it lives."""
    site = Site({"store": store})
    browser = site.browser()
    await browser.open(page(login_remembered))
    await browser.open(page(expire_in(1200)))
    found = await store.checkout(browser.session_id, None, None)
    assert isinstance(found, Checkout)
    assert found.expires_in == pytest.approx(1200, abs=2)
    await browser.open(page(move_shorter))
    await browser.open(page(expire_in(None)))
    found = await store.checkout(browser.session_id, None, None)
    assert isinstance(found, Checkout)
    assert found.expires_in == pytest.approx(MAX_AGE, abs=3)
    assert await store.delete_for_user("ada") == 1


def test_a_handle_without_a_request() -> None:
    """The seconds are checked, and nobody stores them."""
    session = Session({"n": 1})
    session.set_expiry(60)
    with pytest.raises(ValueError, match="logout"):
        session.set_expiry(0)
