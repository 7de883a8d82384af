"""The typed record of a session: its fields, what they may be, and how a change to them is announced."""

from __future__ import annotations

import hashlib
import hmac
import warnings
from collections.abc import Iterator, Mapping
from datetime import datetime
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, Protocol

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, model_validator
from typing_extensions import TypeVar  # in typing itself from Python 3.13: with a default

from .codec import codec_of
from .sighting import Client, ClientSchema
from .values import (
    HexHash,
    Identifier,
    Metadata,
    Moment,
    SessionId,
    UserId,
    check_metadata,
    to_utc,
    utc_now,
)
from .writer import StoredOnly, stored_only

if TYPE_CHECKING:
    from typing_extensions import Self  # in typing itself from Python 3.11

_MOMENTS = ("created_at", "updated_at", "last_activity")
_LATER_MOMENTS = frozenset(_MOMENTS[1:])
_ANY_MOMENT: TypeAdapter[datetime] = TypeAdapter(Moment)


class Owner(Protocol):
    """What a record asks of a dict that is its metadata and something else too: a session's handle."""

    def before_change(self) -> None:
        """Called before a field of the record is assigned; may raise to prevent it."""

    def replace_all(self, values: Mapping[str, Any]) -> None:
        """Have these values and no others, without another announcement."""


class SessionData(BaseModel):
    """What is known about one session. Subclass it to add fields of your own, with defaults.

    Assignment is validated, and one that fails changes nothing. Changes inside `metadata` or a list are
    checked when the record is stored. Fields of a newer release are kept as they came. Times are in UTC;
    naive ones are read as UTC, None is now. Raises pydantic's `ValidationError`, a `ValueError`.

    What frameworks make of a returned record (`model_dump`, `model_dump_json`, a response model) has no
    `session_id`, no `fingerprint` and no `client`; `to_dict` and `to_json` have them. `repr` shows none of
    them, and of the metadata the number of keys only. `client` is who signed in, with `record_client=True`.
    """

    model_config = ConfigDict(
        validate_assignment=True,
        validate_by_name=True,
        extra="allow",
        ser_json_inf_nan="constants",
        hide_input_in_errors=True,  # logs are no place for session ids
    )

    session_id: Annotated[SessionId, Field(exclude=True)]  # out of what is sent, not of what is stored
    user_id: UserId | None = None
    thread_id: Identifier | None = None
    request_id: Identifier | None = None
    message_count: Annotated[int, Field(ge=0, le=100_000)] = 0
    escalated: bool = False
    metadata: Metadata = Field(default_factory=dict)
    created_at: Moment = Field(default_factory=utc_now)
    updated_at: Moment = Field(default_factory=utc_now)
    last_activity: Moment = Field(default_factory=utc_now)
    fingerprint: Annotated[HexHash | None, Field(exclude=True)] = None
    client: Annotated[Client | None, ClientSchema, StoredOnly(), Field(exclude=True)] = None

    @model_validator(mode="after")
    def _settle_times(self) -> Self:
        given = self.__pydantic_fields_set__
        if not given >= _LATER_MOMENTS:  # those not given are the creation's, however the clock ran
            omitted = _LATER_MOMENTS - given
            vars(self).update(dict.fromkeys(omitted, self.created_at))
            given |= omitted  # once: an assignment comes by here too
        if self.updated_at < self.created_at:
            raise ValueError("updated_at must not be before created_at")
        return self

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The record that `to_dict` described; `values` is not changed.

        Times that cannot be read become now, with one `UserWarning` that names them. Where creation is one of
        them, `updated_at` becomes now too. Raises `ValueError` for anything else that is wrong.
        """
        given = dict(values)
        bad = [name for name in _MOMENTS if not _is_moment(given.get(name))]
        if bad:
            warnings.warn(f"read as now, being no date and time: {', '.join(bad)}", stacklevel=2)
            given.update(dict.fromkeys(bad))
        if "created_at" in bad:
            given["updated_at"] = None
        return cls.model_validate(given)

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """The record that `to_json` wrote, checked like any other input. Raises `ValueError`."""
        record = codec_of(cls).decode(text)
        check_metadata(record.metadata)
        return record

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON has them, by their own names; times are ISO 8601 strings."""
        return codec_of(type(self)).tree(self)

    def to_json(self) -> str:
        """The record as a JSON text. Raises `ValueError` where a value has no JSON form."""
        return codec_of(type(self)).line(self).decode()

    def update_activity(self) -> None:
        """Note that the session is used now."""
        owner = _owner_of(self)
        if owner is not None:
            owner.before_change()
        stamp(self)

    def increment_message_count(self, delta: int = 1) -> int:
        """Add `delta` and return the new count; `ValueError`, and no change, outside of 0 to 100 000."""
        self.message_count += delta
        return self.message_count

    def create_fingerprint(self, ip_address: str, user_agent: str) -> str:
        """Bind the session to a client: sets and returns the SHA-256 of `ip:user_agent`, in hexadecimal."""
        self.fingerprint = fingerprint = _fingerprint(ip_address, user_agent)
        return fingerprint

    def verify_fingerprint(self, ip_address: str, user_agent: str) -> bool:
        """Whether this is the client the session is bound to; True where it is bound to none."""
        if self.fingerprint is None:
            return True
        return hmac.compare_digest(self.fingerprint, _fingerprint(ip_address, user_agent))

    if not TYPE_CHECKING:  # seen by type checkers, it would make them pass fields that do not exist

        def __setattr__(self, name, value):
            if name in type(self).__pydantic_fields__:
                self._assign(name, value)
            elif name.startswith("_") or isinstance(
                getattr(type(self), name, None), (property, cached_property)
            ):
                super().__setattr__(name, value)
            else:
                raise AttributeError(
                    f"{type(self).__name__} has no field {name!r}; free-form values go into metadata"
                )

    def _assign(self, name: str, value: object) -> None:
        before, owner = self.__dict__, _owner_of(self)
        if owner is not None:
            if name == "session_id" and value != self.session_id:
                raise ValueError("a session keeps its session_id; Session.regenerate_id() gives a new one")
            owner.before_change()
        try:
            super().__setattr__(name, value)
        except Exception:
            object.__setattr__(self, "__dict__", before)  # pydantic assigns before it runs "after" validators
            raise
        if name == "metadata" and owner is not None:
            owner.replace_all(self.__dict__[name])
            vars(self)[name] = owner

    def __repr_args__(self) -> Iterator[tuple[str | None, Any]]:
        """What `repr` shows: crash reporters print locals, and a session's id is a password."""
        hidden = stored_only(type(self))
        for name, value in super().__repr_args__():
            if name == "metadata":
                yield name, _Hidden(f"<{dict.__len__(value)} keys>")
            elif name in type(self).__pydantic_fields__ and name not in hidden:
                yield name, value

    def __copy__(self) -> Self:
        copied = super().__copy__()
        if _owner_of(self) is not None:
            vars(copied)["metadata"] = dict(self.metadata)  # or the copy would change the session
        return copied


class _Hidden(str):
    """A text that stands for something else."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


M = TypeVar("M", bound=SessionData, default=SessionData, covariant=True)
"""The model of a handle or a store: `Session` alone in an annotation is `Session[SessionData]`."""


def stamp(data: SessionData, now: datetime | None = None) -> None:
    """Set `updated_at` and `last_activity` to `now` without validation, so validators may call it too.

    A clock that stands before the creation does not take `updated_at` there.
    """
    moment = utc_now() if now is None else to_utc(now)
    vars(data).update(updated_at=max(moment, data.created_at), last_activity=moment)
    data.__pydantic_fields_set__.update(("updated_at", "last_activity"))


def _owner_of(data: SessionData) -> Owner | None:
    """Whose metadata these are; None for a record of its own, whose metadata are a plain dict."""
    metadata: Any = data.__dict__.get("metadata")
    return metadata if hasattr(metadata, "before_change") else None


def _fingerprint(ip_address: str, user_agent: str) -> str:
    return hashlib.sha256(f"{ip_address}:{user_agent}".encode("utf-8", "surrogatepass")).hexdigest()


def _is_moment(value: object) -> bool:
    try:
        _ANY_MOMENT.validate_python(value)
    except ValueError:
        return False
    return True
