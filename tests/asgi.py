"""Drives an ASGI app by hand and writes down every message and every store call, in the order they happen."""

from __future__ import annotations

import inspect
import random
import re
import sqlite3
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, TypeAlias, TypeVar, cast

import anyio.lowlevel

from asgi_sessions import (
    InMemorySessionStore,
    Session,
    SessionData,
    SessionEvent,
    SessionMiddleware,
    SessionStore,
    SQLiteSessionStore,
)
from asgi_sessions.asgi import ASGIApp, Headers, Message, Receive, Scope, Send
from asgi_sessions.stores.checkout import Checkout, Lifetime, LockPolicy, Missing, Outcome
from asgi_sessions.stores.local import LocalLocks, RetiredIds
from asgi_sessions.stores.value import Value

KEY = "0123456789abcdef" * 4
FIREFOX = "Mozilla/5.0 (X11; Linux x86_64; rv:140.0) Gecko/20100101 Firefox/140.0"
CLIENT = ("203.0.113.7", 50000)

T = TypeVar("T", bound=SessionStore)
Act: TypeAlias = Callable[[Session], object]
Deliver: TypeAlias = Callable[[Message], Awaitable[None]]


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Shop(SessionData):
    """A model with a field of its own."""

    cart: list[str] = []  # noqa: RUF012  # pydantic copies defaults


class PrimitiveStore(SessionStore):
    """A third party's store: four primitives on a dict. Each lets other tasks run, as chance will."""

    def __init__(self, *, clock: Callable[[], float]) -> None:
        super().__init__()
        self._clock = clock
        self._locks, self._retired = LocalLocks(clock), RetiredIds(clock)
        self._values: dict[str, bytes] = {}
        self._chance = random.Random(0)

    def now(self) -> float:
        return self._clock()

    async def pause(self) -> None:
        """Before and after each primitive."""
        for _ in range(self._chance.randrange(3)):
            await anyio.lowlevel.checkpoint()

    async def read_value(self, session_id: str) -> bytes | None:
        await self.pause()
        value = self._values.get(session_id)
        await self.pause()
        return value

    async def write_value(self, session_id: str, value: bytes, ttl: float) -> None:
        await self.pause()
        self._values[session_id] = value
        await self.pause()

    async def delete_value(self, session_id: str) -> None:
        await self.pause()
        self._values.pop(session_id, None)
        await self.pause()

    async def iter_ids(self) -> AsyncGenerator[str, None]:
        for session_id in list(self._values):
            yield session_id


class FileStore(SQLiteSessionStore):
    """A SQLite store in a file of its own in `folder`; `look` and `change` reach around it."""

    folder: ClassVar[Path]
    made: ClassVar[list[FileStore]] = []

    def __init__(self, *, clock: Callable[[], float]) -> None:
        super().__init__(self.folder / f"{len(self.made)}.db", synchronous="normal", clock=clock)
        self._settings = replace(self._settings, moments=clock)
        self.made.append(self)

    def look(self, query: str, *values: object) -> list[Any]:
        """The first column of what a query finds, when all that was asked for is done."""
        engine = self._engine
        while engine is not None and (engine.writer._calls or engine.writer._turn.locked()):
            time.sleep(0.001)
        return [] if engine is None else [row[0] for row in engine.reader._quick.rows(query, values)]

    def change(self, statement: str, *values: object) -> None:
        """Write behind the store's back."""
        with closing(sqlite3.connect(self._place.path)) as db:
            db.execute(statement, values)
            db.commit()

    @classmethod
    def close_all(cls) -> None:
        """Close those that a test has made."""
        while cls.made:
            engine = cls.made.pop()._engine
            if engine is not None:
                engine.close()


class RecordingStore(SessionStore):
    """Tells `before` and `after` of each request operation of the store it is joined with; `before` logs it.

    What a subclass raises in `after` comes when the operation is done, as a lost reply does.
    """

    def __init__(self, log: list[str], clock: Clock) -> None:
        super().__init__(clock=clock)  # type: ignore[call-arg]  # of the store beneath
        self.log = log
        self._inside = False

    async def before(self, call: str) -> None:
        self.log.append(call)

    async def after(self, call: str) -> None:
        """Nothing to do here."""

    async def checkout(
        self,
        session_id: str,
        lock: LockPolicy | None,
        lifetime: Lifetime | None,
        *,
        passive: bool = False,
    ) -> Checkout | Missing:
        if self._inside:
            return await super().checkout(session_id, lock, lifetime, passive=passive)
        call = "checkout" if lock is None else "checkout+lock"
        await self.before(call)
        taken = await super().checkout(session_id, lock, lifetime, passive=passive)
        await self._after_taking(call, None if isinstance(taken, Missing) else taken)
        return taken

    async def keep_alive(self, checkout: Checkout) -> None:
        if self._inside:
            return await super().keep_alive(checkout)
        await self.before("keep alive")
        await super().keep_alive(checkout)
        return await self.after("keep alive")

    async def arrived(self, checkout: Checkout) -> None:
        await self.before("arrived")
        with self._within():
            await super().arrived(checkout)
        await self.after("arrived")

    async def create(
        self,
        session_id: str,
        record: bytes,
        lifetime: Lifetime,
        lock: LockPolicy | None,
        user: str | None = None,
    ) -> Checkout | None:
        call = "create" if lock is None else "create+lock"
        await self.before(call)
        taken = await super().create(session_id, record, lifetime, lock, user)
        await self._after_taking(call, taken)
        return taken

    async def commit(self, checkout: Checkout, record: bytes, *, release: bool) -> Outcome:
        if self._inside:
            return await super().commit(checkout, record, release=release)
        call = "commit+release" if release else "commit"
        await self.before(call)
        with self._within():
            outcome = await super().commit(checkout, record, release=release)
        await self.after(call)
        return outcome

    async def commit_unlocked(self, checkout: Checkout, record: bytes) -> Outcome:
        await self.before("commit unlocked")
        with self._within():
            outcome = await super().commit_unlocked(checkout, record)
        await self.after("commit unlocked")
        return outcome

    async def bound(self, checkout: Checkout, lifetime: Lifetime) -> Outcome:
        await self.before("bound")
        outcome = await super().bound(checkout, lifetime)
        await self.after("bound")
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
        call = "move" if lock is None else "move+lock"
        await self.before(call)
        with self._within():
            outcome = await super().move(
                checkout, session_id, record, lifetime=lifetime, lock=lock, was=was, user=user, leads=leads
            )
        await self.after(call)
        return outcome

    async def successor_of(self, session_id: str) -> str | None:
        await self.before("follow")
        found = await super().successor_of(session_id)
        await self.after("follow")
        return found

    async def discard(self, checkout: Checkout) -> Outcome:
        await self.before("discard")
        with self._within():
            outcome = await super().discard(checkout)
        await self.after("discard")
        return outcome

    async def release(self, checkout: Checkout) -> None:
        if self._inside:
            return await super().release(checkout)
        await self.before("release")
        await super().release(checkout)
        return await self.after("release")

    async def link_user(self, user_id: str, session_id: str, lifetime: Lifetime) -> None:
        await self.before("link")
        await super().link_user(user_id, session_id, lifetime)
        await self.after("link")

    async def end_surplus(self, user: str, most: int, keep: str) -> list[str]:
        await self.before("end surplus")
        ended = await super().end_surplus(user, most, keep)
        await self.after("end surplus")
        return ended

    async def open(self) -> None:
        self.log.append("open")
        await super().open()

    async def aclose(self) -> None:
        await super().aclose()
        self.log.append("close")

    async def _after_taking(self, call: str, taken: Checkout | None) -> None:
        """A lock that was taken for a caller who will not hear of it goes at once: the store's promise."""
        try:
            await self.after(call)
        except BaseException:
            if taken is not None:
                await super().release(taken)
            raise

    @contextmanager
    def _within(self) -> Iterator[None]:
        self._inside = True
        try:
            yield
        finally:
            self._inside = False


def over(backing: type[SessionStore], kind: type[T]) -> type[T]:
    """A class of stores that do what `kind` says around a real store."""
    return cast("type[T]", type(kind.__name__, (kind, backing), {}))


@dataclass
class Answer:
    """What one request was answered with."""

    messages: list[Message] = field(default_factory=list)

    @property
    def start(self) -> Message:
        """The one start; an app that sends none gives an empty message."""
        found = [message for message in self.messages if message["type"] == "http.response.start"]
        assert len(found) < 2
        return found[0] if found else {}

    @property
    def status(self) -> int:
        return int(self.start["status"])

    @property
    def headers(self) -> Headers:
        return list(self.start.get("headers", ()))

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.messages)

    @property
    def cookies(self) -> list[str]:
        return self.header("set-cookie")

    def header(self, name: str) -> list[str]:
        return [value.decode("latin-1") for key, value in self.headers if key == name.encode()]


@dataclass
class Site:
    """A middleware around whichever app comes with the request; `log` interleaves calls and messages.

    The store is `store_class` over a real one, the `backing`. Log entries are its calls, "app" when that
    begins, "start STATUS", "more" for a chunk with more to come, "body" for the last one, and the type of any
    other message.
    """

    backing: ClassVar[type[SessionStore]] = InMemorySessionStore

    options: dict[str, Any] = field(default_factory=dict)
    store_class: type[RecordingStore] = RecordingStore
    clock: Clock = field(default_factory=Clock)
    log: list[str] = field(default_factory=list)
    events: list[str] = field(default_factory=list)
    deliver: Deliver | None = None

    def __post_init__(self) -> None:
        self.store = over(self.backing, self.store_class)(self.log, self.clock)
        options = {"secret_key": KEY, "store": self.store, "on_event": self._note}
        self.middleware = SessionMiddleware(self._app, **{**options, **self.options})

    async def request(
        self,
        app: ASGIApp,
        *,
        headers: Iterable[tuple[bytes, bytes]] = (),
        receive: Receive | None = None,
        **scope: Any,
    ) -> Answer:
        """One request, alone on its connection."""
        answer = Answer()

        async def send(message: Message) -> None:
            self.log.append(_name(message))
            if self.deliver is not None:
                await self.deliver(message)
            answer.messages.append(message)

        full = http_scope(headers=list(headers), **scope)
        full["tests.app"] = app
        await self.middleware(full, receive or empty_body, send)
        return answer

    def browser(self, **scope: Any) -> Browser:
        return Browser(self, scope)

    def option(self, **options: Any) -> Site:
        """Another site with these options over the same store; its calls and events are logged here."""
        site = Site({**self.options, "store": self.store, **options}, self.store_class, self.clock, self.log)
        site.store, site.events = self.store, self.events
        return site

    def records(self) -> list[SessionData]:
        """All that are live."""
        store, now = self.store, self.clock.now
        if isinstance(store, InMemorySessionStore):
            names = [name for name, entry in store._entries.items() if entry.ends > now]
        elif isinstance(store, FileStore):
            names = store.look("SELECT id FROM session WHERE ends > ?", now)
        else:
            assert isinstance(store, PrimitiveStore)
            values = {name: Value.unpack(value) for name, value in store._values.items()}
            names = [name for name, value in values.items() if value is not None and value.ends > now]
        return [store.read(self.raw(name)) for name in names]

    def raw(self, session_id: str) -> bytes:
        """The record as it is stored."""
        store = self.store
        if isinstance(store, InMemorySessionStore):
            return store._entries[session_id].record
        if isinstance(store, FileStore):
            (record,) = store.look("SELECT record FROM session WHERE id = ?", session_id)
            return bytes(record)
        assert isinstance(store, PrimitiveStore)
        return store._values[session_id].partition(b"\n")[2]

    def spoil(self, session_id: str, raw: bytes) -> None:
        """Put something else in its place; the version stays."""
        store = self.store
        if isinstance(store, InMemorySessionStore):
            store._entries[session_id].record = raw
        elif isinstance(store, FileStore):
            store.change("UPDATE session SET record = ? WHERE id = ?", raw, session_id)
        else:
            assert isinstance(store, PrimitiveStore)
            head, line_feed, _ = store._values[session_id].partition(b"\n")
            store._values[session_id] = head + line_feed + raw

    @property
    def locks(self) -> int:
        """How many locks are held by a lease that lasts."""
        if isinstance(self.store, FileStore):
            held = "SELECT count(DISTINCT id) FROM lock WHERE until > ?"
            return sum(self.store.look(held, self.clock.now))
        return sum(ends > self.clock.now for _, ends, *_ in self.store._locks._holders.values())

    async def _app(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.log.append("app")
        await scope["tests.app"](scope, receive, send)

    def _note(self, event: SessionEvent) -> None:
        self.events.append(event.name)


@dataclass
class Browser:
    """Keeps the session cookie between requests, as a browser does."""

    site: Site
    scope: dict[str, Any]
    cookie: str | None = None
    user_agent: str | None = FIREFOX

    async def open(self, app: ASGIApp, **scope: Any) -> Answer:
        scope = {**self.scope, **scope}
        headers = list(scope.pop("headers", ()))
        if self.user_agent is not None:
            headers.append((b"user-agent", self.user_agent.encode()))
        if self.cookie is not None:
            headers.append((b"cookie", f"session={self.cookie}".encode()))
        answer = await self.site.request(app, headers=headers, **scope)
        self.take(answer)
        return answer

    def take(self, answer: Answer) -> None:
        """Believe the answer's Set-Cookie header."""
        for line in answer.cookies:
            value = re.match(r"session=([^;]*)", line)
            if value is not None:
                self.cookie = None if value[1] == "null" else value[1]

    def twin(self, **changes: Any) -> Browser:
        """Another client with the same cookie."""
        return replace(self, **changes)

    async def begin(self, **values: Any) -> str:
        """Have a session with these values; its id. The log starts anew after that."""
        await self.open(page(lambda session: session.update(values or {"n": 0})))
        self.site.log.clear()
        self.site.events.clear()
        return self.session_id

    @property
    def session_id(self) -> str:
        assert self.cookie is not None
        return self.cookie.partition(".")[0]

    async def stored(self) -> dict[str, Any] | None:
        """What the store has under this browser's id."""
        data = await self.site.store.get(self.session_id)
        return None if data is None else dict(data.metadata)


def http_scope(**changes: Any) -> dict[str, Any]:
    scope: dict[str, Any] = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "method": "GET",
        "scheme": "http",
        "path": "/",
        "raw_path": b"/",
        "query_string": b"",
        "root_path": "",
        "headers": [],
        "client": CLIENT,
        "server": ("127.0.0.1", 8000),
    }
    return {**scope, **changes}


async def empty_body() -> Message:
    return {"type": "http.request", "body": b"", "more_body": False}


async def run(act: Act | None, session: Session) -> None:
    """Let a plain or async function use the session."""
    result = act(session) if act is not None else None
    if inspect.isawaitable(result):
        await result


def start(status: int = 200, headers: Iterable[tuple[bytes, bytes]] = ()) -> Message:
    return {"type": "http.response.start", "status": status, "headers": list(headers)}


def chunk(body: bytes = b"", more: bool = False) -> Message:
    return {"type": "http.response.body", "body": body, "more_body": more}


def page(
    act: Act | None = None,
    *,
    status: int = 200,
    headers: Iterable[tuple[bytes, bytes]] = (),
    body: bytes = b"ok",
    then: Act | None = None,
) -> ASGIApp:
    """An app that lets `act` use the session, answers with a body of known length, and goes on to `then`."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await run(act, scope["session"])
        await send(start(status, [(b"content-length", str(len(body)).encode()), *headers]))
        await send(chunk(body))
        await run(then, scope["session"])

    return app


def stream(act: Act | None = None, *during: Act | None, status: int = 200) -> ASGIApp:
    """An app that lets `act` use the session, then sends a chunk after each of `during` and an empty last."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await run(act, scope["session"])
        await send(start(status))
        for each in during:
            await run(each, scope["session"])
            await send(chunk(b"part", more=True))
        await send(chunk())

    return app


def messages(*to_send: Message, act: Act | None = None) -> ASGIApp:
    """An app that lets `act` use the session and sends exactly these messages."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await run(act, scope["session"])
        for message in to_send:
            await send(message)

    return app


def _name(message: Message) -> str:
    if message["type"] == "http.response.start":
        return f"start {message['status']}"
    if message["type"] == "http.response.body":
        return "more" if message.get("more_body") else "body"
    return str(message["type"])
