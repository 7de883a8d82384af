"""A request's headers by name."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from asgi_sessions.client.headers import by_name


@pytest.mark.parametrize(
    ("headers", "values"),
    [
        ([], {}),
        ([(b"host", b"a"), (b"cookie", b"b=c")], {b"host": b"a", b"cookie": b"b=c"}),
        (
            [(b"cookie", b"a=1"), (b"x", b""), (b"cookie", b"b=2;c=3")],
            {b"cookie": b"a=1; b=2;c=3", b"x": b""},
        ),
        ([(b"via", b"a"), (b"via", b""), (b"via", b"b, c")], {b"via": b"a, , b, c"}),
        ([[b"via", b"a"], [b"via", b"b"]], {b"via": b"a, b"}),
        (((b"via", b"a"), (b"Via", b"b")), {b"via": b"a", b"Via": b"b"}),
        (iter([(b"via", b"a"), (b"via", b"b")]), {b"via": b"a, b"}),
    ],
    ids=["none", "different", "cookies", "joined", "lists", "case", "iterator"],
)
def test_lines_of_one_name_are_one_header(
    headers: Iterable[tuple[bytes, bytes]], values: dict[bytes, bytes]
) -> None:
    """They are joined in their order, cookies with a semicolon; names stay as they are."""
    assert by_name(headers) == values
