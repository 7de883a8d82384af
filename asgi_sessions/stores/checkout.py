"""The values that pass between a store and a request: lifetime, lock settings, checkout, outcome."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from ..errors import LockLostError, SessionConflictError, SessionStoreError


@dataclass(frozen=True, slots=True)
class Lifetime:
    """How long a record lives, in seconds of the store's clock.

    `absolute` counts from creation or sign-in and never moves (OWASP: absolute timeout); `idle` restarts at
    each request (OWASP: idle timeout). The earlier end counts; None is no bound. At least one is set.
    A record that is created with `first` lives no longer than that until `arrived` is called.
    """

    absolute: float | None = None
    idle: float | None = None
    first: float | None = None

    def ttl(self) -> float:
        """Seconds that a record lives which is created now and never used."""
        return min(bound for bound in (self.absolute, self.idle) if bound is not None)


@dataclass(frozen=True, slots=True)
class LockPolicy:
    """How a request takes and keeps the lock of a session. All times are in seconds."""

    timeout: float = 10.0  # the lease, renewed while the request runs
    wait: float = 15.0  # the longest wait for others, then LockTimeoutError
    max_waiters: int = 1024  # for one session in one process; one more gets TooManyWaitersError
    max_hold: float = 300.0  # after that the lease is no longer renewed


class Missing(enum.Enum):
    """Why a checkout gave no record. Nothing is locked then."""

    ABSENT = "absent"  # never stored, deleted or expired
    RETIRED = "retired"  # its id was replaced (login, regenerate) within the last minute
    UNREADABLE = "unreadable"  # what is stored there is no record of ours; it is left alone


class Outcome(enum.Enum):
    """What became of a commit. Only STORED means that this call wrote something."""

    STORED = "stored"
    GONE = "gone"  # the record was deleted or expired since it was checked out
    CONFLICT = "conflict"  # a writer that did not wait for the lock changed the record
    LOST = "lost"  # the lease ended, and somebody else took the lock
    BUSY = "busy"  # the commit was made without the lock, and somebody holds it
    UNSURE = "unsure"  # refused, but an earlier try may have been stored, and changed by others since


@dataclass(slots=True)
class Checkout:
    """A record as it was loaded for a request, its version, and the lease on its lock.

    `token` names the lease and cannot be guessed; None where no lock is held. All times are in seconds and as
    they were at the checkout: `expires_in` is the rest of the absolute bound and `idle` the idle timeout,
    None where there is none; `waited` is how long the request waited for the lock; `age` is how long ago the
    record's life began (creation or sign-in), None where the record does not say so.

    `seal` belongs to the store. `unsure` has the versions of commits with an unknown outcome, separated by
    spaces. `successor` is the record that a move has stored under a new id. It is set before the old record
    is removed, so that the session can be found after any fault.
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

    def is_now(self, found: Checkout) -> None:
        """Describe the version and the bounds of the same record as they were found now."""
        self.version, self.expires_in = found.version, found.expires_in
        self.idle, self.age = found.idle, found.age


def shorter(rule: Lifetime, taken: Checkout) -> Lifetime | None:
    """The new bounds of a record that was stored under a longer rule; None where its bounds are not longer.

    `absolute` is in seconds from now; 0 or less means that the record has ended by the rule. A shorter
    `max_age` or `idle_timeout` so binds older sessions too (OWASP: the server enforces timeouts).
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
"""Seconds for which a replaced id is remembered: longer than a request takes that still uses it."""

LEADS_FOR = 30.0
"""Seconds for which an id leads to the one that took its place only because it was old."""


_STORED = Outcome.STORED  # bound once: looking up an Enum's member is slow on Python 3.11


def raise_for(outcome: Outcome) -> None:
    """Raise the error that tells the app why its change was not stored; nothing for STORED."""
    if outcome is _STORED:
        return
    if outcome is Outcome.LOST:
        raise LockLostError("the lease on the session ended before its change was stored")
    if outcome is Outcome.BUSY:
        raise SessionConflictError("another request holds the session, and this one did not wait for it")
    if outcome is Outcome.CONFLICT:
        raise SessionConflictError("the session was changed by another writer since it was loaded")
    if outcome is Outcome.GONE:
        raise SessionConflictError("the session was deleted or has expired since it was loaded")
    if outcome is Outcome.UNSURE:
        raise SessionStoreError("whether the session's change was stored is not known: a reply was lost")
