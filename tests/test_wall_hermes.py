"""Behind the wall, Hermes' shell and its tools do what they do without it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import model_tools
import pytest
import test_sandbox
from agent import coding_context
from atroposlib.envs.base import APIServerConfig
from hypothesis import given, settings
from hypothesis import strategies as st
from support import LIMIT, agent_saying, nothing_left, server_of, terminal, tool_texts, until
from tools import file_state
from tools.environments.local import LocalEnvironment

from hermes_atropos import HermesEnv, HermesEnvConfig, HermesTools
from hermes_atropos.errors import ConfigurationError, SandboxError, SandboxUnavailableError
from hermes_atropos.hermes import confined
from hermes_atropos.hermes.terminal import HermesSandbox
from hermes_atropos.hermes.walled import WalledSandbox
from hermes_atropos.sandbox import wall
from hermes_atropos.sandbox.check import run_check
from hermes_atropos.testing import ScriptedServer, chatml_tokenizer, tool_call
from hermes_atropos.tools import ToolRegistry

WALL = {"sandbox": "walled"}


@pytest.fixture
def sandbox(tmp_path: Path) -> Iterator[HermesSandbox]:  # pytest makes its folder before
    with nothing_left():
        sandbox = WalledSandbox()
        yield sandbox
        sandbox.release()


class TestShell(test_sandbox.TestShell):
    """The same tests; those of a login shell and of paths on this machine have no place here."""

    test_the_home_and_temporary_files_are_its_own = None
    test_the_workspace_is_where_it_starts = None
    test_variables_of_the_process_are_known_and_changes_are_noticed = None
    test_the_login_shell_runs_once = None
    test_the_login_shell_runs_once_also_when_many_open_at_once = None
    test_two_sandboxes_share_nothing = None

    @given(st.lists(st.sampled_from([c for c in test_sandbox.COMMANDS if "cd /" not in c]), min_size=1, max_size=6))
    @settings(max_examples=20, deadline=None)
    def test_commands_follow_one_another_as_in_hermes_own_shell(self, commands: list[str]) -> None:
        sandbox, folder = WalledSandbox(), tempfile.mkdtemp()
        theirs = LocalEnvironment(cwd=folder, env={"HOME": "/home/agent"}, timeout=LIMIT)
        try:
            for command in commands:
                expected, result = theirs.execute(command), sandbox.run(command)
                expected_output = re.sub("^pwd: error retrieving .*\n", "", expected["output"], flags=re.MULTILINE)
                assert (result.output.replace("/workspace", folder), result.exit_code) == (
                    expected_output,
                    expected["returncode"],
                )
                if "gone" in command:
                    break  # Hermes goes on above a folder that was removed, a wall in the workspace
        finally:
            sandbox.release()
            theirs.cleanup()
            shutil.rmtree(folder)


class TestCalls(test_sandbox.TestCalls):
    pass


class TestRegistration(test_sandbox.TestRegistration):
    test_after_its_release = None


@pytest.fixture(params=[HermesSandbox, WalledSandbox])
def call(request: pytest.FixtureRequest) -> Iterator[Callable[..., Any]]:
    """Calls a tool of Hermes in a sandbox, and reads its answer."""
    sandbox = request.param()

    def call(name: str, **arguments: Any) -> Any:
        return json.loads(model_tools.handle_function_call(name, arguments, task_id=sandbox.hermes_id))

    call.sandbox = sandbox  # type: ignore[attr-defined]
    yield call
    sandbox.release()


class TestTools:
    """Each in a folder and behind the wall."""

    def test_terminal(self, call: Callable[..., Any]) -> None:
        call("terminal", command="export COLOUR=red; mkdir -p deep; cd deep")
        assert call("terminal", command="echo $COLOUR; basename $PWD; cd ..")["output"].split() == ["red", "deep"]
        assert call("terminal", command="exit 3")["exit_code"] == 3
        assert call("terminal", command="sleep 100", timeout=1)["exit_code"] == 124
        assert call("terminal", command="pwd", workdir="/tmp")["output"] == "/tmp"

    def test_files(self, call: Callable[..., Any]) -> None:
        assert call("write_file", path="src/a.py", content="def one():\n    return 1\n")["bytes_written"] == 24
        assert "1|def one():" in call("read_file", path="src/a.py")["content"]
        assert call("patch", path="src/a.py", old_string="return 1", new_string="return 2")["success"]
        assert call.sandbox.read_bytes("src/a.py") == b"def one():\n    return 2\n"  # type: ignore[attr-defined]
        assert call("search_files", pattern="return 2", path="src")["total_count"] == 1
        assert call("search_files", pattern="*.py", target="files")["files"] != []
        assert "not found" in call("read_file", path="missing.txt")["error"]

    def test_much_output(self, call: Callable[..., Any]) -> None:
        answer = call("terminal", command="seq 100000")
        assert answer["output"].startswith("1\n2\n")
        assert "chars omitted" in answer["output"]
        assert answer["output"].endswith("99999\n100000")

    def test_code_that_calls_tools(self, call: Callable[..., Any]) -> None:
        code = "from hermes_tools import terminal\nprint(terminal('echo from a tool')['output'])"
        answer = call("execute_code", code=code)
        assert (answer["status"], answer["output"].strip(), answer["tool_calls_made"]) == ("success", "from a tool", 1)

    def test_background_processes(self, call: Callable[..., Any]) -> None:
        started = call("terminal", command="echo begun; sleep 0.1; echo done; exit 5", background=True)
        process = {"session_id": started["session_id"]}
        ended = call("process", action="wait", timeout=20, **process)
        assert (ended["status"], ended["exit_code"]) == ("exited", 5)
        assert "done" in call("process", action="log", **process)["output"]
        started = call("terminal", command="sleep 1000", background=True)
        assert call("process", action="kill", session_id=started["session_id"])["status"] == "killed"


class TestConfined:
    """What Hermes would do on this machine."""

    def call(self, sandbox: HermesSandbox, name: str, **arguments: Any) -> Any:
        return json.loads(model_tools.handle_function_call(name, arguments, task_id=sandbox.hermes_id))

    @pytest.mark.parametrize("name", ["notes.txt", "notes.ipynb", "notes.docx", "AGENTS.md"])
    def test_no_file_is_read(self, name: str, sandbox: HermesSandbox, tmp_path: Path) -> None:
        (tmp_path / name).write_text('{"cells": [{"cell_type": "code", "source": ["the secret"]}]}')
        for answer in (
            self.call(sandbox, "read_file", path=str(tmp_path / name)),
            self.call(sandbox, "search_files", pattern="secret", path=str(tmp_path)),
            self.call(sandbox, "terminal", command=f"cat {tmp_path / name}"),
        ):
            assert "the secret" not in json.dumps(answer)

    def test_no_image_is_read(self, sandbox: HermesSandbox, tmp_path: Path) -> None:
        image = tmp_path / "image.png"
        image.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))
        answer = self.call(sandbox, "vision_analyze", image_url=str(image), question="What is it?")
        assert "sandbox returned non-image data" in answer["error"]

    def test_nothing_is_fetched(self, sandbox: HermesSandbox) -> None:
        answer = self.call(sandbox, "vision_analyze", image_url="https://example.com/image.png", question="What is it?")
        assert "no network" in json.dumps(answer)

    def test_a_tool_that_acts_outside(self, sandbox: HermesSandbox) -> None:
        assert "outside the sandbox" in self.call(sandbox, "web_search", query="x")["error"]

    def test_a_project_of_this_machine(self, sandbox: HermesSandbox, tmp_path: Path) -> None:
        (tmp_path / "Makefile").touch()
        subprocess.run(["git", "init", "--quiet", str(tmp_path)], check=True)
        assert coding_context.project_facts_for(tmp_path)["root"] == str(tmp_path)
        with confined.behind(sandbox.environment()):
            assert coding_context.project_facts_for(tmp_path) is None

    def test_a_file_of_the_same_path_in_another_task_is_not_waited_for(self, sandbox: HermesSandbox) -> None:
        other = WalledSandbox()
        held = confined.behind(sandbox.environment()), file_state.lock_path("/workspace/notes")
        with held[0], held[1], ThreadPoolExecutor(1) as thread:
            written = thread.submit(self.call, other, "write_file", path="notes", content="mine")
            assert written.result(LIMIT)["bytes_written"] == 4
        other.release()

    def test_after_the_end_nothing_is_opened_in_its_place(self, sandbox: HermesSandbox, tmp_path: Path) -> None:
        sandbox.release()
        answer = self.call(sandbox, "terminal", command=f"touch {tmp_path}/made")
        assert answer["error"]
        assert list(tmp_path.iterdir()) == []


class TestTasks:
    async def test_a_rollout(self) -> None:
        agent = agent_saying(
            terminal("pwd; echo x > made"), terminal("ls /; hostname"), tool_call("read_file", path="made"), "Done."
        )
        with nothing_left():
            async with agent.task(**WALL) as task:
                result = await task.run("Look around.")
                assert (await task.terminal("ls; pwd")).output == "made\n/workspace\n"
                assert await task.read_file("made") == "x\n"
        first, second, third = map(json.loads, tool_texts(result["messages"]))
        assert first["output"] == "/workspace"
        assert second["output"].splitlines()[-1] == "sandbox"
        assert third["content"].startswith("1|x")

    async def test_the_first_prompt_names_no_path_of_this_machine(self) -> None:
        prompts = []
        for number in range(2):
            agent = agent_saying("Done.")
            async with agent.task(f"task-{number}", **WALL) as task:
                await task.run("Hello.")
                prompt = server_of(agent).requests[0].prompt
                assert "/workspace" in prompt
                assert str(Path.home()) not in prompt
                assert tempfile.gettempdir() + "/" not in prompt
            prompts.append(server_of(agent).requests[0].prompt_ids)
        assert prompts[0] == prompts[1]

    async def test_a_subagent_acts_behind_its_parent_s_wall(self) -> None:
        agent = agent_saying(
            tool_call("delegate_task", goal="Write a file."),
            terminal("hostname > by_the_child"),
            "Written.",
            "Done.",
            enabled_toolsets=["terminal", "file", "delegation"],
        )
        with nothing_left():
            async with agent.task(**WALL) as task:
                await task.run("Have it written.")
                assert await task.read_file("by_the_child") == "sandbox\n"

    async def test_tools_that_act_outside_are_refused_unless_asked_for(self) -> None:
        """Those that Hermes shows the model; from 0.21 on it finds others by a search, and is told so at the call."""
        agent = agent_saying("Done.", enabled_toolsets=["terminal", "skills"])
        with nothing_left(), pytest.raises(ConfigurationError, match=r"skill_manage \(the skills in Hermes' home"):
            async with agent.task(**WALL):
                pass
        async with agent.task(**WALL, outside=["skill_manage", "skill_view", "skills_list"]):
            pass

    async def test_a_folder_has_no_wall_s_options(self) -> None:
        agent = agent_saying("Done.")
        with pytest.raises(ConfigurationError, match="only sandbox='walled'"):
            async with agent.task(network=True):
                pass
        with pytest.raises(ConfigurationError, match="write 'walled' or 'folder'"):
            async with agent.task(sandbox="jail"):
                pass

    async def test_tools_of_the_small_agent(self) -> None:
        with nothing_left():
            async with HermesTools(["terminal", "file"]).task(**WALL) as task:
                assert task.require_sandbox().run("hostname").output == "sandbox\n"
        with pytest.raises(ConfigurationError, match="functions of this process"):
            async with ToolRegistry().task(**WALL):
                pass


class TestVerifier:
    def test_in_a_wall_of_its_own(self, sandbox: HermesSandbox) -> None:
        sandbox.run("export PATH=/workspace; alias ls=false; echo exit 3 > ~/.bashrc; echo x > made; sleep 1000 &")
        check = run_check(sandbox, "ls; echo $WORKSPACE; ls -A ~; pgrep -c sleep; echo y > by_the_check")
        assert check.output == "made\n/workspace\n0\n"
        assert sandbox.read_bytes("by_the_check") == b"y\n"

    def test_its_files(self, sandbox: HermesSandbox) -> None:
        sandbox.run(f"echo 41 > answer; ls -d {wall.CHECK}")
        look = "import os, pathlib; print(pathlib.Path(os.environ['WORKSPACE'], 'answer').read_text(), os.getcwd())"
        check = run_check(sandbox, ["python3", "-I", "look.py"], {"look.py": look}, copy=True)
        assert (check.output, check.exit_code) == (f"41\n {wall.CHECK}\n", 0)
        assert run_check(sandbox, "touch here; touch $WORKSPACE/there", {"a": "b"}, copy=True).exit_code != 0

    def test_its_limits(self, sandbox: HermesSandbox) -> None:
        assert run_check(sandbox, "sleep 100", timeout=0.3).limit == "time"
        assert run_check(sandbox, "yes", limit_bytes=1000).limit == "output"

    def test_what_the_model_left_running_ends(self, sandbox: HermesSandbox) -> None:
        sandbox.run("export COLOUR=red; setsid sleep 1000 > /dev/null 2>&1 &")
        sandbox.run("export COLOUR=red")
        sandbox.stop_processes()
        until(lambda: sandbox.run("pgrep -c sleep; echo $COLOUR").output == "0\nred\n")

    def test_after_the_release(self, sandbox: HermesSandbox) -> None:
        sandbox.release()
        with pytest.raises(SandboxError, match="released"):
            run_check(sandbox, "true")


class TestEnvironments:
    def test_they_are_walled_unless_they_say_folder(self) -> None:
        assert HermesEnvConfig(tokenizer_name="none").sandbox_arguments()["sandbox"] == "walled"
        assert HermesEnvConfig(tokenizer_name="none", sandbox="folder").sandbox_arguments() == {"sandbox": "folder"}

    def test_one_that_cannot_be_says_so_at_its_construction(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        wall.bubblewrap.cache_clear()
        monkeypatch.setattr(wall, "bundled", lambda: None)
        monkeypatch.setenv("PATH", str(tmp_path))
        chatml_tokenizer().save_pretrained(tmp_path / "tokenizer")

        class Server(ScriptedServer):
            def __init__(self, config: APIServerConfig, reasoning_config: Any = None) -> None:
                super().__init__(["Done."])

        class Env(HermesEnv):
            server_cls = Server
            prompt = verify = None  # type: ignore[assignment]

        config = HermesEnvConfig(tokenizer_name=str(tmp_path / "tokenizer"), use_wandb=False)
        with pytest.raises(SandboxUnavailableError, match="sandbox='folder'"):
            Env(config, [APIServerConfig()])
        monkeypatch.undo()
        wall.bubblewrap.cache_clear()
