"""The queue of one session within one process: a state machine, events in, actions out."""

from __future__ import annotations

import enum
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeAlias, TypeVar

TURNS = 8  # from hand to hand within the process, before other processes have their turn

M = TypeVar("M", bound=Hashable)


class State(enum.Enum):
    """Of the lock, as this process knows it; see `LockQueue`."""

    FREE = "free"
    ASKING = "asking"
    QUEUED = "queued"
    HELD = "held"
    HANDING = "handing"
    LEAVING = "leaving"


class After(enum.Enum):
    """What becomes of the lock after a commit that is to give it up."""

    LET_GO = "let go"  # by the commit itself, in Redis
    HAND_OVER = "hand over"  # it stays in this process, for the successor
    KEEP = "keep"  # it stays: another commit, which is under way, hands it over


@dataclass(frozen=True, slots=True)
class Ask(Generic[M]):
    """This member asks Redis for the lock; with a token it takes over the one that is held under it."""

    member: M
    token: bytes = b""


@dataclass(frozen=True, slots=True)
class Give(Generic[M]):
    """This member has the lock, and with it what was stored."""

    member: M
    token: bytes


@dataclass(frozen=True, slots=True)
class Tell(Generic[M]):
    """This member waits no more, because it would wait in vain."""

    member: M


@dataclass(frozen=True, slots=True)
class LetGo:
    """The lock with this token is let go in Redis, if it is still held under it."""

    token: bytes


Action: TypeAlias = Ask[M] | Give[M] | Tell[M] | LetGo
_NOTHING = ()
# Bound once: looking up an Enum's member is slow on Python 3.11.
_FREE, _ASKING, _QUEUED, _HELD, _HANDING, _LEAVING = State
_LET_GO, _HAND_OVER, _KEEP = After


class LockQueue(Generic[M]):
    """The requests of one process that want one session, in order of arrival.

    One member, the asker, speaks with Redis, or one member holds the lock; the others wait. A member is
    whatever names a request. The first request makes the queue. A queue that is FREE has ended and is not
    used again.

    state                 event                    actions -> next state
    --------------------  -----------------------  ----------------------------------------------------------
    ASKING a              found taken              -> QUEUED a: it waits like those behind it, and counts
    ASKING a, QUEUED a    granted t                -> HELD t
                          a leaves                 NEXT
                          a leaves with t          NEXT takes t over; nobody waits: LetGo t -> FREE
                          a meets a fault          Tell all who wait -> FREE
    HELD t                release t, leave with t  somebody waits, and turns are left: NEXT takes t over
                                                   else LetGo t, NEXT
                          commit begins t          likewise: the first one is successor s -> HANDING t s
                                                   else the commit lets t go, NEXT
                          t ended, deleted         NEXT
    HANDING t s           committed t, fresh       Give s t -> HELD t
                          committed t, else        s is first again; NEXT takes t over; nobody: LetGo t
                          unknown t                s is first again -> HELD t
                          t ended, deleted         s is first again; NEXT
                          s leaves                 -> HANDING t, without a successor
                          release or commit t      -> LEAVING t s: the holder has gone, or stored anew
    LEAVING t s           committed, unknown t     s is first again; NEXT takes t over; nobody: LetGo t
                          else                     as in HANDING
    any                   join                     waits; `limit` wait already: refused
                          somebody else leaves     waits no more
                          close                    Tell all who wait
                          another token            LetGo it, but where it has ended: nothing
                          leave of a stranger      LetGo what it has

    NEXT: the first who waits asks -> QUEUED; nobody waits -> FREE. Each time that the lock passes within the
    process takes one of the turns; they begin anew when it is let go.
    """

    __slots__ = ("_asker", "_successor", "_taken", "_waiting", "state", "token", "turns")

    def __init__(self, first: M, turns: int = TURNS) -> None:
        self.state = _ASKING
        self.turns = turns
        self._taken = 0  # of the turns
        self._asker: M | None = first
        self.token: bytes | None = None  # of the lock that is held
        self._successor: M | None = None  # gets the lock when the commit that is under way is stored
        self._waiting: OrderedDict[M, None] | None = None  # made when somebody waits: hardly ever

    @property
    def waiters(self) -> int:
        """How many wait; the asker does as well once it has found the lock taken."""
        return len(self._waiting or ()) + (self.state is _QUEUED)

    @property
    def successor(self) -> M | None:
        """Gets the lock when the commit that is under way is stored."""
        return self._successor

    @property
    def asks(self) -> bool:
        """Whether one of this process waits in Redis."""
        return self.state is _QUEUED

    # -- to the lock --------------------------------------------------------------------------------------

    def join(self, member: M, limit: int) -> bool:
        """Wait; False where so many do already."""
        if self.waiters >= limit:
            return False
        if self._waiting is None:
            self._waiting = OrderedDict()
        self._waiting[member] = None
        return True

    def found_taken(self, member: M) -> None:
        """Others hold the lock: the asker queues in Redis."""
        if self._asker == member:
            self.state = _QUEUED

    def granted(self, member: M, token: bytes) -> Sequence[LetGo]:
        """The asker has the lock."""
        if self._asker != member:
            return [LetGo(token)]
        self._asker, self.token, self.state = None, token, _HELD
        return _NOTHING

    def fault(self, member: M) -> Sequence[Tell[M]]:
        """The asker met a fault. All who wait are told, because the next asker would meet it too."""
        if self._asker != member:
            return _NOTHING
        told = self.close()
        self._next()
        return told

    def leave(self, member: M, token: bytes) -> Sequence[Action[M]]:
        """Somebody gives up; `token` is of the lock that it was given and has not taken up, else empty."""
        if self._waiting and member in self._waiting:
            del self._waiting[member]
        elif self._successor == member:
            self._successor = None
        elif self._asker == member:
            return self._pass_on(token)
        elif token:
            return self.release(token)
        return _NOTHING

    # -- from the lock ------------------------------------------------------------------------------------

    def release(self, token: bytes) -> Sequence[Action[M]]:
        """The holder is done, without a commit or after one that kept the lock."""
        if token != self.token:
            return [LetGo(token)]
        if self.state is not _HELD:
            self.state = _LEAVING
            return _NOTHING
        if not self._waiting:  # nearly always
            self.token, self.state = None, _FREE
            return [LetGo(token)]
        if self._taken < self.turns:
            return self._next(token)
        return [LetGo(token), *self._next()]

    def commit_begins(self, token: bytes) -> tuple[After, Sequence[Ask[M]]]:
        """The holder stores what it has, and is done with that.

        The successor is chosen before the commit is sent, because a request that comes later must not be
        given a record that is older than itself.
        """
        if token != self.token:
            return _LET_GO, _NOTHING
        if self.state is not _HELD:
            self.state = _LEAVING
            return _KEEP, _NOTHING
        if not self._waiting:  # nearly always
            self.token, self.state = None, _FREE
            return _LET_GO, _NOTHING
        if self._taken < self.turns:
            self._successor, _ = self._waiting.popitem(last=False)
            self.state = _HANDING
            return _HAND_OVER, _NOTHING
        return _LET_GO, self._next()

    def committed(self, token: bytes, *, fresh: bool) -> Sequence[Action[M]]:
        """The outcome of the commit is known. `fresh`: it is stored, and the lease is young."""
        if token != self.token:
            return [LetGo(token)]
        successor = self._successor
        if not fresh or successor is None or self.state is _LEAVING:
            self._put_back()
            return self._pass_on(token)
        self._successor, self.state = None, _HELD
        self._taken += 1
        return [Give(successor, token)]

    def unknown(self, token: bytes) -> Sequence[Action[M]]:
        """The outcome of the commit is not known. The holder may try again, unless it has gone."""
        if token != self.token or self.state is _LEAVING:
            return self.committed(token, fresh=False)
        self._put_back()
        self.state = _HELD
        return _NOTHING

    def ended(self, token: bytes) -> Sequence[Ask[M]]:
        """The lock is not ours any more, or is being let go by a call that is on its way."""
        return self.deleted() if token == self.token else _NOTHING

    def deleted(self) -> Sequence[Ask[M]]:
        """The record is being deleted by a call that is on its way. Nobody need wait for the holder."""
        if self.token is None:
            return _NOTHING
        self._put_back()
        return self._next()

    def close(self) -> Sequence[Tell[M]]:
        """Nobody is to wait any more; the asker and the holder come to their own end."""
        self._put_back()
        waiting, self._waiting = self._waiting, None
        return [Tell(member) for member in waiting or ()]

    # -- inside -------------------------------------------------------------------------------------------

    def _put_back(self) -> None:
        """The successor is the first of those who wait again."""
        if self._successor is not None and self._waiting is not None:
            self._waiting[self._successor] = None
            self._waiting.move_to_end(self._successor, last=False)
        self._successor = None

    def _pass_on(self, token: bytes) -> Sequence[Action[M]]:
        """The next one takes this lock over, where there is a lock and somebody who waits."""
        if token and not self._waiting:
            return [LetGo(token), *self._next()]
        return self._next(token)

    def _next(self, token: bytes = b"") -> Sequence[Ask[M]]:
        """The first who waits asks, anew or to take over the lock with this token."""
        self.token = self._asker = None
        self._taken = self._taken + 1 if token else 0
        if not self._waiting:
            self.state = _FREE
            return _NOTHING
        self._asker, _ = self._waiting.popitem(last=False)
        self.state = _QUEUED
        return [Ask(self._asker, token)]
