"""Trajectories as trainers want them: one file an export, of pure functions over results, sequences and scores.

To add one, write ``exports/<name>.py`` and name its function below; from outside the package, set ``EXPORTS[name]``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from hermes_atropos.exports import atropos

if TYPE_CHECKING:
    from hermes_atropos.trajectory import AgentResult

__all__ = ["EXPORTS"]

#: By name: what makes of the rollouts of one item, and a score for each, the data that a trainer takes.
EXPORTS: dict[str, Callable[[Sequence[AgentResult], Sequence[float]], Any]] = {"atropos": atropos.scored_group}
