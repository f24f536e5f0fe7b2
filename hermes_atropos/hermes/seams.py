"""What the library leans on in Hermes, checked at the first use; and what it changes there, for our rollouts alone.

Hermes is held by the methods that it calls on ``self``: they kept their names and meanings through its rewrites. The
table below names each of them, and everything else of Hermes that this wing touches. :func:`check` looks for all of it
when the first agent is constructed, so that a release which moved something is an error that names it.

Where Hermes offers neither a method nor an argument, one of its functions is wrapped in place (``WRAPPED``). The
wrapper does what Hermes does, unless the code runs for one of our agents: a context variable, which Hermes' worker
threads inherit, tells (:func:`acting_for`).
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packaging.version import Version

from hermes_atropos.errors import UnsupportedVersionError
from hermes_atropos.hermes.versions import hermes_version
from hermes_atropos.runtime import once

if TYPE_CHECKING:
    from hermes_atropos.hermes.hooks import Hooks

__all__ = [
    "ATTRIBUTES",
    "SEAMS",
    "WRAPPED",
    "OurChildren",
    "Release",
    "Seam",
    "acting_agent",
    "acting_for",
    "check",
    "check_attributes",
    "release",
]


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


def _methods(module: str, owner: str, **methods: str | None) -> list[Seam]:
    return [Seam(module, f"{owner}.{name}", tuple(given.split()) if given else None) for name, given in methods.items()]


SEAMS: list[Seam] = [
    # The agent: what its loop calls on itself, and what we call on it.
    *_methods(
        "run_agent",
        "AIAgent",
        __init__="base_url api_key provider model max_iterations tool_delay max_tokens session_id",
        _build_assistant_message="assistant_message finish_reason",
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
    ),
    Seam("run_agent", "AIAgent.hard_interrupt", ("message",), since="0.20"),
    Seam("agent.context_compressor", "call_llm"),
    Seam("agent.turn_context", "_maybe_title_session_at_turn_start", since="0.20"),
    Seam("tools.delegate_tool", "delegate_task", ("goal", "context", "tasks", "parent_agent")),
    Seam("tools.delegate_tool", "_resolve_delegation_credentials", ("cfg", "parent_agent")),
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
        _kill_process="proc",
        _quote_cwd_for_cd="cwd",
        _wait_for_process="proc",
        _wrap_command="command cwd",
        cleanup=None,
        execute="command timeout stdin_data",
        get_temp_dir=None,
        init_session=None,
    ),
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
    Seam("agent.runtime_cwd", "set_session_cwd", ("cwd",), since="0.16"),
    # The training profile.
    Seam("hermes_cli.auth", "PROVIDER_REGISTRY"),
]

#: What an object of Hermes must have once it is constructed.
ATTRIBUTES: Mapping[str, tuple[str, ...]] = {
    "AIAgent": (
        *("_active_children", "_api_max_retries", "_interrupt_requested", "compression_enabled", "max_iterations"),
        *("model", "save_trajectories", "tools"),
    ),
    "LocalEnvironment": ("_cwd_marker", "_snapshot_path", "_snapshot_ready", "env"),
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
    here = [seam for seam in SEAMS if seam.is_in(hermes_version())]
    for seam in here:
        fault = seam.fault()
        if fault:
            raise _changed(f"{seam.module}.{seam.name} {fault}")
    for seam in here:
        if (seam.module, seam.name) in WRAPPED:
            _wrap(seam, WRAPPED[seam.module, seam.name])


# ── What runs for one of our agents ──────────────────────────────────────────────────────────────────────────────────

# A weak reference, because a thread or a task may outlive the rollout whose context it has.
_acting: ContextVar[weakref.ref[Hooks] | None] = ContextVar("hermes_atropos_agent", default=None)


@contextlib.contextmanager
def acting_for(agent: Hooks) -> Iterator[None]:
    """For the length of the block, what Hermes does in this context it does for ``agent``."""
    token = _acting.set(weakref.ref(agent))
    try:
        yield
    finally:
        _acting.reset(token)


def acting_agent() -> Hooks | None:
    """The agent of ours for which the current code runs; None elsewhere."""
    reference = _acting.get()
    return None if reference is None else reference()


def _wrap(seam: Seam, ours: Callable[..., Any]) -> None:
    *parts, last = seam.name.split(".")
    owner = functools.reduce(getattr, parts, importlib.import_module(seam.module))
    original = getattr(owner, last)

    @functools.wraps(original)
    def wrapped(*args: Any, **options: Any) -> Any:
        agent = acting_agent()
        return original(*args, **options) if agent is None else ours(agent, original, *args, **options)

    setattr(owner, last, wrapped)


def _construct(agent: Hooks, original: Callable[..., None], new: Any, *args: Any, **options: Any) -> None:
    """An agent that Hermes makes within a rollout (``delegate_task`` does) becomes a subagent on the same server."""
    from run_agent import AIAgent

    if type(new) is AIAgent:
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


def _summarise(agent: Hooks, original: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """The summary of a compression comes from the rollout's own server."""
    return agent._auxiliary_call(*args, **options)


def _no_title(agent: Hooks, original: Callable[..., None], *args: Any, **options: Any) -> None:
    """From 0.20, Hermes has the model of the user's configuration find a title for the session, on another thread."""


#: What is wrapped in place: (module, name) → what is called in a rollout, with its agent and the original.
WRAPPED: Mapping[tuple[str, str], Callable[..., Any]] = {
    ("run_agent", "AIAgent.__init__"): _construct,
    ("tools.delegate_tool", "_resolve_delegation_credentials"): _own_model_for_subagents,
    ("model_tools", "_resolve_active_context_length"): _unknown_context_length,
    ("agent.context_compressor", "call_llm"): _summarise,
    ("agent.turn_context", "_maybe_title_session_at_turn_start"): _no_title,
}


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
            if agent is not None:
                agent._rollout.broken = error  # Hermes turns what its tools raise into a result that the model reads
            raise error
        super().append(child)


# ── What differs by release: the newest is the base, and each class is what an older one lacks ───────────────────────


class Release:
    """What is asked of Hermes in other words from release to release."""

    def definitions(self, enabled: Sequence[str], disabled: Sequence[str]) -> list[dict[str, Any]]:
        """The tools of these toolsets that can run here, none of them deferred behind Hermes' tool search."""
        import model_tools

        found: list[dict[str, Any]] = model_tools.get_tool_definitions(
            list(enabled), list(disabled) or None, quiet_mode=True, **self._undeferred
        )
        return found

    _undeferred: Mapping[str, Any] = {"skip_tool_search_assembly": True}

    def delegate(self, arguments: Mapping[str, Any], parent: Hooks) -> str:
        """Call ``delegate_task`` in the foreground: a subagent in the background would outlive the rollout."""
        from tools import delegate_tool

        accepted = inspect.signature(delegate_tool.delegate_task).parameters
        chosen = {name: value for name, value in arguments.items() if name in accepted}
        answer: str = delegate_tool.delegate_task(**chosen | self._foreground(chosen), parent_agent=parent)
        return answer

    def _foreground(self, chosen: Mapping[str, Any]) -> dict[str, Any]:
        from tools.delegate_tool import _strip_model_hidden_task_fields

        return {"background": False, "tasks": _strip_model_hidden_task_fields(chosen.get("tasks"))}

    @contextlib.contextmanager
    def current_folder(self, folder: Path) -> Iterator[None]:
        """For the length of the block, this context's Hermes takes ``folder`` for the current one."""
        from agent.runtime_cwd import set_session_cwd

        token = set_session_cwd(str(folder))
        try:
            yield
        finally:
            token.var.reset(token)

    def lifecycle(self) -> Any:
        """The module that finds and closes terminal environments."""
        from tools import terminal_tool_lifecycle

        return terminal_tool_lifecycle

    def nobody_waits(self) -> None:
        """Tell Hermes' tools not to promise a later report: nobody is there to deliver it."""
        from gateway.session_context import declare_stateless_channel

        declare_stateless_channel()


class Before021(Release):
    def lifecycle(self) -> Any:
        from tools import terminal_tool

        return terminal_tool


class Before019(Before021):
    def nobody_waits(self) -> None:
        """These releases know no channel without a session."""


class Before0182(Before019):
    def _foreground(self, chosen: Mapping[str, Any]) -> dict[str, Any]:
        return {"background": False}


class Before017(Before0182):
    def _foreground(self, chosen: Mapping[str, Any]) -> dict[str, Any]:
        return {}


class Before016(Before017):
    _undeferred: Mapping[str, Any] = {}

    @contextlib.contextmanager
    def current_folder(self, folder: Path) -> Iterator[None]:
        """These releases have no current folder of their own: the system prompt names the process's."""
        yield


RELEASES: Mapping[str, type[Release]] = {
    "0.16": Before016,
    "0.17": Before017,
    "0.18.2": Before0182,
    "0.19": Before019,
    "0.21": Before021,
}


@once
def release() -> Release:
    """The installed release; the newest where it is unknown."""
    installed = hermes_version()
    older = (kind for bound, kind in RELEASES.items() if installed is not None and installed < Version(bound))
    return next(older, Release)()
