"""The small agent: it acts until it answers, keeps what it has when it cannot, and trains on what was sampled."""

from __future__ import annotations

import asyncio
import json
import threading
from pathlib import Path
from typing import Any

import pytest
from atroposlib.envs.server_handling.managed_server import DummyManagedServer
from hypothesis import given, settings
from hypothesis import strategies as st
from support import garbage

from hermes_atropos.errors import (
    BackendResponseError,
    BackendTimeoutError,
    ConfigurationError,
    NoServerError,
    SandboxError,
    ToolDefinitionError,
    UntrackedError,
    WorkspaceError,
)
from hermes_atropos.hermes.tools import HermesTools
from hermes_atropos.messages import TURN_KEY
from hermes_atropos.react import AgentConfig, AtroposAgent
from hermes_atropos.testing import Reply, ScriptedServer, chatml_tokenizer, tool_call
from hermes_atropos.toolcalls import ParseStatus, ToolCall
from hermes_atropos.tools import ToolRegistry
from hermes_atropos.trajectory import AgentResult, StopReason, ToolResult, read_record, write_record

TOKENIZER = chatml_tokenizer()


def weather(city: str) -> str:
    """The weather in a city.

    Args:
        city: its name
    """
    return f"sunny in {city}"


def broken() -> None:
    """Always fails."""
    raise LookupError("the index is gone")


def agent(replies: Any, tools: Any = (weather, broken), **config: Any) -> tuple[AtroposAgent, ScriptedServer]:
    server = ScriptedServer(replies)
    return AtroposAgent(server, tools=tools, config=AgentConfig(**config)), server


def check_tokens(result: AgentResult, server: ScriptedServer) -> None:
    """The trainer's tokens are those that the server was sent and sampled: each sampled one once, nothing else."""
    trained = [
        (token, logprob)
        for sequence in result.sequences
        for token, mask, logprob in zip(sequence.tokens, sequence.masked_tokens, sequence.logprobs, strict=True)
        if mask != -100
    ]
    sampled = [
        (token, logprob)
        for request in server.requests
        if request.output_ids
        for token, logprob in zip(request.output_ids[0], request.logprobs[0], strict=True)
    ]
    assert sorted(trained) == sorted(sampled)
    streams = [request.prompt_ids + request.output_ids[0] for request in server.requests if request.output_ids]
    for sequence in result.sequences:
        assert sequence.tokens in streams


class TestLoop:
    async def test_it_calls_observes_and_answers(self) -> None:
        call = tool_call("weather", city="Oslo")
        it, server = agent([f"<think>\nI ask.\n</think>\n{call}", "It is sunny."])
        result = await it.run("What is the weather in Oslo?")
        assert (result.success, result.final_response, result.stop_reason) == (
            True,
            "It is sunny.",
            StopReason.COMPLETED,
        )
        assert (result.num_steps, result.total_tool_calls, result.error) == (2, 1, None)
        first, second = result.steps
        assert [c.name for c in first.tool_calls] == ["weather"]
        assert first.tool_results[0].content == "sunny in Oslo"
        assert first.tool_results[0].duration_s is not None
        assert (first.has_tool_calls, second.has_tool_calls) == (True, False)
        assert first.sequence_data is second.sequence_data is result.trajectory_data
        roles = [message["role"] for message in result.to_messages()]
        assert roles == ["system", "user", "assistant", "tool", "assistant"]
        assert "sunny in Oslo" in server.requests[1].prompt
        check_tokens(result, server)

    async def test_the_next_prompt_is_the_last_one_and_what_was_sampled(self) -> None:
        it, server = agent([tool_call("weather", city="Ös lo "), tool_call("weather", city="B"), "Both sunny. "])
        result = await it.run("Compare.")
        for before, after in zip(server.requests, server.requests[1:], strict=False):
            assert after.prompt_ids[: len(before.prompt_ids) + len(before.output_ids[0])] == (
                before.prompt_ids + before.output_ids[0]
            )
        data = result.to_scored_data(1.0)
        assert data["tokens"] == [server.requests[-1].prompt_ids + server.requests[-1].output_ids[0]]
        assert [len(row) for row in data["inference_logprobs"]] == [len(row) for row in data["tokens"]]
        assert result.total_tokens == len(data["tokens"][0])

    async def test_several_calls_in_one_turn_are_answered_in_order(self) -> None:
        calls = [tool_call("weather", city=city) for city in ("Rome", "Bonn", "Kyiv")]
        it, server = agent(["\n".join(calls), "done"])
        result = await it.run("All three.")
        assert [r.content for r in result.steps[0].tool_results] == ["sunny in Rome", "sunny in Bonn", "sunny in Kyiv"]
        prompt = server.requests[1].prompt
        assert prompt.index("sunny in Rome") < prompt.index("sunny in Bonn") < prompt.index("sunny in Kyiv")

    async def test_a_malformed_call_is_sent_back_and_mended(self) -> None:
        it, server = agent(
            [
                '<tool_call>\n{"name": "weather", "arguments": {"city": }\n</tool_call>',
                tool_call("weather", city="Rome"),
                "ok",
            ]
        )
        result = await it.run("Go.")
        assert result.success
        assert [call.status for call in result.steps[0].tool_calls] == [ParseStatus.INVALID_JSON, ParseStatus.OK]
        assert result.steps[0].malformed_calls == 1
        assert "valid JSON" in server.requests[1].prompt
        assert len(result.steps[0].turns) == 2
        check_tokens(result, server)

    async def test_a_valid_call_beside_an_invalid_one_is_run_and_both_are_answered(self) -> None:
        it, server = agent([tool_call("nothing") + "\n" + tool_call("weather", city="Rome"), "ok"])
        result = await it.run("Go.")
        prompt = server.requests[1].prompt
        assert prompt.index("no tool named 'nothing'") < prompt.index("sunny in Rome")
        assert [call.status for call in result.steps[0].tool_calls] == [ParseStatus.UNKNOWN_TOOL, ParseStatus.OK]
        check_tokens(result, server)

    async def test_a_tool_that_raises_answers_and_is_counted(self) -> None:
        it, server = agent([tool_call("broken"), "It is gone."])
        result = await it.run("Go.")
        assert result.success
        assert (result.tool_errors, result.steps[0].tool_errors) == (1, 1)
        assert "LookupError: the index is gone" in server.requests[1].prompt

    async def test_content_is_read_from_the_reasoning_where_it_is_empty(self) -> None:
        it, _ = agent([f"<think>\n{tool_call('weather', city='Rome')}\n</think>", "<think>\nOnly thought.\n</think>"])
        result = await it.run("Go.")
        assert result.steps[0].tool_results[0].content == "sunny in Rome"
        assert (result.final_response, result.success) == ("Only thought.", True)

    async def test_it_only_talks_without_tools(self) -> None:
        server = ScriptedServer(["Hello."])
        result = await AtroposAgent(server).run("Say it.")
        assert result.final_response == "Hello."
        assert (result.num_steps, result.total_tool_calls) == (1, 0)
        assert result.messages[0]["role"] == "user", "there is nothing to explain"

    async def test_execute_tool_stands_in_for_the_tools(self) -> None:
        seen: list[ToolCall] = []

        async def execute(call: ToolCall) -> ToolResult:
            seen.append(call)
            return ToolResult(call.name, "raining", exit_code=0)

        server = ScriptedServer([tool_call("weather", city="Rome"), "ok"])
        result = await AtroposAgent(server, [weather], execute_tool=execute).run("Go.")
        assert [call.arguments for call in seen] == [{"city": "Rome"}]
        assert result.steps[0].tool_results[0].content == "raining"

        def failing(call: ToolCall) -> str:
            raise OSError(f"no {call.name}")

        server = ScriptedServer([tool_call("weather", city="Rome"), "ok"])
        result = await AtroposAgent(server, [weather], execute_tool=failing).run("Go.")
        assert result.tool_errors == 1
        assert "OSError: no weather" in server.requests[1].prompt

    async def test_initial_messages_and_system_prompts(self) -> None:
        it, server = agent(["a"] * 4)
        await it.run("Task.", [{"role": "user", "content": "Before."}, {"role": "assistant", "content": "Yes?"}])
        assert "Before." in server.requests[0].prompt
        assert it.system_prompt.splitlines()[0] in server.requests[0].prompt
        await it.run("Task.", [{"role": "system", "content": "Be brief."}])
        assert "Be brief." in server.requests[1].prompt
        assert it.system_prompt.splitlines()[0] not in server.requests[1].prompt
        await it.run("", [{"role": "user", "content": "Only this."}])
        assert server.requests[2].prompt.count("<|im_start|>user") == 1
        mine, server = agent(["a"], system_prompt="You are Zed.")
        result = await mine.run("Task.")
        assert result.messages[0] == {"role": "system", "content": "You are Zed."}

    async def test_runs_of_one_task_go_on_token_by_token(self) -> None:
        it, server = agent([tool_call("nothing"), tool_call("weather", city="Rome"), "first", "second"])
        async with it.task() as task:
            one = await task.run("One.")
            two = await task.run("Two.", initial_messages=one.messages)
        assert [step.step_number for step in two.steps] == [1, 2, 3]
        assert len(two.sequences) == 1
        assert two.to_messages()[: len(one.messages)] == one.to_messages(), "the retry is there once"
        check_tokens(two, server)

    async def test_the_messages_of_another_rollout_are_a_history_like_any_other(self) -> None:
        it, _ = agent([tool_call("nothing"), tool_call("weather", city="Rome"), "first"])
        one = await it.run("One.")
        other, _ = agent(["second"])
        two = await other.run("Two.", one.messages)
        assert two.to_messages()[: len(one.messages)] == one.to_messages()
        assert all(not key.startswith("atropos_") for message in two.to_messages() for key in message)


class TestEndings:
    async def test_the_step_limit_leaves_something_to_score(self) -> None:
        it, server = agent([tool_call("weather", city="Rome")] * 3, max_steps=3)
        result = await it.run("Loop.")
        assert (result.success, result.stop_reason) == (False, StopReason.ITERATION_LIMIT)
        assert result.error == "no answer within max_steps=3"
        assert len(server.requests) == 3
        assert result.trajectory_data is not None
        assert result.to_scored_data(0.0)["scores"] == [0.0]
        assert result.messages[-1]["role"] == "tool", "the last call was answered"
        check_tokens(result, server)

    async def test_a_server_that_fails_leaves_the_steps_before(self) -> None:
        failure = BackendResponseError("bad request", status=400, body="max_tokens is too large")
        it, server = agent([tool_call("weather", city="Rome"), Reply(error=failure)])
        result = await it.run("Go.")
        assert (result.success, result.stop_reason, result.num_steps) == (False, StopReason.SERVER_ERROR, 1)
        assert result.error is not None
        assert result.error.startswith("step 2: BackendResponseError:")
        assert "HTTP 400: max_tokens is too large" in result.error
        assert result.messages[-1]["content"] == "sunny in Rome"
        check_tokens(result, server)

    async def test_retries_run_out(self) -> None:
        it, server = agent([tool_call("nothing")] * 3, max_tool_call_retries=2)
        result = await it.run("Go.")
        assert (result.stop_reason, result.success) == (StopReason.TOOL_CALL_RETRIES, False)
        assert len(server.requests) == 3
        assert [call.status for call in result.steps[0].tool_calls] == [ParseStatus.UNKNOWN_TOOL] * 3
        assert sum(message["role"] == "assistant" for message in result.messages) == 3
        check_tokens(result, server)

    async def test_an_answer_that_was_cut_off(self) -> None:
        it, _ = agent([Reply("I think that", finish_reason="length")])
        result = await it.run("Go.")
        assert (result.stop_reason, result.final_response, result.success) == (
            StopReason.TRUNCATED,
            "I think that",
            False,
        )

    async def test_an_empty_answer(self) -> None:
        it, _ = agent([""])
        result = await it.run("Go.")
        assert (result.stop_reason, result.success) == (StopReason.EMPTY_RESPONSE, False)
        assert result.error == "the model's answer is empty"

    async def test_the_context_is_full(self) -> None:
        it, server = agent([tool_call("weather", city="R" * 2000)] * 9)
        it._backend.context_length = 4000  # type: ignore[attr-defined]
        result = await it.run("Go.")
        assert result.stop_reason in (StopReason.CONTEXT_LENGTH, StopReason.TOOL_CALL_RETRIES)
        assert result.num_steps >= 1
        check_tokens(result, server)

    async def test_a_turn_that_takes_too_long(self) -> None:
        it, server = agent([tool_call("weather", city="Rome"), Reply(hang=True)], turn_time_limit_s=0.2)
        result = await it.run("Go.")
        assert (result.stop_reason, result.num_steps) == (StopReason.TIMEOUT, 1)
        assert "turn_time_limit_s=0.2" in str(result.error)
        assert server.requests[1].cancelled
        with pytest.raises(BackendTimeoutError, match="turn_time_limit_s"):
            await agent([Reply(hang=True)], turn_time_limit_s=0.05)[0].run_single_turn(
                [{"role": "user", "content": "?"}]
            )

    async def test_a_rollout_that_takes_too_long(self) -> None:
        async def forever() -> None:
            await asyncio.Event().wait()

        it, server = agent([tool_call("forever")], [forever], rollout_time_limit_s=0.3)
        result = await it.run("Go.")
        assert (result.stop_reason, result.num_steps) == (StopReason.TIMEOUT, 1)
        assert result.error == "no answer within rollout_time_limit_s=0.3"
        check_tokens(result, server)

    async def test_a_tool_that_takes_too_long_is_answered(self) -> None:
        async def forever() -> None:
            await asyncio.Event().wait()

        it, server = agent([tool_call("forever"), "I gave up."], [forever], tool_time_limit_s=0.05)
        result = await it.run("Go.")
        assert (result.success, result.tool_errors) == (True, 1)
        assert "time limit of 0.05 seconds" in server.requests[1].prompt

    async def test_cancellation_keeps_what_there_is(self) -> None:
        asked = asyncio.Event()

        def script(messages: list[dict[str, str]]) -> str | Reply:
            if len(messages) < 4:
                return tool_call("weather", city="Rome")
            asked.set()
            return Reply(hang=True)

        it, server = agent(script)
        running = asyncio.create_task(it.run("Go."))
        await asked.wait()
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert it.last_result is not None
        assert (it.last_result.stop_reason, it.last_result.num_steps) == (StopReason.CANCELLED, 1)
        assert server.requests[1].cancelled
        check_tokens(it.last_result, server)

    async def test_an_error_of_the_library_itself_is_a_result_too(self) -> None:
        def surprise(messages: Any) -> str:
            raise ZeroDivisionError("script")

        it, _ = agent(surprise)
        result = await it.run("Go.")
        assert not result.success
        assert result.error is not None
        assert result.stop_reason in (StopReason.ERROR, StopReason.SERVER_ERROR)


class TestSingleTurn:
    async def test_text_results_and_sequence(self) -> None:
        it, server = agent([f"<think>\nI ask.\n</think>\n{tool_call('weather', city='Rome')}", "Sunny."])
        messages: list[dict[str, Any]] = [{"role": "user", "content": "Weather?"}]
        async with it.task() as task:
            text, results, sequence = await task.run_single_turn(messages)
            assert text == f"<think>\nI ask.\n</think>\n{tool_call('weather', city='Rome')}"
            assert [result.content for result in results] == ["sunny in Rome"]
            assert sequence is not None
            assert sequence.tokens == server.requests[0].prompt_ids + server.requests[0].output_ids[0]
            assert "<|im_start|>system" in server.requests[0].prompt, "the template's own place for tools"
            assert it.system_prompt.splitlines()[0] not in server.requests[0].prompt

    async def test_turns_of_one_task_go_on_token_by_token(self) -> None:
        same = f"<think>\nAgain.\n</think>\n{tool_call('weather', city='Rome')}"
        it, server = agent([same, same, "Sunny."])
        messages: list[dict[str, Any]] = [{"role": "user", "content": "Weather?"}]
        async with it.task() as task:
            for _ in range(3):
                text, results, sequence = await task.run_single_turn(messages)
                messages.append({"role": "assistant", "content": text})
                messages += [result.to_message() for result in results]
        for before, after in zip(server.requests, server.requests[1:], strict=False):
            so_far = before.prompt_ids + before.output_ids[0]
            assert after.prompt_ids[: len(so_far)] == so_far
        assert sequence is not None
        assert sequence.tokens == server.requests[-1].prompt_ids + server.requests[-1].output_ids[0]

    async def test_tools_may_be_left_alone(self) -> None:
        it, _ = agent([tool_call("broken")])
        text, results, sequence = await it.run_single_turn([{"role": "user", "content": "?"}], execute_tools=False)
        assert (text, results) == (tool_call("broken"), [])
        assert sequence is not None


class TestSystemPrompt:
    async def test_the_model_reads_the_tools_the_calls_schema_and_examples(self) -> None:
        it, server = agent(["ok"])
        await it.run("Go.")
        prompt = server.requests[0].prompt
        for definition in it.tools.definitions:
            assert prompt.count(json.dumps(definition["function"]["parameters"]["properties"])) == 1
        assert '"required": ["name", "arguments"]' in prompt
        assert "<think>" in it.system_prompt

    def test_its_examples_are_calls(self) -> None:
        it, _ = agent([])
        examples = it.system_prompt.partition("# Examples")[2]
        assert examples
        calls = ToolCall.parse_from_text(examples)
        assert len(calls) == 5
        assert all(call.ok for call in calls)

    def test_the_notes_are_those_of_the_tools_in_use(self) -> None:
        def terminal(command: str) -> str:
            """Another terminal."""
            return command

        assert "bash" not in agent([], [terminal])[0].system_prompt
        assert "bash" in agent([], HermesTools(["terminal"]))[0].system_prompt


class TestWithoutTokenIds:
    async def test_it_serves_evaluation_and_sft_and_refuses_training(self) -> None:
        server = DummyManagedServer(ScriptedServer([tool_call("nothing"), tool_call("weather", city="Rome"), "Sunny."]))
        result = await AtroposAgent(server, [weather]).run("Weather?")
        assert (result.success, result.final_response, result.tracked) == (True, "Sunny.", False)
        assert [call.status for call in result.steps[0].tool_calls] == [ParseStatus.UNKNOWN_TOOL, ParseStatus.OK]
        assert result.steps[0].tool_results[-1].content == "sunny in Rome"
        assert (result.sequences, result.trajectory_data, result.fidelity) == ([], None, None)
        assert result.to_messages()[-1] == {"role": "assistant", "content": "Sunny."}
        assert result.tools == AtroposAgent(server, [weather]).tools.definitions
        with pytest.raises(UntrackedError, match="without token ids"):
            result.to_scored_data(1.0)

    async def test_a_single_turn_has_no_sequence(self) -> None:
        server = DummyManagedServer(ScriptedServer(["Hi."]))
        text, results, sequence = await AtroposAgent(server).run_single_turn([{"role": "user", "content": "?"}])
        assert (text, results, sequence) == ("Hi.", [], None)


class TestHermesTools:
    async def test_the_verifier_sees_the_sandbox_and_then_it_is_gone(self, tmp_path: Path) -> None:
        it, _ = agent([tool_call("terminal", command="echo 42 > answer.txt"), "Written."], HermesTools(["terminal"]))
        async with it.task("t-1") as task:
            await task.write_file("given.txt", "given")
            result = await task.run("Write it.")
            assert await task.read_file("answer.txt") == "42\n"
            assert await task.read_bytes("given.txt") == b"given"
            check = await task.terminal("cat answer.txt; exit 3")
            assert (check.output.strip(), check.exit_code) == ("42", 3)
            workspace = task.sandbox.workspace
        assert not workspace.exists()
        assert (result.success, result.metadata["task_id"]) == (True, "t-1")
        assert result.steps[0].tool_results[0].exit_code == 0

    async def test_the_working_dir(self, tmp_path: Path) -> None:
        tools = HermesTools(["terminal"])
        it, _ = agent([tool_call("terminal", command="touch here"), "ok"], tools, working_dir=tmp_path)
        await it.run("Go.")
        assert (tmp_path / "here").exists()
        with pytest.raises(WorkspaceError):
            await agent([], tools, working_dir=tmp_path / "absent")[0].run("Go.")

    async def test_without_a_sandbox_there_is_nothing_to_verify_in(self) -> None:
        async with agent([])[0].task("t") as task:
            with pytest.raises(SandboxError, match="'t' has no sandbox"):
                await task.terminal("true")

    async def test_rollouts_at_once_do_not_meet(self) -> None:
        def script(messages: list[dict[str, str]]) -> str:
            name = next(m["content"] for m in messages if m["role"] == "user")
            steps = sum(m["role"] == "assistant" for m in messages)
            return [
                tool_call("terminal", command=f"export WHO={name}; echo {name} > mine.txt"),
                tool_call("terminal", command="ls; echo $WHO"),
                "done",
            ][steps]

        it, server = agent(script, HermesTools(["terminal"]))
        results = await asyncio.gather(*(it.run(f"name{n}") for n in range(12)))
        for n, result in enumerate(results):
            answer = json.loads(result.steps[1].tool_results[0].content)
            assert answer["output"].split() == ["mine.txt", f"name{n}"]
        assert sum(len(result.steps) for result in results) == len(server.requests) == 36

    async def test_rollouts_leave_no_garbage(self) -> None:
        server = ScriptedServer(lambda messages: "Done." if len(messages) > 2 else tool_call("terminal", command="ls"))
        small = AtroposAgent(server, tools=HermesTools(["terminal"]))

        assert await garbage(lambda: small.run("Go."), 50) < 50


class TestConstruction:
    def test_defaults(self) -> None:
        config = AgentConfig()
        assert (config.temperature, config.max_tokens, config.max_steps) == (1.0, None, 50)
        assert (config.system_prompt, config.tool_delay_s, config.working_dir) == (None, 0.0, None)

    async def test_sampling_parameters_reach_the_server(self) -> None:
        it, server = agent(["ok"], temperature=0.1, max_tokens=77, sampling={"top_p": 0.5})
        result = await it.run("Go.")
        sent = server.requests[0].sampling
        assert (sent["temperature"], sent["max_tokens"], sent["top_p"]) == (0.1, 77, 0.5)
        assert result.sampling == {"temperature": 0.1, "max_tokens": 77, "top_p": 0.5}

    @pytest.mark.parametrize(
        "bad",
        [
            *({"max_steps": 0}, {"max_tokens": -1}, {"tool_delay_s": -1}, {"turn_time_limit_s": 0}),
            *({"max_steps": "5"}, {"max_steps": None}, {"max_tokens": 1.5}, {"rollout_time_limit_s": "3"}),
            *({"tool_delay_s": None}, {"max_tool_call_retries": 1.5}, {"temperature": "hot"}, {"temperature": -1}),
        ],
    )
    def test_limits_have_to_make_sense(self, bad: dict[str, Any]) -> None:
        with pytest.raises(ConfigurationError, match=next(iter(bad))):
            AgentConfig(**bad)

    def test_what_cannot_work_says_so(self) -> None:
        with pytest.raises(NoServerError):
            AtroposAgent()
        with pytest.raises(ToolDefinitionError, match="no tools"):
            AtroposAgent(ScriptedServer([]), tools=ToolRegistry())

    async def test_a_record_of_a_rollout_reads_back(self, tmp_path: Path) -> None:
        it, _ = agent([tool_call("nothing"), tool_call("weather", city="Rom\u2028"), "ok 🙂"])
        result = await it.run("Go.")
        write_record(result, tmp_path / "r.jsonl")
        back = read_record(tmp_path / "r.jsonl")
        back.packages = {}
        assert back == result
        assert back.to_scored_data(1.0) == result.to_scored_data(1.0)
        assert back.messages[2][TURN_KEY] == result.messages[2][TURN_KEY]


TURNS = st.one_of(
    st.builds(
        lambda city: tool_call("weather", city=city), st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
    ),
    st.builds(
        lambda a, b: f"{a}{tool_call('weather', city='x')}\n{b}", st.text(max_size=8), st.just(tool_call("broken"))
    ),
    st.just(tool_call("nothing")),
    st.just("<tool_call>\n{broken\n</tool_call>"),
    st.builds(lambda t: f"<think>\n{t}\n</think>\n{tool_call('broken')}", st.text(max_size=8)),
)


@settings(max_examples=60, deadline=None)
@given(turns=st.lists(TURNS, max_size=5), last=st.text(min_size=1, max_size=20))
def test_every_sampled_token_is_trained_once_whatever_the_model_writes(turns: list[str], last: str) -> None:
    server = ScriptedServer([*turns, last])
    registry = ToolRegistry([weather, broken])
    result = asyncio.run(AtroposAgent(server, registry, AgentConfig(max_steps=len(turns) + 1)).run("Go."))
    assert len(server.requests) >= 1
    check_tokens(result, server)
    assert threading.active_count() < 600
