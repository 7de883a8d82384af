"""For the tests of your own store: inherit `StoreContract`, override its fixture `store`, run pytest.

    class TestMyStore(StoreContract):
        @pytest.fixture
        async def store(self):
            store = MyStore()
            yield store
            await store.aclose()

Each test uses ids of its own, so a shared backend does no harm.
"""

from .contract import StoreContract

__all__ = ["StoreContract"]
