"""What test clients and their answers have in common: httpx, and the test clients that stand on it.

Nothing here imports one of them. `client.app` is public in the clients of Starlette and Litestar; httpx keeps
the app of an `ASGITransport` in a private attribute, `_transport`, and `app=` is the way without it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from email.message import Message
from http.cookiejar import Cookie, CookieJar
from typing import Any
from urllib.request import Request

_NO_CLIENT = (
    " has no cookie jar and no base URL, as the clients of httpx, Starlette and Litestar have:"
    " give your client the cookie that session_cookie(app) returns"
)


class _Answer:
    """The part of an HTTP response that a cookie jar reads."""

    def __init__(self, set_cookie: str) -> None:
        self._headers = Message()
        self._headers["Set-Cookie"] = set_cookie

    def info(self) -> Message:
        return self._headers


class Jar:
    """The cookies of one name that a client has. `TypeError` where the client has no cookie jar."""

    def __init__(self, client: object, name: str) -> None:
        jar = _jar_of(client)
        if jar is None:
            raise TypeError(f"a {type(client).__name__}{_NO_CLIENT}")
        self._jar, self._name = jar, name
        self._url = str(getattr(client, "base_url", ""))

    def __iter__(self) -> Iterator[Cookie]:
        return iter([cookie for cookie in self._jar if cookie.name == self._name])

    def take(self, set_cookie: str, path: str) -> None:
        """Take the cookie of an answer, in place of those that are there.

        `ValueError` where the client would not send it, because of its base URL.
        """
        before = self.clear()
        scheme, slashes, rest = self._url.partition("://")
        host = rest.partition("/")[0]
        if not slashes or not host:
            self.put_back(before)
            raise ValueError(
                "give the client a base_url, as in base_url='http://testserver': cookies need one"
            )
        request = Request(f"{scheme}://{host}{path}")  # noqa: S310  # is never opened
        self._jar.extract_cookies(_Answer(set_cookie), request)  # type: ignore[arg-type]  # what it reads
        self._jar.add_cookie_header(request)
        if not request.has_header("Cookie"):
            self.clear()
            self.put_back(before)
            raise ValueError(
                f"a client with the base URL {scheme}://{host} does not send this app's cookie back: a Secure"
                " cookie (https_only=True) needs base_url='https://…', one with a domain a host in it"
            )

    def clear(self) -> list[Cookie]:
        """Drop the cookies, and return them."""
        dropped = list(self)
        for cookie in dropped:
            self._jar.clear(cookie.domain, cookie.path, cookie.name)
        return dropped

    def put_back(self, cookies: list[Cookie]) -> None:
        """Have cookies again that `clear` has returned."""
        for cookie in cookies:
            self._jar.set_cookie(cookie)


def app_of(source: object, app: object | None) -> object:
    """The app that a client speaks with, unless `app` says so. `TypeError` where the client does not tell."""
    if app is None:
        app = getattr(source, "app", None) or getattr(getattr(source, "_transport", None), "app", None)
    if app is None:
        raise TypeError(f"a {type(source).__name__} does not tell which app it is for: pass app=")
    return app


def app_or_client(source: object) -> object:
    """The app itself, or the one that a client speaks with."""
    return source if _jar_of(source) is None else app_of(source, None)


def header_of(source: object, name: str) -> str:
    """The `cookie` header that a client sends next, as far as it is about the cookie of this name.

    After an answer it is what the answer has set, or else what its request brought. A dict has the cookies
    by name. `TypeError` for anything else.
    """
    if isinstance(source, Mapping):
        return f"{name}={source[name]}" if name in source else ""
    if _jar_of(source) is not None and hasattr(source, "base_url"):
        return "; ".join(f"{name}={cookie.value}" for cookie in Jar(source, name))
    headers: Any = getattr(source, "headers", None)
    request: Any = getattr(source, "request", None)
    if not hasattr(headers, "get_list") or not hasattr(request, "headers"):
        raise TypeError(
            f"a {type(source).__name__} is no client and no answer of httpx, Starlette or Litestar: pass"
            " the cookies as a dict, {name: value}, and app="
        )
    set_here = [line for line in headers.get_list("set-cookie") if line.startswith(f"{name}=")]
    if set_here:  # the last one counts, as in a browser
        return str(set_here[-1].partition(";")[0])
    return str(request.headers.get("cookie", ""))


def _jar_of(client: object) -> CookieJar | None:
    jar = getattr(getattr(client, "cookies", None), "jar", None)
    return jar if isinstance(jar, CookieJar) else None
