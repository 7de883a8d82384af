"""How tasks are ended."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

_PATIENCE = 0.25  # seconds for what a task does as it ends


async def end(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancel tasks until they have ended, whatever they raise.

    Once is not enough: up to Python 3.11 `asyncio.wait_for` swallows a cancellation that comes together with
    its result (CPython issue 86296), and the task would go on for ever.
    """
    pending = set(tasks)
    while pending:
        for task in pending:
            task.cancel()
        pending = (await asyncio.wait(pending, timeout=_PATIENCE))[1]
