"""Reads: on connections of their own, which see what was committed and never wait for a writer."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
import time
from collections.abc import AsyncGenerator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import anyio.to_thread

from .faults import fault_of, is_busy
from .schema import connect

Rows: TypeAlias = "list[tuple[Any, ...]]"
PAGE = 500  # rows that are read in one step
_PAUSE = 0.005  # seconds


class Reader:
    """Two connections: one for single records, in the task itself, one for what takes longer, in a thread."""

    def __init__(self, path: Path, patience: float) -> None:
        self._patience = patience
        self._quick = _Connection(path)
        self._slow = _Connection(path)

    async def rows(self, sql: str, *values: object) -> Rows:
        """What a short query finds, at once."""
        try:
            return self._quick.rows(sql, values)
        except sqlite3.Error as error:
            if not is_busy(error):
                raise fault_of(error) from error
        return await self.scan(sql, *values)

    async def scan(self, sql: str, *values: object) -> Rows:
        """What a query finds that may take longer; other tasks run meanwhile."""
        return await anyio.to_thread.run_sync(partial(self._patiently, sql, values))

    async def pages(self, columns: str, where: str, *values: object) -> AsyncGenerator[Rows, None]:
        """These columns of all sessions for which `where` holds, in the order of their rows, page by page.

        One that comes or goes meanwhile may be missing.
        """
        last = -1
        sql = f"SELECT {columns}, rowid FROM session WHERE rowid > ? AND {where} ORDER BY rowid LIMIT {PAGE}"  # noqa: S608
        while True:
            rows = await self.scan(sql, last, *values)
            if rows:
                yield rows
            if len(rows) < PAGE:
                return
            last = rows[-1][-1]

    def close(self) -> None:
        """Close the connections."""
        self._quick.close()
        self._slow.close()

    def pause(self, seconds: float) -> bool:
        """Close the connections and read nothing; False where a query is under way for longer than that."""
        if not self._quick.pause(seconds):
            return False
        if not self._slow.pause(seconds):
            self._quick.resume()
            return False
        return True

    def resume(self) -> None:
        """Open them again after `pause`."""
        self._quick.resume()
        self._slow.resume()

    def _patiently(self, sql: str, values: Sequence[object]) -> Rows:
        ends = time.monotonic() + self._patience
        while True:
            try:
                return self._slow.rows(sql, values)
            except sqlite3.Error as error:
                if not is_busy(error) or time.monotonic() > ends:
                    raise fault_of(error) from error
            time.sleep(_PAUSE)


class _Connection:
    """A connection that is used by one thread at a time, and has no query open between two uses."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._open()

    def _open(self) -> None:
        self._db = connect(self._path)
        self._db.execute("PRAGMA query_only = 1")

    def rows(self, sql: str, values: Sequence[object]) -> Rows:
        with self._lock:
            return self._db.execute(sql, values).fetchall()

    def close(self) -> None:
        with self._lock:
            self._db.close()

    def pause(self, seconds: float) -> bool:
        if not self._lock.acquire(timeout=seconds):
            return False
        self._db.close()
        return True

    def resume(self) -> None:
        with contextlib.suppress(
            sqlite3.Error
        ):  # the file is gone: each query says so, and the writer sees it
            self._open()
        self._lock.release()
