"""The file: made, opened, refused, lost. Every error says what is wrong and leaves the file as it is."""

from __future__ import annotations

import fcntl
import logging
import os
import resource
import sqlite3
import stat
import threading
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import pytest

from asgi_sessions import (
    LockTimeoutError,
    SessionData,
    SessionMiddleware,
    SessionStoreError,
    SQLiteSessionStore,
)
from asgi_sessions.stores.checkout import Checkout, LockPolicy
from asgi_sessions.stores.sqlite import place, schema
from asgi_sessions.stores.sqlite.engine import Engine

pytestmark = pytest.mark.anyio


def new(session_id: str = "s") -> SessionData:
    return SessionData(session_id=session_id)


# --- making and opening ---------------------------------------------------------------------------


async def test_it_is_made_for_the_owner_alone(path: Path, store: SQLiteSessionStore) -> None:
    """Whatever the umask: sessions are secrets."""
    before = os.umask(0)
    try:
        await store.set("s", new())
    finally:
        os.umask(before)
    found = {each.name: stat.S_IMODE(each.stat().st_mode) for each in path.parent.iterdir()}
    assert found == {
        "sessions.db": 0o600, "sessions.db-wal": 0o600, "sessions.db-shm": 0o600, "sessions.db-run": 0o700,
    }  # fmt: skip


async def test_nothing_is_left_but_the_database(path: Path, store: SQLiteSessionStore) -> None:
    """After the last one has closed, the log is in the database, which can be copied as it is."""
    await store.set("s", new())
    await store.aclose()
    assert sorted(each.name for each in path.parent.iterdir()) == ["sessions.db", "sessions.db-run"]
    await store.set("t", new("t"))
    assert await store.list_active() == ["s", "t"], "a later call opens it again"


@pytest.mark.parametrize(
    "name", ["a b.db", "50%.db", "a?b#c.db", "ünï.db", "x" * 200, "sub/deep/" + "y" * 90]
)
async def test_a_path_of_any_kind(tmp_path: Path, name: str) -> None:
    """With spaces and percent signs, or too long for a socket's path; waking works there too."""
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    store, other = SQLiteSessionStore(path), SQLiteSessionStore(str(path))
    await store.set("s", new())
    assert await other.exists("s")
    assert path.exists()
    engine = await other._get()
    assert engine._waking._socket is not None
    await store.aclose()
    await other.aclose()


async def test_a_relative_path_is_that_of_the_beginning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An app may change its working directory."""
    monkeypatch.chdir(tmp_path)
    store = SQLiteSessionStore("sessions.db")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    await store.set("s", new())
    await store.aclose()
    assert (tmp_path / "sessions.db").exists()


async def test_links_lead_to_one_database(tmp_path: Path) -> None:
    """A release's folder may have a link to the file: its locks and its log count."""
    (tmp_path / "shared").mkdir()
    (tmp_path / "link.db").symlink_to("shared/sessions.db")
    (tmp_path / "current").symlink_to("shared")
    paths = [tmp_path / "link.db", tmp_path / "current/sessions.db", tmp_path / "shared/sessions.db"]
    stores = [SQLiteSessionStore(path) for path in paths]
    for number, store in enumerate(stores):
        await store.set(f"s{number}", new(f"s{number}"))
    assert await stores[0].list_active() == ["s0", "s1", "s2"]
    taken = await stores[0].checkout("s0", LockPolicy(), None)
    assert isinstance(taken, Checkout)
    for store in stores[1:]:
        with pytest.raises(LockTimeoutError):
            await store.checkout("s0", LockPolicy(wait=0.2), None)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["current", "link.db", "shared"]
    for store in stores:
        await store.aclose()


async def test_names_that_are_no_text(tmp_path: Path) -> None:
    """Nor is a path that begins with two slashes a host's."""
    for path in (os.fsencode(tmp_path) + b"/\xff.db", b"/" + os.fsencode(tmp_path) + b"/sessions.db"):
        store = SQLiteSessionStore(os.fsdecode(path))
        await store.set("s", new())
        assert await store.exists("s")
        await store.aclose()


async def test_many_open_it_at_once(path: Path) -> None:
    """One of them makes it."""
    stores = [SQLiteSessionStore(path) for _ in range(8)]
    async with anyio.create_task_group() as tasks:
        for number, store in enumerate(stores):
            tasks.start_soon(store.set, f"s{number}", new(f"s{number}"))
    assert await stores[0].count_active() == 8
    for store in stores:
        await store.aclose()


# --- what the constructor refuses -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"path": "nowhere/sessions.db"}, "there is no folder .*nowhere.*make it first"),
        ({"path": "."}, "is a folder"),
        ({"path": ""}, "names a file"),
        ({"path": ":memory:"}, "for memory: InMemorySessionStore"),
        ({"path": "a\x00b"}, "names a file"),
        ({"path": "s.db", "default_ttl": 0}, "default_ttl"),
        ({"path": "s.db", "synchronous": "off"}, '"full" or "normal", not \'off\''),
        ({"path": "s.db", "busy_timeout": -1}, "busy_timeout"),
    ],
)
def test_what_cannot_work(arguments: dict[str, Any], message: str) -> None:
    """The message names the remedy."""
    with pytest.raises(ValueError, match=message):
        SQLiteSessionStore(**arguments)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("sqlite://sessions.db", "reads sqlite:///sessions.db"),
        ("sqlite:///", "reads sqlite:///sessions.db"),
        ("sqlite:///a#b.db", "%23"),
        ("sqlite:///s.db?sync=normal", "unknown option 'sync'"),
        ("sqlite:///s.db?synchronous=full&synchronous=normal", "synchronous more than once"),
        ("sqlite:///s.db?busy_timeout=soon", "busy_timeout is a number of seconds, not 'soon'"),
        ("sqlite:////nowhere/at/all/s.db", "there is no folder '/nowhere/at/all'"),
        ("sqlite:s.db", "not a URL"),
    ],
)
def test_urls_that_cannot_work(url: str, message: str) -> None:
    """They fail in the middleware's constructor."""
    with pytest.raises(ValueError, match=message):
        SessionMiddleware(None, "k" * 32, store=url)  # type: ignore[arg-type]  # no app is called


def test_a_url_names_a_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative and absolute paths, percent-encoded, with options; one store for each URL."""
    monkeypatch.chdir(tmp_path)
    for url, path in (
        ("sqlite:///a%20b%25.db?synchronous=normal&busy_timeout=1.5", tmp_path / "a b%.db"),
        (f"sqlite:///{tmp_path}/c.db", tmp_path / "c.db"),
        (
            "sqlite:///caf%E9%FF.db",
            tmp_path / os.fsdecode(b"caf\xe9\xff.db"),
        ),  # no UTF-8, and a path all the same
    ):
        first = SessionMiddleware(None, "k" * 32, store=url)  # type: ignore[arg-type]  # as above
        second = SessionMiddleware(None, "k" * 32, store=url)  # type: ignore[arg-type]  # as above
        assert isinstance(first.store, SQLiteSessionStore)
        assert first.store is second.store
        assert first.store._facts()["path"] == str(path)
        assert first.store._facts()["synchronous"] == ("normal" if "normal" in url else "full")


# --- what is refused at the first use -------------------------------------------------------------


async def refused(path: Path, message: str) -> None:
    """Opening fails with this message, for reads as for writes, and changes nothing."""
    before = path.read_bytes() if path.is_file() else None
    store = SQLiteSessionStore(path, busy_timeout=0.1)
    calls = partial(store.get, "s"), partial(store.set, "s", new()), store.open, store.count_active
    for call in calls:
        with pytest.raises(SessionStoreError, match=message):
            await call()
    health = await store.health_check()
    assert health["healthy"] is False
    assert (path.read_bytes() if path.is_file() else None) == before
    await store.aclose()


async def test_a_file_that_is_no_database(path: Path) -> None:
    """It may be precious."""
    path.write_text("dear diary " * 1000)
    await refused(path, "is no SQLite database; it is left as it is")


async def test_a_short_file_that_is_no_database(path: Path) -> None:
    """It is not taken for a database that was cut off, which may be removed."""
    path.write_text("dear diary")
    await refused(path, "is no SQLite database; it is left as it is")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no other system has them")
async def test_a_pipe(path: Path) -> None:
    """It has no bytes and is no empty file."""
    os.mkfifo(path)
    await refused(path, "is no file, but a pipe")


async def test_an_empty_file(path: Path) -> None:
    """SQLite would take it for a new database, where a database was cut off or the wrong file mounted."""
    path.touch()
    await refused(path, "is empty.*remove it")


async def test_a_database_of_another_program(path: Path) -> None:
    """Its tables stay alone."""
    with closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE session (id)")
        db.commit()
    await refused(path, "database of another program")


async def test_a_newer_schema(path: Path, store: SQLiteSessionStore) -> None:
    """An older release does not touch what it does not know."""
    await store.set("s", new())
    await store.aclose()
    with closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA user_version = 99")
    await refused(path, rf"newer release \(schema 99, this one knows {len(schema.STEPS)}\): upgrade")


@pytest.mark.parametrize(("left", "message"), [(50, "cut off"), (8192, "is damaged")])
async def test_a_truncated_database(path: Path, store: SQLiteSessionStore, left: int, message: str) -> None:
    """No silent new file."""
    await store.set("s", new())
    await store.aclose()
    os.truncate(path, left)
    await refused(path, message)


async def test_a_damaged_page(path: Path, store: SQLiteSessionStore) -> None:
    """What cannot be read is an error, every time, and nobody is told that the session is gone."""
    await store.set_batch({f"s{n}": new(f"s{n}") for n in range(200)})
    await store.aclose()
    with path.open("r+b") as file:
        for page in range(2, 12):
            file.seek(page * 4096)
            file.write(b"\xff" * 4096)
    for _ in range(2):
        with pytest.raises(SessionStoreError, match="damaged: put a backup in its place"):
            await store.get("s1")
        with pytest.raises(SessionStoreError, match="damaged"):
            await store.set("s1", new("s1"))


async def test_a_folder_that_is_gone(tmp_path: Path) -> None:
    """It was there when the store was made."""
    (tmp_path / "data").mkdir()
    store = SQLiteSessionStore(tmp_path / "data" / "sessions.db")
    (tmp_path / "data").rmdir()
    with pytest.raises(SessionStoreError, match="folder of the database does not exist"):
        await store.set("s", new())
    (tmp_path / "data").mkdir()
    assert await store.set("s", new()), "it works when the folder is back"
    await store.aclose()


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
async def test_no_permission(path: Path, store: SQLiteSessionStore) -> None:
    """On the file, and on its folder."""
    await store.set("s", new())
    await store.aclose()
    path.chmod(0o400)
    await refused(path, "cannot be written")
    path.chmod(0o600)
    path.parent.chmod(0o500)
    await refused(path.parent / "other.db", "may not write there")
    path.parent.chmod(0o700)


MOUNTS = """\
22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
30 22 0:40 / /mnt/team\\040files rw - nfs4 server:/export rw
31 22 254:0 /data/x.db /app/sessions.db rw - ext4 /dev/vda rw
32 22 0:41 / /host rw - 9p host rw
33 30 254:0 / /mnt/team\\040files/local rw - xfs /dev/vdb rw
"""


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/mnt/team files/sessions.db", r"network file system \(nfs4\)"),
        ("/app/sessions.db", "mounted as a single file.*mount its folder"),
        ("/mnt/team files/local/sessions.db", None),
        ("/app/other.db", None),
        ("/host/sessions.db", None),
    ],
)
def test_ground_that_does_not_hold(
    path: str, message: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """By what the system says of its mounts; what may be shared by machines is warned of."""
    mounts = tmp_path / "mountinfo"
    mounts.write_text(MOUNTS)
    monkeypatch.setattr(place, "_MOUNTS", mounts)
    where = place.Place(tmp_path / "sessions.db")
    where.path = Path(path)
    with caplog.at_level(logging.WARNING):
        if message is None:
            where.check_ground()
        else:
            with pytest.raises(SessionStoreError, match=message):
                where.check_ground()
    assert bool(caplog.records) is path.startswith("/host")


# --- what goes wrong later ------------------------------------------------------------------------


@pytest.mark.parametrize("synchronous", ["full", "normal"])
async def test_the_file_is_deleted_under_it(path: Path, synchronous: Any, tmp_path: Path) -> None:
    """Nothing is called stored that goes into a file without a name; when the file is back, all is well."""
    store = SQLiteSessionStore(path, synchronous=synchronous)
    await store.set("s", new())
    kept = tmp_path / "kept.db"
    path.rename(kept)
    for _ in range(2):
        with pytest.raises(SessionStoreError, match="deleted or replaced while it was in use"):
            await store.set("t", new("t"))
    assert not path.exists(), "no silent new file"
    kept.rename(path)
    assert await store.set("t", new("t"))
    assert await store.list_active() == ["s", "t"]
    await store.aclose()


async def test_another_file_takes_its_place(path: Path, tmp_path: Path) -> None:
    """A backup that was put back is opened; the call that noticed it fails."""
    backup = SQLiteSessionStore(tmp_path / "backup.db")
    await backup.set("from-the-backup", new("from-the-backup"))
    await backup.aclose()
    store = SQLiteSessionStore(path)
    await store.set("s", new())
    for end in ("", "-wal", "-shm"):
        Path(f"{path}{end}").unlink()
    (tmp_path / "backup.db").rename(path)
    with pytest.raises(SessionStoreError, match="deleted or replaced"):
        await store.set("t", new("t"))
    assert await store.list_active() == ["from-the-backup"]
    await store.aclose()


@pytest.mark.parametrize("synchronous", ["full", "normal"])
async def test_a_foreign_program_locks_it(path: Path, synchronous: Any) -> None:
    """A call waits for busy_timeout; the event loop does not, and reads go on."""
    store = SQLiteSessionStore(path, synchronous=synchronous, busy_timeout=10)
    await store.set("s", new())
    with closing(sqlite3.connect(path, isolation_level=None)) as tool:
        tool.execute("BEGIN IMMEDIATE")
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(store.set, "t", new("t"))
            await anyio.sleep(0.3)
            assert await store.exists("s")
            assert not await store.exists("t")
            tool.execute("COMMIT")
        assert await store.exists("t")
        await store.aclose()
        impatient = SQLiteSessionStore(path, synchronous=synchronous, busy_timeout=0.1)
        await impatient.open()
        tool.execute("BEGIN IMMEDIATE")
        with pytest.raises(SessionStoreError, match="another program keeps the database locked"):
            await impatient.set("u", new("u"))
        tool.execute("COMMIT")
        assert await impatient.set("u", new("u"))
        await impatient.aclose()


async def test_many_calls_while_it_cannot_be_opened(
    path: Path, store: SQLiteSessionStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They share one attempt: one after the other they would wait for minutes, each in a thread."""
    await store.open()
    attempts: list[object] = []

    def attempt(*arguments: Any) -> Engine:
        attempts.append(arguments)
        return Engine(*arguments)

    monkeypatch.setattr("asgi_sessions.stores.sqlite.store.Engine", attempt)
    gate = os.open(f"{path}-run/gate", os.O_RDWR)
    fcntl.flock(gate, fcntl.LOCK_EX)  # somebody is frozen behind it
    impatient = SQLiteSessionStore(path, busy_timeout=0.5)

    async def refused() -> None:
        with pytest.raises(SessionStoreError, match="was frozen in the middle of a write"):
            await impatient.get("s")

    async with anyio.create_task_group() as tasks:
        for _ in range(20):
            tasks.start_soon(refused)
    os.close(gate)
    assert len(attempts) == 1
    assert await impatient.get("s") is None
    await impatient.aclose()


async def test_a_full_disk(path: Path, store: SQLiteSessionStore) -> None:
    """The change is refused, what is stored stays readable, and all is well when there is room again."""
    big = SessionData(session_id="big", metadata={"x": "y" * 200_000})
    await store.set("s", new())
    engine = await store._get()
    (pages,) = engine._db.execute("PRAGMA page_count").fetchone()
    engine._db.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(SessionStoreError, match="the disk is full"):
        await store.set("big", big)
    async with anyio.create_task_group() as tasks:  # one that fails takes no other with it
        for name in ("a", "b"):
            tasks.start_soon(store.set, name, new(name))
        with pytest.raises(SessionStoreError, match="the disk is full"):
            await store.set("big", big)
    assert await store.list_active() == ["a", "b", "s"]
    assert await store.delete("a")
    engine._db.execute("PRAGMA max_page_count = 1000000")
    assert await store.set("big", big)


async def test_a_full_disk_has_room_for_what_changes(path: Path, store: SQLiteSessionStore) -> None:
    """Sessions that are there change and end all the same: the log begins anew where it cannot grow."""
    data = SessionData(session_id="s", metadata={"x": "y" * 3000})
    records = {f"s{n}": data.model_copy(update={"session_id": f"s{n}"}) for n in range(100)}
    await store.set_batch(records)
    await store.aclose()
    await store.open()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size, limits[1]))
    try:
        for _ in range(3):
            for session_id, record in records.items():
                assert await store.set(session_id, record)
        assert all((await store.delete_batch(records)).values())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


async def test_large_records(store: SQLiteSessionStore) -> None:
    """A megabyte comes back as it was."""
    data = SessionData(session_id="s", metadata={"x": "☃" * 150_000, "y": "z" * 400_000})
    await store.set("s", data)
    assert await store.get("s") == data


# --- its size -------------------------------------------------------------------------------------


async def test_it_shrinks(path: Path) -> None:
    """What has expired is dropped some at a time, and the file is given back."""
    seconds = [1000.0]
    store = SQLiteSessionStore(path, clock=lambda: seconds[0])
    filling = SessionData(session_id="s", metadata={"x": "y" * 3000})
    records = {f"s{n}": filling.model_copy(update={"session_id": f"s{n}"}) for n in range(1000)}
    await store.set_batch(records, ttl=10)
    await store.set("stays", new("stays"))
    await store.aclose()
    full = path.stat().st_size
    seconds[0] += 11
    assert await store.count_active() == 1
    stats = await store.get_stats()
    assert (stats["total_sessions"], stats["expired_sessions"]) == (1001, 1000)
    assert await store.cleanup_expired() == 1000
    assert await store.cleanup_expired() == 0
    await store.aclose()
    assert path.stat().st_size < full / 3
    assert await store.list_active() == ["stays"]
    await store.aclose()


async def test_the_log_does_not_grow_without_end(path: Path, store: SQLiteSessionStore) -> None:
    """It is folded into the database after some thousand pages, also while somebody reads page by page."""
    data = SessionData(session_id="s", metadata={"x": "y" * 20_000})
    await store.set_batch({f"s{n:04}": new(f"s{n:04}") for n in range(600)})
    reading = store.iter_active()
    await anext(reading)
    sizes = []
    for _ in range(40):
        for _ in range(100):
            await store.set("s", data)
        sizes.append(Path(f"{path}-wal").stat().st_size)
    await reading.aclose()
    assert max(sizes) < 60_000_000, "4,000 changes of 5 pages each are 80 MB"


# --- the schema -----------------------------------------------------------------------------------


async def test_a_schema_migrates_forward(
    path: Path, store: SQLiteSessionStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A newer release takes the steps that are missing, once; records stay."""
    await store.set("s", new())
    await store.aclose()
    step = "ALTER TABLE session ADD COLUMN device TEXT; CREATE INDEX session_device ON session (device);"
    monkeypatch.setattr(schema, "STEPS", (*schema.STEPS, step))
    stores = [SQLiteSessionStore(path) for _ in range(3)]
    async with anyio.create_task_group() as tasks:
        for each in stores:
            tasks.start_soon(each.open)
    assert await stores[0].exists("s")
    assert await stores[1].set("t", new("t"))
    with closing(sqlite3.connect(path)) as db:
        assert schema.schema_of(db) == len(schema.STEPS)
        assert "device" in {row[1] for row in db.execute("PRAGMA table_info(session)")}
    for each in stores:
        await each.aclose()


async def test_a_step_that_fails_changes_nothing(
    path: Path, store: SQLiteSessionStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps and number are one transaction."""
    await store.set("s", new())
    await store.aclose()
    monkeypatch.setattr(schema, "STEPS", (*schema.STEPS, "DROP TABLE retired; SELECT * FROM absent;"))
    with pytest.raises(SessionStoreError, match="no such table"):
        await store.open()
    monkeypatch.undo()
    assert await store.exists("s")
    with closing(sqlite3.connect(path)) as db:
        assert schema.schema_of(db) == len(schema.STEPS)
        assert db.execute("SELECT count(*) FROM retired").fetchone() == (0,)
    await store.aclose()


def test_it_is_made_whole_or_not_at_all(path: Path) -> None:
    """What a process has left that was killed while it made the database is no obstacle."""
    new = Path(f"{path}-new")
    for left in (new, Path(f"{new}-wal"), Path(f"{path}-wal")):
        left.write_bytes(b"something")
    where = place.Place(path)
    done = threading.Thread(target=schema.prepare, args=(where, 1.0))
    done.start()
    done.join()
    with closing(sqlite3.connect(path)) as db:
        assert schema.schema_of(db) == len(schema.STEPS)
        assert db.execute("PRAGMA auto_vacuum").fetchone() == (2,)
    assert sorted(each.name for each in path.parent.iterdir()) == ["sessions.db"]
