"""The draft of a record: what a request would store, typed when somebody looks at it."""

from __future__ import annotations

import time
from collections.abc import Collection
from typing import Any, TypeAlias
from weakref import ref

from pydantic_core import SchemaSerializer, core_schema, from_json, to_json

from ..errors import SessionStoreError
from ..record.codec import Image, Who, codec_of, encode, encode_checked, misfit
from ..record.json import MAX_METADATA_BYTES
from ..record.lines import Parts, join, split, when_line
from ..record.model import SessionData, stamp
from ..record.proof import holds, same
from ..record.read_back import ReadBack
from ..record.sighting import MOST_OF_ADDRESS, MOST_OF_AGENT, Client
from ..record.values import new_session_id
from .expiry import Expiry

_ATOMS = frozenset({str, int, float, bool, type(None)})
_STAMPS = frozenset({"session_id", "created_at", "updated_at", "last_activity", "fingerprint", "metadata"})

_lines_read_back: ReadBack[tuple[Parts, Who, dict[str, Any]]] = ReadBack()
_data_read_back: ReadBack[tuple[Parts, SessionData]] = ReadBack()

_Encoded: TypeAlias = "tuple[dict[str, Any], bytes, Image | None]"
"""What was encoded to decide whether the session has changed: the values, their JSON, the typed fields."""

_Sealed: TypeAlias = "tuple[Parts, dict[str, Any], Image | None, dict[str, Any] | SessionData | None]"
"""A record that is being stored; its values and, if it is typed, its image, to compare with once it is; and
what was read back, if nobody has that yet."""


# as `pydantic_core.to_json`, for a subclass of dict as fast as for a dict; the handle notes no look at it
_writer = SchemaSerializer(core_schema.dict_schema(), {"ser_json_inf_nan": "constants"})


def _encoded(live: dict[str, Any]) -> _Encoded:
    return dict(dict.items(live)), _writer.to_json(live, by_alias=True), None


class Draft:
    """What the store has of a session, and the typed record that takes its place.

    The free values are the handle's, a dict that each method is given: the record and the dict are one thing,
    yet neither keeps the other alive. A `SessionData` record stays in its lines until somebody looks at its
    fields: a handle that is used as a dict then costs half. A model of the app's own is typed when it is
    loaded, for only it can tell whether the record still fits. Once typed it stays one object: what an app
    does to it is never lost.
    """

    stored: Parts | None = None  # what the store has, as it was loaded or last committed
    stored_user: str | None = None  # who is signed in in it
    _data: SessionData | None = None
    _who: Who | None = None  # of the stored record, until it is typed
    _read: dict[str, Any]  # the stored values; may share nested ones with the handle
    _as_read: Image | None = None  # of the typed fields as the store has them, once somebody has looked
    _let_go: ref[SessionData] | None = None  # the typed record when the request is over
    _is_looked_at = False  # an app has the typed record
    is_assigned = False  # and has assigned a field of it since it was stored
    _encoded: _Encoded | None = None  # by the last `is_changed`
    _sealed: _Sealed | None = None  # for as long as it is not known whether the store has it
    _pristine = b""  # a record without content: as it was made or emptied
    expiry: Expiry | None = None  # the life that the app asked for, until it is stored

    def __init__(self, model: type[SessionData], client: str | None) -> None:
        self.model = model
        self._client = client  # the fingerprint of fresh records
        self._codec = codec_of(model)

    # -- what the store has -----------------------------------------------------------------------------

    def load(self, record: bytes, live: dict[str, Any]) -> None:
        """Become the stored record; `ValueError` where it does not parse, nothing has changed then."""
        parts = self._load_lines(record, live)
        if parts is None:
            kept = _data_read_back.take((self.model, record))
            parts, data = kept or (split(record), self._codec.decode(record))
            self._read, self.stored_user = data.metadata, data.user_id
            if parts is None or not self._codec.has_lines or data.__pydantic_extra__:  # extras: on any line
                parts = Parts(record, b"", b"", record, to_json(data.metadata))
            self._become(data, live)
            self._as_read = self._image_as_read(data, parts.fields) if self._is_looked_at else None
        self.stored, self._sealed, self.is_assigned = parts, None, False

    def committed(self, record: bytes, user_id: str | None) -> None:
        """Take note that the store holds `record`, which was sealed last, with this user in it.

        What the app has changed since then is a change still.
        """
        assert self._sealed is not None  # noqa: S101  # nothing is stored that was not sealed
        assert self._sealed[0].record is record  # noqa: S101  # and one commit is under way at a time
        self.stored, self._read, image, again = self._sealed
        self._as_read = image or self._as_read  # the latter of who looked since: at what was sealed
        self._sealed, self.is_assigned = None, False
        if isinstance(again, SessionData):
            _data_read_back.keep((self.model, record), record, (self.stored, again))
        elif again is not None and self._who is not None:
            _lines_read_back.keep(record, record, (self.stored, self._who, again))
        self.stored_user = user_id

    def detach(self) -> None:
        """Have no stored record: what is here would be a new one."""
        self.stored = self.stored_user = self._as_read = self._sealed = None

    def forget(self, live: dict[str, Any]) -> None:
        """Become nothing: a fresh record is made when somebody looks."""
        dict.clear(live)
        self.detach()
        self._who = self.expiry = None
        if self._data is not None:
            self._become(self._fresh(), live)

    def unlike_stored(self, live: dict[str, Any], names: Collection[str]) -> list[str]:
        """Which values of these names are not certainly the stored ones.

        An app may change a list or dict within.
        """
        there, read = dict.keys(live), {} if self.stored is None else self._read
        found = []
        for name in names:
            if name in there:
                value = dict.__getitem__(live, name)
                if type(value) not in _ATOMS or value != read.get(name, read):
                    found.append(name)
        return found

    def stored_values(self) -> dict[str, Any]:
        """The values as the store has them, whatever the app did to them; {} where it has none."""
        values: dict[str, Any] = {} if self.stored is None else from_json(self.stored.metadata)
        return values

    def read_back(self, live: dict[str, Any], names: Collection[str]) -> dict[str, Any]:
        """These values as the store will give them back, a tuple as a list; as they are where it cannot."""
        values = {name: dict.__getitem__(live, name) for name in names}
        try:
            return from_json(to_json(values))  # type: ignore[no-any-return]  # a dict comes back as one
        except ValueError:
            return values

    # -- the record -------------------------------------------------------------------------------------

    def typed(self, live: dict[str, Any]) -> SessionData:
        """The typed record, a fresh one where there is none. Its metadata is the handle."""
        if self._data is None:
            self.take_back()
        data = self._data
        if data is None:
            parts = self.stored if self._sealed is None else self._sealed[0]
            data = self._data = self._fresh() if parts is None else self._decoded(parts.record)
            vars(data)["metadata"] = live
            self._who = None
        self._is_looked_at = True
        if self._as_read is None and self.stored is not None:
            self._as_read = self._image_as_read(data, self.stored.fields)
        return data

    def let_go(self) -> None:
        """The request is over: the typed record lives on where an app holds it.

        Handle and record know each other. Without this they would stay until the next garbage collection.
        """
        if self._data is not None:
            self._let_go, self._data = ref(self._data), None

    def take_back(self) -> None:
        """The handle is used after its request; a typed record that is gone is made anew when needed."""
        if self._let_go is not None:
            self._data, self._let_go = self._let_go(), None
            if self._data is None:
                self._as_read, self._is_looked_at = None, False

    def identity(self, live: dict[str, Any]) -> Who | SessionData:
        """What has `session_id`, `user_id` and `fingerprint` as they are now, without typing for it."""
        if self._who is not None:
            return self._who
        return self._data if self._data is not None else self.typed(live)

    def rename(self, live: dict[str, Any], session_id: str) -> None:
        """Put the record under another id."""
        vars(self.typed(live))["session_id"] = session_id

    def note_client(self, live: dict[str, Any], user_agent: str, address: str) -> None:
        """Keep who signed in in the record."""
        client = Client(user_agent=user_agent[:MOST_OF_AGENT], address=address[:MOST_OF_ADDRESS])
        vars(self.typed(live))["client"] = client

    def empty(self, live: dict[str, Any], session_id: str | None) -> None:
        """Bring values and fields back to their defaults; with an id, as a new session of that id."""
        dict.clear(live)
        if self.stored is None and self._data is None:
            return
        data = self.typed(live)
        fresh = self.model(session_id=session_id or data.session_id)
        if session_id is not None:
            self._mark(fresh)
        kept = _STAMPS if session_id is None else {"metadata"}
        vars(data).update({name: value for name, value in vars(fresh).items() if name not in kept})
        if data.__pydantic_extra__:
            data.__pydantic_extra__.clear()
        self._pristine = encode(data)

    def snapshot(self, live: dict[str, Any]) -> bytes:
        """The record as it is now, for `restore`; `SessionDataError` where it could not be stored."""
        return encode_checked(self.typed(live))

    def restore(self, snapshot: bytes, live: dict[str, Any]) -> None:
        """Become what a snapshot says."""
        self._become(self._codec.decode(snapshot), live)

    # -- deciding, and what is stored then --------------------------------------------------------------

    def is_blank(self, live: dict[str, Any]) -> bool:
        """Whether nothing but the defaults is in it."""
        if dict.__len__(live):
            return False
        if self._data is None and self.stored is None:
            return True
        now, pristine = vars(self.typed(live)), self._pristine
        fresh = self._codec.decode(pristine) if pristine else self.model(session_id=now["session_id"])
        names = type(fresh).__pydantic_fields__.keys() - _STAMPS
        return all(same(now.get(name), vars(fresh).get(name)) for name in names)

    def is_changed(self, live: dict[str, Any]) -> bool:
        """Whether it says something else than the record that was loaded.

        New defaults of a release are no change, unless the app has assigned one.
        """
        stored = self.stored
        assert stored is not None  # noqa: S101  # asked of a loaded record only
        self._encoded = None
        try:
            image = self._codec.image(self._data) if self._data is not None and self._as_read else None
            json = _writer.to_json(live, by_alias=True)
        except ValueError:  # not storable, so it was changed; sealing says what is wrong
            return True
        has_other_fields = image is not None and (
            image != self._as_read or (self.is_assigned and image[1] != stored.fields)
        )
        if json == stored.metadata and not has_other_fields:
            return False
        values = dict(dict.items(live))
        self._encoded = values, json, image
        # nested values may be the same objects, and other programs write otherwise
        return has_other_fields or self._read != values or json != to_json(from_json(stored.metadata))

    def seal(self, live: dict[str, Any], *, as_decided: bool = False) -> bytes:
        """The record as it is to be stored, with the time of this change; `SessionDataError` if it cannot be.

        What is returned has been proven to read back as it is. What did not change is there byte by byte.
        With `as_decided` nothing has run since `is_changed`, and what that encoded is not encoded again.
        """
        encoded, self._encoded = self._encoded if as_decided else None, None
        sealed = self._seal_lines(live, encoded) if self._who is not None else None
        if sealed is None:
            sealed = self._seal_typed(self.typed(live), live, encoded)
        self._sealed = sealed
        return sealed[0].record

    def _seal_lines(self, live: dict[str, Any], encoded: _Encoded | None) -> _Sealed | None:
        """The record with other values; None where these are not storable beyond doubt."""
        stored, who = self.stored, self._who
        assert stored is not None  # noqa: S101  # a record that has lines was loaded
        assert who is not None  # noqa: S101  # the same
        try:
            values, json, _ = encoded or _encoded(live)
            again = from_json(json, allow_inf_nan=False)
            if len(json) > MAX_METADATA_BYTES or not holds(values, json, again):
                return None
        except ValueError:
            return None
        now = time.time_ns()
        if now < who.created_ns:  # the clock has stepped back
            return None
        return join(stored.who, when_line(now), stored.fields, json), values, None, again

    def _seal_typed(self, data: SessionData, live: dict[str, Any], encoded: _Encoded | None) -> _Sealed:
        """The record with this typed data; `SessionDataError`, which names the value, where it cannot be."""
        codec, stored, as_read = self._codec, self.stored, self._as_read
        stamp(data)
        try:
            values, json, image = encoded or _encoded(live)
            if image is None or not codec.has_lines:  # one line has the time of this change in it
                image = codec.image(data)
            now = codec.facts(data), image[1]  # with the time of this change
            who, fields = b"", image[1]
            if stored is not None and as_read is not None and stored.who:
                who = stored.who if codec.has_same_line(now, as_read) else b""
                fields = stored.fields if fields == as_read[1] and not self.is_assigned else fields
            parts = codec.write(data, who, fields, json)
        except ValueError:
            encode_checked(data)  # names the value
            raise
        again = codec.prove(data, values, parts)
        return parts, values, now, again if codec.is_steady and not again.__pydantic_extra__ else None

    # -- inside -----------------------------------------------------------------------------------------

    def _load_lines(self, record: bytes, live: dict[str, Any]) -> Parts | None:
        """Read the metadata alone; None where the model has to read the record, and to say what is wrong."""
        if self.model is not SessionData or self._data is not None:
            return None
        found = _lines_read_back.take(record) or self._parsed(record)
        if found is None:
            return None
        parts, who, values = found
        dict.clear(live)
        dict.update(live, values)
        self._read, self._who, self.stored_user = values, who, who.user_id
        return parts

    def _parsed(self, record: bytes) -> tuple[Parts, Who, dict[str, Any]] | None:
        found = self._codec.lines_of(record)
        if found is None:
            return None
        try:
            return *found, from_json(found[0].metadata)
        except ValueError:
            return None

    def _fresh(self) -> SessionData:
        fresh = self.model(session_id=new_session_id())
        self._mark(fresh)
        self._pristine = encode(fresh)
        return fresh

    def _mark(self, fresh: SessionData) -> None:
        if self._client is not None:
            vars(fresh)["fingerprint"] = self._client

    def _decoded(self, record: bytes) -> SessionData:
        try:
            return self._codec.decode(record)
        except ValueError as error:
            raise SessionStoreError(str(misfit(self.model, error))) from error

    def _image_as_read(self, data: SessionData, fields: bytes) -> Image:
        """The image of a record that nobody has changed since it was read."""
        codec = self._codec
        if codec.is_noted(fields):
            return codec.facts(data), fields
        image = codec.image(data)
        if image[1] == fields and codec.has_lines:
            codec.note(fields)
        return image

    def _become(self, data: SessionData, live: dict[str, Any]) -> None:
        """Have this typed record, under the identity of the one that an app may hold."""
        dict.clear(live)
        dict.update(live, vars(data)["metadata"])
        vars(data)["metadata"] = live
        self._who = None
        if self._data is None:
            self._data = data
            return
        for part in ("__dict__", "__pydantic_extra__", "__pydantic_fields_set__", "__pydantic_private__"):
            object.__setattr__(self._data, part, getattr(data, part))
