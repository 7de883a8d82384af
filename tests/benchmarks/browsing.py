"""A browser as far as sessions are concerned: a few kept connections (HTTP/1.1) with the same cookies.

A client of its own, because the load is made on the same processors as the answers: httpx takes longer for a
request than any of the middlewares.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import Iterable
from contextlib import AsyncExitStack, suppress
from types import TracebackType
from typing import NamedTuple

CONNECTIONS = 6  # of a browser to one host
USER_AGENT = "Mozilla/5.0 (X11; Linux x86_64; rv:140.0) Gecko/20100101 Firefox/140.0"
PATIENCE = 30.0  # seconds for any answer


class Request(NamedTuple):
    method: str
    path: str

    @property
    def is_stream(self) -> bool:
        return self.path == "/events"


class Answer(NamedTuple):
    status: int
    body: bytes


class Browser:
    """What one browser has: its cookies, and the answers that it got, by status."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.cookies: dict[str, str] = {}
        self.answers: Counter[int] = Counter()
        self.acknowledged = 0  # writes that were answered with 200

    async def get(self, path: str) -> Answer:
        """One answer, on a connection of its own, that does not count."""
        async with Connection(self) as connection:
            return await connection.ask(Request("GET", path))

    def note(self, request: Request, status: int) -> None:
        self.answers[status] += 1
        if status == 200 and request.path.endswith(("/write", "/add")):
            self.acknowledged += 1

    def set_cookie(self, line: str) -> None:
        """Take a Set-Cookie over, or drop what it removes."""
        cookie, *attributes = line.split(";")
        name, _, value = cookie.strip().partition("=")
        self.cookies[name] = value
        if any(each.strip().lower() in ("max-age=0", "max-age=-1") for each in attributes):
            del self.cookies[name]

    @property
    def cookie_header(self) -> str:
        pairs = "; ".join(f"{name}={value}" for name, value in self.cookies.items())
        return f"cookie: {pairs}\r\n" if pairs else ""


class Connection:
    """One connection, kept for one request after the other."""

    _reader: asyncio.StreamReader
    _writer: asyncio.StreamWriter

    def __init__(self, browser: Browser) -> None:
        self._browser = browser

    async def __aenter__(self) -> Connection:
        self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._browser.port)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.close()
        with suppress(ConnectionError):
            await self._writer.wait_closed()

    async def ask(self, request: Request) -> Answer:
        """The answer; of a stream what comes until its first event is there."""
        body = b"{}" if request.method == "POST" else b""
        self._writer.write(
            f"{request.method} {request.path} HTTP/1.1\r\nhost: 127.0.0.1\r\nuser-agent: {USER_AGENT}\r\n"
            f"{self._browser.cookie_header}content-length: {len(body)}\r\n\r\n".encode()
            + body
        )
        return await asyncio.wait_for(self._answer(), PATIENCE)

    async def _answer(self) -> Answer:
        head = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        length = None
        for line in head[1:]:
            name, _, value = line.partition(":")
            if name.lower() == "set-cookie":
                self._browser.set_cookie(value)
            elif name.lower() == "content-length":
                length = int(value)
        if length is None:
            body = await self._reader.readuntil(b"\n\n")
        else:
            body = await self._reader.readexactly(length)
        return Answer(int(head[0].split()[1]), body)


class Loaded(NamedTuple):
    """When things were there, in ms after the document was asked for; None for a stream that was refused."""

    all_but_stream: float
    first_event: float | None


async def load(browser: Browser, document: Request, rest: Iterable[Request]) -> Loaded:
    """Load a page: its document, then everything else in this order, over as many connections as there are.

    A stream keeps its connection until everything is there.
    """
    waiting = deque(rest)
    there: float = 0
    first_event = None

    async def work(connection: Connection) -> None:
        nonlocal there, first_event
        while waiting:
            request = waiting.popleft()
            status = (await connection.ask(request)).status
            browser.note(request, status)
            if not request.is_stream:
                there = time.perf_counter()
            elif status == 200:
                first_event = (time.perf_counter() - started) * 1000
                return

    async with AsyncExitStack() as stack:
        connections = [await stack.enter_async_context(Connection(browser)) for _ in range(CONNECTIONS)]
        started = time.perf_counter()
        browser.note(document, (await connections[0].ask(document)).status)
        await asyncio.gather(*map(work, connections))
    return Loaded((there - started) * 1000, first_event)
