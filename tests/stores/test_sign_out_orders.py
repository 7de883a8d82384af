"""A sign-out beside whatever else may happen to a user's sessions, in every order of their steps.

Each actor is a store of its own, as another process would have it, whose calls of Redis wait until they are
let through, one at a time. The orders are explored exhaustively, by running each anew; an actor may also die
after any of its steps: then its calls are let through no more.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, TypeAlias, cast

import pytest
from redis.asyncio import Redis

from asgi_sessions import RedisSessionStore, SessionData
from asgi_sessions.record.codec import encode_checked
from asgi_sessions.stores.checkout import Checkout, Lifetime, Outcome
from asgi_sessions.stores.redis.commands.scripts import MARK
from asgi_sessions.stores.redis.connection.replies import Reply
from asgi_sessions.stores.redis.records.index import LINK_SETTLES

pytestmark = pytest.mark.anyio

_HOUR = Lifetime(absolute=3600)
_INDEX = "session:user:ada"
_TICKS = 100  # of the event loop, in which an actor goes from one call to the next

Work: TypeAlias = Callable[[RedisSessionStore], Awaitable[object]]


def record(session_id: str, user: str | None = "ada") -> bytes:
    return encode_checked(SessionData(session_id=session_id, user_id=user))


class Actor:
    """Does its work step by step: a step is a call of Redis. `told` are the ids that a client learned."""

    def __init__(self, url: str) -> None:
        self.store = RedisSessionStore(url)
        self.told: set[str] = set()
        self.done = False
        self._waiting: deque[tuple[Callable[[], Awaitable[Reply]], asyncio.Future[Reply]]] = deque()

    async def open(self) -> None:
        await self.store.open()
        state: Any = await self.store._states.get()
        self._state = state
        for name in ("call", "command"):
            setattr(state.commands, name, self._gate(getattr(state.commands, name)))

    def _gate(self, call: Callable[..., Awaitable[Reply]]) -> Callable[..., asyncio.Future[Reply]]:
        def wait(*args: Any, **options: Any) -> asyncio.Future[Reply]:
            reply: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
            self._waiting.append((lambda: call(*args, **options), reply))
            return reply

        return wait

    async def begin(self, work: Work) -> None:
        self.done = False
        self._task = asyncio.ensure_future(work(self.store))
        await self._settle()

    @property
    def can_go_on(self) -> bool:
        return bool(self._waiting)

    async def step(self) -> None:
        send, reply = self._waiting.popleft()
        answer = await send()
        if not reply.done():
            reply.set_result(answer)
        await self._settle()

    async def _settle(self) -> None:
        """Until it waits for its next call, or has none."""
        for _ in range(_TICKS):
            if self._waiting or (self._task.done() and not self._state.index._tidying):
                break
            await asyncio.sleep(0)
        else:
            raise AssertionError("it neither calls nor ends")
        if self._task.done() and not self._task.cancelled():
            self.done = True
            self._task.result()

    async def die(self) -> None:
        """Whatever it would still have done is not done."""
        self._task.cancel()
        tasks = [self._task, *self._state.index._tidying.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._waiting.clear()


class World:
    """Redis with a session of ada's, `old`, that is signed in before anything begins.

    `visitor` is nobody's; it was ada's once, and the link is still there.
    """

    def __init__(self, url: str, raw: Redis) -> None:
        self.actors = [Actor(url) for _ in range(3)]
        self.store = RedisSessionStore(url)
        self.raw = raw

    async def reset(self) -> None:
        await self.raw.flushdb()
        assert await self.store.create("old", record("old"), _HOUR, None, "ada")
        assert await self.store.create("visitor", record("visitor", None), _HOUR, None)
        await self.store.link_user("ada", "visitor", _HOUR)
        await self.raw.zincrby(_INDEX, -2000 * LINK_SETTLES, "old")
        await self.raw.zincrby(_INDEX, -3000 * LINK_SETTLES, "visitor")

    async def records(self) -> set[str]:
        """Of ada's."""
        found = await self.store.get_batch(await self.store.list_active())
        return {name for name, data in found.items() if data is not None and data.user_id == "ada"}

    async def linked(self) -> set[str]:
        return set(cast("list[str]", await self.raw.zrange(_INDEX, 0, -1)))

    async def marked(self) -> set[str]:
        return set(cast("list[str]", await self.raw.zrangebyscore(_INDEX, "-inf", "(0")))


@pytest.fixture
async def world(redis_url: str) -> AsyncIterator[World]:
    async with Redis.from_url(redis_url, decode_responses=True) as raw:
        world = World(redis_url, raw)
        for actor in world.actors:
            await actor.open()
        yield world
        for store in (world.store, *(actor.store for actor in world.actors)):
            await store.aclose()


# -- what may happen ----------------------------------------------------------------------------------------


def moving(times: int) -> Callable[[World, Actor], Awaitable[Work]]:
    """A client that gets a new id, again and again; each was told to it once it is stored."""

    async def prepare(world: World, actor: Actor) -> Work:
        checkout = await world.store.checkout("old", None, None)
        assert isinstance(checkout, Checkout)
        actor.told = {"old"}

        async def work(store: RedisSessionStore) -> None:
            here: Checkout = checkout
            for number in range(times):
                new = f"new{number}"
                terms: Any = {"lifetime": None, "lock": None, "was": "ada", "user": "ada"}
                if await store.move(here, new, record(new), **terms) is not Outcome.STORED:
                    return
                assert here.successor is not None
                here = here.successor
                actor.told.add(new)

        return work

    return prepare


async def signing_in(world: World, actor: Actor) -> Work:
    """A new session; its old links are looked at."""

    async def work(store: RedisSessionStore) -> None:
        assert await store.create("fresh", record("fresh"), _HOUR, None, "ada")
        actor.told.add("fresh")

    return work


async def becoming(world: World, actor: Actor) -> Work:
    """A visitor's session becomes ada's under the id that it has."""
    checkout = await world.store.checkout("visitor", None, None)
    assert isinstance(checkout, Checkout)
    actor.told = {"visitor"}

    async def work(store: RedisSessionStore) -> None:
        await store.link_user("ada", "visitor", _HOUR)
        await store.commit(checkout, record("visitor"), release=True)

    return work


async def setting(world: World, actor: Actor) -> Work:
    """An app stores a record of its own."""
    actor.told = {"made"}

    async def work(store: RedisSessionStore) -> None:
        await store.set("made", SessionData(session_id="made", user_id="ada"))

    return work


async def setting_again(world: World, actor: Actor) -> Work:
    """It was there before."""
    assert await world.store.create("made", record("made"), _HOUR, None)
    await world.raw.zadd(_INDEX, {"made": 1e12})
    return await setting(world, actor)


async def rolling(world: World, actor: Actor) -> Work:
    """The old session's cookie is renewed, and its link with it."""

    async def work(store: RedisSessionStore) -> None:
        await store.link_user("ada", "old", _HOUR)

    return work


async def ending(world: World, actor: Actor) -> Work:
    """The sign-out."""

    async def work(store: RedisSessionStore) -> None:
        await store.delete_for_user("ada")

    return work


Prepare: TypeAlias = Callable[[World, Actor], Awaitable[Work]]
BESIDE: dict[str, Prepare] = {
    "a move": moving(1), "two moves": moving(2), "a sign-in": signing_in, "a change of user": becoming,
    "a record of the app's": setting, "one written over": setting_again, "a renewal": rolling,
    "another sign-out": ending,
}  # fmt: skip


# -- in every order -----------------------------------------------------------------------------------------


class Run:
    """One order: at each point the next actor, as a number among those that can go on."""

    def __init__(self, choose: Callable[[int], int], limits: Sequence[int | None]) -> None:
        self._choose = choose
        self._limits = limits

    async def go(self, world: World, works: Sequence[Prepare]) -> None:
        """From a fresh start to the end, or to the death, of all."""
        await world.reset()
        actors = world.actors[: len(works)]
        for actor in actors:
            actor.told = set()
        prepared = [await prepare(world, actor) for prepare, actor in zip(works, actors, strict=True)]
        for actor, work in zip(actors, prepared, strict=True):
            await actor.begin(work)
        steps = [0] * len(actors)
        while ready := [n for n, actor in enumerate(actors) if actor.can_go_on and self._lives(n, steps)]:
            chosen = ready[self._choose(len(ready))]
            await actors[chosen].step()
            steps[chosen] += 1
        for actor in actors:
            await actor.die()

    def _lives(self, number: int, steps: Sequence[int]) -> bool:
        limit = self._limits[number]
        return limit is None or steps[number] < limit


async def every_order(
    world: World, works: Sequence[Prepare], limits: Sequence[int | None], check: Callable[[], Awaitable[None]]
) -> int:
    """Run all of them, each from the start, and check what is left; how many there were."""
    orders = 0
    path: list[tuple[int, int]] = []  # what was chosen, of how many
    while True:
        position = 0

        def choose(options: int) -> int:
            nonlocal position
            if position == len(path):
                path.append((0, options))
            position += 1
            return path[position - 1][0]

        await Run(choose, limits).go(world, works)
        await check()
        orders += 1
        while path and path[-1][0] + 1 == path[-1][1]:
            path.pop()
        if not path:
            return orders
        path[-1] = path[-1][0] + 1, path[-1][1]


async def check_sign_out(world: World, names: Sequence[str]) -> None:
    """What was signed in before is gone, whatever is left is linked, and the next sign-out finds it all."""
    ender = world.actors[0]
    told = set().union(*(actor.told for actor in world.actors[: len(names) + 1]))
    records, linked = await world.records() & told, await world.linked()
    assert records <= linked, "a session that no sign-out will find"
    if ender.done:
        chain = {"old", "new0", "new1"} & told
        assert not records & chain, "it has survived"
        if "another sign-out" not in names:
            assert not await world.marked()
    await world.store.delete_for_user("ada")
    assert not await world.records() & told
    assert not await world.marked()


@pytest.mark.parametrize("beside", BESIDE)
async def test_a_sign_out_beside(world: World, beside: str) -> None:
    """All orders of both, and none of them dies."""
    works = [ending, BESIDE[beside]]
    orders = await every_order(world, works, [None, None], lambda: check_sign_out(world, [beside]))
    assert orders > 5


@pytest.mark.parametrize("steps", range(6))
@pytest.mark.parametrize("who", ["the sign-out", "the other"])
@pytest.mark.parametrize("beside", ["a move", "a sign-in", "a change of user"])
async def test_one_of_them_dies(world: World, beside: str, who: str, steps: int) -> None:
    """After so many steps; whatever it has left behind, the next sign-out finishes."""
    limits = [steps, None] if who == "the sign-out" else [None, steps]
    works = [ending, BESIDE[beside]]
    assert await every_order(world, works, limits, lambda: check_sign_out(world, [beside]))


async def test_three_at_once(world: World, pytestconfig: pytest.Config) -> None:
    """A move and a sign-in, or whatever else, beside the sign-out: so many orders that chance chooses."""
    dice = random.Random(8)
    for _ in range(3000 if pytestconfig.getoption("--long") else 150):
        beside = dice.sample(list(BESIDE), 2)
        works = [ending, *(BESIDE[name] for name in beside)]
        limits = [dice.choice([None, None, dice.randrange(6)]) for _ in works]
        if {"a move", "two moves"} <= set(beside):
            continue  # both would give out the same new ids
        await Run(dice.randrange, limits).go(world, works)
        await check_sign_out(world, beside)


async def test_the_exploration_finds_what_is_wrong(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the marks a move that comes between two steps of the sign-out survives it."""
    body = b"return redis.call('ZRANGE', KEYS[1], 0, -1, 'WITHSCORES')"
    state: Any = await world.actors[0].store._states.get()
    call = state.commands.call

    def without_marks(script: Any, key: bytes, *rest: Any, **options: Any) -> Any:
        if script is MARK:
            return state.commands.command(b"EVAL", body, b"1", key)
        return call(script, key, *rest, **options)

    monkeypatch.setattr(state.commands, "call", without_marks)
    with pytest.raises(AssertionError, match="survived"):
        await every_order(
            world, [ending, BESIDE["a move"]], [None, None], lambda: check_sign_out(world, ["a move"])
        )
