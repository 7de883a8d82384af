"""A model's records as bytes: how they are written, how they read back.

A record is the JSON of its model's fields under their own names, whatever aliases the model has. Computed
fields are left out: they come back by themselves. Start with `Codec`.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from functools import lru_cache
from operator import itemgetter
from typing import Any, Generic, NamedTuple, TypeAlias, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import SchemaValidator, core_schema, to_json

from ..errors import SessionDataError
from .lines import WHEN, WHO, Parts, items_of, join, parsed, split
from .proof import NOT_COMPARED, check_same, check_size, explain, kept_fields
from .writer import compile_writer, has_own_serializer, stored_only

Record = TypeVar("Record", bound=BaseModel)

Image: TypeAlias = "tuple[tuple[Any, ...], bytes]"
"""What is compared to see whether typed fields have changed: facts of the first two lines, and the third."""

MAX_NOTED = 512  # third lines for each model, and records
MAX_NOTED_BYTES = 4096  # the longest one

_FACTS = (*WHO, *WHEN)
_facts: Callable[[Any], tuple[Any, ...]] = itemgetter(*_FACTS)
_MOMENT = core_schema.typed_dict_field(core_schema.datetime_schema(tz_constraint=0))
_MOMENTS = SchemaValidator(
    core_schema.typed_dict_schema(dict.fromkeys(WHEN, _MOMENT), extra_behavior="forbid")
)


class Who(NamedTuple):
    """What the first line of a record says."""

    session_id: str
    user_id: str | None
    fingerprint: str | None
    created_at: datetime
    created_ns: int  # the same in nanoseconds since the epoch

    def __repr__(self) -> str:
        return "Who()"


class Codec(Generic[Record]):
    """Writes and reads the records of one model; compiled once per model, see `codec_of`.

    A model with serialisers of its own, or with other types in the first two lines, has records of one line.
    """

    def __init__(self, model: type[Record]) -> None:
        self.model = model
        self.has_lines = _fits_lines(model)
        self.is_steady = self.has_lines and _is_steady(model)  # a record reads alike whenever it is read
        self.names = names = model.__pydantic_fields__.keys()
        self._computed = set(model.__pydantic_computed_fields__) or None
        self._noted: set[bytes] = set()
        self._compared = [name for name in kept_fields(model) if name not in NOT_COMPARED]
        self._whole = compile_writer(model)
        if self.has_lines:
            self._who = compile_writer(model, WHO, extras=False)
            self._when = compile_writer(model, WHEN, extras=False)
            fields = names - {*_FACTS, "metadata"}
            self._fields = compile_writer(model, fields)
            self._without_client = compile_writer(model, fields - stored_only(model))  # most have none

    def decode(self, raw: str | bytes) -> Record:
        """See `decode`."""
        record: Record = self.model.__pydantic_validator__.validate_json(raw, by_alias=False, by_name=True)
        return record

    def line(self, data: Record) -> bytes:
        """The record as JSON in one line, unchecked. Raises `ValueError` where a value has no JSON form."""
        return self._whole.to_json(data, by_alias=False, warnings=False, exclude=self._computed)

    def tree(self, data: Record) -> dict[str, Any]:
        """The same as a dict of what JSON has; a value without a JSON form is warned of."""
        found: dict[str, Any] = self._whole.to_python(
            data, mode="json", by_alias=False, exclude=self._computed
        )
        return found

    def note(self, fields: bytes) -> None:
        """Remember a third line: what is read from it is written alike."""
        if len(fields) <= MAX_NOTED_BYTES:
            if len(self._noted) >= MAX_NOTED:
                self._noted.clear()
            self._noted.add(fields)

    def is_noted(self, fields: bytes) -> bool:
        """Whether `note` was told of this line, lately."""
        return fields in self._noted

    def facts(self, data: Record) -> tuple[Any, ...]:
        """What the first two lines say, as values that nobody can change within."""
        try:
            return _facts(data.__dict__) if self.has_lines else ()
        except KeyError as missing:
            raise ValueError(f"the record has no {missing}") from None

    def image(self, data: Record) -> Image:
        """See `Image`. Raises `ValueError` where a value has no JSON form."""
        if not self.has_lines:
            return (), self.line(data)
        writer = self._without_client if data.__dict__.get("client") is None else self._fields
        fields = writer.to_json(data, by_alias=False, warnings=False, exclude=self._computed)
        return self.facts(data), fields[1:-1] + b"," if len(fields) > 2 else b""

    def has_same_line(self, one: Image, other: Image) -> bool:
        """Whether two images have the same first line."""
        return one[0][: len(WHO)] == other[0][: len(WHO)]

    def write(self, data: Record, who: bytes, fields: bytes, metadata: bytes) -> Parts:
        """The record of these parts, unchecked; an empty `who` is written as `data` has it."""
        if not self.has_lines:
            return Parts(fields, b"", b"", fields, metadata)
        if not who:
            who = self._who.to_json(data, by_alias=False, warnings=False)[:-1] + b","
        when = self._when.to_json(data, by_alias=False, warnings=False)[1:-1] + b","
        return join(who, when, fields, metadata)

    def prove(self, data: Record, values: dict[str, Any], parts: Parts) -> Record:
        """What these parts read back as: `data` with `values`, or `SessionDataError` is raised."""
        try:
            check_size(parts, values)
            again = self.decode(parts.record)
            check_same(data, values, parts.metadata, again, self._compared)
        except SessionDataError:
            raise
        except Exception as fault:  # the model's own validators and __eq__ may raise anything
            raise explain(data, fault) from fault
        return again

    def lines_of(self, record: bytes) -> tuple[Parts, Who] | None:
        """A record's parts and who it is of, where the model is certain to read the first three lines so.

        None where the model has to decide, and to say what is wrong. What is remembered of a record and of a
        line is found by its bytes.
        """
        return (_lines if len(record) <= MAX_NOTED_BYTES else _read_lines)(self, record)


def codec_of(model: type[Record]) -> Codec[Record]:
    """The model's codec."""
    codec: Codec[Record] = _codec(model, model.__pydantic_serializer__)
    return codec


def encode(data: BaseModel) -> bytes:
    """The record, unchecked. Raises `ValueError` where a value has no JSON form."""
    codec = codec_of(type(data))
    return codec.write(data, b"", codec.image(data)[1], to_json(_values(data))).record


def encode_checked(data: BaseModel) -> bytes:
    """The record as it is to be stored, proven to read back as it is now.

    A tuple in the metadata reads back as a list, and a field with `exclude=True` not at all. Raises
    `SessionDataError`, naming the value, for anything else that would be lost or changed.
    """
    codec = codec_of(type(data))
    try:
        values = _values(data)
        parts = codec.write(data, b"", codec.image(data)[1], to_json(values))
    except Exception as fault:  # the model's own serialisers may raise anything
        raise explain(data, fault) from fault
    codec.prove(data, values, parts)
    return parts.record


def decode(model: type[Record], raw: str | bytes) -> Record:
    """The record that `encode` wrote, as an instance of `model`.

    Fields that the model has but the record lacks get their defaults; what the record has but the model
    lacks is kept, so that an older release writes it back. Raises `ValueError` where `raw` is no such record.
    """
    return codec_of(model).decode(raw)


@lru_cache(maxsize=256)
def _codec(model: type[Any], _serializer: object) -> Codec[Any]:
    """A model has another serialiser after a rebuild."""
    return Codec(model)


def _fits_lines(model: type[BaseModel]) -> bool:
    """Whether the first two lines and the metadata are written as the model that defines them has them."""
    fields = model.__pydantic_fields__
    decorators = model.__pydantic_decorators__
    if decorators.field_serializers or decorators.model_serializers or has_own_serializer(model):
        return False
    bases = [
        each.__pydantic_fields__
        for each in model.__mro__
        if each is not BaseModel and issubclass(each, BaseModel)
    ]
    defined = next((each for each in reversed(bases) if each.keys() >= {*_FACTS, "metadata"}), {})
    return bool(defined) and all(
        (fields[name].annotation, fields[name].metadata, fields[name].exclude)
        == (defined[name].annotation, defined[name].metadata, defined[name].exclude)
        for name in (*_FACTS, "metadata")
    )


def _is_steady(model: type[BaseModel]) -> bool:
    """Whether no code of the model's own runs when a record is read."""
    own = model.__pydantic_decorators__
    validators = len(own.model_validators) + len(own.field_validators) + len(own.root_validators)
    return validators <= 1 and model.__pydantic_post_init__ is None and not own.validators


def _read_lines(codec: Codec[Any], record: bytes) -> tuple[Parts, Who] | None:
    parts = split(record)
    who = None if parts is None else _who(codec, parts.who)
    if parts is None or who is None or not _are_fields(codec, parts.fields):
        return None
    updated = _updated(parts.when)
    return None if updated is None or updated < who.created_at else (parts, who)


_lines = lru_cache(maxsize=MAX_NOTED)(_read_lines)


@lru_cache(maxsize=1024)
def _who(codec: Codec[Any], line: bytes) -> Who | None:
    found = items_of(line)
    if not found.keys() >= set(WHO) or found.keys() & (codec.names - set(WHO)):
        return None
    try:
        data = codec.decode(b"%b}" % line[:-1])
    except ValueError:
        return None
    created = data.created_at
    return Who(data.session_id, data.user_id, data.fingerprint, created, int(created.timestamp() * 1e9))


@lru_cache(maxsize=1024)
def _are_fields(codec: Codec[Any], line: bytes) -> bool:
    found = items_of(line)
    if not found or found.keys() & {*_FACTS, "metadata"}:
        return False
    try:
        codec.decode(b'{"session_id":"s",%b}' % line[:-1])
    except ValueError:
        return False
    return True


@lru_cache(maxsize=1024)
def _updated(line: bytes) -> datetime | None:
    try:
        moments = _MOMENTS.validate_json(b"{%b}" % line[:-1])
    except ValueError:
        return None
    updated: datetime = moments["updated_at"]
    return updated if line[-1:] == b"," else None


def _values(data: BaseModel) -> dict[str, Any]:
    """The metadata as an exact dict, which encodes fastest; a session's own methods do not run."""
    values: Any = data.__dict__.get("metadata")
    return dict(dict.items(values)) if isinstance(values, dict) else values


def id_of(record: bytes) -> str | None:
    """The session id that a record bears, whatever its model; None where it bears none."""
    return _text_of(record, "session_id")


def user_of(record: bytes) -> str | None:
    """Who is signed in by a record, whatever its model; None where nobody is or nobody can tell."""
    return _text_of(record, "user_id")


def used_at(record: bytes) -> float:
    """When a record was last changed, in seconds since the epoch, whatever its model; 0 where it says not."""
    parts = split(record)
    found = items_of(parts.when) if parts is not None else {}
    if "last_activity" not in found:
        found = parsed(record)
    try:
        return datetime.fromisoformat(str(found.get("last_activity")).replace("Z", "+00:00")).timestamp()
    except ValueError:
        return 0.0


def counts_of(record: bytes) -> tuple[int, bool]:
    """The messages that a record counts and whether it is escalated, whatever its model."""
    parts = split(record)
    found = items_of(parts.fields) if parts is not None else {}
    if "message_count" not in found:
        found = parsed(record)
    messages = found.get("message_count")
    return (messages if isinstance(messages, int) else 0), found.get("escalated") is True


def _text_of(record: bytes, name: str) -> str | None:
    found = items_of(record[: record.find(b"\n")])
    if not found.keys() >= set(WHO):
        found = parsed(record)
    text = found.get(name)
    return text if isinstance(text, str) else None


class Misfit(NamedTuple):
    """Why a record does not fit a model: which fields, and pydantic's names of what is wrong with them."""

    model: str
    field: str
    problem: str

    def __str__(self) -> str:
        return (
            f"the record cannot be read as {self.model}: {self.field} ({self.problem}); it is left as it is"
        )


def misfit(model: type[BaseModel], error: ValueError) -> Misfit:
    """What `decode` found wrong, without any value of the record; what lies within a field is not named."""
    found = (
        error.errors(include_url=False, include_context=False, include_input=False)
        if isinstance(error, ValidationError)
        else []
    )
    fields = [str(each["loc"][0]) for each in found if each["loc"] and each["loc"][0] in model.model_fields]
    problems = dict.fromkeys(each["type"] for each in found)
    return Misfit(
        model.__name__, ", ".join(dict.fromkeys(fields)) or "record", ", ".join(problems) or "other"
    )
