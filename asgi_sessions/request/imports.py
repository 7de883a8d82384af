"""A session that another middleware kept in its cookie is taken over into a record of ours, once."""

from __future__ import annotations

import hmac
from contextlib import suppress
from dataclasses import replace
from logging import WARNING
from typing import Any

from ..client.cookie import OldCookie, Presented
from ..errors import SessionDataError, SessionStoreError
from ..observation.events import IMPORTED, UNKNOWN_SESSION, UNSTORABLE_VALUE
from ..record.codec import encode_checked
from ..record.model import SessionData
from ..record.values import new_session_id
from ..stores.checkout import RETIRED_FOR, Checkout, Lifetime, Missing
from .settings import Settings

_LEADS_TO = "leads_to"  # in a claim: the id of the session into which the cookie was taken over


async def take_over(settings: Settings, presented: Presented, client: str | None) -> Presented:
    """`presented` with the id of the session to which its old cookie leads, or without one.

    The session is stored first, under an id that nobody knows, then a claim under an id that the cookie
    gives. `create` never overwrites, so one of several requests wins, and the others follow its claim. A
    process that dies in between leaves a record whose id nobody was told, and the cookie as good as before.
    The claim outlives the session: what has ended is not begun anew.
    """
    store, old = settings.store, presented.old
    assert old is not None  # noqa: S101  # the caller has looked
    claim = await store.checkout(old.marker, None, None, passive=True)
    if not isinstance(claim, Checkout):
        claim = await _claim(settings, old, client)
    session_id = None
    if isinstance(claim, Checkout):
        with suppress(SessionStoreError):  # unreadable, as by another key
            session_id = _leads_to(store.read(claim.record), claim.age, client)
    if session_id is None:
        settings.events.emit(UNKNOWN_SESSION)
    return replace(presented, session_id=session_id)


async def _claim(settings: Settings, old: OldCookie, client: str | None) -> Checkout | Missing:
    """The claim on this cookie, made now or by a request that was faster; ABSENT where nothing is kept."""
    store, lifetime = settings.store, settings.lifetime
    if not lifetime.ttl() > 0:  # max_age=-1
        return Missing.ABSENT
    session_id, values = new_session_id(), _storable(settings, old.values)
    data = settings.model(session_id=session_id, metadata=values, fingerprint=client)
    await store.create(session_id, store.encode(data), lifetime, None)
    claim = settings.model(session_id=old.marker, metadata={_LEADS_TO: session_id}, fingerprint=client)
    made = await store.create(old.marker, store.encode(claim), Lifetime(absolute=old.expires_in), None)
    if made is not None:
        settings.events.emit(IMPORTED, session_id)
        return made
    await store.delete(session_id)
    return await store.checkout(old.marker, None, None, passive=True)


def _leads_to(claim: SessionData, age: float | None, client: str | None) -> str | None:
    """Where a claim leads this client.

    For a minute it leads everybody there: the requests of a page. Later, only the client that the session is
    bound to. Two visitors may have the very same cookie, made in the same second.
    """
    session_id: str | None = claim.metadata.get(_LEADS_TO)
    if (age or 0) <= RETIRED_FOR:
        return session_id
    is_same = client is not None and hmac.compare_digest(claim.fingerprint or "", client)
    return session_id if is_same else None


def _storable(settings: Settings, values: dict[str, Any]) -> dict[str, Any]:
    """The values that a record can hold; of the others the log has the names."""
    if _fits(settings, values):
        return values
    kept = {name: value for name, value in values.items() if _fits(settings, {name: value})}
    if not _fits(settings, kept):  # together they are too large
        kept = {}
    lost = ", ".join(sorted(values.keys() - kept.keys()))
    settings.events.emit(UNSTORABLE_VALUE, level=WARNING, values=lost, remedy=_LEFT_OUT)
    return kept


_LEFT_OUT = "a session was taken over from a cookie without these values, which a record cannot hold"


def _fits(settings: Settings, values: dict[str, Any]) -> bool:
    try:
        encode_checked(settings.model(session_id=new_session_id(), metadata=values))
    except (ValueError, SessionDataError):
        return False
    return True
