"""An agent that runs nothing: what Hermes' programs call on it works, and a model call is a trajectory of its own."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support import agent_saying, check_tokens, nothing_left, run_script, server_of, terminal

from hermes_atropos import AgentResult, AtroposAIAgent, StopReason
from hermes_atropos.errors import BackendError, BlockingCallError, NoServerError
from hermes_atropos.testing import Reply

LONG = [
    message
    for number in range(20)
    for message in (
        {"role": "user", "content": f"Question {number}: " + "why? " * 400},
        {"role": "assistant", "content": f"Answer {number}: " + "because. " * 400},
    )
]

USER = {"role": "user", "content": "Hello"}


@pytest.fixture(autouse=True)
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def calls(*commands: str) -> SimpleNamespace:
    """A model's answer that calls the terminal."""
    made = [
        SimpleNamespace(
            id=f"call_{n}",
            type="function",
            function=SimpleNamespace(name="terminal", arguments=f'{{"command": "{c}"}}'),
        )
        for n, c in enumerate(commands)
    ]
    return SimpleNamespace(content=None, tool_calls=made)


class TestModelCalls:
    def test_the_server_answers_and_a_trajectory_is_left(self) -> None:
        agent = agent_saying("Hi.", temperature=0.5)
        completion = agent._interruptible_api_call({"messages": [USER]})
        assert completion.choices[0].message.content == "Hi."
        left = agent.last_auxiliary
        assert isinstance(left, AgentResult)
        assert left.success
        assert left.sampling == {"temperature": 0.5}
        assert [message["content"] for message in left.messages] == ["Hello", "Hi."]
        check_tokens(left, server_of(agent).requests)

    def test_after_a_run_it_is_no_part_of_that(self) -> None:
        agent = agent_saying("First.", "Aside.")
        result = agent.run_conversation("Go.")
        agent._interruptible_api_call({"messages": [USER]})
        assert len(result["trajectory"].sequences) == 1
        assert agent.last_auxiliary is not None
        check_tokens(agent.last_auxiliary, server_of(agent).requests[1:])

    def test_what_fails_is_raised_and_kept(self) -> None:
        agent = agent_saying(Reply(error=RuntimeError("broken")))
        with pytest.raises(BackendError, match="broken"):
            agent._interruptible_api_call({"messages": [USER]})
        assert agent.last_auxiliary is not None
        assert agent.last_auxiliary.stop_reason is StopReason.SERVER_ERROR

    async def test_on_the_server_s_own_loop_it_is_refused(self) -> None:
        agent = agent_saying("First.", "Never asked.")
        await agent.run_conversation_async("Go.")
        with pytest.raises(BlockingCallError):
            agent._interruptible_api_call({"messages": [USER]})
        assert await asyncio.to_thread(agent._interruptible_api_call, {"messages": [USER]})

    def test_an_agent_without_a_server_says_so(self) -> None:
        agent = bare()
        agent.__dict__.update(
            api_mode="chat_completions", provider="custom", model="m", _base_url="http://127.0.0.1:1/v1",
            _interrupt_requested=False, _client_kwargs={"base_url": "http://127.0.0.1:1/v1"},
        )  # fmt: skip
        with pytest.raises(NoServerError):
            agent._interruptible_api_call({"messages": [USER]})


class TestCompress:
    def test_the_middle_becomes_the_model_s_summary(self) -> None:
        agent = agent_saying("## Goal\nTo know why.", "And so on.")
        agent.compression_enabled = True
        agent.context_compressor.tail_token_budget = 1000
        shorter, _ = agent._compress_context(LONG, "", approx_tokens=100_000, force=True)
        assert len(shorter) < len(LONG)
        assert any("To know why." in str(message["content"]) for message in shorter)
        assert agent.last_auxiliary is not None
        check_tokens(agent.last_auxiliary, server_of(agent).requests)
        result = agent.run_conversation("Go on.", conversation_history=shorter)
        assert "To know why." in server_of(agent).requests[1].prompt
        check_tokens(result["trajectory"], server_of(agent).requests[1:])


class TestTools:
    def test_they_run(self) -> None:
        agent = agent_saying()
        messages: list[dict[str, Any]] = []
        agent._execute_tool_calls(calls("echo one", "echo two"), messages, "some-task")
        assert ["one" in messages[0]["content"], "two" in messages[1]["content"]] == [True, True]

    def test_a_subagent_is_a_rollout_of_its_own(self) -> None:
        agent = agent_saying("The child is done.", enabled_toolsets=["delegation"])
        with nothing_left():
            answer = agent._dispatch_delegate_task({"goal": "Say that you are done."})
        assert "The child is done." in answer
        assert agent.last_auxiliary is not None
        check_tokens(agent.last_auxiliary, server_of(agent).requests)


class TestBetweenRuns:
    def test_everything_that_hermes_programs_call(self) -> None:
        agent = agent_saying("One.", "Two.")
        agent.run_conversation("Go.")
        agent.interrupt("too late")
        agent.clear_interrupt()
        agent._persist_session([USER], [])
        agent.commit_memory_session([USER])
        agent.reset_session_state()
        agent.release_clients()
        agent.close()
        assert agent.run_conversation("Go on.")["final_response"] == "Two."

    def test_a_steer_waits_for_the_next_run(self) -> None:
        agent = agent_saying(terminal("echo hi"), "Done.")
        assert agent.steer("Be brief.")
        agent.run_conversation("Go.")
        assert "Be brief." in server_of(agent).requests[1].prompt


def bare() -> AtroposAIAgent:
    """An agent as Hermes' own code and tests make some: without its constructor."""
    agent = object.__new__(AtroposAIAgent)
    agent.__dict__.update(_pending_steer=None, _pending_steer_lock=threading.Lock(), provider="", model="")
    return agent


class TestWithoutTheConstructor:
    def test_steer(self) -> None:
        agent = bare()
        assert agent.steer("Be brief.")
        assert agent._drain_pending_steer() == "Be brief."

    def test_interrupt(self) -> None:
        agent = bare()
        agent.__dict__.update(
            _interrupt_requested=False, _execution_thread_id=None, _active_children=[], quiet_mode=True,
            _active_children_lock=threading.Lock(), _tool_worker_threads=None, _tool_worker_threads_lock=None,
        )  # fmt: skip
        agent.interrupt()
        assert agent._interrupt_requested

    def test_vision_is_what_hermes_says(self) -> None:
        assert bare()._model_supports_vision() is False


REVIEWED = """
import json
from support import QUIET, check_tokens, until
from hermes_atropos import AtroposAIAgent
from hermes_atropos.hermes import seams
from hermes_atropos.testing import ScriptedServer, tool_call

def model(messages):
    if not any("Review the conversation" in message["content"] for message in messages):
        return "You like tea."
    said = [message for message in messages if message["role"] == "assistant"]
    return "Saved." if len(said) > 1 else tool_call("memory", action="add", target="user", content="Likes tea.")

server = ScriptedServer(model)
agent = AtroposAIAgent(server=server, enabled_toolsets=["memory"], **{**QUIET, "skip_memory": False})
result = agent.run_conversation("I like tea.")
until(lambda: agent.last_auxiliary is not None)
check_tokens(result["trajectory"], server.requests[:1])
check_tokens(agent.last_auxiliary, server.requests[1:])
print(json.dumps(len(server.requests)))
"""


def test_a_review_in_the_background_is_a_trajectory_of_its_own(tmp_path: Path) -> None:
    """Without the training profile, as in Hermes: it writes the user's memory, by the same server."""
    (tmp_path / "config.yaml").write_text("memory: {nudge_interval: 1}\n")
    done = run_script(REVIEWED, tmp_path, HERMES_HOME=str(tmp_path))
    assert "3" in done.stdout.splitlines()
    assert "Likes tea." in (tmp_path / "memories" / "USER.md").read_text()
