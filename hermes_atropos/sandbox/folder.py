"""A task in folders of this machine: its workspace, a home and temporary files of its own, and its shells."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import threading
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path

from hermes_atropos.errors import SandboxError, WorkspaceError
from hermes_atropos.sandbox.files import hidden_folder, remove_folder
from hermes_atropos.sandbox.processes import MARKER, kill_processes
from hermes_atropos.sandbox.shell import COMMAND, SCRIPTS, Launcher

__all__ = ["FolderLauncher", "Folders"]

#: The open tasks, and the workspace that each keeps to itself.
_open_tasks: dict[str, Path | None] = {}
_lock = threading.Lock()


class Folders:
    """A task's folders and the processes that work with them, claimed for this task until :meth:`remove`.

    Args:
        task_id: the task's name.
        workspace: the folder in which the tools act, used as it is; None makes a fresh one, which is removed with the
            others. Without ``private``, None is the current folder.
        copy: act in a copy of ``workspace``, which is removed with the others.
        private: make a home and a folder for temporary files, and let no other private task use the workspace.

    Attributes:
        root: holds the folders that were made; None if not ``private``.
        variables: what the environment of each of the task's processes must hold.

    Raises:
        WorkspaceError: ``workspace`` is not a folder, or another open task acts in it.
        SandboxError: a task with this name is open.
    """

    def __init__(self, task_id: str, workspace: str | os.PathLike[str] | None, *, copy: bool, private: bool) -> None:
        source = None if workspace is None else existing_folder(workspace)
        self._task_id = task_id
        claim(task_id, source if private and not copy else None)
        self.variables = {MARKER: f"{os.getpid()}-{uuid.uuid4().hex[:12]}"}
        self.root: Path | None = None
        try:
            if private:
                self.root = hidden_folder()
                # All within the home, so that each has a path without the name of the root: ~/workspace, ~/tmp.
                home = self.root / "home"
                for variable, folder in (("HOME", home), ("TMPDIR", home / "tmp")):
                    folder.mkdir()
                    self.variables[variable] = str(folder)
            self.workspace = self._make_workspace(source, copy)
        except BaseException:
            self.remove()
            raise

    def _make_workspace(self, source: Path | None, copy: bool) -> Path:
        if self.root is None:
            return source or Path.cwd()
        if source is not None and not copy:
            return source
        workspace = self.root / "home" / "workspace"
        if source is None:
            workspace.mkdir()
        else:
            shutil.copytree(source, workspace, symlinks=True)
        return workspace

    def kill_processes(self) -> None:
        """End every process that was started with :attr:`variables`, and whatever came of it."""
        kill_processes(self.variables[MARKER], self.root)

    def remove(self) -> None:
        """Remove the folders that were made; the task's name and its workspace are free again."""
        with _lock:
            _open_tasks.pop(self._task_id, None)
        if self.root is not None:
            remove_folder(self.root.parent)


class FolderLauncher(Launcher):
    """Starts shells as processes of this machine.

    Args:
        channel: a folder for the pipes, which is made if it is missing.
        bash: the program.
        environ: makes a shell's environment.
    """

    def __init__(self, channel: Path, bash: str, environ: Callable[[], Mapping[str, str]]) -> None:
        channel.mkdir(mode=0o700, exist_ok=True)
        self.channel = channel
        self.channel_inside = str(channel)
        self._command = [bash, *COMMAND, str(channel)]
        self._environ = environ
        self._started: list[subprocess.Popen[bytes]] = []

    def start(self, name: str) -> None:
        self._started = [shell for shell in self._started if shell.poll() is None]
        with (
            open(self.channel / f"{name}.requests", "rb", buffering=0) as requests,
            open(self.channel / f"{name}.replies", "wb", buffering=0) as replies,
        ):
            shell = subprocess.Popen(
                self._command,
                stdin=requests,
                stdout=replies,
                stderr=subprocess.DEVNULL,
                env={**self._environ(), **SCRIPTS},
                cwd="/",
                start_new_session=True,
            )
        self._started.append(shell)

    def kill(self, process: int, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(process, number)

    def wait(self) -> None:
        """Wait for the ends of the shells, which must have been killed."""
        for shell in self._started:
            shell.wait()


def existing_folder(path: str | os.PathLike[str]) -> Path:
    """The absolute path of a folder, without links."""
    folder = Path(path).expanduser().resolve()
    if not folder.is_dir():
        raise WorkspaceError(
            f"The workspace {folder} is {'a file' if folder.exists() else 'missing'}: give a folder that exists, "
            "or None for a fresh one."
        )
    return folder


def claim(task_id: str, workspace: Path | None) -> None:
    """Reserve a task's name and its workspace: two rollouts in one folder would train on each other's work."""
    with _lock:
        if task_id in _open_tasks:
            raise SandboxError(f"Task {task_id!r} has an open sandbox: release it first, or choose another id.")
        for other, kept in _open_tasks.items():
            if kept is not None and kept == workspace:
                raise WorkspaceError(
                    f"Task {other!r} acts in {workspace} already: give each rollout a folder of its own, or copy=True."
                )
        _open_tasks[task_id] = workspace
