"""The app of a worker whose clock is wrong: `CLOCK_OFFSET` seconds ahead, or started at `CLOCK_AT`.

Only the wall clock is, as on a badly kept machine; the monotonic clock runs on.
"""

from __future__ import annotations

import os
import time
from datetime import datetime, timedelta, tzinfo

from starlette.applications import Starlette

_right = time.time
_right_ns = time.time_ns


def _offset() -> float:
    at = os.environ.get("CLOCK_AT")
    if at is None:
        return float(os.environ.get("CLOCK_OFFSET", "0"))
    return datetime.fromisoformat(at).timestamp() - _right()


OFFSET = _offset()


class Shifted(datetime):
    """Tells the wrong time."""

    @classmethod
    def now(cls, tz: tzinfo | None = None) -> datetime:  # type: ignore[override]  # a plain one will do
        return datetime.now(tz) + timedelta(seconds=OFFSET)


def from_environment() -> Starlette:
    """The app, all of which lives by the wrong clock."""
    time.time = lambda: _right() + OFFSET
    time.time_ns = lambda: _right_ns() + round(OFFSET * 1e9)
    from asgi_sessions.record import values as fields

    from . import app

    setattr(fields, "datetime", Shifted)  # noqa: B010  # whence the records' times; not exported
    assert abs(fields.utc_now().timestamp() - _right() - OFFSET) < 1
    return app.from_environment()
