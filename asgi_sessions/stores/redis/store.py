"""Sessions in Redis or Valkey, shared by any number of processes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from functools import partial
from typing import cast

from ...errors import SessionStoreError
from ...record.model import SessionData
from ..checkout import Checkout, Lifetime, LockPolicy, Missing, Outcome, shorter
from . import commits
from .calls import NOT_OURS, NotSentError, forget
from .connections import Client
from .engine import Engine
from .index import Link
from .layout import NONCE, RETIRED_MS, header_of, milliseconds, next_version, pack_value, parse
from .leases import Lease
from .names import new_nonce, new_token
from .queue import After
from .records import RedisRecords
from .replies import STORED, Reply
from .scripts import COMMIT, COMMIT_AGAIN, CREATE, REBOUND, REMOVE, RENEW, Keys, pack_args
from .terms import Terms
from .waiters import Acquired

_STORED = Outcome.STORED  # bound once: looking up an Enum's member is slow on Python 3.11
_HAND_OVER, _KEEP, _LET_GO = After.HAND_OVER, After.KEEP, After.LET_GO
_MISSING = {b"A": Missing.ABSENT, b"R": Missing.RETIRED, b"X": Missing.UNREADABLE}


class RedisSessionStore(RedisRecords):
    """Sessions in Redis >= 6.2 or Valkey: one node, Sentinel or a cluster, through redis-py.

    `client_or_url` is a `redis.asyncio` client, which serves as a description (its connections are not
    used), or a URL: redis:// or valkey://, with TLS rediss:// or valkeys://; unix://;
    redis+sentinel://host:port,host:port/service; redis+cluster://host:port,host:port; the last two with TLS
    as rediss+…. `prefix` begins every key. `default_ttl` (seconds) is for records that are
    stored without a ttl. `socket_timeout` (seconds) is the longest that any call takes; None: what the
    client or the URL says, else 5.

    One object serves any number of event loops, one after the other or in several threads, on asyncio. The
    leases of what is checked out are renewed by themselves.
    """

    def __init__(
        self,
        client_or_url: Client | str,
        prefix: str = "session:",
        default_ttl: float = 3600,
        *,
        model: type[SessionData] = SessionData,
        socket_timeout: float | None = None,
    ) -> None:
        super().__init__(client_or_url, prefix, default_ttl, model, socket_timeout)

    async def checkout(
        self, session_id: str, lock: LockPolicy | None, lifetime: Lifetime | None, *, passive: bool = False
    ) -> Checkout | Missing:
        keys = self._keys.of(session_id)
        engine = self._engines.here() or await self._engines.get()
        if lock is None:
            taken = await self._load(engine, session_id, keys)
        else:
            idle = None if lifetime is None else lifetime.idle
            terms = engine.terms(lock, idle, passive)
            # Who waits behind others of this process has arrived. Without a rule of an idle timeout Redis is
            # not told: such a caller counts from when it has the lock.
            arrived = None if passive or idle is None else partial(engine.touch, keys, terms.activity)
            taken = await self._lock(engine, session_id, keys, terms, arrived)
        if lifetime is None or isinstance(taken, Missing) or shorter(lifetime, taken) is None:
            return taken
        bound = await self._shorten(engine, keys, taken, lifetime)
        return bound or await self.checkout(session_id, lock, lifetime, passive=passive)

    async def keep_alive(self, checkout: Checkout) -> None:
        if checkout.idle is not None:
            engine = self._engines.here() or await self._engines.get()
            engine.touch(self._held(engine, checkout)[0])

    async def create(
        self,
        session_id: str,
        record: bytes,
        lifetime: Lifetime,
        lock: LockPolicy | None,
        user: str | None = None,
    ) -> Checkout | None:
        """See `RequestOperations.create`; the link to `user` comes second, as nobody knows the id yet."""
        engine = self._engines.here() or await self._engines.get()
        created = await self._create(engine, session_id, record, lifetime, lock)
        if created is not None and user is not None:
            try:
                await self._index.link(engine, user, session_id, lifetime.absolute)
            except BaseException:
                self._take_back(engine, created, user)
                raise
        return created

    async def move(
        self,
        checkout: Checkout,
        session_id: str,
        record: bytes,
        *,
        lifetime: Lifetime | None,
        lock: LockPolicy | None,
        was: str | None,
        user: str | None,
    ) -> Outcome:
        """Store the record under a new id and retire the one that was checked out.

        First the new record, then its link, then the old one's removal. Whoever dies in between leaves the
        old session whole and linked, and beside it at most a record whose id nobody was told; a sign-out
        takes both. GONE, too, where a sign-out has begun: then the old session ends. A fault during the
        removal leaves `checkout.successor`, without a lock, and nobody knows whether the old record is there.
        """
        engine = await self._engines.get()
        absolute = checkout.expires_in if lifetime is None else lifetime.absolute
        created = await self._create(engine, session_id, record, lifetime, lock, checkout)
        if created is None:
            return Outcome.CONFLICT
        try:
            since = await self._index.succeed(engine, checkout.session_id, session_id, was, user, absolute)
        except BaseException:
            self._take_back(engine, created, user)
            raise
        if since is None:  # being ended, or the link was lost: the session must not move
            self._take_back(engine, created, user)
            outcome = await self.discard(checkout)
            return Outcome.GONE if outcome is _STORED else outcome
        outcome = await self._retire(engine, checkout, created)
        if outcome is not _STORED:
            self._take_back(engine, created, user)
        elif was is not None:
            self._index.unlink(engine, was, Link(checkout.session_id, since))
        return outcome

    async def _retire(self, engine: Engine, checkout: Checkout, created: Checkout) -> Outcome:
        """Remove the old record; it has a successor if that was done, or may have been."""
        checkout.successor = created
        try:
            outcome = await self._discard(engine, checkout, RETIRED_MS)
        except BaseException:
            self._let_go(engine, created)
            raise
        if outcome is not _STORED:
            checkout.successor = None
        return outcome

    async def _create(
        self,
        engine: Engine,
        session_id: str,
        record: bytes,
        lifetime: Lifetime | None,
        lock: LockPolicy | None,
        follows: Checkout | None = None,
    ) -> Checkout | None:
        """Without a lifetime the record keeps the bounds of the one that it `follows`."""
        keys = self._keys.of(session_id)
        terms = engine.unlocked if lock is None else engine.terms(lock)
        token = b"" if lock is None else new_token()
        rule = lifetime or Lifetime()
        header = header_of(follows.version.encode()) if lifetime is None and follows is not None else b""
        args = milliseconds(rule.absolute), milliseconds(rule.idle), token, terms.lease_ms, header
        try:
            nonce = new_nonce()
            reply = await engine.run(CREATE, keys.record, keys.lock, nonce, record, *args, about=nonce)
            created = _created(session_id, record, reply)
        except BaseException:
            if token:
                engine.let_go(keys, token, terms)
            raise
        if created is not None and token:
            created.token = token.decode()
            created.seal = engine.leases.hold(keys, token, terms, engine.loop.time(), terms.lease)
        return created

    def _take_back(self, engine: Engine, created: Checkout, user: str | None) -> None:
        """Remove a record whose id nobody was told, and its link; written, not waited for."""
        self._remove(engine, created, b"0").add_done_callback(forget)
        if user is not None:
            self._index.withdraw(engine, user, created.session_id)

    async def commit(self, checkout: Checkout, record: bytes, *, release: bool) -> Outcome:
        engine = self._engines.here() or await self._engines.get()
        keys, token, terms = self._held(engine, checkout)
        was, unsure = checkout.version.encode(), checkout.unsure
        version = next_version(was)
        after = engine.queues.commit_begins(keys, token) if release else _KEEP
        flags = terms.commit
        if after is _LET_GO:
            engine.leases.drop(token)  # a renewal that is answered later must not look like a lost lease
            flags = terms.commit_and_release
        packed = commits.pack(keys, token, was, version, record, flags, unsure)
        script = COMMIT if unsure is None else COMMIT_AGAIN
        reply = engine.call(script, keys.record, packed, STORED + version[:NONCE])
        try:
            if after is _HAND_OVER:
                return await self._commit_and_hand_over(engine, checkout, reply, version, record, unsure)
            word = commits.word_of(await reply)
        except NotSentError:
            raise
        except BaseException:  # only now: what is under way is not the loaded version to another commit
            checkout.unsure = commits.one_more(checkout.unsure, version)
            raise
        outcome = commits.noted(checkout, word, version, record, unsure)
        if not release and word in commits.UNLOCKED:
            engine.leases.drop(token)
            engine.queues.leave(keys, token)
            release = outcome is not _STORED
        if release:
            checkout.token = None
        return outcome

    async def _commit_and_hand_over(
        self,
        engine: Engine,
        checkout: Checkout,
        reply: asyncio.Future[Reply],
        version: bytes,
        record: bytes,
        unsure: str | None,
    ) -> Outcome:
        """The lock stays with this process, where the next request goes on with what was stored."""
        keys, token, terms = self._held(engine, checkout)
        sent = engine.loop.time()
        try:
            word = commits.word_of(await reply)
            outcome = commits.noted(checkout, word, version, record, unsure)
        except BaseException:
            engine.queues.hand_over_failed(keys, token, terms)
            raise
        lease, now = engine.leases.get(token), engine.loop.time()
        stored = None
        if word == b"STORED" and lease is not None and now - sent < (lease.ends - now) / 2:
            stored = Acquired(token, pack_value(version, record), lease.ahead, lease.ends - now, 0.0)
        engine.queues.handed_over(keys, token, terms, stored)
        checkout.token = None
        return outcome

    async def discard(self, checkout: Checkout) -> Outcome:
        return await self._discard(await self._engines.get(), checkout, b"0")

    async def _discard(self, engine: Engine, checkout: Checkout, retired: bytes) -> Outcome:
        outcome = commits.outcome_of(await self._remove(engine, checkout, retired))
        checkout.token = None
        return commits.as_far_as_known(outcome, checkout.unsure)

    def _remove(self, engine: Engine, checkout: Checkout, retired: bytes) -> asyncio.Future[Reply]:
        """Ask for the record's removal, and remember its id as replaced for so long (ms)."""
        keys, token, terms = self._held(engine, checkout)
        engine.leases.drop(token)
        name = new_nonce()  # by which the call knows its own retry
        args = pack_args(token, commits.known(checkout), retired, terms.claim_ms, engine.clustered, name)
        reply = engine.call(REMOVE, keys.record, REMOVE.by_sha + keys.packed + args, STORED + name)
        engine.queues.leave(keys, token)
        return reply

    async def release(self, checkout: Checkout) -> None:
        if checkout.token is not None:
            engine = self._engines.here() or await self._engines.get()
            self._let_go(engine, checkout)
            await engine.written(self._keys.of(checkout.session_id).record)

    def _let_go(self, engine: Engine, checkout: Checkout) -> None:
        keys, token, terms = self._held(engine, checkout)
        checkout.token = None
        engine.queues.release(keys, token, terms)

    async def renew(self, checkouts: Sequence[Checkout]) -> list[bool]:
        """Prolong the leases now; False for each that was lost. The heartbeat does so by itself."""
        engine = await self._engines.get()
        replies = await asyncio.gather(*[self._renew(engine, checkout) for checkout in checkouts])
        return [reply == 1 for reply in replies]

    def _renew(self, engine: Engine, checkout: Checkout) -> asyncio.Future[Reply]:
        keys, token, terms = self._held(engine, checkout)
        return engine.run(RENEW, keys.lock, token, terms.lease_ms)

    def _held(self, engine: Engine, checkout: Checkout) -> tuple[Keys, bytes, Terms]:
        """What a checkout was taken on; without a lock the version alone is compared."""
        lease = checkout.seal
        if checkout.token is not None and isinstance(lease, Lease):
            return lease.keys, lease.token, lease.terms
        return self._keys.of(checkout.session_id), b"", engine.unlocked

    async def _load(self, engine: Engine, session_id: str, keys: Keys) -> Checkout | Missing:
        asked = engine.loop.time()
        found = engine.found(await engine.take(keys, b"", engine.unlocked, asked), asked)
        if not isinstance(found, tuple):
            return _missing(found)
        value, ahead = found
        return _checkout(session_id, value, engine.loop.time() * 1000 + ahead) or Missing.UNREADABLE

    async def _lock(
        self,
        engine: Engine,
        session_id: str,
        keys: Keys,
        terms: Terms,
        arrived: Callable[[], None] | None,
    ) -> Checkout | Missing:
        grant = await engine.queues.acquire(keys, terms, arrived)
        if isinstance(grant, bytes):
            return _missing(grant)
        now = engine.loop.time()
        taken = _checkout(session_id, grant.value, now * 1000 + grant.ahead)
        if taken is None:
            engine.queues.release(keys, grant.token, terms)
            return Missing.UNREADABLE
        taken.seal = engine.leases.hold(keys, grant.token, terms, now, grant.left, grant.ahead)
        taken.token, taken.waited = grant.token.decode(), grant.waited
        return taken

    async def _shorten(
        self, engine: Engine, keys: Keys, taken: Checkout, rule: Lifetime
    ) -> Checkout | Missing | None:
        """Give a record the shorter bounds of a rule that came after it; None where the lock was lost.

        Without a lock nothing is written, or a holder's commit would find another version: what has ended by
        the rule is ABSENT, and the bounds are those of this checkout alone.
        """
        token = self._held(engine, taken)[1]
        asked = engine.loop.time()
        args = pack_args(token, milliseconds(rule.absolute), milliseconds(rule.idle))
        packed = REBOUND.by_sha + keys.packed + args
        try:
            found = engine.found(await engine.call(REBOUND, keys.record, packed, keys.mark), asked)
        except BaseException:
            await self.release(taken)
            raise
        if isinstance(found, bytes):
            engine.leases.drop(token)
            engine.queues.leave(keys, token)
            return None if found == b"B" else _missing(found)
        value, ahead = found
        bound = _checkout(taken.session_id, value, engine.loop.time() * 1000 + ahead)
        if bound is None:
            await self.release(taken)
            return Missing.UNREADABLE
        bound.seal, bound.token, bound.waited = taken.seal, taken.token, taken.waited
        less = shorter(rule, bound)  # without a lock
        if less is not None:
            bound.expires_in, bound.idle = less.absolute, less.idle
        return bound


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
    """None where the header is not quite ours: the scripts look at its outline only. `now`: ms, by Redis."""
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
