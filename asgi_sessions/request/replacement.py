"""What an app means that puts something else into `scope["session"]`, as frameworks let it do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..asgi import Scope
from ..errors import SessionDataError
from ..session.handle import Session


def take_replaced(scope: Scope, session: Session) -> None:
    """Do to the session what was meant, and put it back into the scope.

    A dict takes the place of the values; None, an empty dict and Litestar's `Empty` end the session as
    `clear()` does. The handle of a session middleware further inside is that one's own to store.
    `SessionDataError` for anything else, and the error of any late change where it is too late. Only this
    scope is looked at: what an app puts into a copy of it that a framework made is not seen.
    """
    found = scope.get("session")
    if found is session or _is_handle(found):
        return
    if found is None or found == {} or _is_litestars_empty(found):
        if session.loaded is not None or not session.is_blank():
            session.clear()
    elif isinstance(found, dict):
        _replace_values(session, found)
    else:
        raise SessionDataError(
            "scope['session']",
            f"is a {type(found).__name__}: put a dict there, None to end the session, or change the one that"
            " was there in place",
        )
    scope["session"] = session


def _replace_values(session: Session, values: Mapping[str, Any]) -> None:
    if not dict.__eq__(session, values):  # a mere copy changes nothing, so it may be made anywhere
        session.mark_modified()
        dict.clear(session)
        dict.update(session, values)


def _is_handle(found: object) -> bool:
    """Whether it is ours or Starlette's kind of handle, which their middleware has put there."""
    return isinstance(found, Session) or (
        isinstance(found, dict) and hasattr(found, "accessed") and hasattr(found, "modified")
    )


def _is_litestars_empty(found: object) -> bool:
    """`Request.clear_session()` leaves it: a class in some releases, a member of an enum in others."""
    kind = found if isinstance(found, type) else type(found)
    return kind.__module__ == "litestar.types.empty"
