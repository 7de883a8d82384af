"""What is done with locks within a transaction: who has a session's lock, who waits, who is next."""

from __future__ import annotations

from typing import NamedTuple

from ..checkout import Missing
from . import records
from .transaction import Standing, Transaction, Waiter

_HEAD = "SELECT pos, token, process, until, lease FROM lock WHERE id = ? ORDER BY pos LIMIT 1"
_ENTER = "INSERT INTO lock VALUES (?, ?, ?, ?, ?, ?, ?, ?)"
_ENTER_IF_FREE = (
    "INSERT INTO lock (id, pos, token, process, until, lease, since, route)"
    " SELECT ?, 1, ?, ?, ?, ?, ?, ? WHERE NOT EXISTS (SELECT 1 FROM lock WHERE id = ?)"
)
_RELEASE_ALONE = (
    "DELETE FROM lock WHERE id = ? AND token = ?"
    " AND NOT EXISTS (SELECT 1 FROM lock WHERE id = ? AND token != ?)"
)
_FIRST_TWO = "SELECT pos, token FROM lock WHERE id = ? ORDER BY pos LIMIT 2"


class Head(NamedTuple):
    """Who holds the lock of a session: the first row of its queue."""

    pos: int
    token: str
    process: str
    until: float
    lease: float

    def __repr__(self) -> str:
        return f"Head(until={self.until})"


def head_of(tx: Transaction, session_id: str) -> Head | None:
    """Who holds the lock, or held it until the lease ran out or the process died."""
    row = tx.db.execute(_HEAD, (session_id,)).fetchone()
    return None if row is None else Head(*row)


def is_held(tx: Transaction, head: Head) -> bool:
    """Whether this holder's lease lasts and its process lives."""
    return head.until > tx.moment and tx.others.lives(head.process)


def enter(tx: Transaction, waiter: Waiter) -> Standing:
    """Take the lock if it is free, else queue for it."""
    if _took(tx, waiter):
        return Standing.HELD
    session_id, name = waiter.session_id, tx.others.name
    head = _relieved(tx, session_id)
    if head is None:
        _took(tx, waiter)
        return Standing.HELD
    rows = tx.db.execute("SELECT count(*) FROM lock WHERE id = ? AND process = ?", (session_id, name))
    if rows.fetchone()[0] - (head.process == name) >= waiter.policy.max_waiters:
        return Standing.FULL
    (last,) = tx.db.execute("SELECT max(pos) FROM lock WHERE id = ?", (session_id,)).fetchone()
    row = session_id, last + 1, waiter.token, name, 0.0, waiter.lease, 0.0, waiter.route
    tx.db.execute(_ENTER, row)
    tx.admit(waiter)
    return Standing.QUEUED


def _took(tx: Transaction, waiter: Waiter) -> bool:
    """Take a lock that nobody has or waits for; False where somebody does."""
    lease = waiter.lease
    session_id = waiter.session_id
    until, now = tx.moment + lease, tx.moment
    row = session_id, waiter.token, tx.others.name, until, lease, now, waiter.route, session_id
    if tx.db.execute(_ENTER_IF_FREE, row).rowcount != 1:
        return False
    tx.hold(waiter)
    return True


def release(tx: Transaction, session_id: str, token: str) -> None:
    """Let a lock go, or leave its queue. A holder's lock goes to the next.

    It is not renewed any more, even if this transaction fails.
    """
    tx.desk.drop(token)
    tx.desk.dismiss(session_id, token)
    if tx.db.execute(_RELEASE_ALONE, (session_id, token, session_id, token)).rowcount:
        return
    first = tx.db.execute(_FIRST_TWO, (session_id,)).fetchall()
    if not first or first[0][1] != token:
        tx.db.execute("DELETE FROM lock WHERE id = ? AND token = ?", (session_id, token))
        return
    _drop(tx, session_id, first[0][0])
    if len(first) > 1:
        hand_over(tx, session_id)


def hand_over(tx: Transaction, session_id: str) -> None:
    """Give the lock, whose holder is gone, to the first in the queue who lives."""
    while (head := head_of(tx, session_id)) is not None:
        if head.process == tx.others.name:
            waiter = tx.desk.waiter(session_id, head.token)
            if waiter is not None:
                return grant(tx, waiter, head)
        elif tx.others.lives(head.process):
            _give(tx, session_id, head, head.lease)
            tx.told.append((head.process, session_id))
            return None
        _drop(tx, session_id, head.pos)  # nobody waits there any more
    return None


def grant(tx: Transaction, waiter: Waiter, head: Head) -> None:
    """Give a waiter of this process, who is the first in the queue, the lock and the record."""
    session_id = waiter.session_id
    value = records.find(tx, session_id)
    if value is not None:
        waited = tx.moment - waiter.started
        taken = records.bounded(tx, session_id, value, waiter.rule, waiter.token, waited)
        if taken is not None:
            _give(tx, session_id, head, waiter.lease)
            tx.settle(waiter, taken)
            tx.hold(waiter)
            return
        records.remove(tx, session_id)
    send_away(tx, session_id, records.why_missing(tx, session_id))


def send_away(tx: Transaction, session_id: str, reason: Missing) -> None:
    """The session is gone: free its lock, and tell all who wait for it why."""
    rows = tx.db.execute("DELETE FROM lock WHERE id = ? RETURNING token, process", (session_id,)).fetchall()
    for token, process in rows:
        waiter = tx.desk.waiter(session_id, token)
        if waiter is not None:
            tx.settle(waiter, reason)
        elif process == tx.others.name:
            tx.desk.drop(token)
    tx.told += [(process, session_id) for process in {name for _, name in rows} - {tx.others.name}]


def renew(tx: Transaction, session_id: str, token: str, lease: float) -> bool:
    """Prolong a lease, also one that has run out while nobody took the lock; False where it is lost."""
    head = head_of(tx, session_id)
    if head is None or head.token != token:
        return False
    _prolong(tx, session_id, head, lease)
    return True


def look(tx: Transaction, session_id: str) -> None:
    """See to the waiters of this process: take what was handed to them, or what a dead process holds.

    One whose row is gone was sent away by another process, or was taken for dead: it asks anew.
    """
    head = _relieved(tx, session_id)
    waiting = tx.desk.waiting.get(session_id, {})
    if head is not None and head.token in waiting:
        grant(tx, waiting[head.token], head)
    name = tx.others.name
    rows = tx.db.execute("SELECT token FROM lock WHERE id = ? AND process = ?", (session_id, name))
    for token in waiting.keys() - {token for (token,) in rows}:
        waiter = waiting[token]
        if records.find(tx, session_id) is None:
            tx.settle(waiter, records.why_missing(tx, session_id))
        elif enter(tx, waiter) is Standing.HELD and (head := head_of(tx, session_id)) is not None:
            grant(tx, waiter, head)


def _relieved(tx: Transaction, session_id: str) -> Head | None:
    """Who holds the lock, after those are gone whose lease ran out or whose process died."""
    head = head_of(tx, session_id)
    if head is None or is_held(tx, head):
        return head
    if head.until:  # else it still waits
        _drop(tx, session_id, head.pos)
    hand_over(tx, session_id)
    return head_of(tx, session_id)


def _give(tx: Transaction, session_id: str, head: Head, lease: float) -> None:
    tx.db.execute(
        "UPDATE lock SET until = ?, since = ? WHERE id = ? AND pos = ?",
        (tx.moment + lease, tx.moment, session_id, head.pos),
    )


def _prolong(tx: Transaction, session_id: str, head: Head, lease: float) -> None:
    tx.db.execute(
        "UPDATE lock SET until = ? WHERE id = ? AND pos = ?", (tx.moment + lease, session_id, head.pos)
    )


def _drop(tx: Transaction, session_id: str, pos: int) -> None:
    tx.db.execute("DELETE FROM lock WHERE id = ? AND pos = ?", (session_id, pos))
