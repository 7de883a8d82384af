"""How a commit is packed, and what its reply says."""

from __future__ import annotations

from ....errors import SessionStoreError
from ...checkout import Checkout, Outcome
from ..connection.replies import NOT_OURS, Reply
from ..connection.resp import pack_args
from .header import HEADER_SIZE, head_of, pack_value
from .keys import Keys
from .scripts import COMMIT, COMMIT_AGAIN, COMMIT_UNLOCKED

UNLOCKED = (b"UNHELD", b"GONE", b"LOST")  # the lock is not ours any more
_STORED = Outcome.STORED  # bound once: looking up an Enum's member is slow on Python 3.11
_REFUSED = (Outcome.CONFLICT, Outcome.LOST, Outcome.BUSY)
_MOST = 32  # versions of unknown outcome that a checkout remembers
_OUTCOMES = {
    b"STORED": Outcome.STORED,
    b"UNHELD": Outcome.STORED,
    b"GONE": Outcome.GONE,
    b"CONFLICT": Outcome.CONFLICT,
    b"LOST": Outcome.LOST,
    b"BUSY": Outcome.BUSY,
}


def pack(
    keys: Keys, token: bytes, was: bytes, version: bytes, record: bytes, flags: bytes, unsure: str | None
) -> bytes:
    """A call of `COMMIT`, packed, or of `COMMIT_AGAIN`."""
    script = COMMIT if unsure is None else COMMIT_AGAIN
    return b"%b%b$%d\r\n%b\r\n$50\r\n%b\r\n$%d\r\nasgi2:%b\n%b\r\n%b%b" % (
        script.by_sha, keys.packed, len(token), token, head_of(was),
        HEADER_SIZE + len(record), version, record, flags,
        b"" if unsure is None else pack_args(unsure.encode()),
    )  # fmt: skip


def pack_unlocked(keys: Keys, was: bytes, version: bytes, record: bytes, unsure: str | None) -> bytes:
    """A call of `COMMIT_UNLOCKED`, packed."""
    args = pack_args(head_of(was), pack_value(version, record), (unsure or "").encode())
    return COMMIT_UNLOCKED.by_sha + keys.packed + args


def noted(checkout: Checkout, word: Reply, version: bytes, record: bytes, unsure: str | None) -> Outcome:
    """What became of a commit; `checkout` then describes what is stored, or may be."""
    outcome = outcome_of(word)
    checkout.unsure = None
    if outcome is _STORED:
        checkout.record, checkout.version = record, version.decode()
        return outcome
    told = as_far_as_known(outcome, unsure)
    if told is Outcome.UNSURE:
        checkout.unsure = unsure
    return told


def as_far_as_known(outcome: Outcome, unsure: str | None) -> Outcome:
    """A refusal may be of our own earlier commit, whose outcome is not known: it says nothing of that."""
    return Outcome.UNSURE if unsure is not None and outcome in _REFUSED else outcome


def one_more(unsure: str | None, version: bytes) -> str:
    """The versions of which it is not known whether they were stored, the latest ones."""
    if unsure is None:
        return version.decode()
    return " ".join([*unsure.split(), version.decode()][-_MOST:])


def known(checkout: Checkout) -> bytes:
    """The versions that are this checkout's own: what it loaded or stored, and what it may have stored."""
    versions = checkout.version if checkout.unsure is None else f"{checkout.version} {checkout.unsure}"
    return versions.encode()


def word_of(reply: Reply) -> Reply:
    """The outcome alone, without the name that a success bears: that it is ours was seen when it came."""
    return reply[:6] if isinstance(reply, bytes) and reply.startswith((b"STORED", b"UNHELD")) else reply


def outcome_of(reply: Reply) -> Outcome:
    """`SessionStoreError` for what no script answers."""
    word = word_of(reply)
    if isinstance(word, bytes) and word in _OUTCOMES:
        return _OUTCOMES[word]
    raise SessionStoreError(NOT_OURS)
