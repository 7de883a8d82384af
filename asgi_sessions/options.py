"""The middleware's keyword arguments, checked once: what is wrong fails here, with the remedy."""

from __future__ import annotations

import fnmatch
import inspect
import math
import re
from collections.abc import Callable, Iterable
from typing import TypeAlias

from pydantic import ValidationError

from .data import SessionData
from .fields import new_session_id
from .stores.base import SessionStore
from .stores.checkout import Lifetime
from .stores.local import LockPolicy
from .stores.memory import InMemorySessionStore
from .types import Scope

Pattern: TypeAlias = "str | re.Pattern[str]"
Routes: TypeAlias = "Iterable[Pattern] | Callable[[Scope], bool] | Pattern"

_REDIS_SCHEMES = (
    "redis", "rediss", "valkey", "valkeys", "unix",
    "redis+sentinel", "rediss+sentinel", "redis+cluster", "rediss+cluster",
)  # fmt: skip


def resolve_store(store: SessionStore | str | None, prefix: str = "session:") -> SessionStore:
    """The store itself, or the one that a URL names, there with this key prefix; None is memory."""
    if isinstance(store, SessionStore):
        return store
    if store is None or store == "memory://":
        return InMemorySessionStore()
    if not isinstance(store, str):
        raise TypeError(f"store is a SessionStore or a URL, not {type(store).__name__}")
    scheme, slashes, _ = store.partition("://")
    if scheme not in _REDIS_SCHEMES:
        known = ", ".join(f"{known}://" for known in ("memory", *_REDIS_SCHEMES))
        what = f"unknown store scheme {scheme!r}" if slashes else "not a URL"  # which may hold a password
        raise ValueError(f"{what}: a store's URL begins with one of {known}")
    from .stores.redis import RedisSessionStore  # here, because redis is an optional dependency

    return RedisSessionStore(store, prefix)


def resolve_model(model: type[SessionData]) -> type[SessionData]:
    """The model, if a session can begin with nothing but an id."""
    if not (isinstance(model, type) and issubclass(model, SessionData)):
        raise TypeError("model is a subclass of asgi_sessions.SessionData")
    try:
        model(session_id=new_session_id())
    except ValidationError as error:
        fields = ", ".join(str(item["loc"][0]) for item in error.errors() if item["loc"])
        raise ValueError(f"a session begins empty: give the model defaults for {fields}") from error
    return model


def resolve_lifetime(
    max_age: int | None, idle_timeout: float | None, rolling: bool, store: SessionStore
) -> Lifetime:
    """The store's rule. Rolling sessions have no absolute bound: `max_age` is an idle timeout then.

    A browser-session cookie (`max_age=None`) without an idle timeout lives `store.default_ttl` seconds after
    its last request: the browser never tells that it was closed.
    """
    _require_numbers(max_age=max_age, idle_timeout=idle_timeout)
    if max_age is not None and max_age < -1:
        raise ValueError("max_age is a number of seconds, None for a browser-session cookie, or -1 for none")
    if idle_timeout is not None and not idle_timeout > 0:
        raise ValueError("idle_timeout is a number of seconds above 0, or None")
    if max_age is None:
        return Lifetime(idle=store.default_ttl if idle_timeout is None else idle_timeout)
    if rolling:
        return Lifetime(idle=max_age if idle_timeout is None else min(max_age, idle_timeout))
    return Lifetime(absolute=max_age, idle=idle_timeout)


def resolve_lock(timeout: float, wait: float, max_waiters: int, max_hold: float) -> LockPolicy:
    """The lock's times (seconds) and bounds."""
    _require_numbers(lock_timeout=timeout, lock_wait=wait, max_waiters=max_waiters, lock_max_hold=max_hold)
    if not timeout > 0:
        raise ValueError("lock_timeout is the lease in seconds and above 0; lock=False turns locking off")
    if not wait >= 0:
        raise ValueError("lock_wait is a number of seconds, 0 for not waiting at all")
    if max_waiters < 0:
        raise ValueError("max_waiters is a number of waiting requests, 0 for none")
    if max_hold < timeout:
        raise ValueError("lock_max_hold is at least lock_timeout: a lease is not cut short")
    return LockPolicy(timeout=timeout, wait=wait, max_waiters=max_waiters, max_hold=max_hold)


def resolve_routes(name: str, routes: Routes) -> Callable[[Scope], bool] | None:
    """A predicate of the scope, from one or from path patterns (`/static/*`, or compiled expressions).

    None where there are no patterns.
    """
    if callable(routes):
        if inspect.iscoroutinefunction(routes):
            raise TypeError(f"{name} is a plain function of the scope: a coroutine would always count as yes")
        return routes
    patterns = [routes] if isinstance(routes, str | re.Pattern) else list(routes)
    for pattern in patterns:
        if not isinstance(pattern.pattern if isinstance(pattern, re.Pattern) else pattern, str):
            raise TypeError(f"{name}: a path pattern is a str or a compiled expression of str: {pattern!r}")
        if isinstance(pattern, str) and not pattern.startswith(("/", "*")):
            raise ValueError(f"{name}: the path pattern {pattern!r} never matches: begin it with / or *")
    if not patterns:
        return None
    compiled = [re.compile(fnmatch.translate(p)) if isinstance(p, str) else p for p in patterns]
    return lambda scope: any(pattern.match(scope["path"]) for pattern in compiled)


def resolve_origins(origins: Iterable[str] | None) -> frozenset[bytes] | None:
    """Exact origins as browsers send them (RFC 6454 §6.2): lower case, no path, no trailing slash."""
    if origins is None:
        return None
    if isinstance(origins, str):
        raise ValueError(f"allowed_origins is a collection of origins: [{origins!r}]")
    known = list(origins)
    for origin in known:
        if not re.fullmatch(r"[a-z][a-z0-9+.-]*://[!-+\-.0-~]+", str(origin)):
            raise ValueError(
                f"allowed_origins: {origin!r} is no origin, write https://host or https://host:port"
            )
    return frozenset(origin.lower().encode() for origin in known)


def _require_numbers(**given: object) -> None:
    for name, value in given.items():
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"{name} is a number, not {value!r}")
        if not math.isfinite(value):
            raise ValueError(f"{name} is a finite number, not {value!r}")
