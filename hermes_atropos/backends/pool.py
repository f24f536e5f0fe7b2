"""Servers that stand in for one another: one is chosen for each call, and a failing call is made again, or elsewhere.

atroposlib's own calls retry whatever fails, several times over, hide the cause, and wait for a healthy server without
end. So its servers are asked through the wrapper below those calls, with what the calls do besides: the health check is
started, the semaphore held, the timings kept.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from hermes_atropos.backends import servers_of
from hermes_atropos.errors import (
    BackendConnectionError,
    BackendError,
    BackendTimeoutError,
    HermesAtroposError,
)
from hermes_atropos.servers.failures import typed, url_of

__all__ = ["ATTEMPTS", "Pool"]

logger = logging.getLogger(__name__)

T = TypeVar("T")

#: Requests that one call makes at most.
ATTEMPTS = 6

#: Seconds between looks at servers that are all unhealthy.
HEALTH_LOOK_S = 0.1

#: Of how many calls a server's timings are kept: atroposlib, which averages them for its log, never empties its lists.
MEASURED = 10_000

#: Calls under way by server and split, all pools of the process together.
_in_flight: WeakKeyDictionary[Any, Counter[str]] = WeakKeyDictionary()


class Pool:
    """The servers behind a backend.

    Args:
        server: an atroposlib ``ServerManager``, or one server.
        patience_s: seconds for which a failing call is retried, and for which a healthy server is waited for.
        checks_health: start atroposlib's health checks and wait for a healthy server. Without, the servers' own word is
            taken, and an unhealthy one is asked where no other is left.

    Raises:
        NoServerError: a ``ServerManager`` without servers.
    """

    def __init__(self, server: Any, *, patience_s: float = 60.0, checks_health: bool = True) -> None:
        self.servers = servers_of(server)
        self.patience_s = patience_s
        self._checks_health = checks_health
        self._slots: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[Any, asyncio.Semaphore]] = WeakKeyDictionary()

    async def call(
        self, request: Callable[[Any], Awaitable[T]], *, split: str = "train", family: int | None = None
    ) -> T:
        """What ``request`` comes back with from the best server (see :meth:`_choose`); from another if that one fails.

        Retried are lost connections, timeouts, 429 and 5xx, within ``patience_s``; a 500 once more of each server.

        Args:
            request: makes the call on the server that it is given, within that server's slot.
            split: ``eval`` takes the servers' evaluation slots.
            family: a number that calls with the same beginning have in common.

        Raises:
            BackendError: the last failure, typed, with URL, status, body and the number of requests made; the server's
                own exception is its ``__cause__``.
        """
        deadline = time.monotonic() + self.patience_s
        server: Any = None
        failure: BackendError | None = None
        attempt = 0
        try:
            while True:
                attempt += 1
                server = await self._choose(split, family, server, failure)
                try:
                    return await self._in_slot(server, split, request)
                except BackendError as error:
                    failure, error.attempts = error, attempt
                    if not self._worth_another_try(error):
                        raise
                    pause = self._pause(error)
                    if attempt == ATTEMPTS or time.monotonic() + pause >= deadline:
                        raise
                await asyncio.sleep(pause)
        finally:
            failure = None  # whose traceback leads back here: garbage that only the collector would find

    async def _choose(self, split: str, family: int | None, avoided: Any, failure: BackendError | None) -> Any:
        """The healthy server with the most room, another than the one avoided if there is one.

        Calls of one family go to one server, whose cache holds their beginning, while it has half as much room.
        """
        if self._checks_health:
            for server in self.servers:
                _watch(server)
        deadline = time.monotonic() + self.patience_s
        while not any(map(_is_healthy, self.servers)) and self._checks_health:
            if time.monotonic() >= deadline:
                urls = ", ".join(str(url_of(server)) for server in self.servers)
                raise BackendConnectionError(
                    f"no server became healthy within {self.patience_s:g} s: {urls}",
                    attempts=failure.attempts if failure else 0,
                ) from failure
            await asyncio.sleep(HEALTH_LOOK_S)
        best = max(self.servers, key=lambda one: (_is_healthy(one), one is not avoided, _room(one, split)))
        if family is not None:
            home = self.servers[family % len(self.servers)]
            if _is_healthy(home) and home is not avoided and 2 * _room(home, split) >= _room(best, split):
                return home
        return best

    def _pause(self, error: BackendError) -> float:
        """Seconds to wait before the next attempt."""
        logger.warning("model call failed (request %d): %s", error.attempts, error)
        if error.retry_after is not None:
            return error.retry_after
        # Each healthy server is asked at once; only then is there anything to wait for.
        waits = error.attempts - max(sum(map(_is_healthy, self.servers)), 1)
        return 0.0 if waits < 0 else min(0.1 * 3**waits, 10.0)

    def _worth_another_try(self, error: BackendError) -> bool:
        """Whether the same request may succeed later or elsewhere."""
        if error.status is not None:
            # SGLang answers 500 to a request that it will never take: two of them are a refusal, if each was asked.
            once_more = error.status != 500 or error.attempts < max(2, len(self.servers))
            return error.status == 429 or (error.status >= 500 and once_more)
        return isinstance(error, BackendConnectionError | BackendTimeoutError)

    async def _in_slot(self, server: Any, split: str, request: Callable[[Any], Awaitable[T]]) -> T:
        under_way = _in_flight.setdefault(server, Counter())
        under_way[split] += 1
        try:
            async with self._slot(server, split) or contextlib.nullcontext():
                started = time.time()
                answer = await request(server)
        except HermesAtroposError:
            raise
        except Exception as error:
            failure = typed(error, server)
            raise failure from failure.__cause__ or error
        finally:
            under_way[split] -= 1
        eval_ = "eval_" if split == "eval" else ""
        for name, value in (("request_timings", time.time() - started), ("attempts_list", 1)):
            measured = getattr(server, eval_ + name, [])
            measured.append(value)
            del measured[:-MEASURED]
        return answer

    def _slot(self, server: Any, split: str) -> Any:
        """The server's semaphore, or on another event loop than the one that it is bound to, one just like it."""
        semaphore = _semaphore(server, split)
        loop = asyncio.get_running_loop()
        if getattr(semaphore, "_loop", None) in (None, loop):
            return semaphore
        ours = self._slots.setdefault(loop, {})
        return ours.setdefault(semaphore, asyncio.Semaphore(getattr(semaphore, "max_val", 1)))


def _semaphore(server: Any, split: str) -> Any:
    return getattr(server, "eval_sem" if split == "eval" else "sem", None)


def _room(server: Any, split: str) -> int:
    """How many more calls the server takes at once. What others hold back for evaluation is not free."""
    semaphore = _semaphore(server, split)
    reserved = semaphore.min_val() if hasattr(semaphore, "min_val") else 0
    under_way = _in_flight.get(server)
    return int(getattr(semaphore, "max_val", 0)) - reserved - (under_way[split] if under_way else 0)


def _is_healthy(server: Any) -> bool:
    return bool(getattr(server, "server_healthy", True))


def _watch(server: Any) -> None:
    """Start the server's health check, as atroposlib's own call does, or start it again where its loop is gone."""
    if not hasattr(server, "initialized"):
        return
    if server.config.health_check and server.config.base_url is not None:
        task = server.check_task
        if task is None or task.done() or task.get_loop().is_closed():
            server.check_task = asyncio.create_task(server.check_server_status_task(chat_completion=False))
    elif not server.initialized:
        server.server_healthy = True
    server.initialized = True
