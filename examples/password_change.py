"""Signing in with a hashed password, a guard for pages, and a password change that ends all other sessions.

    pip install fastapi python-multipart uvicorn argon2-cffi
    uvicorn --app-dir examples password_change:app

The user is `ada`, with the password `correct horse`. Whoever has stolen a session of hers is out when she
changes it (OWASP Session Management: Session Expiration); the browser in which she does so stays signed in,
under a new id.
"""

from __future__ import annotations

import os
import secrets
from typing import Annotated

from anyio.to_thread import run_sync
from argon2 import PasswordHasher
from argon2.exceptions import VerifyMismatchError
from fastapi import Depends, FastAPI, Form, HTTPException, Request
from fastapi.responses import RedirectResponse, Response

from asgi_sessions import InMemorySessionStore, SessionMiddleware, get_session

hasher = PasswordHasher()
passwords = {"ada": hasher.hash("correct horse")}  # your database
nobodys = hasher.hash(secrets.token_hex())  # so that an unknown name takes as long as a wrong password

store = InMemorySessionStore()  # with several processes SQLiteSessionStore or RedisSessionStore
app = FastAPI()
app.add_middleware(
    SessionMiddleware,
    secret_key=os.environ.get("SECRET_KEY") or secrets.token_hex(32),  # else a restart ends all sessions
    store=store,
    record_client=True,
)


def signed_in(request: Request) -> str:
    """The guard: who is signed in, or 401."""
    user = get_session(request).data.user_id
    if user is None:
        raise HTTPException(401, "sign in first")
    return user


User = Annotated[str, Depends(signed_in)]
Field = Annotated[str, Form()]


def is_password_of(name: str, password: str) -> bool:
    """Whether this is the user's password. It takes a while, as it should."""
    try:
        return hasher.verify(passwords.get(name, nobodys), password)
    except VerifyMismatchError:
        return False


@app.post("/sign-in")
async def sign_in(request: Request, name: Field, password: Field) -> Response:
    if not await run_sync(is_password_of, name, password):
        raise HTTPException(403, "wrong name or password")
    get_session(request).login(name)  # under a new id: the old one may have been planted
    return RedirectResponse("/", 303)


@app.post("/sign-out")
async def sign_out(request: Request) -> Response:
    get_session(request).logout()
    return RedirectResponse("/", 303)


@app.get("/")
async def home(user: User) -> dict[str, str]:
    return {"hello": user}


@app.post("/password")
async def change_password(request: Request, user: User, old: Field, new: Field) -> Response:
    if not await run_sync(is_password_of, user, old):
        raise HTTPException(403, "wrong password")
    passwords[user] = await run_sync(hasher.hash, new)
    session = get_session(request)
    session.regenerate_id()
    await session.save()  # the id that is kept has to be the new one
    await store.delete_for_user(user, keep=session.session_id)
    return RedirectResponse("/", 303)
