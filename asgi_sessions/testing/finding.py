"""Finds the session middleware in an app, however deep it lies in what a framework has built."""

from __future__ import annotations

import functools
import types
from collections import deque
from collections.abc import Iterable, Iterator
from typing import cast

from ..middleware import SessionMiddleware

_MOST = 50_000  # objects that are looked at
_ATOMS = (str, bytes, int, float, complex, type(None), type, types.ModuleType)
_COLLECTIONS = (list, tuple, set, frozenset, deque)


def middleware_of(app: object) -> SessionMiddleware:
    """The middleware that gives this app its sessions; `app` may be the middleware itself.

    Builds the stack of Starlette and FastAPI, as their first request does: add middlewares before. Where a
    framework makes one middleware for each route with the same store and cookie, any of them. `ValueError`
    where there is none, or where it is not clear which one is meant.
    """
    found: dict[tuple[str, int], SessionMiddleware] = {}
    for each in _nearest(app):
        found.setdefault((each._settings.cookie.name, id(each.store)), each)
    if len(found) == 1:
        return next(iter(found.values()))
    if found:
        names = ", ".join(repr(name) for name, _ in found)
        raise ValueError(
            f"this app has several session middlewares, with the cookies {names}: pass the one that is meant,"
            " in place of the app"
        )
    raise ValueError(
        f"no asgi_sessions.SessionMiddleware in this {type(app).__name__}: add it to the app, or pass the"
        " middleware itself, as in session_cookie(middleware)"
    )


def _nearest(app: object) -> list[SessionMiddleware]:
    """Those with the fewest steps between them and the app. What lies within one of them does not count."""
    level, seen = [app], {id(app): app}
    while level and len(seen) < _MOST:
        found = [each for each in level if isinstance(each, SessionMiddleware)]
        if found:
            return found
        parts = {id(part): part for each in level for part in _parts(each)}
        level = [part for key, part in parts.items() if key not in seen]
        seen.update(parts)
    return []


def _parts(thing: object) -> Iterable[object]:
    """What an object refers to. Asks no object for it: some are proxies, which fail then."""
    kind = type(thing)
    if issubclass(kind, _ATOMS):
        return ()
    if issubclass(kind, dict):
        return dict.values(cast("dict[object, object]", thing))
    if issubclass(kind, _COLLECTIONS):
        return cast("Iterable[object]", thing)
    if isinstance(thing, types.FunctionType):
        return _closed_over(thing)
    if isinstance(thing, types.MethodType):
        return (thing.__self__, thing.__func__)
    if isinstance(thing, functools.partial):
        return (thing.func, *thing.args, *thing.keywords.values())
    attributes = _attributes(thing)
    build = getattr(kind, "build_middleware_stack", None)
    if build is not None and attributes.get("middleware_stack", thing) is None:
        attributes["middleware_stack"] = build(thing)
    return [*attributes.values(), *_slots(thing)]


def _closed_over(function: types.FunctionType) -> Iterator[object]:
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # a name that has no value yet
            continue
    yield from vars(function).values()  # `functools.wraps` notes there what it wraps


def _attributes(thing: object) -> dict[str, object]:
    try:
        found: dict[str, object] = object.__getattribute__(thing, "__dict__")
    except AttributeError:
        return {}
    return found


def _slots(thing: object) -> Iterator[object]:
    for kind in type(thing).__mro__:
        for member in vars(kind).values():
            if isinstance(member, types.MemberDescriptorType):
                try:
                    yield member.__get__(thing)
                except AttributeError:  # a slot that is empty
                    continue
