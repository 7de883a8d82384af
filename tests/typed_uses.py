"""How the types read in an app: checked by mypy and pyright, which `test_types.py` runs; never imported."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import Depends, FastAPI, WebSocket
from pydantic import Field
from redis.asyncio import Redis
from typing_extensions import assert_type

from asgi_sessions import (
    InMemorySessionStore,
    RedisSessionStore,
    Session,
    SessionData,
    SessionFilter,
    SessionMiddleware,
    SessionStore,
    SQLiteSessionStore,
    get_session,
    get_session_data,
    session_dependency,
)


class Shop(SessionData):
    cart: list[str] = Field(default_factory=list)


async def handles(connection: Any) -> None:
    """A handle has the type of its model, and without one that of every record."""
    plain, shop = get_session(connection), get_session(connection, Shop)
    assert_type(plain, Session[SessionData])
    assert_type(plain.data, SessionData)
    assert_type(shop, Session[Shop])
    assert_type(shop.data, Shop)
    assert_type(shop["anything"], Any)
    assert_type(get_session_data(connection, Shop), Shop)
    async with shop.transaction() as data:
        assert_type(data, Shop)
    async with plain.transaction() as record:
        assert_type(record, SessionData)
    await any_handle(plain)
    await any_handle(shop)  # what takes a session takes each


async def any_handle(session: Session) -> None:
    """`Session` alone."""
    assert_type(session, Session[SessionData])
    assert_type(session.data.user_id, "str | None")


async def stores(redis: Redis) -> None:
    """A store has the type of the model that it was given."""
    plain, shop = InMemorySessionStore(), InMemorySessionStore(model=Shop)
    assert_type(plain, InMemorySessionStore[SessionData])
    assert_type(await plain.get("a"), "SessionData | None")
    assert_type(await shop.get("a"), "Shop | None")
    assert_type(SQLiteSessionStore("file.db"), SQLiteSessionStore[SessionData])
    assert_type(SQLiteSessionStore("file.db", model=Shop), SQLiteSessionStore[Shop])
    assert_type(RedisSessionStore(redis), RedisSessionStore[SessionData])
    assert_type(RedisSessionStore("redis://host", model=Shop), RedisSessionStore[Shop])
    await of_shops(shop)
    await of_any(shop)
    await of_any(Own())
    SessionMiddleware(FastAPI(), "key", store=shop, model=Shop)
    SessionMiddleware(FastAPI(), "key", store=Own())


async def of_shops(store: SessionStore[Shop]) -> None:
    """What returns records."""
    assert_type(await store.list_for_user("ada"), list[Shop])
    assert_type(await store.find(SessionFilter()), list[Shop])
    assert_type(await store.get_batch(["a"]), "dict[str, Shop | None]")
    assert_type(await store.get_or_create("a", lambda new: Shop(session_id=new)), Shop)
    async with store.transaction("a") as data:
        assert_type(data, "Shop | None")


async def of_any(store: SessionStore) -> None:
    """`SessionStore` alone."""
    assert_type(store, SessionStore[SessionData])
    assert_type(await store.get("a"), "SessionData | None")


class Own(SessionStore):
    """Somebody's store, written when the class was not generic."""

    async def get(self, session_id: str) -> SessionData | None:
        return await super().get(session_id)


class OwnOfShops(SessionStore[Shop]):
    """One for a model."""

    async def get(self, session_id: str) -> Shop | None:
        return await super().get(session_id)


ShopDep = Annotated[Shop, Depends(session_dependency(Shop))]


async def endpoint(websocket: WebSocket, shop: ShopDep) -> None:
    """A dependency is the record itself."""
    assert_type(shop.cart, list[str])
