"""Small projects with tests of their own, which pytest runs in another process."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run_pytest(folder: Path, files: dict[str, str], *options: str) -> str:
    """What pytest prints for these files; an `AssertionError` with it where a test fails.

    The package counts as installed, with the entry points of this tree.
    """
    for name, text in files.items():
        folder.joinpath(name).write_text(text, "utf-8")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(_installed(folder))])}
    environment.pop("PYTEST_ADDOPTS", None)
    command = [sys.executable, "-m", "pytest", "-q", "-W", "error::pytest.PytestWarning", *options]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _installed(folder: Path) -> Path:
    """A folder with what an installer notes of the package, from its own `pyproject.toml`."""
    project = ROOT.joinpath("pyproject.toml").read_text("utf-8")
    table = re.search(r"^\[project\.entry-points\.pytest11\]\n((?:.+\n)+)", project, re.MULTILINE)
    assert table is not None, "pyproject.toml names no plugin for pytest"
    site = folder / "site"
    notes = site / "asgi_server_sessions-0.dist-info"
    notes.mkdir(parents=True)
    notes.joinpath("METADATA").write_text("Metadata-Version: 2.1\nName: asgi-server-sessions\nVersion: 0\n")
    lines = [line.replace('"', "") for line in table[1].splitlines() if not line.startswith("#")]
    notes.joinpath("entry_points.txt").write_text("[pytest11]\n" + "\n".join(lines) + "\n")
    return site
