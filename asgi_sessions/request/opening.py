"""A unit of work comes to its record: checks it out, and looks whether this client may see it."""

from __future__ import annotations

import anyio

from ..client.cookie import Reason
from ..observation.events import (
    AMBIGUOUS_COOKIE,
    BAD_SIGNATURE,
    RETIRED_SESSION,
    UNKNOWN_SESSION,
    UNREADABLE_RECORD,
)
from ..stores.checkout import Checkout, LockPolicy, Missing
from .admission import admits
from .commit import let_go
from .settings import Settings
from .work import Work

_MOST_HOPS = 3  # ids that were replaced one after the other while this request was under way
_RETIRED = Missing.RETIRED  # bound once: looking up an Enum's member is slow on Python 3.11
_EVENTS: dict[Missing | Reason, str] = {
    "bad_signature": BAD_SIGNATURE,  # what is absurd was not let in
    "ambiguous": AMBIGUOUS_COOKIE,
    Missing.ABSENT: UNKNOWN_SESSION,
    Missing.RETIRED: RETIRED_SESSION,
    Missing.UNREADABLE: UNREADABLE_RECORD,
}


async def load(work: Work, session_id: str, lock: LockPolicy | None) -> Missing | None:
    """Check the session out. What is absent, or not for this client, leaves a fresh session."""
    settings = work.settings
    taken = await settings.store.checkout(session_id, lock, settings.lifetime, passive=work.passive)
    if taken is _RETIRED and settings.rotate_every is not None:
        taken = await _follow(work, session_id, lock)
    if not isinstance(taken, Checkout):
        forget(work, taken)
        return taken
    work.hold(taken)
    if not admits(settings, work.session, work.client, taken):
        forget(work, Missing.ABSENT)
        with anyio.CancelScope(shield=True):
            await let_go(settings, taken)
        return None
    if settings.arrivals is not None and settings.arrivals.may_be_first(taken):
        await settings.store.arrived(taken)
        settings.arrivals.note(taken.session_id)
    elif taken.idle is not None and not work.passive:
        await settings.store.keep_alive(taken)
    if settings.store.vault is not None:
        await settings.store.encrypt_anew(taken)
    return None


async def _follow(work: Work, session_id: str, lock: LockPolicy | None) -> Checkout | Missing:
    """Check out the session whose id was replaced because it was old, while that leads to the new one.

    The client gets the new cookie by this answer too: the other one may be lost. Where the new id has ended
    or was replaced by a sign-in, the old one leads nowhere.
    """
    settings, taken = work.settings, Missing.RETIRED
    for _ in range(_MOST_HOPS):
        successor = await settings.store.successor_of(session_id)
        if successor is None:
            break
        found = await settings.store.checkout(successor, lock, settings.lifetime, passive=work.passive)
        if isinstance(found, Checkout):
            work.leads_to(successor)
            return found
        taken, session_id = found, successor
    return taken


def forget(work: Work, why: Missing) -> None:
    """There is no record any more: what begins now is another session."""
    work.session.forget()
    work.hold(why)
    work.tell(None)


def note_missing(settings: Settings, why: Missing | Reason, session_id: str | None = None) -> None:
    """Tell the log that the client's cookie leads to no session."""
    settings.events.emit(_EVENTS[why], session_id)
