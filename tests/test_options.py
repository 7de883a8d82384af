"""The middleware's arguments: what is wrong fails in the constructor, with the remedy."""

from __future__ import annotations

import inspect
import re
import warnings
from typing import Any

import pytest
from starlette.middleware.sessions import SessionMiddleware as StarletteSessions

from asgi_sessions import (
    Fingerprint,
    InMemorySessionStore,
    SessionData,
    SessionMiddleware,
)
from asgi_sessions.asgi import Message, Receive, Scope, Send
from asgi_sessions.stores.checkout import Lifetime

KEY = "k" * 32


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    """Is never called here."""


class Demanding(SessionData):
    """A model that no session can begin with."""

    tenant: str
    region: str


async def async_predicate(scope: Scope) -> bool:
    return False


@pytest.mark.parametrize(
    ("options", "error", "remedy"),
    [
        ({"secret_key": ""}, ValueError, "secret_key is empty; make one with"),
        ({"secret_key": None}, ValueError, "secret_key is empty; make one with"),
        ({"secret_key_fallbacks": [""]}, ValueError, r"secret_key_fallbacks\[0\] is empty"),
        ({"secret_key_fallbacks": "o" * 32}, ValueError, r"pass a list of keys: \[old_key\]"),
        ({"session_cookie": ""}, ValueError, "use letters, digits"),
        ({"session_cookie": "a b"}, ValueError, "use letters, digits"),
        ({"session_cookie": "__Host-s"}, ValueError, "set https_only=True"),
        (
            {"session_cookie": "__Host-s", "https_only": True, "domain": "example.com"},
            ValueError,
            "domain=None",
        ),
        ({"session_cookie": "__Host-s", "https_only": True, "path": "/app"}, ValueError, "path='/'"),
        ({"session_cookie": "__Secure-s", "https_only": False}, ValueError, "set https_only=True"),
        ({"same_site": "none"}, ValueError, "set https_only=True"),
        ({"same_site": "none", "https_only": False}, ValueError, "set https_only=True"),
        ({"same_site": "Lax"}, ValueError, "'lax', 'strict' or 'none'"),
        ({"partitioned": True, "https_only": False}, ValueError, "set https_only=True"),
        ({"path": "app"}, ValueError, "must begin with '/'"),
        ({"domain": "https://example.com"}, ValueError, "bare host name"),
        ({"max_age": -2}, ValueError, "None for a browser-session cookie"),
        ({"max_age": "3600"}, TypeError, "max_age is a number, not '3600'"),
        ({"max_age": "3600"}, TypeError, r"as in float\(text\)"),
        ({"max_age": 10**400}, ValueError, "at most 1000000000"),
        ({"max_age": 2e9}, ValueError, "at most 1000000000"),
        ({"lock_timeout": None}, TypeError, "lock_timeout is a number, not None"),
        ({"lock_wait": None}, TypeError, "lock_wait is a number, not None"),
        ({"max_waiters": 1.5}, ValueError, "0 for none"),
        ({"https_only": "false"}, TypeError, "https_only is True or False, not the text 'false'"),
        ({"partitioned": "0"}, TypeError, "partitioned is True or False"),
        ({"rolling": "no"}, TypeError, "rolling is True or False"),
        ({"lock": "off"}, TypeError, 'lock is True, False or "auto"'),
        ({"max_age": True}, TypeError, "max_age is a number"),
        ({"max_age": float("inf")}, ValueError, "max_age is a finite number"),
        ({"idle_timeout": 0}, ValueError, "above 0, or None"),
        ({"idle_timeout": -1}, ValueError, "above 0, or None"),
        ({"idle_timeout": "60"}, TypeError, "idle_timeout is a number"),
        ({"idle_timeout": float("nan")}, ValueError, "idle_timeout is a finite number"),
        ({"rolling": True, "max_age": None}, ValueError, "give it one, or use idle_timeout"),
        ({"lock_timeout": 0}, ValueError, "lock=False turns locking off"),
        ({"lock_timeout": -1}, ValueError, "above 0"),
        ({"lock_timeout": "10"}, TypeError, "lock_timeout is a number"),
        ({"lock_wait": -0.1}, ValueError, "0 for not waiting"),
        ({"lock_wait": float("inf")}, ValueError, "lock_wait is a finite number"),
        ({"max_waiters": -1}, ValueError, "0 for none"),
        ({"lock_max_hold": 5}, ValueError, "at least lock_timeout"),
        ({"lock_max_hold": 5, "lock_timeout": 6}, ValueError, "at least lock_timeout"),
        ({"release_lock": "response-end"}, ValueError, '"response_end" or "response_start"'),
        ({"store": "redis"}, ValueError, "redis://"),
        ({"store": "memcached://localhost"}, ValueError, "unknown store scheme 'memcached'"),
        ({"store": ""}, ValueError, "begins with one of memory://, sqlite://, redis://"),
        ({"store": 1}, TypeError, "a SessionStore or a URL, not int"),
        ({"store": InMemorySessionStore}, TypeError, r"make one of it: InMemorySessionStore\(\)"),
        ({"model": dict}, TypeError, r"subclass of asgi_sessions\.SessionData"),
        ({"model": SessionData(session_id="a")}, TypeError, "subclass of"),
        ({"model": Demanding}, ValueError, "give the model defaults for tenant, region"),
        ({"fingerprint": Fingerprint(), "trusted_proxies": ["proxy"]}, ValueError, "proxy"),
        ({"fingerprint": False}, TypeError, "None turns it off"),
        ({"fingerprint": True}, TypeError, r"write fingerprint=Fingerprint\(...\) or None"),
        ({"fingerprint": Fingerprint}, TypeError, r"write fingerprint=Fingerprint\(...\) or None"),
        ({"fingerprint": None, "trusted_proxies": ["proxy"]}, ValueError, "proxy"),
        ({"trusted_proxies": "10.0.0.0/8"}, ValueError, "pass a list of networks"),
        ({"exclude": "static/*"}, ValueError, "exclude: .* begin it with / or \\*"),
        ({"exclude": ["/ok", "static"]}, ValueError, "begin it with / or \\*"),
        ({"exclude": [b"/static"]}, TypeError, "exclude: a path pattern is a str"),
        ({"exclude": [re.compile(b"/static")]}, TypeError, "exclude: a path pattern is a str"),
        ({"exclude": async_predicate}, TypeError, "exclude is a plain function"),
        ({"read_only": [""]}, ValueError, "read_only: "),
        ({"passive": "poll"}, ValueError, "passive: .* begin it with / or \\*"),
        ({"passive": async_predicate}, TypeError, "passive is a plain function"),
        ({"read_only": [None]}, TypeError, "read_only: a path pattern is a str"),
        ({"allowed_origins": "https://example.com"}, ValueError, r"a collection of origins: \['https"),
        ({"allowed_origins": ["example.com"]}, ValueError, "write https://host"),
        ({"allowed_origins": ["https://example.com/"]}, ValueError, "write https://host"),
        ({"allowed_origins": ["*"]}, ValueError, "write https://host"),
        ({"allowed_origins": ["null"]}, ValueError, "write https://host"),
        ({"allowed_origins": ["https://bücher.example"]}, ValueError, "write https://host"),
        ({"allowed_origins": [None]}, ValueError, "write https://host"),
        ({"on_event": "print"}, TypeError, "a function that takes a SessionEvent"),
        ({"on_event": async_predicate}, TypeError, "plain function"),
        ({"idle": 60}, TypeError, "idle"),
    ],
)
def test_a_wrong_value_is_refused_with_its_remedy(
    options: dict[str, Any], error: type[Exception], remedy: str
) -> None:
    """The message names the argument and what to write instead."""
    with pytest.raises(error, match=remedy):
        SessionMiddleware(app, **{"secret_key": KEY, **options})


@pytest.mark.parametrize(
    "options",
    [
        {"max_age": -1},
        {"max_age": 0},
        {"max_age": None},
        {"max_age": 30.5},
        {"max_age": None, "idle_timeout": 60},
        {"max_age": 60, "idle_timeout": 3600},
        {"rolling": True, "idle_timeout": 0.5},
        {"lock_wait": 0},
        {"max_waiters": 0},
        {"lock_timeout": 300, "lock_max_hold": 300},
        {"fingerprint": None},
        {"fingerprint": None, "trusted_proxies": ["10.0.0.0/8"]},
        {"session_cookie": "__Host-session", "https_only": True},
        {"same_site": "none", "https_only": True, "partitioned": True},
        {"partitioned": True},
        {"allowed_origins": []},
        {"allowed_origins": ("https://example.com", "https://example.com:8443", "chrome-extension://abc")},
        {"exclude": []},
        {"exclude": "*"},
    ],
)
def test_a_sensible_value_is_taken(options: dict[str, Any]) -> None:
    """Edges that look odd and mean something."""
    SessionMiddleware(app, KEY, **options)


@pytest.mark.parametrize("options", [{"secret_key": "short"}, {"secret_key_fallbacks": ["short"]}])
def test_a_short_key_warns_where_it_was_given(options: dict[str, Any]) -> None:
    """The warning shows how to make a good key and points at the line of the app."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        frame = inspect.currentframe()
        assert frame is not None
        line = frame.f_lineno + 1
        SessionMiddleware(app, **{"secret_key": KEY, **options})
    (warning,) = caught
    assert warning.category is UserWarning
    assert "secrets.token_hex(32)" in str(warning.message)
    assert "short'" not in str(warning.message)
    assert (warning.filename, warning.lineno) == (__file__, line)


def test_a_key_of_32_bytes_is_long_enough() -> None:
    """Bytes count, not characters."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SessionMiddleware(app, b"\x00" * 32)
        SessionMiddleware(app, "ü" * 16)


# --- Starlette's arguments ------------------------------------------------------------------------


def test_the_arguments_are_starlettes() -> None:
    """Same names in the same order with the same defaults, so that only the import changes."""
    theirs = list(inspect.signature(StarletteSessions).parameters.values())
    ours = list(inspect.signature(SessionMiddleware).parameters.values())
    assert [p.name for p in ours[: len(theirs)]] == [p.name for p in theirs]
    for mine, given in zip(ours, theirs, strict=False):
        assert mine.kind is given.kind
        if mine.name != "https_only":  # theirs is False; None sets `Secure` where the request was secure
            assert mine.default == given.default
    assert ours[[p.name for p in ours].index("https_only")].default is None


def test_the_added_arguments_are_by_name_only() -> None:
    """With the defaults of the contract; Starlette may add positions of its own."""
    added = {
        name: p.default
        for name, p in inspect.signature(SessionMiddleware).parameters.items()
        if p.kind is inspect.Parameter.KEYWORD_ONLY
    }
    expected = {
        "secret_key_fallbacks": (),
        "store": None,
        "model": SessionData,
        "idle_timeout": None,
        "rolling": False,
        "fingerprint": Fingerprint(),
        "trusted_proxies": (),
        "exclude": (),
        "read_only": (),
        "passive": (),
        "lock": True,
        "lock_timeout": 10.0,
        "lock_wait": 15.0,
        "max_waiters": 1024,
        "lock_max_hold": 300.0,
        "release_lock": "response_end",
        "allowed_origins": None,
        "error_response": None,
        "on_event": None,
    }
    assert {name: added[name] for name in expected} == expected


# --- times ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({}, Lifetime(absolute=1209600)),
        ({"max_age": 60}, Lifetime(absolute=60)),
        ({"max_age": 60, "idle_timeout": 10}, Lifetime(absolute=60, idle=10)),
        ({"max_age": 60, "rolling": True}, Lifetime(idle=60)),
        ({"max_age": 60, "rolling": True, "idle_timeout": 10}, Lifetime(idle=10)),
        ({"max_age": 60, "rolling": True, "idle_timeout": 100}, Lifetime(idle=60)),
        ({"max_age": None}, Lifetime(idle=3600)),
        ({"max_age": None, "idle_timeout": 10}, Lifetime(idle=10)),
    ],
)
def test_times_make_one_rule_for_the_store(options: dict[str, Any], rule: Lifetime) -> None:
    """`max_age` is absolute unless rolling, `idle_timeout` counts from the last request."""
    middleware = SessionMiddleware(app, KEY, **options)
    assert middleware._settings.lifetime == rule


# --- routes ---------------------------------------------------------------------------------------

ROUTES: list[tuple[Any, list[str], list[str]]] = [
    ("/health", ["/health"], ["/health/", "/healthy", "/x/health", "/"]),
    (["/health", "/metrics"], ["/health", "/metrics"], ["/"]),
    ("/static/*", ["/static/a.css", "/static/deep/b.js", "/static/"], ["/static", "/x/static/a"]),
    ("*.css", ["/a.css", "/deep/b.css"], ["/a.css.html"]),
    ("/v?/ping", ["/v1/ping"], ["/v12/ping"]),
    ("/a.b", ["/a.b"], ["/axb"]),
    ("*", ["/", "/any\nthing"], []),
    (re.compile(r"/api/v\d+/"), ["/api/v1/", "/api/v22/users"], ["/api/v/", "/x/api/v1/"]),
    ([re.compile(r"/a$"), "/b"], ["/a", "/b"], ["/ab"]),
    (frozenset(["/a"]), ["/a"], ["/"]),
    (lambda scope: scope["path"].endswith("!"), ["/a!"], ["/a"]),
    ((), [], ["/", "/health"]),
]


async def seen_at(path: str, root_path: str = "", **options: Any) -> str | None:
    """What the app may do with the session that it finds at this path; None where it finds none."""
    seen: list[str | None] = []

    async def look(scope: Scope, receive: Receive, send: Send) -> None:
        session = scope.get("session")
        unit = None if session is None else session.unit
        seen.append(unit and ("passive" if unit.passive else unit.state.value))

    async def receive() -> Message:
        return {"type": "http.request"}

    async def send(message: Message) -> None:
        pytest.fail("no answer is sent")

    middleware = SessionMiddleware(look, KEY, **options)
    scope = {"type": "http", "method": "GET", "path": path, "root_path": root_path, "headers": []}
    await middleware(scope, receive, send)
    return seen[0]


@pytest.mark.anyio
@pytest.mark.parametrize(("routes", "matching", "others"), ROUTES)
async def test_excluded_paths_have_no_session(routes: Any, matching: list[str], others: list[str]) -> None:
    """By string, glob, compiled expression or predicate; everything else has one."""
    assert [await seen_at(path, exclude=routes) for path in matching] == [None] * len(matching)
    assert [await seen_at(path, exclude=routes) for path in others] == ["fresh"] * len(others)


@pytest.mark.anyio
@pytest.mark.parametrize(("routes", "matching", "others"), ROUTES)
async def test_read_only_paths_are_marked(routes: Any, matching: list[str], others: list[str]) -> None:
    """The same patterns give a session that is loaded without its lock and cannot be written to."""
    assert [await seen_at(path, read_only=routes) for path in matching] == ["read-only"] * len(matching)
    assert [await seen_at(path, read_only=routes) for path in others] == ["fresh"] * len(others)


@pytest.mark.anyio
@pytest.mark.parametrize(("routes", "matching", "others"), ROUTES)
async def test_passive_paths_are_marked(routes: Any, matching: list[str], others: list[str]) -> None:
    """The same patterns mark requests that do not count as activity, such as polls."""
    assert [await seen_at(path, passive=routes) for path in matching] == ["passive"] * len(matching)
    assert [await seen_at(path, passive=routes) for path in others] == ["fresh"] * len(others)


@pytest.mark.anyio
@pytest.mark.parametrize("option", ["exclude", "read_only", "passive"])
@pytest.mark.parametrize(
    ("path", "root", "matches"),
    [
        ("/shop/static/a.css", "/shop", True),
        ("/static/a.css", "/shop", True),
        ("/shop/static/a.css", "/shop/", True),
        ("/shop/static/a.css", "", False),
        ("/shops/static/a.css", "/shop", False),
        ("/shop/cart", "/shop", False),
    ],
)
async def test_patterns_match_below_a_mount(option: str, path: str, root: str, matches: bool) -> None:
    """A pattern is the same whether the app is served alone, mounted, or behind a proxy's prefix."""
    options: dict[str, Any] = {option: ["/static/*"]}
    assert (await seen_at(path, root, **options) != "fresh") is matches


@pytest.mark.anyio
async def test_a_predicate_gets_the_scope_as_it_is() -> None:
    """With its root path in it."""
    asked: list[tuple[str, str]] = []

    def predicate(scope: Scope) -> bool:
        asked.append((scope["path"], scope["root_path"]))
        return False

    await seen_at("/shop/cart", "/shop", exclude=predicate)
    assert asked == [("/shop/cart", "/shop")]
