"""A record that is written while the rollout runs: what was written stays, and reads as one rollout."""

from __future__ import annotations

import concurrent.futures
import itertools
import json
import logging
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hermes_atropos.errors import RecordError
from hermes_atropos.messages import TURN_KEY
from hermes_atropos.tokens import BreakCause, Ledger, Match, Prompt
from hermes_atropos.toolcalls import ToolCall
from hermes_atropos.trajectory import (
    AgentResult,
    AgentStep,
    Recording,
    StopReason,
    ToolResult,
    read_record,
    read_records,
    write_record,
)
from hermes_atropos.trajectory.changes import apply, difference

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=3), inner, max_size=5),
    max_leaves=20,
)


@given(old=VALUES, new=VALUES)
def test_a_change_makes_the_new_value_of_the_old(old: Any, new: Any) -> None:
    change = difference(old, new)
    assert (change is None) == (old == new and type(old) is type(new))
    if change is not None:
        assert apply(json.loads(json.dumps(old)), json.loads(json.dumps(change))) == new


@given(value=st.lists(VALUES, max_size=6), more=st.lists(VALUES, min_size=1, max_size=3))
def test_of_a_list_that_grew_only_what_is_new_is_kept(value: list[Any], more: list[Any]) -> None:
    assert difference(value, [*value, *more]) == ["+", more]


@pytest.mark.parametrize("change", [["?"], ["+", 1], [], ["{", {}], ["[", {"0": ["=", 1]}, []]])
def test_what_is_not_a_change_of_the_value_raises(change: list[Any]) -> None:
    with pytest.raises((ValueError, KeyError, IndexError, TypeError)):
        apply([], change)


class Growing:
    """A rollout of a ledger that grows by a turn and the answers to its call at a time."""

    def __init__(self) -> None:
        self.ledger = Ledger()
        self.steps: list[AgentStep] = []
        self.messages: list[dict[str, Any]] = [{"role": "user", "content": "Work."}]

    def turn(self, tokens: int = 40, *, rewritten: bool = False) -> AgentResult:
        parent = self.ledger.turns[-1] if self.ledger.turns else None
        cause = BreakCause.FIRST if parent is None else BreakCause.HISTORY_REWRITTEN if rewritten else None
        prompt: Prompt = self.ledger.prompt(Match(parent, [], [], cause, False, None, None), range(100, 100 + tokens))
        turn = self.ledger.record(prompt, range(tokens), [-0.5] * tokens, "stop")
        call = ToolCall(name="ls")
        self.messages += [
            {"role": "assistant", "content": None, "tool_calls": [call.to_openai()], TURN_KEY: turn.ref},
            {"role": "tool", "tool_call_id": call.id, "content": "a é \ud83d"},
        ]
        number = len(self.steps) + 1
        self.steps.append(AgentStep(number, "", [call], [ToolResult("ls", "a b", call_id=call.id)], turns=[turn.ref]))
        return self.result()

    def result(self, reason: StopReason = StopReason.INTERRUPTED) -> AgentResult:
        result = AgentResult(
            reason is StopReason.COMPLETED, steps=list(self.steps), messages=list(self.messages), stop_reason=reason
        )
        result.attach_tokens(self.ledger, lambda ids: "".join(map(chr, ids)))
        return result


def test_after_each_turn_the_file_reads_as_what_write_record_would_have_written(tmp_path: Path) -> None:
    growing, recording, whole = Growing(), Recording(tmp_path / "new" / "parts.jsonl"), tmp_path / "whole.jsonl"
    for number in range(6):
        result = growing.turn(rewritten=number == 3)
        recording.write(result)
        write_record(result, whole)
        assert read_record(recording.path) == read_record(whole)
    recording.write(growing.result(StopReason.COMPLETED))
    assert read_record(recording.path).stop_reason is StopReason.COMPLETED
    size = recording.path.stat().st_size
    recording.write(growing.result(StopReason.COMPLETED))
    assert recording.path.stat().st_size == size, "nothing new, nothing written"


def test_a_turn_costs_what_is_new(tmp_path: Path) -> None:
    growing, recording = Growing(), Recording(tmp_path / "parts.jsonl")
    sizes = [0]
    for _ in range(20):
        recording.write(growing.turn(200))
        sizes.append(recording.path.stat().st_size)
    costs = [after - before for before, after in itertools.pairwise(sizes)]
    assert max(costs[10:]) < 1.2 * min(costs[1:5]), costs


def test_several_rollouts_share_a_file_with_whole_records(tmp_path: Path) -> None:
    path = tmp_path / "shared.jsonl"
    one, two = Growing(), Growing()
    first, second = Recording(path), Recording(path)
    first.write(one.turn())
    second.write(two.turn())
    write_record(Growing().turn(), path, append=True)
    first.write(one.turn())
    assert [len(result.steps) for result in read_records(path)] == [1, 2, 1]


def test_many_write_to_one_file_at_once(tmp_path: Path) -> None:
    path = tmp_path / "shared.jsonl"

    def write(_: int) -> None:
        growing, recording = Growing(), Recording(path)
        for _ in range(20):
            recording.write(growing.turn(300))

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(8)))
    assert [len(result.steps) for result in read_records(path)] == [20] * 8
    assert b"\n\n" not in path.read_bytes()


def test_what_was_cut_off_costs_no_more_than_itself(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "parts.jsonl"
    killed, other = Growing(), Growing()
    recording = Recording(path)
    recording.write(killed.turn())
    kept = path.stat().st_size
    recording.write(killed.turn())
    with path.open("r+b") as file:
        file.truncate(kept + 40)
    with caplog.at_level(logging.WARNING):
        assert len(read_record(path).steps) == 1
    assert "line 2: the writer was cut off" in caplog.text
    Recording(path).write(other.turn())
    assert [len(result.steps) for result in read_records(path)] == [1, 1]


def test_a_part_that_is_missing_is_no_silent_gap(tmp_path: Path) -> None:
    growing, recording = Growing(), Recording(tmp_path / "parts.jsonl")
    for _ in range(3):
        recording.write(growing.turn())
    first, _, third = recording.path.read_bytes().splitlines(keepends=True)
    recording.path.write_bytes(first + third)
    with pytest.raises(RecordError, match=r"line 2: .*part 1 of it is missing"):
        read_record(recording.path)
