"""One token call: which server takes it, how long a failure is borne with, and what a failure is called.

atroposlib's own call retries whatever fails, hides the cause, and waits for a healthy server without end. So its
servers are asked through the wrapper below that call, with what the call does besides: the health check is started,
the semaphore held, the timings kept.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import socket
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from tenacity import (
    AsyncRetrying,
    RetryCallState,
    RetryError,
    retry_if_exception,
    stop_after_attempt,
    stop_before_delay,
)

from hermes_atropos.errors import (
    BackendConnectionError,
    BackendError,
    BackendResponseError,
    BackendTimeoutError,
    HermesAtroposError,
    NoServerError,
    UnsupportedServerError,
)

__all__ = ["Sample", "TokenServers"]

logger = logging.getLogger(__name__)

T = TypeVar("T")

#: Requests that one call makes at most.
ATTEMPTS = 6

#: Seconds between looks at servers that are all unhealthy.
HEALTH_LOOK_S = 0.1


@dataclass(frozen=True, slots=True)
class Sample:
    """One choice of a server's answer, as it came.

    Attributes:
        echo: the prompt's ids as the server says it received them; None or empty where it doesn't say.
        output_ids, logprobs: [output_len] each.
        finish_reason: ``stop``, ``length``, ``abort``, …; None where the server gave none.
        metadata: ``server_url`` and whatever else stood beside the finish reason (SGLang's ``matched``, for instance,
            or ``weights_version``).
    """

    echo: Sequence[int] | None
    output_ids: Sequence[int]
    logprobs: Sequence[float]
    finish_reason: str | None
    metadata: dict[str, Any]


class TokenServers:
    """The servers behind a backend.

    Args:
        server: an atroposlib ``ServerManager`` or ``APIServer``, or any object with
            ``tokens_and_logprobs_completion(**kwargs)``, which is given the prompt as text, too.
        patience_s: seconds for which a failing call is retried, and for which a healthy server is waited for.

    Raises:
        NoServerError: a ``ServerManager`` without servers.
        UnsupportedServerError: an object without a token call.
    """

    def __init__(self, server: Any, *, patience_s: float = 60.0) -> None:
        self.all: list[Any] = list(getattr(server, "servers", [server]))
        if not self.all:
            raise NoServerError("the ServerManager has no servers: give it at least one APIServerConfig")
        for one in self.all:
            if not hasattr(one, "tokens_and_logprobs_completion"):
                raise UnsupportedServerError(
                    f"{type(one).__name__} has no token call: pass an atroposlib ServerManager or APIServer"
                )
        self.patience_s = patience_s
        self.max_n = getattr(server, "max_n_completions", None)
        self._semaphores: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[Any, asyncio.Semaphore]] = (
            WeakKeyDictionary()
        )

    async def sample(
        self, prompt_ids: list[int], prompt: Callable[[], str], n: int, sampling: Mapping[str, Any]
    ) -> list[Sample]:
        """``n`` answers to a prompt, from the healthy server with the most room; from another if that one fails.

        Retried are lost connections, timeouts, 429 and 5xx, with the same ids, within ``patience_s``.

        Raises:
            BackendError: the last failure, typed, with URL, status, body and the number of requests made; the server's
                own exception is its ``__cause__``.
            UnsupportedServerError: the server refuses every token call.
        """
        if self.max_n and n > self.max_n:
            parts = [min(self.max_n, n - start) for start in range(0, n, self.max_n)]
            return await self._together([(prompt_ids, prompt, part, sampling) for part in parts])
        server: Any = None
        failure: BackendError | None = None

        async def request(number: int) -> list[Sample]:
            nonlocal server, failure
            server = await self._choose(sampling.get("split"), server, failure)
            try:
                return await self._ask(server, prompt_ids, prompt, n, dict(sampling))
            except BackendError as error:
                failure, error.attempts = error, number
                raise

        return await retried(request, pause=self._pause, patience_s=self.patience_s)

    async def _together(self, calls: list[Any]) -> list[Sample]:
        failure: BaseException | None = None
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self.sample(*call)) for call in calls]
        except BaseExceptionGroup as failures:
            failure = failures.exceptions[0]
        if failure is not None:
            raise failure
        return [sample for task in tasks for sample in task.result()]

    async def _choose(self, split: str | None, avoided: Any, failure: BackendError | None) -> Any:
        """The healthy server with the most room, another than the one avoided if there is one."""
        for server in self.all:
            watch(server)
        deadline = time.monotonic() + self.patience_s
        while True:
            healthy = [server for server in self.all if getattr(server, "server_healthy", True)]
            if healthy:
                return max(healthy, key=lambda server: (server is not avoided, self._room(server, split)))
            if time.monotonic() >= deadline:
                urls = ", ".join(str(url_of(server)) for server in self.all)
                raise BackendConnectionError(
                    f"no server became healthy within {self.patience_s:g} s: {urls}",
                    attempts=failure.attempts if failure else 0,
                ) from failure
            await asyncio.sleep(HEALTH_LOOK_S)

    def _pause(self, state: RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome else None
        logger.warning("model call failed (request %d): %s", state.attempt_number, error)
        after = getattr(error, "retry_after", None)
        if after is not None:
            return float(after)
        others = sum(getattr(server, "server_healthy", True) for server in self.all) - 1
        # Each other healthy server is asked at once; only then is there anything to wait for.
        waits = state.attempt_number - 1 - max(others, 0)
        return 0.0 if waits < 0 else min(0.1 * 3**waits, 10.0)

    async def _ask(
        self, server: Any, prompt_ids: list[int], prompt: Callable[[], str], n: int, sampling: dict[str, Any]
    ) -> list[Sample]:
        split = sampling.pop("split", "train")
        config = getattr(server, "config", None)
        if n > 1 and getattr(config, "n_kwarg_is_ignored", False):
            answers = [await self._ask(server, prompt_ids, prompt, 1, {**sampling, "split": split}) for _ in range(n)]
            return [sample for answer in answers for sample in answer]
        call = getattr(server, "_tokens_and_logprobs_completion_wrapper", None)
        if call is None:
            call = server.tokens_and_logprobs_completion
            sampling["prompt"] = prompt()
        try:
            async with self._slot(server, split) or contextlib.nullcontext():
                started = time.time()
                answer = await call(
                    model=getattr(config, "model_name", "default"), input_ids=prompt_ids, n=n, **sampling
                )
        except HermesAtroposError:
            raise
        except Exception as error:
            failure = typed(error, server)
            raise failure from failure.__cause__ or error
        eval_ = "eval_" if split == "eval" else ""
        for name, value in (("request_timings", time.time() - started), ("attempts_list", 1)):
            getattr(server, eval_ + name, []).append(value)
        return samples(answer, n, url_of(server))

    def _slot(self, server: Any, split: str | None) -> Any:
        """The server's semaphore, or on another event loop than the one that it is bound to, one just like it."""
        semaphore = getattr(server, "eval_sem" if split == "eval" else "sem", None)
        loop = asyncio.get_running_loop()
        if getattr(semaphore, "_loop", None) in (None, loop):
            return semaphore
        ours = self._semaphores.setdefault(loop, {})
        return ours.setdefault(semaphore, asyncio.Semaphore(getattr(semaphore, "max_val", 1)))

    def _room(self, server: Any, split: str | None) -> float:
        semaphore = self._slot(server, split)
        if semaphore is None:
            return 0.0
        reserved = semaphore.min_val() if hasattr(semaphore, "min_val") else 0
        return float(semaphore._value - reserved - len(semaphore._waiters or ()))


async def retried(
    request: Callable[[int], Awaitable[T]], *, pause: Callable[[RetryCallState], float], patience_s: float
) -> T:
    """What ``request``, which is told its number from 1 on, comes back with; asked again where that may help.

    Raises:
        BackendError: the last failure.
    """
    retrying = AsyncRetrying(
        retry=retry_if_exception(worth_another_try),
        wait=pause,
        stop=stop_after_attempt(ATTEMPTS) | stop_before_delay(patience_s),
        reraise=True,
    )

    async def numbered() -> T:
        return await request(retrying.statistics["attempt_number"])

    try:
        return await retrying(numbered)
    finally:
        retrying.iter_state.reset()  # which refers back to it: garbage of each call that only the collector would find


def watch(server: Any) -> None:
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


def samples(answer: Any, n: int, url: str | None) -> list[Sample]:
    """The choices of ``(prompt_ids, [output_ids], [logprobs], [finish_reasons])``."""
    try:
        echo, outputs, logprobs, reasons = answer
        choices = list(zip(map(list, outputs), map(list, logprobs), reasons, strict=True))
    except (TypeError, ValueError) as error:
        raise BackendResponseError(
            f"a token call answers (prompt ids, [output ids], [logprobs], [finish reasons]), not {str(answer)[:200]}",
            url=url,
        ) from error
    if len(choices) != n:
        raise BackendResponseError(f"{n} answers were asked for, and {len(choices)} came", url=url)
    found = []
    for output_ids, values, reason in choices:
        details = dict(reason) if isinstance(reason, Mapping) else {"type": reason}
        kind = details.pop("type", None)
        found.append(Sample(echo, output_ids, values, kind, {"server_url": url, **details}))
    return found


def worth_another_try(error: BaseException) -> bool:
    """Whether the same request may succeed later or elsewhere."""
    if isinstance(error, BackendError) and error.status is not None:
        return error.status == 429 or error.status >= 500
    return isinstance(error, BackendConnectionError | BackendTimeoutError)


def typed(error: Exception, server: Any) -> HermesAtroposError:
    """A server's exception as one of ours. What can't be recognised is a plain ``BackendError``: never retried."""
    import aiohttp
    import httpx
    import openai

    from hermes_atropos.servers.http import response_error

    url = url_of(server)
    match error:
        case HermesAtroposError():
            return error
        case RetryError(last_attempt=last) if isinstance(cause := last.exception(), Exception):
            return typed(cause, server)
        case NotImplementedError():
            return UnsupportedServerError(f"{type(server).__name__} has no token call: {error}")
        case aiohttp.ClientResponseError(status=status) if status >= 400:
            # atroposlib's servers drop the body before it can be read.
            return response_error(str(error.request_info.real_url), status, error.message, error.headers)
        case httpx.HTTPStatusError(response=response) | openai.APIStatusError(response=response):
            return response_error(str(response.url), response.status_code, response.text, response.headers)
        case TimeoutError() | httpx.TimeoutException() | openai.APITimeoutError():
            return BackendTimeoutError(f"{url} did not answer in time", url=url)
        case aiohttp.ClientResponseError() | httpx.DecodingError() | httpx.TooManyRedirects() | json.JSONDecodeError():
            return BackendResponseError(f"{url} gave no answer to what was asked: {error}", url=url)
        case ConnectionError() | socket.gaierror() | aiohttp.ClientError():
            return BackendConnectionError(f"no answer from {url}: {error or type(error).__name__}", url=url)
        case httpx.TransportError() | openai.APIConnectionError():
            return BackendConnectionError(f"no answer from {url}: {error.__cause__ or error}", url=url)
    return BackendError(f"the call of {type(server).__name__} failed: {type(error).__name__}: {error}", url=url)


def url_of(server: Any) -> str | None:
    return getattr(getattr(server, "config", None), "base_url", None)
