"""The stores that the requirements are tested on, and the marker that names a requirement."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import cast

import pytest
from asgi import Clock
from redis import Redis

from asgi_sessions import InMemorySessionStore, RedisSessionStore, SessionStore
from security.service import Service


def pytest_configure(config: pytest.Config) -> None:
    """The marker is known wherever this folder is collected."""
    config.addinivalue_line("markers", "requirement(*ids): the security requirements that this test checks")


@pytest.fixture
def clock() -> Clock:
    """The time of the in-memory store."""
    return Clock()


@pytest.fixture(params=["memory", "redis"])
async def store(request: pytest.FixtureRequest, clock: Clock) -> AsyncIterator[SessionStore]:
    """Each kind of store; the Redis is a real one, emptied."""
    if request.param == "memory":
        yield InMemorySessionStore(clock=clock)
        return
    shared = RedisSessionStore(cast(str, request.getfixturevalue("redis_url")))
    yield shared
    await shared.aclose()


@pytest.fixture
def service(store: SessionStore) -> Service:
    """The middleware with its defaults over each kind of store."""
    return Service(store)


@pytest.fixture
def redis(redis_url: str) -> Iterator[Redis]:
    """Looks into the shared server from outside."""
    with Redis.from_url(redis_url) as client:
        yield client
