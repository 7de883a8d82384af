"""Sessions that a test makes, looks at and ends, in the store of the app and by the rules of its middleware.

All of it is synchronous and works in any test, whether an event loop is running or not: the store is asked in
a loop of its own, in a thread that ends before the function returns. The stores of this package serve several
loops; a store of your own has to, too.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar, overload
from uuid import UUID

import anyio

from ..record.codec import decode
from ..record.model import SessionData
from ..request.duplicates import settle
from ..request.settings import Settings
from ..session.handle import Session
from ..stores.checkout import Checkout
from .clients import app_of, header_of
from .finding import middleware_of

_PATIENCE = 15  # seconds
T = TypeVar("T")
Model = TypeVar("Model", bound=SessionData)


def session_cookie(
    middleware_or_app: object, /, user_id: str | int | UUID | None = "ada", **values: object
) -> dict[str, str]:
    """Store a session of this user, and return its cookie as `{name: value}`, for any client.

    A value with the name of a field of the middleware's model sets that field, any other is one of the dict;
    `user_id=None` signs nobody in. It lives as long as one that the app begins now, and belongs to no client:
    what address and user agent a test client has does not matter. For a test of the fingerprint sign in by a
    request to the app.

    `ValueError` for a session without a user and values, which no app could have begun, for a user id or a
    field's value that is refused, and where the app has no middleware. `SessionDataError` for a value that
    cannot be stored, `SessionStoreError` where the store is down.
    """
    settings = middleware_of(middleware_or_app)._settings
    session_id = begin(settings, user_id, values)
    return {settings.cookie.name: settings.cookie.signer.sign(session_id)}


@overload
def session_of(source: object, *, app: object | None = None) -> SessionData | None: ...
@overload
def session_of(source: object, model: type[Model], *, app: object | None = None) -> Model | None: ...
def session_of(
    source: object, model: type[SessionData] = SessionData, *, app: object | None = None
) -> SessionData | None:
    """The typed record of a client's session as it is stored now; its `metadata` are the dict's values.

    `source` is a client, whose cookies count; an answer, with `app`, for the session that it left; or a dict
    of cookies. None where there is none: no cookie or one that is not signed by the app, a session that has
    expired or was ended or never begun, an id that was replaced. Neither takes the lock nor counts as
    activity, and does not ask whose client it is. `TypeError` where the middleware has another model.
    """
    settings = middleware_of(app_of(source, app))._settings
    record = run_now(lambda: _load(settings, header_of(source, settings.cookie.name)))
    if record is None:
        return None
    data = decode(settings.model, record)
    if not isinstance(data, model):
        raise TypeError(f"the middleware's model is {type(data).__name__}: pass it model={model.__name__}")
    return data


def end_session(source: object, *, app: object | None = None) -> bool:
    """End a client's session now, as somebody else would; False where it has none.

    A session that was ended elsewhere, evicted or expired is the same to an app: absent. The client keeps its
    cookie. Nobody is waited for: a request that is under way finds its change refused. `source` and `app` are
    those of `session_of`.
    """
    settings = middleware_of(app_of(source, app))._settings
    return run_now(lambda: _end(settings, header_of(source, settings.cookie.name)))


def begin(settings: Settings, user_id: str | int | UUID | None, values: dict[str, object]) -> str:
    """Store a new session and return its id; see `session_cookie`."""
    if user_id is None and not values:
        raise ValueError("an empty session is never stored: give it a user_id or a value")
    if not settings.lifetime.ttl() > 0:
        raise ValueError("with this middleware's max_age every session has expired when it begins")
    handle = Session((), settings.model)
    for name, value in values.items():
        if name in settings.model.model_fields:
            setattr(handle.data, name, value)
        else:
            handle[name] = value
    if user_id is not None:
        handle.login(user_id)
    store, who = settings.store, handle.identity()
    record = store.sealed(who.session_id, handle.seal())
    user = None if who.user_id is None else store.name_of(who.user_id)
    run_now(lambda: store.create(who.session_id, record, settings.lifetime, None, user))
    return who.session_id


def run_now(work: Callable[[], Awaitable[T]]) -> T:
    """What an async function returns, from a plain one, also where an event loop is running.

    That loop stands still meanwhile. `TimeoutError` where the work waits for it: it would wait for ever.
    """
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(anyio.run, _in_time, work).result()


async def _in_time(work: Callable[[], Awaitable[T]]) -> T:
    with anyio.move_on_after(_PATIENCE):
        return await work()
    raise TimeoutError(
        f"the store did not answer within {_PATIENCE} s, asked from another event loop than the test's. It"
        " may be bound to that one, or a request is in the middle of an operation there: let that request go"
        " on first, or await an operation of the store itself"
    )


async def _load(settings: Settings, header: str) -> bytes | None:
    session_id = await _id_of(settings, header)
    if session_id is None:
        return None
    found = await settings.store.checkout(session_id, None, settings.lifetime, passive=True)
    return settings.store.opened(found) if isinstance(found, Checkout) else None


async def _end(settings: Settings, header: str) -> bool:
    session_id = await _id_of(settings, header)
    return session_id is not None and await settings.store.delete(session_id)


async def _id_of(settings: Settings, header: str) -> str | None:
    presented = settings.cookie.read(header.encode("latin-1", "replace"))
    if presented.rivals:
        presented = await settle(presented, settings.store, settings.lifetime)
    return presented.session_id
