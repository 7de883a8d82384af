"""The table of states in `State`'s docstring, each cell of it driven with a real store in memory."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias

import anyio
import pytest
from asgi import KEY, empty_body, http_scope

from asgi_sessions import (
    InMemorySessionStore,
    SessionConflictError,
    SessionData,
    SessionError,
    SessionMiddleware,
    SessionStoreError,
)
from asgi_sessions.asgi import Message
from asgi_sessions.client.cookie import NO_COOKIE, Presented
from asgi_sessions.request.http import HTTPRequest
from asgi_sessions.request.rerun import Discarded, Rerun
from asgi_sessions.request.response import dressed
from asgi_sessions.request.state import News, State
from asgi_sessions.stores.checkout import Checkout, Outcome

pytestmark = pytest.mark.anyio

Event: TypeAlias = Callable[[HTTPRequest], Awaitable[object]]


def table() -> dict[tuple[str, str], str]:
    """What the docstring says: the next state, "error" or "-" for each event and state."""
    rows = [line.split("|") for line in (State.__doc__ or "").splitlines() if "|" in line]
    (_, *states), *events = [[cell.strip() for cell in row] for row in rows if "---" not in row[0]]
    return {(row[0], state): cell for row in events for state, cell in zip(states, row[1:], strict=True)}


TABLE = table()
HAS_RECORD = (State.OPEN, State.OPTIMISTIC)


class FailingStore(InMemorySessionStore):
    """Fails in every call that stores something, when told to."""

    fails = False

    def _look(self) -> None:
        if self.fails:
            raise SessionStoreError("the store is down")

    async def create(self, *args: Any, **options: Any) -> Checkout | None:
        self._look()
        return await super().create(*args, **options)

    async def commit(self, checkout: Checkout, record: bytes, *, release: bool) -> Outcome:
        self._look()
        return await super().commit(checkout, record, release=release)


async def nobody(message: Message) -> None:
    """A client that looks at nothing."""


def unit_for(store: InMemorySessionStore, session_id: str | None, *, optimistic: bool = False) -> HTTPRequest:
    """A unit of work that is not opened yet; the client presents this id."""
    settings = SessionMiddleware(lambda *_: nobody({}), KEY, store=store, fingerprint=None)._settings
    presented = NO_COOKIE if session_id is None else Presented(session_id)
    unit = HTTPRequest(settings, http_scope(), {}, empty_body, nobody, presented)
    unit.rerun = Rerun(unit.scope, empty_body) if optimistic else None
    return unit


async def stored(store: InMemorySessionStore) -> str:
    data = SessionData(session_id="a" * 32, metadata={"n": 0})
    await store.set(data.session_id, data)
    return data.session_id


async def in_state(state: State) -> HTTPRequest:
    """A unit of work that has come into this state as a request does."""
    store = FailingStore()
    if state is State.FRESH:
        return unit_for(store, None)
    session_id = await stored(store)
    if state is State.RETIRED:
        other = unit_for(store, session_id)
        await other.open(read_only=False)
        other.session.regenerate_id()
        await other.commit(release=True)
    unit = unit_for(store, session_id, optimistic=state in (State.OPTIMISTIC, State.DISCARDED))
    await unit.open(read_only=state is State.READ_ONLY)
    if state is State.DISCARDED:
        with pytest.raises(Discarded):
            await another_wrote(unit)
        assert unit.rerun is not None
        unit.rerun.is_over()
    if state is State.REFUSED:
        with pytest.raises(SessionError):
            await another_wrote(unit)
    if state is State.RELEASED:
        await unit.commit(release=True)
    return unit


# -- events ------------------------------------------------------------------------------------------------


async def find(unit: HTTPRequest) -> None:
    unit.presented = Presented(await stored(unit.settings.store))  # type: ignore[arg-type]
    await unit.open(read_only=False)


async def find_nothing(unit: HTTPRequest) -> None:
    unit.presented = Presented("b" * 32)
    await unit.open(read_only=False)


async def find_replaced(unit: HTTPRequest) -> None:
    other = await in_state(State.RETIRED)
    unit.settings, unit.presented = other.settings, other.presented
    await unit.open(read_only=False)


async def find_read_only(unit: HTTPRequest) -> None:
    unit.presented = Presented(await stored(unit.settings.store))  # type: ignore[arg-type]
    await unit.open(read_only=True)


async def find_without_lock(unit: HTTPRequest) -> None:
    unit.rerun = Rerun(unit.scope, empty_body)
    await find(unit)


async def commit_values(unit: HTTPRequest) -> None:
    unit.session["n"] = 1
    await unit.commit(release=False)


async def commit_sign_in(unit: HTTPRequest) -> None:
    unit.session.login("ada")
    await unit.commit(release=False)


async def commit_end(unit: HTTPRequest) -> None:
    unit.session.invalidate()
    await unit.commit(release=False)


async def another_wrote(unit: HTTPRequest) -> None:
    unit.session["n"] = 1
    session_id = unit.session.session_id
    await unit.settings.store.set(session_id, SessionData(session_id=session_id))
    await unit.commit(release=False)


async def another_ended(unit: HTTPRequest) -> None:
    unit.session["n"] = 1
    await unit.settings.store.delete(unit.session.session_id)
    await unit.commit(release=False)


async def store_fails(unit: HTTPRequest) -> None:
    unit.settings.store.fails = True  # type: ignore[attr-defined]
    await commit_values(unit)


async def commit_late(unit: HTTPRequest) -> None:
    unit.news = News.TOLD
    await commit_values(unit)


async def sign_in_late(unit: HTTPRequest) -> None:
    unit.news = News.TOLD
    await commit_sign_in(unit)


async def release(unit: HTTPRequest) -> None:
    await unit.commit(release=True)


async def transact(unit: HTTPRequest) -> None:
    async with unit.session.transaction() as data:
        data.metadata["n"] = 2


async def send_headers(unit: HTTPRequest) -> None:
    dressed(unit, {"type": "http.response.start", "status": 200, "headers": []})
    assert unit.news is News.TOLD


EVENTS: dict[str, Event] = {
    "open: found": find,
    "open: absent": find_nothing,
    "open: replaced id": find_replaced,
    "open: read-only": find_read_only,
    "open: optimistic": find_without_lock,
    "commit: values": commit_values,
    "commit: sign-in": commit_sign_in,
    "commit: end": commit_end,
    "commit: another wrote": another_wrote,
    "commit: another ended": another_ended,
    "commit: store fails": store_fails,
    "late commit: values": commit_late,
    "late commit: sign-in": sign_in_late,
    "release": release,
    "transaction": transact,
    "headers leave": send_headers,
    "roll back": HTTPRequest.roll_back,
    "request ends": HTTPRequest.close,
}


def test_the_table_is_complete() -> None:
    """Each state has a column, each event a row, and each cell says what may be said there."""
    assert {state for _, state in TABLE} == {state.name for state in State}
    assert {event for event, _ in TABLE} == set(EVENTS)
    assert set(TABLE.values()) <= {"error", "-", *State.__members__}


@pytest.mark.parametrize(("event", "state"), TABLE)
async def test_each_event_leads_where_the_table_says(event: str, state: str) -> None:
    """Or is refused, and changes no state then. The lock is let go where nobody can use it any more."""
    unit = await in_state(State[state])
    assert unit.state is State[state]
    after = TABLE[event, state]
    if after != state and after in ("REFUSED", "DISCARDED"):
        with pytest.raises(SessionConflictError if after == "REFUSED" else Discarded):
            await EVENTS[event](unit)
        assert unit.state is State[after]
    elif after in State.__members__:
        await EVENTS[event](unit)
        assert unit.state is State[after]
    else:
        with pytest.raises(AssertionError if after == "-" else (SessionError, Discarded)):
            await EVENTS[event](unit)
        assert unit.state is State[state]
    assert isinstance(unit.record, Checkout) is (unit.state in HAS_RECORD) or unit.state not in (
        State.FRESH, State.RETIRED, *HAS_RECORD,
    )  # fmt: skip
    if unit.state in (State.OPTIMISTIC, State.READ_ONLY, State.RELEASED, State.DISCARDED):
        assert (await unit.settings.store.get_stats())["locks_held"] == 0


@pytest.mark.parametrize("state", [each for each in State if each is not State.DISCARDED])
@pytest.mark.parametrize("ending", [HTTPRequest.close, HTTPRequest.roll_back])
async def test_an_end_of_the_request_waits_for_no_transaction(state: State, ending: Event) -> None:
    """Whatever state it lies over: it stores its own changes, and the request is released after it."""
    unit = await in_state(state)
    refused = TABLE["transaction", state.name] == "error"
    began, ended, told = anyio.Event(), anyio.Event(), []

    async def transact(handle: Any) -> None:
        try:
            async with handle.transaction() as data:
                data.metadata["n"] = 3
                began.set()
                await ended.wait()
        except SessionError as error:
            told.append(error)

    async with anyio.create_task_group() as group:
        group.start_soon(transact, unit.session)
        await began.wait()
        await ending(unit)
        assert unit.below is State.RELEASED
        ended.set()
    assert bool(told) is refused
    assert (unit.state, unit.below, unit.block) == (State.RELEASED, None, None)
    assert (await unit.settings.store.get_stats())["locks_held"] == 0
