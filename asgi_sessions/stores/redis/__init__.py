"""Sessions in Redis: one script per step, sent over one pipelined connection per event loop."""

try:
    import redis.asyncio  # noqa: F401  # the one place that says what to install
except ImportError as missing:
    raise ImportError(
        "the Redis store needs redis-py: pip install 'asgi-server-sessions[redis]'"
    ) from missing

from .store import RedisSessionStore

__all__ = ["RedisSessionStore"]
