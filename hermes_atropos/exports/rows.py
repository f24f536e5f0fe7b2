"""What the other trainers take in common: a prompt, what came behind it, and which of that is trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hermes_atropos.errors import ConfigurationError
from hermes_atropos.exports.atropos import MASK, group_of, scored_rollouts

if TYPE_CHECKING:
    from hermes_atropos.trajectory import AgentResult

__all__ = ["Row", "one_each", "row_of", "rows_of"]


@dataclass(frozen=True, slots=True)
class Row:
    """A sequence of a group.

    Attributes:
        prompt_ids: ``[prompt_len] int``, what stands before the first token that is trained.
        completion_ids: ``[completion_len] int``, all from there on: what was sampled, and what tools and users said
            in between.
        mask: ``[completion_len] int``, 1 where the token is trained, 0 elsewhere.
        logprobs: ``[completion_len] float``, 0.0 where it is not trained.
    """

    prompt_ids: list[int]
    completion_ids: list[int]
    mask: list[int]
    logprobs: list[float]


def row_of(tokens: list[int], masks: list[int], logprobs: list[float]) -> Row:
    """A sequence in Atropos' format, three lists of ``[seq_len]``, as a row."""
    mask = [int(masked != MASK) for masked in masks]
    start = mask.index(1) if 1 in mask else len(mask)
    kept = [logprob if trained else 0.0 for trained, logprob in zip(mask[start:], logprobs[start:], strict=True)]
    return Row(tokens[:start], tokens[start:], mask[start:], kept)


def rows_of(group: Mapping[str, Any], trainer: str) -> list[Row]:
    """The sequences of an atroposlib ``ScoredDataGroup``, such as :func:`exports.atropos.scored_group` makes.

    Raises:
        ConfigurationError: its tokens have advantages of their own, and the trainer takes one reward for each rollout.
    """
    if group["advantages"] is not None:
        raise ConfigurationError(
            f"steps of these rollouts have rewards of their own, and {trainer} takes one reward for each rollout: add "
            "them to the score"
        )
    return list(map(row_of, group["tokens"], group["masks"], group["inference_logprobs"]))


def one_each(results: Sequence[AgentResult], scores: Sequence[float], trainer: str) -> dict[str, Any]:
    """The rollouts as a ``ScoredDataGroup`` for a trainer that takes one sequence of each.

    Raises:
        UntrackedError: a rollout has no token ids or must not be trained on, or none of them sampled anything.
        ConfigurationError: a rollout has no sequence, or several; a score is not finite, or there is not one score for
            each rollout.
    """
    rollouts = scored_rollouts(results, scores)
    for number, items in enumerate(rollouts):
        if len(items) != 1:
            raise ConfigurationError(
                f"rollout {number} has {len(items)} sequences, and {trainer} takes one of each rollout: leave it out, "
                "or switch off what rewrites its history (compression, subagents, a template that drops reasoning)"
            )
    return group_of([item for [item] in rollouts], results[0].sampling)
