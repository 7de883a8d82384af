"""Everything that one process has open of one database, and the way in for its tasks."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from ...errors import SessionStoreError
from ..answers import PENDING, Answer
from . import locks
from .ends import Ends
from .faults import BUSY, CLOSED, FORKED, fault_of
from .gate import Gate, Presence
from .place import Place
from .reader import Reader
from .schema import connect, prepare
from .transaction import Desk, Transaction
from .waking import Waking
from .watch import Watch
from .writer import Call, Fault, Work, Writer

_ALONE = 0.001  # seconds
_GRACE = 1.0  # seconds beyond the patience with a foreign program, for the others of this package


@dataclass(frozen=True, slots=True)
class Settings:
    """How a store writes: see `SQLiteSessionStore`."""

    synchronous: str
    busy_timeout: float
    clock: Callable[[], float]
    moments: Callable[[], float] = time.monotonic  # the clock of leases; never goes back


class Engine:
    """A database that is open in this process. Made in any thread; blocks while it opens and closes.

    `SessionStoreError` where the database cannot be used. It does not outlive a fork: the child opens anew.
    """

    def __init__(self, place: Place, settings: Settings) -> None:
        self.closed = False
        self._latest = "", 0.0  # whose work was asked for last, and when
        self._settings = settings
        self._place = place
        self._full = settings.synchronous == "full"
        place.check_ground()
        if any(other._place.path == place.path for other in _abandoned):
            raise SessionStoreError(FORKED)
        with contextlib.ExitStack() as opened:
            try:
                self._open(opened)
            except (OSError, sqlite3.Error) as error:
                raise fault_of(error) from error
            self._opened = opened.pop_all()

    def _open(self, opened: contextlib.ExitStack) -> None:
        place = self._place
        place.folder.mkdir(mode=0o700, exist_ok=True)
        self._gate = Gate(place.folder)
        opened.callback(self._gate.close)
        self._gate.enter_within(self._settings.busy_timeout)
        try:
            with _connecting:
                self._connect(place, opened)
                _engines.add(self)
        finally:
            self._gate.leave()

    def _connect(self, place: Place, opened: contextlib.ExitStack) -> None:
        patience = self._settings.busy_timeout
        prepare(place, patience)
        self._presence = Presence(place.folder)
        opened.callback(self._presence.close)
        self._presence.sweep()
        self._waking = Waking(place.folder, self._presence.name)
        opened.callback(self._waking.close)
        self._db = connect(place.path)
        opened.callback(lambda: self._db.close())
        place.identify()
        with contextlib.closing(connect(place.path, patience)) as db:
            self._bury(db)
        self.reader = Reader(place.path, patience)
        opened.callback(self.reader.close)
        ends = Ends(self.reader, self._waking, self._settings.clock)
        self.endings = ends.endings
        self.writer = Writer(
            self._db, self._gate, place, self._presence,
            clock=self._settings.clock, moments=self._settings.moments,
            full=self._full, patience=patience,
            tell=self._waking.tell, on_ended=ends.tell, watch=self._waking.ring,
        )  # fmt: skip
        self._watch = Watch(self._waking, self.writer, self.endings)

    @property
    def is_usable(self) -> bool:
        """Whether calls can succeed: it is open, in this process, and the file is still there."""
        return not self.closed and not self.writer.lost

    def require_room(self) -> None:
        """`SessionStoreError` where nobody would get to what is asked next."""
        if self.writer.is_overrun:
            raise SessionStoreError(BUSY)

    async def perform(
        self,
        work: Work,
        *,
        durable: bool,
        whose: str | None = None,
        note: Callable[[Any], object] = lambda result: None,
    ) -> Any:
        """The result of `work` in a transaction. `SessionStoreError` on a fault, and after a long wait.

        It is not known then whether the work was done. A task that is cancelled waits for what is `durable`,
        and `note` is told the result before the cancellation goes on; anything else is left. Short work on
        one session, `whose` id this is, may run in the task itself.
        """
        if whose is not None and self._is_alone(whose) and not (durable and self._full):
            result = self.writer.run_alone(work)
            if result is not NotImplemented:
                note(result)
                return result
        answer = Answer()
        call = Call(work, durable, answer)
        self.writer.put(call)
        cancelled = None
        try:
            if durable:
                cancelled = await answer.wait_out(self._settings.busy_timeout + _GRACE)
            else:
                await answer.wait(self._settings.busy_timeout + _GRACE)
        finally:
            call.dropped = True
        result = answer.value
        if result is PENDING:
            raise SessionStoreError(BUSY) from cancelled
        if isinstance(result, Fault):
            raise result.error
        note(result)
        if cancelled is not None:
            raise cancelled
        return result

    def _is_alone(self, whose: str) -> bool:
        """Whether no other session has been written a moment ago.

        What a task writes by itself holds up the event loop: of many that are ready, all would wait for all.
        """
        (last, when), now = self._latest, time.monotonic()
        self._latest = whose, now
        return last == whose or now - when > _ALONE

    def send(self, work: Work, *, whose: str, durable: bool = False) -> None:
        """Have work done that nobody waits for, after what was asked for earlier and is as durable."""
        if durable or not self._is_alone(whose) or self.writer.run_alone(work) is NotImplemented:
            self.writer.put(Call(work, durable))

    def release(self, session_id: str, token: str | None, *, durable: bool = False) -> None:
        """Have a lock let go, if there is one. `durable` as that call which may still take it, or need it."""
        if token is not None:
            work = partial(locks.release, session_id=session_id, token=token)
            self.send(work, whose=session_id, durable=durable)

    def close(self) -> None:
        """Let all locks of this process go, and close what is open. Blocks."""
        if self.closed:
            return
        self.closed = True
        self.endings.close(SessionStoreError(CLOSED))
        self.writer.put(Call(_leave, False))
        self._watch.close()
        if not self.writer.close():
            return  # the thread hangs in a call of the system, and uses what is open
        with contextlib.suppress(SessionStoreError):
            self._gate.enter_within(_GRACE)  # the last one to close removes the log
        with _connecting, contextlib.suppress(sqlite3.Error, OSError):
            self._opened.close()
            _engines.discard(self)

    def close_aside(self) -> None:
        """Close from a thread of its own: garbage is found anywhere, also by one that is behind the gate."""
        if threading.main_thread().is_alive():
            threading.Thread(target=self.close, name="asgi_sessions-sqlite-close").start()
        else:  # the interpreter ends
            self.close()

    def pause(self) -> bool:
        """Close the connections before a fork; False where a call uses them and does not end."""
        if not self.writer.pause(_GRACE):
            return False
        if not self.reader.pause(_GRACE):
            self.writer.resume(self._db)
            return False
        self._db.close()
        return True

    def resume(self) -> None:
        """Open them again, in the parent."""
        db = None
        with contextlib.suppress(sqlite3.Error):
            db = self._db = connect(self._place.path)
        self.writer.resume(db)
        self.reader.resume()

    def abandon(self) -> None:
        """In a child that was forked: close what keeps the parent's locks, and use nothing any more."""
        self.closed = True
        self._gate.close()
        self._presence.abandon()
        self._waking.abandon()

    def _bury(self, db: sqlite3.Connection) -> None:
        """Free the locks of processes that have died, so that what they held and waited for is gone."""
        names = [name for (name,) in db.execute("SELECT DISTINCT process FROM lock")]
        dead = [name for name in names if not self._presence.lives(name)]
        if not dead:
            return
        db.execute("BEGIN IMMEDIATE")
        tx = Transaction(db, self._settings.clock(), self._settings.moments(), Desk(), self._presence)
        for name in dead:
            rows = db.execute("DELETE FROM lock WHERE process = ? RETURNING id", (name,)).fetchall()
            for session_id in {row[0] for row in rows}:
                head = locks.head_of(tx, session_id)
                if head is not None and not head.until:
                    locks.hand_over(tx, session_id)
        db.execute("COMMIT")
        for process, session_id in tx.told:
            self._waking.tell(process, session_id)


def _leave(tx: Transaction) -> None:
    """Send away who waits in this process, then let go what it holds, for it ends."""
    for waiter in [waiter for waiting in tx.desk.waiting.values() for waiter in waiting.values()]:
        tx.settle(waiter, Fault(SessionStoreError(CLOSED)))
        locks.release(tx, waiter.session_id, waiter.token)
    rows = tx.db.execute("SELECT id, token FROM lock WHERE process = ?", (tx.others.name,)).fetchall()
    for session_id, token in rows:
        locks.release(tx, session_id, token)


# SQLite's locks belong to a process. A child does not have them, but what it inherits of SQLite says that it
# has: another process would take the log away while the child writes to it. So no connection is open while a
# process forks.
_engines: weakref.WeakSet[Engine] = weakref.WeakSet()  # those that have connections
_connecting = threading.Lock()
_paused: list[Engine] = []
_abandoned: list[Engine] = []  # in a child: those whose connections were open all the same


def _before_fork() -> None:
    _connecting.acquire()
    _paused[:] = [engine for engine in list(_engines) if engine.pause()]


def _after_in_parent() -> None:
    for engine in _paused:
        engine.resume()
    _paused.clear()
    _connecting.release()


def _after_in_child() -> None:
    for engine in list(_engines):
        if engine not in _paused:
            _abandoned.append(engine)
        engine.abandon()
    _engines.clear()
    _paused.clear()
    _connecting.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_in_parent, after_in_child=_after_in_child)
