"""Listens for the messages of other processes, and looks after those who wait where none comes."""

from __future__ import annotations

import threading
import time
from functools import partial

from ..endings import Endings
from . import locks
from .transaction import Transaction
from .waking import ENDED, Waking
from .writer import Call, Writer

POLL = 0.05  # seconds after which waiters are looked after in any case: a process may have died


class Watch:
    """A thread that tells the writer which sessions to look after. It sleeps while nobody waits."""

    def __init__(self, waking: Waking, writer: Writer, endings: Endings) -> None:
        self._waking = waking
        self._endings = endings
        self._writer = writer
        self._closing = False
        self._looks_at = 0.0
        self._thread = threading.Thread(target=self._listen, name="asgi_sessions-sqlite-watch", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """Somebody waits from now on; from any thread."""
        self._waking.ring()

    def close(self) -> None:
        """Stop."""
        self._closing = True
        self._waking.ring()
        if threading.current_thread() is not self._thread:
            self._thread.join(1)

    def _listen(self) -> None:
        while not self._closing:
            waits = bool(self._writer.desk.waiting)
            now = time.monotonic()
            if not waits:
                self._looks_at = now + POLL
            heard = self._waking.listen(max(self._looks_at - now, 0.001) if waits else None)
            for message in heard:
                self._hear(message)
            if self._writer.desk.waiting and time.monotonic() >= self._looks_at:
                self._writer.put(Call(_look_after_all, False))
                self._looks_at = time.monotonic() + POLL

    def _hear(self, message: str) -> None:
        if message == ENDED:
            self._endings.doubt()
        elif message.startswith(ENDED):
            self._endings.tell(message[1:].split(ENDED))
        else:
            self._writer.put(Call(partial(locks.look, session_id=message), False))


def _look_after_all(tx: Transaction) -> None:
    for session_id in list(tx.desk.waiting):
        locks.look(tx, session_id)
