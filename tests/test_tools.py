# ruff: noqa: ASYNC240
"""Tools: described by their signatures, run off the event loop, never raising into the rollout."""

from __future__ import annotations

import asyncio
import json
import os
import threading
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import pytest
from pydantic import AfterValidator, BaseModel, Field, field_validator
from support import hermes_name

from hermes_atropos.errors import SandboxError, ToolDefinitionError, UnknownToolsetError, WorkspaceError
from hermes_atropos.hermes.tools import HermesTools
from hermes_atropos.toolcalls import ToolCall
from hermes_atropos.tools import ToolRegistry
from hermes_atropos.trajectory import ToolResult


def even(value: int) -> int:
    if value % 2:
        raise ValueError("must be even")
    return value


class Point(BaseModel):
    x: int
    y: int


def call(name: str, /, **arguments: Any) -> ToolCall:
    return ToolCall(name=name, arguments=arguments)


class TestDescription:
    def test_a_function_becomes_a_tool(self) -> None:
        registry = ToolRegistry()

        @registry.register
        def search(query: str, limit: int = 5, kind: Literal["web", "code"] = "web") -> list[str]:
            """Search an index.

            The best hits come first.

            Args:
                query: what to look for,
                    in plain words
                limit (int): at most so many hits

            Returns:
                the hits
            """
            return [query] * limit

        assert search("a", 1) == ["a"], "the function stays what it was"
        assert registry.definitions == [
            {
                "type": "function",
                "function": {
                    "name": "search",
                    "description": "Search an index.\n\nThe best hits come first.",
                    "parameters": {
                        "type": "object",
                        "properties": {
                            "query": {"type": "string", "description": "what to look for, in plain words"},
                            "limit": {"type": "integer", "default": 5, "description": "at most so many hits"},
                            "kind": {"type": "string", "enum": ["web", "code"], "default": "web"},
                        },
                        "required": ["query"],
                        "additionalProperties": False,
                    },
                },
            }
        ]

    def test_sphinx_docstrings_and_annotations(self) -> None:
        registry = ToolRegistry()

        @registry.register(name="go", description="Walk.")
        def walk(to: Point, *, speed: Annotated[float, Field(gt=0, description="m/s")] = 1.0) -> None:
            """Move.

            :param to: where to
            :param float speed: in metres a second
            """

        function = registry.definitions[0]["function"]
        assert (function["name"], function["description"]) == ("go", "Walk.")
        assert function["parameters"]["properties"]["to"]["description"] == "where to"
        speed = {"type": "number", "default": 1.0, "exclusiveMinimum": 0, "description": "in metres a second"}
        assert function["parameters"]["properties"]["speed"] == speed
        assert function["parameters"]["$defs"]["Point"]["required"] == ["x", "y"]

    def test_no_parameters(self) -> None:
        registry = ToolRegistry()

        @registry.register
        def now() -> str:
            return "noon"

        assert registry.definitions[0]["function"]["parameters"]["properties"] == {}

    def test_an_object_becomes_a_tool(self) -> None:
        class Add:
            name = "add"
            description = "Add two numbers."
            parameters: dict[str, Any] = {"type": "object", "properties": {"a": {}, "b": {}}}  # noqa: RUF012

            async def execute(self, a: int, b: int) -> int:
                return a + b

        assert ToolRegistry([Add()]).definitions == ToolRegistry([Add]).definitions
        assert ToolRegistry([Add]).definitions[0]["function"]["parameters"] == Add.parameters

    def test_prompt_definitions_are_json_lines(self) -> None:
        def one(text: str) -> str:
            """Über."""
            return text

        def two() -> None:
            """Zwei."""

        registry = ToolRegistry([one, two])
        assert [
            json.loads(line) for line in registry.get_prompt_tool_definitions_json().splitlines()
        ] == registry.definitions
        assert "Über" in registry.get_prompt_tool_definitions_json()
        assert (list(registry), len(registry), "one" in registry, "three" in registry) == (
            ["one", "two"],
            2,
            True,
            False,
        )

    def test_what_cannot_be_described_says_what_to_do(self) -> None:
        registry = ToolRegistry()

        def error_of(tool: Any, **options: Any) -> str:
            with pytest.raises(ToolDefinitionError) as caught:
                registry.register(tool, **options)
            return str(caught.value)

        def without_hints(query) -> None:  # type: ignore[no-untyped-def]
            pass

        def star(*paths: str) -> None:
            pass

        def opaque(lock: threading.Lock) -> None:
            pass

        def twice() -> None:
            pass

        class NoSchema:
            name = "x"

            def execute(self) -> None:
                pass

        registry.register(twice)
        assert "'query'" in error_of(without_hints)
        assert "no type hint" in error_of(without_hints)
        assert "*paths" in error_of(star)
        assert "no JSON schema" in error_of(opaque)
        assert "'twice' already" in error_of(twice)
        assert "cannot name a tool" in error_of(lambda: None)
        assert "cannot name a tool" in error_of(twice, name="two words")
        assert "needs parameters" in error_of(NoSchema())
        assert "is not a tool" in error_of(7)
        assert list(registry) == ["twice"]


class TestExecution:
    async def test_arguments_are_validated_and_converted(self) -> None:
        registry = ToolRegistry()

        @registry.register
        def move(to: Point, copy: bool = False) -> str:
            return f"{type(to).__name__} {to.x + to.y} {copy}"

        good = await registry.execute(call("move", to={"x": 1, "y": 2}))
        assert (good.content, good.success) == ("Point 3 False", True)
        bad = await registry.execute(call("move", to={"x": 1}))
        assert not bad.success
        assert "the arguments do not fit: to.y: Field required" in bad.content
        extra = await registry.execute(call("move", to={"x": 1, "y": 2}, speed=3))
        assert "speed" in extra.content

    async def test_what_the_schema_cannot_say_is_checked_too(self) -> None:
        registry = ToolRegistry()

        @registry.register
        def half(value: Annotated[int, AfterValidator(even)]) -> int:
            return value // 2

        assert (await registry.execute(call("half", value=4))).content == "2"
        odd = await registry.execute(call("half", value=3))
        assert not odd.success
        assert "value: Value error, must be even" in odd.content

    async def test_an_objects_arguments_are_checked_against_its_schema(self) -> None:
        class Add:
            """Add two numbers."""

            name = "add"
            parameters: dict[str, Any] = {  # noqa: RUF012
                "type": "object",
                "properties": {"a": {"type": "integer"}},
                "required": ["a"],
            }

            def execute(self, a: int) -> int:
                return a + 1

        registry = ToolRegistry([Add])
        assert (await registry.execute(call("add", a=1))).content == "2"
        bad = await registry.execute(call("add", a="x"))
        assert not bad.success
        assert "a: 'x' is not of type 'integer'" in bad.content

    async def test_unknown_tools_are_answered(self) -> None:
        def search() -> None:
            pass

        result = await ToolRegistry([search]).execute(call("serch"))
        assert not result.success
        assert "search" in result.content

    @pytest.mark.parametrize(
        ("value", "content"),
        [("text", "text"), (None, "null"), ({"ü": [1, 2.5]}, '{"ü":[1,2.5]}'), (Point(x=1, y=2), '{"x":1,"y":2}')],
    )
    async def test_values_become_text(self, value: Any, content: str) -> None:
        async def tool() -> Any:
            return value

        assert (await ToolRegistry([tool]).execute(call("tool"))).content == content

    async def test_a_tool_may_answer_with_a_result(self) -> None:
        async def tool() -> ToolResult:
            return ToolResult("other", "failed softly", success=False, error="why", exit_code=3)

        asked = call("tool")
        result = await ToolRegistry([tool]).execute(asked)
        assert (result.name, result.success, result.exit_code, result.call_id) == ("tool", False, 3, asked.id)

    async def test_a_tool_that_raises_answers_and_is_counted(self) -> None:
        async def tool() -> None:
            raise LookupError("no such row")

        result = await ToolRegistry([tool]).execute(call("tool"))
        assert (result.success, result.error) == (False, "LookupError: no such row")
        assert json.loads(result.content) == {"error": "LookupError: no such row"}
        assert result.duration_s is not None

    @pytest.mark.parametrize("error", [StopIteration(), SystemExit(3)])
    async def test_what_ends_more_than_a_tool_elsewhere_ends_the_tool_alone(self, error: BaseException) -> None:
        def tool() -> None:
            raise error

        result = await ToolRegistry([tool]).execute(call("tool"))
        assert not result.success
        assert type(error).__name__ in str(result.error)

    async def test_text_that_no_tokenizer_takes(self, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level("CRITICAL", logger="hermes_atropos.tools")  # no stream takes it either

        def names() -> str:
            return "a\udce9.txt"

        def fails() -> str:
            raise ValueError("a\udce9.txt")

        registry = ToolRegistry([names, fails])
        assert (await registry.execute(call("names"))).content == "a\ufffd.txt"
        assert "a\ufffd.txt" in (await registry.execute(call("fails"))).content

    async def test_a_long_result_is_kept_whatever_the_server_calls_the_call(self) -> None:
        def flood() -> str:
            return "x" * 1000

        registry = ToolRegistry([flood], max_result_chars=100)
        async with registry.task() as task:
            for call_id in ("../../escaped", "a/b", "x" * 300):
                asked = ToolCall(id=call_id, name="flood")
                result = await registry.execute(asked, task_id=task.task_id)
                assert result.overflow is not None
                assert Path(result.overflow).read_text() == "x" * 1000
                assert Path(result.overflow).parent.name.startswith("hermes-atropos-results-")

    async def test_a_parameter_may_be_a_pydantic_field(self) -> None:
        def tool(x: int = Field(3, ge=1, description="how many")) -> int:
            """Count."""
            return x

        registry = ToolRegistry([tool])
        [definition] = registry.definitions
        shown = definition["function"]["parameters"]["properties"]["x"]
        assert shown == {"type": "integer", "default": 3, "minimum": 1, "description": "how many"}
        assert (await registry.execute(call("tool"))).content == "3"
        assert "greater than or equal to 1" in str((await registry.execute(call("tool", x=-5))).error)

    async def test_a_pydantic_model_checks_the_arguments_of_an_object(self) -> None:
        class Arguments(BaseModel):
            x: int
            unit: str = "m"

            @field_validator("x")
            @classmethod
            def above_zero(cls, value: int) -> int:
                if value <= 0:
                    raise ValueError("x is to be above 0")
                return value

        class Measure:
            name, description, parameters = "measure", "Measure.", Arguments

            def execute(self, x: int, unit: str) -> str:
                return f"{x} {unit}"

        registry = ToolRegistry([Measure()])
        assert (await registry.execute(call("measure", x=2))).content == "2 m"
        assert "x is to be above 0" in str((await registry.execute(call("measure", x=-1))).error)

    def test_tools_come_in_a_list(self) -> None:
        with pytest.raises(ToolDefinitionError, match=r"write \[print\]"):
            ToolRegistry(cast(Any, print))

    async def test_a_tools_own_timeout_is_not_ours(self) -> None:
        async def tool() -> None:
            raise TimeoutError("upstream took too long")

        result = await ToolRegistry([tool], time_limit_s=60).execute(call("tool"))
        assert result.error == "TimeoutError: upstream took too long"

    async def test_time_limits(self) -> None:
        released = threading.Event()
        registry = ToolRegistry(time_limit_s=0.05)

        @registry.register
        async def never() -> None:
            await asyncio.Event().wait()

        @registry.register
        def stuck() -> None:
            released.wait()

        @registry.register(time_limit_s=60)
        async def patient() -> str:
            await asyncio.sleep(0.06)
            return "done"

        results = await registry.execute_all([call("never"), call("stuck"), call("patient")])
        released.set()
        assert [result.success for result in results] == [False, False, True]
        assert "time limit of 0.05 seconds" in str(results[0].error)

    async def test_cancellation_is_no_answer(self) -> None:
        started = asyncio.Event()

        async def tool() -> None:
            started.set()
            await asyncio.Event().wait()

        running = asyncio.create_task(ToolRegistry([tool]).execute(call("tool")))
        await started.wait()
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running

    async def test_synchronous_tools_run_off_the_event_loop(self) -> None:
        def where() -> bool:
            return threading.current_thread() is threading.main_thread()

        assert (await ToolRegistry([where]).execute(call("where"))).content == "false"

    async def test_calls_of_a_turn_run_side_by_side_and_answer_in_order(self) -> None:
        meeting = threading.Barrier(3)

        def meet(name: str) -> str:
            meeting.wait(timeout=30)
            return name

        calls = [call("meet", name=name) for name in "abc"]
        results = await ToolRegistry([meet]).execute_all(calls)
        assert [result.content for result in results] == ["a", "b", "c"]
        assert [result.call_id for result in results] == [each.id for each in calls]

    async def test_tools_that_change_things_run_alone_and_in_their_turn(self) -> None:
        log: list[str] = []
        registry = ToolRegistry()

        @registry.register
        async def look(name: str) -> None:
            log.append(f"{name} starts")
            await asyncio.sleep(0)
            log.append(f"{name} ends")

        registry.register(look, name="change", parallel=False)
        await registry.execute_all(
            [call(tool, name=str(n)) for n, tool in enumerate(["look", "look", "change", "change", "look"])]
        )
        assert sorted(log[:2]) == ["0 starts", "1 starts"]
        assert log[4:] == ["2 starts", "2 ends", "3 starts", "3 ends", "4 starts", "4 ends"]

    async def test_the_tasks_id_is_handed_on_and_hidden(self) -> None:
        def whose(task_id: str) -> str:
            return task_id

        registry = ToolRegistry([whose])
        assert registry.definitions[0]["function"]["parameters"]["properties"] == {}
        async with registry.task("t-1") as task:
            assert (await registry.execute(call("whose"), task_id=task.task_id)).content == "t-1"

    async def test_long_results_are_cut_and_kept(self) -> None:
        async def flood() -> str:
            return "start" + "x" * 1000 + "end"

        registry = ToolRegistry([flood], max_result_chars=100)
        async with registry.task() as task:
            result = await registry.execute(call("flood"), task_id=task.task_id)
            assert result.content.startswith("startx")
            assert result.content.endswith("xend")
            assert "908 of 1,008 characters are left out" in result.content
            assert result.overflow is not None
            assert result.overflow in result.content
            assert Path(result.overflow).read_text() == "start" + "x" * 1000 + "end"
        assert not os.path.exists(result.overflow), "released with its task"
        assert (await registry.execute(call("flood"))).overflow, "also without a task"

    async def test_one_task_of_a_name(self) -> None:
        registry = ToolRegistry()
        async with registry.task("t"):
            with pytest.raises(SandboxError, match="'t' is open already"):
                async with registry.task("t"):
                    pass
        async with registry.task("t"):
            pass


@pytest.fixture(scope="module")
def hermes() -> HermesTools:
    return HermesTools(["terminal", "file", "todo"])


class TestHermesTools:
    def test_the_tools_of_the_toolsets(self, hermes: HermesTools) -> None:
        assert set(hermes) == {
            *("terminal", "read_file", "write_file", "patch", "search_files"),
            *(hermes_name("process"), hermes_name("todo")),
        }

    async def test_each_task_has_its_own_sandbox(self, hermes: HermesTools, tmp_path: Path) -> None:
        async with hermes.task("one", workspace=tmp_path) as one, hermes.task("two") as two:
            assert one.sandbox is not None
            assert two.sandbox is not None

            async def run(task_id: str, command: str) -> dict[str, Any]:
                result = await hermes.execute(call("terminal", command=command), task_id=task_id)
                assert result.success
                answer: dict[str, Any] = json.loads(result.content)
                return answer

            await run("one", "export SECRET=1; cd /; echo hello > $OLDPWD/note.txt")
            assert (tmp_path / "note.txt").read_text() == "hello\n"
            assert (await run("one", "echo $SECRET $PWD"))["output"] == "1 /"
            assert (await run("two", "echo -$SECRET-"))["output"] == "--"
            wrote = await hermes.execute(call("write_file", path="a.txt", content="x"), task_id="two")
            assert wrote.success
            assert (two.sandbox.workspace / "a.txt").read_text() == "x"
            kept = two.sandbox.workspace
        assert not kept.exists()
        assert tmp_path.exists()

    async def test_a_command_that_fails_is_no_tool_error(self, hermes: HermesTools) -> None:
        async with hermes.task() as task:
            failed = await hermes.execute(call("terminal", command="exit 3"), task_id=task.task_id)
            assert (failed.success, failed.exit_code, failed.error) == (True, 3, None)
            late = await hermes.execute(call("terminal", command="sleep 20", timeout=1), task_id=task.task_id)
            assert (late.success, late.exit_code) == (True, 124)
            refused = await hermes.execute(call("terminal", command="nohup sleep 5"), task_id=task.task_id)
            assert (refused.success, refused.exit_code) == (False, -1)
            missing = await hermes.execute(call("read_file", path="absent.txt"), task_id=task.task_id)
            assert not missing.success

    async def test_the_notes_on_the_terminal_are_true(self, hermes: HermesTools) -> None:
        async with hermes.task() as task:

            async def run(command: str, **more: Any) -> tuple[str, int | None, bool]:
                asked = call("terminal", command=command, **more)
                result = await hermes.execute(asked, task_id=task.task_id)
                return json.loads(result.content)["output"], result.exit_code, result.success

            notes = " ".join(hermes.notes.split())
            assert "run in bash" in notes
            assert (await run("a=(1 2); [[ x == x* ]] && set -o pipefail && echo ${a[1]}"))[0] == "2"
            assert "come back as one text" in notes
            assert sorted((await run("echo out; echo err >&2"))[0].split()) == ["err", "out"]
            assert "working directory and exported variables stay" in notes
            await run("mkdir bin; echo 'export VENV=on' > bin/activate; cd bin; . ./activate")
            assert (await run("basename $PWD; echo $VENV"))[0] == "bin\non"
            assert "not exported, functions and aliases do not stay" in notes
            await run("y=1; f() { :; }; alias g=f")
            assert (await run("echo -$y-"))[0] == "--"
            assert (await run("type f"))[1] == (await run("type g"))[1] == 1
            assert "exit code other than 0" in notes
            assert (await run("exit 5"))[1:] == (5, True)
            assert "standard input is empty" in notes
            assert (await run("read answer; echo $?"))[0] == "1"
            assert "exit code 124" in notes
            assert (await run("sleep 20", timeout=1))[1] == 124
            assert "trailing & and nohup are refused" in notes
            assert not (await run("sleep 0 &"))[2]
            assert not (await run("nohup sleep 0"))[2]
            assert f"with the {hermes_name('process')} tool" in notes
            assert (await run("sleep 0", background=True))[2]
        assert ToolRegistry([even]).notes == HermesTools(["file"]).notes == "", "nothing is claimed of other tools"

    async def test_todo_is_served_to_each_task(self, hermes: HermesTools) -> None:
        item = {"id": "1", "content": "write tests", "status": "pending"}
        async with hermes.task("a"), hermes.task("b"):
            wrote = await hermes.execute(call(hermes_name("todo"), todos=[item]), task_id="a")
            assert json.loads(wrote.content)["todos"] == [item]
            read = await hermes.execute(call(hermes_name("todo")), task_id="a")
            assert json.loads(read.content)["todos"] == [item]
            assert json.loads((await hermes.execute(call(hermes_name("todo")), task_id="b")).content)["todos"] == []
        async with hermes.task("a"):
            assert json.loads((await hermes.execute(call(hermes_name("todo")), task_id="a")).content)["todos"] == []

    async def test_long_results_lie_where_the_model_can_read_them(self) -> None:
        tools = HermesTools(["terminal"], max_result_chars=500)
        async with tools.task() as task:
            assert task.sandbox is not None
            result = await tools.execute(call("terminal", command="seq 1 2000"), task_id=task.task_id)
            assert result.overflow is not None
            assert result.overflow in result.content
            assert result.exit_code == 0
            again = await tools.execute(call("terminal", command=f"wc -c < {result.overflow}"), task_id=task.task_id)
            assert int(json.loads(again.content)["output"]) > 8000
            assert list(task.sandbox.workspace.iterdir()) == [], "the verifier sees the task's own files"
        assert not os.path.exists(result.overflow)

    async def test_a_time_limit_ends_the_command(self) -> None:
        tools = HermesTools(["terminal"], time_limit_s=0.5)
        async with tools.task() as task:
            assert task.sandbox is not None
            command = call("terminal", command="sleep 60; touch survived")
            result = await tools.execute(command, task_id=task.task_id)
            assert not result.success
            assert "time limit of 0.5 seconds" in str(result.error)

    async def test_a_process_in_the_background_is_not_promised_to_report(self, hermes: HermesTools) -> None:
        async with hermes.task() as task:
            asked = call("terminal", command="sleep 0", background=True, notify_on_complete=True)
            result = await hermes.execute(asked, task_id=task.task_id)
        assert json.loads(result.content)["notify_on_complete"] is False

    async def test_a_task_has_to_be_open(self, hermes: HermesTools) -> None:
        result = await hermes.execute(call("terminal", command="true"), task_id="nowhere")
        assert not result.success
        assert "no task 'nowhere' is open" in result.content

    async def test_a_workspace_that_is_missing(self, hermes: HermesTools, tmp_path: Path) -> None:
        with pytest.raises(WorkspaceError):
            async with hermes.task("t", workspace=tmp_path / "absent"):
                pass
        async with hermes.task("t"):
            pass

    async def test_an_opening_that_is_cancelled_leaves_nothing(self, hermes: HermesTools) -> None:
        before = set(threading.enumerate())

        async def use() -> None:
            async with hermes.task("cancelled"):
                await asyncio.Event().wait()

        running = asyncio.create_task(use())
        await asyncio.sleep(0)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        from tools import terminal_tool

        assert "cancelled" not in terminal_tool._active_environments
        assert "cancelled" not in terminal_tool._task_env_overrides
        assert {thread for thread in threading.enumerate() if not thread.name.startswith("hermes-atropos")} <= before

    @pytest.mark.parametrize(
        ("name", "why"), [("memory", "other"), ("session_search", "sessions"), ("clarify", "nobody")]
    )
    def test_what_has_no_place_in_a_rollout_is_refused_by_name(self, name: str, why: str) -> None:
        with pytest.raises(ToolDefinitionError, match=f"{name!r} has no place in a rollout.*{why}"):
            HermesTools(["terminal", name])

    def test_a_bundle_leaves_them_out(self) -> None:
        tools = HermesTools(["coding"])
        assert "terminal" in tools
        assert "memory" not in tools
        assert "delegate_task" not in tools
        assert "skill_manage" not in HermesTools(["skills"])

    def test_unknown_and_empty_toolsets(self) -> None:
        with pytest.raises(UnknownToolsetError, match=r"'termnal'.*'terminal'"):
            HermesTools(["termnal"])
        with pytest.raises(ToolDefinitionError, match="name a toolset"):
            HermesTools([])

    def test_distributions_are_drawn_by_seed(self) -> None:
        drawn = [HermesTools.from_distribution("development", seed=seed).toolsets for seed in (1, 1, 2, 3, 4, 5)]
        assert drawn[0] == drawn[1]
        assert len({tuple(toolsets) for toolsets in drawn}) > 1
        assert HermesTools.from_distribution("research", seed=0).toolsets, (
            "also where keys for the likely ones are missing"
        )
        with pytest.raises(UnknownToolsetError, match=r"'devel'.*'development'"):
            HermesTools.from_distribution("devel")
