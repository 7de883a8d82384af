"""Datagrams between processes: a waiter is told to look again."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from pathlib import Path

_LONGEST = 100  # bytes of a socket's path that every system takes
_SIZE = 2048  # bytes; a message is a session's id
_EVERY = 64  # messages that are read at once


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

    def tell(self, name: str, session_id: str) -> None:
        """Tell another process to look after this session. A full queue wakes it as well."""
        if self._sender is not None:
            with contextlib.suppress(OSError):
                self._sender.sendto(session_id.encode(), self._path(name))

    def ring(self) -> None:
        """End this process's own `listen`, from another thread."""
        if self._socket is None:
            self._rung.set()
        else:
            self.tell(self._name, "")

    def listen(self, seconds: float | None) -> set[str]:
        """Wait so long for messages, None for ever; the sessions that they name."""
        if self._socket is None:
            self._rung.wait(seconds)
            self._rung.clear()
            return set()
        heard: set[str] = set()
        with contextlib.suppress(OSError):
            self._socket.settimeout(seconds)
            heard.add(self._socket.recv(_SIZE).decode(errors="replace"))
            self._socket.setblocking(False)
            for _ in range(_EVERY):
                heard.add(self._socket.recv(_SIZE).decode(errors="replace"))
        heard.discard("")
        return heard

    def close(self) -> None:
        """Close the socket and remove it."""
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
