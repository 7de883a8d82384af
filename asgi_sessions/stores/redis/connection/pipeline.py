"""Calls from one event loop to one Redis node, pipelined in both directions over one connection.

Any number of calls can be under way. The calls of one tick of the loop leave in one write. Replies are read
in order, and an error reply concerns its own call only. redis-py connects, authenticates and parses; its
errors become `SessionStoreError` here.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Callable
from functools import partial
from operator import attrgetter

from redis.asyncio.connection import SSLConnection
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import NoScriptError, ReadOnlyError, RedisError, ResponseError

from ....errors import SessionStoreError
from .call import CLOSED, LOST, OUT_OF_STEP, Call, forget
from .faults import explain
from .pools import Connection, Pool, give_back
from .replies import About, Fits, Reply, WrongRecords, anything, is_just
from .resp import pack
from .script import Script
from .seam import stream_of
from .stream import Stream
from .tasks import end

GRACE = 0.05  # seconds in which a loop that was blocked reads replies that arrived long ago
IDLE = 1.0  # seconds without a call, after which a connection is asked whether it still is one
ANSWER_WITHIN = 0.5  # seconds for its answer
AGAIN = 0.05  # seconds after which a call is sent again that a replica refused
TRIES = 20  # of a call, until its name leads to the primary
_PING = pack(b"PING")

_logger = logging.getLogger("asgi_sessions.redis")


class Pipeline:
    """One exclusive connection, taken from the pool when it is needed.

    `timeout` (seconds) bounds each call, connecting included. When the oldest call is older, the connection
    is dropped and all calls fail. When the connection is lost, each call is sent once more. When no
    connection can be made, all calls fail at once, and the next call tries again. After `idle` seconds
    without a call the connection may be gone without notice. Then calls wait until it has answered a PING;
    where it does not, they are sent on another one.

    When a reply does not fit its call, nobody knows whose replies came before it and will come after it. So
    the connection is dropped, all calls fail, and none is sent again.

    `redirect` may send a call to another node, as an error reply says. `elsewhere` may send a call to another
    node where this one cannot be reached. Without `take_over` only redis-py's public coroutines are used.
    """

    def __init__(
        self,
        pool: Pool,
        timeout: float,
        *,
        idle: float | None = None,
        connect_within: float | None = None,
        redirect: Callable[[Call, ResponseError], bool] | None = None,
        elsewhere: Callable[[Call], bool] | None = None,
        take_over: bool = True,
    ) -> None:
        self.pool = pool
        self.reachable = True  # False since a connection was lost, given up or could not be made
        self.on_lost: Callable[[], None] | None = None  # told when a connection is not used any more
        self._timeout = timeout
        self._connect_within = connect_within
        self._redirect = redirect
        self._elsewhere = elsewhere
        self._take_over = take_over
        self._idle = idle or IDLE
        self._loop = asyncio.get_running_loop()
        self._outgoing: list[Call] = []
        self._last_flush = 0  # calls in it
        self.sent: deque[Call] = deque()
        self._connection: Connection | None = None
        self._stream: Stream | None = None  # None: nothing can be written now
        self._trusted_until = 0.0  # the loop's time until which a connection need not be asked
        self._ping: asyncio.Future[Reply] | None = None  # it has been asked
        self._held: asyncio.TimerHandle | None = None  # until then nothing is written
        self._leaving = False  # its node is a replica: replies are awaited, then it is given up
        self._task: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._suspect: Call | None = None
        self._wrong = WrongRecords()
        self._connections = 0  # made so far
        self._flush_scheduled = False
        self._closed = False

    # -- calling ------------------------------------------------------------------------------------------

    def run(self, script: Script, packed: bytes, about: About = b"") -> asyncio.Future[Reply]:
        """Send a call of a script by its digest; the future gives its reply or raises `SessionStoreError`."""
        future: asyncio.Future[Reply] = asyncio.Future(loop=self._loop)
        self.put(Call(script, packed, future, self._loop.time(), about, script.fits))
        return future

    def command(self, *args: bytes, about: About = b"", fits: Fits = anything) -> asyncio.Future[Reply]:
        """Send a command that may be sent twice."""
        future: asyncio.Future[Reply] = self._loop.create_future()
        self.put(Call(None, pack(*args), future, self._loop.time(), about, fits))
        return future

    def put(self, call: Call) -> None:
        """Send a call: at once where it seems to be alone, else at the end of this tick.

        A write costs more than a call, so a call that is not prompt leaves with what its request calls next.
        """
        if self._closed:
            call.fail(CLOSED)
            return
        self._outgoing.append(call)
        if not self._flush_scheduled:
            alone = self._last_flush <= 1 and not self.sent and self._stream is not None
            if alone and call.is_prompt:
                self.flush()
            else:
                self._flush_scheduled = True
                self._loop.call_soon(self.flush)
        if self._timer is None:
            self._timer = self._loop.call_later(self._timeout, self._watch)

    @property
    def has_more_to_write(self) -> bool:
        """Whether calls wait for the end of this tick."""
        return self._flush_scheduled

    def flush(self) -> None:
        """Write what waits to be sent now; a call that was cancelled before is not sent at all."""
        self._flush_scheduled = False
        calls = [call for call in self._outgoing if not call.future.done()]
        if self._stream is None or self._held is not None or self._stream.is_closing():
            self._outgoing = calls
            if calls and self._task is None:
                self._task = self._loop.create_task(self._serve())
            return
        if calls and not self.sent and calls[-1].since > self._trusted_until:
            self._outgoing = calls
            self._ask(self._stream)
            return
        self._outgoing = []
        self._last_flush = len(calls)
        if calls:
            self._stream.write(b"".join([call.packed for call in calls]))
            self.sent.extend(calls)
            self._trusted_until = calls[-1].since + self._idle

    def drop(self, reason: str) -> None:
        """Give this connection up; its calls go on as after a lost one.

        A connection that is being made is begun anew. Does nothing where there is none, or where the task
        that makes it calls: what that makes is new.
        """
        task = self._task
        if task is not None and task is not asyncio.current_task():
            self._lost(RedisConnectionError(reason))
            task.cancel()
        self.resume()

    def hold(self, seconds: float) -> None:
        """Write nothing for so many seconds, or until `resume` or `drop`: another node is about to take over.

        What was written is answered, and copied to that node before it takes over.
        """
        if self._held is None:
            self._held = self._loop.call_later(seconds, self.resume)

    def resume(self) -> None:
        """Write again, first what was held."""
        if self._held is not None:
            self._held.cancel()
            self._held = None
            self.flush()

    # -- the connection's life ------------------------------------------------------------------------------

    async def _serve(self) -> None:
        """Connect, write what waits, read replies until the connection is lost."""
        try:
            connection = await self._connect()
            try:
                self._connection = connection
                stream = self._stream = stream_of(connection, self, take_over=self._take_over)
                self._trusted_until = self._loop.time() + self._idle
                self.flush()
                await stream.read()
            finally:
                await give_back(self.pool, connection)
        except SessionStoreError as error:
            self._end(str(error), error.__cause__)
        except asyncio.CancelledError as error:  # by the end of the loop, which waits for `aclose` afterwards
            if self._mine():
                self._lost(error)
            raise
        except Exception as error:
            if self._mine():
                self._lost(error)

    async def _connect(self) -> Connection:
        try:
            connection = await asyncio.wait_for(self.pool.get_connection(), self._connect_within)
        except Exception as error:
            self.reachable = False
            tls = issubclass(self.pool.connection_class, SSLConnection)
            raise SessionStoreError(f"Redis cannot be reached: {explain(error, tls=tls)}") from error
        self.reachable = True
        self._connections += 1
        return connection

    def refused(self, error: Exception) -> Exception | None:
        """An error arrived: of one call, or of the connection."""
        if not isinstance(error, ResponseError):
            return error
        if not self.sent:
            return self._out_of_step()
        self._refused(self.sent.popleft(), error)
        return None

    def misfit(self, reply: Reply) -> Exception | None:
        """A reply that nobody waits for; no error where it is a record that is known to be wrong."""
        if self.sent:
            call = self.sent[0]
            withheld = self._wrong.withheld(reply, call.about, self._connections)
            if call.fits(withheld, call.about):
                self.sent.popleft().answer(withheld)
                return None
        return self._out_of_step()

    def _out_of_step(self) -> SessionStoreError:
        _logger.error(OUT_OF_STEP)
        return SessionStoreError(OUT_OF_STEP)

    def _refused(self, call: Call, error: ResponseError) -> None:
        """Take an error reply to this call. A replica's error says that the node is no longer a primary."""
        demoted = isinstance(error, ReadOnlyError) or "-READONLY" in str(error)  # in scripts before Redis 7
        if not call.future.done() and not self._sent_on(call, error, demoted):
            call.fail(f"Redis refused the call: {explain(error)}", error)
        if demoted or self._leaving:
            self._leave()

    def _sent_on(self, call: Call, error: ResponseError, demoted: bool) -> bool:
        """Whether a call is sent again after an error, which says that it was not carried out."""
        if isinstance(error, NoScriptError) and call.teach():
            self.put(call)
        elif self._redirect is not None and self._redirect(call, error):
            pass
        elif demoted and call.hops < TRIES and self._loop.time() - call.since < self._timeout - AGAIN:
            call.hops += 1  # the same name may lead to the primary at once, or in a moment
            if call.hops == 1:
                self._outgoing.append(call)
            else:
                self._loop.call_later(AGAIN, self.put, call)
        else:
            return False
        return True

    def _leave(self) -> None:
        """Write nothing more on this connection, and drop it when all that was sent is answered."""
        self._leaving, self._stream = True, None
        left = partial(self._left, self._task)
        if self.sent:
            self.sent[-1].future.add_done_callback(left)
        else:
            self._loop.call_soon(left)

    def _left(self, task: asyncio.Task[None] | None, _: object = None) -> None:
        if task is self._task:
            self.drop("the node is a replica now")

    def _lost(self, error: BaseException) -> None:
        """Send every call once more, in order. Its script finds out whether it was carried out."""
        self.reachable = False
        self._detach()
        again = []
        for call in self.sent:
            if call.again():
                again.append(call)
            else:
                call.fail(f"{LOST}: {explain(error)}", error)
        self.sent.clear()
        self._outgoing = sorted([*again, *self._outgoing], key=attrgetter("since"))
        self.flush()

    def _end(self, message: str, cause: BaseException | None) -> None:
        """Fail every call that no other node takes; the next call connects again."""
        if self._mine():
            self._detach()
            if self._elsewhere is not None:
                self._outgoing = [call for call in self._outgoing if not self._elsewhere(call)]
            self._fail_all(message, cause)

    def _mine(self) -> bool:
        """False in a task that was given up: `sent` belongs to another connection now."""
        return self._task is asyncio.current_task()

    def _detach(self) -> None:
        self._stream = self._connection = self._task = None
        self._leaving = False
        if self._ping is not None:
            self._ping.cancel()
            self._ping = None
        if self.on_lost is not None:
            self.on_lost()

    # -- whether an idle connection still is one ------------------------------------------------------------

    def _ask(self, stream: Stream) -> None:
        """Write nothing after the question until the answer is there, so that no call can be in doubt."""
        self._stream = None
        ping = self._ping = self._loop.create_future()
        self.sent.append(Call(None, _PING, ping, self._loop.time(), b"PONG", is_just))
        ping.add_done_callback(partial(self._answered, stream))
        stream.write(_PING)
        self._loop.call_later(ANSWER_WITHIN, self._loop.call_later, GRACE, self._not_answered, ping)

    def _answered(self, stream: Stream, ping: asyncio.Future[Reply]) -> None:
        """Any answer will do, an error too."""
        forget(ping)
        if ping is self._ping:
            self._ping, self._stream = None, stream
            self._trusted_until = self._loop.time() + self._idle
            self.flush()

    def _not_answered(self, ping: asyncio.Future[Reply]) -> None:
        if ping is self._ping:
            self.drop("the connection to Redis had been idle and does not answer any more")

    def _fail_all(self, message: str, cause: BaseException | None) -> None:
        sent, outgoing = list(self.sent), self._outgoing
        self.sent.clear()
        self._outgoing = []
        for call in sent:
            call.fail(message, cause)
        for call in outgoing:
            call.fail(message, cause, sent=call.sent_twice)

    # -- the deadline ---------------------------------------------------------------------------------------

    def _watch(self) -> None:
        """One timer for all calls: look at the oldest one, and sleep on."""
        self._timer = None
        calls = [call for call in [*self.sent, *self._outgoing] if not call.future.done()]
        if not calls:
            return
        left = calls[0].since + self._timeout - self._loop.time()
        if left <= 0 and calls[0] is self._suspect:
            self._give_up()
            return
        if left <= 0:
            self._suspect = calls[0]
            left = GRACE
        self._timer = self._loop.call_later(left, self._watch)

    def _give_up(self) -> None:
        task, self._suspect = self._task, None
        self.reachable = False
        self._detach()
        message = f"Redis did not answer within {self._timeout:g} seconds"
        self._fail_all(message, TimeoutError(message))
        if task is not None:
            task.cancel()

    async def aclose(self) -> None:
        """Wait for the calls under way, at most their timeout, and close; later calls fail."""
        self.flush()
        waiting = [call.future for call in [*self.sent, *self._outgoing]]
        if waiting:
            await asyncio.wait(waiting, timeout=self._timeout)
        self._closed = True
        task, connection = self._task, self._connection
        self._detach()
        self._fail_all(CLOSED, None)
        if self._timer is not None:
            self._timer.cancel()
        if connection is not None:
            with contextlib.suppress(RedisError, OSError, asyncio.TimeoutError):  # it has ended, somehow
                await connection.disconnect()
        if task is not None:
            await end((task,))
