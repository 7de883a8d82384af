"""A call of Redis that is under way."""

from __future__ import annotations

import asyncio
from functools import partial

from ....errors import SessionStoreError
from .replies import About, Fits, Reply, anything
from .script import Script

CLOSED = "the connection to Redis was closed"
OUT_OF_STEP = "the connection to Redis gave a reply that is none to its call, and was dropped"
LOST = "the connection to Redis was lost; whether the call was carried out is not known"


class NotSentError(SessionStoreError):
    """The call never left, so it has done nothing."""


class Call:
    """A command under way and the future of its reply. The reply has to fit what the command is `about`."""

    __slots__ = ("about", "fits", "future", "hops", "packed", "script", "sent_twice", "since")

    def __init__(
        self,
        script: Script | None,
        packed: bytes,
        future: asyncio.Future[Reply],
        since: float,
        about: About = b"",
        fits: Fits = anything,
    ) -> None:
        self.script = script  # None: a plain command
        self.packed = packed
        self.future = future
        self.since = since
        self.about: About = about
        self.fits: Fits = fits
        self.sent_twice = False
        self.hops = 0  # how often a cluster has sent it elsewhere

    @property
    def is_prompt(self) -> bool:
        """Whether it leaves before the caller's next call."""
        return self.script is None or self.script.prompt

    def teach(self) -> bool:
        """Make the call ready to be sent with the script's body; False where that is not what is missing."""
        if self.script is None or not self.packed.startswith(self.script.by_sha):
            return False
        self.packed = self.script.by_body + self.packed[len(self.script.by_sha) :]
        return True

    def again(self) -> bool:
        """Make the call ready to be sent once more, though it may have been carried out.

        False where that is not allowed: it was sent twice already, or its script may run only once.
        """
        if self.sent_twice or (self.script is not None and self.script.once):
            return False
        self.sent_twice = True
        if self.script is not None and self.script.doubtful:
            caller = self.future
            self.future = caller.get_loop().create_future()
            self.future.add_done_callback(partial(_answer_again, caller, self.script.doubtful))
        return True

    def answer(self, reply: Reply) -> None:
        """Give the caller its reply, if there still is a caller."""
        if not self.future.done():
            self.future.set_result(reply)

    def fail(self, message: str, cause: BaseException | None = None, *, sent: bool = True) -> None:
        """Give the caller a `SessionStoreError` of its own. `sent`: Redis may have got the call."""
        if not self.future.done():
            error = SessionStoreError(message) if sent else NotSentError(message)
            error.__cause__ = cause
            self.future.set_exception(error)


def forget(future: asyncio.Future[Reply]) -> None:
    """Nobody waits for this reply; an error in it has been dealt with."""
    if not future.cancelled():
        future.exception()


def _answer_again(
    caller: asyncio.Future[Reply], doubtful: tuple[bytes, ...], again: asyncio.Future[Reply]
) -> None:
    """Pass on the reply to a call that was sent twice. A refusal may be of the second one alone."""
    error = again.exception()
    if caller.done():
        return
    reply = None if error is not None else again.result()
    if error is not None:
        caller.set_exception(error)
    elif isinstance(reply, bytes) and reply in doubtful:
        caller.set_exception(SessionStoreError(LOST))
    else:
        caller.set_result(reply)
