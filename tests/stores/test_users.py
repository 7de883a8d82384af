"""Whoever signs in brings their own id: it is stored, listed and signed out in each kind of store."""

from __future__ import annotations

import pytest
from asgi import Browser, Site, page

from asgi_sessions import (
    SessionMiddleware,
    SessionStore,
)
from asgi_sessions.asgi import ASGIApp

pytestmark = pytest.mark.anyio

USERS = [
    "o'brien@example.com",
    "Ada Lovelace",
    "a--b",
    "--Zk3aTQ9xw0Rk7pYs",
    "auth0|5f7c",
    "{ada}",
    "}ada{",
    "{" + "0" * 32 + "}",
    "session:user:ada",
    "*",
    "a*[b]?\\",
    "ada:ending",
    "王小明",
    "🙂",
    "x" * 255,
]


def signing_in(user: str) -> ASGIApp:
    return page(lambda session: session.login(user))


async def test_any_user_may_sign_in_and_is_signed_out_alone(store: SessionStore) -> None:
    """No id of a user is another's, a pattern, or a key of something else."""
    site = Site()
    site.middleware = SessionMiddleware(site._app, "k" * 32, store=store)
    browsers: dict[str, Browser] = {}
    for user in USERS:
        browsers[user] = site.browser()
        await browsers[user].open(signing_in(user))
    assert await store.count_active() == len(USERS)
    for gone, user in enumerate(USERS):
        (listed,) = await store.list_for_user(user)
        assert (listed.user_id, listed.session_id) == (user, browsers[user].session_id)
        assert await store.delete_for_user(user) == 1
        assert await store.list_for_user(user) == []
        assert await store.count_active() == len(USERS) - gone - 1
