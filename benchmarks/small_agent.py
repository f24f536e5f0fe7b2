"""The small agent: 64 rollouts of 6 turns and 5 terminal commands each, against the bare terminal tool.

Bare is Hermes' terminal tool called directly, in Hermes' own local environment, by as many threads as suit it best of
those tried; sandboxed is the same in a ``HermesSandbox`` of this package, where a command costs less; small is
``AtroposAgent`` on a server that costs next to nothing; hermes is ``AtroposAIAgent`` on the scripted server of this
package. Each task has a shell of its own, and opening it counts for no side. Each side runs in a fresh process; the
sides take turns, and are compared within each round, the median of which counts. Two more runs show what the agent
itself costs: turns a second with tools that do nothing, and the memory of 1,000 rollouts that are all under way at
once. The last line printed is one JSON object of the figures.

    python benchmarks/small_agent.py [--rollouts 64] [--rounds 5] [--short]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

COMMANDS = 5
THREADS = (4, 8)
NOOP_TURNS = 20


def command(number: int) -> str:
    return f"echo step {number} > step{number}.txt && cat step*.txt | wc -l"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rollouts", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--many", type=int, default=1000, help="rollouts at once in the run that shows the memory")
    parser.add_argument("--short", action="store_true", help="8 rollouts, 50 at once, one round")
    parser.add_argument("--side", choices=list(SIDES), help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, default=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.short:
        options.rollouts, options.rounds, options.many = 8, 1, 50
    if not options.side:
        compare(options)
        return
    from hermes_atropos.hermes.profile import use_training_profile

    use_training_profile()
    figures = asyncio.run(SIDES[options.side](options))
    print(json.dumps(figures | {"peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}))


def compare(options: argparse.Namespace) -> None:
    direct = [(name, threads) for name in ("bare", "sandboxed") for threads in THREADS]
    sides = [*direct, ("small", 0), ("hermes", 0)]
    runs: dict[tuple[str, int], list[dict[str, float]]] = {side: [] for side in sides}
    for _ in range(options.rounds):
        for side in sides:
            runs[side].append(run_side(options, *side))
    medians = {
        side: {key: statistics.median(run[key] for run in figures) for key in figures[0]}
        for side, figures in runs.items()
    }
    for (name, threads), figures in medians.items():
        label = f"{name} ({threads} threads)" if threads else name
        print(
            f"{label:>21}: {figures['commands_per_s']:6.1f} commands/s  "
            f"{figures['cpu_ms_per_command']:5.1f} ms processor time each  {figures['peak_rss_mb']:5.0f} MB"
        )
    speeds = {side: figures["commands_per_s"] for side, figures in medians.items()}
    shares = {}
    for name in ("bare", "sandboxed"):
        best = max((side for side in direct if side[0] == name), key=speeds.__getitem__)
        pairs = zip(runs["small", 0], runs[best], strict=True)
        ratios = [small["commands_per_s"] / tool["commands_per_s"] for small, tool in pairs]
        shares[name] = statistics.median(ratios)
        print(
            f"of the {name} tool's commands a second the small agent does {shares[name]:.0%} "
            f"({min(ratios):.0%} to {max(ratios):.0%})"
        )
    noop = [run_side(options, "noop") for _ in range(options.rounds)]
    turns = {key: statistics.median(run[key] for run in noop) for key in ("async_turns_per_s", "sync_turns_per_s")}
    print(
        f"tools that do nothing: {turns['async_turns_per_s']:.0f} turns/s, on threads {turns['sync_turns_per_s']:.0f}"
    )
    many = run_side(options, "many")
    print(f"{options.many} rollouts at once: {many['peak_rss_mb']:.0f} MB, all done in {many['seconds']:.1f} s")
    figures = {
        "rollouts": options.rollouts,
        "bare_commands_per_s": max(speeds["bare", threads] for threads in THREADS),
        "sandboxed_commands_per_s": max(speeds["sandboxed", threads] for threads in THREADS),
        "small_commands_per_s": speeds["small", 0],
        "hermes_commands_per_s": speeds["hermes", 0],
        "small_share_of_bare": shares["bare"],
        "small_share_of_sandboxed": shares["sandboxed"],
        "noop_turns_per_s": turns["async_turns_per_s"],
        "noop_on_threads_turns_per_s": turns["sync_turns_per_s"],
        "rollouts_at_once": options.many,
        "rollouts_at_once_peak_mb": many["peak_rss_mb"],
    }
    print(json.dumps({name: round(value, 3) for name, value in figures.items()}))


def run_side(options: argparse.Namespace, side: str, threads: int = 0) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as home:
        environment = {**os.environ, "HOME": home, "HERMES_HOME": f"{home}/.hermes"}
        sizes = ["--rollouts", str(options.rollouts), "--many", str(options.many), "--threads", str(threads)]
        arguments = [sys.executable, __file__, "--side", side, *sizes]
        done = subprocess.run(arguments, env=environment, stdout=subprocess.PIPE, text=True, check=True, timeout=900)
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


class Clock:
    """Time from now on until it is stopped, and processor time from now on until the figures are asked for.

    A shell that stays is counted once it has ended, with all that it ran.
    """

    def __init__(self) -> None:
        self._start = time.perf_counter(), cpu_seconds()

    def stop(self) -> Clock:
        self._end = time.perf_counter()
        return self

    def figures(self, commands: int) -> dict[str, float]:
        start, cpu = self._start
        return {
            "commands_per_s": commands / (self._end - start),
            "cpu_ms_per_command": (cpu_seconds() - cpu) * 1e3 / commands,
        }


def cpu_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


async def run_bare(options: argparse.Namespace) -> dict[str, float]:
    from tools import terminal_tool

    tasks = [f"bare-{number}" for number in range(options.rollouts + 1)]
    with tempfile.TemporaryDirectory() as folder:
        for task in tasks:
            os.mkdir(f"{folder}/{task}")
            terminal_tool.register_task_env_overrides(task, {"cwd": f"{folder}/{task}", "env_type": "local"})
        with ThreadPoolExecutor(8) as threads:
            list(threads.map(lambda task: terminal_tool.terminal_tool(command="true", task_id=task), tasks))
        clock = call_directly(tasks, options.threads)
        for task in tasks:
            terminal_tool.cleanup_vm(task)
    return clock.figures(COMMANDS * options.rollouts)


async def run_sandboxed(options: argparse.Namespace) -> dict[str, float]:
    from hermes_atropos.hermes.terminal import HermesSandbox

    sandboxes = [HermesSandbox() for _ in range(options.rollouts + 1)]
    clock = call_directly([sandbox.hermes_id for sandbox in sandboxes], options.threads)
    for sandbox in sandboxes:
        sandbox.release()
    return clock.figures(COMMANDS * options.rollouts)


def call_directly(tasks: list[str], threads: int) -> Clock:
    """Hermes' terminal tool on so many threads, in tasks whose environments are open; the first warms up."""
    import model_tools  # noqa: F401  (registers Hermes' tools)
    from tools.terminal_tool import terminal_tool

    def run(task: str) -> None:
        for number in range(COMMANDS):
            answer = json.loads(terminal_tool(command=command(number), task_id=task))
            assert answer["exit_code"] == 0, answer

    with ThreadPoolExecutor(threads) as pool:
        run(tasks[0])
        clock = Clock()
        list(pool.map(run, tasks[1:]))
        return clock.stop()


async def run_small(options: argparse.Namespace) -> dict[str, float]:
    from hermes_atropos.hermes.tools import HermesTools
    from hermes_atropos.react import AtroposAgent

    return await run_tasks(AtroposAgent(quick_server(terminal_replies()), HermesTools(["terminal"])), options)


async def run_hermes(options: argparse.Namespace) -> dict[str, float]:
    from hermes_atropos.hermes.agent import AtroposAIAgent
    from hermes_atropos.testing import ScriptedServer

    def model(messages: list[dict[str, str]]) -> str:
        return terminal_replies()[sum(message["role"] == "assistant" for message in messages)]

    agent = AtroposAIAgent(server=ScriptedServer(model), enabled_toolsets=["terminal"], quiet_mode=True)
    return await run_tasks(agent, options)


async def run_tasks(agent: Any, options: argparse.Namespace) -> dict[str, float]:
    """All rollouts at once, each in a sandbox that is open before the clock starts."""
    opened, finished = asyncio.Semaphore(0), asyncio.Semaphore(0)
    start, end = asyncio.Event(), asyncio.Event()

    async def rollout() -> None:
        async with agent.task() as task:
            opened.release()
            await start.wait()
            await task.run("Do the steps.")
            finished.release()
            await end.wait()
            assert (await task.read_file(f"step{COMMANDS - 1}.txt")).startswith("step")

    async with agent.task() as warm_up:
        await warm_up.run("Do the steps.")
    rollouts = [asyncio.create_task(rollout()) for _ in range(options.rollouts)]
    for _ in rollouts:
        await opened.acquire()
    clock = Clock()
    start.set()
    for _ in rollouts:
        await finished.acquire()
    clock.stop()
    end.set()
    await asyncio.gather(*rollouts)
    return clock.figures(options.rollouts * COMMANDS)


async def run_noop(options: argparse.Namespace) -> dict[str, float]:
    """What the loop itself costs, with a tool that runs on the event loop and with one that runs on a thread."""
    from hermes_atropos.react import AtroposAgent
    from hermes_atropos.testing import tool_call

    async def nothing(number: int) -> str:
        """Do nothing."""
        return "ok"

    def nothing_on_a_thread(number: int) -> str:
        """Do nothing."""
        return "ok"

    figures = {}
    for kind, tool in {"async": nothing, "sync": nothing_on_a_thread}.items():
        calls = [tool_call(tool.__name__, number=number) for number in range(NOOP_TURNS - 1)]
        agent = AtroposAgent(quick_server([*calls, "Done."]), [tool])
        await agent.run("Go.")
        start = time.perf_counter()
        results = await asyncio.gather(*[agent.run("Go.") for _ in range(options.rollouts)])
        seconds = time.perf_counter() - start
        assert all(result.success and result.num_steps == NOOP_TURNS for result in results)
        figures[f"{kind}_turns_per_s"] = options.rollouts * NOOP_TURNS / seconds
    return figures


def quick_server(replies: list[str], before: Callable[[], Awaitable[None]] | None = None) -> Any:
    """A server that costs next to nothing: its replies are tokenised once, prompts are neither decoded nor kept.

    Args:
        replies: of a rollout, turn by turn; all rollouts begin with the same prompt, and its end tokens tell the turn.
        before: awaited before each answer.
    """
    from hermes_atropos.testing import Reply, ScriptedServer

    class QuickServer(ScriptedServer):
        opening = sys.maxsize

        async def _tokens_and_logprobs_completion_wrapper(self, **kwargs: Any) -> tuple[Any, ...]:
            await (before() if before else asyncio.sleep(0))
            ids = kwargs["input_ids"]
            # Two messages a turn come after the first prompt: the answer and its tool's.
            self.opening = min(self.opening, len(ids))
            output_ids, _ = outputs[ids[self.opening :].count(self.end_token_id) // 2]
            return ids, [list(output_ids)], [[-0.5] * len(output_ids)], ["stop"]

    server = QuickServer(replies)
    outputs = [server._sample(Reply(reply), None) for reply in replies]
    return server


def terminal_replies() -> list[str]:
    from hermes_atropos.testing import tool_call

    calls = [tool_call("terminal", command=command(number)) for number in range(COMMANDS)]
    return [*calls, "All steps are done."]


async def run_many(options: argparse.Namespace) -> dict[str, float]:
    """Rollouts that are all under way at once: the model answers each only when all have asked."""
    from hermes_atropos.hermes.tools import HermesTools
    from hermes_atropos.react import AtroposAgent

    asked = 0
    everyone = asyncio.Event()

    async def wait_for_all() -> None:
        nonlocal asked
        asked += 1
        if asked == options.many:
            everyone.set()
        await everyone.wait()

    agent = AtroposAgent(quick_server(terminal_replies(), wait_for_all), HermesTools(["terminal"]))
    start = time.perf_counter()
    results = await asyncio.gather(*[agent.run("Do the steps.") for _ in range(options.many)])
    assert all(result.success for result in results)
    return {"seconds": time.perf_counter() - start}


SIDES = {
    "bare": run_bare,
    "sandboxed": run_sandboxed,
    "small": run_small,
    "hermes": run_hermes,
    "noop": run_noop,
    "many": run_many,
}


if __name__ == "__main__":
    main()
