"""What a flood of requests on one session costs everybody else: `python tests/security/flooding.py`.

Visitors with sessions of their own write again and again while strangers send requests at a steady rate: to
as many sessions ("spread", what such a load costs anyhow) or all to one ("flood", where they queue for its
lock and are turned away). Rounds alternate; the exit status is 1 where the visitors' 99th percentile in the
flood is more than twice that of the spread load.
"""

from __future__ import annotations

import argparse
import gc
import logging
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import anyio

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[1])
    sys.path.insert(0, str(Path(__file__).parents[2]))

from redis_server import RedisServer

from asgi_sessions import InMemorySessionStore, RedisSessionStore, Session, SessionStore
from security.service import Service, Visitor, write

LOADS = ("none", "spread", "flood")
BOUND = 2.0


@dataclass(frozen=True)
class Plan:
    """How long and how hard; times in seconds, `rate` in requests a second."""

    seconds: float = 2.0
    rounds: int = 7
    visitors: int = 20
    rate: int = 300
    pause: float = 0.02  # of a visitor between two requests
    work: float = 0.05  # of the app in a stranger's request, with the lock held
    max_waiters: int = 64  # few, so that strangers are turned away in a short round too


@dataclass
class Round:
    """What the visitors waited, in seconds, and how everybody was answered."""

    waits: list[float] = field(default_factory=list)
    answers: Counter[int] = field(default_factory=Counter)
    strangers: Counter[int] = field(default_factory=Counter)

    def percentile(self, share: float) -> float:
        ordered = sorted(self.waits)
        return ordered[min(int(len(ordered) * share), len(ordered) - 1)]


async def play(service: Service, load: str, plan: Plan) -> Round:
    """One round under this load."""
    seen = Round()
    visitors = [service.visitor() for _ in range(plan.visitors)]
    targets = [service.visitor() for _ in range(1 if load == "flood" else plan.rate)]
    async with anyio.create_task_group() as group:
        for visitor in (*visitors, *targets):
            group.start_soon(visitor.open, write)
    end = time.perf_counter() + plan.seconds

    async def visit(visitor: Visitor) -> None:
        while (began := time.perf_counter()) < end:
            answer = await visitor.open(write)
            seen.waits.append(time.perf_counter() - began)
            seen.answers[answer.status] += 1
            await anyio.sleep(plan.pause)

    async def slowly(session: Session) -> None:
        write(session)
        await anyio.sleep(plan.work)

    async def press(target: Visitor) -> None:
        seen.strangers[(await target.copy().open(slowly)).status] += 1

    async with anyio.create_task_group() as strangers, anyio.create_task_group() as group:
        for visitor in visitors:
            group.start_soon(visit, visitor)
        began, sent = time.perf_counter(), 0
        while load != "none" and (now := time.perf_counter()) < end:
            while sent < (now - began) * plan.rate:
                strangers.start_soon(press, targets[sent % len(targets)])
                sent += 1
            await anyio.sleep(0.005)
    return seen


async def measure(make: Callable[[], SessionStore], plan: Plan) -> dict[str, list[Round]]:
    """All rounds, by load."""
    played: dict[str, list[Round]] = {load: [] for load in LOADS}
    for _ in range(plan.rounds):
        for load in LOADS:
            gc.collect()  # or what earlier rounds left would be collected in the same load each time
            store = make()
            played[load].append(await play(Service(store, {"max_waiters": plan.max_waiters}), load, plan))
            await store.aclose()
    return played


def report(name: str, played: dict[str, list[Round]]) -> float:
    """Print the medians over the rounds; how the flood's 99th percentile compares with the spread load's."""
    for load, rounds in played.items():
        middle, tail = (median(seen.percentile(share) for seen in rounds) * 1000 for share in (0.5, 0.99))
        answers = sum((seen.answers for seen in rounds), Counter[int]())
        strangers = sum((seen.strangers for seen in rounds), Counter[int]())
        print(
            f"{name:7} {load:7} p50 {middle:6.2f} ms  p99 {tail:6.2f} ms  visitors {dict(answers)}"
            f"  strangers {dict(sorted(strangers.items()))}"
        )
    pairs = zip(played["flood"], played["spread"], strict=True)
    ratio = median(flood.percentile(0.99) / spread.percentile(0.99) for flood, spread in pairs)
    print(f"{name:7} flood / spread, p99: {ratio:.2f}")
    return ratio


def main() -> int:
    """Both stores; 0 where a flood costs others no more than it may."""
    parser = argparse.ArgumentParser(description="What a flood on one session costs the others.")
    parser.add_argument("--rounds", type=int, default=Plan.rounds)
    parser.add_argument("--seconds", type=float, default=Plan.seconds)
    options = parser.parse_args()
    plan = Plan(rounds=options.rounds, seconds=options.seconds)
    logging.getLogger("asgi_sessions").setLevel(logging.CRITICAL)  # the counts below say it all
    with RedisServer() as server:
        worst = max(
            report("memory", anyio.run(measure, InMemorySessionStore, plan)),
            report("redis", anyio.run(measure, lambda: RedisSessionStore(server.url), plan)),
        )
    return int(worst > BOUND)


if __name__ == "__main__":
    sys.exit(main())
