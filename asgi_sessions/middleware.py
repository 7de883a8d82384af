"""The walk of a request: `SessionMiddleware` knows the settings, a unit of work knows one request."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Literal

from .asgi import ASGIApp, Message, Receive, Scope, Send
from .client.address import TrustedProxy
from .client.cookie import Presented, SessionCookie
from .client.fingerprint import Fingerprint
from .client.headers import ByName, by_name
from .client.starlette import StarletteCookies
from .keys import derived_from
from .observation.events import ABSURD_COOKIE, ORIGIN_REFUSED, EventSink, SessionEvent
from .options import (
    Routes,
    check_flags,
    check_lock,
    resolve_arrivals,
    resolve_client,
    resolve_imports,
    resolve_lifetime,
    resolve_lock,
    resolve_model,
    resolve_most_sessions,
    resolve_names,
    resolve_origins,
    resolve_recorder,
    resolve_rotation,
    resolve_routes,
)
from .record.model import SessionData
from .request.answers import Answers
from .request.devices import PURPOSE
from .request.http import HTTPRequest, runs_without_lock
from .request.rerun import Rerun
from .request.running import Running
from .request.settings import Settings
from .request.unit import UnitOfWork
from .request.websocket import WebSocket
from .session.changes import ROTATE_ON
from .session.handle import Session
from .stores.contract import SessionStore
from .stores.running import running
from .stores.urls import resolve_store

_KINDS: dict[str, type[HTTPRequest] | type[WebSocket]] = {"http": HTTPRequest, "websocket": WebSocket}


class SessionMiddleware:
    """Gives each request of any ASGI app its session in `scope["session"]`.

    Takes the place of Starlette's middleware of this name, with the same arguments. The data stay on the
    server, typed and under a lock. All times are seconds. A wrong value raises `ValueError` or `TypeError`
    here, with the remedy.

    app: the ASGI app inside.
    secret_key: signs the cookie; 32 random bytes or more, from `asgi-sessions key`.
    session_cookie: the cookie's name.
    max_age: a session's absolute life from creation or sign-in; None: a browser-session cookie.
    path: of the cookie, "/" by default.
    same_site: of the cookie, "lax" by default.
    https_only: whether the cookie is `Secure`; None: where the request came over https or wss.
    domain: of the cookie; None: this host alone.
    partitioned: a cookie of its own for each site that embeds this one (CHIPS).
    secret_key_fallbacks: older keys that still verify, for as long as a rotation takes.
    store: a `SessionStore`, or a URL such as "sqlite:///sessions.db"; None: this process's memory.
    model: the record's class, a subclass of `SessionData` with fields of your own.
    idle_timeout: ends a session that sees no request for so long.
    rolling: each request restarts `max_age`.
    fingerprint: which of a client's properties a session is bound to; None: to nothing.
    trusted_proxies: networks whose `X-Forwarded-For` or `Forwarded` is believed.
    record_client: keeps user agent and address of a sign-in in `data.client`, for `Session.devices()`.
    exclude: requests without any session: path patterns ("/static/*") or a predicate of the scope.
    read_only: requests that load the session without its lock; only `transaction()` changes it.
    passive: requests that are no activity for `idle_timeout`, such as polls.
    lock: True: requests of one session take turns. "auto": only those that write. False: none waits, 409.
    lock_timeout: the lock's lease, renewed while the request runs.
    lock_wait: the longest wait for other requests of the session, then 503.
    max_waiters: waiting requests of one session in this process; one more gets 503.
    lock_max_hold: for so long a request may hold the lock.
    release_lock: "response_end", or "response_start" to let others go on while a stream runs.
    rotate_on: values that say who is signed in: a change of these gives a new id (fixation).
    rotate_every: an id that is older is replaced; it leads to the new one for 30 seconds.
    first_ttl: a record whose client has not yet sent its cookie back lives so long.
    max_sessions_per_user: a sign-in ends the user's longest idle sessions beyond so many.
    encryption_keys: encrypt what the store keeps of a record; the first one writes, all of them read.
    import_cookies: `StarletteCookies(old_key)` takes over the sessions in Starlette's cookies.
    allowed_origins: exact origins that may open WebSockets; None: all.
    error_response: an ASGI app for 503, 409 and the like; the error is in `scope["session_error"]`.
    on_event: called with each `SessionEvent`, in the event loop.
    """

    def __init__(
        self,
        app: ASGIApp,
        secret_key: object,
        session_cookie: str = "session",
        max_age: float | None = 14 * 24 * 60 * 60,
        path: str = "/",
        same_site: Literal["lax", "strict", "none"] = "lax",
        https_only: bool | None = None,
        domain: str | None = None,
        partitioned: bool = False,
        *,
        secret_key_fallbacks: Sequence[object] = (),
        store: SessionStore | str | None = None,
        model: type[SessionData] = SessionData,
        idle_timeout: float | None = None,
        rolling: bool = False,
        fingerprint: Fingerprint | None = Fingerprint(),  # noqa: B008  # a frozen value
        trusted_proxies: Iterable[TrustedProxy] = (),
        record_client: bool = False,
        exclude: Routes = (),
        read_only: Routes = (),
        passive: Routes = (),
        lock: bool | Literal["auto"] = True,
        lock_timeout: float = 10.0,
        lock_wait: float = 15.0,
        max_waiters: int = 1024,
        lock_max_hold: float = 300.0,
        release_lock: Literal["response_end", "response_start"] = "response_end",
        rotate_on: Iterable[str] = ROTATE_ON,
        rotate_every: float | None = None,
        first_ttl: float | None = None,
        max_sessions_per_user: int | None = None,
        encryption_keys: Sequence[str | bytes] = (),
        import_cookies: StarletteCookies | None = None,
        allowed_origins: Iterable[str] | None = None,
        error_response: ASGIApp | None = None,
        on_event: Callable[[SessionEvent], object] | None = None,
    ) -> None:
        if release_lock not in ("response_end", "response_start"):
            raise ValueError('release_lock is "response_end" or "response_start"')
        check_flags(https_only=https_only, partitioned=partitioned, rolling=rolling)
        check_lock(lock)
        if rolling and max_age is None:
            raise ValueError("rolling restarts max_age: give it one, or use idle_timeout with max_age=None")
        self.app = app
        self.store = resolve_store(store)
        cookie = SessionCookie(
            secret_key, fallbacks=secret_key_fallbacks, name=session_cookie, path=path, same_site=same_site,
            https_only=https_only, domain=domain, partitioned=partitioned, stacklevel=3,
        )  # fmt: skip
        policy = resolve_lock(lock_timeout, lock_wait, max_waiters, lock_max_hold)
        lifetime = resolve_lifetime(max_age, idle_timeout, rolling, self.store)
        refresh_after = min(max_age / 10, 3600) if rolling and max_age is not None else None
        self._events = EventSink(on_event, secret_key=secret_key)
        client = resolve_client(fingerprint, trusted_proxies, self._events)
        self._answers = Answers(error_response, self._events)
        self._settings = Settings(
            store=self.store,
            model=resolve_model(model),
            lifetime=lifetime,
            lock=policy if lock else None,
            lock_to_transact=policy,
            optimistic=lock == "auto",
            cookie=cookie,
            old_cookies=resolve_imports(import_cookies, cookie),
            max_age=max_age,
            arrivals=resolve_arrivals(first_ttl),
            refresh_after=refresh_after,
            rotate_every=resolve_rotation(rotate_every),
            renew_after=min(filter(None, (refresh_after, rotate_every)), default=None),
            early_release=release_lock == "response_start",
            max_sessions_per_user=resolve_most_sessions(max_sessions_per_user),
            rotate_on=resolve_names(rotate_on),
            client=client,
            recorder=resolve_recorder(record_client, trusted_proxies, self._events, model),
            device_keys=derived_from([secret_key, *secret_key_fallbacks], "secret_key", PURPOSE),
            reports_mismatch=fingerprint is not None and fingerprint.on_mismatch == "report",
            answers=self._answers,
            events=self._events,
        )
        self._excluded = resolve_routes("exclude", exclude)
        self._read_only = resolve_routes("read_only", read_only)
        self._passive = resolve_routes("passive", passive)
        self._origins = resolve_origins(allowed_origins)
        self.store.bind(model, policy)
        self.store.encrypt(encryption_keys)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        kind = _KINDS.get(scope["type"])
        if kind is None or self._passes_through(scope):
            call = self._hand_on(scope, receive, send)
            del scope  # as below
            return await call
        headers = by_name(scope["headers"])
        presented = self._settings.presented(headers.get(b"cookie"))
        if not self._admits(scope, headers, presented):
            return await self._answers.refuse(scope, receive, send)
        unit = kind(self._settings, scope, headers, receive, send, presented)
        read_only = self._read_only is not None and self._read_only(scope)
        if self._settings.optimistic and not read_only and runs_without_lock(unit, headers):
            work = self._run_optimistically(unit, send)
        else:
            work = self._run(unit, read_only=read_only)
        del scope, headers  # crash reporters print locals: this frame is in each of the app's tracebacks
        return await work

    async def _run(self, unit: HTTPRequest | WebSocket, *, read_only: bool = False) -> None:
        """Load the session, run the app with it, store what the app changed."""
        scope = unit.scope
        current = running.set((*running.get(), Running(unit)))
        try:
            await unit.open(read_only=read_only, passive=self._passive is not None and self._passive(scope))
            scope["session"] = unit.session
            call = self.app(scope, unit.receive, unit.send)
            del scope  # as above
            await call
            await unit.finish()
        except Exception as error:
            await unit.fail(error)
        finally:
            running.reset(current)
            await unit.close()

    async def _run_optimistically(self, unit: HTTPRequest, send: Send) -> None:
        """Run the app without the lock, and again under it where another request's change came first."""
        rerun = unit.rerun = Rerun(unit.scope, unit.receive)
        unit.receive, unit.releases_early = rerun.receive, True
        await rerun.first(self._run(unit))
        if not rerun.is_discarded:
            return
        presented, settings = unit.presented, self._settings

        async def run(scope: Scope, receive: Receive) -> None:
            again = HTTPRequest(settings, scope, by_name(scope["headers"]), receive, send, presented)
            again.releases_early = True
            await self._run(again)

        await rerun.again(run)

    def _hand_on(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """What has no session."""
        run = self.app if scope["type"] != "lifespan" else self._live
        return run(scope, receive, send)

    async def _live(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The lifespan of the app is the store's too."""
        closed = False

        async def closing(message: Message) -> None:
            nonlocal closed
            if message["type"].startswith("lifespan.shutdown.") and not closed:
                closed = True
                await self._close()  # before the server hears of it, for then it ends the event loop
            await send(message)

        self.store.openers += 1
        try:
            await self._open(send)
            await self.app(scope, receive, closing)
        finally:
            if not closed:
                await self._close()

    async def _open(self, send: Send) -> None:
        try:
            await self.store.open()
        except Exception as error:  # a mere exception says to some servers that there is no lifespan
            await send({"type": "lifespan.startup.failed", "message": str(error)})
            raise

    async def _close(self) -> None:
        self.store.openers -= 1
        if not self.store.openers:  # else it would end under an app that shares it and goes on
            await self.store.aclose()
        self._events.flush()

    def _passes_through(self, scope: Scope) -> bool:
        """Excluded, or a middleware with this cookie and store is around us: its session is ours too."""
        if self._excluded is not None and self._excluded(scope):
            return True
        around = scope.get("session")
        if around is None:
            return False
        unit = around.unit if isinstance(around, Session) else None
        if not isinstance(unit, UnitOfWork) or unit.settings.cookie.name != self._settings.cookie.name:
            return False
        if unit.settings.store is not self.store:
            unit.shares_name = True
            return False
        return True

    def _admits(self, scope: Scope, headers: ByName, presented: Presented) -> bool:
        if presented.reason == "absurd":
            self._events.emit(ABSURD_COOKIE)
            return False
        if self._origins is None or scope["type"] != "websocket":
            return True
        if headers.get(b"origin", b"").lower() in self._origins:
            return True
        self._events.emit(ORIGIN_REFUSED)
        return False
