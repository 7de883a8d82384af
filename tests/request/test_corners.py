"""Corners that no other module visits: other deployments, faults at odd moments, odd records."""

from __future__ import annotations

import asyncio
import logging
import runpy
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import Any

import anyio
import pytest
from asgi import KEY, Browser, Clock, RecordingStore, Site, chunk, empty_body, http_scope, page, start
from redis.asyncio import Redis
from redis_server import RedisServer

from asgi_sessions import (
    DistributedLock,
    InMemorySessionStore,
    RedisSessionStore,
    Session,
    SessionData,
    SessionMiddleware,
    SessionStore,
    SessionStoreError,
)
from asgi_sessions.asgi import Message, Receive, Scope, Send
from asgi_sessions.client.cookie import SessionCookie
from asgi_sessions.record.codec import encode_checked
from asgi_sessions.stores.checkout import Checkout, Lifetime, LockPolicy, Missing, Outcome

pytestmark = pytest.mark.anyio

_HOUR = Lifetime(absolute=3600)
_LOCK = LockPolicy()


def _data(session_id: str = "s", **values: Any) -> SessionData:
    return SessionData(session_id=session_id, metadata=values)


async def _run(client: Redis, *command: str) -> Any:
    return await client.execute_command(*command)  # type: ignore[no-untyped-call]  # in redis-py


async def _until(condition: Callable[[], Awaitable[bool]]) -> None:
    with anyio.fail_after(30):
        while not await condition():  # noqa: ASYNC110  # a server sets no Event
            await anyio.sleep(0.01)


# -- Redis in other shapes ------------------------------------------------------------------------------


@pytest.mark.parametrize("use", ["open", "get", "aclose", "checkout", "lifespan", "request"])
def test_redis_is_refused_on_trio(redis_url: str, use: str) -> None:
    """By a sentence that says what runs there, wherever it is met first, without asyncio's own error."""
    store = RedisSessionStore(redis_url)
    app = SessionMiddleware(page(Session.clear), KEY, store=store)
    cookie = SessionCookie(KEY).signer.sign("a" * 32)

    async def send(message: object) -> None:
        raise AssertionError("nothing is to be answered")

    async def serve(kind: str) -> None:
        if kind == "lifespan":
            await app({"type": "lifespan"}, empty_body, send)
        await app(http_scope(headers=[(b"cookie", f"session={cookie}".encode())]), empty_body, send)

    uses: dict[str, Callable[[], Awaitable[object]]] = {
        "open": store.open,
        "get": lambda: store.get("s"),
        "aclose": store.aclose,
        "checkout": lambda: store.checkout("s", _LOCK, None),
        "lifespan": lambda: serve("lifespan"),
        "request": lambda: serve("http"),
    }

    async def main() -> None:
        await uses[use]()

    with pytest.raises(RuntimeError, match="use the in-memory store on trio") as caught:
        anyio.run(main, backend="trio")
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


# -- Redis at odd moments -------------------------------------------------------------------------------


@pytest.fixture
async def store(redis_url: str) -> AsyncIterator[RedisSessionStore]:
    store = RedisSessionStore(redis_url)
    yield store
    await store.aclose()


@pytest.mark.parametrize("ticks", range(6))
async def test_a_create_cancelled_at_any_moment_leaves_no_lock(
    store: RedisSessionStore, raw: Redis, ticks: int
) -> None:
    """Whether the record was stored by then or not."""
    await store.get("warm")
    task = asyncio.create_task(store.create("s", encode_checked(_data()), _HOUR, _LOCK))
    for _ in range(ticks):
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait((task,))
    if not task.cancelled():
        created = task.result()
        assert created is not None
        await store.release(created)
    assert await store.exists("other") is False  # behind everything that was sent before
    assert await raw.exists("session:{s}:lock") == 0


async def test_a_lock_handed_to_a_cancelled_waiter_goes_on(redis_url: str, raw: Redis) -> None:
    """Cancelled just when it makes the short claim its lease: the lock is free, nothing stays behind."""
    async with Redis.from_url(redis_url) as elsewhere:
        first, waiter = DistributedLock(raw, "door"), DistributedLock(elsewhere, "door", retry_delay=20)
        await first.acquire()
        task = asyncio.create_task(waiter.acquire())

        async def is_queued() -> bool:
            return bool(await raw.exists("{lock:door}:wait"))

        await _until(is_queued)
        await first.release()
        while waiter.lock_id is None:  # noqa: ASYNC110  # the very turn of the loop is wanted
            await asyncio.sleep(0)
        assert not task.done()
        task.cancel()
        await asyncio.wait((task,))
        assert task.cancelled()
        assert not waiter.acquired
        await _until(lambda: first.acquire(blocking=False))  # the release is on another connection
        await first.release()
        assert await raw.keys() == []


async def test_a_renewal_that_fails_is_tried_again(
    own_redis: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    """It warns and the request goes on; whether the lock was kept is decided by the commit."""
    store = RedisSessionStore(own_redis.url)
    await store.set("s", _data())
    taken = await store.checkout("s", LockPolicy(timeout=0.15), _HOUR)
    assert isinstance(taken, Checkout)
    own_redis.kill()

    async def was_tried_twice() -> bool:
        return caplog.text.count("could not be renewed, the next try follows") >= 2

    with caplog.at_level(logging.WARNING, "asgi_sessions.redis"):
        await _until(was_tried_twice)
    with pytest.raises(SessionStoreError):
        await store.commit(taken, taken.record, release=True)
    await store.aclose()


# -- every store ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["memory", "redis"])
async def test_who_is_signed_in_by_a_factory_is_listed(redis_url: str, kind: str) -> None:
    """What `get_or_create` makes belongs to its user like any other session."""
    store: SessionStore = InMemorySessionStore() if kind == "memory" else RedisSessionStore(redis_url)
    made = await store.get_or_create(
        "s", lambda session_id: SessionData(session_id=session_id, user_id="ada")
    )
    assert await store.list_for_user("ada") == [made]
    await store.aclose()


class OwnStore(SessionStore):
    """Somebody else's store: the four primitives that must be there, on a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.values: dict[str, bytes] = {}
        self.is_down = False

    async def read_value(self, session_id: str) -> bytes | None:
        if self.is_down:
            raise SessionStoreError("down")
        return self.values.get(session_id)

    async def write_value(self, session_id: str, value: bytes, ttl: float) -> None:
        self.values[session_id] = value

    async def delete_value(self, session_id: str) -> None:
        self.values.pop(session_id, None)

    async def iter_ids(self) -> AsyncGenerator[str, None]:
        for session_id in list(self.values):
            yield session_id


async def test_a_checkout_that_fails_in_a_store_of_ones_own_locks_nothing() -> None:
    """The next request does not wait for one that never got its record."""
    store = OwnStore()
    await store.set("s", _data())
    store.is_down = True
    with pytest.raises(SessionStoreError, match="down"):
        await store.checkout("s", _LOCK, None)
    store.is_down = False
    assert isinstance(await store.checkout("s", LockPolicy(wait=0), None), Checkout)


@pytest.mark.parametrize(
    ("change", "outcome"), [("delete", Outcome.GONE), ("set", Outcome.CONFLICT), ("expire", Outcome.LOST)]
)
async def test_a_move_that_came_too_late_retires_nothing(change: str, outcome: Outcome) -> None:
    """In a store of one's own too: the record of others stays, and its id is not taken for a replaced one."""
    store = OwnStore()
    await store.set("s", _data())
    taken = await store.checkout("s", LockPolicy(max_hold=0 if change == "expire" else 300), None)
    assert isinstance(taken, Checkout)
    if change == "delete":
        await store.delete("s")
    elif change == "set":
        await store.set("s", _data(n=2))
    else:
        await store.checkout("s", LockPolicy(max_hold=0), None)
    record = encode_checked(_data("t"))
    moved = await store.move(taken, "t", record, lifetime=None, lock=None, was=None, user=None)
    assert moved is outcome
    assert await store.exists("t") is False
    again = await store.checkout("s", LockPolicy(wait=0), None)
    assert again is Missing.ABSENT if change == "delete" else isinstance(again, Checkout)


def test_a_store_that_lacks_a_primitive_is_told() -> None:
    """In its constructor, by name."""

    class Half(SessionStore):
        async def read_value(self, session_id: str) -> bytes | None:
            return None

    with pytest.raises(TypeError, match="Half has to implement write_value, delete_value, iter_ids"):
        Half()


def test_a_store_that_forgot_its_base_class_is_told() -> None:
    """In the constructor of the middleware, not at the first request."""

    class Forgetful(OwnStore):
        def __init__(self) -> None:
            self.values = {}

    with pytest.raises(TypeError, match=r"Forgetful\.__init__ has to call super\(\).__init__\(\)"):
        SessionMiddleware(page(), KEY, store=Forgetful())


async def test_expired_sessions_make_room_before_living_ones() -> None:
    """Also one that is hidden behind many whose end was put off since."""
    clock = Clock()
    store = InMemorySessionStore(max_sessions=9, clock=clock)
    for n in range(8):
        await store.create(f"idle{n}", encode_checked(_data(f"idle{n}")), Lifetime(idle=10), None)
    await store.set("short", _data("short"), ttl=12)
    clock.now += 9
    for n in range(8):
        taken = await store.checkout(f"idle{n}", None, None)
        assert isinstance(taken, Checkout)
        await store.keep_alive(taken)
    await store.checkout("short", None, None)
    clock.now += 4
    await store.set("new", _data("new"))
    assert await store.list_active() == [*(f"idle{n}" for n in range(8)), "new"]
    stats = await store.get_stats()
    assert (stats["expirations"], stats["evictions"]) == (1, 0)


# -- the walk, off its path -----------------------------------------------------------------------------


@pytest.fixture
def site() -> Site:
    return Site()


def _rewrite(browser: Browser, old: bytes, new: bytes) -> bytes:
    """Put other bytes into the stored record; what it is now."""
    record = browser.site.raw(browser.session_id)
    assert old in record
    browser.site.spoil(browser.session_id, record.replace(old, new))
    return browser.site.raw(browser.session_id)


class UnreleasingStore(RecordingStore):
    """A store that fails whenever a lock is let go by itself."""

    async def before(self, call: str) -> None:
        await super().before(call)
        if call == "release":
            raise SessionStoreError("gone")


async def test_a_release_that_fails_does_not_spoil_the_answer() -> None:
    """Nothing was to be stored: the client gets its answer, the operator an event, the lock its end."""
    browser = Site(store_class=UnreleasingStore).browser()
    await browser.begin(n=1)
    answer = await browser.open(page(lambda session: session.get("n")))
    assert (answer.status, answer.body) == (200, b"ok")
    assert browser.site.events == ["store_error"]


async def test_a_transaction_of_another_task_outlives_the_answer(site: Site) -> None:
    """The answer leaves without its change, which is stored when its block ends."""
    browser = site.browser()
    await browser.begin(n=1)
    inside, answered = anyio.Event(), anyio.Event()

    async def change(session: Session) -> None:
        async with session.transaction() as data:
            data.metadata["n"] = 2
            inside.set()
            await answered.wait()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        session: Session = scope["session"]
        await session.release()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(change, session)
            await inside.wait()
            await send(start(headers=[(b"content-length", b"2")]))
            await send(chunk(b"ok"))
            assert await browser.stored() == {"n": 1}
            answered.set()

    assert (await browser.open(app)).status == 200
    assert await browser.stored() == {"n": 2}
    assert site.locks == 0


async def test_a_new_session_after_an_end_wins_over_every_writer(site: Site) -> None:
    """The old record is gone even if somebody changed it meanwhile; what came after has a new id."""
    browser = site.browser()
    old = await browser.begin(n=1)

    async def act(session: Session) -> None:
        session.invalidate()
        session["fresh"] = True
        await site.store.set(old, _data(old, n=2))

    assert (await browser.open(page(act))).status == 200
    assert browser.session_id != old
    assert [data.metadata for data in site.records()] == [{"fresh": True}]


async def test_a_login_without_an_absolute_bound_keeps_the_idle_timeout(site: Site) -> None:
    """A session that has only that one begins it anew under its new id."""
    browser = site.option(max_age=None, idle_timeout=50).browser()
    await browser.begin(n=1)
    site.clock.now += 40
    await browser.open(page(lambda session: session.login("ada")))
    site.clock.now += 40
    assert await browser.stored() == {"n": 1}
    site.clock.now += 11
    assert await browser.stored() is None


async def test_nobody_is_signed_in_under_an_empty_name(site: Site) -> None:
    """`login("")` is a bug of the app: nothing is stored, the id stays."""
    browser = site.browser()
    before = await browser.begin(n=1)
    with pytest.raises(ValueError, match="logout"):
        await browser.open(page(lambda session: session.login("")))
    assert [data.session_id for data in site.records()] == [before]


async def test_a_value_within_a_value_that_cannot_be_stored_is_named(site: Site) -> None:
    """Though the dict still equals the loaded one, which shares the list."""
    browser = site.browser()
    await browser.begin(items=[1])
    answer = await browser.open(page(lambda session: session["items"].append(object())))
    assert (answer.status, site.events) == (500, ["unstorable_value"])
    assert await browser.stored() == {"items": [1]}


async def test_a_record_whose_values_are_cut_is_unreadable(site: Site) -> None:
    """A whole frame does not make a record: fresh session, and the bytes stay as they are."""
    browser = site.browser()
    await browser.begin(n=1)
    record = _rewrite(browser, b'{"n":1}', b'{"n":}')
    seen: list[dict[str, Any]] = []
    await browser.open(page(lambda session: seen.append(dict(session))))
    assert (seen, site.events) == ([{}], ["unreadable_record"])
    assert site.raw(browser.session_id) == record


async def test_a_record_with_a_forbidden_name_is_unreadable(site: Site) -> None:
    """The fast way takes no record that the model refuses, and nothing of it is overwritten."""
    browser = site.browser()
    await browser.begin(n=1)
    record = _rewrite(browser, b'"user_id":null', b'"user_id":"a; b"')
    seen: list[dict[str, Any]] = []
    await browser.open(page(lambda session: seen.append(dict(session))))
    assert (seen, site.events) == ([{}], ["unreadable_record"])
    assert site.raw(browser.session_id) == record


async def test_a_record_from_a_clock_that_is_ahead_can_be_changed(site: Site) -> None:
    """No record says that it was changed before it was created."""
    browser = site.browser()
    await browser.begin(n=1)
    year = site.records()[0].created_at.year
    _rewrite(browser, b'_at":"%d' % year, b'_at":"%d' % (year + 1))
    _rewrite(browser, b'_activity":"%d' % year, b'_activity":"%d' % (year + 1))
    assert (await browser.open(page(lambda session: session.update(n=2)))).status == 200
    data = site.records()[0]
    assert data.metadata == {"n": 2}
    assert data.updated_at >= data.created_at


@pytest.mark.parametrize("end", ["clear", "invalidate"])
async def test_an_emptied_session_keeps_nothing_of_another_release(site: Site, end: str) -> None:
    """Not even fields that this release does not know."""
    browser = site.browser()
    await browser.begin(n=1)
    _rewrite(browser, b'"metadata":', b'"of_tomorrow":"secret","metadata":')

    def act(session: Session) -> None:
        getattr(session, end)()
        session["m"] = 2

    assert (await browser.open(page(act))).status == 200
    assert [data.to_json().count("secret") for data in site.records()] == [0]
    assert await browser.stored() == {"m": 2}


async def test_the_store_is_closed_before_the_shut_down_is_complete() -> None:
    """A server ends its loop when it hears so: whatever comes later is cancelled half-way."""
    site = Site()
    asked = iter([{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}])

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        for _ in range(2):
            await send({"type": f"{(await receive())['type']}.complete"})

    async def receive() -> Message:
        return next(asked)

    async def send(message: Message) -> None:
        site.log.append(message["type"])

    await SessionMiddleware(app, KEY, store=site.store)({"type": "lifespan"}, receive, send)
    assert site.log == ["open", "lifespan.startup.complete", "close", "lifespan.shutdown.complete"]


# -- the rest -------------------------------------------------------------------------------------------


def test_the_package_runs_as_a_module(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`python -m asgi_sessions key` is `asgi-sessions key`: 64 hexadecimal digits."""
    monkeypatch.setattr(sys, "argv", ["asgi_sessions", "key"])
    with pytest.raises(SystemExit) as end:
        runpy.run_module("asgi_sessions", run_name="__main__")
    assert end.value.code == 0
    assert len(bytes.fromhex(capsys.readouterr().out.strip())) == 32
