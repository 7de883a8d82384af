"""What a store promises: the record operations that users call and the request operations of the walk.

A record lives under a session id. It is *absent* when it was never stored, was deleted or has expired; the
store's clock alone decides expiry. `create` never overwrites and `commit` never creates. Absence is a value,
a fault of the backend is a `SessionStoreError`.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Lifetime:
    """How long a record lives, in seconds of the store's clock.

    `absolute` counts from creation and never moves (OWASP: absolute timeout); `idle` restarts at each
    request (OWASP: idle timeout). The earlier end counts; None is no such bound. At least one is set.
    """

    absolute: float | None = None
    idle: float | None = None

    def ttl(self) -> float:
        """Seconds that a record created now lives if no request touches it."""
        return min(bound for bound in (self.absolute, self.idle) if bound is not None)


@dataclass(frozen=True, slots=True)
class LockPolicy:
    """How a request takes and keeps the lock of a session; all times in seconds."""

    timeout: float = 10.0  # the lease, renewed while the request runs
    wait: float = 15.0  # longest wait for others, then LockTimeoutError
    max_waiters: int = 64  # waiting requests of one session, then TooManyWaitersError
    max_hold: float = 300.0  # after this the lease is not renewed any more


class Missing(enum.Enum):
    """Why a checkout gave no record. Nothing is locked then."""

    ABSENT = "absent"  # never stored, deleted or expired
    RETIRED = "retired"  # its id was replaced (login, regenerate) within the last minute
    UNREADABLE = "unreadable"  # what lies at the key is not a record of ours; it is left alone


class Outcome(enum.Enum):
    """What became of a commit. Only STORED wrote anything."""

    STORED = "stored"
    GONE = "gone"  # the record was deleted or expired since it was checked out
    CONFLICT = "conflict"  # the record was changed by somebody who did not wait
    LOST = "lost"  # the lease ended, another may hold the lock


@dataclass(slots=True)
class Checkout:
    """A record taken out for a request: what it said, which version, and the lease on its lock.

    `token` is the lease's unguessable name, None where no lock was taken or it was let go. `expires_in` is
    what is left of the absolute bound in seconds at the time of the checkout, None where there is none.
    `waited` is how long the lock was waited for, in seconds.
    """

    session_id: str
    record: bytes
    version: str
    token: str | None
    expires_in: float | None = None
    waited: float = 0.0
