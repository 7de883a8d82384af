"""What a store of somebody else's keeps for a session: the record, its version and its bounds, as bytes."""

from __future__ import annotations

import math
import secrets
from dataclasses import dataclass, field

from .checkout import Checkout, Lifetime

_FORMAT = b"asgi-session/1"


@dataclass(slots=True)
class Value:
    """A record as it lies in a store. Times are seconds since the epoch by the store's clock.

    `ends` is the absolute bound and `until` the end of the idle timeout, `inf` for none; `idle` is that
    timeout in seconds; `began` is when the life that `ends` bounds began: creation or sign-in. `version` is
    random, so that no two writes are taken for one.
    """

    record: bytes = field(repr=False)
    version: str = field(repr=False)
    began: float
    ends: float
    idle: float
    until: float

    @classmethod
    def new(cls, record: bytes, lifetime: Lifetime, now: float) -> Value:
        """A record whose life begins now."""
        ends = math.inf if lifetime.absolute is None else now + lifetime.absolute
        idle = math.inf if lifetime.idle is None else lifetime.idle
        return cls(record, new_version(), now, ends, idle, now + idle)

    @classmethod
    def unpack(cls, value: bytes) -> Value | None:
        """What `pack` wrote; None for anything else."""
        head, line_feed, record = value.partition(b"\n")
        parts = head.split(b" ")
        if not line_feed or len(parts) != 6 or parts[0] != _FORMAT:
            return None
        try:
            began, ends, idle, until = map(float, parts[2:])
        except ValueError:
            return None
        return cls(record, parts[1].decode("ascii", "replace"), began, ends, idle, until)

    def pack(self) -> bytes:
        """One line of facts, then the record."""
        facts = f"{self.version} {self.began!r} {self.ends!r} {self.idle!r} {self.until!r}"
        return b"%b %b\n%b" % (_FORMAT, facts.encode(), self.record)

    def left(self, now: float) -> float:
        """Seconds until it is absent; 0 or less where it is, `inf` where it never is."""
        return min(self.ends, self.until) - now

    def last(self, now: float) -> float:
        """When the last request came; without an idle timeout nobody knows, and it is now."""
        return self.until - self.idle if self.idle < math.inf else now

    def touch(self, now: float) -> None:
        """A request came: the idle timeout restarts."""
        self.until = now + self.idle

    def rewrite(self, record: bytes) -> None:
        """Another record under the same bounds."""
        self.record, self.version = record, new_version()

    def bound(self, lifetime: Lifetime, now: float) -> None:
        """Shorten the bounds; the idle timeout counts from the last request, so that it may be over."""
        last = self.last(now)
        self.ends = math.inf if lifetime.absolute is None else now + lifetime.absolute
        self.idle = math.inf if lifetime.idle is None else lifetime.idle
        self.until = last + self.idle

    def checkout(self, session_id: str, now: float, token: str | None, waited: float = 0.0) -> Checkout:
        """It taken out for a request, under the lease with this token."""
        return Checkout(
            session_id,
            self.record,
            self.version,
            token,
            None if self.ends == math.inf else self.ends - now,
            waited,
            None if self.idle == math.inf else self.idle,
            now - self.began,
        )


def new_version() -> str:
    """A version that was never used: a counter would repeat itself after a restart."""
    return secrets.token_hex(8)
