"""Stores on the shared server, as several processes would have them, and a client that looks at the keys."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from redis.asyncio import Redis

from asgi_sessions import RedisSessionStore


@pytest.fixture
async def store(redis_url: str) -> AsyncIterator[RedisSessionStore]:
    store = RedisSessionStore(redis_url)
    yield store
    await store.aclose()


@pytest.fixture
async def other(redis_url: str) -> AsyncIterator[RedisSessionStore]:
    """A second process, as far as Redis can tell."""
    store = RedisSessionStore(redis_url)
    yield store
    await store.aclose()


@pytest.fixture
async def third(redis_url: str) -> AsyncIterator[RedisSessionStore]:
    """One more process."""
    store = RedisSessionStore(redis_url)
    yield store
    await store.aclose()


@pytest.fixture
async def raw(redis_url: str) -> AsyncIterator[Redis]:
    async with Redis.from_url(redis_url, decode_responses=True) as client:
        yield client
