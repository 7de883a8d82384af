"""A place in the queue of one process."""

from __future__ import annotations

from ....backend import Wake
from ....errors import SessionStoreError
from .waiter import Acquired


class Seat:
    """Where one request waits behind others of its process. It is small, because a thousand may wait.

    It is given the lock with the record, or the turn to ask Redis: the token of a lock to take over, else
    nothing. Or it is told the fault that the asker met.
    """

    __slots__ = ("given", "who", "woken")

    def __init__(self, who: bytes) -> None:
        self.who = who  # waits here; see `commands.who`
        self.woken = Wake()
        self.given: Acquired | bytes | SessionStoreError = b""

    def give(self, given: Acquired | bytes | SessionStoreError) -> None:
        """Wake who waits, with this."""
        self.given = given
        self.woken.set()

    @property
    def token(self) -> bytes:
        """Of the lock that was given; empty where none was."""
        given = self.given
        if isinstance(given, Acquired):
            return given.token
        return given if isinstance(given, bytes) else b""

    def taken(self) -> Acquired | bytes:
        """What was given; raises the fault."""
        if isinstance(self.given, SessionStoreError):
            raise self.given
        return self.given
