"""What is said: to caches, to clients, and to whoever reads the logs."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

import pytest
from asgi import FIREFOX, KEY, Answer, Clock, page, stream
from pydantic import AfterValidator
from redis_server import RedisServer, free_port

from asgi_sessions import (
    InMemorySessionStore,
    RedisSessionStore,
    Session,
    SessionData,
    SessionStore,
    SessionStoreError,
)
from asgi_sessions.client.caching import Sharing, sharing
from asgi_sessions.client.cookie import SessionCookie
from asgi_sessions.client.signer import CookieSigner
from security.requirements import requirement
from security.service import CHROME, Service, Visitor, login, logout, read, write

pytestmark = pytest.mark.anyio

PASSWORD = "correct-horse-battery-staple"


def refuse(session: Session) -> None:
    session["bad"] = object()


# -- caches --------------------------------------------------------------------------------------------


@requirement("CACHE-1")
@pytest.mark.parametrize("act", [read, write, login, logout, lambda session: session.data.user_id])
async def test_what_depends_on_the_session_says_so(service: Service, act: Any) -> None:
    """`Vary: Cookie`, merged into what the app says, for streams and known visitors too."""
    visitor = service.visitor()
    for app in (page(act), stream(act), page(act, headers=[(b"vary", b"Accept")])):
        answer = await visitor.use(app)
        varied = ", ".join(answer.header("vary"))
        assert "Cookie" in varied, f"{varied!r} hides that the answer depends on the session"
    assert "Accept" in varied


@requirement("CACHE-1")
async def test_what_does_not_depend_on_it_can_be_cached(service: Service) -> None:
    """An untouched session adds no header, so that pages for everybody stay what they are."""
    visitor = service.visitor()
    assert [name for name, _ in (await visitor.open()).headers] == [b"content-length"]
    await visitor.begin()
    assert [name for name, _ in (await visitor.open()).headers] == [b"content-length"]


@requirement("CACHE-1")
async def test_an_answer_with_a_cookie_is_not_stored(service: Service) -> None:
    """A shared cache never hands one visitor's cookie to another; what the app said is left alone."""
    visitor = service.visitor()
    for act in (write, login, logout):
        answer = await visitor.open(act)
        assert len(answer.cookies) == 1
        assert answer.header("cache-control") == ["no-store"]
    answer = await visitor.use(page(write, headers=[(b"cache-control", b"private")]))
    assert answer.header("cache-control") == ["private"]


@requirement("CACHE-1")
@pytest.mark.parametrize(
    ("says", "sent"),
    [
        ({"Cache-Control": "public, max-age=600"}, False),
        ({"Cache-Control": "max-age=600"}, False),
        ({"Cache-Control": "s-maxage=600"}, False),
        ({"Cache-Control": "public, max-age=0"}, False),
        ({"Cache-Control": "max-age=60"}, False),
        ({"Cache-Control": "must-revalidate", "Expires": "Fri, 01 Jan 2100 00:00:00 GMT"}, False),
        ({"Expires": "Fri, 01 Jan 2100 00:00:00 GMT"}, False),
        ({"CDN-Cache-Control": "max-age=60", "Cache-Control": "no-store"}, False),
        ({"Cloudflare-CDN-Cache-Control": "max-age=60"}, False),
        ({"Surrogate-Control": "max-age=60", "Cache-Control": "private"}, False),
        ({"X-Accel-Expires": "60"}, False),
        ({"Cache-Control": "no-cache"}, True),
        ({"Cache-Control": "max-age=0"}, True),
        ({"Cache-Control": "must-revalidate"}, True),
        ({"Cache-Control": "private, max-age=600"}, True),
        ({"Cache-Control": "no-store"}, True),
        ({}, True),
    ],
)
@pytest.mark.parametrize("why", ["rolling", "rotated"])
async def test_a_cookie_is_not_refreshed_on_a_page_for_everybody(
    store: SessionStore, says: dict[str, str], sent: bool, why: str
) -> None:
    """A page that caches may keep never carries the cookie of who happened to ask for it.

    Where the app neither allows nor forbids it, the answer with the cookie does.
    """
    rotation = {"secret_key": KEY[::-1], "secret_key_fallbacks": [KEY]}
    service = Service(store, {"rolling": True} if why == "rolling" else rotation)
    visitor = service.visitor()
    await visitor.begin()
    aged = SessionCookie(KEY, clock=lambda: time.time() - 4000)
    visitor.token = aged.signer.sign(visitor.session_id)
    headers = [(name.encode(), value.encode()) for name, value in says.items()]
    answer = await visitor.use(page(headers=headers))
    assert len(answer.cookies) == int(sent)
    if sent:
        assert sharing(answer.headers, time.time()) is Sharing.FORBIDDEN
    else:
        assert answer.headers[1:] == headers


@requirement("CACHE-1")
async def test_a_cookie_is_not_refreshed_with_a_304(store: SessionStore) -> None:
    """It would join the page that caches have kept (RFC 9111 section 3.2)."""
    service = Service(store, {"rolling": True})
    visitor = service.visitor()
    await visitor.begin()
    aged = SessionCookie(KEY, clock=lambda: time.time() - 4000)
    visitor.token = aged.signer.sign(visitor.session_id)
    assert (await visitor.use(page(status=304))).cookies == []
    assert len((await visitor.use(page())).cookies) == 1


# -- errors --------------------------------------------------------------------------------------------


async def absurd(service: Service) -> Answer:
    return await service.request(page(), [(b"cookie", b"a" * 70_000)])


async def unstorable(service: Service) -> Answer:
    return await service.visitor().open(refuse)


async def overtaken(service: Service) -> Answer:
    visitor = service.option(lock=False).visitor()
    await visitor.begin()

    async def act(session: Session) -> None:
        await visitor.copy().open(write)
        session["n"] = 5

    return await visitor.open(act)


async def crowded(service: Service) -> Answer:
    visitor = service.option(max_waiters=0).visitor()
    await visitor.begin()
    answers = []

    async def act(session: Session) -> None:
        answers.append(await visitor.copy().open(write))

    await visitor.open(act)
    return answers[0]


async def kept_waiting(service: Service) -> Answer:
    return await crowded(service.option(lock_wait=0.01))


ANSWERS: dict[str, tuple[Callable[[Service], Awaitable[Answer]], int]] = {
    "absurd cookies": (absurd, 400),
    "an unstorable value": (unstorable, 500),
    "another writer came first": (overtaken, 409),
    "too many waiters": (crowded, 503),
    "waited too long": (kept_waiting, 503),
}


@requirement("ERR-1")
@pytest.mark.parametrize("name", ANSWERS)
async def test_its_own_answers_say_nothing(service: Service, name: str) -> None:
    """Plain text for people: no id, no key of a value, no class of an error; never cached."""
    provoke, status = ANSWERS[name]
    answer = await provoke(service)
    assert answer.status == status
    assert_generic(answer)


def assert_generic(answer: Answer) -> None:
    text = answer.body.decode()
    assert not [
        word for word in ("Error", "Traceback", "asgi", "redis", "bad", "lock", '"', "/") if word in text
    ]
    assert len(text) < 120
    assert answer.header("content-type") == ["text/plain; charset=utf-8"]
    assert answer.header("cache-control") == ["no-store"]
    allowed = {b"content-type", b"content-length", b"cache-control", b"retry-after"}
    assert {header for header, _ in answer.headers} <= allowed


@asynccontextmanager
async def dying(url: str, **options: Any) -> AsyncIterator[Service]:
    store = RedisSessionStore(url, socket_timeout=2)
    yield Service(store, options)
    await store.aclose()


@requirement("ERR-1", "ERR-2")
async def test_with_the_store_down_nothing_is_acknowledged(own_redis: RedisServer) -> None:
    """503 for who has a session or begins one, in general words; pages that need none are served."""
    async with dying(own_redis.url) as service:
        visitor = service.visitor()
        await visitor.begin()
        token = visitor.token
        own_redis.kill()
        for act in (read, write, login, logout):
            answer = await visitor.open(act)
            assert answer.status == 503, "a session is treated as absent because the store is down"
            assert_generic(answer)
            assert visitor.token == token
        beginning = await service.visitor().open(write)
        assert (beginning.status, beginning.cookies) == (503, [])
        assert (await service.visitor().open(read)).status == 200
        assert (await service.visitor().open()).status == 200


@requirement("ERR-2")
async def test_with_the_store_gone_before_the_commit_nothing_is_acknowledged(own_redis: RedisServer) -> None:
    """The app's 200 never leaves, with or without a known length."""
    async with dying(own_redis.url) as service:
        for app in (page, stream):
            visitor = service.visitor()
            await visitor.begin()

            def act(session: Session) -> None:
                session["n"] = 2
                own_redis.kill()

            assert (await visitor.use(app(act))).status == 503
            own_redis.start()


@requirement("ERR-2")
async def test_a_failed_request_changes_nothing(service: Service) -> None:
    """An exception or an error page rolls back a login and a logout too."""
    visitor = service.visitor()
    session_id = await visitor.begin(secret="s")

    def fail(act: Any) -> Any:
        def then(session: Session) -> None:
            act(session)
            raise RuntimeError("the app fails")

        return then

    for act in (write, login, logout):
        with pytest.raises(RuntimeError, match="the app fails"):
            await visitor.open(fail(act))
        await visitor.use(page(act, status=500))
        assert await visitor.sees() == {"secret": "s"}
        assert visitor.session_id == session_id


# -- what an answer gives away -------------------------------------------------------------------------


async def strangers(service: Service) -> dict[str, Visitor]:
    """One of each kind of visitor without a session of theirs."""
    ended, expired, owner = service.visitor(), service.visitor(), service.visitor()
    for visitor in (ended, expired, owner):
        await visitor.open(login)
    replay, gone = ended.copy(), expired.copy()
    await ended.open(logout)
    await service.store.delete(gone.session_id)
    foreign = service.option(secret_key=KEY[::-1]).visitor()
    await foreign.begin()
    return {
        "nobody": service.visitor(),
        "garbage": service.visitor(token="garbage"),
        "forged": service.visitor(token=(owner.token or "")[:-1] + "!"),
        "signed with another key": foreign.copy(service=service),
        "never stored": service.visitor(token=CookieSigner(KEY).sign("0" * 32)),
        "signed out": replay,
        "expired": gone,
        "somebody else's": owner.copy(address="198.51.100.9"),
    }


@requirement("ERR-3")
@pytest.mark.parametrize("act", [read, refuse, login])
async def test_strangers_are_answered_alike(service: Service, act: Any) -> None:
    """Byte for byte: nobody learns from an answer which ids, keys or users there are."""

    def show(session: Session) -> bytes:
        return json.dumps([dict(session), session.is_new, session.data.user_id]).encode()

    answers = {}
    for name, visitor in (await strangers(service)).items():
        shown: list[bytes] = []
        answer = await visitor.open(lambda session, shown=shown: (shown.append(show(session)), act(session)))
        headers = [(key, value if key != b"set-cookie" else b"session=...") for key, value in answer.headers]
        answers[name] = (answer.status, headers, answer.body, shown)
    assert {name for name, answer in answers.items() if answer != answers["nobody"]} == set()


# -- logs ----------------------------------------------------------------------------------------------


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """Everything that any library logs."""
    with caplog.at_level(logging.DEBUG):
        yield caplog


def secrets_of(visitor: Visitor) -> set[str]:
    token = visitor.token or ""
    return {token, visitor.session_id, token[-43:]}


async def a_life(service: Service) -> set[str]:
    """Everything that can happen to sessions; the secrets that were met."""
    known: set[str] = set()
    visitor = service.visitor()
    for act in (write, read, login, write, refuse, lambda session: session.regenerate_id()):
        await visitor.open(act)
        known |= secrets_of(visitor)
        await visitor.copy(user_agent=CHROME).open(write)
        await visitor.copy(token=(visitor.token or "")[:-1]).open(read)
        await visitor.copy().open(read, [(b"cookie", f"session={visitor.token}; a=b".encode())])
    other = service.visitor()
    await other.begin()
    known |= secrets_of(other)
    await visitor.open(read, [(b"cookie", f"session={other.token}".encode())])
    data = await service.store.get(visitor.session_id)
    assert data is not None
    assert data.fingerprint is not None
    known.add(data.fingerprint)
    replay = visitor.copy()
    await visitor.open(login)
    known |= secrets_of(visitor)
    await replay.open(write)
    await overtaken(service)
    await crowded(service)
    await visitor.open(logout)
    await replay.open(read)
    return known


@requirement("LOG-1")
async def test_logs_and_events_have_no_secret(service: Service, log: pytest.LogCaptureFixture) -> None:
    """Neither ids nor cookies nor signatures nor keys nor fingerprints nor what identifies a client."""
    known = await a_life(service) | {KEY, FIREFOX, CHROME, "203.0.113.7"}
    told = [record.getMessage() for record in log.records] + [repr(event) for event in service.history]
    assert len(service.history) > 20
    assert [record for record in log.records if record.name == "asgi_sessions"]
    for line in told:
        assert not [secret for secret in known if secret in line], line


@requirement("LOG-1")
async def test_a_session_has_a_short_hash(service: Service) -> None:
    """The same in all its events, another for another session, and not made from the id alone."""
    visitor, other = service.visitor(), service.visitor()
    for one in (visitor, other):
        await one.open(write)
        await one.copy(user_agent=CHROME).open(read)
    named: dict[str, set[str | None]] = {}
    for event in service.events:
        named.setdefault(event.name, set()).add(event.session)
    assert named["session_created"] == named["fingerprint_mismatch"]
    hashes = named["session_created"]
    assert len(hashes) == 2
    assert all(shown and len(shown) == 12 and shown not in visitor.session_id for shown in hashes)


async def wrong_password(port: int) -> RedisSessionStore:
    return RedisSessionStore(f"redis://:{PASSWORD}@127.0.0.1:{port}/0", socket_timeout=2)


@requirement("LOG-1")
@pytest.mark.parametrize("fault", ["refused", "wrong"])
async def test_the_stores_password_is_not_told(fault: str, log: pytest.LogCaptureFixture) -> None:
    """Not when nobody listens there, nor when the server refuses it; the health check is silent too."""
    with RedisServer("--requirepass", "another") as server:
        store = await wrong_password(server.port if fault == "wrong" else free_port())
        service = Service(store)
        assert (await service.visitor().open(write)).status == 503
        health = await store.health_check()
        await store.aclose()
    assert health["healthy"] is False
    told = [record.getMessage() for record in log.records] + [repr(event) for event in service.events]
    assert "store_error" in service.told
    assert not [line for line in [*told, repr(health), repr(store)] if PASSWORD in line or "another" in line]


@requirement("LOG-1")
@pytest.mark.parametrize(
    "url", [f"redis:user:{PASSWORD}@host", f"memcached://:{PASSWORD}@host", f"user:{PASSWORD}@host:6379"]
)
def test_a_wrong_url_is_not_quoted(url: str) -> None:
    """The error that is seen when the app does not start has no password in it."""
    with pytest.raises(ValueError, match="begins with one of memory://") as caught:
        Service(url)  # type: ignore[arg-type]  # the middleware takes a URL too
    assert PASSWORD not in str(caught.value)


@requirement("LOG-1")
async def test_errors_have_no_id(own_redis: RedisServer) -> None:
    """What an app's error reporting shows of a store that failed, and of what caused it."""
    async with dying(own_redis.url) as service:
        visitor = service.visitor()
        session_id = await visitor.begin()
        caught: list[BaseException] = []

        async def act(session: Session) -> None:
            own_redis.kill()
            try:
                session["n"] = 2
                await session.save()
            except SessionStoreError as error:
                caught.append(error)
                raise

        await visitor.open(act)
        error: BaseException | None = caught[0]
        while error is not None:
            assert session_id not in f"{error} {error!r}"
            error = error.__cause__ or error.__context__


def _short(text: str) -> str:
    if len(text) > 10:
        raise ValueError(f"too long: {text}")
    return text


class Guest(SessionData):
    """Has a field whose own check quotes what the client wrote."""

    names: list[Annotated[str, AfterValidator(_short)]] = []  # noqa: RUF012  # pydantic copies defaults


FORGED_LINE = "x\r\n2026-01-01 ERROR session_created session=000000000000\x1b[2J\u2028\x85"


@requirement("LOG-2")
async def test_nothing_breaks_a_line(store: SessionStore, log: pytest.LogCaptureFixture) -> None:
    """What a client wrote into a value or a key, or sends as its cookie, is one line for every reader."""
    service = Service(store, {"model": Guest})
    visitor = service.visitor()
    await visitor.begin()

    def name_a_guest(session: Session) -> None:
        assert isinstance(session.data, Guest)
        session.data.names.append(FORGED_LINE)

    def use_as_key(session: Session) -> None:
        session[FORGED_LINE] = {FORGED_LINE: {1}}

    for act in (name_a_guest, use_as_key):
        assert (await visitor.open(act)).status == 500
    for token in (FORGED_LINE, "a" * 40 + "\n"):
        await service.request(page(read), [(b"cookie", f"session={token}".encode())])
    told = [record.getMessage() for record in log.records if record.name.startswith("asgi_sessions")]
    told += [str(detail) for event in service.events for detail in event.details.values()]
    assert service.told.count("unstorable_value") == 2
    assert not [line for line in told if not line.isprintable()]


@requirement("LOG-3")
async def test_an_attack_does_not_fill_the_log(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A thousand forged cookies in a second are ten lines and a count; the callback hears of each."""
    clock = Clock()
    service = Service(InMemorySessionStore())
    monkeypatch.setattr(service.middleware._events, "_clock", clock)
    with caplog.at_level(logging.INFO, "asgi_sessions"):
        for _ in range(1000):
            await service.request(page(), [(b"cookie", b"session=forged")])
        assert len(caplog.records) == 10
        clock.now += 1
        await service.request(page(), [(b"cookie", b"session=forged")])
    assert caplog.messages[-2:] == ["bad_signature: 990 more, not logged", "bad_signature"]
    assert len(service.events) == 1001


@requirement("LOG-3")
async def test_a_long_value_is_not_logged_at_length(
    store: SessionStore, log: pytest.LogCaptureFixture
) -> None:
    """A check of the app that quotes a megabyte which a client sent is cut short, and still says who."""
    service = Service(store, {"model": Guest})
    visitor = service.visitor()
    await visitor.begin()

    def name_a_guest(session: Session) -> None:
        assert isinstance(session.data, Guest)
        session.data.names.append("x" * 1_000_000)

    assert (await visitor.open(name_a_guest)).status == 500
    (event,) = [event for event in service.events if event.name == "unstorable_value"]
    assert "too long" in str(event.details["reason"])
    assert max(len(str(detail)) for detail in event.details.values()) < 600
    assert max(len(record.getMessage()) for record in log.records) < 1200


# -- every attempt is told -----------------------------------------------------------------------------


async def two_sessions(service: Service) -> None:
    one, other = service.visitor(), service.visitor()
    for visitor in (one, other):
        await visitor.begin()
    await one.open(read, [(b"cookie", f"session={other.token}".encode())])


async def forged(service: Service) -> None:
    await service.visitor(token="forged").open(read)


async def replayed(service: Service) -> None:
    visitor = service.visitor()
    await visitor.begin()
    replay = visitor.copy()
    await visitor.open(logout)
    service.events.clear()
    await replay.open(read)


async def late(service: Service) -> None:
    visitor = service.visitor()
    await visitor.begin()
    old = visitor.copy()
    await visitor.open(login)
    service.events.clear()
    await old.open(read)


async def stolen(service: Service) -> None:
    visitor = service.visitor()
    await visitor.begin()
    await visitor.copy(user_agent=CHROME).open(read)


async def from_elsewhere(service: Service) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise AssertionError("not reached")

    await service.option(allowed_origins=["https://example.com"]).connect(app)


ATTEMPTS: dict[str, tuple[Callable[[Service], Awaitable[object]], str]] = {
    "a forged cookie": (forged, "bad_signature"),
    "two sessions at once": (two_sessions, "ambiguous_cookie"),
    "absurd cookies": (absurd, "absurd_cookie"),
    "a cookie of a session that ended": (replayed, "unknown_session"),
    "an id that was replaced": (late, "retired_session"),
    "another client": (stolen, "fingerprint_mismatch"),
    "a WebSocket from elsewhere": (from_elsewhere, "origin_refused"),
    "a crowd": (crowded, "too_many_waiters"),
    "a change that came second": (overtaken, "conflict"),
    "a value that cannot be stored": (unstorable, "unstorable_value"),
}


@requirement("LOG-4")
@pytest.mark.parametrize("name", ATTEMPTS)
async def test_each_attempt_is_told(service: Service, log: pytest.LogCaptureFixture, name: str) -> None:
    """Once, by its name, to the callback and to the log."""
    attempt, event = ATTEMPTS[name]
    await attempt(service)
    assert service.told.count(event) == 1
    lines = [record for record in log.records if record.name == "asgi_sessions"]
    assert [line for line in lines if line.getMessage().startswith(event)]


@requirement("LOG-4")
async def test_a_listener_that_fails_does_not_let_anybody_in(store: SessionStore) -> None:
    """What `on_event` raises changes no answer."""

    def broken(event: object) -> None:
        raise RuntimeError("the alarm is broken")

    service = Service(store, {"on_event": broken})
    visitor = service.visitor()
    await visitor.begin(secret="s")
    assert await visitor.copy(user_agent=CHROME).sees() == {}
    assert await visitor.copy(token="forged").sees() == {}
    assert await visitor.sees() == {"secret": "s"}
