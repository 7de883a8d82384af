"""Checkouts of one event loop: records are taken out, written back and let go."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial
from typing import cast

from ....errors import SessionStoreError
from ...checkout import Checkout, Lifetime, LockPolicy, Missing, Outcome, shorter
from ...tokens import new_nonce, new_token
from ..commands import commits
from ..commands.commands import Commands
from ..commands.header import (
    LEADS_NO_MORE_MS,
    NONCE,
    RETIRED_MS,
    header_of,
    milliseconds,
    next_version,
    pack_value,
    parse,
)
from ..commands.keys import Keys, KeySpace
from ..commands.scripts import (
    BOUND,
    COMMIT,
    COMMIT_AGAIN,
    COMMIT_UNLOCKED,
    CREATE,
    FOLLOW,
    REMOVE,
    RENEW,
    SHORTEN,
    TOUCH,
)
from ..commands.timing import LockTiming
from ..commands.who import taken_here
from ..connection.call import NotSentError
from ..connection.replies import NOT_OURS, STORED, Reply
from ..connection.resp import pack_args
from .leases import Lease, Leases
from .locks import Locks
from .queue import After
from .releases import Releases
from .waiter import Acquired

_STORED = Outcome.STORED  # bound once: looking up an Enum's member is slow on Python 3.11
_HAND_OVER, _KEEP, _LET_GO = After.HAND_OVER, After.KEEP, After.LET_GO
_MISSING = {b"A": Missing.ABSENT, b"R": Missing.RETIRED, b"X": Missing.UNREADABLE}


class Checkouts:
    """What `RequestOperations` says of a record and its lock; links to users are made above."""

    def __init__(
        self, commands: Commands, locks: Locks, releases: Releases, leases: Leases, keys: KeySpace
    ) -> None:
        self._commands = commands
        self._locks = locks
        self._releases = releases
        self._leases = leases
        self._keys = keys
        self._loop = commands.loop

    # -- out ----------------------------------------------------------------------------------------------

    async def take(
        self, session_id: str, lock: LockPolicy | None, lifetime: Lifetime | None, passive: bool
    ) -> Checkout | Missing:
        """Lock, unless `lock` is None, and load."""
        keys = self._keys.of(session_id)
        if lock is None:
            taken = await self._load(session_id, keys)
        else:
            idle = None if lifetime is None else lifetime.idle
            timing = self._commands.timing(lock, idle, passive)
            # A request that waits behind others of this process has arrived. Without a rule of an idle
            # timeout Redis is not told: such a request counts from when it has the lock.
            arrived = (
                None if passive or idle is None else partial(self._commands.touch, keys, timing.activity)
            )
            taken = self._locked(session_id, keys, timing, await self._locks.acquire(keys, timing, arrived))
        if lifetime is None or isinstance(taken, Missing) or shorter(lifetime, taken) is None:
            return taken
        bound = await self._shorten(keys, taken, lifetime)
        return bound or await self.take(session_id, lock, lifetime, passive)

    async def _load(self, session_id: str, keys: Keys) -> Checkout | Missing:
        commands, asked = self._commands, self._loop.time()
        found = commands.found(await commands.take(keys, b"", commands.unlocked, asked), asked)
        if not isinstance(found, tuple):
            return _missing(found)
        value, ahead = found
        return _checkout(session_id, value, self._loop.time() * 1000 + ahead) or Missing.UNREADABLE

    def _locked(
        self, session_id: str, keys: Keys, timing: LockTiming, acquired: Acquired | bytes
    ) -> Checkout | Missing:
        if isinstance(acquired, bytes):
            return _missing(acquired)
        now = self._loop.time()
        taken = _checkout(session_id, acquired.value, now * 1000 + acquired.ahead)
        if taken is None:
            self._locks.release(keys, acquired.token, timing)
            return Missing.UNREADABLE
        taken.seal = self._leases.hold(keys, acquired.token, timing, now, acquired.left, acquired.ahead)
        taken.token, taken.waited = acquired.token.decode(), acquired.waited
        return taken

    async def _shorten(self, keys: Keys, taken: Checkout, rule: Lifetime) -> Checkout | Missing | None:
        """Give a record the shorter bounds of a rule that came after it; None where the lock was lost.

        Without a lock nothing is written, because a holder's commit would find another version. Then a record
        that has ended by the rule is ABSENT, and the bounds are those of this checkout alone.
        """
        token = self._held(taken)[1]
        asked = self._loop.time()
        bounds = milliseconds(rule.absolute), milliseconds(rule.idle)
        args = pack_args(token, *bounds, self._commands.ended)
        call = self._commands.call(SHORTEN, keys.record, SHORTEN.by_sha + keys.packed + args, keys.mark)
        try:
            found = self._commands.found(await call, asked)
        except BaseException:
            self.let_go(taken)
            raise
        if isinstance(found, bytes):
            self._leases.drop(token)
            self._locks.leave(keys, token)
            return None if found == b"B" else _missing(found)
        value, ahead = found
        bound = _checkout(taken.session_id, value, self._loop.time() * 1000 + ahead)
        if bound is None:
            self.let_go(taken)
            return Missing.UNREADABLE
        bound.seal, bound.token, bound.waited = taken.seal, taken.token, taken.waited
        less = shorter(rule, bound)  # without a lock
        if less is not None:
            bound.expires_in, bound.idle = less.absolute, less.idle
        return bound

    def keep_alive(self, checkout: Checkout) -> None:
        """Restart the idle timeout; nobody waits for it."""
        if checkout.idle is not None:
            self._commands.touch(self._held(checkout)[0])

    async def arrived(self, checkout: Checkout) -> None:
        """Restart the idle timeout, and wait for that; a record without one gets its full life."""
        await self._commands.run(TOUCH, self._held(checkout)[0].record, b"0")

    async def create(
        self,
        session_id: str,
        record: bytes,
        lifetime: Lifetime | None,
        lock: LockPolicy | None,
        follows: Checkout | None = None,
    ) -> Checkout | None:
        """Store a new record, locked unless `lock` is None; None where the id exists.

        Without a lifetime the record keeps the bounds of the one that it `follows`.
        """
        commands, keys = self._commands, self._keys.of(session_id)
        timing = commands.unlocked if lock is None else commands.timing(lock)
        token = b"" if lock is None else new_token()
        rule = lifetime or Lifetime()
        header = header_of(follows.version.encode()) if lifetime is None and follows is not None else b""
        value = taken_here(token, commands.clock.text(self._loop.time())) if token else b""
        bounds = milliseconds(rule.absolute), milliseconds(rule.idle)
        args = *bounds, value, timing.lease_ms, header, milliseconds(rule.first)
        try:
            nonce = new_nonce()
            reply = await commands.run(CREATE, keys.record, keys.lock, nonce, record, *args, about=nonce)
            created = _created(session_id, record, reply)
        except BaseException:
            if token:
                self._releases.let_go(keys, token, timing)
            raise
        if created is not None and token:
            created.token = token.decode()
            created.seal = self._leases.hold(keys, token, timing, self._loop.time(), timing.lease)
        return created

    # -- back ---------------------------------------------------------------------------------------------

    async def commit(self, checkout: Checkout, record: bytes, release: bool) -> Outcome:
        """Write the record if lock, version and record are still what was checked out."""
        keys, token, timing = self._held(checkout)
        was, unsure = checkout.version.encode(), checkout.unsure
        version = next_version(was)
        after = self._locks.commit_begins(keys, token) if release else _KEEP
        flags = timing.commit
        if after is _HAND_OVER:
            flags = pack_args(b"", self._locks.next_holder(keys))
        elif after is _LET_GO:
            self._leases.drop(token)  # a renewal that is answered later must not look like a lost lease
            flags = timing.commit_and_release
        packed = commits.pack(keys, token, was, version, record, flags, unsure)
        script = COMMIT if unsure is None else COMMIT_AGAIN
        reply = self._commands.call(script, keys.record, packed, STORED + version[:NONCE])
        try:
            if after is _HAND_OVER:
                return await self._commit_and_hand_over(checkout, reply, version, record, unsure)
            word = commits.word_of(await reply)
        except BaseException as error:
            _doubt(checkout, version, error)
            raise
        outcome = commits.noted(checkout, word, version, record, unsure)
        if not release and word in commits.UNLOCKED:
            self._leases.drop(token)
            self._locks.leave(keys, token)
            release = outcome is not _STORED
        if release:
            checkout.token = None
        return outcome

    async def _commit_and_hand_over(
        self,
        checkout: Checkout,
        reply: asyncio.Future[Reply],
        version: bytes,
        record: bytes,
        unsure: str | None,
    ) -> Outcome:
        """The lock stays with this process, where the next request goes on with what was stored."""
        keys, token, timing = self._held(checkout)
        sent = self._loop.time()
        try:
            word = commits.word_of(await reply)
            outcome = commits.noted(checkout, word, version, record, unsure)
        except BaseException:
            self._locks.hand_over_failed(keys, token, timing)
            raise
        lease, now = self._leases.get(token), self._loop.time()
        stored = None
        if word == b"STORED" and lease is not None and now - sent < (lease.ends - now) / 2:
            stored = Acquired(token, pack_value(version, record), lease.ahead, lease.ends - now, 0.0)
        self._locks.handed_over(keys, token, timing, stored)
        checkout.token = None
        return outcome

    async def commit_unlocked(self, checkout: Checkout, record: bytes) -> Outcome:
        """Write the record if nobody holds the lock and nobody has changed it since it was loaded."""
        keys, was, unsure = self._keys.of(checkout.session_id), checkout.version.encode(), checkout.unsure
        version = next_version(was)
        packed = commits.pack_unlocked(keys, was, version, record, unsure)
        try:
            reply = await self._commands.call(COMMIT_UNLOCKED, keys.record, packed, STORED + version[:NONCE])
        except BaseException as error:
            _doubt(checkout, version, error)
            raise
        outcome = commits.noted(checkout, commits.word_of(reply), version, record, unsure)
        if outcome is Outcome.BUSY:
            self._locks.found_taken(keys)
        return outcome

    async def bound(self, checkout: Checkout, lifetime: Lifetime) -> Outcome:
        """Give the record other bounds if it is still what was checked out; the lock stays."""
        keys, token, _ = self._held(checkout)
        nonce = new_nonce()
        bounds = milliseconds(lifetime.absolute), milliseconds(lifetime.idle)
        args = pack_args(token, commits.known(checkout), *bounds, nonce)
        call = self._commands.call(BOUND, keys.record, BOUND.by_sha + keys.packed + args, nonce)
        try:
            reply = await call
        except BaseException as error:
            _doubt(checkout, nonce, error)
            raise
        if isinstance(reply, bytes):
            return commits.as_far_as_known(commits.outcome_of(reply), checkout.unsure)
        found = _created(checkout.session_id, checkout.record, reply)
        assert found is not None  # noqa: S101  # the reply fits
        checkout.is_now(found)
        checkout.unsure = None
        return _STORED

    async def successor_of(self, session_id: str) -> str | None:
        """The id to which a replaced one still leads."""
        keys, about = self._keys.of(session_id), session_id.encode()
        reply = await self._commands.run(FOLLOW, keys.retired, about, LEADS_NO_MORE_MS, about=about + b" ")
        return None if reply is None else cast(bytes, reply)[len(about) + 1 :].decode()

    async def discard(
        self, checkout: Checkout, retired: bytes = b"0", successor: str | None = None
    ) -> Outcome:
        """Delete the record, and remember its id as replaced for so long (ms), perhaps by which one."""
        outcome = commits.outcome_of(await self._remove(checkout, retired, successor))
        checkout.token = None
        return commits.as_far_as_known(outcome, checkout.unsure)

    async def retire(self, checkout: Checkout, successor: Checkout, leads: bool) -> Outcome:
        """Remove a record that has a successor.

        `checkout.successor` is set if that was done, or may have been.
        """
        checkout.successor = successor
        try:
            outcome = await self.discard(checkout, RETIRED_MS, successor.session_id if leads else None)
        except BaseException:
            self.let_go(successor)
            raise
        if outcome is not _STORED:
            checkout.successor = None
        return outcome

    def remove(self, checkout: Checkout) -> asyncio.Future[Reply]:
        """Ask for the record's removal; written, not waited for."""
        return self._remove(checkout, b"0", None)

    def _remove(self, checkout: Checkout, retired: bytes, successor: str | None) -> asyncio.Future[Reply]:
        commands = self._commands
        keys, token, timing = self._held(checkout)
        self._leases.drop(token)
        name = new_nonce()  # by which the call knows its own retry
        versions, leads_to = commits.known(checkout), (successor or "").encode()
        args = pack_args(
            token, versions, retired, timing.claim_ms, commands.clustered, name, leads_to, commands.ended
        )
        reply = commands.call(REMOVE, keys.record, REMOVE.by_sha + keys.packed + args, STORED + name)
        self._locks.leave(keys, token)
        return reply

    # -- the lock -----------------------------------------------------------------------------------------

    async def release(self, checkout: Checkout) -> None:
        """Let the lock go; return when that is on its way."""
        self.let_go(checkout)
        await self._commands.written(self._keys.of(checkout.session_id).record)

    def let_go(self, checkout: Checkout) -> None:
        """Pass the lock on; nothing where none is held."""
        if checkout.token is not None:
            keys, token, timing = self._held(checkout)
            checkout.token = None
            self._locks.release(keys, token, timing)

    async def renew(self, checkouts: Sequence[Checkout]) -> list[bool]:
        """Prolong the leases now; False for each that was lost."""
        held = map(self._held, checkouts)
        calls = [self._commands.run(RENEW, keys.lock, token, timing.lease_ms) for keys, token, timing in held]
        return [reply == 1 for reply in await asyncio.gather(*calls)]

    def _held(self, checkout: Checkout) -> tuple[Keys, bytes, LockTiming]:
        """What a checkout was taken on; without a lock the version alone is compared."""
        lease = checkout.seal
        if checkout.token is not None and isinstance(lease, Lease):
            return lease.keys, lease.token, lease.timing
        return self._keys.of(checkout.session_id), b"", self._commands.unlocked


def _doubt(checkout: Checkout, version: bytes, error: BaseException) -> None:
    """Remember a version that may be stored, unless nothing was sent.

    Only now: while the commit was under way no other one could take this version for the loaded one.
    """
    if not isinstance(error, NotSentError):
        checkout.unsure = commits.one_more(checkout.unsure, version)


def _missing(word: bytes) -> Missing:
    """`SessionStoreError` for what no script answers."""
    if word in _MISSING:
        return _MISSING[word]
    raise SessionStoreError(NOT_OURS)


def _created(session_id: str, record: bytes, reply: Reply) -> Checkout | None:
    """The record that was made, None where the id is taken; `SessionStoreError` for a reply not ours."""
    if reply == [b"E"]:
        return None
    if isinstance(reply, list) and len(reply) == 3 and reply[0] == b"C":
        created = _checkout(session_id, pack_value(cast(bytes, reply[1]), record), cast(int, reply[2]))
        if created is not None:
            return created
    raise SessionStoreError(NOT_OURS)


def _checkout(session_id: str, value: bytes, now: float) -> Checkout | None:
    """None where the header is not quite ours: scripts look at its outline only. `now`: ms, by Redis."""
    stored = parse(value)
    if stored is None:
        return None
    record, version, ends, idle, began = stored
    return Checkout(
        session_id,
        record,
        version.decode(),
        None,
        expires_in=(ends - now) / 1000 if ends else None,
        idle=idle / 1000 if idle else None,
        age=(now - began) / 1000 if began else None,
    )
