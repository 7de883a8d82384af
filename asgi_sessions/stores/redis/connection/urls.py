"""A store's URL, read into what redis-py needs. What is wrong with it fails here, by its name."""

from __future__ import annotations

import difflib
import inspect
import re
from typing import Any, TypeAlias
from urllib.parse import parse_qsl, unquote, urlsplit

from redis.asyncio.connection import Connection, ConnectionPool, SSLConnection, parse_url
from redis.asyncio.connection import UnixDomainSocketConnection as UnixConnection
from redis.asyncio.sentinel import Sentinel

Address: TypeAlias = tuple[str, int]

_KINDS = {"redis": "redis", "valkey": "redis", "rediss": "rediss", "valkeys": "rediss", "unix": "unix"}
_SCHEMES = (
    "redis://, rediss://, valkey://, valkeys://, unix://, redis+sentinel://host:port,host:port/service,"
    " rediss+sentinel://, redis+cluster://host:port,host:port or rediss+cluster://"
)
_UNREADABLE = "the store's URL cannot be read; a password in it is percent-encoded"
_CLASSES = {"redis": Connection, "rediss": SSLConnection, "unix": UnixConnection}
_OF_SENTINELS = ("sentinel_username", "sentinel_password")
_NOT_TEXT = {  # arguments of connections that no text can give
    "self", "kwargs", "retry", "retry_on_error", "parser_class", "encoder_class", "redis_connect_func",
    "credential_provider", "driver_info", "event_dispatcher", "himport_registry", "socket_type",
    "socket_keepalive_options", "maint_notifications_config", "maint_notifications_pool_handler",
    "maintenance_state", "maintenance_notification_hash", "orig_host_address", "orig_socket_timeout",
    "orig_socket_connect_timeout", "oss_cluster_maint_notifications_handler",
}  # fmt: skip


def read(url: str) -> tuple[ConnectionPool, tuple[Address, ...]]:
    """A pool that describes the connections, and the nodes at which a cluster is entered, if it is one.

    `ValueError` says what is wrong, but shows nothing that may be a secret.
    """
    scheme, slashes, rest = url.partition("://")
    base, _, kind = scheme.partition("+")
    if not slashes or base not in _KINDS or (kind and base not in ("redis", "rediss")):
        raise ValueError(f"the URL's scheme must be one of {_SCHEMES}")
    if "#" in rest:  # the rest would be left out without a word
        raise ValueError(_UNREADABLE)
    if kind == "sentinel":
        return _of_sentinels(_KINDS[base], rest), ()
    if kind == "cluster":
        return _of_cluster(_KINDS[base], rest)
    if kind:
        raise ValueError(f"the URL's scheme must be one of {_SCHEMES}")
    return ConnectionPool(**_options(_KINDS[base], rest)), ()


def _of_cluster(base: str, rest: str) -> tuple[ConnectionPool, tuple[Address, ...]]:
    """For `user:password@host:port,host:port?options`: one of the nodes that answers is enough."""
    user, addresses, path, query = _parts(rest, 6379)
    options = _options(base, f"{user}any/{path}?{query}")
    if not addresses:
        raise ValueError("a cluster's URL reads redis+cluster://host:port,host:port")
    if options.pop("db", 0):
        raise ValueError("a cluster has no databases: leave db out of its URL")
    return ConnectionPool(**options), addresses


def _of_sentinels(base: str, rest: str) -> ConnectionPool:
    """For `user:password@host:port,host:port/service/db?options`; the credentials are those of Redis.

    Those of the Sentinels are the options `sentinel_username` and `sentinel_password`.
    """
    user, addresses, path, query = _parts(rest, 26379)
    service, _, db = path.partition("/")
    if not addresses or not service:
        raise ValueError("a Sentinel URL reads redis+sentinel://host:port,host:port/service/db")
    options = _options(base, f"{user}any/{db}?{query}", *_OF_SENTINELS)
    del options["host"]
    theirs = {name.partition("_")[2]: options.pop(name) for name in _OF_SENTINELS if name in options}
    if options.pop("connection_class", None) is SSLConnection:
        options["ssl"] = True
    theirs |= {name: value for name, value in options.items() if name.startswith(("socket_", "ssl"))}
    sentinel = Sentinel(addresses, sentinel_kwargs=theirs, **options)  # type: ignore[no-untyped-call]
    pool: ConnectionPool = sentinel.master_for(unquote(service)).connection_pool
    return pool


def _parts(rest: str, port: int) -> tuple[str, tuple[Address, ...], str, str]:
    """Credentials with their @, addresses, path and query of what several hosts share."""
    location, _, query = rest.partition("?")
    hosts, _, path = location.partition("/")
    user, at, hosts = hosts.rpartition("@")
    return user + at, tuple(_address(host, port) for host in hosts.split(",") if host), path, query


def _address(text: str, port: int) -> Address:
    if text.endswith("]") or ":" not in text:
        return text.strip("[]"), port
    host, _, number = text.rpartition(":")
    if not number.isdecimal():
        raise ValueError("a port in the store's URL is no number; a password in it is percent-encoded")
    return host.strip("[]"), int(number)


def _options(base: str, rest: str, *more: str) -> dict[str, Any]:
    """What redis-py reads in the URL of one server, if it knows all of it."""
    url = f"{base}://{rest}"
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        raise ValueError(_UNREADABLE) from None  # the reason shows what may be a part of it
    if base == "unix" and parts.netloc.rpartition("@")[2]:  # no host, so a part of a password or of the path
        raise ValueError(_UNREADABLE)
    if base != "unix" and not re.fullmatch(r"/?\d*", parts.path):
        raise ValueError("what follows the host in the store's URL is the number of a database")
    known = _names(_CLASSES[base]) | {"max_connections", *more}
    for name, _ in parse_qsl(parts.query, keep_blank_values=True):
        if name not in known:
            raise ValueError(_unknown(name, known))
    return dict(parse_url(url))


def _unknown(name: str, known: set[str]) -> str:
    if not re.fullmatch(r"\w{1,40}", name):
        return "an option in the store's URL has no name; a password in it is percent-encoded"
    close = difflib.get_close_matches(name, known, 1)
    hint = f", did you mean {close[0]!r}?" if close else f": there are {', '.join(sorted(known))}"
    return f"unknown option {name!r} in the store's URL{hint}"


def _names(connection: type) -> set[str]:
    """What such a connection may be told, by the names of its own arguments and of those that it inherits."""
    inits = [
        inspect.signature(vars(each)["__init__"]) for each in connection.__mro__ if "__init__" in vars(each)
    ]
    return {name for init in inits for name in init.parameters} - _NOT_TEXT
