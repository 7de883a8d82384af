"""The handle: a dict like any other, Starlette's flags, and behind it the typed record."""

from __future__ import annotations

import copy
import gc
import json
import pickle
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from uuid import UUID, uuid4

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from pydantic import BaseModel, Field, ValidationError
from starlette.middleware.sessions import Session as StarletteSession

from asgi_sessions import (
    ReadOnlySessionError,
    Session,
    SessionClosedError,
    SessionData,
    SessionDataError,
    get_session,
    get_session_data,
)
from asgi_sessions.record.codec import encode_checked
from asgi_sessions.record.values import new_session_id
from asgi_sessions.request.state import State
from asgi_sessions.request.unit import UnitOfWork
from asgi_sessions.session.changes import ROTATE_ON, Change, Fate, fate_of


class Item(BaseModel):
    name: str
    price: int = 0


class Shop(SessionData):
    """A model of a user's own."""

    cart: list[Item] = Field(default_factory=list)


class Guarded(SessionData):
    """A model that begins with another value each time."""

    csrf: str = Field(default_factory=lambda: uuid4().hex)


class Later(SessionData):
    """What a new release made of `SessionData`."""

    colour: str = "blue"


def loaded(model: type[SessionData] = SessionData, **fields: Any) -> Session:
    """A handle as a request finds it that holds a stored record."""
    session = Session(model=model)
    session.load(encode_checked(model(session_id=new_session_id(), **fields)))
    return session


def unit_in(state: State) -> UnitOfWork:
    """What decides whether the handle may be changed."""
    unit = UnitOfWork.__new__(UnitOfWork)
    unit.state = state
    return unit


# --- a dict ---------------------------------------------------------------------------------------

keys = st.sampled_from(["a", "b", "ü", "", "long key"])
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(keys, inner, max_size=2),
    max_leaves=4,
)
contents = st.dictionaries(keys, values, max_size=3)


class ThreeDicts(RuleBasedStateMachine):
    """The handle, Starlette's session and a plain dict are given the same operations."""

    @initialize(content=contents)
    def begin(self, content: dict[str, Any]) -> None:
        self.plain: dict[str, Any] = dict(content)
        self.starlette = StarletteSession(content)
        self.session = Session(content)

    def all_do(self, operation: Callable[[Any], object]) -> None:
        """Each gives the same value or raises the same error, and the flags tell of the same change."""
        for flagged in (self.session, self.starlette):
            flagged.accessed = flagged.modified = False
        answers = [self.outcome(operation, each) for each in (self.plain, self.starlette, self.session)]
        assert answers[2] == answers[1] == answers[0]
        assert self.session.modified is self.starlette.modified
        assert self.session.accessed or not self.starlette.accessed
        assert self.session.accessed or not self.session.modified

    def outcome(self, operation: Callable[[Any], object], target: Any) -> object:
        try:
            result = operation(target)
        except (KeyError, TypeError) as error:
            return type(error), str(error)
        return "itself" if result is target else result

    @rule(key=keys, value=values)
    def set_item(self, key: str, value: Any) -> None:
        self.all_do(lambda d: d.__setitem__(key, value))

    @rule(key=keys)
    def delete_item(self, key: str) -> None:
        self.all_do(lambda d: d.__delitem__(key))

    @rule(key=keys)
    def pop(self, key: str) -> None:
        self.all_do(lambda d: d.pop(key))

    @rule(key=keys, value=values)
    def pop_with_default(self, key: str, value: Any) -> None:
        self.all_do(lambda d: d.pop(key, value))

    @rule()
    def pop_item(self) -> None:
        self.all_do(lambda d: d.popitem())

    @rule(key=keys, value=values)
    def set_default(self, key: str, value: Any) -> None:
        self.all_do(lambda d: d.setdefault(key, value))

    @rule(key=keys)
    def set_default_to_none(self, key: str) -> None:
        self.all_do(lambda d: d.setdefault(key))

    @rule(more=contents)
    def update(self, more: dict[str, Any]) -> None:
        self.all_do(lambda d: d.update(more))

    @rule(more=contents)
    def update_from_pairs(self, more: dict[str, Any]) -> None:
        self.all_do(lambda d: d.update(more.items()))

    @rule(value=values)
    def update_by_name(self, value: Any) -> None:
        self.all_do(lambda d: d.update({"a": 1}, b=value))

    @rule(more=contents)
    def merge_in_place(self, more: dict[str, Any]) -> None:
        def merge(d: Any) -> object:
            before = d
            d |= more
            return "itself" if d is before else "another"

        self.all_do(merge)

    @rule()
    def merge_nonsense(self) -> None:
        self.all_do(lambda d: d.__ior__(3))

    @rule()
    def clear(self) -> None:
        self.all_do(lambda d: d.clear())

    @rule(key=keys)
    def read(self, key: str) -> None:
        self.all_do(lambda d: (key in d, d.get(key), d.get(key, "default")))

    @rule(key=keys)
    def read_item(self, key: str) -> None:
        self.all_do(lambda d: d[key])

    @rule(more=contents)
    def combine(self, more: dict[str, Any]) -> None:
        self.all_do(lambda d: [(type(made), made) for made in (d | more, d.copy(), copy.copy(dict(d)))])

    @rule(more=contents)
    def combine_from_the_right(self, more: dict[str, Any]) -> None:
        self.all_do(lambda d: more | d)

    @invariant()
    def all_are_equal(self) -> None:
        """Content, order and every way of reading agree, and JSON is the same to the byte."""
        session, plain = self.session, self.plain
        assert session == plain
        assert plain == session
        assert (session != plain) is False
        assert list(session) == list(plain) == list(self.starlette)
        assert list(reversed(session)) == list(reversed(plain))
        assert list(session.items()) == list(plain.items())
        assert list(session.values()) == list(plain.values())
        assert session.keys() == plain.keys()
        assert len(session) == len(plain)
        assert bool(session) is bool(plain)
        assert repr(session) == repr(plain)
        assert {**session} == plain
        assert json.dumps(session) == json.dumps(plain)
        assert session.data.metadata is session


ThreeDicts.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestThreeDicts = ThreeDicts.TestCase


@pytest.mark.parametrize(
    "read",
    [
        lambda s: s["a"],
        lambda s: s.get("a"),
        lambda s: s.get("missing"),
        lambda s: "a" in s,
        lambda s: len(s),
        lambda s: bool(s),
        lambda s: list(s),
        lambda s: list(reversed(s)),
        lambda s: s.keys(),
        lambda s: s.values(),
        lambda s: s.items(),
        lambda s: s == {},
        lambda s: s != {},
        lambda s: s.copy(),
        lambda s: s | {},
        lambda s: {} | s,
        lambda s: {**s},
        lambda s: dict(s),
        lambda s: json.dumps(s),
        lambda s: copy.copy(s),
        lambda s: copy.deepcopy(s),
        lambda s: pickle.dumps(s),
        lambda s: repr(s),
        lambda s: str(s),
        lambda s: f"{s}",
        lambda s: format(s),
        lambda s: s.data,
        lambda s: s.session_id,
        lambda s: s.is_new,
        lambda s: s.client_changed,
    ],
)
@pytest.mark.parametrize("content", [{"a": 1}, {"a": 1, "b": [2]}], ids=["one", "two"])
def test_every_way_of_reading_counts_as_access(read: Callable[[Session], object], content: Any) -> None:
    """Unlike Starlette's, so that an app that takes `scope["session"]` directly varies on the cookie too."""
    session = Session(content)
    session.accessed = False
    read(session)
    assert session.accessed
    assert not session.modified


@pytest.mark.parametrize(
    "read",
    [
        lambda s: s == {},
        lambda s: s.copy(),
        lambda s: s | {},
        lambda s: list(reversed(s)),
        lambda s: f"{s}",
        lambda s: repr(s),
        lambda s: pickle.dumps(s),
        lambda s: copy.copy(s),
        lambda s: json.dumps(s, indent=1),
        lambda s: s.is_new,
        lambda s: s.client_changed,
    ],
)
def test_reading_an_empty_session_counts_as_access(read: Callable[[Session], object]) -> None:
    """That nothing was there is an answer that depends on the cookie too."""
    session = Session()
    read(session)
    assert session.accessed


def test_a_mark_counts_as_in_starlette() -> None:
    """`mark_accessed` sets one flag, `mark_modified` both."""
    for session in (Session(), StarletteSession()):
        assert (session.accessed, session.modified) == (False, False)
        session.mark_accessed()
        assert (session.accessed, session.modified) == (True, False)
    for session in (Session(), StarletteSession()):
        session.mark_modified()
        assert (session.accessed, session.modified) == (True, True)


@pytest.mark.parametrize(
    "duplicate",
    [copy.copy, copy.deepcopy, lambda s: s.copy(), lambda s: pickle.loads(pickle.dumps(s)), lambda s: s | {}],
    ids=["copy", "deepcopy", "dict.copy", "pickle", "or"],
)
def test_copies_are_plain_dicts(duplicate: Callable[[Session], object]) -> None:
    """What leaves the request is data, no handle."""
    session = loaded(metadata={"cart": [1, {"x": 2}]})
    made = duplicate(session)
    assert type(made) is dict
    assert made == {"cart": [1, {"x": 2}]}


def test_a_deep_copy_shares_nothing() -> None:
    """A change in the copy is none in the session."""
    session = loaded(metadata={"cart": [1]})
    copy.deepcopy(session)["cart"].append(2)
    assert session == {"cart": [1]}
    assert session.change() is Change.NOTHING


def test_a_session_cannot_be_hashed() -> None:
    """As any dict."""
    with pytest.raises(TypeError, match="unhashable"):
        hash(Session())


# --- the typed record -----------------------------------------------------------------------------


@pytest.mark.parametrize("session", [Session(), loaded(metadata={"a": 1})], ids=["fresh", "loaded"])
def test_record_and_dict_are_one_thing(session: Session) -> None:
    """`data.metadata` is the session, whichever of both is written to."""
    assert session.data.metadata is session
    session.data.metadata["b"] = 2
    assert session["b"] == 2
    session.data.metadata = {"c": 3}
    assert session.data.metadata is session
    assert dict(session) == {"c": 3}
    assert session.session_id == session.data.session_id


def test_assigning_a_field_is_a_change() -> None:
    """It sets the flags and is found by the comparison."""
    session = loaded(Shop)
    session.data.user_id = "ada"
    assert session.modified
    assert session.change() is Change.WRITE


def test_an_invalid_assignment_changes_nothing() -> None:
    """The record keeps its value and there is nothing to store."""
    session = loaded(message_count=3)
    with pytest.raises(ValidationError):
        session.data.message_count = -1
    assert session.data.message_count == 3
    assert session.change() is Change.NOTHING


@pytest.mark.parametrize(
    "forbidden",
    [
        lambda s: s.__setitem__("a", 1),
        lambda s: s.__delitem__("old"),
        lambda s: s.pop("old"),
        lambda s: s.popitem(),
        lambda s: s.clear(),
        lambda s: s.update(a=1),
        lambda s: s.setdefault("a", 1),
        lambda s: s.__ior__({"a": 1}),
        lambda s: s.mark_modified(),
        lambda s: setattr(s.data, "escalated", True),
        lambda s: setattr(s.data, "metadata", {}),
        lambda s: s.data.update_activity(),
        lambda s: s.data.increment_message_count(),
        lambda s: s.data.create_fingerprint("192.0.2.1", "agent"),
        lambda s: s.regenerate_id(),
        lambda s: s.login("ada"),
        lambda s: s.logout(),
        lambda s: s.invalidate(),
    ],
)
@pytest.mark.parametrize(
    ("state", "error"), [(State.READ_ONLY, ReadOnlySessionError), (State.RELEASED, SessionClosedError)]
)
def test_a_change_that_could_not_be_stored_raises_at_once(
    forbidden: Callable[[Session], object], state: State, error: type[Exception]
) -> None:
    """Every way of changing is refused, the remedy is named, and nothing has changed."""
    session = loaded(metadata={"old": 1})
    before = encode_checked(session.data)
    session.unit = unit_in(state)
    with pytest.raises(error, match=r"session\.transaction\(\)"):
        forbidden(session)
    assert encode_checked(session.data) == before
    assert not session.modified
    assert session.change() is Change.NOTHING


@pytest.mark.parametrize("state", State)
def test_what_changes_nothing_is_allowed_in_any_state(state: State) -> None:
    """A key that is there or absent is looked up, not changed."""
    session = loaded(metadata={"old": 1})
    session.unit = unit_in(state)
    assert session.setdefault("old", 2) == 1
    assert session.pop("absent", None) is None
    assert session.get("old") == 1
    with pytest.raises(KeyError):
        session.pop("absent")


def test_a_method_of_the_model_can_change_it() -> None:
    """The record's own methods count like assignments."""
    session = loaded()
    session.data.increment_message_count(2)
    assert session.modified
    assert session.change() is Change.WRITE


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("ada", "ada"),
        (5, "5"),
        (0, "0"),
        (-1, "-1"),
        (UUID("3f2504e0-4f89-11d3-9a0c-0305e82c3301"), "3f2504e0-4f89-11d3-9a0c-0305e82c3301"),
    ],
)
def test_who_signs_in_brings_an_id_of_any_kind(given: Any, kept: str) -> None:
    """A number or a UUID counts as its text, 0 included."""
    session = loaded()
    session.login(given)
    assert (session.data.user_id, session.fate, session.change()) == (kept, Fate.SIGN_IN, Change.MOVE)


@pytest.mark.parametrize("given", [True, False, None, b"ada", 1.5, ["ada"], ""])
def test_what_is_no_id_of_a_user_does_not_sign_in(given: Any) -> None:
    """It is a bug of the app, and nothing has changed."""
    session = loaded(user_id="ada")
    with pytest.raises((TypeError, ValueError), match="id"):
        session.login(given)
    assert (session.data.user_id, session.modified, session.change()) == ("ada", False, Change.NOTHING)


@pytest.mark.anyio
@pytest.mark.filterwarnings("error")
async def test_a_new_id_may_be_awaited_or_not() -> None:
    """Libraries await the method where it exists; who does not is not warned."""
    session = loaded()
    assert await session.regenerate_id() is None  # type: ignore[func-returns-value]  # the point
    assert session.fate is Fate.MOVE
    session.regenerate_id()
    gc.collect()


def test_a_new_id_does_not_undo_a_sign_in() -> None:
    """In whichever order: a full life begins."""
    for first, then in (("login", "regenerate"), ("regenerate", "login")):
        session = loaded()
        for step in (first, then):
            session.login("ada") if step == "login" else session.regenerate_id()
        assert session.fate is Fate.SIGN_IN


# --- what a commit has to do ----------------------------------------------------------------------


def nested(session: Session) -> None:
    session["cart"].append(2)


def typed_nested(session: Session) -> None:
    session.data.cart.append(Item(name="tea"))  # type: ignore[attr-defined]  # the model is Shop


def unstorable(session: Session) -> None:
    session["cart"].append({1, 2})


def take_everything_out(session: Session) -> None:
    session.data.user_id = None
    del session["cart"]


def login_then_clear(session: Session) -> None:
    session.login("ada")
    session.clear()


def clear_then(change: Callable[[Session], object]) -> Callable[[Session], None]:
    def change_it(session: Session) -> None:
        session.clear()
        change(session)

    return change_it


def invalidate_then(change: Callable[[Session], object]) -> Callable[[Session], None]:
    def change_it(session: Session) -> None:
        session.invalidate()
        change(session)

    return change_it


# --- who is signed in, by the values ----------------------------------------------------------------

SIGN_INS = [
    ({}, {"user": "ada"}, Fate.SIGN_IN),
    ({}, {"user_id": 0}, Fate.SIGN_IN),
    ({"user": None}, {"user": "ada"}, Fate.SIGN_IN),
    ({"user": {}}, {"user": {"sub": "1"}}, Fate.SIGN_IN),
    ({"user": {"name": "visitor"}}, {"user": {"name": "visitor", "sub": "1"}}, Fate.SIGN_IN),
    ({}, {"token": "abc"}, Fate.SIGN_IN),
    ({}, {"_user_id": "7"}, Fate.SIGN_IN),
    ({}, {"username": "ada"}, Fate.SIGN_IN),
    ({"user": "eve"}, {"user": "ada"}, Fate.SIGN_IN),
    ({"user": {"sub": "1", "name": "Eve"}}, {"user": {"sub": "2", "name": "Eve"}}, Fate.SIGN_IN),
    ({"user": {"id": 1}}, {"user": {"id": 2}}, Fate.SIGN_IN),
    ({"user": {"email": "a@b"}}, {"user": {"email": "c@d"}}, Fate.SIGN_IN),
    ({"user": {"username": "a"}}, {"user": {"username": "b"}}, Fate.SIGN_IN),
    ({"user": {"user_id": "a"}}, {"user": {"user_id": "b"}}, Fate.SIGN_IN),
    ({"user": "eve", "user_id": 1}, {"user": "eve", "user_id": 2}, Fate.SIGN_IN),
    ({"user": ["eve"]}, {"user": ["ada"]}, Fate.SIGN_IN),
    ({"user": {"name": "Eve"}}, {"user": {"name": "Ada"}}, Fate.MOVE),  # the same person perhaps
    ({"user": {"sub": "1", "exp": 1}}, {"user": {"sub": "1", "exp": 2}}, Fate.KEEP),
    ({"user": {"name": "Eve"}}, {"user": {"name": "Eve"}}, Fate.KEEP),
    ({"token": "abc"}, {"token": "def"}, Fate.KEEP),  # refreshed
    ({"user": "ada"}, {}, Fate.KEEP),  # a sign-out ends by itself, or leaves values that nobody owns
    ({"user": "ada"}, {"user": None}, Fate.KEEP),
    ({"user": "ada"}, {"user": "ada", "cart": [1]}, Fate.KEEP),
    ({}, {"user": None}, Fate.KEEP),
    ({}, {"user": ""}, Fate.KEEP),
    ({}, {"user": False}, Fate.KEEP),
    ({}, {"nested": {"user": "ada"}}, Fate.KEEP),
    ({"cart": [1]}, {"cart": [2]}, Fate.KEEP),
]


@pytest.mark.parametrize(("before", "after", "fate"), SIGN_INS)
@pytest.mark.parametrize("model", [SessionData, Shop])
def test_values_may_say_who_signs_in(
    before: dict[str, Any], after: dict[str, Any], fate: Fate, model: type[SessionData]
) -> None:
    """When somebody appears, or somebody else, the session gets a new id; the handle finds the same."""
    assert fate_of(before, after, ROTATE_ON) is fate
    assert fate_of(before, after, ()) is Fate.KEEP
    session = Session(model=model, rotate_on=frozenset(ROTATE_ON))
    session.load(encode_checked(model(session_id=new_session_id(), metadata={"other": 1, **before})))
    for name in before.keys() - after.keys():
        del session[name]
    for name, value in after.items():
        if isinstance(value, dict) and isinstance(session.get(name), dict):
            session[name].clear()
            session[name].update(value)  # a nested change is one too
        else:
            session[name] = value
    changed = before != after
    expected = (Change.WRITE if changed else Change.NOTHING) if fate is Fate.KEEP else Change.MOVE
    assert (session.change(), session.fate) == (expected, fate)


@pytest.mark.parametrize("model", [SessionData, Shop])
def test_a_typed_user_signs_in_too(model: type[SessionData]) -> None:
    """An assignment to `data.user_id` where "user_id" is among the names; a sign-out is none."""
    for names, before, after, fate in (
        (ROTATE_ON, None, "ada", Fate.SIGN_IN),
        (ROTATE_ON, "eve", "ada", Fate.SIGN_IN),
        (ROTATE_ON, "ada", None, Fate.KEEP),
        (("user",), None, "ada", Fate.KEEP),
        ((), None, "ada", Fate.KEEP),
    ):
        session = Session(model=model, rotate_on=frozenset(names))
        session.load(encode_checked(model(session_id=new_session_id(), user_id=before)))
        session["n"] = 1
        session.data.user_id = after
        session.change()
        assert session.fate is fate


@pytest.mark.parametrize("user", [("ada", 7), {"name": "Ada", "roles": ("admin",)}, {"id": (1, 2)}])
def test_a_tuple_is_the_list_as_which_it_was_stored(user: Any) -> None:
    """An app that says with each request who is there gives no new id with each."""
    session = Session(rotate_on=frozenset(ROTATE_ON))
    session.load(encode_checked(SessionData(session_id=new_session_id(), metadata={"user": user})))
    session["user"] = user
    session["n"] = 1
    assert (session.change(), session.fate) == (Change.WRITE, Fate.KEEP)


def test_what_was_committed_signs_nobody_in_again() -> None:
    """The values as they are stored now are what the next change is compared with."""
    session = Session(rotate_on=frozenset(ROTATE_ON))
    session.load(encode_checked(SessionData(session_id=new_session_id())))
    session["user"] = "ada"
    session.data.user_id = "ada"
    assert session.change() is Change.MOVE
    session.fate = Fate.KEEP
    session.committed(session.seal(), "ada")
    session["n"] = 1
    assert (session.change(), session.fate) == (Change.WRITE, Fate.KEEP)


def test_a_rolled_back_sign_in_is_none() -> None:
    """The id stays where the block that signed in has failed."""
    session = Session(rotate_on=frozenset(ROTATE_ON))
    session.load(encode_checked(SessionData(session_id=new_session_id())))

    def sign_in_and_fail() -> None:
        session["user"] = "ada"
        assert session.change() is Change.MOVE
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), session.savepoint():
        sign_in_and_fail()
    session["n"] = 1
    assert (session.change(), session.fate) == (Change.WRITE, Fate.KEEP)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda s: None, Change.NOTHING),
        (lambda s: s.get("a"), Change.NOTHING),
        (lambda s: s.data, Change.NOTHING),
        (lambda s: s.data.update_activity(), Change.NOTHING),
        (lambda s: s.update({}), Change.NOTHING),
        (lambda s: s.regenerate_id(), Change.NOTHING),
        (lambda s: s.invalidate(), Change.NOTHING),
        (clear_then(lambda s: None), Change.NOTHING),
        (lambda s: (s.update(a=1), s.clear()), Change.NOTHING),
        (lambda s: (s.update(a=1), s.pop("a")), Change.NOTHING),
        (lambda s: (s.login("ada"), s.clear()), Change.NOTHING),
        (lambda s: (s.login("ada"), s.logout()), Change.NOTHING),
        (lambda s: s.update(a=1), Change.CREATE),
        (lambda s: s.update(a=None), Change.CREATE),
        (lambda s: setattr(s.data, "escalated", True), Change.CREATE),
        (lambda s: s.login("ada"), Change.CREATE),
        (lambda s: (s.regenerate_id(), s.update(a=1)), Change.CREATE),
        (invalidate_then(lambda s: s.update(a=1)), Change.CREATE),
        (typed_nested, Change.CREATE),
    ],
)
def test_a_new_session_is_stored_once_something_is_in_it(
    change: Callable[[Session], object], expected: Change
) -> None:
    """Looking at it, or leaving it empty in any way, creates nothing."""
    session = Session(model=Shop)
    change(session)
    assert session.is_new
    assert session.change() is expected


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda s: None, Change.NOTHING),
        (lambda s: s["cart"], Change.NOTHING),
        (lambda s: s.data, Change.NOTHING),
        (lambda s: s.mark_modified(), Change.NOTHING),
        (lambda s: s.update(cart=[1]), Change.NOTHING),
        (lambda s: (s.update(a=1), s.pop("a")), Change.NOTHING),
        (lambda s: setattr(s.data, "user_id", "bob"), Change.NOTHING),
        (lambda s: s.update(a=1), Change.WRITE),
        (nested, Change.WRITE),
        (unstorable, Change.WRITE),
        (typed_nested, Change.WRITE),
        (lambda s: setattr(s.data, "escalated", True), Change.WRITE),
        (lambda s: s.data.update_activity(), Change.WRITE),
        (lambda s: s.pop("cart"), Change.WRITE),  # user_id is still there
        (clear_then(lambda s: s.update(a=1)), Change.WRITE),
        (clear_then(lambda s: setattr(s.data, "user_id", "eve")), Change.WRITE),
        (lambda s: s.regenerate_id(), Change.MOVE),
        (lambda s: s.login("bob"), Change.MOVE),
        (lambda s: s.login("eve"), Change.MOVE),
        (lambda s: (s.regenerate_id(), s.update(a=1)), Change.MOVE),
        (lambda s: (s.clear(), s.login("eve")), Change.MOVE),
        (invalidate_then(lambda s: s.update(a=1)), Change.MOVE),
        (invalidate_then(lambda s: s.login("eve")), Change.MOVE),
        (lambda s: s.clear(), Change.DELETE),
        (take_everything_out, Change.DELETE),
        (lambda s: s.invalidate(), Change.DELETE),
        (lambda s: s.logout(), Change.DELETE),
        (lambda s: (s.regenerate_id(), s.clear()), Change.DELETE),
        (lambda s: (s.clear(), s.regenerate_id()), Change.DELETE),
        (login_then_clear, Change.DELETE),
        (lambda s: (s.invalidate(), s.update(a=1), s.clear()), Change.DELETE),
    ],
)
def test_a_loaded_session_is_written_moved_or_deleted(
    change: Callable[[Session], object], expected: Change
) -> None:
    """The comparison with the stored record decides, and what the app wants to become of the id."""
    session = loaded(Shop, user_id="bob", metadata={"cart": [1]})
    change(session)
    assert not session.is_new
    assert session.change() is expected


def test_an_empty_record_is_no_cleared_one() -> None:
    """A record that was stored empty and is only looked at, or given a new id, stays."""
    session = loaded()
    session.mark_modified()
    assert session.change() is Change.NOTHING
    session.regenerate_id()
    assert session.change() is Change.MOVE


def test_a_default_that_differs_each_time_is_still_a_default() -> None:
    """A model with a random default begins empty, and can be emptied."""
    session = Session(model=Guarded)
    session.data.update_activity()
    assert session.change() is Change.NOTHING
    session = loaded(Guarded, metadata={"a": 1})
    session.clear()
    assert session.change() is Change.DELETE


@pytest.mark.parametrize("model", [SessionData, Shop])
def test_what_another_program_wrote_in_its_own_way_is_no_change(model: type[SessionData]) -> None:
    """Spaces, escapes and the order of fields do not count: a record that is only read is not written."""
    session = Session(model=model)
    plain = json.loads(encode_checked(model(session_id=new_session_id(), metadata={"n": 1.5, "ü": ["ü"]})))
    session.load(json.dumps(dict(sorted(plain.items())), indent=1).encode())
    assert session["ü"] == ["ü"]
    assert session.change() is Change.NOTHING
    session["ü"].append(1)
    assert session.change() is Change.WRITE


def test_a_default_of_a_new_release_is_not_written_alone() -> None:
    """Old records are read with the default and written when the app changes something."""
    session = Session(model=Later)
    session.load(encode_checked(SessionData(session_id=new_session_id(), metadata={"a": 1})))
    assert session.data.colour == "blue"  # type: ignore[attr-defined]  # the model is Later
    assert session.change() is Change.NOTHING
    session["a"] = 2
    assert session.change() is Change.WRITE


def test_asking_what_to_do_changes_nothing() -> None:
    """The decision can be asked for as often as one likes."""
    session = loaded(metadata={"cart": [1]})
    nested(session)
    before = session.accessed, session.modified, session.fate, dict(session)
    assert session.change() is session.change() is Change.WRITE
    assert (session.accessed, session.modified, session.fate, dict(session)) == before


# --- emptying and ending --------------------------------------------------------------------------


def test_clear_resets_the_typed_fields() -> None:
    """Values and fields go back to their defaults; id, creation and client stay."""
    session = loaded(Shop, user_id="ada", message_count=3, cart=[Item(name="tea")], metadata={"a": 1})
    session.data.create_fingerprint("192.0.2.1", "agent")
    before = session.data.model_copy()
    session.clear()
    after = session.data
    assert session == {}
    assert (after.user_id, after.message_count, after.cart) == (None, 0, [])  # type: ignore[attr-defined]  # Shop
    for name in ("session_id", "created_at", "fingerprint"):
        assert getattr(after, name) == getattr(before, name)


def test_what_was_ended_has_another_id() -> None:
    """After `invalidate` nothing of the old session is left, and what is put in belongs to a new one."""
    session = loaded(Shop, user_id="ada", message_count=3, metadata={"a": 1})
    old_id, old_creation = session.session_id, session.data.created_at
    session.invalidate()
    assert session == {}
    assert session.data.user_id is None
    assert session.data.message_count == 0
    assert session.session_id != old_id
    assert session.data.created_at > old_creation
    session["b"] = 2
    assert dict(session) == {"b": 2}
    assert session.data.metadata is session


def test_what_is_ended_twice_stays_ended() -> None:
    """A second `invalidate` ends what was put in after the first."""
    session = loaded(metadata={"a": 1})
    session.invalidate()
    session["b"] = 2
    session.logout()
    assert session == {}
    assert session.change() is Change.DELETE


def test_a_bad_user_id_signs_nobody_in() -> None:
    """`login` with what is no identifier changes nothing."""
    session = loaded(user_id="bob")
    with pytest.raises(ValidationError):
        session.login("a b; DROP TABLE")
    assert session.data.user_id == "bob"
    assert session.fate is Fate.KEEP
    assert session.change() is Change.NOTHING


# --- savepoints and reloading ---------------------------------------------------------------------


def test_a_savepoint_brings_everything_back() -> None:
    """An exception in the block undoes values, fields, the wish for a new id and the flag."""
    session = loaded(Shop, metadata={"cart": [1]}, user_id="ada")

    def fail() -> None:
        with session.savepoint() as data:
            data.user_id = "eve"
            nested(session)
            session["b"] = 1
            session.regenerate_id()
            raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        fail()
    assert dict(session) == {"cart": [1]}
    assert session.data.user_id == "ada"
    assert session.data.metadata is session
    assert not session.modified
    assert session.change() is Change.NOTHING


def test_a_savepoint_keeps_what_was_there_before_it() -> None:
    """Changes made before the block survive its failure."""
    session = loaded(metadata={"a": 1})
    session["b"] = 2

    def fail() -> None:
        with session.savepoint():
            session.invalidate()
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert dict(session) == {"a": 1, "b": 2}
    assert session.change() is Change.WRITE


def test_a_savepoint_refuses_what_it_could_not_bring_back() -> None:
    """An unstorable value from before the block is named at its beginning."""
    session = loaded(metadata={"cart": [1]})
    unstorable(session)
    with pytest.raises(SessionDataError) as caught, session.savepoint():
        pytest.fail("the block must not begin")
    assert caught.value.path == "metadata.cart[1]"


def rolled_back(session: Session) -> None:
    with pytest.raises(KeyError), session.savepoint():
        raise KeyError


@pytest.mark.parametrize(
    "happens",
    [
        rolled_back,
        lambda s: s.load(encode_checked(Shop(session_id=s.session_id, metadata={"n": 1}))),
        lambda s: s.forget(),
        lambda s: s.clear(),
        lambda s: s.invalidate(),
    ],
    ids=["rollback", "reload", "forget", "clear", "invalidate"],
)
def test_the_record_stays_one_object(happens: Callable[[Session], object]) -> None:
    """A `data` that an app took before still writes to this session: no change goes to a dead copy."""
    session = loaded(Shop, metadata={"a": 1})
    data = session.data
    happens(session)
    assert session.data is data
    data.escalated = True
    assert session.data.escalated
    assert session.change() is not Change.NOTHING


def test_a_forgotten_session_shows_nothing() -> None:
    """Neither values nor fields of the record that is gone, and another id."""
    session = loaded(Shop, user_id="ada", cart=[Item(name="tea")], metadata={"a": 1})
    data, session_id = session.data, session.session_id
    session.forget()
    assert session.is_new
    assert session == {}
    assert (data.user_id, data.cart, data.metadata) == (None, [], {})  # type: ignore[attr-defined]  # Shop
    assert data.session_id != session_id
    assert session.change() is Change.NOTHING


@pytest.mark.parametrize(
    "record", [b"", b"{", b"[]", b'{"session_id": ""}', b'{"session_id": "x", "message_count": -1}']
)
def test_a_record_that_does_not_parse_leaves_the_handle_alone(record: bytes) -> None:
    """`load` raises and nothing has changed."""
    session = Session()
    session["a"] = 1
    with pytest.raises(ValueError):  # noqa: PT011  # pydantic's, whatever it says
        session.load(record)
    assert dict(session) == {"a": 1}
    assert session.is_new


# --- without a request ----------------------------------------------------------------------------


def test_a_handle_of_its_own_is_a_dict_with_a_record() -> None:
    """For tests and tools: everything but storing works without a request."""
    session = Session({"a": 1})
    assert session.data.metadata == {"a": 1}
    assert session.unit is None
    session.login("ada")
    session.logout()
    assert session == {}


@pytest.mark.anyio
async def test_a_handle_of_its_own_cannot_be_stored() -> None:
    """`save`, `release` and `transaction` say why."""
    session = Session()
    with pytest.raises(SessionClosedError, match="no request"):
        await session.save()
    with pytest.raises(SessionClosedError, match="no request"):
        await session.release()
    with pytest.raises(SessionClosedError, match="no request"):
        session.transaction()


def test_the_session_is_found_in_scopes_and_connections() -> None:
    """A bare scope and any object with a scope will do; looking it up counts as access."""
    for wrap in (dict, lambda scope: SimpleNamespace(scope=scope)):
        session = Session()
        assert get_session(wrap({"type": "http", "session": session})) is session
        assert session.accessed


@pytest.mark.parametrize("scope", [{}, {"session": {}}, {"session": StarletteSession()}, {"session": None}])
def test_a_missing_middleware_is_named(scope: dict[str, Any]) -> None:
    """Another middleware's session is none of ours."""
    with pytest.raises(RuntimeError, match=r"add asgi_sessions\.SessionMiddleware"):
        get_session(scope)
    with pytest.raises(RuntimeError, match="exclude"):
        get_session_data(SimpleNamespace(scope=scope), SessionData)


def test_the_typed_record_is_found() -> None:
    """The middleware's model, or a base of it."""
    scope = {"session": Session(model=Shop)}
    shop = get_session_data(scope, Shop)
    assert shop.cart == []
    assert get_session_data(scope, SessionData) is shop


def test_a_wrong_model_is_named() -> None:
    """Asking for another model than the middleware's is an error that says what to pass it."""
    for look in (get_session_data, get_session):
        with pytest.raises(TypeError, match="model is SessionData: pass it model=Shop"):
            look({"session": Session()}, Shop)


def test_looking_with_a_model_reads_no_fields() -> None:
    """The record stays in its lines: the type costs nothing."""
    session = Session()
    session.load(encode_checked(SessionData(session_id="a")))
    assert get_session({"session": session}, SessionData) is session
    assert session._draft._data is None


def test_the_generic_handle_is_a_dict() -> None:
    """Types are for editors: at run time there is one class, and `json` knows it."""
    assert Session[Shop](model=Shop).data.cart == []
    assert type(Session[Shop]({"n": 1}, Shop)) is Session
    assert json.dumps(Session({"n": 1})) == '{"n": 1}'
