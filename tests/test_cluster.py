"""The Redis store on a real cluster of three primaries and their replicas: nodes die, slots move."""

from __future__ import annotations

import asyncio
import time
import warnings
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, contextmanager

import anyio
import pytest
import redis.asyncio
from anyio.to_thread import run_sync
from deployments import NODE_TIMEOUT, RedisCluster, command
from redis.crc import key_slot
from redis_server import RedisServer
from visitors import Counted, CountingSite, counting, crowd, failover_flaws, note_copies, served, until

from asgi_sessions import RedisSessionStore, SessionData, SessionFilter, SessionStoreError
from asgi_sessions.stores.checkout import Checkout, Outcome
from asgi_sessions.stores.local import LockPolicy
from asgi_sessions.testing import StoreContract

pytestmark = pytest.mark.anyio

_LOCK = LockPolicy()


@pytest.fixture(scope="module")
def whole_module() -> Iterator[RedisCluster]:
    with RedisCluster() as cluster:
        yield cluster


@pytest.fixture
def cluster(whole_module: RedisCluster) -> RedisCluster:
    """Whole and empty, whatever the test before did to it."""
    whole_module.settle()
    whole_module.empty()
    return whole_module


@pytest.fixture
async def store(cluster: RedisCluster) -> AsyncIterator[RedisSessionStore]:
    store = RedisSessionStore(cluster.url)
    yield store
    await store.aclose()


def _key(session_id: str) -> str:
    return f"session:{{{session_id}}}"


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


class TestContract(StoreContract):
    """The contract, where the records of one test live on three nodes."""

    @pytest.fixture
    def store(self, store: RedisSessionStore) -> RedisSessionStore:
        """The store of this module."""
        return store


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
    holder = await store.checkout("s", _LOCK, None)
    assert isinstance(holder, Checkout)
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
    assert cluster.keys() == [_key("s")]


# -- replicas ---------------------------------------------------------------------------------------------


def _client(node: RedisServer) -> redis.asyncio.RedisCluster:
    """A client that may read from replicas and is entered at this node."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # its other name is newer than redis-py 6.4
        return redis.asyncio.RedisCluster(host="127.0.0.1", port=node.port, read_from_replicas=True)


async def test_who_may_read_from_replicas_reads_what_is_stored(cluster: RedisCluster) -> None:
    """Also where the entrance is a replica that has not heard of the last change: no path of ours is stale."""
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
