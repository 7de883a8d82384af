"""The signed value of a session cookie: an id, the time of signing, and the signature."""

from __future__ import annotations

import hashlib
import hmac
import re
import time
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

from itsdangerous import TimestampSigner
from itsdangerous.encoding import base64_decode, base64_encode, bytes_to_int, int_to_bytes

from ..keys import key_bytes, weakness

SALT = b"asgi_sessions.cookie"
MAX_TOKEN_BYTES = 32 + 1 + 11 + 1 + 43  # id.timestamp.signature

_SESSION_ID = re.compile(r"[0-9a-f]{32}")
# The middle is base64url of a number of at most 8 bytes, so a length of 1 modulo 4 does not occur.
_TOKEN = re.compile(
    rb"([0-9a-f]{32})\.((?:[A-Za-z0-9_-]{4}){0,2}(?:[A-Za-z0-9_-]{2,3})?)\.([A-Za-z0-9_-]{43})"
)


class Verified(NamedTuple):
    """What a cookie value of ours says.

    `issued_at` is in whole seconds since the epoch, by the clock of the server that signed it. `stale_key`:
    a fallback key signed it, so the answer should bring a cookie that is signed by the current one.
    """

    session_id: str
    issued_at: int
    stale_key: bool

    def __repr__(self) -> str:
        return f"Verified(issued_at={self.issued_at}, stale_key={self.stale_key})"


class _KeySigner(TimestampSigner):
    """A TimestampSigner that derives its key once."""

    def __init__(self, key: bytes, clock: Callable[[], float]) -> None:
        super().__init__(key, salt=SALT, key_derivation="hmac", digest_method=hashlib.sha256)
        self._derived = super().derive_key()
        self._clock = clock

    def derive_key(self, secret_key: str | bytes | None = None) -> bytes:
        return self._derived

    def get_timestamp(self) -> int:
        return int(self._clock())


class CookieSigner:
    """Signs session ids with `secret_key`; verifies what that key or one of the `fallbacks` signed.

    HMAC-SHA-256 under our own salt: a value that other code signed with the same key is refused. A key is
    what `keys.key_bytes` takes; ValueError where it is empty. One under 32 bytes warns, at the frame that
    `stacklevel` names (2: the caller). `clock` gives seconds since the epoch.
    """

    def __init__(
        self,
        secret_key: object,
        fallbacks: Sequence[object] = (),
        *,
        clock: Callable[[], float] = time.time,
        stacklevel: int = 2,
    ) -> None:
        if isinstance(fallbacks, (str, bytes)):
            raise ValueError("secret_key_fallbacks is one string; pass a list of keys: [old_key]")
        given = {"secret_key": secret_key}
        given |= {f"secret_key_fallbacks[{index}]": key for index, key in enumerate(fallbacks)}
        keys = {where: key_bytes(key, where) for where, key in given.items()}
        for where, key in keys.items():
            weak = weakness(key, where)
            if weak is not None:
                warnings.warn(weak, UserWarning, stacklevel=stacklevel)
        self._signers = [_KeySigner(key, clock) for key in keys.values()]

    def sign(self, session_id: str, issued_at: int | None = None) -> str:
        """The cookie value ``id.timestamp.signature``; ValueError for an id that was not generated.

        `issued_at`: seconds since the epoch, None for now.
        """
        if _SESSION_ID.fullmatch(session_id) is None:
            raise ValueError("a cookie carries generated ids only (32 lower-case hexadecimal digits)")
        if issued_at is None:
            return self._signers[0].sign(session_id).decode("ascii")
        signed = b"%b.%b" % (session_id.encode(), base64_encode(int_to_bytes(issued_at)))
        return (b"%b.%b" % (signed, self._signers[0].get_signature(signed))).decode("ascii")

    def verify(self, token: bytes) -> Verified | None:
        """What `token` says; None unless `sign` made exactly these bytes with one of the keys. Never raises.

        The signature's text is compared, not what it decodes to: in base64 several texts have one value. A
        token of another shape or length is refused before anything is hashed.
        """
        match = _TOKEN.fullmatch(token)
        if match is None:
            return None
        session_id, timestamp, signature = match.groups()
        signed = token[: match.end(2)]
        for signer in self._signers:
            if hmac.compare_digest(signer.get_signature(signed), signature):
                issued_at = bytes_to_int(base64_decode(timestamp))
                return Verified(session_id.decode("ascii"), issued_at, signer is not self._signers[0])
        return None
