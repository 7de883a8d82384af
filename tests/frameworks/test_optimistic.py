"""`lock="auto"` in frameworks: what an app leaves where it is run twice because another change came first."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from importlib import import_module
from typing import Any

import anyio
import httpx
import pytest
from asgi import KEY
from browser import served
from fastapi import BackgroundTasks, Depends, FastAPI
from fastapi import Request as FastAPIRequest
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Mount, Route

from asgi_sessions import InMemorySessionStore, Session, SessionMiddleware, get_session
from asgi_sessions.asgi import ASGIApp
from asgi_sessions.record.codec import encode_checked
from asgi_sessions.request import rerun
from asgi_sessions.stores.checkout import Checkout, LockPolicy, Outcome

pytestmark = pytest.mark.anyio

# Any: their types know no session but their own
litestar: Any = import_module("litestar")
quart: Any = import_module("quart")

Endpoint = Callable[[Request], Awaitable[Response]]


class ContendedStore(InMemorySessionStore):
    """When told to, another request adds 10 to `n` just before the next commit without the lock."""

    is_contended = False

    async def commit_unlocked(self, checkout: Checkout, record: bytes) -> Outcome:
        if self.is_contended:
            self.is_contended = False
            taken = await self.checkout(checkout.session_id, LockPolicy(), None)
            assert isinstance(taken, Checkout)
            data = self.read(taken.record)
            data.metadata["n"] += 10
            await self.commit(taken, encode_checked(data), release=True)
            await anyio.sleep(0.02)  # as the way to a server takes: tasks of the app may go on meanwhile
        return await super().commit_unlocked(checkout, record)


@pytest.fixture
def store() -> ContendedStore:
    return ContendedStore()


@pytest.fixture
def did() -> list[str]:
    """What the app did while the request under test was served, in order."""
    return []


@pytest.fixture
def sessions(store: ContendedStore) -> Middleware:
    return Middleware(SessionMiddleware, **options(store))


def options(store: ContendedStore) -> dict[str, Any]:
    return {"secret_key": KEY, "store": store, "lock": "auto"}


def count(session: Session) -> int:
    session["n"] = session.get("n", 0) + 1
    return int(session["n"])


def page(did: list[str], note: str = "ran", **options: Any) -> Endpoint:
    """Counts, and answers the count."""

    async def endpoint(request: Request) -> Response:
        did.append(note)
        return PlainTextResponse(str(count(get_session(request))), **options)

    return endpoint


async def ask_twice(app: ASGIApp, store: ContendedStore, did: list[str], path: str = "/") -> httpx.Response:
    """Begin a session, then ask once more while another request comes between: that answer."""
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://shop.example") as client:
        assert (await client.get(path)).status_code < 500
        did.clear()
        store.is_contended = True
        answer = await client.get(path)
        assert not store.is_contended
        assert len(store._locks) == 0
        return answer


async def stored(store: ContendedStore) -> dict[str, Any]:
    (session_id,) = await store.list_active()
    data = await store.get(session_id)
    assert data is not None
    return data.metadata


# -- Starlette -----------------------------------------------------------------------------------------------


async def test_error_handlers_do_not_hear_of_it(
    store: ContendedStore, sessions: Middleware, did: list[str]
) -> None:
    """Neither the one for 500, nor one for all exceptions, nor a middleware that catches what it can."""

    async def handle(request: Request, error: Exception) -> Response:
        did.append(f"handled {type(error).__name__}")
        return PlainTextResponse("handled", 500)

    class Catching(BaseHTTPMiddleware):
        async def dispatch(self, request: Request, call_next: RequestResponseEndpoint) -> Response:
            try:
                return await call_next(request)
            except Exception as error:
                return await handle(request, error)

    app = Starlette(
        routes=[Route("/", page(did))],
        middleware=[Middleware(Catching), sessions, Middleware(Catching)],
        exception_handlers={Exception: handle, 500: handle, HTTPException: handle},
    )
    answer = await ask_twice(app, store, did)
    assert (answer.status_code, answer.text) == (200, "12")
    assert did == ["ran", "ran"]
    assert await stored(store) == {"n": 12}


async def test_an_error_of_the_second_run_reaches_its_handler(
    store: ContendedStore, sessions: Middleware, did: list[str]
) -> None:
    """An HTTPException is a page like any other; what is not caught is a 500, and stores nothing."""

    async def missing(request: Request) -> Response:
        did.append("ran")
        if count(get_session(request)) > 10:
            raise HTTPException(404, "not there any more")
        return PlainTextResponse("there")

    async def broken(request: Request) -> Response:
        did.append("ran")
        if count(get_session(request)) > 10:
            raise ZeroDivisionError
        return PlainTextResponse("there")

    async def handle(request: Request, error: Exception) -> Response:
        did.append("handled")
        return PlainTextResponse("broken", 500)

    app = Starlette(
        routes=[Route("/missing", missing), Route("/broken", broken)],
        middleware=[sessions],
        exception_handlers={ValueError: handle, ZeroDivisionError: handle},
    )
    answer = await ask_twice(app, store, did, "/missing")
    assert (answer.status_code, answer.text, await stored(store)) == (404, "not there any more", {"n": 12})
    await store.delete((await store.list_active())[0])
    answer = await ask_twice(app, store, did, "/broken")
    assert (answer.status_code, answer.text, await stored(store)) == (500, "broken", {"n": 11})
    assert did == ["ran", "ran", "handled"]


class Plain(BaseHTTPMiddleware):
    """Does nothing, in a task group of its own."""

    async def dispatch(self, request: Request, call_next: RequestResponseEndpoint) -> Response:
        return await call_next(request)


class Visits(BaseHTTPMiddleware):
    """Reads the session before the endpoint and writes it after it."""

    async def dispatch(self, request: Request, call_next: RequestResponseEndpoint) -> Response:
        before = request.session.get("visits", 0)
        answer = await call_next(request)
        request.session["visits"] = before + 1
        return answer


AROUND: dict[str, list[Any]] = {
    "nothing": [],
    "BaseHTTPMiddleware": [Middleware(Plain)],
    "two of them": [Middleware(Plain), Middleware(Plain)],
    "GZip": [Middleware(GZipMiddleware, minimum_size=1)],
    "BaseHTTPMiddleware within GZip": [Middleware(GZipMiddleware, minimum_size=1), Middleware(Plain)],
    "GZip within BaseHTTPMiddleware": [Middleware(Plain), Middleware(GZipMiddleware, minimum_size=1)],
}


def plain_background(did: list[str]) -> BackgroundTask:
    def sync() -> None:
        did.append("sync task")

    return BackgroundTask(sync)


def async_background(did: list[str]) -> BackgroundTask:
    async def task() -> None:
        await anyio.lowlevel.checkpoint()
        did.append("async task")

    return BackgroundTask(task)


@pytest.mark.parametrize("inside", AROUND.values(), ids=AROUND)
@pytest.mark.parametrize("task", [plain_background, async_background])
async def test_background_tasks_run_once(
    store: ContendedStore, sessions: Middleware, did: list[str],
    inside: list[Any], task: Callable[[list[str]], BackgroundTask],
) -> None:  # fmt: skip
    """That of the second run, never that of the discarded one."""
    app = Starlette(
        routes=[Route("/", page(did, background=task(did)))],
        middleware=[Middleware(Plain), sessions, *inside],
    )
    answer = await ask_twice(app, store, did)
    assert (answer.status_code, answer.text) == (200, "12")
    assert did == ["ran", "ran", "sync task" if task is plain_background else "async task"]


@pytest.mark.parametrize("inside", AROUND.values(), ids=AROUND)
async def test_streams_are_whole(
    store: ContendedStore, sessions: Middleware, did: list[str], inside: list[Any]
) -> None:
    """The client gets the parts of the second run alone, of which none was made by the first."""

    async def endpoint(request: Request) -> Response:
        number = count(get_session(request))

        async def parts() -> AsyncIterator[str]:
            for part in "abc":
                did.append(f"part {number}{part}")
                yield f"{number}{part} "

        return StreamingResponse(parts(), media_type="text/plain")

    app = Starlette(routes=[Route("/", endpoint)], middleware=[sessions, *inside])
    answer = await ask_twice(app, store, did)
    assert answer.text == "12a 12b 12c "
    assert [each for each in did if each.startswith("part 12")] == ["part 12a", "part 12b", "part 12c"]
    assert await stored(store) == {"n": 12}


async def test_routes_are_found_again(store: ContendedStore, sessions: Middleware, did: list[str]) -> None:
    """A mount within a mount changes the scope; the second run finds it as it came."""
    seen: list[tuple[str, str, dict[str, Any]]] = []

    async def endpoint(request: Request) -> Response:
        seen.append((request.scope["root_path"], request.scope["path"], dict(request.path_params)))
        request.state.left = len(seen)
        return await page(did)(request)

    inner = Starlette(routes=[Route("/{item:int}", endpoint)])
    app = Starlette(routes=[Mount("/{shop}", routes=[Mount("/items", inner)])], middleware=[sessions])
    answer = await ask_twice(app, store, did, "/tea/items/7")
    assert (answer.status_code, answer.text) == (200, "12")
    assert seen[1:] == [("/tea/items", "/tea/items/7", {"shop": "tea", "item": 7})] * 2


async def test_a_plain_function_runs_in_a_thread(
    store: ContendedStore, sessions: Middleware, did: list[str]
) -> None:
    def endpoint(request: Request) -> Response:
        did.append("ran")
        return PlainTextResponse(str(count(get_session(request))))

    app = Starlette(routes=[Route("/", endpoint)], middleware=[sessions])
    assert (await ask_twice(app, store, did)).text == "12"
    assert did == ["ran", "ran"]


async def test_a_session_used_in_middleware(
    store: ContendedStore, sessions: Middleware, did: list[str]
) -> None:
    """What a middleware inside ours reads and writes belongs to its run as what the endpoint does."""
    app = Starlette(routes=[Route("/", page(did))], middleware=[sessions, Middleware(Visits)])
    assert (await ask_twice(app, store, did)).text == "12"
    assert await stored(store) == {"n": 12, "visits": 2}


async def test_a_second_middleware_of_ours_inside(
    store: ContendedStore, sessions: Middleware, did: list[str]
) -> None:
    """With another cookie: its session is changed in both runs, which the README says."""
    inner = ContendedStore()

    async def endpoint(request: Request) -> Response:
        did.append("ran")
        around = request.scope["around"]
        return PlainTextResponse(f"{count(around)} {count(get_session(request))}")

    class Around:
        def __init__(self, app: ASGIApp) -> None:
            self.app = app

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            scope["around"] = scope["session"]
            await self.app(scope, receive, send)

    second = Middleware(SessionMiddleware, secret_key=KEY, session_cookie="second", store=inner, lock="auto")
    app = Starlette(routes=[Route("/", endpoint)], middleware=[sessions, Middleware(Around), second])
    assert (await ask_twice(app, store, did)).text == "12 3"
    assert (await stored(store), await stored(inner)) == ({"n": 12}, {"n": 3})
    assert did == ["ran", "ran"]
    assert len(inner._locks) == 0


@pytest.mark.parametrize("outside", AROUND.values(), ids=AROUND)
@pytest.mark.parametrize("inside", AROUND.values(), ids=AROUND)
async def test_a_first_run_that_hangs_is_cancelled_alone(
    store: ContendedStore, sessions: Middleware, did: list[str], monkeypatch: pytest.MonkeyPatch,
    outside: list[Any], inside: list[Any],
) -> None:  # fmt: skip
    """Not the request, whatever task groups there are around it and in it."""
    monkeypatch.setattr(rerun, "GRACE", 0.05)

    class Hanging:
        def __init__(self, app: ASGIApp) -> None:
            self.app = app

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            try:
                await self.app(scope, receive, send)
            except BaseException:
                did.append("hangs")
                async with anyio.create_task_group() as group:
                    group.start_soon(anyio.sleep, 60)

    app = Starlette(
        routes=[Route("/", page(did))],
        middleware=[*outside, sessions, Middleware(Hanging), *inside],
    )
    with anyio.fail_after(20):
        answer = await ask_twice(app, store, did)
    assert (answer.status_code, answer.text) == (200, "12")
    assert did == ["ran", "hangs", "ran"]


# -- FastAPI -------------------------------------------------------------------------------------------------


def fastapi_app(did: list[str]) -> FastAPI:
    """With a dependency as databases have it, and background tasks of both kinds."""
    app = FastAPI()

    def database() -> Iterator[str]:
        did.append("begin")
        try:
            yield "database"
            did.append("commit")
        except Exception:
            did.append("roll back")
            raise
        finally:
            did.append("close")

    async def connection() -> AsyncIterator[str]:
        did.append("open")
        try:
            yield "connection"
            did.append("done")
        finally:
            did.append("shut")

    def later() -> None:
        did.append("sync task")

    async def async_later() -> None:
        did.append("async task")

    @app.get("/sync")
    def sync(request: FastAPIRequest, used: str = Depends(database)) -> int:
        return count(get_session(request))

    @app.get("/async")
    async def asynchronous(request: FastAPIRequest, used: str = Depends(connection)) -> int:
        return count(get_session(request))

    @app.get("/tasks")
    async def tasks(request: FastAPIRequest, tasks: BackgroundTasks) -> int:
        tasks.add_task(later)
        tasks.add_task(async_later)
        return count(get_session(request))

    @app.get("/body")
    async def body(request: FastAPIRequest) -> int:
        did.append(f"{await request.body()!r}")
        return count(get_session(request))

    return app


@pytest.mark.parametrize("inside", [[], [Middleware(Plain)]], ids=["alone", "BaseHTTPMiddleware"])
@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/sync", ["begin", "close", "begin", "commit", "close"]),
        ("/async", ["open", "shut", "open", "done", "shut"]),
        ("/tasks", ["sync task", "async task"]),
        ("/body", ["b''", "b''"]),
    ],
)
async def test_fastapi_cleans_up_after_each_run(
    store: ContendedStore, sessions: Middleware, did: list[str], path: str, expected: list[str], inside: Any
) -> None:
    """Dependencies are left in both runs, what follows their `yield` happens once, and so do the tasks."""
    app = fastapi_app(did)
    for each in [*inside, sessions]:  # the one that is added last is outside
        app.add_middleware(each.cls, *each.args, **each.kwargs)
    answer = await ask_twice(app, store, did, path)
    assert (answer.status_code, answer.text) == (200, "12")
    assert did == expected


# -- others --------------------------------------------------------------------------------------------------


def litestar_app(did: list[str], store: ContendedStore, *, inside: bool) -> ASGIApp:
    """The middleware around the app, or among its own."""

    async def endpoint(request: Any) -> Any:
        did.append("ran")

        async def task() -> None:
            did.append("async task")

        background = litestar.background_tasks.BackgroundTask(task)
        return litestar.Response(count(request.session), background=background)

    import_module("litestar.background_tasks")
    endpoint.__annotations__.update({"request": litestar.Request, "return": litestar.Response[int]})
    routes = [litestar.get("/")(endpoint)]
    if inside:
        define = import_module("litestar.middleware").DefineMiddleware
        made: ASGIApp = litestar.Litestar(routes, middleware=[define(SessionMiddleware, **options(store))])
        return made
    return SessionMiddleware(litestar.Litestar(routes), **options(store))


@pytest.mark.parametrize("inside", [True, False])
async def test_litestar(store: ContendedStore, did: list[str], inside: bool) -> None:
    """Its background task runs once."""
    answer = await ask_twice(litestar_app(did, store, inside=inside), store, did)
    assert (answer.status_code, answer.text) == (200, "12")
    assert did == ["ran", "ran", "async task"]


async def test_quart(store: ContendedStore, did: list[str]) -> None:
    """It sends and receives in tasks of its own."""
    app = quart.Quart(__name__)

    async def endpoint() -> str:
        did.append("ran")
        return str(count(quart.request.scope["session"]))

    app.get("/")(endpoint)
    app.asgi_app = SessionMiddleware(app.asgi_app, **options(store))
    answer = await ask_twice(app, store, did)
    assert (answer.status_code, answer.text) == (200, "12")
    assert did == ["ran", "ran"]


# -- over sockets --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("http", ["h11", "httptools"])
async def test_many_clients_over_a_real_server(http: str, did: list[str], sessions: Middleware) -> None:
    """Each number is answered once, by GET and by POST, with tasks, streams and middleware around them."""
    pytest.importorskip(http)

    async def slowly(request: Request) -> Response:
        session = get_session(request)
        before = session.get("n", 0)
        await anyio.sleep(0.001)
        session["n"] = before + 1

        async def parts() -> AsyncIterator[str]:
            yield str(before + 1)

        if "stream" in request.url.path:
            return StreamingResponse(parts(), background=async_background(did))
        return PlainTextResponse(str(before + 1), background=async_background(did))

    routes = [Route(path, slowly, methods=["GET", "POST"]) for path in ("/page", "/stream")]
    app = Starlette(routes=routes, middleware=[Middleware(Plain), sessions, Middleware(Plain)])
    numbers: list[int] = []

    async def visit(client: httpx.AsyncClient, method: str, path: str) -> None:
        for _ in range(15):
            answer = await client.request(method, path)
            assert answer.status_code == 200
            numbers.append(int(answer.text))

    with served(app, http=http) as port:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            numbers.append(int((await client.get("/page")).text))
            async with anyio.create_task_group() as group:
                for method in ("GET", "POST", "GET", "GET"):
                    for path in ("/page", "/stream"):
                        group.start_soon(visit, client, method, path)
            final = int((await client.get("/page")).text)
    assert sorted(numbers) == list(range(1, final))
    assert final == 8 * 15 + 2
    assert did == ["async task"] * final
