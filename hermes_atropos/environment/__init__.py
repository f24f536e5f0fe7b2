"""``HermesEnv``: an Atropos environment whose rollouts are runs of an agent, each in a sandbox of its own.

::

    class Repairs(HermesEnv):
        name = "repairs"
        server_cls = StockVLLMServer

        def items(self):
            return bugs                                # {"workspace": folder, "report": text}

        def prompt(self, item):
            return f"Make the tests pass. {item['report']}"

        async def verify(self, item, task, result):
            return float((await task.terminal("pytest -q")).exit_code == 0)

    Repairs.cli()                                      # serve, process, evaluate

Constructing one puts the process under the training profile: construct it before anything imports Hermes, or call
``hermes_atropos.use_training_profile()`` first.
"""

from hermes_atropos.environment.config import HermesEnvConfig
from hermes_atropos.environment.env import HermesEnv
from hermes_atropos.environment.rollouts import Reward

__all__ = ["HermesEnv", "HermesEnvConfig", "Reward"]
