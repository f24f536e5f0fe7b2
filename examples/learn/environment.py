"""The errands of ``examples/embedded`` as a training run has them: new ones after each start, and calls counted.

``learn.py`` starts it: ``environment.py serve`` and ``environment.py evaluate``, with atroposlib's arguments.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from atroposlib.envs.base import APIServerConfig

from hermes_atropos import HermesEnvConfig, Reward
from hermes_atropos.servers import VLLMGenerateServer
from hermes_atropos.toolcalls import ParseStatus

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "embedded"))

from errands import Errand, Errands, errands


class Learning(Errands):
    name = "learning"
    server_cls = VLLMGenerateServer  # it tells which weights sampled what

    @classmethod
    def config_init(cls) -> tuple[HermesEnvConfig, list[APIServerConfig]]:
        config, servers = super().config_init()
        config.max_batches_offpolicy = 1
        config.ensure_scores_are_not_same = False  # the trainer's mean is then that of all rollouts
        return config, servers

    def items(self) -> Iterator[Errand]:
        """Others after each start: ``curr_step`` is where training is then."""
        return errands(1000 * self.config.seed + self.curr_step)

    async def verify(self, item: Errand, task: Any, result: Any) -> Reward:
        calls = [call.status for step in result["trajectory"].steps for call in step.tool_calls]
        metrics = {"calls": len(calls), "valid_calls": calls.count(ParseStatus.OK)}
        return Reward(await super().verify(item, task, result), metrics=metrics)


if __name__ == "__main__":
    Learning.cli()
