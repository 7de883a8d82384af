"""The faults that a test can have: the store is down, the lock is lost, the session ends in mid-request."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest
import starlette.testclient
from asgi import PrimitiveStore
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse

from asgi_sessions import (
    InMemorySessionStore,
    LockLostError,
    RedisSessionStore,
    SessionConflictError,
    SessionEvent,
    SessionMiddleware,
    SessionStore,
    SessionStoreError,
    SQLiteSessionStore,
    get_session,
)
from asgi_sessions.stores.checkout import LockPolicy
from asgi_sessions.testing import (
    end_session,
    ended_meanwhile,
    faults,
    lock_lost,
    session_of,
    signed_in,
    store_down,
)

from .apps import ROUTES, SECRET, bare, litestar
from .test_sessions import http_client

pytestmark = pytest.mark.anyio


@pytest.fixture(params=["memory", "primitives", "sqlite", "redis"])
async def any_store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[SessionStore]:
    """Each store of ours, and one of somebody else's."""
    store: SessionStore = InMemorySessionStore()
    if request.param == "primitives":
        store = PrimitiveStore(clock=time.time)
    elif request.param == "sqlite":
        store = SQLiteSessionStore(tmp_path / "sessions.db")
    elif request.param == "redis":
        store = RedisSessionStore(request.getfixturevalue("redis_url"))
    yield store
    await store.aclose()


async def test_the_store_is_down_for_a_block(any_store: SessionStore) -> None:
    """Who has a session, or begins one, gets 503; others are served; afterwards all is as before."""
    async with http_client(bare(store=any_store)) as client:
        with store_down(client):
            assert (await client.get("/who")).status_code == 200
            assert (await client.get("/visit")).status_code == 503
        signed_in(client)
        assert (await client.get("/visit")).json() == 1
        with store_down(client):
            assert (await client.get("/who")).status_code == 503
            assert (await client.get("/visit")).status_code == 503
            with pytest.raises(SessionStoreError, match="the store is down"):
                session_of(client)
            with pytest.raises(SessionStoreError):
                await any_store.list_for_user("ada")
            with pytest.raises(SessionStoreError):
                _ = [each async for each in any_store.iter_active()]
            with pytest.raises(SessionStoreError):
                async with any_store.transaction("some-id"):
                    pass
            assert (await any_store.health_check())["healthy"] is False
        assert (await any_store.health_check())["healthy"] is True
        assert (await client.get("/visit")).json() == 2


async def test_the_lock_is_lost(any_store: SessionStore) -> None:
    """A change is answered 409 and not stored; what only reads is served; nobody waits afterwards."""
    events: list[str] = []
    app = bare(
        store=any_store, on_event=lambda event: events.append(event.name), lock_timeout=30, lock_wait=5
    )
    async with http_client(app) as client:
        signed_in(client)
        assert (await client.get("/visit")).json() == 1
        with lock_lost(client):
            assert (await client.get("/visit")).status_code == 409
            assert (await client.get("/who")).status_code == 200
            assert (await client.get("/login")).status_code == 409
        assert events.count("lock_lost") == 2
        assert (await client.get("/visit")).json() == 2


async def test_the_session_ends_in_mid_request(any_store: SessionStore) -> None:
    """A change is answered 409 and the session is gone; one that begins meanwhile is not touched."""
    async with http_client(bare(store=any_store)) as client:
        signed_in(client)
        with ended_meanwhile(client):
            assert (await client.get("/who")).json()["user"] == "ada"
            assert (await client.get("/visit")).status_code == 409
            assert session_of(client) is None
            assert (await client.get("/visit")).json() == 1
            assert (await client.get("/login")).status_code == 409
        assert await any_store.count_active() == 0
        assert (await client.get("/visit")).json() == 1


@pytest.mark.parametrize("fault", [store_down, lock_lost, ended_meanwhile])
def test_a_fault_ends_with_its_block(fault: Callable[[Any], AbstractContextManager[None]]) -> None:
    """Also after an exception; the app counts as well as its client; blocks may lie within one another."""
    store = InMemorySessionStore()
    app = litestar(store=store)
    before = dict(vars(store))
    with pytest.raises(ZeroDivisionError), fault(app), store_down(app), lock_lost(app):
        _ = 1 / 0
    assert vars(store) == before


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (store_down, SessionStoreError),
        (lock_lost, LockLostError),
        (ended_meanwhile, SessionConflictError),
    ],
)
async def test_a_fault_while_a_request_is_under_way(
    fault: Callable[[Any], AbstractContextManager[None]], error: type[Exception]
) -> None:
    """The block may begin in the middle of a request; `save()` raises what the contract says."""
    begun, go_on, stored = anyio.Event(), anyio.Event(), anyio.Event()
    raised: list[type[Exception]] = []

    async def slow(request: Request) -> PlainTextResponse:
        session = get_session(request)
        session["step"] = 1
        begun.set()
        await go_on.wait()
        try:
            await session.save()
        except error as exception:
            raised.append(type(exception))
        stored.set()
        return PlainTextResponse("done")

    app = SessionMiddleware(Starlette(routes=[*ROUTES]), SECRET, store=InMemorySessionStore())
    app.app.add_route("/slow", slow)  # type: ignore[attr-defined]  # a Starlette
    async with http_client(app) as client:
        signed_in(client)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(client.get, "/slow")
            await begun.wait()
            with fault(app):
                go_on.set()
                await stored.wait()
    assert raised == [error]


async def test_a_session_is_ended_from_elsewhere_now() -> None:
    """While a request is under way, in any task of the test: its change is refused."""
    begun, go_on = anyio.Event(), anyio.Event()

    async def slow(request: Request) -> PlainTextResponse:
        request.session["step"] = 1
        begun.set()
        await go_on.wait()
        return PlainTextResponse("done")

    inner = Starlette()
    inner.add_route("/slow", slow)
    app = SessionMiddleware(inner, SECRET, store=InMemorySessionStore())
    answers: list[httpx.Response] = []
    async with http_client(app) as client, anyio.create_task_group() as tasks:

        async def ask(get: Callable[[str], Awaitable[httpx.Response]]) -> None:
            answers.append(await get("/slow"))

        signed_in(client)
        tasks.start_soon(ask, client.get)
        await begun.wait()
        assert end_session(client)
        go_on.set()
    assert [answer.status_code for answer in answers] == [409]


@pytest.mark.parametrize("wait", [0.0, 5.0])
async def test_a_waiter_takes_the_lost_lock_over(wait: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """With another request in the queue that one goes on, and finds its own lock lost as well."""
    monkeypatch.setattr(faults, "_THIEF", LockPolicy(wait=wait))
    store = InMemorySessionStore()
    begun, go_on = anyio.Event(), anyio.Event()

    async def slow(request: Request) -> PlainTextResponse:
        request.session["slow"] = request.session.get("slow", 0) + 1
        begun.set()
        await go_on.wait()
        return PlainTextResponse("done")

    inner = Starlette()
    inner.add_route("/slow", slow)
    app = SessionMiddleware(inner, SECRET, store=store)
    statuses: list[int] = []
    async with http_client(app) as client:
        signed_in(client)
        with lock_lost(app):
            async with anyio.create_task_group() as tasks:

                async def ask() -> None:
                    statuses.append((await client.get("/slow")).status_code)

                tasks.start_soon(ask)
                await begun.wait()
                tasks.start_soon(ask)
                await anyio.wait_all_tasks_blocked()
                go_on.set()
        assert statuses == [409, 409]
        seen = session_of(client)
        assert seen is not None
        assert seen.metadata == {}
    assert (await store.get_stats())["locks_held"] == 0


async def test_a_request_without_a_lock_loses_none() -> None:
    """`lock=False`, and a safe request of `lock="auto"` that nobody disturbs."""
    for lock in (False, "auto"):
        async with http_client(bare(store=InMemorySessionStore(), lock=lock)) as client:
            signed_in(client)
            with lock_lost(client):
                assert (await client.get("/visit")).json() == 1


def test_a_fault_in_a_sync_test() -> None:
    """With Starlette's client, whose app runs in another thread."""
    names: list[str] = []

    def note(event: SessionEvent) -> None:
        names.append(event.name)

    with starlette.testclient.TestClient(bare(store=InMemorySessionStore(), on_event=note)) as client:
        signed_in(client)
        with lock_lost(client):
            assert client.get("/visit").status_code == 409
        with ended_meanwhile(client):
            assert client.get("/visit").status_code == 409
    assert names == ["lock_lost", "conflict"]
