"""A store's URL, read. What is wrong with it fails here, by its name."""

from __future__ import annotations

import os
from typing import NamedTuple
from urllib.parse import parse_qsl, unquote_to_bytes, urlsplit

_FORM = "sqlite:///sessions.db, or sqlite:////var/lib/app/sessions.db for an absolute path"


class Options(NamedTuple):
    """What a URL says; None where it says nothing of it."""

    path: str
    synchronous: str | None = None
    busy_timeout: float | None = None


def read(url: str) -> Options:
    """The path and the options of `sqlite:///path?option=value`; `ValueError` for anything else."""
    parts = urlsplit(url)
    path = os.fsdecode(unquote_to_bytes(parts.path)[1:])
    if parts.netloc or not path or "#" in url:
        raise ValueError(f"a SQLite URL reads {_FORM}; a # in the path is written %23")
    found = Options(path)
    given: set[str] = set()
    for name, value in parse_qsl(parts.query, keep_blank_values=True):
        if name in given:
            raise ValueError(f"the URL gives {name} more than once: which one counts?")
        given.add(name)
        if name == "synchronous":
            found = found._replace(synchronous=value)
        elif name == "busy_timeout":
            found = found._replace(busy_timeout=_seconds(value))
        else:
            raise ValueError(f"unknown option {name!r}: a SQLite URL knows synchronous and busy_timeout")
    return found


def _seconds(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"busy_timeout is a number of seconds, not {text!r}") from None
