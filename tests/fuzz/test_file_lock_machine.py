"""The lock in a file, in any order of events: taken, lost, handed over, abandoned, taken back, killed.

A process here is what the writer of one works with: a connection, an advisory lock by which the others see
that it lives, and what it knows of its own. Everything happens in one thread, each step in a transaction, so
hypothesis decides about every order; leases end by a clock that the rules move. Messages between processes
arrive, or are lost, as a rule says.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from asgi_sessions import SessionData
from asgi_sessions.record.codec import encode_checked
from asgi_sessions.stores.answers import Answer
from asgi_sessions.stores.checkout import Checkout, LockPolicy, Missing, Outcome
from asgi_sessions.stores.sqlite import housekeeping, locks, operations
from asgi_sessions.stores.sqlite.claims import claim_of, record_of
from asgi_sessions.stores.sqlite.gate import Presence
from asgi_sessions.stores.sqlite.place import Place
from asgi_sessions.stores.sqlite.schema import connect, prepare
from asgi_sessions.stores.sqlite.transaction import Desk, Standing, Transaction, Waiter
from asgi_sessions.stores.value import new_version
from fuzz import effort, explore

LEASE = 30.0
POLICY = LockPolicy(timeout=LEASE, wait=60, max_hold=1e9)
which = st.integers(0, 11)


def record(log: list[int]) -> bytes:
    return encode_checked(SessionData(session_id="s", metadata={"log": log}))


class Process:
    """One process that has the file open."""

    def __init__(self, place: Place) -> None:
        self.db = connect(place.path)
        self.presence = Presence(place.folder)
        self.desk = Desk()
        self.alive = True

    def die(self) -> None:
        """As by SIGKILL: the system lets its locks on files go, and nothing else happens."""
        self.presence.abandon()
        self.db.close()
        self.alive = False


@dataclass(eq=False)
class Contender:
    """A request that wants the session; `number` in the order of their beginnings."""

    process: Process
    number: int
    waiter: Waiter
    grip: Checkout | None = None
    over: bool = False

    @property
    def waits(self) -> bool:
        return self.process.alive and not self.over and self.grip is None

    @property
    def holds(self) -> bool:
        return self.process.alive and not self.over and self.grip is not None


@dataclass
class Told:
    """A message on its way."""

    process: str
    session_id: str = field(repr=False)


class FileLockMachine(RuleBasedStateMachine):
    """Two to four processes and whoever among them wants the session."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = TemporaryDirectory()
        self.place = Place(Path(self.folder.name) / "sessions.db")
        self.place.folder.mkdir()
        prepare(self.place, 0)
        self.loop = asyncio.new_event_loop()
        self.now = 1000.0
        self.processes: list[Process] = []
        self.contenders: list[Contender] = []
        self.messages: list[Told] = []
        self.log: list[int] = []
        self.exists = False
        self.served: list[int] = []
        self.orderly = True  # no lease has ended, nobody was killed: first come, first served

    @initialize(number=st.integers(2, 4))
    def begin(self, number: int) -> None:
        """The processes start; one holds and one waits."""
        self.processes = [Process(self.place) for _ in range(number)]
        self.write(True)
        for each in (0, 1):
            self.want(each)

    # -- the machinery -------------------------------------------------------------------------------

    def transact(self, process: Process, work: Callable[[Transaction], Any], *, fails: bool = False) -> Any:
        """As a writer does it: all or nothing, and afterwards what is to be told."""
        tx = Transaction(process.db, self.now, self.now, process.desk, process.presence)
        process.db.execute("BEGIN IMMEDIATE")
        result = work(tx)
        if fails:
            for step in reversed(tx.undo):
                step()
            process.db.execute("ROLLBACK")
            return None
        process.db.execute("COMMIT")
        for answer, value in tx.settled:
            answer.settle(value)
        self.messages += [Told(*each) for each in tx.told]
        self.look()
        return result

    def look(self) -> None:
        """Take note of who was answered: those who waited, in the order in which they had asked."""
        for each in self.contenders:
            answer = each.waiter.granted
            if each.waits and answer is not None and answer.is_set:
                self.take(each, answer.value)

    def take(self, contender: Contender, found: object) -> None:
        if isinstance(found, Missing):
            assert not self.exists, "it was told that there is no session"
            contender.over = True
            return
        assert isinstance(found, Checkout)
        contender.grip = found
        self.served.append(contender.number)
        earlier = [each for each in self.contenders if each.waits and each.number < contender.number]
        assert not (self.orderly and earlier), "somebody was served before those who came earlier"

    def answer(self) -> Answer:
        async def made() -> Answer:
            return Answer()

        return self.loop.run_until_complete(made())

    def head(self) -> str | None:
        """Whose row is the first: who holds the lock, or held it until the process died, for instance."""
        return self.first_row()[0]

    def first_row(self) -> tuple[str | None, str, float]:
        """Its token, process and lease."""
        with contextlib.closing(connect(self.place.path)) as db:
            row = db.execute("SELECT token, process, until FROM lock WHERE id = 's' ORDER BY pos").fetchone()
        return (None, "", 0.0) if row is None else tuple(row)

    def handed_on(self) -> bool:
        """Whether the lock is free, or has gone to somebody who lives, with a lease of their own."""
        token, name, until = self.first_row()
        living = {process.presence.name for process in self.processes if process.alive}
        return token is None or (name in living and until > self.now)

    def live(self, number: int) -> Process | None:
        alive = [process for process in self.processes if process.alive]
        return alive[number % len(alive)] if alive else None

    def one(self, number: int, *, waits: bool = False, holds: bool = False) -> Contender | None:
        fits = [each for each in self.contenders if (waits and each.waits) or (holds and each.holds)]
        return fits[number % len(fits)] if fits else None

    # -- rules ---------------------------------------------------------------------------------------

    @rule(number=which, fails=st.booleans())
    def want(self, number: int, fails: bool = False) -> None:
        """Somebody wants the session: has it if it is free, else a place in the queue."""
        process = self.live(number)
        if process is not None and len(self.contenders) <= 12:
            self.enter(process, fails=fails)

    def enter(self, process: Process, *, fails: bool = False) -> None:
        free = self.head() is None
        waiter = Waiter("s", secrets.token_hex(16), POLICY, None, self.now, self.answer())
        contender = Contender(process, len(self.contenders), waiter)
        found = self.transact(process, lambda tx: operations.check_out(tx, waiter, False), fails=fails)
        if fails:
            return
        self.contenders.append(contender)
        if found is Standing.QUEUED:
            assert not free, "it was free"
        else:
            self.take(contender, found)
        self.look()

    @rule(number=which, fails=st.booleans())
    def let_go(self, number: int, fails: bool) -> None:
        """A holder lets go. Where that fails, it is tried again."""
        contender = self.one(number, holds=True)
        if contender is None:
            return
        token = contender.waiter.token
        owned = self.head() == token
        for failing in (True, False) if fails else (False,):
            contender.over = not failing
            self.transact(contender.process, lambda tx: locks.release(tx, "s", token), fails=failing)
        assert self.head() != token
        assert not owned or self.handed_on(), "it was let go, and nobody got it"

    @rule(number=which, release=st.booleans(), fails=st.booleans())
    def commit(self, number: int, release: bool, fails: bool) -> None:
        """Stored exactly if nobody else has the lock, and nobody wrote since."""
        contender = self.one(number, holds=True)
        if contender is None or contender.grip is None:
            return
        grip, entry = contender.grip, len(self.log) + 1
        new, version, claim = record([*self.log, entry]), new_version(), claim_of(grip)
        with contextlib.closing(connect(self.place.path)) as db:
            row = db.execute("SELECT version FROM session WHERE id = 's'").fetchone()
        owned = self.head() == grip.token
        accepted = self.head() in (None, grip.token) and row == (grip.version,)
        contender.over = release and not fails
        outcome = self.transact(
            contender.process,
            lambda tx: operations.write_back(tx, claim, new, version, None, release),
            fails=fails,
        )
        if not fails:
            assert (outcome is Outcome.STORED) is accepted, outcome
            assert not (release and owned) or self.handed_on(), "it was let go, and nobody got it"
        if outcome is Outcome.STORED:
            grip.record, grip.version = new, version
            self.log.append(entry)

    @rule(number=which)
    def leave(self, number: int) -> None:
        """A waiter gives up, or is cancelled."""
        contender = self.one(number, waits=True)
        if contender is not None:
            contender.over = True
            token = contender.waiter.token
            self.transact(contender.process, lambda tx: locks.release(tx, "s", token))

    @precondition(lambda self: self.messages)
    @rule(number=which, arrives=st.booleans())
    def hear(self, number: int, arrives: bool) -> None:
        """A message arrives, or is lost."""
        told = self.messages.pop(number % len(self.messages))
        for process in self.processes:
            if arrives and process.alive and process.presence.name == told.process:
                self.transact(process, lambda tx: locks.look(tx, told.session_id))

    @rule(number=which, fails=st.booleans())
    def poll(self, number: int, fails: bool) -> None:
        """A process looks after its waiters, as it does 20 times a second."""
        process = self.live(number)
        if process is not None and process.desk.waiting:
            self.transact(process, lambda tx: locks.look(tx, "s"), fails=fails)

    @rule(frozen=which, seconds=st.sampled_from([5.0, 11.0, 31.0]), freezes=st.booleans())
    def time_passes(self, frozen: int, seconds: float, freezes: bool) -> None:
        """All renew their leases meanwhile, but for a process that is frozen."""
        asleep = self.live(frozen) if freezes else None
        self.orderly = self.orderly and (asleep is None or seconds < LEASE / 3)
        for _ in range(int(seconds)):
            self.now += 1
            for process in self.processes:
                if process.alive and process is not asleep and self.now >= process.desk.due:
                    self.transact(process, housekeeping.renew_due)

    @precondition(lambda self: sum(process.alive for process in self.processes) > 1)
    @rule(number=which)
    def die(self, number: int) -> None:
        """SIGKILL."""
        process = self.live(number)
        if process is not None:
            process.die()
            self.orderly = False

    @rule(gone=st.booleans())
    def write(self, gone: bool) -> None:
        """`delete` and `set` wait for nobody; who waits for a session that is gone is told so."""
        process = self.live(0)
        if process is None:
            return
        if gone and self.exists:
            self.exists = False
            self.transact(process, lambda tx: operations.delete(tx, ["s"]))
            assert self.head() is None
            for each in self.processes:  # the news arrives
                if each.alive:
                    self.transact(each, lambda tx: locks.look(tx, "s"))
            assert not any(each.waits for each in self.contenders), "it waits for nothing"
            self.log = []
        data = SessionData(session_id="s", metadata={"log": self.log})
        self.transact(
            process,
            lambda tx: operations.put(tx, record_of(data, encode_checked(data), None), None, 1e12, True),
        )
        self.exists = True

    # -- what always holds -----------------------------------------------------------------------------

    @invariant()
    def one_holder(self) -> None:
        """The head of the queue is the one holder; who has lost the lock never has it again."""
        held = [each for each in self.contenders if each.holds and each.waiter.token == self.head()]
        assert len(held) <= 1
        assert len(set(self.served)) == len(self.served), "somebody was served twice"

    @invariant()
    def nobody_takes_what_another_has(self) -> None:
        """While nothing went wrong, there is one who holds, at most."""
        holding = [each for each in self.contenders if each.holds]
        assert not self.orderly or not self.exists or len(holding) <= 1 or self._was_deleted(holding)

    def _was_deleted(self, holding: list[Contender]) -> bool:
        """All but the last held a session that was deleted meanwhile."""
        return all(each.waiter.token != self.head() for each in holding[:-1])

    @invariant()
    def the_record_is_what_was_acknowledged(self) -> None:
        """No acknowledged change is lost, none that was refused is there."""
        if self.exists:
            with contextlib.closing(connect(self.place.path)) as db:
                (found,) = db.execute("SELECT record FROM session WHERE id = 's'").fetchone()
            assert SessionData.from_json(found.decode()).metadata["log"] == self.log

    def teardown(self) -> None:
        """Whoever still waits is served, and nothing is left."""
        try:
            self.serve_all()
            self.leaves_nothing()
        finally:
            for process in self.processes:
                if process.alive:
                    process.die()
            self.loop.close()
            self.folder.cleanup()

    def serve_all(self) -> None:
        for _ in range(len(self.contenders) + 1):
            for contender in self.contenders:
                if contender.holds:
                    contender.over = True
                    release = partial(locks.release, session_id="s", token=contender.waiter.token)
                    self.transact(contender.process, release)
            for process in self.processes:
                if process.alive and process.desk.waiting:
                    self.transact(process, lambda tx: locks.look(tx, "s"))
        assert not any(each.waits or each.holds for each in self.contenders), "somebody was never served"

    def leaves_nothing(self) -> None:
        """Nothing is held or waited for, but by the dead, whose rows fall to the next who comes."""
        for process in self.processes:
            if process.alive:
                self.enter(process)
        self.serve_all()
        with contextlib.closing(sqlite3.connect(self.place.path)) as db:
            assert db.execute("SELECT count(*) FROM lock").fetchone() == (0,)
            assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        for process in self.processes:
            if process.alive:
                assert (process.desk.waiting, process.desk.leases) == ({}, {})


def test_the_lock_in_a_file_keeps_its_promises() -> None:
    """One holder, first come first served, nothing lost and nothing left, whatever happens."""
    explore(FileLockMachine, effort(60, steps=40))
