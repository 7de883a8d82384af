"""The client's address: whose word counts, behind proxies and without."""

from __future__ import annotations

import re
from ipaddress import ip_address, ip_network
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asgi_sessions.client.address import MAX_HOPS, ClientAddress, parse_address
from asgi_sessions.client.headers import by_name

PROXY = ("10.0.0.1", 4711)
TRUSTED = ["10.0.0.0/8", ip_network("fd00::/8"), ip_address("192.0.2.1"), "unix"]
CLIENT = "203.0.113.7"


def scope(client: object, *headers: tuple[str, str]) -> dict[str, Any]:
    raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers]
    return {"type": "http", "client": client, "headers": raw}


def read_by(reader: ClientAddress, scope: dict[str, Any]) -> str:
    """What it makes of a request."""
    return reader.of(scope, by_name(scope["headers"]))


@pytest.mark.parametrize(
    ("client", "address"),
    [(None, ""), (["203.0.113.7", 1], CLIENT), (("testclient", 50000), "testclient"), ((None, None), "")],
)
def test_without_proxies_the_peer_is_the_client(client: object, address: str) -> None:
    """Nobody's headers count unless the app named its proxies."""
    headers = [("x-forwarded-for", "8.8.8.8"), ("forwarded", "for=8.8.8.8")]
    assert read_by(ClientAddress(), scope(client, *headers)) == address


def test_a_scope_may_lack_a_client() -> None:
    """The key is optional in ASGI."""
    assert read_by(ClientAddress(), {"type": "http", "headers": []}) == ""


@pytest.mark.parametrize(
    ("client", "believed"),
    [
        (PROXY, True),
        (("::ffff:10.0.0.1", 1), True),
        (("fd00::1%eth0", 1), True),
        (("192.0.2.1", 1), True),
        (None, True),
        (("192.0.2.2", 1), False),
        (("::10.0.0.1", 1), False),
        (("testclient", 1), False),
    ],
)
def test_only_trusted_peers_are_believed(client: tuple[str, int] | None, believed: bool) -> None:
    """The header of anybody else is what that client made up."""
    peer = client[0] if client else ""
    found = read_by(ClientAddress(TRUSTED), scope(client, ("x-forwarded-for", CLIENT)))
    assert found == (CLIENT if believed else peer)


def test_a_unix_peer_is_not_trusted_by_default() -> None:
    """A peer without an address is trusted only if the app says "unix"."""
    assert read_by(ClientAddress(["10.0.0.0/8"]), scope(None, ("x-forwarded-for", CLIENT))) == ""


@pytest.mark.parametrize(
    ("lines", "address"),
    [
        ([], "10.0.0.1"),
        ([""], "10.0.0.1"),
        ([CLIENT], CLIENT),
        (["8.8.8.8, " + CLIENT], CLIENT),
        ([f"8.8.8.8, {CLIENT}, 10.0.0.2, fd00::1"], CLIENT),
        (["8.8.8.8", CLIENT, "10.0.0.2"], CLIENT),
        ([f"\t{CLIENT} \t"], CLIENT),
        ([f"{CLIENT}:4711"], CLIENT),
        (["2001:db8::1"], "2001:db8::1"),
        (["[2001:db8::1]"], "2001:db8::1"),
        (["[2001:DB8:0::1]:4711"], "2001:db8::1"),
        (["fe80::1%eth0"], "fe80::1"),
        ([f"::ffff:{CLIENT}"], CLIENT),
        ([f"[::ffff:{CLIENT}]:1"], CLIENT),
        ([f"{CLIENT}, ::ffff:10.0.0.2"], CLIENT),
        (["10.0.0.3, 10.0.0.2"], "10.0.0.3"),
        ([f"{CLIENT}, unknown"], "10.0.0.1"),
        ([f"{CLIENT}, unknown, 10.0.0.2"], "10.0.0.2"),
        ([f"{CLIENT}, _hidden"], "10.0.0.1"),
        ([f"{CLIENT},"], "10.0.0.1"),
        ([f"{CLIENT}, , 10.0.0.2"], "10.0.0.2"),
        ([f"{CLIENT}:port"], "10.0.0.1"),
        ([f"{CLIENT}:123456"], "10.0.0.1"),
        ([f"[{CLIENT}]"], "10.0.0.1"),
        (["[2001:db8::1"], "10.0.0.1"),
        (["[2001:db8::1]4711"], "10.0.0.1"),
        ([f'"{CLIENT}"'], "10.0.0.1"),
        (["203.0.113.007"], "10.0.0.1"),
        (["203.0.113.\xb2"], "10.0.0.1"),
        (["1" * 60_000], "10.0.0.1"),
        ([f"{CLIENT}" + ", 10.0.0.2" * (MAX_HOPS - 1)], CLIENT),
        ([f"{CLIENT}" + ", 10.0.0.2" * MAX_HOPS], "10.0.0.2"),
    ],
)
def test_x_forwarded_for_is_walked_from_the_right(lines: list[str], address: str) -> None:
    """The first address that is not trusted is the client; what is no address ends the walk."""
    assert (
        read_by(ClientAddress(TRUSTED), scope(PROXY, *(("x-forwarded-for", line) for line in lines)))
        == address
    )


@pytest.mark.parametrize(
    ("lines", "address"),
    [
        ([""], "10.0.0.1"),
        ([f"for={CLIENT}"], CLIENT),
        ([f"FOR={CLIENT};proto=https"], CLIENT),
        ([f"proto=https; by=10.0.0.1 ; for={CLIENT}"], CLIENT),
        ([f'for="{CLIENT}:4711"'], CLIENT),
        (['for="[2001:db8::1]:4711"'], "2001:db8::1"),
        (['for="[2001:db8::1]"'], "2001:db8::1"),
        ([f'for="{CLIENT}:_port"'], CLIENT),
        ([f"for=8.8.8.8, for={CLIENT}, for=10.0.0.2"], CLIENT),
        (["for=8.8.8.8", f"for={CLIENT}"], CLIENT),
        ([f'for={CLIENT};host="a,b;for=8.8.8.8,for=8.8.8.8"'], CLIENT),
        ([f"garbage, for={CLIENT}"], CLIENT),
        ([f"for={CLIENT}, for=unknown"], "10.0.0.1"),
        ([f"for={CLIENT}, for=_hidden, for=10.0.0.2"], "10.0.0.2"),
        ([f"for={CLIENT}, proto=https"], "10.0.0.1"),
        ([f"for={CLIENT},"], "10.0.0.1"),
        ([f"for={CLIENT};for=8.8.8.8"], "10.0.0.1"),
        ([f'for="{CLIENT}'], "10.0.0.1"),
        ([f"for={CLIENT}\\"], "10.0.0.1"),
        (['for="', f"for={CLIENT}"], "10.0.0.1"),
        (['for="8.8.8.8', f'for="{CLIENT}:1"'], "10.0.0.1"),
        ([f'for={CLIENT};host="x\\", for=8.8.8.8, a=\\""'], "10.0.0.1"),
        ([f'for=a"{CLIENT}"'], "10.0.0.1"),
        (['for="'], "10.0.0.1"),
        (["for="], "10.0.0.1"),
        ([f"for={CLIENT}" + ", for=10.0.0.2" * (MAX_HOPS - 1)], CLIENT),
        ([f"for={CLIENT}" + ", for=10.0.0.2" * MAX_HOPS], "10.0.0.2"),
    ],
)
def test_forwarded_is_walked_from_the_right(lines: list[str], address: str) -> None:
    """RFC 7239 elements count like the other header's entries; a client's quotes cannot hide the proxy's."""
    assert read_by(ClientAddress(TRUSTED), scope(PROXY, *(("forwarded", line) for line in lines))) == address


@pytest.mark.parametrize(
    ("listed", "forwarded", "address"),
    [
        (CLIENT, f"for={CLIENT}", CLIENT),
        (CLIENT, f"for={CLIENT};proto=https, for=10.0.0.2", CLIENT),
        (CLIENT, "for=8.8.8.8", "10.0.0.1"),
        ("8.8.8.8", f"for={CLIENT}", "10.0.0.1"),
        (CLIENT, "for=unknown", "10.0.0.1"),
        (CLIENT, '"', "10.0.0.1"),
        (CLIENT, "", CLIENT),
        ("", f"for={CLIENT}", CLIENT),
    ],
)
def test_headers_that_disagree_are_not_believed(listed: str, forwarded: str, address: str) -> None:
    """A client cannot slip in the header that its proxy does not maintain."""
    request = scope(PROXY, ("x-forwarded-for", listed), ("forwarded", forwarded))
    assert read_by(ClientAddress(TRUSTED), request) == address


def test_a_mapped_network_is_its_v4_network() -> None:
    """A network in v4-mapped spelling trusts the v4 addresses it means."""
    client = ClientAddress(["::ffff:10.0.0.0/104"])
    assert read_by(client, scope(PROXY, ("x-forwarded-for", CLIENT))) == CLIENT


@pytest.mark.parametrize("bad", ["*", "proxy.internal", "10.0.0.1/8", "10.0.0.0/33", "", "fd00::/8%eth0"])
def test_a_bad_network_is_named(bad: str) -> None:
    """The constructor names the entry and shows good ones."""
    with pytest.raises(ValueError, match=rf"trusted_proxies: .*{re.escape(bad)}.*'10\.0\.0\.0/8'"):
        ClientAddress(["10.0.0.0/8", bad])


def test_one_string_is_not_a_list_of_networks() -> None:
    """A bare string would be taken apart into characters."""
    with pytest.raises(ValueError, match="pass a list"):
        ClientAddress("10.0.0.0/8")


header_text = st.text(st.characters(max_codepoint=255), max_size=40) | st.lists(
    st.sampled_from(["for=", "For=", '"', ",", ";", "\\", "[", "]", ":", "1", CLIENT, "10.0.0.2", "::1", " "])
).map("".join)


@given(header_text, header_text)
def test_the_address_is_always_an_address(listed: str, forwarded: str) -> None:
    """Nothing raises, and whatever the headers say the outcome is an address."""
    request = scope(PROXY, ("x-forwarded-for", listed), ("forwarded", forwarded))
    assert parse_address(read_by(ClientAddress(TRUSTED), request)) is not None


@given(header_text.filter(lambda text: '"' not in text and "\\" not in text))
def test_what_the_client_wrote_does_not_matter(prefix: str) -> None:
    """Left of what the proxy added, anything may stand."""
    for name, added in (("x-forwarded-for", CLIENT), ("forwarded", f"for={CLIENT}")):
        assert read_by(ClientAddress(TRUSTED), scope(PROXY, (name, f"{prefix}, {added}"))) == CLIENT


@given(header_text)
def test_a_client_never_chooses_its_address(prefix: str) -> None:
    """With quotes and backslashes too, it is its own address or the proxy's."""
    for added in (f"for={CLIENT}", f'for="{CLIENT}:1";host="x"'):
        found = read_by(ClientAddress(TRUSTED), scope(PROXY, ("forwarded", prefix), ("forwarded", added)))
        assert found in (CLIENT, "10.0.0.1")
