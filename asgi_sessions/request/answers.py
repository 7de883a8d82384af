"""The answers that the middleware itself gives: generic text, never stored, nothing said about the cause."""

from __future__ import annotations

import logging
from contextlib import suppress

from ..asgi import ASGIApp, Headers, Message, Receive, Scope, Send
from ..errors import (
    ClientGoneError,
    LockAcquisitionError,
    LockLostError,
    LockTimeoutError,
    SessionConflictError,
    SessionDataError,
    SessionError,
    SessionLockError,
    SessionStoreError,
    TooManyWaitersError,
)
from ..observation.events import (
    CLIENT_GONE,
    CONFLICT,
    LOCK_LOST,
    LOCK_TIMEOUT,
    STORE_ERROR,
    TOO_MANY_WAITERS,
    UNCAUGHT_ERROR,
    UNSTORABLE_VALUE,
    EventSink,
)

_TEXTS = {
    400: b"Bad request: the cookies are too large.",
    409: b"The session was changed or ended by another request. Its last changes are not stored; try again.",
    500: b"The session could not be stored.",
    503: b"The session is not available right now. Please try again.",
}
_TYPED_FIELD = "a field of your own model (model=…) may have any type that Pydantic writes and reads back"
_RETRY_AFTER = b"1"  # seconds; a turn comes soon, and a store that is down says so again without cost

_POLICY_VIOLATION, _INTERNAL_ERROR, _TRY_AGAIN_LATER = 1008, 1011, 1013  # RFC 6455 §7.4.1 and its registry
_CLOSE_CODES = {400: _POLICY_VIOLATION, 409: _TRY_AGAIN_LATER, 500: _INTERNAL_ERROR, 503: _TRY_AGAIN_LATER}


def status_of(error: BaseException) -> int | None:
    """The HTTP status by which the middleware answers an error; None for what is the app's own matter."""
    if isinstance(error, LockLostError | SessionConflictError):
        return 409
    if isinstance(error, SessionStoreError | SessionLockError):
        return 503
    return 500 if isinstance(error, SessionDataError) else None


class Answers:
    """Sends the middleware's own answers, or hands them to the app given as `error_response`.

    That app finds the error in `scope["session_error"]`. A WebSocket is closed before it is accepted.
    """

    def __init__(self, error_response: ASGIApp | None, events: EventSink) -> None:
        self._app = error_response
        self._events = events

    async def refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request that is not let in: absurd cookies, a WebSocket from a foreign origin."""
        await self._answer(scope, receive, send, 400, SessionError("the request was refused"))

    async def explain(
        self, scope: Scope, receive: Receive, send: Send, error: BaseException, session_id: str | None
    ) -> None:
        """Answer an error for which `status_of` knows a status, and raise its event."""
        status = status_of(error)
        assert status is not None  # noqa: S101  # the caller asked status_of before
        self._report(error, session_id, scope)
        await self._answer(scope, receive, send, status, error)

    async def hang_up(self, scope: Scope, send: Send, error: SessionError, session_id: str | None) -> None:
        """Close an accepted WebSocket for an error of ours that its app did not catch."""
        self._report(error, session_id, scope)
        with suppress(Exception):  # the client has gone perhaps, and each server says that in its own way
            await send({"type": "websocket.close", "code": _POLICY_VIOLATION, "reason": ""})

    async def _answer(
        self, scope: Scope, receive: Receive, send: Send, status: int, error: BaseException
    ) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": _CLOSE_CODES[status], "reason": ""})
        elif self._app is not None:
            await self._app({**scope, "session_error": error}, receive, send)
        else:
            await send({"type": "http.response.start", "status": status, "headers": _headers(status)})
            await send({"type": "http.response.body", "body": _TEXTS[status], "more_body": False})

    def _report(self, error: BaseException, session_id: str | None, scope: Scope) -> None:
        if isinstance(error, LockTimeoutError):
            self._events.emit(LOCK_TIMEOUT, session_id, level=logging.WARNING, waited=error.waited)
        elif isinstance(error, TooManyWaitersError):
            self._events.emit(TOO_MANY_WAITERS, session_id, level=logging.WARNING, limit=error.limit)
        elif isinstance(error, ClientGoneError):
            self._events.emit(CLIENT_GONE, session_id)
        elif isinstance(error, LockLostError):
            self._events.emit(LOCK_LOST, session_id, level=logging.WARNING)
        elif isinstance(error, SessionConflictError):
            self._events.emit(CONFLICT, session_id, level=logging.WARNING)
        elif isinstance(error, SessionDataError):
            facts = {"path": error.path, "reason": error.reason, "route": route_of(scope)}
            if " of type " in error.reason:
                facts["remedy"] = _TYPED_FIELD
            self._events.emit(UNSTORABLE_VALUE, session_id, level=logging.ERROR, **facts)
        elif isinstance(error, SessionStoreError | LockAcquisitionError):
            self._events.emit(STORE_ERROR, session_id, level=logging.ERROR, error=str(error))
        else:
            what = f"{type(error).__name__}: {error}"
            self._events.emit(
                UNCAUGHT_ERROR, session_id, level=logging.ERROR, error=what, route=route_of(scope)
            )


async def no_body() -> Message:
    """A request whose body has been read, for an `error_response` that asks for it."""
    return {"type": "http.request", "body": b"", "more_body": False}


async def say_nothing() -> Message:
    """What stands for the `receive` of a request that is over."""
    return {"type": "http.disconnect"}


async def hear_nothing(message: Message) -> None:
    """What stands for its `send`."""


def route_of(scope: Scope) -> str:
    """Method and path, as the app declared it where its framework says so: it may hold what is private."""
    template = getattr(scope.get("route"), "path", None)
    return f"{scope.get('method', 'WEBSOCKET')} {template or scope['path']}"


def _headers(status: int) -> Headers:
    headers = [
        (b"content-type", b"text/plain; charset=utf-8"),
        (b"content-length", str(len(_TEXTS[status])).encode()),
        (b"cache-control", b"no-store"),
    ]
    return [*headers, (b"retry-after", _RETRY_AFTER)] if status == 503 else headers
