"""The transactions of one request: which are under way, and whose turn it is."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager

from ..record.model import SessionData
from ..session.handle import Session
from ..stores.checkout import Outcome
from .block import Block, inside
from .commits import commit_is_over
from .state import RELEASED
from .transaction import kind_of, resume
from .work import Work


class Transactions:
    """One task of the request at a time is in a transaction; those of its own tasks nest in it.

    Only the code of the innermost block may change the session meanwhile. What the handle held before a block
    began waits for the block's end.
    """

    __slots__ = ("_outermost", "_work")

    def __init__(self, work: Work, wait: float) -> None:
        self._work = work
        self._outermost = Block(self, wait)

    @asynccontextmanager
    async def begin(self, session: Session, *, store: bool) -> AsyncIterator[SessionData]:
        """A transaction of this handle. Without `store` its changes are left to the request."""
        work, code, outer = self._work, inside.get(), self._around()
        async with outer.turn():
            await commit_is_over(work)  # which may change the state, or the id
            work.session = session
            block = work.block = outer.nested()
            inside.set(block)
            try:
                async with kind_of(work, block, store) as data:
                    yield data
            finally:
                inside.set(code)
                block.has_ended = True
                await self._has_ended(outer)

    async def _has_ended(self, outer: Block) -> None:
        """The block's end: the code around it has the session again, or the request has."""
        work = self._work
        if work.block is None or not work.block.is_over():
            return
        work.block = outer.under_way()
        if work.block is None and work.below is not None:
            resume(work)
            if work.state is RELEASED:
                await work.abandon()

    def here(self) -> Block | None:
        """The transaction of this request that this code runs in."""
        block = inside.get()
        return block.under_way() if block is not None and block.owner is self else None

    def _around(self) -> Block:
        """The block in which a transaction that begins here is nested."""
        return self.here() or self._outermost

    async def store_after(self, *, release: bool) -> Outcome:
        """Store what the handle held before the transaction under way began, if anything, when it is over."""
        if not any(block.pending for block in self._under_way()):
            return Outcome.STORED
        async with self._around().turn():
            return await self._work.store_changes(release=release)

    def outlive_roll_back(self) -> None:
        """The request is rolled back: a transaction goes on, unless it stands on what is undone."""
        for block in self._under_way():
            block.is_void = block.pending

    def _under_way(self) -> Iterable[Block]:
        return () if self._work.block is None else self._work.block.chain()
