"""The cookie: its attributes, its prefixes, its size, and what else is in the header."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
from asgi import KEY, Site, http_scope, page

from asgi_sessions import InMemorySessionStore, SessionMiddleware, SessionStore
from asgi_sessions.asgi import Message
from asgi_sessions.client.signer import CookieSigner
from security.requirements import requirement
from security.service import Service, Visitor, login, logout, read, write

pytestmark = pytest.mark.anyio


def attributes(line: str) -> dict[str, str]:
    """The attributes of a `Set-Cookie` line, names in lower case."""
    pairs = [piece.strip().partition("=") for piece in line.split(";")[1:]]
    return {name.lower(): value for name, _, value in pairs}


async def lines_set(visitor: Visitor) -> list[str]:
    """The `Set-Cookie` lines of a session's life: begun, signed in, ended."""
    answers = [await visitor.open(act) for act in (write, login, logout)]
    lines = [line for answer in answers for line in answer.cookies]
    assert len(lines) == 3
    return lines


@requirement("COOKIE-1")
@pytest.mark.parametrize(("scheme", "secure"), [("http", False), ("https", True)])
async def test_attributes_by_default(service: Service, scheme: str, secure: bool) -> None:
    """The same on every cookie that is set or removed; no domain, so that no other host gets it."""
    for line in await lines_set(service.visitor(scheme=scheme)):
        found = attributes(line)
        assert found.pop("samesite") == "lax"
        assert found.pop("path") == "/"
        assert found.pop("httponly") == ""
        assert ("secure" in found) is secure
        assert set(found) <= {"secure", "max-age", "expires"}


@requirement("COOKIE-1")
@pytest.mark.parametrize(("scheme", "secure"), [("ws", False), ("wss", True)])
async def test_attributes_on_a_websocket(service: Service, scheme: str, secure: bool) -> None:
    """The cookie that rides on the accept is like any other."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        async with scope["session"].transaction() as data:
            data.metadata["n"] = 1
        await send({"type": "websocket.accept"})

    (accept,) = await service.connect(app, scheme=scheme)
    (line,) = [value.decode() for name, value in accept["headers"] if name == b"set-cookie"]
    found = attributes(line)
    assert {"httponly", "samesite"} <= set(found)
    assert ("secure" in found) is secure


@requirement("COOKIE-2")
@pytest.mark.parametrize(
    ("options", "remedy"),
    [
        ({"session_cookie": "__Host-id"}, "https_only=True"),
        ({"session_cookie": "__Host-id", "https_only": False}, "https_only=True"),
        ({"session_cookie": "__host-ID"}, "https_only=True"),
        ({"session_cookie": "__Host-id", "https_only": True, "path": "/app"}, "path='/'"),
        ({"session_cookie": "__Host-id", "https_only": True, "domain": "example.com"}, "domain=None"),
        ({"session_cookie": "__Secure-id"}, "https_only=True"),
        ({"session_cookie": "__SECURE-id", "https_only": False}, "https_only=True"),
        ({"session_cookie": "__Http-id"}, "https_only=True"),
        ({"session_cookie": "__Host-Http-id", "https_only": True, "path": "/app"}, "path='/'"),
        ({"same_site": "none"}, "https_only=True"),
        ({"same_site": "none", "https_only": False}, "https_only=True"),
        ({"partitioned": True, "https_only": False}, "https_only=True"),
    ],
)
def test_what_browsers_refuse_does_not_start(options: dict[str, Any], remedy: str) -> None:
    """A cookie that is dropped in silence is found when the app starts."""
    with pytest.raises(ValueError, match=remedy):
        SessionMiddleware(page(), KEY, **options)


@requirement("COOKIE-2")
@pytest.mark.parametrize("name", ["__Host-id", "__Secure-id"])
async def test_prefixed_cookies_work(service: Service, name: str) -> None:
    """Set and removed with what their prefix promises, and found; a cookie without it does not count."""
    secured = service.option(session_cookie=name, https_only=True)
    visitor = secured.visitor(name=name)
    await visitor.begin()
    assert await visitor.sees() == {"n": 1}
    assert await visitor.copy(name="id").sees() == {}
    for line in await lines_set(secured.visitor(name=name)):
        found = attributes(line)
        assert line.startswith(f"{name}=")
        assert "secure" in found, "browsers ignore this line"
        assert found["path"] == "/"
        assert "domain" not in found


@requirement("COOKIE-3")
async def test_name_and_value_fit_into_a_browser(service: Service) -> None:
    """The longest name that is taken makes a pair of 4096 bytes, one more is refused."""
    longest = 4096 - (32 + 1 + 11 + 1 + 43)
    long = service.option(session_cookie="s" * longest)
    answer = await long.visitor(name="s" * longest).open(write)
    (line,) = answer.cookies
    assert len(line.partition(";")[0].replace("=", "", 1)) <= 4096
    with pytest.raises(ValueError, match="shorten it"):
        service.option(session_cookie="s" * (longest + 1))


# -- several cookies of one name -----------------------------------------------------------------------

HEADERS: dict[str, tuple[Callable[[bytes, bytes], list[bytes]], bool]] = {
    "planted before": (lambda mine, planted: [planted + b"; " + mine], False),
    "planted after": (lambda mine, planted: [mine + b"; " + planted], False),
    "planted in another line": (lambda mine, planted: [mine, planted], False),
    "planted among many": (lambda mine, planted: [b"a=1; " + mine + b"; b=2; " + planted + b"; c=3"], False),
    "twice the same": (lambda mine, planted: [mine + b"; " + mine], True),
    "an unsigned one before": (lambda mine, planted: [b"session=planted; " + mine], True),
    "an unsigned one after": (lambda mine, planted: [mine + b"; session=planted"], True),
    "an empty one": (lambda mine, planted: [b"session=; " + mine], True),
    "one within quotes": (lambda mine, planted: [mine + b'; a="; ' + planted + b'; b="'], False),
    "one of another case": (
        lambda mine, planted: [mine + b"; " + planted.replace(b"session", b"Session")],
        True,
    ),
    "one with an odd blank": (lambda mine, planted: [mine + b"; \xa0" + planted], True),
    "a nameless one": (lambda mine, planted: [mine + b"; =" + planted], True),
}


@requirement("COOKIE-4")
@pytest.mark.parametrize("how", HEADERS)
async def test_a_planted_cookie_gives_nobody_a_session(service: Service, how: str) -> None:
    """Two signed ids: neither; what no browser would send under our name, or nobody signed, is no cookie."""
    shape, keeps = HEADERS[how]
    victim, attacker = service.visitor(), service.visitor()
    await victim.begin(who="victim")
    await attacker.begin(who="attacker")
    mine, planted = (f"session={visitor.token}".encode() for visitor in (victim, attacker))
    lines = [(b"cookie", line) for line in shape(mine, planted)]
    seen = await victim.copy(token=None).sees(lines)
    assert seen == ({"who": "victim"} if keeps else {})
    assert ("ambiguous_cookie" in service.told) is not keeps
    assert await attacker.sees() == {"who": "attacker"}


# -- injection -----------------------------------------------------------------------------------------

INJECTIONS = ["\r\nSet-Cookie: a=b", "\n", "\r", ";", "; HttpOnly", "\x00", "\x0b", "\u2028", "\x85", "\xff"]


@requirement("COOKIE-5")
@pytest.mark.parametrize("injection", INJECTIONS)
@pytest.mark.parametrize(
    ("option", "value"),
    [("session_cookie", "session"), ("path", "/app"), ("domain", "example.com"), ("same_site", "lax")],
)
def test_settings_cannot_inject(option: str, value: str, injection: str) -> None:
    """A setting that came from outside ends in an error, not in a header of its own."""
    for hostile in (value + injection, injection + value, value[:2] + injection + value[2:]):
        with pytest.raises(ValueError, match=option):
            Service(InMemorySessionStore(), {option: hostile})


@requirement("COOKIE-5")
async def test_values_cannot_inject(store: SessionStore) -> None:
    """What is in the session, or who signs in, is in no header."""
    service = Service(store)

    def act(session: Any) -> None:
        session["x"] = "\r\nSet-Cookie: planted=1"
        session.login("ada\u00e9")

    answer = await service.visitor().open(act)
    for name, value in answer.headers:
        assert b"planted" not in name + value
        assert not {*b"\r\n\x00"} & {*(name + value)}


# -- cost ----------------------------------------------------------------------------------------------

_TOKEN = CookieSigner(KEY, clock=lambda: 1_700_000_000).sign("0" * 32)  # in names of tests: always the same
PIECES = [
    "session=;", "session=x;", "session", "session;", "session ;", "session= ", "session=\"", "session=\\",
    f"session={_TOKEN};", f"session={_TOKEN}", "session=" + "0" * 32 + ".", "session=.", ";", "; ", ";;=",
    "=", "==;", " ", "\t", "\xa0", ",", ", ", '"', '";', '"\\', "\\", "\\\"", "\\012", "%", "%3D", "a=b; ",
    "a=b;", "a", "a=\"b;c\"; ", "$Version=1;", "\x00", "\xff\xfe;", "s=e;s=s;", "sessionsession",
]  # fmt: skip

AGENTS = ["1", "1.", "1_", "1._", "/1", "/a", "/", "v1", "(", ";", " ", "a1 ", "1,1_", "Mozilla/5.0 ("]
FORWARDED = [
    "for=", "for=1;", 'for="', 'for="1",', '"', '"",', '";"', '\\"', ",", ";", "for=1.1.1.1,",
    "for=10.0.0.1, ", "=", '","', '"a,b"', "[", "[::1]:1,", "for=unknown,",
]  # fmt: skip
LISTED = ["1", "1,", ",", " ,", "10.0.0.1,", "::1,", "[::1]:1,", "1.1.1.1:", ":", "%", "10.0.0.1, ", "\xb2,"]
COSTS = [("cookie", piece) for piece in PIECES]
COSTS += [("user-agent", piece) for piece in AGENTS]
COSTS += [("forwarded", piece) for piece in FORWARDED]
COSTS += [("x-forwarded-for", piece) for piece in LISTED]

SMALL, LARGE = 7_500, 60_000  # bytes: eight times as many
HARMLESS = 0.002  # seconds of processor time


async def cost(header: str, piece: str, size: int) -> float:
    """Processor seconds of one request with a header of this size, the best of several."""
    site = Site({"trusted_proxies": ["10.0.0.0/8"]})
    value = (piece * (size // len(piece) + 1)).encode("latin-1")[:size]

    async def receive() -> Message:
        raise AssertionError("nothing is read")

    async def send(message: Message) -> None:
        assert message.get("status", 200) == 200

    best = float("inf")
    for round_ in range(7):
        own = (header.encode(), value[:-1] + b"%d" % round_)  # or a cache would answer
        scope = http_scope(headers=[own], client=("10.0.0.1", 1))
        scope["tests.app"] = page(read)
        began = time.process_time()
        await site.middleware(scope, receive, send)
        best = min(best, time.process_time() - began)
    return best


@requirement("DOS-4")
@pytest.mark.parametrize(("header", "piece"), COSTS)
async def test_hostile_headers_cost_linear_time(header: str, piece: str) -> None:
    """Eight times the bytes may cost eight times as much, thrice that for noise; quadratic would be 64."""
    small, large = await cost(header, piece, SMALL), await cost(header, piece, LARGE)
    assert large < 24 * small + HARMLESS, f"{large / small:.0f} times the cost for 8 times the bytes"


@requirement("DOS-4")
@pytest.mark.parametrize("piece", PIECES)
async def test_absurd_cookies_are_answered_without_a_look(piece: str) -> None:
    """300 kB of whatever shape: 400, and neither the app nor the store hears of it."""
    site = Site()
    value = (piece * 300_000)[:300_000].encode("latin-1")
    answer = await site.request(page(read), headers=[(b"cookie", value)])
    assert answer.status == 400
    assert site.log == ["start 400", "body"]
    assert site.events == ["absurd_cookie"]
