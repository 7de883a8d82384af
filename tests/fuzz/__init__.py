"""Random operations against models: what no table of cases has thought of."""

from __future__ import annotations

from typing import cast

from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test

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
        report_multiple_bugs=False,
        phases=[phase for phase in Phase if phase is not Phase.explain],
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )


def explore(machine: type[RuleBasedStateMachine], effort: settings, **attributes: object) -> None:
    """Run a machine, with these as attributes of its class."""
    variant = type(machine.__name__, (machine,), attributes)
    run_state_machine_as_test(cast(type[RuleBasedStateMachine], variant), settings=effort)
