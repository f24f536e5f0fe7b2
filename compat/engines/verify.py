"""Recompute logprobs by teacher forcing, in float32 and on exactly the tokens that were recorded.

    python verify.py RUNS.json RESULTS.json

Runs in an engine's environment. ``RUNS.json`` has ``checkpoints`` (folder by version of weights), ``runs`` (by name,
a list of sequences, each with ``tokens``, ``temperature`` and ``stretches``: ``start``, ``end``, ``logprobs``,
``version``), and ``draws`` (by name, a ``prompt`` and the first tokens ``drawn`` after it). A stretch of unknown
weights must be of one of the checkpoints as a whole.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

torch.set_num_threads(1)  # two would spin for each other


@torch.inference_mode()
def main(runs_file: str, results_file: str) -> None:
    told = json.loads(Path(runs_file).read_text())
    models = {
        version: AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        for version, folder in told["checkpoints"].items()
    }
    results = {
        "runs": {name: compared(models, sequences) for name, sequences in told["runs"].items()},
        "draws": {name: expected(models["A"], **draw) for name, draw in told["draws"].items()},
    }
    Path(results_file).write_text(json.dumps(results))


def compared(models: dict[str, Any], sequences: list[dict[str, Any]]) -> dict[str, Any]:
    """Differences over the stretches of these sequences."""
    worst, total, count, by_version = 0.0, 0.0, 0, dict.fromkeys(models, 0)
    for sequence in sequences:
        ids = torch.tensor([sequence["tokens"]])
        hidden = {}
        for stretch in sequence["stretches"]:
            places = torch.arange(stretch["start"], stretch["end"])
            recorded = torch.tensor(stretch["logprobs"], dtype=torch.float64)
            differences = {}
            for version in [stretch["version"]] if stretch["version"] in models else models:
                if version not in hidden:
                    hidden[version] = models[version].model(ids).last_hidden_state[0]
                logits = models[version].lm_head(hidden[version][places - 1]) / sequence["temperature"]
                logprobs = torch.log_softmax(logits, -1)
                differences[version] = (logprobs[torch.arange(len(places)), ids[0, places]] - recorded).abs()
            version = min(differences, key=lambda version: differences[version].max().item())
            worst = max(worst, differences[version].max().item())
            total += differences[version].sum().item()
            count += len(places)
            by_version[version] += len(places)
    return {"tokens": count, "largest": worst, "mean": total / max(count, 1), "by_version": by_version}


def expected(model: Any, prompt: list[int], drawn: list[int]) -> dict[str, Any]:
    """How many different tokens so many draws from the whole softmax have, and the standard deviation of that."""
    chances = torch.softmax(model(torch.tensor([prompt])).logits[0, -1].double(), -1)
    missing = (1 - chances) ** len(drawn)
    return {
        "draws": len(drawn),
        "different": len(set(drawn)),
        "expected": (1 - missing).sum().item(),
        # What one token's absence says of another's is left out, which makes it a little too large.
        "deviation": (missing * (1 - missing)).sum().sqrt().item(),
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
