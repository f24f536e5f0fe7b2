"""Sequences for a trainer, cut from the turns of a ledger, and the report of what became of the tokens."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Collection, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field, fields
from typing import Any

from hermes_atropos.tokens.turns import BreakCause, Prompt, Turn, Weights, stream_ids

__all__ = ["FidelityReport", "Sequence", "Span", "path_to", "paths_of", "report", "wanted"]


@dataclass(frozen=True, slots=True)
class Span:
    """What was sampled in one stretch of a sequence.

    Attributes:
        start, end: its place in the sequence's tokens, ``[start, end)``.
        logprobs: [end - start] float, of the sampled tokens.
        trained: whether this sequence trains it. A turn that several sequences hold is trained in one of them.
        ref: the turn's reference; None where the sequence was made from lists, as that of a record is.
        weights: which weights sampled it, stretch by stretch, by places in the sequence.
        cause: as in ``Prompt``.
        finish_reason, discarded, sampling, skew: as in ``Turn``.
    """

    start: int
    end: int
    logprobs: SequenceOf[float]
    trained: bool = True
    ref: str | None = None
    finish_reason: str | None = None
    discarded: str | None = None
    cause: BreakCause | None = None
    weights: SequenceOf[Weights] = ()
    sampling: Mapping[str, Any] = field(default_factory=dict)
    skew: str | None = None


class Sequence:
    """One unbroken stream of tokens, and which of them were sampled.

    Attributes:
        spans: what was sampled, in order.
    """

    def __init__(self, turns: SequenceOf[Turn], trained: Collection[Turn]) -> None:
        self._last = turns[-1]
        self.spans = [
            Span(
                turn.prompt.length,
                turn.end,
                turn.logprobs,
                turn in trained and not turn.barred,
                turn.ref,
                turn.finish_reason,
                turn.discarded,
                turn.prompt.cause,
                [Weights(turn.prompt.length + w.start, turn.prompt.length + w.end, w.version) for w in turn.weights],
                turn.sampling,
                turn.skew,
            )
            for turn in turns
        ]

    @functools.cached_property
    def tokens(self) -> list[int]:
        """[seq_len] int, as sent and sampled; made when first read."""
        return stream_ids(self._last)

    @property
    def turns(self) -> list[str]:
        """References of the turns in it, in order."""
        return [span.ref for span in self.spans if span.ref is not None]

    @property
    def trainable_tokens(self) -> int:
        """How many tokens are trained here."""
        return sum(span.end - span.start for span in self.spans if span.trained)

    def __len__(self) -> int:
        return self.spans[-1].end


@dataclass(frozen=True, slots=True)
class FidelityReport:
    """What became of a rollout's tokens; ``+`` and ``sum(reports, FidelityReport())`` add reports up.

    ``tokens_sampled == tokens_trained + tokens_discarded``.

    Attributes:
        turns: sampled answers.
        sequences: how many training sequences they make.
        breaks: sequences that exist because a stream was broken, by cause.
        mismatches: answers that did not fit what was asked.
        tokens_sampled, tokens_trained, tokens_discarded: counts.
        left_out: a sentence for each turn that is not trained.
        aborts: how often a server aborted an answer, as it does for new weights; the answer was gone on with.
    """

    turns: int = 0
    sequences: int = 0
    breaks: dict[BreakCause, int] = field(default_factory=dict)
    mismatches: int = 0
    tokens_sampled: int = 0
    tokens_trained: int = 0
    tokens_discarded: int = 0
    left_out: list[str] = field(default_factory=list)
    aborts: int = 0

    def __add__(self, other: FidelityReport) -> FidelityReport:
        names = [each.name for each in fields(self) if each.name != "breaks"]
        totals = {name: getattr(self, name) + getattr(other, name) for name in names}
        return FidelityReport(breaks=dict(Counter(self.breaks) + Counter(other.breaks)), **totals)


def report(turns: SequenceOf[Turn]) -> FidelityReport:
    """See ``Ledger.report``."""
    paths = paths_of(turns)
    breaks: dict[BreakCause, int] = {}
    asked: set[Prompt] = set()
    for path, trained in paths:
        first = next(turn for turn in path if turn in trained)
        prompts = {turn.prompt for turn in path}
        cause = BreakCause.HISTORY_REWRITTEN if prompts & asked else path[0].prompt.cause
        # Another sample of a prompt is not a break.
        if first.prompt not in asked and cause is not None and cause is not BreakCause.FIRST:
            breaks[cause] = breaks.get(cause, 0) + 1
        asked |= prompts
    sampled = sum(map(_sampled, turns))
    trained_tokens = sum(len(turn.output_ids) for _, trained in paths for turn in trained if not turn.barred)
    return FidelityReport(
        turns=len(turns),
        sequences=len(paths),
        breaks=breaks,
        mismatches=sum(turn.fault is not None for turn in turns),
        tokens_sampled=sampled,
        tokens_trained=trained_tokens,
        tokens_discarded=sampled - trained_tokens,
        left_out=[
            f"turn {turn.number} ({_sampled(turn)} tokens): {turn.fault or turn.discarded or turn.skew}"
            for turn in turns
            if turn.fault is not None or turn.discarded is not None or turn.barred
        ],
        aborts=sum(turn.metadata.get("aborts", 0) for turn in turns),
    )


def paths_of(turns: SequenceOf[Turn], include_discarded: bool = False) -> list[tuple[list[Turn], set[Turn]]]:
    """The streams as lists of turns, each with the turns that are trained there."""
    kept = wanted(turns, include_discarded)
    continued = set()
    for turn in kept:
        before = turn.before
        while before is not None and before not in continued:
            continued.add(before)
            before = before.before
    paths = [path_to(turn) for turn in kept if turn not in continued]
    paths.sort(key=lambda path: [turn.number for turn in path])
    open_turns = set(kept)
    shared = []
    for path in paths:
        trained = open_turns.intersection(path)
        open_turns -= trained
        shared.append((path, trained))
    return shared


def wanted(turns: SequenceOf[Turn], include_discarded: bool = False) -> list[Turn]:
    """The turns to train; those without a token have nothing to teach."""
    return [turn for turn in turns if turn.output_ids and (include_discarded or turn.discarded is None)]


def path_to(turn: Turn) -> list[Turn]:
    """The turns of its stream, up to it."""
    path = [turn]
    while (before := path[-1].before) is not None:
        path.append(before)
    return path[::-1]


def _sampled(turn: Turn) -> int:
    return len(turn.metadata["rejected"]["output_ids"]) if turn.fault is not None else len(turn.output_ids)
