"""The table of what was injected and what came of it, for the terminal and for a file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path


@dataclass(frozen=True)
class Figures:
    """What one fault did, over all sessions.

    `lost` and `stale_accepted` are violations of the promise. `refused` are answers 409 and 503, `in_doubt`
    requests without an answer. `unavailable` is the longest time in seconds without an answer 200 to any of a
    session's clients.
    """

    fault: str
    injected: int
    acknowledged: int
    lost: int
    refused: int
    in_doubt: int
    stale_accepted: int
    unavailable: float

    def plus(self, other: Figures) -> Figures:
        """Both together, as one fault's."""
        sums = {name: getattr(self, name) + getattr(other, name) for name in _SUMMED}
        return replace(self, **sums, unavailable=max(self.unavailable, other.unavailable))


_HEADS = {
    "fault": "fault",
    "injected": "times",
    "acknowledged": "acknowledged",
    "lost": "lost",
    "refused": "refused",
    "in_doubt": "unanswered",
    "stale_accepted": "stale accepted",
    "unavailable": "longest unavailability",
}
_SUMMED = ("injected", "acknowledged", "lost", "refused", "in_doubt", "stale_accepted")
gathered: list[Figures] = []
"""Those of this run."""


def ordered(names: Sequence[str]) -> list[Figures]:
    """Those of this run, in this order of faults and others behind them, however the tests were shuffled."""
    places = {name: place for place, name in enumerate(names)}
    return sorted(gathered, key=lambda row: places.get(row.fault, len(places)))


def markdown(rows: Sequence[Figures]) -> str:
    """The table, in columns of even width."""
    table = [[_HEADS[each.name] for each in fields(Figures)]]
    for row in rows:
        cells = {**asdict(row), "unavailable": f"{row.unavailable:.1f} s"}
        table.append([f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in cells.values()])
    widths = [max(len(cell) for cell in column) for column in zip(*table, strict=True)]
    lines = [
        "| " + " | ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) + " |"
        for line in table
    ]
    rule = "|" + "|".join(["-" * (widths[0] + 2), *["-" * (width + 1) + ":" for width in widths[1:]]]) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def save(rows: Sequence[Figures], path: Path) -> None:
    """Write the table: as JSON where the name ends so, else as Markdown."""
    if path.suffix == ".json":
        path.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")
    else:
        path.write_text(markdown(rows) + "\n")
