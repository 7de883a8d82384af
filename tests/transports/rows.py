"""Every way of connecting to Redis, as a row of a table. Servers and relays start when first needed."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeAlias, cast

from deployments import RedisCluster as ClusterNodes
from deployments import SentinelSet, command
from redis import Redis as BlockingRedis
from redis._parsers import _AsyncRESP2Parser
from redis.asyncio import Redis, RedisCluster
from redis_server import RedisServer
from relays import Authority, Relay, in_pieces

from asgi_sessions import RedisSessionStore

Client: TypeAlias = Redis | RedisCluster | str

PASSWORD = "s3cret:/@ü"
PATIENCE_MS = 60_000
QUOTED = "s3cret%3A%2F%40%C3%BC"

_LUA = files("asgi_sessions.stores.redis") / "lua"
_CALL = re.compile(r"redis\.p?call\('(\w+)'")
DIRECT = {"eval", "evalsha", "get", "mget", "exists", "scan", "zrange", "subscribe", "unsubscribe", "pttl"}
"""What is sent without a script; a database takes SELECT too, a cluster CLUSTER SLOTS."""


def commands() -> set[str]:
    """All that a Redis user has to be allowed: what our scripts call, and what is sent without one."""
    scripts = [each.read_text("utf-8") for each in _LUA.iterdir() if each.name.endswith(".lua")]
    return DIRECT | {name.lower() for script in scripts for name in _CALL.findall(script)}


def _user(name: str, *more: str) -> list[str]:
    """The command that makes a user with no other rights than needed. (A new one may use all channels.)"""
    needed = ["~session:*", "resetchannels", "&session:*", *(f"+{each}" for each in sorted(commands()))]
    return ["ACL", "SETUSER", name, "on", f">{PASSWORD}", *needed, *more]


class Servers:
    """The servers of a test run, and what stands in front of them."""

    def __init__(self, directory: Path) -> None:
        self.authority = Authority(directory)
        self.socket = directory / "redis.sock"
        self._stack = ExitStack()
        self._admins: list[BlockingRedis] = []

    def __enter__(self) -> Servers:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @cached_property
    def plain(self) -> RedisServer:
        """Open to all, by TCP on both loopbacks and by a socket; `app` may do what it needs and no more."""
        server = RedisServer("--bind", "127.0.0.1", "-::1", "--unixsocket", str(self.socket))
        self._stack.enter_context(server)
        admin = self._administer(server)
        for user, more in (("app", []), ("app-of-a-database", ["+select"])):
            admin.execute_command(*_user(user, *more))  # type: ignore[no-untyped-call]  # in redis-py
        return server

    @cached_property
    def locked(self) -> RedisServer:
        """Open to who knows the password."""
        server = self._stack.enter_context(RedisServer("--requirepass", PASSWORD))
        self._administer(server, password=PASSWORD)
        return server

    @cached_property
    def sentinels(self) -> SentinelSet:
        """Nothing happens to them here: who is slow for a while is not taken for dead."""
        found = self._stack.enter_context(SentinelSet())
        for each in found.sentinels:
            command(each, "SENTINEL", "SET", found.name, "down-after-milliseconds", PATIENCE_MS)
        self._administer(found.primary())
        return found

    @cached_property
    def cluster(self) -> ClusterNodes:
        """As patient."""
        found = self._stack.enter_context(ClusterNodes())
        for node in found.nodes:
            command(node, "CONFIG", "SET", "cluster-node-timeout", PATIENCE_MS)
            command(node, *_user("app", "+cluster|slots"))
        for node in found.primaries():
            self._administer(node)
        return found

    @cached_property
    def tls(self) -> Relay:
        """Named by its host, and by no address."""
        return self._relay(tls=self.authority.context("localhost"))

    @cached_property
    def careful_tls(self) -> Relay:
        """Asks who the client is."""
        return self._relay(tls=self.authority.context("localhost", "127.0.0.1", ask_client=True))

    @cached_property
    def trickling(self) -> Relay:
        return self._relay(carry=in_pieces(seed=8))

    @cached_property
    def trickling_tls(self) -> Relay:
        """Records of TLS begin and end anywhere in the stream, too."""
        context = self.authority.context("localhost")
        return self._relay(tls=context, carry=in_pieces(seed=9))

    def empty(self) -> None:
        """No keys on any server."""
        for admin in self._admins:
            admin.flushall()

    def hang_up(self) -> None:
        """All connections end, of those who call and of those who listen."""
        for admin in self._admins:
            for kind in ("normal", "pubsub"):
                admin.execute_command("CLIENT", "KILL", "TYPE", kind)  # type: ignore[no-untyped-call]  # in redis-py

    def _relay(self, **settings: Any) -> Relay:
        return self._stack.enter_context(Relay(self.plain.port, **settings))

    def _administer(self, server: RedisServer, password: str | None = None) -> BlockingRedis:
        admin: BlockingRedis = self._stack.enter_context(BlockingRedis(port=server.port, password=password))
        self._admins.append(admin)
        return admin


@dataclass(frozen=True)
class Row:
    """One way of connecting. The connection's bytes are taken over with hiredis and `take_over`.

    `whole` rows run all of the contract: one for each event loop, parser, protocol, set of rights and kind of
    deployment. The others differ from them in how the bytes are carried, or before the first command.
    """

    name: str
    client: Callable[[Servers], Client]
    uvloop: bool = False
    hiredis: bool = True
    whole: bool = False
    take_over: bool = True

    def __str__(self) -> str:
        said = {"uvloop": self.uvloop, "no hiredis": not self.hiredis, "public": not self.take_over}
        return ", ".join([self.name, *[word for word, is_so in said.items() if is_so]])

    @property
    def backend(self) -> tuple[str, dict[str, Any]]:
        """The event loop, as anyio's plugin is told it."""
        return "asyncio", {"use_uvloop": self.uvloop}

    def store(self, servers: Servers) -> RedisSessionStore:
        """A store that connects in this way; without hiredis redis-py reads by its own parser."""
        client = self.client(servers)
        if not self.hiredis:
            client = cast("Redis", Redis.from_url(client) if isinstance(client, str) else client)
            client.connection_pool.connection_kwargs["parser_class"] = _AsyncRESP2Parser
        return RedisSessionStore(client, take_over_connections=self.take_over)


def _each(name: str, client: Callable[[Servers], Client], *, whole: bool = False) -> list[Row]:
    """On both event loops, with and without hiredis: four ways for the same bytes."""
    ways = [(False, True), (True, True), (False, False), (True, False)]
    return [Row(name, client, loop, parser, whole and loop != parser) for loop, parser in ways]


def _plain(servers: Servers) -> Client:
    return f"redis://127.0.0.1:{servers.plain.port}"


def _tls(servers: Servers) -> Client:
    return servers.authority.url("localhost", servers.tls.port)


def _careful_tls(servers: Servers) -> Client:
    return servers.authority.url("127.0.0.1", servers.careful_tls.port, **servers.authority.client)


def _trickling(servers: Servers) -> Client:
    return f"redis://127.0.0.1:{servers.trickling.port}"


def _trickling_tls(servers: Servers) -> Client:
    return servers.authority.url("localhost", servers.trickling_tls.port)


def _socket(servers: Servers) -> Client:
    assert servers.plain
    return f"unix://{servers.socket}"


def _talking(**options: Any) -> Callable[[Servers], Client]:
    return lambda servers: Redis(port=servers.plain.port, **options)


def _cluster_client(servers: Servers) -> Client:
    first = servers.cluster.primaries()[0]
    return RedisCluster(host="127.0.0.1", port=first.port, protocol=3, decode_responses=True)


def _cluster_user(servers: Servers) -> Client:
    return servers.cluster.url.replace("://", f"://app:{QUOTED}@")


ROWS = [
    *_each("plain", _plain, whole=True),
    Row("TLS", _tls),
    Row("TLS", _tls, uvloop=True, hiredis=False),
    Row("TLS with a client certificate", _careful_tls),
    *_each("in pieces", _trickling),
    Row("TLS in pieces", _trickling_tls),
    Row("TLS in pieces", _trickling_tls, uvloop=True, whole=True),
    Row("unix socket", _socket),
    Row("unix socket", _socket, uvloop=True),
    Row("IPv6", lambda servers: f"redis://[::1]:{servers.plain.port}"),
    Row("another database", lambda servers: f"redis://127.0.0.1:{servers.plain.port}/3"),
    Row("password", lambda servers: f"redis://:{QUOTED}@127.0.0.1:{servers.locked.port}"),
    Row("ACL user", lambda servers: f"redis://app:{QUOTED}@127.0.0.1:{servers.plain.port}"),
    Row(
        "ACL user of a database",
        lambda servers: f"redis://app-of-a-database:{QUOTED}@127.0.0.1:{servers.plain.port}/3",
        whole=True,
    ),
    Row("a client that talks RESP3", _talking(protocol=3)),
    Row("a client that decodes", _talking(decode_responses=True)),
    Row(
        "a client that decodes RESP3", _talking(protocol=3, decode_responses=True), hiredis=False, whole=True
    ),
    Row("TLS in pieces", _trickling_tls, uvloop=True, take_over=False),
    Row("unix socket", _socket, take_over=False, whole=True),
    Row("Cluster", lambda servers: servers.cluster.url, take_over=False),
    Row("Sentinel", lambda servers: servers.sentinels.url, whole=True),
    Row("Cluster, by a client", _cluster_client, whole=True),
    Row("Cluster, ACL user", _cluster_user, whole=True),
]
