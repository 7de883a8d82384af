"""What tests are made of: for those who write an app, and for those who write a store.

An app: `session_cookie` and `signed_in` make sessions, `session_of` looks at one, `end_session` ends one.
`store_down`, `lock_lost` and `ended_meanwhile` are the faults that an app has to live with, and `ManualClock`
is moved by hand. Nothing has to be installed; with pytest there are fixtures (`pytest_asgi_sessions`).

A store: inherit `StoreContract`, override its fixture `store`, run pytest.

    class TestMyStore(StoreContract):
        @pytest.fixture
        async def store(self):
            store = MyStore()
            yield store
            await store.aclose()

Each test uses its own ids, so the store may share a backend with others. The package never imports this
room. For apps start with `sessions`; `finding` looks for the middleware in an app, `clients` knows the test
clients. For stores start with `contract`; `rivals` has the tasks that use a session at the same time.
"""

from typing import TYPE_CHECKING

from .clock import ManualClock
from .faults import ended_meanwhile, lock_lost, store_down
from .sessions import end_session, session_cookie, session_of
from .signing_in import SignedIn, signed_in

__all__ = [
    "ManualClock",
    "SignedIn",
    "StoreContract",
    "end_session",
    "ended_meanwhile",
    "lock_lost",
    "session_cookie",
    "session_of",
    "signed_in",
    "store_down",
]

if TYPE_CHECKING:
    from .contract import StoreContract


def __getattr__(name: str) -> object:
    if name == "StoreContract":  # it is made of pytest's tests, and the rest does without pytest
        from importlib import import_module

        return import_module(".contract", __name__).StoreContract
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
