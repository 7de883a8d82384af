"""The blocks of transactions: the tasks of one request enter them one after the other."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from contextvars import ContextVar

import anyio

from ..errors import LockTimeoutError


class Block:
    """The block of a transaction, in which others may be nested.

    The outermost is no transaction. It belongs to the request, and all others are nested in it.
    """

    __slots__ = ("has_ended", "is_void", "lock", "outer", "owner", "pending", "wait")

    def __init__(self, owner: object, wait: float, outer: Block | None = None) -> None:
        self.owner = owner  # the request's transactions
        self.wait = wait  # seconds, for one's turn
        self.outer = outer
        self.lock: anyio.Lock | None = None  # for those that are nested directly in this one
        self.has_ended = False
        self.pending = False  # the handle held changes of the request when the block began
        self.is_void = False  # the request was rolled back, and these changes with it

    def nested(self) -> Block:
        """A block within this one."""
        return Block(self.owner, self.wait, self)

    def is_part(self) -> bool:
        """Whether the block is a part of another transaction."""
        return self.outer is not None and self.outer.outer is not None

    def is_over(self) -> bool:
        """Whether the block has ended, or one around it."""
        return self.has_ended or (self.outer is not None and self.outer.is_over())

    def chain(self) -> Iterator[Block]:
        """This block and those around it, without the outermost."""
        block = self
        while block.outer is not None:
            yield block
            block = block.outer

    def under_way(self) -> Block | None:
        """The innermost of these that is not over: a task may outlive the block that it began in."""
        return next((block for block in self.chain() if not block.is_over()), None)

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Let one nested transaction run at a time."""
        lock = self.lock = self.lock or anyio.Lock()
        try:
            lock.acquire_nowait()
        except anyio.WouldBlock:
            with anyio.move_on_after(self.wait) as waiting:
                await lock.acquire()
            if waiting.cancelled_caught:
                raise LockTimeoutError(self.wait) from None
        try:
            yield
        finally:
            lock.release()

    async def nested_are_over(self) -> None:
        """Wait for those that tasks of the block have begun in it: what they do is a part of it."""
        if self.lock is not None:
            async with self.turn():
                pass


inside: ContextVar[Block | None] = ContextVar("asgi_sessions_transaction", default=None)
"""The block that this code runs in: as its task, as a child of that task, or in a thread."""
