"""``HermesEnv``: an Atropos environment whose rollouts are runs of ``AtroposAIAgent``, each in a sandbox of its own.

::

    class Repairs(HermesEnv):
        name = "repairs"
        server_cls = StockVLLMServer

        async def get_next_item(self):
            return next(self.bugs)                     # {"workspace": folder, "report": text}

        def prompt(self, item):
            return f"Make the tests pass. {item['report']}"

        async def verify(self, item, task, result):
            return float((await task.terminal("pytest -q")).exit_code == 0)

        async def evaluate(self): ...

    Repairs.cli()                                      # serve, process, evaluate

Constructing one puts the process under the training profile: construct it before anything imports Hermes, or call
``hermes_atropos.use_training_profile()`` first.
"""

from __future__ import annotations

import asyncio
import logging
import os
from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

from atroposlib.envs.base import BaseEnv, BaseEnvConfig
from pydantic import BeforeValidator, Field

from hermes_atropos.errors import HermesAtroposError, UntrackedError
from hermes_atropos.harness import Task
from hermes_atropos.hermes.profile import use_training_profile
from hermes_atropos.trajectory import AgentResult, StopReason, scored_group, write_record

if TYPE_CHECKING:
    from hermes_atropos.hermes.agent import AtroposAIAgent

__all__ = ["HermesEnv", "HermesEnvConfig"]

logger = logging.getLogger(__name__)

#: Ends that say nothing about the model, so that a rollout which ended so is left out of its group.
NOT_THE_MODELS_DOING = frozenset(
    {
        StopReason.CANCELLED,
        StopReason.ERROR,
        StopReason.INTERRUPTED,
        StopReason.SERVER_ERROR,
        StopReason.TIMEOUT,
    }
)


def split_at_commas(value: Any) -> Any:
    return value.split(",") if isinstance(value, str) else value


class HermesEnvConfig(BaseEnvConfig):
    """``BaseEnvConfig`` and what the agent needs beside; ``max_token_length`` limits each answer of the model."""

    enabled_toolsets: Annotated[list[str], BeforeValidator(split_at_commas)] = Field(
        default=["terminal", "file"],
        description="Hermes' toolsets for the agent; on the command line with commas between.",
    )
    max_iterations: int = Field(default=50, description="Model calls a rollout may make.")
    temperature: float = Field(default=1.0, description="Temperature of the model calls.")
    rollout_timeout: float = Field(
        default=540,
        description="Seconds a rollout may take; 0 for no limit. After worker_timeout Atropos drops the whole group.",
    )
    records_path: str | None = Field(
        default=None, description="Write each rollout that ended in time to this JSONL file, also one that failed."
    )
    keep_env: Annotated[list[str], BeforeValidator(split_at_commas)] = Field(
        default=[],
        description="Environment variables that the training profile leaves although they hold a model provider's key "
        "or address, such as those of a judge in verify.",
    )


class HermesEnv(BaseEnv):
    """Rolls out the items of a subclass in groups, all on the environment's own event loop.

    A subclass says what the items are (:meth:`get_next_item`), what to ask for (:meth:`prompt`), what it is worth
    (:meth:`verify`), and how to evaluate (:meth:`evaluate`, which may use :meth:`rollout`).

    Attributes:
        agent: runs every rollout.

    Raises:
        ConfigurationError: at construction, where the agent cannot be made so, or Hermes was imported before the
            training profile could be entered.
    """

    env_config_cls = HermesEnvConfig

    def __init__(self, config: HermesEnvConfig, server_configs: Any, **options: Any) -> None:
        use_training_profile(keep_env=config.keep_env)
        super().__init__(config, server_configs, **options)
        self.agent = self.make_agent()

    def make_agent(self) -> AtroposAIAgent:
        """The agent as the configuration has it; override it to give other arguments."""
        from hermes_atropos.hermes.agent import AtroposAIAgent  # Hermes reads its home when it is imported

        return AtroposAIAgent(
            server=self.server,
            tokenizer=self.tokenizer,
            temperature=self.config.temperature,
            max_tokens=self.config.max_token_length,
            max_iterations=self.config.max_iterations,
            enabled_toolsets=self.config.enabled_toolsets,
            quiet_mode=True,
        )

    @abstractmethod
    def prompt(self, item: Any) -> str:
        """What the user asks of the agent."""

    @abstractmethod
    async def verify(self, item: Any, task: Task, result: dict[str, Any]) -> float:
        """The score of a rollout.

        Args:
            item: what :meth:`get_next_item` returned.
            task: the rollout's sandbox as the agent left it: ``terminal``, ``read_file``, ``write_file``.
            result: as of :meth:`AtroposAIAgent.run_conversation`; ``stop_reason`` tells whether the model came to an
                answer, and ``trajectory.steps`` may be given rewards of their own.
        """

    def workspace(self, item: Any) -> str | os.PathLike[str] | None:
        """The folder of which each rollout gets a copy: ``item["workspace"]``, if any; None gives it an empty one."""
        return item.get("workspace") if isinstance(item, Mapping) else None

    async def setup(self) -> None:
        """Called by Atropos once before the first item."""

    async def rollout(self, item: Any) -> tuple[AgentResult, float]:
        """One rollout of ``item`` and its score.

        Raises:
            HermesAtroposError: it took longer than ``rollout_timeout`` or ended in a way that is not the model's doing,
                so that a score would say nothing.
            Exception: what :meth:`verify` raised.
        """
        limit = self.config.rollout_timeout
        async with self.agent.task(workspace=self.workspace(item), copy=True) as task:
            late = None
            try:
                async with asyncio.timeout(limit or None):
                    await task.run(self.prompt(item))
            except TimeoutError as error:
                late = error
            result = task.last_result
            if result is None:
                raise HermesAtroposError(f"the rollout did not start within {limit:g} seconds") from late
            trajectory: AgentResult = result["trajectory"]
            try:
                if late is not None:
                    message = f"the rollout took longer than rollout_timeout={limit:g} seconds"
                    raise HermesAtroposError(message) from late
                if trajectory.stop_reason in NOT_THE_MODELS_DOING:
                    ended = HermesAtroposError(f"the rollout ended as {trajectory.stop_reason}: {trajectory.error}")
                    raise ended from result.get("cause")
                score = await self.verify(item, task, result)
                trajectory.metadata["score"] = score
            finally:
                if self.config.records_path:
                    await asyncio.to_thread(write_record, trajectory, self.config.records_path, append=True)
        return trajectory, score

    async def collect_trajectories(self, item: Any) -> tuple[dict[str, Any], list[Any]]:
        """A group of rollouts: a ``ScoredDataGroup`` with ``inference_logprobs``, and nothing for the backlog.

        Rollouts that failed are logged and left out.

        Raises:
            UntrackedError: the server gives no token ids.
            Exception: every rollout failed; the failure of the first.
        """
        attempts = [self._trainable(item) for _ in range(self.config.group_size)]
        rollouts = await asyncio.gather(*attempts, return_exceptions=True)
        failures = [rollout for rollout in rollouts if isinstance(rollout, BaseException)]
        for failure in failures:
            logger.error("a rollout is left out of its group: %r", failure, exc_info=failure)
        if len(failures) == len(rollouts):
            raise failures[0]
        results, scores = zip(*[rollout for rollout in rollouts if not isinstance(rollout, BaseException)], strict=True)
        group = scored_group(results, scores)
        if len(group["tokens"]) != self.config.group_size:
            logger.warning(
                "a group has %d sequences: the Atropos API holds it back until other such groups add up to %d with it",
                len(group["tokens"]),
                self.config.group_size,
            )
        return group, []

    async def _trainable(self, item: Any) -> tuple[AgentResult, float]:
        trajectory, score = await self.rollout(item)
        if trajectory.untrainable:
            raise UntrackedError(f"the rollout must not be trained on: {trajectory.untrainable}")
        return trajectory, score
