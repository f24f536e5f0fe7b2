"""verl's format: what the ``run`` of an ``AgentLoopBase`` returns.

The fields are those of ``AgentLoopOutput`` in verl 0.9 (``verl/experimental/agent_loop/agent_loop.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hermes_atropos.exports.rows import one_each, rows_of

if TYPE_CHECKING:
    from hermes_atropos.trajectory import AgentResult

__all__ = ["agent_loop_outputs"]


def agent_loop_outputs(results: Sequence[AgentResult], scores: Sequence[float]) -> list[dict[str, Any]]:
    """The arguments of one ``AgentLoopOutput`` for each rollout.

    Returns:
        dicts with ``prompt_ids``, ``response_ids``, ``response_mask`` (1 where a token is trained),
        ``response_logprobs`` (0.0 where it is not), ``reward_score``, ``num_turns`` (messages beside the system
        prompt), ``metrics`` and ``extra_fields`` (``stop_reason``).

    Raises:
        UntrackedError, ConfigurationError: as ``one_each`` and ``rows_of`` of :mod:`hermes_atropos.exports.rows`.
    """
    group = one_each(results, scores, "verl")
    return [
        {
            "prompt_ids": row.prompt_ids,
            "response_ids": row.completion_ids,
            "response_mask": row.mask,
            "response_logprobs": row.logprobs,
            "reward_score": score,
            "num_turns": sum(message["role"] != "system" for message in result.messages),
            "metrics": {},
            "extra_fields": {"stop_reason": str(result.stop_reason)},
        }
        for row, result, score in zip(rows_of(group, "verl"), results, group["scores"], strict=True)
    ]
