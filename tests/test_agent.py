"""``AtroposAIAgent`` as Hermes' ``AIAgent``: what its users pass to it and call on it works, on the given server."""

from __future__ import annotations

import asyncio
import copy
import inspect
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
from agent.iteration_budget import IterationBudget
from atroposlib.envs.server_handling.managed_server import ManagedServer
from atroposlib.envs.server_handling.server_baseline import APIServerConfig
from atroposlib.envs.server_handling.server_manager import ServerManager
from hermes_state import SessionDB
from run_agent import AIAgent
from support import (
    LIMIT,
    QUIET,
    SINCE_0_21,
    agent_on,
    agent_saying,
    between_answers,
    check_tokens,
    check_unbroken,
    hermes_call,
    nothing_left,
    server_of,
    terminal,
    tool_texts,
    tool_turn,
    until,
)
from tools.registry import registry
from wire import MODEL, OpenAIWire

import hermes_atropos
from hermes_atropos import AtroposAIAgent, ExactManagedServer, SequenceData, StopReason
from hermes_atropos.errors import UntrackedError
from hermes_atropos.messages import TURN_KEY
from hermes_atropos.servers.sampling import NEUTRAL
from hermes_atropos.testing import Reply, ScriptedServer, chatml_tokenizer, tool_call

MALFORMED = '<tool_call>\n{"name": "terminal", "arguments": {"command": }\n</tool_call>'


@pytest.fixture(autouse=True)
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Synchronous runs act in the current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


class TestAnswers:
    def test_chat(self) -> None:
        agent = agent_saying("Four.")
        assert agent.chat("What is two and two?") == "Four."
        assert "What is two and two?" in server_of(agent).requests[0].prompt

    async def test_chat_async(self) -> None:
        assert await agent_saying("Four.").chat_async("What is two and two?") == "Four."

    def test_it_is_an_ai_agent(self) -> None:
        agent = agent_saying("Hi.")
        assert isinstance(agent, AIAgent)
        assert hermes_atropos.AtroposAIAgent is AtroposAIAgent

    def test_every_argument_of_hermes_is_taken(self) -> None:
        """Each at its default, by name; those of Hermes' own routes to a model are taken and not used."""
        parameters = list(inspect.signature(AIAgent.__init__).parameters.values())[1:]
        defaults = {parameter.name: parameter.default for parameter in parameters}
        agent = AtroposAIAgent(
            server=ScriptedServer(["Hi."]), **{**defaults, **QUIET, "base_url": "https://no.where/v1"}
        )
        assert agent.chat("Hello") == "Hi."

    def test_arguments_by_position(self) -> None:
        agent = AtroposAIAgent("https://no.where/v1", "key", server=ScriptedServer(["Hi."]), **QUIET)
        assert agent.chat("Hello") == "Hi."

    def test_an_unknown_argument_is_refused(self) -> None:
        with pytest.raises(TypeError, match="temprature"):
            agent_saying("Hi.", temprature=0.5)

    def test_history_and_system_message(self) -> None:
        agent = agent_saying("Ada.")
        history = [{"role": "user", "content": "I am Ada."}, {"role": "assistant", "content": "Hello Ada."}]
        result = agent.run_conversation("Who am I?", "Answer in one word.", conversation_history=history)
        prompt = server_of(agent).requests[0].prompt
        assert prompt.index("Answer in one word.") < prompt.index("I am Ada.") < prompt.index("Who am I?")
        assert [message["role"] for message in result["messages"]] == ["user", "assistant", "user", "assistant"]
        assert "Answer in one word." in result["system_prompt"]

    def test_sampling_parameters_reach_the_server(self) -> None:
        agent = agent_saying("Hi.", temperature=0.7, max_tokens=50, top_p=0.9, top_k=5, seed=3)
        result = agent.run_conversation("Hello")
        sampling = server_of(agent).requests[0].sampling
        wanted = {"temperature": 0.7, "max_tokens": 50, "top_p": 0.9, "top_k": 5}
        assert {name: sampling[name] for name in wanted} == wanted
        assert result["trajectory"].sampling == wanted | {"seed": 3}

    def test_the_distribution_is_the_models_where_nothing_else_was_asked_for(self) -> None:
        agent = agent_saying("Hi.")
        agent.chat("Hello")
        sampling = server_of(agent).requests[0].sampling
        assert {name: sampling[name] for name in NEUTRAL} == NEUTRAL
        assert "seed" not in sampling


class TestResult:
    def test_hermes_keys_and_ours(self) -> None:
        agent = agent_saying("Let me look. " + terminal("echo 41 && echo 1"), "Forty-two.")
        result = agent.run_conversation("Add.")
        assert result["final_response"] == "Forty-two."
        assert result["completed"] is True
        assert result["api_calls"] == 2
        assert "error" not in result
        assert result["error"] is None
        assert "failed" not in result or result["failed"] is False
        assert result["stop_reason"] is StopReason.COMPLETED
        assert [message["role"] for message in result["messages"]] == ["user", "assistant", "tool", "assistant"]
        assert json.loads(tool_texts(result["messages"])[0])["output"] == "41\n1"
        assert result["system_prompt"] in server_of(agent).requests[0].prompt
        assert result["task_id"]

    def test_trajectory(self) -> None:
        agent = agent_saying("Let me look. " + terminal("echo 41 && exit 3"), "Done.")
        trajectory = agent.run_conversation("Add.")["trajectory"]
        assert trajectory.success
        assert trajectory.stop_reason is StopReason.COMPLETED
        assert trajectory.final_response == "Done."
        assert [message["role"] for message in trajectory.messages] == [
            "system",
            "user",
            "assistant",
            "tool",
            "assistant",
        ]
        assert [len(step.tool_calls) for step in trajectory.steps] == [1, 0]
        [tool_result] = trajectory.steps[0].tool_results
        assert (tool_result.name, tool_result.exit_code, tool_result.success) == ("terminal", 3, True)
        assert {tool["function"]["name"] for tool in trajectory.tools} >= {"terminal", "read_file", "write_file"}
        [sequence] = trajectory.sequences
        assert isinstance(sequence, SequenceData)
        assert [step.sequence_data for step in trajectory.steps] == [sequence, sequence]
        check_tokens(trajectory, server_of(agent).requests)

    def test_managed_state_holds_a_node_a_sequence(self) -> None:
        agent = agent_saying(terminal("true"), "Done.")
        result = agent.run_conversation("Go.")
        [node] = result["managed_state"]["nodes"]
        [sequence] = result["trajectory"].sequences
        assert type(node).__name__ == "SequenceNode"
        assert (node.tokens, node.masked_tokens, node.logprobs) == (
            sequence.tokens,
            sequence.masked_tokens,
            sequence.logprobs,
        )
        assert node.full_text == chatml_tokenizer().decode(node.tokens)

    def test_scored_data(self) -> None:
        agent = agent_saying(terminal("true"), "Done.", temperature=0.5)
        items = agent.run_conversation("Go.")["trajectory"].to_scored_data(score=1.0)
        assert items["scores"] == [1.0]
        assert [len(tokens) for tokens in items["tokens"]] == [len(values) for values in items["inference_logprobs"]]
        assert items["overrides"] == [{"temperature": 0.5}]

    def test_stored_messages_refer_to_their_turns(self) -> None:
        result = agent_saying(terminal("true"), "Done.").run_conversation("Go.")
        refs = [message[TURN_KEY] for message in result["messages"] if message["role"] == "assistant"]
        assert refs == [ref for step in result["trajectory"].steps for ref in step.turns]
        assert not any(TURN_KEY in message for message in result["trajectory"].to_messages())

    def test_two_runs_of_one_agent_are_two_rollouts(self) -> None:
        agent = agent_saying("One.", "Two.")
        first, second = agent.run_conversation("First."), agent.run_conversation("Second.")
        one, two = server_of(agent).requests
        check_tokens(first["trajectory"], [one])
        check_tokens(second["trajectory"], [two])
        assert "First." not in two.prompt


class TestCallbacks:
    @pytest.fixture
    def calls(self) -> list[tuple[Any, ...]]:
        return []

    @pytest.fixture
    def note(self, calls: list[tuple[Any, ...]]) -> Callable[[str], Callable[..., None]]:
        return lambda name: lambda *args, **options: calls.append((name, *args))

    def test_steps_and_tools(self, calls: list[Any], note: Any) -> None:
        names = ("step", "tool_start", "tool_complete", "tool_progress", "tool_gen")
        agent = agent_saying(terminal("echo hello"), "Done.", **{f"{name}_callback": note(name) for name in names})
        agent.run_conversation("Go.")
        assert [call[0] for call in calls if call[0] != "tool_progress"] == [
            "step",
            "tool_gen",
            "tool_start",
            "tool_complete",
            "step",
        ]
        by_name = {call[0]: call[1:] for call in calls}
        call_id, name, arguments = by_name["tool_start"]
        assert (name, arguments) == ("terminal", {"command": "echo hello"})
        assert by_name["tool_complete"][:3] == (call_id, name, arguments)
        assert json.loads(by_name["tool_complete"][3])["output"] == "hello"
        assert by_name["tool_gen"] == ("terminal",)
        assert by_name["step"][0] == 2
        events = [call[1:3] for call in calls if call[0] == "tool_progress"]
        assert events[:2] == [("tool.started", "terminal"), ("tool.completed", "terminal")]

    def test_stream_deltas(self, calls: list[Any], note: Any) -> None:
        agent = agent_saying(
            "I look. " + terminal("true"), "<think>Enough.</think>All done.", stream_delta_callback=note("delta")
        )
        agent.run_conversation("Go.")
        assert "".join(call[1] or "" for call in calls).split() == ["I", "look.", "All", "done."]

    @pytest.mark.parametrize("asynchronous", [False, True])
    async def test_stream_callback_of_chat(self, asynchronous: bool) -> None:
        deltas: list[str] = []
        agent = agent_saying("All done.")
        if asynchronous:
            assert await agent.chat_async("Go.", stream_callback=deltas.append) == "All done."
        else:
            thread = threading.Thread(target=lambda: agent.chat("Go.", stream_callback=deltas.append))
            thread.start()
            thread.join()
        assert "".join(filter(None, deltas)) == "All done."

    def test_reasoning(self, calls: list[Any], note: Any) -> None:
        """Where a stream is read, once; else also once more when the message is stored, as in Hermes."""
        agent = agent_saying(
            "<think>Easy.</think>Four.", reasoning_callback=note("reasoning"), stream_delta_callback=note("delta")
        )
        result = agent.run_conversation("Two and two?")
        assert [call for call in calls if call[0] == "reasoning"] == [("reasoning", "Easy.")]
        assert result["last_reasoning"] == "Easy."
        assert result["final_response"] == "Four."

    def test_reasoning_without_a_stream(self, calls: list[Any], note: Any) -> None:
        agent_saying("<think>Easy.</think>Four.", reasoning_callback=note("reasoning")).run_conversation("Two and two?")
        assert set(calls) == {("reasoning", "Easy.")}

    def test_thinking(self, calls: list[Any], note: Any) -> None:
        agent_saying("Four.", thinking_callback=note("thinking")).run_conversation("Two and two?")
        shown = [call[1] for call in calls]
        assert shown[0].endswith("...")
        assert shown[-1] == "", "the spinner is taken away when the answer comes"

    def test_status_and_interim_messages(self, calls: list[Any], note: Any) -> None:
        agent = agent_saying(
            "I look. " + terminal("true"),
            "A summary.",
            max_iterations=1,
            status_callback=note("status"),
            interim_assistant_callback=note("interim"),
        )
        agent.run_conversation("Go.")
        assert any("budget" in call[2].lower() for call in calls if call[0] == "status")
        assert [call[1] for call in calls if call[0] == "interim"] == ["I look."]

    def test_a_callback_that_raises_does_no_harm(self) -> None:
        def fail(*_: Any) -> None:
            raise RuntimeError("the display is gone")

        names = ("step", "tool_start", "tool_complete", "tool_progress", "stream_delta", "reasoning", "status")
        agent = agent_saying(
            "<think>Hm.</think>" + terminal("true"), "Done.", **{f"{name}_callback": fail for name in names}
        )
        assert agent.run_conversation("Go.")["stop_reason"] is StopReason.COMPLETED

    def test_clarify(self) -> None:
        """From 0.21 several questions may be asked at once."""

        def answer_several(questions: list[dict[str, Any]]) -> dict[str, Any]:
            return {"answers": {asked["qid"]: asked["choices"][-1] for asked in questions}, "outcome": "submitted"}

        question = {"question": "Which?", "choices": ["a", "b"]}
        agent = agent_saying(
            tool_call("clarify", questions=[question]) if SINCE_0_21 else tool_call("clarify", **question),
            "You chose b.",
            enabled_toolsets=["clarify"],
            clarify_callback=answer_several if SINCE_0_21 else lambda question, choices: choices[-1],
        )
        result = agent.run_conversation("Go.")
        answer = json.loads(tool_texts(result["messages"])[0])
        [answered] = answer["responses"] if SINCE_0_21 else [answer]
        assert answered["user_response"] == "b"


class TestInterrupt:
    def test_during_a_model_call(self) -> None:
        asked = threading.Event()

        def model(_: Any) -> Reply:
            asked.set()
            return Reply(hang=True)

        agent = agent_on(ScriptedServer(model))
        results: list[dict[str, Any]] = []
        thread = threading.Thread(target=lambda: results.append(agent.run_conversation("Go.")))
        thread.start()
        assert asked.wait(30)
        agent.interrupt()
        thread.join(30)
        [result] = results
        assert result["interrupted"] is True
        assert result["stop_reason"] is StopReason.INTERRUPTED
        assert not result["trajectory"].success
        until(lambda: server_of(agent).requests[0].cancelled)

    @pytest.mark.parametrize("way", [way for way in ("interrupt", "hard_interrupt") if hasattr(AIAgent, way)])
    async def test_of_a_task(self, way: str) -> None:
        asked = threading.Event()

        def model(_: Any) -> Reply:
            asked.set()
            return Reply(hang=True)

        agent = agent_on(ScriptedServer(model))
        async with agent.task() as task:
            running = asyncio.create_task(task.run("Go."))
            assert await asyncio.to_thread(asked.wait, LIMIT)
            await asyncio.to_thread(getattr(agent, way))
            assert (await asyncio.wait_for(running, LIMIT))["stop_reason"] is StopReason.INTERRUPTED

    def test_during_a_tool(self) -> None:
        started = threading.Event()
        agent = agent_saying(
            terminal("echo $$ > pid; sleep 1000"), "Never said.", tool_start_callback=lambda *_: started.set()
        )
        results: list[dict[str, Any]] = []
        thread = threading.Thread(target=lambda: results.append(agent.run_conversation("Go.", task_id="stopped")))
        thread.start()
        assert started.wait(30)
        agent.interrupt("Do something else.")
        thread.join(30)
        [result] = results
        assert result["stop_reason"] is StopReason.INTERRUPTED
        assert result["interrupt_message"] == "Do something else."
        assert [message["role"] for message in result["messages"]][:3] == ["user", "assistant", "tool"]
        assert len(server_of(agent).requests) == 1
        check_tokens(result["trajectory"], server_of(agent).requests)

    def test_the_agent_goes_on_afterwards(self) -> None:
        agent: AtroposAIAgent

        def model(messages: list[dict[str, str]]) -> str:
            if "Stop" in messages[-1]["content"]:
                agent.interrupt()
            return "Hello again."

        agent = agent_on(ScriptedServer(model))
        assert agent.run_conversation("Stop.")["stop_reason"] is StopReason.INTERRUPTED
        assert agent.run_conversation("Hello.")["final_response"] == "Hello again."


class TestRedirect:
    def test_the_request_is_asked_again_with_the_correction(self) -> None:
        """Releases before 0.20 cannot do it."""
        asked = threading.Event()

        def model(messages: list[dict[str, str]]) -> str | Reply:
            asked.set()
            return "In French: bonjour." if "In French" in messages[-1]["content"] else Reply(hang=True)

        agent = agent_on(ScriptedServer(model))
        results: list[dict[str, Any]] = []
        thread = threading.Thread(target=lambda: results.append(agent.run_conversation("Say hello.")))
        thread.start()
        assert asked.wait(LIMIT)
        until(lambda: server_of(agent).requests)
        if not hasattr(AIAgent, "redirect"):
            with pytest.raises(AttributeError):
                agent.redirect("In French, please.")
            agent.interrupt()
            thread.join(LIMIT)
            return
        assert agent.redirect("In French, please.")
        thread.join(LIMIT)
        [result] = results
        assert result["final_response"] == "In French: bonjour."
        assert server_of(agent).requests[0].cancelled
        check_tokens(result["trajectory"], server_of(agent).requests[1:])


class TestSteer:
    def test_the_text_reaches_the_model_behind_a_tool_result(self) -> None:
        agent: AtroposAIAgent
        agent = agent_saying(
            terminal("echo one"),
            "Done.",
            tool_complete_callback=lambda *_: agent.steer("Hurry up."),
        )
        result = agent.run_conversation("Go.")
        [new] = check_unbroken(server_of(agent).requests)
        assert "Hurry up." in new
        assert [new] == between_answers(result["messages"])
        check_tokens(result["trajectory"], server_of(agent).requests)

    def test_without_a_tool_it_is_handed_back(self) -> None:
        agent: AtroposAIAgent

        def model(_: Any) -> str:
            assert agent.steer("Hurry up.")
            return "Done."

        agent = agent_on(ScriptedServer(model))
        assert agent.run_conversation("Go.")["pending_steer"] == "Hurry up."


class TestSessions:
    def test_the_session_is_stored(self, tmp_path: Path) -> None:
        sessions = SessionDB(tmp_path / "state.db")
        agent = agent_saying("I look. " + terminal("echo hi"), "Done.", session_db=sessions, session_id="s-1")
        result = agent.run_conversation("Go.")
        assert result["session_id"] == "s-1"
        stored = sessions.get_messages("s-1")
        assert [message["role"] for message in stored] == ["user", "assistant", "tool", "assistant"]
        assert stored[-1]["content"] == "Done."

    def test_a_session_is_taken_up_again(self, tmp_path: Path) -> None:
        sessions = SessionDB(tmp_path / "state.db")
        agent_saying("Nice to meet you.", session_db=sessions, session_id="s-1").run_conversation("I am Ada.")
        again = agent_saying("Ada.", session_db=sessions, session_id="s-1")
        history = sessions.get_messages_as_conversation("s-1")
        assert again.run_conversation("Who am I?", conversation_history=history)["final_response"] == "Ada."
        assert "Nice to meet you." in server_of(again).requests[0].prompt

    async def test_runs_at_once_have_sessions_of_their_own(self, tmp_path: Path) -> None:
        sessions = SessionDB(tmp_path / "state.db")
        agent = agent_on(ScriptedServer(lambda messages: messages[-1]["content"]), session_db=sessions)
        async with agent.task() as one, agent.task() as two:
            first, second = await one.run("First."), await two.run("Second.")
        assert first["session_id"] != second["session_id"]
        for result in (first, second):
            assert sessions.get_messages(result["session_id"])[-1]["content"] == result["final_response"]


def saved(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


class TestSavedTrajectories:
    def test_sharegpt_in_the_current_folder(self, tmp_path: Path) -> None:
        agent = agent_saying("<think>Hm.</think>I look." + terminal("echo hi"), "Done.", save_trajectories=True)
        agent.run_conversation("Go.")
        [entry] = saved(tmp_path / "trajectory_samples.jsonl")
        assert (entry["completed"], entry["model"]) == (True, "scripted")
        turns = entry["conversations"]
        assert [turn["from"] for turn in turns] == ["system", "human", "gpt", "tool", "gpt"]
        assert turns[1]["value"] == "Go."
        assert "Hm." in turns[2]["value"]
        assert '{"name": "terminal", "arguments": {"command": "echo hi"}}' in turns[2]["value"]
        assert "hi" in turns[3]["value"]
        assert turns[4]["value"].endswith("Done.")
        assert not (tmp_path / "failed_trajectories.jsonl").exists()

    def test_retries_are_saved_with_the_errors_that_answered_them(self, tmp_path: Path) -> None:
        agent = agent_saying("Look. " + MALFORMED, terminal("echo hi"), "Done.", save_trajectories=True)
        result = agent.run_conversation("Go.")
        roles = [message["role"] for message in result["messages"]]
        assert roles == ["user", "assistant", "tool", "assistant", "tool", "assistant"]
        [entry] = saved(tmp_path / "trajectory_samples.jsonl")
        turns = entry["conversations"]
        assert [turn["from"] for turn in turns] == ["system", "human", "gpt", "tool", "gpt", "tool", "gpt"]
        assert MALFORMED in turns[2]["value"]
        assert "JSON" in turns[3]["value"]

    def test_valid_and_invalid_calls_in_one_turn(self, tmp_path: Path) -> None:
        agent = agent_saying(
            tool_call("no_such_tool", x=1) + "\n" + terminal("echo hi"), "Done.", save_trajectories=True
        )
        result = agent.run_conversation("Go.")
        refused, answered = tool_texts(result["messages"])
        assert "no_such_tool" in refused
        assert json.loads(answered)["output"] == "hi"
        said = result["messages"][1]
        assert "no_such_tool" in said["content"]
        assert len(said["tool_calls"]) == 1
        [entry] = saved(tmp_path / "trajectory_samples.jsonl")
        tool = next(turn["value"] for turn in entry["conversations"] if turn["from"] == "tool")
        by_name = {
            answer["name"]: answer["content"]
            for block in tool.split("<tool_response>")[1:]
            for answer in [json.loads(block.split("</tool_response>")[0])]
        }
        assert by_name["terminal"]["output"] == "hi"
        assert "no_such_tool" in str(by_name["no_such_tool"])

    def test_off_by_default(self, tmp_path: Path) -> None:
        agent_saying("Done.").run_conversation("Go.")
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("retries_first", [False, True])
    def test_a_failed_run_is_saved_as_failed_and_once(self, tmp_path: Path, retries_first: bool) -> None:
        faulty = [MALFORMED] if retries_first else []
        agent = agent_saying(
            *faulty, terminal("echo hi"), Reply(error=RuntimeError("no memory")), save_trajectories=True
        )
        result = agent.run_conversation("Go.")
        assert result["stop_reason"] is StopReason.SERVER_ERROR
        [entry] = saved(tmp_path / "failed_trajectories.jsonl")
        assert not entry["completed"]
        assert sum("<tool_call>" in turn["value"] for turn in entry["conversations"][1:]) == 1 + len(faulty)
        assert "hi" in entry["conversations"][-1]["value"]
        assert not (tmp_path / "trajectory_samples.jsonl").exists()


class TestIterationLimit:
    def test_the_summary_goes_to_the_server(self) -> None:
        agent = agent_saying(terminal("echo 1"), terminal("echo 2"), "So far: 1 and 2.", max_iterations=2)
        result = agent.run_conversation("Count.")
        requests = server_of(agent).requests
        assert result["stop_reason"] is StopReason.ITERATION_LIMIT
        assert result["completed"] is False
        assert result["final_response"] == "So far: 1 and 2."
        assert not result["trajectory"].success
        assert len(requests) == 3
        assert result["messages"][-1]["content"] == "So far: 1 and 2."
        check_unbroken(requests[:2])
        check_tokens(result["trajectory"], requests)
        kept = SINCE_0_21  # before, Hermes takes the tools away for its summary: another prompt
        assert ("<tools>" in requests[2].prompt) == kept
        assert len(result["trajectory"].sequences) == (1 if kept else 2)

    def test_the_budget_is_used_up_call_by_call(self) -> None:
        """Hermes takes the given one for what was there before the first turn, and gives each turn its own."""
        budget = IterationBudget(5)
        agent = agent_saying(
            terminal("echo 1"), terminal("echo 2"), "Summary.", iteration_budget=budget, max_iterations=2
        )
        assert agent.iteration_budget is budget
        agent.run_conversation("Count.")
        assert (agent.iteration_budget.max_total, agent.iteration_budget.remaining) == (2, 0)

    def test_the_limit_is_each_conversation_s_own(self) -> None:
        agent = agent_saying(terminal("echo 1"), "One.", terminal("echo 2"), "Two.", max_iterations=2)
        assert [agent.run_conversation("Count.")["final_response"] for _ in range(2)] == ["One.", "Two."]


class TestParallelTools:
    def test_their_results_stand_in_the_order_of_the_calls(self, workspace: Path) -> None:
        (workspace / "a.txt").write_text("first file\n")
        (workspace / "b.txt").write_text("second file\n")
        calls = "\n".join(tool_call("read_file", path=str(workspace / name)) for name in ("a.txt", "b.txt"))
        agent = agent_saying(calls, "Done.")
        result = agent.run_conversation("Read.", task_id="parallel")
        contents = tool_texts(result["messages"])
        assert ["first" in contents[0], "second" in contents[1]] == [True, True]
        assert check_unbroken(server_of(agent).requests) == [tool_turn(*contents)]
        check_tokens(result["trajectory"], server_of(agent).requests)

    def test_two_commands_of_one_turn(self) -> None:
        agent = agent_saying(terminal("echo one") + terminal("echo two"), "Done.")
        result = agent.run_conversation("Go.", task_id="two")
        assert [json.loads(content)["output"] for content in tool_texts(result["messages"])] == ["one", "two"]
        ids = [call["id"] for call in result["messages"][1]["tool_calls"]]
        assert len(set(ids)) == 2
        assert [message["tool_call_id"] for message in result["messages"] if message["role"] == "tool"] == ids


class TestDelegation:
    @staticmethod
    def model(messages: list[dict[str, str]]) -> str:
        """The parent delegates; the child writes a file and reports; the parent reads the file."""
        said = [message["content"] for message in messages if message["role"] == "assistant"]
        child = not any("Delegate, please." in message["content"] for message in messages)
        if child:
            return (
                terminal("echo $PARENT; pwd > child.txt; echo by the child >> child.txt") if not said else "Child done."
            )
        if not said:
            return terminal("export PARENT=parent")
        if len(said) == 1:
            return tool_call("delegate_task", goal="Write child.txt", context="nothing")
        return terminal("cat child.txt") if len(said) == 2 else "All done."

    def delegating(self, **options: Any) -> AtroposAIAgent:
        return agent_on(ScriptedServer(self.model), enabled_toolsets=["terminal", "file", "delegation"], **options)

    async def test_a_child_acts_in_the_parent_s_sandbox_and_ends_first(self) -> None:
        agent = self.delegating()
        async with agent.task() as task:
            result = await task.run("Delegate, please.")
            written = await task.read_file("child.txt")
            assert written.splitlines() == [str(task.workspace), "by the child"]
        assert result["final_response"] == "All done."
        assert "Child done." in tool_texts(result["messages"])[1]
        read = json.loads(tool_texts(result["messages"])[2])
        assert "by the child" in read["output"]

    async def test_its_calls_go_to_the_same_server_and_its_tokens_are_in_the_ledger(self) -> None:
        agent = self.delegating()
        async with agent.task() as task:
            result = await task.run("Delegate, please.")
        requests = server_of(agent).requests
        assert len(requests) == 6
        child = [request for request in requests if "Delegate, please." not in request.prompt]
        parent = [request for request in requests if request not in child]
        assert len(child) == 2
        check_unbroken(child)
        check_unbroken(parent)
        check_tokens(result["trajectory"], requests)
        assert len(result["trajectory"].sequences) == 2

    def test_synchronously_too(self) -> None:
        agent = self.delegating()
        result = agent.run_conversation("Delegate, please.", task_id="parent")
        assert result["final_response"] == "All done."
        check_tokens(result["trajectory"], server_of(agent).requests)

    async def test_several_children_at_once(self) -> None:
        def model(messages: list[dict[str, str]]) -> str:
            said = sum(message["role"] == "assistant" for message in messages)
            for number in range(3):  # the goal stands in the system prompt, and from 0.21 in the user's message
                if any(f"Child number {number}" in m["content"] for m in messages[:2]):
                    return terminal(f"echo {number} > {number}.txt") if not said else f"Child {number} done."
            if not said:
                return tool_call("delegate_task", tasks=[{"goal": f"Child number {number}"} for number in range(3)])
            return "All done."

        agent = agent_on(ScriptedServer(model), enabled_toolsets=["terminal", "file", "delegation"])
        async with agent.task() as task:
            result = await task.run("Delegate, please.")
            assert (await task.terminal("cat 0.txt 1.txt 2.txt")).output.split() == ["0", "1", "2"]
        assert result["final_response"] == "All done."
        answer = tool_texts(result["messages"])[0]
        assert all(f"Child {number} done." in answer for number in range(3))
        check_tokens(result["trajectory"], server_of(agent).requests)
        assert len(result["trajectory"].sequences) == 4


class TestRolloutsAreApart:
    """What Hermes remembers of one rollout is not the next one's, on the same agent and under the same name."""

    async def test_the_todo_list(self) -> None:
        todos = [{"id": "1", "content": "Only mine.", "status": "pending"}]
        agent = agent_saying(
            hermes_call("todo", todos=todos), "Done.", hermes_call("todo"), "Done.", enabled_toolsets=["todo"]
        )
        results = []
        for _ in range(2):
            async with agent.task() as task:
                results.append(await task.run("Go."))
        mine, next_one = (tool_texts(result["messages"])[0] for result in results)
        assert "Only mine." in mine
        assert "Only mine." not in next_one

    async def test_files_that_were_read_under_the_same_task_id(self, tmp_path: Path) -> None:
        (tmp_path / "f.txt").write_text("hello\n")
        agent = agent_on(ScriptedServer(lambda m: "Done." if len(m) > 3 else tool_call("read_file", path="f.txt")))
        answers = []
        for _ in range(5):
            async with agent.task("the same", workspace=tmp_path) as task:
                answers += tool_texts((await task.run("Go."))["messages"])
        assert all("hello" in answer for answer in answers)
        assert len(set(answers)) == 1

    async def test_files_that_another_task_wrote(self, tmp_path: Path) -> None:
        """One after the other in one folder: no warning of someone who is not there any more."""
        (tmp_path / "f.txt").write_text("hello\n")
        agent = agent_on(
            ScriptedServer(
                lambda m: (
                    tool_call("read_file", path="f.txt"),
                    tool_call("write_file", path="f.txt", content="hello\n"),
                    "Done.",
                )[len(m) // 2 - 1]
            )
        )
        answers = []
        for _ in range(3):
            async with agent.task(workspace=tmp_path) as task:
                answers.append(tool_texts((await task.run("Go."))["messages"]))
        assert answers[0] == answers[1] == answers[2]

    async def test_searches_under_the_same_task_id(self, tmp_path: Path) -> None:
        (tmp_path / "f.txt").write_text("hello\n")
        search = tool_call("search_files", pattern="*.txt", target="files")
        agent = agent_on(ScriptedServer(lambda m: "Done." if len(m) > 3 else search))
        answers = []
        for _ in range(5):
            async with agent.task("the same", workspace=tmp_path) as task:
                answers += tool_texts((await task.run("Go."))["messages"])
        assert len(set(answers)) == 1

    async def test_background_processes_of_another_task(self) -> None:
        started, looks = terminal("sleep 1000", background=True), hermes_call("process", action="list")
        one, other = agent_saying(started, looks, "Done."), agent_saying(looks, "Done.")
        async with one.task() as first, other.task() as second:
            mine = tool_texts((await first.run("Go."))["messages"])[1]
            theirs = tool_texts((await second.run("Go."))["messages"])[0]
        assert len(json.loads(mine)["processes"]) == 1
        assert json.loads(theirs)["processes"] == []

    async def test_sessions(self, tmp_path: Path) -> None:
        sessions = SessionDB(tmp_path / "state.db")
        agent = agent_on(ScriptedServer(lambda m: f"I heard {m[-1]['content']}"), session_db=sessions)
        ids = []
        for word in ("one", "two"):
            async with agent.task() as task:
                ids.append((await task.run(word))["session_id"])
        assert ids[0] != ids[1]
        assert [m["content"] for m in sessions.get_messages(ids[1])] == ["two", "I heard two"]


class TestServers:
    """Whatever atroposlib calls a server."""

    @staticmethod
    def manager(scripted: ScriptedServer) -> ServerManager:
        config = APIServerConfig(base_url="http://unused.invalid", model_name="scripted", health_check=False)
        manager = ServerManager([config], slurm=False)
        manager.servers = [scripted]
        return manager

    @pytest.mark.parametrize("kind", ["server", "manager", "managed", "exact"])
    def test_it_tracks_the_tokens(self, kind: str) -> None:
        scripted = ScriptedServer([terminal("echo 1"), "Done."])
        server = {
            "server": lambda: scripted,
            "manager": lambda: self.manager(scripted),
            "managed": lambda: ManagedServer(scripted, tokenizer=chatml_tokenizer()),
            "exact": lambda: ExactManagedServer(scripted, chatml_tokenizer()),
        }[kind]()
        result = agent_on(server, tokenizer=chatml_tokenizer()).run_conversation("Go.")
        assert result["final_response"] == "Done."
        check_unbroken(scripted.requests)
        check_tokens(result["trajectory"], scripted.requests)

    def test_a_tokenizer_by_its_path(self, tmp_path: Path) -> None:
        chatml_tokenizer().save_pretrained(tmp_path / "tokenizer")
        agent = agent_saying(terminal("echo 1"), "Done.", tokenizer=str(tmp_path / "tokenizer"))
        check_tokens(agent.run_conversation("Go.")["trajectory"], server_of(agent).requests)

    def test_a_chat_template_without_a_place_for_tools(self) -> None:
        """Then the system prompt lists them, and explains the tags."""
        tokenizer = copy.deepcopy(chatml_tokenizer())
        tokenizer.chat_template = (
            "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
        )
        agent = agent_saying(terminal("echo 1"), MALFORMED, "Done.", tokenizer=tokenizer)
        result = agent.run_conversation("Go.")
        requests = server_of(agent).requests
        assert result["final_response"] == "Done."
        system = requests[0].prompt.split("<|im_end|>")[0]
        assert '"name": "terminal"' in system
        assert "<tool_call>" in system
        assert [new.startswith("<|im_start|>") for new in check_unbroken(requests)] == [True, True]
        check_tokens(result["trajectory"], requests)

    @pytest.mark.parametrize("through", ["base_url", "manager"])
    def test_a_server_without_token_ids(self, through: str) -> None:
        """It answers all the same, and the trajectory says that it has no tokens."""
        with OpenAIWire(message={"role": "assistant", "content": "Hello there."}) as wire:
            config = APIServerConfig(base_url=f"{wire.url}/v1", model_name=MODEL, api_key="x", health_check=False)
            given: dict[str, Any] = (
                {"base_url": wire.url, "model": MODEL}
                if through == "base_url"
                else {"server": ServerManager([config], slurm=False)}
            )
            result = AtroposAIAgent(enabled_toolsets=["terminal"], **given, **QUIET).run_conversation("Hello")
        trajectory = result["trajectory"]
        assert result["final_response"] == "Hello there."
        assert (trajectory.tracked, trajectory.sequences, result["managed_state"]["nodes"]) == (False, [], [])
        assert [message["role"] for message in trajectory.to_messages()] == ["system", "user", "assistant"]
        with pytest.raises(UntrackedError, match="no tokens"):
            trajectory.to_scored_data(score=1.0)

    def test_native_tool_calls(self) -> None:
        native = {
            "id": "x",
            "type": "function",
            "function": {"name": "terminal", "arguments": '{"command": "echo 41"}'},
        }
        with OpenAIWire(message={"role": "assistant", "content": None, "tool_calls": [native]}) as wire:
            agent = AtroposAIAgent(
                base_url=wire.url, model=MODEL, enabled_toolsets=["terminal"], max_iterations=2, **QUIET
            )
            result = agent.run_conversation("Go.")
        assert [json.loads(content)["output"] for content in tool_texts(result["messages"])] == ["41", "41"]
        ids = [message["tool_call_id"] for message in result["messages"] if message["role"] == "tool"]
        assert len(set(ids)) == 2, "unique, whatever the server calls them"


class TestTools:
    def test_they_are_those_of_hermes(self) -> None:
        toolsets = ["terminal", "file", "todo", "delegation", "code_execution"]
        stock = AIAgent(enabled_toolsets=toolsets, base_url="inproc://x.invalid/v1", api_key="k", **QUIET)
        assert agent_saying("Hi.", enabled_toolsets=toolsets).tools == stock.tools

    def test_many_tools_of_others_are_deferred_behind_the_tool_search(self) -> None:
        """Before 0.21 where they are long, since then always. The trajectory names the tool that was run."""

        def add(name: str, description: str) -> None:
            schema = {"name": name, "description": description, "parameters": {"type": "object", "properties": {}}}
            registry.register(name, "mcp-lamps", schema, handler=lambda arguments, **_: f"{name} is on")

        light = {"name": "lamp_7", "arguments": {}}
        call = tool_call("tool_call", calls=[light]) if SINCE_0_21 else tool_call("tool_call", **light)
        try:
            for number in range(10):
                add(f"lamp_{number}", "Turn a lamp on. " * 10)
            few = agent_saying("Hi.", enabled_toolsets=["terminal", "mcp-lamps"])
            for number in range(10):
                add(f"lamp_{number}", "Turn a lamp on. " * 1000)
            many = agent_saying(call, "Done.", enabled_toolsets=["terminal", "mcp-lamps"])
            result = many.run_conversation("Light, please.")
        finally:
            for number in range(10):
                registry.deregister(f"lamp_{number}")
        assert "terminal" in few.valid_tool_names
        assert ({"lamp_0", "lamp_9"} <= set(few.valid_tool_names)) != SINCE_0_21
        assert {"terminal", "tool_search", "tool_call"} <= set(many.valid_tool_names)
        assert "lamp_7" not in many.valid_tool_names
        assert "lamp_7 is on" in tool_texts(result["messages"])[0]
        [ran] = result["trajectory"].steps[0].tool_results
        assert ran.name == "lamp_7"


class TestImages:
    PARTS: ClassVar = [
        {"type": "text", "text": "What is it?"},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}},
    ]

    def test_a_model_whose_tokens_are_tracked_reads_that_there_was_one(self) -> None:
        agent = agent_saying("I cannot tell.")
        result = agent.run_conversation(self.PARTS)
        assert result["stop_reason"] is StopReason.COMPLETED
        assert (
            "[An image was attached here, which you cannot see.]\n\nWhat is it?" in server_of(agent).requests[0].prompt
        )
        check_tokens(result["trajectory"], server_of(agent).requests)

    def test_others_are_sent_it_where_hermes_would(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HERMES_HOME", str(tmp_path))
        (tmp_path / "config.yaml").write_text("model: {supports_vision: true}\n")
        with OpenAIWire(reply="A cat.") as wire:
            agent = AtroposAIAgent(base_url=wire.url, model=MODEL, enabled_toolsets=[], **QUIET)
            assert agent.chat(self.PARTS) == "A cat."
        [request] = wire.to("/v1/chat/completions")
        assert request.body["messages"][-1]["content"] == self.PARTS


def test_what_the_user_forbids_is_not_run_from_the_next_command_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HERMES_HOME", str(tmp_path))
    configuration = tmp_path / "config.yaml"
    configuration.write_text("approvals: {}\n")
    agent = agent_saying(terminal("echo first"), terminal("echo second"), "Done.")

    def forbid(name: str, *_: Any) -> None:
        configuration.write_text("approvals: {deny: ['echo second*']}\n")

    agent.tool_progress_callback = forbid
    messages = agent.run_conversation("Go.")["messages"]
    first, second = (message["content"] for message in messages if message["role"] == "tool")
    assert json.loads(first)["output"] == "first"
    assert "approvals.deny" in second


class TestTask:
    async def test_verifier_sees_the_sandbox_as_the_agent_left_it(self) -> None:
        agent = agent_saying(terminal("mkdir deep && cd deep && export COLOUR=red && echo x > made.txt"), "Done.")
        async with agent.task("fix-17") as task:
            result = await task.run("Go.")
            assert (task.task_id, result["task_id"]) == ("fix-17", "fix-17")
            check = await task.terminal("echo [$COLOUR]; basename $PWD; exit 4")
            assert (check.output.split(), check.exit_code) == (["[]", "workspace"], 4), "in a new shell"
            shell = task.sandbox.run("echo $COLOUR; basename $PWD; exit 4")
            assert (shell.output.split(), shell.exit_code) == (["red", "deep"], 4), "the agent's is as it left it"
            assert await task.read_file("deep/made.txt") == "x\n"
            await task.write_file("new/file.txt", "grün")
            assert await task.read_file("new/file.txt") == "grün"
            await task.write_file("raw", b"\xff\x00")
            assert await task.read_bytes("raw") == b"\xff\x00"
            folder = task.workspace
            assert folder.is_dir()
        assert not folder.exists()

    async def test_a_given_workspace_is_used_as_it_is(self, tmp_path: Path) -> None:
        folder = tmp_path / "repo"
        folder.mkdir()
        (folder / "here.txt").write_text("already\n")
        agent = agent_saying(terminal("cat here.txt; echo more > more.txt"), "Done.")
        async with agent.task(workspace=folder) as task:
            result = await task.run("Go.")
        assert json.loads(tool_texts(result["messages"])[0])["output"] == "already"
        assert sorted(path.name for path in folder.iterdir()) == ["here.txt", "more.txt"]

    async def test_a_copy_leaves_the_original_alone(self, tmp_path: Path) -> None:
        folder = tmp_path / "repo"
        folder.mkdir()
        (folder / "here.txt").write_text("already\n")
        agent = agent_on(ScriptedServer(lambda m: "Done." if len(m) > 3 else terminal("echo changed > here.txt")))
        async with agent.task(workspace=folder, copy=True) as one, agent.task(workspace=folder, copy=True) as two:
            await one.run("Go.")
            assert await one.read_file("here.txt") == "changed\n"
            assert await two.read_file("here.txt") == "already\n"
        assert (folder / "here.txt").read_text() == "already\n"

    async def test_the_system_prompt_names_the_workspace_and_not_the_host_s_folder(self, tmp_path: Path) -> None:
        agent = agent_saying("Done.")
        async with agent.task() as task:
            result = await task.run("Go.")
            assert "~/workspace" in result["system_prompt"]
        assert str(tmp_path) not in result["system_prompt"]

    async def test_context_files_are_the_workspace_s_and_not_the_host_s(self, workspace: Path) -> None:
        (workspace / "AGENTS.md").write_text("The host's rule.\n")
        folder = workspace / "repo"
        (folder / "deep").mkdir(parents=True)
        (folder / "AGENTS.md").write_text("The workspace's rule.\n")
        agent = agent_saying(tool_call("read_file", path="deep/x"), "Done.", skip_context_files=False)
        async with agent.task(workspace=folder) as task:
            result = await task.run("Go.")
        assert "The workspace's rule." in result["system_prompt"]
        assert "The host's rule." not in str(result["messages"]) + result["system_prompt"]

    async def test_large_results_lie_in_the_sandbox(self) -> None:
        server = ScriptedServer(["".join(terminal(f"seq {start} 20000") for start in range(4)), "Done."])
        server.context_length = 1_000_000
        agent = agent_on(server)
        with nothing_left():
            async with agent.task() as task:
                result = await task.run("Go.")
                stored = task.sandbox.run("cat $TMPDIR/hermes-results/*.txt | grep -c '20000'").output
        assert int(stored) > 0
        contents = tool_texts(result["messages"])
        assert any("persisted-output" in content for content in contents)
        assert check_unbroken(server_of(agent).requests) == [tool_turn(*contents)]
        check_tokens(result["trajectory"], server_of(agent).requests)

    async def test_what_was_set_on_the_agent_after_its_construction(self) -> None:
        """Hermes' users hand callbacks in so as well."""
        agent = agent_saying(terminal("echo 1"), "Summary.")
        steps: list[int] = []
        agent.step_callback = lambda number, _: steps.append(number)
        agent.max_iterations = 1
        async with agent.task() as task:
            result = await task.run("Go.")
        assert steps == [1]
        assert result["stop_reason"] is StopReason.ITERATION_LIMIT

    async def test_how_the_agent_prints(self, capsys: pytest.CaptureFixture[str]) -> None:
        agent = agent_saying(*[Reply(error=RuntimeError("the server is down"))] * 2)
        for silent in (False, True):
            agent.suppress_status_output = silent
            async with agent.task() as task:
                await task.run("Go.")
            assert ("the server is down" in capsys.readouterr().out) is not silent

    async def test_file_tools_act_in_the_workspace(self) -> None:
        agent = agent_saying(
            tool_call("write_file", path="notes.txt", content="one\ntwo\n"),
            tool_call("patch", mode="replace", path="notes.txt", old_string="two", new_string="three"),
            tool_call("search_files", pattern="three", path="notes.txt"),
            "Done.",
        )
        async with agent.task() as task:
            result = await task.run("Go.")
            assert await task.read_file("notes.txt") == "one\nthree\n"
        assert "notes.txt" in tool_texts(result["messages"])[2]

    async def test_several_runs_are_one_rollout(self) -> None:
        agent = agent_saying(terminal("echo 1 > n"), "First done.", terminal("cat n"), "Second done.")
        async with agent.task() as task:
            first = await task.run("First.")
            second = await task.run("Second.", conversation_history=first["messages"])
        assert json.loads(tool_texts(second["messages"])[1])["output"] == "1"
        check_unbroken(server_of(agent).requests)
        check_tokens(second["trajectory"], server_of(agent).requests)
        assert len(second["trajectory"].sequences) == 1

    async def test_a_command_that_takes_too_long(self) -> None:
        async with agent_saying().task() as task:
            assert (await task.terminal("sleep 1000", timeout=1)).exit_code == 124

    async def test_a_missing_file(self) -> None:
        async with agent_saying().task() as task:
            with pytest.raises(FileNotFoundError):
                await task.read_file("no.txt")

    async def test_the_block_s_own_exception_releases_too(self) -> None:
        folders: list[Path] = []

        async def verifier() -> None:
            async with agent_saying().task() as task:
                folders.append(task.workspace)
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            await verifier()
        assert not folders[0].exists()
