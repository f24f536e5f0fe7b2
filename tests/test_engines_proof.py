"""``make engines``: what it makes of rollouts and of results. The engines themselves are not run here."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from zipfile import ZipFile

import pytest

from hermes_atropos.servers.sampling import NEUTRAL
from hermes_atropos.testing import chatml_tokenizer
from hermes_atropos.tokens import BreakCause, Ledger, Match, Weights
from hermes_atropos.trajectory import SequenceData

ENGINES = Path(__file__).parent.parent / "compat" / "engines"


@pytest.fixture
def prove(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ENGINES))
    import prove

    return prove


def sequence(*, barred: bool = False) -> SequenceData:
    ledger = Ledger()
    prompt = ledger.prompt(Match(None, [], [], BreakCause.FIRST, False, None, None), [1, 2, 3])
    weights = [Weights(0, 2, "default"), Weights(2, 3, "B")]
    ledger.record(prompt, [7, 8, 9], [-0.1, -0.2, -0.3], "stop", weights=weights, skew="no", barred=barred)
    return SequenceData.cut(ledger.sequences()[0], str)


def test_each_stretch_of_an_answer_is_compared_with_its_own_weights(prove: ModuleType) -> None:
    assert prove.stretches(sequence(), 1.0) == {
        "tokens": [1, 2, 3, 7, 8, 9],
        "temperature": 1.0,
        "stretches": [
            {"start": 3, "end": 5, "logprobs": [-0.1, -0.2], "version": "A"},
            {"start": 5, "end": 6, "logprobs": [-0.3], "version": "B"},
        ],
    }
    assert prove.stretches(sequence(barred=True), 1.0)["stretches"] == []


def test_whatever_does_not_hold_is_a_failure(prove: ModuleType) -> None:
    seen = prove.Seen(
        contract=[("vllm", "holds", ""), ("vllm", "does not", "AssertionError: no")],
        outcomes={
            "a": prove.Outcome(failures=["the server left"]),
            "default settings": prove.Outcome(ends=[("completed", 0), ("truncated", 0)]),
        },
    )
    results = {
        "runs": {"a": {"tokens": 3000, "largest": 2e-4}},
        "draws": {"x": {"different": 3, "expected": 89.0, "deviation": 5.0}},
    }
    assert prove.faults(seen, results) == [
        "vllm: does not AssertionError: no",
        "a: the server left",
        "a: a logprob differs by 2.0e-04",
        "default settings: ended truncated",
        "default settings: no rollout had an abort",
        "x: 3 different tokens were drawn, 89 expected",
    ]
    results = {"runs": {"a": {"tokens": 1999, "largest": 1e-5}}, "draws": {}}
    assert prove.faults(prove.Seen(), results) == ["only 1999 tokens were compared"]


def test_what_the_checkpoint_brings_along_would_matter(prove: ModuleType) -> None:
    assert all(NEUTRAL[name] != value for name, value in prove.HOSTILE.items())


def test_requirements_are_the_wheels_own_without_those_dropped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(ENGINES))
    import install

    wheel = tmp_path / "x-1-py3-none-any.whl"
    wanted = ["torch==2", "numpy<3", "Cuda_Python", 'colour; extra == "looks"', 'winreg2; sys_platform == "win32"']
    with ZipFile(wheel, "w") as archive:
        archive.writestr("x-1.dist-info/METADATA", "".join(f"Requires-Dist: {line}\n" for line in wanted))
    assert install.needed(wheel, {"torch", "cuda-python"}) == ["numpy<3"]


def test_the_taught_tokenizer_writes_calls_as_the_library_reads_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ENGINES))
    import rollouts

    tokenizer = rollouts.make_tokenizer([Path(__file__)])
    assert tokenizer.chat_template == chatml_tokenizer().chat_template
    assert tokenizer.convert_tokens_to_ids("</tool_call>") == len(tokenizer) - 5
    assert "prove" not in sys.modules or "torch" not in sys.modules
