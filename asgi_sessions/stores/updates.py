"""Changes by name, in a record's fields or its metadata."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import SessionDataError
from ..record.model import SessionData


def apply_updates(data: SessionData, updates: Mapping[str, Any]) -> None:
    """Set model fields, which are validated, and put everything else into the metadata."""
    fields = type(data).model_fields
    if updates.get("session_id", data.session_id) != data.session_id:
        raise ValueError("a record keeps its session_id; Session.regenerate_id() gives a new one")
    for name, value in updates.items():
        if name in fields:
            setattr(data, name, value)
        else:
            data.metadata[name] = value


def add_to_field(data: SessionData, field: str, delta: int) -> int:
    """Add `delta` to a number in a model field, else in the metadata, and return the sum."""
    in_model = field in type(data).model_fields
    value = getattr(data, field) if in_model else data.metadata.get(field, 0)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise SessionDataError(field if in_model else f"metadata.{field}", "is not a number")
    total: int = value + delta  # type: ignore[assignment]  # a float stays a float
    if in_model:
        setattr(data, field, total)
    else:
        data.metadata[field] = total
    return total
