"""The end of a session, as those learn of it who wait for it in this process and in others."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..endings import Endings, Life
from .queries import ALIVE
from .reader import Reader
from .waking import Waking

LOOK_EVERY = 5.0  # seconds between two looks at a session that somebody waits for: a message may be lost
_ENDS = f"SELECT ends FROM session WHERE id = ? AND {ALIVE}"  # noqa: S608  # a constant


class Ends:
    """Looks at sessions, and tells all processes which of them have ended. `clock` is the store's."""

    def __init__(self, reader: Reader, waking: Waking, clock: Callable[[], float]) -> None:
        self.endings = Endings(self._life_of, self._nobody_waits)
        self._reader = reader
        self._waking = waking
        self._clock = clock

    def tell(self, session_ids: Sequence[str]) -> None:
        """These sessions have ended; from any thread."""
        self.endings.tell(session_ids)
        self._waking.tell_ended(session_ids)

    async def _life_of(self, session_id: str) -> Life | None:
        """How a session lives. What ends from here on is told."""
        is_told, now = self._waking.await_ends(), self._clock()
        rows = await self._reader.rows(_ENDS, session_id, now)
        return Life(min(rows[0][0] - now, LOOK_EVERY), is_told) if rows else None

    def _nobody_waits(self) -> None:
        self._waking.forget_ends(lambda: not self.endings)
