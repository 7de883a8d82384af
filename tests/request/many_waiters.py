"""Prints how many bytes more a request takes that waits for its lock than one that waits for its body.

python tests/request/many_waiters.py URL-OF-A-STORE
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable, Iterable
from itertools import cycle
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from asgi import KEY, http_scope
from memory import MANY, beyond, forever

from asgi_sessions import SessionData, SessionMiddleware
from asgi_sessions.asgi import Message, Receive, Scope, Send
from asgi_sessions.client.signer import CookieSigner
from asgi_sessions.request import incoming
from asgi_sessions.stores.checkout import LockPolicy
from asgi_sessions.stores.urls import resolve_store


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    await receive()


async def silent() -> Message:
    await forever()
    raise AssertionError


async def send(message: Message) -> None:
    raise AssertionError(message)


async def measure(url: str) -> float:
    store = resolve_store(url)
    ids = [f"{number:032}" for number in range(MANY + 1)]
    await store.set_batch({each: SessionData(session_id=each) for each in ids})
    served = SessionMiddleware(app, KEY, store=store, fingerprint=None, lock_wait=60)

    def asking(sessions: Iterable[str]) -> Callable[[], Awaitable[None]]:
        cookies = cycle([b"session=" + CookieSigner(KEY).sign(each).encode() for each in sessions])
        return lambda: served(http_scope(method="POST", headers=[(b"cookie", next(cookies))]), silent, send)

    await store.checkout(ids[0], LockPolicy(), None)
    found = await beyond(asking(ids[:1]), asking(ids[1:]))
    await store.aclose()
    return found


if __name__ == "__main__":
    incoming._LOOK_AFTER = 0.005  # all clients are watched
    print(asyncio.run(measure(sys.argv[1])))
