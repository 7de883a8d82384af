"""Fixtures that several test modules share."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import NamedTuple

import hypothesis
import pytest
from asgi import FileStore, PrimitiveStore, Shop, Site
from browser import HOW_TO_GET_IT, Chromium, Tab, find_chromium
from redis import Redis
from redis.asyncio import Redis as AsyncRedis
from redis_server import RedisServer

from asgi_sessions import (
    InMemorySessionStore,
    RedisSessionStore,
    SessionData,
    SessionStore,
    SQLiteSessionStore,
)
from asgi_sessions.stores.redis.commands import scripts
from asgi_sessions.stores.redis.connection import seam
from asgi_sessions.stores.redis.connection.script import Script

pytest_plugins = ["faults.summary"]

hypothesis.settings.register_profile("patient", deadline=None)  # an example may take long on a busy machine
hypothesis.settings.load_profile("patient")

SCRIPTS = [each for each in vars(scripts).values() if isinstance(each, Script)]


def pytest_addoption(parser: pytest.Parser) -> None:
    """How long the tests may take that look for what is rare."""
    group = parser.getgroup("asgi-server-sessions")
    group.addoption("--long", action="store_true", help="inject ten times the faults, try many more examples")
    group.addoption(
        "--soak",
        type=float,
        metavar="MINUTES",
        help="how long the load of the soak test lasts (some seconds)",
    )
    group.addoption(
        "--browser", action="store_true", help="fail where the tests in a real Chromium cannot run"
    )
    group.addoption(
        "--public-redis", action="store_true", help="use redis-py by its public coroutines, take nothing over"
    )
    group.addoption("--figures", metavar="FILE", help="save the table of faults there (.json, else Markdown)")


def pytest_configure(config: pytest.Config) -> None:
    """With `--public-redis` every connection looks as that of a redis-py that has other private parts."""
    if config.getoption("--public-redis"):
        seam.PRIVATE = (*seam.PRIVATE, "_of_another_release")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Two for each processor, because many tests wait; none where files are named, as when debugging."""
    if any(".py" in named for named in config.option.file_or_dir):
        return 0
    return 2 * (os.cpu_count() or 1)


@pytest.fixture
def anyio_backend() -> str:
    """Async tests run on asyncio unless a module says otherwise."""
    return "asyncio"


class Way(NamedTuple):
    """How a `Site` runs without a server: its event loop, its store, and one of the two kinds of model."""

    loop: str
    store: type[SessionStore]
    model: type[SessionData]


WAYS = {
    "asyncio": Way("asyncio", InMemorySessionStore, SessionData),
    "trio": Way("trio", InMemorySessionStore, Shop),
    "four primitives": Way("asyncio", PrimitiveStore, Shop),
    "sqlite": Way("asyncio", FileStore, Shop),
    "sqlite, trio": Way("trio", FileStore, SessionData),
}


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """The event loop, for tests whose `Site` is to stand over each kind of store that needs no server."""
    chosen = WAYS[request.param]
    monkeypatch.setattr(Site, "backing", chosen.store)
    monkeypatch.setattr(FileStore, "folder", tmp_path, raising=False)
    yield chosen.loop
    FileStore.close_all()


@pytest.fixture
def model(way: str, request: pytest.FixtureRequest) -> type[SessionData]:
    """The way's own model, for stores see bytes only. `test_walk.py` runs each model on each way."""
    return WAYS[request.node.callspec.params["way"]].model


@pytest.fixture(scope="session")
def redis_server() -> Iterator[RedisServer]:
    """One server for all tests that neither stop nor configure it."""
    with RedisServer() as server:
        yield server


@pytest.fixture
def redis_url(redis_server: RedisServer) -> str:
    """The URL of the shared server, emptied. It knows the scripts, whatever tests ran before."""
    with Redis.from_url(redis_server.url) as client:
        client.flushall()
        for script in SCRIPTS:
            client.script_load(script.body)
    return redis_server.url


@pytest.fixture
def own_redis() -> Iterator[RedisServer]:
    """A server that this test may kill, freeze or configure."""
    with RedisServer() as server:
        yield server


@pytest.fixture(scope="module")
def chromium(request: pytest.FixtureRequest) -> Iterator[Chromium]:
    """One browser for all tests of a module; each opens a profile of its own."""
    program = find_chromium()
    if program is None:
        if request.config.getoption("--browser"):
            pytest.fail(HOW_TO_GET_IT)
        pytest.skip(HOW_TO_GET_IT)
    browser = Chromium(program)
    yield browser
    browser.close()


@pytest.fixture
def tab(chromium: Chromium) -> Iterator[Tab]:
    """A tab of a new profile."""
    with chromium.profile() as tab:
        yield tab


@pytest.fixture(params=["memory", "sqlite", "redis"])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[SessionStore]:
    """Each store of ours, for tests that have none of their own."""
    store: SessionStore
    if request.param == "memory":
        store = InMemorySessionStore()
    elif request.param == "sqlite":
        store = SQLiteSessionStore(tmp_path / "sessions.db")
    else:
        store = RedisSessionStore(request.getfixturevalue("redis_url"))
    yield store
    await store.aclose()


@pytest.fixture
async def raw(redis_url: str) -> AsyncIterator[AsyncRedis]:
    """A client that looks at the shared server, as texts."""
    async with AsyncRedis.from_url(redis_url, decode_responses=True) as client:
        yield client
