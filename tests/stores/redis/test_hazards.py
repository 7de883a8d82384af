"""What happens to Redis servers in operation: they pause, are full, refuse, forget, have too much to do."""

from __future__ import annotations

import asyncio
import gc
import logging
from collections import Counter
from collections.abc import AsyncIterator

import anyio
import pytest
from anyio.to_thread import run_sync
from asgi import KEY, Answer, empty_body, http_scope, page
from deployments import binaries, chosen, command, scripts
from faults.checkers import count_flaws
from redis.asyncio import Redis
from redis.exceptions import BusyLoadingError, ResponseError
from redis_server import RedisServer
from visitors import Counted, CountingSite, counting, crowd, served, until

from asgi_sessions import (
    RedisSessionStore,
    Session,
    SessionData,
    SessionFilter,
    SessionMiddleware,
    SessionStoreError,
)
from asgi_sessions.asgi import ASGIApp, Message
from asgi_sessions.record.codec import encode_checked
from asgi_sessions.stores.checkout import Checkout, LockPolicy, Outcome
from asgi_sessions.stores.redis.connection.call import LOST

pytestmark = pytest.mark.anyio

_KEY = "session:{s}"
_LOCK = LockPolicy()


@pytest.fixture
async def store(own_redis: RedisServer) -> AsyncIterator[RedisSessionStore]:
    """On a server of its own, with the session `s`."""
    store = RedisSessionStore(own_redis.url)
    await store.set("s", SessionData(session_id="s"))
    yield store
    await store.aclose()


def _record(session_id: str = "s", **values: int) -> bytes:
    return encode_checked(SessionData(session_id=session_id, metadata=values))


async def _taken(store: RedisSessionStore, session_id: str = "s", lock: LockPolicy = _LOCK) -> Checkout:
    taken = await store.checkout(session_id, lock, None)
    assert isinstance(taken, Checkout)
    return taken


async def _counts(store: RedisSessionStore, session_id: str = "s") -> object:
    data = await store.get(session_id)
    return None if data is None else data.metadata.get("n")


def _user(server: RedisServer, *rules: str) -> str:
    """The URL for a user with these permissions."""
    command(server, "ACL", "SETUSER", "app", "on", ">secret", *rules)
    return f"redis://app:secret@127.0.0.1:{server.port}/0"


async def _kept(site: CountingSite, *sessions: Counted) -> list[str]:
    """What is wrong with what the visitors of these sessions were told."""
    return [flaw for each in sessions for flaw in count_flaws(each.attempts, await site.final(each))]


# -- it forgets, hangs up, pauses -------------------------------------------------------------------------


async def test_nobody_notices_that_scripts_are_flushed(own_redis: RedisServer) -> None:
    """Again and again under load: each call that meets it is made again, with the script."""
    async with counting(own_redis.url) as site:
        sessions = [await site.begin() for _ in range(3)]
        async with crowd(site, sessions):
            for _ in range(30):
                command(own_redis, "SCRIPT", "FLUSH")
                await served(sessions, 1)
        assert [set(each.answers) for each in sessions] == [{200}] * 3
        assert await _kept(site, *sessions) == []


@pytest.mark.parametrize(
    ("kills", "stored"), [(1, 20), (2, 0)], ids=["once: all are stored", "twice: none is"]
)
async def test_calls_in_flight_whose_connection_is_killed(
    own_redis: RedisServer, store: RedisSessionStore, kills: int, stored: int
) -> None:
    """They are sent again, once, and fail after that: each is carried out or raises, none is both."""
    names = [f"s{n}" for n in range(20)]
    await store.set_batch({name: SessionData(session_id=name) for name in names})
    held = [await _taken(store, name) for name in names]
    command(own_redis, "CLIENT", "PAUSE", 60_000, "WRITE")
    commits = [
        asyncio.create_task(store.commit(each, _record(each.session_id, n=1), release=True)) for each in held
    ]
    killed: set[str] = set()
    for _ in range(kills):
        await until(lambda: bool(_stuck(own_redis) - killed), "the calls have arrived")
        for connection in _stuck(own_redis) - killed:
            command(own_redis, "CLIENT", "KILL", "ID", connection)
            killed.add(connection)
    if stored:
        await until(lambda: bool(_stuck(own_redis) - killed), "the calls have arrived again")
    else:
        await asyncio.wait(commits)
    command(own_redis, "CLIENT", "UNPAUSE")
    results = await asyncio.gather(*commits, return_exceptions=True)
    assert results.count(Outcome.STORED) == stored
    lost = [each for each in results if isinstance(each, SessionStoreError)]
    assert [str(each) for each in lost] == [f"{LOST}: the connection broke"] * (20 - stored)
    found = await store.get_batch(names)
    kept = [data.metadata for data in found.values() if data is not None]
    assert kept == [{"n": 1} if stored else {}] * 20
    for each in held:
        await store.release(each)
    await until(lambda: command(own_redis, "DBSIZE") == 21, "no lock is left")


def _stuck(server: RedisServer) -> set[str]:
    """The connections whose command waits for the end of a pause."""
    clients = [dict(pair.split("=", 1) for pair in line.split()) for line in _client_lines(server)]
    return {client["id"] for client in clients if "b" in client["flags"]}


def _client_lines(server: RedisServer) -> list[str]:
    return str(command(server, "CLIENT", "LIST")).splitlines()


@pytest.mark.parametrize(("what", "milliseconds"), [("WRITE", 800), ("ALL", 800)])
async def test_a_paused_server_costs_the_timeout_not_the_pause(
    own_redis: RedisServer, what: str, milliseconds: int
) -> None:
    """503 while it is paused; afterwards the session goes on, and no lock of the calls in between is left."""
    async with (
        counting(f"{own_redis.url}?socket_timeout=0.2", lock_timeout=60) as site,
        Redis(port=own_redis.port) as raw,
    ):
        counted = await site.begin()
        assert await site.visit(counted) == 200
        command(own_redis, "CLIENT", "PAUSE", milliseconds, what)
        over = asyncio.ensure_future(raw.set("end of the pause", "x"))
        assert await site.visit(counted) == 503
        assert not over.done()
        await over
        async with crowd(site, [counted]):
            await served([counted])
        assert await _kept(site, counted) == []
        await raw.delete("end of the pause")
        await until(lambda: command(own_redis, "KEYS", "*") == [counted.key], "no lock is left")


async def test_a_server_that_is_busy_with_the_script_of_others(own_redis: RedisServer) -> None:
    """Is a fault that names its reason; when the script is ended, the same site goes on at once."""
    command(own_redis, "CONFIG", "SET", "lua-time-limit", 20)
    async with counting(own_redis.url) as site, Redis(port=own_redis.port) as raw:
        counted = await site.begin()
        endless = asyncio.ensure_future(raw.eval("while true do end", 0))
        await until(lambda: _is_busy(own_redis), "the script runs")
        with pytest.raises(SessionStoreError) as caught:
            await site.store.get(counted.session_id)
        assert "BUSY" in str(caught.value.__cause__)
        assert await site.visit(counted) == 503
        assert not endless.done()
        command(own_redis, "SCRIPT", "KILL")
        with pytest.raises(ResponseError):
            await endless
        assert await site.visit(counted) == 200
        assert await _kept(site, counted) == []
        assert command(own_redis, "KEYS", "*") == [counted.key]


def _is_busy(server: RedisServer) -> bool:
    try:
        command(server, "PING")
    except ResponseError:
        return True
    return False


async def test_a_server_that_still_loads_its_data() -> None:
    """Is a fault until it has loaded them; then the same store goes on, and the sessions are there."""
    with RedisServer("--rdbcompression", "no", "--key-load-delay", "50000") as server:
        store = RedisSessionStore(server.url)
        await store.set("s", SessionData(session_id="s"))
        for n in range(20):
            command(server, "SET", f"ballast{n}", "x" * 1_000_000)
        command(server, "SAVE")
        server.kill()
        causes: list[BaseException | None] = []
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(run_sync, server.start)
            with anyio.fail_after(30):
                while True:
                    try:
                        assert await store.get("s") is not None
                        break
                    except SessionStoreError as error:
                        causes.append(error.__cause__)
                        await asyncio.sleep(0.01)
        assert any(isinstance(cause, BusyLoadingError) for cause in causes)
        await store.aclose()


# -- it refuses -------------------------------------------------------------------------------------------


async def test_a_full_server(own_redis: RedisServer, store: RedisSessionStore) -> None:
    """Changes are refused with the reason, the old record stays; reads, releases and deletions go on."""
    async with counting(own_redis.url) as site:
        counted = await site.begin()
        assert await site.visit(counted) == 200
        holder = await _taken(store)
        await store.set("old", SessionData(session_id="old"))
        command(own_redis, "CONFIG", "SET", "maxmemory", 1)
        assert await site.visit(counted) == 503
        with pytest.raises(SessionStoreError) as caught:
            await store.commit(holder, _record(n=1), release=True)
        assert "maxmemory" in str(caught.value.__cause__)
        await store.release(holder)
        assert await _counts(store) is None
        assert isinstance(await store.checkout("s", None, None), Checkout)
        assert command(own_redis, "EXISTS", f"{_KEY}:lock") == 0
        assert await store.delete("old")
        command(own_redis, "CONFIG", "SET", "maxmemory", 0)
        assert await site.visit(counted) == 200
        assert await site.final(counted) == 2
        assert await store.increment_counter("s", "n") == 1


async def test_a_lock_is_handed_over_on_a_full_server(
    own_redis: RedisServer, store: RedisSessionStore
) -> None:
    """Who waited when memory ran out gets its turn: a hand-over frees more than it takes."""
    other = RedisSessionStore(own_redis.url)
    holder = await _taken(store)
    waiter = asyncio.create_task(_taken(other))
    await until(lambda: command(own_redis, "EXISTS", f"{_KEY}:wait") == 1, "somebody waits")
    command(own_redis, "CONFIG", "SET", "maxmemory", 1)
    await store.release(holder)
    await other.release(await waiter)
    await until(lambda: command(own_redis, "KEYS", "*") == [_KEY], "no lock is left")
    await other.aclose()


async def test_locks_and_queues_that_are_evicted(own_redis: RedisServer) -> None:
    """As `volatile-ttl` does, for they end soonest: the version fences, and no change is lost.

    Who held one is answered 409 only where another took it meanwhile.
    """
    async with counting(own_redis.url, pause=0.005) as site, counting(own_redis.url) as other_process:
        counted = await site.begin()
        async with crowd(site, [counted]), crowd(other_process, [counted]):
            for _ in range(20):
                await served([counted], 1)
                command(own_redis, "DEL", f"{counted.key}:lock", f"{counted.key}:wait")
        assert set(counted.answers) <= {200, 409}
        assert await _kept(site, counted) == []
        await until(lambda: command(own_redis, "KEYS", "*") == [counted.key], "no lock is left")


async def test_a_primary_that_may_not_write_alone(own_redis: RedisServer, store: RedisSessionStore) -> None:
    """`min-replicas-to-write` refuses changes, and the release too: what was held ends with its lease."""
    async with counting(own_redis.url) as site:
        counted = await site.begin()
        holder = await _taken(store, lock=LockPolicy(timeout=0.2))
        command(own_redis, "CONFIG", "SET", "min-replicas-to-write", 1)
        assert await site.visit(counted) == 503
        with pytest.raises(SessionStoreError) as caught:
            await store.commit(holder, _record(n=1), release=True)
        assert "replicas" in str(caught.value.__cause__)
        await store.release(holder)
        assert await _counts(store) is None
        command(own_redis, "CONFIG", "SET", "min-replicas-to-write", 0)
        assert await site.visit(counted) == 200
        assert await store.increment_counter("s", "n") == 1


@pytest.mark.parametrize("part", ["lock", "wait"])
async def test_something_else_at_a_sessions_other_keys(
    own_redis: RedisServer, store: RedisSessionStore, part: str
) -> None:
    """A clear error for who meets it, the record is whole, other sessions are served, and it ends with it."""
    await store.set("other", SessionData(session_id="other"))
    key, lease = f"{_KEY}:{part}", LockPolicy(timeout=0.2)
    elsewhere = RedisSessionStore(own_redis.url)
    holder = await _taken(elsewhere, lock=lease) if part == "wait" else None
    command(own_redis, "HSET", key, "some", "thing")
    with pytest.raises(SessionStoreError) as caught:
        await store.checkout("s", lease, None)
    assert isinstance(caught.value.__cause__, ResponseError)
    assert "WRONGTYPE" in str(caught.value.__cause__)
    assert await _counts(store) is None
    assert command(own_redis, "HGETALL", key) == {"some": "thing"}
    assert await store.increment_counter("other", "n") == 1
    command(own_redis, "DEL", key)
    if holder is not None:
        assert await elsewhere.commit(holder, _record(n=1), release=True) is Outcome.STORED
    assert await store.increment_counter("s", "n", 10) == (10 if holder is None else 11)
    await elsewhere.aclose()


@pytest.mark.parametrize("rules", [["resetchannels"], ["-publish"], ["-subscribe"]], ids=" ".join)
async def test_a_user_without_a_right_to_the_wake_channel(
    own_redis: RedisServer, caplog: pytest.LogCaptureFixture, rules: list[str]
) -> None:
    """Those who wait ask again and again instead of being told: one warning, and every request is served."""
    url = _user(own_redis, "~*", "&*", "+@all", *rules)
    async with counting(url) as site, counting(url) as other_process:
        counted = await site.begin()
        async with crowd(site, [counted], 2), crowd(other_process, [counted], 2):
            await served([counted], 4)
        assert set(counted.answers) == {200}
        assert await _kept(site, counted) == []
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) == 2, "one for each process"
    assert all("they poll" in each and "the ACL user may not" in each for each in warnings)


@pytest.mark.parametrize("rules", [["resetchannels"], ["-publish"]], ids=" ".join)
async def test_who_cannot_be_told_asks_ten_times_a_second(own_redis: RedisServer, rules: list[str]) -> None:
    """So a lock that is let go is taken up soon, and not when a whole claim has passed."""
    url = _user(own_redis, "~*", "&*", "+@all", *rules)
    store, other = RedisSessionStore(url), RedisSessionStore(url)
    await store.set("s", SessionData(session_id="s"))
    for _ in range(3):
        holder = await _taken(store)
        waiter = asyncio.create_task(_taken(other))
        await until(lambda: bool(command(own_redis, "EXISTS", f"{_KEY}:wait")), "it waits")
        await asyncio.sleep(0.2)
        command(own_redis, "CONFIG", "RESETSTAT")
        await asyncio.sleep(0.5)
        assert 3 <= scripts(own_redis) <= 6
        began = asyncio.get_running_loop().time()
        await store.release(holder)
        taken = await waiter
        assert asyncio.get_running_loop().time() - began < 0.3
        await other.release(taken)
    await asyncio.gather(store.aclose(), other.aclose())


async def test_a_user_whose_keys_are_the_stores_own(own_redis: RedisServer) -> None:
    """`~session:*` and `&session:*` suffice for everything, without the commands that are dangerous."""
    rules = "resetkeys", "~session:*", "resetchannels", "&session:*", "+@all", "-@admin", "-@dangerous"
    url = _user(own_redis, *rules)
    command(own_redis, "ACL", "LOG", "RESET")
    async with counting(url) as site, counting(url) as other_process:
        counted = await site.begin()
        async with crowd(site, [counted], 2), crowd(other_process, [counted], 2):
            await served([counted], 5)
        store = site.store
        people = {name: SessionData(session_id=name, user_id="ada") for name in ("a", "b", "c")}
        await store.set_batch(people)
        assert await store.get_batch(people) == people
        assert len(await store.find(SessionFilter(user_id="ada"))) == 3
        assert await store.touch("a")
        assert await store.delete_for_user("ada", keep="a") == 2
        assert len(await store.list_for_user("ada")) == 1
        assert await store.count_active() == 2
        health = await store.health_check()
        assert health["healthy"], health
        assert set(counted.answers) == {200}
    refused = {entry["object"] for entry in command(own_redis, "ACL", "LOG")}
    assert refused <= {"client"}, "redis-py tells its name when it connects, and may do without"


# -- it has too much to do --------------------------------------------------------------------------------

_CROWD = 10_000


async def test_ten_thousand_requests_of_one_session(own_redis: RedisServer) -> None:
    """One holds it, `max_waiters` wait, all others are told at once to come again; then all is as before."""
    begun, go = anyio.Event(), anyio.Event()

    async def act(session: Session) -> None:
        session["n"] = session.get("n", 0) + 1
        begun.set()
        await go.wait()

    store = RedisSessionStore(own_redis.url, socket_timeout=120)  # however slow the machine is
    app = SessionMiddleware(page(act), KEY, store=store, fingerprint=None, lock_wait=120, max_waiters=64)
    go.set()
    cookie = (await _get(app)).cookies[0].partition(";")[0]
    key = command(own_redis, "KEYS", "*")
    known = _objects()
    begun, go = anyio.Event(), anyio.Event()
    holder = asyncio.create_task(_get(app, cookie))
    await begun.wait()
    tasks = [asyncio.create_task(_get(app, cookie)) for _ in range(_CROWD)]
    refused = _CROWD - 64
    await until(
        lambda: sum(task.done() for task in tasks) >= refused, "all but the waiting are answered", 100
    )
    assert sum(task.done() for task in tasks) == refused
    assert command(own_redis, "LLEN", f"{key[0]}:wait") <= 64
    go.set()
    answers = [await task for task in (holder, *tasks)]
    assert Counter(answer.status for answer in answers) == {200: 65, 503: refused}
    assert {tuple(each.header("retry-after")) for each in answers if each.status == 503} == {("1",)}
    assert (await _get(app, cookie)).status == 200
    assert await _counts(store, cookie.partition("=")[2].partition(".")[0]) == 67
    await until(lambda: command(own_redis, "KEYS", "*") == key, "no lock and no queue is left")
    answers.clear()
    tasks.clear()
    assert _objects() - known < _CROWD / 10, "requests that are over are still in memory"
    await store.aclose()


def _objects() -> int:
    gc.collect()
    return len(gc.get_objects())


async def _get(app: ASGIApp, cookie: str | None = None) -> Answer:
    answer = Answer()

    async def send(message: Message) -> None:
        answer.messages.append(message)

    headers = [] if cookie is None else [(b"cookie", cookie.encode())]
    await app(http_scope(headers=headers), empty_body, send)
    return answer


async def test_a_crowd_shares_two_connections(own_redis: RedisServer) -> None:
    """A client with a small pool will do: whoever waits holds no connection, whoever works shares one."""
    async with Redis(port=own_redis.port, max_connections=3) as client:
        store = RedisSessionStore(client)
        await store.set_batch({f"s{n}": SessionData(session_id=f"s{n}") for n in range(100)})
        elsewhere = RedisSessionStore(own_redis.url)
        holder = await _taken(elsewhere, "s0")
        waiting = [asyncio.create_task(store.increment_counter("s0", "n")) for _ in range(50)]
        await until(lambda: command(own_redis, "EXISTS", "session:{s0}:wait") == 1, "they wait")
        working = [store.increment_counter(f"s{n}", "n") for n in range(1, 100)]
        assert await asyncio.gather(*working) == [1] * 99
        assert not any(task.done() for task in waiting)
        lines = len(_client_lines(own_redis))
        assert lines == 4, "calls, the wake channel, the process elsewhere, and who asks here"
        await elsewhere.release(holder)
        assert sorted(await asyncio.gather(*waiting)) == list(range(1, 51))
        assert int(command(own_redis, "INFO", "stats")["rejected_connections"]) == 0
        await asyncio.gather(store.aclose(), elsewhere.aclose())


@pytest.mark.parametrize(("number", "asked"), [(10, 1), (500, 1), (501, 2), (1500, 3)])
async def test_many_records_are_asked_for_in_few_commands(
    own_redis: RedisServer, number: int, asked: int
) -> None:
    """500 in each, or 100 where each is parsed; SCAN finds them, for KEYS would stop the server meanwhile."""
    store = RedisSessionStore(own_redis.url)
    records = {f"s{n}": SessionData(session_id=f"s{n}", user_id="ada") for n in range(number)}
    await store.set_batch(records)
    command(own_redis, "CONFIG", "RESETSTAT")
    assert len(await store.get_batch(records)) == number
    assert _asked(own_redis, "mget") == asked
    assert len(await store.find(SessionFilter(user_id="ada"))) == number
    assert _asked(own_redis, "mget") <= asked + number / 50 + 2
    assert len(await store.list_for_user("ada")) == number
    assert await store.count_active() == len(await store.list_active()) == number
    assert _asked(own_redis, "scan") >= 3
    assert _asked(own_redis, "keys") == _asked(own_redis, "get") == 0
    await store.aclose()


def _asked(server: RedisServer, name: str) -> int:
    """How often this command came since the statistics were reset."""
    calls: int = command(server, "INFO", "commandstats").get(f"cmdstat_{name}", {"calls": 0})["calls"]
    return calls


# -- which server it is -----------------------------------------------------------------------------------


@pytest.mark.parametrize("version", binaries())
async def test_every_server_of_this_machine(version: str) -> None:
    """Redis and Valkey, old and new: locked counting in two processes, batches, ends of lives."""
    with chosen(binaries()[version]), RedisServer() as server:
        async with counting(server.url) as site, counting(server.url) as other_process:
            sessions = [await site.begin() for _ in range(2)]
            async with crowd(site, sessions, 2), crowd(other_process, sessions, 2):
                await served(sessions, 20)
            assert [set(each.answers) for each in sessions] == [{200}] * 2
            assert await _kept(site, *sessions) == []
            records = {name: SessionData(session_id=name, user_id="ada") for name in ("a", "b")}
            assert await site.store.set_batch(records, ttl=100) == {"a": True, "b": True}
            assert 0 < command(server, "PTTL", "session:{a}") <= 100_000
            assert await other_process.store.delete_for_user("ada") == 2
            assert sorted(await site.store.list_active()) == sorted(each.session_id for each in sessions)
