"""What is done in one step: sign-outs among moves, searches by columns, and what is cut off on the way."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, closing
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import anyio
import pytest
from pydantic import field_serializer

from asgi_sessions import SessionData, SessionFilter, SessionStoreError, SQLiteSessionStore
from asgi_sessions.record.codec import encode_checked
from asgi_sessions.record.values import new_session_id
from asgi_sessions.stores.checkout import Checkout, Lifetime, LockPolicy, Missing, Outcome
from asgi_sessions.stores.sqlite import engine as engines
from asgi_sessions.stores.sqlite import operations, queries
from asgi_sessions.stores.sqlite.columns import Columns, columns_of
from asgi_sessions.stores.sqlite.transaction import Transaction
from asgi_sessions.testing.rivals import keep_moving

pytestmark = pytest.mark.anyio

HOUR = Lifetime(absolute=3600)
LOCK = LockPolicy(timeout=60, wait=15, max_hold=60)


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
async def strict(path: Path) -> AsyncIterator[SQLiteSessionStore]:
    """Another release, which cannot read the records."""

    class Strict(SessionData):
        basket: int

    store = SQLiteSessionStore(path, model=Strict)
    yield store
    await store.aclose()


def rows(path: Path, query: str) -> list[Any]:
    with closing(sqlite3.connect(path)) as db:
        return db.execute(query).fetchall()


async def sign_in(store: SQLiteSessionStore, user: str | None = "ada") -> str:
    data = SessionData(session_id=new_session_id(), user_id=user)
    assert await store.create(data.session_id, encode_checked(data), HOUR, None, user)
    return data.session_id


# --- sign-outs ------------------------------------------------------------------------------------


async def test_a_sign_out_ends_what_moves_in_another_process(
    store: SQLiteSessionStore, other: SQLiteSessionStore
) -> None:
    """Each session is ended under the id that it has at that moment."""
    for late in (0.0, 0.003, 0.01):
        sessions = [await sign_in(store) for _ in range(4)]
        async with anyio.create_task_group() as tasks:
            for number, session_id in enumerate(sessions):
                tasks.start_soon(keep_moving, (store, other)[number % 2], session_id, "ada", 100)
            await anyio.sleep(late)
            assert await other.delete_for_user("ada") == 4
        assert await store.count_active() == 0


async def test_a_model_that_cannot_read_ends_all_the_same(
    store: SQLiteSessionStore, strict: SQLiteSessionStore
) -> None:
    """Signing out has to work in a rolling deploy, from either side."""
    await sign_in(store)
    assert await strict.list_for_user("ada") == []
    assert await strict.find(SessionFilter(user_id="ada")) == []
    assert await strict.delete_for_user("ada") == 1
    assert await store.count_active() == 0


async def test_who_is_signed_in_follows_the_record(store: SQLiteSessionStore, path: Path) -> None:
    """By a commit, by `set`, by a move: the column says what the record says, in the same step."""
    session_id = await sign_in(store, None)
    for user in ("ada", "bob", None, "cyd"):
        taken = await store.checkout(session_id, LOCK, None)
        assert isinstance(taken, Checkout)
        record = encode_checked(SessionData(session_id=session_id, user_id=user, message_count=3))
        assert await store.commit(taken, record, release=True) is Outcome.STORED
        assert rows(path, "SELECT user_id, messages FROM session") == [(user, 3)]
    await store.set(session_id, SessionData(session_id=session_id, user_id="dan"))
    assert rows(path, "SELECT user_id, messages FROM session") == [("dan", 0)]
    assert await store.delete_for_user("cyd") == 0
    assert await store.delete_for_user("dan", keep=session_id) == 0
    assert await store.delete_for_user("dan") == 1


async def test_waiters_of_a_user_who_signs_out(store: SQLiteSessionStore, other: SQLiteSessionStore) -> None:
    """They learn at once that there is nothing any more, and the holder's commit is refused."""
    session_id = await sign_in(store)
    taken = await store.checkout(session_id, LOCK, None)
    assert isinstance(taken, Checkout)
    answers: list[object] = []

    async def ask(asked: SQLiteSessionStore) -> None:
        answers.append(await asked.checkout(session_id, LOCK, None))

    async with anyio.create_task_group() as tasks:
        for asked in (store, other):
            tasks.start_soon(ask, asked)
        while (await store._count("SELECT count(*) FROM lock")) < 3:  # noqa: ASYNC110  # another process
            await anyio.sleep(0.01)
        assert await store.delete_for_user("ada") == 1
    assert answers == [Missing.ABSENT] * 2
    assert await store.commit(taken, taken.record, release=True) is Outcome.GONE


# --- searches -------------------------------------------------------------------------------------


async def test_a_search_finds_what_the_filter_matches(store: SQLiteSessionStore) -> None:
    """Each criterion alone and all together, at the edges of the ranges."""
    born = datetime(2024, 5, 1, 12, 0, 0, 123457, timezone.utc)
    records = [
        SessionData(
            session_id=f"s{number:02}",
            user_id=("ada", "bob", None)[number % 3],
            message_count=number,
            escalated=number % 4 == 0,
            created_at=born + timedelta(seconds=number),
            updated_at=born + timedelta(days=1),
        )
        for number in range(24)
    ]
    await store.set_batch({data.session_id: data for data in records})
    for criteria in (
        SessionFilter(),
        SessionFilter(user_id="ada"),
        SessionFilter(escalated=True),
        SessionFilter(escalated=False, max_messages=10),
        SessionFilter(created_after=records[5].created_at, created_before=records[9].created_at),
        SessionFilter(min_messages=7, max_messages=7),
        SessionFilter(min_messages=0),
        SessionFilter(user_id="bob", escalated=False, min_messages=4, created_after=records[6].created_at),
    ):
        expected = [data for data in records if criteria.matches(data)]
        assert await store.find(criteria) == expected
        assert await store.find(criteria, 2) == expected[:2]


@pytest.mark.parametrize(
    ("criteria", "index"),
    [
        (SessionFilter(user_id="ada"), "session_user (user_id=?)"),
        (SessionFilter(escalated=True), "session_escalated"),
        (SessionFilter(created_after=datetime(2024, 5, 1)), "session_created (created>?)"),
        (SessionFilter(min_messages=5), "session_messages (messages>?)"),
    ],
)
async def test_a_search_uses_an_index(store: SQLiteSessionStore, criteria: SessionFilter, index: str) -> None:
    """It does not read all sessions to find some."""
    query, values = queries.ids_of(criteria, ["u"], 0.0)
    engine = await store._get()
    plan = await engine.reader.scan(f"EXPLAIN QUERY PLAN {query}", *values)
    assert index in str(plan)


async def test_columns_of_records_of_any_model(store: SQLiteSessionStore) -> None:
    """Of one with serialisers of its own, whose record has one line, and of one that is no JSON."""

    class Loud(SessionData):
        @field_serializer("message_count")
        def spell(self, count: int) -> str:
            return str(count)

    data = Loud(session_id="s", user_id="ada", message_count=3, escalated=True)
    columns = columns_of(encode_checked(data))
    assert columns[0] == "ada"
    assert columns.created == pytest.approx(data.created_at.timestamp())
    assert tuple(columns_of(b"nonsense")) == columns_of(b"{}") == Columns(None, None, 0, False)


async def test_reading_all_leaves_nothing_open(store: SQLiteSessionStore, path: Path) -> None:
    """Whoever stops in the middle keeps no old pages: sessions may come and go meanwhile."""
    names = [f"s{number:04}" for number in range(1200)]
    await store.set_batch({name: SessionData(session_id=name) for name in names})
    seen = []
    async with aclosing(store.iter_active()) as active:
        async for name in active:
            seen.append(name)
            if name == "s0100":
                await store.delete("s0600")
                await store.set("s1100x", SessionData(session_id="s1100x"))
            if name == "s1150":
                break
    assert seen == [name for name in names[:1151] if name != "s0600"]
    with closing(sqlite3.connect(path)) as db:
        busy, log, folded = db.execute("PRAGMA wal_checkpoint(RESTART)").fetchone()
    assert (busy, log) == (0, folded)


# --- what is cut off ------------------------------------------------------------------------------


CALLS: dict[str, Callable[[SQLiteSessionStore, Checkout], Any]] = {
    "checkout": lambda store, taken: store.checkout("free", LOCK, None),
    "waiting": lambda store, taken: store.checkout("s", LOCK, None),
    "create": lambda store, taken: store.create("new", b'{"n": 1}', HOUR, LOCK),
    "commit": lambda store, taken: store.commit(taken, b'{"n": 1}', release=True),
    "discard": lambda store, taken: store.discard(taken),
    "move": lambda store, taken: store.move(
        taken, "new", b'{"n": 1}', lifetime=None, lock=LOCK, was=None, user=None
    ),
    "release": lambda store, taken: store.release(taken),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("late", [0.0, 0.0005, 0.02])
async def test_a_cancelled_call_leaves_no_lock(
    store: SQLiteSessionStore, other: SQLiteSessionStore, call: str, late: float
) -> None:
    """Wherever it is cut off: each session is whole, under one id, and free."""
    for name in ("s", "free"):
        await store.set(name, SessionData(session_id=name))
    taken = await store.checkout("s", LOCK, None)
    assert isinstance(taken, Checkout)
    done: object = None
    with anyio.move_on_after(late):
        done = await CALLS[call](store, taken)
    for each in (taken, taken.successor, done):
        if isinstance(each, Checkout):
            await store.release(each)
    with anyio.fail_after(10):
        for name in ("s", "free", "new"):
            found = await other.checkout(name, LOCK, None)
            if isinstance(found, Checkout):
                assert found.record == b'{"n": 1}' or b"session_id" in found.record
                await other.release(found)
    lives = {name for name in await store.list_active() if name != "free"}
    assert lives in (
        {"s"},
        {"s", "new"} if call == "create" else {"new"},
        set() if call == "discard" else {"s"},
    )


async def test_a_call_that_was_not_begun_is_not_carried_out(path: Path) -> None:
    """Whoever was told that the database is busy may try again: the first try is forgotten."""
    store = SQLiteSessionStore(path, busy_timeout=0.1)
    await store.set("s", SessionData(session_id="s"))
    with closing(sqlite3.connect(path, isolation_level=None)) as tool:
        tool.execute("BEGIN IMMEDIATE")
        for _ in range(3):
            with pytest.raises(SessionStoreError, match="locked"):
                await store.increment_counter("s", "message_count")
        tool.execute("COMMIT")
    assert await store.increment_counter("s", "message_count") == 1
    await store.aclose()


async def test_an_unsure_commit_may_be_made_again(
    store: SQLiteSessionStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reply that was lost, whether the change was stored or not: the retry is taken for what it is."""
    for stored in (True, False):
        await store.set("s", SessionData(session_id="s"))
        taken = await store.checkout("s", LOCK, None)
        assert isinstance(taken, Checkout)
        engine = await store._get()
        perform = engine.perform

        async def losing(work: Any, stored: bool = stored, perform: Any = perform, **options: Any) -> Any:
            if stored:
                await perform(work, durable=options["durable"])
            raise SessionStoreError("the reply was lost")

        monkeypatch.setattr(engine, "perform", losing)
        record = encode_checked(SessionData(session_id="s", user_id="ada", message_count=1))
        with pytest.raises(SessionStoreError, match="lost"):
            await store.commit(taken, record, release=False)
        monkeypatch.undo()
        assert taken.unsure, "the version that may be stored is remembered"
        again = encode_checked(SessionData(session_id="s", message_count=2))
        assert await store.commit(taken, again, release=True) is Outcome.STORED
        found = await store.get("s")
        assert found is not None
        assert (found.user_id, found.message_count) == (None, 2)
        assert await store.list_for_user("ada") == []


async def test_an_interrupt_leaves_no_transaction_open(
    store: SQLiteSessionStore, other: SQLiteSessionStore
) -> None:
    """Ctrl-C may come while a task carries its call out itself; nobody else is held up by that."""
    await store.set("s", SessionData(session_id="s"))
    await other.open()

    def interrupted(tx: Transaction) -> None:
        tx.db.execute("DELETE FROM session")
        raise KeyboardInterrupt

    engine = await store._get()
    with pytest.raises(KeyboardInterrupt):
        await engine.perform(interrupted, durable=False, whose="s")
    assert not engine._db.in_transaction
    assert await other.set("t", SessionData(session_id="t"))
    assert await store.list_active() == ["s", "t"]


async def test_a_task_writes_by_itself_only_where_it_is_alone(
    store: SQLiteSessionStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of many that are ready at once, each would hold up the event loop for all others."""
    monkeypatch.setattr(engines, "_ALONE", 60.0)
    await store.open()
    opened = await store._get()
    here = threading.get_ident()
    by_task: list[bool] = []

    async def write(session_id: str) -> None:
        await opened.perform(
            lambda tx: by_task.append(threading.get_ident() == here), durable=False, whose=session_id
        )

    for _ in range(3):
        await write("s")
    assert by_task == [True] * 3
    async with anyio.create_task_group() as group:
        for number in range(20):
            group.start_soon(write, f"s{number}")
    assert not any(by_task[3:])


async def test_the_log_begins_anew_when_it_was_folded(store: SQLiteSessionStore) -> None:
    """Its first page waits for the disk: whoever folds writes it, not the next task."""
    for number in range(20):
        await store.set(f"s{number}", SessionData(session_id=f"s{number}"))
    engine = await store._get()
    log, db = engine.writer._log, engine._db
    assert engine.writer.pause(5)
    try:
        log.fold(db)
        _, pages, copied = db.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
    finally:
        engine.writer.resume(db)
    assert (pages, copied) == (1, 1)
    assert log.calls == 0
    assert len(await store.list_active()) == 20


async def test_limits_of_any_size(store: SQLiteSessionStore) -> None:
    """A number that SQLite cannot hold is a bound like any other."""
    await store.set("s", SessionData(session_id="s", message_count=3))
    huge = 10**30
    assert await store.list_active(limit=huge) == ["s"]
    assert await store.list_active(offset=huge) == []
    assert len(await store.find(SessionFilter(max_messages=huge), limit=huge)) == 1
    assert await store.find(SessionFilter(min_messages=huge)) == []


async def test_one_call_that_fails_takes_no_other_with_it(store: SQLiteSessionStore) -> None:
    """They share a transaction; each is tried again by itself."""
    await store.open()
    engine = await store._get()

    def fail(tx: object) -> None:
        raise sqlite3.OperationalError("no such column: of this test")

    failed: list[str] = []

    async def wrong() -> None:
        with pytest.raises(SessionStoreError, match="another program has changed it"):
            await engine.perform(fail, durable=True)
        failed.append("wrong")

    async with anyio.create_task_group() as tasks:
        for number in range(6):
            tasks.start_soon(store.set, f"s{number}", SessionData(session_id=f"s{number}"))
            tasks.start_soon(wrong)
    assert await store.count_active() == 6
    assert len(failed) == 6


def test_what_is_written_is_one_step() -> None:
    """No operation awaits: each is a plain function of a transaction."""
    functions = [each for each in vars(operations).values() if callable(each) and hasattr(each, "__code__")]
    assert functions
    assert not [each.__name__ for each in functions if each.__code__.co_flags & 0x80]
