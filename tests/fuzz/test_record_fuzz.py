"""Values of every kind: each is refused by its path or comes back equal, typed or not."""

from __future__ import annotations

import copy
import enum
import json
import math
import re
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, TypeAlias

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from pydantic import ValidationError

from asgi_sessions import Session, SessionData
from asgi_sessions.errors import SessionDataError
from asgi_sessions.record.codec import codec_of, decode, encode, encode_checked
from asgi_sessions.record.json import MAX_DEPTH
from asgi_sessions.session.changes import Change
from fuzz import effort

Path: TypeAlias = tuple["str | int", ...]

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
awkward_texts = st.sampled_from(
    [
        "",
        "\x00",
        "\u2028",
        "</script>",
        '"',
        "\\",
        "\\ud800",
        ',"created_at":"',
        "}",
        "😀",
        "\ufeff",
        "__proto__",
    ]
)
keys = texts | awkward_texts | st.sampled_from(["a", "b", "session_id", "metadata"])
leaves = (
    st.none()
    | st.booleans()
    | st.integers(-3, 3)
    | st.integers()
    | st.sampled_from([10**4299, -(10**4298), 2**63, -(2**63), 2**64, 10**400])
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from([0.0, -0.0, 1.0, 1e16, 5e-324, 1.7976931348623157e308, 0.1 + 0.2])
    | texts
    | awkward_texts
)
json_values = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=4),
    max_leaves=16,
)
json_dicts = st.dictionaries(keys, json_values, max_size=5)


class Level(enum.IntEnum):
    """An int that says more than it is."""

    HIGH = 3


class Name(str):
    """A str with a life of its own."""

    def __str__(self) -> str:
        return "another"


def same(one: object, other: object) -> bool:
    """Whether two values are the same JSON: 1, 1.0 and True are three things, and 0.0 is not -0.0."""
    if isinstance(one, dict) and isinstance(other, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    if type(one) is not type(other) or one != other:
        return False
    return not isinstance(one, float) or math.copysign(1, one) == math.copysign(1, float(str(other)))


def record_of(metadata: dict[Any, Any], **fields: Any) -> SessionData:
    """A record that holds these values, unchecked, as one whose metadata was changed inside does."""
    data = SessionData(session_id="0" * 32, **fields)
    vars(data)["metadata"] = metadata
    return data


# --- what JSON has comes back ----------------------------------------------------------------------


@effort(60)
@given(json_dicts)
def test_json_comes_back_as_it_was(values: dict[str, Any]) -> None:
    """Types, order of keys and the sign of zero included, however the record was filled."""
    for data in (record_of(values), SessionData(session_id="0" * 32, metadata=values)):
        back = decode(SessionData, encode_checked(data))
        assert back == data
        assert same(back.metadata, values)
        assert encode(back) == encode(data)
        assert same(SessionData.from_json(data.to_json()).metadata, values)
        assert same(SessionData.from_dict(data.to_dict()).metadata, values)


# --- what it has not is refused, by its path -------------------------------------------------------


class Opaque:
    """No JSON at all."""


def _cycle(kind: type[Any]) -> Any:
    node = kind()
    if isinstance(node, dict):
        node["again"] = node
    else:
        node.append(node)
    return node


def _nested(levels: int, kind: type[Any]) -> Any:
    value: Any = kind()
    for _ in range(levels - 1):
        value = {"k": value} if kind is dict else [value]
    return value


REFUSED: dict[str, Callable[[], Any]] = {
    "nan": lambda: math.nan,
    "infinity": lambda: math.inf,
    "minus infinity": lambda: -math.inf,
    "lone surrogate": lambda: "a\ud800",
    "set": lambda: {1},
    "bytes": lambda: b"x",
    "object": Opaque,
    "type": lambda: int,
    "decimal": lambda: Decimal("1.5"),
    "complex": lambda: 1j,
    "generator": lambda: (each for each in "x"),
    "too many digits": lambda: 10**4300,
    "too many digits below zero": lambda: -(10**4300),
    "key 1": lambda: {1: 1},
    "key none": lambda: {None: 1},
    "key true": lambda: {True: 1},
    "key tuple": lambda: {(1,): 1},
    "key surrogate": lambda: {"\udfff": 1},
    "keys that collide": lambda: {"1": "a", 1: "b"},
}
places = st.lists(keys | st.integers(0, 2), max_size=5).map(tuple)


def placed(value: object, path: Path, beside: list[Any]) -> Any:
    """`value` at the end of `path`, with JSON to its sides."""
    for step in reversed(path):
        if isinstance(step, str):
            value = {**{f"n{n}": each for n, each in enumerate(beside)}, step: value}
        else:
            value = [*([0] * step), value, *beside]
    return value


def spelled(path: Path) -> str:
    """As errors name it."""
    steps = [f".{s}" if isinstance(s, str) and s.isidentifier() else f"[{s!a}]" for s in path]
    return "metadata" + "".join(steps)


@pytest.mark.parametrize("kind", REFUSED)
@effort(5)
@given(place=places, beside=st.lists(json_values, max_size=2))
def test_what_json_lacks_is_refused_by_its_path(kind: str, place: Path, beside: list[Any]) -> None:
    """Wherever it stands, among whatever: the error names it, and so does the typed record of a handle."""
    path = ("top", *place)
    values = placed(REFUSED[kind](), path, beside)
    with pytest.raises(SessionDataError) as refused:
        encode_checked(record_of(values))
    assert refused.value.path in (spelled(path), spelled((*path, "\udfff")))
    session = loaded({})
    session.update(values)
    with pytest.raises(SessionDataError) as again:
        session.seal()
    assert again.value.path == refused.value.path
    if "digits" not in kind and "key" not in kind:  # assigned as a whole it is refused where it happens
        with pytest.raises(ValueError, match="metadata"):
            session.data.metadata = values


@pytest.mark.parametrize("kind", [dict, list])
@effort(6)
@given(place=places)
def test_what_contains_itself_is_refused(kind: type[Any], place: Path) -> None:
    """A cycle ends at the depth that is allowed, and nothing recurses without end."""
    session = loaded({"kept": 1})
    session["top"] = placed(_cycle(kind), place, [])
    for attempt in (session.seal, lambda: encode_checked(session.data), session.savepoint().__enter__):
        with pytest.raises(SessionDataError, match=r"nested deeper|contains itself"):
            attempt()
    assert session.change() is Change.WRITE


@effort(25)
@given(st.integers(MAX_DEPTH - 3, 3 * MAX_DEPTH), st.sampled_from([dict, list]), st.booleans())
def test_depth_has_an_exact_end(levels: int, kind: type[Any], typed: bool) -> None:
    """`MAX_DEPTH` levels come back, one more is refused, on both ways alike."""
    session = loaded({}, typed=typed)
    session["top"] = _nested(levels - 1, kind)  # the metadata is the first level
    if levels <= MAX_DEPTH:
        assert decode(SessionData, session.seal()).metadata == dict(session)
    else:
        with pytest.raises(SessionDataError, match="nested deeper"):
            session.seal()


# --- everything mixed: refused or equal ------------------------------------------------------------


@dataclass(frozen=True)
class Refused:
    """Stands for one of `REFUSED`, some of which cannot be printed."""

    kind: str


def resolved(value: Any) -> Any:
    """The value with each `Refused` replaced by what it stands for; nothing in it is shared."""
    if isinstance(value, Refused):
        return REFUSED[value.kind]()
    if isinstance(value, dict):
        return type(value)((key, resolved(each)) for key, each in value.items())
    return type(value)(map(resolved, value)) if isinstance(value, (list, tuple)) else value


hostile = st.recursive(
    leaves
    | st.floats()
    | st.text(max_size=3)
    | st.sampled_from(sorted(REFUSED)).map(Refused)
    | st.sampled_from([Level.HIGH, Name("mine"), OrderedDict(b=1, a=2), (1, (2,))]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(keys | st.integers(0, 2) | st.none(), inner, max_size=3)
    ),
    max_leaves=8,
)


def as_json(value: Any) -> Any:
    """What JSON makes of the kinds that it takes: plain text and numbers, tuples as lists."""
    if isinstance(value, bool) or value is None:
        return value
    for kind in (int, float):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, dict):
        return {as_json(key): as_json(each) for key, each in value.items()}
    return [as_json(each) for each in value]


def sealed_or_path(session: Session) -> bytes | str:
    """The record as it is to be stored, or the path of the value that is refused."""
    try:
        return session.seal()
    except SessionDataError as refused:
        return refused.path


@effort(100)
@given(st.dictionaries(keys, hostile, max_size=3), st.booleans())
def test_a_value_is_refused_or_comes_back(values: dict[str, Any], typed: bool) -> None:
    """There is no third way: what is stored is equal to what was put in, type by type."""
    session, values = loaded({}, typed=typed), resolved(values)
    session.update(values)
    record = sealed_or_path(session)
    if isinstance(record, str):
        assert record.startswith("metadata")
        return
    assert same(decode(SessionData, record).metadata, as_json(values))


# --- what is read by its lines is what the model reads ---

identifiers = st.none() | st.sampled_from(
    ["ada", "dropbox-17", "ünï", "x" * 255, "a@b.c", "undeleted", "-x-"]
)
record_fields = st.fixed_dictionaries(
    {},
    optional={
        "user_id": identifiers,
        "thread_id": identifiers,
        "request_id": identifiers,
        "message_count": st.integers(0, 100_000),
        "escalated": st.booleans(),
        "fingerprint": st.none() | st.sampled_from([32, 40, 64]).map("a".__mul__),
        "created_at": st.datetimes(),
    },
)
_TIMES = re.compile(rb'"(created_at|updated_at|last_activity)":"[^"]*"')


def loaded(values: dict[str, Any], *, typed: bool = False, record: bytes | None = None) -> Session:
    """A handle that has just loaded a record; `typed`: somebody looked at `data` already."""
    session = Session()
    session.load(record or encode(SessionData(session_id="0" * 32, metadata=values)))
    if typed:
        assert session.data.session_id
    return session


def without_times(record: bytes) -> bytes:
    return _TIMES.sub(b"", record)


def is_read_by_lines(record: bytes) -> bool:
    """Whether a handle that is used as a dict does without the model."""
    return codec_of(SessionData).lines_of(record) is not None


@effort(40)
@given(json_dicts, record_fields)
def test_our_own_records_are_read_by_their_lines(values: dict[str, Any], fields: dict[str, Any]) -> None:
    """This gives what the model gives."""
    record = encode_checked(record_of(values, **fields))
    assert is_read_by_lines(record)
    _agrees(record)


def outcome_of(session: Session) -> object:
    """What storing this handle comes to: the record without its times, or the path that is refused."""
    change, record = session.change(), sealed_or_path(session)
    return change, record if isinstance(record, str) else without_times(record)


@effort(100)
@given(json_dicts, st.dictionaries(keys, hostile, max_size=3), record_fields, st.data())
def test_both_ways_store_the_same(
    values: dict[str, Any], new: dict[str, Any], fields: dict[str, Any], data: st.DataObject
) -> None:
    """A handle that is used as a dict and one whose record was looked at: one decision, one record."""
    record = encode_checked(record_of(values, **fields))
    gone = data.draw(st.lists(st.sampled_from(list(values)), unique=True) if values else st.just([]))
    outcomes = []
    for typed in (False, True):
        session = loaded({}, typed=typed, record=record)
        for key in gone:
            del session[key]
        session.update(resolved(new))
        outcomes.append(outcome_of(session))
    assert outcomes[0] == outcomes[1]


@effort(60)
@given(json_dicts, st.data())
def test_a_changed_value_is_seen_and_an_unchanged_one_is_not(
    values: dict[str, Any], data: st.DataObject
) -> None:
    """`is_changed` says whether the JSON differs, on both ways."""
    new = data.draw(st.just(copy.deepcopy(values)) | json_dicts)
    differs = json.dumps(new) != json.dumps(values)
    for typed in (False, True):
        session = loaded(values, typed=typed)
        dict.clear(session)
        dict.update(session, new)
        session.accessed = True
        assert (session.change() is Change.WRITE) is differs


@effort(50)
@given(json_dicts, record_fields, st.data())
def test_records_of_another_hand(values: dict[str, Any], fields: dict[str, Any], data: st.DataObject) -> None:
    """Spaces, escapes, another order or more fields: the model reads it, or it is read alike."""
    parts = list(json.loads(encode_checked(record_of(values, **fields))).items())
    if data.draw(st.booleans()):
        parts = data.draw(st.permutations(parts))
    if data.draw(st.booleans()):
        parts.insert(data.draw(st.integers(0, len(parts))), ("newer", data.draw(json_values)))
    separators = data.draw(st.sampled_from([None, (",", ":"), (", ", ":")]))
    text = json.dumps(dict(parts), separators=separators, ensure_ascii=data.draw(st.booleans()))
    _agrees(text.encode())


@effort(100)
@given(json_dicts, record_fields, st.data())
def test_damaged_records(values: dict[str, Any], fields: dict[str, Any], data: st.DataObject) -> None:
    """A record with bytes lost, doubled or replaced is refused by both, or read alike."""
    record = encode_checked(record_of(values, **fields))
    start = data.draw(st.integers(0, len(record)))
    end = data.draw(st.integers(start, min(start + 8, len(record))))
    junk = st.binary(max_size=3) | st.sampled_from(
        [b" ", b'"', b"\\", b"1", b"Z", b"}", b",", b"\x00", b"null"]
    )
    damaged = record[:start] + data.draw(junk | st.just(record[start:end] * 2)) + record[end:]
    assume(damaged != record)
    _agrees(damaged)


def _agrees(record: bytes) -> None:
    """What is read by its lines the model reads alike, and the same is written from it."""
    if not is_read_by_lines(record):
        return
    session, typed = Session(), _decoded(record)
    if typed is None:
        with pytest.raises(ValueError, match="validation error"):
            session.load(record)
        return
    session.load(record)
    who = session.identity()
    assert (who.session_id, who.user_id) == (typed.session_id, typed.user_id)
    assert who.fingerprint == typed.fingerprint
    assert same(dict(session), typed.metadata)
    sealed = sealed_or_path(session)
    if isinstance(sealed, bytes):
        back = decode(SessionData, sealed)
        assert back.created_at == typed.created_at
        assert without_times(encode(back)) == without_times(encode(typed))


def _decoded(record: bytes) -> SessionData | None:
    try:
        return decode(SessionData, record)
    except ValidationError:
        return None


# --- what was found by the above -------------------------------------------------------------------

_OURS = encode(SessionData(session_id="0" * 32, user_id="ada", metadata={"pair": [1, 2]}))


@pytest.mark.parametrize("typed", [False, True])
@pytest.mark.parametrize("value", [math.inf, -math.inf, [math.inf], {"deep": (-math.inf,)}])
def test_infinity_is_refused_whether_the_record_was_looked_at_or_not(value: object, typed: bool) -> None:
    """The parser would read it back, but it is no JSON, and the model would refuse the record ever after."""
    session = loaded({}, typed=typed)
    session["limit"] = value
    with pytest.raises(SessionDataError, match="which JSON does not have"):
        session.seal()


@pytest.mark.parametrize("typed", [False, True])
def test_a_tuple_in_place_of_its_list_is_no_change(typed: bool) -> None:
    """The JSON is the same, so nothing is written; the record is what was stored."""
    session = loaded({}, typed=typed, record=_OURS)
    session["pair"] = (1, 2)
    assert session.change() is Change.NOTHING
    session["pair"] = (1, 3)
    assert session.change() is Change.WRITE


@pytest.mark.parametrize(
    ("part", "damaged"),
    [
        (b'"0000', b'"\x0000'),
        (b'"ada"', b'"ada "'),
        (b'"ada"', b'"drop x"'),
        (b'"ada"', b'"--a"'),
        (b'"ada"', b'"a\'"'),
        (b'"thread_id":null', b'"thread_id":"drop"'),
        (b'"thread_id":null', b'"thread_id":"Delete-x"'),
        (b'"thread_id":null', b'"thread_id":"a--a"'),
        (b'"ada"', b'"a\xffa"'),
        (b'"message_count":0', b'"message_count":00'),
        (b'"created_at":"2', b'"created_at":"yesterday 2'),
        (b'"last_activity":"2', b'"last_activity":"+2'),
        (b'"updated_at":"2', b'"updated_at":"1'),
        (b'"updated_at":"2', b'"updated_at":"2024-02-30T12:00:00Z","x":"'),
        (b'"fingerprint":null', b'"fingerprint":"' + b"z" * 40 + b'"'),
        (b'"fingerprint":null', b'"fingerprint":"' + b"a" * 33 + b'"'),
    ],
)
def test_no_record_that_the_model_refuses_is_read_by_its_lines(part: bytes, damaged: bytes) -> None:
    """A handle must not show what its typed record cannot be made of."""
    assert _OURS.count(part) == 1
    record = _OURS.replace(part, damaged)
    with pytest.raises(ValueError, match="validation error"):
        decode(SessionData, record)
    assert not is_read_by_lines(record)
