"""The session cookie: read from a request, rendered for a response.

Everything that a client sends may be hostile. Reading never raises and takes linear time, and it gives an id
only where this server signed exactly these bytes.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeAlias

from ..asgi import Headers
from .paths import narrower_scopes
from .signer import MAX_TOKEN_BYTES, CookieSigner, Verified

SameSite: TypeAlias = Literal["lax", "strict", "none"]
Reason: TypeAlias = Literal["bad_signature", "ambiguous", "absurd"]

MAX_COOKIE_BYTES = 65_536  # of the cookie header, or all its lines together
MAX_CANDIDATES = 4  # different cookies of our name whose signature is checked
MAX_REMEMBERED = 4096  # cookie headers whose session is known, so that they are not parsed and verified again
MAX_REMEMBERED_BYTES = 1024  # of such a header; with the count above at most 6 MB
MAX_PAIR_BYTES = 4096  # name and value (RFC 6265bis section 5.6: browsers drop what is longer)

_NAME = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")  # RFC 6265 section 4.1.1: an RFC 7230 token
_PATH = re.compile(r"/[\x20-\x3a\x3c-\x7e]{0,1023}")
_DOMAIN = re.compile(r"[A-Za-z0-9._-]{1,1023}")
_BLANK = b" \t"


class OldCookie(NamedTuple):
    """What a cookie of another middleware holds, whose session is to be taken over.

    `marker` names the cookie, by a keyed hash. `expires_in` is how long it stays valid, in seconds; without
    values it has expired, or holds none.
    """

    values: dict[str, Any]
    marker: str
    expires_in: float

    def __repr__(self) -> str:
        return f"OldCookie({len(self.values)} values)"


@dataclass(frozen=True, slots=True)
class Presented:
    """What a request says about its session.

    `session_id` is set where exactly one valid id came in; `issued_at` and `stale_key` are those of
    `Verified`. Otherwise `reason` says what was wrong; it is None where there was no cookie of ours.

    `rivals` are the valid ids of a request that brings several: the store knows which one is alive.
    `old` is the cookie of another middleware, where there is none of ours.
    `only_ours`: every cookie of our name was signed by us. `leftover`: this id is alive, and the cookies
    beside it are dead.
    """

    session_id: str | None = field(default=None, repr=False)
    issued_at: int = 0
    stale_key: bool = False
    reason: Reason | None = None
    rivals: tuple[Verified, ...] = field(default=(), repr=False)
    only_ours: bool = False
    leftover: bool = False
    old: OldCookie | None = field(default=None, repr=False)


NO_COOKIE = Presented()
BAD_SIGNATURE = Presented(reason="bad_signature")
AMBIGUOUS = Presented(reason="ambiguous")
ABSURD = Presented(reason="absurd")


def cookie_values(line: bytes, name: bytes) -> list[bytes]:
    """The values of every cookie called exactly `name` in this header, in order; [] where there is none.

    Trims spaces and tabs, and unquotes nothing: a more lenient parser finds cookies that no browser set. A
    piece without ``=`` has no name and is skipped.
    """
    found: list[bytes] = []
    if name in line:
        for pair in line.split(b";"):
            key, equals, value = pair.partition(b"=")
            if equals and key.strip(_BLANK) == name:
                found.append(value.strip(_BLANK))
    return found


class SessionCookie:
    """The session cookie of one app.

    Attributes and their order are Starlette's. `https_only=None` makes the cookie `Secure` where the request
    came over https or wss; True and False force it. ValueError for a combination that browsers refuse.
    """

    def __init__(
        self,
        secret_key: object,
        *,
        fallbacks: Sequence[object] = (),
        name: str = "session",
        path: str = "/",
        domain: str | None = None,
        same_site: SameSite = "lax",
        https_only: bool | None = None,
        partitioned: bool = False,
        clock: Callable[[], float] = time.time,
        stacklevel: int = 2,
    ) -> None:
        _check_name(name, path, domain, https_only)
        check_scope(path, domain)
        _check_cross_site(same_site, https_only, partitioned)
        self.signer = CookieSigner(secret_key, fallbacks, clock=clock, stacklevel=stacklevel + 1)
        self.name = name
        self._name = name.encode("ascii")
        self._alone = self._name + b"="
        self._known: dict[bytes, Presented] = {}  # by the whole header, byte for byte
        self._start = f"{name}="
        self._path = f"; path={path}; "
        self._https_only = https_only
        self._flags = tuple(flags_of(same_site, secure, domain, partitioned) for secure in (False, True))
        self._removals = tuple(removal_of(name, path, flags) for flags in self._flags)
        self._is_bound = name.lower().startswith("__host-")  # to one host and path="/", so there is one only
        self._scope = domain, path
        self._attributes = same_site, partitioned

    def read(self, line: bytes | None) -> Presented:
        """What a request's `cookie` header says; `NO_COOKIE` where ours is not in it. Never raises.

        Up to `MAX_CANDIDATES` different cookies of our name are verified. If there are more, somebody planted
        some of them (from a sibling domain or a longer path), and none counts.
        """
        if not line:
            return NO_COOKIE
        return self._known.get(line) or self._parse(line)

    def _parse(self, line: bytes) -> Presented:
        """Read a header that is not remembered, and remember it if it names one session.

        The answer depends on the header and the keys alone, so it cannot go stale; the store decides about
        time. The token is remembered too, as a header without other cookies.
        """
        if len(line) > MAX_COOKIE_BYTES:
            return ABSURD
        tokens = list(dict.fromkeys(cookie_values(line, self._name)))
        if not tokens:
            return NO_COOKIE
        alone = self._alone + tokens[0] if len(tokens) == 1 else line
        answer = self._known.get(alone) or self._judge(tokens)
        if answer.session_id is not None:
            self._remember(alone, answer)
            self._remember(line, answer)
        return answer

    def _remember(self, line: bytes, answer: Presented) -> None:
        if len(line) <= MAX_REMEMBERED_BYTES:
            if len(self._known) >= MAX_REMEMBERED:
                self._known.clear()
            self._known[line] = answer

    def _judge(self, tokens: list[bytes]) -> Presented:
        """What these values, all different, say together."""
        if len(tokens) > MAX_CANDIDATES:
            return AMBIGUOUS
        verified = [seen for seen in map(self.signer.verify, tokens) if seen is not None]
        if not verified:
            return BAD_SIGNATURE
        best: dict[str, Verified] = {}
        for seen in sorted(verified, key=lambda seen: (seen.stale_key, -seen.issued_at)):
            best.setdefault(seen.session_id, seen)
        if len(best) > 1:
            alone = len(verified) == len(tokens)
            return Presented(rivals=tuple(best.values()), only_ours=alone)
        (only,) = best.values()
        return Presented(*only)

    def render(
        self, session_id: str, *, max_age: float | None, secure: bool, issued_at: int | None = None
    ) -> bytes:
        """The value of a `Set-Cookie` header with this id, signed now, or as of the date `issued_at`.

        `max_age` is in seconds; None is a cookie that ends with the browser session. It is rounded up:
        browsers ignore a `Max-Age` that is no whole number (RFC 6265bis section 5.6.2). `secure`: the request
        came over https or wss; used where `https_only` is None.
        """
        age = "" if max_age is None else f"Max-Age={math.ceil(max_age)}; "
        flags = self._flags[self._is_secure(secure)]
        return f"{self._start}{self.signer.sign(session_id, issued_at)}{self._path}{age}{flags}".encode(
            "ascii"
        )

    def render_removal(self, *, secure: bool) -> bytes:
        """The value of a `Set-Cookie` header that removes the cookie; `secure` as in `render`."""
        return self._removals[self._is_secure(secure)]

    def is_set_by(self, headers: Headers) -> bool:
        """Whether an answer with these headers sets or removes a cookie of our name already."""
        for name, value in headers:  # noqa: SIM110  # every answer comes here, and `any` costs twice as much
            if value.startswith(self._alone) and name.lower() == b"set-cookie":
                return True
        return False

    def render_leftover_removals(self, requested: str, *, secure: bool) -> list[bytes]:
        """`Set-Cookie` values that remove other cookies of our name which come with the path `requested`.

        Only cookies within the scope of this one. Send these before the cookie itself.
        """
        if self._is_bound:
            return []
        (domain, path), (same_site, partitioned) = self._scope, self._attributes
        return [
            removal_of(self.name, longer, flags_of(same_site, self._is_secure(secure), host, partitioned))
            for host, longer in narrower_scopes(domain, path, requested)
        ]

    def _is_secure(self, secure: bool) -> bool:
        return secure if self._https_only is None else self._https_only


def removal_of(name: str, path: str, flags: str) -> bytes:
    """The value of a `Set-Cookie` header that removes a cookie."""
    return f"{name}=null; path={path}; expires=Thu, 01 Jan 1970 00:00:00 GMT; {flags}".encode("ascii")


def flags_of(same_site: str, secure: bool, domain: str | None, partitioned: bool) -> str:
    """The attributes of a cookie beside its path and age."""
    flags = f"httponly; samesite={same_site}"
    if secure:
        flags += "; secure"
    if domain is not None:
        flags += f"; domain={domain}"
    if partitioned and secure:  # browsers drop a partitioned cookie that is not Secure (CHIPS section 2.1)
        flags += "; partitioned"
    return flags


def check_name(name: str) -> None:
    """ValueError for what is no name of a cookie."""
    if _NAME.fullmatch(name) is None:
        raise ValueError(f"session_cookie={name!r} is not a cookie name; use letters, digits, '-' and '_'")


def _check_name(name: str, path: str, domain: str | None, https_only: bool | None) -> None:
    check_name(name)
    if len(name) + MAX_TOKEN_BYTES > MAX_PAIR_BYTES:
        raise ValueError(f"session_cookie has {len(name)} characters and browsers drop it; shorten it")
    prefix = name.lower()  # RFC 6265bis section 5.4: browsers compare these prefixes without regard to case
    if prefix.startswith(("__secure-", "__http-", "__host-")) and not https_only:
        raise ValueError(f"browsers take the cookie {name!r} only if it is Secure; set https_only=True")
    if prefix.startswith("__host-") and (path != "/" or domain is not None):
        raise ValueError(f"browsers take the cookie {name!r} only with path='/' and domain=None; set these")


def check_scope(path: str, domain: str | None) -> None:
    """ValueError for a path or a domain that browsers would not take."""
    if _PATH.fullmatch(path) is None:
        raise ValueError(f"path={path!r} must begin with '/' and be printable ASCII without ';'; try '/'")
    if domain is not None and _DOMAIN.fullmatch(domain) is None:
        raise ValueError(
            f"domain={domain!r} must be a bare host name such as 'example.com' (an international one in"
            " its xn-- form), without scheme, port or spaces; use domain=None for this host alone"
        )


def _check_cross_site(same_site: str, https_only: bool | None, partitioned: bool) -> None:
    if same_site not in ("lax", "strict", "none"):
        raise ValueError(f"same_site={same_site!r} must be 'lax', 'strict' or 'none'")
    if same_site == "none" and not https_only:
        raise ValueError("browsers take a same_site='none' cookie only if it is Secure; set https_only=True")
    if partitioned and https_only is False:
        raise ValueError("browsers take a partitioned cookie only if it is Secure; set https_only=True")
