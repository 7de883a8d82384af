"""The kinds of values a record has: identifiers, moments, and metadata that JSON can hold."""

from __future__ import annotations

import re
import secrets
from datetime import datetime, timezone
from typing import Annotated, Any, cast
from uuid import UUID

from pydantic import AfterValidator, GetCoreSchemaHandler, StringConstraints, ValidationInfo, WithJsonSchema
from pydantic_core import CoreSchema, core_schema

from ..errors import SessionDataError
from .json import check_metadata_size, normalise

_FORBIDDEN = re.compile(r"""[ '"`;]|--|/\*|\*/""")
_STATEMENT = re.compile(r"(?:drop|delete)(?!\w)", re.IGNORECASE)
_MARK = r"""(?:['"`;]|(?<!-)--+(?!-)|/\*)"""  # a row of dashes is one
_INJECTION = re.compile(
    rf"\s{_MARK}|{_MARK}\s|{_MARK}{_MARK}|^{_MARK}|['\"`;]$|(?<!\w)(?:drop|delete)\s+\w", re.IGNORECASE
)
_SUBJECT = re.compile(r"[A-Za-z0-9_-]{16,}")  # base64url of 96 bits and more
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")  # the last two end lines as well
_HEX_HASH = r"^(?:[0-9a-fA-F]{32}|[0-9a-fA-F]{40}|[0-9a-fA-F]{64})$"


def new_session_id() -> str:
    """A fresh id with 128 random bits (OWASP asks for 64), an identifier by construction."""
    return secrets.token_hex(16)


def is_identifier(text: str) -> bool:
    """Whether `text` may be a session id: 1 to 255 characters under the identifier rule.

    Printable, no white-space, no quotes, no `;`, `--`, `/*` or `*/`, and not beginning with the word DROP or
    DELETE. Costs linear time at most, so anything a client sent may be asked about.
    """
    return 0 < len(text) <= 255 and _obeys_rule(text)


def check_id(session_id: str) -> None:
    """`ValueError` for what may not be a session id."""
    if not is_identifier(session_id):
        raise ValueError("a session id has 1 to 255 printable characters, no quotes and no spaces")


def _obeys_rule(text: str) -> bool:
    if text.isalnum():  # most ids are, and only the statement words are left to look for
        return text.lower() not in {"drop", "delete"}
    return text.isprintable() and not _FORBIDDEN.search(text) and not _STATEMENT.match(text)


def _identifier(text: str) -> str:
    if not _obeys_rule(text):
        raise ValueError(
            "must be printable, without white-space, quotes, ';', '--', '/*' and '*/',"
            " and must not begin with the word DROP or DELETE"
        )
    return text


def _user(text: str) -> str:
    """Whoever signs in brings their own id: refused is only what no identity provider hands out."""
    if not text or text != text.strip() or _CONTROL.search(text):
        raise ValueError("must have characters, no control characters, and no white-space at either end")
    if _INJECTION.search(text) and not _SUBJECT.fullmatch(text):  # a subject may begin with dashes
        raise ValueError(
            "reads as an injection: a quote, ';', '--' or '/*' beside white-space, beside another of them or"
            " at the beginning, a quote or ';' at the end, or DROP or DELETE before another word"
        )
    return text


def user_text(user_id: str | int | UUID) -> str:
    """A user's id as records keep it: a number or a UUID as its text. `TypeError` for anything else."""
    if isinstance(user_id, str):
        return user_id
    if isinstance(user_id, UUID):
        return str(user_id)
    if isinstance(user_id, int) and not isinstance(user_id, bool):
        return int.__repr__(user_id)
    raise TypeError(f"a user's id is a str, an int or a UUID, not {type(user_id).__name__}: pass its text")


def utc_now() -> datetime:
    """The moment by this machine's clock, in UTC."""
    return datetime.now(timezone.utc)


def to_utc(value: datetime) -> datetime:
    """The same moment in UTC; a naive one is in UTC already. `ValueError` where the year leaves 1 to 9999."""
    if value.utcoffset() is None:
        return value.replace(tzinfo=timezone.utc)
    try:
        return value.astimezone(timezone.utc)
    except OverflowError:
        raise ValueError("is out of range in UTC") from None


def _moment(value: datetime | None, info: ValidationInfo) -> datetime:
    if value is not None:
        return to_utc(value)
    created: datetime | None = info.data.get("created_at") if info.data else None
    return max(created, utc_now()) if created and info.field_name != "created_at" else utc_now()


class _MomentSchema:
    """A moment in UTC; None is now, though not before the record's creation (the clock may have stepped)."""

    @classmethod
    def __get_pydantic_core_schema__(cls, _source: object, _handler: GetCoreSchemaHandler) -> CoreSchema:
        lenient = core_schema.with_info_after_validator_function(
            _moment, core_schema.nullable_schema(core_schema.datetime_schema())
        )
        # what our own records say is in UTC already: reading it needs no call into Python
        stored = core_schema.union_schema(
            [core_schema.datetime_schema(tz_constraint=0), lenient],
            mode="left_to_right",
            custom_error_type="moment",
            custom_error_message="Input should be a date and time, or null",
        )
        return core_schema.json_or_python_schema(
            stored, lenient, serialization=core_schema.simple_ser_schema("datetime")
        )


def check_metadata(value: object) -> dict[str, Any]:
    """A copy of `value` that a record can hold; `ValueError`, with the path, for what it cannot."""
    if not isinstance(value, dict):
        raise ValueError(f"must be a dict, not {type(value).__name__}")
    try:
        plain = normalise(value, "metadata")
        check_metadata_size(plain)
    except SessionDataError as refused:
        raise ValueError(f"{refused.path} {refused.reason}") from None
    return cast("dict[str, Any]", plain)


class _MetadataSchema:
    """A dict that JSON can hold. What comes as JSON is not walked: it is that already."""

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.json_or_python_schema(
            handler(source), core_schema.no_info_plain_validator_function(check_metadata)
        )


Identifier = Annotated[str, StringConstraints(max_length=255), AfterValidator(_identifier)]
UserId = Annotated[str, StringConstraints(max_length=255), AfterValidator(_user)]
SessionId = Annotated[str, StringConstraints(min_length=1, max_length=255), AfterValidator(_identifier)]
Moment = Annotated[
    datetime, _MomentSchema, WithJsonSchema({"type": "string", "format": "date-time"}, mode="serialization")
]
Metadata = Annotated[dict[str, Any], _MetadataSchema]
HexHash = Annotated[str, StringConstraints(pattern=_HEX_HASH, to_lower=True)]
