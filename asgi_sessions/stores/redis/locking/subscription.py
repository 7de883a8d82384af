"""The channel on which Redis announces a lock that was handed over, one for each event loop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from functools import partial
from typing import cast

from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import NoPermissionError, RedisError

from ....errors import SessionStoreError
from ..commands.timing import NO_CHANNEL, POLL
from ..connection.call import OUT_OF_STEP
from ..connection.faults import explain
from ..connection.pipeline import ANSWER_WITHIN, IDLE, Pipeline
from ..connection.pools import Connection, give_back
from ..connection.replies import Reply, WrongRecords, is_number, is_record
from ..connection.tasks import end
from .ended import EndedChannel

_BREATHER = 0.05  # seconds before a subscription that was just lost is made again

_logger = logging.getLogger("asgi_sessions.redis")


class Subscription:
    """Made when somebody waits for the first time.

    Messages are believed only from the node that the pipeline speaks to. One address may lead to several
    nodes, and a replica passes on what its primary publishes to others, which counts no listener here. So the
    pipeline publishes to the channel once, to see that somebody hears it; and the subscription ends with the
    pipeline's connection.

    When the subscription is lost, all who wait here ask Redis again at once. When Redis refuses it (ACL),
    waiters poll.
    """

    def __init__(
        self, pipeline: Callable[[], Pipeline], name: bytes, timeout: float, ended: EndedChannel
    ) -> None:
        self.name = name
        self._ended = ended
        self.live = False
        self._pipeline = pipeline
        self._timeout = timeout
        self._refused = False
        self._dropped = False
        self._lost_at = self._heard_at = float("-inf")
        self._connection: Connection | None = None
        self._expected: dict[bytes, asyncio.Future[bytes | None]] = {}
        self._task: asyncio.Task[None] | None = None
        self._opened: asyncio.Future[bytes] | None = None
        self._question: asyncio.Task[None] | None = None  # whether the connection still is one
        self._drained: asyncio.Future[None] | None = None  # set once it is closed
        self._wrong = WrongRecords()
        self._subscriptions = 0  # made so far

    def expect(self, token: bytes) -> asyncio.Future[bytes | None]:
        """The future of this token's message; None as result: the channel broke, ask again."""
        future: asyncio.Future[bytes | None] = asyncio.get_running_loop().create_future()
        self._expected[token] = future
        return future

    def forget(self, token: bytes) -> None:
        """Believe no message for this token any more."""
        self._expected.pop(token, None)
        if self._drained is not None and not self._expected and not self._drained.done():
            self._drained.set_result(None)

    async def open(self) -> bytes:
        """The channel's name once Redis has confirmed the subscription, or `NO_CHANNEL`."""
        if self._refused or self._drained is not None:
            return NO_CHANNEL
        if self._task is None or self._opened is None:
            loop = asyncio.get_running_loop()
            self._opened = loop.create_future()
            self._dropped = False
            self._task = loop.create_task(self._listen(self._opened))
            self._task.add_done_callback(partial(self._closed, self._opened))  # also where it never began
        elif self.live and asyncio.get_running_loop().time() - self._heard_at > IDLE:
            self._ask()
        opened = self._opened
        await asyncio.wait((opened,))
        return opened.result()

    async def join(self) -> bool:
        """Whether ended sessions are told here from now on; False where one has to look."""
        if await self.open() != self.name or self._connection is None:
            return False
        return await self._ended.join(self._connection, self._pipeline())

    def vetted(self, value: bytes, mark: bytes) -> bytes | None:
        """The value of a message, if its record begins with this mark.

        None where it is another session's record. Then this subscription is believed no more and made anew.
        Where the record itself is wrong, whichever connection gives it, it is withheld.
        """
        if not is_record(value, mark):
            value = cast(bytes, self._wrong.withheld(value, mark, self._subscriptions))
        if is_record(value, mark):
            return value
        _out_of_step()
        self._drop()
        return None

    def doubt(self) -> None:
        """A lock came without its message: subscribe anew, because a node that hangs publishes nothing."""
        age = asyncio.get_running_loop().time() - self._lost_at
        if self.live and age > POLL:
            self._drop()

    async def aclose(self) -> None:
        """Unsubscribe for good. Waiters ask again, are refused, and have left when this returns."""
        self._drained = asyncio.get_running_loop().create_future()
        task = self._task
        if task is not None:
            await end((task,))
        self._wake_all()
        if self._expected:
            await asyncio.wait((self._drained,), timeout=self._timeout)

    def _drop(self) -> None:
        """Believe nothing more of this subscription."""
        self._dropped, self.live = True, False
        if self._task is not None:
            self._task.cancel()

    def _ask(self) -> None:
        """A connection that was idle for long may be gone without notice. To subscribe again is answered."""
        loop = asyncio.get_running_loop()
        self._question = loop.create_task(self._subscribe_again())
        asked = self._heard_at = loop.time()
        loop.call_later(ANSWER_WITHIN, self._not_heard, asked)

    async def _subscribe_again(self) -> None:
        connection = self._connection
        if connection is not None and connection.is_connected:  # else redis-py would connect anew
            with contextlib.suppress(RedisError, OSError):  # then no answer comes
                await connection.send_command("SUBSCRIBE", self.name)

    def _not_heard(self, asked: float) -> None:
        if self.live and self._heard_at == asked:
            self._drop()

    async def _listen(self, opened: asyncio.Future[bytes]) -> None:
        pipeline = self._pipeline()
        try:
            connection = await asyncio.wait_for(self._subscribe(pipeline), self._timeout)
            try:
                if self._dropped:  # in the moment in which it was made
                    return
                self.live, self._connection = True, connection
                self._subscriptions += 1
                opened.set_result(self.name)
                while True:
                    await self._read(connection)
            finally:
                if self._question is not None:
                    self._question.cancel()
                await give_back(pipeline.pool, connection)
        except (RedisError, SessionStoreError, OSError, asyncio.TimeoutError) as error:
            self._failed(error.__cause__ if isinstance(error, SessionStoreError) else error)
        finally:
            pipeline.on_lost = None

    async def _read(self, connection: Connection) -> None:
        try:
            message = await connection.read_response(disable_decoding=True)
        except NoPermissionError as error:
            if not self._ended.refused(error):
                raise
        else:
            if not self._ended.take(message, connection):
                self._deliver(message)

    def _failed(self, error: BaseException | None) -> None:
        if isinstance(error, NoPermissionError):
            self._refused = True
            why = explain(error)
            _logger.warning("Redis refuses to wake waiting requests; they poll, ten times a second: %s", why)
        else:
            _logger.debug("the subscription that wakes waiting requests was lost: %s", error)

    async def _subscribe(self, pipeline: Pipeline) -> Connection:
        loop = asyncio.get_running_loop()
        if loop.time() - self._lost_at < 1.0:
            await asyncio.sleep(_BREATHER)
        pipeline.on_lost = self._drop
        connection = await pipeline.pool.get_connection()
        try:
            await connection.send_command("SUBSCRIBE", self.name)
            reply = await connection.read_response(disable_decoding=True)
            if not isinstance(reply, list) or reply[:2] != [b"subscribe", self.name]:
                raise _out_of_step()
            if await pipeline.command(b"PUBLISH", self.name, b"", fits=is_number) == 0:
                raise RedisConnectionError("it is at another node than that of the calls")
        except BaseException:
            await give_back(pipeline.pool, connection)
            raise
        return connection

    def _deliver(self, message: Reply) -> None:
        """Give a message to its waiter, if that is still here."""
        self._heard_at = asyncio.get_running_loop().time()
        match message:
            case [b"message", self.name, bytes(payload)]:
                name, _, news = payload.partition(b":")
                token = name.partition(b".")[0]  # another release tells who it is, too
            case [b"subscribe", self.name, int()]:
                return  # the subscription was confirmed again
            case _:
                raise _out_of_step()
        future = self._expected.get(token)
        if future is not None and not future.done():
            future.set_result(news)

    def _closed(self, opened: asyncio.Future[bytes], _: asyncio.Task[None]) -> None:
        self.live = False
        self._task = self._connection = None
        with contextlib.suppress(RuntimeError):  # no loop any more
            self._lost_at = asyncio.get_running_loop().time()
        if not opened.done():
            opened.set_result(NO_CHANNEL)
        self._ended.lost()
        self._wake_all()

    def _wake_all(self) -> None:
        for future in self._expected.values():
            if not future.done():
                future.set_result(None)


def _out_of_step() -> RedisConnectionError:
    _logger.error(OUT_OF_STEP)
    return RedisConnectionError(OUT_OF_STEP)
