"""Over real sockets: uploads that crawl or break off, clients that hang up, workers that end."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Iterator
from urllib.parse import urlsplit

import anyio
import pytest

from .clients import Client, Seen, browser_like
from .processes import Site, Worker, running_site, until

pytestmark = pytest.mark.anyio

LEASE = 0.6
WAIT = 2 * LEASE


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Workers with a short lease and a short wait."""
    with running_site(tmp_path_factory.mktemp("wire") / "output", lease=LEASE, wait=WAIT) as site:
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


class Raw:
    """A connection on which a request is sent bit by bit."""

    def __init__(self, worker: Worker, client: Client) -> None:
        address = urlsplit(worker.url)
        assert address.hostname is not None
        self._socket = socket.create_connection((address.hostname, address.port or 80), timeout=10)
        self._cookie = client.http.cookies["session"]
        self._agent = client.http.headers["user-agent"]

    def begin(self, path: str, length: int = 0) -> None:
        """The head of a request with a body of this length."""
        head = [f"POST /{path} HTTP/1.1", "Host: test", f"Cookie: session={self._cookie}"]
        head += [f"User-Agent: {self._agent}", f"Content-Length: {length}", "", ""]
        self._socket.sendall("\r\n".join(head).encode())

    def send(self, data: bytes) -> None:
        self._socket.sendall(data)

    def read(self) -> bytes:
        """What has come; at least one byte unless the server has closed."""
        return self._socket.recv(1 << 16)

    def __enter__(self) -> Raw:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()


async def held(site: Site) -> None:
    """Wait until a request holds the session's lock."""
    await until(lambda: bool(site.leftovers()))


async def free(site: Site) -> None:
    """Wait until nobody does."""
    await until(lambda: not site.leftovers())


async def test_an_upload_that_crawls(site: Site, client: Client) -> None:
    """Its lease is renewed however long it takes; who waits for it in vain is told to come again."""
    with Raw(site.workers[0], client) as upload:
        upload.begin("upload", length=4)
        upload.send(b"ab")
        await held(site)
        status, _ = await client.ask(site.urls[1], "read")
        assert status == 503
        upload.send(b"cd")
        answer = await anyio.to_thread.run_sync(upload.read)
        assert answer.startswith(b"HTTP/1.1 200")
    status, told = await client.ask(site.urls[1], "read")
    assert (status, told["answer"]) == (200, 4)


@pytest.mark.parametrize("sent", [b"", b"ab"])
async def test_an_upload_that_breaks_off(site: Site, client: Client, sent: bytes) -> None:
    """Nothing of it is stored, and the lock goes without waiting for the lease's end."""
    with Raw(site.workers[0], client) as upload:
        upload.begin("upload", length=4)
        upload.send(sent)
        await held(site)
    await free(site)
    status, told = await client.ask(site.urls[1], "read")
    assert (status, told["answer"]) == (200, None)


async def test_a_client_that_does_not_wait_for_its_answer(site: Site, client: Client) -> None:
    """Its request runs to its end, is stored, and lets go."""
    with Raw(site.workers[0], client) as impatient:
        impatient.begin("hold?argument=0.5")
        await held(site)
    await free(site)
    _, told = await client.ask(site.urls[1], "everything")
    assert told["answer"]["clicks"] == 1


async def test_a_client_that_hangs_up_in_mid_stream(site: Site, client: Client) -> None:
    """What was stored before the stream's start stays, and the lock goes with the client."""
    with Raw(site.workers[0], client) as listener:
        listener.begin("endless")
        await anyio.to_thread.run_sync(listener.read)
    await free(site)
    _, told = await client.ask(site.urls[1], "read")
    assert told["answer"] == "streaming"


async def test_a_worker_that_is_told_to_end(site: Site, client: Client) -> None:
    """SIGTERM: the request that holds the session is finished, stored and answered first."""
    victim = site.workers[0]
    statuses: list[int] = []

    async def hold() -> None:
        statuses.append((await client.ask(victim.url, "hold", "0.6"))[0])

    async with anyio.create_task_group() as group:
        group.start_soon(hold)
        await held(site)
        await anyio.to_thread.run_sync(victim.stop)
    victim.start()
    assert statuses == [200]
    _, told = await client.ask(site.urls[1], "everything")
    assert told["answer"]["clicks"] == 1
    await free(site)


@pytest.mark.parametrize("frozen", [False, True], ids=["killed", "frozen and thawed"])
async def test_a_worker_that_dies_while_it_holds(site: Site, client: Client, frozen: bool) -> None:
    """The next request has its turn when the lease has ended; a late commit of the dead one is refused."""
    victim = site.workers[0]
    statuses: list[int] = []

    async def hold() -> None:
        statuses.append((await client.ask(victim.url, "hold", "0.4"))[0])

    async with anyio.create_task_group() as group:
        group.start_soon(hold)
        await held(site)
        (victim.freeze if frozen else victim.kill)()
        status, told = await client.ask(site.urls[1], "nested")
        assert (status, told["answer"]) == (200, 1)
        (victim.thaw if frozen else victim.start)()
    assert statuses == [409 if frozen else 0]
    _, told = await client.ask(site.urls[1], "everything")
    assert told["answer"]["clicks"] == 1
