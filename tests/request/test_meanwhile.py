"""What a task of a request does to the session while another task's commit is under way is not lost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import anyio
import pytest
from anyio.lowlevel import checkpoint
from asgi import Browser, Clock, RecordingStore, Site, page

from asgi_sessions import Session, SessionClosedError, SessionData, SessionError, SessionStoreError
from asgi_sessions.asgi import Receive, Scope, Send
from asgi_sessions.stores.checkout import Missing

pytestmark = pytest.mark.anyio

Change = Callable[[Session], object]


class UndoneError(Exception):
    """Raised in a block to roll it back."""


class MeddledStore(RecordingStore):
    """Does something once while the next commit is under way: before it is carried out, or after.

    `then` comes before it too, when other tasks have had their turn.
    """

    def __init__(self, log: list[str], clock: Clock) -> None:
        super().__init__(log, clock)
        self.first: Callable[[], object] | None = None
        self.then: Callable[[], object] | None = None
        self.last: Callable[[], object] | None = None

    async def before(self, call: str) -> None:
        await super().before(call)
        meanwhile, self.first = self.first, None
        if meanwhile is not None:
            meanwhile()
        await checkpoint()
        meanwhile, self.then = self.then, None
        if meanwhile is not None:
            meanwhile()

    async def after(self, call: str) -> None:
        meanwhile, self.last = self.last, None
        if meanwhile is not None:
            meanwhile()
        await checkpoint()


WAYS: dict[str, dict[str, Any]] = {
    "locked": {}, "read-only": {"read_only": "*"}, "optimistic": {"lock": "auto"},
}  # fmt: skip


@pytest.fixture
def anyio_backend(way: str) -> str:
    """On both event loops in memory, and over a store of four primitives."""
    return way


@pytest.fixture
def site(model: type[SessionData], anyio_backend: str) -> Site:
    return Site({"model": model}, MeddledStore)


@pytest.fixture
def store(site: Site) -> MeddledStore:
    assert isinstance(site.store, MeddledStore)
    return site.store


@pytest.fixture
def browser(site: Site) -> Browser:
    return site.browser()


def end(session: Session) -> None:
    session.logout()


def end_and_begin(session: Session) -> None:
    session.logout()
    session["flash"] = "bye"


SAVED: dict[str, Change] = {
    "write": lambda session: session.update(n=1),
    "login": lambda session: session.login("bob"),
    "regenerate": Session.regenerate_id,
    "end": end,
    "end and begin": end_and_begin,
    "clear": Session.clear,
}
MEANWHILE: dict[str, Change] = {
    "write": lambda session: session.update(late=True),
    "login": lambda session: session.login("ada"),
    "sign in by value": lambda session: session.update(user="ada"),
    "regenerate": Session.regenerate_id,
    "end": end,
    "end and begin": end_and_begin,
}


@pytest.mark.parametrize("when", ["first", "last"])
@pytest.mark.parametrize("meanwhile", MEANWHILE)
@pytest.mark.parametrize("saved", SAVED)
@pytest.mark.parametrize("lock", [True, "auto"])
async def test_what_is_wanted_during_a_save_is_done_by_the_next_commit(
    browser: Browser, store: MeddledStore, saved: str, meanwhile: str, when: str, lock: bool | str
) -> None:
    """A sign-in, a new id and an end are not forgotten with what was under way, nor is a value.

    With `lock="auto"` a save that waits for the lock first may do it as well.
    """
    old = await browser.begin(n=0)
    browser.site = browser.site.option(lock=lock)
    between: list[str] = []

    async def act(session: Session) -> None:
        SAVED[saved](session)
        setattr(store, when, lambda: MEANWHILE[meanwhile](session))
        await session.save()
        between.extend(record.session_id for record in browser.site.records())

    assert (await browser.open(page(act))).status == 200
    assert browser.site.locks == 0
    gone = saved in ("end", "clear")
    if meanwhile == "end" or (gone and meanwhile == "regenerate"):
        assert browser.site.records() == []
        assert browser.cookie is None
        return
    (record,) = browser.site.records()
    assert await store.get(browser.session_id) == record, "the client's cookie leads to what is stored"
    together = lock == "auto" and saved == "clear"  # emptied and filled before the lock had come: a change
    if meanwhile != "write" or not (saved == "write" or together):
        assert browser.session_id != old
    if meanwhile != "write" and (lock is True or saved == "write"):
        assert browser.session_id not in between, "the id before it is dead"
    assert record.metadata == expected_values(saved, meanwhile)
    assert record.user_id == ("ada" if meanwhile == "login" else expected_user(saved, meanwhile))
    if record.user_id is not None:
        assert await store.delete_for_user(record.user_id) == 1, "the index knows of it"


def expected_values(saved: str, meanwhile: str) -> dict[str, object]:
    if meanwhile == "end and begin":
        return {"flash": "bye"}
    base: dict[str, object] = {"n": 1 if saved == "write" else 0}
    if saved in ("end", "clear", "end and begin"):
        base = {"flash": "bye"} if saved == "end and begin" else {}
    if meanwhile == "write":
        base["late"] = True
    elif meanwhile == "sign in by value":
        base["user"] = "ada"
    return base


def expected_user(saved: str, meanwhile: str) -> str | None:
    return "bob" if saved == "login" and meanwhile != "end and begin" else None


@pytest.mark.parametrize("when", ["first", "last"])
@pytest.mark.parametrize("meanwhile", MEANWHILE)
async def test_what_is_wanted_while_a_session_begins(
    browser: Browser, store: MeddledStore, meanwhile: str, when: str
) -> None:
    """The new session is moved, signed in or ended like any other; nothing is left of the first id."""

    async def act(session: Session) -> None:
        session["n"] = 0
        setattr(store, when, lambda: MEANWHILE[meanwhile](session))
        await session.save()

    assert (await browser.open(page(act))).status == 200
    assert browser.site.locks == 0
    if meanwhile == "end":
        assert (browser.site.records(), browser.cookie) == ([], None)
        return
    (record,) = browser.site.records()
    assert await store.get(browser.session_id) == record
    if meanwhile == "login":
        assert await store.delete_for_user("ada") == 1


@pytest.mark.parametrize("wanted", ["login", "regenerate", "end"])
async def test_what_a_commit_did_not_do_is_still_wanted(
    browser: Browser, store: MeddledStore, wanted: str
) -> None:
    """A fault before anything was done: the next commit gives the new id, or ends the session."""
    old = await browser.begin(n=0)

    def fail() -> None:
        raise SessionStoreError("the backend is down")

    async def act(session: Session) -> None:
        MEANWHILE[wanted](session)
        store.first = fail
        with pytest.raises(SessionStoreError):
            await session.save()

    assert (await browser.open(page(act))).status == 200
    assert await store.get(old) is None
    assert (browser.cookie is None) is (wanted == "end")


async def test_a_look_at_the_record_during_the_last_commit_is_no_change(
    browser: Browser, store: MeddledStore
) -> None:
    """It becomes typed while the commit is under way, which alone asks for no other commit."""
    await browser.begin(n=0)

    async def act(session: Session) -> None:
        session["n"] = 1
        store.first = lambda: session.data.user_id
        await session.release()

    assert (await browser.open(page(act))).status == 200
    assert await browser.stored() == {"n": 1}
    assert browser.site.log.count("commit+release") == 1


# -- transactions in transactions -------------------------------------------------------------------------


async def test_a_part_that_outlives_its_roll_back_brings_nothing_back(browser: Browser) -> None:
    """A task that was begun in a block goes on in a transaction of its own when the block has failed."""
    await browser.begin(n=0)

    async def part(session: Session) -> None:
        async with session.transaction() as data:
            data.metadata["part"] = True
            await undone.wait()
            raise UndoneError

    async def failing_part(session: Session) -> None:
        with pytest.raises(UndoneError):
            await part(session)

    async def whole(session: Session, group: anyio.abc.TaskGroup) -> None:
        async with session.transaction() as data:
            data.metadata["whole"] = True
            group.start_soon(failing_part, session)
            await anyio.wait_all_tasks_blocked()
            raise UndoneError

    async def act(session: Session) -> None:
        async with anyio.create_task_group() as group:
            with pytest.raises(UndoneError):
                await whole(session, group)
            undone.set()

    undone = anyio.Event()
    assert (await browser.open(page(act))).status == 200
    assert await browser.stored() == {"n": 0}


async def test_a_part_whose_whole_was_rolled_back_is_told(browser: Browser) -> None:
    """It is not stored, and does not disturb the transaction that has begun since."""
    await browser.begin(n=0)
    told: list[SessionError] = []

    async def part(session: Session) -> None:
        try:
            async with session.transaction() as data:
                data.metadata["part"] = True
                await undone.wait()
        except SessionClosedError as error:
            told.append(error)
        ended.set()

    async def whole(session: Session, group: anyio.abc.TaskGroup) -> None:
        async with session.transaction():
            group.start_soon(part, session)
            await anyio.wait_all_tasks_blocked()
            raise UndoneError

    async def another(session: Session) -> None:
        async with session.transaction() as data:
            undone.set()
            await ended.wait()
            assert session.unit is not None
            session.unit.require_writable()
            data.metadata["another"] = True
            raise UndoneError

    async def act(session: Session) -> None:
        async with anyio.create_task_group() as group:
            with pytest.raises(UndoneError):
                await whole(session, group)
            with pytest.raises(UndoneError):
                await another(session)

    undone, ended = anyio.Event(), anyio.Event()
    assert (await browser.open(page(act))).status == 200
    assert len(told) == 1
    assert await browser.stored() == {"n": 0}


@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)
async def test_a_stores_update_takes_part_in_the_transaction_around_it(
    browser: Browser, store: MeddledStore, options: dict[str, Any]
) -> None:
    """Beside another part too: it waits for that one, not for the lock that its own block holds."""
    await browser.begin(n=0)
    visitor = Browser(browser.site.option(lock_wait=0.5, **options), {}, browser.cookie)

    async def act(session: Session) -> None:
        async def part() -> None:
            async with session.transaction():
                begun.set()
                await anyio.wait_all_tasks_blocked()

        async def update() -> None:
            await begun.wait()
            assert await store.update(session.session_id, {"updated": True})

        async with session.transaction(), anyio.create_task_group() as group:
            group.start_soon(part)
            group.start_soon(update)

    begun = anyio.Event()
    assert (await visitor.open(page(act))).status == 200
    assert await browser.stored() == {"n": 0, "updated": True}


async def test_a_transaction_that_met_a_fault_counts_once_when_it_is_tried_again(
    browser: Browser, store: MeddledStore
) -> None:
    """The fault has undone it in the handle, so that the second try begins where the first did."""
    await browser.begin(n=0)

    def fail() -> None:
        raise SessionStoreError("the backend is down")

    async def count(session: Session) -> None:
        async with session.transaction() as data:
            data.metadata["n"] += 1

    async def act(session: Session) -> None:
        store.first = fail
        with pytest.raises(SessionStoreError):
            await count(session)
        await count(session)

    assert (await browser.open(page(act))).status == 200
    assert await browser.stored() == {"n": 1}


async def test_a_transaction_that_ended_the_session_is_undone_by_a_fault(
    browser: Browser, store: MeddledStore
) -> None:
    """The app went on: the session it answers from is the one that is there."""
    old = await browser.begin(n=0)

    def fail() -> None:
        raise SessionStoreError("the backend is down")

    async def act(session: Session) -> None:
        store.first = fail
        with pytest.raises(SessionStoreError):
            async with session.transaction():
                session.logout()
        session["n"] = 1

    assert (await browser.open(page(act))).status == 200
    assert browser.session_id == old
    assert await browser.stored() == {"n": 1}
    assert await store.checkout(old, None, None) is not Missing.RETIRED


# -- blocks and saves ---------------------------------------------------------------------------------------


async def test_a_block_that_begins_during_a_save_takes_back_its_own_changes_only(
    browser: Browser, store: MeddledStore
) -> None:
    """What the request changed before it, after the save began, is stored with the answer."""
    await browser.begin(n=0)

    async def undone(session: Session) -> None:
        async with session.transaction() as data:
            data.metadata["undone"] = True
            await saved.wait()
            raise UndoneError

    async def act(session: Session) -> None:
        async def go_on() -> None:
            await saving.wait()
            session["between"] = True
            with pytest.raises(UndoneError):
                await undone(session)

        store.first = saving.set
        session["n"] = 1
        async with anyio.create_task_group() as group:
            group.start_soon(go_on)
            await session.save()
            saved.set()

    saving, saved = anyio.Event(), anyio.Event()
    assert (await browser.open(page(act))).status == 200
    assert await browser.stored() == {"n": 1, "between": True}


@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)
async def test_a_block_that_fails_during_a_save_in_it(
    browser: Browser, store: MeddledStore, options: dict[str, Any]
) -> None:
    """The save of one of its tasks gives the session a new id: what is stored, then and later, bears it."""
    await browser.begin(n=0)
    visitor = Browser(browser.site.option(**options), {}, browser.cookie)

    async def act(session: Session) -> None:
        async def save() -> None:
            session.regenerate_id()
            store.first = saving.set
            await session.save()

        async def block(group: anyio.abc.TaskGroup) -> None:
            async with session.transaction():
                group.start_soon(save)
                await saving.wait()
                raise UndoneError

        async with anyio.create_task_group() as group:
            with pytest.raises(UndoneError):
                await block(group)
        async with session.transaction() as data:
            data.metadata["n"] = 1

    saving = anyio.Event()
    assert (await visitor.open(page(act))).status == 200
    assert await visitor.stored() == {"n": 1}
    assert len(browser.site.records()) == 1
    assert browser.site.locks == 0


@pytest.mark.parametrize("begun", [True, False])
async def test_a_save_that_outlives_its_request_lets_go(
    browser: Browser, store: MeddledStore, begun: bool
) -> None:
    """The new id that it gave, or the session that it began, is not locked until the lease ends."""
    if begun:
        await browser.begin(n=0)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        session = scope["session"]
        session.login("ada")
        store.first = saving.set
        outer.start_soon(session.save)
        await saving.wait()
        raise UndoneError

    saving = anyio.Event()
    async with anyio.create_task_group() as outer:
        with pytest.raises(UndoneError):
            await browser.open(app)
    assert [record.user_id for record in browser.site.records()] == ["ada"]
    assert browser.site.locks == 0


async def test_a_block_that_begins_during_a_release_that_fails(browser: Browser, store: MeddledStore) -> None:
    """The request still has its lock and its changes: the block is a part of it, not one of its own."""
    await browser.begin(n=0)

    def fail() -> None:
        raise SessionStoreError("the backend is down")

    async def act(session: Session) -> None:
        async def block() -> None:
            async with session.transaction() as data:
                data.metadata["block"] = True

        async def begin() -> None:
            await releasing.wait()
            await block()

        async def let_go() -> None:
            with pytest.raises(SessionStoreError):
                await session.release()

        session["n"] = 1
        store.first = releasing.set
        store.then = fail
        async with anyio.create_task_group() as group:
            group.start_soon(begin)
            group.start_soon(let_go)

    releasing = anyio.Event()
    assert (await browser.open(page(act))).status == 200
    assert await browser.stored() == {"n": 1, "block": True}
    assert browser.site.locks == 0
