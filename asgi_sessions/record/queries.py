"""What is asked of many sessions: which of them are meant, and figures over those that are active."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from .model import SessionData
from .values import to_utc

if TYPE_CHECKING:
    from typing_extensions import Self  # in typing itself from Python 3.11


class SessionMetrics(BaseModel):
    """Figures over the active sessions."""

    total_messages: Annotated[int, Field(ge=0)] = 0
    avg_response_time: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0  # seconds
    escalation_rate: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = 0.0  # share of the sessions
    active_sessions: Annotated[int, Field(ge=0)] = 0


_Bound = Annotated[datetime, AfterValidator(to_utc)]


class SessionFilter(BaseModel):
    """Which sessions are meant: those that meet every criterion given. Bounds are part of the range.

    Naive times are read as UTC. Raises pydantic's `ValidationError` for bounds that cross and for criteria
    that do not exist.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    user_id: str | None = None
    escalated: bool | None = None
    created_after: _Bound | None = None
    created_before: _Bound | None = None
    min_messages: Annotated[int, Field(ge=0)] | None = None
    max_messages: Annotated[int, Field(ge=0)] | None = None

    @model_validator(mode="after")
    def _check_ranges(self) -> Self:
        if self.created_after and self.created_before and self.created_before < self.created_after:
            raise ValueError("created_before must not be before created_after")
        if (
            self.min_messages is not None
            and self.max_messages is not None
            and self.max_messages < self.min_messages
        ):
            raise ValueError("max_messages must not be below min_messages")
        return self

    def matches(self, data: SessionData) -> bool:
        """Whether `data` meets every criterion given; a filter without any means all sessions."""
        return (
            self.user_id in (None, data.user_id)
            and self.escalated in (None, data.escalated)
            and (self.created_after is None or self.created_after <= data.created_at)
            and (self.created_before is None or data.created_at <= self.created_before)
            and (self.min_messages is None or self.min_messages <= data.message_count)
            and (self.max_messages is None or data.message_count <= self.max_messages)
        )
