"""A request as stores see it, while it runs: whose lock is asked for, and who holds the session already."""

from __future__ import annotations

import logging
from collections.abc import Coroutine
from contextlib import AbstractAsyncContextManager
from typing import Any, TypeVar

from ..asgi import Scope
from ..observation.events import LOCK_HELD
from ..record.model import SessionData
from ..session.changes import Fate
from ..stores.checkout import Checkout
from ..stores.holders import Holder
from .answers import route_of
from .incoming import Incoming
from .unit import UnitOfWork

T = TypeVar("T")


class Running:
    """Stands for one unit of work in `stores.running`, whose `RunningRequest` says what each member means."""

    __slots__ = ("_unit",)

    def __init__(self, unit: UnitOfWork) -> None:
        self._unit = unit

    @property
    def scope(self) -> Scope:
        """Empty when the request is over."""
        return self._unit.scope

    @property
    def route(self) -> str:
        """Method and path; empty when the request is over."""
        return route_of(self.scope) if self.scope else ""

    # -- the session that the request holds ----------------------------------------------------------------

    def holds(self, store: object, session_id: str) -> bool:
        """Whether this session of this store is the unit's record, and this code may change it there."""
        unit, taken = self._unit, self._unit.record
        if (
            not isinstance(taken, Checkout)
            or store is not unit.settings.store
            or taken.session_id != session_id
        ):
            return False
        return unit.is_open or (unit.transactions is not None and unit.transactions.here() is not None)

    def is_still(self, store: object, session_id: str) -> bool:
        """Whether it still is when a turn has come: its app has not ended it, nor has it a new id."""
        return self._unit.session.fate is not Fate.END and self.holds(store, session_id)

    def part(self) -> AbstractAsyncContextManager[SessionData]:
        """A transaction whose changes are stored with the request, which holds the session."""
        return self._unit.transaction(self._unit.session, store=False)

    async def keep_alive(self) -> None:
        """Restart the record's idle timeout, also where the request itself does not count as activity."""
        taken = self._unit.record
        if isinstance(taken, Checkout) and taken.idle is not None:
            await self._unit.settings.store.keep_alive(taken)

    # -- while the request waits ---------------------------------------------------------------------------

    def wait_with_client(self, turn: Coroutine[Any, Any, T]) -> Coroutine[Any, Any, T]:
        """Wait for a turn; before an HTTP app is called, no longer than the client stays."""
        unit = self._unit
        if unit.is_opened or unit.scope.get("type") != "http":
            return turn
        incoming = unit.incoming = Incoming(unit.receive)
        unit.receive = incoming.receive
        return incoming.wait(turn)

    def has_waited(self, session_id: str, holder: Holder, waiting: int) -> None:
        """Tell the log who holds the lock that this request has waited for a second."""
        events, route = self._unit.settings.events, holder.route or "outside any request"
        if events.is_due(LOCK_HELD, route):
            events.emit(
                LOCK_HELD, session_id, level=logging.WARNING, route=self.route, holder=route,
                host=holder.host, process=holder.process, held=round(holder.seconds, 1), waiting=waiting,
            )  # fmt: skip
