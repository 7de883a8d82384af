"""What one event loop holds of Redis: connections, commands, locks, records; and their end."""

from __future__ import annotations

import asyncio
import secrets
import weakref
from collections.abc import AsyncGenerator

from ...errors import SessionStoreError
from ..endings import Endings, Life
from .commands.commands import Commands
from .commands.keys import Keys, KeySpace
from .connection.call import CLOSED
from .connection.deployment import Client, Deployment, deployment
from .connection.routing import Cluster, OneNode, Router
from .locking.checkouts import Checkouts
from .locking.ended import EndedChannel
from .locking.leases import Leases
from .locking.locks import Locks
from .locking.releases import Releases
from .locking.subscription import Subscription
from .records.index import UserIndex
from .records.operations import Records


class LoopState:
    """Builds the parts of one event loop and closes them. Made in a running loop, used in no other."""

    def __init__(self, deployment: Deployment, keys: KeySpace) -> None:
        self.router: Router = Cluster(deployment) if deployment.seeds else OneNode(deployment)
        self.commands = Commands(self.router, keys.ended)
        channel = b"%bwake:%b" % (keys.prefix, secrets.token_hex(8).encode())
        self.endings = Endings(self._life_of)
        told = EndedChannel(keys, self.endings)
        self.subscription = Subscription(self.router.any_pipeline, channel, deployment.timeout, told)
        self.releases = Releases(self.router)
        self.leases = Leases(self.commands.run, self._lease_lost)
        self.locks = Locks(self.commands, self.subscription, self.releases, self.leases)
        self.checkouts = Checkouts(self.commands, self.locks, self.releases, self.leases, keys)
        self.records = Records(self.commands, keys, self.locks.dismiss)
        self.index = UserIndex(self.commands, self.records, keys)
        self.keeper: AsyncGenerator[None, None] | None = None

    async def aclose(self) -> None:
        """Let go of all that is held, and close everything: within the timeout, also where Redis is away.

        Waiters leave their queue. A call that is made later fails. A request that still runs has lost its
        lock, and its commit is stored only if nobody has come in between.
        """
        self.commands.close()
        for lease in self.leases.close():
            self.releases.let_go(lease.keys, lease.token, lease.timing)
        self.releases.close()
        await self.index.aclose()
        self.locks.close()
        self.endings.close(SessionStoreError(CLOSED))
        await self.subscription.aclose()
        self.releases.end()
        await self.router.aclose()

    async def _life_of(self, session_id: str) -> Life | None:
        is_told = await self.subscription.join()
        left = await self.records.left(session_id)
        return None if left is None else Life(left, is_told)

    def _lease_lost(self, keys: Keys, token: bytes) -> None:
        self.locks.leave(keys, token)


class LoopStates:
    """The state of each event loop. Loops come and go: a test client runs one per call.

    A state ends with its loop, without anybody's call. Each is kept by a suspended async generator, and those
    are closed by `loop.shutdown_asyncgens()`, which asyncio.run, anyio and uvloop all call.
    """

    def __init__(self, deployment: Deployment, keys: KeySpace) -> None:
        self._deployment = deployment
        self._keys = keys
        self._by_loop: dict[asyncio.AbstractEventLoop, LoopState] = {}

    def here(self) -> LoopState | None:
        """The state of the running loop, None where it has none yet."""
        return self._by_loop.get(_running_loop())

    async def get(self) -> LoopState:
        """The state of the running loop, made if there is none."""
        loop = _running_loop()
        return self._by_loop.get(loop) or await self._open(loop)

    async def aclose(self) -> None:
        """Close the running loop's state, if there is one; `get` makes a new one."""
        state = self.here()
        if state is not None and state.keeper is not None:
            keeper, state.keeper = state.keeper, None
            await keeper.aclose()

    async def _open(self, loop: asyncio.AbstractEventLoop) -> LoopState:
        for other in list(self._by_loop):
            if other.is_closed():  # without shutdown_asyncgens(): nothing can be closed in it any more
                del self._by_loop[other]
        state = self._by_loop[loop] = LoopState(self._deployment, self._keys)
        state.keeper = self._keep(loop, state)
        await anext(state.keeper)
        return state

    async def _keep(self, loop: asyncio.AbstractEventLoop, state: LoopState) -> AsyncGenerator[None, None]:
        try:
            yield
        finally:
            self._by_loop.pop(loop, None)
            await state.aclose()


def states_for(client: Client) -> LoopStates:
    """The states that all locks of this client share; they end with it or with their loop."""
    states = _shared.get(client)
    if states is None:
        states = _shared[client] = LoopStates(deployment(client), KeySpace("lock:"))
    return states


_shared: weakref.WeakKeyDictionary[Client, LoopStates] = weakref.WeakKeyDictionary()


def _running_loop() -> asyncio.AbstractEventLoop:
    """`RuntimeError` on trio, where no lock, no record and no connection can be had."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        raise RuntimeError(
            "the Redis store runs on asyncio only, as redis-py does; use the in-memory store on trio"
        ) from None
