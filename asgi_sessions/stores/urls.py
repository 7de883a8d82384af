"""The store that a URL names."""

from __future__ import annotations

from weakref import WeakValueDictionary

from .contract import SessionStore
from .memory import InMemorySessionStore

_REDIS_SCHEMES = (
    "redis", "rediss", "valkey", "valkeys", "unix",
    "redis+sentinel", "rediss+sentinel", "redis+cluster", "rediss+cluster",
)  # fmt: skip
_shared: WeakValueDictionary[tuple[str, str], SessionStore] = WeakValueDictionary()


def resolve_store(store: SessionStore | str | None, prefix: str = "session:") -> SessionStore:
    """The store itself, or the one that a URL names, with this key prefix; None is memory.

    Equal URLs give the same store, and so does None, as long as something in this process refers to it. So a
    framework that builds a middleware for each route has one set of sessions. `InMemorySessionStore()` makes
    a store of its own.
    """
    if isinstance(store, SessionStore):
        return store
    if store is not None and not isinstance(store, str):
        made = f"{store.__name__}()" if isinstance(store, type) and issubclass(store, SessionStore) else None
        remedy = f"; make one of it: {made}" if made else ""
        raise TypeError(f"store is a SessionStore or a URL, not {type(store).__name__}{remedy}")
    address = "memory://" if store is None else store, prefix
    known = _shared.get(address)
    if known is None:
        known = _shared[address] = _made(*address)
        known.shared = True
    return known


def _made(store: str, prefix: str) -> SessionStore:
    if store == "memory://":
        return InMemorySessionStore()
    scheme, slashes, _ = store.partition("://")
    if scheme == "sqlite" and slashes:
        from .sqlite.store import SQLiteSessionStore

        return SQLiteSessionStore.from_url(store)
    if scheme not in _REDIS_SCHEMES:
        known = ", ".join(f"{known}://" for known in ("memory", "sqlite", *_REDIS_SCHEMES))
        what = f"unknown store scheme {scheme!r}" if slashes else "not a URL"  # which may hold a password
        raise ValueError(f"{what}: a store's URL begins with one of {known}")
    from .redis.store import RedisSessionStore

    return RedisSessionStore(store, prefix)
