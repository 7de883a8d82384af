"""What a crash reporter learns, which writes down the locals of each frame: nothing that opens a session."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
from asgi import CLIENT, FIREFOX, KEY, chunk, empty_body, http_scope, run, start

import asgi_sessions
from asgi_sessions import (
    Fingerprint,
    InMemorySessionStore,
    RedisSessionStore,
    Session,
    SessionClosedError,
    SessionData,
    SessionMiddleware,
    SessionStore,
)
from asgi_sessions.asgi import Message, Receive, Scope, Send
from asgi_sessions.client.cookie import SessionCookie
from asgi_sessions.client.signer import CookieSigner
from asgi_sessions.record.codec import encode_checked
from asgi_sessions.stores.checkout import Checkout, Lifetime, LockPolicy
from asgi_sessions.stores.redis.commands.header import Stored
from asgi_sessions.stores.redis.commands.keys import KeySpace
from asgi_sessions.stores.redis.connection.deployment import deployment
from asgi_sessions.stores.redis.locking.waiter import Acquired
from asgi_sessions.stores.sqlite.columns import columns_of
from asgi_sessions.stores.sqlite.locks import Head
from asgi_sessions.stores.sqlite.operations import Claim, New
from asgi_sessions.stores.sqlite.transaction import Lease, Waiter

pytestmark = pytest.mark.anyio

PACKAGE = str(Path(asgi_sessions.__file__).parent)
CARD = "4000-1234-5678-9010"
CLIENT_HASH = Fingerprint().hash(CLIENT[0], FIREFOX)


class Crash(Exception):  # noqa: N818  # it is none of the app's design
    """What the app fails with."""


def crash(session: Session) -> None:
    session["n"] = 1
    raise Crash


async def crash_in_a_transaction(session: Session) -> None:
    async with session.transaction() as data:
        data.increment_message_count()
        raise Crash


async def crash_after_saving(session: Session) -> None:
    session["n"] = 1
    await session.save()
    raise Crash


def crash_with_a_new_id(session: Session) -> None:
    session.login("ada")
    raise Crash


async def begun(store: SessionStore) -> str:
    """A session with a secret in it; its cookie."""
    data = SessionData(session_id="5e55" * 8, fingerprint=CLIENT_HASH, metadata={"card": CARD})
    await store.set(data.session_id, data)
    return CookieSigner(KEY).sign(data.session_id)


def frames_of_ours(error: BaseException) -> list[str]:
    """What is written down of each frame of the package, the causes' too."""
    report = traceback.TracebackException.from_exception(error, capture_locals=True)
    seen: list[str] = []
    pending: list[traceback.TracebackException | None] = [report]
    while pending:
        each = pending.pop()
        if each is not None:
            pending += [each.__cause__, each.__context__]
            seen += [f"{frame.name}: {frame.locals}" for frame in each.stack if PACKAGE in frame.filename]
    return seen


@pytest.mark.parametrize(
    "act",
    [crash, crash_in_a_transaction, crash_after_saving, crash_with_a_new_id],
    ids=lambda act: act.__name__,
)
@pytest.mark.parametrize("kind", ["http", "websocket", "read_only", "excluded", "started"])
@pytest.mark.parametrize("lock", [True, "auto"])
async def test_no_frame_of_ours_tells_a_secret(
    store: SessionStore, kind: str, act: Callable[[Session], object], lock: Literal[True, "auto"]
) -> None:
    """Not the id, the cookie, the client's fingerprint or what the session holds."""
    cookie = await begun(store)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if kind == "excluded":
            raise Crash
        if kind == "started":
            scope["session"]["m"] = 1  # or it would be let go
            await send(start())
            await send(chunk(b"part", more=True))
        if kind in ("websocket", "read_only") and act is not crash_in_a_transaction:
            raise Crash
        await run(act, scope["session"])

    middleware = SessionMiddleware(
        app, KEY, store=store, lock=lock, exclude="/excluded", read_only="/read_only"
    )

    async def send(message: Message) -> None:
        """The server takes it."""

    headers = [(b"user-agent", FIREFOX.encode()), (b"cookie", b"session=" + cookie.encode())]
    scope = http_scope(path=f"/{kind}", headers=headers)
    if kind == "websocket":
        scope["type"] = "websocket"
    if kind == "started":
        scope["method"] = "POST"  # a stream by GET may not change its session any more
    with pytest.raises((Crash, SessionClosedError)) as caught:
        await middleware(scope, empty_body, send)
    frames = frames_of_ours(caught.value)
    assert any(frame.startswith("__call__") for frame in frames)
    for secret in (cookie, "5e55" * 8, CLIENT_HASH, CARD):
        assert [frame for frame in frames if secret in frame] == []


async def test_internal_values_tell_no_secret(redis_url: str) -> None:
    """Whatever a frame holds of them: their repr has no id, no token, no record and no password."""
    cookie = CookieSigner(KEY).sign("5e55" * 8).encode()
    data = SessionData(session_id="5e55" * 8, fingerprint=CLIENT_HASH, metadata={"card": CARD})
    record = encode_checked(data)
    memory = InMemorySessionStore()
    await memory.set(data.session_id, data)
    taken: Any = await memory.checkout(data.session_id, LockPolicy(), None)
    session = Session()
    session.load(record)
    values = [
        SessionCookie(KEY).read(b"session=" + cookie),
        CookieSigner(KEY).verify(cookie),
        CookieSigner(KEY),
        SessionCookie(KEY),
        taken,
        Checkout(data.session_id, record, "v", "5e55", seal=record, successor=taken),
        Stored(record, b"v", 0, 0, 0),
        Acquired(b"5e55", record, 0.0, 1.0, 0.0),
        KeySpace("session:").of(data.session_id),
        deployment("redis://ada:5e55@127.0.0.1/0"),
        RedisSessionStore(redis_url),
        memory,
        session.data,
        session.identity(),
        Lifetime(absolute=1),
        [memory._entries[data.session_id]],
        Waiter(data.session_id, "5e55", LockPolicy(), None, 0.0, None),
        Lease(data.session_id, 0.0, 0.0, 0.0),
        Head(1, "5e55", "1-2", 0.0, 0.0),
        Claim(data.session_id, "5e55", ()),
        New(data.session_id, record, columns_of(record), None, None),
    ]
    for value in values:
        for secret in ("5e55", cookie.decode(), CLIENT_HASH, CARD, KEY):
            assert secret not in repr(value), type(value).__name__


def test_a_plain_record_tells_no_secret() -> None:
    """The parsed record behind a handle that nobody looked at by its type."""
    data = SessionData(session_id="5e55" * 8, fingerprint=CLIENT_HASH, metadata={"card": CARD})
    session = Session()
    session.load(encode_checked(data))
    for secret in (data.session_id, CLIENT_HASH, CARD):
        assert secret not in repr(session.identity())
