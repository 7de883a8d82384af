"""The signature: what verifies, and which keys are taken."""

from __future__ import annotations

import hashlib
import itertools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from itsdangerous import TimestampSigner
from starlette.datastructures import Secret

from asgi_sessions.client.cookie import SessionCookie
from asgi_sessions.client.signer import SALT, CookieSigner

KEY = "k" * 32
OLD_KEY = "o" * 32
ID = "0123456789abcdef" * 2
NOW = 1_750_000_000

session_ids = st.text("0123456789abcdef", min_size=32, max_size=32)


def clock() -> float:
    return NOW + 0.75


def token(session_id: str = ID, key: object = KEY, at: float = NOW) -> bytes:
    return CookieSigner(key, clock=lambda: at).sign(session_id).encode()


def signed_by_hand(value: bytes, salt: bytes = SALT, digest: Callable[..., Any] = hashlib.sha256) -> bytes:
    return TimestampSigner(KEY, salt=salt, key_derivation="hmac", digest_method=digest).sign(value)


@given(session_ids, st.binary(min_size=32, max_size=64), st.integers(0, 2**63))
def test_what_was_signed_verifies(session_id: str, key: bytes, now: int) -> None:
    """A signed id comes back with the second it was signed in."""
    signer = CookieSigner(key, clock=lambda: now)
    assert signer.verify(signer.sign(session_id).encode()) == (session_id, now, False)


def test_itsdangerous_reads_the_token() -> None:
    """The token is an ordinary itsdangerous one, so another service with the key can check it."""
    signer = TimestampSigner(KEY, salt=SALT, key_derivation="hmac", digest_method=hashlib.sha256)
    assert signer.unsign(token()) == ID.encode()


def test_any_changed_byte_is_refused() -> None:
    """No byte can be exchanged for any other, not even the last one, whose low bits base64 ignores."""
    signer, good = CookieSigner(KEY), token()
    assert signer.verify(good) is not None
    for position in range(len(good)):
        for byte in range(256):
            if byte != good[position]:
                changed = good[:position] + bytes([byte]) + good[position + 1 :]
                assert signer.verify(changed) is None, (position, byte)


@pytest.mark.parametrize(
    "hostile",
    [
        b"",
        b"null",
        b"..",
        ID.encode(),
        token()[:-1],
        token() + b"=",
        token() + b"\n",
        b" " + token(),
        b'"' + token() + b'"',
        token() + b"." + token(),
        token() * 1000,
        b"." * 200_000,
        signed_by_hand(b"x" * 32),
        signed_by_hand(ID.upper().encode()),
        signed_by_hand(ID[:-1].encode()),
        signed_by_hand(ID.encode(), salt=b"itsdangerous.Signer"),
        signed_by_hand(ID.encode(), digest=hashlib.sha1),
        signed_by_hand(ID.encode(), digest=hashlib.sha512),
        TimestampSigner(KEY).sign(ID),
        token(key=OLD_KEY),
    ],
    ids=itertools.count(),  # tokens have the time in them, and each worker of a run must find the same names
)
def test_what_was_not_signed_like_this_is_refused(hostile: bytes) -> None:
    """Another shape, salt, digest or key gives None, and nothing raises."""
    assert CookieSigner(KEY).verify(hostile) is None


@given(st.binary(max_size=300))
def test_verify_never_raises(hostile: bytes) -> None:
    """Arbitrary bytes are refused."""
    assert CookieSigner(KEY).verify(hostile) is None


@pytest.mark.parametrize("value", ["", ID[1:], ID.upper(), ID + "0", ID + "\n", "user;17"])
def test_only_generated_ids_are_signed(value: str) -> None:
    """An id that would not verify is refused at once, without being quoted."""
    with pytest.raises(ValueError, match="generated ids only") as caught:
        CookieSigner(KEY).sign(value)
    assert not value or value not in str(caught.value)


def test_a_fallback_key_verifies_and_is_stale() -> None:
    """After a rotation old cookies live on and say that they need a new signature."""
    signer = CookieSigner(KEY, ["x" * 32, OLD_KEY])
    old, new = signer.verify(token(key=OLD_KEY)), signer.verify(signer.sign(ID).encode())
    assert old is not None
    assert old.stale_key
    assert new is not None
    assert not new.stale_key


@pytest.mark.parametrize("key", [KEY.encode(), Secret(KEY)])
def test_a_key_may_be_bytes_or_a_secret(key: object) -> None:
    """Bytes and Starlette's Secret are the same key as the text they hold."""
    assert CookieSigner(key).verify(token()) is not None


@pytest.mark.parametrize("empty", ["", b"", None, Secret("")])
def test_an_empty_key_is_refused(empty: object) -> None:
    """An absent key, such as an unset environment variable, fails and says how to make one."""
    with pytest.raises(ValueError, match=r"secret_key is empty.*token_hex\(32\)"):
        CookieSigner(empty)
    with pytest.raises(ValueError, match=r"secret_key_fallbacks\[1\] is empty"):
        CookieSigner(KEY, [OLD_KEY, empty])


@pytest.mark.parametrize("fallbacks", [OLD_KEY, OLD_KEY.encode()])
def test_one_string_is_not_a_list_of_fallbacks(fallbacks: Any) -> None:
    """A bare string would be 32 keys of one character."""
    with pytest.raises(ValueError, match="pass a list"):
        CookieSigner(KEY, fallbacks)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: CookieSigner("short"), "secret_key has 5 bytes"),
        (lambda: CookieSigner(KEY, [OLD_KEY, "short"]), r"secret_key_fallbacks\[1\] has 5 bytes"),
        (lambda: SessionCookie("k" * 31), "secret_key has 31 bytes"),
    ],
)
def test_a_short_key_warns_where_it_was_passed(make: Callable[[], object], named: str) -> None:
    """The warning names the key, the remedy, and the line that passed it."""
    with pytest.warns(UserWarning, match=rf"{named}.*token_hex\(32\)") as caught:
        make()
    assert [warning.filename for warning in caught] == [__file__]


def test_length_counts_in_bytes() -> None:
    """A short text of wide characters is long enough."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        CookieSigner("ключ" * 4)
