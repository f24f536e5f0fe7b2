"""The embedded model as a process: this library's clients of vLLM find what they know of vLLM."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from atroposlib.envs.server_handling.server_manager import APIServerConfig
from tiny_llama import write_llama

from hermes_atropos.backends.tracked import TrackedBackend
from hermes_atropos.embedded.llama import Llama
from hermes_atropos.errors import BackendResponseError, ContextLengthError
from hermes_atropos.listening import hearing, text_listener
from hermes_atropos.servers import StockVLLMServer, TokenServer, VLLMGenerateServer
from hermes_atropos.servers.probe import probe
from hermes_atropos.servers.sampling import NEUTRAL

KINDS = [StockVLLMServer, VLLMGenerateServer]
USER = {"role": "user", "content": "Hello"}


@pytest.fixture(scope="module")
def process(checkpoint: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "hermes_atropos.embedded", "--port", "0", "--checkpoint", str(checkpoint)]
    environ = {name: value for name, value in os.environ.items() if name != "OPENBLAS_NUM_THREADS"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environ) as process:
        yield process
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0


@pytest.fixture(scope="module")
def url(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def connect(kind: type[TokenServer], url: str) -> TokenServer:
    return kind(APIServerConfig(base_url=url, model_name="embedded", api_key="", health_check=False))


async def ask(server: Any, prompt: list[int], **sampling: Any) -> Any:
    return await server._tokens_and_logprobs_completion_wrapper(input_ids=prompt, **sampling)


async def post(url: str, body: Any = None) -> Any:
    async with httpx.AsyncClient(trust_env=False, timeout=30) as client:
        return (await client.post(url, json=body)).raise_for_status().json()


async def test_probe_finds_it(url: str, checkpoint: Path) -> None:
    from hermes_atropos.testing import chatml_tokenizer

    found = await probe(url, tokenizer=chatml_tokenizer())
    assert found.problem is None
    assert type(found.server) is StockVLLMServer
    assert (found.model, found.tokenizer_name, found.context_length) == ("embedded", str(checkpoint), 4096)


@pytest.mark.parametrize("kind", KINDS)
async def test_an_answer_has_the_logprobs_of_the_model(kind: type[TokenServer], url: str, checkpoint: Path) -> None:
    server = connect(kind, url)
    prompt, outputs, logprobs, _ = await ask(server, [5, 6, 7], n=3, max_tokens=20, temperature=0.7, seed=3)
    assert prompt == [5, 6, 7]
    assert await server.scales_logprobs() is True
    for ids, told in zip(outputs, logprobs, strict=True):
        assert np.abs(Llama(checkpoint).logprobs([5, 6, 7, *ids], 0.7)[2:] - np.array(told)).max() < 1e-5


@pytest.mark.parametrize("kind", KINDS)
async def test_what_is_wrong_is_told_as_vllm_tells_it(kind: type[TokenServer], url: str) -> None:
    server = connect(kind, url)
    server.context_length = 10**6
    for length in (4096, 5000):
        with pytest.raises(ContextLengthError):
            await ask(server, [5] * length, max_tokens=2)
    with pytest.raises(BackendResponseError, match="token 9999"):
        await ask(server, [9999], max_tokens=2)
    with pytest.raises(BackendResponseError, match="min_p"):
        await ask(server, [5], max_tokens=2, min_p=0.1)
    server.config.model_name = "another"
    with pytest.raises(BackendResponseError, match="404"):
        await ask(server, [5], max_tokens=2)


@pytest.mark.parametrize("kind", KINDS)
async def test_a_listener_hears_what_is_recorded(kind: type[TokenServer], url: str) -> None:
    from hermes_atropos.testing import chatml_tokenizer

    async def answer(*heard: Any) -> Any:
        backend = TrackedBackend(connect(kind, url), chatml_tokenizer())
        with hearing(text_listener, heard[0] if heard else None):
            turn = await backend.sample([USER], seed=5, max_tokens=40)
        return turn, backend.ledger.turns[0]

    deltas: list[Any] = []
    (alone, recorded), (streamed, also) = await answer(), await answer(deltas.append)
    assert deltas
    assert alone.raw == streamed.raw
    assert recorded.output_ids == also.output_ids
    assert np.allclose(recorded.logprobs, also.logprobs, atol=1e-5)


async def bring(url: str, folder: Path, version: str) -> None:
    """New weights, as a trainer brings them to vLLM."""
    assert await post(f"{url}/pause?mode=abort") == {"status": "paused"}
    await post(f"{url}/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}})
    assert (await post(f"{url}/update_weight_version", {"new_version": version}))["success"]
    assert (await post(f"{url}/reset_prefix_cache"))["success"]
    assert await post(f"{url}/resume") == {"status": "resumed"}


async def test_new_weights_abort_the_answers_under_way_which_are_gone_on_with(
    url: str, checkpoint: Path, other_checkpoint: Path
) -> None:
    from hermes_atropos.testing import chatml_tokenizer

    backend = TrackedBackend(connect(VLLMGenerateServer, url), chatml_tokenizer())
    call = asyncio.create_task(backend.sample([USER], max_tokens=1500, ignore_eos=True, stop_token_ids=[]))
    await asyncio.sleep(0.2)
    await bring(url, other_checkpoint, "B")
    turn = await call
    await bring(url, checkpoint, "A")
    assert turn.completion_tokens == 1500
    [recorded] = backend.ledger.turns
    ids = [*backend.ledger.ids(recorded.prompt), *recorded.output_ids]
    *before, after = recorded.weights
    assert after.version == "B"
    for part in [*before, after]:
        model = Llama(other_checkpoint if part.version == "B" else checkpoint)
        expected = model.logprobs(ids)[recorded.prompt.length - 1 :][part.start : part.end]
        assert np.abs(expected - np.array(recorded.logprobs[part.start : part.end])).max() < 1e-4


async def test_without_a_reset_the_old_weights_stay_in_the_prefix_cache(
    url: str, checkpoint: Path, other_checkpoint: Path
) -> None:
    """As in vLLM: what checks a trainer's loop must be able to see it."""
    server = connect(StockVLLMServer, url)
    prompt = list(range(5, 200))

    async def error_with(reset: bool) -> float:
        await ask(server, prompt, max_tokens=1)
        body = {"method": "reload_weights", "kwargs": {"weights_path": str(other_checkpoint)}}
        await post(f"{url}/collective_rpc", body)
        if reset:
            await post(f"{url}/reset_prefix_cache")
        _, [ids], [logprobs], _ = await ask(server, prompt, max_tokens=5, ignore_eos=True)
        await bring(url, checkpoint, "A")
        expected = Llama(other_checkpoint).logprobs(prompt + ids)[len(prompt) - 1 :]
        return float(np.abs(expected - np.array(logprobs)).max())

    assert await error_with(reset=True) < 1e-5
    assert await error_with(reset=False) > 1e-3


async def test_weights_that_do_not_fit_are_refused_and_the_old_ones_stay(url: str, tmp_path: Path) -> None:
    write_llama(tmp_path, num_hidden_layers=1)
    for folder, why in ((tmp_path, "another shape"), (tmp_path / "nowhere", "can't be read")):
        body = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
        async with httpx.AsyncClient(trust_env=False) as client:
            answer = await client.post(f"{url}/collective_rpc", json=body)
        assert answer.status_code == 400
        assert why in answer.json()["error"]["message"]
    await ask(connect(StockVLLMServer, url), [5], max_tokens=2)


async def test_whoever_hangs_up_is_not_answered(url: str) -> None:
    call = asyncio.create_task(ask(connect(StockVLLMServer, url), [5], max_tokens=4000, ignore_eos=True))
    await asyncio.sleep(0.1)
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)
    # Answers under way are waited for: this one, of many seconds, is not.
    async with asyncio.timeout(5):
        await post(f"{url}/pause?mode=wait")
    await post(f"{url}/resume")


def test_what_is_sent_by_default_is_known_to_it() -> None:
    from hermes_atropos.embedded.sampler import read_sampling

    assert read_sampling(NEUTRAL).temperature == 1.0
