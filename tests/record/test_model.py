"""The typed record: its fields' rules, its methods, its copies, and the filter over many records."""

from __future__ import annotations

import base64
import copy
import hashlib
import json
import pickle
import random
from collections import OrderedDict
from datetime import datetime, timedelta, timezone
from decimal import Decimal
from functools import cached_property
from pprint import pformat
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PydanticUserError,
    RootModel,
    SerializerFunctionWrapHandler,
    TypeAdapter,
    ValidationError,
    computed_field,
    field_serializer,
    model_serializer,
    model_validator,
)
from pydantic.alias_generators import to_camel
from pydantic_core import to_json

from asgi_sessions.record.codec import Who, codec_of, decode, encode_checked
from asgi_sessions.record.model import SessionData, stamp
from asgi_sessions.record.queries import SessionFilter, SessionMetrics
from asgi_sessions.record.values import is_identifier, new_session_id
from asgi_sessions.session.tracking import TrackedDict

UTC = timezone.utc
NOON = datetime(2024, 5, 1, 12, tzinfo=UTC)
HOUR = timedelta(hours=1)
PLUS_TWO = timezone(timedelta(hours=2))
KEYS = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=20,
)
METADATA = st.dictionaries(KEYS, JSON, max_size=4)
IDS = st.text(st.characters(categories=["L", "N"]), min_size=1, max_size=40).filter(is_identifier)
MOMENTS = st.datetimes(timezones=st.just(UTC))


class ShopSession(SessionData):
    cart: list[str] = []  # noqa: RUF012 - pydantic copies defaults, and users write them so
    _seen: int = 0

    @cached_property
    def size(self) -> int:
        return len(self.cart)

    @property
    def first(self) -> str:
        return self.cart[0]

    @first.setter
    def first(self, value: str) -> None:
        self.cart = [value, *self.cart[1:]]


class Capped(SessionData):
    @model_validator(mode="after")
    def at_most_five_when_escalated(self) -> Capped:
        if self.escalated and self.message_count > 5:
            raise ValueError("too many messages")
        return self


class Stamped(SessionData):
    @model_validator(mode="after")
    def stamp_it(self) -> Stamped:
        self.update_activity()
        return self


class Counted(SessionData):
    @computed_field  # type: ignore[prop-decorator]  # mypy has no decorated properties
    @property
    def doubled(self) -> int:
        return self.message_count * 2


class Camel(SessionData):
    model_config = ConfigDict(alias_generator=to_camel)


def who_of(record: bytes) -> Who | None:
    """What a handle that is used as a dict knows of a record without its model."""
    found = codec_of(SessionData).lines_of(record)
    return None if found is None else found[1]


def record_with(user: str) -> bytes:
    """A record in four lines that has this user, whether the model has it or not."""
    record = encode_checked(SessionData(session_id="0" * 32))
    return record.replace(b'"user_id":null', b'"user_id":' + json.dumps(user).encode())


class Handle(TrackedDict):
    """A live dict that counts the announcements and refuses to be read but by the plain dict's ways."""

    def __init__(self, *args: Any, closed: bool = False) -> None:
        super().__init__(*args)
        self.announced = 0
        self.closed = closed

    def before_change(self) -> None:
        if self.closed:
            raise PermissionError("closed")
        self.announced += 1

    def clear(self) -> None:
        raise AssertionError("the handle's own clear() ran")

    def update(self, *args: Any, **values: Any) -> None:
        raise AssertionError("the handle's own update() ran")


def live_record(values: dict[str, Any] | None = None, closed: bool = False) -> tuple[SessionData, Handle]:
    handle = Handle(values or {}, closed=closed)
    data = SessionData(session_id="s")
    vars(data)["metadata"] = handle
    return data, handle


# -- identifiers --------------------------------------------------------------------------------------

GOOD_IDS = [
    "a",
    "dropbox-17",
    "undeleted@example.com",
    "DROPBOX",
    "drop_table",
    "deleted",
    "user-4711",
    "{7b}",
    "naïve-用户",
    "a/b*c-d",
    "x drop".replace(" ", ":"),
    "x" * 255,
]
BAD_IDS = [
    "a b",
    "a\tb",
    "a\n",
    "\x00",
    "a\x7f",
    "a\u00a0b",
    "a\u200bb",
    "\ud800",
    "a'b",
    'a"b',
    "a`b",
    "a;b",
    "a--b",
    "a/*b",
    "a*/b",
    "drop",
    "DROP",
    "Delete",
    "DROP:table",
    "delete-from",
    "dRoP.",
    "x" * 256,
]


@pytest.mark.parametrize("text", GOOD_IDS)
def test_good_identifiers(text: str) -> None:
    """An ordinary identifier is accepted by the rule and by every field that obeys it."""
    data = SessionData(session_id=text, user_id=text, thread_id=text, request_id=text)
    assert is_identifier(text)
    assert (data.session_id, data.user_id, data.thread_id, data.request_id) == (text,) * 4


@pytest.mark.parametrize("field", ["session_id", "thread_id", "request_id"])
@pytest.mark.parametrize("text", BAD_IDS)
def test_bad_identifiers(field: str, text: str) -> None:
    """What breaks the identifier rule is refused by the rule and by every field that obeys it."""
    assert not is_identifier(text)
    with pytest.raises(ValidationError) as caught:
        SessionData.model_validate({"session_id": "s"} | {field: text})
    assert [error["loc"] for error in caught.value.errors()] == [(field,)]


def test_empty_identifiers() -> None:
    """A session id and a user's have at least one character; the other identifiers may be empty."""
    assert not is_identifier("")
    assert SessionData(session_id="s", thread_id="").thread_id == ""
    for wrong in ({"session_id": ""}, {"session_id": "s", "user_id": ""}):
        with pytest.raises(ValidationError):
            SessionData.model_validate(wrong)


def test_new_session_ids() -> None:
    """A generated id has 128 bits, obeys the rule and does not come twice."""
    ids = {new_session_id() for _ in range(1000)}
    assert len(ids) == 1000
    assert all(is_identifier(text) and len(bytes.fromhex(text)) == 16 for text in ids)


@given(
    IDS, IDS, st.sampled_from([" ", "'", '"', "`", ";", "--", "/*", "*/", "\n", "\x1b", "\u2028", "\ud800"])
)
@settings(deadline=None)
def test_forbidden_parts(before: str, after: str, part: str) -> None:
    """A forbidden part is found wherever it stands."""
    assert not is_identifier(before + part + after)


@given(st.sampled_from(["drop", "delete"]), st.data(), st.characters(exclude_categories=["L", "N"]))
@settings(deadline=None)
def test_statement_words(word: str, data: st.DataObject, separator: str) -> None:
    """DROP and DELETE, in any case, are refused alone and before all but letters, digits and underscores."""
    mixed = "".join(data.draw(st.sampled_from([c.upper(), c])) for c in word)
    assert not is_identifier(mixed)
    if separator != "_":
        assert not is_identifier(mixed + separator)
    assert is_identifier(mixed + "s")


# -- users --------------------------------------------------------------------------------------------

GOOD_USERS = [
    "o'brien@example.com",
    "d'Arcy O'Neill",
    "delete@example.com",
    "delete.me@example.com",
    "drop-shipping-ltd",
    "Delete",
    "dropbox user",
    "a--b",
    "Zk3-a--TQ_9--",
    "--Zk3aTQ9xw0Rk7pYs",  # a base64url subject
    "----Zk3aTQ9xw0Rk7p",
    "Ada Lovelace",
    "auth0|5f7c",
    "google-oauth2|108204268033311374519",
    "5",
    "CN=Ada, O=Analytical Engines; OU=1".replace("; ", ";"),
    "a;b",
    "a/*b",
    "*/a",
    "3f2504e0-4f89-11d3-9a0c-0305e82c3301",
    "Ελένη Παπαδοπούλου",
    "王小明",
    "علی\u200cرضا",  # noqa: RUF001  # a zero-width non-joiner is part of the spelling
    "अनुष्का",
    "O’Connor",  # noqa: RUF001  # not a quote of any language
    "🙂",
    "{braces}",
    "}",
    "x" * 255,
]
BAD_USERS = [
    "",
    " ",
    " ada",
    "ada ",
    "ada\u3000",
    "ada\n",
    "a\nb",
    "a\tb",
    "a\x00b",
    "a\x7f",
    "a\x85b",
    "a\u2028b",
    "\ud800",
    "x" * 256,
    "DROP TABLE x",
    "drop\u00a0table x",
    "please DELETE  everything",
    "x' OR '1'='1",
    "'; DELETE FROM t; --",
    "admin'--",
    "admin' --",
    "admin'",
    'admin"',
    "admin`",
    "admin;",
    "admin';",
    "'admin",
    '"admin',
    "`admin",
    ";admin",
    "--admin",
    "-- admin",
    "--",
    "/*admin",
    "/* x */ admin",
    "Ada -- Lovelace",
    "Ada --Lovelace",
    "Ada-- Lovelace",
    "Ada /* Lovelace",
    "Ada ;Lovelace",
    "Ada; Lovelace",
    "Ada 'Lovelace",
    "Ada' Lovelace",
    'Ada "Lovelace',
    "a''b",
    "a';b",
    "a;--b",
    "a--;b",
    "a/*--b",
    "a'/*b",
]


@pytest.mark.parametrize("text", GOOD_USERS)
def test_good_users(text: str) -> None:
    """What identity providers hand out may sign in and comes back from the store, by its line alone too."""
    data = SessionData(session_id="0" * 32, user_id=text)
    assert data.user_id == text
    record = encode_checked(data)
    assert decode(SessionData, record).user_id == text
    who = who_of(record)
    assert who is not None
    assert who.user_id == text


@pytest.mark.parametrize("text", BAD_USERS)
def test_bad_users(text: str) -> None:
    """What reads as an injection, or cannot be seen, is refused; nor is it read from its line."""
    with pytest.raises(ValidationError) as caught:
        SessionData(session_id="s", user_id=text)
    assert [error["loc"] for error in caught.value.errors()] == [("user_id",)]
    assert who_of(record_with(text)) is None


def test_every_base64url_subject_may_sign_in() -> None:
    """Such as providers make of random bytes: of 10,000, a hundred have two dashes side by side."""
    made = random.Random(8)
    for _ in range(10_000):
        subject = base64.urlsafe_b64encode(made.randbytes(made.randrange(12, 64))).decode().rstrip("=")
        assert SessionData(session_id="s", user_id=subject).user_id == subject


@given(
    st.text(
        st.characters(exclude_categories=["C", "Z"], exclude_characters="'\"`;-/*"), min_size=1, max_size=255
    )
)
@settings(deadline=None)
def test_any_script_may_sign_in(text: str) -> None:
    """Letters, marks, digits, punctuation and symbols of the whole world."""
    assert SessionData(session_id="s", user_id=text).user_id == text


@given(st.text(st.sampled_from("aA0 -'\";`/*\t_.@|~é"), max_size=12))
@settings(deadline=None, max_examples=500)
def test_the_first_line_knows_no_user_that_the_model_refuses(text: str) -> None:
    """Both read the same records."""
    who = who_of(record_with(text))
    if who is not None:
        assert SessionData(session_id="s", user_id=text).user_id == who.user_id == text


# -- moments ------------------------------------------------------------------------------------------


def test_fresh_record() -> None:
    """A record made from an id alone was created, changed and used at one moment in UTC."""
    data = SessionData(session_id="s")
    assert data.created_at == data.updated_at == data.last_activity
    assert data.created_at.tzinfo is UTC
    assert (data.user_id, data.message_count, data.escalated) == (None, 0, False)
    assert (data.metadata, data.fingerprint) == ({}, None)


@pytest.mark.parametrize(
    ("given_value", "expected"),
    [
        (NOON, NOON),
        (NOON.replace(tzinfo=None), NOON),
        (NOON.replace(tzinfo=PLUS_TWO), NOON - 2 * HOUR),
        (NOON.replace(tzinfo=timezone(timedelta(0), "London")), NOON),
        ("2024-05-01T12:00:00Z", NOON),
        ("2024-05-01T12:00:00", NOON),
        ("2024-05-01T12:00:00+02:00", NOON - 2 * HOUR),
        (NOON.timestamp(), NOON),
    ],
)
def test_moments(given_value: Any, expected: datetime) -> None:
    """Naive times are UTC, other zones are converted; from Python, from JSON and on assignment alike."""
    fields = dict.fromkeys(["created_at", "updated_at", "last_activity"], given_value)
    data = SessionData.model_validate({"session_id": "s"} | fields)
    assert data.created_at == data.updated_at == data.last_activity == expected
    assert data.created_at.tzinfo is UTC
    assigned = SessionData(session_id="s", created_at=expected)
    assigned.updated_at = given_value
    assert assigned.updated_at == expected
    text = json.dumps({"session_id": "s"} | fields, default=datetime.isoformat)
    from_text = SessionData.from_json(text)
    assert from_text.last_activity == expected
    assert from_text.last_activity.tzinfo == UTC


@pytest.mark.parametrize("as_json", [False, True])
def test_none_is_now(as_json: bool) -> None:
    """None, or JSON's null, is the present moment, for each of the three times."""
    fields = {"session_id": "s", "created_at": None, "updated_at": None, "last_activity": None}
    before = datetime.now(UTC)
    data = SessionData.from_json(json.dumps(fields)) if as_json else SessionData.model_validate(fields)
    assert before <= data.created_at <= data.updated_at <= data.last_activity <= datetime.now(UTC)


def test_omitted_moments_follow_the_creation() -> None:
    """Times that are not given are those of the creation, wherever the clock stands."""
    data = SessionData(session_id="s", created_at=NOON)
    assert data.updated_at == data.last_activity == NOON


def test_none_is_not_before_the_creation() -> None:
    """A clock that stands before the creation does not make `updated_at` wrong."""
    ahead = datetime.now(UTC) + 24 * HOUR
    data = SessionData.model_validate({"session_id": "s", "created_at": ahead, "updated_at": None})
    assert data.updated_at == ahead


@pytest.mark.parametrize("as_json", [False, True])
def test_updated_before_created(as_json: bool) -> None:
    """A record that was changed before it was created is refused."""
    fields = {"session_id": "s", "created_at": NOON.isoformat(), "updated_at": (NOON - HOUR).isoformat()}
    with pytest.raises(ValidationError, match="updated_at must not be before created_at"):
        SessionData.from_json(json.dumps(fields)) if as_json else SessionData.model_validate(fields)


@pytest.mark.parametrize(("field", "value"), [("updated_at", NOON - HOUR), ("created_at", NOON + HOUR)])
def test_assignment_keeps_the_order(field: str, value: datetime) -> None:
    """Neither time can be assigned past the other, and the refused value does not stay."""
    data = SessionData(session_id="s", created_at=NOON)
    with pytest.raises(ValidationError):
        setattr(data, field, value)
    assert (data.created_at, data.updated_at) == (NOON, NOON)


@pytest.mark.parametrize("value", [datetime.max.replace(tzinfo=timezone(-HOUR)), "soon", [], "9999-99-99"])
def test_impossible_moments(value: Any) -> None:
    """What is no moment in UTC is a validation error that names the field once."""
    with pytest.raises(ValidationError) as caught:
        SessionData.model_validate({"session_id": "s", "last_activity": value})
    assert [error["loc"] for error in caught.value.errors()] == [("last_activity",)]
    text = json.dumps({"session_id": "s", "last_activity": value}, default=datetime.isoformat)
    with pytest.raises(ValidationError) as caught:
        SessionData.from_json(text)
    assert [error["loc"] for error in caught.value.errors()] == [("last_activity",)]


def test_stamp() -> None:
    """A stamp sets both times, reads a naive one as UTC, and keeps `updated_at` at or after the creation."""
    data = SessionData(session_id="s", created_at=NOON)
    stamp(data, NOON.replace(tzinfo=None) + HOUR)
    assert (data.updated_at, data.last_activity) == (NOON + HOUR, NOON + HOUR)
    stamp(data, NOON - HOUR)
    assert (data.updated_at, data.last_activity) == (NOON, NOON - HOUR)
    assert {"updated_at", "last_activity"} <= data.model_fields_set


def test_update_activity() -> None:
    """Activity moves both times to the present."""
    data = SessionData(session_id="s", created_at=NOON)
    before = datetime.now(UTC)
    data.update_activity()
    assert before <= data.last_activity == data.updated_at <= datetime.now(UTC)


def test_stamping_inside_a_validator() -> None:
    """A model may note activity in a validator of its own; nothing recurses."""
    data = Stamped(session_id="s", created_at=NOON)
    data.user_id = "bob"
    assert data.user_id == "bob"
    assert data.updated_at > NOON


# -- assignment ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("session_id", "a b"),
        ("session_id", None),
        ("user_id", "a -- b"),
        ("message_count", -1),
        ("message_count", 100_001),
        ("message_count", 1.5),
        ("escalated", "perhaps"),
        ("metadata", None),
        ("metadata", [1]),
        ("metadata", {"a": {1}}),
        ("fingerprint", "xyz"),
        ("updated_at", "later"),
    ],
)
def test_assignment_is_validated(field: str, value: Any) -> None:
    """A wrong value is refused on assignment and the record stays what it was."""
    data = SessionData(session_id="s", metadata={"a": 1})
    before = data.to_dict()
    with pytest.raises(ValidationError):
        setattr(data, field, value)
    assert data.to_dict() == before


def test_a_model_wide_rule_undoes_the_assignment() -> None:
    """An assignment that breaks a rule of the whole model changes nothing."""
    data = Capped(session_id="s", message_count=6)
    with pytest.raises(ValidationError, match="too many messages"):
        data.escalated = True
    assert data.escalated is False
    data.message_count = 5
    data.escalated = True


@pytest.mark.parametrize("name", ["usr_id", "to_dict", "model_config"])
def test_unknown_attributes(name: str) -> None:
    """A name that is no field cannot be assigned; the error says where free-form values go."""
    data = SessionData(session_id="s")
    with pytest.raises(AttributeError, match=rf"SessionData has no field '{name}'.*metadata"):
        setattr(data, name, 1)
    assert not data.model_extra


def test_extras_of_a_record() -> None:
    """A field of a newer release can be read, and is not to be assigned."""
    data = SessionData.from_json('{"session_id":"s","colour":"red"}')
    assert data.model_extra == {"colour": "red"}
    with pytest.raises(AttributeError, match="colour"):
        setattr(data, "colour", "blue")  # noqa: B010 - no field that a type checker knows


def test_attributes_of_a_subclass() -> None:
    """Fields, private attributes, property setters and cached properties of a subclass work."""
    data = ShopSession(session_id="s", cart=["a", "b"])
    data.first = "c"
    data._seen = 3
    assert (data.cart, data.first, data._seen, data.size) == (["c", "b"], "c", 3, 2)
    data.size = 7
    assert data.size == 7


def test_defaults_are_not_shared() -> None:
    """Two records never share a default list or dict."""
    first, second = ShopSession(session_id="1"), ShopSession(session_id="2")
    first.cart.append("a")
    first.metadata["a"] = 1
    assert (second.cart, second.metadata) == ([], {})


def test_errors_hide_the_input() -> None:
    """The text of a validation error contains nothing of what was given."""
    with pytest.raises(ValidationError) as caught:
        SessionData.model_validate({"session_id": "sesame opens", "message_count": "sesame"})
    assert "sesame" not in str(caught.value)


def test_names_go_with_aliases() -> None:
    """A model with aliases is built by names too, and written by names alone."""
    data = Camel(session_id="s", user_id="u")
    assert Camel.model_validate({"sessionId": "s", "userId": "u"}).user_id == "u"
    assert Camel.from_dict(data.to_dict()) == data
    assert "user_id" in data.to_dict()


# -- counters and fingerprints ------------------------------------------------------------------------


def test_increment() -> None:
    """Counting returns the new count, up and down."""
    data = SessionData(session_id="s")
    assert [data.increment_message_count(), data.increment_message_count(5)] == [1, 6]
    assert data.increment_message_count(-6) == data.message_count == 0


@pytest.mark.parametrize("delta", [-4, 99_998, 0.5])
def test_increment_out_of_bounds(delta: Any) -> None:
    """A count outside of its bounds is refused and the old one stays."""
    data = SessionData(session_id="s", message_count=3)
    with pytest.raises(ValidationError):
        data.increment_message_count(delta)
    assert data.message_count == 3


@pytest.mark.parametrize("length", [32, 40, 64])
def test_ready_fingerprint(length: int) -> None:
    """A ready hexadecimal hash is accepted in either case and kept in lower case."""
    data = SessionData(session_id="s", fingerprint="AB" * (length // 2))
    assert data.fingerprint == "ab" * (length // 2)
    data.fingerprint = "Cd" * (length // 2)
    assert data.fingerprint == "cd" * (length // 2)


@pytest.mark.parametrize(
    "text", ["", "ab" * 15, "a" * 33, "g" * 32, "a" * 31 + "\n", "a" * 32 + "\n", " " * 32]
)
def test_wrong_fingerprint(text: str) -> None:
    """What is no hash of 32, 40 or 64 hexadecimal digits is refused."""
    with pytest.raises(ValidationError):
        SessionData(session_id="s", fingerprint=text)


def test_fingerprint() -> None:
    """A created fingerprint is the SHA-256 of `ip:user_agent` and knows its client from others."""
    data = SessionData(session_id="s")
    assert data.verify_fingerprint("anybody", "at all")
    made = data.create_fingerprint("10.0.0.1", "Mozilla/5.0")
    assert made == data.fingerprint == hashlib.sha256(b"10.0.0.1:Mozilla/5.0").hexdigest()
    assert data.verify_fingerprint("10.0.0.1", "Mozilla/5.0")
    assert not data.verify_fingerprint("10.0.0.2", "Mozilla/5.0")
    assert not data.verify_fingerprint("10.0.0.1", "curl")


def test_fingerprint_of_a_lone_surrogate() -> None:
    """A header that is no Unicode is a client like any other."""
    data = SessionData(session_id="s")
    data.create_fingerprint("10.0.0.1", "\ud800")
    assert data.verify_fingerprint("10.0.0.1", "\ud800")
    assert not data.verify_fingerprint("10.0.0.1", "\ud801")


# -- metadata -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"cart": [0, 1, 2, {3}]}, r"metadata\.cart\[3\] is of type set"),
        ({"a": {"b c": float("nan")}}, r"metadata\.a\['b c'\] is nan"),
        ({"a": float("-inf")}, r"metadata\.a is -inf"),
        ({"a": {1: 2}}, r"metadata\.a has a key of type int"),
        ({"a": "\ud800"}, r"metadata\.a contains a lone surrogate"),
        ({"\udfff": 1}, r"metadata\['\\udfff'\] contains a lone surrogate"),
        ({"a": b"b"}, r"metadata\.a is of type bytes"),
        ({"a": NOON}, r"metadata\.a is of type datetime"),
        ({"a": 10**4300}, r"metadata\.a is an integer of more than 4300 digits"),
        ({"a": "x" * 1_000_000}, r"metadata takes 1000008 bytes"),
    ],
)
def test_metadata_that_json_lacks(value: dict[str, Any], message: str) -> None:
    """Metadata that would not read back is refused with the path of the value."""
    with pytest.raises(ValidationError, match=message):
        SessionData(session_id="s", metadata=value)
    data = SessionData(session_id="s")
    with pytest.raises(ValidationError, match=message):
        data.metadata = value
    assert data.metadata == {}


def test_metadata_depth() -> None:
    """A hundred levels are accepted, one more and a dict that contains itself are not."""
    deep: Any = {}
    for _ in range(99):
        deep = {"a": deep}
    assert SessionData(session_id="s", metadata=deep).metadata == deep
    circle: dict[str, Any] = {}
    circle["a"] = [circle]
    for wrong in ({"a": deep}, circle):
        with pytest.raises(ValidationError, match="nested deeper than 100 levels"):
            SessionData(session_id="s", metadata=wrong)


def test_metadata_size() -> None:
    """A million bytes are accepted; from JSON too, where one more is an error as well."""
    full = {"a": "x" * (1_000_000 - 8)}
    data = SessionData(session_id="s", metadata=full)
    assert SessionData.from_json(data.to_json()) == data
    data.metadata["a"] += "x"
    with pytest.raises(ValueError, match="metadata takes 1000001 bytes"):
        SessionData.from_json(data.to_json())


def test_metadata_from_json_is_checked() -> None:
    """What JSON parsers accept beyond JSON is refused."""
    with pytest.raises(ValueError, match=r"metadata\.a is nan"):
        SessionData.from_json('{"session_id":"s","metadata":{"a":NaN}}')


def test_metadata_is_a_copy() -> None:
    """The record's metadata shares nothing with what was given; tuples are lists, subclasses plain."""
    inner = OrderedDict(b=1)
    given_value = {"a": (inner, [2])}
    data = SessionData(session_id="s", metadata=given_value)
    assert data.metadata == {"a": [{"b": 1}, [2]]}
    assert type(data.metadata["a"][0]) is dict
    data.metadata["a"][0]["b"] = 3
    assert given_value == {"a": (OrderedDict(b=1), [2])}


# -- to and from dicts and JSON -----------------------------------------------------------------------


def test_to_dict() -> None:
    """A dict of the record holds what JSON has, times as ISO strings."""
    data = ShopSession(session_id="s", created_at=NOON, cart=["a"], metadata={"b": [None]})
    as_dict = data.to_dict()
    assert as_dict["created_at"] == "2024-05-01T12:00:00Z"
    assert json.loads(json.dumps(as_dict)) == as_dict
    assert ShopSession.from_dict(as_dict) == data


SECRET_ID, SECRET_CLIENT = "5e55" * 8, "f1ce" * 16


class Wrapped(ShopSession):
    """A model that changes how it is written, with fields that refer to itself and to others."""

    model_config = ConfigDict(alias_generator=to_camel)

    amount: Decimal = Decimal("1.50")
    previous: Wrapped | None = None
    page: Page | None = None

    @model_validator(mode="before")
    @classmethod
    def _pass(cls, values: Any) -> Any:
        return values

    @field_serializer("amount")
    def _in_cents(self, amount: Decimal) -> str:
        return f"{amount:.2f}"

    @model_serializer(mode="wrap")
    def _as_it_is(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        written: dict[str, Any] = handler(self)
        return written


class Page(BaseModel):
    """What an app answers with."""

    shop: ShopSession
    more: list[SessionData] = []
    anything: Any = None


Wrapped.model_rebuild()


def secretive(model: type[SessionData] = ShopSession, **fields: Any) -> SessionData:
    return model(session_id=SECRET_ID, fingerprint=SECRET_CLIENT, user_id="ada", **fields)


@pytest.mark.parametrize("model", [SessionData, ShopSession, Camel, Counted, Wrapped])
def test_what_is_sent_tells_neither_id_nor_fingerprint(model: type[SessionData]) -> None:
    """Whatever a framework makes of a record, in another model or a list too; what is stored has both."""
    data = secretive(model)
    page = Page(shop=secretive(), more=[data], anything={"deep": [data]})  # type: ignore[arg-type]  # it is one
    for sent in (
        data.model_dump_json(),
        data.model_dump_json(by_alias=True),
        json.dumps(data.model_dump(mode="json")),
        str(data.model_dump()),
        page.model_dump_json(),
        str(page.model_dump()),
        TypeAdapter[Any](list[model]).dump_json([data]).decode(),  # type: ignore[valid-type]  # at run time
        to_json({"data": data}).decode(),
        RootModel[model](data).model_dump_json(),  # type: ignore[valid-type]
    ):
        assert "ada" in sent
        assert SECRET_ID not in sent
        assert SECRET_CLIENT not in sent
        assert "fingerprint" not in sent
    for stored in (encode_checked(data).decode(), data.to_json(), json.dumps(data.to_dict())):
        assert SECRET_ID in stored
        assert SECRET_CLIENT in stored
    assert model.from_json(data.to_json()) == data == model.from_dict(data.to_dict())
    schema = model.model_json_schema(mode="serialization")
    assert {"session_id", "fingerprint"}.isdisjoint(schema.get("properties", {}))


def test_fields_of_ones_own_are_sent_as_ever() -> None:
    """A field with `exclude=True` is neither sent nor stored, one with a serialiser is written by it."""

    class Own(SessionData):
        note: str = Field(default="", exclude=True)
        amount: Decimal = Decimal(1)

        @field_serializer("amount")
        def _written(self, amount: Decimal) -> str:
            return f"{amount:.2f}"

    data = Own(session_id="s", note="private", amount=Decimal(2))
    for written in (data.to_dict(), json.loads(data.to_json()), data.model_dump()):
        assert "note" not in written
        assert written["amount"] == "2.00"


def test_a_model_that_was_rebuilt_is_written_anew() -> None:
    """How records are written follows the model."""

    class Late(SessionData):
        item: Undefined | None = None  # type: ignore[name-defined]  # noqa: F821  # the point

    with pytest.raises(PydanticUserError):
        Late(session_id="s")
    Late.model_rebuild(_types_namespace={"Undefined": int})
    assert json.loads(encode_checked(Late(session_id="s", item=1)))["item"] == 1
    Late.model_fields["item"].exclude = True
    Late.model_rebuild(force=True, _types_namespace={"Undefined": int})
    assert "item" not in json.loads(encode_checked(Late(session_id="s", item=1)))


@pytest.mark.parametrize("model", [SessionData, ShopSession, Camel])
def test_a_records_repr_tells_no_secret(model: type[SessionData]) -> None:
    """Crash reporters print locals: no id, no fingerprint, and of the values only how many there are."""
    data = secretive(model, metadata={"card": "4000-1234", "pin": 9999})
    data.__pydantic_extra__["of_a_newer_release"] = "4000-1234"  # type: ignore[index]  # extras are allowed
    for shown in (repr(data), str(data), f"{data}", repr([data]), repr({"data": data}), pformat(data)):
        for secret in (SECRET_ID, SECRET_CLIENT, "4000-1234", "9999", "card"):
            assert secret not in shown
        assert "metadata=<2 keys>" in shown
        assert "user_id='ada'" in shown


def test_a_repr_does_not_count_as_access() -> None:
    """A crash reporter that looks at a record leaves its session alone."""
    data, handle = live_record({"a": 1})
    repr(data)
    assert (data.metadata, handle.announced) == ({"a": 1}, 0)


def test_computed_fields_stay_out() -> None:
    """A computed field is not written, so it does not come back as a value of its own."""
    data = Counted(session_id="s", message_count=2)
    again = Counted.from_json(data.to_json())
    assert "doubled" not in data.to_dict()
    assert (again, again.doubled, again.model_extra) == (data, 4, {})


@pytest.mark.parametrize("bad", ["yesterday", "", [], 1e300, {}])
def test_from_dict_with_a_bad_time(bad: Any) -> None:
    """A time that cannot be read becomes now with one warning, and the input keeps it."""
    values = {"session_id": "s", "created_at": NOON, "updated_at": bad, "last_activity": bad}
    before = datetime.now(UTC)
    with pytest.warns(UserWarning, match=r"no date and time: updated_at, last_activity$") as caught:
        data = SessionData.from_dict(values)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert data.created_at == NOON
    assert before <= data.updated_at <= data.last_activity <= datetime.now(UTC)
    assert values == {"session_id": "s", "created_at": NOON, "updated_at": bad, "last_activity": bad}


def test_from_dict_with_a_bad_creation() -> None:
    """A creation that cannot be read is now, and an older change is then now as well."""
    with pytest.warns(UserWarning, match="created_at"):
        data = SessionData.from_dict({"session_id": "s", "created_at": "?", "updated_at": NOON})
    assert data.updated_at >= data.created_at > NOON


def test_from_dict_is_strict_otherwise() -> None:
    """Other wrong values are errors."""
    with pytest.raises(ValidationError):
        SessionData.from_dict({"session_id": "s", "message_count": -1})


@given(METADATA, st.none() | MOMENTS | st.text(max_size=5))
@settings(deadline=None)
@pytest.mark.filterwarnings("ignore:read as now")
def test_from_dict_leaves_its_input(metadata: dict[str, Any], moment: Any) -> None:
    """Whatever is in it, a dict that a record is made from is the same after it."""
    values = {"session_id": "s", "metadata": metadata, "last_activity": moment, "extra": [metadata]}
    before = copy.deepcopy(values)
    data = SessionData.from_dict(values)
    data.metadata["changed"] = True
    assert values == before


@given(
    st.builds(
        SessionData,
        session_id=IDS,
        user_id=st.none() | IDS,
        message_count=st.integers(0, 100_000),
        escalated=st.booleans(),
        metadata=METADATA,
        created_at=MOMENTS,
        last_activity=MOMENTS,
        fingerprint=st.none() | st.from_regex(r"\A[0-9a-fA-F]{64}\Z"),
    )
)
@settings(deadline=None)
def test_json_round_trip(data: SessionData) -> None:
    """Any record comes back equal from its JSON and from its dict."""
    assert SessionData.from_json(data.to_json()) == data
    assert SessionData.from_json(data.to_json().encode()) == data
    assert SessionData.from_dict(data.to_dict()) == data


# -- the live dict ------------------------------------------------------------------------------------


def test_assignment_is_announced() -> None:
    """Every assignment to a field, and each method that changes one, is announced to the live dict."""
    data, handle = live_record()
    data.user_id = "bob"
    data.increment_message_count()
    data.update_activity()
    data.create_fingerprint("10.0.0.1", "curl")
    assert handle.announced == 4
    assert data.metadata is handle


def test_a_live_dict_may_refuse() -> None:
    """Where the live dict raises, nothing is assigned."""
    data, _ = live_record({"a": 1}, closed=True)
    before = data.to_dict()
    for change in (
        lambda: setattr(data, "user_id", "bob"),
        lambda: setattr(data, "metadata", {}),
        data.increment_message_count,
        data.update_activity,
    ):
        with pytest.raises(PermissionError):
            change()
    assert data.to_dict() == before


def test_assigning_metadata_fills_the_live_dict() -> None:
    """Assigned metadata replaces the content of the live dict, which stays the record's."""
    data, handle = live_record({"a": 1})
    data.metadata = {"b": (2,)}
    assert data.metadata is handle
    assert handle == {"b": [2]}
    data.metadata = handle
    assert handle == {"b": [2]}
    data.metadata |= {"c": 3}
    assert data.metadata is handle
    assert handle == {"b": [2], "c": 3}


def test_the_id_in_a_handle_is_read_only() -> None:
    """Stored under one id and saying another, a record could not be read any more; a free one may."""
    data, handle = live_record({"a": 1})
    with pytest.raises(ValueError, match=r"regenerate_id\(\)"):
        data.session_id = "x"
    data.session_id = "s"
    assert (data.session_id, handle) == ("s", {"a": 1})
    free = SessionData(session_id="s")
    free.session_id = "x"
    assert free.session_id == "x"


def test_refused_metadata_leaves_the_live_dict() -> None:
    """Metadata that is refused leaves the live dict and its content."""
    data, handle = live_record({"a": 1})
    with pytest.raises(ValidationError):
        data.metadata = {"b": object()}
    assert data.metadata is handle
    assert handle == {"a": 1}


@pytest.mark.parametrize(
    "copied",
    [
        lambda data: data.model_copy(),
        lambda data: data.model_copy(deep=True),
        copy.copy,
        copy.deepcopy,
        lambda data: pickle.loads(pickle.dumps(data)),
        lambda data: data.model_copy(update={"user_id": "bob"}),
    ],
)
def test_copies_are_not_live(copied: Any) -> None:
    """A copy of a live record is a record with a plain dict: changing it does not touch the session."""
    data, handle = live_record({"a": [1]})
    other = copied(data)
    assert type(other.metadata) is dict
    assert other.metadata == {"a": [1]}
    other.metadata = {}
    assert handle == {"a": [1]}
    assert handle.announced == 0


def test_deep_copies_share_nothing() -> None:
    """A deep copy shares no inner value, and a live dict that contains itself can be copied."""
    data, handle = live_record({"a": [1]})
    handle["self"] = handle
    other = data.model_copy(deep=True).metadata
    other["a"].append(2)
    assert handle["a"] == [1]
    assert other["self"] is other


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda live: pickle.loads(pickle.dumps(live))])
def test_copies_of_a_live_dict(copied: Any) -> None:
    """A copy or a pickle of the live dict itself is a plain dict."""
    plain = copied(TrackedDict(a=1))
    assert type(plain) is dict
    assert plain == {"a": 1}


# -- filters and metrics ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("criteria", "expected"),
    [
        ({}, True),
        ({"user_id": "bob"}, True),
        ({"user_id": "eve"}, False),
        ({"escalated": True}, True),
        ({"escalated": False}, False),
        ({"created_after": NOON}, True),
        ({"created_after": NOON + HOUR}, False),
        ({"created_before": NOON}, True),
        ({"created_before": NOON - HOUR}, False),
        ({"created_after": NOON.replace(tzinfo=None), "created_before": NOON.replace(tzinfo=None)}, True),
        ({"created_after": NOON.replace(tzinfo=PLUS_TWO)}, True),
        ({"min_messages": 3}, True),
        ({"min_messages": 4}, False),
        ({"max_messages": 3}, True),
        ({"max_messages": 2}, False),
        ({"max_messages": 0}, False),
        ({"min_messages": 0, "max_messages": 3, "user_id": "bob"}, True),
        ({"min_messages": 3, "max_messages": 3, "user_id": "eve"}, False),
    ],
)
def test_filter(criteria: dict[str, Any], expected: bool) -> None:
    """A record matches when it meets every criterion given, bounds included."""
    data = SessionData(session_id="s", user_id="bob", escalated=True, created_at=NOON, message_count=3)
    assert SessionFilter(**criteria).matches(data) is expected


def test_filter_without_a_user() -> None:
    """A record without a user matches no filter that names one."""
    assert not SessionFilter(user_id="bob").matches(SessionData(session_id="s"))


@pytest.mark.parametrize(
    "criteria",
    [
        {"created_after": NOON, "created_before": NOON - HOUR},
        {"min_messages": 4, "max_messages": 3},
        {"min_messages": 1, "max_messages": 0},
        {"min_messages": -1},
        {"usr_id": "bob"},
        {"created_after": "soon"},
    ],
)
def test_wrong_filters(criteria: dict[str, Any]) -> None:
    """Bounds that cross and criteria that do not exist are errors."""
    with pytest.raises(ValidationError):
        SessionFilter(**criteria)


def test_metrics() -> None:
    """Metrics of nothing are zeros."""
    expected = {"total_messages": 0, "avg_response_time": 0.0, "escalation_rate": 0.0, "active_sessions": 0}
    assert SessionMetrics().model_dump() == expected
    assert SessionMetrics(escalation_rate=1).escalation_rate == 1.0


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("total_messages", -1),
        ("avg_response_time", -0.1),
        ("avg_response_time", float("nan")),
        ("escalation_rate", 1.01),
        ("escalation_rate", -0.01),
        ("active_sessions", -1),
    ],
)
def test_wrong_metrics(field: str, value: float) -> None:
    """Figures that cannot be are refused."""
    with pytest.raises(ValidationError):
        SessionMetrics.model_validate({field: value})


@pytest.mark.parametrize("model", [SessionData, ShopSession, SessionFilter, SessionMetrics])
@pytest.mark.parametrize("mode", ["validation", "serialization"])
def test_json_schema(model: type[BaseModel], mode: Any) -> None:
    """Every model has a JSON schema, so an API may show it; what is written is never null."""
    schema = model.model_json_schema(mode=mode)
    assert schema["type"] == "object"
    if "created_at" in schema["properties"] and mode == "serialization":
        assert schema["properties"]["created_at"]["format"] == "date-time"
