"""Several cookies of our name in one request: the live one counts, and no number of planted ones decides."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable
from typing import Any

import pytest
from asgi import KEY, Answer, Browser, Site, chunk, messages, page, start

from asgi_sessions import InMemorySessionStore, Session, SessionFilter, SessionMiddleware
from asgi_sessions.asgi import Receive, Scope, Send
from asgi_sessions.client.cookie import AMBIGUOUS, MAX_CANDIDATES, Presented
from asgi_sessions.client.signer import CookieSigner, Verified
from asgi_sessions.request.duplicates import choose
from asgi_sessions.stores.checkout import Checkout, Missing

pytestmark = pytest.mark.anyio

A, B, C, D = (Verified(letter * 32, 100 + number, letter == "b") for number, letter in enumerate("abcd"))
LIVE = Checkout("", b"", "", None)
DEAD, RETIRED, UNREADABLE = Missing.ABSENT, Missing.RETIRED, Missing.UNREADABLE


def one(chosen: Verified, leftover: bool = False) -> Presented:
    return Presented(*chosen, leftover=leftover)


@pytest.mark.parametrize(
    ("found", "only_ours", "chosen"),
    [
        ([(A, LIVE), (B, DEAD)], True, one(A, leftover=True)),
        ([(A, DEAD), (B, LIVE)], True, one(B, leftover=True)),
        ([(A, RETIRED), (B, LIVE)], True, one(B, leftover=True)),
        ([(A, DEAD), (B, DEAD), (C, RETIRED), (D, LIVE)], True, one(D, leftover=True)),
        ([(A, LIVE), (B, DEAD)], False, one(A)),
        ([(A, LIVE), (B, UNREADABLE)], True, one(A)),
        ([(A, LIVE), (B, LIVE)], True, AMBIGUOUS),
        ([(A, LIVE), (B, DEAD), (C, DEAD), (D, LIVE)], True, AMBIGUOUS),
        ([(A, DEAD), (B, DEAD)], True, one(A)),
        ([(A, DEAD), (B, RETIRED)], True, one(B)),
        ([(A, DEAD), (B, UNREADABLE)], True, one(B)),
        ([(A, UNREADABLE), (B, RETIRED)], True, one(B)),
    ],
)
def test_the_live_one_is_chosen(
    found: list[tuple[Verified, Checkout | Missing]], only_ours: bool, chosen: Presented
) -> None:
    """Two live ones give nobody a session; where none is alive, the one that tells most is looked up."""
    assert choose(found, only_ours=only_ours) == chosen


# --- at the whole middleware ------------------------------------------------------------------------


@pytest.fixture
def site() -> Site:
    return Site()


async def sent(site: Site, tokens: Iterable[str], **scope: Any) -> tuple[dict[str, Any], Answer]:
    """What an app finds in the session of a request with these cookies, and the answer."""
    seen: list[dict[str, Any]] = []
    line = "; ".join(f"session={token}" for token in tokens).encode()
    headers = [(b"cookie", line), (b"user-agent", b"x")]
    answer = await site.request(page(lambda session: seen.append(dict(session))), headers=headers, **scope)
    return seen[0], answer


async def token_of(site: Site, **values: Any) -> str:
    browser = Browser(site, {}, user_agent="x")
    await browser.begin(**values)
    assert browser.cookie is not None
    return browser.cookie


async def ended(site: Site) -> str:
    """A cookie whose session is over."""
    token = await token_of(site, who="over")
    await site.store.delete(token.partition(".")[0])
    return token


@pytest.mark.parametrize("planted", ["live", "ended", "forged"])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 8])
async def test_no_number_of_planted_cookies_decides(site: Site, planted: str, count: int) -> None:
    """Wherever the victim's cookie stands among them, nobody is served somebody else's session.

    The victim is served too, as long as the planted ones are dead and not more than are looked at.
    """
    mine = await token_of(site, who="victim")
    if planted == "live":
        others = [await token_of(site, who="attacker") for _ in range(count)]
    elif planted == "ended":
        others = [await ended(site) for _ in range(count)]
    else:
        others = [f"{number:032x}.aaaaaa.{'A' * 43}" for number in range(count)]
    expected = {"who": "victim"} if planted != "live" and count < MAX_CANDIDATES else {}
    for place in range(count + 1):
        site.log.clear()
        site.events.clear()
        seen, answer = await sent(site, [*others[:place], mine, *others[place:]])
        assert seen == expected
        assert site.events == ([] if expected else ["ambiguous_cookie"])
        assert answer.cookies == []
        assert len([call for call in site.log if call.startswith("checkout")]) <= MAX_CANDIDATES + 1
    assert site.locks == 0


async def test_planted_cookies_alone_give_a_session_to_nobody(site: Site) -> None:
    """Two of the attacker's own, without the victim's: still neither."""
    others = [await token_of(site, who="attacker") for _ in range(2)]
    for tokens in itertools.permutations(others):
        assert (await sent(site, tokens))[0] == {}


async def test_several_dead_ones_are_unknown(site: Site) -> None:
    """One event, no session, and no cookie is removed: none of them was ended by this request."""
    tokens = [await ended(site) for _ in range(3)]
    site.events.clear()
    seen, answer = await sent(site, tokens)
    assert (seen, answer.cookies, site.events) == ({}, [], ["unknown_session"])


async def test_a_replaced_id_beside_a_dead_one_stays_without_a_cookie(site: Site) -> None:
    """A late request with the old id, and with a leftover, does not sign the browser out."""
    browser = Browser(site, {}, user_agent="x")
    await browser.begin(n=1)
    old, over = browser.cookie, await ended(site)
    assert old is not None
    await browser.open(page(Session.regenerate_id))
    site.events.clear()
    seen, answer = await sent(site, [over, old])
    assert (seen, answer.cookies, site.events) == ({}, [], ["retired_session"])


async def test_one_cookie_costs_no_look(site: Site) -> None:
    """The common case is what it was: one checkout, under the lock."""
    token = await token_of(site, n=1)
    site.log.clear()
    assert (await sent(site, [token, token]))[0] == {"n": 1}
    assert site.log[0] == "checkout+lock"


async def test_a_store_that_is_down_is_no_reason_to_guess(site: Site) -> None:
    """Where nobody can say which one is alive the request is answered 503."""

    async def fail(*_: object, **__: object) -> Any:
        from asgi_sessions import SessionStoreError

        raise SessionStoreError("down")

    tokens = [await token_of(site, n=number) for number in range(2)]
    site.store.checkout = fail  # type: ignore[method-assign]  # the fault
    line = "; ".join(f"session={token}" for token in tokens).encode()
    answer = await site.request(page(), headers=[(b"cookie", line), (b"user-agent", b"x")])
    assert answer.status == 503


# --- leftovers --------------------------------------------------------------------------------------


def aged(token: str, seconds: float = 120) -> str:
    """The same session's cookie, as it was signed some time ago."""
    signer = CookieSigner(KEY, clock=lambda: time.time() - seconds)
    return signer.sign(token.partition(".")[0])


REMOVED = "session=null; path={}; expires=Thu, 01 Jan 1970 00:00:00 GMT; httponly; samesite=lax"


async def test_a_leftover_is_removed_before_the_live_one_is_sent_again(site: Site) -> None:
    """Within the cookie's scope only, and in this order, for the browser to keep the live one in any case."""
    wide = site.option(domain="example.com")
    live, over = aged(await token_of(site, n=1)), await ended(site)
    seen, answer = await sent(wide, [over, live], path="/shop/cart")
    assert seen == {"n": 1}
    *removals, again = answer.cookies
    assert removals == [
        REMOVED.format("/"),
        REMOVED.format("/shop"),
        REMOVED.format("/shop") + "; domain=example.com",
        REMOVED.format("/shop/cart"),
        REMOVED.format("/shop/cart") + "; domain=example.com",
    ]
    assert again.startswith(f"session={live.partition('.')[0]}.")
    assert again.endswith("; domain=example.com")
    assert answer.header("cache-control") == ["no-store"]


@pytest.mark.parametrize(
    ("cookies", "headers"),
    [
        ("fresh", []),  # the live one was sent a moment ago
        ("alone", []),
        ("forged", []),  # somebody else's cookie of our name: it is not ours to remove
        ("leftover", [(b"cache-control", b"public, max-age=60")]),
    ],
)
async def test_leftovers_stay_where_it_is_not_sure(
    site: Site, cookies: str, headers: list[tuple[bytes, bytes]]
) -> None:
    """Nothing is removed with a page for everybody, twice within a minute, or beside a stranger's cookie."""
    wide = site.option(domain="example.com")
    token, over = await token_of(site, n=1), await ended(site)
    tokens = {
        "fresh": [token, over],
        "alone": [aged(token)],
        "forged": [aged(token), over, "x"],
        "leftover": [aged(token), over],
    }[cookies]
    line = "; ".join(f"session={each}" for each in tokens).encode()
    request = [(b"cookie", line), (b"user-agent", b"x")]
    answer = await wide.request(page(headers=headers), headers=request)
    assert answer.cookies == []


async def test_a_leftover_goes_with_a_new_id_too(site: Site) -> None:
    """Who signs in beside a leftover gets the new cookie last."""
    wide = site.option(domain="example.com")
    token, over = await token_of(site, n=1), await ended(site)
    line = f"session={over}; session={token}".encode()
    act = page(lambda session: session.login("ada"))
    answer = await wide.request(act, headers=[(b"cookie", line), (b"user-agent", b"x")])
    assert [cookie.partition(";")[0] == "session=null" for cookie in answer.cookies] == [True, False]


# --- somebody else's cookie of our name ---------------------------------------------------------------


async def test_a_cookie_of_our_name_from_inside_is_told_once(site: Site) -> None:
    """The remedy is named; the answer goes out as it is."""
    theirs = (b"Set-Cookie", b"session=eyJhIjogMX0=.Zg; path=/; httponly")
    for _ in range(2):
        answer = await site.request(messages(start(200, [theirs]), chunk()))
        assert answer.headers == [theirs]
    assert site.events == ["cookie_clash"]


async def test_other_cookies_from_inside_are_nobodys_business(site: Site) -> None:
    """An app sets what it likes under other names."""
    await site.request(messages(start(200, [(b"set-cookie", b"session_2=1"), (b"x", b"session=1")]), chunk()))
    assert site.events == []


def nested(
    inner_options: dict[str, Any], outer_options: dict[str, Any]
) -> tuple[SessionMiddleware, list[str]]:
    """A middleware of ours around another one, each with an app's part; both count in their session."""
    told: list[str] = []

    async def count(scope: Scope, receive: Receive, send: Send) -> None:
        scope["session"]["inner"] = scope["session"].get("inner", 0) + 1
        await page()(scope, receive, send)

    inner = SessionMiddleware(count, KEY, fingerprint=None, **inner_options)

    async def mount(scope: Scope, receive: Receive, send: Send) -> None:
        scope["session"]["outer"] = scope["session"].get("outer", 0) + 1
        await inner({**scope}, receive, send)

    options: dict[str, Any] = {"fingerprint": None, "on_event": lambda event: told.append(event.name)}
    return SessionMiddleware(mount, KEY, **options, **outer_options), told


async def counts(outer: SessionMiddleware) -> list[dict[str, Any]]:
    """What the session of a browser holds after each of three requests."""
    site = Site()
    site.middleware = outer
    browser, found = Browser(site, {}), []
    for _ in range(3):
        await browser.open(page())
        data = await outer.store.get(browser.session_id)
        found.append({} if data is None else dict(data.metadata))
    return found


async def test_two_of_ours_with_the_default_store_are_one() -> None:
    """An app within an app that brings the middleware as well does not end the outer one's session."""
    outer, told = nested({}, {})
    assert await counts(outer) == [{"outer": n, "inner": n} for n in (1, 2, 3)]
    assert told == ["session_created"]


async def test_what_is_dead_here_may_live_inside() -> None:
    """The cookie of a middleware inside with a path and a store of its own is no leftover."""
    outer, _ = nested({"store": InMemorySessionStore(), "path": "/admin"}, {"store": InMemorySessionStore()})
    site = Site()
    site.middleware = outer
    first = await site.request(page(), path="/admin/a")
    tokens = [aged(line.partition("=")[2].partition(";")[0]) for line in first.cookies]
    assert len(tokens) == 2
    line = "; ".join(f"session={token}" for token in tokens).encode()
    again = await site.request(page(), headers=[(b"cookie", line)], path="/admin/a")
    assert [cookie for cookie in again.cookies if "null" in cookie and "path=/admin;" in cookie] == []
    assert [data.metadata for data in await outer.store.find(SessionFilter())] == [{"outer": 2}]


async def test_two_of_ours_that_end_each_other_are_told_of() -> None:
    """With stores of their own they must have names of their own."""
    own = {"store": InMemorySessionStore()}
    outer, told = nested({"store": InMemorySessionStore()}, own)
    await counts(outer)
    assert told.count("cookie_clash") == 1
    outer, told = nested({"store": InMemorySessionStore(), "session_cookie": "inner"}, own)
    assert await counts(outer) == [{"outer": n} for n in (1, 2, 3)]
    assert told == ["session_created"]
