"""What a list of a user's sessions says of each: who, when, and from which client."""

from __future__ import annotations

from datetime import datetime
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

from .lines import items_of, parsed, split
from .values import to_utc

MOST_OF_AGENT, MOST_OF_ADDRESS = 256, 64  # characters


class Client(BaseModel):
    """Who signed in: the user agent (at most 256 characters) and the address, "" where there was none."""

    model_config = ConfigDict(frozen=True, extra="allow", hide_input_in_errors=True)

    user_agent: str = Field(default="", max_length=MOST_OF_AGENT, repr=False)
    address: str = Field(default="", max_length=MOST_OF_ADDRESS, repr=False)


class ClientSchema:
    """A `Client`; what another model has put under that name is kept as it came."""

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.union_schema([handler(source), core_schema.any_schema()], mode="left_to_right")


class Sighting(NamedTuple):
    """A session of a user, without its values."""

    session_id: str
    user_id: str | None
    created_at: datetime
    last_activity: datetime
    user_agent: str
    address: str

    def __repr__(self) -> str:
        return "Sighting()"


def sighting_of(record: bytes) -> Sighting | None:
    """What a record says, whatever its model; its values are not read. None where it says no such thing."""
    parts = split(record)
    lines = (parts.who, parts.when, parts.fields) if parts is not None else ()
    found = {name: value for line in lines for name, value in items_of(line).items()} or parsed(record)
    session_id, user_id, client = (found.get(name) for name in ("session_id", "user_id", "client"))
    created, active = _moment(found.get("created_at")), _moment(found.get("last_activity"))
    if not isinstance(session_id, str) or created is None:
        return None
    told = client if isinstance(client, dict) else {}
    agent, address = (str(told.get(name) or "") for name in ("user_agent", "address"))
    user = user_id if isinstance(user_id, str) else None
    return Sighting(session_id, user, created, active or created, agent, address)


def _moment(text: object) -> datetime | None:
    try:
        return to_utc(datetime.fromisoformat(str(text).replace("Z", "+00:00")))
    except ValueError:
        return None
