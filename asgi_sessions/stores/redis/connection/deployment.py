"""From what a user gives, a client or a URL, to private connection pools of redis-py.

The client is a description only (address, TLS, credentials, Sentinel): its own connections, decoding and
retries are left alone. Retries are ours, for redis-py's would run a script again without telling.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias, cast

from redis.asyncio import Redis, RedisCluster
from redis.asyncio.connection import Connection, ConnectionPool
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel, SentinelConnectionPool
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from .faults import explain
from .pools import Pool
from .sentinels import SentinelClient, Sentinels
from .urls import Address, read

Client: TypeAlias = Redis | RedisCluster

TIMEOUT = 5.0  # seconds, where neither the caller nor the client says another
_SECONDS = ("socket_timeout", "socket_connect_timeout", "health_check_interval")
_CONNECTIONS = 8  # a pipeline and a subscription, each with one that is being closed
_NOT_OURS = (
    "connection_pool",
    "event_dispatcher",
    "himport_registry",
    "maint_notifications_config",
    "maint_notifications_pool_handler",
    "oss_cluster_maint_notifications_handler",
    "response_callbacks",
    "retry_on_timeout",
)
# A cluster client that may read from replicas sends READONLY: they would then run our scripts, and refuse the
# first write in them, instead of naming the primary.
_READONLY = "redis_connect_func"
# A peer that is gone without notice is found within half a minute, even if nobody calls; and a network that
# forgets idle connections keeps these. Not every system has all three options, or under these names.
_KEEPALIVE = {
    getattr(socket, name): seconds
    for name, seconds in (("TCP_KEEPIDLE", 15), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3))
    if hasattr(socket, name)
}


@dataclass(frozen=True, slots=True)
class Deployment:
    """How to reach a Redis: one node or the primary that Sentinel names, or a cluster if there are `seeds`.

    `timeout` is the longest that a call may take, in seconds. Where the nodes of a cluster give addresses
    that lead nowhere from here, `remap` tells those that do. `take_over`: see `Pipeline`.
    """

    template: ConnectionPool = field(repr=False)  # which shows the password
    timeout: float
    seeds: tuple[Address, ...] = ()
    remap: Callable[[Address], Address] | None = None
    take_over: bool = True

    @property
    def idle(self) -> float | None:
        """After so many seconds without a call a connection is to be tried first; None: no wish."""
        return self.template.connection_kwargs.get("health_check_interval") or None

    @property
    def connect_within(self) -> float | None:
        """Seconds in which a node of a cluster has to be there, so that another one can be tried in time."""
        return self.timeout / (len(self.seeds) + 1) if self.seeds else None

    def pool(self, address: Address | None = None) -> Pool:
        """A new pool for the running event loop, to that node of a cluster or to the one node."""
        changes: dict[str, Any] = {"socket_timeout": None}  # the pipeline has a deadline of its own
        connect_timeout = self.template.connection_kwargs.get("socket_connect_timeout")
        changes["socket_connect_timeout"] = min(connect_timeout or self.timeout, self.timeout)
        if address is not None:
            changes["host"], changes["port"] = address
        return cast(Pool, _clone(self.template, changes, self.timeout))  # redis-py leaves these untyped


def deployment(
    client_or_url: Client | str, timeout: float | None = None, *, take_over: bool = True
) -> Deployment:
    """What this client or URL describes. `ValueError` for what is wrong in a URL, or a timeout ≤ 0."""
    if timeout is not None and not timeout > 0:
        raise ValueError("socket_timeout is a number of seconds above 0")
    _refuse_stand_ins(client_or_url)
    remap = None
    if isinstance(client_or_url, str):
        template, seeds = read(client_or_url)
    elif isinstance(client_or_url, RedisCluster):
        remap = client_or_url.nodes_manager.address_remap
        nodes = list(client_or_url.nodes_manager.startup_nodes.values())
        settings = {name: value for name, value in nodes[0].connection_kwargs.items() if name != _READONLY}
        template = ConnectionPool(connection_class=nodes[0].connection_class, **settings)
        seeds = tuple((str(node.host), int(node.port)) for node in nodes)
    elif isinstance(client_or_url, Redis):
        template, seeds = client_or_url.connection_pool, ()
    else:
        raise TypeError("a redis.asyncio client or a URL is needed; redis.Redis blocks the event loop")
    if isinstance(template, SentinelConnectionPool) and not template.is_master:
        raise ValueError("a store writes: give it what Sentinel.master_for() gives, not slave_for()")
    for name in _SECONDS:
        seconds = template.connection_kwargs.get(name)
        if seconds is not None and not seconds >= 0:  # 0 is redis-py's word for none
            raise ValueError(f"{name} is a number of seconds above 0")
    patience = timeout or template.connection_kwargs.get("socket_timeout") or TIMEOUT
    described = Deployment(template, patience, seeds, remap, take_over)
    _require_right_options(described)
    return described


def _require_right_options(described: Deployment) -> None:
    """Make a connection object. It connects to nobody, but its constructor tells what is wrong."""
    try:
        cast(Any, described.pool()).make_connection()
    except (RedisError, TypeError) as error:
        raise ValueError(f"a wrong option of the connection to Redis: {explain(error)}") from error


def _refuse_stand_ins(client: object) -> None:
    if any(kind.__module__.partition(".")[0] == "fakeredis" for kind in type(client).__mro__):
        raise TypeError(
            "fakeredis has no server to connect to: give InMemorySessionStore() (or memory://) to tests,"
            " or the URL of a real Redis"
        )


def sentinels_of(pool: Pool) -> Sentinels | None:
    """The Sentinels that name the primary of this pool; None for a pool of another kind."""
    return cast(Sentinels, pool.sentinel_manager) if isinstance(pool, SentinelConnectionPool) else None


async def close(pool: Pool) -> None:
    """Close the pool's connections, and those to its Sentinels.

    Errors are left out: redis-py raises whatever a connection met at its end, even a cancellation.
    """
    closing = [pool.aclose()]
    if isinstance(pool, SentinelConnectionPool):
        for sentinel in pool.sentinel_manager.sentinels:
            closing += [sentinel.aclose(), sentinel.listening.aclose()]
    await asyncio.gather(*closing, return_exceptions=True)


def _clone(pool: ConnectionPool, changes: dict[str, Any], timeout: float) -> ConnectionPool:
    settings = {name: value for name, value in pool.connection_kwargs.items() if name not in _NOT_OURS}
    if issubclass(pool.connection_class, Connection):
        settings |= _keepalive(settings)
    settings |= {
        "connection_class": pool.connection_class,
        "max_connections": _CONNECTIONS,
        "decode_responses": False,
        "health_check_interval": 0,
        "protocol": 2,  # no push messages between the replies
        "retry": Retry(NoBackoff(), 0),
        "retry_on_error": [],
        **changes,
    }
    if isinstance(pool, SentinelConnectionPool):
        sentinels = _clone_sentinels(pool, timeout)
        return type(pool)(
            pool.service_name,
            sentinels,
            is_master=pool.is_master,
            check_connection=pool.check_connection,
            **settings,
        )
    return type(pool)(**settings)


def _keepalive(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Keep-alive is on unless the user turned it off, with our times where none are given."""
    given = settings.get("socket_keepalive_options")
    options = given if isinstance(given, Mapping) else _KEEPALIVE
    return {
        "socket_keepalive": settings.get("socket_keepalive") is not False,
        "socket_keepalive_options": options,
    }


def _clone_sentinels(pool: SentinelConnectionPool, timeout: float) -> Sentinels:
    """Sentinel clients of our own: the user's may be in use on another event loop.

    They are asked one after the other, and each may hang: with the primary they share what a call may take.
    """
    manager: Sentinel = pool.sentinel_manager
    share = timeout / (len(manager.sentinels) + 1)
    clients = []
    for theirs in manager.sentinels:
        bounded = _bounded(theirs.connection_pool, share)
        client: Any = SentinelClient.from_pool(_clone(theirs.connection_pool, bounded, share))
        client.listening = _clone(theirs.connection_pool, {**bounded, "socket_timeout": None}, share)
        clients.append(client)
    return Sentinels(manager, pool.service_name, clients, share)


def _bounded(pool: ConnectionPool, most: float) -> dict[str, Any]:
    given = {name: pool.connection_kwargs.get(name) for name in ("socket_timeout", "socket_connect_timeout")}
    return {name: min(seconds or most, most) for name, seconds in given.items()}
