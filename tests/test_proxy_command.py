"""A command as the agent: it has its endpoint and its sandbox, and leaves a trajectory that a verifier scores."""

from __future__ import annotations

import asyncio
import os
from typing import Any

import pytest
from atroposlib.envs.base import APIServerConfig
from support import check_tokens, nothing_left, until

from hermes_atropos.environment import HermesEnv, HermesEnvConfig
from hermes_atropos.environment.validation import validate
from hermes_atropos.errors import ConfigurationError
from hermes_atropos.hermes.walled import open_sandbox
from hermes_atropos.proxy import CommandAgent
from hermes_atropos.testing import Reply, ScriptedServer, chatml_tokenizer
from hermes_atropos.trajectory import AgentResult, StopReason

#: Asks the model twice, and writes the second answer into a file.
ASK = """
cat > ask.py <<'END'
import json, os, sys, urllib.error, urllib.request

base = os.environ["OPENAI_BASE_URL"]

def post(url, body):
    headers = {"Authorization": f"Bearer {os.environ['OPENAI_API_KEY']}", "Content-Type": "application/json"}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode(), headers)) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code

messages = [{"role": "user", "content": os.environ["PROMPT"]}]
for _ in range(2):
    message = post(f"{base}/chat/completions", {"messages": messages})["choices"][0]["message"]
    messages += [message, {"role": "user", "content": "And again?"}]
open("answer.txt", "w").write(message["content"])
print(post(base.rsplit("/", 2)[0] + "/sessions", {}), os.environ.get("EXTRA"))
END
python3 ask.py
"""


def agent_on(server: ScriptedServer, command: str = ASK, **options: Any) -> CommandAgent:
    return CommandAgent(server, command=command, open_sandbox=open_sandbox, **options)


@pytest.mark.parametrize("sandbox", ["folder", "walled"])
async def test_a_command_works_in_its_sandbox_on_its_own_endpoint(sandbox: str) -> None:
    server = ScriptedServer(["One.", "It's two."])
    agent = agent_on(server, env={"EXTRA": "more"})
    with nothing_left():
        async with agent.task(sandbox=sandbox) as task:
            result = await task.run("What's one?")
            assert await task.read_file("answer.txt") == "It's two."
    assert "What's one?" in server.requests[0].prompt
    assert result is task.trajectory
    assert result.stop_reason is StopReason.COMPLETED
    assert result.metadata["exit_code"] == 0
    assert result.metadata["output"].strip().endswith("401 more"), "the sandbox can open no session"
    assert len(result.sequences) == 1
    check_tokens(result, server.requests)


async def test_a_command_that_fails_says_why() -> None:
    agent = agent_on(ScriptedServer([]), "echo 'no such model' >&2; exit 3")
    async with agent.task() as task:
        result = await task.run("Go.")
    assert (result.stop_reason, result.success) == (StopReason.ERROR, False)
    assert "exit code 3: no such model" in str(result.error)


async def test_a_command_that_takes_too_long_is_ended() -> None:
    server = ScriptedServer([Reply(hang=True)])
    with nothing_left():
        async with agent_on(server, time_limit_s=2).task() as task:
            result = await task.run("Go.")
    assert result.stop_reason is StopReason.TIMEOUT
    assert server.requests[0].cancelled


async def test_a_cancelled_rollout_is_kept() -> None:
    server = ScriptedServer(["One.", Reply(hang=True)])
    with nothing_left():
        async with agent_on(server).task() as task:
            running = asyncio.create_task(task.run("Go."))
            await asyncio.to_thread(until, lambda: len(server.requests) == 2)
            running.cancel()
            with pytest.raises(asyncio.CancelledError):
                await running
            assert task.trajectory is not None
            assert task.trajectory.stop_reason is StopReason.CANCELLED
            assert len(task.trajectory.steps) == 1


async def test_what_a_command_cannot_be_given_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="command is empty"):
        agent_on(ScriptedServer([]), " ")
    async with agent_on(ScriptedServer([])).task() as task:
        with pytest.raises(ConfigurationError, match="user's message alone"):
            await task.run("Go.", "Be brief.")


@pytest.mark.parametrize("harness", [{"harness": "command", "command": ASK}, {"harness": "react"}])
async def test_an_environment_of_another_harness_gives_groups_and_is_validated(
    tmp_path: Any, harness: dict[str, Any]
) -> None:
    chatml_tokenizer().save_pretrained(tmp_path)

    class Sums(HermesEnv):
        server_cls = type("Server", (ScriptedServer,), {"__init__": lambda self, *_, **__: made(self)})

        def items(self) -> list[dict[str, str]]:
            return [{"question": "One?"}]

        def prompt(self, item: Any) -> str:
            return str(item["question"])

        async def verify(self, item: Any, task: Any, result: AgentResult) -> float:
            written = await task.read_file("answer.txt") if self.config.harness == "command" else result.final_response
            return float(written == "One?")

        async def solve(self, item: Any, task: Any) -> str:
            await task.write_file("answer.txt", "One?")
            return "One?"

        async def prepare(self, item: Any, task: Any) -> None:
            await task.write_file("answer.txt", "")

    def made(server: ScriptedServer) -> None:
        ScriptedServer.__init__(server, lambda messages: messages[-1]["content"].replace("And again?", "One?"))

    options = {"tokenizer_name": os.fspath(tmp_path), "group_size": 3, "use_wandb": False, "sandbox": "folder"}
    environment = Sums(HermesEnvConfig(**options, **harness), [APIServerConfig()])
    [verdict] = await validate(environment, times=1)
    assert (verdict.oracle, verdict.null, verdict.faults) == (1.0, 0.0, ())
    group, _ = await environment.collect_trajectories(await environment.get_next_item())
    assert group["scores"] == [1.0, 1.0, 1.0]
    assert all(group["inference_logprobs"])
    with pytest.raises(ConfigurationError, match="give harness='command'"):
        Sums(HermesEnvConfig(command=ASK, **options), [APIServerConfig()])
