"""An environment's rollouts a second with 1, 2 and 4 processes, and where a rollout's time goes.

Each rollout is a run of Hermes with five terminal commands in a sandbox and a verifier that runs another. The model
answers after 200 ms. The time of a rollout that runs alone is divided: the model, the commands of the tools, the
verifier, and all else, which is Hermes and this library: a profile says how much of that this library computes. Then so
many rollouts at once, in so many processes, and in two actors of a Ray cluster of this machine, beside two processes.
The last line printed is one JSON object of the figures.

    python benchmarks/environment.py [--rollouts 64] [--short]
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import itertools
import json
import os
import pstats
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from atroposlib.envs.base import APIServerConfig

import hermes_atropos
from hermes_atropos import HermesEnv, HermesEnvConfig, runtime
from hermes_atropos.environment import cluster
from hermes_atropos.testing import ScriptedServer, chatml_tokenizer, tool_call

LATENCY_S = 0.2
#: How many run alone, one after the other.
ALONE = 5
#: Seconds for which the processes of a Ray cluster are busy with their own start.
RAY_STARTS_S = 15
COMMANDS = ["echo one > one", "ls", "cat one", "wc -l one", "echo done > result"]


class Model(ScriptedServer):
    """Five commands and an answer, each after ``LATENCY_S``."""

    def __init__(self, config: APIServerConfig, reasoning_config: Any = None) -> None:
        super().__init__(answer, latency=LATENCY_S)


def answer(messages: list[dict[str, str]]) -> str:
    turn = sum(message["role"] == "assistant" for message in messages)
    return tool_call("terminal", command=COMMANDS[turn]) if turn < len(COMMANDS) else "Done."


class Commands(HermesEnv):
    """Counts the seconds that its verifier takes."""

    name = "commands"
    server_cls = Model
    verifying = 0.0

    def items(self) -> itertools.count[int]:
        return itertools.count()

    def prompt(self, item: int) -> str:
        return f"Do what is to be done, number {item}."

    async def verify(self, item: int, task: Any, result: Any) -> float:
        started = time.perf_counter()
        check = await task.terminal("grep -qx done result")
        self.verifying += time.perf_counter() - started
        return float(check.exit_code == 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rollouts", type=int, default=64, help="of each process, all at once")
    parser.add_argument("--short", action="store_true", help="8 rollouts, 1 and 2 processes")
    parser.add_argument("--child", choices=["process", "ray"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.short:
        options.rollouts = 8
    if options.child:
        asyncio.run(child(options.rollouts) if options.child == "process" else on_ray(options.rollouts))
        return
    figures: dict[str, Any] = {"cores": os.cpu_count(), "model_latency_s": LATENCY_S, "rollouts": options.rollouts}
    with tempfile.TemporaryDirectory() as folder:
        chatml_tokenizer().save_pretrained(Path(folder) / "tokenizer")
        for processes in (1, 2) if options.short else (1, 2, 4):
            figures |= measured(processes, options.rollouts, folder)
            if processes == 2:
                figures["rollouts_per_s_ray_2"] = measured_on_ray(options.rollouts, folder)
                ratio = figures["rollouts_per_s_ray_2"] / figures["rollouts_per_s_2"]
                figures["ratio_ray_to_processes"] = round(ratio, 2)
            print(figures)
    print(json.dumps(figures))


def measured(processes: int, rollouts: int, folder: str) -> dict[str, Any]:
    """Figures of so many processes at once; those of a rollout alone come from the first of one."""
    children = [started("process", rollouts, folder) for _ in range(processes)]
    alone, *_ = [json.loads(told(child)) for child in children]
    for child in children:
        assert child.stdin is not None
        print("go", file=child.stdin, flush=True)
    together = [json.loads(told(child)) for child in children]
    for child in children:
        assert child.wait() == 0
    rate = processes * rollouts / max(found["seconds"] for found in together)
    cpu = sum(found["cpu_s"] for found in together) / (processes * rollouts)
    figures = {f"rollouts_per_s_{processes}": round(rate, 2), f"cpu_s_per_rollout_{processes}": round(cpu, 3)}
    return (alone if processes == 1 else {}) | figures


def measured_on_ray(rollouts: int, folder: str) -> float:
    """Rollouts a second of two actors."""
    driver = started("ray", rollouts, folder)
    seconds = json.loads(told(driver))["seconds"]
    assert driver.wait() == 0
    return round(2 * rollouts / seconds, 2)


def started(kind: str, rollouts: int, folder: str) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, "--child", kind, "--rollouts", str(rollouts)]
    return subprocess.Popen(command, cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def told(child: subprocess.Popen[str]) -> str:
    """The next JSON line that a child prints."""
    assert child.stdout is not None
    line = next(line for line in child.stdout if line.startswith("{"))
    return line


async def child(rollouts: int) -> None:
    """Measure rollouts one after the other; at a word on standard input, all at once."""
    env = Commands(*configuration())
    tools = timed_tools()
    await one(env)  # what a process does once
    tools.clear()
    env.verifying, started = 0.0, time.perf_counter()
    for _ in range(ALONE):
        await one(env)
    seconds = time.perf_counter() - started
    shares = {
        "model": ALONE * LATENCY_S * (len(COMMANDS) + 1),
        "tools": sum(tools),
        "verifier": env.verifying,
    }
    shares["all_else"] = seconds - sum(shares.values())
    shares["own_code"] = shares["all_else"] * await own_part(env)
    print(json.dumps({"rollout_s": round(seconds / ALONE, 3)} | percent(shares, seconds)), flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    started, cpu = time.perf_counter(), time.process_time()
    await in_groups(env, rollouts)
    print(json.dumps({"seconds": time.perf_counter() - started, "cpu_s": time.process_time() - cpu}), flush=True)


async def on_ray(rollouts: int) -> None:
    """As many rollouts as two processes have, by two actors, once Ray's processes and they have started."""
    import ray

    ray.init(address="local", include_dashboard=False, log_to_driver=False, _node_ip_address="127.0.0.1")
    env = cluster.spread(Commands, f"{__file__}:Commands", 2, 1)(*configuration())
    await in_groups(env, 8)
    await asyncio.sleep(RAY_STARTS_S)
    started = time.perf_counter()
    await in_groups(env, 2 * rollouts)
    print(json.dumps({"seconds": time.perf_counter() - started}), flush=True)
    ray.shutdown()


async def in_groups(env: HermesEnv, rollouts: int) -> None:
    """So many rollouts at once, two to a group."""
    await asyncio.gather(*(env.collect_trajectories(number) for number in range(rollouts // 2)))


def configuration() -> tuple[HermesEnvConfig, list[APIServerConfig]]:
    return HermesEnvConfig(tokenizer_name="tokenizer", group_size=2), [APIServerConfig()]


async def one(env: Commands) -> None:
    _, score = await env.rollout(await env.get_next_item())
    assert score == 1.0


def percent(shares: dict[str, float], seconds: float) -> dict[str, float]:
    return {f"percent_{name}": round(100 * share / seconds, 1) for name, share in shares.items()}


def timed_tools() -> list[float]:
    """The seconds of each command that a tool runs in a sandbox, from now on."""
    from hermes_atropos.hermes.environments import InShells

    seconds: list[float] = []
    execute = InShells.execute

    def timed(self: Any, *args: Any, **options: Any) -> Any:
        started = time.perf_counter()
        try:
            return execute(self, *args, **options)
        finally:
            seconds.append(time.perf_counter() - started)

    InShells.execute = timed  # type: ignore[method-assign]
    return seconds


async def own_part(env: Commands) -> float:
    """The part of what ``ALONE`` rollouts compute, the model's apart, that functions of this library compute.

    What these call of Python's own library counts as theirs.
    """
    profiles = [cProfile.Profile(time.thread_time)]
    run_into = runtime.run_into

    def profiled(*args: Any) -> None:
        profiles.append(cProfile.Profile(time.thread_time))
        profiles[-1].runcall(run_into, *args)

    runtime.run_into = profiled
    profiles[0].enable()
    for _ in range(ALONE):
        await one(env)
    profiles[0].disable()
    runtime.run_into = run_into
    package = str(Path(hermes_atropos.__file__).parent)
    own = theirs = 0.0
    for profile in profiles:
        for (file, _, _), (_, _, itself, _, callers) in pstats.Stats(profile).stats.items():  # type: ignore[attr-defined]
            if file.startswith(f"{package}/testing/"):
                continue
            of_own = sum(
                seconds for (caller, _, _), (_, _, seconds, _) in callers.items() if caller.startswith(package)
            )
            mine = itself if file.startswith(package) else 0.0 if "site-packages" in file else of_own
            own, theirs = own + mine, theirs + itself - mine
    return own / (own + theirs)


if __name__ == "__main__":
    main()
