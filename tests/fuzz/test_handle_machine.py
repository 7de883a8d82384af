"""Requests that do anything to their session, against a model of plain dicts: what is stored is what it says.

A request is a list of steps. Each step is taken on the real handle and on the model, which must answer alike;
after the request the store, the answer's status and its cookie must be what the model says.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import json
import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import pytest
from asgi import Answer, Browser, Shop, Site, chunk, start
from hypothesis import note
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from asgi_sessions import InMemorySessionStore, Session, SessionData
from asgi_sessions.asgi import Receive, Scope, Send
from asgi_sessions.errors import SessionClosedError, SessionConflictError, SessionDataError
from fuzz import effort, explore

MAX_AGE = 14 * 24 * 60 * 60
RETIRED_FOR = 60.0
FIELDS: dict[str, Any] = {
    "user_id": None,
    "thread_id": None,
    "message_count": 0,
    "escalated": False,
    "cart": [],
}

# --- the model -----------------------------------------------------------------------------------------


@dataclass
class Content:
    """What a session says: free-form values, and the fields that are not their default."""

    values: dict[str, Any] = field(default_factory=dict)
    fields: dict[str, Any] = field(default_factory=lambda: copy.deepcopy(FIELDS))

    def spelled(self) -> str:
        """The JSON of it: two contents are one if it is."""
        return json.dumps([self.values, self.fields], default=repr)

    @property
    def blank(self) -> bool:
        return self.spelled() == Content().spelled()

    @property
    def poisoned(self) -> bool:
        return "{'poison'}" in self.spelled()


@dataclass
class Kept:
    """A stored record."""

    content: Content
    ends: float
    began: float
    version: int = 0


@dataclass
class World:
    """What the store has to hold."""

    now: float = 1000.0
    kept: dict[str, Kept] = field(default_factory=dict)
    retired: dict[str, float] = field(default_factory=dict)
    versions: int = 0

    def put(self, session_id: str, content: Content, ends: float, began: float | None = None) -> None:
        self.versions += 1
        if began is None:
            began = self.kept[session_id].began if session_id in self.kept else self.now
        self.kept[session_id] = Kept(copy.deepcopy(content), ends, began, self.versions)

    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        self.kept = {name: kept for name, kept in self.kept.items() if kept.ends > self.now}
        self.retired = {name: until for name, until in self.retired.items() if until > self.now}


class RefusedError(Exception):
    """The model says that this must be an error of this kind."""

    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.kind = kind


@dataclass
class Snapshot:
    """The model of a savepoint."""

    now: Content
    fate: str
    expiry: tuple[float | None] | None
    stamped: bool
    modified: bool
    commits: int


class Book:
    """The model of one request's handle."""

    def __init__(self, world: World, presented: str | None) -> None:
        self.world = world
        self.record = presented if presented in world.kept else None  # the id under which it is stored
        self.loaded = copy.deepcopy(world.kept[presented]) if presented in world.kept else None
        self.now = copy.deepcopy(self.loaded.content) if self.loaded else Content()
        self.retired = presented in world.retired
        self.fate = "keep"
        self.expiry: tuple[float | None] | None = None  # the life that was asked for
        self.has_another_end = False  # of which the client hears
        self.modified = self.accessed = self.stamped = False
        self.open, self.started = True, False
        self.cookie_gone = self.began_here = False
        self.refused = False  # what was refused once stays refused, but for an end
        self.depth = self.commits = 0
        self.writes: list[str] = []
        self.fresh: Callable[[], str] = lambda: ""  # tells the id that the real handle has now

    # -- what the app does ------------------------------------------------------------------------------

    def change(self) -> None:
        if not self.open:
            raise RefusedError("closed")
        self.accessed = self.modified = True

    def clear(self) -> None:
        self.change()
        self.now = Content()

    def invalidate(self) -> None:
        self.clear()
        self.fate, self.expiry = "end", None

    def expire(self, seconds: float | None) -> None:
        self.change()
        self.expiry = (seconds,)
        if self.fate == "keep":
            self.fate = "bound"

    def regenerate(self) -> None:
        self.change()
        if self.fate in ("keep", "bound"):
            self.fate = "move"

    def login(self, user: str) -> None:
        self.change()
        self.now.fields["user_id"] = user
        self.sign_in()

    def sign_in(self) -> None:
        if self.fate != "end":
            self.fate = "sign in"

    def notice_sign_in(self) -> None:
        """Whoever assigns the field signs in, too."""
        user = self.now.fields["user_id"]
        if user is not None and user != (self.loaded.content.fields["user_id"] if self.loaded else None):
            self.sign_in()

    def snapshot(self) -> Snapshot:
        if self.depth == 0:
            self.decision()
        if self.now.poisoned:
            raise RefusedError("data")
        now = copy.deepcopy(self.now)
        return Snapshot(now, self.fate, self.expiry, self.stamped, self.modified, self.commits)

    def restore(self, before: Snapshot) -> None:
        """What was there, or what was stored since."""
        self.modified = before.modified
        if self.commits == before.commits:
            self.now, self.fate, self.stamped = before.now, before.fate, before.stamped
            self.expiry = before.expiry
        else:
            self.now = copy.deepcopy(self.loaded.content) if self.loaded else Content()
            self.fate, self.expiry, self.stamped = "keep", None, False

    # -- what is stored ---------------------------------------------------------------------------------

    def decision(self) -> str:
        """What a commit has to do; a sign-in that was found changes the fate for good."""
        if self.loaded is None:
            if self.now.blank:
                return "nothing"
            self.notice_sign_in()
            return "create"
        if self.fate == "end":
            return "delete" if self.now.blank else "replace"
        differs = self.stamped or self.now.spelled() != self.loaded.content.spelled()
        if not (self.accessed and differs):
            return {"keep": "nothing", "bound": "bound"}.get(self.fate, "move")
        if self.modified and self.now.blank:
            return "delete"
        self.notice_sign_in()
        return {"keep": "write", "bound": "bound"}.get(self.fate, "move")

    def commit(self) -> None:
        """Store what changed; `RefusedError` for what is answered with an error."""
        decision = self.decision()
        if decision == "nothing":
            return
        if not self.open:
            raise RefusedError("closed")
        if self.refused and self.fate != "end":
            raise RefusedError("conflict")
        getattr(self, f"_{decision}")()

    def _create(self) -> None:
        if self.retired and self.fate in ("keep", "bound"):
            raise RefusedError("conflict")
        self._sealed()
        self.writes.append("create")
        self.began_here = True
        self._adopt(self._full_life())

    def _full_life(self) -> float:
        """When a session ends that begins now."""
        seconds = None if self.expiry is None else self.expiry[0]
        return self.world.now + (MAX_AGE if seconds is None else seconds)

    def _life(self, kept: Kept) -> float:
        """When one ends that goes on."""
        if self.expiry is None:
            return kept.ends
        return min(self._full_life(), kept.began + MAX_AGE)

    def _bound(self) -> None:
        """Another end, whatever else was changed."""
        assert self.record is not None
        self._sealed()
        self._refuse_unless(self._state() == "here")
        self.writes.append("commit")
        self.has_another_end = True
        self.world.put(self.record, self.now, self._life(self.world.kept[self.record]))
        self._committed()

    def _write(self) -> None:
        assert self.record is not None
        self._sealed()
        self.writes.append("commit")
        self._refuse_unless(self._state() == "here")
        self.world.put(self.record, self.now, self.world.kept[self.record].ends)
        self._committed()

    def _move(self) -> None:
        """A sign-in begins a full life; a new id alone prolongs nothing."""
        assert self.record is not None
        self._sealed()
        if self.fate != "move" or self.expiry is None or self._state() == "here":
            self.writes.append("move")
        self._refuse_unless(self._state() == "here")
        kept = self.world.kept.pop(self.record)
        self.world.retired[self.record] = self.world.now + RETIRED_FOR
        if self.fate == "move":
            self._adopt(self._life(kept), kept.began)
        else:
            self._adopt(self._full_life())

    def _replace(self) -> None:
        """Ended, and begun anew in one request: an end wins over every other writer."""
        assert self.record is not None
        self._sealed()
        self.writes.append("move")
        state, old = self._state(), self.record
        self.world.kept.pop(old, None)
        self._note_end(state)
        if state == "here":
            self.world.retired[old] = self.world.now + RETIRED_FOR
        else:
            self.writes += ["discard", "create"]
            self.began_here = True
        self._adopt(self._full_life())

    def _delete(self) -> None:
        """An emptied session ends, unless another has written to it; an ended one in any case."""
        assert self.record is not None
        self.writes.append("discard")
        state = self._state()
        self._refuse_unless(state != "moved on" or self.fate == "end")
        self.world.kept.pop(self.record, None)
        self._note_end(state)
        self._forget()

    def _note_end(self, state: str) -> None:
        """Who ended the session that the cookie led to removes the cookie, nobody else does."""
        if state != "gone" and not self.retired and not self.began_here:
            self.cookie_gone = True

    def _refuse_unless(self, accepted: bool) -> None:
        if not accepted:
            self.refused = True
            raise RefusedError("conflict")

    def _state(self) -> str:
        assert self.loaded is not None
        kept = self.world.kept.get(self.record or "")
        if kept is None:
            return "gone"
        return "here" if kept.version == self.loaded.version else "moved on"

    def _sealed(self) -> None:
        if self.now.poisoned:
            raise RefusedError("data")

    def _adopt(self, ends: float, began: float | None = None) -> None:
        self.record = self.fresh()
        assert self.record not in self.world.kept, "a new session took an id that is in use"
        self.world.put(self.record, self.now, ends, began)
        self.retired = False
        self._committed()

    def _committed(self) -> None:
        assert self.record is not None
        self.loaded = copy.deepcopy(self.world.kept[self.record])
        self.fate, self.expiry, self.stamped = "keep", None, False
        self.commits += 1

    def _forget(self) -> None:
        self.record = self.loaded = None
        self.now, self.fate, self.expiry, self.stamped = Content(), "keep", None, False
        self.commits += 1


# --- steps ---------------------------------------------------------------------------------------------

Step: TypeAlias = tuple[Any, ...]
Act: TypeAlias = Callable[[dict[str, Any], str, Any], Any]


class BoomError(Exception):
    """Raised by an app in a transaction."""


def _containers(values: dict[str, Any]) -> list[Any]:
    """Every list and dict within, in order."""
    found: list[Any] = []
    ahead = [each for _, each in values.items()]
    while ahead:
        node = ahead.pop(0)
        if isinstance(node, (list, dict)):
            found.append(node)
            ahead += list(node.values()) if isinstance(node, dict) else node
    return found


def _change_within(values: dict[str, Any], key: str, value: Any) -> Any:
    """Change a nested container, chosen and changed by what `value` says."""
    which, how, new = value
    found = _containers(values)
    if not found:
        return None
    node = found[which % len(found)]
    if isinstance(node, dict):
        acts: list[Callable[[], Any]] = [
            lambda: node.update({key: new}),
            lambda: node.pop(key, None),
            node.clear,
            lambda: node.setdefault(key, new),
        ]
    else:
        acts = [
            lambda: node.append(new),
            lambda: node.insert(0, new),
            lambda: node and node.pop(),
            node.reverse,
            node.clear,
            lambda: node.extend([new, copy.deepcopy(new)]),
        ]
    return acts[how % len(acts)]()


def _insert_all(values: dict[str, Any], key: str, value: Any) -> None:
    values.__ior__({key: value})


READS: dict[str, Act] = {
    "get": lambda d, k, v: d.get(k, v),
    "[]": lambda d, k, v: d[k],
    "in": lambda d, k, v: k in d,
    "len": lambda d, k, v: len(d),
    "iter": lambda d, k, v: list(d),
    "items": lambda d, k, v: list(d.items()),
    "values": lambda d, k, v: list(d.values()),
    "reversed": lambda d, k, v: list(reversed(d)),
    "==": lambda d, k, v: d == {k: v},
    "|": lambda d, k, v: d | {k: v},
    "copy": lambda d, k, v: d.copy(),
    "dumps": lambda d, k, v: json.dumps(d, default=repr),
    "deepcopy": lambda d, k, v: copy.deepcopy(d),
    "within": _change_within,
}
WRITES: dict[str, tuple[Act, Callable[[dict[str, Any], str], bool]]] = {
    "[]=": (lambda d, k, v: d.__setitem__(k, v), lambda d, k: True),
    "del": (lambda d, k, v: d.__delitem__(k), lambda d, k: True),
    "pop": (lambda d, k, v: d.pop(k), lambda d, k: k in d),
    "pop default": (lambda d, k, v: d.pop(k, v), lambda d, k: k in d),
    "popitem": (lambda d, k, v: d.popitem(), lambda d, k: bool(d)),
    "setdefault": (lambda d, k, v: d.setdefault(k, v), lambda d, k: k not in d),
    "update": (lambda d, k, v: d.update({k: v}), lambda d, k: True),
    "update pairs": (lambda d, k, v: d.update([(k, v)], z=copy.deepcopy(v)), lambda d, k: True),
    "|=": (_insert_all, lambda d, k: True),
}
VALID: dict[str, st.SearchStrategy[Any]] = {
    "user_id": st.sampled_from([None, "ada", "bob"]),
    "thread_id": st.sampled_from([None, "t-1"]),
    "message_count": st.integers(0, 3),
    "escalated": st.booleans(),
}
INVALID = [
    ("user_id", "a -- b"),
    ("user_id", 1),
    ("message_count", -1),
    ("message_count", 100_001),
    ("escalated", "?"),
]

keys = st.sampled_from(["a", "b", "c", "message_count"])
plain = st.none() | st.booleans() | st.integers(0, 3) | st.sampled_from([1.0, "x", "", 10**20])
values = st.recursive(
    plain, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(keys, inner, max_size=2), max_leaves=5
)
nested = st.tuples(st.integers(0, 5), st.integers(0, 5), values)
poison = st.just(("write", "[]=", "p", {"poison"}))

simple_steps: list[st.SearchStrategy[Step]] = [
    st.tuples(st.just("read"), st.sampled_from(sorted(set(READS) - {"within"})), keys, values),
    st.tuples(st.just("read"), st.just("within"), keys, nested),
    st.tuples(st.just("write"), st.sampled_from(sorted(WRITES)), keys, values),
    st.tuples(st.just("write"), st.just("[]="), keys, values),
    st.sampled_from(sorted(VALID)).flatmap(
        lambda name: st.tuples(st.just("field"), st.just(name), VALID[name])
    ),
    st.sampled_from(INVALID).map(lambda bad: ("wrong", *bad)),
    st.tuples(st.just("metadata"), st.dictionaries(keys, values, max_size=2)),
    st.tuples(st.just("cart"), st.sampled_from(["append", "clear", "assign"]), st.sampled_from(["x", "y"])),
    st.tuples(st.just("count"), st.integers(-1, 2)),
    st.sampled_from([("stamp",), ("clear",), ("invalidate",), ("logout",), ("regenerate",), ("peek",)]),
    st.tuples(st.just("login"), st.sampled_from(["ada", "bob"])),
    st.tuples(st.just("expire"), st.sampled_from([None, 30.0, 100_000.0, MAX_AGE])),
    st.tuples(st.just("held"), st.sampled_from(["update", "count", "touch"]), keys, st.integers(1, 2)),
]
rare_steps: list[st.SearchStrategy[Step]] = [
    poison,
    st.sampled_from([("rival", "set"), ("rival", "delete")]),
]
steps: st.SearchStrategy[Step] = st.recursive(
    st.one_of(*simple_steps, st.just(("save",)), st.one_of(*rare_steps)),
    lambda inner: st.tuples(st.just("transaction"), st.lists(inner, max_size=3), st.booleans()),
    max_leaves=3,
)


_WITH_THE_LOCK = ("transaction", "held", "rival")
"""Steps that lock, store at once or have the app run again where the request itself has no lock."""


class Walk:
    """Takes the steps of one request on the real handle and in the model at once."""

    def __init__(self, book: Book, site: Site) -> None:
        self.book = book
        self.site = site
        self.has_cart = site.options["model"] is Shop

    async def take(self, session: Session, all_steps: list[Step]) -> None:
        self._expect_id(session)
        left_out = _WITH_THE_LOCK if self.site.options["lock"] == "auto" else ()
        for kind, *arguments in [step for step in all_steps if step[0] not in left_out]:
            await getattr(self, f"_{kind}")(session, *copy.deepcopy(arguments))
            self.agree(session)

    def agree(self, session: Session) -> None:
        """The handle shows what the model says, looked at without touching it."""
        book = self.book
        said = Content(dict(dict.items(session)), book.now.fields).spelled()
        assert said == book.now.spelled(), "the handle holds other values than the model"
        assert session.modified is book.modified
        assert session.accessed is book.accessed
        assert session._is_new is (book.loaded is None) or book.record is not None

    async def _both(self, real: Callable[[], Any], modelled: Callable[[], Any]) -> None:
        """The same answer, or an error of the same kind; one that ends the request rises."""
        expected, found = await _outcome(modelled), await _outcome(real)
        assert _spelled(found) == _spelled(expected)
        if isinstance(found, BaseException) and _kind(found) in ("data", "conflict", "closed"):
            raise found

    # -- one method for each kind of step -----------------------------------------------------------------

    async def _read(self, session: Session, name: str, key: str, value: Any) -> None:
        other = copy.deepcopy(value)
        if name != "dumps" or self.book.now.values:  # CPython writes {} without a look at what is empty
            self.book.accessed = True
        await self._both(
            lambda: READS[name](session, key, value), lambda: READS[name](self.book.now.values, key, other)
        )

    async def _write(self, session: Session, name: str, key: str, value: Any) -> None:
        act, modifies = WRITES[name]
        other = copy.deepcopy(value)

        def modelled() -> Any:
            self.book.accessed = True
            if modifies(self.book.now.values, key):
                self.book.change()
            return act(self.book.now.values, key, other)

        await self._both(lambda: act(session, key, value), modelled)

    async def _field(self, session: Session, name: str, value: Any) -> None:
        self.book.change()
        setattr(session.data, name, value)
        self.book.now.fields[name] = value

    async def _wrong(self, session: Session, name: str, value: Any) -> None:
        """An assignment that fails changes nothing, though it was a try to change."""
        self.book.change()
        with pytest.raises(ValueError, match="validation error"):
            setattr(session.data, name, value)

    async def _metadata(self, session: Session, new: dict[str, Any]) -> None:
        self.book.change()
        session.data.metadata = new
        self.book.now.values = copy.deepcopy(new)

    async def _cart(self, session: Session, how: str, item: str) -> None:
        if not self.has_cart:
            return
        data = session.data
        assert isinstance(data, Shop)
        self.book.accessed = True
        cart = self.book.now.fields["cart"]
        if how == "append":
            data.cart.append(item)
            cart.append(item)
        elif how == "clear":
            data.cart.clear()
            cart.clear()
        else:
            self.book.change()
            data.cart = [item]
            self.book.now.fields["cart"] = [item]

    async def _count(self, session: Session, delta: int) -> None:
        self.book.change()
        count = self.book.now.fields["message_count"] + delta

        def modelled() -> int:
            if count < 0:
                raise ValueError
            self.book.now.fields["message_count"] = count
            return int(count)

        await self._both(lambda: session.data.increment_message_count(delta), modelled)

    async def _stamp(self, session: Session) -> None:
        self.book.change()
        session.data.update_activity()
        self.book.stamped = True

    async def _clear(self, session: Session) -> None:
        session.clear()
        self.book.clear()

    async def _invalidate(self, session: Session) -> None:
        session.invalidate()
        self.book.invalidate()

    async def _logout(self, session: Session) -> None:
        session.logout()
        self.book.invalidate()

    async def _regenerate(self, session: Session) -> None:
        session.regenerate_id()
        self.book.regenerate()

    async def _login(self, session: Session, user: str) -> None:
        session.login(user)
        self.book.login(user)

    async def _expire(self, session: Session, seconds: float | None) -> None:
        session.set_expiry(seconds)
        self.book.expire(seconds)

    async def _peek(self, session: Session) -> None:
        """The typed record has the values of the handle, and is one object."""
        self.book.accessed = True
        data = session.data
        assert data is session.data
        assert data.metadata is session
        for name in VALID:
            assert getattr(data, name) == self.book.now.fields[name]
        if self.book.record is not None and self.book.fate == "keep":
            assert session.session_id == self.book.record

    async def _save(self, session: Session) -> None:
        self._expect_id(session)
        await self._commits(session.save)

    async def _commits(self, real: Callable[[], Awaitable[None]]) -> None:
        """Real first: the model asks it for the new id."""
        found = await _outcome(real)
        expected = await _outcome(self.book.commit)
        assert _kind(found) == _kind(expected), f"{found!r} instead of {expected!r}"
        if isinstance(found, BaseException):
            raise found

    def _expect_id(self, session: Session) -> None:
        self.book.fresh = lambda: session.identity().session_id

    async def _transaction(self, session: Session, inner: list[Step], fails: bool) -> None:
        before = await _outcome(self.book.snapshot)
        self.book.accessed |= not isinstance(before, BaseException)
        committing: list[bool] = []
        try:
            async with session.transaction() as data:
                assert not isinstance(before, BaseException), "what cannot be stored cannot be rolled back to"
                assert data is session.data
                self.book.depth += 1
                await self.take(session, inner)
                self.book.depth -= 1
                if fails:
                    raise BoomError
                committing.append(True)
        except BaseException as error:
            if isinstance(error, AssertionError):
                raise
            self._transaction_failed(error, before, bool(committing))
            if not isinstance(error, BoomError):
                raise
        else:
            if not self.book.depth:
                self.book.commit()

    def _transaction_failed(self, error: BaseException, before: Any, committing: bool) -> None:
        if isinstance(before, BaseException):
            assert _kind(error) == _kind(before)
        elif committing:
            with pytest.raises(RefusedError) as refused:
                self.book.commit()
            assert _kind(error) == refused.value.kind
        else:
            self.book.restore(before)

    async def _held(self, session: Session, how: str, key: str, number: int) -> None:
        """The store's own operations, called in the request, act on what it holds and has not ended."""
        book, store, record = self.book, self.site.store, self.book.record
        if record is None:
            return
        before = await _outcome(book.snapshot)
        calls = {
            "update": lambda: store.update(record, {key: number, "a": number}),
            "count": lambda: store.increment_counter(record, key, number),
            "touch": lambda: store.touch(record),
        }

        def modelled() -> Any:
            if isinstance(before, BaseException):
                raise before
            book.accessed = True
            if book.fate == "end":
                return {"update": False, "count": 0, "touch": False}[how]
            return getattr(self, f"_held_{how}")(key, number)

        await self._both(calls[how], modelled)

    def _held_update(self, key: str, number: int) -> bool:
        self.book.change()
        where = self.book.now.fields if key in VALID else self.book.now.values
        where[key] = number
        self.book.now.values["a"] = number
        return True

    def _held_count(self, key: str, number: int) -> Any:
        where = self.book.now.fields if key in VALID else self.book.now.values
        old = where.get(key, 0)
        if isinstance(old, bool) or not isinstance(old, (int, float)):
            raise RefusedError("data")
        self.book.change()
        where[key] = old + number
        return where[key]

    def _held_touch(self, key: str, number: int) -> bool:
        self.book.change()
        self.book.stamped = True
        return True

    async def _rival(self, session: Session, how: str) -> None:
        """A writer who does not wait."""
        record, world = self.book.record, self.book.world
        if record is None:
            return
        if how == "delete":
            assert await self.site.store.delete(record) is (record in world.kept)
            world.kept.pop(record, None)
        elif record in world.kept:
            await self.site.store.set(
                record, self.site.options["model"](session_id=record, metadata={"rival": 1})
            )
            world.put(record, Content({"rival": 1}), world.kept[record].ends)


async def _outcome(act: Callable[[], Any]) -> Any:
    """What it answers, or what it raises."""
    try:
        result = act()
        return await result if isinstance(result, Awaitable) else result
    except AssertionError:
        raise
    except Exception as error:
        return error


def _spelled(outcome: object) -> str:
    """An answer as JSON, an error as its kind."""
    kind = _kind(outcome)
    return json.dumps(outcome, default=repr) if kind is None else f"error: {kind}"


def _kind(error: object) -> str | None:
    if isinstance(error, RefusedError):
        return error.kind
    for kind, name in (
        (SessionDataError, "data"),
        (SessionConflictError, "conflict"),
        (SessionClosedError, "closed"),
        (KeyError, "key"),
        (ValueError, "value"),
        (Exception, repr(error)),
    ):
        if isinstance(error, kind):
            return name
    return None


# --- requests ------------------------------------------------------------------------------------------

STATUS = {"data": 500, "conflict": 409}


class HandleMachine(RuleBasedStateMachine):
    """Two browsers and whoever else uses the store."""

    model: type[SessionData] = SessionData
    lock: bool | str = True

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.site = Site({"model": self.model, "lock": self.lock})
        self.world = World()
        self.browsers = [self.site.browser(), self.site.browser()]

    def teardown(self) -> None:
        self.loop.close()

    @initialize(content=st.dictionaries(keys, values, min_size=1, max_size=3))
    def begin(self, content: dict[str, Any]) -> None:
        """Both have a session of their own."""
        for which in (0, 1):
            self.visit(which, [("write", "[]=", key, each) for key, each in content.items()], "page", [])

    @rule(
        which=st.integers(0, 1),
        first=st.lists(steps, max_size=5),
        kind=st.sampled_from(["page", "page", "page", "stream", "error", "raise", "release"]),
        then=st.lists(st.tuples(st.just("write"), st.just("[]="), keys, values), max_size=2),
    )
    def visit(self, which: int, first: list[Step], kind: str, then: list[Step]) -> None:
        """One request."""
        browser = self.browsers[which]
        presented = browser.session_id if browser.cookie is not None else None
        book = Book(self.world, presented)
        visit = Visit(self.site, book, presented)
        self.site.log.clear()
        answer = self.loop.run_until_complete(visit.run(browser, first, kind, then))
        self.check_answer(visit, answer, presented)
        writes = [call.partition("+")[0].removesuffix(" unlocked") for call in self.site.log]
        assert [call for call in writes if call in ("create", "commit", "move", "discard")] == book.writes

    def check_answer(self, visit: Visit, answer: Answer | None, presented: str | None) -> None:
        if answer is None:
            return
        book = visit.book
        assert answer.status == visit.status
        told = [re.match(r"session=([^.;]*)", line) for line in answer.cookies]
        ids = [match[1] for match in told if match is not None]
        at_start = visit.record_at_start
        if at_start is not None and at_start != presented:
            assert ids == [at_start], "the client is told its new id"
        elif at_start is None and presented is not None and visit.gone_at_start:
            assert ids == ["null"], "the client is told that its session has ended"
        elif at_start in self.world.kept and visit.dressed and visit.prolonged_at_start:
            assert ids == [presented], "the client is told of another end"
        else:
            assert ids == [], f"a cookie that nobody needs ({presented}, {book.record})"
        if visit.dressed:
            assert ("Cookie" in ", ".join(answer.header("vary"))) is visit.accessed_at_start

    @rule(which=st.integers(0, 1))
    def share(self, which: int) -> None:
        """The other browser gets this one's cookie."""
        self.browsers[1 - which].cookie = self.browsers[which].cookie

    @rule(which=st.integers(0, 1))
    def lose_cookie(self, which: int) -> None:
        """The user clears the browser's data."""
        self.browsers[which].cookie = None

    @rule(seconds=st.sampled_from([1.0, 61.0, 500_000.0]))
    def pass_time(self, seconds: float) -> None:
        """By the store's clock."""
        self.site.clock.now += seconds
        self.world.pass_time(seconds)

    @rule(which=st.integers(0, 1), how=st.sampled_from(["set", "update", "count", "delete"]))
    def use_store(self, which: int, how: str) -> None:
        """Somebody works with the records while no request runs."""
        browser, store = self.browsers[which], self.site.store
        if browser.cookie is None or (name := browser.session_id) not in self.world.kept:
            return
        kept = self.world.kept[name]
        if how == "delete":
            assert self.loop.run_until_complete(store.delete(name))
            del self.world.kept[name]
            return
        if how == "set":
            data = self.model(session_id=name, metadata={"set": 1})
            assert self.loop.run_until_complete(store.set(name, data))
            kept.content = Content({"set": 1})
        elif how == "update":
            assert self.loop.run_until_complete(store.update(name, {"escalated": True, "u": [1]}))
            kept.content.fields["escalated"] = True
            kept.content.values["u"] = [1]
        else:
            self.loop.run_until_complete(store.increment_counter(name, "message_count"))
            kept.content.fields["message_count"] += 1
        self.world.put(name, kept.content, kept.ends)

    @invariant()
    def the_store_holds_what_the_model_says(self) -> None:
        """Every record, no other, under its own id and with its own end; no lock is left."""
        self.loop.run_until_complete(self.site.store.cleanup_expired())
        records = {data.session_id: data for data in self.site.records()}
        entries = _entries(self.site)
        assert records.keys() == entries.keys() == self.world.kept.keys()
        for name, kept in self.world.kept.items():
            assert _content_of(records[name]).spelled() == kept.content.spelled()
            assert entries[name].expires == pytest.approx(kept.ends, abs=2.0)
        assert self.site.locks == 0
        for user in ("ada", "bob"):
            listed = self.loop.run_until_complete(self.site.store.list_for_user(user))
            signed_in = {n for n, kept in self.world.kept.items() if kept.content.fields["user_id"] == user}
            assert {data.session_id for data in listed} == signed_in


def _entries(site: Site) -> Mapping[str, Any]:
    assert isinstance(site.store, InMemorySessionStore)
    return site.store._entries


def _content_of(data: SessionData) -> Content:
    fields = {name: getattr(data, name, []) for name in FIELDS}
    if not isinstance(data, Shop):
        fields["cart"] = []
    return Content(data.metadata, fields)


class Visit:
    """One request: the app that takes the steps, and what the model expects of the answer."""

    def __init__(self, site: Site, book: Book, presented: str | None) -> None:
        self.site, self.book = site, book
        self.is_optimistic = site.options["lock"] == "auto" and presented is not None
        self.status = 200
        self.dressed = True  # the app's own answer, not the middleware's
        self.record_at_start: str | None = None
        self.gone_at_start = self.accessed_at_start = self.prolonged_at_start = False

    async def run(self, browser: Browser, first: list[Step], kind: str, then: list[Step]) -> Answer | None:
        """The answer, None where the request ended in an exception that reached the server."""
        walk, outcome = Walk(self.book, self.site), ""

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            nonlocal outcome
            session = scope["session"]
            await walk.take(session, first)
            if kind == "release":
                await walk._commits(session.release)
                walk.book.open = False
                await self._is_closed(session)
            if kind == "raise":
                raise BoomError
            outcome = "answered"
            walk._expect_id(session)
            await self._respond(walk, session, kind, then, send)

        try:
            answer = await browser.open(app)
        except (BoomError, SessionClosedError, SessionDataError, SessionConflictError) as error:
            note(f"the request ended in {error!r}")
            unexpected = not (kind == "raise" or self.book.started or isinstance(error, SessionClosedError))
            if unexpected:
                raise
            return None
        if outcome != "answered":
            self._own_answer(answer)
        elif not self.book.started:
            self._at_start(kind)
        return answer

    async def _respond(self, walk: Walk, session: Session, kind: str, then: list[Step], send: Send) -> None:
        if kind != "stream":
            status = 500 if kind == "error" else 200
            await send(start(status, [(b"content-length", b"2")]))
            await send(chunk(b"ok"))
            return
        written = len(self.book.writes)
        await send(start(200))
        self._at_start(kind)
        self.book.started = True
        keeps_if_changed = self.site.options["lock"] is not False
        is_let_go = self.is_optimistic or (keeps_if_changed and len(self.book.writes) == written)
        if self.book.record is None or not self.accessed_at_start or is_let_go:
            self.book.open = False
        await send(chunk(b"part", more=True))
        await walk.take(session, then)
        await walk._commits(lambda: send(chunk()))

    async def _is_closed(self, session: Session) -> None:
        """After `release` nothing can be changed, and nothing is."""
        for change in (session.clear, session.invalidate, lambda: session.update(x=1)):
            with pytest.raises(SessionClosedError):
                change()
        with pytest.raises(SessionClosedError):
            session.data.escalated = True
        self.book.accessed = True

    def _at_start(self, kind: str) -> None:
        """What the model expects the moment the answer's headers leave."""
        if kind == "error":
            self.status = 500  # and nothing more is stored
        else:
            try:
                self.book.commit()
            except RefusedError as refused:
                self.status, self.dressed = STATUS[refused.kind], False
        self._note()

    def _own_answer(self, answer: Answer) -> None:
        """The steps ended in an error of the session's, which the middleware answers."""
        self.status, self.dressed = answer.status, False
        assert answer.status in STATUS.values()
        self._note()

    def _note(self) -> None:
        self.record_at_start = self.book.record
        self.gone_at_start = self.book.cookie_gone
        self.prolonged_at_start = self.book.has_another_end
        self.accessed_at_start = self.book.accessed


@pytest.mark.parametrize("model", [SessionData, Shop], ids=["plain", "typed"])
@pytest.mark.parametrize("lock", [True, False, "auto"], ids=["locked", "unlocked", "optimistic"])
def test_requests_store_what_the_model_says(model: type[SessionData], lock: bool | str) -> None:
    """Any steps in any order, over many requests of two browsers."""
    explore(HandleMachine, effort(40, steps=10), model=model, lock=lock)


# --- what was found by the above ------------------------------------------------------------------------


@pytest.fixture
def site() -> Site:
    """A site of its own."""
    return Site()


def _page(act: Callable[[Session], Awaitable[None]]) -> Callable[[Scope, Receive, Send], Awaitable[None]]:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await act(scope["session"])
        await send(start(200, [(b"content-length", b"2")]))
        await send(chunk(b"ok"))

    return app


async def _end(session: Session, how: str) -> None:
    """End the session, stored before the block around it is over."""
    if how == "nested":
        async with session.transaction():
            session.clear()
    else:
        session.invalidate()
        await session.save()


@pytest.mark.anyio
@pytest.mark.parametrize("how", ["nested", "saved"])
async def test_a_rollback_brings_no_dead_id_back(site: Site, how: str) -> None:
    """The session was ended within a block that then failed: its id is never stored again."""
    browser = site.browser()
    session_id = await browser.begin(n=1)

    async def act(session: Session) -> None:
        with contextlib.suppress(BoomError):
            async with session.transaction():
                await _end(session, how)
                raise BoomError

    answer = await browser.open(_page(act))
    assert answer.status == 200
    kept = await site.store.get(session_id)
    assert (kept is None) is (how == "saved"), "what save() stored stays; what a nested block did is undone"
    assert len(site.records()) == (how == "nested")
    assert (browser.cookie is None) is (how == "saved")
    assert "discard" not in site.log or how == "saved", "the outer block stores, or rolls back"


@pytest.mark.anyio
async def test_a_rollback_after_a_stored_login_leaves_a_readable_session(site: Site) -> None:
    """The record lies under the new id and says so; the next request finds it."""
    browser = site.browser()
    await browser.begin(n=1)

    async def act(session: Session) -> None:
        with contextlib.suppress(BoomError):
            async with session.transaction():
                session.login("ada")
                await session.save()
                session["n"] = 2
                raise BoomError
        session["m"] = 3

    await browser.open(_page(act))
    assert await browser.stored() == {"n": 1, "m": 3}
    assert [(data.session_id, data.user_id) for data in site.records()] == [(browser.session_id, "ada")]


@pytest.mark.anyio
@pytest.mark.parametrize("begin", [lambda s: s.login("bob"), lambda s: s.regenerate_id()])
async def test_what_begins_after_an_end_has_a_life_of_its_own(
    site: Site, begin: Callable[[Session], None]
) -> None:
    """Signing out and in again in one request does not inherit what was left of the old session's life."""
    browser = site.browser()
    await browser.begin(n=1)
    site.clock.now += MAX_AGE / 2

    async def act(session: Session) -> None:
        session.logout()
        begin(session)
        session["n"] = 2

    await browser.open(_page(act))
    assert "session_ended" in site.events
    assert _entries(site)[browser.session_id].expires == site.clock.now + MAX_AGE


@pytest.mark.anyio
@pytest.mark.parametrize("ends", [False, True])
async def test_the_client_learns_what_was_saved_before_an_error(site: Site, ends: bool) -> None:
    """The middleware's own answer carries the cookie of the id that `save` stored, or its removal."""
    browser = site.browser()
    old = await browser.begin(n=1)

    async def act(session: Session) -> None:
        session.invalidate() if ends else session.login("ada")
        await session.save()
        session["bad"] = {1}

    answer = await browser.open(_page(act))
    assert (answer.status, len(answer.cookies)) == (500, 1)
    assert answer.header("cache-control") == ["no-store"]
    if ends:
        assert browser.cookie is None
    else:
        assert browser.session_id != old
        assert await browser.stored() == {"n": 1}
