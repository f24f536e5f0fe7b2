"""Tool use: questions about a shop, answered by the small agent with functions of one's own.

hermes-atropos validate examples/environments/shop.py:Shop
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from atroposlib.envs.base import APIServerConfig

from hermes_atropos import AgentConfig, AtroposAgent, HermesEnv, HermesEnvConfig, Reward, StockVLLMServer

THINGS = [
    *("anvil", "basket", "candle", "drum", "easel", "flute", "globe", "hammer"),
    *("inkwell", "jug", "kettle", "lantern", "mirror", "needle", "oar", "pillow"),
]


def stock_of(seed: int) -> dict[str, tuple[float, int]]:
    """By name: price in euros, and how many there are."""
    rng = random.Random(seed)
    return {name: (rng.randint(100, 9_999) / 100, rng.randint(0, 40)) for name in THINGS}


STOCK = stock_of(0)


def search(text: str) -> list[str]:
    """Names of things in the shop that contain a text; an empty text lists all."""
    return [name for name in STOCK if text.lower() in name]


def price(name: str) -> float:
    """The price of one thing, in euros."""
    return STOCK[name][0]


def available(name: str) -> int:
    """How many of a thing there are."""
    return STOCK[name][1]


@dataclass(frozen=True)
class Item:
    """A question, and the number that answers it."""

    question: str
    answer: float


def generate(count: int, seed: int) -> Iterator[Item]:
    """So many items; the same for the same seed."""
    rng = random.Random(seed)
    pairs = rng.sample([(one, other) for one in THINGS for other in THINGS if one < other], count)
    for number, (one, other) in enumerate(pairs):
        pieces = rng.randint(2, 9)
        yield [
            Item(f"What do {pieces} of the {one} cost?", pieces * STOCK[one][0]),
            Item(f"How much dearer or cheaper is the {one} than the {other}?", abs(STOCK[one][0] - STOCK[other][0])),
            Item(f"What is our whole stock of the {one} worth?", STOCK[one][0] * STOCK[one][1]),
            Item(f"How many are there of the {one} and the {other} together?", STOCK[one][1] + STOCK[other][1]),
        ][number % 4]


class Shop(HermesEnv):
    name = "shop"
    server_cls = StockVLLMServer

    @classmethod
    def config_init(cls) -> tuple[HermesEnvConfig, list[APIServerConfig]]:
        model = "NousResearch/Hermes-4-14B"
        # The functions run in this process, so that there is nothing to put behind a wall.
        config = HermesEnvConfig(tokenizer_name=model, group_size=8, max_iterations=12, sandbox="folder")
        return config, [APIServerConfig(base_url="http://localhost:8000/v1", model_name=model)]

    def make_agent(self) -> AtroposAgent:
        config = AgentConfig(max_tokens=self.config.max_token_length, max_steps=self.config.max_iterations)
        return AtroposAgent(self.server, tools=[search, price, available], tokenizer=self.tokenizer, config=config)

    def items(self) -> Iterator[Item]:
        return generate(24, seed=1)

    def prompt(self, item: Item) -> str:
        return f"{item.question} End your answer with the number alone on a line, in euros or pieces."

    async def verify(self, item: Item, task: Any, result: Any) -> Reward:
        numbers = re.findall(r"\d+(?:\.\d+)?", result.final_response.strip().rpartition("\n")[2])
        right = bool(numbers) and abs(float(numbers[-1]) - item.answer) < 0.005
        return Reward(float(right), metrics={"tool_calls": result.total_tool_calls, "tool_errors": result.tool_errors})

    async def solve(self, item: Item, task: Any) -> str:
        return f"{item.answer:.2f}"


if __name__ == "__main__":
    Shop.cli()
