"""One token call: token ids in, and for each choice token ids and logprobs out."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from hermes_atropos.backends.pool import Pool
from hermes_atropos.errors import BackendResponseError, UnsupportedServerError
from hermes_atropos.servers import TokenServer
from hermes_atropos.servers.failures import url_of
from hermes_atropos.servers.sampling import derived_seed, reads_its_answer
from hermes_atropos.tokens import UNKNOWN, Weights

__all__ = ["ABORTS", "Sample", "TokenCalls"]

T = TypeVar("T")

#: How often in a row an answer that the server aborts is gone on with, without a further token.
ABORTS = 32


@dataclass(frozen=True, slots=True)
class Sample:
    """One choice of a server's answer, as it came.

    Attributes:
        echo: the prompt's ids as the server says it received them; None or empty where it doesn't say.
        output_ids, logprobs: [output_len] each.
        finish_reason: ``stop``, ``length``, ``abort``, …; None where the server gave none.
        metadata: ``server_url`` and whatever else stood beside the finish reason (SGLang's ``matched``, for instance,
            or ``weights_version``); ``aborts``, where there were any.
        weights: of the output, stretch by stretch.
        scaled: whether the logprobs are those after the temperature; None where that is not known or does not matter.
    """

    echo: Sequence[int] | None
    output_ids: Sequence[int]
    logprobs: Sequence[float]
    finish_reason: str | None
    metadata: dict[str, Any]
    weights: tuple[Weights, ...] = ()
    scaled: bool | None = None


class TokenCalls:
    """Token calls of a pool of servers.

    Args:
        server, patience_s: as in ``TrackedBackend``.

    Raises:
        NoServerError, UnsupportedServerError: as there.
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
        self,
        prompt_ids: list[int],
        prompt: Callable[[list[int]], str],
        n: int,
        sampling: Mapping[str, Any],
        family: int | None = None,
    ) -> list[Sample]:
        """``n`` answers to a prompt; see ``Pool.call``.

        An answer that the server aborts, as it does for new weights, is gone on with: the prompt and what there is are
        sent again, and the parts joined. Where the rest would be another draw so (see ``reads_its_answer``), the same
        is asked again. After ``ABORTS`` times in a row that brought nothing more it stays aborted.

        Args:
            prompt: the prompt, and these tokens after it, as text.

        Raises:
            BackendError: the call failed for good.
            UnsupportedServerError: the server refuses every token call.
        """
        if self._max_n and n > self._max_n:
            parts = [min(self._max_n, n - start) for start in range(0, n, self._max_n)]
            groups = await together(self.sample(prompt_ids, prompt, part, sampling, family) for part in parts)
            return [answer for group in groups for answer in group]
        answers = await self._once(prompt_ids, lambda: prompt([]), n, sampling, family)
        if all(answer.finish_reason != "abort" for answer in answers):
            return answers
        return await together(self._whole(prompt_ids, prompt, answer, sampling, family) for answer in answers)

    async def _once(
        self,
        prompt_ids: list[int],
        prompt: Callable[[], str],
        n: int,
        sampling: Mapping[str, Any],
        family: int | None,
    ) -> list[Sample]:
        sampling = dict(sampling)
        split = sampling.pop("split", None) or "train"

        async def ask(server: Any) -> list[Sample]:
            scaled = await _scaled(server, sampling)
            ignores_n = getattr(getattr(server, "config", None), "n_kwarg_is_ignored", False)
            # vLLM refuses several answers where each would be the same.
            parts = [1] * n if ignores_n or sampling.get("temperature") == 0 else [n]
            asked = [await _ask(server, prompt_ids, prompt, part, sampling, scaled) for part in parts]
            return [sample for answer in asked for sample in answer]

        return await self.pool.call(ask, split=split, family=family)

    async def _whole(
        self,
        prompt_ids: list[int],
        prompt: Callable[[list[int]], str],
        answer: Sample,
        sampling: Mapping[str, Any],
        family: int | None,
    ) -> Sample:
        """The answer, gone on with as often as it was aborted."""
        anew = reads_its_answer(sampling)
        aborts = fruitless = 0
        while answer.finish_reason == "abort" and fruitless < ABORTS:
            aborts += 1
            kept = [] if anew else list(answer.output_ids)
            further = _of_the_rest(sampling, len(kept), aborts)
            if further.get("max_tokens", 1) < 1:
                return replace(answer, finish_reason="length")
            if fruitless:
                await asyncio.sleep(min(0.01 * 2**fruitless, 5.0))
            asked = [*prompt_ids, *kept]
            [rest] = await self._once(asked, functools.partial(prompt, kept), 1, further, family)
            fruitless = 0 if rest.output_ids and not anew else fruitless + 1
            answer = _joined(answer, rest, asked) if kept else rest
            answer.metadata["aborts"] = aborts
        return answer


async def together(calls: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """What they come back with, in order; if one fails, its failure, and the others are cancelled."""
    failure: BaseException | None = None
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(call) for call in calls]
    except BaseExceptionGroup as failures:
        failure = failures.exceptions[0]
    if failure is not None:
        raise failure
    return [task.result() for task in tasks]


async def _scaled(server: Any, sampling: Mapping[str, Any]) -> bool | None:
    """Whether the server's logprobs are those after the temperature, where there is a difference."""
    if sampling.get("temperature", 1) in (0, 1) or not hasattr(server, "scales_logprobs"):
        return None
    return await server.scales_logprobs()


def _of_the_rest(sampling: Mapping[str, Any], kept: int, aborts: int) -> dict[str, Any]:
    """The parameters of what follows the first ``kept`` tokens of an answer."""
    further = dict(sampling)
    for name in ("max_tokens", "min_tokens"):
        if name in further:
            further[name] = max(further[name] - kept, 0)
    if "seed" in further:  # the first numbers that it gives were used
        further["seed"] = derived_seed(further["seed"], aborts)
    return further


def _joined(part: Sample, rest: Sample, asked: list[int]) -> Sample:
    """One answer of two parts, the second of which was sampled from the prompt and the first."""
    start = len(part.output_ids)
    further = [replace(one, start=one.start + start, end=one.end + start) for one in rest.weights]
    weights = list(part.weights)
    if weights and further and weights[-1].version == further[0].version != UNKNOWN:
        weights[-1] = replace(weights[-1], end=further.pop(0).end)
    return Sample(
        # What the server says that it went on from is another prompt, if that was not what it was sent.
        part.echo if not rest.echo or list(rest.echo) == asked else rest.echo,
        [*part.output_ids, *rest.output_ids],
        [*part.logprobs, *rest.logprobs],
        rest.finish_reason,
        {**part.metadata, **rest.metadata},
        (*weights, *further),
        part.scaled if part.scaled == rest.scaled else None,
    )


async def _ask(
    server: Any,
    prompt_ids: list[int],
    prompt: Callable[[], str],
    n: int,
    sampling: Mapping[str, Any],
    scaled: bool | None,
) -> list[Sample]:
    model = getattr(getattr(server, "config", None), "model_name", "default")
    arguments = {"model": model, "input_ids": prompt_ids, "n": n, **sampling}
    if not isinstance(server, TokenServer):  # others send whatever they are given
        arguments |= arguments.pop("extra_body", {})
    call = getattr(server, "_tokens_and_logprobs_completion_wrapper", None)
    if call is None:
        call = server.tokens_and_logprobs_completion
        arguments["prompt"] = prompt()
    return _samples(await call(**arguments), n, url_of(server), scaled)


def _samples(answer: Any, n: int, url: str | None, scaled: bool | None) -> list[Sample]:
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
        weights = _weights(details, len(output_ids), url)
        found.append(Sample(echo, output_ids, values, kind, {"server_url": url, **details}, weights, scaled))
    return found


def _weights(details: dict[str, Any], length: int, url: str | None) -> tuple[Weights, ...]:
    """Which weights sampled an answer, by what the server told with its finish reason."""
    whole = [{"start": 0, "end": length, "version": str(details.get("weights_version", UNKNOWN))}] if length else []
    spans = [Weights(**span) for span in details.pop("weights", whole)]
    starts, ends = [span.start for span in spans], [span.end for span in spans]
    if [*starts, length] != [0, *ends]:
        raise BackendResponseError(f"weights are told for other tokens than those sampled: {spans}", url=url)
    return tuple(spans)
