"""The proxy does to a connection what it is told, and otherwise nothing."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator

import pytest
from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError
from redis.retry import Retry
from redis_server import RedisServer

from asgi_sessions.stores.redis.commands.scripts import COMMIT, RELEASE

from .chaos import (
    ChaosProxy,
    Direction,
    Fault,
    Frames,
    calls,
    containing,
    cut,
    delay,
    half,
    reset,
    swallow,
    trickle,
)


@pytest.fixture
def proxy(redis_url: str, redis_server: RedisServer) -> Iterator[ChaosProxy]:
    with ChaosProxy(redis_server.port) as proxy:
        yield proxy


@pytest.fixture
def client(proxy: ChaosProxy) -> Iterator[Redis]:
    """A client that neither retries nor waits long."""
    with Redis.from_url(proxy.url, socket_timeout=0.5, retry=Retry(NoBackoff(), 0), protocol=2) as client:
        client.ping()
        yield client


@pytest.mark.parametrize(
    "message",
    [b"+OK\r\n", b":12\r\n", b"$-1\r\n", b"$0\r\n\r\n", b"*0\r\n", b"*-1\r\n", b"$4\r\n\r\n\r\n\r\n",
     b"*3\r\n$1\r\na\r\n*2\r\n:1\r\n$-1\r\n-ERR no\r\n"],
)  # fmt: skip
def test_messages_are_told_apart(message: bytes) -> None:
    """However the stream is cut into chunks."""
    stream = message * 3
    for size in range(1, len(stream) + 1):
        frames = Frames()
        chunks = [stream[begin : begin + size] for begin in range(0, len(stream), size)]
        assert [each for chunk in chunks for each in frames.feed(chunk)] == [message] * 3


def test_it_passes_everything_on(client: Redis) -> None:
    """Pipelines, large values, errors and messages to subscribers."""
    large = b"\r\n" * 500_000
    with client.pipeline(transaction=False) as pipeline:
        pipeline.set("k", large)
        pipeline.get("k")
        pipeline.lpush("k", 1)
        results = pipeline.execute(raise_on_error=False)
    assert results[:2] == [True, large]
    assert isinstance(results[2], RedisError)
    with client.pubsub() as listener:  # type: ignore[no-untyped-call]  # redis-py left it untyped
        listener.subscribe("news")
        listener.get_message(timeout=5)
        client.publish("news", "heard")
        heard = listener.get_message(timeout=5)
        assert heard is not None
        assert heard["data"] == b"heard"


@pytest.mark.parametrize("fault", [cut, reset, half], ids=["cut", "reset", "half"])
@pytest.mark.parametrize(("on", "carried_out"), [("request", False), ("answer", True)])
def test_a_lost_connection(
    client: Redis, fault: Fault, on: Direction, carried_out: bool, proxy: ChaosProxy
) -> None:
    """Before the command reached the server nothing happened, after it all did; the client sees an error."""
    plan = proxy.inject(fault, containing(b"SET"), on=on)
    with pytest.raises(RedisConnectionError):
        client.set("k", "v" * 100)
    assert plan.hits == 1
    assert client.exists("k") == carried_out


def test_a_reset_is_a_reset(proxy: ChaosProxy) -> None:
    """Not the end of a stream: the client's socket says so."""
    proxy.inject(reset, containing(b"PING"))
    with socket.create_connection(("127.0.0.1", proxy.port), timeout=5) as client:
        client.sendall(b"*1\r\n$4\r\nPING\r\n")
        with pytest.raises(ConnectionResetError):
            client.recv(1)


def test_a_deaf_connection_stays_open(proxy: ChaosProxy) -> None:
    """From the swallowed command on nothing comes back, and no end either; another connection is well."""
    proxy.inject(swallow, containing(b"SET"))
    with socket.create_connection(("127.0.0.1", proxy.port), timeout=0.2) as deaf:
        for command in (b"*3\r\n$3\r\nSET\r\n$1\r\nk\r\n$1\r\nv\r\n", b"*1\r\n$4\r\nPING\r\n"):
            deaf.sendall(command)
            with pytest.raises(TimeoutError):
                deaf.recv(1)
    with Redis.from_url(proxy.url) as client:
        assert client.get("k") is None


@pytest.mark.parametrize("fault", [delay(0.05, jitter=0.05), trickle(1, 0.02)])
def test_a_slow_answer_is_complete(proxy: ChaosProxy, client: Redis, fault: Fault) -> None:
    """It comes late, but as it was."""
    proxy.inject(fault, containing(b"ECHO"), on="answer")
    began = time.monotonic()
    assert client.echo("hello") == b"hello"
    assert time.monotonic() - began >= 0.05


def test_a_fault_is_for_what_it_names(proxy: ChaosProxy, client: Redis) -> None:
    """For the commands that match, so often as was said, and for none after the healing."""
    plan = proxy.inject(cut, containing(b"SET"), times=2)
    client.get("k")
    for _ in range(2):
        with pytest.raises(RedisConnectionError):
            client.set("k", "v")
    client.set("k", "v")
    assert plan.hits == 2
    proxy.inject(cut, times=None)
    proxy.heal()
    assert client.get("k") == b"v"


def test_scripts_are_known_by_digest_and_by_body() -> None:
    """A call of one is not mistaken for a call of another."""
    for head in (COMMIT.by_sha, COMMIT.by_body):
        assert calls(COMMIT)(head)
        assert not calls(RELEASE)(head)


def test_a_server_that_is_down_is_refused(own_redis: RedisServer) -> None:
    """Its clients see their connections closed, and get through again when it is back."""
    with ChaosProxy(own_redis.port) as proxy:
        own_redis.kill()
        with Redis.from_url(proxy.url, retry=Retry(NoBackoff(), 0)) as client:
            with pytest.raises(RedisConnectionError):
                client.ping()
            own_redis.start()
            assert client.ping()
