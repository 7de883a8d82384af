"""One request's unit of work: what the handle asks of the store, alone and from several tasks."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from contextvars import ContextVar

import anyio

from .changes import Change
from .data import SessionData
from .errors import LockTimeoutError, SessionClosedError, SessionConflictError, SessionError
from .holding import Holding
from .session import Mode, Session
from .stores.checkout import Missing, raise_for

_NOBODY = Session()

_inside: ContextVar[object] = ContextVar("asgi_sessions_transaction", default=None)
# the transaction in whose block this code runs, as its task, a child of it or a thread; the unit itself for
# one in the request that holds the lock


class Unit(Holding):
    """What a session's handle calls: `save`, `release`, `transaction`.

    The tasks of a request share its handle. One of them at a time transacts; what the others change
    meanwhile is refused. `refused` says that the app's last `save` or `release` failed; `refusal` is what
    the last of them or of its transactions raised.
    """

    refused = False
    refusal: SessionError | None = None
    _turn: anyio.Lock | None = None
    _transaction: object | None = None  # the one under way that took a turn of its own

    def holds(self, store: object, session_id: str) -> bool:
        """Whether this session of this store is the unit's record."""
        taken = self._checkout
        return taken is not None and store is self.rules.store and taken.session_id == session_id

    def is_inside(self) -> bool:
        """Whether this code runs in the block of the transaction under way."""
        return self._transaction is not None and _inside.get() is self._transaction

    async def commit(self, *, release: bool) -> None:
        """Store what changed now, or raise why it is not stored."""
        self.refused = True
        with self._noted():
            raise_for(await self.store_changes(release=release))
        self.refused = False
        if release and not self._is_busy_elsewhere():
            self.session.mode = Mode.CLOSED

    @asynccontextmanager
    async def transaction(self, session: Session) -> AsyncIterator[SessionData]:
        """See `Session.transaction`; `session` is the handle, which may outlive its request."""
        with self._noted():
            async with self._transacting(session) as data:
                yield data

    @contextmanager
    def _noted(self) -> Iterator[None]:
        """Remember why the app was refused: a framework may make an answer of its own of the error."""
        try:
            yield
        except SessionError as error:
            self.refusal = error
            raise
        self.refusal = None

    @asynccontextmanager
    async def _transacting(self, session: Session) -> AsyncIterator[SessionData]:
        self.session = session
        if self.session.is_open():
            around = _inside.get()
            nested = self._transaction is not None or around is self
            _inside.set(around if nested else self)
            try:
                with self.session.savepoint() as data:
                    yield data
            finally:
                _inside.set(around)
            if not nested:  # else the outer block stores, or rolls back
                await self.commit(release=False)
            return
        async with self._one_at_a_time():
            self.session = session
            mode, around = self.session.mode, _inside.get()
            self._transaction = object()
            _inside.set(self._transaction)
            try:
                async with self._own_turn() as data:
                    yield data
            finally:
                _inside.set(around)
                self._transaction = None
                self.session.mode = mode

    def refuse_unseen_change(self) -> None:
        """Raise where a read-only session was changed within a value: it would be lost without a word."""
        if self.session.mode is Mode.READ_ONLY and self.session.change() is not Change.NOTHING:
            self.session.require_open()

    @asynccontextmanager
    async def _one_at_a_time(self) -> AsyncIterator[None]:
        """Let the tasks of this request transact in turn: they share the handle."""
        turn = self._turn = self._turn or anyio.Lock()
        try:
            turn.acquire_nowait()
        except anyio.WouldBlock:
            wait = self.rules.lock_to_transact.wait
            with anyio.move_on_after(wait) as waiting:
                await turn.acquire()
            if waiting.cancelled_caught:
                raise LockTimeoutError(wait) from None
        try:
            yield
        finally:
            turn.release()

    @asynccontextmanager
    async def _own_turn(self) -> AsyncIterator[SessionData]:
        """Lock and load anew for one block, commit and release after it."""
        self.refuse_unseen_change()
        await self._retake()
        self.session.mode = Mode.TRANSACTION
        try:
            yield self.session.data
            raise_for(await self.store_changes(release=True))
        except BaseException:
            if self._checkout is None:
                self.session.forget()
            else:
                self.session.load(self._checkout.record)
            raise
        finally:
            await self.abandon()

    async def _retake(self) -> None:
        """Check the record out again, under the lock; nothing where this session never had a record."""
        if self._checkout is None:
            if not self.deliverable:
                raise SessionClosedError(
                    "this client has no session, and its cookie can no longer be sent:"
                    " begin the session before the response starts or the WebSocket is accepted"
                )
            return
        session_id = self._checkout.session_id
        taken = await self.rules.store.checkout(session_id, self.rules.lock_to_transact, self.rules.lifetime)
        if isinstance(taken, Missing):
            self._retired = taken is Missing.RETIRED
            self._forget_record()
        else:
            refusal = self._show(taken)
            if refusal is not None:
                await self._refuse(refusal, taken)
        if self._checkout is None:
            raise SessionConflictError("the session has ended since it was loaded")

    @property
    def is_settled(self) -> bool:
        """Whether nothing is held and nobody transacts."""
        return self._transaction is None and (self._checkout is None or self._checkout.token is None)

    def detach(self) -> None:
        """The request is over: without this reference its objects go at once, not with the next collection.

        A handle that is used later comes back by itself (`Session.transaction` in a task that lives on).
        """
        if self._transaction is None:
            self.session = _NOBODY

    def _is_busy_elsewhere(self) -> bool:
        return self._transaction is not None and not self.is_inside()
