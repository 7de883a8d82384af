"""`max_sessions_per_user`: a sign-in ends the user's longest idle sessions that are too many."""

from __future__ import annotations

from typing import Any

import anyio
import pytest
from asgi import Act, Browser, RecordingStore, Site, page

from asgi_sessions import Session, SessionEvent, SessionMiddleware, SessionStore, SessionStoreError

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend(way: str) -> str:
    """On both event loops, over each kind of store that needs no server."""
    return way


@pytest.fixture
def site(way: str) -> Site:
    return Site({"max_sessions_per_user": 2})


def login(session: Session) -> None:
    session.login("ada")


def write(session: Session) -> None:
    session["n"] = 1


def assign(session: Session) -> None:
    session.data.user_id = "ada"


async def signed_in(site: Site, number: int) -> list[Browser]:
    browsers = [site.browser() for _ in range(number)]
    for browser in browsers:
        await browser.open(page(login))
        site.clock.now += 1
    return browsers


async def alive(*browsers: Browser) -> list[bool]:
    return [await browser.site.store.exists(browser.session_id) for browser in browsers]


@pytest.mark.parametrize("options", [{}, {"idle_timeout": 900.0}, {"lock": "auto"}, {"lock": False}], ids=str)
async def test_the_longest_idle_one_goes(site: Site, options: dict[str, Any]) -> None:
    """Never the one that signs in; an event tells of each."""
    site = site.option(**options)
    first, second = await signed_in(site, 2)
    assert await alive(first, second) == [True, True]
    await first.open(page(write))
    site.clock.now += 1
    site.events.clear()
    third = site.browser()
    await third.open(page(login))
    assert await alive(first, second, third) == [True, False, True]
    assert site.events == ["session_created", "session_ended"]
    assert site.locks == 0


async def test_the_event_says_why() -> None:
    """The app may tell the user."""
    seen: list[SessionEvent] = []
    site = Site({"max_sessions_per_user": 1, "on_event": seen.append})
    await signed_in(site, 2)
    assert [dict(event.details) for event in seen if event.name == "session_ended"] == [
        {"reason": "max_sessions_per_user"}
    ]


@pytest.mark.parametrize("options", [{}, {"rotate_on": ()}], ids=["new id", "same id"])
@pytest.mark.parametrize("act", [login, assign])
async def test_a_session_that_is_there_signs_in(site: Site, act: Act, options: dict[str, Any]) -> None:
    """By `login()` or by the field, under a new id or not."""
    site = site.option(**options)
    first, second = await signed_in(site, 2)
    third = site.browser()
    await third.begin(n=1)
    await third.open(page(act))
    assert await alive(first, second, third) == [False, True, True]
    await third.open(page(login))
    assert await alive(second, third) == [True, True], "who signs in again needs no more room"


async def test_with_a_life_of_its_own(site: Site) -> None:
    """`set_expiry` in the request that assigns the user."""
    site = site.option(rotate_on=())

    def act(session: Session) -> None:
        session.data.user_id = "ada"
        session.set_expiry(60)

    first, second = await signed_in(site, 2)
    third = site.browser()
    await third.begin(n=1)
    await third.open(page(act))
    assert await alive(first, second, third) == [False, True, True]


async def test_others_and_anonymous_sessions_do_not_count(site: Site) -> None:
    """Nor does a request that signs nobody in cost anything."""
    first, second = await signed_in(site, 2)
    other, anonymous = site.browser(), site.browser()
    await other.open(page(lambda session: session.login("bob")))
    site.log.clear()
    await anonymous.open(page(write))
    await first.open(page(write))
    await first.open(page(Session.regenerate_id))
    assert "end surplus" not in site.log
    assert await alive(first, second, other, anonymous) == [True] * 4


async def test_sign_ins_at_once(site: Site) -> None:
    """As many as are allowed are left, and they are of the latest."""
    old = await signed_in(site, 2)
    browsers = [site.browser() for _ in range(5)]
    async with anyio.create_task_group() as tasks:
        for browser in browsers:
            tasks.start_soon(browser.open, page(login))
    assert await alive(*old) == [False, False]
    assert sum(await alive(*browsers)) == 2


class Failing(RecordingStore):
    """Is down when the others are to be ended."""

    async def end_surplus(self, user: str, most: int, keep: str) -> list[str]:
        raise SessionStoreError("the store is down")


async def test_a_fault_leaves_the_sign_in(way: str) -> None:
    """It is stored; the log tells, and the next sign-in ends what is too many."""
    site = Site({"max_sessions_per_user": 1}, store_class=Failing)
    browsers = await signed_in(site, 2)
    assert await alive(*browsers) == [True, True]
    assert "store_error" in site.events


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize("idle_timeout", [None, 900.0])
async def test_over_each_store(store: SessionStore, idle_timeout: float | None) -> None:
    """Many sign-ins; the index keeps only what is there."""
    site = Site({"store": store, "max_sessions_per_user": 3, "idle_timeout": idle_timeout})
    browsers = [site.browser() for _ in range(8)]
    for browser in browsers:
        await browser.open(page(login))
    assert [await store.exists(browser.session_id) for browser in browsers] == [False] * 5 + [True] * 3
    assert len(await store.list_for_user("ada")) == 3
    assert await store.delete_for_user("ada") == 3


@pytest.mark.parametrize("wrong", [0, -1, 1.5, "2", True])
def test_a_wrong_value_fails_at_the_start(wrong: Any) -> None:
    """With the name of the option."""
    with pytest.raises(ValueError, match="max_sessions_per_user"):
        SessionMiddleware(lambda *_: None, "k" * 32, max_sessions_per_user=wrong)  # type: ignore[arg-type]
