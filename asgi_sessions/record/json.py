"""What JSON can hold, and how much of it a record may hold.

Dicts with str keys, lists, str, bool, None, finite numbers of up to 4300 digits; 100 levels; a million bytes.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import JsonValue
from pydantic_core import to_json

from ..errors import SessionDataError

MAX_METADATA_BYTES = 1_000_000
MAX_RECORD_BYTES = 2_000_000
MAX_DEPTH = 100  # levels of dicts and lists in the metadata, itself the first; parsers end at about 200
_MAX_DIGITS = 4300  # of an integer: Python's own limit and the JSON parser's
_INTEGERS_END = 10**_MAX_DIGITS
_INTEGERS_BEGIN = -(10 ** (_MAX_DIGITS - 1))  # older parsers count the sign as a digit


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
            refused.path = step(key) + refused.path
            raise
    return plain


def step(key: str | int) -> str:
    """One step of a path: `.cart`, `[3]` or `['last seen']`."""
    if isinstance(key, str) and key.isidentifier():
        return f".{key:.60}"
    return f"[{key!a:.60}]"
