"""Login: the id that was known before is worth nothing after it, in any order of events."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import anyio
import pytest
from asgi import KEY, Clock, page, start, stream
from redis import Redis

from asgi_sessions import InMemorySessionStore, Session, SessionClosedError, SessionStore
from asgi_sessions.asgi import ASGIApp, Receive, Scope, Send
from asgi_sessions.client.cookie import SessionCookie
from security.requirements import requirement
from security.service import Service, Visitor, login, logout, read, write

pytestmark = pytest.mark.anyio


def regenerate(session: Session) -> None:
    session.regenerate_id()


def login_without_values(session: Session) -> None:
    session.clear()
    session.login("ada")


async def plant(service: Service) -> tuple[Visitor, Visitor]:
    """An attacker, and a victim whose browser was given the attacker's cookie."""
    attacker = service.visitor()
    await attacker.begin(planted=True)
    return attacker, attacker.copy()


@requirement("FIX-1")
@pytest.mark.parametrize("act", [login, regenerate, login_without_values])
async def test_a_planted_session_is_dead_after_the_login(service: Service, act: Any) -> None:
    """The attacker, whose client looks just like the victim's, stays anonymous with the old cookie."""
    attacker, victim = await plant(service.option(fingerprint=None))
    planted = attacker.session_id
    await victim.open(act)
    await victim.open(lambda session: session.update(secret="s"))
    assert victim.session_id != planted
    assert not await service.store.exists(planted)
    assert await attacker.sees() == {}
    assert (await attacker.open(write)).status == 409, "what cannot be stored is not acknowledged"
    assert (await victim.sees())["secret"] == "s"


@requirement("FIX-1")
async def test_a_planted_session_never_comes_back(clock: Clock) -> None:
    """A minute later, when the replaced id is forgotten, it is unknown; writing begins another session."""
    service = Service(InMemorySessionStore(clock=clock), {"fingerprint": None})
    attacker, victim = await plant(service)
    planted = attacker.session_id
    await victim.open(login)
    clock.now += 61
    assert await attacker.sees() == {}
    await attacker.open(write)
    assert attacker.session_id not in (planted, victim.session_id)
    assert await attacker.sees() == {"n": 1}


async def as_oauth_clients_do(session: Session) -> None:
    """The state that was kept for the way back goes, the provider's claims come."""
    session.pop("_state_provider_x", None)
    session["user"] = {"iss": "https://id.example", "sub": "4711", "email": "ada@example.com"}


async def as_admin_panels_do(session: Session) -> None:
    """Two of them: a name, and a token of their own."""
    session.update({"username": "ada"})


async def as_other_admin_panels_do(session: Session) -> None:
    session.update({"token": "..."})


async def as_login_managers_do(session: Session) -> None:
    session["_user_id"], session["_fresh"] = "4711", True


async def as_libraries_do_that_know_of_fixation(session: Session) -> None:
    """Where the session has the method, it is awaited."""
    await session.regenerate_id()
    session["_auth_user_id"] = "4711"


async def as_tutorials_do(session: Session) -> None:
    session.clear()
    session["user_id"] = 4711


async def in_the_typed_record(session: Session) -> None:
    session.data.user_id = "ada"


async def in_a_transaction(session: Session) -> None:
    async with session.transaction():
        session["user"] = "ada"


async def saved_early(session: Session) -> None:
    session["user"] = "ada"
    await session.save()
    session["seen"] = 1


SIGN_INS = [
    as_oauth_clients_do,
    as_admin_panels_do,
    as_other_admin_panels_do,
    as_login_managers_do,
    as_libraries_do_that_know_of_fixation,
    as_tutorials_do,
    in_the_typed_record,
    in_a_transaction,
    saved_early,
]


@requirement("FIX-1")
@pytest.mark.parametrize("act", SIGN_INS)
async def test_a_sign_in_by_assignment_gives_a_new_id(service: Service, act: Any) -> None:
    """An app that never heard of `login()` is safe from a planted cookie too."""
    attacker, victim = await plant(service.option(fingerprint=None))
    planted = attacker.session_id
    await victim.open(act)
    await victim.open(lambda session: session.update(secret="s"))
    assert victim.session_id != planted
    assert not await service.store.exists(planted)
    assert await attacker.sees() == {}
    assert (await victim.sees())["secret"] == "s"


@requirement("FIX-1")
@pytest.mark.parametrize("act", [as_oauth_clients_do, as_admin_panels_do, as_login_managers_do])
async def test_a_planted_session_that_is_signed_in(service: Service, act: Any) -> None:
    """The attacker's own account: when somebody else signs in over it, the attacker is out."""
    attacker = service.option(fingerprint=None).visitor()
    who = {"user": {"sub": "666"}, "username": "eve", "_user_id": "666", "token": "..."}
    await attacker.begin(**who)
    victim, planted = attacker.copy(), attacker.session_id
    await victim.open(act)
    assert victim.session_id != planted
    assert await attacker.sees() == {}


@requirement("FIX-1")
async def test_who_stays_signed_in_keeps_the_id(service: Service) -> None:
    """Other values, claims that are refreshed, and a sign-out by assignment leave it."""
    visitor = service.visitor()
    await visitor.begin(user={"sub": "1", "exp": 1}, token="a")
    before = visitor.session_id
    for change in (
        lambda session: session["user"].update(exp=2),
        lambda session: session.update(token="b", cart=[1]),
        lambda session: session.pop("user"),
    ):
        await visitor.open(change)
        assert visitor.session_id == before
    assert await visitor.sees() == {"token": "b", "cart": [1]}


@requirement("FIX-1")
async def test_who_does_not_want_it_turns_it_off(service: Service) -> None:
    """`rotate_on=()`."""
    visitor = service.option(rotate_on=()).visitor()
    before = await visitor.begin()
    await visitor.open(lambda session: session.update(user="ada"))
    assert visitor.session_id == before


@requirement("FIX-1")
async def test_a_sign_in_that_comes_too_late_is_refused(service: Service) -> None:
    """In a stream, or on a WebSocket that is open, no cookie can be sent: nobody is signed in."""
    visitor = service.visitor()
    before = await visitor.begin(n=1)
    with pytest.raises(SessionClosedError, match=r"login\(\).*before the response starts"):
        await visitor.use(stream(write, lambda session: session.update(user="ada")))

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "websocket.accept"})
        async with scope["session"].transaction():
            scope["session"]["user"] = "ada"

    await visitor.connect(app)
    data = await service.store.get(before)
    assert data is not None
    assert data.metadata == {"n": 2}


@requirement("FIX-1")
async def test_every_login_gives_a_new_id(service: Service) -> None:
    """Signing in again, as the same user or another, too."""
    visitor = service.visitor()
    ids = [await visitor.begin()]
    for user in ("ada", "ada", "bob"):
        await visitor.open(lambda session, user=user: session.login(user))
        ids.append(visitor.session_id)
        assert (await visitor.sees())["user"] == user
    assert len(set(ids)) == 4
    assert await service.store.list_active() == [ids[-1]]


@requirement("FIX-1")
async def test_a_login_on_a_websocket(service: Service) -> None:
    """The new id rides on the accept, and the old one is dead."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        async with scope["session"].transaction():
            scope["session"].login("ada")
        await send({"type": "websocket.accept"})

    visitor = service.visitor()
    old = await visitor.begin()
    (accept,) = await visitor.connect(app)
    (line,) = [value.decode() for name, value in accept["headers"] if name == b"set-cookie"]
    late = visitor.copy()
    visitor.token = line.partition("=")[2].partition(";")[0]
    assert visitor.session_id != old
    assert (await visitor.sees())["user"] == "ada"
    assert await late.sees() == {}


# -- late answers --------------------------------------------------------------------------------------


def failing(session: Session) -> None:
    raise RuntimeError("the app fails")


LATE: dict[str, ASGIApp] = {
    "a page that reads": page(read),
    "a page that writes": page(write),
    "a page that empties the session": page(lambda session: session.clear()),
    "a page that signs out": page(logout),
    "a page that wants a new id": page(regenerate),
    "a stream": stream(read, read),
    "a stream that writes": stream(write),
    "an error page": page(write, status=500),
}


@requirement("FIX-2")
@pytest.mark.parametrize("name", LATE)
async def test_a_late_answer_sets_no_cookie(service: Service, name: str) -> None:
    """A request that was sent with the old id before the login came back leaves the new cookie alone."""
    visitor = service.visitor()
    await visitor.begin()
    late = visitor.copy()
    await visitor.open(login)
    answer = await late.use(LATE[name])
    assert answer.cookies == []
    assert (await visitor.sees())["user"] == "ada"


def aged(visitor: Visitor, key: str = KEY) -> str:
    """The visitor's cookie as it was signed over an hour ago."""
    cookie = SessionCookie(key, clock=lambda: time.time() - 4000)
    return cookie.signer.sign(visitor.session_id)


UNLOCKED: dict[str, dict[str, Any]] = {
    "rolling, on a read-only route": {"rolling": True, "read_only": ["/slow"]},
    "rolling, without locks": {"rolling": True, "lock": False},
    "rolling, optimistically": {"rolling": True, "lock": "auto"},
    "rolling, the lock let go early": {"rolling": True},
    "a rotated key, on a read-only route": {
        "secret_key": KEY[::-1],
        "secret_key_fallbacks": [KEY],
        "read_only": ["/slow"],
    },
    "a rotated key, the lock let go early": {"secret_key": KEY[::-1], "secret_key_fallbacks": [KEY]},
}


@requirement("FIX-2")
@pytest.mark.parametrize(
    "end", [page, stream, lambda act: page(act, status=500)], ids=["page", "stream", "error"]
)
@pytest.mark.parametrize("how", UNLOCKED)
async def test_a_refreshed_cookie_does_not_overwrite_a_new_one(
    store: SessionStore, how: str, end: Callable[[Any], ASGIApp]
) -> None:
    """A slow request that does not hold the lock is still answering when its client has signed in."""
    service = Service(store, UNLOCKED[how])
    visitor = service.visitor()
    await visitor.begin()
    visitor.token = aged(visitor)
    slow = visitor.copy()

    async def sign_in_meanwhile(session: Session) -> None:
        if "let go" in how:
            await session.release()
        await visitor.open(login)

    answer = await slow.use(end(sign_in_meanwhile), path="/slow")
    assert answer.cookies == [], "the late answer sets the old cookie again"
    assert (await visitor.sees())["user"] == "ada"


@requirement("FIX-2")
@pytest.mark.parametrize("kind", ["accepted", "denied"])
async def test_a_late_websocket_does_not_overwrite_a_new_cookie(store: SessionStore, kind: str) -> None:
    """The same for a handshake that is answered after the login."""
    service = Service(store, {"rolling": True})
    visitor = service.visitor()
    await visitor.begin()
    visitor.token = aged(visitor)
    slow = visitor.copy()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await visitor.open(login)
        if kind == "accepted":
            await send({"type": "websocket.accept"})
        else:
            await send({**start(403), "type": "websocket.http.response.start"})

    (answer,) = await slow.connect(app)
    assert [value for name, value in answer["headers"] if name == b"set-cookie"] == []


@requirement("FIX-2")
@pytest.mark.parametrize("how", UNLOCKED)
async def test_a_cookie_is_refreshed_while_its_session_lives(store: SessionStore, how: str) -> None:
    """What protects the new cookie does not keep an old one from being renewed."""
    service = Service(store, UNLOCKED[how])
    visitor = service.visitor()
    session_id = await visitor.begin()
    visitor.token = before = aged(visitor)
    await visitor.open(read, path="/slow")
    assert visitor.session_id == session_id
    assert visitor.token != before


# -- logins at once ------------------------------------------------------------------------------------


async def assert_logins_race_well(store: SessionStore, *, lock: bool | str) -> None:
    """Of eight from one page one inherits the cart; nobody is signed in as another or shares an id."""
    service = Service(store, {"lock": lock})
    visitor = service.visitor()
    planted = await visitor.begin(cart="full")
    tabs = [visitor.copy() for _ in range(8)]
    statuses: dict[int, int] = {}

    async def sign_in(number: int) -> None:
        async def act(session: Session) -> None:
            session.get("cart")
            await anyio.lowlevel.checkpoint()
            session.login(f"user-{number}")

        statuses[number] = (await tabs[number].open(act)).status

    async with anyio.create_task_group() as group:
        for number in range(8):
            group.start_soon(sign_in, number)

    signed_in = [number for number in range(8) if statuses[number] == 200]
    assert set(statuses.values()) <= ({200} if lock else {200, 409})
    assert signed_in, "nobody was signed in"
    seen = {number: await tabs[number].sees() for number in signed_in}
    assert {number: found["user"] for number, found in seen.items()} == {n: f"user-{n}" for n in signed_in}
    assert len([found for found in seen.values() if "cart" in found]) == 1
    assert len({tabs[number].session_id for number in signed_in}) == len(signed_in)
    assert not await store.exists(planted)
    assert await store.count_active() == len(signed_in), "a session is left that nobody has"


@requirement("FIX-3")
@pytest.mark.parametrize("lock", [True, "auto"])
async def test_logins_that_race_are_sessions_of_their_own(store: SessionStore, lock: bool | str) -> None:
    """With locks each has its turn, and whoever comes later finds the page's session gone."""
    await assert_logins_race_well(store, lock=lock)


@requirement("FIX-3")
async def test_unlocked_logins_that_race_are_sessions_of_their_own(store: SessionStore) -> None:
    """Without them all but one are answered 409."""
    await assert_logins_race_well(store, lock=False)


@requirement("FIX-3")
async def test_a_login_after_a_lost_lease_is_refused(redis_url: str, redis: Redis) -> None:
    """A worker that was frozen wakes up when its session was signed in by another: it signs in nobody."""
    service = Service.on(redis_url)
    visitor = service.visitor()
    await visitor.begin(cart="full")
    frozen = visitor.copy()

    async def sleep_past_the_lease(session: Session) -> None:
        session.get("cart")
        redis.delete(f"session:{{{visitor.session_id}}}:lock")
        await visitor.open(login)
        session.login("bob")

    assert (await frozen.open(sleep_past_the_lease)).status == 409
    assert await visitor.sees() == {"cart": "full", "user": "ada"}
    assert await service.store.count_active() == 1, "the cart is in two sessions"
    await service.store.aclose()


@requirement("FIX-3")
async def test_a_login_that_waits_behind_a_logout_is_anonymous_before_it(service: Service) -> None:
    """Logout and login from two tabs at once: what was in the session that ended is not in the new one."""
    visitor = service.visitor()
    await visitor.begin(secret="s")
    other, done = visitor.copy(), anyio.Event()

    async def sign_in() -> None:
        await other.open(login)
        done.set()

    async def sign_out(session: Session) -> None:
        group.start_soon(sign_in)
        await anyio.wait_all_tasks_blocked()
        session.logout()

    async with anyio.create_task_group() as group:
        await visitor.open(sign_out)
        await done.wait()
    assert await other.sees() == {"user": "ada"}
