"""How a request waits for its turn."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from typing import cast

from ...errors import LockTimeoutError, SessionStoreError
from ..answers import Answer
from ..checkout import Checkout, Missing
from ..holders import NOTICE_AFTER, Holder, host_name
from ..running import running
from .reader import Reader
from .transaction import Waiter
from .writer import Fault

_QUEUE = "SELECT route, process, since FROM lock WHERE id = ? ORDER BY pos"


async def turn_of(
    reader: Reader, waiter: Waiter, began: float, moments: Callable[[], float]
) -> Checkout | Missing:
    """Wait for the lock; `LockTimeoutError` when the time is over that began then.

    A request that has waited for a second tells who holds the lock, by the clock of leases, `moments`.
    """
    answer, ends = cast(Answer, waiter.granted), began + waiter.policy.wait
    await answer.wait(min(ends, began + NOTICE_AFTER) - time.monotonic())
    if not answer.is_set:
        if ends > began + NOTICE_AFTER:
            await _tell_who_holds(reader, waiter.session_id, moments)
        await answer.wait(ends - time.monotonic())
        if not answer.is_set:
            raise LockTimeoutError(time.monotonic() - began)
    if isinstance(answer.value, Fault):
        raise answer.value.error
    found: Checkout | Missing = answer.value
    return found


async def _tell_who_holds(reader: Reader, session_id: str, moments: Callable[[], float]) -> None:
    requests = running.get()
    if not requests:
        return
    with suppress(SessionStoreError):
        rows = await reader.rows(_QUEUE, session_id)
        if rows:
            route, process, since = rows[0]
            holder = Holder(route, host_name(), int(process.partition("-")[0]), moments() - since)
            requests[-1].has_waited(session_id, holder, len(rows) - 1)
