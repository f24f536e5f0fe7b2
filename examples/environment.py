"""A minimal Atropos environment: the agent rolls out, a verifier scores, groups carry the logprobs of what was sampled.

    python examples/environment.py process --env.total_steps 2 --env.use_wandb false

writes two groups to ``data/sums.jsonl``; ``serve`` sends them to a trainer. ``hermes_atropos.HermesEnv`` has all of
this built in.
"""

from __future__ import annotations

import asyncio
import atexit
import functools
import itertools
import re
import shutil
import tempfile
from typing import Any

from atroposlib.envs.base import APIServerConfig, BaseEnv, BaseEnvConfig

import hermes_atropos
from hermes_atropos.testing import ScriptedServer, chatml_tokenizer, tool_call


class Model(ScriptedServer):
    """Stands in for the model, so that the example runs anywhere. Its every second sum is wrong."""

    def __init__(self, config: APIServerConfig, reasoning_config: Any = None) -> None:
        mistakes = itertools.cycle([0, 1])

        def model(messages: list[dict[str, str]]) -> str:
            asked = re.search(r"Write (\d+) \+ (\d+)", messages[-1]["content"])
            if asked is None:
                return "Done."
            return tool_call("terminal", command=f"echo {int(asked[1]) + int(asked[2]) + next(mistakes)} > sum.txt")

        super().__init__(model)


class Sums(BaseEnv):
    name = "sums"
    server_cls = Model  # to train, say hermes_atropos.StockVLLMServer

    @classmethod
    def config_init(cls) -> tuple[BaseEnvConfig, list[APIServerConfig]]:
        return BaseEnvConfig(tokenizer_name=saved_tokenizer(), group_size=4), [APIServerConfig(model_name="local")]

    async def setup(self) -> None:
        self.items = itertools.count(1)
        self.agent = hermes_atropos.AtroposAIAgent(
            server=self.server, tokenizer=self.tokenizer, enabled_toolsets=["terminal", "file"], quiet_mode=True
        )

    async def get_next_item(self) -> int:
        return next(self.items)

    async def collect_trajectory(self, item: int) -> tuple[hermes_atropos.AgentResult, float]:
        async with self.agent.task() as task:
            result = await task.run(f"Write {item} + {item} to sum.txt.")
            check = await task.terminal(f"grep -qx {item + item} sum.txt")
        return result["trajectory"], float(check.exit_code == 0)

    async def collect_trajectories(self, item: int) -> tuple[dict[str, Any], list[int]]:
        """The default would leave out ``inference_logprobs``."""
        rollouts = await asyncio.gather(*[self.collect_trajectory(item) for _ in range(self.config.group_size)])
        results, scores = zip(*rollouts, strict=True)
        return hermes_atropos.scored_group(results, scores), []

    async def evaluate(self) -> None:
        pass


@functools.cache
def saved_tokenizer() -> str:
    """A folder with the small tokenizer of the stand-in: ``BaseEnv`` loads its tokenizer by name or path."""
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder)
    chatml_tokenizer().save_pretrained(folder)
    return folder


if __name__ == "__main__":
    hermes_atropos.use_training_profile()  # before Hermes is imported: nothing of the user's own Hermes is touched
    Sums.cli()
