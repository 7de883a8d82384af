"""The four lines of a record: who reads which, and what is remembered of them."""

from __future__ import annotations

import json
from datetime import datetime, timezone
from typing import Annotated, Any

import pytest
from pydantic import BaseModel, Field, PlainSerializer, field_serializer, model_serializer

from asgi_sessions import SessionData
from asgi_sessions.record import codec
from asgi_sessions.record.codec import (
    MAX_NOTED,
    MAX_NOTED_BYTES,
    codec_of,
    counts_of,
    decode,
    encode_checked,
    id_of,
    user_of,
)
from asgi_sessions.record.lines import split, when_line
from asgi_sessions.record.read_back import MAX_BYTES, MAX_KEPT, ReadBack
from asgi_sessions.record.values import new_session_id


class Item(BaseModel):
    name: str


class Shop(SessionData):
    cart: list[Item] = Field(default_factory=list)


class OwnField(SessionData):
    colour: str = "red"

    @field_serializer("colour")
    def write_colour(self, value: str) -> str:
        return value


class OwnModel(SessionData):
    @model_serializer(mode="wrap")
    def write_it(self, handler: Any) -> Any:
        return handler(self)


class OwnTime(SessionData):
    created_at: Annotated[datetime, PlainSerializer(lambda value: value.isoformat())] = Field(
        default_factory=lambda: datetime.now(timezone.utc)
    )


def record_of(model: type[SessionData] = SessionData, **fields: Any) -> bytes:
    return encode_checked(model(session_id=new_session_id(), **fields))


@pytest.mark.parametrize("model", [SessionData, Shop])
def test_a_record_is_one_document_in_four_lines(model: type[SessionData]) -> None:
    """Line feeds within texts are escaped, so that each line is one part."""
    record = record_of(model, user_id="ada", metadata={"text": "a\nb", "\n": '"metadata":{'})
    who, when, fields, metadata = record.split(b"\n")
    assert list(json.loads(who[:-1] + b"}")) == ["session_id", "user_id", "created_at", "fingerprint"]
    assert list(json.loads(b"{%b}" % when[:-1])) == ["updated_at", "last_activity"]
    assert "message_count" in json.loads(b"{%b}" % fields[:-1])
    assert list(json.loads(b"{" + metadata)) == ["metadata"]
    assert json.loads(record)["metadata"] == {"text": "a\nb", "\n": '"metadata":{'}
    parts = split(record)
    assert parts is not None
    assert json.loads(parts.metadata) == {"text": "a\nb", "\n": '"metadata":{'}


@pytest.mark.parametrize("model", [OwnField, OwnModel, OwnTime])
def test_a_model_with_serialisers_of_its_own_keeps_one_line(model: type[SessionData]) -> None:
    """It decides how it is written as a whole; what another release wrote in lines it reads."""
    record = record_of(model, metadata={"a": 1})
    assert b"\n" not in record
    assert decode(model, record).metadata == {"a": 1}
    assert decode(model, record_of(metadata={"a": 1})).metadata == {"a": 1}


@pytest.mark.parametrize("model", [SessionData, Shop, OwnField])
def test_whose_it_is_is_read_from_any_layout(model: type[SessionData]) -> None:
    """In lines, in one line, and as another program writes it."""
    record = record_of(model, user_id="ada", message_count=3, escalated=True)
    found = json.loads(record)
    for text in (record, json.dumps(found).encode(), json.dumps(found, indent=1, sort_keys=True).encode()):
        assert (id_of(text), user_of(text)) == (found["session_id"], "ada")
        assert counts_of(text) == (3, True)


def test_a_cut_record_is_no_record() -> None:
    """Wherever it was cut; the lines that are whole may say whose it was, so that a sign-out ends it."""
    record = record_of(Shop, user_id="ada", metadata={"a": [1]})
    for end in range(len(record)):
        for model in (SessionData, Shop):
            with pytest.raises(ValueError, match="validation error"):
                decode(model, record[:end])
        assert id_of(record[:end]) in (None, id_of(record))
        assert user_of(record[:end]) in (None, "ada")
        assert counts_of(record[:end]) == (0, False)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"user_id":null,', b'"user_id":null,"message_count":1,'),
        (b'"message_count":0,', b'"message_count":0,"user_id":"eve",'),
        (b'"message_count":0,', b'"message_count":0,"metadata":{},'),
        (b'"updated_at":', b'"user_id":"eve","updated_at":'),
        (b'"last_activity":', b'"last_active":'),
        (b'"updated_at":"2', b'"updated_at":"1'),
        (b'"fingerprint":null,\n', b'"fingerprint":null\n,'),
        (b'{"session_id"', b'{ "session_id"'),
        (b'"metadata":{', b' "metadata":{'),
    ],
)
def test_lines_that_say_what_they_must_not_are_left_to_the_model(old: bytes, new: bytes) -> None:
    """A name on another line than its own, or another spelling: the model decides."""
    record = record_of().replace(old, new, 1)
    found = codec_of(SessionData).lines_of(record)
    if new == b'{ "session_id"':  # the first line is JSON all the same
        assert found is not None
        assert found[1].session_id == decode(SessionData, record).session_id
    else:
        assert found is None


def test_the_second_line_is_the_models() -> None:
    """Spelled as pydantic reads it, to the microsecond."""
    record = record_of()
    parts = split(record)
    assert parts is not None
    moment = datetime(2100, 5, 1, 12, 0, 0, 7, tzinfo=timezone.utc)
    nanoseconds = int(moment.timestamp()) * 1_000_000_000 + 7_999
    changed = record.replace(parts.when, when_line(nanoseconds))
    data = decode(SessionData, changed)
    assert data.updated_at == data.last_activity == moment


def test_what_is_remembered_of_lines_is_bounded() -> None:
    """Lines hold ids and fingerprints: old ones are forgotten."""
    for cache in (codec._lines, codec._who, codec._are_fields, codec._updated, codec._codec):
        assert cache.cache_info().maxsize in (256, MAX_NOTED, 1024)
    before = codec._lines.cache_info().currsize
    assert codec_of(SessionData).lines_of(record_of(metadata={"long": "x" * MAX_NOTED_BYTES})) is not None
    assert codec._lines.cache_info().currsize == before
    noted = codec_of(Shop)
    for number in range(MAX_NOTED + 10):
        noted.note(b'"n":%d,' % number)
        assert noted.is_noted(b'"n":%d,' % number)
    assert len(noted._noted) <= MAX_NOTED
    noted.note(b"x" * (MAX_NOTED_BYTES + 1))
    assert not noted.is_noted(b"x" * (MAX_NOTED_BYTES + 1))


def test_what_was_read_back_is_given_away_once() -> None:
    """And no more of it is kept than is said."""
    kept: ReadBack[int] = ReadBack()
    kept.keep("a", b"record", 1)
    assert (kept.take("a"), kept.take("a")) == (1, None)
    kept.keep("long", b"x" * (MAX_BYTES + 1), 1)
    assert len(kept) == 0
    for number in range(MAX_KEPT + 10):
        kept.keep(number, b"record", number)
        assert len(kept) <= MAX_KEPT
    assert kept.take(MAX_KEPT + 9) == MAX_KEPT + 9
