"""What a session holds: a record that is parsed at once and becomes typed when somebody looks at it."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import Any

from pydantic_core import from_json, to_json

from .data import SessionData, stamp
from .errors import SessionStoreError
from .fields import LiveMetadata, new_session_id, utc_now
from .record import MAX_METADATA_BYTES, decode, encode, encode_checked

_STAMPS = frozenset({"session_id", "created_at", "updated_at", "last_activity", "fingerprint", "metadata"})
_TEXT_OR_NONE = (str, type(None))
_CHECK_DEPTH_FROM = 100  # a record shorter than this many brackets cannot be nested too deeply


class Content:
    """The record behind a handle, whose dict is its metadata.

    A plain `SessionData` record stays a parsed dict until its typed form is asked for: a handle that is used
    as a dict then costs half. A model with fields of its own is typed from the start, for only it can tell
    whether the record still fits. Once typed it stays one object: what an app does to it is never lost.
    """

    __slots__ = ("_data", "_handle", "_model", "_prepare", "_pristine", "_top", "_values", "loaded")

    def __init__(self, handle: LiveMetadata, model: type[SessionData]) -> None:
        self._handle = handle
        self._model = model
        self._prepare: Callable[[SessionData], None] | None = None
        self._values: dict[str, Any] | None = None  # the parsed record, until it is typed
        self._top: dict[str, Any] = {}  # the metadata's first level as it was parsed
        self._data: SessionData | None = None
        self._pristine = b""  # a record without content: as it was made or emptied
        self.loaded: bytes | None = None  # the stored record as it was loaded or last committed

    def prepared_by(self, prepare: Callable[[SessionData], None]) -> None:
        """Let `prepare` finish each fresh record."""
        self._prepare = prepare

    def load(self, record: bytes) -> None:
        """Become the stored record; `ValueError` where it does not parse, nothing has changed then."""
        lazy = self._model is SessionData and self._data is None
        values = _parse_plain(record) if lazy else None
        if values is None:
            self._bind(decode(self._model, record))
        else:
            self._top = values["metadata"]
            self._fill(self._top)
            self._values = values
        self.loaded = record

    def committed(self, record: bytes) -> None:
        """Take note that `record`, sealed just now, is what the store holds."""
        self.loaded = record
        if self._values is not None:
            self._top = dict(dict.items(self._handle))

    def forget(self) -> None:
        """Become nothing: a fresh record is made when somebody looks."""
        dict.clear(self._handle)
        self._values = self.loaded = None
        if self._data is not None:
            self._bind(self._fresh())

    def typed(self) -> SessionData:
        """The typed record, a fresh one where there is none. Its metadata is the handle."""
        if self._data is None:
            self._data = self._fresh() if self._values is None else self._typed_from(self.loaded)
            self._data.__dict__["metadata"] = self._handle
            self._values = None
        return self._data

    def peek(self, field: str) -> Any:
        """A field's value as it is now, without making the record typed."""
        return self._values[field] if self._values is not None else getattr(self.typed(), field)

    def rename(self, session_id: str) -> None:
        """Put the record under another id."""
        self.typed().__dict__["session_id"] = session_id

    def empty(self, session_id: str | None) -> None:
        """Bring values and fields back to their defaults; with an id, as a new session of that id."""
        dict.clear(self._handle)
        if self.loaded is None and self._data is None:
            return
        data = self.typed()
        fresh = self._model(session_id=session_id or data.session_id)
        if session_id is not None and self._prepare is not None:
            self._prepare(fresh)
        kept = _STAMPS if session_id is None else {"metadata"}
        data.__dict__.update({name: value for name, value in fresh.__dict__.items() if name not in kept})
        if data.__pydantic_extra__:
            data.__pydantic_extra__.clear()
        self._pristine = encode(data)

    def is_blank(self) -> bool:
        """Whether nothing but the defaults is in it."""
        if dict.__len__(self._handle):
            return False
        if self._data is None and self._values is None:
            return True
        if self._data is not None and not self._differs_from(self._pristine):
            return True
        data = self.typed()
        fields, pristine = type(data).model_fields, self._pristine
        fresh = decode(self._model, pristine) if pristine else self._model(session_id=data.session_id)
        return all(getattr(data, name) == getattr(fresh, name) for name in fields if name not in _STAMPS)

    def is_changed(self) -> bool:
        """Whether it says something else than the record that was loaded. New defaults are no change."""
        assert self.loaded is not None  # noqa: S101  # asked of a loaded record only
        if self._values is not None and dict.__ne__(self._top, self._handle):
            return True  # seen without encoding; what looks equal may still be nested, or True for 1
        if not self._differs_from(self.loaded):
            return False
        lazy = self._values is not None  # and somebody else may have written it in his own way
        return self._differs_from(
            to_json(from_json(self.loaded)) if lazy else encode(decode(self._model, self.loaded))
        )

    def snapshot(self) -> bytes:
        """The record as it is now, for `restore`; `SessionDataError` where it could not be stored."""
        return encode_checked(self.typed())

    def restore(self, snapshot: bytes) -> None:
        """Become what a snapshot says."""
        self._bind(decode(self._model, snapshot))

    def seal(self) -> bytes:
        """The record as it is to be stored, with the time of this change; `SessionDataError` if it cannot be.

        What is returned has been proven to read back as it is.
        """
        if self._values is not None:
            record = _seal_plain(self._plain(self._values), utc_now())
            if record is not None:
                return record
        data = self.typed()
        stamp(data)
        return encode_checked(data)

    def _fresh(self) -> SessionData:
        fresh = self._model(session_id=new_session_id())
        if self._prepare is not None:
            self._prepare(fresh)
        self._pristine = encode(fresh)
        return fresh

    def _typed_from(self, record: bytes | None) -> SessionData:
        try:
            return decode(self._model, record or b"")
        except ValueError as error:
            raise SessionStoreError("the session's record cannot be read") from error

    def _bind(self, data: SessionData) -> None:
        self._fill(data.__dict__["metadata"])
        data.__dict__["metadata"] = self._handle
        self._values = None
        if self._data is None:
            self._data = data
        else:
            _become(self._data, data)

    def _fill(self, values: dict[str, Any]) -> None:
        if dict.__len__(self._handle):
            dict.clear(self._handle)
        dict.update(self._handle, values)

    def _plain(self, values: dict[str, Any]) -> dict[str, Any]:
        """The parsed record with the handle's values of now, as the exact dict that encodes fastest."""
        values["metadata"] = dict(dict.items(self._handle))  # a copy of the handle would ask its methods
        return values

    def _differs_from(self, record: bytes) -> bool:
        try:
            now = encode(self.typed()) if self._values is None else to_json(self._plain(self._values))
        except ValueError:  # not storable, so it was changed; the commit will say what is wrong
            return True
        return now != record


def _become(record: SessionData, other: SessionData) -> None:
    """Give the record the content of another, which is not used any more."""
    for part in ("__dict__", "__pydantic_extra__", "__pydantic_fields_set__", "__pydantic_private__"):
        object.__setattr__(record, part, getattr(other, part))


def _parse_plain(record: bytes) -> dict[str, Any] | None:
    """The parsed record if it is what this release writes; None where only the model can tell."""
    values: dict[str, Any] = from_json(record)
    if type(values) is not dict:
        return None
    get = values.get
    plain = (
        type(get("metadata")) is dict
        and type(get("session_id")) is type(get("created_at")) is str
        and type(get("updated_at")) is type(get("last_activity")) is str
        and type(get("message_count")) is int
        and 0 <= values["message_count"] <= 100_000
        and type(get("escalated")) is bool
        and type(get("user_id", 0)) in _TEXT_OR_NONE
        and type(get("fingerprint", 0)) in _TEXT_OR_NONE
    )
    return values if plain else None


def _seal_plain(values: dict[str, Any], now: datetime) -> bytes | None:
    """The stamped record if it is beyond doubt; None where the typed way has to decide or to explain."""
    stamped = f"{now.isoformat()[:-6]}Z"
    if stamped[:19] <= values["created_at"][:19]:  # its first second, or a clock that went back
        return None
    before = values["updated_at"], values["last_activity"]
    values["updated_at"] = values["last_activity"] = stamped
    try:
        record: bytes = to_json(values, inf_nan_mode="constants")
        if len(record) <= MAX_METADATA_BYTES and record.count(b"[") + record.count(b"{") < _CHECK_DEPTH_FROM:
            again = from_json(record)
            if again == values:
                return record
    except ValueError:
        pass  # the typed way says which value it was
    values["updated_at"], values["last_activity"] = before
    return None
