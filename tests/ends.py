"""What all processes of one deployment of Redis learn of sessions that end."""

from __future__ import annotations

import asyncio

import pytest
from visitors import until

from asgi_sessions import RedisSessionStore, SessionData
from asgi_sessions.stores import endings


async def all_processes_are_told(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve sessions are waited for in one process and end in another; nobody looks meanwhile."""
    monkeypatch.setattr(endings, "LOOK_EVERY", 3600.0)
    monkeypatch.setattr(endings, "_FIRST_PAUSE", 3600.0)
    here, there = RedisSessionStore(url), RedisSessionStore(url)
    names = [f"s{number}" for number in range(12)]
    await there.set_batch({name: SessionData(session_id=name) for name in names})
    tasks = [asyncio.create_task(here.until_ended(name)) for name in names]
    known = (await here._states.get()).endings
    await until(lambda: {*known._watched} == {*names}, "they wait")
    await until(lambda: all(1e9 > each.due > 0 for each in known._watched.values()), "they have looked")
    assert await there.delete_batch(names) == dict.fromkeys(names, True)
    await asyncio.wait_for(asyncio.gather(*tasks), 20)
    await asyncio.gather(here.aclose(), there.aclose())
