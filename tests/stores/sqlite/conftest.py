"""Databases of a test, stores on them, and processes of their own that use them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from asgi_sessions import SQLiteSessionStore

from .processes import Process


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "sessions.db"


@pytest.fixture
async def store(path: Path) -> AsyncIterator[SQLiteSessionStore]:
    store = SQLiteSessionStore(path)
    yield store
    await store.aclose()


@pytest.fixture
async def other(path: Path) -> AsyncIterator[SQLiteSessionStore]:
    """A second process, as far as the database can tell."""
    store = SQLiteSessionStore(path)
    yield store
    await store.aclose()


@pytest.fixture
def start(path: Path) -> Iterator[Callable[..., Process]]:
    """Starts a real process with a store on the database; it is killed at the end of the test."""
    with ExitStack() as started:
        yield lambda *wrapper, **options: started.enter_context(Process(path, *wrapper, **options))
