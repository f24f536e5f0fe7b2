"""Hermes as it is, in a process of its own, on nothing but a ``base_url`` and a key."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import check_tokens, run_script, terminal

from hermes_atropos.proxy import Proxy
from hermes_atropos.testing import ScriptedServer, tool_call
from hermes_atropos.tokens import BreakCause
from hermes_atropos.trajectory import StopReason

#: Two runs of Hermes' own agent, the second with the history of the first.
RUN = """
import json, os
from pathlib import Path

home = Path.cwd()
home.joinpath("config.yaml").write_text("terminal:\\n  auto_source_bashrc: false\\n")
os.environ.update(HERMES_HOME=str(home), HERMES_SKIP_SSL_GUARD="1", HERMES_DISABLE_LAZY_INSTALLS="1")
os.environ["TERMINAL_CWD"] = str(home)
from run_agent import AIAgent

said = []
agent = AIAgent(
    base_url=os.environ["BASE_URL"], api_key=os.environ["API_KEY"], provider="custom", model="scripted",
    enabled_toolsets=["terminal", "file", "todo", "delegation"], tool_delay=0, quiet_mode=True,
    skip_context_files=True, skip_memory=True, max_iterations=12,
    stream_delta_callback=said.append if os.environ.get("STREAM") else None, api_mode=os.environ.get("API_MODE"),
)
if limit := os.environ.get("COMPRESS_AT"):
    agent.context_compressor.threshold_tokens = int(limit)
    agent.context_compressor.tail_token_budget = 2_000
first = agent.run_conversation("Count, please.")
second = agent.run_conversation("And again?", conversation_history=first["messages"])
print(json.dumps([first["final_response"], second["final_response"], "".join(filter(None, said))]))
"""


def model(*steps: str, kinds: list[str]) -> Callable[[list[dict[str, str]]], str]:
    """Answers the main agent with these steps and "Three.", and does what subagents and summaries need."""

    def answer(messages: list[dict[str, str]]) -> str:
        if "<tools>" not in messages[0]["content"]:
            kinds.append("summary")
            return "So it was."
        if any("Write x." in message["content"] for message in messages[:2]):
            kinds.append("child")
            return terminal("echo x > x") if kinds.count("child") == 1 else "Written."
        kinds.append("main")
        if messages[-1]["content"].endswith("And again?"):
            return "Still three."
        number = kinds.count("main")
        return steps[number - 1] if number <= len(steps) else "Three."

    return answer


async def rollout(folder: Path, *steps: str, **environ: str) -> tuple[Any, Any, list[str]]:
    """What Hermes printed, the trajectory, and who asked the model."""
    kinds: list[str] = []
    server = ScriptedServer(model(*steps, kinds=kinds))
    async with Proxy(server) as proxy, proxy.session() as session:
        where = {"BASE_URL": session.base_url, "API_KEY": session.api_key, **environ}
        done = await asyncio.to_thread(run_script, RUN, folder, **where)
    assert session.trajectory is not None
    check_tokens(session.trajectory, server.requests)
    return json.loads(done.stdout.splitlines()[-1]), session.trajectory, kinds


THINKS = f"<think>Let me see.</think>I look.\n{terminal('echo hello')}"
SEVERAL = "\n".join([terminal("echo a"), tool_call("write_file", path="y.txt", content="1\n")])
SUBAGENT = tool_call("delegate_task", goal="Write x.")
MALFORMED = '<tool_call>\n{"name": "terminal", "arguments": {"command": }\n</tool_call>'
MISNAMED = tool_call("Terminal", command="echo b")
LONG = [terminal(f"seq {number}000 {number}900 | tr '\\n' ' '; seq 1 4000") for number in range(1, 5)]


@pytest.mark.parametrize("how", [{"STREAM": "yes"}, {"API_MODE": "codex_responses"}], ids=["streamed", "responses"])
async def test_tools_and_a_subagent_are_one_sequence_each(how: dict[str, str], tmp_path: Path) -> None:
    said, trajectory, kinds = await rollout(tmp_path, THINKS, SUBAGENT, SEVERAL, **how)
    assert said[:2] == ["Three.", "Still three."]
    assert ("Three." in said[2]) is ("STREAM" in how)
    assert kinds.count("child") == 2
    assert (trajectory.fidelity.sequences, trajectory.fidelity.breaks) == (2, {})
    assert trajectory.stop_reason is StopReason.COMPLETED
    assert trajectory.final_response == "Still three."
    assert [result.success for step in trajectory.steps for result in step.tool_results] == [True] * 5


async def test_what_hermes_repairs_starts_a_branch(tmp_path: Path) -> None:
    """A malformed call, which is text to Hermes and makes it ask again, and a name that it mends."""
    said, trajectory, _ = await rollout(tmp_path, THINKS, MALFORMED, MISNAMED)
    assert said == ["Three.", "Still three.", ""]
    assert trajectory.fidelity.breaks == {BreakCause.HISTORY_REWRITTEN: 2}


async def test_each_compression_starts_a_branch(tmp_path: Path) -> None:
    said, trajectory, kinds = await rollout(tmp_path, THINKS, SEVERAL, THINKS, *LONG, COMPRESS_AT="20000")
    assert said == ["Three.", "Still three.", ""]
    assert kinds.count("summary") >= 1
    assert trajectory.fidelity.breaks == {BreakCause.HISTORY_REWRITTEN: kinds.count("summary")}
