"""Where the session of a connection is found, and that of the request that runs here."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any, TypeVar

from ..record.model import SessionData
from .handle import Session

T = TypeVar("T", bound=SessionData)

held: ContextVar[tuple[Session, ...]] = ContextVar("asgi_sessions_held", default=())
"""The sessions whose requests run in this context, innermost last."""


def held_session(store: object, session_id: str) -> Session | None:
    """The handle of the running request that holds this session of this store, if one does."""
    for session in reversed(held.get()):
        unit = session.unit
        if unit is not None and unit.holds(store, session_id):
            return session
    return None


def get_session(connection: Any) -> Session:
    """The session of a request or WebSocket of any framework, or of a bare ASGI scope.

    `RuntimeError` where the middleware is not installed or excluded the path.
    """
    scope = connection if isinstance(connection, dict) else connection.scope
    session = scope.get("session")
    if not isinstance(session, Session):
        raise RuntimeError("no session here: add asgi_sessions.SessionMiddleware, or see its `exclude`")
    session.mark_accessed()
    return session


def get_session_data(connection: Any, model: type[T]) -> T:
    """The typed record of a connection's session; `TypeError` where the middleware has another model."""
    data = get_session(connection).data
    if not isinstance(data, model):
        raise TypeError(f"the middleware's model is {type(data).__name__}: pass it model={model.__name__}")
    return data
