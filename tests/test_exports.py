"""What other trainers get is what was sampled, token by token, trained where it was sampled and nowhere else."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hermes_atropos import AtroposAgent, scored_group
from hermes_atropos.errors import ConfigurationError, UntrackedError
from hermes_atropos.exports import EXPORTS
from hermes_atropos.exports.atropos import MASK, PROMPT_LOGPROB
from hermes_atropos.exports.jsonl import jsonl_rows, write_jsonl
from hermes_atropos.exports.rows import row_of
from hermes_atropos.exports.trl import rollout_columns, rollout_func, rollout_score
from hermes_atropos.exports.verl import agent_loop_outputs
from hermes_atropos.testing import ScriptedServer, tool_call
from hermes_atropos.trajectory import AgentResult, SequenceData

OTHERS = ["trl", "verl", "jsonl"]
ONE_EACH = ["trl", "verl"]


def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


async def rollout() -> tuple[AgentResult, ScriptedServer]:
    """A call, its result and an answer, and the server that sampled them."""
    server = ScriptedServer([tool_call("add", a=2, b=3), "It is 5."])
    return await AtroposAgent(server, tools=[add]).run("What is 2 + 3?"), server


def branched(result: AgentResult) -> AgentResult:
    """The same rollout with a second sequence."""
    return replace(result, sequences=[*result.sequences, SequenceData("ab", [1, 2], [MASK, 2], [1.0, -0.5])])


@given(
    before=st.integers(0, 5),
    after=st.lists(st.tuples(st.integers(0, 99), st.booleans(), st.floats(-50, 0)), max_size=30),
)
def test_a_row_is_the_sequence_from_its_first_trained_token_on(before: int, after: list[Any]) -> None:
    tokens = [7] * before + [token for token, _, _ in after]
    masks = [MASK] * before + [token if trained else MASK for token, trained, _ in after]
    logprobs = [PROMPT_LOGPROB] * before + [value if trained else PROMPT_LOGPROB for _, trained, value in after]
    row = row_of(tokens, masks, logprobs)
    assert row.prompt_ids + row.completion_ids == tokens
    assert len(row.completion_ids) == len(row.mask) == len(row.logprobs)
    assert row.mask[:1] in ([], [1])
    whole = [0] * len(row.prompt_ids) + row.mask
    assert whole == [int(mask != MASK) for mask in masks]
    kept = [logprob for logprob, mask in zip(row.logprobs, row.mask, strict=True) if mask]
    assert kept == [logprob for logprob, mask in zip(logprobs, masks, strict=True) if mask != MASK]
    assert all(logprob == 0.0 for logprob, mask in zip(row.logprobs, row.mask, strict=True) if not mask)


class TestTRL:
    async def test_trains_what_the_server_sampled_and_nothing_that_a_tool_said(self) -> None:
        result, server = await rollout()
        columns = EXPORTS["trl"]([result], [0.5])
        [prompt], [completion], [mask] = columns["prompt_ids"], columns["completion_ids"], columns["env_mask"]
        first, last = server.requests
        assert prompt == first.prompt_ids
        assert prompt + completion == last.prompt_ids + last.output_ids[0]
        trained = [token for token, kept in zip(completion, mask, strict=True) if kept]
        assert trained == first.output_ids[0] + last.output_ids[0]
        logprobs = [value for value, kept in zip(columns["logprobs"][0], mask, strict=True) if kept]
        assert logprobs == first.logprobs[0] + last.logprobs[0]
        assert rollout_score(completions=["…"], **columns) == [0.5]

    def roll_out(self, collect: Any, prompts: list[Any], temperature: float = 1.0) -> Any:
        trainer = SimpleNamespace(args=SimpleNamespace(temperature=temperature))
        return rollout_func(collect)(prompts, trainer)

    def test_asks_for_the_completions_of_a_prompt_at_once_and_keeps_their_order(self) -> None:
        asked = []

        async def collect(prompt: str, count: int) -> Any:
            asked.append((prompt, count))
            await asyncio.sleep(0.01 if prompt == "first" else 0)  # the second is ready before
            results = [(await rollout())[0] for _ in range(count)]
            return scored_group(results, [len(prompt)] * count)

        columns = self.roll_out(collect, ["first"] * 2 + ["the second"] * 3)
        assert asked == [("first", 2), ("the second", 3)]
        assert columns["score"] == [5, 5, 10, 10, 10]
        assert {len(column) for column in columns.values()} == {5}

    @pytest.mark.parametrize(
        ("spoil", "temperature", "message"),
        [
            (lambda group: {**group, "tokens": group["tokens"][:1]}, 1.0, "wants 2 completions .* a group of 1"),
            (lambda group: [group, group], 1.0, "2 groups"),
            (lambda group: None, 1.0, "0 groups"),
            (lambda group: {**group, "advantages": [[0.0]]}, 1.0, "rewards of their own"),
            (lambda group: group, 0.7, "temperature"),
        ],
    )
    def test_refuses_what_trl_would_take_for_something_else(self, spoil: Any, temperature: float, message: str) -> None:
        async def collect(prompt: str, count: int) -> Any:
            results = [(await rollout())[0] for _ in range(count)]
            return spoil(scored_group(results, [1.0] * count))

        with pytest.raises(ConfigurationError, match=message):
            self.roll_out(collect, ["a", "a"], temperature)


async def test_verl_gets_a_response_with_what_the_tools_said_masked() -> None:
    result, _ = await rollout()
    [output] = agent_loop_outputs([result], [1])
    columns = rollout_columns(scored_group([result], [1]))
    names = {"prompt_ids": "prompt_ids", "completion_ids": "response_ids", "logprobs": "response_logprobs"}
    for column, name in {**names, "env_mask": "response_mask", "score": "reward_score"}.items():
        assert columns[column] == [output[name]]
    assert output["num_turns"] == 4, "a user, a call, its result, an answer"
    assert output["extra_fields"] == {"stop_reason": "completed"}


class TestJSONL:
    async def test_a_line_is_a_sequence(self, tmp_path: Path) -> None:
        result, _ = await rollout()
        rows = jsonl_rows([branched(result), result], [1.0, 0.0])
        write_jsonl(rows[:2], tmp_path / "new" / "rows.jsonl")
        write_jsonl(rows[2:], tmp_path / "new" / "rows.jsonl")
        lines = [json.loads(line) for line in (tmp_path / "new" / "rows.jsonl").read_text().splitlines()]
        assert lines == rows
        assert [(line["rollout"], line["reward"]) for line in lines] == [(0, 1.0), (0, 1.0), (1, 0.0)]
        for line, sequence in zip(lines, [*branched(result).sequences, *result.sequences], strict=True):
            assert line["input_ids"] == sequence.tokens
            assert line["loss_mask"] == [int(mask != MASK) for mask in sequence.masked_tokens]
            assert line["logprobs"] == [value if value <= 0 else 0.0 for value in sequence.logprobs]
            assert line["prompt_length"] == line["loss_mask"].index(1)

    async def test_rewards_of_steps_become_advantages_of_their_tokens(self) -> None:
        result, _ = await rollout()
        result.steps[0].reward = 2.0
        [row] = jsonl_rows([result], [1.0])
        assert row["advantages"] == result.to_scored_items(1.0)[0]["advantages"]
        assert {2.0, 1.0, 0.0} == set(row["advantages"])

    async def test_a_rollout_that_sampled_nothing_has_no_line(self) -> None:
        result, _ = await rollout()
        [row] = jsonl_rows([AgentResult(False, error="lost"), result], [0.0, 1.0])
        assert row["rollout"] == 1


class TestRefusals:
    @pytest.mark.parametrize("name", OTHERS)
    async def test_what_may_not_be_trained_on(self, name: str) -> None:
        result, _ = await rollout()
        for bad in (replace(result, tracked=False), replace(result, untrainable="spoilt"), AgentResult(False)):
            with pytest.raises(UntrackedError):
                EXPORTS[name]([bad], [1.0])
        with pytest.raises(UntrackedError, match="no rollouts"):
            EXPORTS[name]([], [])

    @pytest.mark.parametrize("name", OTHERS)
    async def test_scores_that_are_none(self, name: str) -> None:
        result, _ = await rollout()
        for scores in ([float("nan")], [], [1.0, 2.0]):
            with pytest.raises(ConfigurationError):
                EXPORTS[name]([result], scores)

    @pytest.mark.parametrize("name", ONE_EACH)
    async def test_a_rollout_of_several_sequences_for_a_trainer_that_takes_one(self, name: str) -> None:
        result, _ = await rollout()
        with pytest.raises(ConfigurationError, match="rollout 1 has 2 sequences"):
            EXPORTS[name]([result, branched(result)], [1.0, 0.0])
        with pytest.raises(ConfigurationError, match="rollout 1 has 0 sequences"):
            EXPORTS[name]([result, AgentResult(False)], [1.0, 0.0])

    @pytest.mark.parametrize("name", ONE_EACH)
    async def test_rewards_of_steps_for_a_trainer_that_takes_one(self, name: str) -> None:
        result, _ = await rollout()
        result.steps[0].reward = 2.0
        with pytest.raises(ConfigurationError, match="rewards of their own"):
            EXPORTS[name]([result], [1.0])
