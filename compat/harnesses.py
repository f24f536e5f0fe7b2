"""Prove that the agents of other libraries leave exact tokens through the proxy.

    python compat/harnesses.py                      every harness with every family of models
    python compat/harnesses.py --only smolagents    those whose name begins so; the table stays as it is

The harnesses are installed into environments of their own under ``build/compat``, without this project. There
``run_harness.py`` runs the agents of other libraries, on a model that is scripted in the format of each of several
families, and Hermes runs as it is. Each token that the trainer would get is compared with what the model server
recorded. The table goes into ``harnesses.md`` beside this file.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from check import FORKS
from run_harness import HARNESSES

HERE = Path(__file__).resolve().parent
PROJECT = HERE.parent
TABLE = HERE / "harnesses.md"
ENVIRONMENTS = PROJECT / "build" / "compat"
OTHERS = ["openai-agents", "pydantic-ai-slim[openai]", "smolagents[openai]", "mini-swe-agent"]
HERMES = {"0.19.0": "hermes-agent==0.19.0"} | {release: FORKS[release] for release in ("0.20.1.2", "0.22.2")}

sys.path[:0] = [str(PROJECT), str(PROJECT / "tests")]

from hermes_atropos import use_training_profile  # noqa: E402

use_training_profile(compression=True)

from hermes_atropos import AtroposAIAgent, Proxy  # noqa: E402
from hermes_atropos.testing import Reply, ScriptedServer  # noqa: E402
from hermes_atropos.tokens import FidelityReport  # noqa: E402

families: Any = importlib.import_module("families")
hermes: Any = importlib.import_module("test_proxy_hermes")
writers: Any = dict(reversed(importlib.import_module("test_toolcalls_formats").WRITERS))

FAMILIES = [
    families.HERMES4_FAMILY,
    families.QWEN3_FAMILY,
    families.LLAMA31_FAMILY,
    families.MISTRAL_FAMILY,
    families.DEEPSEEK_V3_FAMILY,
    families.KIMI_K2_FAMILY,
]
TIMEOUT = 300  # seconds, of an installation and of a run

Call = tuple[str, dict[str, Any]]


class Step(NamedTuple):
    """What the model says: text, after a thought where it can think, and calls."""

    text: str
    calls: tuple[Call, ...] = ()


class Row(NamedTuple):
    """What came of one harness with one family."""

    harness: str
    family: str
    turns: int
    sequences: int
    causes: str
    result: str


def add(a: int, b: int) -> Call:
    return "add", {"a": a, "b": b}


SUMS = [
    Step("I add the first two.", (add(2, 3),)),
    Step("", (add(4, 5),)),
    Step("They are 5 and 9."),
    Step("Once more.", (add(6, 7),)),
    Step("It is 13."),
]
#: smolagents takes an answer from a call, and has the model's code between its own marks.
ANSWERED = [
    *SUMS[:2],
    Step("", (("final_answer", {"answer": "5 and 9"}),)),
    SUMS[3],
    Step("", (("final_answer", {"answer": "13"}),)),
]
CODE = [
    Step("Thought: I add.\n<code>\nprint(add(2, 3))\n</code>"),
    Step('Thought: I know.\n<code>\nfinal_answer("5 and 9")\n</code>'),
    Step("Thought: Once more.\n<code>\nfinal_answer(str(add(6, 7)))\n</code>"),
]
SHELL = [
    Step("I look.", (("bash", {"command": "echo $((2 + 3))"}),)),
    Step("", (("bash", {"command": "echo $((4 + 5)); printf 'ü\\n'"}),)),
    Step("I forgot to call."),
    Step("Done.", (("bash", {"command": "echo COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT"}),)),
]
#: Of Hermes: what the model says at first, and what else its process is told.
SCENARIOS: dict[str, tuple[list[str], dict[str, str]]] = {
    "tools and a subagent, streamed": ([hermes.THINKS, hermes.SUBAGENT, hermes.SEVERAL], {"STREAM": "yes"}),
    "tools and a subagent, by Responses": (
        [hermes.THINKS, hermes.SUBAGENT, hermes.SEVERAL],
        {"API_MODE": "codex_responses"},
    ),
    "a malformed call and a wrong name": ([hermes.THINKS, hermes.MALFORMED, hermes.MISNAMED], {}),
    "compression": ([hermes.THINKS, hermes.SEVERAL, hermes.THINKS, *hermes.LONG], {"COMPRESS_AT": "20000"}),
}
STEPS = {"smolagents, tool calls": ANSWERED, "smolagents, code": CODE, "mini-swe-agent": SHELL}


def written(step: Step, family: Any) -> Reply:
    """What a model of the family samples, without the token that ends it."""
    thought = "Let me see.\n</think>\n\n" if family.thinks else "<think>\nLet me see.\n</think>\n\n"
    thinks = family.thinks or "<think>" in family.markup
    calls = writers[family.format if family.tools else "hermes"](step.calls) if step.calls else ""
    text = "" if calls and family is families.LLAMA31_FAMILY else step.text  # its calls stand alone
    return Reply((thought if thinks else "") + text + calls)


async def prove(harness: str, family: Any, python: str) -> Row:
    """Run a harness on a model of the family, and compare."""
    replies = [written(step, family) for step in STEPS.get(harness, SUMS)]
    server = ScriptedServer(replies, tokenizer=family.tokenizer(), end_token=family.special[0])
    report, wrong = await through_proxy(server, [python, str(HERE / "run_harness.py"), harness])
    if len(server.requests) != len(replies):
        wrong.append(f"{len(server.requests)} of {len(replies)} requests")
    return row(harness, repr(family), report, wrong)


async def prove_hermes(release: str, scenario: str, python: str) -> Row:
    """Run Hermes as it is."""
    steps, environ = SCENARIOS[scenario]
    server = ScriptedServer(hermes.model(*steps, kinds=[]))
    report, wrong = await through_proxy(server, [python, "-c", hermes.RUN], environ)
    return row(f"Hermes {release}, {scenario}", "ChatML", report, wrong)


def prove_in_process(scenario: str) -> Row:
    """The same with our class, beside which the numbers of sequences are to be seen."""
    steps, environ = SCENARIOS[scenario]
    server = ScriptedServer(hermes.model(*steps, kinds=[]))
    toolsets = ["terminal", "file", "todo", "delegation"]
    agent = AtroposAIAgent(server=server, enabled_toolsets=toolsets, quiet_mode=True, max_iterations=12)
    if limit := environ.get("COMPRESS_AT"):
        agent.compression_enabled = True
        agent.context_compressor.threshold_tokens = int(limit)
        agent.context_compressor.tail_token_budget = 2_000
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        first = agent.run_conversation("Count, please.")
        second = agent.run_conversation("And again?", conversation_history=first["messages"])
    trajectories = [result["trajectory"] for result in (first, second)]
    report = sum((trajectory.fidelity for trajectory in trajectories), FidelityReport())
    sequences = [sequence for trajectory in trajectories for sequence in trajectory.sequences]
    return row(f"AtroposAIAgent in process, {scenario}", "ChatML", report, mistakes(sequences, server))


async def through_proxy(
    server: ScriptedServer, command: list[str], environ: Mapping[str, str] | None = None
) -> tuple[FidelityReport, list[str]]:
    """What a command left that was given an endpoint, and what is wrong with it."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        async with Proxy(server) as proxy, proxy.session() as session:
            known = {"PATH": os.environ["PATH"], "HOME": folder, "LANG": "C.UTF-8", **(environ or {})}
            for prefix in ("OPENAI_", ""):
                known |= {f"{prefix}BASE_URL": session.base_url, f"{prefix}API_KEY": session.api_key}
            process = await asyncio.create_subprocess_exec(
                *command, env=known, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            )
            try:
                said, _ = await asyncio.wait_for(process.communicate(), TIMEOUT)
            except TimeoutError:
                process.kill()
                said, _ = await process.communicate()
    assert session.trajectory is not None
    assert session.trajectory.fidelity is not None
    wrong = mistakes(session.trajectory.sequences, server)
    if process.returncode:
        sys.stderr.write(said.decode())
        wrong.append(f"exit code {process.returncode}")
    return session.trajectory.fidelity, wrong


def row(harness: str, family: str, report: FidelityReport, wrong: list[str]) -> Row:
    breaks = ", ".join(f"{count} {cause}" for cause, count in report.breaks.items())
    return Row(harness, family, report.turns, report.sequences, breaks, "; ".join(wrong) or "exact")


def mistakes(sequences: list[Any], server: ScriptedServer) -> list[str]:
    """Where the trainer's tokens are not those of the server's record, each sampled one once."""
    recorded = Counter(
        (tuple(request.prompt_ids), tuple(request.output_ids[0]), tuple(request.logprobs[0]))
        for request in server.requests
        if request.output_ids
    )
    trained = Counter(
        (
            tuple(sequence.tokens[: span.start]),
            tuple(sequence.tokens[span.start : span.end]),
            tuple(sequence.logprobs[span.start : span.end]),
        )
        for sequence in sequences
        for span in sequence.spans
        if span.trained
    )
    lost, invented = (recorded - trained).total(), (trained - recorded).total()
    return [f"{lost} answers not trained, {invented} trained that were not sampled"] if lost or invented else []


def install(name: str, packages: list[str]) -> str:
    """The Python of an environment with these packages."""
    python = str(ENVIRONMENTS / name / "bin" / "python")
    uv = [sys.executable, "-m", "uv"]
    subprocess.run(
        [*uv, "venv", "--quiet", "--clear", "--python", sys.executable, str(ENVIRONMENTS / name)], check=True
    )
    subprocess.run([*uv, "pip", "install", "--quiet", "--python", python, *packages], check=True, timeout=TIMEOUT)
    return python


def versions(python: str) -> str:
    names = [package.partition("[")[0] for package in OTHERS]
    code = "import sys, importlib.metadata as m; print(', '.join(f'{n} {m.version(n)}' for n in sys.argv[1:]))"
    return subprocess.run([python, "-c", code, *names], capture_output=True, text=True, check=True).stdout.strip()


def rows(only: str, others: str) -> Iterator[Row]:
    """What came of each harness, one after the other; ``others``: the Python that has the other libraries."""
    for scenario, (_, environ) in SCENARIOS.items():
        if "AtroposAIAgent".startswith(only) and "API_MODE" not in environ:
            yield prove_in_process(scenario)
    for release, package in HERMES.items():
        if f"Hermes {release}".startswith(only):
            python = install(f"hermes-{release}", [package])
            for scenario in SCENARIOS:
                yield asyncio.run(prove_hermes(release, scenario, python))
    for harness in HARNESSES:
        for family in FAMILIES if harness.startswith(only) else ():
            yield asyncio.run(prove(harness, family, others))


def table(found: list[Row], tried: str) -> str:
    lines = [f"| {' | '.join(map(str, row))} |\n" for row in found]
    return (
        "# Other harnesses\n\n"
        "What `harnesses.py` saw: Hermes as it is, and agents of other libraries, on the proxy.\n"
        "[docs/harnesses.md](../docs/harnesses.md) says what starts a new sequence. *exact*: each token that the\n"
        "server sampled is trained once, after the very tokens that it was sampled after, with its logprob.\n"
        "A subagent and a summary are sequences of their own, without a cause. Hermes is run twice, the second time\n"
        "with the history of the first: in process these are two rollouts, on the proxy one session.\n\n"
        f"Tried: {tried}; {', '.join(HERMES.values())}.\n\n"
        "| harness | family | turns | sequences | new sequences by cause | result |\n|---|---|---|---|---|---|\n"
    ) + "".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", default="", metavar="NAME", help="how the names of the harnesses begin")
    arguments = parser.parse_args()
    others = install("harnesses", OTHERS)
    found = []
    for one in rows(arguments.only, others):
        found.append(one)
        print(*one, sep=" | ", flush=True)
    if not arguments.only:
        TABLE.write_text(table(found, versions(others)), encoding="utf-8")
    return int(any(one.result != "exact" for one in found))


if __name__ == "__main__":
    sys.exit(main())
