"""What a user gives to the Redis store: what is wrong fails in the constructor, with the remedy."""

from __future__ import annotations

import pytest
from redis.asyncio import Redis

from asgi_sessions import DistributedLock, RedisSessionStore, SessionMiddleware
from asgi_sessions.cli import main

KEY = "0123456789abcdef" * 4
PASSWORD = "geheim"

WRONG_URLS = {
    "redis://h?sokcet_timeout=3": r"unknown option 'sokcet_timeout' .* did you mean 'socket_timeout'",
    "unix:///tmp/x?dbb=2": r"unknown option 'dbb' .* did you mean 'db'",
    "rediss://h?ssl_ca_cert=x": r"unknown option 'ssl_ca_cert' .* did you mean 'ssl_ca_certs'",
    "redis://h?ssl_ca_certs=x": r"unknown option 'ssl_ca_certs'",
    "redis+cluster://h:1?sokcet_timeout=3": r"unknown option 'sokcet_timeout'",
    "redis+sentinel://h:1/primary/0?sokcet_timeout=3": r"unknown option 'sokcet_timeout'",
    "redis://h?socket_timeout=soon": r"Invalid value for 'socket_timeout'",
    "rediss://h?ssl_cert_reqs=perhaps": "ssl_cert_reqs is one of required",
    "redis://h/first": "the number of a database",
    "redis://h/0/1": "the number of a database",
    "redis+sentinel://h:1/primary/first": "the number of a database",
    "redis://h:port/0": "cannot be read",
    "redis://[::1/0": "cannot be read",
    f"redis://:{PASSWORD}/x@h:6379/0": "password in it is percent-encoded",
    f"redis://:{PASSWORD}#x@h:6379/0": "password in it is percent-encoded",
    f"redis://:{PASSWORD}?x@h:6379/0": "password in it is percent-encoded",
    f"redis+cluster://:{PASSWORD}/x@h:6379": "password in it is percent-encoded",
    f"redis+sentinel://:{PASSWORD}/x@h:1/primary": "password in it is percent-encoded",
}


@pytest.mark.parametrize("url", WRONG_URLS)
def test_a_wrong_url_is_refused_with_the_remedy(url: str) -> None:
    """By the store and by the middleware; the message shows nothing of a password."""
    for make in (RedisSessionStore, lambda store: SessionMiddleware(None, KEY, store=store)):  # type: ignore[arg-type]  # no app is needed
        with pytest.raises(ValueError, match=WRONG_URLS[url]) as caught:
            make(url)
        assert PASSWORD not in str(caught.value)


def test_the_command_line_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    """On one line, without a traceback."""
    assert main(["health", "redis://h?sokcet_timeout=3"]) == 1
    assert "did you mean 'socket_timeout'" in capsys.readouterr().err


@pytest.mark.parametrize("url", ["redis://[::1]/3", "redis://h/", "redis://h?db=2", "unix:///tmp/x?db=2"])
def test_what_is_right_is_taken(url: str) -> None:
    """No connection is made for it."""
    RedisSessionStore(url)


def test_a_client_with_a_misspelt_option_is_refused() -> None:
    """redis-py itself says so with its first connection only."""
    with pytest.raises(ValueError, match="unknown option sokcet_timeout"):
        RedisSessionStore(Redis.from_url("redis://h?sokcet_timeout=3"))


def test_a_stand_in_is_refused() -> None:
    """fakeredis' client is one of redis-py's, but for the server behind it."""
    fake = type("FakeRedis", (Redis,), {"__module__": "fakeredis.aioredis"})
    for make in (RedisSessionStore, lambda client: DistributedLock(client, "door")):
        with pytest.raises(TypeError, match="give InMemorySessionStore"):
            make(fake())
        with pytest.raises(TypeError, match="give InMemorySessionStore"):
            make(type("Own", (fake,), {})())
