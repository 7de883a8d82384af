"""The middleware on the Redis store makes the promised round trips, and its faults have answers."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest
from redis import Redis
from redis_server import RedisServer, free_port
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from asgi_sessions import RedisSessionStore, SessionData, SessionMiddleware, SessionStoreError
from asgi_sessions.record.values import new_session_id
from asgi_sessions.stores.checkout import Checkout, LockPolicy, Missing, Outcome

SECRET = "a secret of the tests, long enough"


def read(request: Request) -> PlainTextResponse:
    return PlainTextResponse(str(request.session.get("n", 0)))


async def write(request: Request) -> PlainTextResponse:
    request.session["n"] = request.session.get("n", 0) + 1
    return PlainTextResponse(str(request.session["n"]))


async def login(request: Request) -> PlainTextResponse:
    request.session.login("ada")  # type: ignore[attr-defined]  # Starlette's type knows its own class only
    return PlainTextResponse("in")


async def logout(request: Request) -> PlainTextResponse:
    request.session.logout()  # type: ignore[attr-defined]  # as above
    return PlainTextResponse("out")


async def idle(request: Request) -> PlainTextResponse:
    return PlainTextResponse("no session needed")


def site(url: str, **options: Any) -> Starlette:
    routes = [
        Route("/read", read), Route("/write", write), Route("/login", login), Route("/logout", logout),
        Route("/idle", idle), Route("/read-only", read),
    ]  # fmt: skip
    middleware = Middleware(
        SessionMiddleware, secret_key=SECRET, store=url, read_only=["/read-only"], **options
    )
    return Starlette(routes=routes, middleware=[middleware])


class Calls:
    """Counts the scripts and commands that clients sent, by the server's own count."""

    def __init__(self, url: str) -> None:
        self._client = Redis.from_url(url)
        self.reset()

    def reset(self) -> None:
        self._client.config_resetstat()

    def count(self) -> int:
        stats = self._client.info("commandstats")
        return sum(stats.get(f"cmdstat_{name}", {}).get("calls", 0) for name in ("evalsha", "eval"))

    def kept(self) -> list[bytes]:
        """Every key on the server."""
        return sorted(key for key in self._client.keys("*") if isinstance(key, bytes))

    def close(self) -> None:
        self._client.close()


@pytest.fixture
def calls(redis_url: str) -> Iterator[Calls]:
    counter = Calls(redis_url)
    yield counter
    counter.close()


@pytest.mark.parametrize(
    ("path", "most"),
    [("/write", 2), ("/read", 2), ("/read-only", 1)],
    ids=["a locked write", "a locked read: the release is not waited for", "a read-only route"],
)
def test_round_trips_with_a_session(redis_url: str, calls: Calls, path: str, most: int) -> None:
    """One trip before the app runs, and at most one after it."""
    with TestClient(site(redis_url)) as client:
        client.get("/write")
        for _ in range(3):
            client.get(path)  # the scripts are known to the server from here on
        calls.reset()
        client.get(path)
        assert calls.count() == most


@pytest.mark.parametrize(("path", "trips"), [("/read", 1), ("/write", 2)])
def test_round_trips_without_the_lock(redis_url: str, calls: Calls, path: str, trips: int) -> None:
    """`lock="auto"`: a safe request takes one trip, and a second one where it changed something."""
    with TestClient(site(redis_url, lock="auto")) as client:
        for _ in range(3):
            client.get("/write")
            client.get("/read")
        calls.reset()
        client.get(path)
        assert calls.count() == trips


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("comes_first", "most"), [("a change", 4), ("a holder here", 4), ("a holder elsewhere", 4)]
)
async def test_round_trips_of_an_app_that_is_run_twice(
    redis_url: str, calls: Calls, comes_first: str, most: int
) -> None:
    """At most four, those of the others aside."""
    store, elsewhere = RedisSessionStore(redis_url), RedisSessionStore(redis_url)
    others = store if comes_first == "a holder here" else elsewhere
    runs: list[int] = []
    theirs = 0

    async def come_first(session_id: str) -> None:
        nonlocal theirs
        before = calls.count()
        if comes_first == "a change":
            await others.increment_counter(session_id, "n", 10)
            theirs = calls.count() - before
            return
        taken = await others.checkout(session_id, LockPolicy(), None)
        assert isinstance(taken, Checkout)
        group.start_soon(release_later, taken)
        theirs = 2  # to take the lock, and to release it

    async def release_later(taken: Checkout) -> None:
        await anyio.sleep(0.1)
        await others.release(taken)

    async def contended(request: Request) -> PlainTextResponse:
        runs.append(1)
        answer = await write(request)
        if len(runs) == 4:
            await come_first(request.session.session_id)  # type: ignore[attr-defined]  # as above
        return answer

    middleware = [Middleware(SessionMiddleware, secret_key=SECRET, store=store, lock="auto")]
    app = Starlette(routes=[Route("/", contended)], middleware=middleware)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://shop") as client:
        for _ in range(3):
            await client.get("/")
        async with anyio.create_task_group() as group:
            calls.reset()
            assert (await client.get("/")).text == ("14" if comes_first == "a change" else "4")
    await store.aclose()
    await elsewhere.aclose()
    assert len(runs) == 5
    assert calls.count() - theirs <= most


@pytest.mark.parametrize("path", ["/read", "/idle", "/read-only", "/logout"])
def test_without_a_session_redis_is_not_asked(redis_url: str, calls: Calls, path: str) -> None:
    """Anonymous traffic costs no trip and leaves no key."""
    with TestClient(site(redis_url)) as client:
        calls.reset()
        assert client.get(path).status_code == 200
        assert calls.count() == 0
        assert calls.kept() == []


def test_a_session_is_one_key_and_ends_as_none(redis_url: str, calls: Calls) -> None:
    """After each request only the record is there; after logout nothing that could be a session."""
    with TestClient(site(redis_url)) as client:
        client.get("/write")
        client.get("/read")
        client.get("/write")
        assert len(calls.kept()) == 1
        assert Redis.from_url(redis_url).ttl(calls.kept()[0]) > 0
        client.get("/logout")
        assert calls.kept() == []


@pytest.mark.parametrize("managed", [True, False], ids=["one loop", "a loop per call"])
def test_event_loops_come_and_go(redis_url: str, managed: bool) -> None:
    """One middleware serves a test client with and without its context manager."""
    client = TestClient(site(redis_url))
    if managed:
        with client:
            numbers = [client.get("/write").text for _ in range(4)]
    else:
        numbers = [client.get("/write").text for _ in range(4)]
    assert numbers == ["1", "2", "3", "4"]


def test_a_client_never_meets_its_own_lock(redis_url: str) -> None:
    """The release of an unchanged session is written before the answer leaves: no wait for oneself."""
    waits: list[str] = []
    app = site(redis_url, lock_wait=0, on_event=lambda event: waits.append(event.name))
    with TestClient(app) as client:
        client.get("/write")
        assert {client.get("/read").status_code for _ in range(200)} == {200}
    assert "lock_timeout" not in waits


def test_a_restarted_server_learns_the_scripts_again(own_redis: RedisServer) -> None:
    """NOSCRIPT is no error of a request; a restart without data leaves anonymous sessions."""
    with TestClient(site(own_redis.url)) as client:
        assert client.get("/write").text == "1"
        Redis.from_url(own_redis.url).script_flush()
        assert client.get("/write").text == "2"
        own_redis.restart()
        assert client.get("/read").text == "0"
        assert client.get("/write").text == "1"


def test_a_store_that_is_down(own_redis: RedisServer) -> None:
    """Requests with a session get 503 and `Retry-After`, all others their page; then all is well again."""
    with TestClient(site(own_redis.url)) as client, TestClient(site(own_redis.url)) as stranger:
        client.get("/write")
        own_redis.kill()
        answer = client.get("/read")
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        assert answer.headers["cache-control"] == "no-store"
        assert "redis" not in answer.text.lower()
        assert client.get("/write").status_code == 503
        assert stranger.get("/read").status_code == 200
        assert stranger.get("/write").status_code == 503
        own_redis.restart()
        assert client.get("/write").status_code == 200


def test_a_store_that_was_never_there() -> None:
    """The app starts, and answers what needs no session."""
    with TestClient(site(f"redis://127.0.0.1:{free_port()}/0")) as client:
        assert client.get("/read").status_code == 200
        assert client.get("/write").status_code == 503


def test_a_store_that_does_not_answer() -> None:
    """A peer that accepts and says nothing costs the socket timeout, not more."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"redis://127.0.0.1:{silent.getsockname()[1]}/0?socket_timeout=0.2&socket_connect_timeout=0.2"
        with TestClient(site(url)) as client:
            assert client.get("/write").status_code == 503


def test_a_read_only_replica_stores_nothing_and_says_so(own_redis: RedisServer) -> None:
    """READONLY is a store fault: 503, and the session is whole when the server writes again."""
    admin = Redis.from_url(own_redis.url)
    with TestClient(site(own_redis.url)) as client:
        client.get("/write")
        admin.replicaof("127.0.0.1", str(free_port()))
        assert client.get("/write").status_code == 503
        admin.replicaof("NO", "ONE")
        assert client.get("/write").text == "2"
    admin.close()


FOREIGN = [b"", b"not ours", b"asgi1:", b'{"session_id": "x"}', b"asgi9:0123456789abcdef:0:0:{}"]


@pytest.mark.parametrize("value", FOREIGN, ids=repr)
def test_what_is_not_a_record_of_ours_is_left_alone(redis_url: str, calls: Calls, value: bytes) -> None:
    """Foreign bytes at the key give a fresh session, no lock, and stay as they are."""
    admin = Redis.from_url(redis_url)
    with TestClient(site(redis_url)) as client:
        client.get("/write")
        key = calls.kept()[0]
        admin.set(key, value, ex=100)
        assert client.get("/read").text == "0"
        assert admin.get(key) == value
        assert calls.kept() == [key]
    admin.close()


def test_a_wrong_type_at_the_key_is_left_alone(redis_url: str, calls: Calls) -> None:
    """A hash where a record should be gives a fresh session and no lock."""
    admin = Redis.from_url(redis_url)
    with TestClient(site(redis_url)) as client:
        client.get("/write")
        key = calls.kept()[0]
        admin.delete(key)
        admin.hset(key, "a", "b")
        assert client.get("/read").text == "0"
        assert client.get("/write").text == "1"
        assert admin.hgetall(key) == {b"a": b"b"}
    admin.close()


def test_a_record_that_was_cut_short(redis_url: str, calls: Calls) -> None:
    """Truncated JSON under a whole header is unreadable: fresh session, the bytes stay."""
    admin = Redis.from_url(redis_url)
    with TestClient(site(redis_url)) as client:
        client.get("/write")
        key = calls.kept()[0]
        admin.set(key, cut := admin.get(key)[:-9], keepttl=True)  # type: ignore[index]  # it is bytes
        assert client.get("/read").text == "0"
        assert admin.get(key) == cut
        assert calls.kept() == [key]
    admin.close()


def test_login_moves_the_session_and_keeps_its_end(redis_url: str, calls: Calls) -> None:
    """A new key with the rest of the old one's life, the old id retired for a minute."""
    admin = Redis.from_url(redis_url)
    with TestClient(site(redis_url, max_age=1000)) as client:
        client.get("/write")
        before = calls.kept()[0]
        admin.pexpire(before, 500_000)
        old = client.cookies["session"]
        client.get("/login")
        after = [key for key in calls.kept() if key.endswith(b"}") and b":user" not in key]
        assert before not in after
        assert len(after) == 1
        assert 0 < admin.ttl(after[0]) <= 1000
        assert 50 < admin.ttl(before + b":retired") <= 60
        assert client.get("/read").text == "1"
        client.cookies.clear()
        late = client.get("/read", headers={"cookie": f"session={old}"})
        assert (late.text, "set-cookie" in late.headers) == ("0", False)
        assert client.get("/write", headers={"cookie": f"session={old}"}).status_code == 409
    admin.close()


@pytest.mark.anyio
@pytest.mark.parametrize(
    "url", ["redis://:pw@127.0.0.1:{port}/0?protocol={resp}", "unix://:pw@{socket}?protocol={resp}"]
)
@pytest.mark.parametrize("resp", [2, 3])
async def test_every_way_to_connect(tmp_path: Path, url: str, resp: int) -> None:
    """TCP and Unix sockets, with a password, on both protocols: the same store, counting in turns."""
    with RedisServer("--requirepass", "pw", "--unixsocket", str(tmp_path / "redis.sock")) as server:
        store = RedisSessionStore(url.format(port=server.port, socket=tmp_path / "redis.sock", resp=resp))
        data = SessionData(session_id=new_session_id())
        await store.set(data.session_id, data)
        async with anyio.create_task_group() as tasks:
            for _ in range(20):
                tasks.start_soon(store.increment_counter, data.session_id, "message_count")
        counted = await store.get(data.session_id)
        await store.aclose()
    assert counted is not None
    assert counted.message_count == 20


@pytest.mark.anyio
async def test_a_replica_is_not_believed_that_a_record_is_absent(own_redis: RedisServer) -> None:
    """It may lag behind: whoever asks it gets a fault, not a session that has ended."""
    store, other = RedisSessionStore(own_redis.url), RedisSessionStore(own_redis.url)
    with Redis(port=own_redis.port) as admin:
        await store.set("s", SessionData(session_id="s"))
        taken = await store.checkout("s", LockPolicy(), None)
        assert isinstance(taken, Checkout)
        admin.delete("session:{s}")
        admin.replicaof("127.0.0.1", str(free_port()))
        for lock in (LockPolicy(), None):
            with pytest.raises(SessionStoreError):
                await other.checkout("s", lock, None)
        with pytest.raises(SessionStoreError):
            await store.commit(taken, taken.record, release=False)
        admin.replicaof("NO", "ONE")
    assert await other.checkout("s", LockPolicy(), None) is Missing.ABSENT
    assert await store.commit(taken, taken.record, release=True) is Outcome.GONE
    await store.aclose()
    await other.aclose()


@pytest.mark.parametrize("prefix", ["my session:", "session:\n", "\t", "a\u00a0b:", "\x00"])
def test_a_prefix_with_white_space_is_refused(prefix: str) -> None:
    """It is a slip of the pen, and no tool that lists keys would show it."""
    with pytest.raises(ValueError, match=r"prefix=.* has white-space or control characters; try 'app:"):
        RedisSessionStore("redis://localhost", prefix)
