"""Cookies in a real browser: releases that change their scope, and cookies that somebody planted."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
from browser import Chromium, Tab, served

from asgi_sessions import InMemorySessionStore, SessionMiddleware
from asgi_sessions.asgi import Receive, Scope, Send
from asgi_sessions.client.cookie import cookie_values
from asgi_sessions.client.signer import CookieSigner

KEY = "k" * 32
HOST = "shop.example.test"
OURS, NAMED, PARENT = HOST, f".{HOST}", ".example.test"  # domains as the browser keeps them


class Shop:
    """A shop that counts visits, one release after the other over the same sessions."""

    def __init__(self) -> None:
        self.store = InMemorySessionStore()
        self.sent: list[int] = []  # how many cookies of ours came with each request
        self.events: list[str] = []
        self.port = 0
        self.release()

    def release(self, *, minutes_ago: float = 0, **options: Any) -> None:
        """A new release with other options, whose cookies say that they were sent some time ago."""
        self._current = SessionMiddleware(
            self._app, KEY, store=self.store, on_event=lambda event: self.events.append(event.name), **options
        )
        self._current._settings.cookie.signer = CookieSigner(
            KEY, clock=lambda: time.time() - minutes_ago * 60
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/favicon.ico":
            await send({"type": "http.response.start", "status": 404, "headers": []})
            await send({"type": "http.response.body"})
        else:
            line = dict(scope["headers"]).get(b"cookie", b"")
            self.sent.append(len(cookie_values(line, b"session")))
            await self._current(scope, receive, send)

    def url(self, path: str) -> str:
        return f"http://{HOST}:{self.port}{path}"

    async def _app(self, scope: Scope, receive: Receive, send: Send) -> None:
        session = scope["session"]
        if scope["path"].endswith("/logout"):
            session.logout()
        elif scope["path"].endswith("/visit"):
            session["visits"] = session.get("visits", 0) + 1
        text = str(session.get("visits", "nobody")).encode()
        headers = [(b"content-type", b"text/plain"), (b"content-length", b"%d" % len(text))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": text})


@pytest.fixture
def shop() -> Iterator[Shop]:
    shop = Shop()
    with served(shop) as shop.port:
        yield shop


def visits(shop: Shop, tab: Tab, count: int) -> list[str]:
    """What the pages say; each visit has a URL of its own, or the browser would answer by itself."""
    return [tab.open(shop.url(f"/shop/visit?{time.monotonic_ns()}")) for _ in range(count)]


def log_out(shop: Shop, tab: Tab) -> str:
    return tab.open(shop.url(f"/shop/logout?{time.monotonic_ns()}"))


RELEASES: dict[str, tuple[dict[str, Any], dict[str, Any], list[tuple[str, str]]]] = {
    # before, after, and the cookies that are left in the end
    "a domain where was none": ({}, {"domain": "example.test"}, [(PARENT, "/")]),
    "no domain any more": ({"domain": HOST}, {}, [(NAMED, "/"), (OURS, "/")]),
    "a narrower domain": (
        {"domain": "example.test"},
        {"domain": HOST},
        [(PARENT, "/"), (NAMED, "/")],
    ),
    "a wider domain": ({"domain": HOST}, {"domain": "example.test"}, [(NAMED, "/"), (PARENT, "/")]),
    "a longer path": ({"path": "/"}, {"path": "/shop"}, [(OURS, "/"), (OURS, "/shop")]),
    "a shorter path": ({"path": "/shop"}, {"path": "/"}, [(OURS, "/")]),
    "both": ({"path": "/shop"}, {"path": "/", "domain": "example.test"}, [(PARENT, "/")]),
}


@pytest.mark.parametrize("change", RELEASES)
def test_a_release_that_changes_the_scope_locks_nobody_out(shop: Shop, tab: Tab, change: str) -> None:
    """A returning browser keeps its session; after a logout the dead cookie beside the new one is no harm.

    What lies within the new scope is removed; what lies in a wider one may be another app's and stays.
    """
    before, after, left = RELEASES[change]
    shop.release(**before)
    assert visits(shop, tab, 2) == ["1", "2"]
    shop.release(**after, minutes_ago=2)
    assert visits(shop, tab, 2) == ["3", "4"]
    assert log_out(shop, tab) == "nobody"
    assert visits(shop, tab, 1) == ["1"]
    shop.sent.clear()
    assert visits(shop, tab, 4) == ["2", "3", "4", "5"]
    assert shop.sent[0] == 2  # the dead cookie came along
    assert shop.sent[-1] == len(left)
    assert tab.cookies("session") == sorted(left)
    assert "ambiguous_cookie" not in shop.events


def test_planted_cookies_never_give_the_victim_a_session(shop: Shop, tab: Tab, chromium: Chromium) -> None:
    """Of longer paths they come first, as many as there are: the victim sees its own session or none."""
    with chromium.profile() as attacker:
        assert visits(shop, attacker, 7)[-1] == "7"
        (theirs,) = shop.store._entries
    assert visits(shop, tab, 1) == ["1"]
    theirs_signed = CookieSigner(KEY).sign(theirs)
    for planted, domain, path in [
        (theirs_signed, "example.test", "/shop/visit"),
        ("forged-1", HOST, "/shop/visit"),
        ("forged-2", "example.test", "/shop/"),
        ("forged-3", "example.test", "/shop"),
    ]:
        tab.run(f"document.cookie = 'session={planted}; domain={domain}; path={path}'")
    shop.events.clear()
    assert visits(shop, tab, 1) == ["1"]  # somebody new, neither the victim's second visit nor the eighth
    assert shop.sent[-1] == 5
    assert shop.events == ["ambiguous_cookie", "session_created"]
