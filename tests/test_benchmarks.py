"""The benchmarks run, tell what they promise to tell, and lose nothing; how fast is no test's business."""

from __future__ import annotations

import asyncio
import functools
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest

BENCHMARKS = Path(__file__).parent / "benchmarks"
PEERS = [name for name in ("starsessions", "litestar", "starlette") if importlib.util.find_spec(name)]
SCRIPTS = {
    "overhead": ["--peers", ",".join(PEERS), "--requests", "0"],
    "floor": [],
    "contention": [],
    "sqlite": [],
    "which_lock": [],
}
KINDS = ("read", "write")
PATIENCE = 120  # seconds, on however slow a machine


# -- the benchmarks themselves -----------------------------------------------------------------------------


class Run(NamedTuple):
    """What a benchmark printed, and what it saved."""

    name: str
    text: str
    saved: dict[str, Any]

    def table(self, title: str) -> dict[str, list[Any]]:
        """The rows of the one table whose title begins so, by their names."""
        found = [table for table in self.saved["tables"] if table["title"].startswith(title)]
        assert len(found) == 1, f"{len(found)} tables of {self.name} begin with {title!r}"
        return {row[0]: row[1:] for row in found[0]["rows"]}

    def broken_laws(self) -> list[str]:
        """What was to be none, or one and the same, and is not."""
        return [
            f"{target['name']}: {target['value']} instead of {target['bound']}"
            for target in self.saved["targets"]
            if target["relation"] == "==" and not target["met"]
        ]


def call(script: str, *arguments: str, without: str = "") -> subprocess.CompletedProcess[str]:
    """Run a script as a user does, its warnings being errors; `without` a module that is not to be found."""
    command = [str(BENCHMARKS / f"{script}.py"), *arguments]
    if without:
        hiding = f"import runpy, sys; sys.modules[{without!r}] = None; sys.argv = {command!r}; "
        command = ["-c", f"{hiding}runpy.run_path(sys.argv[0], run_name='__main__')"]
    return subprocess.run(
        [sys.executable, "-W", "error", *command],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        env={**os.environ, "PYTHONPATH": str(BENCHMARKS)},
        check=False,
    )


@functools.cache
def run(name: str) -> Run:
    """The benchmark, run once for all tests."""
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "figures.json"
        done = call(name, *SCRIPTS[name], "--quick", "--json", str(file))
        assert done.returncode == 0, f"{name}.py --quick failed: {done.stderr}"
        return Run(name, done.stdout, json.loads(file.read_text("utf-8")))


@pytest.mark.parametrize("name", SCRIPTS)
def test_figures_are_printed_and_saved(name: str) -> None:
    """The same tables are printed and saved, with a figure in every row and the facts to judge them by."""
    told = run(name)
    assert {"title", "facts", "tables", "targets"} == set(told.saved) - {"raw"}
    server = set() if name == "which_lock" else {"redis", "server"}
    assert {"Python", "processors"} | server <= set(told.saved["facts"])
    for table in told.saved["tables"]:
        assert table["title"] in told.text, f"{table['title']} is saved, not printed"
        for row in table["rows"]:
            assert row[0] in told.text, f"{row[0]} is saved, not printed"
            assert any(isinstance(cell, int | float) for cell in row), f"no figure in {row}"


@pytest.mark.parametrize("name", SCRIPTS)
def test_each_target_has_a_verdict(name: str) -> None:
    """A target is printed as met or missed, as its figure says."""
    told = run(name)
    assert told.saved["targets"], f"{name} has no target"
    for target in told.saved["targets"]:
        verdict = "met   " if target["met"] else "MISSED"
        assert f"{verdict}  {target['name']}: " in told.text, f"{target['name']} is not told as {verdict}"


def test_contention_loses_nothing() -> None:
    """Nobody fails, no update is lost, nobody holds together with another, no stale commit is stored."""
    told = run("contention")
    laws = {target["name"] for target in told.saved["targets"] if target["relation"] == "=="}
    assert laws == {
        "held 0 ms, failures",
        "held 0 ms, lost updates",
        "held 0 ms, two at once",
        "held 5 ms, failures",
        "held 5 ms, lost updates",
        "held 5 ms, two at once",
        "stale commits stored",
        "lost updates among the dead",
    }
    assert told.broken_laws() == []


def test_sqlite_loses_nothing() -> None:
    """What was acknowledged is counted, by one process and by two; each place has its figures."""
    told = run("sqlite")
    assert told.broken_laws() == []
    rates = told.table("cycles a second")
    assert list(rates) == ["1 at once", "8 at once", "64 at once", "two processes, 64 each"]
    assert all(rate > 0 for rate in rates["64 at once"])
    assert told.table("synced transactions per cycle")["1 at once"] == [pytest.approx(1, abs=0.1)]
    hands = told.table("two processes and one session")
    assert all(0 < share <= 1 for share in hands["fairness"])


def test_contention_compares_three_ways() -> None:
    """Ours, redis-py's Lock and three tries are measured at both times of holding."""
    told = run("contention")
    for held in ("0 ms", "5 ms"):
        rows = told.table(f"everybody wants one session and holds it for {held}")
        assert list(rows) == ["ours", "redis-py's Lock", "three tries"]
        total, failures, lost, *_ = rows["ours"]
        assert (failures, lost) == (0, 0)
        assert total > 0


def test_which_lock_tries_every_mode() -> None:
    """Only without a lock is anything refused."""
    rows = run("which_lock").table("milliseconds, in memory")
    assert len(rows) == 8
    for locked, auto, _, recipes in rows.values():
        assert all(isinstance(figure, float) for figure in (locked, auto, recipes)), rows
    assert rows["10 writes by GET at once"][2].endswith("9 x 409")


def test_floor_measures_every_way() -> None:
    """Five ways, each with its throughput, its work and its latency; both scripts have a time."""
    told = run("floor")
    ways = {
        "floor: raw protocol",
        "ours: store",
        "ours: middleware",
        "redis-py: Lock GET SET",
        "redis-py: GET SET, no lock",
    }
    for title in (
        "cycles per second",
        "µs per cycle",
        "µs of the client's processor",
        "latency of one cycle",
    ):
        figures = told.table(title)
        assert set(figures) == ways
        missing = [way for way, cells in figures.items() if not all(cell > 0 for cell in cells)]
        assert not missing, f"{title}: no figure for {missing}"
    scripts = told.table("scripts on the server")
    assert scripts["acquire"][0] > 0
    assert scripts["commit"][0] > 0


def test_overhead_measures_every_row() -> None:
    """Ours, the floor and each peer that is installed, read and write, with a content-length and without."""
    told = run("overhead")
    in_memory = {"starlette": "Starlette", "starsessions": "starsessions", "litestar": "Litestar"}
    on_redis = {"starsessions": "starsessions", "litestar": "Litestar"}
    subjects = {
        "in memory, clients: 1": {"ours, dict", "ours, typed", "ours, encrypted", "floor"}
        | _named(in_memory),
        "on Redis, clients: 1": {"ours"} | _named(on_redis),
        "on Redis, clients: 64": {"ours"} | _named(on_redis),
    }
    for title, names in subjects.items():
        for length in ("content-length", "no content-length"):
            rows = told.table(f"{title}, {length}")
            named = {f"{name}, {kind}" for name in {*names, "bare app", "ours, auto"} for kind in KINDS}
            assert set(rows) == {*named, "ours, read_only, read"}
            assert all(cells[0] is not None for cells in rows.values()), f"{title}: no µs in {rows}"


def _named(peers: dict[str, str]) -> set[str]:
    return {name for package, name in peers.items() if package in PEERS}


def test_overhead_shows_what_is_wanted() -> None:
    """A bound stands beside the ratio that it is for, and beside no other."""
    bounds = {
        name: cells[2] for name, cells in run("overhead").table("in memory, clients: 1, content").items()
    }
    assert {name: bound for name, bound in bounds.items() if bound is not None} == {
        "ours, dict, read": "<= 0.95",
        "ours, dict, write": "<= 0.55",
        "ours, typed, read": "<= 1.6",
        "ours, typed, write": "<= 1.25",
    }


def test_overhead_saves_every_round() -> None:
    """The raw figures are those of which the tables have the medians."""
    raw = run("overhead").saved["raw"]
    assert raw["instructions"] == {}
    for case, figures in raw["rounds"].items():
        assert set(figures) == {"us", "cpu_us", "per_s"}, case
        assert all(len(values) == 2 for values in figures.values()), case


@pytest.mark.parametrize(
    ("script", "arguments", "without", "sentence"),
    [
        ("overhead", ["--peers", "starlette,litestar"], "litestar", "not installed: litestar. pip install"),
        (
            "overhead",
            ["--peers", "django"],
            "",
            "--peers knows starlette, starsessions, litestar; not django",
        ),
        ("floor", ["--plot", "floor.png"], "matplotlib", "--plot needs matplotlib, which is not installed"),
        ("contention", ["--rounds", "0"], "", "--rounds is at least 1"),
    ],
    ids=["peer not installed", "peer unknown", "no matplotlib", "no round"],
)
def test_what_cannot_work_is_refused(script: str, arguments: list[str], without: str, sentence: str) -> None:
    """Before anything is measured, in a sentence that names the remedy."""
    refused = call(script, *arguments, without=without)
    assert refused.returncode == 2, refused.stderr
    assert sentence in " ".join(refused.stderr.split())


# -- how they measure --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measure() -> ModuleType:
    """The module that all of them share."""
    spec = importlib.util.spec_from_file_location("measure_under_test", BENCHMARKS / "measure.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    path = [*sys.path]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, spec.name, module)  # dataclasses look their module up
        spec.loader.exec_module(module)
        sys.path[:] = path
    return module


def samples(measure: ModuleType, **rounds: list[float]) -> Any:
    found = measure.Samples()
    for subject, values in rounds.items():
        for value in values:
            found.add(subject, {"us": value})
    return found


def test_rounds_alternate_and_rotate(measure: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each subject has one turn in each round, another begins each, and the first round does not count."""
    monkeypatch.setattr(measure.gc, "collect", lambda: None)  # half a second among so many tests
    order: list[str] = []

    def turn(name: str) -> Callable[[], Awaitable[dict[str, float]]]:
        async def one() -> dict[str, float]:
            order.append(name)
            return {"us": float(len(order))}

        return one

    measured = asyncio.run(measure.alternate({name: turn(name) for name in "abc"}, 3))
    assert "".join(order) == "abc" + "bca" + "cab" + "abc"
    assert measured.rounds("a", "us") == [6, 8, 10]


@pytest.mark.parametrize(
    ("rounds", "above", "ratio"),
    [
        ({"ours": [1, 2, 3], "peer": [2, 4, 6]}, None, 0.5),
        ({"ours": [1, 100, 3], "peer": [2, 200, 6]}, None, 0.5),
        ({"ours": [3, 5, 9], "peer": [5, 9, 13], "bare": [1, 1, 5]}, "bare", 0.5),
        ({"ours": [3, 5, 9], "peer": [1, 9, 13], "bare": [1, 1, 5]}, "bare", 0.5),
        ({"ours": [3], "peer": [1], "bare": [1]}, "bare", None),
    ],
    ids=["plain", "a mood of the machine", "over the bare app", "a round without a measure", "none at all"],
)
def test_ratio_is_the_median_of_the_rounds(
    measure: ModuleType, rounds: dict[str, list[float]], above: str | None, ratio: float | None
) -> None:
    """Round by round, so that what slows a whole round does not count; none is told as such."""
    found = samples(measure, **rounds).ratio("ours", "peer", "us", above)
    assert (None if found != found else found) == ratio


def test_drive_counts_what_was_done(measure: ModuleType) -> None:
    """Every task calls at least once, and the figures are of all calls together."""
    calls: list[int] = []

    async def action(number: int) -> None:
        calls.append(number)

    figures = asyncio.run(measure.drive(action, 3, 0.001, polite=True))
    assert set(calls) == {0, 1, 2}
    assert figures["us"] * figures["per_s"] == pytest.approx(1e6)


def test_drive_ends_with_a_failure(measure: ModuleType) -> None:
    """What fails is not fast: it is no figure at all."""

    async def action(number: int) -> None:
        raise RuntimeError("refused")

    with pytest.raises(RuntimeError, match="refused"):
        asyncio.run(measure.drive(action, 2, 5))


@pytest.mark.parametrize(
    ("share", "value"), [(0.0, 1), (0.5, 3), (0.99, 5), (1.0, 5)], ids=["least", "median", "p99", "most"]
)
def test_percentile(measure: ModuleType, share: float, value: float) -> None:
    """One of the values, whatever their order."""
    assert measure.percentile([5, 3, 1, 2, 4], share) == value


@pytest.mark.parametrize(
    ("value", "relation", "bound", "met"),
    [
        (1.0, "<=", 1.0, True),
        (1.1, "<=", 1.0, False),
        (1.0, ">=", 1.0, True),
        (0.9, ">=", 1.0, False),
        (0.0, "==", 0.0, True),
        (1.0, "==", 0.0, False),
        (float("nan"), "<=", 1.0, False),
    ],
)
def test_target(measure: ModuleType, value: float, relation: str, bound: float, met: bool) -> None:
    """Met on the bound itself, and missed where there is no figure."""
    assert measure.Target("of a figure", value, relation, bound).met is met


def test_table_is_aligned(measure: ModuleType) -> None:
    """Names to the left, figures to the right, each with the digits that mean something."""
    rows = [["ours", 12.345, None], ["a peer", 1234567.8, float("nan")]]
    assert measure.Table("costs", ["", "µs", "ratio"], rows, "a note").lines() == [
        "costs",
        "",
        "               µs  ratio",
        "------------------------",
        "ours         12.3      -",
        "a peer  1,234,568      -",
        "a note",
    ]


def test_ragged_table_is_refused(measure: ModuleType) -> None:
    """A row that lacks a figure would shift all others under wrong heads."""
    with pytest.raises(ValueError, match="a row of 'costs' has not 3 cells"):
        measure.Table("costs", ["", "µs", "ratio"], [["ours", 1.0]])


def test_saved_figures_are_json(measure: ModuleType) -> None:
    """A figure that there is not is null: NaN is no JSON."""
    report = measure.Report(
        "all",
        {},
        [measure.Table("t", ["", "x"], [["a", float("nan")]])],
        [measure.Target("b", float("nan"), "<=", 1)],
    )
    saved = json.loads(json.dumps(report.as_json(), allow_nan=False))
    assert saved["tables"][0]["rows"] == [["a", None]]
    assert (saved["targets"][0]["value"], saved["targets"][0]["met"]) == (None, False)


@pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None,
    reason="matplotlib draws the plots: pip install 'asgi-server-sessions[bench]'",
)
def test_plot_is_a_png(measure: ModuleType, tmp_path: Path) -> None:
    """Lines and bars, with logarithmic axes and without, are drawn into a file; no display is needed."""
    lines = {"ours": [(1.0, 100.0), (64.0, 4000.0)], "a peer": [(1.0, 50.0), (64.0, 300.0)]}
    bars = {"p50": [0.3, 70.0], "p99": [2.0, 150.0]}
    panels = [
        measure.Panel("lines", "per second", lines, "at once", log_x=log, log_y=log) for log in (True, False)
    ]
    panels += [
        measure.Panel("bars", "ms", bars, categories=["ours", "a peer"], log_y=log, reference=("ideal", 10.0))
        for log in (True, False)
    ]
    file = tmp_path / "plot.png"
    measure.draw(measure.Report("all", {"Python": "any"}, panels=panels), file)
    assert file.read_bytes().startswith(b"\x89PNG\r\n")
