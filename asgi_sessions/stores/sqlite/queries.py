"""Which sessions are meant, in SQL."""

from __future__ import annotations

from ...record.queries import SessionFilter

ALIVE = "ends > ?"
_SLACK = 0.001  # seconds; the record itself is compared exactly


def where_of(criteria: SessionFilter, now: float) -> tuple[str, list[object]]:
    """A condition on the columns, and its values. It holds for a few more than are meant, never for fewer."""
    parts: list[tuple[str, object]] = [(ALIVE, now)]
    if criteria.user_id is not None:
        parts.append(("user_id = ?", criteria.user_id))
    if criteria.escalated is not None:
        parts.append(("escalated = ?", criteria.escalated))
    if criteria.created_after is not None:
        parts.append(("created >= ?", criteria.created_after.timestamp() - _SLACK))
    if criteria.created_before is not None:
        parts.append(("created <= ?", criteria.created_before.timestamp() + _SLACK))
    if criteria.min_messages:
        parts.append(("messages > 0 AND messages >= ?", criteria.min_messages))
    if criteria.max_messages is not None:
        parts.append(("messages <= ?", criteria.max_messages))
    return " AND ".join(part for part, _ in parts), [value for _, value in parts]
