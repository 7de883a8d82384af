"""A user signs out everywhere while clients in other processes give their sessions new ids all the time."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import anyio
import pytest
from deployments import RedisCluster

from asgi_sessions import RedisSessionStore, SessionFilter

from .processes import PATIENCE, TESTS
from .thieves import begin

pytestmark = pytest.mark.anyio

SESSIONS = 100  # of the user; a thousand with --long
PROCESSES = 2  # four with --long
CROWDS = [("one node", 1), ("one node", 64), ("cluster", 8)]
MORE_CROWDS = [("one node", 8), ("cluster", 1), ("cluster", 64)]  # with --long


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Where the sessions are, and how many of them are busy."""
    if "busy" in metafunc.fixturenames:
        more = MORE_CROWDS if metafunc.config.getoption("--long") else []
        metafunc.parametrize(("url", "busy"), [*CROWDS, *more], indirect=["url"])


@pytest.fixture(scope="module")
def cluster() -> Iterator[RedisCluster]:
    with RedisCluster() as cluster:
        yield cluster


@pytest.fixture
def url(request: pytest.FixtureRequest) -> str:
    if request.param == "one node":
        return str(request.getfixturevalue("redis_url"))
    cluster: RedisCluster = request.getfixturevalue("cluster")
    cluster.empty()
    return cluster.url


@asynccontextmanager
async def thieves(url: str, ids: Sequence[str], signers: int) -> AsyncIterator[Process]:
    """A process of them, at work when the block begins."""
    path = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    command = [sys.executable, "-m", "faults.thieves", url, str(len(ids)), str(signers)]
    process = await asyncio.create_subprocess_exec(
        *command, stdin=PIPE, stdout=PIPE, env={**os.environ, "PYTHONPATH": path}
    )
    try:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(" ".join(ids).encode() + b"\n")
        with anyio.fail_after(PATIENCE):
            assert await process.stdout.readline() == b"ready\n"
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def report(process: Process) -> Any:
    """What they say when they are told to stop."""
    with anyio.fail_after(PATIENCE):
        said, _ = await process.communicate(b"\n")
    return json.loads(said)


async def survivors(store: RedisSessionStore) -> list[str]:
    """Sessions that go back to one that was signed in before; those that began later say no root."""
    found = await store.list_for_user("ada")
    everything = await store.find(SessionFilter())
    assert {data.session_id for data in found} == {data.session_id for data in everything}, "not all linked"
    return [data.session_id for data in everything if data.metadata["root"]]


async def test_no_session_survives_a_sign_out(
    url: str, busy: int, pytestconfig: pytest.Config, record_property: Any
) -> None:
    """So many of them get new ids, and as many sign in, in other processes, all the time."""
    count, processes = (1000, 4) if pytestconfig.getoption("--long") else (SESSIONS, PROCESSES)
    store = RedisSessionStore(url)
    ids = await asyncio.gather(*[begin(store, "before") for _ in range(count)])
    workers = min(processes, busy)
    async with AsyncExitStack() as stack:
        groups = [ids[:busy][number::workers] for number in range(workers)]
        crews = [await stack.enter_async_context(thieves(url, each, len(each))) for each in groups]
        began = time.perf_counter()
        ended = await store.delete_for_user("ada")
        took = time.perf_counter() - began
        reports = [await report(crew) for crew in crews]
    moves = sum((Counter(each["moves"]) for each in reports), Counter[str]())
    figures = f"{busy} busy: {ended} ended in {took * 1000:.0f} ms, {dict(moves)}"
    print(figures)
    record_property("figures", figures)
    assert [each["faults"] for each in reports] == [[]] * workers
    assert [each["kept"] for each in reports] == [[]] * workers
    assert await survivors(store) == []
    assert ended > 0
    await store.delete_for_user("ada")
    assert await store.list_active() == []
    await store.aclose()
