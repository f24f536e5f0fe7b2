"""What the library relies on in an engine, asked of a real one: each check raises where it does not hold.

A check's first line is its row in docs/engines.md.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
from rollouts import prompts_of_a_group
from serving import CONTEXT, Engine

from hermes_atropos.backends.tracked import TrackedBackend
from hermes_atropos.errors import (
    BackendError,
    BackendResponseError,
    ConfigurationError,
    ContextLengthError,
    SamplingError,
)
from hermes_atropos.servers import StockSGLangServer, StockVLLMServer, VLLMGenerateServer
from hermes_atropos.servers.failures import response_error
from hermes_atropos.servers.probe import probe

Check = Callable[[Engine, Any, Any], Awaitable[None]]
USER = {"role": "user", "content": "Say something."}
ON_BOTH: list[Check] = []
ON_VLLM: list[Check] = []
ON_SGLANG: list[Check] = []


def check(*lists: list[Check]) -> Callable[[Check], Check]:
    def listed(function: Check) -> Check:
        for one in lists:
            one.append(function)
        return function

    return listed


async def ask(server: Any, prompt_ids: list[int], **sampling: Any) -> Any:
    return await server._tokens_and_logprobs_completion_wrapper(input_ids=prompt_ids, **sampling)


async def refused(kind: type[Exception], server: Any, prompt_ids: list[int], **sampling: Any) -> None:
    failure = None
    try:
        await ask(server, prompt_ids, **sampling)
    except (BackendError, ConfigurationError) as error:
        failure = error
    assert type(failure) is kind, f"{kind.__name__} was expected for {sampling}, not {failure!r}"


@check(ON_BOTH)
async def found(engine: Engine, server: Any, tokenizer: Any) -> None:
    """`probe` finds the protocol, the context and the tokenizer."""
    told = await probe(engine.url, tokenizer=tokenizer)
    assert told.problem is None, told.problem
    expected = StockVLLMServer if engine.name == "vllm" else StockSGLangServer
    assert (type(told.server), told.context_length) == (expected, CONTEXT), told
    assert str(told.tokenizer_name).endswith("/A"), told


@check(ON_BOTH)
async def default_settings(engine: Engine, server: Any, tokenizer: Any) -> None:
    """32 answers at once without `max_tokens`: none is refused."""
    backend = TrackedBackend(server, tokenizer)
    turns = await asyncio.gather(*(backend.fresh().sample([USER]) for _ in range(32)))
    assert all(turn.completion_tokens for turn in turns)


@check(ON_BOTH)
async def too_long(engine: Engine, server: Any, tokenizer: Any) -> None:
    """A prompt that fills the context, or is longer, is a `ContextLengthError` in the engine's own words."""
    server.context_length = 10**6
    for length in (CONTEXT, CONTEXT + 1, CONTEXT + 500):
        await refused(ContextLengthError, server, [5] * length, max_tokens=2)
    server.context_length = CONTEXT


@check(ON_BOTH)
async def last_place(engine: Engine, server: Any, tokenizer: Any) -> None:
    """A prompt that leaves what the library counts as room is answered."""
    room = 12 + server.reserved
    _, [output], _, _ = await ask(server, [5] * (CONTEXT - room), max_tokens=None, ignore_eos=True)
    assert 0 < len(output) <= 12, len(output)


@check(ON_VLLM)
async def more_than_the_context(engine: Engine, server: Any, tokenizer: Any) -> None:
    """`max_tokens` beyond the context is not taken for a prompt that is too long."""
    body = {"model": "policy", "prompt": [5], "max_tokens": CONTEXT + 1}
    async with httpx.AsyncClient(trust_env=False) as client:
        answer = await client.post(f"{engine.url}/v1/completions", json=body)
    assert type(response_error("", answer.status_code, answer.text)) is BackendResponseError, answer.text


@check(ON_BOTH)
async def greedy(engine: Engine, server: Any, tokenizer: Any) -> None:
    """Several answers at temperature 0 come, and are the same."""
    answers = await TrackedBackend(server, tokenizer).sample_group([USER], n=3, temperature=0, max_tokens=8)
    assert len({answer.raw for answer in answers}) == 1


@check(ON_VLLM)
async def form(engine: Engine, server: Any, tokenizer: Any) -> None:
    """Structured outputs in anybody's words are obeyed."""
    for wish in ({"regex": "(ab){3}"}, {"structured_outputs": {"regex": "(ab){3}"}}, {"ebnf": 'root ::= "ababab"'}):
        _, [output], _, _ = await ask(server, [5, 6, 7], max_tokens=20, **wish)
        assert tokenizer.decode(output, skip_special_tokens=True) == "ababab", (wish, tokenizer.decode(output))


@check(ON_BOTH)
async def strange_parameter(engine: Engine, server: Any, tokenizer: Any) -> None:
    """A parameter that is another engine's is refused before the call."""
    strange: dict[str, Any] = {"custom_params": {}} if engine.name == "vllm" else {"bad_words": ["no"]}
    await refused(SamplingError, server, [5], max_tokens=2, **strange)


@check(ON_SGLANG)
async def broken_by_a_parameter(engine: Engine, server: Any, tokenizer: Any) -> None:
    """A parameter that nobody knows is answered with a 500, which is asked twice and no more."""
    failure = None
    try:
        await TrackedBackend(server, tokenizer).sample([USER], max_tokens=2, extra_body={"beam_width": 3})
    except BackendError as error:
        failure = error
    assert failure is not None
    assert (failure.status, failure.attempts) == (500, 2), failure


@check(ON_BOTH)
async def beyond_the_vocabulary(engine: Engine, server: Any, tokenizer: Any) -> None:
    """A token beyond the vocabulary is refused, and the server lives on."""
    await refused(
        BackendResponseError if engine.name == "vllm" else ConfigurationError, server, [5, 10**5], max_tokens=2
    )
    await ask(server, [5, 6], max_tokens=2)


@check(ON_BOTH)
async def kind(engine: Engine, server: Any, tokenizer: Any) -> None:
    """One short answer shows that the logprobs are those before the temperature (vLLM) or after it (SGLang)."""
    assert await server.scales_logprobs() is (engine.name == "sglang")


@check(ON_VLLM)
async def seeds(engine: Engine, server: Any, tokenizer: Any) -> None:
    """Rollouts of one seed differ, and the same rollout comes again."""

    async def drawn() -> list[str]:
        backend = TrackedBackend(server, tokenizer)
        turns = [await backend.fresh().sample([USER], seed=7, max_tokens=12) for _ in range(6)]
        return [turn.raw for turn in turns]

    first, second = await drawn(), await drawn()
    assert first == second, (first, second)
    assert len(set(first)) > 1, first


@check(ON_VLLM)
async def told_weights(engine: Engine, server: Any, tokenizer: Any) -> None:
    """`/inference/v1/generate` echoes the prompt and tells the weights of each stretch."""
    if isinstance(server, VLLMGenerateServer):
        prompt, [output], _, [reason] = await ask(server, [5, 6, 7], max_tokens=4, ignore_eos=True)
        assert prompt == [5, 6, 7]
        assert reason["weights"][0]["end"] == len(output)


@check(ON_VLLM)
async def shared_prefix(engine: Engine, server: Any, tokenizer: Any) -> None:
    """The first prompts of a group's rollouts are computed once: the cache has every full block of the others."""
    prompts = await prompts_of_a_group(tokenizer, 4)
    async with httpx.AsyncClient(trust_env=False, timeout=60) as client:

        async def counted(name: str) -> int:
            metrics = (await client.get(engine.url + "/metrics")).text
            return int(sum(float(value) for value in re.findall(rf"^vllm:{name}{{.*}} (\S+)$", metrics, re.M)))

        (await client.post(f"{engine.url}/reset_prefix_cache")).raise_for_status()
        before = await counted("prefix_cache_hits_total")
        for prompt in prompts:
            await ask(server, prompt, max_tokens=1)
        hits = await counted("prefix_cache_hits_total") - before
        [block] = re.findall(r'[{,]block_size="(\d+)"', (await client.get(engine.url + "/metrics")).text)
    full = sum((len(prompt) - 1) // int(block) * int(block) for prompt in prompts[1:])
    assert hits == full, f"{hits} tokens were in the cache, and {full} are in full blocks of {block}"


@check(ON_BOTH)
async def aborted(engine: Engine, server: Any, tokenizer: Any) -> None:
    """An answer that is aborted is gone on with once the server resumes; `/health` stays good meanwhile."""
    pause, resume, body = (
        ("/pause?mode=abort", "/resume", {})
        if engine.name == "vllm"
        else ("/pause_generation", "/continue_generation", {"mode": "abort"})
    )
    backend = TrackedBackend(server, tokenizer)
    call = asyncio.create_task(backend.sample([USER], max_tokens=6000, ignore_eos=True, stop_token_ids=[]))
    async with httpx.AsyncClient(trust_env=False, timeout=60) as client:
        await asyncio.sleep(1)
        (await client.post(engine.url + pause, json=body)).raise_for_status()
        try:
            await asyncio.sleep(1)
            assert not call.done(), f"it was not waited for: {call}"
            assert await server.is_healthy()
        finally:
            (await client.post(engine.url + resume, json={})).raise_for_status()
    turn = await call
    assert (turn.finish_reason, turn.completion_tokens) == ("length", 6000), turn
    assert backend.ledger.report().aborts >= 1
