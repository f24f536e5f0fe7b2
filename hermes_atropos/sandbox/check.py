"""What a verifier runs: a program with nothing of the model's around it.

The model's shell, its home and the variables that it exported are left aside, and so is every variable of the trainer's
that is not needed. What remains of the model's is the workspace, where the program looks at it.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hermes_atropos.errors import ConfigurationError, SandboxError
from hermes_atropos.sandbox import CommandResult, Limit, Sandbox
from hermes_atropos.sandbox.files import LIMIT_BYTES, copy_folder, hidden_folder, open_workspace, remove_folder
from hermes_atropos.sandbox.processes import MARKER, kill_processes

__all__ = ["Check", "run_check", "run_here"]

#: Seconds between two looks at whether a program has ended, while it keeps its output open or has closed it.
LOOK = 0.05

#: Bytes that a pipe holds: what a program has written when it ends is no more.
PIPE = 65536


@dataclass(frozen=True, slots=True)
class Check:
    """A program of a verifier, and the folders that a sandbox shows it.

    Attributes:
        command: the program and its arguments; it is looked up in the sandbox's PATH.
        workspace: what it sees as the workspace: the task's own, or a copy that it can't write.
        home: an empty folder for its home and its temporary files.
        files: the verifier's own files, which it can't write, and where it starts; None: it starts in the workspace.
        beside: whether it needs what the task left running.
        env: variables beside ``PATH``, ``HOME``, ``TMPDIR``, ``LANG``, ``TERM`` and ``WORKSPACE``.
        timeout: seconds that it may take.
        limit_bytes: of its output.
    """

    command: Sequence[str]
    workspace: Path
    home: Path
    files: Path | None
    env: Mapping[str, str]
    timeout: float
    limit_bytes: int
    beside: bool


def run_check(
    sandbox: Sandbox,
    command: str | Sequence[str],
    files: Mapping[str, str | bytes | os.PathLike[str]] | None = None,
    *,
    copy: bool = False,
    env: Mapping[str, str] | None = None,
    timeout: float = 180.0,
    limit_bytes: int = LIMIT_BYTES,
    beside: bool = False,
) -> CommandResult:
    """Run a verifier's command in ``sandbox``, a text in a new shell. ``Task.check`` says what it takes and raises;
    ``Task.terminal`` has no ``files``.
    """
    argv = ["bash", "--noprofile", "--norc", "-c", command] if isinstance(command, str) else list(command)
    folder = hidden_folder()
    try:
        (folder / "home").mkdir()
        own = None if files is None else write_files(folder / "files", files)
        workspace = sandbox.workspace
        if copy:
            copy_folder(workspace, folder / "workspace")
            workspace = folder / "workspace"
        return sandbox.verify(
            Check(argv, workspace, folder / "home", own, dict(env or {}), timeout, limit_bytes, beside)
        )
    finally:
        remove_folder(folder.parent)


def write_files(folder: Path, files: Mapping[str, str | bytes | os.PathLike[str]]) -> Path:
    """The verifier's files, by their paths in ``folder``: contents, or files and folders to copy. None is writable."""
    folder.mkdir()
    for name, content in files.items():
        target = folder / name
        if target == folder or ".." in target.parts or not target.is_relative_to(folder):
            raise ConfigurationError(f"files={{{name!r}: …}}: give a path relative to the check's own folder")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, os.PathLike):
                copied = shutil.copytree if os.path.isdir(content) else shutil.copy
                copied(content, target)
            else:
                target.write_bytes(content.encode() if isinstance(content, str) else content)
        except OSError as error:
            raise ConfigurationError(f"files={{{name!r}: …}}: the verifier's file can't be written: {error}") from error
    for path in [folder, *folder.rglob("*")]:
        path.chmod(path.stat().st_mode & 0o555)
    return folder


def run_here(check: Check, *, mark: str, stopped: Callable[[], bool]) -> CommandResult:
    """Run a check's program as a process of this machine; ``Sandbox.verify`` says what it raises.

    Args:
        mark: by which its processes are known. They end with it if it has ``files`` of its own, or is ended itself.
        stopped: whether to give it up.
    """
    os.close(open_workspace(check.workspace))
    began, limit, output = time.monotonic(), None, bytearray()
    reader, writer = os.pipe()
    with open(reader, "rb", buffering=0), started(check, mark, writer) as process:
        poll, is_open = select.poll(), True
        poll.register(reader, select.POLLIN)
        while limit is None and process.poll() is None and not stopped():
            if time.monotonic() - began > check.timeout:
                limit = Limit.TIME
            elif len(output) > check.limit_bytes:
                limit = Limit.OUTPUT
            elif not is_open:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(LOOK)
            elif poll.poll(LOOK * 1000):
                piece = os.read(reader, PIPE)
                is_open = bool(piece)
                output += piece
        if limit is None and poll.poll(0):
            output += os.read(reader, PIPE)  # what it wrote last; whoever it left running may write for ever
    if len(output) > check.limit_bytes:
        limit = limit or Limit.OUTPUT
    text = bytes(output[: check.limit_bytes]).decode(errors="replace")
    code = process.returncode if limit is None else 124
    return CommandResult(text, code, time.monotonic() - began, limit)


@contextlib.contextmanager
def started(check: Check, mark: str, output: int) -> Iterator[subprocess.Popen[bytes]]:
    """Its process, ended after the block with what must not outlive it. ``output`` is closed here."""
    home = str(check.home)
    env = {
        # A relative folder would be one of the workspace's, where the model writes.
        "PATH": os.pathsep.join(folder for folder in os.get_exec_path() if os.path.isabs(folder)),
        "HOME": home,
        "TMPDIR": home,
        "LANG": os.environ.get("LANG", "C.UTF-8"),
        "TERM": "dumb",
        "WORKSPACE": str(check.workspace),
        **check.env,
        MARKER: mark,
    }
    try:
        process = subprocess.Popen(
            check.command,
            cwd=check.files or check.workspace,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    except OSError as error:
        raise SandboxError(f"The verifier's program {check.command[0]!r} can't be started: {error}") from error
    finally:
        os.close(output)
    try:
        yield process
    finally:
        running = process.poll() is None
        if running:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if running or check.files is not None:
            kill_processes(mark, check.home.parent)
