"""Where a task's tools act. This room knows neither Hermes nor tokens."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

__all__ = ["CommandResult", "Sandbox"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class CommandResult:
    """What a command left: its output (stdout and stderr as one text) and its exit code."""

    output: str
    exit_code: int


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
    def read_bytes(self, path: str) -> bytes:
        """A file of the task, by a path relative to the workspace.

        Raises:
            FileNotFoundError: there is no such file.
        """

    @abstractmethod
    def write_bytes(self, path: str, content: bytes) -> None:
        """Write a file of the task, by a path relative to the workspace; missing folders are made."""

    @abstractmethod
    async def call(self, function: Callable[[], T]) -> T:
        """Run ``function``, which uses this sandbox, on a rollout thread; a cancelled await ends its command."""

    @abstractmethod
    def release(self) -> None:
        """End the task's processes and remove its files. Calling it again is harmless."""
