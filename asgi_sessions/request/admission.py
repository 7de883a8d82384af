"""Whether this client may see the record that its cookie leads to."""

from __future__ import annotations

import hmac
from logging import INFO, WARNING

from ..observation.events import FINGERPRINT_MISMATCH, UNREADABLE_RECORD
from ..record.codec import misfit
from ..record.vault import is_sealed
from ..session.handle import Session
from ..stores.checkout import Checkout
from .settings import Settings

_KEYS = "keep the old key behind the new one in encryption_keys until its records have expired"
_OLD_RECORDS = "let the model read old records: a validator (mode='before') or another name for what changed"


def admits(settings: Settings, session: Session, client: str | None, taken: Checkout) -> bool:
    """Load the handle; False, and an event, if the record is unreadable or belongs to another client."""
    emit = settings.events.emit
    try:
        session.load(settings.store.opened(taken))
        identity = session.identity()
        session_id, bound_to = identity.session_id, identity.fingerprint
    except ValueError as error:
        if is_sealed(taken.record):
            emit(UNREADABLE_RECORD, taken.session_id, level=WARNING, error=str(error), remedy=_KEYS)
            return False
        why = misfit(settings.model, error)
        first = settings.events.is_first(UNREADABLE_RECORD, why.model, why.field)
        level = WARNING if first else INFO  # each such user is signed out, so one warning is enough
        emit(UNREADABLE_RECORD, taken.session_id, level=level, **why._asdict(), remedy=_OLD_RECORDS)
        return False
    if session_id != taken.session_id:
        emit(UNREADABLE_RECORD, taken.session_id)
        return False
    if client is None or bound_to is None or _same(bound_to, client):
        return True
    if not settings.reports_mismatch or session.note_client_change():
        emit(FINGERPRINT_MISMATCH, session_id)
    return settings.reports_mismatch


def _same(bound_to: str, client: str) -> bool:
    """Compare in constant time: a fingerprint is a hash of what another client sends."""
    try:
        return hmac.compare_digest(bound_to, client)
    except TypeError:  # not ASCII, so not one of ours
        return False
