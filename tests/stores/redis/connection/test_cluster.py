"""The Redis store on a real cluster of three primaries and their replicas: nodes die, slots move."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import ExitStack
from itertools import count, islice

import anyio
import pytest
import redis.asyncio
from anyio.to_thread import run_sync
from deployments import NODE_TIMEOUT, SLOTS, Bed, RedisCluster, binaries, chosen, command, scripts
from ends import all_processes_are_told
from faults.chaos import ChaosProxy, Fault, Link, Send, anything
from faults.checkers import count_flaws
from moves import retire
from redis.asyncio.cluster import ClusterNode
from redis.crc import key_slot
from redis.exceptions import TryAgainError
from redis_server import RedisServer, free_port
from visitors import (
    PATIENCE,
    Counted,
    CountingSite,
    counting,
    crowd,
    failover_flaws,
    note_copies,
    served,
    until,
)

from asgi_sessions import DistributedLock, RedisSessionStore, SessionData, SessionFilter, SessionStoreError
from asgi_sessions.record.codec import encode_checked
from asgi_sessions.stores.checkout import Checkout, LockPolicy, Missing, Outcome
from asgi_sessions.stores.redis.connection.routing import Cluster

pytestmark = pytest.mark.anyio

_LOCK = LockPolicy()


@pytest.fixture(scope="module")
def bed() -> Iterator[Bed[RedisCluster]]:
    with Bed(RedisCluster) as bed:
        yield bed


@pytest.fixture
def cluster(bed: Bed[RedisCluster]) -> RedisCluster:
    """Whole and empty, whatever the test before did to it."""
    return bed.whole()


@pytest.fixture
async def store(cluster: RedisCluster) -> AsyncIterator[RedisSessionStore]:
    store = RedisSessionStore(cluster.url)
    yield store
    await store.aclose()


def _key(session_id: str) -> str:
    return f"session:{{{session_id}}}"


async def _taken(store: RedisSessionStore, session_id: str = "s") -> Checkout:
    taken = await store.checkout(session_id, _LOCK, None)
    assert isinstance(taken, Checkout)
    return taken


def _id_on(cluster: RedisCluster, node: RedisServer) -> str:
    """A session id whose keys live on this node."""
    return next(name for name in map(str, range(1000)) if cluster.primary_of(_key(name)) is node)


async def _begin(site: CountingSite, cluster: RedisCluster, here: RedisServer) -> list[list[Counted]]:
    """Two sessions whose keys live on this node, and two that live on others."""
    parted: list[list[Counted]] = [[], []]
    while min(map(len, parted)) < 2:
        counted = await site.begin()
        part = parted[0 if cluster.primary_of(counted.key) is here else 1]
        if len(part) < 2:
            part.append(counted)
        else:
            await site.store.delete(counted.session_id)
    return parted


# -- a slot moves -----------------------------------------------------------------------------------------


class Move:
    """A slot on its way from the node that has it to another one, in the steps that `redis-cli` takes."""

    def __init__(self, cluster: RedisCluster, key: str) -> None:
        self.source, self.target = cluster.primary_of(key), cluster.another_primary(key)
        self._cluster = cluster
        self._slot = key_slot(key.encode())

    def begin(self) -> None:
        """From here on the source answers ASK for each key that it has not."""
        command(self.target, "CLUSTER", "SETSLOT", self._slot, "IMPORTING", self._cluster.id_of(self.source))
        command(self.source, "CLUSTER", "SETSLOT", self._slot, "MIGRATING", self._cluster.id_of(self.target))

    def carry(self, *keys: str) -> None:
        """Move these keys; without any, all that there are."""
        while found := keys or command(self.source, "CLUSTER", "GETKEYSINSLOT", self._slot, 10):
            address = "127.0.0.1", self.target.port
            command(self.source, "MIGRATE", *address, "", 0, 5000, "REPLACE", "KEYS", *found)
            if keys:
                break

    def end(self) -> None:
        """From here on the source answers MOVED."""
        name = self._cluster.id_of(self.target)
        for node in (self.target, self.source, *self._cluster.primaries()):
            command(node, "CLUSTER", "SETSLOT", self._slot, "NODE", name)


async def test_locked_changes_wait_while_their_slot_moves(
    cluster: RedisCluster, store: RedisSessionStore
) -> None:
    """A cluster refuses calls of several keys meanwhile (TRYAGAIN): they are made again, and nobody fails."""
    await store.set("s", SessionData(session_id="s"))
    holder = await _taken(store)
    move = Move(cluster, _key("s"))
    move.begin()
    move.carry(_key("s"))
    assert await store.get("s") is not None
    count = asyncio.create_task(store.increment_counter("s", "n"))
    commit = asyncio.create_task(store.commit(holder, holder.record, release=True))
    await asyncio.wait((count, commit), timeout=0.2)
    assert not count.done()
    assert not commit.done()
    move.carry()
    move.end()
    assert await commit is Outcome.STORED
    assert await count == 1
    assert cluster.primary_of(_key("s")) is move.target
    assert cluster.all_keys() == [_key("s")]


async def test_a_move_that_takes_too_long_is_a_fault(cluster: RedisCluster) -> None:
    """With the cluster's reason, and not later than any other; a store may be closed meanwhile."""
    store = RedisSessionStore(cluster.url, socket_timeout=0.4)
    await store.set("s", SessionData(session_id="s"))
    move = Move(cluster, _key("s"))
    move.begin()
    with pytest.raises(SessionStoreError) as caught:
        await store.increment_counter("s", "n")
    assert isinstance(caught.value.__cause__, TryAgainError)
    waiting = asyncio.create_task(store.increment_counter("s", "n"))
    await asyncio.sleep(0.05)
    await store.aclose()
    with pytest.raises(SessionStoreError):
        await waiting
    move.carry()
    move.end()
    assert await store.increment_counter("s", "n") == 1
    await store.aclose()


async def test_nobody_notices_that_slots_move(cluster: RedisCluster) -> None:
    """Visitors are served and counted while the slots of their sessions move to another node, and back."""
    unhurried = cluster.url.replace("socket_timeout=1", "socket_timeout=20")
    async with counting(unhurried) as site:
        sessions = [await site.begin() for _ in range(3)]
        async with crowd(site, sessions):
            for counted in sessions * 2:
                await served([counted], 3)
                move = Move(cluster, counted.key)
                for step in (move.begin, move.carry, move.end):
                    await run_sync(step)
                    await asyncio.sleep(0.01)
            await served(sessions)
        for counted in sessions:
            assert set(counted.answers) == {200}
            assert count_flaws(counted.attempts, await site.final(counted)) == []
    await until(
        lambda: cluster.all_keys() == sorted(each.key for each in sessions), "no lock or queue is left"
    )


# -- a node dies ------------------------------------------------------------------------------------------


async def _outlive(cluster: RedisCluster, strike: Callable[[RedisServer], None]) -> None:
    """Visitors go on counting while the primary of half of their sessions, their entrance, is struck."""
    victim = cluster.primaries()[0]
    async with counting(cluster.url_at(victim)) as site:
        struck, others = await _begin(site, cluster, victim)
        async with crowd(site, [*struck, *others]):
            await served([*struck, *others], 5)
            await note_copies(cluster, victim, struck)
            strike(victim)
            died = time.monotonic()
            await until(lambda: all(each.answers[503] for each in struck), "who has no primary is told")
            await served(others)
            await served([*struck, *others])
        for counted in struck:
            assert set(counted.answers) == {200, 503}
            final = await site.final(counted)
            assert failover_flaws(counted.attempts, final, counted.copied, died + NODE_TIMEOUT / 2) == []
        for counted in others:
            assert set(counted.answers) == {200}
            assert count_flaws(counted.attempts, await site.final(counted)) == []
    left = sorted(each.key for each in [*struck, *others])
    await until(lambda: cluster.all_keys() == left, "no lock or queue is left")


async def test_a_primary_is_killed_under_load(cluster: RedisCluster) -> None:
    """Its sessions get 503 until the replica takes over; what was copied is there, the rest served on."""
    await _outlive(cluster, cluster.kill)


async def test_changes_on_what_was_never_copied_are_refused(
    cluster: RedisCluster, store: RedisSessionStore
) -> None:
    """A primary takes its last writes with it: who holds a lock of then, or a record, stores nothing."""
    locked, glanced = "{s}", "{s}2"  # in one slot
    await store.set_batch({each: SessionData(session_id=each) for each in (locked, glanced)})
    primary = cluster.primary_of(_key(locked))
    await run_sync(cluster.stop_copying, primary)
    await store.set(glanced, SessionData(session_id=glanced, metadata={"n": 1}))
    stale = [await store.checkout(locked, _LOCK, None), await store.checkout(glanced, None, None)]
    cluster.kill(primary)
    outcomes = []
    for taken in stale:
        assert isinstance(taken, Checkout)
        name = taken.session_id
        await _until_works(lambda name=name: store.increment_counter(name, "n", 10))  # type: ignore[misc]
        record = encode_checked(SessionData(session_id=taken.session_id))
        outcomes.append(await store.commit(taken, record, release=True))
    assert outcomes == [Outcome.CONFLICT] * 2
    found = await store.get_batch([locked, glanced])
    assert [data.metadata for data in found.values() if data is not None] == [{"n": 10}, {"n": 10}]
    assert set(cluster.all_keys()) == {_key(locked), _key(glanced)}


async def test_a_node_that_hangs_is_left(cluster: RedisCluster) -> None:
    """Its connections stay open and say nothing; when another node has taken over, calls go there."""
    primary = cluster.primary_of(_key("s"))
    store = RedisSessionStore(cluster.url_at(primary), socket_timeout=0.3)
    await store.set("s", SessionData(session_id="s"))
    await store.list_active()
    await run_sync(cluster.copy, primary)
    cluster.freeze(primary)
    with pytest.raises(SessionStoreError, match="did not answer"):
        await store.increment_counter("s", "n")
    await _until_works(lambda: store.increment_counter("s", "n", 10))
    found = await store.get("s")
    assert found is not None
    assert found.metadata == {"n": 10}
    await store.aclose()


async def test_an_entrance_that_dies_is_no_loss(cluster: RedisCluster) -> None:
    """Sessions whose nodes are well are served at once, known or not, and who waits is still told."""
    entrance = next(node for node in cluster.nodes if node not in cluster.primaries())
    stores = [RedisSessionStore(cluster.url_at(entrance)) for _ in range(2)]
    for store in stores:
        await store.get_or_create("s")
    assert await _questions(cluster, stores) == 0
    cluster.kill(entrance)
    await asyncio.sleep(0.05)  # until its connections are known to have ended
    for n in range(20):
        assert await stores[0].set(f"s{n}", SessionData(session_id=f"s{n}"))
    assert await _questions(cluster, stores) == 0
    await asyncio.gather(*[store.aclose() for store in stores])


async def _until_works(write: Callable[[], Awaitable[object]]) -> None:
    """Try again until there is a primary."""
    with anyio.fail_after(PATIENCE):
        while True:
            with contextlib.suppress(SessionStoreError):
                await write()
                return
            await asyncio.sleep(0.02)


# -- many nodes -------------------------------------------------------------------------------------------


async def test_all_keys_of_a_session_are_in_one_slot(cluster: RedisCluster, store: RedisSessionStore) -> None:
    """Record, lock, queue, retired id: one script may touch them all."""
    await store.set("s", SessionData(session_id="s", user_id="ada"))
    other = RedisSessionStore(cluster.url)
    holder = await _taken(other)
    waiter = asyncio.create_task(store.checkout("s", _LOCK, None))
    await until(lambda: f"{_key('s')}:wait" in cluster.all_keys(), "somebody waits")
    await retire(other, holder)
    await other.aclose()
    assert await waiter is Missing.RETIRED
    keys = {"", ":lock", ":wait", ":retired"}
    slots = {command(cluster.nodes[0], "CLUSTER", "KEYSLOT", _key("s") + each) for each in keys}
    assert slots == {key_slot(b"s")}
    assert cluster.all_keys() == ["session:user:ada", f"{_key('s')}:retired"]


async def test_a_waiter_is_woken_from_another_node(cluster: RedisCluster) -> None:
    """Wherever it listens, the message reaches it: the lock passes without a further question."""
    entrance = cluster.primaries()[0]
    stores = [RedisSessionStore(cluster.url_at(entrance)) for _ in range(2)]
    for node in cluster.primaries():
        session_id = _id_on(cluster, node)
        await stores[0].set(session_id, SessionData(session_id=session_id))
        assert await _questions(cluster, stores, session_id) == 0
    await asyncio.gather(*[store.aclose() for store in stores])


async def _questions(cluster: RedisCluster, stores: list[RedisSessionStore], session_id: str = "s") -> int:
    """How often the one who waits asks again until it has the lock that the other lets go."""
    holds, waits = stores
    node = cluster.primary_of(_key(session_id))
    await holds.release(await _taken(holds, session_id))  # the node knows the scripts from here on
    holder = await _taken(holds, session_id)
    waiter = asyncio.create_task(_taken(waits, session_id))
    await until(lambda: f"{_key(session_id)}:wait" in cluster.all_keys(), "somebody waits")
    calls = scripts(node)
    await holds.release(holder)
    woken = await waiter
    asked = scripts(node) - calls - 1
    await waits.release(woken)
    return asked


async def test_locks_for_other_purposes(cluster: RedisCluster) -> None:
    """They too pass from one process to another, wherever their keys live."""
    clients = [redis.asyncio.RedisCluster(host="127.0.0.1", port=cluster.nodes[0].port) for _ in range(2)]
    counts = dict.fromkeys("abc", 0)

    async def count(client: redis.asyncio.RedisCluster, name: str) -> None:
        async with DistributedLock(client, name, retry_attempts=30):
            number = counts[name]
            await asyncio.sleep(0.001)
            counts[name] = number + 1

    await asyncio.gather(*[count(client, name) for client in clients for name in counts for _ in range(5)])
    assert counts == dict.fromkeys("abc", 10)
    await until(lambda: cluster.all_keys() == [], "no lock or queue is left")
    for client in clients:
        await client.aclose()


async def test_batches_and_searches_reach_all_nodes(cluster: RedisCluster, store: RedisSessionStore) -> None:
    """A batch is made of the sessions of all nodes, a list too; no node is asked for all its keys."""
    records = {
        f"s{n}": SessionData(session_id=f"s{n}", user_id="ada", message_count=n % 10) for n in range(1200)
    }
    for node in cluster.nodes:
        command(node, "CONFIG", "RESETSTAT")
    assert await store.set_batch(records) == dict.fromkeys(records, True)
    assert await store.get_batch([*records, "absent"]) == {**records, "absent": None}
    assert await store.list_active() == sorted(records)
    assert await store.count_active() == 1200
    assert len(await store.find(SessionFilter(min_messages=8))) == 240
    assert len(await store.find(SessionFilter(min_messages=8), limit=7)) == 7
    ended = dict.fromkeys(list(records)[:600], True)
    assert await store.delete_batch([*ended, "absent"]) == {**ended, "absent": False}
    assert await store.delete_for_user("ada", keep="s1199") == 599
    assert await store.list_for_user("ada") == [records["s1199"]]
    asked = [command(node, "INFO", "commandstats") for node in cluster.primaries()]
    assert [("cmdstat_scan" in each, "cmdstat_keys" in each) for each in asked] == [(True, False)] * 3


def test_event_loops_come_and_go(cluster: RedisCluster) -> None:
    """One store serves one loop after the other, on all nodes."""
    store = RedisSessionStore(cluster.url)
    for n in range(5):
        ids = [_id_on(cluster, node) for node in cluster.primaries()]

        async def count(ids: list[str] = ids) -> list[int]:
            for each in ids:
                await store.get_or_create(each)
            return [await store.increment_counter(each, "n") for each in ids]

        assert asyncio.run(count()) == [n + 1] * 3


# -- the way in, and from node to node -----------------------------------------------------------------------


@pytest.mark.parametrize("way", ["URL", "client"])
async def test_one_seed_that_answers_is_enough(cluster: RedisCluster, way: str) -> None:
    """Also for the very first call, whichever it is and whatever the others do: refuse, or say nothing."""
    silent = socket.create_server(("127.0.0.1", 0))
    ports = free_port(), silent.getsockname()[1], cluster.nodes[0].port
    addresses = ",".join(f"127.0.0.1:{port}" for port in ports)
    nodes = [ClusterNode("127.0.0.1", port) for port in ports]
    client = redis.asyncio.RedisCluster(startup_nodes=nodes) if way == "client" else None
    store = RedisSessionStore(client or f"redis+cluster://{addresses}", socket_timeout=2)
    with silent:
        for name in ("a", "b", "c"):
            assert await store.set(name, SessionData(session_id=name))
        assert await store.list_active() == ["a", "b", "c"]
        await store.aclose()


async def test_a_call_is_not_lost_with_its_node(cluster: RedisCluster) -> None:
    """When a replica has taken over already, the first call that finds the node silent is served by it."""
    store = RedisSessionStore(cluster.url, socket_timeout=3)
    await store.set("s", SessionData(session_id="s"))
    await store.list_active()
    primary = cluster.primary_of(_key("s"))
    await run_sync(cluster.copy, primary)
    cluster.freeze(primary)
    await until(lambda: cluster.primary_of(_key("s")) is not primary, "the replica takes over")
    assert await store.increment_counter("s", "n") == 1
    await store.aclose()


async def test_the_only_node_that_was_named_may_die(cluster: RedisCluster) -> None:
    """The others are known by then, though no call has met them."""
    seed = cluster.primary_of(_key("s"))
    store = RedisSessionStore(cluster.url_at(seed))
    assert await store.set("s", SessionData(session_id="s"))
    await run_sync(cluster.copy, seed)
    cluster.kill(seed)
    await until(lambda: cluster.primary_of(_key("s")) is not seed, "the replica takes over")
    assert await store.increment_counter("s", "n") == 1
    await store.aclose()


async def test_addresses_that_lead_nowhere_are_mapped(cluster: RedisCluster) -> None:
    """`address_remap` of the client: whatever the nodes say of each other, connections go where it says."""
    with ExitStack() as stack:
        ways = {node.port: stack.enter_context(ChaosProxy(node.port)) for node in cluster.nodes}

        def remap(address: tuple[str, int]) -> tuple[str, int]:
            return "127.0.0.1", ways[address[1]].port if address[1] in ways else address[1]

        entrance = ways[cluster.nodes[0].port].port
        client = redis.asyncio.RedisCluster(host="127.0.0.1", port=entrance, address_remap=remap)
        store = RedisSessionStore(client)
        records = {f"s{n}": SessionData(session_id=f"s{n}") for n in range(20)}
        await store.set_batch(records)
        assert await store.list_active() == sorted(records)
        assert await store.get_batch(records) == records
        for node in cluster.primaries():
            assert ways[node.port].links > 0, "this node is reached by its way"
        await store.aclose()
        await client.aclose()


def _said_otherwise(replacements: dict[bytes, bytes]) -> Fault:
    def say(link: Link, message: bytes, send: Send) -> None:
        for said, instead in replacements.items():
            message = message.replace(said, instead)
        send(message)

    return say


_ADDRESS = b"$9\r\n127.0.0.1\r\n"


@pytest.mark.parametrize(
    "said",
    [
        {b" 127.0.0.1:": b" localhost:", _ADDRESS: b"$9\r\nlocalhost\r\n"},
        {b" 127.0.0.1:": b" ?:", _ADDRESS: b"$1\r\n?\r\n"},
        {b" 127.0.0.1:": b" :", _ADDRESS: b"$-1\r\n"},
    ],
    ids=["host name", "no host name", "unknown"],
)
async def test_nodes_may_be_announced_by_name(cluster: RedisCluster, said: dict[bytes, bytes]) -> None:
    """As Redis 7 does it where it is told to; a node without a name is where the one is that speaks of it."""
    with (
        ChaosProxy(cluster.nodes[0].port) as proxy,
        proxy.injecting(_said_otherwise(said), anything, "answer"),
    ):
        store = RedisSessionStore(f"redis+cluster://127.0.0.1:{proxy.port}")
        records = {f"s{n}": SessionData(session_id=f"s{n}") for n in range(20)}
        for name, record in records.items():
            assert await store.set(name, record)
        assert await store.list_active() == sorted(records)
        host = "localhost" if b"localhost" in said[_ADDRESS] else "127.0.0.1"
        router = (await store._states.get()).router
        assert isinstance(router, Cluster)
        assert {address[0] for address in router._slots.values()} == {host}
        await store.aclose()


_NAMED = next((path for version, path in binaries().items() if not version.startswith("Redis 6")), None)


@pytest.mark.skipif(_NAMED is None, reason="nodes have host names from Redis 7 and Valkey on")
async def test_a_node_that_announces_a_host_name() -> None:
    """The real thing, where there is a server that can do it."""
    assert _NAMED is not None
    named = "--cluster-announce-hostname", "localhost", "--cluster-preferred-endpoint-type", "hostname"
    server = RedisServer("--cluster-enabled", "yes", *named, port=free_port())
    with chosen(_NAMED), server:
        command(server, "CLUSTER", "ADDSLOTS", *range(SLOTS))
        store = RedisSessionStore(f"redis+cluster://127.0.0.1:{server.port}")
        await _until_works(lambda: store.set("s", SessionData(session_id="s")))
        assert await store.list_active() == ["s"]
        router = (await store._states.get()).router
        assert isinstance(router, Cluster)
        assert set(router._slots.values()) == {("localhost", server.port)}
        await store.aclose()


# -- replicas ---------------------------------------------------------------------------------------------


def _client(node: RedisServer) -> redis.asyncio.RedisCluster:
    """A client that may read from replicas and is entered at this node."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # its other name is newer than redis-py 6.4
        return redis.asyncio.RedisCluster(host="127.0.0.1", port=node.port, read_from_replicas=True)


async def test_who_may_read_from_replicas_reads_what_is_stored(cluster: RedisCluster) -> None:
    """Also where the entrance is a replica that is behind: no path of ours is stale."""
    primary = cluster.primary_of(_key("s"))
    (replica,) = cluster.replicas_of(primary)
    store = RedisSessionStore(_client(replica))
    await store.set("s", SessionData(session_id="s"))
    await run_sync(cluster.stop_copying, primary)
    for n in (1, 2):
        assert await store.increment_counter("s", "n") == n
        found = await store.get("s")
        assert found is not None
        assert found.metadata == {"n": n}
        glanced = await store.checkout("s", None, None)
        assert isinstance(glanced, Checkout)
        assert store.read(glanced.record) == found
    assert command(replica, "INFO", "replication")["master_link_status"] == "down"
    await store.aclose()


# -- a cluster of one ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lone_node() -> Iterator[RedisServer]:
    """A cluster of one node, which has met no other and so does not know its own address."""
    with RedisServer("--cluster-enabled", "yes", port=free_port()) as server:
        command(server, "CLUSTER", "ADDSLOTS", *range(SLOTS))
        yield server


async def test_a_cluster_of_one_node(lone_node: RedisServer) -> None:
    """Its sessions are listed though it gives no address; what is no record at a key is that call's error."""
    store = RedisSessionStore(f"redis+cluster://127.0.0.1:{lone_node.port}")
    await _until_works(lambda: store.set("s", SessionData(session_id="s")))
    assert await store.list_active() == ["s"]
    command(lone_node, "LPUSH", _key("odd"), "x")
    with pytest.raises(SessionStoreError):
        await store.get("odd")
    assert await store.exists("s")
    await store.aclose()


async def test_a_cluster_that_is_away_is_asked_again(lone_node: RedisServer) -> None:
    """Each call meanwhile fails at once; when it is back, the same store goes on."""
    store = RedisSessionStore(f"redis+cluster://127.0.0.1:{lone_node.port}")
    await _until_works(lambda: store.set("s", SessionData(session_id="s")))
    await store.list_active()
    lone_node.kill()
    for _ in range(3):
        with pytest.raises(SessionStoreError):
            await store.get("s")
    lone_node.start()
    await _until_works(lambda: store.set("s", SessionData(session_id="s")))
    await store.aclose()


async def test_a_release_that_met_a_dead_primary_is_made_at_its_successor(cluster: RedisCluster) -> None:
    """The replica that takes over has the locks too: the next requests do not wait for the leases' end."""
    victim, other, _ = cluster.primaries()
    names = [*islice((f"{n}" for n in count() if cluster.primary_of(_key(f"{n}")) is victim), 5)]
    replica = cluster.replica_of(_key(names[0]))
    store, elsewhere = RedisSessionStore(cluster.url_at(other)), RedisSessionStore(cluster.url_at(replica))
    for name in names:
        await store.set(name, SessionData(session_id=name))
    held = [await _taken(store, name) for name in names]
    await until(lambda: len(command(replica, "KEYS", "*:lock")) == len(names), "the locks are copied")
    await run_sync(cluster.kill, victim)
    for taken in held:
        await store.release(taken)
    await until(lambda: command(replica, "ROLE")[0] == "master", "the replica takes over")
    await _until_works(lambda: elsewhere.set("other", SessionData(session_id="other")))
    began = time.monotonic()
    for name in names:
        await elsewhere.release(await _taken(elsewhere, name))
    assert time.monotonic() - began < 1  # of ten that are a lease
    await asyncio.gather(store.aclose(), elsewhere.aclose())


async def test_all_processes_are_told_that_a_session_has_ended(
    cluster: RedisCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever the session lives, and whichever node a process listens at."""
    await all_processes_are_told(cluster.url, monkeypatch)
