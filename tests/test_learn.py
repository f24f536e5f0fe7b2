"""``examples/learn``, as far as it needs no PyTorch: batches, processes, the run's folder, the verdict."""

from __future__ import annotations

import itertools
import os
import signal
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hermes_atropos import AgentConfig, AtroposAgent
from hermes_atropos.errors import TokenFidelityError
from hermes_atropos.exports.atropos import scored_group
from hermes_atropos.testing import ScriptedServer, tool_call

sys.path.append(str(Path(__file__).parents[1] / "examples" / "learn"))

import batches
import engines
import page
import processes
import run


def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


def adds(messages: list[dict[str, str]]) -> str:
    said = messages[-1]["content"]
    return "It is 5." if "tool_response" in said else tool_call("add", a=2, b=3)


async def group(scores: list[float]) -> tuple[dict[str, Any], ScriptedServer]:
    """Rollouts of one item as the environment sends them, and the server that sampled them."""
    server = ScriptedServer(adds)
    agent = AtroposAgent(server, tools=[add], config=AgentConfig(temperature=1.0))
    results = [await agent.run("What is 2 + 3?") for _ in scores]
    return scored_group(results, scores), server


class TestBatches:
    async def test_what_was_sampled_is_trained_with_the_logprobs_that_were_recorded(self) -> None:
        data, server = await group([0.0, 1.0])
        read = batches.read(data)
        sampled = [list(zip(record.output_ids[0], record.logprobs[0], strict=True)) for record in server.requests]
        for row, first, second in zip(read.rows, sampled[::2], sampled[1::2], strict=True):
            trained = [(row.tokens[place], value) for place, value in zip(row.places, row.recorded, strict=True)]
            assert trained == first + second

    async def test_advantages_are_scores_in_standard_deviations_from_their_mean(self) -> None:
        data, _ = await group([0.0, 1.0, 1.0, 0.0])
        read = batches.read(data)
        assert [set(row.advantages) for row in read.rows] == [{-1.0}, {1.0}, {1.0}, {-1.0}]
        assert read.teaches

    async def test_a_group_without_spread_teaches_nothing(self) -> None:
        data, _ = await group([1.0, 1.0])
        assert not batches.read(data).teaches

    async def test_a_token_with_an_advantage_of_its_own_keeps_it(self) -> None:
        data, _ = await group([0.0, 1.0])
        data["advantages"] = [[3.0] * len(tokens) for tokens in data["tokens"]]
        assert set(batches.read(data).rows[0].advantages) == {5.0}

    async def test_the_weights_of_each_token_are_known_where_the_server_told_them(self) -> None:
        data, _ = await group([0.0, 1.0])
        first = batches.read(data).rows[0].places[0]
        data["overrides"][0]["weights"] = [{"start": first, "end": first + 2, "version": "7"}]
        told, untold = batches.read(data).rows
        assert told.versions[:3] == ["7", "7", None]
        assert set(untold.versions) == {None}

    async def test_a_shifted_mask_is_refused(self) -> None:
        data, _ = await group([0.0, 1.0])
        data["masks"][0] = [-100, *data["masks"][0][:-1]]
        with pytest.raises(TokenFidelityError):
            batches.read(data)

    async def test_groups_are_told_apart_by_their_tokens(self) -> None:
        data, _ = await group([0.0, 1.0])
        data["group_overrides"] = {"group_id": "item-1"}
        other = {**data, "tokens": [[5, *tokens[1:]] for tokens in data["tokens"]]}
        first, same, second = batches.read(data), batches.read(data), batches.read(other)
        assert (first.key, first.item) == (same.key, "item-1")
        assert first.item == second.item
        assert first.key != second.key

    @given(st.lists(st.integers(1, 9), max_size=12), st.integers(1, 5))
    def test_each_row_is_in_one_chunk_with_those_of_like_length(self, lengths: list[int], size: int) -> None:
        rows = [batches.Row([0] * length, [], [], [], [], 1.0) for length in lengths]
        chunks = list(batches.chunks(rows, size))
        assert [len(row.tokens) for chunk in chunks for row in chunk] == sorted(lengths)
        assert all(len(chunk) == size for chunk in chunks[:-1])

    @given(st.lists(st.lists(st.integers(0, 2), min_size=2, max_size=8), min_size=1, max_size=5), st.data())
    def test_the_shared_start_is_the_same_in_all_rows_and_ahead_of_what_is_trained(
        self, tokens: list[list[int]], data: st.DataObject
    ) -> None:
        firsts = [data.draw(st.integers(1, len(own) - 1)) for own in tokens]
        rows = [
            batches.Row(own, [first], [-1.0], [None], [0.0], 1.0) for own, first in zip(tokens, firsts, strict=True)
        ]
        length = batches.shared(rows)
        assert len({tuple(own[:length]) for own in tokens}) == 1
        assert all(length < first for first in firsts)
        longer = {tuple(own[: length + 1]) for own in tokens}
        assert len(longer) > 1 or length + 1 in firsts


def until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


class TestProcesses:
    @pytest.fixture
    def start(self, tmp_path: Path) -> Any:
        begun = []

        def start(code: str, last: tuple[int, ...] = ()) -> processes.Process:
            process = processes.Process(
                "child", lambda: [sys.executable, "-c", code], tmp_path / "log", {"ROLE": "child"}, last
            )
            begun.append(process)
            process.watch()
            return process

        yield start
        for process in begun:
            process.end()

    def test_one_that_is_killed_is_started_again(self, start: Any) -> None:
        process = start("import time; time.sleep(600)")
        first = process.pid
        os.kill(first, signal.SIGKILL)
        until(lambda: process.watch() is None and process.pid not in (None, first))

    def test_ended_it_leaves_nothing_of_what_it_had_started(self, start: Any, tmp_path: Path) -> None:
        process = start(
            "import subprocess, sys, time\n"
            "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
            "print(child.pid, flush=True)\n"
            "time.sleep(600)"
        )
        until(lambda: (tmp_path / "log").read_text().strip())
        grandchild = int((tmp_path / "log").read_text())
        process.end()
        assert process.pid is None
        until(lambda: not alive(grandchild))

    @pytest.mark.parametrize("code", [0, 3])
    def test_one_that_is_through_stays_so(self, start: Any, code: int) -> None:
        process = start(f"raise SystemExit({code})", last=(0, 3))
        until(lambda: process.watch() is not None)
        assert process.watch() == code

    def test_one_that_cannot_start_is_given_up(self, start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(processes, "LONGEST_WAIT", 0.0)
        process = start("raise SystemExit('no such port')")
        with pytest.raises(processes.Gone, match="child ended 5 times right after its start, at last with exit code 1"):
            until(lambda: process.watch())


def alive(pid: int) -> bool:
    """Whether a process runs, and is not just waiting to be buried."""
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


SETTINGS = {
    **{"engine": "embedded", "steps": 3, "rollouts": 4, "group_size": 2},
    **{"learning_rate": 1e-3, "clip": 0.2, "seed": 1, "evaluated": 2},
}


def line(step: int, reward: float = 0.5) -> dict[str, Any]:
    """The figures of a step."""
    figures = dict.fromkeys(name for _, names in page.CURVES.values() for name in names)
    return (
        figures
        | {"step": step, "reward": reward, "calls": 2.0, "valid_calls": 1.0, "tokens": 100}
        | dict.fromkeys(("seconds_drawing", "seconds_training", "spread", "clipped", "deviation"), 0.1)
    )


class TestFolder:
    @pytest.fixture
    def began(self, tmp_path: Path) -> run.Run:
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / "config.json").write_text("{}")
        return run.Run.begin(tmp_path / "run", run.Settings(checkpoint=str(tmp_path / "model"), **SETTINGS))

    def test_a_run_begins_with_the_checkpoint_that_it_was_given(self, began: run.Run) -> None:
        assert (began.step, began.state) == (0, {"groups": []})
        assert (began.latest / "config.json").exists()

    def test_begun_again_it_goes_on(self, began: run.Run) -> None:
        began.keep(1, lambda folder: None, {"groups": ["a"]})
        again = run.Run.begin(began.folder, began.settings)
        assert (again.step, again.state["groups"]) == (1, ["a"])

    def test_with_other_settings_it_does_not(self, began: run.Run) -> None:
        with pytest.raises(SystemExit, match="holds a run with steps=3"):
            run.Run.begin(began.folder, run.Settings(**(vars(began.settings) | {"steps": 9})))

    def test_a_checkpoint_that_was_cut_off_is_none(self, began: run.Run) -> None:
        def cut(folder: Path) -> None:
            (folder / "model.safetensors").write_text("half")
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            began.keep(1, cut, {})
        assert began.step == 0
        began.keep(1, lambda folder: None, {"groups": []})
        assert list(began.latest.iterdir()) == [began.latest / "state.json"]

    def test_old_checkpoints_go(self, began: run.Run) -> None:
        for step in range(1, 6):
            began.keep(step, lambda folder: None, {})
        assert sorted(path.name for path in (began.folder / "checkpoints").iterdir()) == ["000003", "000004", "000005"]

    def test_a_step_is_noted_once(self, began: run.Run) -> None:
        for step in (0, 1, 1):
            began.note(line(step))
        assert [noted["step"] for noted in began.lines()] == [0, 1]

    def test_the_page_has_a_curve_for_each_figure_and_needs_nothing_else(self, began: run.Run) -> None:
        for step in range(3):
            began.note(line(step, reward=step / 2))
        text = page.write(began).read_text()
        for drawing in text.split("<svg")[1:]:
            ElementTree.fromstring("<svg" + drawing.partition("</svg>")[0] + "</svg>")
        assert text.count("<polyline") == sum(len(names) for _, names in page.CURVES.values())
        assert f'points="0.0,{page.HEIGHT}.0 {page.WIDTH / 2},{page.HEIGHT / 2} {page.WIDTH}.0,0.0"' in text
        assert "3 of 3 steps" in text
        assert not any(word in text for word in ("http:", "https:", "<script", "$"))

    def test_a_step_in_words(self) -> None:
        assert page.in_words(line(7)) == (
            "step   7  reward 0.50 ██████████··········   50% of calls valid     100 tokens  nothing to compare    0 s"
        )


class TestVerdict:
    @settings(deadline=None, max_examples=20)
    @given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=8))
    def test_the_chance_is_that_of_all_exchanges(self, scores: list[tuple[int, int]]) -> None:
        rises = [after - before for before, after in scores]
        exchanged = [
            sum(rise if kept else -rise for rise, kept in zip(rises, which, strict=True))
            for which in itertools.product((True, False), repeat=len(rises))
        ]
        exact = sum(value >= sum(rises) for value in exchanged) / len(exchanged)
        estimate = page.permutation_test(*zip(*scores, strict=True))
        assert abs(estimate - exact) < 0.02

    def test_a_rise_is_significant_or_it_is_chance(self) -> None:
        assert page.Verdict(0.3, 0.9, 48, 0.0001).significant
        assert not page.Verdict(0.3, 0.4, 48, 0.2).significant
        assert not page.Verdict(0.9, 0.3, 48, 0.0001).significant


def test_vllm_gets_an_output_head_of_its_own(tmp_path: Path) -> None:
    import numpy as np
    from safetensors.numpy import load_file, save_file

    (tmp_path / "config.json").write_text('{"tie_word_embeddings": true, "vocab_size": 3}')
    save_file({"model.embed_tokens.weight": np.eye(3, dtype=np.float32)}, tmp_path / "model.safetensors")
    folder = engines.for_vllm(tmp_path)
    assert folder == engines.for_vllm(tmp_path)
    assert '"tie_word_embeddings": false' in (folder / "config.json").read_text()
    assert (load_file(folder / "model.safetensors")["lm_head.weight"] == np.eye(3)).all()
