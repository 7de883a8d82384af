"""Every error of the package. Facts are attributes; no message ever contains a session id.

A bad signature, an unknown or expired id and a fingerprint mismatch are not errors: they give a new
session and one event.
"""

from __future__ import annotations


class SessionError(Exception):
    """Base of every error raised by this package."""


class SessionStoreError(SessionError):
    """The store's backend failed or did not answer in time; the cause is chained.

    Whether the change that was on its way is stored is not known. Answered with 503.
    """


class SessionConflictError(SessionError):
    """The record changed, by somebody who did not wait for the lock, since it was loaded.

    Nothing was written. Answered with 409.
    """


class SessionClosedError(SessionError):
    """The session was changed after its last chance to be stored; `Session.transaction()` is the way."""


class ReadOnlySessionError(SessionError):
    """A session that was loaded without a lock (read-only route, WebSocket) was changed.

    Use `Session.transaction()` for the change.
    """


class SessionDataError(SessionError):
    """A value cannot be stored; the record keeps its old content. Answered with 500.

    `path` names the value (``metadata.cart[3]``), `reason` says what is wrong with it.
    """

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"the session cannot be stored: {path} {reason}")
        self.path = path
        self.reason = reason


class SessionLockError(SessionError):
    """Base of the lock's errors."""


class LockAcquisitionError(SessionLockError):
    """The lock was not acquired; nothing is held and nobody waits any more."""


class LockTimeoutError(LockAcquisitionError):
    """Others held the lock for all of the `waited` seconds. Answered with 503."""

    def __init__(self, waited: float) -> None:
        super().__init__(f"the session's lock was held by others for {waited:.3f} seconds")
        self.waited = waited


class TooManyWaitersError(LockAcquisitionError):
    """`limit` others wait for this lock already. Answered with 503."""

    def __init__(self, limit: int) -> None:
        super().__init__(f"{limit} others wait for this session's lock already")
        self.limit = limit


class ClientGoneError(LockAcquisitionError):
    """The client of a request that was waiting for the lock has gone, and the request with it."""

    def __init__(self) -> None:
        super().__init__("the client has gone while its request waited for the session's lock")


class LockReleaseError(SessionLockError):
    """The backend failed while the lock was released. That is tried again until its lease is over."""


class LockLostError(SessionLockError):
    """The lease ended before the commit; nothing was written. Answered with 409."""
