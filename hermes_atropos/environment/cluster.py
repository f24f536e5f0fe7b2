"""Rollouts on the machines of a Ray cluster: actors roll out groups, and one process hands out items and sends groups.

That process is the environment as ``serve`` runs it, with its outbox; only :meth:`HermesEnv.collect_trajectories` asks
an actor. Each actor has the same environment class on some machine of the cluster, and gives back groups and records.
An actor that dies is started again by Ray (https://docs.ray.io/en/latest/ray-core/fault_tolerance/actors.html), and
what it rolled out is rolled out again.
"""

from __future__ import annotations

import asyncio
import os
import pickle
from collections import Counter
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hermes_atropos.environment.launch import named, run
from hermes_atropos.environment.rollouts import group_id
from hermes_atropos.errors import ConfigurationError, HermesAtroposError, RolloutFailed
from hermes_atropos.trajectory import AgentResult

if TYPE_CHECKING:
    from hermes_atropos.environment.env import HermesEnv

__all__ = ["serve", "spread"]

#: Seconds that an actor has to end the rollouts under way.
LAST_WORDS = 60.0


@dataclass
class Rolled:
    """What an actor gives back of an item.

    Attributes:
        groups: as ``collect_trajectories`` has them; None where there is none.
        failure: why there is none.
        records: the trajectory of each rollout, also of those that failed, where they are to be recorded.
        counts, metrics: what the actor has counted since it last gave something back.
    """

    groups: Any = None
    failure: HermesAtroposError | None = None
    records: list[AgentResult] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    metrics: dict[str, list[float]] = field(default_factory=dict)


#: What is rolled out in this context.
_rolled: ContextVar[Rolled] = ContextVar("hermes_atropos_rolled")


class Member:
    """The environment on one machine of the cluster; an actor.

    Args:
        name: ``MODULE:CLASS`` or ``FILE.py:CLASS``.
        folder: from where the name is seen, and where relative paths of the environment begin.
        given: the configuration and the servers, pickled: the classes are found once the module is.

    Raises:
        ConfigurationError: this machine has no such folder, or no such environment there.
    """

    def __init__(self, name: str, folder: str, given: bytes) -> None:
        try:
            os.chdir(folder)
        except OSError as error:
            raise ConfigurationError(
                f"{os.uname().nodename} has no folder {folder}: serve from one that all machines share, or submit a "
                f"Ray job with a working_dir ({error})"
            ) from error

        class Recording(named(name)):  # type: ignore[misc]
            """Gives what a rollout left to whoever asked for it, and writes nothing itself."""

            async def record(self, trajectory: AgentResult) -> None:
                if self.config.records_path:  # otherwise nobody asks for it, and it is long
                    _rolled.get().records.append(trajectory)

        self._env: HermesEnv = Recording(*pickle.loads(given))
        self._running: set[asyncio.Task[Any]] = set()

    async def roll_out(self, item: Any) -> Rolled:
        """The rollouts of an item, all of them here."""
        task, rolled = asyncio.current_task(), Rolled()
        assert task is not None
        self._running.add(task)
        _rolled.set(rolled)
        try:
            rolled.groups, _ = await self._env.collect_trajectories(item)
        except HermesAtroposError as error:
            rolled.failure = error
        except Exception as error:  # of the user's, and perhaps of a class that can't be sent
            rolled.failure = RolloutFailed(f"{type(error).__name__}: {error}")
        finally:
            self._running.discard(task)
        rolled.counts, self._env.counts = self._env.counts, Counter()
        rolled.metrics = dict(self._env.metrics)
        self._env.metrics.clear()
        return rolled

    async def end(self) -> None:
        """End what is under way, and its sandboxes."""
        for task in self._running:
            task.cancel()
        if self._running:
            await asyncio.wait(self._running)


def spread(environment: type[HermesEnv], name: str, count: int | None, cores: float) -> type[HermesEnv]:
    """The environment, with actors that roll out its items, as of :func:`serve`. Ray must have been initialised."""
    import ray

    there = int(ray.cluster_resources().get("CPU", 0) // cores)  # type: ignore[no-untyped-call]
    if there < (count or 1):
        raise ConfigurationError(
            f"{count or 1} actors of {cores:g} cores are asked for, and the Ray cluster has cores for {there}: "
            "give a smaller --processes or --cores"
        )

    class Spread(environment):  # type: ignore[misc, valid-type]
        def __init__(self, config: Any, server_configs: Any, **options: Any) -> None:
            super().__init__(config, server_configs, **options)
            given = pickle.dumps((config, server_configs))
            retries = config.rollout_attempts - 1  # of a group that an actor's end cut short
            actor: Any = ray.remote(Member).options(
                num_cpus=cores, scheduling_strategy="SPREAD", max_restarts=-1, max_task_retries=retries
            )
            self.actors = {actor.remote(name, os.getcwd(), given): 0 for _ in range(count or there)}

        async def collect_trajectories(self, item: Any) -> tuple[Any, list[Any]]:
            actor = min(self.actors, key=self.actors.__getitem__)  # with the least to do
            self.actors[actor] += 1
            self.in_flight += self.config.group_size
            try:
                rolled: Rolled = await actor.roll_out.remote(item)
            finally:
                self.actors[actor] -= 1
                self.in_flight -= self.config.group_size
            self.counts.update(rolled.counts)
            for what, values in rolled.metrics.items():
                self.metrics[what].extend(values)
            for trajectory in rolled.records:
                trajectory.metadata["group"] = group_id.get()
                await self.record(trajectory)
            if rolled.failure is not None:
                raise rolled.failure
            return rolled.groups, []

        async def env_manager(self) -> None:
            try:
                await super().env_manager()
            finally:
                ends = [asyncio.wrap_future(actor.end.remote().future()) for actor in self.actors]
                await asyncio.wait(ends, timeout=LAST_WORDS)
                for actor in self.actors:
                    ray.kill(actor)

    Spread.__name__ = environment.__name__  # by which the outbox and W&B may know it
    return Spread


def serve(name: str, address: str, processes: int | None, cores: float, arguments: Sequence[str]) -> None:
    """Serve a trainer with an environment whose rollouts run on a Ray cluster.

    Args:
        address: of the cluster, as ``ray.init`` takes it: ``auto`` for the one that this machine belongs to; ``local``
            for one of this machine alone, which goes with this process.
        processes: how many actors; None has as many as the cluster has cores for.
        cores: of each actor.

    Raises:
        ConfigurationError: Ray is not installed, there is no cluster, or it is too small.
    """
    if cores <= 0:
        raise ConfigurationError(f"--cores {cores:g}: give more than 0")
    try:
        import ray
    except ImportError as error:
        raise ConfigurationError("Ray is not installed: pip install 'hermes-atropos[ray]'") from error
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    environment = named(name)
    # A cluster of this machine alone listens nowhere else.
    own: dict[str, Any] = {"_node_ip_address": "127.0.0.1", "include_dashboard": False} if address == "local" else {}
    try:
        ray.init(address=address, log_to_driver=True, **own)
    except (ConnectionError, ValueError) as error:
        raise ConfigurationError(f"there is no Ray cluster at {address!r}: {error}") from error
    try:
        run(spread(environment, name, processes, cores), "serve", name, arguments)
    finally:
        ray.shutdown()
