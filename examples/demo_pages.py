"""The pages' markup: parts of `demo_web/pages.html`, filled in."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from pathlib import Path

from asgi_sessions import SessionData


class Html(str):
    """Markup; all other text is escaped when it is filled in."""

    __slots__ = ()


WEB = Path(__file__).with_name("demo_web")

_SPLIT = re.split(r"<!-- == (\S+) -->\n", (WEB / "pages.html").read_text(encoding="utf-8"))
PARTS = dict(zip(_SPLIT[1::2], _SPLIT[2::2], strict=True))


def fill(part: str, **values: object) -> Html:
    """A part of `pages.html` with its {{marks}} filled in."""

    def value(mark: re.Match[str]) -> str:
        text = values[mark[1]]
        return text if isinstance(text, Html) else html.escape(str(text))

    return Html(re.sub(r"\{\{(\w+)\}\}", value, PARTS[part]))


def join(parts: Sequence[Html]) -> Html:
    """The parts one after the other."""
    return Html("".join(parts))


def clock(data: SessionData) -> str:
    """When the session began."""
    return f"{data.created_at:%d %b, %H:%M} UTC"


def device_of(agent: str) -> str:
    """The browser's name, as far as its User-Agent tells."""
    names = {"Edg/": "Edge", "Firefox/": "Firefox", "Chrome/": "Chrome", "Safari/": "Safari", "curl/": "curl"}
    return next((name for mark, name in names.items() if mark in agent), "Another client")


def euro(cents: int) -> str:
    """A price."""
    return f"€ {cents / 100:.2f}"
