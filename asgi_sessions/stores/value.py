"""A record as a store keeps it: with its version and its bounds."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from .checkout import Checkout, Lifetime
from .tokens import new_token

_FORMAT = b"asgi-session/1"


@dataclass(slots=True)
class Value:
    """A record with its version and bounds. Times are seconds by the store's clock.

    `expires` is the absolute bound, `until` the end of the idle timeout and `idle` that timeout; `inf` is no
    bound. Until its client comes back a record may have an earlier `until`. `began` is when the record's life
    began: creation or sign-in. No two writes have one `version`.
    """

    record: bytes = field(repr=False)
    version: str = field(repr=False)
    began: float
    expires: float
    idle: float
    until: float

    @classmethod
    def new(cls, record: bytes, lifetime: Lifetime, now: float) -> Value:
        """A record whose life begins now."""
        value = cls(record, new_version(), now, now, math.inf, now)
        value.bound(lifetime, now)
        if lifetime.first is not None:
            value.until = min(value.until, now + lifetime.first)
        return value

    @classmethod
    def unpack(cls, value: bytes) -> Value | None:
        """Read what `pack` wrote; None for anything else."""
        head, line_feed, record = value.partition(b"\n")
        parts = head.split(b" ")
        if not line_feed or len(parts) != 6 or parts[0] != _FORMAT:
            return None
        try:
            began, expires, idle, until = map(float, parts[2:])
        except ValueError:
            return None
        return cls(record, parts[1].decode("ascii", "replace"), began, expires, idle, until)

    def pack(self) -> bytes:
        """The bytes to store: one line of facts, then the record."""
        facts = f"{self.version} {self.began!r} {self.expires!r} {self.idle!r} {self.until!r}"
        return b"%b %b\n%b" % (_FORMAT, facts.encode(), self.record)

    @property
    def ends(self) -> float:
        """When the record is absent: the earlier of both bounds."""
        return self.expires if self.expires < self.until else self.until

    def last(self, now: float) -> float:
        """When the last request came; now where there is no idle timeout that tells."""
        return max(self.until - self.idle, self.began) if self.idle < math.inf else now

    def touch(self, now: float) -> None:
        """Restart the idle timeout, because a request came."""
        self.until = now + self.idle

    def arrive(self, rule: Lifetime | None, now: float) -> bool:
        """Restart the idle timeout for a request that waits; False where the record has ended.

        It may have ended by its own bounds or by the idle timeout of the rule.
        """
        idle = math.inf if rule is None or rule.idle is None else rule.idle
        if self.ends <= now or self.last(now) + idle <= now:
            return False
        self.touch(now)
        return True

    def rewrite(self, record: bytes, version: str | None = None) -> None:
        """Take another record, with a new version and the same bounds."""
        self.record, self.version = record, version or new_version()

    def bound(self, lifetime: Lifetime, now: float) -> None:
        """Set the bounds. The idle timeout counts from the last request, so the record may end by it."""
        last = self.last(now)
        self.expires = math.inf if lifetime.absolute is None else now + lifetime.absolute
        self.idle = math.inf if lifetime.idle is None else lifetime.idle
        self.until = last + self.idle

    def renewed(self, record: bytes, now: float) -> Value:
        """Another record with the same bounds, whose idle timeout starts now."""
        return Value(record, new_version(), self.began, self.expires, self.idle, now + self.idle)

    def checkout(self, session_id: str, now: float, token: str | None, waited: float = 0.0) -> Checkout:
        """The checkout for a request that has the lease with this token."""
        expires_in = None if self.expires == math.inf else self.expires - now
        idle = None if self.idle == math.inf else self.idle
        return Checkout(
            session_id, self.record, self.version, token, expires_in, waited, idle, now - self.began
        )


def new_version() -> str:
    """A version that was never used before. A counter would repeat itself after a restart."""
    return new_token()[:16].decode()
