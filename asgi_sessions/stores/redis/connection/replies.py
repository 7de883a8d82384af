"""Which replies fit a call. Any other reply belongs to another call.

When the replies of a connection are out of step, callers get what others asked for. So each reply is checked
before its caller gets it: its kind, and the id, nonce or name that it has to bear.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, Union, cast

from ....errors import SessionStoreError
from ....record.codec import id_of

Reply: TypeAlias = Union[bytes, int, list["Reply"], None]  # noqa: UP007  # recursive: | needs no strings
About: TypeAlias = bytes | tuple[bytes, ...]
"""What a reply has to bear: the mark of a record (of each, for several), a nonce; or what it has to be, if it
tells of success; empty: nothing."""
Fits: TypeAlias = Callable[[Reply, Any], bool]  # each knows what its calls ask about

NOT_OURS = "Redis gave an answer that no script of ours gives"
WITHHELD = b"asgi2:"  # in the place of a record that nobody gets: it has no header, so it cannot be read
STORED = b"STORED"  # and the nonce or the name of what was done
UNHELD = b"UNHELD"  # the same, and the lock is free
MOST_KNOWN = 1024  # ids whose record is wrong, about 300 kB

_OURS = b"asgi"  # how a value of ours begins, in every version of its header
_BODY = 65  # where its record begins, in the version that is written; of others it is looked for
_TAKEN = {b"L": 3, b"A": 1, b"R": 1, b"X": 1, b"B": 2, b"W": 3, b"K": 3}
_REFUSALS = (b"GONE", b"LOST", b"CONFLICT", b"BUSY")


def bears(value: bytes, mark: bytes) -> bool:
    """Whether the record in a value begins with this mark, as all do that we write.

    (No header holds a brace.)
    """
    return value.startswith(mark, value.find(b"{"))


def mark_of(session_id: str) -> bytes:
    """How the JSON of this session's record begins; of what an id may hold JSON escapes the backslash."""
    return b'{"session_id":"%b"' % session_id.replace("\\", "\\\\").encode()


def anything(reply: Reply, about: About) -> bool:
    """For a call whose replies have no kind of their own."""
    return True


def is_just(reply: Reply, about: About) -> bool:
    """What a command without a key is always answered."""
    return reply == about


def is_number(reply: Reply, about: About) -> bool:
    """How many, or whether: 1 or 0."""
    return type(reply) is int


def is_list(reply: Reply, about: About) -> bool:
    """Several of something."""
    return type(reply) is list


def is_text(reply: Reply, about: About) -> bool:
    """A text, or that there is none."""
    return reply is None or type(reply) is bytes


def is_about(reply: Reply, about: bytes) -> bool:
    """A text that begins with this, or that there is none."""
    return reply is None or (type(reply) is bytes and reply.startswith(about))


def is_record(reply: Reply, mark: bytes) -> bool:
    """What lies at a key; a record bears this id."""
    return reply is None or (type(reply) is bytes and _is_own(reply, mark))


def are_records(reply: Reply, marks: tuple[bytes, ...]) -> bool:
    """What lies at several keys; each record bears the id of its place."""
    if type(reply) is not list or len(reply) != len(marks):
        return False
    return all(map(is_record, reply, marks))


def is_taken(reply: Reply, mark: bytes) -> bool:
    """What `acquire.lua` says; a record bears this id."""
    if type(reply) is bytes:  # nearly always
        return reply.startswith(mark, _BODY) or (reply.startswith(_OURS) and _is_own(reply, mark))
    if type(reply) is not list or not reply:
        return False
    kind, *rest = reply
    if not isinstance(kind, bytes) or _TAKEN.get(kind) != len(reply):
        return False
    return kind != b"L" or (type(rest[0]) is bytes and type(rest[1]) is int and _is_own(rest[0], mark))


def words_of(reply: Reply) -> list[bytes | int]:
    """What `acquire.lua` says in a list; `SessionStoreError` for anything else, which is not from Redis."""
    if isinstance(reply, list) and is_taken(reply, b""):
        return cast("list[bytes | int]", reply)
    raise SessionStoreError(NOT_OURS)


def is_stored(reply: Reply, success: bytes) -> bool:
    """An outcome: a refusal, or this success, which names what it acknowledges."""
    if type(reply) is not bytes:
        return False
    if reply == success or reply in _REFUSALS:
        return True
    return reply[:6] == UNHELD and reply[6:] == success[6:] if success else reply.startswith((STORED, UNHELD))


def is_removed(reply: Reply, success: bytes) -> bool:
    """The same, or that something else lies there."""
    return reply == b"X" or is_stored(reply, success)


def is_created(reply: Reply, nonce: bytes) -> bool:
    """That something lies there, or the version, which begins with this nonce."""
    if type(reply) is not list or reply[:1] not in ([b"E"], [b"C"]):
        return False
    version = reply[1:]
    if reply[0] == b"E":
        return not version
    return len(version) == 2 and type(version[0]) is bytes and version[0].startswith(nonce)


def is_bound(reply: Reply, nonce: bytes) -> bool:
    """A refusal, or the version that a record has now."""
    return reply in _REFUSALS if type(reply) is bytes else reply != [b"E"] and is_created(reply, nonce)


class WrongRecords:
    """Ids under which the record of another id lies.

    Where two connections give the same wrong record, the record is wrong and not the connection. Then the
    record is withheld and the connection stays, so that one bad record does not drop everybody's calls again
    and again. What is known of an id says nothing about its next record.
    """

    def __init__(self) -> None:
        self._seen: dict[bytes, tuple[str, int]] = {}  # by mark: its id, and which connection gave it

    def __len__(self) -> int:
        return len(self._seen)

    def withheld(self, reply: Reply, about: About, connection: int) -> Reply:
        """The reply without its wrong records; unchanged where the connection may be to blame for one.

        A connection is to blame while it is the only one that gave such a record.
        """
        parts: Sequence[Reply] = reply if isinstance(reply, list) else [reply]
        marks = [about] * len(parts) if isinstance(about, bytes) else about
        wrong = {
            at: other
            for at, (mark, part) in enumerate(zip(marks, parts, strict=False))
            if isinstance(part, bytes) and (other := _other_id(part, mark)) is not None
        }
        known = [self._is_known(marks[at], other, connection) for at, other in wrong.items()]
        if not all(known):
            return reply
        kept = [WITHHELD if at in wrong else part for at, part in enumerate(parts)]
        return kept if isinstance(reply, list) else kept[0]

    def _is_known(self, mark: bytes, other: str, connection: int) -> bool:
        seen = self._seen.pop(mark, None)
        known = seen is not None and seen[0] == other and seen[1] != connection
        self._seen[mark] = seen if seen is not None and known else (other, connection)
        if len(self._seen) > MOST_KNOWN:
            del self._seen[next(iter(self._seen))]
        return known


def _is_own(value: bytes, mark: bytes) -> bool:
    return bears(value, mark) or _other_id(value, mark) is None


def _other_id(value: bytes, mark: bytes) -> str | None:
    """The id that this record bears in the place of the one in the mark; None where it bears no other."""
    if not mark or not value.startswith(_OURS) or bears(value, mark):
        return None
    session_id = id_of(value[value.find(b"{") :])
    return None if session_id == id_of(mark + b"}") else session_id
