"""Random operations against models: what no table of cases has thought of."""

from __future__ import annotations

from hypothesis import HealthCheck, Phase, settings

LONG = 20  # times as many examples with --long

_times = 1


def take_long() -> None:
    """From now on `effort` means `LONG` times as many examples."""
    global _times
    _times = LONG


def effort(examples: int, steps: int = 30) -> settings:
    """How long a property is looked at; a failure prints the line that repeats it."""
    return settings(
        max_examples=examples * _times,
        stateful_step_count=steps,
        deadline=None,
        print_blob=True,
        phases=[phase for phase in Phase if phase is not Phase.explain],
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
