"""The locks of one event loop: the queues within the process. Carries out what `LockQueue` decides."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterable
from functools import partial
from typing import Any, TypeAlias

from ....errors import LockTimeoutError, SessionStoreError, TooManyWaitersError
from ...holders import NOTICE_AFTER
from ...running import while_client_stays
from ...tokens import new_token
from ..commands.commands import Commands
from ..commands.keys import Keys
from ..commands.timing import LockTiming
from ..commands.who import taken_here, who_is_here
from ..connection.call import CLOSED, NotSentError
from .leases import Leases
from .notice import ask_who_holds
from .queue import Action, After, Ask, Give, LetGo, LockQueue, State, Tell
from .releases import Releases
from .seat import Seat
from .subscription import Subscription
from .waiter import Acquired, Waiter, Wanted

Member: TypeAlias = Seat | bytes
"""A waiter is named by its seat, the first request by the token under which it asks."""

_MOST_KNOWN = 1024  # locks that are known to be taken
_FREE = State.FREE  # bound once: looking up an Enum's member is slow on Python 3.11


def _ended() -> LockQueue[Member]:
    queue: LockQueue[Member] = LockQueue(b"")
    queue.leave(b"", b"")
    return queue


_NONE = _ended()  # stands for the queue of a session that nobody wants; every token is a stranger to it


class Locks:
    """The queues of one event loop, by lock; there is one while somebody holds the lock or asks for it."""

    def __init__(
        self, commands: Commands, subscription: Subscription, releases: Releases, leases: Leases
    ) -> None:
        self._commands = commands
        self._subscription = subscription
        self._releases = releases
        self._leases = leases
        self._loop = commands.loop
        self._queues: dict[bytes, LockQueue[Member]] = {}
        self._known_taken: dict[bytes, None] = {}  # records; the oldest first

    def __len__(self) -> int:
        return len(self._queues)

    # -- to the lock --------------------------------------------------------------------------------------

    def acquire(
        self, keys: Keys, timing: LockTiming, arrived: Callable[[], None] | None = None
    ) -> Coroutine[Any, Any, Acquired | bytes]:
        """The lock, or why there is nothing to lock: see `Waiter.take`. Cancelled, nothing is left behind.

        `arrived` is called where the caller has to wait for others of this process, because Redis does not
        hear of the caller before its turn.
        """
        queue, started = self._queues.get(keys.record), self._loop.time()
        if queue is None:
            return self._acquire_first(keys, timing, started)
        return while_client_stays(self._acquire_behind(keys, timing, queue, started, arrived))

    async def _acquire_first(self, keys: Keys, timing: LockTiming, started: float) -> Acquired | bytes:
        commands, token = self._commands, new_token()
        queue = self._queues[keys.record] = LockQueue(token)
        if self._known_taken.pop(keys.record, token) is None:
            return await self._queue_up(keys, timing, queue, token, started)
        try:  # nearly always enough: nobody else wants this session
            value = taken_here(token, commands.clock.text(started))
            found = commands.found(await commands.take(keys, value, timing, started), started)
        except BaseException as error:
            if not isinstance(error, NotSentError):
                self._releases.let_go(keys, token, timing)
            self._failed(keys, timing, queue, token, error)
            raise
        if isinstance(found, tuple):
            queue.granted(token, token)
            value, ahead = found
            return Acquired(token, value, ahead, timing.lease, 0.0)
        if found == b"B":
            return await self._queue_up(keys, timing, queue, token, started)
        self._do(keys, timing, queue, queue.leave(token, b""))
        return found

    async def _queue_up(
        self, keys: Keys, timing: LockTiming, queue: LockQueue[Member], token: bytes, started: float
    ) -> Acquired | bytes:
        """Wait in Redis for a lock that somebody elsewhere has."""
        queue.found_taken(token)
        wanted = Wanted(keys, timing, started, who_is_here())
        return await while_client_stays(self._ask(wanted, queue, token))

    def found_taken(self, keys: Keys) -> None:
        """A commit without the lock found that somebody holds it: who wants it next queues at once."""
        if len(self._known_taken) >= _MOST_KNOWN:
            del self._known_taken[next(iter(self._known_taken))]
        self._known_taken[keys.record] = None

    async def _acquire_behind(
        self,
        keys: Keys,
        timing: LockTiming,
        queue: LockQueue[Member],
        started: float,
        arrived: Callable[[], None] | None,
    ) -> Acquired | bytes:
        seat = Seat(who_is_here())
        if not queue.join(seat, timing.max_waiters):
            raise TooManyWaitersError(timing.max_waiters)
        if arrived is not None:
            arrived()
        try:
            await seat.woken.wait(min(timing.wait, NOTICE_AFTER))
            if not seat.woken.is_set and timing.wait > NOTICE_AFTER:
                ask_who_holds(self._commands, keys, queue)
                await seat.woken.wait(timing.wait - NOTICE_AFTER)
            if not seat.woken.is_set:
                raise LockTimeoutError(timing.wait)
        except BaseException:
            self._do(keys, timing, queue, queue.leave(seat, seat.token))
            raise
        given = seat.taken()
        if isinstance(given, Acquired):
            return given._replace(waited=self._loop.time() - started)
        return await self._ask(Wanted(keys, timing, started, seat.who, given), queue, seat)

    async def _ask(self, wanted: Wanted, queue: LockQueue[Member], member: Member) -> Acquired | bytes:
        """Queue in Redis, or take over the lock that is left to the caller."""
        keys, timing = wanted.keys, wanted.timing
        try:
            if not wanted.token and timing.wait > 0:
                await self._subscription.open()
            notice = partial(ask_who_holds, self._commands, keys, queue)
            answer = await self._waiter(wanted, notice).take()
        except BaseException as error:
            self._failed(keys, timing, queue, member, error)
            raise
        if isinstance(answer, Acquired):
            self._do(keys, timing, queue, queue.granted(member, answer.token))
        else:
            self._do(keys, timing, queue, queue.leave(member, b""))
        return answer

    def waiter(self, keys: Keys, timing: LockTiming) -> Waiter:
        """One caller's way to this lock in Redis, past the queue within the process."""
        return self._waiter(Wanted(keys, timing, self._loop.time()))

    def _waiter(self, wanted: Wanted, on_long_wait: Callable[[], None] | None = None) -> Waiter:
        return Waiter(self._commands, self._subscription, self._releases, wanted, on_long_wait)

    def _failed(
        self, keys: Keys, timing: LockTiming, queue: LockQueue[Member], member: Member, error: BaseException
    ) -> None:
        """The asker has failed, and let go of what it had in Redis."""
        if isinstance(error, SessionStoreError):
            _tell(queue.fault(member), error)
            self._end(keys, queue)
        else:
            self._do(keys, timing, queue, queue.leave(member, b""))

    # -- from the lock ------------------------------------------------------------------------------------

    def release(self, keys: Keys, token: bytes, timing: LockTiming) -> None:
        """Pass the lock on, here or in Redis; written, not waited for."""
        queue = self._queues.get(keys.record, _NONE)
        self._do(keys, timing, queue, queue.release(token))

    def leave(self, keys: Keys, token: bytes) -> None:
        """The lock is lost, or a call on its way lets it go in Redis. The next one here asks."""
        queue = self._queues.get(keys.record, _NONE)
        self._do_asks(keys, queue, queue.ended(token))

    def dismiss(self, keys: Keys) -> None:
        """The record is being deleted by a call that is on its way. Nobody need wait for the holder."""
        queue = self._queues.get(keys.record, _NONE)
        self._do_asks(keys, queue, queue.deleted())

    def commit_begins(self, keys: Keys, token: bytes) -> After:
        """What the commit that follows has to do with the lock.

        HAND_OVER: say how it went, by `handed_over` or `hand_over_failed`. LET_GO: the next one here asks.
        """
        queue = self._queues.get(keys.record, _NONE)
        after, asks = queue.commit_begins(token)
        if asks:
            self._do_asks(keys, queue, asks)
        elif queue.state is _FREE:
            self._end(keys, queue)
        return after

    def next_holder(self, keys: Keys) -> bytes:
        """Who gets the lock by a commit that hands it over, as it is written behind the lock's token."""
        queue = self._queues.get(keys.record, _NONE)
        seat = queue.successor
        return self._commands.clock.text(self._loop.time()) + seat.who if isinstance(seat, Seat) else b""

    def handed_over(self, keys: Keys, token: bytes, timing: LockTiming, stored: Acquired | None) -> None:
        """The successor gets the lock, and with it what was `stored` under it.

        None: what was stored is not known, or may be too old. Then the next one asks Redis whether the lock
        is still ours.
        """
        queue = self._queues.get(keys.record, _NONE)
        self._do(keys, timing, queue, queue.committed(token, fresh=stored is not None), stored)

    def hand_over_failed(self, keys: Keys, token: bytes, timing: LockTiming) -> None:
        """The outcome of the commit is not known. Its request still holds the lock, unless it has let go."""
        queue = self._queues.get(keys.record, _NONE)
        self._do(keys, timing, queue, queue.unknown(token))

    def close(self) -> None:
        """Nobody is to wait any more. The asker and the holder come to an end by themselves."""
        for queue in self._queues.values():
            _tell(queue.close(), SessionStoreError(CLOSED))

    # -- carrying out -------------------------------------------------------------------------------------

    def _do(
        self,
        keys: Keys,
        timing: LockTiming,
        queue: LockQueue[Member],
        actions: Iterable[Action[Member]],
        stored: Acquired | None = None,
    ) -> None:
        """A lock that is let go or taken over is not renewed any more: its token counts for nothing."""
        for action in actions:
            if isinstance(action, LetGo):
                self._leases.drop(action.token)
                self._releases.let_go(keys, action.token, timing)
            elif isinstance(action, Ask):
                self._leases.drop(action.token)
                _wake(action.member, action.token)
            elif isinstance(action, Give) and stored is not None:
                _wake(action.member, stored)
        if queue.state is _FREE:
            self._end(keys, queue)

    def _do_asks(self, keys: Keys, queue: LockQueue[Member], asks: Iterable[Ask[Member]]) -> None:
        for ask in asks:
            _wake(ask.member, ask.token)
        if queue.state is _FREE:
            self._end(keys, queue)

    def _end(self, keys: Keys, queue: LockQueue[Member]) -> None:
        """The queue has ended; there may be another one already."""
        if self._queues.get(keys.record) is queue:
            del self._queues[keys.record]


def _wake(member: Member, given: Acquired | bytes) -> None:
    """Wake a member that waits. Only those have a seat."""
    if not isinstance(member, bytes):
        member.give(given)


def _tell(tells: Iterable[Tell[Member]], error: SessionStoreError) -> None:
    """Each gets an error of its own."""
    for tell in tells:
        fault = SessionStoreError(*error.args)
        fault.__cause__ = error.__cause__
        if not isinstance(tell.member, bytes):
            tell.member.give(fault)
