"""Tests for your own store: inherit `StoreContract`, override its fixture `store`, run pytest.

    class TestMyStore(StoreContract):
        @pytest.fixture
        async def store(self):
            store = MyStore()
            yield store
            await store.aclose()

Each test uses its own ids, so the store may share a backend with others. The package never imports this
room. Start with `contract`; `rivals` has the tasks that use a session at the same time.
"""

from .contract import StoreContract

__all__ = ["StoreContract"]
