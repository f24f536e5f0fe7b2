"""What keeping a rollout's tokens costs: `ExactManagedServer` beside atroposlib's `ManagedServer`, in one run.

    python benchmarks/tokens.py            200 turns to 100,000 tokens
    python benchmarks/tokens.py --short    20 turns to 10,000 tokens

Three harnesses talk to a model that answers at once:

    kept       appends what it was answered
    stripped   strips white space off the answers, as Hermes does
    rewritten  puts the number of the turn into its system prompt

Printed per harness and side: milliseconds a turn (median, and over the last turns, when the conversation is longest),
peak memory while it runs and when the nodes are taken, its growth when turns and tokens are doubled, sequences,
trainable tokens. Memory is measured in a pass of its own, time in three passes, of which the fastest counts. The last
line is one JSON object of the figures.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import random
import statistics
import time
import tracemalloc
from collections.abc import Callable
from typing import Any

from atroposlib.envs.server_handling.managed_server import ManagedServer
from atroposlib.envs.server_handling.server_baseline import APIServer, APIServerConfig

from hermes_atropos.backends.managed import ExactManagedServer
from hermes_atropos.testing import chatml_tokenizer

SIDES: dict[str, Callable[..., Any]] = {"atroposlib": ManagedServer, "hermes_atropos": ExactManagedServer}
HARNESSES = ("kept", "stripped", "rewritten")
SENTENCE = "the files in this folder are listed below, and each line of Python was counted before the command finished"
WORDS = SENTENCE.split()


class InstantModel(APIServer):
    """Answers with the next of some prepared texts; keeps the last prompt and answer, for a check."""

    def __init__(self, answers: list[str]) -> None:
        super().__init__(APIServerConfig(model_name="instant", base_url="instant://model", health_check=False))
        self.tokenizer = chatml_tokenizer()
        end = self.tokenizer.convert_tokens_to_ids("<|im_end|>")
        outputs = [[*self.tokenizer.encode(text, add_special_tokens=False), end] for text in answers]
        self.outputs = [(ids, [-0.5] * len(ids)) for ids in reversed(outputs)]
        self.last: list[int] = []

    async def check_server_status_task(self, chat_completion: bool = True) -> None:
        self.server_healthy = True

    async def _tokens_and_logprobs_completion_wrapper(self, **kwargs: Any) -> tuple[Any, ...]:
        prompt_ids = kwargs["input_ids"]
        output_ids, logprobs = self.outputs.pop()
        if not self.outputs:
            self.last = [*prompt_ids, *output_ids]
        return prompt_ids, [list(output_ids)], [list(logprobs)], ["stop"]

    async def _chat_completion_wrapper(self, **kwargs: Any) -> Any:
        raise NotImplementedError

    async def _completion_wrapper(self, **kwargs: Any) -> Any:
        raise NotImplementedError


rng = random.Random(7)


def texts(count: int, tokens: int) -> list[str]:
    """``count`` texts of about ``tokens`` tokens each, never the same, with white space at the end."""
    tokenizer = chatml_tokenizer()
    per_word = len(tokenizer.encode(" ".join(WORDS))) / len(WORDS)
    return [
        f"{number}. {' '.join(rng.choices(WORDS, k=max(1, round(tokens / per_word))))}\n" for number in range(count)
    ]


async def rollout(
    side: str, harness: str, turns: int, tokens: int, milliseconds: list[float]
) -> tuple[Any, InstantModel]:
    """One conversation of so many turns and tokens; how long each turn took is appended to ``milliseconds``."""
    said = texts(2 * turns, tokens // (2 * turns) - 5)
    model = InstantModel(said[1::2])
    managed = SIDES[side](model, tokenizer=model.tokenizer)
    messages: list[dict[str, Any]] = [{"role": "system", "content": "You are a helpful assistant."}]
    for number, question in enumerate(said[::2]):
        if harness == "rewritten":
            messages[0] = {"role": "system", "content": f"You are a helpful assistant. This is turn {number}."}
        messages.append({"role": "user", "content": question})
        started = time.perf_counter()
        completion = await managed.chat_completion(messages=messages, max_tokens=4096)
        milliseconds.append((time.perf_counter() - started) * 1000)
        content = completion.choices[0].message.content
        messages.append({"role": "assistant", "content": content.strip() if harness == "stripped" else content})
    return managed, model


def timed(side: str, harness: str, turns: int, tokens: int) -> dict[str, Any]:
    milliseconds: list[float] = []
    gc.collect()
    managed, model = asyncio.run(rollout(side, harness, turns, tokens, milliseconds))
    started = time.perf_counter()
    nodes = managed.get_state()["nodes"]
    seconds = time.perf_counter() - started
    assert any(node.tokens == model.last for node in nodes), "the last node is not what was sent and sampled"
    return {
        "ms_per_turn": statistics.median(milliseconds),
        "ms_per_turn_at_end": statistics.median(milliseconds[-max(1, turns // 20) :]),
        "seconds": sum(milliseconds) / 1000,
        "nodes_seconds": seconds,
        "sequences": len(nodes),
        "tokens_at_end": len(model.last),
        "tokens_trained": sum(mask != -100 for node in nodes for mask in node.masked_tokens),
    }


def traced(side: str, harness: str, turns: int, tokens: int) -> tuple[float, float]:
    """Peak megabytes while the rollout ran, and while its nodes were taken."""
    gc.collect()
    tracemalloc.start()
    managed, _ = asyncio.run(rollout(side, harness, turns, tokens, []))
    running = tracemalloc.get_traced_memory()[1]
    tracemalloc.reset_peak()
    nodes = managed.get_state()["nodes"]
    with_nodes = tracemalloc.get_traced_memory()[1]
    del nodes
    tracemalloc.stop()
    return running / 1e6, with_nodes / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="20 turns to 10,000 tokens")
    turns, tokens, rounds = (20, 10_000, 1) if parser.parse_args().short else (200, 100_000, 3)
    figures: dict[str, Any] = {"turns": turns, "tokens": tokens}
    # First uses (imports, the tokenizer's training, caches of the template) belong to neither side.
    for side in SIDES:
        timed(side, "kept", 2, 1000)
    print(f"{turns} turns to {tokens:,} tokens")
    print("harness    side            ms/turn   at end  peak MB   +nodes  growth  sequences  trainable")
    for harness in HARNESSES:
        runs = [{side: timed(side, harness, turns, tokens) for side in SIDES} for _ in range(rounds)]
        for side in SIDES:
            # What else the machine does only ever adds time.
            row = min((run[side] for run in runs), key=lambda run: run["seconds"])
            row["peak_mb"], row["peak_mb_with_nodes"] = traced(side, harness, turns, tokens)
            row["memory_growth"] = row["peak_mb"] / traced(side, harness, turns // 2, tokens // 2)[0]
            figures.setdefault(harness, {})[side] = row
            columns = (
                f"{harness:10} {side:14}",
                f"{row['ms_per_turn']:8.2f} {row['ms_per_turn_at_end']:8.2f}",
                f"{row['peak_mb']:8.1f} {row['peak_mb_with_nodes']:8.1f} {row['memory_growth']:7.1f}",
                f"{row['sequences']:10} {row['tokens_trained']:10}",
            )
            print(*columns, flush=True)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
