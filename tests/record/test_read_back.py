"""What a commit has read back is what the next request gets, and nobody else."""

from __future__ import annotations

from typing import Any

import pytest
from asgi import Browser, Site, page

from asgi_sessions import Session, SessionData
from asgi_sessions.record import plain
from asgi_sessions.record.codec import encode_checked
from asgi_sessions.record.plain import MAX_KEPT, MAX_KEPT_BYTES, PlainRecord, parse_plain
from asgi_sessions.record.values import new_session_id

pytestmark = pytest.mark.anyio


@pytest.fixture
def browser() -> Browser:
    return Site().browser()


@pytest.fixture(autouse=True)
def _nothing_kept() -> None:
    plain._read_back.clear()


def _record(**metadata: Any) -> bytes:
    return encode_checked(SessionData(session_id=new_session_id(), metadata=metadata))


def _parsed(record: bytes) -> PlainRecord:
    parsed = parse_plain(record)
    assert parsed is not None
    return parsed


def _committed(record: bytes, values: dict[str, Any]) -> bytes:
    """The record after a change that was stored."""
    parsed = _parsed(record)
    sealed = parsed.seal(lambda: values)
    assert sealed is not None
    parsed.committed(sealed)
    return sealed


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


def test_it_is_as_if_it_had_been_parsed() -> None:
    """Same values, same surroundings, and it seals alike."""
    sealed = _committed(_record(n=1), {"n": 2, "list": [{"a": None}]})
    first, again = _parsed(sealed), _parsed(sealed)
    names = ("metadata", "session_id", "user_id", "fingerprint", "_frame", "_json")
    assert [getattr(first, name) for name in names] == [getattr(again, name) for name in names]
    assert not first.differs(again.metadata)


def test_it_is_given_away_once() -> None:
    """Two who load the same record do not share their values."""
    sealed = _committed(_record(), {"list": []})
    first, second, third = (_parsed(sealed) for _ in range(3))
    assert first.metadata == second.metadata == third.metadata
    lists = [each.metadata["list"] for each in (first, second, third)]
    assert len({id(each) for each in lists}) == 3


def test_another_record_of_the_session_is_parsed() -> None:
    """What somebody else has stored since counts, whatever was read back here."""
    before = _record(n=1)
    sealed = _committed(before, {"n": 2})
    assert _parsed(before).metadata == {"n": 1}
    assert _parsed(sealed).metadata == {"n": 2}


def test_a_commit_that_failed_leaves_nothing() -> None:
    """Only what is stored is kept; a later commit of the same request keeps its own."""
    parsed = _parsed(_record())
    refused = parsed.seal(lambda: {"n": 1})
    stored = parsed.seal(lambda: {"n": 2})
    assert refused is not None
    assert stored is not None
    parsed.committed(stored)
    assert [_parsed(each).metadata for each in (refused, stored)] == [{"n": 1}, {"n": 2}]
    parsed.committed(stored)  # nothing was sealed since
    assert _parsed(stored).metadata == {"n": 2}
    assert plain._read_back == {}


def test_it_does_not_grow() -> None:
    """The latest are kept, and no long ones."""
    sealed = [_committed(_record(), {"n": n}) for n in range(MAX_KEPT + 10)]
    _committed(_record(), {"text": "x" * MAX_KEPT_BYTES})
    assert len(plain._read_back) == MAX_KEPT
    assert sealed[-1] in [kept[0] for kept in plain._read_back.values()]
    assert sealed[0] not in [kept[0] for kept in plain._read_back.values()]
