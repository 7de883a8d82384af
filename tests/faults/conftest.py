"""At the end of a run: what was injected, and what came of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from . import figures
from .blows import CAMPAIGNS
from .failovers import ROWS


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
