"""Hermes' books: what it counts is what the server answered, in every counter and in the session database."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hermes_state import SessionDB
from support import QUIET, agent_on, agent_saying, server_of, terminal
from wire import MODEL, OpenAIWire

from hermes_atropos import AtroposAIAgent, StopReason
from hermes_atropos.testing import Reply, ScriptedRequest, ScriptedServer, tool_call

MALFORMED = '<tool_call>\n{"name": "terminal", "arguments": {"command": }\n</tool_call>'


@pytest.fixture(autouse=True)
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def read_and_sampled(requests: Sequence[ScriptedRequest]) -> tuple[int, int]:
    """Tokens of the prompts and of the answers, of the requests that were answered."""
    answered = [request for request in requests if request.output_ids]
    return sum(len(r.prompt_ids) for r in answered), sum(len(r.output_ids[0]) for r in answered)


def counted(agent: AtroposAIAgent) -> tuple[int, int]:
    """Tokens of prompts and of answers by the agent's counters, which agree with one another."""
    assert agent.session_prompt_tokens == agent.session_input_tokens + agent.session_cache_read_tokens
    assert agent.session_completion_tokens == agent.session_output_tokens
    assert agent.session_total_tokens == agent.session_prompt_tokens + agent.session_completion_tokens
    return agent.session_prompt_tokens, agent.session_completion_tokens


def stored(path: Path) -> tuple[int, int, int]:
    """Tokens of prompts, of answers, and calls, of all sessions in the database."""
    with sqlite3.connect(path) as database:
        columns = "sum(input_tokens + cache_read_tokens), sum(output_tokens), sum(api_call_count)"
        row: tuple[int, int, int] = database.execute(f"select {columns} from sessions").fetchone()
        return row


class TestOneRun:
    def test_counters_result_and_compressor(self) -> None:
        agent = agent_saying(terminal("echo hi"), "Done.")
        result = agent.run_conversation("Go.")
        first, second = server_of(agent).requests
        assert counted(agent) == read_and_sampled([first, second])
        assert agent.session_api_calls == 2
        # All of the second prompt that the first call had read or sampled.
        assert agent.session_cache_read_tokens == len(first.prompt_ids) + len(first.output_ids[0])
        assert agent.context_compressor.last_prompt_tokens == len(second.prompt_ids)
        assert result["total_tokens"] == sum(read_and_sampled([first, second]))
        assert result["cost_status"] == "unknown"

    def test_a_faulty_call_that_hermes_never_saw(self) -> None:
        agent = agent_saying(MALFORMED, MALFORMED, terminal("echo hi"), "Done.")
        result = agent.run_conversation("Go.")
        requests = server_of(agent).requests
        assert len(requests) == 4
        assert counted(agent) == read_and_sampled(requests)
        assert agent.session_api_calls == 4
        assert agent.context_compressor.last_prompt_tokens == len(requests[-1].prompt_ids)
        assert result["total_tokens"] == sum(read_and_sampled(requests))

    def test_answers_that_were_cut_off(self) -> None:
        agent = agent_saying(Reply("One, ", "length"), "two.", max_tokens=100)
        assert agent.run_conversation("Count.")["final_response"] == "One, two."
        assert counted(agent) == read_and_sampled(server_of(agent).requests)
        assert agent.session_api_calls == 2

    def test_the_summary_at_the_iteration_limit(self) -> None:
        def model(messages: list[dict[str, str]]) -> str:
            return "So it was." if "maximum number" in messages[-1]["content"] else terminal("echo hi")

        agent = agent_on(ScriptedServer(model), max_iterations=2)
        agent.run_conversation("Go.")
        assert len(server_of(agent).requests) == 3
        assert counted(agent) == read_and_sampled(server_of(agent).requests)

    def test_a_run_that_failed(self) -> None:
        agent = agent_saying(MALFORMED, MALFORMED, max_tool_call_retries=1)
        assert agent.run_conversation("Go.")["stop_reason"] is StopReason.TOOL_CALL_RETRIES
        assert counted(agent) == read_and_sampled(server_of(agent).requests)

    def test_a_new_session_starts_at_nothing(self) -> None:
        agent = agent_saying("One.", "Two.")
        agent.run_conversation("Go.")
        agent.reset_session_state()
        assert counted(agent) == (0, 0)
        agent.run_conversation("Go on.")
        assert counted(agent) == read_and_sampled(server_of(agent).requests[1:])


def test_tools_retries_subagents_a_compression_and_an_interrupt(tmp_path: Path) -> None:
    """Counters, database and the server's record agree; a subagent's tokens are in its own session."""
    agent: AtroposAIAgent

    of_the_child: list[int] = []

    def model(messages: list[dict[str, str]]) -> str | Reply:
        said = [message["content"] for message in messages if message["role"] == "assistant"]
        if "<tools>" not in messages[0]["content"]:
            return "## Goal\nCount."
        if any("Look at the child's work" in message["content"] for message in messages[:2]):
            of_the_child.append(len(server.requests) - 1)
            return (MALFORMED, terminal("echo child"), "It is good.")[len(said)]
        if "Stop now." in messages[-1]["content"]:
            agent.interrupt()
            return Reply(hang=True)
        number = len(server.requests)
        if number in (2, 3):
            return MALFORMED
        if number == 5:
            return tool_call("delegate_task", goal="Look at the child's work")
        return terminal(f"seq {number} 400") if number < 25 else "Counted."

    server = ScriptedServer(model)
    agent = agent_on(
        server,
        enabled_toolsets=["terminal", "delegation"],
        session_db=SessionDB(tmp_path / "state.db"),
        session_id="books",
    )
    agent.compression_enabled = True
    agent.context_compressor.threshold_tokens = 20_000
    agent.context_compressor.tail_token_budget = 2_000
    result = agent.run_conversation("Count.")
    assert result["stop_reason"] is StopReason.COMPLETED
    assert len(result["trajectory"].sequences) > 2, "nothing was compressed"
    history = result["messages"]
    assert agent.run_conversation("Stop now.", conversation_history=history)["stop_reason"] is StopReason.INTERRUPTED

    own = [request for number, request in enumerate(server.requests) if number not in of_the_child]
    assert len(of_the_child) == 3
    assert counted(agent) == read_and_sampled(own)
    answered = [request for request in server.requests if request.output_ids]
    assert len(answered) == len(server.requests) - 1
    assert stored(tmp_path / "state.db") == (*read_and_sampled(answered), len(answered))


@pytest.mark.parametrize(
    ("usage", "prompt", "sampled", "cached"),
    [
        ({"prompt_tokens": 30, "completion_tokens": 4, "prompt_tokens_details": {"cached_tokens": 10}}, 30, 4, 10),
        ({"prompt_tokens": 30, "completion_tokens": 4}, 30, 4, 0),
        (None, 0, 0, 0),
    ],
)
def test_what_a_chat_endpoint_says_of_usage(usage: Any, prompt: int, sampled: int, cached: int) -> None:
    with OpenAIWire() as wired:
        wired.usage = usage
        agent = AtroposAIAgent(base_url=wired.url, model=MODEL, **QUIET, enabled_toolsets=[])
        agent.run_conversation("Hello")
    assert (*counted(agent), agent.session_cache_read_tokens) == (prompt, sampled, cached)


def test_what_is_asked_while_no_conversation_runs(tmp_path: Path) -> None:
    agent = agent_saying("Hi.", "## Goal\nA summary.", session_db=SessionDB(tmp_path / "state.db"))
    agent.run_conversation("Hello")
    messages: list[dict[str, Any]] = [{"role": "user", "content": "Summarise."}]
    agent._interruptible_api_call({"messages": messages})
    assert counted(agent) == read_and_sampled(server_of(agent).requests)
    assert stored(tmp_path / "state.db")[:2] == read_and_sampled(server_of(agent).requests)
