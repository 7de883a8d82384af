"""Signing out everywhere on Redis: no session of the user survives, whatever it is doing at the time."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, cast

import anyio
import pytest
from anyio import to_thread
from deployments import command
from faults.chaos import ChaosProxy, Direction, Fault, calls, cut, half, reset, swallow
from redis.asyncio import Redis
from redis_server import RedisServer

from asgi_sessions import RedisSessionStore, SessionData, SessionStoreError
from asgi_sessions.cli import main
from asgi_sessions.record.codec import encode_checked
from asgi_sessions.record.values import new_session_id
from asgi_sessions.stores.checkout import Checkout, Lifetime, LockPolicy, Missing, Outcome
from asgi_sessions.stores.redis.commands.scripts import CREATE, LINK, MARK, REMOVE, SETTLE, SUCCEED, SURPLUS
from asgi_sessions.stores.redis.connection.script import Script
from asgi_sessions.stores.redis.records.index import (
    GONE,
    LEFT_ALONE,
    LINK_SETTLES,
    LIVES,
    LOOKS,
    NOTHING,
    TO_END,
    Link,
)
from asgi_sessions.stores.redis.records.index import verdict as verdict_of

pytestmark = pytest.mark.anyio

_HOUR = Lifetime(absolute=3600)
_LOCK = LockPolicy(timeout=5, wait=5)
_INDEX = "session:user:ada"


@pytest.fixture
async def store(redis_url: str) -> AsyncIterator[RedisSessionStore]:
    store = RedisSessionStore(redis_url)
    yield store
    await store.aclose()


@pytest.fixture
async def elsewhere(redis_url: str) -> AsyncIterator[RedisSessionStore]:
    """As another process would have it."""
    store = RedisSessionStore(redis_url)
    yield store
    await store.aclose()


def record(session_id: str, user: str | None = "ada", **fields: Any) -> bytes:
    return encode_checked(SessionData(session_id=session_id, user_id=user, **fields))


async def signed_in(
    store: RedisSessionStore, session_id: str = "old", user: str | None = "ada", lifetime: Lifetime = _HOUR
) -> None:
    """A session as the middleware begins it."""
    assert await store.create(session_id, record(session_id, user), lifetime, None, user)


async def taken(
    store: RedisSessionStore, session_id: str = "old", lock: LockPolicy | None = _LOCK
) -> Checkout:
    found = await store.checkout(session_id, lock, None)
    assert isinstance(found, Checkout)
    return found


async def move(store: RedisSessionStore, checkout: Checkout, new: str = "new", **options: Any) -> Outcome:
    terms = {"lifetime": None, "lock": None, "was": "ada", "user": "ada", **options}
    return await store.move(checkout, new, record(new, terms["user"]), **terms)


async def ids(store: RedisSessionStore) -> list[str]:
    return await store.list_active()


async def links(raw: Redis) -> dict[str, float]:
    """The index, once what was posted to it has arrived."""
    await asyncio.sleep(0.02)
    return dict(cast("list[tuple[str, float]]", await raw.zrange(_INDEX, 0, -1, withscores=True)))


async def value_of(raw: Redis, session_id: str) -> str:
    """Header and record."""
    return cast(str, await raw.get(f"session:{{{session_id}}}"))


async def age(raw: Redis, *session_ids: str, by: float = 2 * LINK_SETTLES) -> None:
    """Make links older, by so many seconds."""
    for session_id in session_ids:
        since = await raw.zscore(_INDEX, session_id)
        assert since is not None
        await raw.zadd(_INDEX, {session_id: since - by * 1000 if since > 0 else since + by * 1000})


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    """Wait for what is done in the background."""
    with anyio.fail_after(5):
        while not await condition():  # noqa: ASYNC110  # Redis sets no events
            await anyio.sleep(0.005)


# -- a session gets a new id --------------------------------------------------------------------------------


async def test_a_move_takes_the_link_along(store: RedisSessionStore, raw: Redis) -> None:
    """The new id is linked, the old one retired and forgotten, and the lock is on the new record."""
    await signed_in(store)
    checkout = await taken(store)
    assert await move(store, checkout, lock=_LOCK) is Outcome.STORED
    assert checkout.token is None
    assert checkout.successor is not None
    assert checkout.successor.token is not None
    assert await ids(store) == ["new"]
    assert list(await links(raw)) == ["new"]
    assert await store.checkout("old", _LOCK, None) is Missing.RETIRED
    assert await store.commit(checkout.successor, record("new"), release=True) is Outcome.STORED
    assert await store.delete_for_user("ada") == 1


@pytest.mark.parametrize(
    "lifetime",
    [Lifetime(absolute=100.0), Lifetime(absolute=100.0, idle=50.0), Lifetime(idle=50.0)],
    ids=["absolute", "both", "idle"],
)
async def test_a_move_keeps_the_end_of_a_life(
    store: RedisSessionStore, raw: Redis, lifetime: Lifetime
) -> None:
    """To the millisecond, for without a lifetime of its own the new record has the old one's header."""
    await signed_in(store, lifetime=lifetime)
    header = await raw.getrange("session:{old}", 22, 50)
    checkout = await taken(store)
    assert await move(store, checkout) is Outcome.STORED
    assert await raw.getrange("session:{new}", 22, 50) == header
    assert 0 <= lifetime.ttl() * 1000 - await raw.pttl("session:{new}") < 2000
    successor = checkout.successor
    assert successor is not None
    if lifetime.absolute is None:
        assert successor.expires_in is None
    else:
        assert successor.expires_in == pytest.approx(100, abs=2)


async def test_a_move_may_begin_a_new_life(store: RedisSessionStore, raw: Redis) -> None:
    """As a sign-in does."""
    await signed_in(store, lifetime=Lifetime(absolute=100.0))
    checkout = await taken(store)
    assert await move(store, checkout, lifetime=Lifetime(absolute=900.0)) is Outcome.STORED
    assert await raw.ttl("session:{new}") > 800
    assert checkout.successor is not None
    assert checkout.successor.expires_in == pytest.approx(900, abs=1)


@pytest.mark.parametrize(
    ("was", "user", "linked"),
    [
        (None, "ada", ["new"]),
        ("ada", None, []),
        ("ada", "bob", []),
        ("bob", "ada", ["new"]),
        (None, None, []),
    ],
)
async def test_a_move_may_change_the_user(
    store: RedisSessionStore, raw: Redis, was: str | None, user: str | None, linked: list[str]
) -> None:
    """Signing in links, signing out unlinks, and a change of user does both."""
    await signed_in(store, user=was)
    assert await move(store, await taken(store), was=was, user=user) is Outcome.STORED
    assert await ids(store) == ["new"]
    assert list(await links(raw)) == linked
    found = await store.list_for_user(user or "nobody")
    assert [data.session_id for data in found] == (["new"] if user else [])


async def test_a_move_never_overwrites(store: RedisSessionStore, raw: Redis) -> None:
    """Where the new id is taken everything stays as it is."""
    await signed_in(store)
    await signed_in(store, "new", None)
    checkout = await taken(store)
    assert await move(store, checkout) is Outcome.CONFLICT
    assert await ids(store) == ["new", "old"]
    assert checkout.token is not None
    assert list(await links(raw)) == ["old"]


@pytest.mark.parametrize("user", ["ada", "bob", None])
async def test_a_session_that_is_being_ended_cannot_move(
    store: RedisSessionStore, raw: Redis, user: str | None
) -> None:
    """Nor become another user's; what is left of it is nothing."""
    await signed_in(store)
    state = await store._states.get()
    checkout = await taken(store)
    await state.commands.run(MARK, _INDEX.encode(), b"")
    assert await move(store, checkout, user=user, lock=_LOCK) is Outcome.GONE
    assert checkout.successor is None
    assert await ids(store) == []
    assert await raw.keys("*:lock") == []
    assert set(await links(raw)) == {"old"}
    assert await store.list_for_user("bob") == []


async def test_a_move_that_is_overtaken_by_a_sign_out(
    store: RedisSessionStore, elsewhere: RedisSessionStore, raw: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new id is linked already when the sign-out begins: it goes with the old one."""
    await signed_in(store)
    checkout = await taken(store)
    checkouts = (await store._states.get()).checkouts
    retire = checkouts.retire
    ended: list[int] = []

    async def sign_out_first(checkout: Checkout, successor: Checkout, leads: bool) -> Outcome:
        ended.append(await elsewhere.delete_for_user("ada"))
        return await retire(checkout, successor, leads)

    monkeypatch.setattr(checkouts, "retire", sign_out_first)
    assert await move(store, checkout) is Outcome.GONE
    assert ended == [2]
    assert await ids(store) == []
    assert await store.delete_for_user("ada") == 0


async def test_a_conflict_undoes_a_move(store: RedisSessionStore, raw: Redis) -> None:
    """The old record was written by somebody who did not wait: it stays, and stays linked."""
    await signed_in(store)
    checkout = await taken(store)
    await store.set("old", SessionData(session_id="old", user_id="ada", message_count=7))
    assert await move(store, checkout) is Outcome.CONFLICT
    assert checkout.successor is None
    assert await ids(store) == ["old"]
    assert list(await links(raw)) == ["old"]
    assert await store.delete_for_user("ada") == 1


async def test_a_lost_lock_undoes_a_move(store: RedisSessionStore, raw: Redis) -> None:
    """Another process holds the session by now, and finds it where it was."""
    await signed_in(store)
    checkout = await taken(store)
    await raw.set("session:{old}:lock", "another's", px=5000)
    assert await move(store, checkout) is Outcome.LOST
    assert await ids(store) == ["old"]
    assert list(await links(raw)) == ["old"]


# -- all sessions of a user are ended -----------------------------------------------------------------------


class StrictData(SessionData):
    """What the other sessions of this deployment know nothing of."""

    tenant: int


async def test_a_model_that_cannot_parse_ends_all_the_same(
    redis_url: str, store: RedisSessionStore, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those who look without the right model see nothing, unlink nothing, and end every session."""
    await signed_in(store, "theirs")
    strict = RedisSessionStore(redis_url, model=StrictData)
    assert await strict.list_for_user("ada") == []
    assert await strict.delete_for_user("ada") == 1
    await strict.aclose()

    await signed_in(store, "theirs")
    broken = record("theirs").replace(b'"message_count":0', b'"message_count":"many"')
    found = await taken(store, "theirs")
    assert await store.commit(found, broken, release=True) is Outcome.STORED
    assert await store.list_for_user("ada") == []
    assert await to_thread.run_sync(main, ["logout", redis_url, "ada"]) == 0
    assert capsys.readouterr().out == "1 sessions ended\n"
    assert await ids(store) == []


async def test_a_record_that_is_cut_is_ended(store: RedisSessionStore, raw: Redis) -> None:
    """It does not say whose it is any more; the link does."""
    await signed_in(store, "cut")
    await raw.set("session:{cut}", (await value_of(raw, "cut"))[:-9], keepttl=True)
    assert await store.delete_for_user("ada") == 1
    assert await ids(store) == []


async def test_what_is_of_no_known_format_is_told(
    redis_url: str, store: RedisSessionStore, raw: Redis, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is left alone and stays marked, and nobody is told that all is well, until it can be ended."""
    for name in ("later", "known"):
        await signed_in(store, name)
    value = await value_of(raw, "later")
    await raw.set("session:{later}", "asgi9:" + value, keepttl=True)
    with pytest.raises(SessionStoreError, match=r"^1 sessions were ended; what lies under 1 more"):
        await store.delete_for_user("ada")
    assert await ids(store) == ["later"]
    assert await to_thread.run_sync(main, ["logout", redis_url, "ada"]) == 1
    assert "0 sessions were ended; what lies under 1 more" in capsys.readouterr().err

    await raw.set("session:{later}", value, keepttl=True)
    assert await move(store, await taken(store, "later")) is Outcome.GONE
    assert await ids(store) == []


async def test_some_are_kept_and_strangers_left_alone(store: RedisSessionStore, raw: Redis) -> None:
    """`keep` stays linked and may move on; a link to somebody else's record, or to nobody's, goes."""
    for name in ("keep", "a", "b"):
        await signed_in(store, name)
    await signed_in(store, "bobs", "bob")
    await signed_in(store, "anonymous", None)
    for name in ("bobs", "anonymous", "absent"):
        await store.link_user("ada", name, _HOUR)
    await age(raw, "a", "b", "bobs", "anonymous", "absent")
    assert await store.delete_for_user("ada", keep="keep") == 2
    assert await ids(store) == ["anonymous", "bobs", "keep"]
    assert list(await links(raw)) == ["keep"]
    assert await move(store, await taken(store, "keep")) is Outcome.STORED
    assert await store.delete_for_user("ada", keep="new") == 0
    assert await store.delete_for_user("ada") == 1


async def test_a_sign_out_leaves_no_links(store: RedisSessionStore, raw: Redis) -> None:
    """Also of sessions that began just now: of those that it has ended itself there is no doubt."""
    for n in range(3):
        await signed_in(store, f"s{n}")
    await store.set("s", SessionData(session_id="s", user_id="ada"))
    assert await store.delete_for_user("ada") == 4
    assert await links(raw) == {}


async def test_a_sign_in_under_way_stays_linked(store: RedisSessionStore, raw: Redis) -> None:
    """A change of user under the same id is linked before it is committed: nothing parts the two."""
    await signed_in(store, "same", None)
    checkout = await taken(store, "same")
    await store.link_user("ada", "same", _HOUR)
    assert await store.delete_for_user("ada") == 0
    assert await store.commit(checkout, record("same"), release=True) is Outcome.STORED
    assert await store.delete_for_user("ada") == 1
    assert await ids(store) == []


async def test_a_link_that_is_made_anew_meanwhile_outlives_the_sign_out(
    store: RedisSessionStore, raw: Redis
) -> None:
    """Of a session whose user came back between two steps of the sign-out, nothing is forgotten."""
    await signed_in(store, "back", None)
    await store.link_user("ada", "back", _HOUR)
    await age(raw, "back")
    state = await store._states.get()
    for word in (NOTHING, GONE):
        session_id, since = cast("list[bytes]", await state.commands.run(MARK, _INDEX.encode(), b""))
        await state.commands.run(LINK, _INDEX.encode(), session_id, b"3600000", b"60000", b"0")
        assert (await links(raw))["back"] < 0
        found = b"%b\n%b\n%b\n" % (session_id, since, word)
        await state.commands.run(SETTLE, _INDEX.encode(), b"60000", found)
        assert (await links(raw))["back"] > 0


async def test_nobody_has_no_index(store: RedisSessionStore) -> None:
    """The user id of a visitor who is not signed in ends nothing."""
    await signed_in(store, "s", None)
    assert await store.delete_for_user("") == 0
    assert await ids(store) == ["s"]


async def test_forty_thousand_sessions_of_one_user(store: RedisSessionStore, raw: Redis) -> None:
    """All are ended, though Lua's stack has room for some thousands of values only."""
    count = 40_000
    async with raw.pipeline(transaction=False) as batch:
        for first in range(0, count, 1000):
            batch.zadd(_INDEX, {f"s{n}": 1.0 + n for n in range(first, first + 1000)})
        await batch.execute()
    for n in (0, count // 2, count - 1):
        assert await store.create(f"s{n}", record(f"s{n}"), _HOUR, None)
    assert await store.delete_for_user("ada") == 3
    assert await links(raw) == {}


DYING = """
import asyncio, os, signal, sys
from asgi_sessions import RedisSessionStore
from asgi_sessions.stores.redis.records.operations import Records

async def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

setattr(Records, sys.argv[2], die)
asyncio.run(RedisSessionStore(sys.argv[1]).delete_for_user("ada"))
"""


@pytest.mark.parametrize("step", ["values", "delete"])
@pytest.mark.parametrize("by", ["the next sign-out", "the next sign-ins"])
async def test_what_a_dead_process_left_is_finished(
    redis_url: str, store: RedisSessionStore, raw: Redis, step: str, by: str
) -> None:
    """Killed after it had marked the links: the sessions cannot move, and whoever comes next ends them."""
    state = await store._states.get()
    for name in ("a", "b", "c"):
        await signed_in(store, name)
    done = await to_thread.run_sync(
        lambda: subprocess.run([sys.executable, "-c", DYING, redis_url, step], check=False, timeout=60)
    )
    assert done.returncode == -signal.SIGKILL
    assert all(since < 0 for since in (await links(raw)).values())
    assert await ids(store) == ["a", "b", "c"]
    assert await move(store, await taken(store, "a")) is Outcome.GONE
    if by == "the next sign-out":
        assert await store.delete_for_user("ada", keep="b") == 2, "`keep` came too late for an earlier one"
        assert await ids(store) == []
    else:
        for name in ("d", "e"):
            await signed_in(store, name)
            await asyncio.gather(*state.index._tidying.values())
        assert await ids(store) == ["d", "e"]
    assert all(since > 0 for since in (await links(raw)).values())


async def _is(answer: Awaitable[list[str]], expected: list[str]) -> bool:
    return await answer == expected


# -- what a sign-in costs -----------------------------------------------------------------------------------


async def spent(server: RedisServer, work: Callable[[], Awaitable[object]]) -> dict[str, int]:
    """The commands that this work makes Redis carry out, in scripts too."""
    command(server, "CONFIG", "RESETSTAT")
    await work()
    await asyncio.sleep(0.05)  # what nobody waits for
    stats = command(server, "INFO", "commandstats")
    named = {name.removeprefix("cmdstat_"): counts["calls"] for name, counts in stats.items()}
    return {
        name: calls for name, calls in named.items() if name not in ("info", "config|resetstat", "config")
    }


@pytest.mark.parametrize("way", ["create", "set"])
async def test_a_sign_in_costs_the_same_for_one_and_for_forty_thousand(
    redis_server: RedisServer, store: RedisSessionStore, raw: Redis, way: str
) -> None:
    """As many commands, those included that nobody waits for: some old links are looked at, never all."""

    async def sign_in(name: str) -> None:
        if way == "create":
            await signed_in(store, name)
        else:
            await store.set(name, SessionData(session_id=name, user_id="ada"))

    async def four(name: str) -> None:
        for n in range(4):
            await sign_in(f"{name}{n}")

    async def cost(name: str) -> dict[str, int]:
        return await spent(redis_server, lambda: four(name))

    for n in range(LOOKS):
        await signed_in(store, f"live{n}")
    await cost("first")
    for n in range(LOOKS):
        await age(raw, f"live{n}")
    few = await cost("few")
    async with raw.pipeline(transaction=False) as batch:
        for first in range(0, 40_000, 1000):
            batch.zadd(_INDEX, {f"s{n}": 1e12 + n for n in range(first, first + 1000)})
        await batch.execute()
    many = await cost("many")
    for each in (few, many):
        each["settled"] = each.pop("zadd") + each.pop("zrem", 0)
        each.pop("ping", None)  # asked of a connection that was idle, on a busy machine
    assert many == few
    assert sum(many.values()) < 130, "four sign-ins, one of which has old links looked at"


@pytest.mark.parametrize("way", ["link", "set"])
async def test_an_index_does_not_grow_for_ever(store: RedisSessionStore, raw: Redis, way: str) -> None:
    """Dead links go as new ones come, whichever way they come; live ones stay, each looked at in turn."""
    living = [f"live{n}" for n in range(6)]
    for name in living:
        await signed_in(store, name)
    await raw.zadd(_INDEX, {f"dead{n}": 1.0 + n for n in range(385)})
    await age(raw, *living)
    for n in range(200):
        if way == "link":
            await store.link_user("ada", f"new{n}", _HOUR)
        else:
            await store.set(f"new{n}", SessionData(session_id=f"new{n}", user_id="ada"))
        state = await store._states.get()
        await asyncio.gather(*state.index._tidying.values())
    known = await links(raw)
    assert [name for name in known if name.startswith("dead")] == []
    assert set(living) <= set(known)
    assert all(since > 1e12 for since in known.values())


# -- links last as long as their sessions -------------------------------------------------------------------


async def test_a_live_session_renews_its_link(store: RedisSessionStore, raw: Redis) -> None:
    """The time starts anew, and the index lives on: whoever comes daily is found after 400 days too."""
    await signed_in(store, lifetime=Lifetime(idle=60))
    before = await links(raw)
    await raw.pexpire(_INDEX, 5000)
    await store.link_user("ada", "old", Lifetime(idle=60))
    assert (await links(raw))["old"] > before["old"]
    assert await raw.ttl(_INDEX) > 399 * 86400
    await store.link_user("ada", "old", Lifetime(absolute=60))
    assert await raw.ttl(_INDEX) > 399 * 86400, "never shortened"


async def test_renewing_a_link_undoes_no_sign_out(store: RedisSessionStore, raw: Redis) -> None:
    """What is being ended stays so, however often its client comes, and is ended by that."""
    await signed_in(store)
    state = await store._states.get()
    await state.commands.run(MARK, _INDEX.encode(), b"")
    for _ in range(3):
        await state.commands.run(LINK, _INDEX.encode(), b"old", b"3600000", b"60000", b"0")
    assert (await links(raw))["old"] < 0
    await store.link_user("ada", "old", _HOUR)
    await until(lambda: _is(ids(store), []))


async def test_a_lost_index(store: RedisSessionStore, raw: Redis) -> None:
    """A live session's link comes back when it is renewed; one that nothing knows of ends as it moves."""
    for name in ("renewed", "moved"):
        await signed_in(store, name)
    await raw.delete(_INDEX)
    await store.link_user("ada", "renewed", _HOUR)
    assert await move(store, await taken(store, "moved")) is Outcome.GONE
    assert await ids(store) == ["renewed"]
    assert await store.delete_for_user("ada") == 1


async def test_listing_changes_nothing(store: RedisSessionStore, raw: Redis) -> None:
    """Sorted, those of this user that can be read; what cannot be, or is gone, is the tidying's to judge."""
    for name in ("b", "a", "cut"):
        await signed_in(store, name)
    await raw.set("session:{cut}", (await value_of(raw, "cut"))[:-9])
    await raw.zadd(_INDEX, {"gone": 5})
    before = await links(raw)
    assert [data.session_id for data in await store.list_for_user("ada")] == ["a", "b"]
    assert await links(raw) == before


_HEADER = b"asgi1:" + b"0" * 16 + b":%013d:%013d:" % (0, 0)


@pytest.mark.parametrize(
    ("value", "live", "marked"),
    [
        (None, NOTHING, NOTHING),
        (_HEADER + record("s"), LIVES, TO_END),
        (_HEADER + record("s", "bob"), NOTHING, NOTHING),
        (_HEADER + record("s", None), NOTHING, NOTHING),
        (_HEADER + record("another"), LIVES, TO_END),
        (_HEADER + record("another", "bob"), LIVES, TO_END),
        (_HEADER + b'{"session_id":"s","user_id":"ada"', LIVES, TO_END),
        (_HEADER, LIVES, TO_END),
        (b"asgi9:" + record("s"), LIVES, LEFT_ALONE),
        (b"", LIVES, LEFT_ALONE),
    ],
    ids=["absent", "theirs", "bob's", "nobody's", "of another id", "of another id and user", "cut", "empty",
         "of a later format", "foreign"],
)  # fmt: skip
def test_what_a_link_comes_to(value: bytes | None, live: bytes, marked: bytes) -> None:
    """What cannot be read never unlinks, and is ended with the others where it is a record of ours."""
    assert verdict_of(value, Link("s", b"1700000000000"), "ada") == live
    assert verdict_of(value, Link("s", b"-1700000000000"), "ada") == marked


# -- faults on the way --------------------------------------------------------------------------------------


@pytest.fixture
def proxy(redis_url: str, redis_server: RedisServer) -> Iterator[ChaosProxy]:
    with ChaosProxy(redis_server.port) as proxy:
        yield proxy


FAULTS: list[tuple[Fault, Direction]] = [
    (reset, "request"), (reset, "answer"), (cut, "answer"), (half, "answer"), (swallow, "request"),
    (swallow, "answer"),
]  # fmt: skip


@pytest.mark.parametrize("times", [1, None], ids=["once", "for good"])
@pytest.mark.parametrize(("fault", "on"), FAULTS, ids=[f"{f.__name__}-{on}" for f, on in FAULTS])
@pytest.mark.parametrize("step", [CREATE, SUCCEED, REMOVE], ids=lambda step: step.name)
async def test_a_fault_at_each_step_of_a_move(
    proxy: ChaosProxy,
    elsewhere: RedisSessionStore,
    raw: Redis,
    step: Script,
    fault: Fault,
    on: Direction,
    times: int | None,
) -> None:
    """The old session is whole and linked, or the new one is and the caller knows it; a sign-out ends all."""
    store = RedisSessionStore(f"{proxy.url}?socket_timeout=0.4")
    await signed_in(store)
    checkout = await taken(store)
    proxy.inject(fault, calls(step), on=on, times=times)
    try:
        outcome: Outcome | None = await move(store, checkout, lock=_LOCK)
    except SessionStoreError:
        outcome = None
    proxy.heal()
    successor = checkout.successor
    if outcome is Outcome.STORED:
        assert successor is not None
        assert await ids(elsewhere) == ["new"]
    elif successor is not None:
        assert step is REMOVE
        assert successor.token is None, "whoever comes next need not wait for the lease"
        assert "new" in await ids(elsewhere)
    else:
        assert outcome is not Outcome.GONE
        assert "old" in await ids(elsewhere)
        assert (await links(raw))["old"] > 0
    await store.release(checkout)
    if successor is not None:
        await store.release(successor)
        await until(lambda: _exists(raw, "session:{new}:lock", 0))
    for name in await ids(elsewhere):
        found = await elsewhere.checkout(name, LockPolicy(wait=2), None)
        assert isinstance(found, Checkout)
        await elsewhere.release(found)
    await elsewhere.delete_for_user("ada")
    assert not await elsewhere.exists("old")
    assert not (successor and await elsewhere.exists("new"))
    await store.aclose()


async def _exists(raw: Redis, key: str, count: int) -> bool:
    return await raw.exists(key) == count


@pytest.mark.parametrize("on", ["request", "answer"])
@pytest.mark.parametrize("step", [CREATE, LINK], ids=lambda step: step.name)
async def test_a_fault_while_a_signed_in_session_begins(
    proxy: ChaosProxy, elsewhere: RedisSessionStore, step: Script, on: Direction
) -> None:
    """Its record is taken back: nobody can be signed in by a session that a sign-out would not find."""
    store = RedisSessionStore(f"{proxy.url}?socket_timeout=0.3")
    await store.open()
    proxy.inject(swallow, calls(step), on=on)
    with pytest.raises(SessionStoreError):
        await store.create("s", record("s"), _HOUR, _LOCK, "ada")
    proxy.heal()
    if step is LINK:
        await until(lambda: _is(ids(elsewhere), []))
    await store.aclose()


async def test_a_cancelled_move_leaves_the_old_session_or_the_new(
    redis_server: RedisServer, store: RedisSessionStore, elsewhere: RedisSessionStore, raw: Redis
) -> None:
    """At whichever step the request is cut off."""
    for step in (CREATE, SUCCEED, REMOVE):
        old, new = new_session_id(), new_session_id()
        await signed_in(store, old)
        checkout = await taken(store, old)
        state = await store._states.get()
        with pytest.MonkeyPatch.context() as patch:
            cancelling, victims = _cancelling(state, step)
            patch.setattr(state.commands, "call", cancelling)
            moving = asyncio.ensure_future(move(store, checkout, new, lock=_LOCK))
            victims.append(moving)
            await asyncio.wait((moving,))
        assert moving.cancelled(), step.name
        await store.release(checkout)
        listed = await ids(elsewhere)
        if checkout.successor is None:
            assert old in listed
            assert (await links(raw))[old] > 0
        else:
            assert new in listed
        if step is not CREATE:
            await elsewhere.delete_for_user("ada")
            assert await ids(elsewhere) == []
        await raw.flushdb()


def _cancelling(state: Any, step: Script) -> tuple[Callable[..., Any], list[asyncio.Future[Any]]]:
    """The state's way to make a call, but the task that makes one of this script is cancelled at once."""
    call = state.commands.call
    victims: list[asyncio.Future[Any]] = []

    def cancelling(script: Script, *rest: Any, **options: Any) -> Any:
        reply = call(script, *rest, **options)
        if script is step and victims:
            victims.pop().cancel()
        return reply

    return cancelling, victims


def test_scripts_are_where_the_tests_look_for_them() -> None:
    """Each of the index's scripts has a first line of its own."""
    folder = Path(__file__).parents[2] / "asgi_sessions" / "stores" / "redis" / "lua"
    heads = [
        (folder / f"{script.name}.lua").read_text().splitlines()[0]
        for script in (LINK, SUCCEED, MARK, SETTLE)
    ]
    assert len(set(heads)) == 4


# -- no more than so many sessions --------------------------------------------------------------------------


async def test_a_user_with_few_sessions_costs_one_call(store: RedisSessionStore, raw: Redis) -> None:
    """Whatever the number of other sessions; nothing is read."""
    for name in ("a", "b"):
        await signed_in(store, name)
    await raw.config_resetstat()
    assert await store.end_surplus("ada", 2, "b") == []
    stats = await raw.info("commandstats")
    assert {name for name in stats if not name.startswith(("cmdstat_info", "cmdstat_config"))} == {
        "cmdstat_zcard"
    }


async def test_links_that_lead_nowhere_do_not_count(store: RedisSessionStore, raw: Redis) -> None:
    """They are forgotten; what cannot be read here counts, and is ended last."""
    for name in ("a", "b", "c"):
        await signed_in(store, name)
    await store.delete("a")
    await age(raw, "a")
    assert await store.end_surplus("ada", 2, "c") == []
    assert sorted(await links(raw)) == ["b", "c"]
    await raw.set("session:{a}", "asgi9:a later release")
    await raw.zadd(_INDEX, {"a": 1})
    assert await store.end_surplus("ada", 2, "c") == ["b"]
    assert await raw.exists("session:{a}") == 1


async def test_the_idle_timeout_tells_who_was_idle(store: RedisSessionStore, raw: Redis) -> None:
    """Requests that only looked count too."""
    for name in ("a", "b", "c"):
        await signed_in(store, name, lifetime=Lifetime(3600, 600))
        await raw.pexpire(f"session:{{{name}}}", 300_000)
        await asyncio.sleep(0.01)
    await store.arrived(await taken(store, "a", None))
    assert await store.end_surplus("ada", 2, "c") == ["b"]


async def test_what_is_too_many_is_marked_once(store: RedisSessionStore, raw: Redis) -> None:
    """A second run of the call, and another sign-in, find what the first has marked, and mark no more."""
    for name in ("a", "b", "c", "d"):
        await signed_in(store, name)
    state = await store._states.get()
    args = _INDEX.encode(), b"2", b"d", b"a\nb\nc"
    marked = cast("list[bytes]", await state.commands.run(SURPLUS, *args))
    assert marked[::2] == [b"a", b"b"]
    assert await state.commands.run(SURPLUS, *args) == marked
    checkout = await taken(store, "a")
    assert await move(store, checkout, "new") is Outcome.GONE, "what is being ended moved away"
    assert await store.end_surplus("ada", 1, "d") == ["c"]
    assert await store.delete_for_user("ada", keep="d") == 1
    assert await ids(store) == ["d"]
