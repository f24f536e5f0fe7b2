"""Hermes' list of background processes, which is one for all tasks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from hermes_atropos.hermes import profile

__all__ = ["LISTED"]


def _unless_in_training(original: Callable[..., None], *args: Any, **options: Any) -> None:
    """Hermes notes in its home which processes run, whenever one begins or ends, and from 0.21 what each of them left.

    That is for one that starts later. In a training run the home goes with the process, and where many processes end at
    once, noting it takes seconds.
    """
    if profile.active_profile() is None:
        original(*args, **options)


def _but_those_of_open_tasks(original: Callable[..., None], registry: Any) -> None:
    """Hermes forgets what has ended beyond 64 processes, the oldest first: that of a task that goes on stays."""
    from tools.terminal_tool import _task_env_overrides

    stays = {name: process for name, process in registry._finished.items() if process.task_id in _task_env_overrides}
    registry._running.update(stays)
    for name in stays:
        del registry._finished[name]
    try:
        original(registry)
    finally:
        registry._finished.update(stays)
        for name in stays:
            del registry._running[name]


#: What is put in place of Hermes' functions, whoever calls them: (module, name) → what is called, with the original.
LISTED: Mapping[tuple[str, str], Callable[..., Any]] = {
    ("tools.process_registry", "ProcessRegistry._write_checkpoint"): _unless_in_training,
    ("tools.process_registry", "save_completed_result"): _unless_in_training,
    ("tools.process_registry", "ProcessRegistry._prune_if_needed"): _but_those_of_open_tasks,
}
