"""Walls: how long a rollout's takes to stand and to go, and what a thousand of them leave behind.

64 walled rollouts are under way at once, each of a command and of a model that takes its time, and new ones take the
places of those that end; then 64 walls are asked for at one instant; then one around a workspace of 1 GB in 20,000
files, which the rollout may change. What is counted as standing is all of ``async with agent.task(sandbox="walled")``
up to its body, and as gone all behind it. Last, four rollouts run commands, alone and beside a fifth that takes all it
can get. The exit status is 1 if a process, mount, control group or folder is left.
The last line printed is one JSON object of the figures, in milliseconds.

    python benchmarks/walls.py [--rollouts 1000] [--at-once 64] [--short]
"""

from __future__ import annotations

import argparse
import asyncio
import atexit
import json
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hermes_atropos.hermes.profile import use_training_profile

# A temporary folder of this process alone, so that whatever is in it at the end was left there.
FOLDER = Path(tempfile.mkdtemp(prefix="walls-"))
atexit.register(shutil.rmtree, FOLDER, ignore_errors=True)
os.environ["TMPDIR"] = tempfile.tempdir = str(FOLDER)
use_training_profile()

from hermes_atropos import AtroposAIAgent  # noqa: E402
from hermes_atropos.testing import ScriptedServer, tool_call  # noqa: E402

#: Seconds that an answer takes.
MODEL_S = (1.0, 5.0)
COMMAND = "echo one two > notes; cat notes | wc -w"
#: What a rollout starts in the background to take all it can get.
HOGS = {
    "nobody": "true",
    "a fork bomb": ":() { : | : & }; :",
    "a full disk": "while :; do head -c 400000000 /dev/zero > /tmp/full; head -c 400000000 /dev/zero > ~/full; done",
    "a memory hog": "while :; do python3 -c 'x = [bytearray(9_000_000) for _ in range(9_000)]'; done",
    "busy loops": "for n in 1 2 3 4 5 6 7 8; do while :; do :; done & done; wait",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rollouts", type=int, default=1000)
    parser.add_argument("--at-once", type=int, default=64)
    parser.add_argument("--short", action="store_true", help="64 rollouts, 16 at once, a workspace of 10 MB")
    options = parser.parse_args()
    if options.short:
        options.rollouts, options.at_once = 64, 16
    figures, remains = asyncio.run(measured(options))
    for what in sorted(remains):
        print("left:", what)
    print(json.dumps({name: round(value, 1) for name, value in figures.items()} | {"left": len(remains)}))
    sys.exit(bool(remains))


async def measured(options: argparse.Namespace) -> tuple[dict[str, float], set[str]]:
    """The figures, and what is left."""
    agent = AtroposAIAgent(
        server=ScriptedServer(model), enabled_toolsets=["terminal"], quiet_mode=True, skip_context_files=True
    )
    await opened(agent)
    before = left()  # with what is made once for the process
    alone = [await opened(agent) for _ in range(20)]
    began = time.monotonic()
    under_way = await rollouts(agent, options.rollouts, options.at_once)
    took = time.monotonic() - began
    together = await asyncio.gather(*(opened(agent) for _ in range(options.at_once)))
    with tempfile.TemporaryDirectory() as folder:
        fill(Path(folder), megabytes=10 if options.short else 1000, files=200 if options.short else 20_000)
        large = [await opened(agent, workspace=folder, copy=True) for _ in range(10)]
    figures = {"rollouts_per_s": options.rollouts / took}
    for hog, taking in HOGS.items():
        figures[f"command_beside_{hog}"] = await beside(agent, taking, 10 if options.short else 100) * 1e3
        print(f"a command beside {hog}: {figures[f'command_beside_{hog}']:.1f} ms (median)")
    sides = {"alone": alone, "under_way": under_way, "together": together, "large": large}
    for name, times in sides.items():
        for what, side in zip(("stands", "is gone"), zip(*times, strict=True), strict=True):
            median, late = statistics.median(side) * 1e3, statistics.quantiles(side, n=20)[-1] * 1e3
            print(f"{name:>10}: {what:>8} within {median:6.1f} ms (median), {late:6.1f} (95 of 100)")
            figures[f"{name}_{what.split()[-1]}"] = median
    return figures, left() - before


async def opened(agent: AtroposAIAgent, work: Callable[[Any], Any] | None = None, **given: Any) -> tuple[float, float]:
    """A walled task: the seconds until it stood, and those until it was gone."""
    began = time.monotonic()
    async with agent.task(sandbox="walled", **given) as task:
        stood = time.monotonic() - began
        if work is not None:
            await work(task)
        ended = time.monotonic()
    return stood, time.monotonic() - ended


async def rollouts(agent: AtroposAIAgent, number: int, at_once: int) -> list[tuple[float, float]]:
    places = asyncio.Semaphore(at_once)

    async def rollout() -> tuple[float, float]:
        async with places:
            return await opened(agent, lambda task: task.run("Say hello in the shell."))

    return await asyncio.gather(*(rollout() for _ in range(number)))


async def beside(agent: AtroposAIAgent, hog: str, commands: int) -> float:
    """The median of the seconds that a command takes while another rollout runs ``hog``."""

    async def run(task: Any, command: str) -> float:
        began = time.monotonic()
        await task.sandbox.call(lambda: task.sandbox.run(command))
        return time.monotonic() - began

    async def neighbour() -> list[float]:
        async with agent.task(sandbox="walled") as task:
            times = []
            for _ in range(commands):
                times.append(await run(task, COMMAND))
                await asyncio.sleep(0.05)
            return times

    async with agent.task(sandbox="walled") as task:
        await run(task, f"({hog}) > /dev/null 2>&1 &")
        await asyncio.sleep(1)
        times = await asyncio.gather(*(neighbour() for _ in range(4)))
    return statistics.median(one for neighbours in times for one in neighbours)


async def model(messages: list[dict[str, str]]) -> str:
    await asyncio.sleep(random.uniform(*MODEL_S))
    answered = "<tool_response>" in messages[-1]["content"]
    return "Done." if answered else tool_call("terminal", command="echo hello")


def fill(folder: Path, *, megabytes: int, files: int) -> None:
    content = os.urandom(megabytes * 1_000_000 // files)
    for number in range(files):
        path = folder / f"{number // 100}" / f"{number}.bin"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)


def left() -> set[str]:
    """Folders of this process, its children, its control groups, and the mounts of this machine."""
    files = {f"folder {path}" for path in FOLDER.iterdir() if path.name.startswith("hermes-atropos")}
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    groups = {f"control group {path}" for path in Path("/sys/fs/cgroup").rglob(f"hermes-atropos-{os.getpid()}-*")}
    mounts = {f"mount {line.split()[4]}" for line in Path("/proc/self/mountinfo").read_text().splitlines()}
    return files | {f"process {child}" for child in children} | groups | mounts


if __name__ == "__main__":
    main()
