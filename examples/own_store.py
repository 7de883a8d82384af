"""A store of your own: one file per session in a folder, with the standard library and anyio.

    middleware = SessionMiddleware(app, secret_key, store=FileStore("/var/lib/shop/sessions"))

For one process, on asyncio and trio: sessions survive a restart. Two processes that share the folder would
not see each other's locks: take Redis for that.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import AsyncGenerator
from pathlib import Path

from anyio import to_thread

from asgi_sessions import SessionStore, SessionStoreError


class FileStore(SessionStore):
    """Sessions in files. Call `cleanup_expired()` now and then, to remove those that have ended."""

    def __init__(self, folder: str | Path) -> None:
        super().__init__()
        self._folder = Path(folder)
        self._folder.mkdir(parents=True, exist_ok=True)

    async def read_value(self, session_id: str) -> bytes | None:
        found = await to_thread.run_sync(_read, self._path(session_id))
        return None if found is None else found[1]

    async def write_value(self, session_id: str, value: bytes, ttl: float) -> None:
        await to_thread.run_sync(_write, self._path(session_id), session_id.encode() + b"\n" + value)

    async def delete_value(self, session_id: str) -> None:
        await to_thread.run_sync(_delete, self._path(session_id))

    async def iter_ids(self) -> AsyncGenerator[str, None]:
        for name in await to_thread.run_sync(os.listdir, self._folder):
            found = None if name.endswith(".new") else await to_thread.run_sync(_read, self._folder / name)
            if found is not None:
                yield found[0]

    def _path(self, session_id: str) -> Path:
        """An id may have 255 characters of any kind, dots and slashes too; its hash is a safe file name."""
        return self._folder / hashlib.sha256(session_id.encode()).hexdigest()


def _read(path: Path) -> tuple[str, bytes] | None:
    """The id and the value in a file."""
    try:
        session_id, _, value = path.read_bytes().partition(b"\n")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise SessionStoreError(f"a session's file cannot be read: {error.strerror}") from error
    return session_id.decode(errors="replace"), value


def _write(path: Path, content: bytes) -> None:
    """Write the whole file or nothing: the package has one writer at a time for each session."""
    unfinished = path.with_suffix(".new")
    try:
        with unfinished.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # what was acknowledged outlives the machine's power too
        unfinished.replace(path)
    except OSError as error:
        raise SessionStoreError(f"a session's file cannot be written: {error.strerror}") from error


def _delete(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise SessionStoreError(f"a session's file cannot be removed: {error.strerror}") from error
