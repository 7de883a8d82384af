"""Signatures and keys: what verifies, with what, and for how long."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import types
import warnings
from collections.abc import Callable
from typing import Any

import pytest
from asgi import KEY, Site, page
from itsdangerous import Signer, TimestampSigner, URLSafeTimedSerializer

from asgi_sessions import SessionMiddleware
from asgi_sessions.client.signer import SALT, CookieSigner
from security.requirements import requirement
from security.service import CHROME, Service, Visitor, login, write

pytestmark = pytest.mark.anyio

ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
OLD_KEY = KEY[::-1]


async def judged(service: Service, value: bytes | str, visitor: Visitor) -> tuple[dict[str, Any], list[str]]:
    """What a request with this cookie value sees, and which events it caused."""
    raw = value.encode("latin-1") if isinstance(value, str) else value
    service.events.clear()
    seen = await visitor.copy(token=None).sees([(b"cookie", b"session=" + raw)])
    return seen, service.told


def same_signature(token: str) -> str:
    """Another text of the same 32 bytes: the last of 43 digits has two bits that base64 ignores."""
    last = ALPHABET.index(token[-1])
    return token[:-1] + ALPHABET[last ^ 1]


RESPELLINGS: dict[str, Callable[[str], str | bytes]] = {
    "bits that base64 ignores": same_signature,
    "padding": lambda token: token + "=",
    "the other base64 alphabet": lambda token: (
        token[:33] + token[33:].replace("-", "+").replace("_", "/") + "="
    ),
    "upper case": lambda token: token[:32].upper() + token[32:],
    "upper-case signature": lambda token: token[:-43] + token[-43:].swapcase(),
    "quotes": lambda token: f'"{token}"',
    "percent encoding": lambda token: token.replace(".", "%2E"),
    "a percent-encoded digit": lambda token: f"%3{token[0]}{token[1:]}",
    "full-width digits": lambda token: token.replace(token[0], "\uff10").encode(),
    "a byte order mark": lambda token: b"\xef\xbb\xbf" + token.encode(),
    "a soft hyphen": lambda token: token[:5] + "\xad" + token[5:],
    "a no-break space before it": lambda token: "\xa0" + token,
    "a NUL after it": lambda token: token + "\x00",
    "a line break after it": lambda token: token + "\n",
    "a form feed before it": lambda token: "\x0c" + token,
    "a fourth part": lambda token: token + "." + token[-43:],
    "no time": lambda token: token[:32] + "." + token[-43:],
    "an empty time": lambda token: token[:32] + ".." + token[-43:],
    "no signature": lambda token: token[:-44],
    "an empty signature": lambda token: token[:-43],
    "half a signature": lambda token: token[:-20],
    "the id alone": lambda token: token[:32],
    "a comma": lambda token: token + ",",
    "twice": lambda token: token + token,
}


@requirement("SIG-1")
@pytest.mark.parametrize("how", RESPELLINGS)
async def test_a_signature_has_one_spelling(service: Service, how: str) -> None:
    """What differs from the cookie that was set is forged, even where it decodes to the same."""
    visitor = service.visitor()
    await visitor.begin(secret="s")
    token = visitor.token or ""
    respelt = RESPELLINGS[how](token)
    assert respelt != token
    assert await judged(service, respelt, visitor) == ({}, ["bad_signature"])
    assert await judged(service, token, visitor) == ({"secret": "s"}, [])


@requirement("SIG-1")
async def test_no_byte_of_a_cookie_can_be_another() -> None:
    """Each byte exchanged for its neighbours and for what could end or hide a value."""
    site = Site()
    browser = site.browser()
    await browser.begin(secret=1)
    token = (browser.cookie or "").encode()
    for position, byte in enumerate(token):
        for other in {byte ^ 1, byte ^ 0x20, byte ^ 0x80, 0, ord("."), ord("A"), ord("=")} - {byte}:
            changed = token[:position] + bytes([other]) + token[position + 1 :]
            await site.request(page(write), headers=[(b"cookie", b"session=" + changed)])
    assert not [call for call in site.log if call.startswith("checkout")], (
        "a changed cookie reached the store"
    )


def legacy(signer: type[Signer], session_id: str, **options: Any) -> bytes:
    return bytes(signer(KEY, **options).sign(session_id))


def none_algorithm(session_id: str) -> bytes:
    parts = [json.dumps(part).encode() for part in ({"alg": "none"}, {"session": session_id})]
    return b".".join(base64.urlsafe_b64encode(part).rstrip(b"=") for part in parts) + b"."


OTHER_ALGORITHMS: dict[str, Callable[[str], bytes]] = {
    "itsdangerous' own defaults (SHA-1)": lambda name: legacy(TimestampSigner, name),
    "SHA-1 under our salt": lambda name: legacy(
        TimestampSigner, name, salt=SALT, key_derivation="hmac", digest_method=hashlib.sha1
    ),
    "SHA-512 under our salt": lambda name: legacy(
        TimestampSigner, name, salt=SALT, key_derivation="hmac", digest_method=hashlib.sha512
    ),
    "MD5 under our salt": lambda name: legacy(
        TimestampSigner, name, salt=SALT, key_derivation="hmac", digest_method=hashlib.md5
    ),
    "another derivation of the key": lambda name: legacy(
        TimestampSigner, name, salt=SALT, key_derivation="django-concat", digest_method=hashlib.sha256
    ),
    "the key itself": lambda name: legacy(
        TimestampSigner, name, salt=SALT, key_derivation="none", digest_method=hashlib.sha256
    ),
    "another salt": lambda name: legacy(
        TimestampSigner, name, salt=b"cookie-session", key_derivation="hmac", digest_method=hashlib.sha256
    ),
    "no time": lambda name: legacy(
        Signer, name, salt=SALT, key_derivation="hmac", digest_method=hashlib.sha256
    ),
    "a signed-data cookie": lambda name: URLSafeTimedSerializer(KEY).dumps({"session": name}).encode(),
    "a token of no algorithm": none_algorithm,
    "no signature": lambda name: name.encode(),
}


@requirement("SIG-2")
@pytest.mark.parametrize("name", OTHER_ALGORITHMS)
async def test_other_algorithms_are_refused(service: Service, name: str) -> None:
    """The right key is not enough: salt, derivation and digest are part of what is expected."""
    visitor = service.visitor()
    session_id = await visitor.begin(secret="s")
    assert await judged(service, OTHER_ALGORITHMS[name](session_id), visitor) == ({}, ["bad_signature"])


@requirement("SIG-2")
async def test_the_signature_is_hmac_sha256(service: Service) -> None:
    """Computed here anew from the standard library alone."""
    visitor = service.visitor()
    await visitor.begin()
    signed, _, signature = (visitor.token or "").rpartition(".")
    derived = hmac.digest(KEY.encode(), SALT, "sha256")
    digest = hmac.digest(derived, signed.encode(), "sha256")
    assert base64.urlsafe_b64encode(digest).rstrip(b"=").decode() == signature


def impostor(verdict: bool, asked: list[tuple[int, int]]) -> types.SimpleNamespace:
    """In place of `hmac`: a comparison that always says the same."""

    def compare_digest(ours: bytes, theirs: bytes) -> bool:
        asked.append((len(ours), len(theirs)))
        return verdict

    return types.SimpleNamespace(compare_digest=compare_digest)


@requirement("SIG-3")
@pytest.mark.parametrize("verdict", [True, False])
async def test_a_signature_is_judged_by_the_constant_time_compare_alone(
    service: Service, monkeypatch: pytest.MonkeyPatch, verdict: bool
) -> None:
    """It sees the whole of both signatures, and nothing else decides."""
    visitor = service.visitor()
    session_id = await visitor.begin(secret="s")
    token = visitor.token or ""
    cookie = token[:-43] + "A" * 43 if verdict else token
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr("asgi_sessions.client.signer.hmac", impostor(verdict, asked))
    fresh = service.option()
    seen = await visitor.copy(service=fresh, token=cookie).sees()
    assert seen == ({"secret": "s"} if verdict else {})
    assert asked == [(43, 43)]
    assert await service.store.exists(session_id)


@requirement("SIG-3")
@pytest.mark.parametrize("verdict", [True, False])
async def test_a_client_is_judged_by_the_constant_time_compare_alone(
    service: Service, monkeypatch: pytest.MonkeyPatch, verdict: bool
) -> None:
    """The fingerprint in the record is a hash of what another client sends: its digits do not leak."""
    visitor = service.visitor()
    await visitor.begin(secret="s")
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr("asgi_sessions.request.unit.hmac", impostor(verdict, asked))
    client = visitor.copy(user_agent=CHROME) if verdict else visitor
    assert await client.sees() == ({"secret": "s"} if verdict else {})
    assert asked == [(64, 64)]


# -- keys ----------------------------------------------------------------------------------------------


@requirement("KEY-1")
@pytest.mark.parametrize("empty", ["", b"", None])
@pytest.mark.parametrize("where", ["secret_key", "secret_key_fallbacks"])
def test_an_empty_key_is_refused(empty: Any, where: str) -> None:
    """An unset environment variable does not become a key that everybody knows."""
    options: dict[str, Any] = {"secret_key": KEY, where: [empty] if where.endswith("s") else empty}
    with pytest.raises(ValueError, match=r"is empty.*token_hex\(32\)"):
        SessionMiddleware(page(), **options)


@requirement("KEY-1")
@pytest.mark.parametrize("where", ["secret_key", "secret_key_fallbacks"])
def test_a_short_key_is_warned_of(where: str) -> None:
    """Below the digest's 32 bytes, without the key in the warning; 32 are enough."""
    short, enough = "correcthorsebatterystaplecorrect"[:31], "correcthorsebatterystaplecorrect"
    for key, count in ((short, 1), (enough, 0)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            options: dict[str, Any] = {"secret_key": KEY, where: [key] if where.endswith("s") else key}
            SessionMiddleware(page(), **options)
        assert len(caught) == count
        assert not [warning for warning in caught if short in str(warning.message)]


@requirement("KEY-2")
async def test_an_old_key_verifies_and_is_replaced(service: Service) -> None:
    """The first answer after a rotation carries the same session under the new key."""
    old = service.option(secret_key=OLD_KEY)
    visitor = old.visitor()
    session_id = await visitor.begin(secret="s")
    before = visitor.token
    visitor.service = service.option(secret_key=KEY, secret_key_fallbacks=["x" * 32, OLD_KEY])
    assert await visitor.sees() == {"secret": "s"}
    assert visitor.token != before, "the cookie was not signed anew"
    assert visitor.session_id == session_id
    assert CookieSigner(KEY).verify((visitor.token or "").encode()) is not None
    visitor.service = service
    assert await visitor.sees() == {"secret": "s"}


@requirement("KEY-2")
async def test_a_removed_key_is_dead(service: Service) -> None:
    """Its cookies are forged ones from then on, for signed-in users too."""
    visitor = service.option(secret_key=OLD_KEY).visitor()
    await visitor.begin(secret="s")
    await visitor.open(login)
    service.events.clear()
    visitor.service = service
    assert await visitor.sees() == {}
    assert service.told == ["bad_signature"]
