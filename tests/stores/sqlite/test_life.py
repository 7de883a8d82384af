"""Event loops, threads and forks around one store, and how it opens and closes."""

from __future__ import annotations

import asyncio
import gc
import os
import resource
import signal
import sqlite3
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Coroutine
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import pytest
import trio
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from asgi_sessions import (
    LockTimeoutError,
    SessionData,
    SessionMiddleware,
    SessionStoreError,
    SQLiteSessionStore,
)
from asgi_sessions.stores.checkout import Checkout, Lifetime, LockPolicy, Outcome
from asgi_sessions.stores.sqlite import gate, writer

_HOUR = Lifetime(absolute=3600)
LOCK = LockPolicy(timeout=60, wait=15, max_hold=60)


def new(session_id: str = "s") -> SessionData:
    return SessionData(session_id=session_id)


async def count(store: SQLiteSessionStore, session_id: str, times: int) -> None:
    for _ in range(times):
        await store.increment_counter(session_id, "message_count")


async def counted(store: SQLiteSessionStore, session_id: str = "s") -> int:
    found = await store.get(session_id)
    assert found is not None
    return found.message_count


def run_each(*jobs: Callable[[], object]) -> None:
    """Each in a thread of its own, at once."""
    failed: list[BaseException] = []

    def run(job: Callable[[], object]) -> None:
        try:
            job()
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=run, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []


def until_closed() -> None:
    """What closes stores that nobody keeps has done so."""
    for each in threading.enumerate():
        if each.name == "asgi_sessions-sqlite-close":
            each.join()


def threads() -> int:
    return sum(each.name.startswith("asgi_sessions-sqlite") for each in threading.enumerate())


def test_loops_in_several_threads_share_a_store(path: Path) -> None:
    """Also loops of two kinds at once; each waiter is woken in its own."""
    store = SQLiteSessionStore(path)
    asyncio.run(store.set("s", new()))
    work = partial(count, store, "s", 30)
    run_each(
        *[partial(asyncio.run, work()) for _ in range(3)],
        *[partial(trio.run, work) for _ in range(2)],
    )
    assert asyncio.run(counted(store)) == 150
    asyncio.run(store.aclose())


def test_a_loop_that_ends_leaves_no_lock(path: Path) -> None:
    """Its tasks are cancelled while they hold, wait, or have just been given a lock."""
    store = SQLiteSessionStore(path)
    asyncio.run(store.set("s", new()))

    async def leave() -> None:
        held = await store.checkout("s", LOCK, None)
        assert isinstance(held, Checkout)
        waiting = [asyncio.create_task(store.checkout("s", LOCK, None)) for _ in range(3)]
        await asyncio.sleep(0.05)
        await store.release(held)
        del waiting

    for _ in range(5):
        asyncio.run(leave())
    asyncio.run(count(store, "s", 1))
    asyncio.run(store.aclose())


@pytest.mark.parametrize("managed", [True, False], ids=["one loop", "a loop per call"])
def test_event_loops_come_and_go(path: Path, managed: bool) -> None:
    """One middleware serves a test client with and without its context manager."""

    async def write(request: Request) -> PlainTextResponse:
        request.session["n"] = request.session.get("n", 0) + 1
        return PlainTextResponse(str(request.session["n"]))

    middleware = Middleware(SessionMiddleware, secret_key="k" * 32, store=f"sqlite:///{path}")
    client = TestClient(Starlette(routes=[Route("/", write)], middleware=[middleware]))
    if managed:
        with client:
            numbers = [client.get("/").text for _ in range(4)]
    else:
        numbers = [client.get("/").text for _ in range(4)]
    assert numbers == ["1", "2", "3", "4"]


def test_a_lifespan_fails_with_the_reason(path: Path) -> None:
    """Better than a 503 for everybody."""
    path.write_text("dear diary " * 1000)
    app = Starlette(
        middleware=[Middleware(SessionMiddleware, secret_key="k" * 32, store=f"sqlite:///{path}")]
    )
    with pytest.raises(SessionStoreError, match="no SQLite database"), TestClient(app):
        pass


@pytest.mark.parametrize("framework", ["starlette", "bare"])
def test_a_server_does_not_start(path: Path, tmp_path: Path, framework: str) -> None:
    """uvicorn as it comes takes an exception for an app without lifespan events, and starts all the same."""
    path.write_text("dear diary " * 1000)
    sessions = f"SessionMiddleware, secret_key='k' * 32, store='sqlite:///{path}'"
    apps = {
        "starlette": f"app = Starlette(); app.add_middleware({sessions})",
        "bare": f"app = SessionMiddleware(Starlette(), {sessions.partition(', ')[2]})",
    }
    imports = "from asgi_sessions import SessionMiddleware\nfrom starlette.applications import Starlette\n"
    (tmp_path / "main.py").write_text(imports + apps[framework])
    command = [sys.executable, "-m", "uvicorn", "--app-dir", str(tmp_path), "main:app", "--port", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 3
    assert "no SQLite database" in done.stderr
    assert "startup failed" in done.stderr


# --- closing ---------------------------------------------------------------------------------------------


def test_a_store_that_nobody_keeps_closes_itself(path: Path) -> None:
    """Threads, files and the lock of its process go with it."""
    gc.collect()
    until_closed()
    before = threads()
    store = SQLiteSessionStore(path)
    asyncio.run(store.set("s", new()))
    assert threads() == before + 2
    del store
    gc.collect()
    until_closed()
    assert threads() == before
    assert [each.name for each in Path(f"{path}-run").iterdir()] == ["gate"]


def test_garbage_that_is_found_behind_the_gate(path: Path) -> None:
    """Whoever finds it cannot wait for a store that has to pass the gate as well: it closes later."""
    store = SQLiteSessionStore(path)
    asyncio.run(store.set("s", new()))
    found = gate.Gate(Path(f"{path}-run"))
    with found:
        del store
        gc.collect()
    found.close()
    until_closed()
    assert [each.name for each in Path(f"{path}-run").iterdir()] == ["gate"]


@pytest.mark.anyio
async def test_closing_lets_go(path: Path, store: SQLiteSessionStore, other: SQLiteSessionStore) -> None:
    """What was held is free for others at once, and the commit of a straggler finds the store open again."""
    await store.set("s", new())
    await store.set("t", new("t"))
    for name in ("s", "t"):
        assert isinstance(await store.checkout(name, LOCK, None), Checkout)
    straggler = await store.create("u", b"{}", _HOUR, LOCK)
    assert straggler is not None
    await store.aclose()
    with anyio.fail_after(10):
        taken = await other.checkout("s", LOCK, None)
    assert isinstance(taken, Checkout)
    assert await store.commit(straggler, b"{}", release=True) is Outcome.STORED


@pytest.mark.anyio
async def test_closing_twice_and_unopened(path: Path) -> None:
    """Does nothing."""
    store = SQLiteSessionStore(path)
    await store.aclose()
    await store.open()
    await store.aclose()
    await store.aclose()
    assert await store.count_active() == 0
    await store.aclose()


@pytest.mark.anyio
async def test_a_waiter_is_told_that_the_store_was_closed(store: SQLiteSessionStore) -> None:
    """It does not hang."""
    await store.set("s", new())
    assert isinstance(await store.checkout("s", LOCK, None), Checkout)
    failed: list[str] = []

    async def wait() -> None:
        try:
            await store.checkout("s", LOCK, None)
        except SessionStoreError as error:
            failed.append(str(error))

    with anyio.fail_after(10):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(wait)
            await anyio.sleep(0.1)
            await store.aclose()
    assert failed == ["the store was closed while this call waited"]


@pytest.mark.anyio
async def test_who_cannot_look_takes_nobody_for_dead(
    store: SQLiteSessionStore, other: SQLiteSessionStore
) -> None:
    """A process that has no file descriptor left would take all locks away."""
    engine, neighbour = await store._get(), await other._get()
    name = neighbour._presence.name
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
    try:
        assert engine._presence.lives(name)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    await other.aclose()
    assert not engine._presence.lives(name)


# --- forks -----------------------------------------------------------------------------------------------


def in_a_child(work: Callable[[], Coroutine[Any, Any, None]]) -> int:
    """Run this in a forked child; its exit status."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        asyncio.run(work())
    except BaseException:
        os._exit(1)
    os._exit(0)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_fork_opens_anew(path: Path) -> None:
    """Parent and child count in turns; neither has the other's connections, threads or locks."""
    store = SQLiteSessionStore(path)
    asyncio.run(store.set("s", new()))
    for _ in range(3):
        assert in_a_child(partial(count, store, "s", 10)) == 0
        asyncio.run(count(store, "s", 10))
    assert asyncio.run(counted(store)) == 60
    asyncio.run(store.aclose())
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_child_keeps_none_of_its_parents_locks(path: Path) -> None:
    """Nor the one by which its death is noticed; what the parent holds it goes on holding."""
    store = SQLiteSessionStore(path)

    async def hold() -> Checkout:
        await store.set("s", new())
        taken = await store.checkout("s", LOCK, None)
        assert isinstance(taken, Checkout)
        return taken

    async def held() -> None:
        with pytest.raises(LockTimeoutError):
            await store.checkout("s", LockPolicy(wait=0.3), None)

    async def lingering() -> None:
        read, write = ends
        os.close(write)
        os.read(read, 1)  # until the parent lets it go

    taken = asyncio.run(hold())
    assert in_a_child(held) == 0
    ends = os.pipe()
    child = os.fork()
    if not child:
        asyncio.run(lingering())
        os._exit(0)
    asyncio.run(store.aclose())  # as if it died: its lock on its file is gone, though the child lives
    other = SQLiteSessionStore(path)
    assert isinstance(asyncio.run(other.checkout("s", LOCK, None)), Checkout)
    asyncio.run(other.aclose())
    for end in ends:
        os.close(end)
    assert os.waitpid(child, 0)[1] == 0
    del taken


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_parent_that_ends_takes_nothing_from_its_child(path: Path) -> None:
    """What a child is told is stored lies in the file, though its parent has closed the file meanwhile."""
    store = SQLiteSessionStore(path)
    asyncio.run(store.set("s", new()))
    (said, says), (heard, hears) = os.pipe(), os.pipe()
    child = os.fork()
    if not child:
        os.close(hears)

        async def write() -> None:
            await store.set("before", new("before"))
            os.write(says, b"1")
            os.read(heard, 1)  # until the parent has closed it
            await store.set("after", new("after"))
            os.kill(os.getpid(), signal.SIGKILL)

        asyncio.run(write())
    os.read(said, 1)
    asyncio.run(store.set("parent", new("parent")))
    asyncio.run(store.aclose())
    os.write(hears, b"1")
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    for end in (said, says, heard, hears):
        os.close(end)
    assert asyncio.run(store.list_active()) == ["after", "before", "parent", "s"]
    asyncio.run(store.aclose())


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_fork_in_the_middle_of_a_call(path: Path) -> None:
    """A child whose locks would not be safe says so; the parent goes on."""
    store = SQLiteSessionStore(path)
    asyncio.run(store.set("s", new()))

    async def refused() -> None:
        for call in (store.get, store.exists, store.delete):
            with pytest.raises(SessionStoreError, match="was forked in the middle of a call"):
                await call("s")

    engine = store._engine
    assert engine is not None
    with engine.reader._slow._lock:  # a query that takes long
        assert in_a_child(refused) == 0
    assert asyncio.run(store.delete("s"))
    assert in_a_child(partial(count, store, "t", 1)) == 0
    asyncio.run(store.aclose())


def test_engines_that_were_closed_are_kept_by_nobody(path: Path) -> None:
    """A store that is opened and closed again and again does not grow."""
    store = SQLiteSessionStore(path)
    engines = []
    for _ in range(3):
        asyncio.run(store.open())
        engines.append(weakref.ref(store._engine))
        asyncio.run(store.aclose())
    gc.collect()
    assert [engine() for engine in engines] == [None] * 3


@pytest.mark.anyio
async def test_who_comes_while_the_writers_stand_still_takes_no_memory(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that is frozen in a transaction holds them up. Beyond a bound requests are refused."""
    monkeypatch.setattr(writer, "MOST_WAITING", 20)
    store = SQLiteSessionStore(path, busy_timeout=0.05)
    data = SessionData(session_id="s" * 32)
    await store.set(data.session_id, data)
    engine = store._engine
    assert engine is not None
    assert engine.writer.pause(5)
    try:
        for _ in range(3):
            outcomes = await asyncio.gather(
                *[store.checkout(data.session_id, LockPolicy(), None) for _ in range(20)],
                return_exceptions=True,
            )
            assert {type(each) for each in outcomes} == {SessionStoreError}
        assert len(engine.writer._calls) <= 40  # those that waited, and a release for each
    finally:
        engine.writer.resume(engine._db)
    await store.set(data.session_id, data)  # comes after all that waited
    assert isinstance(await store.checkout(data.session_id, LockPolicy(), None), Checkout)
    await store.aclose()
