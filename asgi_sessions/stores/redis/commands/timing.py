"""The times of a lock, as the scripts need them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from ..connection.resp import pack_args

NO_CHANNEL = b"-"  # queued without an announcement: such a waiter asks again and again
CLAIM = 1.0  # seconds after which the next one has a lock that a dead waiter was given
NOTICE = 0.01  # seconds of the claim in which that next one notices; the rest is for the waiter to take it up
PASSIVE = b"-"  # the `activity` of a request that does not count as such while it waits
POLL = 0.95  # seconds between two questions of a waiter that is told; under the claim, to learn of its end


@dataclass(frozen=True, slots=True)
class LockTiming:
    """How long a lock is held and waited for, in seconds, and the same packed for the scripts."""

    lease: float  # 0: no lock
    wait: float = 0.0
    max_waiters: int = 64
    poll: float = POLL
    bare: bool = False  # a lock without a record
    activity: bytes = b"0"  # ARGV 7 of `ACQUIRE`
    clustered: bool = False
    max_hold: float = math.inf
    lease_ms: bytes = field(init=False)
    claim: float = field(init=False)  # in which the next holder must take up what is handed over
    claim_ms: bytes = field(init=False)
    take: bytes = field(init=False)  # ARGV 2 of `TAKE`
    take_and_tell: bytes = field(init=False)  # ARGV 2 and 3 of `TAKE_AND_TELL`
    commit: bytes = field(init=False)  # ARGV 4 and 5 of `COMMIT`; the lock stays
    commit_and_release: bytes = field(init=False)
    release: bytes = field(init=False)  # ARGV 2 to 4 of `RELEASE`

    def __post_init__(self) -> None:
        lease = b"%d" % (max(round(self.lease * 1000), 1) if self.lease else 0)
        most = min(CLAIM, self.lease)
        seconds = max(most - NOTICE, most / 2)
        claim = b"%d" % max(round(seconds * 1000), 1)
        bare, clustered = (b"1" if flag else b"0" for flag in (self.bare, self.clustered))
        object.__setattr__(self, "lease_ms", lease)
        object.__setattr__(self, "claim", seconds)
        object.__setattr__(self, "claim_ms", claim)
        object.__setattr__(self, "take", pack_args(lease))
        object.__setattr__(self, "take_and_tell", pack_args(lease, b"0"))
        object.__setattr__(self, "commit", pack_args(b"", b""))
        object.__setattr__(self, "commit_and_release", pack_args(claim, clustered))
        object.__setattr__(self, "release", pack_args(claim, clustered, bare))
