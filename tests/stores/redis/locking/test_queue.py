"""The queue within one process, explored: every order of all that can happen to a few who want one lock.

The machine is the package's own. The world around it is a model: Redis holds the lock for one, carries out in
their order the calls that this process has made, and may give a free lock to another process. Worlds that
differ in names only are one.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import pytest

from asgi_sessions.stores.redis.locking.queue import Action, After, Ask, Give, LetGo, LockQueue, State, Tell

TURNS = 2
OTHER = b"another process"
STRANGE = b"strange"

Queue: TypeAlias = LockQueue[int]
Move: TypeAlias = tuple[Any, ...]  # the name of a method of `World`, and its arguments
Key: TypeAlias = tuple[object, ...]  # a world, without the names in it


class Part(NamedTuple):
    """What a member does, and the token that it has."""

    does: str
    token: bytes = b""


ASKERS = {"called", "asks", "queued"}
HOLDERS = {"given", "holds", "commits", "commits, gone"}


def over(machine: type[Queue]) -> Queue:
    """A queue that has ended."""
    queue = machine(0)
    queue.leave(0, b"")
    return queue


@dataclass
class World:
    """One process, its queue, and the Redis behind it; members and tokens are numbered as they come.

    What the process lets go in Redis is let go at once: nobody waits for the answer, and who asks afterwards
    is answered afterwards.
    """

    machine: type[Queue]
    to_come: int
    turns: int = TURNS
    queue: Queue | None = None
    members: dict[int, Part] = field(default_factory=dict)
    lock: bytes | None = None  # the token that holds it, in Redis
    lapsed: bool = False  # the holder's lease has ended in Redis, unnoticed
    passed: int = 0  # how often the lock went on within the process, in a row
    closed: bool = False
    number: int = 0

    # -- what can happen --------------------------------------------------------------------------------

    def moves(self) -> Iterator[tuple[bool, Move]]:
        """Each with whether it comes by itself in the end: nobody is to need any of the others."""
        if self.to_come:
            yield False, ("comes",)
        if self.lock is None:
            yield False, ("taken_by_another",)
        else:
            yield self.lock == OTHER, ("lapses",)
        if self.queue is not None:
            yield False, ("deleted",)
            if not self.closed:
                yield False, ("closes",)
        for member, part in self.members.items():
            yield from MOVES[part.does](self, member, part.token)

    def moves_of_asker(self, member: int, token: bytes) -> Iterator[tuple[bool, Move]]:
        yield False, ("leaves", member)
        if self.members[member].does == "called":
            yield True, ("runs", member)
            return
        yield False, ("leaves", member, True)
        if self.members[member].does == "asks" or self.lock is None:
            yield True, ("answered", member)

    def moves_of_given(self, member: int, token: bytes) -> Iterator[tuple[bool, Move]]:
        yield True, ("runs", member)
        yield False, ("leaves", member)
        yield False, ("ended", token)

    def moves_of_holder(self, member: int, token: bytes) -> Iterator[tuple[bool, Move]]:
        yield True, ("releases", member)
        yield True, ("commits", member, False)
        yield False, ("commits", member, True)
        yield False, ("ended", token)

    def moves_of_committing(self, member: int, token: bytes) -> Iterator[tuple[bool, Move]]:
        yield True, ("committed", member, self.lock == token)
        yield False, ("committed", member, False)
        yield False, ("unknown", member)
        yield False, ("ended", token)
        if self.members[member].does == "commits":
            yield False, ("releases", member)
            yield False, ("commits", member, False)

    # -- what the machine says --------------------------------------------------------------------------

    def do(self, actions: Sequence[Action[int]]) -> None:
        for action in actions:
            if isinstance(action, LetGo):
                self.let_go(action.token)
                continue
            member = action.member
            assert self.members[member].does == "waits", f"{action} to one who does not wait"
            if isinstance(action, Tell):
                del self.members[member]
                continue
            first = min(number for number, part in self.members.items() if part.does == "waits")
            assert member == first, f"{action}, but {first} came first"
            self.members[member] = Part("called" if isinstance(action, Ask) else "given", action.token)
            if isinstance(action, Give):
                assert action.token == self.lock, "given a lock that is not held"
                self.passed += 1
        if self.queue is not None and self.queue.state is State.FREE:
            self.queue = None
        for member, (does, token) in self.members.items():
            if does in HOLDERS and (self.queue is None or token != self.queue.token):
                self.members[member], self.lapsed = Part("stale", token), False

    def let_go(self, token: bytes) -> None:
        taken_over = [part for part in self.members.values() if part.does in {*ASKERS, "given"}]
        assert token not in {part.token for part in taken_over}, "let go of a lock that is passed on"
        assert self.queue is None or self.queue.token != token, "let go of a lock that is held"
        if self.lock == token:
            self.lock = None

    def here(self) -> Queue:
        return over(self.machine) if self.queue is None else self.queue

    def name(self) -> int:
        self.number += 1
        return self.number

    # -- it happens: to the lock ------------------------------------------------------------------------

    def comes(self) -> None:
        self.to_come -= 1
        member = self.name()
        if self.queue is not None:
            assert self.queue.join(member, 99)
            self.members[member] = Part("waits")
        else:
            self.queue = self.machine(member, self.turns)
            self.members[member] = Part("asks")

    def runs(self, member: int) -> None:
        """It goes on with what it was given."""
        does, token = self.members[member]
        self.members[member] = Part("holds" if does == "given" else "asks", token)

    def answered(self, member: int) -> None:
        """Redis has carried out what the asker asked, or has given it the lock that it was queued for."""
        earlier = self.members[member].token
        if self.closed:
            self.leaves(member, fault=True)
        elif self.lock is None or self.lock == earlier:
            token = b"%d" % self.name()
            self.passed = self.passed + 1 if self.lock else 0
            self.lock = token
            self.members[member] = Part("holds", token)
            self.do(self.here().granted(member, token))
        else:
            self.members[member] = Part("queued")
            self.here().found_taken(member)

    def leaves(self, member: int, fault: bool = False) -> None:
        """Cancelled, timed out, told that there is nothing to lock, or met with a fault."""
        does, token = self.members.pop(member)
        if does in {"asks", "queued"} and token:
            self.let_go(token)  # who asks lets go by itself
            token = b""
        queue = self.here()
        self.do(queue.fault(member) if fault else queue.leave(member, token))
        assert not fault or self.queue is None, "who comes next meets the same fault"

    # -- it happens: from the lock ----------------------------------------------------------------------

    def releases(self, member: int) -> None:
        does, token = self.members.pop(member)
        if does == "commits":  # in one task of the request, which ends in another
            self.members[member] = Part("commits, gone", token)
        self.do(self.here().release(token))

    def commits(self, member: int, unsure: bool) -> None:
        does, token = self.members.pop(member)
        after, asks = self.here().commit_begins(token)
        if does == "commits":  # a second time, in another task
            assert after is After.KEEP
            self.members[member] = Part("commits, gone", token)
        elif after is After.HAND_OVER:
            self.members[member] = Part("commits", token)
        else:
            assert after is After.LET_GO
            self.let_go(token)
            if unsure:
                self.members[member] = Part("stale", token)
        self.do(asks)

    def committed(self, member: int, fresh: bool) -> None:
        does, token = self.members.pop(member)
        self.do(self.here().committed(token, fresh=fresh))
        given = any(part.does == "given" for part in self.members.values())
        assert not given or does == "commits", "given what a second commit may have written over"

    def unknown(self, member: int) -> None:
        does, token = self.members.pop(member)
        if does == "commits":
            self.members[member] = Part("holds", token)
        self.do(self.here().unknown(token))
        assert does != "commits" or self.members[member].does == "holds", "it cannot try again"

    def ended(self, token: bytes) -> None:
        """The heartbeat finds out, or renews no more."""
        self.do(self.here().ended(token))
        self.nobody_holds()

    def deleted(self) -> None:
        self.lapses()
        self.do(self.here().deleted())
        self.nobody_holds()

    def nobody_holds(self) -> None:
        assert not any(part.does in HOLDERS for part in self.members.values()), "it holds what has ended"

    def closes(self) -> None:
        self.closed, self.to_come = True, 0
        self.do(self.here().close())

    # -- it happens: in Redis ---------------------------------------------------------------------------

    def taken_by_another(self) -> None:
        self.lock = OTHER

    def lapses(self) -> None:
        self.lapsed |= self.lock not in (None, OTHER) and self.lock == self.here().token
        self.lock = None

    # -- what holds always ------------------------------------------------------------------------------

    def check(self) -> None:
        tokens = [part.token for part in self.members.values() if part.token]
        assert len(tokens) == len(set(tokens)), "two have one token"
        assert self.passed <= self.turns, "the lock went from hand to hand too often"
        askers = [part for part in self.members.values() if part.does in ASKERS]
        holders = [part for part in self.members.values() if part.does in HOLDERS]
        assert len(askers) + len(holders) == (self.queue is not None), "one asks, or one holds"
        assert all(part.token == self.lock or self.lapsed for part in holders), "the holder has no lock"
        waits = any(part.does == "waits" for part in self.members.values())
        assert not waits or askers or holders, "somebody waits for nobody"
        assert not (waits and self.closed), "somebody waits for what is closed"
        assert self.members or self.queue is None, "a queue is left"
        assert self.members or self.lock in (None, OTHER), "a lock is left"
        self.check_strangers()

    def check_strangers(self) -> None:
        """A token or a member that the machine does not know changes nothing, and raises nothing."""
        queue = self.here()
        before = contents(queue)
        for token in {STRANGE, *(part.token for part in self.members.values() if part.does == "stale")}:
            let_go = [LetGo(token)]
            assert queue.release(token) == queue.leave(-1, token) == queue.granted(-1, token) == let_go
            assert queue.committed(token, fresh=True) == queue.unknown(token) == let_go
            assert queue.commit_begins(token) == (After.LET_GO, ())
            assert list(queue.ended(token)) == []
        assert queue.commit_begins(b"") == (After.LET_GO, ())
        assert [*queue.fault(-1), *queue.leave(-1, b"")] == []
        queue.found_taken(-1)
        assert contents(queue) == before

    # -- names ------------------------------------------------------------------------------------------

    def copy(self) -> World:
        other = copy.copy(self)
        other.members = dict(self.members)
        if self.queue is not None:
            other.queue = copy.copy(self.queue)
            other.queue._waiting = copy.copy(self.queue._waiting)
        return other

    def key(self) -> Key:
        """The same for worlds that differ in names only."""
        queue = self.here()
        known = {self.lock: "lock", queue.token: "held", None: "none", b"": "none", OTHER: "other"}
        parts = [(part.does, known.get(part.token, "own")) for part in self.members.values()]
        roles = [self.members.get(member or 0, Part("nobody")) for member in (queue._asker, queue._successor)]
        here = sorted(queue._waiting or ())
        order = [here.index(member) for member in queue._waiting or ()]
        numbers = queue.state, queue._taken, self.to_come, self.passed, self.closed, self.lapsed
        locks = known[self.lock], known[queue.token]
        return locks, tuple(sorted(parts)), tuple(part.does for part in roles), tuple(order), numbers


def contents(queue: Queue) -> list[object]:
    return [getattr(queue, name) for name in LockQueue.__slots__ if name != "_waiting"] + list(
        queue._waiting or ()
    )


MOVES: dict[str, Callable[[World, int, bytes], Iterator[tuple[bool, Move]]]] = {
    "waits": lambda world, member, token: iter([(False, ("leaves", member))]),
    "called": World.moves_of_asker,  # it has its turn to ask, or to take over the lock with its token
    "asks": World.moves_of_asker,
    "queued": World.moves_of_asker,  # in Redis
    "given": World.moves_of_given,
    "holds": World.moves_of_holder,
    "commits": World.moves_of_committing,
    "commits, gone": World.moves_of_committing,  # what it was told is not heard any more
    "stale": lambda world, member, token: iter([(True, ("releases", member)), (False, ("leaves", member))]),
}


# --- exploring ----------------------------------------------------------------------------------------


def explore(machine: type[Queue], members: int, turns: int = TURNS) -> int:
    """Every world that can come to be, the nearest first; how many there are."""
    begin = World(machine, members, turns)
    came_from: dict[Key, tuple[Key, Move]] = {begin.key(): ((), ())}
    onward: dict[Key, list[Key]] = {}  # the moves that come by themselves, backwards
    ends, worlds = [], deque([(begin.key(), begin)])
    while worlds:
        key, world = worlds.popleft()
        if not world.members:
            ends.append(key)
        for by_itself, move in world.moves():
            after, way = world.copy(), (key, move)
            try:
                getattr(after, move[0])(*move[1:])
                found = after.key()
                if found not in came_from:
                    after.check()
            except Exception as error:
                raise AssertionError(
                    f"{type(error).__name__}: {error}, after {story(came_from, way)}"
                ) from error
            if by_itself:
                onward.setdefault(found, []).append(key)
            if found not in came_from:
                came_from[found] = way
                worlds.append((found, after))
    alive = reached(ends, onward)
    for key, way in came_from.items():
        assert key in alive, f"somebody waits for ever after {story(came_from, way)}"
    return len(came_from)


def reached(ends: Sequence[Key], backwards: dict[Key, list[Key]]) -> set[Key]:
    """From where one of these comes about."""
    found, todo = set(ends), list(ends)
    while todo:
        for key in backwards.get(todo.pop(), ()):
            if key not in found:
                found.add(key)
                todo.append(key)
    return found


def story(came_from: dict[Key, tuple[Key, Move]], way: tuple[Key, Move]) -> str:
    moves: list[str] = []
    key, move = way
    while move:
        moves.append(" ".join(str(part) for part in move))
        key, move = came_from[key]
    return ", ".join(reversed(moves))


@pytest.mark.parametrize("turns", [0, 1, 2])
def test_every_order_of_everything(turns: int, request: pytest.FixtureRequest) -> None:
    """One holder, nobody who waits for a free lock, first come, first served, and nothing left in the end."""
    members = 8 if request.config.getoption("--long") else 5
    assert explore(LockQueue, members, turns) > 900


# --- the exploration finds what is wrong --------------------------------------------------------------


class Wrong(Queue):
    """A machine with one fault."""


class RaisesAtStrangers(Wrong):
    """As the queue did before it was a machine."""

    def leave(self, member: int, token: bytes) -> Sequence[Action[int]]:
        if self.state is State.FREE and member > 0:
            raise KeyError(member)
        return super().leave(member, token)


class ForgetsTheSuccessor(Wrong):
    def _put_back(self) -> None:
        self._successor = None


class PutsTheSuccessorLast(Wrong):
    def _put_back(self) -> None:
        if self._successor is not None and self._waiting is not None:
            self._waiting[self._successor] = None
        self._successor = None


class WaitsForWhoLostItsLease(Wrong):
    def ended(self, token: bytes) -> Sequence[Ask[int]]:
        if token == self.token:
            self.token = None
        return ()


class WaitsForADeletedSession(Wrong):
    def deleted(self) -> Sequence[Ask[int]]:
        return super().deleted() if self.state is State.HANDING else ()


class ServesTheLastFirst(Wrong):
    def _next(self, token: bytes = b"") -> Sequence[Ask[int]]:
        if self._waiting:
            self._waiting.move_to_end(next(reversed(self._waiting)), last=False)
        return super()._next(token)


class KeepsOthersOut(Wrong):
    def _next(self, token: bytes = b"") -> Sequence[Ask[int]]:
        asks = super()._next(token)
        self._taken = 0
        return asks


class LetsGoDuringTheCommit(Wrong):
    def release(self, token: bytes) -> Sequence[Action[int]]:
        if token == self.token and self.state is State.HANDING:
            return [LetGo(token)]
        return super().release(token)


class HandsOverTwice(Wrong):
    def commit_begins(self, token: bytes) -> tuple[After, Sequence[Ask[int]]]:
        if token == self.token and self.state is State.HANDING:
            return After.LET_GO, ()
        return super().commit_begins(token)


class BelievesARefusedCommit(Wrong):
    def committed(self, token: bytes, *, fresh: bool) -> Sequence[Action[int]]:
        return super().committed(token, fresh=True)


class KeepsALockThatNobodyWants(Wrong):
    def _pass_on(self, token: bytes) -> Sequence[Action[int]]:
        return self._next(token)


class LosesTheLockOfWhoLeaves(Wrong):
    def leave(self, member: int, token: bytes) -> Sequence[Action[int]]:
        return super().leave(member, b"" if member == self._asker else token)


class GivesWhatMayBeWrittenOver(Wrong):
    def committed(self, token: bytes, *, fresh: bool) -> Sequence[Action[int]]:
        self.state = State.HANDING if token == self.token else self.state
        return super().committed(token, fresh=fresh)


class PassesOnWhatIsUnsure(Wrong):
    def unknown(self, token: bytes) -> Sequence[Action[int]]:
        return self.committed(token, fresh=False)


class ClosesWithoutTheSuccessor(Wrong):
    def close(self) -> Sequence[Tell[int]]:
        waiting, self._waiting = self._waiting, None
        return [Tell(member) for member in waiting or ()]


class AsksOnAfterAFault(Wrong):
    def fault(self, member: int) -> Sequence[Tell[int]]:
        super().leave(member, b"")
        return ()


@pytest.mark.parametrize("wrong", Wrong.__subclasses__(), ids=lambda each: each.__name__)
def test_the_exploration_finds_what_is_wrong(wrong: type[Queue]) -> None:
    """There is a story that shows it."""
    with pytest.raises(AssertionError, match=", after "):
        explore(wrong, 4)


# --- what the exploration leaves out ------------------------------------------------------------------


def test_who_waits_is_counted() -> None:
    """The asker counts once it has found the lock taken; a full queue refuses, and changes nothing."""
    queue: LockQueue[str] = LockQueue("asker")
    assert (queue.join("a", 1), queue.waiters) == (True, 1)
    assert (queue.join("b", 1), queue.waiters) == (False, 1)
    queue.found_taken("asker")
    assert (queue.join("b", 2), queue.join("b", 3), queue.waiters) == (False, True, 3)
    queue.granted("asker", b"t")
    assert queue.waiters == 2
    assert queue.release(b"t") == [Ask("a", b"t")]
    assert queue.waiters == 2


class Counted:
    """Somebody who notices each comparison."""

    comparisons = 0

    def __hash__(self) -> int:
        return id(self)

    def __eq__(self, other: object) -> bool:
        Counted.comparisons += 1
        return self is other


def test_a_crowd_costs_each_event_the_same() -> None:
    """Nobody is looked for among the others: leaving and being served take a few comparisons."""
    Counted.comparisons = 0
    queue = LockQueue(Counted())
    crowd = [Counted() for _ in range(2000)]
    assert all(queue.join(each, 5000) for each in crowd)
    queue.granted(queue._asker or crowd[0], b"0")
    for each in crowd[1::2]:
        assert queue.leave(each, b"") == ()
    served, token = 0, b"0"
    while queue.state is State.HELD:
        asks = [action for action in queue.release(token) if isinstance(action, Ask)]
        for ask in asks:
            served, token = served + 1, b"%d" % served
            queue.granted(ask.member, token)
    assert served == 1000
    assert Counted.comparisons < 6 * len(crowd)
