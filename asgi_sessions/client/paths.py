"""Paths: where in an app a request goes, wherever that app is mounted, and which cookies come with it."""

from __future__ import annotations

import re

from ..asgi import Scope

MAX_DEPTH = 3  # path segments that a cookie of a longer path is looked for under

_PLAIN_SEGMENT = re.compile(r"[A-Za-z0-9._~-]+")  # no other is sure to be spelled in the cookie as it is here


def path_below(scope: Scope) -> str:
    """The path below `root_path`: the same for an app that is served alone, mounted, or behind --root-path.

    Servers and frameworks disagree on whether `path` contains `root_path` (the ASGI specification says that
    it does); where it does not, the path is below it already. What is at `root_path` itself is ``/``.
    """
    path: str = scope["path"]
    root: str = scope.get("root_path", "").rstrip("/")
    if root and path.startswith(root) and path[len(root) : len(root) + 1] in ("", "/"):
        return path[len(root) :] or "/"
    return path


def path_requested(scope: Scope) -> str:
    """The path that the browser asked for, `root_path` included, as far as the server passes that on."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "").rstrip("/")
    return path if path_below(scope) != path or not root else root + path


def narrower_scopes(domain: str | None, path: str, requested: str) -> list[tuple[str | None, str]]:
    """Where else a cookie may lie that came with a request for the path `requested`: domain and path of each.

    Only scopes within the configured one: this host alone, where a domain is configured, and longer paths. A
    wider one may hold the session of another app, of which we know nothing.
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
