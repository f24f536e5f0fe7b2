"""An environment's rollouts a second with 1, 2 and 4 processes, and where a rollout's time goes.

Each rollout is a run of Hermes with five terminal commands in a sandbox and a verifier that runs another. The model
answers after 200 ms. The time of a rollout that runs alone is divided: the model, the commands of the tools, the
verifier, and all else, which is Hermes and this library. Then so many rollouts at once, in so many processes. The last
line printed is one JSON object of the figures.

    python benchmarks/environment.py [--rollouts 64] [--short]
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from atroposlib.envs.base import APIServerConfig

from hermes_atropos import HermesEnv, HermesEnvConfig
from hermes_atropos.testing import ScriptedServer, chatml_tokenizer, tool_call

LATENCY_S = 0.2
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
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.short:
        options.rollouts = 8
    if options.child:
        asyncio.run(child(options.rollouts))
        return
    figures: dict[str, Any] = {"cores": os.cpu_count(), "model_latency_s": LATENCY_S, "rollouts": options.rollouts}
    with tempfile.TemporaryDirectory() as folder:
        chatml_tokenizer().save_pretrained(Path(folder) / "tokenizer")
        for processes in (1, 2) if options.short else (1, 2, 4):
            figures |= measured(processes, options.rollouts, folder)
            print(figures)
    print(json.dumps(figures))


def measured(processes: int, rollouts: int, folder: str) -> dict[str, Any]:
    """Figures of so many processes at once; those of a rollout alone come from the first of one."""
    command = [sys.executable, __file__, "--child", "--rollouts", str(rollouts)]
    children = [
        subprocess.Popen(command, cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(processes)
    ]
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


def told(child: subprocess.Popen[str]) -> str:
    """The next JSON line that a child prints."""
    assert child.stdout is not None
    line = next(line for line in child.stdout if line.startswith("{"))
    return line


async def child(rollouts: int) -> None:
    """Measure rollouts one after the other; at a word on standard input, all at once."""
    env = Commands(HermesEnvConfig(tokenizer_name="tokenizer", group_size=2), [APIServerConfig()])
    tools = timed_tools()
    await one(env)  # what a process does once
    tools.clear()
    env.verifying, started = 0.0, time.perf_counter()
    alone = 5
    for _ in range(alone):
        await one(env)
    seconds = time.perf_counter() - started
    shares = {
        "model": alone * LATENCY_S * (len(COMMANDS) + 1),
        "tools": sum(tools),
        "verifier": env.verifying,
    }
    shares["all_else"] = seconds - sum(shares.values())
    print(json.dumps({"rollout_s": round(seconds / alone, 3)} | percent(shares, seconds)), flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    started, cpu = time.perf_counter(), time.process_time()
    await asyncio.gather(*(one(env) for _ in range(rollouts)))
    print(json.dumps({"seconds": time.perf_counter() - started, "cpu_s": time.process_time() - cpu}), flush=True)


async def one(env: Commands) -> None:
    _, score = await env.rollout(await env.get_next_item())
    assert score == 1.0


def percent(shares: dict[str, float], seconds: float) -> dict[str, float]:
    return {f"percent_{name}": round(100 * share / seconds, 1) for name, share in shares.items()}


def timed_tools() -> list[float]:
    """The seconds of each command that a tool runs in a sandbox, from now on."""
    from hermes_atropos.hermes.terminal import TaskEnvironment

    seconds: list[float] = []
    execute = TaskEnvironment.execute

    def timed(self: Any, *args: Any, **options: Any) -> Any:
        started = time.perf_counter()
        try:
            return execute(self, *args, **options)
        finally:
            seconds.append(time.perf_counter() - started)

    TaskEnvironment.execute = timed  # type: ignore[method-assign]
    return seconds


if __name__ == "__main__":
    main()
