"""Tasks of one request share its session: one at a time transacts, and nothing is lost unsaid."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

import anyio
import pytest
from anyio.lowlevel import checkpoint
from asgi import Browser, Clock, RecordingStore, Site, chunk, page, start

from asgi_sessions import ReadOnlySessionError, Session, SessionClosedError
from asgi_sessions.asgi import Receive, Scope, Send

pytestmark = pytest.mark.anyio


class UndoneError(Exception):
    """Raised in a block to roll it back."""


class SlowStore(RecordingStore):
    """Lets the other tasks run before and after each call."""

    def __init__(self, log: list[str], clock: Clock) -> None:
        super().__init__(log, clock)
        self.during: Callable[[], object] | None = None

    async def before(self, call: str) -> None:
        await super().before(call)
        await checkpoint()
        if call.startswith("commit") and self.during is not None:
            self.during()

    async def after(self, call: str) -> None:
        await checkpoint()


@pytest.fixture
def anyio_backend(way: str) -> str:
    """On both event loops in memory, and over a store of four primitives."""
    return way


MODES: dict[str, dict[str, Any]] = {
    "under the request's lock": {},
    "read-only": {"read_only": "*"},
    "without locks": {"lock": False},
    "optimistically": {"lock": "auto"},
}


@pytest.fixture(params=MODES)
async def browser(request: pytest.FixtureRequest, anyio_backend: str) -> Browser:
    """A visitor in each of the ways in which a request may have its session."""
    site = Site(store_class=SlowStore)
    visitor = site.browser()
    await visitor.begin(n=0)
    options: dict[str, Any] = MODES[request.param]
    return Browser(site.option(**options), {}, visitor.cookie)


@pytest.fixture
async def holder(anyio_backend: str) -> Browser:
    """A visitor whose requests hold the lock."""
    visitor = Site(store_class=SlowStore).browser()
    await visitor.begin(n=0)
    return visitor


async def put(session: Session, name: str, *, undo: bool = False) -> None:
    """A transaction that takes its time; `undo` rolls it back."""
    async with session.transaction() as data:
        data.metadata[f"{name} began"] = True
        for _ in range(5):
            await checkpoint()
        data.metadata[name] = True
        if undo:
            raise UndoneError


async def undone(session: Session, name: str) -> None:
    with pytest.raises(UndoneError):
        await put(session, name, undo=True)


async def together(*tasks: Callable[[], Coroutine[Any, Any, None]]) -> None:
    async with anyio.create_task_group() as group:
        for task in tasks:
            group.start_soon(task)


@pytest.mark.parametrize("undone_first", [True, False])
async def test_a_roll_back_takes_back_its_own_changes_only(browser: Browser, undone_first: bool) -> None:
    """Of two tasks at once one rolls back: the other's change is stored, and nothing else."""

    async def act(session: Session) -> None:
        tasks = [lambda: undone(session, "undone"), lambda: put(session, "kept")]
        await together(*(tasks if undone_first else tasks[::-1]))

    assert (await browser.open(page(act))).status == 200
    assert await browser.stored() == {"n": 0, "kept began": True, "kept": True}
    assert browser.site.locks == 0


async def test_many_tasks_count_without_a_loss(browser: Browser) -> None:
    """Each sees what the one before committed."""

    async def count(session: Session) -> None:
        async with session.transaction() as data:
            seen = data.metadata["n"]
            await checkpoint()
            data.metadata["n"] = seen + 1

    async def act(session: Session) -> None:
        await together(*[lambda: count(session)] * 10)

    assert (await browser.open(page(act))).status == 200
    assert await browser.stored() == {"n": 10}


async def test_parts_of_one_transaction_are_told_apart_too(browser: Browser) -> None:
    """Tasks that transact inside another transaction: one rolls back, the other is stored with the whole."""

    async def act(session: Session) -> None:
        async with session.transaction() as data:
            data.metadata["whole"] = True
            await together(lambda: undone(session, "undone"), lambda: put(session, "part"))

    assert (await browser.open(page(act))).status == 200
    assert await browser.stored() == {"n": 0, "whole": True, "part began": True, "part": True}


async def test_a_transaction_waits_for_the_parts_that_its_tasks_have_begun(holder: Browser) -> None:
    """What a task began in the block is stored with it, though the block was through before."""

    async def act(session: Session) -> None:
        async with anyio.create_task_group() as group, session.transaction() as data:
            data.metadata["whole"] = True
            group.start_soon(put, session, "part")
            await checkpoint()
            await checkpoint()

    assert (await holder.open(page(act))).status == 200
    assert await holder.stored() == {"n": 0, "whole": True, "part began": True, "part": True}


async def test_nobody_changes_the_session_during_the_transaction_of_another_task(browser: Browser) -> None:
    """It would be rolled back or stored with what it does not belong to: it is refused."""

    async def act(session: Session) -> None:
        async def meddle() -> None:
            await checkpoint()
            with pytest.raises(ReadOnlySessionError):
                session["meddled"] = True

        await together(lambda: put(session, "kept"), meddle)

    assert (await browser.open(page(act))).status == 200
    assert await browser.stored() == {"n": 0, "kept began": True, "kept": True}


async def test_an_answer_waits_for_what_it_acknowledges(holder: Browser) -> None:
    """A change that was there before another task's transaction began is stored before the 200 leaves."""
    log = holder.site.log

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        session = scope["session"]
        session["before"] = True

        async def slow() -> None:
            await put(session, "slow")
            log.append("block over")

        async with anyio.create_task_group() as group:
            group.start_soon(slow)
            await checkpoint()
            await checkpoint()
            await page()(scope, receive, send)

    assert (await holder.open(app)).status == 200
    assert log.index("commit") < log.index("start 200")
    assert await holder.stored() == {"n": 0, "before": True, "slow began": True, "slow": True}
    assert holder.site.locks == 0


async def test_an_answer_does_not_wait_for_a_transaction_that_is_none_of_its_business(
    holder: Browser,
) -> None:
    """The block stores its own when it ends, and lets the lock go that the request had."""
    log = holder.site.log

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        session = scope["session"]

        async def slow() -> None:
            async with session.transaction() as data:
                data.metadata["slow"] = True
                await answered.wait()
                assert holder.site.locks == 1

        async with anyio.create_task_group() as group:
            group.start_soon(slow)
            await checkpoint()
            await checkpoint()
            await page()(scope, receive, send)
            answered.set()

    answered = anyio.Event()
    assert (await holder.open(app)).status == 200
    assert log.index("start 200") < log.index("commit+release")
    assert await holder.stored() == {"n": 0, "slow": True}
    assert holder.site.locks == 0


async def test_a_failed_request_takes_the_transaction_along_that_stands_on_it(holder: Browser) -> None:
    """A 5xx changes nothing: not by way of another task's commit either."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        session = scope["session"]
        session["before"] = True

        async def transact() -> None:
            async with session.transaction() as data:
                data.metadata["slow"] = True
                await answered.wait()

        async def slow() -> None:
            with pytest.raises(SessionClosedError):
                await transact()

        async with anyio.create_task_group() as group:
            group.start_soon(slow)
            await checkpoint()
            await checkpoint()
            await page(status=500)(scope, receive, send)
            answered.set()

    answered = anyio.Event()
    assert (await holder.open(app)).status == 500
    assert await holder.stored() == {"n": 0}
    assert holder.site.locks == 0


async def test_tasks_that_save_at_once_do_not_refuse_each_other(holder: Browser) -> None:
    """One waits for the other's commit; both changes are stored."""

    async def act(session: Session) -> None:
        async def save(name: str) -> None:
            session[name] = True
            await session.save()

        await together(lambda: save("a"), lambda: save("b"), lambda: save("c"))

    assert (await holder.open(page(act))).status == 200
    assert await holder.stored() == {"n": 0, "a": True, "b": True, "c": True}


async def test_a_change_during_the_last_commit_is_refused(holder: Browser) -> None:
    """The commit that lets the lock go is under way: nothing would store it any more."""
    refused: list[bool] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        session = scope["session"]
        store = holder.site.store
        assert isinstance(store, SlowStore)

        def meddle() -> None:
            with pytest.raises(SessionClosedError):
                session["late"] = True
            refused.append(True)

        store.during = meddle
        session["n"] = 1
        await send(start(200, [(b"content-length", b"2")]))
        await send(chunk(b"ok"))

    assert (await holder.open(app)).status == 200
    assert refused == [True]
    assert await holder.stored() == {"n": 1}


async def test_a_fault_in_the_last_commit_leaves_the_session_open(holder: Browser) -> None:
    """`release()` that failed can be tried again."""
    store = holder.site.store
    assert isinstance(store, SlowStore)

    def fail() -> None:
        store.during = None
        raise OSError("gone")

    async def act(session: Session) -> None:
        session["n"] = 1
        store.during = fail
        with pytest.raises(OSError, match="gone"):
            await session.release()
        session["n"] = 2

    assert (await holder.open(page(act))).status == 200
    assert await holder.stored() == {"n": 2}


@pytest.mark.parametrize("undone_first", [True, False])
async def test_the_stores_own_transactions_take_turns_in_a_request(
    holder: Browser, undone_first: bool
) -> None:
    """`store.transaction(id)` in the request that holds the session is a part of it, like its own."""
    store = holder.site.store

    async def act(session: Session) -> None:
        async def transact() -> None:
            async with store.transaction(session.session_id) as data:
                assert data is not None
                data.metadata["undone"] = True
                await checkpoint()
                raise UndoneError

        async def undo() -> None:
            with pytest.raises(UndoneError):
                await transact()

        async def keep() -> None:
            async with store.transaction(session.session_id) as data:
                assert data is not None
                await checkpoint()
                data.metadata["kept"] = True

        await together(*((undo, keep) if undone_first else (keep, undo)))

    assert (await holder.open(page(act))).status == 200
    assert await holder.stored() == {"n": 0, "kept": True}


async def test_an_update_waits_for_the_transaction_of_another_task(holder: Browser) -> None:
    """It does not wait for the lock that its own request holds."""

    async def act(session: Session) -> None:
        async def update() -> None:
            await checkpoint()
            await checkpoint()
            assert await holder.site.store.increment_counter(session.session_id, "n") == 1

        await together(lambda: put(session, "kept"), update)

    with anyio.fail_after(5):
        assert (await holder.open(page(act))).status == 200
    assert await holder.stored() == {"n": 1, "kept began": True, "kept": True}
