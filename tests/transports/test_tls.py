"""Who cannot be trusted is not spoken to, and who asks is told why."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from asgi_sessions import RedisSessionStore, SessionStoreError

from .rows import Servers

pytestmark = pytest.mark.anyio


@pytest.fixture(params=[False, True], ids=["asyncio", "uvloop"])
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, bool]]:
    return "asyncio", {"use_uvloop": request.param}


def another_host(servers: Servers) -> str:
    return servers.authority.url("127.0.0.1", servers.tls.port)


def an_unknown_authority(servers: Servers) -> str:
    return f"rediss://localhost:{servers.tls.port}"


def no_client_certificate(servers: Servers) -> str:
    return servers.authority.url("127.0.0.1", servers.careful_tls.port)


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        (another_host, r"certificate is not valid for '127\.0\.0\.1'"),
        (an_unknown_authority, "certificate verify failed"),
        (no_client_certificate, "certificate.required|clos|reset|lost|broken"),  # the server hangs up
    ],
)
async def test_the_cause_says_why(servers: Servers, url: Callable[[Servers], str], reason: str) -> None:
    """A name that is not on the certificate, a stranger's certificate, none of ours."""
    store = RedisSessionStore(url(servers))
    with pytest.raises(SessionStoreError) as caught:
        await store.get("s")
    await store.aclose()
    assert re.search(reason, str(caught.value.__cause__), re.IGNORECASE)
