"""One rollout of an item: run, verified, recorded. Three things may come of it, and are kept apart everywhere.

- The model did its work well or badly: a score.
- The verifier raised or hung: a ``VerifierError``, with the item and the trajectory. Nothing is known of the model.
- The infrastructure ended it: it is run again, and then a ``RolloutFailed`` with the cause.
"""

from __future__ import annotations

import asyncio
import contextlib
from abc import ABC, abstractmethod
from collections import Counter, defaultdict
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from hermes_atropos.environment.config import HermesEnvConfig
from hermes_atropos.errors import ConfigurationError, RolloutFailed, UntrackedError, VerifierError
from hermes_atropos.harness import OpenedTask, Task
from hermes_atropos.runtime import run_to_end
from hermes_atropos.trajectory import AgentResult, StopReason, write_record
from hermes_atropos.values import is_number

__all__ = ["Reward", "Rollouts", "group_id"]

#: Of the group whose rollouts run in this context; None outside of a group.
group_id: ContextVar[str | None] = ContextVar("hermes_atropos_group_id", default=None)

#: Ends that say nothing about the model.
NOT_THE_MODELS_DOING = {
    StopReason.CANCELLED,
    StopReason.ERROR,
    StopReason.INTERRUPTED,
    StopReason.SERVER_ERROR,
    StopReason.TIMEOUT,
}


@dataclass(frozen=True)
class Reward:
    """What a verifier says of a rollout.

    Attributes:
        score: of the whole rollout.
        steps: by step number, from 1: rewards of single steps, which become the advantages of their tokens.
        metrics: numbers to be logged; means over rollouts are shown.
        reason: why, in words; kept in the record.
    """

    score: float
    steps: Mapping[int, float] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    reason: str = ""


class Rollouts(ABC):
    """Runs the rollouts of items on an agent.

    Attributes:
        in_flight: how many rollouts run.
        agent: runs every rollout; anything with the ``task`` of ``AtroposAIAgent`` and ``AtroposAgent``.
        counts: of what happened since the start, by name; they are logged and shown.
        metrics: what verifiers measured since it was last logged, by name.
    """

    agent: Any
    config: HermesEnvConfig

    def __init__(self) -> None:
        self.in_flight = 0
        self.counts: Counter[str] = Counter()
        self.metrics: defaultdict[str, list[float]] = defaultdict(list)

    @abstractmethod
    def prompt(self, item: Any) -> str:
        """What the user asks of the agent."""

    @abstractmethod
    async def verify(self, item: Any, task: Task, result: Any) -> float | Reward:
        """The score of a rollout.

        Args:
            item: what ``items`` gave.
            task: the rollout's sandbox as the agent left it: ``terminal``, ``read_file``, ``write_file``.
            result: what the agent's ``run`` returned, for Hermes a dict as of ``AtroposAIAgent.run_conversation``;
                ``stop_reason`` tells whether the model came to an answer.
        """

    def workspace(self, item: Any) -> Any:
        """The folder of which each rollout gets a copy: ``item["workspace"]``, if any; None gives it an empty one."""
        return item.get("workspace") if isinstance(item, Mapping) else None

    def task(self, item: Any) -> OpenedTask[Any]:
        """A task of the agent in the sandbox that the configuration asks for, with a copy of the item's workspace."""
        return self.agent.task(workspace=self.workspace(item), copy=True, **self.config.sandbox_arguments())

    async def prepare(self, item: Any, task: Task) -> None:
        """Called in the rollout's sandbox before the agent is asked: write there what the item needs."""
        return

    async def solve(self, item: Any, task: Task) -> str | None:
        """Do in the sandbox what a perfect agent would, and return its answer: ``hermes-atropos validate`` asks."""
        raise NotImplementedError

    async def rollout(self, item: Any) -> tuple[AgentResult, float]:
        """One rollout of ``item`` and its score, tried once.

        Raises:
            RolloutFailed: it took longer than ``rollout_timeout``, or ended in a way that is not the model's doing, so
                that a score would say nothing.
            VerifierError: ``verify`` raised, took longer than ``verify_timeout``, or gave no finite number.
        """
        async with contextlib.AsyncExitStack() as opened:
            try:
                task: Task = await opened.enter_async_context(self.task(item))
            except Exception as error:
                raise RolloutFailed(f"its sandbox could not be opened: {error}") from error
            self.in_flight += 1
            try:
                return await self._run(item, task)
            except (RolloutFailed, VerifierError) as failure:
                if task.trajectory is not None:
                    task.trajectory.metadata["failure"] = f"{type(failure).__name__}: {failure}"
                raise
            finally:
                self.in_flight -= 1
                if task.trajectory is not None:
                    task.trajectory.metadata |= {"item": repr(item)[:500], "group": group_id.get()}
                    await self.record(task.trajectory)

    async def record(self, trajectory: AgentResult) -> None:
        """Keep what a rollout left, also one that failed."""
        if self.config.records_path:
            # A call that waits for a thread would be dropped by a cancellation, and the record with it.
            await run_to_end(write_record, trajectory, self.config.records_path, append=True)

    async def _run(self, item: Any, task: Task) -> tuple[AgentResult, float]:
        limit = self.config.rollout_timeout
        await self.prepare(item, task)
        prompt = self.prompt(item)
        try:
            async with asyncio.timeout(limit or None) as timer:
                result = await task.run(prompt)
        except Exception as error:
            late = f"the rollout took longer than rollout_timeout={limit:g} seconds"
            message = late if timer.expired() else f"the agent raised {type(error).__name__}: {error}"
            raise RolloutFailed(message, trajectory=task.trajectory) from error
        trajectory = task.trajectory
        assert trajectory is not None
        if trajectory.stop_reason in NOT_THE_MODELS_DOING:
            message = f"the rollout ended as {trajectory.stop_reason}: {trajectory.error}"
            cause = result.get("cause") if isinstance(result, Mapping) else None
            raise RolloutFailed(message, trajectory=trajectory) from cause
        reward = await self.reward_of(item, task, result, trajectory)
        trajectory.metadata |= {"score": reward.score, "reason": reward.reason, "metrics": dict(reward.metrics)}
        for step in trajectory.steps:
            step.reward = reward.steps.get(step.step_number, step.reward)
        for name, value in {"reward": reward.score, **reward.metrics}.items():
            self.metrics[name].append(float(value))
        self.counts["tokens"] += trajectory.total_tokens
        return trajectory, reward.score

    async def reward_of(self, item: Any, task: Task, result: Any, trajectory: AgentResult) -> Reward:
        """What :meth:`verify` says, within ``verify_timeout``.

        Raises:
            VerifierError: it said nothing of use.
        """
        limit = self.config.verify_timeout
        try:
            async with asyncio.timeout(limit or None) as timer:
                said = await self.verify(item, task, result)
            reward = said if isinstance(said, Reward) else Reward(float(said))
            if not is_number(reward.score):
                raise ConfigurationError(f"a score must be a finite number, not {reward.score!r}")
        except Exception as error:
            late = f"verify took longer than verify_timeout={limit:g} seconds"
            message = late if timer.expired() else f"verify raised {type(error).__name__}: {error}"
            raise VerifierError(message, item=item, trajectory=trajectory) from error
        return reward

    async def trained_rollout(self, item: Any) -> tuple[AgentResult, float]:
        """One rollout that may be trained on, tried as often as the policy says.

        Raises:
            UntrackedError: the server gives no token ids, so that trying again would not help.
            RolloutFailed, VerifierError: as :meth:`rollout`, in the last attempt.
        """
        attempts = 1 if self.config.failed_rollouts == "drop" else self.config.rollout_attempts
        for attempt in range(1, attempts + 1):
            try:
                trajectory, score = await self.rollout(item)
                if trajectory.untrainable:
                    message = f"the rollout must not be trained on: {trajectory.untrainable}"
                    raise RolloutFailed(message, trajectory=trajectory)
            except RolloutFailed as failure:
                failure.attempts = attempt
                if attempt == attempts or isinstance(failure.__cause__, ConfigurationError):
                    self.counts["rollouts failed"] += 1
                    raise
                self.counts["rollouts run again"] += 1
            except VerifierError:
                self.counts["verifiers failed"] += 1
                raise
            else:
                if not trajectory.tracked:
                    raise UntrackedError("the server gives no token ids: rollouts can be scored, not trained on")
                self.counts["rollouts"] += 1
                return trajectory, score
        raise AssertionError
