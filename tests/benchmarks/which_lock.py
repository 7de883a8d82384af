"""What each mode of the lock makes of requests of one session that come together.

    python tests/benchmarks/which_lock.py [--rounds 5] [--json FILE] [--plot FILE] [--quick]

Called in process, with the sessions in memory. A page takes 50 ms, what is slow 1 s. The figures are
milliseconds until all answers have begun, or until that of a click which comes while something slow is under
way. "recipes" is `lock=True` with `read_only` for the routes that only read, and `await session.release()`
before a slow upload is read. Answers other than 200 are counted beside the time.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Any

from measure import (
    Cell,
    Figures,
    Panel,
    Report,
    Samples,
    Table,
    Target,
    alternate,
    command_line,
    machine,
    parse,
)

from asgi_sessions import InMemorySessionStore, SessionMiddleware
from asgi_sessions.asgi import Message, Receive, Scope, Send

SECRET = "which lock " * 4
PAGE, SLOW = 0.05, 1.0  # seconds
MODES: Mapping[str, Mapping[str, Any]] = {
    "True": {"lock": True},
    '"auto"': {"lock": "auto"},
    "False": {"lock": False},
    "recipes": {"lock": True, "read_only": ["/read", "/slow", "/stream"]},
}


class App:
    """Pages that take a while; what they do is their name."""

    def __init__(self, speed: float, *, lets_go: bool) -> None:
        self._page, self._slow = PAGE / speed, SLOW / speed
        self._lets_go = lets_go

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        session, path = scope["session"], scope["path"]
        if path == "/upload" and self._lets_go:
            await session.release()
        count = session.get("count", 0)
        headers = [] if path == "/stream" else [(b"content-length", b"0")]
        start = {"type": "http.response.start", "status": 200, "headers": headers}
        if path == "/stream":
            await send(start)
        if path != "/begin":
            await asyncio.sleep(self._page if path in ("/read", "/write") else self._slow)
        if path in ("/begin", "/write"):
            session["count"] = count + 1
        if path != "/stream":
            await send(start)
        await send({"type": "http.response.body", "body": b""})


class Visitor:
    """One session behind a middleware in one mode."""

    def __init__(self, mode: str, speed: float) -> None:
        app = App(speed, lets_go=mode == "recipes")
        self._app = SessionMiddleware(app, SECRET, store=InMemorySessionStore(), **MODES[mode])
        self._cookie = b""
        self._running: set[asyncio.Task[None]] = set()
        self._slow: list[asyncio.Future[int]] = []

    async def ask(self, method: str, path: str) -> int:
        """The status of the answer once it has begun; the rest of it goes on."""
        began: asyncio.Future[Message] = asyncio.get_running_loop().create_future()

        async def receive() -> Message:
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message: Message) -> None:
            if not began.done():
                began.set_result(message)

        headers = [(b"cookie", self._cookie)] if self._cookie else []
        scope = {
            "type": "http", "method": method, "scheme": "http", "path": path, "headers": headers,
            "client": ("127.0.0.1", 1),
        }  # fmt: skip
        task = asyncio.ensure_future(self._app(scope, receive, send))
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        start = await began
        self._cookie = dict(start["headers"]).get(b"set-cookie", self._cookie).partition(b";")[0]
        return int(start["status"])

    async def together(self, method: str, path: str, times: int) -> list[int]:
        """Requests that come at once."""
        return await asyncio.gather(*[self.ask(method, path) for _ in range(times)])

    async def beside(self, slow: tuple[str, str], method: str, path: str) -> list[int]:
        """A request that comes while a slow one is under way, which is not waited for."""
        waiting = asyncio.ensure_future(self.ask(*slow))
        await asyncio.sleep(0.001)
        status = await self.ask(method, path)
        self._slow.append(waiting)
        return [status]

    async def is_quiet(self) -> None:
        """All that was asked is answered to the end."""
        await asyncio.gather(*self._slow)
        await asyncio.gather(*self._running)


CASES: Mapping[str, Callable[[Visitor], Awaitable[list[int]]]] = {
    "20 reads at once": lambda visitor: visitor.together("GET", "/read", 20),
    "a read beside a slow GET": lambda visitor: visitor.beside(("GET", "/slow"), "GET", "/read"),
    "a write beside a slow GET": lambda visitor: visitor.beside(("GET", "/slow"), "POST", "/write"),
    "a read beside a slow upload": lambda visitor: visitor.beside(("POST", "/upload"), "GET", "/read"),
    "a write beside a slow upload": lambda visitor: visitor.beside(("POST", "/upload"), "POST", "/write"),
    "a write beside an open stream": lambda visitor: visitor.beside(("GET", "/stream"), "POST", "/write"),
    "10 writes by POST at once": lambda visitor: visitor.together("POST", "/write", 10),
    "10 writes by GET at once": lambda visitor: visitor.together("GET", "/write", 10),
}


async def turn(mode: str, case: str, speed: float) -> Figures:
    """One case in one mode: the time, and the answers by status."""
    visitor = Visitor(mode, speed)
    await visitor.ask("POST", "/begin")
    await visitor.is_quiet()
    begin = time.perf_counter()
    answers = Counter(await CASES[case](visitor))
    elapsed = time.perf_counter() - begin
    await visitor.is_quiet()
    refused = {str(status): count for status, count in answers.items() if status != 200}
    return {"ms": 1000 * elapsed, **refused}


async def measure(options: argparse.Namespace) -> Samples:
    subjects = {
        f"{case}, {mode}": partial(turn, mode, case, options.speed) for case in CASES for mode in MODES
    }
    return await alternate(subjects, options.rounds)


def cell(samples: Samples, subject: str) -> Cell:
    """The time, and the answers other than 200 in any round."""
    time = samples.median(subject, "ms")
    statuses = sorted(samples.raw()[subject].keys() - {"ms"})
    refused = [f"{max(samples.rounds(subject, status)):.0f} x {status}" for status in statuses]
    return ", ".join([f"{time:.0f}", *refused]) if refused else time


def targets(samples: Samples) -> list[Target]:
    """What "auto" is for: nobody is refused, and reads wait as little as without a lock."""
    names = [f'{case}, "auto"' for case in CASES]
    refused = sum(len(samples.raw()[name].keys() - {"ms"}) for name in names)
    reads = samples.ratio(names[0], "20 reads at once, False", "ms")
    return [
        Target('kinds of refusals, "auto"', refused, "==", 0),
        Target('20 reads at once, "auto" / False', reads, "<=", 1.2, "x"),
    ]


def options_of(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    options = parse(command_line(__doc__, rounds=5), arguments)
    options.speed = 50.0 if options.quick else 1.0
    return options


def main() -> None:
    options = options_of()
    logging.disable()  # of conflicts, which are counted
    samples = asyncio.run(measure(options))
    rows = [[case, *[cell(samples, f"{case}, {mode}") for mode in MODES]] for case in CASES]
    bars = {mode: [samples.median(f"{case}, {mode}", "ms") for case in CASES] for mode in MODES}
    Report(
        "Which lock",
        machine(),
        [Table("milliseconds, in memory", ["requests of one session", *MODES], rows)],
        targets(samples),
        [Panel("requests of one session", "ms", bars, categories=list(CASES))],
        raw={"rounds": samples.raw()},
    ).finish(options)


if __name__ == "__main__":
    main()
