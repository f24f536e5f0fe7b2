"""What the library leans on in Hermes, checked at the first use.

Hermes is held by the methods that it calls on ``self``: they kept their names and meanings through its rewrites. The
table below names each of them, and everything else of Hermes that this wing touches. :func:`check` looks for all of it
when the first agent is constructed, so that a release which moved something is an error that names it.

Where Hermes offers neither a method nor an argument, one of its functions is wrapped in place (``wrappers``). The
wrapper does what Hermes does, unless the code runs for one of our agents: a context variable, which Hermes' worker
threads inherit, tells (``acting``).
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import os
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from packaging.version import Version

from hermes_atropos.errors import UnsupportedVersionError
from hermes_atropos.hermes.acting import acting_agent
from hermes_atropos.hermes.versions import hermes_version
from hermes_atropos.hermes.wrappers import REPLACED, WRAPPED, stock_agent
from hermes_atropos.runtime import once

if TYPE_CHECKING:
    from hermes_atropos.hermes.hooks import Hooks

__all__ = ["ATTRIBUTES", "SEAMS", "OurChildren", "Seam", "check", "check_attributes", "in_place_of"]


@dataclass(frozen=True, slots=True)
class Seam:
    """One name of Hermes that this wing uses.

    Attributes:
        module: where it is looked for.
        name: of a function, a class or a variable; ``Class.method`` for a method.
        parameters: names that it must accept; None for what is not called with names.
        since, until: the first release that has it, and the first that no longer has; None where there is none.
    """

    module: str
    name: str
    parameters: tuple[str, ...] | None = None
    since: str | None = None
    until: str | None = None

    def is_in(self, installed: Version | None) -> bool:
        """Whether a release has it; one that is not known counts as the newest."""
        if installed is None:
            return self.until is None
        return Version(self.since or "0") <= installed and not (self.until and Version(self.until) <= installed)

    def fault(self) -> str | None:
        """What is wrong with it in the installed release; None if nothing is."""
        try:
            found: Any = importlib.import_module(self.module)
            for part in self.name.split("."):
                found = getattr(found, part)
        except (ImportError, AttributeError) as error:
            return f"is missing ({error})"
        if getattr(found, "__objclass__", None) is object:
            return "is missing (it is only what every object has)"
        if self.parameters is None:
            return None
        code = inspect.unwrap(getattr(found, "__func__", found)).__code__  # a tenth of the time of inspect.signature
        if code.co_flags & inspect.CO_VARKEYWORDS:
            return None
        accepted = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        missing = [parameter for parameter in self.parameters if parameter not in accepted]
        return f"does not accept {', '.join(missing)}" if missing else None


def _methods(module: str, owner: str, *, since: str | None = None, **methods: str | None) -> list[Seam]:
    return [
        Seam(module, f"{owner}.{name}", tuple(given.split()) if given else None, since)
        for name, given in methods.items()
    ]


#: What Hermes notes of files that were read and written, and the locks of that.
FILE_STATE = ("_reads", "_last_writer", "_path_locks", "_state_lock", "_meta_lock")

SEAMS: list[Seam] = [
    # The agent: what its loop calls on itself, and what we call on it.
    *_methods(
        "run_agent",
        "AIAgent",
        __init__="base_url api_key provider model max_iterations tool_delay max_tokens session_id",
        _build_assistant_message="assistant_message finish_reason",
        _build_system_prompt=None,
        _check_compression_model_feasibility=None,
        _cleanup_task_resources="task_id",
        _compress_context=None,
        _convert_to_trajectory_format="messages user_query completed",
        _create_openai_client="client_kwargs reason shared",
        _describe_image_for_anthropic_fallback="image_url role",
        _dispatch_delegate_task="function_args",
        _execute_tool_calls="assistant_message",
        _fire_reasoning_delta="text",
        _fire_stream_delta="text",
        _fire_tool_gen_started="tool_name",
        _handle_max_iterations="messages api_call_count",
        _has_stream_consumers=None,
        _interruptible_api_call="api_kwargs",
        _interruptible_streaming_api_call="api_kwargs on_first_delta",
        _model_supports_vision=None,
        _prepare_messages_for_non_vision_model="api_messages",
        _save_trajectory="messages user_query completed",
        _spawn_background_review=None,
        clear_interrupt=None,
        interrupt="message",
        run_conversation="user_message system_message conversation_history task_id stream_callback",
        steer="text",
        switch_model="new_model new_provider api_key base_url api_mode",
    ),
    Seam("run_agent", "AIAgent.hard_interrupt", ("message",), since="0.20"),
    Seam("run_agent", "AIAgent.redirect", ("text",), since="0.20"),
    *_methods(
        "agent.context_compressor",
        "ContextCompressor",
        since="0.18",
        _find_last_assistant_message_idx="messages head_end",
        _protect_head_size="messages",
    ),
    Seam("agent.context_compressor", "SUMMARY_PREFIX"),
    Seam("agent.context_compressor", "call_llm"),
    Seam(
        "agent.auxiliary_client", "_resolve_task_provider_model", ("task", "provider", "model", "base_url", "api_key")
    ),
    Seam("agent.auxiliary_client", "async_call_llm", ("task", "messages")),
    Seam("agent.auxiliary_client", "call_llm", ("task", "messages")),
    Seam("agent.auxiliary_client", "_validate_llm_response", ("response", "task")),
    Seam(
        "agent.agent_init",
        "_custom_provider_extra_body_for_agent",
        ("provider", "model", "base_url", "custom_providers"),
        since="0.18",
    ),
    Seam("agent.conversation_loop", "jittered_backoff", ("attempt",), since="0.20", until="0.21"),
    Seam("agent.retry_utils", "jittered_backoff", ("attempt",), since="0.21"),
    Seam("agent.context_compressor", "get_model_context_length", ("config_context_length",)),
    Seam("agent.model_metadata", "DEFAULT_FALLBACK_CONTEXT"),
    Seam("agent.model_metadata", "MINIMUM_CONTEXT_LENGTH"),
    Seam("agent.model_metadata", "get_model_context_length", ("config_context_length",)),
    Seam(
        "hermes_state",
        "SessionDB.update_token_counts",
        ("session_id", "input_tokens", "output_tokens", "cache_read_tokens", "reasoning_tokens", "api_call_count"),
    ),
    Seam("agent.turn_context", "_maybe_title_session_at_turn_start", since="0.20"),
    Seam("tools.delegate_tool", "delegate_task", ("goal", "context", "tasks", "parent_agent")),
    Seam("tools.delegate_tool", "_resolve_delegation_credentials", ("cfg", "parent_agent")),
    Seam("tools.delegate_tool", "_strip_model_hidden_task_fields", ("tasks",), since="0.18.2"),
    Seam("tools.tool_result_storage", "get_spillover_dir", (), since="0.20.6"),
    Seam("tools.environments.base", "set_activity_callback", ("cb",)),
    # Tools and toolsets.
    Seam("model_tools", "get_tool_definitions", ("enabled_toolsets", "disabled_toolsets", "quiet_mode")),
    Seam("model_tools", "handle_function_call", ("task_id", "enabled_tools")),
    Seam("model_tools", "_resolve_active_context_length", (), since="0.16"),
    Seam("toolsets", "get_all_toolsets", ()),
    Seam("toolsets", "resolve_toolset", ("name",)),
    Seam("toolsets", "validate_toolset", ("name",)),
    Seam("toolset_distributions", "list_distributions", ()),
    Seam("tools.todo_tool", "TodoStore"),
    Seam("tools.todo_tool", "todo_tool", ("todos", "merge", "store")),
    Seam("gateway.session_context", "declare_stateless_channel", (), since="0.19"),
    # The terminal: its environments, and which task has which.
    *_methods(
        "tools.environments.local",
        "LocalEnvironment",
        __init__="cwd timeout env",
        _prepare_command="command",
        cleanup=None,
        execute="command cwd timeout stdin_data",
        get_temp_dir=None,
        init_session=None,
    ),
    Seam("agent.coding_context", "_git_root", ("cwd",), since="0.18"),
    Seam("agent.coding_context", "_marker_root", ("cwd",), since="0.18"),
    Seam("agent.coding_context", "_PROJECT_MARKERS", since="0.18"),
    Seam("tools.approval", "_get_approval_config", (), since="0.15", until="0.20"),
    Seam("hermes_cli.config", "load_config", (), since="0.15"),
    Seam("hermes_cli.config", "load_config_readonly", (), since="0.15"),
    Seam("tools.tool_backend_helpers", "managed_nous_tools_enabled", (), until="0.20"),
    Seam("tools.environments.local", "_append_missing_sane_path_entries", ("existing_path",), since="0.22"),
    Seam("tools.environments.local", "_user_tools_first", ("existing_path",), since="0.22"),
    Seam("tools.environments.base", "touch_activity_if_due", ("state", "label")),
    Seam("tools.environments.local", "_find_bash", ()),
    Seam("tools.environments.local", "_make_run_env", ("env",)),
    Seam("tools.environments.local", "_resolve_safe_cwd", ("cwd",)),
    Seam("tools.environments.local", "_resolve_shell_init_files", ()),
    Seam("tools.terminal_tool", "_rewrite_compound_background", ("command",), until="0.21"),
    Seam("tools.terminal_tool_sudo", "_rewrite_compound_background", ("command",), since="0.21"),
    Seam("tools.tool_output_limits", "get_max_bytes", (), since="0.19"),
    Seam("tools.terminal_tool", "_active_environments"),
    Seam("tools.terminal_tool", "_env_lock"),
    Seam("tools.terminal_tool", "_get_env_config", ()),
    Seam("tools.terminal_tool", "_last_activity"),
    Seam("tools.terminal_tool", "_task_env_overrides"),
    Seam("tools.terminal_tool", "cleanup_vm", ("task_id",), until="0.21"),
    Seam("tools.terminal_tool_lifecycle", "cleanup_vm", ("task_id",), since="0.21"),
    Seam("tools.terminal_tool", "clear_task_env_overrides", ("task_id",)),
    Seam("tools.terminal_tool", "get_active_env", ("task_id",), until="0.21"),
    Seam("tools.terminal_tool_lifecycle", "get_active_env", ("task_id",), since="0.21"),
    Seam("tools.terminal_tool", "register_task_env_overrides", ("task_id", "overrides")),
    Seam("tools.terminal_tool", "terminal_tool", ("command", "task_id", "force")),
    Seam("tools.interrupt", "is_interrupted", ()),
    Seam("tools.interrupt", "set_interrupt", ("active", "thread_id")),
    Seam("tools.process_registry", "process_registry.kill_all", ("task_id",)),
    Seam("tools.process_registry", "process_registry._finished"),
    Seam("tools.process_registry", "process_registry._running"),
    Seam("agent.runtime_cwd", "set_session_cwd", ("cwd",), since="0.16"),
    Seam("hermes_constants", "get_subprocess_home", (), since="0.19"),
    # What is done otherwise behind a wall.
    Seam("tools.registry", "ToolRegistry.dispatch", ("name", "args")),
    Seam("tools.terminal_tool", "_create_environment", ("task_id",), until="0.21"),
    Seam("tools.terminal_tool_backends", "_create_environment", ("task_id",), since="0.21"),
    Seam("tools.process_registry", "ProcessRegistry.spawn_local", ("command", "task_id")),
    Seam("tools.process_registry", "ProcessRegistry._prune_if_needed"),
    Seam("tools.process_registry", "ProcessRegistry._write_checkpoint"),
    Seam("tools.process_registry", "save_completed_result", ("session",), since="0.21"),
    Seam("tools.file_tools", "_read_tracker", until="0.21"),
    Seam("tools.file_tools", "_read_tracker_lock", until="0.21"),
    Seam("tools.file_tools", "_patch_failure_tracker", since="0.15", until="0.21"),
    Seam("tools.file_tools", "_patch_failure_lock", since="0.15", until="0.21"),
    *(Seam("tools.file_state", f"_registry.{name}", until="0.21") for name in FILE_STATE),
    Seam("tools.read_extract", "is_extractable_document", ("path",), since="0.19"),
    Seam("tools.image_source", "resolve_image_source", ("src", "ctx"), since="0.19"),
    Seam("tools.image_source", "_is_local_terminal_backend", (), since="0.19"),
    Seam("tools.image_source", "_http_block_reason", ("url",), since="0.19"),
    Seam("tools.file_state", "get_registry", (), until="0.21"),
    Seam("tools.file_state", "lock_path", ("resolved_or_path",), since="0.19"),
    Seam("tools.file_state", "record_read", ("task_id",), since="0.19"),
    Seam("tools.file_state", "note_write", ("task_id",), since="0.19"),
    Seam("tools.file_state", "check_stale", ("task_id",), since="0.19"),
    Seam("agent.subdirectory_hints", "SubdirectoryHintTracker.check_tool_call", ("tool_name",), since="0.19"),
    # The training profile.
    Seam("hermes_cli.auth", "PROVIDER_REGISTRY"),
    Seam("hermes_cli.runtime_provider", "resolve_runtime_provider", ("requested",)),
    Seam("hermes_logging", "COMPONENT_PREFIXES"),
    Seam("hermes_logging", "setup_logging", ("hermes_home",)),
]

#: What an object of Hermes must have once it is constructed.
ATTRIBUTES: Mapping[str, tuple[str, ...]] = {
    "AIAgent": (
        *("_active_children", "_interrupt_requested", "_session_db", "compression_enabled"),
        *("context_compressor", "max_iterations", "model", "reasoning_callback", "save_trajectories"),
        *("session_api_calls", "session_cache_read_tokens", "session_completion_tokens", "session_input_tokens"),
        *("session_output_tokens", "session_prompt_tokens", "session_reasoning_tokens", "session_total_tokens"),
        *("tool_gen_callback", "tools"),
    ),
    "LocalEnvironment": ("_snapshot_path", "_snapshot_ready", "cwd", "env", "timeout"),
}


def check_attributes(made: object, kind: str) -> None:
    """Look for what ``ATTRIBUTES`` has of that kind; raises as :func:`check` does."""
    missing = [name for name in ATTRIBUTES[kind] if not hasattr(made, name)]
    if missing:
        raise _changed(f"{kind} objects no longer have {', '.join(missing)}")


def _changed(what: str) -> UnsupportedVersionError:
    return UnsupportedVersionError(
        f"hermes-agent {hermes_version() or 'of an unknown release'} has changed: {what}. hermes_atropos leans on it: "
        "see hermes_atropos/hermes/seams.py for what is needed, and compat/README.md for the releases that were tried"
    )


@once
def check() -> None:
    """Look for everything in ``SEAMS`` and put the wrappers in place; once a process.

    Raises:
        UnsupportedVersionError: Hermes lacks something; the message names it, the release, and where to look.
    """
    stock_agent()
    here = [seam for seam in SEAMS if seam.is_in(hermes_version())]
    for seam in here:
        fault = seam.fault()
        if fault:
            raise _changed(f"{seam.module}.{seam.name} {fault}")
    for seam in here:
        if (seam.module, seam.name) in WRAPPED:
            _wrap(seam, WRAPPED[seam.module, seam.name])
        if (seam.module, seam.name) in REPLACED:
            _override(seam, REPLACED[seam.module, seam.name])


def _wrap(seam: Seam, ours: Callable[..., Any]) -> None:
    """In one of our agents' rollouts, ``ours`` is called, with the agent and the original."""

    def wrapped(original: Callable[..., Any], *args: Any, **options: Any) -> Any:
        agent = acting_agent()
        return original(*args, **options) if agent is None else ours(agent, original, *args, **options)

    _override(seam, wrapped)


def _override(seam: Seam, ours: Callable[..., Any]) -> None:
    """``ours`` is called in its place, with the original."""
    *parts, last = seam.name.split(".")
    owner = functools.reduce(getattr, parts, importlib.import_module(seam.module))
    original = getattr(owner, last)

    @functools.wraps(original)
    def replaced(*args: Any, **options: Any) -> Any:
        return ours(original, *args, **options)

    setattr(owner, last, replaced)


@contextlib.contextmanager
def in_place_of(module: str, name: str, ours: Any) -> Iterator[None]:
    """For the length of the block, ``ours`` stands wherever a module of this process holds that object of Hermes.

    Raises:
        UnsupportedVersionError: Hermes has no such object.
    """
    if fault := Seam(module, name).fault():
        raise _changed(f"{module}.{name} {fault}")
    theirs = getattr(sys.modules[module], name)
    # What stands beside Hermes; a user's own module may want to compare the two.
    _replace(theirs, ours, within=os.path.join(os.path.dirname(inspect.getfile(stock_agent())), ""))
    try:
        yield
    finally:
        _replace(ours, theirs)  # whoever has taken it over in the block


def _replace(old: Any, new: Any, within: str = "") -> None:
    """Put one object in place of another in every module of a folder but the library's own."""
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None) or ""
        if name.partition(".")[0] != __name__.partition(".")[0] and file.startswith(within):
            for held, value in list(vars(module).items()):
                if value is old:
                    setattr(module, held, new)


class OurChildren(list[Any]):
    """Hermes' list of an agent's subagents, which refuses one that would ask another model.

    Args:
        agent: whose list it is.
        kind: the class of agents that ask the rollout's server.

    Raises:
        UnsupportedVersionError: from ``append``, and at the next model call of the rollout.
    """

    def __init__(self, agent: Hooks, kind: type[Hooks]) -> None:
        super().__init__()
        self._agent = weakref.ref(agent)
        self._kind = kind

    def append(self, child: Any) -> None:
        if not isinstance(child, self._kind):
            error = _changed(
                f"it made a subagent of the class {type(child).__name__} past this library, which would not ask the "
                "rollout's server"
            )
            agent = self._agent()
            if agent is not None and agent._rollout is not None:
                agent._rollout.broken = error  # Hermes turns what its tools raise into a result that the model reads
            raise error
        super().append(child)
