"""Replies that come to another call than the one that asked: nobody gets another session's record."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from functools import cache, partial
from typing import cast

import anyio
import pytest
from deployments import scripts
from redis._parsers import _AsyncRESP2Parser
from redis.asyncio import Redis
from redis.asyncio.connection import ConnectionPool
from redis_server import RedisServer

from asgi_sessions import RedisSessionStore, SessionData, SessionFilter, SessionStoreError
from asgi_sessions.record.codec import encode_checked
from asgi_sessions.stores.checkout import Checkout, Lifetime, LockPolicy, Missing, Outcome
from asgi_sessions.stores.redis.commands.header import unpack
from asgi_sessions.stores.redis.commands.keys import KeySpace
from asgi_sessions.stores.redis.commands.scripts import ACQUIRE, COMMIT, CREATE, REMOVE
from asgi_sessions.stores.redis.connection import replies, seam
from asgi_sessions.stores.redis.connection.call import OUT_OF_STEP
from asgi_sessions.stores.redis.connection.pipeline import Pipeline
from asgi_sessions.stores.redis.connection.replies import (
    MOST_KNOWN,
    About,
    Fits,
    Reply,
    WrongRecords,
    mark_of,
)

from .chaos import ChaosProxy, Fault, Link, Match, Send, calls, containing, unasked

pytestmark = pytest.mark.anyio

_HOUR = Lifetime(absolute=3600)
_LOCK = LockPolicy(timeout=5, wait=5)
ADA, BOB, EVE = "ada" + "1" * 29, "bob" + "2" * 29, "eve" + "3" * 29


def bearing(found: str, instead: str) -> Fault:
    """The record that arrives bears another id."""

    def rename(link: Link, message: bytes, send: Send) -> None:
        assert found.encode() in message
        send(message.replace(mark_of(found), mark_of(instead)))

    return rename


def becoming(answer: bytes) -> Fault:
    """Something else arrives."""
    return lambda link, message, send: send(answer)


def twice(link: Link, message: bytes, send: Send) -> None:
    """All that come later come too late by one."""
    send(message + message)


@pytest.fixture
def proxy(redis_url: str, redis_server: RedisServer) -> Iterator[ChaosProxy]:
    with ChaosProxy(redis_server.port) as proxy:
        yield proxy


@pytest.fixture
async def direct(redis_url: str) -> AsyncIterator[RedisSessionStore]:
    """Another process, which nothing happens to; Ada, Bob and Eve have a session each."""
    store = RedisSessionStore(redis_url)
    for name in (ADA, BOB, EVE):
        await store.set(name, SessionData(session_id=name, user_id=name[:3], metadata={"of": name}))
    yield store
    await store.aclose()


@pytest.fixture(params=[True, False], ids=["taken over", "by redis-py's coroutines"])
async def store(
    request: pytest.FixtureRequest,
    direct: RedisSessionStore,
    proxy: ChaosProxy,
    monkeypatch: pytest.MonkeyPatch,
) -> AsyncIterator[RedisSessionStore]:
    """The store whose replies are tampered with."""
    pool = ConnectionPool.from_url(proxy.url)
    if not request.param:
        monkeypatch.setattr(seam, "hiredis", None)
        pool.connection_kwargs["parser_class"] = _AsyncRESP2Parser
    store = RedisSessionStore(Redis(connection_pool=pool))
    assert await store.exists(ADA)  # connected
    yield store
    await store.aclose()


async def _until(condition: Callable[[], bool | Awaitable[object]]) -> None:
    """Wait for what others do; neither Redis nor a stream sets an event."""
    with anyio.fail_after(5):
        while True:
            holds = condition()
            if holds if isinstance(holds, bool) else await holds:
                return
            await asyncio.sleep(0.001)


def pipeline_of(store: RedisSessionStore) -> Pipeline:
    state = store._states.here()
    assert state is not None
    return state.router.pipeline(b"k")


@pytest.fixture
def errors(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """What was logged as an error; no line may name a session."""

    def told() -> list[str]:
        assert not any(name in caplog.text for name in (ADA, BOB, EVE))
        return [each.getMessage() for each in caplog.records if each.levelno >= logging.ERROR]

    return told


# -- another session's record ---------------------------------------------------------------------------


async def _locked(store: RedisSessionStore) -> object:
    return await store.checkout(ADA, _LOCK, _HOUR)


async def _transaction(store: RedisSessionStore) -> object:
    async with store.transaction(ADA) as data:
        return data


async def _find(store: RedisSessionStore) -> object:
    return await store.find(SessionFilter())


ASKED: dict[str, tuple[Callable[[RedisSessionStore], Awaitable[object]], Match]] = {
    "get": (lambda store: store.get(ADA), containing(b"\r\nGET\r\n")),
    "get_batch": (lambda store: store.get_batch([ADA, BOB]), containing(b"MGET")),
    "find": (_find, containing(b"MGET")),
    "list_for_user": (lambda store: store.list_for_user("ada"), containing(b"MGET")),
    "get_metrics": (lambda store: store.get_metrics(), containing(b"MGET")),
    "checkout": (lambda store: store.checkout(ADA, None, _HOUR), calls(ACQUIRE)),
    "checkout with the lock": (_locked, calls(ACQUIRE)),
    "update": (lambda store: store.update(ADA, {"a": 1}), calls(ACQUIRE)),
    "increment_counter": (lambda store: store.increment_counter(ADA, "n"), calls(ACQUIRE)),
    "transaction": (_transaction, calls(ACQUIRE)),
}


@pytest.mark.parametrize(("ask", "meant"), ASKED.values(), ids=ASKED)
async def test_another_sessions_record_is_never_returned(
    store: RedisSessionStore,
    proxy: ChaosProxy,
    errors: Callable[[], list[str]],
    ask: Callable[[RedisSessionStore], Awaitable[object]],
    meant: Match,
) -> None:
    """The call fails, and so do all others on that connection; it is dropped, with one line in the log."""
    proxy.inject(bearing(ADA, EVE), meant, on="answer")
    first = asyncio.ensure_future(ask(store))
    await asyncio.sleep(0)
    others = [asyncio.ensure_future(store.get(BOB)) for _ in range(3)]
    with pytest.raises(SessionStoreError, match="none to its call"):
        await first
    for found in await asyncio.gather(*others, return_exceptions=True):
        assert isinstance(found, SessionStoreError) or cast(SessionData, found).session_id == BOB
    assert errors() == [OUT_OF_STEP]
    assert pipeline_of(store)._connections == 1
    found = await store.get(ADA)
    assert found is not None
    assert found.metadata["of"] == ADA
    assert pipeline_of(store)._connections == 2
    assert not isinstance(await ask(store), Missing)
    assert errors() == [OUT_OF_STEP]


async def test_a_waiter_is_not_handed_another_sessions_record(
    store: RedisSessionStore,
    direct: RedisSessionStore,
    proxy: ChaosProxy,
    errors: Callable[[], list[str]],
) -> None:
    """The message is not believed, the subscription is made anew, and the waiter asks for what is its own."""
    holder = await direct.checkout(ADA, _LOCK, _HOUR)
    assert isinstance(holder, Checkout)
    plan = proxy.inject(bearing(ADA, EVE), unasked, skip=1, on="answer")  # the first tells that it works
    waiter = asyncio.ensure_future(store.checkout(ADA, _LOCK, _HOUR))
    async with Redis(port=proxy.target) as raw:
        await _until(lambda: raw.exists(f"session:{{{ADA}}}:wait"))
    await direct.release(holder)
    taken = await waiter
    assert plan.hits == 1
    assert isinstance(taken, Checkout)
    assert store.read(taken.record).metadata["of"] == ADA
    assert errors() == [OUT_OF_STEP]
    await store.release(taken)


# -- replies that are late by one -----------------------------------------------------------------------


async def test_nobody_gets_the_reply_before_their_own(
    store: RedisSessionStore, proxy: ChaosProxy, errors: Callable[[], list[str]]
) -> None:
    """One reply too many: who cannot be sure is told so, and the connection is not used again."""
    proxy.inject(twice, containing(b"\r\nGET\r\n"), on="answer")
    asked = [ADA, BOB, EVE] * 5
    found = await asyncio.gather(*[store.get(name) for name in asked], return_exceptions=True)
    assert cast(SessionData, found[0]).session_id == ADA
    assert [str(each) for each in found[1:]] == [OUT_OF_STEP] * 14
    assert errors() == [OUT_OF_STEP]
    again = await asyncio.gather(*[store.get(name) for name in asked])
    assert [data and data.session_id for data in again] == asked


async def test_a_reply_that_nobody_asked_for(
    store: RedisSessionStore, proxy: ChaosProxy, errors: Callable[[], list[str]]
) -> None:
    """What comes when nobody waits ends the connection before it can be taken for somebody's reply."""
    for answer in (twice, becoming(b":1\r\n-ERR what nobody asked\r\n")):
        proxy.inject(answer, containing(b"EXISTS"), on="answer")
        await asyncio.gather(store.exists(ADA), return_exceptions=True)
        await _until(lambda: pipeline_of(store)._task is None)
    assert errors() == [OUT_OF_STEP] * 2
    assert await store.exists(ADA)


async def test_another_calls_reply_is_no_sign_of_life(
    store: RedisSessionStore, proxy: ChaosProxy, errors: Callable[[], list[str]]
) -> None:
    """A connection that was idle and gives something else than PONG is not trusted."""
    pipeline_of(store)._trusted_until = 0.0
    proxy.inject(becoming(b"$4\r\nlate\r\n"), containing(b"PING"), on="answer")
    with pytest.raises(SessionStoreError, match=OUT_OF_STEP):
        await store.exists(ADA)
    assert errors() == [OUT_OF_STEP]
    assert await store.exists(ADA)


@pytest.mark.parametrize("kind", ["commit", "discard"])
async def test_another_calls_success_acknowledges_nothing(
    store: RedisSessionStore,
    direct: RedisSessionStore,
    proxy: ChaosProxy,
    redis_server: RedisServer,
    kind: str,
) -> None:
    """Ada's change is stored, Bob's refused: Bob is not told what Ada was, and nothing is tried again."""
    taken = [await store.checkout(name, None, _HOUR) for name in (ADA, BOB)]
    await direct.set(BOB, SessionData(session_id=BOB, metadata={"of": BOB, "newer": True}))

    async def act(checkout: Checkout) -> Outcome:
        if kind == "discard":
            return await store.discard(checkout)
        data = SessionData(session_id=checkout.session_id, metadata={"mine": True})
        return await store.commit(checkout, encode_checked(data), release=True)

    proxy.inject(twice, calls(COMMIT if kind == "commit" else REMOVE), on="answer")
    before = scripts(redis_server)
    acts = [act(checkout) for checkout in taken if isinstance(checkout, Checkout)]
    told = await asyncio.gather(*acts, return_exceptions=True)
    assert told[0] is Outcome.STORED
    assert isinstance(told[1], SessionStoreError)
    found = await store.get(BOB)  # on a new connection
    assert found is not None
    assert found.metadata == {"of": BOB, "newer": True}
    assert scripts(redis_server) == before + 2


async def test_another_creation_acknowledges_nothing(store: RedisSessionStore, proxy: ChaosProxy) -> None:
    """The version that is told is that of another record."""
    proxy.inject(twice, calls(CREATE), on="answer")
    records = [SessionData(session_id=name * 32) for name in "ab"]
    told = await asyncio.gather(
        *[store.create(data.session_id, encode_checked(data), _HOUR, None) for data in records],
        return_exceptions=True,
    )
    assert isinstance(told[0], Checkout)
    assert isinstance(told[1], SessionStoreError)


NO_KIND_OF_OURS = [b"+OK\r\n", b":5\r\n", b"$-1\r\n", b"*-1\r\n", b"*0\r\n", b"*2\r\n$1\r\nL\r\n:1\r\n"]


@pytest.mark.parametrize("answer", NO_KIND_OF_OURS)
async def test_a_reply_of_another_kind_ends_the_connection(
    store: RedisSessionStore, proxy: ChaosProxy, errors: Callable[[], list[str]], answer: bytes
) -> None:
    """No script of ours says so: it is not the reply to this call, whatever it is."""
    proxy.inject(becoming(answer), calls(ACQUIRE), on="answer")
    with pytest.raises(SessionStoreError):
        await store.checkout(ADA, None, _HOUR)
    assert isinstance(await store.checkout(ADA, None, _HOUR), Checkout)
    assert errors() == [OUT_OF_STEP]
    assert pipeline_of(store)._connections == 2


# -- a record that is wrong -----------------------------------------------------------------------------


async def test_a_wrong_record_is_not_everybodys_fault(
    store: RedisSessionStore,
    direct: RedisSessionStore,
    redis_server: RedisServer,
    errors: Callable[[], list[str]],
) -> None:
    """Where another connection says the same, the record is to blame: it alone cannot be read."""
    async with Redis(port=redis_server.port) as raw:
        right, wrong = [cast(bytes, await raw.get(f"session:{{{name}}}")) for name in (ADA, EVE)]
        await raw.set(f"session:{{{ADA}}}", wrong)
        for _ in range(3):
            with pytest.raises(SessionStoreError):
                await store.get(ADA)
        assert errors() == [OUT_OF_STEP]
        assert await store.checkout(ADA, None, _HOUR) is Missing.UNREADABLE
        for _ in range(2):
            assert await store.checkout(ADA, _LOCK, _HOUR) is Missing.UNREADABLE
        with pytest.raises(SessionStoreError):
            await store.get_batch([BOB, ADA])
        assert sorted(data.session_id for data in await store.find(SessionFilter())) == [BOB, EVE]
        assert await store.list_for_user("ada") == []
        assert pipeline_of(store)._connections == 2
        assert errors() == [OUT_OF_STEP]
        await raw.set(f"session:{{{ADA}}}", right)
        found = await store.get(ADA)
        assert found is not None
        assert found.metadata["of"] == ADA
        assert unpack(right).record == encode_checked(found)
        assert await raw.keys("*}:lock") == []


async def test_a_waiter_for_a_wrong_record(
    store: RedisSessionStore,
    direct: RedisSessionStore,
    redis_server: RedisServer,
    errors: Callable[[], list[str]],
) -> None:
    """Known to be wrong on both connections, it is unreadable, and nothing is dropped any more."""
    async with Redis(port=redis_server.port) as raw:
        await raw.copy(f"session:{{{EVE}}}", f"session:{{{ADA}}}", replace=True)
        outcomes: list[object] = []
        for _ in range(4):
            holder = await direct._states.get()
            token = b"a" * 32
            await raw.set(f"session:{{{ADA}}}:lock", token)
            waiter = asyncio.ensure_future(store.checkout(ADA, _LOCK, _HOUR))
            await _until(partial(_waits_or_is_done, raw, waiter))
            await holder.releases.let_go(
                KeySpace(direct.prefix).of(ADA), token, holder.commands.timing(_LOCK)
            )
            outcomes += await asyncio.gather(waiter, return_exceptions=True)
        assert outcomes[-2:] == [Missing.UNREADABLE] * 2
        assert errors() == [OUT_OF_STEP] * 2
        assert pipeline_of(store)._connections == 2
        await _until(lambda: _is_free(raw))


async def _waits_or_is_done(raw: Redis, waiter: asyncio.Future[Checkout | Missing]) -> bool:
    return waiter.done() or bool(await raw.exists(f"session:{{{ADA}}}:wait"))


async def _is_free(raw: Redis) -> bool:
    return not await raw.exists(f"session:{{{ADA}}}:lock")


@cache
def _value(session_id: str) -> bytes:
    record = encode_checked(SessionData(session_id=session_id))
    return b"asgi1:%b:%b:%b:%b" % (b"0" * 16, b"0" * 13, b"0" * 13, record)


def test_what_is_known_of_wrong_records_is_bounded() -> None:
    """It does not grow, and forgets the oldest first."""
    known = WrongRecords()
    for number in range(MOST_KNOWN + 10):
        known.withheld(_value("x"), mark_of(str(number)), 1)
    assert len(known) == MOST_KNOWN
    assert known.withheld(_value("x"), mark_of(str(MOST_KNOWN)), 2) == replies.WITHHELD
    assert known.withheld(_value("x"), mark_of("0"), 2) == _value("x")


def test_the_same_connection_does_not_acquit_itself() -> None:
    """Only another that gives the same record does."""
    known, mark = WrongRecords(), mark_of("a")
    assert known.withheld(_value("x"), mark, 1) == _value("x")
    assert known.withheld(_value("x"), mark, 1) == _value("x")
    assert known.withheld(_value("y"), mark, 2) == _value("y")
    assert known.withheld(_value("y"), mark, 3) == replies.WITHHELD
    assert known.withheld([b"L", _value("y"), 5], mark, 3) == [b"L", replies.WITHHELD, 5]
    assert known.withheld(_value("a"), mark, 3) == _value("a")


A, X = mark_of("a"), b"asgi1:"
FITTING: list[tuple[Fits, Reply, About, bool]] = [
    (replies.is_taken, _value("a"), A, True),
    (replies.is_taken, _value("b"), A, False),
    (replies.is_taken, _value("a\\ü"), mark_of("a\\ü"), True),
    (replies.is_taken, X + b"garbage", A, True),  # unreadable, yet not another's
    (
        replies.is_taken,
        X + b'{"user_id":null,"session_id":"a"}',
        A,
        True,
    ),  # in an order of its own
    (replies.is_taken, X + b'{"user_id":null,"session_id":"b"}', A, False),
    (replies.is_taken, b"OK", A, False),
    (replies.is_taken, [b"L", _value("a"), 1], A, True),
    (replies.is_taken, [b"L", _value("b"), 1], A, False),
    (replies.is_taken, [b"L", _value("a")], A, False),
    (replies.is_taken, [b"L", 1, 1], A, False),
    (replies.is_taken, [b"L", b"", 1], b"", True),  # a lock without record
    (replies.is_taken, [b"A"], A, True),
    (replies.is_taken, [b"Z"], A, False),
    (replies.is_taken, 1, A, False),
    (replies.is_taken, None, A, False),
    (replies.is_record, None, A, True),
    (replies.is_record, b"not ours", A, True),
    (replies.is_record, _value("b"), A, False),
    (replies.is_record, 1, A, False),
    (replies.are_records, [_value("a"), None], (A, A), True),
    (replies.are_records, [None, _value("a")], (A, mark_of("b")), False),
    (replies.are_records, [None], (A, A), False),
    (replies.are_records, _value("a"), (A,), False),
    (replies.is_stored, b"STOREDn", b"STOREDn", True),
    (replies.is_stored, b"STOREDm", b"STOREDn", False),
    (replies.is_stored, b"STORED", b"STOREDn", False),
    (replies.is_stored, b"LOST", b"STOREDn", True),
    (replies.is_stored, b"X", b"STOREDn", False),
    (replies.is_stored, 1, b"STOREDn", False),
    (replies.is_removed, b"X", b"STOREDn", True),
    (replies.is_removed, b"STORED", b"", True),
    (replies.is_created, [b"E"], b"n", True),
    (replies.is_created, [b"C", b"n:0:0", 5], b"n", True),
    (replies.is_created, [b"C", b"m:0:0", 5], b"n", False),
    (replies.is_created, [b"C"], b"n", False),
    (replies.is_created, b"C", b"n", False),
    (replies.is_number, 0, b"", True),
    (replies.is_number, b"0", b"", False),
    (replies.is_just, b"PONG", b"PONG", True),
    (replies.is_just, b"", b"PONG", False),
    (replies.is_list, [], b"", True),
    (replies.is_list, None, b"", False),
]


@pytest.mark.parametrize(("fits", "reply", "about", "expected"), FITTING)
def test_what_fits(fits: Fits, reply: Reply, about: About, expected: bool) -> None:
    """The kind of the reply, and whose record or which change it speaks of."""
    assert fits(reply, about) is expected
