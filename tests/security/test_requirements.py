"""The table of requirements and the tests belong together."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from security import requirements
from security.requirements import REQUIREMENTS, carriers, requirement


def test_each_requirement_has_a_test_and_each_test_a_requirement() -> None:
    """A line without a test promises nothing; a test without a line promises nobody."""
    tested = set(carriers())
    assert {line.id for line in REQUIREMENTS} - tested == set(), "requirements without a test"
    assert tested - {line.id for line in REQUIREMENTS} == set(), "tests of requirements that are not there"


def test_each_line_is_complete() -> None:
    """An id of its own, a source, and one sentence."""
    ids = [line.id for line in REQUIREMENTS]
    assert len(set(ids)) == len(ids)
    for line in REQUIREMENTS:
        assert re.fullmatch(r"[A-Z]+-\d+", line.id)
        assert line.source
        assert re.fullmatch(r"[A-Z`].*\.", line.text), f"{line.id} is not a sentence"


@pytest.mark.parametrize("ids", [(), ("ID-0",), ("ID-1", "id-2")])
def test_a_test_cannot_name_what_is_not_there(ids: tuple[str, ...]) -> None:
    """A misspelt id fails when the test is read, not never."""
    with pytest.raises(ValueError, match="the table of requirements has no"):
        requirement(*ids)


def test_the_table_can_be_printed() -> None:
    """As markdown, a line for each requirement."""
    command = [sys.executable, requirements.__file__]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    rows = [row.split(" | ")[0].strip("| ") for row in printed.splitlines()]
    assert rows == ["id", "---|---|---|---", *(line.id for line in REQUIREMENTS)]
