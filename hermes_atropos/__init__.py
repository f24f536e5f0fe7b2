"""Run Hermes Agent on the inference servers of an RL run, and hand the trainer exactly the tokens that were sampled.

The names below are loaded at their first use, so that ``use_training_profile`` can be called before Hermes is imported.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hermes_atropos.backends.managed import ExactManagedServer
    from hermes_atropos.hermes.agent import AtroposAIAgent, Task
    from hermes_atropos.hermes.profile import use_training_profile
    from hermes_atropos.trajectory import AgentResult, AgentStep, SequenceData, StopReason

__all__ = [
    "AgentResult",
    "AgentStep",
    "AtroposAIAgent",
    "ExactManagedServer",
    "SequenceData",
    "StopReason",
    "Task",
    "use_training_profile",
]

_ROOMS = {
    "AgentResult": "trajectory",
    "AgentStep": "trajectory",
    "AtroposAIAgent": "hermes.agent",
    "ExactManagedServer": "backends.managed",
    "SequenceData": "trajectory",
    "StopReason": "trajectory",
    "Task": "hermes.agent",
    "use_training_profile": "hermes.profile",
}


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_ROOMS[name]}"), name)


def __dir__() -> list[str]:
    return __all__
