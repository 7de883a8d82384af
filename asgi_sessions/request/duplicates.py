"""Several valid cookies of our name in one request: which of them counts.

A release that changes the cookie's `domain` or `path` leaves the old cookie in the browser, and a neighbour
(a sibling domain, a longer path) can plant one. Signatures do not tell them apart, the store does.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..client.cookie import AMBIGUOUS, Presented
from ..client.signer import Verified
from ..stores.checkout import Checkout, Lifetime, Missing
from ..stores.contract import SessionStore

_LIKELIEST = (Missing.RETIRED, Missing.UNREADABLE, Missing.ABSENT)


async def settle(
    presented: Presented, store: SessionStore, lifetime: Lifetime, *, follows: bool = False
) -> Presented:
    """The request's one session, from its `rivals`. Costs one look at the store for each, without a lock.

    `follows`: an id that was replaced because it was old is alive while it leads to a session that is.
    """
    found = [(rival, await store.checkout(rival.session_id, None, lifetime)) for rival in presented.rivals]
    live = {record.session_id for _, record in found if isinstance(record, Checkout)}
    for index, (rival, record) in enumerate(found):
        if follows and record is Missing.RETIRED:
            successor = await store.successor_of(rival.session_id)
            if successor is not None and successor not in live:
                found[index] = rival, await store.checkout(successor, None, lifetime)
                live.add(successor)
    return choose(found, only_ours=presented.only_ours)


def choose(found: Sequence[tuple[Verified, Checkout | Missing]], *, only_ours: bool) -> Presented:
    """The one that is alive. Two of them mean that one was planted, so neither counts.

    Where none is, the one whose absence says most: an id that was just replaced, before one that is unknown.
    `leftover` is set where all others are dead and no cookie of our name is somebody else's (`only_ours`).
    """
    live = [rival for rival, record in found if isinstance(record, Checkout)]
    if len(live) > 1:
        return AMBIGUOUS
    missing = [record for _, record in found if isinstance(record, Missing)]
    if live:
        leftover = only_ours and Missing.UNREADABLE not in missing
        return Presented(*live[0], leftover=leftover)
    reason = min(missing, key=_LIKELIEST.index)
    return Presented(*next(rival for rival, record in found if record is reason))
