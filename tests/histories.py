"""What clients saw of a counter that many increment at once, and the laws that such a history must keep.

Each check is a pure function of what was recorded. It returns what is wrong as sentences, if anything.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Attempt:
    """One try to increment, as its client saw it; times in seconds of one clock.

    `number` is the count that the answer acknowledged, None where none did. `refused` says that the answer
    promised that nothing was stored; without it and without a number the client does not know.
    """

    began: float
    ended: float
    number: int | None = None
    refused: bool = False


def acknowledged(attempts: Sequence[Attempt]) -> list[tuple[int, Attempt]]:
    """The attempts that were given a number, with it."""
    return [(attempt.number, attempt) for attempt in attempts if attempt.number is not None]


def miscounted(attempts: Sequence[Attempt], final: int) -> list[str]:
    """The final count holds every acknowledged increment, no refused one, and others only if in doubt."""
    certain = len(acknowledged(attempts))
    in_doubt = sum(attempt.number is None and not attempt.refused for attempt in attempts)
    if final < certain:
        return [f"{certain - final} of {certain} acknowledged increments are not in the final count {final}"]
    if final > certain + in_doubt:
        return [f"the final count {final} is more than the {certain} acknowledged and {in_doubt} in doubt"]
    return []


def repeated(attempts: Sequence[Attempt]) -> list[str]:
    """No number is acknowledged twice."""
    times = Counter(number for number, _ in acknowledged(attempts))
    return [f"{number} was acknowledged {count} times" for number, count in times.items() if count > 1]


def disordered(attempts: Sequence[Attempt]) -> list[str]:
    """An answer that ended before another attempt began carries the smaller number."""
    by_end = sorted(acknowledged(attempts), key=lambda item: item[1].ended)
    flaws, highest, done = [], 0, 0
    for number, attempt in sorted(acknowledged(attempts), key=lambda item: item[1].began):
        while by_end[done][1].ended < attempt.began:
            highest = max(highest, by_end[done][0])
            done += 1
        if number <= highest:
            flaws.append(f"{number} was acknowledged to who began when {highest} had been acknowledged")
    return flaws


def outrun(attempts: Sequence[Attempt], final: int) -> list[str]:
    """No acknowledged number is above the final count."""
    return [f"{number} is above the final {final}" for number, _ in acknowledged(attempts) if number > final]


def flaws(attempts: Sequence[Attempt], final: int) -> list[str]:
    """Everything that is wrong with a history that began at 0 and ended at `final`."""
    return [
        *miscounted(attempts, final),
        *repeated(attempts),
        *disordered(attempts),
        *outrun(attempts, final),
    ]
