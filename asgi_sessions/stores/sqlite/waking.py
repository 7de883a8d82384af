"""Datagrams between processes: a waiter is told to look again, or that a session has ended."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

_LONGEST = 100  # bytes of a socket's path that every system takes
_SIZE = 2048  # bytes; a message is a session's id, or `ENDED` and the ids of sessions that have ended
_EVERY = 64  # messages that are read at once
_MANY = 8  # messages; where so many came at once, the queue may have been full and some are lost
_WAITS = ".waits"  # ends the name of a file that is there while its process waits for the end of sessions

ENDED = "\n"  # which no id has; alone it says that any session may have ended


class Waking:
    """Takes the messages for this process, and sends messages to others. Each is a hint and may be lost.

    Where the system has no such sockets, or the path is too long for them, nothing comes and nothing goes:
    whoever waits has to look from time to time in any case.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self._folder = folder
        self._rung = threading.Event()
        self._socket: socket.socket | None = None  # takes messages, and waits for them
        self._sender: socket.socket | None = None  # never waits
        self._fd: int | None = None
        self._marking = threading.Lock()
        self._waits = folder / f"{name}{_WAITS}"
        self._prefix = os.fspath(folder)
        with contextlib.suppress(OSError, AttributeError):
            self._open(name)

    def _open(self, name: str) -> None:
        if len(os.fsencode(self._path(name))) > _LONGEST:
            self._fd = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            self._prefix = f"/proc/self/fd/{self._fd}"  # a short name for the same folder, on Linux
        opened = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            opened.bind(self._path(name))
        except OSError:
            opened.close()
            raise
        os.chmod(self._folder / f"{name}.sock", 0o600)
        self._name = name
        self._socket = opened
        self._sender = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._sender.setblocking(False)

    def tell(self, name: str, message: str) -> None:
        """Tell another process to look after this session. A full queue wakes it as well."""
        if self._sender is not None:
            with contextlib.suppress(OSError):
                self._sender.sendto(message.encode(), self._path(name))

    def await_ends(self) -> bool:
        """Have other processes tell which sessions end from now on; False where they cannot."""
        with self._marking:
            if self._socket is not None:
                self._waits.touch(0o600)
        return self._socket is not None

    def forget_ends(self, if_idle: Callable[[], bool]) -> None:
        """Hear of them no more, if nobody has begun to wait meanwhile."""
        with self._marking:
            if if_idle():
                self._waits.unlink(missing_ok=True)

    def tell_ended(self, session_ids: Sequence[str]) -> None:
        """Tell the processes that wait for the end of sessions."""
        message = ENDED + ENDED.join(session_ids)
        if len(message.encode()) > _SIZE:
            message = ENDED
        with contextlib.suppress(OSError):
            for name in os.listdir(self._folder):
                if name.endswith(_WAITS) and name != self._waits.name:
                    self.tell(name.removesuffix(_WAITS), message)

    def ring(self) -> None:
        """End this process's own `listen`, from another thread."""
        if self._socket is None:
            self._rung.set()
        else:
            self.tell(self._name, "")

    def listen(self, seconds: float | None) -> set[str]:
        """Wait so long for messages, None for ever."""
        if self._socket is None:
            self._rung.wait(seconds)
            self._rung.clear()
            return set()
        heard: set[str] = set()
        with contextlib.suppress(OSError):
            self._socket.settimeout(seconds)
            heard.add(self._socket.recv(_SIZE).decode(errors="replace"))
            self._socket.setblocking(False)
            for count in range(_EVERY):
                heard.add(self._socket.recv(_SIZE).decode(errors="replace"))
                if count == _MANY:
                    heard.add(ENDED)
        heard.discard("")
        return heard

    def close(self) -> None:
        """Close the socket and remove it."""
        self._waits.unlink(missing_ok=True)
        if self._socket is not None:
            (self._folder / f"{self._name}.sock").unlink(missing_ok=True)
        self.abandon()

    def abandon(self) -> None:
        """Close what is open, in a child that was forked, where the socket is the parent's."""
        for each in (self._socket, self._sender):
            if each is not None:
                each.close()
        if self._fd is not None:
            os.close(self._fd)

    def _path(self, name: str) -> str:
        return f"{self._prefix}/{name}.sock"
