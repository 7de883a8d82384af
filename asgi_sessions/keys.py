"""Secret keys: the bytes of an app's key, and keys that are derived from it for other purposes."""

from __future__ import annotations

import hmac
from collections.abc import Sequence

MIN_KEY_BYTES = 32  # the output of SHA-256 (RFC 2104 section 3: a shorter key weakens the HMAC)

MAKE_A_KEY = 'make one with: python -c "import secrets; print(secrets.token_hex(32))"'


def key_bytes(key: object, where: str) -> bytes:
    """The bytes of a str, of bytes, or of any object whose `str()` is the secret (Starlette's `Secret`).

    ValueError for an absent or empty key; its text names `where` the key was given.
    """
    raw = key if isinstance(key, bytes) else str("" if key is None else key).encode("utf-8", "surrogatepass")
    if not raw:
        raise ValueError(f"{where} is empty; {MAKE_A_KEY}")
    return raw


def weakness(key: bytes, where: str) -> str | None:
    """The warning for a key that is too short; None for one that is long enough."""
    if len(key) >= MIN_KEY_BYTES:
        return None
    return f"{where} has {len(key)} bytes, fewer than {MIN_KEY_BYTES}, and can be guessed; {MAKE_A_KEY}"


def derived_from(keys: Sequence[object], where: str, purpose: bytes) -> tuple[bytes, ...]:
    """A key for another purpose from each of these."""
    return tuple(derived(key_bytes(key, where), purpose) for key in keys)


def derived(key: bytes, purpose: bytes) -> bytes:
    """A key for another purpose. It tells nothing about `key`, or about the keys for other purposes."""
    return hmac.digest(key, purpose, "sha256")
