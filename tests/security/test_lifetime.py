"""How a session ends: by time, by logout, by somebody else, and never in vain."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

import anyio
import pytest
from asgi import Clock, chunk, page, start, stream
from redis import Redis

from asgi_sessions import (
    InMemorySessionStore,
    Session,
    SessionConflictError,
    SessionData,
    SessionStore,
)
from asgi_sessions.asgi import Receive, Scope, Send
from security.requirements import requirement
from security.service import Service, Visitor, login, logout, read, write

pytestmark = pytest.mark.anyio


def in_memory(clock: Clock, **options: Any) -> Service:
    return Service(InMemorySessionStore(clock=clock), options)


async def milliseconds_left(redis: Redis, visitor: Visitor) -> int:
    """What the server itself still gives the record."""
    left = redis.pttl(f"session:{{{visitor.session_id}}}")
    assert isinstance(left, int)
    return left


# -- by time -------------------------------------------------------------------------------------------


@requirement("TIME-1")
async def test_an_idle_session_ends(clock: Clock) -> None:
    """Each request starts the time anew, and a cookie that is kept longer is worth nothing."""
    visitor = in_memory(clock, idle_timeout=60, max_age=1000).visitor()
    await visitor.begin()
    for _ in range(5):
        clock.now += 59
        assert await visitor.sees() == {"n": 1}
    clock.now += 60
    assert await visitor.sees() == {}
    assert await visitor.service.store.count_active() == 0


@requirement("TIME-1")
async def test_an_idle_session_ends_on_redis(redis_url: str, redis: Redis) -> None:
    """The server's own expiry is the idle time, restarted by a request and by nothing else."""
    service = Service.on(redis_url, idle_timeout=60, max_age=1000)
    visitor = service.visitor()
    await visitor.begin()
    key = f"session:{{{visitor.session_id}}}"
    assert 55_000 < await milliseconds_left(redis, visitor) <= 60_000
    redis.pexpire(key, 20_000)
    assert await service.store.get(visitor.session_id) is not None
    assert await milliseconds_left(redis, visitor) <= 20_000, "looking from outside is no activity"
    await visitor.open(read)
    assert 55_000 < await milliseconds_left(redis, visitor) <= 60_000
    redis.pexpire(key, 1)
    while redis.exists(key):
        await anyio.lowlevel.checkpoint()
    assert await visitor.sees() == {}
    await service.store.aclose()


@requirement("TIME-2")
@pytest.mark.parametrize("act", [read, write, lambda session: session.regenerate_id()])
async def test_nothing_prolongs_the_absolute_time(clock: Clock, act: Any) -> None:
    """A session that is used all the time, under whichever id, ends when its first request said."""
    visitor = in_memory(clock, idle_timeout=60, max_age=100).visitor()
    await visitor.begin()
    for _ in range(3):
        clock.now += 30
        await visitor.open(act)
    clock.now += 9
    assert await visitor.sees() != {}
    clock.now += 1
    assert await visitor.sees() == {}


@requirement("TIME-2")
@pytest.mark.parametrize("act", [read, write, lambda session: session.regenerate_id()])
async def test_nothing_prolongs_the_absolute_time_on_redis(redis_url: str, redis: Redis, act: Any) -> None:
    """By the server's own expiry: an idle timeout that is longer never wins, nor does a new id."""
    service = Service.on(redis_url, idle_timeout=5000, max_age=100)
    visitor = service.visitor()
    await visitor.begin()
    left = await milliseconds_left(redis, visitor)
    assert left <= 100_000
    for _ in range(3):
        await visitor.open(act)
        now = await milliseconds_left(redis, visitor)
        assert now <= left + 1, "the session lives longer than before"
        left = now
    await service.store.aclose()


@requirement("TIME-2")
async def test_a_sign_in_begins_a_life_of_its_own(clock: Clock) -> None:
    """It does not inherit what was left to the visitor: the absolute time runs from the sign-in."""
    visitor = in_memory(clock, max_age=100).visitor()
    await visitor.begin()
    clock.now += 99
    await visitor.open(login)
    clock.now += 99
    assert await visitor.sees() == {"n": 1, "user": "ada"}
    clock.now += 1
    assert await visitor.sees() == {}


# -- by logout -----------------------------------------------------------------------------------------


@requirement("END-1")
@pytest.mark.parametrize(
    "act", [logout, lambda session: session.invalidate(), lambda session: session.clear()]
)
async def test_after_a_logout_the_cookie_is_worth_nothing(service: Service, act: Any) -> None:
    """The record is gone from the store, the browser told to forget, and a replay is anonymous."""
    visitor = service.visitor()
    await visitor.begin(secret="s")
    await visitor.open(login)
    replay = visitor.copy()
    answer = await visitor.open(act)
    assert visitor.token is None, "the browser was not told to forget its cookie"
    assert answer.header("cache-control") == ["no-store"]
    assert not await service.store.exists(replay.session_id)
    assert await service.store.list_for_user("ada") == []
    assert await replay.sees() == {}


@requirement("END-1")
async def test_what_comes_after_a_logout_has_nothing_of_before(service: Service) -> None:
    """A message for the next page begins a session of its own."""
    visitor = service.visitor()
    await visitor.begin(secret="s")
    await visitor.open(login)
    old = visitor.session_id

    def act(session: Session) -> None:
        session.logout()
        session["flash"] = "bye"

    await visitor.open(act)
    assert visitor.session_id != old
    assert await visitor.sees() == {"flash": "bye"}


# -- by somebody else, while a request holds it ----------------------------------------------------------


@requirement("END-2")
@pytest.mark.parametrize("lock", [True, False])
async def test_a_held_session_that_is_deleted_stays_deleted(store: SessionStore, lock: bool) -> None:
    """`save()` raises, the answer is 409, and nothing that the request changed is stored."""
    service = Service(store, {"lock": lock})
    visitor = service.visitor()
    session_id = await visitor.begin()
    errors: list[Exception] = []

    async def act(session: Session) -> None:
        session["n"] = 2
        await store.delete(session_id)
        try:
            await session.save()
        except SessionConflictError as error:
            errors.append(error)

    answer = await visitor.open(act)
    assert len(errors) == 1, "save() stored into a session that has ended"
    assert (answer.status, answer.cookies) == (409, []), "the answer to whoever ended it removes the cookie"
    assert not await store.exists(session_id)
    assert await store.count_active() == 0
    assert await visitor.sees() == {}


@requirement("END-2")
@pytest.mark.parametrize("end", [page, stream])
async def test_a_held_session_that_is_signed_out_everywhere_stays_ended(service: Service, end: Any) -> None:
    """A password change elsewhere wins over every request under way, and over what it streams."""
    visitor = service.visitor()
    await visitor.begin()
    await visitor.open(login)
    replay = visitor.copy()

    async def act(session: Session) -> None:
        session["n"] = 2
        assert await service.store.delete_for_user("ada") == 1

    answer = await visitor.use(end(act))
    assert (answer.status, answer.cookies) == (409, []), "the answer to whoever ended it removes the cookie"
    assert await service.store.count_active() == 0
    assert await replay.sees() == {}


@requirement("END-2")
async def test_a_stream_cannot_store_into_an_ended_session(service: Service) -> None:
    """The last chunk of an answer is not sent as if all were well."""
    visitor = service.visitor()
    session_id = await visitor.begin()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        scope["session"]["n"] = 2
        await send(start())
        await send(chunk(b"part", more=True))
        await service.store.delete(session_id)
        scope["session"]["n"] = 3
        await send(chunk())

    with pytest.raises(SessionConflictError):
        await visitor.use(app)
    assert await service.store.count_active() == 0


@requirement("END-2")
async def test_an_open_websocket_cannot_bring_a_session_back(service: Service) -> None:
    """Its next transaction fails."""
    visitor = service.visitor()
    session_id = await visitor.begin()
    refused: list[Exception] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "websocket.accept"})
        await service.store.delete(session_id)
        try:
            async with scope["session"].transaction() as data:
                data.metadata["n"] = 2
        except SessionConflictError as error:
            refused.append(error)

    await visitor.connect(app)
    assert len(refused) == 1
    assert await service.store.count_active() == 0


# -- everywhere ----------------------------------------------------------------------------------------


@requirement("END-3")
async def test_the_sessions_of_a_user_are_listed_and_ended(service: Service) -> None:
    """Three devices of one user: all but one signed out, then all; somebody else is left alone."""
    devices = [service.visitor(address=f"198.51.100.{number}") for number in (1, 2, 3)]
    other = service.visitor()
    for device in devices:
        await device.open(login)
    await other.open(lambda session: session.login("bob"))
    listed = await service.store.list_for_user("ada")
    assert {data.session_id for data in listed} == {device.session_id for device in devices}

    here = devices[0]
    assert await service.store.delete_for_user("ada", keep=here.session_id) == 2
    assert [await device.sees() for device in devices] == [{"user": "ada"}, {}, {}]
    assert await service.store.delete_for_user("ada") == 1
    assert await here.sees() == {}
    assert await other.sees() == {"user": "bob"}


@requirement("END-3")
async def test_a_changed_user_is_found(service: Service) -> None:
    """A session that became another user's is ended with that one's, not with the first."""
    visitor = service.visitor()
    await visitor.open(login)

    def become(session: Session) -> None:
        session.data.user_id = "bob"

    await visitor.open(become)
    assert await service.store.delete_for_user("ada") == 0
    assert await visitor.sees() == {"user": "bob"}
    assert await service.store.delete_for_user("bob") == 1
    assert await visitor.sees() == {}


@requirement("END-3")
async def test_a_session_that_moves_meanwhile_is_ended_too(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who changes ids all the time, a thief for instance, is signed out with the others."""
    visitor, moves = service.visitor(), 3
    await visitor.open(login)
    listed = service.store.list_for_user

    async def list_and_let_it_move(user_id: str) -> list[SessionData]:
        nonlocal moves
        found = await listed(user_id)
        if moves:
            moves -= 1
            await visitor.open(lambda session: session.regenerate_id())
        return found

    monkeypatch.setattr(service.store, "list_for_user", list_and_let_it_move)
    assert await service.store.delete_for_user("ada") == 1
    assert await visitor.sees() == {}
    assert await service.store.count_active() == 0


class FourPrimitives(SessionStore):
    """A store of somebody else: what it does not have itself, the base does with what it has."""

    def __init__(self) -> None:
        super().__init__()
        self.values: dict[str, bytes] = {}

    async def read_value(self, session_id: str) -> bytes | None:
        return self.values.get(session_id)

    async def write_value(self, session_id: str, value: bytes, ttl: float) -> None:
        self.values[session_id] = value

    async def delete_value(self, session_id: str) -> None:
        self.values.pop(session_id, None)

    async def iter_ids(self) -> AsyncGenerator[str, None]:
        for session_id in list(self.values):
            yield session_id


@requirement("END-3")
@pytest.mark.parametrize("nobody", [None, ""])
@pytest.mark.parametrize("derived", [False, True])
async def test_nobody_has_no_sessions(store: SessionStore, nobody: Any, derived: bool) -> None:
    """The user id of a visitor who is not signed in names no session, least of all every session."""
    service = Service(FourPrimitives() if derived else store)
    visitor, anonymous = service.visitor(), service.visitor()
    await visitor.open(login)
    await anonymous.begin()
    assert await service.store.list_for_user(nobody) == []
    assert await service.store.delete_for_user(nobody) == 0
    assert await visitor.sees() == {"user": "ada"}
    assert await anonymous.sees() == {"n": 1}
