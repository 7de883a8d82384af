"""The README's tables of what is tested with sessions, and what the `test` extra installs, name the same."""

from __future__ import annotations

import re
from pathlib import Path

from packaging.version import Version

ROOT = Path(__file__).parents[2]
ROW = re.compile(r"^\| ([A-Za-z-]+) (\d[\d.]*) \|", re.MULTILINE)
REQUIREMENT = re.compile(r'^    "([a-z-]+)(?:\[\w+\])?>=([\d.]+)', re.MULTILINE)


def test_each_version_of_the_tables_is_one_that_the_extra_allows() -> None:
    """Whoever raises a lower bound tells the README."""
    readme = ROOT.joinpath("README.md").read_text("utf-8")
    section = readme.partition("### Frameworks, libraries and servers\n")[2].partition("\n### ")[0]
    tested = {name.lower(): Version(version) for name, version in ROW.findall(section)}
    assert len(tested) == 18
    found = REQUIREMENT.findall(ROOT.joinpath("pyproject.toml").read_text("utf-8"))
    bounds = {name: Version(bound) for name, bound in found}
    for name, version in tested.items():
        assert name in bounds, f"the test extra does not install {name}"
        assert version >= bounds[name], f"the README says {name} {version}, the test extra {bounds[name]}"
