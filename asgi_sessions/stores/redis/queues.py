"""The queue within one process: one request of a session speaks with Redis, the others wait here.

The speaker holds the lock or asks for it. When it is done it passes the lock to the next one here, at most
`PASSES` times in a row: then the lock goes to who waits in Redis, and the next one here queues there.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, TypeAlias

from ...errors import LockTimeoutError, SessionStoreError, TooManyWaitersError
from .calls import CLOSED, NotSentError
from .names import new_token
from .scripts import Keys
from .terms import Terms
from .waiters import Grant, Turn

if TYPE_CHECKING:
    from .engine import Engine

PASSES = 8  # from hand to hand within the process, before other processes have their turn

Waiter: TypeAlias = "asyncio.Future[Grant | bytes]"
"""Gets the lock with the record, or the turn to speak with Redis: the token of a lock to take over, empty
where there is none."""


class Queue:
    """Those of this process who want one session, in the order in which they came."""

    __slots__ = ("ahead", "asks_again", "heir", "passed", "token", "waiting")

    def __init__(self) -> None:
        self.waiting: list[Waiter] = []
        self.token = b""  # of the speaker's lock; empty while it asks
        self.asks_again = False  # the speaker found the lock taken: it waits too
        self.heir: Waiter | None = None  # gets the lock when the commit that is under way is stored
        self.passed = 0  # how often in a row
        self.ahead = 0.0  # ms by which Redis' clock is ahead of the loop's


class Queues:
    """The queues of one event loop, by lock; there is one while somebody holds the lock or asks for it."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._queues: dict[bytes, Queue] = {}

    def __len__(self) -> int:
        return len(self._queues)

    def close(self) -> None:
        """Nobody waits here any more; who asks Redis is refused."""
        for queue in self._queues.values():
            self._tell_all(queue, SessionStoreError(CLOSED))

    # -- to the lock --------------------------------------------------------------------------------------

    async def acquire(self, keys: Keys, terms: Terms) -> Grant | bytes:
        """The lock, or why there is nothing to lock: see `Turn.take`. Cancelled, it leaves nothing behind."""
        engine, record = self._engine, keys.record
        queue, started = self._queues.get(record), engine.loop.time()
        if queue is not None:
            given = await self._wait(keys, terms, queue)
            if isinstance(given, Grant):
                return given._replace(waited=engine.loop.time() - started)
            return await self._speak(keys, terms, queue, started, given)
        queue = self._queues[record] = Queue()
        token = new_token()
        try:  # nearly always enough: nobody else wants this session
            found = engine.found(await engine.take(keys, token, terms, started), started)
        except BaseException as error:
            if not isinstance(error, NotSentError):
                engine.let_go(keys, token, terms)
            self._ends(record, queue, error)
            raise
        if isinstance(found, tuple):
            queue.token, queue.ahead = token, found[1]
            return Grant(token, *found, terms.lease, 0.0)
        if found == b"B":
            return await self._speak(keys, terms, queue, started)
        self._next(record, queue)
        return found

    async def _wait(self, keys: Keys, terms: Terms, queue: Queue) -> Grant | bytes:
        if len(queue.waiting) + queue.asks_again >= terms.max_waiters:
            raise TooManyWaitersError(terms.max_waiters)
        waiter: Waiter = self._engine.loop.create_future()
        queue.waiting.append(waiter)
        try:
            await asyncio.wait((waiter,), timeout=terms.wait)
        except BaseException:
            self._leave(keys, terms, queue, waiter)
            raise
        if not waiter.done():
            self._leave(keys, terms, queue, waiter)
            raise LockTimeoutError(terms.wait)
        return waiter.result()

    def _leave(self, keys: Keys, terms: Terms, queue: Queue, waiter: Waiter) -> None:
        """Give up a place, or what was given in it."""
        if not waiter.done():
            waiter.cancel()
            if waiter in queue.waiting:
                queue.waiting.remove(waiter)
        elif waiter.exception() is None:
            given = waiter.result()
            token = given.token if isinstance(given, Grant) else given
            self._engine.leases.drop(token)
            if not self._next(keys.record, queue, token) and token:
                self._engine.let_go(keys, token, terms)

    async def _speak(
        self, keys: Keys, terms: Terms, queue: Queue, started: float, place: bytes = b""
    ) -> Grant | bytes:
        """Queue in Redis, or take over the lock that was passed on under `place`."""
        queue.asks_again = True
        try:
            if not place and terms.wait > 0:
                await self._engine.channel.open()
            answer = await Turn(self._engine, keys, terms, started, place).take()
        except BaseException as error:
            self._ends(keys.record, queue, error)
            raise
        if isinstance(answer, Grant):
            queue.token, queue.ahead, queue.asks_again = answer.token, answer.ahead, False
        else:
            self._next(keys.record, queue)
        return answer

    def _ends(self, record: bytes, queue: Queue, error: BaseException) -> None:
        """The speaker failed. A fault of Redis is everybody's: who would ask next would only wait for it."""
        if isinstance(error, SessionStoreError):
            self._tell_all(queue, error)
        self._next(record, queue)

    def _tell_all(self, queue: Queue, error: SessionStoreError) -> None:
        for waiter in queue.waiting:
            fault = SessionStoreError(*error.args)
            fault.__cause__ = error.__cause__
            waiter.set_exception(fault)
        queue.waiting.clear()

    def _next(self, record: bytes, queue: Queue, token: bytes = b"") -> bool:
        """The next one speaks, and may take over the lock with this token. False: nobody waits any more."""
        queue.token = b""
        if not queue.waiting:
            del self._queues[record]
            return False
        queue.asks_again = True
        queue.waiting.pop(0).set_result(token)
        return True

    # -- from the lock ------------------------------------------------------------------------------------

    def release(self, keys: Keys, token: bytes, terms: Terms) -> None:
        """Pass the lock on, here or in Redis; written, not waited for."""
        queue = self._queues.get(keys.record)
        if queue is not None and queue.token == token:
            if queue.heir is not None:
                return  # the commit that is under way in another task passes it on
            if queue.waiting and queue.passed < PASSES:
                queue.passed += 1
                self._next(keys.record, queue, token)
                return
        self._engine.let_go(keys, token, terms)
        self.leave(keys, token)

    def leave(self, keys: Keys, token: bytes) -> None:
        """The lock was let go in Redis, by a call that is on its way, or is lost: the next one here asks."""
        queue = self._queues.get(keys.record)
        if queue is not None and queue.token == token and token and queue.heir is None:
            queue.passed = 0
            self._next(keys.record, queue)

    def dismiss(self, keys: Keys) -> None:
        """The record is deleted by a call that is on its way: nobody need wait for who holds it."""
        queue = self._queues.get(keys.record)
        if queue is not None and queue.token:
            self.leave(keys, queue.token)

    def settle(self, keys: Keys, token: bytes) -> bool:
        """Whether there is an heir, to whom the lock goes when the commit that follows is stored.

        Without one the commit lets the lock go in Redis, and the next one here asks. The heir is chosen
        before the commit is sent: who comes later could be handed a record that is older than its request.
        """
        queue = self._queues.get(keys.record)
        if queue is None or queue.token != token or not token or queue.heir is not None:
            return False
        if queue.waiting and queue.passed < PASSES:
            queue.heir = queue.waiting.pop(0)
            return True
        queue.passed = 0
        self._next(keys.record, queue)
        return False

    def disinherit(self, keys: Keys) -> None:
        """The heir is the first of those who wait again: it has to ask Redis what became of the commit."""
        queue = self._queues[keys.record]
        heir, queue.heir = queue.heir, None
        if heir is not None and not heir.done():
            queue.waiting.insert(0, heir)

    def inherit(self, keys: Keys, token: bytes, terms: Terms, stored: bytes | None, age: float) -> None:
        """The heir gets the lock, and with it the value that was `stored` under it `age` seconds ago.

        Without a value, or where it may be too old, the heir asks Redis whether the lock is still ours.
        """
        queue = self._queues[keys.record]
        heir, left = queue.heir, self._engine.leases.left(token)
        queue.passed += 1
        if stored is not None and age < left / 2 and heir is not None and not heir.done():
            queue.heir = None
            heir.set_result(Grant(token, stored, queue.ahead, left, 0.0))
            return
        self._engine.leases.drop(token)
        self.disinherit(keys)
        if not self._next(keys.record, queue, token):
            self._engine.let_go(keys, token, terms)
