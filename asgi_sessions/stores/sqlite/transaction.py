"""What one transaction works with, and what this process knows of locks: who waits, what is held."""

from __future__ import annotations

import enum
import math
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

from ..answers import Answer
from ..checkout import Lifetime, LockPolicy

_NEVER = math.inf


class Standing(enum.Enum):
    """Where somebody who wants a session's lock stands."""

    HELD = "held"
    QUEUED = "queued"
    FULL = "full"  # too many wait in this process; nothing was written


class Others(Protocol):
    """The processes that use the database."""

    name: str  # of this one

    def lives(self, name: str) -> bool:
        """Whether the process of this name lives."""
        ...


@dataclass(slots=True, eq=False)
class Waiter:
    """A request that wants the lock of a session; `granted` gets its checkout, or why there is none.

    `started` is when it came, by the clock of leases. One that makes the session does not wait: it has None.
    """

    session_id: str = field(repr=False)
    token: str = field(repr=False)
    policy: LockPolicy
    rule: Lifetime | None
    started: float
    granted: Answer | None
    route: str = ""

    @property
    def lease(self) -> float:
        """For how many seconds it holds the lock before that is renewed."""
        return min(self.policy.timeout, self.policy.max_hold)


@dataclass(slots=True, eq=False)
class Lease:
    """A lock that is held here. Times are by the clock of leases."""

    session_id: str = field(repr=False)
    lease: float
    due: float  # when it is renewed next
    ends: float  # when it is not renewed any more


class Desk:
    """Who of this process waits for a lock, and what is held. Used by one thread at a time: who has the turn.

    It is changed within transactions, which undo that where they are rolled back.
    """

    def __init__(self) -> None:
        self.waiting: dict[str, dict[str, Waiter]] = {}  # by session and token
        self.leases: dict[str, Lease] = {}  # by token
        self.due = _NEVER  # when the next lease is to be renewed; it may be gone by then

    def waiter(self, session_id: str, token: str) -> Waiter | None:
        """Who waits under this token."""
        return self.waiting.get(session_id, {}).get(token)

    def admit(self, waiter: Waiter) -> None:
        """Note one who waits."""
        self.waiting.setdefault(waiter.session_id, {})[waiter.token] = waiter

    def dismiss(self, session_id: str, token: str) -> None:
        """Forget one who waits, if it is known."""
        waiting = self.waiting.get(session_id, {})
        waiting.pop(token, None)
        if not waiting:
            self.waiting.pop(session_id, None)

    def hold(self, waiter: Waiter, moment: float) -> None:
        """Renew this lock until it is dropped."""
        lease = waiter.lease
        due = moment + lease / 3
        self.leases[waiter.token] = Lease(waiter.session_id, lease, due, moment + waiter.policy.max_hold)
        self.due = min(self.due, due)

    def drop(self, token: str | None) -> None:
        """Renew it no more."""
        if token is not None:
            self.leases.pop(token, None)


class Transaction:
    """One transaction on the database, and what is to be done once it is committed or rolled back.

    `now` is the time by the store's clock and `moment` by that of leases, both in seconds.
    """

    __slots__ = ("db", "desk", "ended", "moment", "now", "others", "settled", "told", "undo")

    def __init__(self, db: sqlite3.Connection, now: float, moment: float, desk: Desk, others: Others) -> None:
        self.db = db
        self.now = now
        self.moment = moment
        self.desk = desk
        self.others = others
        self.undo: list[Callable[[], object]] = []  # steps that undo what was noted at the desk
        self.settled: list[tuple[Answer, object]] = []  # answers to those who waited
        self.told: list[tuple[str, str]] = []  # processes, and the sessions to look after
        self.ended: list[str] = []  # sessions

    def admit(self, waiter: Waiter) -> None:
        """Note one who waits."""
        self.desk.admit(waiter)
        self.undo.append(partial(self.desk.dismiss, waiter.session_id, waiter.token))

    def settle(self, waiter: Waiter, value: object) -> None:
        """Answer one who waits."""
        self.desk.dismiss(waiter.session_id, waiter.token)
        self.undo.append(partial(self.desk.admit, waiter))
        if waiter.granted is not None:
            self.settled.append((waiter.granted, value))

    def hold(self, waiter: Waiter) -> None:
        """Renew the lock that is held under this waiter's token."""
        self.desk.hold(waiter, self.moment)
        self.undo.append(partial(self.desk.drop, waiter.token))
