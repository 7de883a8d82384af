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
    if not isinstance(taken, Checkout):
        forget(work, taken)
        return taken
    work.hold(taken)
    if not admits(settings, work.session, work.client, taken):
        forget(work, Missing.ABSENT)
        with anyio.CancelScope(shield=True):
            await let_go(settings, taken)
        return None
    if taken.idle is not None and not work.passive:
        await settings.store.keep_alive(taken)
    if settings.store.vault is not None:
        await settings.store.encrypt_anew(taken)
    return None


def forget(work: Work, why: Missing) -> None:
    """There is no record any more: what begins now is another session."""
    work.session.forget()
    work.hold(why)
    work.tell(None)


def note_missing(settings: Settings, why: Missing | Reason, session_id: str | None = None) -> None:
    """Tell the log that the client's cookie leads to no session."""
    settings.events.emit(_EVENTS[why], session_id)
