"""A task's sandbox for Hermes behind a wall: see :mod:`hermes_atropos.sandbox.wall` for what the wall is."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import shlex
import shutil
import signal
import time
import uuid
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Unpack

from tools.interrupt import is_interrupted
from tools.process_registry import process_registry

from hermes_atropos.errors import ConfigurationError, SandboxError
from hermes_atropos.hermes import confined
from hermes_atropos.hermes.environments import WalledEnvironment
from hermes_atropos.hermes.releases import release
from hermes_atropos.hermes.terminal import HermesSandbox, backend
from hermes_atropos.sandbox import CommandResult, Limit
from hermes_atropos.sandbox.check import Check
from hermes_atropos.sandbox.folder import existing_folder
from hermes_atropos.sandbox.overlay import Overlay
from hermes_atropos.sandbox.shell import Request, Shells
from hermes_atropos.sandbox.wall import CHECK, HOME, WORKSPACE, Wall, WallArguments, WallOptions

__all__ = ["WalledSandbox", "open_sandbox"]

logger = logging.getLogger(__name__)


def open_sandbox(
    task_id: str | None,
    workspace: str | os.PathLike[str] | None,
    *,
    copy: bool,
    tools: Collection[str],
    sandbox: str = "folder",
    **wall: Unpack[WallArguments],
) -> HermesSandbox:
    """The sandbox that a task asks for.

    Args:
        tools: the names of the tools that will act in it.
        sandbox: ``folder`` or ``walled``.
        wall: for ``walled`` alone.

    Raises:
        ConfigurationError: there is no such sandbox, or it can't be as it is asked for.
        SandboxUnavailableError: this machine can't have the wall.
        WorkspaceError, SandboxError: as for ``HermesSandbox``.
    """
    if sandbox == "walled":
        options = WallOptions(**wall)
        confined.check_tools(tools, options.outside)
        return WalledSandbox(task_id, workspace, copy=copy, options=options)
    if sandbox != "folder":
        raise ConfigurationError(f"sandbox={sandbox!r}: write 'walled' or 'folder'")
    if wall:
        raise ConfigurationError(f"{', '.join(wall)}: only sandbox='walled' has that")
    return HermesSandbox(task_id, workspace, copy=copy)


class WalledSandbox(HermesSandbox):
    """A task's workspace and terminal behind a wall.

    Args:
        task_id, workspace, copy: as for ``HermesSandbox``.
        options: what the wall lets through.

    Raises:
        SandboxUnavailableError: the wall can't stand on this machine.
        ConfigurationError: Hermes is configured for a backend of its own.
    """

    def __init__(
        self,
        task_id: str | None = None,
        workspace: str | os.PathLike[str] | None = None,
        *,
        copy: bool = False,
        options: WallOptions | None = None,
    ) -> None:
        self._options = options or WallOptions()
        self._overlay: Overlay | None = None
        self._shown = existing_folder(workspace) if copy and workspace is not None else None
        super().__init__(task_id, None if self._shown else workspace)

    def _open_environment(self) -> WalledEnvironment:
        if backend() != "local":
            raise ConfigurationError(
                f"Hermes is configured for its backend {backend()!r} (TERMINAL_ENV): unset it for sandbox='walled'"
            )
        assert self._folders.root is not None
        own = self._folders.root / "wall"
        self._nothing = own / "nothing"  # Hermes looks on this machine for what a project tells its agents
        self._nothing.mkdir(parents=True)
        self._mounted = self.workspace  # where walls are started
        self._enter: Sequence[str] = ()  # and how
        with contextlib.ExitStack() as undone:
            if self._shown is not None:
                self._show(self._shown, self._folders.root / "overlay")
            if self._overlay is not None:
                undone.callback(self._overlay.close)
            self._wall = Wall(own, {WORKSPACE: (self._mounted, True)}, self._options, enter=self._enter)
            undone.callback(self._wall.close)
            environment = WalledEnvironment(self._wall, self._options)
            undone.pop_all()
        return environment

    def _show(self, folder: Path, changes: Path) -> None:
        """Let the task change what looks like a copy of ``folder``."""
        try:
            self._overlay = Overlay(folder, changes)
        except SandboxError as error:
            logger.info("%s is copied for a task: %s", folder, error)
            shutil.copytree(folder, self.workspace, symlinks=True, dirs_exist_ok=True)
            return
        self.workspace = self._overlay.seen
        self._mounted, self._enter = self._overlay.path, self._overlay.enter

    def register(self, task_id: str) -> None:
        super().register(task_id)
        confined.confine(task_id, self.environment())

    @property
    def inside(self) -> str:
        return WORKSPACE

    def _end(self) -> None:
        assert self._local is not None
        self._wall.close()
        self._local.close()
        if self._overlay is not None:
            self._overlay.close()
        for task_id in self._registered:
            confined.let_go(task_id)

    @property
    def home(self) -> str | None:
        return HOME

    def as_told(self, prompt: str) -> str:
        prompt = prompt.replace(str(self._nothing), WORKSPACE)
        return super().as_told(prompt).replace("User home directory: ~\n", f"User home directory: {HOME}\n")

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        self.register(self.hermes_id)
        with confined.behind(self.environment()), release().current_folder(self._nothing):
            yield

    def verify(self, check: Check) -> CommandResult:
        """In a wall in which nothing of the model's has ever run, unless it needs what the task left running."""
        self._check_open()
        variables = {**self._options.env, "WORKSPACE": WORKSPACE, "TMPDIR": "/tmp", **check.env}
        if check.beside and check.files is None:
            return self._verify_apart(dataclasses.replace(check, env=variables))
        own = check.home.parent / f"wall-{uuid.uuid4().hex[:8]}"
        own.mkdir()
        itself = check.workspace == self.workspace
        folders = {WORKSPACE: (self._mounted if itself else check.workspace, itself), HOME: (check.home, True)}
        if check.files is not None:
            folders[CHECK] = (check.files, False)
        options = dataclasses.replace(self._options, env=variables)
        output = bytearray()

        def collect(piece: bytes) -> bool:
            output.extend(piece)
            return len(output) <= check.limit_bytes

        began = time.monotonic()
        wall = Wall(own, folders, options, enter=self._enter if itself else ())
        with contextlib.closing(Shells(wall)) as shells, contextlib.closing(wall):
            ended = shells.run(
                Request(
                    f"exec {shlex.join(check.command)}",
                    check.timeout,
                    collect,
                    folder=WORKSPACE if check.files is None else CHECK,
                    stopped=is_interrupted,
                )
            )
            starved = wall.out_of_memory() and ended.code != 0
        limit = None
        if ended.reason == "timeout":
            limit = Limit.TIME
        elif len(output) > check.limit_bytes:
            limit = Limit.OUTPUT
        elif starved:
            limit = Limit.MEMORY
        text = bytes(output[: check.limit_bytes]).decode(errors="replace")
        return CommandResult(text, ended.code if limit is None else 124, time.monotonic() - began, limit)

    def stop_processes(self) -> None:
        self._check_open()
        for task_id in self._registered:
            process_registry.kill_all(task_id=task_id)
        self._wall.kill(-1, signal.SIGKILL)

    def keep(self, content: bytes) -> str:
        path = f"{self.environment().get_temp_dir()}/results/{uuid.uuid4().hex[:12]}.txt"
        command = f"mkdir -p {shlex.quote(os.path.dirname(path))} && cat > {path}"
        self.environment().execute(command, stdin_data=content.decode(errors="surrogateescape"))
        return path
