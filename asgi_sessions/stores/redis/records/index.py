"""Which sessions a user has: an index beside the records, by which a sign-out ends them.

Records and index lie in different slots of a cluster, so no script sees both. Therefore the index decides: a
session whose link is gone, or is marked as being ended, can no longer move to a new id. So each session that
is signed in when `end` marks the links is either marked under the id that it has, or has to end as it moves.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple, cast

from ....errors import SessionStoreError
from ....record.codec import id_of, user_of
from ...surplus import by_idleness
from ..commands.commands import Commands
from ..commands.header import milliseconds, unpack
from ..commands.keys import KeySpace
from ..commands.scripts import LINK, MARK, SETTLE, SUCCEED, SURPLUS
from ..connection.call import forget
from ..connection.replies import Reply, is_list, is_number
from .operations import Records

LINKED_FOR = 400 * 86400.0  # seconds; no browser keeps a cookie for longer (RFC 6265bis §5.6.2)
LINK_SETTLES = 60.0  # seconds for which a link is believed: its record may still come
LOOKS = 8  # links that each fourth sign-in has looked at: two for each that comes
AT_ONCE = 200  # sessions of a user that are ended in one step

LIVES, NOTHING, GONE = b"K", b"N", b"G"  # the words of settle.lua
TO_END, LEFT_ALONE = b"E", b""

_SETTLES = milliseconds(LINK_SETTLES)
_LOOKS = b"%d" % LOOKS


class Link(NamedTuple):
    """A session in a user's index; `since` is its time in ms, negative where the session is being ended."""

    session_id: str
    since: bytes

    @property
    def is_marked(self) -> bool:
        """Whether the session is being ended."""
        return self.since.startswith(b"-")


class Ended(NamedTuple):
    """The sessions that were ended, and how many were not because nobody here can tell what they are."""

    sessions: list[str]
    unreadable: int


class UserIndex:
    """The links from users to their sessions, one sorted set for each user."""

    def __init__(self, commands: Commands, records: Records, keys: KeySpace) -> None:
        self._commands = commands
        self._records = records
        self._keys = keys
        self._tidying: dict[bytes, asyncio.Task[None]] = {}

    async def aclose(self) -> None:
        """End what goes on beside the calls."""
        for task in self._tidying.values():
            task.cancel()
        await asyncio.gather(*self._tidying.values(), return_exceptions=True)

    async def link(self, user_id: str, session_id: str, absolute: float | None, *, tidy: bool = True) -> None:
        """Note that the session is this user's, or still is; one that is being ended stays so.

        A new record is stored before its link, a change of user in a record after it. So a process that dies
        in between leaves a record whose id nobody knows, or a link that leads to nothing of this user's.
        Afterwards a few old links may be looked at, and nobody waits for that: links that lead nowhere go,
        and sessions that somebody began to end are ended.
        """
        key = self._keys.user(user_id)
        looks = _LOOKS if tidy else b"0"
        links = _links(
            await self._commands.run(LINK, key, session_id.encode(), _lives(absolute), _SETTLES, looks)
        )
        if links:
            self._later(key, partial(self._look, user_id, links))

    async def link_all(self, users: Mapping[str, str], absolute: float | None, *, tidy: bool = True) -> None:
        """`link` for many: users by session id. One round trip."""
        links = [self.link(user, name, absolute, tidy=tidy) for name, user in users.items()]
        await asyncio.gather(*links)

    async def succeed(
        self, old: str, new: str, was: str | None, user: str | None, absolute: float | None
    ) -> bytes | None:
        """Link the new id of a session that moves, and was another user's before or the same one's.

        The time of the old link, which stays until `unlink`; empty where nobody was signed in. None where the
        session was ended or is being ended: it must not move.
        """
        if user is not None and user != was:
            await self.link(user, new, absolute)
        if was is None:
            return b""
        successor = new.encode() if user == was else b""
        reply = await self._commands.run(
            SUCCEED, self._keys.user(was), old.encode(), successor, _lives(absolute)
        )
        return cast("bytes | None", reply)

    def unlink(self, user_id: str, link: Link) -> None:
        """Forget the id that a session had; written, not waited for. A link made anew meanwhile stays."""
        self._settle(user_id, [(link, GONE)]).add_done_callback(forget)

    def withdraw(self, user_id: str, session_id: str) -> asyncio.Future[Reply]:
        """Forget an id that nobody was told."""
        return self._commands.command(b"ZREM", self._keys.user(user_id), session_id.encode(), fits=is_number)

    async def members(self, user_id: str) -> list[str]:
        """The ids that are linked, sorted; also of sessions that have ended."""
        reply = await self._commands.command(b"ZRANGE", self._keys.user(user_id), b"0", b"-1", fits=is_list)
        return sorted(member.decode() for member in cast("list[bytes]", reply))

    async def end(self, names: Sequence[str], keep: str | None) -> int:
        """End all sessions of a user but `keep`; how many were ended by this call.

        `names` are those by which the user may be known. What another call, or a sign-in that finishes its
        work, ends at the same time counts there. The links of all names are marked first, then the
        records deleted, then the links forgotten. A process that dies in between leaves marks:
        sessions that can no longer move, and that the next call or the next sign-ins end.
        `SessionStoreError` where what lies at a link is of no format that is known here: all others
        are ended then, and the link stays marked.
        """
        marked: dict[str, list[Link]] = {}
        for name in (*names, *names[:-1]):  # once more: from one to another that had its turn
            reply = await self._commands.run(MARK, self._keys.user(name), (keep or "").encode())
            marked[name] = _links(reply)
        ended, unreadable = 0, 0
        for name, links in marked.items():
            for start in range(0, len(links), AT_ONCE):
                done = await self._look(name, links[start : start + AT_ONCE], names)
                ended, unreadable = ended + len(done.sessions), unreadable + done.unreadable
        if unreadable:
            raise SessionStoreError(
                f"{ended} sessions were ended; what lies under {unreadable} more ids of this user is in no"
                " format of this release and is left alone: end them by the release that wrote them"
            )
        return ended

    async def end_surplus(self, user_id: str, most: int, keep: str) -> list[str]:
        """End the longest idle sessions of a user, so that `most` are left with `keep`; the ids of the ended.

        One trip where the index names no more. Else all links are looked at, those that lead nowhere go, and
        one script decides how many of the others are too many and marks them, as `end` does. So of several
        sign-ins at once none ends what another one is ending.
        """
        key = self._keys.user(user_id)
        known = cast(int, await self._commands.command(b"ZCARD", key, fits=is_number))
        if known <= most:
            return []
        reply = await self._commands.command(b"ZRANGE", key, b"0", b"-1", b"WITHSCORES", fits=is_list)
        others: dict[str, float] = {}
        today = time.time()
        links = [link for link in _links(reply) if link.session_id != keep and not link.is_marked]
        for start in range(0, len(links), AT_ONCE):
            others |= await self._living(user_id, links[start : start + AT_ONCE], today)
        if len(others) < most:
            return []
        lines = "\n".join(by_idleness(others)).encode()
        marked = _links(await self._commands.run(SURPLUS, key, b"%d" % most, keep.encode(), lines))
        ended: list[str] = []
        for start in range(0, len(marked), AT_ONCE):
            ended += (await self._look(user_id, marked[start : start + AT_ONCE])).sessions
        return ended

    async def _living(self, user_id: str, links: Sequence[Link], today: float) -> dict[str, float]:
        """For how many seconds the sessions at these links are idle. Forgets links that lead nowhere."""
        found = await self._records.values([link.session_id for link in links])
        there = {
            link.session_id: value
            for link, value in zip(links, found, strict=True)
            if value is not None and verdict(value, link, user_id) == LIVES
        }
        gone = [(link, NOTHING) for link in links if link.session_id not in there]
        if gone:
            await self._settle(user_id, gone)
        idle = await asyncio.gather(*[self._records.idleness(*each, today) for each in there.items()])
        return dict(zip(there, idle, strict=True))

    async def _look(self, user_id: str, links: Sequence[Link], names: Sequence[str] = ()) -> Ended:
        """See what lies at these links, end what is to be ended, and note in the index what was found."""
        found = await self._records.values([link.session_id for link in links])
        known = (user_id, *names)
        verdicts = [(link, verdict(value, link, *known)) for link, value in zip(links, found, strict=True)]
        doomed = [link for link, word in verdicts if word == TO_END]
        replies = await self._records.delete([link.session_id for link in doomed])
        settled = [(link, word) for link, word in verdicts if word in (LIVES, NOTHING)]
        settled += [
            (link, GONE if reply == b"STORED" else NOTHING)
            for link, reply in zip(doomed, replies, strict=True)
            if reply != b"X"
        ]
        if settled:
            await self._settle(user_id, settled)
        ended = [link.session_id for link, reply in zip(doomed, replies, strict=True) if reply == b"STORED"]
        return Ended(ended, len(links) - len(settled))

    def _later(self, key: bytes, work: Callable[[], Awaitable[object]]) -> None:
        """Tidy the index at this key beside everything else, unless that is being done already."""
        if key not in self._tidying:
            task = self._tidying[key] = self._commands.loop.create_task(_without_faults(work))
            task.add_done_callback(lambda _: self._tidying.pop(key, None))

    def _settle(self, user_id: str, found: Sequence[tuple[Link, bytes]]) -> asyncio.Future[Reply]:
        lines = [b"%b\n%b\n%b\n" % (link.session_id.encode(), link.since, word) for link, word in found]
        return self._commands.run(SETTLE, self._keys.user(user_id), _SETTLES, b"".join(lines))


def verdict(value: bytes | None, link: Link, *names: str) -> bytes:
    """What a link comes to by what lies at its record, whatever the model.

    TO_END: the record is to be deleted, and NOTHING is there then. A record that does not say whose it is, is
    taken for what the link says: it may be one of another release. LEFT_ALONE: it is of no format that is
    known here.
    """
    if value is None:
        return NOTHING
    try:
        record = unpack(value).record
    except SessionStoreError:
        return LEFT_ALONE if link.is_marked else LIVES
    if user_of(record) not in names and id_of(record) == link.session_id:
        return NOTHING
    return TO_END if link.is_marked else LIVES


def _links(reply: Reply) -> list[Link]:
    """Ids and times, which a script gives in turn."""
    words = cast("list[bytes]", reply)
    return [Link(name.decode(), since) for name, since in zip(words[::2], words[1::2], strict=True)]


def _lives(absolute: float | None) -> bytes:
    """Without an absolute bound nobody knows how long the session lives on: the link must outlive it."""
    return milliseconds(LINKED_FOR if absolute is None else absolute + LINK_SETTLES)


async def _without_faults(work: Callable[[], Awaitable[object]]) -> None:
    with contextlib.suppress(SessionStoreError):
        await work()
