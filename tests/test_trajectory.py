"""What a rollout leaves: aligned sequences, training data, and a record that reads back."""

from __future__ import annotations

import copy
import json
import math
import pickle
from types import SimpleNamespace
from typing import Any

import pytest
from atroposlib.api.server import ScoredData
from atroposlib.envs.server_handling.managed_server import SequenceNode
from hypothesis import given, settings
from hypothesis import strategies as st

from hermes_atropos.errors import ConfigurationError, RecordError, TokenFidelityError, UntrackedError
from hermes_atropos.exports import EXPORTS
from hermes_atropos.exports.atropos import ManagedState
from hermes_atropos.messages import TURN_KEY
from hermes_atropos.tokens import UNKNOWN, BreakCause, FidelityReport, Ledger, Turn
from hermes_atropos.toolcalls import ParseStatus, ToolCall
from hermes_atropos.trajectory import (
    AgentResult,
    AgentStep,
    SequenceData,
    StopReason,
    ToolResult,
    read_record,
    read_records,
    scored_group,
    write_record,
)


def sequence(*spans: tuple[str, int], first_token: int = 10) -> SequenceData:
    """A sequence of ("p", n) masked and ("t0", n) sampled spans, where "t0" is the turn's reference."""
    tokens: list[int] = []
    masks: list[int] = []
    logprobs: list[float] = []
    turns = []
    for name, length in spans:
        start = len(tokens)
        new = list(range(first_token + start, first_token + start + length))
        tokens += new
        if name == "p":
            masks += [-100] * length
            logprobs += [1.0] * length
        else:
            masks += new
            logprobs += [-0.25] * length
            turns.append({"ref": name, "start": start, "end": start + length})
    return SequenceData("text", tokens, masks, logprobs, {"turns": turns})


def rollout(**changes: Any) -> AgentResult:
    stream = sequence(("p", 3), ("t0", 2), ("p", 2), ("t1", 3))
    call = ToolCall(name="terminal", arguments={"command": "ls"})
    given: dict[str, Any] = {
        "success": True,
        "final_response": "Two files.",
        "steps": [
            AgentStep(1, "look", [call], [ToolResult("terminal", "a b", call_id=call.id)], stream, turns=["t0"]),
            AgentStep(2, "Two files.", sequence_data=stream, turns=["t1"]),
        ],
        "messages": [
            {"role": "user", "content": "How many?"},
            {"role": "assistant", "content": None, "tool_calls": [call.to_openai()], TURN_KEY: "t0"},
            {"role": "tool", "tool_call_id": call.id, "content": "a b"},
            {"role": "assistant", "content": "Two files.", TURN_KEY: "t1"},
        ],
        "sequences": [stream],
        "sampling": {"temperature": 0.7},
        "total_tokens": len(stream),
    }
    return AgentResult(**given | changes)


class TestSequenceData:
    def test_counts_what_was_sampled(self) -> None:
        assert sequence(("p", 3), ("t0", 2), ("p", 2), ("t1", 3)).trainable == 5

    def test_takes_an_atroposlib_node(self) -> None:
        node = SequenceNode(full_text="ab", tokens=[5, 6], masked_tokens=[-100, 6], logprobs=[1.0, -0.5])
        assert SequenceData.from_sequence_node(node) == SequenceData("ab", [5, 6], [-100, 6], [1.0, -0.5], {})

    def test_takes_whatever_looks_like_a_node(self) -> None:
        node = SimpleNamespace(full_text="a", tokens=(5,), masked_tokens=(5,), logprobs=(-1,), metadata={"k": 1})
        assert SequenceData.from_sequence_node(node) == SequenceData("a", [5], [5], [-1.0], {"k": 1})

    @pytest.mark.parametrize(
        ("tokens", "masks", "logprobs", "position"),
        [
            ([1, 2], [-100], [1.0, 1.0], None),
            ([1, 2], [-100, 2], [1.0], None),
            ([1, 2], [-100, 3], [1.0, -0.5], 1),  # another token than the one sampled
            ([1, 2], [-100, 2], [1.0, 1.0], 1),  # trainable, with the padding that atroposlib invents
            ([1, 2], [-100, -100], [1.0, -0.5], 1),  # a logprob where nothing was sampled
            ([1, 2], [1, 2], [-0.1, math.nan], 1),
            ([1, 2], [1, 2], [-math.inf, -0.1], 0),
            ([1, 2], [1, 2], [-0.1, None], 1),
            ([1, 2], [1, None], [-0.1, 1.0], 1),  # neither the token nor -100
            ([-1, 2], [-1, 2], [-0.1, -0.1], 0),
            ([-100, 2], [-100, 2], [1.0, -0.1], 0),
            ([True, 2], [True, 2], [-0.1, -0.1], 0),
            ([1, 2.0], [1, 2.0], [-0.1, -0.1], 1),
        ],
    )
    def test_refuses_what_is_not_aligned(
        self, tokens: list[Any], masks: list[Any], logprobs: list[Any], position: int | None
    ) -> None:
        with pytest.raises(TokenFidelityError) as caught:
            SequenceData("", tokens, masks, logprobs)
        assert caught.value.position == position

    def test_a_certain_token_has_logprob_zero(self) -> None:
        assert SequenceData("", [1], [1], [0.0]).trainable == 1

    def test_the_text_is_made_when_it_is_first_read(self) -> None:
        made = []

        def text(tokens: list[int]) -> str:
            made.append("ab")
            return "ab"

        ledger = Ledger()
        TestTokensOfALedger.ask(ledger, [{"role": "user", "content": "q"}], [5], [6])
        sequence = SequenceData.cut(ledger.sequences()[0], text)
        assert (len(sequence), sequence.trainable, made) == (2, 1, [])
        same = SequenceData("ab", [5, 6], [-100, 6], [1.0, -0.5], sequence.metadata)
        assert pickle.loads(pickle.dumps(sequence)) == copy.deepcopy(sequence) == sequence == same
        assert (repr(sequence), made) == (repr(same), ["ab"])


class TestResult:
    def test_counts(self) -> None:
        result = rollout()
        assert (result.num_steps, result.total_tool_calls, result.tool_errors) == (2, 1, 0)
        assert [step.has_tool_calls for step in result.steps] == [True, False]

    def test_its_trajectory_is_that_of_the_last_step(self) -> None:
        main, side = sequence(("p", 1), ("t0", 1)), sequence(("p", 1), ("t9", 1))
        result = AgentResult(True, steps=[AgentStep(1, "x", sequence_data=main)], sequences=[main, side])
        assert result.trajectory_data is main
        assert AgentResult(True, sequences=[main, side]).trajectory_data is side
        assert AgentResult(False).trajectory_data is None

    def test_parse_status_and_tool_errors_are_counted_a_step(self) -> None:
        bad = ToolCall(name="", status=ParseStatus.INVALID_JSON, error="no JSON", raw="<tool_call>{</tool_call>")
        step = AgentStep(1, "x", [ToolCall(name="a"), bad], [ToolResult("a", "boom", success=False)])
        assert (step.malformed_calls, step.tool_errors) == (1, 1)

    def test_a_command_that_fails_is_no_tool_error(self) -> None:
        assert AgentStep(1, "x", tool_results=[ToolResult("terminal", "", exit_code=1)]).tool_errors == 0

    def test_messages_leave_without_our_keys(self) -> None:
        result = rollout()
        assert [message["role"] for message in result.to_messages()] == ["user", "assistant", "tool", "assistant"]
        assert all(TURN_KEY not in message for message in result.to_messages())
        assert result.messages[1][TURN_KEY] == "t0", "the result itself keeps them"


class TestTokensOfALedger:
    @staticmethod
    def ask(ledger: Ledger, messages: list[dict[str, Any]], prompt_ids: list[int], output_ids: list[int]) -> Turn:
        prompt = ledger.prompt(ledger.locate(messages), prompt_ids)
        return ledger.record(prompt, output_ids, [-0.5] * len(output_ids), finish_reason="stop")

    def test_each_step_finds_the_sequence_of_its_tokens(self) -> None:
        ledger = Ledger()
        question = {"role": "user", "content": "q"}
        first = self.ask(ledger, [question], [1, 2], [3, 4])
        history = [question, {"role": "assistant", "content": "a", TURN_KEY: first.ref}, question]
        second = self.ask(ledger, history, [5], [6, 7])
        elsewhere = self.ask(ledger, [{"role": "user", "content": "another"}], [9], [8])
        steps = [AgentStep(n, "", turns=[turn.ref]) for n, turn in enumerate([first, second, elsewhere], start=1)]
        result = AgentResult(True, steps=steps)
        result.attach_tokens(ledger, str)
        assert [sequence.tokens for sequence in result.sequences] == [[1, 2, 3, 4, 5, 6, 7], [9, 8]]
        assert result.sequences[0].masked_tokens == [-100, -100, 3, 4, -100, 6, 7]
        assert result.sequences[0].full_text == "[1, 2, 3, 4, 5, 6, 7]"
        assert [step.sequence_data for step in steps] == [result.sequences[0], result.sequences[0], result.sequences[1]]
        assert result.fidelity == ledger.report()
        assert (result.total_tokens, result.untrainable) == (9, None)
        steps[1].reward = 2.0
        assert result.to_scored_data(1.0)["advantages"] == [[0, 0, 1, 1, 0, 2, 2], [0, 1]]

    def test_discarded_attempts_are_kept_apart(self) -> None:
        ledger = Ledger()
        question = {"role": "user", "content": "q"}
        thrown = self.ask(ledger, [question], [1, 2], [3])
        kept = self.ask(ledger, [question], [1, 2], [4])
        ledger.discard(thrown.ref, "resampled")
        result = AgentResult(True, steps=[AgentStep(1, "", turns=[thrown.ref, kept.ref])])
        result.attach_tokens(ledger, str)
        assert result.to_scored_data(1.0)["tokens"] == [[1, 2, 4]]
        assert sorted(result.to_scored_data(1.0, include_discarded=True)["tokens"]) == [[1, 2, 3], [1, 2, 4]]
        assert result.all_sequences[0].metadata["turns"][0]["discarded"] == "resampled"

    def test_what_the_ledger_records_later_does_not_change_it(self) -> None:
        ledger = Ledger()
        question = {"role": "user", "content": "q"}
        first = self.ask(ledger, [question], [1, 2], [3])
        result = AgentResult(True, steps=[AgentStep(1, "", turns=[first.ref])])
        result.attach_tokens(ledger, str)
        ledger.discard(first.ref, "resampled")
        self.ask(ledger, [question], [1, 2], [4])
        [sequence] = copy.deepcopy(result).sequences
        assert (sequence.tokens, sequence.masked_tokens) == ([1, 2, 3], [-100, -100, 3])
        assert sequence.metadata["turns"][0]["discarded"] is None
        assert pickle.loads(pickle.dumps(result)) == result
        assert result.steps[0].sequence_data is result.sequences[0]

    def test_the_nodes_of_its_managed_state_are_made_when_they_are_read(self) -> None:
        ledger = Ledger()
        self.ask(ledger, [{"role": "user", "content": "q"}], [1, 2], [3])
        read = []
        sequence = SequenceData.cut(ledger.sequences()[0], lambda ids: read.append(ids) or str(ids))
        state = ManagedState([sequence])
        assert (list(state), read) == (["nodes"], [])
        [node] = state["nodes"]
        assert state["nodes"][0] is node
        assert SequenceData.from_sequence_node(node) == sequence
        node.tokens.clear()
        assert sequence.tokens == [1, 2, 3]

    def test_after_a_violation_nothing_is_trained(self) -> None:
        ledger = Ledger()
        with pytest.raises(TokenFidelityError):
            ledger.record(ledger.prompt(ledger.locate([{"role": "user", "content": "q"}]), [1]), [2, 3], [-0.5])
        result = AgentResult(False)
        result.attach_tokens(ledger, str)
        with pytest.raises(UntrackedError, match="must not be trained on"):
            result.to_scored_data(0.0)


class TestScoredData:
    def test_one_rollout(self) -> None:
        result = rollout()
        data = result.to_scored_data(0.5)
        stream = result.sequences[0]
        assert data["tokens"] == [stream.tokens]
        assert data["masks"] == [stream.masked_tokens]
        assert data["inference_logprobs"] == [stream.logprobs]
        assert data["scores"] == [0.5]
        assert data["advantages"] is None
        assert data["generation_params"] == {"temperature": 0.7}
        assert data["group_overrides"] == {"group_size": 1}
        assert data["overrides"] == [{"temperature": 0.7}]

    def test_the_trainer_is_told_which_weights_sampled_what(self) -> None:
        result = rollout()
        [turn, *others] = result.sequences[0].metadata["turns"]
        for other in others:
            other["weights"] = []
        start, end = turn["start"], turn["end"]
        known = {"start": start, "end": end - 1, "version": "7"}
        turn["weights"] = [known, {"start": end - 1, "end": end, "version": UNKNOWN}]
        assert result.to_scored_data(0.5)["overrides"] == [{"temperature": 0.7, "weights": [known]}]

    @pytest.mark.parametrize("reward", [math.nan, math.inf, "1"])
    def test_a_reward_is_a_finite_number(self, reward: Any) -> None:
        result = rollout()
        result.steps[0].reward = reward
        with pytest.raises(ConfigurationError, match="step 1 has the reward"):
            result.to_scored_data(1.0)

    def test_the_atropos_api_takes_it(self) -> None:
        received = ScoredData.model_validate_json(json.dumps(rollout().to_scored_data(1.0)))
        assert received.inference_logprobs == [rollout().sequences[0].logprobs]
        assert received.messages is not None
        assert len(received.messages) == 1

    def test_every_sequence_of_a_rewritten_rollout_is_exported(self) -> None:
        first, second = sequence(("p", 3), ("t0", 2)), sequence(("p", 5), ("t1", 4))
        data = rollout(sequences=[first, second]).to_scored_data(1)
        assert data["tokens"] == [first.tokens, second.tokens]
        assert data["scores"] == [1.0, 1.0]
        assert data["group_overrides"] == {"group_size": 2}
        assert len(data["messages"]) == len(data["overrides"]) == 2

    def test_discarded_attempts_only_when_asked_for(self) -> None:
        kept, thrown = sequence(("p", 3), ("t1", 2)), sequence(("p", 3), ("t0", 4))
        result = rollout(sequences=[kept], all_sequences=[kept, thrown])
        assert result.to_scored_data(1)["tokens"] == [kept.tokens]
        assert result.to_scored_data(1, include_discarded=True)["tokens"] == [kept.tokens, thrown.tokens]
        nothing_thrown = rollout()
        assert nothing_thrown.to_scored_data(1, include_discarded=True) == nothing_thrown.to_scored_data(1)

    def test_rewards_of_steps_become_advantages_of_their_tokens(self) -> None:
        result = rollout()
        result.steps[0].reward = -1.0
        data = result.to_scored_data(0.5)
        #                             prompt         t0          between     t1, by the rollout's score
        assert data["advantages"] == [[0.0, 0.0, 0.0, -1.0, -1.0, 0.0, 0.0, 0.5, 0.5, 0.5]]

    def test_a_group_of_rollouts(self) -> None:
        plain, judged = rollout(), rollout()
        judged.steps[1].reward = 2.0
        data = scored_group([plain, judged], [0.0, 1.0])
        assert EXPORTS["atropos"]([plain, judged], [0.0, 1.0]) == data
        assert data["scores"] == [0.0, 1.0]
        assert [len(row) for row in data["advantages"]] == [len(row) for row in data["tokens"]]
        assert set(data["advantages"][0]) == {0.0}
        assert data["advantages"][1][-3:] == [2.0] * 3

    def test_a_rollout_that_sampled_nothing_leaves_its_group(self) -> None:
        failed = AgentResult(False, error="connection refused", stop_reason=StopReason.SERVER_ERROR)
        assert failed.to_scored_items(0.0) == []
        assert scored_group([rollout(), failed], [1.0, 0.0])["group_overrides"] == {"group_size": 1}
        with pytest.raises(UntrackedError, match="connection refused"):
            failed.to_scored_data(0.0)

    def test_without_token_ids_there_is_no_training_data(self) -> None:
        result = rollout(tracked=False, sequences=[])
        with pytest.raises(UntrackedError, match="without token ids"):
            result.to_scored_data(1.0)
        assert result.to_messages()[-1]["content"] == "Two files."

    def test_a_violation_is_kept_for_inspection_only(self) -> None:
        result = rollout(untrainable="turn 3 came back with 4 logprobs for 5 tokens")
        with pytest.raises(UntrackedError, match="turn 3 came back"):
            result.to_scored_data(1.0)

    @pytest.mark.parametrize("score", [math.nan, math.inf])
    def test_a_score_is_a_number(self, score: float) -> None:
        with pytest.raises(ConfigurationError, match="finite"):
            rollout().to_scored_data(score)

    def test_a_score_for_each_rollout(self) -> None:
        with pytest.raises(ConfigurationError, match="2 rollouts need as many scores, not 1"):
            scored_group([rollout(), rollout()], [1.0])


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=True) | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters()), inner, max_size=3),
    max_leaves=6,
)


class TestRecord:
    def test_reads_back_into_the_same_objects(self, tmp_path: Any) -> None:
        report = FidelityReport(turns=2, sequences=1, breaks={BreakCause.TEMPLATE: 1}, left_out=["turn 1"])
        result = rollout(fidelity=report, stop_reason=StopReason.ITERATION_LIMIT)
        result.steps[0].reward = 0.1
        write_record(result, tmp_path / "runs" / "one.jsonl")
        back = read_record(tmp_path / "runs" / "one.jsonl")
        assert back.packages["atroposlib"]
        assert back.stop_reason is StopReason.ITERATION_LIMIT
        assert isinstance(back.steps[0].tool_calls[0], ToolCall)
        assert back.steps[0].sequence_data is back.sequences[0], "shared, as it was"
        back.packages = {}
        assert back == result

    @settings(max_examples=150, deadline=None)
    @given(
        text=st.text(st.characters() | st.sampled_from("\ud83d\ude00\u2028\r\n")),
        extra=st.dictionaries(st.text(), JSON, max_size=3),
        logprobs=st.lists(st.floats(max_value=0.0, allow_infinity=False), min_size=1, max_size=20),
        said=st.lists(st.text() | st.binary(min_size=1), min_size=20, max_size=20),
    )
    def test_written_read_and_written_again_is_the_same_bytes(
        self,
        tmp_path_factory: Any,
        text: str,
        extra: dict[str, Any],
        logprobs: list[float],
        said: list[str | bytes],
    ) -> None:
        folder = tmp_path_factory.mktemp("record")
        stream = SequenceData(text, list(range(len(logprobs))), list(range(len(logprobs))), logprobs)
        result = AgentResult(
            True,
            text,
            [AgentStep(1, text, [ToolCall(name="f", arguments=extra)], sequence_data=stream)],
            metadata=extra,
            messages=[{"role": "user", "content": text}],
            sequences=[stream],
            vocabulary=dict(enumerate(said)),
        )
        write_record(result, folder / "a.jsonl")
        back = read_record(folder / "a.jsonl")
        write_record(back, folder / "b.jsonl")
        assert (folder / "a.jsonl").read_bytes() == (folder / "b.jsonl").read_bytes()
        assert (folder / "a.jsonl").read_bytes().count(b"\n") == 1
        assert back.sequences[0].logprobs == logprobs
        assert back.vocabulary == result.vocabulary

    def test_what_json_cannot_hold_is_written_as_text(self, tmp_path: Any) -> None:
        import numpy

        odd = {"path": tmp_path, "loss": math.nan, "kinds": {"b", "a"}, "mean": numpy.float32(0.5), 7: (1, 2)}
        write_record(rollout(metadata=odd), tmp_path / "r.jsonl")
        kept = {"path": str(tmp_path), "loss": "nan", "kinds": ["a", "b"], "mean": 0.5, "7": [1, 2]}
        assert read_record(tmp_path / "r.jsonl").metadata == kept

    def test_a_step_with_a_sequence_of_its_own_keeps_it(self, tmp_path: Any) -> None:
        own = sequence(("p", 1), ("t0", 2))
        write_record(AgentResult(True, steps=[AgentStep(1, "x", sequence_data=own)]), tmp_path / "r.jsonl")
        assert read_record(tmp_path / "r.jsonl").trajectory_data == own

    def test_several_in_a_file(self, tmp_path: Any) -> None:
        for number in range(3):
            write_record(rollout(metadata={"n": number}), tmp_path / "r.jsonl", append=True)
        assert [result.metadata["n"] for result in read_records(tmp_path / "r.jsonl")] == [0, 1, 2]
        with pytest.raises(RecordError, match="read_records"):
            read_record(tmp_path / "r.jsonl")

    def test_bad_records_say_what_to_do(self, tmp_path: Any) -> None:
        path = tmp_path / "r.jsonl"
        write_record(rollout(), path)
        whole = path.read_bytes()

        def error_of(content: bytes) -> str:
            path.write_bytes(content)
            with pytest.raises(RecordError) as caught:
                read_record(path)
            return str(caught.value)

        assert "truncated" in error_of(whole[:-20])
        assert "truncated" in error_of(whole[:-1])
        assert "not JSON" in error_of(whole[:-20] + b"\n")
        assert "is empty" in error_of(b"")
        assert "not a record of a rollout" in error_of(b'{"messages": []}\n')
        assert "not a record of a rollout" in error_of(b"[1]\n")
        newer = json.loads(whole) | {"version": 99}
        assert "version 99" in error_of(json.dumps(newer).encode() + b"\n")
        damaged = json.loads(whole)
        damaged["rollout"]["sequences"][0]["logprobs"].pop()
        assert "damaged" in error_of(json.dumps(damaged).encode() + b"\n")
        del damaged["rollout"]["sequences"]
        assert "damaged" in error_of(json.dumps(damaged).encode() + b"\n")
        assert "damaged" in error_of(b"[" * 100_000 + b"\n")
        assert "version 99" in error_of(json.dumps(newer | {"rollout": None}).encode() + b"\n")
        for name, value in {"messages": "text", "steps": None, "rollout": []}.items():
            damaged = json.loads(whole)
            (damaged if name == "rollout" else damaged["rollout"])[name] = value
            assert "damaged" in error_of(json.dumps(damaged).encode() + b"\n")
        for metadata in (None, {"turns": 5}, {"turns": [{"ref": "r", "start": 0, "end": 10**6}]}):
            damaged = json.loads(whole)
            damaged["rollout"]["sequences"][0]["metadata"] = metadata
            assert "damaged" in error_of(json.dumps(damaged).encode() + b"\n")
        damaged = json.loads(whole)
        damaged["rollout"]["steps"][0]["sequence_data"] = -1
        assert "damaged" in error_of(json.dumps(damaged).encode() + b"\n")
        for vocabulary in ([], {"1": "a"}, {"1": None}, {"1": 7}, {"1": [256]}, {"one": "a"}):
            damaged = json.loads(whole)
            damaged["rollout"]["vocabulary"] = vocabulary
            assert "damaged" in error_of(json.dumps(damaged).encode() + b"\n")
        with pytest.raises(RecordError, match="cannot be read"):
            read_record(tmp_path / "absent.jsonl")
