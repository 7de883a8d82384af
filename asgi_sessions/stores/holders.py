"""Who holds a lock, as those who wait for it are told."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

NOTICE_AFTER = 1.0
"""Seconds after which a waiting request is told who holds the lock."""


@dataclass(frozen=True, slots=True)
class Holder:
    """Who holds a lock, and for how many seconds so far.

    `route` is method and path; empty for what runs outside any request. `process` is its number on `host`.
    """

    route: str
    host: str
    process: int
    seconds: float

    @classmethod
    def here(cls, route: str, seconds: float) -> Holder:
        """A holder in this process."""
        return cls(route, host_name(), process_number(), seconds)


@cache
def host_name() -> str:
    """This machine's name, as it calls itself."""
    return socket.gethostname()


@cache
def process_number() -> int:
    """This process's, without asking the system again and again."""
    return os.getpid()


def forget_when_forked(known: Callable[[], None]) -> None:
    """Call `known` in each copy of this process, to forget what was true of the original."""
    if hasattr(os, "register_at_fork"):  # else no process is copied
        os.register_at_fork(after_in_child=known)


forget_when_forked(process_number.cache_clear)
