"""What a ledger holds: prompts, and the turns that were sampled from them."""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

__all__ = ["UNKNOWN", "WIDTH", "BreakCause", "Prompt", "Turn", "Weights", "stream_ids"]

#: The version of weights that a server does not tell.
UNKNOWN = "unknown"

#: Bytes of a packed number.
WIDTH = array("i").itemsize


class BreakCause(StrEnum):
    """Why a turn starts a stream instead of continuing its parent's."""

    FIRST = "first"
    """It opens a conversation: not a break."""
    TEMPLATE = "template"
    """The chat template changes earlier turns when messages are appended (drops their thinking, for instance)."""
    HISTORY_REWRITTEN = "history_rewritten"
    """The harness changed, dropped or inserted earlier messages, or changed the tools."""
    UNPROVABLE = "unprovable"
    """The renderer could not prove what the appended messages look like as tokens."""
    TRUNCATED = "truncated"
    """The parent's answer was cut off, and the renderer could not close it."""


@dataclass(frozen=True, slots=True)
class Weights:
    """Which weights sampled a stretch of tokens.

    Attributes:
        start, end: ``[start, end)``, in the answer or, of a sequence's span, in the sequence.
        version: as the server names it, or ``UNKNOWN``.
    """

    start: int
    end: int
    version: str = UNKNOWN


@dataclass(slots=True, eq=False)
class Prompt:
    """What a model was asked; several turns share one where it was sampled more than once.

    Attributes:
        parent: the turn whose answer its messages follow, whether or not the stream was kept; None at the start of a
            conversation.
        cause: why it starts a stream; None where it continues its parent's.
        length: tokens of the whole prompt.
        pieces: the token ids that it adds to its parent's stream, cut into pieces that prompts share.
        messages: what it adds to its parent's messages, as the ledger numbers them, packed.
        tools: those of the conversation, where it starts one.
        topic: what tells whether another conversation is about the same, where it starts one.
    """

    parent: Turn | None = field(repr=False)
    cause: BreakCause | None
    length: int
    pieces: tuple[tuple[int, ...], ...] = field(repr=False)
    messages: bytes = field(repr=False)
    tools: Any = field(default=None, repr=False)
    topic: Any = field(default=None, repr=False)

    @property
    def added(self) -> int:
        """How many messages it adds to its parent's."""
        return len(self.messages) // WIDTH


@dataclass(slots=True, eq=False)
class Turn:
    """One sampled answer.

    Attributes:
        ref: what ``message[TURN_KEY]`` holds.
        number: its place in the ledger, from 0.
        prompt: what was asked.
        output_ids: [output_len] int, as sampled, end token included.
        logprobs: [output_len] float, of the sampled tokens.
        finish_reason: as the server reported it; None where it did not.
        discarded: why the harness threw the answer away; None if it did not.
        fault: why the answer can't be trusted; such a turn has no tokens, and ``metadata["rejected"]`` has what came.
        metadata: what is known of the call, such as ``server_url``, and ``aborts``: how often the server aborted the
            answer.
        weights: of the answer, stretch by stretch; an answer that was aborted may have several.
        sampling: the parameters that made the distribution another than the model's; ``temperature=1`` is not one.
        skew: why the logprobs are not of the distribution that was sampled from; None if they are.
        barred: whether that keeps the turn out of training.
        forms: the numbers of the messages that stand for it.
    """

    ref: str
    number: int
    prompt: Prompt
    output_ids: tuple[int, ...] = field(repr=False)
    logprobs: array[float] = field(repr=False)
    finish_reason: str | None
    discarded: str | None = None
    fault: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    forms: set[int] = field(default_factory=set, repr=False)
    weights: tuple[Weights, ...] = ()
    sampling: Mapping[str, Any] = field(default_factory=dict)
    skew: str | None = None
    barred: bool = False

    @property
    def before(self) -> Turn | None:
        """The turn that this one continues token by token; None where its stream starts."""
        return self.prompt.parent if self.prompt.cause is None else None

    @property
    def end(self) -> int:
        """Where its output ends in the stream."""
        return self.prompt.length + len(self.output_ids)


def stream_ids(goal: Prompt | Turn) -> list[int]:
    """The ids of the stream through a prompt or an answer, in a list of the caller's own."""
    parts: list[tuple[int, ...]] = []
    node: Prompt | Turn | None = goal
    while node is not None:
        if isinstance(node, Turn):
            parts.append(node.output_ids)
            node = node.prompt
        else:
            parts += reversed(node.pieces)
            node = node.parent if node.cause is None else None
    ids: list[int] = []
    for part in reversed(parts):
        ids += part
    return ids
