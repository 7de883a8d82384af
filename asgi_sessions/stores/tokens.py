"""Names that nobody can guess: of leases, of places in a queue, of versions."""

from __future__ import annotations

import os

_BYTES = 16  # 128 bits (OWASP Session Management: at least 64 of entropy, for what is worth guessing)
_AT_ONCE = 64  # made with one question to the system's generator

_made: list[bytes] = []
if hasattr(os, "register_at_fork"):  # else no process is copied
    os.register_at_fork(after_in_child=_made.clear)  # or parent and child would use the same ones


def new_token() -> bytes:
    """The name of a lease or of a place in a queue: 32 hexadecimal digits, never used twice."""
    try:
        return _made.pop()
    except IndexError:
        digits, size = os.urandom(_BYTES * _AT_ONCE).hex().encode(), 2 * _BYTES
        _made.extend([digits[start : start + size] for start in range(size, len(digits), size)])
        return digits[:size]


def new_nonce() -> bytes:
    """The name of a version: 16 hexadecimal digits.

    Random, for a counter that starts anew after a fail-over repeats itself.
    """
    return new_token()[:16]
