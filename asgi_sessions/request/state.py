"""The states of one request's unit of work, and what its client has still to learn. Pure."""

from __future__ import annotations

import enum

from ..stores.checkout import Checkout, Missing


class State(enum.Enum):
    """What the request may do with its session. A new unit of work is FRESH.

    FRESH       no record: the first commit creates one
    RETIRED     no record: the client's id was replaced, so its next request brings another cookie
    OPEN        a record that this request may change, under its lock or by its version
    OPTIMISTIC  the same, without the lock: a change that is refused discards this run of the app
    REFUSED     a commit was refused: what this request changes is not stored any more
    READ_ONLY   looked at without the lock, or found absent: only a transaction changes it
    RELEASED    the request stores nothing more: only a transaction does
    DISCARDED   the app is run once more, with another unit of work: nothing of this run counts

    event                |FRESH     |RETIRED |OPEN    |OPTIMISTIC|REFUSED |READ_ONLY|RELEASED|DISCARDED
    ---------------------|----------|--------|--------|----------|--------|---------|--------|---------
    open: found          |OPEN      |-       |-       |-         |-       |-        |-       |-
    open: absent         |FRESH     |-       |-       |-         |-       |-        |-       |-
    open: replaced id    |RETIRED   |-       |-       |-         |-       |-        |-       |-
    open: read-only      |READ_ONLY |-       |-       |-         |-       |-        |-       |-
    open: optimistic     |OPTIMISTIC|-       |-       |-         |-       |-        |-       |-
    commit: values       |OPEN      |error   |OPEN    |OPTIMISTIC|error   |error    |error   |error
    commit: sign-in      |OPEN      |OPEN    |OPEN    |OPEN      |error   |error    |error   |error
    commit: end          |FRESH     |RETIRED |FRESH   |FRESH     |REFUSED |error    |error   |error
    commit: another wrote|error     |error   |REFUSED |DISCARDED |error   |error    |error   |error
    commit: another ended|OPEN      |error   |REFUSED |DISCARDED |error   |error    |error   |error
    commit: store fails  |error     |error   |error   |error     |error   |error    |error   |error
    late commit: values  |error     |error   |OPEN    |OPTIMISTIC|error   |error    |error   |error
    late commit: sign-in |error     |error   |error   |error     |error   |error    |error   |error
    release              |RELEASED  |RELEASED|RELEASED|RELEASED  |error   |RELEASED |RELEASED|error
    transaction          |OPEN      |error   |OPEN    |OPTIMISTIC|error   |READ_ONLY|RELEASED|error
    headers leave        |FRESH     |RETIRED |OPEN    |OPTIMISTIC|REFUSED |READ_ONLY|RELEASED|DISCARDED
    roll back            |RELEASED  |RELEASED|RELEASED|RELEASED  |RELEASED|RELEASED |RELEASED|DISCARDED
    request ends         |RELEASED  |RELEASED|RELEASED|RELEASED  |RELEASED|RELEASED |RELEASED|DISCARDED

    "error": the state stays, and the caller is told why, as it is on the way to REFUSED. "-": an assertion
    fails, for a unit of work is opened once. "late": the headers have left, and no new cookie can be sent.

    Two things lie over a state, because each can lie over every state. They are values of the unit:

    A *commit* (`committing`) is under way in some task. Other tasks wait for it before they commit or
    transact. If it releases the lock, changes are refused from its beginning. Its end decides the next state.

    A *transaction* (`block`) is under way in some task. Only its own code may change the session. Over FRESH,
    RETIRED, OPEN and REFUSED it shares the request's state and lock. Over OPTIMISTIC, READ_ONLY and RELEASED
    it takes the lock and loads anew; `state` is then the block's own, and `below` the request's, which comes
    back at the block's end. If the answer ends first, `below` becomes RELEASED and the block stores its own
    changes.
    """

    FRESH = "fresh"
    RETIRED = "retired"
    OPEN = "open"
    OPTIMISTIC = "optimistic"
    REFUSED = "refused"
    READ_ONLY = "read-only"
    RELEASED = "released"
    DISCARDED = "discarded"


class News(enum.Enum):
    """What the client must learn from the answer's headers. In place of one of these: its new session id."""

    NOTHING = "nothing"
    REFRESH = "refresh"  # the cookie that it has, signed or dated anew
    REMOVE = "remove"  # its session has ended
    DROP = "drop"  # the cookie of another middleware leads nowhere
    TOLD = "told"  # the headers have left: nothing can be said any more


# bound once: looking up an Enum's member costs ten times a global on Python 3.11, and each request does it
FRESH, RETIRED, OPEN, OPTIMISTIC = State.FRESH, State.RETIRED, State.OPEN, State.OPTIMISTIC
REFUSED, READ_ONLY, RELEASED, DISCARDED = State.REFUSED, State.READ_ONLY, State.RELEASED, State.DISCARDED
FOLLOWS_RECORD = (FRESH, RETIRED, OPEN, OPTIMISTIC)  # the states that say whether there is a record
IS_OVER = (READ_ONLY, RELEASED, DISCARDED)  # the states in which the request itself changes nothing
_IS_RETIRED = Missing.RETIRED


def state_of(record: Checkout | Missing, *, optimistic: bool = False) -> State:
    """The state of a request that may change the session and has this record, or has none for this reason."""
    if isinstance(record, Checkout):
        return OPTIMISTIC if optimistic and record.token is None else OPEN
    return RETIRED if record is _IS_RETIRED else FRESH
