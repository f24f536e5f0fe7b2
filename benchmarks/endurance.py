"""Half an hour of rollouts among faults at random: each comes to what it should, and what they use levels off.

So many rollouts of one environment are under way all the time. About half of them are healthy, and each of the others
meets a fault: of the server, of a tool, of the verifier, or it is cancelled. For every kind there is what may come of
it; whatever else does is wrong, and named. Memory, threads, processes, descriptors, temporary files and Hermes' books
level off if their median in the last quarter of the time is about that in the second. At the end nothing may be left.
The last line printed is one JSON object of the figures; the exit code is 1 if something is wrong, not accounted for,
left, or has not levelled off. What does not end by itself is named and ended two minutes after the time.

    python benchmarks/endurance.py [--minutes 30] [--rollouts 100] [--seed 0] [--sandbox walled] [--short]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import faulthandler
import functools
import json
import logging
import os
import random
import re
import shutil
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

# First, because it gives this process a temporary folder and the training profile before Hermes is imported.
from soak import FOLDER, HANGING, LOOK, MALFORMED, left, processes, terminal_tool

# isort: split
import psutil
from atroposlib.envs.base import APIServerConfig
from tools.process_registry import process_registry

from hermes_atropos import HermesEnv, HermesEnvConfig, StopReason
from hermes_atropos.errors import BackendResponseError, RolloutFailed, VerifierError
from hermes_atropos.harness import OpenedTask, Task
from hermes_atropos.sandbox.limits import Limits, hierarchies
from hermes_atropos.testing import Reply, ScriptedServer, chatml_tokenizer, tool_call
from hermes_atropos.trajectory import read_records

#: Seconds that a model's answer takes, and that a model call, a run and a verifier may take.
LATENCY_S, CALL_S, RUN_S, VERIFIER_S = 0.2, 6.0, 60.0, 20.0
#: Seconds between two looks at the levels, between two lines, and for which what is under way at the end may go on.
LOOK_S, LINE_S, GRACE_S = 2.0, 30.0, 120.0
#: Of each walled rollout: small, so that reaching them costs the machine little.
LIMITS = Limits(memory_bytes=400_000_000, processes=100, file_bytes=40_000_000, space_bytes=10_000_000)
#: Files of the benchmark itself.
OWN = FOLDER / "endurance"
TOKENIZER, RECORDS, ASIDE = OWN / "tokenizer", OWN / "records.jsonl", OWN / "aside.jsonl"
say = functools.partial(print, file=sys.__stdout__, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--rollouts", type=int, default=100, help="under way at once")
    parser.add_argument("--seed", type=int, default=0, help="of what each rollout meets, and when")
    parser.add_argument("--sandbox", choices=["walled", "folder"], default="walled", help="of every rollout")
    parser.add_argument("--short", action="store_true", help="2 minutes, 24 rollouts, wider bounds")
    options = parser.parse_args()
    if options.short:
        options.minutes, options.rollouts = 2, 24
    # For a loop that stands still, or threads that never end: their stacks are printed, and the process ends.
    faulthandler.dump_traceback_later(60 * options.minutes + GRACE_S + 60, exit=True)
    logging.disable(logging.CRITICAL)  # each fault is told of
    os.environ["ATROPOS_AGENT_CHAT_TIMEOUT_S"] = str(CALL_S)
    chatml_tokenizer().save_pretrained(TOKENIZER)  # which makes the folder
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):  # Hermes tells of each failed call
        sys.exit(asyncio.run(endured(options)))


@dataclass(frozen=True)
class Kind:
    """What a rollout may meet, how often, and in how many attempts; :class:`Course` has its server and its verifier.

    Attributes:
        calls: of the model, after the one that leaves the rollout's mark.
        said: what the tools' answers must hold, where the rollout is scored: a pattern.
        right: what may come of it.
        held: whether the machine might suffer without a wall, and a control group that counts processes.
    """

    weight: int
    calls: tuple[str, ...] = ()
    said: str = ""
    right: tuple[str, ...] = ("score 1",)
    attempts: int = 1
    held: bool = False


#: ``NUMBER`` is the rollout's.
WRITE, READ = tool_call("write_file", path="notes", content="NUMBER"), tool_call("read_file", path="notes")
CALLS, SEEN = (WRITE, tool_call("terminal", command=LOOK), READ), "NUMBER NUMBER NUMBER mark notes"
# In a bash of their own, because Hermes refuses commands in which it sees that something goes on behind them.
BOMB = tool_call("terminal", command="bash -c 'bomb() { bomb | bomb & }; bomb; sleep 1000'", timeout=2)
LEAVES = tool_call("terminal", command="bash -c 'setsid sleep 1000 >/dev/null 2>&1 & echo gone on'")
STAYS = tool_call("terminal", command="sleep 1000 >/dev/null 2>&1", background=True)
FILLS = tool_call("terminal", command="head -c 20M /dev/zero > /tmp/large; head -c 60M /dev/zero > large")
FLOODS = tool_call("terminal", command="yes 'The command finished with exit code 0.' | head -c 10000000")

KINDS = {
    "healthy": Kind(50, CALLS, SEEN),
    "a server that raises": Kind(4, CALLS, right=("failed as server_error",), attempts=2),
    "a server that raises once": Kind(3, CALLS, SEEN, attempts=2),
    "a server that is busy once": Kind(3, CALLS, SEEN),
    "a server that never answers": Kind(4, CALLS, right=("failed as timeout",), attempts=2),
    "slow answers": Kind(4, CALLS, SEEN),
    "an abort": Kind(4, CALLS, SEEN),
    "a tool that hangs": Kind(5, (tool_call("terminal", command=HANGING, timeout=1),), "timed out"),
    "a fork bomb": Kind(2, (BOMB,), "timed out", held=True),
    "a full disk": Kind(3, (FILLS,), "No space left.*File size limit exceeded", held=True),
    "much output": Kind(3, (FLOODS,), "OUTPUT TRUNCATED"),
    "processes that stay": Kind(4, (STAYS, LEAVES), "gone on"),
    "malformed calls": Kind(3, right=("score 0, tool_call_retries",)),
    "a verifier that raises": Kind(3, CALLS, right=("the verifier: ZeroDivisionError",)),
    "a verifier that hangs": Kind(2, CALLS, right=("the verifier: TimeoutError",)),
    "cancellation": Kind(5, (*CALLS, tool_call("terminal", command=HANGING)), right=("cancelled",)),
    "cancellation at the end": Kind(3, CALLS, SEEN, right=("cancelled", "score 1")),
}


class Course:
    """One item: what its rollout meets, depending on the seed and the number alone, and what has come of it so far."""

    def __init__(self, number: int, name: str, own: random.Random) -> None:
        self.number, self.name, self.kind, self.random = number, name, KINDS[name], own
        self.run: Any = None
        self.attempts = self.failed = 0
        self.tasks: list[Task] = []
        # In which turn of the model its server fails, if it does, and after which part of an answer.
        self.at, self.share = own.randrange(len(self.kind.calls) + 2), own.random()

    def answer(self, turn: int) -> str | Reply:
        """What the server brings in a turn of the model, which leaves a mark, does what its kind asks for, and ends."""
        mark = tool_call("terminal", command="export MARK=NUMBER; echo NUMBER > mark")
        text = dict(enumerate([mark, *self.kind.calls])).get(turn, "Done.").replace("NUMBER", str(self.number))
        at = turn == self.at
        self.failed += at
        part = round(self.share * len(text))
        match self.name, at and self.failed:
            case "malformed calls", _:
                return MALFORMED
            case "slow answers", _:
                return Reply(text, latency=self.random.uniform(1.0, CALL_S / 2))
            case ("a server that raises", 1 | 2) | ("a server that raises once", 1):
                return Reply(error=RuntimeError("CUDA out of memory"))
            case "a server that is busy once", 1:
                return Reply(error=BackendResponseError("busy", status=503))
            case "a server that never answers", 1 | 2:
                return Reply(hang=True)
            case "an abort", 1:  # as engines do for new weights: what is asked next is the rest
                return Reply(text[:part], finish_reason="abort")
            case "an abort", 2:
                return text[part:]
        return text

    async def verified(self, task: Task) -> None:
        """What its verifier does before it looks for the mark."""
        match self.name:
            case "a verifier that raises":
                raise ZeroDivisionError("no tests ran")
            case "a verifier that hangs":
                await (asyncio.Event().wait() if self.share < 0.5 else task.terminal(HANGING, timeout=1000))
            case "cancellation at the end":  # in what follows: verifier, record, release
                self.cancel_within(0.5)

    def cancel_within(self, seconds: float) -> None:
        asyncio.get_running_loop().call_later(self.random.uniform(0, seconds), self.run.cancel)

    def wrong(self, outcome: str, trajectory: Any) -> Iterator[str]:
        """What is not as it should be, now that it has ended."""
        if outcome not in self.kind.right:
            yield f"came to {outcome!r}"
        if outcome != "cancelled" and self.attempts != self.kind.attempts:
            yield f"was tried {self.attempts} times"
        if trajectory is not None:
            answers = "\n".join(message["content"] for message in trajectory.messages if message["role"] == "tool")
            said = self.kind.said.replace("NUMBER", str(self.number))
            if not re.search(said, answers, re.DOTALL):
                yield f"heard of its tools not {said!r} but {answers[-300:]!r}"
            if trajectory.fidelity.aborts != (self.name == "an abort"):
                yield f"had {trajectory.fidelity.aborts} aborts"


COURSES: dict[int, Course] = {}  # of the rollouts under way, by number


class Model(ScriptedServer):
    """Says what the course of the rollout that asks has for this turn."""

    def __init__(self, config: APIServerConfig, reasoning_config: Any = None) -> None:
        super().__init__(self.say, latency=LATENCY_S)

    def say(self, messages: list[dict[str, str]]) -> str | Reply:
        self.requests.clear()  # kept for tests: they would grow with the time
        number = int(re.findall(r"Rollout (\d+)\.", messages[1]["content"])[0])
        return COURSES[number].answer(sum(message["role"] == "assistant" for message in messages))


class Rollouts(HermesEnv):
    """Its items are the numbers of courses."""

    name = "endurance"
    server_cls = Model

    def prompt(self, item: int) -> str:
        return f"Rollout {item}."

    def task(self, item: int) -> OpenedTask[Any]:
        COURSES[item].attempts += 1
        limits = {"limits": LIMITS} if self.config.sandbox == "walled" else {}
        return self.agent.task(**self.config.sandbox_arguments(), **limits)

    async def prepare(self, item: int, task: Task) -> None:
        COURSES[item].tasks.append(task)

    async def verify(self, item: int, task: Task, result: Any) -> float:
        await COURSES[item].verified(task)
        return float((await task.terminal("cat mark")).output == f"{item}\n")


def outcome_of(run: asyncio.Task[Any]) -> tuple[str, Any]:
    """What came of a rollout, in words; and its trajectory, where it was scored."""
    if run.cancelled():
        return "cancelled", None
    error = run.exception()
    if error is None:
        result, score = run.result()
        return f"score {score:g}" + f", {result.stop_reason}" * (result.stop_reason is not StopReason.COMPLETED), result
    if isinstance(error, RolloutFailed) and error.trajectory is not None:
        return f"failed as {error.trajectory.stop_reason}", None
    if isinstance(error, VerifierError):
        return f"the verifier: {type(error.__cause__).__name__}", None
    return repr(error)[:300], None


def levels() -> dict[str, float]:
    """``files`` are entries of the temporary folder, ``books`` the terminal environments that Hermes knows of.

    ``blocks_k`` are thousands of blocks of memory in Python's own use, most of them an object each.
    """
    return {
        "rss_mb": psutil.Process().memory_info().rss / 1e6,
        "blocks_k": sys.getallocatedblocks() / 1e3,
        "threads": len(os.listdir("/proc/self/task")),
        "processes": len(all_processes()),
        "descriptors": len(os.listdir("/proc/self/fd")),
        "files": len(os.listdir(FOLDER)),
        "books": len(terminal_tool._active_environments),
    }


def all_processes() -> set[str]:
    """Those that descend from this one, within walls too, and those with its sandboxes' mark."""
    marked = {process.partition(":")[0] for process in processes()}
    return marked | {f"process {child.pid}" for child in psutil.Process().children(recursive=True)}


def put_aside() -> list[int]:
    """The numbers of rollouts in the records that were put aside, which are removed; the next are put there."""
    numbers: list[int] = []
    if ASIDE.exists():
        numbers += [int(record.metadata["item"]) for record in read_records(ASIDE)]
        ASIDE.unlink()  # in half an hour they are gigabytes
    if RECORDS.exists():
        RECORDS.rename(ASIDE)
    return numbers


class Endurance:
    """A run of the benchmark, and what was found in it."""

    def __init__(self, env: Rollouts, options: argparse.Namespace) -> None:
        self.env, self.seed, self.seconds = env, options.seed, 60 * options.minutes
        held = options.sandbox == "walled" and "pids" in hierarchies()
        self.weights = {name: kind.weight for name, kind in KINDS.items() if held or not kind.held}
        self.started, self.again, self.over = 0, 0, False
        self.ended, self.unrecorded = 0, Counter[int]()  # by number, trajectories without a record; less than 0: twice
        self.outcomes: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self.levels: list[tuple[float, dict[str, float]]] = []
        self.wrong: list[str] = []
        self.remains: list[str] = []

    async def run(self, rollouts: int) -> None:
        began = time.monotonic()

        async def lane() -> None:
            while time.monotonic() < began + self.seconds:
                await self.one()

        lanes = [asyncio.create_task(lane()) for _ in range(rollouts)]
        looking = asyncio.create_task(self._look(began))
        ended, _ = await asyncio.wait(lanes, timeout=self.seconds + GRACE_S)
        self.took = time.monotonic() - began
        self.over = True
        await asyncio.gather(looking, *ended)
        for _ in range(2):  # what was put aside, and then the rest
            await self._read_records()

    async def _read_records(self) -> None:
        """Count off what was put aside the last time, when someone may still have written to it; put the next aside."""
        self.unrecorded.subtract(await asyncio.to_thread(put_aside))
        self.unrecorded = Counter({number: count for number, count in self.unrecorded.items() if count})

    async def one(self, name: str | None = None) -> None:
        """The next rollout, of a kind that is drawn unless it is given."""
        number, self.started = self.started, self.started + 1
        own = random.Random(f"{self.seed} {number}")
        name = name or own.choices(list(self.weights), list(self.weights.values()))[0]
        course = COURSES[number] = Course(number, name, own)
        course.run = asyncio.create_task(self.env.trained_rollout(number))
        if name == "cancellation":
            course.cancel_within(6.0)
        await asyncio.wait([course.run])
        del COURSES[number]
        outcome, trajectory = outcome_of(course.run)
        self.ended += 1
        self.outcomes[name][outcome] += 1
        self.again += max(0, course.attempts - 1)
        self.wrong += [f"{name}: rollout {number} {what}" for what in course.wrong(outcome, trajectory)]
        self.unrecorded[number] += sum(task.trajectory is not None for task in course.tasks)

    async def _look(self, began: float) -> None:
        while not self.over:
            await asyncio.sleep(LOOK_S)
            now, after = await asyncio.to_thread(levels), time.monotonic() - began
            self.levels.append((after, now))
            if len(self.levels) % round(LINE_S / LOOK_S) == 0:
                in_use = ", ".join(f"{value:.0f} {name}" for name, value in now.items())
                ended = f"{self.ended} ended, {len(COURSES)} under way, {len(self.wrong)} wrong"
                say(f"{after:6.0f} s: {ended}; {in_use}; load {os.getloadavg()[0]:.0f}")
                await self._read_records()
                await self.env.wandb_log()  # as in training, which takes what verifiers and servers measured

    def unaccounted(self) -> Iterator[str]:
        """Rollouts that have not ended, records that are too few or too many, what the environment counts otherwise."""
        for number, course in COURSES.items():
            yield f"{course.name}: rollout {number} has not ended"
        if self.ended + len(COURSES) != self.started:
            yield f"{self.started} rollouts were started, {self.ended} have ended, {len(COURSES)} have not"
        for number, count in self.unrecorded.items():
            yield f"rollout {number} has {abs(count)} records too {'few' if count > 0 else 'many'}"
        came = Counter(outcome.split()[0] for outcomes in self.outcomes.values() for outcome in outcomes.elements())
        expected = {"rollouts": came["score"], "rollouts failed": came["failed"], "verifiers failed": came["the"]}
        expected |= {"rollouts run again": self.again, "in flight": 0}
        counted = self.env.counts + Counter({"in flight": self.env.in_flight})
        for name, count in expected.items():
            if counted[name] != count:
                yield f"{name}: the environment counts {counted[name]}, not {count}"

    def report(self, *, short: bool) -> dict[str, Any]:
        """Print what was found; the figures. In a short run a quarter has few looks, and the start counts."""
        for name in KINDS:
            outcomes = self.outcomes[name]
            came = ", ".join(f"{count} {outcome}" for outcome, count in outcomes.most_common())
            say(f"{name:>28}: {outcomes.total():5} rollouts; {came if name in self.weights else 'left out here'}")
        found = {"wrong": self.wrong, "unaccounted": list(self.unaccounted()), "left": self.remains}
        for title, lines in found.items():
            for line in lines[:20]:
                say(f"{title}: {line}")
        quarters = [[now for after, now in self.levels if n - 1 <= 4 * after / self.seconds < n] for n in (2, 4)]
        second, last = ({name: round(median(now[name] for now in looks), 1) for name in looks[0]} for looks in quarters)
        share, more, more_mb = (1.5, 20, 100) if short else (1.1, 5, 20)
        bounds = {name: share * value + (more_mb if name == "rss_mb" else more) for name, value in second.items()}
        risen = [name for name, bound in bounds.items() if last[name] > bound]
        figures: dict[str, Any] = {title: len(lines) for title, lines in found.items()}
        figures |= {"rollouts": self.ended, "rollouts_per_s": round(self.ended / self.took, 2)}
        peaks = {name: round(max(now[name] for _, now in self.levels), 1) for name in second}
        outcomes = {name: dict(outcomes) for name, outcomes in self.outcomes.items()}
        figures |= {"outcomes": outcomes, "second_quarter": second, "last_quarter": last, "peaks": peaks}
        return figures | {"risen": risen, "leveled_off": not risen}


async def endured(options: argparse.Namespace) -> int:
    """All of it; the exit code."""
    limits = {"rollout_attempts": 2, "rollout_timeout": RUN_S, "verify_timeout": VERIFIER_S}
    files = {"tokenizer_name": str(TOKENIZER), "records_path": str(RECORDS)}
    env = Rollouts(HermesEnvConfig(sandbox=options.sandbox, **limits, **files), [APIServerConfig()])
    endurance = Endurance(env, options)
    await asyncio.gather(*(endurance.one("healthy") for _ in range(2)))  # starts what a process has once
    before, descriptors = {*left(), *all_processes()}, levels()["descriptors"]
    await endurance.run(options.rollouts)
    await asyncio.sleep(2.5)  # Hermes looks every 2 seconds after a process that is not this machine's
    endurance.remains = sorted({*left(), *all_processes()} - before)
    # Hermes knows the last 64 background processes that ended, each with its pipe.
    more = levels()["descriptors"] - descriptors - len(process_registry._finished)
    if more > 5:
        endurance.remains.append(f"{more} descriptors more than at the start")
    figures = endurance.report(short=options.short)
    say(json.dumps(figures))
    if COURSES:  # what has not ended by now would hold up the end of the loop and of the interpreter
        faulthandler.dump_traceback()
        for process in all_processes() - before:
            with contextlib.suppress(psutil.NoSuchProcess):
                psutil.Process(int(re.findall(r"\d+", process)[0])).kill()
        shutil.rmtree(FOLDER, ignore_errors=True)
        os._exit(1)
    return int(any(figures[name] for name in ("wrong", "unaccounted", "left", "risen")))


if __name__ == "__main__":
    main()
