"""Terminal tasks: a folder of files, a goal in words, and a command that says whether it was reached.

hermes-atropos validate examples/environments/terminal_tasks.py:TerminalTasks
hermes-atropos serve examples/environments/terminal_tasks.py:TerminalTasks --processes 4
"""

from __future__ import annotations

import random
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from atroposlib.envs.base import APIServerConfig

from hermes_atropos import HermesEnv, HermesEnvConfig, StockVLLMServer

WORDS = [
    *("amber", "birch", "cedar", "delta", "ember", "fjord", "grove", "heron"),
    *("ivory", "jetty", "kelp", "larch", "maple", "north", "ocean", "pearl", "quill"),
]


@dataclass(frozen=True)
class Item:
    """A folder's files by path, what to ask for, the command that checks it, and one that does it."""

    files: dict[str, str]
    goal: str
    check: str
    solution: str


def is_text(path: str, text: str) -> str:
    """A command that succeeds if a file holds just this text, final newlines aside."""
    return f'test "$(cat {path})" = {shlex.quote(text)}'


def total(rng: random.Random) -> Item:
    sales = [(rng.choice(WORDS), rng.randint(1, 99)) for _ in range(rng.randint(5, 30))]
    table = "name,amount\n" + "".join(f"{name},{amount}\n" for name, amount in sales)
    return Item(
        {"sales.csv": table},
        "sales.csv has a column `amount`. Write its sum to total.txt.",
        is_text("total.txt", str(sum(amount for _, amount in sales))),
        "awk -F, 'NR>1 {s+=$2} END {print s}' sales.csv > total.txt",
    )


def rename(rng: random.Random) -> Item:
    names = rng.sample(WORDS, 5)
    return Item(
        {f"notes/{name}.txt": f"about {name}\n" for name in names},
        "Rename each .txt file in notes/ so that it ends in .md. Change nothing else.",
        " && ".join(is_text(f"notes/{name}.md", f"about {name}") for name in names) + " && ! ls notes/*.txt",
        'for file in notes/*.txt; do mv "$file" "${file%.txt}.md"; done',
    )


def largest(rng: random.Random) -> Item:
    names = rng.sample(WORDS, 6)
    sizes = rng.sample(range(1, 200), 6)
    files = {f"data/{name[0]}/{name}.log": "x" * size for name, size in zip(names, sizes, strict=True)}
    answer = max(files, key=lambda path: len(files[path]))
    return Item(
        files,
        "Write the path of the largest file under data/ (from here, as data/…) to largest.txt.",
        is_text("largest.txt", answer),
        "find data -type f -printf '%s %p\\n' | sort -n | tail -1 | cut -d' ' -f2 > largest.txt",
    )


def replace(rng: random.Random) -> Item:
    old, new = rng.sample(WORDS, 2)
    lines = [" ".join(rng.choices([*WORDS, old], k=6)) for _ in range(12)]
    fixed = "\n".join(line.replace(old, new) for line in lines)
    return Item(
        {"story.txt": "\n".join(lines) + "\n"},
        f"Replace every `{old}` in story.txt by `{new}`.",
        is_text("story.txt", fixed) if old in "".join(lines) else "false",
        f"sed -i s/{old}/{new}/g story.txt",
    )


def errors(rng: random.Random) -> Item:
    levels = rng.choices(["INFO", "WARN", "ERROR"], k=40)
    log = "".join(f"{number:04} {level} {rng.choice(WORDS)}\n" for number, level in enumerate(levels))
    return Item(
        {"server.log": log},
        "How many lines of server.log are of the level ERROR? Write the number to errors.txt.",
        is_text("errors.txt", str(levels.count("ERROR"))),
        "grep -c ' ERROR ' server.log > errors.txt || true",
    )


KINDS: list[Callable[[random.Random], Item]] = [total, rename, largest, replace, errors]


def generate(count: int, seed: int) -> Iterator[Item]:
    """So many items, each kind in turn; the same for the same seed."""
    rng = random.Random(seed)
    for number in range(count):
        yield KINDS[number % len(KINDS)](rng)


class TerminalTasks(HermesEnv):
    name = "terminal-tasks"
    server_cls = StockVLLMServer

    @classmethod
    def config_init(cls) -> tuple[HermesEnvConfig, list[APIServerConfig]]:
        model = "NousResearch/Hermes-4-14B"
        config = HermesEnvConfig(tokenizer_name=model, group_size=8, enabled_toolsets=["terminal"], max_iterations=20)
        return config, [APIServerConfig(base_url="http://localhost:8000/v1", model_name=model)]

    def items(self) -> Iterator[Item]:
        return generate(25, seed=0)

    async def prepare(self, item: Item, task: Any) -> None:
        for path, content in item.files.items():
            await task.write_file(path, content)

    def prompt(self, item: Item) -> str:
        return item.goal

    async def verify(self, item: Item, task: Any, result: Any) -> float:
        return float((await task.terminal(item.check)).exit_code == 0)

    async def solve(self, item: Item, task: Any) -> str:
        await task.terminal(item.solution)
        return "Done."


if __name__ == "__main__":
    TerminalTasks.cli()
