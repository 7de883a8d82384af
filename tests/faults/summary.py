"""At the end of a run: what was injected, and what came of it, in all processes of the run together."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from . import figures
from .blows import CAMPAIGNS
from .failovers import ROWS


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker of pytest-xdist hands its figures over."""
    output: dict[str, Any] | None = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["figures"] = [asdict(row) for row in figures.gathered]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Take them from it, unless it crashed."""
    output = getattr(node, "workeroutput", {})
    figures.gathered += [figures.Figures(**row) for row in output.get("figures", ())]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print the figures of the faults, and save them where `--figures` says."""
    if not figures.gathered:
        return
    rows = figures.ordered([*(campaign.name for campaign in CAMPAIGNS), *ROWS])
    terminalreporter.section("faults injected, and what came of them")
    terminalreporter.write_line(figures.markdown(rows))
    path = config.getoption("--figures")
    if path is not None:
        figures.save(rows, Path(path))
