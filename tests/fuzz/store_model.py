"""What any store holds, as a model with a clock; where stores differ, their kind says how."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass, field

from asgi_sessions import SessionData
from asgi_sessions.stores.checkout import Checkout, Lifetime, Outcome

DEFAULT_TTL = 3500.0
LEASE = 300.0
RETIRED_FOR, LEADS_FOR = 60.0, 30.0


class Kind(enum.Enum):
    """Of which kind a store is."""

    MEMORY = "memory"
    REDIS = "redis"
    SQLITE = "sqlite"
    THIRD_PARTY = "third party"


@dataclass
class Entry:
    """A record and its ends: the absolute one, and the idle one that restarts."""

    data: SessionData
    began: float
    expires: float
    idle: float
    last: float  # when the idle timeout restarted
    version: int
    users: set[str] = field(default_factory=set)  # whose index names it
    first: float = math.inf  # its end where its client does not come back

    @property
    def until(self) -> float:
        return min(self.last + self.idle, self.first)

    @property
    def ends(self) -> float:
        return min(self.expires, self.until)

    def came(self, now: float) -> None:
        """Its client sent a request."""
        self.last, self.first = now, math.inf


@dataclass
class Lease:
    """Who holds a lock, and until when."""

    owner: Out
    ends: float


@dataclass(eq=False)
class Out:
    """A checkout: what was loaded, which version, under which lock."""

    real: Checkout
    session_id: str
    version: int
    locked: bool
    data: SessionData


@dataclass
class Model:
    """The records, the locks and the ids that were replaced."""

    kind: Kind
    room: float
    now: float = 0.0
    versions: int = 0
    entries: dict[str, Entry] = field(default_factory=dict)  # least recently active first
    leases: dict[str, Lease] = field(default_factory=dict)  # in one process also those that have run out
    retired: dict[str, float] = field(default_factory=dict)
    successors: dict[str, str | None] = field(default_factory=dict)  # of those

    # -- records -----------------------------------------------------------------------------------

    def find(self, session_id: str) -> Entry | None:
        entry = self.entries.get(session_id)
        return entry if entry is not None and entry.ends > self.now else None

    def alive(self) -> dict[str, Entry]:
        return {name: entry for name, entry in self.entries.items() if entry.ends > self.now}

    def put(self, data: SessionData, lifetime: Lifetime) -> Entry:
        """A record with a new life."""
        self.entries.pop(data.session_id, None)
        self.make_room()
        self.versions += 1
        stored, expires = data.model_copy(deep=True), self.now + _bound(lifetime.absolute)
        entry = Entry(stored, self.now, expires, _bound(lifetime.idle), self.now, self.versions, _users(data))
        entry.first = self.now + _bound(lifetime.first)
        self.entries[data.session_id] = entry
        return entry

    def make_room(self) -> None:
        """The expired go first, then the anonymous, least recently active first, then who is signed in.

        Who is checked out goes never, and counts as active.
        """
        if len(self.entries) >= self.room:
            self.entries = self.alive()
        for signed_in in (False, True):
            for session_id in [name for name, each in self.entries.items() if bool(each.users) is signed_in]:
                if len(self.entries) < self.room:
                    return
                if session_id in self.leases:
                    self.active(session_id)
                else:
                    del self.entries[session_id]

    def store(self, data: SessionData, ttl: float | None) -> None:
        """By `set`: who is signed in is who the record says."""
        entry = self.find(data.session_id)
        if entry is None:
            self.put(data, Lifetime(DEFAULT_TTL if ttl is None else ttl))
            return
        self.rewrite(entry, data)
        self.active(data.session_id)
        entry.users = _users(data)
        if ttl is not None:
            entry.expires = self.now + ttl
            entry.came(self.now)

    def rewrite(self, entry: Entry, data: SessionData) -> None:
        """By a commit: a session in which nobody is signed in any more stays in the index."""
        self.versions += 1
        entry.data, entry.version = data.model_copy(deep=True), self.versions
        self.link(data)

    def link(self, data: SessionData) -> None:
        """Enter a session in its user's index; one in which nobody was signed in counts as active."""
        entry = self.find(data.session_id)
        if entry is not None and data.user_id is not None:
            if not entry.users:
                self.active(data.session_id)
            entry.users.add(data.user_id)

    def active(self, session_id: str) -> None:
        self.entries[session_id] = self.entries.pop(session_id)

    def delete(self, session_id: str) -> bool:
        there = self.find(session_id) is not None
        self.entries.pop(session_id, None)
        if self.kind in (Kind.REDIS, Kind.SQLITE):
            self.leases.pop(session_id, None)  # there is nothing to lock any more
        return there

    def sign_out(self, user_id: str, keep: str | None) -> int:
        """End the sessions of a user; how many. Links that lead to sessions of others go too."""
        ended = 0
        for session_id, entry in sorted(self.entries.items()):
            if session_id != keep and user_id in entry.users:
                entry.users.discard(user_id)
                if not entry.users:
                    self.active(session_id)
        for session_id, entry in self.alive().items():
            if session_id != keep and entry.data.user_id == user_id:
                ended += self.delete(session_id)
        return ended

    def leads_to(self, session_id: str) -> str | None:
        """Where an id leads that was replaced; not for as long as it is remembered."""
        left = self.retired[session_id] - self.now
        return self.successors[session_id] if left > RETIRED_FOR - LEADS_FOR else None

    def move(self, out: Out, data: SessionData, lifetime: Lifetime | None, leads: bool) -> None:
        """The record goes on under a new id; without a lifetime it keeps its bounds."""
        old = self.entries[out.session_id]
        self.delete(out.session_id)
        self.retired[out.session_id] = self.now + RETIRED_FOR
        self.successors[out.session_id] = data.session_id if leads else None
        new = self.put(data, lifetime or Lifetime())
        if lifetime is None:
            new.began, new.expires, new.idle = old.began, old.expires, old.idle

    # -- time --------------------------------------------------------------------------------------

    def keep_alive(self, session_id: str) -> None:
        """A request came: the idle timeout restarts."""
        entry = self.find(session_id)
        if entry is not None:
            entry.came(self.now)

    def arrives(self, session_id: str, rule: Lifetime | None) -> None:
        """A request came and has to wait; where the session is over by its rule that changes nothing."""
        entry, idle = self.find(session_id), None if rule is None else rule.idle
        if self.kind is Kind.REDIS and idle is None:
            return  # waiting in its own process it is not worth a call
        if self.kind is Kind.REDIS and entry is not None and entry.idle == math.inf:
            return  # who holds the lock has come back before
        if entry is not None and (idle is None or idle > entry.idle or self.now - self.came(entry) < idle):
            entry.came(self.now)

    def came(self, entry: Entry) -> float:
        """When the last request came, as far as the store knows: the end of its idle timeout tells."""
        if entry.idle == math.inf:
            return self.now
        clipped = entry.expires <= entry.until
        return self.now if clipped and self.kind is Kind.REDIS else entry.last

    def bounded(self, session_id: str, rule: Lifetime | None, locked: bool) -> Entry | None:
        """What a checkout under this rule finds: a record's bounds are shortened to it."""
        entry = self.find(session_id)
        if entry is None or rule is None:
            return entry
        expires = min(entry.expires, entry.began + _bound(rule.absolute))
        idle = min(entry.idle, _bound(rule.idle))
        if (expires, idle) == (entry.expires, entry.idle):
            return entry
        bound = Entry(entry.data, entry.began, expires, idle, self.came(entry), entry.version, entry.users)
        if self.kind is not Kind.REDIS or locked:
            self.entries[session_id] = bound
        if bound.ends > self.now:
            return bound
        if self.kind is not Kind.REDIS or locked:
            self.delete(session_id)
        return None

    def rebound(self, entry: Entry, lifetime: Lifetime) -> None:
        """It gets other bounds, which is a new version; the idle timeout counts from the last request."""
        self.versions += 1
        entry.last, entry.first, entry.version = self.came(entry), math.inf, self.versions
        entry.expires, entry.idle = self.now + _bound(lifetime.absolute), _bound(lifetime.idle)

    # -- locks -------------------------------------------------------------------------------------

    def lease(self, session_id: str) -> Lease | None:
        found = self.leases.get(session_id)
        return found if found is not None and found.ends > self.now else None

    def waits(self, session_id: str) -> bool:
        """Whether a request that takes the lock has to wait. For what is absent only a third party's does."""
        if self.kind is not Kind.THIRD_PARTY and self.find(session_id) is None:
            return False
        return self.lease(session_id) is not None

    def relieve(self, session_id: str) -> None:
        """Who takes a lock takes it from a holder whose lease has run out."""
        if self.kind is Kind.THIRD_PARTY or self.find(session_id) is not None:
            self.leases.pop(session_id, None)

    def judge(self, out: Out) -> Outcome:
        """What a commit, a move or a discard of this checkout comes to, whichever is the first to be seen."""
        entry, lease = self.find(out.session_id), self.leases.get(out.session_id)
        if out.locked and lease is not None and lease.owner is not out:
            return Outcome.GONE if entry is None and self.kind is Kind.REDIS else Outcome.LOST
        if entry is None:
            return Outcome.GONE
        return Outcome.STORED if entry.version == out.version else Outcome.CONFLICT

    def let_go(self, out: Out) -> None:
        lease = self.leases.get(out.session_id)
        if lease is not None and lease.owner is out:
            del self.leases[out.session_id]
        out.locked = False

    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        if self.kind is Kind.REDIS:
            self.leases = {name: each for name, each in self.leases.items() if each.ends > self.now}


def _users(data: SessionData) -> set[str]:
    return set() if data.user_id is None else {data.user_id}


def _bound(seconds: float | None) -> float:
    return math.inf if seconds is None else seconds
