"""One WebSocket: its session is loaded without a lock, and a new cookie rides on the accept."""

from __future__ import annotations

from ..asgi import Message
from ..errors import SessionError
from .replacement import take_replaced
from .response import fail, send_start
from .state import News
from .unit import UnitOfWork


class WebSocket(UnitOfWork):
    """Changes go through `Session.transaction()`, which takes the lock for as long as it runs."""

    is_accepted = False  # and the app has not closed it

    async def open(self, *, read_only: bool, passive: bool = False) -> None:
        """As for HTTP, always without the lock."""
        await super().open(read_only=True, passive=passive)

    async def send(self, message: Message) -> None:
        """What the app calls `send`."""
        kind = message["type"]
        if kind != "websocket.send":
            take_replaced(self.scope, self.session)
        if kind in ("websocket.accept", "websocket.http.response.start"):
            self.is_accepted = kind == "websocket.accept"
            await send_start(self, message)
            return
        if kind == "websocket.close":
            self.is_accepted = False
            self.news = News.TOLD
        await self.to_client(message)

    async def finish(self) -> None:
        """A change that no transaction stored is an error of the app."""
        take_replaced(self.scope, self.session)
        self.refuse_unseen_change()

    async def fail(self, error: Exception) -> None:
        """An error of ours closes an open connection; any other one rises."""
        if not (self.is_accepted and isinstance(error, SessionError)):
            await fail(self, error)
            return
        await self.roll_back()
        self.is_accepted = False
        session_id = self.presented.session_id
        await self.settings.answers.hang_up(self.scope, self.to_client, error, session_id)
