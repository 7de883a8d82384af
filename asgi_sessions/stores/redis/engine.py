"""What one event loop holds of Redis: lanes, queues, wake channel and heartbeat, and their end."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import weakref
from collections.abc import AsyncGenerator, Awaitable, Callable
from functools import lru_cache
from typing import cast

from ...errors import SessionStoreError
from ..checkout import LockPolicy
from .calls import CLOSED, forget
from .clock import Clock
from .connections import Client, Deployment, deployment
from .layout import milliseconds
from .leases import Leases
from .queues import LockQueues
from .releases import Releases
from .replies import About, Fits, Reply, anything
from .routing import Cluster, OneNode, Router
from .scripts import RELEASE, TAKE, TAKE_AND_TELL, TOUCH, Keys, Script, pack_args
from .terms import PASSIVE, Terms
from .waiters import understood
from .wake import WakeChannel

KNOWN = 16  # terms; there is a policy and a rule for each middleware


class Engine:
    """Calls, waiting and renewals of one event loop. Made in a running loop, used in no other."""

    def __init__(self, deployment: Deployment, prefix: bytes) -> None:
        self.loop = asyncio.get_running_loop()
        self.router: Router = Cluster(deployment) if deployment.seeds else OneNode(deployment)
        self.clustered = b"1" if self.router.clustered else b"0"
        self.unlocked = Terms(0.0, clustered=self.router.clustered)  # of who loads or writes without a lock
        self._terms = lru_cache(KNOWN)(self._terms_of)
        self._clock = Clock()
        name = b"%bwake:%b" % (prefix, secrets.token_hex(8).encode())
        self.channel = WakeChannel(self.router.any_lane, name, deployment.timeout)
        self.queues = LockQueues(self)
        self.leases = Leases(self.run, self.queues.leave)
        self.releases = Releases(self._release, self.router.lane)
        self.keeper: AsyncGenerator[None, None] | None = None
        self._later: dict[bytes, asyncio.Task[None]] = {}
        self._closed = False  # makes no calls any more, but lets locks go
        self._ended = False

    def terms(self, policy: LockPolicy, idle: float | None = None, passive: bool = False) -> Terms:
        """What the scripts need of a policy and of the caller's rule of an idle timeout (seconds)."""
        return self._terms(policy, idle, passive)

    def _terms_of(self, policy: LockPolicy, idle: float | None, passive: bool) -> Terms:
        return Terms(
            policy.timeout,
            policy.wait,
            policy.max_waiters,
            activity=PASSIVE if passive else milliseconds(idle),
            clustered=self.router.clustered,
            max_hold=policy.max_hold,
        )

    def run(self, script: Script, *args: bytes, about: About = b"") -> asyncio.Future[Reply]:
        """Call a script, keys first; it leaves with everything else of this tick."""
        return self.call(script, args[0], script.by_sha + pack_args(*args), about)

    def call(self, script: Script, key: bytes, packed: bytes, about: About = b"") -> asyncio.Future[Reply]:
        """The same, all of it packed: the script's digest, keys and arguments; `key` is the first of them.

        The reply has to bear what the call is `about`.
        """
        return self._refuse() if self._closed else self.router.lane(key).run(script, packed, about)

    def command(self, *args: bytes, about: About = b"", fits: Fits = anything) -> asyncio.Future[Reply]:
        """Send a command whose first argument is its key; one that may be sent twice."""
        if self._closed:
            return self._refuse()
        return self.router.lane(args[1]).command(*args, about=about, fits=fits)

    def take(self, keys: Keys, token: bytes, terms: Terms, asked: float) -> asyncio.Future[Reply]:
        """Try once to lock and load, or load where there is no token; `found` reads the reply.

        Redis tells the time only where it is not known: each node of a cluster has its own. `asked` is now.
        """
        if self.router.clustered or asked >= self._clock.told_until:
            script, rest = TAKE_AND_TELL, terms.take_and_tell
        else:
            script, rest = TAKE, terms.take
        packed = b"%b%b$%d\r\n%b\r\n%b" % (script.by_sha, keys.packed, len(token), token, rest)
        return self.call(script, keys.record, packed, keys.mark)

    def found(self, reply: Reply, asked: float) -> tuple[bytes, float] | bytes:
        """What a take that was asked for then found: the value, and by how much Redis' clock is ahead.

        (In ms, of the loop's.) The bare word of the script where there is nothing to take, or nothing now.
        """
        clock = self._clock
        if isinstance(reply, bytes) and reply.startswith(b"asgi2:"):
            return reply, clock.ahead
        kind, *rest = understood(reply)
        if kind != b"L":
            return cast(bytes, kind)
        clock.told(cast(int, rest[1]), asked)
        return cast(bytes, rest[0]), clock.ahead

    def touch(self, keys: Keys, rule: bytes = b"0") -> None:
        """Restart the record's idle timeout; posted, not waited for, and a fault is no matter.

        `rule` is the caller's idle timeout in ms, 0 for none: nothing restarts where it is over already.
        """
        self.run(TOUCH, keys.record, rule).add_done_callback(forget)

    def let_go(self, keys: Keys, token: bytes, terms: Terms) -> asyncio.Future[Reply]:
        """Release the lock or the place in the queue that has this token; need not be awaited.

        Where that fails it is tried again until the lease is over. The reply is the first try's: 1 where the
        lock was ours, 0 where it was not.
        """
        if self._ended:
            reply = self._refuse()
            reply.add_done_callback(forget)
            return reply
        packed = b"%b%b$%d\r\n%b\r\n%b" % (
            RELEASE.by_sha, keys.packed, len(token), token, terms.release,
        )  # fmt: skip
        return self.releases.post(keys.record, token, packed, terms.lease)

    async def written(self, key: bytes) -> None:
        """Return when what was called for this key is on its way, if there is a connection."""
        if self.router.lane(key).has_more_to_write:
            await asyncio.sleep(0)  # the lane writes at the end of this tick

    def later(self, name: bytes, work: Callable[[], Awaitable[object]]) -> None:
        """Do this beside everything else, unless something of this name is being done already.

        A fault of Redis ends it, and so does the end of this engine.
        """
        if name not in self._later:
            task = self._later[name] = self.loop.create_task(_without_faults(work))
            task.add_done_callback(lambda _: self._later.pop(name, None))

    async def aclose(self) -> None:
        """Let go of all that is held, and close everything: within the timeout, also where Redis is away.

        Who waits for a lock leaves its queue. A call that is made later fails; a request that still runs has
        lost its lock, and its commit is stored only if nobody has come in between.
        """
        self._closed = True
        for lease in self.leases.close():
            self.let_go(lease.keys, lease.token, lease.terms)
        self.releases.close()
        for task in self._later.values():
            task.cancel()
        await asyncio.gather(*self._later.values(), return_exceptions=True)
        self.queues.close()
        await self.channel.aclose()
        self._ended = True
        await self.router.aclose()

    def _release(self, key: bytes, packed: bytes) -> asyncio.Future[Reply]:
        return self.router.lane(key).run(RELEASE, packed)

    def _refuse(self) -> asyncio.Future[Reply]:
        refused: asyncio.Future[Reply] = self.loop.create_future()
        refused.set_exception(SessionStoreError(CLOSED))
        return refused


async def _without_faults(work: Callable[[], Awaitable[object]]) -> None:
    with contextlib.suppress(SessionStoreError):
        await work()


def engines_for(client: Client) -> Engines:
    """The engines that all users of this client share; they end with it or with their loop."""
    engines = _shared.get(client)
    if engines is None:
        engines = _shared[client] = Engines(deployment(client), b"lock:")
    return engines


class Engines:
    """The engine of each event loop. Loops come and go: a test client runs one per call.

    An engine ends with its loop, without anybody's call: each is kept by a suspended async generator, and
    those are closed by `loop.shutdown_asyncgens()`, which asyncio.run, anyio and uvloop all call.
    """

    def __init__(self, deployment: Deployment, prefix: bytes) -> None:
        self._deployment = deployment
        self._prefix = prefix
        self._by_loop: dict[asyncio.AbstractEventLoop, Engine] = {}

    def here(self) -> Engine | None:
        """The engine of the running loop, None where it has none yet."""
        return self._by_loop.get(_running_loop())

    async def get(self) -> Engine:
        """The engine of the running loop, made if there is none."""
        loop = _running_loop()
        return self._by_loop.get(loop) or await self._open(loop)

    async def aclose(self) -> None:
        """Close the running loop's engine, if there is one; `get` makes a new one."""
        engine = self.here()
        if engine is not None and engine.keeper is not None:
            keeper, engine.keeper = engine.keeper, None
            await keeper.aclose()

    async def _open(self, loop: asyncio.AbstractEventLoop) -> Engine:
        for other in list(self._by_loop):
            if other.is_closed():  # without shutdown_asyncgens(): nothing can be closed in it any more
                del self._by_loop[other]
        engine = self._by_loop[loop] = Engine(self._deployment, self._prefix)
        engine.keeper = self._keep(loop, engine)
        await anext(engine.keeper)
        return engine

    async def _keep(self, loop: asyncio.AbstractEventLoop, engine: Engine) -> AsyncGenerator[None, None]:
        try:
            yield
        finally:
            self._by_loop.pop(loop, None)
            await engine.aclose()


def _running_loop() -> asyncio.AbstractEventLoop:
    """`RuntimeError` on trio, where no lock, no record and no connection can be had."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        raise RuntimeError(
            "the Redis store runs on asyncio only, as redis-py does; use the in-memory store on trio"
        ) from None


_shared: weakref.WeakKeyDictionary[Client, Engines] = weakref.WeakKeyDictionary()
