"""What the rollouts of one item read first: the same tokens, so that a server computes them once, and all true."""

from __future__ import annotations

import json
import re
from pathlib import Path

from support import run_script

#: Two rollouts of one item, whose model looks where it is; prints what the server was asked, and what the tools found.
SCRIPT = """
import asyncio, json, hermes_atropos
hermes_atropos.use_training_profile()
from hermes_atropos import AtroposAIAgent
from hermes_atropos.testing import ScriptedServer, tool_call

LOOKS = [
    tool_call("terminal", command="touch ~/workspace/here ~/tmp/there && ls && echo $TMPDIR/ ~/tmp/"),
    tool_call("read_file", path="~/workspace/given.txt"),
    tool_call("write_file", path="~/workspace/written.txt", content="written"),
]

async def main():
    def model(messages):
        turns = sum(message["role"] == "assistant" for message in messages)
        return LOOKS[turns] if turns < len(LOOKS) else "Done."

    server = ScriptedServer(model)
    agent = AtroposAIAgent(server=server, enabled_toolsets=["terminal", "file"], quiet_mode=True)

    async def rollout():
        async with agent.task(workspace="given", copy=True) as task:
            result = await task.run("Look around.")
            assert await task.read_file("written.txt") == "written"
            return result

    results = await asyncio.gather(rollout(), rollout())
    firsts = sorted((request.prompt_ids for request in server.requests), key=len)[:2]
    tools = [message["content"] for message in results[0]["messages"] if message["role"] == "tool"]
    print(json.dumps({"firsts": firsts, "prompt": results[0]["system_prompt"], "tools": tools}))

asyncio.run(main())
"""


def first_prompts(folder: Path) -> dict[str, object]:
    """What a process of its own saw, in a folder of its own."""
    (folder / "given").mkdir(parents=True)
    (folder / "given" / "given.txt").write_text("given")
    seen: dict[str, object] = json.loads(run_script(SCRIPT, folder).stdout.splitlines()[-1])
    return seen


def test_the_first_prompts_of_an_item_are_equal_in_all_rollouts_and_processes(tmp_path: Path) -> None:
    here, there = first_prompts(tmp_path / "one"), first_prompts(tmp_path / "two")
    firsts = [*here["firsts"], *there["firsts"]]  # type: ignore[misc]
    assert len(firsts) == 4
    assert all(len(first) > 1000 for first in firsts)
    assert all(first == firsts[0] for first in firsts)


def test_what_the_prompt_says_of_the_machine_is_true_in_the_sandbox(tmp_path: Path) -> None:
    seen = first_prompts(tmp_path / "one")
    prompt = str(seen["prompt"])
    assert "User home directory: ~\n" in prompt
    assert "Current working directory: ~/workspace\n" in prompt
    assert re.findall(r"\S*(?:/tmp/|hermes-atropos-)\S*", prompt.replace("~/tmp", "")) == []
    looked, read, _ = map(str, seen["tools"])  # type: ignore[call-overload]
    output = json.loads(looked)["output"]
    names, last = output.splitlines()[:-1], output.splitlines()[-1].split()
    assert names == ["given.txt", "here"]
    assert last[0] == last[1]
    assert "given" in json.loads(read)["content"]
