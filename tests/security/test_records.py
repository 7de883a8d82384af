"""Records: what can be in them, what is refused, and what is never believed."""

from __future__ import annotations

import ast
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
from asgi import page
from redis import Redis

import asgi_sessions
from asgi_sessions import InMemorySessionStore, Session, SessionData, SessionStore
from security.requirements import requirement
from security.service import Service, Visitor, read, write

pytestmark = pytest.mark.anyio

PACKAGE = Path(asgi_sessions.__file__).parent
RUNS_CODE = {
    "pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "jsonpickle", "joblib",
    "yaml", "copyreg", "code", "codeop", "runpy", "ctypes", "subprocess", "msgpack",
}  # fmt: skip
EVALUATES = {"eval", "exec", "compile", "__import__"}


@requirement("DATA-1")
@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.name)
def test_the_package_cannot_load_code(path: Path) -> None:
    """No module that turns bytes into objects of any type, and nothing that evaluates text."""
    tree = ast.parse(path.read_text("utf-8"))
    named = {alias.name.partition(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import)
             for alias in node.names}  # fmt: skip
    named |= {
        (node.module or "").partition(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)
    }
    assert named & RUNS_CODE == set()
    calls = {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call)
             and isinstance(node.func, ast.Name)}  # fmt: skip
    assert calls & EVALUATES == set()


class Bomb:
    """Makes a folder where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def key_of(visitor: Visitor) -> str:
    return f"session:{{{visitor.session_id}}}"


@requirement("DATA-1")
@pytest.mark.parametrize("protocol", [0, 2, pickle.HIGHEST_PROTOCOL])
@pytest.mark.parametrize("header", [True, False])
async def test_a_pickle_in_the_store_is_not_loaded(
    redis_url: str, redis: Redis, tmp_path: Path, protocol: int, header: bool
) -> None:
    """Whoever can write to the store can write sessions, but cannot run code in the service."""
    service = Service.on(redis_url)
    visitor = service.visitor()
    await visitor.begin()
    stored = redis.get(key_of(visitor))
    assert isinstance(stored, bytes)
    head = stored[: stored.index(b"{")] if header else b""
    value = head + pickle.dumps(Bomb(tmp_path / "ran"), protocol)
    redis.set(key_of(visitor), value)
    assert await visitor.sees() == {}
    assert not (tmp_path / "ran").exists(), "the store's content was run"
    assert redis.get(key_of(visitor)) == value, "what is not ours was changed"
    await service.store.aclose()


# -- bounds --------------------------------------------------------------------------------------------


def nested(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


def put(value: Any) -> Any:
    def act(session: Session) -> None:
        session["x"] = value

    return act


class Wide(SessionData):
    """Has a field that no bound of its own stops."""

    notes: list[str] = []  # noqa: RUF012  # pydantic copies defaults


@requirement("DATA-2")
@pytest.mark.parametrize(
    ("value", "status"),
    [
        ("x" * 999_992, 200),  # and {"x":""} around it
        ("x" * 999_993, 500),
        ("\u20ac" * 333_331, 500),
        (["x" * 9] * 100_000, 500),
        (nested(99), 200),
        (nested(100), 500),
        (nested(5000), 500),
    ],
    ids=["1 MB", "a byte more", "bytes count", "a long list", "100 levels", "101 levels", "5000 levels"],
)
async def test_metadata_are_bounded(service: Service, value: Any, status: int) -> None:
    """By their encoded size and their depth, exactly."""
    visitor = service.visitor()
    session_id = await visitor.begin(x=0)
    assert (await visitor.open(put(value))).status == status
    data = await service.store.get(session_id)
    assert data is not None
    assert data.metadata == {"x": value if status == 200 else 0}


@requirement("DATA-2")
async def test_a_whole_record_is_bounded(store: SessionStore) -> None:
    """Fields of a model count too: no session fills the store."""
    service = Service(store, {"model": Wide})
    visitor = service.visitor()
    await visitor.begin()

    def act(session: Session) -> None:
        assert isinstance(session.data, Wide)
        session.data.notes.append("x" * 2_000_000)

    assert (await visitor.open(act)).status == 500
    assert await visitor.sees() == {"n": 1}


# -- values --------------------------------------------------------------------------------------------


def cycle() -> Any:
    value: list[Any] = []
    value.append({"again": value})
    return value


VALUES: dict[str, Any] = {
    "not a number": float("nan"),
    "infinity": float("inf"),
    "minus infinity": [1, {"a": float("-inf")}],
    "a lone surrogate": "\ud800",
    "a surrogate in a key": {"\udfff": 1},
    "a cycle": cycle(),
    "a set": {1},
    "bytes": b"x",
    "an object": object(),
    "a key that is no text": {1: 2},
    "a huge integer": 10**5000,
    "a function": len,
}


@requirement("DATA-3")
@pytest.mark.parametrize("name", VALUES)
async def test_what_would_not_read_back_is_refused(service: Service, name: str) -> None:
    """500 instead of the app's answer; the old record stays, no lock is left, and the next request works."""
    visitor = service.visitor()
    session_id = await visitor.begin(kept=1)
    answer = await visitor.open(put(VALUES[name]))
    assert (answer.status, answer.body) == (500, b"The session could not be stored.")
    data = await service.store.get(session_id)
    assert data is not None
    assert data.metadata == {"kept": 1}
    assert (await visitor.open(write)).status == 200
    assert await visitor.sees() == {"kept": 1, "n": 1}


@requirement("DATA-3")
@pytest.mark.parametrize("name", VALUES)
async def test_a_new_session_does_not_begin_with_it(service: Service, name: str) -> None:
    """No record, no cookie."""
    answer = await service.visitor().open(put(VALUES[name]))
    assert (answer.status, answer.cookies) == (500, [])
    assert await service.store.count_active() == 0


# -- what is not this session's ------------------------------------------------------------------------

FINGERPRINT = b'"fingerprint":"'
FOREIGN: dict[str, Any] = {
    "another session's record": lambda mine, other: other,
    "cut short": lambda mine, other: mine[:-1],
    "empty": lambda mine, other: b"",
    "text": lambda mine, other: b"hello",
    "a list": lambda mine, other: b"[]",
    "an id that is none": lambda mine, other: mine.replace(b'"session_id":"', b'"session_id":" '),
    "no id": lambda mine, other: mine.replace(b'"session_id"', b'"session_idd"'),
    "another type": lambda mine, other: mine.replace(b'"metadata":{', b'"metadata":["x"],"a":{'),
    "a bomb of brackets": lambda mine, other: mine.replace(
        b'"metadata":{', b'"metadata":{"x":' + b"[" * 100_000
    ),
    "bytes that are no text": lambda mine, other: mine.replace(b'"n":1', b'"n":"\xff"'),
    "a fingerprint that is no text": lambda mine, other: (
        mine[: mine.index(FINGERPRINT) + 15] + b"\xff" * 64 + mine[mine.index(FINGERPRINT) + 79 :]
    ),
}


async def assert_left_alone(visitor: Visitor) -> None:
    """The visitor is anonymous, an event tells why, and the answer is a good one."""
    visitor.service.events.clear()
    assert await visitor.copy().sees() == {}
    assert visitor.service.told == ["unreadable_record"]


@requirement("DATA-4")
@pytest.mark.parametrize("name", FOREIGN)
async def test_what_is_not_this_sessions_record_is_not_used(name: str) -> None:
    """In memory, where only a bug could put it."""
    store = InMemorySessionStore()
    service = Service(store)
    visitor, other = service.visitor(), service.visitor()
    await visitor.begin(n=1)
    await other.begin(who="other")
    entry = store._entries[visitor.session_id]
    changed = FOREIGN[name](entry.record, store._entries[other.session_id].record)
    assert changed != entry.record
    entry.record = changed
    await assert_left_alone(visitor)
    assert entry.record == changed


@requirement("DATA-4")
@pytest.mark.parametrize("name", FOREIGN)
async def test_what_is_not_this_sessions_record_is_not_used_on_redis(
    redis_url: str, redis: Redis, name: str
) -> None:
    """On a server that others write to as well; what they wrote stays.

    A record that names another id may as well be the reply to another's question: the answer is 503.
    """
    service = Service.on(redis_url)
    visitor, other = service.visitor(), service.visitor()
    await visitor.begin(n=1)
    await other.begin(who="other")
    mine, theirs = redis.get(key_of(visitor)), redis.get(key_of(other))
    assert isinstance(mine, bytes)
    assert isinstance(theirs, bytes)
    head, theirs_head = mine.index(b"{"), theirs.index(b"{")
    changed = mine[:head] + FOREIGN[name](mine[head:], theirs[theirs_head:])
    assert changed != mine
    redis.set(key_of(visitor), changed)
    if name in ("another session's record", "an id that is none"):
        answer = await visitor.copy().open(read)
        assert (answer.status, answer.cookies) == (503, [])
        assert (await other.open(read)).status == 200, "nobody else suffers from it"
    else:
        await assert_left_alone(visitor)
    assert redis.get(key_of(visitor)) == changed
    assert redis.keys("*:lock") == []
    await service.store.aclose()


@requirement("DATA-4")
async def test_a_foreign_record_is_not_overwritten(redis_url: str, redis: Redis) -> None:
    """Who writes to it begins a session of another id."""
    service = Service.on(redis_url)
    visitor = service.visitor()
    old = await visitor.begin()
    redis.set(key_of(visitor), "hello")
    await visitor.use(page(write))
    assert visitor.session_id != old
    assert redis.get(f"session:{{{old}}}") == b"hello"
    await visitor.use(page(read))
    await service.store.aclose()


@requirement("DATA-4")
@pytest.mark.parametrize(
    ("fingerprint", "event"),
    [
        ("g" * 64, "unreadable_record"),
        ("\u00e9" * 32, "unreadable_record"),
        ("0" * 64, "fingerprint_mismatch"),
    ],
)
async def test_a_fingerprint_of_nobody_matches_nobody(fingerprint: str, event: str) -> None:
    """Whatever else lies in its place, the record is not shown and nothing fails."""
    store = InMemorySessionStore()
    visitor = Service(store).visitor()
    await visitor.begin(n=1)
    entry = store._entries[visitor.session_id]
    start = entry.record.index(FINGERPRINT) + len(FINGERPRINT)
    entry.record = entry.record[:start] + fingerprint.encode() + entry.record[start + 64 :]
    assert await visitor.copy().sees() == {}
    assert visitor.service.told == [event]
