"""What an environment's verifier says of work whose worth is known, before anything is spent on a model.

An oracle does what the author's ``solve`` does, and a null policy does nothing. A verifier that does not score the
first above the second, that raises or hangs, or that says another thing the second time, is named with its item.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hermes_atropos.environment.evaluation import eval_items
from hermes_atropos.errors import VerifierError
from hermes_atropos.proxy import CommandAgent
from hermes_atropos.react import AtroposAgent
from hermes_atropos.trajectory import AgentResult, StopReason

if TYPE_CHECKING:
    from hermes_atropos.environment.env import HermesEnv
    from hermes_atropos.harness import Task

__all__ = ["Verdict", "validate"]

#: How many items are looked at at once.
AT_ONCE = 8


@dataclass(frozen=True)
class Verdict:
    """What was found of an item.

    Attributes:
        item: as text.
        oracle, null: what the two policies scored; None where it is not known.
        faults: what is wrong, in words; empty if nothing is.
    """

    item: str
    oracle: float | None
    null: float | None
    faults: tuple[str, ...]


async def validate(env: HermesEnv, *, times: int = 2) -> list[Verdict]:
    """A verdict for each of the items of an evaluation, in order; each policy is scored so many times."""
    await env.setup()
    places = asyncio.Semaphore(AT_ONCE)

    async def one(item: Any) -> Verdict:
        async with places:
            return await _verdict(env, item, times)

    return list(await asyncio.gather(*map(one, await eval_items(env))))


async def _verdict(env: HermesEnv, item: Any, times: int) -> Verdict:
    faults = []
    scores: dict[str, list[float]] = {"oracle": [], "null": []}
    for policy, found in scores.items():
        for _ in range(times):
            try:
                score = await _score(env, item, solved=policy == "oracle")
            except VerifierError as error:
                faults.append(f"{policy}: {error}")
                break
            if score is None:
                faults.append("it has no solution: write solve()")
                break
            found.append(score)
        if len(set(found)) > 1:
            faults.append(f"{policy}: it scored {found[0]:g} and then {found[-1]:g}")
    oracle, null = (found[0] if found else None for found in scores.values())
    if oracle is not None and null is not None and oracle <= null:
        faults.append(f"the oracle scored {oracle:g}, and doing nothing {null:g}")
    return Verdict(repr(item)[:200], oracle, null, tuple(faults))


async def _score(env: HermesEnv, item: Any, *, solved: bool) -> float | None:
    """What the verifier says of a solution or of nothing; None where the author gives no solution."""
    async with env.task(item) as task:
        await env.prepare(item, task)
        answer = ""
        if solved:
            try:
                answer = await env.solve(item, task) or ""
            except NotImplementedError:
                return None
        trajectory = AgentResult(
            success=True,
            final_response=answer,
            messages=[
                {"role": "user", "content": env.prompt(item)},
                {"role": "assistant", "content": answer},
            ],
        )
        reward = await env.reward_of(item, task, _as_returned(env, task, trajectory), trajectory)
        return reward.score


def _as_returned(env: HermesEnv, task: Task, trajectory: AgentResult) -> Any:
    """A result as the environment's agent returns it."""
    if isinstance(env.agent, AtroposAgent | CommandAgent):
        return trajectory
    return {
        "final_response": trajectory.final_response,
        "messages": trajectory.messages,
        "stop_reason": StopReason.COMPLETED,
        "task_id": task.task_id,
        "trajectory": trajectory,
    }
