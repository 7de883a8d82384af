"""The cookie: what is found in a request, what is rendered."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st
from itsdangerous import BadSignature, TimestampSigner
from starlette.middleware.sessions import SessionMiddleware as StarletteSessions
from starlette.requests import Request
from starlette.types import Message, Receive, Scope, Send

from asgi_sessions.asgi import Headers
from asgi_sessions.client.cookie import (
    ABSURD,
    AMBIGUOUS,
    BAD_SIGNATURE,
    MAX_COOKIE_BYTES,
    MAX_PAIR_BYTES,
    NO_COOKIE,
    Presented,
    SessionCookie,
    cookie_values,
)
from asgi_sessions.client.headers import by_name
from asgi_sessions.client.signer import MAX_TOKEN_BYTES, CookieSigner, Verified

KEY = "k" * 32
OLD_KEY = "o" * 32
ID = "0123456789abcdef" * 2
OTHER_ID = "fedcba9876543210" * 2
NOW = 1_750_000_000


def clock() -> float:
    return NOW + 0.75


def token(session_id: str = ID, key: object = KEY, at: float = NOW) -> bytes:
    return CookieSigner(key, clock=lambda: at).sign(session_id).encode()


# --- reading --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lines", "values"),
    [
        ([], []),
        ([b""], []),
        ([b"session=a"], [b"a"]),
        ([b"session="], [b""]),
        ([b"session"], []),
        ([b"session;session=a"], [b"a"]),
        ([b"a=1; session=b; c=2"], [b"b"]),
        ([b"a=1;session=b;c=2"], [b"b"]),
        ([b"a=1", b"session=b"], [b"b"]),
        ([b"session=a; session=b", b"session=c"], [b"a", b"b", b"c"]),
        ([b"\t session \t= a b\t ;"], [b"a b"]),
        ([b"session=a=b="], [b"a=b="]),
        ([b'session="a"'], [b'"a"']),
        ([b'x="; session=a; y="'], [b"a"]),
        ([b"session=%61"], [b"%61"]),
        ([b"Session=a"], []),
        ([b"xsession=a; sessionx=b; x-session=c"], []),
        ([b"session\x00=a"], []),
        ([b"\x0csession=a; \xa0session=b; \x85session=c; \x0bsession=d"], []),
        ([b"$Version=1; session=a; $Path=/"], [b"a"]),
        ([b"a=1, session=b"], []),
        ([b"=session=a"], []),
        ([b";;;=;=;session=a"], [b"a"]),
    ],
)
def test_cookies_are_found_by_exact_name(lines: list[bytes], values: list[bytes]) -> None:
    """Only a pair whose name is ours to the byte counts, whatever surrounds it."""
    assert cookie_values(header(*lines), b"session") == values


def header(*lines: bytes) -> bytes:
    """What is read of a request with these lines."""
    return by_name([(b"host", b"example.com"), *((b"cookie", line) for line in lines)]).get(b"cookie", b"")


def reference_values(lines: list[bytes], name: bytes) -> list[bytes]:
    """RFC 6265 section 5.4 read backwards, one byte after the other."""
    found = []
    for line in lines:
        key, value, in_value = b"", b"", False
        for byte in [*line, ord(";")]:
            if byte == ord(";"):
                if in_value and key.strip(b" \t") == name:
                    found.append(value.strip(b" \t"))
                key, value, in_value = b"", b"", False
            elif byte == ord("=") and not in_value:
                in_value = True
            elif in_value:
                value += bytes([byte])
            else:
                key += bytes([byte])
    return found


cookie_bytes = st.one_of(
    st.binary(max_size=60),
    st.lists(
        st.sampled_from([b"s", b"id", b"=", b";", b" ", b"\t", b'"', b"\\", b",", b"\xa0", b"\x00", b"v"])
    ).map(b"".join),
)


@given(st.lists(cookie_bytes, max_size=4), st.sampled_from([b"s", b"id", b"sid"]))
def test_the_parser_agrees_with_a_naive_one(lines: list[bytes], name: bytes) -> None:
    """No bytes make it raise, or find a cookie that is not there, or miss one that is."""
    assert cookie_values(header(*lines), name) == reference_values(lines, name)


def calls_made_by(work: Callable[[], object]) -> int:
    """How many functions, C functions included, `work` calls."""
    calls = 0

    def count(frame: FrameType, event: str, argument: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        work()
    finally:
        sys.setprofile(before)
    return calls


@pytest.mark.parametrize("piece", [b"session=;", b";", b"=", b"session", b'"', b"a=b; ", token() + b";"])
def test_hostile_headers_cost_linear_work(piece: bytes) -> None:
    """Twice the bytes make at most twice the calls."""
    small, large = (b"session=" + piece * count for count in (300, 600))
    once, again = SessionCookie(KEY), SessionCookie(KEY)  # two, for each remembers what it has verified
    assert calls_made_by(lambda: once.read(large)) <= 2 * calls_made_by(lambda: again.read(small))


def read(*lines: bytes, fallbacks: tuple[str, ...] = (OLD_KEY,)) -> Presented:
    return SessionCookie(KEY, fallbacks=fallbacks).read(header(*lines))


def rivals(*verified: tuple[str, int, bool], only_ours: bool = True) -> Presented:
    seen = tuple(Verified(*each) for each in verified)
    return Presented(rivals=seen, only_ours=only_ours)


def forged(count: int) -> list[bytes]:
    """Different values of our name that nobody signed."""
    return [b"session=x%d" % number for number in range(count)]


def planted(count: int) -> list[bytes]:
    """Different values of our name, each of a session of its own."""
    return [b"session=" + token(f"{number:032x}") for number in range(count)]


VALID = Presented(ID, NOW, False)
STALE = Presented(ID, NOW, True)
GOOD, OLD = b"session=" + token(), b"session=" + token(key=OLD_KEY)
OTHER = b"session=" + token(OTHER_ID)


@pytest.mark.parametrize(
    ("lines", "presented"),
    [
        ([], NO_COOKIE),
        ([b"theme=dark"], NO_COOKIE),
        ([b"xsession=1"], NO_COOKIE),
        ([GOOD], VALID),
        ([b"a=1; " + GOOD + b"; b=2"], VALID),
        ([b"a=1", GOOD], VALID),
        ([OLD], STALE),
        ([b"session=null"], BAD_SIGNATURE),
        ([b'session="' + token() + b'"'], BAD_SIGNATURE),
        ([b"session=x", GOOD], VALID),
        ([GOOD, b"session=x"], VALID),
        ([GOOD, GOOD], VALID),
        ([GOOD, OTHER], rivals((ID, NOW, False), (OTHER_ID, NOW, False))),
        ([OLD, OTHER], rivals((OTHER_ID, NOW, False), (ID, NOW, True))),
        ([GOOD, b"session=x", OTHER], rivals((ID, NOW, False), (OTHER_ID, NOW, False), only_ours=False)),
        ([GOOD, OTHER, OLD, OTHER], rivals((ID, NOW, False), (OTHER_ID, NOW, False))),
        ([OLD, GOOD], VALID),
        ([GOOD, OLD], VALID),
        ([b"session=" + token(at=NOW - 9), GOOD], VALID),
        ([b"session=" + token(key=OLD_KEY, at=NOW + 9), GOOD], VALID),
        ([b"session=x; " * 3 + GOOD], VALID),
        ([b"session=x; " * 9 + GOOD], VALID),
        ([*forged(3), GOOD], VALID),
        ([*forged(4), GOOD], AMBIGUOUS),
        ([GOOD, *forged(4)], AMBIGUOUS),
        ([*planted(4), GOOD], AMBIGUOUS),
        ([GOOD, *planted(4)], AMBIGUOUS),
        ([*planted(2), *forged(2), GOOD], AMBIGUOUS),
        (forged(4), BAD_SIGNATURE),
        (forged(5), AMBIGUOUS),
        ([b"a=" + b"x" * (MAX_COOKIE_BYTES - 2)], NO_COOKIE),
        ([b"a=" + b"x" * (MAX_COOKIE_BYTES - 1)], ABSURD),
        ([GOOD, b"x" * (MAX_COOKIE_BYTES // 2), b"x" * (MAX_COOKIE_BYTES // 2)], ABSURD),
    ],
)
def test_what_a_request_presents(lines: list[bytes], presented: Presented) -> None:
    """One valid id counts, of several the store decides, and each refusal says why.

    Neither how many were planted nor their order decides for the planted ones.
    """
    assert read(*lines) == presented


@pytest.mark.parametrize(
    ("presented", "reason"),
    [(NO_COOKIE, None), (BAD_SIGNATURE, "bad_signature"), (AMBIGUOUS, "ambiguous"), (ABSURD, "absurd")],
)
def test_refusals_carry_no_id(presented: Presented, reason: str | None) -> None:
    """Without a session there is a reason, or there was no cookie."""
    assert (presented.session_id, presented.reason) == (None, reason)


def test_a_request_without_our_cookie_gets_the_shared_answer() -> None:
    """Anonymous traffic allocates nothing."""
    assert read() is NO_COOKIE
    assert read(b"theme=dark") is NO_COOKIE


@given(st.lists(cookie_bytes | st.just(GOOD) | st.just(OTHER), max_size=4))
def test_read_never_raises_and_never_invents_an_id(lines: list[bytes]) -> None:
    """Whatever the lines are, the id is one that we signed."""
    assert read(*lines).session_id in (None, ID, OTHER_ID)


# --- rendering ------------------------------------------------------------------------------------

OPTIONS: list[dict[str, Any]] = [
    {},
    {"max_age": None},
    {"path": "/app"},
    {"same_site": "strict"},
    {"same_site": "none", "https_only": True},
    {"https_only": True},
    {"https_only": False},
    {"domain": "example.com"},
    {"domain": ".example.com", "https_only": True},
    {"partitioned": True, "https_only": True},
    {"session_cookie": "__Host-id", "https_only": True},
    {"max_age": 60, "path": "/a b", "same_site": "none", "https_only": True, "domain": "x.org"},
    {"max_age": None, "https_only": True, "domain": "x.org", "partitioned": True},
]


def starlettes(**options: Any) -> tuple[bytes, bytes]:
    """What Starlette's middleware sets for a changed session and for a cleared one."""
    sent: list[bytes] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        session = Request(scope).session
        if session:
            session.clear()
        else:
            session["a"] = 1
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def receive() -> Message:
        raise AssertionError("nothing is read")

    async def send(message: Message) -> None:
        sent.append(dict(message["headers"])[b"set-cookie"])

    middleware = StarletteSessions(app, KEY, **options)
    for _ in range(2):
        cookies = [(b"cookie", line.split(b";")[0]) for line in sent]
        anyio.run(middleware, {"type": "http", "headers": cookies}, receive, send)
    return sent[0], sent[1]


def ours(*, secure: bool, **options: Any) -> tuple[bytes, bytes]:
    max_age = options.pop("max_age", 1209600)
    options["name"] = options.pop("session_cookie", "session")
    cookie = SessionCookie(KEY, **options)
    return cookie.render(ID, max_age=max_age, secure=secure), cookie.render_removal(secure=secure)


def without_value(line: bytes) -> tuple[bytes, bytes]:
    name, _, rest = line.partition(b"=")
    return name, rest.partition(b";")[2]


def test_an_age_of_nothing_is_said() -> None:
    """`max_age=0` ends the cookie at once. Starlette before 1.8 leaves it out: a browser session."""
    rendered = SessionCookie(KEY).render(ID, max_age=0, secure=False)
    assert b"; path=/; Max-Age=0; httponly" in rendered


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_attributes_are_starlettes_to_the_byte(options: dict[str, Any]) -> None:
    """Cookie and removal differ from Starlette's in the value alone."""
    set_line, removal = ours(secure=False, **options)
    their_line, their_removal = starlettes(**options)
    assert without_value(set_line) == without_value(their_line)
    assert removal == their_removal


@pytest.mark.parametrize(
    ("https_only", "request_is_secure", "cookie_is_secure"),
    [(None, False, False), (None, True, True), (True, False, True), (False, True, False)],
)
def test_secure_follows_the_request_unless_forced(
    https_only: bool | None, request_is_secure: bool, cookie_is_secure: bool
) -> None:
    """`https_only=None` looks at the scheme, True and False do not."""
    for line in ours(secure=request_is_secure, https_only=https_only):
        assert (b"; secure" in line) is cookie_is_secure


def test_partitioned_only_where_secure() -> None:
    """On plain http a partitioned cookie would be dropped, so it is an ordinary one there."""
    assert all(line.endswith(b"; secure; partitioned") for line in ours(secure=True, partitioned=True))
    assert not any(b"partitioned" in line for line in ours(secure=False, partitioned=True))


@pytest.mark.parametrize(
    ("max_age", "said"),
    [(30, "30"), (30.5, "31"), (1209600.0, "1209600"), (0.001, "1"), (0, "0"), (-1, "-1")],
)
def test_an_age_on_the_wire_is_a_whole_number(max_age: float, said: str) -> None:
    """Rounded up: browsers pass over another `Max-Age`, and the cookie would end with the browser."""
    line = SessionCookie(KEY).render(ID, max_age=max_age, secure=False)
    assert f"; Max-Age={said}; ".encode() in line


SET = [
    ([(b"set-cookie", b"session=a; path=/")], True),
    ([(b"Set-Cookie", b"session=null; expires=Thu, 01 Jan 1970 00:00:00 GMT")], True),
    ([(b"set-cookie", b"other=1"), (b"set-cookie", b"session=")], True),
    ([(b"set-cookie", b"session2=a"), (b"set-cookie", b"xsession=a"), (b"set-cookie", b"Session=a")], False),
    ([(b"cookie", b"session=a"), (b"x-cookie-ab", b"session=a")], False),
    ([], False),
]


@pytest.mark.parametrize(("headers", "found"), SET)
def test_a_cookie_of_our_name_is_found_in_an_answer(headers: Headers, found: bool) -> None:
    """In any line, whatever it says; other names are other people's."""
    assert SessionCookie(KEY).is_set_by(headers) is found


LEFTOVERS: list[tuple[dict[str, Any], str, list[bytes]]] = [
    ({}, "/", []),
    ({}, "/cart", [b"; path=/cart; "]),
    ({"domain": "example.com"}, "/", [b"; path=/; "]),
    ({"domain": "example.com", "name": "s"}, "/a", [b"; path=/; ", b"; path=/a; ", b"; path=/a; "]),
    ({"name": "__Host-s", "https_only": True}, "/cart", []),
]


@pytest.mark.parametrize(("options", "requested", "paths"), LEFTOVERS)
def test_leftovers_are_removed_where_they_may_lie(
    options: dict[str, Any], requested: str, paths: list[bytes]
) -> None:
    """Each line names another scope than the cookie's own, and nothing but a removal."""
    cookie = SessionCookie(KEY, **options)
    lines = cookie.render_leftover_removals(requested, secure=True)
    assert len(set(lines)) == len(lines) == len(paths)
    assert cookie.render_removal(secure=True) not in lines
    for line, path in zip(lines, paths, strict=True):
        assert (
            b"=null" + path + b"expires=Thu, 01 Jan 1970 00:00:00 GMT; httponly; samesite=lax; secure" in line
        )
    domains = [b"domain=example.com" in line for line in lines]
    assert domains == [False, False, True][: len(lines)] if len(lines) == 3 else not any(domains)


def test_a_rendered_cookie_is_read_back() -> None:
    """What render gives out, read takes, with the second it was issued."""
    cookie = SessionCookie(KEY, clock=clock)
    line = cookie.render(ID, max_age=None, secure=False)
    assert cookie.read(line.split(b";")[0]) == VALID


@pytest.mark.parametrize("name", ["s", "n" * (MAX_PAIR_BYTES - MAX_TOKEN_BYTES)])
def test_name_and_value_fit_into_a_browser(name: str) -> None:
    """Even the longest token under the longest name keeps within 4096 bytes."""
    cookie = SessionCookie(KEY, name=name, clock=lambda: 2.0**63)
    longest, _, _ = cookie.render(ID, max_age=1, secure=True).partition(b";")
    assert len(longest) - 1 <= 4096
    assert len(longest.partition(b"=")[2]) == MAX_TOKEN_BYTES


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": ""}, "not a cookie name"),
        ({"name": "a b"}, "not a cookie name"),
        ({"name": "a;b"}, "not a cookie name"),
        ({"name": "a=b"}, "not a cookie name"),
        ({"name": "a\n"}, "not a cookie name"),
        ({"name": "sesión"}, "not a cookie name"),
        ({"name": "n" * (MAX_PAIR_BYTES - MAX_TOKEN_BYTES + 1)}, "shorten it"),
        ({"name": "__Secure-id"}, "set https_only=True"),
        ({"name": "__secure-id", "https_only": False}, "set https_only=True"),
        ({"name": "__Host-id"}, "set https_only=True"),
        ({"name": "__HOST-id", "https_only": True, "domain": "example.com"}, "domain=None"),
        ({"name": "__Host-id", "https_only": True, "path": "/app"}, "path='/'"),
        ({"same_site": "none"}, "set https_only=True"),
        ({"same_site": "none", "https_only": False}, "set https_only=True"),
        ({"same_site": "Lax"}, "'lax', 'strict' or 'none'"),
        ({"same_site": None}, "'lax', 'strict' or 'none'"),
        ({"same_site": "lax; secure"}, "'lax', 'strict' or 'none'"),
        ({"partitioned": True, "https_only": False}, "set https_only=True"),
        ({"path": ""}, "begin with '/'"),
        ({"path": "app"}, "begin with '/'"),
        ({"path": "/;domain=evil"}, "without ';'"),
        ({"path": "/\r\nset-cookie: a=b"}, "printable ASCII"),
        ({"path": "/ü"}, "printable ASCII"),
        ({"domain": ""}, "domain=None"),
        ({"domain": "a b"}, "without scheme, port or spaces"),
        ({"domain": "a;b"}, "bare host name"),
        ({"domain": "a\n"}, "bare host name"),
        ({"domain": "https://example.com"}, "without scheme"),
        ({"domain": "example.com:8000"}, "port"),
        ({"domain": "bücher.example"}, "xn-- form"),
    ],
)
def test_what_browsers_refuse_is_refused_first(options: dict[str, Any], message: str) -> None:
    """The constructor fails with the remedy instead of every browser silently."""
    with pytest.raises(ValueError, match=message):
        SessionCookie(KEY, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"name": "__Host-id", "https_only": True},
        {"name": "__Secure-id", "https_only": True, "domain": "example.com", "path": "/app"},
        {"same_site": "none", "https_only": True},
        {"partitioned": True},
        {"path": "/a=b,c"},
        {"name": "!#$%&'*+-.^_`|~aZ09"},
    ],
)
def test_what_browsers_take_is_taken(options: dict[str, Any]) -> None:
    """The checks refuse nothing that works."""
    assert SessionCookie(KEY, **options).render(ID, max_age=1, secure=True)


def test_foreign_itsdangerous_tokens_stay_foreign() -> None:
    """Our token is no good for a signer with the same key and itsdangerous' defaults."""
    with pytest.raises(BadSignature):
        TimestampSigner(KEY).unsign(token())
