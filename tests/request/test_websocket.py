"""WebSockets: loaded without a lock, changed in transactions, cookies on the accept, faults before it."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import anyio
import asgi
import pytest
from anyio.lowlevel import checkpoint
from asgi import over

from asgi_sessions import (
    LockTimeoutError,
    ReadOnlySessionError,
    Session,
    SessionClosedError,
    SessionConflictError,
    SessionData,
    SessionDataError,
    SessionEvent,
    SessionMiddleware,
    SessionStore,
    SessionStoreError,
)
from asgi_sessions.asgi import Headers, Message, Receive, Scope, Send
from asgi_sessions.stores.checkout import Checkout, Lifetime, LockPolicy, Missing, Outcome

pytestmark = pytest.mark.anyio

KEY = "k" * 32
POLICY = LockPolicy()
Handler = Callable[[Session, Receive, Send], Awaitable[None]]
ACCEPT: Message = {"type": "websocket.accept"}


@pytest.fixture
def anyio_backend(way: str) -> str:
    """On both event loops in memory, and over a store of four primitives."""
    return way


class StepStore(SessionStore):
    """Really suspends before and after each request operation, counts that, and can fail."""

    def __init__(self) -> None:
        super().__init__(clock=time.monotonic)  # type: ignore[call-arg]  # of the store beneath
        self.calls: list[str] = []
        self.on_step: Callable[[int], None] = lambda step: None
        self.steps = 0
        self.fails_on: str | None = None

    async def step(self) -> None:
        self.steps += 1
        self.on_step(self.steps)
        await checkpoint()

    async def begin(self, name: str) -> None:
        self.calls.append(name)
        await self.step()
        if self.fails_on == name:
            raise SessionStoreError("the backend is down")

    async def checkout(
        self,
        session_id: str,
        lock: LockPolicy | None,
        lifetime: Lifetime | None,
        *,
        passive: bool = False,
    ) -> Checkout | Missing:
        await self.begin("checkout" if lock else "load")
        taken = await super().checkout(session_id, lock, lifetime, passive=passive)
        try:
            await self.step()
        except BaseException:
            if isinstance(taken, Checkout):
                await super().release(taken)  # a cancelled checkout leaves nothing behind
            raise
        return taken

    async def create(
        self,
        session_id: str,
        record: bytes,
        lifetime: Lifetime,
        lock: LockPolicy | None,
        user: str | None = None,
    ) -> Checkout | None:
        await self.begin("create")
        return await super().create(session_id, record, lifetime, lock, user)

    async def commit(self, checkout: Checkout, record: bytes, *, release: bool) -> Outcome:
        await self.begin("commit")
        outcome = await super().commit(checkout, record, release=release)
        await self.step()
        return outcome

    async def discard(self, checkout: Checkout) -> Outcome:
        await self.begin("discard")
        outcome = await super().discard(checkout)
        await self.step()
        return outcome

    async def move(
        self,
        checkout: Checkout,
        session_id: str,
        record: bytes,
        *,
        lifetime: Lifetime | None,
        lock: LockPolicy | None,
        was: str | None,
        user: str | None,
        leads: bool = False,
    ) -> Outcome:
        await self.begin("move")
        outcome = await super().move(
            checkout, session_id, record, lifetime=lifetime, lock=lock, was=was, user=user, leads=leads
        )
        await self.step()
        return outcome


class Site:
    """A middleware whose app is given with each connection; keeps the messages and the events."""

    def __init__(self, **options: Any) -> None:
        self.store = over(asgi.Site.backing, StepStore)()
        self.events: list[str] = []
        self.middleware = SessionMiddleware(self._app, KEY, store=self.store, on_event=self._note, **options)

    def _note(self, event: SessionEvent) -> None:
        self.events.append(event.name)

    async def _app(self, scope: Scope, receive: Receive, send: Send) -> None:
        await scope["handler"](scope["session"], receive, send)

    def scope(
        self, kind: str, handler: Handler, cookie: bytes | None, agent: bytes | None, headers: Iterable[Any]
    ) -> Scope:
        sent: Headers = [*headers]
        sent += [(b"user-agent", agent)] if agent is not None else []
        sent += [(b"cookie", cookie)] if cookie is not None else []
        return {
            "type": kind,
            "asgi": {"version": "3.0"},
            "scheme": "https" if kind == "http" else "wss",
            "method": "GET",
            "path": "/",
            "headers": sent,
            "client": ("192.0.2.1", 1234),
            "handler": handler,
        }

    async def socket(
        self,
        handler: Handler,
        cookie: bytes | None = None,
        *,
        agent: bytes | None = b"agent/1",
        headers: Iterable[tuple[bytes, bytes]] = (),
        sent: list[Message] | None = None,
    ) -> list[Message]:
        """The messages that one WebSocket connection was answered with."""
        sent = [] if sent is None else sent

        async def receive() -> Message:
            await checkpoint()
            return {"type": "websocket.connect"}

        async def send(message: Message) -> None:
            await checkpoint()
            sent.append(message)

        await self.middleware(self.scope("websocket", handler, cookie, agent, headers), receive, send)
        return sent

    async def get(self, cookie: bytes | None, **values: Any) -> tuple[dict[str, Any], bytes | None]:
        """What a request with this cookie finds, before it puts `values` in, and the cookie it is given."""
        found: dict[str, Any] = {}
        sent: list[Message] = []

        async def handler(session: Session, receive: Receive, send: Send) -> None:
            found.update(session)
            found.update({"user": session.data.user_id} if session.data.user_id else {})
            session.update(values)
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b""})

        async def receive() -> Message:
            return {"type": "http.request", "body": b""}

        async def send(message: Message) -> None:
            sent.append(message)

        await self.middleware(self.scope("http", handler, cookie, b"agent/1", []), receive, send)
        assert sent[0]["status"] == 200
        return found, cookie_of(sent[0])

    async def visitor(self, **values: Any) -> bytes:
        """The cookie of a new session with these values."""
        _, cookie = await self.get(None, **values)
        assert cookie is not None
        self.store.calls.clear()
        self.events.clear()
        return cookie

    async def record(self) -> SessionData:
        """The one record there is."""
        (session_id,) = await self.store.list_active()
        data = await self.store.get(session_id)
        assert data is not None
        return data

    def assert_free(self) -> None:
        """No lock is left, and nobody waits."""
        assert len(self.store._locks) == 0


def cookie_of(message: Message) -> bytes | None:
    found = [value for name, value in message["headers"] if name == b"set-cookie"]
    return found[0].split(b";")[0] if found else None


async def accept_only(session: Session, receive: Receive, send: Send) -> None:
    await send(ACCEPT)


async def count(session: Session) -> None:
    async with session.transaction():
        session["n"] = session.get("n", 0) + 1


async def not_reached(session: Session, receive: Receive, send: Send) -> None:
    pytest.fail("the app must not see this connection")


# --- connecting -----------------------------------------------------------------------------------


async def test_a_connection_without_a_cookie_costs_nothing() -> None:
    """The accept goes out as it is and the store is not asked."""
    site = Site()
    assert await site.socket(accept_only) == [{"type": "websocket.accept", "headers": []}]
    assert site.store.calls == []


async def test_the_session_is_loaded_without_a_lock() -> None:
    """Even while a request holds it, a connection is let in at once and sees what is stored."""
    site = Site()
    cookie = await site.visitor(n=1)
    held = await site.store.checkout((await site.record()).session_id, POLICY, None)
    assert isinstance(held, Checkout)
    seen: list[Any] = []

    async def app(session: Session, receive: Receive, send: Send) -> None:
        await send({**ACCEPT, "subprotocol": "chat", "headers": [(b"x-app", b"1")]})
        seen.append((session.is_new, dict(session)))

    with anyio.fail_after(5):
        sent = await site.socket(app, cookie)
    assert seen == [(False, {"n": 1})]
    assert sent == [{"type": "websocket.accept", "subprotocol": "chat", "headers": [(b"x-app", b"1")]}]
    await site.store.release(held)
    site.assert_free()


@pytest.mark.parametrize(
    ("tamper", "agent", "event"),
    [
        (lambda cookie: cookie, b"agent/2", None),
        (lambda cookie: cookie, b"other", "fingerprint_mismatch"),
        (lambda cookie: cookie, None, "fingerprint_mismatch"),
        (lambda cookie: cookie[:-4] + b"AAAA", b"agent/1", "bad_signature"),
        (lambda cookie: b"session=null", b"agent/1", "bad_signature"),
        (lambda cookie: b"other=1", b"agent/1", None),
    ],
    ids=["browser update", "other agent", "no agent", "bad signature", "no token", "no cookie"],
)
async def test_cookie_and_client_are_checked_as_for_requests(
    tamper: Callable[[bytes], bytes], agent: bytes | None, event: str | None
) -> None:
    """What is not this client's session is a fresh one, and an event says so."""
    site = Site()
    cookie = await site.visitor(n=1)
    presented = tamper(cookie)
    seen: list[Any] = []

    async def app(session: Session, receive: Receive, send: Send) -> None:
        seen.append(dict(session))
        await send(ACCEPT)

    (accept,) = await site.socket(app, presented, agent=agent)
    assert cookie_of(accept) is None
    assert seen == [{"n": 1} if presented == cookie and event is None else {}]
    assert site.events == ([] if event is None else [event])
    assert (await site.record()).metadata == {"n": 1}


async def test_absurd_cookies_are_refused() -> None:
    """More cookie bytes than a browser sends: closed before the app runs."""
    site = Site()
    assert await site.socket(not_reached, b"a" * 70_000) == [
        {"type": "websocket.close", "code": 1008, "reason": ""}
    ]


@pytest.mark.parametrize(
    ("origins", "admitted"),
    [
        ([b"https://example.com"], True),
        ([b"HTTPS://EXAMPLE.com"], True),
        ([b"https://app.example.com:8443"], True),
        ([], False),
        ([b""], False),
        ([b"null"], False),
        ([b"http://example.com"], False),
        ([b"https://example.com:443"], False),
        ([b"https://example.com/"], False),
        ([b"https://example.com.evil.org"], False),
        ([b"https://evil.org/https://example.com"], False),
        ([b"https://example.com https://evil.org"], False),
        ([b"https://example.com", b"https://example.com"], False),
        ([b"https://example.com", b"https://evil.org"], False),
        ([b"https://ex\xe4mple.com"], False),
    ],
)
@pytest.mark.parametrize("collection", [list, iter, frozenset])
@pytest.mark.parametrize("way", ["asyncio"], indirect=True)
async def test_only_allowed_origins_are_let_in(
    origins: list[bytes], admitted: bool, collection: Callable[[list[str]], Any]
) -> None:
    """One `Origin` header that is exactly an allowed origin; else closed without a look at the store."""
    site = Site(allowed_origins=collection(["https://example.com", "https://App.Example.com:8443"]))
    cookie = await site.visitor(n=1)
    headers = [(b"origin", origin) for origin in origins]
    if admitted:
        assert await site.socket(accept_only, cookie, headers=headers) == [
            {"type": "websocket.accept", "headers": []}
        ]
        return
    sent = await site.socket(not_reached, cookie, headers=headers)
    assert sent == [{"type": "websocket.close", "code": 1008, "reason": ""}]
    assert site.events == ["origin_refused"]
    assert site.store.calls == []


async def test_requests_are_not_asked_for_an_origin() -> None:
    """`allowed_origins` is for WebSockets, which browsers open across origins without asking."""
    site = Site(allowed_origins=[])
    assert await site.get(await site.visitor(n=1)) == ({"n": 1}, None)


# --- changes outside of a transaction -------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s.update(n=2),
        lambda s: s.pop("n"),
        lambda s: s.clear(),
        lambda s: setattr(s.data, "escalated", True),
        lambda s: s.data.increment_message_count(),
        lambda s: s.login("ada"),
        lambda s: s.regenerate_id(),
        lambda s: s.logout(),
    ],
    ids=["update", "pop", "clear", "field", "method", "login", "regenerate", "logout"],
)
@pytest.mark.parametrize("accepted", [True, False], ids=["accepted", "not yet"])
async def test_a_change_outside_a_transaction_raises_at_once(
    change: Callable[[Session], object], accepted: bool
) -> None:
    """Nothing would store it, so it is refused, and nothing is stored."""
    site = Site()
    cookie = await site.visitor(n=1)

    async def app(session: Session, receive: Receive, send: Send) -> None:
        if accepted:
            await send(ACCEPT)
        with pytest.raises(ReadOnlySessionError, match="transaction"):
            change(session)
        if not accepted:
            await send(ACCEPT)

    assert len(await site.socket(app, cookie)) == 1
    assert (await site.record()).metadata == {"n": 1}
    assert site.store.calls == ["load"]


async def test_a_nested_change_outside_a_transaction_is_said_at_the_end() -> None:
    """Nobody sees it happen, so the connection ends with the error; it rises where the app closed before."""
    site = Site()
    cookie = await site.visitor(cart=[])

    async def app(session: Session, receive: Receive, send: Send) -> None:
        await send(ACCEPT)
        session["cart"].append(1)

    async def closing_app(session: Session, receive: Receive, send: Send) -> None:
        await app(session, receive, send)
        await send({"type": "websocket.close", "code": 1000})

    _, closed = await site.socket(app, cookie)
    assert closed == {"type": "websocket.close", "code": 1008, "reason": ""}
    assert site.events == ["uncaught_error"]
    with pytest.raises(ReadOnlySessionError):
        await site.socket(closing_app, cookie)
    assert (await site.record()).metadata == {"cart": []}


async def test_a_nested_change_is_not_dropped_by_the_next_transaction() -> None:
    """A transaction loads the record anew, which would undo it silently: it raises instead."""
    site = Site()
    cookie = await site.visitor(cart=[])

    async def app(session: Session, receive: Receive, send: Send) -> None:
        await send(ACCEPT)
        session["cart"].append(1)
        with pytest.raises(ReadOnlySessionError):
            await count(session)
        session["cart"].clear()
        await count(session)

    await site.socket(app, cookie)
    assert (await site.record()).metadata == {"cart": [], "n": 1}
    site.assert_free()


async def test_a_change_beside_a_transaction_of_another_task_raises() -> None:
    """That one task is in its transaction does not open the session to others: their change could be lost."""
    site = Site()
    cookie = await site.visitor(n=0)
    inside, done = anyio.Event(), anyio.Event()

    async def transact(session: Session) -> None:
        async with session.transaction():
            session["n"] = 1
            inside.set()
            await done.wait()

    async def app(session: Session, receive: Receive, send: Send) -> None:
        await send(ACCEPT)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(transact, session)
            await inside.wait()
            with pytest.raises(ReadOnlySessionError, match="transaction"):
                session["lost"] = True
            with pytest.raises(ReadOnlySessionError, match="transaction"):
                session.data.escalated = True
            done.set()

    await site.socket(app, cookie)
    assert await site.get(cookie) == ({"n": 1}, None)


# --- transactions ---------------------------------------------------------------------------------


async def test_a_transaction_is_seen_by_the_next_request() -> None:
    """It is stored when the block ends, while the connection stays open."""
    site = Site()
    cookie = await site.visitor(n=1)

    async def app(session: Session, receive: Receive, send: Send) -> None:
        await send(ACCEPT)
        async with session.transaction() as data:
            session["n"] = 2
            data.escalated = True
        site.assert_free()
        assert await site.get(cookie, m=3) == ({"n": 2}, None)
        assert (await site.record()).escalated is True
        assert dict(session) == {"n": 2}
        async with session.transaction() as again:
            assert again is data
            assert dict(session) == {"n": 2, "m": 3}

    await site.socket(app, cookie)
    assert site.store.calls == ["load", "checkout", "commit", "checkout", "commit", "checkout"]


async def test_a_record_in_hand_is_the_session() -> None:
    """A typed record that was taken at the start of the connection can be changed in each transaction."""
    site = Site()
    cookie = await site.visitor(n=1)

    async def app(session: Session, receive: Receive, send: Send) -> None:
        data = session.data
        await send(ACCEPT)
        for _ in range(3):
            async with session.transaction():
                data.increment_message_count()
                data.metadata["n"] += 1

    await site.socket(app, cookie)
    record = await site.record()
    assert (record.message_count, record.metadata) == (3, {"n": 4})


async def test_transactions_lose_nothing() -> None:
    """Of two connections, of several tasks each, and of requests, every change counts."""
    site = Site()
    cookie = await site.visitor(n=0)

    async def app(session: Session, receive: Receive, send: Send) -> None:
        await send(ACCEPT)
        async with anyio.create_task_group() as tasks:
            for _ in range(5):
                tasks.start_soon(count, session)

    async def request() -> None:
        found, _ = await site.get(cookie)
        assert 0 <= found["n"] <= 10

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(site.socket, app, cookie)
        tasks.start_soon(site.socket, app, cookie)
        tasks.start_soon(request)
    assert (await site.record()).metadata == {"n": 10}
    site.assert_free()


async def test_without_locks_a_transaction_still_takes_its_turn() -> None:
    """`lock=False` is for requests; a transaction asks for the lock by its name."""
    site = Site(lock=False)
    cookie = await site.visitor(n=0)

    async def app(session: Session, receive: Receive, send: Send) -> None:
        await send(ACCEPT)
        await count(session)

    async with anyio.create_task_group() as tasks:
        for _ in range(4):
            tasks.start_soon(site.socket, app, cookie)
    assert (await site.record()).metadata == {"n": 4}


async def test_a_transaction_within_a_transaction_joins_it() -> None:
    """The inner block rolls back alone, the outer one stores."""
    site = Site()
    cookie = await site.visitor(n=0)

    async def fail(session: Session) -> None:
        async with session.transaction():
            session["inner"] = True
            raise KeyError

    async def app(session: Session, receive: Receive, send: Send) -> None:
        async with session.transaction():
            session["outer"] = True
            with pytest.raises(KeyError):
                await fail(session)
            await count(session)
        await send(ACCEPT)

    await site.socket(app, cookie)
    assert (await site.record()).metadata == {"n": 1, "outer": True}
    site.assert_free()


async def test_the_outer_transaction_rolls_back_the_inner() -> None:
    """What an inner block did is stored with the outer one or not at all."""
    site = Site()
    cookie = await site.visitor(n=0)

    async def outer(session: Session) -> None:
        async with session.transaction():
            await count(session)
            raise KeyError

    async def app(session: Session, receive: Receive, send: Send) -> None:
        await send(ACCEPT)
        with pytest.raises(KeyError):
            await outer(session)

    await site.socket(app, cookie)
    assert (await site.record()).metadata == {"n": 0}
    site.assert_free()


async def test_tasks_within_a_transaction_belong_to_it() -> None:
    """A child task and a thread may change the session, and a transaction in one waits for nobody."""
    site = Site()
    cookie = await site.visitor(n=0)

    async def app(session: Session, receive: Receive, send: Send) -> None:
        await send(ACCEPT)
        async with session.transaction():
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(count, session)
                session["outer"] = True
            await anyio.to_thread.run_sync(session.__setitem__, "thread", True)

    with anyio.fail_after(5):
        await site.socket(app, cookie)
    assert (await site.record()).metadata == {"n": 1, "outer": True, "thread": True}


async def test_a_transaction_waits_no_longer_than_lock_wait() -> None:
    """Neither for another connection nor for another task of this one."""
    site = Site(lock_wait=0.02)
    cookie = await site.visitor(n=0)
    inside, done = anyio.Event(), anyio.Event()

    async def hold(session: Session) -> None:
        async with session.transaction():
            inside.set()
            await done.wait()

    async def second(session: Session, receive: Receive, send: Send) -> None:
        await send(ACCEPT)
        with pytest.raises(LockTimeoutError):
            await count(session)

    async def first(session: Session, receive: Receive, send: Send) -> None:
        await send(ACCEPT)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(hold, session)
            await inside.wait()
            with pytest.raises(LockTimeoutError):
                await count(session)
            await site.socket(second, cookie)
            done.set()
        await count(session)

    with anyio.fail_after(5):
        await site.socket(first, cookie)
    assert (await site.record()).metadata == {"n": 1}
    site.assert_free()


async def test_an_exception_rolls_back() -> None:
    """The store, the handle and the lock are as before the block, and the exception goes on."""
    site = Site()
    cookie = await site.visitor(n=1)

    async def fail(session: Session) -> None:
        async with session.transaction() as data:
            session["n"] = 2
            data.user_id = "eve"
            session.regenerate_id()
            raise KeyError

    async def app(session: Session, receive: Receive, send: Send) -> None:
        await send(ACCEPT)
        with pytest.raises(KeyError):
            await fail(session)
        site.assert_free()
        assert dict(session) == {"n": 1}
        assert session.data.user_id is None
        with pytest.raises(ReadOnlySessionError):
            session["n"] = 3
        await count(session)

    await site.socket(app, cookie)
    assert await site.get(cookie) == ({"n": 2}, None)


async def test_an_unstorable_value_rolls_back() -> None:
    """The error names the value, the record keeps its content and the connection goes on."""
    site = Site()
    cookie = await site.visitor(n=1)

    async def put_object(session: Session) -> None:
        async with session.transaction():
            session["bad"] = object()

    async def app(session: Session, receive: Receive, send: Send) -> None:
        await send(ACCEPT)
        with pytest.raises(SessionDataError) as caught:
            await put_object(session)
        assert caught.value.path == "metadata.bad"
        await count(session)

    await site.socket(app, cookie)
    assert await site.get(cookie) == ({"n": 2}, None)


@pytest.mark.parametrize("moment", ["before", "during"])
async def test_a_session_that_has_ended_is_not_brought_back(moment: str) -> None:
    """Deleted meanwhile: the transaction says so, the handle is empty, and no later one revives it."""
    site = Site()
    cookie = await site.visitor(n=1)
    session_id = (await site.record()).session_id

    async def transact(session: Session) -> None:
        async with session.transaction():
            session["n"] = 2
            await site.store.delete(session_id)

    async def app(session: Session, receive: Receive, send: Send) -> None:
        data = session.data
        await send(ACCEPT)
        if moment == "before":
            await site.store.delete(session_id)
        with pytest.raises(SessionConflictError):
            await transact(session)
        assert dict(session) == {}
        assert data.session_id != session_id
        with pytest.raises(SessionClosedError):
            await count(session)

    await site.socket(app, cookie)
    assert await site.store.list_active() == []
    site.assert_free()


async def test_a_read_only_request_can_begin_anew_after_its_session_ended() -> None:
    """Its answer has not left yet, so a later transaction makes a new session with a new cookie."""
    site = Site(read_only=lambda scope: "read-only" in scope)
    cookie = await site.visitor(n=1)
    session_id = (await site.record()).session_id
    sent: list[Message] = []

    async def transact(session: Session) -> None:
        async with session.transaction():
            session["n"] = 2
            await site.store.delete(session_id)

    async def app(session: Session, receive: Receive, send: Send) -> None:
        with pytest.raises(SessionConflictError):
            await transact(session)
        await count(session)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def receive() -> Message:
        return {"type": "http.request", "body": b""}

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {**site.scope("http", app, cookie, b"agent/1", []), "read-only": True}
    await site.middleware(scope, receive, send)
    assert sent[0]["status"] == 200
    record = await site.record()
    assert record.metadata == {"n": 1}
    assert record.session_id != session_id
    assert cookie_of(sent[0]) not in (None, cookie)


async def test_a_writer_that_does_not_wait_wins() -> None:
    """`store.set` during the block refuses the commit, and the next transaction sees what was set."""
    site = Site()
    cookie = await site.visitor(n=1)
    session_id = (await site.record()).session_id

    async def transact(session: Session) -> None:
        async with session.transaction():
            session["n"] = 2
            await site.store.set(session_id, SessionData(session_id=session_id, metadata={"n": 10}))

    async def app(session: Session, receive: Receive, send: Send) -> None:
        await send(ACCEPT)
        with pytest.raises(SessionConflictError):
            await transact(session)
        assert dict(session) == {"n": 1}
        await count(session)

    await site.socket(app, cookie)
    assert (await site.record()).metadata == {"n": 11}


async def test_store_operations_of_the_same_session_do_not_deadlock() -> None:
    """Within the block they act on the record it holds, outside they take their own turn."""
    site = Site()
    cookie = await site.visitor(n=1)
    session_id = (await site.record()).session_id

    async def app(session: Session, receive: Receive, send: Send) -> None:
        await send(ACCEPT)
        async with session.transaction():
            await site.store.update(session_id, {"inside": True})
            assert session["inside"] is True
            assert await site.store.increment_counter(session_id, "n") == 2
        await site.store.update(session_id, {"outside": True})

    with anyio.fail_after(5):
        await site.socket(app, cookie)
    assert (await site.record()).metadata == {"n": 2, "inside": True, "outside": True}


# --- new ids --------------------------------------------------------------------------------------


async def test_a_session_that_begins_before_the_accept_gets_its_cookie_there() -> None:
    """The accept carries it, not to be cached, and the next request finds the session."""
    site = Site()

    async def app(session: Session, receive: Receive, send: Send) -> None:
        await count(session)
        await count(session)
        await send({**ACCEPT, "headers": [(b"set-cookie", b"other=1")]})
        await count(session)

    (accept,) = await site.socket(app)
    names = [name for name, _ in accept["headers"]]
    assert names == [b"set-cookie", b"vary", b"set-cookie", b"cache-control"]
    cookie = accept["headers"][2][1]
    assert cookie.endswith(b"; path=/; Max-Age=1209600; httponly; samesite=lax; secure")
    assert await site.get(cookie.split(b";")[0]) == ({"n": 3}, None)
    assert site.store.calls[:6] == ["create", "checkout", "commit", "checkout", "commit", "checkout"]


@pytest.mark.parametrize("presented", [None, b"session=" + b"0" * 32 + b".AAAA." + b"A" * 43])
async def test_no_session_begins_after_the_accept(presented: bytes | None) -> None:
    """Its cookie could not be delivered any more, so the transaction says what to do instead."""
    site = Site()

    async def app(session: Session, receive: Receive, send: Send) -> None:
        await send(ACCEPT)
        with pytest.raises(SessionClosedError, match=r"before .* the WebSocket is accepted"):
            await count(session)
        assert dict(session) == {}

    (accept,) = await site.socket(app, presented)
    assert cookie_of(accept) is None
    assert await site.store.list_active() == []


@pytest.mark.parametrize("change", [lambda s: s.login("ada"), lambda s: s.regenerate_id()])
async def test_a_new_id_before_the_accept_rides_on_it(change: Callable[[Session], object]) -> None:
    """The data are kept and the old cookie is dead."""
    site = Site()
    old = await site.visitor(n=1)

    async def app(session: Session, receive: Receive, send: Send) -> None:
        async with session.transaction():
            change(session)
        await send(ACCEPT)
        await count(session)

    (accept,) = await site.socket(app, old)
    new = cookie_of(accept)
    assert new not in (None, old)
    assert (await site.get(new))[0]["n"] == 2
    assert await site.get(old) == ({}, None)


@pytest.mark.parametrize("change", [lambda s: s.login("ada"), lambda s: s.regenerate_id()])
async def test_a_new_id_after_the_accept_is_refused(change: Callable[[Session], object]) -> None:
    """The client could not be told, so nothing changes: the old id and record live on."""
    site = Site()
    cookie = await site.visitor(n=1)

    async def change_it(session: Session) -> None:
        async with session.transaction():
            change(session)
            session["n"] = 5

    async def app(session: Session, receive: Receive, send: Send) -> None:
        await send(ACCEPT)
        with pytest.raises(SessionClosedError):
            await change_it(session)
        await count(session)

    await site.socket(app, cookie)
    assert await site.get(cookie) == ({"n": 2}, None)
    site.assert_free()


async def test_logging_out_is_possible_at_any_time() -> None:
    """The record is gone when the block ends; the cookie goes with the next request."""
    site = Site()
    cookie = await site.visitor(n=1)

    async def app(session: Session, receive: Receive, send: Send) -> None:
        await send(ACCEPT)
        async with session.transaction():
            session.logout()
        assert await site.store.list_active() == []
        with pytest.raises(SessionClosedError):
            await count(session)

    await site.socket(app, cookie)
    assert (await site.get(cookie))[0] == {}
    site.assert_free()


async def test_logging_out_before_the_accept_removes_the_cookie_there() -> None:
    """The accept carries the removal."""
    site = Site()
    cookie = await site.visitor(n=1)

    async def app(session: Session, receive: Receive, send: Send) -> None:
        async with session.transaction():
            session.logout()
        await send(ACCEPT)

    (accept,) = await site.socket(app, cookie)
    assert cookie_of(accept) == b"session=null"


# --- faults ---------------------------------------------------------------------------------------


async def test_a_store_that_is_down_closes_before_the_accept() -> None:
    """The client is told to try again later; the app does not run."""
    site = Site()
    cookie = await site.visitor(n=1)
    site.store.fails_on = "load"
    assert await site.socket(not_reached, cookie) == [{"type": "websocket.close", "code": 1013, "reason": ""}]
    assert site.events == ["store_error"]


@pytest.mark.parametrize(
    ("options", "fails_on", "value", "code", "event"),
    [
        ({}, "checkout", 2, 1013, "store_error"),
        ({}, "commit", 2, 1013, "store_error"),
        ({"lock_wait": 0.01}, None, 2, 1013, "lock_timeout"),
        ({"max_waiters": 0}, None, 2, 1013, "too_many_waiters"),
        ({}, None, {1, 2}, 1011, "unstorable_value"),
    ],
    ids=["store down", "commit fails", "lock wait over", "too many waiters", "unstorable"],
)
async def test_a_fault_before_the_accept_closes_the_connection(
    options: dict[str, Any], fails_on: str | None, value: object, code: int, event: str
) -> None:
    """An error of the session that the app lets rise becomes a close code, and no lock is left."""
    site = Site(**options)
    cookie = await site.visitor(n=1)
    site.store.fails_on = fails_on
    held = await asgi.Site.backing.checkout(
        site.store, (await site.record()).session_id, POLICY if options else None, None
    )
    assert isinstance(held, Checkout)

    async def app(session: Session, receive: Receive, send: Send) -> None:
        async with session.transaction():
            session["n"] = value
        await send(ACCEPT)

    with anyio.fail_after(5):
        sent = await site.socket(app, cookie)
    assert sent == [{"type": "websocket.close", "code": code, "reason": ""}]
    assert site.events == [event]
    await site.store.release(held)
    site.assert_free()
    assert (await site.record()).metadata == {"n": 1}


async def begins_too_late(session: Session) -> None:
    """The chat of README, with an anonymous client."""
    async with session.transaction() as data:
        data.increment_message_count()


async def changes_outside(session: Session) -> None:
    session["n"] = 2


async def stores_a_set(session: Session) -> None:
    async with session.transaction():
        session["n"] = {1}


@pytest.mark.parametrize(
    ("act", "known", "fails_on", "event"),
    [
        (begins_too_late, False, None, "uncaught_error"),
        (changes_outside, True, None, "uncaught_error"),
        (stores_a_set, True, None, "unstorable_value"),
        (count, True, "checkout", "store_error"),
        (count, True, "commit", "store_error"),
    ],
)
async def test_an_error_of_ours_closes_an_accepted_connection(
    act: Callable[[Session], Awaitable[None]], known: bool, fails_on: str | None, event: str
) -> None:
    """With 1008 (RFC 6455 section 7.4.1) and one event: no traceback, and no 1006 for the client."""
    site = Site()
    cookie = await site.visitor(n=1) if known else None
    site.store.fails_on = fails_on

    async def app(session: Session, receive: Receive, send: Send) -> None:
        await send(ACCEPT)
        await act(session)

    assert [message["type"] for message in await site.socket(app, cookie)] == [
        "websocket.accept",
        "websocket.close",
    ]
    assert (await site.socket(app, cookie))[1]["code"] == 1008
    assert site.events == [event] * 2
    site.assert_free()


async def test_a_client_that_left_makes_no_noise() -> None:
    """The close that can no longer be sent fails; the event tells what happened."""
    site = Site()
    scope = site.scope("websocket", lambda session, receive, send: changes(session, send), None, None, [])

    async def changes(session: Session, send: Send) -> None:
        await send(ACCEPT)
        await changes_outside(session)

    async def send(message: Message) -> None:
        if message["type"] == "websocket.close":
            raise RuntimeError("Unexpected ASGI message 'websocket.close', after the client has gone")

    async def receive() -> Message:
        return {"type": "websocket.connect"}

    await site.middleware(scope, receive, send)
    assert site.events == ["uncaught_error"]


async def test_an_error_of_the_app_rises_from_an_accepted_connection() -> None:
    """It is not ours to answer."""
    site = Site()

    async def app(session: Session, receive: Receive, send: Send) -> None:
        await send(ACCEPT)
        raise ZeroDivisionError

    sent: list[Message] = []
    with pytest.raises(ZeroDivisionError):
        await site.socket(app, sent=sent)
    assert [message["type"] for message in sent] == ["websocket.accept"]


@pytest.mark.parametrize(
    "began",
    [
        [{"type": "websocket.close", "code": 4000}],
        [{"type": "websocket.http.response.start", "status": 403, "headers": []}],
        [ACCEPT, {"type": "websocket.close", "code": 4000}],
    ],
    ids=["closed", "denied", "accepted and closed"],
)
async def test_a_fault_after_the_answer_began_rises(began: list[Message]) -> None:
    """What was sent cannot be taken back and nothing is sent on top: the server gets the exception."""
    site = Site()
    cookie = await site.visitor(n=1)
    site.store.fails_on = "checkout"
    sent: list[Message] = []

    async def app(session: Session, receive: Receive, send: Send) -> None:
        for message in began:
            await send(message)
        await count(session)

    with pytest.raises(SessionStoreError):
        await site.socket(app, cookie, sent=sent)
    assert [message["type"] for message in sent] == [message["type"] for message in began]
    site.assert_free()


async def test_no_session_begins_once_the_connection_is_refused() -> None:
    """After the app's own close no cookie can be delivered."""
    site = Site()

    async def app(session: Session, receive: Receive, send: Send) -> None:
        await send({"type": "websocket.close", "code": 4000})
        with pytest.raises(SessionClosedError):
            await count(session)

    assert await site.socket(app) == [{"type": "websocket.close", "code": 4000}]
    assert await site.store.list_active() == []


async def test_an_error_of_the_app_is_its_own() -> None:
    """It rises as it is, before the accept and after it."""
    site = Site()
    cookie = await site.visitor(n=1)

    async def app(session: Session, receive: Receive, send: Send) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await site.socket(app, cookie)


async def test_a_denial_is_an_answer_like_any_other() -> None:
    """The handshake that the app answers with a page gets the session's headers, the body passes."""
    site = Site()

    async def app(session: Session, receive: Receive, send: Send) -> None:
        async with session.transaction():
            session["refused"] = 1
        await send(
            {"type": "websocket.http.response.start", "status": 401, "headers": [(b"vary", b"Origin")]}
        )
        await send({"type": "websocket.http.response.body", "body": b"no"})

    start, body = await site.socket(app)
    assert start["status"] == 401
    assert start["headers"][0] == (b"vary", b"Origin, Cookie")
    assert [name for name, _ in start["headers"]] == [b"vary", b"set-cookie", b"cache-control"]
    assert body == {"type": "websocket.http.response.body", "body": b"no"}
    assert await site.get(cookie_of(start)) == ({"refused": 1}, None)


@pytest.mark.parametrize(
    "change",
    [lambda s: s.update(n=2), lambda s: s.regenerate_id(), lambda s: s.logout(), lambda s: None],
    ids=["write", "regenerate", "logout", "read"],
)
async def test_a_cancelled_connection_leaves_no_lock(change: Callable[[Session], object]) -> None:
    """Cancelled at every point where it waits, it leaves the old record or the new one, and the lock free."""
    step, finished = 0, False
    while not finished:
        step += 1
        site = Site()
        cookie = await site.visitor(n=1)
        site.store.steps = 0

        async def app(session: Session, receive: Receive, send: Send) -> None:
            async with session.transaction():
                change(session)
                await checkpoint()
            await send(ACCEPT)

        with anyio.CancelScope() as scope:

            def cancel(now: int, step: int = step, scope: anyio.CancelScope = scope) -> None:
                if now == step:
                    scope.cancel()

            site.store.on_step = cancel
            await site.socket(app, cookie)
        finished = not scope.cancel_called
        site.store.on_step = lambda now: None
        site.assert_free()
        found, _ = await site.get(cookie)
        assert found in ({"n": 1}, {"n": 2}, {})
    assert step > 3


async def test_a_connection_that_is_cancelled_while_it_waits_leaves_the_queue() -> None:
    """The one behind it gets the lock."""
    site = Site()
    cookie = await site.visitor(n=0)
    session_id = (await site.record()).session_id
    held = await site.store.checkout(session_id, POLICY, None)
    assert isinstance(held, Checkout)

    async def app(session: Session, receive: Receive, send: Send) -> None:
        await send(ACCEPT)
        await count(session)

    async with anyio.create_task_group() as tasks:
        async with anyio.create_task_group() as first:
            first.start_soon(site.socket, app, cookie)
            await anyio.wait_all_tasks_blocked()
            tasks.start_soon(site.socket, app, cookie)
            await anyio.wait_all_tasks_blocked()
            first.cancel_scope.cancel()
        await site.store.release(held)
    assert (await site.record()).metadata == {"n": 1}
    site.assert_free()


async def test_a_transaction_may_outlive_its_connection() -> None:
    """A task of the app's own that is in its transaction when the connection ends still stores it."""
    site = Site()
    cookie = await site.visitor(n=0)
    inside, done = anyio.Event(), anyio.Event()

    async def outlive(session: Session) -> None:
        async with session.transaction():
            session["n"] = 1
            inside.set()
            await done.wait()

    async with anyio.create_task_group() as tasks:

        async def app(session: Session, receive: Receive, send: Send) -> None:
            await send(ACCEPT)
            tasks.start_soon(outlive, session)
            await inside.wait()

        await site.socket(app, cookie)
        done.set()
    assert (await site.record()).metadata == {"n": 1}
    site.assert_free()
