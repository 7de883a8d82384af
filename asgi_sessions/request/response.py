"""What HTTP and WebSocket answers carry for the session: its cookie, `Vary`, the text of an error."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Awaitable

from ..asgi import Headers, Message, Receive
from ..client.caching import Sharing, restrain, sharing, vary_cookie
from ..client.paths import path_requested
from ..errors import SessionStoreError
from ..observation.events import COOKIE_CLASH, COOKIE_DROPPED
from ..stores.checkout import Checkout
from .accept import server_without_accept_headers
from .answers import status_of
from .commit import remaining
from .state import News
from .unit import UnitOfWork

_ANOTHER_NAME = (
    "something inside this middleware sets a cookie of the same name, which ends our sessions:"
    " give one of the two another session_cookie"
)
_BY_HTTP_FIRST = (
    "this server does not send the headers of a WebSocket's accept, so the session's cookie is lost: begin"
    " the session, sign in and sign out by HTTP, or take uvicorn or Hypercorn"
)
# bound once: looking up an Enum's member costs ten times a global on Python 3.11, and each request does it
_NOTHING, _REFRESH, _TOLD = News.NOTHING, News.REFRESH, News.TOLD


def send_start(unit: UnitOfWork, start: Message) -> Awaitable[None]:
    """Send the start of the app's answer with the session's headers."""
    if unit.news is _REFRESH:
        return _send_prolonged(unit, start)
    return unit.to_client(dressed(unit, start))  # no local may show the cookie


async def _send_prolonged(unit: UnitOfWork, start: Message) -> None:
    if not await _prolong(unit):
        unit.news = _NOTHING
    await unit.to_client(dressed(unit, start))


async def _prolong(unit: UnitOfWork) -> bool:
    """Whether the store still has the record under its id, so that its cookie may be sent again.

    A sign-in meanwhile has given the client another cookie, which an answer that was on its way without the
    lock would overwrite. False too if the store cannot tell. The link to its user is renewed with the cookie.
    """
    taken, store = unit.record, unit.settings.store
    if not isinstance(taken, Checkout):
        return False
    user = store.user_in(taken, unit.session.stored_user)
    try:
        found = await store.checkout(taken.session_id, None, None, passive=True)
        if isinstance(found, Checkout) and user is not None:
            left = remaining(unit.settings, taken, unit.held_since)
            await store.link_user(user, taken.session_id, left)
    except SessionStoreError:
        return False
    return isinstance(found, Checkout)


def dressed(unit: UnitOfWork, start: Message) -> Message:
    """The answer's start with the session's headers. From now on the client has been told."""
    settings = unit.settings
    headers: Headers = list(start.get("headers", ()))
    if unit.session.accessed:
        vary_cookie(headers)
    if settings.cookie.is_set_by(headers):
        settings.events.warn_once(COOKIE_CLASH, _ANOTHER_NAME)
    cookies = [] if unit.news is _NOTHING else _cookies(unit, headers, start.get("status"))
    unit.news = _TOLD
    if cookies:
        headers += [(b"set-cookie", line) for line in cookies]
        restrain(headers, time.time())
        if start["type"] == "websocket.accept":
            _warn_if_dropped(unit)
    return {**start, "headers": headers}


async def fail(unit: UnitOfWork, error: Exception) -> None:
    """Nothing more is stored; the error is answered where it is the session's, else it rises."""
    await unit.roll_back()
    if unit.news is _TOLD or status_of(error) is None:
        raise error
    await explain(unit, error, unit.receive)


async def explain(unit: UnitOfWork, error: Exception, receive: Receive) -> None:
    """Answer the error. What `save` has stored before, the client must learn all the same."""

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start" and unit.news not in (_NOTHING, _REFRESH, _TOLD):
            message = dressed(unit, message)
        unit.news = _TOLD
        await unit.to_client(message)

    session_id = unit.presented.session_id
    await unit.settings.answers.explain(unit.scope, receive, send, error, session_id)


def _cookies(unit: UnitOfWork, headers: Headers, status: int | None) -> list[bytes]:
    """The `Set-Cookie` values, ours the last; an old middleware's cookie goes when the session does."""
    cookie, old = _cookie(unit, headers, status), unit.settings.old_cookies
    lines = [] if cookie is None else [*_leftovers(unit), cookie]
    if old is not None and unit.news in (News.REMOVE, News.DROP):
        lines = old.removals(secure=_is_secure(unit)) + lines
    return lines


def _cookie(unit: UnitOfWork, headers: Headers, status: int | None) -> bytes | None:
    """The Set-Cookie value, where the client must learn something.

    What it knows already is not sent again with an answer that the app lets caches keep for others, nor with
    one that tells them to use what they have kept (304).
    """
    news, cookie, presented = unit.news, unit.settings.cookie, unit.presented.session_id
    if isinstance(news, str):
        return cookie.render(news, max_age=_max_age(unit), secure=_is_secure(unit))
    if news is News.REMOVE and presented is not None:
        return cookie.render_removal(secure=_is_secure(unit))
    if news is not _REFRESH or presented is None or status == 304:
        return None
    if sharing(headers, time.time()) is Sharing.ALLOWED:
        return None
    issued_at = None if unit.settings.rotate_every is None else unit.presented.issued_at
    return cookie.render(presented, max_age=_max_age(unit), secure=_is_secure(unit), issued_at=issued_at)


def _max_age(unit: UnitOfWork) -> float | None:
    """Seconds that the client may keep the cookie; None if there is no absolute bound."""
    taken = unit.record
    if not isinstance(taken, Checkout) or taken.expires_in is None:
        return unit.settings.max_age
    return math.ceil(taken.expires_in - (time.monotonic() - unit.held_since))


def _leftovers(unit: UnitOfWork) -> list[bytes]:
    """What makes the browser forget dead cookies that it sent beside the live one."""
    if not unit.presented.leftover or unit.shares_name:
        return []
    return unit.settings.cookie.render_leftover_removals(path_requested(unit.scope), secure=_is_secure(unit))


def _warn_if_dropped(unit: UnitOfWork) -> None:
    server = server_without_accept_headers(unit.scope, unit.receive)
    events = unit.settings.events
    if server is not None and events.is_first(COOKIE_DROPPED):
        events.emit(COOKIE_DROPPED, level=logging.WARNING, server=server, remedy=_BY_HTTP_FIRST)


def _is_secure(unit: UnitOfWork) -> bool:
    return unit.scope.get("scheme") in ("https", "wss")
