"""A power cut: the database is whole, and with `synchronous="full"` what was acknowledged is there."""

from __future__ import annotations

import json
import random
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from asgi_sessions import SessionData, SQLiteSessionStore

from .power import STRACE, replay
from .processes import Process

pytestmark = pytest.mark.anyio

NAMES = [f"s{n}" for n in range(4)]


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace shows what is synced")
@pytest.mark.parametrize("synchronous", ["full", "normal"])
async def test_a_power_cut(
    synchronous: str, path: Path, tmp_path: Path, start: Callable[..., Process],
    request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    """The files are rebuilt from a trace: what was synced, and of later writes any part."""
    store = SQLiteSessionStore(path)
    await store.set_batch({name: SessionData(session_id=name) for name in NAMES})
    await store.aclose()
    before = path.read_bytes()
    trace = tmp_path / "trace"
    process = start(*STRACE, str(trace), synchronous=synchronous)
    process.say("count_often", NAMES)
    cuts = 300 if request.config.getoption("--long") else 40
    for _ in range(cuts):
        assert process.hear() is not None
    process.kill()
    chance, told, seen, late = random.Random(1), dict.fromkeys(NAMES, 0), 0, 0
    for disk, line in replay(trace, path.name):
        said = json.loads(line)
        if said == "ready":
            continue
        told[said[0]] = said[1]
        disk.synced.setdefault(str(path), bytearray(before))
        seen += 1
        if seen % 2 == 0:
            folder = tmp_path / f"cut-{seen}"
            folder.mkdir()
            disk.cut(folder, chance)
            late += await _lost(folder / path.name, told)
    assert seen > cuts / 2, "the trace ends early"
    assert (late == 0) is (synchronous == "full"), "acknowledged changes are lost"


async def _lost(path: Path, told: dict[str, int]) -> int:
    """How many acknowledged changes are missing, in a database that is whole."""
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    store = SQLiteSessionStore(path)
    lost = 0
    for name, count in told.items():
        found = await store.get(name)
        assert found is not None
        lost += max(count - found.message_count, 0)
    await store.aclose()
    return lost
