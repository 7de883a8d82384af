"""Advisory locks on files: one writer at a time, and who of the processes lives."""

from __future__ import annotations

import os
import secrets
import time
from pathlib import Path
from types import TracebackType

from ...errors import SessionStoreError
from .faults import BUSY

try:
    import fcntl
except ImportError:  # Windows: SQLite's own lock keeps the writers apart, and leases tell who lives
    fcntl = None  # type: ignore[assignment]

_MODE = 0o600
_TRY_AGAIN = 0.002  # seconds


class Gate:
    """Writers pass it one at a time, in the order in which they came.

    SQLite's own lock is asked for by sleeping and trying again, which lets some processes starve.
    """

    def __init__(self, folder: Path) -> None:
        self._fd = os.open(folder / "gate", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, _MODE)

    def __enter__(self) -> None:
        if fcntl is not None:
            fcntl.flock(self._fd, fcntl.LOCK_EX)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.leave()

    def leave(self) -> None:
        """Let the next one pass."""
        if fcntl is not None:
            fcntl.flock(self._fd, fcntl.LOCK_UN)

    def try_enter(self) -> bool:
        """Pass it if nobody is in the way."""
        try:
            if fcntl is not None:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def enter_within(self, seconds: float) -> None:
        """Pass it, or `SessionStoreError` after so many seconds."""
        ends = time.monotonic() + seconds
        while not self.try_enter():
            if time.monotonic() > ends:
                raise SessionStoreError(BUSY)
            time.sleep(_TRY_AGAIN)

    def close(self) -> None:
        """Close the file. A child that was forked closes its copy of the lock by this, not its parent's."""
        os.close(self._fd)


class Presence:
    """This process as others see it: a file that is locked for as long as the process lives.

    Make it, and `sweep`, behind the gate: a file is there before its lock is, and nobody may see that.
    """

    def __init__(self, folder: Path) -> None:
        self.name = f"{os.getpid()}-{secrets.token_hex(6)}"
        self._folder = folder
        self._fd = os.open(self._path(self.name), os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, _MODE)
        if fcntl is not None:
            fcntl.flock(self._fd, fcntl.LOCK_EX)

    def lives(self, name: str) -> bool:
        """Whether the process of this name lives, as far as can be told; one that is frozen does."""
        if name == self.name or fcntl is None:
            return True
        try:
            fd = os.open(self._path(name), os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        except OSError:  # no descriptor is left, for instance
            return True
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
        finally:
            os.close(fd)
        return False

    def sweep(self) -> None:
        """Remove what processes have left that live no more."""
        for file in self._folder.glob("*.lock"):
            if not self.lives(file.stem):
                file.with_suffix(".sock").unlink(missing_ok=True)
                file.with_suffix(".waits").unlink(missing_ok=True)
                file.unlink(missing_ok=True)

    def close(self) -> None:
        """Be gone, as far as others see."""
        self._path(self.name).unlink(missing_ok=True)
        self.abandon()

    def abandon(self) -> None:
        """Close the file of the parent, in a child that was forked: the parent alone keeps it locked."""
        os.close(self._fd)

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.lock"
