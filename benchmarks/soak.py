"""Many rollouts at once, in health and after every fault: who finishes, what is left, how late the event loop gets.

Each rollout makes five tool calls in a workspace and a shell of its own, with a model that answers in 200 ms; what the
tools answer shows whether it saw another's files or exports. Then as many rollouts at once meet a fault, and the same
check follows, for each fault. The last line printed is one JSON object of the figures; the exit code is 1 if a rollout
did not end as it should or left something behind.

On a busy machine the loop is late because others compute. So what is printed beside is the part of a delay in which
this process computed itself, and the machine's load.

    python benchmarks/soak.py [--rollouts 200] [--sandbox walled] [--short]
"""

from __future__ import annotations

import argparse
import asyncio
import atexit
import contextlib
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hermes_atropos.hermes.profile import use_training_profile

# A temporary folder of this process alone, so that whatever is in it at the end was left there.
FOLDER = Path(tempfile.mkdtemp(prefix="soak-"))
atexit.register(shutil.rmtree, FOLDER, ignore_errors=True)
os.environ["TMPDIR"] = tempfile.tempdir = str(FOLDER)
PROFILE = use_training_profile()

from tools import terminal_tool  # noqa: E402  (Hermes' own, once it knows its home)

from hermes_atropos import AtroposAIAgent, StopReason  # noqa: E402
from hermes_atropos.harness import Task  # noqa: E402
from hermes_atropos.sandbox.processes import MARKER  # noqa: E402
from hermes_atropos.testing import Reply, ScriptedServer, tool_call  # noqa: E402

LATENCY_S = 0.2
MALFORMED = '<tool_call>\n{"name": "terminal", "arguments": {"command": }\n</tool_call>'
#: Where every rollout's tools act: ``--sandbox``.
SANDBOX = "folder"

LOOK = 'echo "$MARK $(cat mark) $(cat notes) $(ls | tr "\\n" " ")"'
HANGING = "bash -c 'sleep 1000 & setsid sleep 1000 & sleep 1000'"

Model = Callable[[list[dict[str, str]]], "str | Reply"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rollouts", type=int, default=200)
    parser.add_argument("--sandbox", choices=["folder", "walled"], default="folder", help="of every rollout")
    parser.add_argument("--short", action="store_true", help="24 rollouts, 8 for each fault, a quicker model")
    options = parser.parse_args()
    global SANDBOX
    SANDBOX = options.sandbox
    rollouts, at_fault = (24, 8) if options.short else (options.rollouts, options.rollouts)
    global LATENCY_S
    if options.short:
        LATENCY_S = 0.05
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts with "&" ignores it: see ctrl_c
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):  # Hermes tells of each failed call
        checks, remains = asyncio.run(soak(rollouts, at_fault))
    figures = report(checks, remains)
    print(json.dumps(figures))
    sys.exit(bool(figures["wrong"] or figures["left"]))


async def soak(rollouts: int, at_fault: int) -> tuple[dict[str, Check], list[str]]:
    """Everything, one after the other; what each check found, and what is left at the end."""
    await health(2)  # starts what a process has once: tokenizer, threads, login shell
    before = set(left())
    checks = {"health": await health(rollouts)}
    for name, fault in FAULTS.items():
        checks[name] = await meet(fault, at_fault)
        checks[f"after {name}"] = await health(at_fault)
    if SANDBOX == "walled":
        await asyncio.sleep(2.5)  # Hermes looks every 2 seconds after a process that is not this machine's
    return checks, sorted(set(left()) - before)


def report(checks: dict[str, Check], remains: list[str]) -> dict[str, Any]:
    """Print what was found; the figures."""
    for name, check in checks.items():
        p50, p99, latest = milliseconds(check.lateness)
        print(
            f"{name:>33}: {check.rollouts} rollouts in {check.seconds:5.1f} s, "
            f"{check.cpu_s / check.rollouts * 1e3:4.0f} ms of CPU each; "
            f"loop late by {p50:4.1f} ms (p50) {p99:6.1f} (p99) {latest:6.1f} (max), "
            f"of which our own {milliseconds(check.own)[1]:5.1f} (p99); "
            f"released within {check.released_s:4.2f} s; {len(check.wrong)} wrong; load {check.load:.0f}"
        )
    for name, check in checks.items():
        for what in check.wrong[:5]:
            print(f"{name}: {what}")
    for what in remains:
        print(f"left: {what}")
    healthy = checks["health"]
    faults = [checks[name] for name in FAULTS]
    p50, p99, latest = milliseconds(healthy.lateness)
    return {
        "rollouts": healthy.rollouts,
        "rollouts_per_s": round(healthy.rollouts / healthy.seconds, 2),
        "cpu_ms_a_rollout": round(healthy.cpu_s / healthy.rollouts * 1e3),
        "loop_late_p50_ms": round(p50, 2),
        "loop_late_p99_ms": round(p99, 2),
        "loop_late_max_ms": round(latest, 2),
        "loop_late_own_p99_ms": round(milliseconds(healthy.own)[1], 2),
        "at_fault_p99_ms": round(max(milliseconds(check.lateness)[1] for check in faults), 2),
        "at_fault_own_p99_ms": round(max(milliseconds(check.own)[1] for check in faults), 2),
        "released_within_s": round(max(check.released_s for check in checks.values()), 2),
        "load": round(max(check.load for check in checks.values()), 1),
        "faults": list(FAULTS),
        "wrong": sum(len(check.wrong) for check in checks.values()),
        "left": len(remains),
        "peak_rss_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    }


def milliseconds(delays: list[float]) -> tuple[float, float, float]:
    """The median, the 99th percentile and the maximum of seconds."""
    late = sorted(delays) or [0.0]
    return late[len(late) // 2] * 1e3, late[len(late) * 99 // 100] * 1e3, late[-1] * 1e3


# ── In health ────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class Check:
    """What came of one round of rollouts.

    Attributes:
        cpu_s: CPU seconds of this process and of the children that ended meanwhile.
        lateness: how late each of the event loop's turns was, in seconds.
        own: for how much of each this process computed.
        released_s: from the end of a run until its sandbox was gone, at most.
        wrong: a line for each thing that was not as it should be.
        load: of the machine at the end, in processes that want to run.
    """

    rollouts: int
    seconds: float = 0.0
    cpu_s: float = 0.0
    lateness: list[float] = field(default_factory=list)
    own: list[float] = field(default_factory=list)
    released_s: float = 0.0
    wrong: list[str] = field(default_factory=list)
    load: float = 0.0

    @contextlib.asynccontextmanager
    async def taken(self) -> AsyncIterator[None]:
        """Note how long the block takes, and every 5 ms how late the loop is."""

        async def tick() -> None:
            loop = asyncio.get_running_loop()
            while True:
                due, computed = loop.time() + 0.005, time.process_time()
                await asyncio.sleep(0.005)
                self.lateness.append(loop.time() - due)
                self.own.append(min(self.lateness[-1], time.process_time() - computed))

        started, computed = time.perf_counter(), cpu_seconds()
        ticker = asyncio.create_task(tick())
        try:
            yield
        finally:
            ticker.cancel()
            self.seconds, self.cpu_s = time.perf_counter() - started, cpu_seconds() - computed
            self.load = os.getloadavg()[0]

    @contextlib.asynccontextmanager
    async def task(self, agent: AtroposAIAgent) -> AsyncIterator[Task]:
        """A task of the agent; note how long its release takes."""
        ended: list[float] = []
        try:
            async with agent.task(sandbox=SANDBOX) as task:
                try:
                    yield task
                finally:
                    ended.append(time.perf_counter())
        finally:
            self.released_s = max([self.released_s, *(time.perf_counter() - moment for moment in ended)])


def cpu_seconds() -> float:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


async def health(rollouts: int) -> Check:
    """So many at once: all finish, and none sees another's files or exports."""
    agent = agent_on(steps)
    check = Check(rollouts)
    async with check.taken():
        outcomes = await asyncio.gather(
            *(one_in_health(check, agent, number) for number in range(rollouts)), return_exceptions=True
        )
    check.wrong = [repr(outcome) for outcome in outcomes if outcome is not None]
    return check


def steps(messages: list[dict[str, str]]) -> str:
    """Five calls: leave marks in the shell and in files, with both kinds of tools, and look at what there is."""
    number = re.search(r"Rollout (\d+)\.", messages[1]["content"])
    assert number is not None
    mark = f"mark{number[1]}"
    calls = [
        tool_call("terminal", command=f"export MARK={mark}; echo {mark} > mark; pwd"),
        tool_call("write_file", path="notes", content=mark),
        tool_call("terminal", command=LOOK),
        tool_call("read_file", path="notes"),
        tool_call("terminal", command=LOOK),
        "All done.",
    ]
    return calls[sum(message["role"] == "assistant" for message in messages)]


async def one_in_health(check: Check, agent: AtroposAIAgent, number: int) -> str | None:
    """What is wrong with the rollout; None if nothing is."""
    mark = f"mark{number}"
    async with check.task(agent) as task:
        result = await task.run(f"Rollout {number}.")
        found = await task.sandbox.call(lambda: task.sandbox.run(LOOK))  # in the shell as the model left it
        workspace = str(task.workspace)
        shown = "/workspace" if SANDBOX == "walled" else workspace
    answers = [message["content"] for message in result["messages"] if message["role"] == "tool"]
    if result["stop_reason"] is not StopReason.COMPLETED or len(answers) != 5:
        return f"rollout {number} ended as {result['stop_reason']} after {len(answers)} calls: {result['error']}"
    seen = f"{mark} {mark} {mark} mark notes"
    where, _, first, read, second = map(json.loads, answers)
    if not (
        where["output"] == shown
        and first["output"].strip() == second["output"].strip() == found.output.strip() == seen
        and read["content"].endswith(mark)
    ):
        return f"rollout {number} saw {answers} and {found.output!r}, not {seen!r} in {workspace}"
    if len(result["trajectory"].sequences) != 1 or os.path.exists(workspace):  # noqa: ASYNC240
        return f"rollout {number} has {len(result['trajectory'].sequences)} sequences, or its workspace is still there"
    return None


# ── Faults ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Fault:
    """What goes wrong after a first call that went well and left a process running.

    Attributes:
        model: the answers after the first.
        reason: how the rollout says that it ended; None where it is cancelled.
        options: of the agent.
        disturb: what is done to the rollouts from outside while they run.
    """

    model: Model
    reason: StopReason | None
    options: dict[str, Any] = field(default_factory=dict)
    disturb: Callable[[AtroposAIAgent, list[asyncio.Task[Any]]], Any] = lambda agent, runs: None


def cancel_at_random(agent: AtroposAIAgent, runs: list[asyncio.Task[Any]]) -> None:
    loop = asyncio.get_running_loop()
    for run in runs:
        loop.call_later(random.uniform(0.0, 0.03) * len(runs), run.cancel)


def interrupt(agent: AtroposAIAgent, runs: list[asyncio.Task[Any]]) -> None:
    """As long as there is someone to hear it: some may not have begun yet."""
    if not all(run.done() for run in runs):
        agent.interrupt()
        asyncio.get_running_loop().call_later(0.5, interrupt, agent, runs)


def ctrl_c(agent: AtroposAIAgent, runs: list[asyncio.Task[Any]]) -> None:
    """Once, when the subagents of all hang: each rollout has asked the model three times then."""
    loop, asked = asyncio.get_running_loop(), len(agent._served.server.requests)
    if asked < 3 * len(runs):
        loop.call_later(0.1, ctrl_c, agent, runs)
    else:
        loop.call_later(1.0, os.kill, os.getpid(), signal.SIGINT)


def delegates(messages: list[dict[str, str]]) -> str:
    """To a subagent, whose first call hangs."""
    own = messages[1]["content"] == "Go."
    return tool_call("delegate_task", goal="Hang.") if own else tool_call("terminal", command=HANGING)


def hangs_once(messages: list[dict[str, str]]) -> str:
    said = sum(message["role"] == "assistant" for message in messages)
    return tool_call("terminal", command=HANGING, timeout=1) if said == 1 else "It hung."


FAULTS = {
    "a tool that hangs": Fault(hangs_once, StopReason.COMPLETED),
    "a server that raises": Fault(lambda _: Reply(error=RuntimeError("out of memory")), StopReason.SERVER_ERROR),
    "a server that never answers": Fault(lambda _: Reply(hang=True), StopReason.TIMEOUT),
    "cancellation": Fault(lambda _: tool_call("terminal", command=HANGING), None, disturb=cancel_at_random),
    "Ctrl-C with subagents": Fault(delegates, None, {"enabled_toolsets": ["terminal", "delegation"]}, disturb=ctrl_c),
    "an interrupt": Fault(lambda _: tool_call("terminal", command=HANGING), StopReason.INTERRUPTED, disturb=interrupt),
    "the iteration limit": Fault(
        lambda messages: "A summary." if len(messages) > 6 else tool_call("terminal", command="true"),
        StopReason.ITERATION_LIMIT,
        {"max_iterations": 3},
    ),
    "malformed calls": Fault(lambda _: MALFORMED, StopReason.TOOL_CALL_RETRIES),
}


async def meet(fault: Fault, rollouts: int) -> Check:
    """So many rollouts at once meet the fault."""

    def model(messages: list[dict[str, str]]) -> str | Reply:
        said = any(message["role"] == "assistant" for message in messages)
        if messages[1]["content"] == "Go." and not said:
            return tool_call("terminal", command="echo begun; sleep 1000 >/dev/null 2>&1", background=True)
        return fault.model(messages)

    async def rollout() -> StopReason:
        async with check.task(agent) as task:
            reason: StopReason = (await task.run("Go."))["stop_reason"]
            return reason

    if fault.reason is StopReason.TIMEOUT:
        os.environ["ATROPOS_AGENT_CHAT_TIMEOUT_S"] = "1"
    agent = agent_on(model, **fault.options)
    check = Check(rollouts)
    async with check.taken():
        runs = [asyncio.create_task(rollout()) for _ in range(rollouts)]
        fault.disturb(agent, runs)
        try:
            outcomes = await asyncio.gather(*runs, return_exceptions=True)
        except asyncio.CancelledError:  # Ctrl-C, as asyncio.run has it: all of them have ended
            outcomes = [asyncio.CancelledError() if run.cancelled() else run.result() for run in runs]
    os.environ.pop("ATROPOS_AGENT_CHAT_TIMEOUT_S", None)
    if fault.reason is None:
        check.wrong = [repr(outcome) for outcome in outcomes if not isinstance(outcome, asyncio.CancelledError)]
    else:
        check.wrong = [f"ended as {outcome!r}" for outcome in outcomes if outcome is not fault.reason]
    return check


# ── What may not be left ─────────────────────────────────────────────────────────────────────────────────────────────


def left() -> list[str]:
    """Sandboxes, threads beyond the pools, processes, temporary files."""
    # The last two are Hermes' own from 0.21 on: eight threads and one, for the process.
    pools = ("hermes-atropos-", "asyncio_", "relay-scope-op", "hermes-periodic-scheduler")
    threads = [thread.name for thread in threading.enumerate() if not thread.name.startswith(pools)]
    files = [str(path) for path in FOLDER.iterdir() if path != PROFILE]
    environments = [f"environment {name}" for name in terminal_tool._active_environments]
    overrides = [f"override {name}" for name in terminal_tool._task_env_overrides]
    return [*threads, *files, *environments, *overrides, *processes()]


def processes() -> list[str]:
    """Those of this process's sandboxes, and its children."""
    found = []
    mark = f"{MARKER}={os.getpid()}-".encode()
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            state, parent = entry.joinpath("stat").read_text().rpartition(")")[2].split()[:2]
            if state != "Z" and (parent == str(os.getpid()) or mark in entry.joinpath("environ").read_bytes()):
                found.append(f"process {entry.name}: {entry.joinpath('cmdline').read_text()}")
    return found


def agent_on(model: Model, **options: Any) -> AtroposAIAgent:
    return AtroposAIAgent(
        server=ScriptedServer(model, latency=LATENCY_S),
        quiet_mode=True,
        skip_context_files=True,
        skip_memory=True,
        **{"enabled_toolsets": ["terminal", "file"], **options},
    )


if __name__ == "__main__":
    main()
