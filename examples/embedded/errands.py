"""Errands: small jobs with Hermes' terminal and file tools, which the model in the package was taught and half learned.

    hermes-atropos validate examples/embedded/errands.py:Errands

Each asks for something about one file, and for the answer in another. The items that the environment trains and is
evaluated on have names that the model was not taught with.
"""

from __future__ import annotations

import random
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from atroposlib.envs.base import APIServerConfig
from pydantic import Field

from hermes_atropos import HermesEnv, HermesEnvConfig, StockVLLMServer
from hermes_atropos.errors import UnsafePathError

__all__ = ["Errand", "Errands", "errands", "is_done"]

#: Words of the names in teaching, beside made-up ones, and of the names that are not taught.
TAUGHT = (
    "amber anchor apple atlas basin beacon birch bridge canal candle cedar cloud clover copper coral cotton delta "
    "desert ember engine fabric falcon feather fern field forest garden ginger glacier grove hammer hazel hollow "
    "island ivory jacket kettle ladder lantern lemon linen marble meadow mirror needle north olive orchard otter "
    "paper pebble pepper pine planet pocket prairie quartz ribbon river saddle silver spruce stable summit timber "
    "tulip valley velvet violet"
).split()
HELD_OUT = (
    "bison banjo barrel cabin carbon condor fender funnel gander heron jargon kennel kernel lava lumen "
    "mango manor marlin melon mussel nova panel pelican puma radar raven robin salmon siren solar sonar "
    "talon tango tanker tarpon tartan tassel tenor tinsel tuba tuna tunnel turban vessel wagon"
).split()

#: What the files are about: none of it matters.
FILLER = (
    "the a of and to in is on we saw more than one day time again under over near then what small old new two".split()
)


@dataclass(frozen=True)
class Errand:
    """A job: the file it is about, what is asked, where the answer goes, what it is, and a command that prints it."""

    kind: str
    file: str
    text: str
    question: str
    place: str
    answer: str
    command: str

    @property
    def goal(self) -> str:
        # What is asked stands at the end, where the model finds it before it has learned to look far back.
        return f"Read `{self.file}`, and write to `{self.place}` {self.question}."


def errands(seed: int, *, taught: bool = False) -> Iterator[Errand]:
    """Errands without end, each kind in turn, the same for the same seed; with the names of teaching or with others."""
    rng = random.Random(seed)
    while True:
        for make in (lines, words, total, value):
            stem, place = (name(rng, taught) for _ in range(2))
            if stem != place:
                yield make(rng, stem, place, taught)


def name(rng: random.Random, taught: bool) -> str:
    if not taught:
        return rng.choice(HELD_OUT)
    if rng.random() < 0.4:
        return rng.choice(TAUGHT)
    length = rng.randint(2, 4)
    return "".join(
        rng.choice("bcdfghjklmnprstvwz") + rng.choice("aeiou") + rng.choice(" lnrs").strip() for _ in range(length)
    )


def lines(rng: random.Random, stem: str, place: str, taught: bool) -> Errand:
    text = prose(rng)
    file, count = f"{stem}.txt", text.count("\n")
    return Errand("lines", file, text, "how many lines it has", f"{place}.txt", str(count), f"wc -l < '{file}'")


def words(rng: random.Random, stem: str, place: str, taught: bool) -> Errand:
    text = prose(rng)
    file, count = f"{stem}.txt", len(text.split())
    return Errand("words", file, text, "how many words it has", f"{place}.txt", str(count), f"wc -w < '{file}'")


def prose(rng: random.Random) -> str:
    return "".join(" ".join(rng.choices(FILLER, k=rng.randint(1, 6))) + "\n" for _ in range(rng.randint(3, 25)))


def total(rng: random.Random, stem: str, place: str, taught: bool) -> Errand:
    rows = [[name(rng, taught), *(str(rng.randint(1, 99)) for _ in range(3))] for _ in range(rng.randint(3, 12))]
    file, column = f"{stem}.csv", rng.randint(2, 4)
    return Errand(
        "total",
        file,
        "".join(",".join(row) + "\n" for row in rows),
        f"the sum of its column {column}",
        f"{place}.txt",
        str(sum(int(row[column - 1]) for row in rows)),
        f"awk -F, '{{s += ${column}}} END {{print s}}' '{file}'",
    )


def value(rng: random.Random, stem: str, place: str, taught: bool) -> Errand:
    keys: list[str] = []
    for _ in range(rng.randint(4, 12)):
        key = name(rng, taught)
        if key not in keys:
            keys.append(key)
    values = {key: str(rng.randint(10, 999)) for key in keys}
    file, key = f"{stem}.txt", rng.choice(keys)
    return Errand(
        "value",
        file,
        "".join(f"{key}={value}\n" for key, value in values.items()),
        f"the value of `{key}`",
        f"{place}.txt",
        values[key],
        f"grep '^{key}=' '{file}'",
    )


async def is_done(errand: Errand, task: Any) -> bool:
    """Whether the answer stands where it was asked for, and the file is as it was."""
    try:
        answer, text = [await task.read_bytes(path) for path in (errand.place, errand.file)]
    except (OSError, UnsafePathError):
        return False
    return answer.strip() == errand.answer.encode() and text == errand.text.encode()


class ErrandsConfig(HermesEnvConfig):
    seed: int = Field(default=1, description="Which errands are trained on; those of an evaluation have seed 0.")


class Errands(HermesEnv):
    name = "errands"
    env_config_cls = ErrandsConfig
    server_cls = StockVLLMServer

    @classmethod
    def config_init(cls) -> tuple[ErrandsConfig, list[APIServerConfig]]:
        from hermes_atropos.embedded import MODEL

        config = ErrandsConfig(
            tokenizer_name=str(MODEL), group_size=8, max_iterations=6, max_token_length=160, eval_size=32
        )
        return config, [APIServerConfig(base_url="http://localhost:8000/v1", model_name="embedded")]

    def items(self) -> Iterator[Errand]:
        return errands(self.config.seed)

    def eval_items(self) -> Iterator[Errand]:
        return errands(0)

    async def prepare(self, item: Errand, task: Any) -> None:
        await task.write_file(item.file, item.text)

    def prompt(self, item: Errand) -> str:
        return item.goal

    async def verify(self, item: Errand, task: Any, result: Any) -> float:
        """1 where the errand is done and each call was well-formed."""
        calls = [call for step in result["trajectory"].steps for call in step.tool_calls]
        return float(await is_done(item, task) and all(call.error is None for call in calls))

    async def solve(self, item: Errand, task: Any) -> str:
        await task.terminal(f"{item.command} | sed 's/.*=//' > {shlex.quote(item.place)}")
        return "Done."


if __name__ == "__main__":
    Errands.cli()
