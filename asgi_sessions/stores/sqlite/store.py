"""Sessions in a file: they survive restarts, and all processes of a machine share them."""

from __future__ import annotations

import os
import sqlite3
import threading
import time
import weakref
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from contextlib import aclosing, suppress
from functools import partial
from math import inf
from pathlib import Path
from typing import Any, Literal

import anyio.to_thread

from ...errors import SessionStoreError, TooManyWaitersError
from ...record.model import M, SessionData
from ...record.queries import SessionFilter, SessionMetrics
from ...record.values import check_id
from ..answers import Answer
from ..checkout import Checkout, Lifetime, LockPolicy, Missing, Outcome, shorter
from ..contract import SessionStore
from ..running import while_client_stays
from ..tokens import new_token
from ..value import Value, new_version
from . import housekeeping, operations, records, urls
from .claims import as_far_as_known, changed_columns, claim_of, new_of, record_of, route
from .engine import Engine, Settings
from .faults import DELETED, fault_of
from .operations import New
from .place import Place
from .queries import ALIVE, MOST, ids_of
from .schema import OLDEST
from .transaction import Standing, Waiter
from .turns import turn_of

_STORED = Outcome.STORED  # bound once: looking up an Enum's member is slow on Python 3.11
_REFUSED = (Outcome.CONFLICT, Outcome.LOST, Outcome.BUSY)
_QUEUED, _FULL = Standing.QUEUED, Standing.FULL
_AT_ONCE = 100  # records in one step of a batch
_SOME_OF_USER = f"SELECT id FROM session WHERE user_id = ? AND {ALIVE} LIMIT ?"  # noqa: S608  # a constant
_SUCCESSOR = "SELECT leads_to FROM successor WHERE id = ? AND until > ?"
_RECORD = f"SELECT {records.VALUE} FROM session WHERE id = ? AND {ALIVE}"  # noqa: S608  # constants


class SQLiteSessionStore(SessionStore[M]):
    """Sessions in a SQLite database, for any number of processes of one machine. Nothing to install or start.

    `path` is the file, which is made with mode 0600 where it is missing; its folder has to be there, on a
    local disk. `default_ttl` (seconds) is for records that are stored without a ttl. With
    `synchronous="full"` an acknowledged change survives a power cut, with "normal" a crash of the process.
    `busy_timeout` is for how many seconds a call waits where another program has the database locked. `clock`
    gives the seconds since the epoch, by which records expire.

    One object serves any number of event loops and threads, on asyncio and trio, also after a fork.
    `ValueError` for what cannot work; what is wrong with the file is a `SessionStoreError` at its first use.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        default_ttl: float = 3600,
        *,
        synchronous: Literal["full", "normal"] = "full",
        busy_timeout: float = 5.0,
        model: type[M] = SessionData,  # type: ignore[assignment]  # the default of M
        clock: Callable[[], float] = time.time,
        encryption_keys: Sequence[str | bytes] = (),
    ) -> None:
        super().__init__()
        self.encrypt(encryption_keys)
        if not default_ttl > 0:
            raise ValueError("default_ttl is a number of seconds above 0")
        if synchronous not in ("full", "normal"):
            raise ValueError(f'synchronous is "full" or "normal", not {synchronous!r}')
        if not 0 <= busy_timeout < inf:
            raise ValueError("busy_timeout is a number of seconds, 0 or more")
        if sqlite3.sqlite_version_info < OLDEST:
            raise ValueError(f"SQLite {sqlite3.sqlite_version} is too old: 3.35 or newer is needed")
        self.default_ttl = default_ttl
        self.model = model
        self._place = Place(path)
        self._clock = clock
        self._settings = Settings(synchronous, busy_timeout, clock)
        self._engine: Engine | None = None
        self._at_the_end: weakref.finalize[..., Any] = weakref.finalize(
            self, bool
        )  # closes the engine of a store that nobody keeps
        self._opening = threading.Lock()
        self._failure: tuple[float, SessionStoreError] | None = None  # when it could not be opened, and why
        self._pid = os.getpid()

    @classmethod
    def from_url(cls, url: str) -> SQLiteSessionStore:
        """The store of `sqlite:///path`, with the options `synchronous` and `busy_timeout`."""
        path, *options = urls.read(url)
        given = zip(("synchronous", "busy_timeout"), options, strict=True)
        named: dict[str, Any] = {name: value for name, value in given if value is not None}
        return cls(path, **named)

    @property
    def path(self) -> Path:
        """The file, as an absolute path without links."""
        return self._place.path

    def now(self) -> float:
        return self._clock()

    # -- request operations: see RequestOperations ----------------------------------------------------------

    async def checkout(
        self, session_id: str, lock: LockPolicy | None, lifetime: Lifetime | None, *, passive: bool = False
    ) -> Checkout | Missing:
        engine = self._ready() or await self._get()
        if lock is None:
            return await self._load(engine, session_id, lifetime)
        engine.require_room()
        moment = self._settings.moments()
        waiter = Waiter(session_id, new_token().decode(), lock, lifetime, moment, Answer(), route())
        began = time.monotonic()
        try:
            taken = await engine.perform(
                partial(operations.check_out, waiter=waiter, passive=passive), durable=False, whose=session_id
            )
            if taken is _QUEUED:
                taken = await while_client_stays(
                    turn_of(engine.reader, waiter, began, self._settings.moments)
                )
        except BaseException:
            engine.release(session_id, waiter.token)
            raise
        if taken is _FULL:
            raise TooManyWaitersError(lock.max_waiters)
        found: Checkout | Missing = taken
        return found

    async def _load(self, engine: Engine, session_id: str, rule: Lifetime | None) -> Checkout | Missing:
        rows = await engine.reader.rows(_RECORD, session_id, self._clock())
        if rows:
            taken = Value(*rows[0]).checkout(session_id, self._clock(), None)
            if rule is None or shorter(rule, taken) is None:
                return taken
        found: Checkout | Missing = await engine.perform(
            partial(operations.load, session_id=session_id, rule=rule), durable=False, whose=session_id
        )
        return found

    async def keep_alive(self, checkout: Checkout) -> None:
        if checkout.idle is not None:
            engine = self._ready() or await self._get()
            when = self._clock()
            whose = checkout.session_id
            engine.send(partial(records.touch, session_id=whose, when=when), whose=whose)

    async def arrived(self, checkout: Checkout) -> None:
        engine = self._ready() or await self._get()
        whose = checkout.session_id
        work = partial(records.touch, session_id=whose, when=self._clock())
        await engine.perform(work, durable=False, whose=whose)

    async def create(
        self,
        session_id: str,
        record: bytes,
        lifetime: Lifetime,
        lock: LockPolicy | None,
        user: str | None = None,
    ) -> Checkout | None:
        engine = self._ready() or await self._get()
        new = new_of(session_id, record, lifetime, lock, user)
        try:
            created: Checkout | None = await engine.perform(
                partial(operations.create, new=new), durable=True, whose=session_id
            )
        except BaseException:
            engine.send(partial(operations.take_back, new=new), whose=session_id, durable=True)
            raise
        return created

    async def commit(self, checkout: Checkout, record: bytes, *, release: bool) -> Outcome:
        return await self._write(checkout, record, partial(operations.write_back, release=release), release)

    async def commit_unlocked(self, checkout: Checkout, record: bytes) -> Outcome:
        return await self._write(checkout, record, operations.write_unlocked, False)

    async def _write(
        self, checkout: Checkout, record: bytes, write: Callable[..., Outcome], release: bool
    ) -> Outcome:
        engine = self._ready() or await self._get()
        claim, earlier, version = claim_of(checkout), checkout.unsure, new_version()
        columns = changed_columns(checkout, record)
        checkout.unsure = version if earlier is None else f"{earlier} {version}"
        work = partial(write, claim=claim, record=record, version=version, columns=columns)
        if release:
            checkout.token = None

        def note(outcome: Outcome) -> None:
            checkout.unsure = earlier
            if outcome is _STORED:
                checkout.record, checkout.version, checkout.unsure = record, version, None

        try:
            outcome: Outcome = await engine.perform(work, durable=True, whose=claim.session_id, note=note)
        except BaseException:
            if release:
                engine.release(claim.session_id, claim.token, durable=True)
            raise
        return as_far_as_known(outcome, checkout.unsure)

    async def bound(self, checkout: Checkout, lifetime: Lifetime) -> Outcome:
        engine = self._ready() or await self._get()
        claim, earlier, version = claim_of(checkout), checkout.unsure, new_version()
        checkout.unsure = version if earlier is None else f"{earlier} {version}"

        def note(found: Checkout | Outcome) -> None:
            checkout.unsure = earlier
            if isinstance(found, Checkout):
                checkout.is_now(found)
                checkout.unsure = None

        work = partial(operations.set_bounds, claim=claim, lifetime=lifetime, version=version)
        found: Checkout | Outcome = await engine.perform(
            work, durable=True, whose=claim.session_id, note=note
        )
        return _STORED if isinstance(found, Checkout) else as_far_as_known(found, checkout.unsure)

    async def move(
        self,
        checkout: Checkout,
        session_id: str,
        record: bytes,
        *,
        lifetime: Lifetime | None,
        lock: LockPolicy | None,
        was: str | None,
        user: str | None,
        leads: bool = False,
    ) -> Outcome:
        """Store the record under a new id and retire the checked-out one, both in one step."""
        engine = self._ready() or await self._get()
        claim, new = claim_of(checkout), new_of(session_id, record, lifetime, lock, user)
        checkout.token = None

        def note(moved: Checkout | Outcome) -> None:
            checkout.successor = moved if isinstance(moved, Checkout) else None

        try:
            moved = await engine.perform(
                partial(operations.move, claim=claim, new=new, leads=leads),
                durable=True,
                whose=claim.session_id,
                note=note,
            )
        except BaseException:
            engine.release(claim.session_id, claim.token, durable=True)
            if new.owner is not None and checkout.successor is None:
                engine.release(session_id, new.owner.token, durable=True)
            raise
        return _STORED if isinstance(moved, Checkout) else as_far_as_known(moved, checkout.unsure)

    async def successor_of(self, session_id: str) -> str | None:
        engine = self._ready() or await self._get()
        rows = await engine.reader.rows(_SUCCESSOR, session_id, self._clock())
        return rows[0][0] if rows else None

    async def discard(self, checkout: Checkout) -> Outcome:
        engine = self._ready() or await self._get()
        claim = claim_of(checkout)
        checkout.token = None
        try:
            outcome = await engine.perform(
                partial(operations.discard, claim=claim), durable=True, whose=claim.session_id
            )
        except BaseException:
            engine.release(claim.session_id, claim.token, durable=True)
            raise
        return as_far_as_known(outcome, checkout.unsure)

    async def release(self, checkout: Checkout) -> None:
        if checkout.token is not None:
            token, checkout.token = checkout.token, None
            engine = self._ready() or await self._get()
            engine.release(checkout.session_id, token)

    async def renew(self, checkouts: Sequence[Checkout]) -> list[bool]:
        """Prolong the leases now; False for each that was lost. The writer does so by itself."""
        engine = self._ready() or await self._get()
        claims = [claim_of(checkout) for checkout in checkouts]
        kept: list[bool] = await engine.perform(partial(operations.renew, claims=claims), durable=False)
        return kept

    async def until_ended(self, session_id: str) -> None:
        """See `SessionStore.until_ended`; all processes are told at once."""
        check_id(session_id)
        engine = self._ready() or await self._get()
        await engine.endings.wait(session_id)

    # -- records --------------------------------------------------------------------------------------------

    async def get(self, session_id: str) -> M | None:
        """The record, None where it is absent. Takes no lock and does not count as activity."""
        return (await self.get_batch([session_id]))[session_id]

    async def get_batch(self, session_ids: Iterable[str]) -> dict[str, M | None]:
        """The record of each id, None where it is absent."""
        wanted = list(session_ids)
        for session_id in wanted:
            check_id(session_id)
        found: dict[str, M | None] = dict.fromkeys(wanted)
        for start in range(0, len(wanted), _AT_ONCE):
            for session_id, record in (await self._records(wanted[start : start + _AT_ONCE])).items():
                found[session_id] = self.read(record)
        return found

    async def _records(self, session_ids: Sequence[str]) -> dict[str, bytes]:
        """Those of some records that are not absent, in the order of their ids."""
        engine = self._ready() or await self._get()
        marks = ",".join("?" * len(session_ids))
        sql = f"SELECT id, record FROM session WHERE id IN ({marks}) AND {ALIVE} ORDER BY id"  # noqa: S608  # marks
        read = engine.reader.rows if len(session_ids) == 1 else engine.reader.scan
        return dict(await read(sql, *session_ids, self._clock()))

    async def exists(self, session_id: str) -> bool:
        check_id(session_id)
        engine = self._ready() or await self._get()
        sql = f"SELECT 1 FROM session WHERE id = ? AND {ALIVE}"  # noqa: S608  # a constant
        return bool(await engine.reader.rows(sql, session_id, self._clock()))

    async def set(
        self, session_id: str, data: SessionData, ttl: float | None = None, *, create: bool = True
    ) -> bool:
        self.check(session_id, data, ttl)
        work = partial(
            operations.put,
            new=self._new(data), ttl=ttl, default_ttl=self.default_ttl, allow_new=create,
        )  # fmt: skip
        engine = self._ready() or await self._get()
        stored: bool = await engine.perform(work, durable=True, whose=session_id)
        return stored

    async def set_batch(
        self, records: Mapping[str, SessionData], ttl: float | None = None
    ) -> dict[str, bool]:
        for session_id, data in records.items():
            self.check(session_id, data, ttl)
        all_new = [self._new(data) for data in records.values()]
        engine = self._ready() or await self._get()
        stored: list[bool] = []
        for start in range(0, len(all_new), _AT_ONCE):
            some = all_new[start : start + _AT_ONCE]
            work = partial(operations.put_all, all_new=some, ttl=ttl, default_ttl=self.default_ttl)
            stored += await engine.perform(work, durable=True)
        return dict(zip(records, stored, strict=True))

    async def delete(self, session_id: str) -> bool:
        return (await self.delete_batch([session_id]))[session_id]

    async def delete_batch(self, session_ids: Iterable[str]) -> dict[str, bool]:
        ids = list(dict.fromkeys(session_ids))
        for session_id in ids:
            check_id(session_id)
        engine = self._ready() or await self._get()
        deleted: list[bool] = []
        for start in range(0, len(ids), _AT_ONCE):
            work = partial(operations.delete, session_ids=ids[start : start + _AT_ONCE])
            deleted += await engine.perform(work, durable=True, whose=ids[0] if len(ids) == 1 else None)
        return dict(zip(ids, deleted, strict=True))

    # -- all records: read in a thread, page by page --------------------------------------------------------

    async def iter_active(self) -> AsyncGenerator[str, None]:
        """The ids of the records that are not absent, in any order; new ones may be missing."""
        engine = self._ready() or await self._get()
        async with aclosing(engine.reader.pages("id", ALIVE, self._clock())) as pages:
            async for rows in pages:
                for row in rows:
                    yield row[0]

    async def list_active(self, limit: int | None = None, offset: int = 0) -> list[str]:
        engine = self._ready() or await self._get()
        sql = f"SELECT id FROM session WHERE {ALIVE} ORDER BY id LIMIT ? OFFSET ?"  # noqa: S608  # a constant
        most = MOST if limit is None else min(limit, MOST)
        rows = await engine.reader.scan(sql, self._clock(), most, min(offset, MOST))
        return [row[0] for row in rows]

    async def count_active(self) -> int:
        return await self._count(f"SELECT count(*) FROM session WHERE {ALIVE}", self._clock())  # noqa: S608

    async def _count(self, sql: str, *values: object) -> int:
        engine = self._ready() or await self._get()
        return int((await engine.reader.scan(sql, *values))[0][0])

    def _new(self, data: SessionData) -> New:
        return record_of(data, self.encode(data), self._name_in(data))

    async def find(self, criteria: SessionFilter, limit: int | None = None) -> list[M]:
        """The records that match, at most any `limit` of them, sorted by id. Indexes find them.

        Records that the model cannot read are left out.
        """
        found: list[M] = []
        if limit == 0:
            return found
        engine = self._ready() or await self._get()
        users = [] if criteria.user_id is None else self.names_of(criteria.user_id)
        query, values = ids_of(criteria, users, self._clock())
        ids = sorted([row[0] for row in await engine.reader.scan(query, *values)])
        for start in range(0, len(ids), _AT_ONCE):
            for record in (await self._records(ids[start : start + _AT_ONCE])).values():
                with suppress(SessionStoreError):  # of another model: not for a list
                    data = self.read(record)
                    if criteria.matches(data):
                        found.append(data)
                if len(found) == limit:
                    return found
        return found

    async def cleanup_expired(self) -> int:
        """Drop expired records now, some at a time, and return how many."""
        engine = self._ready() or await self._get()
        dropped, more = 0, True
        while more:
            bite, more = await engine.perform(housekeeping.tidy, durable=False)
            dropped += bite
        return dropped

    async def get_metrics(self) -> SessionMetrics:
        """Figures about the active sessions. Response times are those of this process."""
        engine = self._ready() or await self._get()
        sql = f"SELECT count(*), sum(messages), sum(escalated) FROM session WHERE {ALIVE}"  # noqa: S608
        sessions, messages, escalated = (await engine.reader.scan(sql, self._clock()))[0]
        return SessionMetrics(
            total_messages=messages or 0,
            avg_response_time=self._response_seconds / self._responses if self._responses else 0.0,
            escalation_rate=(escalated or 0) / sessions if sessions else 0.0,
            active_sessions=sessions,
        )

    async def get_stats(self) -> dict[str, Any]:
        """What lies in the database; locks are those of all processes."""
        active = await self.count_active()
        expired = await self._count("SELECT count(*) FROM session WHERE ends <= ?", self._clock())
        held = "SELECT count(DISTINCT id) FROM lock WHERE until > ?"
        return {
            **self._facts(),
            "total_sessions": active + expired,
            "active_sessions": active,
            "expired_sessions": expired,
            "locks_held": await self._count(held, self._settings.moments()),
            "locks_waited_for": await self._count("SELECT count(DISTINCT id) FROM lock WHERE until = 0"),
        }

    async def _iter_stored(self) -> AsyncGenerator[bytes, None]:
        engine = self._ready() or await self._get()
        async with aclosing(engine.reader.pages("record", ALIVE, self._clock())) as pages:
            async for rows in pages:
                for record, _ in rows:
                    yield record

    async def _records_of(self, user: str) -> AsyncGenerator[bytes, None]:
        engine, names = self._ready() or await self._get(), self.names_of(user) if user else []
        marks = ",".join("?" * len(names))
        sql = f"SELECT id FROM session WHERE user_id IN ({marks}) AND {ALIVE}"  # noqa: S608  # marks
        ids = [row[0] for row in await engine.reader.scan(sql, *names, self._clock())]
        for start in range(0, len(ids), _AT_ONCE):
            for record in (await self._records(ids[start : start + _AT_ONCE])).values():
                yield record

    async def _end_all_named(self, names: Sequence[str], keep: str | None) -> int:
        engine = self._ready() or await self._get()
        work = partial(operations.end_all_of, users=names, keep=keep)
        ended: int = await engine.perform(work, durable=True)
        return ended

    async def end_surplus(self, user: str, most: int, keep: str) -> list[str]:
        """In one transaction, which is made only where there are too many."""
        engine = self._ready() or await self._get()
        if len(await engine.reader.rows(_SOME_OF_USER, user, self._clock(), most + 1)) <= most:
            return []
        work = partial(operations.end_surplus, user=user, most=most, keep=keep)
        ended: list[str] = await engine.perform(work, durable=True)
        return ended

    # -- life of the store itself ---------------------------------------------------------------------------

    async def open(self) -> None:
        """Open the database. `SessionStoreError` where it cannot be used."""
        await self._get()

    async def aclose(self) -> None:
        """Let all locks go and close the files. A later call opens them again."""
        engine, self._engine = self._engine, None
        if engine is not None:
            self._at_the_end.detach()
            await anyio.to_thread.run_sync(engine.close)

    def _facts(self) -> dict[str, Any]:
        return {
            "store_type": "sqlite",
            "default_ttl": self.default_ttl,
            "path": str(self.path),
            "synchronous": self._settings.synchronous,
        }

    def _ready(self) -> Engine | None:
        engine = self._engine
        return engine if engine is not None and engine.is_usable else None

    async def _get(self) -> Engine:
        return await anyio.to_thread.run_sync(self._open_now, time.monotonic())

    def _open_now(self, asked: float) -> Engine:
        """All who ask while an attempt is under way share its outcome: nobody waits for more than one."""
        if self._pid != os.getpid():  # the lock may have been held when the process was forked
            self._opening, self._pid = threading.Lock(), os.getpid()
        with self._opening:
            engine = self._engine
            if engine is not None and engine.is_usable:
                return engine
            if self._failure is not None and asked < self._failure[0]:
                raise fault_of(self._failure[1])
            if engine is not None and not engine.closed and not self._place.exists():
                raise SessionStoreError(DELETED)
            if engine is not None:
                engine.close()
            try:
                self._engine = engine = Engine(self._place, self._settings)
            except SessionStoreError as error:
                self._failure = time.monotonic(), fault_of(error)
                raise
            self._failure = None
            self._at_the_end.detach()
            self._at_the_end = weakref.finalize(self, engine.close_aside)
            return engine
