"""Puts an error of SQLite or of the file system into an operator's words: what happened, and what to do."""

from __future__ import annotations

import errno
import sqlite3

from ...errors import SessionStoreError

CLOSED = "the store was closed while this call waited"
BUSY = "another program keeps the database locked, or a process was frozen in the middle of a write"
FORKED = (
    "this process was forked in the middle of a call that did not end, so SQLite's locks are not safe in it:"
    " start a new process instead, or fork before the store is used"
)
DELETED = (
    "the database file was deleted or replaced while it was in use: put it back, or restart the app to begin"
    " a new one"
)

# The first that an error's text contains.
_WORDS = (
    ("database is locked", BUSY),
    ("database table is locked", BUSY),
    ("disk is full", "the disk is full"),
    ("readonly database", "the database cannot be written: check the owner and the mode of file and folder"),
    ("not a database", "the file is no SQLite database; it is left as it is"),
    ("malformed", "the database is damaged: put a backup in its place (PRAGMA integrity_check tells more)"),
    ("unable to open", "the database cannot be opened: check the owner and the mode of file and folder"),
    ("disk I/O error", "the disk failed to read or write"),
    ("no such table", "the database lacks a table of ours: another program has changed it"),
    ("no such column", "the database lacks a column of ours: another program has changed it"),
)
_CODES = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the file system is mounted read-only",
    errno.EACCES: "this process may not write there: check the owner and the mode of file and folder",
    errno.EPERM: "this process may not write there: check the owner and the mode of file and folder",
    errno.ENOENT: "the folder of the database does not exist: make it, or mount it",
    errno.ENOTDIR: "the folder of the database is no folder",
    errno.EMFILE: "this process has too many open files",
    errno.ENOLCK: "the file system has no locks: keep the database on a local disk",
}


def is_busy(error: sqlite3.Error) -> bool:
    """Whether somebody else has the database locked: the same call may succeed later."""
    return "is locked" in str(error)


def is_full(error: Exception) -> bool:
    """Whether a file could not grow, perhaps: a quota is an I/O error to SQLite."""
    return isinstance(error, sqlite3.Error) and any(
        words in str(error) for words in ("disk is full", "disk I/O error")
    )


def fault_of(error: Exception) -> SessionStoreError:
    """The error to raise from this one. One that is in an operator's words already is copied."""
    if isinstance(error, SessionStoreError):
        fault = SessionStoreError(*error.args)
        fault.__cause__ = error.__cause__
        return fault
    text = str(error)
    words = _CODES.get(error.errno or 0) if isinstance(error, OSError) else None
    words = words or next((words for part, words in _WORDS if part in text), None)
    fault = SessionStoreError(f"SQLite: {words} ({text})" if words else f"SQLite: {text}")
    fault.__cause__ = error
    return fault
