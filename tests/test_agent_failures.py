"""Whatever goes wrong in a rollout: nothing is left behind, and nothing of what it did is lost."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from support import (
    QUIET,
    agent_on,
    agent_saying,
    check_tokens,
    check_unbroken,
    nothing_left,
    processes,
    run_script,
    server_of,
    terminal,
    tool_texts,
    until,
)
from transformers import PreTrainedTokenizerFast

from hermes_atropos import AtroposAIAgent, StopReason
from hermes_atropos.errors import (
    BackendConnectionError,
    BackendError,
    BackendResponseError,
    BackendTimeoutError,
    ChatTemplateError,
    ConfigurationError,
    ContextLengthError,
    NoServerError,
    NoTokenizerError,
    SandboxError,
    TokenFidelityError,
    ToolCallRetriesError,
    UnknownToolsetError,
    UnsupportedServerError,
    UntrackedError,
    WorkspaceError,
)
from hermes_atropos.testing import Reply, ScriptedServer, chatml_tokenizer, tool_call

MALFORMED = '<tool_call>\n{"name": "terminal", "arguments": {"command": }\n</tool_call>'
FIRST = "<think>Hm.</think>I begin. " + terminal("echo begun; sleep 1000 >/dev/null 2>&1", background=True)


@pytest.fixture(autouse=True)
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@dataclass(frozen=True)
class Fault:
    """What goes wrong after a first turn that went well and left a process running, and what the rollout says of it."""

    replies: tuple[str | Reply, ...]
    reason: StopReason
    cause: type[BaseException] | None = None
    options: tuple[tuple[str, Any], ...] = ()


FAULTS = {
    "the server raises": Fault((Reply(error=RuntimeError("out of memory")),), StopReason.SERVER_ERROR, BackendError),
    "the server refuses": Fault(
        (Reply(error=BackendResponseError("no such model", status=404, body="gone")),),
        StopReason.SERVER_ERROR,
        BackendResponseError,
    ),
    "the server never answers": Fault((Reply(hang=True),), StopReason.TIMEOUT, BackendTimeoutError),
    "malformed calls": Fault((MALFORMED,) * 4, StopReason.TOOL_CALL_RETRIES, ToolCallRetriesError),
    "the iteration limit": Fault(
        (terminal("echo 1"), "A summary."), StopReason.ITERATION_LIMIT, options=(("max_iterations", 2),)
    ),
    "a server that raises at the summary": Fault(
        (terminal("echo 1"), *[Reply(error=RuntimeError("out of memory"))] * 4),
        StopReason.SERVER_ERROR,
        BackendError,
        options=(("max_iterations", 2),),
    ),
    "nothing is said": Fault(("",) * 9, StopReason.EMPTY_RESPONSE),
    "every answer is cut off": Fault((Reply("and", finish_reason="length"),) * 9, StopReason.TRUNCATED),
}


@pytest.mark.parametrize("saving", [False, True])
@pytest.mark.parametrize("name", FAULTS)
async def test_fault(name: str, saving: bool, workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fault = FAULTS[name]
    if fault.reason is StopReason.TIMEOUT:
        monkeypatch.setenv("ATROPOS_AGENT_CHAT_TIMEOUT_S", "0.5")
    server = ScriptedServer([FIRST, *fault.replies])
    agent = agent_on(server, save_trajectories=saving, **dict(fault.options))
    with nothing_left():
        async with agent.task() as task:
            result = await task.run("Go.")
            until(lambda: any("sleep 1000" in command for command in processes().values()))  # the verifier's to see

    assert result["stop_reason"] is fault.reason
    trajectory = result["trajectory"]
    assert not trajectory.success
    assert trajectory.stop_reason is fault.reason
    if fault.cause:
        assert type(result["cause"]) is fault.cause
        assert (result["failed"], result["completed"]) == (True, False)
        assert str(result["cause"]) in result["error"]
        assert result["error"] == trajectory.error
        if result["final_response"]:  # what chat() returns
            assert str(result["cause"]) in result["final_response"]
        assert trajectory.final_response == "", "the model came to no answer, and no one else's words are its own"
    roles = [message["role"] for message in result["messages"]]
    assert roles[:3] == ["user", "assistant", "tool"]
    assert json.loads(tool_texts(result["messages"])[0])["exit_code"] == 0
    assert [message["role"] for message in trajectory.messages][:2] == ["system", "user"]
    assert trajectory.steps[0].tool_results
    check_tokens(trajectory, server.requests)
    check_unbroken([request for request in server.requests if request.output_ids][:2])
    assert trajectory.to_scored_data(score=0.0)["tokens"]

    files = sorted(path.name for path in workspace.glob("*.jsonl"))  # noqa: ASYNC240
    if not saving:
        assert files == []
    else:
        [name] = files
        [line] = (workspace / name).read_text().splitlines()
        entry = json.loads(line)
        turns = [turn["from"] for turn in entry["conversations"]]
        assert turns[:4] == ["system", "human", "gpt", "tool"]
        assert "I begin." in entry["conversations"][2]["value"]
        if fault.cause:
            assert (name, entry["completed"]) == ("failed_trajectories.jsonl", False)


@pytest.mark.parametrize("name", FAULTS)
def test_fault_of_a_synchronous_run(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fault = FAULTS[name]
    if fault.reason is StopReason.TIMEOUT:
        monkeypatch.setenv("ATROPOS_AGENT_CHAT_TIMEOUT_S", "0.5")
    server = ScriptedServer([FIRST, *fault.replies])
    with nothing_left():
        result = agent_on(server, **dict(fault.options)).run_conversation("Go.", task_id="mine")
    assert result["stop_reason"] is fault.reason
    check_tokens(result["trajectory"], server.requests)


class TestModel:
    async def test_nothing_was_ever_answered(self) -> None:
        agent = agent_saying(Reply(error=RuntimeError("out of memory")))
        with nothing_left():
            async with agent.task() as task:
                result = await task.run("Go.")
        assert [message["role"] for message in result["trajectory"].messages] == ["system", "user"]
        assert result["trajectory"].sequences == []
        assert "out of memory" in result["error"]
        assert result["trajectory"].final_response == ""
        with pytest.raises(UntrackedError, match="nothing was sampled"):
            result["trajectory"].to_scored_data(score=0.0)

    async def test_a_passing_fault_is_passed_over(self) -> None:
        agent = agent_saying(Reply(error=ConnectionResetError("try again")), terminal("echo 1"), "Done.")
        async with agent.task() as task:
            result = await task.run("Go.")
        assert result["stop_reason"] is StopReason.COMPLETED
        assert "error" not in result
        assert "cause" not in result
        check_tokens(result["trajectory"], server_of(agent).requests)

    async def test_a_request_that_runs_out_of_time_is_given_up(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("ATROPOS_AGENT_CHAT_TIMEOUT_S", "0.3")
        agent = agent_saying(Reply(hang=True))
        result = await agent.run_conversation_async("Go.")
        assert "ATROPOS_AGENT_CHAT_TIMEOUT_S=0.3" in result["error"]
        assert server_of(agent).requests[0].cancelled

    async def test_a_prompt_too_long_for_the_model(self) -> None:
        server = ScriptedServer([terminal("seq 3000"), "Never said."])
        server.context_length = 11_000  # type: ignore[attr-defined]
        async with agent_on(server).task() as task:
            result = await task.run("Go.")
        assert result["stop_reason"] is StopReason.CONTEXT_LENGTH
        assert isinstance(result["cause"], ContextLengthError)
        assert len(tool_texts(result["messages"])) == 1
        check_tokens(result["trajectory"], server.requests)

    @pytest.mark.parametrize("fault", ["a logprob is missing", "a logprob is positive", "another prompt is echoed"])
    async def test_tokens_that_do_not_fit_are_kept_and_not_trained(self, fault: str) -> None:
        class Faulty(ScriptedServer):
            async def _tokens_and_logprobs_completion_wrapper(self, **kwargs: Any) -> Any:
                echo, outputs, logprobs, reasons = await super()._tokens_and_logprobs_completion_wrapper(**kwargs)
                if len(self.requests) == 2:
                    match fault:
                        case "a logprob is missing":
                            logprobs[0].pop()
                        case "a logprob is positive":
                            logprobs[0][1] = 0.5
                        case _:
                            echo[3] += 1
                return echo, outputs, logprobs, reasons

        async with agent_on(Faulty([terminal("echo 1"), terminal("echo 2"), "Done."])).task() as task:
            result = await task.run("Go.")
        assert isinstance(result["cause"], TokenFidelityError)
        assert result["stop_reason"] is StopReason.ERROR
        assert result["trajectory"].fidelity.mismatches == 1
        assert [message["role"] for message in result["messages"]] == ["user", "assistant", "tool"]
        with pytest.raises(UntrackedError, match="must not be trained on"):
            result["trajectory"].to_scored_data(score=1.0)

    async def test_a_rollout_that_fails_leaves_the_others_alone(self) -> None:
        def model(messages: list[dict[str, str]]) -> str | Reply:
            if "<tool_response>" not in messages[-1]["content"]:
                return terminal("echo 1")
            return Reply(error=RuntimeError("broken")) if "odd" in messages[1]["content"] else "Done."

        agent = agent_on(ScriptedServer(model))
        with nothing_left():
            results = await asyncio.gather(
                *(agent.run_conversation_async("odd" if number % 2 else "even") for number in range(8))
            )
        assert [r["stop_reason"] for r in results] == [StopReason.COMPLETED, StopReason.SERVER_ERROR] * 4

    async def test_a_child_whose_server_call_fails(self) -> None:
        def model(messages: list[dict[str, str]]) -> str | Reply:
            if not any("Delegate" in message["content"] for message in messages):
                return Reply(error=RuntimeError("broken"))
            return "Done." if len(messages) > 3 else tool_call("delegate_task", goal="Anything.")

        server = ScriptedServer(model)
        with nothing_left():
            async with agent_on(server, enabled_toolsets=["delegation", "terminal"]).task() as task:
                result = await task.run("Delegate.")
        assert result["stop_reason"] is StopReason.COMPLETED
        assert "BackendError" in tool_texts(result["messages"])[0]
        check_tokens(result["trajectory"], server.requests)


class TestTools:
    @pytest.mark.parametrize(
        "command",
        [
            "sleep 1000",
            "trap '' TERM INT HUP; while true; do sleep 1; done",
            "bash -c 'sleep 1000 & setsid sleep 1000 & sleep 1000'",
            "yes",
        ],
    )
    async def test_a_command_that_hangs(self, command: str) -> None:
        agent = agent_saying(terminal(command, timeout=1), terminal("echo on"), "Done.")
        with nothing_left():
            async with agent.task() as task:
                result = await task.run("Go.")
        hung, on = map(json.loads, tool_texts(result["messages"]))
        assert hung["exit_code"] == 124
        assert on["output"] == "on"
        assert result["stop_reason"] is StopReason.COMPLETED
        check_tokens(result["trajectory"], server_of(agent).requests)

    async def test_processes_in_the_background_end_with_the_task(self) -> None:
        agent = agent_saying(
            terminal("sleep 1000", background=True),
            terminal("bash -c 'nohup setsid sleep 1000 >/dev/null 2>&1 &'"),
            terminal("env -i setsid --fork sleep 1000 >/dev/null 2>&1"),
            "Done.",
        )
        with nothing_left():
            async with agent.task() as task:
                result = await task.run("Go.")
                assert [json.loads(text)["exit_code"] for text in tool_texts(result["messages"])] == [0, 0, 0]
                assert sum("sleep 1000" in command for command in processes().values()) >= 2

    async def test_a_shell_that_was_left(self) -> None:
        agent = agent_saying(terminal("exit 7"), terminal("echo still here"), terminal("kill -9 $$"), "Done.")
        with nothing_left():
            async with agent.task() as task:
                result = await task.run("Go.")
        answers = list(map(json.loads, tool_texts(result["messages"])))
        assert answers[0]["exit_code"] == 7
        assert answers[1]["output"] == "still here"
        assert answers[2]["exit_code"] != 0
        assert result["stop_reason"] is StopReason.COMPLETED

    async def test_a_workspace_that_was_made_unwritable_or_removed(self) -> None:
        agent = agent_saying(
            terminal("mkdir -p a/b && chmod 0 a/b a"), terminal("rm -rf $PWD"), terminal("pwd"), "Done."
        )
        with nothing_left():
            async with agent.task() as task:
                await task.run("Go.")

    async def test_a_tool_that_raises(self) -> None:
        agent = agent_saying(
            tool_call("read_file", path="\0"), tool_call("write_file", path="/proc/x/y", content=""), "Done."
        )
        async with agent.task() as task:
            result = await task.run("Go.")
        assert result["stop_reason"] is StopReason.COMPLETED
        assert [step.tool_errors for step in result["trajectory"].steps] == [1, 1, 0]


class TestCancellationAnywhere:
    """A rollout is cancelled at its n-th sign of life: a question to the model, its answer, a tool's start or end."""

    @pytest.mark.parametrize("moment", range(10))
    async def test_at_every_moment(self, moment: int) -> None:
        loop = asyncio.get_running_loop()
        signs = 0

        def sign(*_: Any) -> None:
            nonlocal signs
            if signs == moment:
                loop.call_soon_threadsafe(run.cancel)
            signs += 1

        async def model(messages: list[dict[str, str]]) -> str:
            for _ in ("asked", "about to answer"):
                sign()
                if signs > moment:
                    await asyncio.Event().wait()  # only the cancellation ends it
            return terminal("sleep 1000", background=True) if len(messages) < 6 else terminal("sleep 1000")

        agent = agent_on(ScriptedServer(model), tool_start_callback=sign, tool_complete_callback=sign)

        tasks: list[Any] = []

        async def rollout() -> None:
            async with agent.task() as task:
                tasks.append(task)
                await task.run("Go.")

        with nothing_left():
            run = asyncio.create_task(rollout())
            with pytest.raises(asyncio.CancelledError):
                await run
        result = tasks[0].last_result
        assert result["stop_reason"] is StopReason.CANCELLED
        check_tokens(result["trajectory"], server_of(agent).requests)

    async def test_at_random_moments(self) -> None:
        """By the clock, many at once; what the moment hits is different each time."""
        rng = random.Random()
        agent = agent_on(ScriptedServer(lambda m: terminal("echo 1") if len(m) < 12 else "Done.", latency=0.01))

        async def rollout() -> None:
            async with agent.task() as task:
                await task.run("Go.")

        async def cancelled() -> None:
            run = asyncio.create_task(rollout())
            asyncio.get_running_loop().call_later(rng.random() * 1.5, run.cancel)
            await asyncio.wait([run])

        with nothing_left():
            await asyncio.gather(*(cancelled() for _ in range(24)))
        async with agent.task() as task:
            assert (await task.run("Go."))["stop_reason"] is StopReason.COMPLETED


class TestInterruptAnywhere:
    @pytest.mark.parametrize("moment", range(8))
    async def test_at_every_moment(self, moment: int) -> None:
        signs = 0

        def sign(*_: Any) -> None:
            nonlocal signs
            if signs == moment:
                agent.interrupt()
            signs += 1

        async def model(messages: list[dict[str, str]]) -> str:
            sign()
            if signs > moment:
                await asyncio.Event().wait()  # only the interrupt ends it
            return terminal("sleep 1000", background=True) if len(messages) < 6 else terminal("sleep 1000")

        agent = agent_on(ScriptedServer(model), tool_start_callback=sign, tool_complete_callback=sign)
        with nothing_left():
            async with agent.task() as task:
                result = await task.run("Go.")
        assert result["stop_reason"] is StopReason.INTERRUPTED
        assert not result["trajectory"].success
        check_tokens(result["trajectory"], server_of(agent).requests)


class TestBadInput:
    """Each is a typed error, raised before any model call, whose message says what to do."""

    @staticmethod
    def refused(kind: type[ConfigurationError], *words: str, **options: Any) -> None:
        with pytest.raises(kind) as caught:
            AtroposAIAgent(**{"enabled_toolsets": ["terminal"], **QUIET, **options})
        assert isinstance(caught.value, ConfigurationError)
        for word in words:
            assert word in str(caught.value)

    def test_no_server(self) -> None:
        self.refused(NoServerError, "server=", "base_url=")

    def test_a_url_at_which_nobody_answers(self) -> None:
        self.refused(ConfigurationError, "127.0.0.1:9", base_url="http://127.0.0.1:9/v1")

    @pytest.mark.parametrize("server", [object(), "http://localhost:8000", {"base_url": "x"}])
    def test_an_unsupported_server(self, server: Any) -> None:
        self.refused(UnsupportedServerError, type(server).__name__, "ServerManager", "APIServer", server=server)

    def test_no_tokenizer_where_one_is_needed(self) -> None:
        server = ScriptedServer([], model_name="default")
        server.tokenizer = None
        self.refused(NoTokenizerError, "tokenizer=", server=server)

    def test_a_tokenizer_that_cannot_be_loaded(self, tmp_path: Path) -> None:
        self.refused(NoTokenizerError, "tokenizer=", server=ScriptedServer([]), tokenizer=str(tmp_path / "none"))

    def test_a_tokenizer_without_a_chat_template(self) -> None:
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=chatml_tokenizer()._tokenizer, eos_token="<|im_end|>")
        self.refused(ChatTemplateError, "chat_template", server=ScriptedServer([]), tokenizer=tokenizer)

    def test_a_chat_template_that_cannot_be_read(self) -> None:
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=chatml_tokenizer()._tokenizer, eos_token="<|im_end|>")
        tokenizer.chat_template = "{% for message in %}"
        self.refused(ChatTemplateError, server=ScriptedServer([]), tokenizer=tokenizer)

    def test_an_unknown_tool_format(self) -> None:
        self.refused(ConfigurationError, "hermes", "qwen3_coder", server=ScriptedServer([]), tool_format="yaml")

    @pytest.mark.parametrize("argument", ["enabled_toolsets", "disabled_toolsets"])
    def test_an_unknown_toolset(self, argument: str) -> None:
        self.refused(
            UnknownToolsetError, "'terminl'", "'terminal'", server=ScriptedServer([]), **{argument: ["terminl"]}
        )

    def test_toolsets_that_are_no_list(self) -> None:
        self.refused(UnknownToolsetError, "['terminal']", server=ScriptedServer([]), enabled_toolsets="terminal")

    @pytest.mark.parametrize("count", [-1, "3", 1.5])
    def test_retries_that_cannot_be_counted(self, count: Any) -> None:
        self.refused(ConfigurationError, repr(count), server=ScriptedServer([]), max_tool_call_retries=count)

    def test_a_malformed_setting(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("ATROPOS_AGENT_CHAT_TIMEOUT_S", "soon")
        self.refused(ConfigurationError, "ATROPOS_AGENT_CHAT_TIMEOUT_S", "soon", server=ScriptedServer([]))

    @pytest.mark.parametrize("make", [Path.touch, lambda path: None], ids=["a file", "missing"])
    async def test_a_workspace_that_is_no_folder(self, make: Callable[[Path], None], tmp_path: Path) -> None:
        make(tmp_path / "place")
        with nothing_left(), pytest.raises(WorkspaceError, match="give a folder that exists"):
            async with agent_saying().task(workspace=tmp_path / "place"):
                pass

    async def test_one_workspace_for_two_tasks(self, tmp_path: Path) -> None:
        agent = agent_saying()
        async with agent.task("first", workspace=tmp_path):
            with pytest.raises(WorkspaceError, match=r"'first'.*copy=True"):
                async with agent.task(workspace=tmp_path / "." / ""):
                    pass
        async with agent.task(workspace=tmp_path):
            pass

    async def test_one_task_id_for_two_tasks(self) -> None:
        agent = agent_saying()
        with nothing_left():
            async with agent.task("mine"):
                with pytest.raises(SandboxError, match=r"'mine'.*choose another id"):
                    async with agent.task("mine"):
                        pass
            async with agent.task("mine"):
                pass

    async def test_a_task_after_its_end(self) -> None:
        async with agent_saying("Done.").task() as task:
            pass
        with pytest.raises(SandboxError, match="released"):
            await task.terminal("true")
        with pytest.raises(SandboxError, match="released"):
            await task.run("Go.")

    def test_a_server_at_whose_url_nobody_answers_later_on(self) -> None:
        """It was there when the agent was made, and refuses the call: the rollout says so."""
        agent = agent_saying(Reply(error=BackendConnectionError("nobody there", url="http://x")), max_iterations=2)
        agent._backend._calls.pool.patience_s = 0.1
        result = agent.run_conversation("Go.")
        assert result["stop_reason"] is StopReason.SERVER_ERROR


def test_after_every_fault_the_agent_works_on() -> None:
    """One agent object through it all."""
    faults = [reply for fault in FAULTS.values() for reply in fault.replies if isinstance(reply, Reply) and reply.error]
    agent = agent_saying(*(reply for fault in faults for reply in (fault, terminal("echo on"), "Done.")))
    for _ in faults:
        assert agent.run_conversation("Go.")["stop_reason"] is StopReason.SERVER_ERROR
        assert agent.run_conversation("Go.")["stop_reason"] is StopReason.COMPLETED
    until(lambda: not processes())


def test_the_soak(workspace: Path) -> None:
    """``benchmarks/soak.py`` in short: many at once, and the same after every fault."""
    script = Path(__file__).parents[1] / "benchmarks" / "soak.py"
    done = run_script(
        f"import runpy, sys; sys.argv = ['', '--short']; runpy.run_path({str(script)!r}, run_name='__main__')",
        workspace,
    )
    figures = json.loads(done.stdout.splitlines()[-1])
    assert (figures["rollouts"], figures["wrong"], figures["left"]) == (24, 0, 0)
    assert len(figures["faults"]) == 8
