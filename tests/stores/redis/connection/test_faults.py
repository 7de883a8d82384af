"""What an operator is told when Redis cannot be used: the cause in words wherever it shows, and no secret."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import anyio
import pytest
from asgi import KEY, empty_body, http_scope, page
from deployments import command
from redis import exceptions
from redis.asyncio import Redis
from redis.asyncio.sentinel import MasterNotFoundError
from redis_server import RedisServer, free_port
from relays import Authority, Relay
from visitors import until

from asgi_sessions import (
    RedisSessionStore,
    Session,
    SessionData,
    SessionEvent,
    SessionMiddleware,
    SessionStoreError,
)
from asgi_sessions.asgi import Message
from asgi_sessions.cli import main
from asgi_sessions.client.cookie import SessionCookie
from asgi_sessions.observation.events import STORE_ERROR
from asgi_sessions.stores.redis.connection.faults import explain

pytestmark = pytest.mark.anyio

PASSWORD = "geheim-und-lang-genug"

Fault = Callable[[RedisServer, Path], AbstractAsyncContextManager[str]]
"""A fault of this server or of the way to it; the URL that leads into it. The directory is for its files."""


def given(url: str, *commands: str, server: tuple[str, ...] = ()) -> Fault:
    """After these commands; `{port}` in the URL is the server's. With `server` options it is another one."""

    @asynccontextmanager
    async def fault(shared: RedisServer, directory: Path) -> AsyncIterator[str]:
        if server:
            with RedisServer(*server) as own:
                yield url.format(port=own.port)
            return
        for each in commands:
            command(shared, *each.split())
        yield url.format(port=shared.port, free=free_port(), directory=directory)

    return fault


def user(*rules: str) -> Fault:
    """As a user with these permissions."""
    setuser = " ".join(["ACL SETUSER app on", f">{PASSWORD}", *rules])
    return given(f"redis://app:{PASSWORD}@127.0.0.1:{{port}}/1", setuser)


def behind_tls(
    *names: str, ask_client: bool = False, url: Callable[[Authority, int], str] | None = None
) -> Fault:
    """Behind a TLS server of these names, which a client trusts whose `url` says nothing else."""

    @asynccontextmanager
    async def fault(server: RedisServer, directory: Path) -> AsyncIterator[str]:
        authority = Authority(directory)
        with Relay(server.port, tls=authority.context(*names, ask_client=ask_client)) as relay:
            yield url(authority, relay.port) if url is not None else authority.url("localhost", relay.port)

    return fault


@asynccontextmanager
async def loading(shared: RedisServer, directory: Path) -> AsyncIterator[str]:
    """A server that was just started and has much to read."""
    with RedisServer("--rdbcompression", "no", "--key-load-delay", "100000") as server:
        for n in range(50):
            command(server, "SET", f"ballast{n}", "x" * 1_000_000)
        command(server, "SAVE")
        server.kill()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(anyio.to_thread.run_sync, server.start)
            await until(lambda: says(server, "LOADING"), "it loads")
            yield server.url  # and is done some seconds later


@asynccontextmanager
async def busy(shared: RedisServer, directory: Path) -> AsyncIterator[str]:
    """Somebody's endless script runs."""
    command(shared, "CONFIG", "SET", "lua-time-limit", "1")

    async def run_for_ever() -> None:
        async with Redis.from_url(shared.url) as client:
            with pytest.raises(exceptions.ResponseError):
                await client.eval("while true do end", 0)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(run_for_ever)
        await until(lambda: says(shared, "BUSY"), "the script runs")
        yield shared.url
        command(shared, "SCRIPT", "KILL")


@asynccontextmanager
async def of_a_cluster(shared: RedisServer, directory: Path) -> AsyncIterator[str]:
    """A node of a cluster that has no slots, as one of them for a client that knows one node only."""
    with RedisServer("--cluster-enabled", "yes", port=free_port()) as server:
        yield server.url


def says(server: RedisServer, word: str) -> bool:
    try:
        command(server, "PING")
    except exceptions.RedisError as error:
        return word.lower() in f"{type(error).__name__} {error}".lower()
    return False


FAULTS: dict[str, tuple[Fault, str]] = {
    "wrong password": (
        given(f"redis://:{PASSWORD}@127.0.0.1:{{port}}/0", server=("--requirepass", "another")),
        "wrong password",
    ),
    "no password": (given("redis://127.0.0.1:{port}/0", server=("--requirepass", "x")), "no password given"),
    "a password too many": (given(f"redis://:{PASSWORD}@127.0.0.1:{{port}}/0"), "Redis asks for none"),
    "an unknown user": (given(f"redis://eve:{PASSWORD}@127.0.0.1:{{port}}/0"), "unknown user"),
    "no right to scripts": (user("~*", "&*", "+@all", "-evalsha"), "may not run evalsha: allow [+]evalsha"),
    "no right to what scripts do": (user("~*", "&*", "+@all", "-get", "-getrange"), "may not run"),
    "no right to choose a db": (user("~*", "&*", "+@all", "-select"), "may not run select"),
    "no right to the keys": (user("~other:*", "&*", "+@all"), "may not use its keys"),
    "nobody listens": (given("redis://127.0.0.1:{free}/0"), r"nothing listens at 127\.0\.0\.1"),
    "unknown host": (given("redis://nowhere.invalid:{port}/0"), r"unknown host nowhere\.invalid"),
    "no such db": (given("redis://127.0.0.1:{port}/99"), "no such db"),
    "no socket": (given("unix://{directory}/nothing"), r"no socket at \S*/nothing"),
    "not a socket": (given("unix:///etc/hostname"), "nothing listens at /etc/hostname"),
    "TLS where none is spoken": (
        given("rediss://127.0.0.1:{port}/0?socket_timeout=0.4"),
        "no answer to TLS",
    ),
    "no TLS where it is spoken": (
        behind_tls("localhost", url=lambda _, port: f"redis://localhost:{port}/0"),
        r"is TLS wanted there \(rediss://\)",
    ),
    "unknown CA": (
        behind_tls("localhost", url=lambda _, port: f"rediss://localhost:{port}/0"),
        "certificate not trusted: ssl_ca_certs",
    ),
    "another host's certificate": (
        behind_tls("redis.example.org"),
        "certificate not trusted: it is for another host name",
    ),
    "no client certificate": (behind_tls("localhost", ask_client=True), "client certificate missing"),
    "no file of a CA": (
        behind_tls("localhost", url=lambda _, port: f"rediss://localhost:{port}/0?ssl_ca_certs=/nowhere"),
        "file cannot be read",
    ),
    "loading": (loading, "loading its data"),
    "busy": (busy, "busy with a script"),
    "a replica": (given("redis://127.0.0.1:{port}/0", "REPLICAOF 127.0.0.1 1"), "read-only replica"),
    "out of memory": (given("redis://127.0.0.1:{port}/0", "CONFIG SET maxmemory 1"), "out of memory"),
    "no replicas": (
        given("redis://127.0.0.1:{port}/0", "CONFIG SET min-replicas-to-write 1"),
        "too few replicas",
    ),
    "a cluster": (of_a_cluster, "cluster"),
}


async def asked_by_a_request(store: RedisSessionStore) -> list[SessionEvent]:
    """The events of a request whose session the store should have."""
    events: list[SessionEvent] = []
    app = SessionMiddleware(page(Session.clear), KEY, store=store, on_event=events.append)
    cookie = SessionCookie(KEY).signer.sign("a" * 32)
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    await app(http_scope(headers=[(b"cookie", f"session={cookie}".encode())]), empty_body, send)
    return events


@pytest.mark.parametrize("name", FAULTS)
async def test_the_cause_is_told_in_words(
    own_redis: RedisServer,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    name: str,
) -> None:
    """In the error, in `health_check`, by the command line (exit code 1) and in the event; no password is."""
    fault, words = FAULTS[name]
    async with fault(own_redis, tmp_path) as url:
        store = RedisSessionStore(url)
        with pytest.raises(SessionStoreError, match=words) as caught:
            await store.set("s", SessionData(session_id="s"))
        assert caught.value.__cause__ is not None
        health = await store.health_check()
        assert not health["healthy"]
        events = await asked_by_a_request(store)
        await store.aclose()
        assert await anyio.to_thread.run_sync(main, ["health", url]) == 1
    said = capsys.readouterr()
    told = [health["error"], json.loads(said.out)["error"]]
    told += [str(event.details["error"]) for event in events if event.name == STORE_ERROR]
    assert [text for text in told if not re.search(words, text)] == []
    assert PASSWORD not in f"{caught.value} {told} {said} {caplog.text}"


@pytest.mark.parametrize("arguments", [["health"], ["stats"], ["sessions", "ada"], ["logout", "ada"]])
def test_every_command_says_why_it_failed(
    own_redis: RedisServer, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    """On one line, and ends with 1."""
    url = f"redis://:{PASSWORD}@127.0.0.1:{own_redis.port}/0"
    assert main([arguments[0], url, *arguments[1:]]) == 1
    said = capsys.readouterr()
    assert "Redis cannot be reached: wrong password" in said.out + said.err
    assert PASSWORD not in said.out + said.err
    assert "Traceback" not in said.err


# Servers that the tests have not at hand say these; the names and texts are those of redis-py.
TEXTS: list[tuple[Exception, str]] = [
    (
        exceptions.NoPermissionError("User app has no permissions to run the 'evalsha' command"),
        "the ACL user may not run evalsha: allow +evalsha",
    ),
    (
        exceptions.NoPermissionError("No permissions to access a key"),
        "the ACL user may not use its keys: ~PREFIX*",
    ),
    (
        exceptions.NoPermissionError("No permissions to access a channel"),
        "the ACL user may not use its channels: &PREFIX*",
    ),
    (
        exceptions.ResponseError(
            "ACL failure in script: User app has no permissions to run the 'set' command"
        ),
        "the ACL user may not run set: allow +set",
    ),
    (
        exceptions.ResponseError("Error running script (call to f_0): @user_script:17: ERR syntax error"),
        "Redis is too old: 6.2 or newer is needed",
    ),
    (
        exceptions.ResponseError("unknown command `EVALSHA`, with args beginning with: `0123`, `1`,"),
        "Redis does not know EVALSHA: it is renamed, or older than 6.2",
    ),
    (exceptions.ResponseError("max number of clients reached"), "Redis has too many clients (maxclients)"),
    (
        exceptions.ResponseError("MISCONF Redis is configured to save RDB snapshots"),
        "Redis cannot write its data to disk (MISCONF), so it takes no changes",
    ),
    (
        exceptions.ClusterDownError("CLUSTERDOWN The cluster is down"),
        "the cluster is down: slots are not served",
    ),
    (exceptions.MasterDownError("Link with MASTER is down"), "this is a replica that has lost its primary"),
    (
        MasterNotFoundError("No master found for 'primary' : Redis<password=geheim> - TimeoutError()"),
        "no Sentinel that can be reached knows a primary of this name",
    ),
    (exceptions.MovedError("12182 10.0.0.7:6379"), "this is a cluster: redis+cluster://"),
    (
        exceptions.ResponseError("This instance has cluster support disabled"),
        "this is no cluster: redis://",
    ),
    (exceptions.ConnectionError("Connection closed by server."), "the connection broke"),
    (
        exceptions.InvalidResponse("Protocol Error: b'HTTP/1.1 400 Bad Request'"),
        "what answers there is not Redis",
    ),
]


@pytest.mark.parametrize(("error", "words"), TEXTS)
def test_texts_that_other_servers_say(error: Exception, words: str) -> None:
    """Are put into the same words."""
    assert explain(error) == words


@pytest.mark.parametrize(
    "secret",
    [
        "session 0123456789abcdef0123456789abcdef is odd",
        "bad value 'ada' in {ada}",
        "redis://app:ada@host/0 does not work",
        'key "session:{ada}:lock"',
        "x" * 5000,
    ],
)
def test_what_nobody_knows_is_told_without_what_may_be_secret(secret: str) -> None:
    """Quotations, ids, and whatever is long are left out of an unknown error's text."""
    told = explain(exceptions.ResponseError(f"ERR strange: {secret}"))
    assert told.startswith("ResponseError: ERR strange: ")
    assert "ada" not in told
    assert "0123456789abcdef" not in told
    assert len(told) <= 160
