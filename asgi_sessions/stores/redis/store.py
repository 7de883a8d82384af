"""Sessions in Redis or Valkey, shared by any number of processes."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Sequence
from typing import cast

from ...data import SessionData
from ...errors import SessionStoreError
from ..checkout import Checkout, Lifetime, Missing, Outcome
from ..local import LockPolicy
from .connections import Client
from .engine import Engine
from .layout import RETIRED_MS, milliseconds, new_nonce, pack_next, unpack
from .records import RedisRecords
from .scripts import ACQUIRE, COMMIT, CREATE, REMOVE, RENEW
from .transport import Reply
from .waiters import CLAIM, NO_CHANNEL, Keys, Terms, Turn, new_token

_CLAIM_MS = str(round(CLAIM * 1000))
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
        keys = self._keys_of(session_id)
        engine = await self._engines.get()
        if lock is None:
            return await self._load(engine, session_id, keys)
        grant = await Turn(engine, keys, _terms(lock)).take()
        if isinstance(grant, bytes):
            return _MISSING[grant]
        taken = _checkout(session_id, grant.value, grant.now)
        if taken is None:
            engine.let_go(keys, grant.token, milliseconds(min(CLAIM, lock.timeout)))
            return Missing.UNREADABLE
        engine.leases.hold(grant.token, keys[1], lock.timeout, lock.max_hold, grant.left)
        taken.token, taken.seal, taken.waited = grant.token.decode(), _seal(lock), grant.waited
        return taken

    async def create(
        self, session_id: str, record: bytes, lifetime: Lifetime, lock: LockPolicy | None
    ) -> Checkout | None:
        keys = self._keys_of(session_id)
        engine = await self._engines.get()
        token = b"" if lock is None else new_token()
        times = milliseconds(lifetime.absolute), milliseconds(lifetime.idle)
        lease = milliseconds(None if lock is None else lock.timeout)
        try:
            reply = await engine.run(CREATE, *keys[:2], new_nonce().encode(), record, *times, token, lease)
        except BaseException:
            if lock is not None:
                engine.let_go(keys, token, milliseconds(min(CLAIM, lock.timeout)))
            raise
        kind, *version = cast("list[bytes]", reply)
        if kind == b"E":
            return None
        created = Checkout(session_id, record, version[0].decode(), None, lifetime.absolute)
        if lock is not None:
            engine.leases.hold(token, keys[1], lock.timeout, lock.max_hold, lock.timeout)
            created.token, created.seal = token.decode(), _seal(lock)
        return created

    async def commit(self, checkout: Checkout, record: bytes, *, release: bool) -> Outcome:
        engine = await self._engines.get()
        version, value = pack_next(checkout.version, record)
        if release:  # a renewal that is answered after the commit must not look like a lost lease
            engine.leases.drop(_token(checkout))
        reply = await engine.run(
            COMMIT,
            *self._keys.of(checkout.session_id),
            _token(checkout),
            checkout.version.encode(),
            value,
            b"1" if release else b"0",
            _claim(checkout),
            engine.cluster,
        )
        outcome = _OUTCOMES[cast(bytes, reply)]
        if outcome is Outcome.STORED:
            checkout.record, checkout.version = record, version
        if release or outcome in (Outcome.GONE, Outcome.LOST):
            engine.leases.drop(_token(checkout))
            checkout.token = None
        return outcome

    async def discard(self, checkout: Checkout, *, retire: bool) -> Outcome:
        engine = await self._engines.get()
        engine.leases.drop(_token(checkout))
        reply = await engine.run(
            REMOVE,
            *self._keys.of(checkout.session_id),
            _token(checkout),
            checkout.version.encode(),
            RETIRED_MS if retire else b"0",
            _claim(checkout),
            engine.cluster,
        )
        checkout.token = None
        return _OUTCOMES[cast(bytes, reply)]

    async def release(self, checkout: Checkout) -> None:
        if checkout.token is None:
            return
        engine = await self._engines.get()
        token, checkout.token = _token(checkout), None
        engine.leases.drop(token)
        engine.let_go(self._keys.of(checkout.session_id), token, _claim(checkout))

    async def renew(self, checkouts: Sequence[Checkout]) -> list[bool]:
        """Prolong the leases now; False for each that was lost. The heartbeat does so by itself."""
        engine = await self._engines.get()
        replies = await asyncio.gather(*[self._renew(engine, checkout) for checkout in checkouts])
        return [reply == 1 for reply in replies]

    def _renew(self, engine: Engine, checkout: Checkout) -> asyncio.Future[Reply]:
        lock = self._keys.of(checkout.session_id)[1]
        return engine.run(RENEW, lock, _token(checkout), (checkout.seal or _CLAIM_MS).encode())

    async def _load(self, engine: Engine, session_id: str, keys: Keys) -> Checkout | Missing:
        reply = await engine.run(ACQUIRE, *keys, b"", b"0", b"0", NO_CHANNEL, b"0", b"", b"0")
        kind, *rest = cast("list[bytes | int]", reply)
        if kind in _MISSING:
            return _MISSING[kind]
        return _checkout(session_id, cast(bytes, rest[0]), cast(int, rest[1])) or Missing.UNREADABLE


def _checkout(session_id: str, value: bytes, now: int) -> Checkout | None:
    """None where the header is not quite ours: the scripts look at its outline only."""
    try:
        record, version, ends = unpack(value)
    except SessionStoreError:
        return None
    return Checkout(session_id, record, version, None, (ends - now) / 1000 if ends else None)


def _token(checkout: Checkout) -> bytes:
    return (checkout.token or "").encode()


def _seal(lock: LockPolicy) -> str:
    """The lease of a checkout (ms), which its renewal and its release need again."""
    return milliseconds(lock.timeout).decode()


def _claim(checkout: Checkout) -> bytes:
    """How long the next holder has to take up the lock (ms)."""
    return b"%d" % min(int(checkout.seal or _CLAIM_MS), int(_CLAIM_MS))


@functools.lru_cache(maxsize=16)  # a middleware has one or two policies
def _terms(lock: LockPolicy) -> Terms:
    return Terms(lock.timeout, lock.wait, lock.max_waiters)
