"""The address of a request's client, also behind proxies.

Proxy headers count only from proxies that the app trusts. Anybody else can write anything into them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import TypeAlias

from ..asgi import Scope
from .headers import ByName

IPAddress: TypeAlias = IPv4Address | IPv6Address
IPNetwork: TypeAlias = IPv4Network | IPv6Network
TrustedProxy: TypeAlias = str | IPAddress | IPNetwork

MAX_HOPS = 32  # entries of a proxy header that are read, from the right
CACHED_CLIENTS = 1024
CACHED_CHARACTERS = 512  # longer headers are not cached, so that the cache stays small
MAX_ADDRESS_CHARACTERS = 64  # "[", 45 of an IPv6 address, "]:65535", and room for a zone

_PORT = re.compile(r":(?:[0-9]{1,5}|_[A-Za-z0-9._-]+)")  # RFC 7239 section 6
_ELEMENT = re.compile(r'([^",]*(?:"[^"]*"[^",]*)*),')
_PAIR = re.compile(r'([^";]*(?:"[^"]*"[^";]*)*);')


class ClientAddress:
    """Finds the address of a request's client, behind the proxies in `trusted_proxies`.

    Each entry is a network or an address; "unix" trusts a peer without an address (a Unix socket). ValueError
    for any other. Where no proxy is trusted, `on_untrusted` is called for the first request with proxy
    headers.
    """

    def __init__(
        self, trusted_proxies: Iterable[TrustedProxy] = (), on_untrusted: Callable[[], object] | None = None
    ) -> None:
        if isinstance(trusted_proxies, str):
            raise ValueError(f"trusted_proxies={trusted_proxies!r} is one string; pass a list of networks")
        entries = list(trusted_proxies)
        self._trusts_unix = "unix" in entries
        self._networks = tuple(_network(entry) for entry in entries if entry != "unix")
        self._proxied = bool(entries)
        self._on_untrusted = on_untrusted
        self._resolved: Callable[[str, str, str], str] = lru_cache(CACHED_CLIENTS)(self._resolve)

    def of(self, scope: Scope, headers: ByName) -> str:
        """The client's address: the peer's, unless a trusted proxy says more; "" where there is none.

        Proxy headers are read from the right, past trusted addresses, to the first that is not trusted: that
        client may have written all entries left of its own. An entry that is no address ends the walk at the
        last trusted one. Where `X-Forwarded-For` and `Forwarded` disagree, neither counts: a proxy that
        maintains one passes the other on as the client wrote it, and nothing says which one that is.
        """
        client = scope.get("client")
        peer: str = (client[0] or "") if client else ""
        if not self._proxied:
            if self._on_untrusted and (b"x-forwarded-for" in headers or b"forwarded" in headers):
                self._notice(peer, *_proxy_headers(headers))
            return peer
        listed, forwarded = _proxy_headers(headers)
        is_short = len(listed) + len(forwarded) <= CACHED_CHARACTERS
        return (self._resolved if is_short else self._resolve)(peer, listed, forwarded)

    def _notice(self, peer: str, listed: str, forwarded: str) -> None:
        """Call `on_untrusted` for the first request with proxy headers, which do not count.

        Not where the server uses them already, as uvicorn's `--proxy-headers` does: the peer is in them then.
        """
        tell, self._on_untrusted = self._on_untrusted, None
        parsed = parse_address(peer)
        is_used = parsed is not None and str(parsed) in [*_listed_hops(listed), *_forwarded_hops(forwarded)]
        if tell is not None and not is_used:
            tell()

    def _resolve(self, peer: str, listed: str, forwarded: str) -> str:
        if not self._trusts(peer):
            return peer
        headers = (_listed_hops(listed), _forwarded_hops(forwarded))
        found = {self._walk(peer, hops) for hops in headers if hops}
        return found.pop() if len(found) == 1 else peer

    def _walk(self, peer: str, hops: Iterable[str | None]) -> str:
        address = peer
        for hop in hops:
            if hop is None:
                break
            address = hop
            if not self._trusts(hop):
                break
        return address

    def _trusts(self, address: str) -> bool:
        if not address:
            return self._trusts_unix
        parsed = parse_address(address)
        return parsed is not None and any(parsed in network for network in self._networks)


def _proxy_headers(headers: ByName) -> tuple[str, str]:
    listed, forwarded = headers.get(b"x-forwarded-for", b""), headers.get(b"forwarded", b"")
    return listed.decode("latin-1"), forwarded.decode("latin-1")


def parse_address(text: str) -> IPAddress | None:
    """The address without its zone, v4-mapped v6 as v4; None for anything else."""
    if len(text) > MAX_ADDRESS_CHARACTERS:
        return None
    try:
        parsed = ip_address(text.partition("%")[0])
    except ValueError:
        return None
    return parsed.ipv4_mapped or parsed if isinstance(parsed, IPv6Address) else parsed


def _network(entry: TrustedProxy) -> IPNetwork:
    try:
        network = ip_network(str(entry))
    except ValueError as error:
        raise ValueError(
            f"trusted_proxies: {error}; write networks such as '10.0.0.0/8' or 'fd00::/8', or 'unix'"
        ) from None
    mapped = network.network_address.ipv4_mapped if isinstance(network, IPv6Network) else None
    if mapped is not None and network.prefixlen >= 96:
        return IPv4Network((mapped, network.prefixlen - 96))
    return network


def _listed_hops(listed: str) -> list[str | None]:
    """The hops of `X-Forwarded-For` from the right; None for an entry that is no address."""
    entries = listed.rsplit(",", MAX_HOPS)[-MAX_HOPS:] if listed else []
    return [_host(entry.strip(" \t")) for entry in reversed(entries)]


def _forwarded_hops(forwarded: str) -> list[str | None]:
    """The hops of `Forwarded` from the right; None for an element that names no address.

    No hop counts where there is a backslash, which no address needs, or an open quote, with which a client's
    part could swallow the proxy's.
    """
    if "\\" in forwarded or forwarded.count('"') % 2:
        return [None]
    elements = _ELEMENT.findall(forwarded + ",")[-MAX_HOPS:] if forwarded else []
    return [_forwarded_for(element) for element in reversed(elements)]


def _forwarded_for(element: str) -> str | None:
    """The address of the only ``for`` in this element (RFC 7239 section 4); None for anything else."""
    pairs = [pair.partition("=") for pair in _PAIR.findall(element + ";")]
    values = [value for name, _, value in pairs if name.strip(" \t").lower() == "for"]
    if len(values) != 1:
        return None
    value = values[0].strip(" \t")
    quoted = len(value) > 1 and value[0] == value[-1] == '"'
    return _host(value[1:-1] if quoted else value)


def _host(node: str) -> str | None:
    """The address in ``address``, ``address:port`` or ``[address]:port``; None for `unknown` and the like."""
    if node.startswith("["):
        host, bracket, port = node[1:].partition("]")
        if not bracket or ":" not in host:
            return None
    elif node.count(":") == 1:
        host, colon, port = node.partition(":")
        port = colon + port
    else:
        host, port = node, ""
    if port and _PORT.fullmatch(port) is None:
        return None
    parsed = parse_address(host)
    return None if parsed is None else str(parsed)
