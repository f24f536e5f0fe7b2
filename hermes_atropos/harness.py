"""What every agent of this library has in common: tasks, each a rollout in a sandbox that its verifier sees.

::

    async with agent.task("fix-17", workspace=repo) as task:      with agent.task("fix-17", workspace=repo) as task:
        await task.run("Make the tests pass.")                        task.run("Make the tests pass.")
        check = await task.terminal("pytest -q")                      check = task.terminal("pytest -q")

On the left in asynchronous code, on the right in a script.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

from hermes_atropos.runtime import check_not_on, portal_loop, run_on_portal
from hermes_atropos.sandbox import CommandResult, Sandbox
from hermes_atropos.sandbox.check import run_check
from hermes_atropos.sandbox.files import LIMIT_BYTES
from hermes_atropos.trajectory import AgentResult

__all__ = ["BlockingTask", "OpenedTask", "Task"]

T = TypeVar("T")
SomeTask = TypeVar("SomeTask", bound="Task")


class Task(ABC):
    """A rollout in its sandbox, for the length of ``async with agent.task(…)``.

    Attributes:
        task_id: its name.
        sandbox: where its tools act; ``SandboxError`` where they have no sandbox.
        trajectory: what the last run left, also one that failed or was cancelled; None before the first.
        keep_processes: whether what the model left running goes on while the verifier looks.

    What a verifier does here after a run, the model can't redirect: its processes are stopped first, files are read
    without following a path out of the workspace, and commands run in a new shell.
    """

    def __init__(self, *, keep_processes: bool = False) -> None:
        self.keep_processes = keep_processes
        self._settled: AgentResult | None = None
        self._settling = asyncio.Lock()

    @property
    def task_id(self) -> str:
        return self.sandbox.task_id

    @property
    @abstractmethod
    def sandbox(self) -> Sandbox: ...

    @property
    @abstractmethod
    def trajectory(self) -> AgentResult | None: ...

    @abstractmethod
    async def run(
        self,
        user_message: Any,
        system_message: str | None = None,
        *,
        conversation_history: Any = None,
    ) -> Any:
        """Run the agent on ``user_message``.

        Several runs of one task are one rollout. Pass the messages of the last result as ``conversation_history`` to go
        on where it ended: its tokens go on too.
        """

    @property
    def workspace(self) -> Path:
        """The folder in which the tools act."""
        return self.sandbox.workspace

    async def terminal(
        self,
        command: str,
        *,
        timeout: float = 180.0,
        env: Mapping[str, str] | None = None,
        limit_bytes: int = LIMIT_BYTES,
    ) -> CommandResult:
        """Run a command in the workspace, in a new shell: nothing of the model's shell, home and variables is there.

        ``task.sandbox.run`` is the model's own shell, as it left it.

        Args:
            timeout: seconds; after them the exit code is 124.
            env: variables beside ``PATH``, ``HOME``, ``TMPDIR``, ``LANG``, ``TERM`` and ``WORKSPACE``.
            limit_bytes: of the output; what writes more is ended.

        Raises:
            FileNotFoundError, UnsafePathError: the workspace is gone, or has been replaced.
        """
        return await self._verify(
            lambda: run_check(
                self.sandbox, command, env=env, timeout=timeout, limit_bytes=limit_bytes, beside=self.keep_processes
            )
        )

    async def check(
        self,
        files: Mapping[str, str | bytes | os.PathLike[str]],
        command: str | Sequence[str],
        *,
        copy: bool = False,
        env: Mapping[str, str] | None = None,
        timeout: float = 180.0,
        limit_bytes: int = LIMIT_BYTES,
    ) -> CommandResult:
        """Run a command on the verifier's own files, which come in now, in a folder that the model never saw.

        The command starts in that folder, where nobody can write. The variable ``WORKSPACE`` has the path of the
        workspace. What the command leaves running ends with it.

        Args:
            files: by path: a content, or the path of a file or folder of yours that is copied in.
            command: a text for a new shell, or a program and its arguments.
            copy: ``WORKSPACE`` is a copy that can't be written, with the workspace's files and with its links as far
                as they stay within.
            timeout, env, limit_bytes: as for :meth:`terminal`.

        Raises:
            ConfigurationError: a file of yours is missing, or its path leads out of the folder.
            FileTooLargeError: the workspace is too large to copy.
            FileNotFoundError, UnsafePathError: the workspace is gone, has been replaced, or can't be copied.
            SandboxError: the program can't be started.
        """
        return await self._verify(
            lambda: run_check(
                self.sandbox, command, files, copy=copy, env=env, timeout=timeout, limit_bytes=limit_bytes
            )
        )

    async def _verify(self, function: Callable[[], T]) -> T:
        """Do what a verifier asks for; the first time after a run, end before it what the model left running."""
        async with self._settling:
            if self.trajectory is not self._settled:
                if not self.keep_processes:
                    await self.sandbox.call(self.sandbox.stop_processes)
                self._settled = self.trajectory
        return await self.sandbox.call(function)

    async def read_bytes(self, path: str, *, limit_bytes: int = LIMIT_BYTES) -> bytes:
        """A regular file of the task, by a path relative to the workspace. It never leads out of the workspace.

        Raises:
            FileNotFoundError: there is no such file.
            UnsafePathError: the path leads out of the workspace, or to something that is not a regular file.
            FileTooLargeError: the file has more than ``limit_bytes``.
        """
        return await self._verify(lambda: self.sandbox.read_bytes(path, limit_bytes))

    async def read_file(self, path: str, *, limit_bytes: int = LIMIT_BYTES) -> str:
        """A text file of the task; see :meth:`read_bytes`.

        Raises:
            UnicodeDecodeError: it is not UTF-8.
        """
        return (await self.read_bytes(path, limit_bytes=limit_bytes)).decode()

    async def write_file(self, path: str, content: str | bytes) -> None:
        """Write a file of the task, by a path relative to the workspace; missing folders are made.

        What stood there is replaced, a link too. It never leads out of the workspace.

        Raises:
            UnsafePathError: the path leads out of the workspace.
        """
        data = content.encode() if isinstance(content, str) else content
        await self._verify(lambda: self.sandbox.write_bytes(path, data))


class OpenedTask(Generic[SomeTask]):
    """What ``agent.task(…)`` returns: a task for ``async with``, and a :class:`BlockingTask` for ``with``."""

    def __init__(self, opened: contextlib.AbstractAsyncContextManager[SomeTask]) -> None:
        self._opened = opened

    async def __aenter__(self) -> SomeTask:
        return await self._opened.__aenter__()

    async def __aexit__(self, *raised: Any) -> bool | None:
        return await self._opened.__aexit__(*raised)

    def __enter__(self) -> BlockingTask:
        return BlockingTask(_wait_for(self._opened.__aenter__))

    def __exit__(self, *raised: Any) -> bool | None:
        return _wait_for(lambda: self._opened.__aexit__(*raised))


class BlockingTask:
    """A task for synchronous code: what a :class:`Task` has, and each of its coroutines waited for.

    Raises:
        BlockingCallError: from any method, on the thread of the library's own event loop.
    """

    def __init__(self, task: Task) -> None:
        self._task = task

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._task, name)
        if not inspect.iscoroutinefunction(found):
            return found
        return functools.wraps(found)(lambda *args, **options: _wait_for(lambda: found(*args, **options)))


def _wait_for(work: Callable[[], Coroutine[Any, Any, T]]) -> T:
    check_not_on(portal_loop(), instead="async with agent.task(…)")
    return run_on_portal(work)
