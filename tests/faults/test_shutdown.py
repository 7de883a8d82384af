"""A worker that is told to end leaves no lock behind, though its requests do not end in time."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator

import anyio
import pytest

from .clients import Client, Seen, browser_like
from .processes import Site, running_site, until

pytestmark = pytest.mark.anyio

LEASE = 10.0  # seconds, which the next worker would wait for
SOON = 0.1  # seconds


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """One worker with a period of grace, and one without."""
    output = tmp_path_factory.mktemp("shutdown") / "output"
    grace = {"UVICORN": "--timeout-graceful-shutdown 1"}
    with running_site(output, workers=[grace, {}], lease=LEASE, wait=15.0) as site:
        yield site


@pytest.fixture
async def client(site: Site) -> AsyncIterator[Client]:
    """A client whose session has begun, with nothing else in Redis."""
    await site.up()
    site.redis.flushall()
    async with browser_like() as http:
        client = Client(http, "canary", Seen())
        await client.begin(site.urls[0])
        yield client


@pytest.mark.parametrize("path", ["endless", "hold"])
@pytest.mark.parametrize("waits_already", [False, True], ids=["comes later", "waits already"])
async def test_the_next_worker_does_not_wait(
    site: Site, client: Client, path: str, waits_already: bool
) -> None:
    """A stream, and a request that has not answered yet, are cut off by the server; the lock goes at once."""
    victim, other = site.workers
    await client.ask(other.url, "read")
    await until(lambda: not site.leftovers())  # or its own lock would be taken for the victim's
    times: dict[str, float] = {}

    async def follow() -> None:
        status, _ = await client.ask(other.url, "read")
        assert status == 200
        times["answered"] = time.monotonic()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(client.ask, victim.url, path, "60")
        await until(lambda: bool(site.leftovers()))
        if waits_already:
            tasks.start_soon(follow)
            await until(lambda: len(site.leftovers()) == 2)
        await anyio.to_thread.run_sync(victim.stop)
        times["ended"] = time.monotonic()
        if not waits_already:
            await follow()
    victim.start()
    assert times["answered"] - times["ended"] < SOON
    assert site.leftovers() == []
