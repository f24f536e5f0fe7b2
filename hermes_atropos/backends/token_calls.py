"""One token call: token ids in, and for each choice token ids and logprobs out."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hermes_atropos.backends.pool import Pool
from hermes_atropos.errors import BackendResponseError, UnsupportedServerError
from hermes_atropos.servers.failures import url_of

__all__ = ["Sample", "TokenCalls"]


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


class TokenCalls:
    """Token calls of a pool of servers.

    Args:
        server: an atroposlib ``ServerManager`` or ``APIServer``, or any object with
            ``tokens_and_logprobs_completion(**kwargs)``, which is given the prompt as text, too.
        patience_s: as in ``Pool``.

    Raises:
        NoServerError: a ``ServerManager`` without servers.
        UnsupportedServerError: an object without a token call.
    """

    def __init__(self, server: Any, *, patience_s: float = 60.0) -> None:
        self.pool = Pool(server, patience_s=patience_s)
        for one in self.pool.servers:
            if not hasattr(one, "tokens_and_logprobs_completion"):
                raise UnsupportedServerError(
                    f"{type(one).__name__} has no token call: pass an atroposlib ServerManager or APIServer"
                )
        self._max_n = getattr(server, "max_n_completions", None)

    async def sample(
        self, prompt_ids: list[int], prompt: Callable[[], str], n: int, sampling: Mapping[str, Any]
    ) -> list[Sample]:
        """``n`` answers to a prompt; see ``Pool.call``.

        Raises:
            BackendError: the call failed for good.
            UnsupportedServerError: the server refuses every token call.
        """
        if self._max_n and n > self._max_n:
            parts = [min(self._max_n, n - start) for start in range(0, n, self._max_n)]
            return await self._together([(prompt_ids, prompt, part, sampling) for part in parts])
        sampling = dict(sampling)
        split = sampling.pop("split", None) or "train"

        async def ask(server: Any) -> list[Sample]:
            if n > 1 and getattr(getattr(server, "config", None), "n_kwarg_is_ignored", False):
                answers = [await _ask(server, prompt_ids, prompt, 1, sampling) for _ in range(n)]
                return [sample for answer in answers for sample in answer]
            return await _ask(server, prompt_ids, prompt, n, sampling)

        return await self.pool.call(ask, split=split)

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


async def _ask(
    server: Any, prompt_ids: list[int], prompt: Callable[[], str], n: int, sampling: Mapping[str, Any]
) -> list[Sample]:
    model = getattr(getattr(server, "config", None), "model_name", "default")
    arguments = {"model": model, "input_ids": prompt_ids, "n": n, **sampling}
    call = getattr(server, "_tokens_and_logprobs_completion_wrapper", None)
    if call is None:
        call = server.tokens_and_logprobs_completion
        arguments["prompt"] = prompt()
    return _samples(await call(**arguments), n, url_of(server))


def _samples(answer: Any, n: int, url: str | None) -> list[Sample]:
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
