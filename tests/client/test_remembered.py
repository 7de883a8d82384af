"""Remembered cookie headers: what a header says never goes stale, and the memory for them is bounded."""

from __future__ import annotations

import sys
from typing import Any

import pytest
from asgi import KEY, Site, page

from asgi_sessions import Session
from asgi_sessions.client.cookie import MAX_COOKIE_BYTES, MAX_REMEMBERED, MAX_REMEMBERED_BYTES, SessionCookie
from asgi_sessions.record.values import new_session_id

pytestmark = pytest.mark.anyio

OTHERS = "theme=dark; session={}; b=2"


async def seen(site: Site, cookie: str) -> list[str]:
    """The keys of the session that a request with this cookie among others gets."""
    keys: list[str] = []

    def look(session: Session) -> None:
        keys.extend(session)

    header = b"cookie", OTHERS.format(cookie).encode()
    agent = b"user-agent", site.browser().user_agent.encode()  # type: ignore[union-attr]  # it has one
    await site.request(page(look), headers=[header, agent])
    return keys


def header_of(cookie: SessionCookie, session_id: str, rest: bytes = b"") -> bytes:
    return cookie.render(session_id, max_age=60, secure=False).partition(b";")[0] + rest


@pytest.mark.parametrize("options", [{"max_age": 60}, {"max_age": None, "idle_timeout": 60}])
async def test_a_remembered_header_does_not_outlive_its_session(options: dict[str, Any]) -> None:
    """The store decides about time, for each request anew."""
    site = Site(options)
    browser = site.browser()
    await browser.begin(n=1)
    assert browser.cookie is not None
    site.clock.now += 59
    assert await seen(site, browser.cookie) == await seen(site, browser.cookie) == ["n"]
    site.clock.now += 60
    assert await seen(site, browser.cookie) == []


async def test_a_remembered_header_does_not_outlive_a_sign_out() -> None:
    """A session that was ended, or got another id, is not found by its old header."""
    site = Site()
    for act in (Session.clear, Session.regenerate_id):
        browser = site.browser()
        await browser.begin(n=1)
        old = browser.cookie
        assert old is not None
        assert await seen(site, old) == ["n"]
        await browser.open(page(act))
        assert await seen(site, old) == []


async def test_another_middleware_remembers_nothing_of_this_one() -> None:
    """One with another key, or another cookie's name, over the same store."""
    site = Site()
    browser = site.browser()
    await browser.begin(n=1)
    assert browser.cookie is not None
    assert await seen(site, browser.cookie) == ["n"]
    assert await seen(site.option(secret_key=KEY[::-1]), browser.cookie) == []
    assert await seen(site.option(session_cookie="other"), browser.cookie) == []
    assert await seen(site.option(secret_key=KEY[::-1], secret_key_fallbacks=[KEY]), browser.cookie) == ["n"]


async def test_a_key_that_was_rotated_out_is_believed_no_more() -> None:
    """The header that the old app remembers is refused by one that has dropped its key."""
    session_id = new_session_id()
    old = SessionCookie(KEY)
    header = header_of(old, session_id)
    rotated, dropped = SessionCookie(KEY[::-1], fallbacks=[KEY]), SessionCookie(KEY[::-1])
    for _ in range(2):
        assert old.read(header).stale_key is False
        assert rotated.read(header).stale_key is True
        assert dropped.read(header).session_id is None


def test_a_header_that_differs_by_one_byte_is_read_anew() -> None:
    """Wherever the byte is: in the id, the signature, the name, or a neighbour's cookie."""
    cookie = SessionCookie(KEY)
    header = header_of(cookie, new_session_id(), b"; a=1")
    good = cookie.read(header)
    assert cookie.read(header) is good
    end = header.index(b";")
    for place in range(len(header)):
        changed = header[:place] + bytes([header[place] ^ 1]) + header[place + 1 :]
        assert (cookie.read(changed) == good) is (place > end), changed
    token = header[len(b"session=") : end]
    assert cookie.read(token).session_id is None, "a value without our name is no cookie of ours"


def test_what_names_no_session_is_not_remembered() -> None:
    """Or anybody could fill the memory: with headers without our cookie, forged ones, planted ones."""
    cookie = SessionCookie(KEY)
    one, two = (header_of(cookie, new_session_id()) for _ in range(2))
    for header in (b"a=1", b"session=forged", one + b"; " + two, b"x" * (MAX_COOKIE_BYTES + 1)):
        assert cookie.read(header).session_id is None
    assert not cookie._known


def test_verified_cookies_are_remembered_within_bounds() -> None:
    """However many clients there are; all of them are still known by their signature."""
    cookie = SessionCookie(KEY)
    ids = [new_session_id() for _ in range(MAX_REMEMBERED + 10)]
    lines = [header_of(cookie, each, b"; a=%d" % n) for n, each in enumerate(ids)]
    assert [cookie.read(line).session_id for line in lines] == ids
    assert len(cookie._known) <= MAX_REMEMBERED
    assert cookie.read(lines[0]).session_id == ids[0]


def test_one_clients_headers_are_remembered_within_bounds() -> None:
    """One good cookie beside ever new others takes no more than it may, long headers included."""
    cookie = SessionCookie(KEY)
    session_id = new_session_id()
    for number in range(MAX_REMEMBERED + 10):
        padding = b"; a=%d" % number
        header = header_of(cookie, session_id, padding)
        longest = header + b"x" * (MAX_REMEMBERED_BYTES - len(header))
        assert cookie.read(longest).session_id == cookie.read(longest + b"x").session_id == session_id
    assert len(cookie._known) <= MAX_REMEMBERED
    assert max(map(len, cookie._known)) == MAX_REMEMBERED_BYTES
    held = sys.getsizeof(cookie._known) + sum(map(sys.getsizeof, cookie._known))
    assert held + 500 * len(set(cookie._known.values())) < 6_000_000
