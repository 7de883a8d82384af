"""Encryption at rest: in every store, through the middleware and by the store's own operations."""

from __future__ import annotations

import sys
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from anyio import to_thread
from asgi import KEY, Answer, Browser, PrimitiveStore, Site, page
from pydantic import field_serializer
from redis.asyncio import Redis

from asgi_sessions import (
    InMemorySessionStore,
    RedisSessionStore,
    Session,
    SessionData,
    SessionFilter,
    SessionMiddleware,
    SessionStore,
    SessionStoreError,
    SQLiteSessionStore,
)
from asgi_sessions.cli import main
from asgi_sessions.client.signer import CookieSigner
from asgi_sessions.record.codec import encode_checked
from asgi_sessions.record.vault import NoKeyError, Vault, is_sealed
from asgi_sessions.stores.checkout import Checkout, LockPolicy
from asgi_sessions.stores.sqlite.queries import ids_of

pytestmark = pytest.mark.anyio

NEW, OLD = "ab" * 32, b"o" * 32
VICTIM, THIEF = "a" * 32, "b" * 32
SECRET = "4111-1111-1111-1111"


class Shop(SessionData):
    """Its record has one line, because it has a serialiser of its own."""

    cart: list[str] = []  # noqa: RUF012  # pydantic copies defaults

    @field_serializer("cart")
    def _as_list(self, cart: list[str]) -> list[str]:
        return list(cart)


class Stores:
    """Stores over the same records, each with keys of its own, as processes of a rolling deploy have them."""

    def __init__(self, kind: str, place: str) -> None:
        self.kind, self.place = kind, place
        self.made: list[SessionStore] = []
        self._values: dict[str, bytes] = {}

    def with_keys(self, *keys: str | bytes) -> SessionStore:
        store: SessionStore
        if self.kind == "redis":
            store = RedisSessionStore(self.place, encryption_keys=keys)
        elif self.kind == "sqlite":
            store = SQLiteSessionStore(self.place, encryption_keys=keys)
        elif self.kind == "memory":
            store = InMemorySessionStore(encryption_keys=keys)
            if self.made:
                first: Any = self.made[0]
                store._table, store._entries, store._locks = first._table, first._entries, first._locks
        else:
            store = primitive = PrimitiveStore(clock=lambda: 1000.0)
            primitive._values = self._values
            store.encrypt(keys)
        self.made.append(store)
        return store

    async def everything(self) -> bytes:
        """All that lies in the store, its indexes included."""
        if self.kind == "redis":
            async with Redis.from_url(self.place) as raw:
                found: list[bytes] = []
                keys: list[Any] = await raw.keys("*")
                for key in keys:
                    kind = await raw.type(key)
                    value: Any = raw.get(key) if kind == b"string" else raw.zrange(key, 0, -1)
                    found += [key, repr(await value).encode()]
                return b"\n".join(found)
        if self.kind == "sqlite":
            folder = Path(self.place).parent
            return b"\n".join(path.read_bytes() for path in folder.glob("sessions.db*") if path.is_file())
        if self.kind == "memory":
            first: Any = self.made[0]
            values = [entry.record for entry in first._entries.values()]
            return b"\n".join([*values, *(user.encode() for user in first._table.users)])
        return b"\n".join(self._values.values())


@pytest.fixture(params=["memory", "sqlite", "redis", "four primitives"])
async def stores(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Stores]:
    place = str(tmp_path / "sessions.db")
    if request.param == "redis":
        place = request.getfixturevalue("redis_url")
    stores = Stores(request.param, place)
    yield stores
    for store in stores.made:
        await store.aclose()


class Visit:
    """A browser at a middleware over one of the stores."""

    def __init__(self, store: SessionStore, **options: Any) -> None:
        self.events: list[str] = []
        self.site = Site()
        options = {"store": store, "on_event": lambda event: self.events.append(event.name), **options}
        self.site.middleware = SessionMiddleware(self.site._app, KEY, **options)
        self.site.store = store  # type: ignore[assignment]  # one that is not recorded
        self.browser = self.site.browser()

    def at(self, store: SessionStore, **options: Any) -> Visit:
        """The same browser elsewhere."""
        other = Visit(store, **options)
        other.browser = Browser(other.site, {}, self.browser.cookie)
        return other

    async def open(self, act: Any = None, **scope: Any) -> Answer:
        return await self.browser.open(page(act), **scope)

    async def values(self) -> dict[str, Any]:
        seen: dict[str, Any] = {}
        await self.open(lambda session: seen.update(session))
        return seen


def sign_in(session: Session) -> None:
    session["card"] = SECRET
    session.login("ada@example.com")


async def test_what_lies_there_tells_nothing(stores: Stores) -> None:
    """Neither values nor users, in records or in indexes; all else works as it does without keys."""
    store = stores.with_keys(NEW)
    visit, other = Visit(store), Visit(store)
    for each in (visit, other):
        await each.open(lambda session: session.update(n=0))
        await each.open(sign_in)
        await each.open(lambda session: session.update(n=session["n"] + 1))
    assert await visit.values() == {"card": SECRET, "n": 1}
    there = await stores.everything()
    assert SECRET.encode() not in there
    assert b"ada@" not in there
    assert {data.metadata["n"] for data in await store.list_for_user("ada@example.com")} == {1}
    found = await store.find(SessionFilter(user_id="ada@example.com"))
    assert {data.user_id for data in found} == {"ada@example.com"}
    assert len(found) == 2
    await other.open(lambda session: session.logout())
    assert await store.delete_for_user("ada@example.com") == 1
    assert await visit.values() == {}
    assert await store.count_active() == 0


async def test_operations_of_the_store(stores: Stores) -> None:
    """They take and give readable records."""
    store = stores.with_keys(NEW)
    data = SessionData(session_id="s", user_id="ada@x", metadata={"card": SECRET})
    assert await store.set("s", data)
    assert await store.update("s", {"n": 1})
    assert await store.increment_counter("s", "message_count", 2) == 2
    found = await store.get("s")
    assert found is not None
    assert (found.metadata, found.message_count) == ({"card": SECRET, "n": 1}, 2)
    assert (await store.get_metrics()).total_messages == 2
    made = await store.get_or_create("t", lambda name: SessionData(session_id=name, user_id="ada@x"))
    assert [each.session_id for each in await store.list_for_user("ada@x")] == ["s", made.session_id]
    assert await store.set_batch({"u": SessionData(session_id="u", user_id="ada@x")}) == {"u": True}
    async with store.transaction("u") as held:
        assert held is not None
        held.user_id = "bob@x"
    assert [each.session_id for each in await store.list_for_user("bob@x")] == ["u"]
    assert await store.delete_for_user("ada@x", keep="t") == 1
    there = await stores.everything()
    assert not any(text in there for text in (SECRET.encode(), b"ada@", b"bob@"))


@pytest.mark.parametrize("options", [{}, {"lock": "auto"}, {"lock": False}, {"read_only": "*"}], ids=str)
async def test_what_is_read_is_encrypted(stores: Stores, options: dict[str, Any]) -> None:
    """A record from before there were keys; its user is known by it before and after."""
    plain = Visit(stores.with_keys())
    await plain.open(sign_in)
    store = stores.with_keys(NEW)
    assert len(await store.list_for_user("ada@example.com")) == 1
    visit = plain.at(store, **options)
    assert SECRET.encode() in await stores.everything()
    assert (await visit.values())["card"] == SECRET
    assert visit.events == []
    if stores.kind != "sqlite":  # freed pages keep what was there for a while
        assert SECRET.encode() not in await stores.everything()
    taken = await store.checkout(visit.browser.session_id, None, None)
    assert isinstance(taken, Checkout)
    assert is_sealed(taken.record)
    assert len(await store.list_for_user("ada@example.com")) == 1
    assert await store.delete_for_user("ada@example.com") == 1
    assert await visit.values() == {}


async def test_signed_out_before_it_is_encrypted(stores: Stores) -> None:
    """A sign-out finds those of before, and those by an older key."""
    await Visit(stores.with_keys()).open(sign_in)
    await Visit(stores.with_keys(OLD)).open(sign_in)
    await Visit(stores.with_keys(NEW, OLD)).open(sign_in)
    assert await stores.with_keys(NEW, OLD).delete_for_user("ada@example.com") == 3


async def test_keys_rotate(stores: Stores) -> None:
    """A new key comes first; what is read is encrypted by it, and the old one can go."""
    visit = Visit(stores.with_keys(OLD))
    await visit.open(sign_in)
    between = visit.at(stores.with_keys(NEW, OLD))
    assert (await between.values())["card"] == SECRET
    await between.open(lambda session: session.regenerate_id())
    last = between.at(stores.with_keys(NEW))
    assert (await last.values())["card"] == SECRET
    assert await stores.made[-1].delete_for_user("ada@example.com") == 1


async def test_a_transaction_after_a_new_key(stores: Stores) -> None:
    """It encrypts the record anew, and the user is found by the new name: a sign-out ends the session."""
    visit = Visit(stores.with_keys(OLD))
    await visit.open(sign_in)
    store = stores.with_keys(NEW, OLD)
    assert await store.update(visit.browser.session_id, {"n": 1})
    assert len(await store.list_for_user("ada@example.com")) == 1
    assert (await visit.at(store).open(lambda session: session.regenerate_id())).status == 200
    assert await store.delete_for_user("ada@example.com") == 1


async def test_a_cookie_that_is_sent_again(stores: Stores) -> None:
    """The link to the user, which is renewed with it, does not name them."""
    store = stores.with_keys(NEW)
    visit = Visit(store, rolling=True)
    await visit.open(sign_in)
    signer, name = CookieSigner(KEY), visit.browser.session_id
    visit.browser.cookie = signer.sign(name, int(time.time()) - 600_000)
    assert len((await visit.open()).cookies) == 1
    assert b"ada@" not in await stores.everything()
    assert await store.delete_for_user("ada@example.com") == 1


@pytest.mark.parametrize("keys", [(), (NEW,)], ids=["no key", "another key"])
async def test_a_key_that_is_gone(stores: Stores, keys: tuple[str, ...]) -> None:
    """The record is unreadable: kept, with an event; the client has a fresh session meanwhile."""
    visit = Visit(stores.with_keys(OLD))
    await visit.open(sign_in)
    store = stores.with_keys(*keys)
    stranger = visit.at(store)
    assert await stranger.values() == {}
    assert stranger.events == ["unreadable_record"]
    with pytest.raises(SessionStoreError):
        await store.get(visit.browser.session_id)
    assert await store.list_for_user("ada@example.com") == []
    assert (await visit.at(stores.with_keys(NEW, OLD)).values())["card"] == SECRET


async def test_a_record_of_another_session(stores: Stores) -> None:
    """One that somebody with access to the store copied over another one does not read."""
    store = stores.with_keys(NEW)
    for name in (VICTIM, THIEF):
        await store.set(name, SessionData(session_id=name, user_id=name))
    taken = [await store.checkout(name, LockPolicy(), None) for name in (VICTIM, THIEF)]
    assert isinstance(taken[0], Checkout)
    assert isinstance(taken[1], Checkout)
    await store.commit(taken[1], taken[0].record, release=True)
    thief = Visit(store)
    thief.browser.cookie = CookieSigner(KEY).sign(THIEF)
    answer = await thief.open(lambda session: session.update(seen=session.data.user_id))
    assert answer.status in (200, 503)
    assert thief.events in (["unreadable_record", "session_created"], ["store_error"])


@pytest.mark.parametrize("model", [SessionData, Shop])
@pytest.mark.parametrize("user", [None, "ada"])
def test_a_vault(model: type[SessionData], user: str | None) -> None:
    """What goes in comes out, and nothing else does."""
    vault = Vault([NEW, OLD])
    record = encode_checked(model(session_id="s", user_id=user, metadata={"a": "\n\"'é"}))
    for plain in (record, record.replace(b"\n", b"")):
        stored = vault.seal("s", plain)
        assert stored != vault.seal("s", plain)
        assert vault.open("s", stored) == plain
        assert vault.is_current(stored)
        assert not Vault([OLD, NEW]).is_current(stored)
        for at in range(0, len(stored) - 2, 7):
            changed = stored[:at] + bytes([stored[at] ^ 1]) + stored[at + 1 :]
            with suppress(NoKeyError):
                assert vault.open("s", changed) in (plain, changed)  # the readable part is no secret
        with pytest.raises(NoKeyError):
            vault.open("t", stored)
    assert not vault.is_current(record)
    assert vault.open("s", record) == record


@pytest.mark.parametrize("key", ["", "short", b"b" * 31, b"b" * 33, "zz" * 32, 7, None])
def test_a_key_of_another_length(key: Any) -> None:
    """It is refused with the remedy."""
    with pytest.raises(ValueError, match=r"32 bytes.*secrets"):
        InMemorySessionStore(encryption_keys=[NEW, key])
    with pytest.raises(ValueError, match="32 bytes"):
        SessionMiddleware(page(), KEY, encryption_keys=[key])


def test_keys_that_are_no_collection() -> None:
    """One key is put into a list."""
    with pytest.raises(TypeError, match=r"\[key\]"):
        InMemorySessionStore(encryption_keys=NEW)


async def test_the_command_line_knows_the_keys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By a variable of the environment: keys in arguments are seen by all users of the machine."""
    stores = Stores("sqlite", str(tmp_path / "sessions.db"))
    await Visit(stores.with_keys(NEW)).open(sign_in)
    await stores.made[0].aclose()
    url = f"sqlite:///{tmp_path}/sessions.db"
    for keys, ended in (("", 0), (f"{'cd' * 32}, {NEW}", 1)):
        monkeypatch.setenv("ASGI_SESSIONS_ENCRYPTION_KEYS", keys)
        assert await to_thread.run_sync(main, ["logout", url, "ada@example.com"]) == 0
        assert capsys.readouterr().out == f"{ended} sessions ended\n"


def test_middlewares_that_share_a_store() -> None:
    """They have the same keys, or leave them to each other."""
    store = InMemorySessionStore()
    SessionMiddleware(page(), KEY, store=store, encryption_keys=[NEW, OLD])
    SessionMiddleware(page(), KEY, store=store, encryption_keys=[NEW.upper(), OLD])
    SessionMiddleware(page(), KEY, store=store)
    with pytest.raises(ValueError, match="the same encryption_keys"):
        SessionMiddleware(page(), KEY, store=store, encryption_keys=[OLD])


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error says what to install."""
    monkeypatch.setitem(sys.modules, "cryptography.exceptions", None)
    with pytest.raises(ImportError, match=r"asgi-server-sessions\[encryption\]"):
        InMemorySessionStore(encryption_keys=[NEW])


def test_a_search_by_all_names_of_a_user() -> None:
    """It is still one that an index answers."""
    query, values = ids_of(SessionFilter(user_id="ada"), ["one", "two"], 5.0)
    assert "user_id IN (?, ?)" in query
    assert values == ["one", "two", 5.0]
