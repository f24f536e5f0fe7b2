"""What transformers makes of the embedded model's checkpoint, in float64: tests/data/embedded_reference.json.

    python compat/embedded_reference.py CHECKPOINT [CHECKPOINT …]

Needs PyTorch and transformers, and writes over what is there. A checkpoint is the package's own, or a random one that
``tests/tiny_llama.py`` made, and is known by its folder's name. tests/test_embedded_llama.py compares.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

OUT = Path(__file__).resolve().parents[1] / "tests" / "data" / "embedded_reference.json"
LENGTHS = [2, 5, 64, 300, 1100]


@torch.inference_mode()
def reference(folder: Path) -> list[dict[str, list[float]]]:
    """Prompts, random or gone on with by the model itself, and each token's logprob after those before it."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    draw = random.Random(0)
    found = []
    for length in LENGTHS:
        ids = torch.tensor([[draw.randrange(model.config.vocab_size) for _ in range(length)]])
        for temperature in (1.0, 0.7):
            logprobs = torch.log_softmax(model(ids).logits[0, :-1] / temperature, -1)
            told = logprobs[torch.arange(length - 1), ids[0, 1:]]
            found.append(
                {"ids": ids[0].tolist(), "temperature": temperature, "logprobs": [round(x, 8) for x in told.tolist()]}
            )
            ids = model.generate(ids[:, : length // 2], do_sample=False, max_length=length, min_length=length)
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)  # two would spin for each other
    OUT.parent.mkdir(exist_ok=True)
    folders = [Path(name) for name in sys.argv[1:]]
    OUT.write_text(json.dumps({folder.name: reference(folder) for folder in folders}) + "\n")
