"""The pipelined calls to Redis: order, errors, lost connections, deadlines, event loops."""

from __future__ import annotations

import asyncio
import gc
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import cast

import hiredis
import pytest
import redis as blocking_redis
from hypothesis import given
from hypothesis import strategies as st
from redis import exceptions
from redis.asyncio import Redis, RedisCluster
from redis.crc import key_slot
from redis_server import Proxy, RedisServer, free_port

from asgi_sessions.errors import SessionStoreError
from asgi_sessions.record.codec import encode_checked
from asgi_sessions.record.model import SessionData
from asgi_sessions.stores.checkout import Checkout, Lifetime, LockPolicy, Outcome
from asgi_sessions.stores.redis.commands.keys import Keys, KeySpace
from asgi_sessions.stores.redis.commands.scripts import RENEW, SET
from asgi_sessions.stores.redis.commands.timing import LockTiming
from asgi_sessions.stores.redis.connection.deployment import deployment
from asgi_sessions.stores.redis.connection.pipeline import Pipeline
from asgi_sessions.stores.redis.connection.resp import pack, pack_args
from asgi_sessions.stores.redis.event_loop import LoopState, LoopStates
from asgi_sessions.stores.redis.store import RedisSessionStore

pytestmark = pytest.mark.anyio

_HOUR = Lifetime(absolute=3600)
_LOCK = LockPolicy()


def _states(url: str, timeout: float = 5.0) -> LoopStates:
    return LoopStates(deployment(url, timeout), KeySpace("test:"))


def _pipeline(state: LoopState) -> Pipeline:
    return state.router.pipeline(b"k")


def _record(session_id: str = "s") -> bytes:
    return encode_checked(SessionData(session_id=session_id))


@pytest.fixture
async def states(redis_url: str) -> AsyncIterator[LoopStates]:
    states = _states(redis_url)
    yield states
    await states.aclose()


@pytest.fixture
async def raw(redis_url: str) -> AsyncIterator[Redis]:
    async with Redis.from_url(redis_url) as client:
        yield client


# -- the wire -------------------------------------------------------------------------------------------


@given(st.lists(st.binary(max_size=50), min_size=1, max_size=6))
def test_commands_are_packed_as_redis_reads_them(args: list[bytes]) -> None:
    """Any bytes, line ends and percent signs included, arrive as they were."""
    reader = hiredis.Reader()
    reader.feed(pack(*args))
    assert reader.gets() == args


@given(st.tuples(*[st.binary(max_size=20)] * 6))
def test_scripts_are_packed_as_redis_reads_them(args: tuple[bytes, ...]) -> None:
    """A script call, by digest or with its body, carries keys and arguments as they were."""
    for head, command in ((SET.by_sha, b"EVALSHA"), (SET.by_body, b"EVAL")):
        reader = hiredis.Reader()
        reader.feed(head + pack_args(*args))
        parts = cast("list[bytes]", reader.gets())
        assert (parts[0], parts[2], tuple(parts[3:])) == (command, b"1", args)


async def test_calls_of_one_tick_leave_in_few_writes(own_redis: RedisServer) -> None:
    """The first of a hundred leaves alone, the others together, and all replies come to their own callers."""
    async with Proxy(own_redis.port) as proxy:
        states = _states(proxy.url)
        state = await states.get()
        await state.commands.command(b"SET", b"k", b"0")
        before = proxy.writes
        replies = await asyncio.gather(*[state.commands.command(b"INCR", b"k") for _ in range(100)])
        assert replies == list(range(1, 101))
        assert proxy.writes <= before + 2
        await states.aclose()


async def test_a_call_that_is_alone_is_written_at_once(states: LoopStates, raw: Redis) -> None:
    """A release is on the wire when the call returns, so a later command on any connection comes after it."""
    state = await states.get()
    await state.commands.command(b"SET", b"lock", b"token")
    keys = Keys(b"r", b"lock", pack_args(b"r", b"lock", b"wait", b"retired"))
    reply = state.releases.let_go(keys, b"token", LockTiming(10))
    assert not _pipeline(state)._outgoing
    assert await reply == 1
    assert await raw.exists("lock") == 0


async def test_any_number_of_calls_share_one_connection(states: LoopStates, raw: Redis) -> None:
    """Concurrency opens no further connections."""
    state = await states.get()
    await state.commands.command(b"PING", b"x")
    before = int((await raw.info("clients"))["connected_clients"])
    await asyncio.gather(*[state.commands.command(b"ECHO", b"%d" % n) for n in range(500)])
    assert int((await raw.info("clients"))["connected_clients"]) == before


# -- errors ---------------------------------------------------------------------------------------------


async def test_an_error_reply_is_its_own_calls_alone(states: LoopStates) -> None:
    """A refused call fails with the cause chained; those before and after it succeed."""
    state = await states.get()
    first = state.commands.command(b"SET", b"k", b"v")
    second = state.commands.command(b"LPOP", b"k")
    third = state.commands.command(b"GET", b"k")
    assert await first == b"OK"
    with pytest.raises(SessionStoreError, match="refused") as caught:
        await second
    assert isinstance(caught.value.__cause__, exceptions.ResponseError)
    assert await third == b"v"


async def test_a_flushed_script_cache_costs_one_more_trip(states: LoopStates, raw: Redis) -> None:
    """NOSCRIPT is answered by sending the body, for that call alone; the digest works again afterwards."""
    state = await states.get()
    await raw.script_flush()
    await raw.config_resetstat()
    args = (b"lock", b"token", b"1000")
    script, command = state.commands.run(RENEW, *args), state.commands.command(b"ECHO", b"x")
    assert await script == 0
    assert await command == b"x"
    assert await state.commands.run(RENEW, *args) == 0
    stats = await raw.info("commandstats")
    assert stats["cmdstat_eval"]["calls"] == 1
    assert stats["cmdstat_evalsha"]["calls"] == 2


async def test_a_cancelled_callers_reply_goes_nowhere(states: LoopStates) -> None:
    """Replies stay with their calls when a caller in the middle has gone."""
    state = await states.get()
    calls = [state.commands.command(b"ECHO", b"%d" % n) for n in range(3)]
    _pipeline(state).flush()
    calls[1].cancel()
    assert await calls[0] == b"0"
    assert await calls[2] == b"2"
    assert await state.commands.command(b"ECHO", b"x") == b"x"


async def test_a_call_that_was_cancelled_at_once_is_never_sent(states: LoopStates, raw: Redis) -> None:
    """What nobody waits for any more does not reach Redis."""
    state = await states.get()
    state.commands.command(b"SET", b"k", b"v").cancel()
    assert await state.commands.command(b"PING", b"x") == b"x"
    assert await raw.exists("k") == 0


async def _full(client: Redis) -> None:
    await client.config_set("maxmemory", 1)


async def _replica(client: Redis) -> None:
    await client.replicaof("127.0.0.1", str(free_port()))


async def _forbidden(client: Redis) -> None:
    await client.execute_command("ACL", "SETUSER", "default", "-evalsha", "-eval", "-set")  # type: ignore[no-untyped-call]  # in redis-py


@pytest.mark.parametrize(
    ("make", "cause"),
    [
        (_full, "OOM|used memory"),
        (_replica, "READONLY|read only replica"),
        (_forbidden, "permission"),
    ],
)
async def test_what_redis_refuses_is_a_store_error(
    own_redis: RedisServer, make: Callable[[Redis], Awaitable[None]], cause: str
) -> None:
    """A full server, a replica and a missing permission are told apart by the chained cause."""
    async with Redis.from_url(own_redis.url) as client:
        await make(client)
    store = RedisSessionStore(own_redis.url)
    with pytest.raises(SessionStoreError) as caught:
        await store.set("s", SessionData(session_id="s"))
    assert isinstance(caught.value.__cause__, exceptions.ResponseError)
    assert re.search(cause, str(caught.value.__cause__))
    assert (await store.health_check())["healthy"] is False
    await store.aclose()


# -- lost connections -----------------------------------------------------------------------------------


async def test_a_refused_port_fails_all_calls_at_once_and_the_next_one_tries_again() -> None:
    """No retries, no waiting; when the server is there the same object works."""
    server = RedisServer()
    states = _states(server.url)
    state = await states.get()
    replies = await asyncio.gather(
        *[state.commands.command(b"GET", b"k") for _ in range(3)], return_exceptions=True
    )
    for reply in replies:
        assert isinstance(reply, SessionStoreError)
        assert str(reply).startswith("Redis cannot be reached: nothing listens at 127.0.0.1:")
        assert isinstance(reply.__cause__, exceptions.ConnectionError)
    assert len({id(reply) for reply in replies}) == 3
    with server:
        assert await state.commands.command(b"PING", b"x") == b"x"
        await states.aclose()


async def test_calls_in_flight_are_sent_again(own_redis: RedisServer) -> None:
    """A connection that Redis closes under a hundred callers is no error for any of them."""
    states = _states(own_redis.url)
    state = await states.get()
    await state.commands.command(b"PING", b"x")
    async with Redis.from_url(own_redis.url) as client:
        await client.execute_command("CLIENT", "PAUSE", "100", "WRITE")  # type: ignore[no-untyped-call]  # in redis-py
        calls = [state.commands.command(b"SET", b"k", b"%d" % n, b"GET") for n in range(100)]
        _pipeline(state).flush()
        await client.client_kill_filter(_type="normal", skipme=True)
        assert await asyncio.gather(*calls) == [None, *[b"%d" % n for n in range(99)]]
    await states.aclose()


async def test_a_call_is_sent_again_only_once(own_redis: RedisServer) -> None:
    """A call that loses its connection twice fails with the cause; the next one works."""
    async with Proxy(own_redis.port) as proxy:
        states = _states(proxy.url)
        state = await states.get()
        await state.commands.command(b"SET", b"k", b"0")
        proxy.lose_replies(b"INCR", times=2)
        with pytest.raises(SessionStoreError, match="connection to Redis was lost") as caught:
            await state.commands.command(b"INCR", b"k")
        assert isinstance(caught.value.__cause__, exceptions.ConnectionError)
        assert await state.commands.command(b"GET", b"k") == b"2"
        await states.aclose()


async def test_a_commit_whose_reply_is_lost_is_carried_out_once(own_redis: RedisServer) -> None:
    """The script recognises its own retry: stored, the version is the checkout's, the lock is free."""
    async with Proxy(own_redis.port) as proxy:
        store, direct = RedisSessionStore(proxy.url), RedisSessionStore(own_redis.url)
        await direct.set("s", SessionData(session_id="s"))
        taken = await store.checkout("s", _LOCK, _HOUR)
        assert isinstance(taken, Checkout)
        proxy.lose_replies(b"EVALSHA")
        assert await store.commit(taken, _record(), release=True) is Outcome.STORED
        again = await direct.checkout("s", LockPolicy(wait=0), _HOUR)
        assert isinstance(again, Checkout)
        assert again.version == taken.version
        await direct.release(again)
        await asyncio.gather(store.aclose(), direct.aclose())


async def test_a_checkout_whose_reply_is_lost_holds_the_lock_once(own_redis: RedisServer) -> None:
    """The retry gets the same lock again, and its release leaves none."""
    async with Proxy(own_redis.port) as proxy, Redis.from_url(own_redis.url) as client:
        store = RedisSessionStore(proxy.url)
        await store.set("s", SessionData(session_id="s"))
        proxy.lose_replies(b"EVAL")
        taken = await store.checkout("s", _LOCK, _HOUR)
        assert isinstance(taken, Checkout)
        assert await store.commit(taken, _record(), release=True) is Outcome.STORED
        assert await client.keys() == [b"session:{s}"]
        await store.aclose()


async def test_a_restarted_server_is_found_again(own_redis: RedisServer) -> None:
    """Calls work before and after; the scripts are taught again."""
    states = _states(own_redis.url)
    state = await states.get()
    assert await state.commands.run(RENEW, b"lock", b"token", b"1000") == 0
    own_redis.restart()
    assert await state.commands.run(RENEW, b"lock", b"token", b"1000") == 0
    await states.aclose()


# -- deadlines ------------------------------------------------------------------------------------------


async def test_a_server_that_hangs_fails_the_calls_and_is_left(own_redis: RedisServer) -> None:
    """All calls older than the timeout fail, connecting included; after it wakes up calls work again."""
    states = _states(own_redis.url, timeout=0.2)
    state = await states.get()
    await state.commands.command(b"PING", b"x")
    own_redis.pause()
    for _ in range(2):
        calls = [state.commands.command(b"ECHO", b"x") for _ in range(2)]
        for reply in await asyncio.gather(*calls, return_exceptions=True):
            assert isinstance(reply, SessionStoreError)
            assert str(reply) == "Redis did not answer within 0.2 seconds"
    own_redis.resume()
    assert await state.commands.command(b"ECHO", b"y") == b"y"
    await states.aclose()


async def test_a_blocked_event_loop_is_no_timeout(redis_url: str) -> None:
    """Replies that arrived while the loop did not run are read before anybody is given up."""
    states = _states(redis_url, timeout=0.1)
    state = await states.get()
    await state.commands.command(b"PING", b"x")
    call = state.commands.command(b"ECHO", b"x")
    _pipeline(state).flush()
    time.sleep(0.3)  # noqa: ASYNC251  # this is the blocked loop
    assert await call == b"x"
    await states.aclose()


@pytest.mark.parametrize(
    ("url", "timeout", "expected"),
    [
        ("redis://h", None, 5.0),
        ("redis://h?socket_timeout=2", None, 2.0),
        ("redis://h?socket_timeout=2", 0.5, 0.5),
    ],
)
def test_the_timeout_is_the_callers_or_the_urls_or_five_seconds(
    url: str, timeout: float | None, expected: float
) -> None:
    """An argument wins over the URL."""
    assert deployment(url, timeout).timeout == expected


@pytest.mark.parametrize("end", ["resume", "drop", None])
async def test_calls_are_held_for_a_while(states: LoopStates, end: str | None) -> None:
    """Nothing is written until they are let go, the connection is given up, or the time is over."""
    state = await states.get()
    await state.commands.command(b"SET", b"k", b"0")
    pipeline, loop = _pipeline(state), asyncio.get_running_loop()
    began = loop.time()
    pipeline.hold(0.3)
    call = state.commands.command(b"INCR", b"k")
    assert await state.commands.command(b"ECHO", b"x") == b"x" if end is None else not call.done()
    if end == "resume":
        pipeline.resume()
    elif end == "drop":
        pipeline.drop("another node takes over")
    assert await call == 1
    assert (loop.time() - began < 0.3) is (end is not None)


async def test_a_connection_may_be_given_up(states: LoopStates) -> None:
    """Calls under way are sent again on the next one; one that is being made is begun anew."""
    state = await states.get()
    pipeline = _pipeline(state)
    pipeline.drop("there is none")
    calls = [state.commands.command(b"ECHO", b"a")]
    pipeline.flush()
    pipeline.drop("it is being made")
    calls.append(state.commands.command(b"ECHO", b"b"))
    assert await asyncio.gather(*calls) == [b"a", b"b"]
    calls = [state.commands.command(b"ECHO", b"%d" % n) for n in range(3)]
    pipeline.flush()
    pipeline.drop("it is in use")
    assert await asyncio.gather(*calls) == [b"0", b"1", b"2"]


# -- event loops ----------------------------------------------------------------------------------------


def test_one_store_serves_loops_one_after_the_other(redis_url: str) -> None:
    """Each loop gets connections of its own, and they are closed with it without anybody's call."""
    store = RedisSessionStore(redis_url)

    async def visit(n: int) -> None:
        await store.set("s", SessionData(session_id="s", message_count=n))
        taken = await store.checkout("s", _LOCK, _HOUR)
        assert isinstance(taken, Checkout)
        await store.release(taken)

    for n in range(3):
        asyncio.run(visit(n))
    gc.collect()
    assert not store._states._by_loop
    with blocking_redis.Redis.from_url(redis_url) as client:
        assert client.keys() == [b"session:{s}"]


def test_a_loop_that_was_never_shut_down_properly_is_forgotten(redis_url: str) -> None:
    """A closed loop's state is dropped when the next loop comes."""
    store = RedisSessionStore(redis_url)
    loop = asyncio.new_event_loop()
    loop.run_until_complete(store.open())
    loop.close()
    asyncio.run(store.set("s", SessionData(session_id="s")))
    assert loop not in store._states._by_loop


async def test_closing_is_idempotent_and_a_later_call_opens_again(redis_url: str) -> None:
    """`aclose` twice is fine, before any use too."""
    store = RedisSessionStore(redis_url)
    await store.aclose()
    await store.set("s", SessionData(session_id="s"))
    await store.aclose()
    await store.aclose()
    assert await store.exists("s")
    await store.aclose()


async def test_calls_of_a_closed_engine_fail(redis_url: str) -> None:
    """Whoever still holds the old state gets an error, not a connection that nobody closes."""
    states = _states(redis_url)
    state = await states.get()
    call = state.commands.command(b"ECHO", b"x")
    await states.aclose()
    assert await call == b"x"
    with pytest.raises(SessionStoreError, match="closed"):
        await state.commands.command(b"PING", b"x")


# -- what a user may give -------------------------------------------------------------------------------


async def test_a_client_is_a_description_only(redis_url: str) -> None:
    """Its decoding, its retries and its connections do not matter, and it is left unused."""
    async with Redis.from_url(redis_url, decode_responses=True, max_connections=1, protocol=3) as client:
        store = RedisSessionStore(client)
        await store.set("s", SessionData(session_id="s", metadata={"a": "ü"}))
        found = await store.get("s")
        assert found is not None
        assert found.metadata == {"a": "ü"}
        assert not client.connection_pool._available_connections
        await store.aclose()


async def test_passwords_and_databases_of_the_url_are_used() -> None:
    """A protected server is reached with the URL's password and database, and not with a wrong one."""
    with RedisServer("--requirepass", "s3cret") as server:
        good = RedisSessionStore(f"redis://:s3cret@127.0.0.1:{server.port}/2")
        await good.set("s", SessionData(session_id="s"))
        async with Redis(port=server.port, db=2, password="s3cret") as client:
            assert await client.keys() == [b"session:{s}"]
        bad = RedisSessionStore(f"redis://:wrong@127.0.0.1:{server.port}/2")
        with pytest.raises(SessionStoreError, match="cannot be reached") as caught:
            await bad.get("s")
        assert isinstance(caught.value.__cause__, exceptions.AuthenticationError)
        await asyncio.gather(good.aclose(), bad.aclose())


async def test_a_unix_socket_is_reached(tmp_path: Path) -> None:
    """`unix://` works as the other schemes do."""
    path = tmp_path / "redis.sock"
    with RedisServer("--unixsocket", str(path)):
        store = RedisSessionStore(f"unix://{path}")
        assert await store.set("s", SessionData(session_id="s"))
        assert await store.list_active() == ["s"]
        await store.aclose()


@pytest.mark.parametrize(
    ("given_url", "message"),
    [
        ("http://h", r"redis://, .*unix://, redis\+sentinel://.* or rediss\+cluster://"),
        ("redis", "scheme must be one of"),
        ("redis+sentinel://h:1", "host:port/service"),
        ("redis+sentinel:///service", "host:port/service"),
    ],
)
def test_a_wrong_url_is_refused_at_once(given_url: str, message: str) -> None:
    """The message says what a right one looks like."""
    with pytest.raises(ValueError, match=message):
        RedisSessionStore(given_url)


def test_a_blocking_client_is_refused() -> None:
    """redis.Redis would stop the event loop with each call."""
    with pytest.raises(TypeError, match=r"redis\.asyncio"):
        RedisSessionStore(cast(Redis, blocking_redis.Redis()))


@pytest.mark.parametrize("wrong", [{"default_ttl": 0}, {"socket_timeout": 0}, {"socket_timeout": -1}])
def test_wrong_times_are_refused(wrong: dict[str, float]) -> None:
    """Times are seconds above 0."""
    with pytest.raises(ValueError, match="above 0"):
        RedisSessionStore("redis://h", **wrong)  # type: ignore[arg-type]  # a table of floats


def test_sentinel_and_cluster_urls_are_understood() -> None:
    """Several Sentinels, credentials and a database; a cluster's first node."""
    sentinel = deployment("redis+sentinel://u:p@a:1,b:2,[::1]:3/main/4?socket_timeout=3")
    manager = sentinel.template.sentinel_manager  # type: ignore[attr-defined]  # a SentinelConnectionPool
    addresses = [
        tuple(c.connection_pool.connection_kwargs[k] for k in ("host", "port")) for c in manager.sentinels
    ]
    assert addresses == [("a", 1), ("b", 2), ("::1", 3)]
    settings = sentinel.template.connection_kwargs
    assert (settings["username"], settings["password"], settings["db"]) == ("u", "p", 4)
    assert sentinel.timeout == 3
    assert deployment("redis+cluster://127.0.0.1:7000").seeds == (("127.0.0.1", 7000),)


# -- a cluster ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster() -> Iterator[list[RedisServer]]:
    """Two nodes, each with half of the slots."""
    with ExitStack() as stack:
        servers = [RedisServer("--cluster-enabled", "yes", port=free_port()) for _ in range(2)]
        nodes = [stack.enter_context(server) for server in servers]
        clients = [stack.enter_context(blocking_redis.Redis(port=node.port)) for node in nodes]
        for client, slots in zip(clients, (range(8192), range(8192, 16384)), strict=True):
            _run(client, "CLUSTER", "ADDSLOTS", *map(str, slots))
        _run(clients[1], "CLUSTER", "SET-CONFIG-EPOCH", "2")
        _run(clients[1], "CLUSTER", "MEET", "127.0.0.1", str(nodes[0].port))
        while not all(_whole(client) for client in clients):
            time.sleep(0.05)
        yield nodes


def _run(client: blocking_redis.Redis, *command: str) -> bytes:
    return bytes(client.execute_command(*command))  # type: ignore[no-untyped-call]  # in redis-py


def _whole(client: blocking_redis.Redis) -> bool:
    info = _run(client, "CLUSTER", "INFO")
    return b"cluster_state:ok" in info and b"cluster_known_nodes:2" in info


async def test_a_cluster_is_one_store(cluster: list[RedisServer]) -> None:
    """From whichever node it is entered: batches, lists and locked changes reach the right nodes."""
    client = RedisCluster(host="127.0.0.1", port=cluster[1].port)
    stores = [RedisSessionStore(f"redis+cluster://127.0.0.1:{cluster[0].port}"), RedisSessionStore(client)]
    records = {f"s{n}": SessionData(session_id=f"s{n}", user_id="ada") for n in range(20)}
    assert all((await stores[0].set_batch(records)).values())
    assert await stores[1].get_batch(records) == records
    assert await stores[1].list_active() == sorted(records)
    names = list(records)[:4]
    await asyncio.gather(*[each.increment_counter(name, "n") for each in stores for name in names * 5])
    counted = await stores[0].get_batch(names)
    assert [data.metadata for data in counted.values() if data is not None] == [{"n": 10}] * 4
    assert await stores[1].delete_for_user("ada") == 20
    assert await stores[0].count_active() == 0
    await asyncio.gather(*[store.aclose() for store in stores])


async def test_a_slot_that_moves_is_followed(cluster: list[RedisServer]) -> None:
    """While it is on its way (ASK) and when it has arrived (MOVED), calls find their keys."""
    slot, key = key_slot(b"session:{moving}"), "session:{moving}"
    store = RedisSessionStore(f"redis+cluster://127.0.0.1:{cluster[0].port}")
    await store.set("moving", SessionData(session_id="moving"))
    ends = (1, 0) if slot >= 8192 else (0, 1)
    with ExitStack() as stack:
        source, target = (stack.enter_context(blocking_redis.Redis(port=cluster[end].port)) for end in ends)
        ids = [_run(client, "CLUSTER", "MYID").decode() for client in (source, target)]
        _run(target, "CLUSTER", "SETSLOT", str(slot), "IMPORTING", ids[0])
        _run(source, "CLUSTER", "SETSLOT", str(slot), "MIGRATING", ids[1])
        _run(source, "MIGRATE", "127.0.0.1", str(cluster[ends[1]].port), key, "0", "1000")
        assert await store.get("moving") is not None
        for client in (target, source):
            _run(client, "CLUSTER", "SETSLOT", str(slot), "NODE", ids[1])
    assert await store.increment_counter("moving", "n") == 1
    assert await store.delete("moving")
    await store.aclose()
