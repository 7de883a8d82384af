"""The user's own list of devices: who signed in from where, and the way to end one of the sessions."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterable
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from asgi import FIREFOX, KEY, Browser, Site, page
from pydantic import BaseModel

from asgi_sessions import Device, Session, SessionClosedError, SessionData, SessionMiddleware, SessionStore
from asgi_sessions.client.agent import UNKNOWN, _product, name_of
from asgi_sessions.record.codec import decode, encode
from asgi_sessions.record.sighting import Client, sighting_of

pytestmark = pytest.mark.anyio

WEBKIT = "AppleWebKit/537.36 (KHTML, like Gecko)"
CHROME = f"Mozilla/5.0 (Windows NT 10.0; Win64; x64) {WEBKIT} Chrome/131.0.0.0 Safari/537.36"
IPHONE = "(iPhone; CPU iPhone OS 18_1 like Mac OS X)"
SAFARI = f"Mozilla/5.0 {IPHONE} {WEBKIT} Version/18.1 Mobile/15E148 Safari/604.1"
CURL = "curl/8.5.0"


@pytest.fixture
def anyio_backend(way: str) -> str:
    return way


def _site(**options: Any) -> Site:
    return Site(options={"record_client": True, "fingerprint": None, **options})


async def _signed_in(site: Site, user: str = "ada", agent: str | None = FIREFOX) -> Browser:
    browser = site.browser()
    browser.user_agent = agent
    await browser.open(page(lambda session: session.login(user)))
    return browser


async def _client_of(browser: Browser) -> Client | None:
    data = await browser.site.store.get(browser.session_id)
    assert data is not None
    return data.client


async def _devices(browser: Browser) -> list[Device]:
    found: list[Device] = []

    async def look(session: Session) -> None:
        found.extend(await session.devices())

    await browser.open(page(look))
    return found


async def _end(browser: Browser, handle: Any) -> bool:
    told: list[bool] = []

    async def end(session: Session) -> None:
        told.append(await session.end_device(handle))

    await browser.open(page(end))
    return told[0]


# -- what is kept of a client ------------------------------------------------------------------------------


async def test_nothing_is_kept_unless_asked_for() -> None:
    """Off by default: an address is personal."""
    browser = await _signed_in(Site())
    assert await _client_of(browser) is None
    assert b"client" not in browser.site.raw(browser.session_id)


@pytest.mark.parametrize(
    "sign_in",
    [
        lambda session: session.login("ada"),
        lambda session: session.update(user="ada"),
        lambda session: (session.invalidate(), session.login("ada")),
    ],
    ids=["login", "rotate_on", "after an end"],
)
@pytest.mark.parametrize("begun", [False, True])
async def test_who_signs_in_is_kept(sign_in: Any, begun: bool) -> None:
    """By each way to sign in, in a new session and in one that was there."""
    browser = _site().browser()
    if begun:
        await browser.begin(n=1)
        assert await _client_of(browser) is None, "nobody has signed in"
    await browser.open(page(sign_in))
    assert await _client_of(browser) == Client(user_agent=FIREFOX, address="203.0.113.7")


async def test_it_is_the_client_of_the_sign_in() -> None:
    """A later request from elsewhere does not change it, nor does a new id."""
    browser = await _signed_in(_site())
    browser.user_agent = CURL
    await browser.open(page(lambda session: session.regenerate_id()), client=("192.0.2.1", 1))
    await browser.open(page(lambda session: session.update(n=1)), client=("192.0.2.1", 1))
    assert await _client_of(browser) == Client(user_agent=FIREFOX, address="203.0.113.7")


@pytest.mark.parametrize(
    ("agent", "scope", "kept"),
    [
        ("x" * 1000, {}, Client(user_agent="x" * 256, address="203.0.113.7")),
        (None, {"client": None}, Client()),
        ('caf\xe9 \x01"<script>', {}, Client(user_agent='caf\xc3\xa9 \x01"<script>', address="203.0.113.7")),
        (CURL, {"client": ("y" * 100, 1)}, Client(user_agent=CURL, address="y" * 64)),
        (
            CURL,
            {"client": ("10.0.0.1", 1), "headers": [(b"x-forwarded-for", b"198.51.100.9")]},
            Client(user_agent=CURL, address="198.51.100.9"),
        ),
    ],
    ids=["long", "none", "odd", "odd address", "behind a proxy"],
)
async def test_whatever_a_client_says(agent: str | None, scope: dict[str, Any], kept: Client) -> None:
    """It is stored, cut to what the record has room for."""
    browser = _site(trusted_proxies=["10.0.0.0/8"]).browser()
    browser.user_agent = agent
    answer = await browser.open(page(lambda session: session.login("ada")), **scope)
    assert answer.status == 200
    assert await _client_of(browser) == kept


async def test_what_is_kept_goes_into_no_answer() -> None:
    """As the fingerprint: a framework that returns the record does not tell it, and no log shows it."""
    data = SessionData(session_id="s", client=Client(user_agent=CURL, address="192.0.2.1"))
    assert "client" not in data.model_dump()
    assert "192.0.2.1" not in data.model_dump_json() + repr(data) + repr(data.client)
    assert data.to_dict()["client"] == {"user_agent": CURL, "address": "192.0.2.1"}
    assert SessionData.from_json(data.to_json()) == data


class Own(SessionData):
    """An app's model that had a field of this name before there was ours."""

    client: str = "acme"  # type: ignore[assignment]


def test_a_model_with_another_client() -> None:
    """It works as before, and the option says what to do."""
    SessionMiddleware(page(), KEY, model=Own)
    assert Own(session_id="s").model_dump()["client"] == "acme"
    assert "acme" in repr(Own(session_id="s"))
    with pytest.raises(ValueError, match=r"Own has another field of that name: rename it"):
        SessionMiddleware(page(), KEY, model=Own, record_client=True)
    with pytest.raises(TypeError, match="record_client is True or False"):
        SessionMiddleware(page(), KEY, record_client="yes")  # type: ignore[arg-type]


def test_a_record_of_such_a_model_reads_with_another() -> None:
    """An operator's script has no model: the record is read, and written back as it was."""
    record = encode(Own(session_id="s"))
    data = decode(SessionData, record)
    assert data.client == "acme"  # type: ignore[comparison-overlap]
    assert encode(data) == record
    sighting = sighting_of(record)
    assert sighting is not None
    assert sighting.user_agent == ""


# -- the list ----------------------------------------------------------------------------------------------


async def test_the_list_of_devices() -> None:
    """The current one first, then the latest; nobody else's."""
    site = _site()
    phone = await _signed_in(site, agent=SAFARI)
    await _signed_in(site, "eve", CURL)
    laptop = await _signed_in(site)
    unknown = await _signed_in(site, agent=None)
    await phone.open(page(lambda session: session.update(n=1)))
    found = await _devices(laptop)
    assert [(each.name, each.current) for each in found] == [
        ("Firefox on Linux", True), ("Mobile Safari on iOS", False), (UNKNOWN, False),
    ]  # fmt: skip
    assert [each.address for each in found] == ["203.0.113.7"] * 3
    assert found[1].created_at <= found[1].last_activity
    assert {each.handle for each in found} == {each.handle for each in await _devices(unknown)}
    assert not {phone.session_id, laptop.session_id} & {each.handle for each in found}


async def test_nobody_is_signed_in() -> None:
    """An empty list, and nothing to end."""
    site = _site()
    handle = (await _devices(await _signed_in(site)))[0].handle
    visitor = site.browser()
    assert await _devices(visitor) == []
    assert not await _end(visitor, handle)
    with pytest.raises(SessionClosedError):
        await Session().devices()


async def test_one_is_ended() -> None:
    """At once, also while it is used; the others stay."""
    site = _site()
    phone, laptop = await _signed_in(site, agent=SAFARI), await _signed_in(site)
    handles = [each.handle for each in await _devices(laptop)]
    assert await _end(laptop, handles[1])
    assert await phone.stored() is None
    assert [each.handle for each in await _devices(laptop)] == handles[:1]
    assert not await _end(laptop, handles[1]), "it has ended"


async def test_the_current_one_is_ended() -> None:
    """As by `invalidate()`: the cookie goes, too."""
    laptop = await _signed_in(_site())
    assert await _end(laptop, (await _devices(laptop))[0].handle)
    assert laptop.cookie is None
    assert laptop.site.records() == []


@pytest.mark.parametrize("given", ["", "x", "\udcff\u20ac", "0" * 10_000, None, 7, b"0" * 32])
async def test_what_is_no_handle(given: object) -> None:
    """Ends nothing, whatever it is."""
    laptop = await _signed_in(_site())
    assert not await _end(laptop, given)
    assert await laptop.stored() is not None


async def test_a_handle_of_somebody_else() -> None:
    """Is worth nothing, and neither is a session's id, nor the hash of it that is in the log."""
    site = _site()
    ada, eve = await _signed_in(site), await _signed_in(site, "eve")
    (device,) = await _devices(ada)
    assert not await _end(eve, device.handle)
    assert not await _end(ada, ada.session_id)
    assert await ada.stored() is not None


async def test_a_key_was_rotated() -> None:
    """A page that was made before still works; new pages have handles by the new key."""
    site = _site()
    phone, laptop = await _signed_in(site), await _signed_in(site)
    old = (await _devices(laptop))[1].handle
    rotated = site.option(secret_key="n" * 64, secret_key_fallbacks=[KEY])
    laptop.site = rotated
    assert (await _devices(laptop))[1].handle != old
    assert await _end(laptop, old)
    assert await phone.stored() is None


async def test_records_of_an_earlier_release() -> None:
    """Have no client, and are on the list."""
    site = _site()
    laptop = await _signed_in(site)
    record = site.raw(laptop.session_id)
    before, _, _ = record.partition(b'"client":')
    site.spoil(laptop.session_id, before + b'\n"metadata":{}}')
    assert [(each.name, each.address) for each in await _devices(laptop)] == [(UNKNOWN, "")]


@pytest.mark.parametrize(
    ("agent", "name"),
    [
        (CHROME, "Chrome on Windows"),
        (FIREFOX, "Firefox on Linux"),
        (CURL, "curl"),
        ("", UNKNOWN),
        ("\x00", UNKNOWN),
    ],
)
def test_names_by_ua_parser(agent: str, name: str) -> None:
    """As people call them."""
    assert name_of(agent) == name


@pytest.mark.parametrize(
    ("agent", "name"),
    [
        (CHROME, "Chrome"),
        (FIREFOX, "Firefox"),
        (SAFARI, "Safari"),
        (CHROME + " Edg/131.0.0.0", "Edg"),
        (CURL, "curl"),
        ("My-App/1.0 (iOS)", "My-App"),
        ("nothing of that kind", ""),
        ("", ""),
    ],
)
def test_names_without_it(agent: str, name: str) -> None:
    """The product's own name."""
    assert _product(agent) == name


# -- many --------------------------------------------------------------------------------------------------


class _Look(BaseModel):
    peak: int
    devices: int


@pytest.mark.parametrize("way", ["asyncio"])
async def test_a_user_with_thousands_of_sessions(store: SessionStore) -> None:
    """The list takes some hundred bytes for each; what the sessions hold is never there all at once."""
    count, size = 2000, 8000
    began = datetime(2026, 1, 1, tzinfo=timezone.utc)
    for start in range(0, count, 500):
        names = [f"s{number}" for number in range(start, start + 500)]
        await store.set_batch(
            {
                name: SessionData(
                    session_id=name,
                    user_id="ada",
                    metadata={"much": "x" * size},
                    created_at=began + timedelta(seconds=int(name[1:])),
                    client=Client(user_agent=f"{FIREFOX} {name}"),
                )
                for name in names
            }
        )
    site = _site(store=store)
    laptop = await _signed_in(site, agent=CURL)
    looks: list[_Look] = []

    async def look(session: Session) -> None:
        tracemalloc.start()
        found = await session.devices()
        looks.append(_Look(peak=tracemalloc.get_traced_memory()[1], devices=len(found)))
        tracemalloc.stop()
        assert found[0].current
        assert found[0].last_activity - began > timedelta(days=1)
        assert await session.end_device(found[-1].handle)

    await laptop.open(page(look))
    assert looks[0].devices == count + 1
    assert looks[0].peak < count * size / 2
    assert len(await store.list_for_user("ada")) == count


async def test_a_handle_outlives_an_id(way: str) -> None:
    """Of a page that is open while the other device gets a new id, earlier or in the middle of its end."""
    site = Site()
    here, there = site.browser(), site.browser()
    for each in (here, there):
        await each.open(page(lambda session: session.login("ada")))
    handles: list[str] = []

    async def look(session: Session) -> None:
        handles.extend(each.handle for each in await session.devices() if not each.current)

    async def end(session: Session) -> None:
        assert await session.end_device(handles[0])

    await here.open(page(look))
    await there.open(page(lambda session: session.regenerate_id()))
    delete_batch = site.store.delete_batch

    async def overtaken(session_ids: Iterable[str]) -> dict[str, bool]:
        site.store.delete_batch = delete_batch  # type: ignore[method-assign]
        await there.open(page(lambda session: session.regenerate_id()))
        return await delete_batch(session_ids)

    site.store.delete_batch = overtaken  # type: ignore[method-assign]
    assert (await here.open(page(end))).status == 200
    assert await there.stored() is None
