"""What a verifier sees and runs is not the model's: each try succeeds without the mechanism, and fails with it.

``task.sandbox.run`` is the model's shell: first the model acts in it, and then a verifier that knows no better.
"""

from __future__ import annotations

import asyncio
import os
import stat
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from support import LIMIT, agent_on, agent_saying, nothing_left, processes, terminal, until

from hermes_atropos.errors import ConfigurationError, FileTooLargeError, SandboxError, UnsafePathError
from hermes_atropos.harness import Task
from hermes_atropos.hermes.terminal import apart
from hermes_atropos.hermes.tools import HermesTools
from hermes_atropos.react import AtroposAgent
from hermes_atropos.sandbox import Limit
from hermes_atropos.sandbox.limits import Limits, mechanisms
from hermes_atropos.testing import ScriptedServer

#: An interpreter that looks into the user's own site-packages, as one of a virtual environment does not.
PYTHON = str(Path(sys.base_prefix, "bin", f"python3.{sys.version_info.minor}"))

USER_SITE = f"~/.local/lib/python3.{sys.version_info.minor}/site-packages"


@pytest.fixture(autouse=True)
def programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The programs of this interpreter's environment are found: pytest among them."""
    monkeypatch.setenv("PATH", os.path.dirname(sys.executable), prepend=os.pathsep)


@pytest.fixture
async def task(tmp_path: Path) -> AsyncIterator[Any]:
    with nothing_left():
        async with agent_saying().task() as task:
            yield task


@pytest.fixture(params=["folder", "walled"])
async def either(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Any]:
    """A task in each kind of sandbox, with the programs of this interpreter's environment."""
    options: dict[str, Any] = {}
    if request.param == "walled":
        path = os.pathsep.join([os.path.dirname(sys.executable), "/usr/local/bin", "/usr/bin", "/bin"])
        mounts = dict.fromkeys([sys.prefix, sys.base_prefix], "ro")
        options = {"sandbox": "walled", "mounts": mounts, "env": {"PATH": path}}
    with nothing_left():
        async with agent_saying().task(**options) as task:
            yield task


# ── A new shell ──────────────────────────────────────────────────────────────────────────────────────────────────────


def false_program(name: str) -> str:
    return (
        f"mkdir bin; printf '#!/bin/sh\\necho fooled\\n' > bin/{name}; chmod +x bin/{name}; export PATH=$PWD/bin:$PATH"
    )


@pytest.mark.parametrize(
    ("does", "verifier"),
    [
        pytest.param(false_program("ls"), "ls", id="ls"),
        pytest.param(false_program("python"), "python -I -c 'print(1)'", id="python"),
        pytest.param(false_program("pytest"), "pytest --version", id="pytest"),
        pytest.param(false_program("git"), "git --version", id="git"),
        pytest.param("echo 'ls() { echo fooled; }' > ~/env; export BASH_ENV=~/env", "bash -c ls", id="function"),
        pytest.param(
            "echo 'shopt -s expand_aliases; alias ls=\"echo fooled\"' > ~/env; export BASH_ENV=~/env",
            "printf '#!/bin/bash\\nls\\n' > ~/s; bash ~/s",
            id="alias",
        ),
        pytest.param("export PROMPT_COMMAND='echo fooled'", "echo true | bash --norc -i", id="PROMPT_COMMAND"),
        pytest.param("echo 'echo fooled' > ~/.bashrc", "echo true | bash -i", id=".bashrc"),
        pytest.param("echo 'echo fooled' > ~/.bash_profile", "bash -l -c true", id=".bash_profile"),
        pytest.param("export LD_PRELOAD=fooled.so", "true | cat", id="LD_PRELOAD"),
        pytest.param(
            "echo 'print(\"fooled\")' > ~/sitecustomize.py; export PYTHONPATH=~",
            f"{sys.executable} -c pass",
            id="PYTHONPATH",
        ),
        pytest.param(
            "echo 'print(\"fooled\")' > ~/start.py; export PYTHONSTARTUP=~/start.py",
            f"echo | {sys.executable} -i",
            id="STARTUP",
        ),
        pytest.param(
            f"mkdir -p {USER_SITE}; echo 'import sys; print(\"fooled\")' > {USER_SITE}/a.pth",
            f"{PYTHON} -c pass",
            id="pth",
        ),
        pytest.param("git config --global user.name fooled", "git config user.name", id=".gitconfig"),
        pytest.param(
            "export GIT_CONFIG_COUNT=1 GIT_CONFIG_KEY_0=user.name GIT_CONFIG_VALUE_0=fooled",
            "git config user.name",
            id="GIT_CONFIG",
        ),
        pytest.param("export MAKEFLAGS='--eval=$(info fooled)'", "echo 'all:;@true' | make -f -", id="MAKEFLAGS"),
        pytest.param("mkdir fooled; cd fooled", "pwd", id="folder"),
        pytest.param("export ANSWER=fooled", "echo $ANSWER", id="variable"),
        pytest.param("export CDPATH=~/fooled; mkdir -p ~/fooled/a a", "cd a; pwd", id="CDPATH"),
    ],
)
async def test_a_command_of_the_verifier_is_not_the_model_s(either: Any, does: str, verifier: str) -> None:
    assert either.sandbox.run(does).exit_code == 0
    assert "fooled" in either.sandbox.run(verifier).output
    assert "fooled" not in (await either.terminal(verifier)).output
    assert "fooled" not in (await either.check({}, verifier)).output


@pytest.mark.parametrize(
    "hostile",
    [
        "shopt -s expand_aliases\nalias builtin='echo fooled;' exec='echo fooled;' cat='echo fooled;'",
        "mkdir -p bin; for name in cat bash mktemp; do ln -sf $(type -P echo) bin/$name; done; PATH=$PWD/bin:$PATH",
        "export LD_PRELOAD=fooled.so",
        "echo 'echo fooled' > env; export BASH_ENV=$PWD/env",
        "cat() { echo fooled; }; export -f cat",
    ],
)
def test_a_command_for_a_shell_of_another_machine(hostile: str, tmp_path: Path) -> None:
    """What is run in a container that Hermes opened goes through the model's shell there."""
    (tmp_path / "answer.txt").write_text("it's 42\n")
    script = f"cat {tmp_path}/answer.txt && bash -c 'exit 3'"
    for command, fooled in ((script, True), (apart(script), False)):
        done = subprocess.run(
            ["bash", "-c", f"{hostile}\n{command}"], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert ((done.stdout + done.stderr, done.returncode) != ("it's 42\n", 3)) is fooled


async def test_what_a_command_of_the_verifier_has(task: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    monkeypatch.setenv("PATH", ".:relative", prepend=os.pathsep)
    result = await task.terminal(
        "env | cut -d= -f1 | sort; pwd; ls -A ~; echo $WORKSPACE; echo $PATH", env={"SEED": "1"}
    )
    names, rest = result.output.split()[:-3], result.output.split()[-3:]
    assert set(names) - {"PWD", "SHLVL", "_"} == {
        *("HERMES_ATROPOS_SANDBOX", "HOME", "LANG", "PATH", "SEED", "TERM", "TMPDIR", "WORKSPACE")
    }
    assert rest[:2] == [str(task.workspace)] * 2
    assert rest[2] == os.environ["PATH"].removeprefix(".:relative:")
    assert (result.exit_code, result.limit) == (0, None)
    assert 0 < result.seconds < LIMIT


async def test_it_leaves_the_model_s_shell_as_it_was(either: Any) -> None:
    either.sandbox.run("mkdir deep; cd deep; export COLOUR=red")
    await either.terminal("cd /; export COLOUR=blue; echo 'exit 1' > ~/.bashrc")
    assert either.sandbox.run("echo $COLOUR; basename $PWD; ls -A ~ | grep bashrc").output.split() == ["red", "deep"]


async def test_a_workspace_that_is_gone_or_somewhere_else(task: Any) -> None:
    task.sandbox.run("cd ..; mv workspace other; ln -s /etc workspace")
    with pytest.raises(UnsafePathError, match="replaced"):
        await task.terminal("ls")
    task.sandbox.run("rm workspace")
    with pytest.raises(FileNotFoundError):
        await task.terminal("ls")


async def test_limits_of_a_command(task: Any) -> None:
    late = await task.terminal("echo begun; setsid sleep 1000 & sleep 1000", timeout=0.5)
    assert (late.output, late.exit_code, late.limit) == ("begun\n", 124, Limit.TIME)
    until(lambda: not processes())
    endless = await task.terminal("yes", limit_bytes=1000)
    assert (endless.output, endless.exit_code, endless.limit) == ("y\n" * 500, 124, Limit.OUTPUT)
    closed = await task.terminal("exec >&- 2>&-; sleep 1000", timeout=0.2)
    assert closed.limit is Limit.TIME
    flooded = await task.terminal("yes & echo done", limit_bytes=500_000_000)
    assert (flooded.exit_code, flooded.limit) == (0, None)
    assert "done\n" in flooded.output


async def test_a_cancelled_command_ends(task: Any) -> None:
    command = asyncio.create_task(task.terminal("touch begun; sleep 1000"))
    await asyncio.to_thread(until, (task.workspace / "begun").exists)
    command.cancel()
    with pytest.raises(asyncio.CancelledError):
        await command
    assert not processes()
    assert (await task.terminal("echo on")).output == "on\n"


# ── What the model sees ──────────────────────────────────────────────────────────────────────────────────────────────

KEYS = {
    **dict.fromkeys(
        [
            *(
                "AWS_ACCESS_KEY_ID",
                "AWS_SECRET_ACCESS_KEY",
                "AWS_SESSION_TOKEN",
                "GITHUB_PAT",
                "GITHUB_TOKEN",
                "HF_TOKEN",
            ),
            *("KUBECONFIG", "MYSQL_PWD", "MY_SERVICE_KEY", "NETRC", "OPENAI_API_KEY", "PGPASSWORD", "SENTRY_DSN"),
            *("GOOGLE_APPLICATION_CREDENTIALS", "SSH_AUTH_SOCK", "WANDB_API_KEY", "hf_token"),
        ],
        "0123456789abcdef",
    ),
    "DATABASE_URL": "postgres://user:0123456789abcdef@host/base",
    "CONFIGURED": "sk-0123456789abcdef0123",
}
NO_KEYS = {
    **dict.fromkeys(["CUDA_VISIBLE_DEVICES", "GIT_AUTHOR_NAME", "KEYBOARD", "MONKEY", "TOKENIZERS_PARALLELISM"], "0"),
    "SERVICE_URL": "http://host:8000/v1",
}


async def test_keys_of_the_trainer_are_not_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**KEYS, **NO_KEYS}.items():
        monkeypatch.setenv(name, value)
    everywhere = "env; tr '\\0' '\\n' < /proc/$$/environ; bash -lc env; python3 -c 'import os; print(os.environ)'"
    async with agent_saying(terminal("env > ran.txt; sleep 1000", background=True), "Done.").task() as task:
        await task.run("Go.")
        await asyncio.to_thread(until, (task.workspace / "ran.txt").exists)
        seen = [
            task.sandbox.run(everywhere).output,
            await task.read_file("ran.txt"),
            (await task.terminal(everywhere)).output,
        ]
        for output in seen:
            assert "0123456789abcdef" not in output
        for name, value in NO_KEYS.items():
            assert f"{name}={value}" in seen[0]


def test_the_folders_of_a_task_are_found_by_nobody_who_looks_around() -> None:
    with agent_saying().task() as one, agent_saying().task() as other:
        other.write_file("answer.txt", "42\n")
        temporary = other.workspace.parents[3]
        assert temporary == one.workspace.parents[3]
        modes = [stat.S_IMODE(folder.stat().st_mode) for folder in other.workspace.parents[:3]]
        assert modes == [0o755, 0o700, 0o300], (
            "home, the folder with a name that can't be guessed, the one that can't be listed"
        )
        assert len(other.workspace.parents[1].name) == 16


# ── What runs ────────────────────────────────────────────────────────────────────────────────────────────────────────

#: Answers the question of whoever reads the file with what suits it.
WATCHES = "(while true; do echo 42 > answer.txt; sleep 0.01; done) >/dev/null 2>&1 &"


@pytest.fixture(params=["hermes", "small"])
def make(request: pytest.FixtureRequest) -> Any:
    def make(*replies: str) -> Any:
        server = ScriptedServer(list(replies))
        return agent_on(server) if request.param == "hermes" else AtroposAgent(server, tools=HermesTools(["terminal"]))

    return make


def history(result: Any) -> Any:
    return result["messages"] if isinstance(result, dict) else result.messages


@pytest.mark.parametrize("keep", [False, True])
async def test_what_the_model_left_running_is_ended_before_the_verifier_looks(make: Any, keep: bool) -> None:
    agent = make(terminal("sleep 1000", background=True), terminal("(setsid sleep 1001 &)"), "Done.")
    with nothing_left():
        async with agent.task(keep_processes=keep) as task:
            await task.run("Go.")
            assert any("sleep 1000" in command for command in processes().values())
            await task.write_file("looked.txt", "")
            left = " ".join(processes().values())
            assert ("sleep 1000" in left, "sleep 1001" in left) == (keep, keep)


@pytest.mark.parametrize("sandbox", ["folder", "walled"])
async def test_a_command_finds_what_was_kept(sandbox: str) -> None:
    """And nothing of the model's shell beside it."""
    agent = agent_saying(terminal(f"{false_program('cat')}; sleep 1002.5", background=True), "Done.")
    look = "cat /proc/[0-9]*/cmdline 2> /dev/null | tr '\\0' ' ' | grep -o 'sleep 1002.[5]'"
    shown = f"until {look}; do sleep 0.05; done; echo $WORKSPACE $SEED"
    async with agent.task(sandbox=sandbox, keep_processes=True) as task:
        await task.run("Go.")
        task.sandbox.run("export PATH=$PWD/bin:$PATH")
        found = await task.terminal(shown, env={"SEED": "it's 1"}, timeout=LIMIT)
        assert found.output.splitlines()[0] == "sleep 1002.5"
        assert found.output.splitlines()[-1].endswith("/workspace it's 1")


async def test_what_the_verifier_left_running_goes_on_and_the_next_run_goes_on_too(make: Any) -> None:
    agent = make(terminal("export COLOUR=red"), "Done.", terminal("echo $COLOUR > colour.txt"), "Done.")
    with nothing_left():
        async with agent.task() as task:
            first = await task.run("Go.")
            await task.terminal("sleep 1000 >/dev/null 2>&1 &")
            await task.terminal("true")
            await task.check({}, "true")
            assert any("sleep 1000" in command for command in processes().values())
            await task.run("Go on.", conversation_history=history(first))
            assert await task.read_file("colour.txt") == "red\n"
            assert not processes()


async def test_commands_of_a_verifier_leave_no_descriptor_open(either: Any) -> None:
    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    await either.terminal("true")
    before = descriptors()
    for _ in range(5):
        await either.terminal("true")
        await either.check(files={"check.sh": b"exit 0"}, command="bash check.sh")
    assert descriptors() == before


async def test_commands_of_a_verifier_at_the_same_time(make: Any) -> None:
    """None is taken for what the model left running."""
    async with make(terminal("(setsid sleep 1000 &)"), "Done.").task() as task:
        await task.run("Go.")
        results = await asyncio.gather(*[task.terminal(f"sleep 0.2; echo {number}") for number in range(5)])
    assert [result.output for result in results] == [f"{number}\n" for number in range(5)]


MOUNTS = """
import os
from support import agent_saying
from hermes_atropos.errors import UnsafePathError

with agent_saying().task() as task:
    run = task.sandbox.run("mkdir ~/a; mount --bind {0} ~/a; mkdir b; mount --bind {0} b; cat b/solution.txt")
    print(run.output.strip())
    try:
        task.read_file("b/solution.txt")
    except UnsafePathError as error:
        print(error)
print(os.listdir("{0}"))
"""


def test_what_the_model_has_mounted_is_neither_read_nor_removed(tmp_path: Path) -> None:
    """The trainer is root here, in namespaces of its own: so is the model, and may mount."""
    (tmp_path / "trainer").mkdir()
    (tmp_path / "trainer" / "solution.txt").write_text("42\n")
    environ = {"PATH": os.environ["PATH"], "PYTHONPATH": os.pathsep.join(sys.path), "HOME": str(tmp_path)}
    done = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", sys.executable, "-c", MOUNTS.format(tmp_path / "trainer")],
        env=environ | {"TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    assert done.stdout.splitlines() == [
        "42",
        "'b/solution.txt' leads out of the workspace: something is mounted at 'b'",
        "['solution.txt']",
    ], done.stderr
    assert "could not be removed" in done.stderr


# ── Checks ───────────────────────────────────────────────────────────────────────────────────────────────────────────

#: As docs/verifiers.md has it.
PYTEST = (
    "python -I -m pytest -q -c /dev/null --rootdir . --confcutdir . --noconftest -p no:cacheprovider "
    "--import-mode importlib test_sums.py"
)

TESTS = """\
import os, sys

sys.path.append(os.environ["WORKSPACE"])

def test_add():
    from sums import add
    assert add(2, 3) == 5
"""

WRONG = "def add(a, b):\n    return a - b\n"
RIGHT = "def add(a, b):\n    return a - (-b)\n"  # of another size, by which Python knows its compiled files

PASSES = "def test_add():\n    pass\n"


#: Spares pytest a second of looking for plugins.
BARE = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}

NAIVE = f"PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 WORKSPACE=$PWD {sys.executable} -m pytest -q"


async def test_a_check_tells_right_from_wrong(either: Any) -> None:
    for content, code, said in ((WRONG, 1, "1 failed"), (RIGHT, 0, "1 passed")):
        await either.write_file("sums.py", content)
        for copy in (False, True):
            result = await either.check({"test_sums.py": TESTS}, PYTEST, copy=copy, env=BARE)
            assert (result.exit_code, said in result.output) == (code, True), result.output


@pytest.mark.parametrize(
    ("path", "content"),
    [
        ("test_sums.py", PASSES),
        ("conftest.py", "def pytest_collection_modifyitems(items):\n    import os; os._exit(0)\n"),
        ("sitecustomize.py", "import os; os._exit(0)\n"),
        ("pytest.py", "import os; os._exit(0)\n"),
        ("argparse.py", "import os; os._exit(0)\n"),
        ("pytest.ini", "[pytest]\naddopts = --collect-only\n"),
        ("pyproject.toml", "[tool.pytest.ini_options]\naddopts = '--collect-only'\n"),
        ("setup.cfg", "[tool:pytest]\naddopts = --collect-only\n"),
    ],
    ids=lambda value: value if value.count("\n") == 0 else "",
)
async def test_no_file_in_the_workspace_decides_a_check(either: Any, path: str, content: str) -> None:
    await either.write_file("sums.py", WRONG)
    await either.write_file("test_sums.py", TESTS)
    await either.write_file(path, content)
    if path == "sitecustomize.py":
        either.sandbox.run("export PYTHONPATH=$PWD")
    assert either.sandbox.run(NAIVE).exit_code == 0, "fooled"
    result = await either.check({"test_sums.py": TESTS}, PYTEST, env=BARE)
    assert (result.exit_code, "1 failed" in result.output) == (1, True), result.output


#: As docs/verifiers.md has it: what judges never imports what is judged.
JUDGE = """\
import os, subprocess, sys

program = os.path.join(os.environ["WORKSPACE"], "sums.py")
done = subprocess.run([sys.executable, "-I", program, "2", "3"], capture_output=True, timeout=10)
sys.exit(done.stdout != b"5\\n")
"""


async def test_code_that_ends_the_process_of_its_test(either: Any) -> None:
    """pytest can't tell; a program that looks from outside can."""
    await either.write_file("sums.py", 'print("1 passed in 0.01s"); import os; os._exit(0)\n')
    assert (await either.check({"test_sums.py": TESTS}, PYTEST, env=BARE)).exit_code == 0, "fooled"
    judged = {"judge.py": JUDGE}
    assert (await either.check(judged, ["python", "-I", "judge.py"])).exit_code == 1
    await either.write_file("sums.py", "import sys\nprint(int(sys.argv[1]) + int(sys.argv[2]))\n")
    assert (await either.check(judged, ["python", "-I", "judge.py"])).exit_code == 0


async def test_where_a_check_runs(task: Any, tmp_path: Path) -> None:
    (tmp_path / "hidden" / "deep").mkdir(parents=True)
    (tmp_path / "hidden" / "deep" / "x").write_text("x")
    (tmp_path / "run.sh").write_text("#!/bin/sh\necho ran\n")
    (tmp_path / "run.sh").chmod(0o755)
    files = {"a/b.txt": "text", "raw": b"\xff", "hidden": tmp_path / "hidden", "bin/run": tmp_path / "run.sh"}
    shown = "find . -type f | sort; bin/run; stat -c %a . a a/b.txt bin/run; pwd; ls -A ~"
    result = await task.check(files, shown)
    assert result.exit_code == 0, result.output
    assert result.output.split()[:-1] == (
        ["./a/b.txt", "./bin/run", "./hidden/deep/x", "./raw", "ran", "555", "555", "444", "555"]
    )
    folder = Path(result.output.split()[-1])
    assert not await asyncio.to_thread(folder.exists)
    assert folder.parents[2] == Path(os.environ["TMPDIR"]), "not in a folder of the task's"


async def test_a_check_on_a_copy(task: Any, tmp_path: Path) -> None:
    solution = tmp_path / "solution.txt"
    solution.write_text("42\n")
    await task.write_file("honest.txt", "41\n")
    task.sandbox.run(f"ln -s {solution} answer.txt; mkfifo pipe; ln -s honest.txt also")
    command = 'cd "$WORKSPACE"; cat answer.txt; cat also; ls; stat -c %a . honest.txt'
    assert "42" in (await task.terminal("cat answer.txt")).output, "fooled: the link leads to a file of the trainer"
    result = await task.check({}, command, copy=True)
    assert "42" not in result.output
    assert result.output.splitlines()[1:] == ["41", "also", "honest.txt", "555", "444"]
    task.sandbox.run("truncate -s 1T huge")
    with pytest.raises(FileTooLargeError):
        await task.check({}, command, copy=True)
    assert (await task.check({}, 'echo > "$WORKSPACE/written"')).exit_code == 0
    assert await task.read_bytes("written") == b"\n"


async def test_what_a_check_left_running_ends_with_it(task: Any) -> None:
    result = await task.check(
        {}, "setsid sleep 1000 >/dev/null 2>&1 & (cd ~; env -i setsid sleep 1001 >/dev/null 2>&1 &)"
    )
    assert (result.exit_code, processes()) == (0, {})
    late = await task.check({}, ["sleep", "1000"], timeout=0.2)
    assert (late.exit_code, late.limit) == (124, Limit.TIME)


async def test_limits_of_a_check_behind_the_wall() -> None:
    async with agent_saying().task(sandbox="walled", limits=Limits(memory_bytes=100_000_000)) as task:
        late = await task.check({}, ["sleep", "1000"], timeout=0.2)
        assert (late.exit_code, late.limit) == (124, Limit.TIME)
        endless = await task.check({}, ["yes"], limit_bytes=1000)
        assert (endless.output, endless.exit_code, endless.limit) == ("y\n" * 500, 124, Limit.OUTPUT)
        starved = await task.check({}, "head -c 1G /dev/zero | tail")
        assert starved.exit_code != 0
        assert (starved.limit is Limit.MEMORY) is ("control group" in mechanisms()["memory"])


async def test_a_check_that_the_verifier_wrote_wrong(task: Any, tmp_path: Path) -> None:
    for files in ({"../x": ""}, {"/x": ""}, {"": ""}, {"x": tmp_path / "missing"}, {"x": "", "x/y": ""}):
        with pytest.raises(ConfigurationError, match="files="):
            await task.check(files, "true")
    with pytest.raises(SandboxError, match="'no-such-program' can't be started") as caught:
        await task.check({}, ["no-such-program"])
    assert not isinstance(caught.value, OSError), "no verifier takes it for the model's fault"
    assert (await task.check({}, "no-such-program")).exit_code == 127


def test_a_script_waits_for_a_check() -> None:
    with agent_saying(terminal("echo 42 > answer.txt"), "Done.").task() as task:
        assert isinstance(task._task, Task)
        task.run("Write the answer.")
        assert task.check({"expected": "42\n"}, 'cmp expected "$WORKSPACE/answer.txt"', copy=True).exit_code == 0
