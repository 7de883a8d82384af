"""The table of faults: as people read it, and as programs do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from . import figures
from .figures import Figures

ROWS = [Figures("killed", 3, 1200, 0, 2, 1, 0, 1.25), Figures("frozen", 10, 7, 0, 0, 0, 0, 0.0)]


def test_the_table_is_markdown(tmp_path: Path) -> None:
    """One line for each fault, in columns that are even in a terminal too."""
    figures.save(ROWS, tmp_path / "figures.md")
    head, rule, *lines = (tmp_path / "figures.md").read_text().splitlines()
    assert head.split() == [
        "|", "fault", "|", "times", "|", "acknowledged", "|", "lost", "|", "refused", "|", "unanswered", "|",
        "stale", "accepted", "|", "longest", "unavailability", "|",
    ]  # fmt: skip
    assert [line.replace(" ", "") for line in lines] == [
        "|killed|3|1,200|0|2|1|0|1.2s|",
        "|frozen|10|7|0|0|0|0|0.0s|",
    ]
    assert len({len(line) for line in (head, rule, *lines)}) == 1


def test_the_table_is_json(tmp_path: Path) -> None:
    """The same, by the names of the fields."""
    figures.save(ROWS, tmp_path / "figures.json")
    assert [Figures(**row) for row in json.loads((tmp_path / "figures.json").read_text())] == ROWS


def test_rounds_add_up() -> None:
    """Counts are summed; of the times without an answer the longest counts."""
    assert ROWS[0].plus(ROWS[1]) == Figures("killed", 13, 1207, 0, 2, 1, 0, 1.25)


def test_rows_come_in_the_order_of_the_faults(monkeypatch: pytest.MonkeyPatch) -> None:
    """However the tests were shuffled; what is not named comes last."""
    soak = Figures("soak", 1, 1, 0, 0, 0, 0, 0.0)
    monkeypatch.setattr(figures, "gathered", [soak, ROWS[1], ROWS[0]])
    assert figures.ordered(["killed", "frozen"]) == [*ROWS, soak]
