"""Records that are not what they should be: parts exchanged, cut, of another model, of another format.

None of them destroys a good session: what cannot be read is left alone, and its client is anonymous.
"""

from __future__ import annotations

import json
from itertools import combinations

import pytest
from asgi import Answer, Browser, Site, page
from pydantic import BaseModel

from asgi_sessions import InMemorySessionStore, Session, SessionData
from asgi_sessions.record.lines import split

pytestmark = pytest.mark.anyio

PARTS = ("who", "when", "fields", "last")


class Item(BaseModel):
    """A nested model."""

    name: str = "nothing"


class Cart(SessionData):
    """An app's own model."""

    items: list[Item] = []  # noqa: RUF012  # pydantic copies defaults


@pytest.fixture
def anyio_backend(way: str) -> str:
    """Each kind of store that needs no server."""
    return way


@pytest.fixture(params=[SessionData, Cart], ids=["plain", "typed"])
def site(way: str, request: pytest.FixtureRequest) -> Site:
    return Site({"model": request.param})


async def begun(site: Site, name: str, number: int) -> Browser:
    browser = site.browser()

    def fill(session: Session) -> None:
        session.update(name=name, number=number)
        session.data.thread_id = f"thread-of-{name}"
        if isinstance(session.data, Cart):
            session.data.items.append(Item(name=name))

    await browser.open(page(fill))
    return browser


async def reads(browser: Browser) -> dict[str, object]:
    """What an app sees."""
    seen: dict[str, object] = {}

    def look(session: Session) -> None:
        seen.update(session, is_new=session.is_new, thread=session.data.thread_id)
        if isinstance(session.data, Cart):
            seen.update(items=[item.name for item in session.data.items])

    await browser.open(page(look))
    return seen


def exchanged(one: bytes, other: bytes, names: tuple[str, ...]) -> bytes:
    """The record that has these lines from the other one."""
    lines, others = one.split(b"\n"), other.split(b"\n")
    return b"\n".join(
        theirs if name in names else mine for name, mine, theirs in zip(PARTS, lines, others, strict=True)
    )


CHOICES = [names for size in range(1, 5) for names in combinations(PARTS, size)]


@pytest.mark.parametrize("names", CHOICES, ids="+".join)
async def test_parts_of_two_sessions_exchanged(site: Site, names: tuple[str, ...]) -> None:
    """What is remembered of a line by its bytes never makes a record read as another one does.

    A record with another session's first line bears that one's id: it is not read and not touched.
    """
    ada, bob = await begun(site, "ada", 1), await begun(site, "bob", 2)
    before = await reads(ada), await reads(bob)  # now all their parts are known
    records = [site.raw(each.session_id) for each in (ada, bob)]
    mixed = exchanged(records[0], records[1], names)
    assert split(mixed) is not None
    site.spoil(ada.session_id, mixed)
    seen = await reads(ada.twin())
    if "who" in names:
        assert seen["is_new"]
        assert "name" not in seen
        assert site.events[-1] == "unreadable_record"
        assert site.raw(ada.session_id) == mixed
    else:
        told = json.loads(mixed)
        assert seen["name"] == told["metadata"]["name"]
        assert seen["thread"] == told["thread_id"]
        assert not seen["is_new"]
    assert await reads(bob) == before[1]
    site.spoil(ada.session_id, records[0])
    assert await reads(ada) == before[0]


async def test_a_record_cut_anywhere_is_left_alone(site: Site) -> None:
    """And the session is whole again when its record is."""
    ada = await begun(site, "ada", 1)
    before, whole = await reads(ada), site.raw(ada.session_id)
    for end in range(len(whole)):
        site.spoil(ada.session_id, whole[:end])
        answer: Answer = await ada.twin().open(page(lambda session: session.get("name")))
        assert answer.status == 200
        assert site.raw(ada.session_id) == whole[:end]
    site.spoil(ada.session_id, whole)
    assert await reads(ada) == before


@pytest.mark.parametrize("way", ["asyncio"], indirect=True)
async def test_a_record_of_another_model_is_left_alone(site: Site) -> None:
    """A middleware whose model cannot read it gives an anonymous session; the other one goes on with it."""
    ada = await begun(site, "ada", 1)
    record, before = site.raw(ada.session_id), await reads(ada)
    stranger = ada.twin(site=Site({"store": site.store, "model": Readable}))
    seen = await reads(stranger)
    if b'"items"' in record:
        assert seen["is_new"]
        assert stranger.site.events[-1] == "unreadable_record"
    else:
        assert seen["name"] == "ada"  # it has nothing that the other model could not read
    assert site.raw(ada.session_id) == record
    assert await reads(ada) == before
    assert isinstance(site.store, InMemorySessionStore)


class Readable(SessionData):
    """Another app's model with a field of the same name and another type."""

    items: dict[str, int] = {}  # noqa: RUF012  # pydantic copies defaults


@pytest.mark.parametrize("raw", [b"", b"null", b"[]", b'"text"', b"{}", b"\xff\xfe", b"asgi9:" + b"0" * 60])
async def test_what_is_no_record_of_ours_is_left_alone(site: Site, raw: bytes) -> None:
    ada = await begun(site, "ada", 1)
    site.spoil(ada.session_id, raw)
    assert (await reads(ada.twin()))["is_new"]
    assert site.raw(ada.session_id) == raw
