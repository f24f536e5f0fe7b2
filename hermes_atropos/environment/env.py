"""``HermesEnv``: items in, groups of scored rollouts out, under atroposlib's command line."""

from __future__ import annotations

import asyncio
import itertools
import logging
import sys
import uuid
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from statistics import fmean
from typing import Any

from atroposlib.envs.base import BaseEnv

from hermes_atropos.environment import evaluation, progress
from hermes_atropos.environment.config import HermesEnvConfig
from hermes_atropos.environment.groups import arranged, means, rows
from hermes_atropos.environment.rollouts import Rollouts, group_id
from hermes_atropos.environment.serving import Serving
from hermes_atropos.errors import ConfigurationError, RolloutFailed
from hermes_atropos.hermes.profile import trim_heap, use_training_profile
from hermes_atropos.proxy import CommandAgent
from hermes_atropos.react import AgentConfig, AtroposAgent
from hermes_atropos.sandbox.wall import try_wall

__all__ = ["HermesEnv"]

logger = logging.getLogger(__name__)


class HermesEnv(Rollouts, BaseEnv):
    """Rolls out the items of a subclass in groups, all on the environment's own event loop.

    A subclass says what the items are (:meth:`items`), what to ask for (:meth:`prompt`) and what the outcome is worth
    (:meth:`verify`). Everything else has a default.

    Raises:
        ConfigurationError: at construction, where the agent cannot be made so, or Hermes was imported before the
            training profile could be entered.
        SandboxUnavailableError: rollouts are to be walled, and this machine can't have the wall.
    """

    env_config_cls = HermesEnvConfig

    def __init__(self, config: HermesEnvConfig, server_configs: Any, **options: Any) -> None:
        use_training_profile(keep_env=config.keep_env, log_folder=config.log_folder)
        Rollouts.__init__(self)
        BaseEnv.__init__(self, config, server_configs, **options)
        if config.process_index >= config.process_count:
            raise ConfigurationError(
                f"process_index={config.process_index} is not one of process_count={config.process_count}: count from 0"
            )
        if config.sandbox == "walled":
            try_wall()
        self.agent = self.make_agent()
        self.serving: Serving | None = None
        self._coming = self._own_items()

    # What a subclass says

    def items(self) -> Iterable[Any]:
        """All items, once; or without end. Training goes through them again and again. May be an async iterable."""
        raise NotImplementedError(f"{type(self).__name__} has no items: write items(), or get_next_item()")

    def eval_items(self) -> Iterable[Any]:
        """The items of an evaluation: by default :meth:`items`, of which ``eval_size`` are taken at most."""
        return self.items()

    def make_agent(self) -> Any:
        """The agent as the configuration has it; override it to give other arguments, or functions of your own."""
        config = self.config
        if config.command and config.harness != "command":
            raise ConfigurationError(f"a command is given, and harness={config.harness!r}: give harness='command'")
        model = {"tokenizer": self.tokenizer, "chat_template_kwargs": config.chat_template_kwargs}
        retries = 0 if config.malformed_calls == "stop" else 3
        # Hermes reads its home when it is imported.
        if config.harness == "command":
            from hermes_atropos.hermes.walled import open_sandbox

            session = {"chat_template_kwargs": config.chat_template_kwargs}
            return CommandAgent(
                self.server, self.tokenizer, command=config.command, open_sandbox=open_sandbox, session=session
            )
        if config.harness == "react":
            from hermes_atropos.hermes.tools import HermesTools

            how = AgentConfig(
                temperature=config.temperature,
                max_tokens=config.max_token_length,
                max_steps=config.max_iterations,
                max_tool_call_retries=retries,
                sampling={"train_skewed": True} if config.train_skewed else {},
            )
            return AtroposAgent(self.server, HermesTools(config.enabled_toolsets), how, **model)
        from hermes_atropos.hermes.agent import AtroposAIAgent

        agent = AtroposAIAgent(
            server=self.server,
            temperature=config.temperature,
            train_skewed=config.train_skewed or None,
            max_tokens=config.max_token_length,
            max_iterations=config.max_iterations,
            enabled_toolsets=config.enabled_toolsets,
            max_tool_call_retries=retries,
            quiet_mode=True,
            **model,
        )
        agent.suppress_status_output = True  # of hundreds of rollouts at once
        return agent

    async def setup(self) -> None:
        """Called by Atropos once before the first item."""

    async def evaluate(self, *args: Any, **options: Any) -> None:
        """One rollout of each of :meth:`eval_items`, and the means of their scores and metrics."""
        await evaluation.evaluate(self)

    # Groups

    async def get_next_item(self) -> Any:
        """The next item that is this process's to roll out; None where there are none."""
        return await anext(self._coming, None)

    async def _own_items(self) -> AsyncIterator[Any]:
        number = itertools.count()
        found = True
        while found:
            found = False
            async for item in evaluation.each(self.items()):
                found = True
                if next(number) % self.config.process_count == self.config.process_index:
                    yield item

    async def collect_trajectories(self, item: Any) -> tuple[Any, list[Any]]:
        """The rollouts of an item as groups that may be sent; nothing for the backlog.

        Returns:
            a ``ScoredDataGroup`` with ``inference_logprobs``, or a list of them where a rollout has more than one
            sequence (see :mod:`hermes_atropos.environment.groups`); None where ``failed_rollouts`` asks for another
            item. ``group_overrides["metrics"]`` has the means of what the verifiers measured.

        Raises:
            UntrackedError: the server gives no token ids.
            Exception: every rollout failed; the failure of the first.
        """
        if self.serving is None:
            group_id.set(uuid.uuid4().hex)
        attempts = [self.trained_rollout(item) for _ in range(self.config.group_size)]
        rollouts = await asyncio.gather(*attempts, return_exceptions=True)
        failures = [rollout for rollout in rollouts if isinstance(rollout, BaseException)]
        for failure in failures:
            logger.error("a rollout is left out of its group: %r", failure, exc_info=failure)
        if len(failures) == len(rollouts):
            raise failures[0]
        if failures and self.config.failed_rollouts == "replace":
            return None, []
        done = [rollout for rollout in rollouts if not isinstance(rollout, BaseException)]
        parts = [part for result, score in done if (part := rows(result, score, self.config))]
        if not parts:
            errors = "; ".join(sorted({str(result.error or result.stop_reason) for result, _ in done}))
            raise RolloutFailed(f"nothing was sampled in any of the rollouts ({errors})", trajectory=done[0][0])
        groups = arranged(parts, self.config.group_size, done[0][0].sampling)
        for group in groups:
            group["group_overrides"]["metrics"] = means(result.metadata["metrics"] for result, _ in done)
        return (groups[0] if len(groups) == 1 else groups), []

    # Serving, processing, logging

    async def env_manager(self) -> None:
        """Roll out groups for a trainer, until it has what it needs or a SIGTERM comes."""
        await self.setup()
        self.serving = Serving(self)
        await self.serving.run()

    async def handle_env(self, item_uuid: str) -> Any:
        """The group of a running item, into the outbox."""
        assert self.serving is not None
        return await self.serving.group(item_uuid)

    async def _send_scored_data_to_api(self, scored_data: Any) -> None:
        assert self.serving is not None
        await self.serving.put(scored_data if isinstance(scored_data, list) else [scored_data])

    async def process_manager(self) -> None:
        """Roll out ``total_steps`` groups into a file, without a trainer."""
        async with progress.shown(self):
            await super().process_manager()

    async def wandb_log(self, wandb_metrics: dict[str, Any] | None = None) -> None:
        """Log what verifiers measured and what became of the rollouts, beside what atroposlib logs."""
        measured = {f"train/{name}": fmean(values) for name, values in self.metrics.items() if values}
        happened = {f"train/{name.replace(' ', '_')}": count for name, count in self.counts.items()}
        self.metrics.clear()
        trim_heap()  # once a training step, more or less
        await super().wandb_log({**(wandb_metrics or {}), **measured, **happened})

    @classmethod
    def cli(cls) -> None:
        """The command line: ``serve``, ``process``, ``evaluate``.

        atroposlib's ``process`` and ``evaluate`` log to W&B, and end without a key for it, whatever the configuration
        says. Here they do so where the configuration or the command line asks for it.
        """
        if {"process", "evaluate"} & set(sys.argv[1:2]) and not _asks_for_wandb(sys.argv):
            sys.argv += ["--env.use_wandb", str(cls.config_init()[0].use_wandb).lower()]
        super().cli()


def _asks_for_wandb(arguments: list[str]) -> bool:
    """Whether a command line, or the YAML file that it names, says something of W&B."""
    if any(argument.startswith("--env.use_wandb") for argument in arguments):
        return True
    given = dict(itertools.pairwise(arguments)).get("--config")
    return given is not None and "use_wandb:" in Path(given).read_text(encoding="utf-8")
