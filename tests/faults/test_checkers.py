"""Each law finds a planted violation and says so, and lets pass what a correct object may show."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import pytest
from hypothesis import given
from hypothesis import strategies as st

from .checkers import (
    Fate,
    History,
    Life,
    Operation,
    Sighting,
    Stay,
    Step,
    count_flaws,
    counter,
    disordered,
    longest_silence,
    miscounted,
    misplaced,
    mistaken,
    outrun,
    overlapping,
    prolonged,
    register,
    repeated,
    revived,
    unanswered,
    unordered,
)


def told(began: float, ended: float, number: int) -> Operation:
    return Operation("increment", began, ended, answer=number)


def write(began: float, ended: float, value: str, fate: Fate = Fate.ACKNOWLEDGED) -> Operation:
    return Operation("write", began, ended, value, fate=fate)


def read(began: float, ended: float, value: str | int | None) -> Operation:
    return Operation("read", began, ended, answer=value)


def add(element: str, fate: Fate = Fate.ACKNOWLEDGED) -> Operation:
    return Operation("add", 0, 1, element, fate=fate)


IN_TURN = [told(0, 1, 1), told(2, 3, 2), told(4, 5, 3)]
IN_DOUBT = Operation("increment", 0, 9, fate=Fate.IN_DOUBT)
REFUSED = Operation("increment", 0, 9, fate=Fate.REFUSED)


# -- counters ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("history", "final"),
    [
        ([], 0),
        (IN_TURN, 3),
        ([*IN_TURN, IN_DOUBT], 3),
        ([*IN_TURN, IN_DOUBT], 4),
        ([*IN_TURN, REFUSED], 3),
        ([told(0, 5, 2), told(1, 4, 1)], 2),
        ([told(0, 1, 2), told(1, 2, 1)], 2),
    ],
    ids=["none", "in turn", "doubt, not stored", "doubt, stored", "refused", "overlapping", "touching"],
)
def test_lawful_counts(history: list[Operation], final: int) -> None:
    """Nothing is wrong with what a correct counter may show."""
    assert count_flaws(history, final) == []
    assert unordered([*history, read(10, 11, final)], counter, 0) == []


@pytest.mark.parametrize(
    ("flaws", "sentence"),
    [
        (miscounted(IN_TURN, 2), "1 of 3 acknowledged increments are not in the final count 2"),
        (
            miscounted([*IN_TURN, REFUSED], 4),
            "the final count 4 is more than the 3 acknowledged and 0 in doubt",
        ),
        (
            miscounted([*IN_TURN, IN_DOUBT], 5),
            "the final count 5 is more than the 3 acknowledged and 1 in doubt",
        ),
        (repeated([*IN_TURN, told(0, 9, 2)]), "2 was acknowledged 2 times"),
        (
            disordered([told(0, 1, 2), told(2, 3, 1)]),
            "1 was acknowledged to who began when 2 had been acknowledged",
        ),
        (
            disordered([told(0, 1, 3), told(0, 2, 1), told(2.5, 3, 2), told(2.6, 3, 4)]),
            "2 was acknowledged to who began when 3 had been acknowledged",
        ),
        (outrun([*IN_TURN, IN_DOUBT], 2), "3 is above the final 2"),
    ],
    ids=["lost", "refused, yet stored", "stored twice", "repeated", "late", "late among others", "above"],
)
def test_a_miscount_is_found(flaws: list[str], sentence: str) -> None:
    """Each law of counting finds what breaks it."""
    assert flaws == [sentence]


# -- sets ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("final", [["a", "b"], ["b", "a", "c"]])
def test_lawful_sets(final: list[str]) -> None:
    """What was acknowledged is there, what is in doubt may be."""
    history = [add("a"), add("b"), add("c", Fate.IN_DOUBT), add("d", Fate.REFUSED)]
    assert misplaced(history, final) == []


@pytest.mark.parametrize(
    ("final", "sentence"),
    [
        (["a"], "'b' was acknowledged and is not there"),
        (["a", "b", "b"], "'b' is there 2 times"),
        (["a", "b", "d"], "'d' was refused, yet it is there"),
        (["a", "b", "e"], "'e' was never added, yet it is there"),
    ],
)
def test_a_misplaced_element_is_found(final: list[str], sentence: str) -> None:
    """Lost, doubled, refused or invented."""
    assert misplaced([add("a"), add("b"), add("d", Fate.REFUSED)], final) == [sentence]


# -- any object ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "history",
    [
        [],
        [write(0, 1, "a"), read(2, 3, "a"), write(4, 5, "b"), read(6, 7, "b")],
        [write(0, 9, "a"), read(1, 2, None), read(3, 4, "a")],
        [write(0, 5, "a"), write(0, 5, "b"), read(6, 7, "a")],
        [write(0, 1, "a"), write(2, 3, "b", Fate.IN_DOUBT), read(4, 5, "a"), read(6, 7, "b")],
        [write(0, 1, "a"), write(2, 3, "b", Fate.REFUSED), read(4, 5, "a")],
        [write(0, 1, "a", Fate.IN_DOUBT), write(2, 3, "b"), read(4, 5, "b")],
    ],
    ids=["none", "in turn", "read meanwhile", "either order", "late", "refused", "in doubt, never seen"],
)
def test_lawful_registers(history: list[Operation]) -> None:
    """Some order explains every answer."""
    assert unordered(history, register, None) == []


@pytest.mark.parametrize(
    ("history", "sentence"),
    [
        (
            [write(0, 1, "a"), write(2, 3, "b"), read(4, 5, "a")],
            "no order explains the answers: after 2 of 3 come only read() = a",
        ),
        (
            [write(0, 1, "a"), read(2, 3, None)],
            "no order explains the answers: after 1 of 2 come only read() = None",
        ),
        (
            [write(0, 1, "a"), write(2, 3, "b", Fate.REFUSED), read(4, 5, "b")],
            "no order explains the answers: after 1 of 2 come only read() = b",
        ),
        (
            [write(0, 9, "a"), write(0, 9, "b"), read(1, 2, "a"), read(3, 4, "b"), read(5, 6, "a")],
            "no order explains the answers: after 4 of 5 come only read() = a",
        ),
    ],
    ids=["stale", "lost", "refused, yet seen", "back and forth"],
)
def test_an_impossible_answer_is_found(history: list[Operation], sentence: str) -> None:
    """Where no order explains the answers, the search says how far it came."""
    assert unordered(history, register, None) == [sentence]


def test_doubts_do_not_slow_the_search_down() -> None:
    """Of increments in doubt that are alike one is tried, so that hundreds of them cost next to nothing."""
    doubts = [Operation("increment", at, at + 1, fate=Fate.IN_DOUBT) for at in range(300)]
    stored = [told(at + 0.5, at + 1, 3 * at + 3) for at in range(100)]
    assert unordered([*doubts, *stored], counter, 0) != []  # two are needed each time, and one begins
    assert unordered([*doubts, *doubts, *stored], counter, 0) == []


def test_long_histories_are_searched_quickly() -> None:
    """Ten thousand operations, eight at a time; one stale answer is found at its place."""
    history = [told(at, at + 8, at + 1) for at in range(10_000)]
    assert unordered(history, counter, 0) == []
    stale = [*history, read(20_000, 20_001, 9_999)]
    assert unordered(stale, counter, 0) == [
        "no order explains the answers: after 10000 of 10001 come only read() = 9999"
    ]


# -- histories of a simulated object -------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """One operation, how long before it took effect it began, how long after it ended, and what was heard."""

    kind: str
    before: float
    after: float
    fate: Fate
    argument: str


@st.composite
def plans(draw: st.DrawFn, kinds: Sequence[str]) -> list[Plan]:
    """Operations that take effect one after the other, one each second."""
    one = st.builds(
        Plan, st.sampled_from(kinds), st.floats(0, 5), st.floats(0, 5), st.sampled_from(Fate), st.just("")
    )
    drawn = draw(st.lists(one, min_size=1, max_size=12))
    return [replace(plan, argument=f"v{at}") for at, plan in enumerate(drawn)]


def simulated(
    plans: Sequence[Plan], step: Step, state: object, dice: random.Random
) -> tuple[History, object]:
    """What clients see of one correct object, and its last state; doubts are resolved by chance."""
    history: list[Operation] = []
    for at, plan in enumerate(plans, start=1):
        answer = None
        if plan.fate is Fate.ACKNOWLEDGED or (plan.fate is Fate.IN_DOUBT and dice.random() < 0.5):
            state, answer = step(state, plan.kind, plan.argument)
        heard = answer if plan.fate is Fate.ACKNOWLEDGED else None
        history.append(
            Operation(plan.kind, at - plan.before, at + plan.after, plan.argument, heard, plan.fate)
        )
    dice.shuffle(history)
    return history, state


@given(plans(["increment", "read"]), st.randoms(use_true_random=False))
def test_a_simulated_counter_is_lawful(plans: list[Plan], dice: random.Random) -> None:
    """However its operations overlapped and whatever their clients heard."""
    history, final = simulated(plans, counter, 0, dice)
    assert isinstance(final, int)
    assert unordered([*history, read(99, 99, final)], counter, 0) == []
    assert count_flaws([each for each in history if each.kind == "increment"], final) == []


@given(plans(["write", "read"]), st.randoms(use_true_random=False))
def test_a_simulated_register_is_lawful(plans: list[Plan], dice: random.Random) -> None:
    """The search finds the order in which it happened, or another one that explains as much."""
    history, final = simulated(plans, register, None, dice)
    assert unordered([*history, Operation("read", 99, 99, answer=final)], register, None) == []


@given(plans(["add"]), st.randoms(use_true_random=False))
def test_a_simulated_set_is_lawful(plans: list[Plan], dice: random.Random) -> None:
    """It holds what was acknowledged, and of the doubts those that happened."""

    def collect(state: object, kind: str, argument: object) -> tuple[object, object]:
        assert isinstance(state, tuple)
        return (*state, argument), None

    history, final = simulated(plans, collect, (), dice)
    assert isinstance(final, tuple)
    assert misplaced(history, final) == []


Stored: TypeAlias = tuple[float, float, bool]
STORED = st.lists(st.tuples(st.floats(0, 5), st.floats(0, 5), st.booleans()), min_size=1, max_size=12)


@given(STORED, st.data())
def test_any_lost_update_is_found(stored: list[Stored], data: st.DataObject) -> None:
    """Where two read the same count and both were told the next, laws are broken: the search's too."""
    history = [told(at - before, at + after, at) for at, (before, after, _) in enumerate(stored, start=1)]
    again = data.draw(st.sampled_from(history))
    assert count_flaws([*history, again], len(stored)) != []
    assert unordered([*history, again], counter, 0) != []


@given(plans(["write"]), st.data())
def test_any_stale_read_is_found(plans: list[Plan], data: st.DataObject) -> None:
    """A value that was overwritten before the read began cannot be seen again."""
    history = [write(at, at + 0.5, plan.argument) for at, plan in enumerate(plans)]
    stale = data.draw(st.sampled_from([None, *[plan.argument for plan in plans[:-1]]]))
    assert unordered([*history, read(50, 51, stale)], register, None) != []


# -- locks, sessions, lives ----------------------------------------------------------------------------------


def test_those_who_follow_each_other_do_not_overlap() -> None:
    """To the instant."""
    assert overlapping([Stay(2, 3, "c"), Stay(0, 1, "a"), Stay(1, 2, "b")]) == []


@pytest.mark.parametrize(
    ("stays", "sentence"),
    [
        ([Stay(0, 2, "a"), Stay(1.5, 3, "b")], "b entered 0.500 s before a had left"),
        ([Stay(0, 9, "a"), Stay(1, 2, "b")], "b entered 8.000 s before a had left"),
    ],
)
def test_two_at_once_are_found(stays: list[Stay], sentence: str) -> None:
    """In part or one within the other."""
    assert overlapping(stays) == [sentence]


def test_one_who_stays_overlaps_with_all() -> None:
    """Not only with the next: it is the last to leave that counts."""
    assert len(overlapping([Stay(0, 9, "a"), Stay(1, 2, "b"), Stay(3, 4, "c")])) == 2


def test_a_strangers_session_is_found() -> None:
    """Everybody sees the own one."""
    assert mistaken([Sighting(0, "a", "a"), Sighting(1, "b", "b")]) == []
    assert mistaken([Sighting(0, "a", "a"), Sighting(1, "a", "b")]) == ["the client of a was shown b"]


def test_a_session_that_comes_back_is_found() -> None:
    """Seen by a request that began before its end was acknowledged is no fault, later is."""
    ended = {"a": 5.0}
    assert revived([Sighting(4.9, "a", "a"), Sighting(9, "b", "b")], ended) == []
    assert revived([Sighting(5.5, "a", "a")], ended) == ["a was shown 0.500 s after its end"]


def test_lawful_lives() -> None:
    """What ends when it was to end, or earlier, and what is not there any more."""
    lives = [Life(0, "a", 10), Life(4, "a", 6.0), Life(5, "a", 2), Life(8, "a", -2), Life(1, "b", 3)]
    assert prolonged(lives, 10) == []
    assert prolonged([Life(0, "lock", 1), Life(0.5, "lock", 1)], 1, renewable=True) == []


@pytest.mark.parametrize(
    ("lives", "sentence"),
    [
        ([Life(0, "a", 10), Life(1, "a", -1)], "a would live for ever"),
        ([Life(0, "a", 5), Life(3, "a", 5)], "the end of a was put off by 3.0 s"),
        ([Life(0, "a", 11)], "a would live for 11.0 s, longer than 10 s"),
    ],
)
def test_a_life_that_does_not_end_is_found(lives: list[Life], sentence: str) -> None:
    """Immortal, prolonged, or too long from the beginning."""
    assert prolonged(lives, 10) == [sentence]


def test_silence_is_found() -> None:
    """The longest time without an answer, and none at all after the healing."""
    assert longest_silence([1, 2, 5], 0, 6) == 3
    assert longest_silence([], 0, 6) == 6
    assert unanswered([1, 7], 6, 2) == []
    for answered in ([1, 9], [1], []):
        assert unanswered(answered, 6, 2) == ["no answer within 2 s after the last fault was healed"]
