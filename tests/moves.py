"""The second half of a move, by itself: the old record goes, and its id is remembered as replaced."""

from __future__ import annotations

from asgi_sessions import RedisSessionStore
from asgi_sessions.stores.checkout import Checkout, Outcome
from asgi_sessions.stores.redis.commands.header import RETIRED_MS


async def retire(store: RedisSessionStore, taken: Checkout) -> Outcome:
    """Remove a checked-out record as a move does that has stored its successor; what became of that."""
    return await (await store._states.get()).checkouts.discard(taken, RETIRED_MS)
