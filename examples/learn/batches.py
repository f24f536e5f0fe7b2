"""What a trainer reads out of a batch of Atropos' API: which tokens are trained, how, and what was recorded of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, pstdev
from typing import Any

from hermes_atropos.exports.atropos import from_masks

__all__ = ["Group", "Row", "chunks", "read", "shared"]


@dataclass(frozen=True)
class Row:
    """One sequence.

    Attributes:
        tokens: [length] int, what was sent and sampled.
        places: where the tokens stand that are trained.
        recorded: their logprobs when they were sampled, one for each place.
        versions: of the weights that sampled them, one for each place; None where the server did not tell.
        advantages: one for each place.
        temperature: at which they were sampled.
    """

    tokens: list[int]
    places: list[int]
    recorded: list[float]
    versions: list[str | None]
    advantages: list[float]
    temperature: float


@dataclass(frozen=True)
class Group:
    """The sequences of one item.

    Attributes:
        key: tells it from all other groups, the other groups of its item included.
        item: the same for all groups of an item's rollouts.
        scores: one for each row.
        metrics: what the verifiers measured, by name: means over the rollouts.
    """

    key: str
    item: str
    scores: list[float]
    metrics: dict[str, float]
    rows: list[Row]

    @property
    def teaches(self) -> bool:
        """Whether any advantage is not 0."""
        return any(any(row.advantages) for row in self.rows)


def read(data: Mapping[str, Any]) -> Group:
    """A ``ScoredDataGroup``, with the advantages of GRPO (https://arxiv.org/abs/2402.03300, 4.1.2).

    A token's advantage is the score of its row, or the token's own where the environment gives one, less the mean of
    the group's scores, divided by their standard deviation.

    Raises:
        TokenFidelityError: tokens, masks and logprobs do not fit together.
    """
    mean, spread = fmean(data["scores"]), pstdev(data["scores"]) or 1.0
    overrides = data["group_overrides"] or {}
    columns = (data["tokens"], data["masks"], data["inference_logprobs"], data["scores"])
    given = data["advantages"] or [None] * len(data["tokens"])
    rows = []
    for tokens, masks, logprobs, score, own, told in zip(*columns, given, data["overrides"], strict=True):
        spans = from_masks(tokens, masks, logprobs)
        places = [place for span in spans for place in range(span.start, span.end)]
        values = [score if own is None else own[place] for place in places]
        rows.append(
            Row(
                tokens,
                places,
                [logprobs[place] for place in places],
                versions(told.get("weights", ()), places),
                [(value - mean) / spread for value in values],
                told.get("temperature") or 1.0,
            )
        )
    content = json.dumps([data["tokens"], data["masks"]]).encode()
    item = str(overrides.get("group_id"))
    key = f"{item}-{hashlib.sha256(content).hexdigest()[:12]}"
    return Group(key, item, data["scores"], overrides.get("metrics", {}), rows)


def chunks(rows: Sequence[Row], size: int) -> Iterator[list[Row]]:
    """So many rows at a time, those of like length together."""
    by_length = sorted(rows, key=lambda row: len(row.tokens))
    for start in range(0, len(rows), size):
        yield by_length[start : start + size]


def versions(weights: Sequence[Mapping[str, Any]], places: Sequence[int]) -> list[str | None]:
    """Which weights sampled the tokens at ``places``."""
    of_place = {place: part["version"] for part in weights for place in range(part["start"], part["end"])}
    return [of_place.get(place) for place in places]


def shared(rows: Sequence[Row]) -> int:
    """How long the start is that all rows have in common, up to the token before the first that is trained.

    That token's own output says how likely the first trained one is, in each row.
    """
    first, last = (choose(row.tokens for row in rows) for choose in (min, max))  # between them lie all others
    same = next((place for place, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    return min(same, *(row.places[0] - 1 for row in rows))
