"""Sessions with Litestar: `uvicorn --app-dir examples/frameworks litestar_app:app`."""

from __future__ import annotations

import os
from typing import Any

from litestar import Litestar, Request, get, post
from litestar.connection import ASGIConnection
from litestar.exceptions import NotAuthorizedException
from litestar.handlers import BaseRouteHandler

from asgi_sessions import SessionMiddleware, get_session

AnyRequest = Request[Any, Any, Any]


def signed_in(connection: ASGIConnection[Any, Any, Any, Any], _: BaseRouteHandler) -> None:
    """The guard: answers 401 where nobody is signed in."""
    if get_session(connection).data.user_id is None:
        raise NotAuthorizedException("sign in first")


@post("/sign-in")
async def sign_in(request: AnyRequest) -> dict[str, str]:
    """Check a password here. The session's id changes, and its values stay."""
    user = (await request.body()).decode()
    get_session(request).login(user)
    return {"user": user}


@post("/count")
async def count(request: AnyRequest) -> dict[str, int]:
    request.session["visits"] = request.session.get("visits", 0) + 1
    return {"visits": request.session["visits"]}


@get("/account", guards=[signed_in])
async def account(request: AnyRequest) -> dict[str, Any]:
    session = get_session(request)
    return {"user": session.data.user_id, "visits": session.get("visits", 0)}


@post("/sign-out")
async def sign_out(request: AnyRequest) -> dict[str, None]:
    request.clear_session()  # Litestar's own way; `get_session(request).logout()` does the same
    return {"user": None}


routes = Litestar([sign_in, count, account, sign_out])
# Litestar's types name each key of a scope; to the middleware a scope is any mapping
app = SessionMiddleware(routes, secret_key=os.environ["SECRET_KEY"])  # type: ignore[arg-type]
