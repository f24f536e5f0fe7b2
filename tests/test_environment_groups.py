"""How rollouts are arranged in groups, and what the policies do to their sequences."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hermes_atropos.environment import HermesEnvConfig
from hermes_atropos.environment.groups import arranged, rows
from hermes_atropos.exports.atropos import MASK, PROMPT_LOGPROB
from hermes_atropos.react import AgentConfig, AtroposAgent
from hermes_atropos.testing import Reply, ScriptedServer, tool_call
from hermes_atropos.trajectory import AgentResult

Row = dict[str, Any]


@st.composite
def rollouts(draw: st.DrawFn) -> list[list[Row]]:
    """Some rollouts with some sequences each, of which no two sampled tokens are alike."""
    found = []
    token = 0
    for number in range(draw(st.integers(1, 4))):
        of_rollout = []
        for _ in range(draw(st.integers(1, 3))):
            trained = [False, *draw(st.lists(st.booleans(), min_size=12, max_size=20)), *[True] * 16]
            tokens = list(range(token, token + len(trained)))
            token += len(trained)
            of_rollout.append(row(tokens, trained, float(number)))
        found.append(of_rollout)
    return found


def row(tokens: list[int], trained: list[bool], score: float) -> Row:
    return {
        "tokens": tokens,
        "masks": [token if is_trained else MASK for token, is_trained in zip(tokens, trained, strict=True)],
        "inference_logprobs": [-0.5 if is_trained else PROMPT_LOGPROB for is_trained in trained],
        "advantages": None,
        "scores": score,
        "messages": [],
        "overrides": {},
    }


def trained_tokens(rows: list[Row]) -> Counter[int]:
    return Counter(mask for row in rows for mask in row["masks"] if mask != MASK)


def rows_of(groups: list[dict[str, Any]]) -> list[Row]:
    names = ("tokens", "masks", "inference_logprobs", "scores")
    return [
        dict(zip(names, of_row, strict=True))
        for group in groups
        for of_row in zip(*(group[name] for name in names), strict=True)
    ]


@given(rollouts(), st.integers(0, 4))
def test_every_group_has_its_size_and_every_sampled_token_is_trained_once(of_item: list[list[Row]], lost: int) -> None:
    """Also where rollouts are missing: the API holds back what has not the size that was registered."""
    size = len(of_item) + lost
    groups = arranged(of_item, size, {})
    given_rows = [row for of_rollout in of_item for row in of_rollout]
    assert [len(group["tokens"]) for group in groups] == [size] * max(map(len, of_item))
    assert trained_tokens(rows_of(groups)) == trained_tokens(given_rows)
    whole = {row["tokens"][0]: row for row in given_rows}
    for found in rows_of(groups):
        length = len(found["tokens"])
        source = whole[found["tokens"][0]]
        assert found["tokens"] == source["tokens"][:length], "what it reads is what was read"
        assert found["scores"] == source["scores"]
        assert len(found["masks"]) == len(found["inference_logprobs"]) == length
        assert any(mask != MASK for mask in found["masks"]), "a trainer divides by the tokens of a row"
        for mask, logprob in zip(found["masks"], found["inference_logprobs"], strict=True):
            assert (mask == MASK) == (logprob == PROMPT_LOGPROB)


@given(rollouts())
def test_whole_groups_give_every_rollout_the_same_number_of_rows(of_item: list[list[Row]]) -> None:
    """So that no rollout counts for more in the trainer's mean."""
    for group in arranged(of_item, len(of_item), {}):
        assert sorted(group["scores"]) == [float(number) for number in range(len(of_item))]


def test_what_cannot_be_divided_makes_a_smaller_group() -> None:
    one = [row([1, 2], [False, True], 0.0)]
    [group] = arranged([one], 2, {})
    assert len(group["tokens"]) == 1


FAULTY = "<tool_call>{</tool_call>"


def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


async def rollout(*replies: str | Reply) -> AgentResult:
    agent = AtroposAgent(ScriptedServer(list(replies)), tools=[add], config=AgentConfig(temperature=1.0))
    return await agent.run("What is 2 + 3?")


def config(**policies: Any) -> HermesEnvConfig:
    return HermesEnvConfig(tokenizer_name="none", **policies)


async def test_malformed_calls_are_kept_masked_or_penalised() -> None:
    result = await rollout(FAULTY, tool_call("add", a=2, b=3), "5")
    [kept] = rows(result, 1.0, config())
    [masked] = rows(result, 1.0, config(malformed_calls="mask"))
    [penalised] = rows(result, 1.0, config(malformed_calls="penalise", malformed_penalty=0.25))
    turns = result.sequences[0].metadata["turns"]
    first = range(turns[0]["start"], turns[0]["end"])
    assert len(first) > 3
    assert kept["tokens"] == masked["tokens"] == penalised["tokens"]
    for place in range(len(kept["tokens"])):
        if place in first:
            assert kept["masks"][place] == kept["tokens"][place]
            assert (masked["masks"][place], masked["inference_logprobs"][place]) == (MASK, PROMPT_LOGPROB)
            assert penalised["advantages"][place] == 0.75
        else:
            assert masked["masks"][place] == kept["masks"][place]
            assert penalised["advantages"][place] == (0.0 if kept["masks"][place] == MASK else 1.0)


async def test_a_rollout_of_nothing_but_malformed_calls_has_nothing_left_when_they_are_masked() -> None:
    result = await rollout(*[FAULTY] * 4)
    assert rows(result, 0.0, config(malformed_calls="mask")) == []


async def test_of_several_sequences_all_or_the_longest_are_trained() -> None:
    result = await rollout(tool_call("add", a=2, b=3), "5")
    other = await rollout("A quick word")
    result.sequences += other.sequences
    assert len(rows(result, 1.0, config())) == 2
    [longest] = rows(result, 1.0, config(extra_sequences="longest"))
    assert longest["tokens"] == result.sequences[0].tokens
    assigned = config()
    assigned.extra_sequences = "longest"
    assert rows(result, 1.0, assigned) == [longest]


async def test_sequences_of_mixed_weights_are_trained_masked_or_dropped() -> None:
    result = await rollout(tool_call("add", a=2, b=3), "5")
    [sequence] = result.sequences
    first, last = sequence.metadata["turns"]
    for turn, version in ((first, "old"), (last, "new")):
        turn["weights"] = [{"start": turn["start"], "end": turn["end"], "version": version}]
    assert sequence.mixed_weights
    [kept] = rows(result, 1.0, config())
    [masked] = rows(result, 1.0, config(mixed_weights="mask"))
    assert [place for place, mask in enumerate(masked["masks"]) if mask != MASK] == list(
        range(last["start"], last["end"])
    )
    assert kept["masks"][last["start"] :] == masked["masks"][last["start"] :]
    assert rows(result, 1.0, config(mixed_weights="drop")) == []


@pytest.mark.parametrize(
    "name", ["mixed_weights", "failed_rollouts", "malformed_calls", "extra_sequences", "discarded_attempts"]
)
def test_a_policy_that_does_not_exist_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        config(**{name: "perhaps"})
