"""Sessions in a SQLite database."""

from .store import SQLiteSessionStore

__all__ = ["SQLiteSessionStore"]
