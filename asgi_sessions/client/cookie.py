"""The session cookie: sign, verify, read from a request, render for a response.

The cookie carries an id and a signature, never data. Everything a client sends is hostile here: reading never
raises, costs linear time, and hands out an id only if this server signed exactly these bytes.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

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


@dataclass(frozen=True, slots=True)
class Presented:
    """What a request says about its session.

    `session_id` is None unless exactly one valid id came in; `reason` then tells why, and is None too for a
    request without our cookie. `issued_at` and `stale_key` as in `Verified`.

    `rivals` are the valid ids of a request that brings several: the store knows which of them is alive
    (`duplicates.settle`). `only_ours`: no cookie of our name came along that we did not sign. `leftover`:
    this one is alive, and what came beside it is dead.
    """

    session_id: str | None = field(default=None, repr=False)
    issued_at: int = 0
    stale_key: bool = False
    reason: Reason | None = None
    rivals: tuple[Verified, ...] = field(default=(), repr=False)
    only_ours: bool = False
    leftover: bool = False


NO_COOKIE = Presented()
BAD_SIGNATURE = Presented(reason="bad_signature")
AMBIGUOUS = Presented(reason="ambiguous")
ABSURD = Presented(reason="absurd")


def cookie_values(line: bytes, name: bytes) -> list[bytes]:
    """The values of every cookie called exactly `name` in this header, in order; [] where none is.

    Only space and tab are trimmed and nothing is unquoted: a parser that knows more ways to read a name finds
    cookies that the browser did not set. A piece without ``=`` has no name and is passed over. Linear time;
    never raises.
    """
    found: list[bytes] = []
    if name in line:
        for pair in line.split(b";"):
            key, equals, value = pair.partition(b"=")
            if equals and key.strip(_BLANK) == name:
                found.append(value.strip(_BLANK))
    return found


class SessionCookie:
    """The session cookie of one app: reads it from requests, renders it for responses.

    Attributes and their order are Starlette's. `https_only=None` makes the cookie `Secure` where the request
    came over https or wss; True and False force it. A combination that browsers refuse is a ValueError.
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
        _check_scope(path, domain)
        _check_cross_site(same_site, https_only, partitioned)
        self.signer = CookieSigner(secret_key, fallbacks, clock=clock, stacklevel=stacklevel + 1)
        self._name = name.encode("ascii")
        self._alone = self._name + b"="
        self._known: dict[bytes, Presented] = {}  # by the whole header, byte for byte
        self._start = f"{name}="
        self._path = f"; path={path}; "
        self._https_only = https_only
        self._flags = tuple(_flags(same_site, secure, domain, partitioned) for secure in (False, True))
        self._removals = tuple(_removal(name, path, flags) for flags in self._flags)
        self._is_bound = name.lower().startswith("__host-")  # to path="/" of one host: there is no other
        self._scope = name, domain, path
        self._attributes = same_site, partitioned

    def read(self, line: bytes | None) -> Presented:
        """What a request's `cookie` header says; `NO_COOKIE` where ours is not in it. Never raises.

        Up to `MAX_CANDIDATES` different cookies of our name are verified. More of them than that mean that
        somebody planted some (a sibling domain, a longer path): which is not for us to guess, so none counts.
        """
        if not line:
            return NO_COOKIE
        return self._known.get(line) or self._parse(line)

    def _parse(self, line: bytes) -> Presented:
        """Read a header that is not remembered, and remember it if it names one session.

        Nothing about it can change later: the keys are fixed, and the signature does not depend on the time.
        The token is remembered as well, as the header that has no other cookie in it.
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
        """What these different values say together."""
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

    def render(self, session_id: str, *, max_age: float | None, secure: bool) -> bytes:
        """The value of a `Set-Cookie` header that hands out this id, signed now.

        `max_age` is in seconds, None for a cookie that ends with the browser session; it is rounded up, for
        browsers pass over a `Max-Age` that is no whole number (RFC 6265bis section 5.6.2). `secure`: the
        request came over https or wss; counts only where `https_only` is None.
        """
        age = "" if max_age is None else f"Max-Age={math.ceil(max_age)}; "
        flags = self._flags[self._is_secure(secure)]
        return f"{self._start}{self.signer.sign(session_id)}{self._path}{age}{flags}".encode("ascii")

    def render_removal(self, *, secure: bool) -> bytes:
        """The value of a `Set-Cookie` header that makes the browser forget the cookie; `secure` as above."""
        return self._removals[self._is_secure(secure)]

    def is_set_by(self, headers: Headers) -> bool:
        """Whether an answer with these headers sets or removes a cookie of our name already."""
        for name, value in headers:  # each answer comes here, and `any` would cost twice as much
            if value.startswith(self._alone) and name.lower() == b"set-cookie":
                return True
        return False

    def render_leftover_removals(self, requested: str, *, secure: bool) -> list[bytes]:
        """`Set-Cookie` values for cookies of our name within this scope that come with the path `requested`.

        To be sent before the cookie itself, which no browser then mistakes for one of them.
        """
        if self._is_bound:
            return []
        (name, domain, path), (same_site, partitioned) = self._scope, self._attributes
        return [
            _removal(name, longer, _flags(same_site, self._is_secure(secure), host, partitioned))
            for host, longer in narrower_scopes(domain, path, requested)
        ]

    def _is_secure(self, secure: bool) -> bool:
        return secure if self._https_only is None else self._https_only


def _removal(name: str, path: str, flags: str) -> bytes:
    return f"{name}=null; path={path}; expires=Thu, 01 Jan 1970 00:00:00 GMT; {flags}".encode("ascii")


def _flags(same_site: str, secure: bool, domain: str | None, partitioned: bool) -> str:
    flags = f"httponly; samesite={same_site}"
    if secure:
        flags += "; secure"
    if domain is not None:
        flags += f"; domain={domain}"
    if partitioned and secure:  # browsers drop a partitioned cookie that is not Secure (CHIPS section 2.1)
        flags += "; partitioned"
    return flags


def _check_name(name: str, path: str, domain: str | None, https_only: bool | None) -> None:
    if _NAME.fullmatch(name) is None:
        raise ValueError(f"session_cookie={name!r} is not a cookie name; use letters, digits, '-' and '_'")
    if len(name) + MAX_TOKEN_BYTES > MAX_PAIR_BYTES:
        raise ValueError(f"session_cookie has {len(name)} characters and browsers drop it; shorten it")
    prefix = name.lower()  # RFC 6265bis section 5.4: browsers compare these prefixes without regard to case
    if prefix.startswith(("__secure-", "__http-", "__host-")) and not https_only:
        raise ValueError(f"browsers take the cookie {name!r} only if it is Secure; set https_only=True")
    if prefix.startswith("__host-") and (path != "/" or domain is not None):
        raise ValueError(f"browsers take the cookie {name!r} only with path='/' and domain=None; set these")


def _check_scope(path: str, domain: str | None) -> None:
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
