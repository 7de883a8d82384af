"""What becomes of a session's record and of its id; and who, by its values, is signed in. Pure."""

from __future__ import annotations

import enum
from collections.abc import Collection, Mapping
from typing import Any, TypeAlias

ROTATE_ON = ("user", "user_id", "_user_id", "username", "token")
"""Top-level values that say who is signed in; what libraries and apps use most."""

_REFRESHED = "token"  # counts when it appears only
_SAYS_WHO = ("sub", "id", "user_id", "email", "username")  # of a dict that describes a user

Who: TypeAlias = "tuple[str | None, Any]"
"""Which part of a value says who it is, None for all of it; and what it says."""


class Fate(enum.Enum):
    """What the app wants to become of the session's id; a later one includes those before it."""

    KEEP = "keep"
    ROTATE = "rotate"  # to a new id, because it is old; it leads to the new one for a while
    BOUND = "bound"  # the id stays, the record gets another end
    MOVE = "move"  # to a new id, data and remaining life kept
    SIGN_IN = "sign in"  # to a new id, data kept; a full life begins
    END = "end"


KEEP_ID = frozenset({Fate.KEEP, Fate.ROTATE, Fate.BOUND})
"""What the app may want where it does not ask for another id."""


class Change(enum.Enum):
    """What a commit has to do."""

    NOTHING = "nothing"
    CREATE = "create"  # a new record, never over another
    WRITE = "write"  # the loaded record, changed
    BOUND = "bound"  # the same, and it gets another end
    ROTATE = "rotate"  # a new id for the loaded record, which has not changed; not where others have
    MOVE = "move"  # a new record under a new id, the loaded one retired
    DELETE = "delete"


def fate_of(before: Mapping[str, Any], after: Mapping[str, Any], names: Collection[str]) -> Fate:
    """What a change of these values does to the id: an app may sign in by `session["user"] = …` (fixation).

    SIGN_IN where somebody appears under one of the `names`, or somebody else than before. MOVE where that is
    not certain: a dict changed that has no part which says who. KEEP for anything else, a sign-out included.
    """
    fate = Fate.KEEP
    for name in names:
        was, now = _who(before.get(name)), _who(after.get(name))
        if now is None or now == was or (was is not None and name == _REFRESHED):
            continue
        if was is None or now[0] is not None:
            return Fate.SIGN_IN
        fate = Fate.MOVE
    return fate


def too_late(fate: Fate) -> str:
    """Why a new id cannot be given any more, and what to do: for a `SessionClosedError`."""
    if fate in KEEP_ID or fate is Fate.END:
        return "the cookie of a new session can no longer be sent"
    return (
        "the session needs a new id (somebody signs in, or its id is renewed), whose cookie can no longer be"
        " sent: call login() or change who is signed in (`rotate_on`) before the response starts or the"
        " WebSocket is accepted"
    )


def _who(value: Any) -> Who | None:
    """None for nobody."""
    if value is None or value is False or value in ("", {}, []):
        return None
    if not isinstance(value, Mapping):
        return "", value
    for part in _SAYS_WHO:
        if value.get(part) not in (None, ""):
            return part, value[part]
    return None, value
