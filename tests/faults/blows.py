"""What may befall a site of several workers over one Redis. Each blow is healed when it returns."""

from __future__ import annotations

import contextlib
import random
import sqlite3
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Generic, TypeAlias, TypeVar

import anyio
from redis.exceptions import RedisError

from asgi_sessions.stores.redis.commands.scripts import COMMIT, COMMIT_UNLOCKED

from .chaos import Fault, Match, anything, calls, cut, delay, half, reset, swallow, trickle, unasked
from .processes import FileSite, Site, Worker, Workers

S = TypeVar("S", bound=Workers)
Blow: TypeAlias = Callable[[S, random.Random], Awaitable[None]]

LONG = 1.5  # leases that a pause takes which is to outlast them


async def nothing(site: Workers, dice: random.Random) -> None:
    """What there is to compare with."""


# -- workers -------------------------------------------------------------------------------------------------


async def kill_a_worker(site: Workers, dice: random.Random) -> None:
    """SIGKILL, and a new process in its place."""
    victim = dice.choice(site.workers)
    victim.kill()
    victim.start()


async def kill_one_that_serves(site: Workers, dice: random.Random) -> None:
    """SIGKILL of a worker that serves, as soon as one does; a new process in its place."""
    serving: list[Worker] = []
    while not serving:
        serving = [worker for worker in site.workers if await anyio.to_thread.run_sync(worker.serves)]
    victim = dice.choice(serving)
    victim.kill()
    victim.start()


async def freeze_a_worker(site: Workers, dice: random.Random) -> None:
    """SIGSTOP for longer than its leases while the others go on, then SIGCONT."""
    victim = dice.choice(site.workers)
    victim.freeze()
    await anyio.sleep(LONG * site.lease)
    victim.thaw()


async def replace_a_worker(site: Workers, dice: random.Random) -> None:
    """SIGTERM, as a deployment does it: requests that run are finished, and a new process takes over."""
    victim = dice.choice(site.workers)
    await anyio.to_thread.run_sync(victim.stop)
    victim.start()
    await site.up()


# -- the way to Redis ----------------------------------------------------------------------------------------


async def kill_connections(site: Site, dice: random.Random) -> None:
    """Redis closes its connections: those of the calls, or those that wake the waiting."""
    site.redis.client_kill_filter(_type=dice.choice(["normal", "pubsub"]), skipme=True)


def losing(fault: Fault, match: Match = anything, *, answer: bool = False) -> Blow[Site]:
    """One command that matches, or the answer to it, meets the fault."""

    async def lose(site: Site, dice: random.Random) -> None:
        plan = site.proxy.inject(fault, match, on="answer" if answer else "request")
        await anyio.to_thread.run_sync(plan.hit.wait, 5)

    return lose


def suffering(fault: Fault, leases: float) -> Blow[Site]:
    """For so many leases everything meets the fault, in both directions."""

    async def suffer(site: Site, dice: random.Random) -> None:
        with site.proxy.injecting(fault):
            await anyio.sleep(leases * site.lease)

    return suffer


async def swallow_everything(site: Site, dice: random.Random) -> None:
    """A black hole: connections are accepted and stay open, and nothing comes through; then they break."""
    await suffering(swallow, LONG)(site, dice)
    site.proxy.cut_all()


async def deafen_waiters(site: Site, dice: random.Random) -> None:
    """The connections that wake the waiting die without a word; later all break."""
    with site.proxy.injecting(swallow, unasked, "answer"):
        await anyio.sleep(LONG * site.lease)
    site.proxy.cut_all()


# -- Redis ---------------------------------------------------------------------------------------------------


def pause_redis(writes_only: bool) -> Blow[Site]:
    """CLIENT PAUSE for longer than a lease."""

    async def pause(site: Site, dice: random.Random) -> None:
        site.redis.client_pause(round(LONG * site.lease * 1000), all=not writes_only)
        await anyio.sleep(LONG * site.lease)

    return pause


async def freeze_redis(site: Site, dice: random.Random) -> None:
    """SIGSTOP for longer than its clients wait, then SIGCONT."""
    site.server.pause()
    await anyio.sleep(LONG * site.lease)
    site.server.resume()


async def restart_redis(site: Site, dice: random.Random) -> None:
    """SIGKILL, and a start with what it had written down (append-only file)."""
    await anyio.to_thread.run_sync(site.server.restart)
    with contextlib.suppress(RedisError):  # the pool's connection, which broke
        site.redis.ping()


async def forget_scripts(site: Site, dice: random.Random) -> None:
    """SCRIPT FLUSH: every digest is unknown."""
    site.redis.script_flush()


async def take_locks_away(site: Site, dice: random.Random) -> None:
    """All locks and queues are deleted, as an eviction or an operator may do it."""
    keys = [str(key) for key in site.redis.keys("session:*") if str(key).endswith((":lock", ":wait"))]
    if keys:
        site.redis.delete(*keys)


async def fill_memory(site: Site, dice: random.Random) -> None:
    """For a lease Redis has no memory for anything new (OOM)."""
    site.redis.config_set("maxmemory", 1)
    await anyio.sleep(site.lease)
    site.redis.config_set("maxmemory", 0)


async def make_read_only(site: Site, dice: random.Random) -> None:
    """For a lease Redis is a replica of nobody that is there (READONLY)."""
    site.redis.replicaof("127.0.0.1", 1)
    await anyio.sleep(site.lease)
    site.redis.replicaof("NO", "ONE")


# -- the file ------------------------------------------------------------------------------------------------


async def lock_the_file(site: FileSite, dice: random.Random) -> None:
    """Another program keeps the database locked for a second."""
    with contextlib.closing(sqlite3.connect(site.path, timeout=5, isolation_level=None)) as tool:
        tool.execute("BEGIN IMMEDIATE")
        await anyio.sleep(1)
        tool.execute("COMMIT")


@dataclass(frozen=True)
class Campaign(Generic[S]):
    """A blow, how often it is struck, and how many seconds pass before each."""

    name: str
    blow: Blow[S]
    times: int
    pause: float


COMMITS = calls(COMMIT, COMMIT_UNLOCKED)
CAMPAIGNS: list[Campaign[Site]] = [
    Campaign("none", nothing, 1, 0.5),
    Campaign("worker killed", kill_a_worker, 2, 0.7),
    Campaign("worker frozen past its leases", freeze_a_worker, 1, 0.3),
    Campaign("worker replaced (SIGTERM)", replace_a_worker, 1, 0.3),
    Campaign("connections closed by Redis", kill_connections, 15, 0.1),
    Campaign("connection reset before a commit", losing(reset, COMMITS), 15, 0.05),
    Campaign("connection reset after a commit", losing(reset, COMMITS, answer=True), 15, 0.05),
    Campaign("connection cut after any command", losing(cut, answer=True), 15, 0.05),
    Campaign("half an answer", losing(half, answer=True), 15, 0.05),
    Campaign("half a command", losing(half), 15, 0.05),
    Campaign("slow and uneven network", suffering(delay(0.005, 0.03), 1.5), 1, 0.1),
    Campaign("trickling network", suffering(trickle(100, 0.001), 1.5), 1, 0.1),
    Campaign("black hole", swallow_everything, 1, 0.3),
    Campaign("wake-ups swallowed", deafen_waiters, 1, 0.1),
    Campaign("Redis paused (ALL)", pause_redis(writes_only=False), 1, 0.3),
    Campaign("Redis paused (WRITE)", pause_redis(writes_only=True), 1, 0.3),
    Campaign("Redis frozen", freeze_redis, 1, 0.3),
    Campaign("Redis killed, restarted with its data", restart_redis, 2, 0.4),
    Campaign("scripts forgotten", forget_scripts, 20, 0.05),
    Campaign("locks deleted", take_locks_away, 20, 0.05),
    Campaign("Redis out of memory", fill_memory, 1, 0.3),
    Campaign("Redis read-only", make_read_only, 1, 0.3),
]

TEN_MINUTES: Campaign[FileSite] = Campaign(
    "on a file: killed for ten minutes", kill_one_that_serves, 1200, 0.5
)
FILE_CAMPAIGNS: list[Campaign[FileSite]] = [
    Campaign("on a file: none", nothing, 1, 0.5),
    Campaign("on a file: worker killed", kill_a_worker, 3, 0.5),
    Campaign("on a file: worker frozen past its leases", freeze_a_worker, 2, 0.3),
    Campaign("on a file: worker replaced (SIGTERM)", replace_a_worker, 1, 0.3),
    Campaign("on a file: locked by another program", lock_the_file, 1, 0.3),
]
