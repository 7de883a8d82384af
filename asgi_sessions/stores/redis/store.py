"""Sessions in Redis or Valkey, shared by any number of processes."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, cast

from ...data import SessionData
from ...errors import SessionStoreError
from ..checkout import Checkout, Lifetime, Missing, Outcome
from ..local import LockPolicy
from .calls import NOT_OURS, Reply, forget
from .connections import Client
from .engine import Engine
from .index import Link
from .layout import (
    HEADER,
    HEADER_SIZE,
    NO_IDLE,
    RETIRED_MS,
    milliseconds,
    next_version,
    pack_value,
)
from .leases import Lease
from .names import new_nonce, new_token
from .records import RedisRecords
from .scripts import COMMIT, CREATE, REMOVE, RENEW, Keys, pack_args
from .terms import Terms

_STORED = Outcome.STORED  # bound once: looking up an Enum's member is slow on Python 3.11
_MISSING = {b"A": Missing.ABSENT, b"R": Missing.RETIRED, b"X": Missing.UNREADABLE}
_OUTCOMES = {
    b"STORED": Outcome.STORED,
    b"GONE": Outcome.GONE,
    b"CONFLICT": Outcome.CONFLICT,
    b"LOST": Outcome.LOST,
}


class RedisSessionStore(RedisRecords):
    """Sessions in Redis >= 6.2 or Valkey: one node, Sentinel or a cluster, through redis-py.

    `client_or_url` is a `redis.asyncio` client, which serves as a description (its connections are not
    used), or a URL: redis://, rediss://, unix://, redis+sentinel://host:port,host:port/service,
    redis+cluster://host:port. `prefix` begins every key. `default_ttl` (seconds) is for records that are
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
        self, session_id: str, lock: LockPolicy | None, lifetime: Lifetime | None
    ) -> Checkout | Missing:
        keys = self._keys.of(session_id)
        engine = self._engines.here() or await self._engines.get()
        if lock is None:
            return await self._load(engine, session_id, keys)
        terms = engine.terms(lock)
        grant = await engine.queues.acquire(keys, terms)
        if isinstance(grant, bytes):
            return _missing(grant)
        now = engine.loop.time()
        taken = _checkout(session_id, grant.value, now * 1000 + grant.ahead)
        if taken is None:
            engine.queues.release(keys, grant.token, terms)
            return Missing.UNREADABLE
        taken.seal = engine.leases.hold(keys, grant.token, terms, now, grant.left)
        taken.token, taken.waited = grant.token.decode(), grant.waited
        return taken

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
            outcome = await self.discard(checkout, retire=False)
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
            outcome = await self.discard(checkout, retire=True)
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
        """Without a lifetime the record keeps the timeouts of the one that it `follows`."""
        keys = self._keys.of(session_id)
        terms = engine.unlocked if lock is None else engine.terms(lock)
        token = b"" if lock is None else new_token()
        rule, header = lifetime or Lifetime(), b""
        if lifetime is None and follows is not None:
            header = pack_value(follows.version.encode(), b"")
        times = milliseconds(rule.absolute), milliseconds(rule.idle)
        args = new_nonce(), record, *times, token, terms.lease_ms, header
        try:
            reply = await engine.run(CREATE, keys.record, keys.lock, *args)
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
        was = checkout.version.encode()
        version = next_version(was)
        bequeath = release and engine.queues.settle(keys, token)
        flags = terms.commit
        if release and not bequeath:
            engine.leases.drop(token)  # a renewal that is answered later must not look like a lost lease
            flags = terms.commit_and_release
        reply = engine.call(COMMIT, keys.record, _commit(keys, token, was, version, record, flags))
        if bequeath:
            return await self._bequeath(engine, checkout, reply, version, record)
        outcome = _outcome(await reply)
        if outcome is _STORED:
            checkout.record, checkout.version = record, version.decode()
        elif not release and outcome is not Outcome.CONFLICT:
            engine.leases.drop(token)
            engine.queues.leave(keys, token)
            release = True
        if release:
            checkout.token = None
        return outcome

    async def _bequeath(
        self,
        engine: Engine,
        checkout: Checkout,
        reply: asyncio.Future[Reply],
        version: bytes,
        record: bytes,
    ) -> Outcome:
        """The lock stays with this process, where the next request goes on with what was stored."""
        keys, token, terms = self._held(engine, checkout)
        sent = engine.loop.time()
        try:
            outcome = _outcome(await reply)
        except BaseException:
            engine.queues.disinherit(keys)
            if checkout.token is None:  # released meanwhile, by another task of the request
                engine.queues.release(keys, token, terms)
            raise
        idle = not version.endswith(NO_IDLE)  # the next request has to restart it
        stored = pack_value(version, record) if outcome is _STORED and not idle else None
        engine.queues.inherit(keys, token, terms, stored, engine.loop.time() - sent)
        checkout.token = None
        return outcome

    async def discard(self, checkout: Checkout, *, retire: bool) -> Outcome:
        engine = await self._engines.get()
        reply = self._remove(engine, checkout, RETIRED_MS if retire else b"0")
        outcome = _outcome(await reply)
        checkout.token = None
        return outcome

    def _remove(self, engine: Engine, checkout: Checkout, retired: bytes) -> asyncio.Future[Reply]:
        keys, token, terms = self._held(engine, checkout)
        engine.leases.drop(token)
        name = new_nonce()  # by which the call knows its own retry
        version = checkout.version.encode()
        args = pack_args(token, version, retired, terms.claim_ms, engine.clustered, name)
        reply = engine.call(REMOVE, keys.record, REMOVE.by_sha + keys.packed + args)
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
        engine.leases.drop(token)
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


def _commit(keys: Keys, token: bytes, was: bytes, version: bytes, record: bytes, flags: bytes) -> bytes:
    """A call of `COMMIT`, packed; versions have 44 bytes."""
    return b"%b%b$%d\r\n%b\r\n$50\r\nasgi1:%b\r\n$%d\r\nasgi1:%b:%b\r\n%b" % (
        COMMIT.by_sha, keys.packed, len(token), token, was,
        HEADER_SIZE + len(record), version, record, flags,
    )  # fmt: skip


def _missing(word: bytes) -> Missing:
    """`SessionStoreError` for what no script answers."""
    if word in _MISSING:
        return _MISSING[word]
    raise SessionStoreError(NOT_OURS)


def _outcome(reply: Reply) -> Outcome:
    """`SessionStoreError` for what no script answers."""
    if isinstance(reply, bytes) and reply in _OUTCOMES:
        return _OUTCOMES[reply]
    raise SessionStoreError(NOT_OURS)


def _created(session_id: str, record: bytes, reply: Reply) -> Checkout | None:
    """The new record; None where the id is taken. `SessionStoreError` for what no script answers."""
    if reply == [b"E"]:
        return None
    if isinstance(reply, list) and len(reply) == 3 and reply[0] == b"C":
        version, now = cast("list[Any]", reply[1:])
        created = _checkout(session_id, pack_value(version, record), now)
        if created is not None:
            return created
    raise SessionStoreError(NOT_OURS)


def _checkout(session_id: str, value: bytes, now: float) -> Checkout | None:
    """None where the header is not quite ours: the scripts look at its outline only."""
    header = HEADER.match(value)
    if header is None:
        return None
    ends = int(header[2])
    version, record = header[1].decode(), value[HEADER_SIZE:]
    return Checkout(session_id, record, version, None, (ends - now) / 1000 if ends else None)
