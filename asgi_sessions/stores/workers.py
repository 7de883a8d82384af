"""Whether this process is one of several that serve the app: each has a memory of its own then.

No server says so to the app. What started the process is still being called, though: the parts of servers'
code that know are named here, and nowhere else. Of a server that is not known nothing is said.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

from .holders import forget_when_forked

_logger = logging.getLogger("asgi_sessions.memory")


def _more_than_one(config: Any) -> bool:
    """By the configuration of uvicorn or Hypercorn; uvicorn starts one worker where it reloads."""
    return getattr(config, "workers", 1) > 1 and not getattr(config, "should_reload", False)


# By module: which variable of a function in it knows, and what to ask it.
_SERVERS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "uvicorn._subprocess": ("config", _more_than_one),
    "hypercorn.asyncio.run": ("config", _more_than_one),
    "hypercorn.trio.run": ("config", _more_than_one),
    "gunicorn.arbiter": ("self", lambda arbiter: getattr(arbiter, "num_workers", 1) > 1),
}


def is_one_of_several() -> bool:
    """Whether a server that is known runs this code in one of several workers."""
    frame = sys._getframe()  # what `inspect` gives, without importing it
    while frame.f_back is not None:
        frame = frame.f_back
        name, tells = _SERVERS.get(frame.f_globals.get("__name__", ""), ("", _more_than_one))
        if name in frame.f_locals and tells(frame.f_locals[name]):
            return True
    return False


@cache
def warn_if_one_of_several() -> None:
    """Say in the log, once in each process, that sessions in memory are not shared."""
    if is_one_of_several():
        _logger.warning(
            "this process is one of several workers, and sessions in memory are not shared: each worker shows"
            ' a visitor another session. Use store="sqlite:///sessions.db" on one machine,'
            ' store="redis://..." on several, or one worker'
        )


forget_when_forked(warn_if_one_of_several.cache_clear)
