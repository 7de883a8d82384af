"""Stores on the shared server, as several processes would have them, and a client that looks at the keys."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

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
