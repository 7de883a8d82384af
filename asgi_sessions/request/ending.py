"""Waits for the end of a session that somebody else may end, while its own request may give it a new id."""

from __future__ import annotations

from ..stores.checkout import Checkout
from .commits import commit_is_over
from .work import Work


async def until_ended(work: Work) -> None:
    """Return when the record that the request has is not there any more, and has no successor here.

    An id that was replaced only because it was old (`rotate_every`) has not ended: the new one is waited for.
    """
    settings, waited_for = work.settings, None
    while True:
        await commit_is_over(work)  # which may be the one that ended it, or gives it another id
        taken = work.record
        if not isinstance(taken, Checkout) or taken.session_id == waited_for:
            return
        following: str | None = taken.session_id
        waited_for = taken.session_id
        while following is not None:
            await settings.store.until_ended(following)
            rotates = settings.rotate_every is not None
            following = await settings.store.successor_of(following) if rotates else None
