"""What functions of Hermes do otherwise, where it offers neither a method nor an argument; ``seams`` puts it in place.

Those of ``WRAPPED`` do so in our rollouts alone, and are called with the acting agent and the original.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agent.context_compressor import SUMMARY_PREFIX

from hermes_atropos.hermes import profile
from hermes_atropos.hermes.confined import CONFINED
from hermes_atropos.runtime import once, turnstile

if TYPE_CHECKING:
    from hermes_atropos.hermes.hooks import Hooks

__all__ = ["LISTED", "REPLACED", "WRAPPED", "stock_agent"]


@functools.cache
def stock_agent() -> type[Any]:
    """Hermes' own class of agents, in whose place another may stand since."""
    from run_agent import AIAgent

    return AIAgent


def _construct(agent: Hooks, original: Callable[..., None], new: Any, *args: Any, **options: Any) -> None:
    """An agent that Hermes makes within a rollout (``delegate_task`` does) becomes a subagent on the same server."""
    if type(new) is stock_agent():
        agent._make_subagent(new, *args, **options)
    else:
        original(new, *args, **options)


def _own_model_for_subagents(agent: Hooks, original: Callable[..., Any], _cfg: Any, parent: Any) -> Any:
    """The model that the user's configuration may name for subagents is not asked."""
    return original({}, parent)


def _unknown_context_length(agent: Hooks, original: Callable[..., int]) -> int:
    """Hermes measures the tools by the model in the user's configuration, which it may look up at openrouter.ai.

    That model is not the one that is called. 0 has the tools measured by their size alone.
    """
    return 0


def _no_title(agent: Hooks, original: Callable[..., None], *args: Any, **options: Any) -> None:
    """From 0.20, Hermes has the model of the user's configuration find a title for the session, on another thread."""


def _at_once(agent: Hooks, original: Callable[..., float], *args: Any, **options: Any) -> float:
    """Seconds to wait before asking again after an empty answer, 5 to 60 from 0.20 on: a sample needs no rest."""
    return 0.0


def _log_files(agent: Hooks, original: Callable[..., Path], *args: Any, **options: Any) -> Path:
    """In a training run Hermes' log files are where its author wants them, or off: the home goes with the process."""
    home = profile.active_profile()
    if home is None:
        return original(*args, **options)
    folder = profile.log_folder()
    if folder is not None:
        return original(*args, **options | {"hermes_home": folder})
    _keep_off_standard_error()
    return home / "logs"


@once
def _keep_off_standard_error() -> None:
    """Python prints the warnings of loggers that have no handler."""
    import hermes_logging

    for name in itertools.chain(*hermes_logging.COMPONENT_PREFIXES.values()):
        logging.getLogger(name).addHandler(logging.NullHandler())


def _home(agent: Hooks, original: Callable[..., str | None], *args: Any, **options: Any) -> str | None:
    """The home of a task's shell is also what the file tools take ``~`` for: theirs would be the trainer's own."""
    sandbox = agent._sandbox
    return (sandbox and sandbox.home) or original(*args, **options)


def _in_the_sandbox(agent: Hooks, original: Callable[..., Path]) -> Path:
    """Where large results go: from 0.20.6 into Hermes' home, where other rollouts read them, and they stay."""
    sandbox = agent._sandbox
    return original() if sandbox is None else Path(sandbox.environment().get_temp_dir(), "hermes-results")


def _in_its_turn(agent: Hooks, original: Callable[..., Any], registry: Any, name: str, *args: Any, **given: Any) -> Any:
    """A tool. From 0.20 Hermes runs it on a thread of its own, which computes in its turn as the rollout's does."""
    with turnstile.inside() if agent.steps_out_in(name) else contextlib.nullcontext():
        return original(registry, name, *args, **given)


# ── The compression of a history ─────────────────────────────────────────────────────────────────────────────────────


def _own_context_length(agent: Hooks, original: Callable[..., int], *args: Any, **options: Any) -> int:
    """The length that Hermes compresses by is that of the server. Hermes would guess it by the model's name, and look
    for it at models.dev and openrouter.ai."""
    configured = options.get("config_context_length")
    return agent._context.for_hermes(configured if isinstance(configured, int) else None)


def _summarise(agent: Hooks, original: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """The summary comes from the rollout's own server."""
    return agent._auxiliary_call(*args, **options)


def _keeping_the_task(agent: Hooks, original: Callable[..., int], compressor: Any, messages: Any) -> int:
    """How many messages at the beginning are left as they are: the task too, where the user said nothing else.

    Hermes takes up the last user message behind the summary, and with it whatever came after. Where that is all that
    the user ever said, it would compress no more than one step from the second time on.
    """
    kept = original(compressor, messages)
    asked = [n for n, message in enumerate(messages) if message.get("role") == "user" and not _is_summary(message)]
    return kept + 1 if asked == [kept] else kept


def _no_summary(agent: Hooks, original: Callable[..., int], compressor: Any, messages: Any, head_end: int) -> int:
    """Where the last answer stands that must not be compressed; -1 if there is none.

    Before 0.21, Hermes takes an earlier summary for one, and with it keeps whatever came after.
    """
    found = original(compressor, messages, head_end)
    return -1 if found >= 0 and _is_summary(messages[found]) else found


def _is_summary(message: Any) -> bool:
    """Whether a message is what an earlier compression left."""
    return SUMMARY_PREFIX in str(message.get("content"))


# ── What Hermes looks up again for each rollout or command, with the same answer and less work ───────────────────────


#: A folder with more entries than this is not listed to the end.
SHORT = 1000


def _configuration(agent: Hooks, original: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The user's configuration, for the caller to change; Hermes' own copy of it takes four times as long."""
    from hermes_cli.config import load_config_readonly

    return _copied(load_config_readonly())


def _unchanged(agent: Hooks, original: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The user's configuration, which no caller may change. Before it takes what it read last, Hermes looks at five
    files and folders, several times a model call; in a training run nothing but the profile's file says anything."""
    home = str(profile.active_profile())
    with contextlib.suppress(OSError):  # no such file: Hermes knows what to do
        if os.environ.get("HERMES_HOME") == home:
            status = os.stat(f"{home}/config.yaml")
            return _read_at(original, home, status.st_mtime_ns, status.st_size)
    return original()


@functools.lru_cache(maxsize=1)
def _read_at(original: Callable[[], dict[str, Any]], *version: str | int) -> dict[str, Any]:
    return original()


def _no_account(agent: Hooks, original: Callable[..., bool], **options: Any) -> bool:
    """Whether the user subscribes to Nous Research's tools: before 0.20 the prompt says so. A training run has no
    account, and Hermes looks for one in eight files."""
    return profile.active_profile() is None and original(**options)


def _copied(value: Any) -> Any:
    """What YAML says, anew: of its kinds of values only these two can be changed in place."""
    if type(value) is dict:
        return {name: _copied(part) for name, part in value.items()}
    return [_copied(part) for part in value] if type(value) is list else value


def _approvals(agent: Hooks, original: Callable[[], Mapping[str, Any]]) -> Mapping[str, Any]:
    """What the configuration says of approvals: before 0.20, Hermes copied all of it twice a command to read this."""
    from hermes_cli.config import load_config_readonly

    with contextlib.suppress(Exception):  # Hermes' own says what is wrong
        return load_config_readonly().get("approvals") or {}
    return original()


def _path(agent: Hooks, original: Callable[[str], str], existing_path: str) -> str:
    """A PATH with Hermes' own folders. From 0.22 it looks them all up for each command, most of a turn's time."""
    return _completed(original, existing_path)


@functools.lru_cache(maxsize=64)
def _completed(original: Callable[[str], str], existing_path: str) -> str:
    return original(existing_path)


def _project(agent: Hooks, original: Callable[[Path], Path | None], cwd: Path) -> Path | None:
    """The project that a folder is in: after each command Hermes looks for 22 files in each of up to 7 folders.

    Where none of the folders lists one there is nothing to look for. The folder of temporary files, which may be long,
    is never a project.
    """
    folders, temporary = _own_folders(cwd, agent), None
    if not folders:
        folder, temporary = cwd.resolve(), Path(tempfile.gettempdir()).resolve()
        folders = [folder, *folder.parents]
    with contextlib.suppress(OSError):
        if not any(_may_be_a_project(folder) for folder in folders[:7] if folder != temporary):
            return None
    found = original(cwd)
    return found if found in folders else None


def _repository(agent: Hooks, original: Callable[[Path], Path | None], cwd: Path) -> Path | None:
    """The repository that a folder is in, looked for as often."""
    own = _own_folders(cwd, agent)
    return next((folder for folder in own if (folder / ".git").exists()), None) if own else original(cwd)


def _own_folders(cwd: Path, agent: Hooks) -> list[Path]:
    """A folder and those that hold it, as far as they are the task's own, which are in nobody's project."""
    own: list[Path] = []
    root = agent._sandbox and agent._sandbox.root
    if root is None:
        return own
    folder = os.path.realpath(cwd)
    while folder.startswith(f"{root}/"):
        own.append(Path(folder))
        folder = os.path.dirname(folder)
    return own


def _may_be_a_project(folder: Path) -> bool:
    from agent.coding_context import _PROJECT_MARKERS

    with os.scandir(folder) as entries:
        names = {entry.name for entry in itertools.islice(entries, SHORT)}
    return len(names) == SHORT or not names.isdisjoint(_PROJECT_MARKERS)


#: What is wrapped in place: (module, name) → what is called in a rollout, with its agent and the original.
WRAPPED: Mapping[tuple[str, str], Callable[..., Any]] = {
    ("run_agent", "AIAgent.__init__"): _construct,
    ("tools.delegate_tool", "_resolve_delegation_credentials"): _own_model_for_subagents,
    ("model_tools", "_resolve_active_context_length"): _unknown_context_length,
    ("agent.context_compressor", "ContextCompressor._protect_head_size"): _keeping_the_task,
    ("agent.context_compressor", "ContextCompressor._find_last_assistant_message_idx"): _no_summary,
    ("agent.context_compressor", "call_llm"): _summarise,
    ("agent.context_compressor", "get_model_context_length"): _own_context_length,
    ("agent.model_metadata", "get_model_context_length"): _own_context_length,
    ("agent.turn_context", "_maybe_title_session_at_turn_start"): _no_title,
    ("hermes_logging", "setup_logging"): _log_files,
    ("hermes_constants", "get_subprocess_home"): _home,
    ("agent.conversation_loop", "jittered_backoff"): _at_once,
    ("agent.retry_utils", "jittered_backoff"): _at_once,
    ("tools.environments.local", "_append_missing_sane_path_entries"): _path,
    ("tools.environments.local", "_user_tools_first"): _path,
    ("tools.registry", "ToolRegistry.dispatch"): _in_its_turn,
    ("tools.tool_result_storage", "get_spillover_dir"): _in_the_sandbox,
    ("hermes_cli.config", "load_config"): _configuration,
    ("hermes_cli.config", "load_config_readonly"): _unchanged,
    ("tools.tool_backend_helpers", "managed_nous_tools_enabled"): _no_account,
    ("agent.coding_context", "_marker_root"): _project,
    ("agent.coding_context", "_git_root"): _repository,
    ("tools.approval", "_get_approval_config"): _approvals,
}


# ── Hermes' list of background processes, which is one for all tasks ─────────────────────────────────────────────────


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

#: What is replaced whoever calls it; each looks for itself whether there is something to change.
REPLACED: Mapping[tuple[str, str], Callable[..., Any]] = {**CONFINED, **LISTED}
