"""Signs a test client in."""

from __future__ import annotations

from http.cookies import SimpleCookie
from types import TracebackType
from typing import Generic, TypeVar
from uuid import UUID

from .clients import Jar, app_of
from .finding import middleware_of
from .sessions import begin, end_session

Client = TypeVar("Client")


class SignedIn(Generic[Client]):
    """A client that was signed in; `with` signs it out at the end. Made by `signed_in`."""

    def __init__(self, client: Client, app: object, jar: Jar, set_cookie: str, path: str) -> None:
        self.client = client
        self._app, self._jar = app, jar
        self._before = list(jar)
        jar.take(set_cookie, path)

    def __enter__(self) -> Client:
        return self.client

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.sign_out()

    def sign_out(self) -> None:
        """End the session that the client has now, and give it the cookies that it had before."""
        end_session(self.client, app=self._app)
        self._jar.clear()
        self._jar.put_back(self._before)


def signed_in(
    client: Client,
    /,
    user_id: str | int | UUID | None = "ada",
    *,
    app: object | None = None,
    **values: object,
) -> SignedIn[Client]:
    """Sign a client in with a session of its own: `with signed_in(client, "ada", cart=[]) as client:`.

    Works at once, and without `with` too; then the client stays signed in. At the end of a `with` it is as
    before. `client` is an httpx client with an ASGI transport, or a test client of Starlette or Litestar,
    sync or async; an async one takes a plain `with`. `app` (or the middleware) is for a client that does not
    tell its app. Values are those of `session_cookie`, and so are its errors. `TypeError` for a client
    without a cookie jar, `ValueError` where its base URL keeps it from sending the cookie.
    """
    middleware = middleware_of(app_of(client, app))
    settings = middleware._settings
    jar = Jar(client, settings.cookie.name)
    session_id = begin(settings, user_id, values)
    header = settings.cookie.render(session_id, max_age=settings.max_age, secure=False).decode("ascii")
    path = SimpleCookie(header)[settings.cookie.name]["path"]
    return SignedIn(client, middleware, jar, header, path)
