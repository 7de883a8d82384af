"""What a session holds: a dict that is a record, and becomes typed when somebody looks at it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pydantic_core import from_json, to_json

from ..errors import SessionStoreError
from ..record.codec import decode, encode, encode_checked, misfit
from ..record.model import SessionData, stamp
from ..record.plain import PlainRecord, parse_plain
from ..record.values import LiveMetadata, new_session_id

_STAMPS = frozenset({"session_id", "created_at", "updated_at", "last_activity", "fingerprint", "metadata"})


class Content(LiveMetadata):
    """A dict that is the metadata of a record, and the record with it.

    A plain `SessionData` record stays as it is until its typed form is asked for: a handle that is used as a
    dict then costs half. A model with fields of its own is typed from the start, for only it can tell
    whether the record still fits. Once typed it stays one object: what an app does to it is never lost.
    """

    __slots__ = ("_data", "_model", "_plain", "_pristine", "client", "loaded", "stored_user")
    __hash__ = None  # type: ignore[assignment]  # as any dict

    def __init__(self, values: Any, model: type[SessionData], client: str | None) -> None:
        if values:
            super().__init__(values)
        self._model = model
        self.client = client  # the fingerprint of fresh records
        self._plain: PlainRecord | None = None  # the loaded record, until it is typed
        self._data: SessionData | None = None
        self._pristine = b""  # a record without content: as it was made or emptied
        self.loaded: bytes | None = None  # the stored record as it was loaded or last committed
        self.stored_user: str | None = None  # who is signed in in it

    def load(self, record: bytes) -> None:
        """Become the stored record; `ValueError` where it does not parse, nothing has changed then."""
        lazy = self._model is SessionData and self._data is None
        plain = parse_plain(record) if lazy else None
        if plain is None:
            data = decode(self._model, record)
            self._bind(data)
            self.stored_user = data.user_id
        else:
            dict.clear(self)
            dict.update(self, plain.metadata)
            self._plain = plain
            self.stored_user = plain.user_id
        self.loaded = record

    def committed(self, record: bytes, user_id: str | None) -> None:
        """Take note that the store holds `record`, which was sealed last, with this user in it.

        What the app has changed since then is a change still.
        """
        self.loaded, self.stored_user = record, user_id
        if self._plain is not None:
            self._plain.committed(record)

    def forget(self) -> None:
        """Become nothing: a fresh record is made when somebody looks."""
        dict.clear(self)
        self._plain = self.loaded = self.stored_user = None
        if self._data is not None:
            self._bind(self._fresh())

    def typed(self) -> SessionData:
        """The typed record, a fresh one where there is none. Its metadata is the handle."""
        if self._data is None:
            plain = self._plain
            self._data = self._fresh() if plain is None else self._typed_from(plain.sealed or self.loaded)
            vars(self._data)["metadata"] = self
            self._plain = None
        return self._data

    def stored_values(self) -> dict[str, Any]:
        """The values as the store has them, whatever the app did to them; {} where it has none."""
        if self._plain is not None:
            return self._plain.stored_values()
        return {} if self.loaded is None else from_json(self.loaded).get("metadata") or {}

    def as_read_back(self, names: Iterable[str]) -> dict[str, Any]:
        """These values as the store will give them back, a tuple as a list; as they are where it cannot."""
        values = {name: dict.__getitem__(self, name) for name in names}
        try:
            return from_json(to_json(values))  # type: ignore[no-any-return]  # a dict comes back as one
        except ValueError:
            return values

    def identity(self) -> PlainRecord | SessionData:
        """What has `session_id`, `user_id` and `fingerprint` as they are now, without typing for it."""
        return self._plain if self._plain is not None else self.typed()

    def rename(self, session_id: str) -> None:
        """Put the record under another id."""
        vars(self.typed())["session_id"] = session_id

    def empty(self, session_id: str | None) -> None:
        """Bring values and fields back to their defaults; with an id, as a new session of that id."""
        dict.clear(self)
        if self.loaded is None and self._data is None:
            return
        data = self.typed()
        fresh = self._model(session_id=session_id or data.session_id)
        if session_id is not None:
            self._mark(fresh)
        kept = _STAMPS if session_id is None else {"metadata"}
        vars(data).update({name: value for name, value in vars(fresh).items() if name not in kept})
        if data.__pydantic_extra__:
            data.__pydantic_extra__.clear()
        self._pristine = encode(data)

    def is_blank(self) -> bool:
        """Whether nothing but the defaults is in it."""
        if dict.__len__(self):
            return False
        if self._data is None and self._plain is None:
            return True
        if self._data is not None and not self._differs_from(self._pristine):
            return True
        data = self.typed()
        fields, pristine = type(data).model_fields, self._pristine
        fresh = decode(self._model, pristine) if pristine else self._model(session_id=data.session_id)
        return all(getattr(data, name) == getattr(fresh, name) for name in fields if name not in _STAMPS)

    def is_changed(self, flagged: bool) -> bool:
        """Whether it says something else than the record that was loaded.

        New defaults of a release are no change, unless the app is known (`flagged`) to have made one.
        """
        assert self.loaded is not None  # noqa: S101  # asked of a loaded record only
        if self._plain is None:
            return self._differs_from(self.loaded) and (flagged or self._differs_from(self._as_read()))
        try:
            return self._plain.differs(self._values())
        except ValueError:  # not storable, so it was changed; sealing says what is wrong
            return True

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
        if self._plain is not None:
            try:
                record = self._plain.seal(self._values)
            except ValueError:
                record = None  # the typed way says which value it was
            if record is not None:
                return record
        data = self.typed()
        stamp(data)
        return encode_checked(data)

    def _fresh(self) -> SessionData:
        fresh = self._model(session_id=new_session_id())
        self._mark(fresh)
        self._pristine = encode(fresh)
        return fresh

    def _mark(self, fresh: SessionData) -> None:
        if self.client is not None:
            vars(fresh)["fingerprint"] = self.client

    def _typed_from(self, record: bytes | None) -> SessionData:
        try:
            return decode(self._model, record or b"")
        except ValueError as error:
            raise SessionStoreError(str(misfit(self._model, error))) from error

    def _bind(self, data: SessionData) -> None:
        dict.clear(self)
        dict.update(self, vars(data)["metadata"])
        vars(data)["metadata"] = self
        self._plain = None
        if self._data is None:
            self._data = data
        else:
            _become(self._data, data)

    def _values(self) -> dict[str, Any]:
        """The values as an exact dict, which encodes fastest; other ways ask the handle's own methods."""
        return dict(dict.items(self))

    def _as_read(self) -> bytes:
        """The loaded record as this release would write it."""
        return encode(decode(self._model, self.loaded or b""))

    def _differs_from(self, record: bytes) -> bool:
        try:
            now = encode(self.typed())
        except ValueError:  # not storable, so it was changed; the commit will say what is wrong
            return True
        return now != record


def _become(record: SessionData, other: SessionData) -> None:
    """Give the record the content of another, which is not used any more."""
    for part in ("__dict__", "__pydantic_extra__", "__pydantic_fields_set__", "__pydantic_private__"):
        object.__setattr__(record, part, getattr(other, part))
