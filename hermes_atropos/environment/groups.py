"""The rollouts of one item as groups that Atropos' API takes.

The API holds back a group whose number of sequences is not the ``group_size`` that the environment registered, until
others add up to it; and a trainer takes the mean of a group's scores for its baseline. So every group that is sent has
``group_size`` rows, and each rollout has the same number of them, whatever became of it: a rollout with two sequences
makes two groups, in which the others' sequences are divided. A divided sequence is read in both groups, and each of its
sampled tokens is trained in one.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

from hermes_atropos.environment.config import HermesEnvConfig
from hermes_atropos.exports.atropos import MASK, PROMPT_LOGPROB, group_of, scored_items
from hermes_atropos.toolcalls import ParseStatus
from hermes_atropos.trajectory import AgentResult

__all__ = ["arranged", "means", "rows"]

#: One sequence as Atropos' API takes it: an atroposlib ``ScoredDataItem``.
Row = dict[str, Any]


def rows(result: AgentResult, score: float, config: HermesEnvConfig) -> list[Row]:
    """The sequences of a rollout as the policies have them; empty where nothing is left to train on.

    Raises:
        UntrackedError, ConfigurationError: as ``scored_items``.
    """
    discarded = config.discarded_attempts == "train"
    sequences = iter((discarded and result.all_sequences) or result.sequences)
    malformed = _malformed_turns(result) if config.malformed_calls != "keep" else set()
    found = []
    for row in scored_items(result, score, include_discarded=discarded):
        sequence = next(sequence for sequence in sequences if sequence.tokens == row["tokens"])
        turns = sequence.metadata.get("turns", ())
        if sequence.mixed_weights:
            if config.mixed_weights == "drop":
                continue
            if config.mixed_weights == "mask":
                stretches = [part for turn in turns for part in turn["weights"]]
                for part in stretches:
                    if part["version"] != stretches[-1]["version"]:
                        _mask(row, part["start"], part["end"])
        for turn in turns:
            if turn["ref"] in malformed and config.malformed_calls == "mask":
                _mask(row, turn["start"], turn["end"])
            elif turn["ref"] in malformed and config.malformed_calls == "penalise":
                _penalise(row, turn["start"], turn["end"], config.malformed_penalty)
        if _trained(row):
            found.append(row)
    if config.extra_sequences == "longest" and found:
        found = [max(found, key=_trained)]
    return found


def arranged(rollouts: Sequence[Sequence[Row]], group_size: int, sampling: Any) -> list[dict[str, Any]]:
    """Groups of ``group_size`` rows each, over which every rollout has an equal share.

    Args:
        rollouts: for each rollout its rows, at least one.
        group_size: what the environment registered.
        sampling: the sampling parameters of the rollouts.

    Returns:
        atroposlib ``ScoredDataGroup``s. The last is smaller where sequences of a single sampled token can't be divided.
    """
    parts = [list(of_rollout) for of_rollout in rollouts]
    count = max(map(len, parts))
    while sum(map(len, parts)) < count * group_size:
        for of_rollout in sorted(parts, key=len):
            longest = max(of_rollout, key=_trained)
            if _trained(longest) > 1:
                place = of_rollout.index(longest)
                of_rollout[place : place + 1] = _halves(longest)
                break
        else:
            break
    dealt = [row for in_turn in itertools.zip_longest(*parts) for row in in_turn if row is not None]
    chunks = [dealt[start : start + group_size] for start in range(0, len(dealt), group_size)]
    return [group_of(chunk, sampling) for chunk in chunks]


def means(measured: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """By name, the means of what was measured several times."""
    values: defaultdict[str, list[float]] = defaultdict(list)
    for once in measured:
        for name, value in once.items():
            values[name].append(float(value))
    return {name: fmean(found) for name, found in values.items()}


def _trained(row: Row) -> int:
    return len(row["masks"]) - row["masks"].count(MASK)


def _halves(row: Row) -> tuple[Row, Row]:
    """Two rows that train half of a row's sampled tokens each; the first ends where its half does."""
    trained = [place for place, mask in enumerate(row["masks"]) if mask != MASK]
    cut = trained[len(trained) // 2]
    lists = [name for name in ("tokens", "masks", "inference_logprobs", "advantages") if row[name]]
    first = row | {name: row[name][:cut] for name in lists}
    second = row | {name: list(row[name]) for name in lists}
    _mask(second, 0, cut)
    return first, second


def _malformed_turns(result: AgentResult) -> set[str]:
    """The references of the model calls that wrote a tool call which could not be run."""
    refs: set[str] = set()
    for step in result.steps:
        refs.update(step.turns[:-1])  # each was answered with the fault, and followed by another
        own = step.tool_calls if len(step.turns) == 1 else step.tool_calls[-1:]
        if any(call.status is not ParseStatus.OK for call in own):
            refs.update(step.turns[-1:])
    return refs


def _mask(row: Row, start: int, end: int) -> None:
    row["masks"][start:end] = [MASK] * (end - start)
    row["inference_logprobs"][start:end] = [PROMPT_LOGPROB] * (end - start)
    if row["advantages"]:
        row["advantages"][start:end] = [0.0] * (end - start)


def _penalise(row: Row, start: int, end: int, penalty: float) -> None:
    if row["advantages"] is None:
        row["advantages"] = [0.0 if mask == MASK else row["scores"] for mask in row["masks"]]
    for place in range(start, end):
        if row["masks"][place] != MASK:
            row["advantages"][place] = row["scores"] - penalty
