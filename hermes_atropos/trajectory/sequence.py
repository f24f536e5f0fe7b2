"""A sequence with its text, and with the masks and logprobs that Atropos' users read."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from hermes_atropos.exports import atropos
from hermes_atropos.tokens import UNKNOWN, Sequence

__all__ = ["SequenceData"]


class SequenceData(Sequence):
    """One unbroken token stream: what was sent to the server and sampled from it, position by position.

    Each attribute of a sequence that was cut from a ledger is made when it is first read.

    Attributes:
        full_text: the tokens as text, special tokens included.
        tokens: ``[seq_len] int``.
        spans: what was sampled, with its logprobs.
        masked_tokens: ``[seq_len] int``, the token where it is trained, -100 elsewhere.
        logprobs: ``[seq_len] float``, finite and ≤ 0 where it is trained, 1.0 elsewhere.
        metadata: whatever else is known. Under ``turns``, where it came from a ledger, a dict for each turn in it:
            ``ref``, the ``start`` and ``end`` of what it sampled, ``finish_reason``, ``discarded``: why the harness
            threw it away, or None, ``cause``: why a stream starts with it (a ``BreakCause``), or None, ``weights``: a
            dict with ``start``, ``end`` and ``version`` for each stretch, ``sampling``: the parameters that made the
            distribution another than the model's, and ``skew``: why the logprobs are not of what was sampled from, or
            None.

    Raises:
        TokenFidelityError: at construction, if the three lists differ in length or a position breaks these rules.
    """

    def __init__(
        self,
        full_text: str,
        tokens: list[int],
        masked_tokens: list[int],
        logprobs: list[float],
        metadata: dict[str, Any] | None = None,
    ) -> None:
        self.spans = atropos.from_masks(tokens, masked_tokens, logprobs)
        self.tokens = tokens
        self.full_text = full_text
        self.metadata = {} if metadata is None else metadata

    _decode: Callable[[list[int]], str]

    @classmethod
    def cut(cls, sequence: Sequence, decode: Callable[[list[int]], str]) -> SequenceData:
        """From a ledger's sequence; ``decode`` makes token ids text, special tokens included."""
        data = cls.__new__(cls)
        facts = ("ref", "start", "end", "finish_reason", "discarded", "cause", "sampling", "skew")
        turns = [
            {fact: getattr(span, fact) for fact in facts} | {"weights": [asdict(part) for part in span.weights]}
            for span in sequence.spans
        ]
        vars(data).update(vars(sequence), _decode=decode, metadata={"turns": turns})
        return data

    @classmethod
    def from_sequence_node(cls, node: Any) -> SequenceData:
        """From an atroposlib ``SequenceNode``, or anything with its attributes.

        Raises:
            TokenFidelityError: the node is misaligned (atroposlib's own managed server makes such nodes).
        """
        return cls(
            full_text=node.full_text,
            tokens=[int(token) for token in node.tokens],
            masked_tokens=[int(mask) for mask in node.masked_tokens],
            logprobs=[float(logprob) for logprob in node.logprobs],
            metadata=dict(node.metadata or {}),
        )

    @functools.cached_property
    def full_text(self) -> str:
        return self._decode(self.tokens)

    @functools.cached_property
    def masked_tokens(self) -> list[int]:
        return atropos.masks(self)

    @functools.cached_property
    def logprobs(self) -> list[float]:
        return atropos.logprobs(self)

    @property
    def weights_versions(self) -> list[str]:
        """The versions of the weights that sampled it, in order of their first token; ``unknown`` is one."""
        return list(dict.fromkeys(part["version"] for parts in self._weights() for part in parts))

    @property
    def mixed_weights(self) -> bool:
        """Whether different weights sampled it, as far as the server tells: known versions differ, or an answer was
        aborted and gone on with under weights that the server does not name."""
        known = {part["version"] for parts in self._weights() for part in parts} - {UNKNOWN}
        return len(known) > 1 or any(len(parts) > 1 for parts in self._weights())

    def _weights(self) -> list[list[dict[str, Any]]]:
        return [turn.get("weights", []) for turn in self.metadata.get("turns", ())]

    @property
    def trainable(self) -> int:
        """The former name of ``trainable_tokens``."""
        return self.trainable_tokens

    def as_dict(self) -> dict[str, Any]:
        """The arguments that make the same sequence, as a record holds them."""
        return {name: getattr(self, name) for name in ("full_text", "tokens", "masked_tokens", "logprobs", "metadata")}

    def __len__(self) -> int:
        return len(self.tokens)

    def __eq__(self, other: object) -> bool:
        return self.as_dict() == other.as_dict() if isinstance(other, SequenceData) else NotImplemented

    def __repr__(self) -> str:
        return f"SequenceData({', '.join(f'{name}={value!r}' for name, value in self.as_dict().items())})"

    def __reduce__(self) -> tuple[Any, ...]:
        return SequenceData, tuple(self.as_dict().values())
