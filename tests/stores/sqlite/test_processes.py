"""Several processes on one database: whoever dies or hangs holds nobody up for longer than promised."""

from __future__ import annotations

import random
import socket
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import anyio
import anyio.to_thread
import pytest

from asgi_sessions import LockTimeoutError, SessionData, SessionStoreError, SQLiteSessionStore
from asgi_sessions.stores.checkout import Checkout, LockPolicy, Missing, Outcome

from .processes import LEASE, Process

pytestmark = pytest.mark.anyio

SOON = 15.0  # seconds, far less than a lease, for what comes within some milliseconds on a quiet machine
LOCK = LockPolicy(timeout=LEASE, wait=SOON, max_hold=LEASE)


async def take(store: SQLiteSessionStore, session_id: str, lock: LockPolicy = LOCK) -> Checkout:
    taken = await store.checkout(session_id, lock, None)
    assert isinstance(taken, Checkout)
    return taken


async def hear(process: Process) -> object:
    with anyio.fail_after(SOON):
        return await anyio.to_thread.run_sync(process.hear, abandon_on_cancel=True)


async def until_queued(store: SQLiteSessionStore) -> None:
    """Somebody waits for a lock."""
    with anyio.fail_after(SOON):
        while not (await store.get_stats())["locks_waited_for"]:  # noqa: ASYNC110  # another process
            await anyio.sleep(0.01)


async def test_a_lock_is_handed_from_process_to_process(
    store: SQLiteSessionStore, start: Callable[..., Process]
) -> None:
    """A waiter in another process gets it as soon as it is free, and sees what was committed."""
    await store.set("s", SessionData(session_id="s"))
    process = start()
    for count in range(1, 6):
        taken = await take(store, "s")
        process.say("take", "s")
        await until_queued(store)
        await store.release(taken)
        assert await hear(process) is True
        assert process.ask("count", "s") == Outcome.STORED.value
        found = await store.get("s")
        assert found is not None
        assert found.message_count == count


async def test_a_start_while_a_foreign_program_writes(
    path: Path, store: SQLiteSessionStore, other: SQLiteSessionStore, start: Callable[..., Process]
) -> None:
    """A worker that starts waits for it, also where it has to clear away what the dead have left."""
    await store.set("s", SessionData(session_id="s"))
    await store.aclose()
    process = start()
    assert process.ask("take", "s")
    process.kill()
    with closing(sqlite3.connect(path, isolation_level=None)) as tool:
        tool.execute("BEGIN IMMEDIATE")
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(other.open)
            await anyio.sleep(0.3)
            tool.execute("COMMIT")
    await take(other, "s")


async def test_a_message_of_no_sense(
    store: SQLiteSessionStore, other: SQLiteSessionStore, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be cut off or a foreign program's: who listens goes on listening."""
    monkeypatch.chdir(path.parent)  # the names of sockets have to be short
    await store.set("s", SessionData(session_id="s"))
    taken = await take(store, "s")
    await other.open()
    with closing(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)) as sender:
        for each in Path(f"{path}-run").glob("*.sock"):
            for message in (b"\xff\xfe", b"nobody's", b"x" * 4000):
                sender.sendto(message, str(each.relative_to(path.parent)))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(take, other, "s")
        await until_queued(store)
        await store.release(taken)


async def test_a_killed_holder_holds_nothing(
    store: SQLiteSessionStore, start: Callable[..., Process]
) -> None:
    """Its lease would last for a minute; the others notice that it is gone."""
    await store.set("s", SessionData(session_id="s"))
    for waits_already in (True, False):
        process = start()
        assert process.ask("take", "s") is True
        if not waits_already:
            process.kill()
        async with anyio.create_task_group() as tasks:
            if waits_already:
                tasks.start_soon(_kill_when_somebody_waits, store, process)
            await store.release(await take(store, "s"))


async def _kill_when_somebody_waits(store: SQLiteSessionStore, process: Process) -> None:
    await until_queued(store)
    process.kill()


async def test_a_killed_waiter_is_passed_over(
    store: SQLiteSessionStore, other: SQLiteSessionStore, start: Callable[..., Process]
) -> None:
    """The lock goes to the next one who lives."""
    await store.set("s", SessionData(session_id="s"))
    taken, process = await take(store, "s"), start()
    process.say("take", "s")
    await until_queued(store)
    process.kill()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(take, other, "s")
        await anyio.sleep(0.1)
        await store.release(taken)


async def test_what_the_dead_have_left_is_cleared_away(
    path: Path, store: SQLiteSessionStore, start: Callable[..., Process]
) -> None:
    """Whoever opens the database next removes their locks and their files."""
    await store.set("s", SessionData(session_id="s"))
    process = start()
    assert process.ask("take", "s") is True
    process.kill()
    folder = Path(f"{path}-run")
    assert len(list(folder.glob("*.lock"))) == 2
    another = SQLiteSessionStore(path)
    assert (await another.get_stats())["locks_held"] == 0
    assert len(list(folder.glob("*.lock"))) == 2, "the two that live"
    await another.aclose()
    await store.aclose()
    assert [each.name for each in folder.iterdir()] == ["gate"]


async def test_a_frozen_holder_has_its_lease_and_no_more(
    store: SQLiteSessionStore, start: Callable[..., Process]
) -> None:
    """When the lease is over the next one gets the lock, and the late commit is refused."""
    await store.set("s", SessionData(session_id="s"))
    process = start()
    assert process.ask("take", "s", 0.5) is True
    process.freeze()
    with pytest.raises(LockTimeoutError):
        await take(store, "s", LockPolicy(wait=0.05))
    taken = await take(store, "s")
    process.thaw()
    assert process.ask("count", "s") == Outcome.LOST.value
    assert await store.commit(taken, taken.record, release=True) is Outcome.STORED


async def test_a_frozen_waiter_has_its_lease_and_no_more(
    store: SQLiteSessionStore, other: SQLiteSessionStore, start: Callable[..., Process]
) -> None:
    """The lock is handed to it, it does not take it, and the next one gets it."""
    await store.set("s", SessionData(session_id="s"))
    taken, process = await take(store, "s"), start()
    process.say("take", "s", 0.5)
    await until_queued(store)
    process.freeze()
    await store.release(taken)
    await store.release(await take(other, "s"))
    process.thaw()
    assert await hear(process) is True, "it asks anew"


async def test_a_process_frozen_in_a_transaction_stops_the_writers(
    path: Path, store: SQLiteSessionStore, start: Callable[..., Process]
) -> None:
    """Reads go on, writes fail within their time and leave nothing; all goes on when the process does."""
    await store.set("s", SessionData(session_id="s"))
    impatient = SQLiteSessionStore(path, busy_timeout=0.2)
    await impatient.open()
    process = start()
    process.say("stick")
    assert await hear(process) == "in it"
    with pytest.raises(SessionStoreError, match="frozen in the middle of a write"):
        await impatient.set("t", SessionData(session_id="t"))
    with pytest.raises(SessionStoreError, match="frozen"):
        await impatient.checkout("s", LOCK, None)
    assert await impatient.exists("s")
    late = SQLiteSessionStore(path, busy_timeout=0.1)
    with pytest.raises(SessionStoreError, match="frozen"):
        await late.open()
    process.thaw()
    await impatient.release(await take(impatient, "s"))
    assert not await impatient.exists("t"), "a call that had failed was carried out later"
    await impatient.aclose()
    await late.aclose()


async def test_a_process_killed_in_a_transaction(
    store: SQLiteSessionStore, start: Callable[..., Process]
) -> None:
    """The next writer goes on at once."""
    await store.set("s", SessionData(session_id="s"))
    process = start()
    process.say("stick")
    assert await hear(process) == "in it"
    process.kill()
    await store.release(await take(store, "s"))


async def test_an_end_is_told_to_waiters_in_other_processes(
    store: SQLiteSessionStore, other: SQLiteSessionStore
) -> None:
    """Who waits for a session that is deleted or gets a new id learns why there is none."""
    for end, reason in (("delete", Missing.ABSENT), ("move", Missing.RETIRED)):
        await store.set("s", SessionData(session_id="s"))
        taken = await take(store, "s")
        answers: list[object] = []

        async def ask(answers: list[object]) -> None:
            answers.append(await other.checkout("s", LOCK, None))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(ask, answers)
            await until_queued(store)
            if end == "delete":
                assert await store.delete("s")
            else:
                await store.move(taken, "t", taken.record, lifetime=None, lock=None, was=None, user=None)
        assert answers == [reason]


async def test_a_session_that_is_made_anew_while_somebody_waits(
    store: SQLiteSessionStore, other: SQLiteSessionStore
) -> None:
    """The waiter of another process gets the new one, or is told that the old one is gone; it never hangs."""
    await store.set("s", SessionData(session_id="s"))
    await take(store, "s")
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(other.checkout, "s", LOCK, None)
        await until_queued(store)
        await store.delete("s")
        await store.set("s", SessionData(session_id="s"))


async def test_kills_lose_nothing(
    path: Path, store: SQLiteSessionStore, start: Callable[..., Process], request: pytest.FixtureRequest
) -> None:
    """Processes that are killed anywhere: what was told as stored is stored, and the file is whole."""
    names = [f"s{n}" for n in range(8)]
    await store.set_batch({name: SessionData(session_id=name) for name in names})
    told = dict.fromkeys(names, 0)
    chance = random.Random(7)
    steady = start()
    steady.say("count_often", names)
    for _ in range(60 if request.config.getoption("--long") else 6):
        process = start()
        process.say("count_often", names)
        await anyio.sleep(chance.uniform(0.05, 0.4))
        process.kill()
        _note(process, told)
    steady.kill()
    _note(steady, told)
    for name in names:
        found = await store.get(name)
        assert found is not None
        assert found.message_count >= told[name] > 0, "a change that was acknowledged is lost"
        await store.release(await take(store, name))
    with sqlite3.connect(path) as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    db.close()


def _note(process: Process, told: dict[str, int]) -> None:
    while (said := process.hear()) is not None:
        name, count = said
        told[name] = max(told[name], count)


async def test_a_process_dies_that_waits_for_an_end(
    start: Callable[..., Process], store: SQLiteSessionStore, path: Path
) -> None:
    """Nobody is kept from ending the session, and what the process left is removed."""
    await store.set("s", SessionData(session_id="s"))
    process = start()
    process.ask("await_end", "s")
    folder = Path(f"{path}-run")
    assert len(list(folder.glob("*.waits"))) == 1
    process.kill()
    assert await store.delete("s")
    await store.aclose()
    await store.open()
    assert list(folder.glob("*.waits")) == []


async def test_messages_that_are_lost(store: SQLiteSessionStore, other: SQLiteSessionStore) -> None:
    """More came at once than the system keeps: each session that somebody waits for is looked at."""
    names = [f"s{number}" for number in range(40)]
    for name in names:
        await store.set(name, SessionData(session_id=name))
    engine = await other._get()
    with anyio.fail_after(20):
        async with anyio.create_task_group() as group:
            for name in names:
                group.start_soon(other.until_ended, name)
            while len(engine.endings) < 40:  # noqa: ASYNC110  # it sets no event
                await anyio.sleep(0.01)
            for name in names:
                await store.delete(name)
