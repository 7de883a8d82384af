"""What the comparison of session middlewares rests on: its sessions, its floor, its counted instructions."""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
from collections.abc import Callable, MutableMapping
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

# The folder is on the path only now, and pyright does not see that it is.
# pyright: reportMissingImports=false
import overhead_apps  # noqa: E402
import overhead_floor  # noqa: E402
import overhead_instructions  # noqa: E402

pytestmark = pytest.mark.anyio
KEY = b"a key of the tests and of nothing else"


# -- the sessions --------------------------------------------------------------------------------------------


def test_the_session_has_300_bytes() -> None:
    """As JSON, give or take a tenth."""
    assert 270 <= len(json.dumps(overhead_apps.CONTENT, separators=(",", ":"))) <= 330


@pytest.mark.parametrize("length", overhead_apps.LENGTHS)
async def test_every_write_counts(length: str) -> None:
    """A write that a middleware does not store would be a cheap one."""
    for subject in overhead_apps.in_memory([]):
        if "write" not in subject.kinds:
            continue
        seen: list[int | None] = []
        reading = subject.wrap(overhead_apps.page(noting(seen), sized=True))
        await subject.begin(1)
        case = overhead_apps.Case(subject.name, subject.place, "write", length, 1)
        for _ in range(3):
            await subject.clients[0].request(subject.app(case))
        await subject.clients[0].request(reading)
        assert seen == [None if subject.name == overhead_apps.BARE else 3], subject.name


def noting(seen: list[int | None]) -> Callable[[MutableMapping[str, Any]], None]:
    return lambda scope: seen.append(number(scope))


def number(scope: MutableMapping[str, Any]) -> int | None:
    """What the writes have added to."""
    session = scope.get("session")
    if session is None:
        return None
    found: int = session["n"] if "n" in session else session.data.cart[0].quantity
    return found


async def test_a_lost_session_ends_a_measurement() -> None:
    """A request without its session is never taken for a fast one."""
    for subject in overhead_apps.in_memory([])[1:]:
        case = overhead_apps.Case(subject.name, subject.place, "read", "content-length", 1)
        with pytest.raises((RuntimeError, IndexError)):
            await overhead_apps.Client().request(subject.app(case))


# -- the floor -----------------------------------------------------------------------------------------------


async def test_the_floor_loses_no_update() -> None:
    """Requests of one session wait for each other."""
    wrap = overhead_floor.floor(KEY)

    async def add(scope: MutableMapping[str, Any], receive: object, send: Any) -> None:
        before = scope["session"].get("n", 0)
        await asyncio.sleep(0)
        scope["session"]["n"] = before + 1
        await send(overhead_apps.start())
        await send(overhead_apps.BODY)

    app, client, seen = wrap(add), overhead_apps.Client(), list[int]()
    await client.request(app)
    await asyncio.gather(*[client.request(app) for _ in range(20)])
    await client.request(
        wrap(overhead_apps.page(lambda scope: seen.append(scope["session"]["n"]), sized=True))
    )
    assert seen == [21]


@pytest.mark.parametrize("length", overhead_apps.LENGTHS.values())
async def test_the_floor_stores_before_it_answers(length: bool) -> None:
    """What the client has been told is what another request finds."""
    records: list[bytes] = []
    entry = overhead_floor.Entry()

    async def send(message: MutableMapping[str, Any]) -> None:
        records.append(entry.record)

    scope: dict[str, Any] = {}
    stored = overhead_floor.storing(scope, send, entry)
    scope["session"]["n"] = 1
    await stored(overhead_apps.start(length))
    await stored(overhead_apps.BODY)
    assert records == [b'{"n":1}'] * 2


def test_the_floor_believes_its_own_signature_only() -> None:
    """Nobody gets a session by its id alone."""
    signed = b"session=abc." + overhead_floor.signature(KEY, b"abc")
    assert overhead_floor.verified(KEY, [(b"cookie", b"a=b; " + signed)]) == b"abc"
    assert overhead_floor.verified(b"another key", [(b"cookie", signed)]) is None
    assert overhead_floor.verified(KEY, [(b"cookie", b"session=abc.")]) is None
    assert overhead_floor.verified(KEY, [(b"host", b"localhost")]) is None


# -- instructions --------------------------------------------------------------------------------------------


def test_what_a_batch_costs_once_is_no_request() -> None:
    """Of N and of 2N requests the difference counts, by N."""
    warm_up, constant = 999, 50
    parts = [warm_up, constant + 10 * 7, constant + 20 * 7, warm_up, constant + 10 * 9, constant + 20 * 9, 1]
    assert overhead_instructions.differences(["a", "b"], parts, 10) == {"a": 7, "b": 9}


def test_missing_parts_are_refused() -> None:
    """Else the figures of one case would be taken for another's."""
    with pytest.raises(RuntimeError, match="2 cases have 3 parts each, but callgrind wrote 5"):
        overhead_instructions.differences(["a", "b"], [1, 2, 3, 4, 5], 10)


def test_without_valgrind_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing else fails."""
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert overhead_instructions.per_request(BENCHMARKS.parents[1], None, [], 2) == {}


@pytest.mark.skipif(shutil.which("valgrind") is None, reason="valgrind counts: apt-get install valgrind")
def test_instructions_are_counted() -> None:
    """Each case in memory has a figure, and a session costs more than none."""
    counted = overhead_instructions.per_request(BENCHMARKS.parents[1], None, [], 4)
    subjects = overhead_apps.in_memory([])
    assert list(counted) == [str(case) for subject in subjects for case in subject.cases(1)]
    bare = [str(case) for case in subjects[0].cases(1)]
    assert min(counted[case] for case in bare) > 1000
    assert min(counted[case] for case in counted if case not in bare) > max(counted[case] for case in bare)
