"""A task's sandbox: its own workspace, shell, home and processes, and nothing of it once it is released."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import stat
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import LIMIT, nothing_left, processes, until
from tools import file_state, file_tools, terminal_tool
from tools.environments.local import LocalEnvironment
from tools.interrupt import set_interrupt
from tools.process_registry import process_registry

from hermes_atropos.errors import SandboxError, WorkspaceError
from hermes_atropos.hermes.releases import release
from hermes_atropos.hermes.terminal import HermesSandbox
from hermes_atropos.sandbox.processes import MARKER

#: Commands that change their shell, in all sorts of ways, and one that shows it.
COMMANDS = [
    "export COLOUR=red; MOOD=blue; printf exact",
    "COLOUR=green; unset MOOD; echo it\\'s 'so'",
    "export LINES_='one\ntwo' QUOTE=\"it's\" BRACES={marker}",
    "mkdir -p deep && ln -sfn deep link && cd link",
    "cd /; false",
    "mkdir -p gone && cd gone && rmdir ../gone",
    "set -e; export COLOUR=unseen; false",
    "trap 'echo bye' EXIT; umask 022",
    "export COLOUR=unseen; exit 3",
    "export COLOUR=unseen; exec echo instead",
    "sleep 60 > /dev/null & echo in the background",
    "printf '\\377\\n'",
    "echo $COLOUR $MOOD $LINES_ $QUOTE $BRACES; pwd; umask; ls",
]


@pytest.fixture
def sandbox() -> Iterator[HermesSandbox]:
    with nothing_left():
        sandbox = HermesSandbox()
        yield sandbox
        sandbox.release()


def of_all(command: str) -> list[int]:
    """The processes of this machine whose command line holds ``command``, whatever their environment."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if command in entry.read_text().replace("\0", " "):
                found.append(int(entry.parent.name))
        except OSError:
            continue
    return found


class TestShell:
    def test_a_command(self, sandbox: HermesSandbox) -> None:
        result = sandbox.run("echo out; echo err >&2; exit 3")
        assert (result.output.split(), result.exit_code) == (["out", "err"], 3)

    def test_exports_functions_and_the_current_folder_stay(self, sandbox: HermesSandbox) -> None:
        sandbox.run("export COLOUR=red; mkdir deep; cd deep")
        assert sandbox.run("echo $COLOUR; basename $PWD").output.split() == ["red", "deep"]

    def test_more_exports_than_a_pipe_holds_stay(self, sandbox: HermesSandbox) -> None:
        for name in ("ONE", "TWO"):
            sandbox.run(f"export {name}=$(head -c 100000 /dev/zero | tr '\\0' x)")
        assert sandbox.run("echo ${#ONE} ${#TWO}").output == "100000 100000\n"

    @given(st.lists(st.sampled_from(COMMANDS), min_size=1, max_size=6))
    @settings(max_examples=20, deadline=None)
    def test_commands_follow_one_another_as_in_hermes_own_shell(self, commands: list[str]) -> None:
        """The script around a command is this library's own, because Hermes' starts two more processes for each."""
        sandbox, folder = HermesSandbox(), tempfile.mkdtemp()
        theirs = LocalEnvironment(cwd=folder, env={"HOME": sandbox.environment().env["HOME"]}, timeout=LIMIT)
        try:
            for command in commands:
                expected, result = theirs.execute(command), sandbox.run(command)
                # In a folder that is gone, Hermes' own look at it complains.
                expected_output = re.sub("^pwd: error retrieving .*\n", "", expected["output"], flags=re.MULTILINE)
                output = result.output.replace(str(sandbox.workspace), folder)
                assert (output, result.exit_code) == (expected_output, expected["returncode"])
        finally:
            sandbox.release()
            theirs.cleanup()
            shutil.rmtree(folder)

    def test_a_command_cut_off_leaves_the_shell_as_it_was(self, sandbox: HermesSandbox) -> None:
        sandbox.run("export COLOUR=red")
        for command in ("export COLOUR=blue; exit 3", "export COLOUR=blue; exec true", "COLOUR=blue; kill -9 $$"):
            sandbox.run(command)
        assert sandbox.run("echo $COLOUR").output == "red\n"
        assert sandbox.run("ls -A ${TMPDIR:-/tmp}").output == ""

    def test_variables_need_no_file(self, sandbox: HermesSandbox) -> None:
        sandbox.run("rm -rf $TMPDIR")
        assert sandbox.run("export COLOUR=red; echo on").output == "on\n"
        assert sandbox.run("echo [$COLOUR]").output == "[red]\n"

    def test_the_home_and_temporary_files_are_its_own(self, sandbox: HermesSandbox) -> None:
        home, temporary, made = sandbox.run("echo $HOME; echo $TMPDIR; mktemp").output.split()
        assert Path(home) == Path(temporary).parent == sandbox.workspace.parent
        assert Path(made).is_relative_to(temporary)
        assert sandbox.run("cd && pwd").output.strip() == home

    def test_the_workspace_is_where_it_starts(self, sandbox: HermesSandbox) -> None:
        assert sandbox.run("pwd -P").output.strip() == str(sandbox.workspace)
        assert list(sandbox.workspace.iterdir()) == []

    def test_a_time_limit(self, sandbox: HermesSandbox) -> None:
        assert sandbox.run("echo begun; sleep 1000", timeout=1).exit_code == 124
        assert sandbox.run("echo on").output.strip() == "on"

    def test_a_command_that_will_not_end_is_killed(self, sandbox: HermesSandbox) -> None:
        assert sandbox.run("trap '' TERM INT HUP; while true; do sleep 0.1; done", timeout=1).exit_code == 124
        until(lambda: len(processes()) == 1)  # the shell that stays

    def test_what_a_command_left_running_writes_into_no_other_s_output(self, sandbox: HermesSandbox) -> None:
        sandbox.run("(trap '' PIPE; while true; do echo stray; sleep 0.02; done) &")
        for number in range(3):
            assert sandbox.run(f"sleep 0.1; echo {number}").output == f"{number}\n"

    def test_input_is_at_its_end(self, sandbox: HermesSandbox) -> None:
        assert sandbox.run("cat; echo done").output.strip() == "done"

    def test_any_bytes_of_output(self, sandbox: HermesSandbox) -> None:
        assert "grün" in sandbox.run("printf 'gr\\xc3\\xbcn \\xff\\xfe'").output

    def test_variables_of_the_process_are_known_and_changes_are_noticed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("SHARED_SETTING", "one")
        with_one = HermesSandbox()
        monkeypatch.setenv("SHARED_SETTING", "two")
        with_two = HermesSandbox()
        assert with_two.run("echo $SHARED_SETTING").output.strip() == "two"
        for sandbox in (with_one, with_two):
            sandbox.release()

    @pytest.fixture
    def logins(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """A file to which each login shell that is started adds a line."""
        log, shim = tmp_path / "logins", tmp_path / "bin" / "bash"
        shim.parent.mkdir()
        shim.write_text(f'#!/bin/sh\n[ "$1" = -l ] && echo >> {log}\nexec {shutil.which("bash")} "$@"\n')
        shim.chmod(0o755)
        monkeypatch.setenv("PATH", str(shim.parent), prepend=os.pathsep)
        return log

    def test_the_login_shell_runs_once(self, logins: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Whatever Hermes notes in the environment of its process about the session that it is at."""
        for number in range(3):
            monkeypatch.setenv("HERMES_SESSION_ID", f"session-{number}")
            monkeypatch.setenv("TERMINAL_SSH_HOST", f"session-{number}")
            sandbox = HermesSandbox()
            monkeypatch.setenv("HERMES_SESSION_ID", "later")
            assert f"session-{number}" not in sandbox.run("env").output
            sandbox.release()
        assert len(logins.read_text().splitlines()) == 1

    def test_the_login_shell_runs_once_also_when_many_open_at_once(self, logins: Path) -> None:
        with ThreadPoolExecutor(8) as pool:
            sandboxes = list(pool.map(lambda _: HermesSandbox(), range(8)))
            list(pool.map(lambda sandbox: sandbox.run("true"), sandboxes))
        for sandbox in sandboxes:
            sandbox.release()
        assert len(logins.read_text().splitlines()) == 1

    def test_two_sandboxes_share_nothing(self) -> None:
        with nothing_left():
            one, two = HermesSandbox(), HermesSandbox()
            one.run("export SECRET=1; echo x > here; echo y > ~/here; echo z > $TMPDIR/here")
            assert two.run("echo [$SECRET]").output.strip() == "[]"
            assert "here" not in two.run("ls . ~ $TMPDIR").output
            one.release()
            assert two.run("echo on").output.strip() == "on"
            two.release()


class TestFiles:
    @settings(max_examples=40, deadline=None)
    @given(content=st.binary(max_size=2000))
    def test_bytes_come_back_as_they_were(self, content: bytes) -> None:
        sandbox = self.shared()
        sandbox.write_bytes("folder/a file", content)
        assert sandbox.read_bytes("folder/a file") == content

    _shared: HermesSandbox | None = None

    @classmethod
    def shared(cls) -> HermesSandbox:
        if cls._shared is None:
            cls._shared = HermesSandbox()
        return cls._shared

    @classmethod
    def teardown_class(cls) -> None:
        cls.shared().release()

    def test_paths_are_those_of_the_shell(self, sandbox: HermesSandbox) -> None:
        sandbox.run("mkdir -p a && cd a && echo x > y")
        assert sandbox.read_bytes("a/y") == b"x\n", "relative to the workspace, wherever the shell is"
        sandbox.write_bytes("a/z", b"1")
        assert sandbox.run("cat z").output.strip() == "1"

    def test_a_missing_file(self, sandbox: HermesSandbox) -> None:
        with pytest.raises(FileNotFoundError):
            sandbox.read_bytes("none")


class TestWorkspace:
    def test_a_given_one_is_used_and_kept(self, tmp_path: Path) -> None:
        with nothing_left():
            sandbox = HermesSandbox(workspace=tmp_path)
            assert sandbox.workspace == tmp_path
            sandbox.run("echo x > kept")
            sandbox.release()
        assert [path.name for path in tmp_path.iterdir()] == ["kept"]

    def test_a_copy_has_links_and_modes(self, tmp_path: Path) -> None:
        (tmp_path / "run.sh").write_text("#!/bin/sh\necho ran\n")
        (tmp_path / "run.sh").chmod(0o755)
        (tmp_path / "link").symlink_to("run.sh")
        (tmp_path / "dangling").symlink_to("nowhere")
        with nothing_left():
            sandbox = HermesSandbox(workspace=tmp_path, copy=True)
            assert sandbox.run("./link; readlink dangling; echo changed > run.sh").output.split() == ["ran", "nowhere"]
            sandbox.release()
        assert "ran" in (tmp_path / "run.sh").read_text()

    def test_one_that_is_named_by_another_path(self, tmp_path: Path) -> None:
        (tmp_path / "folder").mkdir()
        (tmp_path / "link").symlink_to("folder")
        sandbox = HermesSandbox("first", tmp_path / "folder")
        with pytest.raises(WorkspaceError, match="'first'"):
            HermesSandbox("second", tmp_path / "link")
        sandbox.release()
        HermesSandbox("second", tmp_path / "link").release()

    @pytest.mark.parametrize("copy", [False, True])
    def test_one_that_is_missing_or_a_file(self, tmp_path: Path, copy: bool) -> None:
        (tmp_path / "file").touch()
        for name in ("file", "missing"):
            with nothing_left(), pytest.raises(WorkspaceError, match="give a folder that exists"):
                HermesSandbox(workspace=tmp_path / name, copy=copy)

    def test_one_that_cannot_be_copied(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe")
        with nothing_left(), pytest.raises((OSError, SandboxError, WorkspaceError)):
            HermesSandbox("mine", tmp_path, copy=True)
        with nothing_left():
            HermesSandbox("mine").release()

    def test_no_room_for_temporary_files(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A sandbox that could not be opened keeps neither its name nor its workspace."""
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
        with pytest.raises(OSError, match="missing"):
            HermesSandbox("no room", tmp_path)
        monkeypatch.undo()
        with nothing_left():
            HermesSandbox("no room", tmp_path).release()

    def test_the_same_task_id_twice(self) -> None:
        with nothing_left():
            sandbox = HermesSandbox("mine")
            with pytest.raises(SandboxError, match="'mine' has an open sandbox"):
                HermesSandbox("mine")
            assert sandbox.run("echo on").output.strip() == "on", "the first is as it was"
            sandbox.release()


class TestRegistration:
    def test_hermes_finds_it_by_the_task_s_id(self, sandbox: HermesSandbox) -> None:
        sandbox.run("export COLOUR=red")
        assert '"red"' in terminal_tool.terminal_tool(command="echo $COLOUR", task_id=sandbox.hermes_id)

    def test_a_subagent_gets_the_same_shell(self, sandbox: HermesSandbox) -> None:
        sandbox.register("child")
        terminal_tool.terminal_tool(command="export COLOUR=red", task_id="child")
        assert sandbox.run("echo $COLOUR").output.strip() == "red"

    def test_the_end_of_a_subagent_leaves_it_open(self, sandbox: HermesSandbox) -> None:
        sandbox.register("child")
        release().lifecycle().cleanup_vm("child")
        release().lifecycle().cleanup_vm(sandbox.hermes_id)
        sandbox.register(sandbox.hermes_id)
        assert sandbox.run("echo on").output.strip() == "on"

    def test_the_reaper_of_idle_environments_leaves_it_open(self, sandbox: HermesSandbox) -> None:
        sandbox.run("export COLOUR=red")
        terminal_tool._cleanup_inactive_envs(lifetime_seconds=-1)
        sandbox.register(sandbox.hermes_id)
        assert '"red"' in terminal_tool.terminal_tool(command="echo $COLOUR", task_id=sandbox.hermes_id)

    def test_after_its_release(self) -> None:
        sandbox = HermesSandbox()
        sandbox.release()
        for use in (lambda: sandbox.register("child"), lambda: sandbox.run("true"), sandbox.environment):
            with pytest.raises(SandboxError, match="released"):
                use()


class TestRelease:
    def test_again_is_harmless(self) -> None:
        with nothing_left():
            sandbox = HermesSandbox("mine")
            sandbox.release()
            other = HermesSandbox("mine")
            sandbox.release()
            assert other.run("echo on").output.strip() == "on", "it took nothing from whoever came after"
            other.release()

    def test_by_several_threads(self) -> None:
        with nothing_left():
            sandbox = HermesSandbox()
            threads = [threading.Thread(target=sandbox.release) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(LIMIT)

    @pytest.mark.parametrize(
        "left",
        [
            "chmod -R 0 .",
            "mkdir -p a/b/c && touch a/b/c/d && chmod 0 a/b/c a/b a",
            "ln -s / everything; ln -s .. up",
            "mkfifo pipe; mknod device p",
            "cd /; rm -rf ~",
            "mkdir -p $(printf 'd/%.0s' $(seq 200))",
            "touch -- '-rf' 'new\nline' $'\\xff'",
        ],
    )
    def test_whatever_the_task_left_in_its_folders(self, left: str) -> None:
        with nothing_left():
            sandbox = HermesSandbox()
            assert sandbox.run(left).exit_code == 0
            sandbox.release()
        assert Path("/etc").is_dir()

    def test_a_file_that_is_still_written_to(self) -> None:
        """Processes end before the folders go."""
        with nothing_left():
            sandbox = HermesSandbox()
            sandbox.run("bash -c 'while true; do mkdir -p \"d$RANDOM\"; done' >/dev/null 2>&1 &")
            until(lambda: len(list(sandbox.workspace.iterdir())) > 10)
            sandbox.release()

    @pytest.mark.parametrize(
        "start",
        [
            pytest.param("sleep {0} >/dev/null 2>&1 &", id="background"),
            pytest.param("nohup sleep {0} >/dev/null 2>&1 &", id="nohup"),
            pytest.param("setsid sleep {0} >/dev/null 2>&1 &", id="session"),
            pytest.param(
                "(setsid bash -c 'setsid sleep {0} & sleep {0}' >/dev/null 2>&1 &)", id="sessions in sessions"
            ),
            pytest.param("bash -c 'trap \"\" TERM HUP INT; sleep {0}; sleep {0}' >/dev/null 2>&1 &", id="stubborn"),
            pytest.param("env -i setsid sleep {0} >/dev/null 2>&1 &", id="without an environment"),
            pytest.param("cd / && setsid sleep {0} >/dev/null 2>&1 &", id="elsewhere"),
        ],
    )
    def test_processes_end(self, start: str) -> None:
        mark = f"{1000 + os.getpid()}.{abs(hash(start)) % 10**9}"  # seconds to sleep, like no one else's
        with nothing_left():
            sandbox = HermesSandbox()
            sandbox.run(start.format(mark))
            until(lambda: bool(of_all(f"sleep {mark}")))
            sandbox.release()
        running = of_all(f"sleep {mark}")
        for pid in running:
            os.kill(pid, signal.SIGKILL)
        assert running == []

    def test_a_process_that_has_just_begun(self, tmp_path: Path) -> None:
        """While the kernel loads its program, a process has no environment by which it could be known."""
        with nothing_left():
            for _ in range(50):
                sandbox = HermesSandbox(workspace=tmp_path)
                sandbox.run("setsid sleep 1000 >/dev/null 2>&1 &")
                sandbox.release()
                assert not processes()

    def test_a_process_that_keeps_replacing_itself(self, sandbox: HermesSandbox) -> None:
        """Each generation lives for a moment only, and is another process; there are 2000 of them at most."""
        script = sandbox.workspace / "again.sh"
        script.write_text('#!/bin/bash\nn=$(cat n); echo $((n + 1)) > n\n[ $n -lt 2000 ] && setsid "$0" &\n')
        script.chmod(script.stat().st_mode | stat.S_IXUSR)
        sandbox.run("echo 0 > n; ./again.sh >/dev/null 2>&1 &")
        until(lambda: (sandbox.workspace / "n").read_text().strip() > "1")
        sandbox.release()
        assert of_all(str(script)) == of_all("again.sh") == []

    def test_a_background_process_that_does_not_listen_is_not_waited_for(
        self, sandbox: HermesSandbox, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Hermes asks it to end, and kills it two seconds later."""
        asked: list[Any] = []
        monkeypatch.setattr(type(process_registry), "_terminate_host_pid", lambda *given: asked.append(given))
        sandbox.run("true")
        command = "trap '' TERM; echo begun > begun; sleep 1000; sleep 1000"
        terminal_tool.terminal_tool(command=command, background=True, task_id=sandbox.hermes_id)
        until(lambda: (sandbox.workspace / "begun").exists())
        sandbox.release()
        assert not process_registry.has_active_processes(sandbox.hermes_id)
        assert asked == []

    def test_what_an_ended_one_left_can_be_read_until_then(self, sandbox: HermesSandbox) -> None:
        """Hermes keeps 64 processes for all tasks together."""

        def leave(task: HermesSandbox, text: str) -> str:
            command = f"sleep 0.3; echo {text}"  # Hermes goes on listing one that ends while it is being listed
            answer = terminal_tool.terminal_tool(command=command, background=True, task_id=task.hermes_id)
            return str(json.loads(answer)["session_id"])

        def ended(task: HermesSandbox) -> bool:
            return not process_registry.has_active_processes(task.hermes_id)

        other = HermesSandbox()
        left = leave(sandbox, "mine")
        until(lambda: ended(sandbox))
        others = [leave(other, f"other{number}") for number in range(70)]
        until(lambda: ended(other))
        assert process_registry.read_log(left)["output"].splitlines()[-1] == "mine"  # after bash's words on terminals
        sandbox.release()
        other.release()
        last = HermesSandbox()
        for name in others[:2]:
            leave(last, name)
        until(lambda: ended(last))
        assert process_registry.read_log(left)["status"] == "not_found"
        last.release()

    def test_what_it_has_read_and_written_is_forgotten(self, tmp_path: Path) -> None:
        """Otherwise a later task is warned of the changes that an earlier one made to a file of the same path."""

        def noted() -> list[int]:
            registry = file_state.get_registry()
            notes = registry._reads, registry._last_writer, registry._path_locks
            return [len(kept) for kept in (*notes, file_tools._read_tracker, file_tools._patch_failure_tracker)]

        before = noted()
        for text in ("one", "two"):
            sandbox = HermesSandbox(workspace=tmp_path)
            with sandbox.entered():
                written = json.loads(file_tools.write_file_tool("notes", text, task_id=sandbox.hermes_id))
                file_tools.read_file_tool("notes", task_id=sandbox.hermes_id)
                file_tools.patch_tool(path="notes", old_string="three", new_string="", task_id=sandbox.hermes_id)
            assert "_warning" not in written
            assert noted() > before
            assert sandbox.hermes_id in file_tools._read_tracker
            sandbox.release()
            assert sandbox.hermes_id not in file_tools._read_tracker
            assert noted() == before

    def test_other_processes_go_on(self, sandbox: HermesSandbox) -> None:
        other = HermesSandbox()
        other.run("sleep 1000 >/dev/null 2>&1 &")
        sandbox.release()
        assert any("sleep 1000" in command for command in processes().values())
        other.release()


class TestCalls:
    async def test_off_the_event_loop(self, sandbox: HermesSandbox) -> None:
        """While a command waits, the loop does what the command waits for."""
        command = asyncio.create_task(
            sandbox.call(lambda: sandbox.run("until test -e go; do sleep 0.01; done; echo went"))
        )
        await asyncio.sleep(0)
        sandbox.write_bytes("go", b"")
        assert (await command).output.strip() == "went"

    async def test_cancelled(self, sandbox: HermesSandbox) -> None:
        command = asyncio.create_task(sandbox.call(lambda: sandbox.run("echo > begun; sleep 1000")))
        await asyncio.to_thread(until, (sandbox.workspace / "begun").exists)
        command.cancel()
        with pytest.raises(asyncio.CancelledError):
            await command
        assert len(processes()) == 1, "the shell that stays"
        assert (await sandbox.call(lambda: sandbox.run("echo on"))).output.strip() == "on"

    def test_commands_that_take_long_keep_no_other_from_starting(self, sandbox: HermesSandbox) -> None:
        patient = "for _ in {1..50}; do [ -e go ] && exit 0; sleep 0.1; done; exit 1"
        with ThreadPoolExecutor(many := 8 * (os.cpu_count() or 1)) as threads:
            waiting = [threads.submit(sandbox.run, patient) for _ in range(many)]
            sandbox.run("touch go")
            assert [command.result(LIMIT).exit_code for command in waiting] == [0] * many

    async def test_an_exception_comes_through(self, sandbox: HermesSandbox) -> None:
        with pytest.raises(ZeroDivisionError):
            await sandbox.call(lambda: 1 // 0)


class TestShared:
    """Without ``private``, as in ``run_conversation_async``: a shell of its own, in the user's world."""

    def test_it_acts_in_the_current_folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        with nothing_left():
            sandbox = HermesSandbox("mine", Path.cwd(), private=False)
            other = HermesSandbox("other", Path.cwd(), private=False)
            sandbox.run("export COLOUR=red; echo x > here")
            assert other.run("echo [$COLOUR]; ls").output.split() == ["[]", "here"]
            sandbox.release()
            other.release()
        assert (tmp_path / "here").exists()

    def test_its_home_is_the_user_s(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", str(tmp_path))
        (tmp_path / ".profile").write_text("export FROM_PROFILE=yes\n")
        with nothing_left():
            sandbox = HermesSandbox("mine", tmp_path, private=False)
            assert sandbox.run("echo $HOME $FROM_PROFILE").output.split() == [str(tmp_path), "yes"]
            sandbox.release()

    def test_the_user_s_login_shell_is_started_once(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """And again when one of its files has changed. No sandbox hears of another through it."""
        monkeypatch.setenv("HOME", str(tmp_path))
        seen = []
        for number, colour in enumerate(["red", "red", "blue"]):
            folder = tmp_path / str(number)
            folder.mkdir()
            profile = f"export COLOUR={colour}\nf() {{ echo called; }}\necho >> ~/logins\n"
            if not number or colour == "blue":
                (tmp_path / ".profile").write_text(profile)
            sandbox = HermesSandbox(f"task{number}", folder, private=False)
            seen.append(sandbox.run(f"echo $COLOUR; f; basename $PWD; echo ${MARKER}").output.split())
            sandbox.release()
        assert [told[:3] for told in seen] == [["red", "called", "0"], ["red", "called", "1"], ["blue", "called", "2"]]
        assert len({told[3] for told in seen}) == 3, "by which its processes are known"
        assert len((tmp_path / "logins").read_text().splitlines()) == 2

    def test_a_login_shell_that_fails_is_not_tried_again(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Hermes waits 30 s for one that hangs: hundreds of tasks would wait one after another."""
        monkeypatch.setenv("HOME", str(tmp_path))
        (tmp_path / ".profile").write_text("echo >> ~/logins\nexit 3\n")
        for number in range(3):
            sandbox = HermesSandbox(f"task{number}", tmp_path, private=False)
            assert sandbox.run("echo works").output == "works\n"
            sandbox.release()
        assert len((tmp_path / "logins").read_text().splitlines()) == 1

    def test_a_login_that_was_interrupted_is_made_at_the_next_command(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HOME", str(tmp_path))
        (tmp_path / ".profile").write_text("export COLOUR=red\necho >> ~/logins\n[ -e ~/quick ] || sleep 20\n")
        sandbox = HermesSandbox("task", tmp_path, private=False)
        with ThreadPoolExecutor(1) as pool:
            thread = pool.submit(threading.get_ident).result()
            ran = pool.submit(sandbox.run, "echo $COLOUR")
            until((tmp_path / "logins").exists)
            set_interrupt(True, thread)
            assert ran.result().output.strip() == "[Command interrupted]"
            set_interrupt(False, thread)
        (tmp_path / "quick").touch()
        assert sandbox.run("echo $COLOUR").output == "red\n"
        sandbox.release()

    def test_its_processes_end_too(self, tmp_path: Path) -> None:
        with nothing_left():
            sandbox = HermesSandbox("mine", tmp_path, private=False)
            sandbox.run("setsid sleep 1000 >/dev/null 2>&1 &")
            sandbox.release()
