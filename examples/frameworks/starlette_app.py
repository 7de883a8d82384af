"""Sessions with Starlette: `uvicorn --app-dir examples/frameworks starlette_app:app`."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from functools import wraps

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from asgi_sessions import SessionMiddleware, get_session

Endpoint = Callable[[Request], Awaitable[Response]]


def signed_in(endpoint: Endpoint) -> Endpoint:
    """The guard: answers 401 where nobody is signed in."""

    @wraps(endpoint)
    async def guarded(request: Request) -> Response:
        if get_session(request).data.user_id is None:
            raise HTTPException(401, "sign in first")
        return await endpoint(request)

    return guarded


async def sign_in(request: Request) -> Response:
    """Check a password here. The session's id changes, and its values stay."""
    user = (await request.body()).decode()
    get_session(request).login(user)
    return JSONResponse({"user": user})


async def count(request: Request) -> Response:
    request.session["visits"] = request.session.get("visits", 0) + 1
    return JSONResponse({"visits": request.session["visits"]})


@signed_in
async def account(request: Request) -> Response:
    user = get_session(request).data.user_id
    return JSONResponse({"user": user, "visits": request.session.get("visits", 0)})


async def sign_out(request: Request) -> Response:
    get_session(request).logout()
    return JSONResponse({"user": None})


app = Starlette(
    routes=[
        Route("/sign-in", sign_in, methods=["POST"]),
        Route("/count", count, methods=["POST"]),
        Route("/account", account),
        Route("/sign-out", sign_out, methods=["POST"]),
    ],
    middleware=[Middleware(SessionMiddleware, secret_key=os.environ["SECRET_KEY"])],
)
