"""The record as bytes: how it is written, how it reads back, and what is refused because it would not.

A record is the JSON of its model's fields under their own names, whatever aliases the model has. Computed
fields are left out: they come back by themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

from pydantic import BaseModel, JsonValue, ValidationError
from pydantic_core import from_json, to_json

from ..errors import SessionDataError
from .writer import STORED_ONLY, writer_of

MAX_METADATA_BYTES = 1_000_000
MAX_RECORD_BYTES = 2_000_000
MAX_DEPTH = 100  # levels of dicts and lists in the metadata, itself the first; parsers end at about 200
_MAX_DIGITS = 4300  # of an integer: Python's own limit and the JSON parser's
_INTEGERS_END = 10**_MAX_DIGITS
_INTEGERS_BEGIN = -(10 ** (_MAX_DIGITS - 1))  # older parsers count the sign as a digit
_ALWAYS_READ_BACK = frozenset({"created_at", "updated_at", "last_activity"})  # a model may set them on load
_UNSET = object()

Record = TypeVar("Record", bound=BaseModel)


def encode(data: BaseModel) -> bytes:
    """The record as JSON, unchecked: for comparing with what was loaded.

    Raises `ValueError` where a value has no JSON form.
    """
    model = type(data)
    computed = model.__pydantic_computed_fields__
    return writer_of(model, model.__pydantic_serializer__).to_json(
        data, by_alias=False, warnings=False, exclude=set(computed) if computed else None
    )


def dump(data: BaseModel) -> dict[str, Any]:
    """The same as a dict of what JSON has; a value without a JSON form is warned of."""
    model = type(data)
    plain: dict[str, Any] = writer_of(model, model.__pydantic_serializer__).to_python(
        data, mode="json", by_alias=False, exclude=set(model.__pydantic_computed_fields__)
    )
    return plain


def decode(model: type[Record], raw: str | bytes) -> Record:
    """The record that `encode` wrote, as an instance of `model`.

    Fields that the model has but the record lacks get their defaults; what the record has but the model
    lacks is kept, so that an older release writes it back. Raises `ValueError` where `raw` is no such record.
    """
    record: Record = model.__pydantic_validator__.validate_json(raw, by_alias=False, by_name=True)
    return record


def id_of(record: bytes) -> str | None:
    """The session id that a record bears, whatever its model; None where it bears none."""
    return _text_of(record, "session_id")


def user_of(record: bytes) -> str | None:
    """Who is signed in by a record, whatever its model; None where nobody is or nobody can tell."""
    return _text_of(record, "user_id")


def counts_of(record: bytes) -> tuple[int, bool]:
    """The messages that a record counts and whether it is escalated, whatever its model."""
    fields = _fields_of(record)
    messages = fields.get("message_count")
    return (messages if isinstance(messages, int) else 0), fields.get("escalated") is True


def _text_of(record: bytes, name: str) -> str | None:
    text = _fields_of(record).get(name)
    return text if isinstance(text, str) else None


def _fields_of(record: bytes) -> dict[str, object]:
    try:
        fields = from_json(record, cache_strings="keys")  # no id stays behind in pydantic's cache
    except ValueError:
        return {}
    return fields if isinstance(fields, dict) else {}


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


def encode_checked(data: BaseModel) -> bytes:
    """The record as it is to be stored, proven to read back as it is now.

    A tuple in the metadata reads back as a list, and a field with `exclude=True` not at all. Raises
    `SessionDataError`, naming the value, for anything else that would be lost or changed.
    """
    try:
        raw = encode(data)
        _check_size(data, raw)
        again = decode(type(data), raw)
        same = again.__dict__ == data.__dict__ and again.__pydantic_extra__ == data.__pydantic_extra__
        if not same or b"Infinity" in raw:  # infinities are for typed fields only, JSON has none
            _check_fields(data, again)
    except SessionDataError:
        raise
    except Exception as fault:  # the model's own serialisers, validators and __eq__ may raise anything
        raise _explain(data, fault) from fault
    _check_depth(raw, again)
    return raw


def normalise(value: object, path: str) -> JsonValue:
    """A copy of `value` made of what JSON has: str, bool, int, float, None, list, and dict with str keys.

    Tuples become lists, subclasses (an `OrderedDict`, a member of an `IntEnum`) the plain type they are equal
    to. `value` is not changed. Raises `SessionDataError` for anything else, with its path below `path`.
    """
    try:
        return _plain(value, 1)
    except SessionDataError as refused:
        raise SessionDataError(path + refused.path, refused.reason) from None


def check_metadata_size(metadata: object) -> None:
    """Raises `SessionDataError` where the encoded metadata takes more than `MAX_METADATA_BYTES`."""
    size = len(to_json(metadata, inf_nan_mode="constants"))
    if size > MAX_METADATA_BYTES:
        raise SessionDataError("metadata", f"takes {size} bytes, more than {MAX_METADATA_BYTES}")


def _plain(value: object, depth: int) -> JsonValue:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return _plain_text(value)
    if isinstance(value, int):
        return _plain_integer(value)
    if isinstance(value, float):
        return _plain_float(value)
    if not isinstance(value, (dict, list, tuple)):
        raise SessionDataError("", f"is of type {type(value).__name__}, which JSON does not have")
    if depth > MAX_DEPTH:
        raise SessionDataError("", f"is nested deeper than {MAX_DEPTH} levels, or contains itself")
    return _plain_dict(value, depth) if isinstance(value, dict) else _plain_list(value, depth)


def _plain_text(text: str) -> str:
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise SessionDataError("", "contains a lone surrogate, which UTF-8 does not have") from None
    return str.__str__(text)


def _plain_integer(number: int) -> int:
    if not _INTEGERS_BEGIN < number < _INTEGERS_END:
        raise SessionDataError("", f"is an integer of more than {_MAX_DIGITS} digits")
    return int.__int__(number)


def _plain_float(number: float) -> float:
    if number - number != 0:  # true of NaN and the infinities alone
        raise SessionDataError("", f"is {float.__float__(number)}, which JSON does not have")
    return float.__float__(number)


def _plain_list(items: Sequence[object], depth: int) -> list[JsonValue]:
    plain: list[JsonValue] = []
    try:
        for item in items:
            plain.append(_plain(item, depth + 1))
    except SessionDataError as refused:
        refused.path = f"[{len(plain)}]{refused.path}"
        raise
    return plain


def _plain_dict(items: dict[object, object], depth: int) -> dict[str, JsonValue]:
    plain: dict[str, JsonValue] = {}
    for key, item in dict.items(items):  # not a subclass's items(), which may note that somebody looked
        if not isinstance(key, str):
            raise SessionDataError("", f"has a key of type {type(key).__name__}; keys must be str")
        try:
            plain[_plain_text(key)] = _plain(item, depth + 1)
        except SessionDataError as refused:
            refused.path = _step(key) + refused.path
            raise
    return plain


def _step(key: str | int) -> str:
    """One step of a path: `.cart`, `[3]` or `['last seen']`."""
    if isinstance(key, str) and key.isidentifier():
        return f".{key:.60}"
    return f"[{key!a:.60}]"


def _check_size(data: BaseModel, raw: bytes) -> None:
    if len(raw) > MAX_METADATA_BYTES:
        check_metadata_size(data.__dict__["metadata"])
    if len(raw) > MAX_RECORD_BYTES:
        raise SessionDataError("record", f"takes {len(raw)} bytes, more than {MAX_RECORD_BYTES}")


def _check_depth(raw: bytes, again: BaseModel) -> None:
    if raw.count(b"{") + raw.count(b"[") <= MAX_DEPTH:  # nearly always; no walk is needed then
        return
    level: list[object] = [again.__dict__["metadata"]]
    for _ in range(MAX_DEPTH):
        level = [child for node in level for child in _children(node) if isinstance(child, (dict, list))]
        if not level:
            return
    normalise(again.__dict__["metadata"], "metadata")  # names the value


def _children(node: object) -> Sequence[object]:
    if isinstance(node, dict):
        return list(node.values())
    return node if isinstance(node, list) else ()


def _check_fields(data: BaseModel, again: BaseModel) -> None:
    """Pass what may differ, and name the first field that reads back as something else."""
    for name, field in type(data).__pydantic_fields__.items():
        was, reads = data.__dict__.get(name, _UNSET), again.__dict__.get(name, _UNSET)
        if name == "metadata":
            was = normalise(was, name)
        kept = name in STORED_ONLY or not field.exclude
        if was != reads and kept and name not in _ALWAYS_READ_BACK and not _same(was, reads):
            raise SessionDataError(name, "would not read back as it is now")
    _check_extras(data, again)


def _check_extras(data: BaseModel, again: BaseModel) -> None:
    kept, read = data.__pydantic_extra__ or {}, again.__pydantic_extra__ or {}
    for name in (kept.keys() | read.keys()) - type(data).__pydantic_computed_fields__.keys():
        was, reads = kept.get(name, _UNSET), read.get(name, _UNSET)
        if was is _UNSET or (was != reads and normalise(was, name) != reads):
            raise SessionDataError(name, "would not read back as it is now")


def _same(was: object, reads: object) -> bool:
    """Whether two values hold the same once what a model keeps to itself is set aside.

    That is its private attributes, cached properties and fields with `exclude=True`.
    """
    if type(was) is not type(reads):
        return False
    if isinstance(was, BaseModel) and isinstance(reads, BaseModel):
        kept = [name for name, field in type(was).__pydantic_fields__.items() if not field.exclude]
        return was.__pydantic_extra__ == reads.__pydantic_extra__ and all(
            _same(was.__dict__.get(name), reads.__dict__.get(name)) for name in kept
        )
    if isinstance(was, dict) and isinstance(reads, dict):
        return was.keys() == reads.keys() and all(_same(was[key], reads[key]) for key in was)
    if isinstance(was, (list, tuple)) and isinstance(reads, (list, tuple)):
        return len(was) == len(reads) and all(map(_same, was, reads))
    return bool(was == reads)


def _explain(data: BaseModel, fault: Exception) -> SessionDataError:
    """Which value is to blame for `fault`, met while the record was written and read back."""
    try:
        normalise(data.__dict__.get("metadata"), "metadata")
    except SessionDataError as refused:
        return refused
    if isinstance(fault, ValidationError):
        first = fault.errors(include_url=False, include_context=False, include_input=False)[0]
        path = "".join(map(_step, first["loc"])).removeprefix(".")
        return SessionDataError(path or "record", f"would not read back: {first['msg']}")
    for name in [*data.__dict__, *(data.__pydantic_extra__ or ())]:
        try:
            data.__pydantic_serializer__.to_json(data, by_alias=False, warnings=False, include={name})
        except Exception:
            return SessionDataError(name, f"cannot be written as JSON ({type(fault).__name__})")
    return SessionDataError("record", f"cannot be written and read back ({type(fault).__name__})")
