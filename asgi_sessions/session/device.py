"""A session as its user sees it in a list of devices."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime


@dataclass(frozen=True, slots=True)
class Device:
    """One of the signed-in user's sessions; see `Session.devices`.

    `handle` names it on a page and is worth nothing to a thief: it is a keyed hash, and only the same user's
    sessions can be ended by it. `name` is "Firefox on Windows", or "Unknown device"; `address` is the one
    from which the user signed in, "" where it was not recorded (`record_client`). `last_activity` is when the
    session was last changed. A user agent is what a client says of itself: escape `name` in HTML.
    """

    handle: str
    name: str
    address: str = field(repr=False)
    created_at: datetime
    last_activity: datetime
    current: bool
