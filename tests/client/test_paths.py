"""Paths below a mount, and the scopes that a cookie may have come from."""

from __future__ import annotations

import pytest

from asgi_sessions.client.paths import narrower_scopes, path_below, path_requested


@pytest.mark.parametrize(
    ("path", "root", "below", "requested"),
    [
        ("/cart", "", "/cart", "/cart"),
        ("/api/cart", "/api", "/cart", "/api/cart"),  # Starlette's Mount, uvicorn --root-path
        ("/cart", "/api", "/cart", "/api/cart"),  # servers that take it off
        ("/api", "/api", "/", "/api"),
        ("/api/", "/api", "/", "/api/"),
        ("/apis", "/api", "/apis", "/api/apis"),
        ("/api/cart", "/api/", "/cart", "/api/cart"),
        ("/cart", "/", "/cart", "/cart"),
        ("/a/b/c", "/a/b", "/c", "/a/b/c"),
    ],
)
def test_a_path_below_its_root(path: str, root: str, below: str, requested: str) -> None:
    """Whether the path contains the root path or not, both can be told."""
    scope = {"type": "http", "path": path, "root_path": root}
    assert (path_below(scope), path_requested(scope)) == (below, requested)


def test_a_scope_may_lack_a_root() -> None:
    """It is optional in ASGI."""
    assert (
        path_below({"type": "http", "path": "/a"}) == path_requested({"type": "http", "path": "/a"}) == "/a"
    )


@pytest.mark.parametrize(
    ("domain", "path", "requested", "scopes"),
    [
        (None, "/", "/", []),
        (None, "/", "/a/b", [(None, "/a"), (None, "/a/b")]),
        (None, "/a", "/a/b", [(None, "/a/b")]),
        (None, "/a/", "/a/b", [(None, "/a/b")]),
        (None, "/a", "/ab/c", []),
        ("example.com", "/", "/", [(None, "/")]),
        ("example.com", "/", "/a", [(None, "/"), (None, "/a"), ("example.com", "/a")]),
        (None, "/", "/a/b/c/d/e", [(None, "/a"), (None, "/a/b"), (None, "/a/b/c")]),
        (None, "/", "/a b/c", []),
        (None, "/", "/a/é", [(None, "/a")]),
        (None, "/", "/a;x=1/b\r\nc", []),
        (None, "/", "//a", []),
        (None, "/", "", []),
    ],
)
def test_leftovers_lie_within_the_configured_scope(
    domain: str | None, path: str, requested: str, scopes: list[tuple[str | None, str]]
) -> None:
    """This host alone and longer paths; never the cookie's own scope, never a wider one."""
    assert narrower_scopes(domain, path, requested) == scopes
