"""The thread that writes. It takes all calls that wait into one transaction: one fsync serves them all."""

from __future__ import annotations

import contextlib
import queue
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from ...errors import SessionStoreError
from ..answers import Answer, deliver
from ..checkout import Checkout
from . import housekeeping, locks
from .faults import CLOSED, fault_of, is_busy, is_full
from .gate import Gate
from .place import Place
from .transaction import Desk, Others, Transaction

Work = Callable[[Transaction], Any]

MOST_WAITING = 10_000  # calls
_MOST = 256  # calls in one transaction
_PAUSE = 0.005  # seconds until a database that a foreign program has locked is asked again


class Call:
    """Work for a transaction, and where its result goes; nobody waits for it where there is no answer.

    What is `durable` survives a power cut once it is answered.
    """

    __slots__ = ("answer", "dropped", "durable", "work")

    def __init__(self, work: Work, durable: bool, answer: Answer | None = None) -> None:
        self.work = work
        self.durable = durable
        self.answer = answer
        self.dropped = False  # nobody waits for it any more, and it has not begun


class Fault:
    """A result that is an error, to be raised where the call came from."""

    __slots__ = ("error",)

    def __init__(self, error: Exception) -> None:
        self.error = error


class Writer:
    """Carries out calls, in the order in which they came, in few transactions.

    Who has the turn uses the connection: the thread, or a task whose call is the only one (`run_alone`).
    `clock` is the store's, `moments` that of leases. `full` says whether a durable change survives a power
    cut, and `patience` for how many seconds a foreign program may lock the database. `tell` sends a message
    to another process, `on_ended` hears which sessions have ended, and `watch` is called when somebody begins
    to wait here.
    """

    def __init__(
        self,
        db: sqlite3.Connection,
        gate: Gate,
        place: Place,
        others: Others,
        *,
        clock: Callable[[], float],
        moments: Callable[[], float],
        full: bool,
        patience: float,
        tell: Callable[[str, str], None],
        on_ended: Callable[[list[str]], None],
        watch: Callable[[], None],
    ) -> None:
        self.desk = Desk()
        self.lost = False  # the file was deleted or replaced
        self._db = db
        self._gate = gate
        self._place = place
        self._others = others
        self._clock = clock
        self._moments = moments
        self._full = full
        self._is_full: bool | None = None  # what the connection is set to
        self._patience = patience
        self._tell, self._on_ended, self._watch = tell, on_ended, watch
        self._waits = False
        self._calls: deque[Call] = deque()
        self._results: list[tuple[Answer, object]] = []  # committed, and not told yet
        self._bell: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._rung = False
        self._turn = threading.Lock()
        self._closing = self._closed = False
        self._tidies_at = time.monotonic() + housekeeping.TIDY
        self._sleeps_until = self._tidies_at
        self._knows_due = self.desk.due  # when it wakes for a lease
        self._log = housekeeping.Log()
        self._thread = threading.Thread(target=self._serve, name="asgi_sessions-sqlite-writer", daemon=True)
        self._thread.start()

    # -- for any thread -----------------------------------------------------------------------------------

    def put(self, call: Call) -> None:
        """Carry a call out soon."""
        self._calls.append(call)
        if not self._rung:
            self._rung = True
            self._bell.put(None)
        if self._closed:
            self._refuse()

    @property
    def is_overrun(self) -> bool:
        """Whether so many calls wait that one more would only take memory."""
        return len(self._calls) >= MOST_WAITING

    def run_alone(self, work: Work) -> Any:
        """The result of a call that is not synced, or `NotImplemented` where others are at work.

        Nothing is waited for, not even another process.
        """
        if self._calls or len(self.desk.leases) > 1 or not self._turn.acquire(blocking=False):
            return NotImplemented
        try:
            if self._calls or self._closing or not self._gate.try_enter():
                return NotImplemented
            try:
                return self._attempt(work)
            finally:
                self._gate.leave()
        finally:
            self._turn.release()

    def close(self) -> bool:
        """Carry out what waits, and stop; False where a call hangs and goes on hanging."""
        self._closing = True
        self._bell.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join(self._patience + 1)
        return self._closed

    # -- around a fork ------------------------------------------------------------------------------------

    def pause(self, seconds: float) -> bool:
        """Leave the connection alone; False where a call is under way for longer than that."""
        return self._turn.acquire(timeout=seconds)

    def resume(self, db: sqlite3.Connection | None) -> None:
        """Go on after `pause`, on this connection; None where the file is gone."""
        self.lost = self.lost or db is None
        self._db = db or self._db
        self._is_full = None
        self._turn.release()

    # -- the thread ---------------------------------------------------------------------------------------

    def _serve(self) -> None:
        while not self._closing:
            with contextlib.suppress(queue.Empty):
                self._bell.get(timeout=max(self._sleeps_until - time.monotonic(), 0.001))
            self._rung = False
            with self._turn:
                self._round()
        self._closed = True
        self._refuse()

    def _round(self) -> None:
        """Everything that waits, and what is due beside it."""
        while True:
            calls = [self._calls.popleft() for _ in range(min(len(self._calls), _MOST))]
            due = self._next_due() <= time.monotonic() or self._log.is_long
            if calls or due:
                self._behind_the_gate(calls, due)
            if not self._calls:
                break
        self._knows_due, self._sleeps_until = self.desk.due, self._next_due()

    def _next_due(self) -> float:
        """When a lease is to be renewed, or what has expired to be dropped, by the monotonic clock."""
        return min(self.desk.due - self._moments() + time.monotonic(), self._tidies_at)

    def _behind_the_gate(self, calls: list[Call], due: bool) -> None:
        try:
            with self._gate:
                self._carry_out(calls)
                if due:
                    self._keep_house()
        except Exception as error:  # of the gate's file
            _answer_all(calls, error)
        self._hand_out()  # the next process writes meanwhile

    def _carry_out(self, calls: list[Call]) -> None:
        """First what need not be synced: its callers go on while the disk works for the others."""
        calls = [call for call in calls if not call.dropped]
        if not self._full:
            return self._transact(calls, full=False)
        self._transact([call for call in calls if not call.durable], full=False)
        return self._transact([call for call in calls if call.durable], full=True)

    def _transact(self, calls: list[Call], *, full: bool) -> None:
        if not calls:
            return
        done: list[tuple[Answer, object]] = []
        tx = self._transaction()
        try:
            self._begin(full)
            for call in calls:
                result = call.work(tx)
                if call.answer is not None:
                    done.append((call.answer, result))
            if full:
                self._hand_out()
            self._db.execute("COMMIT")
        except Exception as error:
            self._roll_back(tx)
            if self._log.calls and is_full(error):
                self._fold()
                self._transact(calls, full=full)
            elif len(calls) > 1 and not self.lost:
                for call in calls:
                    self._transact([call], full=full)
            else:
                _answer_all(calls, error)
            return
        self._log.calls += len(calls)
        self._finish(tx, done)

    def _attempt(self, work: Work) -> Any:
        """As `_transact`, for one call in its own task, which gives up where somebody is in the way."""
        tx = self._transaction()
        try:
            self._prepare(full=False)
            self._db.execute("BEGIN IMMEDIATE")
            self._place.check_same()
            result = work(tx)
            self._db.execute("COMMIT")
        except BaseException as error:
            self._roll_back(tx)
            if not isinstance(error, Exception):  # Ctrl-C, in the main thread
                raise
            return NotImplemented  # the thread tries again, and says what is wrong
        self._log.calls += 1
        self._finish(tx, [])
        self._hand_out()
        if self._log.is_long or self.desk.due < self._knows_due:
            self._knows_due, self._sleeps_until = self.desk.due, 0.0
            self._bell.put(None)
        return result

    def _finish(self, tx: Transaction, done: list[tuple[Answer, object]]) -> None:
        """Note what was committed, to be told to those who wait here, and tell the other processes."""
        for process, session_id in tx.told:
            self._tell(process, session_id)
        if tx.ended:
            self._on_ended(tx.ended)
        self._results += done
        self._results += tx.settled
        if bool(self.desk.waiting) is not self._waits:
            self._waits = not self._waits
            if self._waits:
                self._watch()

    def _hand_out(self) -> None:
        """Tell who waits here what was committed; locks that come too late, as event loops have ended, go."""
        if not self._results:
            return
        results, self._results = self._results, []
        for value in deliver(results):
            if isinstance(value, Checkout) and value.token is not None:
                work = partial(locks.release, session_id=value.session_id, token=value.token)
                self.put(Call(work, False))

    # -- one transaction ----------------------------------------------------------------------------------

    def _transaction(self) -> Transaction:
        return Transaction(self._db, self._clock(), self._moments(), self.desk, self._others)

    def _prepare(self, full: bool) -> None:
        """Set whether the next commit is synced; it cannot be set within a transaction."""
        if full is not self._is_full:
            self._db.execute(f"PRAGMA synchronous = {'FULL' if full else 'NORMAL'}")
            self._is_full = full

    def _begin(self, full: bool) -> None:
        """Begin a transaction, after a foreign program that has the database locked."""
        self._prepare(full)
        ends = time.monotonic() + self._patience
        while True:
            try:
                self._db.execute("BEGIN IMMEDIATE")
                break
            except sqlite3.OperationalError as error:
                if not is_busy(error) or time.monotonic() > ends or self._closing:
                    raise
            time.sleep(_PAUSE)
        try:
            self._place.check_same()
        except SessionStoreError:
            self.lost = True
            raise

    def _roll_back(self, tx: Transaction) -> None:
        for step in reversed(tx.undo):
            step()
        with contextlib.suppress(sqlite3.Error):
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")

    def _keep_house(self) -> None:
        """Each step is tried again later where it fails."""
        moment = self._moments()
        if moment >= self.desk.due:
            self._transact([Call(housekeeping.renew_due, False)], full=False)
            self.desk.due = max(self.desk.due, moment + _PAUSE)
        if time.monotonic() >= self._tidies_at:
            tidied: list[housekeeping.Tidied] = []
            self._transact([Call(lambda tx: tidied.append(housekeeping.tidy(tx)), False)], full=False)
            more = bool(tidied) and tidied[-1].more
            self._tidies_at = time.monotonic() + (housekeeping.SOON if more else housekeeping.TIDY)
        if self._log.is_long:
            self._fold()

    def _fold(self) -> None:
        """Fold the log in. It begins anew then, and takes no more room until it is as long again."""
        with contextlib.suppress(sqlite3.Error):
            self._log.fold(self._db)

    def _refuse(self) -> None:
        """Answer what came too late."""
        with contextlib.suppress(IndexError):
            while True:
                _answer_all([self._calls.popleft()], SessionStoreError(CLOSED))


def _answer_all(calls: Iterable[Call], error: Exception) -> None:
    deliver([(call.answer, Fault(fault_of(error))) for call in calls if call.answer is not None])
