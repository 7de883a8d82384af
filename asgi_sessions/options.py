"""The middleware's arguments, checked once. A wrong one fails here, and the error says what to do."""

from __future__ import annotations

import fnmatch
import inspect
import re
from collections.abc import Callable, Iterable
from typing import TypeAlias

from pydantic import ValidationError

from .asgi import Scope
from .client.address import TrustedProxy
from .client.agent import ClientRecorder
from .client.cookie import SessionCookie
from .client.fingerprint import Fingerprint, FingerprintReader
from .client.paths import path_below
from .client.starlette import OldCookies, StarletteCookies
from .observation.events import UNTRUSTED_PROXY, EventSink
from .record.model import SessionData
from .record.values import new_session_id
from .request.arrivals import Arrivals
from .stores.checkout import LEADS_FOR, Lifetime, LockPolicy
from .stores.contract import SessionStore

Pattern: TypeAlias = "str | re.Pattern[str]"
Routes: TypeAlias = "Iterable[Pattern] | Callable[[Scope], bool] | Pattern"


def resolve_model(model: type[SessionData]) -> type[SessionData]:
    """The model. ValueError where a session cannot begin with an id alone."""
    if not (isinstance(model, type) and issubclass(model, SessionData)):
        raise TypeError("model is a subclass of asgi_sessions.SessionData")
    try:
        model(session_id=new_session_id())
    except ValidationError as error:
        fields = ", ".join(str(item["loc"][0]) for item in error.errors() if item["loc"])
        raise ValueError(f"a session begins empty: give the model defaults for {fields}") from error
    return model


def resolve_client(
    fingerprint: Fingerprint | None, trusted_proxies: Iterable[TrustedProxy], events: EventSink
) -> FingerprintReader | None:
    """The reader of fingerprints; None where they are off. The proxies are checked in either case."""
    if fingerprint is not None and not isinstance(fingerprint, Fingerprint):
        remedy = "None turns it off" if fingerprint is False else "write fingerprint=Fingerprint(...) or None"
        raise TypeError(f"fingerprint={fingerprint!r} is no Fingerprint: {remedy}")
    known = Fingerprint() if fingerprint is None else fingerprint
    reader = FingerprintReader(
        known, trusted_proxies, lambda: events.warn_once(UNTRUSTED_PROXY, remedy=_PROXIES)
    )
    return None if fingerprint is None else reader


def resolve_recorder(
    record_client: object,
    trusted_proxies: Iterable[TrustedProxy],
    events: EventSink,
    model: type[SessionData],
) -> ClientRecorder | None:
    """What tells the record who signs in; None where that is not kept. The model has to have our `client`."""
    if not isinstance(record_client, bool):
        raise TypeError(f"record_client is True or False, not {record_client!r}")
    if not record_client:
        return None
    if model.model_fields["client"].annotation != SessionData.model_fields["client"].annotation:
        raise ValueError(
            f"record_client=True keeps who signs in in data.client, and {model.__name__} has another field of"
            " that name: rename it (old records keep what they have), or leave record_client off"
        )
    return ClientRecorder(trusted_proxies, lambda: events.warn_once(UNTRUSTED_PROXY, remedy=_PROXIES))


_PROXIES = (
    "a request brought X-Forwarded-For or Forwarded, which are not believed: if there is a proxy, all clients"
    " have its address; name it, as in trusted_proxies=['10.0.0.0/8']"
)


def resolve_imports(given: StarletteCookies | None, cookie: SessionCookie) -> OldCookies | None:
    """The reader of another middleware's cookies; None where nothing is to be taken over."""
    if given is None:
        return None
    if not isinstance(given, StarletteCookies):
        raise TypeError(
            "import_cookies is a StarletteCookies(secret_key), with the key of the old middleware"
        )
    return OldCookies(given, cookie.name)


def resolve_lifetime(
    max_age: float | None, idle_timeout: float | None, rolling: bool, store: SessionStore
) -> Lifetime:
    """How long records live. With `rolling` there is no absolute bound: `max_age` is an idle timeout.

    The session of a browser-session cookie (`max_age=None`) without an idle timeout ends `store.default_ttl`
    seconds after its last request: no browser says that it was closed.
    """
    given = {"max_age": max_age, "idle_timeout": idle_timeout}
    _require_numbers(**{name: seconds for name, seconds in given.items() if seconds is not None})
    if max_age is not None and max_age < -1:
        raise ValueError("max_age is a number of seconds, None for a browser-session cookie, or -1 for none")
    if idle_timeout is not None and not idle_timeout > 0:
        raise ValueError("idle_timeout is a number of seconds above 0, or None")
    if max_age is None:
        return Lifetime(idle=store.default_ttl if idle_timeout is None else idle_timeout)
    if rolling:
        return Lifetime(idle=max_age if idle_timeout is None else min(max_age, idle_timeout))
    return Lifetime(absolute=max_age, idle=idle_timeout)


def resolve_rotation(rotate_every: float | None) -> float | None:
    """The age of an id, in seconds, at which it is replaced."""
    if rotate_every is not None:
        _require_numbers(rotate_every=rotate_every)
        if not rotate_every > LEADS_FOR:
            raise ValueError(
                f"rotate_every is a number of seconds above {LEADS_FOR:.0f}: for so long an old id leads to"
                " the new one. None turns it off"
            )
    return rotate_every


def resolve_most_sessions(most: int | None) -> int | None:
    """How many sessions a user may have."""
    if most is not None and (isinstance(most, bool) or not isinstance(most, int) or most < 1):
        raise ValueError(f"max_sessions_per_user is a whole number of 1 or more, or None, not {most!r}")
    return most


def resolve_arrivals(first_ttl: float | None) -> Arrivals | None:
    """What tells first visits from others; None where a new record has its full life at once."""
    if first_ttl is None:
        return None
    _require_numbers(first_ttl=first_ttl)
    if not first_ttl > 0:
        raise ValueError("first_ttl is a number of seconds above 0, or None for a full life at once")
    return Arrivals(first_ttl)


def resolve_lock(timeout: float, wait: float, max_waiters: int, max_hold: float) -> LockPolicy:
    """The lock's times, in seconds, and its bounds."""
    _require_numbers(lock_timeout=timeout, lock_wait=wait, max_waiters=max_waiters, lock_max_hold=max_hold)
    if not timeout > 0:
        raise ValueError("lock_timeout is the lease in seconds and above 0; lock=False turns locking off")
    if not wait >= 0:
        raise ValueError("lock_wait is a number of seconds, 0 for not waiting at all")
    if max_waiters < 0 or max_waiters != int(max_waiters):
        raise ValueError("max_waiters is a number of waiting requests, 0 for none")
    if max_hold < timeout:
        raise ValueError("lock_max_hold is at least lock_timeout: a lease is not cut short")
    return LockPolicy(timeout=timeout, wait=wait, max_waiters=max_waiters, max_hold=max_hold)


def resolve_routes(name: str, routes: Routes) -> Callable[[Scope], bool] | None:
    """A predicate of the scope, from one or from path patterns (`/static/*`, or compiled expressions).

    A pattern is matched against the path below `root_path`, so that a mount changes nothing. None where there
    are no patterns.
    """
    if callable(routes):
        if inspect.iscoroutinefunction(routes):
            raise TypeError(f"{name} is a plain function of the scope: a coroutine would always count as yes")
        return routes
    patterns = [routes] if isinstance(routes, str | re.Pattern) else list(routes)
    for pattern in patterns:
        if not isinstance(pattern.pattern if isinstance(pattern, re.Pattern) else pattern, str):
            raise TypeError(f"{name}: a path pattern is a str or a compiled expression of str: {pattern!r}")
        if isinstance(pattern, str) and not pattern.startswith(("/", "*")):
            raise ValueError(f"{name}: the path pattern {pattern!r} never matches: begin it with / or *")
    if not patterns:
        return None
    compiled = [re.compile(fnmatch.translate(p)) if isinstance(p, str) else p for p in patterns]
    return lambda scope: _matches(compiled, path_below(scope))


def _matches(patterns: Iterable[re.Pattern[str]], path: str) -> bool:
    return any(pattern.match(path) for pattern in patterns)


def resolve_names(rotate_on: Iterable[str]) -> frozenset[str]:
    """The names of the values that say who is signed in."""
    if isinstance(rotate_on, str):
        raise ValueError(f"rotate_on is a collection of names: [{rotate_on!r}]; () turns it off")
    names = frozenset(rotate_on)
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"rotate_on: the name of a value is a str, not {name!r}")
    return names


def resolve_origins(origins: Iterable[str] | None) -> frozenset[bytes] | None:
    """Exact origins as browsers send them (RFC 6454 section 6.2): lower case, no path, no final slash."""
    if origins is None:
        return None
    if isinstance(origins, str):
        raise ValueError(f"allowed_origins is a collection of origins: [{origins!r}]")
    known = list(origins)
    for origin in known:
        if not re.fullmatch(r"[a-z][a-z0-9+.-]*://[!-+\-.0-~]+", str(origin)):
            raise ValueError(
                f"allowed_origins: {origin!r} is no origin, write https://host or https://host:port"
            )
    return frozenset(origin.lower().encode() for origin in known)


def check_flags(**given: object) -> None:
    """TypeError for a text: "false" and "0" are true in Python."""
    for name, value in given.items():
        if isinstance(value, str):
            raise TypeError(f"{name} is True or False, not the text {value!r}, which would count as yes")


def check_lock(lock: object) -> None:
    """TypeError for anything but True, False and "auto"."""
    if not (isinstance(lock, bool) or lock == "auto"):
        raise TypeError(f'lock is True, False or "auto", not {lock!r}')


_LARGEST = 10**9  # seconds, 31 years: not every store can hold more


def _require_numbers(**given: object) -> None:
    for name, value in given.items():
        if isinstance(value, str):
            raise TypeError(f"{name} is a number, not {value!r}: make one of the text, as in float(text)")
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"{name} is a number, not {value!r}")
        if not abs(value) <= _LARGEST:
            raise ValueError(f"{name} is a finite number, at most {_LARGEST}, not {value!r}")
