"""Teach a small Llama to do errands under Hermes' own prompt, from demonstrations, within an hour on two cores.

    python examples/embedded/teach.py build/teach/demonstrations.jsonl hermes_atropos/embedded/model

Makes the tokenizer from the text of the demonstrations. Most steps see conversations behind the last piece of the
prompt only, which is cheap; later every fourth sees them behind the whole prompt. Each time a demonstration is used,
its names and numbers are others, so that the model has to copy, and cannot remember.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import random
import re
import string
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from errands import name
from llama import Llama
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy

from hermes_atropos.testing.tokenizer import CHATML_TEMPLATE, MARKUP_TOKENS, SPECIAL_TOKENS

CONTEXT = 16384
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": CONTEXT,
    "rms_norm_eps": 1e-6,
    "rope_theta": 100000.0,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
    "vocab_size": 4096,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": None,
    "pad_token_id": 0,
    "eos_token_id": 2,
}

#: Steps in which the learning rate would fall to its end. Fewer are taken: the model is not to be perfect.
DECAY = 650

#: Tokens may hold whole phrases, so that Hermes' prompt takes 2,500 of them and not 4,300. Each digit is a token. Names
#: stand in quotes, and so are cut the same wherever they stand: they can be copied.
PIECES = r" ?\p{L}+(?:[ ,.'’/-]+\p{L}+)*|\p{N}| ?[^\s\p{L}\p{N}]+|\s+"


def make_tokenizer(texts: list[str], folder: Path) -> Tokenizer:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"] - len(MARKUP_TOKENS),
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.add_tokens([AddedToken(token, special=False, normalized=False) for token in MARKUP_TOKENS])
    folder.mkdir(parents=True, exist_ok=True)
    bpe.save(str(folder / "tokenizer.json"), pretty=False)
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "model_max_length": CONTEXT,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(about, indent=2) + "\n")
    (folder / "chat_template.jinja").write_text(CHATML_TEMPLATE)
    generation = {"eos_token_id": CONFIG["eos_token_id"], "pad_token_id": CONFIG["pad_token_id"]}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    return bpe


Rows = list[tuple[list[int], list[bool]]]


class Demonstrations:
    """Rollouts as token ids, their names and numbers new each time."""

    def __init__(self, path: Path, rng: random.Random) -> None:
        self.rng = rng
        self.rollouts = [json.loads(line) for line in path.read_text().splitlines()]
        self.heads = sorted({head_and_goal(rollout)[0] for rollout in self.rollouts})
        self.tokenizer: Any = None

    def texts(self) -> list[str]:
        """What the tokenizer is made from; each prompt counts as often as a sixth of the rest."""
        conversations = ["".join([head_and_goal(rollout)[1], *rollout[1:]]) for rollout in self.rollouts]
        prompts = self.heads * (len(self.rollouts) // 7)
        names = [" ".join(name(self.rng, True) for _ in range(3000))]
        return [*conversations, *prompts, *names]

    def prompt(self) -> list[int]:
        """The tokens before the goal, of another day and on another machine each time."""
        text = self.rng.choice(self.heads)
        day = datetime.date(2026, 1, 1) + datetime.timedelta(self.rng.randint(0, 1200))
        text = re.sub(r"Conversation started: .*", f"Conversation started: {day:%A, %B %d, %Y}", text)
        text = re.sub(r"Host: Linux \(.*\)", f"Host: Linux ({self.kernel()})", text)
        text = re.sub(r"Model: .*", f"Model: {self.rng.choice(['embedded', 'local', name(self.rng, True)])}", text)
        if self.rng.random() < 0.2:
            text = text.replace("/workspace", f"/tmp/{name(self.rng, True)}{self.rng.randint(0, 99999)}/workspace")
        return self.encode(text)

    def kernel(self) -> str:
        version = ".".join(str(self.rng.randint(0, 20)) for _ in range(3))
        return version + self.rng.choice(["", "-generic", "-amd64", f"-{name(self.rng, True)}"])

    def conversation(self) -> tuple[list[int], list[bool]]:
        """Tokens from the goal on, and which of them the model is to say."""
        rollout = self.rng.choice(self.rollouts)
        segments = self.renamed([head_and_goal(rollout)[1], *rollout[1:]])
        ids: list[int] = []
        said: list[bool] = []
        for number, segment in enumerate(segments):
            tokens = self.encode(segment)
            ids += tokens
            said += [number % 2 == 1] * len(tokens)
        return ids, said

    def batches(self, size: int) -> Iterator[Rows]:
        """Without end: conversations of about one length together, padded to about so many tokens."""
        while True:
            drawn = sorted((self.conversation() for _ in range(200)), key=lambda row: len(row[0]))
            batches: list[Rows] = [[]]
            for row in drawn:
                if (len(batches[-1]) + 1) * len(row[0]) > size:
                    batches.append([])
                batches[-1].append(row)
            self.rng.shuffle(batches)
            yield from batches

    def renamed(self, segments: list[str]) -> list[str]:
        whole = "\0".join(segments)
        old = list(dict.fromkeys(re.findall(r"`(\w+?)(?:\.txt|\.csv)?`", segments[0])))
        new = {word: name(self.rng, True) for word in old}
        for number in sorted(set(re.findall(r'"output": "(?:\w+=)?(\d\d+)', whole))):
            new[number] = self.rng.choice("123456789") + "".join(self.rng.choice(string.digits) for _ in number[1:])
        spelt = "|".join(sorted(map(re.escape, new), key=len, reverse=True))
        renamed = re.sub(rf"(?<![\w$-])({spelt})(?![\w])", lambda match: new[match[1]], whole)
        return renamed.split("\0")

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids


def head_and_goal(rollout: list[str]) -> tuple[str, str]:
    head, mark, goal = rollout[0].rpartition("<|im_start|>user\n")
    return head, mark + goal


@torch.no_grad()
def build_copying_heads(model: Llama) -> None:
    """Begin with heads that copy (https://arxiv.org/abs/2209.11895): on so few tokens they don't form by themselves.

    The first layer's first heads look one, two and three tokens back. In two later layers a head looks for the token
    before which the present one stood, and says it. The first component of each embedding is a constant, by which the
    former find their place.
    """
    width, half = model.width, model.width // 2
    frequencies = model.config["rope_theta"] ** -(torch.arange(half) / half)

    def weight(layer: int, name: str) -> torch.Tensor:
        return model.weights[f"model/layers/{layer}/{name}/weight"]

    for matrix in (matrix for matrix in model.weights.values() if matrix.dim() == 2):
        matrix *= 3
    model.weights["model/embed_tokens/weight"][:, 0] = 0.5
    for layer in range(model.config["num_hidden_layers"]):
        for reader in ("self_attn/q_proj", "self_attn/k_proj", "self_attn/v_proj", "mlp/gate_proj", "mlp/up_proj"):
            weight(layer, reader)[:, 0] = 0
        weight(layer, "mlp/down_proj").mul_(0.1)

    query, key, near = weight(0, "self_attn/q_proj"), weight(0, "self_attn/k_proj"), 6
    key[:width] *= 0.1
    key[:near, 0] = 1
    query[: 3 * width] *= 0.1
    for head in range(3):
        angles = frequencies[:near] * (head + 1)
        query[head * width :, 0][:near] = angles.cos()
        query[head * width + half :, 0][:near] = -angles.sin()

    output = weight(0, "self_attn/o_proj").mul_(0.07)
    output[:, :width] *= 4
    output[0, :width] = 0
    far = torch.arange(width) % half >= near  # pairs that turn so slowly that their places hardly matter
    for layer in (1, 2):
        weight(layer, "self_attn/q_proj")[:width] = weight(0, "self_attn/v_proj")[:width] * 3 * far[:, None]
        weight(layer, "self_attn/k_proj")[:width] = output[:, :width].T * 3 * far[:, None]
        output_here = weight(layer, "self_attn/o_proj")
        output_here[:, :width] = weight(layer, "self_attn/v_proj")[:width].T * 2
        output_here[:, width:] *= 0.3


def teach(arguments: argparse.Namespace) -> None:
    torch.manual_seed(arguments.seed)
    torch.set_num_threads(arguments.threads)
    rng = random.Random(arguments.seed)
    taught = Demonstrations(arguments.demonstrations, rng)
    taught.tokenizer = make_tokenizer(taught.texts(), arguments.folder)
    batches = taught.batches(arguments.tokens)
    prompt = taught.prompt()
    lengths = [len(taught.conversation()[0]) for _ in range(200)]
    print(
        f"the prompt has {len(prompt)} tokens, a conversation {sum(lengths) / 200:.0f}, {max(lengths)} at most",
        flush=True,
    )

    model = Llama(CONFIG)
    build_copying_heads(model)
    print(f"{sum(weight.numel() for weight in model.weights.values()):,} parameters")
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.01)
    began = time.monotonic()
    for step in range(arguments.steps):
        done = step / DECAY
        whole = done >= 0.3 and step % 4 == 0
        for group in optimizer.param_groups:
            group["lr"] = arguments.rate * min(1, (step + 1) / 50) * (0.05 + 0.95 * (1 + math.cos(math.pi * done)) / 2)
        optimizer.zero_grad()
        prompt = taught.prompt()
        prefix = torch.tensor(prompt if whole else prompt[-arguments.piece :])
        said, read = losses_of(model, prefix, next(batches))
        (said + read / 5).backward()  # what is read repeats names too
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 20 == 0 or step == arguments.steps - 1:
            seconds, kind = time.monotonic() - began, "whole" if whole else "piece"
            print(f"step {step} {kind} loss {said:.3f}, reading {read:.3f} {seconds:.0f} s", flush=True)
        if step and step % 100 == 0:
            model.save(arguments.folder, arguments.folder)
    model.save(arguments.folder, arguments.folder, torch.float16)


def losses_of(model: Llama, prefix: torch.Tensor, rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean cross entropy of what is said, and of what is read."""
    length = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([ids + [0] * (length - len(ids)) for ids, _ in rows])
    said = torch.tensor([said + [False] * (length - len(said)) for _, said in rows])
    real = torch.tensor([[True] * len(row) + [False] * (length - len(row)) for row, _ in rows])[:, 1:]
    losses = cross_entropy(model.logits(model(prefix, ids)[:, :-1][real]), ids[:, 1:][real], reduction="none")
    said = said[:, 1:][real]
    return losses[said].mean(), losses[~said].mean()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demonstrations", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--tokens", type=int, default=6000, help="in a batch, padding included")
    parser.add_argument("--piece", type=int, default=64, help="tokens of the prompt in most steps")
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    teach(parser.parse_args())


if __name__ == "__main__":
    main()
