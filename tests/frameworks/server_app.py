"""What each server serves in the tests: one app under `lock=True` and under `lock="auto"`, in STORE_URL."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator

import anyio
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.types import ASGIApp
from starlette.websockets import WebSocket

from asgi_sessions import SessionMiddleware, get_session


async def sign_in(request: Request) -> Response:
    get_session(request).login((await request.body()).decode())
    return JSONResponse(None)


async def sign_out(request: Request) -> Response:
    get_session(request).logout()
    return JSONResponse(None)


async def count(request: Request) -> Response:
    """By POST and by GET; the pause between reading and writing loses counts where nothing locks."""
    n = request.session.get("n", 0)
    await anyio.sleep(0.005)
    request.session["n"] = n + 1
    return JSONResponse(n + 1)


async def show(request: Request) -> Response:
    session = get_session(request)
    return JSONResponse({"user": session.data.user_id, "process": os.getpid(), **session})


async def stream(request: Request) -> Response:
    """Five numbers, each counted in a transaction."""

    async def numbers() -> AsyncIterator[str]:
        for _ in range(5):
            async with get_session(request).transaction():
                request.session["n"] = request.session.get("n", 0) + 1
                number = request.session["n"]
            yield f"{number}\n"

    return StreamingResponse(numbers(), media_type="text/plain")


async def socket(websocket: WebSocket) -> None:
    """Begins the session where there is none; each text that comes counts."""
    session = get_session(websocket)
    async with session.transaction():
        session.setdefault("n", 0)
    await websocket.accept()
    async for _ in websocket.iter_text():
        async with session.transaction():
            session["n"] += 1
        await websocket.send_json(session["n"])


routes = [
    Route("/sign-in", sign_in, methods=["POST"]),
    Route("/sign-out", sign_out, methods=["POST"]),
    Route("/count", count, methods=["POST", "GET"]),
    Route("/show", show),
    Route("/stream", stream),
    WebSocketRoute("/socket", socket),
]


def build() -> ASGIApp:
    key, store = os.environ["SECRET_KEY"], os.environ["STORE_URL"]
    shop = Starlette(routes=routes)
    locked = SessionMiddleware(shop, key, "locked", store=store, lock=True)
    auto = SessionMiddleware(shop, key, "auto", store=store, lock="auto")
    return Starlette(routes=[Mount("/locked", locked), Mount("/auto", auto)])


app = build()
