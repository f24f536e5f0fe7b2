"""Trajectories as trainers want them: one file an export, of pure functions over results, sequences and scores.

To add one, write ``exports/<name>.py`` and a line in ``EXPORTS``; from outside the package, use ``register``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from hermes_atropos.exports.atropos import scored_group
from hermes_atropos.exports.jsonl import jsonl_rows
from hermes_atropos.exports.trl import rollouts
from hermes_atropos.exports.verl import agent_loop_outputs

__all__ = ["EXPORTS", "register"]

SomeExport = TypeVar("SomeExport", bound=Callable[..., Any])

#: By name: what makes of the rollouts of one item, and a score for each, the data that a trainer takes.
EXPORTS: dict[str, Callable[..., Any]] = {
    "atropos": scored_group,
    "jsonl": jsonl_rows,
    "trl": rollouts,
    "verl": agent_loop_outputs,
}


def register(name: str) -> Callable[[SomeExport], SomeExport]:
    """Decorator: add an export, called with the results and the scores of one item, to ``EXPORTS``."""

    def add(export: SomeExport) -> SomeExport:
        EXPORTS[name] = export
        return export

    return add
