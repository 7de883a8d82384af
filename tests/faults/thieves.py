"""Clients that hold on to sessions by all means, in a process of their own.

    python -m faults.thieves URL MOVERS SIGNERS

It reads a line with the ids of `MOVERS` sessions of ada's, and gives each a new id again and again as the
middleware does it, while `SIGNERS` tasks sign ada in and move on at once. It says `ready` when they have
moved, and when its input ends how often they moved and which sessions it still has, as JSON.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from asgi_sessions import RedisSessionStore, SessionData, SessionStoreError
from asgi_sessions.record.codec import encode_checked
from asgi_sessions.record.values import new_session_id
from asgi_sessions.stores.checkout import Checkout, Lifetime, LockPolicy, Outcome

LIFE = Lifetime(absolute=3600)
LOCK = LockPolicy(timeout=10, wait=10)
SAME_USER: dict[str, Any] = {"lifetime": None, "lock": None, "was": "ada", "user": "ada"}


@dataclass
class Loot:
    """What the thieves did, and what is left to them."""

    moves: Counter[str] = field(default_factory=Counter)  # by the way each try ended
    kept: list[str] = field(default_factory=list)


def record(session_id: str, root: str) -> bytes:
    """One that says with which session it began, whatever its id is by now."""
    return encode_checked(SessionData(session_id=session_id, user_id="ada", metadata={"root": root}))


async def begin(store: RedisSessionStore, root: str = "") -> str:
    """Sign ada in; the session's id."""
    session_id = new_session_id()
    assert await store.create(session_id, record(session_id, root), LIFE, None, "ada")
    return session_id


async def move(store: RedisSessionStore, session_id: str, root: str, loot: Loot) -> str | None:
    """The new id; None where the session has ended."""
    taken = await store.checkout(session_id, LOCK, None)
    if not isinstance(taken, Checkout):
        loot.moves[taken.value] += 1
        return None
    new = new_session_id()
    try:
        outcome = await store.move(taken, new, record(new, root), **SAME_USER)
    finally:
        await store.release(taken)
    loot.moves[outcome.value] += 1
    return new if outcome is Outcome.STORED else None


async def hold_on(store: RedisSessionStore, session_id: str, stop: asyncio.Event, loot: Loot) -> None:
    """Move on and on, until it is over."""
    here: str | None = session_id
    while here is not None and not stop.is_set():
        here = await move(store, here, session_id, loot)
    if here is not None:
        loot.kept.append(here)


async def come_back(store: RedisSessionStore, stop: asyncio.Event, loot: Loot) -> None:
    """Sign in anew, which nobody can forbid, and move on."""
    while not stop.is_set():
        await move(store, await begin(store), "", loot)


async def main(url: str, movers: int, signers: int) -> None:
    store, stop, loot = RedisSessionStore(url), asyncio.Event(), Loot()
    loop = asyncio.get_running_loop()
    ids = (await loop.run_in_executor(None, sys.stdin.readline)).split()
    tasks = [asyncio.ensure_future(hold_on(store, each, stop, loot)) for each in ids[:movers]]
    tasks += [asyncio.ensure_future(come_back(store, stop, loot)) for _ in range(signers)]
    while loot.moves["stored"] < len(tasks):  # noqa: ASYNC110  # looked at once, at the beginning
        await asyncio.sleep(0.01)
    print("ready", flush=True)
    await loop.run_in_executor(None, sys.stdin.read)
    stop.set()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    faults = [str(each) for each in results if isinstance(each, BaseException)]
    assert all(isinstance(each, SessionStoreError | None) for each in results), faults
    print(json.dumps({"moves": loot.moves, "kept": loot.kept, "faults": faults}), flush=True)
    await store.aclose()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
