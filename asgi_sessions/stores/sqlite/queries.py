"""Which sessions are meant, in SQL."""

from __future__ import annotations

from collections.abc import Sequence

from ...record.queries import SessionFilter

ALIVE = "ends > ?"
MOST = 2**62  # a larger number does not fit into a column or a query
_SLACK = 0.001  # seconds; the record itself is compared exactly


def ids_of(criteria: SessionFilter, users: Sequence[str], now: float) -> tuple[str, list[object]]:
    """A query for the ids of those that match, and its values. It may find a few more, never fewer.

    `users` are the names of its user. Without a criterion of its own the order of ends is as good as any;
    with one, its index is the better one.
    """
    parts: list[tuple[str, list[object]]] = []
    if criteria.user_id is not None:
        parts.append((f"user_id IN ({', '.join('?' * len(users))})", [*users]))
    if criteria.escalated is not None:
        parts.append(("escalated > 0" if criteria.escalated else "escalated = 0", []))
    if criteria.created_after is not None:
        parts.append(("created >= ?", [criteria.created_after.timestamp() - _SLACK]))
    if criteria.created_before is not None:
        parts.append(("created <= ?", [criteria.created_before.timestamp() + _SLACK]))
    if criteria.min_messages:
        parts.append(("messages > 0 AND messages >= ?", [min(criteria.min_messages, MOST)]))
    if criteria.max_messages is not None:
        parts.append(("messages <= ?", [min(criteria.max_messages, MOST)]))
    parts.append((f"+{ALIVE}" if parts else ALIVE, [now]))
    condition = " AND ".join(part for part, _ in parts)
    return f"SELECT id FROM session WHERE {condition}", [value for _, values in parts for value in values]  # noqa: S608
