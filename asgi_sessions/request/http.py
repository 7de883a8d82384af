"""One HTTP request: its answer is held back until the session is safe."""

from __future__ import annotations

import enum
from logging import WARNING
from typing import NoReturn, TypeGuard

from ..asgi import Message
from ..client.headers import ByName
from ..observation.events import RUN_TWICE
from ..session.changes import Change
from ..stores.checkout import Checkout, Outcome, raise_for
from .answers import no_body, route_of, status_of
from .incoming import MAX_BODY
from .replacement import take_replaced
from .response import explain, fail, send_start
from .state import DISCARDED
from .unit import UnitOfWork


class Answer(enum.Enum):
    """What has become of the app's answer.

    state   | event                                | next
    --------|--------------------------------------|--------
    WAITING | a start, of a body that ends at once | HELD
    WAITING | another start: stored, and sent      | STARTED
    WAITING | an error page: rolled back, and sent | STARTED
    HELD    | a body, or the app's end: stored     | STARTED
    WAITING, HELD | what is to be stored is not    | FAILED
    FAILED  | an error page of the app             | STARTED
    FAILED  | anything else: the error is raised   | FAILED
    WAITING, FAILED | a framework's page for our error, or the error rises: we answer | OVER
    STARTED | the last body: stored                | STARTED
    any     | the request has ended                | OVER
    """

    WAITING = "waiting"
    HELD = "held"  # in `start`, until the session is stored
    FAILED = "failed"  # the session was not stored, and `failure` says why, whatever the app makes of it
    STARTED = "started"
    OVER = "over"  # replaced by our own, or at its end: what the app sends still goes nowhere


# bound once: looking up an Enum's member costs ten times a global on Python 3.11, and each request does it
_WAITING, _HELD, _FAILED = Answer.WAITING, Answer.HELD, Answer.FAILED
_STARTED, _OVER = Answer.STARTED, Answer.OVER
_STORED, _NOTHING = Outcome.STORED, Change.NOTHING
_READ_AGAIN = (list, tuple)  # headers may be any iterable, but are read twice
_SAFE = frozenset({"GET", "HEAD", "OPTIONS", "TRACE", "QUERY"})
_OFTEN = 10  # times in a minute
_TRANSACT = (
    'with lock="auto" this route ran twice each time, because another request changed the session first:'
    " change it in `async with session.transaction()`, or by a method that takes the lock, such as POST"
)

_BODY = frozenset({"http.response.body", "http.response.zerocopysend", "http.response.pathsend"})


class HTTPRequest(UnitOfWork):
    """Holds `http.response.start` back until what the app changed is stored, or answers for it."""

    may_rotate = True
    answer = _WAITING
    start: Message | None = None
    failure: Exception | None = None
    releases_early = False  # a stream lets the lock go at its start, whatever it has changed
    is_let_go = False  # the session, when the answer started

    async def send(self, message: Message) -> None:
        """What the app calls `send`."""
        kind, answer = message["type"], self.answer
        if answer is _OVER:
            if self.rerun is not None:
                self.rerun.refuse()
            return
        if kind == "http.response.start":
            if type(message.get("headers")) not in _READ_AGAIN:
                message = {**message, "headers": list(message.get("headers", ()))}
            if message["status"] >= 400 and await self._sent_error_page(message):
                return
            self._raise_failure()
            self.start, self.answer = message, _HELD
            if not self._ends_at_once(message):
                await self._store(last=False)
            return
        if kind in _BODY:
            last = not message.get("more_body", False)
            if answer is _HELD or (last and answer is _STARTED and self._may_have_changed()):
                await self._store(last=last)
            elif last and self.is_let_go:
                self._refuse_late_change()
            self._raise_failure()
        await self.to_client(message)

    async def finish(self) -> None:
        """The app has returned: a start without a body still goes out, and a swallowed failure rises."""
        if self.state is DISCARDED:
            return
        if self.answer is _HELD:
            await self._store(last=True)
        self._raise_failure()
        take_replaced(self.scope, self.session)  # after the last message: too late
        self.answer = _OVER

    async def fail(self, error: Exception) -> None:
        """A commit that failed is what counts, whatever the app made of it on the way up."""
        if self.state is DISCARDED:
            return
        if self.answer is _FAILED and self.failure is not None:
            error = self.failure
        if self.answer is _OVER and status_of(error) is not None:
            return  # answered already
        self.answer = _OVER
        await fail(self, error)

    async def _sent_error_page(self, start: Message) -> bool:
        """Send an error page, the app's or ours, and store nothing; False if it is like any other answer."""
        refused, status = self.failure or self.error, start["status"]
        if refused is not None and self._is_frameworks_page(status, refused):
            await self.roll_back()
            self.answer = _OVER
            await explain(self, refused, no_body)
            return True
        if status < 500 and self.answer is not _FAILED and not self.save_failed:
            return False
        await self.roll_back()  # a failed request changes nothing
        self.scope["session"] = self.session
        self.answer = _STARTED
        await send_start(self, start)
        return True

    def _is_frameworks_page(self, status: int, refused: Exception) -> bool:
        """Whether a framework made a 500 of its own of an error that we answer: the app's own page passes."""
        ours = status_of(refused)
        handled = self.failure is None and ours == 500  # what `save` raised, answered as an app may
        return status == 500 and ours is not None and not handled

    def may_run_again(self) -> bool:
        """Nothing of an answer has left, nothing was stored, and all of the body is there to be played."""
        if self.rerun is None or self.has_stored or self.answer not in (_WAITING, _HELD):
            return False
        return self.rerun.has_all_messages

    def discard(self) -> NoReturn:
        """As for any unit; `send` raises from now on."""
        self.answer, self.start = _OVER, None
        events, route = self.settings.events, route_of(self.scope)
        if events.is_due(RUN_TWICE, route, times=_OFTEN):
            events.emit(RUN_TWICE, level=WARNING, route=route, times=_OFTEN, remedy=_TRANSACT)
        super().discard()

    def _raise_failure(self) -> None:
        """A commit that failed is not forgotten because the app swallowed its error and went on."""
        if self.answer is _FAILED and self.failure is not None:
            raise self.failure

    async def _store(self, *, last: bool) -> None:
        """Store, then send what was held back. While a stream goes on, a changed session keeps its lock."""
        session, start = self.session, self.start
        try:
            take_replaced(self.scope, session)
            self.is_last = last
            release = last or self.settings.early_release or self.releases_early or not session.accessed
            if session.accessed or isinstance(self.record, Checkout):
                outcome = await self.store_changes(
                    release=release, release_unchanged=self.settings.lock is not None
                )
                if outcome is not _STORED:
                    raise_for(outcome)
        except Exception as error:
            if self.answer is _HELD:
                self.answer, self.start = _FAILED, None
            self.failure = error
            raise
        if self.is_open and (release or not self._can_store_later()):
            self.end()
        if start is not None:
            self.is_let_go = not self.is_open
            self.answer, self.start = _STARTED, None
            await send_start(self, start)

    def _refuse_late_change(self) -> None:
        """Raise where the app changed something within a value since: it would be lost without a word."""
        if self.block is None and self.committing is None and self.session.change() is not _NOTHING:
            self.require_writable()

    def _may_have_changed(self) -> bool:
        return self.is_open or self.scope.get("session") is not self.session

    def _can_store_later(self) -> bool:
        """Whether later changes of this request can still be stored: there is a record to commit to."""
        taken = self.record
        return isinstance(taken, Checkout) and (taken.token is not None or self.settings.lock is None)

    def _ends_at_once(self, start: Message) -> bool:
        """Whether the body is of known length: its first message may be the last, and one trip may do."""
        headers = start.get("headers", ())
        if b"content-length" in dict(headers) or start["status"] in (204, 304):
            return True
        return self.scope.get("method") == "HEAD" or any(n.lower() == b"content-length" for n, _ in headers)


def runs_without_lock(unit: UnitOfWork, headers: ByName) -> TypeGuard[HTTPRequest]:
    """Whether `lock="auto"` lets this request run without the lock.

    It is safe (RFC 9110 section 9.2.1), it has a session whose id need not be replaced, and its body can be
    played once more.
    """
    presented = unit.presented
    if unit.scope.get("method") not in _SAFE or not (presented.session_id or presented.rivals):
        return False
    if presented.session_id is not None and unit.settings.rotates(presented):
        return False
    length = headers.get(b"content-length", b"0")
    return isinstance(unit, HTTPRequest) and len(length) < 6 and length.isdigit() and int(length) <= MAX_BODY
