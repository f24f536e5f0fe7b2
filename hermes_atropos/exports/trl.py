"""TRL's format: what the ``rollout_func`` of a ``GRPOTrainer`` returns, and such a function.

The contract is that of TRL 1.16 (``rollout_func`` in ``trl/trainer/grpo_trainer.py``), which calls it experimental.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hermes_atropos.errors import ConfigurationError
from hermes_atropos.exports.rows import one_each, rows_of
from hermes_atropos.runtime import run_on_portal

if TYPE_CHECKING:
    from hermes_atropos.trajectory import AgentResult

__all__ = ["rollout_columns", "rollout_func", "rollout_score", "rollouts"]

Columns = dict[str, list[Any]]


def rollouts(results: Sequence[AgentResult], scores: Sequence[float]) -> Columns:
    """Rollouts as a ``rollout_func`` returns them; see :func:`rollout_columns`.

    Raises:
        UntrackedError, ConfigurationError: as ``one_each`` and ``rows_of`` of :mod:`hermes_atropos.exports.rows`.
    """
    return rollout_columns(one_each(results, scores, "TRL"))


def rollout_columns(group: Mapping[str, Any]) -> Columns:
    """An atroposlib ``ScoredDataGroup`` as a ``rollout_func`` returns it.

    Returns:
        ``prompt_ids``, ``completion_ids``, ``logprobs`` (of the sampling; 0.0 where a token is not trained) and
        ``env_mask`` (1 where a token is trained, 0 for what tools and users said), each ``[n][len]``; and ``score``,
        ``[n]``, for the reward function :func:`rollout_score`.

    Raises:
        ConfigurationError: steps have rewards of their own.
    """
    rows = rows_of(group, "TRL")
    return {
        "prompt_ids": [row.prompt_ids for row in rows],
        "completion_ids": [row.completion_ids for row in rows],
        "logprobs": [row.logprobs for row in rows],
        "env_mask": [row.mask for row in rows],
        "score": list(group["scores"]),
    }


def rollout_score(completions: Sequence[Any], *, score: list[float], **others: Any) -> list[float]:
    """A reward function for ``GRPOTrainer``: the scores that the rollouts came with."""
    return score


def rollout_func(collect: Callable[[Any, int], Awaitable[Mapping[str, Any]]]) -> Callable[[list[Any], Any], Columns]:
    """A ``rollout_func`` for ``GRPOTrainer``; its reward function is :func:`rollout_score`.

    All rollouts of a batch run at once, on the event loop that the library keeps for synchronous callers.

    Args:
        collect: called with a prompt of the data set and the number of completions that TRL wants of it; gives as many
            rollouts as a ``ScoredDataGroup``. For an agent, ``scored_group`` makes one; the
            ``collect_trajectories`` of a ``HermesEnv`` gives one with the rest of a backlog, which is empty.

    Raises:
        ConfigurationError: from the function, where a group has not as many rows as TRL wants, steps have rewards of
            their own, or the temperature of the sampling is not the trainer's.
    """

    def roll_out(prompts: list[Any], trainer: Any) -> Columns:
        # TRL repeats a prompt for each of its completions.
        wanted = [(prompt, len(list(run))) for prompt, run in itertools.groupby(prompts)]

        async def collected() -> list[Mapping[str, Any]]:
            return await asyncio.gather(*(collect(prompt, count) for prompt, count in wanted))

        groups = run_on_portal(collected)
        for (_, count), group in zip(wanted, groups, strict=True):
            _check(group, count, trainer.args.temperature)
        columns = [rollout_columns(group) for group in groups]
        return {name: [value for column in columns for value in column[name]] for name in columns[0]}

    return roll_out


def _check(group: Any, count: int, temperature: float) -> None:
    rows = len(group["tokens"]) if isinstance(group, Mapping) else None
    if rows != count:
        found = f"a group of {rows}" if rows is not None else f"{len(group or ())} groups"
        raise ConfigurationError(
            f"TRL wants {count} completions of a prompt, and was given {found}: each rollout must end with one "
            "sequence (for a HermesEnv: group_size=num_generations, extra_sequences='longest')"
        )
    sampled = {overrides.get("temperature", 1.0) for overrides in group["overrides"]}
    if sampled != {temperature}:
        raise ConfigurationError(
            f"the rollouts were sampled at temperature {sampled}, and TRL divides logits by {temperature}: give "
            "GRPOConfig(temperature=…) the temperature of the model calls"
        )
