"""Signing in: a hashed password, "remember me", a guard, a fresh password for what matters, signing out.

    pip install 'asgi-server-sessions' fastapi python-multipart uvicorn argon2-cffi
    uvicorn --app-dir examples sign_in:app --workers 2

The user is `ada`, with the password `correct horse`. Sessions live in the file `sessions.db`, which both
workers share and a restart leaves alone. README's chapter "Signing in" is this file.
"""

import os
import time
from collections.abc import Callable
from typing import Annotated

from argon2 import PasswordHasher
from argon2.exceptions import VerifyMismatchError
from fastapi import Depends, FastAPI, Form, HTTPException, Request

from asgi_sessions import SessionMiddleware, SQLiteSessionStore, get_session

hasher = PasswordHasher()
passwords = {"ada": hasher.hash("correct horse")}  # your database
nobodys = hasher.hash("of nobody")  # so that an unknown name takes as long as a wrong password
store = SQLiteSessionStore(os.environ.get("SESSIONS", "sessions.db"))

app = FastAPI()
app.add_middleware(
    SessionMiddleware,
    secret_key=os.environ.get("SECRET_KEY", "for trying it out only, make one"),  # asgi-sessions key
    store=store,
    max_age=30 * 24 * 3600,  # "remember me"
)


def signed_in(request: Request) -> str:
    """The guard: who is signed in, or 401."""
    user = get_session(request).data.user_id
    if user is None:
        raise HTTPException(401, "sign in first")
    return user


def confirmed_within(seconds: float) -> Callable[[Request, str], str]:
    """The guard of what matters: who has given the password so lately, or 403 (step-up)."""

    def confirmed(request: Request, user: Annotated[str, Depends(signed_in)]) -> str:
        if time.time() - get_session(request).get("confirmed_at", 0) > seconds:
            raise HTTPException(403, "give your password again")
        return user

    return confirmed


User = Annotated[str, Depends(signed_in)]
ConfirmedUser = Annotated[str, Depends(confirmed_within(300))]
Field = Annotated[str, Form()]


@app.post("/sign-in")
def sign_in(request: Request, name: Field, password: Field, remember: Annotated[bool, Form()] = False) -> str:
    try:
        hasher.verify(passwords.get(name, nobodys), password)
    except VerifyMismatchError:
        raise HTTPException(403, "wrong name or password") from None
    session = get_session(request)
    session.login(name)  # a new id, for the old one may have been planted; a full max_age begins
    session["confirmed_at"] = time.time()
    if not remember:
        session.set_expiry(12 * 3600)
    return name


@app.get("/account")
def account(user: User) -> str:
    return user


@app.post("/payout")
def payout(user: ConfirmedUser) -> str:
    return f"paid to {user}"


@app.post("/sign-out")
def sign_out(request: Request) -> None:
    get_session(request).logout()


@app.post("/sign-out-everywhere")
async def sign_out_everywhere(request: Request, user: User) -> int:
    session = get_session(request)
    others = await store.delete_for_user(user, keep=session.session_id)
    session.logout()  # which removes the cookie, too
    return others
