"""The command line: `asgi-sessions key | health | stats | sessions | logout`."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import secrets
import sys
from collections.abc import Sequence

from .errors import SessionError
from .observation.events import session_hash
from .stores.contract import SessionStore
from .stores.sqlite import SQLiteSessionStore
from .stores.urls import resolve_store

ENCRYPTION_KEYS = "ASGI_SESSIONS_ENCRYPTION_KEYS"
SECRET_KEY = "ASGI_SESSIONS_SECRET_KEY"  # noqa: S105  # the variable's name


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Exit status: 0; 1 where the store failed or is not healthy; 2 for wrong usage."""
    options = _parser().parse_args(arguments)
    if options.command == "key":
        print(secrets.token_hex(32))
        return 0
    try:
        return asyncio.run(_run(options))
    except (SessionError, ValueError, ImportError) as error:
        print(f"asgi-sessions: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="asgi-sessions", description="Look after a session store.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("key", help="print a new secret_key")
    helps = {
        "health": "write, read and delete a probe",
        "stats": "print the store's figures",
        "sessions": (
            "list the sessions of a user (ids shortened: a whole one is a password), with their hashes in"
            f" the log if the app's secret_key is in the environment as {SECRET_KEY}"
        ),
        "logout": f"end every session of a user; encrypted ones need their keys in {ENCRYPTION_KEYS}",
    }
    for name, text in helps.items():
        command = commands.add_parser(name, help=text)
        command.add_argument("url", help="the store, e.g. sqlite:///sessions.db or redis://127.0.0.1:6379/0")
        command.add_argument("--prefix", default="session:", help="key prefix of a store in Redis")
        if name in ("sessions", "logout"):
            command.add_argument("user", help="the user's id")
    return parser


async def _run(options: argparse.Namespace) -> int:
    store = resolve_store(options.url, prefix=options.prefix)
    if isinstance(store, SQLiteSessionStore) and not store.path.exists():
        raise ValueError(f"there is no file {str(store.path)!r}; an app makes it at its start")
    keys = os.environ.get(ENCRYPTION_KEYS, "")
    store.encrypt([key.strip() for key in keys.split(",") if key.strip()])
    try:
        return await _COMMANDS[options.command](store, options)
    finally:
        await store.aclose()


async def _health(store: SessionStore, options: argparse.Namespace) -> int:
    health = await store.health_check()
    print(json.dumps(health, indent=2, default=str))
    return 0 if health["healthy"] else 1


async def _stats(store: SessionStore, options: argparse.Namespace) -> int:
    metrics = await store.get_metrics()
    print(json.dumps({**await store.get_stats(), **metrics.model_dump()}, indent=2, default=str))
    return 0


async def _sessions(store: SessionStore, options: argparse.Namespace) -> int:
    for data in await store.list_for_user(options.user):
        since, last = f"{data.created_at:%Y-%m-%d %H:%M}", f"{data.last_activity:%Y-%m-%d %H:%M}"
        print(f"{data.session_id[:6]}…  {_in_the_log(data.session_id)}since {since}  last {last}")
    return 0


def _in_the_log(session_id: str) -> str:
    """The session's hash in logs and events; nothing where the secret key is not in the environment."""
    key = os.environ.get(SECRET_KEY)
    return f"session={session_hash(session_id, key)}  " if key else ""


async def _logout(store: SessionStore, options: argparse.Namespace) -> int:
    print(f"{await store.delete_for_user(options.user)} sessions ended")
    return 0


_COMMANDS = {"health": _health, "stats": _stats, "sessions": _sessions, "logout": _logout}
