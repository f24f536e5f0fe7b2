"""Which tokens a rollout sent and sampled, and the sequences that are cut from them."""

from hermes_atropos.tokens.ledger import Ledger, Match
from hermes_atropos.tokens.streams import FidelityReport, Sequence, Span
from hermes_atropos.tokens.turns import UNKNOWN, BreakCause, Prompt, Turn, Weights

__all__ = [
    "UNKNOWN",
    "BreakCause",
    "FidelityReport",
    "Ledger",
    "Match",
    "Prompt",
    "Sequence",
    "Span",
    "Turn",
    "Weights",
]
