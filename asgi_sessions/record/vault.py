"""Encryption at rest: what a store keeps of a record is readable only with a key.

An encrypted record has the layout of any other, so that every store keeps it and finds it like any other. Its
first line names the user by a keyed hash, and its times and counts stay readable. In the place of the
metadata stands a text: the whole record, encrypted. A process without the keys cannot read such a record.
"""

from __future__ import annotations

import hmac
import os
from base64 import b64decode, b64encode
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from pydantic_core import to_json

from ..keys import MAKE_A_KEY, derived
from .lines import WHEN, items_of, parsed, split

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

KEY_BYTES = 32  # AES-256
MOST_NOTED = 1024  # ciphers, and first and third lines

_METADATA = b'"metadata":"'
_FORMAT = b"asgi-sessions-encrypted/1 "
_NONCE = 12  # bytes (NIST SP 800-38D section 8.2)
_COUNTS = ("message_count", "escalated")


class _Key(NamedTuple):
    """What is derived from one key of the app."""

    name: bytes  # which tells keys apart, and says nothing about them
    records: bytes
    users: bytes

    def __repr__(self) -> str:
        return "_Key()"


class NoKeyError(ValueError):
    """A record is encrypted under a key that is not here, or was tampered with, or moved to another id."""


class Vault:
    """Encrypts records with the first key, reads those of all, and those that are not encrypted.

    AES-256-GCM under a key that is derived for each session (so that random nonces never run out), with the
    session's id as associated data: a record that is copied to another id does not read. Each key is 32
    bytes, or their 64 hexadecimal digits. `ImportError` where `cryptography` is missing.
    """

    def __init__(self, keys: Sequence[str | bytes]) -> None:
        try:
            from cryptography.exceptions import InvalidTag
            from cryptography.hazmat.primitives.ciphers.aead import AESGCM
        except ImportError as error:
            raise ImportError("encryption_keys: pip install 'asgi-server-sessions[encryption]'") from error
        self._cipher, self._invalid = AESGCM, InvalidTag
        self._keys = {key.name: key for key in (_derive(each) for each in keys)}
        self._first = next(iter(self._keys.values()))
        self._cipher_of = lru_cache(maxsize=MOST_NOTED)(self._make_cipher)
        self._readable = lru_cache(maxsize=MOST_NOTED)(self._make_readable)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vault) and list(self._keys.values()) == list(other._keys.values())

    __hash__ = object.__hash__

    def seal(self, session_id: str, record: bytes) -> bytes:
        """The record as it is to be stored under this id."""
        nonce, plain_id = os.urandom(_NONCE), session_id.encode()
        sealed = self._cipher_of(self._first, plain_id).encrypt(nonce, record, plain_id)
        text = b"%b%b %b" % (_FORMAT, self._first.name, b64encode(nonce + sealed))
        who, counts, when = self._facts(session_id, record)
        return b'%b\n%b\n%b\n%b%b"}' % (who, when, counts, _METADATA, text)

    def open(self, session_id: str, stored: bytes) -> bytes:
        """The record that was stored; one that is not encrypted is given back. `NoKeyError`."""
        text = _sealed(stored)
        if text is None:
            return stored
        name, _, body = text.partition(b" ")
        key = self._keys.get(name)
        if key is None:
            raise NoKeyError("the record is encrypted under a key that is not among encryption_keys")
        plain_id = session_id.encode()
        try:
            raw = b64decode(body, validate=True)
            return self._cipher_of(key, plain_id).decrypt(raw[:_NONCE], raw[_NONCE:], plain_id)
        except (ValueError, self._invalid) as error:
            raise NoKeyError("the encrypted record was changed, or belongs to another session") from error

    def is_current(self, stored: bytes) -> bool:
        """Whether a record is encrypted with the first key."""
        text = _sealed(stored)
        return text is not None and text.partition(b" ")[0] == self._first.name

    def name_of(self, user_id: str) -> str:
        """How stores know this user."""
        return _name(self._first, user_id)

    def names_of(self, user_id: str) -> list[str]:
        """How stores may know this user: by each of the keys, or as it is from before there were any."""
        return [*(_name(key, user_id) for key in self._keys.values()), user_id]

    def _make_cipher(self, key: _Key, session_id: bytes) -> AESGCM:
        return self._cipher(derived(key.records, session_id))

    def _facts(self, session_id: str, record: bytes) -> tuple[bytes, bytes, bytes]:
        """The first three lines, readable: times and counts, by which stores find and count records."""
        parts = split(record)
        if parts is not None:
            return (*self._readable(session_id, parts.who, parts.fields), parts.when)
        found = parsed(record)
        when = _line({name: found.get(name) for name in WHEN})[1:]
        return self._who(session_id, found), _counts(found), when

    def _make_readable(self, session_id: str, who: bytes, fields: bytes) -> tuple[bytes, bytes]:
        return self._who(session_id, items_of(who)), _counts(items_of(fields))

    def _who(self, session_id: str, found: dict[str, object]) -> bytes:
        user, created = found.get("user_id"), found.get("created_at")
        name = self.name_of(user) if isinstance(user, str) else None
        return _line({"session_id": session_id, "user_id": name, "created_at": created, "fingerprint": None})


def _counts(found: dict[str, object]) -> bytes:
    counts = {name: found[name] for name in _COUNTS if name in found}
    return _line(counts)[1:] if counts else b'"message_count":0,'


def _line(items: dict[str, object]) -> bytes:
    return to_json(items)[:-1] + b","


def _name(key: _Key, user_id: str) -> str:
    return "u1-" + hmac.digest(key.users, user_id.encode("utf-8", "surrogatepass"), "sha256").hex()


def is_sealed(stored: bytes) -> bool:
    """Whether a record is encrypted."""
    return _sealed(stored) is not None


def _sealed(stored: bytes) -> bytes | None:
    """The key's name and the encrypted record, as text; None where a record is not encrypted."""
    last = stored[stored.rfind(b"\n") + 1 :]
    start = _METADATA + _FORMAT
    return last[len(start) : -2] if last.startswith(start) and last.endswith(b'"}') else None


def _derive(key: str | bytes) -> _Key:
    raw = _raw(key)
    if len(raw) != KEY_BYTES:
        raise ValueError(
            f"each of encryption_keys is {KEY_BYTES} bytes, or their {2 * KEY_BYTES} hexadecimal digits;"
            f" {MAKE_A_KEY}"
        )
    name = derived(raw, b"asgi_sessions: name of an encryption key")[:4].hex()
    records = derived(raw, b"asgi_sessions: records")
    return _Key(name.encode(), records, derived(raw, b"asgi_sessions: users of encrypted records"))


def _raw(key: object) -> bytes:
    if isinstance(key, bytes) and len(key) == KEY_BYTES:
        return key
    text = key.decode("ascii", "replace") if isinstance(key, bytes) else str(key)
    try:
        return bytes.fromhex(text)
    except ValueError:
        return b""
