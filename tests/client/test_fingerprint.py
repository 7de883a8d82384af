"""Fingerprints: which clients are one."""

from __future__ import annotations

import hashlib
import re
from ipaddress import IPv4Address
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asgi_sessions.client.address import CACHED_CHARACTERS
from asgi_sessions.client.fingerprint import Fingerprint, FingerprintReader
from asgi_sessions.client.headers import by_name

AGENT = "Mozilla/5.0 (X11; Linux x86_64; rv:127.0) Gecko/20100101 Firefox/127.0"


def chrome(system: str, version: str, tail: str = "") -> str:
    return (
        f"Mozilla/5.0 ({system}) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/{version} Safari/537.36{tail}"
    )


# --- the hash -------------------------------------------------------------------------------------


def test_the_hash_is_sha256_of_address_and_agent() -> None:
    """The bytes are those that `SessionData.create_fingerprint` documents."""
    exact = Fingerprint(user_agent_exact=True).hash("203.0.113.7", AGENT)
    assert exact == hashlib.sha256(f"203.0.113.7:{AGENT}".encode()).hexdigest()


WINDOWS = chrome("Windows NT 10.0; Win64; x64", "126.0.6478.127")
SAME_AGENT = [
    (WINDOWS, chrome("Windows NT 10.0; Win64; x64", "127.0.6533.72")),
    (WINDOWS, chrome("Windows NT 11.0; Win64; x64", "126.0.6478.127")),
    (AGENT, AGENT.replace("127.0", "128.0")),
    (AGENT, AGENT.replace("Firefox/127.0", "Firefox/128.0b9")),
    (
        "Mozilla/5.0 (iPhone; CPU iPhone OS 17_5_1 like Mac OS X) WebKit/605.1.15 Version/17.5 Mobile/15E148",
        "Mozilla/5.0 (iPhone; CPU iPhone OS 18_0 like Mac OS X) WebKit/619.1 Version/18.0 Mobile/22A3354",
    ),
    (
        chrome("Linux; Android 14; SM-G991B Build/UP1A.231005.007; wv", "126.0"),
        chrome("Linux; Android 15; SM-G991B Build/AP3A.240905.015.A2; wv", "129.0"),
    ),
    (chrome("X11; CrOS x86_64 14541.0.0", "126.0"), chrome("X11; CrOS x86_64 15054.26.0", "131.0")),
    (
        "Mozilla/5.0 (Macintosh; Intel Mac OS X 10_15_7) AppleWebKit/605.1.15 Version/17.5 Safari/605.1.15",
        "Mozilla/5.0 (Macintosh; Intel Mac OS X 14_6) AppleWebKit/618 Version/18 Safari/618",
    ),
    ("MyApp v2.1.3 (build 511)", "MyApp v2.2 (build 514)"),
    ("curl/8.5.0", "curl/8.10"),
    ("Dart/3.4 (dart:io)", "Dart/3.5 (dart:io)"),
]


@pytest.mark.parametrize(("before", "after"), SAME_AGENT)
def test_an_update_keeps_the_hash(before: str, after: str) -> None:
    """A new version of browser, engine or system is the same client."""
    assert Fingerprint().hash("", before) == Fingerprint().hash("", after)


@pytest.mark.parametrize(("before", "after"), SAME_AGENT)
def test_an_update_changes_the_exact_hash(before: str, after: str) -> None:
    """With `user_agent_exact` every character counts."""
    exact = Fingerprint(user_agent_exact=True)
    assert exact.hash("", before) != exact.hash("", after)


DIFFERENT_AGENTS = [
    WINDOWS,
    chrome("Windows NT 10.0; WOW64", "126.0"),
    chrome("Windows NT 10.0; Win64; x64", "126.0", " Edg/126.0"),
    chrome("Windows NT 10.0; Win64; x64", "126.0", " OPR/112.0"),
    chrome("X11; Linux x86_64", "126.0"),
    chrome("X11; Linux aarch64", "126.0"),
    chrome("X11; Linux i686", "126.0"),
    chrome("X11; CrOS x86_64 14541.0.0", "126.0"),
    chrome("Linux; Android 14; SM-G991B", "126.0"),
    chrome("Linux; Android 14; SM-G998B", "126.0"),
    chrome("Macintosh; Intel Mac OS X 10_15_7", "126.0"),
    AGENT,
    AGENT.replace("X11; Linux", "X11; Ubuntu; Linux"),
    AGENT.replace("Linux x86_64", "Linux i686"),
    "curl/8.5.0",
    "Wget/1.24",
    "python-requests/2.31.0",
    "python-httpx/0.27.0",
    "",
]


def test_browsers_and_platforms_differ() -> None:
    """Taking versions out does not make two products, systems or devices one."""
    assert len({Fingerprint().hash("", agent) for agent in DIFFERENT_AGENTS}) == len(DIFFERENT_AGENTS)


@pytest.mark.parametrize(
    ("options", "one", "other", "same"),
    [
        ({}, "203.0.113.7", "203.0.113.7", True),
        ({}, "203.0.113.7", "203.0.113.8", False),
        ({"ipv4_prefix": 24}, "203.0.113.7", "203.0.113.8", True),
        ({"ipv4_prefix": 24}, "203.0.113.7", "203.0.114.7", False),
        ({"ipv4_prefix": 0}, "203.0.113.7", "8.8.8.8", True),
        ({}, "2001:db8::1", "2001:db8:0:0:ffff::2", True),
        ({}, "2001:db8::1", "2001:db8:0:1::1", False),
        ({"ipv6_prefix": 128}, "2001:db8::1", "2001:db8::2", False),
        ({"ipv6_prefix": 128}, "2001:db8::1", "2001:DB8:0::1", True),
        ({"ipv6_prefix": 0}, "2001:db8::1", "fd00::1", True),
        ({}, "::ffff:203.0.113.7", "203.0.113.7", True),
        ({}, "::ffff:cb00:7107", "203.0.113.7", True),
        ({}, "::ffff:203.0.113.7", "::ffff:203.0.113.8", False),
        ({"ipv6_prefix": 128}, "fe80::1%eth0", "fe80::1%eth1", True),
        ({}, "testclient", "testclient", True),
        ({}, "testclient", "", False),
        ({}, "testclient%1", "testclient%2", False),
        ({}, "203.0.113.7", "203.0.113.07", False),
        ({"ip": False}, "203.0.113.7", "testclient", True),
    ],
)
def test_addresses_count_by_prefix(options: dict[str, Any], one: str, other: str, same: bool) -> None:
    """What is outside the prefix, the zone and the spelling do not matter; the rest does."""
    fingerprint = Fingerprint(**options)
    assert (fingerprint.hash(one, AGENT) == fingerprint.hash(other, AGENT)) is same


def test_an_agent_that_does_not_count_may_change() -> None:
    """`user_agent=False` leaves the address alone to decide."""
    fingerprint = Fingerprint(user_agent=False)
    assert fingerprint.hash("203.0.113.7", "a") == fingerprint.hash("203.0.113.7", "b")


@pytest.mark.parametrize(
    "options", [{"ipv4_prefix": -1}, {"ipv4_prefix": 33}, {"ipv6_prefix": -1}, {"ipv6_prefix": 129}]
)
def test_a_prefix_that_no_address_has_is_refused(options: dict[str, Any]) -> None:
    """The message says which one and what would do."""
    with pytest.raises(ValueError, match=f"{next(iter(options))}=.*must be between 0 and"):
        Fingerprint(**options)


@pytest.mark.parametrize(
    ("options", "error", "remedy"),
    [
        ({"ipv4_prefix": "24"}, TypeError, "ipv4_prefix is a number of bits, not '24'"),
        ({"ipv6_prefix": None}, TypeError, "ipv6_prefix is a number of bits, not None"),
        ({"ipv4_prefix": True}, TypeError, "ipv4_prefix is a number of bits"),
        ({"on_mismatch": "ignore"}, ValueError, "on_mismatch='ignore' must be 'refuse' or 'report'"),
        ({"on_mismatch": True}, ValueError, "must be 'refuse' or 'report'"),
    ],
)
def test_what_a_fingerprint_cannot_be(options: dict[str, Any], error: type[Exception], remedy: str) -> None:
    """Wrong types are named where they are written, not at the first request."""
    with pytest.raises(error, match=remedy):
        Fingerprint(**options)


@given(st.text(), st.text())
def test_hash_never_raises(address: str, agent: str) -> None:
    """Any two texts have a fingerprint."""
    assert re.fullmatch("[0-9a-f]{64}", Fingerprint().hash(address, agent))


@given(st.ip_addresses(v=4), st.integers(0, 32), st.text(max_size=20))
def test_v4_and_its_mapped_form_are_one(address: IPv4Address, prefix: int, agent: str) -> None:
    """A dual-stack socket shows the same client in another spelling."""
    fingerprint = Fingerprint(ipv4_prefix=prefix)
    assert fingerprint.hash(str(address), agent) == fingerprint.hash(f"::ffff:{address}", agent)


# A pattern that backtracks would need minutes for these.
@pytest.mark.parametrize("piece", ["1", "1.", "1_", "11_1.", "/", "/1", "/a", "v1", "v", " ", "a1", "1,1 "])
@pytest.mark.parametrize("end", ["", "a", "_", "!"])
def test_hostile_agents_are_hashed_too(piece: str, end: str) -> None:
    """64 kB of whatever a pattern could stumble over have a fingerprint."""
    assert len(Fingerprint().hash("", piece * (65_536 // len(piece)) + end)) == 64


# --- reading a request ----------------------------------------------------------------------------


def scope(client: object, *headers: tuple[str, str]) -> dict[str, Any]:
    raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers]
    return {"type": "http", "client": client, "headers": raw}


def read_by(reader: FingerprintReader, scope: dict[str, Any]) -> str:
    """What it makes of a request."""
    return reader.of(scope, by_name(scope["headers"]))


@pytest.mark.parametrize(
    ("headers", "agent"),
    [
        ([], ""),
        ([("user-agent", AGENT)], AGENT),
        ([("user-agent", "a"), ("accept", "*/*"), ("user-agent", "b")], "a, b"),
        ([("user-agent", "caf\xe9")], "caf\xe9"),
        ([("user-agent", "x" * CACHED_CHARACTERS)], "x" * CACHED_CHARACTERS),
        ([("user-agent", "x" * 65_536)], "x" * 65_536),
    ],
)
def test_the_reader_takes_peer_and_agent(headers: list[tuple[str, str]], agent: str) -> None:
    """The reader's hash is the fingerprint's, twice in a row."""
    reader, request = FingerprintReader(Fingerprint()), scope(("203.0.113.7", 4711), *headers)
    expected = Fingerprint().hash("203.0.113.7", agent)
    assert [read_by(reader, request), read_by(reader, request)] == [expected, expected]


@pytest.mark.parametrize("off", ["ip", "user_agent"])
def test_a_trait_that_is_off_is_not_read(off: str) -> None:
    """Each trait can be left out."""
    fingerprint = Fingerprint(ip=off != "ip", user_agent=off != "user_agent")
    request = scope(("203.0.113.7", 1), ("user-agent", AGENT))
    assert read_by(FingerprintReader(fingerprint), request) == fingerprint.hash("203.0.113.7", AGENT)


def test_the_reader_looks_behind_proxies() -> None:
    """The trusted proxies reach the address."""
    reader = FingerprintReader(Fingerprint(), ["10.0.0.0/8"])
    request = scope(("10.0.0.1", 1), ("x-forwarded-for", "203.0.113.7"))
    assert read_by(reader, request) == Fingerprint().hash("203.0.113.7", "")
