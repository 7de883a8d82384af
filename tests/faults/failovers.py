"""What may befall the primary of a deployment, or the clients' way to it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TypeAlias

import anyio
import redis.asyncio
from anyio.to_thread import run_sync
from deployments import Address, RedisCluster, SentinelSet
from redis.asyncio.cluster import ClusterNode
from redis.asyncio.sentinel import Sentinel
from redis_server import RedisServer

from asgi_sessions.stores.redis.connection.deployment import Client

from .chaos import ChaosProxy, swallow

Deployment: TypeAlias = Address | SentinelSet | RedisCluster
DATA = "--appendonly", "yes", "--appendfsync", "no"  # it survives a process, which is what dies here
NETWORK_GONE = 1.2  # seconds
TIMEOUT = 1.0  # seconds of a call


class Mapped(Sentinel):
    """Sentinels whose primaries are reached by other ways than they say."""

    ways: dict[int, ChaosProxy]

    async def discover_master(self, service_name: str) -> tuple[str, int]:
        """Where the way to the primary begins."""
        _, port = await super().discover_master(service_name)
        return "127.0.0.1", self.ways[port].port


class Ways:
    """The links from the clients to the nodes of a deployment, each of which may be lost."""

    def __init__(self, deployment: Deployment, ways: dict[int, ChaosProxy]) -> None:
        self.deployment = deployment
        self._ways = ways

    def client(self) -> Client:
        """What describes a store that goes these ways."""
        deployment = self.deployment
        if isinstance(deployment, Address):
            return redis.asyncio.Redis.from_url(deployment.url)
        if isinstance(deployment, SentinelSet):
            addresses = [("127.0.0.1", each.port) for each in deployment.sentinels]
            mapped = Mapped(addresses, socket_timeout=TIMEOUT)  # type: ignore[no-untyped-call]
            mapped.ways = self._ways
            primary: Client = mapped.master_for(deployment.name)
            return primary
        nodes = [ClusterNode("127.0.0.1", way.port) for way in self._ways.values()]
        return redis.asyncio.RedisCluster(
            startup_nodes=nodes, socket_timeout=TIMEOUT, address_remap=self._remap
        )

    def to(self, node: RedisServer) -> ChaosProxy:
        """The way to this node; there is one address for all where there is one."""
        return self.deployment.proxy if isinstance(self.deployment, Address) else self._ways[node.port]

    def _remap(self, address: tuple[str, int]) -> tuple[str, int]:
        host, port = address
        return (host, self._ways[port].port) if port in self._ways else address


@contextmanager
def ways_to(deployment: Deployment) -> Iterator[Ways]:
    """Ways that end with the block."""
    with ExitStack() as stack:
        alone = isinstance(deployment, Address)
        nodes: Sequence[RedisServer] = [] if alone else deployment.nodes
        yield Ways(deployment, {node.port: stack.enter_context(ChaosProxy(node.port)) for node in nodes})


Strike: TypeAlias = Callable[[Ways, RedisServer], Awaitable[None]]


async def switch(ways: Ways, primary: RedisServer) -> None:
    """Another node takes the primary's place while it is well."""
    deployment = ways.deployment
    if isinstance(deployment, Address | SentinelSet):
        await run_sync(deployment.switch)
    else:
        await run_sync(deployment.switch, primary)


async def kill(ways: Ways, primary: RedisServer) -> None:
    """SIGKILL; a replica takes over, which an operator has to say where nobody else does."""
    ways.deployment.kill(primary)
    if isinstance(ways.deployment, Address):
        await run_sync(ways.deployment.promote)


async def freeze(ways: Ways, primary: RedisServer) -> None:
    """SIGSTOP, for good: a replica takes over."""
    ways.deployment.freeze(primary)
    if isinstance(ways.deployment, Address):
        await run_sync(ways.deployment.promote)
        ways.deployment.proxy.cut_all()  # whoever moves the address because of a fault, does so


async def lose_link(ways: Ways, primary: RedisServer) -> None:
    """Nothing comes through for longer than a call may take, then connections break; the nodes are well."""
    way = ways.to(primary)
    with way.injecting(swallow):
        await anyio.sleep(NETWORK_GONE)
    way.cut_all()


async def restart(ways: Ways, primary: RedisServer) -> None:
    """SIGKILL, and a start with what it had written down, before anybody takes over."""
    await run_sync(ways.deployment.restart, primary)


@dataclass(frozen=True)
class Fault:
    """What befalls the primary, and whether all that was acknowledged outlives it.

    Where a replica takes over from a dead primary, what had not been copied to it is lost.
    """

    name: str
    strike: Strike
    keeps_all: bool


FAULTS = [
    Fault("planned switch", switch, True),
    Fault("primary killed", kill, False),
    Fault("primary frozen", freeze, False),
    Fault("link lost", lose_link, True),
    Fault("primary restarted with its data", restart, True),
]
KINDS: dict[str, Callable[..., Deployment]] = {
    "one address": Address,
    "Sentinel": SentinelSet,
    "Cluster": RedisCluster,
}


def row(kind: str, fault: Fault) -> str:
    """What the table calls it."""
    return f"{kind}: {fault.name}"


ROWS = [row(kind, fault) for kind in KINDS for fault in FAULTS]
