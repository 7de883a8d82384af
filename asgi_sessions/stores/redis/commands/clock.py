"""Redis' clock, as this process knows it."""

from __future__ import annotations

import math

TOLD_FOR = 1.0  # seconds; a call that asks for the time costs Redis a tenth more
TEXT_FOR = 0.1  # seconds


class Clock:
    """One node's time in ms since the epoch: what it said last, carried on by the event loop's clock.

    It is ahead rather than behind, by the time that the question took to reach Redis. So what is left of a
    session's life is never overstated.
    """

    __slots__ = ("_text", "_text_until", "ahead", "told_until")

    def __init__(self, ahead: float) -> None:
        self.ahead = ahead  # of the event loop's clock, ms; a guess until Redis tells
        self.told_until = -math.inf  # by the event loop's clock; later it may have been set
        self._text = b""
        self._text_until = -math.inf

    def told(self, now: int, asked: float) -> None:
        """Take note of what Redis said when it was asked at this time of the event loop."""
        self.ahead = now - asked * 1000
        self.told_until = asked + TOLD_FOR

    def at(self, now: float) -> float:
        """What it says at this time of the event loop, as far as it is known."""
        return now * 1000 + self.ahead

    def text(self, now: float) -> bytes:
        """The same, in 13 digits behind a dot; up to a tenth of a second old, which is cheaper."""
        if now >= self._text_until:
            self._text, self._text_until = b".%013d" % self.at(now), now + TEXT_FOR
        return self._text
