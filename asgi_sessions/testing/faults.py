"""The faults that an app has to live with, for the length of a `with` block.

Each of them changes what the operations of the app's store do, whatever store it is, and also for a request
that has begun before the block. The store itself is real, and so is what the middleware makes of it.
"""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import Any, TypeAlias

from ..errors import LockAcquisitionError, SessionStoreError
from ..stores.checkout import Checkout, LockPolicy, Missing, Outcome
from ..stores.contract import SessionStore
from ..stores.running import running
from .clients import app_or_client
from .finding import middleware_of

_STAYS_UP = ("open", "aclose", "release", "renew", "health_check")
_COMMITS = ("commit", "commit_unlocked", "move", "discard")
_THIEF = LockPolicy(wait=5.0)  # seconds; whoever has the lock until then has taken it over as well

_Operation: TypeAlias = Callable[..., Any]


@contextmanager
def store_down(app_or_test_client: object) -> Iterator[None]:
    """Within the block every operation of the app's store raises `SessionStoreError`.

    So requests with a session are answered 503, and so is one that begins a session; others are served.
    `health_check()` says that the store is not healthy. Locks are let go all the same, as they are when a
    store is back. Afterwards everything is as before.
    """
    store = middleware_of(app_or_client(app_or_test_client)).store
    kind = type(store)
    down: dict[str, _Operation] = {"health_check": _unhealthy}
    for name in dir(kind):
        operation = inspect.getattr_static(kind, name)
        if name.startswith("_") or name in _STAYS_UP:
            continue
        if inspect.isasyncgenfunction(operation):
            down[name] = _fail_to_list
        elif inspect.iscoroutinefunction(operation):
            down[name] = _fail
    with _instead(store, down):
        yield


@contextmanager
def lock_lost(app_or_test_client: object) -> Iterator[None]:
    """Within the block a request that changes its session finds that its lock was taken over by another.

    Its change is refused and answered 409, `save()` raises `LockLostError`, and the event is `lock_lost`. A
    request that holds no lock loses none: one that begins a session, or one with `lock=False`.
    """
    store = middleware_of(app_or_client(app_or_test_client)).store

    async def take_over(commit: _Operation, checkout: Checkout, *given: Any, **named: Any) -> Outcome:
        thief = await _take_over(store, checkout)
        try:
            return await _within(commit, checkout, *given, **named)
        finally:
            if isinstance(thief, Checkout):
                await store.release(thief)

    with _before_commits(store, take_over):
        yield


@contextmanager
def ended_meanwhile(app_or_test_client: object) -> Iterator[None]:
    """Within the block a request that changes its session finds that it was ended elsewhere meanwhile.

    Its change is refused and answered 409, and `save()` raises `SessionConflictError`; the session is gone. A
    request that only reads, and one that begins a session, sees nothing of it. `end_session` ends one now.
    """
    store = middleware_of(app_or_client(app_or_test_client)).store

    async def end_first(commit: _Operation, checkout: Checkout, *given: Any, **named: Any) -> Outcome:
        await store.delete(checkout.session_id)
        return await _within(commit, checkout, *given, **named)

    with _before_commits(store, end_first):
        yield


async def _fail(*given: object, **named: object) -> None:
    raise SessionStoreError("the store is down, as the test wants it (asgi_sessions.testing.store_down)")


async def _fail_to_list(*given: object, **named: object) -> AsyncIterator[str]:
    await _fail()
    yield ""


async def _unhealthy(*given: object, **named: object) -> dict[str, object]:
    operations = dict.fromkeys(("set", "get", "delete"), False)
    return {"healthy": False, "operations": operations, "error": "the store is down, as the test wants it"}


async def _take_over(store: SessionStore, checkout: Checkout) -> Checkout | Missing | None:
    """Take the lock from a request that does not know of it; None where there is none, or a waiter has it."""
    if checkout.token is None:
        return None
    current = running.set(())  # it is no part of that request
    try:
        await store.release(replace(checkout))
        return await store.checkout(checkout.session_id, _THIEF, None, passive=True)
    except LockAcquisitionError:
        return None
    finally:
        running.reset(current)


_inside: ContextVar[bool] = ContextVar("asgi_sessions_testing_inside", default=False)
"""Whether an operation is under way to which something was done: those that it calls are parts of it."""


async def _within(commit: _Operation, *given: Any, **named: Any) -> Outcome:
    current = _inside.set(True)
    try:
        outcome: Outcome = await commit(*given, **named)
    finally:
        _inside.reset(current)
    return outcome


@contextmanager
def _before_commits(store: SessionStore, around: Callable[..., Awaitable[Outcome]]) -> Iterator[None]:
    """Have `around(operation, …)` called in place of each operation that changes a checked-out record."""

    def replaced(operation: _Operation) -> _Operation:
        async def run(*given: Any, **named: Any) -> Outcome:
            if _inside.get():
                outcome: Outcome = await operation(*given, **named)
                return outcome
            return await around(operation, *given, **named)

        return run

    with _instead(store, {name: replaced(getattr(store, name)) for name in _COMMITS}):
        yield


@contextmanager
def _instead(store: SessionStore, operations: dict[str, _Operation]) -> Iterator[None]:
    """Put these in the place of the store's operations, for a block."""
    own = vars(store)
    before = {name: own[name] for name in operations if name in own}
    own.update(operations)
    try:
        yield
    finally:
        for name in operations:
            own.pop(name, None)
        own.update(before)
