"""A request's headers by name."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeAlias

ByName: TypeAlias = dict[bytes, bytes]
"""A request's header values, by lower-case name."""


def by_name(headers: Iterable[tuple[bytes, bytes]]) -> ByName:
    """The value of each header. Several lines of one name are joined in linear time.

    Lines are joined with a comma (RFC 9110 section 5.2), cookies with a semicolon (RFC 9113 section 8.2.3).
    """
    pairs = headers if isinstance(headers, list) else list(headers)
    values = dict(pairs)
    if len(values) == len(pairs):  # nearly always
        return values
    lines: dict[bytes, list[bytes]] = {}
    for name, value in pairs:
        lines.setdefault(name, []).append(value)
    return {name: (b"; " if name == b"cookie" else b", ").join(found) for name, found in lines.items()}
