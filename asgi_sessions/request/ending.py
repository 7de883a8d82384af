"""Waits for the end of a session that somebody else may end, while its own request may give it a new id."""

from __future__ import annotations

from ..stores.checkout import Checkout
from .commits import commit_is_over
from .work import Work


async def until_ended(work: Work) -> None:
    """Return when the record that the request has is not there any more, and has no successor here."""
    waited_for = None
    while True:
        await commit_is_over(work)  # which may be the one that ended it, or gives it another id
        taken = work.record
        if not isinstance(taken, Checkout) or taken.session_id == waited_for:
            return
        waited_for = taken.session_id
        await work.settings.store.until_ended(waited_for)
