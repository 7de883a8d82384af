"""The life that an app gives to one session: its end in place of the middleware's. Pure."""

from __future__ import annotations

import time
from dataclasses import dataclass

_LOGOUT = "logout() ends a session at once"
_RAISE = "raise max_age, and shorten the sessions that are not to be remembered by set_expiry()"


@dataclass(frozen=True, slots=True, eq=False)
class Expiry:
    """What an app asked for by `set_expiry`. Each call makes another one.

    `ends` is when the session ends, by `time.monotonic()`; None: when the middleware's `max_age` says.
    """

    ends: float | None

    @classmethod
    def after(cls, seconds: float | None, max_age: float | None) -> Expiry:
        """So many seconds from now. `ValueError` for what is no life within `max_age`."""
        if seconds is None:
            return cls(None)
        if isinstance(seconds, bool) or not isinstance(seconds, int | float):
            raise ValueError(f"set_expiry() takes a number of seconds or None, not {seconds!r}")
        if not seconds > 0:
            raise ValueError(f"set_expiry() takes a number of seconds above 0, not {seconds!r}; {_LOGOUT}")
        if max_age is not None and seconds > max_age:
            raise ValueError(
                f"set_expiry({seconds!r}) is beyond the max_age of {max_age!r} seconds: {_RAISE}"
            )
        return cls(time.monotonic() + min(seconds, _CENTURY))

    def left(self) -> float | None:
        """Seconds from now, above 0; None where the middleware's rule counts."""
        return None if self.ends is None else max(self.ends - time.monotonic(), 0.001)


_CENTURY = 3_155_760_000.0  # seconds; infinity has no JSON and no place in a cookie
