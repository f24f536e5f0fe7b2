"""The life of a serving environment: groups started as the trainer needs them, and sent by way of the outbox.

atroposlib's own loop ends with the API, cancels running groups when the API's queue is full, and forgets what it could
not send. This one goes on rolling out while the API is away, up to the same bound on what waits
(``max_batches_offpolicy``), and lets every group that was started come to its end.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import signal
import time
import uuid
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from atroposlib.envs.base import EvalHandlingEnum

from hermes_atropos.environment import progress
from hermes_atropos.environment.delivery import Delivery
from hermes_atropos.environment.outbox import Entry, Event, Outbox
from hermes_atropos.environment.rollouts import group_id
from hermes_atropos.runtime import run_to_end
from hermes_atropos.servers.atropos_api import AtroposAPI

if TYPE_CHECKING:
    from hermes_atropos.environment.env import HermesEnv

__all__ = ["Serving"]

logger = logging.getLogger(__name__)

#: Seconds between two looks at the trainer, for which what is finished may still be sent at the end, and for which no
#: group is started after many that failed, at most.
LOOK, LAST_WORDS, LONGEST_PAUSE = 0.2, 30.0, 60.0


class Serving:
    """Serves a trainer with the groups of an environment."""

    def __init__(self, env: HermesEnv) -> None:
        self._env = env
        config = env.config
        self.outbox = Outbox(config.outbox_path, env.name or type(env).__name__)
        registers_as = {
            "max_token_length": config.max_token_length,
            "desired_name": config.wandb_name or env.name or type(env).__name__,
            "weight": config.inference_weight,
            "min_batch_allocation": config.min_batch_allocation,
            "group_size": config.group_size,
        }
        self.delivery = Delivery(AtroposAPI(config.rollout_server_url), self.outbox, registers_as)
        self._entries: dict[str, Entry] = {}
        self._failed_in_a_row = 0
        self._not_before = 0.0
        for entry in self.outbox.cut:
            logger.warning("group %s of %s is cut: an earlier process ended in its rollouts", entry.id, entry.item)
            self.outbox.note(entry, Event.FAILED, why="the process ended")
        for entry in self.outbox.queued:
            logger.warning("group %s of %s, of an earlier process, was with the API: if the API has ended since, it "
                           "is gone", entry.id, entry.item)  # fmt: skip
            self.outbox.note(entry, Event.GONE)
        if self.outbox.waiting:
            logger.info("an earlier process left %d groups, which are sent first", len(self.outbox.waiting))

    async def run(self) -> None:
        """Serve until the trainer has what it needs, or a SIGTERM comes. Groups that still run are cut."""
        delivering = asyncio.create_task(self.delivery.run())
        try:
            with ended_by_sigterm():
                async with progress.shown(self._env):
                    await self._start(await self.delivery.register())
                    while not self._finished():
                        await self._look()
                        await self._start_groups()
                        await asyncio.sleep(LOOK)
                        if delivering.done():
                            delivering.result()
        finally:
            await self._end(delivering)

    async def _start(self, registration: dict[str, Any]) -> None:
        env = self._env
        env.wandb_prepend, env.curr_step = registration["wandb_name"], registration["starting_step"]
        env.checkpoint_dir = registration["checkpoint_dir"]
        env.checkpoint_interval = registration["checkpoint_interval"]
        if env.config.total_steps == -1:
            env.config.total_steps = registration["num_steps"]
        if env.curr_step > 0:
            env.load_checkpoint()
        await env.get_server_info()
        await env.setup_wandb()
        while not hasattr(env, "status_dict"):
            await self._look()

    async def _look(self) -> None:
        """Take note of where training is, if the API tells."""
        env = self._env
        status = await self.delivery.status()
        if status is None or self.delivery.registration is None:
            if hasattr(env, "status_dict"):  # an API that comes back has an empty queue
                env.status_dict |= {"queue_size": 0, "self_queue_size": 0}
            return
        env.env_id = self.delivery.registration["env_id"]
        env.status_dict = {"self_queue_size": 0, "max_group_size": 1, **status}
        await env.server.update_weight(status["env_weight"])
        await env.env_step_checks()

    def _finished(self) -> bool:
        env = self._env
        waits = env.status_dict["queue_size"] * env.config.group_size // env.config.batch_size
        return bool(env.status_dict["current_step"] + waits > env.config.total_steps)

    async def _start_groups(self) -> None:
        env = self._env
        while len(env.workers) < self._places() and time.monotonic() >= self._not_before:
            item = env.backlog.pop() if env.backlog else await env.get_next_item()
            if item is None:
                return
            name = uuid.uuid4().hex
            worker = asyncio.create_task(env.handle_env(name))
            env.running_items[name] = {"item": item, "worker": worker, "start_time": time.time()}
            env.workers.add(worker)
            worker.add_done_callback(env.workers.discard)

    def _places(self) -> int:
        """How many groups may run at once: as many as the trainer can use soon, and this process's share of workers."""
        env, config, status = self._env, self._env.config, self._env.status_dict
        places = max(1, env.max_num_workers // config.process_count)
        if env.eval_runner is not None and not env.eval_runner.done():
            if config.eval_handling is EvalHandlingEnum.STOP_TRAIN:
                return 0
            if config.eval_handling is EvalHandlingEnum.LIMIT_TRAIN:
                places = int(places * config.eval_limit_ratio)
        waiting = len(self.outbox.waiting)
        wanted = config.max_batches_offpolicy * env.derived_batch_size // config.group_size
        needed = math.ceil((wanted - status["queue_size"] - waiting) / config.process_count)
        if config.min_batch_allocation is not None:  # its share, though others have filled the queue
            own = config.min_batch_allocation * config.batch_size * config.max_batches_offpolicy / config.group_size
            needed = max(needed, math.ceil(own) - status["self_queue_size"] - waiting)
        return max(0, min(places, needed))

    async def group(self, name: str) -> Any:
        """Roll out the item that runs under ``name``, and put the group into the outbox; None where it came to none."""
        env = self._env
        item = env.running_items[name]["item"]
        entry = self._entries[name] = await run_to_end(self.outbox.began, name, item)
        group_id.set(name)
        limit = env.config.worker_timeout
        try:
            async with asyncio.timeout(limit if limit > 0 else None):
                groups, _ = await env.collect_trajectories(item)
                groups = await env.postprocess_histories(groups)
            if groups is None:
                self.outbox.note(entry, Event.FAILED, why="one of its rollouts failed, and failed_rollouts is replace")
                return None
            of_item = groups if isinstance(groups, list) else [groups]
            for group in of_item:
                group["group_overrides"] = {**(group.get("group_overrides") or {}), "group_id": name}
            refusal = self._refusal(of_item)
            if refusal is None:
                await env.handle_send_to_api(groups, item)
            if entry.state is Event.BEGAN:
                why = refusal or "atroposlib did not send it"
                logger.warning("group %s of %s is kept and not sent: %s", name, entry.item, why)
                await run_to_end(self.outbox.note, entry, Event.REFUSED, why=why, groups=of_item)
            self._failed_in_a_row = 0
            return groups
        except asyncio.CancelledError:
            if entry.state is Event.BEGAN:  # otherwise it was finished, and its end was being written down
                self.outbox.note(entry, Event.FAILED, why="the group was cancelled")
            raise
        except Exception as error:
            env.counts["groups failed"] += 1
            self._failed_in_a_row += 1
            # The model's server may be down: the items should not run through meanwhile.
            self._not_before = time.monotonic() + min(LONGEST_PAUSE, 0.1 * 2**self._failed_in_a_row)
            logger.error("group %s of %s came to nothing: %s: %s", name, entry.item, type(error).__name__, error)
            self.outbox.note(entry, Event.FAILED, why=f"{type(error).__name__}: {error}")
            return None
        finally:
            env.running_items.pop(name, None)
            self._entries.pop(name, None)
            await env.cleanup()

    def _refusal(self, groups: list[dict[str, Any]]) -> str | None:
        """Why a group is not sent; None if it is."""
        env = self._env
        if env.config.ensure_scores_are_not_same and len({score for group in groups for score in group["scores"]}) == 1:
            env.counts["groups without spread"] += 1
            return "all scores are the same"
        longest = max(len(tokens) for group in groups for tokens in group["tokens"])
        if 0 < env.max_token_len <= longest:
            env.counts["groups too long"] += 1
            return f"a sequence has {longest} tokens, and the trainer takes fewer than {env.max_token_len}"
        return None

    async def put(self, groups: list[dict[str, Any]]) -> None:
        """Into the outbox; messages only where the trainer is to have them."""
        env = self._env
        sent = [group if env.config.include_messages else group | {"messages": None} for group in groups]
        entry = self._entries[groups[0]["group_overrides"]["group_id"]]
        await run_to_end(self.outbox.ready, entry, sent)
        env.counts["groups"] += 1

    async def _end(self, delivering: asyncio.Task[None]) -> None:
        env = self._env
        for worker in list(env.workers):
            worker.cancel()
        if env.workers:
            for entry in self._entries.values():
                logger.warning("group %s of %s is cut: this process ends", entry.id, entry.item)
            await asyncio.wait(list(env.workers))
        if self.delivery.away is None and not await self.delivery.drained(LAST_WORDS):
            logger.warning("%d groups stay in the outbox for the next process", len(self.outbox.waiting))
        delivering.cancel()
        await asyncio.wait([delivering])
        await self.delivery.leave()
        self.outbox.close()
        logger.info("of this process's groups: %s", self.outbox.summary())


@contextlib.contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """A SIGTERM ends the block, as if it were through."""
    task, loop = asyncio.current_task(), asyncio.get_running_loop()
    assert task is not None
    asked: list[bool] = []

    def ask() -> None:
        asked.append(True)
        task.cancel()

    loop.add_signal_handler(signal.SIGTERM, ask)
    try:
        yield
    except asyncio.CancelledError:
        if not asked:
            raise
        task.uncancel()
    finally:
        loop.remove_signal_handler(signal.SIGTERM)
