"""What a client says of itself: its traits for the record, its user agent in words that people know."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import lru_cache
from importlib.util import find_spec

from ..asgi import Scope
from .address import ClientAddress, TrustedProxy
from .headers import by_name

UNKNOWN = "Unknown device"
_KNOWN = 1024  # user agents
_LONGEST = 60  # characters of a name
_PRODUCT = re.compile(r"(?<![\w/])([A-Za-z][\w.-]*)/[0-9]", re.ASCII)
_ENGINES = frozenset({"Mozilla", "AppleWebKit", "Gecko", "KHTML", "Version", "Mobile", "Safari"})


class ClientRecorder:
    """Gives user agent and address of a request's client. `on_untrusted` is that of `ClientAddress`."""

    def __init__(
        self, trusted_proxies: Iterable[TrustedProxy], on_untrusted: Callable[[], object] | None = None
    ) -> None:
        self._address = ClientAddress(trusted_proxies, on_untrusted).of

    def of(self, scope: Scope) -> tuple[str, str]:
        """Both as the client and the proxies told them; "" for what is not there."""
        headers = by_name(scope["headers"])
        return headers.get(b"user-agent", b"").decode("latin-1"), self._address(scope, headers)


@lru_cache(_KNOWN)
def name_of(user_agent: str) -> str:
    """ "Firefox on Windows", by `ua-parser` where it is installed; else the product's name."""
    name = _parsed(user_agent) if find_spec("ua_parser") is not None else None
    return (name or _product(user_agent) or UNKNOWN)[:_LONGEST]


def _parsed(user_agent: str) -> str | None:
    from ua_parser import parse

    found = parse(user_agent)
    browser: str | None = found.user_agent.family if found.user_agent is not None else None
    system: str | None = found.os.family if found.os is not None else None
    return f"{browser} on {system}" if browser and system else browser or system


def _product(user_agent: str) -> str:
    """The last product that is no engine, "" where there is none: browsers name themselves last.

    RFC 9110 section 10.1.5.
    """
    names: list[str] = _PRODUCT.findall(user_agent)
    known = [name for name in names if name not in _ENGINES]
    return (known or names or [""])[-1]
