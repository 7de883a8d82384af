"""A page with the devices on which a user is signed in: end one of them, or all others.

    pip install 'asgi-server-sessions[devices]' fastapi python-multipart uvicorn argon2-cffi
    uvicorn --app-dir examples devices:app

Signing in is that of `password_change.py`. Without the extra `devices` the names are shorter.
"""

from __future__ import annotations

from html import escape

from fastapi import Request
from fastapi.responses import HTMLResponse, RedirectResponse, Response
from password_change import Field, User, app, store

from asgi_sessions import Device, get_session

PAGE = """<!doctype html><html lang="en"><title>Devices</title><h1>Where {user} is signed in</h1>
<ul>{items}</ul>
<form method="post" action="/devices/end-others"><button>Sign out everywhere else</button></form></html>"""


def item(device: Device) -> str:
    """One line of the list. What a client says of itself is not to be trusted: it is escaped."""
    name = escape(f"{device.name}, {device.address}, last used {device.last_activity:%d %B %Y, %H:%M} UTC")
    if device.current:
        return f"<li>{name}: this one</li>"
    return (
        f'<li>{name} <form method="post" action="/devices/end"><input type="hidden" name="handle"'
        f' value="{device.handle}"><button>Sign out</button></form></li>'
    )


@app.get("/devices")
async def devices(request: Request, user: User) -> HTMLResponse:
    items = "".join(item(device) for device in await get_session(request).devices())
    return HTMLResponse(PAGE.format(user=escape(user), items=items))


@app.post("/devices/end")
async def end(request: Request, user: User, handle: Field) -> Response:
    await get_session(request).end_device(handle)  # False where it has ended meanwhile: the page shows that
    return RedirectResponse("/devices", 303)


@app.post("/devices/end-others")
async def end_others(request: Request, user: User) -> Response:
    await store.delete_for_user(user, keep=get_session(request).session_id)
    return RedirectResponse("/devices", 303)
