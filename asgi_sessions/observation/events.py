"""What happens to sessions, for the log and for the app's `on_event`, without any secret.

An event never has an id, a cookie or a header value in it: who reads the log must not be able to take over a
session (OWASP Session Management: Logging Sessions Life Cycle).
"""

from __future__ import annotations

import hmac
import inspect
import logging
import re
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from ..keys import derived, key_bytes

SESSION_CREATED = "session_created"  # a record was stored for the first time
SESSION_REGENERATED = "session_regenerated"  # a new id, the data kept
SESSION_ENDED = "session_ended"  # invalidated by the app
BAD_SIGNATURE = "bad_signature"  # none of our keys signed the cookie
AMBIGUOUS_COOKIE = "ambiguous_cookie"  # two live sessions in one request, or too many cookies of our name
ABSURD_COOKIE = "absurd_cookie"  # more bytes of cookies than any browser sends; answered with 400
IMPORTED = "imported"  # a session was taken over from the cookie of another middleware
UNKNOWN_SESSION = "unknown_session"  # a signed id whose record is absent
RETIRED_SESSION = "retired_session"  # an id that was replaced within the last minute
UNREADABLE_RECORD = "unreadable_record"  # what the store has under the id is no record of ours
FINGERPRINT_MISMATCH = "fingerprint_mismatch"  # not the client that the record was made for
LOCK_TIMEOUT = "lock_timeout"  # the wait for the lock was too long; answered with 503
TOO_MANY_WAITERS = "too_many_waiters"  # answered with 503
CLIENT_GONE = "client_gone"  # while its request waited for the lock; answered with 503, which nobody reads
RUN_TWICE = "run_twice"  # `lock="auto"` ran a route's app again, often; told once a minute for each route
LOCK_HELD = "lock_held"  # a request waited a second for it; told once a minute for each route that holds it
LOCK_LOST = "lock_lost"  # the lease ended before the commit; answered with 409
CONFLICT = "conflict"  # another writer changed the record; answered with 409
STORE_ERROR = "store_error"  # the backend failed; answered with 503
UNSTORABLE_VALUE = "unstorable_value"  # answered with 500
UNCAUGHT_ERROR = "uncaught_error"  # an error of this package that a WebSocket app did not catch
ORIGIN_REFUSED = "origin_refused"  # a WebSocket handshake from an origin that is not allowed
COOKIE_CLASH = "cookie_clash"  # the app sets a cookie of our name; told once
COOKIE_DROPPED = "cookie_dropped"  # the server does not send the cookie of a WebSocket's accept; told once
UNTRUSTED_PROXY = "untrusted_proxy"  # proxy headers came, but no proxy is trusted; told once

Detail: TypeAlias = str | int | float

LINES_PER_SECOND = 10  # in the log, of one event name: an attack must not fill the disk
MOST_ROUTES = 1000  # on which is counted what happens in one minute
MAX_DETAIL = 500  # characters

_logger = logging.getLogger("asgi_sessions")
_PURPOSE = b"asgi_sessions.log"  # of the key for hashes of ids
# Ids, lock tokens and fingerprints look like this, and the text of an exception may quote one.
_SECRET = re.compile(r"[0-9A-Fa-f]{32,}")


@dataclass(frozen=True, slots=True)
class SessionEvent:
    """One thing that happened: `name` is a constant of this module, `details` are its facts.

    `session` is a short hash of the id (`session_hash`), the same in all workers with the same `secret_key`.
    It shows which events belong to one session; None where the event is about no session.
    """

    name: str
    session: str | None
    details: Mapping[str, Detail]


def session_hash(session_id: str, secret_key: object) -> str:
    """12 hexadecimal digits that stand for the id in logs and events, and wherever else people see sessions.

    One id has one hash in every process with this `secret_key`. Fallbacks do not count: with a new key the
    same session has another hash. Without the key nobody can tell which id and which hash belong together.
    """
    return _hash(session_id, derived(key_bytes(secret_key, "secret_key"), _PURPOSE))


def _hash(session_id: str, key: bytes) -> str:
    return hmac.digest(key, session_id.encode("utf-8", "surrogatepass"), "sha256").hex()[:12]


class EventSink:
    """Hands events to the log ``asgi_sessions`` and to `on_event`; costs next to nothing if nobody listens.

    `on_event` is called at once, in the event loop, so it must not block. What it raises is logged, once for
    each event name, and never reaches the request. TypeError where it is no plain function. Events name a
    session by its `session_hash` with this `secret_key`; without a key the names are good for this object
    only. `clock` gives seconds, for the log's limit.
    """

    def __init__(
        self,
        on_event: Callable[[SessionEvent], object] | None = None,
        *,
        secret_key: object = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if on_event is not None:
            _check_callback(on_event)
        self._on_event = on_event
        key = secrets.token_bytes(32) if secret_key is None else key_bytes(secret_key, "secret_key")
        self._key = derived(key, _PURPOSE)
        self._clock = clock
        self._windows: dict[str, _Window] = {}
        self._complained: set[str] = set()
        self._kinds: set[tuple[str, ...]] = set()
        self._minutes: dict[tuple[str, str], _Minute] = {}  # the one that began first stands first

    def emit(
        self, name: str, session_id: str | None = None, *, level: int = logging.INFO, **details: Detail
    ) -> None:
        """Tell the listeners. Never raises; removes ids from the details and escapes control characters."""
        logged = _logger.isEnabledFor(level)
        if self._on_event is None and not logged:
            return
        clean = {key: _clean(value, session_id) for key, value in details.items()}
        event = SessionEvent(name, None if session_id is None else _hash(session_id, self._key), clean)
        if logged:
            self._log(event, level)
        if self._on_event is not None:
            self._call(self._on_event, event)

    def is_first(self, *kind: str) -> bool:
        """Whether this is the first call with this kind. Kinds are few: names in the app's code."""
        known = kind in self._kinds
        self._kinds.add(kind)
        return not known

    def warn_once(self, name: str, remedy: str) -> None:
        """Emit a warning, the first time only: for a mistake in the set-up."""
        if self.is_first(name):
            self.emit(name, level=logging.WARNING, remedy=remedy)

    def is_due(self, name: str, route: str, *, times: int = 1) -> bool:
        """Whether this happens for the first time on a route, or so many times within a minute.

        Once a minute at most. The minute begins with what happens first.
        """
        now, minutes = self._clock(), self._minutes
        while minutes and minutes[oldest := next(iter(minutes))].start <= now - 60:
            del minutes[oldest]
        minute = minutes.get((name, route))
        if minute is None:
            if len(minutes) >= MOST_ROUTES:
                return False
            minute = minutes[name, route] = _Minute(now)
        minute.count += 1
        return minute.count == times

    def flush(self) -> None:
        """Log how many lines were left out so far. Called at the shut-down."""
        for name, window in self._windows.items():
            window.report(name)

    def _log(self, event: SessionEvent, level: int) -> None:
        window = self._windows.setdefault(event.name, _Window())
        now = self._clock()
        if now - window.start >= 1.0:
            window.report(event.name)
            window.start, window.lines = now, 0
        if window.lines < LINES_PER_SECOND:
            window.lines += 1
            _logger.log(level, "%s", _line(event))
        else:
            window.dropped += 1
            window.level = max(window.level, level)

    def _call(self, callback: Callable[[SessionEvent], object], event: SessionEvent) -> None:
        try:
            callback(event)
        except Exception:
            if event.name not in self._complained:
                self._complained.add(event.name)
                _logger.exception("on_event failed for %s; further failures are not logged", event.name)


@dataclass(slots=True)
class _Minute:
    """How often something has happened on one route since then."""

    start: float
    count: int = 0


@dataclass(slots=True)
class _Window:
    """The log lines of one event name within one second."""

    start: float = float("-inf")
    lines: int = 0
    dropped: int = 0
    level: int = logging.NOTSET

    def report(self, name: str) -> None:
        if self.dropped:
            _logger.log(self.level, "%s: %d more, not logged", name, self.dropped)
        self.dropped, self.level = 0, logging.NOTSET


def _check_callback(on_event: object) -> None:
    if not callable(on_event):
        raise TypeError("on_event must be a function that takes a SessionEvent")
    if inspect.iscoroutinefunction(on_event) or inspect.iscoroutinefunction(type(on_event).__call__):
        raise TypeError("on_event must be a plain function; let it put the event into a queue for async work")


def _clean(value: Detail, session_id: str | None) -> Detail:
    if not isinstance(value, str):
        return value
    if session_id:
        value = value.replace(session_id, "...")
    value = _SECRET.sub("...", value)
    if len(value) > MAX_DETAIL:
        value = f"{value[:MAX_DETAIL]}..."
    return value if value.isprintable() else "".join(map(_visible, value))


def _visible(character: str) -> str:
    """The character, or its escape where it could end the line or control a terminal."""
    return character if character.isprintable() else repr(character)[1:-1]


def _line(event: SessionEvent) -> str:
    """The event on one line. `repr` keeps a text from looking like another detail."""
    session = "" if event.session is None else f" session={event.session}"
    return event.name + session + "".join(f" {key}={value!r}" for key, value in event.details.items())
