"""Fixtures for pytest, found by itself where asgi-server-sessions is installed.

Their names begin with `asgi_sessions_`, so that other plugins have none of the same name. pytest loads this
module in every run, also where no test has to do with sessions: it lies beside the package, and imports it
only when a fixture is used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from asgi_sessions import InMemorySessionStore
    from asgi_sessions.testing import ManualClock


@pytest.fixture
def asgi_sessions_clock() -> ManualClock:
    """A clock that stands still until the test calls `advance(seconds)`."""
    from asgi_sessions.testing import ManualClock

    return ManualClock()


@pytest.fixture
def asgi_sessions_store(asgi_sessions_clock: ManualClock) -> InMemorySessionStore:
    """A store in memory for this test alone, which goes by `asgi_sessions_clock`."""
    from asgi_sessions import InMemorySessionStore

    return InMemorySessionStore(clock=asgi_sessions_clock)


@pytest.fixture
def asgi_sessions_sign_in() -> Iterator[Callable[..., Any]]:
    """`asgi_sessions.testing.signed_in` until the test ends; gives the client."""
    from asgi_sessions.testing import signed_in

    with ExitStack() as at_the_end:
        yield lambda *given, **named: at_the_end.enter_context(signed_in(*given, **named))
