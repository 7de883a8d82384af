"""Two real server processes: a session is ended in one, and whoever waits in the other learns of it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from faults.processes import Worker
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosedError

pytestmark = pytest.mark.anyio


@pytest.fixture(params=["sqlite", "redis"])
def workers(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[list[Worker]]:
    if request.param == "sqlite":
        url = f"sqlite:///{tmp_path / 'sessions.db'}"
    else:
        url = request.getfixturevalue("redis_url")
    output = tmp_path / "output"
    output.touch()
    variables = {"APP": "request.ended_app:build", "STORE_URL": url}
    started = [Worker(variables, output) for _ in range(2)]
    yield started
    for worker in started:
        worker.stop()
    print(output.read_text())


async def test_a_socket_a_stream_and_a_poll_learn_of_it(workers: list[Worker]) -> None:
    """The WebSocket is closed, the stream ends with a last event, the long poll is answered."""
    while not all(worker.serves() for worker in workers):  # noqa: ASYNC110  # they set no event
        await asyncio.sleep(0.02)
    async with httpx.AsyncClient(base_url=workers[0].url, timeout=30) as browser:
        await browser.post("/sign-in")
        cookies = {
            "cookie": f"session={browser.cookies['session']}",
            "user-agent": browser.headers["user-agent"],
        }
        address = workers[0].url.replace("http", "ws") + "/socket"
        headers = [("cookie", cookies["cookie"])]
        async with connect(
            address, additional_headers=headers, user_agent_header=cookies["user-agent"]
        ) as socket:
            assert await socket.recv() == "open"
            async with browser.stream("GET", "/events") as stream:
                lines = stream.aiter_lines()
                assert await anext(lines) == "data: open"
                poll = asyncio.create_task(browser.get("/poll"))
                await asyncio.sleep(0.3)
                assert not poll.done()
                async with httpx.AsyncClient(base_url=workers[1].url, timeout=30) as elsewhere:
                    began = time.monotonic()
                    assert (await elsewhere.post("/sign-out-everywhere")).json() == 1
                with pytest.raises(ConnectionClosedError) as closed:
                    await socket.recv()
                print(f"the socket learned {1000 * (time.monotonic() - began):.1f} ms after the question")
                assert closed.value.rcvd is not None
                assert (closed.value.rcvd.code, closed.value.rcvd.reason) == (4401, "signed out")
                assert [line async for line in lines if line] == ["data: signed out"]
                assert (await poll).json() == "signed out"
                print(f"all of them {1000 * (time.monotonic() - began):.1f} ms after it")
