"""Tells the properties here how long to look."""

from __future__ import annotations

import pytest

import fuzz


def pytest_configure(config: pytest.Config) -> None:
    """`--long` is for the night."""
    if config.getoption("--long", default=False):
        fuzz.take_long()
