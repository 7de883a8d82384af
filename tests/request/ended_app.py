"""An app whose WebSocket, event stream and long poll end with the session; processes of a test serve it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket

from asgi_sessions import SessionMiddleware, get_session
from asgi_sessions.stores.urls import resolve_store

STORE = resolve_store(os.environ["STORE_URL"])


async def sign_in(request: Request) -> Response:
    get_session(request).login("ada")
    return JSONResponse({})


async def sign_out_everywhere(request: Request) -> Response:
    return JSONResponse(await STORE.delete_for_user("ada"))


async def socket(websocket: WebSocket) -> None:
    """Close as soon as the session has ended, whatever the client does."""
    await websocket.accept()
    await websocket.send_text("open")
    ended = asyncio.ensure_future(get_session(websocket).ended())
    said = asyncio.ensure_future(websocket.receive_text())
    await asyncio.wait((ended, said), return_when=asyncio.FIRST_COMPLETED)
    said.cancel()
    await websocket.close(4401, "signed out")


async def events(request: Request) -> Response:
    session = get_session(request)

    async def lines() -> AsyncIterator[str]:
        yield "data: open\n\n"
        await session.ended()
        yield "data: signed out\n\n"

    return StreamingResponse(lines(), media_type="text/event-stream")


async def poll(request: Request) -> Response:
    """Answer when the session has ended, else after a while."""
    try:
        await asyncio.wait_for(get_session(request).ended(), 25)
    except asyncio.TimeoutError:
        return JSONResponse("open")
    return JSONResponse("signed out")


def build() -> Starlette:
    routes = [
        Route("/sign-in", sign_in, methods=["POST"]),
        Route("/sign-out-everywhere", sign_out_everywhere, methods=["POST"]),
        Route("/events", events),
        Route("/poll", poll),
        WebSocketRoute("/socket", socket),
    ]
    middleware = [Middleware(SessionMiddleware, secret_key="k" * 32, store=STORE)]
    return Starlette(routes=routes, middleware=middleware)
