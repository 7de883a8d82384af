"""The laws that a history must keep, whatever went wrong meanwhile.

A history is what clients saw, written down by them. Each check is a pure function of it and returns what is
wrong as sentences, if anything. Times are seconds of one clock.
"""

from __future__ import annotations

import enum
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple, TypeAlias

State: TypeAlias = object
Step: TypeAlias = Callable[[State, str, object], tuple[State, object]]
"""From a (hashable) state, the kind of an operation and its argument: the next state and the answer."""


class Fate(enum.Enum):
    """What a client may conclude from the answer to its operation."""

    ACKNOWLEDGED = "acknowledged"  # it happened, and this is its answer
    REFUSED = "refused"  # the answer promised that nothing was stored
    IN_DOUBT = "in doubt"  # it may have happened, or not


@dataclass(frozen=True, slots=True)
class Operation:
    """One thing that a client asked for, when it asked, when it heard, and what."""

    kind: str
    began: float
    ended: float
    argument: object = None
    answer: object = None
    fate: Fate = Fate.ACKNOWLEDGED


History: TypeAlias = Sequence[Operation]


def of_fate(history: Iterable[Operation], fate: Fate) -> list[Operation]:
    """The operations that ended so."""
    return [operation for operation in history if operation.fate is fate]


# -- a counter: each operation adds one, its answer is the sum -----------------------------------------------


def numbers(history: History) -> list[tuple[int, Operation]]:
    """The increments that were given a number, with it."""
    told = of_fate(history, Fate.ACKNOWLEDGED)
    return [(operation.answer, operation) for operation in told if isinstance(operation.answer, int)]


def increment(began: float, ended: float, number: int | None = None, *, refused: bool = False) -> Operation:
    """One try to add one: acknowledged with a number, refused, or in doubt."""
    fate = Fate.ACKNOWLEDGED if number is not None else Fate.REFUSED if refused else Fate.IN_DOUBT
    return Operation("increment", began, ended, answer=number, fate=fate)


def miscounted(history: History, final: int) -> list[str]:
    """The final count holds every acknowledged increment, no refused one, and others only if in doubt."""
    certain, in_doubt = len(numbers(history)), len(of_fate(history, Fate.IN_DOUBT))
    if final < certain:
        return [f"{certain - final} of {certain} acknowledged increments are not in the final count {final}"]
    if final > certain + in_doubt:
        return [f"the final count {final} is more than the {certain} acknowledged and {in_doubt} in doubt"]
    return []


def repeated(history: History) -> list[str]:
    """No number is acknowledged twice."""
    times = Counter(number for number, _ in numbers(history))
    return [f"{number} was acknowledged {count} times" for number, count in times.items() if count > 1]


def disordered(history: History) -> list[str]:
    """An answer that ended before another operation began carries the smaller number."""
    by_end = sorted(numbers(history), key=lambda item: item[1].ended)
    flaws, highest, done = [], 0, 0
    for number, operation in sorted(numbers(history), key=lambda item: item[1].began):
        while by_end[done][1].ended < operation.began:
            highest = max(highest, by_end[done][0])
            done += 1
        if number <= highest:
            flaws.append(f"{number} was acknowledged to who began when {highest} had been acknowledged")
    return flaws


def outrun(history: History, final: int) -> list[str]:
    """No acknowledged number is above the final count."""
    return [f"{number} is above the final {final}" for number, _ in numbers(history) if number > final]


def count_flaws(history: History, final: int) -> list[str]:
    """Everything that is wrong with a counter that began at 0 and ended at `final`."""
    return [*miscounted(history, final), *repeated(history), *disordered(history), *outrun(history, final)]


# -- a set: each operation adds its argument -----------------------------------------------------------------


def misplaced(history: History, final: Sequence[object]) -> list[str]:
    """Every acknowledged element is there, once; refused ones and those nobody added are not."""
    times = Counter(final)
    flaws = [f"{element!r} is there {count} times" for element, count in times.items() if count > 1]
    expected = {fate: {operation.argument for operation in of_fate(history, fate)} for fate in Fate}
    lost = sorted(expected[Fate.ACKNOWLEDGED] - times.keys(), key=repr)
    flaws += [f"{element!r} was acknowledged and is not there" for element in lost]
    possible = expected[Fate.ACKNOWLEDGED] | expected[Fate.IN_DOUBT]
    for element in sorted(times.keys() - possible, key=repr):
        why = "was refused" if element in expected[Fate.REFUSED] else "was never added"
        flaws.append(f"{element!r} {why}, yet it is there")
    return flaws


# -- any object at all: is there an order in which one after the other would have answered so? --------------


def counter(state: State, kind: str, argument: object) -> tuple[State, object]:
    """`increment` adds one and tells the sum; `read` tells it."""
    assert isinstance(state, int)
    return (state + 1, state + 1) if kind == "increment" else (state, state)


def register(state: State, kind: str, argument: object) -> tuple[State, object]:
    """`write` keeps its argument and tells nothing; `read` tells what was written last."""
    return (argument, None) if kind == "write" else (state, state)


def unordered(history: History, step: Step, initial: State) -> list[str]:
    """A sentence where no order of the operations explains the answers and keeps to the times.

    The search of Wing and Gong, with Lowe's memory of what was tried. A refused operation did not happen; one
    in doubt may have happened at any time after it began, or never.
    """
    search = _Search(history, step)
    if search.finds(initial):
        return []
    placed, stuck = search.best
    return [f"no order explains the answers: after {placed} of {search.certain} come only {stuck}"]


class _Node(NamedTuple):
    """How far a search has come: which operations are placed, and the state after them.

    Of those that are certain, in the order in which they began, all before `first` and those in `more`, a bit
    for each from there on; of each group of doubts that are alike, so many.
    """

    first: int
    more: int
    doubts: tuple[int, ...]
    state: State


class _Search:
    """Tries to put operations in an order, those in doubt only where they help."""

    def __init__(self, history: History, step: Step) -> None:
        self._certain = sorted(of_fate(history, Fate.ACKNOWLEDGED), key=lambda each: each.began)
        observed = {repr(operation.answer) for operation in self._certain}
        groups: dict[str, list[Operation]] = defaultdict(list)
        for operation in sorted(of_fate(history, Fate.IN_DOUBT), key=lambda each: each.began):
            if operation.kind != "write" or repr(operation.argument) in observed:  # else nobody could tell
                groups[f"{operation.kind} {operation.argument!r}"].append(operation)
        self._doubts = list(groups.values())
        self._step = step
        self.certain = len(self._certain)
        self.best = (-1, "")

    def finds(self, initial: State) -> bool:
        """Whether there is an order, beginning in this state."""
        seen: set[_Node] = set()
        nodes = [_Node(0, 0, (0,) * len(self._doubts), initial)]
        while nodes:
            node = nodes.pop()
            if node.first == self.certain:
                return True
            if node not in seen:
                seen.add(node)
                nodes += self._next(node)
        return False

    def _next(self, node: _Node) -> Iterator[_Node]:
        """What may come next, the likeliest last."""
        window, horizon = self._window(node)
        self._note(node, window)
        for group, used in enumerate(node.doubts):
            alike = self._doubts[group]
            if used < len(alike) and alike[used].began <= horizon:
                state, _ = self._step(node.state, alike[used].kind, alike[used].argument)
                if state != node.state:
                    counts = (*node.doubts[:group], used + 1, *node.doubts[group + 1 :])
                    yield node._replace(doubts=counts, state=state)
        for at in reversed(window):
            operation = self._certain[at]
            state, answer = self._step(node.state, operation.kind, operation.argument)
            if answer == operation.answer:
                yield self._with(node, at, state)

    def _window(self, node: _Node) -> tuple[list[int], float]:
        """Those that had begun when the first of those that are not placed yet ended, and when that was."""
        window: list[int] = []
        horizon, at = math.inf, node.first
        while at < self.certain and self._certain[at].began <= horizon:
            if not node.more >> (at - node.first) & 1:
                window.append(at)
                horizon = min(horizon, self._certain[at].ended)
            at += 1
        return window, horizon

    def _with(self, node: _Node, at: int, state: State) -> _Node:
        first, more = node.first, node.more | 1 << (at - node.first)
        while more & 1:
            first, more = first + 1, more >> 1
        return _Node(first, more, node.doubts, state)

    def _note(self, node: _Node, window: Sequence[int]) -> None:
        """Remember how far we came, for the sentence."""
        placed = node.first + node.more.bit_count()
        if placed > self.best[0]:
            stuck = [self._certain[at] for at in window]
            self.best = (
                placed,
                ", ".join([f"{each.kind}({each.argument or ''}) = {each.answer}" for each in stuck]),
            )


def _spoken(operation: Operation) -> str:
    return f"{operation.kind}({operation.argument or ''}) = {operation.answer}"


# -- a lock: who was inside when -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Stay:
    """The time that an acknowledged change spent between loading and storing."""

    entered: float
    left: float
    who: str


def overlapping(stays: Iterable[Stay]) -> list[str]:
    """No two whose changes were both accepted were inside at once."""
    flaws: list[str] = []
    last: Stay | None = None
    for stay in sorted(stays, key=lambda stay: (stay.entered, stay.left)):
        if last is not None and stay.entered < last.left:
            flaws.append(f"{stay.who} entered {last.left - stay.entered:.3f} s before {last.who} had left")
        if last is None or stay.left > last.left:
            last = stay
    return flaws


# -- a session: whose it is, when it ended, how long it lives ------------------------------------------------


@dataclass(frozen=True, slots=True)
class Sighting:
    """An answer that showed a session's content, the canary, to a client that is known by its own."""

    began: float
    expected: str
    shown: str


def mistaken(sightings: Iterable[Sighting]) -> list[str]:
    """Every answer shows the session of the client that asked."""
    return [
        f"the client of {sighting.expected} was shown {sighting.shown}"
        for sighting in sightings
        if sighting.shown != sighting.expected
    ]


def revived(sightings: Iterable[Sighting], ended: dict[str, float]) -> list[str]:
    """Who asks after the end of a session was acknowledged is not shown its content."""
    return [
        f"{sighting.shown} was shown {sighting.began - ended[sighting.shown]:.3f} s after its end"
        for sighting in sightings
        if sighting.shown in ended and sighting.began > ended[sighting.shown]
    ]


@dataclass(frozen=True, slots=True)
class Life:
    """The time to live in seconds that a key was seen to have; -1 is for ever, -2 is no key."""

    at: float
    key: str
    left: float
    took: float = 0.0  # the question: the end is so much uncertain


CLOCKS = 0.1  # seconds by which two readings of a time to live may differ, the way to the server included


def prolonged(lives: Iterable[Life], longest: float, *, renewable: bool = False) -> list[str]:
    """No key lives for ever or longer than `longest`, and none that is not `renewable` puts its end off."""
    flaws: list[str] = []
    ends: dict[str, float] = {}
    for life in sorted(lives, key=lambda life: life.at):
        if life.left == -1:
            flaws.append(f"{life.key} would live for ever")
        if life.left > longest + CLOCKS:
            flaws.append(f"{life.key} would live for {life.left:.1f} s, longer than {longest:g} s")
        if life.left < 0:
            continue
        end = life.at + life.left
        if not renewable and end > ends.get(life.key, math.inf) + CLOCKS:
            flaws.append(f"the end of {life.key} was put off by {end - ends[life.key]:.1f} s")
        ends[life.key] = min(end + life.took, ends.get(life.key, math.inf))
    return flaws


# -- liveness ------------------------------------------------------------------------------------------------


def silences(answered: Iterable[float], began: float, ended: float) -> list[tuple[float, float]]:
    """The spans of time without an answer, from `began` to `ended`."""
    times = [began, *sorted(time for time in answered if began < time < ended), ended]
    return list(pairwise(times))


def longest_silence(answered: Iterable[float], began: float, ended: float) -> float:
    """Seconds of the longest time without an answer."""
    return max(end - begin for begin, end in silences(answered, began, ended))


def unanswered(answered: Iterable[float], healed: float, bound: float) -> list[str]:
    """After everything was healed there is an answer within `bound` seconds."""
    first = min((time for time in answered if time >= healed), default=math.inf)
    if first - healed <= bound:
        return []
    return [f"no answer within {bound:g} s after the last fault was healed"]
