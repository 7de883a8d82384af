"""What a power cut would leave of a file: read from a trace of what a process wrote and synced (strace)."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

TRACED = "openat,open,close,pwrite64,write,fdatasync,fsync,ftruncate,rename,unlink"
STRACE = ("strace", "-f", "-qq", "-xx", "-s", "100000000", "-e", f"trace={TRACED}", "-o")

_CALL = re.compile(r"^\d+ +(\w+)\((.*)\) += (-?\d+)")
_BEGUN = re.compile(r"^(\d+) +(\w+)\((.*) <unfinished \.\.\.>$")
_RESUMED = re.compile(r"^(\d+) +<\.\.\. (\w+) resumed>(.*)$")


@dataclass
class Disk:
    """Files by path: what was synced, and the writes since. A write is an offset and bytes, or a length."""

    synced: dict[str, bytearray] = field(default_factory=dict)
    pending: dict[str, list[tuple[int, bytes | None]]] = field(default_factory=dict)

    def write(self, path: str, offset: int, data: bytes | None) -> None:
        self.pending.setdefault(path, []).append((offset, data))

    def sync(self, path: str) -> None:
        content = self.synced.setdefault(path, bytearray())
        for offset, data in self.pending.pop(path, []):
            _apply(content, offset, data)

    def cut(self, folder: Path, chance: random.Random) -> None:
        """Put the files there as a power cut leaves them: what was synced, of the rest what chance wants."""
        for path in {*self.synced, *self.pending}:
            content = bytearray(self.synced.get(path, b""))
            for offset, data in self.pending.get(path, []):
                if chance.random() < 0.5:
                    _apply(content, offset, data)
            (folder / Path(path).name).write_bytes(content)


def _apply(content: bytearray, offset: int, data: bytes | None) -> None:
    if data is None:
        del content[offset:]
        content.extend(bytes(offset - len(content)))
        return
    content.extend(bytes(max(0, offset + len(data) - len(content))))
    content[offset : offset + len(data)] = data


def replay(trace: Path, name: str) -> Iterator[tuple[Disk, str]]:
    """After each line that the process has told (a write to descriptor 1): the disk, and that line.

    Only files whose name begins with `name` are followed; the index in shared memory is no file on the disk.
    """
    disk, opened = Disk(), dict[str, str]()
    for call, arguments, result in _calls(trace):
        if call in ("openat", "open") and int(result) >= 0:
            found = re.search(r'"((?:\\x[0-9a-f]{2})*)"', arguments)
            path = _bytes(found[1]).decode() if found else ""
            follow = Path(path).name.startswith(name) and not path.endswith("-shm") and "-run/" not in path
            opened[result] = path if follow else ""
            continue
        descriptor = arguments.partition(",")[0]
        path = opened.get(descriptor, "")
        if call == "write" and descriptor == "1":
            yield disk, _bytes(arguments.split('"')[1]).decode()
        elif call == "pwrite64" and path:
            _, data, rest = arguments.split('"')
            disk.write(path, int(rest.split(",")[2]), _bytes(data)[: int(result)])
        elif call in ("fdatasync", "fsync") and path:
            disk.sync(path)
        elif call == "ftruncate" and path:
            disk.write(path, int(arguments.split(",")[1]), None)


def _calls(trace: Path) -> Iterator[tuple[str, str, str]]:
    """The calls, in the order in which they ended, but for writes: those count from when they began."""
    begun: dict[str, str] = {}
    with trace.open(encoding="ascii", errors="replace") as lines:
        for line in lines:
            if unfinished := _BEGUN.match(line):
                begun[unfinished[1]] = f"{unfinished[1]} {unfinished[2]}({unfinished[3]}"
                continue
            if resumed := _RESUMED.match(line):
                line = begun.pop(resumed[1], "") + resumed[3]
            if call := _CALL.match(line):
                yield call[1], call[2], call[3]


def _bytes(text: str) -> bytes:
    return bytes.fromhex(text.replace("\\x", ""))
