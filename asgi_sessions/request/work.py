"""The unit of work, as its parts see it: what loads for it, commits for it, transacts for it."""

from __future__ import annotations

from typing import NoReturn, Protocol

from ..asgi import Scope
from ..session.handle import Session
from ..stores.checkout import Checkout, Missing, Outcome
from .block import Block
from .commit import Commit
from .settings import Settings
from .state import News, State


class Work(Protocol):
    """`UnitOfWork`, which knows those parts; there it says what each member means."""

    scope: Scope
    settings: Settings
    session: Session
    client: str | None
    passive: bool
    record: Checkout | Missing
    held_since: float
    state: State
    below: State | None
    news: News | str
    refusal: Outcome
    committing: Commit | None
    block: Block | None
    is_clients: bool
    client_ended: bool
    tried: str | None
    has_stored: bool
    is_last: bool

    def hold(self, record: Checkout | Missing) -> None: ...

    def tell(self, new_id: str | None) -> None: ...

    def leads_to(self, session_id: str) -> None: ...

    def refuse_unseen_change(self) -> None: ...

    async def commit(self, *, release: bool) -> None: ...

    async def store_changes(self, *, release: bool) -> Outcome: ...

    def may_run_again(self) -> bool: ...

    def discard(self) -> NoReturn: ...

    async def abandon(self) -> None: ...
