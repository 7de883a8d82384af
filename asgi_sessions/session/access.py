"""Where the session of a connection is found, typed by the app's model."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, overload

from ..record.model import M, SessionData
from .handle import Session


@overload
def get_session(connection: Any) -> Session: ...


@overload
def get_session(connection: Any, model: type[M]) -> Session[M]: ...


def get_session(connection: Any, model: type[SessionData] = SessionData) -> Session:
    """The session of a request or WebSocket of any framework, or of a bare ASGI scope.

    With a `model` its `data` and `transaction()` have that type; `TypeError` where the middleware has another
    model. `RuntimeError` where the middleware is not installed or excluded the path.
    """
    scope = connection if isinstance(connection, dict) else connection.scope
    session = scope.get("session")
    if not isinstance(session, Session):
        raise RuntimeError("no session here: add asgi_sessions.SessionMiddleware, or see its `exclude`")
    if model is not SessionData and not issubclass(session.model, model):
        raise TypeError(f"the middleware's model is {session.model.__name__}: pass it model={model.__name__}")
    session.mark_accessed()
    return session


def get_session_data(connection: Any, model: type[M]) -> M:
    """The typed record of a connection's session; raises what `get_session` raises."""
    return get_session(connection, model).data


def session_dependency(model: type[M]) -> Callable[[Any], Awaitable[M]]:
    """`get_session_data` as a dependency, for FastAPI's `Depends`: of requests and of WebSockets.

        ShopSessionDep = Annotated[ShopSession, Depends(session_dependency(ShopSession))]

    Needs Starlette, which FastAPI brings. It is a coroutine function, so that it costs no thread.
    """
    from starlette.requests import HTTPConnection

    async def session_data(connection: Any) -> M:
        return get_session_data(connection, model)

    session_data.__annotations__ = {"connection": HTTPConnection, "return": model}  # FastAPI goes by them
    return session_data
