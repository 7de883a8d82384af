"""What an answer's headers tell caches: whether they may share it, and which headers it depends on."""

from __future__ import annotations

import enum
import re
from email.utils import parsedate_to_datetime

from ..asgi import Headers

_BLANK = b" \t"
_QUOTED = re.compile(rb'"(?:[^"\\]|\\.)*"?')
_TARGETED = frozenset({b"surrogate-control", b"edge-control", b"x-accel-expires"})
_FRESH = re.compile(rb'(?:max-age|s-maxage)="?0*[1-9][0-9]*"?')


class Sharing(enum.Enum):
    """Whether a cache that serves many clients may keep an answer."""

    FORBIDDEN = "forbidden"
    UNSAID = "unsaid"  # a cache may keep it for a time of its own choice (RFC 9111 section 4.2.2)
    ALLOWED = "allowed"  # the app says "public", or for how long


def sharing(headers: Headers, now: float) -> Sharing:
    """What the app says about shared caches (RFC 9111 section 3); `now` is in seconds since the epoch.

    A cache that has a field of its own (RFC 9213: `CDN-Cache-Control`, those of vendors) ignores
    `Cache-Control`, so one such field that does not forbid is enough. `no-cache` does not forbid: the cache
    keeps the answer and sends it, cookie included, to the next client for whom the app answers 304.
    """
    said = [(name.lower(), value.lower()) for name, value in headers]
    if any(_is_targeted(name) and not _forbids(name, value) for name, value in said):
        return Sharing.ALLOWED
    general = _directives(b",".join([value for name, value in said if name == b"cache-control"]))
    if b"private" in general or (b"no-store" in general and b"must-understand" not in general):
        return Sharing.FORBIDDEN
    if b"public" in general or any(_FRESH.fullmatch(each) for each in general):
        return Sharing.ALLOWED
    lasts = any(name == b"expires" and _is_future(value, now) for name, value in said)
    return Sharing.ALLOWED if lasts else Sharing.UNSAID


def restrain(headers: Headers, now: float) -> None:
    """Keep an answer that sets our cookie out of shared caches, unless the app allows them to keep it.

    Adds `no-store` where the app set no `Cache-Control`, and `private` where that neither forbids nor allows.
    """
    if not any(name.lower() == b"cache-control" for name, _ in headers):
        headers.append((b"cache-control", b"no-store"))
    elif sharing(headers, now) is Sharing.UNSAID:
        headers.append((b"cache-control", b"private"))


def vary_cookie(headers: Headers) -> None:
    """Make `Vary` name `Cookie`, in the first `Vary` line or in a new one.

    Changes nothing where a line names `Cookie` or ``*`` already (RFC 9110 section 12.5.5).
    """
    first: int | None = None
    for index, (name, value) in enumerate(headers):
        if len(name) != 4 or name.lower() != b"vary":
            continue
        fields = {field.strip(_BLANK) for field in value.lower().split(b",")}
        if b"cookie" in fields or b"*" in fields:
            return
        first = index if first is None else first
    if first is None:
        headers.append((b"vary", b"Cookie"))
    else:
        name, value = headers[first]
        headers[first] = (name, value + b", Cookie" if value.strip(_BLANK) else b"Cookie")


def _is_targeted(name: bytes) -> bool:
    """Whether the field is for some shared caches, which then ignore `Cache-Control`."""
    return name in _TARGETED or name.endswith(b"-cache-control")


def _forbids(name: bytes, value: bytes) -> bool:
    if name == b"x-accel-expires":  # nginx: seconds, or "@" and a time; 0 forbids
        return value.strip(_BLANK) == b"0"
    said = _directives(value)
    return not said.isdisjoint((b"no-store", b"private"))


def _directives(value: bytes) -> frozenset[bytes]:
    """The directives as they are written. A quoted comma separates nothing."""
    bare = _QUOTED.sub(lambda quoted: quoted[0].replace(b",", b""), value)
    return frozenset(each.strip(_BLANK) for each in bare.split(b","))


def _is_future(value: bytes, now: float) -> bool:
    """Whether `Expires` is in the future; what is no date is in the past (RFC 9111 section 5.3)."""
    try:
        return parsedate_to_datetime(value.decode("latin-1")).timestamp() > now
    except (ValueError, TypeError, OverflowError):
        return False
