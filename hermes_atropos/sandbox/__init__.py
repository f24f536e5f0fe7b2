"""Where a task's tools act. This room knows neither Hermes nor tokens."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from hermes_atropos.sandbox.files import LIMIT_BYTES

if TYPE_CHECKING:
    from hermes_atropos.sandbox.check import Check

__all__ = ["CommandResult", "Limit", "Sandbox"]

T = TypeVar("T")


class Limit(StrEnum):
    """The limit that ended a command."""

    TIME = "time"
    OUTPUT = "output"
    MEMORY = "memory"


@dataclass(frozen=True, slots=True)
class CommandResult:
    """What a command left.

    Attributes:
        output: stdout and stderr as one text.
        exit_code: its exit code; 124 where a limit ended it.
        seconds: that it took, where they were measured.
        limit: the limit that ended it, if one did.
    """

    output: str
    exit_code: int
    seconds: float = 0.0
    limit: Limit | None = None


class Sandbox(ABC):
    """Where the tools of one task act, and the verifier after them; :meth:`release` ends it.

    All methods but :meth:`call` block; :meth:`call` runs them off the event loop.

    Attributes:
        task_id: the task's name; no two open sandboxes share one.
        workspace: the folder in which the tools act.
    """

    task_id: str
    workspace: Path

    @abstractmethod
    def run(self, command: str, *, timeout: float = 180.0) -> CommandResult:
        """Run a command in the task's shell, as the last one left it; exit code 124 after ``timeout`` seconds."""

    @abstractmethod
    def verify(self, check: Check) -> CommandResult:
        """Run a verifier's program with nothing of the task's shell, home or variables around it.

        Raises:
            FileNotFoundError, UnsafePathError: the workspace is gone, or has been replaced.
            SandboxError: the program can't be started.
        """

    @abstractmethod
    def stop_processes(self) -> None:
        """End what the task's commands left running. The shell stays as the last command left it."""

    @abstractmethod
    def read_bytes(self, path: str, limit_bytes: int = LIMIT_BYTES) -> bytes:
        """A regular file of the task, by a path relative to the workspace.

        Raises:
            FileNotFoundError: there is no such file.
            UnsafePathError: the path leads out of the workspace, or to something that is not a regular file.
            FileTooLargeError: the file has more than ``limit_bytes``.
        """

    @abstractmethod
    def write_bytes(self, path: str, content: bytes) -> None:
        """Write a file of the task, by a path relative to the workspace; missing folders are made.

        Raises:
            UnsafePathError: the path leads out of the workspace.
        """

    @abstractmethod
    async def call(self, function: Callable[[], T]) -> T:
        """Run ``function``, which uses this sandbox, on a rollout thread; a cancelled await ends its command."""

    @abstractmethod
    def release(self) -> None:
        """End the task's processes and remove its files. Calling it again is harmless."""
