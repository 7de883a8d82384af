"""Who may use a cookie: the client it was given to, through proxies and WebSockets too."""

from __future__ import annotations

from typing import Any

import pytest
from asgi import FIREFOX

from asgi_sessions import InMemorySessionStore, Session, SessionStore
from asgi_sessions.asgi import Message, Receive, Scope, Send
from security.requirements import requirement
from security.service import CHROME, Service, Visitor, login, logout, write

pytestmark = pytest.mark.anyio

THIEVES: dict[str, dict[str, str]] = {
    "another browser": {"user_agent": CHROME},
    "another system": {"user_agent": FIREFOX.replace("X11; Linux x86_64", "Windows NT 10.0")},
    "a script": {"user_agent": "curl/8.5.0"},
    "no user agent": {"user_agent": ""},
    "another address": {"address": "203.0.113.8"},
    "another network": {"address": "2001:db8::1"},
    "no address": {"address": ""},
}


def clear(session: Session) -> None:
    session.clear()


def regenerate(session: Session) -> None:
    session.regenerate_id()


@requirement("CLIENT-1")
@pytest.mark.parametrize("name", THIEVES)
async def test_a_stolen_cookie_is_worth_nothing_elsewhere(service: Service, name: str) -> None:
    """Another client sees a fresh session, is told nothing, and an event says so."""
    visitor = service.visitor()
    await visitor.begin(secret="s")
    thief = visitor.copy(**THIEVES[name])
    assert await thief.sees() == {}
    assert thief.token == visitor.token, "the thief was sent a cookie"
    assert service.told == ["fingerprint_mismatch"]
    assert await visitor.sees() == {"secret": "s"}


@requirement("CLIENT-1")
@pytest.mark.parametrize("act", [write, login, logout, clear, regenerate])
async def test_a_thief_cannot_touch_the_session(service: Service, act: Any) -> None:
    """What it does is done to a session of its own, byte for byte."""
    visitor = service.visitor()
    session_id = await visitor.begin(secret="s")
    before = await service.store.get(session_id)
    thief = visitor.copy(user_agent=CHROME)
    await thief.open(act)
    assert await service.store.get(session_id) == before
    assert thief.token is not None
    if thief.session_id != session_id:
        assert "secret" not in await thief.sees()
    assert await visitor.sees() == {"secret": "s"}


@requirement("CLIENT-1")
@pytest.mark.parametrize(
    "same",
    [
        {"user_agent": FIREFOX.replace("140.0", "141.0")},
        {"address": "::ffff:203.0.113.7"},
    ],
)
async def test_the_same_client_is_known_again(service: Service, same: dict[str, str]) -> None:
    """After an update of the browser, and by an address in its other spelling."""
    visitor = service.visitor()
    await visitor.begin(secret="s")
    assert await visitor.copy(**same).sees() == {"secret": "s"}


@requirement("CLIENT-1")
async def test_a_new_id_is_bound_to_the_client_too(service: Service) -> None:
    """A login does not lose the binding."""
    visitor = service.visitor()
    await visitor.begin()
    await visitor.open(login)
    assert await visitor.copy(address="203.0.113.8").sees() == {}


# -- proxies -------------------------------------------------------------------------------------------

CLIENT, ATTACKER, PROXY = "203.0.113.7", "198.51.100.66", "10.0.0.1"
XFF, FORWARDED = b"x-forwarded-for", b"forwarded"


def lines(name: bytes, *values: str) -> list[tuple[bytes, bytes]]:
    return [(name, value.encode("latin-1")) for value in values]


KNOWN: dict[str, tuple[str, list[tuple[bytes, bytes]]]] = {
    "the proxy's own word": (PROXY, lines(XFF, CLIENT)),
    "two proxies": (PROXY, lines(XFF, f"{CLIENT}, 10.0.0.2")),
    "two proxies, a line each": (PROXY, lines(XFF, CLIENT, "10.0.0.2")),
    "the client invented a hop": (PROXY, lines(XFF, f"{ATTACKER}, {CLIENT}")),
    "the client invented a line": (PROXY, lines(XFF, ATTACKER, CLIENT)),
    "the client wrote garbage": (PROXY, lines(XFF, f'", \\, , unknown, {CLIENT}')),
    "a v4-mapped client": (PROXY, lines(XFF, f"::ffff:{CLIENT}")),
    "a v4-mapped proxy": (f"::ffff:{PROXY}", lines(XFF, CLIENT)),
    "a v4-mapped proxy on the way": (PROXY, lines(XFF, f"{CLIENT}, ::ffff:10.0.0.2")),
    "with a port": (PROXY, lines(XFF, f"{CLIENT}:4711")),
    "the standard header": (PROXY, lines(FORWARDED, f"for={CLIENT};proto=https")),
    "the standard header, two proxies": (PROXY, lines(FORWARDED, f'for="{CLIENT}:1", for=10.0.0.2')),
    "the standard header, an invented hop": (PROXY, lines(FORWARDED, f"for={ATTACKER}, for={CLIENT}")),
    "both headers agree": (PROXY, lines(XFF, CLIENT) + lines(FORWARDED, f"for={CLIENT}")),
}

UNKNOWN: dict[str, tuple[str, list[tuple[bytes, bytes]]]] = {
    "no proxy header": (PROXY, []),
    "no proxy at all": (ATTACKER, lines(XFF, CLIENT)),
    "no proxy, the standard header": (ATTACKER, lines(FORWARDED, f"for={CLIENT}")),
    "no proxy, posing as one": (ATTACKER, lines(XFF, f"{CLIENT}, {PROXY}")),
    "an invented hop on the left": (PROXY, lines(XFF, f"{CLIENT}, {ATTACKER}")),
    "an invented line above": (PROXY, lines(XFF, CLIENT, ATTACKER)),
    "an invented hop, two proxies": (PROXY, lines(XFF, f"{CLIENT}, {ATTACKER}, 10.0.0.2")),
    "an invented trusted hop": (PROXY, lines(XFF, f"{CLIENT}, 10.0.0.9, {ATTACKER}")),
    "a hop that is no address": (PROXY, lines(XFF, f"{CLIENT}, unknown")),
    "an empty hop": (PROXY, lines(XFF, f"{CLIENT},")),
    "leading zeros": (PROXY, lines(XFF, "203.0.113.007")),
    "a name": (PROXY, lines(XFF, "localhost")),
    "in quotes": (PROXY, lines(XFF, f'"{CLIENT}"')),
    "a v4-compatible peer": (f"::{PROXY}", lines(XFF, CLIENT)),
    "the standard header, invented hop": (PROXY, lines(FORWARDED, f"for={CLIENT}, for={ATTACKER}")),
    "an open quote": (PROXY, lines(FORWARDED, f'for="{CLIENT}', f"for={ATTACKER}")),
    "an open quote that swallows": (PROXY, lines(FORWARDED, f'for={CLIENT};x="', f'for="{ATTACKER}:1"')),
    "a header that the proxy does not keep": (
        PROXY,
        lines(XFF, ATTACKER) + lines(FORWARDED, f"for={CLIENT}"),
    ),
    "the other header": (PROXY, lines(XFF, CLIENT) + lines(FORWARDED, f"for={ATTACKER}")),
    "headers of other products": (
        PROXY,
        [(name, CLIENT.encode()) for name in (b"x-real-ip", b"client-ip", b"true-client-ip", b"via")],
    ),
}


@pytest.fixture
async def proxied(store: SessionStore) -> Visitor:
    """A client of `CLIENT` who has a session behind the proxy."""
    service = Service(store, {"trusted_proxies": ["10.0.0.0/8"]})
    visitor = service.visitor(address=PROXY)
    await visitor.open(lambda session: session.update(secret="s"), lines(XFF, CLIENT))
    service.events.clear()
    return visitor


@requirement("CLIENT-2")
@pytest.mark.parametrize("name", KNOWN)
async def test_the_client_behind_its_proxies_is_known(proxied: Visitor, name: str) -> None:
    """The first address from the right that is no proxy of ours, whatever the client wrote left of it."""
    peer, headers = KNOWN[name]
    assert await proxied.copy(address=peer).sees(headers) == {"secret": "s"}


@requirement("CLIENT-2")
@pytest.mark.parametrize("name", UNKNOWN)
async def test_nobody_poses_as_the_client(proxied: Visitor, name: str) -> None:
    """An attacker who has the cookie and knows the address cannot make the service believe it."""
    peer, headers = UNKNOWN[name]
    assert await proxied.copy(address=peer).sees(headers) == {}
    assert proxied.service.told == ["fingerprint_mismatch"]


@requirement("CLIENT-2")
@pytest.mark.parametrize("name", ["the proxy's own word", "the standard header"])
async def test_without_trusted_proxies_nobody_is_believed(service: Service, name: str) -> None:
    """By default a proxy header is what a client made up."""
    _, headers = KNOWN[name]
    visitor = service.visitor(address=CLIENT)
    await visitor.begin(secret="s")
    assert await visitor.copy(address=ATTACKER).sees(headers) == {}


@requirement("CLIENT-2")
@pytest.mark.parametrize("entry", ["*", "", "proxy.internal", "10.0.0.0/33", "10.0.0.1/8"])
def test_a_wrong_proxy_does_not_start(entry: str) -> None:
    """Nobody trusts everybody by a misspelt network."""
    with pytest.raises(ValueError, match="trusted_proxies"):
        Service(InMemorySessionStore(), {"trusted_proxies": [entry]})


# -- WebSockets ----------------------------------------------------------------------------------------

ORIGIN = "https://example.com"
FOREIGN_ORIGINS = [
    [], [""], ["null"], ["http://example.com"], ["https://example.com:444"], ["https://example.com.evil.org"],
    ["https://evil.org"], ["https://evil.org/https://example.com"], ["https://example.com@evil.org"],
    ["https://xexample.com"], ["https://example.com, https://evil.org"], [ORIGIN, "https://evil.org"],
    ["https://evil.org", ORIGIN], ["https://example.com\x00"], ["//example.com"], ["example.com"],
]  # fmt: skip


def showing(seen: list[dict[str, Any]]) -> Any:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(dict(scope["session"]))
        await send({"type": "websocket.accept"})

    return app


@requirement("WS-1")
@pytest.mark.parametrize("origins", FOREIGN_ORIGINS)
async def test_a_foreign_page_opens_no_websocket(store: SessionStore, origins: list[str]) -> None:
    """Closed before the app runs, although the browser sent the cookie along."""
    service = Service(store, {"allowed_origins": [ORIGIN]})
    visitor = service.visitor()
    await visitor.begin(secret="s")
    seen: list[dict[str, Any]] = []
    sent = await visitor.connect(showing(seen), lines(b"origin", *origins))
    assert sent == [{"type": "websocket.close", "code": 1008, "reason": ""}]
    assert seen == []
    assert service.told == ["origin_refused"]


@requirement("WS-1")
async def test_our_own_page_opens_one(store: SessionStore) -> None:
    """The exact origin, in any case of its letters, as browsers compare it."""
    service = Service(store, {"allowed_origins": [ORIGIN]})
    visitor = service.visitor()
    await visitor.begin(secret="s")
    seen: list[dict[str, Any]] = []
    for origin in (ORIGIN, "https://EXAMPLE.com"):
        (accept,) = await visitor.connect(showing(seen), lines(b"origin", origin))
        assert accept["type"] == "websocket.accept"
    assert seen == [{"secret": "s"}] * 2


@requirement("WS-2")
@pytest.mark.parametrize(
    ("change", "event"),
    [
        ({"token": "forged"}, "bad_signature"),
        ({"user_agent": CHROME}, "fingerprint_mismatch"),
        ({"address": ATTACKER}, "fingerprint_mismatch"),
    ],
)
async def test_a_websocket_is_checked_like_a_request(
    service: Service, change: dict[str, str], event: str
) -> None:
    """Forged and stolen cookies show nothing, and begin nothing after the accept."""
    visitor = service.visitor()
    await visitor.begin(secret="s")
    seen: list[dict[str, Any]] = []
    (accept,) = await visitor.copy(**change).connect(showing(seen))
    assert seen == [{}]
    assert service.told == [event]
    assert not [name for name, _ in accept["headers"] if name == b"set-cookie"]
    await visitor.connect(showing(seen))
    assert seen[-1] == {"secret": "s"}


@requirement("WS-2")
async def test_a_websocket_with_absurd_cookies_is_closed(service: Service) -> None:
    """Before the app runs."""
    seen: list[dict[str, Any]] = []
    sent: list[Message] = await service.connect(showing(seen), lines(b"cookie", "a" * 70_000))
    assert sent == [{"type": "websocket.close", "code": 1008, "reason": ""}]
    assert seen == []
