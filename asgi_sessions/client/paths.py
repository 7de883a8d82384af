"""Paths: a request's path within the app, and the paths whose cookies come with it."""

from __future__ import annotations

import re

from ..asgi import Scope

MAX_DEPTH = 3  # path segments; cookies under longer paths are not looked for

_PLAIN_SEGMENT = re.compile(r"[A-Za-z0-9._~-]+")  # cookies may spell other characters in another way


def path_below(scope: Scope) -> str:
    """The path below `root_path`: the same for an app that runs alone, mounted, or behind --root-path.

    In the ASGI specification `path` contains `root_path`, but some servers and frameworks leave it out; then
    `path` is returned as it is. The path of `root_path` itself is ``/``.
    """
    path: str = scope["path"]
    root: str = scope.get("root_path", "").rstrip("/")
    if root and path.startswith(root) and path[len(root) : len(root) + 1] in ("", "/"):
        return path[len(root) :] or "/"
    return path


def path_requested(scope: Scope) -> str:
    """The path that the browser requested, with `root_path` where the server passes that on."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "").rstrip("/")
    return path if path_below(scope) != path or not root else root + path


def narrower_scopes(domain: str | None, path: str, requested: str) -> list[tuple[str | None, str]]:
    """Domain and path of other cookies that may come with a request for the path `requested`.

    Only scopes within the configured one: the host alone where a domain is configured, and longer paths. A
    cookie of a wider scope may be the session of another app.
    """
    paths, prefix = [path], ""
    for segment in requested.split("/")[1 : MAX_DEPTH + 1]:
        if _PLAIN_SEGMENT.fullmatch(segment) is None:
            break
        prefix += "/" + segment
        if prefix.startswith(path.rstrip("/") + "/"):
            paths.append(prefix)
    scopes = [(host, each) for each in paths for host in dict.fromkeys((None, domain))]
    return [scope for scope in scopes if scope != (domain, path)]
