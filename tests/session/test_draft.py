"""The draft of a record: what counts as a change, what is stored then, and what is not kept too long."""

from __future__ import annotations

import gc
import json
import math
from datetime import datetime
from typing import Any
from weakref import ref

import pytest
from asgi import Browser, Site, page
from pydantic import BaseModel, Field
from pydantic_core import to_json

from asgi_sessions import Session, SessionData, SessionDataError
from asgi_sessions.record.codec import decode, encode_checked
from asgi_sessions.record.values import new_session_id
from asgi_sessions.session import draft
from asgi_sessions.session.changes import Change


class Item(BaseModel):
    name: str
    count: int = 0


class Aliased(BaseModel):
    name: str = Field(validation_alias="name", serialization_alias="nom")


class Shop(SessionData):
    cart: list[Item] = Field(default_factory=list)
    tags: set[str] = Field(default_factory=set)


class NewerShop(Shop):
    colour: str = "blue"


MODELS = [SessionData, Shop]
IDS = ["plain", "typed"]


def record_of(model: type[SessionData] = SessionData, **fields: Any) -> bytes:
    return encode_checked(model(session_id=new_session_id(), **fields))


def loaded(record: bytes, model: type[SessionData] = SessionData) -> Session:
    session = Session(model=model)
    session.load(record)
    return session


def stored(session: Session) -> bytes:
    """The record after a commit of what the session holds."""
    assert session.change() is not Change.NOTHING
    record = session.seal()
    session.committed(record, session.identity().user_id)
    return record


def one_line(record: bytes) -> bytes:
    """As earlier releases wrote it."""
    return json.dumps(json.loads(record), separators=(",", ":")).encode()


# -- the layout -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS, ids=IDS)
@pytest.mark.parametrize("looked", [False, True])
def test_an_old_record_changes_its_layout_with_its_next_change(
    model: type[SessionData], looked: bool
) -> None:
    """Not when it is read."""
    record = record_of(model, user_id="ada", metadata={"a": [1]})
    session = loaded(one_line(record), model)
    assert session["a"] == [1]
    if looked:
        assert session.data.user_id == "ada"
    assert session.change() is Change.NOTHING
    session["a"].append(2)
    lines, before = stored(session).split(b"\n"), record.split(b"\n")
    assert (lines[0], lines[2]) == (before[0], before[2])
    assert lines[3] == b'"metadata":{"a":[1,2]}}'
    assert session.change() is Change.NOTHING


def test_what_is_not_looked_at_goes_back_byte_by_byte() -> None:
    """Fields of another release too, on whatever line it put them and however it spells them."""
    record = record_of(Shop, cart=[Item(name="tea")], metadata={"a": 1})
    record = record.replace(b'"user_id":null,', b'"user_id":null,"signed_in_at": null ,', 1)
    record = record.replace(b'"message_count":0,', b'"message_count":0,"rate": 1.50,', 1)
    session = loaded(record)
    session["a"] = 2
    lines, before = stored(session).split(b"\n"), record.split(b"\n")
    assert (lines[0], lines[2]) == (before[0], before[2])
    assert lines[3] == b'"metadata":{"a":2}}'


@pytest.mark.parametrize("model", MODELS, ids=IDS)
def test_fields_of_another_release_survive_a_look(model: type[SessionData]) -> None:
    """Each is there once, whatever changes."""
    record = record_of(NewerShop, colour="red", metadata={"a": 1})
    record = record.replace(b'"user_id":null,', b'"user_id":null,"signed_in_at":"then",', 1)
    session = loaded(record, model)
    session.data.user_id = "ada"
    session["a"] = 2
    record = stored(session)
    pairs = json.loads(record, object_pairs_hook=lambda found: found)
    assert len(pairs) == len(dict(pairs))
    again = decode(NewerShop, record)
    assert (again.colour, again.user_id, again.metadata) == ("red", "ada", {"a": 2})
    assert again.model_extra == {"signed_in_at": "then"}


def test_unchanged_typed_lines_stay_as_they_were() -> None:
    """A change of one part leaves the others to the byte, though another release spelled them."""
    record = record_of(Shop, cart=[Item(name="tea")], metadata={"a": 1})
    record = record.replace(b'"name":"tea"', b'"name" : "tea"', 1)
    session = loaded(record, Shop)
    assert session.data.message_count == 0
    session["a"] = 2
    lines, before = stored(session).split(b"\n"), record.split(b"\n")
    assert (lines[0], lines[2]) == (before[0], before[2])
    session.data.cart[0].count = 1  # type: ignore[attr-defined]  # the model is Shop
    assert b'"name":"tea","count":1' in stored(session)


# -- what counts as a change ------------------------------------------------------------------------------


def test_sets_and_new_defaults_are_no_change() -> None:
    """Whatever order a set has when it is read, and whatever a release adds."""
    record = record_of(Shop, tags={"a", "b", "c", "d"}, metadata={"a": 1})
    for _ in range(3):
        session = loaded(record, NewerShop)
        assert len(session.data.tags) == 4  # type: ignore[attr-defined]  # the model is NewerShop
        assert session.change() is Change.NOTHING


def test_a_new_default_that_was_assigned_is_stored() -> None:
    """The app has chosen it, so a later release's other default does not count."""
    session = loaded(record_of(Shop, metadata={"a": 1}), NewerShop)
    session.data.colour = "blue"  # type: ignore[attr-defined]  # the model is NewerShop
    assert b'"colour":"blue"' in stored(session)
    assert session.change() is Change.NOTHING


@pytest.mark.parametrize("model", MODELS, ids=IDS)
def test_a_record_that_is_held_is_compared_after_another_load(model: type[SessionData]) -> None:
    """An app that took `data` before a transaction may change it without asking for it again."""
    session = loaded(record_of(model, metadata={"a": 1}), model)
    data = session.data
    session.load(record_of(model, metadata={"a": 1}))
    vars(data)["message_count"] = 7
    assert session.change() is Change.WRITE
    assert decode(model, session.seal()).message_count == 7


# -- nothing is stored that is out of date ----------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS, ids=IDS)
@pytest.mark.parametrize("looked", [False, True])
def test_a_second_seal_sees_what_changed_since_the_first(model: type[SessionData], looked: bool) -> None:
    """A commit that found the record gone seals again, after others of the request's tasks had their turn."""
    session = loaded(record_of(model, metadata={"a": [1]}), model)
    if looked:
        assert session.data.metadata is session
    session["a"].append(2)
    assert session.change() is Change.WRITE
    assert decode(model, session.seal()).metadata == {"a": [1, 2]}
    session["a"].append(3)
    if looked:
        vars(session.data)["message_count"] = 5
    again = decode(model, session.seal())
    assert again.metadata == {"a": [1, 2, 3]}
    assert again.message_count == (5 if looked else 0)


@pytest.mark.parametrize("model", MODELS, ids=IDS)
def test_another_id_is_in_the_record_though_it_was_encoded_before(model: type[SessionData]) -> None:
    """The id is given after the decision."""
    session = loaded(record_of(model, metadata={"a": 1}), model)
    assert session.data.user_id is None
    session["a"] = 2
    assert session.change() is Change.WRITE
    session.rename("another")
    session["a"] = 3
    again = decode(model, session.seal())
    assert (again.session_id, again.metadata) == ("another", {"a": 3})


@pytest.mark.parametrize("model", MODELS, ids=IDS)
def test_a_refused_proof_leaves_nothing_behind(model: type[SessionData]) -> None:
    """What was put right since is what is stored."""
    session = loaded(record_of(model, metadata={"a": 1}), model)
    session["a"] = {1}
    assert session.change() is Change.WRITE
    with pytest.raises(SessionDataError, match=r"metadata\.a"):
        session.seal()
    session["a"] = [1]
    assert decode(model, session.seal()).metadata == {"a": [1]}


def test_a_record_that_does_not_fit_the_apps_model_is_found_out_when_it_is_loaded() -> None:
    """The request gets a fresh session then, not an error at its first look."""
    record = record_of(Shop, cart=[Item(name="tea")]).replace(b'"name":"tea"', b'"title":"tea"', 1)
    session = Session(model=Shop)
    with pytest.raises(ValueError, match="name"):
        session.load(record)
    assert session.is_new


# -- what was read back -----------------------------------------------------------------------------------


@pytest.fixture(params=MODELS, ids=IDS)
def browser(request: pytest.FixtureRequest) -> Browser:
    return Site({"model": request.param}).browser()


@pytest.mark.anyio
async def test_what_an_app_keeps_is_not_the_next_requests(browser: Browser) -> None:
    """An app may go on with what it put in, or got out, of an earlier request."""
    kept: list[list[int]] = []

    def put(session: Session) -> None:
        kept.append([1])
        session["numbers"] = kept[0]

    def get(session: Session) -> None:
        kept.append(session["numbers"])
        session["seen"] = True  # committed, so that what was read back is kept once more

    await browser.open(page(put))
    kept[0].append(2)
    await browser.open(page(get))
    kept[1].append(3)
    await browser.open(page(get))
    assert kept == [[1, 2], [1, 3], [1]]


@pytest.mark.parametrize("model", MODELS, ids=IDS)
def test_two_who_load_a_record_share_nothing(model: type[SessionData]) -> None:
    """What the commit has read back is the first one's alone, and is as if it had been parsed."""
    session = loaded(record_of(model, metadata={"a": []}), model)
    session["a"].append({"b": None})
    record = stored(session)
    first, second = loaded(record, model), loaded(record, model)
    assert first == second == {"a": [{"b": None}]}
    first["a"][0]["b"] = 1
    assert second == {"a": [{"b": None}]}
    assert second.change() is Change.NOTHING
    assert first.data.to_dict() | {"metadata": {}} == second.data.to_dict() | {"metadata": {}}


@pytest.mark.parametrize(
    "values",
    [
        {"ä": "\u2028", "b": [1, -0.0, 1e300, None, True, (1, 2)], "c": {"d": {}}},
        {"inf": math.inf, "nan": math.nan},
        {1: 2, None: 3, False: 4, 1.5: 5},
        {"model": Item(name="tea"), "set": {1}, "bytes": b"x", "moment": datetime(2026, 1, 1)},
        {"aliased": Aliased(name="tea")},
    ],
    ids=["json", "no-numbers", "keys", "others", "aliased"],
)
def test_a_handle_is_written_as_a_dict_of_its_values(values: dict[Any, Any]) -> None:
    """And that is no access: an answer that does not depend on the session says no `Vary`."""
    session = Session(values)
    assert draft._encoded(session)[1] == to_json(values)
    assert not session.accessed


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, {"a": [math.inf]}], ids=str)
@pytest.mark.parametrize("model", MODELS, ids=IDS)
def test_a_loaded_session_takes_no_number_that_json_lacks(model: type[SessionData], value: Any) -> None:
    """An infinity would read back here, but not by every reader of JSON."""
    session = loaded(record_of(model), model)
    session["x"] = value
    assert session.change() is Change.WRITE
    with pytest.raises(SessionDataError):
        session.seal(as_decided=True)


# -- after the request ------------------------------------------------------------------------------------


def test_a_typed_session_leaves_no_garbage() -> None:
    """Handle and record know each other, and go together all the same."""
    session = loaded(record_of(Shop, metadata={"a": 1}), Shop)
    data = ref(session.data)
    session.let_go()
    del session
    assert data() is None
    gc.collect()


def test_a_record_that_an_app_holds_is_taken_back() -> None:
    """It stays one object, and one that nobody holds is made anew."""
    session = loaded(record_of(Shop, cart=[Item(name="tea")], metadata={"a": 1}), Shop)
    data = session.data
    session.let_go()
    assert session.data is data
    session.let_go()
    del data
    assert session.data.cart == [Item(name="tea")]  # type: ignore[attr-defined]  # the model is Shop
    assert session.data.metadata is session
