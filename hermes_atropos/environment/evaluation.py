"""An evaluation: one rollout of each item. One that was cut goes on where it ended."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hermes_atropos.environment.groups import means
from hermes_atropos.errors import RolloutFailed, VerifierError
from hermes_atropos.exports.jsonl import write_jsonl
from hermes_atropos.values import plain

if TYPE_CHECKING:
    from hermes_atropos.environment.env import HermesEnv

__all__ = ["each", "eval_items", "evaluate"]

logger = logging.getLogger(__name__)


async def evaluate(env: HermesEnv) -> None:
    """Roll out each of ``env.eval_items()`` once, and log the means of scores and metrics.

    Where ``data_dir_to_save_evals`` names a folder, each outcome is written there at once; a later evaluation of the
    same training step takes over those that are there. When all are done, atroposlib's files take their place.
    """
    started = time.time()
    folder = env.config.data_dir_to_save_evals
    kept = Path(folder) / f"unfinished-step-{env.curr_step}.jsonl" if folder else None
    outcomes = read(kept)
    if outcomes:
        logger.info("the evaluation goes on after %d items, which are in %s", len(outcomes), kept)
    places = asyncio.Semaphore(max(1, env.config.max_eval_workers))

    async def one(number: int, item: Any) -> None:
        async with places:
            outcome = await outcome_of(env, item)
        outcomes[number] = outcome
        if kept is not None:
            await asyncio.to_thread(write_jsonl, [{"number": number, **outcome}], kept)

    async with asyncio.TaskGroup() as group:
        for number, item in enumerate(await eval_items(env)):
            if number not in outcomes:
                group.create_task(one(number, item))
    scored = [outcome for outcome in outcomes.values() if "failure" not in outcome]
    found = means({**outcome["metrics"], "score": outcome["score"]} for outcome in scored)
    metrics = {f"eval/{name}": mean for name, mean in found.items()}
    metrics |= {"eval/items": len(outcomes), "eval/failed": len(outcomes) - len(scored)}
    env.eval_metrics = metrics
    samples = [{"number": number, **outcomes[number]} for number in sorted(outcomes)]
    await env.evaluate_log(metrics, start_time=started, end_time=time.time(), samples=samples)
    if kept is not None:
        kept.unlink(missing_ok=True)


async def each(items: Any) -> AsyncIterator[Any]:
    """What an iterable or an async iterable has."""
    if hasattr(items, "__aiter__"):
        async for item in items:
            yield item
    else:
        for item in items:
            yield item


async def eval_items(env: HermesEnv) -> list[Any]:
    """The items of an evaluation, ``eval_size`` at most."""
    items = []
    async for item in each(env.eval_items()):
        items.append(item)
        if len(items) == env.config.eval_size:
            break
    return items


async def outcome_of(env: HermesEnv, item: Any) -> dict[str, Any]:
    """What one rollout came to, as JSON holds it."""
    try:
        trajectory, _ = await env.rollout(item)
    except (RolloutFailed, VerifierError) as failure:
        logger.error("an item is left out of the evaluation: %s", failure)
        return {"item": repr(item)[:200], "failure": f"{type(failure).__name__}: {failure}"}
    return plain(
        {
            "item": repr(item)[:200],
            "score": trajectory.metadata["score"],
            "metrics": trajectory.metadata["metrics"],
            "reason": trajectory.metadata["reason"],
            "stop_reason": trajectory.stop_reason,
            "messages": trajectory.to_messages(),
        }
    )


def read(path: Path | None) -> dict[int, dict[str, Any]]:
    """The outcomes of a file by number; a last line that was cut off is none."""
    if path is None or not path.exists():
        return {}
    lines = path.read_bytes().split(b"\n")
    found = [json.loads(line) for line in lines[:-1] if line]
    return {outcome.pop("number"): outcome for outcome in found}
