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
import json
import os
import shlex
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from tools import terminal_tool
from tools.interrupt import is_interrupted, set_interrupt
from tools.process_registry import process_registry

from hermes_atropos.errors import FileTooLargeError, SandboxError
from hermes_atropos.hermes import seams
from hermes_atropos.hermes.environments import InShells, TaskEnvironment
from hermes_atropos.hermes.profile import active_profile
from hermes_atropos.hermes.releases import release
from hermes_atropos.runtime import run_in_rollout_thread, turnstile
from hermes_atropos.sandbox import CommandResult, Sandbox, files
from hermes_atropos.sandbox.check import Check, run_here
from hermes_atropos.sandbox.folder import Folders
from hermes_atropos.sandbox.processes import MARKER

__all__ = ["HermesSandbox"]

T = TypeVar("T")

#: Where a verifier's programs are looked for on another machine, unless its ``env`` says otherwise.
REMOTE_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


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
        seams.check()
        self.task_id = task_id or f"task-{uuid.uuid4().hex[:12]}"
        # Hermes remembers tasks by their ids, some of it for good; the name may be used again.
        self.hermes_id = f"{self.task_id}-{uuid.uuid4().hex[:8]}"
        self._registered: set[str] = set()
        self._released = False
        self._lock = threading.Lock()
        self._folders = Folders(self.task_id, workspace, copy=copy, private=private)
        self.workspace = self._folders.workspace
        try:
            self._local = self._open_environment()
        except BaseException:
            self._folders.remove()
            raise
        self.register(self.hermes_id)

    def _open_environment(self) -> InShells | None:
        """The environment that is this library's own; None leaves it to Hermes."""
        return TaskEnvironment(self._folders) if backend() == "local" else None

    @property
    def root(self) -> Path | None:
        """The folder that holds all of the task's own folders; None if it has none."""
        return self._folders.root

    @property
    def inside(self) -> str:
        """The workspace's path to the task's commands."""
        return str(self.workspace)

    def register(self, task_id: str) -> None:
        """Let Hermes find the sandbox under ``task_id`` (this task's, or that of one of its subagents).

        Calling it again renews the registration: Hermes' reaper forgets environments that no command used for a while.

        Raises:
            SandboxError: the sandbox has been released.
        """
        with self._lock:
            self._check_open()
            if task_id not in self._registered:
                overrides = {"cwd": self.inside, "env_type": backend()}
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
        if self._local is not None:
            self._end()
        # Elsewhere this may take seconds, for which nobody else is to wait.
        with turnstile.first() if self._local is not None else contextlib.nullcontext():
            self._tell_hermes_of_the_end()
            for task_id in self._registered:
                release().lifecycle().cleanup_vm(task_id)
                release().forget(task_id)
                terminal_tool.clear_task_env_overrides(task_id)
            self._folders.remove()

    def _end(self) -> None:
        assert self._local is not None
        self._folders.kill_processes()
        with turnstile.first():
            self._local.close()

    def _tell_hermes_of_the_end(self) -> None:
        """Have Hermes note that the task's background processes have ended, and end those that it has elsewhere.

        It would terminate each and wait for it, which takes seconds where a process doesn't listen: ours are killed
        before.
        """
        for task_id in self._registered:
            for process in process_registry.list_sessions(task_id=task_id):
                process_registry.poll(process["session_id"])
            process_registry.kill_all(task_id=task_id)

    @property
    def home(self) -> str | None:
        """The home of the task's shell, where that is a folder of this machine and not the user's own."""
        return self._folders.variables.get("HOME") if self._local is not None else None

    def as_told(self, prompt: str) -> str:
        """A system prompt without what differs from rollout to rollout: servers keep the prefix that prompts share.

        Hermes names the trainer's home, the sandbox's path and its own private home. ``~``, ``~/workspace`` and
        ``~/tmp`` are what the task's shell and Hermes' file tools take for the task's folders, in every rollout.
        """
        if self.home is None:
            return prompt
        told = {self.home: "~", f"User home directory: {os.path.expanduser('~')}\n": "User home directory: ~\n"}
        profile = active_profile()
        if profile is not None:  # from 0.21, Hermes' home has a folder for temporary files, said to be TMPDIR
            told |= {f"{profile}/cache/scratch": "~/tmp", str(profile): "~/.hermes"}
        for path, name in told.items():
            prompt = prompt.replace(path, name)
        return prompt

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
        get_active_env = release().lifecycle().get_active_env
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

    def verify(self, check: Check) -> CommandResult:
        self._check_open()
        if self._local is not None:
            mark = f"{self._folders.variables[MARKER]}.{uuid.uuid4().hex[:8]}"
            return run_here(check, mark=mark, stopped=is_interrupted)
        if check.files is not None or check.workspace != self.workspace:
            raise SandboxError(
                f"Hermes' backend {backend()!r} has no check() with files or copies of its own: use task.terminal()"
            )
        return self._verify_apart(check)

    def _verify_apart(self, check: Check) -> CommandResult:
        """Run a check's program among the task's processes, apart from the model's shell."""
        exports = "".join(f"export {shlex.quote(f'{name}={value}')}; " for name, value in check.env.items())
        return self.run(self._apart(f"{exports}exec {shlex.join(check.command)}"), timeout=check.timeout)

    def _apart(self, script: str) -> str:
        """A command for the model's shell that runs ``script`` in the workspace, apart from that shell."""
        return apart(f"cd {shlex.quote(self.inside)} && {{ {script}\n}}")

    def stop_processes(self) -> None:
        self._check_open()
        if self._local is not None:
            self._folders.kill_processes()
        self._tell_hermes_of_the_end()

    def read_bytes(self, path: str, limit_bytes: int = files.LIMIT_BYTES) -> bytes:
        if self._local is not None:
            self._check_open()
            return files.read_bytes(self.workspace, path, limit_bytes)
        quoted = shlex.quote(path)
        read = f"test -f {quoted} && head -c {limit_bytes + 1} -- {quoted} | base64"
        result = self.run(self._apart(read))
        if result.exit_code:
            raise FileNotFoundError(f"{path}: {result.output.strip() or 'there is no such regular file'}")
        content = base64.b64decode(result.output)
        if len(content) > limit_bytes:
            raise FileTooLargeError(f"{path!r} has more than limit_bytes={limit_bytes:,}")
        return content

    def write_bytes(self, path: str, content: bytes) -> None:
        if self._local is not None:
            self._check_open()
            files.write_bytes(self.workspace, path, content)
            return
        quoted = shlex.quote(path)
        command = self._apart(f'mkdir -p "$(dirname {quoted})" && base64 -d > {quoted}')
        result = self.environment().execute(command, stdin_data=base64.b64encode(content).decode())
        if result["returncode"]:
            raise SandboxError(f"{path} could not be written: {result['output'].strip()}")

    def keep(self, content: bytes) -> str:
        """Write a long result among the temporary files, where the model can read it and no verifier trips over it."""
        temporary, name = Path(self.environment().get_temp_dir()), f"results/{uuid.uuid4().hex[:12]}.txt"
        if self._local is None:
            self.write_bytes(f"{temporary}/{name}", content)
        else:
            files.write_bytes(temporary.parent, f"{temporary.name}/{name}", content)
        return f"{temporary}/{name}"

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """For the length of the block, Hermes takes the workspace for the current folder on this thread."""
        self.register(self.hermes_id)
        with release().current_folder(self.workspace) if self._local else contextlib.nullcontext():
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


def apart(script: str) -> str:
    """A command by which a bash runs ``script`` in another, without a variable, alias or function of its own.

    A backslash keeps the first word from being an alias, ``exec -c`` clears the environment before anything is loaded.
    """
    fresh = f'export PATH={REMOTE_PATH} HOME="$(mktemp -d)" LANG=C.UTF-8 TERM=dumb\n{script}'
    return f"( \\builtin exec -c /bin/bash --noprofile --norc -c {shlex.quote(fresh)} )"


def backend() -> str:
    """The terminal backend that Hermes is configured for: ``local``, ``docker``, …"""
    return terminal_tool._get_env_config()["env_type"]
