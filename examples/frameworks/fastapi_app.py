"""Sessions with FastAPI: `uvicorn --app-dir examples/frameworks fastapi_app:app`, then open `/docs`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Annotated

from fastapi import Body, Depends, FastAPI, HTTPException, Request
from fastapi.security import APIKeyCookie
from pydantic import Field

from asgi_sessions import Session, SessionData, SessionMiddleware, get_session, get_session_data


class Shop(SessionData):
    """What a session of this app holds."""

    visits: int = 0
    seen: list[str] = Field(default_factory=list)


def shop_of(request: Request) -> Shop:
    return get_session_data(request, Shop)


def session_of(request: Request) -> Session:
    return get_session(request)


CurrentSession = Annotated[Session, Depends(session_of)]
CurrentShop = Annotated[Shop, Depends(shop_of)]

# Tells OpenAPI that a cookie signs the user in: `/docs` shows a padlock. The middleware has read the cookie.
cookie = APIKeyCookie(name="session", auto_error=False, description="the session's cookie")


def current_user(shop: CurrentShop, _: Annotated[str | None, Depends(cookie)]) -> str:
    """The guard: answers 401 where nobody is signed in."""
    if shop.user_id is None:
        raise HTTPException(401, "sign in first")
    return shop.user_id


def remembered(shop: CurrentShop, request: Request) -> Iterator[None]:
    """Notes the path after its endpoint; with `scope="function"` before the answer leaves."""
    yield
    shop.seen.append(request.url.path)


CurrentUser = Annotated[str, Depends(current_user)]

app = FastAPI()
app.add_middleware(SessionMiddleware, secret_key=os.environ["SECRET_KEY"], model=Shop)


@app.post("/sign-in")
async def sign_in(session: CurrentSession, user: Annotated[bytes, Body(media_type="text/plain")]) -> object:
    """Check a password here. The session's id changes, and its values stay."""
    session.login(user.decode())
    return {"user": session.data.user_id}


@app.post("/count", dependencies=[Depends(remembered, scope="function")])
def count(shop: CurrentShop) -> object:
    """A plain function: FastAPI runs it in a thread."""
    shop.visits += 1
    return {"visits": shop.visits}


@app.get("/account")
async def account(shop: CurrentShop, user: CurrentUser) -> object:
    return {"user": user, "visits": shop.visits}


@app.get("/seen")
def seen(shop: CurrentShop) -> list[str]:
    return shop.seen


@app.post("/sign-out")
def sign_out(session: CurrentSession) -> object:
    session.logout()
    return {"user": None}
