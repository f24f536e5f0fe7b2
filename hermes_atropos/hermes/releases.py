"""What is asked of Hermes in other words from release to release.

The newest release is the base, and each class is what an older one lacks.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packaging.version import Version

from hermes_atropos.hermes.versions import hermes_version
from hermes_atropos.runtime import once

if TYPE_CHECKING:
    from hermes_atropos.hermes.hooks import Hooks

__all__ = ["Release", "release"]


class Release:
    """The newest."""

    def definitions(self, enabled: Sequence[str], disabled: Sequence[str]) -> list[dict[str, Any]]:
        """The tools of these toolsets that can run here, none of them deferred behind Hermes' tool search."""
        import model_tools

        return model_tools.get_tool_definitions(
            list(enabled), list(disabled) or None, quiet_mode=True, **self._undeferred
        )

    _undeferred: Mapping[str, Any] = {"skip_tool_search_assembly": True}

    def delegate(self, arguments: Mapping[str, Any], parent: Hooks) -> str:
        """Call ``delegate_task`` in the foreground: a subagent in the background would outlive the rollout."""
        from tools import delegate_tool

        accepted = inspect.signature(delegate_tool.delegate_task).parameters
        chosen = {name: value for name, value in arguments.items() if name in accepted}
        return delegate_tool.delegate_task(**chosen | self._foreground(chosen), parent_agent=parent)

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

    def rewrite_background(self, command: str) -> str:
        """A command whose ``A && B &`` does not hold the terminal; see Hermes' function."""
        return importlib.import_module(self._sudo)._rewrite_compound_background(command)

    def shown_characters(self) -> int:
        """How much the terminal tool shows of a command's output."""
        from tools.tool_output_limits import get_max_bytes

        return int(get_max_bytes())

    def extra_body(self, **endpoint: Any) -> Mapping[str, Any] | None:
        """What the user's configuration adds to the requests of an endpoint (``custom_providers``)."""
        from agent.agent_init import _custom_provider_extra_body_for_agent

        return _custom_provider_extra_body_for_agent(**endpoint)

    #: Whether a tool that runs alone does so on the thread of the loop; from 0.20 that thread waits for another.
    tools_run_here = False

    #: Whether the thread that reviews a conversation in the background knows for which agent it runs.
    reviews = True

    def lifecycle(self) -> Any:
        """The module that finds and closes terminal environments."""
        return importlib.import_module(self._lifecycle)

    #: Modules into which that of the terminal tool was divided.
    _sudo, _lifecycle = "tools.terminal_tool_sudo", "tools.terminal_tool_lifecycle"

    def forget(self, task_id: str) -> None:
        """Have the file tools forget what a task has read and written: they do with its environment."""

    def nobody_waits(self) -> None:
        """Tell Hermes' tools not to promise a later report: nobody is there to deliver it."""
        from gateway.session_context import declare_stateless_channel

        declare_stateless_channel()


class Before021(Release):
    _sudo = _lifecycle = "tools.terminal_tool"

    def forget(self, task_id: str) -> None:
        """These releases remember it for good, and warn whoever has a file of the same path later."""
        from tools.file_state import get_registry
        from tools.file_tools import _read_tracker, _read_tracker_lock

        with _read_tracker_lock:
            _read_tracker.pop(task_id, None)
        registry = get_registry()
        with registry._state_lock:
            paths = registry._reads.pop(task_id, {})
            for path in paths:
                if registry._last_writer.get(path, ("",))[0] == task_id:
                    del registry._last_writer[path]
        with registry._meta_lock:
            for path in paths:
                registry._path_locks.pop(path, None)
        self._forget_failed_patches(task_id)

    def _forget_failed_patches(self, task_id: str) -> None:
        from tools.file_tools import _patch_failure_lock, _patch_failure_tracker

        with _patch_failure_lock:
            _patch_failure_tracker.pop(task_id, None)


class Before020(Before021):
    tools_run_here = True


class Before019(Before020):
    def nobody_waits(self) -> None:
        """These releases know no channel without a session."""


class Before0182(Before019):
    def _foreground(self, chosen: Mapping[str, Any]) -> dict[str, Any]:
        return {"background": False}


class Before018(Before0182):
    reviews = False

    def extra_body(self, **endpoint: Any) -> Mapping[str, Any] | None:
        """These releases read nothing of it."""
        return None


class Before017(Before018):
    def _foreground(self, chosen: Mapping[str, Any]) -> dict[str, Any]:
        return {}


class Before016(Before017):
    _undeferred: Mapping[str, Any] = {}

    @contextlib.contextmanager
    def current_folder(self, folder: Path) -> Iterator[None]:
        """These releases have no current folder of their own: the system prompt names the process's."""
        yield


class Before015(Before016):
    def _forget_failed_patches(self, task_id: str) -> None:
        """These releases count none."""


RELEASES: Mapping[str, type[Release]] = {
    "0.15": Before015,
    "0.16": Before016,
    "0.17": Before017,
    "0.18": Before018,
    "0.18.2": Before0182,
    "0.19": Before019,
    "0.20": Before020,
    "0.21": Before021,
}


@once
def release() -> Release:
    """The installed release; the newest where it is unknown."""
    installed = hermes_version()
    older = (kind for bound, kind in RELEASES.items() if installed is not None and installed < Version(bound))
    return next(older, Release)()
