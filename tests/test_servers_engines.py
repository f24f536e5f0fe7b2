"""What vLLM and SGLang do that surprises: lengths, defaults, parameters that are not theirs, refusals."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import wire
from atroposlib.envs.server_handling.server_manager import APIServerConfig, ServerManager
from test_servers import PROTOCOLS, ask, asks_for_vocabulary, connect, generations, tracked, words
from wire import MODEL, SGLangWire, VLLMWire

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
from hermes_atropos.servers.sampling import NEUTRAL

ENGINES = ["vllm", "vllm-generate", "sglang"]
USER = {"role": "user", "content": "Hello"}


# Lengths


@pytest.mark.parametrize("name", ENGINES)
async def test_a_rollout_at_the_default_settings_is_not_refused(name: str) -> None:
    cls, make = PROTOCOLS[name]
    with make() as wired:
        backend = tracked(cls, wired)
        turns = await asyncio.gather(*(backend.fresh().sample([USER]) for _ in range(32)))
    assert [turn.finish_reason for turn in turns] == ["stop"] * 32
    assert len(generations(wired)) == 32


async def test_atroposlibs_class_for_sglang_is_left_the_token_that_sglang_wants(tmp_path: Any) -> None:
    from atroposlib.envs.server_handling.sglang_server import SGLangServer

    from hermes_atropos.backends.tracked import TrackedBackend

    with SGLangWire(context_length=100) as wired:
        wired.tokenizer.save_pretrained(tmp_path)
        config = APIServerConfig(base_url=f"{wired.url}/v1", model_name=str(tmp_path), health_check=False)
        backend = TrackedBackend(
            ServerManager([config], server_class=SGLangServer), wired.tokenizer, context_length=100
        )
        assert (await backend.sample([USER])).finish_reason == "stop"


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("length", [4096, 4097, 5000])
async def test_a_prompt_that_fills_the_context_is_told_so_in_any_engines_words(name: str, length: int) -> None:
    cls, make = PROTOCOLS[name]
    with make() as wired:
        server = connect(cls, wired)
        server.context_length = 10**6  # it believes that there is room, and asks
        with pytest.raises(ContextLengthError, match=str(wired.url)) as refusal:
            await ask(server, [5] * length, max_tokens=3)
    assert refusal.value.status == 400


async def test_a_prompt_that_sglang_keeps_no_place_for_is_too_long() -> None:
    with SGLangWire() as wired, pytest.raises(ContextLengthError, match="maximum allowed length"):
        await ask(connect(StockSGLangServer, wired), [5] * 4093, max_tokens=2)


def test_more_tokens_than_any_prompt_would_leave_is_not_a_prompt_that_is_too_long() -> None:
    words = "max_tokens=9000 cannot be greater than max_model_len=8192. Please request fewer output tokens."
    body = f'{{"error": {{"message": "{words}", "type": "BadRequestError", "param": "max_tokens", "code": 400}}}}'
    assert type(response_error("http://x", 400, body)) is BackendResponseError


@pytest.mark.parametrize(
    "error",
    [
        '{"message": "No.", "type": "BadRequestError", "param": "input_tokens", "code": 400}',
        '{"message": "No.", "type": "invalid_request_error", "param": "messages", "code": "context_length_exceeded"}',
    ],
)
def test_a_code_or_a_parameter_says_it_without_words(error: str) -> None:
    assert type(response_error("http://x", 400, f'{{"error": {error}}}')) is ContextLengthError
    assert type(response_error("http://x", 500, f'{{"error": {error}}}')) is BackendResponseError


@pytest.mark.parametrize("name", ENGINES)
async def test_no_token_at_all_is_not_asked_for(name: str) -> None:
    cls, make = PROTOCOLS[name]
    with make() as wired, pytest.raises(SamplingError, match="max_tokens=0: give 1 or more"):
        await ask(connect(cls, wired), max_tokens=0)
    assert generations(wired) == []


# The distribution


@pytest.mark.parametrize("name", [*ENGINES, "atropos-vllm"])
async def test_the_checkpoints_defaults_change_nothing(name: str) -> None:
    cls, make = PROTOCOLS[name]
    defaults = {"temperature": 0.6, "top_k": 3, "top_p": 0.8, "min_p": 0.1, "repetition_penalty": 1.05}
    with make(generation_config=defaults) as wired:
        await ask(connect(cls, wired), max_tokens=2)
        await ask(connect(cls, wired), max_tokens=2, top_k=20, temperature=None)
    first, second = (request.drawn for request in generations(wired))
    assert {name: first[name] for name in NEUTRAL} == NEUTRAL
    assert {name: second[name] for name in NEUTRAL} == NEUTRAL | {"top_k": 20}


@pytest.mark.parametrize(
    ("given", "on_vllm", "on_sglang"),
    [
        ({"regex": "a+"}, {"regex": "a+"}, {"regex": "a+"}),
        ({"ebnf": "root ::= 'a'"}, {"grammar": "root ::= 'a'"}, {"ebnf": "root ::= 'a'"}),
        ({"json_schema": {"type": "object"}}, {"json": {"type": "object"}}, {"json_schema": '{"type": "object"}'}),
        ({"structured_outputs": {"json_object": True}}, {"json_object": True}, {"json_schema": '{"type": "object"}'}),
        ({"guided_decoding": {"regex": "b+", "json": None}}, {"regex": "b+"}, {"regex": "b+"}),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}},
            {"json": {"type": "object"}},
            {"json_schema": '{"type": "object"}'},
        ),
    ],
)
async def test_an_answers_form_is_asked_for_in_the_engines_own_words(given: Any, on_vllm: Any, on_sglang: Any) -> None:
    with VLLMWire(generate="offered") as wired:
        for cls in (StockVLLMServer, VLLMGenerateServer):
            await ask(connect(cls, wired), max_tokens=2, **given)
    for request in generations(wired):
        assert request.drawn["structured_outputs"] == on_vllm
        assert not request.body.keys() & {*given} - {"structured_outputs"}
    with SGLangWire() as wired:
        await ask(connect(StockSGLangServer, wired), max_tokens=2, extra_body=given)
    assert on_sglang.items() <= generations(wired)[0].drawn.items()


@pytest.mark.parametrize(
    ("name", "given", "why"),
    [
        ("vllm", {"custom_params": {}}, "StockVLLMServer does not know custom_params"),
        ("vllm", {"extra_body": {"stop_regex": "a"}}, "does not know stop_regex"),
        ("vllm-generate", {"beam_width": 3, "length_bonus": 1}, "does not know beam_width, length_bonus"),
        ("sglang", {"bad_words": ["no"]}, "StockSGLangServer does not know bad_words"),
        ("sglang", {"structured_outputs": {"choice": ["a"]}}, "SGLang has no structured output 'choice'"),
        ("sglang", {"regex": "a", "ebnf": "b"}, "an answer has one form"),
        ("atropos-vllm", {"regex": "a+"}, "AtroposVLLMServer does not know regex"),
    ],
)
async def test_what_an_engine_would_ignore_or_break_on_is_refused_before_the_call(
    name: str, given: Any, why: str
) -> None:
    cls, make = PROTOCOLS[name]
    with make() as wired, pytest.raises(SamplingError, match=why):
        await ask(connect(cls, wired), max_tokens=2, **given)
    assert generations(wired) == []


async def test_what_only_the_user_knows_of_a_server_reaches_it_in_extra_body() -> None:
    with VLLMWire() as wired:
        await ask(connect(StockVLLMServer, wired), max_tokens=2, extra_body={"cache_salt": "mine"})
        await tracked(StockVLLMServer, wired).sample([USER], extra_body={"cache_salt": "mine"})
    assert [request.body["cache_salt"] for request in generations(wired)] == ["mine", "mine"]


@pytest.mark.parametrize("name", ENGINES)
async def test_several_greedy_answers_are_asked_for_one_by_one(name: str) -> None:
    cls, make = PROTOCOLS[name]
    with make() as wired:
        answers = await tracked(cls, wired).sample_group([USER], n=3, temperature=0)
    assert len(answers) == 3
    assert len(generations(wired)) == 3


# Refusals


async def test_a_500_that_comes_twice_is_a_refusal() -> None:
    with (
        SGLangWire() as wired,
        pytest.raises(BackendResponseError, match="answered 500: Internal Server Error") as told,
    ):
        await tracked(StockSGLangServer, wired).sample([USER], extra_body={"beam_width": 3})
    assert told.value.attempts == 2
    assert len(generations(wired)) == 2


async def test_a_500_that_was_an_accident_is_forgotten() -> None:
    with VLLMWire() as wired:
        wired.faults = [wire.status(500, "CUDA out of memory")]
        assert (await tracked(StockVLLMServer, wired).sample([USER])).content == "Hello there."


async def test_a_refusal_that_sglang_tells_with_success_is_an_error() -> None:
    def refuse(answer: dict[str, Any]) -> None:
        words = "Input length (9 tokens) exceeds the maximum allowed length (8 tokens)."
        answer["meta_info"]["finish_reason"] = {"type": "abort", "message": words, "status_code": 400}

    with SGLangWire() as wired:
        wired.faults = [wire.changed(refuse)]
        with pytest.raises(ContextLengthError, match="maximum allowed length"):
            await ask(connect(StockSGLangServer, wired), max_tokens=2)


async def test_a_token_beyond_the_vocabulary_is_never_sent_to_sglang() -> None:
    with SGLangWire() as wired:
        server = connect(StockSGLangServer, wired)
        size = len(wired.tokenizer)
        with pytest.raises(
            ConfigurationError, match=rf"has the token {size}, .* has {size} tokens: .* pass the model's own"
        ):
            await ask(server, [5, size], max_tokens=2)
        await ask(server, [5, size - 1], max_tokens=2)
    assert not wired.dead
    assert sum(map(asks_for_vocabulary, wired.to("/generate"))) == 1


async def test_vllm_says_of_a_token_that_it_is_none() -> None:
    with VLLMWire() as wired, pytest.raises(BackendResponseError, match="out of vocabulary"):
        await ask(connect(StockVLLMServer, wired), [5, 10**6], max_tokens=2)


async def test_an_endpoint_that_is_disabled_says_how_to_enable_it() -> None:
    with VLLMWire(generate="forbidden") as wired, pytest.raises(BackendError, match="--enable-scale-out") as told:
        await ask(connect(VLLMGenerateServer, wired), max_tokens=2)
    assert told.value.status == 403


# What a server says of itself


async def test_health_is_asked_for_where_it_costs_no_generation() -> None:
    with SGLangWire() as wired:
        assert await connect(StockSGLangServer, wired).is_healthy()
    assert all(not request.sampled for request in wired.requests)


async def test_generates_echo_is_read() -> None:
    def other(answer: dict[str, Any]) -> None:
        answer["prompt_token_ids"] = [9, 9]

    with VLLMWire(generate="alone") as wired:
        wired.faults = [wire.changed(other)]
        assert (await ask(connect(VLLMGenerateServer, wired), [5, 6], max_tokens=2))[0] == [9, 9]


async def test_generate_may_have_no_lists_for_an_answer_that_was_aborted_before_its_first_token() -> None:
    def emptied(answer: dict[str, Any]) -> None:
        answer["choices"][0] |= {"token_ids": None, "logprobs": None, "weight_versions": None, "finish_reason": "abort"}

    with VLLMWire(generate="alone") as wired:
        wired.faults = [wire.changed(emptied)]
        answer = await ask(connect(VLLMGenerateServer, wired), [5, 6], max_tokens=2)
    assert answer == ([5, 6], [[]], [[]], [{"type": "abort"}])


@pytest.mark.parametrize("name", ENGINES)
async def test_one_short_answer_shows_what_the_logprobs_are_of(name: str) -> None:
    cls, make = PROTOCOLS[name]
    for kind in (False, True):
        with make(scaled=kind) as wired:
            server = connect(cls, wired)
            assert await asyncio.gather(*(server.scales_logprobs() for _ in range(5))) == [kind] * 5
            assert len(generations(wired)) == 1


async def test_logprobs_that_show_nothing_are_of_nobody_knows_what() -> None:
    def even(answer: dict[str, Any]) -> None:
        answer["choices"][0]["logprobs"]["token_logprobs"] = [-0.01] * 8

    with VLLMWire() as wired:
        for fault in (wire.changed(even), wire.status(400, "no")):
            wired.faults = [fault]
            assert await connect(StockVLLMServer, wired).scales_logprobs() is None


async def test_a_lora_adapter_has_its_models_tokenizer_and_context() -> None:
    with VLLMWire(adapters=("policy",)) as wired:
        found = await probe(wired.url, model="policy")
        assert (found.problem, found.model) == (None, "policy")
        assert (found.tokenizer_name, found.context_length) == (MODEL, 4096)
        server = connect(StockVLLMServer, wired, model_name="policy")
        assert words((await ask(server))[3]) == ["stop"]
        assert generations(wired)[-1].body["model"] == "policy"


async def test_sglang_tells_its_tokenizer_elsewhere_than_in_its_list() -> None:
    class Renamed(SGLangWire):
        def cards(self) -> list[dict[str, Any]]:
            return [{**super().cards()[0], "root": "policy"}]

    with Renamed() as wired:
        found = await probe(wired.url)
    assert found.tokenizer_name == MODEL
    assert found.server is not None
    assert found.server.config.tokenizer_name == MODEL


async def test_a_cold_server_is_waited_for() -> None:
    async def compiles(request: Any, answer: dict[str, Any]) -> Any:
        await asyncio.sleep(0.5)
        return wire.web.json_response(answer)

    with VLLMWire() as wired:
        wired.faults = [compiles]
        found = await probe(wired.url, timeout_s=0.4)
    assert found.problem is None
