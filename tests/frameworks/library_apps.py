"""Libraries written for Starlette's sessions, each as its manual shows it, mounted below our middleware."""

from __future__ import annotations

import hmac
import os
from collections.abc import AsyncIterator
from importlib import import_module
from typing import Any

import anyio
from sqladmin import Admin as SQLAdmin
from sqladmin import ModelView
from sqladmin.authentication import AuthenticationBackend
from sqlalchemy import create_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sse_starlette import EventSourceResponse
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.sessions import SessionMiddleware as StarletteSessions
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Mount, Route
from starlette_admin import BaseAdmin
from starlette_admin.auth import AdminUser, AuthProvider
from starlette_admin.exceptions import LoginFailed
from starlette_csrf.middleware import CSRFMiddleware

from asgi_sessions import SessionMiddleware, get_session

# Any: they say nothing of their types
imia: Any = import_module("imia")
wtf: Any = import_module("starlette_wtf")
wtforms: Any = import_module("wtforms")

KEY = os.environ["SECRET_KEY"]
USER, PASSWORD = "ada", "the-password"

# --- sqladmin ---------------------------------------------------------------------------------------


class Base(DeclarativeBase):
    """The tables of the admin panels."""


class Tea(Base):
    """What is administered."""

    __tablename__ = "tea"
    id: Mapped[int] = mapped_column(primary_key=True)


class TeaAdmin(ModelView, model=Tea):
    """The panel's page of it."""


class Backend(AuthenticationBackend):
    """As in sqladmin's manual."""

    async def login(self, request: Request) -> bool:
        form = await request.form()
        if (form["username"], form["password"]) != (USER, PASSWORD):
            return False
        request.session["token"] = "a-token"
        return True

    async def logout(self, request: Request) -> bool:
        request.session.clear()
        return True

    async def authenticate(self, request: Request) -> bool:
        return "token" in request.session


def sqladmin_app(backend: AuthenticationBackend) -> Starlette:
    engine = create_engine("sqlite://")
    app = Starlette()
    SQLAdmin(app, engine, authentication_backend=backend).add_view(TeaAdmin)
    return app


own_cookie = Backend(KEY, session_cookie="admin_session")
ours = Backend(KEY)
ours.middlewares = []  # without the session middleware that sqladmin brings, it takes what is there: ours

# --- starlette-admin --------------------------------------------------------------------------------


class Provider(AuthProvider):
    """As in starlette-admin's manual."""

    async def login(self, username: str, password: str, remember_me: bool, request: Request) -> None:
        if (username, password) != (USER, PASSWORD):
            raise LoginFailed("Invalid username or password")
        request.session["username"] = username

    async def authenticate(self, request: Request) -> AdminUser | None:
        name = request.session.get("username")
        return None if name is None else AdminUser(username=name)

    async def logout(self, request: Request) -> None:
        request.session.clear()


def starlette_admin_app() -> Starlette:
    app = Starlette()
    BaseAdmin(auth_provider=Provider(), secret_key=KEY).mount_to(app)
    return app


# --- starlette-wtf and starlette-csrf -----------------------------------------------------------------


class NameForm(wtf.StarletteForm):  # type: ignore[misc]  # a base that is Any
    """A form with one field and the token."""

    name = wtforms.StringField()


async def form(request: Request) -> Response:
    found = await NameForm.from_formdata(request)
    if await found.validate_on_submit():
        request.session["name"] = found.name.data
        return JSONResponse({"name": found.name.data})
    return HTMLResponse(str(found.csrf_token), 422 if found.errors else 200)


wtf_app = Starlette(
    routes=[Route("/", form, methods=["GET", "POST"])],
    middleware=[Middleware(wtf.CSRFProtectMiddleware, csrf_secret=KEY)],
)


async def count(request: Request) -> Response:
    request.session["n"] = request.session.get("n", 0) + 1
    return JSONResponse({"n": request.session["n"]})


csrf_app = Starlette(
    routes=[Route("/", count, methods=["GET", "POST"])],
    middleware=[Middleware(CSRFMiddleware, secret=KEY, sensitive_cookies={"session"})],
)

# --- imia ---------------------------------------------------------------------------------------------


class Member:
    """A user, as imia wants one."""

    def __init__(self, name: str) -> None:
        self.name = name

    def get_id(self) -> str:
        return self.name

    def get_display_name(self) -> str:
        return self.name

    def get_scopes(self) -> list[str]:
        return []

    def get_hashed_password(self) -> str:
        return PASSWORD


class Verifier:
    """Compares; a real one hashes."""

    def verify(self, plain: str, hashed: str) -> bool:
        return hmac.compare_digest(plain, hashed)


members = imia.InMemoryProvider({name: Member(name) for name in (USER, "bob")})
manager = imia.LoginManager(members, Verifier(), KEY)


async def imia_login(request: Request) -> Response:
    form = await request.form()
    user = await manager.login(request, form["username"], form["password"])
    return JSONResponse({"signed in": user.is_authenticated})


async def imia_logout(request: Request) -> Response:
    await manager.logout(request)
    return JSONResponse({})


async def imia_user(request: Request) -> Response:
    return JSONResponse({"user": request.auth.display_name if request.auth.is_authenticated else None})


imia_app = Starlette(
    routes=[
        Route("/login", imia_login, methods=["POST"]),
        Route("/logout", imia_logout, methods=["POST"]),
        Route("/", imia_user),
    ],
    middleware=[
        Middleware(
            imia.AuthenticationMiddleware, authenticators=[imia.SessionAuthenticator(user_provider=members)]
        )
    ],
)

# --- sse-starlette ------------------------------------------------------------------------------------


async def events(request: Request) -> Response:
    """Three events, each of which counts in a transaction."""

    async def stream() -> AsyncIterator[dict[str, str]]:
        for _ in range(3):
            async with get_session(request).transaction():
                request.session["n"] += 1
                number = request.session["n"]
            yield {"data": str(number)}
            await anyio.sleep(0.01)

    return EventSourceResponse(stream())


sse_app = Starlette(routes=[Route("/", events), Route("/count", count, methods=["POST"])])

# --- a second session middleware ------------------------------------------------------------------------

second_app = Starlette(
    routes=[Route("/", count, methods=["POST"])],
    middleware=[Middleware(StarletteSessions, secret_key=KEY, session_cookie="second")],
)


async def values(request: Request) -> Response:
    """What our session holds."""
    return JSONResponse(dict(request.session))


app = Starlette(
    routes=[
        Route("/count", count, methods=["POST"]),
        Route("/values", values),
        Mount("/own-cookie", sqladmin_app(own_cookie)),
        Mount("/ours", sqladmin_app(ours)),
        Mount("/panel", starlette_admin_app()),
        Mount("/wtf", wtf_app),
        Mount("/csrf", csrf_app),
        Mount("/imia", imia_app),
        Mount("/sse", sse_app),
        Mount("/second", second_app),
    ],
    middleware=[
        # imia signs in under a name that is not among the defaults, and gives no new id where somebody else
        # was signed in
        Middleware(
            SessionMiddleware, secret_key=KEY, rotate_on=("user_id", "username", "token", "_auth_user_id")
        )
    ],
)
