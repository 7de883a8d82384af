"""The benchmarks of scale and of whole servers run, and tell the truth about what must not go wrong."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from redis import Redis

from asgi_sessions import InMemorySessionStore, LockTimeoutError, RedisSessionStore, SessionData
from asgi_sessions.stores.checkout import Checkout, LockPolicy, Outcome

BENCHMARKS = Path(__file__).parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

# The folder is on the path only now, and pyright does not see that it is.
# pyright: reportMissingImports=false
import end_to_end  # noqa: E402
import one_session  # noqa: E402
import page_load  # noqa: E402
import scale  # noqa: E402
from browsing import Browser, Request  # noqa: E402
from end_to_end_apps import WatchedMemory, WatchedRedis  # noqa: E402

pytestmark = pytest.mark.anyio


def quick(name: str, directory: Path) -> dict[str, Any]:
    """The report of a benchmark that was run as a user runs it, but quickly."""
    file = directory / "report.json"
    command = [sys.executable, "-W", "error", str(BENCHMARKS / name), "--quick", "--json", str(file)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    found: dict[str, Any] = json.loads(file.read_text())
    assert found["title"] in ran.stdout
    return found


def table(report: dict[str, Any], title: str) -> dict[str, dict[str, Any]]:
    """The rows of the table whose title begins so, by their names, each cell by its column's."""
    (found,) = [each for each in report["tables"] if each["title"].startswith(title)]
    return {row[0]: dict(zip(found["columns"][1:], row[1:], strict=True)) for row in found["rows"]}


def broken(report: dict[str, Any]) -> list[str]:
    """Targets that say that nothing may be lost or go wrong, and that were not met."""
    strict = [each for each in report["targets"] if each["relation"] == "=="]
    assert strict, "nothing was checked"
    return [f"{each['name']}: {each['value']}" for each in strict if not each["met"]]


# -- what the scripts report ---------------------------------------------------------------------------------


def test_scale_reports_every_population(tmp_path: Path) -> None:
    """Each size has a figure in each row, every write is found again, and full stores lose track of none."""
    report = quick("scale.py", tmp_path)
    assert broken(report) == []
    sizes = {"100", "1,000", "last / first"}
    for title in ("µs per request", "bytes per session", "creating a session", "ms per call", "overviews"):
        for name, row in table(report, title).items():
            assert row.keys() == sizes
            found = [value for value in row.values() if value is not None]
            least = 0.0 if "garbage collection" in name else 1e-9  # a small store may go without one
            assert found, f"{title}: {name}: no figures"
            assert min(found) >= least, f"{title}: {name}: {row}"
    for row in table(report, "µs per sign-in").values():
        assert row.keys() == {"1", "100", "10,000", "last / first"}
        assert min(row.values()) > 0
    costs = table(report, "µs per request")
    assert {name.rpartition(", ")[2] for name in costs} == {"in memory", "in a file", "on Redis"}
    assert {name.partition(",")[0] for name in costs} >= {"read", "write"}


def test_end_to_end_reports_every_subject(tmp_path: Path) -> None:
    """No answer but 200, no write lost or invented, no client that meets its own lock."""
    report = quick("end_to_end.py", tmp_path)
    assert broken(report) == []
    rows = table(report, "4 connections")
    assert rows.keys() == {f"{kind}, {name}" for kind in ("read", "write") for name in end_to_end.QUICK}
    assert all(row["requests/s"] > 0 and row["p99 ms"] >= row["p50 ms"] > 0 for row in rows.values())
    writes = table(report, "what became")
    for name in ("ours, memory", "ours, SQLite", "ours, Redis"):
        assert writes[name]["acknowledged writes"] > 0
        assert (writes[name]["lost"], writes[name]["answers but 200"]) == (0, 0)
    for place, row in table(report, "one client").items():
        assert (row["requests"], row["met its own lock"], row["writes lost"]) == (200, 0, 0), place
    tool = "wrk" if shutil.which("wrk") else "httpx in one process"
    assert report["facts"]["load by"].startswith(tool)


def test_page_load_reports_every_subject(tmp_path: Path) -> None:
    """Each page is there, every request of it was answered with 200, and no write was lost."""
    report = quick("page_load.py", tmp_path)
    assert broken(report) == []
    rows = table(report, "a page")
    assert [*rows] == [*page_load.QUICK]
    pages = 2  # one warms up
    for name, row in rows.items():
        assert min(row["page ms"], row["stream begins ms"]) > 0, name
        assert row["200"] == pages * (1 + len(page_load.PAGE)), name
        assert (row["409"], row["503"], row["other"]) == (0, 0, 0), name
        assert row["writes"] == pages, name


def test_one_session_reports_every_scene(tmp_path: Path) -> None:
    """Each scene has a figure for each subject, every answer is a 200, and no write was lost."""
    report = quick("one_session.py", tmp_path)
    assert broken(report) == []
    rows = table(report, "one session")
    assert [*rows] == [*one_session.QUICK]
    for name, row in rows.items():
        assert min(row["crowd /s"], row["20 slow reads ms"], row["writing reads /s"]) > 0, name
        assert row["200"] >= row["writes"] > 0, name
        assert (row["409"], row["503"], row["other"], row["lost"]) == (0, 0, 0, 0), name


async def test_load_without_wrk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no wrk, httpx makes the load; what it is told is compared just the same."""
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with end_to_end.served("ours, memory", "", "asyncio", "h11") as server:
        end_to_end.wait_for(server)
        server.begin(3)
        figures = await end_to_end.turn(server, "write", 3, 0.2)
        assert figures["per_s"] > 0
        assert figures["p99"] >= figures["p50"] > 0
        assert min(server.written) > 0
        assert server.counts() == server.written
        assert (server.disagreements(), server.refused) == ((0, 0), 0)


# -- that what they check can fail ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counts", "written", "interrupted", "expected"),
    [
        ([3, 4], [3, 4], [0, 0], (0, 0)),
        ([4, 5], [3, 4], [1, 1], (0, 0)),
        ([2, 9], [3, 4], [1, 5], (1, 0)),
        ([5, 4], [3, 4], [1, 1], (0, 1)),
        ([1, 9], [3, 4], [0, 1], (2, 4)),
    ],
    ids=["equal", "cut off, stored", "lost beside one that has more", "invented", "both"],
)
def test_disagreements(
    counts: Sequence[int], written: Sequence[int], interrupted: Sequence[int], expected: tuple[int, int]
) -> None:
    """A write that is lost in one session is not made up for by another session."""
    assert end_to_end.disagreements(counts, written, interrupted) == expected


@pytest.mark.skipif(
    importlib.util.find_spec("starsessions") is None,
    reason="starsessions is compared with: pip install 'asgi-server-sessions[bench]'",
)
async def test_lost_writes_of_a_page_are_found() -> None:
    """starsessions has no lock: a read that began before the write stores what it has loaded."""
    options = SimpleNamespace(loop="asyncio", http="h11", pages=1, rounds=1)
    measured = await page_load.measure(["starsessions, memory"], options)
    assert measured.acknowledged == {"starsessions, memory": 2}
    assert measured.lost["starsessions, memory"] in (1, 2)  # on a busy machine one may come after the reads


async def test_answers_of_a_browser_are_counted() -> None:
    """An answer by its status; a write only where it was acknowledged."""
    browser = Browser(0)
    for path, status in (("/api/read", 200), ("/api/write", 200), ("/api/write", 503), ("/add", 409)):
        browser.note(Request("GET", path), status)
    assert page_load.by_status(browser.answers) == [2, 1, 1, 0]
    assert browser.acknowledged == 1


async def test_a_browser_keeps_the_latest_cookie() -> None:
    """Until an answer removes it."""
    browser = Browser(0)
    sent = []
    for line in ("session=a; path=/; httponly", " session=b; Path=/", "session=; Max-Age=0; Path=/"):
        browser.set_cookie(line)
        sent.append(browser.cookie_header)
    assert sent == ["cookie: session=a\r\n", "cookie: session=b\r\n", ""]


IMPATIENT = LockPolicy(wait=0.05)


async def test_meeting_in_memory_is_counted() -> None:
    """A request that comes while the session is held is one meeting; one that comes afterwards is none."""
    store = WatchedMemory()
    await store.set("a", SessionData(session_id="a"))
    first = await store.checkout("a", IMPATIENT, None)
    assert isinstance(first, Checkout)
    with pytest.raises(LockTimeoutError):
        await store.checkout("a", IMPATIENT, None)
    assert store.met == 1
    await store.release(first)
    await store.checkout("a", IMPATIENT, None)
    assert store.met == 1


async def test_meeting_on_redis_is_counted(redis_url: str) -> None:
    """Both by the store and, where the other is in another process, by Redis."""
    watched, elsewhere = WatchedRedis(redis_url), RedisSessionStore(redis_url)
    await watched.set("a", SessionData(session_id="a"))
    with Redis.from_url(redis_url) as redis:
        redis.config_resetstat()
        held = await watched.checkout("a", IMPATIENT, None)
        assert isinstance(held, Checkout)
        assert end_to_end.waits(redis) == 0
        with pytest.raises(LockTimeoutError):
            await elsewhere.checkout("a", IMPATIENT, None)
        assert end_to_end.waits(redis) > 0
    assert watched.met == 0
    with pytest.raises(LockTimeoutError):
        await watched.checkout("a", IMPATIENT, None)
    assert watched.met == 1
    await watched.aclose()
    await elsewhere.aclose()


class ForgetfulStore(InMemorySessionStore):
    """Says that it has stored what it has not."""

    async def commit(self, checkout: Checkout, record: bytes, *, release: bool) -> Outcome:
        await super().commit(checkout, checkout.record, release=release)
        return Outcome.STORED


@pytest.mark.parametrize(("store", "lost"), [(InMemorySessionStore, 0), (ForgetfulStore, 20)])
async def test_lost_writes_are_found(store: type[InMemorySessionStore], lost: int) -> None:
    """What a population was told to be written is compared with its records."""
    population = scale.Population(store(), 5)
    await population.store.set_batch({scale.name(n): scale.data(n) for n in range(5)})
    await population.requests(20)
    assert await population.lost() == {"lost": lost, "written": 20}


async def test_a_lost_session_ends_a_measurement() -> None:
    """A request without its session is never taken for a fast one."""
    population = scale.Population(InMemorySessionStore(), 5)
    with pytest.raises(RuntimeError, match="the session is lost"):
        await population.requests(1)


async def test_unaccounted_sessions_are_found() -> None:
    """A full store's books are balanced, and where they are not it is told."""
    population = scale.InMemory(10)
    await population.fill()
    await population.make_room(25)
    assert await population.unaccounted() == {"made": 60, "unaccounted": 0}
    population._next += 1
    assert await population.unaccounted() == {"made": 61, "unaccounted": 1}
