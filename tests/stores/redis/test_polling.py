"""An event loop that keeps looking for a reply instead of falling asleep."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from itertools import pairwise
from typing import Any

import pytest

from asgi_sessions import RedisSessionStore, SessionData
from asgi_sessions.record.codec import encode_checked
from asgi_sessions.stores.checkout import Checkout, Lifetime, LockPolicy, Outcome
from asgi_sessions.stores.redis.polling import MOST_SKIPPED, WINDOW, BusyPoll

pytestmark = pytest.mark.anyio

_HOUR = Lifetime(absolute=3600)
_LOCK = LockPolicy()


class Timepiece:
    """What the event loop takes for the time."""

    def __init__(self, loop: asyncio.AbstractEventLoop, patch: pytest.MonkeyPatch) -> None:
        self.now = loop.time()
        patch.setattr(loop, "time", lambda: self.now)


@pytest.fixture
async def clock(monkeypatch: pytest.MonkeyPatch) -> Timepiece:
    return Timepiece(asyncio.get_running_loop(), monkeypatch)


def _reply() -> asyncio.Future[Any]:
    return asyncio.get_running_loop().create_future()


async def _looks(poll: BusyPoll) -> bool:
    """Whether it goes on looking, in this turn of the loop and the next."""
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    return poll._reply is not None


async def _in_time(poll: BusyPoll) -> bool:
    """A call whose reply comes at once; whether it was looked for."""
    reply = _reply()
    poll.begin(reply)
    looked_for = poll._reply is reply
    reply.set_result(None)
    assert not await _looks(poll)
    return looked_for


async def _too_late(poll: BusyPoll, clock: Timepiece) -> bool:
    """A call whose reply does not come in time; whether it was looked for."""
    reply = _reply()
    poll.begin(reply)
    looked_for = poll._reply is reply
    clock.now += WINDOW
    assert not await _looks(poll)
    return looked_for


async def test_it_looks_until_the_reply_is_there(clock: Timepiece) -> None:
    """And not a turn longer."""
    poll, reply = BusyPoll(), _reply()
    poll.begin(reply)
    for _ in range(20):
        assert await _looks(poll)
    reply.set_result(b"OK")
    assert not await _looks(poll)


async def test_it_does_not_look_for_longer_than_its_window(clock: Timepiece) -> None:
    """However often the loop turns within it."""
    poll = BusyPoll()
    poll.begin(_reply())
    clock.now += WINDOW / 2
    assert await _looks(poll)
    clock.now += WINDOW
    assert not await _looks(poll)


async def test_one_reply_at_a_time_is_looked_for(clock: Timepiece) -> None:
    """Who comes meanwhile is seen by the same turns of the loop."""
    poll, first = BusyPoll(), _reply()
    poll.begin(first)
    poll.begin(_reply())
    first.set_result(None)
    assert not await _looks(poll)


async def test_where_replies_take_long_it_hardly_looks(clock: Timepiece) -> None:
    """After each disappointment twice as many calls go by, up to a bound; one success ends that."""
    poll = BusyPoll()
    tried = [await _too_late(poll, clock) for _ in range(6 * MOST_SKIPPED)]
    tries = [number for number, each in enumerate(tried) if each]
    pauses = [later - earlier - 1 for earlier, later in pairwise(tries)]
    assert pauses[:5] == [1, 3, 7, 15, 31]
    assert pauses[-1] == MOST_SKIPPED
    assert max(pauses) == MOST_SKIPPED
    for _ in range(MOST_SKIPPED):
        if await _in_time(poll):
            break
    assert [await _in_time(poll) for _ in range(5)] == [True] * 5


async def test_a_reply_that_nobody_wants_any_more_is_not_looked_for(clock: Timepiece) -> None:
    """Its caller was cancelled."""
    poll, reply = BusyPoll(), _reply()
    poll.begin(reply)
    reply.cancel()
    assert not await _looks(poll)


# -- what is looked for --------------------------------------------------------------------------------------


@pytest.fixture
async def store(redis_url: str) -> AsyncIterator[RedisSessionStore]:
    store = RedisSessionStore(redis_url)
    for n in range(20):
        record = encode_checked(SessionData(session_id=f"s{n}"))
        await store.create(f"s{n}", record, _HOUR, None)
    yield store
    await store.aclose()


async def _taken(store: RedisSessionStore, session_id: str) -> Checkout:
    taken = await store.checkout(session_id, _LOCK, _HOUR)
    assert isinstance(taken, Checkout)
    return taken


async def test_only_what_a_request_waits_for_is_looked_for(
    store: RedisSessionStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A release is not, nor one call of many: their loop has something to do anyway."""
    begun: list[asyncio.Future[Any]] = []
    monkeypatch.setattr(BusyPoll, "begin", lambda _, reply: begun.append(reply))
    taken = await _taken(store, "s0")
    assert len(begun) == 1
    await store.release(taken)
    assert len(begun) == 1
    taken = await _taken(store, "s0")  # also while the release is under way
    assert len(begun) == 2
    assert await store.commit(taken, taken.record, release=True) is Outcome.STORED
    assert len(begun) == 3
    crowd = await asyncio.gather(*[_taken(store, f"s{n}") for n in range(20)])
    await asyncio.gather(*[store.commit(each, each.record, release=True) for each in crowd])
    assert len(begun) <= 5  # the first of a crowd does not know that it is one
