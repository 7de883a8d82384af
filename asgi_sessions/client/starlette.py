"""The signed cookie of Starlette's session middleware, whose content is taken over."""

from __future__ import annotations

import hmac
import json
import time
from base64 import b64decode
from dataclasses import dataclass, field, replace

from itsdangerous import BadSignature, SignatureExpired, TimestampSigner

from ..keys import derived, key_bytes
from .cookie import (
    AMBIGUOUS,
    BAD_SIGNATURE,
    MAX_CANDIDATES,
    OldCookie,
    Presented,
    check_name,
    check_scope,
    cookie_values,
    flags_of,
    removal_of,
)

_NO_BOUND = 400 * 86400.0  # seconds for what never ends; no browser keeps a cookie for longer
_MARGIN = 60.0  # seconds by which clocks may differ
_PURPOSE = b"asgi_sessions.import"  # of the key that names cookies which were taken over


@dataclass(frozen=True, slots=True)
class StarletteCookies:
    """Takes over the sessions in the signed cookies of `starlette.middleware.sessions.SessionMiddleware`.

    `secret_key`, `session_cookie`, `max_age` (seconds), `path` and `domain` are what that middleware had. The
    first request with such a cookie begins a session of ours with the same values, in every lock mode, on
    `read_only` routes and WebSockets too; the requests of a page that come with the cookie at the same time
    get the same session. It has the values only: `data.user_id` is set by the next `login()`. What JSON in
    a record cannot hold (NaN) is left out, with one event `unstorable_value`.

    Each cookie is taken over once. It leads to its session for a minute, later only for the client to which
    the session is bound (`fingerprint`), and to nothing once that has ended or has a new id: a copy of the
    cookie does not bring back who has signed out. The store remembers this in a second, small record, until
    the old cookie has expired; a memory store that is full may forget it, and counts see it as a session.
    A cookie that was never presented stays as good as it was with Starlette, until its `max_age`: no server
    knows of it. After that time has passed for all, remove the option.

    A cookie of another name stays beside ours, for a roll-back, until the session ends. One of the same name
    is replaced, so that the old middleware finds an empty session.
    """

    secret_key: object = field(repr=False)
    session_cookie: str = "session"
    max_age: float | None = 14 * 24 * 60 * 60
    path: str = "/"
    domain: str | None = None

    def __post_init__(self) -> None:
        key_bytes(self.secret_key, "StarletteCookies(secret_key)")
        check_name(self.session_cookie)
        check_scope(self.path, self.domain)
        age = self.max_age
        if age is not None and (isinstance(age, bool) or not isinstance(age, int | float) or not age > 0):
            raise ValueError("StarletteCookies(max_age) is the old middleware's, in seconds above 0, or None")


class OldCookies:
    """Reads these cookies in requests that bring none of ours, and removes them."""

    def __init__(self, given: StarletteCookies, name: str) -> None:
        text = str(given.secret_key)  # as Starlette does, for bytes too
        self._signer = TimestampSigner(text)
        self._marking = derived(text.encode("utf-8", "surrogatepass"), _PURPOSE)
        self._given = given
        self._name = given.session_cookie.encode("ascii")
        self._stays = given.session_cookie != name  # beside ours

    def complete(self, presented: Presented, line: bytes | None) -> Presented:
        """What a request presents whose cookie of ours, `presented`, leads to nothing."""
        if not line or presented.reason not in (None, "bad_signature"):
            return presented
        tokens = list(dict.fromkeys(cookie_values(line, self._name)))
        if not tokens:
            return presented
        if len(tokens) > MAX_CANDIDATES:
            return AMBIGUOUS
        found = [old for old in map(self._read, tokens) if old is not None]
        if not found:
            return BAD_SIGNATURE
        valid = {old.marker: old for old in found if old.values}
        if len(valid) > 1:
            return AMBIGUOUS  # one of them was planted
        return replace(presented, reason=None, old=next(iter(valid.values()), None))

    def removals(self, *, secure: bool) -> list[bytes]:
        """`Set-Cookie` values that remove the old cookie, where it is another one than ours."""
        given = self._given
        if not self._stays:
            return []
        flags = flags_of("lax", secure, given.domain, partitioned=False)
        return [removal_of(given.session_cookie, given.path, flags)]

    def _read(self, token: bytes) -> OldCookie | None:
        """What a cookie says; without values where it has expired; None where it is none of these."""
        max_age = self._given.max_age
        signed = token.rpartition(b".")[0]  # the signature's text is not the only one that verifies
        marker = hmac.new(self._marking, signed, "sha256").hexdigest()[:32]
        try:
            payload, signed_at = self._signer.unsign(token, max_age=_whole(max_age), return_timestamp=True)
            values = json.loads(b64decode(payload))
        except SignatureExpired:
            return OldCookie({}, marker, 0)
        except (BadSignature, ValueError, RecursionError):
            return None
        if not isinstance(values, dict):
            return None
        left = _NO_BOUND if max_age is None else max_age - (time.time() - signed_at.timestamp())
        return OldCookie(values, marker, left + _MARGIN)


def _whole(seconds: float | None) -> int | None:
    return None if seconds is None else int(seconds)
