"""The operations of a store, each within one transaction: nobody comes between its steps."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from ..checkout import Checkout, Lifetime, Missing, Outcome
from ..surplus import idleness, surplus
from ..value import Value
from . import locks, records
from .columns import Columns, columns_of
from .transaction import Standing, Transaction, Waiter

_STORED = Outcome.STORED  # bound once: looking up an Enum's member is slow on Python 3.11
_COUNT_OF_USER = "SELECT count(*) FROM session WHERE user_id = ? AND id IS NOT ? AND ends > ?"
_LOCKED_OF_USER = "SELECT id FROM session WHERE user_id = ? AND id IS NOT ? AND id IN (SELECT id FROM lock)"
_RECORDS_OF_USER = f"SELECT id, {records.VALUE} FROM session WHERE user_id = ? AND ends > ?"  # noqa: S608
_DELETE_OF_USER = "DELETE FROM session WHERE user_id = ? AND id IS NOT ? RETURNING id"
_HELD, _FULL = Standing.HELD, Standing.FULL


@dataclass(slots=True)
class Claim:
    """What a checkout may change: its session, its lock (None without one), the versions that are its own."""

    session_id: str = field(repr=False)
    token: str | None = field(repr=False)
    versions: Sequence[str]


@dataclass(slots=True)
class New:
    """A record to be stored under an id of its own, with its columns, and locked for `owner`, if given."""

    session_id: str = field(repr=False)
    record: bytes = field(repr=False)
    columns: Columns
    lifetime: Lifetime | None  # None: the bounds of the record that it follows
    owner: Waiter | None


def check_out(tx: Transaction, waiter: Waiter, passive: bool) -> Checkout | Missing | Standing:
    """Lock and load. `QUEUED` where the lock is another's: the checkout comes later, by `waiter.granted`.

    Whoever has to queue counts as activity, unless it is passive.
    """
    session_id = waiter.session_id
    value = records.find(tx, session_id)
    if value is None:
        return records.why_missing(tx, session_id)
    place = locks.enter(tx, waiter)
    if place is _HELD:
        return _loaded(tx, session_id, value, waiter.rule, waiter.token)
    if not passive and place is not _FULL and value.until < math.inf and value.arrive(waiter.rule, tx.now):
        records.bound(tx, session_id, value)
    return place


def load(tx: Transaction, session_id: str, rule: Lifetime | None) -> Checkout | Missing:
    """Load without a lock, and shorten the bounds to the rule."""
    value = records.find(tx, session_id)
    if value is None:
        return records.why_missing(tx, session_id)
    return _loaded(tx, session_id, value, rule, None)


def create(tx: Transaction, new: New) -> Checkout | None:
    """Store a new record; None where the id exists."""
    if records.find(tx, new.session_id) is not None or new.lifetime is None:
        return None
    return _inserted(tx, new, Value.new(new.record, new.lifetime, tx.now))


def take_back(tx: Transaction, new: New) -> None:
    """Delete a record that was created and whose id nobody was told."""
    value = records.find(tx, new.session_id)
    if value is not None and value.record == new.record:
        _end(tx, new.session_id, Missing.ABSENT)


def write_back(
    tx: Transaction, claim: Claim, record: bytes, version: str, columns: Columns | None, release: bool
) -> Outcome:
    """Write the record if the claim holds. `columns` is None where they are those that were loaded."""
    outcome = _STORED
    if not records.replace(tx, claim.session_id, claim.versions[0], claim.token, record, version, columns):
        outcome = _judge(tx, claim)
        if outcome is _STORED:
            records.rewrite(tx, claim.session_id, record, version, columns or columns_of(record))
    if release and claim.token is not None:
        locks.release(tx, claim.session_id, claim.token)
    return outcome


def write_unlocked(
    tx: Transaction, claim: Claim, record: bytes, version: str, columns: Columns | None
) -> Outcome:
    """Write the record if nobody holds the lock and the claim holds."""
    head = locks.head_of(tx, claim.session_id)
    if head is not None and locks.is_held(tx, head):
        return Outcome.BUSY
    return write_back(tx, claim, record, version, columns, False)


def set_bounds(tx: Transaction, claim: Claim, lifetime: Lifetime, version: str) -> Outcome | Checkout:
    """Give the record other bounds if the claim holds; the record as it is now, or why that was not done."""
    outcome = _judge(tx, claim)
    value = records.find(tx, claim.session_id) if outcome is _STORED else None
    if value is None:
        return outcome
    value.bound(lifetime, tx.now)
    value.rewrite(value.record, version)
    records.bound(tx, claim.session_id, value)
    return value.checkout(claim.session_id, tx.now, claim.token)


def move(tx: Transaction, claim: Claim, new: New, leads: bool) -> Outcome | Checkout:
    """Store the record under a new id and retire the old one; the new checkout, or why there is none."""
    outcome = _judge(tx, claim)
    old = records.find(tx, claim.session_id) if outcome is _STORED else None
    if old is None:
        _let_go(tx, claim)
        return outcome
    value = (
        old.renewed(new.record, tx.now)
        if new.lifetime is None
        else Value.new(new.record, new.lifetime, tx.now)
    )
    moved = _inserted(tx, new, value)
    records.retire(tx, claim.session_id, new.session_id if leads else None)
    _end(tx, claim.session_id, Missing.RETIRED)
    return moved


def discard(tx: Transaction, claim: Claim) -> Outcome:
    """Delete the record if the claim holds."""
    outcome = _judge(tx, claim)
    if outcome is _STORED:
        _end(tx, claim.session_id, Missing.ABSENT)
    else:
        _let_go(tx, claim)
    return outcome


def put(tx: Transaction, new: New, ttl: float | None, default_ttl: float, allow_new: bool) -> bool:
    """Store a record whoever holds it. Without ttl old bounds stay, and a new record gets the default."""
    value = records.find(tx, new.session_id)
    if value is None:
        if allow_new:
            lifetime = Lifetime(default_ttl if ttl is None else ttl)
            records.insert(tx, new.session_id, Value.new(new.record, lifetime, tx.now), new.columns)
        return allow_new
    value.rewrite(new.record)
    records.rewrite(tx, new.session_id, value.record, value.version, new.columns)
    if ttl is not None:
        value.expires = tx.now + ttl
        value.touch(tx.now)
        records.bound(tx, new.session_id, value)
    return True


def put_all(tx: Transaction, all_new: Sequence[New], ttl: float | None, default_ttl: float) -> list[bool]:
    """`put` for many."""
    return [put(tx, new, ttl, default_ttl, True) for new in all_new]


def delete(tx: Transaction, session_ids: Sequence[str]) -> list[bool]:
    """Delete records whoever holds them; which were there."""
    return [_delete(tx, session_id) for session_id in session_ids]


def end_all_of(tx: Transaction, users: Sequence[str], keep: str | None) -> int:
    """Delete all records of a user, who is known by these names, but one; how many lived."""
    return sum([_end_all_of(tx, user, keep) for user in users])


def _end_all_of(tx: Transaction, user: str, keep: str | None) -> int:
    (lived,) = tx.db.execute(_COUNT_OF_USER, (user, keep, tx.now)).fetchone()
    locked = tx.db.execute(_LOCKED_OF_USER, (user, keep)).fetchall()
    tx.ended += [session_id for (session_id,) in tx.db.execute(_DELETE_OF_USER, (user, keep))]
    for (session_id,) in locked:
        locks.send_away(tx, session_id, Missing.ABSENT)
    return int(lived)


def end_surplus(tx: Transaction, user: str, most: int, keep: str) -> list[str]:
    """Delete the longest idle records of a user, so that so many are left with `keep`; the ids."""
    rows, today = tx.db.execute(_RECORDS_OF_USER, (user, tx.now)), time.time()
    ended = surplus({row[0]: idleness(Value(*row[1:]), tx.now, today) for row in rows}, most, keep)
    for session_id in ended:
        _end(tx, session_id, Missing.ABSENT)
    return ended


def renew(tx: Transaction, claims: Sequence[Claim]) -> list[bool]:
    """Prolong the leases that last; which do."""
    return [claim.token is not None and _renew(tx, claim.session_id, claim.token) for claim in claims]


def _renew(tx: Transaction, session_id: str, token: str) -> bool:
    head, lease = locks.head_of(tx, session_id), tx.desk.leases.get(token)
    if head is None or head.token != token or head.until <= tx.moment:
        return False
    if lease is not None:
        locks.renew(tx, session_id, token, min(lease.lease, lease.ends - tx.moment))
    return True


def _loaded(
    tx: Transaction, session_id: str, value: Value, rule: Lifetime | None, token: str | None
) -> Checkout | Missing:
    taken = records.bounded(tx, session_id, value, rule, token, 0.0)
    if taken is None:
        _end(tx, session_id, Missing.ABSENT)
        return records.why_missing(tx, session_id)
    return taken


def _inserted(tx: Transaction, new: New, value: Value) -> Checkout:
    records.insert(tx, new.session_id, value, new.columns)
    token = None
    if new.owner is not None:
        locks.send_away(tx, new.session_id, Missing.ABSENT)  # who held a record of this id that has expired
        locks.enter(tx, new.owner)
        token = new.owner.token
    return value.checkout(new.session_id, tx.now, token)


def _judge(tx: Transaction, claim: Claim) -> Outcome:
    """STORED where the claim may change the record: nobody else took the lock, and the version is its own."""
    row = tx.db.execute(
        "SELECT version FROM session WHERE id = ? AND ends > ?", (claim.session_id, tx.now)
    ).fetchone()
    if claim.token is not None:
        head = locks.head_of(tx, claim.session_id)
        if head is not None and head.token != claim.token:
            return Outcome.LOST
    if row is None:
        return Outcome.GONE
    return _STORED if row[0] in claim.versions else Outcome.CONFLICT


def _let_go(tx: Transaction, claim: Claim) -> None:
    if claim.token is not None:
        locks.release(tx, claim.session_id, claim.token)


def _end(tx: Transaction, session_id: str, reason: Missing) -> None:
    """Delete a record; nobody holds or waits for it any more."""
    records.remove(tx, session_id)
    locks.send_away(tx, session_id, reason)


def _delete(tx: Transaction, session_id: str) -> bool:
    found = records.find(tx, session_id) is not None
    if found:
        _end(tx, session_id, Missing.ABSENT)
    return found
