"""Routes each call to the node of its key: the only node, or the one that a cluster names."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any, Protocol, cast

from redis.crc import key_slot
from redis.exceptions import AskError, MovedError, ResponseError, TryAgainError

from ....errors import SessionStoreError
from .call import CLOSED, Call, forget
from .deployment import Deployment, close, sentinels_of
from .pipeline import Pipeline
from .replies import Reply, is_just, is_list
from .resp import pack
from .tasks import end
from .urls import Address

_ASKING = pack(b"ASKING")
HOPS = 5  # redirections of one call, as in redis-py
TRY_AGAIN = 0.02  # seconds before a call is made again whose keys are on two nodes while their slot moves


class Router(Protocol):
    """The pipelines of one event loop."""

    clustered: bool

    def pipeline(self, key: bytes) -> Pipeline:
        """The pipeline to the node that the key lives on."""
        ...

    async def primaries(self) -> list[Pipeline]:
        """A pipeline to each node that holds records."""
        ...

    def any_pipeline(self) -> Pipeline:
        """A pipeline to any node, one that answers if there is one; any will do to publish."""
        ...

    async def aclose(self) -> None:
        """Close all pipelines and pools."""
        ...


class OneNode:
    """All keys on one node, or on the primary that Sentinel names."""

    clustered = False

    def __init__(self, deployment: Deployment) -> None:
        self._pool = deployment.pool()
        self._pipeline = Pipeline(
            self._pool, deployment.timeout, idle=deployment.idle, take_over=deployment.take_over
        )
        self._sentinels = sentinels_of(self._pool)
        if self._sentinels is not None:
            self._sentinels.watch(self._pipeline)

    def pipeline(self, key: bytes) -> Pipeline:
        return self._pipeline

    async def primaries(self) -> list[Pipeline]:
        return [self._pipeline]

    def any_pipeline(self) -> Pipeline:
        return self._pipeline

    async def aclose(self) -> None:
        if self._sentinels is not None:
            await self._sentinels.aclose()
        await self._pipeline.aclose()
        await close(self._pool)


class Cluster:
    """A pipeline per node. Where a slot lives is learned from MOVED replies, which a cluster gives anyway."""

    clustered = True

    def __init__(self, deployment: Deployment) -> None:
        self._deployment = deployment
        self._pipelines: dict[Address, Pipeline] = {}
        self._slots: dict[int, Address] = {}
        self._nodes: dict[Address, None] = {}  # that are known to be there, replicas too
        self._meeting: asyncio.Task[None] | None = None

    def pipeline(self, key: bytes) -> Pipeline:
        address = self._slots.get(key_slot(key))
        if address is not None:
            pipeline = self._at(address)
            if pipeline.reachable:
                return pipeline
        elif self._meeting is None:
            self._meeting = asyncio.get_running_loop().create_task(self._meet())
        return self.any_pipeline()

    async def primaries(self) -> list[Pipeline]:
        pipeline = self.any_pipeline()
        reply = await pipeline.command(b"CLUSTER", b"SLOTS", fits=is_list)
        ranges = cast("list[tuple[Any, ...]]", reply)
        origin = next(address for address, other in self._pipelines.items() if other is pipeline)
        for first, last, *nodes in ranges:
            addresses = [self._address(origin, (host or b"").decode(), port) for host, port, *_ in nodes]
            self._slots.update(dict.fromkeys(range(first, last + 1), addresses[0]))
            self._nodes.update(dict.fromkeys(addresses))
        return [self._at(address) for address in sorted(set(self._slots.values()))]

    async def aclose(self) -> None:
        """All at once: several nodes may be away, and each is waited for."""
        if self._meeting is not None:
            await end((self._meeting,))
        pipelines, self._pipelines = self._pipelines, {}
        await asyncio.gather(*[pipeline.aclose() for pipeline in pipelines.values()])
        await asyncio.gather(*[close(pipeline.pool) for pipeline in pipelines.values()])

    async def _meet(self) -> None:
        """Learn once which nodes there are, because the only one that was named may die next."""
        try:
            await self.primaries()
        except SessionStoreError:
            self._meeting = None

    def _at(self, address: Address) -> Pipeline:
        pipeline = self._pipelines.get(address)
        if pipeline is None:
            pipeline = Pipeline(
                self._deployment.pool(address),
                self._deployment.timeout,
                idle=self._deployment.idle,
                take_over=self._deployment.take_over,
                connect_within=self._deployment.connect_within,
                redirect=partial(self._redirect, address),
                elsewhere=partial(self._elsewhere, address),
            )
            self._pipelines[address] = pipeline
        return pipeline

    def any_pipeline(self) -> Pipeline:
        """The first node that answered when last asked; without one, each in its turn."""
        known = [self._at(address) for address in self._known()]
        for pipeline in known:
            if pipeline.reachable:
                return pipeline
        for pipeline in known:
            pipeline.reachable = True
        return known[0]

    def _address(self, origin: Address, host: str, port: int) -> Address:
        """What leads from here to a node, of which the one at `origin` gives host and port.

        A node that knows no name of another, or of itself, gives none, or a question mark.
        """
        address = (host if host not in ("", "?") else origin[0], port)
        return address if self._deployment.remap is None else self._deployment.remap(address)

    def _elsewhere(self, origin: Address, call: Call) -> bool:
        """Send a call whose node cannot be reached to one that may know who has the slot by now."""
        known = [self._at(address) for address in self._known() if address != origin]
        pipeline = next((pipeline for pipeline in known if pipeline.reachable), None)
        if pipeline is None or call.hops >= HOPS:
            return False
        call.hops += 1
        pipeline.put(call)
        return True

    def _known(self) -> list[Address]:
        return list(dict.fromkeys([*self._deployment.seeds, *self._pipelines, *self._nodes]))

    def _redirect(self, origin: Address, call: Call, error: ResponseError) -> bool:
        """Send a call where the cluster says; a slot on its way to another node needs ASKING first."""
        if isinstance(error, TryAgainError):
            return self._try_again(origin, call)
        if not isinstance(error, AskError) or call.hops >= HOPS:
            return False
        call.hops += 1
        address = self._address(origin, error.host, error.port)
        target = self._at(address)
        if isinstance(error, MovedError):
            self._slots[error.slot_id] = address
            target.put(call)
            return True
        asking: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        asking.add_done_callback(forget)
        target.put(Call(None, _ASKING, asking, call.since, b"OK", is_just))
        target.put(call)
        return True

    def _try_again(self, origin: Address, call: Call) -> bool:
        """Make a call later that was not carried out; False when half of its time is over."""
        loop = asyncio.get_running_loop()
        if loop.time() - call.since > self._deployment.timeout / 2:
            return False
        loop.call_later(TRY_AGAIN, self._put, origin, call)
        return True

    def _put(self, origin: Address, call: Call) -> None:
        if not self._pipelines:
            call.fail(CLOSED)
        elif not call.future.done():
            call.hops = 0
            self._at(origin).put(call)
