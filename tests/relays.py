"""What stands between a client and a server: TLS, and networks that cut a stream wherever they like."""

from __future__ import annotations

import asyncio
import contextlib
import random
import ssl
import threading
from collections.abc import Awaitable, Callable
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TypeAlias
from urllib.parse import urlencode

import trustme

Carry: TypeAlias = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]

_PATIENCE = 10.0  # seconds for the relay's thread to start and to end


async def as_it_comes(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """What arrives together leaves together."""
    while chunk := await reader.read(1 << 16):
        writer.write(chunk)
        await writer.drain()


def in_pieces(seed: int) -> Carry:
    """A network that trickles, splits and joins: chunks are cut anywhere, and cuts move on byte by byte.

    Of what is long the first bytes and the last alone come one by one; of the rest, pieces of any size.
    """
    chance = random.Random(seed)
    cut = 0

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal cut
        while chunk := await reader.read(1 << 16):
            if chance.random() < 0.3:  # joined with what comes next
                with contextlib.suppress(asyncio.TimeoutError):
                    chunk += await asyncio.wait_for(reader.read(1 << 16), 0.001)
            if len(chunk) < 300 and chance.random() < 0.1:
                pieces = [chunk[at : at + 1] for at in range(len(chunk))]
            else:
                cut += 1
                at = cut % (len(chunk) + 1)
                pieces = [chunk[:at], chunk[at : at + 1], chunk[at + 1 :]]
            for piece in filter(None, pieces):
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(0)

    return carry


class Relay:
    """Listens on the loopback and passes on what it hears, on a thread and an event loop of its own."""

    def __init__(self, target: int, *, tls: ssl.SSLContext | None = None, carry: Carry = as_it_comes) -> None:
        self.port = 0
        self._target = target
        self._tls = tls
        self._carry = carry
        self._links: set[asyncio.Task[None]] = set()
        self._started = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()))

    def __enter__(self) -> Relay:
        self._thread.start()
        assert self._started.wait(_PATIENCE), "the relay did not start"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._over.set)
        self._thread.join(_PATIENCE)

    async def _serve(self) -> None:
        self._loop, self._over = asyncio.get_running_loop(), asyncio.Event()
        self._loop.set_exception_handler(lambda *_: None)  # clients that hang up, and strangers to our CA
        server = await asyncio.start_server(self._link, "127.0.0.1", 0, ssl=self._tls)
        self.port = server.sockets[0].getsockname()[1]
        self._started.set()
        await self._over.wait()
        server.close()
        for link in self._links:
            link.cancel()
        await asyncio.gather(*self._links, return_exceptions=True)

    async def _link(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._links.add(task)
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._target)
        ways = [(reader, far_writer), (far_reader, writer)]
        carriers = [asyncio.ensure_future(self._carry(*way)) for way in ways]
        try:
            await asyncio.wait(carriers, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for carrier in carriers:
                carrier.cancel()
            await asyncio.gather(*carriers, return_exceptions=True)
            await asyncio.gather(_close(writer), _close(far_writer))
            self._links.discard(task)


async def _close(writer: asyncio.StreamWriter) -> None:
    """In good order, with TLS's own goodbye; a peer that does not answer it is left."""
    writer.close()
    with contextlib.suppress(OSError, asyncio.TimeoutError):
        await asyncio.wait_for(writer.wait_closed(), 0.2)
    writer.transport.abort()


class Authority:
    """A certificate authority that nobody knows but the tests, and what it certifies."""

    def __init__(self, directory: Path) -> None:
        self._ca = trustme.CA()
        self._directory = directory

    @cached_property
    def certificate(self) -> str:
        """The file with its own certificate."""
        path = self._directory / "ca.pem"
        self._ca.cert_pem.write_to_path(path)
        return str(path)

    @cached_property
    def client(self) -> dict[str, str]:
        """The files of a client's key and certificate, as options of a URL."""
        certificate, key = self._directory / "client.pem", self._directory / "client.key"
        issued = self._ca.issue_cert("client@example.org")
        issued.cert_chain_pems[0].write_to_path(certificate)
        issued.private_key_pem.write_to_path(key)
        return {"ssl_certfile": str(certificate), "ssl_keyfile": str(key)}

    def context(self, *names: str, ask_client: bool = False) -> ssl.SSLContext:
        """Of a server that goes by these names, and may want to know who its clients are."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._ca.issue_cert(*names).configure_cert(context)
        if ask_client:
            context.verify_mode = ssl.CERT_REQUIRED
            self._ca.configure_trust(context)
        return context

    def url(self, host: str, port: int, **options: str) -> str:
        """A URL whose client trusts this authority and no other."""
        return f"rediss://{host}:{port}?{urlencode({'ssl_ca_certs': self.certificate, **options})}"
