"""The record as bytes: releases that read each other's, and values that would not read back."""

from __future__ import annotations

import enum
import json
import math
from collections import OrderedDict
from collections.abc import Callable
from datetime import date, datetime, timezone
from decimal import Decimal
from functools import cached_property
from typing import Any, TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    SecretStr,
    SerializerFunctionWrapHandler,
    computed_field,
    field_serializer,
    field_validator,
    model_serializer,
    model_validator,
)

from asgi_sessions.errors import SessionDataError
from asgi_sessions.record.codec import decode, encode, encode_checked, id_of, user_of
from asgi_sessions.record.json import normalise
from asgi_sessions.record.model import SessionData
from asgi_sessions.session.tracking import TrackedDict

T = TypeVar("T")
NOON = datetime(2024, 5, 1, 12, tzinfo=timezone.utc)
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(10**400), 10**400)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXTS
)
JSON = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=20,
)
JUNK = st.recursive(
    LEAVES
    | st.floats()
    | st.text(max_size=3)
    | st.binary(max_size=3)
    | st.dates()
    | st.decimals()
    | st.uuids()
    | st.sampled_from([object(), SessionData, len, 1j, ..., range(3), "\ud800", OrderedDict(a=1)]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.sets(st.integers(), max_size=2)
        | st.frozensets(TEXTS, max_size=2)
        | st.dictionaries(TEXTS | st.integers() | st.none() | st.text(max_size=1), inner, max_size=3)
    ),
    max_leaves=12,
)


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Level(enum.IntEnum):
    LOW = 1


class Item(BaseModel):
    name: str
    price: Decimal = Decimal(0)
    _looked_up: bool = PrivateAttr(default=False)

    @cached_property
    def label(self) -> str:
        return f"{self.name}: {self.price}"


class Special(Item):
    gift: bool = True


class Shop(SessionData):
    """A model with fields of every usual kind, aliases among them."""

    cart: list[Item] = Field(default_factory=list, alias="shoppingCart")
    colour: Colour = Field(default=Colour.RED, alias="COLOUR", serialization_alias="color")
    since: datetime | None = None
    birthday: date | None = None
    rate: float = 0.0
    tags: set[str] = set()  # noqa: RUF012 - pydantic copies defaults, and users write them so
    stock: dict[str, tuple[Item, ...]] = {}  # noqa: RUF012 - as above
    note: str | None = Field(default=None, exclude=True)

    @cached_property
    def total(self) -> Decimal:
        return sum((item.price for item in self.cart), Decimal(0))


class OlderShop(SessionData):
    """The release before: no cart, a field since dropped."""

    rate: float = 0.0
    theme: str = "light"


class Secretive(SessionData):
    pin: SecretStr = SecretStr("")


class Computing(SessionData):
    @computed_field  # type: ignore[prop-decorator]  # mypy has no decorated properties
    @property
    def doubled(self) -> int:
        return self.message_count * 2


class NotesActivity(SessionData):
    @model_validator(mode="after")
    def note_it(self) -> NotesActivity:
        self.update_activity()
        return self


class Faulty(SessionData):
    thing: str = "a"

    @field_serializer("thing")
    def write_thing(self, value: str) -> str:
        if value == "unwritable":
            raise RuntimeError(value)
        return value

    @field_validator("thing")
    @classmethod
    def read_thing(cls, value: str) -> str:
        if value == "unreadable":
            raise RuntimeError(value)
        return value


class Adding(SessionData):
    @model_serializer(mode="wrap")
    def add_something(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = handler(self)
        return fields | {"added": 1}


class Whole(SessionData):
    low: int = 0
    high: int = 0

    @model_validator(mode="after")
    def in_order(self) -> Whole:
        if self.high < self.low:
            raise ValueError("high is below low")
        return self


def shop() -> Shop:
    return Shop(
        session_id="s",
        shoppingCart=[Item(name="tea", price=Decimal("1.50"))],
        COLOUR=Colour.BLUE,
        since=NOON,
        stock={"tea": (Item(name="green"), Item(name="black"))},
        birthday=NOON.date(),
        tags={"x"},
        metadata={"a": [1, None, "é", 1.5, {}]},
    )


def live(values: dict[str, Any]) -> SessionData:
    """A record whose metadata was filled after validation, as an app fills its session."""
    data = SessionData(session_id="s")
    vars(data)["metadata"] = TrackedDict(values)
    return data


def as_json_has_it(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: as_json_has_it(item) for key, item in value.items()}
    return [as_json_has_it(item) for item in value] if isinstance(value, (list, tuple)) else value


# -- reading and writing ----------------------------------------------------------------------------------


def test_a_rich_model_reads_back() -> None:
    """Nested models, enums, dates, decimals and sets come back equal, aliases or not."""
    data = shop()
    raw = encode_checked(data)
    assert raw == encode(data)
    again = decode(Shop, raw)
    assert again == data
    assert again.cart[0].price == Decimal("1.50")
    assert again.colour is Colour.BLUE


def test_records_use_names() -> None:
    """Aliases appear nowhere in a record, so changing one breaks no stored session."""
    fields = json.loads(encode(shop()))
    assert {"cart", "colour"} <= fields.keys()
    assert not {"shoppingCart", "COLOUR", "color"} & fields.keys()


def test_a_newer_release_reads_an_older_record() -> None:
    """Fields that the record lacks have their defaults."""
    record = encode_checked(OlderShop(session_id="s", user_id="bob", rate=2))
    newer = decode(Shop, record)
    assert (newer.user_id, newer.rate, newer.cart, newer.colour) == ("bob", 2.0, [], Colour.RED)


def test_an_older_release_keeps_what_is_new() -> None:
    """A record that passes through an older release and is changed there loses nothing."""
    data = shop()
    older = decode(OlderShop, encode_checked(data))
    older.user_id = "bob"
    older.metadata["b"] = 2
    again = decode(Shop, encode_checked(older))
    assert (again.cart, again.colour, again.since, again.tags) == (data.cart, data.colour, NOON, {"x"})
    assert (again.user_id, again.metadata["b"]) == ("bob", 2)


ONE_LINE = (
    b'{"session_id":"s","user_id":null,"thread_id":null,"request_id":null,"message_count":0,'
    b'"escalated":false,"metadata":{"a":[1,2.5,"\xc3\xa9"]},"created_at":"2024-05-01T12:00:00Z",'
    b'"updated_at":"2024-05-01T12:00:00.000001Z","last_activity":"2024-05-01T12:00:00Z",'
    b'"fingerprint":null}'
)
FOUR_LINES = (
    b'{"session_id":"s","user_id":null,"created_at":"2024-05-01T12:00:00Z","fingerprint":null,\n'
    b'"updated_at":"2024-05-01T12:00:00.000001Z","last_activity":"2024-05-01T12:00:00Z",\n'
    b'"thread_id":null,"request_id":null,"message_count":0,"escalated":false,\n'
    b'"metadata":{"a":[1,2.5,"\xc3\xa9"]}}'
)


@pytest.mark.parametrize("raw", [ONE_LINE, FOUR_LINES])
def test_a_record_of_each_release(raw: bytes) -> None:
    """The written form is settled: what a release writes, later ones have to read."""
    data = decode(SessionData, raw)
    assert data.updated_at == NOON.replace(microsecond=1)
    assert encode(data) == encode_checked(data) == FOUR_LINES
    assert data.to_json().encode() == ONE_LINE[:-1] + b',"client":null}'


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"null",
        b"[]",
        b"{}",
        b"\xff",
        b'{"session_id":"a b"}',
        b'{"session_id":"s","created_at":"soon"}',
        b'{"session_id":"s","metadata":[]}',
        b'{"session_id":"s","metadata":{"a":"\\ud800"}}',
        b'{"session_id":"s","metadata":' + b'{"a":' * 300 + b"1" + b"}" * 301,
        b'{"session_id":"s"',
    ],
)
def test_no_record(raw: bytes) -> None:
    """What is no record is a `ValueError`."""
    with pytest.raises(ValueError, match=r"validation error"):
        decode(SessionData, raw)


# -- what may differ --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "reads"),
    [
        ((1, (2,)), [1, [2]]),
        (OrderedDict(b=1, a=2), {"b": 1, "a": 2}),
        (Level.LOW, 1),
        ({"": "\x00\u2028"}, {"": "\x00\u2028"}),
        (["Infinity", "NaN"], ["Infinity", "NaN"]),
        (-0.0, -0.0),
        (10**4300 - 1, 10**4300 - 1),
        (1 - 10**4299, 1 - 10**4299),
        (5e-324, 5e-324),
        (1.7976931348623157e308, 1.7976931348623157e308),
    ],
)
def test_what_json_can_hold(value: Any, reads: Any) -> None:
    """What an app put into its session comes back, tuples as lists and subclasses plain."""
    record = encode_checked(live({"a": value}))
    assert decode(SessionData, record).metadata == {"a": reads}
    assert SessionData(session_id="s", metadata={"a": value}).metadata == {"a": reads}


def test_a_live_dict_is_not_disturbed() -> None:
    """Writing a record calls none of the live dict's own methods: they may note that somebody looked."""

    values = TrackedDict({"a": (1,)})
    values.accessed = False
    data = SessionData(session_id="s")
    vars(data)["metadata"] = values
    assert decode(SessionData, encode_checked(data)).metadata == {"a": [1]}
    dict.update(data.metadata, b={1})
    with pytest.raises(SessionDataError, match=r"metadata\.b is of type set"):
        encode_checked(data)
    assert not values.accessed


def test_what_a_model_keeps_to_itself() -> None:
    """Excluded fields, private attributes and cached properties may be lost: they are not of the record."""
    data = shop()
    data.note = "for this request"
    data.cart[0]._looked_up = data.stock["tea"][1]._looked_up = True
    assert (data.total, data.cart[0].label) == (Decimal("1.50"), "tea: 1.50")
    again = decode(Shop, encode_checked(data))
    assert again.note is None
    assert again.cart[0].price == Decimal("1.50")


def test_computed_fields() -> None:
    """Computed fields are not stored, not even where an older release stored a field of that name."""
    data = decode(Computing, b'{"session_id":"s","message_count":2,"doubled":9}')
    record = encode_checked(data)
    assert b"doubled" not in record
    assert decode(Computing, record).doubled == 4


def test_times_set_on_load() -> None:
    """A model may note activity whenever a record is read."""
    data = NotesActivity(session_id="s")
    assert decode(NotesActivity, encode_checked(data)).last_activity >= data.last_activity


def test_infinite_fields() -> None:
    """A field of type float may be infinite; it reads back."""
    data = Shop(session_id="s", rate=math.inf)
    assert decode(Shop, encode_checked(data)).rate == math.inf


def test_tuples_in_kept_fields() -> None:
    """A field of a newer release is held to what metadata is held to."""
    data = SessionData.model_validate({"session_id": "s", "newer": (1,)})
    assert decode(SessionData, encode_checked(data)).model_extra == {"newer": [1]}


def test_infinities_of_a_newer_release() -> None:
    """An older release writes a newer one's infinite field back as it came."""
    older = decode(SessionData, encode_checked(Shop(session_id="s", rate=math.inf)))
    older.user_id = "bob"
    assert decode(Shop, encode_checked(older)).rate == math.inf


# -- what is refused --------------------------------------------------------------------------------------


def nested(levels: int) -> dict[str, Any]:
    """Metadata of so many levels, its own among them."""
    value: Any = {}
    for level in range(levels - 1):
        value = {"a": value} if level % 2 else [value]
    return {"a": value} if isinstance(value, list) else value


CIRCLE: dict[str, Any] = {}
CIRCLE["a"] = [CIRCLE]


@pytest.mark.parametrize(
    ("values", "path", "reason"),
    [
        ({"cart": [0, 1, 2, {3}]}, "metadata.cart[3]", "is of type set"),
        ({"a": float("nan")}, "metadata.a", "is nan"),
        ({"a": [float("inf")]}, "metadata.a[0]", "is inf"),
        ({"a": b"b"}, "metadata.a", "is of type bytes"),
        ({"a": NOON}, "metadata.a", "is of type datetime"),
        ({"a": Decimal(1)}, "metadata.a", "is of type Decimal"),
        ({"a": Colour.RED}, "metadata.a", "is of type Colour"),
        ({"a": Item(name="tea")}, "metadata.a", "is of type Item"),
        ({"a": object()}, "metadata.a", "is of type object"),
        ({"a b": {1: 2}}, "metadata['a b']", "has a key of type int"),
        ({1: 2}, "metadata", "has a key of type int"),
        ({"a": {None: 1}}, "metadata.a", "has a key of type NoneType"),
        ({"a": ["\ud800"]}, "metadata.a[0]", "contains a lone surrogate"),
        ({"\ud800": 1}, "metadata['\\ud800']", "contains a lone surrogate"),
        ({"a": 10**4300}, "metadata.a", "is an integer of more than 4300 digits"),
        ({"a": -(10**4300)}, "metadata.a", "is an integer of more than 4300 digits"),
        (nested(101), "metadata" + ".a[0]" * 50, "is nested deeper than 100 levels"),
        (nested(301), "metadata" + ".a[0]" * 50, "is nested deeper than 100 levels"),
        (CIRCLE, "metadata" + ".a[0]" * 50, "is nested deeper than 100 levels"),
        ({"k" * 300: {1}}, "metadata." + "k" * 60, "is of type set"),
        ({"a": "x" * 1_000_000}, "metadata", "takes 1000008 bytes, more than 1000000"),
    ],
)
def test_metadata_that_would_not_read_back(values: dict[Any, Any], path: str, reason: str) -> None:
    """A value that the app put in and that would be lost or changed is refused, named by its path."""
    with pytest.raises(SessionDataError) as caught:
        encode_checked(live(values))
    assert caught.value.path == path
    assert caught.value.reason.startswith(reason)


def test_the_limits_themselves() -> None:
    """A hundred levels and a million bytes of metadata are stored."""
    cases: tuple[dict[str, Any], ...] = (
        nested(99),
        {"a": nested(99)},
        {"a": "x" * (1_000_000 - 8)},
        {"a": [[]] * 1000},
    )
    for values in cases:
        assert decode(SessionData, encode_checked(live(values))).metadata == values


def test_a_record_that_is_too_large() -> None:
    """A record of more than two million bytes is refused, whatever takes the place."""
    data = OlderShop(session_id="s", theme="x" * 2_000_000)
    with pytest.raises(SessionDataError, match=r"record takes \d+ bytes, more than 2000000"):
        encode_checked(data)


def mutated(name: str, value: Any) -> Shop:
    data = shop()
    vars(data)[name] = value
    return data


@pytest.mark.parametrize(
    ("data", "path"),
    [
        (mutated("cart", [Item(name="tea"), "coffee"]), "cart[1]"),
        (mutated("cart", [Item.model_construct(name=7)]), "cart[0].name"),
        (mutated("cart", [Special(name="tea")]), "cart"),
        (mutated("tags", {1}), "tags[0]"),
        (mutated("rate", math.nan), "rate"),
        (mutated("rate", "1.5"), "rate"),
        (mutated("message_count", 100_001), "message_count"),
        (mutated("session_id", "a b"), "session_id"),
        (mutated("since", object()), "since"),
        (Secretive(session_id="s", pin=SecretStr("1234")), "pin"),
        (SessionData.model_validate({"session_id": "s", "newer": {1}}), "newer"),
        (SessionData.model_validate({"session_id": "s", "newer": object()}), "newer"),
        (Faulty(session_id="s").model_copy(update={"thing": "unwritable"}), "thing"),
        (Faulty(session_id="s").model_copy(update={"thing": "unreadable"}), "record"),
        (Adding(session_id="s"), "added"),
        (mutated("stock", {"tea": (Item(name="green"), Special(name="black"))}), "stock"),
        (mutated("stock", {"tea": ()}).model_copy(update={"rate": math.nan}), "rate"),
        (Whole(session_id="s", high=5).model_copy(update={"low": 6}), "record"),
    ],
)
def test_fields_that_would_not_read_back(data: SessionData, path: str) -> None:
    """A typed field that was filled with something else, behind its model's back, is refused by name."""
    with pytest.raises(SessionDataError) as caught:
        encode_checked(data)
    assert caught.value.path == path


def test_a_deleted_field() -> None:
    """A record that lost a field altogether is refused by its name."""
    data = SessionData(session_id="s", message_count=3)
    del data.message_count
    with pytest.raises(SessionDataError, match="message_count"):
        encode_checked(data)


def test_the_cause_is_chained() -> None:
    """The fault of a model's own serialiser is the error's cause."""
    data = Faulty(session_id="s").model_copy(update={"thing": "unreadable"})
    with pytest.raises(SessionDataError) as caught:
        encode_checked(data)
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_unchecked_encoding() -> None:
    """Unchecked, a wrong value gives other bytes or a `ValueError`, never a warning."""
    data = shop()
    data.cart.append("coffee")  # type: ignore[arg-type]  # what is tested
    assert b'"coffee"' in encode(data)
    with pytest.raises(ValueError, match="serialize"):
        encode(live({"a": object()}))


class Strange(SessionData):
    model_config = ConfigDict(arbitrary_types_allowed=True, ser_json_inf_nan="null")
    level: float | None = None


def test_a_model_that_writes_nan_as_null() -> None:
    """A model's own configuration does not make a loss go unseen."""
    with pytest.raises(SessionDataError, match="level"):
        encode_checked(Strange(session_id="s", level=math.nan))


# -- properties -------------------------------------------------------------------------------------------


@given(st.dictionaries(TEXTS, JSON, max_size=5))
@settings(deadline=None)
def test_any_json_is_metadata(values: dict[str, Any]) -> None:
    """Any JSON object is accepted as metadata, when given and when filled in, and comes back equal."""
    given_then = SessionData(session_id="s", metadata=values)
    assert decode(SessionData, encode_checked(given_then)) == given_then
    assert given_then.metadata == values
    assert decode(SessionData, encode_checked(live(values))).metadata == values


def result_of(action: Callable[[], T]) -> T | SessionDataError:
    try:
        return action()
    except SessionDataError as refused:
        return refused


@given(st.dictionaries(TEXTS | st.integers() | st.text(max_size=1), JUNK, max_size=4))
@settings(deadline=None)
def test_junk_is_refused_or_comes_back(values: dict[Any, Any]) -> None:
    """Whatever is put into a session either comes back equal or is refused by a path, both ways in alike."""
    record = result_of(lambda: encode_checked(live(values)))
    if isinstance(record, SessionDataError):
        assert record.path.startswith("metadata")
        with pytest.raises(ValueError, match=r"metadata"):
            SessionData(session_id="s", metadata=values)
    else:
        assert decode(SessionData, record).metadata == as_json_has_it(values)
        assert SessionData(session_id="s", metadata=values).metadata == as_json_has_it(values)


@given(JUNK)
@settings(deadline=None)
def test_normalise_names_the_path(value: Any) -> None:
    """The walk gives an equal plain value, or an error whose path begins where it was told."""
    plain = result_of(lambda: normalise(value, "here"))
    if isinstance(plain, SessionDataError):
        assert plain.path.startswith("here")
    else:
        assert plain == as_json_has_it(value)
        assert json.loads(json.dumps(plain)) == plain


@pytest.mark.parametrize(
    ("record", "session_id", "user_id"),
    [
        (b'{"session_id":"s","user_id":"ada"}', "s", "ada"),
        (b'{"metadata":{"session_id":"x","user_id":"x"},"user_id":null,"session_id":"s"}', "s", None),
        (b'{"session_id":1,"user_id":["ada"]}', None, None),
        ('{"session_id":"sü\\\\","user_id":"\\u00fc"}'.encode(), "sü\\", "ü"),
        (b'{"session_id":"s","user_id":"ada"', None, None),
        (b'["session_id","user_id"]', None, None),
        (b"\xff", None, None),
        (b'{"a":' * 10_000, None, None),
        (b"", None, None),
    ],
)
def test_whose_record_it_is(record: bytes, session_id: str | None, user_id: str | None) -> None:
    """A record says so itself, whatever its model; what is no record says nothing."""
    assert (id_of(record), user_of(record)) == (session_id, user_id)


def test_every_record_says_whose_it_is() -> None:
    """Also that of a model of which nothing is known here, with a field of another type."""

    class Shop(SessionData):
        cart: dict[str, int] = {}  # noqa: RUF012  # pydantic copies defaults

    record = encode_checked(Shop(session_id="s", user_id="ada", cart={"a": 1}))
    assert (id_of(record), user_of(record)) == ("s", "ada")
