"""The requests that run in this context: a store operates on the record that one of them holds."""

from __future__ import annotations

from collections.abc import Coroutine
from contextlib import AbstractAsyncContextManager
from contextvars import ContextVar
from typing import Any, Protocol, TypeVar

from ..asgi import Scope
from ..record.model import SessionData
from .holders import Holder

T = TypeVar("T")


class RunningRequest(Protocol):
    """A request with its session, as a store sees it."""

    def holds(self, store: object, session_id: str) -> bool:
        """Whether this code may change this session of this store as a part of the request."""
        ...

    def is_still(self, store: object, session_id: str) -> bool:
        """The same, and the app has not ended the session."""
        ...

    def part(self) -> AbstractAsyncContextManager[SessionData]:
        """A transaction whose changes are stored with the request."""
        ...

    async def keep_alive(self) -> None:
        """Restart the idle timeout of the record."""

    @property
    def scope(self) -> Scope:
        """The connection's; empty when the request is over."""
        ...

    @property
    def route(self) -> str:
        """Its method and path; empty when it is over."""
        ...

    def has_waited(self, session_id: str, holder: Holder, waiting: int) -> None:
        """Tell the log who holds the lock that it has waited for a second, and how many wait."""
        ...

    def wait_with_client(self, turn: Coroutine[Any, Any, T]) -> Coroutine[Any, Any, T]:
        """Wait for a turn; `ClientGoneError` if the request has only begun and its client goes meanwhile."""
        ...


running: ContextVar[tuple[RunningRequest, ...]] = ContextVar("asgi_sessions_running", default=())
"""The innermost last."""


def holder_of(store: object, session_id: str) -> RunningRequest | None:
    """The running request that holds this session of this store, if one does."""
    return next((each for each in reversed(running.get()) if each.holds(store, session_id)), None)


def while_client_stays(turn: Coroutine[Any, Any, T]) -> Coroutine[Any, Any, T]:
    """Wait for the lock of a session, in a request that has only begun no longer than its client stays.

    A store calls it where a checkout has to wait. `ClientGoneError` then, and the waiter leaves the queue.
    """
    requests = running.get()
    return requests[-1].wait_with_client(turn) if requests else turn
