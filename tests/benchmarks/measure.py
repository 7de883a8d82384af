"""How the benchmarks measure, and how they tell what they found.

Subjects are measured in alternating rounds, so that all of them meet the same moods of the machine: each
round calls every subject once, the order is rotated from round to round, and garbage is collected before each
turn, so that nobody pays for another's. A figure is the median over the rounds. A ratio is the median of the
rounds' own ratios, never the ratio of two medians.

Importing this puts the tests' own modules (`redis_server`) on the path, and the tree that they belong to.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import importlib.util
import json
import math
import os
import platform
import statistics
import sys
import textwrap
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from redis import Redis

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(path) for path in (TESTS.parent, TESTS) if str(path) not in sys.path]

Figures: TypeAlias = Mapping[str, float]
"""What one turn of a subject gives, by the name of the figure."""

Turn: TypeAlias = Callable[[], Awaitable[Figures]]
Cell: TypeAlias = str | float | None

QUICK_ROUNDS = 2


# -- measuring -----------------------------------------------------------------------------------------------


class Stopwatch:
    """Seconds that a block took, by the wall and of this process's processor time."""

    wall = 0.0
    cpu = 0.0

    def __enter__(self) -> Stopwatch:
        self._cpu = time.process_time()
        self._wall = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.wall = time.perf_counter() - self._wall
        self.cpu = time.process_time() - self._cpu


class Samples:
    """What was measured: a figure of a subject has one value for each round, the same rounds for all."""

    def __init__(self) -> None:
        self._values: dict[tuple[str, str], list[float]] = {}

    def add(self, subject: str, figures: Figures) -> None:
        """Note what a subject's turn gave. To be called once for each subject and round."""
        for name, value in figures.items():
            self._values.setdefault((subject, name), []).append(value)

    def rounds(self, subject: str, figure: str) -> list[float]:
        """The values, in the order of the rounds. `KeyError` for what was not measured."""
        return self._values[subject, figure]

    def has(self, subject: str) -> bool:
        return any(name == subject for name, _ in self._values)

    def raw(self) -> dict[str, dict[str, list[float]]]:
        """Every round's value, by subject and figure."""
        found: dict[str, dict[str, list[float]]] = {}
        for (subject, figure), values in self._values.items():
            found.setdefault(subject, {})[figure] = values
        return found

    def median(self, subject: str, figure: str) -> float:
        return statistics.median(self.rounds(subject, figure))

    def above(self, subject: str, floor: str, figure: str) -> float:
        """The median of what `subject` has more than `floor` in the same round."""
        pairs = zip(self.rounds(subject, figure), self.rounds(floor, figure), strict=True)
        return statistics.median(mine - least for mine, least in pairs)

    def ratio(self, subject: str, peer: str, figure: str, above: str | None = None) -> float:
        """The median of `subject` in terms of `peer`, round by round; both less `above` if it is given.

        NaN where no round gives one: a peer that costs no more than `above` cannot be a measure.
        """
        base = self.rounds(above, figure) if above else [0.0] * len(self.rounds(subject, figure))
        rounds = zip(self.rounds(subject, figure), self.rounds(peer, figure), base, strict=True)
        ratios = [(mine - least) / (other - least) for mine, other, least in rounds if other > least]
        return statistics.median(ratios) if ratios else float("nan")


async def alternate(subjects: Mapping[str, Turn], rounds: int, into: Samples | None = None) -> Samples:
    """Each subject's turn in each of `rounds` rounds, after one round that only warms up."""
    samples = Samples() if into is None else into
    names = list(subjects)
    for number in range(rounds + 1):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            gc.collect()
            figures = await subjects[name]()
            if number:
                samples.add(name, figures)
    return samples


async def drive(
    action: Callable[[int], Awaitable[object]], tasks: int, seconds: float, *, polite: bool = False
) -> Figures:
    """Call `action` over and over from so many tasks, each at least once with its number; all begin at once.

    With `polite` each task lets the others go on after each call, so that they take turns even where `action`
    never waits. A call that fails ends it all: what fails is not fast. Gives `per_s`, `us` (of the wall, for
    each call of all tasks together) and `cpu_us` (of this process).
    """
    done = [0] * tasks
    ends = time.perf_counter() + seconds

    async def repeat(number: int) -> None:
        while True:
            await action(number)
            done[number] += 1
            if time.perf_counter() >= ends:
                return
            if polite:
                await asyncio.sleep(0)

    with Stopwatch() as watch:
        await asyncio.gather(*[repeat(number) for number in range(tasks)])
    calls = sum(done)
    return {"per_s": calls / watch.wall, "us": watch.wall / calls * 1e6, "cpu_us": watch.cpu / calls * 1e6}


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which this share (0 to 1) of the values lies; one of the values, not between two."""
    ordered = sorted(values)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)]


def machine(*distributions: str, **more: str) -> dict[str, str]:
    """Facts without which figures say nothing: Python, processors, load, versions of these distributions."""
    facts = {
        "Python": f"{platform.python_implementation()} {platform.python_version()}",
        "processors": f"{os.cpu_count()}, load {os.getloadavg()[0]:.1f} at the start",
    }
    for name in distributions:
        try:
            facts[name] = version(name)
        except PackageNotFoundError:
            facts[name] = "not installed"
    return {**facts, **more}


def server_of(url: str) -> str:
    """Which Redis or Valkey answers there."""
    with Redis.from_url(url) as client:
        facts = client.info("server")
    return f"{facts.get('server_name', 'redis')} {facts.get('valkey_version', facts['redis_version'])}"


class CommandCounts:
    """What a server has carried out since `reset`: calls of each command, and microseconds of its own time.

    Commands that scripts call are counted too.
    """

    def __init__(self, url: str) -> None:
        self._client = Redis.from_url(url)

    def reset(self) -> None:
        self._client.config_resetstat()

    def calls(self) -> dict[str, int]:
        return {name: int(stat["calls"]) for name, stat in self._stats()}

    def microseconds_per_call(self, command: str) -> float:
        """Of the command itself, with all that its script called; 0 where it was not called."""
        return next((float(stat["usec_per_call"]) for name, stat in self._stats() if name == command), 0.0)

    def close(self) -> None:
        self._client.close()

    def _stats(self) -> list[tuple[str, dict[str, float]]]:
        stats: dict[str, dict[str, float]] = self._client.info("commandstats")
        return [(name.removeprefix("cmdstat_"), stat) for name, stat in stats.items()]


# -- telling -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Table:
    """Rows of figures; the first column names the row. None is a figure that there is not."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    note: str = ""

    def __post_init__(self) -> None:
        wrong = [row for row in self.rows if len(row) != len(self.columns)]
        if wrong:
            raise ValueError(f"a row of {self.title!r} has not {len(self.columns)} cells: {wrong[0]}")

    def lines(self) -> list[str]:
        """Aligned: names to the left, figures to the right."""
        cells = [[*self.columns], *[[shown(cell) for cell in row] for row in self.rows]]
        widths = [max(len(row[column]) for row in cells) for column in range(len(self.columns))]
        lines = [
            "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
            for row in cells
        ]
        rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
        return [self.title, "", lines[0], rule, *lines[1:], *([self.note] if self.note else [])]


@dataclass(frozen=True)
class Target:
    """A bound that a figure was meant to keep, and whether it did."""

    name: str
    value: float
    relation: Literal["<=", ">=", "=="]
    bound: float
    unit: str = ""

    @property
    def met(self) -> bool:
        if self.relation == "<=":
            return self.value <= self.bound
        return self.value >= self.bound if self.relation == ">=" else self.value == self.bound

    def line(self) -> str:
        unit = f" {self.unit}" if self.unit else ""
        verdict = "met   " if self.met else "MISSED"
        return (
            f"{verdict}  {self.name}: {shown(self.value)}{unit} (target {self.relation} {shown(self.bound)})"
        )


@dataclass(frozen=True)
class Panel:
    """One diagram of the plot.

    With `categories` each series is a group of bars, one for each category; without them it is a line through
    (x, y) points. Logarithmic axes are for figures that differ by powers of ten.
    """

    title: str
    y_label: str
    series: Mapping[str, Sequence[float] | Sequence[tuple[float, float]]]
    x_label: str = ""
    categories: Sequence[str] = ()
    log_x: bool = False
    log_y: bool = False
    reference: tuple[str, float] | None = None  # a horizontal line and its name


@dataclass
class Report:
    """Everything that a benchmark found: printed, saved as JSON, drawn."""

    title: str
    facts: Mapping[str, str] = field(default_factory=dict)
    tables: list[Table] = field(default_factory=list)
    targets: list[Target] = field(default_factory=list)
    panels: list[Panel] = field(default_factory=list)
    raw: Mapping[str, object] = field(default_factory=dict)  # what the figures are made of, saved only

    def text(self) -> str:
        blocks = [[self.title, *[f"  {name}: {fact}" for name, fact in self.facts.items()]]]
        blocks += [table.lines() for table in self.tables]
        if self.targets:
            blocks.append(["targets", "", *[target.line() for target in self.targets]])
        return "\n\n".join("\n".join(block) for block in blocks)

    def as_json(self) -> dict[str, Any]:
        """The same for machines; a cell that is not a number there is none here either."""
        return {
            "title": self.title,
            "facts": dict(self.facts),
            "tables": [
                {"title": each.title, "columns": [*each.columns], "rows": [_plain(row) for row in each.rows]}
                for each in self.tables
            ],
            "targets": [
                {
                    "name": each.name,
                    "value": _plain([each.value])[0],
                    "relation": each.relation,
                    "bound": each.bound,
                    "unit": each.unit,
                    "met": each.met,
                }
                for each in self.targets
            ],
            **({"raw": dict(self.raw)} if self.raw else {}),
        }

    def finish(self, options: argparse.Namespace) -> None:
        """Print it, and save what the command line asks for."""
        print(self.text())
        if options.json:
            options.json.write_text(json.dumps(self.as_json(), indent=2, allow_nan=False) + "\n")
        if options.plot:
            draw(self, options.plot)


def shown(cell: Cell) -> str:
    """A figure with three or four digits that mean something."""
    if cell is None or cell != cell:
        return "-"
    if isinstance(cell, str):
        return cell
    if isinstance(cell, int) or abs(cell) >= 1000:
        return f"{cell:,.0f}"
    return f"{cell:.0f}" if abs(cell) >= 100 else f"{cell:.1f}" if abs(cell) >= 10 else f"{cell:.2f}"


def _plain(row: Sequence[Cell]) -> list[Cell]:
    return [None if cell != cell else cell for cell in row]


# -- the command line ----------------------------------------------------------------------------------------


def command_line(description: str | None, rounds: int) -> argparse.ArgumentParser:
    """What every benchmark understands; `parse` reads it."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--rounds", type=int, default=rounds, help="alternating rounds (default: %(default)s)"
    )
    parser.add_argument("--quick", action="store_true", help="a few seconds: whether it runs, not how fast")
    parser.add_argument("--json", type=Path, metavar="FILE", help="save the figures here too")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw them as a PNG (needs matplotlib)")
    return parser


def parse(parser: argparse.ArgumentParser, arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options; what cannot work is refused before anything is measured."""
    options = parser.parse_args(arguments)
    if options.quick:
        options.rounds = min(options.rounds, QUICK_ROUNDS)
    if options.rounds < 1:
        parser.error("--rounds is at least 1")
    if options.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error(
            "--plot needs matplotlib, which is not installed: pip install 'asgi-server-sessions[bench]'"
        )
    return options


# -- the plot ------------------------------------------------------------------------------------------------

# Okabe and Ito's colours, which colour-blind readers tell apart; ours is the first one.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#8C8C8C", "#000000")
MARKERS = "osD^vPX*"
STYLE = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "figure.constrained_layout.h_pad": 0.1,
    "figure.constrained_layout.w_pad": 0.12,
    "font.size": 10,
    "grid.alpha": 0.25,
}


def draw(report: Report, file: Path) -> None:
    """All panels as a PNG, at most three in a row."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    across = 2 if len(report.panels) == 4 else min(len(report.panels), 3) or 1
    down = -(-len(report.panels) // across) or 1
    with plt.style.context(STYLE):
        figure, grid = plt.subplots(
            down, across, figsize=(5.6 * across, 4.3 * down + 0.9), squeeze=False, layout="constrained"
        )
        axes = list(chain.from_iterable(grid))
        for panel, each in zip(report.panels, axes, strict=False):
            _draw_panel(panel, each)
        for unused in axes[len(report.panels) :]:
            unused.set_axis_off()
        figure.suptitle(report.title, fontsize=13, fontweight="bold")
        facts = " · ".join(f"{name} {fact}" for name, fact in report.facts.items())
        figure.supxlabel(textwrap.fill(facts, 85 * across), fontsize=7.5, color="#555555")
        figure.savefig(file, format="png", dpi=150)
        plt.close(figure)


def _draw_panel(panel: Panel, axes: Axes) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    if panel.categories:
        _draw_bars(panel, axes)
    else:
        _draw_lines(panel, axes)
    if panel.log_y:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
        axes.yaxis.set_minor_locator(NullLocator())
    if panel.reference is not None:
        name, value = panel.reference
        axes.axhline(value, color="#444444", linestyle="--", linewidth=1, label=name)
    axes.set_title(panel.title, fontsize=11)
    axes.set_xlabel(panel.x_label)
    axes.set_ylabel(panel.y_label)
    axes.spines[["top", "right"]].set_visible(False)
    if panel.log_y:
        low, high = axes.get_ylim()
        if panel.categories:
            low = 10 ** math.floor(math.log10(low))  # bars have to begin somewhere
        axes.set_ylim(low, high * (high / low) ** 0.25)  # room for the legend
    else:
        axes.set_ylim(0, axes.get_ylim()[1] * 1.18)
    if len(panel.series) > 1 or panel.reference is not None:
        axes.legend(fontsize=8, framealpha=0.9)


def _draw_lines(panel: Panel, axes: Axes) -> None:
    ticks: set[float] = set()
    for number, (name, points) in enumerate(panel.series.items()):
        pairs = [point for point in points if isinstance(point, tuple)]
        ticks.update(x for x, _ in pairs)
        axes.plot(
            [x for x, _ in pairs],
            [y for _, y in pairs],
            color=COLOURS[number % len(COLOURS)],
            marker=MARKERS[number % len(MARKERS)],
            markersize=6 if len(pairs) <= 12 else 3,
            linewidth=2.4 if number == 0 else 1.5,
            label=name,
        )
    if panel.log_x:
        axes.set_xscale("log", base=2)
    if len(ticks) <= 12:
        axes.set_xticks(sorted(ticks), [f"{tick:g}" for tick in sorted(ticks)])
    axes.minorticks_off()


def _draw_bars(panel: Panel, axes: Axes) -> None:
    width = 0.82 / max(len(panel.series), 1)
    for number, (name, heights) in enumerate(panel.series.items()):
        values = [height for height in heights if not isinstance(height, tuple)]
        left = (number - (len(panel.series) - 1) / 2) * width
        bars = axes.bar(
            [place + left for place in range(len(values))],
            values,
            width * 0.94,
            color=COLOURS[number % len(COLOURS)],
            label=name,
        )
        axes.bar_label(bars, [shown(float(value)) for value in values], fontsize=7, padding=2)
    size = 9 if len(panel.categories) < 5 else 7.5
    axes.set_xticks(range(len(panel.categories)), list(panel.categories), fontsize=size)
    axes.grid(visible=False, axis="x")
