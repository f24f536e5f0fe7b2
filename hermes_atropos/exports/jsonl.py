"""Plain JSONL: a sequence a line, for trainers that read files, and for conversion in a line of Python.

The names are those of SkyRL's pretokenised data sets (``input_ids``, ``loss_mask``; ``skyrl/train/dataset/
pretokenized.py``). ``docs/training.md`` has the conversions to prime-rl's ``TrainingSample`` and SkyRL's
``GeneratorOutput``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hermes_atropos.exports.atropos import scored_rollouts
from hermes_atropos.exports.rows import row_of
from hermes_atropos.values import plain

if TYPE_CHECKING:
    from hermes_atropos.trajectory import AgentResult

__all__ = ["jsonl_rows", "write_jsonl"]


def jsonl_rows(
    results: Sequence[AgentResult], scores: Sequence[float], *, include_discarded: bool = False
) -> list[dict[str, Any]]:
    """A dict for each sequence of the rollouts of an item; all that is in it is JSON.

    Returns:
        dicts with ``input_ids``, ``loss_mask`` (1 where a token is trained), ``logprobs`` (0.0 where it is not), each
        ``[seq_len]``; ``prompt_length``: how many tokens stand before the first that is trained; ``rollout``: which of
        the results it is of, from 0; ``reward``: the rollout's score; ``advantages``: ``[seq_len]`` or None, as of
        ``scored_items``; ``temperature``; ``stop_reason``.

    Raises:
        UntrackedError, ConfigurationError: as :func:`hermes_atropos.exports.atropos.scored_group`.
    """
    rollouts = scored_rollouts(results, scores, include_discarded=include_discarded)
    return [
        {
            "input_ids": item["tokens"],
            "loss_mask": [0] * len(row.prompt_ids) + row.mask,
            "logprobs": [0.0] * len(row.prompt_ids) + row.logprobs,
            "prompt_length": len(row.prompt_ids),
            "rollout": number,
            "reward": item["scores"],
            "advantages": item["advantages"],
            "temperature": item["overrides"].get("temperature", 1.0),
            "stop_reason": str(results[number].stop_reason),
        }
        for number, items in enumerate(rollouts)
        for item in items
        for row in [row_of(item["tokens"], item["masks"], item["inference_logprobs"])]
    ]


def write_jsonl(rows: Iterable[Mapping[str, Any]], path: str | Path) -> None:
    """Append rows to a file, a line for each; missing folders are made."""
    lines = "".join(json.dumps(plain(row), allow_nan=False) + "\n" for row in rows)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with Path(path).open("ab", buffering=0) as file:
        file.write(lines.encode())
