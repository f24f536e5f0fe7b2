"""Hermes' toolsets as a registry of tools."""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from hermes_atropos.errors import SandboxError, ToolDefinitionError, UnknownToolsetError
from hermes_atropos.hermes.releases import release
from hermes_atropos.hermes.versions import check_versions
from hermes_atropos.runtime import run_in_rollout_thread, run_to_end
from hermes_atropos.sandbox.wall import WallArguments
from hermes_atropos.toolcalls import ToolCall
from hermes_atropos.toolcalls.schema import nearest
from hermes_atropos.tools import Tool, ToolRegistry, ToolTask
from hermes_atropos.trajectory import ToolResult

if TYPE_CHECKING:
    from hermes_atropos.hermes.terminal import HermesSandbox

__all__ = ["HermesTools", "check_toolsets"]

#: Tools of Hermes that only read: they may run side by side. The others run alone, in the order of the calls.
HERMES_PARALLEL = frozenset(
    {"read_file", "search_files", "skill_view", "skills_list", "vision_analyze", "web_extract", "web_search"}
)

#: Tools of Hermes that have no place in a rollout, and why.
HERMES_REFUSED = {
    "clarify": "nobody is there to answer its questions",
    "close_terminal": "it belongs to Hermes' desktop application",
    "delegate_task": "its subagents need Hermes' own loop: use AtroposAIAgent",
    "memory": "it would carry what one rollout learned into the others",
    "read_terminal": "it belongs to Hermes' desktop application",
    "session_search": "it would show one rollout the others and the user's own sessions",
    "skill_manage": "it would carry what one rollout learned into the others",
}


#: True of Hermes' terminal: tests/test_tools.py runs each of these claims.
TERMINAL_NOTES = """\
# The terminal tool

- Commands run in bash, so arrays, [[ … ]] and pipefail work. Standard output and standard error come back as one text.
- The working directory and exported variables stay from one call to the next: activate a virtual environment once
  (`. .venv/bin/activate`), and it stays active. Variables that are not exported, functions and aliases do not stay.
- An exit code other than 0 says that the command failed, not that the tool did: read the output and decide.
- Nobody answers prompts, and standard input is empty: use flags such as -y, and no editors or pagers.
- A command that runs longer than its "timeout" (in seconds) is stopped with exit code 124: raise it for slow ones."""

PROCESS_NOTES = """
- Servers and watchers need "background": true; a trailing & and nohup are refused. Look after them with the {process}
  tool: nobody tells you when they end."""


class HermesTools(ToolRegistry):
    """Hermes' toolsets as a registry; each task has a sandbox and a todo list of its own.

    Tools that need a key or a program which is not there are left out, as in Hermes.

    Args:
        toolsets: their names in Hermes (``terminal``, ``file``, ``web``, ``todo`` …).
        disabled: names of toolsets whose tools are left out.
        time_limit_s, max_result_chars: as for ``ToolRegistry``.

    Raises:
        UnknownToolsetError: a name that Hermes doesn't know.
        ToolDefinitionError: a toolset that has no place in a rollout, or no tool that can run here.
        UnsupportedVersionError: this release of hermes-agent is not supported.
    """

    def __init__(
        self,
        toolsets: Sequence[str],
        *,
        disabled: Sequence[str] = (),
        time_limit_s: float | None = None,
        max_result_chars: int = 100_000,
    ) -> None:
        super().__init__(time_limit_s=time_limit_s, max_result_chars=max_result_chars)
        check_versions()
        check_toolsets([*toolsets, *disabled])
        for name in toolsets:
            _check_allowed(name)
        self.toolsets = list(toolsets)
        self._todos: dict[str, Any] = {}
        for definition in _usable(toolsets, disabled):
            name = definition["function"]["name"]
            run = self._todo if name in ("todo", "todo_list") else functools.partial(self._call_hermes, name)
            self._add(Tool(definition, run, blocking=True, parallel=name in HERMES_PARALLEL))
        if not self._tools:
            raise ToolDefinitionError(
                f"none of the tools of {', '.join(toolsets) or 'no toolset'} can run here: name a toolset such as "
                "'terminal' or 'file', or give Hermes the keys and programs that these need (hermes doctor)"
            )

    @classmethod
    def from_distribution(cls, name: str, *, seed: int | str | None = None, **options: Any) -> HermesTools:
        """Toolsets drawn from one of Hermes' distributions, each by its own probability; once a group, by custom.

        Args:
            name: ``development``, ``research``, ``safe`` … (Hermes' ``toolset_distributions.py``).
            seed: the same seed draws the same toolsets.
            options: for the constructor.

        Raises:
            UnknownToolsetError: Hermes has no such distribution.
        """
        check_versions()
        from toolset_distributions import list_distributions

        distributions = list_distributions()
        if name not in distributions:
            raise UnknownToolsetError(f"Hermes has no toolset distribution {name!r}. {nearest(name, distributions)}")
        chances: dict[str, float] = distributions[name]["toolsets"]
        usable = [toolset for toolset in chances if _usable([toolset])]
        draw = random.Random(seed)
        drawn = [toolset for toolset in chances if draw.random() * 100 < chances[toolset]]
        likeliest = sorted(usable, key=lambda toolset: -chances[toolset])[:1]
        return cls([toolset for toolset in drawn if toolset in usable] or likeliest, **options)

    @property
    def notes(self) -> str:
        if "terminal" not in self:
            return ""
        process = next((name for name in ("process", "process_manage") if name in self), None)
        return TERMINAL_NOTES + (PROCESS_NOTES.format(process=process) if process else "")

    def _call_hermes(self, name: str, arguments: dict[str, Any], task_id: str | None) -> Any:
        from model_tools import handle_function_call

        release().nobody_waits()
        return handle_function_call(name, arguments, task_id=task_id, enabled_tools=list(self._tools))

    def _todo(self, arguments: dict[str, Any], task_id: str | None) -> Any:
        """Hermes' loop keeps the list; here each task does."""
        from tools.todo_tool import TodoStore, todo_tool

        store = self._todos.setdefault(task_id or "", TodoStore())
        return todo_tool(arguments.get("todos"), arguments.get("merge", False), store)

    async def _open(
        self, task: ToolTask, workspace: str | Path | None, copy: bool, sandbox: str, wall: WallArguments
    ) -> None:
        from hermes_atropos.hermes.walled import open_sandbox

        def open_() -> None:  # on its thread to the end, whoever still waits: so the task always knows of it
            tools = list(self._tools)
            task.sandbox = open_sandbox(task.task_id, workspace, copy=copy, tools=tools, sandbox=sandbox, **wall)

        await run_in_rollout_thread(open_)

    async def _close(self, task: ToolTask) -> None:
        if task.sandbox is not None:
            self._todos.pop(cast("HermesSandbox", task.sandbox).hermes_id, None)
            await run_to_end(task.sandbox.release)

    async def _run(self, tool: Tool, call: ToolCall, task_id: str | None) -> Any:
        task = self._tasks.get(task_id or "")
        if task is None:
            raise SandboxError(f"no task {task_id!r} is open: run Hermes' tools in `async with tools.task() as task`")
        sandbox = cast("HermesSandbox", task.require_sandbox())

        def run() -> Any:
            sandbox.register(sandbox.hermes_id)
            return tool.run(call.arguments, sandbox.hermes_id)

        return await sandbox.call(run)

    def _result(self, name: str, value: Any) -> ToolResult:
        """Hermes answers in JSON. An error without an exit code is the tool's; one below 0 says that nothing ran."""
        result = super()._result(name, value)
        try:
            answer = json.loads(result.content)
        except ValueError:
            return result
        if isinstance(answer, dict):
            exit_code = answer.get("exit_code")
            result.exit_code = exit_code if isinstance(exit_code, int) else None
            if answer.get("error") and (result.exit_code is None or result.exit_code < 0):
                result.success, result.error = False, str(answer["error"])
        return result

    async def _keep(self, result: ToolResult, task_id: str | None) -> str:
        sandbox = cast("HermesSandbox", self._tasks[task_id or ""].require_sandbox())
        return await sandbox.call(lambda: sandbox.keep(result.content.encode(errors="surrogatepass")))


def _usable(toolsets: Sequence[str], disabled: Sequence[str] = ()) -> list[dict[str, Any]]:
    """What Hermes can run of these toolsets here, without what has no place in a rollout."""
    found = release().definitions(toolsets, disabled)
    return [definition for definition in found if definition["function"]["name"] not in HERMES_REFUSED]


def check_toolsets(names: Sequence[str]) -> None:
    """Refuse a name that Hermes would pass over in silence.

    Raises:
        UnknownToolsetError: a toolset that Hermes does not have, or a single name in place of a list.
    """
    import toolsets

    if isinstance(names, str):
        raise UnknownToolsetError(f"{names!r} is not a list of toolsets: write [{names!r}]")
    for name in names:
        if not toolsets.validate_toolset(name):
            raise UnknownToolsetError(f"Hermes has no toolset {name!r}. {nearest(name, toolsets.get_all_toolsets())}")


def _check_allowed(name: str) -> None:
    import toolsets

    tools = set(toolsets.resolve_toolset(name))
    if tools and tools <= set(HERMES_REFUSED):
        reasons = "; ".join(f"{tool}: {HERMES_REFUSED[tool]}" for tool in sorted(tools))
        raise ToolDefinitionError(f"the toolset {name!r} has no place in a rollout ({reasons}). Leave it out")
