"""A store of somebody else's: what a newcomer writes works at first go, and what goes wrong is found out."""

from __future__ import annotations

import asyncio
import os
import re
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from asgi import Clock
from pydantic import Field

from asgi_sessions import SessionData, SessionMiddleware, SessionStore, SessionStoreError, get_session_data
from asgi_sessions.asgi import Message, Receive, Scope, Send
from asgi_sessions.record.codec import encode_checked
from asgi_sessions.record.values import new_session_id
from asgi_sessions.stores import checkouts
from asgi_sessions.stores.checkout import Checkout, Lifetime, LockPolicy, Missing, Outcome
from asgi_sessions.stores.local import LocalLocks, RetiredIds
from asgi_sessions.stores.value import Value
from asgi_sessions.testing.contract import StoreContract

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

# The folder is on the path only now, and pyright does not see that it is.
# pyright: reportMissingImports=false
from own_store import FileStore

pytestmark = pytest.mark.anyio

README = Path(__file__).parents[2] / "README.md"
LOCK = LockPolicy(wait=1)


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


async def take(store: SessionStore, session_id: str, policy: LockPolicy | None = LOCK) -> Checkout:
    taken = await store.checkout(session_id, policy, None)
    assert isinstance(taken, Checkout)
    return taken


# --- what newcomers write -------------------------------------------------------------------------


class DictStore(SessionStore):
    """The four primitives that must be, and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.values: dict[str, bytes] = {}

    async def read_value(self, session_id: str) -> bytes | None:
        return self.values.get(session_id)

    async def write_value(self, session_id: str, value: bytes, ttl: float) -> None:
        self.values[session_id] = value

    async def delete_value(self, session_id: str) -> None:
        self.values.pop(session_id, None)

    async def iter_ids(self) -> AsyncGenerator[str, None]:
        for session_id in list(self.values):
            yield session_id


class ExpiringStore(DictStore):
    """Forgets by itself, as backends with a time to live do."""

    def __init__(self) -> None:
        super().__init__()
        self.ends: dict[str, float] = {}

    async def read_value(self, session_id: str) -> bytes | None:
        return self.values.get(session_id) if self.ends.get(session_id, 0) > self.now() else None

    async def write_value(self, session_id: str, value: bytes, ttl: float) -> None:
        self.values[session_id], self.ends[session_id] = value, self.now() + ttl

    async def iter_ids(self) -> AsyncGenerator[str, None]:
        for session_id in list(self.values):
            if self.ends[session_id] > self.now():
                yield session_id


class ClockedContract(StoreContract):
    """The contract by a clock that the tests move."""

    @pytest.fixture
    def clock(self, monkeypatch: pytest.MonkeyPatch) -> Clock:
        """The time of all stores, and of the locks of those made from now on."""
        clock = Clock()
        monkeypatch.setattr(SessionStore, "now", lambda store: clock.now)
        monkeypatch.setattr(checkouts, "LocalLocks", lambda: LocalLocks(clock))
        return clock

    @pytest.fixture
    def let_time_pass(self, clock: Clock) -> Callable[[float], Awaitable[None]]:
        async def pass_(seconds: float) -> None:
            clock.now += seconds

        return pass_


class TestContractOfDictStore(ClockedContract):
    """Four primitives are enough: the rest of the contract comes with the base class."""

    @pytest.fixture
    def store(self, clock: Clock) -> DictStore:
        return DictStore()


class TestContractOfExpiringStore(ClockedContract):
    """A ttl is a help for the backend; who keeps it finds nothing amiss."""

    @pytest.fixture
    def store(self, clock: Clock) -> ExpiringStore:
        return ExpiringStore()


class TestContractOfFileStore(ClockedContract):
    """The example, on both event loops."""

    @pytest.fixture(params=["asyncio", "trio"])
    def anyio_backend(self, request: pytest.FixtureRequest) -> str:
        return str(request.param)

    @pytest.fixture
    def store(self, tmp_path: Path, clock: Clock) -> FileStore:
        return FileStore(tmp_path / "sessions")


async def test_files_outlive_the_process_and_go_when_they_have_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second store over the folder has the sessions; cleaning up leaves no file of those that are over."""
    clock = Clock()
    monkeypatch.setattr(FileStore, "now", lambda self: clock.now)
    first = FileStore(tmp_path)
    for name, ttl in (("short", 10), ("long", 1000)):
        await first.set(name, SessionData(session_id=name, user_id="ada"), ttl)
    (tmp_path / "left.new").write_bytes(b"by a process that died while it wrote")
    again = FileStore(tmp_path)
    assert await again.list_active() == ["long", "short"]
    clock.now += 10
    assert await again.cleanup_expired() == 1
    assert len(os.listdir(tmp_path)) == 2
    assert await again.delete_for_user("ada") == 1


async def test_a_folder_that_fails_is_a_fault_of_the_store(tmp_path: Path) -> None:
    """Not an `OSError`: the middleware answers 503."""
    store = FileStore(tmp_path)
    await store.set("a", SessionData(session_id="a"))
    file = tmp_path / os.listdir(tmp_path)[0]
    file.unlink()
    file.mkdir()
    for call in (store.get("a"), store.set("a", SessionData(session_id="a"))):
        with pytest.raises(SessionStoreError, match="a session's file cannot be read"):
            await call
    with pytest.raises(SessionStoreError, match="cannot be written"):
        await store.write_value("a", b"value", 60)
    with pytest.raises(SessionStoreError, match="cannot be removed"):
        await store.delete_value("a")


def snippet() -> str:
    """The store that README shows."""
    blocks: list[str] = re.findall(r"```python\n(.*?)```", README.read_text("utf-8"), re.DOTALL)
    return next(block for block in blocks if "(SessionStore):" in block)


class TestContractOfTheReadme(ClockedContract):
    """What README shows is a store, in less than 40 lines."""

    @pytest.fixture
    def store(self, clock: Clock) -> SessionStore:
        source = snippet()
        assert len(source.splitlines()) < 40
        names: dict[str, Any] = {}
        exec(source, names)
        store: SessionStore = names["MyStore"]({})
        return store


# --- what goes wrong, and is said so --------------------------------------------------------------


class CarelessStore(DictStore):
    """What the package's first version did with a third party's store: each step an await of its own."""

    async def value(self, session_id: str) -> Value | None:
        raw = await self.read_value(session_id)
        return None if raw is None else Value.unpack(raw)

    async def put(self, session_id: str, value: Value) -> None:
        await self.write_value(session_id, value.pack(), 3600)


class CarelessCommit(CarelessStore):
    async def commit(self, checkout: Checkout, record: bytes, *, release: bool) -> Outcome:
        value, outcome = await self.value(checkout.session_id), Outcome.GONE
        if value is not None:
            outcome = Outcome.STORED if value.version == checkout.version else Outcome.CONFLICT
            if outcome is Outcome.STORED:
                value.rewrite(record)
                await self.put(checkout.session_id, value)
        if release:
            await self.release(checkout)
        return outcome


class CarelessKeepAlive(CarelessStore):
    """Extends the life of whatever it has read, be it there or not."""

    async def keep_alive(self, checkout: Checkout) -> None:
        value = await self.value(checkout.session_id)
        if value is not None:
            value.touch(self.now())
            await self.put(checkout.session_id, value)


class CarelessSet(CarelessStore):
    async def set(
        self, session_id: str, data: SessionData, ttl: float | None = None, *, create: bool = True
    ) -> bool:
        value = await self.value(session_id)
        if value is None and not create:
            return False
        value = value or Value.new(b"", Lifetime(self.default_ttl if ttl is None else ttl), self.now())
        value.rewrite(encode_checked(data))
        await self.put(session_id, value)
        return True


class CarelessDelete(CarelessStore):
    async def delete(self, session_id: str) -> bool:
        there = await self.value(session_id) is not None
        await self.delete_value(session_id)
        return there


class CarelessCreate(CarelessStore):
    async def create(
        self,
        session_id: str,
        record: bytes,
        lifetime: Lifetime,
        lock: LockPolicy | None,
        user: str | None = None,
    ) -> Checkout | None:
        if await self.value(session_id) is not None:
            return None
        value = Value.new(record, lifetime, self.now())
        await self.put(session_id, value)
        return value.checkout(session_id, self.now(), None)


class CarelessMove(CarelessStore):
    """Does not hold the session that moves."""

    async def move(
        self,
        checkout: Checkout,
        session_id: str,
        record: bytes,
        *,
        lifetime: Lifetime | None,
        lock: LockPolicy | None,
        was: str | None,
        user: str | None,
        leads: bool = False,
    ) -> Outcome:
        value, outcome = await self.value(checkout.session_id), Outcome.GONE
        if value is not None:
            outcome = Outcome.STORED if value.version == checkout.version else Outcome.CONFLICT
            if outcome is Outcome.STORED:
                value.rewrite(record)
                await self.put(session_id, value)
                checkout.successor = value.checkout(session_id, self.now(), None)
                await self.delete_value(checkout.session_id)
        await self.release(checkout)
        return outcome


class ForgetfulMove(DictStore):
    """Does not wait until a sign-out of the session's user is over."""

    async def move(
        self,
        checkout: Checkout,
        session_id: str,
        record: bytes,
        *,
        lifetime: Lifetime | None,
        lock: LockPolicy | None,
        was: str | None,
        user: str | None,
        leads: bool = False,
    ) -> Outcome:
        return await super().move(
            checkout, session_id, record, lifetime=lifetime, lock=lock, was=None, user=user, leads=leads
        )


class Unready(DictStore):
    def __init__(self) -> None:
        self.values = {}


class CaseBlind(DictStore):
    """Names its files by the ids, on a system that does not tell capital letters from small ones."""

    async def read_value(self, session_id: str) -> bytes | None:
        return await super().read_value(session_id.lower())

    async def write_value(self, session_id: str, value: bytes, ttl: float) -> None:
        await super().write_value(session_id.lower(), value, ttl)


class TextStore(DictStore):
    """Gives something else than bytes."""

    async def read_value(self, session_id: str) -> bytes | None:
        found = await super().read_value(session_id)
        return None if found is None else memoryview(found)  # type: ignore[return-value]


class StrictStore(DictStore):
    """Raises where there is nothing to delete."""

    async def delete_value(self, session_id: str) -> None:
        del self.values[session_id]


class FirstTtl(ExpiringStore):
    """Keeps the time to live of the first write."""

    async def write_value(self, session_id: str, value: bytes, ttl: float) -> None:
        self.values[session_id] = value
        self.ends.setdefault(session_id, self.now() + ttl)


class ListingStore(DictStore):
    """`iter_ids` is no generator."""

    def iter_ids(self) -> AsyncGenerator[str, None]:
        return list(self.values)  # type: ignore[return-value]


class LiveList(DictStore):
    """Lists what changes under it."""

    async def iter_ids(self) -> AsyncGenerator[str, None]:
        for session_id in self.values:
            yield session_id


FOUND: list[tuple[type[DictStore], str, str]] = [
    (CarelessCommit, "no_acknowledged_change_is_lost", "hold the session while you read"),
    (CarelessCommit, "what_has_ended_does_not_come_back", "came back: hold the session"),
    (CarelessCommit, "set_is_not_undone_by_who_loaded_before", "an older record over a newer one: hold"),
    (CarelessKeepAlive, "what_has_ended_does_not_come_back", "came back: hold the session"),
    (CarelessSet, "what_has_ended_does_not_come_back", "came back: hold the session"),
    (CarelessDelete, "what_has_ended_does_not_come_back", "came back: hold the session"),
    (CarelessCreate, "get_or_create_gives_everybody_one_record", "over what another had created: hold"),
    (CarelessMove, "a_move_leaves_no_acknowledged_change_behind", "hold the session"),
    (CarelessMove, "a_move_does_not_bring_back_what_has_ended", "got a new id: hold the session"),
    (ForgetfulMove, "a_sign_out_ends_what_moves_meanwhile", "waits until a sign-out of its user is over"),
    (Unready, "the_base_class_is_made_ready", r"has to call super\(\).__init__\(\)"),
    (CaseBlind, "values_come_back_as_they_were_written", "another id's value lies under 'A'"),
    (TextStore, "values_come_back_as_they_were_written", "read_value gives bytes"),
    (StrictStore, "values_come_back_as_they_were_written", "delete_value does nothing where nothing is"),
    (FirstTtl, "a_value_lives_as_long_as_its_latest_ttl", "the ttl of an earlier write"),
    (ListingStore, "ids_are_listed_while_sessions_come_and_go", "an async function with `yield`"),
    (LiveList, "ids_are_listed_while_sessions_come_and_go", "bears changes"),
]


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize(
    ("kind", "promise", "message"), FOUND, ids=[f"{kind.__name__}-{promise}" for kind, promise, _ in FOUND]
)
async def test_the_contract_finds_out_what_a_store_does_wrong(
    kind: type[DictStore], promise: str, message: str
) -> None:
    """And says what it is; a store that does it right passes the same test."""
    test = getattr(StoreContract(), f"test_{promise}")
    arguments = [anyio.sleep] if promise == "a_value_lives_as_long_as_its_latest_ttl" else []
    await test(DictStore(), *arguments)
    with pytest.raises(AssertionError) as caught:
        await test(kind(), *arguments)
    assert re.search(message, str(caught.value)), str(caught.value)


class SlowStore(DictStore):
    """Its writes go on by themselves, as in a thread, whoever waits for them."""

    def __init__(self) -> None:
        super().__init__()
        self.begun = anyio.Event()
        self.ends = anyio.Event()

    async def write_value(self, session_id: str, value: bytes, ttl: float) -> None:
        async def write() -> None:
            self.begun.set()
            await self.ends.wait()
            self.values[session_id] = value

        await asyncio.shield(asyncio.ensure_future(write()))


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize("times", [1, 3])
async def test_a_write_that_was_begun_is_waited_for(times: int) -> None:
    """A request that is cancelled by asyncio's own means: its write never comes after a later one."""
    store = SlowStore()
    store.ends.set()
    await store.set("a", SessionData(session_id="a"))
    first, second = await take(store, "a"), await take(store, "a", None)
    store.begun, store.ends = anyio.Event(), anyio.Event()
    record = encode_checked(SessionData(session_id="a", metadata={"by": "first"}))
    late = asyncio.ensure_future(store.commit(first, record, release=True))
    await store.begun.wait()
    for _ in range(times):
        late.cancel()
        await anyio.wait_all_tasks_blocked()
    record = encode_checked(SessionData(session_id="a", metadata={"by": "second"}))
    other = asyncio.ensure_future(store.commit(second, record, release=True))
    await anyio.wait_all_tasks_blocked()
    store.ends.set()
    with pytest.raises(asyncio.CancelledError):
        await late
    outcome = await other
    await anyio.wait_all_tasks_blocked()
    data = await store.get("a")
    assert data is not None
    assert outcome is Outcome.CONFLICT, "it was compared with what was there before the write had ended"
    assert data.metadata == {"by": "first"}
    assert len(store._primitives._latches) == 0


async def test_visitors_sign_in_side_by_side() -> None:
    """Only the moves of a user who is signed out everywhere have to wait for one another."""

    class Meeting(DictStore):
        writers = 0

        async def write_value(self, session_id: str, value: bytes, ttl: float) -> None:
            self.writers += session_id.startswith("new")
            while self.writers == 1:
                await anyio.lowlevel.checkpoint()
            await super().write_value(session_id, value, ttl)

    store = Meeting()

    async def sign_in(name: str) -> None:
        await store.set(name, SessionData(session_id=name))
        taken = await take(store, name)
        record = encode_checked(SessionData(session_id=f"new-{name}", user_id=name))
        outcome = await store.move(
            taken, f"new-{name}", record, lifetime=Lifetime(60), lock=None, was=None, user=name
        )
        assert outcome is Outcome.STORED

    with anyio.fail_after(5):
        async with anyio.create_task_group() as group:
            group.start_soon(sign_in, "ada")
            group.start_soon(sign_in, "bob")


# --- under the middleware ----------------------------------------------------------------------


class Shop(SessionData):
    cart: list[str] = Field(default_factory=list)


@pytest.mark.parametrize(
    "options", [{}, {"idle_timeout": 60}, {"lock": False}, {"max_age": None, "rolling": False}]
)
async def test_a_third_partys_store_serves_requests(options: dict[str, Any]) -> None:
    """Under the middleware, with an idle timeout and a model of the user's, no increment is lost.

    Without the lock some are refused instead.
    """
    store = DictStore()
    refused: list[int] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        shop = get_session_data(scope, Shop)
        shop.cart.append("tea")
        if options.get("lock", True):
            await anyio.lowlevel.checkpoint()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    middleware = SessionMiddleware(app, "k" * 32, store=store, model=Shop, **options)

    async def request(cookie: bytes | None) -> bytes | None:
        sent: list[Message] = []

        async def send(message: Message) -> None:
            sent.append(message)

        async def receive() -> Message:
            return {"type": "http.request", "body": b""}

        headers = [] if cookie is None else [(b"cookie", cookie)]
        scope = {"type": "http", "method": "GET", "path": "/", "headers": headers, "client": None}
        await middleware(scope, receive, send)
        if not options.get("lock", True) and sent[0]["status"] == 409:
            refused.append(409)
            return None
        assert sent[0]["status"] == 200
        cookies = [value for name, value in sent[0]["headers"] if name == b"set-cookie"]
        return cookies[0].split(b";")[0] if cookies else None

    cookie = await request(None)
    async with anyio.create_task_group() as tasks:
        for _ in range(5):
            tasks.start_soon(request, cookie)
    (session_id,) = await store.list_active()
    data = await store.get(session_id)
    assert isinstance(data, Shop)
    assert len(data.cart) == 6 - len(refused)
    assert len(store._locks) == 0


async def test_a_third_partys_store_forgets_retired_ids() -> None:
    """The base class keeps them for a minute as the stores of this package do."""
    clock = Clock()
    store = DictStore()
    store._retired = RetiredIds(clock)
    for n in range(20):
        data = SessionData(session_id=f"s{n}")
        await store.set(data.session_id, data)
        taken, new_id = await take(store, f"s{n}"), new_session_id()
        record = encode_checked(SessionData(session_id=new_id))
        outcome = await store.move(taken, new_id, record, lifetime=None, lock=None, was=None, user=None)
        assert outcome is Outcome.STORED
        assert await store.checkout(f"s{n}", LOCK, None) is Missing.RETIRED
        clock.now += 10
        assert len(store._retired) <= 7
    clock.now += 60
    assert await store.checkout("s19", LOCK, None) is Missing.ABSENT
    assert len(store._retired) == 0
