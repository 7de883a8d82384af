"""NiceGUI below our middleware: its pages keep what they know of a browser in a session of their own."""

from __future__ import annotations

import os

from fastapi import FastAPI, Request
from nicegui import app as pages
from nicegui import ui

from asgi_sessions import SessionMiddleware, get_session

app = FastAPI()


@app.post("/sign-in")
def sign_in(request: Request) -> None:
    get_session(request).login("ada")


@app.get("/user")
def user(request: Request) -> str | None:
    return get_session(request).data.user_id


@ui.page("/count")
def count() -> None:
    """Counts in NiceGUI's storage of this browser."""
    pages.storage.user["n"] = pages.storage.user.get("n", 0) + 1
    ui.label(f"visit {pages.storage.user['n']}")


key = os.environ["SECRET_KEY"]
ui.run_with(
    app,
    mount_path="/pages",
    storage_secret=key,
    session_middleware_kwargs={"session_cookie": "nicegui"},
    show_welcome_message=False,
)
app.add_middleware(SessionMiddleware, secret_key=key)
