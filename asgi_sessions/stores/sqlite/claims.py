"""What a call asks for, in the values of its operation; and what its outcome says."""

from __future__ import annotations

from ...record.model import SessionData
from ..checkout import Checkout, Lifetime, LockPolicy, Outcome
from ..running import running
from ..tokens import new_token
from .columns import Columns, columns_of, have_same_columns
from .operations import Claim, New
from .transaction import Waiter

_REFUSED = (Outcome.CONFLICT, Outcome.LOST, Outcome.BUSY)


def route() -> str:
    """Of the request that asks, if one does."""
    requests = running.get()
    return requests[-1].route if requests else ""


def new_of(
    session_id: str, record: bytes, lifetime: Lifetime | None, lock: LockPolicy | None, user: str | None
) -> New:
    """A new record in which this user is signed in, to be locked for the caller unless `lock` is None."""
    columns = columns_of(record)._replace(user_id=user)
    owner = None
    if lock is not None:
        owner = Waiter(session_id, new_token().decode(), lock, None, 0.0, None, route())
    return New(session_id, record, columns, lifetime, owner)


def record_of(data: SessionData, record: bytes, user: str | None) -> New:
    """A record as `set` stores it."""
    columns = columns_of(record)._replace(user_id=user)
    return New(data.session_id, record, columns, None, None)


def changed_columns(checkout: Checkout, record: bytes) -> Columns | None:
    """The columns of a record; None where they are those of the record that was loaded, and lies there."""
    if checkout.unsure is None and have_same_columns(record, checkout.record):
        return None
    return columns_of(record)


def claim_of(checkout: Checkout) -> Claim:
    """What a checkout may change."""
    earlier = () if checkout.unsure is None else checkout.unsure.split()
    return Claim(checkout.session_id, checkout.token, (checkout.version, *earlier))


def as_far_as_known(outcome: Outcome, unsure: str | None) -> Outcome:
    """A refusal may be of our own earlier commit, whose outcome is not known: it says nothing of that."""
    if unsure is not None and outcome in _REFUSED:
        return Outcome.UNSURE
    return outcome
