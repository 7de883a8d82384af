"""Sentinels: which node is the primary, and news before another node becomes it.

When a primary is replaced as planned, it learns that only ten seconds later, and what it takes in until then
is lost. The Sentinel that replaces it announces each step. So calls are held from just before the replica
becomes a primary until that is known.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import logging
from collections.abc import Awaitable, Callable, Sequence
from operator import itemgetter
from typing import Any, NamedTuple, Protocol, cast

from redis.asyncio import Redis
from redis.asyncio.sentinel import Sentinel
from redis.exceptions import NoPermissionError, RedisError

from .pools import Connection, Pool, give_back
from .tasks import end
from .urls import Address

PROMOTES = "+failover-state-send-slaveof-noone"  # a tenth of a second before it does
EVENTS = PROMOTES, "+promoted-slave", "+switch-master"  # the last one when all follow, which may take long
HOLD = 3.0  # seconds for the promotion; what comes of it is known after one, as a rule
ASK_EVERY = 10.0  # seconds without news
AGAIN = 1.0  # seconds after which a Sentinel that was lost is tried again

_logger = logging.getLogger("asgi_sessions.redis")


class View(NamedTuple):
    """Which node a Sentinel takes for the primary. A later decision has a higher epoch."""

    epoch: int
    address: Address


class SentinelClient(Redis):
    """Asks one Sentinel, about one service.

    A Sentinel that has promoted a replica lists the old primary until all others follow the new one. It names
    the new one only when it is asked for the address.
    """

    listening: Pool  # for subscriptions
    service: str
    view: View | None = None
    on_view: Callable[[], None]

    async def sentinel_masters(self) -> dict[str, dict[str, Any]]:
        """The state of each service, as redis-py's search asks for it; `view` is what it says of ours."""
        execute = cast("Callable[..., Awaitable[Any]]", self.execute_command)
        masters: dict[str, dict[str, Any]] = await execute("SENTINEL MASTERS")
        state = masters.get(self.service)
        if state is None:
            return masters
        if "failover_in_progress" in state["flags"]:
            promoted = await execute("SENTINEL GET-MASTER-ADDR-BY-NAME", self.service)
            if promoted is not None:
                host, port = promoted[0].decode(), int(promoted[1])
                if (host, port) != (state["ip"], state["port"]):
                    state.update(ip=host, port=port, is_sdown=False, is_odown=False)
        self.view = View(int(state["config-epoch"]), (state["ip"], int(state["port"])))
        self.on_view()
        return masters


class Calls(Protocol):
    """The pipeline to the primary."""

    def hold(self, seconds: float) -> None: ...
    def resume(self) -> None: ...
    def drop(self, reason: str) -> None: ...


class Sentinels:
    """All Sentinels of a service, in the place of redis-py's manager in a pool.

    `watch` listens at each of them: calls are held while a replica is promoted, and their connection is
    dropped once when the Sentinel that is ahead of the others names another primary than before.
    """

    def __init__(self, manager: Sentinel, service: str, sentinels: Sequence[SentinelClient], timeout: float):
        self.sentinels = sentinels
        self._manager = manager
        self._timeout = timeout
        self._named: Address | None = None
        self._calls: Calls | None = None
        self._service = service.encode()
        self._tasks: dict[SentinelClient, asyncio.Task[None]] = {}
        self._may_listen = True
        for each in sentinels:
            each.service, each.on_view = service, self._seen

    async def discover_master(self, service_name: str) -> Address:
        """The primary, as redis-py finds it; the Sentinel that knows the latest decision is asked first."""
        search: Any = copy.copy(self._manager)
        search.sentinels = sorted(self.sentinels, key=_epoch, reverse=True)
        return cast(Address, await search.discover_master(service_name))

    def watch(self, calls: Calls) -> None:
        """Listen from now on, in the running event loop."""
        self._calls = calls
        for each in self.sentinels:
            self._begin(each)

    async def aclose(self) -> None:
        """Listen no more."""
        self._calls = None
        await end(self._tasks.values())

    def _seen(self) -> None:
        latest = max((each.view for each in self.sentinels if each.view is not None), key=itemgetter(0))
        before, self._named = self._named, latest.address
        if before not in (None, latest.address) and self._calls is not None:
            self._calls.drop("the Sentinels name another primary")

    def _begin(self, client: SentinelClient) -> None:
        if self._calls is not None:
            self._tasks[client] = asyncio.get_running_loop().create_task(self._follow(client))

    async def _follow(self, client: SentinelClient) -> None:
        """Listen at this Sentinel as long as it is there, or ask it where that is forbidden; then begin anew.

        Each time in a new task, because an error may hide a cancellation from the old one.
        """
        try:
            await self._listen(client)
        except NoPermissionError as error:
            if self._may_listen:
                _logger.warning("the Sentinels tell of no new primary, but have to be asked: %s", error)
            self._may_listen = False
            with contextlib.suppress(RedisError, OSError):
                await client.sentinel_masters()
        except (RedisError, OSError, asyncio.TimeoutError) as error:
            _logger.debug("a Sentinel was lost: %s", error)
            client.view = None
        asyncio.get_running_loop().call_later(AGAIN, self._begin, client)

    async def _listen(self, client: SentinelClient) -> None:
        connection = await asyncio.wait_for(client.listening.get_connection(), self._timeout)
        try:
            await connection.send_command("SUBSCRIBE", *EVENTS)
            for _ in EVENTS:
                await asyncio.wait_for(connection.read_response(disable_decoding=True), self._timeout)
            await client.sentinel_masters()
            while True:
                await self._heard(client, await self._next(client, connection))
        finally:
            await give_back(client.listening, connection)

    async def _next(self, client: SentinelClient, connection: Connection) -> list[bytes]:
        """The next message; while there is none the Sentinel is asked now and then."""
        news = asyncio.ensure_future(connection.read_response(disable_decoding=True))
        try:
            while not (await asyncio.wait((news,), timeout=ASK_EVERY))[0]:
                await client.sentinel_masters()
            return cast("list[bytes]", news.result())
        finally:
            news.cancel()

    async def _heard(self, client: SentinelClient, message: list[bytes]) -> None:
        _, event, what = message
        if self._calls is None or self._service not in what.split():
            return
        if event == PROMOTES.encode():
            self._calls.hold(HOLD)
            return
        await client.sentinel_masters()
        if self._calls is not None:
            self._calls.resume()


def _epoch(client: SentinelClient) -> int:
    return -1 if client.view is None else client.view.epoch
