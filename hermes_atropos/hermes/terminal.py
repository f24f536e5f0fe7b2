"""A task's sandbox for Hermes: the terminal environment in which Hermes' tools and the verifier act.

Hermes keeps one terminal environment per process unless a task registers its own. A sandbox registers one under the
task's id, so that one task never sees another's exports, working folder or background processes. Where Hermes' backend
is ``local``, the environment is a subclass of Hermes' own that starts in about a millisecond, has the task's own home
and temporary files, and ends every process that it started. The environments of other backends (``TERMINAL_ENV``:
docker, modal, …) are opened by Hermes itself at the first command.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import json
import os
import re
import shlex
import signal
import subprocess
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from tools import terminal_tool
from tools.environments.local import LocalEnvironment
from tools.interrupt import set_interrupt
from tools.process_registry import process_registry

from hermes_atropos.errors import SandboxError
from hermes_atropos.hermes import seams
from hermes_atropos.runtime import run_in_rollout_thread, turnstile
from hermes_atropos.sandbox import CommandResult, Sandbox
from hermes_atropos.sandbox.folder import Folders
from hermes_atropos.sandbox.processes import MARKER

__all__ = ["HermesSandbox"]

T = TypeVar("T")

#: Seconds between SIGTERM and SIGKILL, so that a cancelled tool is gone within a second.
GRACE = 0.2

#: What a shell runs for a command. The marker comes last: where it was printed, the variables have been written.
SCRIPT = """\
source {snapshot} >/dev/null 2>&1 || true
builtin cd -- {cwd} || exit 126
eval {command}
__hermes_ec=$?
umask 077
{{ builtin export -p > {snapshot}.tmp.$$; }} 2>/dev/null || command rm -f {snapshot}.tmp.$$
builtin printf '\\n{marker}'
builtin pwd -P 2>/dev/null
builtin printf '{marker}\\n'
exit $__hermes_ec
"""

_login_lock = threading.Lock()


class TaskEnvironment(LocalEnvironment):
    """Hermes' local environment in a task's folders, closed by its sandbox alone.

    In private folders the shell starts from what a login shell with an empty home adds, found once per process. In
    others it starts from the user's login shell, as Hermes' own does.
    """

    def __init__(self, folders: Folders) -> None:
        self._open = True
        self._private = folders.root is not None
        self._login = threading.Lock()
        self._logged_in = False
        super().__init__(
            cwd=str(folders.workspace), timeout=terminal_tool._get_env_config()["timeout"], env=folders.variables
        )
        seams.check_attributes(self, "LocalEnvironment")

    def init_session(self) -> None:
        """Hermes starts a login shell here, which is slow: the user's own is started at the first command instead."""
        if self._private:
            # Hermes notes its current session in the process's environment; a shell should not start from that.
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
        result: dict[str, Any] = super().execute(*args, **options)
        return result

    def cleanup(self) -> None:
        """Does nothing until :meth:`close`: Hermes calls this after each run, before the verifier has seen the task."""
        if not self._open:
            super().cleanup()

    def close(self) -> None:
        """Remove the environment's own files; its processes must have ended."""
        self._open = False
        self.cleanup()

    def _wrap_command(self, command: str, cwd: str) -> str:
        """The script that runs a command in the shell as the last one left it, and records how this one leaves it.

        Hermes' own starts two more processes, which cost a third more CPU time in the child: here the variables are
        written to a file that ``_wait_for_process`` renames, and the folder is printed without a subshell.
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
            result: dict[str, Any] = super()._wait_for_process(proc, *args, **options)
        written = Path(f"{self._snapshot_path}.tmp.{proc.pid}")
        with contextlib.suppress(FileNotFoundError):  # the command ended its shell
            if self._cwd_marker in result["output"]:
                written.replace(self._snapshot_path)
            else:
                written.unlink()
        return result

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


@functools.lru_cache(maxsize=8)
def login_snapshot(environ: tuple[tuple[str, str], ...]) -> str:
    """What a login shell with an empty home adds to ``environ``, as the lines that restore it in a later shell.

    What differs from task to task is left out, because each process gets it in its own environment.
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


class HermesSandbox(Sandbox):
    """One task's workspace and terminal, released by :meth:`release` once nothing of the task runs any more.

    Args:
        task_id: its name; a new one by default.
        workspace: the folder in which the tools act, used as it is; None makes a fresh one that goes with the sandbox.
        copy: act in a copy of ``workspace`` that goes with the sandbox.
        private: give it a home and temporary files of its own, and the workspace to it alone.

    Attributes:
        hermes_id: the task id by which Hermes' tools find the sandbox.

    Raises:
        WorkspaceError: ``workspace`` is not a folder, or another open sandbox acts in it.
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
        # Hermes' file tools remember for good what a task has read, by its id; the name may be used again.
        self.hermes_id = f"{self.task_id}-{uuid.uuid4().hex[:8]}"
        self._registered: set[str] = set()
        self._released = False
        self._lock = threading.Lock()
        self._folders = Folders(self.task_id, workspace, copy=copy, private=private)
        self.workspace = self._folders.workspace
        try:
            self._local = TaskEnvironment(self._folders) if backend() == "local" else None
        except BaseException:
            self._folders.remove()
            raise
        self.register(self.hermes_id)

    def register(self, task_id: str) -> None:
        """Let Hermes find the sandbox under ``task_id`` (this task's, or that of one of its subagents).

        Calling it again renews the registration: Hermes' reaper forgets environments that no command used for a while.

        Raises:
            SandboxError: the sandbox has been released.
        """
        with self._lock:
            self._check_open()
            if task_id not in self._registered:
                overrides = {"cwd": str(self.workspace), "env_type": backend()}
                terminal_tool.register_task_env_overrides(task_id, overrides)
                self._registered.add(task_id)
            if self._local is not None:
                with terminal_tool._env_lock:
                    terminal_tool._active_environments[task_id] = self._local
                    terminal_tool._last_activity[task_id] = time.time()

    def release(self) -> None:
        """End the task's processes, take its environment from Hermes, remove its files. Again is harmless."""
        with self._lock:
            if self._released:
                return
            self._released = True
        for task_id in self._registered:
            process_registry.kill_all(task_id=task_id)
        if self._local is not None:
            self._folders.kill_processes()
            self._local.close()
        for task_id in self._registered:
            seams.release().lifecycle().cleanup_vm(task_id)
            terminal_tool.clear_task_env_overrides(task_id)
        self._folders.remove()

    @property
    def steps_out(self) -> bool:
        """Whether a thread that waits for a command here leaves its place at the turnstile to others meanwhile."""
        return self._local is not None

    def environment(self) -> Any:
        """The Hermes environment in which the task's commands run.

        Raises:
            SandboxError: the sandbox has been released, or a remote backend could not be opened.
        """
        self._check_open()
        if self._local is not None:
            return self._local
        get_active_env = seams.release().lifecycle().get_active_env
        found = get_active_env(self.hermes_id)
        if found is None:
            answer = json.loads(terminal_tool.terminal_tool(command="true", task_id=self.hermes_id, force=True))
            found = get_active_env(self.hermes_id)
            if found is None:
                raise SandboxError(f"The terminal backend could not be opened: {answer.get('error') or answer}")
        return found

    def _check_open(self) -> None:
        if self._released:
            raise SandboxError(f"The sandbox of task {self.task_id!r} has been released.")

    def run(self, command: str, *, timeout: float = 180.0) -> CommandResult:
        result = self.environment().execute(command, timeout=timeout)
        return CommandResult(result["output"], int(result["returncode"] or 0))

    def read_bytes(self, path: str) -> bytes:
        if self._local is not None:
            return (self.workspace / path).read_bytes()
        result = self.run(f"cd {shlex.quote(str(self.workspace))} && base64 < {shlex.quote(path)}")
        if result.exit_code:
            raise FileNotFoundError(f"{path}: {result.output.strip()}")
        return base64.b64decode(result.output)

    def write_bytes(self, path: str, content: bytes) -> None:
        if self._local is not None:
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
        """For the length of the block, Hermes takes the workspace for the current folder on this thread."""
        self.register(self.hermes_id)
        with seams.release().current_folder(self.workspace) if self._local else contextlib.nullcontext():
            yield

    async def call(self, function: Callable[[], T]) -> T:
        thread: list[int] = []

        def body() -> T:
            thread.append(threading.get_ident())
            try:
                return function()
            finally:
                thread.clear()
                set_interrupt(False)

        return await run_in_rollout_thread(body, stop=lambda: [set_interrupt(True, ident) for ident in thread])


def backend() -> str:
    """The terminal backend that Hermes is configured for: ``local``, ``docker``, …"""
    name: str = terminal_tool._get_env_config()["env_type"]
    return name
