"""How long one session's record is to live: by the middleware's rule, and by what the app asked for."""

from __future__ import annotations

import time

from ..session.expiry import Expiry
from ..stores.checkout import Checkout, Lifetime


def of_new(rule: Lifetime, expiry: Expiry | None, first: float | None = None) -> Lifetime:
    """Of a session that begins, or whose user signs in: a full life, or the app's own.

    `first`: so many seconds where its client does not come back.
    """
    left = None if expiry is None else expiry.left()
    if left is None and first is None:
        return rule
    return Lifetime(rule.absolute if left is None else _sooner(rule.absolute, left), rule.idle, first)


def of_stored(rule: Lifetime, expiry: Expiry | None, taken: Checkout, since: float) -> Lifetime:
    """Of a record that was taken `since` then, by `time.monotonic()`; its idle timeout stays.

    Without an `expiry` its bounds stay. Else the end that the app asked for counts, but never one beyond the
    rule, which counts from creation or sign-in. Where nobody knows when that was, nothing is prolonged.
    """
    passed = time.monotonic() - since
    rest = None if taken.expires_in is None else taken.expires_in - passed
    if expiry is not None and (rule.absolute is None or taken.age is not None):
        rest = None if rule.absolute is None or taken.age is None else rule.absolute - taken.age - passed
    left = None if expiry is None else expiry.left()
    absolute = rest if left is None else _sooner(rest, left)
    return Lifetime(None if absolute is None else max(absolute, 0.001), taken.idle)


def _sooner(one: float | None, other: float) -> float:
    return other if one is None else min(one, other)
