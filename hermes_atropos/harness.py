"""What every agent of this library has in common: tasks, each a rollout in a sandbox that its verifier sees.

::

    async with agent.task("fix-17", workspace=repo) as task:      with agent.task("fix-17", workspace=repo) as task:
        await task.run("Make the tests pass.")                        task.run("Make the tests pass.")
        check = await task.terminal("pytest -q")                      check = task.terminal("pytest -q")

On the left in asynchronous code, on the right in a script.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, TypeVar

from hermes_atropos.runtime import check_not_on, portal_loop, run_on_portal
from hermes_atropos.sandbox import CommandResult, Sandbox
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
    """

    @property
    @abstractmethod
    def task_id(self) -> str: ...

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

    async def terminal(self, command: str, *, timeout: float = 180.0) -> CommandResult:
        """Run a command in the task's shell, as the agent left it; exit code 124 after ``timeout`` seconds."""
        return await self.sandbox.call(lambda: self.sandbox.run(command, timeout=timeout))

    async def read_bytes(self, path: str) -> bytes:
        """A file of the task, by a path relative to the workspace; ``FileNotFoundError`` if there is none."""
        return await self.sandbox.call(lambda: self.sandbox.read_bytes(path))

    async def read_file(self, path: str) -> str:
        """A text file of the task (UTF-8), by a path relative to the workspace."""
        return (await self.read_bytes(path)).decode()

    async def write_file(self, path: str, content: str | bytes) -> None:
        """Write a file of the task, by a path relative to the workspace; missing folders are made."""
        data = content.encode() if isinstance(content, str) else content
        await self.sandbox.call(lambda: self.sandbox.write_bytes(path, data))


class OpenedTask(Generic[SomeTask]):
    """What ``agent.task(…)`` returns: a task for ``async with``, and a :class:`BlockingTask` for ``with``."""

    def __init__(self, opened: contextlib.AbstractAsyncContextManager[SomeTask]) -> None:
        self._opened = opened

    async def __aenter__(self) -> SomeTask:
        return await self._opened.__aenter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        return await self._opened.__aexit__(kind, error, trace)

    def __enter__(self) -> BlockingTask:
        return BlockingTask(_wait_for(self._opened.__aenter__))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        return _wait_for(lambda: self._opened.__aexit__(kind, error, trace))


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
