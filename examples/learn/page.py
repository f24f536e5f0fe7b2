"""What a run has come to: in a line, in a verdict, and on a page of curves."""

from __future__ import annotations

import html
import json
import random
import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from run import Run

__all__ = ["Verdict", "in_words", "permutation_test", "verdict", "write"]

HERE = Path(__file__).resolve().parent

#: Exchanges that the permutation test draws, and the share below which a rise is significant.
DRAWS, SIGNIFICANT = 20_000, 0.01

#: The curves of the page: the title, what it shows, and the names of its lines.
CURVES = {
    "Reward": ("mean of a step's rollouts, and their standard deviation", ("reward", "spread")),
    "Tool calls": ("those in a rollout, and those of them that could be run as written", ("calls", "valid_calls")),
    "Tokens": ("trained in a step", ("tokens",)),
    "Difference": (
        "between the trainer's and the recorded logprobs, where both are of the same weights: largest and mean",
        ("difference", "difference_mean"),
    ),
    "Gap": ("mean difference of all logprobs, those of the step before included", ("gap",)),
    "Clipped": ("share of tokens whose ratio left the bounds", ("clipped",)),
    "Deviation": ("of the recorded logprobs' sum, in standard deviations", ("deviation",)),
    "Age": ("steps between sampling and training, mean and largest", ("age", "age_largest")),
    "Sequences": ("of a rollout: more than 1 if more is trained than what it led to", ("sequences_a_rollout",)),
    "Seconds": ("waiting for rollouts, and training", ("seconds_drawing", "seconds_training")),
}

WIDTH, HEIGHT = 420, 130


def in_words(line: dict[str, Any]) -> str:
    """A step in a line of text."""
    difference = "nothing to compare" if line["difference"] is None else f"Δ {line['difference']:.0e}"
    seconds = line["seconds_drawing"] + line["seconds_training"]
    valid = line["valid_calls"] / line["calls"] if line["calls"] else 0
    return (
        f"step {line['step']:3}  reward {line['reward']:.2f} {bar(line['reward'])}  "
        f"{valid:4.0%} of calls valid  {line['tokens']:6,} tokens  {difference}  {seconds:3.0f} s"
    )


def bar(share: float, length: int = 20) -> str:
    full = round(max(0.0, min(1.0, share)) * length)
    return "█" * full + "·" * (length - full)


@dataclass(frozen=True)
class Verdict:
    """
    Attributes:
        before, after: mean rewards of the same held-out items.
        items: how many there are.
        chance: of a rise like this if training made no difference.
    """

    before: float
    after: float
    items: int
    chance: float

    @property
    def significant(self) -> bool:
        return self.after > self.before and self.chance < SIGNIFICANT

    def __str__(self) -> str:
        return (
            f"{self.items} held-out items: mean reward {self.before:.2f} before and {self.after:.2f} after training; "
            f"p = {self.chance:.2g} (one-sided permutation test over items)"
        )


def verdict(run: Run) -> Verdict | None:
    """Of the evaluations; None while one is missing."""
    scores = [evaluated(run.folder / "evaluations" / when) for when in ("before", "after")]
    if not all(scores):
        return None
    both = sorted(scores[0].keys() & scores[1].keys())
    before, after = ([of_item[number] for number in both] for of_item in scores)
    return Verdict(fmean(before), fmean(after), len(both), permutation_test(before, after))


def evaluated(folder: Path) -> dict[int, float]:
    """The scores of an evaluation, by the number of the item."""
    path = folder / "samples.jsonl"
    samples = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {sample["number"]: sample["score"] for sample in samples if "score" in sample}


def permutation_test(before: Sequence[float], after: Sequence[float]) -> float:
    """How likely the mean rises by as much as it did, or by more, if before and after may be exchanged in each pair.

    See Ernst, "Permutation Methods: A Basis for Exact Inference" (2004), https://doi.org/10.1214/088342304000000396.
    """
    rises = [new - old for old, new in zip(before, after, strict=True)]
    seen, rng = sum(rises), random.Random(0)
    as_much = sum(sum(rng.choice((rise, -rise)) for rise in rises) >= seen - 1e-9 for _ in range(DRAWS))
    return (as_much + 1) / (DRAWS + 1)


def write(run: Run) -> Path:
    """The page, which needs nothing beside itself."""
    lines = run.lines()
    found = verdict(run)
    curves = [figure(title, says, names, lines) for title, (says, names) in CURVES.items()]
    settings = ", ".join(f"{name} {value}" for name, value in vars(run.settings).items())
    filled = string.Template((HERE / "page.html").read_text()).substitute(
        verdict=html.escape(str(found) if found else f"{len(lines)} of {run.settings.steps} steps"),
        settings=html.escape(settings),
        curves="\n".join(curves),
    )
    path = run.folder / "page.html"
    path.write_text(filled)
    return path


def figure(title: str, says: str, names: Sequence[str], lines: Sequence[dict[str, Any]]) -> str:
    """One diagram, a line for each name."""
    values = [line[name] for name in names for line in lines if line.get(name) is not None]
    low, high = min([0.0, *values]), max([*values, 0.0]) or 1.0
    last = max(len(lines) - 1, 1)
    drawn = []
    for number, name in enumerate(names):
        places = [
            f"{WIDTH * place / last:.1f},{HEIGHT * (high - line[name]) / (high - low):.1f}"
            for place, line in enumerate(lines)
            if line.get(name) is not None
        ]
        drawn.append(f'<polyline class="line{number}" points="{" ".join(places)}"/>')
    key = " ".join(f'<span class="line{number}">{name}</span>' for number, name in enumerate(names))
    return (
        f"<figure><figcaption><b>{title}</b> {html.escape(says)}<br>{key}</figcaption>"
        f'<svg viewBox="-60 -12 {WIDTH + 80} {HEIGHT + 34}" role="img" aria-label="{title}">'
        f'<text x="-6" y="6" class="scale">{high:.3g}</text>'
        f'<text x="-6" y="{HEIGHT + 4}" class="scale">{low:.3g}</text>'
        f'<text x="0" y="{HEIGHT + 20}">step 0</text><text x="{WIDTH}" y="{HEIGHT + 20}" class="scale">{last}</text>'
        f'<path class="axes" d="M0 0V{HEIGHT}H{WIDTH}"/>{"".join(drawn)}</svg></figure>'
    )
