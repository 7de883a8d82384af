"""The proof that a record reads back as it is, and the name of the value that would not."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date, datetime
from decimal import Decimal
from functools import lru_cache
from typing import Any, TypeAlias
from uuid import UUID

from pydantic import BaseModel, ValidationError

from ..errors import SessionDataError
from .json import MAX_DEPTH, MAX_METADATA_BYTES, MAX_RECORD_BYTES, check_metadata_size, normalise, step
from .lines import Parts
from .writer import stored_only

_ATOMS = frozenset({str, int, float, bool, bytes, type(None), datetime, date, Decimal, UUID})
NOT_COMPARED = frozenset(
    {"metadata", "created_at", "updated_at", "last_activity"}
)  # times may be set on load
_LISTS = (list, tuple)
_UNSET = object()

_Plan: TypeAlias = "tuple[list[str], bool]"
"""The fields by which a model's instances are compared; and whether none of them can hold a model."""


def check_size(parts: Parts, values: object) -> None:
    """Raises `SessionDataError` where the record or its metadata take too many bytes."""
    if len(parts.metadata) > MAX_METADATA_BYTES:
        check_metadata_size(values)
    if len(parts.record) > MAX_RECORD_BYTES:
        raise SessionDataError("record", f"takes {len(parts.record)} bytes, more than {MAX_RECORD_BYTES}")


def holds(values: dict[str, Any], json: bytes, again: object) -> bool:
    """Whether metadata, encoded as `json` and read back as `again`, are stored without loss for certain.

    What is nested too deep would not be read by all. Whoever reads has to refuse an infinity: JSON has none.
    """
    return again == values and json.count(b"{") + json.count(b"[") <= MAX_DEPTH


def check_same(
    data: BaseModel, values: dict[str, Any], json: bytes, again: BaseModel, names: list[str]
) -> None:
    """Raises `SessionDataError`, naming the value, where `again` is not what `data` with `values` is.

    `names` are the fields that are stored, but for those that `NOT_COMPARED` names.
    """
    was, reads = data.__dict__, again.__dict__
    for name in names:
        value, other = was.get(name, _UNSET), reads[name]
        if value is not other and not same(value, other):
            raise SessionDataError(name, "would not read back as it is now")
    if data.__pydantic_extra__ or again.__pydantic_extra__:
        _check_extras(data, again)
    has_infinity = b"Infinity" in json
    if not has_infinity and holds(values, json, reads["metadata"]):
        return
    is_doubtful = has_infinity or reads["metadata"] != values or _is_deep(values)
    if is_doubtful and reads["metadata"] != normalise(values, "metadata"):  # names what JSON cannot hold
        raise SessionDataError("metadata", "would not read back as it is now")


def same(was: object, reads: object) -> bool:
    """Whether two values hold the same once what a model keeps to itself is set aside.

    That is its private attributes, cached properties and fields with `exclude=True`. Models are compared by
    their `__eq__` only where they have one of their own.
    """
    kind: Any = type(was)
    if was is reads or kind in _ATOMS:
        return was is reads or was == reads
    plan = _plan(kind)
    if plan is not None:
        return kind is type(reads) and _same_models(was, reads, plan)
    if isinstance(was, _LISTS) and isinstance(reads, _LISTS):
        is_list = isinstance(was, list)
        return is_list is isinstance(reads, list) and len(was) == len(reads) and all(map(same, was, reads))
    if isinstance(was, dict) and isinstance(reads, dict):
        return was.keys() == reads.keys() and all(same(was[key], reads[key]) for key in was)
    return bool(was == reads)


def explain(data: BaseModel, fault: Exception) -> SessionDataError:
    """Which value is to blame for `fault`, met while the record was written and read back."""
    try:
        normalise(data.__dict__.get("metadata"), "metadata")
    except SessionDataError as refused:
        return refused
    if isinstance(fault, ValidationError):
        first = fault.errors(include_url=False, include_context=False, include_input=False)[0]
        path = "".join(map(step, first["loc"])).removeprefix(".")
        return SessionDataError(path or "record", f"would not read back: {first['msg']}")
    for name in [*data.__dict__, *(data.__pydantic_extra__ or ())]:
        try:
            data.__pydantic_serializer__.to_json(data, by_alias=False, warnings=False, include={name})
        except Exception:
            return SessionDataError(name, f"cannot be written as JSON ({type(fault).__name__})")
    return SessionDataError("record", f"cannot be written and read back ({type(fault).__name__})")


def kept_fields(model: type[BaseModel]) -> list[str]:
    """The fields of a model that are stored."""
    fields = model.__pydantic_fields__.items()
    hidden = stored_only(model)
    return [name for name, field in fields if name in hidden or not field.exclude]


@lru_cache(maxsize=1024)
def _plan(kind: Any) -> _Plan | None:
    """None for what is no model, or one with an `__eq__` of its own."""
    if not issubclass(kind, BaseModel) or kind.__eq__ is not BaseModel.__eq__:
        return None
    names = kept_fields(kind)
    return names, all(kind.__pydantic_fields__[name].annotation in _ATOMS for name in names)


def _same_models(was: Any, reads: Any, plan: _Plan) -> bool:
    before, after, (names, is_flat) = was.__dict__, reads.__dict__, plan
    if not is_flat or before != after:  # what a model caches of itself is there too
        for name in names:
            value, other = before.get(name), after.get(name)
            if value is not other and not same(value, other):
                return False
    return bool(was.__pydantic_extra__ == reads.__pydantic_extra__)


def _check_extras(data: BaseModel, again: BaseModel) -> None:
    kept, read = data.__pydantic_extra__ or {}, again.__pydantic_extra__ or {}
    for name in (kept.keys() | read.keys()) - type(data).__pydantic_computed_fields__.keys():
        was, reads = kept.get(name, _UNSET), read.get(name, _UNSET)
        if was is _UNSET or (was != reads and normalise(was, name) != reads):
            raise SessionDataError(name, "would not read back as it is now")


def _is_deep(values: object) -> bool:
    """Whether values are nested deeper than `MAX_DEPTH` levels."""
    level: list[object] = [values]
    for _ in range(MAX_DEPTH):
        level = [
            child for node in level for child in _children(node) if isinstance(child, (dict, list, tuple))
        ]
        if not level:
            return False
    return True


def _children(node: object) -> Sequence[object]:
    if isinstance(node, dict):
        return list(node.values())
    return node if isinstance(node, (list, tuple)) else ()
