"""Repair: a small package with a mistake in it, and pytest as the verifier.

hermes-atropos validate examples/environments/repairs.py:Repairs
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from atroposlib.envs.base import APIServerConfig

from hermes_atropos import HermesEnv, HermesEnvConfig, Reward, StockVLLMServer

#: By module: its code, its tests, and mistakes as (right, wrong).
MODULES: dict[str, tuple[str, str, list[tuple[str, str]]]] = {
    "ranges": (
        "def merge(ranges):\n"
        '    """Overlapping (start, end) ranges as one, in order."""\n'
        "    merged = []\n"
        "    for start, end in sorted(ranges):\n"
        "        if merged and start <= merged[-1][1]:\n"
        "            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))\n"
        "        else:\n"
        "            merged.append((start, end))\n"
        "    return merged\n",
        "assert merge([(5, 7), (1, 3), (2, 4)]) == [(1, 4), (5, 7)]\n"
        "assert merge([(1, 9), (2, 3)]) == [(1, 9)]\n"
        "assert merge([(1, 2), (2, 3)]) == [(1, 3)]\n",
        [
            ("sorted(ranges)", "ranges"),
            ("max(end, merged[-1][1])", "end"),
            ("start <= merged", "start < merged"),
            ("merged[-1][0], max", "start, max"),
        ],
    ),
    "words": (
        "def frequent(text, count):\n"
        '    """The most frequent words, the most frequent first, equal ones in alphabetical order."""\n'
        "    times = {}\n"
        "    for word in text.lower().split():\n"
        '        word = word.strip(".,!?")\n'
        "        times[word] = times.get(word, 0) + 1\n"
        "    return sorted(times, key=lambda word: (-times[word], word))[:count]\n",
        'assert frequent("b a b. A! c", 2) == ["a", "b"]\n'
        'assert frequent("x y y", 1) == ["y"]\n'
        'assert frequent("One one, two", 2) == ["one", "two"]\n',
        [
            (".lower()", ""),
            ("-times[word]", "times[word]"),
            (", 0) + 1", ", 0)"),
            ('word.strip(".,!?")', "word"),
            ("[:count]", "[:count + 1]"),
        ],
    ),
    "clock": (
        "def minutes(text):\n"
        '    """The minutes of a time like 1h30m, 2h or 45m."""\n'
        "    total, number = 0, 0\n"
        "    for sign in text:\n"
        "        if sign.isdigit():\n"
        "            number = number * 10 + int(sign)\n"
        "        else:\n"
        '            total += number * {"h": 60, "m": 1}[sign]\n'
        "            number = 0\n"
        "    return total\n",
        'assert minutes("1h30m") == 90\nassert minutes("2h") == 120\nassert minutes("45m") == 45\n',
        [
            ('"h": 60', '"h": 6'),
            ("number * 10 + int", "number + int"),
            ("            number = 0\n", ""),
            ("total += number", "total = number"),
        ],
    ),
    "grid": (
        "def neighbours(x, y, width, height):\n"
        '    """The cells beside (x, y), within the grid."""\n'
        "    around = [(x - 1, y), (x + 1, y), (x, y - 1), (x, y + 1)]\n"
        "    return [(a, b) for a, b in around if 0 <= a < width and 0 <= b < height]\n",
        "assert neighbours(0, 0, 3, 2) == [(1, 0), (0, 1)]\n"
        "assert neighbours(2, 1, 3, 2) == [(1, 1), (2, 0)]\n"
        "assert neighbours(1, 1, 3, 3) == [(0, 1), (2, 1), (1, 0), (1, 2)]\n",
        [
            ("a < width", "a <= width"),
            ("b < height", "b < width"),
            ("0 <= a", "0 < a"),
            ("(x, y + 1)", "(x, y + 2)"),
        ],
    ),
    "digits": (
        "def roman(number):\n"
        '    """A number from 1 to 3999 in Roman digits."""\n'
        '    values = [(1000, "M"), (900, "CM"), (500, "D"), (400, "CD"), (100, "C"), (90, "XC"), (50, "L"),\n'
        '              (40, "XL"), (10, "X"), (9, "IX"), (5, "V"), (4, "IV"), (1, "I")]\n'
        '    text = ""\n'
        "    for value, digits in values:\n"
        "        while number >= value:\n"
        "            text += digits\n"
        "            number -= value\n"
        "    return text\n",
        'assert roman(1994) == "MCMXCIV"\nassert roman(40) == "XL"\nassert roman(3) == "III"\n',
        [
            ("number >= value", "number > value"),
            ('(9, "IX"), (5, "V"), (4, "IV")', '(5, "V")'),
            ("while number", "if number"),
            ('(40, "XL"), ', ""),
        ],
    ),
}


@dataclass(frozen=True)
class Item:
    """A package's module with a mistake, and as it should be; what its tests say."""

    module: str
    broken: str
    right: str
    tests: str


def generate(seed: int) -> Iterator[Item]:
    """Each mistake of each module, in an order of the seed."""
    mistakes = [(module, pair) for module, (_, _, pairs) in MODULES.items() for pair in pairs]
    random.Random(seed).shuffle(mistakes)
    for module, (right, wrong) in mistakes:
        code, asserts, _ = MODULES[module]
        cases = "".join(f"\n\ndef test_{number}():\n    {line}\n" for number, line in enumerate(asserts.splitlines()))
        yield Item(module, code.replace(right, wrong, 1), code, f"from {module} import *\n{cases}")


class Repairs(HermesEnv):
    name = "repairs"
    server_cls = StockVLLMServer

    @classmethod
    def config_init(cls) -> tuple[HermesEnvConfig, list[APIServerConfig]]:
        model = "NousResearch/Hermes-4-14B"
        python = {sys.prefix: "ro", sys.base_prefix: "ro"}  # with pytest, for the agent as for the verifier
        config = HermesEnvConfig(tokenizer_name=model, group_size=8, max_iterations=30, mounts=python)
        return config, [APIServerConfig(base_url="http://localhost:8000/v1", model_name=model)]

    def items(self) -> Iterator[Item]:
        return generate(seed=0)

    async def prepare(self, item: Item, task: Any) -> None:
        await task.write_file(f"{item.module}.py", item.broken)
        await task.write_file(f"test_{item.module}.py", item.tests)

    def prompt(self, item: Item) -> str:
        return f"test_{item.module}.py fails. Find the mistake in {item.module}.py and mend it. Leave the tests alone."

    async def verify(self, item: Item, task: Any, result: Any) -> Reward:
        # The tests are the author's own: those in the workspace may have been changed.
        found = "import os, sys\nsys.path.insert(0, os.environ['WORKSPACE'])\n"
        tests = {f"test_{item.module}.py": item.tests, "conftest.py": found}
        pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        check = await task.check(tests, pytest, copy=True, timeout=60, env={"PYTHONDONTWRITEBYTECODE": "1"})
        return Reward(float(check.exit_code == 0), reason=check.output[-500:])

    async def solve(self, item: Item, task: Any) -> str:
        await task.write_file(f"{item.module}.py", item.right)
        return "Mended."


if __name__ == "__main__":
    Repairs.cli()
