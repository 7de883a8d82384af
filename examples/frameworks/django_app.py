"""Sessions with Django under ASGI, beside its own: `uvicorn --app-dir examples/frameworks django_app:app`.

`request.session` is Django's, in a cookie of its own (`SESSION_COOKIE_NAME`): `django.contrib.auth` and the
admin need it. Ours is `get_session(request)`, in plain views and in async ones.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import wraps

from django.conf import settings
from django.contrib.sessions.backends.base import SessionBase
from django.core.asgi import get_asgi_application
from django.core.handlers.asgi import ASGIRequest
from django.http import HttpResponseBase, JsonResponse
from django.urls import path
from django.views.decorators.csrf import csrf_exempt
from django.views.decorators.http import require_POST

from asgi_sessions import SessionMiddleware, get_session

View = Callable[[ASGIRequest], HttpResponseBase]

settings.configure(
    SECRET_KEY=os.environ["SECRET_KEY"],
    ROOT_URLCONF=__name__,
    ALLOWED_HOSTS=["localhost", "127.0.0.1"],
    MIDDLEWARE=["django.contrib.sessions.middleware.SessionMiddleware"],
    SESSION_ENGINE="django.contrib.sessions.backends.signed_cookies",
    SESSION_COOKIE_NAME="django_session",  # "session" is ours, "sessionid" Django's default: it fits too
)


def django_session(request: ASGIRequest) -> SessionBase:
    """Django's own session, which its middleware has set."""
    return request.session  # pyright: ignore[reportAttributeAccessIssue]  # its class does not declare it


def signed_in(view: View) -> View:
    """The guard: answers 401 where nobody is signed in."""

    @wraps(view)
    def guarded(request: ASGIRequest) -> HttpResponseBase:
        if get_session(request).data.user_id is None:
            return JsonResponse({"detail": "sign in first"}, status=401)
        return view(request)

    return guarded


@csrf_exempt
@require_POST
def sign_in(request: ASGIRequest) -> HttpResponseBase:
    """Check a password here. The session's id changes, and its values stay."""
    user = request.body.decode()
    get_session(request).login(user)
    return JsonResponse({"user": user})


@csrf_exempt
@require_POST
async def count(request: ASGIRequest) -> HttpResponseBase:
    """An async view. Django's own session counts as well."""
    session, of_django = get_session(request), django_session(request)
    session["visits"] = session.get("visits", 0) + 1
    await of_django.aset("visits", (await of_django.aget("visits") or 0) + 1)
    return JsonResponse({"visits": session["visits"]})


@signed_in
def account(request: ASGIRequest) -> HttpResponseBase:
    session = get_session(request)
    return JsonResponse({"user": session.data.user_id, "visits": session.get("visits", 0)})


def django_visits(request: ASGIRequest) -> HttpResponseBase:
    return JsonResponse({"visits": django_session(request).get("visits", 0)})


@csrf_exempt
@require_POST
def sign_out(request: ASGIRequest) -> HttpResponseBase:
    get_session(request).logout()
    return JsonResponse({"user": None})


urlpatterns = [
    path("sign-in", sign_in),
    path("count", count),
    path("account", account),
    path("django", django_visits),
    path("sign-out", sign_out),
]

app = SessionMiddleware(get_asgi_application(), secret_key=os.environ["SECRET_KEY"])
