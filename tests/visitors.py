"""Visitors who count in sessions through the real middleware while servers die, and what they were told.

Redis copies to its replicas when it has answered already: when a primary dies, the last answers may die with
it. So what is promised is stated here, as checks that return what is wrong as sentences, if anything.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import anyio
from asgi import KEY, Answer, chunk, empty_body, http_scope, start
from deployments import Replicated
from faults.checkers import Fate, Operation, disordered, increment, numbers, of_fate, repeated
from redis_server import RedisServer

from asgi_sessions import RedisSessionStore, SessionMiddleware
from asgi_sessions.asgi import Message, Receive, Scope, Send
from asgi_sessions.stores.redis.connection.deployment import Client

PATIENCE = 30.0  # seconds for what must come at last
_FILLER = "x" * 2000  # makes a record longer than one would write in one piece


@dataclass(eq=False)
class Counted:
    """A session whose visitors add 1 each, and what they saw of that.

    `copied` is the highest count that was acknowledged and is known to be on the replicas.
    """

    cookie: str
    attempts: list[Operation] = field(default_factory=list)
    answers: Counter[int] = field(default_factory=Counter)
    copied: int = 0

    @property
    def session_id(self) -> str:
        return self.cookie.partition(".")[0]

    @property
    def key(self) -> str:
        return f"session:{{{self.session_id}}}"

    @property
    def highest(self) -> int:
        """The highest count that was acknowledged."""
        return max((number for number, _ in numbers(self.attempts)), default=0)


class CountingSite:
    """The middleware over this store, around an app that counts twice in each record: at both of its ends."""

    def __init__(self, url: Client | str, *, pause: float = 0.002, lock_timeout: float = 2.0) -> None:
        self.store = RedisSessionStore(url)
        self.middleware = SessionMiddleware(
            self._app, KEY, store=self.store, fingerprint=None, lock_timeout=lock_timeout, lock_wait=4.0
        )
        self._pause = pause

    async def begin(self) -> Counted:
        """A new session, whose count is 0."""
        answer = await self._get("/begin")
        assert answer.status == 200, answer.messages
        return Counted(answer.cookies[0].partition("=")[2].partition(";")[0])

    async def visit(self, counted: Counted) -> int:
        """Count once and note what was seen; the answer's status."""
        began = time.monotonic()
        answer = await self._get("/", counted.cookie)
        number = int(answer.body) if answer.status == 200 else None
        counted.attempts.append(increment(began, time.monotonic(), number, refused=answer.status == 409))
        counted.answers[answer.status] += 1
        return answer.status

    async def final(self, counted: Counted) -> int:
        """The count that is stored now."""
        data = await self.store.get(counted.session_id)
        assert data is not None, "the record is gone"
        head, tail = data.metadata["head"], data.metadata["tail"]
        assert head == tail, "half of a record was stored"
        return int(head)

    async def _get(self, path: str, cookie: str | None = None) -> Answer:
        answer = Answer()

        async def send(message: Message) -> None:
            answer.messages.append(message)

        headers = [] if cookie is None else [(b"cookie", f"session={cookie}".encode())]
        await self.middleware(http_scope(path=path, headers=headers), empty_body, send)
        return answer

    async def _app(self, scope: Scope, receive: Receive, send: Send) -> None:
        session = scope["session"]
        if scope["path"] == "/begin":
            session.update(head=0, filler=_FILLER, tail=0)
            return await _answer(send, 200, b"begun")
        if "head" not in session:
            return await _answer(send, 410, b"the session is gone")
        number = session["head"] + 1
        if session["tail"] != session["head"]:
            return await _answer(send, 500, b"half of a record was stored")
        await asyncio.sleep(self._pause)
        session["head"] = session["tail"] = number
        return await _answer(send, 200, str(number).encode())


async def _answer(send: Send, status: int, body: bytes) -> None:
    await send(start(status, [(b"content-length", str(len(body)).encode())]))
    await send(chunk(body))


@asynccontextmanager
async def counting(url: Client | str, **settings: float) -> AsyncIterator[CountingSite]:
    """A site that is closed with the block."""
    site = CountingSite(url, **settings)
    try:
        yield site
    finally:
        await site.store.aclose()


@asynccontextmanager
async def crowd(site: CountingSite, sessions: Sequence[Counted], visitors: int = 3) -> AsyncIterator[None]:
    """So many visitors of each session come again and again until the block ends."""
    over = anyio.Event()

    async def come(counted: Counted, dice: random.Random) -> None:
        while not over.is_set():
            if await site.visit(counted) != 200:
                await asyncio.sleep(dice.uniform(0.01, 0.03))

    async with anyio.create_task_group() as group:
        for number in range(visitors):
            for counted in sessions:
                group.start_soon(come, counted, random.Random(number))
        try:
            yield
        finally:
            over.set()


async def until(condition: Callable[[], bool], what: str, patience: float = PATIENCE) -> None:
    """Let visitors come until it is so; `patience` in seconds."""
    try:
        with anyio.fail_after(patience):
            while not condition():  # noqa: ASYNC110  # it is not one thing that sets it
                await asyncio.sleep(0.01)
    except TimeoutError:
        raise AssertionError(f"{what}: not within {patience:g} seconds") from None


async def served(sessions: Iterable[Counted], times: int = 5) -> None:
    """Wait until each has been counted so many times more."""
    before = [(counted, counted.answers[200]) for counted in sessions]
    await until(lambda: all(each.answers[200] >= count + times for each, count in before), "all are served")


async def note_copies(deployment: Replicated, primary: RedisServer, sessions: Sequence[Counted]) -> None:
    """What has been acknowledged by now is on the replicas when this returns."""
    counts = [(counted, counted.highest) for counted in sessions]
    await anyio.to_thread.run_sync(deployment.copy, primary)
    for counted, count in counts:
        counted.copied = count


def failover_flaws(attempts: Sequence[Operation], final: int, copied: int, died: float) -> list[str]:
    """What is wrong with a history in which the primary died at `died` and a replica took over later.

    Before and after, no number is acknowledged twice and none is out of order. Nobody who came after is told
    a number that had been acknowledged and copied, the last of them is in the final count, and so is every
    acknowledged increment but those of before that had not been copied.
    """
    before = [attempt for attempt in attempts if attempt.ended < died]
    after = [attempt for attempt in attempts if attempt.ended >= died]
    flaws = [flaw for part in (before, after) for flaw in (*repeated(part), *disordered(part))]
    later = sorted(number for number, _ in numbers(after))
    in_doubt, known = len(of_fate(attempts, Fate.IN_DOUBT)), len(numbers(attempts))
    if later and later[0] <= copied:
        flaws.append(f"{later[0]} was acknowledged again, though {copied} had been copied")
    if later and later[-1] > final:
        flaws.append(f"{later[-1]} was acknowledged, the final count is {final}")
    if final < copied + len(later):
        flaws.append(f"the final count {final} lacks some of {copied} copied and {len(later)} later ones")
    if final > known + in_doubt:
        flaws.append(f"the final count {final} is more than {known} acknowledged and {in_doubt} in doubt")
    return flaws
