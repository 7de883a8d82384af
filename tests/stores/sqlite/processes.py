"""A process of its own with a SQLite store. It does what it is told, a line at a time, and answers in a line.

Run as a program it is that process; `Process` is the test's side of it.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from asgi_sessions import SessionData, SessionStoreError, SQLiteSessionStore
from asgi_sessions.record.codec import decode, encode_checked
from asgi_sessions.stores.checkout import Checkout, LockPolicy, Outcome
from asgi_sessions.stores.sqlite.transaction import Transaction

LEASE = 60.0  # seconds; nobody in a test waits for so long
ROOT = Path(__file__).parents[3]


class Process:
    """Starts the program, tells it what to do, freezes and kills it. `wrapper` is a command that runs it."""

    def __init__(self, path: Path, *wrapper: str, synchronous: str = "full") -> None:
        self._process = subprocess.Popen(
            [*wrapper, sys.executable, __file__, str(path), synchronous],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            start_new_session=True,  # with its wrapper it is a group, which gets the signals
        )  # fmt: skip
        assert self.hear() == "ready"

    def __enter__(self) -> Process:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()

    def say(self, *words: object) -> None:
        """Tell it what to do, and go on."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(words) + "\n")
        self._process.stdin.flush()

    def hear(self) -> Any:
        """Its next answer; None where it has ended."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        return json.loads(line) if line else None

    def ask(self, *words: object) -> Any:
        """Tell it what to do and wait for the answer."""
        self.say(*words)
        return self.hear()

    def freeze(self) -> None:
        """Stop it where it is, all its threads."""
        os.killpg(self._process.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        """Let it go on."""
        os.killpg(self._process.pid, signal.SIGCONT)

    def kill(self) -> None:
        """End it where it is."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


class Program:
    """The other side."""

    def __init__(self, path: str, synchronous: Any) -> None:
        self.store = SQLiteSessionStore(path, synchronous=synchronous, busy_timeout=20)
        self.held: dict[str, Checkout] = {}

    async def take(self, session_id: str, lease: float = LEASE, wait: float = 60.0) -> bool:
        """Check a session out."""
        policy = LockPolicy(timeout=lease, wait=wait, max_hold=lease)
        taken = await self.store.checkout(session_id, policy, None)
        assert isinstance(taken, Checkout)
        self.held[session_id] = taken
        return True

    async def count(self, session_id: str) -> str:
        """Add one to the session that is held, and let it go."""
        taken = self.held.pop(session_id)
        data = decode(SessionData, taken.record)
        data.message_count += 1
        return (await self.store.commit(taken, encode_checked(data), release=True)).value

    async def await_end(self, session_id: str) -> None:
        """Begin to wait for the end of a session."""
        self.waiting = asyncio.create_task(self.store.until_ended(session_id))
        await asyncio.sleep(0.05)

    async def count_often(self, session_ids: list[str]) -> None:
        """Count in all of these sessions at once until killed; each count is told when it is stored."""

        async def repeat(session_id: str) -> None:
            while True:
                await self.take(session_id)
                count = decode(SessionData, self.held[session_id].record).message_count + 1
                if await self.count(session_id) == Outcome.STORED.value:
                    answer([session_id, count])

        await asyncio.gather(*map(repeat, session_ids))

    async def stick(self) -> None:
        """Freeze in the middle of a transaction, and do nothing more afterwards."""
        engine = await self.store._get()
        engine.send(stop_within, whose="s", durable=True)
        await asyncio.Event().wait()


def stop_within(tx: Transaction) -> None:
    """Freeze this process after it has written something."""
    tx.db.execute("DELETE FROM retired")
    answer("in it")
    os.kill(os.getpid(), signal.SIGSTOP)


def answer(words: object) -> None:
    """Say so in one write, which a killed process has done or not."""
    os.write(1, (json.dumps(words) + "\n").encode())


async def main() -> None:
    program = Program(*sys.argv[1:])
    await program.store.open()
    answer("ready")
    while line := await asyncio.to_thread(sys.stdin.readline):
        name, *arguments = json.loads(line)
        work: Callable[..., Awaitable[object]] = getattr(program, name)
        try:
            answer(await work(*arguments))
        except SessionStoreError as error:
            answer(str(error))
    await program.store.aclose()


if __name__ == "__main__":
    asyncio.run(main())
