"""One shop, built with each framework; the middleware lies where that framework puts it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import FastAPI
from litestar import Litestar
from litestar import Request as LitestarRequest
from litestar import get as litestar_get
from litestar.middleware import DefineMiddleware
from pydantic import Field
from quart import Quart
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Mount, Route

from asgi_sessions import SessionData, SessionMiddleware, get_session

SECRET = "k" * 32


class ShopSession(SessionData):
    """The model of the shop."""

    cart: list[str] = Field(default_factory=list)


async def who(request: Request) -> JSONResponse:
    """Who is signed in."""
    session = get_session(request)
    return JSONResponse({"user": session.data.user_id, "values": dict(session)})


async def visit(request: Request) -> JSONResponse:
    """Count this visit in the session."""
    session = get_session(request)
    session["visits"] = session.get("visits", 0) + 1
    return JSONResponse(session["visits"])


async def log_in(request: Request) -> JSONResponse:
    """Sign in as eve."""
    get_session(request).login("eve")
    return JSONResponse("eve")


async def log_out(request: Request) -> JSONResponse:
    """Sign out."""
    get_session(request).logout()
    return JSONResponse("bye")


ROUTES = [
    Route("/who", who),
    Route("/visit", visit),
    Route("/login", log_in),
    Route("/logout", log_out),
]


def bare(**options: Any) -> Any:
    """The middleware around an app."""
    return SessionMiddleware(Starlette(routes=ROUTES), SECRET, **options)


def starlette(**options: Any) -> Any:
    """Starlette builds its stack with the first request."""
    app = Starlette(routes=ROUTES, middleware=[Middleware(CORSMiddleware, allow_origins=["*"])])
    app.add_middleware(SessionMiddleware, secret_key=SECRET, **options)
    app.add_middleware(CORSMiddleware, allow_origins=["*"])
    return app


def fastapi(**options: Any) -> Any:
    """FastAPI does as Starlette does."""
    app = FastAPI(routes=list(ROUTES))
    app.add_middleware(SessionMiddleware, secret_key=SECRET, **options)
    return app


def mounted(**options: Any) -> Any:
    """The app with the sessions lies within another one."""
    return Starlette(routes=[Mount("", starlette(**options))])


def litestar(**options: Any) -> Any:
    """Litestar makes a middleware for each route."""

    @litestar_get("/who")
    async def who(request: LitestarRequest[Any, Any, Any]) -> dict[str, Any]:
        session = get_session(request)
        return {"user": session.data.user_id, "values": dict(session)}

    @litestar_get("/visit")
    async def visit(request: LitestarRequest[Any, Any, Any]) -> int:
        session = get_session(request)
        session["visits"] = session.get("visits", 0) + 1
        count: int = session["visits"]
        return count

    # Litestar has ASGI types of its own
    middleware = DefineMiddleware(SessionMiddleware, secret_key=SECRET, **options)  # type: ignore[arg-type]
    return Litestar([who, visit], middleware=[middleware])


def quart(**options: Any) -> Any:
    """Quart is wrapped: its own `asgi_app` has the middleware."""
    app: Any = Quart(__name__)
    app.asgi_app = SessionMiddleware(app.asgi_app, SECRET, **options)
    return app


def closure(**options: Any) -> Any:
    """A function that has the app in a variable."""
    inner = bare(**options)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await inner(scope, receive, send)

    return app


APPS: dict[str, Callable[..., Any]] = {
    each.__name__: each for each in (bare, starlette, fastapi, mounted, litestar, quart, closure)
}
