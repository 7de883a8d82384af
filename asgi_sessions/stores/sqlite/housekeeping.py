"""What a writer does beside its calls: it renews leases, drops what has expired, and folds the log in."""

from __future__ import annotations

import logging
import math
import sqlite3
from typing import NamedTuple

from . import locks, records
from .transaction import Transaction

BITE = 100  # expired records that are deleted in one transaction
TIDY = 5.0  # seconds between two looks for expired records
SOON = 0.02  # seconds, where the last look did not find the end
FOLD = 2000  # pages that the log has, about, when it is folded into the database
_STRIDE = 8  # times as many calls may take so many pages as are assumed at first, or as few
PAGE = 4096
_VACUUM = 100  # free pages that are given back at once
_SPARE = 4  # a fourth of the file may be free: it is needed again soon


class Tidied(NamedTuple):
    """How many records were dropped, and whether there is more to do."""

    dropped: int
    more: bool


_logger = logging.getLogger("asgi_sessions.sqlite")


def renew_due(tx: Transaction) -> None:
    """Renew the leases of this process that are due, and note when the next ones are."""
    tx.desk.due = math.inf
    for token, lease in list(tx.desk.leases.items()):
        if lease.due <= tx.moment + lease.lease / 30:  # those that are nearly due go along
            _renew(tx, token)
        if token in tx.desk.leases:
            tx.desk.due = min(tx.desk.due, lease.due)


def _renew(tx: Transaction, token: str) -> None:
    lease = tx.desk.leases[token]
    left = lease.ends - tx.moment
    if left <= 0:
        tx.desk.drop(token)
        _logger.warning("a session's lock is held beyond lock_max_hold and is not renewed any more")
    elif not locks.renew(tx, lease.session_id, token, min(lease.lease, left)):
        tx.desk.drop(token)
        _logger.warning(
            "a session's lock was lost while its request ran; its commit is refused if another took it"
        )
    else:
        lease.due = min(tx.moment + lease.lease / 3, lease.ends)


def tidy(tx: Transaction) -> Tidied:
    """Drop a bite of what has expired, and give back some free pages."""
    dropped = records.expire(tx, BITE)
    return Tidied(dropped, _vacuum(tx.db) or dropped == BITE)


def _vacuum(db: sqlite3.Connection) -> bool:
    """Give free pages back to the file system, some at a time; whether there are still many."""
    (free,) = db.execute("PRAGMA freelist_count").fetchone()
    (pages,) = db.execute("PRAGMA page_count").fetchone()
    if free <= max(_VACUUM, pages // _SPARE):
        return False
    for _ in range(_VACUUM):  # `sqlite3` takes one step of this statement, and a step frees one page
        db.execute("PRAGMA incremental_vacuum")
    return True


class Log:
    """SQLite's log as its writer sees it: the calls that it holds, and how many of them make it long.

    How many pages a call takes depends on how many calls share a transaction, and is learned at each fold.
    """

    def __init__(self) -> None:
        self.calls = 0  # since the last fold
        self._most = FOLD // 2

    @property
    def is_long(self) -> bool:
        """Whether it is time to fold it."""
        return self.calls >= self._most

    def fold(self, db: sqlite3.Connection) -> None:
        """Copy the log into the database as far as no reader needs the old pages, and begin it anew.

        The first write to a new log waits for the disk, so that is done here and not in an event loop.
        """
        calls, self.calls = self.calls, 0
        busy, pages, _ = db.execute("PRAGMA wal_checkpoint(RESTART)").fetchone()
        if pages > 0:
            least, most = FOLD // 2 // _STRIDE, FOLD // 2 * _STRIDE
            self._most = max(least, min(calls * FOLD // pages, most))
        if not busy:
            (version,) = db.execute("PRAGMA user_version").fetchone()
            db.execute(f"PRAGMA user_version = {version}")  # writes one page
