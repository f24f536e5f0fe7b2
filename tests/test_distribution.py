"""What an answer was sampled from, and whether its logprobs are of that: recorded, and trained only where they are."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_servers import PROTOCOLS, generations, tracked
from wire import SGLangWire, VLLMWire

from hermes_atropos import AgentConfig, AtroposAgent, read_record, write_record
from hermes_atropos.backends.tracked import TrackedBackend
from hermes_atropos.errors import UntrackedError
from hermes_atropos.servers import StockSGLangServer, StockVLLMServer
from hermes_atropos.servers.sampling import NEUTRAL, distribution, skew
from hermes_atropos.testing import ScriptedServer, chatml_tokenizer
from hermes_atropos.trajectory import AgentResult

USER = {"role": "user", "content": "Hello"}
SHAPING: list[dict[str, Any]] = [
    {"top_k": 3},
    {"top_p": 0.9},
    {"min_p": 0.05},
    {"repetition_penalty": 1.1},
    {"presence_penalty": 0.5},
    {"frequency_penalty": 0.5},
    {"logit_bias": {"5": 1.0}},
    {"bad_words": ["no"]},
    {"min_tokens": 5},
    {"structured_outputs": {"regex": "a+"}},
    {"temperature": 0},
]


async def rollout(server: Any, **sampling: Any) -> AgentResult:
    config = AgentConfig(sampling=sampling)
    return await AtroposAgent(server, config=config, tokenizer=chatml_tokenizer()).run("Hello")


def test_what_leaves_the_distribution_alone_is_no_part_of_it() -> None:
    harmless = {"max_tokens": 5, "stop": ["x"], "stop_token_ids": [2], "seed": 7, "n": 4, "ignore_eos": True}
    assert distribution({**NEUTRAL, **harmless, "logit_bias": {}, "min_tokens": 0, "top_k": 0}) == {}
    assert distribution({"extra_body": {"cache_salt": "x"}, "split": "eval"}) == {}


@pytest.mark.parametrize("given", SHAPING)
def test_what_shapes_the_distribution_is_told(given: dict[str, Any]) -> None:
    assert distribution(NEUTRAL | given) == given
    assert distribution(NEUTRAL | {"extra_body": given}) == given
    for scaled in (True, False, None):
        assert str(next(iter(given.values()))) in str(skew(given, scaled))


def test_what_nobody_knows_may_shape_it() -> None:
    assert distribution({"extra_body": {"dry_multiplier": 0.8}}) == {"dry_multiplier": 0.8}


@given(st.floats(0.01, 2).filter(lambda value: value != 1))
def test_a_temperature_is_no_skew_where_the_logprobs_are_those_after_it(temperature: float) -> None:
    shaping = distribution(NEUTRAL | {"temperature": temperature})
    assert skew(shaping, True) is None
    assert "those before it" in str(skew(shaping, False))
    assert "not known" in str(skew(shaping, None))
    assert skew({}, None) is None


@pytest.mark.parametrize("name", ["vllm", "vllm-generate", "sglang"])
@pytest.mark.parametrize("scaled", [False, True])
async def test_a_servers_logprobs_at_another_temperature_are_trained_only_if_they_are_those(
    name: str, scaled: bool
) -> None:
    cls, make = PROTOCOLS[name]
    with make(scaled=scaled) as wired:
        backend = tracked(cls, wired)
        await backend.sample([USER], temperature=0.7)
        await backend.fresh().sample([USER], temperature=0.7)
        assert len(generations(wired)) == 3, "it is found out once, by one call"
    [turn] = backend.ledger.turns
    assert turn.sampling == {"temperature": 0.7}
    assert (turn.skew is None) is scaled
    report = backend.ledger.report()
    assert report.tokens_trained == (report.tokens_sampled if scaled else 0)
    assert report.tokens_sampled == report.tokens_trained + report.tokens_discarded
    assert len(report.left_out) == (not scaled)


async def test_at_temperature_1_nothing_is_asked() -> None:
    with VLLMWire() as wired:
        await tracked(StockVLLMServer, wired).sample([USER])
        assert len(generations(wired)) == 1


@pytest.mark.parametrize("given", SHAPING)
async def test_a_skewed_answer_is_kept_and_is_trained_only_if_the_user_says_so(given: dict[str, Any]) -> None:
    name, value = next(iter(given.items()))
    server = ScriptedServer(["Hello.", "Hello."])
    untrained = await rollout(server, **given)
    trained = await rollout(server, **given, train_skewed=True)
    assert "train_skewed" not in server.requests[1].sampling
    assert trained.sampling["train_skewed"] is True
    for result in (untrained, trained):
        [sequence] = result.sequences
        [turn] = sequence.metadata["turns"]
        assert turn["sampling"] == {name: value}
        assert name in turn["skew"] or "greedily" in turn["skew"]
    assert untrained.sequences[0].tokens == trained.sequences[0].tokens
    assert (untrained.sequences[0].trainable_tokens, trained.sequences[0].trainable_tokens) == (
        0,
        len(server.requests[1].output_ids[0]),
    )
    assert trained.to_scored_data(1.0)["tokens"] == [trained.sequences[0].tokens]
    with pytest.raises(UntrackedError, match="give train_skewed=True"):
        untrained.to_scored_data(1.0)


async def test_a_record_says_what_was_sampled_from(tmp_path: Any) -> None:
    result = await rollout(ScriptedServer(["Hello."]), top_k=3)
    write_record(result, tmp_path / "rollout.jsonl")
    read = read_record(tmp_path / "rollout.jsonl")
    assert read.sequences == result.sequences
    assert read.sequences[0].metadata["turns"][0]["sampling"] == {"top_k": 3}
    assert read.fidelity == result.fidelity
    with pytest.raises(UntrackedError, match="top_k=3"):
        read.to_scored_data(1.0)


# Seeds


async def test_rollouts_of_one_seed_differ_and_come_again() -> None:
    async def seeds() -> list[int]:
        server = ScriptedServer(lambda _: "Hello.")
        agent = AtroposAgent(server, config=AgentConfig(sampling={"seed": 7}), tokenizer=chatml_tokenizer())
        for _ in range(8):
            async with agent.task() as task:
                result = await task.run("Hello")
                await task.run("And now?", conversation_history=result.messages)
        return [request.sampling["seed"] for request in server.requests]

    first, second = await seeds(), await seeds()
    assert first == second
    assert len(set(first)) == 16, "each call of each rollout has one of its own"
    assert all(0 <= seed < 2**31 for seed in first)


async def test_another_seed_is_another_draw() -> None:
    server = ScriptedServer(lambda _: "Hello.")
    for seed in (1, 2):
        await TrackedBackend(server, chatml_tokenizer()).sample([USER], seed=seed)
    first, second = (request.sampling["seed"] for request in server.requests)
    assert first != second


async def test_the_rest_of_an_aborted_answer_does_not_draw_the_same_numbers_again() -> None:
    for cls, make in ((StockVLLMServer, VLLMWire), (StockSGLangServer, SGLangWire)):
        with make(reply="I will look.") as wired:
            wired.aborts = [2]
            await tracked(cls, wired).sample([USER], seed=7)
            first, second = (request.drawn for request in generations(wired))
        name = "seed" if cls is StockVLLMServer else "sampling_seed"
        assert first[name] != second[name]


async def test_seeds_of_rollouts_at_once_are_their_own() -> None:
    server = ScriptedServer(lambda _: "Hello.", latency=0.01)
    agent = AtroposAgent(server, config=AgentConfig(sampling={"seed": 7}), tokenizer=chatml_tokenizer())
    await asyncio.gather(*(agent.run("Hello") for _ in range(16)))
    assert len({request.sampling["seed"] for request in server.requests}) == 16
