"""A TCP proxy in front of Redis that delays, cuts, swallows or mutilates what it is told to.

It reads the protocol of Redis in both directions, so a fault can be meant for one command, or for the answer
to one. It runs in threads of its own: whatever happens to its clients' event loops, it goes on.
"""

from __future__ import annotations

import contextlib
import random
import re
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.resources import files
from types import TracebackType
from typing import Literal, TypeAlias

from asgi_sessions.stores.redis.connection.script import Script

Match: TypeAlias = Callable[[bytes], bool]
"""Whether a command, as it is on the wire, is meant."""
Send: TypeAlias = Callable[[bytes], None]
Fault: TypeAlias = Callable[["Link", bytes, Send], None]
"""Gets the link, a message, and the way to send it on; what it does not send is lost."""
Direction: TypeAlias = Literal["request", "answer"]

_LINGER_NOT = struct.pack("ii", 1, 0)  # close() then sends RST instead of FIN
_LUA = files("asgi_sessions.stores.redis") / "lua"
_SHA = re.compile(rb"\$40\r\n([0-9a-f]{40})\r\n")


class LinkGoneError(Exception):
    """This link carries nothing any more."""


# -- which messages ------------------------------------------------------------------------------------------


def anything(command: bytes) -> bool:
    """Every command, and what the server says unasked."""
    return True


def unasked(command: bytes) -> bool:
    """What the server says to a subscriber; to be given `on="answer"`."""
    return command == b""


def calls(*scripts: Script) -> Match:
    """The calls of these scripts, by digest or with their bodies."""
    marks = [mark for script in scripts for mark in (_digest(script), _first_line(script))]
    return lambda command: any(mark in command for mark in marks)


def _digest(script: Script) -> bytes:
    found = _SHA.search(script.by_sha)
    assert found is not None
    return found[1]


def _first_line(script: Script) -> bytes:
    return (_LUA / f"{script.name}.lua").read_bytes().partition(b"\n")[0]


def containing(text: bytes) -> Match:
    """Commands in which this text occurs."""
    return lambda command: text in command


# -- what becomes of them ------------------------------------------------------------------------------------


def cut(link: Link, message: bytes, send: Send) -> None:
    """Both connections are closed in good order (FIN); the message is lost."""
    link.close()
    raise LinkGoneError


def reset(link: Link, message: bytes, send: Send) -> None:
    """Both connections are reset (RST); the message is lost."""
    link.close(reset=True)
    raise LinkGoneError


def half(link: Link, message: bytes, send: Send) -> None:
    """Half of the message arrives, then the connections are closed."""
    send(message[: len(message) // 2])
    cut(link, message, send)


def swallow(link: Link, message: bytes, send: Send) -> None:
    """The message and all behind it are lost for good, as behind a firewall that forgot the connection.

    The connections stay open, and new ones are as good as ever.
    """
    link.deaf = True


def delay(seconds: float, jitter: float = 0.0) -> Fault:
    """The message, and all behind it, come later: by `seconds` and a part of `jitter` that chance chooses."""

    def late(link: Link, message: bytes, send: Send) -> None:
        time.sleep(seconds + random.random() * jitter)
        send(message)

    return late


def trickle(size: int, pause: float) -> Fault:
    """The message comes `size` bytes at a time, with so many seconds between."""

    def slow(link: Link, message: bytes, send: Send) -> None:
        for begin in range(0, len(message), size):
            send(message[begin : begin + size])
            time.sleep(pause)

    return slow


@dataclass
class Plan:
    """A fault for the next `times` messages that match, None for all, after the first `skip` of them."""

    fault: Fault
    match: Match
    times: int | None
    skip: int = 0
    hits: int = 0  # so many have met it
    hit: threading.Event = field(default_factory=threading.Event)  # set with the first

    def takes(self, command: bytes) -> bool:
        """Whether this message is one of them; it counts as hit then."""
        if (self.times is not None and self.hits >= self.times) or not self.match(command):
            return False
        if self.skip > 0:
            self.skip -= 1
            return False
        self.hits += 1
        self.hit.set()
        return True


# -- the proxy -----------------------------------------------------------------------------------------------


class ChaosProxy:
    """Passes everything on between its clients and the server at `target` of the loopback, but for faults.

    Connections stay with the server that they were made to: a new target is for those that come.
    """

    def __init__(self, port: int) -> None:
        self.target = port
        self._plans: dict[Direction, list[Plan]] = {"request": [], "answer": []}
        self._turn = threading.Lock()
        self._links: set[Link] = set()
        self.links = 0  # made so far
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.url = f"redis://127.0.0.1:{self.port}/0"

    def __enter__(self) -> ChaosProxy:
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()
        for link in self.cut_all():
            link.join()

    def inject(
        self,
        fault: Fault,
        match: Match = anything,
        *,
        on: Direction = "request",
        times: int | None = 1,
        skip: int = 0,
    ) -> Plan:
        """From now on let the fault befall matching commands, or the answers to them."""
        plan = Plan(fault, match, times, skip)
        with self._turn:
            self._plans[on].append(plan)
        return plan

    @contextlib.contextmanager
    def injecting(self, fault: Fault, match: Match = anything, *on: Direction) -> Iterator[Plan]:
        """The fault befalls everything that matches within the block; both directions unless one is named."""
        plan = Plan(fault, match, None)
        directions: tuple[Direction, ...] = on or ("request", "answer")
        with self._turn:
            for direction in directions:
                self._plans[direction].append(plan)
        try:
            yield plan
        finally:
            with self._turn:
                for direction in directions:
                    self._plans[direction].remove(plan)

    def heal(self) -> None:
        """No more faults; connections that exist go on as they are."""
        with self._turn:
            for plans in self._plans.values():
                plans.clear()

    def cut_all(self, *, reset: bool = False) -> list[Link]:
        """Close every connection; those that were closed."""
        with self._turn:
            links = list(self._links)
        for link in links:
            link.close(reset=reset)
        return links

    def deafen_all(self) -> None:
        """Nothing comes through the connections of now any more, which stay open; later ones are well."""
        with self._turn:
            for link in self._links:
                link.deaf = True

    def plan_for(self, direction: Direction, command: bytes) -> Plan | None:
        """The fault that this message is to meet, the first that takes it."""
        with self._turn:
            return next((plan for plan in self._plans[direction] if plan.takes(command)), None)

    def forget(self, link: Link) -> None:
        """It carries nothing any more."""
        with self._turn:
            self._links.discard(link)

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            try:
                far = socket.create_connection(("127.0.0.1", self.target))
            except OSError:
                near.close()  # as a host answers whose server is down
                continue
            link = Link(self, near, far)
            with self._turn:
                self._links.add(link)
                self.links += 1
            link.start()


class Link:
    """One client's connection and its continuation to the server, carried by a thread in each direction."""

    def __init__(self, proxy: ChaosProxy, near: socket.socket, far: socket.socket) -> None:
        self._proxy = proxy
        self._near, self._far = near, far
        self._asked: deque[bytes] = deque()  # commands whose answers have not come
        self._closing = threading.Lock()
        self._closed = False
        self.deaf = False  # nothing comes through any more, either way
        for end in (near, far):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._threads = [
            threading.Thread(target=self._carry, args=(near, far, "request"), daemon=True),
            threading.Thread(target=self._carry, args=(far, near, "answer"), daemon=True),
        ]

    def start(self) -> None:
        """Carry from now on."""
        for thread in self._threads:
            thread.start()

    def join(self) -> None:
        """Wait until both threads have ended; a fault that sleeps may take its time."""
        for thread in self._threads:
            thread.join()

    def close(self, *, reset: bool = False) -> None:
        """End both connections, the client's with RST if so told; nothing where they have ended."""
        with self._closing:
            if self._closed:
                return
            self._closed = True
        self._proxy.forget(self)
        for end in (self._near, self._far):
            with contextlib.suppress(OSError):
                if reset:
                    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_NOT)
                else:
                    end.shutdown(socket.SHUT_RDWR)
            if reset:
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RD)  # wakes the thread that reads from it
            end.close()

    def _carry(self, source: socket.socket, sink: socket.socket, direction: Direction) -> None:
        frames = Frames()
        try:
            while chunk := source.recv(1 << 18):
                for message in frames.feed(chunk):
                    if not self.deaf:
                        self._pass_on(message, sink.sendall, direction)
        except (OSError, LinkGoneError):
            pass
        finally:
            self.close()

    def _pass_on(self, message: bytes, send: Send, direction: Direction) -> None:
        if direction == "request":
            command = message
            self._asked.append(command)
        else:
            command = self._asked.popleft() if self._asked else b""  # what a subscriber is told unasked
        plan = self._proxy.plan_for(direction, command)
        if plan is None:
            send(message)
        else:
            plan.fault(self, message, send)


class Frames:
    """Cuts a stream of RESP2 into whole messages."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, chunk: bytes) -> list[bytes]:
        """The messages that are complete with this chunk."""
        self._rest += chunk
        begin, messages = 0, []
        while (end := _end_of(self._rest, begin)) is not None:
            messages.append(self._rest[begin:end])
            begin = end
        self._rest = self._rest[begin:]
        return messages


def _end_of(data: bytes, begin: int) -> int | None:
    """Where the message that begins there ends; None where it is not complete."""
    line_end = data.find(b"\r\n", begin)
    if line_end < 0:
        return None
    kind, end = data[begin : begin + 1], line_end + 2
    if kind == b"$":
        length = int(data[begin + 1 : line_end])
        end += length + 2 if length >= 0 else 0  # nil has no body
        return end if end <= len(data) else None
    if kind == b"*":
        for _ in range(max(int(data[begin + 1 : line_end]), 0)):
            inner = _end_of(data, end)
            if inner is None:
                return None
            end = inner
    return end
