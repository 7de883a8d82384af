"""Waiting for the end of a session: whoever ends it, wherever, all who wait learn of it, and only they."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NamedTuple

import anyio
import pytest
from asgi import PrimitiveStore

from asgi_sessions import (
    InMemorySessionStore,
    RedisSessionStore,
    SessionData,
    SessionStore,
    SessionStoreError,
    SQLiteSessionStore,
)
from asgi_sessions.record.codec import encode_checked
from asgi_sessions.stores import endings
from asgi_sessions.stores.checkout import Checkout, Lifetime, LockPolicy, Outcome
from asgi_sessions.stores.endings import Endings
from asgi_sessions.stores.sqlite import ends

pytestmark = pytest.mark.anyio

End = Callable[[SessionStore, str], Awaitable[object]]


class Pair(NamedTuple):
    """Two processes, as far as the backend can tell; one of memory, which has one."""

    here: SessionStore
    there: SessionStore


KINDS = ["memory", "memory, trio", "four primitives", "sqlite", "sqlite, trio", "redis"]
TOLD = [kind for kind in KINDS if kind != "four primitives"]  # or one process only


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def anyio_backend(kind: str) -> str:
    return "trio" if kind.endswith("trio") else "asyncio"


@pytest.fixture
async def pair(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Pair]:
    name = kind.partition(",")[0]
    stores: list[SessionStore]
    if name == "memory":
        stores = [InMemorySessionStore()] * 2
    elif name == "sqlite":
        stores = [SQLiteSessionStore(tmp_path / "sessions.db", synchronous="normal") for _ in range(2)]
    elif name == "redis":
        stores = [RedisSessionStore(request.getfixturevalue("redis_url")) for _ in range(2)]
    else:
        stores = [PrimitiveStore(clock=time.time)] * 2
    yield Pair(*stores)
    for store in stores:
        await store.aclose()


@pytest.fixture
def never_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever waits looks once, and then has to be told."""
    monkeypatch.setattr(endings, "LOOK_EVERY", 3600.0)
    monkeypatch.setattr(endings, "_FIRST_PAUSE", 3600.0)
    monkeypatch.setattr(ends, "LOOK_EVERY", 3600.0)


async def endings_of(store: SessionStore) -> Endings:
    """Those of this process and event loop."""
    if isinstance(store, SQLiteSessionStore):
        return (await store._get()).endings
    if isinstance(store, RedisSessionStore):
        return (await store._states.get()).endings
    return store._endings


async def asleep(store: SessionStore, session_id: str = "s", waiters: int = 1) -> None:
    """Wait until so many have looked and sleep."""
    known = await endings_of(store)
    with anyio.fail_after(20):
        while True:
            watched = known._watched.get(session_id)
            if watched and len(watched.sleepers) == waiters and time.monotonic() < watched.due < 1e9:
                return
            await anyio.sleep(0.005)


@asynccontextmanager
async def learned(store: SessionStore, session_id: str = "s", waiters: int = 1) -> AsyncIterator[None]:
    """So many wait, asleep, while the block runs, and all have to learn of the end after it."""
    with anyio.fail_after(20):
        async with anyio.create_task_group() as group:
            for _ in range(waiters):
                group.start_soon(store.until_ended, session_id)
            await asleep(store, session_id, waiters)
            yield
    assert len(await endings_of(store)) == 0


async def put(store: SessionStore, session_id: str = "s", user_id: str | None = None) -> None:
    await store.set(session_id, SessionData(session_id=session_id, user_id=user_id))


# -- who ends it -------------------------------------------------------------------------------------------


async def _discard(store: SessionStore, session_id: str) -> None:
    taken = await store.checkout(session_id, LockPolicy(), None)
    assert isinstance(taken, Checkout)
    assert await store.discard(taken) is Outcome.STORED


async def _move(store: SessionStore, session_id: str) -> None:
    taken = await store.checkout(session_id, LockPolicy(), None)
    assert isinstance(taken, Checkout)
    record = encode_checked(SessionData(session_id="new", user_id="ada"))
    outcome = await store.move(taken, "new", record, lifetime=None, lock=None, was="ada", user="ada")
    assert outcome is Outcome.STORED


async def _shorten(store: SessionStore, session_id: str) -> None:
    """A request of another release, by whose shorter rule it has ended."""
    await anyio.sleep(0.05)
    await store.checkout(session_id, LockPolicy(), Lifetime(absolute=0.04))


WAYS: dict[str, End] = {
    "delete": lambda store, session_id: store.delete(session_id),
    "delete_batch": lambda store, session_id: store.delete_batch([session_id, "other"]),
    "delete_for_user": lambda store, session_id: store.delete_for_user("ada"),
    "logout": _discard,
    "login": _move,
    "max_age": _shorten,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.usefixtures("never_looks")
async def test_all_who_wait_are_told(pair: Pair, way: str) -> None:
    """However the session ends, in another process too; nobody looks for that."""
    await put(pair.there, user_id="ada")
    await put(pair.there, "bystander")
    async with anyio.create_task_group() as group:
        group.start_soon(pair.here.until_ended, "bystander")
        await asleep(pair.here, "bystander")
        with anyio.fail_after(20):
            async with anyio.create_task_group() as waiters:
                for _ in range(3):
                    waiters.start_soon(pair.here.until_ended, "s")
                await asleep(pair.here, "s", 3)
                await WAYS[way](pair.there, "s")
        assert len(await endings_of(pair.here)) == 1, "the bystander waits on"
        group.cancel_scope.cancel()


@pytest.mark.usefixtures("never_looks")
async def test_many_sessions_end_at_once(pair: Pair) -> None:
    """More than one message holds."""
    names = [f"{'s' * 60}-{number}" for number in range(60)]
    await pair.there.set_batch({name: SessionData(session_id=name, user_id="ada") for name in names})
    with anyio.fail_after(20):
        async with anyio.create_task_group() as group:
            for name in names:
                group.start_soon(pair.here.until_ended, name)
            for name in names:
                await asleep(pair.here, name)
            assert await pair.there.delete_for_user("ada") == 60


async def test_what_expires_has_ended(pair: Pair) -> None:
    """Nobody tells of that, so it is looked at when its life is over."""
    await pair.there.set("s", SessionData(session_id="s"), ttl=0.2)
    with anyio.fail_after(20):
        await pair.here.until_ended("s")
    assert not await pair.here.exists("s")


async def test_a_life_that_is_prolonged(pair: Pair) -> None:
    """A request has restarted the idle timeout: the session is looked at again, not given up."""
    record = encode_checked(SessionData(session_id="s"))
    assert await pair.there.create("s", record, Lifetime(idle=0.4), None)
    async with learned(pair.here):
        for _ in range(3):
            await anyio.sleep(0.2)
            taken = await pair.there.checkout("s", None, None)
            assert isinstance(taken, Checkout)
            await pair.there.keep_alive(taken)
        assert len(await endings_of(pair.here)) == 1
    assert not await pair.here.exists("s")


@pytest.mark.parametrize("why", ["never there", "deleted", "replaced"])
async def test_what_is_absent_has_ended(pair: Pair, why: str) -> None:
    """Nobody waits for it."""
    if why != "never there":
        await put(pair.there, user_id="ada")
        await WAYS["delete" if why == "deleted" else "login"](pair.there, "s")
    with anyio.fail_after(20):
        await pair.here.until_ended("s")


async def test_who_ends_it_without_a_word(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """An operator, an older release: it is looked at now and then."""
    monkeypatch.setattr(endings, "LOOK_EVERY", 0.1)
    await put(pair.there)
    async with learned(pair.here):
        for store in pair:
            monkeypatch.setattr(await endings_of(store), "tell", lambda session_ids: None)
        await pair.there.delete("s")
        monkeypatch.undo()


# -- who waits ---------------------------------------------------------------------------------------------


async def test_one_looks_for_all(pair: Pair) -> None:
    """Five hundred who wait for one session cost the backend one question, or some where nobody tells."""
    await put(pair.there)
    known = await endings_of(pair.here)
    asked: list[str] = []
    look = known._look

    async def counted(session_id: str) -> endings.Life | None:
        asked.append(session_id)
        return await look(session_id)

    known._look = counted
    async with learned(pair.here, waiters=500):
        assert 1 <= len(asked) <= 10
        await pair.there.delete("s")


async def test_who_is_cancelled_leaves_nothing(pair: Pair) -> None:
    """While asleep; the others wait on."""
    await put(pair.there)
    async with learned(pair.here):
        with anyio.move_on_after(0.05) as scope:
            await pair.here.until_ended("s")
        assert scope.cancelled_caught
        known = await endings_of(pair.here)
        assert (known._watched["s"].waiters, len(known._watched["s"].sleepers)) == (1, 1)
        await pair.there.delete("s")


async def test_who_looks_is_cancelled(pair: Pair) -> None:
    """Another one looks."""
    await put(pair.there)
    known = await endings_of(pair.here)
    looking: list[str] = []
    look = known._look

    async def first_hangs(session_id: str) -> endings.Life | None:
        looking.append(session_id)
        if len(looking) == 1:
            await anyio.sleep_forever()
        return await look(session_id)

    known._look = first_hangs
    with anyio.fail_after(20):
        async with anyio.create_task_group() as others:
            async with anyio.create_task_group() as first:
                first.start_soon(pair.here.until_ended, "s")
                while not looking:  # noqa: ASYNC110  # it sets no event
                    await anyio.sleep(0.001)
                others.start_soon(pair.here.until_ended, "s")
                await anyio.sleep(0.01)
                first.cancel_scope.cancel()
            await asleep(pair.here)
            await pair.there.delete("s")


async def test_a_fault_is_no_end(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """The session is looked at until somebody can say what became of it."""
    monkeypatch.setattr(endings, "_FIRST_PAUSE", 0.05)
    await put(pair.there)
    known = await endings_of(pair.here)
    faults: list[str] = []
    look = known._look

    async def fails_first(session_id: str) -> endings.Life | None:
        if len(faults) < 3:
            faults.append(session_id)
            raise SessionStoreError("not now")
        return await look(session_id)

    known._look = fails_first
    async with learned(pair.here):
        while len(faults) < 3:  # noqa: ASYNC110  # they set no event
            await anyio.sleep(0.01)
        await pair.there.delete("s")


@pytest.mark.parametrize("kind", ["sqlite", "sqlite, trio", "redis"])
async def test_a_store_is_closed(pair: Pair) -> None:
    """Whoever waits is sent away with the reason, and what begins to wait later opens it again."""
    await put(pair.there)
    refused: list[SessionStoreError] = []

    async def wait() -> None:
        try:
            await pair.here.until_ended("s")
        except SessionStoreError as error:
            refused.append(error)

    with anyio.fail_after(20):
        async with anyio.create_task_group() as group:
            group.start_soon(wait)
            group.start_soon(wait)
            await asleep(pair.here, waiters=2)
            await pair.here.aclose()
    assert len({str(error) for error in refused}) == 1
    assert len(refused) == 2
    async with learned(pair.here):
        await pair.there.delete("s")


@pytest.mark.parametrize("kind", ["memory", "four primitives", "sqlite", "redis"])
def test_another_event_loop_ends_it(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """Starlette's test client has one for each call: a WebSocket waits in another thread than a request."""
    store: SessionStore
    if kind == "sqlite":
        store = SQLiteSessionStore(tmp_path / "sessions.db")
    elif kind == "redis":
        store = RedisSessionStore(request.getfixturevalue("redis_url"))
    else:
        store = InMemorySessionStore() if kind == "memory" else PrimitiveStore(clock=time.time)
    asyncio.run(put(store))
    waiting, ended = threading.Event(), threading.Event()

    async def wait() -> None:
        async with learned(store):
            waiting.set()
        ended.set()

    thread = threading.Thread(target=lambda: asyncio.run(wait()))
    thread.start()
    assert waiting.wait(20)
    asyncio.run(store.delete("s"))
    assert ended.wait(20)
    thread.join(20)
    asyncio.run(store.aclose())


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    """Of a waiter that was never woken."""
    before = set(threading.enumerate())
    yield
    left = set(threading.enumerate()) - before
    assert not [each for each in left if each.name.startswith("Thread-")]
