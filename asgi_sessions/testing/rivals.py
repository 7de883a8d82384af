"""Tasks that use a session at the same time, and a store whose primitives let other tasks run."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from typing import Any, TypeAlias

import anyio
import anyio.lowlevel

from ..errors import SessionConflictError
from ..record.codec import decode, encode_checked
from ..record.model import SessionData
from ..record.values import new_session_id
from ..stores.checkout import Checkout, Lifetime, LockPolicy, Outcome
from ..stores.contract import SessionStore

HOUR = Lifetime(absolute=3600)
IDLE = Lifetime(absolute=3600, idle=1800)
LOCK = LockPolicy(timeout=5, wait=5)

Pause: TypeAlias = Callable[[], Awaitable[None]]


def new(**fields: Any) -> SessionData:
    """A record under an id of its own."""
    return SessionData(session_id=new_session_id(), **fields)


async def create(store: SessionStore, data: SessionData, lifetime: Lifetime = HOUR) -> None:
    """Store a new record, and link it to its user."""
    created = await store.create(data.session_id, encode_checked(data), lifetime, None, data.user_id)
    assert isinstance(created, Checkout), "create gave nothing for an id that nobody uses"


async def check_out(store: SessionStore, session_id: str, lock: LockPolicy | None = LOCK) -> Checkout:
    """Check out a session that is there."""
    taken = await store.checkout(session_id, lock, HOUR)
    assert isinstance(taken, Checkout), f"checkout gave {taken} for a session that is there"
    return taken


async def commit(store: SessionStore, taken: Checkout, release: bool = True, **metadata: Any) -> Outcome:
    """Commit a checkout with these values."""
    data = decode(SessionData, taken.record)
    data.metadata.update(metadata)
    return await store.commit(taken, encode_checked(data), release=release)


async def commit_unlocked(store: SessionStore, taken: Checkout, **metadata: Any) -> Outcome:
    """Commit a checkout that was made without the lock, with these values."""
    data = decode(SessionData, taken.record)
    data.metadata.update(metadata)
    return await store.commit_unlocked(taken, encode_checked(data))


async def try_to_move(
    store: SessionStore,
    taken: Checkout,
    was: str | None,
    user: str | None,
    lifetime: Lifetime | None = None,
    lock: LockPolicy | None = None,
) -> Outcome:
    """Give a session a new id; `was` is signed in before, `user` after."""
    data = decode(SessionData, taken.record).model_copy(update={"session_id": new_session_id()})
    data.user_id = user
    record = encode_checked(data)
    return await store.move(
        taken, data.session_id, record, lifetime=lifetime, lock=lock, was=was, user=user
    )  # fmt: skip


async def move(store: SessionStore, taken: Checkout, user: str | None) -> None:
    """Give a session of this user a new id; fails where that is refused."""
    outcome = await try_to_move(store, taken, user, user)
    assert outcome is Outcome.STORED, f"a move of what nobody else has touched came to {outcome}"
    assert taken.successor is not None, "a move that was stored has to set checkout.successor"


# -- others, at the same time -----------------------------------------------------------------------------


def interleave(store: SessionStore, seed: int) -> Pause:
    """Let other tasks run before and after each primitive of this store, in an order that the seed gives.

    The longest pause is before a write: it finds code that does not hold the session while it compares.
    """
    chance = random.Random(seed)  # noqa: S311  # nothing secret

    async def pause(most: int = 4) -> None:
        for _ in range(chance.randrange(most)):
            await anyio.lowlevel.checkpoint()

    for name in ("read_value", "write_value", "delete_value"):
        primitive = getattr(type(store), name)
        if primitive is not getattr(SessionStore, name):
            before = pause if name == "read_value" else partial(pause, 16)
            setattr(store, name, _pausing(primitive.__get__(store), before, pause))
    return pause


def _pausing(
    primitive: Callable[..., Awaitable[Any]], before: Pause, pause: Pause
) -> Callable[..., Awaitable[Any]]:
    async def paused(*args: Any) -> Any:
        await before()
        result = await primitive(*args)
        await pause()
        return result

    return paused


async def count(
    store: SessionStore, session_id: str, lock: LockPolicy | None, stored: list[int], pause: Pause
) -> None:
    """Count a few times, as requests do, until the session is gone; note what was acknowledged."""
    for _ in range(6):
        taken = await store.checkout(session_id, lock, IDLE)
        if not isinstance(taken, Checkout):
            return
        await pause()
        number = decode(SessionData, taken.record).metadata["n"] + 1
        if await commit(store, taken, n=number) is Outcome.STORED:
            stored.append(number)


async def look(store: SessionStore, session_id: str) -> None:
    """Send requests that change nothing until the session is gone; each restarts the idle timeout."""
    for _ in range(6):
        taken = await store.checkout(session_id, None, IDLE)
        if not isinstance(taken, Checkout):
            return
        await store.keep_alive(taken)


async def update(store: SessionStore, session_id: str, seed: int) -> None:
    """Update until that is stored, then touch; writers that do not wait may come first."""
    for _ in range(20):
        with suppress(SessionConflictError):
            if not await store.update(session_id, {"updated": seed}) or await store.touch(session_id):
                return


async def set_if_there(store: SessionStore, data: SessionData) -> None:
    """Write a record a few times until it is gone."""
    for _ in range(6):
        if not await store.set(data.session_id, data, create=False):
            return


async def end(store: SessionStore, session_id: str, ended: list[bool], pause: Pause, late: int) -> None:
    """Delete a session after some pauses; note whether it was there."""
    for _ in range(late):
        await pause()
    ended.append(await store.delete(session_id))


async def set_anew(store: SessionStore, data: SessionData, pause: Pause, late: int) -> None:
    """Write a record after some pauses, also where a request holds it."""
    for _ in range(late):
        await pause()
    await store.set(data.session_id, data)


async def keep_moving(store: SessionStore, session_id: str, user: str | None, most: int) -> None:
    """Give a session up to `most` new ids, one after the other, until it is gone."""
    for _ in range(most):
        taken = await store.checkout(session_id, LOCK, IDLE)
        if (
            not isinstance(taken, Checkout)
            or await try_to_move(store, taken, user, user) is not Outcome.STORED
        ):
            return
        assert taken.successor is not None, "a move that was stored has to set checkout.successor"
        session_id = taken.successor.session_id
        await anyio.lowlevel.checkpoint()
