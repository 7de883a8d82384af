"""The tables, and how a database comes to have them: made anew, migrated, or refused."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from urllib.parse import quote

from ...errors import SessionStoreError
from .faults import fault_of
from .place import Place

OLDEST = (3, 35)  # the release of SQLite that has RETURNING
_LEAST = 512  # bytes; SQLite takes what is shorter for a new database
_HEADER = b"SQLite format 3\x00"
APPLICATION = 0x41534753  # "ASGS", in the header of each database of ours

# Times are seconds by the store's clock, those of `lock` by the monotonic clock. `ends` is the earlier of
# `expires` and `until`. The lock of a session is held by its row with the lowest `pos`, the others wait;
# `lease` is how long it lasts for whoever holds it, `since` when that one came to it, and `route` the
# request's method and path.
_FIRST = """
CREATE TABLE session (
  id TEXT PRIMARY KEY NOT NULL, version TEXT NOT NULL,
  began REAL NOT NULL, expires REAL NOT NULL, idle REAL NOT NULL, until REAL NOT NULL, ends REAL NOT NULL,
  user_id TEXT, created REAL, messages INTEGER, escalated INTEGER, record BLOB NOT NULL
);
CREATE INDEX session_ends ON session (ends);
CREATE INDEX session_user ON session (user_id) WHERE user_id IS NOT NULL;
CREATE INDEX session_created ON session (created);
CREATE INDEX session_messages ON session (messages) WHERE messages > 0;
CREATE INDEX session_escalated ON session (escalated) WHERE escalated > 0;
CREATE TABLE lock (
  id TEXT NOT NULL, pos INTEGER NOT NULL, token TEXT NOT NULL, process TEXT NOT NULL,
  until REAL NOT NULL, lease REAL NOT NULL, since REAL NOT NULL, route TEXT NOT NULL, PRIMARY KEY (id, pos)
) WITHOUT ROWID;
CREATE TABLE retired (id TEXT PRIMARY KEY NOT NULL, until REAL NOT NULL) WITHOUT ROWID;
CREATE INDEX retired_until ON retired (until);
"""

_SUCCESSORS = """
CREATE TABLE successor (
  id TEXT PRIMARY KEY NOT NULL, leads_to TEXT NOT NULL, until REAL NOT NULL
) WITHOUT ROWID;
CREATE INDEX successor_until ON successor (until);
"""

STEPS: Sequence[str] = (_FIRST, _SUCCESSORS)
"""The statements that lead from each version of the schema to the next; the first begins at nothing.

A step keeps what older releases read and write, for they go on while a deploy rolls.
"""


def connect(path: Path, patience: float = 0.0) -> sqlite3.Connection:
    """A connection that any thread may use, one at a time. Never makes a file.

    It waits so many seconds for a lock, and blocks meanwhile.
    """
    connection = sqlite3.connect(
        f"file:{quote(os.fsencode(path))}?mode=rw",
        uri=True, timeout=patience, isolation_level=None, check_same_thread=False, cached_statements=256,
    )  # fmt: skip
    connection.execute("PRAGMA wal_autocheckpoint = 0")  # the writer does so between transactions
    return connection


def prepare(place: Place, patience: float) -> None:
    """See to it that the database is there and has our tables; to be called behind the gate.

    A foreign program may keep the file locked for so many seconds.

    `SessionStoreError` for a file that is none of ours, is empty, cannot be written, or has tables of a
    newer release. It is left as it is then.
    """
    try:
        if not place.exists():
            _make(place.path)
        elif not place.path.is_file():
            raise SessionStoreError(f"{place.path} is no file, but a pipe, a socket or a device")
        elif place.path.stat().st_size < _LEAST:
            _refuse_short(place.path)
        elif not os.access(place.path, os.R_OK | os.W_OK):
            raise SessionStoreError(
                f"{place.path} cannot be written: check its owner, its mode, and whether its file system is"
                " mounted read-only"
            )
        with closing(connect(place.path, patience)) as db:
            _migrate(db, place.path)
    except (sqlite3.Error, OSError) as error:
        raise fault_of(error) from error


def _refuse_short(path: Path) -> None:
    """Say whether it was a database. SQLite cannot have it open, so it may be read."""
    if _HEADER.startswith(path.read_bytes()[: len(_HEADER)]):
        raise SessionStoreError(
            f"{path} is empty or cut off, and so no database: remove it, and a new one is made, or put a"
            " backup in its place"
        )
    raise SessionStoreError(f"{path} is no SQLite database; it is left as it is")


def _make(path: Path) -> None:
    """A new database under another name, which gets its own name when it is whole.

    What an earlier one has left is removed: its log would be taken for the new one's.
    """
    new = Path(f"{path}-new")
    for left in (new, *(Path(f"{each}{end}") for each in (path, new) for end in ("-wal", "-shm"))):
        left.unlink(missing_ok=True)
    os.close(os.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    with closing(connect(new)) as db:
        db.execute("PRAGMA auto_vacuum = INCREMENTAL")
        db.execute("PRAGMA journal_mode = WAL")
        db.execute(f"PRAGMA application_id = {APPLICATION}")
        _take_steps(db, 0)
    os.rename(new, path)
    folder = os.open(path.parent, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _migrate(db: sqlite3.Connection, path: Path) -> None:
    version = schema_of(db)
    if _number(db, "PRAGMA application_id") != APPLICATION:
        raise SessionStoreError(f"{path} is a database of another program; it is left as it is")
    if version > len(STEPS):
        raise SessionStoreError(
            f"{path} was written by a newer release (schema {version}, this one knows {len(STEPS)}): upgrade"
            " asgi-server-sessions, or use another file"
        )
    if version < len(STEPS):
        _take_steps(db, version)
    db.execute("PRAGMA journal_mode = WAL")  # a copy may have lost it


def _take_steps(db: sqlite3.Connection, version: int) -> None:
    """All in one transaction: who is killed on the way leaves the old tables."""
    statements = "".join(STEPS[version:])
    db.executescript(f"BEGIN IMMEDIATE; {statements} PRAGMA user_version = {len(STEPS)}; COMMIT;")


def schema_of(db: sqlite3.Connection) -> int:
    """The version of the schema."""
    return _number(db, "PRAGMA user_version")


def _number(db: sqlite3.Connection, pragma: str) -> int:
    return int(db.execute(pragma).fetchone()[0])
