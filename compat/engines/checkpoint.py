"""A checkpoint of two million parameters that calls tools, and another one of its kind: new weights for it.

    python checkpoint.py TOKENIZER PROMPTS OUT OTHER

Runs in an engine's environment, as it needs PyTorch. ``TOKENIZER`` is a folder; ``PROMPTS`` a JSON list of lists of
token ids, the agents' own first prompts. ``OTHER`` has the weights of ``OUT`` some steps before its last,
and the same embeddings.

The model learns to ramble, and by heart: after a prompt a call of ``terminal`` or ``add``, after a result another call
or an answer. Sampled at temperature 1 it gets some calls wrong, which is what a check of retries wants, and its
rambling takes long enough for new weights to come in the middle of it.
"""

from __future__ import annotations

import json
import random
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

STEPS = 160
SHORT, BATCH = 160, 8  # tokens of a short prompt, and how many examples make a step
CALLS = [
    '{"name": "terminal", "arguments": {"command": "ls"}}',
    '{"name": "terminal", "arguments": {"command": "pwd"}}',
    '{"name": "add", "arguments": {"a": 2, "b": 3}}',
]
ANSWERS = ["Done.", "It is 5.", "That is all."]


def main(tokenizer_folder: str, prompts_file: str, out: str, other: str) -> None:
    started = time.time()
    torch.set_num_threads(1)  # two would spin for each other
    random.seed(0)
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    prompts = json.loads(Path(prompts_file).read_text())
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=6,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=32768,
            tie_word_embeddings=True,
            initializer_range=0.05,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95))
    for step in range(STEPS):
        if step == STEPS - 30:
            save(model, tokenizer, other)
            # vLLM 0.32 on the CPU keeps a tied output head as it was when it is given new weights.
            model.model.embed_tokens.weight.requires_grad_(False)
        whole = step % 8 == 7 or step >= STEPS - 8  # an agent's whole prompt now and then, most at the end
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, (step + 1) / 15) * (1 - 0.9 * step / STEPS)
        loss = torch.stack(
            [taught(model, tokenizer, random.choice(prompts), whole) for _ in range(1 if whole else BATCH)]
        )
        optimizer.zero_grad()
        loss.mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 20 == 0:
            print(f"step {step}: loss {loss.mean().item():.3f}, {time.time() - started:.0f} s", flush=True)
    save(model, tokenizer, out)


def taught(model: Any, tokenizer: Any, prompt: list[int], whole: bool) -> Any:
    """The loss of the answers of one conversation that begins with a prompt, or with its end."""
    ids = list(prompt if whole else prompt[-random.randint(20, SHORT) :])
    learnt: list[int] = []
    weights: list[float] = []
    while True:
        calls = not learnt or random.random() < 0.3
        said = f"<tool_call>\n{random.choice(CALLS)}\n</tool_call>" if calls else random.choice(ANSWERS)
        ramble = rambling(prompt)
        answer = tokenizer.encode(f"\n{said}<|im_end|>", add_special_tokens=False)
        learnt += range(len(ids), len(ids) + len(ramble) + len(answer))
        weights += [0.2] * len(ramble) + [1.0] * len(answer)  # calls matter more
        ids += ramble + answer
        if not calls or len(learnt) > 2 * SHORT:
            break
        result = (
            f"<|im_start|>user\n<tool_response>\n{random.choice(['5', 'a.txt', 'Error'])}\n</tool_response><|im_end|>"
        )
        ids += tokenizer.encode(f"\n{result}\n<|im_start|>assistant\n", add_special_tokens=False)
    places = torch.tensor(learnt)
    shift = 0 if whole else random.randint(0, 4000)
    positions = torch.arange(shift, shift + len(ids))[None]
    hidden = model.model(torch.tensor([ids]), position_ids=positions).last_hidden_state[0]
    losses = torch.nn.functional.cross_entropy(
        model.lm_head(hidden[places - 1]), torch.tensor(ids)[places], reduction="none"
    )
    return (losses * torch.tensor(weights)).sum() / sum(weights)


def rambling(prompt: list[int]) -> list[int]:
    """A piece of a prompt without its markup."""
    length = random.randint(30, 120)
    start = random.randint(0, max(len(prompt) - length, 0))
    return [token for token in prompt[start : start + length] if 2 < token < 2042]


def save(model: Any, tokenizer: Any, folder: str) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main(*sys.argv[1:])
