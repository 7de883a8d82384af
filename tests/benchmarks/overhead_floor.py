"""The least that keeps the promises in memory: what a session middleware cannot do without, written by hand.

A signed cookie, a lock for each id, JSON in and out, a comparison, a write before the answer leaves. No
fingerprint, lifetime, eviction, event, typed record, sign-out, rotation, or error that explains itself.
"""

from __future__ import annotations

import asyncio
import hmac
import secrets
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

from pydantic_core import from_json, to_json

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

_PAIR = b"session="

Wrap: TypeAlias = "Callable[[ASGIApp], ASGIApp]"


def signature(key: bytes, session_id: bytes) -> bytes:
    return hmac.digest(key, session_id, "sha256").hex().encode()


def verified(key: bytes, headers: Iterable[tuple[bytes, bytes]]) -> bytes | None:
    """The id in the request's cookie; None where there is none that was signed by `key`."""
    for name, value in headers:
        if name == b"cookie" and _PAIR in value:
            token = value.partition(_PAIR)[2].partition(b";")[0]
            session_id, _, signed = token.partition(b".")
            return session_id if hmac.compare_digest(signature(key, session_id), signed) else None
    return None


@dataclass(slots=True)
class Entry:
    record: bytes = b"{}"
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


def floor(key: bytes) -> Wrap:
    """Middlewares that share their sessions."""
    entries: dict[bytes, Entry] = {}

    def wrap(app: ASGIApp) -> ASGIApp:
        async def sessions(scope: Scope, receive: Receive, send: Send) -> None:
            session_id = verified(key, scope["headers"])
            entry = None if session_id is None else entries.get(session_id)
            if session_id is not None and entry is not None:
                async with entry.lock:
                    await app(scope, receive, storing(scope, send, entry))
                return
            session_id, entry = secrets.token_hex(16).encode(), Entry()
            cookie = _PAIR + session_id + b"." + signature(key, session_id)
            await app(scope, receive, storing(scope, send, entry, cookie))
            if entry.record != b"{}":
                entries[session_id] = entry

        return sessions

    return wrap


def storing(scope: Scope, send: Send, entry: Entry, cookie: bytes | None = None) -> Send:
    """Load the session, and store what changed before the answer, or its last chunk, is sent."""
    session = scope["session"] = from_json(entry.record)
    held: Message | None = None

    async def stored(message: Message) -> None:
        nonlocal held
        if message["type"] == "http.response.start":
            if cookie is not None:
                message["headers"].append((b"set-cookie", cookie))
            if any(name == b"content-length" for name, _ in message["headers"]):
                held = message
                return
        record = to_json(session)
        if record != entry.record:
            entry.record = record
        if held is not None:
            await send(held)
            held = None
        await send(message)

    return stored
