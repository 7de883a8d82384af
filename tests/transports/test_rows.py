"""What every way of connecting has to stand: the contract, the walk, large records, crowds, cancellations."""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from asgi_sessions import RedisSessionStore, SessionData, SessionFilter, SessionMiddleware, SessionStoreError
from asgi_sessions.record.codec import encode_checked
from asgi_sessions.stores.checkout import Checkout, Lifetime, LockPolicy, Outcome
from asgi_sessions.testing.contract import StoreContract

from .rows import Row, Servers, commands

pytestmark = pytest.mark.anyio

_HOUR = Lifetime(absolute=3600)
_LOCK = LockPolicy(timeout=10, wait=10)
CLIENTS = 64
ACTS = 4  # of each client
SESSIONS = 96
SIZES = (1, 50, 1_000, 16_000, 16_384, 20_000, 65_000, 65_536, 131_073, 990_000)


class TestContract(StoreContract):
    """What every store promises."""

    @pytest.fixture
    def anyio_backend(self, row: Row) -> Any:
        return row.backend

    @pytest.fixture
    def store(self, store: RedisSessionStore) -> RedisSessionStore:
        return store


# -- the walk -------------------------------------------------------------------------------------------


async def change(request: Request) -> JSONResponse:
    request.session["n"] = request.session.get("n", 0) + 1
    request.session["name"] = request.query_params["name"]
    return JSONResponse(dict(request.session))


async def read(request: Request) -> JSONResponse:
    return JSONResponse(dict(request.session))


async def login(request: Request) -> JSONResponse:
    request.session.login(request.query_params["name"])  # type: ignore[attr-defined]  # ours, not Starlette's
    return JSONResponse(dict(request.session))


async def logout(request: Request) -> JSONResponse:
    request.session.logout()  # type: ignore[attr-defined]  # as above
    return JSONResponse({})


async def test_the_walk(store: RedisSessionStore) -> None:
    """Eight at once create, change, sign in and out; each sees what is its own, and dead ids stay dead."""
    routes = [Route(f"/{act.__name__}", act) for act in (change, read, login, logout)]
    middleware = Middleware(SessionMiddleware, secret_key="k" * 32, store=store)
    transport = httpx.ASGITransport(Starlette(routes=routes, middleware=[middleware]))

    async def walk(name: str) -> None:
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:

            async def ask(path: str, cookie: str | None = None) -> Any:
                headers = None if cookie is None else {"cookie": f"session={cookie}"}
                return (await client.get(f"/{path}?name={name}", headers=headers)).raise_for_status().json()

            assert await ask("change") == {"n": 1, "name": name}
            first = client.cookies["session"]
            assert await ask("change") == {"n": 2, "name": name}
            assert await ask("login") == {"n": 2, "name": name}
            second = client.cookies["session"]
            assert second != first
            assert [data.metadata for data in await store.list_for_user(name)] == [{"n": 2, "name": name}]
            assert await ask("read") == {"n": 2, "name": name}
            assert await ask("logout") == {}
            assert "session" not in client.cookies
            assert [await ask("read", cookie=dead) for dead in (first, second)] == [{}, {}]

    async with anyio.create_task_group() as group:
        for number in range(8):
            group.start_soon(walk, f"user-{number}")
    assert await store.count_active() == 0


# -- records --------------------------------------------------------------------------------------------


def record_of(session_id: str, size: int, n: int = 0) -> SessionData:
    """A record whose content is nobody else's at any of its bytes."""
    word = f"{session_id}-{n}/"
    return SessionData(
        session_id=session_id, metadata={"n": n, "text": (word * (size // len(word) + 1))[:size]}
    )


async def test_records_of_all_sizes(store: RedisSessionStore) -> None:
    """From one byte to a megabyte, alone and together: what comes back is what was stored."""
    records = {f"s{size}": record_of(f"s{size}", size) for size in SIZES}
    for session_id, data in records.items():
        await store.set(session_id, data)
        assert await store.get(session_id) == data
    assert await store.get_batch(records) == records
    large = {f"l{n}": record_of(f"l{n}", SIZES[-1]) for n in range(4)}  # more than fits on the way at once
    await asyncio.gather(*[store.set(session_id, data) for session_id, data in large.items()])
    assert await store.get_batch(large) == large
    got = await asyncio.gather(*[store.get(session_id) for session_id in reversed(records)])
    assert got == list(reversed(records.values()))
    for session_id, size in zip(records, SIZES, strict=True):
        taken = await store.checkout(session_id, _LOCK, _HOUR)
        assert isinstance(taken, Checkout)
        assert store.read(taken.record) == records[session_id]
        changed = record_of(session_id, size, n=1)
        assert await store.commit(taken, encode_checked(changed), release=True) is Outcome.STORED
        assert await store.get(session_id) == changed


# -- crowds ---------------------------------------------------------------------------------------------


class Crowd:
    """Many who use many sessions at once, and look whether what they get is what they asked for.

    Each session counts what was done to it; `told` is how much of that was acknowledged, `tried` how much may
    have been done.
    """

    def __init__(self, store: RedisSessionStore, seed: int) -> None:
        self.store = store
        self.chance = random.Random(seed)
        self.sizes = {f"s{n}": self.chance.choice((1, 300, 3_000, 17_000)) for n in range(SESSIONS)}
        self.told = dict.fromkeys(self.sizes, 0)
        self.tried = dict.fromkeys(self.sizes, 0)

    async def begin(self) -> None:
        await self.store.set_batch({name: record_of(name, size) for name, size in self.sizes.items()})

    def check(self, name: str, data: SessionData | None) -> int:
        """How much was done to it."""
        assert data is not None
        n = data.metadata["n"]
        assert isinstance(n, int)
        assert data.metadata == record_of(name, self.sizes[name], n).metadata
        assert data.session_id == name
        return n

    async def get(self, name: str) -> None:
        self.check(name, await self.store.get(name))

    async def get_batch(self, name: str) -> None:
        names = [name, *self.chance.sample(list(self.sizes), 3)]
        found = await self.store.get_batch(names)
        for each in names:
            self.check(each, found[each])

    async def load(self, name: str) -> None:
        taken = await self.store.checkout(name, None, _HOUR)
        assert isinstance(taken, Checkout)
        self.check(name, self.store.read(taken.record))

    async def change(self, name: str) -> None:
        taken = await self.store.checkout(name, _LOCK, _HOUR)
        assert isinstance(taken, Checkout)
        try:
            n = self.check(name, self.store.read(taken.record)) + 1
            self.tried[name] += 1
            record = encode_checked(record_of(name, self.sizes[name], n))
            assert await self.store.commit(taken, record, release=True) is Outcome.STORED
            self.told[name] += 1
        finally:
            await self.store.release(taken)

    async def client(self, acts: int) -> None:
        ways: list[Callable[[str], Awaitable[None]]] = [self.get, self.get_batch, self.load, self.change]
        for _ in range(acts):
            await self.chance.choice(ways)(self.chance.choice(list(self.sizes)))

    async def assert_whole(self, wait: float = 2) -> None:
        """Nothing that was acknowledged is lost, nobody holds a lock, and every record is its own."""
        for name in self.sizes:
            taken = await self.store.checkout(name, LockPolicy(wait=wait), _HOUR)
            assert isinstance(taken, Checkout)
            assert self.told[name] <= self.check(name, self.store.read(taken.record)) <= self.tried[name]
            await self.store.release(taken)


async def test_everybody_gets_their_own_record(store: RedisSessionStore) -> None:
    """64 clients at once on 96 sessions, reading, listing and changing under the lock."""
    crowd = Crowd(store, seed=1)
    await crowd.begin()
    async with anyio.create_task_group() as group:
        for _ in range(CLIENTS):
            group.start_soon(crowd.client, ACTS)
    assert crowd.told == crowd.tried
    await crowd.assert_whole()
    found = await store.find(SessionFilter())
    assert sorted(data.session_id for data in found) == sorted(crowd.sizes)
    for data in found:
        crowd.check(data.session_id, data)


async def test_a_lock_goes_from_process_to_process(
    row: Row, servers: Servers, store: RedisSessionStore
) -> None:
    """Two processes want one session: the record comes with the message, by the other connection."""
    other = row.store(servers)
    await store.set("s", record_of("s", 20_000))
    waited: list[float] = []

    async def increment(process: RedisSessionStore) -> None:
        taken = await process.checkout("s", _LOCK, _HOUR)
        assert isinstance(taken, Checkout)
        n = process.read(taken.record).metadata["n"]
        assert process.read(taken.record).metadata == record_of("s", 20_000, n).metadata
        waited.append(taken.waited)
        record = encode_checked(record_of("s", 20_000, n + 1))
        assert await process.commit(taken, record, release=True) is Outcome.STORED

    async with anyio.create_task_group() as group:
        for _ in range(20):
            group.start_soon(increment, store)
            group.start_soon(increment, other)
    found = await other.get("s")
    assert found is not None
    assert found.metadata["n"] == 40
    assert max(waited) < 5
    states = [process._states.here() for process in (store, other)]
    assert any(state is not None and state.subscription.live for state in states)
    await other.aclose()


async def test_cancellations_in_mid_flight(store: RedisSessionStore) -> None:
    """Half of them are cut off somewhere on their way; the others get what is theirs, and no lock is left."""
    crowd = Crowd(store, seed=2)
    await crowd.begin()

    async def short(ticks: int) -> None:
        task = asyncio.ensure_future(crowd.client(ACTS))
        for _ in range(ticks):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait((task,))
        assert task.cancelled() or task.exception() is None

    async with anyio.create_task_group() as group:
        for _ in range(CLIENTS // 2):
            group.start_soon(crowd.client, ACTS)
            group.start_soon(short, crowd.chance.randrange(60))
    await crowd.assert_whole()


async def test_connections_that_end_in_mid_flight(store: RedisSessionStore, servers: Servers) -> None:
    """The server hangs up on everybody: calls are made once more, and no reply goes to another caller."""
    crowd = Crowd(store, seed=3)
    await crowd.begin()
    refused: list[str] = []

    async def client() -> None:
        try:
            await crowd.client(ACTS)
        except SessionStoreError as error:
            refused.append(str(error))

    async with anyio.create_task_group() as group:
        for _ in range(CLIENTS):
            group.start_soon(client)
        await anyio.to_thread.run_sync(servers.hang_up)
    assert not [message for message in refused if "lost" not in message and "reached" not in message]
    await crowd.assert_whole(wait=12)  # a release whose connection ended twice is over with its lease


def test_the_rights_are_those_that_the_readme_names() -> None:
    """The rows with a user of its own have what our scripts call; README names neither more nor less."""
    readme = (Path(__file__).parents[2] / "README.md").read_text("utf-8")
    (shown,) = re.findall(r"ACL SETUSER app(.*?)```", readme, re.DOTALL)
    assert set(re.findall(r"\+(\w+)", shown)) == commands()
