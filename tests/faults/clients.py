"""Clients that use sessions from many sides at once, write down what they see, and are judged by it."""

from __future__ import annotations

import itertools
import random
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import anyio
import httpx

from .app import COUNTING
from .checkers import (
    Fate,
    Operation,
    Sighting,
    Stay,
    count_flaws,
    counter,
    longest_silence,
    misplaced,
    mistaken,
    overlapping,
    register,
    revived,
    unordered,
)
from .processes import PATIENCE

UNANSWERED = 0  # in place of a status
ENDED = 410  # in place of 200 where the answer takes the cookie away: the session ended meanwhile
OBJECTS = {**COUNTING, "add": "items", "write": "register", "read": "register"}
"""The part of the session that each path is about."""
_KINDS = {**dict.fromkeys(COUNTING, "increment"), "add": "add", "write": "write", "read": "read"}
_REFUSALS = {404, 409, ENDED}  # nothing of it was stored
_EXPECTED = {200, 404, 409, 503, ENDED, UNANSWERED}

_numbers = itertools.count(1)


@dataclass
class Seen:
    """What clients saw, of all sessions together or of one."""

    answers: Counter[int] = field(default_factory=Counter)
    sightings: list[Sighting] = field(default_factory=list)
    acknowledged: list[float] = field(default_factory=list)  # when

    def odd(self) -> list[str]:
        """Answers that no client should get."""
        return [
            f"{times} answers {status}" for status, times in self.answers.items() if status not in _EXPECTED
        ]


def browser_like(**options: Any) -> httpx.AsyncClient:
    """A client that keeps cookies, and waits longer for an answer than anything here takes."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    # without certificates, whose loading would take longer than all that is tested
    return httpx.AsyncClient(limits=limits, timeout=PATIENCE, verify=False, **options)


class Client:
    """One browser: its cookies, and what it was shown."""

    def __init__(self, http: httpx.AsyncClient, canary: str, seen: Seen) -> None:
        self.http = http
        self.canary = canary
        self.seen = seen

    async def ask(
        self, url: str, path: str, argument: str = "", method: str = "GET"
    ) -> tuple[int, dict[str, Any]]:
        """Status and answer; `UNANSWERED` where the connection broke, 404 where none could be made."""
        began = time.monotonic()
        status = UNANSWERED
        told: dict[str, Any] = {}
        try:
            answer = await self.http.request(method, f"{url}/{path}", params={"argument": argument})
            status = answer.status_code
            told = answer.json() if status == 200 else {}
            if path != "logout" and "session=null" in answer.headers.get("set-cookie", ""):
                status = ENDED
        except httpx.ConnectError:
            status = 404  # nobody was asked
        except httpx.TransportError:
            pass  # whether it was stored is not known
        self.seen.answers[status] += 1
        if status == 200:
            self.seen.acknowledged.append(time.monotonic())
            self.seen.sightings.append(Sighting(began, self.canary, str(told["canary"])))
        return status, told

    async def begin(self, url: str) -> None:
        """Have a session that carries the canary."""
        with anyio.fail_after(PATIENCE):
            while (await self.ask(url, "begin", self.canary))[0] != 200:  # noqa: ASYNC110  # not our event
                await anyio.sleep(0.05)


class SharedSession(Client):
    """One session, used by many clients at once, and the histories of its parts.

    Each client asks by one of the methods, in turn.
    """

    def __init__(self, http: httpx.AsyncClient, urls: Sequence[str], methods: Sequence[str]) -> None:
        super().__init__(http, f"session-{next(_numbers)}", Seen())
        self.urls = urls
        self.methods = methods
        self.histories: dict[str, list[Operation]] = defaultdict(list)
        self.stays: list[Stay] = []

    async def visit(self, turns: Iterable[object], dice: random.Random, method: str = "GET") -> None:
        """Be one client: in each turn do something that chance chooses at a server that chance chooses."""
        for _ in turns:
            if await self.do(dice.choice(self.urls), dice.choice([*OBJECTS]), method) in (UNANSWERED, 404):
                await anyio.sleep(0.01)

    async def do(self, url: str, path: str, method: str = "GET") -> int:
        """One operation, noted with what came of it; the answer's status."""
        if path == "streamed":
            method = "POST"  # a change within a stream takes the lock
        argument = f"{path}-{next(_numbers)}" if path in ("add", "write") else ""
        began = time.monotonic()
        status = UNANSWERED
        told: dict[str, Any] = {}
        try:
            status, told = await self.ask(url, path, argument, method)
        finally:  # cancelled, too: then whether it was stored is not known
            fate = Fate.REFUSED if status in _REFUSALS else Fate.IN_DOUBT
            if status == 200:
                fate = Fate.ACKNOWLEDGED
                if path != "read":
                    self.stays.append(Stay(told["entered"], told["left"], f"{path} {argument}"))
            self.histories[OBJECTS[path]].append(
                Operation(_KINDS[path], began, time.monotonic(), argument or None, told.get("answer"), fate)
            )
        return status

    async def final(self) -> dict[str, Any]:
        """What the session holds at last."""
        status, told = await self.ask(self.urls[0], "everything")
        assert status == 200, f"the session of {self.canary} is not there at last: {status}"
        answer: dict[str, Any] = told["answer"]
        return answer

    async def flaws(self) -> list[str]:
        """What is wrong with what the clients saw, now that nobody changes anything any more."""
        final = await self.final()
        now = time.monotonic()
        flaws: list[str] = []
        for name in ("clicks", "messages"):
            history = self.histories[name]
            last = Operation("read", now, now, answer=final[name])
            found = [*count_flaws(history, final[name]), *unordered([*history, last], counter, 0)]
            flaws += [f"{name}: {flaw}" for flaw in found]
        last = Operation("read", now, now, answer=final["register"])
        flaws += unordered([*self.histories["register"], last], register, None)
        flaws += misplaced(self.histories["items"], final["items"])
        return [*flaws, *overlapping(self.stays), *mistaken(self.seen.sightings), *self.seen.odd()]


@dataclass
class Visitors:
    """Clients whose sessions begin, get a new id and end, and stragglers who do not know that."""

    urls: Sequence[str]
    seen: Seen = field(default_factory=Seen)
    uses: list[Sighting] = field(default_factory=list)  # of cookies, by their labels
    ended: dict[str, float] = field(default_factory=dict)  # cookies, and since when it is acknowledged
    abandoned: int = 0  # sessions whose end was not acknowledged

    async def visit(self, turns: Iterable[object], dice: random.Random) -> None:
        """One session after the other."""
        for _ in turns:
            async with browser_like() as http:
                await self._live(Client(http, f"visitor-{next(_numbers)}", self.seen), dice)

    async def _live(self, client: Client, dice: random.Random) -> None:
        status, _ = await client.ask(dice.choice(self.urls), "begin", client.canary)
        if status != 200:
            self.abandoned += 1
            await anyio.sleep(0.05)
            return
        for path in ("login", "logout"):
            label = f"{client.canary} before {path}"
            cookie = {"cookie": f"session={client.http.cookies['session']}"}  # whatever answers say of it
            async with browser_like(headers=cookie) as old:
                straggler = Client(old, client.canary, self.seen)
                async with anyio.create_task_group() as group:
                    group.start_soon(self._use, straggler, label, dice)
                    status, _ = await client.ask(dice.choice(self.urls), path)
                if status == 200:
                    self.ended[label] = time.monotonic()
                await self._use(straggler, label, dice)
            if status != 200:
                self.abandoned += 1
                return

    async def _use(self, straggler: Client, label: str, dice: random.Random) -> None:
        """Count with a cookie that may have ended by now."""
        began = time.monotonic()
        status, _ = await straggler.ask(dice.choice(self.urls), "nested")
        if status == 200:
            self.uses.append(Sighting(began, label, label))

    def flaws(self) -> list[str]:
        """What is wrong with what they saw."""
        return [*revived(self.uses, self.ended), *mistaken(self.seen.sightings), *self.seen.odd()]


@asynccontextmanager
async def shared_session(
    urls: Sequence[str],
    transport: httpx.AsyncBaseTransport | None = None,
    methods: Sequence[str] = ("GET",),
) -> AsyncIterator[SharedSession]:
    """A session that has begun."""
    async with browser_like(transport=transport) as http:
        session = SharedSession(http, urls, methods)
        await session.begin(urls[0])
        yield session


async def crowd(session: SharedSession, clients: int, turns: Callable[[], Iterable[object]]) -> None:
    """So many clients of one session at once, each of which does something in each of its turns."""
    async with anyio.create_task_group() as group:
        for client in range(clients):
            method = session.methods[client % len(session.methods)]
            group.start_soon(session.visit, turns(), random.Random(client), method)


def silence(sessions: Iterable[SharedSession], began: float, ended: float) -> float:
    """The longest time in seconds in which one session answered none of its clients."""
    return max(longest_silence(session.seen.acknowledged, began, ended) for session in sessions)
