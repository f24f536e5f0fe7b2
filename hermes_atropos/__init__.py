"""Run Hermes Agent on the inference servers of an RL run, and hand the trainer exactly the tokens that were sampled.

The names below are loaded at their first use, so that ``use_training_profile`` can be called before Hermes is imported.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import logging
from typing import TYPE_CHECKING, Any

from hermes_atropos.logs import ToStandardError

if TYPE_CHECKING:
    from hermes_atropos.backends.managed import ExactManagedServer
    from hermes_atropos.embedded.server import EmbeddedServer
    from hermes_atropos.environment import HermesEnv, HermesEnvConfig, Reward
    from hermes_atropos.errors import HermesAtroposError
    from hermes_atropos.hermes.agent import AtroposAIAgent, Task
    from hermes_atropos.hermes.exchange import exchanged
    from hermes_atropos.hermes.profile import use_training_profile
    from hermes_atropos.hermes.tools import HermesTools
    from hermes_atropos.proxy import CommandAgent, Proxy, proxy_app
    from hermes_atropos.react import AgentConfig, AtroposAgent
    from hermes_atropos.servers import StockSGLangServer, StockVLLMServer
    from hermes_atropos.tools import ToolRegistry
    from hermes_atropos.trajectory import (
        AgentResult,
        AgentStep,
        SequenceData,
        StopReason,
        read_record,
        read_records,
        scored_group,
        write_record,
    )

#: Name → the room that has it.
_ROOMS = {
    "AgentConfig": "react",
    "AgentResult": "trajectory",
    "AgentStep": "trajectory",
    "AtroposAIAgent": "hermes.agent",
    "AtroposAgent": "react",
    "CommandAgent": "proxy",
    "EmbeddedServer": "embedded.server",
    "ExactManagedServer": "backends.managed",
    "HermesAtroposError": "errors",
    "HermesEnv": "environment",
    "HermesEnvConfig": "environment",
    "HermesTools": "hermes.tools",
    "Proxy": "proxy",
    "Reward": "environment",
    "SequenceData": "trajectory",
    "StockSGLangServer": "servers",
    "StockVLLMServer": "servers",
    "StopReason": "trajectory",
    "Task": "hermes.agent",
    "ToolRegistry": "tools",
    "exchanged": "hermes.exchange",
    "proxy_app": "proxy",
    "read_record": "trajectory",
    "read_records": "trajectory",
    "scored_group": "trajectory",
    "use_training_profile": "hermes.profile",
    "write_record": "trajectory",
}

__all__ = [
    "AgentConfig",
    "AgentResult",
    "AgentStep",
    "AtroposAIAgent",
    "AtroposAgent",
    "CommandAgent",
    "EmbeddedServer",
    "ExactManagedServer",
    "HermesAtroposError",
    "HermesEnv",
    "HermesEnvConfig",
    "HermesTools",
    "Proxy",
    "Reward",
    "SequenceData",
    "StockSGLangServer",
    "StockVLLMServer",
    "StopReason",
    "Task",
    "ToolRegistry",
    "__version__",
    "exchanged",
    "proxy_app",
    "read_record",
    "read_records",
    "scored_group",
    "use_training_profile",
    "write_record",
]


logging.getLogger(__name__).addHandler(ToStandardError())


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.metadata.version("hermes-atropos")
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_ROOMS[name]}"), name)


def __dir__() -> list[str]:
    return __all__
