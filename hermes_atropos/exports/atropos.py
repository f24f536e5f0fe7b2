"""Atropos' formats: masks and logprobs, ``SequenceNode``, ``ScoredDataItem`` and ``ScoredDataGroup``.

A position that is not trained has the mask -100 and the logprob 1.0; one that is trained has its token as the mask, and
the logprob with which it was sampled.
"""

from __future__ import annotations

import copy
import functools
import itertools
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hermes_atropos.errors import ConfigurationError, TokenFidelityError, UntrackedError
from hermes_atropos.tokens import UNKNOWN, Span
from hermes_atropos.tokens import Sequence as TokenSequence
from hermes_atropos.values import is_number, plain

if TYPE_CHECKING:
    from atroposlib.envs.server_handling.managed_server import SequenceNode

    from hermes_atropos.trajectory import AgentResult, SequenceData

__all__ = [
    "MASK",
    "PROMPT_LOGPROB",
    "ManagedState",
    "from_masks",
    "group_of",
    "logprobs",
    "masks",
    "scored_group",
    "scored_items",
    "scored_rollouts",
    "sequence_node",
]

logger = logging.getLogger(__name__)

#: What stands in ``masks`` and in ``logprobs`` where a token is not trained.
MASK = -100
PROMPT_LOGPROB = 1.0


def masks(sequence: TokenSequence) -> list[int]:
    """[seq_len] int: the token where it is trained, -100 elsewhere."""
    values = [MASK] * len(sequence)
    for span in sequence.spans:
        if span.trained:
            values[span.start : span.end] = sequence.tokens[span.start : span.end]
    return values


def logprobs(sequence: TokenSequence) -> list[float]:
    """[seq_len] float: the logprob of the token where it is trained, 1.0 elsewhere."""
    values = [PROMPT_LOGPROB] * len(sequence)
    for span in sequence.spans:
        if span.trained:
            values[span.start : span.end] = span.logprobs
    return values


def from_masks(tokens: list[int], masks: list[int], logprobs: list[float]) -> list[Span]:
    """The trained spans of Atropos' three lists, [seq_len] each.

    Raises:
        TokenFidelityError: they differ in length, or a position is neither trained nor masked.
    """
    if not len(tokens) == len(masks) == len(logprobs):
        raise TokenFidelityError(
            "tokens, masks and logprobs differ in length",
            expected=f"{len(tokens)} of each",
            found=f"{len(masks)} masks and {len(logprobs)} logprobs",
        )

    def fit(start: int, end: int, masked: bool) -> bool:
        ids, values = tokens[start:end], logprobs[start:end]
        if {*map(type, ids)} != {int}:
            return False
        if masked:
            return MASK not in ids and values.count(PROMPT_LOGPROB) == len(values)
        sampled = ids == masks[start:end] and min(ids) >= 0 and {*map(type, values)} == {float}
        return sampled and all(-math.inf < value <= 0 for value in values)

    spans = []
    end = 0
    for masked, run in itertools.groupby(masks, key=lambda mask: mask == MASK):
        start, end = end, end + len(list(run))
        if not fit(start, end, masked):
            position = next(position for position in range(start, end) if not fit(position, position + 1, masked))
            raise TokenFidelityError(
                f"position {position} is neither trained nor masked",
                position=position,
                expected="(token, token, finite logprob <= 0) or (token, -100, 1.0)",
                found=(tokens[position], masks[position], logprobs[position]),
            )
        if not masked:
            spans.append(Span(start, end, logprobs[start:end]))
    return spans


def sequence_node(sequence: SequenceData) -> SequenceNode:
    """The sequence as an atroposlib ``SequenceNode``, with lists of its own."""
    from atroposlib.envs.server_handling.managed_server import SequenceNode

    # Not validated: the lists are what they should be, and checking them takes longer than all else.
    return SequenceNode.model_construct(**{name: copy.copy(value) for name, value in sequence.as_dict().items()})


class ManagedState(Mapping[str, "list[SequenceNode]"]):
    """What atroposlib's managed server calls its state: ``{"nodes": [...]}``, a node for each sequence.

    The nodes are made when they are first read.
    """

    def __init__(self, sequences: Sequence[SequenceData]) -> None:
        self._sequences = sequences

    @functools.cached_property
    def _nodes(self) -> list[SequenceNode]:
        return [sequence_node(sequence) for sequence in self._sequences]

    def __getitem__(self, key: str) -> list[SequenceNode]:
        if key != "nodes":
            raise KeyError(key)
        return self._nodes

    def __iter__(self) -> Iterator[str]:
        return iter(("nodes",))

    def __len__(self) -> int:
        return 1


def scored_items(result: AgentResult, score: float, *, include_discarded: bool = False) -> list[dict[str, Any]]:
    """One atroposlib ``ScoredDataItem`` for each sequence of a rollout; empty where nothing was sampled.

    ``BaseEnv.collect_trajectory`` can return one item only, and the default ``collect_trajectories`` drops
    ``inference_logprobs``; override ``collect_trajectories`` and return ``scored_group`` to keep both.

    Args:
        result: the rollout.
        score: of the whole rollout; each of its sequences carries it.
        include_discarded: train also on what the harness threw away.

    Returns:
        dicts with ``tokens``, ``masks``, ``inference_logprobs`` (each ``[seq_len]``), ``scores``, ``messages``,
        ``overrides`` (the ``temperature``, which the trainer divides its logits by, and where the server told them the
        ``weights`` that sampled it: ``start``, ``end``, ``version`` of each stretch), and ``advantages``
        (``[seq_len]``, or None if no step has a reward): for a sampled token its step's reward, or the score if
        that step has none; 0.0 elsewhere. No baseline is subtracted: that takes the whole group.

    Raises:
        UntrackedError: the rollout has no token ids, or must not be trained on.
        ConfigurationError: the score or a step's reward is not finite.
    """
    if not result.tracked:
        raise UntrackedError(
            "this rollout ran on a server without token ids: it has messages for evaluation and SFT, but no tokens "
            "to train on. Use a server that tracks tokens (vLLM, SGLang, or any APIServer with a token call)"
        )
    if result.untrainable:
        raise UntrackedError(f"this rollout must not be trained on: {result.untrainable}")
    if not math.isfinite(score):
        raise ConfigurationError(f"a score must be a finite number, not {score!r}")
    score = float(score)
    sequences = (include_discarded and result.all_sequences) or result.sequences
    trained = [sequence for sequence in sequences if sequence.trainable_tokens or not _skew(sequence)]
    if sequences and not trained:
        raise UntrackedError(
            f"nothing here may be trained on ({_skew(sequences[0])}): sample from the model's own distribution, "
            "temperature=1 and no top_k, top_p and the like, or give train_skewed=True with the sampling parameters"
        )
    messages = [{**message, "content": message.get("content") or ""} for message in result.to_messages()]
    return [
        {
            "tokens": list(sequence.tokens),
            "masks": list(sequence.masked_tokens),
            "scores": score,
            "advantages": _advantages(result, sequence, score),
            "ref_logprobs": None,
            "inference_logprobs": list(sequence.logprobs),
            "messages": messages,
            "group_overrides": None,
            "overrides": _overrides(result, sequence),
            "images": None,
        }
        for sequence in trained
    ]


def _overrides(result: AgentResult, sequence: SequenceData) -> dict[str, Any]:
    turns = sequence.metadata.get("turns", ())
    told = [part for turn in turns for part in turn.get("weights", ()) if part["version"] != UNKNOWN]
    found = {"temperature": result.sampling.get("temperature"), "weights": told or None}
    return {name: value for name, value in found.items() if value is not None}


def _skew(sequence: SequenceData) -> str | None:
    """Why the logprobs of one of its turns are not of what was sampled from."""
    return next((turn["skew"] for turn in sequence.metadata.get("turns", ()) if turn.get("skew")), None)


def scored_group(
    results: Sequence[AgentResult], scores: Sequence[float], *, include_discarded: bool = False
) -> dict[str, Any]:
    """The rollouts of one item as an atroposlib ``ScoredDataGroup``: what ``collect_trajectories`` returns.

    A rollout whose history was rewritten adds several sequences, and one that sampled nothing adds none. So the group's
    own size stands in ``group_overrides["group_size"]``: ``BaseEnv`` skips a group of another size than the configured
    one. It also skips a group whose scores are all the same (``ensure_scores_are_not_same``).

    Args:
        results: the rollouts.
        scores: one for each rollout.
        include_discarded: train also on what the harness threw away.

    Returns:
        ``tokens``, ``masks``, ``inference_logprobs``: ``[n_sequences][seq_len]``; ``scores``, ``messages``,
        ``overrides``: ``[n_sequences]``; ``advantages``: ``[n_sequences][seq_len]``, or None if no step has a reward;
        ``generation_params``; ``group_overrides``.

    Raises:
        UntrackedError: a rollout has no token ids or must not be trained on, or none of them sampled anything.
        ConfigurationError: a score or a reward is not finite, or there is not one score for each rollout.
    """
    rollouts = scored_rollouts(results, scores, include_discarded=include_discarded)
    return group_of([item for items in rollouts for item in items], results[0].sampling)


def scored_rollouts(
    results: Sequence[AgentResult], scores: Sequence[float], *, include_discarded: bool = False
) -> list[list[dict[str, Any]]]:
    """The scored items (:func:`scored_items`) of each rollout; what is raised is as of :func:`scored_group`."""
    if len(results) != len(scores):
        raise ConfigurationError(f"{len(results)} rollouts need as many scores, not {len(scores)}")
    rollouts = []
    for result, score in zip(results, scores, strict=True):
        rollouts.append(scored_items(result, score, include_discarded=include_discarded))
        if not rollouts[-1]:
            logger.warning("a rollout that sampled nothing is left out of its group: %s", result.error)
    if not any(rollouts):
        errors = "; ".join(sorted({result.error or result.stop_reason for result in results})) or "no rollouts"
        raise UntrackedError(f"nothing was sampled, so there is nothing to train on ({errors})")
    return rollouts


def group_of(items: Sequence[Mapping[str, Any]], sampling: Mapping[str, Any]) -> dict[str, Any]:
    """Scored items (:func:`scored_items`) as one atroposlib ``ScoredDataGroup``; see :func:`scored_group`."""
    group: dict[str, Any] = {
        key: [item[key] for item in items]
        for key in ("tokens", "masks", "scores", "inference_logprobs", "messages", "overrides")
    }
    rewarded = any(item["advantages"] for item in items)
    return group | {
        "advantages": [item["advantages"] or _constant(item["masks"], item["scores"]) for item in items]
        if rewarded
        else None,
        "ref_logprobs": None,
        "generation_params": plain(sampling),
        "group_overrides": {"group_size": len(items)},
        "images": None,
    }


def _advantages(result: AgentResult, sequence: SequenceData, score: float) -> list[float] | None:
    if all(step.reward is None for step in result.steps):
        return None
    rewards: dict[str, float] = {}
    for step in result.steps:
        if step.reward is not None:
            if not is_number(step.reward):
                raise ConfigurationError(
                    f"step {step.step_number} has the reward {step.reward!r}: give a finite number"
                )
            rewards |= dict.fromkeys(step.turns, float(step.reward))
    advantages = _constant(sequence.masked_tokens, score)
    for turn in sequence.metadata.get("turns", ()):
        if turn["ref"] in rewards:
            for position in range(turn["start"], turn["end"]):
                if sequence.masked_tokens[position] != MASK:
                    advantages[position] = rewards[turn["ref"]]
    return advantages


def _constant(masks: Sequence[int], score: float) -> list[float]:
    return [0.0 if mask == MASK else score for mask in masks]
