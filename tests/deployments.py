"""Redis as it is deployed: a cluster with replicas, a primary that Sentinels watch. Every process is real.

A deployment is a context manager: whatever happens in the block, its processes are gone afterwards.
"""

from __future__ import annotations

import functools
import math
import os
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Generic, TypeVar

import pytest
from faults.chaos import ChaosProxy
from redis import Redis
from redis.backoff import NoBackoff
from redis.crc import key_slot
from redis.exceptions import RedisError
from redis.retry import Retry
from redis_server import RedisServer, bundled, find_binary, free_port
from typing_extensions import Self

DOWN_AFTER = 0.5  # seconds; Sentinels wait so long for an answer of the primary
NODE_TIMEOUT = 1.0  # seconds; a node that is silent for so long may be replaced, never earlier
PRIMARIES = 3
SLOTS = 16384
_ABORTED = 4.0  # seconds; a switch that is not made by then has been given up
_AT_ONCE = "--repl-diskless-sync-delay", "0"  # a replica that comes is given a copy

_ONCE = Retry(NoBackoff(), 0)  # redis-py tries for seconds where a server is down
_PATIENCE = 30.0  # seconds for what a deployment does by itself: meet, copy, elect


@functools.cache
def binaries() -> dict[str, str]:
    """The servers of this machine by version: the one that all tests use, and those beside it."""
    folders = os.environ.get("PATH", "").split(os.pathsep)
    names = ("redis-server", "valkey-server")
    found = [shutil.which(name, path=folder) for folder in folders for name in names]
    return {_version(each): each for each in (*found, *bundled(), find_binary()) if each}


def _version(binary: str) -> str:
    """Such as `Redis 6.2.14`."""
    said = subprocess.run([binary, "--version"], capture_output=True, text=True, check=True).stdout.split()
    return f"{said[0]} {next(word for word in said if word.startswith('v='))[2:]}"


@contextmanager
def chosen(binary: str) -> Iterator[None]:
    """Servers that are started in this block are of this binary."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REDIS_SERVER", binary)
        yield


def command(node: RedisServer, *words: object) -> Any:
    """What this node answers, as text; an error where it is down."""
    with Redis(port=node.port, decode_responses=True, socket_timeout=5, retry=_ONCE) as client:
        return client.execute_command(*[str(word) for word in words])


def scripts(node: RedisServer) -> int:
    """How many scripts this node was asked to run."""
    stats = command(node, "INFO", "commandstats")
    return sum(stats.get(f"cmdstat_{name}", {"calls": 0})["calls"] for name in ("eval", "evalsha"))


def is_stopped(server: RedisServer) -> bool:
    """Whether a server that was frozen has come to a stand; a process goes on for a moment."""
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.settimeout(0.05)
        connection.sendall(b"PING\r\n")
        try:
            return not connection.recv(1)
        except TimeoutError:
            return True


def until(condition: Callable[[], bool], what: str) -> None:
    """Wait for servers to agree; a node that does not answer has not agreed yet."""
    deadline = time.monotonic() + _PATIENCE
    while not _holds(condition):
        if time.monotonic() > deadline:
            raise RuntimeError(f"the servers took longer than {_PATIENCE:g} seconds: {what}")
        time.sleep(0.05)  # to ask costs as much as they do


def _holds(condition: Callable[[], bool]) -> bool:
    try:
        return condition()
    except RedisError:
        return False


def _start(stack: ExitStack, servers: Iterable[RedisServer]) -> list[RedisServer]:
    """All at once; those that have started end with the stack even if another does not start."""
    with ThreadPoolExecutor() as threads:
        return list(threads.map(stack.enter_context, servers))


class Replicated:
    """What a cluster and a set under Sentinel have in common: primaries that die, replicas that follow.

    `nodes` hold the data. Those in `down` were killed or frozen by the test.
    """

    nodes: list[RedisServer]
    _stack: ExitStack

    def __init__(self) -> None:
        self.down: dict[RedisServer, Callable[[], None]] = {}
        self.is_whole = False

    @property
    def up(self) -> list[RedisServer]:
        return [node for node in self.nodes if node not in self.down]

    def kill(self, node: RedisServer) -> None:
        """SIGKILL: what it has not sent is lost."""
        self.is_whole = False
        self.down[node] = node.start
        node.kill()

    def freeze(self, node: RedisServer) -> None:
        """SIGSTOP: its connections stay open, and new ones are accepted by the system."""
        self.is_whole = False
        self.down[node] = node.resume
        node.pause()

    def restart(self, node: RedisServer) -> None:
        """SIGKILL, and a start with what it had written down; who watches it may take it for dead a while."""
        self.is_whole = False
        node.restart()

    def settle(self) -> None:
        """Undo what a test did to the nodes, and wait until all run, follow whom they should, and know it."""
        if not self.is_whole:
            self._raise_the_dead()
            self._await_agreement()
            self.is_whole = True

    def _await_agreement(self) -> None:
        raise NotImplementedError

    def _raise_the_dead(self) -> None:
        """Those who were killed or frozen run again, and everybody may copy."""
        while self.down:
            self.down.popitem()[1]()
        for node in self.nodes:
            command(node, "CONFIG", "SET", "masterauth", "")

    def __enter__(self) -> Self:
        raise NotImplementedError

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def empty(self) -> None:
        """No keys in any node."""
        raise NotImplementedError

    def primary_of(self, key: str) -> RedisServer:
        """Where the key lives now, as those say who are up."""
        raise NotImplementedError

    def replicas_of(self, primary: RedisServer) -> list[RedisServer]:
        """Those who copy what it writes."""
        others = [node for node in self.up if node is not primary]
        return [node for node in others if _primary_port(node) == primary.port]

    def copy(self, primary: RedisServer) -> None:
        """Wait until its replicas, one at least, follow it and have what it has written by now."""
        written = int(command(primary, "INFO", "replication")["master_repl_offset"])

        def have_all() -> bool:
            copies = self.replicas_of(primary)
            return bool(copies) and all(_follows(node) and _copied(node) >= written for node in copies)

        until(have_all, "all is copied")

    def stop_copying(self, primary: RedisServer) -> None:
        """Its replicas have all that was written by now, and get nothing that is written later."""
        self.is_whole = False
        self.copy(primary)
        replicas = self.replicas_of(primary)
        for replica in replicas:
            command(replica, "CONFIG", "SET", "masterauth", "not that of the primary, which has none")
        command(primary, "CLIENT", "KILL", "TYPE", "replica")
        until(lambda: not any(_follows(replica) for replica in replicas), "the replicas are cut off")


def _primary_port(node: RedisServer) -> int | None:
    """Whom it copies; None for a primary."""
    port: int | None = command(node, "INFO", "replication").get("master_port")
    return port


def _copied(replica: RedisServer) -> int:
    return int(command(replica, "INFO", "replication")["slave_repl_offset"])


def _follows(replica: RedisServer) -> bool:
    """Whether it has a primary and copies what that writes."""
    return bool(command(replica, "INFO", "replication").get("master_link_status") == "up")


def _follow(node: RedisServer, primary: RedisServer) -> bool:
    """Have it copy this primary, if it does not."""
    if _primary_port(node) == primary.port:
        return True
    return bool(command(node, "REPLICAOF", "127.0.0.1", primary.port))


class Address(Replicated):
    """A primary and a replica behind one address that leads to the primary, such as a virtual IP.

    Whoever moves the address to another node leaves the connections alone that were made before. `options`
    are those of the nodes, here and below.
    """

    def __init__(self, *options: str) -> None:
        super().__init__()
        self.nodes = [RedisServer(*options, *_AT_ONCE, port=free_port()) for _ in range(2)]
        self.proxy = ChaosProxy(self.nodes[0].port)
        self._stack = ExitStack()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.proxy.port}?socket_timeout=1"

    def __enter__(self) -> Address:
        with ExitStack() as stack:
            _start(stack, self.nodes)
            stack.enter_context(self.proxy)
            self.settle()
            self._stack = stack.pop_all()
        return self

    def primary(self) -> RedisServer:
        """The node that the address leads to."""
        return next(node for node in self.nodes if node.port == self.proxy.target)

    def primary_of(self, key: str) -> RedisServer:
        return self.primary()

    def switch(self, after: float = 0.0) -> None:
        """As planned: the nodes change places without a loss, and `after` seconds later the address moves."""
        old = self.primary()
        (new,) = (node for node in self.nodes if node is not old)
        command(old, "FAILOVER", "TO", "127.0.0.1", new.port)
        until(lambda: command(old, "ROLE")[0] == "slave", "the nodes change places")
        time.sleep(after)
        self.proxy.target = new.port

    def promote(self) -> None:
        """The primary is dead or as good as dead: the replica takes its place, and the address moves."""
        old = self.primary()
        (new,) = (node for node in self.nodes if node is not old)
        command(new, "REPLICAOF", "NO", "ONE")
        self.proxy.target = new.port

    def _await_agreement(self) -> None:
        primary = self.primary()
        (replica,) = (node for node in self.nodes if node is not primary)
        until(lambda: _follow(replica, primary), "the replica follows")
        until(lambda: _follows(replica), "it has copied")

    def empty(self) -> None:
        """No keys in any node."""
        command(self.primary(), "FLUSHALL")

    def all_keys(self) -> list[str]:
        return sorted(command(self.primary(), "KEYS", "*"))


class RedisCluster(Replicated):
    """Three primaries with a third of the slots each, and a replica each that takes over by itself."""

    def __init__(self, *options: str) -> None:
        super().__init__()
        options = (
            *options,
            *("--cluster-enabled", "yes", "--cluster-node-timeout", str(round(NODE_TIMEOUT * 1000))),
            *("--cluster-require-full-coverage", "no", "--cluster-replica-validity-factor", "0"),
            *("--cluster-allow-replica-migration", "no", *_AT_ONCE),
        )
        ports = set[int]()
        while len(ports) < 2 * PRIMARIES:
            ports.add(free_port())
        self.nodes = [RedisServer(*options, port=port) for port in ports]
        self._stack = ExitStack()

    @property
    def url(self) -> str:
        """Entered at the first node, whatever it is at the time."""
        return self.url_at(self.nodes[0])

    def url_at(self, node: RedisServer) -> str:
        """Entered at this node."""
        return f"redis+cluster://127.0.0.1:{node.port}?socket_timeout=1"

    def __enter__(self) -> RedisCluster:
        with ExitStack() as stack:
            _start(stack, self.nodes)
            self._assemble()
            self._stack = stack.pop_all()
        return self

    def _assemble(self) -> None:
        primaries, replicas = self.nodes[:PRIMARIES], self.nodes[PRIMARIES:]
        bounds = [SLOTS * n // PRIMARIES for n in range(PRIMARIES + 1)]
        for number, node in enumerate(self.nodes):
            command(node, "CLUSTER", "SET-CONFIG-EPOCH", number + 1)
        for node, first, end in zip(primaries, bounds, bounds[1:], strict=False):
            command(node, "CLUSTER", "ADDSLOTS", *range(first, end))
        for node in self.nodes[1:]:
            command(self.nodes[0], "CLUSTER", "MEET", "127.0.0.1", node.port)
        until(lambda: all(self._knows_all(node) for node in self.nodes), "the nodes meet")
        for replica, primary in zip(replicas, primaries, strict=True):
            command(replica, "CLUSTER", "REPLICATE", self.id_of(primary))
        self.settle()

    def _knows_all(self, node: RedisServer) -> bool:
        lines = command(node, "CLUSTER", "NODES").splitlines()
        return len(lines) == len(self.nodes) and not any("handshake" in line for line in lines)

    def _await_agreement(self) -> None:
        until(self._is_settled, "the cluster is whole")

    def _is_settled(self) -> bool:
        views = [command(node, "CLUSTER", "NODES").splitlines() for node in self.nodes]
        seen = {tuple(sorted(_role(line) for line in view)) for view in views}
        if len(seen) != 1:
            return False
        roles = seen.pop()
        return (
            len({primary for _, kind, primary, _ in roles if kind == "slave"}) == PRIMARIES
            and [kind for _, kind, _, _ in roles].count("master") == PRIMARIES
            and all("cluster_state:ok" in command(node, "CLUSTER", "INFO") for node in self.nodes)
            and all(_follows(node) for node in self.nodes if node not in self.primaries())
        )

    def id_of(self, node: RedisServer) -> str:
        return str(command(node, "CLUSTER", "MYID"))

    def primary_of(self, key: str) -> RedisServer:
        return self._nodes_of(key)[0]

    def replica_of(self, key: str) -> RedisServer:
        return self._nodes_of(key)[1]

    def _nodes_of(self, key: str) -> list[RedisServer]:
        slot = key_slot(key.encode())
        for first, last, *ports in self._slots():
            if first <= slot <= last:
                return [next(node for node in self.nodes if node.port == port) for port in ports]
        raise AssertionError(f"no node has slot {slot}")

    def _slots(self) -> list[tuple[int, ...]]:
        """First and last slot, port of the primary, ports of its replicas: once all who are up say the same.

        The news of a new primary takes its time from node to node.
        """
        views: set[tuple[tuple[int, ...], ...]] = set()

        def agreed() -> bool:
            nonlocal views
            views = {_view(node) for node in self.up}
            return len(views) == 1

        until(agreed, "the nodes agree")
        return list(views.pop())

    def another_primary(self, key: str) -> RedisServer:
        """One where the key does not live."""
        here = self.primary_of(key)
        return next(node for node in self.primaries() if node is not here)

    def primaries(self) -> list[RedisServer]:
        ports = {primary for _, _, primary, *_ in self._slots()}
        return [node for node in self.nodes if node.port in ports]

    def switch(self, primary: RedisServer) -> None:
        """As planned: its replica takes its place, and nothing is lost."""
        (replica,) = self.replicas_of(primary)
        command(replica, "CLUSTER", "FAILOVER")
        until(lambda: replica in self.primaries(), "the nodes change places")

    def empty(self) -> None:
        """No keys in any node."""
        for node in self.primaries():
            command(node, "FLUSHALL")

    def all_keys(self) -> list[str]:
        """All keys of all slots."""
        return sorted(key for node in self.primaries() for key in command(node, "KEYS", "*"))


def _view(node: RedisServer) -> tuple[tuple[int, ...], ...]:
    """Who has which slots, as this node knows it."""
    return tuple(
        sorted(
            (int(first), int(last), int(primary[1]), *sorted(int(replica[1]) for replica in replicas))
            for first, last, primary, *replicas in command(node, "CLUSTER", "SLOTS")
        )
    )


def _role(line: str) -> tuple[str, str, str, str]:
    """Who a line of CLUSTER NODES speaks of: id, what it is, whom it follows, its slots."""
    name, _, flags, primary, _, _, _, _, *slots = line.split()
    kind = ",".join(sorted(set(flags.split(",")) - {"myself"}))
    return name, kind, primary, " ".join(slots)


class SentinelSet(Replicated):
    """A primary with two replicas, watched by three Sentinels under the name `main`."""

    name = "main"

    def __init__(self, *options: str) -> None:
        super().__init__()
        self.nodes = [RedisServer(*options, *_AT_ONCE, port=free_port()) for _ in range(3)]
        self.sentinels = [Sentinel(self.nodes[0]) for _ in range(3)]
        for sentinel in self.sentinels:
            sentinel.colleagues = [each for each in self.sentinels if each is not sentinel]
            sentinel.replicas = self.nodes[1:]
        self._stack = ExitStack()

    @property
    def url(self) -> str:
        addresses = ",".join(f"127.0.0.1:{sentinel.port}" for sentinel in self.sentinels)
        return f"redis+sentinel://{addresses}/{self.name}?socket_timeout=1"

    def __enter__(self) -> SentinelSet:
        with ExitStack() as stack:
            _start(stack, self.nodes)
            for node in self.nodes[1:]:
                _follow(node, self.nodes[0])
            until(lambda: all(_follows(node) for node in self.nodes[1:]), "the replicas have copied")
            _start(stack, self.sentinels)
            self.settle()
            self._stack = stack.pop_all()
        return self

    def primary_of(self, key: str) -> RedisServer:
        return self.primary()

    def primary(self) -> RedisServer:
        """The node that the Sentinels name, once they all name the same."""
        ports: set[int] = set()

        def agreed() -> bool:
            nonlocal ports
            ports = {sentinel.primary_port() for sentinel in self.sentinels}
            return len(ports) == 1

        until(agreed, "the Sentinels agree")
        return next(node for node in self.nodes if node.port in ports)

    def fail_over(self) -> None:
        """Have the Sentinels put another node in the primary's place, though nothing is wrong with it."""
        self.is_whole = False
        command(self.sentinels[0], "SENTINEL", "FAILOVER", self.name)

    def switch(self) -> None:
        """The same, until all Sentinels name that node; again where no replica is good enough for them."""
        old, begin = self.primary(), -math.inf

        def switched() -> bool:
            nonlocal begin
            if self.primary() is old and time.monotonic() - begin > _ABORTED:
                begin = time.monotonic()
                self.fail_over()
            return self.primary() is not old

        until(switched, "there is a new primary")

    def _await_agreement(self) -> None:
        """Who comes back is told whom to follow, which Sentinels do after ten seconds."""
        primary = self.primary()
        for node in self.nodes:
            if node is not primary:
                until(lambda node=node: _follow(node, primary), "a node is back")  # type: ignore[misc]
        until(lambda: all(_follows(node) for node in self.nodes if node is not primary), "all have copied")
        until(lambda: all(sentinel.is_content() for sentinel in self.sentinels), "Sentinels are content")

    def empty(self) -> None:
        """No keys in any node."""
        command(self.primary(), "FLUSHALL")

    def all_keys(self) -> list[str]:
        return sorted(command(self.primary(), "KEYS", "*"))


class Sentinel(RedisServer):
    """Watches a primary and, when two agree that it is gone, puts a replica in its place."""

    def __init__(self, primary: RedisServer) -> None:
        super().__init__(port=free_port())
        self.id = secrets.token_hex(20)
        self.colleagues: list[Sentinel] = []
        self.replicas: list[RedisServer] = []
        self._primary = primary

    def start(self) -> None:
        """Start from a file of its own, where a Sentinel writes down what becomes of the set."""
        conf = Path(self._directory.name, "sentinel.conf")
        if not conf.exists():
            conf.write_text("\n".join(self._first_settings()) + "\n")
        self._process = subprocess.Popen(
            [find_binary(), str(conf), "--sentinel"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        until(self._serves, "the Sentinel starts")

    def _first_settings(self) -> list[str]:
        """What it is told now it need not learn, which takes seconds."""
        name = SentinelSet.name
        return [
            f"port {self.port}",
            "bind 127.0.0.1",
            f"dir {self._directory.name}",
            f"sentinel myid {self.id}",
            f"sentinel monitor {name} 127.0.0.1 {self._primary.port} 2",
            f"sentinel down-after-milliseconds {name} {round(DOWN_AFTER * 1000)}",
            f"sentinel failover-timeout {name} 1500",
            f"sentinel parallel-syncs {name} 2",
            *(f"sentinel known-replica {name} 127.0.0.1 {each.port}" for each in self.replicas),
            *(f"sentinel known-sentinel {name} 127.0.0.1 {each.port} {each.id}" for each in self.colleagues),
        ]

    def primary_port(self) -> int:
        return int(command(self, "SENTINEL", "GET-MASTER-ADDR-BY-NAME", SentinelSet.name)[1])

    def is_content(self) -> bool:
        """Whether it sees the primary and its replicas, all of them well, and knows its colleagues."""
        primary = command(self, "SENTINEL", "MASTER", SentinelSet.name)
        replicas = command(self, "SENTINEL", "REPLICAS", SentinelSet.name)
        return (
            [primary["flags"], *(each["flags"] for each in replicas)]
            == ["master"] + ["slave"] * len(replicas)
            and len(replicas) == len(self.replicas)
            and int(primary["num-other-sentinels"]) == len(self.colleagues)
        )

    def _serves(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, "the Sentinel did not start"
        return self._answers()


D = TypeVar("D", bound=Replicated)


class Bed(Generic[D]):
    """A deployment that the tests of a module share. One that does not come to rest is replaced."""

    def __init__(self, make: Callable[[], D]) -> None:
        self._make = make
        self._stack = ExitStack()
        self._deployment: D | None = None

    def __enter__(self) -> Bed[D]:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def whole(self) -> D:
        """Whole and empty, whatever the test before did to it."""
        if self._deployment is not None:
            with suppress(RuntimeError):  # what a test has done to its nodes is not always to be undone
                self._deployment.settle()
                self._deployment.empty()
                return self._deployment
            self._stack.close()
        deployment = self._make()
        self._stack.enter_context(deployment)
        deployment.empty()
        self._deployment = deployment
        return deployment
