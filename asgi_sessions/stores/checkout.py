"""What passes between a store and a request: a record's life, what was taken out, what became of it."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from ..errors import LockLostError, SessionConflictError, SessionStoreError


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
    max_waiters: int = 1024  # of one session in one process, then TooManyWaitersError
    max_hold: float = 300.0  # after this the lease is not renewed any more


class Missing(enum.Enum):
    """Why a checkout gave no record. Nothing is locked then."""

    ABSENT = "absent"  # never stored, deleted or expired
    RETIRED = "retired"  # its id was replaced (login, regenerate) within the last minute
    UNREADABLE = "unreadable"  # what lies at the key is not a record of ours; it is left alone


class Outcome(enum.Enum):
    """What became of a commit. Of this call only STORED wrote anything."""

    STORED = "stored"
    GONE = "gone"  # the record was deleted or expired since it was checked out
    CONFLICT = "conflict"  # the record was changed by somebody who did not wait
    LOST = "lost"  # the lease ended, and another has taken the lock
    UNSURE = "unsure"  # refused, but an earlier try of this request may have been stored, and changed since


@dataclass(slots=True)
class Checkout:
    """A record taken out for a request: what it said, which version, and the lease on its lock.

    `token` is the lease's unguessable name, None where no lock was taken or it was let go. `expires_in` is
    what is left of the absolute bound in seconds at the time of the checkout, None where there is none.
    `waited` is how long the lock was waited for, in seconds. `seal` belongs to the store.

    `idle` is the record's idle timeout in seconds, None where it has none. `age` is how many seconds ago its
    life began (creation or sign-in) at the time of the checkout, None where the record does not say so.
    `unsure` names the versions, with spaces between, that commits wrote, or did not: their outcome is not
    known. `successor` is the record that a move has stored under a new id; set before the old record is
    removed, so that whoever meets a fault after that still knows where the session is.
    """

    session_id: str = field(repr=False)
    record: bytes = field(repr=False)
    version: str
    token: str | None = field(repr=False)
    expires_in: float | None = None
    waited: float = 0.0
    idle: float | None = None
    age: float | None = None
    seal: object = field(default=None, repr=False)
    unsure: str | None = None
    successor: Checkout | None = None


def shorter(rule: Lifetime, taken: Checkout) -> Lifetime | None:
    """The bounds that a record gets which was stored under a longer rule; None where its own are no longer.

    `absolute` is in seconds from now, 0 or less where the record has ended by the rule. Who shortens
    `max_age` or `idle_timeout` means the sessions that are there too (OWASP: session timeouts are enforced by
    the server).
    """
    absolute, idle = taken.expires_in, taken.idle
    if rule.absolute is not None and taken.age is not None:
        left = rule.absolute - taken.age
        if absolute is None or left < absolute - _TOLERANCE:
            absolute = left
    if rule.idle is not None and (idle is None or rule.idle < idle - _TOLERANCE):
        idle = rule.idle
    if absolute == taken.expires_in and idle == taken.idle:
        return None
    return Lifetime(absolute, idle)


_TOLERANCE = 0.01  # seconds; stores count in milliseconds

RETIRED_FOR = 60.0
"""Seconds for which a replaced id is remembered: longer than any request that was under way then."""


_STORED = Outcome.STORED  # bound once: looking up an Enum's member is slow on Python 3.11


def raise_for(outcome: Outcome) -> None:
    """Raise the error that tells an app that its change was not stored; nothing for STORED."""
    if outcome is _STORED:
        return
    if outcome is Outcome.LOST:
        raise LockLostError("the lease on the session ended before its change was stored")
    if outcome is Outcome.CONFLICT:
        raise SessionConflictError("the session was changed by another writer since it was loaded")
    if outcome is Outcome.GONE:
        raise SessionConflictError("the session was deleted or has expired since it was loaded")
    if outcome is Outcome.UNSURE:
        raise SessionStoreError("whether the session's change was stored is not known: a reply was lost")
