"""The client's fingerprint: a hash that survives browser updates and address changes within a prefix.

It makes a stolen cookie fail from another client.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from ipaddress import ip_network
from typing import Literal

from ..asgi import Scope
from .address import CACHED_CHARACTERS, CACHED_CLIENTS, ClientAddress, TrustedProxy, parse_address
from .headers import ByName

# The version of `product/version` (RFC 9110 section 10.1.5), and a number that stands alone: "NT 10.0",
# "rv:127.0", "OS 17_5_1". Digits within a word ("x86_64", "SM-G991B", "Win64") tell platforms apart and stay.
_VERSION = re.compile(r"(?<=/)[^\s/;(),0-9]*[0-9][^\s/;(),]*|(?<!\w)v?[0-9]+(?:[._,][0-9]+)*(?!\w)", re.ASCII)


@dataclass(frozen=True)
class Fingerprint:
    """Which traits of a client count, how exactly, and what happens to another client's request.

    `ipv4_prefix` and `ipv6_prefix` are in bits: how much of the address must stay the same. Version numbers
    count with `user_agent_exact` only: browsers update every two weeks. `on_mismatch`: "refuse" gives another
    client a fresh session, "report" serves it the session and sets `Session.client_changed`; both raise the
    event. ValueError or TypeError for a wrong value.
    """

    ip: bool = True
    user_agent: bool = True
    ipv4_prefix: int = 32
    ipv6_prefix: int = 64
    user_agent_exact: bool = False
    on_mismatch: Literal["refuse", "report"] = "refuse"

    def __post_init__(self) -> None:
        for name, bits in (("ipv4_prefix", 32), ("ipv6_prefix", 128)):
            given: object = getattr(self, name)
            if isinstance(given, bool) or not isinstance(given, int):
                raise TypeError(f"{name} is a number of bits, not {given!r}")
            if not 0 <= given <= bits:
                raise ValueError(f"{name}={given!r} must be between 0 and {bits} bits")
        if self.on_mismatch not in ("refuse", "report"):
            raise ValueError(f"on_mismatch={self.on_mismatch!r} must be 'refuse' or 'report'")

    def hash(self, address: str, user_agent: str) -> str:
        """SHA-256 of ``ip:user_agent`` in hexadecimal, each reduced to what counts. Never raises.

        A text that is no address ("testclient", "") counts as it is; a trait that is off counts as "".
        """
        ip = self._masked(address) if self.ip else ""
        agent = self._reduced(user_agent) if self.user_agent else ""
        return hashlib.sha256(f"{ip}:{agent}".encode("utf-8", "surrogatepass")).hexdigest()

    def _masked(self, address: str) -> str:
        parsed = parse_address(address)
        if parsed is None:
            return address
        prefix = self.ipv4_prefix if parsed.version == 4 else self.ipv6_prefix
        return str(ip_network((parsed, prefix), strict=False).network_address)

    def _reduced(self, user_agent: str) -> str:
        return user_agent if self.user_agent_exact else _VERSION.sub("", user_agent)


class FingerprintReader:
    """Gives the fingerprint of a request's client. Clients of late are remembered.

    `trusted_proxies` and `on_untrusted` are those of `ClientAddress`.
    """

    def __init__(
        self,
        fingerprint: Fingerprint,
        trusted_proxies: Iterable[TrustedProxy] = (),
        on_untrusted: Callable[[], object] | None = None,
    ) -> None:
        self._fingerprint = fingerprint
        self._ip, self._user_agent = fingerprint.ip, fingerprint.user_agent
        self._address = ClientAddress(trusted_proxies, on_untrusted).of
        self._cached: Callable[[str, bytes], str] = lru_cache(CACHED_CLIENTS)(self._hash)

    def of(self, scope: Scope, headers: ByName) -> str:
        """The hash for this request: 64 hexadecimal digits. An absent header counts as ""."""
        address = self._address(scope, headers) if self._ip else ""
        agent = headers.get(b"user-agent", b"") if self._user_agent else b""
        is_short = len(agent) + len(address) <= CACHED_CHARACTERS
        return (self._cached if is_short else self._hash)(address, agent)

    def _hash(self, address: str, agent: bytes) -> str:
        return self._fingerprint.hash(address, agent.decode("latin-1"))
