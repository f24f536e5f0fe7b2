"""The servers' classes against local servers that speak the real protocols, well and badly."""

from __future__ import annotations

import asyncio
import email.utils
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import wire
from atroposlib.envs.server_handling.server_baseline import APIServerConfig
from atroposlib.envs.server_handling.server_manager import ServerManager
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from wire import MODEL, AtroposVLLMWire, OpenAIWire, SGLangWire, VLLMWire, Wire

from hermes_atropos.backends.tracked import TrackedBackend
from hermes_atropos.errors import (
    BackendConnectionError,
    BackendError,
    BackendResponseError,
    BackendTimeoutError,
    ContextLengthError,
    NoTokenizerError,
    TokenFidelityError,
    UnsupportedServerError,
)
from hermes_atropos.exports import atropos
from hermes_atropos.messages import TURN_KEY
from hermes_atropos.servers import (
    AtroposVLLMServer,
    OpenAIEndpoint,
    StockSGLangServer,
    StockVLLMServer,
    TokenServer,
    VLLMGenerateServer,
)
from hermes_atropos.servers.failures import response_error

PROTOCOLS: dict[str, tuple[type[TokenServer], Callable[..., Wire]]] = {
    "vllm": (StockVLLMServer, VLLMWire),
    "vllm-old": (StockVLLMServer, lambda **kw: VLLMWire(release="old", **kw)),
    "vllm-generate": (VLLMGenerateServer, lambda **kw: VLLMWire(generate="alone", **kw)),
    "sglang": (StockSGLangServer, SGLangWire),
    "atropos-vllm": (AtroposVLLMServer, AtroposVLLMWire),
}


def connect(cls: type[Any], wired: Wire, *, path: str = "/v1", timeout_s: float = 30, **config: Any) -> Any:
    settings = {"model_name": MODEL, "health_check": False, **config}
    server = cls(APIServerConfig(base_url=wired.url + path, **settings))
    server.config.timeout = timeout_s
    return server


@pytest.fixture(params=PROTOCOLS)
def protocol(request: pytest.FixtureRequest) -> tuple[type[TokenServer], Callable[..., Wire]]:
    return PROTOCOLS[request.param]


@pytest.fixture
def wired(protocol: tuple[type[TokenServer], Callable[..., Wire]]) -> Iterator[Wire]:
    with protocol[1](reply="I will look at the files first. " * 40) as running:
        yield running


@pytest.fixture
def server(protocol: tuple[type[TokenServer], Callable[..., Wire]], wired: Wire) -> TokenServer:
    return connect(protocol[0], wired)


async def ask(server: Any, prompt_ids: list[int] | None = None, **kwargs: Any) -> Any:
    return await server._tokens_and_logprobs_completion_wrapper(
        model=MODEL, input_ids=[5, 6, 7] if prompt_ids is None else prompt_ids, **kwargs
    )


def generations(wired: Wire) -> list[wire.WireRequest]:
    """The requests for answers; not the one by which SGLang is asked for its vocabulary."""
    paths = {"/v1/completions", "/inference/v1/generate", "/generate"}
    return [r for r in wired.requests if r.path in paths and not asks_for_vocabulary(r)]


def asks_for_vocabulary(request: wire.WireRequest) -> bool:
    return "logit_bias" in (request.body.get("sampling_params") or {})


def prompt_of(request: wire.WireRequest) -> list[int]:
    body = request.body
    prompt = body.get("token_ids") or body.get("input_ids") or body["prompt"]
    return prompt["prompt_token_ids"] if isinstance(prompt, dict) else prompt


def words(reasons: list[Any]) -> list[str]:
    return [reason["type"] if isinstance(reason, dict) else reason for reason in reasons]


# Every protocol


async def test_the_ids_that_were_sampled_come_back_with_their_logprobs(server: TokenServer, wired: Wire) -> None:
    prompt, outputs, logprobs, reasons = await ask(server, [5, 6, 7, 8], max_tokens=9)
    [request] = generations(wired)
    assert prompt_of(request) == prompt == [5, 6, 7, 8]
    assert list(zip(outputs, logprobs, words(reasons), strict=True)) == request.sampled


@pytest.mark.parametrize("name", PROTOCOLS)
def test_any_prompt_arrives_as_it_was_sent(name: str) -> None:
    cls, make = PROTOCOLS[name]
    with make() as wired:
        server = connect(cls, wired)

        @settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
        @given(
            prompt_ids=st.lists(st.integers(0, len(wired.tokenizer) - 1), min_size=1, max_size=60),
            max_tokens=st.integers(1, 12),
            n=st.integers(1, 3),
        )
        def holds(prompt_ids: list[int], max_tokens: int, n: int) -> None:
            # Each example has an event loop of its own, as consecutive asyncio.run calls have.
            prompt, outputs, logprobs, reasons = asyncio.run(ask(server, prompt_ids, max_tokens=max_tokens, n=n))
            request = generations(wired)[-1]
            assert prompt_of(request) == prompt == prompt_ids
            assert list(zip(outputs, logprobs, words(reasons), strict=True)) == request.sampled

        holds()


async def test_without_max_tokens_the_answer_may_fill_the_context(server: TokenServer, wired: Wire) -> None:
    _, [output], _, reasons = await ask(server)
    assert len(output) > 128  # vLLM's own default is 16, SGLang's 128
    assert output[-1] == wired.tokenizer.eos_token_id
    assert words(reasons) == ["stop"]


@pytest.mark.parametrize("name", ["vllm", "vllm-generate", "sglang"])
async def test_max_tokens_is_cut_to_what_the_context_leaves(name: str) -> None:
    cls, make = PROTOCOLS[name]
    with make(context_length=40, reply="one two three " * 30) as wired:
        server = connect(cls, wired)
        _, [output], _, reasons = await ask(server, list(range(20)), max_tokens=1000)
        assert len(output) == 20 - server.reserved
        assert words(reasons) == ["length"]
        with pytest.raises(ContextLengthError, match=r"40 tokens, the context of .* 40"):
            await ask(server, list(range(40)), max_tokens=1)
        assert len(generations(wired)) == 1
        assert len(wired.to("/v1/models")) == 1


async def test_sampling_parameters_arrive_and_nothing_that_is_none(server: TokenServer, wired: Wire) -> None:
    await ask(
        server,
        max_tokens=3,
        temperature=0.5,
        top_p=0.9,
        top_k=20,
        stop_token_ids=[2],
        stop=None,
        seed=7,
        extra_body={"skip_special_tokens": False},
        messages=[{"role": "user", "content": "not for the sampler"}],
        tools=[],
        split="train",
    )
    body = generations(wired)[0].body
    sampling = body.get("sampling_params", body)
    expected = {"temperature": 0.5, "top_p": 0.9, "top_k": 20, "stop_token_ids": [2]}
    expected |= {"skip_special_tokens": False}
    assert expected.items() <= sampling.items()
    assert sampling.get("seed", sampling.get("sampling_seed")) == 7
    assert not sampling.keys() & {"stop", "messages", "tools", "split"}


async def test_the_base_url_may_be_given_without_v1(protocol: Any, wired: Wire) -> None:
    for path in ("", "/", "/v1", "/v1/"):
        assert (await ask(connect(protocol[0], wired, path=path), max_tokens=2))[0] == [5, 6, 7]


async def test_connections_are_pooled(server: TokenServer, wired: Wire) -> None:
    for _ in range(20):
        await ask(server, max_tokens=2)
    assert len({request.peer for request in wired.requests}) == 1


async def test_many_requests_at_once(server: TokenServer, wired: Wire) -> None:
    answers = await asyncio.gather(*(ask(server, [token], max_tokens=2) for token in range(150)))
    assert [prompt for prompt, *_ in answers] == [[token] for token in range(150)]
    assert len(generations(wired)) == 150
    assert len(wired.to("/v1/models")) <= 1


def test_a_server_outlives_event_loops_and_its_connections_do_not(server: TokenServer, wired: Wire) -> None:
    clients = []

    async def use() -> None:
        await asyncio.gather(*(ask(server, max_tokens=2) for _ in range(5)))
        clients.append((await server._here()).client)

    asyncio.run(use())
    asyncio.run(use())
    assert clients[0] is not clients[1]
    assert all(client.is_closed for client in clients)


async def test_a_closed_server_opens_again(server: TokenServer) -> None:
    await ask(server, max_tokens=2)
    await server.aclose()
    await server.aclose()
    assert (await ask(server, max_tokens=2))[0] == [5, 6, 7]


async def test_a_cancelled_call_hangs_up_so_that_the_server_stops_generating(server: TokenServer, wired: Wire) -> None:
    wired.faults = [wire.hanging]
    call = asyncio.create_task(ask(server, max_tokens=2))
    request = await wired.arrival()
    while request not in generations(wired):
        request = await wired.arrival()
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert await asyncio.to_thread(request.hung_up.wait, 30)
    assert (await ask(server, max_tokens=2))[0] == [5, 6, 7]


async def test_a_server_that_never_answers_is_left_after_its_timeout(protocol: Any, wired: Wire) -> None:
    server = connect(protocol[0], wired, timeout_s=0.3)
    wired.faults = [wire.hanging]
    with pytest.raises(BackendTimeoutError, match=r"did not answer within 0\.3 s") as failure:
        await ask(server, max_tokens=2)
    assert failure.value.url.startswith(wired.url)
    assert await asyncio.to_thread(generations(wired)[0].hung_up.wait, 30)


async def test_a_slow_answer_is_an_answer(server: TokenServer, wired: Wire) -> None:
    wired.faults = [wire.slow]
    _, outputs, logprobs, reasons = await ask(server, max_tokens=30)
    assert list(zip(outputs, logprobs, words(reasons), strict=True)) == generations(wired)[0].sampled


@pytest.mark.parametrize("fault", [wire.truncated, wire.dropped])
async def test_a_connection_that_breaks_is_a_connection_error(server: TokenServer, wired: Wire, fault: Any) -> None:
    wired.faults = [fault]
    with pytest.raises(BackendConnectionError, match="no answer from http") as failure:
        await ask(server, max_tokens=2)
    assert failure.value.status is None
    assert failure.value.__cause__ is not None


@pytest.mark.parametrize("body", ["<html>", "", "null", "[]", "{}", '{"choices": []}', '{"choices": [{}]}', "7"])
async def test_an_answer_of_another_shape_names_url_and_body(server: TokenServer, wired: Wire, body: str) -> None:
    wired.faults = [wire.text(body)]
    with pytest.raises(BackendResponseError, match="did not answer as its protocol says") as failure:
        await ask(server, max_tokens=2)
    assert failure.value.status == 200
    assert failure.value.body == body
    assert failure.value.url == wired.url + generations(wired)[0].path


@pytest.mark.parametrize("code", [400, 403, 422, 500, 502, 503])
async def test_an_http_error_keeps_status_and_body(server: TokenServer, wired: Wire, code: int) -> None:
    wired.faults = [wire.status(code, '{"error": "CUDA on fire"}')]
    with pytest.raises(BackendResponseError, match=f"answered {code}: .*CUDA on fire") as failure:
        await ask(server, max_tokens=2)
    assert (failure.value.status, failure.value.body) == (code, '{"error": "CUDA on fire"}')
    assert len(generations(wired)) == 1, "retries belong to the backend"


async def test_of_a_huge_error_only_the_start_is_kept(server: TokenServer, wired: Wire) -> None:
    wired.faults = [wire.status(500, "x" * 10**6)]
    with pytest.raises(BackendResponseError) as failure:
        await ask(server, max_tokens=2)
    assert len(str(failure.value)) < 1000
    assert len(failure.value.body) == 2000


async def test_a_busy_server_tells_how_long_to_wait(server: TokenServer, wired: Wire) -> None:
    wired.faults = [wire.status(429, "busy", Retry_After="3"), wire.status(429, "busy")]
    with pytest.raises(BackendResponseError) as failure:
        await ask(server, max_tokens=2)
    assert failure.value.retry_after == 3.0
    with pytest.raises(BackendResponseError) as failure:
        await ask(server, max_tokens=2)
    assert failure.value.retry_after is None


async def test_nobody_there(protocol: Any) -> None:
    with wire.nobody() as url:
        server = protocol[0](APIServerConfig(base_url=url, model_name=MODEL))
        with pytest.raises(BackendConnectionError, match="no answer from http") as failure:
            await ask(server, max_tokens=2)
        assert failure.value.url.startswith(url)
        assert not await server.is_healthy()


async def test_the_key_is_sent_and_a_refusal_is_told(protocol: Any) -> None:
    with protocol[1](api_key="the-key") as wired:
        assert len(await ask(connect(protocol[0], wired, api_key="the-key"), max_tokens=2)) == 4
        with pytest.raises(BackendResponseError, match="answered 401") as failure:
            await ask(connect(protocol[0], wired, api_key="another"), max_tokens=2)
        assert "the-key" not in str(failure.value)


async def test_no_proxy_of_the_environment_is_used(protocol: Any, wired: Wire, monkeypatch: pytest.MonkeyPatch) -> None:
    with wire.nobody() as url:
        monkeypatch.setenv("HTTP_PROXY", url)
        monkeypatch.setenv("ALL_PROXY", url)
        assert len(await ask(connect(protocol[0], wired), max_tokens=2)) == 4


async def test_health_is_what_the_server_says(server: TokenServer) -> None:
    assert await server.is_healthy()


def spoil_last_choice(answer: Any) -> None:
    """Take the last logprob away, wherever the protocol has it."""
    if isinstance(answer, dict) and "logprobs" in answer:
        answer["logprobs"][-1].pop()
    elif isinstance(answer, dict) and "meta_info" in answer:
        answer["meta_info"]["output_token_logprobs"].pop()
    else:
        told = answer["choices"][-1]["logprobs"]
        (told.get("content") or told["token_logprobs"]).pop()


@pytest.mark.parametrize("name", ["vllm", "vllm-generate"])
async def test_logprobs_that_do_not_fit_are_handed_on_as_they_are(name: str) -> None:
    cls, make = PROTOCOLS[name]
    with make() as wired:
        wired.faults = [wire.changed(spoil_last_choice)]
        _, [output], [logprobs], _ = await ask(connect(cls, wired), max_tokens=4)
        assert (len(output), len(logprobs)) == (4, 3)


async def test_atroposlibs_server_manager_takes_the_class(protocol: Any, wired: Wire) -> None:
    configs = [APIServerConfig(base_url=wired.url, model_name=MODEL, health_check=False, num_max_requests_at_once=4)]
    manager = ServerManager(configs, server_class=protocol[0])
    async with manager.managed_server(tokenizer=wired.tokenizer) as managed:
        completion = await managed.chat_completion(messages=[{"role": "user", "content": "Hello"}], max_tokens=5, n=2)
        nodes = managed.get_state()["nodes"]
    [request] = generations(wired)
    assert [node.tokens for node in nodes] == [prompt_of(request) + ids for ids, _, _ in request.sampled]
    assert [choice.finish_reason for choice in completion.choices] == ["length", "length"]


async def test_a_text_prompt_is_tokenized_by_the_configured_tokenizer(
    protocol: Any, wired: Wire, tmp_path: Any
) -> None:
    wired.tokenizer.save_pretrained(tmp_path)
    server = connect(protocol[0], wired, tokenizer_name=str(tmp_path))
    prompt, *_ = await server._tokens_and_logprobs_completion_wrapper(prompt="Use the terminal.", max_tokens=2)
    assert prompt == prompt_of(generations(wired)[0]) == wired.tokenizer.encode("Use the terminal.")


async def test_a_text_prompt_without_a_tokenizer_says_what_to_pass(server: TokenServer) -> None:
    with pytest.raises(NoTokenizerError, match="pass tokenizer="):
        await server._tokens_and_logprobs_completion_wrapper(prompt="Use the terminal.")


# One protocol each


async def test_vllm_hands_on_the_prompt_that_the_server_says_it_got() -> None:
    def truncate_echo(answer: dict[str, Any]) -> None:
        for choice in answer["choices"]:
            choice["prompt_token_ids"] = choice["prompt_token_ids"][1:]

    with VLLMWire() as wired:
        wired.faults = [wire.changed(truncate_echo)]
        assert (await ask(connect(StockVLLMServer, wired), [5, 6, 7], max_tokens=2))[0] == [6, 7]


async def test_a_vllm_without_token_ids_says_what_to_serve_with() -> None:
    with (
        VLLMWire(release="ancient") as wired,
        pytest.raises(BackendResponseError, match=r"returns no token ids: serve the model with vLLM 0\.10\.2"),
    ):
        await ask(connect(StockVLLMServer, wired), max_tokens=2)


async def test_a_vllm_that_hides_its_context_length_needs_max_tokens() -> None:
    with VLLMWire(context_length=None) as wired:
        server = connect(StockVLLMServer, wired)
        with pytest.raises(BackendResponseError, match="pass max_tokens"):
            await ask(server)
        assert len((await ask(server, max_tokens=2))[1][0]) == 2


async def test_a_wrong_model_is_told_in_the_servers_words() -> None:
    with VLLMWire() as wired, pytest.raises(BackendResponseError, match="The model `other` does not exist") as failure:
        await ask(connect(StockVLLMServer, wired, model_name="other"), max_tokens=2)
    assert failure.value.status == 404


async def test_sglang_keeps_its_prefix_cache_and_tells_its_weights() -> None:
    with SGLangWire(weight_version="step-12") as wired:
        *_, reasons = await ask(connect(StockSGLangServer, wired))
    assert "logprob_start_len" not in wired.requests[-1].body
    assert reasons == [{"type": "stop", "matched": wired.tokenizer.eos_token_id, "weights_version": "step-12"}]


async def test_an_aborted_sglang_request_keeps_what_was_sampled() -> None:
    def abort(answer: dict[str, Any]) -> None:
        answer["meta_info"]["finish_reason"] = {"type": "abort", "message": "weights are being updated"}

    with SGLangWire() as wired:
        wired.faults = [wire.changed(abort)]
        _, [output], [logprobs], [reason] = await ask(connect(StockSGLangServer, wired), max_tokens=4)
        assert [(output, logprobs, "length")] == wired.requests[-1].sampled
    assert reason["type"] == "abort"


# Through the tracked backend


def message(turn: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": turn.content, TURN_KEY: turn.ref}


def tracked(cls: type[Any], *wireds: Wire) -> TrackedBackend:
    configs = [APIServerConfig(base_url=one.url, model_name=MODEL, health_check=False) for one in wireds]
    return TrackedBackend(ServerManager(configs, server_class=cls), wireds[0].tokenizer)


async def test_the_ledger_knows_which_server_and_which_weights_answered() -> None:
    with SGLangWire(weight_version="step-12") as wired:
        backend = tracked(StockSGLangServer, wired)
        turn = await backend.sample([{"role": "user", "content": "Hello"}])
        metadata = backend.ledger.turn(turn.ref).metadata
    assert metadata["server_url"].startswith(wired.url)
    assert metadata["weights_version"] == "step-12"


async def test_the_tokens_of_a_rollout_are_those_on_the_wire(protocol: Any) -> None:
    with protocol[1]() as wired:
        backend = tracked(protocol[0], wired)
        messages: list[dict[str, Any]] = [{"role": "user", "content": "Hello"}]
        for step in range(3):
            turn = await backend.sample(messages, temperature=1.0)
            messages += [message(turn), {"role": "user", "content": f"Go on, {step}"}]
        first, second, third = generations(wired)
        assert prompt_of(second)[: len(prompt_of(first)) + len(first.sampled[0][0])] == [
            *prompt_of(first),
            *first.sampled[0][0],
        ]
        [sequence] = backend.ledger.sequences()
        assert sequence.tokens == prompt_of(third) + third.sampled[0][0]
        masks = atropos.masks(sequence)
        trained = [token for token in masks if token != -100]
        assert trained == [token for request in (first, second, third) for token in request.sampled[0][0]]
        logprobs = [value for value, mask in zip(atropos.logprobs(sequence), masks, strict=True) if mask != -100]
        assert logprobs == [value for request in (first, second, third) for value in request.sampled[0][1]]


@pytest.mark.parametrize("name", ["vllm", "vllm-generate"])
async def test_a_misaligned_answer_is_refused_and_kept_for_inspection(name: str) -> None:
    cls, make = PROTOCOLS[name]
    with make() as wired:
        backend = tracked(cls, wired)
        wired.faults = [wire.changed(spoil_last_choice)]
        with pytest.raises(TokenFidelityError):
            await backend.sample([{"role": "user", "content": "Hello"}])
        assert len(generations(wired)) == 1
    assert backend.ledger.sequences() == []
    assert backend.ledger.report().left_out


async def test_a_server_that_dies_is_replaced_and_the_tokens_go_on(protocol: Any) -> None:
    with protocol[1]() as survivor, protocol[1]() as mortal:
        backend = tracked(protocol[0], mortal, survivor)
        messages: list[dict[str, Any]] = [{"role": "user", "content": "Hello"}]
        turn = await backend.sample(messages)
        [first] = generations(mortal)
        mortal.faults = [wire.dropped] * 10
        turn = await backend.sample([*messages, message(turn), {"role": "user", "content": "Go on"}])
        [last] = generations(survivor)
        [sequence] = backend.ledger.sequences()
        assert sequence.tokens == prompt_of(last) + last.sampled[0][0]
        assert prompt_of(last)[: len(prompt_of(first))] == prompt_of(first)
        assert backend.ledger.turn(turn.ref).metadata["server_url"].startswith(survivor.url)


# Plain chat, of all of them


@pytest.mark.parametrize("cls", [OpenAIEndpoint, StockVLLMServer, StockSGLangServer, VLLMGenerateServer])
async def test_chat_goes_to_the_openai_endpoint(cls: type[OpenAIEndpoint]) -> None:
    with OpenAIWire(reply="Hi.") as wired:
        server = connect(cls, wired)
        completion = await server.chat_completion(
            messages=[{"role": "user", "content": "Hello"}], temperature=0.3, extra_body={"top_k": 5}
        )
    assert completion.choices[0].message.content == "Hi."
    assert completion.usage.completion_tokens == 7
    body = wired.requests[-1].body
    assert (body["model"], body["temperature"], body["top_k"]) == (MODEL, 0.3, 5)


async def test_a_plain_completion() -> None:
    with VLLMWire(reply="Hi.") as wired:
        completion = await connect(StockVLLMServer, wired).completion(prompt="Say hi", max_tokens=10)
    assert completion.choices[0].text == "Hi."


async def test_a_plain_endpoint_refuses_token_calls() -> None:
    with OpenAIWire() as wired, pytest.raises(UnsupportedServerError, match="no token ids"):
        await ask(connect(OpenAIEndpoint, wired))


@pytest.mark.parametrize("url", ["", None, "localhost:8000", "ftp://host/v1", "http://", "file:///etc/passwd"])
def test_a_base_url_that_is_none(url: Any) -> None:
    with pytest.raises(UnsupportedServerError, match="give its URL"):
        OpenAIEndpoint(APIServerConfig(base_url=url))


# The words of an error


@pytest.mark.parametrize(
    "body",
    [
        "This model's maximum context length is 4096 tokens. However, you requested 5000 tokens",
        "The decoder prompt (length 9000) is longer than the maximum model length of 4096.",
        "The input (9000 tokens) is longer than the model's context length (4096 tokens).",
        '{"error": {"code": "context_length_exceeded"}}',
    ],
)
def test_an_overlong_prompt_is_recognised_in_any_servers_words(body: str) -> None:
    assert isinstance(response_error("http://x", 400, body), ContextLengthError)
    assert isinstance(response_error("http://x", 500, body), BackendResponseError)


def test_retry_after_may_be_a_date() -> None:
    error: Any = response_error("http://x", 503, "", {"retry-after": email.utils.formatdate(time.time() + 100)})
    assert 90 < error.retry_after <= 100
    error = response_error("http://x", 503, "", {"retry-after": email.utils.formatdate(time.time() - 100)})
    assert error.retry_after == 0
    error = response_error("http://x", 503, "", {"retry-after": "soon"})
    assert error.retry_after is None


def test_every_failure_is_a_backend_error() -> None:
    assert issubclass(BackendTimeoutError, BackendError)
    assert issubclass(BackendConnectionError, BackendError)
