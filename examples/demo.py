"""A small tea shop that shows `asgi_sessions` at work: a race, a cart, a chat, a WebSocket, sign-in.

    python examples/demo.py                  sessions in memory
    python examples/demo.py --sqlite [PATH]  sessions in a file: a restart ends none
    python examples/demo.py --redis [URL]    sessions on Redis

Ctrl-C ends it. This file is the command line and the server. `demo_shop.py` is the app, and what an app of
yours would contain; `demo_race.py` has the race, `demo_web/` the markup, the style and the scripts.
"""

from __future__ import annotations

import argparse
import asyncio
import errno
import logging
import os
import secrets
import socket
from collections.abc import Sequence
from contextlib import suppress
from urllib.parse import urlsplit

import uvicorn
from demo_shop import build

from asgi_sessions import InMemorySessionStore, SessionError, SessionStore, SQLiteSessionStore

BANNER = """
  asgi-server-sessions demo, sessions kept in {store}

    {url}/         what it is, and the race: 50 requests at once
    {url}/cart     a typed cart, and a checkout that the other tabs wait for
    {url}/chat     a streamed answer, counted when it has ended
    {url}/socket   a WebSocket that changes the session
    {url}/account  sign in: the id changes, the cart stays

  What happens to sessions is logged below. Ctrl-C ends it.
"""


# -- where sessions are kept --------------------------------------------------------------------------------


def kept_in(path: str | None, url: str | None) -> tuple[SessionStore, str, str]:
    """Where sessions are kept, what that is called, and the secret that goes with it."""
    if path:
        return sqlite_store(path), f"the file {path}", kept_secret(f"{path}.key")
    if url:
        return redis_store(url), f"Redis at {urlsplit(url).hostname or 'a socket'}", secrets.token_hex(32)
    return InMemorySessionStore(), "memory", secrets.token_hex(32)


def sqlite_store(path: str) -> SessionStore:
    """The store in this file. Where that cannot be used, the program ends with the reason."""

    async def attempt() -> None:
        try:
            await store.open()
        finally:
            await store.aclose()

    try:
        store = SQLiteSessionStore(path)
        asyncio.run(attempt())
    except (ValueError, SessionError) as error:
        raise SystemExit(f"--sqlite: {error}") from None
    return store


def kept_secret(file: str) -> str:
    """A secret that outlives the program: sessions are worth nothing where cookies are not believed."""
    try:
        with open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as new:
            new.write(secrets.token_hex(32))
    except FileExistsError:
        pass
    with open(file) as kept:
        return kept.read()


def redis_store(url: str) -> SessionStore:
    """The store at this URL, once it has answered. Where it does not, the program ends with the reason."""

    async def health() -> dict[str, object]:
        try:
            return await store.health_check()
        finally:
            await store.aclose()

    from asgi_sessions import RedisSessionStore  # here, for without --redis nobody needs redis-py

    try:
        store = RedisSessionStore(url)
    except ValueError as error:
        raise SystemExit(f"--redis: {error}") from None
    report = asyncio.run(health())
    if not report["healthy"]:
        raise SystemExit(f"No Redis there ({report.get('error')}). Start one, or leave --redis out.")
    return store


# -- the server ---------------------------------------------------------------------------------------------


class Server(uvicorn.Server):
    """A server that tells the app when it is being stopped, so that nobody has to wait for a stream."""

    def __init__(self, config: uvicorn.Config, leaving: asyncio.Event) -> None:
        super().__init__(config)
        self._leaving = leaving

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._leaving.set()
        await super().shutdown(sockets)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there. Where it cannot, the program ends with the reason and the remedy."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise SystemExit(
                f"Port {port} is in use, perhaps by another demo. Choose another one:"
                f" --port {port % 65535 + 1}, or --port 0 for any that is free."
            ) from None
        raise SystemExit(
            f"Cannot listen on {host}, port {port}: {error.strerror}. See --host, --port."
        ) from None


def port_number(text: str) -> int:
    """A port from the command line."""
    if not (text.isascii() and text.isdigit() and int(text) <= 65535):
        raise argparse.ArgumentTypeError(f"{text!r} is no port: 0 to 65535")
    return int(text)


def command_line() -> argparse.ArgumentParser:
    """The options, each explained."""
    parser = argparse.ArgumentParser(
        description="A small shop that shows asgi-server-sessions at work. Ctrl-C ends it.",
        epilog="Unless you say otherwise, sessions are kept in memory and end with the program. The key that"
        " signs cookies is made anew at each start, or kept beside the SQLite file. To use your own, put it"
        " into the environment variable SESSION_SECRET.",
    )
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument(
        "--sqlite", nargs="?", const="demo.db", metavar="PATH",
        help="keep sessions in this file, so that a restart ends none (without a PATH: demo.db)",
    )  # fmt: skip
    kinds.add_argument(
        "--redis", nargs="?", const="redis://127.0.0.1:6379/0", metavar="URL",
        help="keep sessions on this Redis or Valkey server (without a URL: redis://127.0.0.1:6379/0)",
    )  # fmt: skip
    parser.add_argument(
        "--host", default="127.0.0.1", metavar="ADDRESS",
        help="the address to listen on (default: 127.0.0.1, for this machine only; 0.0.0.0 is for all)",
    )  # fmt: skip
    parser.add_argument(
        "--port", default=8000, type=port_number, metavar="NUMBER",
        help="the port to listen on (default: 8000; 0 takes any that is free)",
    )  # fmt: skip
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve until Ctrl-C."""
    options = command_line().parse_args(arguments)
    listener = listen(options.host, options.port)  # from now on it answers
    store, name, secret = kept_in(options.sqlite, options.redis)
    logging.basicConfig(level=logging.INFO, format="  %(asctime)s  %(message)s", datefmt="%H:%M:%S")
    app = build(store, os.environ.get("SESSION_SECRET") or secret, name)
    config = uvicorn.Config(app, log_level="warning", lifespan="off", timeout_graceful_shutdown=1)
    host, port = listener.getsockname()[:2]
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    print(BANNER.format(store=name, url=url), flush=True)
    with suppress(KeyboardInterrupt):
        Server(config, app.state.leaving).run(sockets=[listener])


if __name__ == "__main__":
    main()
