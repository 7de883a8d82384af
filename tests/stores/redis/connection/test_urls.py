"""The URLs of a Redis store: what they mean, and what is wrong with those that mean nothing."""

from __future__ import annotations

import socket
from typing import cast

import pytest
from redis.asyncio import Redis, RedisCluster
from redis.asyncio.connection import Connection, ConnectionPool, SSLConnection
from redis.asyncio.sentinel import Sentinel, SentinelConnectionPool, SentinelManagedSSLConnection

from asgi_sessions import RedisSessionStore
from asgi_sessions.stores.redis.connection.deployment import deployment
from asgi_sessions.stores.redis.connection.pipeline import IDLE, Pipeline
from asgi_sessions.stores.redis.connection.pools import give_back
from asgi_sessions.stores.redis.connection.seam import OpenConnection
from asgi_sessions.stores.redis.connection.urls import Address
from asgi_sessions.stores.urls import resolve_store

pytestmark = pytest.mark.anyio


def _manager(url: str) -> Sentinel:
    template = deployment(url).template
    assert isinstance(template, SentinelConnectionPool)
    manager: Sentinel = template.sentinel_manager
    return manager


def _address(client: Redis) -> tuple[str, int, object, object]:
    settings = client.connection_pool.connection_kwargs
    return settings["host"], settings["port"], settings.get("username"), settings.get("password")


@pytest.mark.parametrize(
    ("url", "connection"),
    [
        ("redis://h", Connection),
        ("valkey://h", Connection),
        ("rediss://h", SSLConnection),
        ("valkeys://h", SSLConnection),
        ("redis+cluster://h", Connection),
        ("rediss+cluster://h", SSLConnection),
        ("rediss+sentinel://h/main", SentinelManagedSSLConnection),
    ],
)
def test_a_scheme_says_how_to_connect(url: str, connection: type) -> None:
    """Valkey's are those of Redis; an s is TLS. Whatever it is, the middleware takes it too."""
    assert deployment(url).template.connection_class is connection
    assert isinstance(resolve_store(url), RedisSessionStore)


def test_sentinels_have_credentials_of_their_own() -> None:
    """Those before the @ are those of Redis; TLS is for both."""
    manager = _manager("redis+sentinel://u:p@a:1,b/main?sentinel_username=su&sentinel_password=s%40")
    assert [_address(each) for each in manager.sentinels] == [("a", 1, "su", "s@"), ("b", 26379, "su", "s@")]
    (first,) = _manager("rediss+sentinel://:p@a/main?ssl_ca_certs=ca.pem").sentinels
    assert first.connection_pool.connection_class is SSLConnection
    assert first.connection_pool.connection_kwargs["ssl_ca_certs"] == "ca.pem"
    assert _address(first) == ("a", 26379, None, None)


def test_a_cluster_is_entered_at_any_of_several_nodes() -> None:
    """A port that is left out is Redis' own; an IPv6 address stands in brackets."""
    described = deployment("redis+cluster://u:p@a:1,b,[::1]:7000?socket_timeout=3")
    assert described.seeds == (("a", 1), ("b", 6379), ("::1", 7000))
    settings = described.template.connection_kwargs
    assert (settings["username"], settings["password"], described.timeout) == ("u", "p", 3)


@pytest.mark.parametrize("url", ["redis://h", "redis+cluster://h", "redis+sentinel://h/main", "unix:///s"])
@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("sockt_timeout=3", "unknown option 'sockt_timeout' .* did you mean 'socket_timeout'"),
        ("lock_wait=3", "unknown option 'lock_wait' .* there are .*socket_timeout"),
        ("retry=3", "unknown option 'retry'"),
        ("socket_timeout=soon", "socket_timeout"),
    ],
)
def test_an_option_that_is_none_is_named(url: str, option: str, message: str) -> None:
    """In the constructor, for every kind of deployment."""
    with pytest.raises(ValueError, match=message):
        RedisSessionStore(f"{url}?{option}")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("rediss://h?ssl_cert_reqs=perhaps", "ssl_cert_reqs is one of required"),
        ("redis+cluster://h/2", "leave db out"),
        ("redis+cluster://", "host:port,host:port"),
        ("redis+cluster://h:x", "a port .* is no number"),
        ("redis://h/first", "number of a database"),
        ("unix+cluster://h", "scheme must be one of"),
        ("redis+tls://h", "scheme must be one of"),
        ("unix://h/s", "cannot be read"),
        ("redis://h?socket_timeout=-1", "socket_timeout is .* above 0"),
        ("redis://h?socket_timeout=nan", "socket_timeout is .* above 0"),
        ("redis+cluster://h?socket_connect_timeout=-1", "socket_connect_timeout is .* above 0"),
        ("redis+sentinel://h/main?health_check_interval=-1", "health_check_interval is .* above 0"),
    ],
)
def test_what_is_wrong_is_said(url: str, message: str) -> None:
    """Values too, and what a cluster cannot have."""
    with pytest.raises(ValueError, match=message):
        RedisSessionStore(url)


@pytest.mark.parametrize(
    "url",
    [
        "redis://:se/cret@h",
        "redis://:se?cret@h",
        "redis+sentinel://:se:cret/x@h/main?cret&x",
        "redis://u:7#cret@h",  # would be port 7 of host u
        "redis+sentinel://:7#cret@h/main",
        "redis+cluster://:7#cret@h",  # would be no password at all
        "unix://:7/cret@/run/redis.sock",  # would be another path
    ],
)
def test_no_part_of_a_password_is_shown(url: str) -> None:
    """A password that should have been percent-encoded takes the URL apart in odd places."""
    with pytest.raises(ValueError, match="percent-encoded") as caught:
        RedisSessionStore(url)
    assert "cret" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_a_client_that_reads_from_replicas_only_is_refused() -> None:
    """A store writes."""
    sentinel = Sentinel([("h", 1)])  # type: ignore[no-untyped-call]  # redis-py left it untyped
    with pytest.raises(ValueError, match=r"master_for\(\)"):
        RedisSessionStore(sentinel.slave_for("main"))


# -- connections that stay --------------------------------------------------------------------------------


def _settings(client_or_url: Redis | RedisCluster | str, address: Address | None = None) -> dict[str, object]:
    pool = deployment(client_or_url).pool(address)
    assert isinstance(pool, ConnectionPool)
    return pool.connection_kwargs


@pytest.mark.parametrize("url", ["redis://h", "rediss://h", "redis+cluster://h", "redis+sentinel://h/main"])
def test_connections_are_kept_alive(url: str) -> None:
    """By the system, and within half a minute a peer that is gone is noticed where the system can do that."""
    settings = _settings(url)
    options = settings["socket_keepalive_options"]
    assert settings["socket_keepalive"] is True
    assert isinstance(options, dict)
    if hasattr(socket, "TCP_KEEPIDLE"):
        times = [options[getattr(socket, name)] for name in ("TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT")]
        assert times[0] + times[1] * times[2] == 30


async def test_the_socket_itself_is_kept_alive(redis_url: str) -> None:
    """The system was told."""
    pool = deployment(redis_url).pool()
    connection = cast(OpenConnection, await pool.get_connection())
    sock = connection._writer.get_extra_info("socket")
    assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    await give_back(pool, connection)
    await pool.aclose()


def test_whoever_knows_better_about_keeping_alive_is_heard() -> None:
    """It can be turned off, and have other times."""
    assert _settings("redis://h?socket_keepalive=no")["socket_keepalive"] is False
    client = Redis(socket_keepalive=True, socket_keepalive_options={1: 7})
    assert _settings(client)["socket_keepalive_options"] == {1: 7}


@pytest.mark.parametrize(("url", "idle"), [("redis://h", IDLE), ("redis://h?health_check_interval=7", 7)])
async def test_how_long_a_connection_may_be_idle(url: str, idle: float) -> None:
    """`health_check_interval` says so; redis-py itself does not check then."""
    described = deployment(url)
    assert Pipeline(described.pool(), 1, idle=described.idle)._idle == idle
    assert _settings(url)["health_check_interval"] == 0
