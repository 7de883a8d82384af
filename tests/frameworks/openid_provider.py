"""A small OpenID provider, whose one user signs in by being sent there: the code flow, with PKCE."""

from __future__ import annotations

import base64
import hashlib
import secrets
import time
from urllib.parse import urlencode

from joserfc import jwt
from joserfc.jwk import RSAKey
from starlette.applications import Starlette
from starlette.datastructures import FormData
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.routing import Route

CLIENT, SECRET = "the-shop", "known-to-the-shop"
SUBJECT, EMAIL = "5f7c--o'brien", "ada@example.com"

_key = RSAKey.generate_key(2048, {"use": "sig", "alg": "RS256", "kid": "first"})
_codes: dict[str, dict[str, str]] = {}  # what the request that got the code had asked for


def issuer(request: Request) -> str:
    return str(request.base_url).rstrip("/")


async def configuration(request: Request) -> Response:
    mine = issuer(request)
    return JSONResponse(
        {
            "issuer": mine,
            "authorization_endpoint": f"{mine}/authorize",
            "token_endpoint": f"{mine}/token",
            "jwks_uri": f"{mine}/keys",
            "id_token_signing_alg_values_supported": ["RS256"],
        }
    )


async def keys(request: Request) -> Response:
    return JSONResponse({"keys": [_key.as_dict(private=False)]})


async def authorize(request: Request) -> Response:
    asked = dict(request.query_params)
    assert asked["client_id"] == CLIENT
    assert asked["code_challenge_method"] == "S256"
    code = secrets.token_urlsafe()
    _codes[code] = asked
    return RedirectResponse(
        f"{asked['redirect_uri']}?{urlencode({'code': code, 'state': asked['state']})}", 302
    )


async def token(request: Request) -> Response:
    """A code is good once, for the client that asked for it and knows the verifier."""
    form = await request.form()
    asked = _codes.pop(str(form["code"]), None)
    if asked is None or not _knows_verifier(form, asked) or not _is_client(request):
        return JSONResponse({"error": "invalid_grant"}, 400)
    now = int(time.time())
    claims = {
        "iss": issuer(request), "sub": SUBJECT, "aud": CLIENT, "email": EMAIL,
        "nonce": asked["nonce"], "iat": now, "exp": now + 60,
    }  # fmt: skip
    id_token = jwt.encode({"alg": "RS256", "kid": "first"}, claims, _key)
    return JSONResponse(
        {"access_token": secrets.token_urlsafe(), "token_type": "Bearer", "id_token": id_token}
    )


def _knows_verifier(form: FormData, asked: dict[str, str]) -> bool:
    digest = hashlib.sha256(str(form["code_verifier"]).encode()).digest()
    return base64.urlsafe_b64encode(digest).decode().rstrip("=") == asked["code_challenge"]


def _is_client(request: Request) -> bool:
    expected = base64.b64encode(f"{CLIENT}:{SECRET}".encode()).decode()
    return request.headers.get("authorization") == f"Basic {expected}"


app = Starlette(
    routes=[
        Route("/.well-known/openid-configuration", configuration),
        Route("/authorize", authorize),
        Route("/token", token, methods=["POST"]),
        Route("/keys", keys),
    ]
)
