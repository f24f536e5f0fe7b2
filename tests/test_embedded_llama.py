"""The model in numpy: what transformers computes, whichever way the tokens come; refusals of what it does not do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_llama import CONFIG, write_llama

from hermes_atropos.embedded import MODEL
from hermes_atropos.embedded.llama import BLOCK, Llama, Sequence, log_softmax
from hermes_atropos.errors import CheckpointError

#: By the name of the checkpoint's folder, prompts and what transformers says of them; of compat/embedded_reference.py.
REFERENCE = json.loads((Path(__file__).parent / "data" / "embedded_reference.json").read_text())


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("checkpoints") / "random")


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> Llama:
    return Llama(checkpoint)


@pytest.mark.parametrize("name", REFERENCE)
def test_logprobs_are_those_of_transformers(name: str, checkpoint: Path) -> None:
    model = Llama({"random": checkpoint, MODEL.name: MODEL}[name])
    assert sum(len(prompt["ids"]) for prompt in REFERENCE[name]) > 2 * BLOCK
    for prompt in REFERENCE[name]:
        found = model.logprobs(prompt["ids"], prompt["temperature"])
        error = np.abs(found - np.array(prompt["logprobs"]))
        # The reference is float64: in float32, transformers is itself up to 6e-5 from it with the package's checkpoint.
        assert error.max() < 1e-4
        assert error.mean() < 1e-5


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_the_way_in_which_tokens_come_changes_nothing(model: Llama, data: st.DataObject) -> None:
    """Sequences that share beginnings, in chunks and batches of any size, across the ends of blocks."""
    ids = st.integers(0, CONFIG["vocab_size"] - 1)
    trunk = np.random.default_rng(data.draw(st.integers(0, 9))).integers(0, CONFIG["vocab_size"], 1300).tolist()
    known: list[Sequence] = [Sequence()]
    model.forward([(known[0], trunk)])
    texts, sequences = [], []
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.sampled_from([0, 1, 700, BLOCK - 1, BLOCK, BLOCK + 1, 1300]))
        sequences.append(known[0].prefix(start))
        texts.append(trunk[:start] + data.draw(st.lists(ids, min_size=2, max_size=40)))
    told: list[list[float]] = [[] for _ in texts]
    starts = [len(sequence.tokens) for sequence in sequences]
    while left := [i for i, text in enumerate(texts) if len(sequences[i].tokens) < len(text)]:
        steps = []
        for i in data.draw(st.lists(st.sampled_from(left), min_size=1, unique=True)):
            done = len(sequences[i].tokens)
            steps.append((i, texts[i][done : done + data.draw(st.integers(1, 30))]))
        hidden = model.forward([(sequences[i], piece) for i, piece in steps])
        rows = iter(log_softmax(model.logits(hidden)))
        for i, piece in steps:
            after = len(sequences[i].tokens) - len(piece) + 1
            for place, row in zip(range(after, after + len(piece)), rows, strict=False):
                if place < len(texts[i]):
                    told[i].append(float(row[texts[i][place]]))
    for text, start, found in zip(texts, starts, told, strict=True):
        expected = model.logprobs(text)[start:]
        assert len(found) == len(expected)
        assert np.abs(np.array(found) - expected).max(initial=0) < 1e-5


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"model_type": "qwen2"}, "model_type='qwen2'"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0, "rope_theta": 1e5}}, "rope_type='llama3'"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type='linear'"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"mlp_bias": True}, "mlp_bias=True"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings=False"),
        ({"quantization_config": {"bits": 4}}, "quantization_config="),
        ({"num_hidden_layers": 3}, r"layers\.2\.\S+ is missing"),
        ({"num_hidden_layers": 1}, r"no place for: model\.layers\.1"),
        ({"intermediate_size": 32}, r"mlp\.gate_proj\.weight is \(64, 48\), not \(32, 48\)"),
    ],
)
def test_what_it_does_not_do_is_refused_by_name(
    checkpoint: Path, tmp_path: Path, changes: dict[str, Any], why: str
) -> None:
    shutil.copytree(checkpoint, tmp_path / "changed")
    (tmp_path / "changed" / "config.json").write_text(json.dumps(CONFIG | changes))
    with pytest.raises(CheckpointError, match=why):
        Llama(tmp_path / "changed")


@pytest.mark.parametrize("name", ["hidden_size", "num_attention_heads", "intermediate_size", "vocab_size"])
def test_what_a_configuration_does_not_say_is_named(checkpoint: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(checkpoint, tmp_path / "changed")
    told = {key: value for key, value in CONFIG.items() if key not in {name, "head_dim", "num_key_value_heads"}}
    (tmp_path / "changed" / "config.json").write_text(json.dumps(told))
    with pytest.raises(CheckpointError, match=f"has no '{name}'"):
        Llama(tmp_path / "changed")


def test_a_configuration_of_older_transformers_is_read(checkpoint: Path, model: Llama, tmp_path: Path) -> None:
    older = CONFIG | {"rope_theta": 100000.0, "rope_scaling": None}
    del older["rope_parameters"]
    shutil.copytree(checkpoint, tmp_path / "older")
    (tmp_path / "older" / "config.json").write_text(json.dumps(older))
    assert Llama(tmp_path / "older").config == model.config


def test_files_that_are_missing_or_damaged_are_named(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json can't be read"):
        Llama(tmp_path)
    shutil.copy(checkpoint / "config.json", tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match=r"model\.safetensors can't be read"):
        Llama(tmp_path)
