"""Sessions with Quart: `uvicorn --app-dir examples/frameworks quart_app:app`.

Quart's own `quart.session` is another one, in a signed cookie. Who uses both needs two names of cookies.
"""

from __future__ import annotations

import os
from typing import Any

from quart import Quart, abort, request

from asgi_sessions import Session, SessionMiddleware, get_session

app = Quart(__name__)
app.config["SESSION_COOKIE_NAME"] = "quart_session"  # of `quart.session`; "session" is ours
# Quart's types name each key of a scope; to the middleware a scope is any mapping
app.asgi_app = SessionMiddleware(app.asgi_app, secret_key=os.environ["SECRET_KEY"])  # type: ignore[assignment, method-assign, arg-type]


def session() -> Session:
    """The session of the current request."""
    return get_session(request)


def current_user() -> str:
    """The guard: answers 401 where nobody is signed in."""
    return session().data.user_id or abort(401)


@app.post("/sign-in")
async def sign_in() -> dict[str, str]:
    """Check a password here. The session's id changes, and its values stay."""
    user = str(await request.get_data(as_text=True))
    session().login(user)
    return {"user": user}


@app.post("/count")
async def count() -> dict[str, int]:
    session()["visits"] = session().get("visits", 0) + 1
    return {"visits": session()["visits"]}


@app.get("/account")
async def account() -> dict[str, Any]:
    user = current_user()
    return {"user": user, "visits": session().get("visits", 0)}


@app.post("/sign-out")
async def sign_out() -> dict[str, None]:
    session().logout()
    return {"user": None}
