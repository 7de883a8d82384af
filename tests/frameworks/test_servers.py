"""The same walk on each server: sign-in, parallel requests, a stream, a WebSocket that begins a session."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import anyio
import httpx
import pytest
from redis_server import RedisServer
from serving import UVICORN, serving
from websockets.asyncio.client import connect

pytestmark = pytest.mark.anyio

HYPERCORN = ("-m", "hypercorn", "{app}", "--bind", "127.0.0.1:{port}", "--log-level", "warning")
TWO_OF_UVICORN = (*UVICORN, "--http", "h11", "--ws", "wsproto", "--workers", "2")
GRANIAN = ("-m", "granian", "{app}", "--interface", "asgi", "--port", "{port}", "--log-level", "warning")
GUNICORN = ("-m", "gunicorn", "{app}", "--bind", "127.0.0.1:{port}", "--worker-class", "asgi")
DAPHNE = ("-m", "daphne", "{app}", "--port", "{port}", "--verbosity", "0")


@dataclass(frozen=True)
class Row:
    """A server, as a command of Python's."""

    name: str
    command: tuple[str, ...]
    redis: bool = False
    http2: bool = False
    processes: int = 1
    drops: str = ""  # its name, where it does not send the headers of a WebSocket's accept


ROWS = [
    Row("uvicorn, httptools, websockets", (*UVICORN, "--http", "httptools", "--ws", "websockets-sansio")),
    Row("uvicorn, h11, wsproto, two workers, Redis", TWO_OF_UVICORN, processes=2, redis=True),
    Row("Hypercorn, asyncio", HYPERCORN),
    Row("Hypercorn, trio, HTTP/2", (*HYPERCORN, "--worker-class", "trio"), http2=True),
    Row("Gunicorn, two workers", (*GUNICORN, "--workers", "2"), processes=2),
    Row("Granian, two workers", (*GRANIAN, "--workers", "2"), processes=2, drops="granian"),
    Row("Daphne", DAPHNE, drops="daphne"),
]


@pytest.fixture(scope="module", params=ROWS, ids=lambda row: row.name)
def row(request: pytest.FixtureRequest) -> Row:
    found: Row = request.param
    return found


@pytest.fixture(scope="module")
def output(row: Row, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of what the server prints."""
    return tmp_path_factory.mktemp("server") / "output"


@pytest.fixture(scope="module")
def url(row: Row, output: Path, redis_server: RedisServer) -> Iterator[str]:
    """The server, which all tests of a row share."""
    store = redis_server.url if row.redis else f"sqlite:///{output.parent / 'sessions.db'}"
    with serving("frameworks.server_app:app", output, {"STORE_URL": store}, command=row.command) as url:
        yield url
    assert "Traceback" not in output.read_text()
    assert row.drops or "cookie_dropped" not in output.read_text()


@pytest.fixture(params=["locked", "auto"])
def lock(request: pytest.FixtureRequest) -> str:
    """The lock's mode: a path of the app, and the name of its cookie."""
    return str(request.param)


@pytest.fixture
async def browser(row: Row, url: str, lock: str) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(row) as client:
        client.base_url = httpx.URL(f"{url}/{lock}/")
        yield client


def client_of(row: Row) -> httpx.AsyncClient:
    """A client that speaks the row's version of HTTP; without certificates, whose loading takes long."""
    return httpx.AsyncClient(http1=not row.http2, http2=row.http2, verify=False, timeout=30)


async def test_requests_of_one_session(row: Row, browser: httpx.AsyncClient, lock: str) -> None:
    """Each of twelve at once has a number of its own, by POST and by GET, in whatever process."""
    await browser.post("/sign-in", content="ada")
    numbers: list[int] = []

    async def count(method: str) -> None:
        numbers.append((await browser.request(method, "/count")).json())

    async with anyio.create_task_group() as tasks:
        for method in ("POST", "GET") * 6:
            tasks.start_soon(count, method)
    assert sorted(numbers) == list(range(1, 13))
    shown = await browser.get("/show")
    assert shown.http_version == ("HTTP/2" if row.http2 else "HTTP/1.1")
    assert (shown.json()["user"], shown.json()["n"]) == ("ada", 12)
    kept = browser.cookies[lock]
    await browser.post("/sign-out")
    assert lock not in browser.cookies
    browser.cookies[lock] = kept
    assert (await browser.get("/show")).json()["user"] is None


async def test_a_stream_counts_beside_other_requests(browser: httpx.AsyncClient) -> None:
    """Each part is sent once its change is stored."""
    await browser.post("/sign-in", content="ada")
    found = []
    async with browser.stream("GET", "/stream") as stream:
        async for line in stream.aiter_lines():
            found.append(int(line))
            await browser.post("/count")
    assert found == sorted(set(found))
    assert (await browser.get("/show")).json()["n"] == 10


async def converse(browser: httpx.AsyncClient, url: str, lock: str) -> tuple[str | None, str]:
    """The cookie that a WebSocket's handshake gives, and the number that it counts to."""
    headers = {"cookie": f"{lock}={browser.cookies[lock]}"} if lock in browser.cookies else {}
    address = f"ws{url.removeprefix('http')}/{lock}/socket"
    agent = browser.headers["user-agent"]
    async with connect(address, user_agent_header=agent, additional_headers=headers) as socket:
        assert socket.response is not None
        await socket.send("count")
        return socket.response.headers.get("set-cookie"), str(await socket.recv())


async def test_a_websocket_begins_a_session(
    row: Row, browser: httpx.AsyncClient, url: str, lock: str, output: Path
) -> None:
    """Its cookie rides on the accept, and is good for HTTP; else the log names the server."""
    cookie, number = await converse(browser, url, lock)
    assert number == "1"
    if row.drops:
        assert cookie is None, "the server sends it: take the warning and the note in the README back"
        assert re.search(f"cookie_dropped .*server='{row.drops}'", output.read_text())
        return
    assert cookie is not None
    assert cookie.startswith(f"{lock}=")
    browser.cookies[lock] = cookie.partition(";")[0].partition("=")[2]
    assert (await browser.post("/count")).json() == 2


async def test_a_websocket_shares_the_session_of_requests(
    browser: httpx.AsyncClient, url: str, lock: str
) -> None:
    """A session that began by HTTP needs no cookie of the accept, on whatever server."""
    await browser.post("/count")
    assert await converse(browser, url, lock) == (None, "2")
    assert (await browser.post("/count")).json() == 3


async def test_workers_share_sessions(row: Row, browser: httpx.AsyncClient, url: str, lock: str) -> None:
    """New connections reach each process, and each knows the session."""
    await browser.post("/sign-in", content="ada")
    seen: set[int] = set()
    with anyio.fail_after(30):
        while len(seen) < row.processes:
            async with client_of(row) as another:
                another.cookies[lock] = browser.cookies[lock]
                shown = (await another.get(f"{url}/{lock}/show")).json()
            assert shown["user"] == "ada"
            seen.add(shown["process"])
