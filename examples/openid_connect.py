"""Sign-in through OpenID Connect, with Authlib's client for Starlette (`pip install authlib httpx`).

    OPENID_ISSUER=https://login.example.org OPENID_CLIENT=… OPENID_SECRET=… SECRET_KEY=… \\
        uvicorn --app-dir examples openid_connect:app

Authlib keeps the state, the nonce and the PKCE verifier of a sign-in in `request.session`, between the way to
the provider and the way back. Here they never leave the server, and are used once.
"""

from __future__ import annotations

import os
from typing import Any

from authlib.integrations.starlette_client import OAuth, OAuthError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.routing import Route

from asgi_sessions import SessionMiddleware, get_session

provider: Any = OAuth().register(
    "provider",
    server_metadata_url=f"{os.environ['OPENID_ISSUER']}/.well-known/openid-configuration",
    client_id=os.environ["OPENID_CLIENT"],
    client_secret=os.environ["OPENID_SECRET"],
    client_kwargs={"scope": "openid email", "code_challenge_method": "S256"},
)


async def sign_in(request: Request) -> Response:
    """To the provider. The session begins here, for it has to know the answer again."""
    answer: Response = await provider.authorize_redirect(request, request.url_for("callback"))
    return answer


async def callback(request: Request) -> Response:
    """Back from the provider: Authlib checks state, nonce and signature, then the session gets a new id.

    The issuer and the subject together name a user; an e-mail address may change hands.
    """
    try:
        token = await provider.authorize_access_token(request)
    except OAuthError as error:
        raise HTTPException(401, f"the sign-in failed: {error.error}") from error
    claims = token["userinfo"]
    session = get_session(request)
    session.login(f"{claims['iss']}|{claims['sub']}")
    session["email"] = claims.get("email")
    return RedirectResponse(request.url_for("account"), 303)


async def account(request: Request) -> Response:
    """The guard answers 401; a page would redirect to the sign-in."""
    session = get_session(request)
    if session.data.user_id is None:
        raise HTTPException(401, "sign in first")
    return JSONResponse({"user": session.data.user_id, "email": session["email"]})


async def sign_out(request: Request) -> Response:
    """Ends our session; the one at the provider lives on."""
    get_session(request).logout()
    return JSONResponse({"user": None})


app = Starlette(
    routes=[
        Route("/sign-in", sign_in),
        Route("/callback", callback),
        Route("/account", account),
        Route("/sign-out", sign_out, methods=["POST"]),
    ],
    middleware=[Middleware(SessionMiddleware, secret_key=os.environ["SECRET_KEY"])],
)
