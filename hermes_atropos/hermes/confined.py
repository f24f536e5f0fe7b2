"""What Hermes does otherwise for a task behind a wall.

Hermes decides by its configuration, one for the process, whether tools act on this machine or elsewhere. For a task
behind a wall they act elsewhere: its terminal environment runs every command there, so for the length of a tool call
Hermes is told that its backend is a container. Which task a call belongs to is known by the task's id, and where there
is none by a context variable; either is enough. What would still read a file of this machine, or start a process on
it, raises.

Tools that act outside by nature are refused, and so is every tool that this table doesn't know.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from hermes_atropos.errors import ConfigurationError, SandboxError
from hermes_atropos.runtime import turnstile

if TYPE_CHECKING:
    from hermes_atropos.hermes.environments import WalledEnvironment

__all__ = ["CONFINED", "INSIDE", "behind", "check_tools", "confine", "let_go"]

#: Tools that act in the task's terminal environment, or only on the conversation. Hermes' tool search (from 0.21) shows
#: others and calls them, each of which comes by here.
INSIDE = frozenset(
    {
        *("clarify", "delegate_task", "execute_code", "patch", "process", "process_manage", "read_file"),
        *("search_files", "terminal", "todo", "todo_list", "tool_call", "tool_describe", "tool_search"),
        *("vision_analyze", "write_file"),
    }
)

#: Why others are refused, by the beginning of their names.
OUTSIDE = {
    "browser_": "a browser of this machine, with its network",
    "web_": "the network",
    "x_search": "the network",
    "skill": "the skills in Hermes' home, which other rollouts read too",
    "memory": "the memory in Hermes' home, which other rollouts read too",
    "session_search": "the sessions in Hermes' home, the user's and other rollouts'",
    "cronjob": "the user's scheduled jobs",
    "mcp_": "a server of the Model Context Protocol, which runs outside",
    "image_generate": "the network",
    "video_": "the network, and files of this machine",
    "text_to_speech": "the network, and files of this machine",
    "send_message": "the user's messengers",
    "computer_use": "this machine's screen",
    "kanban_": "the user's board",
    "ha_": "the user's home",
}

#: A backend of Hermes whose tools act in a container, and which has no settings of its own.
LIKE_A_CONTAINER = "singularity"


_environments: dict[str, WalledEnvironment] = {}
#: The tasks that are over, and when they ended. For a call that comes too late Hermes would open an environment on this
#: machine. None comes this many seconds later.
_over: dict[str, float] = {}
TOO_LATE = 3600.0
_lock = threading.Lock()
_current: ContextVar[WalledEnvironment | None] = ContextVar("hermes_atropos_wall", default=None)


def confine(task_id: str, environment: WalledEnvironment) -> None:
    """From now on, what Hermes does for a task it does behind the wall."""
    _environments[task_id] = environment


def let_go(task_id: str) -> None:
    """The task is over."""
    with _lock:
        _over[task_id] = time.monotonic()
        oldest = next(iter(_over))
        if _over[oldest] < _over[task_id] - TOO_LATE:
            del _over[oldest]
    _environments.pop(task_id, None)


@contextlib.contextmanager
def behind(environment: WalledEnvironment) -> Iterator[None]:
    """For the length of the block, what Hermes does in this context it does behind the wall."""
    token = _current.set(environment)
    try:
        yield
    finally:
        _current.reset(token)


def check_tools(names: Collection[str], outside: Collection[str]) -> None:
    """Refuse tools that act outside the wall.

    Args:
        names: of the tools that an agent has.
        outside: those that may act outside all the same.

    Raises:
        ConfigurationError: naming them, and what each would reach.
    """
    refused = [f"{name} ({reach(name)})" for name in sorted(names) if name not in INSIDE and name not in outside]
    if refused:
        raise ConfigurationError(
            f"These tools act outside the wall: {', '.join(refused)}. Leave their toolsets out "
            "(enabled_toolsets=['terminal', 'file', …]), or allow them by name: outside=[…]."
        )


def reach(name: str) -> str:
    return next((what for start, what in OUTSIDE.items() if name.startswith(start)), "unknown to this library")


def of_task(task_id: str | None) -> WalledEnvironment | None:
    """The environment of the task whose tool is called; None for one without a wall.

    Raises:
        SandboxError: the task was walled, and is over.
    """
    if task_id in _over:
        raise SandboxError(f"The sandbox of task {task_id!r} has been released.")
    return _environments.get(task_id or "") or _current.get()


# ── In place of Hermes' own ──────────────────────────────────────────────────────────────────────────────────────────


def _dispatch(original: Callable[..., Any], registry: Any, name: str, *args: Any, **options: Any) -> Any:
    """Each call of a tool, whoever makes it."""
    environment = of_task(options.get("task_id"))
    if environment is None:
        return original(registry, name, *args, **options)
    if name not in INSIDE and name not in environment.outside:
        return json.dumps({"error": f"{name} acts outside the sandbox ({reach(name)}), which this task may not."})
    with behind(environment):
        return original(registry, name, *args, **options)


def _get_env_config(original: Callable[..., dict[str, Any]], *args: Any, **options: Any) -> dict[str, Any]:
    config = original(*args, **options)
    return config if _current.get() is None else {**config, "env_type": LIKE_A_CONTAINER, "cwd": "/workspace"}


def _create_environment(original: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Hermes' reaper may have forgotten the task's environment: no other is made."""
    environment = of_task(options.get("task_id"))
    return original(*args, **options) if environment is None else environment


def _spawn_local(original: Callable[..., Any], *args: Any, **options: Any) -> Any:
    if of_task(options.get("task_id")) is not None:
        raise SandboxError("Hermes would have started a process of a walled task on this machine.")
    return original(*args, **options)


async def _resolve_image_source(original: Callable[..., Any], source: str, context: Any, **options: Any) -> Any:
    environment = of_task(context.task_id)
    with contextlib.nullcontext() if environment is None else behind(environment):
        return await original(source, context, **options)


def _http_block_reason(original: Callable[..., str | None], *args: Any, **options: Any) -> str | None:
    environment = _current.get()
    if environment is not None and not environment.network:
        return "there is no network in this sandbox"
    return original(*args, **options)


@contextlib.contextmanager
def _lock_path(original: Callable[..., Any], path: Any) -> Iterator[None]:
    """Hermes has one lock for each path; behind walls, many tasks have files of the same path."""
    environment = _current.get()
    if environment is None:
        with original(path):
            yield
        return
    lock = environment.lock(str(path))
    with turnstile.outside():
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _not_behind_it(original: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """What looks at files of this machine finds nothing; where Hermes asks whether, None is a no."""
    return original(*args, **options) if _current.get() is None else None


#: What is put in place of Hermes' functions: (module, name) → what is called, with the original.
CONFINED: Mapping[tuple[str, str], Callable[..., Any]] = {
    ("tools.registry", "ToolRegistry.dispatch"): _dispatch,
    ("tools.terminal_tool", "_get_env_config"): _get_env_config,
    ("tools.terminal_tool", "_create_environment"): _create_environment,
    ("tools.terminal_tool_backends", "_create_environment"): _create_environment,
    ("tools.process_registry", "ProcessRegistry.spawn_local"): _spawn_local,
    ("tools.image_source", "resolve_image_source"): _resolve_image_source,
    ("tools.image_source", "_http_block_reason"): _http_block_reason,
    ("tools.file_state", "lock_path"): _lock_path,
    # Hermes opens documents (.docx, …) and images of this machine; behind a wall they are files like others.
    ("tools.read_extract", "is_extractable_document"): _not_behind_it,
    ("tools.image_source", "_is_local_terminal_backend"): _not_behind_it,
    # Which files were read or written, instructions in the folders that a call names, and the project that one is in.
    ("tools.file_state", "record_read"): _not_behind_it,
    ("tools.file_state", "note_write"): _not_behind_it,
    ("tools.file_state", "check_stale"): _not_behind_it,
    ("agent.subdirectory_hints", "SubdirectoryHintTracker.check_tool_call"): _not_behind_it,
    ("agent.coding_context", "_git_root"): _not_behind_it,
    ("agent.coding_context", "_marker_root"): _not_behind_it,
}
