"""Server-side sessions for any ASGI app: typed, locked, and never losing an acknowledged change.

The walk of a request, in order:

1. The cookie is read and its signature verified (`cookie`). Without a valid one the request gets a fresh
   session and the store is not asked.
2. The record is checked out: its lock and its content in one round trip (`stores`).
3. The client's fingerprint is compared (`fingerprint`); another client gets a fresh session, or
   the app is told that it is another one.
4. The app runs and uses `request.session`, a dict with a typed record behind it (`session`, `data`).
5. The answer's start is held back until what changed is committed, which writes only if nobody else has the
   lock and the record is the version that was checked out (`http`, `unit`, `commit`).
6. The lock goes in the same trip; whatever happens, it goes.
"""

from typing import TYPE_CHECKING

from .client.fingerprint import Fingerprint
from .client.starlette import StarletteCookies
from .errors import (
    LockAcquisitionError,
    LockLostError,
    LockReleaseError,
    LockTimeoutError,
    ReadOnlySessionError,
    SessionClosedError,
    SessionConflictError,
    SessionDataError,
    SessionError,
    SessionLockError,
    SessionStoreError,
    TooManyWaitersError,
)
from .middleware import SessionMiddleware
from .observation.events import SessionEvent, session_hash
from .record.model import SessionData
from .record.queries import SessionFilter, SessionMetrics
from .session.access import get_session, get_session_data, session_dependency
from .session.device import Device
from .session.handle import Session
from .stores.contract import SessionStore
from .stores.memory import InMemorySessionStore

__version__ = "0.2.0.dev0"

__all__ = [
    "Device",
    "DistributedLock",
    "DistributedLockManager",
    "Fingerprint",
    "InMemorySessionStore",
    "LockAcquisitionError",
    "LockLostError",
    "LockReleaseError",
    "LockTimeoutError",
    "ReadOnlySessionError",
    "RedisSessionStore",
    "SQLiteSessionStore",
    "Session",
    "SessionClosedError",
    "SessionConflictError",
    "SessionData",
    "SessionDataError",
    "SessionError",
    "SessionEvent",
    "SessionFilter",
    "SessionLockError",
    "SessionMetrics",
    "SessionMiddleware",
    "SessionStore",
    "SessionStoreError",
    "StarletteCookies",
    "TooManyWaitersError",
    "get_session",
    "get_session_data",
    "session_dependency",
    "session_hash",
]

if TYPE_CHECKING:
    from .stores.redis.lock import DistributedLock, DistributedLockManager
    from .stores.redis.store import RedisSessionStore
    from .stores.sqlite.store import SQLiteSessionStore

# What needs redis-py or SQLite is imported when it is first named: memory sessions need nothing installed.
_ON_DEMAND = {
    "DistributedLock": ".stores.redis.lock",
    "DistributedLockManager": ".stores.redis.lock",
    "RedisSessionStore": ".stores.redis",
    "SQLiteSessionStore": ".stores.sqlite",
}


def __getattr__(name: str) -> object:
    if name in _ON_DEMAND:
        from importlib import import_module

        return getattr(import_module(_ON_DEMAND[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
