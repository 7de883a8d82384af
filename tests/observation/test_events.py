"""Events: who hears of them, what they never say, how many lines they write."""

from __future__ import annotations

import hmac
import logging
import os
import re
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asgi_sessions import SessionMiddleware
from asgi_sessions.asgi import Receive, Scope, Send
from asgi_sessions.client.signer import CookieSigner
from asgi_sessions.keys import derived
from asgi_sessions.observation import events
from asgi_sessions.observation.events import LINES_PER_SECOND, EventSink, SessionEvent, session_hash

ID = "0123456789abcdef" * 2
KEY = "k" * 32
HASH = session_hash(ID, KEY)


async def empty(scope: Scope, receive: Receive, send: Send) -> None:
    """An app that is never called here."""


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, "asgi_sessions")
    return caplog


@pytest.fixture
def silent(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL + 1, "asgi_sessions")


def test_the_callback_gets_the_event() -> None:
    """A listener sees name, short hash and details."""
    seen: list[SessionEvent] = []
    EventSink(seen.append, secret_key=KEY).emit(events.LOCK_TIMEOUT, ID, waited=1.5, waiters=3)
    assert seen == [SessionEvent("lock_timeout", HASH, {"waited": 1.5, "waiters": 3})]


def test_an_event_without_a_session_has_no_hash() -> None:
    """A refused origin concerns no session."""
    seen: list[SessionEvent] = []
    EventSink(seen.append).emit(events.ORIGIN_REFUSED, path="/chat")
    assert seen == [SessionEvent("origin_refused", None, {"path": "/chat"})]


def test_one_line_per_event(log: pytest.LogCaptureFixture) -> None:
    """The log line has the name first, then the hash, then the details."""
    EventSink(secret_key=KEY).emit(events.LOCK_TIMEOUT, ID, level=logging.WARNING, waited=1.5, path="/a b")
    assert log.record_tuples == [
        ("asgi_sessions", logging.WARNING, f"lock_timeout session={HASH} waited=1.5 path='/a b'")
    ]


@pytest.mark.usefixtures("silent")
def test_nothing_is_computed_for_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a listener an event costs no hash."""
    monkeypatch.setattr(events, "_hash", lambda *_: pytest.fail("hashed for nobody"))
    EventSink().emit(events.SESSION_CREATED, ID)


@pytest.mark.usefixtures("silent")
def test_a_silent_log_does_not_silence_the_callback(caplog: pytest.LogCaptureFixture) -> None:
    """The callback hears what the log's level leaves out."""
    seen: list[SessionEvent] = []
    EventSink(seen.append).emit(events.SESSION_CREATED, ID)
    assert len(seen) == 1
    assert caplog.records == []


def test_the_hash_is_short_and_stable() -> None:
    """The same id gives the same 12 digits, another id others, and none of them are the id's."""
    assert re.fullmatch("[0-9a-f]{12}", HASH)
    assert session_hash(ID, KEY) == HASH != session_hash(ID[::-1], KEY)
    assert HASH not in ID


@pytest.mark.parametrize("hash_seed", ["0", "1"])
def test_workers_with_one_key_name_a_session_alike(hash_seed: str) -> None:
    """Another process's event has the same hash, so that one session's lines can be collected."""
    code = (
        "from asgi_sessions import SessionMiddleware\n"
        f"middleware = SessionMiddleware(None, {KEY!r}, on_event=lambda event: print(event.session))\n"
        f"middleware._events.emit('session_created', {ID!r})\n"
    )
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    assert done.stdout.strip() == HASH


def test_another_key_gives_another_hash() -> None:
    """After a rotation a session is named anew, and its fallbacks do not count: the docstring says so."""
    seen: list[SessionEvent] = []
    for fallbacks in ([], [KEY]):
        middleware = SessionMiddleware(empty, "n" * 32, on_event=seen.append, secret_key_fallbacks=fallbacks)
        middleware._events.emit(events.SESSION_CREATED, ID)
    assert [event.session for event in seen] == [session_hash(ID, "n" * 32)] * 2
    assert session_hash(ID, "n" * 32) != HASH


def test_a_hash_says_nothing_about_the_cookies_key() -> None:
    """The key of hashes is derived for this purpose alone: no signature is made with it."""
    key = derived(KEY.encode(), b"asgi_sessions.log")
    assert hmac.digest(key, ID.encode(), "sha256").hex()[:12] == HASH
    assert CookieSigner(KEY)._signers[0].derive_key() != key


def test_without_a_key_names_hold_for_one_sink() -> None:
    """A sink of its own, in a test or a script, names sessions too, and no two sinks alike."""
    seen: list[SessionEvent] = []
    for sink in (EventSink(seen.append), EventSink(seen.append)):
        sink.emit(events.SESSION_CREATED, ID)
    assert len({event.session for event in seen}) == 2


def test_what_stays_wrong_is_told_once(log: pytest.LogCaptureFixture) -> None:
    """A warning about the set-up comes with its remedy, for each event name once."""
    seen: list[SessionEvent] = []
    sink = EventSink(seen.append)
    for _ in range(3):
        sink.warn_once(events.COOKIE_CLASH, "rename it")
    sink.warn_once(events.UNTRUSTED_PROXY, "name it")
    assert [(event.name, event.details) for event in seen] == [
        ("cookie_clash", {"remedy": "rename it"}),
        ("untrusted_proxy", {"remedy": "name it"}),
    ]
    assert {record.levelname for record in log.records} == {"WARNING"}


@pytest.mark.parametrize("session_id", ["cart-17", "ü\ud800", ""])
def test_any_id_can_be_hashed(session_id: str) -> None:
    """Ids that an app chose itself are hashed alike."""
    assert len(session_hash(session_id, KEY)) == 12


@pytest.mark.parametrize(
    "text",
    [
        ID,
        f"no answer to GET session:{ID}",
        f"{ID}.aFxyz.signature",
        f"token {ID.upper()}",
        f"fingerprint {ID * 2}",
        "WATCH session:my-cart failed",
    ],
)
def test_details_lose_ids(log: pytest.LogCaptureFixture, text: str) -> None:
    """An error text that quotes a key does not carry the id into the log or the callback."""
    seen: list[SessionEvent] = []
    EventSink(seen.append).emit(events.STORE_ERROR, "my-cart", error=text)
    for told in (log.messages[0], str(seen[0])):
        assert ID not in told.lower()
        assert "my-cart" not in told


@given(st.text())
def test_a_detail_cannot_break_the_line(text: str) -> None:
    """Control characters and line separators are escaped, and a text cannot pose as another detail."""
    line = events._line(SessionEvent("store_error", None, {"error": text}))
    assert line.isprintable()
    assert re.fullmatch(r"""store_error error=(?:'[^']*'|"[^"]*"|'(?:[^'\\]|\\.)*')""", line)


def test_a_failing_callback_is_logged_once_per_name(log: pytest.LogCaptureFixture) -> None:
    """What the callback raises never reaches the request and does not fill the log."""

    def broken(event: SessionEvent) -> None:
        raise RuntimeError("the metrics server is away")

    sink = EventSink(broken)
    for name in (events.CONFLICT, events.CONFLICT, events.LOCK_LOST):
        sink.emit(name, ID, level=logging.DEBUG)
    assert [record.getMessage().split(";")[0] for record in log.records] == [
        "on_event failed for conflict",
        "on_event failed for lock_lost",
    ]
    assert all(record.exc_info for record in log.records)


def test_a_cancelled_callback_is_not_swallowed() -> None:
    """Only exceptions are swallowed: a cancellation or an interrupt goes through."""

    def interrupted(event: SessionEvent) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        EventSink(interrupted).emit(events.CONFLICT)


async def a_coroutine(event: SessionEvent) -> None: ...


class AsyncCallable:
    async def __call__(self, event: SessionEvent) -> None: ...


@pytest.mark.parametrize("callback", [a_coroutine, AsyncCallable(), "print", 3])
def test_a_callback_that_cannot_work_is_refused(callback: Any) -> None:
    """A coroutine would never be awaited, so the constructor says so."""
    with pytest.raises(TypeError, match="on_event must be"):
        EventSink(callback)


def test_lines_are_limited_per_second_and_counted(log: pytest.LogCaptureFixture) -> None:
    """Ten lines of a name in a second, then silence, then one line that says how many are missing."""
    clock, seen = Clock(), list[SessionEvent]()
    sink = EventSink(seen.append, clock=clock)
    for _ in range(LINES_PER_SECOND + 5):
        sink.emit(events.BAD_SIGNATURE)
    sink.emit(events.CONFLICT)
    assert log.messages == ["bad_signature"] * LINES_PER_SECOND + ["conflict"]
    log.clear()
    clock.now += 1.0
    sink.emit(events.BAD_SIGNATURE)
    assert log.messages == ["bad_signature: 5 more, not logged", "bad_signature"]
    assert len(seen) == LINES_PER_SECOND + 7


def test_flush_tells_what_was_left_out(log: pytest.LogCaptureFixture) -> None:
    """At shut-down the missing lines are counted, once, at the level of the gravest."""
    sink = EventSink(clock=Clock())
    for level in [logging.INFO] * LINES_PER_SECOND + [logging.ERROR, logging.INFO]:
        sink.emit(events.STORE_ERROR, level=level)
    log.clear()
    sink.flush()
    sink.flush()
    assert log.record_tuples == [("asgi_sessions", logging.ERROR, "store_error: 2 more, not logged")]


def test_the_names_are_their_values() -> None:
    """Each constant is spelled like its value, so that a listener can compare with either."""
    names = {key: value for key, value in vars(events).items() if key.isupper() and isinstance(value, str)}
    assert len(names) == 25
    assert all(key.lower() == value for key, value in names.items())
