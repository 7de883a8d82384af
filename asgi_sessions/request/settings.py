"""What the middleware was given, in the form in which a request uses it."""

from __future__ import annotations

import time
from dataclasses import dataclass

from ..client.agent import ClientRecorder
from ..client.cookie import Presented, SessionCookie
from ..client.fingerprint import FingerprintReader
from ..client.starlette import OldCookies
from ..observation.events import EventSink
from ..record.model import SessionData
from ..stores.checkout import Lifetime, LockPolicy
from ..stores.contract import SessionStore
from .answers import Answers
from .arrivals import Arrivals

_CLEANS_AFTER = 60  # seconds; so often at most a browser is told to forget leftover cookies


@dataclass(frozen=True, slots=True)
class Settings:
    """What is the same for every request of one middleware; times in seconds."""

    store: SessionStore
    model: type[SessionData]
    lifetime: Lifetime
    lock: LockPolicy | None  # None: requests take no lock, and commits compare versions
    lock_to_transact: LockPolicy
    optimistic: bool  # lock="auto": safe requests run without the lock
    cookie: SessionCookie
    old_cookies: OldCookies | None  # of another middleware, whose sessions are taken over
    max_age: float | None
    arrivals: Arrivals | None  # None: a new record has its full life at once
    refresh_after: float | None  # rolling: the age at which a cookie is sent again
    rotate_every: float | None  # the age of a cookie at which its id is replaced
    renew_after: float | None  # the lesser of both
    early_release: bool  # release_lock="response_start"
    max_sessions_per_user: int | None
    rotate_on: frozenset[str]  # the values that say who is signed in
    client: FingerprintReader | None  # None: fingerprints are off
    reports_mismatch: bool  # another client's session is served and the app is told, instead of refused
    recorder: ClientRecorder | None  # record_client: tells who signs in
    device_keys: tuple[bytes, ...]  # for the handles of devices; the first makes them
    answers: Answers
    events: EventSink

    def rotates(self, presented: Presented) -> bool:
        """Whether the id is to be replaced where that can be; wherever its cookie is due anyway.

        The date of a cookie is its id's: a cookie that is sent again keeps it.
        """
        return self.rotate_every is not None and self.renews(presented)

    def presented(self, line: bytes | None) -> Presented:
        """What a request's `cookie` header says; another middleware's counts where none of ours does."""
        presented, old = self.cookie.read(line), self.old_cookies
        if old is None or presented.session_id is not None or presented.rivals:
            return presented
        return old.complete(presented, line)

    def refreshes(self, presented: Presented) -> bool:
        """Whether a cookie is to be sent again: old, signed by an old key, or with dead ones beside it."""
        return self._is_due(presented, self.refresh_after)

    def renews(self, presented: Presented) -> bool:
        """Whether one of both holds."""
        return self._is_due(presented, self.renew_after)

    def _is_due(self, presented: Presented, after: float | None) -> bool:
        if presented.stale_key:
            return True
        if presented.leftover:
            after = _CLEANS_AFTER if after is None else min(after, _CLEANS_AFTER)
        return after is not None and time.time() - presented.issued_at >= after
