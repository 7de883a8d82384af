"""One request's messages: each kind of connection holds its answer back until the session is safe."""

from __future__ import annotations

import time
from dataclasses import dataclass

from ..asgi import Headers, Message, Receive, Scope, Send
from ..client.caching import Sharing, restrain, sharing, vary_cookie
from ..client.cookie import Presented, SessionCookie
from ..client.fingerprint import FingerprintReader
from ..client.headers import ByName
from ..client.paths import path_requested
from ..errors import SessionError
from ..observation.events import AMBIGUOUS_COOKIE, BAD_SIGNATURE, COOKIE_CLASH
from ..session.handle import Mode, Session
from ..stores.checkout import Outcome, raise_for
from .answers import Answers, no_body, status_of
from .duplicates import settle
from .holding import Rules
from .replacement import take_replaced
from .unit import Unit

_ANOTHER_NAME = (
    "something inside this middleware sets a cookie of the same name, which ends our sessions:"
    " give one of the two another session_cookie"
)
_EVENTS = {"bad_signature": BAD_SIGNATURE, "ambiguous": AMBIGUOUS_COOKIE}  # what is absurd was not let in
# bound once: looking up an Enum's member costs ten times a global on Python 3.11, and each request does it
_STORED = Outcome.STORED
_READ_AGAIN = (list, tuple)  # headers may be any iterable, but are read twice
_CLEANS_AFTER = 60  # seconds; so often at most a browser is told to forget leftover cookies
_BODY = frozenset({"http.response.body", "http.response.zerocopysend", "http.response.pathsend"})


@dataclass(frozen=True, slots=True)
class Settings:
    """What is the same for every exchange of one middleware; times in seconds."""

    rules: Rules
    cookie: SessionCookie
    client: FingerprintReader | None  # None: fingerprints are off
    answers: Answers
    max_age: float | None
    refresh_after: float | None  # rolling: the age at which a cookie is sent again
    early_release: bool  # release_lock="response_start"
    rotate_on: frozenset[str]  # the values that say who is signed in


class Exchange:
    """What HTTP and WebSockets have in common: opening, the cookie, the middleware's own answers."""

    _started = False  # the answer's headers have left
    _refreshes = False  # the cookie is to be sent again, though the client knows the id

    def __init__(
        self, settings: Settings, scope: Scope, headers: ByName, send: Send, presented: Presented
    ) -> None:
        rules, reader = settings.rules, settings.client
        client = reader.of(scope, headers) if reader is not None else None
        self.session = Session(model=rules.model, client=client, rotate_on=settings.rotate_on)
        self.unit = self.session.unit = Unit(rules, self.session, client)
        self._settings = settings
        self._scope = scope
        self._send = send
        self._presented = presented
        self._began = time.perf_counter()

    async def open(self, *, read_only: bool, passive: bool = False) -> None:
        """Load the session that the cookie names; a request without one gets a fresh session, for free."""
        rules, presented = self._settings.rules, self._presented
        self.unit.passive = passive
        if presented.rivals:
            presented = self._presented = await settle(presented, rules.store, rules.lifetime)
        if presented.reason is not None:
            rules.events.emit(_EVENTS[presented.reason])
        if presented.session_id is not None:
            self._refreshes = self._is_due(presented)
            await self.unit.open(presented.session_id, read_only=read_only)
        if read_only:
            self.session.mode = Mode.READ_ONLY

    async def fail(self, error: Exception, receive: Receive) -> None:
        """Nothing more is stored; the error is answered where it is the session's, else it rises."""
        await self.unit.roll_back()
        if self._started or status_of(error) is None:
            raise error
        self._started = True
        await self._explain(error, receive)

    async def _explain(self, error: Exception, receive: Receive) -> None:
        session_id = self._presented.session_id
        await self._settings.answers.explain(self._scope, receive, self._send_own, error, session_id)

    async def close(self) -> None:
        """Let go of what is still held, whatever happened."""
        if self.unit.is_settled:
            self.unit.end()
        else:
            await self.unit.roll_back()
        self._settings.rules.store.note_response(time.perf_counter() - self._began)
        self.unit.detach()

    async def _send_own(self, message: Message) -> None:
        """The middleware's own answer; what `save` has stored before, the client must learn all the same."""
        news = self.unit.new_cookie is not None or self.unit.cookie_gone
        dress = news and message["type"] == "http.response.start"
        await self._send(self._dressed(message) if dress else message)  # no local may show the cookie

    def _dressed(self, message: Message) -> Message:
        """The answer's start with the session's headers."""
        self._started = True
        self.unit.deliverable = False
        headers: Headers = list(message.get("headers", ()))
        if self.session.accessed:
            vary_cookie(headers)
        if self._settings.cookie.is_set_by(headers):
            self._settings.rules.events.warn_once(COOKIE_CLASH, _ANOTHER_NAME)
        cookie = self._cookie(headers, message.get("status"))
        if cookie is not None:
            headers += [(b"set-cookie", line) for line in (*self._leftovers(), cookie)]
            restrain(headers, time.time())
        return {**message, "headers": headers}

    def _cookie(self, headers: Headers, status: int | None) -> bytes | None:
        """The Set-Cookie value, where the client must learn something.

        What it knows already is not sent again with an answer that the app lets caches keep for others, nor
        with one that tells them to use what they have kept (304).
        """
        unit = self.unit
        if unit.new_cookie is not None:
            return self._render(unit.new_cookie)
        presented = self._presented
        if presented.session_id is None:
            return None
        if unit.cookie_gone:
            return self._settings.cookie.render_removal(secure=self._is_secure())
        if not self._refreshes or not unit.is_loaded or status == 304:
            return None
        if sharing(headers, time.time()) is Sharing.ALLOWED:
            return None
        return self._render(presented.session_id)

    def _leftovers(self) -> list[bytes]:
        """What makes the browser forget dead cookies that it sent beside the live one."""
        if not self._presented.leftover or self.unit.shares_name:
            return []
        requested = path_requested(self._scope)
        return self._settings.cookie.render_leftover_removals(requested, secure=self._is_secure())

    async def _check_refresh(self) -> None:
        """Send the cookie again only while its id is alive: a login meanwhile has given the client another.

        An answer that was on its way without the lock would overwrite that one.
        """
        if self.unit.is_loaded and self.unit.new_cookie is None:
            self._refreshes = await self.unit.prolong()

    def _render(self, session_id: str) -> bytes:
        return self._settings.cookie.render(session_id, max_age=self._max_age(), secure=self._is_secure())

    def _is_secure(self) -> bool:
        return self._scope.get("scheme") in ("https", "wss")

    def _is_due(self, presented: Presented) -> bool:
        """Signed by an old key, rolling and old enough, or with leftovers beside it that are to go."""
        age, after = time.time() - presented.issued_at, self._settings.refresh_after
        if after is not None and age >= after:
            return True
        return presented.stale_key or (presented.leftover and age >= _CLEANS_AFTER)

    def _max_age(self) -> float | None:
        left = self.unit.max_age()
        return self._settings.max_age if left is None else left


class HTTPExchange(Exchange):
    """Holds `http.response.start` back until what the app changed is stored, or answers for it."""

    _held_start: Message | None = None
    _failure: Exception | None = None
    _replaced = False  # the app's answer, by ours

    async def send(self, message: Message) -> None:
        """What the app calls `send`."""
        kind = message["type"]
        if self._replaced:
            return  # what is left of an answer that was replaced
        if kind == "http.response.start":
            refused = self._failure or self.unit.refusal
            if refused is not None and self._is_frameworks_page(message, refused):
                await self._replace(refused)
                return
            if type(message.get("headers")) not in _READ_AGAIN:
                message = {**message, "headers": list(message.get("headers", ()))}
            if not self._holds_back(message):
                await self._on_start(message)
            return
        if kind in _BODY:
            last = not message.get("more_body", False)
            if self._held_start is not None or (last and self._started and self._may_have_changed()):
                await self._store(last=last)
            elif not self._started:
                self._raise_failure()
        await self._send(message)

    async def finish(self) -> None:
        """The app has returned: a start without a body still goes out, and a swallowed failure rises."""
        self._raise_failure()
        if self._held_start is not None:
            await self._store(last=True)
        take_replaced(self._scope, self.session)  # after the last message: too late

    async def fail(self, error: Exception, receive: Receive) -> None:
        """A commit that failed is what counts, whatever the app made of it on the way up."""
        if self._failure is not None and not self._started:
            error = self._failure
        if self._replaced and status_of(error) is not None:
            return  # answered already
        await super().fail(error, receive)

    def _is_frameworks_page(self, start: Message, refused: Exception) -> bool:
        """Whether a framework made a 500 of its own of an error that we answer: the app's own page passes."""
        status = status_of(refused)
        handled = self._failure is None and status == 500  # what `save` raised, answered as an app may
        return bool(start["status"] == 500 and status is not None and not handled)

    async def _replace(self, refused: Exception) -> None:
        """Give our own answer in place of the app's."""
        await self.unit.roll_back()
        self._started = self._replaced = True
        await self._explain(refused, no_body)

    def _raise_failure(self) -> None:
        """A commit that failed is not forgotten because the app swallowed its error and went on."""
        if self._failure is not None and not self._started:
            raise self._failure

    def _holds_back(self, start: Message) -> bool:
        """Keep the start of a good answer whose body is known to end: one trip may commit and release."""
        if self._is_error_page(start) or self._failure is not None or not self._ends_at_once(start):
            return False
        self._held_start = start
        return True

    def _is_error_page(self, start: Message) -> bool:
        """Whether nothing is to be stored: a server error, or after a failed commit any error."""
        status = start["status"]
        return bool(status >= 400 and (status >= 500 or self._failure is not None or self.unit.refused))

    async def _on_start(self, start: Message) -> None:
        if self._failure is not None and start["status"] < 400:
            raise self._failure
        if self._is_error_page(start):
            await self.unit.roll_back()  # a failed request changes nothing
            self._scope["session"] = self.session
            if self._refreshes:
                await self._check_refresh()
            await self._send(self._dressed(start))
            return
        self._held_start = start
        await self._store(last=False)

    async def _store(self, *, last: bool) -> None:
        """Store, then send what was held back. While a stream goes on, a touched session keeps its lock."""
        session, unit = self.session, self.unit
        try:
            take_replaced(self._scope, session)
            release = last or self._settings.early_release or not session.accessed
            if session.accessed or unit.is_loaded:
                outcome = await unit.store_changes(release=release)
                if outcome is not _STORED:
                    raise_for(outcome)
        except Exception as error:
            self._failure, self._held_start = error, None
            raise
        if unit.is_open and (release or not unit.keeps_record):
            unit.end()
        start, self._held_start = self._held_start, None
        if start is not None:
            if self._refreshes:
                await self._check_refresh()
            await self._send(self._dressed(start))

    def _may_have_changed(self) -> bool:
        return self.unit.is_open or self._scope.get("session") is not self.session

    def _ends_at_once(self, start: Message) -> bool:
        """Whether the body is of known length, so that its first message may be the last."""
        headers = start.get("headers", ())
        if b"content-length" in dict(headers) or start["status"] in (204, 304):
            return True
        return self._scope["method"] == "HEAD" or any(n.lower() == b"content-length" for n, _ in headers)


class WebSocketExchange(Exchange):
    """Loads without a lock; changes go through `Session.transaction()`. A new cookie rides on the accept."""

    _open = False  # accepted, and not closed by the app

    async def open(self, *, read_only: bool, passive: bool = False) -> None:
        """As for HTTP, always without the lock."""
        await super().open(read_only=True, passive=passive)

    async def send(self, message: Message) -> None:
        """What the app calls `send`."""
        if message["type"] != "websocket.send":
            take_replaced(self._scope, self.session)
        if message["type"] in ("websocket.accept", "websocket.http.response.start"):
            if self._refreshes:
                await self._check_refresh()
            self._open = message["type"] == "websocket.accept"
            message = self._dressed(message)
        elif message["type"] == "websocket.close":
            self._started, self._open = True, False
            self.unit.deliverable = False
        await self._send(message)

    async def fail(self, error: Exception, receive: Receive) -> None:
        """An error of ours closes an open connection; any other one rises."""
        if self._open and isinstance(error, SessionError):
            await self.unit.roll_back()
            self._open = False
            session_id = self._presented.session_id
            await self._settings.answers.hang_up(self._scope, self._send, error, session_id)
        else:
            await super().fail(error, receive)

    async def finish(self) -> None:
        """A change that no transaction stored is an error of the app."""
        take_replaced(self._scope, self.session)
        self.unit.refuse_unseen_change()
