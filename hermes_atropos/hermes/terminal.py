"""A task's sandbox: its workspace and its terminal, lent to Hermes' tools and to the verifier, always released.

Hermes keeps one terminal environment per process unless a task registers its own. A sandbox does that, under the task's
id, so that one task never sees another's exports, working directory or background processes. Where Hermes' backend is
``local``, the environment is a subclass of Hermes' own that starts in about a millisecond, gives the task a home and a
folder for temporary files of its own, and ends every process that it started. Environments of other backends
(``TERMINAL_ENV``: docker, modal, …) are opened by Hermes itself at the first command.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import functools
import json
import os
import re
import select
import shlex
import shutil
import signal
import subprocess
import tempfile
import termios
import threading
import time
import uuid
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

from tools import terminal_tool
from tools.environments import local
from tools.environments.local import LocalEnvironment
from tools.interrupt import is_interrupted, set_interrupt
from tools.process_registry import process_registry

from hermes_atropos.errors import SandboxError, WorkspaceError
from hermes_atropos.hermes.seams import rebound
from hermes_atropos.hermes.spawn import Popen
from hermes_atropos.runtime import Turnstile, run_in_rollout_thread, turnstile

try:
    from agent import runtime_cwd
except ImportError:
    runtime_cwd = None

__all__ = ["CommandResult", "Sandbox"]

T = TypeVar("T")

#: In the environment of every process of a sandbox, so that strays are found whatever session they moved to.
MARKER = "HERMES_ATROPOS_SANDBOX"

#: Seconds between SIGTERM and SIGKILL, so that a cancelled tool is gone within a second.
GRACE = 0.2

#: Seconds that a process may take to load a program, on a machine that is very busy.
LOADING = 1.0

#: Seconds for which a command is waited for without a look at anything else.
BRIEFLY = 0.1

#: Bytes of output that are read at once; Hermes bounds longer ones.
LITTLE = 4096

#: What a shell runs for a command. The marker comes last: where it is, all before it has been written.
SCRIPT = """\
source {snapshot} >/dev/null 2>&1 || true
builtin cd -- {cwd} || exit 126
eval {command}
__hermes_ec=$?
umask 077
builtin export -p > {snapshot}.tmp.$$
builtin printf '\\n{marker}'
builtin pwd -P 2>/dev/null
builtin printf '{marker}\\n'
exit $__hermes_ec
"""

#: Where a command starts and has its first ``BRIEFLY`` seconds: more short ones at once than the processors can run
#: would only get in each other's way.
commands = Turnstile(4 * (os.cpu_count() or 1))

_in_use: dict[Path, str] = {}
_open_tasks: set[str] = set()
_in_use_lock = threading.Lock()
_login_lock = threading.Lock()


@dataclass(frozen=True, slots=True)
class CommandResult:
    """What a command left: its output (stdout and stderr as one text) and its exit code."""

    output: str
    exit_code: int


@functools.lru_cache(maxsize=8)
def find_bash(_path: str | None) -> str:
    """The shell that Hermes finds along this PATH: it looks into each of the folders for each command."""
    found: str = local._find_bash()
    return found


class TaskEnvironment(LocalEnvironment):
    """Hermes' local environment, closed by its sandbox alone.

    With a ``root`` it is private: the home and the temporary files lie there, and the shell starts from what a login
    shell with an empty home adds, found once per process. Without, it starts from the user's login shell as always.
    """

    def __init__(self, name: str, cwd: Path, root: Path | None) -> None:
        self._open = True
        self._root = root
        self._login = threading.Lock()
        self._logged_in = False
        variables = {MARKER: name}
        if root is not None:
            variables |= {"HOME": str(root / "home"), "TMPDIR": str(root / "tmp")}
        super().__init__(cwd=str(cwd), timeout=terminal_tool._get_env_config()["timeout"], env=variables)

    def init_session(self) -> None:
        """Hermes starts a login shell here, which takes a while: the user's own is started at the first command."""
        if self._root is not None:
            # What Hermes notes there of the session that it is at differs from run to run, and is no part of a shell.
            environ = {name: value for name, value in os.environ.items() if not name.startswith("HERMES_SESSION")}
            with _login_lock:
                snapshot = login_snapshot(tuple(sorted(environ.items())))
            Path(self._snapshot_path).write_text(snapshot, encoding="utf-8")
            self._snapshot_ready = self._logged_in = True

    def execute(self, *args: Any, **options: Any) -> dict[str, Any]:
        with self._login:
            if not self._logged_in:
                super().init_session()
                self._logged_in = True
        with turnstile.outside():
            commands.enter()
        try:
            if is_interrupted():  # while it waited
                return {"output": "\n[Command interrupted]", "returncode": 130}
            result: dict[str, Any] = super().execute(*args, **options)
            return result
        finally:
            commands.leave()

    def cleanup(self) -> None:
        """Hermes calls this after each run, for idle environments and at a subagent's end: all before the verifier."""
        if not self._open:
            super().cleanup()

    def release(self) -> None:
        """End every process of the environment and remove its files."""
        self._open = False
        kill_processes(self.env[MARKER], self._root)
        self.cleanup()

    def _wrap_command(self, command: str, cwd: str) -> str:
        """The script that runs a command in the shell as the last one left it, and notes how this one leaves it.

        As Hermes' own, but for two processes: the variables are written to a file that ``_wait_for_process`` moves to
        its place, and the folder is told without a subshell. They would take a quarter of a short command's time.
        """
        if not self._snapshot_ready:  # the user's login shell cannot be started
            script: str = super()._wrap_command(command, cwd)
            return script
        return SCRIPT.format(
            snapshot=shlex.quote(self._snapshot_path),
            cwd=self._quote_cwd_for_cd(cwd),
            command=shlex.quote(command),
            marker=self._cwd_marker,
        )

    def _wait_for_process(self, proc: Any, *args: Any, **options: Any) -> dict[str, Any]:
        with turnstile.outside():
            brief = brief_output(proc)
            commands.leave()
            result: dict[str, Any]
            if brief is None:
                result = super()._wait_for_process(proc, *args, **options)
            else:
                result = {"output": brief.decode(errors="replace"), "returncode": proc.wait()}
        written = Path(f"{self._snapshot_path}.tmp.{proc.pid}")
        with contextlib.suppress(FileNotFoundError):  # the command ended its shell
            if self._cwd_marker in result["output"]:
                written.replace(self._snapshot_path)
            else:
                written.unlink()
        return result

    # Hermes' own way of starting a command, by a Popen that does not stop the other threads meanwhile.
    _run_bash = rebound(
        LocalEnvironment._run_bash,
        subprocess=SimpleNamespace(**{**vars(subprocess), "Popen": Popen}),
        _find_bash=lambda: find_bash(os.environ.get("PATH")),
    )

    def _kill_process(self, proc: Any) -> None:
        """End a command's process group: SIGTERM, and SIGKILL for whatever is left after ``GRACE`` seconds."""
        group = getattr(proc, "_hermes_pgid", proc.pid)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(group, signal.SIGTERM)
            deadline = time.monotonic() + GRACE
            while time.monotonic() < deadline:
                proc.poll()
                os.killpg(group, 0)
                time.sleep(0.01)
            os.killpg(group, signal.SIGKILL)
        proc.wait(timeout=1)


def brief_output(proc: Any) -> bytes | None:
    """The output of a command that ends within ``BRIEFLY`` and says little; None of others, with nothing read.

    For any command Hermes starts a thread that reads, and looks again and again whether it has ended, at first each
    5 ms: among hundreds of commands that takes the interpreter from those who need it.
    """
    if not hasattr(os, "pidfd_open"):
        return None
    with contextlib.suppress(OSError):
        process = os.pidfd_open(proc.pid)
        try:
            ended = polled(process, select.POLLIN, BRIEFLY)
        finally:
            os.close(process)
        if ended and polled(proc.stdout, 0, 0) & select.POLLHUP:  # else something in the background may write yet
            unread = array("i", [0])
            fcntl.ioctl(proc.stdout, termios.FIONREAD, unread)
            if unread[0] <= LITTLE:
                with proc.stdout:
                    return bytes(proc.stdout.buffer.read())
    return None


def polled(file: Any, events: int, limit_s: float) -> int:
    """What poll(2) says of a file within so many seconds; 0 if nothing."""
    poll = select.poll()
    poll.register(file, events)
    return next((event for _, event in poll.poll(limit_s * 1000)), 0)


@functools.lru_cache(maxsize=8)
def login_snapshot(environ: tuple[tuple[str, str], ...]) -> str:
    """What a login shell with an empty home adds to ``environ``, as the lines that restore it in a later shell.

    What differs from task to task is left out: it comes with each process instead.
    """
    script = "export -p; alias -p; echo 'shopt -s expand_aliases'; echo 'set +e'; echo 'set +u'"
    with tempfile.TemporaryDirectory() as home:
        shell = subprocess.run(
            ["bash", "-l", "-c", script],
            env=dict(environ, HOME=home),
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        )
    own = re.compile(rf"declare -x (HOME|TMPDIR|PWD|OLDPWD|SHLVL|_|{MARKER})(=|$)")
    return "".join(line for line in shell.stdout.splitlines(keepends=True) if not own.match(line))


def kill_processes(name: str, root: Path | None) -> None:
    """End every process that carries the sandbox's mark or works in its own folder, until a look finds none.

    Sessions and parents don't tell: processes leave them. The mark is inherited; a process that has shed its
    environment is found where it works. Not by a workspace that was given: others, the user's shell say, may work in
    it. One that is loading a program shows no environment, and is looked at again, for ``LOADING`` seconds at most.
    """
    deadline = time.monotonic() + LOADING
    mark, own = f"{MARKER}={name}".encode(), str(os.getpid())
    pids = running()
    while pids:
        killed, loading = False, []
        for pid in pids:
            with contextlib.suppress(OSError):  # gone meanwhile, or another user's
                with open(f"/proc/{pid}/environ", "rb", buffering=0) as environ:
                    variables = environ.read()
                within = root is not None and f"{os.readlink(f'/proc/{pid}/cwd')}/".startswith(f"{root}/")
                if pid != own and (mark in variables or within):
                    os.kill(int(pid), signal.SIGKILL)
                    killed = True
                elif not variables and not is_bare(pid):
                    loading.append(pid)
        pids = running() if killed else loading if time.monotonic() < deadline else []


def running() -> list[str]:
    """The ids of all processes; none where the system does not tell."""
    return [pid for pid in os.listdir("/proc") if pid.isdigit()] if os.path.isdir("/proc") else []


def is_bare(pid: str) -> bool:
    """Whether a process has no environment for good, and not just because it is amid ``execve``."""
    with open(f"/proc/{pid}/stat", "rb", buffering=0) as stat:
        fields = stat.read().rpartition(b")")[2].split()
    memory, code, start, end = fields[20], fields[23], fields[47], fields[48]  # 23, 26, 50 and 51 in proc(5)
    # The kernel sets where the code lies last, once the environment is there.
    return memory == b"0" or (code != b"0" and start == end)


class Sandbox:
    """One task's workspace and terminal, released by :meth:`release` once nothing of the task runs any more.

    Args:
        task_id: its name; a new one by default. Hermes' tools find it under ``hermes_id``.
        workspace: the folder in which the tools act, used as it is; None makes a fresh one that goes with the sandbox.
        copy: act in a copy of ``workspace`` that goes with the sandbox.
        private: give it a home and temporary files of its own, and the workspace to it alone.

    Raises:
        WorkspaceError: ``workspace`` is no folder, or another open sandbox acts in it.
        SandboxError: a sandbox with this task id is open already.
    """

    def __init__(
        self,
        task_id: str | None = None,
        workspace: str | os.PathLike[str] | None = None,
        *,
        copy: bool = False,
        private: bool = True,
    ) -> None:
        self.task_id = task_id or f"task-{uuid.uuid4().hex[:12]}"
        self._name = f"{os.getpid()}-{uuid.uuid4().hex[:12]}"
        # Hermes' file tools remember what a task has read, by its id, for good; a name may be used again.
        self.hermes_id = f"{self.task_id}-{uuid.uuid4().hex[:8]}"
        self._ids = {self.hermes_id}
        self._released = False
        self._lock = threading.Lock()
        source = None if workspace is None else existing_folder(workspace)
        self._claimed = source if private and not copy else None
        claim(self._claimed, self.task_id)
        self._root: Path | None = None
        try:
            if private:
                self._root = Path(tempfile.mkdtemp(prefix="hermes-atropos-")).resolve()
            self.workspace = self._make_workspace(source, copy)
            self._environment = self._open_environment()
        except BaseException:
            self._discard_files()
            raise
        self.lend(self.hermes_id)

    def _make_workspace(self, source: Path | None, copy: bool) -> Path:
        if self._root is None:
            return source or Path.cwd()
        for name in ("home", "tmp"):
            (self._root / name).mkdir()
        if source is not None and not copy:
            return source
        workspace = self._root / "workspace"
        if source is None:
            workspace.mkdir()
        else:
            shutil.copytree(source, workspace, symlinks=True)
        return workspace

    def _open_environment(self) -> TaskEnvironment | None:
        if terminal_tool._get_env_config()["env_type"] != "local":
            return None  # Hermes opens it at the first command
        return TaskEnvironment(self._name, self.workspace, self._root)

    def lend(self, task_id: str) -> None:
        """Let ``task_id`` (this task's, or a subagent's of it) find the sandbox; called again, it renews the claim."""
        with self._lock:
            if self._released:
                raise SandboxError(f"The sandbox of task {self.task_id!r} has been released.")
            if task_id not in terminal_tool._task_env_overrides:
                overrides = {"cwd": str(self.workspace), "env_type": terminal_tool._get_env_config()["env_type"]}
                terminal_tool.register_task_env_overrides(task_id, overrides)
                self._ids.add(task_id)
            if self._environment is not None:
                # Hermes' reaper takes environments that no command used for a while out of this register.
                with terminal_tool._env_lock:
                    terminal_tool._active_environments[task_id] = self._environment
                    terminal_tool._last_activity[task_id] = time.time()

    def release(self) -> None:
        """End the task's processes, take its environment from Hermes, remove its files. Again is harmless."""
        with self._lock:
            if self._released:
                return
            self._released = True
        for task_id in self._ids:
            process_registry.kill_all(task_id=task_id)
        if self._environment is not None:
            self._environment.release()
        for task_id in self._ids:
            terminal_tool.cleanup_vm(task_id)
            terminal_tool.clear_task_env_overrides(task_id)
        self._discard_files()

    def _discard_files(self) -> None:
        claim_end(self._claimed, self.task_id)
        if self._root is not None:
            shutil.rmtree(self._root, onerror=make_writable_and_retry)

    @property
    def steps_out(self) -> bool:
        """Whether a thread that waits for a command here leaves its place at the turnstile to others meanwhile."""
        return self._environment is not None

    def environment(self) -> Any:
        """The Hermes environment in which the task's commands run.

        Raises:
            SandboxError: the sandbox is released, or a remote backend could not be opened.
        """
        if self._released:
            raise SandboxError(f"The sandbox of task {self.task_id!r} has been released.")
        if self._environment is not None:
            return self._environment
        found = terminal_tool.get_active_env(self.hermes_id)
        if found is None:
            answer = json.loads(terminal_tool.terminal_tool(command="true", task_id=self.hermes_id, force=True))
            found = terminal_tool.get_active_env(self.hermes_id)
            if found is None:
                raise SandboxError(f"The terminal backend could not be opened: {answer.get('error') or answer}")
        return found

    def run(self, command: str, *, timeout: float = 180.0) -> CommandResult:
        """Run a command in the task's shell, as the last one left it; exit code 124 after ``timeout`` seconds."""
        result = self.environment().execute(command, timeout=timeout)
        return CommandResult(result["output"], int(result["returncode"] or 0))

    def read_bytes(self, path: str) -> bytes:
        """A file of the task, by a path relative to the workspace.

        Raises:
            FileNotFoundError: there is no such file.
        """
        if self._environment is not None:
            return (self.workspace / path).read_bytes()
        result = self.run(f"cd {shlex.quote(str(self.workspace))} && base64 < {shlex.quote(path)}")
        if result.exit_code:
            raise FileNotFoundError(f"{path}: {result.output.strip()}")
        return base64.b64decode(result.output)

    def write_bytes(self, path: str, content: bytes) -> None:
        """Write a file of the task, by a path relative to the workspace; missing folders are made."""
        if self._environment is not None:
            target = self.workspace / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
            return
        quoted = shlex.quote(path)
        command = f'cd {shlex.quote(str(self.workspace))} && mkdir -p "$(dirname {quoted})" && base64 -d > {quoted}'
        result = self.environment().execute(command, stdin_data=base64.b64encode(content).decode())
        if result["returncode"]:
            raise SandboxError(f"{path} could not be written: {result['output'].strip()}")

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """For the length of the block, this thread's Hermes takes the workspace for the current folder.

        Releases before 0.16 have no current folder of their own: there the system prompt names the process's.
        """
        self.lend(self.hermes_id)
        if self._environment is None or runtime_cwd is None:
            yield
            return
        token = runtime_cwd.set_session_cwd(str(self.workspace))
        try:
            yield
        finally:
            runtime_cwd._SESSION_CWD.reset(token)

    async def call(self, function: Callable[[], T]) -> T:
        """Run one of this object's blocking methods on a rollout thread; a cancelled await ends the command."""
        thread: list[int] = []

        def body() -> T:
            thread.append(threading.get_ident())
            try:
                return function()
            finally:
                set_interrupt(False)

        return await run_in_rollout_thread(body, stop=lambda: [set_interrupt(True, ident) for ident in thread])


def existing_folder(path: str | os.PathLike[str]) -> Path:
    folder = Path(path).expanduser().resolve()
    if not folder.is_dir():
        raise WorkspaceError(
            f"The workspace {folder} is {'a file' if folder.exists() else 'missing'}: give a folder that exists, "
            "or None for a fresh one."
        )
    return folder


def claim(workspace: Path | None, task_id: str) -> None:
    """Two rollouts in one folder would train on each other's work."""
    with _in_use_lock:
        if task_id in _open_tasks:
            raise SandboxError(f"Task {task_id!r} has an open sandbox: release it first, or choose another id.")
        if workspace in _in_use:
            raise WorkspaceError(
                f"Task {_in_use[workspace]!r} acts in {workspace} already: "
                "give each rollout a folder of its own, or copy=True."
            )
        _open_tasks.add(task_id)
        if workspace is not None:
            _in_use[workspace] = task_id


def claim_end(workspace: Path | None, task_id: str) -> None:
    with _in_use_lock:
        _open_tasks.discard(task_id)
        if workspace is not None:
            _in_use.pop(workspace, None)


def make_writable_and_retry(function: Callable[[str], Any], path: str, _error: Any) -> None:
    """A task may have left folders without write permission."""
    with contextlib.suppress(OSError):
        os.chmod(os.path.dirname(path), 0o700)
        os.chmod(path, 0o700)
        function(path)
