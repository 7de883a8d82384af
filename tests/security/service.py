"""A service behind the middleware, and the people who visit it: all that these tests know of the package."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

from asgi import FIREFOX, KEY, Answer, empty_body, http_scope, page

from asgi_sessions import RedisSessionStore, Session, SessionEvent, SessionMiddleware, SessionStore
from asgi_sessions.asgi import ASGIApp, Message, Receive, Scope, Send

Headers: TypeAlias = Iterable[tuple[bytes, bytes]]
Wrapped: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]

CHROME = "Mozilla/5.0 (Windows NT 10.0) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/140.0 Safari/537.36"


@dataclass
class Service:
    """A middleware around whichever app comes with the connection.

    `events` is what it told of since somebody began a session in peace, `history` is all of it.
    """

    store: SessionStore
    options: dict[str, Any] = field(default_factory=dict)
    events: list[SessionEvent] = field(default_factory=list)
    history: list[SessionEvent] = field(default_factory=list)

    def __post_init__(self) -> None:
        settings = {"secret_key": KEY, "store": self.store, "on_event": self._note, **self.options}
        self.middleware = SessionMiddleware(_app, **settings)

    def _note(self, event: SessionEvent) -> None:
        self.events.append(event)
        self.history.append(event)

    @classmethod
    def on(cls, redis_url: str, **options: Any) -> Service:
        """A service over Redis; its store is the caller's to close."""
        return cls(RedisSessionStore(redis_url), options)

    def option(self, **options: Any) -> Service:
        """Another service with these options over the same store."""
        return Service(self.store, {**self.options, **options}, self.events, self.history)

    def visitor(self, **traits: Any) -> Visitor:
        return Visitor(self, **traits)

    @property
    def told(self) -> list[str]:
        """The names of the events."""
        return [event.name for event in self.events]

    async def request(
        self, app: ASGIApp, headers: Headers = (), receive: Receive = empty_body, **scope: Any
    ) -> Answer:
        """One request and its answer."""
        answer = Answer()

        async def send(message: Message) -> None:
            answer.messages.append(message)

        connection = http_scope(headers=list(headers), **scope)
        connection["tests.app"] = app
        await self.middleware(connection, receive, send)
        return answer

    async def connect(self, app: ASGIApp, headers: Headers = (), **scope: Any) -> list[Message]:
        """One WebSocket and the messages that it was answered with."""
        sent: list[Message] = []

        async def receive() -> Message:
            return {"type": "websocket.connect"}

        async def send(message: Message) -> None:
            sent.append(message)

        connection = http_scope(type="websocket", headers=list(headers), **{"scheme": "ws", **scope})
        connection["tests.app"] = app
        await self.middleware(connection, receive, send)
        return sent


async def _app(scope: Scope, receive: Receive, send: Send) -> None:
    await scope["tests.app"](scope, receive, send)


@dataclass
class Visitor:
    """A browser with one cookie jar; a copy of it is a thief, or another tab."""

    service: Service
    token: str | None = None
    name: str = "session"
    user_agent: str = FIREFOX
    address: str = "203.0.113.7"
    scheme: str = "http"

    def headers(self) -> list[tuple[bytes, bytes]]:
        sent = [(b"user-agent", self.user_agent.encode())]
        return sent if self.token is None else [*sent, (b"cookie", f"{self.name}={self.token}".encode())]

    async def open(self, act: Any = None, headers: Headers = (), **scope: Any) -> Answer:
        """Open a page that does `act` with the session; its cookie is kept."""
        return await self.use(page(act), headers, **scope)

    async def use(self, app: ASGIApp, headers: Headers = (), **scope: Any) -> Answer:
        """Open what `app` answers; its cookie is kept."""
        scope = {"client": (self.address, 50000), "scheme": self.scheme, **scope}
        answer = await self.service.request(app, [*self.headers(), *headers], **scope)
        self.take(answer)
        return answer

    async def connect(self, app: ASGIApp, headers: Headers = ()) -> list[Message]:
        """Open a WebSocket."""
        scheme = "wss" if self.scheme == "https" else "ws"
        sent = [*self.headers(), *headers]
        return await self.service.connect(app, sent, client=(self.address, 50000), scheme=scheme)

    def take(self, answer: Answer) -> None:
        """Believe `Set-Cookie`."""
        for line in answer.cookies:
            name, _, rest = line.partition("=")
            value = rest.partition(";")[0]
            if name == self.name:
                self.token = None if value == "null" else value

    def copy(self, **changes: Any) -> Visitor:
        return replace(self, **changes)

    async def begin(self, **values: Any) -> str:
        """Have a session with these values; its id."""
        await self.open(lambda session: session.update(values or {"n": 1}))
        self.service.events.clear()
        return self.session_id

    @property
    def session_id(self) -> str:
        assert self.token is not None, "this visitor has no session"
        return self.token.partition(".")[0]

    async def sees(self, headers: Headers = (), **scope: Any) -> dict[str, Any]:
        """What a page shows of the session: its values, and the user under `user`."""
        seen: dict[str, Any] = {}

        def look(session: Session) -> None:
            seen.update(session)
            if session.data.user_id is not None:
                seen["user"] = session.data.user_id

        answer = await self.open(look, headers, **scope)
        assert answer.status == 200, f"the page was answered {answer.status}"
        return seen


def login(session: Session) -> None:
    session.login("ada")


def logout(session: Session) -> None:
    session.logout()


def read(session: Session) -> None:
    session.get("n")


def write(session: Session) -> None:
    session["n"] = session.get("n", 0) + 1
