"""Where a database lies: its file, the folder beside it, and what is refused there."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path

from ...errors import SessionStoreError
from .faults import DELETED

_logger = logging.getLogger("asgi_sessions.sqlite")

_MOUNTS = Path("/proc/self/mountinfo")
_NETWORK = {
    "nfs", "nfs4", "cifs", "smb3", "smbfs", "ncpfs", "afs", "ceph", "glusterfs", "lustre", "gfs2", "ocfs2",
    "fuse.sshfs", "fuse.glusterfs", "fuse.ceph", "fuse.s3fs", "fuse.rclone", "fuse.davfs2",
}  # fmt: skip
_DOUBTFUL = ("9p", "virtiofs", "fuse", "fakeowner")  # shares between a host and a virtual machine, mostly


class Place:
    """The path of a database. `folder` beside it has a gate, and a file and a socket for each process."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        text = os.fspath(path)
        if not isinstance(text, str) or not text or "\x00" in text or text.startswith(":memory:"):
            raise ValueError(
                "path names a file, for instance sessions.db; for memory: InMemorySessionStore()"
            )
        # The app may change its working directory; whoever comes by a link shares the locks.
        self.path = Path(os.path.realpath(text))
        self.folder = Path(f"{self.path}-run")
        if not self.path.parent.is_dir():
            raise ValueError(f"there is no folder {str(self.path.parent)!r} for the database: make it first")
        if self.path.is_dir():
            raise ValueError(f"{str(self.path)!r} is a folder; the path names the database's file in it")
        self._identity: tuple[int, int] | None = None

    def exists(self) -> bool:
        """Whether there is a file."""
        return self.path.exists()

    def identify(self) -> None:
        """Remember which file it is that was opened."""
        found = os.stat(self.path)
        self._identity = found.st_dev, found.st_ino

    def check_same(self) -> None:
        """`SessionStoreError` where the file that was opened is not there any more.

        SQLite would write to a deleted file and say that all is well.
        """
        try:
            found = os.stat(self.path)
        except OSError as error:
            raise SessionStoreError(DELETED) from error
        if (found.st_dev, found.st_ino) != self._identity:
            raise SessionStoreError(DELETED)

    def check_ground(self) -> None:
        """`SessionStoreError` where SQLite's locks or its log would not be those of the other processes."""
        mount, kind = _mount_of(self.path)
        if mount == str(self.path):
            raise SessionStoreError(
                f"{self.path} is mounted as a single file, so its log would stay behind: mount its folder"
            )
        if kind in _NETWORK:
            raise SessionStoreError(
                f"{self.path} lies on a network file system ({kind}), where SQLite's locks are not reliable:"
                " keep it on a local disk, or use Redis"
            )
        if kind.startswith(_DOUBTFUL):
            _logger.warning(
                "%s lies on a file system (%s) that may be shared by machines; all processes that use it"
                " have to run on one machine",
                self.path,
                kind,
            )


def _mount_of(path: Path) -> tuple[str, str]:
    """The mount point that a path lies below, and the kind of its file system; empty where nobody says."""
    try:
        lines = _MOUNTS.read_text("utf-8", "replace").splitlines()
    except OSError:
        return "", ""
    best = "", ""
    for line in lines:
        before, _, after = line.partition(" - ")
        mount = re.sub(r"\\(\d{3})", lambda code: chr(int(code[1], 8)), before.split(" ")[4])
        below = mount == "/" or path == Path(mount) or Path(mount) in path.parents
        if below and len(mount) >= len(best[0]):
            best = mount, after.split(" ")[0]
    return best
