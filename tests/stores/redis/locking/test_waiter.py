"""The turn in Redis, explored: some processes, every order of what they do, and the scripts themselves.

The scripts run on a real server, the tokens are kept by the package's own `Place`, and all other state of a
process is a model. Each world is put into Redis anew for each move, so that it can be continued in every way.
Worlds that differ in names only are one. Time stands still but for the moves that say otherwise.
"""

from __future__ import annotations

import copy
import hashlib
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import permutations
from types import TracebackType
from typing import Any, NamedTuple, TypeAlias

import hiredis
import pytest
from redis_server import RedisServer

from asgi_sessions.stores.redis.commands.commits import word_of
from asgi_sessions.stores.redis.commands.header import head_of, next_version, pack_value, unpack
from asgi_sessions.stores.redis.commands.keys import KeySpace
from asgi_sessions.stores.redis.commands.scripts import ACQUIRE, COMMIT, RELEASE, REMOVE
from asgi_sessions.stores.redis.commands.timing import NO_CHANNEL, LockTiming
from asgi_sessions.stores.redis.connection.resp import pack, pack_args
from asgi_sessions.stores.redis.locking.waiter import Place, question
from asgi_sessions.stores.tokens import new_nonce

KEYS = KeySpace("turn:").of("s")
QUEUE = KEYS.record + b":wait"
TIMING = LockTiming(30, 60)
WHO = b".1700000000000,7,host,GET+/page"
LATER = b"9999999999999"  # ms
CHANNELS = b"wake-0", b"wake-1", b"wake-2"
DEAF, DONE = b"deaf", b"done"
NO_END = b":0000000000000"  # of a record, in its version
AT_ONCE = 400  # moves in one batch
SCRIPTS = ACQUIRE, COMMIT, RELEASE, REMOVE

Move: TypeAlias = tuple[str, int]  # what happens, and to which process
Key: TypeAlias = tuple[object, ...]  # a world, without the names in it


class Message(NamedTuple):
    """What a process was sent: the record's version, None where the record is gone."""

    token: bytes
    version: bytes | None
    state: str = "sent"  # | lost | late: its lock has ended since | void: so has the record


class Result(NamedTuple):
    """What the scripts answered, what lies in Redis then, and what was published meanwhile."""

    replies: list[Any]
    lock: bytes | None
    queue: tuple[bytes, ...]
    version: bytes | None
    sent: list[tuple[bytes, Message]]


@dataclass
class Process:
    """One process, in which one caller at a time speaks with Redis."""

    channel: bytes
    does: str = "rests"  # | asks | waits | holds | dead
    place: Place = field(default_factory=Place)
    reply: tuple[bytes, bytes] = (b"", b"")  # its kind, and the version of the record; not read yet
    version: bytes = b""  # loaded
    messages: tuple[Message, ...] = ()

    def forget(self) -> None:
        """Messages for tokens that were given up reach nobody."""
        tokens = self.place.left()
        self.messages = tuple(each for each in self.messages if each.token in tokens)

    def rests(self) -> None:
        self.does, self.place, self.messages, self.version = "rests", Place(), (), b""


@dataclass
class World:
    """The processes, and what lies in Redis."""

    processes: tuple[Process, ...]
    lock: bytes | None = None
    queue: tuple[bytes, ...] = ()
    version: bytes | None = next_version(b"0" * 16 + 2 * NO_END)  # of the record, if there is one

    def copy(self) -> World:
        return replace(self, processes=tuple(self.copied(each) for each in self.processes))

    def copied(self, process: Process) -> Process:
        return replace(process, place=copy.copy(process.place))

    def owner(self, token: bytes | None) -> Process | None:
        return next((each for each in self.processes if token and token in each.place.left()), None)

    def deaf(self, token: bytes) -> bool:
        owner = self.owner(token)
        return owner is None or owner.does == "dead"

    # -- what can happen --------------------------------------------------------------------------------

    def moves(self) -> Iterator[tuple[bool, Move]]:
        """Each with whether it comes by itself in the end: nobody is to need any of the others."""
        if self.lock is not None:
            yield self.deaf(self.lock), ("lapses", 0)
        if self.version is None:
            yield False, ("created", 0)
        else:
            yield from [(False, ("removed", 0)), (False, ("expires", 0))]
        for number, process in enumerate(self.processes):
            for by_itself, name in MOVES[process.does]:
                yield by_itself, (name, number)
            if process.does == "waits":
                for each in process.messages:
                    if each.token == process.place.token and each.state != "lost":
                        yield True, ("hears", number)
                        yield False, ("misses", number)
        if not any(process.does == "dead" for process in self.processes):
            yield from [(False, ("dies", number)) for number in range(len(self.processes))]

    # -- it happens, in a process -------------------------------------------------------------------------

    def reads_the_reply(self, process: Process) -> None:
        kind, version = process.reply
        process.place.answered(kind)
        process.reply = b"", b""
        process.forget()
        if kind == b"L":
            process.does, process.version, process.messages = "holds", version, ()
        elif kind in (b"W", b"K"):
            process.does = "waits"
        else:
            assert kind in (b"A", b"R")
            process.rests()

    def hears(self, process: Process) -> None:
        message = next(each for each in process.messages if each.token == process.place.token)
        if message.version is None:
            process.rests()
        elif message.state == "late":  # it is not believed: the next is a question
            self.misses(process)
        else:
            assert message.state == "void" or self.lock == message.token, "a stale message is believed"
            process.does, process.version, process.messages = "holds", message.version, ()

    def misses(self, process: Process) -> None:
        token = process.place.token
        process.messages = tuple(
            each._replace(state="lost") if each.token == token else each for each in process.messages
        )

    def dies(self, process: Process) -> None:
        process.does, process.messages, process.reply = "dead", (), (b"", b"")

    # -- it happens, in Redis -----------------------------------------------------------------------------

    def lapses(self, process: Process) -> None:
        self.ends("late")

    def ends(self, state: str) -> None:
        """The lock is gone, and messages that promise it are worth nothing."""
        for process in self.processes:
            process.messages = tuple(
                each._replace(state=state) if each.token == self.lock and each.state == "sent" else each
                for each in process.messages
            )
        self.lock = None

    def expires(self, process: Process) -> None:
        self.version = None

    def created(self, process: Process) -> None:
        self.version = next_version(b"1" * 16 + 2 * NO_END)

    # -- it happens, in the scripts -----------------------------------------------------------------------

    def take_in(self, move: Move, result: Result) -> None:
        """What became of a move in Redis."""
        before, (name, number) = self.copy(), move
        process = self.processes[number]
        if self.lock != result.lock and result.version is None:
            self.ends("void")
        self.lock, self.queue, self.version = result.lock, result.queue, result.version
        for each in self.processes:
            each.messages += tuple(message for channel, message in result.sent if channel == each.channel)
        assert all(message.version == result.version for _, message in result.sent), "told an old record"
        reply: Any = word_of(result.replies[0]) if result.replies else None
        if name in ("asks", "takes_over"):
            process.does, process.reply = (
                "asks",
                (reply[0], version_of(reply[1]) if reply[0] == b"L" else b""),
            )
        elif name == "saves" and reply in (b"STORED", b"CONFLICT"):
            process.version = result.version or b"" if reply == b"STORED" else process.version
        elif name != "removed":
            process.rests()
        if name in ("commits", "saves"):
            before.judge(before.processes[number], reply)
        if name not in ("asks", "takes_over", "saves"):
            expected = [before.successor(name, before.processes[number], self)]
            if name in ("commits", "discards") and before.lock is None:  # it may do as if its lease lasted
                before.lock = before.processes[number].place.token
                expected.append(before.successor(name, before.processes[number], self))
            assert self.served() in expected, "not the first"
        for each in self.processes:
            each.forget()

    def judge(self, process: Process, reply: bytes) -> None:
        """A commit is stored if nobody has come in between; with the lock it is stored then in any case."""
        untouched, stored = self.version == process.version, reply in (b"STORED", b"UNHELD")
        owned = self.lock == process.place.token
        assert stored or not (untouched and owned), f"{reply!r}, and nobody had come"
        assert not stored or (untouched and (owned or self.lock is None)), "stored after others came"

    def served(self) -> tuple[bytes | None, list[bytes]]:
        """Who has the lock, and those who are alive in the queue."""
        return self.lock, [token for token in self.queue if not self.deaf(token)]

    def successor(self, name: str, process: Process, after: World) -> tuple[bytes | None, list[bytes]]:
        """Who should have the lock when this process has given up what it had, and the queue then."""
        tokens = process.place.left() if name != "removed" else []
        gone = after.version is None and (name in ("removed", "discards") or self.lock in tokens)
        queue = [token for token in self.queue if token not in tokens and not self.deaf(token)]
        if gone:
            return None, []
        if self.lock in tokens:
            return (queue.pop(0) if queue else None), queue
        return self.lock, queue

    # -- what holds always ------------------------------------------------------------------------------

    def check(self) -> None:
        assert len({*self.queue, self.lock}) == len(self.queue) + 1, "a token is twice in Redis"
        for token in [*self.queue, *([self.lock] if self.lock else [])]:
            assert self.owner(token) is not None, "a lock or a place is left that nobody knows"
        for process in self.processes:
            token = process.place.token
            sent = any(each.token == token for each in process.messages)
            waits_to_be_told = process.does == "waits" and process.channel != NO_CHANNEL
            told = sent or token in self.queue or token == self.lock
            assert told or not waits_to_be_told, "a waiter is lost"

    def is_over(self) -> bool:
        left = [*self.queue, *([self.lock] if self.lock else [])]
        return all(each.does in ("rests", "dead") for each in self.processes) and all(map(self.deaf, left))

    def key(self) -> Key:
        """The same for worlds that differ in names only, of tokens, versions and processes."""
        return min(self.named(*processes) for processes in permutations(self.processes))

    def named(self, *processes: Process) -> Key:
        names: dict[bytes | None, int] = {None: 0, b"": 1}
        tokens = [self.lock, *self.queue]
        for each in processes:
            tokens += [each.place.token, each.place.fresh, *[message.token for message in each.messages]]
        for token in tokens:
            names.setdefault(token, len(names))
        facts = [
            (
                each.channel == NO_CHANNEL,
                each.does,
                each.reply[0],
                self.version in (each.version, each.reply[1]),
                tuple((message.version is None, message.state) for message in each.messages),
            )
            for each in processes
        ]
        return self.version is None, len(self.queue), tuple(names[token] for token in tokens), tuple(facts)


MOVES: dict[str, list[tuple[bool, str]]] = {  # what a process does, and what can happen next
    "rests": [(False, "asks")],
    "asks": [(True, "reads_the_reply"), (False, "gives_up")],
    "waits": [(True, "asks"), (False, "gives_up")],
    "holds": [
        (True, "commits"),
        (True, "releases"),
        (False, "saves"),
        (False, "discards"),
        (False, "takes_over"),
    ],
    "dead": [],
}
IN_REDIS = {"asks", "takes_over", "gives_up", "commits", "saves", "releases", "discards", "removed"}


# --- the server ----------------------------------------------------------------------------------------


class Wire:
    """A connection to a real server: many commands at once, and their replies."""

    def __init__(self, server: RedisServer) -> None:
        self.socket = socket.create_connection(("127.0.0.1", server.port), timeout=30)
        self.reader = hiredis.Reader()

    def send(self, *commands: bytes) -> list[Any]:
        self.socket.sendall(b"".join(commands))
        return [self.read() for _ in commands]

    def read(self) -> Any:
        while (reply := self.reader.gets()) is False:
            self.reader.feed(self.socket.recv(1 << 16))
        assert not isinstance(reply, hiredis.ReplyError), reply
        return reply


class Redis:
    """The server with its scripts, perhaps with something wrong in them, and all subscriptions."""

    def __init__(self, server: RedisServer, wrong: str = "", instead: str = "") -> None:
        self.wire, self.heard = Wire(server), Wire(server)
        bodies = [script.body.replace(wrong.encode(), instead.encode()) for script in SCRIPTS]
        assert not wrong or bodies != [script.body for script in SCRIPTS]
        digests = self.wire.send(*[pack(b"SCRIPT", b"LOAD", body) for body in bodies])
        self.digests = [
            (script.by_sha, script.by_sha.replace(hashlib.sha1(script.body).hexdigest().encode(), digest))
            for script, digest in zip(SCRIPTS, digests, strict=True)
        ]
        for channel in (*CHANNELS, DONE):
            self.heard.send(pack(b"SUBSCRIBE", channel))

    def run(self, jobs: Sequence[tuple[World, Move]]) -> list[Result]:
        """Carry the moves out, each in its world."""
        before = [restore(world) for world, _ in jobs]
        calls = [self.digested(call_of(world.processes[number], name)) for world, (name, number) in jobs]
        looks = [pack(b"GET", KEYS.lock), pack(b"LRANGE", QUEUE, b"0", b"-1"), pack(b"GET", KEYS.record)]
        done = [*looks, pack(b"PUBLISH", DONE, b"")]
        each = [[*first, *then, *done] for first, then in zip(before, calls, strict=True)]
        replies = iter(self.wire.send(*[command for commands in each for command in commands]))
        results = []
        for first, commands in zip(before, each, strict=True):
            *answers, lock, queue, value, _ = [next(replies) for _ in commands]
            found = tuple(token_of(entry.split()[2]) for entry in queue)
            holder = lock and token_of(lock)
            results.append(
                Result(answers[len(first) :], holder, found, value and version_of(value), self.messages())
            )
        return results

    def __enter__(self) -> Redis:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.wire.socket.close()
        self.heard.socket.close()

    def digested(self, calls: list[bytes]) -> list[bytes]:
        """The scripts of this server instead of the package's."""
        for ours, loaded in self.digests:
            calls = [call.replace(ours, loaded, 1) for call in calls]
        return calls

    def messages(self) -> list[tuple[bytes, Message]]:
        found: list[tuple[bytes, Message]] = []
        while True:
            _, channel, text = self.heard.read()
            if channel == DONE:
                return found
            token, _, news = text.split(b":", 2)
            found.append((channel, Message(token, version_of(news) if len(news) > 1 else None)))


def token_of(value: bytes) -> bytes:
    """The token in the value of a lock, or in a place of the queue; behind it stands who that is."""
    token, _, who = value.partition(b".")
    assert who[13:] == WHO[14:], value
    return token


def version_of(value: bytes) -> bytes:
    return unpack(value).version


def restore(world: World) -> list[bytes]:
    commands = [pack(b"DEL", KEYS.record, KEYS.lock, QUEUE)]
    if world.version is not None:
        commands.append(pack(b"SET", KEYS.record, pack_value(world.version, b"{}"), b"EX", b"600"))
    if world.lock is not None:
        commands.append(pack(b"SET", KEYS.lock, world.lock + WHO, b"EX", b"600"))
    for token in world.queue:
        owner = world.owner(token)
        channel = owner.channel if owner is not None and (owner.does != "dead") else DEAF
        commands.append(pack(b"RPUSH", QUEUE, b"%b %b %b" % (LATER, channel, token + WHO)))
    return commands


def call_of(process: Process, move: str) -> list[bytes]:
    """What the process sends, packed."""
    place, version = process.place, process.version
    if move in ("asks", "takes_over"):
        return [question(KEYS, TIMING, place, place.ask() + WHO, process.channel, 60)]
    if move in ("commits", "saves"):
        flags = TIMING.commit_and_release if move == "commits" else TIMING.commit
        args = pack_args(place.token, head_of(version), pack_value(next_version(version), b"{}"))
        return [COMMIT.by_sha + KEYS.packed + args + flags]
    if move in ("discards", "removed"):
        who = (place.token, version) if move == "discards" else (b"", b"")
        args = pack_args(*who, b"0", TIMING.claim_ms, b"0", new_nonce(), b"", b"ended")
        return [REMOVE.by_sha + KEYS.packed + args]
    return [RELEASE.by_sha + KEYS.packed + pack_args(token) + TIMING.release for token in place.left()]


# --- exploring ---------------------------------------------------------------------------------------------


def explore(redis: Redis, channels: tuple[bytes, ...], depth: int) -> tuple[int, bool]:
    """Every world within so many moves, the nearest first: how many there are, and whether these are all."""
    begin = World(tuple(Process(channel) for channel in channels))
    came_from: dict[Key, tuple[Key, Move]] = {begin.key(): ((), ("", 0))}
    onward: dict[Key, list[Key]] = {}  # the moves that come by themselves, backwards
    level, ends = [begin], [begin.key()]
    while level and depth:
        depth -= 1
        todo = [(world, by_itself, move) for world in level for by_itself, move in world.moves()]
        level = []
        for (world, by_itself, move), go_on in zip(todo, carried_out(redis, todo), strict=True):
            key = world.key()
            try:
                after = go_on()
                after.check()
            except Exception as error:
                told = f"{type(error).__name__}: {error}"
                raise AssertionError(f"{told}, after {story(came_from, (key, move))}") from error
            found = after.key()
            if by_itself:
                onward.setdefault(found, []).append(key)
            if found not in came_from:
                came_from[found] = key, move
                level.append(after)
                if after.is_over():
                    ends.append(found)
    if not level:
        alive = reached(ends, onward)
        for key, way in came_from.items():
            assert key in alive, f"somebody waits for ever after {story(came_from, way)}"
    return len(came_from), not level


def carried_out(redis: Redis, todo: Sequence[tuple[World, bool, Move]]) -> Iterator[Callable[[], World]]:
    """What comes of each move, worked out when it is asked for."""
    for start in range(0, len(todo), AT_ONCE):
        moves = [(world.copy(), move) for world, _, move in todo[start : start + AT_ONCE]]
        results = iter(redis.run([(world, move) for world, move in moves if move[0] in IN_REDIS]))
        for world, move in moves:
            yield partial(went_on, world, move, next(results) if move[0] in IN_REDIS else None)


def went_on(world: World, move: Move, result: Result | None) -> World:
    if result is None:
        getattr(world, move[0])(world.processes[move[1]])
    else:
        world.take_in(move, result)
    return world


def reached(ends: Sequence[Key], backwards: dict[Key, list[Key]]) -> set[Key]:
    """From where one of these comes about."""
    found, todo = set(ends), list(ends)
    while todo:
        for key in backwards.get(todo.pop(), ()):
            if key not in found:
                found.add(key)
                todo.append(key)
    return found


def story(came_from: dict[Key, tuple[Key, Move]], way: tuple[Key, Move]) -> str:
    moves: list[str] = []
    key, (name, number) = way
    while name:
        moves.append(f"{number} {name}")
        key, (name, number) = came_from[key]
    return ", ".join(reversed(moves))


TOLD = CHANNELS[:2]


@pytest.mark.parametrize(
    ("channels", "depth"),
    [(TOLD, 100), ((TOLD[0], NO_CHANNEL), 8), ((NO_CHANNEL, NO_CHANNEL), 8), (CHANNELS, 6)],
    ids=["both are told", "one polls", "both poll", "three"],
)
def test_every_order_of_what_processes_do(
    redis_server: RedisServer, channels: tuple[bytes, ...], depth: int, request: pytest.FixtureRequest
) -> None:
    """One holder, no waiter lost, no stale message believed, first come, first served, nothing left."""
    if request.config.getoption("--long"):
        depth += 92 if len(channels) == 2 else 2
    with Redis(redis_server) as redis:
        worlds, complete = explore(redis, channels, depth)
    assert complete is (depth >= 100)
    assert worlds > 700


@pytest.mark.parametrize(
    ("wrong", "instead"),
    [
        ("redis.call('LPOP', KEYS[3])", "redis.call('RPOP', KEYS[3])"),
        ("redis.call('LREM', KEYS[3], 1, entry)", ""),
        ("tell(channel, token, now, state)", ""),
        ("  redis.call('DEL', KEYS[2], KEYS[3])\n", ""),
        ("    dismiss(state, now)\n", ""),
        ("if queued == earlier then", "if false then"),
        ("(earlier ~= '' and holder == earlier)", "false"),
        ("and (token == '' or redis.call('GETRANGE', KEYS[2], '0', '31') == token)", ""),
        ("local ours = redis.call('GETRANGE', KEYS[2], '0', '31') == ARGV[1]", "local ours = true"),
    ],
)
def test_the_exploration_finds_a_wrong_script(redis_server: RedisServer, wrong: str, instead: str) -> None:
    """There is a story that shows it."""
    channels = CHANNELS if "POP" in wrong else TOLD  # of two there are never two who wait
    with Redis(redis_server, wrong, instead) as redis, pytest.raises(AssertionError, match=", after "):
        explore(redis, channels, 100)


def keeps_the_earlier(place: Place, kind: bytes) -> tuple[bytes, ...]:
    place.fresh = b""
    return ()


def takes_the_fresh(place: Place, kind: bytes) -> tuple[bytes, ...]:
    place.token, place.fresh = place.fresh, b""
    return ()


@pytest.mark.parametrize("wrong", [keeps_the_earlier, takes_the_fresh])
def test_the_exploration_finds_a_wrong_token(
    redis_server: RedisServer, wrong: Callable[..., object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is a story that shows it."""
    monkeypatch.setattr(Place, "answered", wrong)
    with Redis(redis_server) as redis, pytest.raises(AssertionError, match=", after "):
        explore(redis, TOLD, 100)
