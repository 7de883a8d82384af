"""The calls of one event loop, and what Redis answers to them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from functools import lru_cache
from typing import cast

from ....errors import SessionStoreError
from ...checkout import LockPolicy
from ..connection.call import CLOSED, forget
from ..connection.replies import About, Fits, Reply, anything, are_records, mark_of, words_of
from ..connection.resp import pack_args
from ..connection.routing import Router
from ..connection.script import Script
from .clock import Clock
from .header import milliseconds
from .keys import Keys, KeySpace
from .scripts import REMOVE, TAKE, TAKE_AND_TELL, TOUCH
from .timing import PASSIVE, LockTiming

CHUNK = 500  # records asked for in one command, keys looked at in one step of a scan
_KNOWN = 16  # lock timings; there is a policy and a rule for each middleware


class Commands:
    """Sends each call by the pipeline to its key's node. Made in a running loop, used in no other.

    `ended` is the channel that tells which sessions have ended.
    """

    def __init__(self, router: Router, ended: bytes) -> None:
        self.ended = ended
        self.loop = asyncio.get_running_loop()
        self.router = router
        self.clustered = b"1" if router.clustered else b"0"
        self.unlocked = LockTiming(0.0, clustered=router.clustered)  # of who loads or writes without a lock
        self._timing = lru_cache(_KNOWN)(self._timing_of)
        self.clock = Clock((time.time() - self.loop.time()) * 1000)
        self._closed = False

    def close(self) -> None:
        """Refuse calls from now on."""
        self._closed = True

    def timing(self, policy: LockPolicy, idle: float | None = None, passive: bool = False) -> LockTiming:
        """What the scripts need of a policy and of the caller's rule of an idle timeout (seconds)."""
        return self._timing(policy, idle, passive)

    def _timing_of(self, policy: LockPolicy, idle: float | None, passive: bool) -> LockTiming:
        return LockTiming(
            policy.timeout,
            policy.wait,
            policy.max_waiters,
            activity=PASSIVE if passive else milliseconds(idle),
            clustered=self.router.clustered,
            max_hold=policy.max_hold,
        )

    # -- calls --------------------------------------------------------------------------------------------

    def run(self, script: Script, *args: bytes, about: About = b"") -> asyncio.Future[Reply]:
        """Call a script, keys first; it leaves with everything else of this tick."""
        return self.call(script, args[0], script.by_sha + pack_args(*args), about)

    def call(self, script: Script, key: bytes, packed: bytes, about: About = b"") -> asyncio.Future[Reply]:
        """The same, already packed: the script's digest, keys and arguments. `key` is the first of them.

        The reply has to bear what the call is `about`.
        """
        return self._refuse() if self._closed else self.router.pipeline(key).run(script, packed, about)

    def command(self, *args: bytes, about: About = b"", fits: Fits = anything) -> asyncio.Future[Reply]:
        """Send a command whose first argument is its key. It has to be one that may be sent twice."""
        if self._closed:
            return self._refuse()
        return self.router.pipeline(args[1]).command(*args, about=about, fits=fits)

    async def written(self, key: bytes) -> None:
        """Return when what was called for this key is on its way, if there is a connection."""
        if self.router.pipeline(key).has_more_to_write:
            await asyncio.sleep(0)  # the pipeline writes at the end of this tick

    # -- of one session -----------------------------------------------------------------------------------

    def take(self, keys: Keys, value: bytes, timing: LockTiming, asked: float) -> asyncio.Future[Reply]:
        """Try once to lock and load, or load only where the lock's value is empty; `found` reads the reply.

        `asked` is now, by the loop. Redis tells the time only where it is not known. (Each node of a cluster
        has a time of its own.)
        """
        if self.router.clustered or asked >= self.clock.told_until:
            script, rest = TAKE_AND_TELL, timing.take_and_tell
        else:
            script, rest = TAKE, timing.take
        packed = b"%b%b$%d\r\n%b\r\n%b" % (script.by_sha, keys.packed, len(value), value, rest)
        return self.call(script, keys.record, packed, keys.mark)

    def found(self, reply: Reply, asked: float) -> tuple[bytes, float] | bytes:
        """The value that a `take` found, and by how many ms Redis' clock is ahead of the loop's.

        The bare word of the script where there is nothing to take, or where another holds the lock.
        """
        clock = self.clock
        if isinstance(reply, bytes) and reply.startswith(b"asgi2:"):
            return reply, clock.ahead
        kind, *rest = words_of(reply)
        if kind != b"L":
            return cast(bytes, kind)
        clock.told(cast(int, rest[1]), asked)
        return cast(bytes, rest[0]), clock.ahead

    def touch(self, keys: Keys, rule: bytes = b"0") -> None:
        """Restart the record's idle timeout. Nobody waits for it, and a fault does not matter.

        `rule` is the caller's idle timeout in ms, 0 for none. Where it is over already, nothing restarts.
        """
        self.run(TOUCH, keys.record, rule).add_done_callback(forget)

    # -- of several sessions ------------------------------------------------------------------------------

    async def values(self, keys: KeySpace, session_ids: Sequence[str]) -> list[bytes | None]:
        """What lies under each id, None where that is nothing or no text. One round trip."""
        names = [keys.record(session_id) for session_id in session_ids]
        marks = tuple(map(mark_of, session_ids))
        size = 1 if self.router.clustered else CHUNK
        parts = [slice(start, start + size) for start in range(0, len(names), size)]
        replies = await asyncio.gather(
            *[self.command(b"MGET", *names[part], about=marks[part], fits=are_records) for part in parts]
        )
        return [value for reply in replies for value in cast("list[bytes | None]", reply)]

    def remove(self, all_keys: Sequence[Keys]) -> list[asyncio.Future[Reply]]:
        """Delete records whoever holds them; what `remove.lua` says of each."""
        args = pack_args(b"", b"", b"0", self.unlocked.claim_ms, self.clustered, b"", b"", self.ended)
        return [self.call(REMOVE, keys.record, REMOVE.by_sha + keys.packed + args) for keys in all_keys]

    def _refuse(self) -> asyncio.Future[Reply]:
        refused: asyncio.Future[Reply] = self.loop.create_future()
        refused.set_exception(SessionStoreError(CLOSED))
        return refused
