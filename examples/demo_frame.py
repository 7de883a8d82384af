"""What all pages of the demo share: the session's model, the frame with its facts, and small tools."""

from __future__ import annotations

import asyncio

from demo_pages import fill
from pydantic import BaseModel, Field
from starlette.requests import HTTPConnection, Request
from starlette.responses import HTMLResponse, Response

from asgi_sessions import SessionData, SessionStore, get_session, get_session_data, session_hash


class Item(BaseModel):
    """One line of a cart."""

    sku: str
    quantity: int = 1


class ShopSession(SessionData):
    """What this shop keeps of a visitor. Every field has a default, because a session begins empty."""

    cart: list[Item] = Field(default_factory=list)
    clicks: int = 0
    sockets: int = 0
    device: str = ""
    previous_id: str = ""


def page(request: Request, part: str, title: str, status: int = 200, **values: object) -> Response:
    """A whole page, with the session's facts."""
    body = fill(part, **values)
    markup = fill("layout", title=title, body=body, store=request.app.state.store_name, **facts(request))
    return HTMLResponse(markup, status, {"cache-control": "no-store"})  # Back shows no signed-out page


def short(connection: HTTPConnection, session_id: str) -> str:
    """The session's name in the log. The id itself is a secret."""
    return session_hash(session_id, connection.app.state.secret)


def facts(connection: HTTPConnection) -> dict[str, str]:
    """The session in short, for the strip on each page; `turn` is what others wait for now."""
    session, data = get_session(connection), get_session_data(connection, ShopSession)
    return {
        "id": "none" if session.is_new else short(connection, session.session_id),
        "since": "not yet" if session.is_new else f"{data.created_at:%H:%M:%S}",
        "user": data.user_id or "anonymous",
        "cart": str(sum(item.quantity for item in data.cart)),
        "messages": str(data.message_count),
        "clicks": str(data.clicks),
        "turn": "a checkout" if data.session_id in connection.app.state.at_the_till else "",
    }


async def pause(request: Request, seconds: float) -> bool:
    """Wait so long. False, and at once, where the server is being stopped."""
    leaving: asyncio.Event = request.app.state.leaving
    try:
        await asyncio.wait_for(leaving.wait(), seconds)
    except asyncio.TimeoutError:
        return True
    return False


async def field(request: Request, name: str) -> str:
    """A form field's text, empty where it was not sent."""
    return str((await request.form()).get(name, ""))


def store_of(request: Request) -> SessionStore:
    """The store of this app's sessions."""
    store: SessionStore = request.app.state.store
    return store
