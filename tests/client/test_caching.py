"""What an answer's headers let caches do with it."""

from __future__ import annotations

import pytest
from starlette.datastructures import MutableHeaders

from asgi_sessions.client.caching import Sharing, restrain, sharing, vary_cookie

NOW = 1_750_000_000.0  # 15 June 2025
PAST, FUTURE = b"Sun, 15 Jun 2025 15:06:39 GMT", b"Sun, 15 Jun 2025 15:06:41 GMT"
FORBIDDEN, UNSAID, ALLOWED = Sharing.FORBIDDEN, Sharing.UNSAID, Sharing.ALLOWED

RULE: list[tuple[list[tuple[bytes, bytes]], Sharing]] = [
    # RFC 9111 section 3: what is needed to keep an answer, and what forbids it
    ([], UNSAID),
    ([(b"cache-control", b"")], UNSAID),
    ([(b"cache-control", b"no-store")], FORBIDDEN),
    ([(b"cache-control", b"private")], FORBIDDEN),
    ([(b"cache-control", b"public")], ALLOWED),
    ([(b"cache-control", b"max-age=60")], ALLOWED),
    ([(b"cache-control", b'max-age="60"')], ALLOWED),
    ([(b"cache-control", b"max-age=0")], UNSAID),
    ([(b"cache-control", b"max-age=00")], UNSAID),
    ([(b"cache-control", b"max-age=010")], ALLOWED),
    ([(b"cache-control", b"s-maxage=60")], ALLOWED),
    ([(b"cache-control", b"max-age=0, s-maxage=60")], ALLOWED),
    ([(b"cache-control", b"no-cache")], UNSAID),
    ([(b"cache-control", b"no-cache, public")], ALLOWED),
    ([(b"cache-control", b"no-cache, max-age=60")], ALLOWED),
    ([(b"cache-control", b"must-revalidate")], UNSAID),
    ([(b"cache-control", b"no-transform, proxy-revalidate")], UNSAID),
    ([(b"cache-control", b"private, max-age=60")], FORBIDDEN),
    ([(b"cache-control", b"public, no-store")], FORBIDDEN),
    ([(b"cache-control", b"max-age=60"), (b"cache-control", b"private")], FORBIDDEN),
    ([(b"Cache-Control", b"\tMAX-AGE=60 , Private ")], FORBIDDEN),
    ([(b"Cache-Control", b"PUBLIC")], ALLOWED),
    # section 5.2.2.3: a cache that understands the status passes over no-store
    ([(b"cache-control", b"must-understand, no-store")], UNSAID),
    ([(b"cache-control", b"must-understand, no-store, max-age=60")], ALLOWED),
    # section 5.2.2.7: with a field's name it is that field only; and a text is no directive
    ([(b"cache-control", b'private="set-cookie", max-age=60')], ALLOWED),
    ([(b"cache-control", b'private="x-user, set-cookie"')], UNSAID),
    ([(b"cache-control", b'x="no-store", max-age=60')], ALLOWED),
    ([(b"cache-control", b'x="a, private, b", max-age=60')], ALLOWED),
    ([(b"cache-control", b'x="a\\", private, b", max-age=60')], ALLOWED),
    ([(b"cache-control", b"x-private, max-age=60")], ALLOWED),
    # section 5.3: Expires
    ([(b"expires", FUTURE)], ALLOWED),
    ([(b"expires", PAST)], UNSAID),
    ([(b"expires", b"0")], UNSAID),
    ([(b"expires", b"never \xff")], UNSAID),
    ([(b"Expires", FUTURE), (b"cache-control", b"must-revalidate")], ALLOWED),
    ([(b"expires", FUTURE), (b"cache-control", b"no-store")], FORBIDDEN),
    # RFC 9213: fields for some caches, which do not look at Cache-Control then
    ([(b"cdn-cache-control", b"max-age=60")], ALLOWED),
    ([(b"CDN-Cache-Control", b"max-age=60"), (b"cache-control", b"no-store")], ALLOWED),
    ([(b"cdn-cache-control", b"no-cache"), (b"cache-control", b"private")], ALLOWED),
    ([(b"cdn-cache-control", b"no-store")], UNSAID),
    ([(b"cdn-cache-control", b"no-store"), (b"cache-control", b"max-age=60")], ALLOWED),
    ([(b"cdn-cache-control", b"no-store"), (b"cache-control", b"private")], FORBIDDEN),
    ([(b"cdn-cache-control", b"private, max-age=60")], UNSAID),
    ([(b"cloudflare-cdn-cache-control", b"max-age=60"), (b"cache-control", b"private")], ALLOWED),
    ([(b"vercel-cdn-cache-control", b"s-maxage=60"), (b"cdn-cache-control", b"no-store")], ALLOWED),
    ([(b"x-litespeed-cache-control", b"public,max-age=120"), (b"cache-control", b"no-store")], ALLOWED),
    # vendors' older ones
    ([(b"surrogate-control", b"max-age=3600+600"), (b"cache-control", b"no-store")], ALLOWED),
    ([(b"surrogate-control", b'no-store, content="ESI/1.0"'), (b"cache-control", b"private")], FORBIDDEN),
    ([(b"edge-control", b"cache-maxage=60m"), (b"cache-control", b"private")], ALLOWED),
    ([(b"x-accel-expires", b"60"), (b"cache-control", b"private")], ALLOWED),
    ([(b"x-accel-expires", b"@1750000060"), (b"cache-control", b"private")], ALLOWED),
    ([(b"x-accel-expires", b"0"), (b"cache-control", b"private")], FORBIDDEN),
    ([(b"x-cache", b"public"), (b"content-type", b"public")], UNSAID),
]


@pytest.mark.parametrize(("headers", "said"), RULE)
def test_what_shared_caches_may_keep(headers: list[tuple[bytes, bytes]], said: Sharing) -> None:
    """One field that does not forbid it is enough, for there is a cache that obeys that one."""
    assert sharing(headers, NOW) is said


@pytest.mark.parametrize(
    ("headers", "added"),
    [
        ([], [b"no-store"]),
        ([(b"expires", FUTURE)], [b"no-store"]),
        ([(b"cache-control", b"no-cache")], [b"private"]),
        ([(b"Cache-Control", b"max-age=0, must-revalidate")], [b"private"]),
        ([(b"cache-control", b"private")], []),
        ([(b"cache-control", b"no-store")], []),
        ([(b"cache-control", b"public")], []),
    ],
)
def test_an_answer_with_a_cookie_is_kept_from_shared_caches(
    headers: list[tuple[bytes, bytes]], added: list[bytes]
) -> None:
    """Unless the app forbids it already, or wants it."""
    before = list(headers)
    restrain(headers, NOW)
    assert headers == [*before, *[(b"cache-control", value) for value in added]]
    assert sharing(headers, NOW) is not UNSAID


# --- Vary -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lines", "merged"),
    [
        ([], [b"Cookie"]),
        ([b"Accept"], [b"Accept, Cookie"]),
        ([b"Accept, Origin"], [b"Accept, Origin, Cookie"]),
        ([b"Cookie"], [b"Cookie"]),
        ([b"accept,COOKIE ,x"], [b"accept,COOKIE ,x"]),
        ([b"Accept", b"cookie"], [b"Accept", b"cookie"]),
        ([b"Accept", b"Origin"], [b"Accept, Cookie", b"Origin"]),
        ([b"*"], [b"*"]),
        ([b"Accept", b" * "], [b"Accept", b" * "]),
        ([b"Cookies"], [b"Cookies, Cookie"]),
        ([b""], [b"Cookie"]),
    ],
)
def test_vary_is_merged(lines: list[bytes], merged: list[bytes]) -> None:
    """`Cookie` joins what the app varies by, once, and other headers stay where they are."""
    headers = [(b"vary", line) for line in lines]
    around = [(b"content-type", b"text/plain"), *headers, (b"set-cookie", b"a=b")]
    vary_cookie(around)
    assert [value for name, value in around if name == b"vary"] == merged
    assert [header for header in around if header[0] != b"vary"] == [
        (b"content-type", b"text/plain"),
        (b"set-cookie", b"a=b"),
    ]


@pytest.mark.parametrize("lines", [[], [b"Accept"], [b"Accept, Origin"]])
def test_vary_is_starlettes_where_cookie_was_missing(lines: list[bytes]) -> None:
    """With at most one line, the outcome is that of Starlette's MutableHeaders."""
    headers, theirs = ([(b"vary", line) for line in lines] for _ in range(2))
    vary_cookie(headers)
    MutableHeaders(raw=theirs).add_vary_header("Cookie")
    assert headers == theirs


def test_vary_is_found_in_any_case() -> None:
    """An app that breaks ASGI's rule of lower-case names still gets one Vary."""
    headers = [(b"Vary", b"Accept")]
    vary_cookie(headers)
    assert headers == [(b"Vary", b"Accept, Cookie")]
