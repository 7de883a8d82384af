"""From what a user gives, a client or a URL, to private connection pools of redis-py.

The client is a description only (address, TLS, credentials, Sentinel): its own connections, decoding and
retries are left alone. Retries are ours, for redis-py's would run a script again without telling.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, TypeAlias, cast
from urllib.parse import unquote

from redis.asyncio import Redis, RedisCluster
from redis.asyncio.connection import ConnectionPool, parse_url
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel, SentinelConnectionPool
from redis.backoff import NoBackoff

from .arguments import UNREADABLE, check_options, from_url, refuse_stand_ins
from .calls import Pool

Client: TypeAlias = Redis | RedisCluster
Address: TypeAlias = tuple[str, int]

TIMEOUT = 5.0  # seconds, where neither the caller nor the client says another
_CONNECTIONS = 8  # a lane and a subscription, each with one that is being closed
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
_SCHEMES = "redis://, rediss://, unix://, redis+sentinel://host:port,host:port/service or redis+cluster://"


@dataclass(frozen=True, slots=True)
class Deployment:
    """How to reach a Redis: one node or the primary that Sentinel names, or a cluster if there are `seeds`.

    `timeout` is the longest that a call may take, in seconds.
    """

    template: ConnectionPool
    timeout: float
    seeds: tuple[Address, ...] = ()

    def pool(self, address: Address | None = None) -> Pool:
        """A new pool for the running event loop, to that node of a cluster or to the one node."""
        changes: dict[str, Any] = {"socket_timeout": None}  # the lane has a deadline of its own
        connect_timeout = self.template.connection_kwargs.get("socket_connect_timeout")
        changes["socket_connect_timeout"] = min(connect_timeout or self.timeout, self.timeout)
        if address is not None:
            changes["host"], changes["port"] = address
        return cast(Pool, _clone(self.template, changes, self.timeout))  # redis-py leaves these untyped


def deployment(client_or_url: Client | str, timeout: float | None = None) -> Deployment:
    """What this client or URL describes. `ValueError` for an unknown scheme or a timeout ≤ 0."""
    client = _client(client_or_url) if isinstance(client_or_url, str) else client_or_url
    refuse_stand_ins(client)
    if timeout is not None and not timeout > 0:
        raise ValueError("socket_timeout is a number of seconds above 0")
    if isinstance(client, RedisCluster):
        nodes = list(client.nodes_manager.startup_nodes.values())
        settings = {name: value for name, value in nodes[0].connection_kwargs.items() if name != _READONLY}
        template = ConnectionPool(connection_class=nodes[0].connection_class, **settings)
        seeds = tuple((str(node.host), int(node.port)) for node in nodes)
    elif isinstance(client, Redis):
        template, seeds = client.connection_pool, ()
    else:
        raise TypeError("a redis.asyncio client or a URL is needed; redis.Redis blocks the event loop")
    check_options(template)
    return Deployment(template, timeout or template.connection_kwargs.get("socket_timeout") or TIMEOUT, seeds)


async def close(pool: Pool) -> None:
    """Close the pool's connections, and those to its Sentinels."""
    await pool.aclose()
    if isinstance(pool, SentinelConnectionPool):
        for sentinel in pool.sentinel_manager.sentinels:
            await sentinel.aclose()


def _clone(pool: ConnectionPool, changes: dict[str, Any], timeout: float) -> ConnectionPool:
    settings = {name: value for name, value in pool.connection_kwargs.items() if name not in _NOT_OURS}
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
        sentinels = _clone_sentinels(pool.sentinel_manager, timeout)
        return type(pool)(
            pool.service_name,
            sentinels,
            is_master=pool.is_master,
            check_connection=pool.check_connection,
            **settings,
        )
    return type(pool)(**settings)


def _clone_sentinels(manager: Sentinel, timeout: float) -> Sentinel:
    """Sentinel clients of our own: the user's may be in use on another event loop.

    They are asked one after the other, and each may hang: with the primary they share what a call may take.
    """
    share = timeout / (len(manager.sentinels) + 1)
    clone = copy.copy(manager)
    clone.sentinels = [
        Redis.from_pool(_clone(client.connection_pool, _bounded(client.connection_pool, share), share))
        for client in manager.sentinels
    ]
    return clone


def _bounded(pool: ConnectionPool, most: float) -> dict[str, Any]:
    given = {name: pool.connection_kwargs.get(name) for name in ("socket_timeout", "socket_connect_timeout")}
    return {name: min(seconds or most, most) for name, seconds in given.items()}


def _client(url: str) -> Client:
    scheme, slashes, rest = url.partition("://")
    if not slashes:
        scheme = ""
    if scheme in ("redis", "rediss", "unix"):
        return from_url(Redis.from_url, url)
    if scheme == "redis+cluster":
        return from_url(RedisCluster.from_url, f"redis://{rest}")
    if scheme == "redis+sentinel":
        return _sentinel_client(rest)
    raise ValueError(f"the URL's scheme must be one of {_SCHEMES}")


def _sentinel_client(rest: str) -> Redis:
    """For `user:password@host:port,host:port/service/db?options`; the credentials are those of Redis."""
    location, _, query = rest.partition("?")
    hosts, _, path = location.partition("/")
    user, at, hosts = hosts.rpartition("@")
    service, _, db = path.partition("/")
    addresses = [_address(host) for host in hosts.split(",") if host]
    if not addresses or not service:
        raise ValueError("a Sentinel URL reads redis+sentinel://host:port,host:port/service/db")
    options: dict[str, Any] = dict(from_url(parse_url, f"redis://{user}{at}any/{db}?{query}"))
    del options["host"]
    sentinel = Sentinel(addresses, **options)  # type: ignore[no-untyped-call]  # redis-py left it untyped
    return cast(Redis, sentinel.master_for(unquote(service)))


def _address(text: str) -> Address:
    if text.endswith("]") or ":" not in text:
        return text.strip("[]"), 26379
    host, _, port = text.rpartition(":")
    if not port.isdecimal():
        raise ValueError(UNREADABLE)
    return host.strip("[]"), int(port)
