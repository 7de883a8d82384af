"""The check of what outlives a fail-over can fail: each flaw is found, and a lawful history has none."""

from __future__ import annotations

import pytest
from faults.checkers import Operation, increment
from visitors import failover_flaws

DIED = 10.0
BEFORE = [increment(1, 2, 1), increment(3, 4, 2), increment(5, 6, 3)]
"""Acknowledged by the primary that died; the first two had been copied."""


def _flaws(after: list[Operation], final: int) -> list[str]:
    return failover_flaws([*BEFORE, *after], final, copied=2, died=DIED)


@pytest.mark.parametrize(
    ("after", "final"),
    [
        ([], 3),
        ([], 2),
        ([increment(11, 12, 4)], 4),
        ([increment(11, 12, 3)], 3),
        ([increment(9, 12, None), increment(11, 13, 5)], 5),
        ([increment(9, 12, None), increment(11, 13, 3)], 3),
    ],
    ids=[
        "all was copied",
        "the last was not",
        "on from there",
        "told again",
        "in doubt, stored",
        "in doubt, not",
    ],
)
def test_a_lawful_fail_over(after: list[Operation], final: int) -> None:
    """What was acknowledged but not copied may be there or not."""
    assert _flaws(after, final) == []


@pytest.mark.parametrize(
    ("after", "final", "flaw"),
    [
        ([], 1, "the final count 1 lacks some of 2 copied"),
        ([increment(11, 12, 2)], 3, "2 was acknowledged again, though 2 had been copied"),
        ([increment(11, 12, 4), increment(13, 14, 4)], 4, "4 was acknowledged 2 times"),
        ([increment(11, 12, 4), increment(13, 14, 3)], 4, "3 was acknowledged to who began when 4"),
        ([increment(11, 12, 4)], 3, "4 was acknowledged, the final count is 3"),
        ([increment(11, 12, 3), increment(11, 12, 4)], 3, "lacks some of 2 copied and 2 later ones"),
        ([increment(11, 12, None, refused=True)], 4, "4 is more than 3 acknowledged and 0 in doubt"),
    ],
)
def test_a_planted_flaw_is_found(after: list[Operation], final: int, flaw: str) -> None:
    """Each law is broken by one history, and said so."""
    assert flaw in "; ".join(_flaws(after, final))
