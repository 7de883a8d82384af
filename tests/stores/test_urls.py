"""Stores by URL: which one a URL names, and who shares it."""

from __future__ import annotations

import gc
import weakref
from weakref import WeakValueDictionary

import pytest

from asgi_sessions import (
    InMemorySessionStore,
    RedisSessionStore,
    SessionData,
    SessionMiddleware,
    SessionStore,
)
from asgi_sessions.asgi import Receive, Scope, Send
from asgi_sessions.stores import urls
from asgi_sessions.stores.urls import resolve_store

KEY = "k" * 32


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    """Is never called here."""


@pytest.fixture
def no_shared_stores(monkeypatch: pytest.MonkeyPatch) -> None:
    """None that another test's middleware still keeps, with its model."""
    monkeypatch.setattr(urls, "_shared", WeakValueDictionary())


@pytest.mark.parametrize("store", [None, "memory://"])
def test_memory_is_the_default(store: str | None) -> None:
    """None and `memory://` are one store, which all middlewares of the process share."""
    first, second = SessionMiddleware(app, KEY, store=store), SessionMiddleware(app, KEY)
    assert type(first.store) is InMemorySessionStore
    assert first.store is second.store
    assert SessionMiddleware(app, KEY, store=InMemorySessionStore()).store is not first.store


@pytest.mark.parametrize(
    "url",
    [
        "redis://localhost:6379/0",
        "rediss://localhost",
        "unix:///run/redis.sock",
        "redis+sentinel://localhost:26379/mymaster",
        "redis+cluster://localhost:7000",
    ],
)
def test_a_redis_url_makes_a_redis_store(url: str) -> None:
    """Every scheme of the contract, one store for each URL; nothing is connected to yet."""
    store = SessionMiddleware(app, KEY, store=url).store
    assert isinstance(store, RedisSessionStore)
    assert resolve_store(url) is store
    assert resolve_store(url, "other:") is not store


@pytest.mark.usefixtures("no_shared_stores")
def test_a_shared_store_lives_as_long_as_somebody_keeps_it() -> None:
    """The table of URLs keeps nothing alive: an app that is gone leaves no sessions to the next one."""
    known = weakref.ref(resolve_store("memory://"))
    gc.collect()
    assert known() is None


class Basket(SessionData):
    """A model."""


class BigBasket(Basket):
    """A more special one."""


class Other(SessionData):
    """A model that has nothing to do with these."""


@pytest.mark.usefixtures("no_shared_stores")
@pytest.mark.parametrize(
    ("models", "model"),
    [
        ([SessionData, Basket], Basket),
        ([Basket, SessionData], Basket),
        ([Basket, BigBasket, SessionData], BigBasket),
        ([BigBasket, Basket], BigBasket),
        ([Basket, Other], Other),
    ],
)
def test_a_shared_store_reads_by_the_most_special_model(
    models: list[type[SessionData]], model: type[SessionData]
) -> None:
    """Of models that have nothing to do with each other the last one counts, as do the lock's settings."""
    store = resolve_store("memory://")
    for number, each in enumerate(models):
        SessionMiddleware(app, KEY, model=each, lock_wait=number)
    assert store.model is model
    assert store.lock_policy is not None
    assert store.lock_policy.wait == len(models) - 1


def test_a_store_is_taken_as_it_is() -> None:
    """It learns the model and the lock's settings where it was given none of its own."""

    class Shop(SessionData):
        """A model."""

    store: SessionStore = InMemorySessionStore()
    middleware = SessionMiddleware(app, KEY, store=store, model=Shop, lock_wait=3)
    assert middleware.store is store
    assert store.model is Shop
    assert store.lock_policy is not None
    assert store.lock_policy.wait == 3

    own = InMemorySessionStore(model=Shop)
    SessionMiddleware(app, KEY, store=own)
    assert own.model is Shop
