"""What clients send, read by the package and by plain reference readers that share no code with it."""

from __future__ import annotations

import base64
import hashlib
import hmac
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from itertools import groupby
from types import FrameType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asgi_sessions.client.address import MAX_HOPS, ClientAddress, parse_address
from asgi_sessions.client.cookie import MAX_COOKIE_BYTES, Presented, SessionCookie
from asgi_sessions.client.fingerprint import Fingerprint, FingerprintReader
from asgi_sessions.client.headers import by_name
from asgi_sessions.client.signer import CookieSigner, Verified
from fuzz import effort

# --- cookies ----------------------------------------------------------------------------------------

KEY, OLD_KEY, FOREIGN_KEY = "k" * 32, "o" * 32, "f" * 32
IDS = ["0123456789abcdef" * 2, "fedcba9876543210" * 2]
Headers = list[tuple[bytes, bytes]]


@dataclass(frozen=True)
class Good:
    """What a token says that was really signed."""

    session_id: str
    issued_at: int
    stale_key: bool


def signed_by(key: str, session_id: str, issued_at: int) -> bytes:
    """The token as the format's description has it: HMAC-SHA-256 under a derived key, base64url."""
    derived = hmac.new(key.encode(), b"asgi_sessions.cookie", hashlib.sha256).digest()
    packed = issued_at.to_bytes((issued_at.bit_length() + 7) // 8, "big")
    body = session_id.encode() + b"." + base64.urlsafe_b64encode(packed).rstrip(b"=")
    signature = hmac.new(derived, body, hashlib.sha256).digest()
    return body + b"." + base64.urlsafe_b64encode(signature).rstrip(b"=")


GOOD = {
    signed_by(key, session_id, issued_at): Good(session_id, issued_at, key is OLD_KEY)
    for key in (KEY, OLD_KEY)
    for session_id in IDS
    for issued_at in (1, 1_700_000_000, 1_800_000_000)
}
FOREIGN = [signed_by(FOREIGN_KEY, session_id, 1_700_000_000) for session_id in IDS]
COOKIE = SessionCookie(KEY, fallbacks=[OLD_KEY])


@st.composite
def spoiled(draw: st.DrawFn) -> bytes:
    """A good token with one thing wrong, or another spelling of the same bytes."""
    token = draw(st.sampled_from(list(GOOD)))
    where = draw(st.integers(0, len(token)))
    other = draw(st.sampled_from([b"", b"=", b".", b"A", b"\x00", b'"', b"%2e", b"-", b"\xff"]))
    return draw(
        st.sampled_from(
            [
                token[:where] + other + token[where:],
                token[:where] + other + token[where + 1 :],
                token[:where],
                token.upper(),
                b'"' + token + b'"',
                token + b"=",
                token.replace(b".", b"..", 1),
            ]
        )
    )


tokens = st.sampled_from([*GOOD, *FOREIGN]) | spoiled() | st.binary(max_size=40)
cookie_names = st.sampled_from([b"session"] * 6 + [b"Session", b"session2", b"xsession", b"", b'"session"'])
blanks = st.sampled_from([b"", b"", b" ", b"\t", b"  ", b"\xa0", b"\x0b"])
pairs = st.builds(
    lambda before, name, middle, equals, after, value, end: (
        before + name + middle + equals + after + value + end
    ),
    blanks,
    cookie_names,
    blanks,
    st.sampled_from([b"=", b"=", b"=", b"==", b""]),
    blanks,
    tokens,
    blanks,
)
cookie_lines = st.builds(
    lambda parts, between: between.join(parts),
    st.lists(pairs | st.binary(max_size=12), min_size=1, max_size=6),
    st.sampled_from([b";", b"; ", b";;", b",", b"&"]),
)
cookie_headers = st.lists(
    st.tuples(st.sampled_from([b"cookie", b"cookie", b"Cookie", b"set-cookie", b"x"]), cookie_lines),
    max_size=4,
)


def reference_tokens(headers: Headers) -> list[bytes]:
    """The values of cookies called `session`, found byte by byte."""
    found: list[bytes] = []
    for name, line in headers:
        if name != b"cookie":
            continue
        start = 0
        while start <= len(line):
            end = line.find(b";", start)
            end = len(line) if end < 0 else end
            equals = line.find(b"=", start, end)
            if equals >= 0 and trimmed(line[start:equals]) == b"session":
                found.append(trimmed(line[equals + 1 : end]))
            start = end + 1
    return found


def trimmed(text: bytes) -> bytes:
    while text[:1] in (b" ", b"\t") and text:
        text = text[1:]
    while text[-1:] in (b" ", b"\t") and text:
        text = text[:-1]
    return text


def reference_answer(headers: Headers) -> Presented:
    """What up to four different values of our name say, each looked up among the tokens that were signed."""
    values = set(reference_tokens(headers))
    if len(values) > 4:
        return Presented(reason="ambiguous")
    good = sorted((GOOD[value] for value in values if value in GOOD), key=lambda each: each.session_id)
    if not good:
        return Presented(reason="bad_signature") if values else Presented()
    best = [
        min(same, key=lambda each: (each.stale_key, -each.issued_at))
        for _, same in groupby(good, key=lambda each: each.session_id)
    ]
    if len(best) > 1:
        rivals = tuple(Verified(each.session_id, each.issued_at, each.stale_key) for each in best)
        return Presented(rivals=rivals, only_ours=len(good) == len(values))
    return Presented(best[0].session_id, best[0].issued_at, best[0].stale_key)


def without_order(answer: Presented) -> Presented:
    """The answer with its rivals sorted: their order says nothing."""
    return replace(answer, rivals=tuple(sorted(answer.rivals)))


def test_the_reference_signs_as_the_package_does() -> None:
    """The format is what its description says; so tokens of the reference are good ones."""
    for token, good in GOOD.items():
        signer = CookieSigner(OLD_KEY if good.stale_key else KEY, clock=partial(float, good.issued_at))
        assert signer.sign(good.session_id).encode() == token


@effort(150)
@given(cookie_headers)
def test_cookies_are_read_as_a_plain_reader_reads_them(headers: Headers) -> None:
    """An id is found exactly if it is there in the one spelling that was signed, twice in a row."""
    expected = reference_answer(headers)
    line = by_name(headers).get(b"cookie")
    assert [without_order(COOKIE.read(line)) for _ in range(2)] == [expected, expected]


@effort(100)
@given(tokens)
def test_only_what_was_signed_verifies(token: bytes) -> None:
    """Every other text is refused without an error, also one that base64 reads as the same bytes."""
    verified, good = COOKIE.signer.verify(token), GOOD.get(token)
    assert verified == (None if good is None else (good.session_id, good.issued_at, good.stale_key))


# --- the work does not grow faster than the input ------------------------------------------------------

_PIECES = [b"session=", b"session", b"=", b";", b"; ", b" ", b"\t", b'"', b"\\", b",", b"a.b.c;", b"\x00"]
repeated = st.lists(st.sampled_from(_PIECES), min_size=1, max_size=4).map(b"".join)


def calls_made_by(work: Callable[[], object]) -> int:
    """How many functions, C functions included, `work` calls: its cost without a clock."""
    calls = 0

    def count(frame: FrameType, event: str, argument: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        work()
    finally:
        sys.setprofile(before)
    return calls


@effort(25)
@given(repeated)
def test_reading_cookies_costs_linear_work(piece: bytes) -> None:
    """Ten times the input makes at most about ten times the calls, whatever is repeated."""
    short, long = (piece * (size // len(piece)) for size in (6_000, 60_000))
    least = calls_made_by(lambda: SessionCookie(KEY).read(piece))
    assert calls_made_by(lambda: SessionCookie(KEY).read(long)) <= 11 * (
        calls_made_by(lambda: SessionCookie(KEY).read(short)) + least
    )


def read_by(reader: ClientAddress | FingerprintReader, scope: dict[str, Any]) -> str:
    """What it makes of a request."""
    return reader.of(scope, by_name(scope["headers"]))


@effort(25)
@given(repeated, st.sampled_from([b"x-forwarded-for", b"forwarded", b"user-agent", b"cookie"]))
def test_long_headers_are_read_to_the_end(piece: bytes, name: bytes) -> None:
    """64 KiB of anything come through; a pattern that tries everything again would not come back."""
    headers = [(name, piece * (MAX_COOKIE_BYTES // len(piece)))]
    scope = {"type": "http", "client": ("10.0.0.1", 1), "headers": headers}
    reader = FingerprintReader(Fingerprint(), ["10.0.0.0/8"])
    assert len(read_by(reader, scope)) == 64
    assert COOKIE.read(headers[0][1]).session_id is None


# --- the client's address ------------------------------------------------------------------------------

TRUSTED = ["10.0.0.0/8", "fd00::/8", "192.0.2.1"]
NETWORKS: list[IPv4Network | IPv6Network] = [ip_network(each) for each in TRUSTED]
PEERS = ["10.0.0.1", "::ffff:10.1.2.3", "fd00::1", "203.0.113.9", "testclient", ""]
CLIENTS = ClientAddress(TRUSTED)

addresses = st.sampled_from(
    [
        "10.0.0.2",
        "10.9.9.9",
        "fd00::2",
        "192.0.2.1",
        "203.0.113.7",
        "8.8.8.8",
        "2001:db8::1",
        "::ffff:10.0.0.3",
    ]
)
nodes = st.one_of(
    addresses,
    addresses.map("{}:80".format),
    addresses.map("[{}]".format),
    addresses.map("[{}]:8080".format),
    addresses.map("{}%eth0".format),
    st.sampled_from(["unknown", "_hidden", "", "10.0.0.2:", "1.2.3", "10.0.0.02", "[10.0.0.2]:_x", "::1:80"]),
    st.text(st.characters(max_codepoint=255), max_size=6),
)
padding = st.sampled_from(["", "", " ", "\t", "  "])
listed_headers = st.lists(
    st.builds("{}{}{}".format, padding, nodes, padding), min_size=1, max_size=5
).map(",".join)  # fmt: skip
forwarded_pairs = st.one_of(
    st.builds("{}={}".format, st.sampled_from(["for", "For", "FOR", " for", "for "]), nodes),
    st.builds('for="{}"'.format, nodes),
    st.builds(
        '{}="{}"'.format, st.sampled_from(["host", "by"]), st.sampled_from(["a,b", "a;for=8.8.8.8", ""])
    ),
    st.sampled_from(["proto=https", "for", "=", '"', "\\", 'x="', '"for=8.8.8.8"', "", 'for="a\\"b"']),
)
forwarded_headers = st.lists(
    st.lists(forwarded_pairs, min_size=1, max_size=3).map(";".join), min_size=1, max_size=5
).map(", ".join)
proxy_headers = st.lists(
    st.tuples(st.just(b"x-forwarded-for"), listed_headers)
    | st.tuples(st.just(b"forwarded"), forwarded_headers),
    max_size=3,
)


def reference_address(text: str) -> str | None:
    """The address in its usual spelling, None for what is none."""
    text = text.split("%")[0]
    try:
        parsed: IPv4Address | IPv6Address = ip_address(text)
    except ValueError:
        return None
    if isinstance(parsed, IPv6Address) and parsed.packed[:12] == bytes(10) + b"\xff\xff":
        parsed = IPv4Address(parsed.packed[12:])
    return str(parsed)


def is_trusted(address: str) -> bool:
    plain = reference_address(address)
    return plain is not None and any(ip_address(plain) in network for network in NETWORKS)


def reference_node(text: str) -> str | None:
    """The address of `address`, `address:port`, `[v6]` or `[v6]:port`."""
    host, port = text, ""
    if text.startswith("["):
        if "]" not in text:
            return None
        host, port = text[1 : text.index("]")], text[text.index("]") + 1 :]
        if ":" not in host:
            return None
        if port and not port.startswith(":"):
            return None
        port = port[1:] if port else "0"
    elif text.count(":") == 1:
        host, port = text.split(":")
    else:
        port = "0"
    digits = 1 <= len(port) <= 5 and all(letter in "0123456789" for letter in port)
    hidden = len(port) > 1 and port[0] == "_" and all(
        letter.isascii() and (letter.isalnum() or letter in "._-") for letter in port[1:]
    )  # fmt: skip
    return reference_address(host) if digits or hidden else None


def split_outside_quotes(text: str, separator: str) -> list[str]:
    parts, quoted = [""], False
    for letter in text:
        quoted ^= letter == '"'
        if letter == separator and not quoted:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def reference_element(element: str) -> str | None:
    values = []
    for pair in split_outside_quotes(element, ";"):
        name, _, value = pair.partition("=")
        if name.strip(" \t").lower() == "for":
            values.append(value.strip(" \t"))
    if len(values) != 1:
        return None
    value = values[0]
    if len(value) > 1 and value.startswith('"') and value.endswith('"'):
        value = value[1:-1]
    return reference_node(value)


def reference_hops(listed: str, forwarded: str) -> list[list[str | None]]:
    """What each header that is there lists, nearest hop first."""
    headers: list[list[str | None]] = []
    if listed:
        headers.append([reference_node(entry.strip(" \t")) for entry in reversed(listed.split(","))])
    if forwarded and ("\\" in forwarded or forwarded.count('"') % 2):
        headers.append([None])
    elif forwarded:
        elements = split_outside_quotes(forwarded, ",")
        headers.append([reference_element(element) for element in reversed(elements)])
    return headers


def reference_client(peer: str, listed: str, forwarded: str) -> str:
    """From the peer on, past each that is trusted; where the headers disagree, the peer."""
    if not is_trusted(peer):
        return peer
    answers = set()
    for hops in reference_hops(listed, forwarded):
        address = peer
        for hop in hops[:MAX_HOPS]:
            if hop is None:
                break
            address = hop
            if not is_trusted(address):
                break
        answers.add(address)
    return answers.pop() if len(answers) == 1 else peer


def joined(headers: list[tuple[bytes, str]], name: bytes) -> str:
    return ",".join(value for key, value in headers if key == name)


@effort(250)
@given(st.sampled_from(PEERS), proxy_headers)
def test_the_client_is_who_a_plain_reader_says(peer: str, headers: list[tuple[bytes, str]]) -> None:
    """`X-Forwarded-For` and `Forwarded`, one or several lines of them, quoted or broken."""
    raw = [(name, value.encode("latin-1")) for name, value in headers]
    scope: dict[str, Any] = {"type": "http", "client": (peer, 1) if peer else None, "headers": raw}
    expected = reference_client(peer, joined(headers, b"x-forwarded-for"), joined(headers, b"forwarded"))
    assert read_by(CLIENTS, scope) == expected


@effort(100)
@given(st.sampled_from(PEERS), proxy_headers)
def test_nobody_is_believed_beyond_who_is_not_trusted(peer: str, headers: list[tuple[bytes, str]]) -> None:
    """Whoever is taken for the client was named by the peer through trusted addresses only."""
    raw = [(name, value.encode("latin-1")) for name, value in headers]
    found = read_by(CLIENTS, {"type": "http", "client": (peer, 1) if peer else None, "headers": raw})
    if found == peer:
        return
    assert is_trusted(peer)
    assert found == str(parse_address(found))
    for hops in reference_hops(joined(headers, b"x-forwarded-for"), joined(headers, b"forwarded")):
        nearer = hops[: hops.index(found)]
        assert all(hop is not None and is_trusted(hop) for hop in nearer)


# --- user agents ---------------------------------------------------------------------------------------

agents = st.text(st.characters(max_codepoint=255), max_size=30) | st.lists(
    st.sampled_from(
        [
            "Mozilla",
            "/",
            "5.0",
            " ",
            "(",
            ")",
            ";",
            ",",
            "v",
            "1",
            "17_5",
            "_",
            ".",
            "x86_64",
            "rv:",
            "Win64",
            "\xe9",
        ]
    ),
    max_size=12,
).map("".join)
versions = st.lists(st.integers(0, 999), min_size=1, max_size=4).map(lambda each: ".".join(map(str, each)))
WORD = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_")


def product_version(agent: str, start: int) -> int:
    """Where what follows a slash ends, if there is a digit in it; else `start`."""
    end = start
    while end < len(agent) and agent[end] not in " \t\n\r\f\v/;(),":
        end += 1
    return end if any(letter in "0123456789" for letter in agent[start:end]) else start


def lone_number(agent: str, start: int) -> int:
    """Where a number that stands alone ends, `start` where there is none."""
    if start and agent[start - 1] in WORD:
        return start
    here = start + (agent[start] == "v")
    best = start
    while True:
        digits = here
        while digits < len(agent) and agent[digits] in "0123456789":
            digits += 1
        if digits == here:
            return best
        if digits == len(agent) or agent[digits] not in WORD:
            best = digits
        if digits == len(agent) or agent[digits] not in "._,":
            return best
        here = digits + 1


def reference_reduced(agent: str) -> str:
    """The user agent without versions, letter by letter."""
    kept, here = "", 0
    while here < len(agent):
        end = here
        if here and agent[here - 1] == "/":
            end = product_version(agent, here)
        if end == here:
            end = lone_number(agent, here)
        if end == here:
            kept += agent[here]
            end = here + 1
        here = end
    return kept


@effort(200)
@given(agents)
def test_user_agents_are_reduced_as_a_plain_reader_reduces_them(agent: str) -> None:
    """Versions go, everything else stays, nothing raises."""
    expected = hashlib.sha256(f":{reference_reduced(agent)}".encode()).hexdigest()
    assert Fingerprint(ip=False).hash("", agent) == expected


@effort(50)
@given(versions, versions, st.sampled_from(["X11; Linux x86_64", "Windows NT {}; Win64", "iPhone; OS {}"]))
def test_an_update_is_the_same_browser(before: str, after: str, platform: str) -> None:
    """Any two versions of one browser have one fingerprint; another browser or platform has another."""

    def browser(version: str, name: str = "Firefox") -> str:
        return f"Mozilla/5.0 ({platform.format(version)}; rv:{version}) Gecko/20100101 {name}/{version}"

    reduced = Fingerprint(ip=False)
    assert reduced.hash("", browser(before)) == reduced.hash("", browser(after))
    assert reduced.hash("", browser(before)) != reduced.hash("", browser(after, "Fennec"))
    if before != after:
        exact = Fingerprint(ip=False, user_agent_exact=True)
        assert exact.hash("", browser(before)) != exact.hash("", browser(after))


@pytest.mark.parametrize("prefix", [0, 1, 24, 31, 32])
@effort(15)
@given(first=st.integers(0, 2**32 - 1), second=st.integers(0, 2**32 - 1))
def test_addresses_of_one_network_are_one_client(prefix: int, first: int, second: int) -> None:
    """The bits of the prefix count and no others, in v4-mapped spelling too."""
    fingerprint = Fingerprint(user_agent=False, ipv4_prefix=prefix)
    same = first >> (32 - prefix) == second >> (32 - prefix)
    one, other = str(IPv4Address(first)), f"::ffff:{IPv4Address(second)}"
    assert (fingerprint.hash(one, "") == fingerprint.hash(other, "")) is same
