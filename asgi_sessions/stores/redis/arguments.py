"""What a user gives, checked: what is wrong fails where it is given, with the remedy and no password."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Callable
from typing import TypeVar
from urllib.parse import urlsplit

from redis.asyncio.connection import ConnectionPool
from redis.exceptions import RedisError

T = TypeVar("T")

UNREADABLE = (
    "the store's URL cannot be read: write what is special in a user or password as %XX"
    " (urllib.parse.quote does), and the port as a number"
)
_UNKNOWN = re.compile(r"unexpected keyword argument '([^']*)'")


def from_url(make: Callable[[str], T], url: str) -> T:
    """What redis-py makes of a URL. `ValueError` where it cannot be read."""
    try:
        path = "" if url.startswith("unix:") else urlsplit(url.partition("?")[0]).path.strip("/")
        made = make(url)
    except ValueError as error:
        known = str(error).startswith("Invalid value for")
        raise ValueError(f"the store's URL: {error}" if known else UNREADABLE) from None
    except TypeError as error:
        raise _unknown_option(error) from None
    if path and not path.isdecimal():
        raise ValueError("the path of a Redis URL is the number of the db, as in redis://host:6379/0")
    return made


def check_options(pool: ConnectionPool) -> None:
    """A connection is made, and not opened: `ValueError` for options that it does not know or like."""
    try:
        pool.make_connection()  # type: ignore[no-untyped-call]  # redis-py left it untyped
    except TypeError as error:
        raise _unknown_option(error, pool.connection_class) from None
    except (RedisError, ValueError) as error:
        raise ValueError(f"an option of the store's URL is wrong: {error}") from None


def refuse_stand_ins(client: object) -> None:
    """`TypeError` for a fakeredis client: this store opens connections of its own, to a server."""
    if any(kind.__module__.partition(".")[0] == "fakeredis" for kind in type(client).__mro__):
        raise TypeError(
            "fakeredis has no server to connect to: give InMemorySessionStore() (or memory://) to tests,"
            " or the URL of a real Redis"
        )


def _unknown_option(error: TypeError, connection: type | None = None) -> ValueError:
    found = _UNKNOWN.search(str(error))
    if found is None:
        return ValueError("the options of the store's URL do not go together")
    known = [
        name
        for each in (connection.__mro__ if connection is not None else ())
        for name in inspect.signature(each).parameters
    ]
    close = difflib.get_close_matches(found[1], known, 1)
    hint = f"; did you mean {close[0]}?" if close else ""
    if found[1].startswith("ssl_") and not close:
        hint = "; for TLS the URL begins with rediss://"
    return ValueError(f"the store's URL has an unknown option {found[1]}{hint}")
