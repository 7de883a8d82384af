"""What is done with records within a transaction."""

from __future__ import annotations

import math

from ..checkout import LEADS_FOR, RETIRED_FOR, Checkout, Lifetime, Missing, shorter
from ..value import Value
from .columns import Columns
from .transaction import Transaction

VALUE = "record, version, began, expires, idle, until"  # the fields of a `Value`, in their order

_FIND = f"SELECT {VALUE} FROM session WHERE id = ? AND ends > ?"  # noqa: S608  # a constant
_INSERT = (
    "INSERT INTO session (id, record, version, began, expires, idle, until, ends,"
    " user_id, created, messages, escalated) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
)
_REWRITE = (
    "UPDATE session SET record = ?, version = ?, user_id = ?, created = ?, messages = ?, escalated = ?"
    " WHERE id = ?"
)
_THIS = "WHERE id = ? AND version = ? AND ends > ?"
_HELD = "(SELECT token FROM lock WHERE id = ? ORDER BY pos LIMIT 1) IS ?"
_REPLACE = f"UPDATE session SET record = ?, version = ? {_THIS}"  # noqa: S608  # constants, as below
_REPLACE_ALL = (
    "UPDATE session SET record = ?, version = ?, user_id = ?, created = ?, messages = ?, escalated = ?"  # noqa: S608
    f" {_THIS}"
)
_BOUND = "UPDATE session SET version = ?, expires = ?, idle = ?, until = ?, ends = ? WHERE id = ?"
_TOUCH = (
    "UPDATE session SET until = max(until, ? + idle), ends = min(expires, max(until, ? + idle))"
    " WHERE id = ? AND ends > ? AND until < ?"
)
_EXPIRED = "DELETE FROM session WHERE id IN (SELECT id FROM session WHERE ends <= ? LIMIT ?)"
_FORGET = "DELETE FROM retired WHERE id IN (SELECT id FROM retired WHERE until <= ? LIMIT ?)"
_LEAD_NO_MORE = "DELETE FROM successor WHERE id IN (SELECT id FROM successor WHERE until <= ? LIMIT ?)"


def find(tx: Transaction, session_id: str) -> Value | None:
    """The live record."""
    row = tx.db.execute(_FIND, (session_id, tx.now)).fetchone()
    return None if row is None else Value(*row)


def why_missing(tx: Transaction, session_id: str) -> Missing:
    """Whether an absent session was replaced lately."""
    known = tx.db.execute("SELECT 1 FROM retired WHERE id = ? AND until > ?", (session_id, tx.now)).fetchone()
    return Missing.ABSENT if known is None else Missing.RETIRED


def insert(tx: Transaction, session_id: str, value: Value, columns: Columns) -> None:
    """Add a record under an id that has no live one."""
    tx.db.execute("DELETE FROM session WHERE id = ?", (session_id,))  # one that has expired
    bounds = value.began, value.expires, value.idle, value.until, value.ends
    tx.db.execute(_INSERT, (session_id, value.record, value.version, *bounds, *columns))


def rewrite(tx: Transaction, session_id: str, record: bytes, version: str, columns: Columns) -> None:
    """Replace a record that is there; its bounds stay."""
    tx.db.execute(_REWRITE, (record, version, *columns, session_id))


def replace(
    tx: Transaction,
    session_id: str,
    loaded: str,
    token: str | None,
    record: bytes,
    version: str,
    columns: Columns | None,
) -> bool:
    """Replace a live record that has the loaded version, by whoever has the lock under this token, if any.

    False where it takes a closer look. `columns` is None where they stay: their indexes cost nothing then.
    """
    sql = _REPLACE if columns is None else _REPLACE_ALL
    values = record, version, *(columns or ()), session_id, loaded, tx.now
    if token is not None:
        sql, values = f"{sql} AND {_HELD}", (*values, session_id, token)
    return tx.db.execute(sql, values).rowcount == 1


def bound(tx: Transaction, session_id: str, value: Value) -> None:
    """Write the bounds and the version of a record that is there."""
    bounds = value.expires, value.idle, value.until, value.ends
    tx.db.execute(_BOUND, (value.version, *bounds, session_id))


def touch(tx: Transaction, session_id: str, when: float) -> None:
    """Restart the idle timeout of a record that lived then, when its request came."""
    tx.db.execute(_TOUCH, (when, when, session_id, when, math.inf))


def remove(tx: Transaction, session_id: str) -> None:
    """Delete a record: its session has ended."""
    tx.ended.append(session_id)
    tx.db.execute("DELETE FROM session WHERE id = ?", (session_id,))


def retire(tx: Transaction, session_id: str, successor: str | None) -> None:
    """Remember for a minute that this id was replaced, and for a while to which one it leads, if any."""
    tx.db.execute("INSERT OR REPLACE INTO retired VALUES (?, ?)", (session_id, tx.now + RETIRED_FOR))
    if successor is None:
        tx.db.execute("DELETE FROM successor WHERE id = ?", (session_id,))
    else:
        until = tx.now + LEADS_FOR
        tx.db.execute("INSERT OR REPLACE INTO successor VALUES (?, ?, ?)", (session_id, successor, until))


def bounded(
    tx: Transaction, session_id: str, value: Value, rule: Lifetime | None, token: str | None, waited: float
) -> Checkout | None:
    """The checkout of a live record, with bounds shortened to the rule; None where it has ended by that."""
    taken = value.checkout(session_id, tx.now, token, waited)
    bounds = None if rule is None else shorter(rule, taken)
    if bounds is None:
        return taken
    value.bound(bounds, tx.now)
    if value.ends <= tx.now:
        return None
    bound(tx, session_id, value)
    taken.expires_in, taken.idle = bounds.absolute, bounds.idle
    return taken


def expire(tx: Transaction, most: int) -> int:
    """Delete expired records and what was remembered of replaced ids, at most so many; how many records."""
    tx.db.execute(_FORGET, (tx.now, most))
    tx.db.execute(_LEAD_NO_MORE, (tx.now, most))
    return tx.db.execute(_EXPIRED, (tx.now, most)).rowcount
