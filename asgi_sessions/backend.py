"""Which library runs the current task."""

from __future__ import annotations

import asyncio
import sys
from typing import Any


def asyncio_task() -> asyncio.Task[Any] | None:
    """The current task; None where trio runs it."""
    try:
        return asyncio.current_task()
    except RuntimeError:
        return None


def cancellations(task: asyncio.Task[Any]) -> int | None:
    """How often the task was asked to end and has not taken it back; None before Python 3.11."""
    return task.cancelling() if sys.version_info >= (3, 11) else None


def take_back_cancellation(task: asyncio.Task[Any]) -> None:
    """Undo the count of one `cancel` that has done its work."""
    if sys.version_info >= (3, 11):
        task.uncancel()
